//! The schemas of triggers: who sees them, how long they last, and their limits.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

mod net;

use latzero_sim::Peer;
use net::Net;
use serde_json::Value;

/// What `pool_info` says about trigger `t` of pool `p`, as JSON text.
fn info(net: &mut Net, peer: Peer) -> String {
    let seen = net.ask(
        peer,
        r#"{"action":"pool_info","id":"i","pool":"p","trigger":"t"}"#,
    );
    seen.strip_prefix("i ok: ").unwrap().to_owned()
}

/// The schema that `pool_info` shows of trigger `t` of pool `p`.
fn schema(net: &mut Net, peer: Peer) -> Value {
    let seen: Value = serde_json::from_str(&info(net, peer)).unwrap();
    let triggers = seen["triggers"].as_array().unwrap();
    assert!(triggers.len() <= 1, "{seen}");
    triggers
        .first()
        .map_or(Value::Null, |t| t["schema"].clone())
}

fn register(net: &mut Net, peer: Peer, trigger: &str) -> String {
    net.ask(
        peer,
        &format!(r#"{{"action":"trigger_register","id":"r","triggers":[{trigger}]}}"#),
    )
}

#[test]
fn a_schema_is_shown_as_it_was_registered() {
    let mut net = Net::new();
    let a = net.app(
        "a",
        r#""pools":["p"],"triggers":["u",{"name":"t","schema":{ "z": 1.0, "a":[{"é":null}] }}]"#,
    );
    let b = net.app("b", r#""pools":["p"]"#);
    net.say(
        b,
        r#"{"action":"pool_info","id":"1","pool":"p","trigger":"t"}"#,
    );
    let bytes = net.world.read(b, usize::MAX);
    let text = String::from_utf8_lossy(&bytes);
    let shown = r#""schema":{ "z": 1.0, "a":[{"é":null}] }}]"#;
    assert!(text.contains(shown), "{text}");
    // Only where it is asked for, and only of that trigger.
    for request in [
        r#"{"action":"pool_info","id":"1","pool":"p"}"#,
        r#"{"action":"pool_info","id":"1","pool":"p","trigger":"u"}"#,
        r#"{"action":"app_list","id":"1"}"#,
    ] {
        let seen = net.ask(b, request);
        assert!(
            seen.starts_with("1 ok") && !seen.contains("schema"),
            "{seen}"
        );
    }
    let seen = net.ask(
        b,
        r#"{"action":"pool_info","id":"1","pool":"p","trigger":"v"}"#,
    );
    assert!(
        seen.contains(r#""triggers":[]"#) && seen.contains(r#""triggers_total":2"#),
        "{seen}"
    );
    // Registering a trigger again replaces it.
    register(&mut net, a, r#"{"name":"t","schema":{"b":2}}"#);
    assert_eq!(schema(&mut net, b)["b"], 2);
    register(&mut net, a, r#"{"name":"t","schema":null}"#);
    assert_eq!(schema(&mut net, b), Value::Null);
}

#[test]
fn of_several_handlers_the_newest_with_a_schema_counts() {
    let mut net = Net::new();
    let spec = |n: u8| format!(r#""pools":["p"],"triggers":[{{"name":"t","schema":{{"n":{n}}}}}]"#);
    let a = net.app("a", &spec(1));
    assert_eq!(schema(&mut net, a)["n"], 1);
    let b = net.app("b", &spec(2));
    let c = net.app("c", r#""pools":["p"],"triggers":["t"]"#);
    assert_eq!(schema(&mut net, c)["n"], 2);
    net.hang_up(b);
    assert_eq!(schema(&mut net, c)["n"], 1);
    // A second instance of the app replaces its registration.
    net.app("a", &spec(3));
    assert_eq!(schema(&mut net, c)["n"], 3);
    net.app(
        "a",
        r#""pools":["p"],"triggers":[{"name":"t","pools":["q"],"schema":{"n":4}}]"#,
    );
    // That one is of a trigger in another pool.
    assert_eq!(schema(&mut net, c), Value::Null);
}

#[test]
fn a_schema_outlives_the_connection_and_the_server() {
    let mut net = Net::new();
    let server = r#""pools":["p"],"triggers":[{"name":"t","schema":{"b":1, "a":2}}]"#;
    let a = net.app("a", server);
    net.hang_up(a);
    let a = net.app("a", "");
    assert_eq!(schema(&mut net, a)["a"], 2);
    net.world.restart(3);
    let (a, seen) = net.hello("a", "");
    assert_eq!(seen, r#"hello ["p"] ["t"] rehydrated"#);
    assert_eq!(schema(&mut net, a)["a"], 2);
    // The text is stored as it was sent, so the same handshake changes nothing.
    net.hang_up(a);
    net.world.hold_disk(true);
    assert_eq!(net.hello("a", server).1, r#"hello ["p"] ["t"]"#);
}

#[test]
fn rows_of_earlier_versions_have_no_schema() {
    let mut net = Net::new();
    let a = net.app("a", r#""pools":["p"],"triggers":["t"]"#);
    net.hang_up(a);
    let rows = net.world.rows().clone();
    let stored = format!("{rows:?}");
    assert!(!stored.contains("schema"), "{stored}");
    net.world.restart_with(3, rows);
    let a = net.app("a", "");
    assert_eq!(schema(&mut net, a), Value::Null);
}

#[test]
fn the_limits_of_a_schema_are_named() {
    let mut net = Net::with(|limits| {
        limits.trigger_schema_bytes_max = 4096;
        limits.registration_bytes_max = 10_000;
    });
    let a = net.app("a", r#""pools":["p"]"#);
    let of = |bytes: usize| {
        let schema = format!(r#"{{"":"{}"}}"#, "x".repeat(bytes - 7));
        assert_eq!(schema.len(), bytes);
        format!(r#"{{"name":"t","schema":{schema}}}"#)
    };
    let mut check = |trigger: &str, expected: &str| {
        let request = format!(r#"{{"action":"trigger_register","id":"r","triggers":[{trigger}]}}"#);
        net.say(a, &request);
        let reply = net.world.messages(a).remove(0).json;
        let said = match reply["error"]["code"].as_str() {
            Some(code) => format!("{code}: {}", reply["error"]["message"]),
            None => "ok".to_owned(),
        };
        assert!(said.contains(expected), "{said}");
    };
    check(&of(4096), "ok");
    check(
        &of(4097),
        "too_large: \"the schema of a trigger has 4097 bytes; the maximum is 4096 \
         (limits.trigger_schema_bytes_max)\"",
    );
    check(
        &format!("{0},{0},{0}", of(4096)),
        "quota: \"an app may register 10000 bytes of names, pools, docs and schemas \
         (limits.registration_bytes_max)\"",
    );
    check(
        r#"{"name":"t","schema":"x"}"#,
        "bad_message: \"field 'schema' must be an object",
    );
    check(
        r#"{"name":"t","schema":{"a":"\ud800"}}"#,
        "bad_message: \"field 'schema' cannot be stored",
    );
    let deep = |levels: usize| {
        let (open, close) = ("[".repeat(levels - 1), "]".repeat(levels - 1));
        format!(r#"{{"name":"t","schema":{{"a":{open}{close}}}}}"#)
    };
    check(
        &deep(61),
        "too_deep: \"field 'schema' may nest at most 60 levels deep\"",
    );
    check(&deep(60), "ok");
    // So the reply that shows it is no deeper than messages may be.
    let shown = format!(
        r#"{{"action":"response","in_reply_to":"i","status":"ok","response":{}}}"#,
        info(&mut net, a)
    );
    assert!(latzero_protocol::Raw::new(&shown).is_ok());
}

#[test]
fn schemas_count_as_memory_of_their_user() {
    let mut net = Net::with(|limits| {
        limits.memory_max = 4 << 20;
        limits.trigger_schema_bytes_max = 32 << 10;
        limits.registration_bytes_max = 64 << 20;
    });
    let a = net.stranger("a", r#""pools":["p"]"#);
    let filler = "x".repeat(30_000);
    let mut registered = 0;
    let refused = loop {
        let trigger = format!(r#"{{"name":"t{registered}","schema":{{"":"{filler}"}}}}"#);
        let seen = register(&mut net, a, &trigger);
        if !seen.starts_with("r ok") {
            break seen;
        }
        registered += 1;
        assert!(registered < 200);
    };
    assert!(refused.starts_with("r failed: quota"), "{refused}");
    // Half of half of the memory, less what else is registered.
    assert!((20..35).contains(&registered), "{registered}");
    // What is replaced is released.
    for n in 0..registered {
        let seen = register(&mut net, a, &format!("\"t{n}\""));
        assert!(seen.starts_with("r ok"), "{seen}");
    }
    let trigger = format!(r#"{{"name":"t","schema":{{"":"{filler}"}}}}"#);
    let seen = register(&mut net, a, &trigger);
    assert!(seen.starts_with("r ok"), "{seen}");
}
