//! What the wire may do: bytes in any pieces, replies in any order, limits, silence, nonsense.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use latzero::blocking::App;
use latzero::{Bytes, Code, Ran};
use serde_json::{Value, json};

use crate::fake::{Fake, Over, Peer, ack, frame};

fn tokio_runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn ok(to: &Value, response: &Value) -> Value {
    json!({"action":"response","in_reply_to":to["id"],"status":"ok","response":response})
}

#[test]
fn a_reply_may_be_split_anywhere() {
    let split_everywhere = |_, mut peer: Peer| {
        peer.welcome();
        let mut at = 1;
        while let Some((call, _)) = peer.read() {
            let bytes = frame(
                &ok(&call, &json!({"n": at})),
                Some(b"").filter(|_| at % 2 == 0).map(|b| &b[..]),
            );
            let cut = at % bytes.len();
            for piece in [&bytes[..cut], &bytes[cut..]] {
                peer.write(piece);
            }
            at += 1;
        }
    };
    let byte_by_byte = |_, mut peer: Peer| {
        peer.welcome();
        while let Some((call, _)) = peer.read() {
            frame(&ok(&call, &json!({"n": 1})), None)
                .chunks(1)
                .for_each(|byte| peer.write(byte));
        }
    };
    for over in [Over::Unix, Over::Tcp] {
        for fake in [
            Fake::scripted(over, split_everywhere),
            Fake::scripted(over, byte_by_byte),
        ] {
            let app = App::connect(&fake.url("a")).unwrap();
            for _ in 0..200 {
                app.call("x", &1).reply().unwrap();
            }
            tokio_runtime().block_on(async {
                let app = latzero::App::connect(&fake.url("a")).await.unwrap();
                for _ in 0..200 {
                    app.call("x", &1).reply().await.unwrap();
                }
            });
        }
    }
}

#[test]
fn messages_behind_the_acknowledgement_are_not_lost() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        let (hello, _) = peer.read().unwrap();
        let mut bytes = frame(&ack(&hello, 1, &json!({})), None);
        bytes.extend(frame(&json!({"action":"ping","id":"p"}), None));
        bytes.extend(frame(
            &json!({"action":"trigger","id":"1.2.3","process":"early","data":1}),
            None,
        ));
        peer.write(&bytes);
        let said: Vec<Value> = (0..3).map(|_| peer.read().unwrap().0).collect();
        assert!(
            said.iter()
                .any(|m| m["in_reply_to"] == "p" && m["status"] == "ok")
        );
        assert!(said.iter().any(|m| m["error"]["code"] == "no_handler"));
        let call = said.iter().find(|m| m["action"] == "trigger").unwrap();
        peer.reply(call, &json!("both arrived"));
        peer.read();
    });
    let app = App::connect(&fake.url("a")).unwrap();
    assert_eq!(app.call("x", &1).send::<String>().unwrap(), "both arrived");
    tokio_runtime().block_on(async {
        let app = latzero::App::connect(&fake.url("a")).await.unwrap();
        assert_eq!(app.call("x", &1).await.unwrap(), json!("both arrived"));
    });
}

#[test]
fn replies_in_reverse_order() {
    const N: usize = 100;
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        let mut calls: Vec<_> = std::iter::from_fn(|| peer.read()).take(N).collect();
        while let Some((call, _)) = calls.pop() {
            let response = call["data"].clone();
            peer.reply(&call, &response);
        }
        peer.read();
    });
    tokio_runtime().block_on(async {
        let app = latzero::App::connect(&fake.url("a")).await.unwrap();
        let calls: Vec<_> = (0..N)
            .map(|n| tokio::spawn(app.call("x", &n).send::<usize>()))
            .collect();
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap().unwrap(), n);
        }
    });
    let app = App::connect(&fake.url("a")).unwrap();
    std::thread::scope(|scope| {
        for n in 0..N {
            let app = &app;
            scope.spawn(move || assert_eq!(app.call("x", &n).send::<usize>().unwrap(), n));
        }
    });
}

#[test]
fn the_servers_limit_of_calls_in_flight_is_kept() {
    const LIMIT: usize = 4;
    let most = Arc::new(AtomicUsize::new(0));
    let seen = most.clone();
    let fake = Fake::scripted(Over::Unix, move |_, mut peer| {
        let (hello, _) = peer.read().unwrap();
        peer.send(&ack(
            &hello,
            1,
            &json!({"max_in_flight": LIMIT, "max_frame": 1000}),
        ));
        // Calls are answered once the limit is reached, all at once.
        let mut calls = Vec::new();
        while let Some((call, _)) = peer.read() {
            calls.push(call);
            seen.fetch_max(calls.len(), Ordering::SeqCst);
            if calls.len() == LIMIT {
                calls
                    .drain(..)
                    .for_each(|call| peer.reply(&call, &json!(1)));
            }
        }
    });
    tokio_runtime().block_on(async {
        let app = latzero::App::connect(&fake.url("a")).await.unwrap();
        let calls: Vec<_> = (0..40)
            .map(|n| tokio::spawn(app.call("x", &n).send::<Value>()))
            .collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        let error = app.call("x", &"y".repeat(2000)).await.unwrap_err();
        assert_eq!((error.kind(), error.ran()), (Code::TooLarge, Some(Ran::No)));
    });
    assert_eq!(most.load(Ordering::SeqCst), LIMIT);
}

