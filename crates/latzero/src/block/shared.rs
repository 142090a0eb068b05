//! What all handles of one block share, and how news from the server finds them.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Waker;

use latzero_protocol::memory::{Access, Kind};
use latzero_protocol::{Code, Ran};
use latzero_shm::{Attachment, Expected, Geometry};
use serde_json::{Value, json};

use super::message;
use crate::error::Error;
use crate::message::Message;
use crate::payload::Reply;
use crate::sync::lock;

/// What the server said of a block.
#[derive(Debug, Clone)]
pub(crate) struct Described {
    pub(crate) id: String,
    pub(crate) pool: String,
    pub(crate) size: u64,
    pub(crate) slots: u32,
    pub(crate) generation: u64,
    pub(crate) version: u64,
    pub(crate) kind: Kind,
    pub(crate) access: Access,
    pub(crate) layout: Option<Value>,
    is_mapped: bool,
    slot_offset: u64,
    slot_stride: u64,
}

impl Described {
    fn of(value: &Value) -> Option<Described> {
        let number = |name: &str| value[name].as_u64();
        let word = |name: &str| value[name].as_str();
        Some(Described {
            id: word("block_id")?.to_owned(),
            pool: word("pool")?.to_owned(),
            size: number("size")?,
            slots: u32::try_from(number("slots")?).ok()?,
            generation: number("generation")?,
            version: number("version")?,
            kind: Kind::parse(word("kind")?)?,
            access: Access::parse(word("mode")?)?,
            layout: value.get("layout").cloned(),
            is_mapped: word("access") == Some("mapped"),
            slot_offset: number("slot_offset")?,
            slot_stride: number("slot_stride")?,
        })
    }
}

/// One generation of a block, as it was attached.
#[derive(Debug)]
pub(crate) struct Current {
    pub(crate) described: Described,
    pub(crate) attachment: Option<Arc<Attachment>>,
    /// Over which connection.
    pub(crate) epoch: u32,
}

/// What a reader or writer goes on with, whatever becomes of the handle meanwhile.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) described: Described,
    pub(super) attachment: Option<Arc<Attachment>>,
    pub(super) epoch: u32,
}

impl Current {
    /// Takes a description with its descriptor.
    pub(super) fn of_reply(reply: Reply) -> Result<Current, Error> {
        let epoch = reply.epoch;
        let descriptor = reply.take_descriptors().into_iter().next();
        let value: Value = reply.into()?;
        Current::new(&value, descriptor, epoch)
    }

    /// Takes a description, and the descriptor that came with it.
    pub(crate) fn new(
        value: &Value,
        descriptor: Option<OwnedFd>,
        epoch: u32,
    ) -> Result<Current, Error> {
        let described = Described::of(value).ok_or_else(super::unreadable)?;
        let attachment = match (described.is_mapped, descriptor) {
            (true, Some(descriptor)) => {
                let geometry = Geometry::new(described.size, described.slots);
                let geometry = geometry
                    .ok()
                    .filter(|g| {
                        (g.slot_offset, g.slot_stride)
                            == (described.slot_offset, described.slot_stride)
                    })
                    .ok_or_else(super::unreadable)?;
                let expected = Expected {
                    generation: described.generation,
                    geometry,
                    is_persistent: described.kind == Kind::Persistent,
                    access: match described.access {
                        Access::Read => latzero_shm::Access::Read,
                        Access::Write => latzero_shm::Access::Write,
                    },
                };
                let attachment = Attachment::new(descriptor, &expected).map_err(|e| {
                    let text = format!("block '{}' can't be mapped: {e}", described.id);
                    Error::new(Code::Storage, text)
                        .with_ran(Ran::No)
                        .with_source(e)
                })?;
                Some(Arc::new(attachment))
            }
            (false, None) => None,
            _ => return Err(super::unreadable()),
        };
        Ok(Current {
            described,
            attachment,
            epoch,
        })
    }

    pub(super) fn held(&self) -> Held {
        Held {
            described: self.described.clone(),
            attachment: self.attachment.clone(),
            epoch: self.epoch,
        }
    }
}

/// What all handles of one attached block share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(super) id: String,
    pub(super) pool: String,
    pub(super) current: Mutex<Current>,
    /// The newest version that the server told of.
    pub(super) newest: AtomicU64,
    /// It moved, or may have: to be attached anew before the next use.
    pub(super) must_attach: AtomicBool,
    /// It was removed, or its server is another one now.
    pub(super) is_gone: AtomicBool,
    /// How many want to be told of changes.
    pub(super) subscribers: AtomicU64,
    /// Who waits for a change.
    pub(super) wakers: Mutex<Vec<Waker>>,
    /// Fences of locks that ended against this app's will.
    pub(super) lost_locks: Mutex<Vec<u64>>,
    /// What went wrong where nobody could be told.
    pub(super) fault: Mutex<Option<Error>>,
}

