//! What survives the end of processes: registrations, durable pools, parked calls and their
//! answers, when the server, callers and handlers are killed, and with full and damaged disks.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use latzero_tests::site::{ControlledProcess, Daemon, Site, Start};
use latzero_tests::{TIMEOUT, Wire};
use serde_json::{Value, json};

/// The client process.
const CLIENT: &str = env!("CARGO_BIN_EXE_latzero-test-client");

fn ok(reply: &Value) -> &Value {
    assert_eq!(reply["status"], "ok", "{reply}");
    &reply["response"]
}

fn code(reply: &Value) -> &str {
    reply["error"]["code"]
        .as_str()
        .unwrap_or_else(|| panic!("no error: {reply}"))
}

fn join(server: &Daemon, handshake: Value) -> Wire {
    server.app(handshake).0
}

/// The next message for which `wanted` is true; messages before it are skipped.
fn until(wire: &mut Wire, wanted: impl Fn(&Value) -> bool) -> Value {
    loop {
        let message = wire.receive();
        if wanted(&message) {
            return message;
        }
    }
}

fn event(wire: &mut Wire, name: &str) -> Value {
    until(wire, |message| message["event"] == name)
}

/// Waits until `is_there` returns true.
fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !is_there() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::yield_now();
    }
}

/// The server's entry for an app.
fn listed(wire: &mut Wire, app: &str) -> Option<Value> {
    let reply = wire.request(json!({"action": "app_list"}));
    let apps = ok(&reply)["apps"].as_array().unwrap();
    apps.iter().find(|a| a["app_id"] == app).cloned()
}

/// Waits until no instance of an app is connected.
fn wait_offline(wire: &mut Wire, app: &str) {
    wait_for("the app's end", || {
        listed(wire, app).is_none_or(|app| app["live"] == false)
    });
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis() as u64
}

/// Waits until everything that the server has decided so far is on the disk: an acknowledged
/// request is written after the others.
fn settle(wire: &mut Wire, name: &str) {
    let reply = wire.request(json!({"action": "trigger_register", "triggers": [name]}));
    ok(&reply);
}

#[test]
fn an_app_that_gives_only_its_name_is_restored() {
    let site = Site::new();
    let server = site.start();
    let mut a = join(
        &server,
        json!({"app_id": "a", "pools": ["p", "q"], "meta": {"version": "7"}, "triggers":
            ["t", "gone", {"name": "u", "pools": ["q"], "strategy": "least_busy", "concurrency": 4,
                "doc": "of u"}]}),
    );
    for message in [
        json!({"action": "watch", "pool": "p", "events": ["app_online"]}),
        json!({"action": "watch", "pool": "q"}),
        json!({"action": "unwatch", "pool": "q"}),
        json!({"action": "memory_create", "pool": "p", "block_id": "b", "size": 4,
            "kind": "persistent"}),
        json!({"action": "memory_subscribe", "pool": "p", "block_id": "b"}),
        json!({"action": "trigger_register", "triggers": ["v"]}),
        json!({"action": "trigger_unregister", "triggers": ["gone"]}),
        json!({"action": "pool_join", "pool": "r"}),
    ] {
        ok(&a.request(message));
    }
    server.kill();

    let server = site.start();
    let (mut a, ack) = server.app(json!({"app_id": "a"}));
    assert_eq!(ack["rehydrated"], true, "{ack}");
    assert_eq!(ack["pools"], json!(["p", "q", "r"]));
    let triggers: BTreeSet<&str> = ack["triggers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(triggers, BTreeSet::from(["t", "u", "v"]));
    assert_eq!(ack["watches"], json!(["p"]));
    assert_eq!(
        ack["subscriptions"],
        json!([{"pool": "p", "block_id": "b"}])
    );
    let shown = listed(&mut a, "a").unwrap();
    assert_eq!(shown["meta"], json!({"version": "7"}), "{shown}");
    let u = shown["triggers"]
        .as_array()
        .unwrap()
        .iter()
        .find(|t| t["name"] == "u")
        .unwrap();
    for (field, value) in [
        ("pools", json!(["q"])),
        ("strategy", json!("least_busy")),
        ("concurrency", json!(4)),
        ("doc", json!("of u")),
    ] {
        assert_eq!(u[field], value, "{u}");
    }

    // All of it works, and what was unregistered does not.
    let mut b = join(&server, json!({"app_id": "b", "pools": ["p", "q"]}));
    let online = event(&mut a, "app_online");
    assert_eq!(
        (&online["pool"], &online["app_id"]),
        (&json!("p"), &json!("b"))
    );
    ok(&b.request(json!({"action": "memory_write", "pool": "p", "block_id": "b", "data": "AQI="})));
    let changed = event(&mut a, "block_changed");
    assert_eq!(
        (&changed["block_id"], &changed["version"]),
        (&json!("b"), &json!(1))
    );
    for (pool, process) in [("p", "t"), ("q", "u"), ("p", "v")] {
        b.send(&json!({"action": "trigger", "id": "c", "pool": pool, "process": process}));
        let call = until(&mut a, |m| m["action"] == "trigger");
        assert_eq!(call["process"], process);
        a.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
        assert_eq!(b.receive()["status"], "ok");
    }
    for (pool, process) in [("p", "u"), ("p", "gone")] {
        let reply = b.request(json!({"action": "trigger", "pool": pool, "process": process}));
        assert_eq!(code(&reply), "no_handler");
    }
    // A client that lists pools or triggers replaces what was remembered.
    drop(a);
    wait_offline(&mut b, "a");
    join(&server, json!({"app_id": "a", "pools": ["q"]}));
    server.kill();
    let server = site.start();
    let (_, ack) = server.app(json!({"app_id": "a"}));
    assert_eq!(
        (&ack["pools"], &ack["triggers"]),
        (&json!(["q"]), &json!([]))
    );
}

/// Which processes end before the others reconnect.
#[derive(Debug, Clone, Copy)]
enum Ends {
    ServerFirst,
    AppFirst,
    AppFirstAndSeen,
    HalfOfTheInstances,
    ServerTwice,
}

#[test]
fn the_order_in_which_they_come_back_does_not_matter() {
    let who = json!({"app_id": "a", "pools": ["p"], "triggers": ["t"]});
    for ends in [
        Ends::ServerFirst,
        Ends::AppFirst,
        Ends::AppFirstAndSeen,
        Ends::HalfOfTheInstances,
        Ends::ServerTwice,
    ] {
        let site = Site::new();
        let mut server = site.start();
        let mut caller = join(&server, json!({"app_id": "caller", "pools": ["p"]}));
        let mut instances: Vec<ControlledProcess> =
            (0..2).map(|_| process(&server, who.clone())).collect();
        match ends {
            Ends::ServerFirst => {
                server.kill();
                instances.iter_mut().for_each(ControlledProcess::kill);
            }
            Ends::AppFirst => {
                instances.iter_mut().for_each(ControlledProcess::kill);
                server.kill();
            }
            Ends::AppFirstAndSeen => {
                instances.iter_mut().for_each(ControlledProcess::kill);
                wait_offline(&mut caller, "a");
                server.kill();
            }
            Ends::HalfOfTheInstances => {
                instances[0].kill();
                wait_for("the instance's end", || {
                    listed(&mut caller, "a").unwrap()["instances_total"] == 1
                });
                server.kill();
            }
            Ends::ServerTwice => {
                server.kill();
                site.start().kill();
            }
        }
        drop(instances);
        server = site.start();
        let mut caller = join(&server, json!({"app_id": "caller"}));
        let reply =
            caller.request(json!({"action": "trigger", "process": "t", "destination": "a"}));
        assert_eq!(code(&reply), "offline", "{ends:?}");
        // Each instance gives only its name, and calls reach the instances that are back.
        let mut back = Vec::new();
        for _ in 0..2 {
            let (wire, ack) = server.app(json!({"app_id": "a"}));
            let restored = (&ack["rehydrated"], &ack["pools"], &ack["triggers"]);
            assert_eq!(
                restored,
                (&json!(true), &json!(["p"]), &json!(["t"])),
                "{ends:?}"
            );
            back.push(wire);
            for n in 0..back.len() {
                let id = format!("c{n}");
                caller.send(&json!({"action": "trigger", "id": id, "process": "t"}));
            }
            for handler in &mut back {
                let call = until(handler, |m| m["action"] == "trigger");
                handler.send(
                    &json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}),
                );
            }
            for _ in 0..back.len() {
                assert_eq!(caller.receive()["status"], "ok", "{ends:?}");
            }
        }
    }
}

