//! Tests of the files of persistent blocks: the server ends at any point, and starts again.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use latzero_shm::Geometry;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const ID: &str = "07070707070707070707070707070707";

struct Memory {
    directory: TempDir,
    files: Files,
}

impl Memory {
    fn new() -> Memory {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::open(directory.path()).unwrap();
        Memory { directory, files }
    }

    fn names(&self) -> Vec<String> {
        list(self.directory.path())
    }

    fn orphans(&self) -> Vec<String> {
        list(&self.directory.path().join(".orphans"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Bytes of a generation that are whole and have their name, and no record.
    fn bytes(&self, generation: u64) -> Names {
        let (custodian, names) = self.files.create(&description(generation)).unwrap();
        custodian.write(0, &generation.to_le_bytes(), None).unwrap();
        std::fs::rename(self.path(&names.new_bytes()), self.path(&names.bytes())).unwrap();
        names
    }

    fn record(&self, generation: u64) {
        std::fs::write(self.path(&format!("{ID}.json")), record(generation)).unwrap();
    }

    /// The generation that a start loads, and its record.
    fn scan(&self) -> (Result<u64, String>, Value) {
        let mut kept = self.files.scan();
        assert_eq!(kept.len(), 1);
        let kept = kept.remove(0);
        let generation = kept.open.map(|custodian| {
            let mut content = [0; 8];
            custodian.read(0, &mut content, None).unwrap();
            u64::from_le_bytes(content)
        });
        (generation, serde_json::from_str(&kept.record).unwrap())
    }
}

fn list(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn description(generation: u64) -> Description {
    Description {
        block_id: [7; 16],
        pool_id: [1; 16],
        generation,
        geometry: Geometry::new(10 + generation, 2).unwrap(),
        is_persistent: true,
        created_unix_ns: generation,
    }
}

fn record(generation: u64) -> String {
    json!({"generation": generation, "size": 10 + generation, "slots": 2, "owner": "a"}).to_string()
}

fn bytes(generation: u64) -> String {
    format!("{ID}.{generation}.lzb")
}

#[test]
fn the_record_covers_whole_versions_wherever_a_server_ends() {
    // What is there when the server ends before the record holds, and after it.
    for (named, expected) in [(1, 1), (2, 2)] {
        let memory = Memory::new();
        memory.bytes(1);
        memory.bytes(2);
        memory.record(named);
        let (generation, record) = memory.scan();
        assert_eq!(generation.unwrap(), expected);
        assert_eq!(record["generation"], expected);
        assert_eq!(memory.names(), [bytes(expected), format!("{ID}.json")]);
    }
    // Step by step, as it is done.
    let memory = Memory::new();
    memory.bytes(1);
    memory.record(1);
    let (custodian, names) = memory.files.create(&description(2)).unwrap();
    custodian.write(0, &2u64.to_le_bytes(), None).unwrap();
    memory.files.prepare(&names, &record(2)).unwrap();
    assert!(memory.names().contains(&bytes(2)));
    assert_eq!(
        memory.files.record(&names).unwrap().unwrap(),
        record(1),
        "the data file has its name before the record is valid"
    );
    memory.files.commit(&names).unwrap();
    assert_eq!(memory.scan().0.unwrap(), 2);
}

#[test]
fn a_generation_is_deleted_only_if_its_successor_opens() {
    for spoil in [
        |path: &Path| std::fs::remove_file(path).unwrap(),
        |path: &Path| std::fs::write(path, b"LZBLOCK1, more or less").unwrap(),
        |path: &Path| {
            let file = File::options().write(true).open(path).unwrap();
            file.set_len(5000).unwrap();
        },
    ] {
        let memory = Memory::new();
        for generation in [1, 9, 10] {
            memory.bytes(generation);
        }
        memory.record(10);
        spoil(&memory.path(&bytes(10)));
        let was_there = memory.path(&bytes(10)).exists();
        let (generation, record) = memory.scan();
        assert_eq!(generation.unwrap(), 9, "the newest that opens is used");
        assert_eq!(
            record,
            json!({"generation": 9, "size": 19, "slots": 2, "owner": "a"})
        );
        assert_eq!(
            memory.names(),
            [".orphans".into(), bytes(9), format!("{ID}.json")]
        );
        let aside = [bytes(1), bytes(10)];
        assert_eq!(memory.orphans(), aside[..1 + usize::from(was_there)]);
        // And so at every start from then on.
        assert_eq!(memory.scan().0.unwrap(), 9);
    }
}

#[test]
fn a_file_is_the_block_that_its_name_says() {
    let memory = Memory::new();
    let names = memory.bytes(1);
    memory.record(2);
    std::fs::rename(memory.path(&names.bytes()), memory.path(&bytes(2))).unwrap();
    let (generation, _) = memory.scan();
    assert!(generation.unwrap_err().contains("its header is that of"));
}

#[test]
fn leftovers_of_a_failed_creation_do_not_interfere() {
    let memory = Memory::new();
    std::fs::write(memory.path(&format!("{}.new", bytes(1))), b"half").unwrap();
    std::fs::write(memory.path(&format!("{ID}.json.new")), b"{").unwrap();
    let (_, names) = memory.files.create(&description(1)).unwrap();
    memory.files.prepare(&names, &record(1)).unwrap();
    memory.files.commit(&names).unwrap();
    assert_eq!(memory.names(), [bytes(1), format!("{ID}.json")]);
    std::fs::write(memory.path(&format!("{}.new", bytes(2))), b"half").unwrap();
    assert!(memory.scan().0.is_ok());
    assert_eq!(memory.names(), [bytes(1), format!("{ID}.json")]);
}

#[test]
fn files_moved_aside_are_never_overwritten() {
    let memory = Memory::new();
    for content in ["a", "bc", "def"] {
        std::fs::write(memory.path(&bytes(1)), content).unwrap();
        assert!(memory.files.scan().is_empty());
    }
    let names = memory.orphans();
    let expected = [
        bytes(1),
        format!("{}.1", bytes(1)),
        format!("{}.2", bytes(1)),
    ];
    assert_eq!(names, expected);
    let contents = names
        .iter()
        .map(|name| std::fs::read_to_string(memory.path(".orphans").join(name)).unwrap());
    assert_eq!(contents.collect::<Vec<_>>(), ["a", "bc", "def"]);
    assert_eq!(memory.files.orphans(), (3, 6));
}
