//! Behavior at the limits: each limit has a defined response, and other clients are not affected.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use latzero_tests::hostile::framed;
use latzero_tests::{Server, Via, Wire, eventually};
use serde_json::{Value, json};

const BOTH: [Via; 2] = [Via::Tcp, Via::Unix];

fn handler(server: &Server, via: Via, app: &str, trigger: &str) -> Wire {
    server.app(
        via,
        json!({"app_id": app, "pools": ["p"], "triggers": [trigger]}),
    )
}

fn caller(server: &Server, via: Via, app: &str) -> Wire {
    server.app(via, json!({"app_id": app, "pools": ["p"]}))
}

fn code(reply: &Value) -> &str {
    reply["error"]["code"].as_str().unwrap_or("no error")
}

#[test]
fn a_slow_reader_loses_emits_and_is_notified() {
    for via in BOTH {
        let server = Server::with(&["limits.outbox_bytes_max=64KiB"]);
        let mut slow = handler(&server, via, "slow", "news");
        let mut well = handler(&server, via, "well", "news");
        let mut sender = caller(&server, via, "sender");
        let text = "x".repeat(50_000);
        let mut delivered_to_slow = 0;
        // Fills the socket and the outbox of the slow reader, and sends some more.
        let mut sent = 0;
        let mut lost = 0;
        while lost < 10 {
            let reply =
                sender.request(json!({"action": "emit", "process": "news", "data": [sent, &text]}));
            let delivered = reply["response"]["delivered"].as_u64().unwrap();
            assert_eq!(
                well.receive()["data"][0],
                sent,
                "{via:?}: a client that reads misses nothing"
            );
            delivered_to_slow += delivered - 1;
            lost += 2 - delivered;
            sent += 1;
            assert!(sent < 10_000, "{via:?}: the outbox never fills");
        }
        // When it reads again, it gets what was queued, then the number of lost emits, then new
        // ones.
        for _ in 0..delivered_to_slow {
            assert_eq!(slow.receive()["action"], "emit");
        }
        sender.request(json!({"action": "emit", "process": "news", "data": "after"}));
        assert_eq!(
            slow.receive(),
            json!({"action": "event", "event": "lost", "count": lost}),
            "{via:?}"
        );
        assert_eq!(slow.receive()["data"], "after");
        let stats = sender.request(json!({"action": "stats"}));
        assert_eq!(stats["response"]["transport"]["messages_lost"], lost);
    }
}

#[test]
fn calls_to_a_handler_that_does_not_read_are_refused() {
    let server = Server::with(&["limits.outbox_bytes_max=64KiB"]);
    let _slow = handler(&server, Via::Unix, "slow", "work");
    let mut caller = caller(&server, Via::Unix, "caller");
    let text = "x".repeat(50_000);
    for id in 0..10_000 {
        // Only a refusal is answered; the reply to a ping behind the call shows that there was
        // none.
        caller.send(
            &json!({"action": "trigger", "id": format!("{id}"), "process": "work", "data": &text}),
        );
        caller.send(&json!({"action": "ping", "id": "ping"}));
        let reply = caller.receive();
        if reply["in_reply_to"] == "ping" {
            continue;
        }
        assert_eq!(
            (code(&reply), &reply["error"]["ran"]),
            ("overloaded", &json!("no"))
        );
        return;
    }
    panic!("the outbox never fills");
}

#[test]
fn a_connection_that_reads_nothing_is_closed() {
    for via in BOTH {
        let server = Server::with(&["limits.outbox_bytes_max=64KiB", "write_stall_timeout=100ms"]);
        let slow = handler(&server, via, "slow", "work");
        let mut caller = caller(&server, via, "caller");
        let text = "x".repeat(50_000);
        let mut calls = 0;
        let end = loop {
            caller.send(
                &json!({"action": "trigger", "id": format!("{calls}"), "process": "work",
                "data": &text}),
            );
            calls += 1;
            caller.send(&json!({"action": "ping", "id": "ping"}));
            let reply = caller.receive();
            if reply["in_reply_to"] != "ping" {
                break reply;
            }
        };
        assert_eq!(code(&end), "overloaded");
        // Its calls end when the write timeout has passed.
        for _ in 1..calls {
            let mut reply = caller.receive();
            while reply["in_reply_to"] == "ping" {
                reply = caller.receive();
            }
            assert_eq!(code(&reply), "handler_gone", "{via:?}");
        }
        drop(slow);
    }
}