/// Starts an app as a process of its own.
fn process(server: &Daemon, mut handshake: Value) -> ControlledProcess {
    let mut process = ControlledProcess::start(CLIENT, &[server.socket().to_str().unwrap()]);
    handshake["action"] = "handshake".into();
    process.send(&handshake);
    let ack = process.receive();
    assert_eq!(ack["status"], "ok", "{ack}");
    process
}

#[test]
fn apps_that_are_offline_are_listed_with_the_time_and_can_be_forgotten() {
    let site = Site::new();
    let before = unix_ms();
    let server = site.start();
    let mut watch = join(&server, json!({"app_id": "watch"}));
    join(&server, json!({"app_id": "gone", "pools": ["p"]}));
    let _live = join(&server, json!({"app_id": "live", "pools": ["p"]}));
    join(
        &server,
        json!({"app_id": "tool", "pools": ["p"], "transient": true}),
    );
    for app in ["gone", "tool"] {
        wait_offline(&mut watch, app);
    }
    let seen = listed(&mut watch, "gone").unwrap()["last_seen"]
        .as_u64()
        .unwrap();
    assert!((before..=unix_ms()).contains(&seen), "{seen}");
    settle(&mut watch, "w");
    server.kill();
    let killed = unix_ms();

    let server = site.start();
    let mut admin = join(&server, json!({"app_id": "watch"}));
    let gone = listed(&mut admin, "gone").unwrap();
    assert_eq!(
        (&gone["live"], &gone["last_seen"]),
        (&json!(false), &json!(seen))
    );
    // Nobody saw this app leave: the last time known is from before the kill.
    let live = listed(&mut admin, "live").unwrap();
    assert_eq!(live["live"], false);
    let last_seen = live["last_seen"].as_u64().unwrap();
    assert!(
        (before..=killed).contains(&last_seen),
        "{last_seen} of {before}..={killed}"
    );
    assert_eq!(listed(&mut admin, "tool"), None);

    let forget = json!({"action": "app_forget", "app_id": "gone"});
    ok(&admin.request(forget.clone()));
    assert_eq!(code(&admin.request(forget.clone())), "no_app");
    let own = json!({"action": "app_forget", "app_id": "watch"});
    assert_eq!(code(&admin.request(own)), "app_in_use");
    server.kill();
    let server = site.start();
    let (mut back, ack) = server.app(json!({"app_id": "gone"}));
    assert_eq!(
        (&ack["rehydrated"], &ack["pools"]),
        (&json!(false), &json!(["default"]))
    );
    assert!(listed(&mut back, "live").is_some());
}

