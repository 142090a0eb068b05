//! New versions of a block, as they appear.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use futures_core::Stream;
use serde_json::json;

use super::{Block, Blocks, number, removed, timed_out};
use crate::error::Error;
use crate::sync::{lock, set_waker};

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
        // Registered before the check, so that a change in between wakes the task.
        {
            let mut wakers = lock(&shared.wakers);
            if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
        }
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

    /// The first version beyond `beyond`.
    pub(super) async fn beyond(&mut self, beyond: u64, deadline: Instant) -> Result<u64, Error> {
        if self.seen > beyond {
            return Ok(self.seen);
        }
        let waiting = Blocks::begin_wait(self.block.app().core())?;
        let mut alarm = Alarm::default();
        let waited = poll_fn(|cx| {
            loop {
                match self.poll_version(cx) {
                    Poll::Ready(Some(version)) if version > beyond => {
                        return Poll::Ready(Ok(version));
                    }
                    Poll::Ready(Some(_)) => {}
                    Poll::Ready(None) => return Poll::Ready(Err(removed(self.block.id()))),
                    Poll::Pending if Instant::now() >= deadline => {
                        return Poll::Ready(Err(timed_out(self.block.id())));
                    }
                    Poll::Pending => {
                        alarm.set(cx, deadline);
                        return Poll::Pending;
                    }
                }
            }
        })
        .await;
        drop(waiting);
        waited
    }
}

/// Wakes a task at a given time, from a separate thread, because no runtime is assumed here. The
/// thread ends with the alarm.
#[derive(Default)]
struct Alarm(Option<Arc<Bell>>);

#[derive(Default)]
struct Bell {
    waker: Mutex<Option<Waker>>,
    is_off: Condvar,
}

impl Alarm {
    fn set(&mut self, cx: &Context<'_>, at: Instant) {
        if let Some(bell) = &self.0 {
            set_waker(&mut lock(&bell.waker), cx.waker());
            return;
        }
        let bell = Arc::new(Bell::default());
        *lock(&bell.waker) = Some(cx.waker().clone());
        self.0 = Some(bell.clone());
        // If no thread can be started, the next change ends the wait instead.
        let _ = std::thread::Builder::new()
            .name("latzero-alarm".into())
            .spawn(move || bell.ring_at(at));
    }
}

impl Bell {
    fn ring_at(&self, at: Instant) {
        let mut waker = lock(&self.waker);
        loop {
            let left = at.saturating_duration_since(Instant::now());
            if waker.is_none() {
                return;
            }
            if left.is_zero() {
                break;
            }
            waker = self
                .is_off
                .wait_timeout(waker, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let waker = waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some(bell) = &self.0 {
            *lock(&bell.waker) = None;
            bell.is_off.notify_all();
        }
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
