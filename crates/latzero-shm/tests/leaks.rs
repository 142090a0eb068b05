//! Nothing stays open or mapped, whatever was refused. This is the only test in its process,
//! because it counts what the process has.

#![allow(clippy::unwrap_used, reason = "these are tests, and what they share")]

mod common;

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use latzero_shm::fds::{DESCRIPTORS_MAX, recv_with_fds, send_with_fds};
use latzero_shm::{Access, Attachment, Custodian, Expected};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// The number of open descriptors, and of mapped files.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = maps
        .lines()
        .filter(|line| line.contains("(deleted)"))
        .count();
    (std::fs::read_dir("/proc/self/fd").unwrap().count(), mapped)
}

/// More descriptors than accepted, and more than the control data has room for (MSG_CTRUNC).
fn too_many_descriptors() {
    let file = tempfile::tempfile().unwrap();
    for (sent, max) in [
        (1, 0),
        (2, 1),
        (DESCRIPTORS_MAX, 1),
        (DESCRIPTORS_MAX + 9, 1000),
    ] {
        let (a, b) = UnixStream::pair().unwrap();
        let fds = vec![file.as_fd(); sent];
        let mut space = [MaybeUninit::uninit(); 1024];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [IoSlice::new(b"x")];
        sendmsg(&a, &bytes, &mut control, SendFlags::empty()).unwrap();
        let before = held();
        let mut got = Vec::new();
        assert!(recv_with_fds(&b, &mut [0; 8], &mut got, max).is_err());
        assert_eq!(held(), before, "{sent} descriptors, expected {max}");
    }
}

fn descriptors_that_are_dropped() {
    let (a, b) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let (files, mapped) = held();
    let mut got = Vec::new();
    for sent in 0..=2 {
        send_with_fds(&a, b"x", &vec![file.as_fd(); sent]).unwrap();
        recv_with_fds(&b, &mut [0; 8], &mut got, 2).unwrap();
        assert_eq!(got.len(), sent);
        assert_eq!(held(), (files + sent, mapped));
        got.clear();
    }
}

fn attachments() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(5000, 2, is_persistent);
        let before = held();
        let good = common::expected(&block, Access::Write);
        let mut bad = vec![
            Expected {
                generation: 99,
                ..good.clone()
            },
            Expected {
                access: Access::Read,
                ..good.clone()
            },
            Expected {
                is_persistent: !is_persistent,
                ..good.clone()
            },
            good.clone(),
            good.clone(),
        ];
        bad[3].geometry.size += 1;
        bad[4].geometry.slots += 1;
        for expected in bad {
            let file = common::descriptor(&block, Access::Write);
            assert!(Attachment::new(file, &expected).is_err());
            assert_eq!(held(), before);
        }
        for other in ["/dev/null", "/", "/proc/self/exe"] {
            let file = OwnedFd::from(File::open(other).unwrap());
            assert!(Attachment::new(file, &good).is_err());
            assert_eq!(held(), before);
        }
        let client = common::attach(&block, Access::Write);
        let mut writing = client.begin(0).unwrap();
        writing.write(0, &[1; 5000]).unwrap();
        drop(client); // the draft in progress keeps the block
        assert_eq!(writing.publish().unwrap(), 1);
        assert_eq!(held(), before);
    }
}

fn blocks() {
    let before = held();
    for is_persistent in [false, true] {
        // Large enough for copies through separate mappings.
        let (block, directory) = common::block(1 << 20, 3, is_persistent);
        let during = held();
        for byte in 0..5 {
            block.write(0, &vec![byte; 1 << 20], None).unwrap();
            block.write(77, &[byte; 9], None).unwrap();
        }
        block.read(0, &mut vec![0; 1 << 20], None).unwrap();
        let (other, other_directory) = common::block(2 << 20, 2, is_persistent);
        block.copy_to(&other).unwrap();
        drop((other, other_directory));
        assert_eq!(held(), during);
        drop((block, directory));
        assert_eq!(held(), before);
    }
    let huge = common::description(1 << 40, 4, false);
    assert!(Custodian::create_shared("lz:test", &huge).is_err());
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap();
    let with_directory = held();
    let huge = common::description(1 << 40, 4, true);
    assert!(Custodian::create_persistent(open.as_fd(), "huge", &huge).is_err());
    std::fs::write(directory.path().join("other"), [0; 5000]).unwrap();
    assert!(Custodian::open_persistent(open.as_fd(), "other").is_err());
    assert_eq!(held(), with_directory);
}

#[test]
fn nothing_is_left_open_or_mapped() {
    too_many_descriptors();
    descriptors_that_are_dropped();
    attachments();
    blocks();
}
