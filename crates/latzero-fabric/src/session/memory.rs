//! Requests about memory blocks. The pool decides; the driver moves the bytes.

use latzero_crypto::block::{BlockError, BlockId as SealedId, Checks, Manifest};
use latzero_crypto::keys::Roles;
use latzero_crypto::sign::PublicKey;
use latzero_crypto::{Suite, text};
use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::limits::{READ_AS_BASE64_MAX, READ_SLACK, SYSTEM_POOL};
use latzero_protocol::memory::{Access, Action, Create, Kind, LockMode, Memory, Write};
use latzero_protocol::policy::Right;
use latzero_protocol::{BlockId, Code, PoolName, Refusal};

use super::Session;
use crate::driver::{BlockWrite, Driver, Peer as _, Written};
use crate::ledger::{Reservation, Resource};
use crate::memory::{COPIED_MAX, SlowWrite};
use crate::outbox::{Class, Sent};
use crate::pool::{Asking, LockRequest, MemberKey, ReadPlan, Replied, WritePlan, written_json};
use crate::refusals;
use crate::registry::Membership;
use crate::turn::Turn;

/// Approximate size of a write that is a job, in addition to its bytes.
const SLOW_WRITE_BYTES: usize = 256;

impl<D: Driver> Session<D> {
    pub(super) fn memory(
        &mut self,
        id: Option<&str>,
        memory: &Memory<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let now = turn.time();
        let m = self.checked_membership(memory.pool.as_deref(), turn)?;
        check_rights(m, &memory.action, turn)?;
        let (pool, member) = (m.pool.clone(), m.member);
        let sealed_pool = m.name_if_sealed();
        let is_system = m.name.as_str() == SYSTEM_POOL;
        if id.is_none() && memory.action.is_question() {
            return Ok(None);
        }
        let asking = Asking { member, id };
        match &memory.action {
            Action::Create(_) if is_system => Err(refusals::blocks_in_system_pool()),
            Action::Create(create) => {
                let uid = uid(create, sealed_pool.is_some())?;
                if create.or_attach {
                    check(&pool, member, &create.block, turn)?;
                }
                turn.with_pool(&pool, |pool, turn| {
                    pool.blocks().create(asking, create, uid, turn)
                })
            }
            Action::Attach {
                block,
                mode,
                layout,
            } => {
                check(&pool, member, block, turn)?;
                turn.with_pool(&pool, |pool, turn| {
                    pool.blocks()
                        .attach(asking, block, *mode, layout.as_ref(), turn)
                })
            }
            Action::Detach(block) => turn.with_pool(&pool, |pool, turn| {
                pool.blocks().detach(member, block, turn)
            }),
            Action::Read {
                block,
                offset,
                length,
                if_version,
            } => {
                let plan = turn.with_pool(&pool, |pool, _| pool.blocks().read(member, block))?;
                let range = range(block, plan, *offset, *length)?;
                self.check_fits(range.end - range.start, turn)?;
                let (bytes, version) = turn.driver.read_block(plan.storage, range, *if_version)?;
                let sent = id.map_or(Sent::Queued, |id| {
                    let attachments = self.attachments();
                    let length = match attachments {
                        Attachments::Taken => bytes.len(),
                        Attachments::NotTaken => bytes.len().div_ceil(3) * 4,
                    };
                    turn.send(&self.peer, Class::Reply, length + 256, |out| {
                        let stamp = (version, plan.generation);
                        encode::block_bytes(out, id, stamp, &bytes, attachments);
                    })
                });
                turn.driver.effects().buffers.recycle(bytes);
                match sent {
                    Sent::Full => Err(refusals::data_did_not_fit()),
                    Sent::Queued | Sent::Gone => Ok(None),
                }
            }
            Action::Write(write) => match sealed_pool {
                None => self.write_block(id, (&pool, member), write, None, turn),
                Some(name) => self.prove_write(id, (name, pool, member), write, turn),
            },
            Action::Cas {
                block,
                offset,
                expected,
                data,
                lock,
            } => {
                let plan = turn.with_pool(&pool, |pool, _| {
                    pool.blocks().begin_write(member, block, *lock)
                })?;
                let write = BlockWrite {
                    offset: *offset,
                    data,
                    if_version: None,
                    expected: Some(expected),
                    copied_max: COPIED_MAX,
                };
                self.carry_out(id, (&pool, plan), write, turn)
            }
            Action::Lock {
                block,
                mode,
                wait_ms,
                lease_ms,
            } => {
                let want = LockRequest {
                    mode: *mode,
                    wait_ms: *wait_ms,
                    lease_ms: *lease_ms,
                };
                turn.with_pool(&pool, |pool, turn| {
                    pool.blocks().lock(asking, block, want, turn)
                })
            }
            Action::Unlock(block, fence) => turn.with_pool(&pool, |pool, turn| {
                pool.blocks().unlock(member, block, *fence, turn)
            }),
            Action::Renew {
                block,
                lock,
                lease_ms,
            } => turn.with_pool(&pool, |pool, _| {
                pool.blocks()
                    .renew_lock(now, member, block, *lock, *lease_ms)
            }),
            Action::Subscribe(block) => {
                let name = m.name.clone();
                let reply = turn.with_pool(&pool, |pool, turn| {
                    pool.blocks().subscribe(member, block, turn)
                })?;
                self.remember_subscription(&name, block, true, turn);
                Ok(reply)
            }
            Action::Unsubscribe(block) => {
                let name = m.name.clone();
                let reply =
                    turn.with_pool(&pool, |pool, _| pool.blocks().unsubscribe(member, block))?;
                self.remember_subscription(&name, block, false, turn);
                Ok(reply)
            }
            Action::Notify(block, version) => turn.with_pool(&pool, |pool, turn| {
                pool.blocks().notify(member, block, *version, turn)
            }),
            Action::Reoffer(block) => {
                let name = m.name.clone();
                D::reoffer(turn, &pool, &name, block)?;
                Ok(Some("{}".into()))
            }
            Action::Resize { block, size, lock } => turn.with_pool(&pool, |pool, turn| {
                pool.blocks().resize(asking, block, *size, *lock, turn)
            }),
            Action::Flush(block) => {
                turn.with_pool(&pool, |pool, turn| pool.blocks().flush(asking, block, turn))
            }
            Action::Remove { block, lock } => {
                let is_admin = self.terms.is_admin;
                turn.with_pool(&pool, |pool, turn| {
                    pool.blocks().remove(member, is_admin, block, *lock, turn)
                })
            }
            Action::List(page) => {
                let blocks = turn.with_pool(&pool, |pool, turn| pool.blocks().list(page, turn));
                Ok(Some(blocks))
            }
            Action::Info(block) => {
                let all =
                    turn.with_pool(&pool, |pool, turn| pool.blocks().info(member, block, turn))?;
                Ok(Some(all.to_string()))
            }
        }
    }

