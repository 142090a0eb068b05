//! A running server hands over to a new one: no connection is refused, and no state is lost.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs::Permissions;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};

use latzero_crypto::keys::Kind;
use latzero_crypto::proof::{self, ChannelBinding, Side};
use latzero_crypto::text;
use latzero_tests::site::{self, ControlledProcess, Daemon, Site, Start};
use latzero_tests::{Wire, vault};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

fn takes_over() -> Start {
    Start {
        takes_over: true,
        ..Start::default()
    }
}

#[test]
fn sockets_apps_calls_and_blocks_are_handed_over() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a", "pools": ["p"], "triggers": ["mine"]}));
    assert_eq!(
        app.request(json!({"action": "trigger", "process": "late", "id": "1",
            "park": true}))["status"],
        "parked"
    );
    // Only the server holds this block.
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    app.request(json!({"action": "memory_write", "block_id": "b", "data": "a2VwdA=="}));
    let new = site.start_with(&takes_over()).unwrap();
    assert!(old.wait().success(), "it ended in an orderly way");
    assert_eq!(
        new.tcp(),
        old.tcp(),
        "the port is the same although any is allowed"
    );
    app.wait_closed();
    let (mut app, ack) = new.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], true);
    let read = app.request(json!({"action": "memory_read", "block_id": "b"}));
    assert_eq!(
        (&read["response"]["version"], &read["response"]["data"]),
        (&1.into(), &"a2VwdAAAAAAAAA==".into())
    );
    let (mut handler, _) = new.app(json!({"app_id": "h", "pools": ["p"], "triggers": ["late"]}));
    let call = handler.receive();
    assert_eq!(call["process"], "late");
    handler.send(
        &json!({"action": "response", "in_reply_to": call["id"], "status": "ok", "response": 5}),
    );
    assert_eq!(app.receive()["response"], 5);
    // Clients find it in the usual place, and it removes the socket when it ends.
    let socket = new.socket().to_owned();
    assert!(socket.exists());
    assert!(new.stop().success());
    assert!(!socket.exists());
}

#[test]
fn a_connection_made_in_between_is_served_by_the_new_server() {
    let site = Site::new();
    let mut old = site.start();
    // A call in progress delays the old server up to its drain_timeout; new connections wait in the
    // socket's queue.
    let (mut handler, _) = old.app(json!({"app_id": "h", "triggers": ["slow"]}));
    let (mut caller, _) = old.app(json!({"app_id": "c"}));
    caller.send(&json!({"action": "trigger", "id": "1", "process": "slow"}));
    let call = handler.receive();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| site.start_with(&takes_over()).unwrap());
        assert_eq!(handler.receive()["event"], "draining");
        let mut between = TcpStream::connect(old.tcp()).unwrap();
        handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
        assert_eq!(caller.receive()["event"], "draining");
        assert_eq!(caller.receive()["status"], "ok");
        assert!(old.wait().success());
        let new = new.join().unwrap();
        let json = br#"{"action":"handshake","app_id":"between"}"#;
        let mut frame = u32::try_from(json.len()).unwrap().to_be_bytes().to_vec();
        frame.extend_from_slice(json);
        std::io::Write::write_all(&mut between, &frame).unwrap();
        let mut length = [0; 4];
        between.read_exact(&mut length).unwrap();
        let mut ack = vec![0; u32::from_be_bytes(length) as usize];
        between.read_exact(&mut ack).unwrap();
        assert!(String::from_utf8(ack).unwrap().contains("handshake_ack"));
        drop(new);
    });
}

/// Asks a server for the handover as a new server does; returns the connection and the reply.
fn ask(server: &Daemon) -> (Wire, Value) {
    let features = json!(["attachments", "fd_passing"]);
    let (mut wire, _) =
        server.app(json!({"app_id": "new", "transient": true, "features": features}));
    let reply = wire.request(json!({"action": "hand_over"}));
    (wire, reply)
}

