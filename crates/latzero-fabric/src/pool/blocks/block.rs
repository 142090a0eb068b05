//! One block: its storage, its attachments, its lock, and who waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use latzero_crypto::block::Geometry as SealedGeometry;
use latzero_crypto::text;
use latzero_protocol::memory::{Access, Kind, Layout, Lifetime, Permissions};
use latzero_protocol::{AppId, BlockId, PoolName, Refusal};
use serde_json::{Value, json};

use crate::ledger::{Account, Reservation, Resource};
use crate::memory::{Geometry, HEADER_BYTES, StorageId};
use crate::now::Time;
use crate::pool::lock::Lock;
use crate::pool::members::{Claimant, MemberKey};
use crate::refusals;

/// One instance that is attached to a block.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) member: MemberKey,
    /// The access of an explicit attachment.
    pub(super) own: Option<Access>,
    /// The reservation of an explicit attachment.
    pub(super) held: Option<Reservation>,
    /// Attachments by calls that name the block: how many allow only reading, and how many writing.
    pub(super) reading_calls: u32,
    pub(super) writing_calls: u32,
}

impl Attachment {
    pub(super) fn new(member: MemberKey) -> Attachment {
        Attachment {
            member,
            own: None,
            held: None,
            reading_calls: 0,
            writing_calls: 0,
        }
    }

    pub(super) fn access(&self) -> Access {
        let lent = if self.writing_calls > 0 {
            Access::Write
        } else {
            Access::Read
        };
        self.own.map_or(lent, |own| own.max(lent))
    }

    pub(super) fn calls(&self) -> u32 {
        self.reading_calls + self.writing_calls
    }

    /// The number of calls that allow this access.
    pub(super) fn lent(&mut self, access: Access) -> &mut u32 {
        match access {
            Access::Read => &mut self.reading_calls,
            Access::Write => &mut self.writing_calls,
        }
    }
}

/// A member that waits until a block is ready.
#[derive(Debug)]
pub(super) struct BlockWaiter {
    pub(super) member: MemberKey,
    pub(super) id: Option<Box<str>>,
    /// The access that it requested.
    pub(super) attach: Option<Access>,
    pub(super) _seat: Seat,
}

/// A member that waits for a flush.
#[derive(Debug)]
pub(super) struct Flushing {
    pub(super) ticket: u64,
    pub(super) member: MemberKey,
    pub(super) id: Option<Box<str>>,
    pub(super) _seat: Seat,
}

/// The reservation of a request that waits.
#[derive(Debug)]
pub(in crate::pool) struct Seat {
    _count: Reservation,
    _bytes: Reservation,
}

/// Bytes of a waiting request in addition to its id, including its index entries.
const WAIT_BYTES: usize = 384;

impl Seat {
    pub(super) fn new(account: &Arc<Account>, id: Option<&str>) -> Result<Seat, Refusal> {
        let bytes = WAIT_BYTES + 2 * id.map_or(0, str::len);
        Ok(Seat {
            _count: account.reserve(Resource::Waits, 1)?,
            _bytes: account.reserve(Resource::Calls, bytes as u64)?,
        })
    }
}

/// The reservation of a block's bytes.
#[derive(Debug)]
pub(super) struct Room {
    _bytes: Reservation,
    _memory: Reservation,
}

impl Room {
    pub(super) fn new(account: &Arc<Account>, kind: Kind, bytes: u64) -> Result<Room, Refusal> {
        let memory = match kind {
            Kind::Shared => bytes,
            Kind::Persistent => 0,
        };
        Ok(Room {
            _bytes: account.reserve(Resource::Blocks, bytes)?,
            _memory: account.reserve(Resource::SharedBlocks, memory)?,
        })
    }
}

/// Bytes that a block takes besides its content and the texts about it, and each name of these.
const BLOCK_BYTES: usize = 1024;
const NAME_BYTES: usize = 48;

/// About how many bytes of memory a block takes besides its content.
pub(super) fn about_bytes(
    (id, owner): (&BlockId, &AppId),
    permissions: &Permissions,
    layout: Option<&Layout>,
) -> u64 {
    let apps = [permissions.read.names(), permissions.write.names()].concat();
    let fields = layout
        .iter()
        .flat_map(|l| l.fields.iter().map(String::as_str));
    let names = apps.into_iter().chain(fields);
    let names = names.chain([id.as_str(), owner.as_str()]);
    let shape = layout.map_or(0, |layout| layout.dtype.len() + 8 * layout.shape.len());
    let bytes = names.map(|name| name.len() + NAME_BYTES).sum::<usize>();
    (BLOCK_BYTES + shape + bytes) as u64
}

/// The state of a block's storage.
#[derive(Debug)]
pub(super) enum Phase {
    /// It is being created.
    New,
    /// It can be used.
    Live,
    /// A new generation is being created; the old one is still in use.
    Moving {
        to: StorageId,
        geometry: Geometry,
        reason: &'static str,
        room: Room,
    },
}

/// The identity that the content of a sealed block is bound to.
#[derive(Debug, Clone, Copy)]
pub struct SealedContent {
    /// 16 random bytes chosen by its creator.
    pub uid: [u8; 16],
    /// The most plaintext in bytes.
    pub size: u64,
    /// The layout of ciphertext in a slot.
    pub geometry: SealedGeometry,
}

impl SealedContent {
    /// A block for `size` bytes of plaintext; `None` if that is too large.
    #[must_use]
    pub fn new(uid: [u8; 16], size: u64) -> Option<SealedContent> {
        let geometry = SealedGeometry::of(size)?;
        Some(SealedContent {
            uid,
            size,
            geometry,
        })
    }
}

