//! In an encrypted pool each act needs the roles that its member has proved at that time: also for
//! what was lent, parked, remembered or held before.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::os::fd::{AsFd, OwnedFd};

use latzero_crypto::keys::{KeySet, Kind};
use latzero_crypto::text;
use latzero_tests::vault::{JOIN, READ, WRITE, code, key_set, keys, member, prove, vault};
use latzero_tests::{Server, Via, Wire};
use serde_json::{Value, json};

const SEALED: &str = "TFpFVgABAA";

/// A raw connection that receives descriptors, before its proof.
fn unproved(server: &Server, app: &str) -> Wire {
    let features = ["attachments", "fd_passing"];
    let handshake = json!({"app_id": app, "encrypted_pools": ["vault"], "features": features});
    server.app(Via::Unix, handshake)
}

/// A raw connection that proved these keys.
fn proved(server: &Server, set: &KeySet, app: &str, kinds: &[Kind]) -> Wire {
    let mut wire = unproved(server, app);
    let reply = prove(&mut wire, server, set, app, kinds);
    assert_eq!(code(&reply), "ok", "{reply}");
    wire
}

fn ask(wire: &mut Wire, request: Value) -> String {
    code(&wire.request(request)).to_owned()
}

/// A request about block `b`.
fn about(action: &str, more: &Value) -> Value {
    let mut request =
        json!({"action": format!("memory_{action}"), "pool": "vault", "block_id": "b"});
    for (key, value) in more.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}

/// A request that creates block `b`, for all members.
fn create(more: &Value) -> Value {
    let mut request = about(
        "create",
        &json!({"size": 8, "block_uid": text::encode(&[7; 16])}),
    );
    for (key, value) in more.as_object().unwrap() {
        request[key] = value.clone();
    }
    request
}

/// A call of `t`, which lends block `b`.
fn lending(id: &str, mode: &str) -> Value {
    json!({"action": "trigger", "process": "t", "id": id, "pool": "vault", "data": SEALED,
        "blocks": [{"block_id": "b", "mode": mode}]})
}

fn register(wire: &mut Wire, trigger: &str) -> String {
    ask(
        wire,
        json!({"action": "trigger_register", "triggers": [trigger]}),
    )
}

/// Everything that arrives before the answer to a ping.
fn arrived(wire: &mut Wire) -> Vec<Value> {
    wire.send(&json!({"action": "ping", "id": "last"}));
    let mut messages = Vec::new();
    loop {
        let message = wire.receive();
        if message["in_reply_to"] == "last" {
            return messages;
        }
        messages.push(message);
    }
}

/// The next message of which `field` is `value`.
fn next(wire: &mut Wire, field: &str, value: &str) -> Value {
    loop {
        let message = wire.receive();
        if message[field] == value {
            return message;
        }
    }
}

#[test]
fn a_call_lends_a_block_only_as_far_as_its_caller_s_role_reaches() {
    let (server, set) = vault();
    let mut worker = proved(&server, &set, "worker", WRITE);
    let mut writer = proved(&server, &set, "writer", WRITE);
    let mut reader = proved(&server, &set, "reader", READ);
    let mut joined = proved(&server, &set, "joined", JOIN);
    assert_eq!(ask(&mut writer, create(&json!({}))), "ok");
    assert_eq!(register(&mut worker, "t"), "ok");
    for mode in ["read", "write"] {
        assert_eq!(ask(&mut joined, lending("c", mode)), "forbidden", "{mode}");
    }
    // The block's permissions include everybody; the role does not.
    assert_eq!(ask(&mut reader, lending("c", "write")), "forbidden");
    assert_eq!(arrived(&mut worker), [Value::Null; 0]);
    for (wire, mode) in [(&mut reader, "read"), (&mut writer, "write")] {
        wire.send(&lending("c", mode));
        let called = next(&mut worker, "action", "trigger");
        assert_eq!(called["blocks"][0]["mode"], mode, "{called}");
        let answer = json!({"action": "response", "in_reply_to": called["id"], "status": "ok",
            "response": SEALED});
        worker.send(&answer);
        assert_eq!(next(wire, "in_reply_to", "c")["status"], "ok");
    }
    // A member that serves with fewer roles than before has nothing of what a call lends it.
    reader.send(&lending("d", "read"));
    let called = next(&mut worker, "action", "trigger");
    for (kinds, of_reading) in [(READ, "ok"), (JOIN, "forbidden")] {
        let reply = prove(&mut worker, &server, &set, "worker", kinds);
        assert_eq!(code(&reply), "ok", "{reply}");
        let attach = |mode: &str| about("attach", &json!({"mode": mode}));
        assert_eq!(ask(&mut worker, attach("write")), "forbidden");
        assert_eq!(ask(&mut worker, attach("read")), of_reading);
        let read = about("read", &json!({"offset": 0, "length": 0}));
        assert_eq!(ask(&mut worker, read), of_reading);
        let answer = json!({"action": "response", "in_reply_to": called["id"], "id": "a",
            "status": "ok", "response": SEALED});
        worker.send(&answer);
        assert_eq!(arrived(&mut reader), [Value::Null; 0], "it may not answer");
        // Nor does the next call reach it.
        assert_eq!(ask(&mut reader, lending("e", "read")), "no_handler");
    }
}

