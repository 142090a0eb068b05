//! N9, N12 to N16: blocks, and their geometry and history.

use latzero_crypto::Suite;
use latzero_crypto::block::{
    BlockError, BlockId, CHUNK_BYTES, CHUNK_STRIDE, Checks, ChunkKey, Entry, Geometry,
    MANIFEST_BYTES, Manifest, Next, PublishError, SIZE_MAX, Seen, Verified,
};
use latzero_crypto::sign::{PublicKey, SigningKey};

use crate::common::*;

const EPOCH: u32 = 1;

fn seal() -> SigningKey {
    keys(false).seal_key().expect("all keys are here")
}

fn checks() -> Checks<'static> {
    Checks {
        id: block_id(),
        geometry: geometry(),
        epoch: EPOCH,
        min_content_epoch: 0,
    }
}

fn chunk_key() -> ChunkKey {
    ChunkKey::new(&pool_key(&keys(false), &descriptor1()), &block_id(), EPOCH)
}

fn next(length: u64) -> Next<'static> {
    Next {
        id: block_id(),
        geometry: geometry(),
        epoch: EPOCH,
        length,
        written_ms: 0,
        session: [0; 16],
    }
}

/// A version of the block and its sealed chunks.
struct Version {
    verified: Verified,
    chunks: Vec<Vec<u8>>,
}

impl Version {
    /// The first version of a plaintext.
    fn of(plain: &[u8]) -> Self {
        Self::sealed(&chunk_key(), &next(plain.len() as u64), plain)
    }

    fn sealed(key: &ChunkKey, next: &Next<'_>, plain: &[u8]) -> Self {
        let chunks = (0..).zip(plain.chunks(CHUNK_BYTES));
        let sealed: Vec<_> = chunks
            .map(|(i, chunk)| (i, key.seal(i, 1, [7; 24], chunk)))
            .collect();
        let changed: Vec<_> = sealed.iter().map(|(i, (entry, _))| (*i, *entry)).collect();
        Version {
            verified: next
                .sign(None, &changed, &seal())
                .expect("all chunks are here"),
            chunks: sealed.into_iter().map(|(_, (_, chunk))| chunk).collect(),
        }
    }

    /// The whole slot.
    fn slot(&self) -> Vec<u8> {
        let length = self.verified.manifest().length();
        let size = geometry().slot_len(length).expect("it fits");
        let mut slot = vec![0; usize::try_from(size).expect("small")];
        let head = self.verified.head();
        slot[..head.len()].copy_from_slice(&head);
        for (i, chunk) in (0..).zip(&self.chunks) {
            let at = geometry()
                .chunk(i, length)
                .expect("it has this chunk")
                .start;
            let at = usize::try_from(at).expect("small");
            slot[at..at + chunk.len()].copy_from_slice(chunk);
        }
        slot
    }
}

fn public() -> PublicKey {
    descriptor1().keys().seal
}

fn read(
    head: &[u8],
    version: u64,
    checks: &Checks<'_>,
    seen: Option<&Seen>,
) -> Result<Verified, BlockError> {
    Verified::new(head, version, checks, seen, |_| Some(public()))
}

#[track_caller]
fn integrity<T>(result: Result<T, BlockError>) {
    match result.map(drop) {
        Err(BlockError::Integrity(_)) => {}
        Err(other) => panic!("refused as {other:?}"),
        Ok(_) => panic!("accepted"),
    }
}

/// A head whose first 192 bytes were changed and signed again with a key.
fn resigned(head: &[u8], key: &SigningKey) -> Vec<u8> {
    let message = [b"latzero/v1/manifest\0", &head[..192]].concat();
    [&head[..192], &key.sign(&message), &head[256..]].concat()
}

#[test]
fn no_bit_of_manifest_or_table_can_change() {
    let version = Version::of(&plaintext());
    let head = version.verified.head();
    assert!(read(&head, 1, &checks(), None).is_ok());
    for bit in 0..head.len() * 8 {
        let mut changed = head.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        // A nonce is bound by its chunk's leaf, which is checked when the chunk is opened.
        let is_nonce = bit / 8 >= MANIFEST_BYTES && (8..32).contains(&(bit / 8 % 64));
        assert_eq!(
            read(&changed, 1, &checks(), None).is_ok(),
            is_nonce,
            "bit {bit}"
        );
    }
    for length in 0..head.len() {
        assert!(
            read(&head[..length], 1, &checks(), None).is_err(),
            "{length}"
        );
    }
}

