//! N5 to N9 and N18: descriptors.

use latzero_crypto::Suite;
use latzero_crypto::descriptor::{
    BYTES_MAX, Descriptor, DescriptorError, History, MakeError, OldContent, StoreError,
    check_reply, read_creation, read_rotation,
};
use latzero_crypto::keys::{KeySet, Kind, NewKeys, PoolKey, Roles, Secret, Token};
use latzero_crypto::sign::SigningKey;

use crate::common::*;

type Accepted = Result<Option<PoolKey>, DescriptorError>;

#[track_caller]
fn invalid<T>(accepted: Result<T, DescriptorError>) {
    match accepted.map(drop) {
        Err(
            DescriptorError::Invalid(_) | DescriptorError::Missing(_) | DescriptorError::OtherOwner,
        ) => {}
        Err(other) => panic!("refused as {other:?}"),
        Ok(_) => panic!("accepted"),
    }
}

fn accept(descriptor: &Descriptor, keys: &KeySet, stored: Option<&Descriptor>) -> Accepted {
    descriptor.accept(keys, &expected(descriptor), &[], stored)
}

/// A descriptor with these bytes, signed with the owner key that it contains.
fn signed(bytes: &[u8], owner: &SigningKey) -> Vec<u8> {
    let body = &bytes[..bytes.len() - 128];
    let message = [b"latzero/v1/descriptor\0", body].concat();
    let signature = owner.sign(&message);
    [body, &signature, &bytes[bytes.len() - 64..]].concat()
}

fn hkdf_expand(key: &[u8; 32], info: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    let expanded = hkdf::Hkdf::<sha2::Sha256>::from_prk(key).map(|key| key.expand(info, &mut out));
    expanded
        .expect("a key of 32 bytes")
        .expect("32 bytes of output");
    out
}

fn owner() -> SigningKey {
    keys(false).owner_key().expect("all keys are here")
}

#[test]
fn n5_no_bit_of_a_descriptor_can_change() {
    let good = descriptor2();
    let (keys, stored) = (keys(false), descriptor1());
    for bit in 0..good.as_bytes().len() * 8 {
        let mut bytes = good.as_bytes().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = match Descriptor::parse(&bytes) {
            Err(error) => error,
            Ok(changed) => changed
                .accept(&keys, &expected(&good), &[], Some(&stored))
                .err()
                .unwrap_or_else(|| panic!("bit {bit} can change")),
        };
        let downgrade = matches!(error, DescriptorError::Downgrade(_));
        let invalid = matches!(error, DescriptorError::Invalid(_));
        assert!(
            invalid || downgrade && (4..8).contains(&(bit / 8)),
            "bit {bit}: {error:?}"
        );
    }
}

#[test]
fn n5_the_wrap_fails_even_if_the_owner_signs_changed_bytes() {
    // Times, salt, check value, previous hash: all are bound to the wrap too, not only to the
    // signature.
    for at in (32..72).chain(232..296) {
        let mut bytes = descriptor2().as_bytes().to_vec();
        bytes[at] ^= 1;
        let changed = Descriptor::parse(&signed(&bytes, &owner())).expect("its layout is good");
        assert!(changed.is_signed(), "byte {at}");
        invalid(accept(&changed, &keys(false), None));
    }
}

#[test]
fn n6_another_owner_is_not_the_pinned_one() {
    // The same three keys, with an attacker's owner key.
    let theirs = Descriptor::create(&keys(true), &new_pool(Suite::Sealed)).expect("all keys");
    invalid(accept(&theirs, &keys(false), None));
    let mut bytes = descriptor1().as_bytes().to_vec();
    let attacker = SigningKey::from_seed(&[7; 32]);
    bytes[72..104].copy_from_slice(&attacker.public().to_bytes());
    let replaced = Descriptor::parse(&signed(&bytes, &attacker)).expect("its layout is good");
    assert!(replaced.is_signed());
    invalid(accept(&replaced, &only(&keys(false), &[Kind::Sigil]), None));
    // A chain from the pinned owner that is invalid.
    let joiner = only(&keys(false), &[Kind::Sigil]);
    invalid(replaced.accept(&joiner, &expected(&replaced), &[descriptor1()], None));
}