#[test]
fn what_was_parked_is_delivered_to_the_roles_that_may_have_it() {
    let (server, set) = vault();
    let mut reader = proved(&server, &set, "reader", READ);
    let mut watcher = proved(&server, &set, "watcher", WRITE);
    let call = json!({"action": "trigger", "process": "later", "id": "p", "pool": "vault",
        "data": SEALED, "park": true, "ttl": 60_000});
    reader.send(&call);
    assert_eq!(next(&mut reader, "in_reply_to", "p")["status"], "parked");
    // A handler gets the call once it has proved that it may serve.
    let mut worker = unproved(&server, "worker");
    assert_eq!(register(&mut worker, "later"), "ok");
    assert_eq!(arrived(&mut worker), [Value::Null; 0]);
    for kinds in [JOIN, READ] {
        let reply = prove(&mut worker, &server, &set, "worker", kinds);
        assert_eq!(code(&reply), "ok", "{reply}");
        assert_eq!(arrived(&mut worker), [Value::Null; 0]);
    }
    prove(&mut worker, &server, &set, "worker", WRITE);
    let called = next(&mut worker, "action", "trigger");
    // Its caller goes, and the answer waits for a member of its app that may have it.
    let watch = json!({"action": "watch", "pool": "vault"});
    assert_eq!(ask(&mut watcher, watch), "ok");
    drop(reader);
    next(&mut watcher, "event", "app_offline");
    worker.send(
        &json!({"action": "response", "in_reply_to": called["id"], "status": "ok",
        "response": SEALED}),
    );
    assert_eq!(arrived(&mut worker), [Value::Null; 0]);
    let mut back = unproved(&server, "reader");
    let is_answer = |message: &Value| message["in_reply_to"] == "p";
    assert_eq!(arrived(&mut back), [Value::Null; 0], "before the proof");
    prove(&mut back, &server, &set, "reader", JOIN);
    let early = arrived(&mut back);
    assert!(!early.iter().any(is_answer), "{early:?}");
    prove(&mut back, &server, &set, "reader", READ);
    let late = arrived(&mut back);
    assert!(late.iter().any(is_answer), "{late:?}");
}

