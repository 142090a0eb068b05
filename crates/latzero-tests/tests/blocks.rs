//! Blocks over the wire: descriptors, what the kernel permits their holders, and what remains when
//! processes are killed.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use latzero_tests::{Server, TIMEOUT, Via, Wire};
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const BOTH: [Via; 2] = [Via::Tcp, Via::Unix];

/// The variable that makes this program a client for the tests to kill.
const ROLE: &str = "LATZERO_TEST_CLIENT";

fn mapping(server: &Server, app: &str) -> Wire {
    server.app(
        Via::Unix,
        json!({"app_id": app, "pools": ["p"], "triggers": ["t"], "features": ["attachments",
            "fd_passing"]}),
    )
}

fn copying(server: &Server, via: Via, app: &str) -> Wire {
    server.app(
        via,
        json!({"app_id": app, "pools": ["p"], "features": ["attachments"]}),
    )
}

/// Sends a request about block `b`.
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

fn code(reply: &Value) -> &str {
    reply["error"]["code"]
        .as_str()
        .unwrap_or_else(|| panic!("no error: {reply}"))
}

/// What the server holds: blocks, their bytes, connections and descriptors.
fn holdings(wire: &mut Wire) -> [Value; 4] {
    let stats = ok(wire.request(json!({"action": "stats"})));
    [
        stats["memory"]["blocks"].clone(),
        stats["memory"]["bytes"].clone(),
        stats["transport"]["connections"].clone(),
        stats["resources"]["descriptors"].clone(),
    ]
}

fn wait_for<T: PartialEq + std::fmt::Debug>(wanted: &T, mut look: impl FnMut() -> T) {
    let end = Instant::now() + TIMEOUT;
    let mut seen = look();
    while seen != *wanted {
        assert!(Instant::now() < end, "expected {wanted:?}, found {seen:?}");
        std::thread::yield_now();
        seen = look();
    }
}

#[test]
fn a_mapped_block_comes_with_one_descriptor_that_permits_only_its_mode() {
    let server = Server::start();
    let mut writer = mapping(&server, "writer");
    let made = ok(ask(&mut writer, "create", json!({"size": 10_000})));
    assert_eq!(
        (&made["access"], &made["slot_stride"]),
        (&json!("mapped"), &json!(12288))
    );
    let [own] = <[OwnedFd; 1]>::try_from(writer.take_descriptors()).unwrap();
    let seals = fcntl_get_seals(&own).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    let own = File::from(own);
    assert_eq!(own.metadata().unwrap().len(), 4096 + 2 * 12288);
    own.write_at(b"x", 4096).unwrap();
    assert!(own.set_len(10).is_err() && own.set_len(1 << 20).is_err());

    let mut reader = mapping(&server, "reader");
    ok(ask(&mut reader, "attach", json!({})));
    let [lent] = <[OwnedFd; 1]>::try_from(reader.take_descriptors()).unwrap();
    let lent = File::from(lent);
    let mut magic = [0; 8];
    lent.read_exact_at(&mut magic, 0).unwrap();
    assert_eq!(&magic, b"LZBLOCK1");
    assert!(
        lent.write_at(b"y", 4096).is_err(),
        "it was opened read-only"
    );
    assert!(lent.set_len(10).is_err());

    // A client that did not ask for descriptors gets copies over any transport.
    for via in BOTH {
        let mut other = copying(&server, via, "other");
        assert_eq!(ok(ask(&mut other, "attach", json!({})))["access"], "copied");
        assert!(other.take_descriptors().is_empty());
    }
}

