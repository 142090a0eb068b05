//! Blocks of encrypted pools: the real server, the real client, and an intruder who can write the
//! memory without the seal.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use latzero::blocking::{App, Block};
use latzero::{Code, HandlerError};
use latzero_crypto::block::{BlockId, CHUNK_BYTES, ChunkKey, Geometry, Next};
use latzero_crypto::descriptor::{Descriptor, Expected};
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Secret, Token};
use latzero_crypto::{Suite, text};
use latzero_tests::vault::{
    READ, WRITE, builder, code, key_set, keys, member, prove, prove_in, raw, vault, with_keys,
};
use latzero_tests::{Server, TIMEOUT, Via, Wire};
use serde_json::{Value, json};

const SECRET: &[u8] = b"the combination is 7-42-11";

/// Three chunks, the last one short.
const SIZE: u64 = 2 * CHUNK_BYTES as u64 + 1000;

fn by_tcp(server: &Server, app: &str, keys: latzero::Keys) -> App {
    let builder = latzero::App::builder(&format!("latzero://{app}@{}", server.0.tcp()));
    let state_dir = server.0.data_dir().join("of-clients").join(app);
    let builder = builder.keys("vault", keys).state_dir(state_dir);
    App::connect_with(builder.unbound(true)).unwrap()
}

/// An attacker with writable memory of a block, who writes anything at any time without the lock.
struct Intruder {
    wire: Wire,
    memory: OwnedFd,
    description: Value,
}

impl Intruder {
    fn new(server: &Server, set: &KeySet, name: &str) -> Intruder {
        Intruder::of_pool(server, set, "vault", name)
    }

    fn of_pool(server: &Server, set: &KeySet, pool: &str, name: &str) -> Intruder {
        let features = ["attachments", "fd_passing"];
        let handshake =
            json!({"app_id": "intruder", "encrypted_pools": [pool], "features": features});
        let mut wire = server.app(Via::Unix, handshake);
        let proved = prove_in(&mut wire, server, set, pool, "intruder", WRITE);
        assert_eq!(code(&proved), "ok");
        let attach = json!({"action": "memory_attach", "block_id": name, "mode": "write"});
        let description = wire.request(attach)["response"].clone();
        let memory = wire.take_descriptors().pop().unwrap();
        Intruder {
            wire,
            memory,
            description,
        }
    }

    fn read(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut got = vec![0; bytes];
        assert_eq!(
            rustix::io::pread(&self.memory, &mut got, at).unwrap(),
            bytes
        );
        got
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert_eq!(
            rustix::io::pwrite(&self.memory, bytes, at).unwrap(),
            bytes.len()
        );
    }

    /// The whole memory.
    fn image(&self) -> Vec<u8> {
        let bytes = rustix::fs::fstat(&self.memory).unwrap().st_size;
        self.read(0, usize::try_from(bytes).unwrap())
    }

    /// The offset of the newest version.
    fn slot(&self) -> u64 {
        let head = u64::from_le_bytes(self.read(128, 8).try_into().unwrap());
        let number = |name: &str| self.description[name].as_u64().unwrap();
        number("slot_offset") + (head & 0xff) * number("slot_stride")
    }

    fn content(&self) -> Vec<u8> {
        let capacity = self.description["capacity"].as_u64().unwrap();
        self.read(self.slot(), usize::try_from(capacity).unwrap())
    }

    fn flip(&self, at: u64) {
        let at = self.slot() + at;
        let byte = self.read(at, 1)[0];
        self.write(at, &[byte ^ 0x80]);
    }
}

fn kind<T>(result: Result<T, latzero::Error>) -> Code {
    result.err().map_or(Code::Internal, |error| error.kind())
}

fn wait(block: &Block, beyond: u64) -> u64 {
    block.wait_for(beyond, TIMEOUT).unwrap()
}

