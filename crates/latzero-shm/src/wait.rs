//! Waits for a version through the block itself: a futex in its header that every publish wakes,
//! without the server.

use std::time::{Duration, Instant};

use crate::attachment::{Attachment, Bytes, on};
use crate::format::{State, at};

/// The longest single sleep of a wait: a change without a wakeup is noticed after it.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// How long to sleep between checks if there is no futex.
const GLANCE: Duration = Duration::from_millis(20);

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// There is a newer version: this one.
    Newer(u64),
    /// A newer generation replaced the block: attach again.
    Superseded,
    /// The block was removed.
    Closed,
    /// The time ended.
    TimedOut,
}

impl Attachment {
    /// Waits until there is a version newer than `beyond`, without the server.
    ///
    /// A persistent block's file is not read through a mapping, but its first page is mapped for
    /// the futex's address. If the file was shortened, the kernel refuses to sleep there, and the
    /// block is checked 50 times a second instead.
    #[must_use]
    pub fn wait(&self, beyond: u64, timeout: Option<Duration>) -> Waited {
        // A time that overflows means forever.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let page = match &self.bytes {
            Bytes::Mapped(mapped) => Some(mapped),
            Bytes::File(file) => file.page(),
        };
        loop {
            // Read before the state that it announces, so that a change in between ends the sleep
            // at once.
            let seen = on!(&self.bytes, memory => memory.load_half(at::NOTIFY)).unwrap_or(0);
            let version = self.version();
            if version > beyond {
                return Waited::Newer(version);
            }
            match self.state() {
                State::Live => {}
                State::Superseded => return Waited::Superseded,
                State::Closed | State::Corrupt => return Waited::Closed,
            }
            let left = match deadline {
                None => SLEEP_MAX,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => left.min(SLEEP_MAX),
                    _ => return Waited::TimedOut,
                },
            };
            let slept = page.map(|page| page.wait(at::NOTIFY, seen, Some(left)));
            if !matches!(slept, Some(Ok(()))) {
                // The futex is not available: check again soon.
                std::thread::sleep(left.min(GLANCE));
            }
        }
    }
}
