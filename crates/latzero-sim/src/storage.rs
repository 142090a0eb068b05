//! The bytes of blocks in the simulated world: plain vectors. Block operations complete at once or
//! when the test says so.

use std::collections::{BTreeMap, VecDeque};

use latzero_fabric::memory::{Job, Making, Numbers, StorageId};
use latzero_protocol::memory::Access;
use latzero_protocol::{Code, Refusal};

use crate::line::Line;
use crate::world::PoolHandle;

/// A descriptor that travels with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// The storage that it refers to.
    pub storage: StorageId,
    /// Whether its receiver may write through it.
    pub access: Access,
}

/// One generation of a block.
#[derive(Debug, Clone)]
pub struct StoredBlock {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its version.
    pub version: u64,
    /// The fence that a writer must present.
    pub fence: u64,
}

/// All storage of the world, and the jobs that wait.
#[derive(Debug)]
pub struct Storages {
    pub(crate) stored: BTreeMap<StorageId, StoredBlock>,
    pub(crate) numbers: Numbers,
    pub(crate) waiting: VecDeque<(PoolHandle, Job<Line>)>,
    /// Jobs wait until they are released.
    pub(crate) is_holding: bool,
    /// A write that leaves more than this many bytes of its block as they are is a job.
    pub(crate) copied_max: u64,
    /// Creating storage fails from now on.
    pub(crate) is_full: bool,
    /// Records of persistent blocks, as on a disk.
    pub(crate) records: BTreeMap<StorageId, String>,
}

impl Default for Storages {
    fn default() -> Storages {
        Storages {
            stored: BTreeMap::new(),
            numbers: Numbers::default(),
            waiting: VecDeque::new(),
            is_holding: false,
            copied_max: u64::MAX,
            is_full: false,
            records: BTreeMap::new(),
        }
    }
}

impl Storages {
    /// The number of storages.
    #[must_use]
    pub fn count(&self) -> usize {
        self.stored.len()
    }

    /// Whether there is no storage.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.records.is_empty()
    }

    pub(crate) fn make(&mut self, making: &Making) -> Result<(), Refusal> {
        if self.is_full {
            return Err(Refusal::new(Code::Storage, "no memory is left"));
        }
        let size = usize::try_from(making.geometry.size).expect("simulated blocks are small");
        let from = making.from.and_then(|from| self.stored.get(&from));
        let mut bytes = from.map_or_else(Vec::new, |from| from.bytes.clone());
        bytes.resize(size, 0);
        let stored = StoredBlock {
            bytes,
            version: from.map_or(0, |from| from.version),
            fence: 0,
        };
        assert!(
            self.stored.insert(making.storage, stored).is_none(),
            "storage is created once"
        );
        if making.kind == latzero_protocol::memory::Kind::Persistent {
            self.records.insert(making.storage, making.record.clone());
        }
        Ok(())
    }

    pub(crate) fn drop_storage(&mut self, storage: StorageId) {
        assert!(
            self.stored.remove(&storage).is_some(),
            "storage is dropped once"
        );
        self.records.remove(&storage);
    }

    pub(crate) fn descriptor(&self, storage: StorageId, access: Access) -> Option<Descriptor> {
        let is_there = self.stored.contains_key(&storage);
        is_there.then_some(Descriptor { storage, access })
    }

    /// The range of a write, if the block contains it and has the expected version.
    pub(crate) fn write_range(
        &mut self,
        storage: StorageId,
        offset: u64,
        length: usize,
        if_version: Option<u64>,
    ) -> Result<(&mut StoredBlock, std::ops::Range<usize>), Refusal> {
        let stored = self
            .stored
            .get_mut(&storage)
            .expect("a pool refers to existing storage");
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start
            .checked_add(length)
            .filter(|&end| end <= stored.bytes.len());
        let Some(end) = end else {
            return Err(Refusal::new(Code::OutOfRange, "outside the block"));
        };
        if if_version.is_some_and(|version| version != stored.version) {
            return Err(Refusal::new(
                Code::VersionConflict,
                format!("the block has version {}", stored.version),
            ));
        }
        Ok((stored, start..end))
    }
}