#[test]
fn a_block_works_as_in_any_pool() {
    let (server, set) = vault();
    for (n, is_mapped) in [(0, true), (1, false)] {
        let (writer, reader) = (format!("w{n}"), format!("r{n}"));
        let (writer, reader) = if is_mapped {
            (
                member(&server, &writer, keys(&set, WRITE)),
                member(&server, &reader, keys(&set, READ)),
            )
        } else {
            (
                by_tcp(&server, &writer, keys(&set, WRITE)),
                by_tcp(&server, &reader, keys(&set, READ)),
            )
        };
        let name = format!("b{n}");
        let block = writer.block(&name).create(SIZE).send().unwrap();
        assert_eq!((block.is_mapped(), block.size()), (is_mapped, SIZE));
        let seen = reader.block(&name).attach().unwrap();
        let (bytes, version) = seen.read().unwrap();
        assert_eq!((bytes.len() as u64, version), (SIZE, 0));
        assert!(bytes.iter().all(|byte| *byte == 0));
        let mut changes = seen.changes().unwrap();
        // Across two chunks, then within one.
        let at = CHUNK_BYTES as u64 - 5;
        assert_eq!(block.write_at(at, SECRET).unwrap(), 1);
        assert_eq!(changes.recv_timeout(TIMEOUT).unwrap(), Some(1));
        assert_eq!(wait(&seen, 0), 1);
        let mut got = vec![0; SECRET.len()];
        assert_eq!(seen.read_into(at, &mut got).unwrap(), 1);
        assert_eq!(got, SECRET);
        let mut draft = block.write(TIMEOUT).unwrap();
        draft.write(0, b"begin").unwrap();
        draft.write(SIZE - 3, b"end").unwrap();
        draft.read_into(0, &mut got[..5]).unwrap();
        assert_eq!(&got[..5], b"begin");
        assert_eq!(draft.commit().unwrap(), 2);
        let (bytes, version) = seen.read().unwrap();
        assert_eq!(version, 2);
        assert_eq!(
            (&bytes[..5], &bytes[bytes.len() - 3..]),
            (&b"begin"[..], &b"end"[..])
        );
        assert_eq!(&bytes[at as usize..][..SECRET.len()], SECRET);
        let first = seen.view(|view| (view.len(), view.load::<u8>(0).unwrap(), view.version()));
        assert_eq!(first.unwrap(), (SIZE, b'b', 2));
        // Several writes under one lock.
        let many = block.writer(TIMEOUT).unwrap();
        for n in 3..=20_u64 {
            assert_eq!(many.write(n * 3000, &n.to_le_bytes()).unwrap(), n);
        }
        // The client uses the lock that the app holds.
        block.write_at(0, b"x").unwrap();
        drop(many);
        let version = block.read().unwrap().1;
        assert_eq!(
            kind(block.write_if(version - 1, 0, b"y")),
            Code::VersionConflict
        );
        assert_eq!(block.write_if(version, 0, b"y").unwrap(), version + 1);
        assert_eq!(block.cas(0, b"z", b"q").unwrap(), Err(b"y".to_vec()));
        assert_eq!(block.cas(0, b"y", b"q").unwrap(), Ok(version + 2));
        assert_eq!(seen.read().unwrap().0[0], b'q');
        // Another length, within the size at creation.
        block.resize(10).unwrap();
        assert_eq!((seen.read().unwrap().0.len(), seen.size()), (10, 10));
        assert_eq!(kind(block.write_at(8, b"abc")), Code::OutOfRange);
        block.resize(SIZE).unwrap();
        let (bytes, _) = seen.read().unwrap();
        assert_eq!(bytes.len() as u64, SIZE);
        assert_eq!((bytes[0], bytes[9]), (b'q', 0));
        assert!(bytes[10..].iter().all(|byte| *byte == 0));
        assert_eq!(kind(block.resize(SIZE + 1)), Code::TooLarge);
        block.resize(0).unwrap();
        assert_eq!(seen.read().unwrap().0, b"");
        // Roles.
        assert_eq!(kind(reader.block(&name).attach_writable()), Code::Forbidden);
        assert_eq!(kind(seen.write_at(0, b"")), Code::Forbidden);
        block.remove().unwrap();
    }
}

#[test]
fn random_edits_read_back_by_another_client() {
    let (server, set) = vault();
    let writers = [
        member(&server, "w", keys(&set, WRITE)),
        member(&server, "v", keys(&set, WRITE)),
    ];
    let reader = member(&server, "r", keys(&set, READ));
    let first = writers[0].block("b").create(SIZE).send().unwrap();
    let second = writers[1].block("b").attach_writable().unwrap();
    let seen = reader.block("b").attach().unwrap();
    let mut model = vec![0_u8; SIZE as usize];
    // A local generator, so that each run is the same.
    let mut state = 7_u64;
    let mut next = |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    for n in 1..=60_u64 {
        let block = if next(2) == 0 { &first } else { &second };
        if next(6) == 0 {
            let length = next(SIZE + 1);
            block.resize(length).unwrap();
            model.resize(usize::try_from(length).unwrap(), 0);
        } else {
            let from = next(model.len() as u64 + 1);
            let most = (model.len() as u64 - from).min(70_000);
            let bytes = vec![next(256) as u8; next(most + 1) as usize];
            block.write_at(from, &bytes).unwrap();
            model[from as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let (bytes, version) = seen.read().unwrap();
        assert_eq!(version, n);
        assert!(bytes == model, "version {n}");
    }
}

#[test]
fn only_changed_chunks_are_sealed_again() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).send().unwrap();
    let intruder = Intruder::new(&server, &set, "b");
    let geometry = Geometry::of(SIZE).unwrap();
    let chunk = |slot: &[u8], i: u32| {
        let place = geometry.chunk(i, SIZE).unwrap();
        slot[place.start as usize..place.end as usize].to_vec()
    };
    block.write_at(0, SECRET).unwrap();
    let mut before = intruder.content();
    for (version, changed) in [(2, 1), (3, 2), (4, 0), (5, 2), (6, 2)] {
        block
            .write_at(u64::from(changed) * CHUNK_BYTES as u64, b"x")
            .unwrap();
        let after = intruder.content();
        for i in 0..3 {
            let is_same = chunk(&before, i) == chunk(&after, i);
            assert_eq!(is_same, i != changed, "version {version}, chunk {i}");
        }
        before = after;
    }
    let plain = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET);
    assert!(!plain(&intruder.image()));
}

