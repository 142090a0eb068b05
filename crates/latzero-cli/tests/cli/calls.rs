//! Calls and events.

use serde_json::json;

use crate::program::{Running, Server, eventually, run, run_with};

#[test]
fn answers_come_as_json() {
    let server = Server::start();
    let check = |args: &[&str], out: &str| {
        let ran = server
            .run(&[&["call", "system/echo"], args].concat())
            .ended_with(0);
        assert_eq!(ran.out, out, "{args:?}");
    };
    // Fields keep their order, numbers their digits.
    check(
        &["{\"b\": 1.50, \"a\": 12345678901234567890123}"],
        "{\"b\":1.50,\"a\":12345678901234567890123}\n",
    );
    check(&[], "null\n");
    check(&["-5"], "-5\n");
    check(&["\"text\""], "\"text\"\n");
    check(&["\"text\"", "--raw"], "text\n");
    check(&["[1]", "--raw"], "[1]\n");
    check(&["1", "--json"], "1\n");
    check(&["1", "--stream"], "1\n");

    let file = server.home().join("request.json");
    std::fs::write(&file, "{\"from\": \"a file\"}\n").unwrap();
    check(
        &[&format!("@{}", file.display())],
        "{\"from\":\"a file\"}\n",
    );
    let ran = run_with(
        &mut server.command(&["call", "system/echo", "-"]),
        "[1,\n 2]\n",
    );
    assert_eq!(ran.ended_with(0).out, "[1,2]\n");
    let ran = run_with(&mut server.command(&["call", "system/echo", "-"]), "no\n");
    ran.ended_with(2).said("stdin is not JSON");
    server
        .run(&["call", "system/echo", "hello"])
        .ended_with(2)
        .said("'\"hello\"'");
}

#[test]
fn items_of_a_stream_may_be_bytes() {
    let server = Server::start();
    let script = "printf '\\000\\000\\000\\002\\377\\n\\000\\000\\000\\001\\376'";
    let command = ["--", "sh", "-c", script];
    let args = [
        &["alpha/raw", "--stream=length", "--output", "bytes"],
        &command[..],
    ]
    .concat();
    let _serving = server.serve(&args);
    let call = server
        .command(&["call", "alpha/raw", "--stream"])
        .output()
        .unwrap();
    assert_eq!(call.stdout, b"\xff\n\xfe");
    let ran = server
        .run(&["call", "alpha/raw", "--stream", "--json"])
        .ended_with(0);
    let lines: Vec<&str> = ran.out.lines().collect();
    let items = [
        "{\"item\":{\"hex\":\"ff0a\"}}",
        "{\"item\":{\"hex\":\"fe\"}}",
    ];
    assert_eq!(lines[..2], items);
}

#[test]
fn wrong_names_get_suggestions() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/double", "--app", "calc", "--", "cat"]);
    let check = |args: &[&str], code: &str, hint: &str| {
        let ran = server.run(&[&["call"], args].concat()).ended_with(5);
        ran.said(&format!("error: {code}: ")).said(hint);
    };
    check(&["alpha/duoble"], "no_handler", "did you mean alpha/double");
    check(&["double"], "no_handler", "did you mean alpha/double");
    check(&["alhpa/double"], "no_pool", "did you mean alpha?");
    check(
        &["alpha/double", "--to", "clac"],
        "no_app",
        "did you mean calc?",
    );
    check(&["system/echo", "--to", "calc"], "not_member", "help: ");
    let ran = server.run(&["call", "alpha/double", "--to", "latzero"]);
    assert!(!ran.err.contains("did you mean latzero"), "{}", ran.err);
    let pools = server.run(&["pools", "--json"]).json().to_string();
    assert!(
        !pools.contains("alhpa"),
        "an invalid pool was created: {pools}"
    );

    let ran = server.run(&["call", "nobody", "--json"]).ended_with(5);
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(error["error"]["code"], "no_handler");
    assert_eq!(error["error"]["ran"], "no");
    assert_eq!(ran.out, "");
}

#[test]
fn a_slash_in_a_trigger_needs_a_named_pool() {
    let server = Server::start();
    let _serving = server.serve(&["files/list", "--pool", "alpha", "--", "cat"]);
    let ran = server
        .run(&["call", "--pool", "alpha", "files/list", "1"])
        .ended_with(0);
    assert_eq!(ran.out, "1\n");
    assert_eq!(
        server
            .run(&["call", "alpha/files/list", "2"])
            .ended_with(0)
            .out,
        "2\n"
    );
}

