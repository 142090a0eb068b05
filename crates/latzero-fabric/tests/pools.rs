//! Emits, triggers that are added and removed, pools, presence and administration: sections 5, 6, 8
//! and 9 of the protocol.

mod net;
use latzero_fabric::ledger::Resource;
use latzero_fabric::{Limits, Transport};
use latzero_sim::{Bounds, admin_proof};
use net::Net;

#[test]
fn an_emit_reaches_every_handler_or_one_or_its_destination() {
    let mut net = Net::new();
    let handlers = ["x", "y", "x"].map(|app| net.app(app, r#""triggers":["t"]"#));
    let outside = net.app("x", r#""pools":["p"],"triggers":["t"]"#);
    let c = net.app("c", "");
    let mut cases = |more: &str, expected: usize| {
        let emit = format!(r#"{{"action":"emit","process":"t","id":"e","data":1{more}}}"#);
        assert_eq!(
            net.ask(c, &emit),
            format!(r#"e ok: {{"delivered":{expected}}}"#),
            "{more}"
        );
        let got = handlers
            .iter()
            .filter(|&&h| net.sees(h) == "emit t from c: 1")
            .count();
        assert_eq!(got, expected, "{more}");
        assert_eq!(net.sees(outside), "");
    };
    cases("", 3);
    cases(r#","deliver":"all""#, 3);
    cases(r#","deliver":"one""#, 1);
    cases(r#","destination":"x""#, 2);
    cases(r#","destination":"x","deliver":"one""#, 1);
    cases(r#","destination":"nobody""#, 0);
    let silent = r#"{"action":"emit","process":"t"}"#;
    assert_eq!(net.ask(c, silent), "");
    for h in handlers {
        net.sees(h);
    }
    for (emit, expected) in [
        (
            r#"{"action":"emit","process":"u","id":"e"}"#,
            r#"e ok: {"delivered":0}"#,
        ),
        (
            r#"{"action":"emit","process":"a b","id":"e"}"#,
            "e failed: invalid_name ran=no",
        ),
        (
            r#"{"action":"emit","process":"t","pool":"p","id":"e"}"#,
            "e failed: not_member ran=no",
        ),
        (
            r#"{"action":"emit","process":"t","deliver":"some"}"#,
            "error bad_message",
        ),
    ] {
        assert_eq!(net.ask(c, emit), expected);
    }
}

#[test]
fn an_emit_with_raw_bytes_has_the_form_that_each_receiver_supports() {
    let mut net = Net::new();
    let raw = net.app("raw", r#""triggers":["t"],"features":["attachments"]"#);
    let plain = net.app("plain", r#""triggers":["t"]"#);
    net.say_raw(
        raw,
        r#"{"action":"emit","process":"t","id":"e"}"#,
        b"\x00\xff",
    );
    assert_eq!(net.sees(plain), "emit t from raw: base64:AP8=");
    assert_eq!(
        net.sees(raw),
        r#"emit t from raw: raw:\x00\xff; e ok: {"delivered":2}"#
    );
}

#[test]
fn a_slow_reader_loses_emits_and_is_notified_how_many() {
    let bounds = Bounds {
        outbox_bytes: 600,
        headroom_bytes: 1500,
        socket_bytes: 0,
    };
    let mut net = Net::bounded(Limits::default(), bounds);
    let slow = net.app("slow", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    let emit = format!(
        r#"{{"action":"emit","process":"t","id":"e","data":"{}"}}"#,
        "x".repeat(300)
    );
    assert_eq!(net.ask(c, &emit), r#"e ok: {"delivered":1}"#);
    for _ in 0..3 {
        assert_eq!(net.ask(c, &emit), r#"e ok: {"delivered":0}"#);
    }
    // The notice is sent as soon as there is room, not with the next emit.
    let seen = net.sees(slow);
    assert!(
        seen.starts_with("emit") && seen.ends_with("; lost 3"),
        "{seen}"
    );
    assert_eq!(net.ask(c, &emit), r#"e ok: {"delivered":1}"#);
    assert!(net.sees(slow).starts_with("emit"));
}

#[test]
fn triggers_come_and_go() {
    let mut net = Net::new();
    let h = net.app("h", r#""pools":["p","q"]"#);
    let c = net.app("c", r#""pools":["p","q"]"#);
    net.ask(c, r#"{"action":"watch","pool":"p"}"#);
    let register =
        |list: &str| format!(r#"{{"action":"trigger_register","id":"r","triggers":[{list}]}}"#);
    assert_eq!(
        net.ask(h, &register(r#""t","u""#)),
        r#"r ok: {"triggers":["t","u"]}"#
    );
    assert_eq!(net.sees(c), "trigger_added p h t; trigger_added p h u");
    for pool in ["p", "q"] {
        assert_eq!(net.call(c, pool, &format!(r#""pool":"{pool}""#)), "");
    }
    // For one pool only, from now on; calls in progress may still be answered.
    net.ask(h, &register(r#"{"name":"t","pools":["q"]}"#));
    assert_eq!(net.sees(c), "trigger_removed p h t");
    assert_eq!(
        net.call(c, "1", r#""pool":"p""#),
        "1 failed: no_handler ran=no"
    );
    net.answer(h, r#""status":"ok","response":7"#);
    assert_eq!(net.sees(c), "q ok: 7");
    let unregister = r#"{"action":"trigger_unregister","id":"u","triggers":["t","never"]}"#;
    assert_eq!(net.ask(h, unregister), r#"u ok: {"triggers":["u"]}"#);
    assert_eq!(
        net.call(c, "2", r#""pool":"q""#),
        "2 failed: no_handler ran=no"
    );
    for (list, expected) in [
        (
            r#"{"name":"t","pools":["system"]}"#,
            "r failed: forbidden ran=no",
        ),
        (r#""a b""#, "r failed: invalid_name ran=no"),
        ("7", "r failed: bad_message ran=no"),
    ] {
        assert_eq!(net.ask(h, &register(list)), expected);
    }
    assert_eq!(
        net.ask(h, r#"{"action":"trigger_register","id":"r"}"#),
        "r failed: bad_message ran=no"
    );
}

#[test]
fn pools_are_created_joined_left_and_removed() {
    let mut net = Net::new();
    let a = net.app("a", "");
    let b = net.app("b", "");
    let ask = |net: &mut Net, peer, action: &str, more: &str| {
        let seen = net.ask(
            peer,
            &format!(r#"{{"action":"{action}","id":"1","pool":"made"{more}}}"#),
        );
        seen.trim_start_matches("1 ").to_owned()
    };
    assert_eq!(ask(&mut net, a, "pool_info", ""), "failed: no_pool ran=no");
    assert_eq!(
        ask(&mut net, a, "pool_remove", ""),
        "failed: no_pool ran=no"
    );
    assert_eq!(
        ask(&mut net, a, "pool_leave", ""),
        "failed: not_member ran=no"
    );
    let made = ask(&mut net, a, "pool_create", r#","properties":{"x":1}"#);
    for part in [
        r#""owner":"a""#,
        r#""properties":{"x":1}"#,
        r#""members":0"#,
        r#""kind":"local""#,
    ] {
        assert!(made.contains(part), "{made}");
    }
    assert_eq!(
        ask(&mut net, b, "pool_create", ""),
        "failed: pool_exists ran=no"
    );
    for more in [
        r#","kind":"global""#,
        r#","kind":"odd""#,
        r#","encrypted":true"#,
        r#","policy":[]"#,
        r#","properties":1"#,
    ] {
        assert_eq!(
            ask(&mut net, a, "pool_create", more),
            "failed: bad_message ran=no",
            "{more}"
        );
    }
    assert_eq!(ask(&mut net, b, "pool_join", ""), "ok: {}");
    assert_eq!(ask(&mut net, b, "pool_join", ""), "ok: {}");
    assert!(ask(&mut net, a, "pool_info", "").contains(r#""members":1"#));
    assert_eq!(
        ask(&mut net, b, "pool_remove", r#","force":true"#),
        "failed: forbidden ran=no"
    );
    assert_eq!(
        ask(&mut net, a, "pool_remove", ""),
        "failed: forbidden ran=no"
    );
    assert_eq!(
        ask(&mut net, a, "pool_remove", r#","force":true"#),
        "ok: {}"
    );
    assert_eq!(net.sees(b), "pool_removed made");
    assert_eq!(ask(&mut net, b, "watch", ""), "failed: not_member ran=no");
    // A new pool with the same name is a different pool.
    assert!(ask(&mut net, a, "pool_create", "").starts_with("ok"));
    assert_eq!(
        net.ask(b, r#"{"action":"emit","process":"t","pool":"made"}"#),
        "error not_member"
    );
    assert_eq!(ask(&mut net, b, "pool_join", ""), "ok: {}");
    assert_eq!(
        net.ask(b, r#"{"action":"emit","process":"t","pool":"made"}"#),
        ""
    );
    assert_eq!(ask(&mut net, b, "pool_leave", ""), "ok: {}");
    // A pool that was created explicitly stays without members.
    assert!(ask(&mut net, a, "pool_info", "").contains(r#""members":0"#));
    assert_eq!(ask(&mut net, a, "pool_remove", ""), "ok: {}");
}

#[test]
fn built_in_pools_stay_and_the_systems_is_reserved() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["default","system"],"triggers":["echo"]"#);
    for pool in ["default", "system"] {
        let remove = format!(r#"{{"action":"pool_remove","id":"1","pool":"{pool}","force":true}}"#);
        assert_eq!(net.ask(a, &remove), "1 failed: forbidden ran=no");
        let create = format!(r#"{{"action":"pool_create","id":"1","pool":"{pool}"}}"#);
        assert_eq!(net.ask(a, &create), "1 failed: pool_exists ran=no");
    }
    let echo = r#"{"action":"trigger","process":"echo","pool":"system","id":"1"}"#;
    assert_eq!(net.ask(a, echo), "1 failed: no_handler ran=no");
    let built_in = net.world.connect(Transport::BuiltIn);
    let hello =
        r#"{"action":"handshake","app_id":"latzero","pools":["system"],"triggers":["echo"]}"#;
    assert_eq!(net.ask(built_in, hello), r#"hello ["system"] ["echo"]"#);
    assert_eq!(net.ask(a, echo), "");
    assert_eq!(net.sees(built_in), "call echo from a: null");
}

#[test]
fn an_implicit_pool_ends_with_its_last_member() {
    let mut net = Net::new();
    let (a, b) = (
        net.app("a", r#""pools":["p"]"#),
        net.app("b", r#""pools":["p"]"#),
    );
    let remove = r#"{"action":"pool_remove","id":"1","pool":"p","force":true}"#;
    assert_eq!(net.ask(a, remove), "1 failed: forbidden ran=no");
    net.hang_up(a);
    assert_eq!(net.world.pool_names(), ["default", "p", "system"]);
    net.ask(b, r#"{"action":"pool_leave","pool":"p"}"#);
    assert_eq!(net.world.pool_names(), ["default", "system"]);
}

#[test]
fn listings_come_in_pages() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p","q"],"meta":{"v":1}"#);
    net.app(
        "b",
        r#""pools":["q"],"triggers":[{"name":"t","doc":"does"}]"#,
    );
    let gone = net.app("c", r#""pools":["q"]"#);
    net.hang_up(gone);
    let list = |net: &mut Net, more: &str, key: &str, name: &str| {
        let seen = net.ask(a, &format!(r#"{{"id":"1",{more}}}"#));
        let json = seen
            .strip_prefix("1 ok: ")
            .unwrap_or_else(|| panic!("{seen}"));
        let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
        let names: Vec<&str> = json[key]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|p| p[name].as_str())
            .collect();
        format!("{} {}", names.join(","), json["more"])
    };
    assert_eq!(
        list(&mut net, r#""action":"pool_list""#, "pools", "pool"),
        "default,p,q,system false"
    );
    assert_eq!(
        list(
            &mut net,
            r#""action":"pool_list","limit":2"#,
            "pools",
            "pool"
        ),
        "default,p true"
    );
    assert_eq!(
        list(
            &mut net,
            r#""action":"pool_list","limit":2,"after":"p""#,
            "pools",
            "pool"
        ),
        "q,system false"
    );
    assert_eq!(
        list(&mut net, r#""action":"app_list""#, "apps", "app_id"),
        "a,b,c false"
    );
    assert_eq!(
        list(
            &mut net,
            r#""action":"app_list","pool":"p""#,
            "apps",
            "app_id"
        ),
        "a false"
    );
    assert_eq!(
        list(
            &mut net,
            r#""action":"app_list","after":"a","limit":1"#,
            "apps",
            "app_id"
        ),
        "b true"
    );
    for (ask, code) in [
        (r#"{"action":"app_list","id":"1","pool":"none"}"#, "no_pool"),
        (r#"{"action":"app_list","id":"1","limit":0}"#, "bad_message"),
        (
            r#"{"action":"pool_list","id":"1","after":7}"#,
            "bad_message",
        ),
    ] {
        assert_eq!(net.ask(a, ask), format!("1 failed: {code} ran=no"));
    }
    net.say(a, r#"{"action":"app_list","id":"1"}"#);
    let apps = net.messages(a).remove(0).json["response"]["apps"].clone();
    assert_eq!(
        (&apps[0]["live"], &apps[2]["live"]),
        (&true.into(), &false.into())
    );
    assert_eq!(apps[0]["meta"]["v"], 1);
    assert_eq!(apps[1]["triggers"][0]["doc"], "does");
}

#[test]
fn watchers_get_the_events_they_asked_for() {
    let mut net = Net::new();
    let w = net.app("w", r#""pools":["p"]"#);
    assert_eq!(
        net.ask(w, r#"{"action":"watch","pool":"p","id":"1"}"#),
        "1 ok: {}"
    );
    let a = net.app("a", r#""pools":["p"],"triggers":["t"]"#);
    net.hang_up(a);
    assert_eq!(
        net.sees(w),
        "app_online p a; trigger_added p a t; trigger_removed p a t; app_offline p a"
    );
    net.ask(
        w,
        r#"{"action":"watch","pool":"p","events":["app_offline"]}"#,
    );
    let a = net.app("a", "");
    net.hang_up(a);
    assert_eq!(net.sees(w), "app_offline p a");
    net.ask(w, r#"{"action":"unwatch","pool":"p"}"#);
    net.app("a", "");
    assert_eq!(net.sees(w), "");
    for (watch, code) in [
        (r#"{"action":"watch","pool":"q","id":"1"}"#, "not_member"),
        (
            r#"{"action":"watch","pool":"p","events":["x"],"id":"1"}"#,
            "bad_message",
        ),
        (r#"{"action":"watch","id":"1"}"#, "bad_message"),
    ] {
        assert_eq!(net.ask(w, watch), format!("1 failed: {code} ran=no"));
    }
}

#[test]
fn events_of_one_message_are_held_once_for_all_watchers() {
    let mut net = Net::bounded(
        Limits::default(),
        Bounds {
            socket_bytes: 0,
            outbox_bytes: 70_000,
            ..Bounds::default()
        },
    );
    let watchers: Vec<_> = (0..50)
        .map(|i| {
            let w = net.app(&format!("w{i}"), "");
            net.ask(w, r#"{"action":"watch","pool":"default","id":"1"}"#);
            w
        })
        .collect();
    let a = net.app("a", "");
    watchers.iter().for_each(|&w| drop(net.sees(w)));
    let names: Vec<String> = (0..1000).map(|i| format!("\"t{i}\"")).collect();
    let register = format!(
        r#"{{"action":"trigger_register","triggers":[{}]}}"#,
        names.join(",")
    );
    let before = net.world.held(Resource::Outbox);
    net.say(a, &register);
    let held = net.world.held(Resource::Outbox) - before;
    assert!((64_000..150_000).contains(&held), "{held} bytes are held");
    for w in watchers {
        let seen = net.sees(w);
        let added = seen.matches("trigger_added default a t").count();
        let lost = seen.rsplit_once("; lost ").expect("its outbox was full").1;
        let lost: usize = lost.parse().expect("it is at the end");
        assert!(added > 300 && added + lost == 1000, "{added} and {lost}");
    }
}

#[test]
fn administration_needs_permission() {
    let mut net = Net::new();
    let (a, b) = (net.app("a", ""), net.app("b", ""));
    let twin = net.app("b", "");
    for action in [r#""kick","app_id":"b""#, r#""shutdown""#, r#""reload""#] {
        for token in ["", r#","token":"guessed""#] {
            let ask = format!(r#"{{"action":{action},"id":"1"{token}}}"#);
            assert_eq!(net.ask(a, &ask), "1 failed: forbidden ran=no");
        }
    }
    let [challenge, proof] = admin_proof();
    // A proof needs a challenge, and uses it up.
    net.say(a, &proof);
    assert_eq!(net.sees(a), "error unauthenticated");
    let reload = r#"{"action":"reload","id":"1"}"#;
    assert_eq!(net.ask(a, reload), "1 failed: forbidden ran=no");
    net.say(a, &challenge);
    net.say(a, &proof);
    net.say(a, &proof);
    assert_eq!(net.sees(a), "error unauthenticated");
    assert_eq!(net.ask(a, reload), "1 ok: {}");
    let kick = |more: &str| format!(r#"{{"action":"kick","app_id":"b","id":"1"{more}}}"#);
    assert_eq!(
        net.ask(a, &kick(r#","instance":"0000000000000001""#)),
        r#"1 ok: {"kicked":0}"#
    );
    assert_eq!(net.ask(a, &kick("")), r#"1 ok: {"kicked":2}"#);
    for gone in [b, twin] {
        assert_eq!(net.sees(gone), "kicked; (closed)");
    }
    assert_eq!(
        net.ask(a, r#"{"action":"kick","id":"1"}"#),
        "1 failed: bad_message ran=no"
    );
    assert_eq!(
        net.ask(a, r#"{"action":"health","id":"1"}"#),
        r#"1 ok: {"status":"ok"}"#
    );
}

#[test]
fn invalid_requests_are_answered_and_the_connection_stays_open() {
    let mut net = Net::new();
    let a = net.app("a", "");
    for (wrong, expected) in [
        (
            r#"{"action":"fly","id":"1"}"#,
            "1 failed: unknown_action ran=no",
        ),
        (r#"{"action":"fly"}"#, "error unknown_action"),
        (r#"{"id":"1"}"#, "1 failed: bad_message ran=no"),
        (r#"{"action":"ping","id":7}"#, "error bad_message"),
        (
            r#"{"action":"ping","id":"1","id":"2"}"#,
            "2 failed: bad_message ran=no",
        ),
        (
            r#"{"action":"ping","x":{"a":1},"x":2}"#,
            "error bad_message",
        ),
        (
            r#"{"action":"pool_join","id":"1"}"#,
            "1 failed: bad_message ran=no",
        ),
        (
            r#"{"action":"response","in_reply_to":"0.0.0","status":"fine"}"#,
            "error bad_message",
        ),
        (
            r#"{"action":"response","in_reply_to":"0.0.0","status":"ok"}"#,
            "",
        ),
        (
            r#"{"action":"ping","id":"1","unknown":[{}]}"#,
            r#"1 ok: {"time":1700000000000}"#,
        ),
    ] {
        assert_eq!(net.ask(a, wrong), expected, "{wrong}");
    }
}

#[test]
fn a_broken_body_fails_its_own_call() {
    let mut net = Net::new();
    let h = net.app("h", r#""triggers":["t"]"#);
    let c = net.app("c", "");
    net.call(c, "1", "");
    let first = net.last_call(h);
    net.call(c, "2", "");
    let second = net.last_call(h);
    let deep = format!("{}{}", "[".repeat(129), "]".repeat(129));
    for (data, code) in [
        ("NaN", "bad_message"),
        (&*deep, "too_deep"),
        ("{]", "bad_message"),
    ] {
        let seen = net.call(c, "3", &format!(r#""data":{data}"#));
        assert_eq!(seen, format!("3 failed: {code} ran=no"), "{data}");
    }
    // A malformed answer of a handler ends only its own call.
    let seen = net.answer_to(h, &first, r#""status":"ok","response":[1,]"#);
    assert_eq!(seen, "error bad_message");
    assert_eq!(net.sees(c), "1 failed: handler_error ran=unknown");
    net.call(c, "4", "");
    let fourth = net.last_call(h);
    net.answer_to(h, &fourth, r#""status":"fine""#);
    assert_eq!(net.sees(c), "4 failed: handler_error ran=unknown");
    net.answer_to(h, &second, r#""status":"ok""#);
    assert_eq!(net.sees(c), "2 ok: null");
    net.world.check();
}

#[test]
fn an_invalid_message_fails_alone() {
    let first = "error bad_frame; (closed)";
    let other_protocol = "error frame_too_large; (closed)";
    // Before and after the handshake. After it, the length prefix separates the message from
    // others.
    let cases: [(&[u8], &str, &str); 7] = [
        (&[0, 0, 0, 0], first, "error bad_message"),
        (b"GET / HTTP/1.1\r\n", other_protocol, other_protocol),
        (&[0x16, 3, 1, 2, 0], other_protocol, other_protocol),
        (&[0x80, 0, 0, 1, 0], other_protocol, other_protocol),
        (&[0, 0, 0, 2, b'[', b']'], first, "error bad_message"),
        (&[0, 0, 0, 1, 0xff], first, "error bad_message"),
        (&[0, 0, 0, 3, b'{', b'}', b'x'], first, "error bad_message"),
    ];
    let mut net = Net::new();
    let other = net.app("other", "");
    for (bytes, at_first, later) in cases {
        let stranger = net.connect();
        net.world.feed(stranger, bytes);
        assert_eq!(net.sees(stranger), at_first, "{bytes:?}");
        let app = net.app("a", "");
        net.world.feed(app, bytes);
        assert_eq!(net.sees(app), later, "{bytes:?}");
        if !later.contains("closed") {
            let seen = net.ask(app, r#"{"action":"ping","id":"1"}"#);
            assert!(seen.starts_with("1 ok"), "{seen}");
        }
        net.world.check();
    }
    let attachments = net.app("b", r#""features":["attachments"]"#);
    net.world
        .feed(attachments, &[0x80, 0, 0, 5, 0, 0, 0, 9, b'{']);
    assert_eq!(net.sees(attachments), "error bad_message");
    assert_eq!(
        net.ask(other, r#"{"action":"ping","id":"1"}"#),
        r#"1 ok: {"time":1700000000000}"#
    );
}

#[test]
fn the_policies_and_properties_of_pools_count_as_memory_of_their_user() {
    let names: Vec<String> = (0..64).map(|n| format!("\"app{n}\"")).collect();
    let list = names.join(",");
    let policy = format!(r#""policy":{{"join":[{list}],"serve":{{"deny":[{list}]}}}}"#);
    let numbers = vec!["0"; 4000].join(",");
    let properties = format!(r#""properties":{{"a":[{numbers}]}}"#);
    for more in [policy, properties] {
        let mut net = Net::with(|limits| limits.memory_max = 4 << 20);
        let a = net.stranger("a", "");
        let create = |n: usize| {
            format!(r#"{{"action":"pool_create","id":"c","pool":"p{n}","durable":false,{more}}}"#)
        };
        let created = (0..1000).find(|n| !net.ask(a, &create(*n)).starts_with("c ok"));
        let created = created.unwrap();
        assert!((5..150).contains(&created), "{created}");
        let refused = net.ask(a, &create(created));
        assert!(refused.starts_with("c failed: quota"), "{refused}");
        // What is removed is released.
        net.ask(
            a,
            r#"{"action":"pool_remove","id":"r","pool":"p0","force":true}"#,
        );
        assert!(net.ask(a, &create(created)).starts_with("c ok"));
        net.world.check_ledger();
    }
}

#[test]
fn answers_leave_room_for_the_errors_that_replace_them() {
    let mut net = Net::with(|limits| limits.outbox_total_bytes_max = 12_800 << 10);
    let handler = net.app("handler", r#""triggers":["t"]"#);
    let caller = net.stranger("caller", "");
    let text = "x".repeat(8_000);
    for id in 0..1200 {
        net.say(
            caller,
            &format!(r#"{{"action":"trigger","process":"t","id":"{id}"}}"#),
        );
        net.answer(handler, &format!(r#""status":"ok","response":"{text}""#));
    }
    assert!(net.world.is_open(caller));
    let messages = net.messages(caller);
    let of = |code| {
        messages
            .iter()
            .filter(|m| m.json["error"]["code"] == code)
            .count()
    };
    assert_eq!((messages.len(), of("overloaded") > 50), (1200, true));
}