#[test]
fn changes_by_an_intruder_are_detected() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let reader = member(&server, "r", keys(&set, READ));
    let block = writer.block("b").create(SIZE).send().unwrap();
    block.write_at(0, &vec![1; SIZE as usize]).unwrap();
    let seen = reader.block("b").attach().unwrap();
    let intruder = Intruder::new(&server, &set, "b");
    let good = intruder.image();
    let geometry = Geometry::of(SIZE).unwrap();
    let last = geometry.chunk(2, SIZE).unwrap();
    let check = |change: &dyn Fn(), expected: Code| {
        change();
        // A reader that saw the good version, and a new one.
        let late = reader.block("b").attach().unwrap();
        for reading in [&seen, &late] {
            assert_eq!(kind(reading.read()), expected);
        }
        // A writer does not sign over it.
        assert_eq!(kind(block.write_at(SIZE - 1, b"x")), expected);
        intruder.write(0, &good);
        assert_eq!(seen.read().unwrap().1, 1);
    };
    // Chunks, the table, and each part of the manifest.
    for at in [geometry.chunk(2, SIZE).unwrap().start, last.end - 1] {
        check(&|| intruder.flip(at), Code::Integrity);
    }
    for at in [0, 8, 24, 47, 55, 63, 67, 71, 79, 95, 127, 159, 191, 255] {
        check(&|| intruder.flip(at), Code::Integrity);
    }
    // The table; a reader that has verified it uses its own copy.
    for at in [256, 264, 300] {
        intruder.flip(at);
        let late = reader.block("b").attach().unwrap();
        assert_eq!(kind(late.read()), Code::Integrity);
        assert_eq!(seen.read().unwrap().1, 1);
        intruder.write(0, &good);
    }
    // The version and the suite.
    for at in [5, 7] {
        check(&|| intruder.flip(at), Code::Downgrade);
    }
    // Truncated: without the last chunk, shorter, or as if never written.
    let cut =
        |from: u64, bytes: u64| intruder.write(intruder.slot() + from, &vec![0; bytes as usize]);
    check(&|| cut(last.start, last.end - last.start), Code::Integrity);
    check(&|| cut(0, 256), Code::Integrity);
    // Two swapped chunks.
    let places = [0, 1].map(|i| intruder.slot() + geometry.chunk(i, SIZE).unwrap().start);
    let chunks = places.map(|at| intruder.read(at, CHUNK_BYTES + 16));
    intruder.write(places[0], &chunks[1]);
    intruder.write(places[1], &chunks[0]);
    assert_eq!(kind(seen.read()), Code::Integrity);
    // A later version that does not touch them does not make them valid.
    block.write_at(SIZE - 1, b"x").unwrap();
    assert_eq!(kind(seen.read()), Code::Integrity);
    assert_eq!(seen.read_into(SIZE - 1, &mut [0]).unwrap(), 2);
}

#[test]
fn content_of_another_block_or_pool_is_refused() {
    let (server, set) = vault();
    let other_set = key_set(9);
    let maker = App::connect_with(builder(&server, "maker2")).unwrap();
    maker
        .request(&keys(&other_set, WRITE).pool_create("other", false).unwrap())
        .unwrap();
    let writer = App::connect_with(
        with_keys(&server, "w", keys(&set, WRITE)).keys("other", keys(&other_set, WRITE)),
    )
    .unwrap();
    let make = |pool: &str, name: &str, byte: u8| {
        let block = writer.block(name).pool(pool).create(SIZE).send().unwrap();
        block.write_at(0, &vec![byte; SIZE as usize]).unwrap();
        block
    };
    let block = make("vault", "b", 1);
    let _same_pool = make("vault", "c", 2);
    let other = make("other", "b", 3);
    let intruder = Intruder::new(&server, &set, "b");
    let source = Intruder::new(&server, &set, "c");
    let good = intruder.image();
    intruder.write(intruder.slot(), &source.content());
    assert_eq!(kind(block.read()), Code::Integrity);
    intruder.write(0, &good);
    assert_eq!(block.read().unwrap().0[0], 1);
    // The content of another pool's block of the same name.
    let foreign = Intruder::of_pool(&server, &other_set, "other", "b");
    intruder.write(intruder.slot(), &foreign.content());
    assert_eq!(kind(block.read()), Code::Integrity);
    assert_eq!(other.read().unwrap().0[0], 3);
}

