//! The header of a block: the position of each word, and which words never change.

use thiserror::Error;

use crate::geometry::{Geometry, SPARES};

/// Bytes of the header.
pub const HEADER_BYTES: u64 = 4096;

const MAGIC: &[u8; 8] = b"LZBLOCK1";

/// The layout of a block without spare slots, and with them. A client that supports only the first
/// one must not write the second, because it would overwrite the version on disk.
const LAYOUT: u32 = 1;
const LAYOUT_WITH_SPARES: u32 = 2;

const FLAG_PERSISTENT: u32 = 1 << 1;
const FLAG_RAW: u32 = 1 << 2;

/// Bytes of the constant fields.
pub(crate) const FIXED_BYTES: usize = 128;

/// Positions of the words that change.
pub(crate) mod at {
    /// version << 8 | slot.
    pub(crate) const HEAD: u64 = 128;
    /// 32-bit futex word, one more with each version.
    pub(crate) const NOTIFY: u64 = 256;
    /// 32-bit state, in the upper half of the word at [`NOTIFY`].
    pub(crate) const STATE: u64 = 260;
    /// The fence of the exclusive lock.
    pub(crate) const FENCE: u64 = 384;
    /// 1 while the exclusive lock is held.
    pub(crate) const HELD: u64 = 392;
    /// version << 8 | slot of the flushed version, and of the version that a flush is writing; 0 is
    /// none. Writers do not use either slot. Only blocks with spare slots have these, and the words
    /// of [`MISSED`].
    pub(crate) const FLUSHED: u64 = 400;
    pub(crate) const FLUSHING: u64 = 408;
    /// The machine's boot in which the file was last loaded, as a number.
    pub(crate) const BOOT: u64 = 416;
    /// A word for each slot: which parts of the block changed since the slot's version, a bit for
    /// each of 64 parts.
    pub(crate) const MISSED: u64 = 448;
    const SLOTS: u64 = 512;
    /// The words of slot `slot`.
    pub(crate) fn slot(slot: u32) -> u64 {
        SLOTS + 128 * u64::from(slot)
    }
    pub(crate) const SEQUENCE: u64 = 0;
    pub(crate) const VERSION: u64 = 8;
    pub(crate) const LENGTH: u64 = 16;
    // Between them: the fence at 24, and the time at 32.
    pub(crate) const CHECKSUM: u64 = 40;
    pub(crate) const CHANGED_FROM: u64 = 48;
    pub(crate) const CHANGED_TO: u64 = 56;
}

/// What a client may do with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    Write,
}

/// The state of a block in its header. It is only a hint: the server decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is in use.
    Live = 0,
    /// A newer generation replaces it.
    Superseded = 1,
    /// It was removed.
    Closed = 2,
    /// Its header is no longer valid.
    Corrupt = 3,
}

impl State {
    pub(crate) fn of(word: u32) -> State {
        match word {
            0 => State::Live,
            1 => State::Superseded,
            2 => State::Closed,
            _ => State::Corrupt,
        }
    }
}

/// Why a header is invalid, or not the expected one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HeaderError {
    /// It does not begin like a header.
    #[error("it is not a block: the file does not begin with LZBLOCK1")]
    Magic,
    /// Its layout is not known here.
    #[error("its layout has version {0}, but this program supports 1 and 2; update this program")]
    Version(u32),
    /// Its checksum is wrong.
    #[error("the header's checksum is wrong: the header was overwritten")]
    Checksum,
    /// A field is invalid.
    #[error("the header's {0} is invalid")]
    Field(&'static str),
    /// It is valid, but belongs to another block or generation.
    #[error("the header's {0} is not the expected one")]
    Unexpected(&'static str),
    /// It can't be read.
    #[error("cannot read the header: {0}")]
    Unreadable(String),
}

/// The constant fields of one generation of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The block's id; the same for all its generations.
    pub block_id: [u8; 16],
    /// The id of its pool.
    pub pool_id: [u8; 16],
    /// The generation, from 1 on.
    pub generation: u64,
    /// Its geometry.
    pub geometry: Geometry,
    /// Whether it is persistent.
    pub is_persistent: bool,
    /// When it was created, in nanoseconds since the Unix epoch.
    pub created_unix_ns: u64,
}

impl Description {
    /// The header's first bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; FIXED_BYTES] {
        let mut out = [0; FIXED_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        let g = &self.geometry;
        let mut flags = 0;
        if self.is_persistent {
            flags |= FLAG_PERSISTENT;
        }
        if g.is_raw() {
            flags |= FLAG_RAW;
        }
        put(0, MAGIC);
        let layout = if g.spares == 0 {
            LAYOUT
        } else {
            LAYOUT_WITH_SPARES
        };
        put(8, &layout.to_le_bytes());
        put(12, &4096u32.to_le_bytes());
        put(16, &self.block_id);
        put(32, &self.pool_id);
        put(48, &self.generation.to_le_bytes());
        put(56, &g.total().to_le_bytes());
        put(64, &g.size.to_le_bytes());
        put(72, &g.slot_offset.to_le_bytes());
        put(80, &g.slot_stride.to_le_bytes());
        put(88, &g.slots.to_le_bytes());
        put(92, &flags.to_le_bytes());
        put(96, &self.created_unix_ns.to_le_bytes());
        put(104, &g.spares.to_le_bytes());
        let checksum = crc32c::crc32c(&out[..124]);
        out[124..].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads a header's first bytes. Any bytes may be given.
    ///
    /// # Errors
    /// If they are not a valid header.
    pub fn decode(bytes: &[u8]) -> Result<Description, HeaderError> {
        let bytes: &[u8; FIXED_BYTES] = bytes
            .get(..FIXED_BYTES)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(HeaderError::Magic)?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if &bytes[..8] != MAGIC {
            return Err(HeaderError::Magic);
        }
        if half(8) != LAYOUT && half(8) != LAYOUT_WITH_SPARES {
            return Err(HeaderError::Version(half(8)));
        }
        if half(124) != crc32c::crc32c(&bytes[..124]) {
            return Err(HeaderError::Checksum);
        }
        let geometry = match half(8) {
            LAYOUT => Geometry::new(word(64), half(88)),
            _ => Geometry::with_spares(word(64), half(88)),
        };
        let geometry = geometry.map_err(|_| HeaderError::Field("size"))?;
        let checks = [
            (u64::from(half(12)) == HEADER_BYTES, "length"),
            (word(56) == geometry.total(), "total length"),
            (word(72) == geometry.slot_offset, "slot offset"),
            (word(80) == geometry.slot_stride, "slot stride"),
            ((half(92) & FLAG_RAW != 0) == geometry.is_raw(), "flags"),
            (word(48) > 0, "generation"),
            (
                half(8) == LAYOUT || half(104) == SPARES,
                "number of spare slots",
            ),
        ];
        if let Some((_, name)) = checks.iter().find(|(holds, _)| !holds) {
            return Err(HeaderError::Field(name));
        }
        Ok(Description {
            block_id: bytes[16..32].try_into().expect("16 bytes"),
            pool_id: bytes[32..48].try_into().expect("16 bytes"),
            generation: word(48),
            geometry,
            is_persistent: half(92) & FLAG_PERSISTENT != 0,
            created_unix_ns: word(96),
        })
    }
}
