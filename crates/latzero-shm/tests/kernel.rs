//! More of what the kernel and the checks refuse, in addition to `descriptors.rs`: read-only files,
//! devices, write-only descriptors, headers that are complete but wrong, and files truncated under
//! a draft or a sleeper.

#![allow(clippy::unwrap_used, reason = "these are tests, and what they share")]

mod common;

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use latzero_shm::fds::{recv_with_fds, send_with_fds, try_recv_with_fds};
use latzero_shm::{
    Access, AttachError, Attachment, Custodian, Expected, HeaderError, State, Waited,
};
use rustix::fs::{
    FallocateFlags, Mode, OFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_setfl, fstat,
    ftruncate,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mprotect, munmap};

fn refused(file: OwnedFd, expected: &Expected) -> AttachError {
    Attachment::new(file, expected).expect_err("it is not the block that was announced")
}

/// Opens the block's file again.
fn reopened(block: &Custodian, flags: OFlags) -> OwnedFd {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", block.file().as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
#[allow(
    unsafe_code,
    reason = "the kernel is to refuse a writable mapping, which only a mapping shows"
)]
fn a_reader_changes_neither_memory_nor_file() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(5000, 2, is_persistent);
        block.write(0, &[7; 5000], None).unwrap();
        let file = &block.lend(Access::Read).unwrap();
        let total = block.description().geometry.total();
        let length = usize::try_from(total).unwrap();
        let map = |protection| {
            // SAFETY: no address is asked for, so nothing that is mapped already is replaced.
            unsafe {
                let shared = MapFlags::SHARED;
                mmap(std::ptr::null_mut(), length, protection, shared, file, 0)
            }
        };
        for protection in [ProtFlags::WRITE, ProtFlags::READ | ProtFlags::WRITE] {
            assert_eq!(map(protection).unwrap_err(), Errno::ACCESS);
        }
        let readable = map(ProtFlags::READ).unwrap();
        // SAFETY: the range is the mapping just made, which nothing else uses.
        unsafe {
            let both = MprotectFlags::READ | MprotectFlags::WRITE;
            assert_eq!(mprotect(readable, length, both), Err(Errno::ACCESS));
            let removed = madvise(readable, length, Advice::LinuxRemove);
            assert_eq!(removed, Err(Errno::ACCESS));
            munmap(readable, length).unwrap();
        }
        for length in [0, total - 1, total + 1] {
            assert_eq!(ftruncate(file, length), Err(Errno::INVAL));
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(file, hole, 0, 4096), Err(Errno::BADF));
        assert_eq!(rustix::io::pwrite(file, &[1], 0), Err(Errno::BADF));
        if !is_persistent {
            let sealed = fcntl_add_seals(file, SealFlags::WRITE);
            assert_eq!(sealed, Err(Errno::PERM));
        }
        block.check().unwrap();
        let reader = common::attach(&block, Access::Read);
        assert_eq!(reader.read().unwrap(), (vec![7; 5000], 1));
    }
}

#[test]
fn a_writer_changes_content_and_never_the_length() {
    let (block, _) = common::block(5000, 2, false);
    block.write(0, &[7; 5000], None).unwrap();
    let reader = common::attach(&block, Access::Read);
    let file = common::descriptor(&block, Access::Write);
    let total = block.description().geometry.total();
    for length in [0, 1, 4096, total - 1, total + 1, total * 2] {
        assert_eq!(ftruncate(&file, length), Err(Errno::PERM));
    }
    let beyond = fallocate(&file, FallocateFlags::empty(), total, 4096);
    assert_eq!(beyond, Err(Errno::PERM));
    assert_eq!(rustix::io::pwrite(&file, &[1], total), Err(Errno::PERM));
    // A hole is allowed and reads as zeros: the pages are allocated again when they are touched.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, hole, 4096, total - 4096).unwrap();
    assert_eq!(fstat(&file).unwrap().st_size as u64, total);
    assert_eq!(reader.read().unwrap(), (vec![0; 5000], 1));
    assert_eq!(block.write(0, &[8; 5000], None).unwrap(), 2);
    assert_eq!(reader.read().unwrap(), (vec![8; 5000], 2));
    // Also the header's page: the block is gone then, and every user gets an error.
    fallocate(&file, hole, 0, total).unwrap();
    assert!(matches!(block.check(), Err(HeaderError::Magic)));
    assert!(block.write(0, &[9], None).is_err());
    assert_eq!(reader.read().unwrap(), (vec![0; 5000], 0));
}

