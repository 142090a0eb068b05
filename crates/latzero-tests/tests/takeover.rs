//! A running server hands over to a new one: nobody is turned away, and nothing that it knew is lost.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::Read as _;
use std::net::TcpStream;

use latzero_tests::site::{Site, Start};
use serde_json::json;

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
