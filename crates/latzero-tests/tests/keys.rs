//! App keys, administrators and encrypted pools: the real server, the real client, and who tries without the keys.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use latzero::blocking::App;
use latzero::{AppKey, Builder, Bytes, Code, HandlerError, Keys};
use latzero_crypto::app_key;
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Secret};
use latzero_crypto::proof::{self, ChannelBinding, Exchange};
use latzero_crypto::text;
use latzero_tests::{Server, Via, Wire};
use serde_json::{Value, json};

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("ok")
}

/// A file as key files are.
fn private_file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .unwrap();
    std::io::Write::write_all(&mut file, content.as_bytes()).unwrap();
    path
}

/// New keys of a pool, from a number.
fn key_set(seed: u8) -> KeySet {
    let secret = |of: u8| Secret::new(std::array::from_fn(|at| seed ^ of ^ (at as u8)));
    KeySet::new_pool(NewKeys {
        sigil: secret(0x20),
        shard: secret(0x40),
        seal: secret(0x60),
        owner: None,
    })
}

/// Those of the keys that some role has, as the client takes them.
fn keys(set: &KeySet, kinds: &[Kind]) -> Keys {
    let tokens: Vec<_> = kinds.iter().map(|kind| set.token(*kind).unwrap()).collect();
    Keys::from_tokens(tokens.iter().map(|token| token.as_str())).unwrap()
}

const WRITE: &[Kind] = &[Kind::Sigil, Kind::Shard, Kind::Seal];
const READ: &[Kind] = &[Kind::Sigil, Kind::Shard];
const JOIN: &[Kind] = &[Kind::Sigil];

fn builder(server: &Server, app: &str) -> Builder {
    latzero::App::builder(&format!(
        "latzero://{app}?socket={}",
        server.0.socket().display()
    ))
}

fn over_tcp(server: &Server, app: &str) -> Builder {
    latzero::App::builder(&format!("latzero://{app}@{}", server.0.tcp()))
}

/// A server with an encrypted pool `vault`, and its keys.
fn vault() -> (Server, KeySet) {
    let server = Server::start();
    let set = key_set(1);
    let maker = App::connect_with(builder(&server, "maker")).unwrap();
    let request = keys(&set, WRITE).pool_create("vault", false).unwrap();
    let made = maker.request(&request).unwrap();
    assert_eq!(made["encrypted"], true, "{made}");
    (server, set)
}

fn with_keys(server: &Server, app: &str, keys: Keys) -> Builder {
    let state_dir = server.0.data_dir().join("of-clients").join(app);
    builder(server, app)
        .keys("vault", keys)
        .state_dir(state_dir)
}

/// An app with keys, which keeps beside the server what it accepted.
fn member(server: &Server, app: &str, keys: Keys) -> App {
    App::connect_with(with_keys(server, app, keys)).unwrap()
}

/// What binds proofs to a connection over the Unix socket.
fn bound(server: &Server) -> ChannelBinding {
    ChannelBinding::Unix {
        uid: rustix::process::geteuid().as_raw(),
        pid: server.pid(),
    }
}

fn binary<const N: usize>(value: &Value) -> [u8; N] {
    text::decode(value.as_str().unwrap()).unwrap()
}

fn exchange(challenge: &Value, binding: ChannelBinding) -> Exchange {
    Exchange {
        client_nonce: [3; 32],
        server_nonce: binary(&challenge["server_nonce"]),
        server_instance: binary(&challenge["server_instance"]),
        binding,
    }
}

