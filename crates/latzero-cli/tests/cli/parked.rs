//! Calls that wait on the server's disk, and their answers.

use serde_json::{Value, json};

use crate::program::{Running, Server, eventually};

/// Parks a call and leaves it there.
fn park(server: &Server, app: &str, id: &str, data: &str) {
    let args = [
        "call",
        "alpha/job",
        data,
        "--park",
        "--no-wait",
        "--app",
        app,
        "--id",
        id,
    ];
    let parked = server
        .run(&[&args[..], &["--json"]].concat())
        .ended_with(0)
        .json();
    assert_eq!(parked, json!({"parked": true, "id": id, "app_id": app}));
}

/// How many calls the store keeps, by way of a backup.
fn parked(server: &Server) -> Value {
    server.run(&["backup", "--json"]).ended_with(0).json()["calls"].clone()
}

#[test]
fn a_parked_call_is_answered_when_a_handler_appears() {
    let server = Server::start();
    let mut calling = Running::start(&mut server.command(&["call", "alpha/job", "[1]", "--park"]));
    eventually(|| parked(&server) == 1);
    let serving = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    assert_eq!(calling.line(), "[1]");
    assert_eq!(calling.exit_code(), 0);
    // Where somebody is there it is a call like any other.
    for args in ["--park", "--redeliver"] {
        let ran = server.run(&["call", "alpha/job", "[2]", args]);
        assert_eq!(ran.ended_with(0).out, "[2]\n", "{args}");
    }
    drop(serving);
}

#[test]
fn a_caller_that_does_not_wait_leaves_its_call_with_the_server() {
    let server = Server::start();
    // The handler that is free would run for longer than the caller stays.
    let gate = server.home().join("gate");
    let script = format!(
        "until test -e '{}'; do sleep 0.02; done; cat",
        gate.display()
    );
    let _serving = server.serve(&["alpha/job", "--app", "worker", "--", "sh", "-c", &script]);
    let call = [
        "call",
        "alpha/job",
        "[3]",
        "--park",
        "--no-wait",
        "--app",
        "shop",
    ];
    let keyed = [&call[..], &["--id", "order-17", "--idempotency-key", "17"]].concat();
    for _ in 0..2 {
        // Said twice it is the same call.
        assert_eq!(
            server.run(&keyed).ended_with(0).out,
            "parked\torder-17\napp\tshop\n"
        );
    }
    let repeat = [&call[..], &["--id", "again", "--idempotency-key", "17"]].concat();
    assert_eq!(
        server.run(&repeat).ended_with(0).out,
        "parked\tagain\napp\tshop\n"
    );
    std::fs::write(gate, "").unwrap();
    let fetch = ["answers", "--app", "shop", "--wait", "20s", "--count", "2"];
    let fetched = server.run(&fetch).ended_with(0).out;
    let mut lines: Vec<&str> = fetched.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            r#"{"id":"again","pool":"alpha","data":[3]}"#,
            r#"{"id":"order-17","pool":"alpha","data":[3]}"#
        ]
    );
}

#[test]
fn waiting_for_a_parked_call_survives_a_restart() {
    let server = Server::start();
    let mut calling = Running::start(&mut server.command(&["call", "alpha/job", "[1]", "--park"]));
    eventually(|| parked(&server) == 1);
    let server = Server::in_home(server.crash(), &[]);
    let _serving = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    assert_eq!(calling.line(), "[1]");
    assert_eq!(calling.exit_code(), 0);
}

