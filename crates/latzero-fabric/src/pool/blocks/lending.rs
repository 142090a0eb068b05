//! Who takes part in blocks: lent for the length of a call, and what is left of a member that goes.

use super::*;

impl<P: Clone> Pool<P> {
    /// The blocks that a call names, as its caller may give them; for [`Pool::call`].
    pub(in crate::pool) fn check_uses(
        &self,
        caller: MemberKey,
        uses: &[BlockUse],
    ) -> Result<Vec<(BlockKey, Access)>, Refusal> {
        uses.iter()
            .map(|one| {
                let (key, _) = self.allowed(caller, &one.block, one.mode)?;
                Ok((key, one.mode))
            })
            .collect()
    }

    /// The descriptions of a call's blocks for its handler, and the descriptors that travel with them.
    pub(in crate::pool) fn describe_uses<E: Effects<Peer = P>>(
        &self,
        uses: &[(BlockKey, Access)],
        is_mapped: bool,
        fx: &mut E,
    ) -> (String, Vec<Descriptor>) {
        let mut descriptions = Vec::new();
        let mut descriptors = Vec::new();
        for &(key, access) in uses {
            let block = self.blocks.at(key).expect("checked for this call");
            let version = fx.block_version(block.storage);
            let mut description = block.description(self.name.as_str(), version);
            description["mode"] = access.as_str().into();
            let is_mapped = is_mapped && fx.can_share(block.storage, access);
            description["access"] = if is_mapped { "mapped" } else { "copied" }.into();
            if is_mapped {
                descriptors.push(Descriptor {
                    storage: block.storage,
                    access,
                });
            }
            descriptions.push(description);
        }
        (Value::Array(descriptions).to_string(), descriptors)
    }

    /// A call with blocks began: its handler is attached.
    pub(in crate::pool) fn lend(&mut self, handler: MemberKey, uses: &[(BlockKey, Access)]) {
        for &(key, access) in uses {
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            match block.attachments.iter_mut().find(|a| a.member == handler) {
                Some(attachment) => {
                    attachment.calls += 1;
                    attachment.call_access = attachment.call_access.max(access);
                }
                None => block.attachments.push(Attachment {
                    member: handler,
                    own: None,
                    calls: 1,
                    call_access: access,
                }),
            }
            self.involve(handler, key);
        }
    }

    /// A call with blocks ended: its handler is attached no longer.
    pub(in crate::pool) fn take_back<E: Effects<Peer = P>>(
        &mut self,
        handler: MemberKey,
        uses: &[(BlockKey, Access)],
        fx: &mut E,
    ) {
        for &(key, _) in uses {
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            if let Some(attachment) = block.attachments.iter_mut().find(|a| a.member == handler) {
                attachment.calls -= 1;
                if attachment.calls == 0 {
                    attachment.call_access = Access::Read;
                }
            }
            self.drop_unused_attachment(key, handler, fx);
        }
    }

    /// A member leaves: what it was attached to, locked, or waited for is free again.
    pub(in crate::pool) fn leave_blocks<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        member: MemberKey,
        fx: &mut E,
    ) {
        let Some(leaver) = self.members.at_mut(place(member)) else {
            return;
        };
        let (app, peer, is_mapping) = (
            leaver.app.clone(),
            leaver.peer.clone(),
            leaver.takes_descriptors,
        );
        for key in std::mem::take(&mut leaver.blocks) {
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            block.waiting.retain(|w| w.member != member);
            block.flushing.retain(|f| f.member != member);
            if block.subscribers.contains(&member) {
                block.subscribers.retain(|m| *m != member);
                fx.with_ledger(|ledger| ledger.end(Counted::Subscription, &app));
            }
            let could_write = is_mapping
                && block
                    .attachment(member)
                    .is_some_and(|a| a.access() == Access::Write);
            if let Some(attachment) = block.attachments.iter_mut().find(|a| a.member == member) {
                attachment.calls = 0;
                if attachment.own.take().is_some() {
                    fx.with_ledger(|ledger| ledger.end(Counted::Attachment, &app));
                }
            }
            let held = block.lock.leave(member);
            let held = held.iter().find(|h| h.mode == LockMode::Exclusive);
            if let Some(held) = held {
                self.note_fence(key, held, fx);
                self.tell_broken(key, fx);
                if could_write {
                    // It may have gone in the middle of a write, and only its death says that it writes no more.
                    self.renew_generation(key, Some(peer.clone()), fx);
                }
            }
            self.grant_waiting(now, key, fx);
            self.drop_unused_attachment(key, member, fx);
        }
    }

    /// Notes that a member has to do with a block, so that its end finds it.
    pub(in crate::pool) fn involve(&mut self, member: MemberKey, key: BlockKey) {
        if let Some(member) = self.members.at_mut(place(member))
            && !member.blocks.contains(&key)
        {
            member.blocks.push(key);
        }
    }

    pub(in crate::pool) fn drop_unused_attachment<E: Effects<Peer = P>>(
        &mut self,
        key: BlockKey,
        member: MemberKey,
        fx: &mut E,
    ) {
        let Some(block) = self.blocks.at_mut(key) else {
            return;
        };
        block
            .attachments
            .retain(|a| a.member != member || a.own.is_some() || a.calls > 0);
        self.end_if_unused(key, fx);
    }

    pub(in crate::pool) fn end_if_unused<E: Effects<Peer = P>>(
        &mut self,
        key: BlockKey,
        fx: &mut E,
    ) {
        let is_over = self.blocks.at(key).is_some_and(|block| {
            block.lifetime == Lifetime::Attached
                && block.attachments.is_empty()
                && block.waiting.is_empty()
                && matches!(block.phase, Phase::Live)
        });
        if is_over {
            self.end_block(key, fx);
        }
    }
}
