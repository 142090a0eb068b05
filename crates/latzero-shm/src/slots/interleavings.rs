//! Tests every order of the steps of a writer and two readers, with the writer dying at any step
//! and another one following it. loom also covers the memory model: a relaxed load may return any
//! value that the model permits.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64 as Plain;
use std::sync::atomic::Ordering::{self, Relaxed};

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};

use super::{Stamp, Wait, begin, head, read, spares};
use crate::format::at;
use crate::geometry::Geometry;
use crate::memory::{Fault, Memory};

/// Bytes of the block: two words, so that there is something to tear.
const SIZE: u64 = 16;

/// A block of words that loom watches; and of words that no reader looks at, which need not be.
struct Words {
    watched: HashMap<u64, AtomicU64>,
    private: HashMap<u64, Plain>,
}

impl Words {
    fn new(geometry: &Geometry) -> Words {
        let mut watched = HashMap::from([(at::HEAD, AtomicU64::new(0))]);
        for word in [at::FLUSHED, at::FLUSHING] {
            watched.insert(word, AtomicU64::new(0));
        }
        let mut private = HashMap::from([(at::NOTIFY, Plain::new(0))]);
        for slot in 0..geometry.all_slots() {
            let words = at::slot(slot);
            for word in [
                words + at::SEQUENCE,
                words + at::VERSION,
                geometry.slot(slot),
                geometry.slot(slot) + 8,
            ] {
                watched.insert(word, AtomicU64::new(0));
            }
            for word in [
                at::LENGTH,
                at::LENGTH + 8,
                at::LENGTH + 16,
                at::CHECKSUM,
                at::CHANGED_FROM,
                at::CHANGED_TO,
            ] {
                private.insert(words + word, Plain::new(0));
            }
            private.insert(at::MISSED + 8 * u64::from(slot), Plain::new(0));
        }
        Words { watched, private }
    }
}

/// The words as one process has them, which may die: after so many more steps.
struct Process<'a> {
    words: &'a Words,
    steps_left: Cell<Option<u32>>,
}

impl Process<'_> {
    fn step(&self) -> Result<(), Fault> {
        match self.steps_left.get() {
            Some(0) => Err(Fault::Short),
            left => {
                self.steps_left.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }
}

impl Memory for Process<'_> {
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault> {
        self.step()?;
        Ok(match self.words.watched.get(&at) {
            Some(word) => word.load(order),
            None => self.words.private[&at].load(Relaxed),
        })
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        match self.words.watched.get(&at) {
            Some(place) => {
                self.step()?;
                place.store(word, order);
            }
            None => self.words.private[&at].store(word, Relaxed),
        }
        Ok(())
    }

    fn fence(&self, order: Ordering) {
        fence(order);
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        for (i, bytes) in to.chunks_exact_mut(8).enumerate() {
            let word = self.load(at + 8 * i as u64, Relaxed)?;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        for (i, bytes) in from.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            self.store(at + 8 * i as u64, word, Relaxed)?;
        }
        Ok(())
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        self.words.private[&at].fetch_add(1, Relaxed);
        Ok(())
    }

    fn relax(&self, _tries: u32) {
        loom::thread::yield_now();
    }
}

/// A version whose words all say who wrote it.
fn publish(process: &Process<'_>, geometry: &Geometry, writer: u64) -> Result<u64, Fault> {
    let mut draft = begin(process, geometry)?;
    let word = (draft.version() * 10 + writer).to_le_bytes();
    for offset in (0..SIZE).step_by(8) {
        draft
            .write(process, offset, &word)
            .map_err(|_| Fault::Short)?;
    }
    draft.publish(process, Stamp::default())
}

