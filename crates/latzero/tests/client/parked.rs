//! Calls that outlive connections and processes: parked, given out again, answered when the caller
//! is back.

use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Code, Ran, Reconnect};
use serde_json::{Value, json};

use crate::fake::{Fake, Over, Peer, ack, frame};

const LONG: Duration = Duration::from_secs(10);

fn quick() -> Reconnect {
    Reconnect {
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(20),
        ..Reconnect::default()
    }
}

fn builder(fake: &Fake) -> latzero::Builder {
    latzero::App::builder(&fake.url("a")).reconnect(quick())
}

fn tokio_runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn parked(id: &Value) -> Value {
    json!({"action":"response","in_reply_to":id,"status":"parked"})
}

fn ok(id: &Value, response: &Value) -> Value {
    json!({"action":"response","in_reply_to":id,"status":"ok","response":response})
}

fn failed(id: &Value, code: &str) -> Value {
    json!({"action":"response","in_reply_to":id,"status":"error",
        "error":{"code":code,"message":"the fake says so","ran":"no"}})
}

/// The next message.
fn request(peer: &mut Peer) -> Option<Value> {
    peer.read().map(|(message, _)| message)
}

/// Answers the handshake, with messages right behind.
fn welcome_with(peer: &mut Peer, messages: &[Value]) -> Value {
    let (hello, _) = peer.read().unwrap();
    let mut bytes = frame(&ack(&hello, 1, &json!({})), None);
    messages
        .iter()
        .for_each(|message| bytes.extend(frame(message, None)));
    peer.write(&bytes);
    hello
}

/// Parks what asks for it, and says no word of the rest; hangs up once it has two calls. The next
/// connection brings the answers to what was parked right behind its acknowledgement, and so on by
/// turns.
fn forgetful(over: Over) -> Fake {
    let kept = Mutex::new(Vec::new());
    Fake::scripted(over, move |n, mut peer| {
        if n % 2 == 1 {
            let answers: Vec<Value> = kept.lock().unwrap().drain(..).collect();
            welcome_with(&mut peer, &answers);
            while peer.read().is_some() {}
            return;
        }
        peer.welcome();
        for _ in 0..2 {
            let Some(call) = request(&mut peer) else {
                return;
            };
            if call["park"] == true {
                peer.send(&parked(&call["id"]));
                let answer = ok(&call["id"], &call["data"]);
                kept.lock().unwrap().push(answer);
            }
        }
    })
}

#[test]
fn a_lost_connection_fails_only_calls_that_are_not_parked() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = forgetful(over);
        let app = App::connect_with(builder(&fake)).unwrap();
        let parked = app.call("x", &17).send_parked().unwrap();
        let error = app.call("y", &1).send::<Value>().unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::Disconnected, Some(Ran::Unknown))
        );
        assert_eq!(parked.answer::<i64>().unwrap(), 17);
        app.close().unwrap();
    }
}

#[test]
fn a_lost_connection_fails_calls_that_are_not_parked_in_the_async_api() {
    let fake = forgetful(Over::Unix);
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        // Without a handle: the future of the answer goes through.
        let mut answer = app.call("x", &17).park().send::<i64>();
        std::future::poll_fn(|cx| {
            assert!(std::pin::Pin::new(&mut answer).poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        let error = app.call("y", &1).await.unwrap_err();
        assert_eq!(error.kind(), Code::Disconnected);
        assert_eq!(answer.await.unwrap(), 17);
        app.close().await.unwrap();
    });
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        let parked = app.call("x", &18).id("order-18").send_parked().await;
        let parked = parked.unwrap();
        assert_eq!(parked.id(), "order-18");
        let error = app.call("y", &1).await.unwrap_err();
        assert_eq!(error.kind(), Code::Disconnected);
        assert_eq!(parked.await.unwrap(), json!(18));
    });
}

