//! The cost of a small write to a large block: bytes read and written are counted, those of the
//! content separately from those of the header.

#![allow(clippy::unwrap_used, reason = "these are tests, and what they share")]

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

use latzero_shm::slots::{self, Stamp, Wait};
use latzero_shm::{Fault, Geometry, HEADER_BYTES, Memory};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// Bytes of a small write.
const SMALL: u64 = 100;

/// The most header bytes that one version may touch: a few words.
const HEADER_MAX: u64 = 300;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Count {
    content_read: u64,
    content_written: u64,
    header: u64,
}

/// A block's bytes, with counters of reads and writes.
struct Counted {
    bytes: RefCell<Vec<u8>>,
    count: Cell<Count>,
    /// Whether writes of the content fail halfway from now on.
    is_dying: Cell<bool>,
}

impl Counted {
    fn new(geometry: &Geometry) -> Counted {
        Counted {
            bytes: RefCell::new(vec![0; geometry.total() as usize]),
            count: Cell::default(),
            is_dying: Cell::new(false),
        }
    }

    fn add(&self, change: impl FnOnce(&mut Count)) {
        let mut count = self.count.get();
        change(&mut count);
        self.count.set(count);
    }
}

impl Memory for Counted {
    fn load(&self, at: u64, _order: Ordering) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&self, at: u64, word: u64, _order: Ordering) -> Result<(), Fault> {
        self.write(at, &word.to_le_bytes())
    }

    fn fence(&self, _order: Ordering) {}

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let length = to.len() as u64;
        self.add(|count| match at < HEADER_BYTES {
            true => count.header += length,
            false => count.content_read += length,
        });
        let at = at as usize;
        to.copy_from_slice(&self.bytes.borrow()[at..at + to.len()]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let is_content = at >= HEADER_BYTES;
        let dies = is_content && self.is_dying.get();
        let length = if dies { from.len() / 2 } else { from.len() };
        self.add(|count| match is_content {
            false => count.header += length as u64,
            true => count.content_written += length as u64,
        });
        let at = at as usize;
        self.bytes.borrow_mut()[at..at + length].copy_from_slice(&from[..length]);
        if dies { Err(Fault::Short) } else { Ok(()) }
    }

    fn notify(&self, _at: u64) -> Result<(), Fault> {
        Ok(())
    }
}

/// Publishes a version that changes `length` bytes from `offset` on; returns what was counted.
fn write(memory: &Counted, geometry: &Geometry, offset: u64, length: u64, byte: u8) -> Count {
    memory.count.set(Count::default());
    let mut draft = slots::begin(memory, geometry).unwrap();
    draft
        .write(memory, offset, &vec![byte; length as usize])
        .unwrap();
    draft.publish(memory, Stamp::default()).unwrap();
    memory.count.get()
}

/// A block with as many versions as slots, each complete, the last ones small.
fn warm(slots: u32) -> (Counted, Geometry) {
    let geometry = Geometry::new(SIZE, slots).unwrap();
    let memory = Counted::new(&geometry);
    write(&memory, &geometry, 0, SIZE, 1);
    for _ in 1..slots {
        write(&memory, &geometry, 0, SMALL, 2);
    }
    (memory, geometry)
}

fn read(memory: &Counted, geometry: &Geometry, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    slots::read(memory, geometry, offset, &mut bytes, Wait::Wait).unwrap();
    bytes
}

#[test]
fn bytes_about_to_be_overwritten_are_not_copied_first() {
    for slots in 1..=4 {
        let (memory, geometry) = warm(slots);
        for byte in 3..20 {
            let count = write(&memory, &geometry, 0, SMALL, byte);
            assert_eq!(
                (count.content_read, count.content_written),
                (0, SMALL),
                "{slots} slots"
            );
            assert!(count.header <= HEADER_MAX, "{count:?}");
            assert_eq!(read(&memory, &geometry, 98, 3), [byte, byte, 1]);
        }
        // The whole block, however old the slot is.
        let count = write(&memory, &geometry, 0, SIZE, 20);
        assert_eq!((count.content_read, count.content_written), (0, SIZE));
    }
}

