//! What survives a restart of the server: registrations, pools, subscriptions; and how a full, slow
//! or lost disk affects it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use latzero_fabric::Transport;
use net::Net;

const SERVER: &str = r#""pools":["p","q"],"triggers":["t",{"name":"u","pools":["q"]}]"#;

#[test]
fn an_app_is_restored_after_a_restart() {
    let mut net = Net::new();
    let a = net.app("a", SERVER);
    net.ask(
        a,
        r#"{"action":"watch","id":"1","pool":"p","events":["app_online"]}"#,
    );
    net.ask(
        a,
        r#"{"action":"trigger_unregister","id":"2","triggers":["u"]}"#,
    );
    net.world.restart(7);
    let (a, seen) = net.hello("a", "");
    assert_eq!(seen, r#"hello ["p","q"] ["t"] rehydrated"#);
    let b = net.app("b", r#""pools":["p"]"#);
    assert_eq!(net.sees(a), "app_online p b");
    net.call(b, "1", "");
    assert_eq!(net.sees(a), "call t from b: null");
    // After a restart, an app that never disconnected by itself is listed as offline.
    net.world.restart(8);
    let b = net.app("b", r#""pools":["p"]"#);
    assert_eq!(
        net.call(b, "1", r#""destination":"a""#),
        "1 failed: offline ran=no"
    );
}

#[test]
fn subscriptions_are_restored_with_their_app() {
    let mut net = Net::new();
    let maker = net.app("maker", r#""pools":["p"]"#);
    net.say(
        maker,
        r#"{"action":"memory_create","id":"c","block_id":"b","size":8}"#,
    );
    let a = net.app("a", r#""pools":["p"]"#);
    net.say(
        a,
        r#"{"action":"memory_subscribe","id":"s","block_id":"b"}"#,
    );
    net.hang_up(a);
    let a = net.connect();
    net.say(a, r#"{"action":"handshake","app_id":"a"}"#);
    let ack = net.messages(a).remove(0).json;
    assert_eq!(ack["rehydrated"], true);
    assert_eq!(
        ack["subscriptions"].to_string(),
        r#"[{"block_id":"b","pool":"p"}]"#
    );
    net.say(
        maker,
        r#"{"action":"memory_write","id":"w","block_id":"b","data":"AA=="}"#,
    );
    assert!(net.sees(a).contains("block_changed p b"));
    net.say(
        a,
        r#"{"action":"memory_unsubscribe","id":"s","block_id":"b"}"#,
    );
    assert!(
        net.world
            .rows()
            .apps
            .values()
            .all(|row| !row.watches.contains("\"b\""))
    );
}

#[test]
fn nothing_is_acknowledged_before_it_is_stored() {
    let mut net = Net::new();
    net.world.hold_disk(true);
    let a = net.connect();
    net.say(
        a,
        r#"{"action":"handshake","app_id":"a","pools":["p"],"triggers":["t"]}"#,
    );
    // Messages that are sent in the meantime wait as well.
    net.say(a, r#"{"action":"ping","id":"2"}"#);
    assert_eq!(net.sees(a), "");
    net.world.hold_disk(false);
    let seen = net.sees(a);
    assert!(
        seen.starts_with(r#"hello ["p"] ["t"]; 2 ok: {"time""#),
        "{seen}"
    );

    net.world.hold_disk(true);
    net.say(
        a,
        r#"{"action":"trigger_register","id":"3","triggers":["u"]}"#,
    );
    net.say(
        a,
        r#"{"action":"pool_create","id":"4","pool":"d","durable":true}"#,
    );
    // A call does not wait for the disk.
    assert_eq!(
        net.ask(
            a,
            r#"{"action":"trigger","id":"5","process":"u","pool":"p"}"#
        ),
        "call u from a: null"
    );
    net.world.hold_disk(false);
    let seen = net.sees(a);
    assert!(
        seen.starts_with(r#"3 ok: {"triggers":["t","u"]}; 4 ok: {"#)
            && seen.contains("\"durable\":true"),
        "{seen}"
    );

    // After a kill, an unfinished write is as if it had never been requested.
    net.world.hold_disk(true);
    net.say(
        a,
        r#"{"action":"trigger_register","id":"6","triggers":["v"]}"#,
    );
    assert_eq!(net.sees(a), "");
    net.world.restart(1);
    assert_eq!(net.hello("a", "").1, r#"hello ["p"] ["t","u"] rehydrated"#);
}

#[test]
fn reconnecting_unchanged_waits_for_no_write() {
    let mut net = Net::new();
    let a = net.app("a", SERVER);
    net.hang_up(a);
    net.world.hold_disk(true);
    let (a, seen) = net.hello("a", "");
    assert_eq!(seen, r#"hello ["p","q"] ["t","u"] rehydrated"#);
    net.hang_up(a);
    assert_eq!(net.hello("a", SERVER).1, r#"hello ["p","q"] ["t","u"]"#);
}

#[test]
fn a_full_disk_is_reported_and_recovery_is_automatic() {
    let mut net = Net::new();
    let a = net.app("a", SERVER);
    net.world.fill_disk(true);
    assert_eq!(
        net.ask(
            a,
            r#"{"action":"trigger_register","id":"1","triggers":["v"]}"#
        ),
        "1 failed: storage ran=unknown"
    );
    assert_eq!(
        net.ask(
            a,
            r#"{"action":"pool_create","id":"2","pool":"d","durable":true}"#
        ),
        "2 failed: storage ran=unknown"
    );
    // Calls and apps continue; a new app is notified that it is not stored.
    assert_eq!(
        net.ask(
            a,
            r#"{"action":"trigger","id":"3","process":"v","pool":"p"}"#
        ),
        "call v from a: null"
    );
    let b = net.connect();
    net.say(b, r#"{"action":"handshake","app_id":"b","pools":["p"]}"#);
    let ack = net.messages(b).remove(0).json;
    assert_eq!(
        (&ack["status"], &ack["stored"]),
        (&"ok".into(), &false.into())
    );
    // A pool that could not be stored leaves nothing behind.
    assert!(!net.world.pool_names().contains(&"d".to_owned()));
    assert_eq!(net.world.rows().apps.len(), 1);
    net.world.fill_disk(false);
    net.world.restart(2);
    assert_eq!(net.hello("b", "").1, r#"hello ["p"] [] rehydrated"#);
    assert_eq!(
        net.hello("a", "").1,
        r#"hello ["p","q"] ["t","u","v"] rehydrated"#
    );
}

#[test]
fn durable_pools_stay_and_others_leave_nothing() {
    let mut net = Net::new();
    let a = net.app("a", "");
    let make = |net: &mut Net, more: &str| {
        net.ask(a, &format!(r#"{{"action":"pool_create","id":"1"{more}}}"#))
    };
    make(
        &mut net,
        r#","pool":"d","durable":true,"policy":{"join":["b"],"serve":["a"]},"properties":{"k":1}"#,
    );
    make(&mut net, r#","pool":"e""#);
    net.app("b", r#""pools":["f"]"#);
    net.world.restart(3);
    assert_eq!(net.world.pool_names(), ["d", "default", "system"]);
    let a = net.app("a", r#""pools":["d"]"#);
    net.say(a, r#"{"action":"pool_info","id":"1","pool":"d"}"#);
    let info = net.messages(a).remove(0).json["response"].clone();
    assert_eq!(
        (
            &info["durable"],
            &info["owner"],
            info["policy"].to_string().as_str(),
            &info["properties"]["k"]
        ),
        (
            &true.into(),
            &"a".into(),
            r#"{"join":["b"],"serve":["a"]}"#,
            &1.into()
        )
    );
    // Its rules still apply.
    assert_eq!(
        net.hello("c", r#""pools":["d"]"#).1,
        "error forbidden; (closed)"
    );
    let c = net.app("c", "");
    assert_eq!(
        net.ask(c, r#"{"action":"pool_join","id":"1","pool":"d"}"#),
        "1 failed: forbidden ran=no"
    );
    assert_eq!(
        net.hello(
            "b",
            r#""pools":["d"],"triggers":[{"name":"t","pools":["d"]}]"#
        )
        .1,
        "error forbidden; (closed)"
    );
    let b = net.app("b", r#""pools":["d"],"triggers":["t"]"#);
    assert_eq!(net.call(b, "1", ""), "1 failed: no_handler ran=no");
    // A removed pool does not come back.
    net.hang_up(b);
    net.ask(
        a,
        r#"{"action":"pool_remove","id":"1","pool":"d","force":true}"#,
    );
    net.world.restart(4);
    assert_eq!(net.world.pool_names(), ["default", "system"]);
    assert_eq!(
        net.hello("b", "").1,
        r#"hello ["default"] ["t"] rehydrated"#
    );
}

#[test]
fn an_app_is_restored_without_a_pool_it_may_no_longer_join() {
    let mut net = Net::new();
    let b = net.app("b", r#""pools":["d","p"]"#);
    net.hang_up(b);
    let a = net.app("a", "");
    net.ask(
        a,
        r#"{"action":"pool_create","id":"1","pool":"d","policy":{"join":["a"]}}"#,
    );
    assert_eq!(net.hello("b", "").1, r#"hello ["p"] [] rehydrated"#);
}

#[test]
fn apps_are_forgotten_on_request_and_tools_automatically() {
    let mut net = Net::new();
    let admin = net.world.connect(Transport::BuiltIn);
    net.say(admin, r#"{"action":"handshake","app_id":"latzero"}"#);
    net.sees(admin);
    let a = net.app("a", SERVER);
    let forget = r#"{"action":"app_forget","id":"1","app_id":"a"}"#;
    assert_eq!(net.ask(a, forget), "1 failed: forbidden ran=no");
    assert_eq!(net.ask(admin, forget), "1 failed: app_in_use ran=no");
    net.hang_up(a);
    assert_eq!(net.ask(admin, forget), "1 ok: {}");
    assert_eq!(net.ask(admin, forget), "1 failed: no_app ran=no");
    assert_eq!(net.hello("a", "").1, r#"hello ["default"] []"#);

    let tool = net.app("tool", r#""pools":["p"],"transient":true"#);
    net.hang_up(tool);
    assert_eq!(
        net.hello("tool", r#""transient":true"#).1,
        r#"hello ["default"] []"#
    );
    assert!(
        net.world
            .rows()
            .apps
            .keys()
            .all(|app| app.as_str() != "tool")
    );
}

#[test]
fn listings_show_since_when_apps_are_offline() {
    let mut net = Net::new();
    let a = net.app("a", "");
    let seen = |net: &Net| net.world.rows().apps.values().next().unwrap().last_seen;
    assert_eq!(seen(&net), 0);
    net.advance(5000);
    net.hang_up(a);
    net.say(a, "{}");
    let b = net.app("b", "");
    net.say(b, r#"{"action":"app_list","id":"1"}"#);
    let listed = net.messages(b).remove(0).json["response"]["apps"][0].clone();
    assert_eq!(listed["live"], false);
    assert_eq!(
        listed["last_seen"].as_u64().unwrap() - listed["registered"].as_u64().unwrap(),
        5000
    );
    assert_eq!(seen(&net), listed["last_seen"].as_u64().unwrap());
}

#[test]
fn the_audit_log_records_connections_takeovers_refusals_and_administration() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p"],"triggers":["t"]"#);
    net.ask(a, r#"{"action":"trigger_register","triggers":["u"]}"#);
    net.ask(a, r#"{"action":"reload","id":"1"}"#);
    net.hello("a", r#""takeover":true"#);
    let seen = net.world.take_audit().join("\n");
    for part in [
        r#"joined {"pools":["p"],"rehydrated":false,"triggers":["t"],"triggers_total":1}"#,
        r#"registered {"triggers":["u"],"triggers_total":1}"#,
        r#"refused {"code":"forbidden""#,
        r#"took_over {"displaced":"#,
    ] {
        assert!(seen.contains(part), "{part} is not in:\n{seen}");
    }
    // A change without effect is not logged, and of many names only the first are.
    let b = net.app("b", r#""triggers":["t"]"#);
    net.ask(b, r#"{"action":"trigger_register","triggers":["t"]}"#);
    assert!(!net.world.take_audit().join("\n").contains("registered"));
    let many: Vec<String> = (0..100).map(|n| format!("\"n{n}\"")).collect();
    let many = many.join(",");
    net.ask(
        b,
        &format!(r#"{{"action":"trigger_register","triggers":[{many}]}}"#),
    );
    let seen = net.world.take_audit().join("\n");
    assert!(seen.contains("n31\"],\"triggers_total\":100"), "{seen}");
    let admin = net.world.connect(Transport::BuiltIn);
    net.say(admin, r#"{"action":"handshake","app_id":"latzero"}"#);
    net.say(admin, r#"{"action":"kick","id":"1","app_id":"a"}"#);
    let seen = net.world.take_audit().join("\n");
    assert!(
        seen.contains(r#"administered {"action":"kick","of":"a""#),
        "{seen}"
    );
}
