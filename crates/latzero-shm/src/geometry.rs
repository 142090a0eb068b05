//! How the bytes of a block lie: the header's page, then one slot or several, each of whole pages.

use thiserror::Error;

use crate::format::HEADER_BYTES;

/// Slots begin at multiples of this many bytes.
const PAGE: u64 = 4096;

/// Most slots of a block.
pub(crate) const SLOTS_MAX: u32 = 4;

/// Largest version of a block in bytes: 2^40.
const SIZE_MAX: u64 = 1 << 40;

/// Sizes that no block can have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a block has 1 to {SIZE_MAX} bytes and 1 to {SLOTS_MAX} slots, not {size} and {slots}")]
pub struct GeometryError {
    size: u64,
    slots: u32,
}

/// How the bytes of a block lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one version.
    pub size: u64,
    /// How many versions there is room for; 1 is written in place.
    pub slots: u32,
    /// Where the first slot begins, in bytes.
    pub slot_offset: u64,
    /// From one slot's begin to the next one's, in bytes.
    pub slot_stride: u64,
}

impl Geometry {
    /// The geometry of a block of `size` bytes with `slots` slots.
    ///
    /// # Errors
    /// Where no block can be so.
    pub fn new(size: u64, slots: u32) -> Result<Geometry, GeometryError> {
        if size == 0 || size > SIZE_MAX || slots == 0 || slots > SLOTS_MAX {
            return Err(GeometryError { size, slots });
        }
        Ok(Geometry {
            size,
            slots,
            slot_offset: HEADER_BYTES,
            slot_stride: size.div_ceil(PAGE) * PAGE,
        })
    }

    /// Bytes of the whole file.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.slot_offset + self.slot_stride * u64::from(self.slots)
    }

    /// Whether the block is written in place.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.slots == 1
    }

    /// Where a slot's bytes begin in the file.
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