#[test]
fn answers_of_an_encrypted_pool_are_opened_by_later_commands() {
    let server = Server::start();
    server.run(&["keys", "new", "vault"]).ended_with(0);
    let create = ["pools", "create", "vault", "--encrypted"];
    server.run(&create).ended_with(0);
    park(&server, "shop", "plain", "1");
    let sealed = ["call", "vault/job", "2", "--park", "--no-wait"];
    let sealed = [&sealed[..], &["--app", "shop"]].concat();
    server
        .run(&[&sealed[..], &["--id", "one"]].concat())
        .ended_with(0);
    let generated = server.run(&sealed).ended_with(0).out;
    let generated = generated
        .lines()
        .find_map(|line| line.strip_prefix("parked\t"));
    let generated = generated.unwrap().to_owned();
    // A command that waits leaves its call when it is killed.
    let mut waiting = vec!["call", "vault/job", "3", "--park", "--app", "shop"];
    waiting.extend(["--id", "killed"]);
    let running = Running::start(&mut server.command(&waiting));
    eventually(|| parked(&server) == 4);
    drop(running);
    let server = Server::in_home(server.stop(), &[]);
    let serve = ["alpha/job", "vault/job", "--app", "worker", "--", "cat"];
    let serving = server.serve(&serve);
    let state = |state: &str| {
        let listed = server.run(&["parked", "ls", "--json"]).ended_with(0).json();
        let calls = listed["parked"].as_array().unwrap();
        let calls = calls.iter().filter(|call| call["state"] == state);
        calls.count()
    };
    eventually(|| state("answered") == 4);
    let fetch = ["answers", "--app", "shop", "--wait", "20s", "--count", "4"];
    let fetched = server.run(&fetch).ended_with(0).out;
    let mut lines: Vec<&str> = fetched.lines().collect();
    lines.sort_unstable();
    let line = |pool: &str, id: &str, data: u8| {
        format!(r#"{{"id":"{id}","pool":"{pool}","data":{data}}}"#)
    };
    let mut expected = [
        line("vault", "killed", 3),
        line("vault", "one", 2),
        line("alpha", "plain", 1),
        line("vault", &generated, 2),
    ];
    expected.sort_unstable();
    assert_eq!(lines, expected);
    // Nothing is left of them.
    let pools = server.home().join(".local/state/latzero/pools");
    let awaited = std::fs::read_dir(pools).unwrap().map(Result::unwrap);
    let is_awaited = |path: &std::path::Path| path.to_string_lossy().ends_with("=awaited");
    let awaited = awaited.filter(|entry| is_awaited(&entry.path()));
    assert_eq!(awaited.count(), 0);

    // Without the keys at their usual place they have to be named.
    drop(serving);
    server
        .run(&[&sealed[..], &["--id", "two"]].concat())
        .ended_with(0);
    let serving = server.serve(&serve);
    eventually(|| state("answered") == 1);
    drop(serving);
    let moved = server.home().join("vault.keys");
    std::fs::rename(server.home().join(".config/latzero/keys/vault"), &moved).unwrap();
    let without = server.run(&["answers", "--app", "shop"]).ended_with(0);
    without.said("skipped pool vault: it is encrypted; name it and its keys with --pool");
    let fetch = [
        "answers", "--app", "shop", "--wait", "20s", "--count", "1", "--pool", "vault",
    ];
    server.run(&fetch).ended_with(77).said("--keys");
    let fetch = [&fetch[..], &["--keys", moved.to_str().unwrap()]].concat();
    let fetched = server.run(&fetch).ended_with(0);
    assert_eq!(fetched.out, format!("{}\n", line("vault", "two", 2)));
}

#[test]
fn answers_wait_for_the_app_that_parked_a_call() {
    let server = Server::start();
    park(&server, "shop", "one", "{\"b\": 1.50}");
    park(&server, "shop", "two", "2");
    park(&server, "other", "three", "3");
    assert_eq!(
        server.run(&["answers", "--app", "shop"]).ended_with(0).out,
        ""
    );
    let server = Server::in_home(server.stop(), &[]);
    // It fails for the call that says so.
    let script = "read x; [ \"$x\" != 2 ] || exit 7; printf '%s\\n' \"$x\"";
    let serving = server.serve(&["alpha/job", "--app", "worker", "--", "sh", "-c", script]);
    let args = ["answers", "--app", "shop", "--wait", "30s", "--count", "2"];
    let mut lines: Vec<String> = server
        .run(&args)
        .ended_with(0)
        .out
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(
        lines[0].starts_with("{\"id\":\"one\"") && lines[0].ends_with("\"data\":{\"b\":1.50}}"),
        "{lines:?}"
    );
    let failed: Value = serde_json::from_str(&lines[1]).unwrap();
    assert_eq!(
        (&failed["id"], &failed["error"]["code"]),
        (&json!("two"), &json!("handler_error"))
    );
    // What was printed is not kept, and another app's answers are its own.
    let none = ["answers", "--app", "shop", "--wait", "1s"];
    server.run(&none).ended_with(6).said("0 answers for shop");
    drop(serving);
    let server = Server::in_home(server.stop(), &[]);
    let args = [
        "answers", "--app", "other", "--pool", "alpha", "--wait", "30s", "--count", "1",
    ];
    assert_eq!(server.run(&args).ended_with(0).json()["id"], "three");
    server.run(&["answers"]).ended_with(2).said("--app");
}

#[test]
fn no_answer_is_lost_behind_a_count() {
    let server = Server::start();
    for id in ["one", "two", "three"] {
        park(&server, "shop", id, "1");
    }
    let serving = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    let answered = || {
        let listed = server.run(&["parked", "ls", "--json"]).ended_with(0).json();
        let calls = listed["parked"].as_array().unwrap();
        calls.iter().filter(|c| c["state"] == "answered").count()
    };
    eventually(|| answered() == 3);
    drop(serving);
    let mut lines = 0;
    for _ in 0..3 {
        let fetched = server.run(&["answers", "--app", "shop", "--count", "1"]);
        lines += fetched.ended_with(0).out.lines().count();
    }
    assert_eq!((lines, answered()), (3, 0));
}

#[test]
fn a_parked_call_has_a_unique_app() {
    let server = Server::start();
    let args = ["call", "alpha/job", "1", "--park", "--no-wait", "--json"];
    let left = server.run(&args).ended_with(0).json();
    let app = left["app_id"].as_str().unwrap();
    let text = server.run(&args[..5]).ended_with(0).out;
    assert!(
        text.starts_with("parked\t") && text.contains("\napp\tcli-"),
        "{text}"
    );
    assert!(!text.contains(app), "{text}");
    // Room for the parked calls and the one that follows at once.
    let _serving = server.serve(&[
        "alpha/job",
        "--app",
        "worker",
        "--concurrency",
        "8",
        "--",
        "cat",
    ]);
    // Another command of the same user takes nothing away.
    server.run(&["call", "alpha/job", "2"]).ended_with(0);
    let args = ["answers", "--app", app, "--wait", "30s", "--count", "1"];
    let answer = server.run(&args).ended_with(0).json();
    assert_eq!((&answer["id"], &answer["data"]), (&left["id"], &json!(1)));
}

#[test]
fn a_payload_that_is_not_shown_has_a_size() {
    let server = Server::start();
    let big = server.home().join("big.json");
    std::fs::write(&big, format!("\"{}\"", "x".repeat(70 << 10))).unwrap();
    let big = format!("@{}", big.display());
    for (n, payload, shown) in [
        (1, &["[7]"][..], "data\t[7]\n"),
        (2, &["raw", "--bytes"], "data\t3 B of raw bytes\n"),
        (3, &[&big], "data\t70.0 KiB of JSON\n"),
    ] {
        let park = [&["call", "alpha/job", "--park", "--no-wait"], payload].concat();
        server.run(&park).ended_with(0);
        let ran = server.run(&["parked", "show", &n.to_string()]);
        let text = ran.ended_with(0).out;
        assert!(text.contains(shown), "{text}");
    }
}

#[test]
fn only_answers_takes_answers() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    // Its handler answers at once, and other commands use the same AppID.
    for id in ["1", "2"] {
        park(&server, "shop", id, id);
        for args in [
            &["call", "alpha/job", "0"][..],
            &["emit", "alpha/job", "0"],
            &["ping"],
        ] {
            let out = server.run(&[args, &["--app", "shop"]].concat());
            assert_eq!(out.ended_with(0).err, "");
        }
    }
    let fetch = ["answers", "--app", "shop", "--wait", "20s", "--count", "2"];
    let fetched = server.run(&fetch).ended_with(0).out;
    let expected = [1, 2].map(|n| format!("{{\"id\":\"{n}\",\"pool\":\"alpha\",\"data\":{n}}}\n"));
    assert_eq!(fetched, expected.concat());
}