#[test]
fn an_answer_that_does_not_fit_becomes_a_short_error() {
    let server = Server::with(&["limits.outbox_bytes_max=64KiB", "limits.in_flight_max=5000"]);
    let mut handler = handler(&server, Via::Unix, "handler", "work");
    let mut caller = caller(&server, Via::Unix, "caller");
    let text = "x".repeat(50_000);
    let calls = 400;
    for id in 0..calls {
        caller.send(&json!({"action": "trigger", "id": format!("{id}"), "process": "work"}));
        let call = handler.receive();
        handler.send(
            &json!({"action": "response", "in_reply_to": call["id"], "status": "ok",
            "response": &text}),
        );
    }
    // Once its ping is answered, the handler's last answer has been processed.
    handler.request(json!({"action": "ping"}));
    let (mut whole, mut short) = (0, 0);
    for _ in 0..calls {
        let reply = caller.receive();
        if reply["status"] == "ok" {
            whole += 1;
        } else {
            assert_eq!(
                (code(&reply), &reply["error"]["ran"]),
                ("overloaded", &json!("unknown"))
            );
            short += 1;
        }
    }
    assert!(whole > 0 && short > 0, "{whole} whole, {short} short");
}

#[test]
fn a_connection_has_a_bounded_number_of_calls_in_flight() {
    for via in BOTH {
        let server = Server::with(&["limits.in_flight_max=4"]);
        let mut handler = handler(&server, via, "handler", "work");
        let mut caller = caller(&server, via, "caller");
        for id in 0..10 {
            caller.send(
                &json!({"action": "trigger", "id": format!("{id}"), "process": "work", "data": id}),
            );
        }
        let mut held: Vec<Value> = (0..4).map(|_| handler.receive()).collect();
        // The rest waits in the socket: the next message for the handler is the reply to its own
        // ping.
        assert_eq!(handler.request(json!({"action": "ping"}))["status"], "ok");
        for id in 0..10 {
            let call = if held.is_empty() {
                handler.receive()
            } else {
                held.remove(0)
            };
            assert_eq!(call["data"], id, "{via:?}: in the order sent");
            handler.send(&json!({"action": "response", "in_reply_to": call["id"], "status": "ok"}));
        }
        for id in 0..10 {
            assert_eq!(caller.receive()["in_reply_to"], format!("{id}"), "{via:?}");
        }
    }
}

#[test]
fn a_call_that_waits_behind_others_ends_with_its_own_ttl() {
    for via in BOTH {
        let server = Server::with(&["limits.in_flight_max=1"]);
        let _handler = handler(&server, via, "handler", "work");
        let mut caller = caller(&server, via, "caller");
        for (id, ttl) in [("runs", 1500), ("waits", 200)] {
            caller.send(&json!({"action": "trigger", "id": id, "process": "work", "ttl": ttl}));
        }
        let ended: Vec<Value> = (0..2).map(|_| caller.receive()).collect();
        assert!(
            ended.iter().all(|reply| code(reply) == "timeout"),
            "{ended:?}"
        );
        // It ends without waiting for the other call.
        assert_eq!(ended[0]["in_reply_to"], "waits", "{via:?}");
        assert_eq!(ended[0]["error"]["ran"], "no");
    }
}

#[test]
fn two_apps_that_call_each_other_at_the_limit_do_not_deadlock() {
    let server = Server::with(&["limits.in_flight_max=2"]);
    let mut a = handler(&server, Via::Unix, "a", "of-a");
    let mut b = handler(&server, Via::Unix, "b", "of-b");
    for id in 0..3 {
        a.send(&json!({"action": "trigger", "id": format!("a{id}"), "process": "of-b"}));
    }
    let first = b.receive();
    assert_eq!(b.receive()["action"], "trigger");
    for id in 0..3 {
        b.send(&json!({"action": "trigger", "id": format!("b{id}"), "process": "of-a"}));
    }
    // The third call of each waits; the answers behind it do not, and free a slot for it.
    for _ in 0..2 {
        assert_eq!(a.receive()["action"], "trigger");
    }
    b.send(
        &json!({"action": "response", "in_reply_to": first["id"], "status": "ok",
        "response": "passes"}),
    );
    assert_eq!(a.receive()["response"], "passes");
    assert_eq!(b.receive()["action"], "trigger", "the third call of a");
}

