//! Requests about whole blocks: create, attach, detach, remove.

use super::*;
use crate::pool::{DUE_AT_ONCE_MAX, park::soon};

/// As how many waits the end of a block counts.
const BLOCK_COST: usize = 4;

impl<D: Driver> PoolBlocks<'_, D> {
    /// Creates a block, or attaches an existing one. The reply follows when it is ready. In a
    /// sealed pool its content is bound to `uid`.
    ///
    /// # Errors
    /// `block_exists`, `quota`, `too_large`, `layout_mismatch`, `forbidden`.
    pub fn create(
        &mut self,
        asking: Asking<'_>,
        create: &Create,
        uid: Option<[u8; 16]>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let unix_ms = turn.unix_ms();
        let app = self.asker(asking.member)?.app.clone();
        if let Some(&key) = self.blocks.by_id.get(&create.block) {
            if !create.or_attach {
                return Err(refusals::block_exists(&create.block, &self.info.name));
            }
            let block = self.blocks.at_mut(key).expect("its name leads to it");
            check_layout(block, create.layout.as_ref())?;
            if block.size() < create.size {
                let (has, wanted) = (block.size(), create.size);
                return Err(refusals::block_is_smaller(&create.block, has, wanted));
            }
            if matches!(block.phase, Phase::New) {
                return self.wait_until_ready(asking, key, create.attach);
            }
            let Some(access) = create.attach else {
                return Ok(Some(
                    self.blocks.describe(key, None, self.info, turn).to_string(),
                ));
            };
            return self.attach(asking, &create.block, access, create.layout.as_ref(), turn);
        }
        self.blocks.check_left_out(&create.block, self.info)?;
        let owner = turn
            .driver
            .awaited_owner(&self.info.name, Some(&create.block));
        if owner.is_some_and(|owner| owner != app) {
            return Err(refusals::block_name_is_kept(&create.block, &self.info.name));
        }
        if create.lifetime == Lifetime::Attached && create.attach.is_none() {
            return Err(refusals::block_ends_at_once());
        }
        if create.kind == Kind::Persistent {
            self.info.check_outlives("a persistent block")?;
        }
        let sealed = match uid {
            None => None,
            Some(uid) => Some(self.blocks.sealed_content(uid, create)?),
        };
        let size = sealed.map_or(create.size, |sealed| sealed.geometry.capacity());
        let geometry = Geometry::new(create.kind, size, create.slots);
        let total = check_size(geometry, &self.info.limits)?;
        self.blocks.check_room(total, self.info)?;
        let seat = self.seat(asking)?;
        let account = self
            .asker(asking.member)?
            .peer
            .link()
            .account()
            .app()
            .clone();
        let place = account.reserve(Resource::BlockCount, 1)?;
        let room = Room::new(&account, create.kind, total)?;
        let layout = create.layout.as_ref();
        let about = about_bytes((&create.block, &app), &create.permissions, layout);
        let about = account.reserve(Resource::Registrations, about)?;
        let (storage, generation) = turn.with_numbers(|numbers| {
            let generation = numbers.first_generation(&self.info.name, &create.block);
            (numbers.next_storage(), generation)
        });
        turn.count_held(&self.info.name, self.info.number, 1);
        let block = Block {
            id: create.block.clone(),
            storage,
            kind: create.kind,
            geometry,
            sealed,
            layout: create.layout.clone(),
            permissions: create.permissions.clone(),
            owner: app,
            account,
            _place: place,
            about,
            room,
            lifetime: create.lifetime,
            generation,
            created: unix_ms,
            phase: Phase::New,
            attachments: Vec::new(),
            subscribers: BTreeMap::new(),
            involved: BTreeSet::new(),
            lock: Lock::default(),
            due: None,
            waiting: vec![BlockWaiter {
                member: asking.member,
                id: asking.id(),
                attach: create.attach,
                _seat: seat,
            }],
            flushing: Vec::new(),
            announced: (0, 0),
            move_due: None,
        };
        let making = Making {
            storage,
            pool: self.info.name.clone(),
            block: block.id.clone(),
            kind: block.kind,
            geometry,
            generation,
            from: None,
            record: record(self.info, &block).to_string(),
        };
        let key = self.blocks.insert(block);
        self.blocks.involve(asking.member, key);
        turn.block_job(Job::Make {
            key,
            making,
            unless_dead: None,
        });
        Ok(None)
    }

    /// Answers a request once a new block is ready.
    fn wait_until_ready(
        &mut self,
        asking: Asking<'_>,
        key: BlockKey,
        attach: Option<Access>,
    ) -> Result<Replied, Refusal> {
        let max = self.info.limits.block_waiters_max;
        let block = self.blocks.at(key).expect("its name leads to it");
        if block.waiting.len() >= max {
            return Err(refusals::too_many_wait_for_block(max, &block.id));
        }
        let seat = self.seat(asking)?;
        let block = self.blocks.at_mut(key).expect("just found");
        block.waiting.push(BlockWaiter {
            member: asking.member,
            id: asking.id(),
            attach,
            _seat: seat,
        });
        self.blocks.involve(asking.member, key);
        Ok(None)
    }

    /// Restores a block of an earlier run, for the account of the app that created it.
    ///
    /// # Errors
    /// If its record is invalid, its name is taken, or there is no room for it.
    pub fn adopt(
        &mut self,
        found: &Found<'_>,
        account: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> Result<StorageId, Refusal> {
        let mut block = found.read(account)?;
        if self.blocks.by_id.contains_key(&block.id) {
            return Err(refusals::block_occurs_twice(&block.id, &self.info.name));
        }
        let total = check_size(block.geometry, &self.info.limits)?;
        block._place = account.reserve(Resource::BlockCount, 1)?;
        block.room = Room::new(account, block.kind, total)?;
        block.storage = turn.with_numbers(Numbers::next_storage);
        turn.count_held(&self.info.name, self.info.number, 1);
        let storage = block.storage;
        self.blocks.insert(block);
        Ok(storage)
    }

    /// Attaches a member.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `layout_mismatch`, `quota`.
    pub fn attach(
        &mut self,
        asking: Asking<'_>,
        id: &BlockId,
        access: Access,
        layout: Option<&Layout>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        if let Some(key) = self.blocks.by_id.get(id).copied()
            && let Some(block) = self.blocks.at_mut(key)
            && matches!(block.phase, Phase::New)
        {
            // A request right after its creation waits until it is ready.
            check_layout(block, layout)?;
            return self.wait_until_ready(asking, key, Some(access));
        }
        let (key, block) = self.allowed(asking.member, id, access)?;
        check_layout(block, layout)?;
        self.asker(asking.member)?.check_descriptors(self.info)?;
        let who = self.asker(asking.member)?.claimant();
        if block.allows_app(who) < Some(access) {
            // Attached by a call: it may attach again (the block may have moved), and the call's
            // end still detaches it.
            self.answer_description(key, asking.member, asking.id, Some(access), turn);
            return Ok(None);
        }
        let held = match block.attachment(asking.member) {
            Some(attachment) if attachment.own.is_some() => None,
            _ => Some(self.asker(asking.member)?.reserve(Resource::Attachments)?),
        };
        let block = self.blocks.at_mut(key).expect("just found");
        match block
            .attachments
            .iter_mut()
            .find(|a| a.member == asking.member)
        {
            Some(attachment) => {
                attachment.own = attachment.own.max(Some(access));
                attachment.held = held.or(attachment.held.take());
            }
            None => block.attachments.push(Attachment {
                own: Some(access),
                held,
                ..Attachment::new(asking.member)
            }),
        }
        self.blocks.involve(asking.member, key);
        self.answer_description(key, asking.member, asking.id, Some(access), turn);
        Ok(None)
    }

    /// Detaches a member; an attachment by a call stays until the call ends.
    ///
    /// # Errors
    /// `no_block`, `not_member`.
    pub fn detach(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        self.asker(member)?;
        let (key, _) = self.blocks.find(id, self.info)?;
        let block = self.blocks.at_mut(key).expect("just found");
        if let Some(attachment) = block.attachments.iter_mut().find(|a| a.member == member) {
            (attachment.own, attachment.held) = (None, None);
        }
        block.drop_unused_attachment(member);
        self.end_if_unused(key, turn);
        Ok(Some("{}".into()))
    }

    /// Removes a block, even if clients are attached. An administrator needs no permission.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`.
    pub fn remove(
        &mut self,
        member: MemberKey,
        is_admin: bool,
        id: &BlockId,
        lock: Option<u64>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = if is_admin {
            self.asker(member)?;
            self.blocks.find(id, self.info)?
        } else {
            self.allowed_by_name(member, id, Access::Write)?
        };
        // Those who read may finish: their mapping stays.
        let exclusive = block.lock.exclusive();
        self.check_lock(
            member,
            id,
            lock,
            exclusive.map_or(&[], std::slice::from_ref),
        )?;
        self.end(key, turn);
        Ok(Some("{}".into()))
    }

    /// Removes the blocks of a removed pool. Persistent ones go at once, because they would be
    /// there again after a crash, and so do those for which a request waits; of others as many as
    /// `budget` allows.
    pub(in crate::pool) fn close(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let blocks = self.blocks.blocks.iter();
        let is_first = |block: &Block| {
            block.kind == Kind::Persistent
                || matches!(block.phase, Phase::New)
                || !block.waiting.is_empty()
                || !block.flushing.is_empty()
        };
        let (first, others): (Vec<_>, Vec<_>) = blocks
            .map(|(key, block)| (key, is_first(block)))
            .partition(|(_, is_first)| *is_first);
        for (key, _) in first {
            self.end_within(budget, key, turn);
        }
        for (key, _) in others {
            if *budget == 0 {
                break;
            }
            self.end_within(budget, key, turn);
            *budget = budget.saturating_sub(BLOCK_COST);
        }
        let left_out = std::mem::take(&mut self.blocks.left_out).len();
        if left_out > 0 {
            turn.count_held(
                &self.info.name,
                self.info.number,
                -i32::try_from(left_out).unwrap_or(i32::MAX),
            );
        }
    }

    /// Removes a block: notifies everybody and drops its storage.
    pub(super) fn end(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        self.end_within(&mut { DUE_AT_ONCE_MAX }, key, turn);
    }

    /// The same. Of the waits for its lock as many end now as `budget` allows.
    fn end_within(&mut self, budget: &mut usize, key: BlockKey, turn: &mut Turn<'_, D>) {
        let json = self.event_json("block_removed", key, "");
        self.notify_attached(key, &json, turn);
        self.members.notify(Event::BlockRemoved, &json, turn);
        let Some(block) = self.blocks.at_mut(key) else {
            return;
        };
        let storage = block.storage;
        let mut waiting: Vec<(MemberKey, Option<Box<str>>)> = std::mem::take(&mut block.waiting)
            .into_iter()
            .map(|w| (w.member, w.id))
            .collect();
        waiting.extend(
            std::mem::take(&mut block.flushing)
                .into_iter()
                .map(|f| (f.member, f.id)),
        );
        let mut lock = std::mem::take(&mut block.lock);
        lock.end_holders();
        let refusal = refusals::no_block(&block.id, &self.info.name);
        let is_new = matches!(block.phase, Phase::New);
        for (member, id) in waiting {
            self.members
                .answer(member, id.as_deref(), Err(refusal.clone()), turn);
        }
        self.blocks.ended.push_back(EndedLock {
            key,
            lock,
            refusal,
            goes_on: soon(turn.time()),
        });
        self.end_waits(budget, turn);
        self.blocks.forget(key, self.info, turn);
        // Storage that is still being created is dropped once it exists.
        if !is_new {
            turn.block_job(Job::Drop {
                storage,
                is_superseded: false,
            });
        }
    }

    /// Ends waits for the locks of removed blocks, as many as `budget` allows.
    pub(in crate::pool) fn end_waits(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        while let Some(ended) = self.blocks.ended.front_mut() {
            if *budget == 0 && ended.lock.waiting() > 0 {
                return;
            }
            let Some(claim) = ended.lock.pop_waiting() else {
                self.blocks.ended.pop_front();
                continue;
            };
            *budget -= 1;
            let (key, refusal) = (ended.key, ended.refusal.clone());
            self.blocks.wait_over(key, &claim);
            self.members
                .answer(claim.member, claim.id.as_deref(), Err(refusal), turn);
        }
    }
}
