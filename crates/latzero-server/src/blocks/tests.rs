//! Tests of moves, removals and flushes of persistent blocks that overlap.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use tempfile::TempDir;

use super::*;

fn blocks() -> (Blocks, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (
        Blocks::new(directory.path(), Rows::default()).unwrap(),
        directory,
    )
}

fn making(generation: u64, from: Option<u64>) -> Making {
    let size = 10 + generation;
    let record = json!({"generation": generation, "size": size, "slots": 2, "spares": 2});
    Making {
        storage: StorageId(generation),
        pool: PoolName::new("p").unwrap(),
        block: BlockId::new("b").unwrap(),
        kind: Kind::Persistent,
        geometry: latzero_fabric::memory::Geometry::new(Kind::Persistent, size, 2),
        generation,
        from: from.map(StorageId),
        record: record.to_string(),
    }
}

fn write(blocks: &Blocks, data: &[u8]) {
    let write = BlockWrite {
        offset: 0,
        data,
        if_version: None,
        expected: None,
        copied_max: 0,
    };
    assert_eq!(blocks.write(StorageId(1), &write), Ok(Written::Version(1)));
}

/// The files that are there, but for the marks of removed blocks, which wait for a database.
fn files(directory: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(directory.path()).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.retain(|name| !name.ends_with(".gone"));
    names.sort();
    names
}

#[test]
fn a_block_that_is_removed_while_it_moves_does_not_come_back() {
    let (blocks, directory) = blocks();
    blocks.make(&making(1, None)).unwrap();
    let from = blocks.found(StorageId(1)).unwrap();
    let making = making(2, Some(1));
    // The copy is made; then the block is removed, and the record of its new generation is written.
    let stored = blocks.build(&making, Some(&from)).unwrap();
    blocks.drop_storage(StorageId(1), false);
    let refusal = blocks.persist(&making, Some(&from), &stored).unwrap_err();
    assert_eq!(refusal.code, Code::NoBlock);
    assert_eq!(files(&directory), [""; 0]);
    assert_eq!(blocks.make(&making).unwrap_err().code, Code::NoBlock);
    assert_eq!(files(&directory), [""; 0]);
}

#[test]
fn a_move_leaves_the_new_generation_and_its_record() {
    let (blocks, directory) = blocks();
    blocks.make(&making(1, None)).unwrap();
    write(&blocks, b"bytes");
    blocks.make(&making(2, Some(1))).unwrap();
    blocks.drop_storage(StorageId(1), true);
    let [bytes, record] = <[String; 2]>::try_from(files(&directory)).unwrap();
    assert!(bytes.ends_with(".2.lzb"), "{bytes}");
    let record = std::fs::read_to_string(directory.path().join(record)).unwrap();
    assert_eq!(record, making(2, None).record);
    let mut content = [0; 6];
    blocks.read(StorageId(2), 0, &mut content, Some(1)).unwrap();
    assert_eq!(&content, b"bytes\0");
}

#[test]
fn nothing_is_left_of_a_move_that_fails() {
    let (blocks, directory) = blocks();
    blocks.make(&making(1, None)).unwrap();
    write(&blocks, b"bytes");
    let before = files(&directory);
    let path = directory.path().join(&before[0]);
    let length = std::fs::metadata(&path).unwrap().len();
    // Its content can't be copied.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(4096).unwrap();
    blocks.make(&making(2, Some(1))).unwrap_err();
    assert_eq!(files(&directory), before);
    // Nor can its record be written, while something stands in its place.
    file.set_len(length).unwrap();
    let record = directory.path().join(&before[1]);
    let kept = std::fs::read(&record).unwrap();
    let in_the_way = directory.path().join(format!("{}.new", before[1]));
    std::fs::create_dir(&in_the_way).unwrap();
    let refusal = blocks.make(&making(2, Some(1))).unwrap_err();
    assert!(refusal.message.contains("cannot write"), "{refusal:?}");
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(files(&directory), before);
    assert_eq!(std::fs::read(&record).unwrap(), kept);
    // And the next one goes well.
    blocks.make(&making(2, Some(1))).unwrap();
}

#[test]
fn the_previous_record_applies_again_if_the_new_one_is_not_durable() {
    let (blocks, directory) = blocks();
    blocks.make(&making(1, None)).unwrap();
    let from = blocks.found(StorageId(1)).unwrap();
    let [bytes, record] = <[String; 2]>::try_from(files(&directory)).unwrap();
    let read = || std::fs::read_to_string(directory.path().join(&record)).unwrap();
    let before = read();
    let to = making(2, Some(1));
    let stored = blocks.build(&to, Some(&from)).unwrap();
    let names = stored.names.clone().unwrap();
    let kept = blocks.persist_record(&names, &to.record, Some(&from));
    kept.unwrap().unwrap();
    assert_ne!(read(), before);
    blocks
        .restore_record(&names, Some(&before), Some(&from))
        .unwrap();
    assert_eq!(read(), before);
    // But not where the block was removed in between.
    blocks.drop_storage(StorageId(1), false);
    blocks
        .restore_record(&names, Some(&before), Some(&from))
        .unwrap();
    blocks.files.abandon(&names);
    assert_eq!(files(&directory), [""; 0], "{bytes}");
}

#[test]
fn matching_waiters_leave_the_queue() {
    let mut row: VecDeque<(u32, &str)> = [(1, "a"), (2, "b"), (1, "c"), (3, "d"), (1, "e")].into();
    let taken = workers::take_where(&mut row, |(block, _)| *block == 1);
    assert_eq!(taken, [(1, "a"), (1, "c"), (1, "e")]);
    assert_eq!(row, [(2, "b"), (3, "d")]);
}