    /// Restores the subscriptions of an app that reconnects.
    fn remember_subscription(
        &self,
        pool: &PoolName,
        block: &BlockId,
        is_on: bool,
        turn: &mut Turn<'_, D>,
    ) {
        if let Some(ready) = &self.ready {
            turn.with_registry(|registry, turn| {
                registry.remember_subscription(&ready.app, pool, block, is_on, turn);
            });
        }
    }

    /// A reply is one frame; a larger block is read in parts.
    fn check_fits(&self, length: u64, turn: &Turn<'_, D>) -> Result<(), Refusal> {
        let room = (turn.limits().max_frame as u64).saturating_sub(READ_SLACK as u64);
        let max = match self.attachments() {
            Attachments::Taken => room,
            Attachments::NotTaken => (room / 4 * 3).min(READ_AS_BASE64_MAX as u64),
        };
        if length <= max {
            return Ok(());
        }
        Err(refusals::too_large_to_read(length, max))
    }
}

/// The block of a request that the handler of a call may make because of the call.
fn lendable<'a>(action: &'a Action<'_>) -> Option<&'a BlockId> {
    match action {
        Action::Attach { block, .. }
        | Action::Read { block, .. }
        | Action::Cas { block, .. }
        | Action::Lock { block, .. }
        | Action::Subscribe(block)
        | Action::Notify(block, _) => Some(block),
        Action::Write(write) => Some(&write.block),
        _ => None,
    }
}

