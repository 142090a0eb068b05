//! Blocks: permissions, waiting, and what remains when a member leaves.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use latzero_fabric::ledger::Resource;
use latzero_fabric::{Limits, Transport};
use latzero_sim::{Bounds, Peer};
use net::Net;
use serde_json::Value;

const WRITER: &str = r#""pools":["p"],"triggers":["t"],"features":["attachments","fd_passing"]"#;
const READER: &str = r#""pools":["p"]"#;

/// Sends a request about block `b`; returns the error code, or the fields named in `show`.
fn ask(net: &mut Net, peer: Peer, action: &str, more: &str, show: &[&str]) -> String {
    net.sees(peer);
    let more = if more.is_empty() {
        String::new()
    } else {
        format!(",{more}")
    };
    net.say(
        peer,
        &format!(r#"{{"action":"memory_{action}","id":"m","block_id":"b"{more}}}"#),
    );
    gist(net, peer, show)
}

fn gist(net: &mut Net, peer: Peer, show: &[&str]) -> String {
    let messages = net.messages(peer);
    let Some(reply) = messages.iter().find(|m| m.json["in_reply_to"] == "m") else {
        return "(waits)".into();
    };
    if let Some(code) = reply.json["error"]["code"].as_str() {
        return code.into();
    }
    let shown: Vec<String> = show
        .iter()
        .map(|name| match &reply.json["response"][name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
        .collect();
    shown.join(" ")
}

fn two() -> (Net, Peer, Peer) {
    let mut net = Net::new();
    let writer = net.app("writer", WRITER);
    let reader = net.app("reader", READER);
    (net, writer, reader)
}

fn lock(net: &mut Net, peer: Peer, more: &str) -> String {
    ask(net, peer, "lock", more, &["fence"])
}

#[test]
fn a_block_is_made_attached_read_and_written() {
    let (mut net, writer, reader) = two();
    let made = ask(
        &mut net,
        writer,
        "create",
        r#""size":5000"#,
        &[
            "size",
            "slots",
            "slot_stride",
            "generation",
            "mode",
            "access",
            "version",
        ],
    );
    assert_eq!(made, "5000 2 8192 1 write mapped 0");
    assert_eq!(net.world.descriptors(writer), 1);
    let attached = ask(&mut net, reader, "attach", "", &["mode", "access"]);
    assert_eq!(attached, "read copied");
    assert_eq!(
        ask(
            &mut net,
            reader,
            "read",
            r#""length":2"#,
            &["data", "version"]
        ),
        "AAA= 0"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "write",
            r#""offset":4998,"data":"AQI=""#,
            &["version"]
        ),
        "1"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "read",
            r#""offset":4997"#,
            &["data", "version"]
        ),
        "AAEC 1"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "write",
            r#""offset":4999,"data":"AQI=""#,
            &[]
        ),
        "out_of_range"
    );
    assert_eq!(
        ask(&mut net, reader, "read", r#""offset":5001"#, &[]),
        "out_of_range"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "read",
            r#""offset":18446744073709551615,"length":2"#,
            &[]
        ),
        "out_of_range"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "write",
            r#""data":"AQ==","if_version":0"#,
            &[]
        ),
        "version_conflict"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "cas",
            r#""offset":4998,"expected":"AQI=","data":"AwQ=""#,
            &["swapped", "version"]
        ),
        "true 2"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "cas",
            r#""offset":4998,"expected":"AQI=","data":"AwQ=""#,
            &["swapped", "current"]
        ),
        "false AwQ="
    );
    assert_eq!(
        ask(&mut net, reader, "create", r#""size":1"#, &[]),
        "block_exists"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "create",
            r#""size":1,"if_exists":"attach","mode":"read""#,
            &["size", "mode"]
        ),
        "5000 read"
    );
    assert_eq!(
        ask(
            &mut net,
            reader,
            "create",
            r#""size":5001,"if_exists":"attach""#,
            &[]
        ),
        "block_exists"
    );
    assert_eq!(ask(&mut net, writer, "remove", "", &[]), "");
    assert!(net.sees(reader).contains("block_removed p b"));
    assert_eq!(ask(&mut net, reader, "read", "", &[]), "no_block");
    assert!(net.world.storages().is_empty());
}