#[test]
fn descriptors_stay_with_their_messages_in_a_long_sequence() {
    let server = Server::start();
    let mut maker = mapping(&server, "maker");
    for n in 0..40 {
        maker.send(
            &json!({"action": "memory_create", "id": "c", "block_id": format!("b{n}"),
            "size": 4096 * (n + 1), "slots": 2}),
        );
        maker.send(&json!({"action": "ping", "id": "p"}));
    }
    let mut sizes = Vec::new();
    for _ in 0..80 {
        let reply = maker.receive();
        let announced = reply["descriptors"].as_u64().unwrap_or(0) as usize;
        let got = maker.take(announced);
        for fd in got {
            let length = File::from(fd).metadata().unwrap().len();
            let size = reply["response"]["size"].as_u64().unwrap();
            assert_eq!(length, 4096 + 2 * size);
            sizes.push(size);
        }
    }
    let expected: Vec<u64> = (0..40).map(|n| 4096 * (n + 1)).collect();
    assert_eq!(sizes, expected);
}

#[test]
fn descriptors_that_clients_send_unasked_are_closed() {
    let server = Server::start();
    let mut watch = copying(&server, Via::Unix, "watch");
    let before = holdings(&mut watch);
    let mut abuser = mapping(&server, "abuser");
    let file = File::open("/dev/null").unwrap();
    let fds = [file.as_fd(); 20];
    for count in [1, 2, 20] {
        abuser.send_with_descriptors(&json!({"action": "ping", "id": "p"}), &fds[..count]);
        assert_eq!(abuser.receive()["status"], "ok");
    }
    drop(abuser);
    wait_for(&before, || holdings(&mut watch));
}

#[test]
fn reads_and_writes_are_checked_at_the_edges_in_both_modes() {
    for via in BOTH {
        for consistency in ["snapshot", "raw"] {
            for kind in ["shared", "persistent"] {
                let server = Server::start();
                let mut a = copying(&server, via, "a");
                let size: u64 = 8195;
                ok(ask(
                    &mut a,
                    "create",
                    json!({"size": size, "consistency": consistency, "kind": kind}),
                ));
                let mut model = vec![0u8; size as usize];
                for (n, (offset, length)) in [
                    (0, 1),
                    (4095, 2),
                    (8191, 4),
                    (0, 8195),
                    (8, 0),
                    (1, 4096),
                    (8195, 0),
                    (3, 5),
                ]
                .into_iter()
                .enumerate()
                {
                    let bytes: Vec<u8> = (0..length).map(|i| (i * 7 + n + 1) as u8).collect();
                    a.send_attachment(
                        &json!({"action": "memory_write", "id": "w", "block_id": "b",
                        "offset": offset}),
                        &bytes,
                    );
                    let reply = a.receive();
                    assert_eq!(
                        reply["response"]["version"],
                        n + 1,
                        "{via:?} {consistency} {kind}: {reply}"
                    );
                    model[offset..offset + length].copy_from_slice(&bytes);
                    a.send(&json!({"action": "memory_read", "id": "r", "block_id": "b"}));
                    let (reply, got) = a.receive_whole();
                    assert_eq!(reply["response"]["version"], n + 1);
                    assert!(
                        got.unwrap() == model,
                        "{via:?} {consistency} {kind} after write {n}"
                    );
                }
                for (offset, length) in [(8195, 1), (8196, 0), (u64::MAX, 1), (1, 8195)] {
                    let reply = ask(&mut a, "read", json!({"offset": offset, "length": length}));
                    assert_eq!(code(&reply), "out_of_range");
                }
            }
        }
    }
}

#[test]
fn blocks_larger_than_a_frame_are_read_in_parts() {
    let server = Server::with(&["limits.max_frame=64KiB"]);
    let mut a = copying(&server, Via::Tcp, "a");
    ok(ask(&mut a, "create", json!({"size": 100_000})));
    let reply = ask(&mut a, "read", json!({}));
    assert_eq!(code(&reply), "too_large");
    assert!(
        reply["error"]["message"]
            .as_str()
            .unwrap()
            .contains("read at most 61440")
    );
    a.send(
        &json!({"action": "memory_read", "id": "r", "block_id": "b", "offset": 90_000,
        "if_version": 0}),
    );
    assert_eq!(a.receive_whole().1.unwrap().len(), 10_000);
}

