//! Idempotency keys: a repeat of a call gets the first one's answer, and the handler runs once.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use latzero_sim::Peer;
use net::Net;

const HANDLER: &str = r#""triggers":["t"]"#;

fn call(net: &mut Net, peer: Peer, id: &str, key: &str, more: &str) -> String {
    net.ask(
        peer,
        &format!(
            r#"{{"action":"trigger","process":"t","id":"{id}","headers":{{"idempotency-key":"{key}","h":"v"}}{more}}}"#
        ),
    )
}

fn two() -> (Net, Peer, Peer) {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let handler = net.app("handler", HANDLER);
    (net, caller, handler)
}

#[test]
fn a_repeat_gets_the_first_answer() {
    let (mut net, caller, handler) = two();
    assert_eq!(call(&mut net, caller, "1", "k", ""), "");
    // While the first call is in progress, repeats wait with it.
    assert_eq!(call(&mut net, caller, "2", "k", ""), "");
    let other = net.app("caller", "");
    assert_eq!(call(&mut net, other, "1", "k", ""), "");
    assert_eq!(net.sees(handler), "call t from caller: null");
    // A call with another key or of another app is a different call.
    assert_eq!(call(&mut net, caller, "3", "l", ""), "");
    let stranger = net.app("stranger", "");
    assert_eq!(call(&mut net, stranger, "1", "k", ""), "");
    let seen = net.sees(handler);
    assert_eq!(seen, "call t from caller: null; call t from stranger: null");
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let handler = net.app("handler", HANDLER);
    call(&mut net, caller, "1", "k", "");
    call(&mut net, caller, "2", "k", "");
    net.answer(handler, r#""status":"ok","response":7"#);
    assert_eq!(net.sees(caller), "2 ok: 7; 1 ok: 7");
    // Also after it has ended, for some time, and also if the handler returned an error.
    assert_eq!(call(&mut net, caller, "3", "k", ""), "3 ok: 7");
    net.advance(10 * 60 * 1000);
    assert_eq!(call(&mut net, caller, "4", "k", ""), "");
    assert_eq!(net.sees(handler), "call t from caller: null");
}

#[test]
fn a_caller_that_lost_its_connection_repeats_its_call() {
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "1", "k", "");
    net.messages(handler);
    call(&mut net, caller, "plain", "", "");
    net.sees(caller);
    net.hang_up(caller);
    // The handler is not asked to stop, because its answer is still needed.
    let seen = net.sees(handler);
    assert!(!seen.contains("cancel"), "{seen}");
    let caller = net.app("caller", "");
    assert_eq!(call(&mut net, caller, "1", "k", ""), "");
    assert_eq!(net.sees(handler), "");
    net.world.check();
}

