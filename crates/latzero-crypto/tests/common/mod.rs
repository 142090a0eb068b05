//! The vectors, and the pool in them.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::sync::LazyLock;

use latzero_crypto::Suite;
use latzero_crypto::backend::{self, Backend};
use latzero_crypto::block::{BlockId, Geometry};
use latzero_crypto::descriptor::{Descriptor, Expected, History, NewEpoch, NewPool, OldContent};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::keys::{KeySet, NewKeys, PoolKey, Secret};
use latzero_crypto::proof::{ChannelBinding, Exchange, Joining};
use serde_json::Value;

static VECTORS: LazyLock<Value> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../../../conformance/keys/vectors.json"))
        .expect("the vectors are JSON")
});

/// The value at a JSON pointer, for example `/keys/given`.
pub(crate) fn at(pointer: &str) -> &'static Value {
    VECTORS
        .pointer(pointer)
        .unwrap_or_else(|| panic!("no vector {pointer}"))
}

pub(crate) fn text(pointer: &str) -> &'static str {
    at(pointer)
        .as_str()
        .unwrap_or_else(|| panic!("{pointer} is no text"))
}

pub(crate) fn number(pointer: &str) -> u64 {
    at(pointer)
        .as_u64()
        .unwrap_or_else(|| panic!("{pointer} is no number"))
}

pub(crate) fn bytes(pointer: &str) -> Vec<u8> {
    unhex(text(pointer))
}

pub(crate) fn array<const N: usize>(pointer: &str) -> [u8; N] {
    bytes(pointer)
        .try_into()
        .unwrap_or_else(|_| panic!("{pointer} has another length"))
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| {
            let pair = std::str::from_utf8(pair).expect("hex is ASCII");
            u8::from_str_radix(pair, 16).expect("hex digits")
        })
        .collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&library().sha256(&[bytes]))
}

/// Asserts that bytes equal a vector.
#[track_caller]
pub(crate) fn same(got: &[u8], pointer: &str) {
    assert_eq!(hex(got), text(pointer), "{pointer}");
}

/// Runs a test on each library.
pub(crate) fn on_each(test: impl Fn(&'static dyn Backend)) {
    for &backend in backend::all() {
        println!("with {}", backend.name());
        test(backend);
    }
}

/// The variable that names the library of a run.
pub(crate) const LIBRARY: &str = "CRYPTO_LIBRARY";

/// The library of this run: the preferred one, or the one that [`LIBRARY`] names.
pub(crate) fn library() -> &'static dyn Backend {
    let Some(name) = std::env::var_os(LIBRARY) else {
        return backend::preferred();
    };
    let named = backend::all().iter().find(|library| library.name() == name);
    *named.expect("it names a library of this build")
}

/// The three keys, and the owner key if `owner` is true.
pub(crate) fn keys(owner: bool) -> KeySet {
    let secret = |name: &str| Secret::new(array(&format!("/keys/given/{name}")));
    KeySet::new_pool(NewKeys {
        sigil: secret("sigil_key"),
        shard: secret("cipher_shard"),
        seal: secret("oblivion_seal"),
        owner: owner.then(|| secret("owner_key")),
    })
    .with_backend(library())
}

/// The keys of epoch 3.
pub(crate) fn keys3() -> KeySet {
    let secret = |name: &str| Secret::new(array(&format!("/descriptors/epoch3/given/{name}")));
    KeySet::new_pool(NewKeys {
        sigil: secret("sigil_key"),
        shard: secret("cipher_shard"),
        seal: secret("oblivion_seal"),
        owner: None,
    })
    .with_backend(library())
}

/// The set without the other kinds of keys.
pub(crate) fn only(keys: &KeySet, kinds: &[latzero_crypto::keys::Kind]) -> KeySet {
    let text = keys.to_file(kinds).expect("all of them are here");
    let keys = KeySet::from_file(text.as_bytes()).expect("a key file reads as it was written");
    keys.with_backend(library())
}