#[test]
fn n12_chunks_cannot_be_swapped_dropped_or_taken_from_elsewhere() {
    let plain = [plaintext(), vec![1; CHUNK_BYTES]].concat();
    let plain = &plain[..2 * CHUNK_BYTES];
    let version = Version::of(plain);
    let (key, verified) = (chunk_key(), &version.verified);
    let open = |i, sealed: &[u8]| key.open(verified, i, sealed.to_vec());
    assert_eq!(
        open(0, &version.chunks[0]).as_deref(),
        Ok(&plain[..CHUNK_BYTES])
    );
    integrity(open(0, &version.chunks[1]));
    integrity(open(1, &version.chunks[0]));
    integrity(open(2, &version.chunks[0]));
    integrity(open(u32::MAX, &version.chunks[0]));
    integrity(open(0, &[]));
    integrity(open(0, &version.chunks[0][1..]));
    // From another version, another block, another epoch.
    let (_, other) = key.seal(0, 2, [7; 24], &plain[..CHUNK_BYTES]);
    integrity(open(0, &other));
    let elsewhere = BlockId {
        uid: [9; 16],
        ..block_id()
    };
    let pool = pool_key(&keys(false), &descriptor1());
    let (_, other) =
        ChunkKey::new(&pool, &elsewhere, EPOCH).seal(0, 1, [7; 24], &plain[..CHUNK_BYTES]);
    integrity(open(0, &other));
    let later = ChunkKey::new(&pool, &block_id(), 2);
    let (_, other) = later.seal(0, 1, [7; 24], &plain[..CHUNK_BYTES]);
    integrity(open(0, &other));
    // A reader with the key of another epoch or block can't open it either.
    integrity(later.open(verified, 0, version.chunks[0].clone()));
    integrity(ChunkKey::new(&pool, &elsewhere, EPOCH).open(verified, 0, version.chunks[0].clone()));
}

#[test]
fn n12_length_and_count_cannot_differ_even_if_a_writer_signs_them() {
    let version = Version::of(&plaintext());
    let head = version.verified.head();
    let signed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut head = head.clone();
        change(&mut head);
        read(&resigned(&head, &seal()), 1, &checks(), None)
    };
    assert!(signed(&|_| {}).is_ok());
    // The count.
    integrity(signed(&|head| head[67] = 1));
    integrity(signed(&|head| head[67] = 3));
    integrity(signed(&|head| head[64..68].fill(0xff)));
    integrity(signed(&|head| head[64..68].fill(0)));
    // The length, for which the count still fits, but not the chunk.
    let longer = signed(&|head| head[63] += 1).expect("a writer signed it");
    integrity(chunk_key().open(&longer, 1, version.chunks[1].clone()));
    let shorter = signed(&|head| head[63] -= 1).expect("a writer signed it");
    integrity(chunk_key().open(&shorter, 1, version.chunks[1].clone()));
    integrity(chunk_key().open(&shorter, 1, version.chunks[1][..20].to_vec()));
    integrity(signed(&|head| head[56..64].fill(0xff)));
    // Chunk size, flags, version, epoch.
    integrity(signed(&|head| head[47] = 1));
    integrity(signed(&|head| head[71] = 1));
    integrity(signed(&|head| head[55] = 0));
    integrity(signed(&|head| head[43] = 0));
    integrity(signed(&|head| head[43] = 2));
    // Without the last chunk, and with adjusted count and length, but the old root.
    integrity(signed(&|head| {
        head[67] = 1;
        head[56..64].copy_from_slice(&65_536u64.to_be_bytes());
    }));
}