/// Parks every call of the first life of an app, and forgets it at a cancel. The second life gets
/// the answers right behind its acknowledgement, and its own answer to every call.
fn two_lives() -> Fake {
    let kept = Mutex::new(Vec::new());
    let (tx, rx) = mpsc::channel();
    let over = (Mutex::new(tx), Mutex::new(rx));
    Fake::scripted(Over::Unix, move |n, mut peer| {
        if n % 2 == 0 {
            peer.welcome();
            while let Some(message) = request(&mut peer) {
                let id = &message["id"];
                if message["action"] == "cancel" {
                    kept.lock()
                        .unwrap()
                        .retain(|a: &Value| a["in_reply_to"] != *id);
                    continue;
                }
                let mut answer = match message["data"] == "bad" {
                    true => failed(id, "timeout"),
                    false => ok(id, &message["data"]),
                };
                answer["pool"] = json!("alpha");
                kept.lock().unwrap().push(answer);
                peer.send(&parked(id));
            }
            return over.0.lock().unwrap().send(()).unwrap();
        }
        over.1.lock().unwrap().recv().unwrap();
        let answers: Vec<Value> = kept.lock().unwrap().drain(..).collect();
        welcome_with(&mut peer, &answers);
        while let Some(call) = request(&mut peer) {
            peer.reply(&call, &json!("of this instance"));
        }
    })
}

#[test]
fn answers_to_earlier_instances_are_identified_by_id() {
    let fake = two_lives();
    let first = App::connect_with(builder(&fake)).unwrap();
    let by_itself = first.call("x", "one").send_parked().unwrap();
    let own = by_itself.id().to_owned();
    let chosen = first.call("x", "bad").id("order-17").send_parked().unwrap();
    // Whoever waits for them goes with the process; nothing is cancelled.
    drop((by_itself, chosen, first));

    let second = App::connect_with(builder(&fake)).unwrap();
    // A call of this life has the place of the first one of the earlier life, and its own id.
    let call = second.call("x", "two").park().send::<String>();
    assert_eq!(call.unwrap(), "of this instance");
    let mut answers = second.answers();
    let answer = answers.recv().unwrap();
    assert_eq!((answer.id(), answer.pool()), (&*own, Some("alpha")));
    assert_eq!(answer.result().unwrap().json(), Some("\"one\""));
    assert_eq!(answer.into::<String>().unwrap(), "one");
    let answer = answers.next().unwrap();
    assert_eq!((answer.id(), answer.lost()), ("order-17", 0));
    assert_eq!(answer.into_reply().unwrap_err().kind(), Code::Timeout);
    let error = answers.recv_timeout(Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.kind(), Code::Timeout);
    second.close().unwrap();
    assert!(answers.recv().is_none());
}

#[test]
fn answers_to_earlier_instances_in_the_async_api() {
    let fake = two_lives();
    let own = tokio_runtime().block_on(async {
        let first = builder(&fake).connect().await.unwrap();
        let parked = first.call("x", "one").send_parked().await.unwrap();
        let id = parked.id().to_owned();
        // The wait for the answer may be dropped as well.
        drop(parked.answer::<String>());
        id
    });
    tokio_runtime().block_on(async {
        let second = builder(&fake).connect().await.unwrap();
        let mut former = second.answers();
        let mut answers = second.answers();
        let answer = answers.next().await.unwrap();
        assert_eq!(answer.id(), own);
        assert_eq!(answer.into::<String>().unwrap(), "one");
        // There is one taker.
        assert!(former.next().await.is_none());
        assert_eq!(second.call("x", "two").await.unwrap(), "of this instance");
        second.close().await.unwrap();
        assert!(answers.next().await.is_none());
    });
}

#[test]
fn a_call_answered_at_once_is_not_parked() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        while let Some(call) = request(&mut peer) {
            let id = &call["id"];
            match call["process"].as_str().unwrap() {
                "full" => peer.send(&failed(id, "storage")),
                "late" => {
                    peer.send(&parked(id));
                    peer.send(&failed(id, "no_handler"));
                }
                _ => peer.reply(&call, &json!(7)),
            }
        }
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &()).send_parked().unwrap();
    assert_eq!(parked.reply().unwrap().json(), Some("7"));
    let error = app.call("full", &()).send_parked().unwrap_err();
    assert_eq!((error.kind(), error.ran()), (Code::Storage, Some(Ran::No)));
    let late = app.call("late", &()).send_parked();
    let error = late
        .and_then(latzero::blocking::Parked::answer::<Value>)
        .unwrap_err();
    assert_eq!(error.kind(), Code::NoHandler);
    // An answer that is there already is not lost with its handle.
    drop(app.call("x", &()).id("left").send_parked().unwrap());
    let answer = app.answers().recv_timeout(LONG).unwrap();
    assert_eq!(answer.id(), "left");
    assert_eq!(answer.into::<i64>().unwrap(), 7);
}