#[test]
fn the_old_server_changes_nothing_until_the_new_one_has_everything() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    let (mut one, reply) = ask(&old);
    let listeners = reply["response"]["listeners"].as_array().unwrap().len();
    assert_eq!((&reply["response"]["blocks"], listeners), (&json!(1), 2));
    assert_eq!(one.receive()["event"], "handed_over");
    assert_eq!(one.take_descriptors().len(), 3);
    // The new server dies after it received everything; another client only claims to have it.
    drop(one);
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    let (mut admin, _) =
        old.app(json!({"app_id": "admin", "features": ["attachments", "fd_passing"]}));
    let reply = admin.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(reply["error"]["code"], "draining", "{reply}");
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    // Only the server that asked last can confirm.
    let (mut first, _) = ask(&old);
    let (mut second, _) = ask(&old);
    let refused = first.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(refused["error"]["code"], "draining", "{refused}");
    // A call in progress keeps the old server from ending while the others ask.
    let (mut handler, _) = old.app(json!({"app_id": "h", "triggers": ["slow"]}));
    app.send(&json!({"action": "trigger", "id": "1", "process": "slow"}));
    let call = handler.receive();
    let taken = second.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(taken["response"]["draining"], true, "{taken}");
    for message in [
        json!({"action": "hand_over"}),
        json!({"action": "hand_over", "taken": true}),
    ] {
        let refused = first.request(message);
        assert_eq!(refused["error"]["code"], "draining", "{refused}");
    }
    assert_eq!(handler.receive()["event"], "draining");
    handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
    assert!(old.wait().success());
}

#[test]
fn servers_take_over_one_after_the_other() {
    let site = Site::new();
    let mut server = site.start();
    let tcp = server.tcp().to_owned();
    let (mut app, _) = server.app(json!({"app_id": "a"}));
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    for _ in 0..3 {
        let new = site.start_with(&takes_over()).unwrap();
        assert!(server.wait().success());
        server = new;
        assert_eq!(server.tcp(), tcp);
        let (mut app, ack) = server.app(json!({"app_id": "a"}));
        assert_eq!(ack["rehydrated"], true);
        let info = app.request(json!({"action": "memory_info", "block_id": "b"}));
        assert_eq!(info["status"], "ok", "{info}");
    }
}

#[test]
fn the_settings_of_the_new_server_apply() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    let other = site.data_dir().join("other.sock");
    let start = Start {
        settings: vec![
            format!("socket={}", other.display()),
            "host=127.0.0.2".into(),
        ],
        ..takes_over()
    };
    let new = site.start_with(&start).unwrap();
    assert!(old.wait().success());
    assert!(new.tcp().starts_with("127.0.0.2:"), "{}", new.tcp());
    assert!(TcpStream::connect(old.tcp()).is_err());
    // The old socket is gone, and what was handed over is there.
    assert!(!old.socket().exists());
    let mut wire = Wire::unix(&other);
    wire.send(&json!({"action": "handshake", "app_id": "a"}));
    assert_eq!(wire.receive()["rehydrated"], true);
    let info = wire.request(json!({"action": "memory_info", "block_id": "b"}));
    assert_eq!(info["status"], "ok", "{info}");
    // Back to the old settings; the new server finds the running one through its lock file.
    let back = site.start_with(&takes_over()).unwrap();
    assert_eq!(back.app(json!({"app_id": "a"})).1["rehydrated"], true);
    assert!(!other.exists());
}

#[test]
fn a_kill_while_the_old_server_drains_loses_nothing() {
    let site = Site::new();
    let mut old = site.start();
    let (mut handler, _) = old.app(json!({"app_id": "h", "triggers": ["slow"]}));
    let (mut caller, _) = old.app(json!({"app_id": "c"}));
    caller
        .request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    caller.send(&json!({"action": "trigger", "id": "1", "process": "slow"}));
    handler.receive();
    let parked = json!({"action": "trigger", "process": "late", "id": "2", "park": true});
    assert_eq!(caller.request(parked)["status"], "parked");
    std::thread::scope(|scope| {
        let new = scope.spawn(|| site.start_with(&takes_over()).unwrap());
        assert_eq!(handler.receive()["event"], "draining");
        old.send_kill();
        old.wait();
        let new = new.join().unwrap();
        let (mut caller, ack) = new.app(json!({"app_id": "c"}));
        assert_eq!(ack["rehydrated"], true);
        let info = caller.request(json!({"action": "memory_info", "block_id": "b"}));
        assert_eq!(info["status"], "ok", "{info}");
        let (mut late, _) = new.app(json!({"app_id": "l", "triggers": ["late"]}));
        assert_eq!(late.receive()["process"], "late");
    });
}

