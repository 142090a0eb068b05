//! How what drives an app is woken, if it is no thread of this crate.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use crate::sync::{lock, set_waker};

/// Wakes the task or the event loop that drives an app.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    waker: Mutex<Option<Waker>>,
    is_due: AtomicBool,
}

impl Signal {
    /// Who is woken from now on.
    pub(super) fn set_waker(&self, waker: &Waker) {
        set_waker(&mut lock(&self.waker), waker);
    }

    pub(crate) fn wake(&self) {
        // Cloned, so that the waker runs outside the lock and stays for the next time.
        let waker = lock(&self.waker).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Makes the driver flush the outbox at its next turn.
    pub(crate) fn flush_due(&self) {
        if !self.is_due.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    /// Whether a flush is due.
    #[cfg(feature = "tokio")]
    pub(super) fn is_due(&self) -> bool {
        self.is_due.load(Ordering::Acquire)
    }

    /// The flush that was due begins.
    pub(super) fn flush_begins(&self) {
        self.is_due.store(false, Ordering::Release);
    }
}
