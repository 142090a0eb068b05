//! Programs as handlers.

use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, test_kill_process};
use serde_json::Value;

use crate::program::{Running, Server, TIMEOUT, eventually};

#[test]
fn a_program_answers_calls() {
    let server = Server::start();
    let _upper = server.serve(&["alpha/upper", "--", "tr", "a-z", "A-Z"]);
    let ran = server
        .run(&["call", "alpha/upper", "{\"a\":\"b\"}"])
        .ended_with(0);
    assert_eq!(ran.out, "{\"A\":\"B\"}\n");

    let script =
        "printf '%s %s %s %s' $LATZERO_TRIGGER $LATZERO_POOL $LATZERO_CALLER ${LATZERO_ID:+id}";
    let _told = server.serve(&[
        "beta/told",
        "beta/too",
        "--app",
        "told",
        "--",
        "sh",
        "-c",
        script,
    ]);
    let ran = server
        .run(&["call", "beta/told", "--raw", "--app", "me"])
        .ended_with(0);
    assert_eq!(ran.out, "told beta me id\n");
    assert_eq!(
        server.run(&["call", "beta/too", "--app", "me"]).out,
        "\"too beta me id\"\n"
    );

    let _silent = server.serve(&["gamma/silent", "--", "true"]);
    assert_eq!(
        server.run(&["call", "gamma/silent"]).ended_with(0).out,
        "null\n"
    );
}

#[test]
fn a_failed_program_is_an_error_with_its_stderr() {
    let server = Server::start();
    let _serving = server.serve(&[
        "alpha/bad",
        "--",
        "sh",
        "-c",
        "echo the disk is full >&2; exit 7",
    ]);
    let ran = server.run(&["call", "alpha/bad", "--json"]).ended_with(5);
    let error: Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!(error["error"]["code"], "handler_error");
    assert_eq!(error["error"]["data"]["exit_code"], 7);
    assert_eq!(error["error"]["data"]["stderr"], "the disk is full\n");
    server
        .run(&["call", "alpha/bad"])
        .ended_with(5)
        .said("ended with exit code 7")
        .said("the disk is full");

    server
        .run(&["serve", "alpha/missing", "--", "/nowhere/at/all"])
        .ended_with(2)
        .said("'/nowhere/at/all' cannot be started");
    server
        .run(&["serve", "alpha/missing", "--", "no-such-program"])
        .ended_with(2)
        .said("no such program on the PATH");
}

#[test]
fn a_schema_is_served_and_shown() {
    let server = Server::start();
    let file = server.home().join("double.json");
    let text = r#"{"type":"object","required":["n"]}"#;
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let _serving = server.serve(&[
        "alpha/double",
        "--schema",
        file,
        "--doc",
        "Twice",
        "--",
        "cat",
    ]);
    let info = ["pools", "info", "alpha", "--trigger", "double"];
    let shown = server.run(&info).ended_with(0).out;
    assert!(shown.contains("doc\tTwice\n"), "{shown}");
    assert!(
        shown.contains("schema\t{\"required\":[\"n\"],\"type\":\"object\"}\n"),
        "{shown}"
    );
    let shown = server.run(&[&info[..], &["--json"]].concat()).json();
    assert_eq!(shown["schema"]["required"][0], "n");
    let missing = ["pools", "info", "alpha", "--trigger", "treble"];
    server
        .run(&missing)
        .ended_with(5)
        .said("no app serves trigger 'treble' in pool 'alpha'");
    std::fs::write(file, "{").unwrap();
    server
        .run(&["serve", "alpha/double", "--schema", file, "--", "cat"])
        .ended_with(2)
        .said("is not JSON");
    std::fs::write(file, "7").unwrap();
    server
        .run(&["serve", "alpha/double", "--schema", file, "--", "cat"])
        .ended_with(5)
        .said("field 'schema' must be an object");
}

#[test]
fn bytes_are_unchanged() {
    let server = Server::start();
    let image: Vec<u8> = (0..=255).cycle().take(2000).collect();
    let file = server.home().join("image.bin");
    std::fs::write(&file, &image).unwrap();
    let path = file.to_str().unwrap();
    let _image = server.serve(&["alpha/image", "--", "cat", path]);
    let _echo = server.serve(&["alpha/echo", "--app", "echo", "--", "cat"]);
    let sent = format!("@{path}");
    for args in [
        &["call", "alpha/image", "--raw"][..],
        &["call", "alpha/image"],
        &["call", "alpha/echo", "--bytes", &sent],
    ] {
        let done = server.command(args).output().unwrap();
        assert!(done.status.success() && done.stdout == image, "{args:?}");
    }
    let _text = server.serve(&[
        "alpha/text",
        "--app",
        "text",
        "--output",
        "text",
        "--",
        "echo",
        "5",
    ]);
    assert_eq!(server.run(&["call", "alpha/text"]).out, "\"5\"\n");
}

