//! Flushed versions after a reboot; files in the previous layout; blocks that could not be loaded
//! because of a limit; and versions that were not announced.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use latzero_shm::{Access, Attachment, Custodian, Description, Expected, Geometry};
use latzero_tests::Wire;
use latzero_tests::site::{Daemon, Site, Start};
use serde_json::{Value, json};

fn app(server: &Daemon) -> Wire {
    let features = ["attachments", "fd_passing"];
    let hello = json!({"app_id": "app", "features": features});
    let (mut app, _) = server.app(hello);
    app.request(json!({"action": "pool_create", "pool": "p", "durable": true}));
    ok(&app.request(json!({"action": "pool_join", "pool": "p"})));
    app
}

fn ok(reply: &Value) -> &Value {
    assert_eq!(reply["status"], "ok", "{reply}");
    &reply["response"]
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "json!({…}) reads best as it is"
)]
fn ask(app: &mut Wire, action: &str, block: &str, more: Value) -> Value {
    let mut message = json!({"action": format!("memory_{action}"), "pool": "p", "block_id": block});
    for (key, value) in more.as_object().unwrap() {
        message[key] = value.clone();
    }
    app.request(message)
}

fn write(app: &mut Wire, block: &str, byte: u8) -> u64 {
    // "AAAA" is three bytes of zeros, "BBBB" three others, and so on.
    let data = char::from(b'A' + byte).to_string().repeat(4);
    let reply = ask(app, "write", block, json!({"data": data}));
    ok(&reply)["version"].as_u64().unwrap()
}

/// The byte that was written last, and its version.
fn read(app: &mut Wire, block: &str) -> (u8, u64) {
    let (reply, bytes) = {
        let read = json!({"action": "memory_read", "id": "read", "pool": "p", "block_id": block,
            "length": 3});
        app.send(&read);
        loop {
            let (reply, bytes) = app.try_receive().unwrap().unwrap();
            if reply["in_reply_to"] == "read" {
                break (reply, bytes.unwrap_or_default());
            }
        }
    };
    let version = ok(&reply)["version"].as_u64().unwrap();
    let written = (0..26).find(|n| {
        let six = u32::from(*n);
        let word = six << 18 | six << 12 | six << 6 | six;
        bytes == word.to_be_bytes()[1..]
    });
    (
        written.unwrap_or_else(|| panic!("{bytes:?} of {block}")),
        version,
    )
}

#[test]
fn the_flushed_version_survives_a_reboot() {
    let site = Site::new();
    let mut server = site.start();
    let kinds = [
        ("two", json!({"slots": 2})),
        ("four", json!({"slots": 4})),
        ("raw", json!({"consistency": "raw"})),
    ];
    for (block, more) in &kinds {
        let mut create = more.clone();
        create["size"] = 5000.into();
        create["kind"] = "persistent".into();
        ok(&ask(&mut app(&server), "create", block, create));
    }
    let mut byte = 0;
    for since in 0..7 {
        let mut flushed = Vec::new();
        let mut wire = app(&server);
        for (block, _) in &kinds {
            byte = (byte + 1) % 26;
            write(&mut wire, block, byte);
            let reply = ask(&mut wire, "flush", block, json!({}));
            let version = ok(&reply)["version"].as_u64().unwrap();
            flushed.push((byte, version));
            for n in 1..=since {
                write(&mut wire, block, (byte + n) % 26);
            }
        }
        server.kill();
        site.lose_power().unwrap();
        server = site.start();
        let mut wire = app(&server);
        for ((block, _), flushed) in kinds.iter().zip(flushed) {
            assert_eq!(
                read(&mut wire, block),
                flushed,
                "{block} after {since} writes"
            );
        }
        let health = wire.request(json!({"action": "health"}));
        assert_eq!(
            ok(&health)["components"]["memory"]["status"],
            "ok",
            "{health}"
        );
    }
}

#[test]
fn an_orderly_stop_flushes() {
    let site = Site::new();
    let server = site.start();
    let mut wire = app(&server);
    ok(&ask(
        &mut wire,
        "create",
        "b",
        json!({"size": 5000, "kind": "persistent"}),
    ));
    for byte in 1..6 {
        write(&mut wire, "b", byte);
    }
    assert!(server.stop().success());
    site.lose_power().unwrap();
    assert_eq!(read(&mut app(&site.start()), "b"), (5, 5));
}

