//! A running server hands over to a new one: nobody is turned away, and nothing that it knew is lost.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::Read as _;
use std::net::TcpStream;

use latzero_tests::Wire;
use latzero_tests::site::{Daemon, Site, Start};
use serde_json::{Value, json};

fn takes_over() -> Start {
    Start {
        takes_over: true,
        ..Start::default()
    }
}

#[test]
fn sockets_apps_calls_and_blocks_go_over() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a", "pools": ["p"], "triggers": ["mine"]}));
    assert_eq!(
        app.request(json!({"action": "trigger", "process": "late", "id": "1", "park": true}))["status"],
        "parked"
    );
    // Held by nobody but the server.
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    app.request(json!({"action": "memory_write", "block_id": "b", "data": "a2VwdA=="}));
    let new = site.start_with(&takes_over()).unwrap();
    assert!(old.wait().success(), "it ended in order");
    assert_eq!(
        new.tcp(),
        old.tcp(),
        "the port is the same, though any would do"
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
    // It is found where clients look, and removes the socket at its own end.
    let socket = new.socket().to_owned();
    assert!(socket.exists());
    assert!(new.stop().success());
    assert!(!socket.exists());
}

#[test]
fn a_connection_that_comes_in_between_is_served_by_the_new_one() {
    let site = Site::new();
    let mut old = site.start();
    // A call that runs holds the old server up for its drain_timeout; who comes now waits in the socket's queue.
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

/// Asks a server for everything, as a new one does; what came with the reply.
fn ask(server: &Daemon) -> (Wire, Value) {
    let features = json!(["attachments", "fd_passing"]);
    let (mut wire, _) =
        server.app(json!({"app_id": "new", "transient": true, "features": features}));
    let reply = wire.request(json!({"action": "hand_over"}));
    (wire, reply)
}

#[test]
fn until_the_new_one_has_everything_nothing_changes() {
    let site = Site::new();
    let mut old = site.start();
    let (mut app, _) = old.app(json!({"app_id": "a"}));
    app.request(json!({"action": "memory_create", "block_id": "b", "size": 10, "attach": false}));
    let (mut one, reply) = ask(&old);
    let listeners = reply["response"]["listeners"].as_array().unwrap().len();
    assert_eq!((&reply["response"]["blocks"], listeners), (&json!(1), 2));
    assert_eq!(one.receive()["event"], "handed_over");
    assert_eq!(one.take_descriptors().len(), 3);
    // It dies with everything in its hands, and another one only says that it has it.
    drop(one);
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    let (mut admin, _) =
        old.app(json!({"app_id": "admin", "features": ["attachments", "fd_passing"]}));
    let reply = admin.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(reply["error"]["code"], "draining", "{reply}");
    assert_eq!(app.request(json!({"action": "ping"}))["status"], "ok");
    // Of two that have it the first to say so is the one.
    let (mut first, _) = ask(&old);
    let (mut second, _) = ask(&old);
    let refused = first.request(json!({"action": "hand_over", "taken": true}));
    assert_eq!(refused["error"]["code"], "draining", "{refused}");
    // A call keeps the old one from ending while the others ask.
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
fn one_after_the_other_takes_over() {
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
fn other_settings_are_those_of_the_new_one() {
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
    // The old socket is gone, and what came over is there.
    assert!(!old.socket().exists());
    let mut wire = Wire::unix(&other);
    wire.send(&json!({"action": "handshake", "app_id": "a"}));
    assert_eq!(wire.receive()["rehydrated"], true);
    let info = wire.request(json!({"action": "memory_info", "block_id": "b"}));
    assert_eq!(info["status"], "ok", "{info}");
    // Back again, by what the one that runs has written into its lock.
    let back = site.start_with(&takes_over()).unwrap();
    assert_eq!(back.app(json!({"app_id": "a"})).1["rehydrated"], true);
    assert!(!other.exists());
}

#[test]
fn a_kill_while_the_old_one_drains_loses_nothing() {
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
        old.strike();
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
fn one_that_has_no_unix_socket_is_not_taken_over() {
    let site = Site::new();
    let start = Start {
        settings: vec!["socket=off".into()],
        ..Start::default()
    };
    let old = site.start_with(&start).unwrap();
    let refused = site.start_with(&takes_over()).err().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let expected = format!("one runs (pid {}), but not on a Unix socket", old.pid());
    assert!(refused.said.contains(&expected), "{}", refused.said);
}

#[test]
fn where_none_runs_it_just_starts() {
    let site = Site::new();
    let new = site.start_with(&takes_over()).unwrap();
    let (_, ack) = new.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], false);
}

#[test]
fn who_is_no_administrator_gets_nothing() {
    let server = latzero_tests::Server::start();
    let mut wire = server.app(latzero_tests::Via::Tcp, json!({"app_id": "a"}));
    let reply = wire.request(json!({"action": "hand_over"}));
    assert_eq!(reply["error"]["code"], "forbidden");
    let mut admin = server.app(
        latzero_tests::Via::Unix,
        json!({"app_id": "a", "features": ["attachments"]}),
    );
    // Without descriptors there is nothing to hand over by.
    let reply = admin.request(json!({"action": "hand_over"}));
    assert_eq!(reply["error"]["code"], "bad_message");
}
