//! How many calls of a connection are in flight, and whether new work waits until there are fewer;
//! and whether another thread writes a block for it.
//!
//! The first two are one atomic number, so that a call that ends on one loop and a connection that
//! begins to wait on another cannot miss each other: whichever is second sees the first.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32};

/// The bit for new work that waits.
const WAITING: u32 = 1 << 31;

/// The calls in flight of one connection.
#[derive(Debug, Default)]
pub struct InFlight {
    calls: AtomicU32,
    is_writing: AtomicBool,
}

impl InFlight {
    /// The number of calls in flight.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.calls.load(Relaxed) & !WAITING
    }

    /// Whether a write of it is a job: until that is done, the connection is not read, so that what
    /// it sent next comes after the write.
    pub(crate) fn is_writing(&self) -> bool {
        self.is_writing.load(Acquire)
    }

    pub(crate) fn set_writing(&self, is_writing: bool) {
        self.is_writing.store(is_writing, Release);
    }

    /// A call began.
    pub(crate) fn start(&self) {
        self.calls.fetch_add(1, Relaxed);
    }

    /// Whether new work must wait because there are `max` calls already. [`InFlight::end`] reports
    /// when there is room again.
    pub(crate) fn must_wait(&self, max: u32) -> bool {
        let wait = |now: u32| (now & !WAITING >= max).then_some(now | WAITING);
        self.count() >= max && self.calls.fetch_update(Relaxed, Relaxed, wait).is_ok()
    }

    /// A call ended. Returns, once, whether there is room now for new work that waits.
    pub(crate) fn end(&self, max: u32) -> bool {
        let before = self.calls.fetch_sub(1, Relaxed);
        debug_assert_ne!(before & !WAITING, 0, "a call ends exactly once");
        if before & WAITING == 0 {
            return false;
        }
        let resume =
            |now: u32| (now & WAITING != 0 && now & !WAITING < max).then_some(now & !WAITING);
        self.calls.fetch_update(Relaxed, Relaxed, resume).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiter_is_notified_once_when_there_is_room() {
        let calls = InFlight::default();
        assert!(!calls.must_wait(2));
        calls.start();
        calls.start();
        assert_eq!(calls.count(), 2);
        assert!(calls.must_wait(2));
        assert!(calls.must_wait(2));
        assert_eq!(calls.count(), 2);
        assert!(calls.end(2));
        assert!(!calls.end(2));
        assert_eq!(calls.count(), 0);
    }

    #[test]
    fn a_lower_limit_keeps_the_call_waiting() {
        let calls = InFlight::default();
        for _ in 0..4 {
            calls.start();
        }
        assert!(calls.must_wait(2));
        assert!(!calls.end(2));
        assert!(!calls.end(2));
        assert!(calls.end(2));
    }
}