#[test]
fn connections_are_bounded() {
    let server = Server::with(&["limits.connections_max=2"]);
    let _one = caller(&server, Via::Tcp, "one");
    let mut two = caller(&server, Via::Unix, "two");
    let mut three = server.connect(Via::Tcp);
    let (refusal, _) = three
        .try_receive()
        .unwrap()
        .expect("a message before the end");
    assert_eq!(code(&refusal), "overloaded");
    assert!(
        refusal["error"]["message"]
            .as_str()
            .unwrap()
            .contains("limits.connections_max"),
        "{refusal}"
    );
    three.wait_closed();
    assert_eq!(two.request(json!({"action": "ping"}))["status"], "ok");
}

#[test]
fn unauthenticated_connections_are_bounded() {
    let server = Server::with(&["limits.connections_unauthenticated_per_user_max=2"]);
    let mut waiting = [server.connect(Via::Unix), server.connect(Via::Unix)];
    let mut third = server.connect(Via::Unix);
    let (refusal, _) = third
        .try_receive()
        .unwrap()
        .expect("a message before the end");
    assert_eq!(code(&refusal), "overloaded");
    // Another user (here: another address) has a limit of its own, and a handshake frees a slot.
    let _over_tcp = caller(&server, Via::Tcp, "tcp");
    waiting[0].send(&json!({"action": "handshake", "app_id": "in"}));
    assert_eq!(waiting[0].receive()["status"], "ok");
    let _room = caller(&server, Via::Unix, "next");
}

#[test]
fn silent_connections_keep_out_neither_the_own_user_nor_administrators() {
    let server = Server::with(&[
        "limits.connections_max=16",
        "limits.connections_unauthenticated_max=8",
        "limits.connections_unauthenticated_per_user_max=8",
        "handshake_timeout=10m",
    ]);
    // All that loopback TCP may have, and more.
    let silent: Vec<_> = (0..16).map(|_| server.connect(Via::Tcp)).collect();
    let mut refused = server.connect(Via::Tcp);
    assert_eq!(code(&refused.receive()), "overloaded");
    let mut own = caller(&server, Via::Unix, "own");
    assert_eq!(own.request(json!({"action": "stats"}))["status"], "ok");
    // Nor do connections that completed their handshake.
    drop(silent);
    let mut crowd = Vec::new();
    loop {
        let mut wire = server.connect(Via::Tcp);
        wire.send(&json!({"action": "handshake", "app_id": format!("app-{}", crowd.len())}));
        match wire.receive() {
            reply if reply["status"] == "ok" => crowd.push(wire),
            refusal if code(&refusal) == "overloaded" && crowd.len() > 8 => break,
            // The server has not noticed the end of the silent ones yet.
            refusal => assert_eq!(code(&refusal), "overloaded"),
        }
        assert!(crowd.len() < 16, "no place is reserved");
    }
    let mut own = caller(&server, Via::Unix, "own-too");
    assert_eq!(own.request(json!({"action": "stats"}))["status"], "ok");
}

#[test]
fn a_connection_without_a_handshake_is_closed() {
    for via in BOTH {
        let server = Server::with(&["handshake_timeout=50ms"]);
        let mut silent = server.connect(via);
        assert_eq!(code(&silent.receive()), "not_ready");
        silent.wait_closed();
    }
}

#[test]
fn a_silent_tcp_connection_is_pinged_and_a_unix_one_is_not() {
    let server = Server::with(&["ping_interval=30ms", "ping_timeout=60ms"]);
    let mut dead = caller(&server, Via::Tcp, "dead");
    let mut unix = caller(&server, Via::Unix, "unix");
    let mut live = caller(&server, Via::Tcp, "live");
    for _ in 0..5 {
        let ping = live.receive();
        assert_eq!(ping["action"], "ping");
        live.send(&json!({"action": "response", "in_reply_to": ping["id"], "status": "ok"}));
    }
    assert_eq!(dead.receive()["action"], "ping");
    dead.wait_closed();
    // The Unix connection got nothing in all that time: its first message is its own reply.
    unix.send(&json!({"action": "ping", "id": "first"}));
    assert_eq!(unix.receive()["in_reply_to"], "first");
}

