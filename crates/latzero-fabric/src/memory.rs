//! Memory blocks, between the core and its driver: geometry, storage, jobs, and numbers that are
//! never reused.

use hashbrown::HashMap;
use latzero_protocol::memory::Kind;
use latzero_protocol::{BlockId, PoolName};

use crate::driver::BlockWrite;
use crate::ledger::Reservation;
use crate::pool::{BlockKey, WritePlan};

/// Bytes before the first slot of a block: its header.
pub const HEADER_BYTES: u64 = 4096;

/// Slots begin at multiples of this many bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Spare slots in the file of a persistent block: one for the version that is known to be on disk,
/// and one for the version that is being flushed.
pub const SPARE_SLOTS: u32 = 2;

/// The geometry of a block's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size of one version in bytes.
    pub size: u64,
    /// Number of slots: how many versions fit.
    pub slots: u32,
    /// Number of spare slots: [`SPARE_SLOTS`] for a persistent block, 0 for a shared one or a file
    /// of an older server.
    pub spares: u32,
}

impl Geometry {
    /// The geometry of a block of this kind.
    #[must_use]
    pub fn new(kind: Kind, size: u64, slots: u32) -> Geometry {
        let spares = match kind {
            Kind::Shared => 0,
            Kind::Persistent => SPARE_SLOTS,
        };
        Geometry {
            size,
            slots,
            spares,
        }
    }

    /// The distance from one slot to the next, in bytes.
    #[must_use]
    pub fn stride(self) -> u64 {
        self.size.div_ceil(PAGE_BYTES) * PAGE_BYTES
    }

    /// The total size in bytes, including the header; `None` if it overflows.
    #[must_use]
    pub fn total(self) -> Option<u64> {
        let stride = self.size.checked_next_multiple_of(PAGE_BYTES)?;
        stride
            .checked_mul(u64::from(self.slots) + u64::from(self.spares))?
            .checked_add(HEADER_BYTES)
    }
}

/// The memory or file of one generation of a block, as the driver knows it. No two share a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorageId(pub u64);

/// A new version of a block, for a subscriber. A newer one replaces it while it waits.
#[derive(Debug, Clone, Copy)]
pub struct VersionNotice<'a> {
    /// Identifies the block: the pool's number and the block's index.
    pub topic: (u32, u32),
    /// The pool.
    pub pool: &'a PoolName,
    /// The block.
    pub block: &'a BlockId,
    /// The version.
    pub version: u64,
    /// The generation.
    pub generation: u64,
}

impl VersionNotice<'_> {
    /// The event as JSON text.
    #[must_use]
    pub fn to_json(&self) -> String {
        format!(
            "{{\"action\":\"event\",\"event\":\"block_changed\",\"pool\":\"{}\",\
             \"block_id\":\"{}\",\"version\":{},\"generation\":{}}}",
            self.pool, self.block, self.version, self.generation
        )
    }
}

/// Storage to create.
#[derive(Debug, Clone)]
pub struct Making {
    /// Its number.
    pub storage: StorageId,
    /// The pool, and the block in it.
    pub pool: PoolName,
    /// The block.
    pub block: BlockId,
    /// Memory or file.
    pub kind: Kind,
    /// Its sizes.
    pub geometry: Geometry,
    /// The block's generation.
    pub generation: u64,
    /// The source of its initial content.
    pub from: Option<StorageId>,
    /// The record that restores the block after a restart, as JSON text.
    pub record: String,
}

/// How many bytes of a block's newest version a loop copies for one write. A write that copies more
/// is a job.
pub const COPIED_MAX: u64 = 1024 * 1024;

/// A write that is a job. Its connection waits for it, so that there is one for each at most.
#[derive(Debug)]
pub struct SlowWrite<P> {
    pub(crate) plan: WritePlan,
    pub(crate) peer: P,
    /// The id of the request.
    pub(crate) id: Option<Box<str>>,
    pub(crate) offset: u64,
    pub(crate) data: Box<[u8]>,
    pub(crate) if_version: Option<u64>,
    pub(crate) expected: Option<Box<[u8]>>,
    /// The reservation of its bytes.
    pub(crate) memory: Reservation,
}

impl<P> SlowWrite<P> {
    /// In which storage.
    #[must_use]
    pub fn storage(&self) -> StorageId {
        self.plan.storage
    }

    /// What to write, whatever has to be copied.
    #[must_use]
    pub fn write(&self) -> BlockWrite<'_> {
        BlockWrite {
            offset: self.offset,
            data: &self.data,
            if_version: self.if_version,
            expected: self.expected.as_deref(),
            copied_max: u64::MAX,
        }
    }

    /// Bytes of the request.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.memory.amount()
    }
}