#[test]
fn durable_pools_stay_with_their_rules_and_others_leave_nothing() {
    let site = Site::new();
    let server = site.start();
    let mut a = join(&server, json!({"app_id": "a", "pools": ["passing"]}));
    let make = |pool: &str| {
        json!({"action": "pool_create", "pool": pool, "durable": true, "properties": {"k": [1,
            "ü"]},
            "policy": {"join": ["b"], "serve": ["a"]}})
    };
    ok(&a.request(make("kept")));
    ok(&a.request(make("removed")));
    ok(&a.request(json!({"action": "pool_create", "pool": "ephemeral"})));
    ok(&a.request(json!({"action": "pool_remove", "pool": "removed"})));
    server.kill();

    let server = site.start();
    let mut b = join(
        &server,
        json!({"app_id": "b", "pools": ["kept"], "triggers": ["t"]}),
    );
    let reply = b.request(json!({"action": "pool_list"}));
    let pools: Vec<&str> = ok(&reply)["pools"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["pool"].as_str().unwrap())
        .collect();
    assert_eq!(pools, ["default", "kept", "system"]);
    let reply = b.request(json!({"action": "pool_info", "pool": "kept"}));
    let info = ok(&reply);
    for (field, value) in [
        ("durable", json!(true)),
        ("owner", json!("a")),
        ("properties", json!({"k": [1, "ü"]})),
        ("policy", json!({"join": ["b"], "serve": ["a"]})),
    ] {
        assert_eq!(info[field], value, "{info}");
    }
    // Its rules apply: who may join, who may serve, who may remove.
    let (_, refused) = server
        .try_app(json!({"action": "", "app_id": "c", "pools": ["kept"]}))
        .unwrap()
        .unwrap();
    assert_eq!(code(&refused), "forbidden");
    let mut a = join(&server, json!({"app_id": "a", "pools": ["kept"]}));
    let call = json!({"action": "trigger", "process": "t", "pool": "kept"});
    assert_eq!(code(&a.request(call)), "no_handler");
    let remove = json!({"action": "pool_remove", "pool": "kept", "force": true});
    let mut c = join(&server, json!({"app_id": "c"}));
    assert_eq!(code(&c.request(make("kept"))), "forbidden");
    ok(&a.request(remove));
    server.kill();
    let server = site.start();
    let mut a = join(&server, json!({"app_id": "a"}));
    assert_eq!(
        code(&a.request(json!({"action": "pool_info", "pool": "kept"}))),
        "no_pool"
    );
}

/// Parks calls `from..to`, each with its number; every second one is to be redelivered.
fn park(caller: &mut ControlledProcess, from: usize, to: usize) {
    for n in from..to {
        caller.send(
            &json!({"action": "trigger", "id": format!("c{n}"), "process": "t",
            "park": true, "data": n,
            "ttl": 3_600_000, "redeliver": n % 2 == 0}),
        );
        let reply = caller.receive();
        assert_eq!(
            (&reply["status"], &reply["in_reply_to"]),
            (&json!("parked"), &json!(format!("c{n}")))
        );
    }
}

fn answer(handler: &mut ControlledProcess, call: &Value) {
    handler.send(
        &json!({"action": "response", "in_reply_to": call["id"], "status": "ok",
        "response": call["data"]}),
    );
}

/// The next `count` calls: their numbers and attempts.
fn take_calls(handler: &mut ControlledProcess, count: usize) -> (Vec<Value>, Vec<(u64, u64)>) {
    let calls: Vec<Value> = (0..count).map(|_| handler.receive()).collect();
    let seen = calls
        .iter()
        .map(|call| {
            assert_eq!(call["action"], "trigger", "{call}");
            (
                call["data"].as_u64().unwrap(),
                call["attempt"].as_u64().unwrap(),
            )
        })
        .collect();
    (calls, seen)
}

/// The next `count` answers, as "id:payload" or "id:code".
fn take_answers(caller: &mut ControlledProcess, count: usize) -> Vec<String> {
    (0..count)
        .map(|_| {
            let reply = caller.receive();
            let id = reply["in_reply_to"]
                .as_str()
                .unwrap_or_else(|| panic!("{reply}"));
            match reply["error"]["code"].as_str() {
                Some(code) => format!("{id}:{code}"),
                None => format!("{id}:{}", reply["response"]),
            }
        })
        .collect()
}

const CALLER: &str = "caller";