#[test]
fn a_file_in_the_previous_layout_is_loaded_with_its_content() {
    let site = Site::new();
    let server = site.start();
    drop(app(&server));
    assert!(server.stop().success());
    let memory = site.data_dir().join("memory");
    let directory = File::open(&memory).unwrap();
    let id = "07".repeat(16);
    for (slots, name) in [(2u32, "old"), (1, "raw")] {
        let id = if slots == 1 {
            "08".repeat(16)
        } else {
            id.clone()
        };
        let description = Description {
            block_id: [if slots == 1 { 8 } else { 7 }; 16],
            pool_id: [1; 16],
            generation: 3,
            geometry: Geometry::new(5000, slots).unwrap(),
            is_persistent: true,
            created_unix_ns: 1,
        };
        let file = format!("{id}.3.lzb");
        let block = Custodian::create_persistent(directory.as_fd(), &file, &description).unwrap();
        // As `write` writes it.
        for byte in [1u32, 2, 3] {
            let word = byte << 18 | byte << 12 | byte << 6 | byte;
            block.write(0, &word.to_be_bytes()[1..], None).unwrap();
        }
        block.sync().unwrap();
        let record = json!({
            "pool": "p", "block_id": name, "kind": "persistent", "size": 5000, "slots": slots,
            "owner": "app",
            "generation": 3, "created": 1, "lifetime": "pool", "permissions": {"read": ["*"],
            "write": ["*"]},
        });
        std::fs::write(memory.join(format!("{id}.json")), record.to_string()).unwrap();
    }
    let server = site.start();
    let mut wire = app(&server);
    for block in ["old", "raw"] {
        assert_eq!(read(&mut wire, block), (3, 3));
        // The lock is free once the block has moved.
        let lock = ask(&mut wire, "lock", block, json!({"wait": 20_000}));
        let lock = ok(&lock)["lock"].clone();
        let info = ask(&mut wire, "info", block, json!({}));
        let info = ok(&info);
        assert_eq!(
            (&info["generation"], &info["spare_slots"]),
            (&json!(4), &json!(2))
        );
        ok(&ask(&mut wire, "unlock", block, json!({"lock": lock})));
        assert_eq!(read(&mut wire, block), (3, 3));
        for byte in 4..9 {
            write(&mut wire, block, byte);
        }
    }
    server.kill();
    site.lose_power().unwrap();
    let server = site.start();
    let mut wire = app(&server);
    for block in ["old", "raw"] {
        assert_eq!(
            read(&mut wire, block),
            (3, 3),
            "it was flushed when it moved"
        );
    }
}

#[test]
fn a_block_not_loaded_because_of_a_limit_keeps_its_name_and_content() {
    let site = Site::new();
    let server = site.start();
    let mut wire = app(&server);
    ok(&ask(
        &mut wire,
        "create",
        "b",
        json!({"size": 1 << 20, "kind": "persistent"}),
    ));
    write(&mut wire, "b", 7);
    assert!(server.stop().success());
    let start = Start {
        settings: vec!["limits.memory_bytes_max=1MiB".into()],
        ..Start::default()
    };
    let server = site.start_with(&start).unwrap();
    let mut wire = app(&server);
    let health = wire.request(json!({"action": "health"}));
    let health = ok(&health);
    assert_eq!(
        health["components"]["memory"]["status"], "degraded",
        "{health}"
    );
    assert!(
        health.to_string().contains("block 'b' of pool 'p'"),
        "{health}"
    );
    for (action, more) in [
        (
            "create",
            json!({"size": 8, "kind": "persistent", "if_exists": "attach"}),
        ),
        ("create", json!({"size": 8})),
        ("attach", json!({})),
        ("read", json!({})),
        ("remove", json!({})),
    ] {
        let reply = ask(&mut wire, action, "b", more);
        assert_eq!(reply["error"]["code"], "quota", "{action}: {reply}");
    }
    assert!(server.stop().success());
    let server = site.start();
    let mut wire = app(&server);
    assert_eq!(read(&mut wire, "b"), (7, 1));
    let health = wire.request(json!({"action": "health"}));
    assert_eq!(
        ok(&health)["components"]["memory"]["status"],
        "ok",
        "{health}"
    );
}

#[test]
fn an_unannounced_version_is_announced_when_its_writer_ends() {
    let site = Site::new();
    let server = site.start();
    for kind in ["shared", "persistent"] {
        let mut writer = app(&server);
        let made = ask(
            &mut writer,
            "create",
            "b",
            json!({"size": 100, "kind": kind}),
        );
        let spares = ok(&made)["spare_slots"].as_u64();
        let geometry = match spares {
            None => Geometry::new(100, 2).unwrap(),
            Some(_) => Geometry::with_spares(100, 2).unwrap(),
        };
        let expected = Expected {
            generation: made["response"]["generation"].as_u64().unwrap(),
            geometry,
            is_persistent: kind == "persistent",
            access: Access::Write,
        };
        let attached = Attachment::new(writer.take(1).remove(0), &expected).unwrap();
        let (mut reader, _) = server.app(json!({"app_id": "reader", "pools": ["p"]}));
        ok(&ask(&mut reader, "subscribe", "b", json!({})));
        let mut writing = Arc::new(attached).begin(0).unwrap();
        writing.write(0, b"told by nobody").unwrap();
        assert_eq!(writing.publish().unwrap(), 1);
        drop(writer);
        let event = loop {
            let event = reader.receive();
            if event["event"] == "block_changed" {
                break event;
            }
        };
        assert_eq!(
            (&event["block_id"], &event["version"]),
            (&json!("b"), &json!(1))
        );
        ok(&ask(&mut app(&server), "remove", "b", json!({})));
    }
}

#[test]
fn a_reused_name_starts_at_a_later_generation() {
    let site = Site::new();
    let server = site.start();
    let mut wire = app(&server);
    let mut newest = 0;
    let mut make = |wire: &mut Wire, kind: &str| {
        let made = ask(wire, "create", "b", json!({"size": 8, "kind": kind}));
        let generation = ok(&made)["generation"].as_u64().unwrap();
        assert!(generation > newest, "{generation} after {newest}");
        newest = generation;
        write(wire, "b", 1);
    };
    for kind in ["shared", "persistent", "shared"] {
        make(&mut wire, kind);
        ok(&ask(&mut wire, "remove", "b", json!({})));
    }
    // Also by the next server, and if a shared block ended with the previous one.
    make(&mut wire, "shared");
    // Its reply waits for the database, which by then has what was written before.
    ok(&wire.request(json!({"action": "trigger_register", "triggers": ["t"]})));
    drop(wire);
    server.kill();
    let server = site.start();
    let mut wire = app(&server);
    make(&mut wire, "shared");
}
