//! Trigger calls: section 5 of the protocol.

mod net;
use latzero_fabric::Limits;
use latzero_sim::{Bounds, Peer};
use net::Net;

/// Three handlers of `t` with a strategy, and a caller.
fn trio(strategy: &str) -> (Net, [Peer; 3], Peer) {
    let mut net = Net::new();
    let more = format!(r#""triggers":[{{"name":"t","strategy":"{strategy}"}}]"#);
    let handlers = ["x", "y", "z"].map(|app| net.app(app, &more));
    let caller = net.app("c", "");
    (net, handlers, caller)
}

/// The indexes of the handlers that get the next `n` calls; each call is answered if `answers` is
/// true.
fn spread(
    net: &mut Net,
    handlers: &[Peer],
    caller: Peer,
    n: usize,
    more: &str,
    answers: bool,
) -> Vec<usize> {
    let mut row = Vec::new();
    for _ in 0..n {
        let id = format!("s{}", net.world.totals().calls_started);
        net.call(caller, &id, more);
        for (at, &handler) in handlers.iter().enumerate() {
            if net.sees(handler).starts_with("call") {
                row.push(at);
                if answers {
                    net.answer(handler, r#""status":"ok""#);
                }
            }
        }
    }
    net.sees(caller);
    row
}

#[test]
fn a_call_reaches_its_handler_and_its_answer_comes_back() {
    let mut net = Net::new();
    let h = net.app("h", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    let headers =
        r#""headers":{"traceparent":"00-1"},"key":"k","window":3,"data":{"x":42},"ttl":500"#;
    let origin = r#""origin":{"app_id":"somebody-else"}"#;
    assert_eq!(net.call(c, "1", &format!("{headers},{origin}")), "");
    let got = net.messages(h).remove(0).json;
    let expected = [
        ("process", "\"t\""),
        ("pool", "\"default\""),
        ("headers", r#"{"traceparent":"00-1"}"#),
        ("key", "\"k\""),
        ("window", "3"),
        ("data", r#"{"x":42}"#),
        ("ttl", "500"),
    ];
    for (name, value) in expected {
        assert_eq!(got[name].to_string(), value, "{name}");
    }
    assert_eq!(got["origin"]["app_id"], "c");
    assert_ne!(got["id"], "1");
    assert_eq!(
        net.answer(h, r#""status":"ok","response":{"result":84}"#),
        ""
    );
    assert_eq!(net.sees(c), r#"1 ok: {"result":84}"#);
}

#[test]
fn errors_are_forwarded_unchanged() {
    let mut net = Net::new();
    let h = net.app("h", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    net.call(c, "1", "");
    net.answer(
        h,
        r#""status":"error","error":{"code":"no_cheese","message":"m","data":[1]}"#,
    );
    let got = net.messages(c).remove(0).json;
    assert_eq!(
        got["error"].to_string(),
        r#"{"code":"no_cheese","data":[1],"message":"m"}"#
    );
    net.call(c, "2", "");
    net.answer(h, r#""status":"error""#);
    assert_eq!(net.sees(c), "2 failed: handler_error ran=unknown");
}

#[test]
fn refusals_report_the_reason_and_that_nothing_ran() {
    let mut net = Net::new();
    net.app("h", r#""pools":["p","q"],"triggers":["t"]"#);
    net.app("elsewhere", r#""pools":["q"],"triggers":["t"]"#);
    let gone = net.app("gone", r#""pools":["p"],"triggers":["t"]"#);
    net.hang_up(gone);
    let c = net.app("c", r#""pools":["p"]"#);
    let cases = [
        (r#""process":"u""#, "no_handler"),
        (r#""process":"u","destination":"h""#, "no_handler"),
        (r#""process":"t","destination":"c""#, "no_handler"),
        (r#""process":"t","destination":"nobody""#, "no_app"),
        (r#""process":"t","destination":"gone""#, "offline"),
        (
            r#""process":"t","destination":{"app_id":"h","instance":"ffffffffffffffff"}"#,
            "offline",
        ),
        (r#""process":"t","destination":"elsewhere""#, "not_member"),
        (r#""process":"t","pool":"q""#, "not_member"),
        (r#""process":"t","pool":"unheard""#, "not_member"),
        (r#""process":"t","pool":"a b""#, "invalid_name"),
        (r#""process":"a b""#, "invalid_name"),
        (r#""process":"t","destination":"a/b""#, "invalid_name"),
        (r#""process":"t","ttl":0"#, "bad_message"),
        (r#""process":"t","ttl":86400001"#, "bad_message"),
        (r#""process":"t","ttl":1.5"#, "bad_message"),
        (r#""process":"t","window":0"#, "bad_message"),
        (r#""process":"t","headers":{"a":1}"#, "bad_message"),
        (
            r#""process":"t","destination":{"app_id":"h","instance":"7"}"#,
            "bad_message",
        ),
        (r#""process":7"#, "bad_message"),
    ];
    for (fields, code) in cases {
        let call = format!(r#"{{"action":"trigger","id":"1",{fields}}}"#);
        assert_eq!(
            net.ask(c, &call),
            format!("1 failed: {code} ran=no"),
            "{fields}"
        );
        let silent = format!(r#"{{"action":"trigger",{fields}}}"#);
        assert_eq!(net.ask(c, &silent), format!("error {code}"), "{fields}");
    }
    let large = format!(r#""headers":{{"a":"{}"}}"#, "x".repeat(9000));
    assert_eq!(net.call(c, "1", &large), "1 failed: too_large ran=no");
}

#[test]
fn the_pool_is_the_one_named_or_the_only_one_or_default() {
    let mut net = Net::new();
    let h = net.app("h", r#""pools":["default","p","q"],"triggers":["t"]"#);
    let one = net.app("one", r#""pools":["p"]"#);
    net.call(one, "1", "");
    assert_eq!(net.messages(h)[0].json["pool"], "p");
    let two = net.app("two", r#""pools":["p","q"]"#);
    assert_eq!(net.call(two, "1", ""), "1 failed: not_member ran=no");
    net.call(two, "2", r#""pool":"q""#);
    assert_eq!(net.messages(h)[0].json["pool"], "q");
    net.ask(two, r#"{"action":"pool_join","pool":"default"}"#);
    net.call(two, "3", "");
    assert_eq!(net.messages(h)[0].json["pool"], "default");
}

#[test]
fn a_removed_pool_is_not_a_candidate() {
    let mut net = Net::new();
    let owner = net.app("owner", "");
    net.ask(owner, r#"{"action":"pool_create","pool":"made"}"#);
    let h = net.app("h", r#""pools":["p"],"triggers":["t"]"#);
    let c = net.app("c", r#""pools":["p","made"]"#);
    net.ask(
        owner,
        r#"{"action":"pool_remove","pool":"made","force":true}"#,
    );
    assert_eq!(net.sees(c), "pool_removed made");
    assert_eq!(net.call(c, "1", ""), "");
    assert_eq!(net.sees(h), "call t from c: null");
}

#[test]
fn round_robin_takes_turns() {
    let (mut net, handlers, c) = trio("round_robin");
    assert_eq!(
        spread(&mut net, &handlers, c, 7, "", true),
        [0, 1, 2, 0, 1, 2, 0]
    );
    net.hang_up(handlers[1]);
    let left = [handlers[0], handlers[2]];
    assert_eq!(spread(&mut net, &left, c, 4, "", true), [1, 0, 1, 0]);
}

#[test]
fn random_uses_any_handler() {
    let (mut net, handlers, c) = trio("random");
    let row = spread(&mut net, &handlers, c, 60, "", true);
    assert_eq!(row.len(), 60);
    assert!(
        (0..3).all(|h| row.iter().filter(|&&r| r == h).count() > 8),
        "{row:?}"
    );
}

#[test]
fn least_busy_picks_the_handler_with_the_fewest_calls() {
    let (mut net, handlers, c) = trio("least_busy");
    assert_eq!(spread(&mut net, &handlers, c, 4, "", false), [0, 1, 2, 0]);
    // The handler that answers is free again.
    net.answer(handlers[2], r#""status":"ok""#);
    assert_eq!(spread(&mut net, &handlers, c, 1, "", false), [2]);
}

#[test]
fn sticky_stays_with_its_handler_until_that_leaves() {
    let (mut net, handlers, c) = trio("sticky");
    let mut home = Vec::new();
    for key in 0..12 {
        let row = spread(
            &mut net,
            &handlers,
            c,
            3,
            &format!(r#""key":"k{key}""#),
            true,
        );
        assert!(row.iter().all(|&at| at == row[0]), "{row:?}");
        home.push(row[0]);
    }
    assert!((0..3).all(|at| home.contains(&at)), "{home:?}");
    net.hang_up(handlers[1]);
    let left = [handlers[0], handlers[2]];
    for (key, &home) in home.iter().enumerate() {
        let row = spread(&mut net, &left, c, 2, &format!(r#""key":"k{key}""#), true);
        assert_eq!(row[0], row[1]);
        if home != 1 {
            assert_eq!(row[0], home / 2, "key {key} moved");
        }
    }
    // Without a key, the caller itself is the key. An emit to one handler goes to the same handler
    // as a call with its key.
    let row = spread(&mut net, &left, c, 5, "", true);
    assert!(row.iter().all(|&at| at == row[0]));
    for key in 0..6 {
        let row = spread(&mut net, &left, c, 1, &format!(r#""key":"k{key}""#), true);
        net.ask(
            c,
            &format!(r#"{{"action":"emit","process":"t","deliver":"one","key":"k{key}"}}"#),
        );
        assert_eq!(net.sees(left[row[0]]), "emit t from c: null");
    }
}

#[test]
fn a_destination_is_an_app_or_one_instance() {
    let (mut net, handlers, c) = trio("round_robin");
    let twin = net.app("y", r#""triggers":["t"]"#);
    let ys = [handlers[1], twin];
    let mut row = spread(&mut net, &ys, c, 4, r#""destination":"y""#, true);
    row.sort_unstable();
    assert_eq!(row, [0, 0, 1, 1]);
    net.call(c, "1", r#""destination":"y""#);
    let list = net.ask(c, r#"{"action":"app_list","id":"l","after":"x","limit":1}"#);
    let list: serde_json::Value = serde_json::from_str(&list["l ok: ".len()..]).expect("JSON");
    let instance = list["apps"][0]["instances"][1]["instance"]
        .as_str()
        .expect("two instances")
        .to_owned();
    let more = format!(r#""destination":{{"app_id":"y","instance":"{instance}"}}"#);
    for y in ys {
        net.sees(y);
    }
    assert_eq!(spread(&mut net, &ys, c, 3, &more, true), [1, 1, 1]);
}

#[test]
fn a_call_ends_when_its_ttl_does() {
    let (mut net, handlers, c) = trio("round_robin");
    net.call(c, "1", r#""ttl":100"#);
    net.advance(99);
    assert_eq!(net.sees(c), "");
    net.advance(1);
    assert_eq!(net.sees(c), "1 failed: timeout ran=unknown");
    assert_eq!(net.sees(handlers[0]), "call t from c: null; cancel timeout");
    // The default is thirty seconds.
    net.call(c, "2", "");
    net.advance(29_999);
    assert_eq!(net.sees(c), "");
    net.advance(1);
    assert_eq!(net.sees(c), "2 failed: timeout ran=unknown");
    // An answer after the end is dropped and counted.
    let counted = net.world.totals().counts;
    assert_eq!(net.answer(handlers[0], r#""status":"ok""#), "");
    assert_eq!(net.sees(c), "");
    let late = latzero_fabric::Count::LateResponse as usize;
    assert_eq!(net.world.totals().counts[late], counted[late] + 1);
}

#[test]
fn a_cancel_ends_the_call_once_and_has_no_reply_of_its_own() {
    let (mut net, handlers, c) = trio("round_robin");
    net.call(c, "1", "");
    assert_eq!(
        net.ask(c, r#"{"action":"cancel","id":"1"}"#),
        "1 failed: cancelled ran=unknown"
    );
    assert_eq!(
        net.sees(handlers[0]),
        "call t from c: null; cancel cancelled"
    );
    assert_eq!(net.ask(c, r#"{"action":"cancel","id":"1"}"#), "");
    assert_eq!(net.ask(c, r#"{"action":"cancel"}"#), "error bad_message");
    // Only the caller can cancel a call.
    net.call(c, "2", "");
    assert_eq!(net.ask(handlers[0], r#"{"action":"cancel","id":"2"}"#), "");
    net.answer(handlers[1], r#""status":"ok","response":2"#);
    assert_eq!(net.sees(c), "2 ok: 2");
}

#[test]
fn only_the_instance_that_was_called_may_answer() {
    let (mut net, handlers, c) = trio("round_robin");
    let outsider = net.app("o", r#""pools":["p"]"#);
    net.call(c, "1", "");
    let call = net.last_call(handlers[0]);
    assert_eq!(
        net.answer_to(handlers[1], &call, r#""status":"ok""#),
        "error forbidden"
    );
    assert_eq!(
        net.answer_to(c, &call, r#""status":"ok""#),
        "error forbidden"
    );
    assert_eq!(net.answer_to(outsider, &call, r#""status":"ok""#), "");
    assert_eq!(
        net.answer_to(handlers[0], "not-an-id", r#""status":"ok""#),
        ""
    );
    assert_eq!(net.sees(c), "");
    let foreign = latzero_fabric::Count::ForeignResponse as usize;
    assert_eq!(net.world.totals().counts[foreign], 2);
    net.answer_to(handlers[0], &call, r#""status":"ok","response":1"#);
    assert_eq!(net.sees(c), "1 ok: 1");
}

#[test]
fn an_id_in_use_is_refused_and_free_again_afterwards() {
    let (mut net, handlers, c) = trio("round_robin");
    net.call(c, "1", "");
    assert_eq!(net.call(c, "1", ""), "1 failed: bad_message ran=no");
    net.answer(handlers[0], r#""status":"ok""#);
    net.sees(c);
    assert_eq!(net.call(c, "1", ""), "");
}

#[test]
fn a_stream_keeps_its_order_and_its_window() {
    let (mut net, handlers, c) = trio("round_robin");
    let h = handlers[0];
    net.call(c, "1", r#""window":2"#);
    let call = net.last_call(h);
    for (status, n) in [
        ("partial", 1),
        ("progress", 2),
        ("partial", 3),
        ("progress", 4),
    ] {
        net.answer_to(h, &call, &format!(r#""status":"{status}","response":{n}"#));
    }
    assert_eq!(
        net.sees(c),
        "1 partial: 1; 1 progress: 2; 1 partial: 3; 1 progress: 4"
    );
    assert_eq!(net.ask(c, r#"{"action":"ack","id":"1","count":1}"#), "");
    assert_eq!(net.sees(h), "ack 1");
    net.answer_to(h, &call, r#""status":"partial","response":5"#);
    net.answer_to(h, &call, r#""status":"ok","response":6"#);
    assert_eq!(net.sees(c), "1 partial: 5; 1 ok: 6");
    // Neither an invalid acknowledgement nor one for an unknown call ends the call.
    net.call(c, "2", r#""window":1"#);
    assert_eq!(
        net.ask(c, r#"{"action":"ack","id":"2"}"#),
        "error bad_message"
    );
    assert_eq!(net.ask(c, r#"{"action":"ack","id":"none","count":1}"#), "");
    // One item too many ends it.
    let call = net.last_call(handlers[1]);
    net.answer_to(handlers[1], &call, r#""status":"partial""#);
    assert_eq!(
        net.answer_to(handlers[1], &call, r#""status":"partial""#),
        "cancel handler_error"
    );
    assert_eq!(
        net.sees(c),
        "2 partial: null; 2 failed: handler_error ran=unknown"
    );
    // Each acknowledgement counts once.
    net.call(c, "w", r#""window":1"#);
    let call = net.last_call(handlers[2]);
    net.answer_to(handlers[2], &call, r#""status":"partial""#);
    net.ask(c, r#"{"action":"ack","id":"w","count":1}"#);
    assert_eq!(
        net.answer_to(handlers[2], &call, r#""status":"partial""#),
        "ack 1"
    );
    assert_eq!(
        net.answer_to(handlers[2], &call, r#""status":"progress""#),
        ""
    );
    assert_eq!(
        net.answer_to(handlers[2], &call, r#""status":"partial""#),
        "cancel handler_error"
    );
    net.sees(c);
    // Without a window there is no limit.
    net.call(c, "3", "");
    let call = net.last_call(handlers[0]);
    for _ in 0..50 {
        net.answer_to(handlers[0], &call, r#""status":"partial""#);
    }
    assert_eq!(net.messages(c).len(), 50);
}

#[test]
fn either_side_may_disconnect() {
    let (mut net, handlers, c) = trio("round_robin");
    net.call(c, "1", "");
    net.hang_up(handlers[0]);
    assert_eq!(net.sees(c), "1 failed: handler_gone ran=unknown");
    net.call(c, "2", "");
    net.ask(handlers[1], r#"{"action":"pool_leave","pool":"default"}"#);
    assert_eq!(net.sees(c), "2 failed: handler_gone ran=unknown");
    net.call(c, "3", "");
    net.sees(handlers[2]);
    // A caller that leaves the pool still gets the answers.
    assert_eq!(
        net.ask(c, r#"{"action":"pool_leave","pool":"default","id":"l"}"#),
        "3 failed: cancelled ran=unknown; l ok: {}"
    );
    assert_eq!(net.sees(handlers[2]), "cancel caller_gone");
    let c = net.app("d", "");
    net.call(c, "1", "");
    net.sees(handlers[2]);
    net.hang_up(c);
    assert_eq!(net.sees(handlers[2]), "cancel caller_gone");
}

#[test]
fn a_pool_removed_under_its_calls_ends_them_for_both_sides() {
    for caller_first in [true, false] {
        let mut net = Net::new();
        let owner = net.app("owner", "");
        net.ask(owner, r#"{"action":"pool_create","pool":"made"}"#);
        let caller = |net: &mut Net| net.app("c", r#""pools":["made"]"#);
        let handler = |net: &mut Net| net.app("h", r#""pools":["made"],"triggers":["t"]"#);
        let (c, h) = if caller_first {
            (caller(&mut net), handler(&mut net))
        } else {
            let h = handler(&mut net);
            (caller(&mut net), h)
        };
        net.call(c, "1", "");
        net.sees(h);
        net.ask(
            owner,
            r#"{"action":"pool_remove","pool":"made","force":true}"#,
        );
        let seen = net.sees(c);
        assert!(
            seen.starts_with("1 failed: ") && seen.ends_with("ran=unknown; pool_removed made"),
            "{seen}"
        );
        assert!(net.sees(h).ends_with("pool_removed made"));
        assert_eq!(
            net.call(c, "2", r#""pool":"made""#),
            "2 failed: not_member ran=no"
        );
    }
}

#[test]
fn an_app_may_call_itself_and_a_call_may_want_no_answer() {
    let mut net = Net::new();
    let a = net.app("a", r#""triggers":["t"]"#);
    assert_eq!(net.call(a, "1", ""), "call t from a: null");
    assert_eq!(net.answer(a, r#""status":"ok","response":1"#), "1 ok: 1");
    assert_eq!(
        net.ask(a, r#"{"action":"trigger","process":"t"}"#),
        "call t from a: null"
    );
    assert_eq!(net.answer(a, r#""status":"partial""#), "");
    assert_eq!(net.answer(a, r#""status":"ok""#), "");
    assert_eq!(net.world.calls_in_flight(), 0);
}

#[test]
fn limits_answer_overloaded() {
    let mut net = Net::with(|l| (l.in_flight_max, l.pending_max) = (2, 3));
    net.app("h", r#""triggers":["t"]"#);
    let (c, d) = (net.app("c", ""), net.app("d", ""));
    for id in ["1", "2"] {
        assert_eq!(net.call(c, id, ""), "");
    }
    assert_eq!(net.call(d, "1", ""), "");
    assert_eq!(net.call(d, "2", ""), "2 failed: overloaded ran=no");
    // A finished call makes room.
    net.ask(c, r#"{"action":"cancel","id":"1"}"#);
    assert_eq!(net.call(d, "2", ""), "");
}

#[test]
fn at_the_limit_only_new_calls_wait() {
    let mut net = Net::with(|l| l.in_flight_max = 2);
    let h = net.app("h", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    assert_eq!(net.call(c, "1", r#""window":1"#), "");
    let stream = net.last_call(h);
    for id in ["2", "3", "4", "5"] {
        assert_eq!(net.call(c, id, ""), "");
    }
    assert_eq!(net.calls_of(h).len(), 2, "the others wait");
    // Emits keep their position behind calls; pings, acknowledgements and cancels do not wait.
    net.say(c, r#"{"action":"emit","process":"t","data":"behind"}"#);
    let seen = net.ask(c, r#"{"action":"ping","id":"p"}"#);
    assert!(seen.starts_with("p ok"), "{seen}");
    net.answer_to(h, &stream, r#""status":"partial","response":1"#);
    assert_eq!(net.sees(c), "1 partial: 1");
    net.say(c, r#"{"action":"ack","id":"1","count":1}"#);
    assert_ne!(net.sees(h), "", "it may send one more");
    let said = net.ask(c, r#"{"action":"cancel","id":"4"}"#);
    assert_eq!(said, "4 failed: cancelled ran=no");
    assert_eq!(net.call(c, "5", ""), "5 failed: bad_message ran=no");
    // Room for one call: the oldest is delivered, then the messages behind it that may follow.
    let seen = net.answer_to(h, &stream, r#""status":"ok""#);
    assert_eq!(
        (&*net.sees(c), &*seen),
        ("1 ok: null", "call t from c: null")
    );
    let third = net.last_call(h);
    let seen = net.answer_to(h, &third, r#""status":"ok""#);
    let (call, emit) = seen.split_once("; ").unwrap();
    assert_eq!(call, "call t from c: null");
    assert!(emit.contains("behind"), "{emit}");
    net.world.check();
}

#[test]
fn a_call_that_waited_too_long_is_not_started() {
    let mut net = Net::with(|l| l.in_flight_max = 1);
    let h = net.app("h", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    assert_eq!(net.call(c, "1", ""), "");
    let first = net.last_call(h);
    assert_eq!(net.call(c, "2", r#""ttl":500"#), "");
    assert_eq!(net.call(c, "3", r#""ttl":2000"#), "");
    net.advance(600);
    assert_eq!(
        net.sees(c),
        "2 failed: timeout ran=no",
        "nobody has to make room for that"
    );
    let answer = format!(r#"{{"action":"response","in_reply_to":"{first}","status":"ok"}}"#);
    net.say(h, &answer);
    assert_eq!(net.sees(c), "1 ok: null");
    let messages = net.messages(h).into_iter().map(|m| m.json);
    let ttl: Vec<_> = messages.map(|m| m["ttl"].as_u64()).collect();
    assert_eq!(ttl, [Some(1400)], "its time starts on arrival");
}

#[test]
fn concurrency_limits_the_calls_of_one_instance() {
    let mut net = Net::new();
    let h = net.app("h", r#""triggers":[{"name":"t","concurrency":2}]"#);
    let c = net.app("c", "");
    for id in ["1", "2"] {
        assert_eq!(net.call(c, id, ""), "");
    }
    assert_eq!(net.call(c, "3", ""), "3 failed: overloaded ran=no");
    // It may be lowered while calls are in progress; another handler gets the calls above the
    // limit.
    net.ask(
        h,
        r#"{"action":"trigger_register","triggers":[{"name":"t","concurrency":1}]}"#,
    );
    net.answer(h, r#""status":"ok""#);
    net.sees(c);
    assert_eq!(net.call(c, "3", ""), "3 failed: overloaded ran=no");
    let twin = net.app("h", r#""triggers":["t"]"#);
    assert_eq!(net.call(c, "3", ""), "");
    assert_eq!(net.sees(twin), "call t from c: null");
}

/// A server whose outboxes are full soon.
fn tight() -> Net {
    let bounds = Bounds {
        outbox_bytes: 2000,
        headroom_bytes: 1500,
        socket_bytes: 0,
    };
    Net::bounded(Limits::default(), bounds)
}

#[test]
fn calls_to_a_handler_that_does_not_read_are_refused() {
    let mut net = tight();
    let slow = net.app("slow", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    let data = format!(r#""data":"{}""#, "x".repeat(1000));
    assert_eq!(net.call(c, "1", &data), "");
    assert_eq!(net.call(c, "2", &data), "2 failed: overloaded ran=no");
    // Another instance that reads gets the calls in the meantime.
    let twin = net.app("slow", r#""triggers":["t"]"#);
    assert_eq!(net.call(c, "2", &data), "");
    assert!(net.sees(twin).starts_with("call"));
    net.sees(slow);
    assert_eq!(net.call(c, "3", &data), "");
    assert!(net.sees(slow).starts_with("call"));
}

#[test]
fn an_answer_that_does_not_fit_becomes_a_short_error() {
    let large = "x".repeat(3000);
    // Nothing is cancelled at a handler that has sent its last response.
    let cases = [
        (format!(r#""status":"ok","response":"{large}""#), ""),
        (
            format!(r#""status":"error","error":{{"code":"e","message":"{large}"}}"#),
            "",
        ),
        (
            format!(r#""status":"partial","response":"{large}""#),
            "cancel overloaded",
        ),
    ];
    for (answer, expected) in cases {
        let mut net = tight();
        let h = net.app("h", r#""triggers":["t"]"#);
        let c = net.app("c", "");
        net.call(c, "1", "");
        // Its outbox is not empty: an empty one accepts any answer.
        net.say(c, r#"{"action":"ping","id":"p"}"#);
        assert_eq!(net.answer(h, &answer), expected);
        let seen = net.sees(c);
        assert!(seen.ends_with("1 failed: overloaded ran=unknown"), "{seen}");
    }
}

#[test]
fn a_connection_whose_headroom_is_full_is_closed() {
    let mut net = tight();
    let c = net.app("c", "");
    for id in 0..40 {
        net.say(
            c,
            &format!(r#"{{"action":"trigger","process":"t","id":"{id}"}}"#),
        );
    }
    assert!(!net.world.is_open(c));
    assert!(net.world.waiting(c) <= 3500);
}

#[test]
fn raw_bytes_travel_raw_or_as_base64() {
    let mut net = Net::with(|l| l.max_frame = 400);
    let h = net.app("h", r#""triggers":["t"],"features":["attachments"]"#);
    let plain = net.app("plain", r#""triggers":["t"]"#);
    let c = net.app("c", r#""features":["attachments"]"#);
    let to = |app: &str| {
        format!(r#"{{"action":"trigger","process":"t","id":"{app}","destination":"{app}"}}"#)
    };
    net.say_raw(c, &to("h"), b"\x00\xff");
    assert_eq!(net.sees(h), r"call t from c: raw:\x00\xff");
    net.say_raw(c, &to("plain"), b"\x00\xff");
    assert_eq!(net.sees(plain), "call t from c: base64:AP8=");
    let answer =
        |call: &str| format!(r#"{{"action":"response","in_reply_to":"{call}","status":"ok"}}"#);
    let call = net.last_call(h);
    net.say_raw(h, &answer(&call), b"raw");
    assert_eq!(net.sees(c), "h ok: raw:raw");
    // The attachment replaces the field.
    net.say_raw(
        c,
        r#"{"action":"trigger","process":"t","id":"2","data":1}"#,
        b"x",
    );
    assert_eq!(net.sees(c), "2 failed: bad_message ran=no");
    // If it is too large as base64, it is refused before delivery, or the call ends with an error
    // after it ran.
    net.ask(h, r#"{"action":"trigger_unregister","triggers":["t"]}"#);
    net.say_raw(
        c,
        r#"{"action":"trigger","process":"t","id":"3"}"#,
        &[7; 320],
    );
    assert_eq!(net.sees(c), "3 failed: too_large ran=no");
    net.ask(h, r#"{"action":"trigger_register","triggers":["t"]}"#);
    net.ask(
        plain,
        r#"{"action":"trigger","process":"t","id":"4","destination":"h"}"#,
    );
    let call = net.last_call(h);
    net.say_raw(h, &answer(&call), &[7; 320]);
    assert_eq!(net.sees(plain), "4 failed: too_large ran=unknown");
}

#[test]
fn calls_of_one_caller_reach_one_handler_in_order() {
    let mut net = Net::new();
    let h = net.app("h", r#""triggers":["t","u"]"#);
    let c = net.app("c", "");
    let mut expected = Vec::new();
    for n in 0..30 {
        let process = if n % 3 == 0 { "u" } else { "t" };
        net.say(
            c,
            &format!(r#"{{"action":"trigger","process":"{process}","id":"{n}","data":{n}}}"#),
        );
        expected.push(format!("call {process} from c: {n}"));
    }
    assert_eq!(net.sees(h), expected.join("; "));
}
