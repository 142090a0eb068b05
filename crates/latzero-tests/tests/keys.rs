//! App keys, administrators and encrypted pools: the real server, the real client, and attackers
//! without the keys.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::thread::JoinHandle;
use std::time::Duration;

use latzero::blocking::App;
use latzero::{AppKey, Builder, Bytes, Code, HandlerError, Keys};
use latzero_crypto::app_key;
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Secret};
use latzero_crypto::proof::{self, ChannelBinding, Exchange};
use latzero_crypto::text;
use latzero_protocol::frame;
use latzero_tests::vault::{
    JOIN, READ, WRITE, bound, builder, code, exchange, key_set, keys, member, private_file,
    proof_for, prove, raw, vault, vault_on, with_keys,
};
use latzero_tests::{Server, TIMEOUT, Via, Wire, eventually};
use serde_json::{Value, json};

fn over_tcp(server: &Server, app: &str) -> Builder {
    latzero::App::builder(&format!("latzero://{app}@{}", server.0.tcp()))
}

#[test]
fn an_app_id_with_a_key_belongs_to_its_holder() {
    let mut server = Server::start();
    let dir = server.0.data_dir().to_owned();
    let line = |seed: u8| app_key::AppKey::new(Secret::new([seed; 32])).to_text();
    let file = private_file(&dir.join("shop"), &format!("{}\n", line(1).as_str()));
    let other = private_file(&dir.join("other"), line(2).as_str());
    let key = AppKey::from_file(&file).unwrap();
    let app = App::connect_with(builder(&server, "shop").app_key(key.clone())).unwrap();
    app.close().unwrap();
    let refused = |builder: Builder| App::connect_with(builder).unwrap_err().kind();
    for _ in 0..2 {
        // Refused without the key, with another key, and for the same user without the key.
        assert_eq!(refused(builder(&server, "shop")), Code::Unauthenticated);
        assert_eq!(refused(over_tcp(&server, "shop")), Code::Unauthenticated);
        let other = AppKey::from_file(&other).unwrap();
        let with_other = builder(&server, "shop").app_key(other);
        assert_eq!(refused(with_other), Code::Unauthenticated);
        App::connect_with(builder(&server, "shop").app_key(key.clone())).unwrap();
        // With the key from anywhere, but over plain TCP only if that was allowed.
        let by_tcp = over_tcp(&server, "shop").app_key(key.clone());
        assert_eq!(refused(by_tcp.clone()), Code::Downgrade);
        App::connect_with(by_tcp.unbound(true)).unwrap();
        server.kill();
        server.restart();
    }
    // The key outlives the registration, until an administrator removes it.
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    admin
        .request(&json!({"action": "app_forget", "app_id": "shop"}))
        .unwrap();
    assert_eq!(refused(builder(&server, "shop")), Code::Unauthenticated);
    admin
        .request(&json!({"action": "app_key_remove", "app_id": "shop"}))
        .unwrap();
    App::connect_with(builder(&server, "shop")).unwrap();
    // An AppID that belongs to another user accepts no key over TCP.
    let by_tcp = over_tcp(&server, "admin").app_key(key).unbound(true);
    assert_eq!(refused(by_tcp), Code::Unauthenticated);
    // Key files that others may read are refused.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(
        AppKey::from_file(&file).unwrap_err().kind(),
        Code::KeyFormat
    );
}

