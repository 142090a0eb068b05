//! Attachments that last as long as a call, and cleanup after a member that leaves.

use super::*;

impl Blocks {
    /// The blocks that a call names and that its caller may lend; for [`Pool::call`].
    pub(in crate::pool) fn check_uses(
        &self,
        caller: Claimant<'_>,
        uses: &[BlockUse],
        pool: &PoolInfo,
    ) -> Result<Vec<(BlockKey, Access)>, Refusal> {
        uses.iter()
            .map(|one| {
                let (key, _) = self.allowed_by_name(caller, &one.block, one.mode, pool)?;
                Ok((key, one.mode))
            })
            .collect()
    }

    /// The descriptions of a call's blocks for its handler, and the file descriptors to send with
    /// them.
    pub(in crate::pool) fn describe_uses<D: Driver>(
        &self,
        uses: &[(BlockKey, Access)],
        is_mapped: bool,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) -> (String, Vec<D::Fd>) {
        let mut descriptions = Vec::new();
        let mut descriptors = Vec::new();
        for &(key, access) in uses {
            let block = self.at(key).expect("checked for this call");
            let version = turn.block_version(block.storage);
            let mut description = block.description(pool.name.as_str(), version);
            description["mode"] = access.as_str().into();
            let descriptor = match is_mapped {
                true => turn.driver.descriptor(block.storage, access),
                false => None,
            };
            let how = match &descriptor {
                Some(_) => "mapped",
                None => "copied",
            };
            description["access"] = how.into();
            descriptors.extend(descriptor);
            descriptions.push(description);
        }
        (Value::Array(descriptions).to_string(), descriptors)
    }

    /// A call with blocks started: attaches its handler.
    pub(in crate::pool) fn lend(&mut self, handler: MemberKey, uses: &[(BlockKey, Access)]) {
        for &(key, access) in uses {
            let Some(block) = self.at_mut(key) else {
                continue;
            };
            match block.attachments.iter_mut().find(|a| a.member == handler) {
                Some(attachment) => *attachment.lent(access) += 1,
                None => {
                    let mut attachment = Attachment::new(handler);
                    *attachment.lent(access) += 1;
                    block.attachments.push(attachment);
                }
            }
            self.involve(handler, key);
        }
    }
}

impl<D: Driver> PoolBlocks<'_, D> {
    /// A call with blocks ended: detaches its handler and revokes the rights that the call gave it.
    pub(in crate::pool) fn revoke(
        &mut self,
        handler: MemberKey,
        uses: &[(BlockKey, Access)],
        turn: &mut Turn<'_, D>,
    ) {
        for &(key, access) in uses {
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            let could_write = block.could_write(handler);
            if could_write {
                self.poll_version(key, turn);
            }
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            if let Some(attachment) = block.attachments.iter_mut().find(|a| a.member == handler) {
                *attachment.lent(access) -= 1;
            }
            block.drop_unused_attachment(handler);
            let ended = refusals::lender_call_ended();
            self.withdraw(
                key,
                handler,
                (Some(Access::Write), could_write),
                &ended,
                turn,
            );
            self.end_if_unused(key, turn);
        }
    }

    /// A member's roles allow `most` from now on: takes from it what needs more.
    pub(crate) fn lower(
        &mut self,
        member: MemberKey,
        most: Option<Access>,
        why: &Refusal,
        turn: &mut Turn<'_, D>,
    ) {
        for key in self.blocks.uses_of(member) {
            let could_write = self.blocks.at(key).is_some_and(|b| b.could_write(member));
            if could_write {
                self.poll_version(key, turn);
            }
            self.withdraw(key, member, (most, could_write), why, turn);
        }
    }

    /// Takes from a member what it may no longer have: the block's lock, its queued request, its
    /// subscription. It has at most the access `most`.
    fn withdraw(
        &mut self,
        key: BlockKey,
        member: MemberKey,
        (most, could_write): (Option<Access>, bool),
        why: &Refusal,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(was) = self.members.at(member) else {
            return;
        };
        let (who, is_mapping) = (was.claimant(), was.takes_descriptors);
        let Some(block) = self.blocks.at_mut(key) else {
            return;
        };
        let allowed = block.allows(who, member).min(most);
        let kept = |mode: LockMode| allowed >= Some(access_for(mode));
        let (held, waited) = block.lock.leave(member, kept);
        if allowed.is_none() {
            block.subscribers.remove(&member);
        }
        for claim in waited {
            self.blocks.wait_over(key, &claim);
            self.members
                .answer(member, claim.id.as_deref(), Err(why.clone()), turn);
        }
        for held in &held {
            self.lease_over(key, held, could_write && is_mapping, turn);
        }
        self.grant_waiting(key, turn);
    }

    /// A member leaves: releases its attachments, locks and waits.
    pub(in crate::pool) fn leave(
        &mut self,
        member: MemberKey,
        budget: &mut usize,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(leaver) = self.members.at(member) else {
            return;
        };
        let (peer, is_mapping) = (leaver.peer.clone(), leaver.takes_descriptors);
        while *budget > 0
            && let Some(key) = self.blocks.take_use(member)
        {
            let wrote = is_mapping && self.blocks.at(key).is_some_and(|b| b.could_write(member));
            if wrote {
                // It may have left between writing a version and announcing it.
                self.poll_version(key, turn);
            }
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            let waits = block.waiting.extract_if(.., |w| w.member == member);
            let mut waited: Vec<Option<Box<str>>> = waits.map(|w| w.id).collect();
            let flushes = block.flushing.extract_if(.., |f| f.member == member);
            waited.extend(flushes.map(|f| f.id));
            block.subscribers.remove(&member);
            block.involved.remove(&member);
            let could_write = is_mapping && block.could_write(member);
            block.attachments.retain(|a| a.member != member);
            let (held, claims) = block.lock.leave(member, |_| false);
            *budget = budget.saturating_sub(1 + held.len() + claims.len() + waited.len());
            for claim in claims {
                self.blocks.wait_over(key, &claim);
                waited.push(claim.id);
            }
            for id in waited {
                // It may have left only the pool, and still read its connection.
                let refusal = refusals::left_while_waiting();
                self.members
                    .answer(member, id.as_deref(), Err(refusal), turn);
            }
            let held = held.iter().find(|h| h.mode == LockMode::Exclusive);
            if let Some(held) = held {
                self.blocks.note_fence(key, held.mode, turn);
                self.notify_broken(key, turn);
                if could_write {
                    // It may have left in the middle of a write; only the end of its process stops
                    // it.
                    self.blocks
                        .renew_generation(key, Some(peer.clone()), self.info, turn);
                }
            }
            self.grant_waiting(key, turn);
            self.end_if_unused(key, turn);
        }
    }

    pub(super) fn end_if_unused(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let is_over = self.blocks.at(key).is_some_and(|block| {
            block.lifetime == Lifetime::Attached
                && block.attachments.is_empty()
                && block.waiting.is_empty()
                && matches!(block.phase, Phase::Live)
        });
        if is_over {
            self.end(key, turn);
        }
    }
}
