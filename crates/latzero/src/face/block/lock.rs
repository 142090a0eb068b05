//! A block's lock, held by a guard.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use latzero_protocol::limits::TTL_MAX_MS;
use latzero_protocol::memory::LockMode;
use latzero_protocol::{Code, Ran};
use serde_json::json;

use super::{Block, number};
use crate::error::Error;
use crate::face::outgoing::Calling;
use crate::payload::Reply;
use crate::sync::lock;

/// How much longer than its wait a request for a lock may take: while the app reconnects, and until
/// it is answered.
const GRACE: Duration = Duration::from_secs(1);

/// A block's lock. Dropping it releases the lock; the lock is lost when the connection ends.
#[derive(Debug)]
pub struct BlockLock {
    block: Block,
    fence: u64,
    epoch: u32,
    is_given_back: bool,
    source: Source,
}

/// The owner of the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// This connection took it.
    Taken,
    /// The program that started this one holds it, and releases it.
    Inherited,
}

/// The environment variable with which a program passes the locks that it holds to the programs
/// that it starts: `POOL/BLOCK=FENCE` for an exclusive lock and `POOL/BLOCK=FENCE/shared` for a
/// shared one, separated by blanks. A block's name has neither a blank nor `=`.
pub const LOCKS_VARIABLE: &str = "LATZERO_LOCKS";

/// The exclusive lock of a block that the program that started this one holds: its fence.
pub(super) fn inherited_fence(pool: &str, id: &str) -> Option<u64> {
    match inherited(pool, id) {
        Some((fence, LockMode::Exclusive)) => Some(fence),
        _ => None,
    }
}

fn inherited(pool: &str, id: &str) -> Option<(u64, LockMode)> {
    lock_in(&std::env::var(LOCKS_VARIABLE).ok()?, pool, id)
}

/// If there are several, the last one counts: it belongs to the lock that was taken last.
fn lock_in(locks: &str, pool: &str, id: &str) -> Option<(u64, LockMode)> {
    let of_block = |entry: &str| {
        let (block, held) = entry.rsplit_once('=')?;
        let (fence, mode) = match held.strip_suffix("/shared") {
            Some(fence) => (fence, LockMode::Shared),
            None => (held, LockMode::Exclusive),
        };
        let is_meant = block.split_once('/') == Some((pool, id));
        Some((fence.parse().ok().filter(|_| is_meant)?, mode))
    };
    locks.split_ascii_whitespace().rev().find_map(of_block)
}

/// An exclusive lock that would wait for the program that started this one, which waits for this
/// one to end.
fn waits_for_itself(id: &str) -> Error {
    let text = format!("this program runs under a shared lock of block '{id}', which only reads");
    Error::new(Code::Locked, text).with_ran(Ran::No)
}

impl BlockLock {
    pub(super) async fn take(
        block: &Block,
        mode: LockMode,
        wait: Duration,
        lease: Option<Duration>,
    ) -> Result<BlockLock, Error> {
        block.check_fault()?;
        if let Some((fence, held)) = inherited(block.pool(), block.id()) {
            if (held, mode) == (LockMode::Shared, LockMode::Exclusive) {
                return Err(waits_for_itself(block.id()));
            }
            let epoch = block.app().core().epoch_now().unwrap_or_default();
            return Ok(BlockLock {
                block: block.clone(),
                fence,
                epoch,
                is_given_back: true,
                source: Source::Inherited,
            });
        }
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let wait = wait.min(Duration::from_millis(TTL_MAX_MS));
        let wait_ms = ms(wait);
        let mut more = json!({"mode": mode.as_str(), "wait": wait_ms});
        if let Some(lease) = lease {
            more["lease"] = ms(lease).clamp(1, TTL_MAX_MS).into();
        }
        let app = block.app();
        let ask = async || {
            let message = block.shared().message("memory_lock", &more);
            let calling = Calling::of_message(app, message, Ok).within(wait + GRACE);
            let mut asked = LockRequest(Some((block.clone(), calling)));
            poll_fn(|cx| asked.poll(cx)).await
        };
        let known = lock(&block.shared().current).held();
        let reply = match ask().await {
            Err(e) if e.kind() == Code::NoBlock && block.is_back(&known).await => ask().await,
            reply => reply,
        }?;
        BlockLock::granted(block, reply)
    }

    /// Lets edits of a sealed block use it; for other blocks the server knows who holds the lock.
    pub(super) fn used_by_edits(self, mode: LockMode) -> BlockLock {
        if mode == LockMode::Exclusive && !self.is_inherited() {
            self.block.shared().locked(self.fence);
        }
        self
    }

    fn granted(block: &Block, reply: Reply) -> Result<BlockLock, Error> {
        let epoch = reply.epoch;
        let reply: serde_json::Value = reply.into()?;
        Ok(BlockLock {
            block: block.clone(),
            fence: number(&reply, "fence"),
            epoch,
            is_given_back: false,
            source: Source::Taken,
        })
    }

