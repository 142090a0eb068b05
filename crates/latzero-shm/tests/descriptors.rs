//! What the kernel and the checks refuse: other files, other modes, other sizes, shrinking, too
//! many descriptors.

#![allow(clippy::unwrap_used, reason = "these are tests, and what they share")]

mod common;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use latzero_shm::fds::{DESCRIPTORS_MAX, recv_with_fds, send_with_fds};
use latzero_shm::{
    Access, AttachError, Attachment, CreateError, Custodian, Fault, HeaderError, OpenError,
    ReadError, WriteError,
};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, ftruncate,
    memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mprotect, munmap};

fn refused(file: OwnedFd, expected: &latzero_shm::Expected) -> AttachError {
    Attachment::new(file, expected).expect_err("it is not the block that was announced")
}

#[test]
fn seals_are_enforced() {
    let (block, _) = common::block(5000, 2, false);
    let seals = fcntl_get_seals(block.file()).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    let total = block.description().geometry.total();
    assert_eq!(ftruncate(block.file(), total - 1), Err(Errno::PERM));
    assert_eq!(ftruncate(block.file(), total + 1), Err(Errno::PERM));
    let more = fcntl_add_seals(block.file(), SealFlags::WRITE);
    assert_eq!(more, Err(Errno::PERM));
}

#[test]
#[allow(
    unsafe_code,
    reason = "the kernel is to refuse a writable mapping, which only a mapping shows"
)]
fn a_read_only_descriptor_does_not_write() {
    let (block, _) = common::block(5000, 2, false);
    let file = &block.lend(Access::Read).unwrap();
    let map = |protection| {
        // SAFETY: no address is asked for, so nothing that is mapped already is replaced.
        unsafe {
            mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }
    };
    let writable = map(ProtFlags::READ | ProtFlags::WRITE);
    assert_eq!(writable.unwrap_err(), Errno::ACCESS);
    let readable = map(ProtFlags::READ).unwrap();
    // SAFETY: the range is the mapping just made, which nothing else uses.
    unsafe {
        let both = MprotectFlags::READ | MprotectFlags::WRITE;
        assert_eq!(mprotect(readable, 4096, both), Err(Errno::ACCESS));
        munmap(readable, 4096).unwrap();
    }
    assert_eq!(ftruncate(file, 0), Err(Errno::INVAL));
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(file, hole, 0, 4096), Err(Errno::BADF));
    assert_eq!(rustix::io::pwrite(file, &[1], 0), Err(Errno::BADF));

    let reader = common::attach(&block, Access::Read);
    assert!(matches!(reader.begin(0), Err(WriteError::ReadOnly)));
    assert_eq!(reader.read().unwrap(), (vec![0; 5000], 0));
}

#[test]
fn another_access_mode_is_refused() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(10, 2, is_persistent);
        for (given, announced) in [(Access::Read, Access::Write), (Access::Write, Access::Read)] {
            let file = common::descriptor(&block, given);
            let error = refused(file, &common::expected(&block, announced));
            assert!(matches!(error, AttachError::AccessMode), "{error}");
        }
    }
}

#[test]
fn files_other_than_blocks_are_refused() {
    let (block, _) = common::block(10, 2, false);
    let expected = common::expected(&block, Access::Write);
    let (socket, _other) = UnixStream::pair().unwrap();
    assert!(matches!(
        refused(socket.into(), &expected),
        AttachError::NotAFile
    ));
    let (pipe, _end) = io::pipe().unwrap();
    assert!(matches!(
        refused(pipe.into(), &expected),
        AttachError::NotAFile
    ));
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap();
    assert!(matches!(
        refused(open.into(), &expected),
        AttachError::NotAFile
    ));

    let total = expected.geometry.total();
    let length = |length| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        OwnedFd::from(file)
    };
    for wrong in [0, total - 1, total + 1] {
        let error = refused(length(wrong), &expected);
        assert!(
            matches!(error, AttachError::Length { length, .. } if length == wrong),
            "{error}"
        );
    }
    assert!(matches!(
        refused(length(total), &expected),
        AttachError::NotSealed
    ));
    let persistent = latzero_shm::Expected {
        is_persistent: true,
        ..expected
    };
    let error = refused(length(total), &persistent);
    assert!(
        matches!(error, AttachError::Header(HeaderError::Magic)),
        "{error}"
    );
}

#[test]
fn memory_that_can_still_shrink_is_refused() {
    let (block, _) = common::block(10, 2, false);
    let expected = common::expected(&block, Access::Write);
    let all = [SealFlags::SHRINK, SealFlags::GROW, SealFlags::SEAL];
    for missing in all {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("lz:test", flags).unwrap();
        ftruncate(&file, expected.geometry.total()).unwrap();
        rustix::io::pwrite(&file, &block.description().encode(), 0).unwrap();
        for seal in all {
            if seal != missing {
                fcntl_add_seals(&file, seal).unwrap();
            }
        }
        assert!(matches!(refused(file, &expected), AttachError::NotSealed));
    }
}