#[test]
fn permissions_are_checked_for_every_request() {
    let (mut net, owner, other) = two();
    let create = r#""size":10,"permissions":{"read":["friend"],"write":["writer2"]}"#;
    assert_eq!(ask(&mut net, owner, "create", create, &["owner"]), "writer");
    for action in [
        "attach",
        "read",
        "subscribe",
        "lock",
        "flush",
        "remove",
        "resize",
    ] {
        assert_eq!(
            ask(&mut net, other, action, r#""size":3"#, &[]),
            "forbidden",
            "{action}"
        );
    }
    for action in ["write", "cas"] {
        assert_eq!(
            ask(
                &mut net,
                other,
                action,
                r#""data":"AA==","expected":"AA==""#,
                &[]
            ),
            "forbidden"
        );
    }
    let friend = net.app("friend", READER);
    assert_eq!(ask(&mut net, friend, "attach", "", &["mode"]), "read");
    assert_eq!(
        ask(&mut net, friend, "attach", r#""mode":"write""#, &[]),
        "forbidden"
    );
    assert_eq!(ask(&mut net, friend, "lock", "", &[]), "forbidden");
    assert_eq!(
        ask(&mut net, friend, "lock", r#""mode":"shared""#, &["fence"]),
        "1"
    );
    let second = net.app("writer2", READER);
    assert_eq!(
        ask(&mut net, second, "read", r#""length":0"#, &["version"]),
        "0"
    );
    assert_eq!(
        ask(&mut net, second, "attach", r#""mode":"write""#, &["mode"]),
        "write"
    );
    let outsider = net.app("outsider", r#""pools":["q"]"#);
    assert_eq!(
        ask(&mut net, outsider, "attach", r#""pool":"p""#, &[]),
        "not_member"
    );
}

#[test]
fn layouts_are_checked() {
    let (mut net, a, b) = two();
    let layout = r#""layout":{"dtype":"<f4","shape":[2,3]}"#;
    assert_eq!(
        ask(
            &mut net,
            a,
            "create",
            &format!(r#""size":24,{layout}"#),
            &["layout"]
        ),
        r#"{"dtype":"<f4","shape":[2,3]}"#
    );
    assert_eq!(ask(&mut net, b, "attach", layout, &["mode"]), "read");
    assert_eq!(
        ask(
            &mut net,
            b,
            "attach",
            r#""layout":{"dtype":"<f4","shape":[6]}"#,
            &[]
        ),
        "layout_mismatch"
    );
    assert_eq!(
        ask(&mut net, a, "resize", r#""size":20"#, &[]),
        "layout_mismatch"
    );
}

#[test]
fn locks_are_granted_in_order_and_end_with_their_owner() {
    let (mut net, a, b) = two();
    let c = net.app("c", READER);
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    for peer in [b, c] {
        ask(&mut net, peer, "attach", "", &[]);
    }
    assert_eq!(lock(&mut net, a, ""), "1");
    assert_eq!(lock(&mut net, b, ""), "locked");
    assert_eq!(ask(&mut net, b, "write", r#""data":"AA==""#, &[]), "locked");
    assert_eq!(
        ask(
            &mut net,
            a,
            "write",
            r#""data":"AA==","lock":"1""#,
            &["version"]
        ),
        "1"
    );
    assert_eq!(
        ask(&mut net, a, "write", r#""data":"AA==","lock":"9""#, &[]),
        "lock_lost"
    );
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    assert_eq!(lock(&mut net, c, r#""wait":500"#), "(waits)");
    net.advance(500);
    assert_eq!(gist(&mut net, c, &[]), "locked");
    net.hang_up(a);
    // The end of the first owner also increments the fence.
    assert_eq!(gist(&mut net, b, &["fence"]), "3");
    assert!(net.sees(c).contains("lock_broken"));
    assert_eq!(
        ask(&mut net, c, "unlock", r#""lock":"3""#, &[]),
        "lock_lost"
    );
    assert_eq!(ask(&mut net, b, "unlock", r#""lock":"3""#, &[]), "");
    assert_eq!(lock(&mut net, c, r#""mode":"shared""#), "5");
    assert_eq!(lock(&mut net, b, r#""mode":"shared""#), "6");
}

#[test]
fn a_wait_for_a_lock_can_be_cancelled_and_ends_with_its_waiter() {
    let (mut net, a, b) = two();
    let c = net.app("c", READER);
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(lock(&mut net, a, ""), "1");
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    net.say(b, r#"{"action":"cancel","id":"m"}"#);
    assert_eq!(gist(&mut net, b, &[]), "cancelled");
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    assert_eq!(lock(&mut net, c, r#""wait":1000"#), "(waits)");
    net.hang_up(b);
    assert_eq!(ask(&mut net, a, "unlock", r#""lock":"1""#, &[]), "");
    assert_eq!(gist(&mut net, c, &["fence"]), "3");
}

#[test]
fn an_expired_lease_leaves_its_writer_in_the_old_generation() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    ask(&mut net, b, "attach", "", &[]);
    assert_eq!(lock(&mut net, a, r#""lease":100"#), "1");
    net.advance(60);
    assert_eq!(
        ask(&mut net, a, "renew", r#""lock":"1","lease":100"#, &[]),
        ""
    );
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    net.advance(60);
    assert_eq!(gist(&mut net, b, &[]), "(waits)");
    net.advance(60);
    // The writer is alive and has a mapping: a new generation excludes it.
    let seen = net.sees(a);
    assert!(
        seen.contains("lock_lost p b") && seen.contains("block_moved p b lock_broken"),
        "{seen}"
    );
    assert_eq!(gist(&mut net, b, &["fence"]), "3");
    assert_eq!(ask(&mut net, b, "info", "", &["generation"]), "2");
    assert_eq!(ask(&mut net, a, "renew", r#""lock":"1""#, &[]), "lock_lost");
    assert_eq!(net.world.storages().count(), 1);
}

#[test]
fn changes_are_announced_once_with_the_newest_version() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(ask(&mut net, b, "subscribe", "", &["version"]), "0");
    net.world.hold_writes(true);
    for _ in 0..3 {
        net.say(
            a,
            r#"{"action":"memory_write","block_id":"b","data":"AA=="}"#,
        );
    }
    net.world.hold_writes(false);
    assert_eq!(net.sees(b), "block_changed p b 3");
    net.say(
        a,
        r#"{"action":"memory_notify","block_id":"b","version":9}"#,
    );
    assert_eq!(net.sees(b), "block_changed p b 9");
    assert_eq!(ask(&mut net, b, "unsubscribe", "", &[]), "");
    net.say(
        a,
        r#"{"action":"memory_write","block_id":"b","data":"AA=="}"#,
    );
    assert_eq!(net.sees(b), "");
    net.ask(
        b,
        r#"{"action":"watch","id":"w","pool":"p","events":["block_changed","block_removed"]}"#,
    );
    net.say(
        a,
        r#"{"action":"memory_write","block_id":"b","data":"AA=="}"#,
    );
    net.say(a, r#"{"action":"memory_remove","block_id":"b"}"#);
    let seen = net.sees(b);
    assert!(
        seen.contains("block_changed p b 11") && seen.contains("block_removed p b"),
        "{seen}"
    );
}

#[test]
fn a_resize_is_a_new_generation_with_the_old_content() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":4"#, &[]);
    ask(&mut net, b, "attach", "", &[]);
    ask(&mut net, a, "write", r#""data":"AQIDBA==""#, &[]);
    net.world.hold_jobs(true);
    assert_eq!(ask(&mut net, a, "resize", r#""size":6"#, &[]), "(waits)");
    // While the block moves it can be read, but not written.
    assert_eq!(ask(&mut net, b, "read", "", &["data"]), "AQIDBA==");
    assert_eq!(ask(&mut net, b, "write", r#""data":"AA==""#, &[]), "locked");
    assert_eq!(ask(&mut net, b, "resize", r#""size":9"#, &[]), "locked");
    assert_eq!(lock(&mut net, b, r#""wait":10"#), "(waits)");
    net.world.hold_jobs(false);
    assert_eq!(
        gist(&mut net, a, &["size", "generation", "version"]),
        "6 2 1"
    );
    let seen = net.sees(b);
    assert!(
        seen.contains("block_moved p b resized") && seen.contains("m ok"),
        "{seen}"
    );
    assert_eq!(
        ask(&mut net, b, "read", "", &["data", "version"]),
        "AQIDBAAA 1"
    );
    assert_eq!(net.world.storages().count(), 1);
    assert_eq!(ask(&mut net, a, "resize", r#""size":9"#, &[]), "locked");
    assert_eq!(ask(&mut net, b, "unlock", r#""lock":"1""#, &[]), "");
    // An array without elements is valid.
    assert_eq!(ask(&mut net, a, "resize", r#""size":0"#, &["size"]), "0");
    assert_eq!(
        ask(&mut net, a, "resize", r#""size":99999999999"#, &[]),
        "too_large"
    );
}

/// Encoding more would delay other connections.
#[test]
fn a_large_read_as_base64_is_made_in_parts() {
    let mut net = Net::new();
    let [writer, reader] = [("writer", WRITER), ("reader", READER)].map(|(n, a)| net.app(n, a));
    let part = 4 * 1024 * 1024;
    let create = format!(r#""size":{}"#, part + 1);
    assert_eq!(ask(&mut net, writer, "create", &create, &["version"]), "0");
    let mut read = |peer, length: u64| {
        let length = format!(r#""length":{length}"#);
        ask(&mut net, peer, "read", &length, &["version"])
    };
    assert_eq!(read(reader, part), "0");
    assert_eq!(read(reader, part + 1), "too_large");
    assert_eq!(read(writer, part + 1), "0");
}

#[test]
fn requests_wait_while_a_block_is_created() {
    let (mut net, a, b) = two();
    net.world.hold_jobs(true);
    assert_eq!(ask(&mut net, a, "create", r#""size":8"#, &[]), "(waits)");
    assert_eq!(ask(&mut net, b, "read", "", &[]), "no_block");
    assert_eq!(ask(&mut net, b, "attach", "", &[]), "(waits)");
    net.world.hold_jobs(false);
    assert_eq!(gist(&mut net, a, &["mode"]), "write");
    assert_eq!(gist(&mut net, b, &["mode"]), "read");
    // If its only member has left when the block is ready, nothing remains of it.
    net.world.hold_jobs(true);
    ask(&mut net, a, "remove", "", &[]);
    ask(
        &mut net,
        a,
        "create",
        r#""size":8,"lifetime":"attached""#,
        &[],
    );
    net.hang_up(a);
    net.world.hold_jobs(false);
    assert!(net.world.storages().is_empty());
}

#[test]
fn out_of_memory_is_an_error_and_leaves_nothing() {
    let (mut net, a, b) = two();
    net.world.fill_memory(true);
    assert_eq!(ask(&mut net, a, "create", r#""size":8"#, &[]), "storage");
    assert!(net.world.storages().is_empty());
    net.world.fill_memory(false);
    assert_eq!(ask(&mut net, b, "create", r#""size":8"#, &["size"]), "8");
    net.world.fill_memory(true);
    assert_eq!(ask(&mut net, b, "resize", r#""size":9"#, &[]), "storage");
    assert_eq!(
        ask(&mut net, b, "write", r#""data":"AA==""#, &["version"]),
        "1"
    );
}

#[test]
fn quotas_are_checked_before_anything_is_created() {
    let mut net = Net::with(|limits| {
        limits.block_bytes_max = 10_000;
        limits.blocks_max = 3;
        limits.memory_bytes_max = 60_000;
        limits.memory_bytes_per_pool_max = 50_000;
        limits.memory_bytes_per_app_max = 30_000;
        limits.attachments_per_app_max = 1;
        limits.subscriptions_per_app_max = 1;
    });
    let a = net.app("a", r#""pools":["p","q"]"#);
    let b = net.app("b", r#""pools":["p"]"#);
    let create = |net: &mut Net, peer, name: &str, size: u64| {
        net.say(peer, &format!(r#"{{"action":"memory_create","id":"m","block_id":"{name}","pool":"p","size":{size},"attach":false}}"#));
        gist(net, peer, &["bytes", "size"])
    };
    assert_eq!(create(&mut net, a, "big", 10_001), "too_large");
    assert_eq!(create(&mut net, a, "one", 10_000), "null 10000");
    assert_eq!(create(&mut net, a, "two", 10_000), "quota");
    assert_eq!(create(&mut net, b, "two", 8192), "null 8192");
    assert_eq!(create(&mut net, b, "three", 1), "quota");
    net.say(a, r#"{"action":"memory_create","id":"m","block_id":"three","pool":"q","size":1,"attach":false,"consistency":"raw"}"#);
    assert_eq!(gist(&mut net, a, &["slots"]), "quota");
    let all = r#"{"action":"memory_attach","id":"m","block_id":"one","pool":"p"}"#;
    net.say(b, all);
    assert_eq!(gist(&mut net, b, &["mode"]), "read");
    net.say(
        b,
        r#"{"action":"memory_attach","id":"m","block_id":"two","pool":"p"}"#,
    );
    assert_eq!(gist(&mut net, b, &[]), "quota");
    net.say(
        b,
        r#"{"action":"memory_detach","id":"m","block_id":"one","pool":"p"}"#,
    );
    net.say(
        b,
        r#"{"action":"memory_attach","id":"m","block_id":"two","pool":"p"}"#,
    );
    net.say(
        b,
        r#"{"action":"memory_subscribe","id":"m","block_id":"one","pool":"p"}"#,
    );
    net.sees(b);
    net.say(
        b,
        r#"{"action":"memory_subscribe","id":"m","block_id":"two","pool":"p"}"#,
    );
    assert_eq!(gist(&mut net, b, &[]), "quota");
}

#[test]
fn an_untrusted_user_leaves_room_for_blocks_under_any_name() {
    let mut net = Net::with(|limits| {
        limits.blocks_max = 20;
        limits.memory_bytes_max = 200_000;
    });
    let create = |net: &mut Net, peer, name: &str, size: u64| {
        net.say(peer, &format!(r#"{{"action":"memory_create","id":"m","block_id":"{name}","size":{size},"attach":false}}"#));
        gist(net, peer, &["size"])
    };
    // By bytes: a block of 16 KiB uses 36 KiB with its two slots and its header.
    let mut made = Vec::new();
    for n in 0..6 {
        let stranger = net.stranger(&format!("stranger{n}"), READER);
        made.push(create(&mut net, stranger, &format!("b{n}"), 16_384));
    }
    assert_eq!(made, ["16384", "16384", "quota", "quota", "quota", "quota"]);
    // By number.
    let stranger = net.stranger("another", READER);
    let small = |net: &mut Net, peer, name: &str| {
        let count = (0..30).filter(|n| create(net, peer, &format!("{name}{n}"), 0) == "0");
        count.count()
    };
    assert!(small(&mut net, stranger, "s") < 10);
    let own = net.app("own", READER);
    assert_eq!(create(&mut net, own, "mine", 16_384), "16384");
    assert!(small(&mut net, own, "o") > 8);
    net.world.check_ledger();
}

#[test]
fn waits_are_bounded_by_connection_and_end_by_their_ids() {
    let mut net = Net::with(|limits| limits.waits_per_connection_max = 6);
    let (holder, other) = (net.app("holder", READER), net.app("other", READER));
    for block in ["b", "c"] {
        for action in ["memory_create", "memory_lock"] {
            let more = if action == "memory_create" {
                r#","size":1"#
            } else {
                ""
            };
            net.say(
                holder,
                &format!(r#"{{"action":"{action}","id":"m","block_id":"{block}"{more}}}"#),
            );
        }
    }
    let outcomes = |net: &mut Net, peer| -> Vec<String> {
        let replies = net.messages(peer).into_iter();
        let outcome = |m: &latzero_sim::Message| {
            let how = m.json["error"]["code"].as_str().unwrap_or("ok");
            format!("{} {how}", m.json["in_reply_to"].as_str().unwrap_or("?"))
        };
        replies.map(|m| outcome(&m)).collect()
    };
    net.sees(other);
    // Two with one id, and one more than the limit.
    for (id, block) in [
        ("1", "b"),
        ("2", "b"),
        ("2", "c"),
        ("3", "c"),
        ("4", "b"),
        ("5", "b"),
        ("6", "b"),
    ] {
        net.say(
            other,
            &format!(r#"{{"action":"memory_lock","id":"{id}","block_id":"{block}","wait":1000}}"#),
        );
    }
    assert_eq!(outcomes(&mut net, other), ["6 overloaded"]);
    for id in ["2", "2", "no such", "4"] {
        net.say(other, &format!(r#"{{"action":"cancel","id":"{id}"}}"#));
    }
    assert_eq!(
        outcomes(&mut net, other),
        ["2 cancelled", "2 cancelled", "4 cancelled"]
    );
    net.world.check_ledger();
    // The remaining waits time out or are granted.
    net.advance(1000);
    assert_eq!(
        outcomes(&mut net, other),
        ["1 locked", "5 locked", "3 locked"]
    );
    net.say(
        other,
        r#"{"action":"memory_lock","id":"7","block_id":"b","wait":1000}"#,
    );
    net.hang_up(holder);
    assert_eq!(
        outcomes(&mut net, other).last().map(String::as_str),
        Some("7 ok")
    );
    net.world.check_ledger();
}

#[test]
fn descriptors_that_are_not_read_are_bounded() {
    let limits = Limits {
        descriptors_unread_max: 3,
        ..Limits::default()
    };
    let bounds = Bounds {
        socket_bytes: 400,
        ..Bounds::default()
    };
    let mut net = Net::bounded(limits, bounds);
    let reader = net.app("reader", WRITER);
    net.ask(
        reader,
        r#"{"action":"memory_create","id":"m","block_id":"b","size":1}"#,
    );
    let attach = r#"{"action":"memory_attach","id":"m","block_id":"b","mode":"read"}"#;
    for _ in 0..10 {
        net.say(reader, attach);
    }
    let messages = net.messages(reader);
    let code = |m: &latzero_sim::Message| m.json["error"]["code"] == "overloaded";
    let refused = messages.iter().filter(|m| code(m)).count();
    assert!((5..=7).contains(&refused), "{refused} of 10 were refused");
    // Once they are read, there is room again.
    assert_eq!(ask(&mut net, reader, "attach", "", &["access"]), "mapped");
}

#[test]
fn a_pool_stays_with_its_blocks_and_is_removed_with_them() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    ask(&mut net, a, "write", r#""data":"AQ==""#, &[]);
    net.hang_up(a);
    net.hang_up(b);
    let c = net.app("c", READER);
    assert_eq!(ask(&mut net, c, "read", r#""length":1"#, &["data"]), "AQ==");
    assert_eq!(ask(&mut net, c, "remove", "", &[]), "");
    net.hang_up(c);
    assert!(!net.world.pool_names().contains(&"p".to_owned()));

    let d = net.app("d", r#""pools":[]"#);
    net.ask(d, r#"{"action":"pool_create","id":"c","pool":"made"}"#);
    net.ask(d, r#"{"action":"pool_join","id":"c","pool":"made"}"#);
    assert_eq!(
        ask(
            &mut net,
            d,
            "create",
            r#""size":8,"pool":"made""#,
            &["size"]
        ),
        "8"
    );
    net.ask(
        d,
        r#"{"action":"pool_remove","id":"c","pool":"made","force":true}"#,
    );
    assert!(net.world.storages().is_empty());
    assert_eq!(
        ask(&mut net, d, "create", r#""size":8,"pool":"system""#, &[]),
        "not_member"
    );
}

#[test]
fn a_block_with_lifetime_attached_ends_with_its_last_attachment() {
    let (mut net, a, b) = two();
    ask(
        &mut net,
        a,
        "create",
        r#""size":8,"lifetime":"attached""#,
        &[],
    );
    ask(&mut net, b, "attach", "", &[]);
    net.hang_up(a);
    assert_eq!(ask(&mut net, b, "read", r#""length":0"#, &["version"]), "0");
    assert_eq!(ask(&mut net, b, "detach", "", &[]), "");
    assert!(net.world.storages().is_empty());
    let refused = r#""size":8,"lifetime":"attached","attach":false"#;
    assert_eq!(ask(&mut net, b, "create", refused, &[]), "bad_message");
}

#[test]
fn a_call_lends_its_blocks_until_it_ends() {
    let (mut net, handler, caller) = two();
    let create = r#""size":8,"permissions":{"read":["reader"],"write":["reader"]}"#;
    assert_eq!(
        ask(&mut net, caller, "create", create, &["owner"]),
        "reader"
    );
    assert_eq!(ask(&mut net, handler, "read", "", &[]), "forbidden");
    let call = |net: &mut Net, id: &str, blocks: &str| {
        net.say(
            caller,
            &format!(r#"{{"action":"trigger","process":"t","id":"{id}","blocks":{blocks}}}"#),
        );
    };
    call(&mut net, "1", r#"["b"]"#);
    let message = net.messages(handler).remove(0).json;
    assert_eq!(message["descriptors"], 1);
    let block = &message["blocks"][0];
    assert_eq!(
        (&block["block_id"], &block["mode"], &block["access"]),
        (&"b".into(), &"read".into(), &"mapped".into())
    );
    assert_eq!(
        ask(&mut net, handler, "read", r#""length":1"#, &["version"]),
        "0"
    );
    assert_eq!(
        ask(&mut net, handler, "write", r#""data":"AA==""#, &[]),
        "forbidden"
    );
    call(&mut net, "2", r#"[{"block_id":"b","mode":"write"}]"#);
    assert_eq!(
        ask(&mut net, handler, "write", r#""data":"AA==""#, &["version"]),
        "1"
    );
    let ids: Vec<String> = net
        .world
        .messages(handler)
        .into_iter()
        .filter_map(|m| m.json["id"].as_str().map(Into::into))
        .collect();
    assert!(ids.is_empty());
    // However a call ends, the access that it lent ends too.
    net.say(
        handler,
        &format!(
            r#"{{"action":"response","in_reply_to":"{}","status":"ok"}}"#,
            message["id"].as_str().unwrap()
        ),
    );
    net.say(caller, r#"{"action":"cancel","id":"2"}"#);
    assert_eq!(ask(&mut net, handler, "read", "", &[]), "forbidden");
    assert_eq!(
        ask(&mut net, caller, "info", "", &["attachments"]),
        r#"[{"app_id":"reader","calls":0,"instance":"#.to_owned()
            + &net_instance(&mut net, caller)
            + r#","mode":"write"}]"#
    );
    call(&mut net, "3", r#"["none"]"#);
    assert!(net.sees(caller).contains("3 failed: no_block ran=no"));
    net.say(
        handler,
        r#"{"action":"trigger","process":"t","id":"4","blocks":["b"]}"#,
    );
    assert!(net.sees(handler).contains("4 failed: forbidden ran=no"));
    // The access also ends if the handler disconnects.
    call(&mut net, "5", r#"["b"]"#);
    net.hang_up(handler);
    assert!(net.sees(caller).contains("5 failed: handler_gone"));
}

/// Calls the handler `t` with block `b`, which it may use only through the call; returns the
/// handler's id of the call.
fn lend(net: &mut Net, caller: Peer, handler: Peer, mode: &str) -> String {
    net.sees(handler);
    net.say(
        caller,
        &format!(
            r#"{{"action":"trigger","process":"t","id":"{mode}","blocks":[{{"block_id":"b","mode":"{mode}"}}]}}"#
        ),
    );
    let call = net.messages(handler).remove(0).json;
    call["id"].as_str().unwrap().to_owned()
}

fn give_back(net: &mut Net, handler: Peer, call: &str) {
    net.say(
        handler,
        &format!(r#"{{"action":"response","in_reply_to":"{call}","status":"ok"}}"#),
    );
}

const OWN_ONLY: &str = r#""size":8,"permissions":{"read":["reader"],"write":["reader"]}"#;

#[test]
fn access_lent_by_a_call_ends_with_it() {
    let (mut net, handler, caller) = two();
    ask(&mut net, caller, "create", OWN_ONLY, &[]);
    let call = lend(&mut net, caller, handler, "write");
    // During the call it may read again, lock, and subscribe, but neither remove the block nor pass
    // it on.
    assert_eq!(
        ask(
            &mut net,
            handler,
            "attach",
            r#""mode":"write""#,
            &["access"]
        ),
        "mapped"
    );
    assert_eq!(lock(&mut net, handler, ""), "1");
    assert_eq!(ask(&mut net, handler, "subscribe", "", &["version"]), "0");
    assert_eq!(ask(&mut net, handler, "remove", "", &[]), "forbidden");
    assert_eq!(
        ask(&mut net, handler, "resize", r#""size":9"#, &[]),
        "forbidden"
    );
    net.say(
        handler,
        r#"{"action":"trigger","process":"t","id":"on","blocks":["b"]}"#,
    );
    assert!(net.sees(handler).contains("on failed: forbidden"));
    give_back(&mut net, handler, &call);
    let seen = net.sees(handler);
    assert!(seen.contains("lock_lost p b"), "{seen}");
    for action in ["read", "attach", "subscribe", "lock", "flush"] {
        assert_eq!(
            ask(&mut net, handler, action, "", &[]),
            "forbidden",
            "{action}"
        );
    }
    assert_eq!(
        ask(&mut net, caller, "info", "", &["lock", "subscribers"]),
        "null 0"
    );
    // It mapped the block and held its lock when the call ended, so it writes into an old
    // generation.
    assert_eq!(ask(&mut net, caller, "info", "", &["generation"]), "2");
    assert_eq!(lock(&mut net, caller, ""), "3");
}

#[test]
fn each_of_two_calls_that_lend_a_block_revokes_only_its_own_access() {
    let (mut net, handler, caller) = two();
    ask(&mut net, caller, "create", OWN_ONLY, &[]);
    let reading = lend(&mut net, caller, handler, "read");
    let writing = lend(&mut net, caller, handler, "write");
    assert_eq!(lock(&mut net, handler, r#""mode":"shared""#), "1");
    assert_eq!(lock(&mut net, caller, r#""wait":1000"#), "(waits)");
    assert_eq!(lock(&mut net, handler, r#""wait":1000"#), "(waits)");
    give_back(&mut net, handler, &writing);
    // Its wait for the write lock ends; its read lock stays.
    assert_eq!(gist(&mut net, handler, &[]), "cancelled");
    assert_eq!(
        ask(&mut net, handler, "write", r#""data":"AA==""#, &[]),
        "forbidden"
    );
    assert_eq!(
        ask(&mut net, handler, "read", r#""length":1"#, &["version"]),
        "0"
    );
    assert_eq!(gist(&mut net, caller, &[]), "(waits)");
    give_back(&mut net, handler, &reading);
    assert_eq!(gist(&mut net, caller, &["fence"]), "3");
}

#[test]
fn holders_of_a_shared_lock_are_bounded() {
    let mut net = Net::with(|limits| limits.block_waiters_max = 3);
    let writer = net.app("writer", WRITER);
    ask(&mut net, writer, "create", r#""size":8"#, &[]);
    for fence in 1..=3 {
        let taken = lock(&mut net, writer, r#""mode":"shared""#);
        assert_eq!(taken, fence.to_string());
    }
    assert_eq!(lock(&mut net, writer, r#""mode":"shared""#), "overloaded");
    ask(&mut net, writer, "unlock", r#""lock":"2""#, &[]);
    assert_eq!(lock(&mut net, writer, r#""mode":"shared""#), "5");
}

#[test]
fn leaving_a_pool_ends_its_waits_with_a_notification() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(lock(&mut net, a, ""), "1");
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    net.say(b, r#"{"action":"pool_leave","id":"l","pool":"p"}"#);
    assert_eq!(gist(&mut net, b, &[]), "cancelled");
    net.world.hold_jobs(true);
    let maker = net.app("maker", READER);
    net.say(
        maker,
        r#"{"action":"memory_create","id":"m","block_id":"c","size":8}"#,
    );
    assert_eq!(gist(&mut net, maker, &[]), "(waits)");
    net.say(maker, r#"{"action":"pool_leave","id":"l","pool":"p"}"#);
    assert_eq!(gist(&mut net, maker, &[]), "cancelled");
    net.world.hold_jobs(false);
}

#[test]
fn nobody_writes_a_block_while_readers_hold_its_lock() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(lock(&mut net, b, r#""mode":"shared""#), "1");
    assert_eq!(ask(&mut net, a, "write", r#""data":"AA==""#, &[]), "locked");
    ask(&mut net, b, "unlock", r#""lock":"1""#, &[]);
    assert_eq!(
        ask(&mut net, a, "write", r#""data":"AA==""#, &["version"]),
        "1"
    );
}

#[test]
fn a_write_whose_lock_expires_meanwhile_is_not_lost() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":1"#, &[]);
    assert_eq!(lock(&mut net, a, r#""lease":100"#), "1");
    net.world.beside_next_write(|world| {
        world.advance(100);
    });
    assert_eq!(
        ask(
            &mut net,
            a,
            "write",
            r#""data":"Bw==","lock":"1""#,
            &["version"]
        ),
        "1"
    );
    assert_eq!(ask(&mut net, b, "info", "", &["generation"]), "2");
    net.say(b, r#"{"action":"memory_read","id":"r","block_id":"b"}"#);
    assert_eq!(net.messages(b).remove(0).json["response"]["data"], "Bw==");
}

#[test]
fn changes_never_go_backwards() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    ask(&mut net, b, "subscribe", "", &[]);
    for (told, seen) in [(5, true), (3, false), (5, false), (6, true)] {
        ask(&mut net, a, "notify", &format!(r#""version":{told}"#), &[]);
        assert_eq!(net.sees(b).contains("block_changed"), seen, "{told}");
    }
}

fn net_instance(net: &mut Net, peer: Peer) -> String {
    net.sees(peer);
    net.say(peer, r#"{"action":"memory_info","id":"i","block_id":"b"}"#);
    net.messages(peer).remove(0).json["response"]["attachments"][0]["instance"].to_string()
}

#[test]
fn removing_a_block_answers_its_waiters() {
    let (mut net, a, b) = two();
    ask(
        &mut net,
        a,
        "create",
        r#""size":8,"kind":"persistent""#,
        &[],
    );
    assert_eq!(lock(&mut net, a, ""), "1");
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    assert_eq!(ask(&mut net, a, "flush", "", &["version"]), "0");
    assert_eq!(ask(&mut net, a, "remove", "", &[]), "");
    assert_eq!(gist(&mut net, b, &[]), "no_block");
    assert!(net.world.storages().is_empty());
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(ask(&mut net, a, "flush", "", &[]), "bad_message");
}

#[test]
fn lists_come_in_pages() {
    let (mut net, a, _) = two();
    for name in ["c", "a", "b"] {
        net.say(
            a,
            &format!(r#"{{"action":"memory_create","block_id":"{name}","size":1}}"#),
        );
    }
    let mut page = |more: &str| {
        net.sees(a);
        net.say(a, &format!(r#"{{"action":"memory_list","id":"m"{more}}}"#));
        let reply = net.messages(a).remove(0).json["response"].take();
        let names: Vec<&str> = reply["blocks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|b| b["block_id"].as_str().unwrap())
            .collect();
        format!("{} {}", names.join(","), reply["more"])
    };
    assert_eq!(page(""), "a,b,c false");
    assert_eq!(page(r#","limit":2"#), "a,b true");
    assert_eq!(page(r#","limit":2,"after":"b""#), "c false");
}

/// Makes every write of `b` by `peer` that leaves a byte as it is wait, and sends one.
fn begin_slow_write(net: &mut Net, peer: Peer, more: &str) {
    net.world.limit_copies(0);
    net.world.hold_jobs(true);
    let written = ask(net, peer, "write", &format!(r#""data":"Bw=="{more}"#), &[]);
    assert_eq!(written, "(waits)");
}

#[test]
fn a_slow_write_delays_only_its_sender() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    begin_slow_write(&mut net, a, "");
    // Everything behind it waits for it.
    net.say(
        a,
        r#"{"action":"memory_read","id":"r","block_id":"b","length":1}"#,
    );
    net.say(a, r#"{"action":"ping","id":"p"}"#);
    assert_eq!(net.sees(a), "");
    // Others read the previous version, and their writes follow.
    assert_eq!(ask(&mut net, b, "read", "", &["version"]), "0");
    assert_eq!(lock(&mut net, b, ""), "locked");
    let whole = r#""data":"AQIDBAUGBwg=""#;
    assert_eq!(ask(&mut net, b, "write", whole, &[]), "(waits)");
    net.world.check_ledger();
    net.world.hold_jobs(false);
    let replies = net.messages(a);
    let of = |id: &str| {
        let at = replies.iter().position(|m| m.json["in_reply_to"] == id);
        (at.unwrap(), &replies[at.unwrap()].json["response"])
    };
    assert_eq!(of("m").1["version"], 1);
    assert!(of("m").0 < of("r").0 && of("r").0 < of("p").0);
    assert!(of("r").1["version"].as_u64() >= Some(1), "{replies:?}");
    assert_eq!(gist(&mut net, b, &["version"]), "2");
    net.say(b, r#"{"action":"memory_read","id":"r","block_id":"b"}"#);
    assert_eq!(
        net.messages(b).remove(0).json["response"]["data"],
        "AQIDBAUGBwg="
    );
    assert_eq!(lock(&mut net, b, ""), "1");
    net.world.check_ledger();
}

#[test]
fn a_slow_comparison_is_answered_like_any_other() {
    let (mut net, a, _) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    net.world.limit_copies(0);
    let swap = |net: &mut Net| {
        let more = r#""offset":0,"expected":"AA==","data":"Bw==""#;
        ask(net, a, "cas", more, &["swapped", "version", "current"])
    };
    assert_eq!(swap(&mut net), "true 1 null");
    assert_eq!(swap(&mut net), "false 1 Bw==");
    let outside = r#""offset":8,"data":"Bw==""#;
    assert_eq!(ask(&mut net, a, "write", outside, &[]), "out_of_range");
    assert_eq!(ask(&mut net, a, "info", "", &["version"]), "1");
}

#[test]
fn a_slow_write_ends_without_its_client_and_then_the_lock_is_free() {
    let (mut net, a, b) = two();
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    assert_eq!(lock(&mut net, a, ""), "1");
    begin_slow_write(&mut net, a, r#","lock":"1""#);
    assert_eq!(lock(&mut net, b, r#""wait":1000"#), "(waits)");
    net.hang_up(a);
    assert_eq!(net.sees(b), "");
    net.world.hold_jobs(false);
    net.world.check_ledger();
    assert_eq!(gist(&mut net, b, &["fence"]), "3");
    net.say(b, r#"{"action":"memory_read","id":"r","block_id":"b"}"#);
    assert_eq!(
        net.messages(b).remove(0).json["response"]["data"],
        "BwAAAAAAAAA="
    );
}

#[test]
fn a_block_may_go_while_it_is_written_slowly() {
    let (mut net, a, _) = two();
    let b = net.app("writer", WRITER);
    ask(&mut net, a, "create", r#""size":8"#, &[]);
    begin_slow_write(&mut net, a, "");
    let resized = ask(&mut net, b, "resize", r#""size":9"#, &[]);
    assert_eq!(resized, "locked", "not while it is written");
    net.world.hold_jobs(false);
    assert_eq!(gist(&mut net, a, &["version"]), "1");
    begin_slow_write(&mut net, a, "");
    assert_eq!(ask(&mut net, b, "remove", "", &[]), "");
    net.world.hold_jobs(false);
    assert_eq!(gist(&mut net, a, &["version"]), "2");
    assert_eq!(ask(&mut net, b, "info", "", &[]), "no_block");
    net.world.check_ledger();
    let pong = net.ask(a, r#"{"action":"ping","id":"p"}"#);
    assert!(pong.starts_with("p ok"), "{pong}");
}

/// The holder of six locks; a member that waits for them 3,000 times; and one that waits behind it
/// for the last of them.
fn many_waits(net: &mut Net, wait_ms: u32) -> (Peer, Peer, Peer) {
    let holder = net.app("holder", READER);
    for block in 0..6 {
        net.ask(
            holder,
            &format!(r#"{{"action":"memory_create","id":"1","block_id":"b{block}","size":64,"permissions":{{"write":["*"]}}}}"#),
        );
        net.ask(
            holder,
            &format!(r#"{{"action":"memory_lock","id":"2","block_id":"b{block}"}}"#),
        );
    }
    let other = net.app("other", READER);
    let many = net.app("many", READER);
    for block in 0..6 {
        for wait in 0..500 {
            let lock = format!(
                r#"{{"action":"memory_lock","id":"{block}.{wait}","block_id":"b{block}","wait":{wait_ms}}}"#
            );
            net.world
                .feed(many, &latzero_sim::encode_frame(&lock, None));
        }
    }
    net.say(
        other,
        r#"{"action":"memory_lock","id":"3","block_id":"b5","wait":90000}"#,
    );
    assert_eq!(net.world.held(Resource::Waits), 3001);
    (holder, many, other)
}

#[test]
fn a_connection_with_many_waits_ends_in_steps() {
    let mut net = Net::new();
    let (holder, many, other) = many_waits(&mut net, 90_000);
    net.hang_up(many);
    // After 1,500 and 3,000 waits, and the rest.
    assert_eq!(net.world.ending_steps(), 3);
    assert_eq!(net.world.held(Resource::Waits), 1);
    net.hang_up(holder);
    assert!(net.sees(other).contains("3 ok"));
}

/// A step is as good as the one before, however many pools the connection is in.
#[test]
fn a_connection_in_very_many_pools_ends() {
    let mut net = Net::with(|limits| (limits.pools_per_app_max, limits.pools_max) = (4000, 4000));
    let pools: Vec<_> = (0..3000).map(|n| format!(r#""p{n}""#)).collect();
    let many = net.app("many", &format!(r#""pools":[{}]"#, pools.join(",")));
    net.hang_up(many);
    assert!(net.world.ending_steps() <= 3);
}

#[test]
fn a_member_with_many_waits_leaves_in_steps() {
    let mut net = Net::new();
    let (holder, many, other) = many_waits(&mut net, 90_000);
    net.ask(other, r#"{"action":"watch","id":"w","pool":"p"}"#);
    // What comes behind the request is handled after it.
    let mut frames =
        latzero_sim::encode_frame(r#"{"action":"pool_leave","pool":"p","id":"leave"}"#, None);
    let next = r#"{"action":"memory_info","block_id":"b0","id":"next"}"#;
    frames.extend(latzero_sim::encode_frame(next, None));
    net.world.feed(many, &frames);
    // Between the first step and the last.
    assert_eq!(net.world.ending_steps(), 1);
    assert_eq!(net.world.held(Resource::Waits), 1);
    let seen = net.sees(many);
    let (_, behind) = seen.split_once("5.499 ").expect("each wait ends");
    assert_eq!(
        behind,
        "failed: cancelled ran=unknown; next failed: not_member ran=no; leave ok: {}"
    );
    let told = net.sees(other);
    assert_eq!(told.matches("app_offline").count(), 1, "{told}");
    net.hang_up(holder);
    assert!(net.sees(other).contains("3 ok"));
}

#[test]
fn a_displaced_instance_with_many_waits_ends_in_steps() {
    let mut net = Net::new();
    let (holder, many, _) = many_waits(&mut net, 90_000);
    let next = net.app("many", r#""pools":["p"],"takeover":true"#);
    assert!(net.sees(many).contains("displaced"));
    // The first step is a part of the handshake.
    assert_eq!(net.world.ending_steps(), 2);
    assert_eq!(net.world.held(Resource::Waits), 1);
    net.say(
        next,
        r#"{"action":"memory_lock","id":"l","block_id":"b0","wait":9}"#,
    );
    net.hang_up(holder);
    assert!(net.sees(next).contains("l ok"));
}

#[test]
fn waits_that_expire_at_once_end_in_steps() {
    let mut net = Net::new();
    let (_, many, _) = many_waits(&mut net, 500);
    assert_eq!(net.world.advance(499), 0);
    // Each block counts too.
    assert_eq!(net.world.advance(2), 3);
    assert_eq!(net.world.held(Resource::Waits), 1);
    assert!(net.sees(many).contains("5.499 "));
}

#[test]
fn a_pool_with_many_waits_is_removed_in_steps() {
    let mut net = Net::new();
    let (_, many, other) = many_waits(&mut net, 90_000);
    net.sees(many);
    let admin = net.world.connect(Transport::BuiltIn);
    net.say(admin, r#"{"action":"handshake","app_id":"latzero"}"#);
    net.say(
        admin,
        r#"{"action":"pool_remove","id":"1","pool":"p","force":true}"#,
    );
    assert!(net.sees(admin).contains("1 ok"));
    // The removal is a step of 1,024 waits, of which a block counts as some.
    let left = net.world.held(Resource::Waits);
    assert!((3001 - 1024..3001 - 1000).contains(&left), "{left}");
    net.world.check_ledger();
    // Nobody is a member any more, and a new pool of the name has nothing of the old one.
    net.say(many, r#"{"action":"cancel","id":"5.499"}"#);
    net.say(many, r#"{"action":"memory_info","id":"i","block_id":"b0"}"#);
    let next = net.app("next", READER);
    net.say(
        next,
        r#"{"action":"memory_create","id":"2","block_id":"b0","size":64}"#,
    );
    let seen = net.sees(next);
    assert!(seen.contains("2 ok"), "{seen}");
    assert!(seen.contains("\"generation\":2"), "{seen}");
    net.hang_up(other);
    assert_eq!(net.world.advance(2), 2);
    assert_eq!(net.world.held(Resource::Waits), 0);
    let seen = net.sees(many);
    assert!(seen.contains("i failed: "), "{seen}");
    assert_eq!(seen.matches("pool_removed").count(), 1, "{seen}");
    assert_eq!(seen.matches("failed: no_block").count(), 3000, "{seen}");
    net.world.check();
    net.world.check_ledger();
    assert_eq!(net.world.advance(100_000), 0);
}

#[test]
fn what_is_stored_about_a_block_and_its_lock_counts_as_memory() {
    let mut net = Net::new();
    let a = net.app("a", WRITER);
    let names: Vec<String> = (0..60)
        .map(|i| format!("\"reader-with-a-name-{i}\""))
        .collect();
    let more = format!(
        r#""size":8,"permissions":{{"read":[{0}],"write":[{0}]}}"#,
        names.join(",")
    );
    let held = |net: &Net| {
        (
            net.world.held(Resource::Registrations),
            net.world.held(Resource::Calls),
        )
    };
    let before = held(&net);
    ask(&mut net, a, "create", &more, &[]);
    lock(&mut net, a, r#""mode":"shared""#);
    lock(&mut net, a, r#""mode":"shared""#);
    let after = held(&net);
    assert!(after.0 - before.0 > 120 * 20, "{before:?} {after:?}");
    assert!(after.1 - before.1 > 2 * 40, "{before:?} {after:?}");
    net.world.check_ledger();
    ask(&mut net, a, "remove", "", &[]);
    net.world.run_jobs();
    assert_eq!(held(&net), before);
}

#[test]
fn a_pool_with_many_blocks_is_removed_in_steps() {
    let mut net = Net::new();
    let maker = net.app("maker", READER);
    let watcher = net.app("watcher", READER);
    net.ask(watcher, r#"{"action":"watch","id":"w","pool":"p"}"#);
    let create =
        |n| format!(r#"{{"action":"memory_create","id":"{n}","block_id":"b{n}","size":64}}"#);
    let frames = (0..1000).flat_map(|n| latzero_sim::encode_frame(&create(n), None));
    let frames: Vec<u8> = frames.collect();
    net.world.feed(maker, &frames);
    net.sees(maker);
    assert_eq!(net.world.held(Resource::BlockCount), 1000);
    let admin = net.world.connect(Transport::BuiltIn);
    net.say(admin, r#"{"action":"handshake","app_id":"latzero"}"#);
    let remove = r#"{"action":"pool_remove","id":"1","pool":"p","force":true}"#;
    net.say(admin, remove);
    assert!(net.sees(admin).contains("1 ok"));
    let left = net.world.held(Resource::BlockCount);
    assert!((1..1000).contains(&left), "{left}");
    // The rest has no name any more, and a new pool of the name has its own.
    net.say(
        maker,
        r#"{"action":"memory_info","id":"i","block_id":"b999"}"#,
    );
    let next = net.app("next", READER);
    net.say(next, &create(999));
    assert!(net.sees(next).contains("999 ok"));
    net.hang_up(maker);
    assert!((2..9).contains(&net.world.advance(2)));
    assert_eq!(net.world.held(Resource::BlockCount), 1);
    net.world.check_ledger();
    let seen = net.sees(watcher);
    assert_eq!(seen.matches("block_removed").count(), 1000, "{seen}");
}
