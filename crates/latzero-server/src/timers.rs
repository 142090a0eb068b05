//! Deadlines of pools, in order. The first loop waits for them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use latzero_fabric::{Pool, Time};

use crate::peer::Peer;

/// A pool behind its lock, with the deadline that the timers hold for it.
pub(crate) struct PoolCell {
    pub(crate) pool: Mutex<Pool<Arc<Peer>>>,
    number: u32,
    /// The earliest deadline armed; `u64::MAX` where there is none.
    armed: AtomicU64,
}

impl PoolCell {
    pub(crate) fn new(pool: Pool<Arc<Peer>>) -> Arc<PoolCell> {
        Arc::new(PoolCell {
            number: pool.number(),
            pool: Mutex::new(pool),
            armed: AtomicU64::new(u64::MAX),
        })
    }
}

struct Entry(Time, Arc<PoolCell>);

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1.number).cmp(&(other.0, other.1.number))
    }
}

/// The deadlines.
#[derive(Default)]
pub(crate) struct Timers(Mutex<BinaryHeap<Reverse<Entry>>>);

impl Timers {
    /// Sees to it that `cell` is looked at by `deadline`; true where that is now the first of all.
    pub(crate) fn arm(&self, cell: &Arc<PoolCell>, deadline: Time) -> bool {
        // Called with the pool held, so this word has one writer at a time.
        if deadline.0 >= cell.armed.load(Relaxed) {
            return false;
        }
        cell.armed.store(deadline.0, Relaxed);
        let mut heap = self
            .0
            .lock()
            .expect("no panic happens under the timers' lock");
        let is_first = heap.peek().is_none_or(|Reverse(first)| deadline < first.0);
        heap.push(Reverse(Entry(deadline, Arc::clone(cell))));
        is_first
    }

    /// The first deadline.
    pub(crate) fn next(&self) -> Option<Time> {
        self.0
            .lock()
            .expect("no panic happens under the timers' lock")
            .peek()
            .map(|Reverse(first)| first.0)
    }

    /// A pool whose deadline has come; it is armed again by the next look into it.
    pub(crate) fn pop_due(&self, now: Time) -> Option<Arc<PoolCell>> {
        let mut heap = self
            .0
            .lock()
            .expect("no panic happens under the timers' lock");
        if heap.peek().is_none_or(|Reverse(first)| first.0 > now) {
            return None;
        }
        let Reverse(Entry(_, cell)) = heap.pop()?;
        cell.armed.store(u64::MAX, Relaxed);
        Some(cell)
    }
}
