//! The memory blocks of a pool: attachments, locks, and subscriptions to changes.
//!
//! The pool decides about blocks; the driver owns their bytes. Slow operations (create, grow,
//! flush) are a [`Job`] for the driver. Its result comes back as an input, and waiting requests are
//! answered then. For a read or write through the server, the pool gives permission, the driver
//! does it outside of the pool and then reports the result.

mod content;
mod events;
mod lending;
mod locks;
mod moving;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;
use latzero_crypto::block::Geometry as SealedGeometry;
use latzero_crypto::text;
use latzero_protocol::encode;
use latzero_protocol::memory::{
    Access, BlockUse, Create, Kind, Layout, Lifetime, LockMode, Permissions,
};
use latzero_protocol::message::Event;
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};
use serde_json::{Value, json};

use super::Pool;
use super::lock::{Claim, Claimed, Expired, Grant, Holder, Lock};
use super::members::{Member, MemberKey};
use crate::driver::{Driver, Peer as _};
use crate::ledger::{Account, Reservation, Resource};
use crate::memory::{Geometry, HEADER_BYTES, Job, Making, Numbers, StorageId, check_room};
use crate::now::Time;
use crate::outbox::Class;
use crate::slab::{Key, Slab};
use crate::turn::Turn;

pub use content::{ReadPlan, WritePlan};
use locks::access_for;
pub use record::Found;
use record::record;

/// The key of a block in its pool.
pub type BlockKey = Key<BlockTag>;

/// Marks keys of blocks, which are not generic over connections.
#[derive(Debug)]
pub enum BlockTag {}

/// How many attachments a block's description lists.
const ATTACHMENTS_SHOWN_MAX: usize = 100;

/// One instance that is attached to a block.
#[derive(Debug)]
struct Attachment {
    member: MemberKey,
    /// The access of an explicit attachment.
    own: Option<Access>,
    /// The reservation of an explicit attachment.
    held: Option<Reservation>,
    /// Attachments by calls that name the block: how many allow only reading, and how many writing.
    reading_calls: u32,
    writing_calls: u32,
}

impl Attachment {
    fn access(&self) -> Access {
        let lent = if self.writing_calls > 0 {
            Access::Write
        } else {
            Access::Read
        };
        self.own.map_or(lent, |own| own.max(lent))
    }

    fn calls(&self) -> u32 {
        self.reading_calls + self.writing_calls
    }

    /// The number of calls that allow this access.
    fn lent(&mut self, access: Access) -> &mut u32 {
        match access {
            Access::Read => &mut self.reading_calls,
            Access::Write => &mut self.writing_calls,
        }
    }
}

/// A member that waits until a block is ready.
#[derive(Debug)]
struct BlockWaiter {
    member: MemberKey,
    id: Option<Box<str>>,
    /// The access that it requested.
    attach: Option<Access>,
    _seat: Seat,
}

/// A member that waits for a flush.
#[derive(Debug)]
struct Flushing {
    ticket: u64,
    member: MemberKey,
    id: Option<Box<str>>,
    _seat: Seat,
}

/// The reservation of a request that waits.
#[derive(Debug)]
pub(super) struct Seat {
    _count: Reservation,
    _bytes: Reservation,
}

/// Bytes of a waiting request in addition to its id, including its index entries.
const WAIT_BYTES: usize = 384;

impl Seat {
    fn new(account: &Arc<Account>, id: Option<&str>) -> Result<Seat, Refusal> {
        let bytes = WAIT_BYTES + 2 * id.map_or(0, str::len);
        Ok(Seat {
            _count: account.reserve(Resource::Waits, 1)?,
            _bytes: account.reserve(Resource::Calls, bytes as u64)?,
        })
    }
}

/// The reservation of a block's bytes.
#[derive(Debug)]
struct Room {
    _bytes: Reservation,
    _memory: Reservation,
}