#[test]
fn rollbacks_and_forks_are_detected() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let reader = member(&server, "r", keys(&set, READ));
    let block = writer.block("b").create(SIZE).send().unwrap();
    let seen = reader.block("b").attach().unwrap();
    block.write_at(0, b"one").unwrap();
    let intruder = Intruder::new(&server, &set, "b");
    let old = intruder.image();
    block.write_at(0, b"two").unwrap();
    let two = intruder.image();
    assert_eq!(seen.read().unwrap().1, 2);
    intruder.write(0, &old);
    assert_eq!(kind(seen.read()), Code::Rollback);
    assert_eq!(kind(block.write_at(0, b"three")), Code::Rollback);
    // A client that saw nothing newer can't detect it, and continues from there.
    let deceived = member(&server, "v", keys(&set, WRITE));
    let deceived = deceived.block("b").attach_writable().unwrap();
    assert_eq!(&deceived.read().unwrap().0[..3], b"one");
    assert_eq!(deceived.write_at(0, b"TWO").unwrap(), 2);
    assert_eq!(kind(seen.read()), Code::Fork);
    assert_eq!(deceived.write_at(0, b"THREE").unwrap(), 3);
    assert_eq!(kind(seen.read()), Code::Fork);
    // Only the head, as if the block had never been written.
    intruder.write(0, &two);
    assert_eq!(seen.read().unwrap().1, 2);
    intruder.write(128, &[0; 8]);
    assert_eq!(kind(seen.read()), Code::Rollback);
}

/// What a reader knows: the descriptor and the pool key, so it can seal a chunk.
struct Insider {
    descriptor: Descriptor,
    key: latzero_crypto::keys::PoolKey,
}

impl Insider {
    fn new(server: &Server, set: &KeySet) -> Insider {
        let tokens: Vec<_> = READ.iter().map(|kind| set.token(*kind).unwrap()).collect();
        let held = KeySet::from_tokens(tokens.iter().map(|token| token.as_str())).unwrap();
        let mut wire = raw(server, Via::Unix, "insider");
        let joined = prove(&mut wire, server, set, "insider", READ);
        let bytes = joined["response"]["descriptor"].as_str().unwrap();
        let descriptor = Descriptor::parse(&text::decode_within(bytes, 4096).unwrap()).unwrap();
        let expected = Expected {
            name: "vault",
            pool_id: descriptor.pool_id(),
            epoch: descriptor.epoch(),
            suite: descriptor.suite().number(),
        };
        let key = descriptor
            .accept(&held, &expected, &[], None)
            .unwrap()
            .unwrap();
        Insider { descriptor, key }
    }

    /// A slot with one chunk, signed with the seal of `signer`.
    fn slot(&self, name: &str, uid: [u8; 16], signer: &KeySet, plain: &[u8]) -> Vec<u8> {
        let id = BlockId {
            pool_id: self.descriptor.pool_id(),
            suite: Suite::Sealed,
            uid,
            name,
        };
        let epoch = self.descriptor.epoch();
        let geometry = Geometry::of(1000).unwrap();
        let next = Next {
            id,
            geometry,
            epoch,
            length: plain.len() as u64,
            written_ms: 1,
            session: [5; 16],
        };
        let (entry, chunk) = ChunkKey::new(&self.key, &id, epoch).seal(0, 1, [6; 24], plain);
        let seal = signer.seal_key().unwrap();
        let mut slot = next.sign(None, &[(0, entry)], &seal).unwrap().head();
        slot.resize(
            geometry.chunk(0, plain.len() as u64).unwrap().start as usize,
            0,
        );
        slot.extend(chunk);
        slot
    }
}

