//! File descriptors: as many as the system lets us have, and one held back.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of descriptors reported where the system knows none.
const UNLIMITED: u64 = u64::MAX;

/// The first pause after an accept that failed.
const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// The longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Raises the soft limit on descriptors to the hard one (`RLIMIT_NOFILE`, `getrlimit(2)`), and
/// returns the soft limit in force. Where the system refuses, the limit stays as it is: the server
/// works, with fewer connections.
pub fn raise_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _refused_or_raised = setrlimit(
            Resource::Nofile,
            Rlimit {
                current: limit.maximum,
                ..limit
            },
        );
    }
    getrlimit(Resource::Nofile).current.unwrap_or(UNLIMITED)
}

/// The hard limit on descriptors, which [`raise_limit`] would reach.
#[must_use]
pub fn hard_limit() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(UNLIMITED)
}

/// A descriptor held back. When there are none left, a listener stays readable for ever with a
/// connection that it cannot accept; giving this one up for a moment lets the server accept that
/// connection and close it.
#[derive(Debug)]
pub struct SpareDescriptor {
    held: Option<File>,
}

impl SpareDescriptor {
    /// Opens the spare.
    ///
    /// # Errors
    /// Where there is no descriptor left already.
    pub fn new() -> io::Result<SpareDescriptor> {
        Ok(SpareDescriptor {
            held: Some(open()?),
        })
    }

    /// Runs `accept_and_close` with the spare given up, then takes it back. Where another thread
    /// was faster, there is no spare until a later call gets one.
    pub fn lend<R>(&mut self, accept_and_close: impl FnOnce() -> R) -> R {
        self.held = None;
        let result = accept_and_close();
        self.held = open().ok();
        result
    }

    /// Whether the spare is there.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

fn open() -> io::Result<File> {
    File::open("/dev/null")
}

/// How long to leave a listener alone after an accept that failed: 10 ms, doubled each time, 1 s at
/// most.
#[derive(Debug)]
pub struct AcceptBackoff {
    next: Duration,
}

impl Default for AcceptBackoff {
    fn default() -> Self {
        AcceptBackoff { next: BACKOFF_MIN }
    }
}

impl AcceptBackoff {
    /// The pause after one more failure.
    pub fn failed(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(BACKOFF_MAX);
        pause
    }

    /// An accept succeeded: the next failure pauses shortly again.
    pub fn succeeded(&mut self) {
        self.next = BACKOFF_MIN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_the_hard_one() {
        let raised = raise_limit();
        assert!(raised > 0);
        assert!(raised <= hard_limit());
        assert_eq!(raise_limit(), raised);
    }

    #[test]
    fn the_spare_is_lent_and_taken_back() {
        let mut spare = SpareDescriptor::new().unwrap();
        assert_eq!(spare.lend(|| 7), 7);
        assert!(spare.is_held());
    }

    #[test]
    fn pauses_double_up_to_a_second() {
        let mut backoff = AcceptBackoff::default();
        let pauses: Vec<u128> = (0..9).map(|_| backoff.failed().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        backoff.succeeded();
        assert_eq!(backoff.failed(), BACKOFF_MIN);
    }
}