/// A job for the storage of a block. The driver does the jobs once the pool is released, in the
/// order in which they were requested.
#[derive(Debug)]
pub enum Job<P> {
    /// Creates storage; the result is passed to [`crate::PoolBlocks::storage_made`].
    Make {
        /// For this block.
        key: BlockKey,
        /// What to make.
        making: Making,
        /// Nothing is created if the process of this connection has ended, because it can no longer
        /// write.
        unless_dead: Option<P>,
    },
    /// Releases storage: it is no longer used, and its file is deleted.
    Drop {
        /// Which.
        storage: StorageId,
        /// Whether a newer generation replaces it.
        is_superseded: bool,
    },
    /// Flushes everything written so far to disk; the result is passed to
    /// [`crate::PoolBlocks::flushed`].
    Flush {
        /// For this block.
        key: BlockKey,
        /// Which.
        storage: StorageId,
        /// Who requested it.
        ticket: u64,
    },
    /// Writes bytes for a client; the result is passed to [`crate::PoolBlocks::written`]. Writes of
    /// one block are done in the order in which they were requested.
    Write(Box<SlowWrite<P>>),
}

/// How many ended blocks have their last generation remembered individually.
const ENDED_MAX: usize = 4096;

/// Numbers that are never reused: of parked calls, of storage, and of the generations of blocks.
#[derive(Debug, Default)]
pub struct Numbers {
    calls: u64,
    storages: u64,
    /// The last generation of up to [`ENDED_MAX`] ended blocks, and the greatest generation of all
    /// others.
    ended: HashMap<(PoolName, BlockId), u64>,
    ended_floor: u64,
}

impl Numbers {
    /// A number for a parked call, greater than any before it.
    pub fn next_call(&mut self) -> u64 {
        self.calls = self.calls.saturating_add(1);
        self.calls
    }

    /// Continues after `number`, which an earlier run used.
    pub fn count_on_after(&mut self, number: u64) {
        self.calls = self.calls.max(number);
    }

    /// A number for new storage.
    pub fn next_storage(&mut self) -> StorageId {
        self.storages += 1;
        StorageId(self.storages)
    }

    /// The first generation of a new block, so that a client of an earlier block with that name
    /// does not confuse the two.
    #[must_use]
    pub fn first_generation(&self, pool: &PoolName, block: &BlockId) -> u64 {
        let name = (pool.clone(), block.clone());
        let ended = self.ended.get(&name).copied().unwrap_or(0);
        ended.max(self.ended_floor) + 1
    }

    /// Remembers that a block ended in this generation.
    pub fn forget_process(&mut self, pool: &PoolName, block: &BlockId, generation: u64) {
        if self.ended.len() >= ENDED_MAX {
            let newest = self.ended.drain().map(|(_, generation)| generation).max();
            self.ended_floor = self.ended_floor.max(newest.unwrap_or(0));
        }
        let ended = self.ended.entry((pool.clone(), block.clone()));
        let ended = ended.or_default();
        *ended = generation.max(*ended);
    }

    /// Records the greatest generation of the ended blocks of earlier runs.
    pub fn set_ended_floor(&mut self, generation: u64) {
        self.ended_floor = self.ended_floor.max(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_name_gets_a_later_generation() {
        let mut numbers = Numbers::default();
        let (p, b) = (PoolName::new("p").unwrap(), |n: usize| {
            BlockId::new(&format!("b{n}")).unwrap()
        });
        assert_eq!(numbers.first_generation(&p, &b(0)), 1);
        numbers.forget_process(&p, &b(0), 3);
        assert_eq!(numbers.first_generation(&p, &b(0)), 4);
        assert_eq!(numbers.first_generation(&p, &b(1)), 1);
        // However many there are.
        (1..=ENDED_MAX).for_each(|n| numbers.forget_process(&p, &b(n), 1));
        assert!(numbers.ended.len() <= ENDED_MAX);
        assert_eq!(numbers.first_generation(&p, &b(0)), 4);
        numbers.set_ended_floor(9);
        assert_eq!(numbers.first_generation(&p, &b(7)), 10);
    }

    #[test]
    fn sizes() {
        let g = |size, slots| Geometry::new(Kind::Shared, size, slots);
        let persistent = Geometry::new(Kind::Persistent, 1, 2);
        assert_eq!(persistent.total(), Some(5 * 4096));
        assert_eq!(g(0, 2).total(), Some(4096));
        assert_eq!(g(1, 2).total(), Some(3 * 4096));
        assert_eq!(g(4096, 1).total(), Some(2 * 4096));
        assert_eq!(g(u64::MAX, 1).total(), None);
        assert_eq!(g(u64::MAX / 2, 4).total(), None);
    }
}
