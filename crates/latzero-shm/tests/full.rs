//! A full disk: a block that does not fit is refused with figures, and an existing block can still
//! be written completely.
//!
//! Root mounts a small file system for it; other users request more than any disk has.

#![allow(clippy::unwrap_used, reason = "these are tests, and what they share")]

mod common;

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use latzero_shm::{Access, Attachment, CreateError, Custodian};

/// Bytes of the small file system.
const SMALL: u64 = 128 * 1024;

/// A mounted file system, unmounted when this is dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    /// Mounts it; `None` if that is not permitted.
    fn new(at: &'a Path) -> Option<Mounted<'a>> {
        let size = format!("size={SMALL}");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(at)
            .stderr(Stdio::null())
            .status();
        done.is_ok_and(|status| status.success())
            .then_some(Mounted(at))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

fn no_space(directory: &Path, name: &str, size: u64) -> (u64, u64) {
    let open = File::open(directory).unwrap();
    let description = common::description(size, 2, true);
    let error = Custodian::create_persistent(open.as_fd(), name, &description).unwrap_err();
    let CreateError::NoSpace { needed, free } = error else {
        panic!("{error}")
    };
    assert_eq!(needed, description.geometry.total());
    assert!(free < needed, "{free} of {needed}");
    (needed, free)
}

#[test]
fn more_than_any_disk_has_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (needed, free) = no_space(directory.path(), "huge", 1 << 40);
    assert_eq!(needed, (4 << 40) + 4096);
    assert!(free > 0);
    // The caller must remove the rest of it, which uses no space.
    let left = std::fs::metadata(directory.path().join("huge")).unwrap();
    assert_eq!(left.len(), 0);
}

#[test]
fn a_block_on_a_full_disk_can_be_written() {
    let directory = tempfile::tempdir().unwrap();
    let Some(_mounted) = Mounted::new(directory.path()) else {
        return; // the other test covers this case
    };
    let path = directory.path();
    assert_eq!(no_space(path, "large", SMALL).1, SMALL);
    std::fs::remove_file(path.join("large")).unwrap();

    let open = File::open(path).unwrap();
    let description = common::description(10_000, 3, true);
    let block = Custodian::create_persistent(open.as_fd(), "block", &description).unwrap();
    let mut rest = File::create(path.join("rest")).unwrap();
    let full = loop {
        if let Err(error) = rest.write_all(&[1; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    assert_eq!(no_space(path, "another", 1).1, 0);

    let file = common::descriptor(&block, Access::Write);
    let expected = common::expected(&block, Access::Write);
    let client = Arc::new(Attachment::new(file, &expected).unwrap());
    for version in (1..8).step_by(2) {
        let byte = version as u8;
        assert_eq!(block.write(0, &[byte; 10_000], None).unwrap(), version);
        let mut writing = client.begin(0).unwrap();
        writing.write(1, &[byte + 100; 9_998]).unwrap();
        assert_eq!(writing.publish().unwrap(), version + 1);
        let mut bytes = vec![byte + 100; 10_000];
        (bytes[0], bytes[9_999]) = (byte, byte);
        assert_eq!(client.read().unwrap(), (bytes, version + 1));
        assert_eq!(block.sync().unwrap(), version + 1);
    }
    block.check().unwrap();
}
