//! Chooses the slot for the next version of a persistent block: never that of the version on disk,
//! nor that of a flush in progress, so that a version survives a crash of the machine at any time.
//!
//! The header, written by the server, names these two slots. A writer takes a slot and checks
//! again: either it sees that a flush has claimed the slot in the meantime, and takes another one,
//! or the flush sees that the slot is being written, and takes a newer version.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use super::{Draft, Head, Lag, SPOILT};
use crate::format::at;
use crate::geometry::{ALL_SLOTS_MAX, Geometry};
use crate::memory::{Fault, Memory};

/// How many times a writer takes another slot because a flush took the one that it had. A flush
/// waits for the disk.
const TRIES: u32 = 64;

/// Bytes of the words of a slot that are read at once.
const WORDS_BYTES: usize = 64;

/// Parts of a block whose changes are tracked coarsely: bits of a word.
const PARTS: u64 = 64;

/// A part has whole pages.
const PAGE: u64 = 4096;

const SLOTS: usize = ALL_SLOTS_MAX as usize;

/// A version and its slot, as the words at `FLUSHED` and `FLUSHING` say it; version 0 is none.
pub(crate) fn named<M: Memory>(memory: &M, place: u64) -> Result<Head, Fault> {
    let word = memory.load(place, Acquire)?;
    Ok(Head {
        version: word >> 8,
        slot: (word & 0xff) as u32,
    })
}

pub(crate) fn name<M: Memory>(memory: &M, place: u64, head: Head) -> Result<(), Fault> {
    memory.store(place, head.version << 8 | u64::from(head.slot), Release)
}

/// Reserves a version that was the newest one, for a flush; false if a writer has begun to
/// overwrite it.
pub(crate) fn reserve<M: Memory>(memory: &M, head: Head) -> Result<bool, Fault> {
    name(memory, at::FLUSHING, head)?;
    // From here on a writer that takes this slot releases it; a writer that took it before is
    // detected now.
    memory.fence(SeqCst);
    Ok(super::settled(memory, &head)?.is_some())
}

/// Ends a flush; `flushed` is on disk now, and replaces the previous flushed version.
pub(crate) fn release<M: Memory>(memory: &M, flushed: Option<Head>) -> Result<(), Fault> {
    // In this order, so that writers avoid the slot all the time.
    if let Some(flushed) = flushed {
        name(memory, at::FLUSHED, flushed)?;
    }
    name(memory, at::FLUSHING, Head::NONE)
}

/// The slots that writers avoid.
#[derive(Debug, Clone, Copy)]
struct Reserved([Head; 2]);

impl Reserved {
    fn load<M: Memory>(memory: &M) -> Result<Reserved, Fault> {
        // In this order: the word of the flushed version is stored before that of the flush is
        // cleared.
        let flushing = named(memory, at::FLUSHING)?;
        Ok(Reserved([flushing, named(memory, at::FLUSHED)?]))
    }

    fn has(&self, slot: u32) -> bool {
        self.0
            .iter()
            .any(|head| head.version > 0 && head.slot == slot)
    }
}

/// The words of one slot.
#[derive(Debug, Clone, Copy, Default)]
struct Words {
    sequence: u64,
    version: u64,
    changed: (u64, u64),
}

/// The words of all slots. Only writers change them, one at a time.
struct Seen {
    words: [Words; SLOTS],
    slots: u32,
}

impl Seen {
    fn load<M: Memory>(memory: &M, geometry: &Geometry) -> Result<Seen, Fault> {
        let slots = geometry.all_slots();
        let mut words = [Words::default(); SLOTS];
        for (slot, words) in (0..slots).zip(&mut words) {
            let mut bytes = [0; WORDS_BYTES];
            memory.read(at::slot(slot), &mut bytes)?;
            let word = |at: u64| {
                let at = at as usize;
                u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
            };
            *words = Words {
                sequence: word(at::SEQUENCE),
                version: word(at::VERSION),
                changed: (word(at::CHANGED_FROM), word(at::CHANGED_TO)),
            };
        }
        Ok(Seen { words, slots })
    }

    fn at(&self, slot: u32) -> &Words {
        &self.words[slot as usize]
    }

    /// Unpublished versions of a writer that died do not count: their numbers are reused.
    fn discard_unpublished<M: Memory>(&mut self, memory: &M, head: &Head) -> Result<(), Fault> {
        for (slot, words) in (0..self.slots).zip(&mut self.words) {
            if words.version > head.version && words.version != SPOILT {
                words.version = SPOILT;
                memory.store(at::slot(slot) + at::VERSION, SPOILT, Relaxed)?;
                memory.fence(Release);
            }
        }
        Ok(())
    }

    /// The slot for the next version: as many slots rotate as the block was created with, and the
    /// others are idle. So a slot is only a few versions behind, and readers have time to read the
    /// newest one.
    fn choose(&self, geometry: &Geometry, head: &Head, reserved: &Reserved) -> Option<u32> {
        let mut free: [Option<(u64, u32)>; SLOTS] = [None; SLOTS];
        let mut n = 0;
        for slot in 0..self.slots {
            let is_newest = head.version > 0 && head.slot == slot;
            if !is_newest && !reserved.has(slot) {
                let version = self.at(slot).version;
                let version = if version == SPOILT { 0 } else { version };
                free[n] = Some((version, self.slots - slot));
                n += 1;
            }
        }
        free[..n].sort_unstable_by(|a, b| b.cmp(a));
        let turn = (geometry.slots as usize).saturating_sub(2);
        let (_, slot) = free[turn.min(n.checked_sub(1)?)]?;
        Some(self.slots - slot)
    }