#[test]
fn answers_reach_repeats_after_their_caller_left() {
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "1", "k", "");
    let id = net.last_call(handler);
    net.hang_up(caller);
    net.answer_to(handler, &id, r#""status":"ok","response":5"#);
    let caller = net.app("caller", "");
    assert_eq!(call(&mut net, caller, "9", "k", ""), "9 ok: 5");
    // The call times out although nobody waits for it; a repeat is then a new call.
    call(&mut net, caller, "1", "late", r#","ttl":100"#);
    net.hang_up(caller);
    net.advance(100);
    net.world.check();
    let caller = net.app("caller", "");
    net.sees(handler);
    assert_eq!(call(&mut net, caller, "1", "late", ""), "");
    assert_eq!(net.sees(handler), "call t from caller: null");
}

#[test]
fn a_call_without_an_answer_is_forgotten() {
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "1", "k", "");
    call(&mut net, caller, "2", "k", "");
    net.hang_up(handler);
    assert_eq!(
        net.sees(caller),
        "2 failed: handler_gone ran=unknown; 1 failed: handler_gone ran=unknown"
    );
    assert_eq!(
        call(&mut net, caller, "3", "k", ""),
        "3 failed: no_handler ran=no"
    );
    let handler = net.app("handler", HANDLER);
    assert_eq!(call(&mut net, caller, "4", "k", ""), "");
    assert_eq!(net.sees(handler), "call t from caller: null");
    // With redelivery, the next handler's answer goes to all of them.
    let second = net.app("handler", HANDLER);
    call(&mut net, caller, "5", "r", r#","redeliver":true"#);
    let (has, other) = match net.sees(handler).is_empty() {
        true => (second, handler),
        false => (handler, second),
    };
    call(&mut net, caller, "6", "r", r#","redeliver":true"#);
    net.hang_up(has);
    net.sees(caller);
    let id = net.last_call(other);
    net.answer_to(other, &id, r#""status":"ok","response":1"#);
    assert_eq!(net.sees(caller), "6 ok: 1; 5 ok: 1");
}

#[test]
fn parked_calls_are_repeated_across_restarts() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    assert_eq!(
        call(&mut net, caller, "1", "k", r#","park":true"#),
        "1 parked: null"
    );
    net.world.restart(1);
    let caller = net.app("caller", "");
    assert_eq!(
        call(&mut net, caller, "2", "k", r#","park":true"#),
        "2 parked: null"
    );
    let handler = net.connect();
    net.say(
        handler,
        r#"{"action":"handshake","app_id":"handler","triggers":["t"]}"#,
    );
    let calls = net.messages(handler);
    assert_eq!(
        calls
            .iter()
            .filter(|m| m.json["action"] == "trigger")
            .count(),
        1
    );
    let id = calls.last().unwrap().json["id"]
        .as_str()
        .unwrap()
        .to_owned();
    net.answer_to(handler, &id, r#""status":"ok","response":3"#);
    assert_eq!(net.sees(caller), "1 ok: 3; 2 ok: 3");
    assert_eq!(call(&mut net, caller, "3", "k", ""), "3 ok: 3");
}

#[test]
fn a_repeat_replaces_a_call_that_never_ran() {
    let parked = r#","park":true"#;
    for end in ["cancel", "expire"] {
        let mut net = Net::new();
        let caller = net.app("caller", "");
        call(&mut net, caller, "1", "k", r#","park":true,"ttl":1000"#);
        for id in ["2", "3"] {
            let said = call(&mut net, caller, id, "k", parked);
            assert_eq!(said, format!("{id} parked: null"));
        }
        if end == "cancel" {
            let said = net.ask(caller, r#"{"action":"cancel","id":"1"}"#);
            assert_eq!(said, "1 failed: cancelled ran=no");
        } else {
            net.advance(1001);
            assert_eq!(net.sees(caller), "1 failed: timeout ran=no");
        }
        net.world.check();
        let handler = net.connect();
        net.say(
            handler,
            r#"{"action":"handshake","app_id":"handler","triggers":["t"]}"#,
        );
        let mut calls = net.messages(handler);
        calls.retain(|message| message.json["action"] == "trigger");
        let [call] = &calls[..] else {
            panic!("after {end} the handler got {} calls", calls.len());
        };
        let id = call.json["id"].as_str().unwrap();
        net.answer_to(handler, id, r#""status":"ok","response":7"#);
        assert_eq!(net.sees(caller), "2 ok: 7; 3 ok: 7", "after {end}");
        net.world.check();
    }
    // A call that a handler had may have run, so the server does not start it again.
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "1", "k", r#","park":"always""#);
    net.messages(handler);
    call(&mut net, caller, "2", "k", parked);
    net.ask(caller, r#"{"action":"cancel","id":"1"}"#);
    let seen = net.sees(caller);
    assert!(!seen.contains("2 ok"), "{seen}");
    assert!(!net.sees(handler).contains("call t"));
    net.world.check();
}

#[test]
fn keys_are_checked_and_bounded() {
    let mut net = Net::with(|limits| {
        limits.repeats_max = 2;
        limits.repeats_bytes_max = 2000;
    });
    let caller = net.app("caller", "");
    let handler = net.app("handler", HANDLER);
    let long = "x".repeat(latzero_protocol::limits::KEY_BYTES_MAX + 1);
    for key in ["", &long] {
        assert_eq!(
            call(&mut net, caller, "1", key, ""),
            "1 failed: bad_message ran=no"
        );
    }
    for n in 1..=2 {
        call(&mut net, caller, &n.to_string(), &n.to_string(), "");
    }
    assert_eq!(
        call(&mut net, caller, "3", "3", ""),
        "3 failed: overloaded ran=no"
    );
    // When an answer is forgotten, there is room again.
    net.answer(handler, r#""status":"ok","response":1"#);
    net.sees(caller);
    assert_eq!(call(&mut net, caller, "3", "3", ""), "");
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "first", "k", "");
    for n in 0..16 {
        assert_eq!(call(&mut net, caller, &n.to_string(), "k", ""), "");
    }
    assert_eq!(
        call(&mut net, caller, "more", "k", ""),
        "more failed: overloaded ran=no"
    );
    net.answer(handler, r#""status":"ok""#);
    assert_eq!(net.messages(caller).len(), 17);
}

#[test]
fn a_repeat_ends_alone_and_the_first_call_continues() {
    let (mut net, caller, handler) = two();
    call(&mut net, caller, "1", "k", "");
    assert_eq!(call(&mut net, caller, "2", "k", r#","ttl":100"#), "");
    assert_eq!(call(&mut net, caller, "3", "k", r#","ttl":9000"#), "");
    // Only one call at a time has an id: a repeat, its first call, or another call.
    for id in ["1", "2"] {
        let seen = call(&mut net, caller, id, "k", "");
        assert_eq!(seen, format!("{id} failed: bad_message ran=no"));
    }
    assert_eq!(net.call(caller, "3", ""), "3 failed: bad_message ran=no");
    net.advance(100);
    assert_eq!(net.sees(caller), "2 failed: timeout ran=unknown");
    let seen = net.ask(caller, r#"{"action":"cancel","id":"3"}"#);
    assert_eq!(seen, "3 failed: cancelled ran=unknown");
    // The waits of a caller that leaves its pool end, and the ids are free again.
    let other = net.app("caller", "");
    assert_eq!(call(&mut net, other, "4", "k", ""), "");
    net.ask(
        other,
        r#"{"action":"pool_leave","id":"l","pool":"default"}"#,
    );
    assert_eq!(call(&mut net, caller, "2", "k", ""), "");
    net.world.check();
    net.answer(handler, r#""status":"ok","response":7"#);
    assert_eq!(net.sees(caller), "2 ok: 7; 1 ok: 7");
    assert_eq!(net.sees(other), "");
    net.advance(9000);
    assert_eq!(net.sees(caller), "");
}

#[test]
fn keys_in_use_count_as_memory_of_their_user() {
    let mut net = Net::with(|limits| limits.memory_max = 4 << 20);
    net.app("handler", HANDLER);
    let caller = net.stranger("caller", "");
    let key = "k".repeat(1000);
    let refused = (0..2000).find_map(|n| {
        let seen = call(&mut net, caller, &n.to_string(), &format!("{key}{n}"), "");
        (!seen.is_empty()).then_some((n, seen))
    });
    let (begun, refused) = refused.unwrap();
    assert!((50..1000).contains(&begun), "{begun}");
    assert!(
        refused.contains("overloaded") || refused.contains("quota"),
        "{refused}"
    );
    net.world.check_ledger();
}
