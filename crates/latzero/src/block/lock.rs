//! A block's lock, held by a guard.

use std::time::Duration;

use latzero_protocol::memory::LockMode;
use latzero_protocol::{Code, Ran};
use serde_json::json;

use super::{Block, number};
use crate::call::Calling;
use crate::error::Error;
use crate::sync::lock;

/// How much longer than its wait a request for a lock is given for its answer.
const GRACE: Duration = Duration::from_secs(5);

/// A block's lock. It is given back when this goes; the end of the connection takes it away.
#[derive(Debug)]
pub struct BlockLock {
    block: Block,
    fence: u64,
    epoch: u32,
    is_given_back: bool,
}

impl BlockLock {
    pub(super) async fn take(
        block: &Block,
        mode: LockMode,
        wait: Duration,
        lease: Option<Duration>,
    ) -> Result<BlockLock, Error> {
        block.check_fault()?;
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let wait_ms = ms(wait).min(latzero_protocol::limits::TTL_MAX_MS);
        let mut more = json!({"mode": mode.as_str(), "wait": wait_ms});
        if let Some(lease) = lease {
            more["lease"] = ms(lease).max(1).into();
        }
        let app = block.app();
        let message = block.shared().message("memory_lock", &more);
        let reply = Calling::of_message(app, message, Ok)
            .within(wait + GRACE)
            .await?;
        let epoch = reply.epoch;
        let reply: serde_json::Value = reply.into()?;
        Ok(BlockLock {
            block: block.clone(),
            fence: number(&reply, "fence"),
            epoch,
            is_given_back: false,
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

    /// Whether it is still held, as far as is known here.
    #[must_use]
    pub fn is_held(&self) -> bool {
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
                "the lock of block '{}' is held no longer: its lease or its connection ended",
                self.block.id()
            ),
        )
        .with_ran(Ran::No))
    }

    /// Begins its lease anew; without one it is held as long as the connection.
    ///
    /// # Errors
    /// `lock_lost`.
    pub async fn renew(&self, lease: Option<Duration>) -> Result<(), Error> {
        let mut more = json!({"lock": self.fence.to_string()});
        if let Some(lease) = lease {
            let ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            more["lease"] = ms.max(1).into();
        }
        self.block.ask("memory_renew", &more).await.map(drop)
    }

    /// Gives it back, and waits until the server has it.
    ///
    /// # Errors
    /// `lock_lost` where it was lost before.
    pub async fn unlock(mut self) -> Result<(), Error> {
        self.is_given_back = true;
        let more = json!({"lock": self.fence.to_string()});
        self.block.ask("memory_unlock", &more).await.map(drop)
    }
}

impl Drop for BlockLock {
    fn drop(&mut self) {
        if !self.is_given_back && self.is_held() {
            let more = json!({"lock": self.fence.to_string()});
            let mut message = self.block.shared().message("memory_unlock", &more);
            self.block.app().core().tell(&mut message);
        }
    }
}