#[test]
fn quota_errors_report_what_is_needed_and_what_is_free() {
    let server = Server::with(&[
        "limits.memory_bytes_max=2MiB",
        "limits.block_bytes_max=512KiB",
    ]);
    // Clients over TCP may use half of it.
    let mut a = copying(&server, Via::Tcp, "a");
    assert_eq!(
        code(&ask(&mut a, "create", json!({"size": 524_289}))),
        "too_large"
    );
    ok(ask(&mut a, "create", json!({"size": 300_000})));
    let reply = a.request(json!({"action": "memory_create", "block_id": "c", "size": 300_000}));
    assert_eq!(code(&reply), "quota");
    let message = reply["error"]["message"].as_str().unwrap();
    assert!(
        message
            .contains("needs 610304 bytes of memory blocks, but only 438272 of 1048576 are free"),
        "{message}"
    );
    let mut watch = copying(&server, Via::Unix, "w");
    assert_eq!(holdings(&mut watch)[0], 1);
}

#[test]
fn large_blocks_are_created_while_others_are_served() {
    let server = Server::start();
    let mut a = copying(&server, Via::Unix, "a");
    a.send(&json!({"action": "memory_create", "id": "big", "block_id": "b", "size": 64 << 20}));
    a.send(&json!({"action": "memory_attach", "id": "too", "block_id": "b"}));
    a.send(&json!({"action": "ping", "id": "p"}));
    // Another thread creates the block, so the ping does not wait for it, and a client that asks
    // for the block in the meantime gets it too.
    let replies: Vec<Value> = (0..3).map(|_| a.receive()).collect();
    for id in ["big", "too", "p"] {
        let reply = replies.iter().find(|r| r["in_reply_to"] == id).unwrap();
        assert_eq!(reply["status"], "ok", "{reply}");
    }
    assert_eq!(
        ok(ask(&mut a, "resize", json!({"size": 65 << 20})))["generation"],
        2
    );
}

/// Bytes that the clients of [`writes_that_copy_much_keep_their_order_and_lose_nothing`] write at
/// once: so much that the next version copies more than a loop may.
const MUCH: usize = 8 << 20;

#[test]
fn writes_that_copy_much_keep_their_order_and_lose_nothing() {
    const CLIENTS: u8 = 4;
    const ROUNDS: u8 = 6;
    for kind in ["shared", "persistent"] {
        let server = Server::start();
        let mut a = copying(&server, Via::Unix, "a");
        let size = (usize::from(CLIENTS) + 1) * MUCH;
        ok(ask(&mut a, "create", json!({"size": size, "kind": kind})));
        let versions: Vec<u64> = std::thread::scope(|scope| {
            let server = &server;
            let clients = (0..CLIENTS).map(|client| {
                scope.spawn(move || {
                    let via = BOTH[usize::from(client % 2)];
                    let mut wire = copying(server, via, &format!("c{client}"));
                    let own = usize::from(client) * MUCH;
                    let counter = usize::from(CLIENTS) * MUCH;
                    let mut versions = Vec::new();
                    for round in 1..=ROUNDS {
                        // Sent without waiting: each is to see the one before it.
                        let large = vec![round; MUCH];
                        let write = json!({"action": "memory_write", "id": "large",
                            "block_id": "b", "offset": own});
                        wire.send_attachment(&write, &large);
                        wire.send(&json!({"action": "memory_write", "id": "small",
                            "block_id": "b", "offset": own + 7, "data": "/w=="}));
                        wire.send(
                            &json!({"action": "memory_read", "id": "read", "block_id": "b",
                            "offset": own, "length": 9}),
                        );
                        for id in ["large", "small"] {
                            let reply = wire.receive();
                            assert_eq!(reply["in_reply_to"], id, "{reply}");
                            versions.push(ok(reply)["version"].as_u64().unwrap());
                        }
                        let (reply, bytes) = wire.receive_whole();
                        assert_eq!(reply["in_reply_to"], "read", "{reply}");
                        let mut expected = [round; 9];
                        expected[7] = 0xff;
                        assert_eq!(bytes.unwrap(), expected);
                        versions.push(count_up(&mut wire, counter));
                    }
                    versions
                })
            });
            let clients: Vec<_> = clients.collect();
            clients
                .into_iter()
                .flat_map(|c| c.join().unwrap())
                .collect()
        });
        let mut sorted = versions.clone();
        sorted.sort_unstable();
        let last = u64::from(CLIENTS) * u64::from(ROUNDS) * 3;
        assert_eq!(sorted, (1..=last).collect::<Vec<_>>(), "one version each");
        for client in 0..usize::from(CLIENTS) {
            let more = json!({"offset": client * MUCH, "length": MUCH});
            let bytes = read(&mut a, &more);
            let mut expected = vec![ROUNDS; MUCH];
            expected[7] = 0xff;
            assert!(bytes == expected, "{kind}: what client {client} wrote");
        }
        let more = json!({"offset": usize::from(CLIENTS) * MUCH, "length": 1});
        assert_eq!(read(&mut a, &more), [CLIENTS * ROUNDS], "no count is lost");
    }
}