/// Kills every subset of the three processes, once while calls wait for a handler and once while a
/// handler has them.
#[test]
fn parked_calls_outlive_any_of_server_caller_and_handler() {
    const CALLS: usize = 6;
    for dies in 1..8u32 {
        let [server_dies, caller_dies, handler_dies] = [1, 2, 4].map(|bit| dies & bit != 0);
        let case = format!("server {server_dies}, caller {caller_dies}, handler {handler_dies}");
        let site = Site::new();
        let mut server = site.start();
        let mut control = join(&server, json!({"app_id": "control"}));
        let mut caller = process(&server, json!({"app_id": CALLER}));
        park(&mut caller, 0, CALLS);
        // First while no handler has them. The end of the server also ends its connections.
        if server_dies {
            server.kill();
            server = site.start();
            control = join(&server, json!({"app_id": "control"}));
        }
        if caller_dies {
            caller.kill();
        }
        if server_dies || caller_dies {
            caller = process(&server, json!({"app_id": CALLER}));
        }
        let mut handler = process(&server, json!({"app_id": "handler", "triggers": ["t"]}));
        let (calls, seen) = take_calls(&mut handler, CALLS);
        let first: Vec<_> = (0..CALLS as u64).map(|n| (n, 1)).collect();
        assert_eq!(seen, first, "{case}");
        // The first two are answered; the others are in progress at the kill.
        for call in &calls[..2] {
            answer(&mut handler, call);
        }
        assert_eq!(take_answers(&mut caller, 2), ["c0:0", "c1:1"], "{case}");
        settle(&mut control, "settled");
        if server_dies {
            server.kill();
            server = site.start();
            control = join(&server, json!({"app_id": "control"}));
        }
        if caller_dies {
            caller.kill();
            wait_offline(&mut control, CALLER);
        }
        if handler_dies {
            handler.kill();
            wait_offline(&mut control, "handler");
        }
        // The caller is away while the answers are given, if it died.
        if server_dies && !caller_dies {
            caller = process(&server, json!({"app_id": CALLER}));
        }
        let mut expected: Vec<String> = Vec::new();
        if server_dies || handler_dies {
            handler = process(&server, json!({"app_id": "handler"}));
            // A server that was killed did not see the handler's end: it delivers again every call
            // that was not answered.
            let again: Vec<u64> = (2..CALLS as u64)
                .filter(|n| server_dies || n % 2 == 0)
                .collect();
            let (calls, seen) = take_calls(&mut handler, again.len());
            let wanted: Vec<_> = again.iter().map(|n| (*n, 2)).collect();
            assert_eq!(seen, wanted, "{case}");
            if !server_dies {
                expected.extend(
                    (2..CALLS)
                        .filter(|n| n % 2 == 1)
                        .map(|n| format!("c{n}:handler_gone")),
                );
            }
            calls.iter().for_each(|call| answer(&mut handler, call));
            expected.extend(again.iter().map(|n| format!("c{n}:{n}")));
        } else {
            calls[2..]
                .iter()
                .for_each(|call| answer(&mut handler, call));
            expected.extend((2..CALLS).map(|n| format!("c{n}:{n}")));
        }
        if caller_dies {
            // A parked call behind them is delivered last, so the answers have been processed by
            // then.
            ping(&mut handler);
            settle(&mut control, "answered");
            if server_dies {
                server.kill();
                server = site.start();
            }
            caller = process(&server, json!({"app_id": CALLER}));
        }
        let mut answers = take_answers(&mut caller, expected.len());
        if !caller_dies {
            expected.sort();
            answers.sort();
        }
        let as_set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(as_set(&answers), as_set(&expected), "{case}");
        // Nothing of them is left.
        ping(&mut caller);
        let mut control = join(&server, json!({"app_id": "control"}));
        settle(&mut control, "all");
        server.kill();
        let server = site.start();
        for app in [CALLER, "handler"] {
            let mut process = process(&server, json!({"app_id": app}));
            ping(&mut process);
        }
    }
}

/// Pings; the reply must be the next message that the process receives.
fn ping(process: &mut ControlledProcess) {
    process.send(&json!({"action": "ping", "id": "ping"}));
    let reply = process.receive();
    assert_eq!(reply["in_reply_to"], "ping", "{reply}");
}

#[test]
fn a_redelivered_call_counts_its_attempts_over_every_kind_of_end() {
    let site = Site::new();
    let mut server = site.start();
    let mut caller = process(&server, json!({"app_id": CALLER}));
    caller.send(
        &json!({"action": "trigger", "id": "c", "process": "t", "park": true,
        "redeliver": true, "attempts": 6, "data": 5}),
    );
    assert_eq!(caller.receive()["status"], "parked");
    for attempt in 1..=6u64 {
        let mut handler = process(&server, json!({"app_id": "handler", "triggers": ["t"]}));
        let (calls, seen) = take_calls(&mut handler, 1);
        assert_eq!(seen, [(5, attempt)]);
        let mut control = join(&server, json!({"app_id": "control"}));
        match attempt {
            // While the pauses between attempts are short.
            1 | 2 => {
                handler.kill();
                wait_offline(&mut control, "handler");
            }
            3..=5 => {
                // The attempt's number is on the disk before the server ends.
                settle(&mut control, &format!("settled{attempt}"));
                server.kill();
                server = site.start();
                caller = process(&server, json!({"app_id": CALLER}));
            }
            _ => {
                answer(&mut handler, &calls[0]);
                assert_eq!(take_answers(&mut caller, 1), ["c:5"]);
            }
        }
    }
}

#[test]
fn a_full_disk_is_reported_while_calls_continue_and_recovers() {
    let start = Start::default();
    let site = match Site::on_small_disk(8 << 20) {
        Ok(site) => site,
        Err(why) => {
            eprintln!("left to the test with a limit on files: {why}");
            return;
        }
    };
    let fill = site.data_dir().join("fill");
    check_full_disk(&site, &start, |_, is_full| {
        if is_full {
            fill_up(&fill);
        } else {
            std::fs::remove_file(&fill).unwrap();
        }
    });
}

