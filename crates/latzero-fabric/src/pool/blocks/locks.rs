//! The locks of a pool's blocks: request, grant, release, break.

use super::*;

impl Blocks {
    /// Writes the state of an exclusive lock to the block's header, where writers check it.
    pub(super) fn write_fence<D: Driver>(&self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let Some(block) = self.at(key) else {
            return;
        };
        let held = block.lock.exclusive();
        let fence = held.map_or(block.lock.fence(), |held| held.fence);
        turn.driver.set_fence(block.storage, fence, held.is_some());
    }

    /// Like [`Blocks::write_fence`], after a lock of this mode was granted or has ended.
    pub(super) fn note_fence<D: Driver>(
        &self,
        key: BlockKey,
        mode: LockMode,
        turn: &mut Turn<'_, D>,
    ) {
        if mode == LockMode::Exclusive {
            self.write_fence(key, turn);
        }
    }
}

impl<D: Driver> PoolBlocks<'_, D> {
    /// Requests a block's lock; the reply may come later.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`, `overloaded`.
    pub fn lock(
        &mut self,
        asking: Asking<'_>,
        id: &BlockId,
        want: LockRequest,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let now = turn.time();
        let (key, block) = self.allowed(asking.member, id, access_for(want.mode))?;
        let max = self.info.limits.block_waiters_max;
        if block.lock.holders().len() >= max {
            return Err(refusals::too_many_hold_lock(max, id));
        }
        let until = (want.wait_ms > 0).then(|| now.after_ms(want.wait_ms));
        if until.is_some() && block.lock.waiting() >= max {
            return Err(refusals::too_many_wait_for_block(max, id));
        }
        let seat = until.map(|_| self.seat(asking)).transpose()?;
        let account = Arc::clone(self.asker(asking.member)?.peer.link().account());
        let held = Some(account.reserve(Resource::Calls, LOCK_BYTES)?);
        let claim = Claim {
            member: asking.member,
            id: asking.id(),
            mode: want.mode,
            lease_ms: want.lease_ms,
            place: 0,
            seat,
            held,
        };
        let block = self.blocks.at_mut(key).expect("just found");
        let claimed = block.lock.claim(now, claim, until);
        self.blocks.note_deadline(key);
        match claimed {
            Claimed::Waits(place) => {
                self.blocks.involve(asking.member, key);
                let by = (asking.member, asking.id());
                self.blocks.wait_begun(key, by, place);
                Ok(None)
            }
            Claimed::Granted(grant) => {
                self.blocks.involve(asking.member, key);
                self.blocks.note_fence(key, grant.claim.mode, turn);
                Ok(Some(grant_json(&grant)))
            }
            Claimed::Refused => {
                let block = self.blocks.at(key).expect("just found");
                Err(match block.lock.holders().first() {
                    Some(held) => self.locked(id, held),
                    None => refusals::block_is_busy_now(id),
                })
            }
        }
    }

    /// Releases a block's lock.
    ///
    /// # Errors
    /// `no_block`, `lock_lost`.
    pub fn unlock(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        fence: u64,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, _) = self.blocks.find(id, self.info)?;
        let block = self.blocks.at_mut(key).expect("just found");
        let Some(held) = block.lock.release(member, fence) else {
            return Err(refusals::lock_lost(fence, id));
        };
        self.blocks.note_fence(key, held.mode, turn);
        self.grant_waiting(key, turn);
        Ok(Some("{}".into()))
    }

    /// Renews the lease of a block's lock.
    ///
    /// # Errors
    /// `no_block`, `lock_lost`.
    pub fn renew_lock(
        &mut self,
        now: Time,
        member: MemberKey,
        id: &BlockId,
        fence: u64,
        lease_ms: Option<u64>,
    ) -> Result<Replied, Refusal> {
        let (key, _) = self.blocks.find(id, self.info)?;
        let block = self.blocks.at_mut(key).expect("just found");
        if block.lock.renew(now, member, fence, lease_ms) {
            self.blocks.note_deadline(key);
            Ok(Some("{}".into()))
        } else {
            Err(refusals::lock_lost(fence, id))
        }
    }

    /// Cancels a member's waits with this request id; false if there are none.
    pub(in crate::pool) fn cancel_lock(
        &mut self,
        member: MemberKey,
        id: &str,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let waits = self.blocks.waits_of(member, id);
        for &(key, place) in &waits {
            let block = self.blocks.at_mut(key);
            let Some(claim) = block.and_then(|block| block.lock.take(place)) else {
                continue;
            };
            self.blocks.wait_over(key, &claim);
            let refusal = refusals::lock_wait_cancelled();
            self.members.answer(member, Some(id), Err(refusal), turn);
            self.grant_waiting(key, turn);
        }
        !waits.is_empty()
    }

    /// Ends expired leases and waits, as many as `budget` allows.
    pub(in crate::pool) fn handle_timeout(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while *budget > 0
            && let Some(&(_, key)) = self.blocks.deadlines.first().filter(|due| due.0 <= now)
        {
            *budget -= 1;
            while *budget > 0
                && let Some(block) = self.blocks.at_mut(key)
                && let Some(expired) = block.lock.pop_due(now)
            {
                *budget -= 1;
                match expired {
                    Expired::Wait(claim) => {
                        self.blocks.wait_over(key, &claim);
                        let block = self.blocks.at(key).expect("just found");
                        let refusal = match block.lock.holders().first() {
                            Some(held) => self.locked(&block.id, held),
                            None => refusals::block_is_busy(&block.id),
                        };
                        self.members
                            .answer(claim.member, claim.id.as_deref(), Err(refusal), turn);
                    }
                    Expired::Lease(held) => {
                        let could_write = self.blocks.at(key).is_some_and(|block| {
                            let member = self.members.at(held.member);
                            member.is_some_and(|m| m.takes_descriptors)
                                && block.could_write(held.member)
                        });
                        self.lease_over(key, &held, could_write, turn);
                    }
                }
            }
            self.grant_waiting(key, turn);
            self.blocks.note_deadline(key);
        }
    }

    /// The holder lost its lock but is still alive.
    pub(super) fn lease_over(
        &mut self,
        key: BlockKey,
        held: &Holder,
        could_write: bool,
        turn: &mut Turn<'_, D>,
    ) {
        self.blocks.note_fence(key, held.mode, turn);
        let more = format!(",\"lock\":\"{}\"", held.fence);
        let json = self.event_json("lock_lost", key, &more);
        let Some(member) = self.members.at(held.member) else {
            return;
        };
        turn.send(&member.peer, Class::Control, json.len(), |out| {
            encode::message(out, &json);
        });
        if held.mode != LockMode::Exclusive {
            return;
        }
        self.notify_broken(key, turn);
        if could_write {
            // It is alive and may still write, but into a generation that nobody reads.
            self.blocks.renew_generation(key, None, self.info, turn);
        }
    }

    pub(super) fn grant_waiting(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while let Some(grant) = self
            .blocks
            .at_mut(key)
            .and_then(|block| block.lock.grant_next(now))
        {
            self.blocks.wait_over(key, &grant.claim);
            self.blocks.note_deadline(key);
            self.blocks.note_fence(key, grant.claim.mode, turn);
            let reply = Ok(Some(grant_json(&grant)));
            self.members
                .answer(grant.claim.member, grant.claim.id.as_deref(), reply, turn);
        }
    }

    pub(super) fn notify_broken(&self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let fence = self.blocks.at(key).map_or(0, |block| block.lock.fence());
        let json = self.event_json("lock_broken", key, &format!(",\"fence\":{fence}"));
        self.notify_attached(key, &json, turn);
    }

    pub(super) fn locked(&self, id: &BlockId, held: &Holder) -> Refusal {
        let holder = self
            .members
            .at(held.member)
            .map_or("somebody", |m| m.app.as_str());
        refusals::block_locked(id, holder)
    }
}

/// The access that the holder of a lock needs.
pub(super) fn access_for(mode: LockMode) -> Access {
    match mode {
        LockMode::Exclusive => Access::Write,
        LockMode::Shared => Access::Read,
    }
}
