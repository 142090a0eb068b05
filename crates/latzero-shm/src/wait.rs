//! Waits for a version through the block itself: a futex in its header that every publish wakes,
//! without the server. [`Attachment::wait`] waits for one block, and a [`Watch`] for many.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use crate::attachment::{Attachment, Bytes, on};
use crate::format::{State, at};
use crate::futex;
use crate::mapped::Mapped;

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
        loop {
            // Before the state that it announces, so that a change in between ends the sleep.
            let seen = self.announced();
            if let Some(waited) = self.glance(beyond) {
                return waited;
            }
            let left = match deadline {
                None => SLEEP_MAX,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => left.min(SLEEP_MAX),
                    _ => return Waited::TimedOut,
                },
            };
            let slept = self
                .page()
                .map(|page| page.wait(at::NOTIFY, seen, Some(left)));
            if !matches!(slept, Some(Ok(()))) {
                // The futex is not available: check again soon.
                std::thread::sleep(left.min(GLANCE));
            }
        }
    }

    /// What a wait has come to so far; `None` if it goes on.
    fn glance(&self, beyond: u64) -> Option<Waited> {
        let version = self.version();
        if version > beyond {
            return Some(Waited::Newer(version));
        }
        match self.state() {
            State::Live => None,
            State::Superseded => Some(Waited::Superseded),
            State::Closed | State::Corrupt => Some(Waited::Closed),
        }
    }

    fn announced(&self) -> u32 {
        on!(&self.bytes, memory => memory.load_half(at::NOTIFY)).unwrap_or(0)
    }

    /// The page that has the futex.
    fn page(&self) -> Option<&Mapped> {
        match &self.bytes {
            Bytes::Mapped(mapped) => Some(mapped),
            Bytes::File(file) => file.page(),
        }
    }

    /// Its state now, for a [`Watch`].
    #[must_use]
    pub fn seen(self: &Arc<Self>) -> Seen {
        Seen {
            announced: self.announced(),
            attachment: self.clone(),
        }
    }
}

/// The state of a block at some time: a [`Watch`] sleeps while it has not changed.
#[derive(Debug)]
pub struct Seen {
    attachment: Arc<Attachment>,
    announced: u32,
}

/// What a thread sleeps on that waits for many blocks: their futexes, and a bell of its own.
#[derive(Debug, Default)]
pub struct Watch {
    bell: AtomicU32,
}

/// futex_waitv(2) takes 128 words, of which one is the bell. It came with Linux 5.16.
static BLOCKS_MAX: LazyLock<usize> = LazyLock::new(|| match futex::can_wait_many() {
    true => 127,
    false => 1,
});

impl Watch {
    /// The most blocks that it sleeps on: 127, or one where the kernel can't wait for many.
    #[must_use]
    pub fn blocks_max() -> usize {
        *BLOCKS_MAX
    }

    /// How often the bell was rung. What is changed before [`Watch::ring`] is seen after this.
    #[must_use]
    pub fn rung(&self) -> u32 {
        self.bell.load(Ordering::Acquire)
    }

    /// Ends the sleep.
    pub fn ring(&self) {
        self.bell.fetch_add(1, Ordering::Release);
        futex::wake(&self.bell);
    }

    /// Sleeps for at most `longest`, until one of `blocks` has changed since it was seen, or the
    /// bell was rung more than `rung` times. It may return early. A block whose futex can't be used
    /// is to be checked 50 times a second: the sleep is not longer then. Where the kernel can't
    /// wait for many, the bell does not end a sleep for a block.
    pub fn sleep(&self, rung: u32, blocks: &[Seen], longest: Duration) {
        let words: Option<Vec<_>> = blocks
            .iter()
            .map(|seen| {
                Some((
                    seen.attachment.page()?.half(at::NOTIFY).ok()?,
                    seen.announced,
                ))
            })
            .collect();
        let slept = match words.as_deref() {
            None => false,
            Some([(word, seen)]) if Self::blocks_max() == 1 => {
                futex::wait(word, *seen, Some(longest)).is_ok()
            }
            Some([]) => futex::wait(&self.bell, rung, Some(longest)).is_ok(),
            Some(words) => {
                let bell = (&self.bell, rung);
                futex::wait_many(words.iter().copied().chain([bell]), longest).is_ok()
            }
        };
        if !slept {
            std::thread::sleep(longest.min(GLANCE));
        }
    }
}