/// One byte in base64.
fn base64(byte: u8) -> String {
    let digit = |at: u8| {
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        char::from(digits[usize::from(at)])
    };
    format!("{}{}==", digit(byte >> 2), digit((byte & 3) << 4))
}

/// Reads bytes of block `b`.
fn read(wire: &mut Wire, more: &Value) -> Vec<u8> {
    wire.send(
        &json!({"action": "memory_read", "id": "read", "block_id": "b",
        "offset": more["offset"], "length": more["length"]}),
    );
    let (reply, bytes) = wire.receive_whole();
    assert_eq!(reply["status"], "ok", "{reply}");
    bytes.unwrap()
}

/// Adds one to a byte of block `b` by compare-and-swap; returns the version.
fn count_up(wire: &mut Wire, offset: usize) -> u64 {
    loop {
        let now = read(wire, &json!({"offset": offset, "length": 1}))[0];
        let [expected, data] = [now, now + 1].map(base64);
        let more = json!({"offset": offset, "expected": expected, "data": data});
        let reply = ok(ask(wire, "cas", more));
        if reply["swapped"] == true {
            return reply["version"].as_u64().unwrap();
        }
    }
}

#[test]
fn persistent_blocks_are_back_after_a_kill_and_leave_no_file_when_removed() {
    let mut server = Server::start();
    let memory = server.0.data_dir().join("memory");
    let files = || {
        let mut names: Vec<String> = std::fs::read_dir(&memory)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let mut a = copying(&server, Via::Unix, "a");
    let create = json!({"size": 10, "kind": "persistent", "layout": {"dtype": "|u1",
        "shape": [10]}, "permissions": {"read": ["*"], "write": ["a"]}});
    ok(ask(&mut a, "create", create));
    ok(ask(&mut a, "write", json!({"data": "AQI="})));
    ok(ask(&mut a, "resize", json!({"size": 12})));
    ok(ask(&mut a, "write", json!({"offset": 11, "data": "CQ=="})));
    assert_eq!(ok(ask(&mut a, "flush", json!({})))["version"], 2);
    assert_eq!(files().len(), 2, "{:?}", files());
    server.kill();
    // Left by a server that was killed while it created a block, and by a block that lost its
    // record.
    std::fs::write(memory.join("00.1.lzb.new"), b"half").unwrap();
    std::fs::write(memory.join("11.1.lzb"), b"lost").unwrap();
    server.restart();
    assert_eq!(
        files().iter().filter(|name| name.starts_with('0')).count(),
        files()
            .iter()
            .filter(|n| n.starts_with('0') && !n.starts_with("00."))
            .count()
    );
    assert!(memory.join(".orphans/11.1.lzb").exists());
    let mut b = copying(&server, Via::Tcp, "b");
    let info = ok(ask(&mut b, "info", json!({})));
    assert_eq!(
        (&info["version"], &info["generation"], &info["owner"]),
        (&json!(2), &json!(2), &json!("a"))
    );
    assert_eq!(info["layout"], json!({"dtype": "|u1", "shape": [10]}));
    assert_eq!(
        code(&ask(&mut b, "write", json!({"data": "AA=="}))),
        "forbidden"
    );
    b.send(&json!({"action": "memory_read", "id": "r", "block_id": "b"}));
    assert_eq!(
        b.receive_whole().1.unwrap(),
        [1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]
    );
    let mut a = copying(&server, Via::Unix, "a");
    ok(ask(&mut a, "remove", json!({})));
    wait_for(&vec![".orphans".to_owned()], files);
}

#[test]
fn a_truncated_file_affects_no_other_block() {
    let server = Server::start();
    let mut a = copying(&server, Via::Unix, "a");
    ok(ask(
        &mut a,
        "create",
        json!({"size": 100_000, "kind": "persistent"}),
    ));
    ok(ask(&mut a, "write", json!({"data": "AQI="})));
    a.request(json!({"action": "memory_create", "block_id": "good", "size": 10}));
    let memory = server.0.data_dir().join("memory");
    let file = std::fs::read_dir(memory)
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "lzb"))
        .unwrap();
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(5000)
        .unwrap();
    assert_eq!(
        code(&ask(&mut a, "read", json!({"offset": 50_000}))),
        "storage"
    );
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(0)
        .unwrap();
    for (action, more) in [
        ("read", json!({})),
        ("attach", json!({})),
        ("write", json!({"data": "AA=="})),
    ] {
        assert_eq!(code(&ask(&mut a, action, more)), "storage", "{action}");
    }
    let health = ok(a.request(json!({"action": "health"})));
    let memory = &health["components"]["memory"];
    assert_eq!(memory["status"], "degraded", "{health}");
    assert_eq!(
        (
            &memory["seen"]["corrupt_total"],
            &memory["seen"]["corrupt"][0]["block_id"]
        ),
        (&json!(1), &json!("b"))
    );
    // The other blocks keep working, and this one can be removed.
    let good = a.request(json!({"action": "memory_write", "block_id": "good", "data": "AA=="}));
    assert_eq!(good["response"]["version"], 1);
    ok(ask(&mut a, "remove", json!({})));
    assert_eq!(
        ok(a.request(json!({"action": "health"})))["components"]["memory"]["status"],
        "ok"
    );
}