#[test]
fn flags_that_a_client_sets_on_its_descriptor_do_not_affect_the_server() {
    // Flags belong to the open file, which a descriptor that was passed shares with the one it was
    // made from (fcntl(2)): with O_APPEND each pwrite(2) would go to the end of the file.
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(5000, 2, is_persistent);
        let total = block.description().geometry.total();
        let file = common::descriptor(&block, Access::Write);
        fcntl_setfl(&file, OFlags::APPEND | OFlags::NONBLOCK).unwrap();
        for version in 1..=3 {
            assert_eq!(block.write(0, &[7; 5000], None).unwrap(), version);
            assert_eq!(block.version().unwrap(), version);
        }
        let mut bytes = [0; 5000];
        assert_eq!(block.read(0, &mut bytes, None).unwrap(), 3);
        assert_eq!(bytes, [7; 5000]);
        assert_eq!(fstat(&file).unwrap().st_size as u64, total);
    }
}

#[test]
fn devices_and_write_only_descriptors_are_refused() {
    let (block, _) = common::block(10, 2, false);
    for access in [Access::Read, Access::Write] {
        for is_persistent in [false, true] {
            let expected = Expected {
                is_persistent,
                ..common::expected(&block, access)
            };
            for device in ["/dev/null", "/dev/zero"] {
                let file = File::options().read(true).write(true).open(device).unwrap();
                let error = refused(file.into(), &expected);
                assert!(matches!(error, AttachError::NotAFile), "{error}");
            }
        }
        let error = refused(
            reopened(&block, OFlags::WRONLY),
            &common::expected(&block, access),
        );
        assert!(matches!(error, AttachError::AccessMode), "{error}");
        // A descriptor of a path, which can neither be read nor written (open(2), O_PATH).
        let error = refused(
            reopened(&block, OFlags::PATH),
            &common::expected(&block, access),
        );
        let is_refused = matches!(
            error,
            AttachError::AccessMode | AttachError::NotSealed | AttachError::Io(_)
        );
        assert!(is_refused, "{error}");
    }
}

#[test]
fn complete_but_wrong_headers_are_refused() {
    let good = common::description(10, 2, true);
    let write = |change: &dyn Fn(&mut [u8])| {
        let mut header = good.encode().to_vec();
        change(&mut header);
        let sum = crc32c::crc32c(&header[..124]);
        header[124..].copy_from_slice(&sum.to_le_bytes());
        let file = tempfile::tempfile().unwrap();
        file.set_len(good.geometry.total()).unwrap();
        rustix::io::pwrite(&file, &header, 0).unwrap();
        OwnedFd::from(file)
    };
    let expected = Expected {
        generation: good.generation,
        geometry: good.geometry,
        is_persistent: true,
        access: Access::Write,
    };
    Attachment::new(write(&|_| {}), &expected).unwrap();
    let cases: [(usize, u8, HeaderError); 11] = [
        (7, b'2', HeaderError::Magic),
        (8, 3, HeaderError::Version(3)),
        (13, 0x20, HeaderError::Field("length")),
        (48, 0, HeaderError::Field("generation")),
        (48, 4, HeaderError::Unexpected("generation")),
        (57, 0x11, HeaderError::Field("total length")),
        (64, 0, HeaderError::Field("total length")),
        (64, 11, HeaderError::Unexpected("geometry")),
        (72, 1, HeaderError::Field("slot offset")),
        (80, 1, HeaderError::Field("slot stride")),
        (88, 5, HeaderError::Field("size")),
    ];
    for (at, byte, why) in cases {
        let error = refused(write(&|header| header[at] = byte), &expected);
        let AttachError::Header(found) = &error else {
            panic!("byte {at}: {error}")
        };
        assert_eq!(*found, why, "byte {at}");
    }
    for (flags, why) in [
        (0, HeaderError::Unexpected("kind")),
        (6, HeaderError::Field("flags")),
    ] {
        let error = refused(write(&|header| header[92] = flags), &expected);
        assert!(
            matches!(&error, AttachError::Header(found) if *found == why),
            "{error}"
        );
    }
}