#[test]
fn a_server_without_a_unix_socket_is_not_taken_over() {
    let site = Site::new();
    let start = Start {
        settings: vec!["socket=off".into()],
        ..Start::default()
    };
    let old = site.start_with(&start).unwrap();
    let refused = site.start_with(&takes_over()).err().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let expected = format!("running (pid {}) but has no Unix socket", old.pid());
    assert!(refused.said.contains(&expected), "{}", refused.said);
}

/// Starts a new server that must be refused; returns its output.
fn refused(site: &Site, settings: &[&str]) -> String {
    let start = Start {
        settings: settings.iter().map(|&s| s.to_owned()).collect(),
        ..takes_over()
    };
    let refused = site.start_with(&start).err().unwrap();
    assert!(!refused.status.success());
    refused.said
}

/// The process that a connecting client sees as its peer (unix(7), SO_PEERCRED).
fn reached(server: &Daemon) -> u32 {
    let stream = UnixStream::connect(server.socket()).unwrap();
    let pid = socket_peercred(&stream).unwrap().pid;
    pid.as_raw_nonzero().get().unsigned_abs()
}

#[test]
fn a_new_server_that_can_not_listen_leaves_the_old_one_unchanged() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    std::fs::write(site.data_dir().join("file"), "precious").unwrap();
    let taken = format!("socket={}", site.data_dir().join("file").display());
    let other = site.data_dir().join("other.sock");
    let moved = format!("socket={}", other.display());
    // An address for documentation (RFC 5737), a path where another file is, and a new path
    // together with an invalid address.
    let said = refused(&site, &["host=192.0.2.1", "insecure=true"]);
    assert!(said.contains("cannot listen on 192.0.2.1"), "{said}");
    let said = refused(&site, &[&taken]);
    assert!(said.contains("exists and is not a socket"), "{said}");
    refused(&site, &["host=192.0.2.1", "insecure=true", &moved]);
    assert!(!other.exists());
    assert!(old.is_running());
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    // Clients find the old server as before.
    assert_eq!(reached(&old), old.pid());
    let (_, ack) = old.app(json!({"app_id": "b"}));
    assert_eq!(ack["status"], "ok");
    let new = site.start_with(&takes_over()).unwrap();
    assert_eq!(reached(&new), new.pid());
    assert!(old.wait().success());
}

#[test]
fn an_address_that_the_old_server_blocks_is_bound_after_its_end() {
    let site = Site::new();
    let start = Start {
        settings: vec!["host=0.0.0.0".into(), "insecure=true".into()],
        ..Start::default()
    };
    let mut old = site.start_with(&start).unwrap();
    let port = old.tcp().rsplit_once(':').unwrap().1.to_owned();
    let start = Start {
        settings: vec!["host=127.0.0.1".into(), format!("port={port}")],
        ..takes_over()
    };
    let new = site.start_with(&start).unwrap();
    assert!(old.wait().success());
    assert_eq!(new.tcp(), format!("127.0.0.1:{port}"));
    // A name stands for its addresses: no socket is bound again.
    let waiting = TcpStream::connect(new.tcp()).unwrap();
    let start = Start {
        settings: vec!["host=localhost".into(), format!("port={port}")],
        ..takes_over()
    };
    let named = site.start_with(&start).unwrap();
    assert_eq!(named.tcp(), format!("127.0.0.1:{port}"));
    drop(waiting);
}

#[test]
fn a_server_of_another_directory_is_left_alone() {
    let (site, other) = (Site::new(), Site::new());
    let mut running = other.start();
    let (mut app, _) = running.app(json!({"app_id": "a"}));
    let said = refused(&site, &[&format!("socket={}", running.socket().display())]);
    let directory = other.data_dir().canonicalize().unwrap();
    assert!(said.contains(&directory.display().to_string()), "{said}");
    assert!(running.is_running());
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    assert_eq!(running.app(json!({"app_id": "b"})).1["status"], "ok");
}

