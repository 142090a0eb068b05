//! Reads and writes of both sides compared with a plain vector: offsets and lengths at the edges,
//! all kinds of blocks.

mod common;

use latzero_shm::{Access, Cas, ReadError, WriteError};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    ServerWrite(Place, u8),
    ServerRead(Place),
    Cas(Place, u8, bool),
    ClientWrite(Vec<(Place, u8)>, bool),
    ClientFill(Place, u8),
    ClientRead(Place),
}

/// An offset from either end of the block, and a length; the range may be outside.
#[derive(Debug, Clone, Copy)]
struct Place {
    from_end: bool,
    offset: u64,
    length: u64,
}

impl Place {
    fn range(self, size: u64) -> (u64, usize) {
        let offset = if self.from_end {
            size.wrapping_sub(self.offset)
        } else {
            self.offset
        };
        (offset, self.length as usize)
    }
}

fn place() -> impl Strategy<Value = Place> {
    let edge = || prop_oneof![0..20u64, 4080..4110u64, Just(8192)];
    (any::<bool>(), edge(), edge()).prop_map(|(from_end, offset, length)| Place {
        from_end,
        offset,
        length,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (place(), any::<u8>()).prop_map(|(place, byte)| Step::ServerWrite(place, byte)),
        place().prop_map(Step::ServerRead),
        (place(), any::<u8>(), any::<bool>())
            .prop_map(|(place, byte, matches)| Step::Cas(place, byte, matches)),
        (
            prop::collection::vec((place(), any::<u8>()), 0..3),
            any::<bool>()
        )
            .prop_map(|(writes, drops)| Step::ClientWrite(writes, drops)),
        (place(), any::<u8>()).prop_map(|(place, byte)| Step::ClientFill(place, byte)),
        place().prop_map(Step::ClientRead),
    ]
}

/// Consecutive bytes differ, so that a shifted copy is visible.
fn bytes(length: usize, byte: u8) -> Vec<u8> {
    (0..length).map(|i| byte.wrapping_add(i as u8)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn client_and_server_match_the_model(
        size in prop_oneof![1..20u64, 4090..4105u64, 8185..8200u64],
        slots in 1..=4u32,
        is_persistent in any::<bool>(),
        steps in prop::collection::vec(step(), 1..20),
    ) {
        let (block, _directory) = common::block(size, slots, is_persistent);
        let writer = common::attach(&block, Access::Write);
        let reader = common::attach(&block, Access::Read);
        block.set_lease(5, true).unwrap();
        let mut model = vec![0; size as usize];
        let mut version = 0;
        let slice = |offset: u64, length: usize| {
            let end = offset.checked_add(length as u64)?;
            (end <= size).then_some(offset as usize..end as usize)
        };
        for step in steps {
            match step {
                Step::ServerWrite(place, byte) => {
                    let (offset, length) = place.range(size);
                    let data = bytes(length, byte);
                    let outcome = block.write(offset, &data, None);
                    if let Some(range) = slice(offset, length) {
                        version += 1;
                        model[range].copy_from_slice(&data);
                        prop_assert_eq!(outcome.unwrap(), version);
                        let stale = block.write(offset, &data, Some(version + 1)).unwrap_err();
                        let is_conflict =
                            matches!(stale, WriteError::Conflict { current } if current == version);
                        prop_assert!(is_conflict);
                    } else {
                        prop_assert!(matches!(outcome.unwrap_err(), WriteError::OutOfRange));
                    }
                }
                Step::ServerRead(place) => {
                    let (offset, length) = place.range(size);
                    let mut out = vec![0xaa; length];
                    let outcome = block.read(offset, &mut out, Some(version));
                    if let Some(range) = slice(offset, length) {
                        prop_assert_eq!(outcome.unwrap(), version);
                        prop_assert_eq!(&out[..], &model[range]);
                    } else {
                        prop_assert!(matches!(outcome.unwrap_err(), ReadError::OutOfRange));
                    }
                }
                Step::Cas(place, byte, matches) => {
                    let (offset, length) = place.range(size);
                    let data = bytes(length, byte);
                    let Some(range) = slice(offset, length) else {
                        let error = block.cas(offset, &data, &data).unwrap_err();
                        prop_assert!(matches!(error, WriteError::OutOfRange));
                        continue;
                    };
                    let mut there = model[range.clone()].to_vec();
                    if !matches && let Some(last) = there.last_mut() {
                        *last ^= 1;
                    }
                    let outcome = block.cas(offset, &there, &data).unwrap();
                    if matches || length == 0 {
                        version += 1;
                        model[range].copy_from_slice(&data);
                        prop_assert_eq!(outcome, Cas::Swapped { version });
                    } else {
                        let current = model[range].to_vec();
                        prop_assert_eq!(outcome, Cas::Differs { current, version });
                    }
                }
                Step::ClientWrite(writes, drops) => {
                    // Bytes written in place stay, published or not.
                    let mut next = model.clone();
                    let mut writing = writer.begin(5).unwrap();
                    for (place, byte) in writes {
                        let (offset, length) = place.range(size);
                        let data = bytes(length, byte);
                        let outcome = writing.write(offset, &data);
                        prop_assert_eq!(outcome.is_ok(), slice(offset, length).is_some());
                        if let Some(range) = slice(offset, length) {
                            next[range].copy_from_slice(&data);
                        }
                    }
                    let mut own = vec![0; size as usize];
                    writing.read_into(0, &mut own).unwrap();
                    prop_assert_eq!(&own, &next);
                    if drops {
                        drop(writing);
                    } else {
                        version += 1;
                        prop_assert_eq!(writing.version(), version);
                        prop_assert_eq!(writing.publish().unwrap(), version);
                    }
                    if !drops || slots == 1 {
                        model = next;
                    }
                }
                Step::ClientFill(place, byte) => {
                    let (offset, length) = place.range(size);
                    let mut writing = writer.begin(5).unwrap();
                    let outcome = writing.fill(offset, length as u64, byte);
                    prop_assert_eq!(outcome.is_ok(), slice(offset, length).is_some());
                    version += 1;
                    writing.publish().unwrap();
                    if let Some(range) = slice(offset, length) {
                        model[range].fill(byte);
                    }
                }
                Step::ClientRead(place) => {
                    let (offset, length) = place.range(size);
                    let mut out = vec![0xaa; length];
                    let outcome = reader.read_into(offset, &mut out);
                    if let Some(range) = slice(offset, length) {
                        prop_assert_eq!(outcome.unwrap(), version);
                        prop_assert_eq!(&out[..], &model[range.clone()]);
                        if !is_persistent {
                            let view = reader.view().unwrap();
                            view.copy_to(offset, &mut out).unwrap();
                            prop_assert!(view.is_valid());
                            prop_assert_eq!(view.version(), version);
                            prop_assert_eq!(&out[..], &model[range]);
                        }
                    } else {
                        prop_assert!(matches!(outcome.unwrap_err(), ReadError::OutOfRange));
                    }
                }
            }
            prop_assert_eq!(reader.version(), version);
            prop_assert_eq!(block.version().unwrap(), version);
        }
        prop_assert_eq!(reader.read().unwrap(), (model.clone(), version));
        block.check().unwrap();

        // Another generation has the same content and version, with more room or less.
        for new_size in [size.div_ceil(2), size + 4097] {
            let (new, _directory) = common::block(new_size, slots, is_persistent);
            prop_assert_eq!(block.copy_to(&new).unwrap(), version);
            let mut grown = model.clone();
            grown.resize(new_size as usize, 0);
            let attached = common::attach(&new, Access::Read);
            prop_assert_eq!(attached.read().unwrap(), (grown.clone(), version));
            prop_assert_eq!(new.write(0, &[77], None).unwrap(), version + 1);
            grown[0] = 77;
            prop_assert_eq!(attached.read().unwrap(), (grown, version + 1));
        }
    }
}