#[test]
fn another_block_is_refused() {
    let (block, _) = common::block(10, 2, false);
    let expected = common::expected(&block, Access::Write);
    let other_generation = latzero_shm::Expected {
        generation: 4,
        ..expected.clone()
    };
    let error = refused(common::descriptor(&block, Access::Write), &other_generation);
    assert!(matches!(
        error,
        AttachError::Header(HeaderError::Unexpected("generation"))
    ));
    let mut other_geometry = expected.clone();
    // The number of pages is the same, so only the header shows the difference.
    other_geometry.geometry.size += 1;
    let error = refused(common::descriptor(&block, Access::Write), &other_geometry);
    assert!(matches!(
        error,
        AttachError::Header(HeaderError::Unexpected("geometry"))
    ));

    rustix::io::pwrite(block.file(), &[1], 20).unwrap();
    let error = refused(common::descriptor(&block, Access::Write), &expected);
    assert!(matches!(error, AttachError::Header(HeaderError::Checksum)));
    // The custodian detects it as well, and reports this block.
    assert!(matches!(block.check(), Err(HeaderError::Checksum)));
    let error = block.write(0, &[1], None).unwrap_err();
    assert!(matches!(error, WriteError::Fault(Fault::Corrupt("header"))));
}

#[test]
fn an_overwritten_head_affects_only_its_block() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(10, 2, is_persistent);
        let client = common::attach(&block, Access::Write);
        block.set_lease(1, true).unwrap();
        block.write(0, &[1], None).unwrap();
        rustix::io::pwrite(block.file(), &[0xff; 8], 128).unwrap();
        assert!(block.check().is_err());
        assert!(block.read(0, &mut [0], None).is_err());
        assert!(block.write(0, &[1], None).is_err());
        assert!(client.read().is_err());
        assert!(client.begin(1).is_err());
        assert_eq!(client.version(), 0);
    }
}

#[test]
fn a_shortened_file_is_an_error_and_no_signal() {
    let (block, _directory) = common::block(10_000, 2, true);
    let client = common::attach(&block, Access::Write);
    let reader = common::attach(&block, Access::Read);
    block.set_lease(1, true).unwrap();
    block.write(0, &[1; 10_000], None).unwrap();
    for length in [20_000, 9_000, 4096, 100, 0] {
        let writing = client.begin(1);
        ftruncate(block.file(), length).unwrap();
        drop(writing);
        let short = |fault: &Fault| matches!(fault, Fault::Short);
        if length <= 4096 {
            let error = block.read(0, &mut [0; 10_000], None).unwrap_err();
            assert!(
                matches!(&error, ReadError::Fault(fault) if short(fault)),
                "{error}"
            );
            let error = reader.read().unwrap_err();
            assert!(
                matches!(&error, ReadError::Fault(fault) if short(fault)),
                "{error}"
            );
            assert!(reader.read_into(0, &mut [0; 10_000]).is_err());
        }
        assert!(block.check().is_err());
        if length == 0 {
            assert!(block.version().is_err());
            assert!(block.write(0, &[1], None).is_err());
            assert!(client.begin(1).is_err());
            assert_eq!(
                (reader.version(), reader.state()),
                (0, latzero_shm::State::Corrupt)
            );
        }
        // The results do not matter, only that each operation returns.
        let timeout = Some(std::time::Duration::ZERO);
        let _ = (
            reader.wait(0, timeout),
            block.sync(),
            block.set_lease(1, true),
            reader.view().is_ok(),
        );
    }
}

#[test]
fn files_that_are_not_blocks_are_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap();
    let path = |name: &str| directory.path().join(name);
    let good = common::description(100, 2, true);
    let shared = common::description(100, 2, false);
    let total = usize::try_from(good.geometry.total()).unwrap();
    let file = |bytes: &[u8], length: usize| {
        let mut bytes = bytes.to_vec();
        bytes.resize(length, 0);
        bytes
    };
    std::fs::write(path("empty"), []).unwrap();
    std::fs::write(path("zeros"), vec![0; total]).unwrap();
    std::fs::write(path("short"), file(&good.encode(), total - 1)).unwrap();
    std::fs::write(path("long"), file(&good.encode(), total + 1)).unwrap();
    std::fs::write(path("shared"), file(&shared.encode(), total)).unwrap();
    std::fs::create_dir(path("directory")).unwrap();
    std::fs::write(path("good"), file(&good.encode(), total)).unwrap();
    std::os::unix::fs::symlink("good", path("link")).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::from(0o600);
    rustix::fs::mknodat(&open, "fifo", fifo, mode, 0).unwrap();
    for name in ["empty", "zeros", "shared", "fifo"] {
        let error = Custodian::open_persistent(open.as_fd(), name).unwrap_err();
        assert!(matches!(error, OpenError::Header(_)), "{name}: {error}");
    }
    for name in ["short", "long"] {
        let error = Custodian::open_persistent(open.as_fd(), name).unwrap_err();
        assert!(matches!(error, OpenError::Length { .. }), "{name}: {error}");
    }
    for name in ["directory", "link", "missing"] {
        let error = Custodian::open_persistent(open.as_fd(), name).unwrap_err();
        assert!(matches!(error, OpenError::Io(_)), "{name}: {error}");
    }
    let block = Custodian::open_persistent(open.as_fd(), "good").unwrap();
    assert_eq!(block.description(), &good);
    assert_eq!(block.write(3, b"here", None).unwrap(), 1);
    assert_eq!(block.sync().unwrap(), 1);
    drop(block);
    let block = Custodian::open_persistent(open.as_fd(), "good").unwrap();
    let mut bytes = [0; 4];
    assert_eq!(block.read(3, &mut bytes, None).unwrap(), 1);
    assert_eq!(&bytes, b"here");
}