#[test]
fn a_repeat_gets_the_first_answer() {
    let server = Server::start();
    let count = server.home().join("count");
    let script = "cat; echo >> \"$0\"";
    let script = ["--", "sh", "-c", script, count.to_str().unwrap()];
    let _serving = server.serve(&[&["alpha/job", "--app", "worker"][..], &script].concat());
    let call = |key: &str, data: &str, more: &[&str]| {
        let args = ["call", "alpha/job", data, "--idempotency-key", key];
        server.run(&[&args[..], more].concat()).ended_with(0).out
    };
    assert_eq!(call("k", "1", &[]), "1\n");
    assert_eq!(call("k", "2", &[]), "1\n");
    assert_eq!(call("k", "3", &["--park"]), "1\n");
    assert_eq!(call("other", "4", &[]), "4\n");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "\n\n");
}

#[test]
fn a_call_goes_to_the_next_handler_when_its_first_one_dies() {
    let server = Server::start();
    let script = "echo running >&2; exec sleep 1000";
    let first = server.serve(&["alpha/job", "--app", "worker", "--", "sh", "-c", script]);
    let mut command = server.command(&["call", "alpha/job", "[1]", "--park", "--redeliver"]);
    let mut calling = Running::start(&mut command);
    first.line_with("running");
    drop(first);
    let _second = server.serve(&["alpha/job", "--app", "worker", "--", "cat"]);
    assert_eq!(calling.line(), "[1]");
    assert_eq!(calling.exit_code(), 0);
}

