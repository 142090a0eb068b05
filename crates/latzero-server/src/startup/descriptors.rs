//! File descriptors: raises the limit, divides them, and reserves one.

use std::fs::File;
use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The first pause after an accept that failed.
const BACKOFF_MIN: Duration = Duration::from_millis(10);

/// The longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Raises the soft limit on descriptors to the hard one (`RLIMIT_NOFILE`, `getrlimit(2)`). If the
/// system refuses, the limit is unchanged, and the server works with fewer connections.
pub fn raise_limit() {
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
}

/// Descriptors for the server itself: listeners, logs, the database, the loops; fewer if there are
/// few.
const OWN: u64 = 64;

/// Descriptors reserved for connections of administrators.
const ADMINISTRATORS: u64 = 16;

/// Descriptors of one connection: its socket, and over a Unix socket the process that opened it.
const PER_CONNECTION: u64 = 2;

/// Descriptors of one memory block: the server's own, and one that is being sent to a client.
const PER_BLOCK: u64 = 2;

/// The division of descriptors, so that blocks never use those of connections, and neither uses
/// those of the server itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// How many connections there is room for.
    pub connections: usize,
    /// How many blocks there is room for.
    pub blocks: usize,
}

impl Shares {
    /// Descriptors needed for a number of connections and blocks.
    #[must_use]
    pub fn needed(connections: usize, blocks: usize) -> u64 {
        let of_blocks = (blocks as u64).saturating_mul(PER_BLOCK);
        let of_connections = (connections as u64).saturating_mul(PER_CONNECTION);
        of_connections
            .saturating_add(of_blocks)
            .saturating_add(OWN + ADMINISTRATORS)
    }

    /// Divides `descriptors` between the wanted connections and blocks. If there are too few, each
    /// gets half, and what one does not need goes to the other.
    #[must_use]
    pub fn of(descriptors: u64, connections: usize, blocks: usize) -> Shares {
        let reserved = OWN.min(descriptors / 2) + ADMINISTRATORS.min(descriptors / 8);
        let free = descriptors - reserved;
        let wanted_by_connections = (connections as u64).saturating_mul(PER_CONNECTION);
        let wanted_by_blocks = (blocks as u64).saturating_mul(PER_BLOCK);
        let of_blocks =
            wanted_by_blocks.min((free / 2).max(free.saturating_sub(wanted_by_connections)));
        let of_connections = wanted_by_connections.min(free - of_blocks);
        Shares {
            connections: usize::try_from(of_connections / PER_CONNECTION).unwrap_or(connections),
            blocks: usize::try_from(of_blocks / PER_BLOCK).unwrap_or(blocks),
        }
    }
}

/// A spare descriptor. When there are none left, a listener stays readable forever with a
/// connection that it cannot accept. Closing the spare for a moment lets the server accept that
/// connection and close it.
#[derive(Debug)]
pub struct SpareDescriptor {
    held: Option<File>,
}

impl SpareDescriptor {
    /// Opens the spare.
    ///
    /// # Errors
    /// If there is no descriptor left already.
    pub fn new() -> io::Result<SpareDescriptor> {
        Ok(SpareDescriptor {
            held: Some(open()?),
        })
    }

    /// Closes the spare, runs `accept_and_close`, and opens the spare again. If another thread is
    /// faster, there is no spare until a later call gets one.
    pub fn lend<R>(&mut self, accept_and_close: impl FnOnce() -> R) -> R {
        self.held = None;
        let result = accept_and_close();
        self.held = open().ok();
        result
    }

    /// Whether there is a spare.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }
}

fn open() -> io::Result<File> {
    File::open("/dev/null")
}

/// How long to pause accepting after an accept failed: 10 ms, doubled each time, at most 1 s.
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

    /// An accept succeeded: the pause after the next failure is short again.
    pub fn succeeded(&mut self) {
        self.next = BACKOFF_MIN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_the_hard_one() {
        raise_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[test]
    fn descriptors_are_divided() {
        let check = |descriptors, wanted: (usize, usize), expected: (usize, usize)| {
            let Shares {
                connections,
                blocks,
            } = Shares::of(descriptors, wanted.0, wanted.1);
            assert_eq!(
                (connections, blocks),
                expected,
                "{descriptors} for {wanted:?}"
            );
            let used = PER_CONNECTION * connections as u64 + PER_BLOCK * blocks as u64;
            assert!(used <= descriptors, "{used} of {descriptors}");
        };
        check(1 << 20, (4096, 4096), (4096, 4096));
        check(u64::MAX, (4096, 4096), (4096, 4096));
        // Each gets half of the 944 that are left.
        check(1024, (4096, 4096), (236, 236));
        check(1024, (100, 4096), (100, 372));
        check(1024, (4096, 10), (462, 10));
        check(256, (4096, 4096), (44, 44));
        check(64, (4096, 4096), (6, 6));
        check(8, (4096, 4096), (1, 0));
        check(0, (4096, 4096), (0, 0));
        let needed = Shares::needed(4096, 4096);
        check(needed, (4096, 4096), (4096, 4096));
        check(needed - 1, (4096, 4096), (4096, 4095));
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
