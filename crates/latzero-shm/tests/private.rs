//! Private mappings: what is written there by mistake reaches nobody.

#![allow(
    unsafe_code,
    reason = "there is no other way to write through a pointer"
)]

mod common;

use latzero_shm::{Access, AttachError};

const SIZE: usize = 10_000;

/// A byte of a private mapping.
fn load(start: *mut u8, at: usize) -> u8 {
    // SAFETY: callers pass the start of `SIZE` mapped bytes, and an offset among them.
    unsafe { start.add(at).read_volatile() }
}

#[test]
fn a_stray_write_reaches_nobody_and_does_not_last() {
    let (block, _) = common::block(SIZE as u64, 2, false);
    let client = common::attach(&block, Access::Read);
    block.write(0, &[1; SIZE], None).unwrap();
    let view = client.owned_view().unwrap();
    // The descriptor allows no writing.
    let mapping = view.map_private(common::descriptor(&block, Access::Read));
    let mapping = mapping.unwrap();
    let start = mapping.as_mut_ptr(&view).unwrap();
    assert_eq!(load(start, SIZE - 1), 1);
    for at in [0, 5000, SIZE - 1] {
        // SAFETY: the byte lies within the mapping, which is writable.
        unsafe { start.add(at).write_volatile(9) };
        assert_eq!(load(start, at), 9);
    }
    assert_eq!(client.read().unwrap().0, [1; SIZE]);
    // The next but one version comes to lie in the same slot.
    block.write(0, &[2; SIZE], None).unwrap();
    block.write(0, &[3; SIZE], None).unwrap();
    let next = client.owned_view().unwrap();
    assert_eq!(mapping.as_mut_ptr(&next), Some(start));
    assert_eq!(load(start, 0), 9);
    mapping.restore(&next).unwrap();
    for at in [0, 5000, SIZE - 1] {
        assert_eq!(load(start, at), 3);
    }
}

#[test]
fn a_private_mapping_is_of_one_generation() {
    let (block, _) = common::block(SIZE as u64, 2, false);
    let (other, _) = common::block(SIZE as u64 + 5000, 2, false);
    let view = common::attach(&block, Access::Write).owned_view().unwrap();
    let next = common::attach(&other, Access::Write).owned_view().unwrap();
    let refused = view.map_private(common::descriptor(&other, Access::Read));
    assert!(matches!(refused, Err(AttachError::Length { .. })));
    let mapping = view.map_private(common::descriptor(&block, Access::Write));
    let mapping = mapping.unwrap();
    assert!(mapping.has(&view) && !mapping.has(&next));
    assert_eq!(mapping.as_mut_ptr(&next), None);
    assert!(mapping.restore(&next).is_err());
    // It outlives the block and the view.
    let start = mapping.as_mut_ptr(&view).unwrap();
    drop((block, view));
    assert_eq!(load(start, SIZE - 1), 0);
}

#[test]
fn memory_that_could_shrink_is_not_mapped() {
    let (block, _) = common::block(SIZE as u64, 2, false);
    let view = common::attach(&block, Access::Read).owned_view().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(block.description().geometry.total()).unwrap();
    let refused = view.map_private(&file);
    assert!(matches!(refused, Err(AttachError::NotSealed)));
}