#[test]
fn a_silent_server_does_not_hold_a_call_for_ever() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        while peer.read().is_some() {}
    });
    let app = App::connect(&fake.url("a")).unwrap();
    let error = app
        .call("x", &1)
        .timeout(Duration::from_millis(20))
        .send::<Value>()
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Timeout, Some(Ran::Unknown))
    );
    tokio_runtime().block_on(async {
        let app = latzero::App::connect(&fake.url("a")).await.unwrap();
        let error = app
            .call("x", &1)
            .timeout(Duration::from_millis(20))
            .await
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::Timeout, Some(Ran::Unknown))
        );
    });
}

#[test]
fn invalid_input_closes_only_its_connection() {
    for nonsense in [
        &[0, 0, 0, 0][..],
        &[0, 0, 0, 2, b'[', b']'],
        &[0x7f, 0, 0, 0],
        b"HTTP/1.1 400",
    ] {
        let nonsense = nonsense.to_vec();
        let fake = Fake::scripted(Over::Tcp, move |n, mut peer| {
            peer.welcome();
            while let Some((call, _)) = peer.read() {
                match n {
                    0 => peer.write(&nonsense),
                    _ => peer.reply(&call, &json!(1)),
                }
            }
        });
        let app = App::connect(&fake.url("a")).unwrap();
        let error = app.call("x", &1).send::<Value>().unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::Disconnected, Some(Ran::Unknown))
        );
        assert_eq!(app.call("x", &1).send::<Value>().unwrap(), json!(1));
    }
}

#[test]
fn unknown_fields_of_a_newer_server_are_ignored() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        while let Some((call, _)) = peer.read() {
            peer.send(&json!({"action":"later","x":1}));
            peer.send(&json!({"action":"response","in_reply_to":"unknown","status":"ok"}));
            peer.send(&json!({"action":"response","in_reply_to":"0.ffff","status":"ok"}));
            peer.send(&json!({"action":"error","error":{"code":"bad_message","message":"m"}}));
            peer.send(&json!({"action":"event","event":"draining"}));
            peer.send(&json!({
                "action":"response","in_reply_to":call["id"],"status":"ok","response":1,"new":2
            }));
        }
    });
    let app = App::connect(&fake.url("a")).unwrap();
    for _ in 0..3 {
        assert_eq!(app.call("x", &1).send::<i64>().unwrap(), 1);
    }
}

#[test]
fn without_attachments_bytes_travel_as_base64() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        let (hello, _) = peer.read().unwrap();
        let mut welcome = ack(&hello, 1, &json!({}));
        welcome["features"] = json!([]);
        peer.send(&welcome);
        let (call, raw) = peer.read().unwrap();
        assert_eq!(
            (&call["data"], &call["encoding"], raw),
            (&json!("AP8="), &json!("base64"), None)
        );
        peer.send(
            &json!({"action":"response","in_reply_to":call["id"],"status":"ok",
            "encoding":"base64","response":"AQI="}),
        );
        peer.read();
    });
    let app = App::connect(&fake.url("a")).unwrap();
    assert_eq!(
        app.call("x", &Bytes(vec![0, 255])).bytes().unwrap(),
        Bytes(vec![1, 2])
    );
}

#[test]
fn large_payloads_go_both_ways() {
    let fake = Fake::broker(Over::Tcp);
    let text = "x".repeat(8_000_000);
    let server = App::connect(&fake.url("server")).unwrap();
    server.serve("echo", |req| req.data::<String>()).unwrap();
    let app = App::connect(&fake.url("a")).unwrap();
    assert!(app.call("echo", &text).send::<String>().unwrap() == text);
    tokio_runtime().block_on(async {
        let app = latzero::App::connect(&fake.url("b")).await.unwrap();
        assert!(app.call("echo", &text).send::<String>().await.unwrap() == text);
    });
}

