//! Deadlines of pools, in order. The first loop waits for them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

use latzero_fabric::{Pool, Time};

use crate::host::IoHost;

/// A pool behind its lock, with the deadline that the timers hold for it.
pub(crate) struct PoolCell {
    pub(crate) pool: Mutex<Pool<IoHost>>,
    number: u32,
    /// The earliest deadline armed; `u64::MAX` if there is none.
    armed: AtomicU64,
}

impl std::fmt::Debug for PoolCell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolCell")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl PoolCell {
    pub(crate) fn new(pool: Pool<IoHost>) -> Arc<PoolCell> {
        Arc::new(PoolCell {
            number: pool.number(),
            pool: Mutex::new(pool),
            armed: AtomicU64::new(u64::MAX),
        })
    }
}

/// The deadlines: one for each pool that has any.
#[derive(Default)]
pub(crate) struct Timers(Mutex<BTreeMap<(Time, u32), Arc<PoolCell>>>);

impl Timers {
    /// Schedules `cell` for `deadline`; true if that is now the earliest.
    pub(crate) fn arm(&self, cell: &Arc<PoolCell>, deadline: Time) -> bool {
        // Called with the pool locked: only the first loop may change this word in the meantime,
        // and it checks the pool next.
        if deadline.0 >= cell.armed.load(Relaxed) {
            return false;
        }
        let mut deadlines = self.lock();
        let before = cell.armed.swap(deadline.0, Relaxed);
        deadlines.remove(&(Time(before), cell.number));
        let is_first = deadlines
            .first_key_value()
            .is_none_or(|(first, _)| deadline < first.0);
        deadlines.insert((deadline, cell.number), Arc::clone(cell));
        is_first
    }

    /// Removes `cell`, which no longer has a deadline. Called with the pool locked.
    pub(crate) fn disarm(&self, cell: &Arc<PoolCell>) {
        if cell.armed.load(Relaxed) == u64::MAX {
            return;
        }
        let mut deadlines = self.lock();
        let before = cell.armed.swap(u64::MAX, Relaxed);
        deadlines.remove(&(Time(before), cell.number));
    }

    /// The first deadline.
    pub(crate) fn next(&self) -> Option<Time> {
        self.lock().first_key_value().map(|(first, _)| first.0)
    }

    /// A pool whose deadline has passed; its next deadline is armed when it is handled.
    pub(crate) fn pop_due(&self, now: Time) -> Option<Arc<PoolCell>> {
        let mut deadlines = self.lock();
        let first = deadlines
            .first_entry()
            .filter(|first| first.key().0 <= now)?;
        let cell = first.remove();
        cell.armed.store(u64::MAX, Relaxed);
        Some(cell)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Time, u32), Arc<PoolCell>>> {
        self.0
            .lock()
            .expect("no panic happens under the timers' lock")
    }
}

#[cfg(test)]
mod tests {
    use latzero_fabric::{Limits, Prng};
    use latzero_protocol::PoolName;

    use super::*;

    fn cell(number: u32) -> Arc<PoolCell> {
        let name = PoolName::new("p").unwrap();
        PoolCell::new(Pool::new(number, name, Limits::default(), Prng::new(1)))
    }

    #[test]
    fn a_pool_has_one_timer_however_often_it_is_moved() {
        let timers = Timers::default();
        let (a, b) = (cell(1), cell(2));
        assert!(timers.arm(&a, Time(100)));
        for short in 1..50 {
            assert!(timers.arm(&a, Time(short)));
            assert!(Arc::ptr_eq(&timers.pop_due(Time(short)).unwrap(), &a));
            assert!(timers.arm(&a, Time(100)));
        }
        assert!(!timers.arm(&b, Time(100)));
        assert_eq!(timers.lock().len(), 2);
        assert!(timers.pop_due(Time(99)).is_none());
        timers.disarm(&a);
        assert!(Arc::ptr_eq(&timers.pop_due(Time(100)).unwrap(), &b));
        assert_eq!(timers.next(), None);
    }
}