/// Listens in place of the server, and passes one connection on to it. Returns the address, and a
/// thread that ends with the connection and returns what the client sent.
fn relay(server: &Server) -> (std::net::SocketAddr, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let upstream = server.0.tcp().to_owned();
    let thread = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(upstream).unwrap();
        let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        std::thread::spawn(move || {
            // Either side may be gone already.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let (mut sent, mut piece) = (Vec::new(), [0; 4096]);
        while let Ok(read @ 1..) = client.read(&mut piece) {
            sent.extend_from_slice(&piece[..read]);
            if server.write_all(&piece[..read]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Both);
        sent
    });
    (address, thread)
}

/// A process that listens on the port of a stopped server could forward a proof to the real one.
#[test]
fn a_relay_on_the_port_gets_no_proof() {
    let (server, set) = vault();
    let proofs = |builder: &dyn Fn(&str) -> Builder| {
        let (address, relayed) = relay(&server);
        let refused = App::connect_with(builder(&format!("latzero://shop@{address}")));
        let kind = refused.map(|_| ()).unwrap_err().kind();
        let sent = String::from_utf8_lossy(&relayed.join().unwrap()).into_owned();
        (kind, sent.contains("client_nonce"))
    };
    let line = app_key::AppKey::new(Secret::new([1; 32])).to_text();
    let file = private_file(&server.0.data_dir().join("shop"), line.as_str());
    let key = AppKey::from_file(&file).unwrap();
    let with_app_key = |url: &str| latzero::App::builder(url).app_key(key.clone());
    assert_eq!(proofs(&with_app_key), (Code::Downgrade, false));
    let state = server.0.data_dir().join("of-clients");
    let with_pool_keys = |url: &str| {
        let builder = latzero::App::builder(url).keys("vault", keys(&set, WRITE));
        builder.state_dir(state.clone())
    };
    assert_eq!(proofs(&with_pool_keys), (Code::Downgrade, false));
    // With the permission it is sent: the test sees what it looks for.
    let permitted = |url: &str| with_app_key(url).unbound(true);
    let (address, relayed) = relay(&server);
    drop(App::connect_with(permitted(&format!("latzero://shop@{address}"))).unwrap());
    let sent = String::from_utf8_lossy(&relayed.join().unwrap()).into_owned();
    assert!(sent.contains("client_nonce"), "{sent}");
    let (address, relayed) = relay(&server);
    let permitted = with_pool_keys(&format!("latzero://shop2@{address}")).unbound(true);
    drop(App::connect_with(permitted).unwrap());
    let sent = String::from_utf8_lossy(&relayed.join().unwrap()).into_owned();
    assert!(sent.contains("client_nonce"), "{sent}");
}

#[test]
fn a_proof_is_valid_once_for_one_server_and_connection() {
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
    // Proofs of another connection or another app; each refusal uses up the challenge.
    let reply = prove(&mut wire, "shop", &exchange(&theirs, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    let reply = prove(&mut wire, "shop", &exchange(&given, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    let given = challenge(&mut wire);
    let reply = prove(&mut wire, "shop2", &exchange(&given, unix), "unix");
    assert_eq!(code(&reply), "unauthenticated");
    // The third refusal ends the connection.
    wire.wait_closed();
    // A valid proof is accepted only once.
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

/// Sends wrong proofs over TCP until none is checked any more; returns what became of them.
fn guess(server: &Server) -> Vec<String> {
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
    codes
}

#[test]
fn guessing_over_tcp_is_rate_limited() {
    let server = Server::start();
    let codes = guess(&server);
    let refused = codes
        .iter()
        .filter(|code| *code == "unauthenticated")
        .count();
    assert_eq!(refused, 20, "{codes:?}");
    // Whoever goes on is read again, though not at once; others are not affected.
    let mut wire = server.connect(Via::Tcp);
    for _ in 0..3 {
        wire.send(&json!({"action": "challenge", "id": "c"}));
        wire.send(&json!({
            "id": "p", "action": "app_proof", "app_id": "a", "app_key": text::encode(&[1; 32]),
            "client_nonce": text::encode(&[1; 32]), "sig": text::encode(&[1; 64]),
            "cb_type": "none",
        }));
    }
    App::connect_with(over_tcp(&server, "other")).unwrap();
    for _ in 0..3 {
        assert_eq!(code(&wire.receive()), "ok");
        assert_eq!(code(&wire.receive()), "overloaded");
    }
    wire.send(&json!({"action": "handshake", "app_id": "late"}));
    assert_eq!(wire.receive()["status"], "ok");
}

/// A connection that closes while it is not read is gone at once: it holds no descriptor once it
/// no longer counts as a connection.
#[test]
fn whoever_guesses_and_leaves_holds_no_descriptor() {
    let server = Server::start();
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let mut held = || {
        let stats = admin.request(json!({"action": "stats"}))["response"].clone();
        let count = |value: &Value| value.as_u64().unwrap();
        (
            count(&stats["transport"]["connections"]),
            count(&stats["resources"]["descriptors"]),
        )
    };
    guess(&server);
    eventually(|| held().0 == 1);
    let before = held();
    let mut wires = Vec::new();
    for _ in 0..20 {
        let mut wire = server.connect(Via::Tcp);
        wire.request(json!({"action": "challenge"}));
        wire.send(&json!({
            "id": "p", "action": "app_proof", "app_id": "a", "app_key": text::encode(&[1; 32]),
            "client_nonce": text::encode(&[1; 32]), "sig": text::encode(&[1; 64]),
            "cb_type": "none",
        }));
        // With an unread reply the end is a reset, which the server gets without reading.
        assert!(wire.has_more(TIMEOUT));
        wires.push(wire);
    }
    drop(wires);
    let mut now = held();
    eventually(|| {
        now = held();
        now.0 == before.0
    });
    assert_eq!(now, before);
}

/// A proof may wait behind requests that are being stored. It costs its connection a rest then too,
/// and no more than that.
#[test]
fn a_guess_that_waited_for_the_disk_does_not_end_the_connection() {
    let server = Server::with(&["limits.in_flight_max=4"]);
    guess(&server);
    let mut wire = server.app(Via::Tcp, json!({"app_id": "late"}));
    let proof = wrong_proof(&mut wire);
    let parked = |id| {
        let id = format!("parked-{id}");
        json!({"action": "trigger", "process": "t", "park": true, "id": id})
    };
    // With one write, so that they are read before the first one is stored.
    let mut frames = Vec::new();
    for message in (0..12).map(parked).chain([proof]) {
        let message = message.to_string();
        frame::append(&mut frames, |out| out.extend_from_slice(message.as_bytes()));
    }
    wire.send_bytes(&frames);
    let mut waits = BTreeSet::from_iter((0..12).map(|id| format!("parked-{id}")));
    waits.insert("wrong".into());
    while !waits.is_empty() {
        let reply = wire.receive();
        let id = reply["in_reply_to"].as_str().unwrap();
        assert!(waits.remove(id), "{reply}");
        assert_eq!(code(&reply) == "overloaded", id == "wrong", "{reply}");
    }
    assert_eq!(code(&wire.request(json!({"action": "ping"}))), "ok");
    // And its end is noticed.
    drop(wire);
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let mut is_live = || {
        let apps = admin.request(json!({"action": "app_list"}))["response"]["apps"].clone();
        let apps = apps.as_array().unwrap().clone();
        let late = apps.into_iter().find(|app| app["app_id"] == "late");
        late.is_some_and(|late| late["live"] == true)
    };
    eventually(|| !is_live());
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
    // Only the server's own user on the Unix socket may name files.
    let backup = json!({"action": "backup", "to": "/tmp/never"});
    assert_eq!(app.request(&backup).unwrap_err().kind(), Code::Forbidden);

    let server = Server::start();
    let app = App::connect_with(over_tcp(&server, "far")).unwrap();
    assert_eq!(
        app.prove_admin(&token, true).unwrap_err().kind(),
        Code::Forbidden
    );
    // The token is different after each start.
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
    // Who takes no items still gets the end.
    assert_eq!(caller.call("count", &()).send::<String>().unwrap(), "done");
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

#[test]
fn an_encrypted_pool_looks_missing_without_a_proof() {
    let (mut server, set) = vault();
    let _worker = member(&server, "worker", keys(&set, WRITE));
    let mut stranger = server.app(Via::Tcp, json!({"app_id": "stranger"}));
    for pool in ["vault", "nothing"] {
        for (action, expected) in [
            ("pool_info", "no_pool"),
            ("app_list", "no_pool"),
            ("pool_remove", "no_pool"),
            ("pool_leave", "not_member"),
            ("watch", "not_member"),
            ("pool_chain", "not_member"),
            ("memory_list", "not_member"),
        ] {
            let reply = stranger.request(json!({"action": action, "pool": pool}));
            assert_eq!(code(&reply), expected, "{action} {pool}: {reply}");
            let text = reply.to_string().replace(pool, "*");
            let same = stranger.request(json!({"action": action, "pool": "other"}));
            assert_eq!(text, same.to_string().replace("other", "*"));
        }
    }
    for listing in ["pool_list", "app_list", "stats"] {
        let reply = stranger.request(json!({"action": listing}));
        assert!(!reply.to_string().contains("vault"), "{reply}");
    }
    // Only the fact that the name is taken can't be hidden.
    for request in [
        json!({"action": "pool_create", "pool": "vault"}),
        json!({"action": "pool_join", "pool": "vault"}),
    ] {
        assert_eq!(code(&stranger.request(request)), "unauthenticated");
    }
    let mut named = server.connect(Via::Tcp);
    named.send(&json!({"action": "handshake", "app_id": "named", "pools": ["vault"]}));
    assert_eq!(code(&named.receive()), "unauthenticated");
    // A challenge looks the same for existing and missing pools, also after a restart.
    let challenge = |server: &Server, pool: &str| {
        let mut wire = server.app(Via::Tcp, json!({"app_id": "asker"}));
        let reply = wire.request(json!({"action": "pool_challenge", "pool": pool}));
        let reply = &reply["response"];
        assert_eq!(reply.as_object().unwrap().len(), 5, "{reply}");
        assert_eq!((&reply["epoch"], &reply["suite"]), (&json!(1), &json!(1)));
        (reply["pool_id"].clone(), reply["server_nonce"].clone())
    };
    let (before, plain) = (challenge(&server, "nothing"), challenge(&server, "default"));
    assert_ne!(before.0, plain.0);
    assert_ne!(before.1, challenge(&server, "nothing").1);
    server.kill();
    server.restart();
    assert_eq!(challenge(&server, "nothing").0, before.0);
    // An administrator sees that the pool exists, and nothing else.
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let seen = admin.request(json!({"action": "pool_info", "pool": "vault"}))["response"].clone();
    assert_eq!(
        (&seen["encrypted"], &seen["owner"]),
        (&json!(true), &Value::Null)
    );
    assert!(seen["triggers"].is_null() && seen["epoch"] == 1, "{seen}");
}

#[test]
fn roles_are_checked_for_each_request() {
    let (server, set) = vault();
    let mut join = raw(&server, Via::Unix, "j");
    let mut read = raw(&server, Via::Unix, "r");
    let mut write = raw(&server, Via::Unix, "w");
    // Before the proof nobody is a member; afterwards the proved roles apply.
    let call = json!({"action": "trigger", "process": "t", "pool": "vault", "data": "TFpFVgABAA"});
    assert_eq!(code(&join.request(call.clone())), "not_member");
    assert_eq!(
        prove(&mut join, &server, &set, "j", JOIN)["response"]["roles"],
        1
    );
    assert_eq!(
        prove(&mut read, &server, &set, "r", READ)["response"]["roles"],
        3
    );
    assert_eq!(
        prove(&mut write, &server, &set, "w", WRITE)["response"]["roles"],
        7
    );
    // A proof for another app is not valid.
    assert_eq!(
        code(&prove(&mut join, &server, &set, "x", JOIN)),
        "unauthenticated"
    );
    let ask = |wire: &mut Wire, mut request: Value| {
        request["pool"] = "vault".into();
        code(&wire.request(request)).to_owned()
    };
    let info = json!({"action": "pool_info"});
    for wire in [&mut join, &mut read, &mut write] {
        assert_eq!(ask(wire, info.clone()), "ok");
    }
    let emit = json!({"action": "emit", "process": "t", "data": "TFpFVgABAA"});
    assert_eq!(ask(&mut join, call.clone()), "forbidden");
    assert_eq!(ask(&mut join, emit.clone()), "forbidden");
    assert_eq!(ask(&mut read, call.clone()), "no_handler");
    assert_eq!(ask(&mut read, emit), "ok");
    assert_eq!(
        ask(
            &mut read,
            json!({"action": "pool_rotate", "descriptor": "AA"})
        ),
        "forbidden"
    );
    assert_eq!(
        ask(
            &mut write,
            json!({"action": "pool_rotate", "descriptor": "AA"})
        ),
        "bad_message"
    );
    assert_eq!(
        ask(
            &mut read,
            json!({"action": "memory_create", "block_id": "b", "size": 1})
        ),
        "forbidden"
    );
    // A reader may listen, but not serve.
    for (concurrency, served) in [(json!(0), 1), (json!(1), 0)] {
        let name = format!("t{concurrency}");
        let spec = json!([{"name": name, "concurrency": concurrency}]);
        read.request(json!({"action": "trigger_register", "triggers": spec}));
        let info = write.request(json!({"action": "pool_info", "pool": "vault"}));
        let triggers = info["response"]["triggers"].as_array().unwrap();
        let found = triggers
            .iter()
            .filter(|trigger| trigger["name"] == json!(name))
            .count();
        assert_eq!(found, served, "{info}");
        // Where it names the pool, it is told.
        let spec = json!([{"name": name, "concurrency": concurrency, "pools": ["vault"]}]);
        let reply = read.request(json!({"action": "trigger_register", "triggers": spec}));
        let expected = if served == 1 { "ok" } else { "forbidden" };
        assert_eq!(code(&reply), expected, "{reply}");
    }
    // Data that is not sealed is refused.
    for data in [
        json!("plain"),
        json!({"x": 1}),
        json!(null),
        json!("TFpFVgAA"),
    ] {
        let mut plain = call.clone();
        plain["data"] = data;
        assert_eq!(ask(&mut write, plain), "bad_message");
    }
    assert_eq!(
        ask(&mut read, json!({"action": "pool_remove", "force": true})),
        "ok"
    );
}

#[test]
fn an_app_that_reconnects_is_restored_once_it_proves_the_pool_again() {
    let (mut server, set) = vault();
    let mut app = raw(&server, Via::Unix, "app");
    prove(&mut app, &server, &set, "app", WRITE);
    let served = json!({"action": "trigger_register", "triggers": ["t"]});
    assert_eq!(code(&app.request(served)), "ok");
    app.request(json!({"action": "watch", "pool": "vault"}));
    server.kill();
    server.restart();
    // A handshake that does not name the pool leaves its stored membership unchanged.
    let ack = |wire: &mut Wire, handshake: Value| {
        wire.send(&handshake);
        wire.receive()
    };
    let mut plain = server.connect(Via::Unix);
    let reply = ack(&mut plain, json!({"action": "handshake", "app_id": "app"}));
    assert_eq!(
        (&reply["rehydrated"], &reply["pools"]),
        (&json!(true), &json!([])),
        "{reply}"
    );
    let reply = prove(&mut plain, &server, &set, "app", WRITE)["response"].clone();
    assert_eq!(reply["rehydrated"], true, "{reply}");
    assert_eq!(
        (&reply["triggers"], &reply["watching"]),
        (&json!(["t"]), &json!(true))
    );
}

/// A reply to a proof has the last descriptors only; a client that knew older ones asks for more.
#[test]
fn a_client_follows_the_pool_over_any_number_of_rotations() {
    let (server, set) = vault();
    let state = server.0.data_dir().join("of-the-reader");
    let reader = |keys| {
        let builder = with_keys(&server, "reader", keys).state_dir(&state);
        App::connect_with(builder)
    };
    drop(reader(keys(&set, READ)).unwrap());
    let worker = member(&server, "worker", keys(&set, WRITE));
    for _ in 0..90 {
        worker
            .rotate_pool("vault", &keys(&set, WRITE), false)
            .unwrap();
    }
    let back = reader(keys(&set, READ)).unwrap();
    worker.serve("t", |_| Ok::<_, HandlerError>(1)).unwrap();
    assert_eq!(back.call("t", &()).send::<i64>().unwrap(), 1);
    // A state that cannot be read may be a newer one than the server's.
    drop(back);
    let files = std::fs::read_dir(&state)
        .unwrap()
        .map(|file| file.unwrap().path());
    let stored: Vec<_> = files.filter(|path| path.is_file()).collect();
    let [stored] = &stored[..] else {
        panic!("one pool, not {stored:?}")
    };
    std::fs::write(stored, "").unwrap();
    let error = reader(keys(&set, READ)).unwrap_err();
    assert_eq!(error.kind(), Code::Storage);
    assert!(error.message().contains("accept-restore"), "{error}");
}

#[test]
fn keys_come_from_other_programs_and_from_passphrases_too() {
    let server = Server::start();
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    let set = key_set(0x90);
    let create = keys(&set, WRITE).pool_create("vault", false).unwrap();
    admin.request(&create).unwrap();
    let raw = |kind| {
        let token = set.token(kind).unwrap();
        let token = latzero_crypto::keys::Token::parse(&token).unwrap();
        *token.secret
    };
    let [sigil, shard, seal] = [Kind::Sigil, Kind::Shard, Kind::Seal].map(raw);
    let reader = Keys::from_raw(&sigil, Some(&shard), None).unwrap();
    let writer = Keys::from_raw(&sigil, Some(&shard), Some(&seal)).unwrap();
    let reader = member(&server, "reader", reader);
    let writer = member(&server, "writer", writer);
    writer.serve("t", |_| Ok::<_, HandlerError>(1)).unwrap();
    assert_eq!(reader.call("t", &()).send::<i64>().unwrap(), 1);
    let text = Keys::from_raw(b"correct horse battery staple 123", None, None);
    let error = text.unwrap_err();
    assert_eq!(error.kind(), Code::KeyFormat);
    assert!(error.message().contains("from-passphrase"), "{error}");
    // The same words give the same keys, for one pool.
    let made = Keys::from_passphrase("lodge", "correct horse").unwrap();
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    admin
        .request(&made.pool_create("lodge", false).unwrap())
        .unwrap();
    for (words, pool, is_in) in [
        ("correct horse", "lodge", true),
        ("correct house", "lodge", false),
        ("correct horse", "vault", false),
    ] {
        let keys = Keys::from_passphrase(pool, words).unwrap();
        let app = builder(&server, "app").state_dir(server.0.data_dir().join("of-the-app"));
        let joined = App::connect_with(app.keys("lodge", keys));
        assert_eq!(joined.is_ok(), is_in, "{words} {pool}");
    }
}

#[test]
fn a_rotation_removes_holders_of_the_old_keys() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker.serve("t", |_| Ok::<_, HandlerError>(1)).unwrap();
    let reader = member(&server, "reader", keys(&set, READ));
    assert_eq!(reader.call("t", &()).send::<i64>().unwrap(), 1);
    let parked = reader
        .call("later", &())
        .timeout(Duration::from_secs(60))
        .send_parked();
    drop(parked.unwrap());
    // A rotation to the same keys: everybody stays, and continues.
    let done = worker
        .rotate_pool("vault", &keys(&set, WRITE), false)
        .unwrap();
    assert_eq!(
        (&done["epoch"], &done["members_dropped"]),
        (&json!(2), &json!(0)),
        "{done}"
    );
    assert_eq!(reader.call("t", &()).send::<i64>().unwrap(), 1);
    // What ends with the members that are removed.
    worker.block("b").create(100).send().unwrap();
    let repeated = reader.call("t", &()).idempotency_key("once");
    assert_eq!(repeated.send::<i64>().unwrap(), 1);
    let mut holder = raw(&server, Via::Unix, "holder");
    prove(&mut holder, &server, &set, "holder", READ);
    let lock = json!({"action": "memory_lock", "block_id": "b", "mode": "shared"});
    assert_eq!(code(&holder.request(lock)), "ok");
    // New keys for readers.
    let next = KeySet::new_pool(NewKeys {
        sigil: Secret::new([9; 32]),
        shard: Secret::new([8; 32]),
        seal: latzero_crypto::keys::Token::parse(&set.token(Kind::Seal).unwrap())
            .unwrap()
            .secret,
        owner: None,
    });
    // A call that its handler never answers, and the block that it lends.
    let (began, begins) = std::sync::mpsc::channel();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let ends = std::sync::Mutex::new(ends);
    worker
        .serve("stuck", move |_| {
            began.send(()).unwrap();
            let _ = ends.lock().unwrap().recv();
            Ok::<_, HandlerError>(1)
        })
        .unwrap();
    let (caller, lent) = (reader.clone(), reader.block("b").attach().unwrap());
    let stuck = std::thread::spawn(move || {
        caller
            .call("stuck", &())
            .block(&lent)
            .send::<i64>()
            .unwrap_err()
    });
    begins.recv().unwrap();
    let done = worker
        .rotate_pool("vault", &keys(&next, WRITE), false)
        .unwrap();
    assert_eq!(done["epoch"], 3, "{done}");
    for what in ["calls", "parked", "repeats", "locks", "loans"] {
        assert_eq!(done["dropped"][what], 1, "{what}: {done}");
    }
    drop(end);
    assert_eq!(stuck.join().unwrap().kind(), Code::Cancelled);
    let told = holder.receive();
    assert_eq!(
        (&told["event"], &told["member"]),
        (&json!("pool_rotated"), &json!(false)),
        "{told}"
    );
    let info = json!({"action": "memory_info", "block_id": "b"});
    assert_eq!(code(&holder.request(info.clone())), "not_member");
    prove(&mut holder, &server, &next, "holder", READ);
    let moved = holder.request(info)["response"].clone();
    assert_eq!(moved["generation"], 2, "{moved}");
    prove(&mut holder, &server, &next, "holder", WRITE);
    let lock = json!({"action": "memory_lock", "block_id": "b"});
    let locked = holder.request(lock);
    assert_eq!(code(&locked), "ok", "no earlier lock is left: {locked}");
    assert!(reader.call("t", &()).send::<i64>().is_err());
    let refused = App::connect_with(with_keys(&server, "late", keys(&set, READ)));
    assert_eq!(refused.unwrap_err().kind(), Code::Unauthenticated);
    let worker = member(&server, "worker2", keys(&next, WRITE));
    worker.serve("t", |_| Ok::<_, HandlerError>(2)).unwrap();
    let reader = member(&server, "reader2", keys(&next, READ));
    assert_eq!(reader.call("t", &()).send::<i64>().unwrap(), 2);
}

#[test]
fn a_client_with_keys_accepts_no_other_pool_as_its_own() {
    let (mut server, set) = vault();
    let other = key_set(2);
    let kind = |builder: Builder| App::connect_with(builder).unwrap_err().kind();
    // Other keys, no such pool, a plain pool: the three look the same.
    let mut maker = server.app(Via::Unix, json!({"app_id": "plain"}));
    maker.request(json!({"action": "pool_create", "pool": "open"}));
    for (pool, set) in [("vault", &other), ("nothing", &set), ("open", &set)] {
        let builder = builder(&server, "c").keys(pool, keys(set, WRITE));
        assert_eq!(kind(builder), Code::Unauthenticated, "{pool}");
    }
    let by_tcp = over_tcp(&server, "c").keys("vault", keys(&set, WRITE));
    assert_eq!(kind(by_tcp), Code::Downgrade);
    // Another pool with the same name and keys is a rollback for a client that knew the first one.
    drop(member(&server, "c", keys(&set, WRITE)));
    let mut admin = server.app(Via::Unix, json!({"app_id": "admin"}));
    let removed = admin.request(json!({"action": "pool_remove", "pool": "vault", "force": true}));
    assert_eq!(code(&removed), "ok");
    let request = keys(&set, WRITE).pool_create("vault", false).unwrap();
    assert_eq!(code(&admin.request(request)), "ok");
    assert_eq!(
        kind(with_keys(&server, "c", keys(&set, WRITE))),
        Code::Rollback
    );
    member(&server, "new", keys(&set, WRITE));
    // It survives a restart of the server, and is still encrypted.
    server.kill();
    server.restart();
    member(&server, "new", keys(&set, READ));
}

/// What clients send and store in the search for it.
const SECRET: &str = "the combination is 7-42-11";

/// Everything that must not be found: what was sent, and each key as text and unencoded.
fn needles(set: &KeySet) -> Vec<Vec<u8>> {
    let mut needles = vec![SECRET.as_bytes().to_vec()];
    for kind in WRITE {
        let token = set.token(*kind).unwrap();
        // The secret's text, and its first bytes unencoded.
        needles.push(token.as_bytes()[5..40].to_vec());
        needles.push(text::decode_within(&token[5..], 64).unwrap()[..32].to_vec());
    }
    needles
}

fn check_absent(needles: &[Vec<u8>], bytes: &[u8], place: &str) {
    for needle in needles {
        let found = bytes.windows(needle.len()).any(|window| window == needle);
        assert!(!found, "{place}");
    }
}

/// The variable that gives the log level of the server in the search.
const LEVEL: &str = "TEST_LOG_LEVEL";

/// The same search with the most detailed log, and in what server and clients print: they run in a
/// process of their own.
#[test]
fn neither_has_the_most_detailed_log() {
    let ran = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_data_directory_has_no_key_and_no_plaintext"])
        .arg("--nocapture")
        .env(LEVEL, "trace")
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    let said = [ran.stdout, ran.stderr].concat();
    let text = String::from_utf8_lossy(&said);
    assert!(ran.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    // Lines of the server are there, of levels that are not logged otherwise.
    assert!(text.contains("DEBUG"), "{text}");
    check_absent(&needles(&key_set(1)), &said, "the output");
}

#[test]
fn the_data_directory_has_no_key_and_no_plaintext() {
    let level = std::env::var(LEVEL).unwrap_or_else(|_| "warn".into());
    let server = Server::with(&[&format!("log_level={level}")]);
    let (mut server, set) = vault_on(server);
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker
        .serve("tell", |request| request.data::<String>())
        .unwrap();
    let caller = member(&server, "caller", keys(&set, READ));
    let secret = SECRET;
    for key in ["a", "b"] {
        let call = caller
            .call("tell", &secret)
            .idempotency_key(key)
            .header("h", secret);
        assert_eq!(call.send::<String>().unwrap(), secret);
    }
    let waits = caller
        .call("later", &secret)
        .timeout(Duration::from_secs(60));
    drop(waits.send_parked().unwrap());
    let _ = worker.emit("tell", &secret).send();
    let fails = move |_| Err::<(), _>(HandlerError::new("no_luck", secret).with_data(secret));
    worker.serve("fail", fails).unwrap();
    let error = caller.call("fail", &secret).send::<()>().unwrap_err();
    assert_eq!(error.message(), secret);
    // A persistent block, with content of two versions.
    let create = worker.block("b").create(200_000);
    let block = create.persistent().send().unwrap();
    for at in [0, 100_000] {
        block.write_at(at, secret.as_bytes()).unwrap();
    }
    block.flush().unwrap();
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    for _ in 0..2 {
        admin.request(&json!({"action": "backup"})).unwrap();
        let done = worker.rotate_pool("vault", &keys(&set, WRITE), false);
        assert!(done.is_ok(), "{done:?}");
    }
    // Whoever has other keys leaves lines in the logs.
    let refused = App::connect_with(with_keys(&server, "late", keys(&key_set(2), READ)));
    assert_eq!(refused.unwrap_err().kind(), Code::Unauthenticated);
    server.kill();
    let needles = needles(&set);
    let mut looked_at = BTreeSet::new();
    let mut directories = vec![server.0.data_dir().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.is_file() {
                let bytes = std::fs::read(&path).unwrap();
                let place = path.strip_prefix(server.0.data_dir()).unwrap();
                let first = place.iter().next().unwrap().to_owned();
                looked_at.insert(first.into_string().unwrap());
                check_absent(&needles, &bytes, &path.display().to_string());
            }
        }
    }
    for place in [
        "backups",
        "data.db",
        "data.db-wal",
        "logs",
        "memory",
        "of-clients",
    ] {
        assert!(looked_at.contains(place), "{looked_at:?}");
    }
}

#[test]
fn keys_decide_access_to_memory_in_a_gated_pool() {
    let server = Server::start();
    let set = key_set(3);
    let mut maker = server.app(Via::Unix, json!({"app_id": "maker"}));
    let request = keys(&set, WRITE).pool_create("vault", true).unwrap();
    assert_eq!(maker.request(request)["response"]["memory"], "gated");
    let mut write = raw(&server, Via::Unix, "w");
    let mut read = raw(&server, Via::Unix, "r");
    let mut join = raw(&server, Via::Unix, "j");
    prove(&mut write, &server, &set, "w", WRITE);
    prove(&mut read, &server, &set, "r", READ);
    prove(&mut join, &server, &set, "j", JOIN);
    let ask = |wire: &mut Wire, action: &str, more: Value| {
        let mut request =
            json!({"action": format!("memory_{action}"), "pool": "vault", "block_id": "b"});
        for (key, value) in more.as_object().unwrap() {
            request[key] = value.clone();
        }
        code(&wire.request(request)).to_owned()
    };
    let persistent = json!({"size": 8, "kind": "persistent"});
    assert_eq!(ask(&mut write, "create", persistent), "bad_message");
    assert_eq!(ask(&mut write, "create", json!({"size": 8})), "ok");
    assert_eq!(ask(&mut join, "read", json!({"length": 8})), "forbidden");
    assert_eq!(
        ask(&mut join, "attach", json!({"mode": "read"})),
        "forbidden"
    );
    assert_eq!(ask(&mut join, "info", json!({})), "ok");
    assert_eq!(ask(&mut read, "read", json!({"length": 8})), "ok");
    assert_eq!(
        ask(&mut read, "attach", json!({"mode": "write"})),
        "forbidden"
    );
    assert_eq!(
        ask(&mut read, "write", json!({"offset": 0, "data": "AAAA"})),
        "forbidden"
    );
    assert_eq!(
        ask(&mut read, "lock", json!({"mode": "exclusive"})),
        "forbidden"
    );
    assert_eq!(
        ask(&mut write, "write", json!({"offset": 0, "data": "AAAA"})),
        "ok"
    );
}

/// A refusal does not say whether a pool exists, nor which signature is wrong. Whether it takes the
/// same time too is measured by `cargo xtask bench keys`.
#[test]
fn every_cause_of_a_refusal_looks_the_same() {
    let (server, set) = vault();
    let other = key_set(2);
    let mut maker = server.app(Via::Unix, json!({"app_id": "plain"}));
    maker.request(json!({"action": "pool_create", "pool": "open"}));
    let causes = [
        ("all signatures are wrong", "vault", &other, "asker"),
        ("the last signature is wrong", "vault", &set, "asker"),
        ("signed for another app", "vault", &set, "other"),
        ("no such pool", "nothing", &set, "asker"),
        ("a pool that is not encrypted", "open", &set, "asker"),
    ];
    let mut replies = BTreeSet::new();
    for (why, pool, keys, app) in causes {
        let mut wire = server.app(Via::Unix, json!({"app_id": "asker", "pools": []}));
        let mut proof = proof_for(&mut wire, bound(&server), keys, pool, app, WRITE);
        if why.starts_with("the last") {
            proof["proof"]["sig_write"] = proof["proof"]["sig_read"].clone();
        }
        // The second time without a challenge.
        for _ in 0..2 {
            let reply = wire.request(proof.clone());
            assert_eq!(code(&reply), "unauthenticated", "{why}: {reply}");
            assert_eq!(reply["error"]["message"], "the proof was not accepted");
            replies.insert(reply.to_string());
        }
    }
    assert_eq!(replies.len(), 1, "{replies:?}");
}

/// A proof with invalid signatures.
fn wrong_proof(wire: &mut Wire) -> Value {
    wire.request(json!({"action": "pool_challenge", "pool": "vault"}));
    let sig = text::encode(&[7; 64]);
    json!({
        "action": "pool_join", "pool": "vault", "id": "wrong", "proof": {
            "client_nonce": text::encode(&[7; 32]), "roles": 7, "sig_join": sig, "sig_read": sig,
            "sig_write": sig, "cb_type": "none",
        },
    })
}

#[test]
fn a_crowd_of_wrong_proofs_is_bounded_and_delays_no_other_user() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker.serve("t", |_| Ok::<_, HandlerError>(1)).unwrap();
    let mut crowd: Vec<Wire> = (0..60)
        .map(|n| {
            server.app(
                Via::Tcp,
                json!({"app_id": format!("crowd-{n}"), "pools": []}),
            )
        })
        .collect();
    let proofs: Vec<Value> = crowd.iter_mut().map(wrong_proof).collect();
    for (wire, proof) in crowd.iter_mut().zip(&proofs) {
        wire.send(proof);
        // A message behind a proof is handled after the proof's result.
        wire.send(&json!({"action": "ping", "id": "behind"}));
    }
    // Another user is admitted, and its call is answered.
    let caller = member(&server, "caller", keys(&set, READ));
    assert_eq!(caller.call("t", &()).send::<i64>().unwrap(), 1);
    let mut codes = std::collections::BTreeMap::new();
    for wire in &mut crowd {
        let verdict = wire.receive();
        assert_eq!(verdict["in_reply_to"], "wrong", "{verdict}");
        *codes.entry(code(&verdict).to_owned()).or_insert(0) += 1;
        assert_eq!(wire.receive()["in_reply_to"], "behind");
    }
    // All of a user's proofs count, however many wait at once; each thread may be checking one
    // more.
    let threads = std::thread::available_parallelism()
        .map_or(1, |n| n.get() / 4)
        .max(1);
    let (refused, overloaded) = (codes["unauthenticated"], codes["overloaded"]);
    assert_eq!(refused + overloaded, 60, "{codes:?}");
    assert!((20..20 + threads).contains(&refused), "{codes:?}");
}

#[test]
fn other_events_do_not_push_refused_proofs_out_of_the_log() {
    let server = Server::with(&["log_file_bytes_max=4KiB", "log_files_max=2"]);
    let logs = server.0.data_dir().join("logs");
    let mut wire = server.app(Via::Tcp, json!({"app_id": "guesser", "pools": []}));
    let proof = wrong_proof(&mut wire);
    assert_eq!(code(&wire.request(proof)), "unauthenticated");
    // Connections that come and go fill the other file several times over.
    let audited = || {
        let files = std::fs::read_dir(&logs).unwrap().flatten();
        let audit = files.filter(|file| file.file_name().to_string_lossy().starts_with("audit"));
        // A file may be renamed at this moment.
        let text = audit.map(|file| std::fs::read_to_string(file.path()).unwrap_or_default());
        text.collect::<String>()
    };
    let mut came = 0;
    while came < 100 || audited().contains("guesser") || !audited().contains("noise-") {
        assert!(came < 3000, "the first line is still in the log");
        drop(server.app(
            Via::Tcp,
            json!({"app_id": format!("noise-{came}"), "transient": true}),
        ));
        came += 1;
    }
    let security = std::fs::read_to_string(logs.join("security.log")).unwrap();
    let line = security.lines().find(|line| line.contains("proof_refused"));
    let line: Value = serde_json::from_str(line.unwrap()).unwrap();
    assert_eq!(
        (&line["app_id"], &line["refused"]),
        (&json!("guesser"), &json!(1))
    );
    assert!(!security.contains("noise-"), "{security}");
}

#[test]
fn a_finished_deferred_call_does_not_run_again_after_a_restart_of_both_sides() {
    let (mut server, set) = vault();
    let caller = member(&server, "caller", keys(&set, READ));
    let parked = caller
        .call("work", &1)
        .timeout(Duration::from_secs(600))
        .send_parked()
        .unwrap();
    drop((parked, caller));
    server.kill();
    let data = server.0.data_dir().to_owned();
    let database: Vec<_> = ["data.db", "data.db-wal"]
        .into_iter()
        .filter_map(|name| Some((name, std::fs::read(data.join(name)).ok()?)))
        .collect();
    let ran = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let worker = |server: &Server| {
        let ran = std::sync::Arc::clone(&ran);
        let worker = member(server, "worker", keys(&set, WRITE));
        worker
            .serve("work", move |request| {
                let number: i64 = request.data()?;
                ran.lock().unwrap().push(number);
                Ok::<_, HandlerError>(number)
            })
            .unwrap();
        worker
    };
    // The new call runs, and is answered.
    server.restart();
    let first = worker(&server);
    let caller = member(&server, "other", keys(&set, READ));
    assert_eq!(caller.call("work", &2).send::<i64>().unwrap(), 2);
    first.close().unwrap();
    drop((first, caller));
    assert_eq!(*ran.lock().unwrap(), [1, 2]);
    // A server whose database is restored from before delivers the finished call once more.
    server.kill();
    for name in ["data.db", "data.db-wal", "data.db-shm"] {
        let _ = std::fs::remove_file(data.join(name));
    }
    for (name, bytes) in database {
        std::fs::write(data.join(name), bytes).unwrap();
    }
    server.restart();
    let admin = App::connect_with(builder(&server, "admin")).unwrap();
    let stats = admin.request(&json!({"action": "stats"})).unwrap();
    assert_eq!(stats["parked"]["waiting"], 1, "{stats}");
    let second = worker(&server);
    let caller = member(&server, "other", keys(&set, READ));
    assert_eq!(caller.call("work", &3).send::<i64>().unwrap(), 3);
    assert_eq!(*ran.lock().unwrap(), [1, 2, 3]);
    drop((second, caller));
}

/// Guessing names is as noisy as guessing keys, and no count shows what is hidden.
#[test]
fn strangers_do_not_count_hidden_pools_and_guessed_names_are_logged() {
    let (server, set) = vault();
    let reports = |wire: &mut Wire| {
        ["stats", "health"].map(|action| wire.request(json!({"action": action}))["response"].take())
    };
    let counts = |wire: &mut Wire| {
        let [stats, health] = reports(wire);
        json!([
            stats["pools"],
            stats["memory"],
            stats["parked"],
            stats["ledger"],
            health["components"]["pools"],
            health["components"]["memory"],
            health["components"]["triggers"]["seen"]["parked"],
        ])
    };
    let mut stranger = server.app(Via::Tcp, json!({"app_id": "stranger"}));
    let before = counts(&mut stranger);
    let mut writer = raw(&server, Via::Unix, "writer");
    prove(&mut writer, &server, &set, "writer", WRITE);
    let uid = text::encode(&[7; 16]);
    let block = json!({"action": "memory_create", "pool": "vault", "block_id": "b", "size": 100,
        "block_uid": uid});
    assert_eq!(code(&writer.request(block)), "ok");
    let parked = json!({"action": "trigger", "process": "none", "pool": "vault", "park": true,
        "data": "TFpFVgABAA"});
    assert_eq!(writer.request(parked)["status"], "parked");
    assert_eq!(counts(&mut stranger), before);
    let [stats, health] = reports(&mut writer);
    assert_eq!(
        (&stats["memory"]["blocks"], &stats["parked"]["waiting"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(stats["ledger"]["blocks"], 1);
    assert_eq!(health["components"]["memory"]["seen"]["blocks"], 1);
    for guess in [
        json!({"action": "pool_join", "pool": "vault"}),
        json!({"action": "pool_create", "pool": "vault"}),
        json!({"action": "pool_join", "pool": "vault"}),
    ] {
        assert_eq!(code(&stranger.request(guess)), "unauthenticated");
    }
    // The third refused proof ends a connection.
    stranger.wait_closed();
    let named = json!({"action": "handshake", "app_id": "other", "pools": ["vault"]});
    let mut other = server.connect(Via::Tcp);
    other.send(&named);
    assert_eq!(code(&other.receive()), "unauthenticated");
    let log = server.0.data_dir().join("logs/security.log");
    let refused = || {
        let lines = std::fs::read_to_string(&log).unwrap_or_default();
        lines.matches("proof_refused").count()
    };
    eventually(|| refused() == 4);
    // A user whose proofs are no longer checked learns nothing more, even on new connections.
    let codes = (0..20).map(|n| {
        let mut wire = server.app(Via::Tcp, json!({"app_id": format!("guesser-{n}")}));
        code(&wire.request(json!({"action": "pool_join", "pool": "vault"}))).to_owned()
    });
    let codes: Vec<String> = codes.collect();
    assert!(codes.contains(&"overloaded".to_owned()), "{codes:?}");
}

#[test]
fn proofs_from_another_pid_namespace_are_accepted_only_if_that_is_allowed() {
    for is_allowed in [false, true] {
        let (server, set) = vault_on(Server::with(&[&format!("allow_pidns={is_allowed}")]));
        let mut wire = raw(&server, Via::Unix, "elsewhere");
        let ChannelBinding::Unix { uid, pid } = bound(&server) else {
            unreachable!("it is the binding of the Unix socket");
        };
        let mut join = |pid| {
            let binding = ChannelBinding::Unix { uid, pid };
            let proof = proof_for(&mut wire, binding, &set, "vault", "elsewhere", JOIN);
            code(&wire.request(proof)).to_owned()
        };
        let expected = if is_allowed { "ok" } else { "unauthenticated" };
        assert_eq!(join(0), expected);
        assert_eq!(join(pid + 1), "unauthenticated");
        assert_eq!(join(pid), "ok");
    }
}

#[test]
fn empty_bytes_are_bytes_in_an_encrypted_pool_too() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker.serve("echo", |r| r.data::<latzero::Data>()).unwrap();
    let caller = member(&server, "caller", keys(&set, WRITE));
    let answer = caller.call("echo", &Bytes::default()).send::<Bytes>();
    assert_eq!(answer.unwrap(), Bytes::default());
    assert_eq!(
        caller.call("echo", &()).send::<Value>().unwrap(),
        Value::Null
    );
}
