//! New generations of a block: at its creation, for another size, and to exclude the holder of a
//! broken lock.

use super::*;

impl Blocks {
    pub(super) fn begin_move<D: Driver>(
        &mut self,
        key: BlockKey,
        geometry: Geometry,
        reason: &'static str,
        unless_dead: Option<D::Peer>,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) -> Result<(), Refusal> {
        let total = check_size(geometry, &pool.limits)?;
        // Both generations exist until the new one has the content of the old one.
        self.check_room(total, pool)?;
        let block = self.at_mut(key).expect("its caller looked it up");
        let room = Room::new(&block.account, block.kind, total)?;
        let to = turn.with_numbers(Numbers::next_storage);
        block.lock.begin_server();
        block.phase = Phase::Moving {
            to,
            geometry,
            reason,
            room,
        };
        // The record of the new generation.
        let mut record = record(pool, block);
        record["size"] = geometry.size.into();
        if geometry.spares > 0 {
            record["spares"] = geometry.spares.into();
        }
        record["generation"] = (block.generation + 1).into();
        let making = Making {
            storage: to,
            pool: pool.name.clone(),
            block: block.id.clone(),
            kind: block.kind,
            geometry,
            generation: block.generation + 1,
            from: Some(block.storage),
            record: record.to_string(),
        };
        self.bytes += total;
        turn.block_job(Job::Make {
            key,
            making,
            unless_dead,
        });
        Ok(())
    }

    /// Moves a block to a new generation of the same size, so that who lost its lock can't write it
    /// any more.
    pub(super) fn renew_generation<D: Driver>(
        &mut self,
        key: BlockKey,
        unless_dead: Option<D::Peer>,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(block) = self.at(key) else {
            return;
        };
        if !matches!(block.phase, Phase::Live) {
            return;
        }
        if block.lock.is_held_by_server() {
            // A write through the server is in progress: the copy must not miss it.
            let due = &mut self.at_mut(key).expect("just found").move_due;
            due.get_or_insert(MoveDue::LockBroken);
            return;
        }
        let geometry = Geometry::new(block.kind, block.geometry.size, block.geometry.slots);
        if let Err(refusal) = self.begin_move(key, geometry, "lock_broken", unless_dead, pool, turn)
        {
            // Without room for a second generation, only the fence keeps the old writer out.
            turn.refused(refusal.code);
        }
    }
}