#[derive(Debug)]
pub(super) struct Block {
    pub(super) id: BlockId,
    pub(super) storage: StorageId,
    pub(super) kind: Kind,
    pub(super) geometry: Geometry,
    /// Its identity in a sealed pool, where its slots hold ciphertext.
    pub(super) sealed: Option<SealedContent>,
    pub(super) layout: Option<Layout>,
    pub(super) permissions: Permissions,
    pub(super) owner: AppId,
    /// The account of its creator, and the reservations of the block and its bytes.
    pub(super) account: Arc<Account>,
    pub(super) _place: Reservation,
    /// The reservation of what is stored about it: its name, permissions and layout.
    pub(super) about: Reservation,
    pub(super) room: Room,
    pub(super) lifetime: Lifetime,
    pub(super) generation: u64,
    /// When it was created, in milliseconds since the Unix epoch.
    pub(super) created: u64,
    pub(super) phase: Phase,
    pub(super) attachments: Vec<Attachment>,
    pub(super) subscribers: BTreeMap<MemberKey, Reservation>,
    /// Members that refer to it ([`Blocks::uses`]).
    pub(super) involved: BTreeSet<MemberKey>,
    pub(super) lock: Lock,
    /// No lease and no wait ends before this.
    pub(super) due: Option<Time>,
    pub(super) waiting: Vec<BlockWaiter>,
    pub(super) flushing: Vec<Flushing>,
    /// The newest announced version, and its generation. Announced versions only grow.
    pub(super) announced: (u64, u64),
    /// A new generation follows the write by the server that is in progress.
    pub(super) move_due: Option<MoveDue>,
}

/// Why a new generation is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MoveDue {
    /// A lock was broken.
    LockBroken,
    /// Members had to leave the pool.
    Rotated,
}

impl Block {
    pub(super) fn total(&self) -> u64 {
        self.geometry.total().expect("checked when it was made")
    }

    /// Its size in bytes as clients see it.
    pub(super) fn size(&self) -> u64 {
        self.sealed.map_or(self.geometry.size, |sealed| sealed.size)
    }

    pub(super) fn attachment(&self, member: MemberKey) -> Option<&Attachment> {
        self.attachments.iter().find(|a| a.member == member)
    }

    /// What an app may do at any time, by the block's permissions and the pool's policy.
    pub(super) fn allows_app(&self, who: Claimant<'_>) -> Option<Access> {
        let own = if *who.app == self.owner || self.permissions.write.contain(who.app) {
            Some(Access::Write)
        } else {
            let reads = self.permissions.read.contain(who.app);
            reads.then_some(Access::Read)
        };
        own.min(who.most())
    }

    /// The refusal for an app that lacks an access.
    pub(super) fn forbidden(&self, who: Claimant<'_>, access: Access, pool: &PoolName) -> Refusal {
        if who.most() < Some(access) {
            return refusals::right_is_denied(access.as_str(), pool);
        }
        let app = who.app;
        refusals::block_forbidden(app, access.as_str(), &self.id, pool, &self.owner)
    }

    /// What a member may do now, by its own rights or those of a call.
    pub(super) fn allows(&self, who: Claimant<'_>, member: MemberKey) -> Option<Access> {
        let lent = self.attachment(member).map(Attachment::access);
        self.allows_app(who).max(lent)
    }

    /// Whether a member has mapped the block for writing.
    pub(super) fn could_write(&self, member: MemberKey) -> bool {
        self.attachment(member)
            .is_some_and(|a| a.access() == Access::Write)
    }

    /// Detaches a member, unless it or a call of it still holds the block.
    pub(super) fn drop_unused_attachment(&mut self, member: MemberKey) {
        self.attachments
            .retain(|a| a.member != member || a.own.is_some() || a.calls() > 0);
    }

    pub(super) fn consistency(&self) -> &'static str {
        if self.geometry.slots == 1 {
            "raw"
        } else {
            "snapshot"
        }
    }

    pub(super) fn description(&self, pool: &str, version: u64) -> Value {
        let mut description = json!({
            "block_id": self.id, "pool": pool, "size": self.size(),
            "kind": self.kind.as_str(),
            "consistency": self.consistency(), "version": version, "generation": self.generation,
            "header": if self.geometry.spares == 0 { 1 } else { 2 },
            "slots": self.geometry.slots, "slot_offset": HEADER_BYTES,
            "slot_stride": self.geometry.stride(),
            "owner": self.owner, "lifetime": self.lifetime.as_str(), "fence": self.lock.fence(),
        });
        if self.geometry.spares > 0 {
            description["spare_slots"] = self.geometry.spares.into();
        }
        if let Some(sealed) = &self.sealed {
            description["sealed"] = true.into();
            description["block_uid"] = text::encode(&sealed.uid).into();
            description["capacity"] = self.geometry.size.into();
        }
        if let Some(layout) = &self.layout {
            description["layout"] =
                serde_json::from_str(&layout.to_json()).expect("a layout writes JSON");
        }
        description
    }
}

pub(super) fn check_layout(block: &Block, wanted: Option<&Layout>) -> Result<(), Refusal> {
    match (wanted, &block.layout) {
        (None, _) => Ok(()),
        (Some(wanted), Some(layout)) if wanted == layout => Ok(()),
        (Some(wanted), layout) => {
            let has = layout.as_ref().map_or("none".into(), Layout::to_json);
            Err(refusals::other_layout(&block.id, has, wanted.to_json()))
        }
    }
}