#[test]
fn an_app_with_a_key_is_nobody_elses() {
    let mut server = Server::start();
    let dir = server.0.data_dir().to_owned();
    let line = |seed: u8| app_key::AppKey::new(Secret::new([seed; 32])).to_text();
    let file = private_file(&dir, "shop", &format!("{}\n", line(1).as_str()));
    let other = private_file(&dir, "other", line(2).as_str());
    let key = AppKey::from_file(&file).unwrap();
    let app = App::connect_with(builder(&server, "shop").app_key(key.clone())).unwrap();
    app.close().unwrap();
    let refused = |builder: Builder| App::connect_with(builder).unwrap_err().kind();
    for _ in 0..2 {
        // Not without the key, not with another, not by the same user.
        assert_eq!(refused(builder(&server, "shop")), Code::Unauthenticated);
        assert_eq!(refused(over_tcp(&server, "shop")), Code::Unauthenticated);
        let other = AppKey::from_file(&other).unwrap();
        let with_other = builder(&server, "shop").app_key(other);
        assert_eq!(refused(with_other), Code::Unauthenticated);
        App::connect_with(builder(&server, "shop").app_key(key.clone())).unwrap();
        // With the key from anywhere, but over plain TCP only where that was allowed.
        let by_tcp = over_tcp(&server, "shop").app_key(key.clone());
        assert_eq!(refused(by_tcp.clone()), Code::Downgrade);
        App::connect_with(by_tcp.unbound(true)).unwrap();
        server.kill();
        server.restart();
    }
    // It outlives the registration, and an administrator removes it.
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    admin
        .request(&json!({"action": "app_forget", "app_id": "shop"}))
        .unwrap();
    assert_eq!(refused(builder(&server, "shop")), Code::Unauthenticated);
    admin
        .request(&json!({"action": "app_key_remove", "app_id": "shop"}))
        .unwrap();
    App::connect_with(builder(&server, "shop")).unwrap();
    // An AppID of somebody else takes no key over TCP.
    let by_tcp = over_tcp(&server, "admin").app_key(key).unbound(true);
    assert_eq!(refused(by_tcp), Code::Unauthenticated);
    // Key files that others may read are refused.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(
        AppKey::from_file(&file).unwrap_err().kind(),
        Code::KeyFormat
    );
}

