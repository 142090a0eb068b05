//! Connections that end: what calls learn of it, and that everything comes back.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Code, Ran, Reconnect, State};
use serde_json::{Value, json};

use crate::fake::{Fake, Over};

/// Fast enough for tests; the pauses are the same otherwise.
fn quick() -> Reconnect {
    Reconnect {
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(20),
        ..Reconnect::default()
    }
}

#[test]
fn an_app_is_rehydrated_completely() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = Fake::broker(over);
        let server =
            App::connect_with(latzero::App::builder(&fake.url("server")).reconnect(quick()))
                .unwrap();
        server
            .serve("double", |req| Ok(req.data::<i64>()? * 2))
            .unwrap();
        let mut news = server.on("news").unwrap();
        let mut events = server.watch("alpha").unwrap();
        let caller =
            App::connect_with(latzero::App::builder(&fake.url("caller")).reconnect(quick()))
                .unwrap();
        assert_eq!(caller.call("double", &4).send::<i64>().unwrap(), 8);
        fake.cut();
        // The caller may be back before the server is: then nobody serves the trigger yet.
        let end = Instant::now() + Duration::from_secs(20);
        let answer = loop {
            match caller.call("double", &5).send::<i64>() {
                Ok(answer) => break answer,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
        };
        assert_eq!(answer, 10);
        caller.emit("news", &7).send().unwrap();
        let emission = news.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(emission.data::<i64>().unwrap(), 7);
        let other = App::connect(&fake.url("other")).unwrap();
        let seen = || {
            events
                .recv_timeout(Duration::from_secs(10))
                .unwrap()
                .app_id()
                == Some("other")
        };
        assert!(
            std::iter::repeat_with(seen)
                .take(20)
                .any(|is_other| is_other)
        );
        drop(other);
    }
}

#[test]
fn the_async_api_reconnects_too() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let fake = Fake::broker(Over::Unix);
    runtime.block_on(async {
        let server = latzero::App::builder(&fake.url("server"))
            .reconnect(quick())
            .connect()
            .await
            .unwrap();
        server
            .serve("double", |req| async move { Ok(req.data::<i64>()? * 2) })
            .await
            .unwrap();
        for _ in 0..5 {
            assert_eq!(server.call("double", &4).await.unwrap(), json!(8));
            fake.cut();
            let end = Instant::now() + Duration::from_secs(20);
            while let Err(e) = server.call("double", &4).await {
                assert!(Instant::now() < end, "{e}");
            }
        }
    });
}

#[test]
fn a_call_in_flight_at_a_loss_may_have_run() {
    let fake = Fake::scripted(Over::Unix, |n, mut peer| {
        peer.welcome();
        while let Some((call, _)) = peer.read() {
            match n {
                0 => return,
                _ => peer.reply(&call, &json!(n)),
            }
        }
    });
    let app = App::connect_with(latzero::App::builder(&fake.url("a")).reconnect(quick())).unwrap();
    let error = app.call("x", &1).send::<Value>().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::Unknown))
    );
    // The next one waits for the new connection.
    assert_eq!(app.call("x", &1).send::<Value>().unwrap(), json!(1));
    assert_eq!(
        app.instance(),
        latzero::InstanceId::parse("0000000000000001")
    );
}

#[test]
fn a_call_that_was_never_sent_did_not_run() {
    let (hold, held) = mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let fake = Fake::scripted(Over::Unix, move |_, mut peer| {
        peer.welcome();
        // Reads nothing, so that most of what is sent stays with the client.
        let _ = held.lock().unwrap().recv();
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let app = latzero::App::builder(&fake.url("a"))
            .reconnect(quick())
            .connect()
            .await
            .unwrap();
        let large = "x".repeat(1_000_000);
        let calls: Vec<_> = (0..5)
            .map(|_| tokio::spawn(app.call("x", &large).send::<Value>()))
            .collect();
        tokio::task::yield_now().await;
        while !fake.connections.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
            fake.cut();
        }
        let mut ran = Vec::new();
        for call in calls {
            let error = call.await.unwrap().unwrap_err();
            assert_eq!(error.kind(), Code::Disconnected);
            ran.push(error.ran().unwrap());
        }
        // What waits behind what the kernel took was not sent.
        assert_eq!(ran.last(), Some(&Ran::No));
        drop(hold);
    });
}

#[test]
fn without_a_server_errors_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("latzero://a?socket={}/none.sock", dir.path().display());
    let error = App::connect(&url).unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::No))
    );
    assert!(error.message().contains("latzero start"), "{error}");
    assert_eq!(
        App::connect("nonsense").unwrap_err().kind(),
        Code::BadMessage
    );
}

#[test]
fn calls_wait_for_a_connection_no_longer_than_their_timeout() {
    let fake = Fake::broker(Over::Unix);
    let app = App::connect_with(
        latzero::App::builder(&fake.url("a"))
            .reconnect(quick())
            .call_timeout(Duration::from_millis(50)),
    )
    .unwrap();
    drop(fake);
    let error = app
        .call("x", &1)
        .timeout(Duration::from_millis(50))
        .send::<Value>()
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::No)),
        "{error}"
    );
    let error = app.emit("x", &1).send().unwrap_err();
    assert_eq!(
        (error.kind(), error.ran()),
        (Code::Disconnected, Some(Ran::No)),
        "{error}"
    );
}