/// Runs every order in which one writer makes `versions` versions, dying after `steps`, and a
/// second one another; while `readers` read `reads` times each, with at most so many preemptions in
/// an order. Says whether the first one got to its end.
fn check(
    slots: u32,
    versions: u32,
    readers: usize,
    reads: usize,
    steps: u32,
    preemptions: usize,
) -> bool {
    let done = std::sync::Arc::new(Mutex::new(false));
    let report = done.clone();
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(move || {
        let geometry = Geometry::new(SIZE, slots).expect("it is small");
        let words = Arc::new(Words::new(&geometry));
        let first = Process {
            words: &words,
            steps_left: Cell::new(None),
        };
        publish(&first, &geometry, 0).expect("no writer dies here");
        let threads: Vec<_> = (0..readers)
            .map(|_| {
                let words = words.clone();
                loom::thread::spawn(move || {
                    let process = Process {
                        words: &words,
                        steps_left: Cell::new(None),
                    };
                    let mut seen = Vec::new();
                    for _ in 0..reads {
                        let mut bytes = [0; SIZE as usize];
                        let version =
                            read(&process, &geometry, 0, &mut bytes, Wait::Wait).expect("it reads");
                        let [a, b] = [0, 8].map(|at| {
                            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
                        });
                        assert_eq!(a, b, "a torn version {version}");
                        seen.push((version, a));
                    }
                    seen
                })
            })
            .collect();
        let mut truth = HashMap::from([(1, 10)]);
        let dying = Process {
            words: &words,
            steps_left: Cell::new(Some(steps)),
        };
        let outcome = (0..versions).try_for_each(|_| publish(&dying, &geometry, 1).map(drop));
        *report.lock().expect("no thread panics") |= outcome.is_ok();
        // What the head names is published, and nothing else ever was.
        let heir = Process {
            words: &words,
            steps_left: Cell::new(None),
        };
        let last = head(&heir, &geometry).expect("it is complete").version;
        truth.extend((2..=last).map(|version| (version, version * 10 + 1)));
        let version = publish(&heir, &geometry, 2).expect("no writer dies here");
        assert_eq!(version, last + 1);
        truth.insert(version, version * 10 + 2);
        for thread in threads {
            let seen = thread.join().expect("it did not panic");
            assert!(seen.is_sorted(), "versions went backwards: {seen:?}");
            for (version, content) in seen {
                assert_eq!(truth.get(&version), Some(&content), "version {version}");
            }
        }
    });
    *done.lock().expect("no thread panics")
}

/// All deaths, up to the writer that does not die.
fn check_all_deaths(slots: u32, versions: u32, readers: usize, reads: usize, preemptions: usize) {
    let survived =
        (0..100).find(|steps| check(slots, versions, readers, reads, *steps, preemptions));
    assert!(survived.is_some(), "the writer always died");
}

#[test]
fn two_slots_and_a_reader_that_reads_twice() {
    check_all_deaths(2, 1, 1, 2, 2);
}

#[test]
fn two_slots_and_a_reader_that_is_overtaken() {
    check_all_deaths(2, 2, 1, 1, 2);
}

#[test]
fn three_slots_and_a_reader_that_reads_twice() {
    check_all_deaths(3, 2, 1, 2, 2);
}

#[test]
fn two_slots_and_two_readers() {
    check_all_deaths(2, 1, 2, 1, 1);
}

#[test]
fn three_slots_and_two_readers() {
    check_all_deaths(3, 2, 2, 1, 1);
}

/// What a flush reserved, and what it wrote to the disk, is not written over: not by a writer that
/// makes `versions` versions and dies after `steps`, nor by the one after it.
fn check_flush(versions: u32, flushes: u32, steps: u32) -> bool {
    let done = std::sync::Arc::new(Mutex::new(false));
    let report = done.clone();
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let geometry = Geometry::with_spares(SIZE, 2).expect("it is small");
        let words = Arc::new(Words::new(&geometry));
        let process = |steps_left| Process {
            words: &words,
            steps_left: Cell::new(steps_left),
        };
        publish(&process(None), &geometry, 0).expect("no writer dies here");
        let flusher = {
            let words = words.clone();
            loom::thread::spawn(move || {
                let process = Process {
                    words: &words,
                    steps_left: Cell::new(None),
                };
                let mut flushed = None;
                for _ in 0..flushes {
                    let head = head(&process, &geometry).expect("it is complete");
                    if spares::reserve(&process, head).expect("no writer dies here") {
                        holds(&process, &geometry, head);
                        spares::release(&process, Some(head)).expect("no writer dies here");
                        flushed = Some(head);
                    } else {
                        spares::release(&process, None).expect("no writer dies here");
                    }
                    if let Some(flushed) = flushed {
                        holds(&process, &geometry, flushed);
                    }
                }
                flushed
            })
        };
        let dying = process(Some(steps));
        let outcome = (0..versions).try_for_each(|_| publish(&dying, &geometry, 0).map(drop));
        *report.lock().expect("no thread panics") |= outcome.is_ok();
        publish(&process(None), &geometry, 0).expect("no writer dies here");
        let flushed = flusher.join().expect("it did not panic");
        publish(&process(None), &geometry, 0).expect("no writer dies here");
        if let Some(flushed) = flushed {
            holds(&process(None), &geometry, flushed);
        }
    });
    *done.lock().expect("no thread panics")
}

/// A slot holds all of a version.
fn holds(process: &Process<'_>, geometry: &Geometry, head: super::Head) {
    for offset in (0..SIZE).step_by(8) {
        let at = geometry.slot(head.slot) + offset;
        let word = process.load(at, Relaxed).expect("no writer dies here");
        assert_eq!(
            word,
            head.version * 10,
            "the slot of version {}",
            head.version
        );
    }
}

#[test]
fn the_version_on_disk_is_not_overwritten() {
    let survived = (0..400).step_by(23).find(|steps| check_flush(2, 1, *steps));
    assert!(survived.is_some(), "the writer always died");
}

#[test]
fn two_flushes_beside_a_writer() {
    assert!(check_flush(2, 2, u32::MAX));
}