#[test]
fn a_file_is_created_once() {
    let directory = tempfile::tempdir().unwrap();
    let open = File::open(directory.path()).unwrap();
    let description = common::description(100, 2, true);
    Custodian::create_persistent(open.as_fd(), "block", &description).unwrap();
    let error = Custodian::create_persistent(open.as_fd(), "block", &description).unwrap_err();
    let CreateError::System { source, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(source.kind(), ErrorKind::AlreadyExists);
}

#[test]
fn more_than_available_is_refused_with_figures() {
    let description = common::description(1 << 40, 4, false);
    let error = Custodian::create_shared("lz:test", &description).unwrap_err();
    let CreateError::NoSpace { needed, free } = error else {
        panic!("{error}")
    };
    assert_eq!(needed, (4 << 40) + 4096);
    assert!(free > 0 && free < needed);
}

/// Sends descriptors; returns the result and those that were received.
fn travel(sent: usize, max: usize) -> (io::Result<usize>, Vec<OwnedFd>) {
    let (a, b) = UnixStream::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let fds: Vec<BorrowedFd<'_>> = (0..sent).map(|_| file.as_fd()).collect();
    assert_eq!(send_with_fds(&a, b"hello", &fds).unwrap(), 5);
    let mut got = Vec::new();
    let outcome = recv_with_fds(&b, &mut [0; 16], &mut got, max);
    (outcome, got)
}

#[test]
fn descriptors_travel() {
    for (sent, max) in [
        (0, 0),
        (0, 4),
        (1, 1),
        (2, 2),
        (2, 4),
        (DESCRIPTORS_MAX, DESCRIPTORS_MAX),
    ] {
        let (outcome, got) = travel(sent, max);
        assert_eq!((outcome.unwrap(), got.len()), (5, sent));
        for fd in got {
            let flags = rustix::io::fcntl_getfd(&fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
    }
}

#[test]
fn more_descriptors_than_taken_are_all_closed() {
    // Each is one end of a pipe: when the other end reports the end, all were closed.
    for (sent, max) in [(1, 0), (2, 1), (DESCRIPTORS_MAX, 3)] {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut from, to) = io::pipe().unwrap();
        let fds: Vec<BorrowedFd<'_>> = (0..sent).map(|_| to.as_fd()).collect();
        send_with_fds(&a, b"hello", &fds).unwrap();
        drop(fds);
        drop(to);
        let mut got = Vec::new();
        let error = recv_with_fds(&b, &mut [0; 16], &mut got, max).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        assert!(got.is_empty());
        assert_eq!(io::copy(&mut from, &mut io::sink()).unwrap(), 0);
    }
}

#[test]
fn truncated_control_data_closes_all_descriptors() {
    // More than the receiver has room for: the kernel truncates the list and sets MSG_CTRUNC.
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let (a, b) = UnixStream::pair().unwrap();
    let (mut from, to) = io::pipe().unwrap();
    let fds = vec![to.as_fd(); DESCRIPTORS_MAX + 9];
    let mut space = [std::mem::MaybeUninit::uninit(); 1024];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(
        &a,
        &[io::IoSlice::new(b"x")],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    drop(fds);
    drop(to);
    let mut got = Vec::new();
    let error = recv_with_fds(&b, &mut [0; 16], &mut got, 1000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(got.is_empty());
    assert_eq!(io::copy(&mut from, &mut io::sink()).unwrap(), 0);
    let too_many = vec![b.as_fd(); DESCRIPTORS_MAX + 1];
    assert!(send_with_fds(&a, b"x", &too_many).is_err());
}

#[test]
fn holes_that_a_writer_punches_read_as_zeros() {
    // Large enough to be copied through its own mapping.
    let (block, _) = common::block(1 << 20, 2, false);
    block.write(0, &vec![7; 1 << 20], None).unwrap();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(block.file(), flags, 4096, 2 << 20).unwrap();
    let mut bytes = vec![1; 1 << 20];
    block.read(0, &mut bytes, None).unwrap();
    assert!(bytes.iter().all(|b| *b == 0));
    block.write(0, &vec![8; 1 << 20], None).unwrap();
    block.read(0, &mut bytes, None).unwrap();
    assert!(bytes.iter().all(|b| *b == 8));
}