impl<D: Driver> PoolBlocks<'_, D> {
    /// The driver created the storage that the pool requested, or failed to. `None` if it is no
    /// longer needed.
    pub fn storage_made(
        &mut self,
        key: BlockKey,
        made: Result<Option<StorageId>, Refusal>,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(block) = self.blocks.at_mut(key) else {
            // Removed meanwhile.
            if let Ok(Some(storage)) = made {
                turn.block_job(Job::Drop {
                    storage,
                    is_superseded: false,
                });
            }
            return;
        };
        let phase = std::mem::replace(&mut block.phase, Phase::Live);
        let waiting = std::mem::take(&mut block.waiting);
        match (phase, made) {
            (Phase::Live, _) => unreachable!("storage is created for a waiting request"),
            (Phase::New, Ok(_)) => {
                let json = self.event_json("block_created", key, "");
                self.members.notify(Event::BlockCreated, &json, turn);
                for one in waiting {
                    let result = match one.attach {
                        None => Ok(Some(
                            self.blocks.describe(key, None, self.info, turn).to_string(),
                        )),
                        Some(access) => {
                            let asking = Asking {
                                member: one.member,
                                id: one.id.as_deref(),
                            };
                            let id = self.blocks.at(key).map(|block| block.id.clone());
                            match id {
                                Some(id) => self.attach(asking, &id, access, None, turn),
                                None => Ok(None),
                            }
                        }
                    };
                    self.members
                        .answer(one.member, one.id.as_deref(), result, turn);
                }
                self.end_if_unused(key, turn);
            }
            (Phase::New, Err(refusal)) => {
                for one in waiting {
                    self.members
                        .answer(one.member, one.id.as_deref(), Err(refusal.clone()), turn);
                }
                self.blocks.forget(key, self.info, turn);
            }
            (
                Phase::Moving {
                    to,
                    geometry,
                    reason,
                    room,
                },
                made,
            ) => {
                block.lock.end_server();
                let (was, will) = (
                    block.total(),
                    geometry.total().expect("checked when it was asked for"),
                );
                match made {
                    Ok(Some(_)) => {
                        let old = std::mem::replace(&mut block.storage, to);
                        block.geometry = geometry;
                        block.generation += 1;
                        block.room = room;
                        self.blocks.bytes -= was;
                        turn.block_job(Job::Drop {
                            storage: old,
                            is_superseded: true,
                        });
                        // Before anybody is notified: they may write at once.
                        self.blocks.write_fence(key, turn);
                        let more = format!(",\"reason\":\"{reason}\"");
                        let json = self.event_json("block_moved", key, &more);
                        self.notify_attached(key, &json, turn);
                        for one in waiting {
                            let access = self
                                .blocks
                                .at(key)
                                .and_then(|b| b.attachment(one.member))
                                .map(Attachment::access);
                            self.answer_description(
                                key,
                                one.member,
                                one.id.as_deref(),
                                access,
                                turn,
                            );
                        }
                        let version = self.blocks.version_of(key, turn);
                        self.notify_change(key, version, turn);
                    }
                    other => {
                        self.blocks.bytes -= will;
                        drop(room);
                        let refusal = other.err().unwrap_or_else(refusals::no_generation_needed);
                        for one in waiting {
                            self.members.answer(
                                one.member,
                                one.id.as_deref(),
                                Err(refusal.clone()),
                                turn,
                            );
                        }
                    }
                }
                self.grant_waiting(key, turn);
                self.end_if_unused(key, turn);
            }
        }
    }

    /// Creates a new generation with another size; the reply is sent when it is ready.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`, `quota`, `too_large`, `layout_mismatch`.
    pub fn resize(
        &mut self,
        asking: Asking<'_>,
        id: &BlockId,
        size: u64,
        lock: Option<u64>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = self.allowed_by_name(asking.member, id, Access::Write)?;
        self.check_lock(asking.member, id, lock, block.lock.holders())?;
        if matches!(block.phase, Phase::Moving { .. }) || block.lock.is_held_by_server() {
            return Err(refusals::block_is_busy(id));
        }
        if let Some(needed) = block.layout.as_ref().and_then(Layout::bytes)
            && needed > size
        {
            return Err(refusals::layout_needs_more(needed, size));
        }
        let geometry = Geometry::new(block.kind, size, block.geometry.slots);
        let seat = self.seat(asking)?;
        self.blocks
            .begin_move(key, geometry, "resized", None, self.info, turn)?;
        self.blocks.involve(asking.member, key);
        let block = self.blocks.at_mut(key).expect("just found");
        block.waiting.push(BlockWaiter {
            member: asking.member,
            id: asking.id(),
            attach: None,
            _seat: seat,
        });
        Ok(None)
    }

    /// Moves a block of an earlier run to a new generation, because somebody held its lock when the
    /// server ended and may still be writing a version.
    pub fn abandon_writer(&mut self, id: &BlockId, turn: &mut Turn<'_, D>) {
        if let Ok((key, _)) = self.blocks.find(id, self.info) {
            self.blocks.renew_generation(key, None, self.info, turn);
        }
    }

    /// Moves a block of an earlier run from the file of an older server to one with spare slots. In
    /// the old file a flushed version may be overwritten. If there is no room for both, the block
    /// stays in its file.
    pub fn add_spares(&mut self, id: &BlockId, turn: &mut Turn<'_, D>) {
        let Ok((key, block)) = self.blocks.find(id, self.info) else {
            return;
        };
        let geometry = Geometry::new(block.kind, block.geometry.size, block.geometry.slots);
        let is_due = geometry != block.geometry
            && matches!(block.phase, Phase::Live)
            && !block.lock.is_held_by_server();
        if is_due
            && let Err(refusal) = self
                .blocks
                .begin_move(key, geometry, "upgraded", None, self.info, turn)
        {
            turn.refused(refusal.code);
        }
    }

    /// Moves every block to a new generation, which those who had to leave an encrypted pool have
    /// not mapped. A block that can't be moved goes: rather that than one that they can still
    /// write.
    pub fn renew_all(&mut self, turn: &mut Turn<'_, D>) {
        let keys: Vec<BlockKey> = self.blocks.blocks.iter().map(|(key, _)| key).collect();
        for key in keys {
            let Some(block) = self.blocks.at_mut(key) else {
                continue;
            };
            if !matches!(block.phase, Phase::Live) {
                continue;
            }
            if block.lock.is_held_by_server() {
                block.move_due = Some(MoveDue::Rotated);
                continue;
            }
            self.renew_or_end(key, turn);
        }
    }

    /// Moves a block because members had to leave, or ends it.
    pub(super) fn renew_or_end(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.at(key) else {
            return;
        };
        let geometry = Geometry::new(block.kind, block.geometry.size, block.geometry.slots);
        let moved = self
            .blocks
            .begin_move(key, geometry, "rotated", None, self.info, turn);
        if moved.is_err() {
            self.end(key, turn);
        }
    }
}
