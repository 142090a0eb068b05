//! Publishes and reads versions: one algorithm for any [`Memory`].
//!
//! A writer fills the slot after that of the newest version, and then points the head at it. A
//! reader copies the slot that the head points at, and checks whether it changed in the meantime (a
//! sequence lock, as in Boehm, "Can seqlocks get along with programming language memory models?",
//! MSPC 2012). A version exists once the head names it, and not before. With two or more slots, a
//! writer that dies leaves the newest version unchanged, and the next writer starts the slot again.
//! A single slot is written in place and read without a check; its users need a lock.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::format::at;
use crate::geometry::{ALL_SLOTS_MAX, Geometry};
use crate::memory::{Fault, Memory};

pub(crate) mod spares;

/// How many times, and for how long, a reader tries again before it reports that the block is
/// contended.
const TRIES: u32 = 64;
const TIMEOUT: Duration = Duration::from_millis(50);

/// How many bytes a reader that must not wait copies before it reports that, and how many times it
/// copies at least.
const UNWAITED_BYTES_MAX: u64 = 4 * 1024 * 1024;
const UNWAITED_TRIES_MIN: u64 = 3;

/// Versions stay below this: a writer with a million versions per second reaches it in two thousand
/// years.
pub(crate) const VERSION_MAX: u64 = (1 << 56) - 1;

/// Set in the word of a slot's checksum if it has one.
pub(crate) const SUMMED: u64 = 1 << 32;

/// The version of a slot whose content belongs to no version.
const SPOILT: u64 = u64::MAX;

/// Why a read failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The bytes lie outside the block.
    #[error("the range is outside the block")]
    OutOfRange,
    /// The block has another version than the one wanted.
    #[error("the block has version {0}")]
    Version(u64),
    /// No consistent version could be read because of frequent writes.
    #[error("the block is written too often to read a consistent version")]
    Contended,
    /// The memory or file is invalid.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Why a write failed. Readers see the previous version.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The bytes lie outside the block.
    #[error("the range is outside the block")]
    OutOfRange,
    /// The block has another version than the one expected.
    #[error("the block has version {current}")]
    Conflict {
        /// The version that it has.
        current: u64,
    },
    /// Another write is in progress: the content could not be read consistently, or this attachment
    /// is writing.
    #[error("another write is in progress; try again later")]
    Contended,
    /// The lock for this write is no longer held.
    #[error("the lock for this write is no longer held")]
    LeaseLost,
    /// The block is attached read-only.
    #[error("the block is attached read-only")]
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

impl Head {
    pub(crate) const NONE: Head = Head {
        version: 0,
        slot: 0,
    };
}

/// How long a reader tries again while writers interfere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// For some milliseconds.
    Wait,
    /// A few times without waiting, because others wait for this thread.
    Hurry,
}

/// Loads the head.
///
/// # Errors
/// If it names a slot that the block does not have.
pub fn head<M: Memory>(memory: &M, geometry: &Geometry) -> Result<Head, Fault> {
    let word = memory.load(at::HEAD, Acquire)?;
    let head = Head {
        version: word >> 8,
        slot: (word & 0xff) as u32,
    };
    let slots = if geometry.is_raw() {
        1
    } else {
        geometry.all_slots()
    };
    if head.version > 0 && head.slot >= slots || head.version >= VERSION_MAX {
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
    wait: Wait,
) -> Result<u64, ReadError> {
    if !geometry.contains(offset, to.len()) {
        return Err(ReadError::OutOfRange);
    }
    let tries_max = match wait {
        Wait::Wait => None,
        Wait::Hurry => {
            let tries = UNWAITED_BYTES_MAX / (to.len() as u64).max(1);
            Some(tries.clamp(UNWAITED_TRIES_MIN, u64::from(TRIES)) as u32)
        }
    };
    consistent(memory, geometry, tries_max, |slot| {
        match slot {
            Some(slot) => memory.read(slot + offset, to)?,
            None => to.fill(0),
        }
        Ok(())
    })
}

/// Calls `copy` with the start of the newest version's slot, or nothing for a version of zeros.
/// Repeats until it was not written in the meantime, at most `tries_max` times or for some
/// milliseconds. Returns the version.
pub(crate) fn consistent<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    tries_max: Option<u32>,
    mut copy: impl FnMut(Option<u64>) -> Result<(), Fault>,
) -> Result<u64, ReadError> {
    let mut tries = 0;
    let mut since = None;
    loop {
        let head = head(memory, geometry)?;
        if geometry.is_raw() {
            // Written in place, so the content exists even before the first version.
            copy(Some(geometry.slot(0)))?;
            return Ok(head.version);
        }
        if head.version == 0 {
            copy(None)?;
            return Ok(0);
        }
        if let Some(sequence) = settled(memory, &head)? {
            copy(Some(geometry.slot(head.slot)))?;
            if is_untouched(memory, head.slot, sequence)? {
                return Ok(head.version);
            }
        }
        tries += 1;
        if tries_max.is_some_and(|max| tries >= max) {
            return Err(ReadError::Contended);
        }
        if tries >= TRIES && since.get_or_insert_with(Instant::now).elapsed() > TIMEOUT {
            return Err(ReadError::Contended);
        }
        // On a busy machine, whoever yields may wait for milliseconds.
        memory.relax(if tries_max.is_some() { 0 } else { tries });
    }
}

