//! Blocks that `share` fills for calls, and fills again for later ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use latzero::{Code, Error, Ran};

/// Everything that uses a block of `share` holds a clone: handles, views, and calls under way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Share(Arc<AtomicBool>);

impl Share {
    /// Whether only the one who asks holds it, and no handler may still read the block.
    pub(crate) fn is_free(&self) -> bool {
        if Arc::strong_count(&self.0) != 1 {
            return false;
        }
        // The count is read without ordering: what another thread did to the block, or noted in the
        // flag, before it dropped its clone comes before what follows.
        fence(Ordering::Acquire);
        !self.0.load(Ordering::Relaxed)
    }

    /// A handler may still read the block, for an unknown time.
    fn spoil(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The blocks of `share` that a call passes. Unless the call was answered, its handler may still
/// run, and they are not filled again.
#[derive(Debug, Default)]
pub(crate) struct Lent(Vec<Share>);

impl Lent {
    pub(crate) fn of(shares: impl Iterator<Item = Share>) -> Self {
        Lent(shares.collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The call has ended.
    pub(crate) fn end<T>(mut self, result: &Result<T, Error>) {
        let has_handler_ended = match result {
            Ok(_) => true,
            Err(error) => error.ran() == Some(Ran::No) || error.kind() == Code::HandlerError,
        };
        if has_handler_ended {
            self.0.clear();
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.iter().for_each(Share::spoil);
    }
}