#[test]
fn a_header_that_a_writer_corrupted_is_reported_and_refused() {
    let server = Server::start();
    let mut a = mapping(&server, "a");
    ok(ask(&mut a, "create", json!({"size": 10})));
    let file = File::from(a.take_descriptors().remove(0));
    file.write_at(b"EVIL", 60).unwrap();
    assert_eq!(code(&ask(&mut a, "attach", json!({}))), "storage");
    let health = ok(a.request(json!({"action": "health"})));
    assert_eq!(
        health["components"]["memory"]["seen"]["corrupt"][0]["pool"],
        "p"
    );
    // Words that only writers write may have any value: the server answers and keeps running.
    ok(ask(&mut a, "remove", json!({})));
    ok(ask(&mut a, "create", json!({"size": 10})));
    let file = File::from(a.take_descriptors().remove(0));
    for (offset, word) in [
        (128, u64::MAX),
        (128, 0xff),
        (512, u64::MAX),
        (512 + 16, u64::MAX),
        (640, 1),
        (512 + 48, u64::MAX),
        (640 + 56, u64::MAX),
    ] {
        file.write_at(&word.to_le_bytes(), offset).unwrap();
        let _ = ask(&mut a, "read", json!({}));
        let _ = ask(&mut a, "write", json!({"data": "AA=="}));
        let _ = ask(&mut a, "info", json!({}));
    }
    assert_eq!(a.request(json!({"action": "ping"}))["status"], "ok");
}