#[test]
fn after_a_rotation_members_get_back_what_their_new_roles_allow() {
    let (server, set) = vault();
    let maker = member(&server, "maker", keys(&set, WRITE));
    let block = maker.block("b").create(100).send().unwrap();
    block.write_at(0, b"one").unwrap();
    let mut old = proved(&server, &set, "old", WRITE);
    assert_eq!(register(&mut old, "t"), "ok");
    let watch = json!({"action": "watch", "pool": "vault", "events": ["trigger_added"]});
    assert_eq!(ask(&mut old, watch), "ok");
    assert_eq!(ask(&mut old, about("subscribe", &json!({}))), "ok");
    let next_set = key_set(9);
    maker
        .rotate_pool("vault", &keys(&next_set, WRITE), false)
        .unwrap();
    let writer = member(&server, "writer", keys(&next_set, WRITE));
    let block = writer.block("b").attach_writable().unwrap();
    let mut seeing = proved(&server, &next_set, "seeing", READ);
    assert_eq!(ask(&mut seeing, about("subscribe", &json!({}))), "ok");
    // The server would notify `old` first, in the same turn. So once this reader has the event, a
    // missing one for `old` was never sent.
    let change = |seeing: &mut Wire| {
        block.write_at(0, &[5; 100]).unwrap();
        next(seeing, "event", "block_changed");
    };
    let events = |wire: &mut Wire| {
        let messages = arrived(wire);
        let names = messages.iter().map(|m| m["event"].as_str().unwrap_or("?"));
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    // It is a member no longer: nothing reaches it, and nobody reaches it.
    change(&mut seeing);
    assert_eq!(events(&mut old), ["pool_rotated"]);
    let call = json!({"action": "trigger", "process": "t", "pool": "vault", "data": SEALED,
        "id": "c", "ttl": 60_000});
    assert_eq!(ask(&mut seeing, call.clone()), "no_handler");
    // As a member that may only join, it watches again. It is no subscriber, and serves nothing.
    let reply = prove(&mut old, &server, &next_set, "old", JOIN)["response"].clone();
    assert_eq!(
        (&reply["rehydrated"], &reply["watching"]),
        (&json!(true), &json!(true)),
        "{reply}"
    );
    assert_eq!(reply["subscriptions"], json!([]), "{reply}");
    change(&mut seeing);
    let mut another = proved(&server, &next_set, "another", WRITE);
    assert_eq!(register(&mut another, "u"), "ok");
    assert_eq!(events(&mut old), ["trigger_added"]);
    assert_eq!(ask(&mut seeing, call.clone()), "no_handler");
    // As a reader it is a subscriber again, and as a writer it serves again.
    let reply = prove(&mut old, &server, &next_set, "old", READ)["response"].clone();
    assert_eq!(reply["subscriptions"], json!(["b"]), "{reply}");
    change(&mut seeing);
    assert!(events(&mut old).contains(&"block_changed".to_owned()));
    assert_eq!(ask(&mut seeing, call.clone()), "no_handler");
    prove(&mut old, &server, &next_set, "old", WRITE);
    seeing.send(&call);
    next(&mut old, "action", "trigger");
}

#[test]
fn creating_a_block_that_exists_needs_the_rights_to_attach_it() {
    let (server, set) = vault();
    let mut owner = proved(&server, &set, "owner", WRITE);
    let mut other = proved(&server, &set, "other", WRITE);
    let mut reader = proved(&server, &set, "reader", READ);
    let mut joined = proved(&server, &set, "joined", JOIN);
    let own = json!({"permissions": {"read": ["owner"], "write": ["owner"]}, "size": 1 << 26});
    let again = |mode: &str| create(&json!({"if_exists": "attach", "mode": mode}));
    // The request comes while the block is being created, or right after.
    owner.send(&create(&own));
    owner.send(&json!({"action": "ping", "id": "p"}));
    next(&mut owner, "in_reply_to", "p");
    for _ in 0..2 {
        for mode in ["read", "write"] {
            for wire in [&mut other, &mut reader, &mut joined] {
                assert_eq!(ask(wire, again(mode)), "forbidden", "{mode}");
                assert!(wire.take_descriptors().is_empty());
            }
        }
        // Now it certainly exists.
        assert_eq!(ask(&mut owner, again("write")), "ok");
    }
    assert!(!owner.take_descriptors().is_empty());
}

/// Offers a descriptor for block `b`.
fn offer(wire: &mut Wire, held: &OwnedFd) -> String {
    let request = about("reoffer", &json!({"id": "offer", "descriptors": 1}));
    wire.send_with_descriptors(&request, &[held.as_fd()]);
    code(&next(wire, "in_reply_to", "offer")).to_owned()
}

#[test]
fn memory_is_offered_again_by_those_who_may_read_it() {
    let (mut server, set) = vault();
    let attach = about("attach", &json!({"mode": "read"}));
    let mut owner = proved(&server, &set, "owner", WRITE);
    assert_eq!(ask(&mut owner, create(&json!({}))), "ok");
    let mut reader = proved(&server, &set, "reader", READ);
    assert_eq!(ask(&mut reader, attach.clone()), "ok");
    let before = reader.take_descriptors().remove(0);
    // A rotation gives the block new memory, which the members of before do not have.
    let maker = member(&server, "maker", keys(&set, WRITE));
    let next_set = key_set(9);
    maker
        .rotate_pool("vault", &keys(&next_set, WRITE), false)
        .unwrap();
    let mut reader = proved(&server, &next_set, "reader", READ);
    let attached = loop {
        // The move may still be under way.
        let reply = reader.request(attach.clone());
        assert_eq!(code(&reply), "ok", "{reply}");
        if reply["response"]["generation"] == 2 {
            break reader.take_descriptors().pop().unwrap();
        }
    };
    // Rows are stored in order: when this app is answered, the block's row is on disk too.
    drop(server.app(Via::Unix, json!({"app_id": "later"})));
    server.kill();
    server.restart();
    let mut stranger = unproved(&server, "reader");
    assert_eq!(offer(&mut stranger, &attached), "not_member");
    let refused = prove(&mut stranger, &server, &set, "reader", READ);
    assert_eq!(code(&refused), "unauthenticated");
    let mut joined = proved(&server, &next_set, "joined", JOIN);
    assert_eq!(offer(&mut joined, &attached), "forbidden");
    let mut reader = proved(&server, &next_set, "reader", READ);
    // Nor does what a removed member still holds take the block's place.
    assert_eq!(offer(&mut reader, &before), "forbidden");
    assert_eq!(offer(&mut reader, &attached), "ok");
    assert_eq!(ask(&mut reader, attach), "ok");
}