#[test]
fn large_frames_pass_and_larger_ones_are_refused_by_their_prefix() {
    for via in BOTH {
        let server = Server::start();
        let mut alice = server.app(
            via,
            json!({"app_id": "alice", "pools": ["system"], "features": ["attachments"]}),
        );
        let text = "x".repeat(15 * 1024 * 1024);
        alice.send(&json!({"action": "trigger", "id": "1", "process": "echo", "data": &text}));
        assert_eq!(
            alice.receive()["response"].as_str().map(str::len),
            Some(text.len()),
            "{via:?}"
        );
        let raw: Vec<u8> = (0..10_000_000_u32).map(|i| (i % 251) as u8).collect();
        alice.send_attachment(
            &json!({"action": "trigger", "id": "2", "process": "echo"}),
            &raw,
        );
        let (reply, back) = alice.receive_whole();
        assert_eq!(
            (&reply["in_reply_to"], back == Some(raw)),
            (&json!("2"), true),
            "{via:?}"
        );
        alice.send_bytes(&(16 * 1024 * 1024 + 1_u32).to_be_bytes());
        assert_eq!(code(&alice.receive()), "frame_too_large");
        alice.wait_closed();
        // Before the handshake the limit is lower.
        let mut bob = server.connect(via);
        bob.send_bytes(&(64 * 1024 + 1_u32).to_be_bytes());
        assert_eq!(code(&bob.receive()), "frame_too_large");
        bob.wait_closed();
    }
}

