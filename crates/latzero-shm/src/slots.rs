//! Publishing and reading versions: the one algorithm, on whatever [`Memory`].
//!
//! A writer fills the slot after the newest version's, and then points the head at it; a reader copies the slot that the head
//! points at and looks whether it was touched meanwhile (a sequence lock, as in Boehm, "Can seqlocks get along with
//! programming language memory models?", MSPC 2012). With two slots or more a writer that dies leaves the newest version as
//! it was, and the next one begins the slot again. One slot is written in place, and read without looking: its users
//! take a lock.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::format::{Geometry, at};
use crate::memory::{Fault, Memory};

/// How often, and for how long, a reader begins again before it says that the block is contended.
const TRIES: u32 = 64;
const PATIENCE: Duration = Duration::from_millis(50);

/// Versions stay below this: a writer at a million versions a second gets there in two thousand years.
const VERSION_MAX: u64 = (1 << 56) - 1;

/// Why a read failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The bytes lie outside the block.
    #[error("these bytes lie outside the block")]
    OutOfRange,
    /// The block has another version than the one wanted.
    #[error("the block has version {0}")]
    Version(u64),
    /// No whole version could be had because writers were too busy.
    #[error("the block is written so often that no whole version could be had")]
    Contended,
    /// The memory or file is not what it should be.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Why a write failed. Readers see the version from before.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The bytes lie outside the block.
    #[error("these bytes lie outside the block")]
    OutOfRange,
    /// The block has another version than the one expected.
    #[error("the block has version {current}")]
    Conflict {
        /// The version that it has.
        current: u64,
    },
    /// What stands there could not be read.
    #[error("the block is written so often that no whole version could be had")]
    Contended,
    /// The lock under which this was written is held no longer.
    #[error("the lock under which this was written is held no longer")]
    LeaseLost,
    /// The block was attached for reading alone.
    #[error("the block was attached for reading alone")]
    ReadOnly,
    /// The memory or file is not what it should be.
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl From<ReadError> for WriteError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::OutOfRange => WriteError::OutOfRange,
            ReadError::Version(current) => WriteError::Conflict { current },
            ReadError::Contended => WriteError::Contended,
            ReadError::Fault(fault) => WriteError::Fault(fault),
        }
    }
}

/// The newest version and its slot; version 0 was never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The version.
    pub version: u64,
    /// The slot that holds it.
    pub slot: u32,
}

/// Loads the head.
///
/// # Errors
/// Where it names a slot that the block does not have.
pub fn head<M: Memory>(memory: &M, geometry: &Geometry) -> Result<Head, Fault> {
    let word = memory.load(at::HEAD, Acquire)?;
    let head = Head {
        version: word >> 8,
        slot: (word & 0xff) as u32,
    };
    if head.version > 0 && head.slot >= geometry.slots || head.version >= VERSION_MAX {
        return Err(Fault::Corrupt("head"));
    }
    Ok(head)
}

/// Reads bytes of the newest version, from `offset` on; returns the version.
///
/// # Errors
/// As [`ReadError`] says.
pub fn read<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    offset: u64,
    to: &mut [u8],
) -> Result<u64, ReadError> {
    if !geometry.contains(offset, to.len()) {
        return Err(ReadError::OutOfRange);
    }
    let mut tries = 0;
    let mut since = None;
    loop {
        let head = head(memory, geometry)?;
        if head.version == 0 {
            to.fill(0);
            // A raw block is written in place before its first version is there.
            if geometry.is_raw() {
                memory.read(geometry.slot(0) + offset, to)?;
            }
            return Ok(0);
        }
        if geometry.is_raw() {
            memory.read(geometry.slot(0) + offset, to)?;
            return Ok(head.version);
        }
        let words = at::slot(head.slot);
        let sequence = memory.load(words + at::SEQUENCE, Acquire)?;
        if sequence & 1 == 0 {
            let version = memory.load(words + at::VERSION, Relaxed)?;
            memory.read(geometry.slot(head.slot) + offset, to)?;
            memory.fence(Acquire);
            if memory.load(words + at::SEQUENCE, Relaxed)? == sequence {
                return Ok(version);
            }
        }
        tries += 1;
        if tries >= TRIES && since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return Err(ReadError::Contended);
        }
        memory.relax(tries);
    }
}