    /// The block.
    #[must_use]
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// The lock's fence: larger than that of every lock of this block before it.
    #[must_use]
    pub fn fence(&self) -> u64 {
        self.fence
    }

    /// Whether the program that started this one holds it: see [`LOCKS_VARIABLE`]. Writes under
    /// such a lock go through the server, which checks the fence of each, so programs that share a
    /// lock cannot damage the block. This process neither renews nor releases it.
    #[must_use]
    pub fn is_inherited(&self) -> bool {
        self.source == Source::Inherited
    }

    /// Whether it is still held, as far as this process knows. If the lock is inherited, the server
    /// decides at each write.
    #[must_use]
    pub fn is_held(&self) -> bool {
        if self.is_inherited() {
            return true;
        }
        let is_lost = lock(&self.block.shared().lost_locks).contains(&self.fence);
        self.block.app().core().epoch_now() == Some(self.epoch) && !is_lost
    }

    pub(super) fn check(&self) -> Result<(), Error> {
        if self.is_held() {
            return Ok(());
        }
        Err(Error::new(
            Code::LockLost,
            format!(
                "the lock of block '{}' was lost: its lease or its connection ended",
                self.block.id()
            ),
        )
        .with_ran(Ran::No))
    }

    /// Renews its lease. A lock without a lease is held until the connection ends.
    ///
    /// # Errors
    /// `lock_lost`.
    pub async fn renew(&self, lease: Option<Duration>) -> Result<(), Error> {
        if self.is_inherited() {
            return Ok(());
        }
        let mut more = json!({"lock": self.fence.to_string()});
        if let Some(lease) = lease {
            let ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            more["lease"] = ms.clamp(1, TTL_MAX_MS).into();
        }
        self.block.ask("memory_renew", &more).await.map(drop)
    }

    /// Releases it, and waits until the server has confirmed that.
    ///
    /// # Errors
    /// `lock_lost` if it was lost before.
    pub async fn unlock(mut self) -> Result<(), Error> {
        if self.is_inherited() {
            return Ok(());
        }
        self.block.shared().unlocked(self.fence);
        let more = json!({"lock": self.fence.to_string()});
        let unlocked = self.block.ask("memory_unlock", &more).await.map(drop);
        // What was not sent is sent when this is dropped.
        let is_unsent = |e: &Error| e.ran() == Some(Ran::No) && e.kind() != Code::LockLost;
        self.is_given_back = !unlocked.as_ref().is_err_and(is_unsent);
        unlocked
    }
}

impl Drop for BlockLock {
    fn drop(&mut self) {
        self.block.shared().unlocked(self.fence);
        if !self.is_given_back && self.is_held() {
            let more = json!({"lock": self.fence.to_string()});
            let message = self.block.shared().message("memory_unlock", &more);
            self.block.app().core().send_oneway(message);
        }
    }
}

/// A requested lock. If it is no longer wanted when the server grants it, it is released.
struct LockRequest(Option<(Block, Calling<Reply>)>);

impl LockRequest {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Reply, Error>> {
        let (_, calling) = self.0.as_mut().expect("not polled after it ended");
        let reply = std::task::ready!(calling.poll_reply(cx));
        self.0 = None;
        Poll::Ready(reply)
    }
}

impl Drop for LockRequest {
    fn drop(&mut self) {
        let Some((block, calling)) = self.0.take() else {
            return;
        };
        if calling.send_cancel() {
            Arc::new(Unwanted(Mutex::new(Some((block, calling))))).wake();
        }
    }
}

/// An abandoned lock request, until the server has answered: its own waker takes the answer.
struct Unwanted(Mutex<Option<(Block, Calling<Reply>)>>);

impl Wake for Unwanted {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(self.clone());
        let mut place = lock(&self.0);
        let Some((block, mut calling)) = place.take() else {
            return;
        };
        match calling.poll_reply(&mut Context::from_waker(&waker)) {
            Poll::Pending => *place = Some((block, calling)),
            Poll::Ready(reply) => {
                drop(place);
                // Dropping the guard releases it.
                drop(reply.and_then(|reply| BlockLock::granted(&block, reply)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LockMode, lock_in};

    #[test]
    fn inherited_locks_are_found_by_pool_and_name() {
        let check = |locks: &str, expected: Option<(u64, LockMode)>| {
            assert_eq!(lock_in(locks, "lab", "a/frame"), expected, "{locks}");
        };
        let exclusive = |fence| Some((fence, LockMode::Exclusive));
        check("", None);
        check("lab/a/frame=7", exclusive(7));
        check("lab/b=1 lab/a/frame=7 lab/a/frame=9", exclusive(9));
        check("lab/a/frame=7/shared", Some((7, LockMode::Shared)));
        check(
            "lab/frame=7 other/a/frame=8 lab/a/frame=x lab/a/frame=1/other =",
            None,
        );
    }
}
