//! The memory blocks of a pool: attachments, locks, and subscriptions to changes.
//!
//! The pool decides about blocks; the driver owns their bytes. Slow operations (create, grow,
//! flush) are a [`Job`] for the driver. Its result comes back as an input, and waiting requests are
//! answered then. For a read or write through the server, the pool gives permission, the driver
//! does it outside of the pool and then reports the result; a write that copies much is a job too.

mod block;
mod content;
mod events;
mod lending;
mod locks;
mod moving;
mod record;
mod requests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use hashbrown::HashMap;
use latzero_crypto::text;
use latzero_protocol::encode;
use latzero_protocol::memory::{
    Access, BlockUse, Create, Kind, Layout, Lifetime, LockMode, Permissions,
};
use latzero_protocol::message::Event;
use latzero_protocol::{AppId, BlockId, PoolName, Refusal};
use serde_json::{Value, json};

use super::PoolInfo;
use super::lock::{Claim, Claimed, Expired, Grant, Holder, Lock};
use super::members::{Claimant, Member, MemberKey, Members};
use crate::driver::{Driver, Peer as _};
use crate::ledger::{Account, Resource};
use crate::limits::Limits;
use crate::memory::{Geometry, Job, Making, Numbers, StorageId};
use crate::now::Time;
use crate::outbox::Class;
use crate::refusals;
use crate::slab::{Key, Slab};
use crate::turn::Turn;

pub use block::SealedContent;
pub(super) use block::Seat;
use block::{
    Attachment, Block, BlockWaiter, Flushing, MoveDue, Phase, Room, about_bytes, check_layout,
};
pub(crate) use content::written_json;
pub use content::{ReadPlan, WritePlan};
use locks::access_for;
pub use record::Found;
use record::record;

/// The key of a block in its pool.
pub type BlockKey = Key<BlockTag>;

/// Marks keys of blocks, which are not generic over connections.
#[derive(Debug)]
pub enum BlockTag {}

/// The blocks of one pool.
#[derive(Default)]
pub(super) struct Blocks {
    blocks: Slab<Block, BlockTag>,
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
    /// The locks of removed blocks for which somebody still waits.
    ended: VecDeque<EndedLock>,
}

/// The lock of a removed block. Its waits end in steps, because there may be very many.
struct EndedLock {
    key: BlockKey,
    lock: Lock,
    refusal: Refusal,
    goes_on: Time,
}

impl Blocks {
    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn at(&self, key: BlockKey) -> Option<&Block> {
        self.blocks.at(key)
    }

    fn at_mut(&mut self, key: BlockKey) -> Option<&mut Block> {
        self.blocks.at_mut(key)
    }