#[test]
fn a_new_owner_is_accepted_if_the_old_one_signed_it() {
    // Tokens of epochs 1 and 2 still pin the first owner, who signed its successor.
    let (two, three) = (descriptor2(), descriptor3());
    let pinned = KeySet::new_pool(NewKeys {
        sigil: Secret::new(array("/descriptors/epoch3/given/sigil_key")),
        shard: Secret::new(array("/descriptors/epoch3/given/cipher_shard")),
        seal: Secret::new(array("/descriptors/epoch3/given/oblivion_seal")),
        owner: None,
    });
    assert!(accept(&three, &pinned, None).is_ok());
    // A member with older tokens, which allow only to join now.
    let old = keys(false);
    let other_keys = three.accept(&old, &expected(&three), &[descriptor1(), two.clone()], None);
    assert_eq!(
        other_keys.err().map(|error| error.to_string()),
        Some("the pool's descriptor does not verify: the keys are not those of this epoch".into()),
        "the owner matches and the keys differ"
    );
    // Without the step between them, there is no chain to the owner.
    invalid(three.accept(&old, &expected(&three), &[descriptor1()], None));
    invalid(three.accept(&old, &expected(&three), &[], None));
}

#[test]
fn n7_other_keys_do_not_open_the_wrap() {
    // Tokens with the owner's pin, but other keys.
    let of = |kinds: &[(Kind, &str)]| {
        let token = |(kind, of): &(Kind, &str)| {
            let secret = Secret::new(array(&format!("/keys/given/{of}")));
            let token = Token {
                kind: *kind,
                secret,
                pin: array("/keys/expect/pin"),
            };
            token.to_text()
        };
        let tokens: Vec<_> = kinds.iter().map(token).collect();
        let keys = KeySet::from_tokens(tokens.iter().map(|token| token.as_str()));
        keys.expect("tokens").with_backend(library())
    };
    let one = descriptor1();
    let good = of(&[(Kind::Sigil, "sigil_key"), (Kind::Shard, "cipher_shard")]);
    assert!(accept(&one, &good, None).expect("it is valid").is_some());
    invalid(accept(
        &one,
        &of(&[(Kind::Sigil, "cipher_shard"), (Kind::Shard, "sigil_key")]),
        None,
    ));
    invalid(accept(
        &one,
        &of(&[(Kind::Sigil, "sigil_key"), (Kind::Shard, "oblivion_seal")]),
        None,
    ));
    // Without the shard there is nothing to open, and the seal alone gives no key.
    let blind = of(&[(Kind::Sigil, "sigil_key"), (Kind::Seal, "oblivion_seal")]);
    assert!(accept(&one, &blind, None).expect("it is valid").is_none());
    assert_eq!(blind.roles(), Some(Roles::Join));
    let swapped = of(&[
        (Kind::Sigil, "sigil_key"),
        (Kind::Shard, "cipher_shard"),
        (Kind::Seal, "sigil_key"),
    ]);
    invalid(accept(&one, &swapped, None));
}

#[test]
fn n8_the_check_value_and_the_wrap_belong_to_one_key() {
    let one = descriptor1();
    // The check value of another key, signed by the owner.
    let mut bytes = one.as_bytes().to_vec();
    let other = keys(false)
        .pool_key(descriptor2().epoch_id())
        .expect("all keys are here");
    bytes[232..264].copy_from_slice(&other.check_value());
    let changed = Descriptor::parse(&signed(&bytes, &owner())).expect("its layout is good");
    invalid(accept(&changed, &keys(false), None));
    // The wrap of another key, with the right wrapping key and context: an owner who deceives
    // readers.
    let kek = keys(false)
        .read_kek_bytes(one.epoch_id())
        .expect("the reader's keys are here");
    let kek = latzero_crypto::xaes::Xaes::new(&kek, library());
    let mut bytes = one.as_bytes().to_vec();
    let aad = [b"latzero/v1/wrap\0", &bytes[..296]].concat();
    let nonce: [u8; 24] = bytes[296..320].try_into().expect("24 bytes");
    bytes.splice(320..368, kek.seal(&nonce, &aad, &[9; 32]));
    let changed = Descriptor::parse(&signed(&bytes, &owner())).expect("its layout is good");
    invalid(accept(
        &changed,
        &only(&keys(false), &[Kind::Sigil, Kind::Shard]),
        None,
    ));
    // If the check value matches that key too, writers still notice, because they derive the pool
    // key themselves.
    let mut bytes = changed.as_bytes().to_vec();
    let check_value = hkdf_expand(&[9; 32], b"latzero/v1/key-check\0");
    bytes[232..264].copy_from_slice(&check_value);
    let aad = [b"latzero/v1/wrap\0", &bytes[..296]].concat();
    bytes.splice(320..368, kek.seal(&nonce, &aad, &[9; 32]));
    let changed = Descriptor::parse(&signed(&bytes, &owner())).expect("its layout is good");
    assert!(
        accept(
            &changed,
            &only(&keys(false), &[Kind::Sigil, Kind::Shard]),
            None
        )
        .is_ok()
    );
    invalid(accept(&changed, &keys(false), None));
}