#[test]
fn items_are_sent_as_they_are_printed() {
    let server = Server::start();
    let gate = server.home().join("gate");
    let made = std::process::Command::new("mkfifo").arg(&gate).status();
    assert!(made.unwrap().success());
    let script = format!("echo '{{\"n\":1}}'; cat {}; echo two", gate.display());
    let _lines = server.serve(&["alpha/lines", "--stream", "--", "sh", "-c", &script]);
    let mut calling = Running::start(&mut server.command(&["call", "alpha/lines", "--stream"]));
    // The first item is here while the program waits.
    assert_eq!(calling.line(), "{\"n\":1}");
    std::fs::write(&gate, "").unwrap();
    assert_eq!(calling.line(), "\"two\"");
    assert_eq!(calling.exit_code(), 0);

    let script = r"printf '\0\0\0\003a\nb\0\0\0\0019'";
    let _counted = server.serve(&[
        "alpha/counted",
        "--app",
        "counted",
        "--stream=length",
        "--",
        "sh",
        "-c",
        script,
    ]);
    let ran = server
        .run(&["call", "alpha/counted", "--stream"])
        .ended_with(0);
    assert_eq!(ran.out, "\"a\\nb\"\n9\n");
}

#[test]
fn the_program_sees_the_call_and_no_secrets() {
    let server = Server::start();
    let mut command = server.command(&["serve", "alpha/env", "--", "env"]);
    command.env("LATZERO_ADMIN_TOKEN", "sesame");
    command.env("OF_THE_VAULT", "lzs1_sesame");
    let serving = Running::start_err(&mut command);
    serving.line_with("serving ");
    let args = [
        "call",
        "alpha/env",
        "--raw",
        "--header",
        "a=b c",
        "--app",
        "me",
    ];
    let out = server.run(&args).ended_with(0).out;
    for expected in [
        "LATZERO_TRIGGER=env",
        "LATZERO_POOL=alpha",
        "LATZERO_CALLER=me",
        "LATZERO_CALLER_INSTANCE=",
        "LATZERO_HEADERS={\"a\":\"b c\"}",
        "LATZERO_DEADLINE=",
        "LATZERO_ATTEMPT=",
    ] {
        assert!(out.contains(expected), "{expected}: {out}");
    }
    assert!(!out.contains("sesame"), "{out}");
}

#[test]
fn a_killed_serve_ends_its_programs() {
    let server = Server::start();
    let script = "echo runs $$ >&2; sleep 1000 & echo runs $! >&2; wait";
    let serving = server.serve(&["alpha/long", "--", "sh", "-c", script]);
    let mut calling = server
        .command(&["call", "alpha/long"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (parent, child) = (pid_of(&serving), pid_of(&serving));
    serving.signal(Signal::KILL);
    wait_for_end(parent);
    wait_for_end(child);
    calling.wait().unwrap();
}

#[test]
fn serve_without_app_leaves_no_registration() {
    let server = Server::start();
    for args in [
        &["a/x", "--", "cat"][..],
        &["a/x", "--app", "named", "--", "cat"],
    ] {
        let mut serving = server.serve(args);
        serving.signal(Signal::TERM);
        assert_eq!(serving.exit_code(), 0);
    }
    let offline = || {
        let apps = server
            .run(&["apps", "--offline", "--json"])
            .ended_with(0)
            .json();
        let apps = apps["apps"].as_array().unwrap().clone();
        let name = |app: &Value| app["app_id"].as_str().unwrap().to_owned();
        apps.iter().map(name).collect::<Vec<String>>()
    };
    eventually(|| offline() == ["named"]);
    let none = server
        .run(&["apps", "forget", "--offline", "--older", "7d"])
        .ended_with(0);
    assert_eq!(none.out, "");
    let ran = server.run(&["apps", "forget", "--offline"]).ended_with(0);
    assert_eq!(ran.out, "forgot named\n");
    assert!(offline().is_empty());
}

#[test]
fn a_remaining_child_delays_nothing() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/fork", "--", "sh", "-c", "sleep 1000 & echo $!"]);
    let ran = server.run(&["call", "alpha/fork"]).ended_with(0);
    let pid: i32 = ran.out.trim().parse().unwrap();
    let left = Pid::from_raw(pid).unwrap();
    test_kill_process(left).expect("it was still running");
    rustix::process::kill_process(left, Signal::KILL).unwrap();
}

#[test]
fn large_blocks_are_written_and_read() {
    let server = Server::start();
    let _serving = server.serve(&["alpha/cat", "--", "cat"]);
    let file = server.home().join("big.json");
    let big = format!("\"{}\"", "x".repeat(3 << 20));
    std::fs::write(&file, &big).unwrap();
    let ran = server
        .run(&["call", "alpha/cat", &format!("@{}", file.display())])
        .ended_with(0);
    assert!(ran.out.trim() == big, "{} bytes came back", ran.out.len());
}

/// The pid that a handler's program says on its stderr.
fn pid_of(serving: &Running) -> Pid {
    let line = serving.line_with("runs ");
    let pid = line.rsplit(' ').next().and_then(|pid| pid.parse().ok());
    pid.and_then(Pid::from_raw)
        .expect("the line ends with a pid")
}

/// Waits until a process that is no child of this one has ended.
fn wait_for_end(pid: Pid) {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    let timeout = Timespec::try_from(TIMEOUT).expect("it is a minute at most");
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "it is still alive");
}

