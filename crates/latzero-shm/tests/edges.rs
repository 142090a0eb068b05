//! Edge cases that `model.rs` does not reach: offsets up to the largest number, several clients and
//! a server that takes turns and reopens the file, and content that moves to another kind of block.

mod common;

use std::fs::File;
use std::os::fd::AsFd;

use latzero_shm::{Access, Attachment, Custodian, ReadError, WriteError};
use proptest::prelude::*;

const PAGE: u64 = 4096;

fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1),
        Just(PAGE - 1),
        Just(PAGE),
        Just(PAGE + 1),
        Just(2 * PAGE),
        1..3 * PAGE
    ]
}

/// Offsets around every edge of a block of `size` bytes.
fn edges(size: u64) -> Vec<u64> {
    let mut edges = vec![0, 1, u64::MAX, u64::MAX - 1, u64::MAX - size, 1 << 63];
    for edge in [PAGE, 2 * PAGE, size, u64::MAX - size + 1] {
        edges.extend([edge - 1, edge, edge.saturating_add(1)]);
    }
    edges
}

fn contains(size: u64, offset: u64, length: u64) -> bool {
    u128::from(offset) + u128::from(length) <= u128::from(size)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Every edge as an offset with every edge as a length; a range outside the block is refused
    /// and changes nothing.
    #[test]
    fn every_edge_with_every_other(
        size in sizes(),
        slots in 1..=4u32,
        is_persistent in any::<bool>(),
    ) {
        let (block, _directory) = common::block(size, slots, is_persistent);
        let client = common::attach(&block, Access::Write);
        let mut model = vec![0; size as usize];
        let mut version = 0;
        for offset in edges(size) {
            for length in edges(size) {
                let is_inside = contains(size, offset, length);
                let mut writing = client.begin(0).unwrap();
                let filled = writing.fill(offset, length, version as u8 ^ 0x5a);
                prop_assert_eq!(filled.is_ok(), is_inside, "{} {}", offset, length);
                if is_inside {
                    version += 1;
                    prop_assert_eq!(writing.publish().unwrap(), version);
                    model[offset as usize..(offset + length) as usize]
                        .fill((version - 1) as u8 ^ 0x5a);
                } else {
                    drop(writing);
                }
                if length > 4 * PAGE {
                    continue; // no buffer can be that long
                }
                let mut seen = vec![0xaa; length as usize];
                let of_server = block.read(offset, &mut seen, None);
                if is_inside {
                    prop_assert_eq!(of_server.unwrap(), version);
                    let range = offset as usize..(offset + length) as usize;
                    prop_assert_eq!(&seen[..], &model[range.clone()]);
                    seen.fill(0xaa);
                    prop_assert_eq!(client.read_into(offset, &mut seen).unwrap(), version);
                    prop_assert_eq!(&seen[..], &model[range]);
                } else {
                    prop_assert!(matches!(of_server, Err(ReadError::OutOfRange)));
                    let of_client = client.read_into(offset, &mut seen);
                    prop_assert!(matches!(of_client, Err(ReadError::OutOfRange)));
                    let written = block.write(offset, &seen, None);
                    prop_assert!(matches!(written, Err(WriteError::OutOfRange)));
                    let swapped = block.cas(offset, &seen, &seen);
                    prop_assert!(matches!(swapped, Err(WriteError::OutOfRange)));
                }
            }
        }
        prop_assert_eq!(client.read().unwrap(), (model, version));
        block.check().unwrap();
    }
}

#[derive(Debug, Clone)]
enum Turn {
    /// The server writes, given the right version or another one.
    Server(u64, Vec<u8>, i64),
    /// A client writes in parts, reads its own draft, and publishes or drops it.
    Client(usize, Vec<(u64, Vec<u8>)>, bool),
    /// The server ends and opens the file again; clients stay attached.
    Reopen,
}

fn turn() -> impl Strategy<Value = Turn> {
    let piece = || {
        (
            any::<u64>(),
            prop_oneof![0..4usize, 0..5000usize],
            any::<u8>(),
        )
            .prop_map(|(at, length, byte)| {
                (
                    at,
                    (0..length).map(|i| byte.wrapping_add(i as u8)).collect(),
                )
            })
    };
    prop_oneof![
        3 => (piece(), prop_oneof![4 => Just(0i64), 1 => -2..3i64])
            .prop_map(|((at, bytes), off)| Turn::Server(at, bytes, off)),
        5 => (0..2usize, prop::collection::vec(piece(), 0..5), prop::bool::weighted(0.6))
            .prop_map(|(who, pieces, publishes)| Turn::Client(who, pieces, publishes)),
        1 => Just(Turn::Reopen),
    ]
}