/// Lost locks that are remembered; older ones belong to guards that are long gone.
const LOST_LOCKS_MAX: usize = 64;

impl Shared {
    pub(super) fn new(current: Current) -> Shared {
        Shared {
            id: current.described.id.clone(),
            pool: current.described.pool.clone(),
            newest: AtomicU64::new(current.described.version),
            current: Mutex::new(current),
            must_attach: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            subscribers: AtomicU64::new(0),
            wakers: Mutex::default(),
            lost_locks: Mutex::default(),
            fault: Mutex::default(),
        }
    }

    pub(super) fn message(&self, action: &str, more: &Value) -> Message {
        message(action, Some(&self.pool), &self.id, more)
    }

    pub(super) fn heard(&self, version: u64) {
        self.newest.fetch_max(version, Ordering::AcqRel);
    }

    /// A block attached anew may be another one, which begins again.
    pub(super) fn restart(&self, version: u64) {
        self.newest.store(version, Ordering::Release);
    }

    fn wake(&self, wake: &mut Vec<Waker>) {
        wake.append(&mut lock(&self.wakers));
    }

    /// Takes an event about the block.
    fn event(&self, event: &str, fields: &Value, wake: &mut Vec<Waker>) {
        match event {
            "block_changed" => self.heard(super::number(fields, "version")),
            "block_moved" => self.must_attach.store(true, Ordering::Release),
            "block_removed" => self.is_gone.store(true, Ordering::Release),
            "lock_lost" => {
                let fence: Option<u64> = fields["lock"].as_str().and_then(|text| text.parse().ok());
                let mut lost = lock(&self.lost_locks);
                lost.extend(fence);
                let excess = lost.len().saturating_sub(LOST_LOCKS_MAX);
                lost.drain(..excess);
            }
            _ => return,
        }
        self.wake(wake);
    }
}

#[derive(Debug)]
struct Known {
    shared: Weak<Shared>,
    access: Access,
    is_lent: bool,
}

/// The blocks that an app takes part in.
#[derive(Debug, Default)]
pub(crate) struct Blocks(Mutex<Vec<Known>>);

impl Blocks {
    pub(super) fn add(&self, shared: &Arc<Shared>, access: Access, is_lent: bool) {
        lock(&self.0).push(Known {
            shared: Arc::downgrade(shared),
            access,
            is_lent,
        });
    }

    /// Forgets a handle's block; true where no other handle stands for the same one.
    pub(super) fn forget(&self, gone: &Arc<Shared>) -> bool {
        let mut known = lock(&self.0);
        known.retain(|k| !std::ptr::eq(k.shared.as_ptr(), Arc::as_ptr(gone)));
        !known.iter().any(|k| {
            !k.is_lent
                && k.shared
                    .upgrade()
                    .is_some_and(|s| s.id == gone.id && s.pool == gone.pool)
        })
    }

    fn all(&self) -> Vec<(Arc<Shared>, Access)> {
        let known = lock(&self.0);
        let live = known.iter().filter(|k| !k.is_lent);
        live.filter_map(|k| Some((k.shared.upgrade()?, k.access)))
            .collect()
    }

    /// What is said over a new connection, so that the server knows who takes part in what again.
    pub(crate) fn reattach(&self) -> Vec<Message> {
        let mut messages = Vec::new();
        for (shared, access) in self.all() {
            let more = json!({"mode": access.as_str()});
            messages.push(shared.message("memory_attach", &more));
            if shared.subscribers.load(Ordering::Acquire) > 0 {
                messages.push(shared.message("memory_subscribe", &json!({})));
            }
        }
        messages
    }

    /// Takes an event about a block.
    pub(crate) fn event(&self, event: &str, pool: &str, text: &str, wake: &mut Vec<Waker>) {
        let known: Vec<Arc<Shared>> = lock(&self.0)
            .iter()
            .filter_map(|k| k.shared.upgrade())
            .filter(|s| s.pool == pool)
            .collect();
        if known.is_empty() {
            return;
        }
        let fields: Value = serde_json::from_str(text).unwrap_or_default();
        for shared in known {
            if fields["block_id"] == shared.id {
                shared.event(event, &fields, wake);
            }
        }
    }

    /// Wakes everybody, at the end of the connection or of the app.
    pub(crate) fn wake_all(&self, wake: &mut Vec<Waker>) {
        let known: Vec<_> = lock(&self.0)
            .iter()
            .filter_map(|k| k.shared.upgrade())
            .collect();
        for shared in known {
            shared.wake(wake);
        }
    }
}
