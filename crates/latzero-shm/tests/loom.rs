//! Small changes in every order of steps, only through the public interface: each version changes
//! one word of the block, so a writer copies the other word from slot to slot while it is read. The
//! writer dies at any step, or drops its draft.
//!
//! A version's content follows from its number, whoever wrote it, so readers know what to expect.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64 as Plain;
use std::sync::atomic::Ordering::{self, Relaxed};

use latzero_shm::slots::{self, Stamp, Wait};
use latzero_shm::{Fault, Geometry, Memory};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};

/// The number of words of the block.
const WORDS: u64 = 2;

/// The offset of the header words that readers use.
const HEAD: u64 = 128;
const NOTIFY: u64 = 256;
const SLOT_WORDS: u64 = 512;
const SEQUENCE: u64 = 0;
const VERSION: u64 = 8;

/// A value that no reader may ever see.
const UNSEEN: u64 = 0xdead;

/// Words that loom tracks, and words that only writers use, one after the other, which need no
/// tracking.
struct Words {
    watched: HashMap<u64, AtomicU64>,
    private: HashMap<u64, Plain>,
}

impl Words {
    fn new(geometry: &Geometry) -> Words {
        let mut watched = HashMap::from([(HEAD, AtomicU64::new(0))]);
        let mut private = HashMap::from([(NOTIFY, Plain::new(0))]);
        for slot in 0..u64::from(geometry.slots) {
            let header = SLOT_WORDS + 128 * slot;
            for at in (header..header + 64).step_by(8) {
                private.insert(at, Plain::new(0));
            }
            for at in [header + SEQUENCE, header + VERSION] {
                private.remove(&at);
                watched.insert(at, AtomicU64::new(0));
            }
            let content = geometry.slot_offset + geometry.slot_stride * slot;
            for at in (content..content + geometry.size).step_by(8) {
                watched.insert(at, AtomicU64::new(0));
            }
        }
        Words { watched, private }
    }
}

/// One process's access to the words; it may die after a number of steps.
struct Process<'a> {
    words: &'a Words,
    steps_left: Cell<Option<u32>>,
}

impl Process<'_> {
    fn immortal(words: &Words) -> Process<'_> {
        Process {
            words,
            steps_left: Cell::new(None),
        }
    }

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
        Ok(match self.words.watched.get(&at) {
            Some(word) => word.load(order),
            None => self.words.private[&at].load(Relaxed),
        })
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        // Only its stores are visible to others, so only they count as steps.
        self.step()?;
        match self.words.watched.get(&at) {
            Some(place) => place.store(word, order),
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
        self.step()?;
        self.words.private[&at].fetch_add(1, Relaxed);
        Ok(())
    }

    fn relax(&self, _tries: u32) {
        loom::thread::yield_now();
    }
}

/// The content of word `word` in version `version`: the last version that changed it.
fn expected(version: u64, word: u64) -> u64 {
    version.saturating_sub((version + word) % WORDS)
}

/// Publishes the next version, which changes one word.
fn publish(process: &Process<'_>, geometry: &Geometry) -> Result<u64, Fault> {
    let mut draft = slots::begin(process, geometry)?;
    let version = draft.version();
    let offset = 8 * (version % WORDS);
    draft
        .write(process, offset, &version.to_le_bytes())
        .map_err(|_| Fault::Short)?;
    draft.publish(process, Stamp::default())
}

/// Publishes a version, so that the slot that readers may still use is the next one; then starts
/// another version there, writes a value that nobody may see, and drops it.
fn begin_and_drop(process: &Process<'_>, geometry: &Geometry) -> Result<(), Fault> {
    let newest = publish(process, geometry)?;
    let mut draft = slots::begin(process, geometry)?;
    draft
        .write(process, 0, &UNSEEN.to_le_bytes())
        .map_err(|_| Fault::Short)?;
    // The draft shows its own word, and the newest version's other word, copied or not.
    let mut bytes = [0; 8 * WORDS as usize];
    draft.read(process, 0, &mut bytes).expect("it reads");
    let words = [UNSEEN, expected(newest, 1)].map(u64::to_le_bytes);
    assert_eq!(bytes, *words.as_flattened());
    Ok(())
}