/// The offset of a part in a block of `size` bytes, and the bytes of it that fit.
fn place(size: u64, at: u64, bytes: &[u8]) -> (u64, &[u8]) {
    let offset = at % size;
    let fits = bytes.len().min((size - offset) as usize);
    (offset, &bytes[..fits])
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// A dropped draft of one client leaves nothing in the next version, neither in the other
    /// client's nor in the server's.
    #[test]
    fn clients_and_a_server_that_reopens_the_file(
        size in sizes(),
        slots in 2..=4u32,
        is_persistent in any::<bool>(),
        turns in prop::collection::vec(turn(), 1..24),
        other_slots in 1..=4u32,
        other_size in sizes(),
    ) {
        let (mut block, directory) = common::block(size, slots, is_persistent);
        let clients = [0, 1].map(|_| common::attach(&block, Access::Write));
        let mut model = vec![0; size as usize];
        let mut version = 0u64;
        for turn in turns {
            match turn {
                Turn::Server(at, bytes, off) => {
                    let (offset, bytes) = place(size, at, &bytes);
                    let wanted = version.wrapping_add_signed(off);
                    let outcome = block.write(offset, bytes, Some(wanted));
                    if off == 0 {
                        version += 1;
                        model[offset as usize..offset as usize + bytes.len()]
                            .copy_from_slice(bytes);
                        prop_assert_eq!(outcome.unwrap(), version);
                    } else {
                        let conflicts = matches!(
                            outcome,
                            Err(WriteError::Conflict { current }) if current == version
                        );
                        prop_assert!(conflicts);
                    }
                }
                Turn::Client(who, pieces, publishes) => {
                    let mut next = model.clone();
                    let mut writing = clients[who].begin(0).unwrap();
                    for (at, bytes) in &pieces {
                        let (offset, bytes) = place(size, *at, bytes);
                        writing.write(offset, bytes).unwrap();
                        next[offset as usize..offset as usize + bytes.len()]
                            .copy_from_slice(bytes);
                        // All of the draft, and a part that may begin and end anywhere in what was
                        // not copied yet.
                        let mut own = vec![0xaa; size as usize];
                        writing.read_into(0, &mut own).unwrap();
                        prop_assert_eq!(&own, &next);
                        let part = offset as usize / 2..(size as usize + offset as usize) / 2;
                        let mut own = vec![0xaa; part.len()];
                        writing.read_into(part.start as u64, &mut own).unwrap();
                        prop_assert_eq!(&own, &next[part]);
                    }
                    if publishes {
                        version += 1;
                        prop_assert_eq!(writing.publish().unwrap(), version);
                        model = next;
                    } else {
                        drop(writing);
                    }
                }
                Turn::Reopen => {
                    if let Some(directory) = &directory {
                        let open = File::open(directory.path()).unwrap();
                        block = Custodian::open_persistent(open.as_fd(), "block").unwrap();
                    }
                }
            }
            prop_assert_eq!(clients[0].read().unwrap(), (model.clone(), version));
            let mut seen = vec![0xaa; size as usize];
            prop_assert_eq!(block.read(0, &mut seen, Some(version)).unwrap(), version);
            prop_assert_eq!(&seen, &model);
        }

        // To the other kind, with other slots and another size, and back again.
        let (other, _directory) = common::block(other_size, other_slots, !is_persistent);
        prop_assert_eq!(block.copy_to(&other).unwrap(), version);
        model.resize(other_size as usize, 0);
        let of = |block: &Custodian| -> (Vec<u8>, u64) {
            Attachment::read(&common::attach(block, Access::Read)).unwrap()
        };
        prop_assert_eq!(of(&other), (model.clone(), version));
        let (back, _directory) = common::block(size, slots, is_persistent);
        prop_assert_eq!(other.copy_to(&back).unwrap(), version);
        model.resize(size as usize, 0);
        prop_assert_eq!(of(&back), (model.clone(), version));
        // Each slot is updated from there.
        for step in 1..=u64::from(slots) + 1 {
            let at = (step % size) as usize;
            model[at] = step as u8;
            prop_assert_eq!(back.write(at as u64, &[step as u8], None).unwrap(), version + step);
            prop_assert_eq!(of(&back), (model.clone(), version + step));
        }
    }
}
