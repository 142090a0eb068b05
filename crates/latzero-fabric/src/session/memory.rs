//! Requests about memory blocks: asked of the pool, and where bytes move, done by the driver in between.

use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::limits::{READ_SLACK, SYSTEM_POOL};
use latzero_protocol::memory::{Action, Memory};
use latzero_protocol::{BlockId, Code, PoolName, Refusal};

use super::Session;
use crate::effects::{Class, Effects, Sent};
use crate::host::Host;
use crate::pool::{Asking, LockWish, MemberKey, ReadPlan, Replied};
use crate::time::Time;

impl<H: Host> Session<H> {
    pub(super) fn memory(
        &mut self,
        now: Time,
        id: Option<&str>,
        memory: &Memory<'_>,
        host: &mut H,
    ) -> Result<Replied, Refusal> {
        let unix_ms = host.unix_ms(now);
        let m = self.current_membership(memory.pool.as_deref(), host)?;
        let (pool, member) = (m.pool.clone(), m.member);
        let is_system = m.name.as_str() == SYSTEM_POOL;
        let asking = Asking { member, id };
        match &memory.action {
            Action::Create(_) if is_system => Err(Refusal::new(
                Code::Forbidden,
                "pool 'system' is the server's own; make blocks in another",
            )),
            Action::Create(create) => {
                if create.or_attach {
                    check(&pool, member, &create.block, host)?;
                }
                host.with_pool(&pool, |pool, fx| {
                    pool.create_block(asking, create, unix_ms, fx)
                })
            }
            Action::Attach {
                block,
                mode,
                layout,
            } => {
                check(&pool, member, block, host)?;
                host.with_pool(&pool, |pool, fx| {
                    pool.attach_block(asking, block, *mode, layout.as_ref(), fx)
                })
            }
            Action::Detach(block) => {
                host.with_pool(&pool, |pool, fx| pool.detach_block(member, block, fx))
            }
            Action::Read {
                block,
                offset,
                length,
                if_version,
            } => {
                let plan = host.with_pool(&pool, |pool, _| pool.read_block(member, block))?;
                let range = range(block, plan, *offset, *length)?;
                self.check_fits(range.end - range.start, host)?;
                let (bytes, version) = host.read_block(plan.storage, range, *if_version)?;
                let sent = id.map_or(Sent::Queued, |id| {
                    let attachments = self.attachments();
                    let length = match attachments {
                        Attachments::Taken => bytes.len(),
                        Attachments::NotTaken => bytes.len().div_ceil(3) * 4,
                    };
                    host.effects()
                        .send(&self.peer, Class::Reply, length + 256, |out| {
                            let stamp = (version, plan.generation);
                            encode::block_bytes(out, id, stamp, &bytes, attachments);
                        })
                });
                host.recycle(bytes);
                match sent {
                    Sent::Full => Err(Refusal::new(
                        Code::Overloaded,
                        "the bytes did not fit into your outbox (limits.outbox_bytes_max): read faster",
                    )),
                    Sent::Queued | Sent::Gone => Ok(None),
                }
            }
            Action::Write(write) => {
                let plan = host.with_pool(&pool, |pool, _| {
                    pool.begin_write(member, &write.block, write.lock)
                })?;
                let written =
                    host.write_block(plan.storage, write.offset, &write.data, write.if_version);
                let version = written.as_ref().ok().copied();
                host.with_pool(&pool, |pool, fx| pool.end_write(now, plan, version, fx));
                written.map(|version| Some(format!("{{\"version\":{version}}}")))
            }
            Action::Cas {
                block,
                offset,
                expected,
                data,
                lock,
            } => {
                let plan =
                    host.with_pool(&pool, |pool, _| pool.begin_write(member, block, *lock))?;
                let swapped = host.swap_block(plan.storage, *offset, expected, data);
                let version = match &swapped {
                    Ok((version, None)) => Some(*version),
                    _ => None,
                };
                host.with_pool(&pool, |pool, fx| pool.end_write(now, plan, version, fx));
                Ok(Some(match swapped? {
                    (version, None) => format!("{{\"swapped\":true,\"version\":{version}}}"),
                    (version, Some(current)) => {
                        let mut text =
                            format!("{{\"swapped\":false,\"version\":{version},\"current\":")
                                .into_bytes();
                        encode::append_base64(&mut text, &current);
                        text.push(b'}');
                        String::from_utf8(text).expect("base64 is text")
                    }
                }))
            }
            Action::Lock {
                block,
                mode,
                wait_ms,
                lease_ms,
            } => {
                let want = LockWish {
                    mode: *mode,
                    wait_ms: *wait_ms,
                    lease_ms: *lease_ms,
                };
                host.with_pool(&pool, |pool, fx| {
                    pool.lock_block(now, asking, block, want, fx)
                })
            }
            Action::Unlock(block, fence) => host.with_pool(&pool, |pool, fx| {
                pool.unlock_block(now, member, block, *fence, fx)
            }),
            Action::Renew {
                block,
                lock,
                lease_ms,
            } => host.with_pool(&pool, |pool, _| {
                pool.renew_lock(now, member, block, *lock, *lease_ms)
            }),
            Action::Subscribe(block) => {
                let name = m.name.clone();
                let reply =
                    host.with_pool(&pool, |pool, fx| pool.subscribe_block(member, block, fx))?;
                self.remember_subscription(&name, block, true, host);
                Ok(reply)
            }
            Action::Unsubscribe(block) => {
                let name = m.name.clone();
                let reply =
                    host.with_pool(&pool, |pool, fx| pool.unsubscribe_block(member, block, fx))?;
                self.remember_subscription(&name, block, false, host);
                Ok(reply)
            }
            Action::Notify(block, version) => host.with_pool(&pool, |pool, fx| {
                pool.notify_block(member, block, *version, fx)
            }),
            Action::Reoffer(block) => {
                let name = m.name.clone();
                host.take_back(now, &pool, &name, block)?;
                Ok(Some("{}".into()))
            }
            Action::Resize(block, size) => host.with_pool(&pool, |pool, fx| {
                pool.resize_block(asking, block, *size, fx)
            }),
            Action::Flush(block) => {
                host.with_pool(&pool, |pool, fx| pool.flush_block(asking, block, fx))
            }
            Action::Remove(block) => {
                let is_admin = self.terms.is_admin;
                host.with_pool(&pool, |pool, fx| {
                    pool.remove_block(member, is_admin, block, fx)
                })
            }
            Action::List(page) => {
                let blocks = host.with_pool(&pool, |pool, fx| pool.blocks_json(page, fx));
                Ok(Some(blocks.to_string()))
            }
            Action::Info(block) => {
                let all = host.with_pool(&pool, |pool, fx| pool.block_json(member, block, fx))?;
                Ok(Some(all.to_string()))
            }
        }
    }