#[test]
fn a_dropped_handle_does_not_cancel_its_call() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        let call = request(&mut peer).unwrap();
        peer.send(&parked(&call["id"]));
        // The next word is no cancel.
        let go = request(&mut peer).unwrap();
        assert_eq!(go["process"], "go");
        peer.send(&ok(&call["id"], &json!("finally")));
        peer.reply(&go, &json!(1));
        peer.read();
    });
    let check = |answer: latzero::Answer| {
        assert_eq!(answer.id(), "a \"b\"");
        assert_eq!(answer.into::<String>().unwrap(), "finally");
    };
    let app = App::connect_with(builder(&fake)).unwrap();
    drop(app.call("x", &()).id("a \"b\"").send_parked().unwrap());
    app.call("go", &()).send::<Value>().unwrap();
    check(app.answers().recv_timeout(LONG).unwrap());
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        let call = app.call("x", &()).id("a \"b\"");
        drop(call.send_parked().await.unwrap());
        app.call("go", &()).await.unwrap();
        check(app.answers().next().await.unwrap());
    });
}

/// Parks a call, waits for its cancel, and brings an answer to `marker` behind the last word on it.
fn cancellable(over: Over) -> Fake {
    Fake::scripted(over, |_, mut peer| {
        peer.welcome();
        let call = request(&mut peer).unwrap();
        peer.send(&parked(&call["id"]));
        let cancel = request(&mut peer).unwrap();
        assert_eq!(
            (&cancel["action"], &cancel["id"]),
            (&json!("cancel"), &call["id"])
        );
        peer.send(&failed(&call["id"], "cancelled"));
        peer.send(&ok(&json!("marker"), &json!(1)));
        while let Some(call) = request(&mut peer) {
            peer.reply(&call, &json!(2));
        }
    })
}

#[test]
fn a_parked_call_is_cancelled() {
    let fake = cancellable(Over::Tcp);
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &()).id("order\n17").send_parked().unwrap();
    parked.cancel();
    // What the server still says of it is no answer to anything.
    let mut answers = app.answers();
    assert_eq!(answers.recv_timeout(LONG).unwrap().id(), "marker");
    let again = app.call("x", &()).id("order\n17").send::<i64>();
    assert_eq!(again.unwrap(), 2);
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        // A future without a handle cancels as that of any call does.
        let mut call = app.call("x", &()).park().send::<Value>();
        let mut answers = app.answers();
        std::future::poll_fn(|cx| {
            assert!(std::pin::Pin::new(&mut call).poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(call);
        assert_eq!(answers.next().await.unwrap().id(), "marker");
    });
}

#[test]
fn a_cancel_while_disconnected_is_sent_after_the_reconnect() {
    let (tx, rx) = mpsc::channel::<()>();
    let rx = Mutex::new(rx);
    let fake = Fake::scripted(Over::Unix, move |n, mut peer| {
        if n == 0 {
            peer.welcome();
            let call = request(&mut peer).unwrap();
            return peer.send(&parked(&call["id"]));
        }
        let (hello, _) = peer.read().unwrap();
        rx.lock().unwrap().recv().unwrap();
        peer.send(&ack(&hello, 2, &json!({})));
        let cancel = request(&mut peer).unwrap();
        assert_eq!(
            (&cancel["action"], &cancel["id"]),
            (&json!("cancel"), &json!("order-17"))
        );
        peer.send(&failed(&cancel["id"], "cancelled"));
        peer.send(&ok(&json!("marker"), &json!(1)));
        peer.read();
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &()).id("order-17").send_parked().unwrap();
    let end = Instant::now() + LONG;
    while app.is_connected() {
        assert!(Instant::now() < end, "the loss was not noticed");
        std::thread::yield_now();
    }
    parked.cancel();
    // Until the server is through with it, the id is the call's.
    tx.send(()).unwrap();
    let answer = app.answers().recv_timeout(LONG).unwrap();
    assert_eq!(answer.id(), "marker");
}

#[test]
fn a_call_without_park_is_lost_with_its_connection() {
    let fake = Fake::scripted(Over::Unix, |n, mut peer| {
        if n == 0 {
            peer.welcome();
            peer.read();
            return;
        }
        // It was parked anyway, and its answer is not lost.
        welcome_with(&mut peer, &[ok(&json!("order-17"), &json!(1))]);
        while let Some(call) = request(&mut peer) {
            peer.reply(&call, &json!(2));
        }
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let error = app.call("x", &()).id("order-17").send_parked().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::Unknown))
    );
    let answer = app.answers().recv_timeout(LONG).unwrap();
    assert_eq!(answer.id(), "order-17");
    let again = app.call("x", &()).id("order-17").send::<i64>();
    assert_eq!(again.unwrap(), 2);
}

