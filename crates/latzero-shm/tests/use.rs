//! What users of a block see: fences, dropped drafts, waits, views, states, numbers.

mod common;

use std::thread;
use std::time::Duration;

use latzero_shm::{Access, Element, ReadError, State, Waited, WriteError};

const LONG: Option<Duration> = Some(Duration::from_secs(30));

#[test]
fn a_writer_that_lost_its_lock_publishes_nothing() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(100, 2, is_persistent);
        let client = common::attach(&block, Access::Write);
        assert!(matches!(client.begin(4), Err(WriteError::LeaseLost)));
        block.set_lease(4, true).unwrap();
        let mut writing = client.begin(4).unwrap();
        writing.write(0, &[1; 100]).unwrap();
        block.set_lease(5, true).unwrap();
        assert!(matches!(writing.publish(), Err(WriteError::LeaseLost)));
        assert_eq!(client.read().unwrap(), (vec![0; 100], 0));
        let mut writing = client.begin(5).unwrap();
        writing.write(1, &[2]).unwrap();
        block.set_state(State::Superseded).unwrap();
        assert!(matches!(writing.publish(), Err(WriteError::LeaseLost)));
        assert!(matches!(client.begin(5), Err(WriteError::LeaseLost)));
        assert_eq!(client.read().unwrap(), (vec![0; 100], 0));
    }
}

#[test]
fn a_dropped_draft_leaves_the_block_unchanged() {
    let (block, _) = common::block(100, 2, false);
    let client = common::attach(&block, Access::Write);
    block.set_lease(1, true).unwrap();
    block.write(0, &[1; 100], None).unwrap();
    let mut writing = client.begin(1).unwrap();
    writing.write(10, &[2; 50]).unwrap();
    drop(writing);
    assert_eq!(client.read().unwrap(), (vec![1; 100], 1));
    assert_eq!(block.write(0, &[3], None).unwrap(), 2);
    let mut bytes = vec![1; 100];
    bytes[0] = 3;
    assert_eq!(client.read().unwrap(), (bytes, 2));
}

#[test]
fn an_attachment_has_one_draft_at_a_time() {
    let (block, _) = common::block(100, 3, false);
    let client = common::attach(&block, Access::Write);
    let first = client.begin(0).unwrap();
    assert!(matches!(client.begin(0), Err(WriteError::Contended)));
    drop(first);
    client.begin(0).unwrap().publish().unwrap();
    client.begin(0).unwrap().publish().unwrap();
}

#[test]
fn a_waiter_is_woken() {
    for is_persistent in [false, true] {
        let (block, _directory) = common::block(100, 2, is_persistent);
        let reader = common::attach(&block, Access::Read);
        let writer = common::attach(&block, Access::Write);
        assert_eq!(reader.wait(0, Some(Duration::ZERO)), Waited::TimedOut);
        thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let mut seen = vec![reader.wait(0, LONG)];
                while let Some(Waited::Newer(version)) = seen.last().copied() {
                    seen.push(reader.wait(version, Some(Duration::MAX)));
                }
                seen
            });
            // Each side waits for the other's step, so every wait really sleeps.
            block.write(0, &[1], None).unwrap();
            writer.begin(0).unwrap().publish().unwrap();
            block.set_state(State::Superseded).unwrap();
            let seen = waits.join().unwrap();
            assert!(
                seen.iter()
                    .rev()
                    .skip(1)
                    .all(|w| matches!(w, Waited::Newer(1 | 2)))
            );
            assert_eq!(seen.last(), Some(&Waited::Superseded));
        });
        block.set_state(State::Closed).unwrap();
        assert_eq!(
            (reader.wait(2, LONG), reader.state()),
            (Waited::Closed, State::Closed)
        );
        assert_eq!(reader.wait(1, LONG), Waited::Newer(2));
    }
}

#[test]
fn a_view_reports_when_it_was_overwritten() {
    let (block, _) = common::block(16, 2, false);
    let reader = common::attach(&block, Access::Read);
    let writer = common::attach(&block, Access::Write);
    let mut first = writer.begin(0).unwrap();
    first.write(0, &[9; 16]).unwrap();
    // The first version is in progress, so there is none yet.
    let empty = reader.view().unwrap();
    assert_eq!((empty.version(), empty.load::<u64>(0).unwrap()), (0, 0));
    assert!(empty.is_valid());
    first.publish().unwrap();
    assert!(
        empty.is_valid(),
        "version 0 is a version, though not the newest"
    );

    block.write(8, &1.5f64.to_le_bytes(), None).unwrap();
    let view = reader.view().unwrap();
    assert_eq!(
        (view.version(), view.len(), view.is_empty()),
        (2, 16, false)
    );
    assert_eq!(view.load::<f64>(1).unwrap().to_bits(), 1.5f64.to_bits());
    assert_eq!(view.load::<u8>(7).unwrap(), 9);
    assert!(matches!(view.load::<u64>(2), Err(ReadError::OutOfRange)));
    assert!(matches!(
        view.load::<u64>(u64::MAX),
        Err(ReadError::OutOfRange)
    ));
    assert!(!view.as_ptr().is_null() && view.as_ptr().addr().is_multiple_of(4096));
    block.write(0, &[1], None).unwrap();
    assert!(view.is_valid(), "another slot was written");
    block.write(0, &[1], None).unwrap();
    assert!(!view.is_valid());

    let (persistent, _directory) = common::block(16, 2, true);
    assert!(common::attach(&persistent, Access::Read).view().is_err());
}