/// A version under way. Nobody sees it before it is published; where it is dropped, nobody ever does. Each step is given the
/// memory that the draft was begun on.
#[derive(Debug)]
#[must_use]
pub struct Draft {
    geometry: Geometry,
    slot: u32,
    sequence: u64,
    head: Head,
    /// What was changed against the version before: the first byte and the end.
    changed: Option<(u64, u64)>,
}

/// Begins the next version, with the content of the newest one. There must be one writer at a time.
///
/// # Errors
/// Where the memory or file is not what it should be.
pub fn begin<M: Memory>(memory: &M, geometry: &Geometry) -> Result<Draft, Fault> {
    let head = head(memory, geometry)?;
    let slot = if head.version == 0 {
        0
    } else {
        (head.slot + 1) % geometry.slots
    };
    let words = at::slot(slot);
    // A slot left odd by a writer that died is begun again.
    let sequence = memory.load(words + at::SEQUENCE, Relaxed)? & !1;
    let draft = Draft {
        geometry: *geometry,
        slot,
        sequence,
        head,
        changed: None,
    };
    if !geometry.is_raw() {
        memory.store(words + at::SEQUENCE, sequence.wrapping_add(1), Relaxed)?;
        memory.fence(Release);
        draft.catch_up(memory)?;
    }
    Ok(draft)
}

impl Draft {
    /// Brings the slot from the version that it holds to the newest one, by copying what was changed in between.
    fn catch_up<M: Memory>(&self, memory: &M) -> Result<(), Fault> {
        if self.head.version == 0 {
            // Fresh memory is zeros; what a writer that died left in it is not.
            return match self.sequence {
                0 if memory.load(at::slot(self.slot) + at::CHANGED_TO, Relaxed)? == 0 => Ok(()),
                _ => self.zero(memory),
            };
        }
        let (from, to) = self.lag(memory)?;
        if from >= to {
            return Ok(());
        }
        let source = self.geometry.slot(self.head.slot);
        let target = self.geometry.slot(self.slot);
        memory.copy(source + from, target + from, to - from)
    }

    /// Which bytes of the slot are older than the newest version; all of them where that can't be told.
    fn lag<M: Memory>(&self, memory: &M) -> Result<(u64, u64), Fault> {
        let all = (0, self.geometry.size);
        let words = at::slot(self.slot);
        // Marked as unknown while it is written, so that the next one after a writer's death copies all.
        let holds = memory.load(words + at::VERSION, Relaxed)?;
        memory.store(words + at::VERSION, u64::MAX, Relaxed)?;
        if holds == u64::MAX || holds >= self.head.version {
            return Ok(all);
        }
        let mut lag: Option<(u64, u64)> = None;
        // A slot that was never written holds zeros, which is version 0.
        let mut missing = self.head.version - holds;
        if missing >= u64::from(self.geometry.slots) {
            return Ok(all);
        }
        let mut slot = self.head.slot;
        let mut version = self.head.version;
        while missing > 0 {
            let words = at::slot(slot);
            if memory.load(words + at::VERSION, Relaxed)? != version {
                return Ok(all);
            }
            let from = memory.load(words + at::CHANGED_FROM, Relaxed)?;
            let to = memory.load(words + at::CHANGED_TO, Relaxed)?;
            if from > to || to > self.geometry.size {
                return Ok(all);
            }
            lag = Some(lag.map_or((from, to), |(a, b)| union((a, b), (from, to))));
            missing -= 1;
            version -= 1;
            slot = (slot + self.geometry.slots - 1) % self.geometry.slots;
        }
        Ok(lag.unwrap_or((0, 0)))
    }

    fn zero<M: Memory>(&self, memory: &M) -> Result<(), Fault> {
        let zeros = vec![0; usize::try_from(self.geometry.size.min(64 * 1024)).expect("bounded")];
        let mut done = 0;
        while done < self.geometry.size {
            let n = (self.geometry.size - done).min(zeros.len() as u64);
            let start = self.geometry.slot(self.slot) + done;
            memory.write(start, &zeros[..usize::try_from(n).expect("bounded")])?;
            done += n;
        }
        Ok(())
    }