    /// The next deadline; it may be too early, but never too late.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        let ended = self.ended.front().map(|ended| ended.goes_on);
        ended.or_else(|| self.deadlines.first().map(|(at, _)| *at))
    }

    /// Whether somebody still waits for a lock of a removed block.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// A block's lock may have a new deadline.
    fn note_deadline(&mut self, key: BlockKey) {
        let Some(block) = self.blocks.at_mut(key) else {
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
        if let Some(block) = self.blocks.at_mut(key) {
            block.involved.insert(member);
            self.uses.insert((member, key));
        }
    }

    /// The blocks that a member uses.
    fn uses_of(&self, member: MemberKey) -> Vec<BlockKey> {
        let own = self.uses.range((member, BlockKey::new(0, 0))..);
        let own = own.take_while(|(user, _)| *user == member);
        own.map(|(_, key)| *key).collect()
    }

    /// A member leaves: forgets that it uses a block, and returns the block.
    fn take_use(&mut self, member: MemberKey) -> Option<BlockKey> {
        let mut own = self.uses.range((member, BlockKey::new(0, 0))..);
        let used = *own.next().filter(|(user, _)| *user == member)?;
        self.uses.remove(&used);
        Some(used.1)
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

    /// An existing block.
    fn find(&self, id: &BlockId, pool: &PoolInfo) -> Result<(BlockKey, &Block), Refusal> {
        let key = self.by_id.get(id);
        let found = key.and_then(|&key| Some((key, self.at(key)?)));
        match found {
            Some((key, block)) if !matches!(block.phase, Phase::New) => Ok((key, block)),
            _ => {
                self.check_left_out(id, pool)?;
                Err(refusals::no_block(id, &pool.name))
            }
        }
    }

    fn check_left_out(&self, id: &BlockId, pool: &PoolInfo) -> Result<(), Refusal> {
        match self.left_out.get(id) {
            None => Ok(()),
            Some(why) => Err(refusals::block_left_out(id, &pool.name, why)),
        }
    }

    /// A block that an app has this access to at any time, not only during a call.
    fn allowed_by_name(
        &self,
        who: Claimant<'_>,
        id: &BlockId,
        access: Access,
        pool: &PoolInfo,
    ) -> Result<(BlockKey, &Block), Refusal> {
        let (key, block) = self.find(id, pool)?;
        if block.allows_app(who) >= Some(access) {
            return Ok((key, block));
        }
        Err(block.forbidden(who, access, &pool.name))
    }

    fn sealed_content(&self, uid: [u8; 16], create: &Create) -> Result<SealedContent, Refusal> {
        let mut known = self.blocks.iter();
        let is_same = |block: &Block| block.sealed.is_some_and(|sealed| sealed.uid == uid);
        if known.any(|(_, block)| is_same(block)) {
            return Err(refusals::block_uid_in_use());
        }
        SealedContent::new(uid, create.size).ok_or_else(|| refusals::too_large_to_seal(create.size))
    }

    /// Whether the pool's blocks may take so many bytes more.
    fn check_room(&self, more: u64, pool: &PoolInfo) -> Result<(), Refusal> {
        let max = pool.limits.memory_bytes_per_pool_max;
        let free = max.saturating_sub(self.bytes);
        if more <= free {
            return Ok(());
        }
        Err(refusals::no_room_for_block(more, free, max, &pool.name))
    }

    fn insert(&mut self, block: Block) -> BlockKey {
        self.bytes += block.total();
        let id = block.id.clone();
        let key = self.blocks.insert(block);
        self.by_id.insert(id, key);
        key
    }

    /// Releases a block's reservations.
    fn forget<D: Driver>(&mut self, key: BlockKey, pool: &PoolInfo, turn: &mut Turn<'_, D>) {
        let Some(block) = self.blocks.remove(key) else {
            return;
        };
        self.by_id.remove(&block.id);
        self.bytes -= block.total();
        if let Phase::Moving { geometry, .. } = &block.phase {
            self.bytes -= geometry.total().expect("checked when it was asked for");
        }
        block.due.map(|at| self.deadlines.remove(&(at, key)));
        turn.with_numbers(|numbers| {
            numbers.forget_process(&pool.name, &block.id, block.generation)
        });
        for member in block.involved {
            self.uses.remove(&(member, key));
        }
        turn.count_held(&pool.name, pool.number, -1);
    }

    fn counts(&self) -> BlockCounts {
        let ended = self.ended.iter().map(|ended| ended.lock.waiting() as u64);
        let mut counts = BlockCounts {
            waits: ended.sum(),
            ..BlockCounts::default()
        };
        for (_, block) in self.blocks.iter() {
            let waits = block.lock.waiting() + block.waiting.len() + block.flushing.len();
            counts.waits += waits as u64;
            let own = block.attachments.iter().filter(|a| a.own.is_some());
            counts.attachments += own.count() as u64;
            counts.subscriptions += block.subscribers.len() as u64;
            counts.about_bytes += block.about.amount();
            counts.locks += block.lock.holders().len() as u64;
            let lent = block.attachments.iter().map(|a| u64::from(a.calls()));
            counts.loans += lent.sum::<u64>();
        }
        counts
    }

    /// Checks the invariants of blocks, which hold between any two inputs; for the simulator and
    /// tests.
    pub(super) fn check<D: Driver>(&self, members: &Members<D>) {
        assert_eq!(self.by_id.len(), self.blocks.len());
        let mut bytes = 0;
        for (key, block) in self.blocks.iter() {
            assert_eq!(self.by_id.get(&block.id), Some(&key));
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
                let is_member = members.at(member).is_some();
                assert!(is_member, "only members hold blocks");
                let is_found = self.uses.contains(&(member, key));
                assert!(is_found, "its end requires it");
            }
            let due = block.due;
            assert!(due.is_none_or(|at| self.deadlines.contains(&(at, key))));
            let next = block.lock.next_deadline();
            assert!(
                next.is_none_or(|next| due.is_some_and(|due| due <= next)),
                "a deadline would be missed"
            );
            for attachment in &block.attachments {
                assert!(attachment.own.is_some() || attachment.calls() > 0);
            }
            assert!(block.move_due.is_none() || block.lock.is_held_by_server());
        }
        assert_eq!(bytes, self.bytes);
        for (member, id, key, place) in &self.waits {
            let ended = self.ended.iter().find(|ended| ended.key == *key);
            let lock = self.at(*key).map(|block| &block.lock);
            let lock = lock.or(ended.map(|ended| &ended.lock));
            let lock = lock.expect("a wait is of a block");
            assert!(lock.waits(*member, id, *place), "a wait that ended");
        }
    }
}