#[test]
fn a_swap_succeeds_only_on_the_expected_version() {
    let (block, _) = common::block(16, 2, false);
    assert_eq!(block.write(0, &[1], Some(0)).unwrap(), 1);
    let error = block.write(0, &[2], Some(0)).unwrap_err();
    assert!(matches!(error, WriteError::Conflict { current: 1 }));
    let error = block.read(0, &mut [0], Some(2)).unwrap_err();
    assert!(matches!(error, ReadError::Version(1)));
    let error = block.cas(0, &[1, 0], &[1]).unwrap_err();
    assert!(matches!(error, WriteError::OutOfRange));
}

#[test]
fn numbers_have_numpy_s_names() {
    fn check<T: Element>(name: &str, number: T) {
        assert_eq!((T::DTYPE, T::BYTES), (name, size_of::<T>()));
        let mut bytes = vec![0; T::BYTES];
        number.to_le(&mut bytes);
        assert_eq!(T::from_le(&bytes), number);
    }
    check("|u1", 200u8);
    check("<u2", 0x1234u16);
    check("<u4", 0x1234_5678u32);
    check("<u8", u64::MAX - 1);
    check("|i1", -3i8);
    check("<i2", -300i16);
    check("<i4", i32::MIN);
    check("<i8", i64::MIN + 1);
    check("<f4", -1.25f32);
    check("<f8", 1e300f64);
}

#[test]
fn a_reader_sees_whole_versions_while_another_thread_writes() {
    let (block, _) = common::block(4097, 3, false);
    let writer = common::attach(&block, Access::Write);
    let reader = common::attach(&block, Access::Read);
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 1..=2_000u64 {
                let mut writing = writer.begin(0).unwrap();
                writing.fill(0, 4097, i as u8).unwrap();
                assert_eq!(writing.publish().unwrap(), i);
            }
        });
        let mut newest = 0;
        while newest < 2_000 {
            let (bytes, version) = reader.read().unwrap();
            assert!(version >= newest);
            newest = version;
            assert!(
                bytes.iter().all(|byte| *byte == version as u8),
                "torn at {version}"
            );
        }
    });
}

/// A backup reads a version in parts while writers continue.
#[test]
fn a_held_version_stays_unchanged() {
    for slots in [1, 2, 4] {
        let (block, _directory) = common::block(5000, slots, true);
        assert_eq!(block.hold().unwrap().unwrap().version(), 0);
        block.write(0, &[1; 5000], None).unwrap();
        let held = block.hold().unwrap().unwrap();
        assert_eq!(held.version(), 1);
        for n in 2..12 {
            block.write(0, &[n; 5000], None).unwrap();
            let mut part = [0; 400];
            held.read(400 * u64::from(n), &mut part).unwrap();
            assert_eq!(part, [1; 400], "beside version {n}");
        }
        assert!(held.read(4900, &mut [0; 101]).is_err());
        drop(held);
        assert_eq!(block.sync().unwrap(), 11);
    }
    // Memory is not flushed, so there is no version to hold.
    let (block, _) = common::block(5000, 2, false);
    assert!(block.hold().unwrap().is_none());
}

/// Each client has a separate open file, and the server keeps one.
#[test]
fn descriptors_are_open_while_they_are_lent() {
    use std::sync::Arc;
    let (block, _) = common::block(5000, 2, false);
    let first = block.lend(Access::Read).unwrap();
    let again = block.lend(Access::Read).unwrap();
    assert!(Arc::ptr_eq(&first, &again), "in transit to two clients");
    assert!(!Arc::ptr_eq(&first, &block.lend(Access::Write).unwrap()));
    let lent = Arc::downgrade(&first);
    drop((first, again));
    assert!(lent.upgrade().is_none(), "nothing stays open");
    assert!(block.lend(Access::Read).is_some());
}

#[test]
fn an_owned_view_outlives_its_block() {
    let (block, _) = common::block(100, 2, false);
    let client = common::attach(&block, Access::Read);
    block.write(0, &[1; 100], None).unwrap();
    let view = client.owned_view().unwrap();
    assert!(view.get().is_valid() && !view.is_stale());
    block.set_state(State::Superseded).unwrap();
    drop((block, client));
    assert!(view.get().is_valid() && view.is_stale());
    let mut bytes = [0; 100];
    view.get().copy_to(0, &mut bytes).unwrap();
    assert_eq!((bytes, view.get().version()), ([1; 100], 1));
}
