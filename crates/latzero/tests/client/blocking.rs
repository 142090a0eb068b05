//! The blocking face.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use latzero::blocking::App;
use latzero::{Bytes, Code, HandlerError};
use serde_json::{Value, json};

use crate::fake::{Fake, Over};

const HOUR: Duration = Duration::from_secs(3600);

fn both(test: impl Fn(&Fake)) {
    for over in [Over::Unix, Over::Tcp] {
        test(&Fake::broker(over));
    }
}

fn app(fake: &Fake, name: &str) -> App {
    App::connect(&fake.url(name)).unwrap()
}

#[test]
fn calls_and_answers() {
    both(|fake| {
        let server = app(fake, "server");
        server
            .serve("double", |req| Ok(req.data::<i64>()? * 2))
            .unwrap();
        server.serve("who", |req| Ok(req.origin().app_id)).unwrap();
        server
            .serve("echo", |req| {
                Ok(Bytes(req.bytes().unwrap_or(b"none").to_vec()))
            })
            .unwrap();
        let caller = app(fake, "caller");
        for n in 0..100 {
            assert_eq!(caller.call("double", &n).send::<i64>().unwrap(), n * 2);
        }
        assert_eq!(caller.call("who", &()).send::<String>().unwrap(), "caller");
        let bytes = caller
            .call("echo", &Bytes(vec![0, 255, 7]))
            .bytes()
            .unwrap();
        assert_eq!(bytes, Bytes(vec![0, 255, 7]));
        assert!(caller.ping().unwrap() < Duration::from_secs(5));
    });
}

#[test]
fn errors_keep_their_code_and_data() {
    both(|fake| {
        let server = app(fake, "server");
        server
            .serve("fail", |_| -> Result<(), _> {
                Err(HandlerError::new("my_code", "no luck").with_data(json!({"x":1})))
            })
            .unwrap();
        server
            .serve("panic", |_| -> Result<(), _> { panic!("on purpose") })
            .unwrap();
        server.serve("typed", |req| req.data::<i64>()).unwrap();
        let caller = app(fake, "caller");
        let error = caller.call("fail", &1).send::<Value>().unwrap_err();
        assert_eq!(
            (error.code(), error.kind()),
            ("my_code", Code::HandlerError)
        );
        assert_eq!(error.data(), Some(&json!({"x":1})));
        let error = caller.call("panic", &1).send::<Value>().unwrap_err();
        assert_eq!(error.code(), "handler_error");
        let error = caller.call("typed", "text").send::<Value>().unwrap_err();
        assert_eq!(error.code(), "bad_message");
        let error = caller.call("nobody", &1).send::<Value>().unwrap_err();
        assert_eq!(
            (error.code(), error.ran()),
            ("no_handler", Some(latzero::Ran::No))
        );
        assert_eq!(caller.call("typed", &1).send::<i64>().unwrap(), 1);
    });
}

#[test]
fn emits_arrive_in_order() {
    both(|fake| {
        let listener = app(fake, "listener");
        let mut news = listener.on("news").unwrap();
        let sender = app(fake, "sender");
        for n in 0..100 {
            sender.emit("news", &n).send().unwrap();
        }
        for n in 0..100 {
            let emission = news.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(emission.data::<i64>().unwrap(), n);
            assert_eq!(emission.origin().app_id, "sender");
        }
        assert_eq!(sender.emit("news", &1).counted().unwrap(), 1);
        assert_eq!(sender.emit("nothing", &1).counted().unwrap(), 0);
    });
}

#[test]
fn many_threads_share_one_app() {
    both(|fake| {
        let server = app(fake, "server");
        server
            .serve("double", |req| Ok(req.data::<i64>()? * 2))
            .unwrap();
        let caller = app(fake, "caller");
        std::thread::scope(|scope| {
            for t in 0..8 {
                let caller = caller.clone();
                scope.spawn(move || {
                    for n in t * 1000..t * 1000 + 100 {
                        assert_eq!(caller.call("double", &n).send::<i64>().unwrap(), n * 2);
                    }
                });
            }
        });
    });
}

#[test]
fn handlers_call_their_own_app() {
    both(|fake| {
        let server = app(fake, "server");
        server
            .serve("count", |req| {
                let n: u64 = req.data()?;
                if n == 0 {
                    return Ok(0);
                }
                Ok(req.app().call("count", &(n - 1)).send::<u64>()? + 1)
            })
            .unwrap();
        let caller = app(fake, "caller");
        assert_eq!(caller.call("count", &12).send::<u64>().unwrap(), 12);
        // From outside, through the same app that serves.
        assert_eq!(server.call("count", &3).send::<u64>().unwrap(), 3);
    });
}

