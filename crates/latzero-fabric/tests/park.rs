//! Calls that outlive a connection: parked ones, redelivered ones, and their answers.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use std::collections::{BTreeMap, BTreeSet};

use latzero_fabric::ledger::Resource;
use latzero_fabric::{Limits, Prng, Transport};
use latzero_sim::{Bounds, Peer};
use net::Net;
use serde_json::Value;

fn park(net: &mut Net, peer: Peer, id: &str, more: &str) -> String {
    net.ask(
        peer,
        &format!(r#"{{"action":"trigger","process":"t","id":"{id}","park":true{more}}}"#),
    )
}

/// An app whose first messages are not read yet: calls may directly follow its handshake.
fn join(net: &mut Net, app: &str, more: &str) -> Peer {
    let peer = net.connect();
    let comma = if more.is_empty() { "" } else { "," };
    net.say(
        peer,
        &format!(r#"{{"action":"handshake","app_id":"{app}"{comma}{more}}}"#),
    );
    peer
}

/// Calls of 1 MiB that are redelivered.
fn call_large(net: &mut Net, caller: Peer, ids: &[&str], more: &str) {
    let text = "x".repeat(1 << 20);
    for id in ids {
        let call = format!(r#"{more}"redeliver":true,"data":"{text}""#);
        net.call(caller, id, &call);
    }
}

/// The calls that a client has received: their ids at the handler, and their data.
fn calls(net: &mut Net, peer: Peer) -> Vec<Value> {
    let messages = net.messages(peer).into_iter().map(|m| m.json);
    messages.filter(|m| m["action"] == "trigger").collect()
}

fn answer(net: &mut Net, handler: Peer, call: &Value) {
    let id = call["id"].as_str().unwrap();
    net.say(
        handler,
        &format!(
            r#"{{"action":"response","in_reply_to":"{id}","status":"ok","response":{}}}"#,
            call["data"]
        ),
    );
}

/// The reply to a request.
fn reply(net: &mut Net, peer: Peer, request: &str) -> Value {
    net.say(peer, &format!(r#"{{"id":"ask",{request}}}"#));
    let messages = net.messages(peer).into_iter().map(|m| m.json);
    let mut replies = messages.filter(|m| m["in_reply_to"] == "ask");
    replies.next().unwrap()["response"].take()
}

/// The answers that a client received, as "id:payload" or "id:code".
fn answers(net: &mut Net, peer: Peer) -> Vec<String> {
    let messages = net.messages(peer).into_iter().map(|m| m.json);
    let answers = messages.filter(|m| m["action"] == "response" && m["status"] != "parked");
    let shown = answers.map(|m| {
        let id = m["in_reply_to"].as_str().unwrap();
        match m["error"]["code"].as_str() {
            Some(code) => format!("{id}:{code}"),
            None => format!("{id}:{}", m["response"]),
        }
    });
    shown.collect()
}

#[test]
fn a_parked_call_waits_for_its_handler() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    for n in 1..=3 {
        assert_eq!(
            park(&mut net, caller, &n.to_string(), &format!(r#","data":{n}"#)),
            format!("{n} parked: null")
        );
    }
    assert_eq!(net.world.rows().calls.len(), 3);
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    let got = calls(&mut net, handler);
    let seen: Vec<_> = got
        .iter()
        .map(|c| {
            (
                c["data"].to_string(),
                c["attempt"].as_u64().unwrap(),
                c["origin"]["app_id"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(seen[0], ("1".into(), 1, "caller"));
    assert_eq!((&seen[1].0[..], &seen[2].0[..]), ("2", "3"));
    for call in &got {
        answer(&mut net, handler, call);
    }
    assert_eq!(answers(&mut net, caller), ["1:1", "2:2", "3:3"]);
    assert!(net.world.rows().calls.is_empty() && net.world.rows().answers.is_empty());
    assert!(net.world.storages().is_empty());
}

#[test]
fn a_parked_call_waits_for_the_app_it_names() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    net.app("other", r#""triggers":["t"]"#);
    assert_eq!(
        park(&mut net, caller, "1", r#","destination":"late""#),
        "1 parked: null"
    );
    assert_eq!(
        park(
            &mut net,
            caller,
            "2",
            r#","destination":{"app_id":"late","instance":"0000000000000001"}"#
        ),
        "2 failed: bad_message ran=no"
    );
    let late = join(&mut net, "late", "");
    assert_eq!(calls(&mut net, late), Vec::<Value>::new());
    net.say(late, r#"{"action":"trigger_register","triggers":["t"]}"#);
    let got = calls(&mut net, late);
    answer(&mut net, late, &got[0]);
    assert_eq!(answers(&mut net, caller), ["1:null"]);
    // Nothing is parked while a handler is connected.
    assert_eq!(park(&mut net, caller, "3", ""), "");
    assert!(net.world.rows().calls.is_empty());
}

#[test]
fn a_call_is_delivered_again_after_the_server_died() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", r#","data":7"#);
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    assert_eq!(calls(&mut net, handler)[0]["attempt"], 1);
    net.world.restart(2);
    let handler = net.connect();
    net.say(handler, r#"{"action":"handshake","app_id":"handler"}"#);
    let got = calls(&mut net, handler);
    assert_eq!(
        (&got[0]["attempt"], &got[0]["data"]),
        (&2.into(), &7.into())
    );
    answer(&mut net, handler, &got[0]);
    // The caller is away, and is back after one more restart.
    assert_eq!(net.world.rows().answers.len(), 1);
    net.world.restart(3);
    let caller = net.connect();
    net.say(caller, r#"{"action":"handshake","app_id":"caller"}"#);
    let first = net.messages(caller);
    assert_eq!(first[0].json["action"], "handshake_ack");
    assert_eq!(
        (&first[1].json["in_reply_to"], &first[1].json["response"]),
        (&"1".into(), &7.into())
    );
    assert!(net.world.rows().answers.is_empty() && net.world.storages().is_empty());
}

#[test]
fn the_instance_that_called_gets_the_answer() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", "");
    park(&mut net, caller, "2", "");
    let newer = net.app("caller", "");
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    let got = calls(&mut net, handler);
    answer(&mut net, handler, &got[0]);
    assert_eq!(answers(&mut net, caller), ["1:null"]);
    net.hang_up(caller);
    answer(&mut net, handler, &got[1]);
    assert_eq!(answers(&mut net, newer), ["2:null"]);
}

#[test]
fn raw_bytes_and_headers_survive() {
    let mut net = Net::new();
    let caller = net.app("caller", r#""features":["attachments"]"#);
    net.say_raw(
        caller,
        r#"{"action":"trigger","process":"t","id":"1","park":true,"headers":{"h":"v"},"key":"k"}"#,
        &[0, 1, 255],
    );
    net.world.restart(1);
    let handler = net.connect();
    net.say(
        handler,
        r#"{"action":"handshake","app_id":"h","triggers":["t"],"features":["attachments"]}"#,
    );
    let call = net.messages(handler).remove(1);
    assert_eq!(call.attachment.as_deref(), Some(&[0, 1, 255][..]));
    assert_eq!(
        (&call.json["headers"]["h"], &call.json["key"]),
        (&"v".into(), &"k".into())
    );
    let id = call.json["id"].as_str().unwrap();
    net.say_raw(
        handler,
        &format!(r#"{{"action":"response","in_reply_to":"{id}","status":"ok"}}"#),
        &[9, 0],
    );
    net.world.restart(2);
    let caller = net.connect();
    net.say(
        caller,
        r#"{"action":"handshake","app_id":"caller","features":["attachments"]}"#,
    );
    let answer = net.messages(caller).remove(1);
    assert_eq!(answer.attachment.as_deref(), Some(&[9, 0][..]));
}

#[test]
fn waits_end() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", r#","ttl":1000"#);
    park(&mut net, caller, "2", "");
    assert_eq!(
        park(&mut net, caller, "2", ""),
        "2 failed: bad_message ran=no"
    );
    net.advance(1000);
    assert_eq!(answers(&mut net, caller), ["1:timeout"]);
    net.say(caller, r#"{"action":"cancel","id":"2"}"#);
    assert_eq!(answers(&mut net, caller), ["2:cancelled"]);
    // A handler may be away for longer than any other call lasts.
    let month: u64 = 30 * 24 * 3600 * 1000;
    park(&mut net, caller, "4", &format!(r#","ttl":{month}"#));
    net.advance(month - 1);
    assert!(answers(&mut net, caller).is_empty());
    net.advance(1);
    assert_eq!(answers(&mut net, caller), ["4:timeout"]);
    let longer = park(&mut net, caller, "5", &format!(r#","ttl":{}"#, month + 1));
    assert_eq!(longer, "5 failed: bad_message ran=no");
    // A result that comes while the caller is away is stored for it, but not for ever.
    park(&mut net, caller, "3", r#","ttl":1000"#);
    net.hang_up(caller);
    net.advance(1000);
    assert_eq!(net.world.rows().answers.len(), 1);
    net.advance(24 * 60 * 60 * 1000);
    assert!(net.world.rows().answers.is_empty());
    let caller = net.app("caller", "");
    // Without an id, nobody waits for the answer.
    net.ask(
        caller,
        r#"{"action":"trigger","process":"t","park":true,"ttl":1000}"#,
    );
    net.advance(1000);
    assert_eq!(net.sees(caller), "");
    assert!(net.world.rows().calls.is_empty() && net.world.storages().is_empty());
}

#[test]
fn a_handler_that_dies_ends_it_unless_it_may_be_redelivered() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "once", "");
    park(&mut net, caller, "again", r#","redeliver":true"#);
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    assert_eq!(calls(&mut net, first).len(), 2);
    net.hang_up(first);
    assert_eq!(answers(&mut net, caller), ["once:handler_gone"]);
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    assert_eq!(calls(&mut net, second), [""; 0], "it pauses");
    net.advance(100);
    let got = calls(&mut net, second);
    assert_eq!((got.len(), &got[0]["attempt"]), (1, &2.into()));
    let third = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(second);
    net.advance(399);
    assert_eq!(calls(&mut net, third), [""; 0], "it pauses for longer");
    net.advance(1);
    let got = calls(&mut net, third);
    assert_eq!(got[0]["attempt"], 3);
    answer(&mut net, third, &got[0]);
    assert_eq!(answers(&mut net, caller), ["again:null"]);
}

#[test]
fn a_call_that_kills_its_handlers_lets_others_pass_and_is_finally_dead() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(
        &mut net,
        caller,
        "bad",
        r#","redeliver":true,"ttl":600000,"data":"bad""#,
    );
    for n in 0..30 {
        park(&mut net, caller, &n.to_string(), &format!(r#","data":{n}"#));
    }
    let one = r#""triggers":[{"name":"t","concurrency":1}]"#;
    let (mut given, mut done) = (0, 0);
    for _ in 0..10 {
        let handler = join(&mut net, "handler", one);
        net.advance(7000);
        // Until it gets the call that kills it.
        while let [call] = &calls(&mut net, handler)[..] {
            if call["data"] == "bad" {
                given += 1;
                assert_eq!(call["attempt"], given);
                assert!(given == 1 || done == 30, "the others are served first");
                break;
            }
            done += 1;
            answer(&mut net, handler, call);
        }
        net.hang_up(handler);
        net.world.check();
    }
    assert_eq!((given, done), (5, 30));
    let told = answers(&mut net, caller);
    assert_eq!(told.last().unwrap(), "bad:attempts_exhausted");
    let stats = |net: &mut Net| net.world.pool_stats("default").unwrap().parked;
    assert_eq!((stats(&mut net).dead, stats(&mut net).total()), (1, 1));
    // It is still there after a restart, and runs again on request.
    net.world.restart(1);
    assert_eq!(stats(&mut net).dead, 1);
    let caller = net.app("caller", "");
    let list = reply(&mut net, caller, r#""action":"parked_list","state":"dead""#);
    let entry = &list["parked"][0];
    assert_eq!(
        (&entry["id"], &entry["attempt"]),
        (&"bad".into(), &5.into())
    );
    assert!(entry["cause"].as_str().unwrap().contains("'handler'"));
    let retry = format!(r#""action":"parked_retry","number":{}"#, entry["number"]);
    assert_eq!(reply(&mut net, caller, &retry)["changed"], 1);
    let handler = join(&mut net, "handler", one);
    let got = calls(&mut net, handler);
    assert_eq!(
        (&got[0]["data"], &got[0]["attempt"]),
        (&"bad".into(), &1.into())
    );
    answer(&mut net, handler, &got[0]);
    assert_eq!(
        answers(&mut net, caller),
        [""; 0],
        "its caller was told before"
    );
    assert!(net.world.rows().calls.is_empty() && net.world.rows().answers.is_empty());
}

#[test]
fn calls_wait_for_a_busy_handler_and_callers_take_turns() {
    let mut net = Net::new();
    let handler = join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":1}]"#,
    );
    let (greedy, polite) = (net.app("greedy", ""), net.app("polite", ""));
    for n in 0..50 {
        park(&mut net, greedy, &n.to_string(), &format!(r#","data":{n}"#));
    }
    for n in 100..103 {
        park(&mut net, polite, &n.to_string(), &format!(r#","data":{n}"#));
    }
    let mut order = Vec::new();
    // The next call arrives with the answer to the previous one.
    while let [call] = &calls(&mut net, handler)[..] {
        order.push(call["data"].as_u64().unwrap());
        answer(&mut net, handler, call);
    }
    assert_eq!(order.len(), 53);
    assert_eq!(order[..8], [0, 1, 100, 2, 101, 3, 102, 4]);
    assert_eq!(answers(&mut net, greedy).len(), 50);
    assert_eq!(answers(&mut net, polite).len(), 3);
}

#[test]
fn an_id_is_in_use_until_its_answer_was_fetched() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", "");
    net.hang_up(caller);
    let other = net.app("caller", "");
    let refused = net.call(other, "1", "");
    assert_eq!(
        refused, "1 failed: bad_message ran=no",
        "it waits for its handler"
    );
    net.hang_up(other);
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    let got = calls(&mut net, handler);
    answer(&mut net, handler, &got[0]);
    let late = join(&mut net, "caller", "");
    assert_eq!(answers(&mut net, late), ["1:null"]);
    net.call(late, "1", r#""data":7"#);
    let got = calls(&mut net, handler);
    answer(&mut net, handler, &got[0]);
    assert_eq!(answers(&mut net, late), ["1:7"]);
}

#[test]
fn a_call_that_was_never_delivered_did_not_run() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let ran = |net: &mut Net| {
        let messages = net.messages(caller).into_iter().map(|m| m.json);
        let told: Vec<_> = messages.filter(|m| m["status"] == "error").collect();
        let error = &told[0]["error"];
        let text = |name: &str| error[name].as_str().unwrap().to_owned();
        (text("code"), text("ran"))
    };
    let expect = |code: &str, ran: &str| (code.to_owned(), ran.to_owned());
    park(&mut net, caller, "1", r#","ttl":1000"#);
    net.advance(1000);
    assert_eq!(ran(&mut net), expect("timeout", "no"));
    park(&mut net, caller, "2", "");
    net.say(caller, r#"{"action":"cancel","id":"2"}"#);
    assert_eq!(ran(&mut net), expect("cancelled", "no"));
    park(&mut net, caller, "3", r#","ttl":1000,"redeliver":true"#);
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(handler);
    net.advance(1000);
    assert_eq!(ran(&mut net), expect("timeout", "unknown"));
}

#[test]
fn calls_that_are_not_parked_are_redelivered_too() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.call(caller, "1", r#""redeliver":true,"data":5"#);
    let (has, other) = match calls(&mut net, first).len() {
        1 => (first, second),
        _ => (second, first),
    };
    net.hang_up(has);
    let got = calls(&mut net, other);
    assert_eq!(
        (&got[0]["attempt"], &got[0]["data"]),
        (&2.into(), &5.into())
    );
    net.hang_up(other);
    assert_eq!(answers(&mut net, caller), ["1:handler_gone"]);
    // If the call may also wait, it is parked then.
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.call(caller, "2", r#""redeliver":true,"park":true"#);
    assert!(net.world.rows().calls.is_empty());
    net.hang_up(first);
    assert_eq!(net.world.rows().calls.len(), 1);
    let third = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.advance(100);
    let got = calls(&mut net, third);
    assert_eq!(got[0]["attempt"], 2);
    answer(&mut net, third, &got[0]);
    assert_eq!(answers(&mut net, caller), ["2:null"]);
    // When a caller leaves, its calls that are not parked end.
    net.call(caller, "3", r#""redeliver":true"#);
    net.hang_up(caller);
    net.hang_up(third);
    net.world.check();
}

#[test]
fn large_calls_are_redelivered_over_several_steps() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2", "3", "4"], "");
    assert_eq!(calls(&mut net, first).len(), 4);
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(first);
    assert_eq!(calls(&mut net, second).len(), 1);
    // Those that wait for their turn are still calls: counted, cancelled, and each id once.
    net.world.check();
    net.say(caller, r#"{"action":"cancel","id":"3"}"#);
    assert_eq!(answers(&mut net, caller), ["3:cancelled"]);
    let refused = net.call(caller, "4", r#""redeliver":true"#);
    assert!(refused.contains("bad_message"), "{refused}");
    net.advance(1);
    assert_eq!(calls(&mut net, second).len(), 2);
    net.world.check();
}

#[test]
fn other_calls_do_not_take_the_place_of_those_that_are_redelivered() {
    let mut net = Net::with(|l| l.in_flight_max = 3);
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2", "3", "4", "5"], "");
    assert_eq!(calls(&mut net, first).len(), 3);
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(first);
    net.advance(1);
    let given = calls(&mut net, second);
    let attempts: Vec<&Value> = given.iter().map(|call| &call["attempt"]).collect();
    assert_eq!(attempts, [2, 2, 2]);
    assert_eq!(answers(&mut net, caller), [""; 0]);
    // The two that waited in the session follow.
    for call in &given {
        answer(&mut net, second, call);
    }
    assert_eq!(calls(&mut net, second).len(), 2);
    net.world.check();
}

#[test]
fn a_redelivered_call_waits_for_the_room_that_later_calls_took() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2"], "");
    let second = join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":2}]"#,
    );
    net.hang_up(first);
    net.call(caller, "late", "");
    let taken = calls(&mut net, second);
    assert_eq!(taken.len(), 2);
    net.advance(1);
    assert_eq!(calls(&mut net, second).len(), 0);
    assert_eq!(answers(&mut net, caller), [""; 0]);
    answer(&mut net, second, &taken[1]);
    assert_eq!(calls(&mut net, second)[0]["attempt"], 2);
    net.world.check();
}

#[test]
fn a_single_redelivered_call_waits_for_a_busy_handler() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.call(caller, "1", r#""redeliver":true"#);
    let second = join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":1}]"#,
    );
    net.call(caller, "2", "");
    let busy = calls(&mut net, second);
    assert_eq!(busy.len(), 1);
    net.hang_up(first);
    net.advance(1_000);
    assert_eq!(answers(&mut net, caller), [""; 0]);
    answer(&mut net, second, &busy[0]);
    assert_eq!(calls(&mut net, second)[0]["attempt"], 2);
    // With its last handler the call ends too.
    net.hang_up(second);
    let ended = answers(&mut net, caller);
    assert_eq!(ended, ["2:null", "1:handler_gone"]);
    net.world.check();
}

#[test]
fn redelivered_calls_wait_for_busy_handlers_and_go_before_parked_ones() {
    let mut net = Net::with(|l| l.in_flight_max = 4);
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2", "3", "4"], "");
    let second = join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":1}]"#,
    );
    net.hang_up(first);
    let other = net.app("other", "");
    park(&mut net, other, "parked", r#","data":"parked""#);
    let mut given = calls(&mut net, second);
    assert_eq!(given.len(), 1);
    // While they wait, they are offered again now and then, and are still their caller's calls.
    let steps = net.advance(10_000);
    assert!(steps < 1_000, "{steps} steps");
    assert_eq!(net.world.pool_stats("default").unwrap().calls_in_flight, 4);
    assert_eq!(answers(&mut net, caller), [""; 0]);
    for _ in 0..3 {
        answer(&mut net, second, &given[0]);
        given = calls(&mut net, second);
        assert_eq!((given.len(), &given[0]["attempt"]), (1, &2.into()));
    }
    answer(&mut net, second, &given[0]);
    assert_eq!(calls(&mut net, second)[0]["data"], "parked");
    net.world.check();
}

#[test]
fn redelivered_calls_end_in_time_while_all_handlers_are_busy() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2", "3"], r#""ttl":5000,"#);
    join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":1}]"#,
    );
    net.hang_up(first);
    net.advance(5_200);
    let mut ended = answers(&mut net, caller);
    ended.sort();
    assert_eq!(ended, ["1:timeout", "2:timeout", "3:timeout"]);
    net.world.check();
}

#[test]
fn items_are_allowed_to_a_call_that_waits_for_another_handler() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2"], r#""window":2,"#);
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(first);
    assert_eq!(calls(&mut net, second).len(), 1);
    net.say(caller, r#"{"action":"ack","id":"1","count":3}"#);
    net.say(caller, r#"{"action":"ack","id":"2","count":3}"#);
    net.advance(1);
    assert_eq!(calls(&mut net, second)[0]["window"], 5);
}

#[test]
fn a_call_that_waits_for_another_handler_ends_with_its_caller() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let first = join(&mut net, "handler", r#""triggers":["t"]"#);
    call_large(&mut net, caller, &["1", "2"], "");
    let second = join(&mut net, "handler", r#""triggers":["t"]"#);
    net.hang_up(first);
    assert_eq!(calls(&mut net, second).len(), 1);
    // Both are answered, the one that runs and the one that waits.
    net.say(caller, r#"{"action":"pool_leave","pool":"default"}"#);
    let mut ended = answers(&mut net, caller);
    ended.sort();
    assert_eq!(ended, ["1:cancelled", "2:cancelled"]);
    net.advance(1);
    assert_eq!(calls(&mut net, second).len(), 0);
    net.world.check();
}

#[test]
fn busy_handlers_get_parked_calls_in_order_as_room_allows() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    for n in 0..600 {
        park(&mut net, caller, &n.to_string(), &format!(r#","data":{n}"#));
    }
    let handler = join(
        &mut net,
        "handler",
        r#""triggers":[{"name":"t","concurrency":2}]"#,
    );
    let mut next = 0;
    loop {
        let got = calls(&mut net, handler);
        if got.is_empty() {
            break;
        }
        assert!(got.len() <= 2);
        for call in &got {
            assert_eq!(call["data"], next);
            next += 1;
            answer(&mut net, handler, call);
        }
        net.advance(1);
    }
    assert_eq!(next, 600);
    // A handler without its own limit gets all of them, some at a time.
    net.hang_up(handler);
    for n in 600..1200 {
        park(&mut net, caller, &n.to_string(), "");
    }
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    let at_once = calls(&mut net, handler).len();
    assert!((1..600).contains(&at_once), "{at_once}");
    let mut got = at_once;
    while got < 600 {
        net.advance(1);
        let more = calls(&mut net, handler).len();
        assert!(more > 0);
        got += more;
    }
}

#[test]
fn parked_calls_are_bounded() {
    let mut net = Net::with(|limits| limits.parked_max = 2);
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", "");
    park(&mut net, caller, "2", "");
    assert_eq!(
        park(&mut net, caller, "3", ""),
        "3 failed: overloaded ran=no"
    );
    let mut net = Net::with(|limits| limits.parked_bytes_max = 2000);
    let caller = net.app("caller", "");
    let data = format!(r#","data":"{}""#, "x".repeat(2000));
    assert_eq!(
        park(&mut net, caller, "1", &data),
        "1 failed: overloaded ran=no"
    );
    assert_eq!(park(&mut net, caller, "2", ""), "2 parked: null");
}

#[test]
fn parked_is_acknowledged_only_once_it_is_on_disk() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    net.world.hold_disk(true);
    assert_eq!(park(&mut net, caller, "1", ""), "");
    // Its handler connects before the write is done: only the answer is left to send.
    let handler = net.connect();
    net.say(
        handler,
        r#"{"action":"handshake","app_id":"h","triggers":["t"],"transient":true}"#,
    );
    let got = calls(&mut net, handler);
    answer(&mut net, handler, &got[0]);
    net.world.hold_disk(false);
    assert_eq!(net.sees(caller), "1 ok: null");
    net.hang_up(handler);
    // A full disk refuses the call, and nothing waits.
    net.world.fill_disk(true);
    assert_eq!(
        park(&mut net, caller, "2", ""),
        "2 failed: storage ran=unknown"
    );
    net.world.fill_disk(false);
    let handler = join(&mut net, "h", r#""triggers":["t"]"#);
    assert_eq!(calls(&mut net, handler), Vec::<Value>::new());
    assert!(net.world.rows().calls.is_empty() && net.world.storages().is_empty());
}

/// After the caller was notified of such an end, a kill must not undo it.
#[test]
fn an_end_is_reported_only_once_it_is_on_disk() {
    fn handler(net: &mut Net) -> Peer {
        join(net, "h", r#""triggers":["t"],"transient":true"#)
    }
    fn cancel(net: &mut Net, caller: Peer) {
        net.say(caller, r#"{"action":"cancel","id":"1"}"#);
    }
    fn expire(net: &mut Net, _: Peer) {
        net.advance(2000);
    }
    fn fail(net: &mut Net, _: Peer) {
        let handler = handler(net);
        assert_eq!(calls(net, handler).len(), 1);
        net.hang_up(handler);
    }
    fn answered(net: &mut Net, _: Peer) {
        let handler = handler(net);
        let got = calls(net, handler);
        answer(net, handler, &got[0]);
        net.hang_up(handler);
    }
    let key = r#","headers":{"idempotency-key":"k"}"#;
    type End = fn(&mut Net, Peer);
    let ends: [(End, &str, &str); 5] = [
        (cancel, "", "1:cancelled"),
        (expire, r#","ttl":1000"#, "1:timeout"),
        (fail, "", "1:handler_gone"),
        (
            fail,
            r#","redeliver":true,"attempts":1"#,
            "1:attempts_exhausted",
        ),
        (answered, key, "1:null"),
    ];
    for (end, more, said) in ends {
        for is_killed in [false, true] {
            let mut net = Net::new();
            let caller = net.app("caller", "");
            assert_eq!(park(&mut net, caller, "1", more), "1 parked: null");
            // Another call with the same key waits for the same answer.
            if more == key {
                assert_eq!(park(&mut net, caller, "2", more), "2 parked: null");
            }
            net.world.hold_disk(true);
            end(&mut net, caller);
            assert_eq!(answers(&mut net, caller), Vec::<String>::new(), "{said}");
            if is_killed {
                net.world.restart(1);
                assert_eq!(
                    net.world.rows().calls.len(),
                    if more == key { 2 } else { 1 },
                    "{said}: it looks as if it had not ended"
                );
                continue;
            }
            net.world.hold_disk(false);
            let mut seen = answers(&mut net, caller);
            seen.sort_unstable();
            assert_eq!(seen[0], said);
            assert_eq!(seen.len(), if more == key { 2 } else { 1 }, "{seen:?}");
            net.world.restart(2);
            let handler = handler(&mut net);
            assert_eq!(calls(&mut net, handler), Vec::<Value>::new(), "{said}");
        }
    }
    // A disk that accepts no writes delays nothing.
    let mut net = Net::new();
    let caller = net.app("caller", "");
    assert_eq!(park(&mut net, caller, "1", ""), "1 parked: null");
    net.world.fill_disk(true);
    cancel(&mut net, caller);
    assert_eq!(answers(&mut net, caller), ["1:cancelled"]);
    net.world.fill_disk(false);
    assert!(net.world.rows().calls.is_empty() && net.world.rows().answers.is_empty());
}

#[test]
fn a_call_that_is_always_parked_is_on_disk_even_if_a_handler_is_free() {
    let mut net = Net::new();
    let caller = net.app("caller", "");
    let handler = net.app("h", r#""triggers":["t"]"#);
    let always = r#"{"action":"trigger","process":"t","id":"1","park":"always","data":7}"#;
    assert_eq!(net.ask(caller, always), "1 parked: null");
    let got = calls(&mut net, handler);
    assert_eq!((got.len(), &got[0]["attempt"]), (1, &1.into()));
    assert_eq!(net.world.rows().calls.len(), 1);
    // Its caller disconnects, and another instance of the app gets the answer.
    net.hang_up(caller);
    answer(&mut net, handler, &got[0]);
    let caller = join(&mut net, "caller", "");
    assert_eq!(answers(&mut net, caller), ["1:7"]);
    let wrong = always.replace("always", "sometimes");
    assert_eq!(net.ask(caller, &wrong), "1 failed: bad_message ran=no");
}

#[test]
fn a_parked_repeat_waits_for_the_answer_of_the_first_call_over_restarts() {
    let key = r#","headers":{"idempotency-key":"k"}"#;
    for restarts in [false, true] {
        let mut net = Net::new();
        let mut caller = net.app("caller", "");
        net.world.hold_disk(true);
        assert_eq!(park(&mut net, caller, "1", key), "");
        assert_eq!(park(&mut net, caller, "2", key), "");
        net.world.hold_disk(false);
        assert_eq!(net.sees(caller), "1 parked: null; 2 parked: null");
        // Sent again with its own id, it is the same call.
        assert_eq!(park(&mut net, caller, "1", key), "1 parked: null");
        // Cancelling a repeat does not affect the first call, and neither does its expiry.
        let ttl = format!(r#"{key},"ttl":500"#);
        assert_eq!(park(&mut net, caller, "3", &ttl), "3 parked: null");
        assert_eq!(park(&mut net, caller, "4", key), "4 parked: null");
        net.say(caller, r#"{"action":"cancel","id":"4"}"#);
        net.advance(600);
        assert_eq!(answers(&mut net, caller), ["4:cancelled", "3:timeout"]);
        if restarts {
            net.world.restart(1);
            caller = net.app("caller", "");
        }
        let handler = join(&mut net, "h", r#""triggers":["t"]"#);
        let got = calls(&mut net, handler);
        assert_eq!(got.len(), 1, "one program serves all calls");
        if restarts {
            net.world.restart(2);
            caller = net.app("caller", "");
            let handler = join(&mut net, "h", r#""triggers":["t"]"#);
            let got = calls(&mut net, handler);
            assert_eq!((got.len(), &got[0]["attempt"]), (1, &2.into()));
            answer(&mut net, handler, &got[0]);
        } else {
            answer(&mut net, handler, &got[0]);
        }
        let mut seen = answers(&mut net, caller);
        seen.sort_unstable();
        assert_eq!(seen, ["1:null", "2:null"]);
        assert!(net.world.rows().calls.is_empty() && net.world.rows().answers.is_empty());
    }
}

/// The first call's answer is on disk, and its repeat's answer is not.
#[test]
fn a_kill_between_an_answer_and_its_repeats_runs_nothing_again() {
    let key = r#","headers":{"idempotency-key":"k"}"#;
    let mut net = Net::new();
    let caller = net.app("caller", "");
    park(&mut net, caller, "1", key);
    park(&mut net, caller, "2", key);
    let handler = join(&mut net, "h", r#""triggers":["t"],"transient":true"#);
    let got = calls(&mut net, handler);
    let both = net.world.rows().clone();
    answer(&mut net, handler, &got[0]);
    let mut rows = both;
    let first = *rows.calls.keys().next().unwrap();
    let row = rows.calls.remove(&first).unwrap();
    let answer = latzero_fabric::rows::AnswerRow {
        number: first,
        pool: row.pool,
        process: row.process,
        caller: row.caller,
        id: row.id,
        idempotency_key: Some("t\n\nk".into()),
        frame: b"\x0f\0\0\0{\"status\":\"ok\"}".to_vec(),
        expires: u64::MAX,
    };
    rows.answers.insert(first, answer);
    net.world.restart_with(3, rows);
    let caller = join(&mut net, "caller", "");
    let mut seen = answers(&mut net, caller);
    seen.sort_unstable();
    assert_eq!(seen, ["1:null", "2:null"]);
    let handler = join(&mut net, "h", r#""triggers":["t"]"#);
    assert_eq!(calls(&mut net, handler), Vec::<Value>::new());
}

#[test]
fn a_pool_stays_with_its_parked_calls_and_is_removed_with_them() {
    let mut net = Net::new();
    let caller = net.app("caller", r#""pools":["p"]"#);
    park(&mut net, caller, "1", "");
    net.hang_up(caller);
    assert!(net.world.pool_names().contains(&"p".to_owned()));
    net.world.restart(1);
    assert!(net.world.pool_names().contains(&"p".to_owned()));
    let handler = join(&mut net, "h", r#""pools":["p"],"triggers":["t"]"#);
    let got = calls(&mut net, handler);
    answer(&mut net, handler, &got[0]);
    net.hang_up(handler);
    assert!(net.world.pool_names().contains(&"p".to_owned()));
    let caller = net.connect();
    net.say(caller, r#"{"action":"handshake","app_id":"caller"}"#);
    assert_eq!(answers(&mut net, caller), ["1:null"]);
    net.hang_up(caller);
    assert!(!net.world.pool_names().contains(&"p".to_owned()));
}

/// Random connects, disconnects, kills and full disks: every call that was acknowledged as parked
/// is finally answered exactly once, and no refused call is delivered.
#[test]
fn nothing_that_was_parked_is_lost() {
    for seed in 0..300 {
        let mut prng = Prng::new(seed);
        // Data in a socket's buffer is lost when its client dies.
        let bounds = Bounds {
            socket_bytes: 0,
            ..Bounds::default()
        };
        let mut net = Net::bounded(Limits::default(), bounds);
        let mut caller = Some(net.app("caller", ""));
        let mut handler: Option<Peer> = None;
        let mut open: Vec<Value> = Vec::new();
        let mut parked = BTreeSet::new();
        let mut refused = BTreeSet::new();
        let mut answered: BTreeMap<String, u32> = BTreeMap::new();
        let mut asked = 0;
        // If the server dies before the end of a call is stored, it delivers the call again.
        let mut may_repeat = false;
        let mut log = Vec::new();
        let mut read = |net: &mut Net,
                        caller: Option<Peer>,
                        parked: &mut BTreeSet<String>,
                        refused: &mut BTreeSet<String>| {
            for message in caller.map(|c| net.messages(c)).unwrap_or_default() {
                let json = message.json;
                let Some(id) = json["in_reply_to"].as_str().map(str::to_owned) else {
                    continue;
                };
                if json["status"] == "parked" {
                    parked.insert(id);
                } else if json["error"]["code"] == "storage" {
                    refused.insert(id);
                } else {
                    assert!(!refused.contains(&id), "{id} was refused");
                    *answered.entry(id).or_default() += 1;
                }
            }
            answered.clone()
        };
        for _ in 0..60 {
            let step = prng.below(100);
            log.push(step);
            match step {
                0..=34 => {
                    if let Some(caller) = caller {
                        asked += 1;
                        let redeliver = if prng.below(2) == 0 {
                            r#","redeliver":true,"attempts":1000"#
                        } else {
                            ""
                        };
                        net.say(caller, &format!(r#"{{"action":"trigger","process":"t","id":"c{asked}","park":true,"ttl":86400000{redeliver}}}"#));
                    }
                }
                35..=44 => {
                    if let Some(peer) = handler.take() {
                        net.hang_up(peer);
                        open.clear();
                    }
                }
                45..=59 if handler.is_none() => {
                    handler = Some(net.connect());
                    net.say(
                        handler.unwrap(),
                        r#"{"action":"handshake","app_id":"handler","triggers":["t"]}"#,
                    );
                }
                60..=74 => {
                    if let (Some(handler), false) = (handler, open.is_empty()) {
                        let call = open.remove(prng.below(open.len()));
                        answer(&mut net, handler, &call);
                    }
                }
                75..=79 => {
                    if let Some(peer) = caller.take() {
                        read(&mut net, Some(peer), &mut parked, &mut refused);
                        net.hang_up(peer);
                    }
                }
                80..=86 if caller.is_none() => {
                    caller = Some(net.connect());
                    net.say(
                        caller.unwrap(),
                        r#"{"action":"handshake","app_id":"caller"}"#,
                    );
                }
                87..=90 => {
                    may_repeat = true;
                    net.world.hold_disk(prng.below(2) == 0);
                }
                91..=93 => {
                    may_repeat = true;
                    net.world.fill_disk(prng.below(2) == 0);
                }
                94..=96 => {
                    read(&mut net, caller, &mut parked, &mut refused);
                    net.world.restart(seed);
                    (caller, handler) = (None, None);
                    open.clear();
                }
                _ => {
                    net.advance(prng.below(2000) as u64);
                }
            }
            if let Some(peer) = handler {
                let messages = net.messages(peer).into_iter().map(|m| m.json);
                open.extend(messages.filter(|m| m["action"] == "trigger"));
            }
            read(&mut net, caller, &mut parked, &mut refused);
            net.world.check();
        }
        // At the end everybody is connected, and the disk works.
        net.world.hold_disk(false);
        net.world.fill_disk(false);
        if caller.is_none() {
            caller = Some(net.connect());
            net.say(
                caller.unwrap(),
                r#"{"action":"handshake","app_id":"caller"}"#,
            );
        }
        if handler.is_none() {
            handler = Some(net.connect());
            net.say(
                handler.unwrap(),
                r#"{"action":"handshake","app_id":"handler","triggers":["t"]}"#,
            );
        }
        let handler = handler.unwrap();
        for _ in 0..50 {
            let messages = net.messages(handler).into_iter().map(|m| m.json);
            open.extend(messages.filter(|m| m["action"] == "trigger"));
            for call in std::mem::take(&mut open) {
                answer(&mut net, handler, &call);
            }
            net.advance(20_000);
        }
        let answered = read(&mut net, caller, &mut parked, &mut refused);
        for id in &parked {
            let times = answered.get(id).copied().unwrap_or(0);
            assert!(
                times == 1 || (times > 1 && may_repeat),
                "call {id} of seed {seed} was answered {times} times: {log:?}"
            );
        }
        assert!(net.world.rows().calls.is_empty(), "seed {seed}");
        assert!(net.world.rows().answers.is_empty(), "seed {seed}");
    }
}

/// Sends many calls of trigger `t` in pool `p` at once.
fn call_many(net: &mut Net, peer: Peer, ids: std::ops::Range<u32>, more: &str) {
    let call = |id| format!(r#"{{"action":"trigger","pool":"p","process":"t","id":"{id}"{more}}}"#);
    let frames: Vec<u8> = ids
        .flat_map(|id| latzero_sim::encode_frame(&call(id), None))
        .collect();
    net.world.feed(peer, &frames);
    net.world.check();
}

/// The ids of the calls that failed because their pool was removed.
fn failed(net: &mut Net, peer: Peer) -> BTreeSet<String> {
    let messages = net.messages(peer).into_iter().map(|m| m.json);
    let of_removal = ["handler_gone", "no_pool"];
    let messages = messages.filter(|m| {
        m["error"]["code"]
            .as_str()
            .is_some_and(|code| of_removal.contains(&code))
    });
    let ids = messages.map(|m| m["in_reply_to"].as_str().unwrap().to_owned());
    ids.collect()
}

#[test]
fn a_pool_with_very_many_calls_is_removed_in_steps() {
    let mut net = Net::with(|limits| limits.in_flight_max = 5000);
    let keeper = net.app("keeper", r#""pools":["p"]"#);
    // A handler takes at most 1,024 calls of one caller.
    let handlers = ["h1", "h2", "h3"].map(|app| {
        let serves = r#""pools":["p"],"triggers":[{"name":"t","concurrency":5000}]"#;
        net.app(app, serves)
    });
    let caller = net.app("caller", r#""pools":["p"]"#);
    let late = net.app("late", r#""pools":["p"]"#);
    call_many(&mut net, caller, 0..1500, "");
    call_many(&mut net, caller, 1500..3000, r#","redeliver":true"#);
    let parked = r#","park":"always""#;
    let nobody = r#","park":true,"destination":{"app_id":"keeper"}"#;
    call_many(&mut net, late, 0..1500, parked);
    call_many(&mut net, late, 1500..3000, nobody);
    assert_eq!(net.world.calls_in_flight(), 4500);
    for peer in handlers.into_iter().chain([caller, late]) {
        net.sees(peer);
    }
    let remove = r#"{"action":"pool_remove","id":"1","pool":"p","force":true}"#;
    let admin = net.world.connect(Transport::BuiltIn);
    net.say(admin, r#"{"action":"handshake","app_id":"latzero"}"#);
    net.say(admin, remove);
    assert!(net.sees(admin).contains("1 ok"));
    // No row stays, whatever is left to do.
    assert_eq!(net.world.rows().calls.len(), 0);
    let mut ended = failed(&mut net, caller).len();
    assert!((1..3000).contains(&ended), "{ended}");
    assert_ne!(net.world.held(Resource::ParkedCalls), 0);
    // Neither the handler nor the caller reaches what has not ended yet, and a new pool of the name
    // has nothing of it.
    let call = net
        .calls_of(handlers[0])
        .first()
        .cloned()
        .unwrap_or_default();
    net.answer_to(handlers[0], &call, r#""status":"ok","response":1"#);
    net.say(caller, r#"{"action":"cancel","id":"2999"}"#);
    net.say(caller, r#"{"action":"ack","id":"2998","count":1}"#);
    let again = net.app("again", r#""pools":["p"],"triggers":["t"]"#);
    net.say(again, r#"{"action":"pool_info","id":"i","pool":"p"}"#);
    net.hang_up(keeper);
    assert!((2..9).contains(&net.advance(100)));
    net.world.check_ledger();
    assert_eq!(net.world.held(Resource::ParkedCalls), 0);
    assert_eq!(net.world.held(Resource::Redelivery), 0);
    ended += failed(&mut net, caller).len();
    assert_eq!((ended, failed(&mut net, late).len()), (3000, 3000));
    assert_eq!(net.calls_of(again).len(), 0);
}

#[test]
fn the_deepest_data_is_parked_and_outlives_the_server() {
    let mut net = Net::new();
    let nested = |levels| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let caller = net.app("caller", "");
    let seen = park(
        &mut net,
        caller,
        "1",
        &format!(r#","data":{}"#, nested(128)),
    );
    assert_eq!(seen, "1 parked: null");
    let seen = park(
        &mut net,
        caller,
        "2",
        &format!(r#","data":{}"#, nested(129)),
    );
    assert_eq!(seen, "2 failed: too_deep ran=no");
    // Inside the reply it would be too deep.
    let show = r#"{"action":"parked_info","id":"s","number":1}"#;
    net.say(caller, show);
    let shown = net.messages(caller).remove(0).json["response"].clone();
    assert_eq!(
        (&shown["data"], &shown["data_bytes"]),
        (&Value::Null, &256.into()),
        "{shown}"
    );
    net.world.restart(8);
    let handler = join(&mut net, "handler", r#""triggers":["t"]"#);
    let calls = net.world.read(handler, usize::MAX);
    let text = String::from_utf8_lossy(&calls).into_owned();
    assert!(text.contains(&nested(128)), "{text}");
}

#[test]
fn an_instance_that_holds_answers_is_told_what_became_of_its_call() {
    for (is_full, told) in [
        (false, "1 parked: null"),
        (true, "1 failed: storage ran=unknown"),
    ] {
        let mut net = Net::new();
        let handler = net.app("handler", r#""triggers":["t"]"#);
        let other = net.app("caller", "");
        let holder = net.app("caller", r#""hold_answers":true"#);
        net.world.hold_disk(true);
        let call = r#""park":"always","redeliver":true"#;
        assert_eq!(net.call(holder, "1", call), "");
        net.answer(handler, r#""status":"ok","response":7"#);
        net.world.fill_disk(is_full);
        net.world.hold_disk(false);
        assert_eq!(net.sees(holder), told);
        assert!(net.sees(other).contains("1 ok: 7"));
    }
}