impl Room {
    fn new(account: &Arc<Account>, kind: Kind, bytes: u64) -> Result<Room, Refusal> {
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

/// The state of a block's storage.
#[derive(Debug)]
enum Phase {
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
struct Block {
    id: BlockId,
    storage: StorageId,
    kind: Kind,
    geometry: Geometry,
    /// Its identity in a sealed pool, where its slots hold ciphertext.
    sealed: Option<SealedContent>,
    layout: Option<Layout>,
    permissions: Permissions,
    owner: AppId,
    /// The account of its creator, and the reservations of the block and its bytes.
    account: Arc<Account>,
    _place: Reservation,
    room: Room,
    lifetime: Lifetime,
    generation: u64,
    /// When it was created, in milliseconds since the Unix epoch.
    created: u64,
    phase: Phase,
    attachments: Vec<Attachment>,
    subscribers: BTreeMap<MemberKey, Reservation>,
    /// Members that refer to it ([`Blocks::uses`]).
    involved: BTreeSet<MemberKey>,
    lock: Lock,
    /// No lease and no wait ends before this.
    due: Option<Time>,
    waiting: Vec<BlockWaiter>,
    flushing: Vec<Flushing>,
    /// The newest announced version, and its generation. Announced versions only grow.
    announced: (u64, u64),
    /// A lock was broken during a write by the server: a new generation follows that write.
    is_move_due: bool,
}

impl Block {
    fn total(&self) -> u64 {
        self.geometry.total().expect("checked when it was made")
    }

    /// Its size in bytes as clients see it.
    fn size(&self) -> u64 {
        self.sealed.map_or(self.geometry.size, |sealed| sealed.size)
    }

    fn attachment(&self, member: MemberKey) -> Option<&Attachment> {
        self.attachments.iter().find(|a| a.member == member)
    }

    /// What an app may do at any time.
    fn allows_app(&self, app: &AppId) -> Option<Access> {
        if *app == self.owner || self.permissions.write.contain(app) {
            Some(Access::Write)
        } else {
            self.permissions.read.contain(app).then_some(Access::Read)
        }
    }

    /// What a member may do now, by its own rights or those of a call.
    fn allows(&self, app: &AppId, member: MemberKey) -> Option<Access> {
        let lent = self.attachment(member).map(Attachment::access);
        self.allows_app(app).max(lent)
    }

    /// Whether a member has mapped the block for writing.
    fn could_write(&self, member: MemberKey) -> bool {
        self.attachment(member)
            .is_some_and(|a| a.access() == Access::Write)
    }

    fn consistency(&self) -> &'static str {
        if self.geometry.slots == 1 {
            "raw"
        } else {
            "snapshot"
        }
    }

    fn description(&self, pool: &str, version: u64) -> Value {
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

/// The blocks of one pool.
#[derive(Default)]
pub(super) struct Blocks {
    blocks: Slab<Block>,
    by_id: HashMap<BlockId, BlockKey>,
    /// Blocks of an earlier run that a limit excludes, and why. Their names stay reserved.
    left_out: HashMap<BlockId, Box<str>>,
    bytes: u64,
    tickets: u64,
    /// The deadlines of blocks, indexed because the pool is asked after every message.
    deadlines: BTreeSet<(Time, BlockKey)>,
    /// The blocks to check when a member leaves.
    uses: BTreeSet<(MemberKey, BlockKey)>,
    /// Waits for locks that can be cancelled: the member, its request id, the block, and the place
    /// in the queue.
    waits: BTreeSet<(MemberKey, Box<str>, BlockKey, u64)>,
}

impl Blocks {
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn at(&self, key: BlockKey) -> Option<&Block> {
        self.blocks.at(stored(key))
    }

    fn at_mut(&mut self, key: BlockKey) -> Option<&mut Block> {
        self.blocks.at_mut(stored(key))
    }

    /// The next deadline; it may be too early, but never too late.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// A block's lock may have a new deadline.
    fn note_deadline(&mut self, key: BlockKey) {
        let Some(block) = self.blocks.at_mut(stored(key)) else {
            return;
        };
        let due = block.lock.next_deadline();
        if due != block.due {
            let before = std::mem::replace(&mut block.due, due);
            before.map(|at| self.deadlines.remove(&(at, key)));
            due.map(|at| self.deadlines.insert((at, key)));
        }
    }

    /// Records that a member uses a block, so that its end finds it.
    fn involve(&mut self, member: MemberKey, key: BlockKey) {
        if let Some(block) = self.blocks.at_mut(stored(key)) {
            block.involved.insert(member);
            self.uses.insert((member, key));
        }
    }

    /// A member leaves: forgets which blocks it uses, and returns them.
    fn take_uses(&mut self, member: MemberKey) -> Vec<BlockKey> {
        let own = self.uses.range((member, BlockKey::new(0, 0))..);
        let own = own.take_while(|(user, _)| *user == member);
        let keys: Vec<BlockKey> = own.map(|(_, key)| *key).collect();
        for &key in &keys {
            self.uses.remove(&(member, key));
        }
        keys
    }

    /// A claim of a block's lock starts to wait.
    fn wait_begun(&mut self, key: BlockKey, (member, id): (MemberKey, Option<Box<str>>), at: u64) {
        if let Some(id) = id {
            self.waits.insert((member, id, key, at));
        }
    }

    /// A claim of a block's lock stops waiting.
    fn wait_over(&mut self, key: BlockKey, claim: &Claim) {
        if let Some(id) = &claim.id {
            self.waits
                .remove(&(claim.member, id.clone(), key, claim.place));
        }
    }

    /// Waits of a member under an id.
    fn waits_of(&self, member: MemberKey, id: &str) -> Vec<(BlockKey, u64)> {
        let first = (member, id.into(), BlockKey::new(0, 0), 0);
        let waits = self.waits.range(first..);
        let waits = waits.take_while(|(by, under, ..)| *by == member && **under == *id);
        waits.map(|(_, _, key, at)| (*key, *at)).collect()
    }
}

fn stored(key: BlockKey) -> Key<Block> {
    Key::new(key.slot, key.generation)
}

fn shown(key: Key<Block>) -> BlockKey {
    Key::new(key.slot, key.generation)
}

/// The reply's JSON text, or nothing if it was already sent or comes later.
pub type Replied = Option<String>;

/// The sender of a request, and the request's id.
#[derive(Debug, Clone, Copy)]
pub struct Asking<'a> {
    /// The member.
    pub member: MemberKey,
    /// The request's id.
    pub id: Option<&'a str>,
}

impl Asking<'_> {
    fn id(&self) -> Option<Box<str>> {
        self.id.map(Into::into)
    }
}

impl<D: Driver> Pool<D> {
    /// A reservation for a request that waits.
    fn seat(&self, asking: Asking<'_>) -> Result<Seat, Refusal> {
        let asker = self.asker(asking.member)?;
        Seat::new(asker.peer.link().account(), asking.id)
    }

    fn asker(&self, member: MemberKey) -> Result<&Member<D>, Refusal> {
        self.members.asker(member, &self.info.name)
    }

    /// A block of an earlier run is not restored, for the reason `why`. Its name and pool are kept
    /// for it.
    pub fn reserve_name(&mut self, id: &BlockId, why: &str, turn: &mut Turn<'_, D>) {
        if self
            .blocks
            .left_out
            .insert(id.clone(), why.into())
            .is_none()
        {
            turn.count_held(&self.info.name, self.info.number, 1);
        }
    }

    fn check_left_out(&self, id: &BlockId) -> Result<(), Refusal> {
        let Some(why) = self.blocks.left_out.get(id) else {
            return Ok(());
        };
        let message = format!(
            "block '{id}' of pool '{}' was not loaded when the server started, because of a \
             limit: {why}; restart the server with a higher limit",
            self.info.name
        );
        Err(Refusal::new(Code::Quota, message))
    }

    /// An existing block.
    fn block(&self, id: &BlockId) -> Result<(BlockKey, &Block), Refusal> {
        let found = self
            .blocks
            .by_id
            .get(id)
            .and_then(|&key| Some((key, self.blocks.at(key)?)));
        match found {
            Some((key, block)) if !matches!(block.phase, Phase::New) => Ok((key, block)),
            _ => {
                self.check_left_out(id)?;
                Err(no_block(id, self.info.name.as_str()))
            }
        }
    }

    /// A block to which `member` has this access.
    fn allowed(
        &self,
        member: MemberKey,
        id: &BlockId,
        access: Access,
    ) -> Result<(BlockKey, &Block), Refusal> {
        let asker = self.asker(member)?;
        let (key, block) = self.block(id)?;
        if block.allows(&asker.app, member) >= Some(access) {
            return Ok((key, block));
        }
        Err(self.forbidden(&asker.app, block, access))
    }

    /// A block that `member`'s app has this access to at any time, not only during a call.
    fn allowed_by_name(
        &self,
        member: MemberKey,
        id: &BlockId,
        access: Access,
    ) -> Result<(BlockKey, &Block), Refusal> {
        let asker = self.asker(member)?;
        let (key, block) = self.block(id)?;
        if block.allows_app(&asker.app) >= Some(access) {
            return Ok((key, block));
        }
        Err(self.forbidden(&asker.app, block, access))
    }

    fn forbidden(&self, app: &AppId, block: &Block, access: Access) -> Refusal {
        let message = format!(
            "app '{app}' may not {} block '{}' of pool '{}'; its owner is '{}'",
            access.as_str(),
            block.id,
            self.info.name,
            block.owner
        );
        Refusal::new(Code::Forbidden, message)
    }

    /// Creates a block, or attaches an existing one. The reply follows when it is ready. In a
    /// sealed pool its content is bound to `uid`.
    ///
    /// # Errors
    /// `block_exists`, `quota`, `too_large`, `layout_mismatch`, `forbidden`.
    pub fn create_block(
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
                let message = format!(
                    "block '{}' exists in pool '{}'; attach it, or create it with \
                    \"if_exists\":\"attach\"",
                    create.block, self.info.name
                );
                return Err(Refusal::new(Code::BlockExists, message));
            }
            let block = self.blocks.at_mut(key).expect("its name leads to it");
            check_layout(block, create.layout.as_ref())?;
            if block.size() < create.size {
                let message = format!(
                    "block '{}' exists with {} bytes, fewer than the {} requested; resize it",
                    create.block,
                    block.size(),
                    create.size
                );
                return Err(Refusal::new(Code::BlockExists, message));
            }
            if matches!(block.phase, Phase::New) {
                if block.waiting.len() >= self.info.limits.block_waiters_max {
                    return Err(too_many_wait(
                        &create.block,
                        self.info.limits.block_waiters_max,
                    ));
                }
                let seat = self.seat(asking)?;
                let block = self.blocks.at_mut(key).expect("its name leads to it");
                block.waiting.push(BlockWaiter {
                    member: asking.member,
                    id: asking.id(),
                    attach: create.attach,
                    _seat: seat,
                });
                self.blocks.involve(asking.member, key);
                return Ok(None);
            }
            let Some(access) = create.attach else {
                return Ok(Some(self.describe(key, None, turn).to_string()));
            };
            return self.attach_block(asking, &create.block, access, create.layout.as_ref(), turn);
        }
        self.check_left_out(&create.block)?;
        let owner = turn
            .driver
            .awaited_owner(&self.info.name, Some(&create.block));
        if owner.is_some_and(|owner| owner != app) {
            let message = format!(
                "the name of block '{}' in pool '{}' is kept for its owner, who had it before the \
                 server's start",
                create.block, self.info.name
            );
            return Err(Refusal::new(Code::Forbidden, message));
        }
        if create.lifetime == Lifetime::Attached && create.attach.is_none() {
            let message = "a block with \"lifetime\":\"attached\" would be removed at once; \
            attach it when creating it";
            return Err(Refusal::new(Code::BadMessage, message));
        }
        if create.kind == Kind::Persistent {
            self.info.check_outlives("a persistent block")?;
        }
        let sealed = match uid {
            None => None,
            Some(uid) => Some(self.sealed_content(uid, create)?),
        };
        let size = sealed.map_or(create.size, |sealed| sealed.geometry.capacity());
        let geometry = Geometry::new(create.kind, size, create.slots);
        let total = self.check_size(geometry)?;
        check_room(
            &format!("blocks of pool '{}'", self.info.name),
            "memory_bytes_per_pool_max",
            (
                self.blocks.bytes,
                total,
                self.info.limits.memory_bytes_per_pool_max,
            ),
        )?;
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
        let (storage, generation) = turn.with_numbers(|numbers| {
            let generation = numbers.first_generation(&self.info.name, &create.block);
            (numbers.next_storage(), generation)
        });
        turn.count_held(&self.info.name, self.info.number, 1);
        self.blocks.bytes += total;
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
            is_move_due: false,
        };
        let making = Making {
            storage,
            pool: self.info.name.clone(),
            block: block.id.clone(),
            kind: block.kind,
            geometry,
            generation,
            from: None,
            record: record(&self.info.name, &block, self.info.outlives).to_string(),
        };
        let key = shown(self.blocks.blocks.insert(block));
        self.blocks.by_id.insert(create.block.clone(), key);
        self.blocks.involve(asking.member, key);
        turn.block_job(Job::Make {
            key,
            making,
            unless_dead: None,
        });
        Ok(None)
    }

    fn sealed_content(&self, uid: [u8; 16], create: &Create) -> Result<SealedContent, Refusal> {
        let mut known = self.blocks.blocks.iter();
        let is_same = |block: &Block| block.sealed.is_some_and(|sealed| sealed.uid == uid);
        if known.any(|(_, block)| is_same(block)) {
            let message = "another block has this 'block_uid'; draw a new one for each block";
            return Err(Refusal::new(Code::BlockExists, message));
        }
        SealedContent::new(uid, create.size).ok_or_else(|| {
            let message = format!("{} bytes are too many to be sealed", create.size);
            Refusal::new(Code::TooLarge, message)
        })
    }

    /// Restores a block of an earlier run, for the account of the app that created it.
    ///
    /// # Errors
    /// If its record is invalid, its name is taken, or there is no room for it.
    pub fn adopt_block(
        &mut self,
        found: &Found<'_>,
        account: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> Result<StorageId, Refusal> {
        let mut block = found.read(account)?;
        if self.blocks.by_id.contains_key(&block.id) {
            let message = format!(
                "block '{}' occurs twice in pool '{}'",
                block.id, self.info.name
            );
            return Err(Refusal::new(Code::BlockExists, message));
        }
        let total = self.check_size(block.geometry)?;
        block._place = account.reserve(Resource::BlockCount, 1)?;
        block.room = Room::new(account, block.kind, total)?;
        block.storage = turn.with_numbers(Numbers::next_storage);
        turn.count_held(&self.info.name, self.info.number, 1);
        self.blocks.bytes += total;
        let (id, storage) = (block.id.clone(), block.storage);
        let key = self.blocks.blocks.insert(block);
        self.blocks.by_id.insert(id, shown(key));
        Ok(storage)
    }

    fn check_size(&self, geometry: Geometry) -> Result<u64, Refusal> {
        let total = geometry.total();
        match total {
            Some(total) if geometry.size <= self.info.limits.block_bytes_max => Ok(total),
            _ => Err(Refusal::new(
                Code::TooLarge,
                format!(
                    "a block may have at most {} bytes (limits.block_bytes_max); {} were requested",
                    self.info.limits.block_bytes_max, geometry.size
                ),
            )),
        }
    }

    /// Attaches a member.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `layout_mismatch`, `quota`.
    pub fn attach_block(
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
            if block.waiting.len() >= self.info.limits.block_waiters_max {
                return Err(too_many_wait(id, self.info.limits.block_waiters_max));
            }
            let seat = self.seat(asking)?;
            let block = self.blocks.at_mut(key).expect("just found");
            block.waiting.push(BlockWaiter {
                member: asking.member,
                id: asking.id(),
                attach: Some(access),
                _seat: seat,
            });
            self.blocks.involve(asking.member, key);
            return Ok(None);
        }
        let (key, block) = self.allowed(asking.member, id, access)?;
        check_layout(block, layout)?;
        self.check_descriptors(asking.member)?;
        let app = self.asker(asking.member)?.app.clone();
        if block.allows_app(&app) < Some(access) {
            // Attached by a call: it may attach again (the block may have moved), and the call's
            // end still detaches it.
            self.answer_description(key, asking.member, asking.id, Some(access), turn);
            return Ok(None);
        }
        let held = match block.attachment(asking.member) {
            Some(attachment) if attachment.own.is_some() => None,
            _ => Some(self.count_for_app(asking.member, Resource::Attachments)?),
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
                member: asking.member,
                own: Some(access),
                held,
                reading_calls: 0,
                writing_calls: 0,
            }),
        }
        self.blocks.involve(asking.member, key);
        self.answer_description(key, asking.member, asking.id, Some(access), turn);
        Ok(None)
    }

    /// Counts something of a member's app.
    fn count_for_app(&self, member: MemberKey, what: Resource) -> Result<Reservation, Refusal> {
        let link = self.asker(member)?.peer.link();
        Ok(link.account().app().reserve(what, 1)?)
    }

    /// Detaches a member; an attachment by a call stays until the call ends.
    ///
    /// # Errors
    /// `no_block`, `not_member`.
    pub fn detach_block(
        &mut self,
        member: MemberKey,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        self.asker(member)?;
        let (key, _) = self.block(id)?;
        let block = self.blocks.at_mut(key).expect("just found");
        if let Some(attachment) = block.attachments.iter_mut().find(|a| a.member == member) {
            (attachment.own, attachment.held) = (None, None);
        }
        self.drop_unused_attachment(key, member, turn);
        Ok(Some("{}".into()))
    }

    /// Removes a block, even if clients are attached. An administrator needs no permission.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`.
    pub fn remove_block(
        &mut self,
        member: MemberKey,
        is_admin: bool,
        id: &BlockId,
        turn: &mut Turn<'_, D>,
    ) -> Result<Replied, Refusal> {
        let (key, block) = if is_admin {
            self.asker(member)?;
            self.block(id)?
        } else {
            self.allowed_by_name(member, id, Access::Write)?
        };
        if let Some(held) = block.lock.exclusive().filter(|held| held.member != member) {
            return Err(self.locked(id, held));
        }
        self.end_block(key, turn);
        Ok(Some("{}".into()))
    }

    /// Releases the reservations of a removed pool.
    pub fn close_held(&mut self, turn: &mut Turn<'_, D>) {
        self.close_parked(turn);
        self.close_blocks(turn);
    }

    /// Removes the blocks of a removed pool.
    pub(super) fn close_blocks(&mut self, turn: &mut Turn<'_, D>) {
        let keys: Vec<BlockKey> = self
            .blocks
            .blocks
            .iter()
            .map(|(key, _)| shown(key))
            .collect();
        for key in keys {
            self.end_block(key, turn);
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
    fn end_block(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let json = self.block_event_json("block_removed", key, "");
        self.notify_attached(key, &json, turn);
        self.members.notify(Event::BlockRemoved, &json, None, turn);
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
        let claims = block.lock.end_all();
        let refusal = no_block(&block.id, self.info.name.as_str());
        let is_new = matches!(block.phase, Phase::New);
        for claim in claims {
            self.blocks.wait_over(key, &claim);
            waiting.push((claim.member, claim.id));
        }
        for (member, id) in waiting {
            self.answer(member, id.as_deref(), Err(refusal.clone()), turn);
        }
        self.forget_block(key, turn);
        // Storage that is still being created is dropped once it exists.
        if !is_new {
            turn.block_job(Job::Drop {
                storage,
                is_superseded: false,
            });
        }
    }

    /// Releases a block's reservations.
    fn forget_block(&mut self, key: BlockKey, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.blocks.remove(stored(key)) else {
            return;
        };
        self.blocks.by_id.remove(&block.id);
        self.blocks.bytes -= block.total();
        if let Phase::Moving { geometry, .. } = &block.phase {
            self.blocks.bytes -= geometry.total().expect("checked when it was asked for");
        }
        block.due.map(|at| self.blocks.deadlines.remove(&(at, key)));
        turn.with_numbers(|numbers| {
            numbers.forget_process(&self.info.name, &block.id, block.generation)
        });
        for member in block.involved {
            self.blocks.uses.remove(&(member, key));
        }
        turn.count_held(&self.info.name, self.info.number, -1);
    }

    /// Counts the blocks' entries in the ledger; for the simulator.
    #[must_use]
    pub fn block_counts(&self) -> BlockCounts {
        let mut counts = BlockCounts::default();
        for (_, block) in self.blocks.blocks.iter() {
            let waits = block.lock.waiting() + block.waiting.len() + block.flushing.len();
            counts.waits += waits as u64;
            let own = block.attachments.iter().filter(|a| a.own.is_some());
            counts.attachments += own.count() as u64;
            counts.subscriptions += block.subscribers.len() as u64;
        }
        counts
    }

    /// Checks the invariants of blocks, which hold between any two inputs; for the simulator and
    /// tests.
    pub(super) fn check_blocks(&self) {
        assert_eq!(self.blocks.by_id.len(), self.blocks.blocks.len());
        let mut bytes = 0;
        for (key, block) in self.blocks.blocks.iter() {
            assert_eq!(self.blocks.by_id.get(&block.id), Some(&shown(key)));
            bytes += block.total();
            if let Phase::Moving { geometry, .. } = &block.phase {
                bytes += geometry.total().expect("checked");
            }
            block.lock.check();
            let involved = block
                .attachments
                .iter()
                .map(|a| a.member)
                .chain(block.subscribers.keys().copied())
                .chain(block.lock.holders().iter().map(|h| h.member));
            for member in involved {
                let is_member = self.members.at(member).is_some();
                assert!(is_member, "nobody has a block who is not in the pool");
                let is_found = self.blocks.uses.contains(&(member, shown(key)));
                assert!(is_found, "its end would miss it");
            }
            let due = block.due;
            assert!(due.is_none_or(|at| self.blocks.deadlines.contains(&(at, shown(key)))));
            let next = block.lock.next_deadline();
            assert!(
                next.is_none_or(|next| due.is_some_and(|due| due <= next)),
                "a deadline would be missed"
            );
            for attachment in &block.attachments {
                assert!(attachment.own.is_some() || attachment.calls() > 0);
            }
            assert!(!block.is_move_due || block.lock.is_held_by_server());
        }
        assert_eq!(bytes, self.blocks.bytes);
        for (member, id, key, place) in &self.blocks.waits {
            let block = self.blocks.at(*key).expect("a wait is of a block");
            assert!(block.lock.waits(*member, id, *place), "a wait that is over");
        }
    }
}

/// What the ledger counts for a pool's blocks, in addition to their bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockCounts {
    /// Requests that wait.
    pub waits: u64,
    /// Explicit attachments.
    pub attachments: u64,
    /// Subscriptions to changes.
    pub subscriptions: u64,
}