/// The sequence number of the head's slot, if that is complete and holds the head's version.
///
/// If the slot holds a later version, the head is about to name it, or never will if its writer
/// died: it is not a version before the head names it.
pub(crate) fn settled<M: Memory>(memory: &M, head: &Head) -> Result<Option<u64>, Fault> {
    let words = at::slot(head.slot);
    let sequence = memory.load(words + at::SEQUENCE, Acquire)?;
    if sequence & 1 == 1 || memory.load(words + at::VERSION, Relaxed)? != head.version {
        return Ok(None);
    }
    Ok(Some(sequence))
}

/// Whether the slot has not been overwritten since [`settled`] returned `sequence`, for everything
/// read since.
pub(crate) fn is_untouched<M: Memory>(memory: &M, slot: u32, sequence: u64) -> Result<bool, Fault> {
    memory.fence(Acquire);
    Ok(memory.load(at::slot(slot) + at::SEQUENCE, Relaxed)? == sequence)
}

/// Maximum number of separate ranges of a slot; further ones are merged with the last one.
const RANGES_MAX: usize = 8;

/// Which bytes of a slot are older than the newest version, in separate ranges. An empty range is
/// none.
#[derive(Debug, Clone, Copy, Default)]
struct Lag([(u64, u64); RANGES_MAX]);

const _: () = assert!(RANGES_MAX >= ALL_SLOTS_MAX as usize);

impl Lag {
    fn all(geometry: &Geometry) -> Lag {
        let mut all = Lag::default();
        all.add((0, geometry.size));
        all
    }

    fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.into_iter().filter(|(from, to)| from < to)
    }

    /// Adds a range; it is merged with the ranges that it touches.
    fn add(&mut self, range: (u64, u64)) {
        if range.0 >= range.1 {
            return;
        }
        let mut joined = range;
        let mut apart = Lag::default();
        let mut n = 0;
        for known in self.ranges() {
            if known.0 <= joined.1 && joined.0 <= known.1 {
                joined = union(known, joined);
            } else {
                apart.0[n] = known;
                n += 1;
            }
        }
        match apart.0.get_mut(n) {
            Some(place) => *place = joined,
            None => apart.0[n - 1] = union(apart.0[n - 1], joined),
        }
        *self = apart;
    }
}

/// A version in progress. No client sees it before it is published, or if it is dropped. Each step
/// gets the memory that the draft was started on.
#[derive(Debug)]
#[must_use]
pub struct Draft {
    geometry: Geometry,
    slot: u32,
    sequence: u64,
    head: Head,
    /// The range that differs from the previous version: the first byte and the end.
    changed: Option<(u64, u64)>,
    /// The parts of the slot that are older than the previous version. They are copied only when
    /// needed: bytes that are overwritten need not be copied first.
    lag: Lag,
}

/// Begins the next version, with the content of the newest one. There must be one writer at a time.
///
/// # Errors
/// If the memory or file is not what it should be.
pub fn begin<M: Memory>(memory: &M, geometry: &Geometry) -> Result<Draft, Fault> {
    let head = head(memory, geometry)?;
    if head.version + 1 >= VERSION_MAX {
        // A writer stored this value; normal writes never reach it.
        return Err(Fault::Corrupt("version"));
    }
    if geometry.spares > 0 && !geometry.is_raw() {
        return spares::begin(memory, geometry, head);
    }
    let slot = if head.version == 0 {
        0
    } else {
        (head.slot + 1) % geometry.slots
    };
    let words = at::slot(slot);
    // A slot that a dead writer left odd is started again.
    let sequence = memory.load(words + at::SEQUENCE, Relaxed)? & !1;
    let mut draft = Draft {
        geometry: *geometry,
        slot,
        sequence,
        head,
        changed: None,
        lag: Lag::default(),
    };
    if !geometry.is_raw() {
        memory.store(words + at::SEQUENCE, sequence.wrapping_add(1), Relaxed)?;
        memory.fence(Release);
        let holds = memory.load(words + at::VERSION, Relaxed)?;
        draft.lag = draft.lag(memory, holds)?;
    }
    Ok(draft)
}