#[test]
fn a_displaced_app_stays_away() {
    let fake = Fake::scripted(Over::Unix, |n, mut peer| {
        assert_eq!(n, 0, "it is back");
        peer.welcome();
        peer.read();
        peer.send(&json!({"action":"event","event":"displaced"}));
    });
    let app = App::connect(&fake.url("a")).unwrap();
    let error = app.call("x", &1).send::<Value>().unwrap_err();
    assert_eq!(error.kind(), Code::AppInUse);
    assert!(error.message().contains("took this app over"), "{error}");
    let error = app.call("x", &1).send::<Value>().unwrap_err();
    assert_eq!((error.kind(), error.ran()), (Code::AppInUse, Some(Ran::No)));
}

#[test]
fn a_refused_handshake_says_why() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        let (hello, _) = peer.read().unwrap();
        peer.send(
            &json!({"action":"handshake_ack","in_reply_to":hello["id"],"status":"error",
            "error":{"code":"app_in_use","message":"another instance lives"}}),
        );
    });
    let error = App::connect(&fake.url("a")).unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (Code::AppInUse, "another instance lives")
    );
}

#[test]
fn without_reconnecting_a_lost_connection_is_final() {
    let fake = Fake::broker(Over::Unix);
    let reconnect = Reconnect {
        enabled: false,
        ..Reconnect::default()
    };
    let app =
        App::connect_with(latzero::App::builder(&fake.url("a")).reconnect(reconnect)).unwrap();
    let mut news = app.on("news").unwrap();
    fake.cut();
    assert!(news.recv().is_none());
    let error = app.call("x", &1).send::<Value>().unwrap_err();
    assert!(error.message().contains("reconnecting is off"), "{error}");
}

#[test]
fn a_close_waits_for_handlers() {
    let fake = Fake::broker(Over::Tcp);
    let server = App::connect(&fake.url("server")).unwrap();
    let (started, start) = mpsc::channel();
    let (release, wait) = mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    server
        .serve("slow", move |_| {
            started.send(()).unwrap();
            wait.lock().unwrap().recv().unwrap();
            Ok("done")
        })
        .unwrap();
    let caller = App::connect(&fake.url("caller")).unwrap();
    std::thread::scope(|scope| {
        let call = scope.spawn(|| caller.call("slow", &()).send::<String>());
        start.recv().unwrap();
        let closing = scope.spawn(|| server.close());
        release.send(()).unwrap();
        assert_eq!(call.join().unwrap().unwrap(), "done");
        closing.join().unwrap().unwrap();
    });
}

#[test]
fn the_states_of_a_connection_are_told_in_order() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = Fake::broker(over);
        let app =
            App::connect_with(latzero::App::builder(&fake.url("a")).reconnect(quick())).unwrap();
        let mut states = app.states();
        fake.cut();
        assert_eq!(states.next(), Some(State::Disconnected));
        assert_eq!(states.next(), Some(State::Connected));
        assert!(app.is_connected() && app.as_async().end_reason().is_none());
        app.close().unwrap();
        // The end of a clean close is no loss.
        assert_eq!(states.next(), Some(State::Closed));
        assert_eq!(states.next(), None);
        assert_eq!(app.states().collect::<Vec<_>>(), [State::Closed]);
    }
}

#[test]
fn whoever_follows_an_app_does_not_keep_it_open() {
    let fake = Fake::broker(Over::Unix);
    let app = App::connect(&fake.url("a")).unwrap();
    let states = app.states();
    drop(app);
    assert_eq!(states.collect::<Vec<_>>(), [State::Closed]);
}

#[test]
fn an_app_that_was_displaced_or_does_not_reconnect_says_so() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        peer.read();
        peer.send(&json!({"action":"event","event":"displaced"}));
    });
    let app = App::connect(&fake.url("a")).unwrap();
    let states = app.states();
    app.call("x", &1).send::<Value>().unwrap_err();
    assert_eq!(states.collect::<Vec<_>>(), [State::Displaced]);
    let reason = app.as_async().end_reason().unwrap();
    assert_eq!(reason.kind(), Code::AppInUse);

    let fake = Fake::broker(Over::Unix);
    let never = Reconnect {
        enabled: false,
        ..Reconnect::default()
    };
    let app = App::connect_with(latzero::App::builder(&fake.url("a")).reconnect(never)).unwrap();
    let states = app.states();
    fake.cut();
    let told: Vec<_> = states.collect();
    assert_eq!(told, [State::Disconnected, State::Closed]);
    let reason = app.as_async().end_reason().unwrap();
    assert!(reason.message().contains("reconnecting is off"), "{reason}");
}

#[test]
fn losses_are_counted_for_the_whole_app() {
    let fake = Fake::scripted(Over::Unix, |_, mut peer| {
        peer.welcome();
        let (register, _) = peer.read().unwrap();
        peer.reply(&register, &json!({}));
        peer.send(&json!({"action":"event","event":"lost","count":3}));
        let emit = |n: usize| {
            json!({"action":"emit","process":"news","pool":"alpha","data":n,
                "origin":{"app_id":"b","instance":"0000000000000009"}})
        };
        // Two more than wait to be read.
        for n in 0..1026 {
            peer.send(&emit(n));
        }
        let (call, _) = peer.read().unwrap();
        peer.reply(&call, &json!(null));
        peer.read();
    });
    let app = App::connect(&fake.url("a")).unwrap();
    assert_eq!(app.lost(), 0);
    let mut news = app.on("news").unwrap();
    // Answered after all the emits.
    app.call("x", &1).send::<Value>().unwrap();
    assert_eq!(app.lost(), 5);
    assert_eq!(news.recv().unwrap().lost(), 3);
}