/// A request for a lock.
#[derive(Debug, Clone, Copy)]
pub struct LockRequest {
    /// Exclusive, or shared with other readers.
    pub mode: LockMode,
    /// How long to wait in milliseconds; 0 is not at all.
    pub wait_ms: u64,
    /// The lease in milliseconds; if absent, the lock is held until its holder disconnects.
    pub lease_ms: Option<u64>,
}

fn grant_json(grant: &Grant) -> String {
    format!("{{\"lock\":\"{0}\",\"fence\":{0}}}", grant.fence)
}

fn check_layout(block: &Block, wanted: Option<&Layout>) -> Result<(), Refusal> {
    match (wanted, &block.layout) {
        (None, _) => Ok(()),
        (Some(wanted), Some(layout)) if wanted == layout => Ok(()),
        (Some(wanted), layout) => {
            let has = layout.as_ref().map_or("none".into(), Layout::to_json);
            Err(Refusal::new(
                Code::LayoutMismatch,
                format!(
                    "block '{}' has layout {has}, not {}",
                    block.id,
                    wanted.to_json()
                ),
            ))
        }
    }
}

fn no_block(id: &BlockId, pool: &str) -> Refusal {
    Refusal::new(
        Code::NoBlock,
        format!("there is no block '{id}' in pool '{pool}'; memory_list lists the blocks"),
    )
}

fn moving(id: &BlockId) -> Refusal {
    Refusal::new(
        Code::Locked,
        format!("block '{id}' is moving to a new generation; try again"),
    )
}

fn lock_lost(id: &BlockId, fence: u64) -> Refusal {
    Refusal::new(
        Code::LockLost,
        format!("you do not hold lock '{fence}' of block '{id}'"),
    )
}

fn too_many_wait(id: &BlockId, max: usize) -> Refusal {
    Refusal::new(
        Code::Overloaded,
        format!("{max} requests are already waiting for block '{id}' (limits.block_waiters_max)"),
    )
}