impl Draft {
    /// Brings the outdated parts of the slot up to the newest version.
    fn catch_up<M: Memory>(&mut self, memory: &M) -> Result<(), Fault> {
        let lag = std::mem::take(&mut self.lag);
        if lag.ranges().next().is_none() {
            return Ok(());
        }
        if self.changed.is_some() {
            return lag
                .ranges()
                .try_for_each(|range| self.update_slot(memory, range));
        }
        self.spoil(memory)?;
        lag.ranges()
            .try_for_each(|range| self.update_slot(memory, range))?;
        if self.geometry.spares > 0 {
            // Slots are identified by their versions, so no two may have the same one.
            return Ok(());
        }
        memory.fence(Release);
        memory.store(
            at::slot(self.slot) + at::VERSION,
            self.head.version,
            Relaxed,
        )
    }

    /// Copies a range of the newest version into the slot.
    fn update_slot<M: Memory>(&self, memory: &M, (from, to): (u64, u64)) -> Result<(), Fault> {
        if self.head.version == 0 {
            return self.put(memory, from, to, 0);
        }
        let source = self.geometry.slot(self.head.slot);
        let target = self.geometry.slot(self.slot);
        memory.copy(source + from, target + from, to - from)
    }

    /// Removes a range that is about to be overwritten from the outdated parts.
    fn make_way<M: Memory>(&mut self, memory: &M, (a, b): (u64, u64)) -> Result<(), Fault> {
        for i in 0..self.lag.0.len() {
            let (from, to) = self.lag.0[i];
            self.lag.0[i] = match (a <= from, b >= to) {
                _ if b <= from || a >= to => (from, to),
                (true, true) => (0, 0),
                (true, false) => (b, to),
                (false, true) => (from, a),
                // In the middle of it: the shorter side is copied now, the longer one may still be
                // overwritten.
                (false, false) if a - from < to - b => {
                    self.update_slot(memory, (from, a))?;
                    (b, to)
                }
                (false, false) => {
                    self.update_slot(memory, (b, to))?;
                    (from, a)
                }
            };
        }
        Ok(())
    }

    /// How many bytes of the newest version a publication copies if nothing but `length` bytes from
    /// `offset` on is written. Who calls this has read the header, and it is not read again: what
    /// somebody writes there later changes nothing.
    #[must_use]
    pub fn behind(&self, offset: u64, length: u64) -> u64 {
        let end = offset.saturating_add(length);
        let written = |from: u64, to: u64| end.min(to).saturating_sub(offset.max(from));
        let ranges = self.lag.ranges();
        ranges.map(|(from, to)| to - from - written(from, to)).sum()
    }

    /// Marks the content of the slot as invalid before changing it. If this writer dies, the next
    /// one copies all of it.
    fn spoil<M: Memory>(&self, memory: &M) -> Result<(), Fault> {
        let holds = at::slot(self.slot) + at::VERSION;
        memory.store(holds, SPOILT, Relaxed)?;
        memory.fence(Release);
        Ok(())
    }

    /// Which bytes of the slot are older than the newest version; all of them if that is unknown. A
    /// slot that was never written holds zeros, which is version 0.
    fn lag<M: Memory>(&self, memory: &M, holds: u64) -> Result<Lag, Fault> {
        let all = Lag::all(&self.geometry);
        if holds > self.head.version || self.head.version - holds >= u64::from(self.geometry.slots)
        {
            return Ok(all);
        }
        let mut lag = Lag::default();
        let mut slot = self.head.slot;
        for version in (holds + 1..=self.head.version).rev() {
            let words = at::slot(slot);
            let from = memory.load(words + at::CHANGED_FROM, Relaxed)?;
            let to = memory.load(words + at::CHANGED_TO, Relaxed)?;
            let found = memory.load(words + at::VERSION, Relaxed)?;
            if found != version || from > to || to > self.geometry.size {
                return Ok(all);
            }
            lag.add((from, to));
            slot = (slot + self.geometry.slots - 1) % self.geometry.slots;
        }
        Ok(lag)
    }

    /// Fills a range with one byte, in pieces.
    fn put<M: Memory>(&self, memory: &M, from: u64, to: u64, byte: u8) -> Result<(), Fault> {
        let piece = vec![byte; usize::try_from((to - from).min(64 * 1024)).expect("bounded")];
        let mut at = from;
        while at < to {
            let n = usize::try_from((to - at).min(piece.len() as u64)).expect("bounded");
            let start = self.geometry.slot(self.slot) + at;
            memory.write(start, &piece[..n])?;
            at += n as u64;
        }
        Ok(())
    }

    /// Notes that bytes are about to be changed; `None` if there are none.
    fn touch<M: Memory>(
        &mut self,
        memory: &M,
        offset: u64,
        length: u64,
    ) -> Result<Option<(u64, u64)>, WriteError> {
        if !self.geometry.contains_range(offset, length) {
            return Err(WriteError::OutOfRange);
        }
        if length == 0 {
            return Ok(None);
        }
        let range = (offset, offset + length);
        if self.changed.is_none() && !self.geometry.is_raw() {
            self.spoil(memory)?;
        }
        self.changed = Some(self.changed.map_or(range, |before| union(before, range)));
        self.make_way(memory, range)?;
        Ok(Some(range))
    }