#[test]
fn messages_that_are_scanned_in_slices_are_handled_like_others() {
    let long = format!("[{}]", [r#"[1,{"a":null}]"#; 100_000].join(","));
    let data: Value = serde_json::from_str(&long).unwrap();
    for via in BOTH {
        let server = Server::start();
        let mut handler = handler(&server, via, "h", "t");
        let mut caller = caller(&server, via, "c");
        let mut send = |json: String| caller.try_send_bytes(&framed(&json)).unwrap();
        send(format!(
            r#"{{"action":"trigger","id":"1","process":"t","data":{long}}}"#
        ));
        send(format!(
            r#"{{"action":"trigger","id":"2","process":"t","data":{long},}}"#
        ));
        send(format!(r#"{{"action":"ping","id":"3","x":{long},"x":1}}"#));
        send(r#"{"action":"ping","id":"4"}"#.to_owned());
        assert_eq!(handler.receive()["data"], data, "{via:?}");
        for id in ["2", "3"] {
            let reply = caller.receive();
            assert_eq!(reply["in_reply_to"], id, "{via:?}: {reply}");
            assert_eq!(code(&reply), "bad_message", "{via:?}: {reply}");
        }
        assert_eq!(caller.receive()["in_reply_to"], "4", "{via:?}");
    }
}

#[test]
fn attachments_reach_clients_without_the_feature_as_base64() {
    let server = Server::start();
    let mut plain = handler(&server, Via::Unix, "plain", "work");
    let mut caller = server.app(
        Via::Unix,
        json!({"app_id": "caller", "pools": ["p"], "features": ["attachments"]}),
    );
    caller.send_attachment(
        &json!({"action": "trigger", "id": "1", "process": "work"}),
        &[0, 255, 16],
    );
    let (call, raw) = plain.receive_whole();
    assert_eq!(
        (&call["data"], &call["encoding"], raw),
        (&json!("AP8Q"), &json!("base64"), None)
    );
}

#[test]
fn invalid_input_affects_nobody_else() {
    let server = Server::start();
    let mut well = server.app(Via::Tcp, json!({"app_id": "well", "pools": ["system"]}));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..200 {
        let mut fool = server.connect(BOTH[round % 2]);
        let mut bytes = Vec::new();
        for _ in 0..(round * 7 % 400) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.push(state as u8);
        }
        // The server may close the connection before it has received everything.
        let _ = fool.try_send_bytes(&bytes);
        well.send(&json!({"action": "trigger", "id": "1", "process": "echo", "data": round}));
        assert_eq!(well.receive()["response"], round);
    }
}

#[test]
fn the_server_survives_running_out_of_descriptors() {
    let server = Server::start();
    let mut well = server.app(Via::Unix, json!({"app_id": "well", "pools": ["system"]}));
    let stats = well.request(json!({"action": "stats"}));
    let used = stats["response"]["resources"]["descriptors"]
        .as_u64()
        .unwrap();
    server.limit_descriptors(used + 4);
    let mut crowd: Vec<Wire> = (0..20).map(|_| server.connect(Via::Unix)).collect();
    // Connections beyond the limit are closed; the others are still served.
    crowd.last_mut().unwrap().wait_closed();
    assert_eq!(well.request(json!({"action": "ping"}))["status"], "ok");
    drop(crowd);
    server.limit_descriptors(1024);
    let mut next = server.app(Via::Unix, json!({"app_id": "next"}));
    assert_eq!(next.request(json!({"action": "ping"}))["status"], "ok");
}

#[test]
fn admin_requests_need_permission() {
    let server = Server::start();
    let mut over_tcp = caller(&server, Via::Tcp, "over-tcp");
    for action in ["shutdown", "reload"] {
        assert_eq!(
            code(&over_tcp.request(json!({"action": action}))),
            "forbidden"
        );
        assert_eq!(
            code(&over_tcp.request(json!({"action": action, "token": "guessed"}))),
            "forbidden"
        );
    }
    // Sending the token itself is refused: it must be proved, and not over plain TCP.
    let token = std::fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap();
    let reply = over_tcp.request(json!({"action": "reload", "token": token.trim()}));
    assert_eq!(code(&reply), "forbidden", "{reply}");
    let mut admin = caller(&server, Via::Unix, "admin");
    let reply = admin.request(json!({"action": "kick", "app_id": "over-tcp"}));
    assert_eq!(reply["response"]["kicked"], 1);
    assert_eq!(over_tcp.receive()["event"], "kicked");
    over_tcp.wait_closed();
}

#[test]
fn a_thousand_clients_that_connect_at_once_all_succeed() {
    for via in BOTH {
        let server = Server::start();
        std::thread::scope(|scope| {
            let clients = (0..20).map(|group| {
                let server = &server;
                scope.spawn(move || {
                    let wires = (0..50).map(|n| {
                        let mut wire = server.connect(via);
                        let app = format!("app{group}-{n}");
                        wire.send(
                            &json!({"action": "handshake", "app_id": app, "triggers": ["t"]}),
                        );
                        wire
                    });
                    let mut wires: Vec<Wire> = wires.collect();
                    for wire in &mut wires {
                        let ack = wire.receive();
                        assert_eq!(ack["status"], "ok", "{via:?}: {ack}");
                    }
                })
            });
            let clients: Vec<_> = clients.collect();
            clients
                .into_iter()
                .for_each(|client| client.join().unwrap());
        });
    }
}

#[test]
fn an_emit_to_a_crowd_reaches_everyone_although_its_sender_leaves() {
    let server = Server::start();
    let mut crowd: Vec<Wire> = (0..150)
        .map(|_| handler(&server, Via::Unix, "one", "news"))
        .collect();
    let mut sender = caller(&server, Via::Unix, "sender");
    // Together more than the loop writes in one turn.
    let text = "x".repeat(150_000);
    for data in [text.as_str(), "last"] {
        sender.send(&json!({"action": "emit", "process": "news", "data": data}));
    }
    drop(sender);
    for wire in &mut crowd {
        assert_eq!(wire.receive()["data"], text.as_str());
        assert_eq!(wire.receive()["data"], "last");
    }
}

#[test]
fn a_connection_with_many_waits_ends_whole() {
    let server = Server::start();
    let mut holder = caller(&server, Via::Unix, "a");
    let stats = |wire: &mut Wire| wire.request(json!({"action": "stats"}))["response"].take();
    let instances = stats(&mut holder)["apps"]["instances"].take();
    let mut many = caller(&server, Via::Unix, "a");
    let block = |at: u32| format!("b{at}");
    for at in 0..8 {
        let made = json!({"action": "memory_create", "block_id": block(at), "size": 8});
        assert_eq!(holder.request(made)["status"], "ok");
        let lock = json!({"action": "memory_lock", "block_id": block(at)});
        assert_eq!(holder.request(lock)["status"], "ok");
    }
    for wait in 0..8 * 500 {
        many.send(&json!({
            "action": "memory_lock", "block_id": block(wait % 8), "wait": 600_000,
            "id": wait.to_string(),
        }));
    }
    eventually(|| stats(&mut holder)["ledger"]["waits"] == 4000);
    drop(many);
    eventually(|| stats(&mut holder)["apps"]["instances"] == instances);
    assert_eq!(stats(&mut holder)["ledger"]["waits"], 0);
}
