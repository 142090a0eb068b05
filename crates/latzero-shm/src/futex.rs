//! Sleeping on words of shared memory: futex(2), and futex_waitv(2) for several at once.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Wait, WaitFlags, WaitPtr, WaitvFlags};
use rustix::time::{ClockId, Timespec, clock_gettime};

use crate::memory::Fault;

// Not private: the other end is another process.
const SHARED: Flags = Flags::empty();

/// Sleeps while `word` is `value`, at most `timeout`. It may return early.
pub(crate) fn wait(word: &AtomicU32, value: u32, timeout: Option<Duration>) -> Result<(), Fault> {
    let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
    slept(futex::wait(word, SHARED, value, timeout.as_ref()))
}

/// Sleeps while each word has its value, at most `longest`. It may return early.
pub(crate) fn wait_many<'a>(
    words: impl Iterator<Item = (&'a AtomicU32, u32)>,
    longest: Duration,
) -> Result<(), Fault> {
    let waits: Vec<Wait> = words
        .map(|(word, value)| {
            let mut wait = Wait::new();
            wait.val = value.into();
            wait.uaddr = WaitPtr::new(word.as_ptr().cast());
            wait.flags = WaitFlags::SIZE_U32;
            wait
        })
        .collect();
    let clock = ClockId::Monotonic;
    let until = Timespec::try_from(longest).map(|longest| clock_gettime(clock) + longest);
    let flags = WaitvFlags::empty();
    slept(futex::waitv(&waits, flags, until.ok().as_ref(), clock).map(drop))
}

/// Whether the kernel can wait for several words: it then refuses a wait for none as invalid.
pub(crate) fn can_wait_many() -> bool {
    let none = futex::waitv(&[], WaitvFlags::empty(), None, ClockId::Monotonic);
    none == Err(Errno::INVAL)
}

/// Wakes everybody who sleeps on `word`.
pub(crate) fn wake(word: &AtomicU32) {
    // An address that is no memory any more is the waiters' concern, not the waker's.
    let _ = futex::wake(word, SHARED, i32::MAX as u32);
}

fn slept(result: rustix::io::Result<()>) -> Result<(), Fault> {
    match result {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
        Err(error) => Err(Fault::Io(error.into())),
    }
}
