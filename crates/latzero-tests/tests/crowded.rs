//! Clients that do not receive their descriptors: the kernel limits how many of a user's
//! descriptors are in flight (unix(7), ETOOMANYREFS), and later receivers wait instead of being
//! disconnected.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::time::Instant;

use latzero_tests::{Server, TIMEOUT, Via, Wire};
use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};
use serde_json::{Value, json};

/// Descriptors that the server may have open or in flight.
const DESCRIPTORS_MAX: u64 = 128;

/// More than that, and fewer than may be unread (`limits.descriptors_unread_max`), however late the
/// server begins to write.
const REQUESTS: usize = 250;

/// A server to which the limit applies. Root is exempt, so the capability is dropped for it.
fn bounded_server(settings: &[&str]) -> Server {
    for capability in [CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_RESOURCE] {
        // A user other than root has no capability to drop. Only this thread and what it starts
        // lose it.
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

/// Requests more descriptors than may be in flight, and receives none; waits until the server can
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

/// Receives everything that was requested.
fn take_all(hog: &mut Wire) {
    for n in 0..REQUESTS {
        let reply = hog.receive();
        assert_eq!(reply["descriptors"], 1, "{n}: {reply}");
        assert_eq!(hog.take(1).len(), 1);
    }
}

#[test]
fn a_client_that_receives_its_descriptors_late_gets_all_of_them() {
    let server = bounded_server(&[]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    take_all(&mut hog);
    assert_eq!(hog.request(json!({"action": "ping"}))["status"], "ok");
}

#[test]
fn a_client_is_served_once_descriptors_in_flight_have_been_received() {
    let server = bounded_server(&[]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    let mut other = mapping(&server, "other");
    let before = outbox_bytes(&mut watch);
    other.send(&attach());
    let end = Instant::now() + TIMEOUT;
    while outbox_bytes(&mut watch) == before {
        assert!(Instant::now() < end, "it was served or closed");
    }
    take_all(&mut hog);
    // The kernel does not notify the connection of `other` of the change.
    let reply = other.receive();
    assert_eq!(
        (&reply["status"], &reply["descriptors"]),
        (&json!("ok"), &json!(1))
    );
    assert_eq!(other.take(1).len(), 1);
}

#[test]
fn a_client_that_never_receives_its_descriptors_is_closed() {
    let server = bounded_server(&["write_stall_timeout=100ms"]);
    let mut watch = server.app(Via::Tcp, json!({"app_id": "watch"}));
    let mut hog = crowd(&server, &mut watch);
    let end = Instant::now() + TIMEOUT;
    while outbox_bytes(&mut watch) > 0 {
        assert!(Instant::now() < end, "it holds its bytes forever");
    }
    // What was in flight can still be received.
    hog.wait_closed();
    assert!(hog.take_descriptors().len() > 10);
    assert_eq!(watch.request(json!({"action": "ping"}))["status"], "ok");
}