pub(crate) fn new_pool(suite: Suite) -> NewPool<'static> {
    let given = "/descriptors/epoch1/given";
    NewPool {
        name: text("/descriptors/pool/name"),
        suite,
        pool_id: array("/descriptors/pool/pool_id"),
        salt: array(&format!("{given}/salt")),
        created_ms: number(&format!("{given}/created_ms")),
        wrap_nonce: array(&format!("{given}/wrap_nonce")),
    }
}

pub(crate) fn new_epoch(epoch: u32) -> NewEpoch {
    let given = format!("/descriptors/epoch{epoch}/given");
    let removes = number(&format!("{given}/min_content_epoch")) == u64::from(epoch);
    NewEpoch {
        salt: array(&format!("{given}/salt")),
        created_ms: number(&format!("{given}/created_ms")),
        wrap_nonce: array(&format!("{given}/wrap_nonce")),
        content: if removes {
            OldContent::Refused
        } else {
            OldContent::AsBefore
        },
        history: History::Kept(array(&format!("{given}/prev_nonce"))),
    }
}

pub(crate) fn descriptor1() -> Descriptor {
    Descriptor::create(&keys(false), &new_pool(Suite::Sealed)).expect("all keys are here")
}

pub(crate) fn descriptor2() -> Descriptor {
    let rotated = descriptor1().rotate(&keys(false), &keys(false), &new_epoch(2));
    rotated.expect("all keys are here")
}

pub(crate) fn descriptor3() -> Descriptor {
    let rotated = descriptor2().rotate(&keys(false), &keys3(), &new_epoch(3));
    rotated.expect("all keys are here")
}

/// What an honest server states about a pool with this descriptor.
pub(crate) fn expected(descriptor: &Descriptor) -> Expected<'_> {
    Expected {
        name: descriptor.name(),
        pool_id: descriptor.pool_id(),
        epoch: descriptor.epoch(),
        suite: descriptor.suite().number(),
    }
}

/// The pool key, as a writer derives it.
pub(crate) fn pool_key(keys: &KeySet, descriptor: &Descriptor) -> PoolKey {
    keys.pool_key(descriptor.epoch_id())
        .expect("all keys are here")
}

pub(crate) fn epochs(now_ms: u64) -> Epochs {
    let descriptor = descriptor1();
    let key = pool_key(&keys(false), &descriptor);
    Epochs::new(descriptor, key, now_ms)
}

pub(crate) fn exchange(binding: ChannelBinding) -> Exchange {
    Exchange {
        client_nonce: array("/proofs/exchange/client_nonce"),
        server_nonce: array("/proofs/exchange/server_nonce"),
        server_instance: array("/proofs/exchange/server_instance"),
        binding,
    }
}

pub(crate) fn unix() -> ChannelBinding {
    let part = |name| u32::try_from(number(&format!("/proofs/unix/{name}"))).expect("u32");
    ChannelBinding::Unix {
        uid: part("uid"),
        pid: part("pid"),
    }
}

pub(crate) fn joining(binding: ChannelBinding) -> Joining<'static> {
    Joining {
        pool: text("/descriptors/pool/name"),
        pool_id: array("/descriptors/pool/pool_id"),
        epoch: 1,
        suite: 1,
        app_id: text("/proofs/app_id"),
        exchange: exchange(binding),
    }
}

pub(crate) fn block_id() -> BlockId<'static> {
    BlockId {
        pool_id: array("/descriptors/pool/pool_id"),
        suite: Suite::Sealed,
        uid: array("/block/given/block_id"),
        name: text("/block/given/name"),
    }
}

pub(crate) fn geometry() -> Geometry {
    Geometry::of(number("/block/given/size")).expect("a small block")
}

/// The block's plaintext.
pub(crate) fn plaintext() -> Vec<u8> {
    (0..number("/block/given/length"))
        .map(|i| i.to_le_bytes()[0])
        .collect()
}
