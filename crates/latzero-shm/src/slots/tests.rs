//! Tests the algorithm on private memory: against a model, with writers that die at any step, and
//! with the number of copied bytes.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::{ReadError, Stamp, Wait, WriteError, begin, head, read, spares};
use crate::geometry::Geometry;
use crate::memory::{Fault, Memory};

/// A block's bytes, how many of them were copied, and after how many more steps whoever works on it
/// dies.
struct Bytes {
    bytes: RefCell<Vec<u8>>,
    copied: Cell<u64>,
    steps_left: Cell<Option<u32>>,
    /// How often a reader gave up the processor.
    yields: Cell<u32>,
}

impl Bytes {
    fn new(geometry: &Geometry) -> Bytes {
        let total = usize::try_from(geometry.total()).unwrap();
        Bytes {
            bytes: RefCell::new(vec![0; total]),
            copied: Cell::new(0),
            steps_left: Cell::new(None),
            yields: Cell::new(0),
        }
    }

    fn is_dead(&self) -> bool {
        match self.steps_left.get() {
            Some(0) => true,
            left => {
                self.steps_left.set(left.map(|left| left - 1));
                false
            }
        }
    }
}

impl Memory for Bytes {
    fn load(&self, at: u64, _order: Ordering) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&self, at: u64, word: u64, _order: Ordering) -> Result<(), Fault> {
        self.write(at, &word.to_le_bytes())
    }

    fn fence(&self, _order: Ordering) {}

    fn relax(&self, tries: u32) {
        // As the trait's own does.
        self.yields.set(self.yields.get() + u32::from(tries >= 16));
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        if self.is_dead() {
            return Err(Fault::Short);
        }
        let at = at as usize;
        to.copy_from_slice(&self.bytes.borrow()[at..at + to.len()]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let is_dead = self.is_dead();
        // A word is stored or not; of a longer write, a half may be done.
        let length = match (is_dead, from.len()) {
            (true, 8) => 0,
            (true, length) => length / 2,
            (false, length) => length,
        };
        let at = at as usize;
        self.bytes.borrow_mut()[at..at + length].copy_from_slice(&from[..length]);
        self.copied.set(self.copied.get() + length as u64);
        if is_dead { Err(Fault::Short) } else { Ok(()) }
    }

    fn notify(&self, _at: u64) -> Result<(), Fault> {
        Ok(())
    }
}

fn publish(
    bytes: &Bytes,
    geometry: &Geometry,
    pieces: &[(u64, Vec<u8>)],
) -> Result<u64, WriteError> {
    let mut draft = begin(bytes, geometry)?;
    for (offset, piece) in pieces {
        draft.write(bytes, *offset, piece)?;
    }
    Ok(draft.publish(bytes, Stamp::default())?)
}

fn content(bytes: &Bytes, geometry: &Geometry) -> (Vec<u8>, u64) {
    let mut out = vec![0xee; usize::try_from(geometry.size).unwrap()];
    let version = read(bytes, geometry, 0, &mut out, Wait::Wait).unwrap();
    (out, version)
}

proptest! {
    /// Versions are the model's, whoever died on the way: before the head moved nothing happened,
    /// after it all did.
    #[test]
    fn any_writes_and_deaths(
        slots in 2..=4u32,
        has_spares in any::<bool>(),
        size in prop_oneof![1..40u64, 4090..4100u64, Just(70 * 4096)],
        writes in prop::collection::vec(
            (
                prop::collection::vec((any::<u16>(), any::<u16>(), any::<u8>()), 0..3),
                prop::option::weighted(0.4, 0..50u32),
                any::<bool>(),
            ),
            1..24,
        ),
    ) {
        let geometry = if has_spares {
            Geometry::with_spares(size, slots).unwrap()
        } else {
            Geometry::new(size, slots).unwrap()
        };
        let bytes = Bytes::new(&geometry);
        let mut model = vec![0; usize::try_from(size).unwrap()];
        let mut version = 0;
        let mut flushed = None;
        for (pieces, death, flushes) in writes {
            if has_spares && flushes && version > 0 {
                let head = head(&bytes, &geometry).unwrap();
                prop_assert!(spares::reserve(&bytes, head).unwrap());
                spares::release(&bytes, death.is_none().then_some(head)).unwrap();
                if death.is_none() {
                    flushed = Some((head, model.clone()));
                }
            }
            let pieces: Vec<(u64, Vec<u8>)> = pieces
                .into_iter()
                .map(|(from, length, byte)| {
                    let from = u64::from(from) % size;
                    let length = u64::from(length) % (size - from + 1);
                    (from, vec![byte; usize::try_from(length).unwrap()])
                })
                .collect();
            let mut next = model.clone();
            for (from, piece) in &pieces {
                let from = usize::try_from(*from).unwrap();
                next[from..from + piece.len()].copy_from_slice(piece);
            }
            bytes.steps_left.set(death);
            let outcome = publish(&bytes, &geometry, &pieces);
            bytes.steps_left.set(None);
            let now = head(&bytes, &geometry).unwrap().version;
            prop_assert!(now == version || now == version + 1);
            if outcome.is_ok() {
                prop_assert_eq!(now, version + 1);
            }
            if now > version {
                version = now;
                model = next;
            }
            prop_assert_eq!(content(&bytes, &geometry), (model.clone(), version));
            if let Some((head, kept)) = &flushed {
                let mut found = vec![0; kept.len()];
                bytes.read(geometry.slot(head.slot), &mut found).unwrap();
                prop_assert_eq!(&found, kept);
            }
        }
    }
}