#[test]
fn one_thread_is_enough_for_handlers_that_call() {
    both(|fake| {
        let builder = latzero::App::builder(&fake.url("server")).handler_threads(1);
        let server = App::connect_with(builder).unwrap();
        server
            .serve("count", |req| {
                let n: u64 = req.data()?;
                Ok(if n == 0 {
                    0
                } else {
                    req.app().call("count", &(n - 1)).send::<u64>()? + 1
                })
            })
            .unwrap();
        let caller = app(fake, "caller");
        for _ in 0..20 {
            assert_eq!(caller.call("count", &3).send::<u64>().unwrap(), 3);
        }
    });
}

#[test]
fn a_stuck_handler_delays_no_other_call() {
    both(|fake| {
        let server = app(fake, "server");
        let (release, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        server
            .serve("maybe", move |req| {
                if req.data::<bool>()? {
                    wait.lock().unwrap().recv().unwrap();
                }
                Ok(())
            })
            .unwrap();
        let caller = app(fake, "caller");
        // Fast often enough to be run on the reading thread.
        for _ in 0..20 {
            caller.call("maybe", &false).send::<()>().unwrap();
        }
        std::thread::scope(|scope| {
            let stuck = scope.spawn(|| caller.call("maybe", &true).send::<()>());
            for _ in 0..20 {
                caller.call("maybe", &false).send::<()>().unwrap();
            }
            release.send(()).unwrap();
            stuck.join().unwrap().unwrap();
        });
    });
}

#[test]
fn streams_respect_the_window() {
    both(|fake| {
        let server = app(fake, "server");
        server
            .serve("count", |req| {
                for n in 0..req.data::<u64>()? {
                    req.partial(&n)?;
                }
                req.progress(&"done")?;
                Ok("end")
            })
            .unwrap();
        let caller = app(fake, "caller");
        let mut stream = caller.call("count", &1000).window(10).stream::<u64>();
        let items: Vec<u64> = stream.by_ref().map(Result::unwrap).collect();
        assert_eq!(items, (0..1000).collect::<Vec<_>>());
        assert_eq!(stream.end().unwrap().json(), Some("\"end\""));
    });
}

#[test]
fn a_dropped_stream_cancels_its_handler() {
    both(|fake| {
        let server = app(fake, "server");
        let (tx, rx) = mpsc::channel();
        server
            .serve("forever", move |req| -> Result<(), HandlerError> {
                loop {
                    if let Err(error) = req.partial(&1) {
                        tx.send(error.code().to_owned()).unwrap();
                        return Err(error.into());
                    }
                }
            })
            .unwrap();
        let caller = app(fake, "caller");
        let mut stream = caller.stream::<i64>("forever", &());
        assert_eq!(stream.next().unwrap().unwrap(), 1);
        drop(stream);
        assert_eq!(
            rx.recv_timeout(Duration::from_secs(10)).unwrap(),
            "cancelled"
        );
    });
}

#[test]
fn watchers_see_who_comes_and_goes() {
    both(|fake| {
        let watcher = app(fake, "watcher");
        let mut events = watcher.watch("alpha").unwrap();
        let other = app(fake, "other");
        let event = events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(
            (event.event(), event.app_id()),
            ("app_online", Some("other"))
        );
        drop(other);
        let event = events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(
            (event.event(), event.pool()),
            ("app_offline", Some("alpha"))
        );
    });
}

#[test]
fn close_ends_calls_and_events() {
    both(|fake| {
        let one = app(fake, "one");
        let mut news = one.on("news").unwrap();
        one.close().unwrap();
        assert!(news.recv().is_none());
        let error = one.call("double", &1).send::<i64>().unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::Disconnected, Some(latzero::Ran::No))
        );
    });
}

#[test]
fn waiting_for_the_handshake_can_be_interrupted() {
    for over in [Over::Unix, Over::Tcp] {
        let fake = Fake::scripted(over, |_, mut peer| while peer.read().is_some() {});
        let patient = latzero::App::builder(&fake.url("a")).connect_timeout(HOUR);
        let asked = Rc::new(Cell::new(0));
        let wants_end = {
            let asked = asked.clone();
            move || asked.replace(asked.get() + 1) > 0
        };
        let connecting = || App::connect_with(patient);
        let error = latzero::blocking::interruptible(wants_end, connecting).unwrap_err();
        assert_eq!(
            (error.kind(), error.ran()),
            (Code::Disconnected, Some(latzero::Ran::No))
        );
        assert_eq!(asked.get(), 2);
    }
}