#[test]
fn the_time_of_a_parked_call_ends() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        while let Some(call) = request(&mut peer) {
            peer.send(&parked(&call["id"]));
        }
    });
    let time = Duration::from_millis(20);
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &()).timeout(time).send_parked().unwrap();
    let error = parked.answer::<Value>().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Timeout, Some(Ran::Unknown))
    );
    // The end of the app is the end of the wait.
    let parked = app.call("x", &()).send_parked().unwrap();
    app.close().unwrap();
    let error = parked.answer::<Value>().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::Unknown))
    );
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        let error = app.call("x", &()).park().timeout(time).await.unwrap_err();
        assert_eq!(error.kind(), Code::Timeout);
        let parked = app.call("x", &()).send_parked().await.unwrap();
        app.close().await.unwrap();
        let error = parked.await.unwrap_err();
        assert_eq!(error.kind(), Code::Disconnected);
    });
}

#[test]
fn parked_calls_count_as_calls_in_flight() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        let (hello, _) = peer.read().unwrap();
        peer.send(&ack(&hello, 1, &json!({"max_in_flight": 1})));
        while let Some(call) = request(&mut peer) {
            match call["park"] == true {
                true => peer.send(&parked(&call["id"])),
                false => peer.reply(&call, &json!(1)),
            }
        }
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &()).send_parked().unwrap();
    let error = app
        .call("y", &())
        .timeout(Duration::from_millis(20))
        .send::<i64>()
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Overloaded, Some(Ran::No))
    );
    // Whoever leaves a call to itself makes room.
    drop(parked);
    assert_eq!(app.call("y", &()).send::<i64>().unwrap(), 1);
}

#[test]
fn an_id_belongs_to_one_call_at_a_time() {
    let (release, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let fake = Fake::scripted(Over::Unix, move |_, mut peer| {
        peer.welcome();
        while let Some(call) = request(&mut peer) {
            assert_eq!(call["id"], "order-17");
            if call["park"] == true {
                peer.send(&parked(&call["id"]));
            }
            wait.lock().unwrap().recv().unwrap();
            peer.reply(&call, &call["data"]);
        }
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let parked = app.call("x", &1).id("order-17").send_parked().unwrap();
    let error = app.call("x", &2).id("order-17").send::<Value>();
    let error = error.unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::BadMessage, Some(Ran::No))
    );
    assert!(error.message().contains("'order-17' is in use"), "{error}");
    let long = "x".repeat(129);
    for id in ["", &long, "1f.3", "1f.3.0123456789abcdef"] {
        let error = app.call("x", &2).id(id).send::<Value>().unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::BadMessage, Some(Ran::No)),
            "{error}"
        );
    }
    release.send(()).unwrap();
    assert_eq!(parked.answer::<i64>().unwrap(), 1);
    // The call is over, and its id free.
    release.send(()).unwrap();
    let answer = app.call("x", &2).id("order-17").send::<i64>();
    assert_eq!(answer.unwrap(), 2);
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        let first = app.call("x", &1).id("order-17").send_parked().await;
        let first = first.unwrap();
        let error = app.call("x", &2).id("order-17").await.unwrap_err();
        assert_eq!(error.kind(), Code::BadMessage);
        release.send(()).unwrap();
        assert_eq!(first.answer::<i64>().await.unwrap(), 1);
    });
}

#[test]
fn streams_go_by_chosen_ids_too() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        let call = request(&mut peer).unwrap();
        for n in 0..2 {
            peer.send(
                &json!({"action":"response","in_reply_to":"mine","status":"partial","response":n}),
            );
        }
        let ack = request(&mut peer).unwrap();
        assert_eq!(ack, json!({"action":"ack","id":"mine","count":2}));
        peer.reply(&call, &json!(null));
        peer.read();
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    let stream = app.call("x", &()).id("mine").window(4).stream::<i64>();
    let items: Result<Vec<i64>, _> = stream.collect();
    assert_eq!(items.unwrap(), [0, 1]);
}