#[test]
fn n9_epochs_go_forward_by_one() {
    let (one, two, three, keys) = (descriptor1(), descriptor2(), descriptor3(), keys(false));
    let accept_over = |descriptor: &Descriptor, chain: &[Descriptor], stored: &Descriptor| {
        descriptor
            .accept(&keys, &expected(descriptor), chain, Some(stored))
            .map(|_| ())
    };
    assert_eq!(accept_over(&two, &[], &one), Ok(()));
    assert_eq!(accept_over(&two, &[], &two), Ok(()));
    assert!(matches!(
        accept_over(&one, &[], &two),
        Err(DescriptorError::Rollback(_))
    ));
    // The third epoch has another owner, so the check uses a joiner without a pin.
    let joiner = KeySet::from_raw(&[]).expect("no keys");
    let step = |chain: &[Descriptor]| {
        three
            .accept(&joiner, &expected(&three), chain, Some(&one))
            .map(|_| ())
    };
    assert_eq!(step(std::slice::from_ref(&two)), Ok(()));
    assert_eq!(step(&[]), Err(DescriptorError::Missing(2)));
    assert_eq!(
        step(std::slice::from_ref(&one)),
        Err(DescriptorError::Missing(2))
    );
    // A different second epoch than the accepted one.
    let mut to = new_epoch(2);
    to.created_ms += 1;
    let other = one.rotate(&keys, &keys, &to).expect("all keys are here");
    assert_eq!(
        accept_over(&other, &[], &two),
        Err(DescriptorError::Fork(2))
    );
    assert!(matches!(step(&[other]), Err(DescriptorError::Invalid(_))));
    // Another pool with the same name.
    let mut elsewhere = new_pool(Suite::Sealed);
    elsewhere.pool_id[0] ^= 1;
    let elsewhere = Descriptor::create(&keys, &elsewhere).expect("all keys are here");
    assert!(matches!(
        accept_over(&elsewhere, &[], &one),
        Err(DescriptorError::Rollback(_))
    ));
}