#[test]
fn items_are_printed_as_they_arrive() {
    let server = Server::start();
    let url = format!(
        "latzero://tail?pool=alpha&socket={}/latzero.sock",
        server.data_dir().display()
    );
    let app = latzero::blocking::App::connect(&url).unwrap();
    app.serve("tail", |request| {
        let n: u64 = request.data()?;
        for i in 0..n {
            request.progress(&json!({"at": i}))?;
            request.partial(&json!({"line": i}))?;
        }
        Ok(json!("the end"))
    })
    .unwrap();
    let ran = server
        .run(&["call", "alpha/tail", "200", "--stream"])
        .ended_with(0);
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(
        (lines.len(), lines[0], lines[199]),
        (200, "{\"line\":0}", "{\"line\":199}")
    );
    assert!(ran.err.contains("progress: {\"at\":"), "{}", ran.err);
    ran.said("end: \"the end\"");
    let ran = server
        .run(&["call", "alpha/tail", "1", "--stream", "--json"])
        .ended_with(0);
    let lines: Vec<&str> = ran.out.lines().collect();
    let expected = [
        "{\"progress\":{\"at\":0}}",
        "{\"item\":{\"line\":0}}",
        "{\"end\":\"the end\"}",
    ];
    assert_eq!(lines, expected);
    // Without --stream, only the end is wanted.
    assert_eq!(
        server.run(&["call", "alpha/tail", "3"]).ended_with(0).out,
        "\"the end\"\n"
    );

    app.serve("bytes", |_| Ok(latzero::Bytes(vec![0, 255, 10])))
        .unwrap();
    let done = server
        .command(&["call", "alpha/bytes", "--raw"])
        .output()
        .unwrap();
    assert_eq!(done.stdout, [0, 255, 10]);
}

#[test]
fn a_timeout_ends_with_6() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/never", "--", "sleep", "1000"]);
    let ran = server
        .run(&["call", "alpha/never", "--timeout", "100ms"])
        .ended_with(6);
    ran.said("error: timeout");
}

#[test]
fn calls_never_reach_an_event_listener() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/x", "--", "cat"]);
    let _listening = Running::start(&mut server.command(&["on", "alpha/x"]));
    let emit = || server.run(&["emit", "alpha/x", "1", "--json"]).json();
    // The handler takes emits too: two of them, and the listener is there.
    eventually(|| emit()["delivered"] == 2);
    for n in ["1", "2", "3", "4"] {
        let called = server.run(&["call", "alpha/x", n]).ended_with(0);
        assert_eq!(called.json(), n.parse::<u64>().unwrap());
    }
}

#[test]
fn events_are_printed_as_they_arrive() {
    let server = Server::start();
    let mut command = server.command(&["on", "alpha/saved", "alpha/other", "--count", "4"]);
    let mut listening = Running::start(&mut command);
    let watching = Running::start(&mut server.command(&["watch", "alpha", "--count", "100"]));
    // An emit reaches who listens; how many did says when they do.
    let emit = |args: &[&str]| {
        let ran = server.run(&[&["emit"], args, &["--json"]].concat());
        match ran.code {
            0 => ran.json()["delivered"].as_u64().unwrap(),
            _ => 0,
        }
    };
    eventually(|| emit(&["alpha/saved", "{\"id\":  7}"]) == 1);
    assert_eq!(emit(&["alpha/other", "1", "--header", "a=b"]), 1);
    assert_eq!(emit(&["alpha/saved", "--to", "nobody"]), 0);
    assert_eq!(emit(&["alpha/saved", "\"x\"", "--one"]), 1);
    assert_eq!(emit(&["alpha/saved", "raw", "--bytes"]), 1);

    let lines: Vec<String> = (0..4).map(|_| listening.line()).collect();
    assert!(lines[0].ends_with(",\"data\":{\"id\":7}}"), "{}", lines[0]);
    let events: Vec<serde_json::Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        (&events[0]["trigger"], &events[0]["pool"]),
        (&"saved".into(), &"alpha".into())
    );
    assert!(
        events[0]["from"]["app_id"]
            .as_str()
            .unwrap()
            .starts_with("cli-")
    );
    assert_eq!(
        (&events[1]["trigger"], &events[1]["headers"]["a"]),
        (&"other".into(), &"b".into())
    );
    assert_eq!(events[2]["data"], "x");
    assert_eq!(events[3]["data"], serde_json::json!({"hex": "726177"}));
    assert_eq!(listening.exit_code(), 0);

    // Who watches sees them come and go.
    let serving = server.serve(&["alpha/new", "--app", "newcomer", "--", "cat"]);
    let event: serde_json::Value = serde_json::from_str(&watching.line_with("newcomer")).unwrap();
    assert_eq!(event["event"], "app_online");
    drop(serving);
    watching.line_with("app_offline");
    let text = run(&mut server.command(&["emit", "alpha/new"]))
        .ended_with(0)
        .out;
    assert_eq!(text, "delivered to 0 handlers\n");
}
