//! How connections and the server end: no message is lost, and nothing hangs.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};

use latzero::blocking::{self, App};
use latzero::{Code, HandlerError, Ran};
use latzero_protocol::frame;
use latzero_tests::{Server, TIMEOUT, Via, Wire};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const BOTH: [Via; 2] = [Via::Tcp, Via::Unix];

fn app(server: &Server, via: Via, app: &str, triggers: &[&str]) -> Wire {
    server.app(
        via,
        json!({"app_id": app, "pools": ["p"], "triggers": triggers}),
    )
}

fn frames(messages: impl Iterator<Item = Value>) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes());
        });
    }
    out
}

/// The next message that is not a ping from the server.
fn receive(wire: &mut Wire) -> Value {
    loop {
        let message = wire.receive();
        if message["action"] != "ping" {
            return message;
        }
    }
}

#[test]
fn messages_sent_before_the_end_are_processed() {
    for via in BOTH {
        let server = Server::with(&["limits.read_budget_bytes=4KiB"]);
        let mut listener = app(&server, Via::Unix, "listener", &["news"]);
        let mut sender = app(&server, via, "sender", &[]);
        // Each has a reply that nobody reads.
        let emits =
            (0..2000).map(|n| json!({"action": "emit", "id": "e", "process": "news", "data": n}));
        sender.send_bytes(&frames(emits));
        drop(sender);
        for n in 0..2000 {
            assert_eq!(listener.receive()["data"], n, "{via:?}");
        }
    }
}

#[test]
fn a_connection_that_can_not_be_written_to_ends() {
    let server = Server::start();
    let mut watch = app(&server, Via::Unix, "watch", &["news"]);
    watch.request(json!({"action": "watch", "pool": "p", "events": ["app_offline"]}));
    let mut deaf = app(&server, Via::Unix, "deaf", &[]);
    deaf.shut_reading();
    let messages = [
        json!({"action": "ping", "id": "1"}),
        json!({"action": "emit", "process": "news", "data": "still run"}),
    ];
    deaf.send_bytes(&frames(messages.into_iter()));
    assert_eq!(watch.receive()["data"], "still run");
    assert_eq!(watch.receive()["event"], "app_offline");
}

#[test]
fn a_connection_that_is_not_read_is_not_called_silent() {
    let server = Server::with(&[
        "limits.in_flight_max=1",
        "limits.held_bytes_max=4KiB",
        "ping_interval=30ms",
        "ping_timeout=60ms",
    ]);
    let mut handler = app(&server, Via::Unix, "handler", &["work"]);
    let mut caller = app(&server, Via::Tcp, "caller", &[]);
    caller.send(&json!({"action": "trigger", "id": "1", "process": "work"}));
    let call = handler.receive();
    // The queue behind it is full, so the server reads nothing more, not even answers to pings.
    let data = "x".repeat(5000);
    caller.send(&json!({"action": "trigger", "id": "2", "process": "work", "data": data}));
    // Waits as long as the server takes to close two later connections that do not answer.
    for dead in ["one", "two"] {
        app(&server, Via::Tcp, dead, &[]).wait_closed();
    }
    handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
    assert_eq!(receive(&mut caller)["in_reply_to"], "1");
}

#[test]
fn a_reload_applies_to_existing_connections() {
    // With a long timeout, only the reload makes the server check its connections soon.
    let server = Server::with(&["handshake_timeout=1h"]);
    let mut quiet = app(&server, Via::Tcp, "quiet", &[]);
    let mut admin = app(&server, Via::Unix, "admin", &[]);
    let file = server.0.data_dir().join("config/quick.toml");
    std::fs::write(file, "ping_interval = \"30ms\"\n").unwrap();
    let reply = admin.request(json!({"action": "reload"}));
    assert_eq!(reply["status"], "ok", "{reply}");
    assert_eq!(quiet.receive()["action"], "ping");
}