/// Checks whether the pool's policy allows a request about blocks, and in an encrypted pool the
/// roles that were proved.
fn check_rights<D: Driver>(
    m: &Membership<D>,
    action: &Action<'_>,
    turn: &mut Turn<'_, D>,
) -> Result<(), Refusal> {
    let needed = match action {
        Action::List(_)
        | Action::Info(_)
        | Action::Detach(_)
        | Action::Unlock(..)
        | Action::Unsubscribe(_)
        | Action::Renew { .. } => Roles::Join,
        Action::Attach {
            mode: Access::Read, ..
        }
        | Action::Read { .. }
        | Action::Subscribe(_)
        | Action::Lock {
            mode: LockMode::Shared,
            ..
        }
        | Action::Reoffer(_) => Roles::Read,
        _ => Roles::Write,
    };
    let allowed = match needed {
        Roles::Join => Ok(()),
        Roles::Read if m.rights.have(Right::Write) => Ok(()),
        Roles::Read => m.check_right(Right::Read),
        Roles::Write => m.check_right(Right::Write),
    };
    if let Err(refusal) = allowed {
        // The call that lends the block limits the access.
        let is_lent = turn.with_pool(&m.pool, |pool, _| {
            lendable(action).is_some_and(|block| pool.blocks().is_lent(m.member, block))
        });
        if !is_lent {
            return Err(refusal);
        }
    }
    let Some(grant) = m.grant else {
        return Ok(());
    };
    m.check_roles(needed)?;
    match (grant.suite, action) {
        (Suite::Gated, Action::Create(create)) if create.kind == Kind::Persistent => {
            Err(refusals::gated_block_is_persistent())
        }
        (Suite::Sealed, Action::Create(create)) if create.slots == 1 => {
            Err(refusals::sealed_block_is_raw())
        }
        (Suite::Sealed, Action::Cas { .. } | Action::Resize { .. }) => {
            Err(refusals::sealed_block_changed_by_server())
        }
        (Suite::Sealed, Action::Write(write)) if write.offset != 0 || write.lock.is_none() => {
            Err(refusals::sealed_block_written_in_part())
        }
        _ => Ok(()),
    }
}

/// The identity that the content of a new block is bound to.
fn uid(create: &Create, is_sealed: bool) -> Result<Option<[u8; 16]>, Refusal> {
    let uid = create.block_uid.as_deref().map(text::decode);
    match (is_sealed, uid) {
        (true, Some(Some(uid))) => Ok(Some(uid)),
        (false, None) => Ok(None),
        (true, _) => Err(refusals::block_uid_missing()),
        (false, _) => Err(refusals::block_uid_unexpected()),
    }
}

/// A slot of a sealed block to write, whose signature is being checked.
pub(super) struct SlotWrite {
    pool: PoolName,
    write: Write<'static>,
    /// The key that must have signed it.
    pub(super) seal: PublicKey,
    memory: Reservation,
}

impl SlotWrite {
    /// Bytes of the request.
    pub(super) fn bytes(&self) -> usize {
        self.memory.amount() as usize
    }
}

impl<D: Driver> Session<D> {
    /// Checks a slot that replaces a sealed block's content, and has its signature checked.
    fn prove_write(
        &mut self,
        id: Option<&str>,
        (name, pool, member): (PoolName, D::Pool, MemberKey),
        write: &Write<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let plan = turn.with_pool(&pool, |pool, _| {
            pool.blocks().begin_write(member, &write.block, write.lock)
        })?;
        let checked = check_written(&name, &plan, write, turn);
        turn.with_pool(&pool, |pool, turn| {
            pool.blocks().end_write(plan, None, turn)
        });
        let (manifest, seal) = checked?;
        let bytes = write.data.len() as u64;
        let memory = self
            .peer
            .link()
            .account()
            .reserve(Resource::Inbound, bytes)?;
        let write = Write {
            block: write.block.clone(),
            data: write.data.to_vec().into(),
            ..*write
        };
        let slot = SlotWrite {
            pool: name,
            write,
            seal,
            memory,
        };
        self.verify_write(id, slot, manifest, turn)
    }

    /// Writes a slot whose signature is good. All else is checked again: the pool, the roles, the
    /// lock and the block may have changed in the meantime.
    pub(super) fn write_slot(
        &mut self,
        id: Option<&str>,
        slot: &SlotWrite,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let m = self.checked_membership(Some(slot.pool.as_str()), turn)?;
        m.check_roles(Roles::Write)?;
        let (pool, member) = (m.pool.clone(), m.member);
        let signed = Some((&slot.pool, &slot.seal));
        self.write_block(id, (&pool, member), &slot.write, signed, turn)
    }

    /// Writes into a block, or refuses. The content of a sealed block was signed with the seal in
    /// `signed`.
    fn write_block(
        &self,
        id: Option<&str>,
        (pool, member): (&D::Pool, MemberKey),
        write: &Write<'_>,
        signed: Option<(&PoolName, &PublicKey)>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let plan = turn.with_pool(pool, |pool, _| {
            pool.blocks().begin_write(member, &write.block, write.lock)
        })?;
        let if_version = match signed {
            None => Ok(write.if_version),
            Some((name, signed_by)) => {
                check_written(name, &plan, write, turn).and_then(|(manifest, seal)| {
                    match seal == *signed_by {
                        true => Ok(Some(manifest.version() - 1)),
                        false => Err(refusals::pool_just_removed(name)),
                    }
                })
            }
        };
        let if_version = match if_version {
            Ok(if_version) => if_version,
            Err(refusal) => {
                turn.with_pool(pool, |pool, turn| pool.blocks().end_write(plan, None, turn));
                return Err(refusal);
            }
        };
        let write = BlockWrite {
            offset: write.offset,
            data: &write.data,
            if_version,
            expected: None,
            copied_max: COPIED_MAX,
        };
        self.carry_out(id, (pool, plan), write, turn)
    }