#[test]
fn a_reader_can_not_forge_and_the_server_accepts_only_whole_slots() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(1000).send().unwrap();
    let uid = block.info().unwrap()["block_uid"]
        .as_str()
        .unwrap()
        .to_owned();
    let uid = text::decode(&uid).unwrap();
    let insider = Insider::new(&server, &set);
    let forged = insider.slot("b", uid, &key_set(77), SECRET);
    let good = insider.slot("b", uid, &set, SECRET);
    let mut intruder = Intruder::new(&server, &set, "b");
    let lock = intruder
        .wire
        .request(json!({"action": "memory_lock", "block_id": "b"}));
    let lock = lock["response"]["lock"].as_str().unwrap().to_owned();
    let mut write = |slot: &[u8], more: Value| {
        let mut header =
            json!({"action": "memory_write", "block_id": "b", "id": "w", "lock": lock});
        for (key, value) in more.as_object().unwrap() {
            header[key] = value.clone();
        }
        intruder.wire.send_attachment(&header, slot);
        loop {
            let reply = intruder.wire.receive();
            if reply["in_reply_to"] == "w" {
                return code(&reply).to_owned();
            }
        }
    };
    assert_eq!(write(&forged, json!({})), "bad_message");
    assert_eq!(
        write(&insider.slot("c", uid, &set, SECRET), json!({})),
        "bad_message"
    );
    assert_eq!(
        write(&insider.slot("b", [9; 16], &set, SECRET), json!({})),
        "bad_message"
    );
    assert_eq!(write(&good[..good.len() - 1], json!({})), "bad_message");
    assert_eq!(write(&good[..200], json!({})), "bad_message");
    assert_eq!(write(&[&good[..], &[0]].concat(), json!({})), "bad_message");
    assert_eq!(write(&good, json!({"offset": 1})), "bad_message");
    assert_eq!(write(&good, json!({"lock": null})), "bad_message");
    assert_eq!(write(&good, json!({"if_version": 3})), "version_conflict");
    assert_eq!(write(&good, json!({})), "ok");
    assert_eq!(write(&good, json!({})), "version_conflict");
    let mut ask = |action: &str, more: Value| {
        let mut request = json!({"action": format!("memory_{action}"), "block_id": "b"});
        for (key, value) in more.as_object().unwrap() {
            request[key] = value.clone();
        }
        code(&intruder.wire.request(request)).to_owned()
    };
    let (size, swap) = (
        json!({"size": 9}),
        json!({"expected": "AA==", "data": "AA=="}),
    );
    assert_eq!(ask("resize", size.clone()), "bad_message");
    assert_eq!(ask("cas", swap), "bad_message");
    assert_eq!(
        ask("create", json!({"block_id": "d", "size": 9})),
        "bad_message"
    );
    let same = json!({"block_id": "d", "size": 9, "block_uid": text::encode(&uid)});
    assert_eq!(ask("create", same), "block_exists");
    let raw = json!({"block_id": "d", "size": 9, "block_uid": text::encode(&[3; 16]),
        "consistency": "raw"});
    assert_eq!(ask("create", raw), "bad_message");
    // What the server accepted can be read; what a reader writes past the server can't.
    assert_eq!(block.read().unwrap(), (SECRET.to_vec(), 1));
    intruder.write(intruder.slot(), &forged);
    let late = member(&server, "late", keys(&set, READ))
        .block("b")
        .attach()
        .unwrap();
    assert_eq!(kind(late.read()), Code::Integrity);
    assert_eq!(kind(block.read()), Code::Integrity);
}

/// How often a test sees each result of a read, before it is over.
const SEEN: usize = 100;

/// Pauses of different lengths, shorter than a read and longer, which are the same in each run.
struct Pause(u64);

impl Pause {
    fn spin(&mut self) {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1);
        for _ in 0..(self.0 >> 33) % 100_000 {
            std::hint::spin_loop();
        }
    }
}

/// Block `b` for each way to read: from the memory, and through the server.
fn readers(server: &Server, set: &KeySet) -> [Block; 2] {
    [
        member(server, "mapping", keys(set, READ)),
        by_tcp(server, "far", keys(set, READ)),
    ]
    .map(|app| app.block("b").attach().unwrap())
}