#[test]
fn when_all_outboxes_are_full_the_largest_oldest_one_is_closed() {
    let server = Server::with(&[
        "limits.outbox_total_bytes_max=1MiB",
        "write_stall_timeout=1h",
    ]);
    let mut watch = app(&server, Via::Unix, "watch", &[]);
    watch.request(json!({"action": "watch", "pool": "p", "events": ["app_offline"]}));
    let _small = app(&server, Via::Unix, "small", &["small"]);
    let _large = app(&server, Via::Unix, "large", &["large"]);
    let mut sender = app(&server, Via::Unix, "sender", &[]);
    let text = "x".repeat(50_000);
    let mut emit = |process: &str| {
        let reply = sender.request(json!({"action": "emit", "process": process, "data": &text}));
        reply["response"]["delivered"] == 1
    };
    for _ in 0..8 {
        emit("small");
    }
    let mut sent = 0;
    while emit("large") {
        sent += 1;
        assert!(sent < 10_000, "one outbox never fills");
    }
    // One connection may not use all of it: the rest is for the other.
    while emit("small") {
        sent += 1;
        assert!(sent < 10_000, "all outboxes together never fill");
    }
    let gone = watch.receive();
    assert_eq!(gone["event"], "app_offline");
    // With several IO threads, each thread checks its own connections.
    let is_one_loop = std::env::var_os("LATZERO_IO_THREADS").is_none();
    assert!(gone["app_id"] == "large" || !is_one_loop, "{gone}");
    // What was refused at that limit is lost, and counted.
    let stats = sender.request(json!({"action": "stats"}));
    let lost = stats["response"]["transport"]["messages_lost"].as_u64();
    assert!(lost >= Some(2), "{lost:?}");
}

#[test]
fn a_signal_lets_calls_in_progress_finish() {
    for via in BOTH {
        let server = Server::start();
        let mut handler = app(&server, via, "handler", &["work"]);
        let mut caller = app(&server, via, "caller", &[]);
        caller.send(&json!({"action": "trigger", "id": "1", "process": "work"}));
        let call = handler.receive();
        server.signal(Signal::TERM);
        for wire in [&mut handler, &mut caller] {
            let message = wire.receive();
            assert_eq!(message["event"], "draining", "{via:?}: {message}");
        }
        caller.send(&json!({"action": "trigger", "id": "2", "process": "work"}));
        assert_eq!(caller.receive()["error"]["code"], "draining");
        handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
        assert_eq!(caller.receive()["in_reply_to"], "1");
        for mut wire in [handler, caller] {
            wire.wait_closed();
        }
    }
}

/// The Unix socket for the process that is [`an_owner_with_a_child`].
const OWNER: &str = "LATZERO_TEST_OWNER";

/// How many events the owner sends before it ends.
const EVENTS: u32 = 2000;

/// Starts this program as an owner with a child; returns it once it has sent everything, with the
/// pipe that keeps its child alive.
fn start_owner(server: &Server) -> (Child, ChildStdin) {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "an_owner_with_a_child", "--nocapture"])
        .env(OWNER, server.0.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut said, out) = (Vec::new(), owner.stdout.as_mut().unwrap());
    while !said.ends_with(b"ready\n") {
        let mut byte = [0];
        out.read_exact(&mut byte).expect("the owner connects");
        said.push(byte[0]);
    }
    let child = owner.stdin.take().unwrap();
    (owner, child)
}

/// Not a test: the process that [`start_owner`] starts. Its child has its socket, and lives as long
/// as the pipe is open.
#[test]
fn an_owner_with_a_child() {
    let Ok(socket) = std::env::var(OWNER) else {
        return;
    };
    let mut wire = Wire::unix(socket.as_ref());
    let handshake = json!({"action": "handshake", "app_id": "owner", "exclusive": true,
        "pools": ["p"], "triggers": ["work"], "features": ["attachments", "fd_passing"]});
    for message in [
        handshake,
        json!({"action": "memory_create", "block_id": "b", "size": 10}),
        json!({"action": "memory_lock", "block_id": "b"}),
    ] {
        let reply = wire.request(message);
        assert!(
            reply["status"] == "ok" || reply["action"] == "handshake_ack",
            "{reply}"
        );
    }
    let mut child = Command::new("cat")
        .stdin(Stdio::inherit())
        .stdout(wire.socket())
        .spawn()
        .unwrap();
    let emits = (0..EVENTS).map(|n| json!({"action": "emit", "process": "news", "data": n}));
    wire.send_bytes(&frames(emits));
    let mut out = std::io::stdout();
    out.write_all(b"ready\n").unwrap();
    out.flush().unwrap();
    // Waits until it is killed.
    child.wait().unwrap();
}