#[test]
fn a_confirmation_from_a_dead_server_does_not_end_the_old_one() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    let (mut new, _) = ask(&old);
    // It confirms that it has everything, and is gone before the old server reads that.
    old.while_stopped(|| {
        new.send(&json!({"action": "hand_over", "id": "2", "taken": true}));
        drop(new);
    });
    let (mut admin, _) = old.app(json!({"app_id": "b"}));
    // All earlier messages have been processed by now.
    let stats = admin.request(json!({"action": "stats"}));
    assert_eq!(stats["response"]["server"]["draining"], false, "{stats}");
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    let _new = site.start_with(&takes_over()).unwrap();
    assert!(old.wait().success());
}

#[test]
fn without_spare_descriptors_a_handover_is_refused() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    let features = json!(["attachments", "fd_passing"]);
    let (mut new, _) = old.app(json!({"app_id": "new", "features": features}));
    let pid = Pid::from_raw(i32::try_from(old.pid()).unwrap());
    let limit = |current| {
        let maximum = getrlimit(Resource::Nofile).maximum;
        prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).unwrap()
    };
    let before = limit(Some(4));
    let reply = new.request(json!({"action": "hand_over"}));
    assert_eq!(reply["error"]["code"], "storage", "{reply}");
    let reply = new.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(reply["error"]["code"], "draining", "{reply}");
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    limit(before.current);
    let _new = site.start_with(&takes_over()).unwrap();
    assert!(old.wait().success());
}

#[test]
fn the_old_server_reports_how_long_it_may_take() {
    let site = Site::new();
    let start = Start {
        settings: vec!["drain_timeout=12345ms".into()],
        ..Start::default()
    };
    let old = site.start_with(&start).unwrap();
    let (_new, reply) = ask(&old);
    assert_eq!(reply["response"]["drain_timeout"], 12345);
}

#[test]
fn blocks_created_while_the_old_server_drains_are_handed_over_too() {
    made_while_draining(1);
    // Each loop closes its own connections at its own pace.
    made_while_draining(3);
}

fn made_while_draining(io_threads: usize) {
    let site = Site::new();
    let start = Start {
        settings: vec![format!("io_threads={io_threads}")],
        ..Start::default()
    };
    let mut old = site.start_with(&start).unwrap();
    let (mut handler, _) = old.app(json!({"app_id": "h", "triggers": ["slow"]}));
    let (mut caller, _) = old.app(json!({"app_id": "c"}));
    let make = |name: &str, size: u64| {
        json!({
            "action": "memory_create", "block_id": name, "size": size, "attach": false,
        })
    };
    caller.request(make("grown", 10));
    caller.request(make("again", 10));
    caller.send(&json!({"action": "trigger", "id": "1", "process": "slow"}));
    let call = handler.receive();
    std::thread::scope(|scope| {
        let new = scope.spawn(|| site.start_with(&takes_over()).unwrap());
        assert_eq!(handler.receive()["event"], "draining");
        // The new server already has what existed; nobody holds any of these blocks.
        caller.request(make("made", 10));
        for ask in [
            json!({"action": "memory_resize", "block_id": "grown", "size": 20}),
            json!({"action": "memory_remove", "block_id": "again"}),
            make("again", 30),
        ] {
            let reply = caller.request(ask);
            assert_eq!(reply["status"], "ok", "{reply}");
        }
        handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
        assert!(old.wait().success());
        let new = new.join().unwrap();
        let (mut app, _) = new.app(json!({"app_id": "c"}));
        for (name, size) in [("made", 10), ("grown", 20), ("again", 30)] {
            let info = app.request(json!({"action": "memory_info", "block_id": name}));
            assert_eq!(info["response"]["size"], size, "{name}: {info}");
        }
    });
}