/// The insider knows the pool's key. What it puts in place of a chunk opens like the chunk itself,
/// with the same nonce, but only the other one was signed. A reader that checks the memory and then
/// decrypts it would return it.
#[test]
fn bytes_that_change_during_a_read_are_never_returned() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).send().unwrap();
    let good = vec![1; SIZE as usize];
    block.write_at(0, &good).unwrap();
    let intruder = Intruder::new(&server, &set, "b");
    let insider = Insider::new(&server, &set);
    let place = Geometry::of(SIZE).unwrap().chunk(1, SIZE).unwrap();
    let at = intruder.slot() + place.start;
    let signed = intruder.read(at, CHUNK_BYTES + 16);
    let entry = intruder.read(intruder.slot() + 256 + 64, 32);
    let version = u64::from_be_bytes(entry[..8].try_into().unwrap());
    let nonce = entry[8..].try_into().unwrap();
    let uid = text::decode(block.info().unwrap()["block_uid"].as_str().unwrap()).unwrap();
    let id = BlockId {
        pool_id: insider.descriptor.pool_id(),
        suite: Suite::Sealed,
        uid,
        name: "b",
    };
    let key = ChunkKey::new(&insider.key, &id, insider.descriptor.epoch());
    let seal = |byte| key.seal(1, version, nonce, &vec![byte; CHUNK_BYTES]).1;
    assert!(seal(1) == signed, "the insider seals as the writer did");
    let forged = seal(2);
    let mut flipped = signed.clone();
    flipped[CHUNK_BYTES / 2] ^= 0x80;
    let readers = readers(&server, &set);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let hostile = scope.spawn(|| {
            let mut pause = Pause(7);
            for bytes in [&forged, &signed, &flipped, &signed].into_iter().cycle() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                intruder.write(at, bytes);
                pause.spin();
            }
        });
        let reading = readers.each_ref().map(|seen| {
            let good = &good;
            scope.spawn(move || {
                let until = Instant::now() + TIMEOUT;
                let (mut whole, mut refused) = (0, 0);
                while whole < SEEN || refused < SEEN {
                    match seen.read() {
                        Ok((bytes, version)) => {
                            assert!(bytes == *good && version == 1, "it was not written");
                            whole += 1;
                        }
                        Err(error) => {
                            assert_eq!(error.kind(), Code::Integrity, "{error}");
                            refused += 1;
                        }
                    }
                    assert!(Instant::now() < until, "{whole} whole, {refused} refused");
                }
            })
        });
        let ended = reading.map(std::thread::ScopedJoinHandle::join);
        is_over.store(true, Ordering::Relaxed);
        hostile.join().unwrap();
        for result in ended {
            result.unwrap();
        }
    });
    // What stays there is an error for as long as it is there.
    for bytes in [&forged, &flipped] {
        intruder.write(at, bytes);
        for seen in &readers {
            assert_eq!(kind(seen.read()), Code::Integrity);
        }
    }
    intruder.write(at, &signed);
    for seen in &readers {
        assert!(seen.read().unwrap().0 == good);
    }
}

/// A read that a writer overtakes begins again. Only what does not change any more is an attack.
#[test]
fn a_writer_next_to_readers_is_not_taken_for_an_intruder() {
    const SIZE: u64 = 16 * CHUNK_BYTES as u64;
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).send().unwrap();
    block.write_at(0, &[1; SIZE as usize]).unwrap();
    let readers = readers(&server, &set);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let writer = block.writer(TIMEOUT).unwrap();
            let mut version = 1_u64;
            let mut pause = Pause(7);
            while !is_over.load(Ordering::Relaxed) {
                version += 1;
                // Both ends of each version are its number. Readers copy it for longer than it
                // takes to write.
                let bytes = version.to_le_bytes().to_vec();
                let written = writer.write_pieces(&[(0, bytes.clone()), (SIZE - 8, bytes)]);
                assert_eq!(written.unwrap(), version);
                pause.spin();
            }
        });
        let reading = readers.map(|seen| {
            scope.spawn(move || {
                let until = Instant::now() + TIMEOUT;
                let (mut versions, mut newest) = (0, 1);
                while versions < SEEN {
                    match seen.read() {
                        Ok((_, 1)) => {}
                        Ok((bytes, version)) => {
                            let number = version.to_le_bytes();
                            assert!(bytes.starts_with(&number) && bytes.ends_with(&number));
                            assert!(version >= newest, "versions go back");
                            versions += usize::from(version > newest);
                            newest = version;
                        }
                        Err(error) => assert_eq!(error.kind(), Code::Contended, "{error}"),
                    }
                    assert!(Instant::now() < until, "{versions} versions were read");
                }
            })
        });
        let ended = reading.map(std::thread::ScopedJoinHandle::join);
        is_over.store(true, Ordering::Relaxed);
        writing.join().unwrap();
        for result in ended {
            result.unwrap();
        }
    });
}

#[test]
fn content_outlives_a_rotation_but_not_a_removed_writer() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let reader = member(&server, "r", keys(&set, READ));
    let block = writer.block("b").create(SIZE).send().unwrap();
    block.write_at(0, SECRET).unwrap();
    let seen = reader.block("b").attach().unwrap();
    writer
        .rotate_pool("vault", &keys(&set, WRITE), false)
        .unwrap();
    let begins = |block: &Block| block.read().unwrap().0.starts_with(SECRET);
    assert!(begins(&block) && begins(&seen));
    // A new client decrypts it with the key of the previous epoch.
    let late = member(&server, "late", keys(&set, READ));
    let late = late.block("b").attach().unwrap();
    assert!(begins(&late));
    // The next version is entirely of the new epoch.
    block.write_at(SIZE - 1, b"x").unwrap();
    assert!(begins(&block) && begins(&seen) && begins(&late));
    // A writer is removed: content of earlier epochs is not trusted until it is written again.
    let secret = |token: &str| Token::parse(token).unwrap().secret;
    let next = KeySet::new_pool(NewKeys {
        sigil: Secret::new([9; 32]),
        shard: secret(&set.token(Kind::Shard).unwrap()),
        seal: Secret::new([8; 32]),
        owner: None,
    });
    writer
        .rotate_pool("vault", &keys(&next, WRITE), false)
        .unwrap();
    let writer = member(&server, "w2", keys(&next, WRITE));
    let block = writer.block("b").attach_writable().unwrap();
    assert_eq!(kind(block.read()), Code::StaleEpoch);
    assert_eq!(kind(block.write_at(0, b"x")), Code::StaleEpoch);
    block.write_at(0, &vec![5; SIZE as usize]).unwrap();
    let reader = member(&server, "r2", keys(&next, READ));
    assert_eq!(reader.block("b").attach().unwrap().read().unwrap().0[0], 5);
}

