//! Blocks for the tests.

#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(
    clippy::unwrap_used,
    reason = "these are tests, though no test functions"
)]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use latzero_shm::{Access, Attachment, Custodian, Description, Expected, Geometry};
use tempfile::TempDir;

/// A description with these sizes.
pub(crate) fn description(size: u64, slots: u32, is_persistent: bool) -> Description {
    Description {
        block_id: [7; 16],
        pool_id: [9; 16],
        generation: 3,
        geometry: if is_persistent {
            Geometry::with_spares(size, slots).unwrap()
        } else {
            Geometry::new(size, slots).unwrap()
        },
        is_persistent,
        created_unix_ns: 1_800_000_000_000_000_000,
    }
}

/// Creates a block of either kind; also returns the directory of its file.
pub(crate) fn block(size: u64, slots: u32, is_persistent: bool) -> (Custodian, Option<TempDir>) {
    let description = description(size, slots, is_persistent);
    if is_persistent {
        let directory = tempfile::tempdir().unwrap();
        let open = File::open(directory.path()).unwrap();
        let block = Custodian::create_persistent(open.as_fd(), "block", &description).unwrap();
        (block, Some(directory))
    } else {
        (
            Custodian::create_shared("lz:test", &description).unwrap(),
            None,
        )
    }
}

/// The properties that a client is given for the block.
pub(crate) fn expected(block: &Custodian, access: Access) -> Expected {
    let description = block.description();
    Expected {
        generation: description.generation,
        geometry: description.geometry,
        is_persistent: description.is_persistent,
        access,
    }
}

/// The descriptor that a client gets.
pub(crate) fn descriptor(block: &Custodian, access: Access) -> OwnedFd {
    match access {
        Access::Write => block.lend(Access::Write).unwrap().try_clone().unwrap(),
        Access::Read => block.lend(Access::Read).unwrap().try_clone().unwrap(),
    }
}

/// Attaches the block.
pub(crate) fn attach(block: &Custodian, access: Access) -> Arc<Attachment> {
    Arc::new(Attachment::new(descriptor(block, access), &expected(block, access)).unwrap())
}