#[test]
fn n13_other_ciphertext_with_the_same_tag_is_refused() {
    // The generator of the vector knows the key, and creates it from chunk 0 with the vector's
    // nonce.
    on_each(|backend| {
        let keys = keys(false).with_backend(backend);
        let key = ChunkKey::new(&pool_key(&keys, &descriptor1()), &block_id(), EPOCH);
        let plain = plaintext();
        let (nonce, version) = (
            array("/block/given/chunk_nonces/0"),
            number("/block/given/version"),
        );
        let (entry0, chunk0) = key.seal(0, version, nonce, &plain[..CHUNK_BYTES]);
        let (entry1, _) = key.seal(1, version, [1; 24], &plain[CHUNK_BYTES..]);
        let signed = next(plain.len() as u64)
            .sign_as(version, None, &[(0, entry0), (1, entry1)], &seal())
            .expect("all chunks are here");
        let mut forged = chunk0.clone();
        forged[0] ^= 0x80;
        let xor = bytes("/must_fail/chunk_with_the_same_tag/xor_bytes_16_to_31");
        for (byte, xor) in forged[16..32].iter_mut().zip(xor) {
            *byte ^= xor;
        }
        assert_eq!(
            sha256(&forged),
            text("/must_fail/chunk_with_the_same_tag/sha256")
        );
        // The cipher alone accepts it.
        let aad = [
            &b"latzero/v1/chunk\0"[..],
            &block_id().pool_id,
            &EPOCH.to_be_bytes(),
            &block_id().uid,
            &0u32.to_be_bytes(),
            &version.to_be_bytes(),
            &65_536u32.to_be_bytes(),
        ]
        .concat();
        let cipher = pool_key(&keys, &descriptor1()).block_key(&block_id().uid);
        assert!(cipher.open(&nonce, &aad, forged.clone()).is_some());
        integrity(key.open(&signed, 0, forged));
        assert!(key.open(&signed, 0, chunk0).is_ok());
    });
}

#[test]
fn n14_names_versions_and_histories_are_distinguished() {
    let version = Version::of(&plaintext());
    let head = version.verified.head();
    let named = Checks {
        id: BlockId {
            name: "config",
            ..block_id()
        },
        ..checks()
    };
    integrity(read(&head, 1, &named, None));
    let pool = Checks {
        id: BlockId {
            pool_id: [0; 16],
            ..block_id()
        },
        ..checks()
    };
    integrity(read(&head, 1, &pool, None));
    let uid = Checks {
        id: BlockId {
            uid: [0; 16],
            ..block_id()
        },
        ..checks()
    };
    integrity(read(&head, 1, &uid, None));
    integrity(read(&head, 2, &checks(), None));
    let gated = Checks {
        id: BlockId {
            suite: Suite::Gated,
            ..block_id()
        },
        ..checks()
    };
    assert!(matches!(
        read(&head, 1, &gated, None),
        Err(BlockError::Downgrade(_))
    ));

    let seen = version.verified.seen();
    assert!(read(&head, 1, &checks(), Some(&seen)).is_ok());
    let older = Seen {
        version: 2,
        hash: [0; 32],
    };
    assert_eq!(
        read(&head, 1, &checks(), Some(&older)).err(),
        Some(BlockError::Rollback(1, 2))
    );
    let other = Seen {
        version: 1,
        hash: [0; 32],
    };
    assert_eq!(
        read(&head, 1, &checks(), Some(&other)).err(),
        Some(BlockError::Fork(1))
    );
    // The next version refers to the one that was seen.
    let second = next(plaintext().len() as u64).sign(Some(&version.verified), &[], &seal());
    let second = second.expect("nothing changes").head();
    assert!(read(&second, 2, &checks(), Some(&seen)).is_ok());
    assert_eq!(
        read(&second, 2, &checks(), Some(&other)).err(),
        Some(BlockError::Fork(2))
    );
    // The hashes of missed versions are unknown.
    assert!(
        read(
            &second,
            2,
            &checks(),
            Some(&Seen {
                version: 0,
                hash: [0; 32]
            })
        )
        .is_ok()
    );
}