#[test]
fn a_stop_during_a_handover_is_a_stop() {
    let site = Site::new();
    let mut old = site.start();
    let (mut handler, _) = old.app(json!({"app_id": "h", "triggers": ["slow"]}));
    let (mut caller, _) = old.app(json!({"app_id": "c"}));
    caller.send(&json!({"action": "trigger", "id": "1", "process": "slow"}));
    let call = handler.receive();
    let (mut new, _) = ask(&old);
    old.ask_to_stop();
    assert_eq!(handler.receive()["event"], "draining");
    let reply = new.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(reply["error"]["code"], "draining", "{reply}");
    handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
    assert!(old.wait().success());
    // The socket belongs to no server now.
    assert!(!old.socket().exists());
}

#[test]
fn a_reply_that_does_not_fit_into_the_outbox_ends_nothing() {
    let site = Site::new();
    let start = Start {
        settings: vec![
            "limits.outbox_bytes_max=16KiB".into(),
            "limits.outbox_headroom_bytes=4KiB".into(),
        ],
        ..Start::default()
    };
    let mut old = site.start_with(&start).unwrap();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    for n in 0..200 {
        let name = format!("{n:0>100}");
        let make = json!({"action": "memory_create", "block_id": name, "size": 1, "attach": false});
        assert_eq!(app.request(make)["status"], "ok");
    }
    let said = refused(&site, &[]);
    assert!(said.contains("cannot hand over"), "{said}");
    assert!(old.is_running());
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    assert_eq!(old.app(json!({"app_id": "b"})).1["status"], "ok");
}

#[test]
fn two_that_take_over_at_once() {
    let site = Site::new();
    let old = site.start();
    let _ = old.app(json!({"app_id": "a"}));
    let started: Vec<_> = std::thread::scope(|scope| {
        let both = [(); 2].map(|()| scope.spawn(|| site.start_with(&takes_over())));
        both.map(|thread| thread.join().unwrap()).into()
    });
    // Either one of them succeeds, or both in turn.
    let refused: Vec<_> = started.iter().filter_map(|s| s.as_ref().err()).collect();
    assert!(refused.len() < 2, "{refused:?}");
    let (mut app, ack) = old.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], true);
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
}

/// Stands in for an old server: answers the handshake, and then each message with the result of
/// `answer`; if that is `None`, it closes the connection, as if killed.
fn stand_in(
    site: &Site,
    mut answer: impl FnMut(&Value) -> Option<Value> + Send + 'static,
) -> std::thread::JoinHandle<()> {
    let path = site.data_dir().join("latzero.sock");
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        drop(listener);
        loop {
            let mut length = [0; 4];
            if stream.read_exact(&mut length).is_err() {
                return;
            }
            let mut json = vec![0; u32::from_be_bytes(length) as usize];
            stream.read_exact(&mut json).unwrap();
            let asked: Value = serde_json::from_slice(&json).unwrap();
            let mut reply = match asked["action"].as_str() {
                Some("handshake") => json!({"action": "handshake_ack", "status": "ok"}),
                _ => match answer(&asked) {
                    Some(reply) => reply,
                    None => return,
                },
            };
            reply["in_reply_to"] = asked["id"].clone();
            let json = reply.to_string();
            let mut frame = u32::try_from(json.len()).unwrap().to_be_bytes().to_vec();
            frame.extend_from_slice(json.as_bytes());
            stream.write_all(&frame).unwrap();
        }
    })
}

#[test]
fn a_takeover_from_a_dying_server_becomes_an_ordinary_start() {
    for until_taken in [false, true] {
        let site = Site::new();
        let directory = site.data_dir().canonicalize().unwrap();
        let old = stand_in(&site, move |asked| {
            let response = json!({
                "data_dir": directory, "listeners": [], "blocks": 0, "drain_timeout": 0,
            });
            let reply = json!({"action": "response", "status": "ok", "response": response});
            (until_taken && asked["taken"] != true).then_some(reply)
        });
        let new = site.start_with(&takes_over()).unwrap();
        old.join().unwrap();
        assert_eq!(new.app(json!({"app_id": "a"})).1["status"], "ok");
    }
}

#[test]
fn a_server_that_is_too_old_is_reported() {
    let site = Site::new();
    let old = stand_in(&site, |_| {
        let error = json!({"code": "unknown_action", "message": "unknown action 'hand_over'"});
        Some(json!({"action": "response", "status": "error", "error": error}))
    });
    let said = refused(&site, &[]);
    assert!(said.contains("its version cannot hand over"), "{said}");
    assert!(said.contains("latzero stop"), "{said}");
    old.join().unwrap();
}