    /// Which bytes of a slot are older than the newest version.
    fn lag<M: Memory>(
        &self,
        memory: &M,
        geometry: &Geometry,
        head: &Head,
        slot: u32,
    ) -> Result<Lag, Fault> {
        let holds = self.at(slot).version;
        if holds > head.version {
            return Ok(Lag::all(geometry));
        }
        if let Some(lag) = self.exact_lag(geometry, head, holds) {
            return Ok(lag);
        }
        let missed = memory.load(at::MISSED + 8 * u64::from(slot), Relaxed)?;
        let mut lag = Lag::default();
        for part in (0..PARTS).filter(|part| missed >> part & 1 == 1) {
            let from = part.saturating_mul(part_bytes(geometry));
            let to = from.saturating_add(part_bytes(geometry));
            lag.add((from.min(geometry.size), to.min(geometry.size)));
        }
        Ok(lag)
    }

    /// The ranges that the versions since `holds` changed, if the slots still record all of them.
    fn exact_lag(&self, geometry: &Geometry, head: &Head, holds: u64) -> Option<Lag> {
        if head.version - holds > u64::from(self.slots) {
            return None;
        }
        let mut lag = Lag::default();
        for version in holds + 1..=head.version {
            let words = if version == head.version {
                self.at(head.slot)
            } else {
                let all = &self.words[..self.slots as usize];
                all.iter().find(|words| words.version == version)?
            };
            let (from, to) = words.changed;
            if words.version != version || from > to || to > geometry.size {
                return None;
            }
            lag.add((from, to));
        }
        Some(lag)
    }
}

/// Begins the next version in a slot whose content is not needed.
pub(super) fn begin<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    head: Head,
) -> Result<Draft, Fault> {
    let mut seen = Seen::load(memory, geometry)?;
    seen.discard_unpublished(memory, &head)?;
    let mut reserved = Reserved::load(memory)?;
    for _ in 0..TRIES {
        let slot = seen.choose(geometry, &head, &reserved);
        let slot = slot.ok_or(Fault::Corrupt("note of what is on the disk"))?;
        let place = at::slot(slot) + at::SEQUENCE;
        let sequence = seen.at(slot).sequence;
        // A slot that a dead writer left odd is started again.
        let even = sequence & !1;
        memory.store(place, even.wrapping_add(1), Relaxed)?;
        // This store and the following loads must not be reordered, or a flush and this writer
        // would not see each other.
        memory.fence(SeqCst);
        reserved = Reserved::load(memory)?;
        if !reserved.has(slot) {
            return Ok(Draft {
                geometry: *geometry,
                slot,
                sequence: even,
                head,
                changed: None,
                lag: seen.lag(memory, geometry, &head, slot)?,
            });
        }
        memory.store(place, even, Release)?;
    }
    Err(Fault::Corrupt("note of what is on the disk"))
}

/// Records that all other slots missed a change, and that the slot of the version with the change
/// missed none.
pub(super) fn note_missed<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    slot: u32,
    changed: (u64, u64),
) -> Result<(), Fault> {
    let mut bytes = [0; 8 * SLOTS];
    let bytes = &mut bytes[..8 * geometry.all_slots() as usize];
    memory.read(at::MISSED, bytes)?;
    let parts = parts(geometry, changed);
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let missed = u64::from_le_bytes((&*word).try_into().expect("8 bytes"));
        let missed = if i == slot as usize {
            0
        } else {
            missed | parts
        };
        word.copy_from_slice(&missed.to_le_bytes());
    }
    memory.write(at::MISSED, bytes)
}

/// Bytes of one of the tracked parts.
fn part_bytes(geometry: &Geometry) -> u64 {
    geometry.size.div_ceil(PARTS).div_ceil(PAGE).max(1) * PAGE
}

/// The parts that a range touches, one bit each.
fn parts(geometry: &Geometry, (from, to): (u64, u64)) -> u64 {
    if from >= to {
        return 0;
    }
    let (first, last) = (from / part_bytes(geometry), (to - 1) / part_bytes(geometry));
    (u64::MAX >> (PARTS - 1 - last)) & (u64::MAX << first)
}

/// The spare slot to which a block that is written in place was last copied, and the number of that
/// copy: the sequences of these slots count the copies.
pub(crate) fn copied<M: Memory>(
    memory: &M,
    geometry: &Geometry,
) -> Result<Option<(u32, u64)>, Fault> {
    let mut last = None;
    for slot in geometry.slots..geometry.all_slots() {
        let words = at::slot(slot);
        let is_whole = memory.load(words + at::CHECKSUM, Relaxed)? & super::SUMMED != 0;
        let turn = memory.load(words + at::SEQUENCE, Relaxed)?;
        if is_whole && last.is_none_or(|(_, before)| turn > before) {
            last = Some((slot, turn));
        }
    }
    Ok(last)
}

/// Makes the version in a slot the newest one, and discards the content of the other slots: after a
/// power loss each of their words may be older or newer than their content.
pub(crate) fn restart_from<M: Memory>(
    memory: &M,
    geometry: &Geometry,
    newest: Head,
) -> Result<(), Fault> {
    for slot in 0..geometry.all_slots() {
        let words = at::slot(slot);
        let is_newest = newest.version > 0 && slot == newest.slot;
        if !is_newest {
            memory.store(words + at::VERSION, SPOILT, Relaxed)?;
            memory.store(words + at::CHECKSUM, 0, Relaxed)?;
        }
        let sequence = memory.load(words + at::SEQUENCE, Relaxed)?;
        memory.store(words + at::SEQUENCE, sequence & !1, Relaxed)?;
    }
    name(memory, at::FLUSHED, newest)?;
    name(memory, at::FLUSHING, Head::NONE)?;
    name(memory, at::HEAD, newest)
}