#[test]
fn a_writer_encrypts_content_of_an_earlier_epoch_again() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).send().unwrap();
    let first = block.write_at(7, SECRET).unwrap();
    let before = block.read().unwrap().0;
    assert_eq!(block.reencrypt(false).unwrap(), None, "it is of this epoch");
    writer
        .rotate_pool("vault", &keys(&set, WRITE), false)
        .unwrap();
    assert_eq!(block.reencrypt(false).unwrap(), Some(first + 1));
    assert_eq!(block.reencrypt(false).unwrap(), None);
    assert_eq!(block.read().unwrap(), (before.clone(), first + 1));
    // Now the epoch before can be forgotten, and its writer.
    let next = key_set(9);
    writer
        .rotate_pool("vault", &keys(&next, WRITE), false)
        .unwrap();
    let writer = member(&server, "w2", keys(&next, WRITE));
    let block = writer.block("b").attach_writable().unwrap();
    // What the removed writer may have changed is accepted only on purpose.
    assert_eq!(kind(block.reencrypt(false)), Code::StaleEpoch);
    assert_eq!(kind(block.read()), Code::StaleEpoch);
    assert_eq!(block.reencrypt(true).unwrap(), Some(first + 2));
    let reader = member(&server, "r", keys(&next, READ));
    let seen = reader.block("b").attach().unwrap();
    assert_eq!(seen.read().unwrap(), (before, first + 2));
    // A reader cannot sign, so it cannot encrypt again either.
    assert_eq!(kind(seen.reencrypt(true)), Code::Forbidden);
}

#[test]
fn several_versions_of_several_pieces_are_written_under_one_lock() {
    let (server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let reader = member(&server, "r", keys(&set, READ));
    let block = writer.block("b").create(SIZE).send().unwrap();
    let seen = reader.block("b").attach().unwrap();
    let under = block.writer(Duration::from_secs(5)).unwrap();
    let far = SIZE - 2;
    for n in 1..=3_u8 {
        let pieces = [(0, vec![n; 4]), (far, vec![n; 2]), (2, vec![n + 100; 1])];
        assert_eq!(under.write_pieces(&pieces).unwrap(), u64::from(n));
        let (bytes, version) = seen.read().unwrap();
        assert_eq!(version, u64::from(n));
        assert_eq!(bytes[..5], [n, n, n + 100, n, 0]);
        assert_eq!(bytes[far as usize..], [n; 2]);
    }
    let beyond = [(0, vec![9]), (SIZE, vec![9])];
    assert_eq!(kind(under.write_pieces(&beyond)), Code::OutOfRange);
    assert_eq!(seen.read().unwrap().1, 3, "nothing of it was written");
    drop(under);
    block.write_at(0, b"x").unwrap();
}

#[test]
fn a_block_shrinks_and_grows_up_to_the_size_that_it_was_created_with() {
    let (server, set) = vault();
    let writers = [
        member(&server, "w0", keys(&set, WRITE)),
        by_tcp(&server, "w1", keys(&set, WRITE)),
    ];
    let reader = member(&server, "r", keys(&set, READ));
    for (n, writer) in writers.iter().enumerate() {
        let name = format!("b{n}");
        let block = writer.block(&name).create(SIZE).send().unwrap();
        let seen = reader.block(&name).attach().unwrap();
        let full = vec![7; SIZE as usize];
        block.write_at(0, &full).unwrap();
        let chunk = CHUNK_BYTES as u64;
        let mut kept = SIZE;
        // Within the last chunk, to the edge of one, to nothing; each time it grows again.
        for length in [SIZE - 1, chunk + 10, chunk, 3, 0] {
            block.resize(length).unwrap();
            kept = kept.min(length);
            assert_eq!(seen.read().unwrap().0, full[..kept as usize]);
            assert_eq!(seen.size(), length);
            block.resize(SIZE).unwrap();
            let (bytes, _) = seen.read().unwrap();
            assert_eq!(bytes.len() as u64, SIZE);
            let (old, added) = bytes.split_at(kept as usize);
            assert!(old == &full[..kept as usize] && added.iter().all(|byte| *byte == 0));
        }
        let version = block.read().unwrap().1;
        assert_eq!(kind(block.resize(SIZE + 1)), Code::TooLarge);
        assert_eq!(kind(seen.resize(1)), Code::Forbidden);
        assert_eq!(block.write_at(SIZE - 1, &[9]).unwrap(), version + 1);
        assert_eq!(seen.read().unwrap().0[SIZE as usize - 1], 9);
    }
}

#[test]
fn a_call_passes_a_sealed_block() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker
        .serve("sum", |request| {
            let block = request.block("numbers")?;
            let (bytes, _) = block.read()?;
            block.write_at(0, &[9])?;
            Ok::<_, HandlerError>(bytes.iter().map(|byte| u64::from(*byte)).sum::<u64>())
        })
        .unwrap();
    let caller = member(&server, "caller", keys(&set, WRITE));
    let block = caller
        .block("numbers")
        .create(100)
        .readable_by(&[])
        .send()
        .unwrap();
    block.write_at(0, &[2; 100]).unwrap();
    let call = caller
        .call("sum", &block.reference())
        .block_writable(&block);
    assert_eq!(call.send::<u64>().unwrap(), 200);
    assert_eq!(&block.read().unwrap().0[..2], &[9, 2]);
}

