//! The refusals of requests about the bytes of blocks.

use super::*;

pub(super) fn removed() -> Refusal {
    Refusal::new(Code::NoBlock, "the block was just removed")
}

pub(super) fn stopped() -> Refusal {
    Refusal::new(Code::Draining, "the server stopped; nothing was written")
}

pub(super) fn no_storage(making: &Making, error: &CreateError) -> Refusal {
    Refusal::new(
        Code::Storage,
        format!("cannot create block '{}': {error}", making.block),
    )
}

/// What caused an error: the disk, which may recover, or the block.
pub(super) trait Blame: std::fmt::Display {
    fn is_of_disk(&self) -> bool;
}

impl Blame for latzero_shm::Fault {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::Fault::Io(_))
    }
}

impl Blame for latzero_shm::HeaderError {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::HeaderError::Unreadable(_))
    }
}

impl Blame for latzero_shm::WriteError {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::WriteError::Fault(fault) if fault.is_of_disk())
    }
}

pub(super) fn corrupt(stored: &StoredBlock, error: &impl Blame) -> Refusal {
    tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a block is unusable");
    // The advice must not lose data: a file that cannot be read now may be intact on disk.
    let advice = match error.is_of_disk() {
        true => "check the disk and the kernel log, and restart the server when the disk works",
        false => "restore it from a backup, or remove and recreate it",
    };
    Refusal::new(
        Code::Storage,
        format!(
            "block '{}' of pool '{}' is unusable: {error}; {advice}",
            stored.block, stored.pool
        ),
    )
}

pub(super) fn out_of_range(stored: &StoredBlock) -> Refusal {
    let size = stored.custodian.description().geometry.size;
    Refusal::new(
        Code::OutOfRange,
        format!(
            "the range is outside block '{}', which has {size} bytes; nothing was written",
            stored.block
        ),
    )
}

pub(super) fn conflict(stored: &StoredBlock, current: u64) -> Refusal {
    Refusal::new(
        Code::VersionConflict,
        format!("block '{}' has version {current}", stored.block),
    )
}

pub(super) fn contended(stored: &StoredBlock) -> Refusal {
    Refusal::new(
        Code::Contended,
        format!(
            "block '{}' is written too often to read a consistent version; try again",
            stored.block
        ),
    )
}

pub(super) fn write_error(stored: &StoredBlock, error: latzero_shm::WriteError) -> Refusal {
    use latzero_shm::WriteError;
    match error {
        WriteError::OutOfRange => out_of_range(stored),
        WriteError::Conflict { current } => conflict(stored, current),
        WriteError::Contended => contended(stored),
        other => corrupt(stored, &other),
    }
}
