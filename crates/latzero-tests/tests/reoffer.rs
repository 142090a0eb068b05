//! Shared blocks outlive the server while a client holds them.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use latzero_tests::{Server, Via, Wire};
use serde_json::{Value, json};

fn mapping(server: &Server, app: &str) -> Wire {
    server.app(
        Via::Unix,
        json!({"app_id": app, "pools": ["p"], "features": ["attachments", "fd_passing"]}),
    )
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "json!({…}) reads best as it is"
)]
fn ask(wire: &mut Wire, action: &str, more: Value) -> Value {
    let mut message = json!({"action": format!("memory_{action}"), "block_id": "b"});
    for (key, value) in more.as_object().unwrap() {
        message[key] = value.clone();
    }
    wire.request(message)
}

#[allow(clippy::needless_pass_by_value, reason = "it goes on as its part")]
fn ok(reply: Value) -> Value {
    assert_eq!(reply["status"], "ok", "{reply}");
    reply["response"].clone()
}

/// Offers a descriptor for block `b`; returns the error code, or an empty string.
fn offer(wire: &mut Wire, held: &OwnedFd) -> String {
    let message =
        json!({"action": "memory_reoffer", "id": "offer", "block_id": "b", "descriptors": 1});
    wire.send_with_descriptors(&message, &[held.as_fd()]);
    loop {
        let reply = wire.receive();
        if reply["in_reply_to"] == "offer" {
            return reply["error"]["code"]
                .as_str()
                .unwrap_or_default()
                .to_owned();
        }
    }
}

/// A server with block `b` of 100 bytes at version 2, whose lock was held once; also its creator's
/// connection, and a read-only descriptor of it.
fn server_with_block() -> (Server, Wire, OwnedFd) {
    let server = Server::start();
    let mut maker = mapping(&server, "maker");
    ok(ask(
        &mut maker,
        "create",
        json!({"size": 100, "layout": {"dtype": "|u1", "shape": [100]}}),
    ));
    for text in ["Zmlyc3Q=", "c2Vjb25k"] {
        ok(ask(&mut maker, "write", json!({"data": text})));
    }
    let lock = ok(ask(&mut maker, "lock", json!({})));
    ok(ask(&mut maker, "unlock", json!({"lock": lock["lock"]})));
    let mut reader = mapping(&server, "reader");
    ok(ask(&mut reader, "attach", json!({"mode": "read"})));
    let held = reader.take(1).remove(0);
    ok(ask(&mut reader, "subscribe", json!({})));
    (server, maker, held)
}

#[test]
fn a_block_that_a_client_holds_is_back_after_a_kill() {
    let (mut server, _maker, held) = server_with_block();
    server.kill();
    server.restart();
    let mut reader = server.app(
        Via::Unix,
        json!({"app_id": "reader", "features": ["attachments", "fd_passing"]}),
    );
    assert_eq!(
        ask(&mut reader, "attach", json!({"mode": "read"}))["error"]["code"],
        "no_block"
    );
    assert_eq!(offer(&mut reader, &held), "");
    let info = ok(ask(&mut reader, "info", json!({})));
    assert_eq!(
        (
            &info["version"],
            &info["owner"],
            &info["generation"],
            &info["layout"]["shape"][0]
        ),
        (&2.into(), &"maker".into(), &1.into(), &100.into())
    );
    // Fences continue to rise: the earlier holder of the lock can no longer write.
    let mut maker = server.app(
        Via::Unix,
        json!({"app_id": "maker", "features": ["attachments", "fd_passing"]}),
    );
    let lock = ok(ask(&mut maker, "lock", json!({})));
    assert!(lock["fence"].as_u64().unwrap() > 1, "{lock}");
    // It is the same memory: a write through the server is visible through the old descriptor.
    ok(ask(
        &mut maker,
        "write",
        json!({"data": "dGhpcmQ=", "lock": lock["lock"]}),
    ));
    let mut seen = [0; 5];
    let file = std::fs::File::from(held.try_clone().unwrap());
    let slots = [4096, 8192].map(|at| {
        file.read_exact_at(&mut seen, at).unwrap();
        seen == *b"third"
    });
    assert!(slots.contains(&true));
    // A restored block accepts no more offers.
    assert_eq!(offer(&mut reader, &held), "no_block");
    // The same again, after an orderly stop.
    server.signal(rustix::process::Signal::TERM);
    maker.wait_closed();
    server.kill();
    server.restart();
    let mut reader = mapping(&server, "reader");
    assert_eq!(offer(&mut reader, &held), "");
    assert_eq!(ok(ask(&mut reader, "info", json!({})))["version"], 3);
    ok(ask(&mut mapping(&server, "maker"), "remove", json!({})));
    server.kill();
    server.restart();
    assert_eq!(offer(&mut mapping(&server, "reader"), &held), "no_block");
}

#[test]
fn only_the_same_block_is_accepted_back() {
    let (mut server, _maker, held) = server_with_block();
    let mut other = mapping(&server, "other");
    ok(other.request(json!({"action": "memory_create", "block_id": "c", "size": 100})));
    let of_another = other.take(1).remove(0);
    let (end, _other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    server.kill();
    server.restart();
    let mut wire = mapping(&server, "reader");
    for wrong in [of_another, end.into(), file] {
        assert_eq!(offer(&mut wire, &wrong), "forbidden");
    }
    let bare = ask(&mut wire, "reoffer", json!({}));
    assert_eq!(bare["error"]["code"], "bad_message");
    let mut by_tcp = server.app(Via::Tcp, json!({"app_id": "tcp", "pools": ["p"]}));
    assert_eq!(
        ask(&mut by_tcp, "reoffer", json!({}))["error"]["code"],
        "bad_message"
    );
    assert_eq!(offer(&mut wire, &held), "");
    // A block that somebody recreated in the meantime is not replaced.
    server.kill();
    server.restart();
    let mut maker = mapping(&server, "maker");
    ok(ask(&mut maker, "create", json!({"size": 100})));
    assert_eq!(offer(&mut mapping(&server, "reader"), &held), "no_block");
}

#[test]
fn offers_that_are_sent_together_are_all_answered() {
    let (mut server, _maker, held) = server_with_block();
    server.kill();
    server.restart();
    let mut reader = mapping(&server, "reader");
    let nothing = std::fs::File::open("/dev/null").unwrap();
    for n in 0..20 {
        let held = if n == 19 {
            held.as_fd()
        } else {
            nothing.as_fd()
        };
        let offer = json!({"action": "memory_reoffer", "id": n.to_string(), "block_id": "b",
            "descriptors": 1});
        reader.send_with_descriptors(&offer, &[held]);
    }
    let mut answered = Vec::new();
    while answered.len() < 20 {
        let reply = reader.receive();
        if let Some(id) = reply["in_reply_to"].as_str() {
            assert_eq!(reply["status"] == "ok", id == "19", "{reply}");
            answered.push(id.to_owned());
        }
    }
}