#[test]
fn n15_only_the_sealing_key_signs_manifests() {
    let head = Version::of(&plaintext()).verified.head();
    let keys = keys(false);
    for key in [
        keys.write_key(),
        keys.join_key(),
        keys.read_key(),
        keys.owner_key(),
    ] {
        let key = key.expect("all keys are here");
        integrity(read(&resigned(&head, &key), 1, &checks(), None));
    }
    // A signature of the same bytes for another purpose.
    let bare = [&head[..192], &seal().sign(&head[..192]), &head[256..]].concat();
    integrity(read(&bare, 1, &checks(), None));
    integrity(Verified::new(&head, 1, &checks(), None, |_| None));
}

#[test]
fn n16_an_edited_table_is_refused_and_never_signed_again() {
    let version = Version::of(&plaintext());
    let mut head = version.verified.head();
    // A changed leaf in the table, with the root recomputed but not signed.
    head[MANIFEST_BYTES + 32] ^= 1;
    integrity(read(&head, 1, &checks(), None));
    let entries = head[MANIFEST_BYTES..].chunks(64).map(|line| &line[32..]);
    let leaves: Vec<u8> = entries.flatten().copied().collect();
    let root = [&b"latzero/v1/root\0"[..], &2u32.to_be_bytes(), &leaves].concat();
    head[96..128].copy_from_slice(&library().sha256(&[&root]));
    integrity(read(&head, 1, &checks(), None));
    // So a writer has no base to start from; to sign a new version it needs every chunk.
    let anew =
        next(plaintext().len() as u64).sign(None, &[(0, version.verified.table()[0])], &seal());
    assert_eq!(anew.err(), Some(PublishError::Chunk(1)));
    // Versions and nonces in the table are bound by the leaves of their chunks.
    let mut head = version.verified.head();
    head[MANIFEST_BYTES + 7] = 2;
    integrity(read(&head, 1, &checks(), None));
    let mut head = version.verified.head();
    head[MANIFEST_BYTES + 8] ^= 1;
    let changed = read(&head, 1, &checks(), None).expect("the root covers the leaves");
    integrity(chunk_key().open(&changed, 0, version.chunks[0].clone()));
}

#[test]
fn n9_content_of_an_expired_epoch_is_stale() {
    let head = Version::of(&plaintext()).verified.head();
    let later = |min_content_epoch| Checks {
        epoch: 3,
        min_content_epoch,
        ..checks()
    };
    assert!(read(&head, 1, &later(0), None).is_ok());
    assert!(read(&head, 1, &later(1), None).is_ok());
    assert_eq!(
        read(&head, 1, &later(2), None).err(),
        Some(BlockError::StaleEpoch(1))
    );
}

#[test]
fn n18_other_versions_and_suites_are_downgrades() {
    let head = Version::of(&plaintext()).verified.head();
    for (at, byte) in [(5, 0), (5, 2), (4, 1), (7, 0), (7, 2), (6, 1)] {
        let mut changed = head.clone();
        changed[at] = byte;
        let got = read(&resigned(&changed, &seal()), 1, &checks(), None);
        assert!(
            matches!(got, Err(BlockError::Downgrade(_))),
            "byte {at}: {:?}",
            got.err()
        );
    }
}

