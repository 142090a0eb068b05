//! Reads, writes, flushes and change events of a block's content: what is allowed, and in which
//! order. The driver has the bytes.

use super::*;
use crate::driver::Written;
use crate::memory::SlowWrite;

/// Where to read a block's bytes, as [`PoolBlocks::read`] allows it.
#[derive(Debug, Clone, Copy)]
pub struct ReadPlan {
    /// In which storage.
    pub storage: StorageId,
    /// The block's size in bytes.
    pub size: u64,
    /// The block's generation.
    pub generation: u64,
}

/// Where to write a block's bytes, as [`PoolBlocks::begin_write`] allows it.
/// [`PoolBlocks::end_write`] must follow.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct WritePlan {
    /// The block.
    pub key: BlockKey,
    /// In which storage.
    pub storage: StorageId,
    /// The identity that its content must be bound to, in a sealed pool.
    pub sealed: Option<SealedContent>,
    /// Whether another write is in progress, which this one must follow.
    pub(crate) is_behind: bool,
}

/// The reply to a write, or to a comparison that may have written.
pub(crate) fn written_json(written: Written, is_swap: bool) -> String {
    match (written, is_swap) {
        (Written::Version(version), true) => {
            format!("{{\"swapped\":true,\"version\":{version}}}")
        }
        (Written::Version(version), false) => format!("{{\"version\":{version}}}"),
        (Written::Differs(version, current), _) => {
            let text = format!("{{\"swapped\":false,\"version\":{version},\"current\":");
            let mut text = text.into_bytes();
            encode::append_base64(&mut text, &current);
            text.push(b'}');
            String::from_utf8(text).expect("base64 is text")
        }
        (Written::Slow, _) => unreachable!("a slow write becomes a job, which has no bound"),
    }
}