#[test]
fn n9_a_succession_is_signed_by_both_owners_and_keeps_fixed_fields() {
    let (one, two) = (descriptor1(), descriptor2());
    let joiner = only(&keys(false), &[Kind::Sigil]);
    let check = |change: &dyn Fn(&mut Vec<u8>), server: Result<(), &str>| {
        let mut bytes = two.as_bytes().to_vec();
        change(&mut bytes);
        let mut bytes = signed(&bytes, &owner());
        // The second owner is also the first one, and signs anything.
        if bytes[bytes.len() - 64..] == two.as_bytes()[two.as_bytes().len() - 64..] {
            let (body, signatures) = bytes.split_at(bytes.len() - 128);
            bytes = [body, &signatures[..64], &signatures[..64]].concat();
        }
        let changed = Descriptor::parse(&bytes).expect("its layout is good");
        invalid(accept(&changed, &joiner, Some(&one)));
        let got = match read_rotation(&bytes, &one) {
            Ok(next) if next.is_signed_after(&one) => Ok(()),
            Ok(_) => Err("signature"),
            Err(StoreError::StaleEpoch(1)) => Err("stale"),
            Err(StoreError::Unfit(_)) => Err("unfit"),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(got, server);
    };
    check(&|bytes| bytes[264] ^= 1, Err("stale"));
    check(&|bytes| bytes[27] = 3, Err("stale"));
    check(&|bytes| bytes[6] = 1, Err("unfit"));
    check(
        &|bytes| {
            let end = bytes.len();
            bytes[end - 129] ^= 1
        },
        Err("unfit"),
    );
    check(
        &|bytes| {
            let end = bytes.len();
            bytes[end - 64..].fill(0)
        },
        Err("signature"),
    );
    check(
        &|bytes| {
            let end = bytes.len();
            bytes[end - 1] ^= 1
        },
        Err("signature"),
    );
    // An epoch that reverts the removal of a writer.
    let mut to = new_epoch(2);
    to.content = OldContent::Refused;
    let removed = one
        .rotate(&keys(false), &keys(false), &to)
        .expect("all keys are here");
    assert_eq!(removed.min_content_epoch(), 2);
    let next = removed
        .rotate(&keys(false), &keys(false), &new_epoch(2))
        .expect("all keys are here");
    assert_eq!(next.min_content_epoch(), 2, "it is kept");
    let mut bytes = next.as_bytes().to_vec();
    bytes[31] = 1;
    let bytes = signed(&bytes, &owner());
    let (body, signatures) = bytes.split_at(bytes.len() - 128);
    let lower = [body, &signatures[..64], &signatures[..64]].concat();
    assert!(matches!(
        read_rotation(&lower, &removed),
        Err(StoreError::Unfit(_))
    ));
    let lower = Descriptor::parse(&lower).expect("its layout is good");
    invalid(accept(&lower, &joiner, Some(&removed)));
}

#[test]
fn n9_min_content_epoch_is_not_above_the_epoch_and_the_first_epoch_has_none_before() {
    let check = |at: usize, byte: u8| {
        let mut bytes = descriptor1().as_bytes().to_vec();
        bytes[at] = byte;
        let parsed = Descriptor::parse(&signed(&bytes, &owner()));
        assert!(
            matches!(parsed, Err(DescriptorError::Invalid(_))),
            "byte {at}: {parsed:?}"
        );
    };
    check(31, 2); // min_content_epoch
    check(27, 0); // epoch
    check(264, 1); // prev_hash
    check(368, 1); // prev nonce
    check(392, 1); // prev wrap
    check(574, 1); // sig_prev
}

#[test]
fn n18_other_versions_suites_and_answers_are_downgrades() {
    for (at, byte) in [(5, 0), (5, 2), (4, 1), (7, 0), (7, 2), (6, 2), (6, 0xff)] {
        let mut bytes = descriptor1().as_bytes().to_vec();
        bytes[at] = byte;
        let parsed = Descriptor::parse(&signed(&bytes, &owner()));
        assert!(
            matches!(parsed, Err(DescriptorError::Downgrade(_))),
            "byte {at}: {parsed:?}"
        );
    }
    // The server claims that the sealed pool is a gated one.
    let one = descriptor1();
    let mut other = expected(&one);
    other.suite = Suite::Gated.number();
    invalid(one.accept(&keys(false), &other, &[], None));
    for change in [
        check_reply(Roles::Write, Some(7), None),
        check_reply(Roles::Write, None, Some(b"")),
        check_reply(Roles::Write, Some(3), Some(b"")),
        check_reply(Roles::Read, Some(7), Some(b"")),
        check_reply(Roles::Read, Some(259), Some(b"")),
    ] {
        assert!(
            matches!(change, Err(DescriptorError::Unprotected(_))),
            "{change:?}"
        );
    }
    assert_eq!(check_reply(Roles::Read, Some(3), Some(b"x")), Ok(&b"x"[..]));
}

#[test]
fn the_descriptor_must_match_what_the_server_stated_before() {
    let one = descriptor1();
    let good = expected(&one);
    for (i, other) in [
        latzero_crypto::descriptor::Expected {
            name: "beta",
            ..good
        },
        latzero_crypto::descriptor::Expected {
            pool_id: [0; 16],
            ..good
        },
        latzero_crypto::descriptor::Expected { epoch: 2, ..good },
        latzero_crypto::descriptor::Expected { suite: 2, ..good },
    ]
    .into_iter()
    .enumerate()
    {
        println!("change {i}");
        invalid(one.accept(&keys(false), &other, &[], None));
    }
}

#[test]
fn n11_public_keys_of_a_descriptor_are_checked() {
    for key in 0..5 {
        // Points of small order, not canonical encodings, and no points.
        for bad in crate::signatures::bad_public_keys() {
            let mut bytes = descriptor1().as_bytes().to_vec();
            bytes[72 + 32 * key..104 + 32 * key].copy_from_slice(&bad);
            let parsed = Descriptor::parse(&bytes);
            assert!(
                matches!(parsed, Err(DescriptorError::Invalid(_))),
                "{key} {bad:?}"
            );
        }
    }
}

#[test]
fn n19_lengths_are_checked_before_anything_is_allocated() {
    let good = descriptor1();
    for length in 0..good.as_bytes().len() {
        assert!(
            Descriptor::parse(&good.as_bytes()[..length]).is_err(),
            "{length}"
        );
    }
    let name_at = 440;
    for length in [0u16, 4, 6, 255, 256, 0xfffe, 0xffff] {
        let mut bytes = good.as_bytes().to_vec();
        bytes[name_at..name_at + 2].copy_from_slice(&length.to_be_bytes());
        assert!(Descriptor::parse(&bytes).is_err(), "{length}");
    }
    let mut longer = good.as_bytes().to_vec();
    longer.push(0);
    assert!(Descriptor::parse(&longer).is_err());
    for name in ["", "\n", "\u{7f}", "\u{80}", "\u{9f}", &"x".repeat(256)] {
        let pool = latzero_crypto::descriptor::NewPool {
            name,
            ..new_pool(Suite::Sealed)
        };
        assert_eq!(
            Descriptor::create(&keys(false), &pool).err(),
            Some(MakeError::Name),
            "{name:?}"
        );
    }
    let name = "ü".repeat(127) + "x";
    let pool = latzero_crypto::descriptor::NewPool {
        name: &name,
        ..new_pool(Suite::Sealed)
    };
    let longest = Descriptor::create(&keys(false), &pool).expect("255 bytes are a name");
    assert_eq!(longest.as_bytes().len(), BYTES_MAX);
}

#[test]
fn only_the_owner_can_create_an_epoch() {
    let (one, keys, keys3) = (descriptor1(), keys(false), keys3());
    assert_eq!(
        one.rotate(&keys3, &keys3, &new_epoch(2)).err(),
        Some(MakeError::NotOwner)
    );
    let reader = only(&keys, &[Kind::Sigil, Kind::Shard]);
    assert!(matches!(
        one.rotate(&reader, &keys, &new_epoch(2)),
        Err(MakeError::Key(_))
    ));
    assert!(matches!(
        one.rotate(&keys, &reader, &new_epoch(2)),
        Err(MakeError::Key(_))
    ));
    // With an owner key, the other three keys are not enough.
    let owned =
        Descriptor::create(&crate::common::keys(true), &new_pool(Suite::Sealed)).expect("all keys");
    assert_eq!(
        owned.rotate(&keys, &keys, &new_epoch(2)).err(),
        Some(MakeError::NotOwner)
    );
}

#[test]
fn a_cut_history_gives_no_earlier_key() {
    let (one, keys) = (descriptor1(), keys(false));
    let mut to = new_epoch(2);
    to.history = History::Cut;
    let two = one.rotate(&keys, &keys, &to).expect("all keys are here");
    let key = accept(&two, &keys, Some(&one))
        .expect("it is valid")
        .expect("a reader's key");
    assert!(
        two.open_previous(&key, &one)
            .expect("it is the previous one")
            .is_none()
    );
    // Another descriptor is not accepted as the previous one.
    assert!(descriptor2().open_previous(&key, &descriptor3()).is_err());
}

#[test]
fn the_server_accepts_a_new_pool_only_with_its_name_and_in_epoch_1() {
    let one = descriptor1();
    assert!(matches!(
        read_creation(one.as_bytes(), "beta"),
        Err(StoreError::Unfit(_))
    ));
    assert!(matches!(
        read_creation(descriptor2().as_bytes(), "alpha"),
        Err(StoreError::Unfit(_))
    ));
    assert!(matches!(
        read_creation(b"", "alpha"),
        Err(StoreError::Layout(_))
    ));
    let mut forged = one.as_bytes().to_vec();
    forged[296] ^= 1;
    let read = |bytes: &[u8]| read_creation(bytes, "alpha").expect("its layout is valid");
    assert!(read(one.as_bytes()).is_signed() && !read(&forged).is_signed());
}
