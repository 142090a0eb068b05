//! A server with little memory and few descriptors: limits are derived from both, and errors say
//! so.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use latzero_tests::Wire;
use latzero_tests::site::{Site, Start};
use serde_json::{Value, json};

const DESCRIPTORS: u64 = 200;

fn crowded() -> (Site, Start) {
    let start = Start {
        descriptors: Some(DESCRIPTORS),
        ..Start::default()
    };
    (Site::new(), start)
}

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("no error")
}

/// Creates blocks until one is refused; returns their number and the refusal.
fn use_up_blocks(app: &mut Wire, prefix: &str, kind: &str) -> (usize, Value) {
    for made in 0..DESCRIPTORS as usize {
        let name = format!("{prefix}{made}");
        let reply = app.request(
            json!({"action": "memory_create", "block_id": name, "size": 8,
            "kind": kind, "attach": false}),
        );
        if reply["status"] != "ok" {
            return (made, reply);
        }
    }
    panic!("there are more blocks than descriptors");
}

#[test]
fn blocks_leave_descriptors_to_connections() {
    let (site, start) = crowded();
    let server = site.start_with(&start).unwrap();
    let (mut maker, _) = server.app(json!({"app_id": "maker", "pools": ["p"]}));
    let (shared, refusal) = use_up_blocks(&mut maker, "s", "shared");
    assert_eq!(code(&refusal), "quota", "{refusal}");
    let message = refusal["error"]["message"].as_str().unwrap();
    assert!(message.contains("RLIMIT_NOFILE"), "{message}");
    assert!(shared > 10, "{shared}");
    let (_, refusal) = use_up_blocks(&mut maker, "p", "persistent");
    assert_eq!(code(&refusal), "quota", "{refusal}");

    let (mut other, _) = server.app(json!({"app_id": "other", "pools": ["p"]}));
    let health = other.request(json!({"action": "health"}));
    let limits = &health["response"]["components"]["limits"]["seen"];
    assert_eq!(limits["descriptors"], "200 (rlimit RLIMIT_NOFILE)");
    let blocks = limits["limits.blocks_max"].as_str().unwrap();
    assert!(
        blocks.starts_with(&format!("{shared}, from 200")),
        "{blocks}"
    );

    // A removed block makes room for another.
    let remove = json!({"action": "memory_remove", "block_id": "s0"});
    assert_eq!(maker.request(remove)["status"], "ok");
    let (made, _) = use_up_blocks(&mut maker, "again", "shared");
    assert_eq!(made, 1);
    assert!(server.stop().success());
}

#[test]
fn connections_leave_descriptors_to_the_server() {
    let (site, mut start) = crowded();
    // All of them belong to one user, and wait for their handshake.
    let unauthenticated = ["", "_per_user"]
        .map(|who| format!("limits.connections_unauthenticated{who}_max={DESCRIPTORS}"));
    start.settings.extend(unauthenticated);
    let server = site.start_with(&start).unwrap();
    let (mut well, _) = server.app(json!({"app_id": "well", "pools": ["p"]}));
    let mut crowd: Vec<Wire> = (0..DESCRIPTORS)
        .map(|_| server.connect().unwrap())
        .collect();
    let refusal = crowd.last_mut().unwrap().receive();
    assert_eq!(code(&refusal), "overloaded", "{refusal}");
    let message = refusal["error"]["message"].as_str().unwrap();
    assert!(message.contains("RLIMIT_NOFILE"), "{message}");
    // The server still has descriptors for what it opens itself: a block, a row on the disk.
    let create =
        json!({"action": "memory_create", "block_id": "b", "size": 8, "kind": "persistent"});
    assert_eq!(well.request(create)["status"], "ok");
    let kept = json!({"action": "pool_create", "pool": "q", "durable": true});
    assert_eq!(well.request(kept)["status"], "ok");
    drop(crowd);
}

#[test]
fn a_file_beyond_the_limit_is_refused_and_the_server_keeps_running() {
    let site = Site::new();
    let server = site.start();
    let (mut app, _) = server.app(json!({"app_id": "app", "pools": ["p"]}));
    server.limit_files(Some(8 << 20));
    for kind in ["persistent", "shared"] {
        let reply = app.request(json!({"action": "memory_create", "block_id": kind,
            "size": 16 << 20, "kind": kind}));
        assert_eq!(code(&reply), "storage", "{kind}: {reply}");
    }
    let small = json!({"action": "memory_create", "block_id": "small", "size": 8,
        "kind": "persistent"});
    assert_eq!(app.request(small)["status"], "ok");
    assert!(server.stop().success());
}