#[test]
fn a_cancelled_call_ends_its_program() {
    let server = Server::start();
    let script = "echo runs $$ >&2; sleep 1000";
    let serving = server.serve(&["alpha/long", "--", "sh", "-c", script]);
    // Out of time.
    server
        .run(&["call", "alpha/long", "--timeout", "300ms"])
        .ended_with(6);
    wait_for_end(pid_of(&serving));
    // The caller is gone.
    let mut calling = server
        .command(&["call", "alpha/long"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = pid_of(&serving);
    calling.kill().unwrap();
    calling.wait().unwrap();
    wait_for_end(pid);
}

#[test]
fn ctrl_c_finishes_running_calls_and_a_second_one_does_not() {
    let server = Server::start();
    let gate = server.home().join("gate");
    let made = std::process::Command::new("mkfifo")
        .arg(&gate)
        .status()
        .unwrap();
    assert!(made.success());
    let script = "echo runs $$ >&2; read x < \"$0\"; echo 1";
    let args = [
        "alpha/slow",
        "--",
        "sh",
        "-c",
        script,
        gate.to_str().unwrap(),
    ];
    let call = || {
        server
            .command(&["call", "alpha/slow"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };

    let mut serving = server.serve(&args);
    let calling = call();
    pid_of(&serving);
    serving.signal(Signal::INT);
    std::fs::write(&gate, "open\n").unwrap();
    assert_eq!(calling.wait_with_output().unwrap().stdout, b"1\n");
    assert_eq!(serving.exit_code(), 130);

    let mut serving = server.serve(&args);
    let mut calling = call();
    let pid = pid_of(&serving);
    serving.signal(Signal::INT);
    // No longer served: the first signal has arrived.
    eventually(|| {
        let ran = server.run(&["emit", "alpha/slow", "--json"]);
        !ran.out.contains("\"delivered\":1")
    });
    serving.signal(Signal::INT);
    assert_eq!(serving.exit_code(), 130);
    wait_for_end(pid);
    assert_ne!(calling.wait().unwrap().code(), Some(0));
}

#[test]
fn one_process_answers_all_calls_with_lines() {
    let server = Server::start();
    // It counts the lines that it saw, and ends at the word "end".
    let script = "n=0; while read -r x; do n=$((n+1)); [ \"$x\" = '\"end\"' ] && exit 3; echo \
        \"{\\\"n\\\":$n,\\\"x\\\":$x}\"; done";
    let _serving = server.serve(&["alpha/count", "--lines", "--", "sh", "-c", script]);
    let call = |data: &str| server.run(&["call", "alpha/count", data]);
    assert_eq!(call("[1,\n2]").ended_with(0).out, "{\"n\":1,\"x\":[1,2]}\n");
    assert_eq!(call("5").ended_with(0).out, "{\"n\":2,\"x\":5}\n");
    call("\"end\"").ended_with(5).said("ended with exit code 3");
    // The next call starts it again.
    assert_eq!(call("6").ended_with(0).out, "{\"n\":1,\"x\":6}\n");
    server
        .run(&["serve", "a/b", "a/c", "--lines", "--", "cat"])
        .ended_with(2)
        .said("one trigger");
}

#[test]
fn a_handler_continues_after_a_restart_of_the_server() {
    let server = Server::start();
    let serving = server.serve(&["alpha/cat", "--", "cat"]);
    let home = server.crash();
    let server = Server::in_home(home, &[]);
    // The handler connects again by itself.
    eventually(|| server.run(&["call", "alpha/cat", "1"]).code == 0);
    assert_eq!(
        server.run(&["call", "alpha/cat", "2"]).ended_with(0).out,
        "2\n"
    );
    drop(serving);
}

#[test]
fn no_program_outlives_its_handler() {
    let server = Server::start();
    let pids = server.home().join("pids");
    std::fs::write(&pids, "").unwrap();
    let script = "echo $$ >> \"$0\"; sleep 1000";
    let pids_path = pids.to_str().unwrap();
    // Whether one slips through is a matter of chance, so there are several rounds.
    for round in 1..=10 {
        let command = ["--", "sh", "-c", script, pids_path];
        let args = [&["alpha/e", "--concurrency", "4"], &command[..]].concat();
        let mut serving = server.serve(&args);
        // Events wait behind those that run: as a program ends, the next one would start.
        server
            .run(&["bench", "emit", "--to", "alpha/e", "--calls", "20"])
            .ended_with(0);
        eventually(|| std::fs::read_to_string(&pids).unwrap().lines().count() >= round);
        serving.signal(Signal::TERM);
        assert_eq!(serving.exit_code(), 0);
    }
    let started = std::fs::read_to_string(&pids).unwrap();
    for pid in started.lines().filter_map(|pid| pid.parse().ok()) {
        wait_for_end(Pid::from_raw(pid).expect("the shell's pid is none of 0"));
    }
}
