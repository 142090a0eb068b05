//! Persistent blocks over restarts, limits and removals: complete blocks come back, removed ones do
//! not, and nothing is deleted that may still be needed.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::path::Path;
use std::time::Instant;

use latzero_tests::{Server, TIMEOUT, Via, Wire};
use serde_json::{Value, json};

fn app(server: &Server) -> Wire {
    server.app(
        Via::Unix,
        json!({"app_id": "app", "pools": ["p"], "features": ["attachments"]}),
    )
}

fn ok(reply: &Value) -> &Value {
    assert_eq!(reply["status"], "ok", "{reply}");
    &reply["response"]
}

fn create(app: &mut Wire, block: &str, size: u64) -> Value {
    app.request(
        json!({"action": "memory_create", "block_id": block, "size": size, "kind": "persistent"}),
    )
}

fn blocks(app: &mut Wire) -> Vec<String> {
    let reply = app.request(json!({"action": "memory_list"}));
    let blocks = ok(&reply)["blocks"].as_array().unwrap().iter();
    blocks
        .map(|block| block["block_id"].as_str().unwrap().to_owned())
        .collect()
}

fn files(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_block_that_exceeds_a_limit_stays_on_the_disk() {
    let mut server = Server::start();
    let memory = server.0.data_dir().join("memory");
    let settings = server.0.data_dir().join("config/limits.toml");
    let mut one = app(&server);
    for block in ["a", "b"] {
        ok(&create(&mut one, block, 100_000));
    }
    let before = files(&memory);
    assert_eq!(before.len(), 4);
    for (limit, name, left) in [
        ("blocks_max = 1", "limits.blocks_max", 1),
        ("block_bytes_max = \"64KiB\"", "limits.block_bytes_max", 0),
    ] {
        server.kill();
        std::fs::write(&settings, format!("[limits]\n{limit}\n")).unwrap();
        server.restart();
        assert_eq!(blocks(&mut app(&server)).len(), left, "{limit}");
        assert_eq!(files(&memory), before, "{limit}");
        // The log is written by a thread of its own.
        let log = server.0.data_dir().join("logs/server.log");
        let is_told = || {
            let log = std::fs::read_to_string(&log).unwrap();
            let mut lines = log.lines();
            lines.any(|line| line.contains(name) && line.contains("because of a limit"))
        };
        let end = Instant::now() + TIMEOUT;
        while !is_told() {
            assert!(Instant::now() < end, "{limit} is not shown");
            std::thread::yield_now();
        }
    }
    server.kill();
    std::fs::remove_file(&settings).unwrap();
    server.restart();
    assert_eq!(blocks(&mut app(&server)), ["a", "b"]);
}

#[test]
fn files_set_aside_are_counted_at_each_start() {
    let mut server = Server::start();
    let memory = server.0.data_dir().join("memory");
    let log = server.0.data_dir().join("logs/server.log");
    let lines = || -> Vec<String> {
        let log = std::fs::read_to_string(&log).unwrap();
        let lines = log.lines().filter(|l| l.contains("now or earlier"));
        lines.map(str::to_owned).collect()
    };
    for (starts, content) in [(1, &b"once"[..]), (2, b"again")] {
        server.kill();
        std::fs::write(memory.join("11.1.lzb"), content).unwrap();
        server.restart();
        // The log is written by a thread of its own.
        let end = Instant::now() + TIMEOUT;
        while lines().len() < starts {
            assert!(Instant::now() < end, "start {starts} prints nothing");
            std::thread::yield_now();
        }
    }
    assert_eq!(files(&memory.join(".orphans")), ["11.1.lzb", "11.1.lzb.1"]);
    let lines = lines();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].contains("\"files\":1") && lines[0].contains("\"bytes\":4"),
        "{lines:?}"
    );
    assert!(
        lines[1].contains("\"files\":2") && lines[1].contains("\"bytes\":9"),
        "{lines:?}"
    );
}

#[test]
fn a_block_without_its_newest_generation_falls_back_to_the_previous_one() {
    let mut server = Server::start();
    let memory = server.0.data_dir().join("memory");
    let mut one = app(&server);
    ok(&create(&mut one, "b", 10));
    let write = json!({"action": "memory_write", "block_id": "b", "data": "AQI="});
    ok(&one.request(write));
    server.kill();
    let [bytes, record] = <[String; 2]>::try_from(files(&memory)).unwrap();
    let first = std::fs::read(memory.join(&bytes)).unwrap();
    server.restart();
    let mut one = app(&server);
    let resize = json!({"action": "memory_resize", "block_id": "b", "size": 20});
    assert_eq!(ok(&one.request(resize))["generation"], 2);
    server.kill();
    // A disk that lost the newest generation and still has the previous one.
    std::fs::write(memory.join(bytes.replace(".1.lzb", ".2.lzb")), b"torn").unwrap();
    std::fs::write(memory.join(&bytes), first).unwrap();
    server.restart();
    let mut one = app(&server);
    let reply = one.request(json!({"action": "memory_info", "block_id": "b"}));
    let info = ok(&reply);
    assert_eq!(
        (&info["generation"], &info["size"], &info["version"]),
        (&json!(1), &json!(10), &json!(1))
    );
    assert_eq!(files(&memory), [".orphans".to_owned(), bytes, record]);
}

#[test]
fn a_block_removed_while_it_moves_is_gone_at_once() {
    let server = Server::start();
    let memory = server.0.data_dir().join("memory");
    let mut one = app(&server);
    for _ in 0..5 {
        ok(&create(&mut one, "b", 4 << 20));
        one.send(&json!({"action": "memory_resize", "block_id": "b", "size": 5 << 20, "id": "m"}));
        ok(&one.request(json!({"action": "memory_remove", "block_id": "b"})));
        // From here on, no server that starts would load it.
        let end = Instant::now() + TIMEOUT;
        loop {
            let left = files(&memory);
            assert!(!left.iter().any(|name| name.ends_with(".json")), "{left:?}");
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "{left:?} is left");
            std::thread::yield_now();
        }
    }
}

#[test]
fn each_flush_is_answered_while_writes_continue() {
    let server = Server::start();
    let mut one = app(&server);
    ok(&create(&mut one, "b", 8 << 20));
    let mut expected = Vec::new();
    for n in 0..100 {
        let write = json!({"action": "memory_write", "block_id": "b", "data": "AQI=", "id": "w"});
        one.send(&write);
        one.send(&json!({"action": "memory_flush", "block_id": "b", "id": format!("f{n}")}));
        expected.push(n + 1);
    }
    let mut flushed: Vec<(u64, u64)> = Vec::new();
    while flushed.len() < expected.len() {
        let reply = one.receive();
        let id = reply["in_reply_to"].as_str().unwrap();
        if let Some(n) = id.strip_prefix('f') {
            let version = ok(&reply)["version"].as_u64().unwrap();
            flushed.push((n.parse().unwrap(), version));
        }
    }
    for (n, version) in flushed {
        // What was written before the flush is on the disk, and perhaps more.
        assert!((n + 1..=100).contains(&version), "flush {n}: {version}");
    }
}