fn read(process: &Process<'_>, geometry: &Geometry) -> u64 {
    let mut bytes = [0xff; 8 * WORDS as usize];
    let version = slots::read(process, geometry, 0, &mut bytes, Wait::Wait).expect("it reads");
    for word in 0..WORDS {
        let at = 8 * word as usize;
        let found = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        assert_eq!(
            found,
            expected(version, word),
            "word {word} of version {version}"
        );
    }
    version
}

#[derive(Clone, Copy)]
enum First {
    /// Publishes this many versions, unless it dies first.
    Publishes(u32),
    /// Publishes one version, and drops another.
    Drops,
}

#[derive(Clone, Copy)]
struct Case {
    slots: u32,
    /// Versions that exist before any reader starts.
    before: u32,
    first: First,
    readers: usize,
    reads: usize,
    preemptions: usize,
}

/// Runs every order for a first writer that dies after `steps` stores, and for a second one after
/// it. Returns whether the first one finished.
fn check(case: Case, steps: u32) -> bool {
    let survived = std::sync::Arc::new(Mutex::new(false));
    let report = survived.clone();
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(case.preemptions);
    model.check(move || {
        let geometry = Geometry::new(8 * WORDS, case.slots).expect("it is small");
        let words = Arc::new(Words::new(&geometry));
        for _ in 0..case.before {
            publish(&Process::immortal(&words), &geometry).expect("no writer dies here");
        }
        let readers: Vec<_> = (0..case.readers)
            .map(|_| {
                let words = words.clone();
                loom::thread::spawn(move || {
                    let process = Process::immortal(&words);
                    let mut newest = 0;
                    for _ in 0..case.reads {
                        let version = read(&process, &geometry);
                        assert!(version >= newest, "version {version} after {newest}");
                        newest = version;
                    }
                })
            })
            .collect();
        let dying = Process {
            words: &words,
            steps_left: Cell::new(Some(steps)),
        };
        let outcome = match case.first {
            First::Publishes(n) => (0..n).try_for_each(|_| publish(&dying, &geometry).map(drop)),
            First::Drops => begin_and_drop(&dying, &geometry),
        };
        *report.lock().expect("no thread panics") |= outcome.is_ok();
        let heir = Process::immortal(&words);
        let left = slots::head(&heir, &geometry)
            .expect("it is complete")
            .version;
        assert_eq!(read(&heir, &geometry), left);
        let version = publish(&heir, &geometry).expect("no writer dies here");
        assert_eq!((version, read(&heir, &geometry)), (left + 1, left + 1));
        for reader in readers {
            reader.join().expect("it did not panic");
        }
    });
    *survived.lock().expect("no thread panics")
}

/// Checks every death, up to the writer that does not die.
fn check_all_deaths(case: Case) {
    let survived = (0..200).find(|steps| check(case, *steps));
    assert!(survived.is_some(), "the writer always died");
}

#[test]
fn a_small_change_of_two_slots() {
    check_all_deaths(Case {
        slots: 2,
        before: 2,
        first: First::Publishes(1),
        readers: 1,
        reads: 2,
        preemptions: 2,
    });
}

#[test]
fn two_small_changes_of_two_slots() {
    check_all_deaths(Case {
        slots: 2,
        before: 2,
        first: First::Publishes(2),
        readers: 1,
        reads: 1,
        preemptions: 2,
    });
}

#[test]
fn small_changes_of_three_slots() {
    check_all_deaths(Case {
        slots: 3,
        before: 3,
        first: First::Publishes(2),
        readers: 1,
        reads: 2,
        preemptions: 2,
    });
}

#[test]
fn small_changes_and_two_readers() {
    for slots in [2, 3] {
        check_all_deaths(Case {
            slots,
            before: slots,
            first: First::Publishes(1),
            readers: 2,
            reads: 1,
            preemptions: 1,
        });
    }
}

#[test]
fn the_first_versions_of_an_empty_block() {
    for slots in [2, 3] {
        check_all_deaths(Case {
            slots,
            before: 0,
            first: First::Publishes(2),
            readers: 1,
            reads: 2,
            preemptions: 2,
        });
    }
}

#[test]
fn a_dropped_draft_is_never_visible() {
    for (slots, before) in [(2, 0), (2, 1), (2, 2), (3, 3)] {
        check_all_deaths(Case {
            slots,
            before,
            first: First::Drops,
            readers: 1,
            reads: 2,
            preemptions: 2,
        });
    }
}