    /// An app that comes back has its subscriptions again.
    fn remember_subscription(&self, pool: &PoolName, block: &BlockId, is_on: bool, host: &mut H) {
        if let Some(ready) = &self.ready {
            host.with_registry(|registry, fx| {
                registry.remember_subscription(&ready.app, pool, block, is_on, fx);
            });
        }
    }

    /// A reply is one frame; a larger block is read in parts.
    fn check_fits(&self, length: u64, host: &H) -> Result<(), Refusal> {
        let room = (host.limits().max_frame as u64).saturating_sub(READ_SLACK as u64);
        let max = match self.attachments() {
            Attachments::Taken => room,
            Attachments::NotTaken => room / 4 * 3,
        };
        if length <= max {
            return Ok(());
        }
        let message = format!(
            "{length} bytes do not fit into one reply; read at most {max} at a time, with \"if_version\" where the parts belong together"
        );
        Err(Refusal::new(Code::TooLarge, message))
    }
}

/// Refuses a block whose storage is corrupt; what else there is against it the pool says.
fn check<H: Host>(
    pool: &H::Pool,
    member: MemberKey,
    block: &BlockId,
    host: &mut H,
) -> Result<(), Refusal> {
    match host.with_pool(pool, |pool, _| pool.read_block(member, block)) {
        Ok(plan) => host.check_block(plan.storage),
        Err(_) => Ok(()),
    }
}

/// The bytes that a read asks for.
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
            let message = format!(
                "{asked} from offset {offset} lie outside block '{block}', which has {} bytes",
                plan.size
            );
            Err(Refusal::new(Code::OutOfRange, message))
        }
    }
}
