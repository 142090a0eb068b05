//! An encrypted pool on a private server, and apps that have some of its keys.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use latzero::blocking::App;
use latzero::{Builder, Keys};
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Secret};
use latzero_crypto::proof::{ChannelBinding, Exchange, Joining};
use latzero_crypto::text;
use serde_json::{Value, json};

use crate::{Server, Via, Wire};

/// The code of a refusal, or `ok`.
#[must_use]
pub fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("ok")
}

/// New keys for a pool, derived from a number.
#[must_use]
pub fn key_set(seed: u8) -> KeySet {
    let secret = |of: u8| Secret::new(std::array::from_fn(|at| seed ^ of ^ (at as u8)));
    KeySet::new_pool(NewKeys {
        sigil: secret(0x20),
        shard: secret(0x40),
        seal: secret(0x60),
        owner: None,
    })
}

/// The keys of these kinds, in the form that the client takes.
#[must_use]
pub fn keys(set: &KeySet, kinds: &[Kind]) -> Keys {
    let tokens: Vec<_> = kinds.iter().map(|kind| set.token(*kind).unwrap()).collect();
    Keys::from_tokens(tokens.iter().map(|token| token.as_str())).unwrap()
}

/// The keys of a writer.
pub const WRITE: &[Kind] = &[Kind::Sigil, Kind::Shard, Kind::Seal];
/// The keys of a reader.
pub const READ: &[Kind] = &[Kind::Sigil, Kind::Shard];
/// The key of a member that can only join.
pub const JOIN: &[Kind] = &[Kind::Sigil];

/// Creates a file with the permissions of a key file; returns its path.
pub fn private_file(path: &Path, content: &str) -> PathBuf {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path).unwrap();
    file.write_all(content.as_bytes()).unwrap();
    path.to_owned()
}

/// An app that connects over the Unix socket.
#[must_use]
pub fn builder(server: &Server, app: &str) -> Builder {
    latzero::App::builder(&format!(
        "latzero://{app}?socket={}",
        server.0.socket().display()
    ))
}

/// Starts a server with an encrypted pool `vault`, and returns the pool's keys too.
#[must_use]
pub fn vault() -> (Server, KeySet) {
    vault_on(Server::start())
}

/// As [`vault`], on a server that runs.
#[must_use]
pub fn vault_on(server: Server) -> (Server, KeySet) {
    let set = key_set(1);
    let maker = App::connect_with(builder(&server, "maker")).unwrap();
    let request = keys(&set, WRITE).pool_create("vault", false).unwrap();
    let made = maker.request(&request).unwrap();
    assert_eq!(made["encrypted"], true, "{made}");
    (server, set)
}

/// As [`builder`], with keys of the pool `vault`.
#[must_use]
pub fn with_keys(server: &Server, app: &str, keys: Keys) -> Builder {
    let state_dir = server.0.data_dir().join("of-clients").join(app);
    builder(server, app)
        .keys("vault", keys)
        .state_dir(state_dir)
}

/// An app with keys. It stores what it accepted under the data directory of the server.
pub fn member(server: &Server, app: &str, keys: Keys) -> App {
    App::connect_with(with_keys(server, app, keys)).unwrap()
}

/// The binding of proofs for a connection over the Unix socket.
#[must_use]
pub fn bound(server: &Server) -> ChannelBinding {
    ChannelBinding::Unix {
        uid: rustix::process::geteuid().as_raw(),
        pid: server.pid(),
    }
}

/// Decodes a binary field of a reply.
#[must_use]
pub fn binary<const N: usize>(value: &Value) -> [u8; N] {
    text::decode(value.as_str().unwrap()).unwrap()
}

/// The context that a proof is bound to.
#[must_use]
pub fn exchange(challenge: &Value, binding: ChannelBinding) -> Exchange {
    Exchange {
        client_nonce: [3; 32],
        server_nonce: binary(&challenge["server_nonce"]),
        server_instance: binary(&challenge["server_instance"]),
        binding,
    }
}

/// Proves the pool on a raw connection, with the roles of `kinds`; returns the reply.
pub fn prove(wire: &mut Wire, server: &Server, set: &KeySet, app: &str, kinds: &[Kind]) -> Value {
    prove_in(wire, server, set, "vault", app, kinds)
}

/// As [`prove`], for another pool.
pub fn prove_in(
    wire: &mut Wire,
    server: &Server,
    set: &KeySet,
    pool: &str,
    app: &str,
    kinds: &[Kind],
) -> Value {
    let proof = proof_for(wire, bound(server), set, pool, app, kinds);
    wire.request(proof)
}

/// Asks for a challenge, and returns the message with the proof.
pub fn proof_for(
    wire: &mut Wire,
    binding: ChannelBinding,
    set: &KeySet,
    pool: &str,
    app: &str,
    kinds: &[Kind],
) -> Value {
    let asked = json!({"action": "pool_challenge", "pool": pool});
    let challenge = wire.request(asked)["response"].clone();
    let joining = Joining {
        pool,
        pool_id: binary(&challenge["pool_id"]),
        epoch: challenge["epoch"].as_u64().unwrap() as u32,
        suite: challenge["suite"].as_u64().unwrap() as u16,
        app_id: app,
        exchange: exchange(&challenge, binding),
    };
    let tokens: Vec<_> = kinds.iter().map(|kind| set.token(*kind).unwrap()).collect();
    let held = KeySet::from_tokens(tokens.iter().map(|token| token.as_str())).unwrap();
    let proof = joining.prove(&held, held.roles().unwrap()).unwrap();
    let proof: Value = serde_json::from_str(&proof.to_json()).unwrap();
    json!({"action": "pool_join", "pool": pool, "proof": proof})
}

/// A raw connection that names only the encrypted pool.
#[must_use]
pub fn raw(server: &Server, via: Via, app: &str) -> Wire {
    server.app(via, json!({"app_id": app, "encrypted_pools": ["vault"]}))
}
