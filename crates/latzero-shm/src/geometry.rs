//! The layout of a block's file: the header page, then one or more slots of whole pages.

use thiserror::Error;

use crate::format::HEADER_BYTES;

/// Slots begin at multiples of this many bytes.
const PAGE: u64 = 4096;

/// Most slots in which the versions of a block rotate.
pub(crate) const SLOTS_MAX: u32 = 4;

/// Spare slots in the file of a persistent block: one for the version that is known to be on disk,
/// and one for the version that is being flushed.
pub const SPARES: u32 = 2;

/// Most slots of a block, including spare ones.
pub(crate) const ALL_SLOTS_MAX: u32 = SLOTS_MAX + SPARES;

/// Largest version of a block in bytes: 2^40.
const SIZE_MAX: u64 = 1 << 40;

/// The error for sizes that no block can have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "a block has at most {SIZE_MAX} bytes and 1 to {SLOTS_MAX} slots, not {size} bytes and \
    {slots} slots"
)]
pub struct GeometryError {
    size: u64,
    slots: u32,
}

/// The geometry of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one version.
    pub size: u64,
    /// Number of slots: how many versions fit; a block with 1 is written in place.
    pub slots: u32,
    /// Number of spare slots, so that the version on disk is not overwritten: [`SPARES`] or none.
    pub spares: u32,
    /// Where the first slot begins, in bytes.
    pub slot_offset: u64,
    /// The distance from one slot to the next, in bytes.
    pub slot_stride: u64,
}

impl Geometry {
    /// The geometry of a block of `size` bytes with `slots` slots.
    ///
    /// # Errors
    /// If no block can be so.
    pub fn new(size: u64, slots: u32) -> Result<Geometry, GeometryError> {
        if size > SIZE_MAX || slots == 0 || slots > SLOTS_MAX {
            return Err(GeometryError { size, slots });
        }
        Ok(Geometry {
            size,
            slots,
            spares: 0,
            slot_offset: HEADER_BYTES,
            slot_stride: size.div_ceil(PAGE) * PAGE,
        })
    }

    /// As [`Geometry::new`], with room for the version on the disk: the geometry of a persistent
    /// block.
    ///
    /// # Errors
    /// If no block can be so.
    pub fn with_spares(size: u64, slots: u32) -> Result<Geometry, GeometryError> {
        let geometry = Geometry::new(size, slots)?;
        Ok(Geometry {
            spares: SPARES,
            ..geometry
        })
    }

    /// Number of all slots, including spare ones.
    pub(crate) fn all_slots(&self) -> u32 {
        self.slots + self.spares
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.slot_offset + self.slot_stride * u64::from(self.all_slots())
    }

    /// Whether the block is written in place.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.slots == 1
    }

    /// The offset of a slot in the file.
    pub(crate) fn slot(&self, slot: u32) -> u64 {
        self.slot_offset + self.slot_stride * u64::from(slot)
    }

    /// Whether `length` bytes from `offset` on lie within a version.
    #[must_use]
    pub fn contains(&self, offset: u64, length: usize) -> bool {
        self.contains_range(offset, length as u64)
    }

    pub(crate) fn contains_range(&self, offset: u64, length: u64) -> bool {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= self.size)
    }
}