#[test]
fn an_app_is_offline_when_its_process_ends_even_if_a_child_has_the_socket() {
    // Small reads, so that much is still unread at that time.
    let server = Server::with(&["limits.read_budget_bytes=4KiB"]);
    let mut watch = app(&server, Via::Unix, "watch", &["news"]);
    watch.request(json!({"action": "watch", "pool": "p", "events": ["app_offline"]}));
    let (mut owner, mut child) = start_owner(&server);
    kill_process(Pid::from_child(&owner), Signal::KILL).unwrap();
    owner.wait().unwrap();
    for n in 0..EVENTS {
        assert_eq!(watch.receive()["data"], n, "earlier messages run");
    }
    let gone = watch.receive();
    assert_eq!(
        (&gone["event"], &gone["app_id"]),
        (&json!("app_offline"), &json!("owner"))
    );
    let locked = watch.request(json!({"action": "memory_lock", "block_id": "b"}));
    assert_eq!(locked["status"], "ok", "{locked}");
    // The child may still write what the owner had mapped: nobody sees it.
    let block = watch.request(json!({"action": "memory_info", "block_id": "b"}));
    assert_eq!(block["response"]["generation"], 2, "{block}");
    let call = watch.request(json!({"action": "trigger", "process": "work"}));
    assert_eq!(call["error"]["code"], "no_handler", "{call}");
    let next = server.app(
        Via::Unix,
        json!({"app_id": "owner", "exclusive": true, "pools": ["p"]}),
    );
    // The child had the socket all the time, and could not use it after the owner's end.
    child.write_all(b"x").expect("the child lives");
    drop(next);
}

#[test]
fn a_call_that_is_pending_when_its_app_closes_says_so() {
    let server = Server::start();
    let serving = App::connect(&server.0.url("serving")).unwrap();
    let (entered, inside) = mpsc::channel();
    let slow = move |request: blocking::Request| {
        entered.send(()).ok();
        while !request.is_cancelled() {
            std::thread::yield_now();
        }
        Ok(1)
    };
    serving.serve("slow", slow).unwrap();
    let app = App::connect(&server.0.url("caller")).unwrap();
    let error = std::thread::scope(|scope| {
        let call = scope.spawn(|| app.call("slow", &()).send::<Value>().unwrap_err());
        inside.recv_timeout(TIMEOUT).unwrap();
        app.close().unwrap();
        call.join().unwrap()
    });
    assert_eq!(
        (error.kind(), error.ran(), error.to_string().as_str()),
        (
            Code::Disconnected,
            Some(Ran::Unknown),
            "disconnected: the app was closed"
        )
    );
}

#[test]
fn what_does_not_fit_fails_its_own_call_only() {
    let server = Server::start();
    let serving = App::connect(&server.0.url("serving")).unwrap();
    let large = "x".repeat(17 << 20);
    let text = large.clone();
    serving.serve("answer", move |_| Ok(text.clone())).unwrap();
    let fail = move |request: blocking::Request| -> Result<(), HandlerError> {
        Err(match request.data::<String>()?.as_str() {
            "message" => HandlerError::new("own", &large),
            _ => HandlerError::new("own", "short").with_data(&*large),
        })
    };
    serving.serve("fail", fail).unwrap();
    let app = App::connect(&server.0.url("caller")).unwrap();
    // The handler ran, although its answer is lost.
    let error = app.call("answer", &()).send::<Value>().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::TooLarge, Some(Ran::Unknown))
    );
    for part in ["message", "data"] {
        let error = app.call("fail", part).send::<Value>().unwrap_err();
        assert_eq!(error.code(), "own");
        assert!(error.to_string().contains("its data was left out"));
    }
    assert_eq!(serving.lost(), 0);
    assert!(serving.is_connected());
}

#[test]
fn handlers_that_block_leave_a_thread_that_reads() {
    let server = Server::start();
    let handler = App::connect(&server.0.url("handler")).unwrap();
    let gate = Arc::new((Mutex::new(true), Condvar::new()));
    let its_gate = gate.clone();
    let hold = move |_| {
        let is_open = its_gate.0.lock().unwrap();
        let wait = its_gate
            .1
            .wait_timeout_while(is_open, TIMEOUT, |is_open| !*is_open);
        Ok(*wait.unwrap().0)
    };
    handler.serve("hold", hold).unwrap();
    let set = move |request: blocking::Request| {
        *gate.0.lock().unwrap() = request.data()?;
        gate.1.notify_all();
        Ok(())
    };
    handler.serve("set", set).unwrap();
    let mut caller = server.app(Via::Unix, json!({"app_id": "caller"}));
    let set =
        |is_open| json!({"action": "trigger", "id": "set", "process": "set", "data": is_open});
    for count in (2..8).cycle().take(60) {
        // Its last run was short, so nobody expects that it blocks.
        caller.request(json!({"action": "trigger", "process": "hold"}));
        caller.request(set(false));
        let hold = |n| json!({"action": "trigger", "id": format!("h{n}"), "process": "hold"});
        caller.send_bytes(&frames((0..count).map(hold)));
        caller.send(&set(true));
        for _ in 0..=count {
            let answer = receive(&mut caller);
            let expected = if answer["in_reply_to"] == "set" {
                Value::Null
            } else {
                true.into()
            };
            assert_eq!(answer["response"], expected, "{answer}");
        }
    }
}