#[test]
fn a_takeover_without_a_running_server_is_an_ordinary_start() {
    let site = Site::new();
    let new = site.start_with(&takes_over()).unwrap();
    let (_, ack) = new.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], false);
}

#[test]
fn a_client_that_is_no_administrator_gets_nothing() {
    let server = latzero_tests::Server::start();
    let mut wire = server.app(latzero_tests::Via::Tcp, json!({"app_id": "a"}));
    let reply = wire.request(json!({"action": "hand_over"}));
    assert_eq!(reply["error"]["code"], "forbidden");
    let mut admin = server.app(
        latzero_tests::Via::Unix,
        json!({"app_id": "a", "features": ["attachments"]}),
    );
    // Without descriptors, nothing can be handed over.
    let reply = admin.request(json!({"action": "hand_over"}));
    assert_eq!(reply["error"]["code"], "bad_message");
}

/// A user id that owns nothing here.
const OTHER_USER: u32 = 65_533;

/// Checks that a server still serves, and has handed nothing over.
fn check_unchanged(old: &mut Daemon, app: &mut Wire) {
    assert!(old.is_running());
    assert_eq!(reached(old), old.pid());
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    let stats = app.request(json!({"action": "stats"}));
    assert_eq!(stats["response"]["server"]["draining"], false, "{stats}");
}

/// The program that takes over gets writable memory, so it may not be one that anybody could put
/// into the place of the server's.
#[test]
fn a_program_of_another_owner_does_not_take_over() {
    if !site::is_root("a takeover by the program of another owner") {
        return;
    }
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    let with = |program| Start {
        program: Some(program),
        ..takes_over()
    };
    let foreign = site.program_of(OTHER_USER, None);
    let refused = site.start_with(&with(foreign)).err().unwrap();
    assert!(!refused.status.success());
    let expected = "the program that takes over must belong to the owner of this one, or to root";
    assert!(refused.said.contains(expected), "{}", refused.said);
    check_unchanged(&mut old, &mut app);
    // The same file as the program of root is accepted.
    let own = site.program_of(0, None);
    let new = site.start_with(&with(own)).unwrap();
    assert!(old.wait().success());
    assert_eq!(reached(&new), new.pid());
}