#[test]
fn handlers_read_which_attempt_it_is() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        let register = request(&mut peer).unwrap();
        peer.reply(&register, &json!({}));
        let call = request(&mut peer).unwrap();
        // The data's own field of that name is not the attempt.
        let mut trigger = json!({
            "action":"trigger","id":"1.2.3","process":"x","pool":"alpha","data":{"attempt":9}
        });
        let attempts = [None, Some(1), Some(2), Some(3)].map(|attempt| {
            if let Some(attempt) = attempt {
                trigger["attempt"] = json!(attempt);
            }
            peer.send(&trigger);
            request(&mut peer).unwrap()["response"].clone()
        });
        peer.reply(&call, &json!(attempts));
        peer.read();
    });
    let app = App::connect_with(builder(&fake)).unwrap();
    app.serve("x", |req| Ok(req.attempt())).unwrap();
    let attempts = app.call("seen", &()).send::<Vec<u32>>();
    assert_eq!(attempts.unwrap(), [1, 1, 2, 3]);
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        app.serve("x", |req| async move { Ok(req.attempt()) })
            .await
            .unwrap();
        let attempts = app.call("seen", &()).send::<Vec<u32>>().await;
        assert_eq!(attempts.unwrap(), [1, 1, 2, 3]);
    });
}

#[test]
fn options_of_parked_calls_reach_the_wire() {
    let (tx, rx) = mpsc::channel();
    let tell = Mutex::new(tx);
    let fake = Fake::scripted(Over::Unix, move |n, mut peer| {
        let (hello, _) = peer.read().unwrap();
        let mut welcome = ack(&hello, 1, &json!({}));
        if n == 0 {
            welcome["stored"] = json!(false);
        }
        peer.send(&welcome);
        tell.lock().unwrap().send(hello).unwrap();
        while let Some(call) = request(&mut peer) {
            if call["process"] == "bye" {
                return;
            }
            peer.reply(&call, &json!(1));
            tell.lock().unwrap().send(call).unwrap();
        }
    });
    let app = App::connect_with(builder(&fake).transient(true)).unwrap();
    assert_eq!(rx.recv().unwrap()["transient"], true);
    assert!(!app.is_stored());
    let call = app
        .call("x", &1)
        .header("a", "b")
        .park()
        .redeliver()
        .attempts(3);
    let call = call.idempotency_key("k \"1\"").id("order-17");
    call.send::<Value>().unwrap();
    let sent = rx.recv().unwrap();
    assert_eq!(
        sent["headers"],
        json!({"a": "b", "idempotency-key": "k \"1\""})
    );
    assert_eq!(
        (&sent["id"], &sent["park"], &sent["redeliver"]),
        (&json!("order-17"), &json!(true), &json!(true))
    );
    assert_eq!(sent["attempts"], 3);
    // The last key counts, and calls that ask for nothing say nothing.
    let call = app.call("x", &1).idempotency_key("one");
    call.idempotency_key("two").send::<Value>().unwrap();
    let sent = rx.recv().unwrap();
    assert_eq!(sent["headers"], json!({"idempotency-key": "two"}));
    assert_eq!((sent.get("park"), sent.get("redeliver")), (None, None));
    assert_eq!(sent.get("attempts"), None);
    // It is said again at a reconnect, and the last acknowledgement counts.
    app.call("bye", &()).send::<Value>().unwrap_err();
    assert_eq!(rx.recv().unwrap()["transient"], true);
    app.call("x", &1).send::<Value>().unwrap();
    assert!(app.is_stored());
    rx.recv().unwrap();
    tokio_runtime().block_on(async {
        let app = builder(&fake).connect().await.unwrap();
        assert!(app.is_stored());
        assert_eq!(rx.recv().unwrap().get("transient"), None);
        let call = app.call("x", &1).raw_bytes(vec![1]).redeliver();
        call.idempotency_key("k").id("mine").await.unwrap();
        let sent = rx.recv().unwrap();
        assert_eq!(
            (&sent["headers"], &sent["id"], sent.get("data")),
            (&json!({"idempotency-key": "k"}), &json!("mine"), None)
        );
    });
}