    /// Leaves it to the caller to bring the slot up to date: from here on reads return the content
    /// of the slot itself. Returns whether that is one complete published version; if not, it may
    /// be anything.
    ///
    /// # Errors
    /// If the memory or file is not what it should be.
    pub fn leave_behind<M: Memory>(&mut self, memory: &M) -> Result<bool, Fault> {
        self.lag = Lag::default();
        let holds = memory.load(at::slot(self.slot) + at::VERSION, Relaxed)?;
        Ok(self.changed.is_none() && holds <= self.head.version)
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
        if self.touch(memory, offset, bytes.len() as u64)?.is_some() {
            memory.write(self.geometry.slot(self.slot) + offset, bytes)?;
        }
        Ok(())
    }

    /// Writes `byte` over `length` bytes from `offset` on.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn fill<M: Memory>(
        &mut self,
        memory: &M,
        offset: u64,
        length: u64,
        byte: u8,
    ) -> Result<(), WriteError> {
        if let Some((from, to)) = self.touch(memory, offset, length)? {
            self.put(memory, from, to, byte)?;
        }
        Ok(())
    }

    /// Prepares `length` bytes for writing from outside; returns their position in `memory`. With
    /// `keeps` the whole slot starts as a copy of the previous version.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn expose<M: Memory>(
        &mut self,
        memory: &M,
        offset: u64,
        length: u64,
        keeps: bool,
    ) -> Result<u64, WriteError> {
        if !self.geometry.contains_range(offset, length) {
            return Err(WriteError::OutOfRange);
        }
        if keeps {
            self.catch_up(memory)?;
        }
        self.touch(memory, offset, length)?;
        Ok(self.geometry.slot(self.slot) + offset)
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
        // The parts that are out of date are current only in the newest version.
        let end = offset + to.len() as u64;
        let lag = self.lag.ranges().map(|(a, b)| (a.max(offset), b.min(end)));
        for (a, b) in lag.filter(|(a, b)| a < b) {
            let index = |at: u64| usize::try_from(at - offset).expect("within the buffer");
            let part = &mut to[index(a)..index(b)];
            match self.head.version {
                0 => part.fill(0),
                _ => memory.read(self.geometry.slot(self.head.slot) + a, part)?,
            }
        }
        Ok(())
    }

    /// Publishes it to readers. `stamp` is stored with it: the fence that it was written under, and
    /// the time.
    ///
    /// # Errors
    /// If the memory or file is not what it should be.
    pub fn publish<M: Memory>(self, memory: &M, stamp: Stamp) -> Result<u64, Fault> {
        let version = self.version();
        self.publish_as(memory, version, stamp)
    }

    /// Like [`Draft::publish`], with a given version number.
    ///
    /// # Errors
    /// As [`Draft::publish`].
    pub(crate) fn publish_as<M: Memory>(
        mut self,
        memory: &M,
        version: u64,
        stamp: Stamp,
    ) -> Result<u64, Fault> {
        self.catch_up(memory)?;
        let words = at::slot(self.slot);
        let (from, to) = self.changed.unwrap_or((0, 0));
        if self.geometry.spares > 0 && !self.geometry.is_raw() {
            spares::note_missed(memory, &self.geometry, self.slot, (from, to))?;
        }
        memory.store(words + at::VERSION, version, Relaxed)?;
        // Readers do not look at these, so they may be stored in any order.
        let mut bytes = [0; (at::CHANGED_TO + 8 - at::LENGTH) as usize];
        let others = [
            self.geometry.size,
            stamp.fence,
            stamp.unix_ns,
            0, // no checksum
            from,
            to,
        ];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(others) {
            bytes.copy_from_slice(&u64::to_le_bytes(word));
        }
        memory.write(words + at::LENGTH, &bytes)?;
        memory.store(words + at::SEQUENCE, self.sequence.wrapping_add(2), Release)?;
        memory.store(at::HEAD, version << 8 | u64::from(self.slot), Release)?;
        memory.notify(at::NOTIFY)?;
        Ok(version)
    }
}

/// The checksum of a slot's version, size and content (CRC-32C).
///
/// # Errors
/// If it can't be read.
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

/// What is stored with a version.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stamp {
    /// The fence of the lock that it was written under.
    pub fence: u64,
    /// When, in nanoseconds since the Unix epoch.
    pub unix_ns: u64,
}

fn union(a: (u64, u64), b: (u64, u64)) -> (u64, u64) {
    (a.0.min(b.0), a.1.max(b.1))
}

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;