/// Writes until the disk is full.
fn fill_up(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    for size in [65536, 4096, 1] {
        loop {
            match file.write_all(&vec![0; size]) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_disk_that_accepts_no_writes_is_reported_while_calls_continue_and_recovers() {
    let start = Start::default();
    let site = Site::new();
    let log = site.data_dir().join("data.db-wal");
    check_full_disk(&site, &start, |server, is_full| {
        // No file may grow beyond the current size of the database's log; blocks are smaller than
        // that.
        let limit = std::fs::metadata(&log).unwrap().len();
        server.limit_files(is_full.then_some(limit));
    });
}

fn check_full_disk(site: &Site, start: &Start, mut fill: impl FnMut(&Daemon, bool)) {
    let server = site.start_with(start).unwrap();
    let mut a = join(&server, json!({"app_id": "a", "triggers": ["t"]}));
    let mut b = join(&server, json!({"app_id": "b"}));
    let mut admin = join(&server, json!({"app_id": "admin"}));
    ok(&a.request(
        json!({"action": "memory_create", "block_id": "kept", "size": 8, "kind": "persistent"}),
    ));
    ok(&a.request(json!({"action": "pool_create", "pool": "before", "durable": true})));
    fill(&server, true);

    // Every durable request is refused with the right reason. A write that still fits into the
    // log's last page may succeed.
    let mut refused = 0;
    let end = Instant::now() + TIMEOUT;
    let mut n = 0;
    while refused < 3 {
        assert!(Instant::now() < end, "the disk did not fill up");
        n += 1;
        let make = json!({"action": "pool_create", "pool": format!("full{n}"), "durable": true,
            "properties": {"x": "x".repeat(4000)}});
        let reply = a.request(make);
        if reply["status"] != "ok" {
            assert_eq!(code(&reply), "storage", "{reply}");
            refused += 1;
        }
    }
    let mut register = a.request(json!({"action": "trigger_register", "triggers": ["late"]}));
    assert_eq!(code(&register), "storage", "{register}");
    let parked =
        json!({"action": "trigger", "process": "nobody", "park": true, "data": "x".repeat(8000)});
    assert_eq!(code(&b.request(parked)), "storage");
    let create = json!({"action": "memory_create", "block_id": "big", "size": 64 << 20,
        "kind": "persistent"});
    assert_eq!(code(&a.request(create)), "storage");
    // Calls, blocks in memory and existing blocks keep working.
    for _ in 0..100 {
        b.send(&json!({"action": "trigger", "id": "c", "process": "t", "data": 1}));
        let call = until(&mut a, |m| m["action"] == "trigger");
        a.send(
            &json!({"action": "response", "in_reply_to": call["id"], "status": "ok",
            "response": 2}),
        );
        assert_eq!(ok(&b.receive()), 2);
    }
    ok(&a.request(json!({"action": "memory_write", "block_id": "kept", "data": "AQI="})));
    // A new app is notified that it is not stored.
    let (_new, ack) = server.app(json!({"app_id": "new", "pools": ["p"]}));
    assert_eq!(ack["stored"], false, "{ack}");
    let reply = admin.request(json!({"action": "health"}));
    let health = ok(&reply);
    assert_eq!(health["status"], "degraded", "{health}");
    assert!(
        health["components"]["store"]["seen"]["failing"].is_string(),
        "{health}"
    );

    fill(&server, false);
    register = a.request(json!({"action": "trigger_register", "triggers": ["after"]}));
    ok(&register);
    ok(&a.request(json!({"action": "pool_create", "pool": "healed", "durable": true})));
    let reply = admin.request(json!({"action": "health"}));
    assert_eq!(ok(&reply)["components"]["store"]["status"], "ok", "{reply}");
    let reply = admin.request(json!({"action": "db_check", "full": true}));
    assert_eq!(ok(&reply)["ok"], true, "{reply}");
    server.kill();

    let server = site.start();
    let (mut a, ack) = server.app(json!({"app_id": "a"}));
    let triggers = ack["triggers"].as_array().unwrap();
    assert!(
        triggers.contains(&json!("t")) && triggers.contains(&json!("after")),
        "{ack}"
    );
    // What was only in memory while the disk was full was stored after the disk recovered.
    let (_, ack) = server.app(json!({"app_id": "new"}));
    assert_eq!(ack["rehydrated"], true, "{ack}");
    for pool in ["before", "healed"] {
        ok(&a.request(json!({"action": "pool_info", "pool": pool})));
    }
    let reply = a.request(json!({"action": "memory_info", "block_id": "kept"}));
    assert_eq!(ok(&reply)["version"], 1);
}

/// Overwrites the database except for its first bytes, which identify the format.
fn damage(file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    for byte in bytes.iter_mut().skip(100) {
        *byte = 0x5a;
    }
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn a_damaged_database_is_set_aside_and_the_newest_good_backup_taken() {
    let site = Site::new();
    let data = site.data_dir();
    let server = site.start();
    let mut admin = join(&server, json!({"app_id": "admin"}));
    let mut backups = Vec::new();
    for app in ["one", "two", "three"] {
        join(
            &server,
            json!({"app_id": app, "pools": ["p"], "triggers": ["t"]}),
        );
        if app != "three" {
            let reply = admin.request(json!({"action": "backup"}));
            backups.push(PathBuf::from(ok(&reply)["file"].as_str().unwrap()));
        }
        if app == "one" {
            // Of each day the newest backup is kept; this one is of another day.
            let older = data.join("backups/latzero-20200101-000000.db");
            let kept = data.join("older");
            std::fs::rename(&backups[0], &kept).unwrap();
            backups[0] = older;
        }
    }
    server.kill();
    std::fs::rename(data.join("older"), &backups[0]).unwrap();

    // The newest good backup is used: first the second one, then, when that is damaged too, the
    // first.
    for (is_newest_good, has_two) in [(true, true), (false, false)] {
        damage(&data.join("data.db"));
        let _ = std::fs::remove_file(data.join("data.db-wal"));
        if !is_newest_good {
            damage(&backups[1]);
        }
        let taken = &backups[usize::from(is_newest_good)];
        let server = site.start();
        let mut admin = join(&server, json!({"app_id": "admin"}));
        let reply = admin.request(json!({"action": "health"}));
        let health = ok(&reply);
        assert_eq!(health["status"], "degraded", "{health}");
        let losses = health["losses"].to_string();
        let name = taken.file_name().unwrap().to_str().unwrap();
        assert!(
            losses.contains("is damaged") && losses.contains(name),
            "{losses}"
        );
        wait_for("the line in the log", || site.said().contains("is damaged"));
        let set_aside = std::fs::read_dir(&data).unwrap().flatten();
        let set_aside =
            set_aside.filter(|e| e.file_name().to_string_lossy().starts_with("corrupt-"));
        assert!(set_aside.count() >= 1);
        for (app, is_there) in [("one", true), ("two", has_two), ("three", false)] {
            assert_eq!(listed(&mut admin, app).is_some(), is_there, "{app}");
        }
        let (_, ack) = server.app(json!({"app_id": "one"}));
        assert_eq!(ack["rehydrated"], true);
        server.kill();
    }
    // The loss is reported until an orderly stop; a crash does not hide it.
    let server = site.start();
    let mut admin = join(&server, json!({"app_id": "admin"}));
    let health = ok(&admin.request(json!({"action": "health"}))).clone();
    assert_eq!(health["status"], "degraded", "{health}");
    assert!(server.stop().success());
    let server = site.start();
    let mut admin = join(&server, json!({"app_id": "admin"}));
    assert_eq!(
        ok(&admin.request(json!({"action": "health"})))["status"],
        "ok"
    );
}

#[test]
fn one_of_twenty_servers_wins_and_the_others_report_it() {
    let site = Site::new();
    for _ in 0..2 {
        let (winners, losers): (Vec<_>, Vec<_>) =
            site.race(20).into_iter().partition(Result::is_ok);
        let said: Vec<_> = losers
            .iter()
            .filter_map(|loser| loser.as_ref().err())
            .collect();
        assert_eq!(winners.len(), 1, "{said:?}");
        let winner = winners.into_iter().next().unwrap().unwrap();
        for loser in losers {
            let Err(refused) = loser else { unreachable!() };
            assert_eq!(refused.status.code(), Some(75), "{refused:?}");
            let named = format!("pid {}", winner.pid());
            assert!(
                refused.said.contains("another server uses") && refused.said.contains(&named),
                "{named}: {refused:?}"
            );
        }
        // It is not disturbed, and a later server is refused in the same way.
        let Err(refused) = site.start_with(&Start::default()) else {
            panic!("two servers have one directory")
        };
        assert!(
            refused.said.contains(&format!("pid {}", winner.pid())),
            "{refused:?}"
        );
        let mut app = join(&winner, json!({"app_id": "a"}));
        ok(&app.request(json!({"action": "ping"})));
        winner.kill();
    }
    let server = site.start();
    assert!(server.stop().success());
    assert!(!site.data_dir().join("latzero.sock").exists());
}

/// The states in which a power loss may leave the directory: everything acknowledged is on the
/// disk, and any part of what was written after it. The test can't change the kernel's boot id, so
/// the server takes the copy for the result of a kill; `latzero-store` and `latzero-shm` test what
/// happens in another boot.
/// and `latzero-shm` test for themselves.
#[test]
fn a_copy_of_the_directory_at_any_acknowledged_step_holds_what_was_acknowledged() {
    let site = Site::new();
    let server = site.start();
    let mut app = join(&server, json!({"app_id": "a"}));
    let steps = [
        json!({"action": "trigger_register", "triggers": ["t1"]}),
        json!({"action": "pool_create", "pool": "d", "durable": true, "properties": {"k": 1}}),
        json!({"action": "memory_create", "block_id": "b", "size": 8192, "kind": "persistent"}),
        json!({"action": "memory_write", "block_id": "b", "data": "AQEBAQ=="}),
        json!({"action": "memory_flush", "block_id": "b"}),
        json!({"action": "trigger", "process": "nobody", "park": true, "ttl": 3_600_000}),
        json!({"action": "memory_resize", "block_id": "b", "size": 16384}),
        json!({"action": "pool_remove", "pool": "d"}),
        json!({"action": "trigger_unregister", "triggers": ["t1"]}),
        json!({"action": "memory_write", "block_id": "b", "data": "AgICAg=="}),
        json!({"action": "memory_flush", "block_id": "b"}),
        json!({"action": "memory_remove", "block_id": "b"}),
    ];
    let log = site.data_dir().join("data.db-wal");
    let length = || std::fs::metadata(&log).map_or(0, |log| log.len());
    for (done, step) in steps.iter().enumerate() {
        let synced = length();
        let mark = std::fs::read(site.data_dir().join("data.db.mark")).unwrap_or_default();
        // The next step is in progress when the power fails: the copy may have any part of it.
        let mut message = step.clone();
        message["id"] = "step".into();
        app.send(&message);
        let during = server.while_stopped(|| site.copied());
        let reply = until(&mut app, |m| m["in_reply_to"] == "step");
        assert!(
            reply["status"] == "ok" || reply["status"] == "parked",
            "{step}: {reply}"
        );
        let after = server.while_stopped(|| site.copied());
        check_copy(&during, done, done + 1);
        check_copy(&after, done + 1, done + 1);
        // What was not synced is cut off, torn, or zeros.
        let now = length();
        if now > synced {
            for (kept, is_zeros) in [
                (0, false),
                ((now - synced) / 2, false),
                (now - synced - 1, true),
            ] {
                let torn = server.while_stopped(|| site.copied());
                let copy = torn.data_dir().join("data.db-wal");
                let file = std::fs::File::options().write(true).open(copy).unwrap();
                file.set_len(synced + kept).unwrap();
                if is_zeros {
                    file.set_len(now + 4096).unwrap();
                }
                // A commit is counted once it is synced.
                std::fs::write(torn.data_dir().join("data.db.mark"), &mark).unwrap();
                check_copy_of_records(&torn, done, done + 1);
            }
        }
    }
    server.kill();
}

/// Starts a server on the copy: at least the first `done` steps are there, and no more than
/// `begun`.
fn check_copy(copy: &Site, done: usize, begun: usize) {
    let server = check_copy_of_records(copy, done, begun);
    let mut app = join(&server, json!({"app_id": "a"}));
    let info = app.request(json!({"action": "memory_info", "block_id": "b"}));
    let there = info["status"] == "ok";
    assert!(
        there || done < 3 || begun >= 12,
        "after step {done}: {info}"
    );
    assert!(!there || begun >= 3, "after step {done}: {info}");
    if there {
        let block = ok(&info);
        let least = if done >= 10 { 2 } else { u64::from(done >= 4) };
        let most = if begun >= 10 {
            2
        } else {
            u64::from(begun >= 4)
        };
        let version = block["version"].as_u64().unwrap();
        assert!(
            (least..=most).contains(&version),
            "after step {done}: {info}"
        );
        let size = block["size"].as_u64().unwrap();
        assert!(
            size == 8192 && done < 7 || size == 16384 && begun >= 7,
            "after step {done}: {info}"
        );
        let read = app.request(json!({"action": "memory_read", "block_id": "b", "length": 4}));
        let content = ["AAAAAA==", "AQEBAQ==", "AgICAg=="][version as usize];
        assert_eq!(ok(&read)["data"], content, "after step {done}");
    }
    let health = app.request(json!({"action": "health"}));
    assert_eq!(
        ok(&health)["components"]["memory"]["status"],
        "ok",
        "{health}"
    );
}

/// As [`check_copy`], for blocks.
fn check_copy_of_records(copy: &Site, done: usize, begun: usize) -> Daemon {
    let server = copy.start();
    let mut app = join(&server, json!({"app_id": "checker"}));
    let check = app.request(json!({"action": "db_check", "full": true}));
    assert_eq!(ok(&check)["ok"], true, "after step {done}: {check}");
    let health = app.request(json!({"action": "health"}));
    assert_eq!(
        ok(&health)["components"]["store"]["status"],
        "ok",
        "after step {done}: {health}"
    );
    let is_there = |is: bool, from: usize, to: usize| {
        assert!(
            is || done < from || begun >= to,
            "step {from} is lost after {done}"
        );
        assert!(
            !is || (begun >= from && done < to),
            "step {from} exists after {done}"
        );
    };
    let known = listed(&mut app, "a").unwrap();
    let serves = known["triggers"]
        .as_array()
        .unwrap()
        .iter()
        .any(|t| t["name"] == "t1");
    is_there(serves, 1, 9);
    let pool = app.request(json!({"action": "pool_info", "pool": "d"}));
    is_there(pool["status"] == "ok", 2, 8);
    if pool["status"] == "ok" {
        assert_eq!(ok(&pool)["properties"], json!({"k": 1}));
    }
    let mut handler = join(&server, json!({"app_id": "late", "triggers": ["nobody"]}));
    handler.send(&json!({"action": "ping", "id": "ping"}));
    let first = handler.receive();
    is_there(first["action"] == "trigger", 6, usize::MAX);
    server
}

/// Writes rows that no server would write.
fn spoil(site: &Site) {
    use latzero_store::{AnswerRow, AppRow, CallRow, PoolRow, RowChange};
    let options = latzero_store::Options::default();
    let store = latzero_store::open(&site.data_dir(), options)
        .unwrap()
        .store;
    let pool = |name: &str, owner: &str, policy: &str| {
        RowChange::PutPool(PoolRow {
            name: name.into(),
            kind: "local".into(),
            encrypted: false,
            owner: Some(owner.into()),
            policy: Some(policy.into()),
            properties: Some("{".into()),
            descriptor: None,
            created: 1,
            updated: 1,
        })
    };
    let call = |number, pool: &str, envelope: &str| {
        RowChange::PutCall(CallRow {
            number,
            pool: pool.into(),
            process: "t".into(),
            destination: None,
            caller: "a".into(),
            call_id: "c".into(),
            envelope: envelope.into(),
            attachment: None,
            idempotency_key: None,
            expires: i64::MAX,
            attempt: 0,
            parked: 1,
            died: None,
            cause: None,
        })
    };
    for change in [
        pool("closed", "owner", "no rules at all"),
        pool("orphaned", "no such/app", "{}"),
        pool("no such/pool", "owner", "{}"),
        call(101, "ghost", "{"),
        call(102, "no such/pool", "{}"),
        RowChange::PutAnswer {
            answer: AnswerRow {
                number: 103,
                caller: "a".into(),
                call_id: "c".into(),
                pool: "ghost".into(),
                idempotency_key: None,
                frame: vec![255; 4],
                expires: i64::MAX,
                process: "work".into(),
            },
            ends_call: None,
        },
        RowChange::PutApp(AppRow {
            app_id: "a".into(),
            pools: "{".into(),
            triggers: "7".into(),
            watches: "x".into(),
            meta: Some("]".into()),
            protocol_version: 1,
            registered: -1,
            last_seen: i64::MAX,
        }),
    ] {
        store.commit(vec![change]).unwrap();
    }
    store.close().unwrap();
}

#[test]
fn invalid_rows_grant_nothing_and_affect_no_other_row() {
    let site = Site::new();
    let server = site.start();
    let mut good = join(&server, json!({"app_id": "good", "pools": ["p"]}));
    let parked = json!({"action": "trigger", "id": "1", "process": "t", "pool": "p", "park": true});
    assert_eq!(good.request(parked)["status"], "parked");
    assert!(server.stop().success());
    spoil(&site);
    let server = site.start();
    // A pool whose rules can't be read admits only its owner, and nobody else can create its name.
    for pool in ["closed", "orphaned"] {
        let refused = server
            .connect()
            .unwrap()
            .request(json!({"action": "handshake", "app_id": "evil", "pools": [pool]}));
        assert_eq!(code(&refused), "forbidden", "{pool}: {refused}");
    }
    let mut owner = join(&server, json!({"app_id": "owner", "pools": ["closed"]}));
    ok(&owner.request(json!({"action": "pool_remove", "pool": "closed", "force": true})));
    // A parked call in the app's own pool left no pool behind, and an app whose registration was
    // lost is treated as new.
    let pools = owner.request(json!({"action": "pool_list"}));
    assert!(!pools.to_string().contains("ghost"), "{pools}");
    let (_, ack) = server.app(json!({"app_id": "a", "triggers": ["u"]}));
    assert_eq!(
        (&ack["status"], &ack["triggers"]),
        (&json!("ok"), &json!(["u"]))
    );
    let mut handler = join(
        &server,
        json!({"app_id": "h", "pools": ["p"], "triggers": ["t"]}),
    );
    assert_eq!(
        until(&mut handler, |m| m["action"] == "trigger")["process"],
        "t"
    );
    let said = site.said();
    for row in [
        "closed",
        "orphaned",
        "number=101",
        "number=102",
        "number=103",
    ] {
        assert!(said.contains(row), "{row} is not in:\n{said}");
    }
}

/// Shifts every stored time as if the clock had since been set by `by_ms`.
fn set_clock(site: &Site, by_ms: i64) {
    use latzero_store::RowChange;
    let options = latzero_store::Options::default();
    let opened = latzero_store::open(&site.data_dir(), options).unwrap();
    let mut changes = Vec::new();
    for mut row in opened.contents.calls {
        row.expires -= by_ms;
        row.parked -= by_ms;
        changes.push(RowChange::PutCall(row));
    }
    let clock = opened
        .contents
        .settings
        .into_iter()
        .find(|(key, _)| key == "clock");
    let mut clock: Value = serde_json::from_str(&clock.unwrap().1).unwrap();
    clock["unix_ms"] = (clock["unix_ms"].as_i64().unwrap() - by_ms).into();
    changes.push(RowChange::PutSetting {
        key: "clock".into(),
        value: clock.to_string(),
    });
    opened.store.commit(changes).unwrap();
    opened.store.close().unwrap();
}

#[test]
fn changing_the_clock_moves_no_deadline() {
    const DAYS: i64 = 30 * 24 * 3_600_000;
    for by_ms in [DAYS, -DAYS] {
        let site = Site::new();
        let server = site.start();
        let mut caller = join(&server, json!({"app_id": "caller"}));
        let parked =
            json!({"action": "trigger", "process": "t", "id": "1", "park": true, "ttl": 600_000});
        assert_eq!(caller.request(parked)["status"], "parked");
        assert!(server.stop().success());
        set_clock(&site, by_ms);
        let server = site.start();
        let mut caller = join(&server, json!({"app_id": "caller"}));
        let shown = caller.request(json!({"action": "parked_list"}));
        let call = ok(&shown)["parked"][0].clone();
        let left = call["expires"].as_i64().unwrap() - unix_ms() as i64;
        assert!(
            (500_000..=600_000).contains(&left),
            "{left} ms are left: {call}"
        );
        assert!(site.said().contains("the clock of the machine was changed"));
    }
}