#[test]
fn a_persistent_block_is_ciphertext_on_disk_and_comes_back() {
    let (mut server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).persistent().send().unwrap();
    for n in 0..9 {
        block.write_at(n * 15_000, SECRET).unwrap();
    }
    block.flush().unwrap();
    block.resize(SIZE - 10).unwrap();
    block.flush().unwrap();
    server.kill();
    let mut looked_at = 0;
    let mut directories = vec![server.0.data_dir().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.is_file() {
                let bytes = std::fs::read(&path).unwrap();
                looked_at += bytes.len();
                let is_found = bytes.windows(SECRET.len()).any(|window| window == SECRET);
                assert!(!is_found, "{}", path.display());
            }
        }
    }
    assert!(looked_at as u64 > SIZE);
    server.restart();
    let reader = member(&server, "r", keys(&set, READ));
    let seen = reader.block("b").attach().unwrap();
    assert_eq!(seen.size(), SIZE - 10);
    assert!(seen.read().unwrap().0[8 * 15_000..].starts_with(SECRET));
    let info = seen.info().unwrap();
    assert_eq!(
        (&info["sealed"], &info["size"]),
        (&json!(true), &json!(SIZE))
    );
}

#[test]
fn a_block_in_memory_is_back_after_a_crash_of_the_server() {
    let (mut server, set) = vault();
    let writer = member(&server, "w", keys(&set, WRITE));
    let block = writer.block("b").create(SIZE).send().unwrap();
    block.write_at(0, SECRET).unwrap();
    // Rows are stored in order: when this app is answered, the block's row is on disk too.
    let _later = member(&server, "later", keys(&set, READ));
    server.kill();
    // The mapping works without the server.
    assert!(block.read().unwrap().0.starts_with(SECRET));
    server.restart();
    assert_eq!(block.write_at(SIZE - 1, b"x").unwrap(), 2);
    let reader = member(&server, "r", keys(&set, READ));
    let seen = reader.block("b").attach().unwrap();
    assert!(seen.read().unwrap().0.starts_with(SECRET));
    let info = seen.info().unwrap();
    assert_eq!((&info["size"], &info["version"]), (&json!(SIZE), &json!(2)));
}

#[test]
fn a_block_of_a_gated_pool_stays_plain_and_without_copies() {
    let server = Server::start();
    let set = key_set(3);
    let maker = App::connect_with(builder(&server, "maker")).unwrap();
    maker
        .request(&keys(&set, WRITE).pool_create("vault", true).unwrap())
        .unwrap();
    let writer = member(&server, "w", keys(&set, WRITE));
    let reader = member(&server, "r", keys(&set, READ));
    let block = writer.block("b").create(SIZE).send().unwrap();
    block.write_at(7, SECRET).unwrap();
    let seen = reader.block("b").attach().unwrap();
    assert!(block.is_mapped() && seen.is_mapped());
    assert_eq!(seen.info().unwrap()["sealed"], Value::Null);
    let first = seen.view(|view| (view.as_ptr() as usize % 4096, view.load::<u8>(7).unwrap()));
    assert_eq!(first.unwrap(), (0, SECRET[0]));
    let intruder = Intruder::new(&server, &set, "b");
    assert_eq!(intruder.read(intruder.slot() + 7, SECRET.len()), SECRET);
    assert_eq!(kind(reader.block("b").attach_writable()), Code::Forbidden);
    block.resize(SIZE * 2).unwrap();
    assert_eq!(seen.read().unwrap().0.len() as u64, SIZE * 2);
}