    /// The version that this will be.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.head.version + 1
    }

    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn write<M: Memory>(
        &mut self,
        memory: &M,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), WriteError> {
        if !self.geometry.contains(offset, bytes.len()) {
            return Err(WriteError::OutOfRange);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let range = (offset, offset + bytes.len() as u64);
        let changed = self.changed.map_or(range, |before| union(before, range));
        if self.changed != Some(changed) && self.head.version == 0 && !self.geometry.is_raw() {
            // So that a first version whose writer dies is known not to be zeros.
            memory.store(at::slot(self.slot) + at::CHANGED_TO, changed.1, Relaxed)?;
        }
        self.changed = Some(changed);
        memory.write(self.geometry.slot(self.slot) + offset, bytes)?;
        Ok(())
    }

    /// Reads bytes of this version.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read<M: Memory>(&self, memory: &M, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        if !self.geometry.contains(offset, to.len()) {
            return Err(ReadError::OutOfRange);
        }
        memory.read(self.geometry.slot(self.slot) + offset, to)?;
        Ok(())
    }

    /// Lets readers see it. `stamp` is kept beside it: the fence it was written under, and the time.
    ///
    /// # Errors
    /// Where the memory or file is not what it should be.
    pub fn publish<M: Memory>(self, memory: &M, stamp: Stamp) -> Result<u64, Fault> {
        let version = self.version();
        self.publish_as(memory, version, stamp)
    }

    /// As [`Draft::publish`], under a version of one's own choice.
    ///
    /// # Errors
    /// As [`Draft::publish`].
    pub(crate) fn publish_as<M: Memory>(
        self,
        memory: &M,
        version: u64,
        stamp: Stamp,
    ) -> Result<u64, Fault> {
        let words = at::slot(self.slot);
        let (from, to) = self.changed.unwrap_or((0, 0));
        let checksum = if stamp.with_checksum {
            self.checksum(memory, version)?
        } else {
            0
        };
        for (place, word) in [
            (at::VERSION, version),
            (at::LENGTH, self.geometry.size),
            (at::SLOT_FENCE, stamp.fence),
            (at::TIME, stamp.unix_ns),
            (at::CHECKSUM, u64::from(checksum)),
            (at::CHANGED_FROM, from),
            (at::CHANGED_TO, to),
        ] {
            memory.store(words + place, word, Relaxed)?;
        }
        memory.store(words + at::SEQUENCE, self.sequence.wrapping_add(2), Release)?;
        memory.store(at::HEAD, version << 8 | u64::from(self.slot), Release)?;
        memory.notify(at::NOTIFY)?;
        Ok(version)
    }

    fn checksum<M: Memory>(&self, memory: &M, version: u64) -> Result<u32, Fault> {
        content_checksum(memory, &self.geometry, self.slot, version)
    }
}

/// The checksum of a slot's version, size and content (CRC-32C).
///
/// # Errors
/// Where it can't be read.
pub fn content_checksum<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    slot: u32,
    version: u64,
) -> Result<u32, Fault> {
    let mut sum = crc32c::crc32c(&version.to_le_bytes());
    sum = crc32c::crc32c_append(sum, &geometry.size.to_le_bytes());
    let mut piece = vec![0; usize::try_from(geometry.size.min(128 * 1024)).expect("bounded")];
    let mut done = 0;
    while done < geometry.size {
        let n = usize::try_from((geometry.size - done).min(piece.len() as u64)).expect("bounded");
        memory.read(geometry.slot(slot) + done, &mut piece[..n])?;
        sum = crc32c::crc32c_append(sum, &piece[..n]);
        done += n as u64;
    }
    Ok(sum)
}

/// What is kept beside a version.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stamp {
    /// The fence of the lock that it was written under.
    pub fence: u64,
    /// When, in nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Whether its content is summed up, for a block that is to survive the end of the machine. It takes a pass over all of
    /// the content.
    pub with_checksum: bool,
}

fn union(a: (u64, u64), b: (u64, u64)) -> (u64, u64) {
    (a.0.min(b.0), a.1.max(b.1))
}