#[test]
fn headers_and_fields_reach_the_wire() {
    let (tx, rx) = mpsc::channel();
    let tell = std::sync::Mutex::new(tx);
    let fake = Fake::scripted(Over::Unix, move |_, mut peer| {
        tell.lock().unwrap().send(peer.welcome()).unwrap();
        while let Some((message, _)) = peer.read() {
            if message.get("id").is_some() {
                peer.reply(&message, &json!({"delivered": 1}));
            }
            tell.lock().unwrap().send(message).unwrap();
        }
    });
    let builder = latzero::App::builder(&fake.url("a"))
        .pools(["beta"])
        .meta(json!({"v":1}))
        .exclusive(true);
    let app = App::connect_with(builder).unwrap();
    let hello = rx.recv().unwrap();
    assert_eq!(hello["pools"], json!(["alpha", "beta"]));
    assert_eq!(
        (&hello["meta"], &hello["exclusive"]),
        (&json!({"v":1}), &json!(true))
    );
    let call = app
        .call("x", &1)
        .to("you")
        .pool("beta")
        .key("k")
        .header("traceparent", "t\"1");
    call.timeout(Duration::from_secs(9))
        .send::<Value>()
        .unwrap();
    let call = rx.recv().unwrap();
    assert_eq!(
        (&call["destination"], &call["pool"], &call["key"]),
        (&json!("you"), &json!("beta"), &json!("k"))
    );
    assert_eq!(
        (&call["headers"], &call["ttl"]),
        (&json!({"traceparent":"t\"1"}), &json!(9000))
    );
    // The server's refusal would reach nobody: neither of two pools is `default`.
    for lost in [app.emit("y", &2), app.emit("y", &2).pool("gamma")] {
        let error = lost.raw_bytes(vec![1]).send().unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::NotMember, Some(latzero::Ran::No))
        );
    }
    let emit = app.emit("y", &2).one().pool("beta").header("a", "b");
    emit.send().unwrap();
    let emit = rx.recv().unwrap();
    assert_eq!(
        (&emit["deliver"], &emit["headers"], emit.get("id")),
        (&json!("one"), &json!({"a":"b"}), None)
    );
    app.handler("z")
        .concurrency(3)
        .doc("does z")
        .pools(["beta"])
        .strategy(latzero::Strategy::Sticky)
        .serve(|_| Ok(()))
        .unwrap();
    let expected =
        json!([{"name":"z","strategy":"sticky","concurrency":3,"doc":"does z","pools":["beta"]}]);
    assert_eq!(rx.recv().unwrap()["triggers"], expected);
    let error = app
        .request(&json!({"action":"stats","id":"mine"}))
        .unwrap_err();
    assert_eq!(error.kind(), Code::BadMessage);
    app.request(&json!({"action":"stats"})).unwrap();
    assert_eq!(
        app.serve("a b", |_| Ok(())).unwrap_err().kind(),
        Code::InvalidName
    );
}

#[test]
fn a_slow_server_receives_everything() {
    const N: u64 = 300;
    for over in [Over::Unix, Over::Tcp] {
        let (release, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let fake = Fake::scripted(over, move |_, mut peer| {
            peer.welcome();
            wait.lock().unwrap().recv().unwrap();
            let mut seen = 0;
            while let Some((message, _)) = peer.read() {
                match message.get("id") {
                    None => seen += 1,
                    Some(_) => peer.reply(&message, &json!({"delivered": seen})),
                }
            }
        });
        let large = "x".repeat(100_000);
        let app = App::connect(&fake.url("a")).unwrap();
        std::thread::scope(|scope| {
            // More than the outbox holds: the sender waits, and goes on when the server reads.
            let sending =
                scope.spawn(|| (0..N).for_each(|_| app.emit("x", &large).send().unwrap()));
            release.send(()).unwrap();
            sending.join().unwrap();
        });
        assert_eq!(app.emit("x", &1).counted().unwrap(), N);
        tokio_runtime().block_on(async {
            let app = latzero::App::connect(&fake.url("b")).await.unwrap();
            let emits = async {
                for _ in 0..N {
                    app.emit("x", &large).await.unwrap();
                }
            };
            let emits = std::pin::pin!(emits);
            let mut emits = Some(emits);
            // Released once the emits wait for room.
            std::future::poll_fn(|cx| {
                let Some(sending) = &mut emits else {
                    return std::task::Poll::Ready(());
                };
                match sending.as_mut().poll(cx) {
                    std::task::Poll::Ready(()) => {
                        emits = None;
                        std::task::Poll::Ready(())
                    }
                    std::task::Poll::Pending => {
                        let _ = release.send(());
                        std::task::Poll::Pending
                    }
                }
            })
            .await;
            assert_eq!(app.emit("x", &1).counted().await.unwrap(), N);
        });
    }
}

#[test]
fn a_cancel_right_behind_its_call_takes_effect() {
    for over in [Over::Unix, Over::Tcp] {
        let (tx, rx) = mpsc::channel();
        let tx = std::sync::Mutex::new(tx);
        let fake = Fake::scripted(over, move |_, mut peer: Peer| {
            peer.welcome();
            let (register, _) = peer.read().unwrap();
            peer.reply(&register, &json!({"triggers": []}));
            let call = |id: &str| {
                let origin = json!({"app_id": "c", "instance": "i"});
                frame(
                    &json!({"action": "trigger", "id": id, "process": "t", "pool": "alpha",
                            "data": id, "origin": origin, "ttl": 10_000}),
                    None,
                )
            };
            let cancel = frame(&json!({"action": "cancel", "id": "1"}), None);
            peer.write(&[call("1"), cancel, call("2")].concat());
            let (answer, _) = peer.read().unwrap();
            tx.lock()
                .unwrap()
                .send(answer["in_reply_to"].clone())
                .unwrap();
            while peer.read().is_some() {}
        });
        let app = App::connect(&fake.url("a")).unwrap();
        app.serve("t", |request| request.data::<String>()).unwrap();
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)).unwrap(), "2");
    }
}