#[test]
fn a_file_shortened_under_a_draft_is_an_error_and_no_signal() {
    for length in [12_288, 9_000, 4096, 200, 0] {
        for slots in 1..=3 {
            let (block, _directory) = common::block(10_000, slots, true);
            let client = common::attach(&block, Access::Write);
            let reader = common::attach(&block, Access::Read);
            block.write(0, &[1; 10_000], None).unwrap();
            let mut writing = client.begin(0).unwrap();
            writing.write(5000, &[2; 10]).unwrap();
            ftruncate(block.file(), length).unwrap();
            // The results do not matter, only that each operation returns; a write past the end
            // extends the file again.
            let mut own = vec![0; 10_000];
            let _ = writing.read_into(0, &mut own);
            let _ = writing.write(1, &[3; 9_999]);
            let _ = writing.fill(0, 10_000, 4);
            if length == 0 {
                assert!(client.begin(0).is_err());
            }
            let published = writing.publish();
            for outcome in [
                reader.read().map(drop),
                block.read(0, &mut own, None).map(drop),
            ] {
                // Bytes of a valid version, or an error.
                assert!(published.is_ok() || length > 4096 || outcome.is_err());
            }
            let _ = (block.check(), block.sync(), block.set_state(State::Closed));
        }
    }
}

#[test]
fn waiters_on_a_deleted_file_wake_up() {
    let (block, _directory) = common::block(100, 2, true);
    block.write(0, &[1], None).unwrap();
    let readers: Vec<_> = (0..3)
        .map(|_| common::attach(&block, Access::Read))
        .collect();
    thread::scope(|scope| {
        let sleepers: Vec<_> = readers
            .iter()
            .map(|reader| scope.spawn(|| reader.wait(1, Some(Duration::from_secs(60)))))
            .collect();
        ftruncate(block.file(), 0).unwrap();
        for sleeper in sleepers {
            assert_eq!(sleeper.join().unwrap(), Waited::Closed);
        }
    });
}

#[test]
fn all_waiters_are_woken_at_the_end() {
    for is_persistent in [false, true] {
        for (state, expected) in [
            (State::Superseded, Waited::Superseded),
            (State::Closed, Waited::Closed),
            (State::Corrupt, Waited::Closed),
        ] {
            let (block, _directory) = common::block(100, 2, is_persistent);
            let readers: Vec<_> = (0..4)
                .map(|_| common::attach(&block, Access::Read))
                .collect();
            thread::scope(|scope| {
                let sleepers: Vec<_> = readers
                    .iter()
                    .map(|reader| scope.spawn(|| reader.wait(0, None)))
                    .collect();
                block.set_state(state).unwrap();
                for sleeper in sleepers {
                    assert_eq!(sleeper.join().unwrap(), expected);
                }
            });
        }
    }
}

#[test]
fn descriptors_come_with_the_bytes_they_were_sent_with() {
    let (a, b) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut got = Vec::new();
    let nothing = try_recv_with_fds(&b, &mut [0; 8], &mut got, 8).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    send_with_fds(&a, b"one", &[file.as_fd()]).unwrap();
    send_with_fds(&a, b"two", &[file.as_fd(), file.as_fd()]).unwrap();
    send_with_fds(&a, b"three", &[]).unwrap();
    drop(a);
    // A read may contain the end of one message and the start of the next; the descriptors belong
    // to the message that starts in it.
    let (mut text, mut counts) = (Vec::new(), Vec::new());
    loop {
        let mut buffer = [0; 2];
        let before = got.len();
        let n = recv_with_fds(&b, &mut buffer, &mut got, 2).unwrap();
        if n == 0 {
            break;
        }
        if got.len() > before {
            counts.push((text.len()..text.len() + n, got.len() - before));
        }
        text.extend_from_slice(&buffer[..n]);
    }
    assert_eq!(text, b"onetwothree");
    let [(first, 1), (second, 2)] = &counts[..] else {
        panic!("{counts:?}")
    };
    assert!(first.contains(&0) && second.contains(&3), "{counts:?}");
}