impl<D: Driver> PoolBlocks<'_, D> {
    /// Allows a member to read a block.
    ///
    /// # Errors
    /// `no_block`, `forbidden`.
    pub fn read(&self, member: MemberKey, id: &BlockId) -> Result<ReadPlan, Refusal> {
        let (_, block) = self.allowed(member, id, Access::Read)?;
        Ok(ReadPlan {
            storage: block.storage,
            size: block.geometry.size,
            generation: block.generation,
        })
    }

    /// Allows a member to write a block through the server. Until [`PoolBlocks::end_write`] nobody
    /// else gets its lock.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`, `lock_lost`.
    pub fn begin_write(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        lock: Option<u64>,
    ) -> Result<WritePlan, Refusal> {
        let (key, block) = self.allowed(member, id, Access::Write)?;
        // Holders of a shared lock also rely on this.
        self.check_lock(member, id, lock, block.lock.holders())?;
        if matches!(block.phase, Phase::Moving { .. }) {
            return Err(refusals::block_is_moving(id));
        }
        let (storage, sealed) = (block.storage, block.sealed);
        let lock = &mut self.blocks.at_mut(key).expect("just found").lock;
        let is_behind = lock.is_held_by_server();
        lock.begin_server();
        Ok(WritePlan {
            key,
            storage,
            sealed,
            is_behind,
        })
    }

    /// Leaves a write that was allowed to a job. Until it is done its connection is not read.
    pub(crate) fn write_later(&mut self, slow: SlowWrite<D::Peer>, turn: &mut Turn<'_, D>) {
        slow.peer.in_flight().set_writing(true);
        turn.block_job(Job::Write(Box::new(slow)));
    }

    /// A write that was a job is over: it is answered, and its connection is read again. It may
    /// have left the pool, or have ended.
    pub fn written(
        &mut self,
        slow: SlowWrite<D::Peer>,
        result: Result<Written, Refusal>,
        turn: &mut Turn<'_, D>,
    ) {
        let version = result.as_ref().ok().and_then(Written::version);
        let is_swap = slow.expected.is_some();
        let SlowWrite { plan, peer, id, .. } = slow;
        self.end_write(plan, version, turn);
        match (result, id.as_deref()) {
            (Ok(written), Some(id)) => {
                let reply = written_json(written, is_swap);
                turn.send(&peer, Class::Control, reply.len() + 256, |out| {
                    encode::reply(out, id, &reply);
                });
            }
            (Ok(_), None) => {}
            (Err(refusal), id) => {
                turn.refused(refusal.code);
                let length = refusal.message.len() + 256;
                turn.send(&peer, Class::Control, length, |out| {
                    encode::refusal(out, id, &refusal);
                });
            }
        }
        peer.in_flight().set_writing(false);
        turn.driver.effects().resumed.push(peer);
    }

    /// Checks that a member holds the locks `held` of a block or names their fence. The fence is a
    /// token: the holder may pass it to the programs that it starts, which then change the block
    /// under its lock.
    pub(super) fn check_lock(
        &self,
        member: MemberKey,
        id: &BlockId,
        fence: Option<u64>,
        held: &[Holder],
    ) -> Result<(), Refusal> {
        let is_meant = |h: &Holder| h.mode == LockMode::Exclusive && Some(h.fence) == fence;
        if let Some(fence) = fence
            && !held.iter().any(is_meant)
        {
            return Err(refusals::lock_lost(fence, id));
        }
        match held.iter().find(|h| h.member != member && !is_meant(h)) {
            Some(other) => Err(self.locked(id, other)),
            None => Ok(()),
        }
    }

    /// A write through the server is over; `version` is the block's new one, if it has one.
    pub fn end_write(&mut self, plan: WritePlan, version: Option<u64>, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.at_mut(plan.key) else {
            return;
        };
        block.lock.end_server();
        if !block.lock.is_held_by_server()
            && let Some(due) = block.move_due.take()
        {
            match due {
                MoveDue::LockBroken => {
                    self.blocks
                        .renew_generation(plan.key, None, self.info, turn);
                }
                MoveDue::Rotated => self.renew_or_end(plan.key, turn),
            }
        }
        if let Some(version) = version {
            self.notify_change(plan.key, version, turn);
        }
        self.grant_waiting(plan.key, turn);
    }

    /// Subscribes a member to new versions.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `quota`.
    pub fn subscribe(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = self.allowed(member, id, Access::Read)?;
        if !block.subscribers.contains_key(&member) {
            let held = self.asker(member)?.reserve(Resource::Subscriptions)?;
            let block = self.blocks.at_mut(key).expect("just found");
            block.subscribers.insert(member, held);
            self.blocks.involve(member, key);
        }
        let version = self.blocks.version_of(key, turn);
        let generation = self.blocks.at(key).map_or(0, |b| b.generation);
        Ok(Some(format!(
            "{{\"version\":{version},\"generation\":{generation}}}"
        )))
    }

    /// Unsubscribes a member.
    ///
    /// # Errors
    /// `no_block`, `not_member`.
    pub fn unsubscribe(&mut self, member: MemberKey, id: &BlockId) -> Result<Replied, Refusal> {
        self.asker(member)?;
        let (key, _) = self.blocks.find(id, self.info)?;
        let block = self.blocks.at_mut(key).expect("just found");
        block.subscribers.remove(&member);
        Ok(Some("{}".into()))
    }

    /// A member has written through its mapping.
    ///
    /// # Errors
    /// `no_block`, `forbidden`.
    pub fn notify(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        version: u64,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = self.allowed(member, id, Access::Write)?;
        // The block's own version counts, not the client's.
        let version = turn.version_noted(block.storage, version);
        self.notify_change(key, version, turn);
        Ok(Some("{}".into()))
    }

    /// Announces a version that its writer did not announce, because it ended.
    pub(super) fn poll_version(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        if let Some(block) = self.blocks.at(key) {
            let version = turn.version_noted(block.storage, u64::MAX);
            self.notify_change(key, version, turn);
        }
    }

    /// Flushes a block to disk; the reply is sent when that is done.
    ///
    /// # Errors
    /// `no_block`, `forbidden` without write access, `bad_message` if the block has no file,
    /// `locked`, `overloaded`.
    pub fn flush(
        &mut self,
        asking: Asking<'_>,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = self.allowed(asking.member, id, Access::Write)?;
        if block.kind != Kind::Persistent {
            return Err(refusals::block_has_no_file(id));
        }
        if matches!(block.phase, Phase::Moving { .. }) {
            return Err(refusals::block_is_moving(id));
        }
        let max = self.info.limits.block_waiters_max;
        if block.flushing.len() >= max {
            return Err(refusals::too_many_wait_for_block(max, id));
        }
        let seat = self.seat(asking)?;
        self.blocks.involve(asking.member, key);
        self.blocks.tickets += 1;
        let ticket = self.blocks.tickets;
        let block = self.blocks.at_mut(key).expect("just found");
        block.flushing.push(Flushing {
            ticket,
            member: asking.member,
            id: asking.id(),
            _seat: seat,
        });
        let storage = block.storage;
        turn.block_job(Job::Flush {
            key,
            storage,
            ticket,
        });
        Ok(None)
    }

    /// A flush ended: the version that is on disk, or the error.
    pub fn flushed(
        &mut self,
        key: BlockKey,
        ticket: u64,
        version: Result<u64, Refusal>,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(block) = self.blocks.at_mut(key) else {
            return;
        };
        if let Some(at) = block.flushing.iter().position(|f| f.ticket == ticket) {
            let one = block.flushing.swap_remove(at);
            let result = version.map(|version| Some(format!("{{\"version\":{version}}}")));
            self.members
                .answer(one.member, one.id.as_deref(), result, turn);
        }
    }
}
