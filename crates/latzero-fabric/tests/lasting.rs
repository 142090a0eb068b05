//! Calls that outlive a connection under combined failures: full outboxes, dead handlers, pools
//! that close.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use latzero_fabric::Limits;
use latzero_sim::{Bounds, Peer};
use net::Net;

const H: &str = r#""triggers":["t"]"#;

fn keyed(net: &mut Net, peer: Peer, id: &str, more: &str) -> String {
    net.ask(
        peer,
        &format!(
            r#"{{"action":"trigger","process":"t","id":"{id}","headers":{{"idempotency-key":"k"}}{more}}}"#
        ),
    )
}

#[test]
fn calls_for_an_absent_app_do_not_block_others() {
    let mut net = Net::new();
    let handler = net.app("handler", H);
    let caller = net.app("caller", "");
    for n in 0..600 {
        net.call(
            caller,
            &n.to_string(),
            r#""park":true,"destination":"away""#,
        );
    }
    net.call(caller, "x", r#""park":true"#);
    net.advance(1);
    assert_eq!(net.sees(handler), "call t from caller: null");
    // Once all calls have been examined, there is nothing to do until something changes.
    net.world.take_log();
    net.advance(100_000 - 60_000);
    let log = net.world.take_log();
    assert!(log.len() < 10_000, "{} events happened", log.len());
}

#[test]
fn a_call_is_delivered_at_once_behind_calls_for_an_absent_app() {
    let mut net = Net::new();
    let handler = net.app("handler", H);
    let caller = net.app("caller", "");
    for n in 0..600 {
        net.call(
            caller,
            &n.to_string(),
            r#""park":true,"destination":"away""#,
        );
    }
    net.call(caller, "x", r#""park":true"#);
    assert_eq!(net.sees(handler), "call t from caller: null");
}

#[test]
fn a_call_whose_handler_died_goes_to_a_handler_with_room() {
    let mut net = Net::new();
    let c1 = r#""triggers":[{"name":"t","concurrency":1}]"#;
    let a = net.app("a", c1);
    let b = net.app("b", c1);
    let caller = net.app("caller", "");
    net.call(caller, "1", r#""park":true,"redeliver":true"#);
    net.call(caller, "2", r#""park":true,"redeliver":true"#);
    assert_ne!(net.sees(a), "");
    let id = net.last_call(b);
    net.hang_up(a);
    net.answer_to(b, &id, r#""status":"ok","response":1"#);
    net.advance(1000);
    assert_eq!(
        net.sees(b),
        "call t from caller: null",
        "b is free and gets the call of a"
    );
}

#[test]
fn a_call_without_an_answer_does_not_answer_its_repeats() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    keyed(&mut net, caller, "1", r#","park":true,"ttl":100"#);
    net.advance(200);
    assert_eq!(net.sees(caller), "1 failed: timeout ran=no");
    let handler = net.app("handler", H);
    assert_eq!(keyed(&mut net, caller, "2", ""), "");
    assert_eq!(net.sees(handler), "call t from caller: null");
}

#[test]
fn repeats_end_with_their_pool() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    net.ask(caller, r#"{"action":"pool_create","id":"p","pool":"p"}"#);
    net.ask(caller, r#"{"action":"pool_join","id":"j","pool":"p"}"#);
    keyed(&mut net, caller, "1", r#","park":true,"pool":"p""#);
    keyed(&mut net, caller, "2", r#","park":true,"pool":"p""#);
    let seen = net.ask(
        caller,
        r#"{"action":"pool_remove","id":"r","pool":"p","force":true}"#,
    );
    net.advance(60000);
    let seen = seen + &net.sees(caller);
    assert!(seen.contains("2 failed"), "{seen}");
}

#[test]
fn repeats_of_a_caller_that_left_do_not_count() {
    let mut net = Net::new();
    let _handler = net.app("handler", H);
    for n in 0..18 {
        let caller = net.app("caller", "");
        assert_eq!(keyed(&mut net, caller, "1", ""), "", "at {n}");
        net.hang_up(caller);
    }
}

#[test]
fn a_parked_call_that_is_sent_again_is_answered_once() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    keyed(&mut net, caller, "1", r#","park":true"#);
    net.hang_up(caller);
    let caller = net.app("caller", "");
    keyed(&mut net, caller, "1", r#","park":true"#);
    let handler = net.connect();
    net.say(
        handler,
        r#"{"action":"handshake","app_id":"handler","triggers":["t"]}"#,
    );
    net.answer(handler, r#""status":"ok","response":1"#);
    assert_eq!(net.sees(caller), "1 ok: 1");
}

#[test]
fn an_app_is_stored_after_a_tool_used_its_name() {
    let mut net = Net::new();
    let _tool = net.app("a", r#""pools":["p"],"triggers":["t"],"transient":true"#);
    assert_eq!(net.world.rows().apps.len(), 0);
    let _app = net.app("a", r#""pools":["p"],"triggers":["t"]"#);
    assert_eq!(net.world.rows().apps.len(), 1, "the row is on disk");
}

#[test]
fn a_restored_app_does_not_serve_where_it_is_no_longer_allowed() {
    let mut net = Net::new();
    let a = net.app(
        "a",
        r#""pools":["default","p"],"triggers":[{"name":"t","pools":["p"]}]"#,
    );
    net.hang_up(a);
    let e = net.app("evil", "");
    net.ask(
        e,
        r#"{"action":"pool_create","id":"p","pool":"p","policy":{"serve":["evil"]}}"#,
    );
    let (_, seen) = net.hello("a", "");
    assert!(seen.starts_with("hello"), "{seen}");
}

#[test]
fn kept_answers_are_bounded() {
    let mut net = Net::with(|l| l.parked_bytes_max = 10_000);
    let caller = net.app("caller", "");
    for n in 0..10 {
        net.call(caller, &n.to_string(), r#""park":true"#);
    }
    net.hang_up(caller);
    let h = net.connect();
    net.say(h, r#"{"action":"handshake","app_id":"h","triggers":["t"]}"#);
    let ids: Vec<_> = net
        .messages(h)
        .iter()
        .filter(|m| m.json["action"] == "trigger")
        .map(|m| m.json["id"].as_str().unwrap().to_owned())
        .collect();
    for id in ids {
        net.answer_to(
            h,
            &id,
            &format!(r#""status":"ok","response":"{}""#, "x".repeat(500_000)),
        );
    }
    let bytes: usize = net
        .world
        .rows()
        .answers
        .values()
        .map(|r| r.frame.len())
        .sum();
    assert!(
        bytes < 20_000,
        "{bytes} bytes are kept, limits.parked_bytes_max is 10000"
    );
}

#[test]
fn parked_calls_are_delivered_again_to_a_handler_that_was_full() {
    let mut net = Net::bounded(
        Limits::default(),
        Bounds {
            outbox_bytes: 20_000,
            socket_bytes: 0,
            ..Bounds::default()
        },
    );
    let h = net.app("h", r#""triggers":["e"]"#);
    let caller = net.app("caller", "");
    net.call(caller, "1", r#""park":true"#);
    for _ in 0..400 {
        net.world.feed(
            caller,
            &latzero_sim::encode_frame(
                &format!(
                    r#"{{"action":"emit","process":"e","data":"{}"}}"#,
                    "x".repeat(100)
                ),
                None,
            ),
        );
    }
    net.say(
        h,
        r#"{"action":"trigger_register","id":"r","triggers":["t"]}"#,
    );
    // The handler now reads everything.
    let first = net.sees(h);
    assert!(!first.contains("call t"));
    net.advance(10_000);
    assert_eq!(net.sees(h), "call t from caller: null");
}

#[test]
fn a_repeat_that_can_not_be_answered_gets_an_error() {
    let mut net = Net::bounded(
        Limits::default(),
        Bounds {
            outbox_bytes: 20_000,
            socket_bytes: 0,
            ..Bounds::default()
        },
    );
    let h = net.app("h", r#""triggers":["t"]"#);
    let c1 = net.app("caller", r#""triggers":["e"]"#);
    let c2 = net.app("caller", r#""triggers":["e"]"#);
    for (c, i) in [(c1, "1"), (c2, "2")] {
        net.ask(c, &format!(r#"{{"action":"trigger","process":"t","id":"{i}","headers":{{"idempotency-key":"k"}}}}"#));
    }
    for _ in 0..400 {
        net.world.feed(
            h,
            &latzero_sim::encode_frame(
                &format!(
                    r#"{{"action":"emit","process":"e","data":"{}"}}"#,
                    "x".repeat(100)
                ),
                None,
            ),
        );
    }
    net.answer(h, r#""status":"ok","response":1"#);
    let seen = net.sees(c2);
    net.advance(60_000);
    let seen = seen + &net.sees(c2);
    assert!(
        seen.contains("2 failed") || seen.contains("2 ok"),
        "{}",
        &seen[seen.len() - 60..]
    );
}

fn small_outboxes() -> Net {
    Net::bounded(
        Limits::default(),
        Bounds {
            outbox_bytes: 20_000,
            socket_bytes: 0,
            ..Bounds::default()
        },
    )
}

/// Fills the outboxes of the apps that serve `e` and do not read.
fn fill(net: &mut Net, from: Peer) {
    let emit = format!(
        r#"{{"action":"emit","process":"e","data":"{}"}}"#,
        "x".repeat(100)
    );
    let emit = latzero_sim::encode_frame(&emit, None);
    for _ in 0..400 {
        net.world.feed(from, &emit);
    }
}

/// What a client sees, except emits and notices of lost emits.
fn sees(net: &mut Net, peer: Peer) -> String {
    let seen = net.sees(peer);
    let others = seen
        .split("; ")
        .filter(|gist| gist.contains(" ok") || gist.contains(" failed") || gist.contains("parked"));
    others.collect::<Vec<_>>().join("; ")
}

#[test]
fn a_stream_continues_with_the_rest_of_its_window() {
    let mut net = Net::new();
    let first = net.app("first", H);
    let caller = net.app("caller", "");
    net.call(caller, "1", r#""redeliver":true,"window":2"#);
    net.answer(first, r#""status":"partial","response":1"#);
    let second = net.app("second", H);
    net.hang_up(first);
    let given = net.messages(second);
    let given = given.iter().find(|m| m.json["action"] == "trigger");
    let given = &given.unwrap().json;
    assert_eq!(
        (&given["window"], &given["attempt"]),
        (&1.into(), &2.into())
    );
    net.answer(second, r#""status":"partial","response":2"#);
    assert_eq!(net.sees(caller), "1 partial: 1; 1 partial: 2");
    // If nothing is left, it starts with what the caller grants.
    let third = net.app("third", H);
    net.hang_up(second);
    let id = net.last_call(third);
    net.say(caller, r#"{"action":"ack","id":"1","count":1}"#);
    net.answer_to(third, &id, r#""status":"partial","response":3"#);
    assert_eq!(net.sees(caller), "1 partial: 3");
    net.answer_to(third, &id, r#""status":"partial","response":4"#);
    assert_eq!(net.sees(caller), "1 failed: handler_error ran=unknown");
}

#[test]
fn the_contents_of_a_pool_do_not_outlive_its_rules() {
    let rules = r#""policy":{"join":["caller","good"],"serve":["good"]}"#;
    for (durable, expected) in [
        ("", "failed: bad_message ran=no"),
        (r#","durable":true"#, "parked: null"),
    ] {
        let mut net = Net::new();
        let caller = net.app("caller", "");
        let create = format!(r#"{{"action":"pool_create","id":"p","pool":"p",{rules}{durable}}}"#);
        assert!(net.ask(caller, &create).starts_with("p ok"));
        net.ask(caller, r#"{"action":"pool_join","id":"j","pool":"p"}"#);
        let seen = net.call(caller, "1", r#""park":true,"pool":"p","data":"secret""#);
        assert_eq!(seen, format!("1 {expected}"));
        net.world.restart(3);
        let (evil, seen) = net.hello("evil", r#""pools":["p"],"triggers":["t"]"#);
        assert_eq!(seen.starts_with("hello"), durable.is_empty(), "{seen}");
        assert!(!net.sees(evil).contains("call"));
        // Without rules, nothing is lost.
        let caller = net.app("caller", r#""pools":["q"]"#);
        assert_eq!(net.call(caller, "2", r#""park":true"#), "2 parked: null");
    }
}

#[test]
fn a_pool_that_could_not_be_stored_holds_nothing_durable() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    net.world.fill_disk(true);
    let create = r#"{"action":"pool_create","id":"p","pool":"p","durable":true,"policy":{"join":["caller"]}}"#;
    assert!(net.ask(caller, create).starts_with("p failed: storage"));
    // Until then it existed, and it lives as long as its members.
    net.world.fill_disk(false);
    net.ask(caller, r#"{"action":"pool_join","id":"j","pool":"p"}"#);
    assert_eq!(
        net.call(caller, "1", r#""park":true,"pool":"p""#),
        "1 parked: null"
    );
}

#[test]
fn one_app_leaves_room_for_the_others() {
    for bytes in [false, true] {
        let mut net = Net::with(|l| {
            if bytes {
                l.parked_bytes_per_app_max = 3 * 1024;
            } else {
                l.parked_per_app_max = 3;
            }
        });
        let caller = net.app("caller", "");
        let mut n = 0;
        while net
            .call(caller, &format!("{n}"), r#""park":true"#)
            .contains("parked")
        {
            n += 1;
            assert!(n < 10);
        }
        assert!(n >= 3);
        let seen = net.call(caller, "more", r#""park":true"#);
        assert_eq!(seen, "more failed: overloaded ran=no");
        let other = net.app("other", "");
        assert_eq!(net.call(other, "1", r#""park":true"#), "1 parked: null");
        // There is room again once it has received its answers.
        net.hang_up(caller);
        net.hang_up(other);
        let handler = net.app("handler", H);
        for call in net.calls_of(handler) {
            net.answer_to(handler, &call, r#""status":"ok","response":1"#);
        }
        net.hang_up(handler);
        assert_eq!(net.world.rows().answers.len(), n + 1);
        let caller = net.app("caller", "");
        assert_eq!(net.world.rows().answers.len(), 1);
        assert_eq!(
            net.call(caller, "again", r#""park":true"#),
            "again parked: null"
        );
    }
}

#[test]
fn answers_wait_for_the_calling_instance_and_keep_their_order() {
    let mut net = small_outboxes();
    let caller = net.app("caller", r#""triggers":["e"]"#);
    let other = net.app("caller", r#""triggers":["x"]"#);
    for id in ["1", "2", "3"] {
        assert_eq!(sees(&mut net, caller), "");
        net.call(caller, id, r#""park":true"#);
    }
    let emitter = net.app("emitter", "");
    fill(&mut net, emitter);
    let (handler, _) = net.hello("handler", H);
    let calls = net.calls_of(handler);
    assert_eq!(calls.len(), 3);
    for (n, call) in calls.iter().enumerate() {
        if n == 2 {
            // There is room by now, and others are served first.
            sees(&mut net, caller);
        }
        net.answer_to(handler, call, &format!(r#""status":"ok","response":{n}"#));
    }
    assert_eq!(net.world.rows().answers.len(), 3);
    net.advance(1000);
    assert_eq!(sees(&mut net, caller), "1 ok: 0; 2 ok: 1; 3 ok: 2");
    assert_eq!(sees(&mut net, other), "");
    assert_eq!(net.world.rows().answers.len(), 0);
}

#[test]
fn requests_that_wait_for_the_disk_are_bounded() {
    let mut net = Net::with(|l| l.in_flight_max = 3);
    let caller = net.app("caller", "");
    let handler = net.app("handler", r#""triggers":["u"]"#);
    net.world.hold_disk(true);
    for id in ["1", "2", "3"] {
        assert_eq!(net.call(caller, id, r#""park":true"#), "");
    }
    assert_eq!(net.call(caller, "4", r#""park":true"#), "");
    let seen = net.ask(
        caller,
        r#"{"action":"pool_create","id":"5","pool":"p","durable":true}"#,
    );
    assert_eq!(seen, "");
    assert_eq!(net.world.pool_stats("default").unwrap().parked.waiting, 3);
    // Requests that need no write continue.
    assert!(
        net.ask(caller, r#"{"action":"ping","id":"6"}"#)
            .starts_with("6 ok")
    );
    net.say(caller, r#"{"action":"emit","process":"u"}"#);
    assert_eq!(net.sees(handler), "", "it keeps its place");
    net.world.hold_disk(false);
    let seen = net.sees(caller);
    assert!(
        seen.starts_with("1 parked: null; 2 parked: null; 3 parked: null; 4 parked: null; 5 ok"),
        "{seen}"
    );
    assert_ne!(net.sees(handler), "");
    assert_eq!(net.call(caller, "7", r#""park":true"#), "7 parked: null");
}

#[test]
fn a_handler_is_notified_once_its_answer_has_left_the_server() {
    let started = || {
        let mut net = Net::new();
        let caller = net.app("caller", "");
        net.call(caller, "1", r#""park":true"#);
        let handler = net.app("handler", H);
        net.world.hold_writes(true);
        net.answer(handler, r#""status":"ok","response":1"#);
        let rows = net.world.rows();
        assert_eq!((rows.calls.len(), rows.answers.len()), (1, 0));
        (net, caller, handler)
    };
    let (mut net, caller, _) = started();
    net.world.hold_writes(false);
    assert_eq!(net.world.rows().calls.len(), 0);
    assert_eq!(net.sees(caller), "1 ok: 1");
    // The server dies first: the call is delivered again.
    let (mut net, ..) = started();
    net.world.restart(3);
    net.world.hold_writes(false);
    let handler = net.app("handler", H);
    let caller = net.app("caller", "");
    net.answer(handler, r#""status":"ok","response":2"#);
    assert_eq!(net.sees(caller), "1 ok: 2");
    // The connection ends first: the answer waits for another instance, existing or future.
    for is_other_there in [false, true] {
        let (mut net, caller, _) = started();
        let other = is_other_there.then(|| net.app("caller", ""));
        net.world.hold_writes(true);
        net.hang_up(caller);
        assert_eq!(net.world.rows().answers.len(), 1);
        net.world.hold_writes(false);
        let (_, seen) = match other {
            Some(other) => (other, net.sees(other)),
            None => net.hello("caller", ""),
        };
        assert!(seen.ends_with("1 ok: 1"), "{seen}");
        let rows = net.world.rows();
        assert_eq!((rows.calls.len(), rows.answers.len()), (0, 0));
        net.world.check();
    }
}

#[test]
fn a_cancelled_call_does_not_run_after_a_kill() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    net.call(caller, "1", r#""park":true"#);
    net.world.hold_writes(true);
    net.say(caller, r#"{"action":"cancel","id":"1"}"#);
    net.world.restart(3);
    net.world.hold_writes(false);
    let handler = net.app("handler", H);
    assert_eq!(net.calls_of(handler), [""; 0]);
    let (_, seen) = net.hello("caller", "");
    assert!(seen.ends_with("1 failed: cancelled ran=no"), "{seen}");
}

#[test]
fn a_call_that_must_run_once_does_not_run_again_after_a_kill() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    keyed(&mut net, caller, "1", r#","park":true"#);
    let handler = net.app("handler", H);
    net.world.hold_writes(true);
    net.answer(handler, r#""status":"ok","response":1"#);
    net.world.restart(3);
    net.world.hold_writes(false);
    let handler = net.app("handler", H);
    assert_eq!(net.calls_of(handler), [""; 0]);
    let (caller, seen) = net.hello("caller", "");
    assert!(seen.ends_with("1 ok: 1"), "{seen}");
    // A repeat after the restart gets it too.
    assert_eq!(keyed(&mut net, caller, "2", ""), "2 ok: 1");
    assert_eq!(net.calls_of(handler), [""; 0]);
}
