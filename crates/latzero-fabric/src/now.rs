//! Time in the core: an input, never read from a clock.

use std::time::Duration;

/// The earliest of some times that may be unset.
#[inline]
pub(crate) fn earliest<const N: usize>(times: [Option<Time>; N]) -> Option<Time> {
    // Called after every message, so it has no branches: `u64::MAX` is never a time.
    let times = times.map(|time| time.map_or(u64::MAX, |time| time.0));
    let first = times.into_iter().fold(u64::MAX, u64::min);
    (first < u64::MAX).then_some(Time(first))
}

/// A moment on a clock that only moves forward, in microseconds since a start that the driver
/// chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(pub u64);

impl Time {
    /// The moment `ms` milliseconds later.
    #[must_use]
    pub fn after_ms(self, ms: u64) -> Time {
        Time(self.0.saturating_add(ms.saturating_mul(1000)))
    }

    /// How long ago `earlier` was; zero if it is in the future.
    #[must_use]
    pub fn since(self, earlier: Time) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// The present, on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// For deadlines and intervals: it only moves forward.
    pub monotonic: Time,
    /// For people, and for state that outlives the server: milliseconds since the Unix epoch. It
    /// may jump.
    pub unix_ms: u64,
    /// For stored deadlines: as `unix_ms`, but without the jumps that the driver noticed.
    pub steady_ms: u64,
}

impl Now {
    /// A moment of the steady clock as milliseconds since the Unix epoch, by today's wall clock.
    #[must_use]
    pub fn unix_ms_of(&self, steady_ms: u64) -> u64 {
        (self.unix_ms + steady_ms).saturating_sub(self.steady_ms)
    }

    /// An earlier moment as milliseconds since the Unix epoch, by today's wall clock.
    #[must_use]
    pub fn unix_ms_at(&self, then: Time) -> u64 {
        let ago = self.monotonic.since(then).as_millis();
        self.unix_ms.saturating_sub(ago as u64)
    }
}