    /// Carries out a write that was allowed. It is left to a job if it copies much, or follows
    /// another one of the block: the loop must not wait for that.
    fn carry_out(
        &self,
        id: Option<&str>,
        (pool, plan): (&D::Pool, WritePlan),
        write: BlockWrite<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let mut written = match plan.is_behind {
            true => Ok(Written::Slow),
            false => turn.driver.write_block(plan.storage, &write),
        };
        if written == Ok(Written::Slow) {
            match self.slow_write(id, plan, &write) {
                Ok(slow) => {
                    turn.with_pool(pool, |pool, turn| pool.blocks().write_later(slow, turn));
                    return Ok(None);
                }
                Err(refusal) => written = Err(refusal),
            }
        }
        let version = written.as_ref().ok().and_then(Written::version);
        turn.with_pool(pool, |pool, turn| {
            pool.blocks().end_write(plan, version, turn)
        });
        Ok(Some(written_json(written?, write.expected.is_some())))
    }

    fn slow_write(
        &self,
        id: Option<&str>,
        plan: WritePlan,
        write: &BlockWrite<'_>,
    ) -> Result<SlowWrite<D::Peer>, Refusal> {
        let account = self.peer.link().account().clone();
        let bytes = write.data.len() + write.expected.map_or(0, <[u8]>::len);
        let bytes = bytes + id.map_or(0, str::len) + SLOW_WRITE_BYTES;
        let memory = account.reserve(Resource::Inbound, bytes as u64)?;
        Ok(SlowWrite {
            plan,
            peer: self.peer.clone(),
            id: id.map(Into::into),
            offset: write.offset,
            data: write.data.into(),
            if_version: write.if_version,
            expected: write.expected.map(Into::into),
            memory,
        })
    }
}

/// Checks a slot of a sealed block, but not its signature. Returns its manifest, and the key that
/// must have signed it.
fn check_written<D: Driver>(
    name: &PoolName,
    plan: &WritePlan,
    write: &Write<'_>,
    turn: &mut Turn<'_, D>,
) -> Result<(Manifest, PublicKey), Refusal> {
    let descriptor = turn.with_registry(|registry, _| registry.descriptor(name));
    let (Some(descriptor), Some(sealed)) = (descriptor, plan.sealed) else {
        return Err(refusals::pool_just_removed(name));
    };
    // From the block itself: the last writer may not have announced its version.
    let version = turn.version_noted(plan.storage, u64::MAX);
    let checks = Checks {
        id: SealedId {
            pool_id: descriptor.pool_id(),
            suite: descriptor.suite(),
            uid: sealed.uid,
            name: write.block.as_str(),
        },
        geometry: sealed.geometry,
        epoch: descriptor.epoch(),
        min_content_epoch: descriptor.min_content_epoch(),
    };
    let manifest = checks.unsigned(&write.data, version);
    let code = |error| match error {
        BlockError::StaleEpoch(_) => Code::StaleEpoch,
        BlockError::VersionConflict { .. } => Code::VersionConflict,
        _ => Code::BadMessage,
    };
    let manifest = manifest.map_err(|error| Refusal::new(code(error), error.to_string()))?;
    match write.if_version {
        Some(wanted) if wanted != version => Err(refusals::other_version(&write.block, version)),
        _ => Ok((manifest, descriptor.keys().seal)),
    }
}

/// Refuses a block whose storage is corrupt; the pool checks everything else.
fn check<D: Driver>(
    pool: &D::Pool,
    member: MemberKey,
    block: &BlockId,
    turn: &mut Turn<'_, D>,
) -> Result<(), Refusal> {
    match turn.with_pool(pool, |pool, _| pool.blocks().read(member, block)) {
        Ok(plan) => turn.driver.read_block(plan.storage, 0..0, None).map(|_| ()),
        Err(_) => Ok(()),
    }
}

/// The bytes that a read requests.
fn range(
    block: &BlockId,
    plan: ReadPlan,
    offset: u64,
    length: Option<u64>,
) -> Result<std::ops::Range<u64>, Refusal> {
    let end = match length {
        Some(length) => offset.checked_add(length),
        None => Some(plan.size),
    };
    match end {
        Some(end) if offset <= end && end <= plan.size => Ok(offset..end),
        _ => {
            let asked = length.map_or("to the end".into(), |length| format!("{length} bytes"));
            Err(refusals::outside_block(asked, offset, block, plan.size))
        }
    }
}