#[test]
fn a_new_version_reuses_unchanged_chunks() {
    let mut plain = plaintext();
    let one = Version::of(&plain).verified;
    let key = chunk_key();
    plain[0] ^= 1;
    let (entry, _) = key.seal(0, 2, [8; 24], &plain[..CHUNK_BYTES]);
    let length = plain.len() as u64;
    let two = next(length)
        .sign(Some(&one), &[(0, entry)], &seal())
        .expect("one chunk changed");
    assert_eq!(two.table()[1], one.table()[1]);
    assert_eq!(two.table()[0].version, 2);
    assert!(read(&two.head(), 2, &checks(), Some(&one.seen())).is_ok());
    // A chunk that was sealed for another version, a surplus one, and one whose length changes.
    let sign = |length, base: Option<&Verified>, changed: &[(u32, Entry)]| {
        next(length).sign(base, changed, &seal()).err()
    };
    assert_eq!(
        sign(length, Some(&two), &[(0, entry)]),
        Some(PublishError::Chunk(0))
    );
    let (third, _) = key.seal(2, 2, [8; 24], &plain[..1]);
    assert_eq!(
        sign(length, Some(&one), &[(2, third)]),
        Some(PublishError::Chunk(2))
    );
    assert_eq!(
        sign(length + 1, Some(&one), &[]),
        Some(PublishError::Chunk(1))
    );
    assert_eq!(
        sign(2 * CHUNK_BYTES as u64 + 1, Some(&one), &[]),
        Some(PublishError::TooLarge(131_072))
    );
    assert_eq!(
        sign(CHUNK_BYTES as u64, Some(&one), &[]),
        None,
        "shorter by a whole chunk"
    );
    assert_eq!(sign(0, Some(&one), &[]), None, "empty");
    // A new epoch reuses no chunks.
    let later = Next {
        epoch: 2,
        ..next(length)
    };
    assert_eq!(
        later.sign(Some(&one), &[], &seal()).err(),
        Some(PublishError::Chunk(0))
    );
    assert_eq!(
        later.sign(Some(&one), &[(0, entry)], &seal()).err(),
        Some(PublishError::Chunk(1))
    );
}

#[test]
fn the_server_checks_a_written_slot() {
    let version = Version::of(&plaintext());
    let slot = version.slot();
    let written = |slot: &[u8], version| checks().written(slot, version, &public());
    assert_eq!(written(&slot, 0), Ok(version.verified.seen()));
    let conflict = BlockError::VersionConflict {
        expected: 2,
        got: 1,
    };
    assert_eq!(written(&slot, 1), Err(conflict));
    integrity(written(&slot[..slot.len() - 1], 0));
    integrity(written(&[&slot[..], &[0]].concat(), 0));
    integrity(written(&[], 0));
    integrity(written(&slot[..255], 0));
    let later = Checks {
        epoch: 2,
        ..checks()
    };
    assert_eq!(
        later.written(&slot, 0, &public()),
        Err(BlockError::StaleEpoch(1))
    );
    integrity(checks().written(&slot, 0, &descriptor3().keys().seal));
    let mut forged = slot.clone();
    forged[200] ^= 1;
    integrity(written(&forged, 0));
    assert!(matches!(
        checks().written(&resigned(&forged, &seal()), u64::MAX, &public()),
        Err(BlockError::VersionConflict { .. })
    ));
    // An empty block is only a manifest.
    let empty = next(0)
        .sign(None, &[], &seal())
        .expect("nothing is missing");
    assert_eq!(written(&empty.head(), 0), Ok(empty.seen()));
}

#[test]
fn n19_geometry_is_correct_at_its_limits() {
    let check = |size: u64, chunks: u32, chunks_at: u64| {
        let geometry = Geometry::of(size).expect("it is not too large");
        assert_eq!(geometry.chunks_max(), chunks, "{size}");
        assert_eq!(
            geometry.capacity(),
            chunks_at + u64::from(chunks) * CHUNK_STRIDE as u64
        );
        assert_eq!(geometry.slot_len(0), Some(256));
        let most = u64::from(chunks) * CHUNK_BYTES as u64;
        if chunks > 0 {
            assert_eq!(geometry.slot_len(1), Some(chunks_at + 17));
            assert_eq!(geometry.slot_len(most), Some(geometry.capacity()));
        }
        assert_eq!(geometry.slot_len(most + 1), None, "{size}");
        assert_eq!(geometry.slot_len(u64::MAX), None);
        assert_eq!(geometry.chunk(chunks, u64::MAX), None);
    };
    check(0, 0, 4096);
    check(1, 1, 4096);
    check(65_536, 1, 4096);
    check(65_537, 2, 4096);
    check(60 * 65_536, 60, 4096);
    check(60 * 65_536 + 1, 61, 8192);
    check(SIZE_MAX, 16_777_216, 1_073_745_920);
    assert_eq!(Geometry::of(SIZE_MAX + 1), None);
    assert_eq!(Geometry::of(u64::MAX), None);
    assert!(Manifest::parse(&[0xff; 256]).is_err());
}