#[test]
fn proofs_are_good_once_here_and_for_a_connection() {
    let server = Server::start();
    let key = app_key::AppKey::new(Secret::new([1; 32])).signing_key();
    let public = key.public().to_bytes();
    let prove = |wire: &mut Wire, app: &str, exchange: &Exchange, cb_type: &str| {
        let sig = key.sign(&proof::app_transcript(app, &public, exchange));
        wire.request(json!({
            "action": "app_proof", "app_id": "shop", "app_key": text::encode(&public),
            "client_nonce": text::encode(&exchange.client_nonce), "sig": text::encode(&sig),
            "cb_type": cb_type,
        }))
    };
    let challenge =
        |wire: &mut Wire| wire.request(json!({"action": "challenge"}))["response"].clone();
    let unix = bound(&server);
    let ChannelBinding::Unix { uid, pid } = unix else {
        unreachable!()
    };
    let wrong = [
        ChannelBinding::Unix { uid, pid: pid + 1 },
        ChannelBinding::Unix { uid: uid + 1, pid },
        ChannelBinding::None,
    ];
    for binding in wrong {
        let mut wire = server.connect(Via::Unix);
        let given = challenge(&mut wire);
        let reply = prove(
            &mut wire,
            "shop",
            &exchange(&given, binding),
            binding.name(),
        );
        assert_eq!(code(&reply), "unauthenticated", "{binding:?}");
        assert_eq!(reply["error"]["message"], "the proof was not accepted");
    }
    let mut wire = server.connect(Via::Unix);
    let mut other = server.connect(Via::Unix);
    let (given, theirs) = (challenge(&mut wire), challenge(&mut other));
    // Of another connection, of another app; and each refusal spends the challenge.
    let reply = prove(&mut wire, "shop", &exchange(&theirs, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    let reply = prove(&mut wire, "shop", &exchange(&given, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    let given = challenge(&mut wire);
    let reply = prove(&mut wire, "shop2", &exchange(&given, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    // The third refusal ends the connection.
    wire.wait_closed();
    // A good one is good once.
    let good = exchange(&theirs, unix);
    assert_eq!(code(&prove(&mut other, "shop", &good, "unix")), "ok");
    assert_eq!(
        code(&prove(&mut other, "shop", &good, "unix")),
        "unauthenticated"
    );
    other.send(&json!({"action": "handshake", "app_id": "shop"}));
    assert_eq!(other.receive()["status"], "ok");
    // A proof is small.
    let mut wire = server.connect(Via::Unix);
    wire.send(&json!({"action": "challenge", "x": "x".repeat(5000)}));
    assert_eq!(code(&wire.receive()), "frame_too_large");
    wire.wait_closed();
}

#[test]
fn whoever_guesses_over_tcp_waits() {
    let server = Server::start();
    let mut codes = Vec::new();
    while codes.last().is_none_or(|code| code != "overloaded") && codes.len() < 30 {
        let mut wire = server.connect(Via::Tcp);
        for _ in 0..2 {
            wire.request(json!({"action": "challenge"}));
            let reply = wire.request(json!({
                "action": "app_proof", "app_id": "a", "app_key": text::encode(&[1; 32]),
                "client_nonce": text::encode(&[1; 32]), "sig": text::encode(&[1; 64]),
                "cb_type": "none",
            }));
            codes.push(code(&reply).to_owned());
        }
    }
    let refused = codes
        .iter()
        .filter(|code| *code == "unauthenticated")
        .count();
    assert_eq!(refused, 20, "{codes:?}");
}

#[test]
fn an_administrator_and_the_server_prove_the_token_to_each_other() {
    let server = Server::with(&["admin_over_plain_tcp=true"]);
    let token = std::fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap();
    let app = App::connect_with(over_tcp(&server, "far")).unwrap();
    let reload = json!({"action": "reload"});
    assert_eq!(app.request(&reload).unwrap_err().kind(), Code::Forbidden);
    assert_eq!(
        app.prove_admin(&token, false).unwrap_err().kind(),
        Code::Downgrade
    );
    let wrong = "0".repeat(64);
    assert_eq!(
        app.prove_admin(&wrong, true).unwrap_err().kind(),
        Code::Unauthenticated
    );
    app.prove_admin(&token, true).unwrap();
    app.request(&reload).unwrap();
    // Files are for the server's own user on the Unix socket.
    let backup = json!({"action": "backup", "to": "/tmp/never"});
    assert_eq!(app.request(&backup).unwrap_err().kind(), Code::Forbidden);

    let server = Server::start();
    let app = App::connect_with(over_tcp(&server, "far")).unwrap();
    assert_eq!(
        app.prove_admin(&token, true).unwrap_err().kind(),
        Code::Forbidden
    );
    // The token is another one at each start.
    let next = std::fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap();
    let mut server = server;
    server.kill();
    server.restart();
    assert_ne!(
        std::fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap(),
        next
    );
}

#[test]
fn members_call_emit_and_stream_as_in_any_pool() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker
        .serve("add", |request| {
            let numbers: Vec<i64> = request.data()?;
            Ok::<_, HandlerError>(numbers.iter().sum::<i64>())
        })
        .unwrap();
    worker
        .serve("echo", |request| {
            assert_eq!(request.header("trace").as_deref(), Some("t1"));
            request.data::<Bytes>()
        })
        .unwrap();
    worker
        .serve("fail", |_| {
            Err::<(), _>(HandlerError::new("no_luck", "private").with_data(7))
        })
        .unwrap();
    worker
        .serve("count", |request| {
            for n in 0..10 {
                request.partial(&n)?;
            }
            Ok::<_, HandlerError>("done")
        })
        .unwrap();
    let caller = member(&server, "caller", keys(&set, READ));
    assert_eq!(caller.call("add", &[1, 2, 39]).send::<i64>().unwrap(), 42);
    let bytes = vec![0, 255, 7];
    let echo = caller
        .call("echo", &())
        .raw_bytes(bytes.clone())
        .header("trace", "t1");
    assert_eq!(echo.bytes().unwrap().0, bytes);
    let error = caller.call("fail", &()).send::<()>().unwrap_err();
    assert_eq!((error.code(), error.message()), ("no_luck", "private"));
    assert!(error.is_authenticated() && error.data() == Some(&json!(7)));
    let error = caller.call("nobody", &()).send::<()>().unwrap_err();
    assert!(error.kind() == Code::NoHandler && !error.is_authenticated());
    let mut stream = caller.call("count", &()).stream::<i64>();
    let items: Vec<_> = stream.by_ref().map(Result::unwrap).collect();
    assert_eq!(items, (0..10).collect::<Vec<_>>());
    let once = || {
        caller
            .call("add", &[1])
            .idempotency_key("once")
            .send::<i64>()
    };
    assert_eq!((once().unwrap(), once().unwrap()), (1, 1));
    let parked = caller.call("add", &[2]).park().send::<i64>();
    assert_eq!(parked.unwrap(), 2);
    let mut events = caller.on("news").unwrap();
    worker.emit("news", &"hot").send().unwrap();
    let event = events.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(event.data::<String>().unwrap(), "hot");
}