/// The blocks of a pool, with the members to answer and to notify.
pub struct PoolBlocks<'a, D: Driver> {
    pub(super) blocks: &'a mut Blocks,
    pub(super) members: &'a Members<D>,
    pub(super) info: &'a PoolInfo,
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

impl<D: Driver> PoolBlocks<'_, D> {
    /// A reservation for a request that waits.
    fn seat(&self, asking: Asking<'_>) -> Result<Seat, Refusal> {
        let asker = self.asker(asking.member)?;
        Seat::new(asker.peer.link().account(), asking.id)
    }

    fn asker(&self, member: MemberKey) -> Result<&Member<D>, Refusal> {
        self.members.asker(member, &self.info.name)
    }

    /// Counts the blocks' entries in the ledger; for the simulator.
    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        self.blocks.counts()
    }

    /// A block of an earlier run is not restored, for the reason `why`. Its name and pool are kept
    /// for it.
    pub fn reserve_name(&mut self, id: &BlockId, why: &str, turn: &mut Turn<'_, D>) {
        let known = self.blocks.left_out.insert(id.clone(), why.into());
        if known.is_none() {
            turn.count_held(&self.info.name, self.info.number, 1);
        }
    }

    /// A block to which `member` has this access.
    fn allowed(
        &self,
        member: MemberKey,
        id: &BlockId,
        access: Access,
    ) -> Result<(BlockKey, &Block), Refusal> {
        let who = self.asker(member)?.claimant();
        let (key, block) = self.blocks.find(id, self.info)?;
        if block.allows(who, member) >= Some(access) {
            return Ok((key, block));
        }
        Err(block.forbidden(who, access, &self.info.name))
    }

    /// A block that `member`'s app has this access to at any time, not only during a call.
    fn allowed_by_name(
        &self,
        member: MemberKey,
        id: &BlockId,
        access: Access,
    ) -> Result<(BlockKey, &Block), Refusal> {
        let who = self.asker(member)?.claimant();
        self.blocks.allowed_by_name(who, id, access, self.info)
    }

    /// Whether a call lends `member` a block now.
    pub fn is_lent(&self, member: MemberKey, id: &BlockId) -> bool {
        let block = self.blocks.find(id, self.info);
        let attachment = block.ok().and_then(|(_, block)| block.attachment(member));
        attachment.is_some_and(|attachment| attachment.calls() > 0)
    }
}

/// What the ledger counts for a pool's blocks, in addition to their bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct BlockCounts {
    /// Requests that wait.
    pub waits: u64,
    /// Bytes of what is stored about the blocks.
    pub about_bytes: u64,
    /// Explicit attachments.
    pub attachments: u64,
    /// Subscriptions to changes.
    pub subscriptions: u64,
    /// Locks that are held.
    pub locks: u64,
    /// Blocks that calls in flight lend to their handlers, counted by call.
    pub loans: u64,
}

/// About how many bytes of memory one hold of a lock takes.
const LOCK_BYTES: u64 = 96;

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

fn check_size(geometry: Geometry, limits: &Limits) -> Result<u64, Refusal> {
    let total = geometry.total();
    match total {
        Some(total) if geometry.size <= limits.block_bytes_max => Ok(total),
        _ => Err(refusals::block_too_large(
            limits.block_bytes_max,
            geometry.size,
        )),
    }
}