/// Neither does a user who may use the socket and has the administrators' token.
#[test]
fn another_user_does_not_take_over() {
    if !site::is_root("a takeover by another user") {
        return;
    }
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    let program = site.program_of(0, None);
    let start = Start {
        program: Some(program.clone()),
        uid: Some(OTHER_USER),
        ..takes_over()
    };
    let refused = site.start_with(&start).err().unwrap();
    assert!(!refused.status.success());
    check_unchanged(&mut old, &mut app);
    // Everybody may use the directory and its socket now.
    for path in [&site.data_dir(), old.socket()] {
        std::fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
    }
    let client = site.program_of(0, Some(env!("CARGO_BIN_EXE_latzero-test-client")));
    let ids = [
        format!("--reuid={OTHER_USER}"),
        format!("--regid={OTHER_USER}"),
    ];
    let (client, socket) = (client.to_str().unwrap(), old.socket().to_str().unwrap());
    let args = [&ids[0], &ids[1], "--clear-groups", client, socket];
    let mut stranger = ControlledProcess::start("setpriv", &args);
    let features = json!(["attachments", "fd_passing"]);
    stranger.send(
        &json!({"action": "handshake", "app_id": "new", "transient": true,
        "features": features}),
    );
    assert_eq!(stranger.receive()["status"], "ok");
    let hand_over = json!({"action": "hand_over", "id": "1"});
    stranger.send(&hand_over);
    assert_eq!(vault::code(&stranger.receive()), "forbidden");
    // With the token it is an administrator, and still not the server's user.
    stranger.send(&json!({"action": "challenge", "id": "2"}));
    let challenge = stranger.receive()["response"].clone();
    let uid = rustix::process::geteuid().as_raw();
    let pid = old.pid();
    let exchange = vault::exchange(&challenge, ChannelBinding::Unix { uid, pid });
    let token = std::fs::read_to_string(site.data_dir().join("admin.token")).unwrap();
    let mac = proof::admin_mac(&token_bytes(&token), Side::Client, &exchange);
    stranger.send(
        &json!({"action": "admin_proof", "id": "3", "cb_type": "unix",
        "client_nonce": text::encode(&exchange.client_nonce), "mac": text::encode(&mac)}),
    );
    let proved = stranger.receive();
    assert_eq!(vault::code(&proved), "ok", "{proved}");
    for more in [json!({}), json!({"taken": true})] {
        let mut request = hand_over.clone();
        request["taken"] = more["taken"].clone();
        stranger.send(&request);
        let reply = stranger.receive();
        let message = reply["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("only the server's user"), "{reply}");
    }
    check_unchanged(&mut old, &mut app);
    drop(stranger);
    // Not even root takes over the server of another user: its files would belong to root.
    let site = Site::new();
    let program = site.program_of(0, None);
    std::os::unix::fs::chown(site.data_dir(), Some(OTHER_USER), None).unwrap();
    let start = Start {
        program: Some(program),
        uid: Some(OTHER_USER),
        ..Start::default()
    };
    let mut old = site.start_with(&start).unwrap();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    let refused = site.start_with(&takes_over()).err().unwrap();
    assert!(!refused.status.success());
    check_unchanged(&mut old, &mut app);
    let (_asking, reply) = ask(&old);
    let message = reply["error"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("only the server's user"), "{reply}");
    check_unchanged(&mut old, &mut app);
}

/// The bytes of the administrators' token, which its file has in hexadecimal.
fn token_bytes(token: &str) -> [u8; 32] {
    let digits = token.trim();
    let byte = |at: usize| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap();
    std::array::from_fn(byte)
}

#[test]
fn members_of_a_gated_pool_prove_it_again() {
    let site = Site::new();
    let mut old = site.start();
    let set = vault::key_set(1);
    let (mut maker, _) = old.app(json!({"app_id": "maker", "encrypted_pools": ["vault"]}));
    let create = vault::keys(&set, vault::WRITE)
        .pool_create("vault", true)
        .unwrap();
    assert_eq!(maker.request(create)["response"]["memory"], "gated");
    let prove = |wire: &mut Wire, pid: u32, kinds: &[Kind]| {
        let uid = rustix::process::geteuid().as_raw();
        let binding = ChannelBinding::Unix { uid, pid };
        let proof = vault::proof_for(wire, binding, &set, "vault", "maker", kinds);
        wire.request(proof)
    };
    assert_eq!(prove(&mut maker, old.pid(), vault::WRITE)["status"], "ok");
    let block = |action: &str, more: Value| {
        let mut request = json!({"action": action, "pool": "vault", "block_id": "b"});
        for (key, value) in more.as_object().unwrap() {
            request[key] = value.clone();
        }
        request
    };
    maker.request(block("memory_create", json!({"size": 4, "attach": false})));
    let written = maker.request(block("memory_write", json!({"data": "a2VwdA=="})));
    assert_eq!(written["status"], "ok", "{written}");
    let new = site.start_with(&takes_over()).unwrap();
    assert!(old.wait().success());
    let read = block("memory_read", json!({}));
    let (mut member, ack) = new.app(json!({"app_id": "maker", "encrypted_pools": ["vault"]}));
    assert_eq!(ack["pools"], json!([]));
    // The memory was handed over, and nobody can access it before a proof for this server.
    assert_eq!(vault::code(&member.request(read.clone())), "not_member");
    let attach = block("memory_attach", json!({"mode": "write"}));
    assert_eq!(vault::code(&member.request(attach.clone())), "not_member");
    let stale = prove(&mut member, old.pid(), vault::WRITE);
    assert_eq!(
        vault::code(&stale),
        "unauthenticated",
        "a proof for the old one"
    );
    assert_eq!(prove(&mut member, new.pid(), vault::READ)["status"], "ok");
    let content = member.request(read);
    assert_eq!(content["response"]["data"], "a2VwdA==", "{content}");
    assert_eq!(vault::code(&member.request(attach)), "forbidden");
}
