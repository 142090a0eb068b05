//! A version that is written through a pointer.

#![allow(
    unsafe_code,
    reason = "there is no other way to write through a pointer"
)]

mod common;

use latzero_shm::{Access, WriteError};

#[test]
fn a_version_is_written_in_place() {
    let (block, _) = common::block(100, 2, false);
    let client = common::attach(&block, Access::Write);
    // With the previous version's content, and over old bytes.
    for (keeps, rest) in [(true, 7), (false, 7), (true, 7)] {
        block.write(0, &[7; 100], None).unwrap();
        let mut writing = client.begin(0).unwrap();
        let exposed = writing.expose(10, 20, keeps).unwrap();
        assert_eq!(exposed.len(), 20);
        // SAFETY: the 20 bytes are mapped while `exposed` exists, and written only by this thread
        // before they are published.
        unsafe {
            if keeps {
                assert_eq!(exposed.as_mut_ptr().read_volatile(), 7);
            }
            for i in 0..exposed.len() {
                exposed.as_mut_ptr().add(i).write_volatile(9);
            }
        }
        writing.publish().unwrap();
        let mut bytes = [rest; 100];
        bytes[10..30].fill(9);
        assert_eq!(client.read().unwrap().0, bytes);
    }
    let mut writing = client.begin(0).unwrap();
    assert!(matches!(
        writing.expose(90, 11, true),
        Err(WriteError::OutOfRange)
    ));
    drop(writing);

    let (block, _directory) = common::block(100, 2, true);
    let client = common::attach(&block, Access::Write);
    let mut writing = client.begin(0).unwrap();
    assert!(matches!(
        writing.expose(0, 1, true),
        Err(WriteError::ReadOnly)
    ));
    drop((writing, block));
}