#[test]
fn two_slots_copy_only_the_previous_version_wherever_it_was() {
    let (memory, geometry) = warm(2);
    write(&memory, &geometry, SIZE - SMALL, SMALL, 0);
    for round in 1..20u8 {
        // Alternates between the two ends of the block.
        let offset = u64::from(round % 2) * (SIZE - SMALL);
        let offset = SIZE - SMALL - offset;
        let count = write(&memory, &geometry, offset, SMALL, round);
        assert_eq!(
            (count.content_read, count.content_written),
            (SMALL, 2 * SMALL)
        );
    }
    let whole = read(&memory, &geometry, 0, SIZE);
    let (first, rest) = whole.split_at(SMALL as usize);
    let (rest, last) = rest.split_at(rest.len() - SMALL as usize);
    assert!(first.iter().all(|byte| *byte == 19));
    assert!(rest.iter().all(|byte| *byte == 1), "the rest is unchanged");
    assert!(last.iter().all(|byte| *byte == 18));
}

#[test]
fn a_write_inside_an_outdated_range_copies_only_its_two_ends() {
    let (memory, geometry) = warm(2);
    write(&memory, &geometry, 10_000, 3 * SMALL, 3);
    let count = write(&memory, &geometry, 10_000 + SMALL, SMALL, 4);
    assert_eq!(
        (count.content_read, count.content_written),
        (2 * SMALL, 3 * SMALL)
    );
    let bytes = read(&memory, &geometry, 10_000 - 1, 3 * SMALL + 2);
    assert_eq!([bytes[0], bytes[1], bytes[100]], [1, 3, 3]);
    assert_eq!([bytes[101], bytes[200]], [4, 4]);
    assert_eq!([bytes[201], bytes[300], bytes[301]], [3, 3, 1]);
}

#[test]
fn more_slots_copy_the_changes_of_the_versions_missed() {
    for slots in [3, 4] {
        let (memory, geometry) = warm(slots);
        let missed = u64::from(slots) - 1;
        for round in 0..20 {
            // One after the other, as a log is written.
            let count = write(&memory, &geometry, 1000 + SMALL * round, SMALL, 9);
            if round >= missed {
                assert_eq!(
                    (count.content_read, count.content_written),
                    (missed * SMALL, (missed + 1) * SMALL),
                    "{slots} slots"
                );
            }
        }
    }
}

#[test]
fn distant_ranges_of_a_block_are_copied_separately() {
    for slots in [2, 3, 4] {
        let (memory, geometry) = warm(slots);
        for round in 0..20 {
            let offset = [0, SIZE - SMALL][round % 2];
            let count = write(&memory, &geometry, offset, SMALL, 9);
            if round > 4 {
                assert!(count.content_read <= 2 * SMALL, "{slots} slots: {count:?}");
            }
        }
    }
}

#[test]
fn an_empty_version_and_a_read_cost_only_their_size() {
    let (memory, geometry) = warm(2);
    write(&memory, &geometry, 0, SMALL, 3);
    write(&memory, &geometry, 0, 0, 0);
    let count = write(&memory, &geometry, 0, 0, 0);
    assert_eq!((count.content_read, count.content_written), (0, 0));
    memory.count.set(Count::default());
    assert_eq!(read(&memory, &geometry, 99, SMALL)[..2], [3, 1]);
    let count = memory.count.get();
    assert_eq!((count.content_read, count.content_written), (SMALL, 0));
    assert!(count.header <= HEADER_MAX, "{count:?}");
}

#[test]
fn a_writer_that_died_costs_exactly_one_full_copy() {
    for slots in [2, 3] {
        let (memory, geometry) = warm(slots);
        write(&memory, &geometry, 0, SMALL, 3);
        memory.is_dying.set(true);
        let mut draft = slots::begin(&memory, &geometry).unwrap();
        assert!(draft.write(&memory, SIZE / 2, &[66; 100]).is_err());
        drop(draft);
        memory.is_dying.set(false);
        let count = write(&memory, &geometry, 0, SMALL, 4);
        assert_eq!(
            (count.content_read, count.content_written),
            (SIZE - SMALL, SIZE)
        );
        assert_eq!(read(&memory, &geometry, SIZE / 2, 1), [1]);
        let count = write(&memory, &geometry, 0, SMALL, 5);
        assert_eq!((count.content_read, count.content_written), (0, SMALL));
        assert_eq!(read(&memory, &geometry, 98, 3), [5, 5, 1]);
    }
}
