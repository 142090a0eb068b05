//! The server's clocks.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use latzero_fabric::{Now, Time};

/// The server's clock: monotonic microseconds, and the wall clock.
pub(crate) struct Clock {
    start: Instant,
    /// By how much the wall clock is ahead of the steady one, in milliseconds: the sum of its
    /// jumps.
    ahead_ms: AtomicI64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        // A second in, so that times before the start can be expressed.
        let start = Instant::now();
        Clock {
            start: start.checked_sub(Duration::from_secs(1)).unwrap_or(start),
            ahead_ms: AtomicI64::new(0),
        }
    }

    pub(crate) fn now(&self) -> Time {
        Time(self.start.elapsed().as_micros() as u64)
    }

    /// The present, on all clocks.
    pub(crate) fn read(&self) -> Now {
        let unix_ms = wall_ms();
        Now {
            monotonic: self.now(),
            unix_ms,
            steady_ms: unix_ms.saturating_add_signed(-self.ahead_ms.load(Relaxed)),
        }
    }

    /// By how much the wall clock is ahead of the steady one.
    pub(crate) fn ahead_ms(&self) -> i64 {
        self.ahead_ms.load(Relaxed)
    }

    /// Sets the sum of all jumps of the wall clock.
    pub(crate) fn set_ahead_ms(&self, ms: i64) {
        self.ahead_ms.store(ms, Relaxed);
    }

    pub(crate) fn unix_ms(&self, then: Time) -> u64 {
        wall_ms().saturating_sub(self.now().since(then).as_millis() as u64)
    }
}

fn wall_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |since| since.as_millis() as u64)
}