#[test]
fn a_call_fails_when_its_attempts_are_exhausted() {
    let server = Server::start();
    let script = "echo running >&2; exec sleep 1000";
    let serving = server.serve(&["alpha/job", "--app", "worker", "--", "sh", "-c", script]);
    let args = [
        "call",
        "alpha/job",
        "[1]",
        "--park",
        "--redeliver",
        "--attempts",
        "1",
    ];
    let mut calling = Running::start(&mut server.command(&args));
    serving.line_with("running");
    drop(serving);
    assert_ne!(calling.exit_code(), 0);
    let dead = server.run(&["parked", "ls", "--dead"]).ended_with(0).out;
    assert!(dead.contains("1 of 1"), "{dead}");
    server
        .run(&["call", "alpha/job", "--attempts", "0"])
        .ended_with(2);
}

#[test]
fn a_stop_leaves_a_running_parked_call_to_the_next_server() {
    let server = Server::with(&["--set", "drain_timeout=100ms"]);
    let started = server.home().join("started");
    let script = format!("touch '{}'; exec sleep 1000", started.display());
    park(&server, "shop", "one", "1");
    let serving = server.serve(&["alpha/job", "--app", "worker", "--", "sh", "-c", &script]);
    eventually(|| started.exists());
    let home = server.stop();
    drop(serving);
    let server = Server::in_home(home, &[]);
    let _next = server.serve(&["alpha/job", "--app", "next", "--", "cat"]);
    let args = [
        "answers", "--app", "shop", "--wait", "30s", "--count", "1", "--json",
    ];
    let answers = server.run(&args).ended_with(0).out;
    assert!(
        answers.contains("\"one\"") && !answers.contains("handler_gone"),
        "{answers}"
    );
}

#[test]
fn conflicting_flags_are_refused() {
    let server = Server::start();
    let check = |args: &[&str], said: &str| {
        let ran = server.run(&[&["call", "alpha/job", "1"], args].concat());
        ran.ended_with(2).said(said);
    };
    check(&["--ttl", "1h"], "--park");
    check(&["--no-wait"], "--park");
    check(&["--park", "--stream"], "cannot be used with");
    check(
        &["--park", "--ttl", "1h", "--timeout", "1s"],
        "cannot be used with",
    );
    let ran = server
        .run(&["call", "alpha/job", "--park", "--ttl", "1ms"])
        .ended_with(6);
    ran.said("timeout");
}
