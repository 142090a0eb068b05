//! New versions of a block, as they appear.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use futures_core::Stream;
use serde_json::json;

use super::{Block, Blocks, number};
use crate::error::Error;

/// New versions of a block. If they appear faster than they are read, only the newest is returned.
#[derive(Debug)]
pub struct Changes {
    block: Block,
    seen: u64,
}

impl Changes {
    pub(super) async fn open(block: &Block) -> Result<Changes, Error> {
        Blocks::of(block.app().core()).begin_subscription(block.shared());
        let mut changes = Changes {
            block: block.clone(),
            seen: 0,
        };
        let reply = block.ask("memory_subscribe", &json!({})).await?;
        changes.seen = number(&reply, "version");
        block.shared().heard(changes.seen);
        Ok(changes)
    }

    pub(crate) fn app(&self) -> &crate::App {
        self.block.app()
    }

    /// The next version; `None` after the block was removed or the app closed.
    pub async fn recv(&mut self) -> Option<u64> {
        poll_fn(|cx| self.poll_version(cx)).await
    }

    pub(crate) fn poll_version(&mut self, cx: &mut Context<'_>) -> Poll<Option<u64>> {
        let shared = self.block.shared().clone();
        // Before the check, so that a change in between wakes the task.
        shared.wake_at_change(cx);
        let newest = shared.newest.load(Ordering::Acquire);
        if newest != self.seen && newest > 0 {
            self.seen = newest;
            return Poll::Ready(Some(newest));
        }
        let is_over = shared.is_gone.load(Ordering::Acquire) || self.block.app().core().is_ended();
        if is_over {
            return Poll::Ready(None);
        }
        Poll::Pending
    }
}

impl Stream for Changes {
    type Item = u64;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u64>> {
        self.poll_version(cx)
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        let core = self.block.app().core();
        Blocks::of(core).end_subscription(core, self.block.shared());
    }
}
