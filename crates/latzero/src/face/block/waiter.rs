//! Futures that wait for versions of blocks. One thread of the app sleeps for 127 of them, on the
//! futexes of their blocks; the server takes no part in it.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use latzero_protocol::{Code, Ran};
use latzero_shm::Watch;

use super::{Block, Blocks, Slice, WAIT_SLICE};
use crate::error::Error;
use crate::sync::{lock, set_waker};

/// Futures of one app that wait at a time.
const WAITS_MAX: usize = 1024;

/// A thread without anything to wait for ends after this time.
const LINGER: Duration = Duration::from_secs(1);

/// The wait of one future.
#[derive(Debug)]
pub(super) struct Wait {
    block: Block,
    beyond: u64,
    deadline: Instant,
    /// None while its task is looking itself.
    waker: Mutex<Option<Waker>>,
}

impl Wait {
    /// Waits until there is a version beyond `beyond`, the block has moved, or `deadline`.
    ///
    /// # Errors
    /// `no_block`; `overloaded` if 1,024 futures of the app wait already.
    pub(super) async fn run(block: &Block, beyond: u64, deadline: Instant) -> Result<Slice, Error> {
        let wait = Arc::new(Wait {
            block: block.clone(),
            beyond,
            deadline,
            waker: Mutex::default(),
        });
        let waiter = Blocks::of(block.app().core()).waiters.join(&wait)?;
        poll_fn(|cx| {
            // Before the look, so that a change in between wakes the task.
            let was_looking = {
                let mut waker = lock(&wait.waker);
                let was_looking = waker.is_none();
                set_waker(&mut waker, cx.waker());
                was_looking
            };
            block.shared().wake_at_change(cx);
            match wait.look() {
                Some(end) => Poll::Ready(end),
                None => {
                    if was_looking {
                        waiter.watch.ring();
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// What it has come to; `None` if it goes on.
    fn look(&self) -> Option<Result<Slice, Error>> {
        match self.block.wait_slice(self.beyond, Duration::ZERO) {
            Ok(Slice::Over) if Instant::now() < self.deadline => None,
            end => Some(end),
        }
    }
}

/// A thread, and what it waits for.
#[derive(Debug, Default)]
struct Waiter {
    watch: Watch,
    waits: Mutex<Vec<Weak<Wait>>>,
}

impl Waiter {
    fn live(&self) -> Vec<Arc<Wait>> {
        let mut waits = lock(&self.waits);
        waits.retain(|wait| wait.strong_count() > 0);
        waits.iter().filter_map(Weak::upgrade).collect()
    }

    fn work(self: &Arc<Self>, all: &Weak<Mutex<Vec<Arc<Waiter>>>>) {
        loop {
            let rung = self.watch.rung();
            let waits = self.live();
            if !waits.is_empty() {
                self.sleep(rung, waits);
                continue;
            }
            self.watch.sleep(rung, &[], LINGER);
            let Some(all) = all.upgrade() else { return };
            let mut all = lock(&all);
            if self.watch.rung() == rung && self.live().is_empty() {
                all.retain(|waiter| !Arc::ptr_eq(waiter, self));
                return;
            }
        }
    }

    /// Wakes the tasks that can go on, and sleeps until others may.
    fn sleep(&self, rung: u32, waits: Vec<Arc<Wait>>) {
        let mut longest = WAIT_SLICE;
        let mut seen = Vec::with_capacity(waits.len());
        for wait in waits {
            // Before the look that it is for.
            seen.extend(wait.block.attachment().map(|attachment| attachment.seen()));
            if lock(&wait.waker).is_none() {
                continue;
            }
            if wait.look().is_none() {
                longest = longest.min(wait.deadline.saturating_duration_since(Instant::now()));
                continue;
            }
            if let Some(waker) = lock(&wait.waker).take() {
                waker.wake();
            }
        }
        self.watch.sleep(rung, &seen, longest);
    }
}

/// The threads of an app that wait for blocks.
#[derive(Debug, Default)]
pub(super) struct Waiters(Arc<Mutex<Vec<Arc<Waiter>>>>);

impl Waiters {
    /// Hands a wait to a thread that has room for it.
    fn join(&self, wait: &Arc<Wait>) -> Result<Arc<Waiter>, Error> {
        let mut all = lock(&self.0);
        let counts: Vec<_> = all.iter().map(|waiter| waiter.live().len()).collect();
        if counts.iter().sum::<usize>() >= WAITS_MAX {
            let text =
                format!("{WAITS_MAX} futures of this app wait for blocks; use `changes` for more");
            return Err(Error::new(Code::Overloaded, text).with_ran(Ran::No));
        }
        if let Some(at) = counts.iter().position(|n| *n < Watch::blocks_max()) {
            lock(&all[at].waits).push(Arc::downgrade(wait));
            return Ok(all[at].clone());
        }
        let waiter = Arc::new(Waiter::default());
        lock(&waiter.waits).push(Arc::downgrade(wait));
        let (works, left) = (waiter.clone(), Arc::downgrade(&self.0));
        let spawned = std::thread::Builder::new()
            .name("latzero-blocks".into())
            .spawn(move || works.work(&left));
        spawned.map_err(|e| {
            Error::new(Code::Internal, "cannot start a thread to wait for blocks")
                .with_ran(Ran::No)
                .with_source(e)
        })?;
        all.push(waiter.clone());
        Ok(waiter)
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        // The threads end when they find nothing to return to.
        let all = std::mem::take(&mut self.0);
        let waiters = std::mem::take(&mut *lock(&all));
        drop(all);
        waiters.iter().for_each(|waiter| waiter.watch.ring());
    }
}