/// Starts this program as a client of `server`; returns it once it has reported that it is done.
fn client(server: &Server, script: &str) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_client_to_be_killed", "--nocapture"])
        .env(ROLE, script)
        .env(
            "LATZERO_TEST_SOCKET",
            server.0.data_dir().join("latzero.sock"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let out = child.stdout.as_mut().unwrap();
    while !said.ends_with(b"ready\n") {
        let mut byte = [0];
        out.read_exact(&mut byte).expect("the client connects");
        said.push(byte[0]);
    }
    child
}

fn kill(mut child: Child) {
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
}

/// Not a test: the process that [`client`] starts.
#[test]
fn a_client_to_be_killed() {
    let Ok(script) = std::env::var(ROLE) else {
        return;
    };
    let mut wire = Wire::unix(std::env::var("LATZERO_TEST_SOCKET").unwrap().as_ref());
    let handshake = json!({"action": "handshake", "app_id": "victim", "pools": ["p"],
        "triggers": ["t"], "features": ["attachments", "fd_passing"]});
    wire.request(handshake);
    for line in script.lines() {
        let message: Value = serde_json::from_str(line).unwrap();
        if message["waits"] == true {
            wire.send(&message);
        } else {
            ok(wire.request(message));
        }
    }
    let mut out = std::io::stdout();
    out.write_all(b"ready\n").unwrap();
    out.flush().unwrap();
    // Waits until it is killed, or until the test ends and so closes the pipe.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn killing_a_client_that_holds_or_awaits_the_lock_frees_it() {
    let server = Server::start();
    let mut a = mapping(&server, "a");
    ok(ask(&mut a, "create", json!({"size": 10})));
    let attach_and_lock = r#"{"action":"memory_attach","block_id":"b","mode":"write"}
{"action":"memory_lock","block_id":"b"}"#;
    let owner = client(&server, attach_and_lock);
    assert_eq!(code(&ask(&mut a, "lock", json!({}))), "locked");
    a.send(&json!({"action": "memory_lock", "id": "l", "block_id": "b", "wait": 60_000}));
    kill(owner);
    let mut reply = a.receive();
    assert_eq!(reply["event"], "lock_broken", "{reply}");
    reply = a.receive();
    assert_eq!(reply["response"]["fence"], 3, "{reply}");
    // A dead process writes no more, so the block need not move.
    assert_eq!(ok(ask(&mut a, "info", json!({})))["generation"], 1);

    let waiter = client(
        &server,
        r#"{"action":"memory_lock","id":"w","block_id":"b","wait":60000,"waits":true}"#,
    );
    wait_for(&json!(1), || {
        ok(ask(&mut a, "info", json!({})))["lock"]["waiting"].clone()
    });
    kill(waiter);
    wait_for(&json!(0), || {
        ok(ask(&mut a, "info", json!({})))["lock"]["waiting"].clone()
    });
    ok(ask(&mut a, "unlock", json!({"lock": "3"})));
    assert_eq!(ok(ask(&mut a, "lock", json!({})))["fence"], 5);
}

#[test]
fn a_live_holder_that_disconnects_keeps_the_old_generation() {
    let server = Server::start();
    let mut a = mapping(&server, "a");
    ok(ask(&mut a, "create", json!({"size": 10})));
    let mut b = mapping(&server, "b");
    ok(ask(&mut b, "attach", json!({"mode": "write"})));
    ok(ask(&mut b, "lock", json!({})));
    let kept = File::from(b.take_descriptors().remove(0));
    // The connection ends, but the process and its mapping live on.
    drop(b);
    assert_eq!(a.receive()["event"], "lock_broken");
    let moved = a.receive();
    assert_eq!(
        (&moved["event"], &moved["generation"], &moved["reason"]),
        (&json!("block_moved"), &json!(2), &json!("lock_broken"))
    );
    kept.write_at(&[0xff; 10], 4096).unwrap();
    kept.write_at(&(1u64 << 8).to_le_bytes(), 128).unwrap();
    a.send(&json!({"action": "memory_read", "id": "r", "block_id": "b"}));
    let (reply, bytes) = a.receive_whole();
    assert_eq!(
        (&reply["response"]["version"], bytes.unwrap()),
        (&json!(0), vec![0; 10])
    );
}

#[test]
fn a_handler_killed_in_a_call_gives_its_blocks_back() {
    let server = Server::start();
    let mut a = mapping(&server, "a");
    ok(ask(&mut a, "create", json!({"size": 10})));
    let handler = client(&server, "");
    a.send(
        &json!({"action": "trigger", "id": "c", "process": "t", "destination": "victim",
        "blocks": ["b"]}),
    );
    wait_for(&json!(2), || {
        ok(ask(&mut a, "info", json!({})))["attachments_total"].clone()
    });
    kill(handler);
    loop {
        let reply = a.receive();
        if reply["in_reply_to"] == "c" {
            assert_eq!(code(&reply), "handler_gone");
            break;
        }
    }
    assert_eq!(ok(ask(&mut a, "info", json!({})))["attachments_total"], 1);
}

#[test]
fn nothing_is_left_of_a_thousand_clients_that_used_blocks_and_left() {
    let server = Server::start();
    let mut watch = copying(&server, Via::Unix, "watch");
    let cycle = || {
        let mut wire = mapping(&server, "cycler");
        let more = json!({"size": 20_000, "lifetime": "attached"});
        ok(ask(&mut wire, "create", more));
        ok(ask(&mut wire, "lock", json!({})));
        wire
    };
    let before = holdings(&mut watch);
    let memory = |watch: &mut Wire| {
        ok(watch.request(json!({"action": "stats"})))["resources"]["memory_bytes"]
            .as_u64()
            .unwrap()
    };
    for _ in 0..100 {
        drop(cycle());
        wait_for(&json!(0), || holdings(&mut watch)[0].clone());
    }
    let early = memory(&mut watch);
    for _ in 0..900 {
        drop(cycle());
        wait_for(&json!(0), || holdings(&mut watch)[0].clone());
    }
    wait_for(&before, || holdings(&mut watch));
    let late = memory(&mut watch);
    assert!(
        late < early + (4 << 20),
        "{early} bytes after 100 clients, {late} after 1000"
    );
}

#[test]
fn nothing_is_left_of_clients_that_were_killed() {
    let server = Server::start();
    let mut watch = copying(&server, Via::Unix, "watch");
    let before = holdings(&mut watch);
    let script = r#"{"action":"memory_create","block_id":"b","size":100000,"lifetime":"attached"}
{"action":"memory_subscribe","block_id":"b"}
{"action":"memory_lock","block_id":"b"}"#;
    for _ in 0..20 {
        kill(client(&server, script));
        wait_for(&before, || holdings(&mut watch));
    }
}

#[test]
fn killing_everything_leaves_no_memory_and_no_name() {
    let mut server = Server::start();
    let script = r#"{"action":"memory_create","block_id":"b","size":100000}"#;
    let one = client(&server, script);
    let holders = |name: &str| {
        let fds = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|p| std::fs::read_dir(p.path().join("fd")).ok());
        fds.flatten()
            .flatten()
            .filter(|fd| {
                std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains(name))
            })
            .filter(|fd| {
                // Counts only this server, because other tests run servers of their own.
                let pid = fd
                    .path()
                    .components()
                    .nth(2)
                    .map(|c| c.as_os_str().to_string_lossy().into_owned());
                pid.is_some_and(|pid| {
                    [server.pid().to_string(), one.id().to_string()].contains(&pid)
                })
            })
            .count()
    };
    assert!(holders("memfd:lz:p") > 0, "the server holds its block");
    let (pid, other) = (server.pid(), one.id());
    kill(one);
    server.kill();
    for gone in [pid, other] {
        assert!(
            !std::path::Path::new(&format!("/proc/{gone}/fd")).exists()
                || std::fs::read_dir(format!("/proc/{gone}/fd")).map_or(0, Iterator::count) == 0
        );
    }
    // Nothing was left for it in memory/ either.
    assert_eq!(
        std::fs::read_dir(server.0.data_dir().join("memory"))
            .unwrap()
            .count(),
        0
    );
}
