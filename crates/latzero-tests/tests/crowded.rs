//! Descriptors that clients do not receive: the kernel limits those of a user in flight (unix(7),
//! ETOOMANYREFS), and later receivers wait instead of being disconnected.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::time::Instant;

use latzero_tests::{Server, TIMEOUT, Via, Wire};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::{Value, json};

/// Descriptors that the server may have open, and on their way.
const DESCRIPTORS_MAX: u64 = 128;

/// More than that, and fewer than may be unread (`limits.descriptors_unread_max`), however late the
/// server begins to write.
const REQUESTS: usize = 250;

/// A server for which the bound holds: root is above it, unless it gives up what it needs for that.
fn bounded_server(settings: &[&str]) -> Server {
    for capability in [CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_RESOURCE] {
        // Who is not root has nothing to give up. It is this thread's alone, and what it starts has
        // it no more either.
        let _ = remove_capability_from_bounding_set(capability);
    }
    let server = Server::with(settings);
    server.limit_descriptors(DESCRIPTORS_MAX);
    server
}

fn mapping(server: &Server, app: &str) -> Wire {
    server.app(
        Via::Unix,
        json!({"app_id": app, "pools": ["p"], "features": ["attachments", "fd_passing"]}),
    )
}

/// Asks for more descriptors than may be on their way, and takes none; waits until the server can
/// send no more of them.
fn crowd(server: &Server, watch: &mut Wire) -> Wire {
    let mut hog = mapping(server, "hog");
    let create = json!({"action": "memory_create", "block_id": "b", "size": 1,
        "permissions": {"read": ["*"], "write": ["*"]}});
    assert_eq!(hog.request(create)["status"], "ok");
    hog.take_descriptors();
    for _ in 0..REQUESTS {
        hog.send(&attach());
    }
    let end = Instant::now() + TIMEOUT;
    while outbox_bytes(watch) == 0 {
        assert!(Instant::now() < end, "the bound is never reached");
    }
    hog
}

fn attach() -> Value {
    json!({"action": "memory_attach", "block_id": "b", "mode": "read", "id": "a"})
}

fn outbox_bytes(watch: &mut Wire) -> u64 {
    let reply = watch.request(json!({"action": "stats"}));
    reply["response"]["transport"]["outbox_bytes"]
        .as_u64()
        .unwrap()
}

/// Takes all that was asked for.
fn take_all(hog: &mut Wire) {
    for n in 0..REQUESTS {
        let reply = hog.receive();
        assert_eq!(reply["descriptors"], 1, "{n}: {reply}");
        assert_eq!(hog.take(1).len(), 1);
    }
}

#[test]
fn who_takes_its_descriptors_late_gets_all_of_them() {
    let server = bounded_server(&[]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    take_all(&mut hog);
    assert_eq!(hog.request(json!({"action": "ping"}))["status"], "ok");
}

#[test]
fn who_comes_while_too_many_descriptors_are_on_their_way_is_served_when_they_were_taken() {
    let server = bounded_server(&[]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    let mut other = mapping(&server, "other");
    let before = outbox_bytes(&mut watch);
    other.send(&attach());
    let end = Instant::now() + TIMEOUT;
    while outbox_bytes(&mut watch) == before {
        assert!(Instant::now() < end, "it was served, or thrown out");
    }
    take_all(&mut hog);
    // The kernel says nothing of it to the connection of `other`.
    let reply = other.receive();
    assert_eq!(
        (&reply["status"], &reply["descriptors"]),
        (&json!("ok"), &json!(1))
    );
    assert_eq!(other.take(1).len(), 1);
}

#[test]
fn who_never_takes_its_descriptors_is_closed() {
    let server = bounded_server(&["write_stall_timeout=100ms"]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    let end = Instant::now() + TIMEOUT;
    while outbox_bytes(&mut watch) > 0 {
        assert!(Instant::now() < end, "it holds up its bytes for ever");
    }
    // What was on its way is still there to be taken.
    hog.wait_closed();
    assert!(hog.take_descriptors().len() > 10);
    assert_eq!(watch.request(json!({"action": "ping"}))["status"], "ok");
}
