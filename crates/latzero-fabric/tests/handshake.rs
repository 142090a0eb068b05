//! The handshake, rehydration and instances: section 4 of the protocol.

mod net;
use net::Net;

#[test]
fn anything_before_the_handshake_is_not_ready() {
    let mut net = Net::new();
    let a = net.connect();
    for early in [
        r#"{"action":"ping","id":"1"}"#,
        r#"{"action":"fly","id":"1"}"#,
        r#"{"action":"trigger","id":"1"}"#,
        r#"{"id":"1"}"#,
    ] {
        assert_eq!(net.ask(a, early), "1 failed: not_ready ran=no", "{early}");
    }
    assert_eq!(
        net.ask(a, r#"{"action":"handshake","app_id":"a"}"#),
        r#"hello ["default"] []"#
    );
    assert_eq!(
        net.ask(a, r#"{"action":"handshake","app_id":"a","id":"2"}"#),
        "2 failed: already_ready ran=no"
    );
    assert_eq!(
        net.ask(a, r#"{"action":"ping","id":"3"}"#),
        r#"3 ok: {"time":1700000000000}"#
    );
}

#[test]
fn a_failed_handshake_is_answered_and_closed() {
    let cases = [
        (
            r#""id":"h","protocol":2"#,
            "h failed: unsupported_protocol ran=no; (closed)",
        ),
        (
            r#""id":"h","pools":["a b"]"#,
            "h failed: invalid_name ran=no; (closed)",
        ),
        (
            r#""id":"h","triggers":[{"name":"t","strategy":"best"}]"#,
            "h failed: bad_message ran=no; (closed)",
        ),
        (
            r#""id":"h","triggers":[{"name":"t","pools":["system"]}]"#,
            "h failed: forbidden ran=no; (closed)",
        ),
        (r#""meta":7"#, "error bad_message; (closed)"),
        (r#""id":"""#, "error bad_message; (closed)"),
    ];
    for (more, expected) in cases {
        assert_eq!(Net::new().hello("a", more).1, expected, "{more}");
    }
    assert_eq!(
        Net::new().hello("a/b", "").1,
        "error invalid_name; (closed)"
    );
    assert_eq!(
        Net::new().hello("latzero", "").1,
        "error forbidden; (closed)"
    );
    let mut net = Net::new();
    let a = net.connect();
    let escaped = r#"{"action":"hand\u0073hake","app_id":""}"#;
    assert_eq!(net.ask(a, escaped), "error invalid_name; (closed)");
}

#[test]
fn a_reconnecting_app_is_restored() {
    let mut net = Net::new();
    let w = net.app("w", r#""pools":["p"]"#);
    net.ask(w, r#"{"action":"watch","pool":"p"}"#);
    let a = net.app(
        "a",
        r#""pools":["p","q"],"triggers":["t",{"name":"u","pools":["q"]}]"#,
    );
    net.ask(
        a,
        r#"{"action":"watch","pool":"p","events":["app_online"]}"#,
    );
    net.hang_up(a);
    assert_eq!(
        net.sees(w),
        "app_online p a; trigger_added p a t; trigger_removed p a t; app_offline p a"
    );
    let (a, seen) = net.hello("a", "");
    assert_eq!(seen, r#"hello ["p","q"] ["t","u"] rehydrated"#);
    assert_eq!(net.sees(w), "app_online p a; trigger_added p a t");
    // Its watch is restored too.
    let b = net.app("b", r#""pools":["p"]"#);
    assert_eq!(net.sees(a), "app_online p b");
    assert_eq!(net.call(b, "1", ""), "");
    assert_eq!(net.sees(a), "call t from b: null");
    // A handshake that names pools or triggers replaces both.
    net.hang_up(a);
    assert_eq!(
        net.hello("a", r#""triggers":["v"]"#).1,
        r#"hello ["default"] ["v"]"#
    );
    assert_eq!(
        net.hello("a", "").1,
        r#"hello ["default"] ["v"] rehydrated"#
    );
    assert_eq!(net.hello("a", r#""pools":[]"#).1, r#"hello ["default"] []"#);
    assert_eq!(net.hello("never-seen", "").1, r#"hello ["default"] []"#);
}

#[test]
fn a_held_trigger_is_served_once_it_is_registered_again() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p"],"triggers":["t","u"]"#);
    net.hang_up(a);
    let b = net.app("b", r#""pools":["p"]"#);
    net.ask(b, r#"{"action":"watch","pool":"p"}"#);
    let (a, seen) = net.hello("a", r#""hold_triggers":true"#);
    assert_eq!(seen, r#"hello ["p"] ["t","u"] rehydrated"#);
    assert_eq!(net.sees(b), "app_online p a");
    assert_eq!(net.call(b, "1", ""), "1 failed: no_handler ran=no");
    net.ask(a, r#"{"action":"trigger_register","triggers":["t"]}"#);
    assert_eq!(net.sees(b), "trigger_added p a t");
    assert_eq!(net.call(b, "2", ""), "");
    assert_eq!(net.sees(a), "call t from b: null");
    // What was held stays in the registration. Without a registration nothing is held.
    net.hang_up(a);
    assert_eq!(net.hello("a", "").1, r#"hello ["p"] ["u","t"] rehydrated"#);
    let c = net.app(
        "c",
        r#""pools":["p"],"triggers":["t"],"hold_triggers":true"#,
    );
    net.ask(b, r#"{"action":"ping"}"#);
    assert_eq!(net.call(b, "3", r#""destination":"c""#), "");
    assert_eq!(net.sees(c), "call t from b: null");
}

#[test]
fn changes_made_while_connected_are_remembered() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p"],"triggers":["t"]"#);
    net.ask(a, r#"{"action":"pool_join","pool":"q"}"#);
    net.ask(a, r#"{"action":"pool_leave","pool":"p"}"#);
    net.ask(a, r#"{"action":"trigger_register","triggers":["u"]}"#);
    net.ask(a, r#"{"action":"trigger_unregister","triggers":["t"]}"#);
    net.hang_up(a);
    assert_eq!(net.hello("a", "").1, r#"hello ["q"] ["u"] rehydrated"#);
}

#[test]
fn instances_share_an_app_unless_one_asks_to_be_exclusive() {
    let mut net = Net::new();
    let first = net.app("a", "");
    let second = net.app("a", "");
    assert_eq!(
        net.hello("a", r#""exclusive":true"#).1,
        "error app_in_use; (closed)"
    );
    net.hang_up(first);
    net.hang_up(second);
    let alone = net.app("a", r#""exclusive":true"#);
    assert_eq!(net.hello("a", "").1, "error app_in_use; (closed)");
    let next = net.app("a", r#""takeover":true"#);
    assert_eq!(net.sees(alone), "displaced; (closed)");
    assert_eq!(
        net.hello("a", r#""exclusive":true"#).1,
        "error app_in_use; (closed)"
    );
    assert_eq!(net.sees(next), "");
    net.app("a", "");
}

#[test]
fn takeover_displaces_every_instance_and_ends_its_calls() {
    let mut net = Net::new();
    let (old, twin) = (
        net.app("a", r#""triggers":["t"]"#),
        net.app("a", r#""triggers":["t"]"#),
    );
    let b = net.app("b", "");
    net.call(b, "1", "");
    net.call(b, "2", "");
    let new = net.app("a", r#""takeover":true,"triggers":["t"]"#);
    assert_eq!(net.sees(old), "call t from b: null; displaced; (closed)");
    assert_eq!(net.sees(twin), "call t from b: null; displaced; (closed)");
    assert_eq!(
        net.sees(b),
        "1 failed: handler_gone ran=unknown; 2 failed: handler_gone ran=unknown"
    );
    net.call(b, "3", "");
    assert_eq!(net.sees(new), "call t from b: null");
}

#[test]
fn quotas_hold() {
    let mut net = Net::with(|l| l.instances_per_app_max = 2);
    net.app("a", "");
    net.app("a", "");
    assert_eq!(net.hello("a", "").1, "error quota; (closed)");
    let mut net = Net::with(|l| l.pools_per_app_max = 2);
    assert_eq!(
        net.hello("a", r#""pools":["x","y","z"]"#).1,
        "error quota; (closed)"
    );
    let mut net = Net::with(|l| l.triggers_per_app_max = 1);
    assert_eq!(
        net.hello("a", r#""triggers":["x","y"]"#).1,
        "error quota; (closed)"
    );
    let mut net = Net::with(|l| l.meta_bytes_max = 5);
    assert_eq!(
        net.hello("a", r#""meta":{"a":1}"#).1,
        "error too_large; (closed)"
    );
    // The two built-in pools count too.
    let mut net = Net::with(|l| l.pools_max = 3);
    assert_eq!(
        net.hello("a", r#""pools":["x","y"]"#).1,
        "error quota; (closed)"
    );
    net.app("a", r#""pools":["x"]"#);
}

#[test]
fn the_app_offline_longest_makes_room() {
    let mut net = Net::with(|l| (l.apps_max, l.pools_max) = (2, 3));
    for app in ["a", "b"] {
        let peer = net.app(app, r#""triggers":["t"]"#);
        net.advance(1);
        net.hang_up(peer);
    }
    // A handshake that is refused for another reason must not displace an offline app.
    assert_eq!(
        net.hello("c", r#""pools":["x","y"]"#).1,
        "error quota; (closed)"
    );
    let a = net.app("a", "");
    net.app("c", "");
    assert_eq!(
        net.ask(a, r#"{"action":"app_list","id":"1"}"#)
            .matches("app_id")
            .count(),
        2
    );
    // Both apps are connected now: neither can be displaced.
    assert_eq!(net.hello("d", "").1, "error quota; (closed)");
    net.hang_up(a);
    assert_eq!(net.hello("b", "").1, r#"hello ["default"] []"#);
}

#[test]
fn the_state_of_an_instance_is_bounded_even_if_another_replaces_it() {
    let mut net = Net::with(|l| (l.triggers_per_app_max, l.pools_per_app_max) = (2, 2));
    let a = net.app("a", r#""pools":["p","q"],"triggers":["t","u"]"#);
    net.app("a", r#""pools":["r"],"triggers":[]"#);
    assert_eq!(
        net.ask(
            a,
            r#"{"action":"trigger_register","id":"1","triggers":["v"]}"#
        ),
        "1 failed: quota ran=no"
    );
    assert_eq!(
        net.ask(a, r#"{"action":"pool_join","id":"2","pool":"s"}"#),
        "2 failed: quota ran=no"
    );
}

#[test]
fn kicking_an_app_that_is_offline_changes_nothing() {
    let mut net = Net::with(|l| l.apps_max = 2);
    let a = net.app("a", "");
    net.hang_up(a);
    net.advance(5);
    let b = net.app("b", "");
    latzero_sim::admin_proof()
        .iter()
        .for_each(|said| net.say(b, said));
    let kick = r#"{"action":"kick","id":"k","app_id":"a"}"#;
    assert_eq!(net.ask(b, kick), r#"k ok: {"kicked":0}"#);
    let a = net.app("a", "");
    // Both apps are connected: there is no room, and neither is displaced.
    assert_eq!(net.hello("c", "").1, "error quota; (closed)");
    net.hang_up(a);
    net.app("c", "");
}

#[test]
fn features_are_those_that_both_sides_support() {
    let mut net = Net::new();
    let a = net.connect();
    net.say(
        a,
        r#"{"action":"handshake","app_id":"a","features":["attachments","fd_passing","x"]}"#,
    );
    let ack = net.messages(a).remove(0).json;
    assert_eq!(
        ack["features"],
        serde_json::json!(["attachments", "fd_passing"])
    );
    // An attachment carries what a descriptor would replace; only a Unix socket carries
    // descriptors.
    let b = net.connect();
    net.say(
        b,
        r#"{"action":"handshake","app_id":"b","features":["fd_passing"]}"#,
    );
    assert_eq!(
        net.messages(b).remove(0).json["features"],
        serde_json::json!([])
    );
    let c = net.world.connect(latzero_fabric::Transport::Tcp);
    net.say(
        c,
        r#"{"action":"handshake","app_id":"c","features":["attachments","fd_passing"]}"#,
    );
    assert_eq!(
        net.messages(c).remove(0).json["features"],
        serde_json::json!(["attachments"])
    );
    assert_eq!(ack["limits"]["max_frame"], 16 * 1024 * 1024);
}

#[test]
fn while_draining_no_connection_is_admitted_and_no_call_starts() {
    let mut net = Net::new();
    let a = net.app("a", r#""triggers":["t"]"#);
    net.call(a, "1", "");
    net.world.drain();
    assert_eq!(net.sees(a), "draining");
    assert_eq!(net.call(a, "2", ""), "2 failed: draining ran=no");
    assert_eq!(
        net.hello("b", r#""id":"h""#).1,
        "h failed: draining ran=no; (closed)"
    );
    // Calls in progress may finish.
    assert_eq!(net.answer(a, r#""status":"ok","response":1"#), "1 ok: 1");
}

#[test]
fn a_watch_is_restored_only_with_its_pool() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p"]"#);
    net.app("a", r#""pools":["q"]"#);
    net.ask(a, r#"{"action":"watch","pool":"p"}"#);
    let twin = net.connect();
    net.say(twin, r#"{"action":"handshake","app_id":"a"}"#);
    let ack = net.messages(twin).remove(0).json;
    assert_eq!(
        (&ack["pools"], &ack["watches"]),
        (&serde_json::json!(["q"]), &serde_json::Value::Null)
    );
}