#[test]
fn a_small_write_copies_little() {
    for slots in 2..=4 {
        let geometry = Geometry::new(1 << 20, slots).unwrap();
        let bytes = Bytes::new(&geometry);
        publish(&bytes, &geometry, &[(0, vec![1; 1 << 20])]).unwrap();
        // The other slots are to be brought up once.
        for _ in 1..slots {
            publish(&bytes, &geometry, &[(7, vec![2; 100])]).unwrap();
        }
        for i in 0..20 {
            bytes.copied.set(0);
            publish(&bytes, &geometry, &[(7 + i, vec![3; 100])]).unwrap();
            let copied = bytes.copied.get();
            assert!(
                copied < 500,
                "{copied} bytes, of which the header's are some 100"
            );
        }
    }
}

#[test]
fn the_first_writes_of_a_fresh_block_copy_little() {
    let geometry = Geometry::new(1 << 20, 3).unwrap();
    let bytes = Bytes::new(&geometry);
    for i in 0..9 {
        publish(&bytes, &geometry, &[(1000 * i, vec![3; 100])]).unwrap();
    }
    // The ranges since a slot's version, and not what lies between them.
    assert!(bytes.copied.get() < 4_000, "{}", bytes.copied.get());
}

#[test]
fn a_draft_dropped_before_a_write_costs_the_next_one_nothing() {
    let geometry = Geometry::new(1 << 20, 2).unwrap();
    let bytes = Bytes::new(&geometry);
    publish(&bytes, &geometry, &[(0, vec![1; 1 << 20])]).unwrap();
    publish(&bytes, &geometry, &[(0, vec![2; 10])]).unwrap();
    publish(&bytes, &geometry, &[(0, vec![3; 10])]).unwrap();
    bytes.copied.set(0);
    let _ = begin(&bytes, &geometry).unwrap();
    publish(&bytes, &geometry, &[(5, vec![4; 10])]).unwrap();
    assert!(bytes.copied.get() < 500, "{}", bytes.copied.get());
    let (content, version) = content(&bytes, &geometry);
    assert_eq!(
        (&content[..6], content[15], version),
        (&[3, 3, 3, 3, 3, 4][..], 1, 4)
    );
}

#[test]
fn a_slot_under_constant_writes_is_contended() {
    let geometry = Geometry::new(8, 2).unwrap();
    let bytes = Bytes::new(&geometry);
    publish(&bytes, &geometry, &[(0, vec![1; 8])]).unwrap();
    bytes.store(512, 7, Ordering::Relaxed).unwrap();
    // A hurried reader keeps the processor: others may use it for milliseconds each time.
    let error = read(&bytes, &geometry, 0, &mut [0; 8], Wait::Hurry).unwrap_err();
    assert!(matches!(error, ReadError::Contended), "{error}");
    assert_eq!(bytes.yields.get(), 0);
    let error = read(&bytes, &geometry, 0, &mut [0; 8], Wait::Wait).unwrap_err();
    assert!(matches!(error, ReadError::Contended), "{error}");
    assert!(bytes.yields.get() > 0);
}

#[test]
fn a_head_with_an_invalid_slot_is_corrupt() {
    let geometry = Geometry::new(8, 2).unwrap();
    let bytes = Bytes::new(&geometry);
    for head in [5 << 8 | 2, 1 << 8 | 0xff, u64::MAX] {
        bytes.store(128, head, Ordering::Relaxed).unwrap();
        let error = read(&bytes, &geometry, 0, &mut [0; 8], Wait::Wait).unwrap_err();
        assert!(
            matches!(error, ReadError::Fault(Fault::Corrupt(_))),
            "{error}"
        );
        assert!(begin(&bytes, &geometry).is_err());
    }
}

#[test]
fn invalid_dirty_ranges_are_ignored() {
    let geometry = Geometry::new(64, 2).unwrap();
    for (from, to) in [(0, u64::MAX), (u64::MAX, u64::MAX), (9, 8), (0, 65)] {
        let bytes = Bytes::new(&geometry);
        publish(&bytes, &geometry, &[(0, vec![1; 64])]).unwrap();
        publish(&bytes, &geometry, &[(0, vec![2; 1])]).unwrap();
        bytes
            .store(512 + 128 + 48, from, Ordering::Relaxed)
            .unwrap();
        bytes.store(512 + 128 + 56, to, Ordering::Relaxed).unwrap();
        publish(&bytes, &geometry, &[(1, vec![3; 1])]).unwrap();
        let (content, _) = content(&bytes, &geometry);
        assert_eq!(content[..3], [2, 3, 1]);
    }
}

#[test]
fn a_small_write_beside_flushes_copies_little() {
    let geometry = Geometry::with_spares(1 << 20, 2).unwrap();
    let bytes = Bytes::new(&geometry);
    publish(&bytes, &geometry, &[(0, vec![1; 1 << 20])]).unwrap();
    for round in 0..20u64 {
        bytes.copied.set(0);
        for i in 0..5 {
            publish(&bytes, &geometry, &[(9000 * i, vec![3; 100])]).unwrap();
        }
        let head = head(&bytes, &geometry).unwrap();
        assert!(spares::reserve(&bytes, head).unwrap());
        spares::release(&bytes, Some(head)).unwrap();
        // Parts of 16 KiB that changed since the flush before, once each; and once all of each
        // slot.
        let copied = bytes.copied.get();
        assert!(round < 3 || copied < 60_000, "{copied} in round {round}");
    }
}
