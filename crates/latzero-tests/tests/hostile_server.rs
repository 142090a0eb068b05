//! A hostile server: it passes messages of an encrypted pool on, and changes what it likes.
//!
//! The real server does the work; a relay between it and one client plays the hostile part.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use latzero::blocking::App;
use latzero::{Builder, Code, HandlerError, Keys};
use latzero_crypto::text;
use latzero_protocol::frame::{self, Accept};
use latzero_tests::vault::{READ, WRITE, keys, member, vault};
use latzero_tests::{Server, TIMEOUT};
use serde_json::{Value, json};

type Message = (Value, Option<Vec<u8>>);
/// In place of a message: the end of the connection.
const CUT: &str = "cut";

type Change = Box<dyn FnOnce(Message) -> Vec<Message> + Send>;

/// Passes connections on to the server.
struct Relay {
    address: SocketAddr,
    /// All that clients sent.
    sent: Arc<Mutex<Vec<u8>>>,
    /// The change of the next message to the client with this action.
    next: Arc<Mutex<Option<(&'static str, Change)>>>,
}

impl Relay {
    fn new(server: &Server) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let upstream = server.0.tcp().to_owned();
        let next = Arc::new(Mutex::new(None));
        let changes = Arc::clone(&next);
        let sent = Arc::<Mutex<Vec<u8>>>::default();
        let record = Arc::clone(&sent);
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let server = TcpStream::connect(&upstream).unwrap();
                let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let record = Arc::clone(&record);
                std::thread::spawn(move || {
                    let mut piece = [0; 4096];
                    while let Ok(read @ 1..) = from.read(&mut piece) {
                        record.lock().unwrap().extend_from_slice(&piece[..read]);
                        if to.write_all(&piece[..read]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Write);
                });
                pass(server, client, &changes);
            }
        });
        Relay {
            address,
            sent,
            next,
        }
    }

    /// Whether a client sent this, in the clear.
    fn saw(&self, text: &str) -> bool {
        let sent = self.sent.lock().unwrap();
        sent.windows(text.len()).any(|part| part == text.as_bytes())
    }

    fn app(&self, server: &Server, app: &str, keys: Keys) -> App {
        App::connect_with(self.builder(server, app, keys)).unwrap()
    }

    fn builder(&self, server: &Server, app: &str, keys: Keys) -> Builder {
        let builder = latzero::App::builder(&format!("latzero://{app}@{}", self.address));
        let state_dir = server.0.data_dir().join("of-clients").join(app);
        builder
            .keys("vault", keys)
            .state_dir(state_dir)
            .unbound(true)
    }

    /// Waits until the change was made.
    fn changed(&self) {
        latzero_tests::eventually(|| self.next.lock().unwrap().is_none());
    }

    fn change(
        &self,
        action: &'static str,
        change: impl FnOnce(Message) -> Vec<Message> + Send + 'static,
    ) {
        *self.next.lock().unwrap() = Some((action, Box::new(change)));
    }
}

/// Passes messages to the client until either side ends.
fn pass(
    mut server: TcpStream,
    mut client: TcpStream,
    changes: &Mutex<Option<(&'static str, Change)>>,
) {
    let accept = Accept {
        max_frame: 16 << 20,
        attachments: true,
    };
    let (mut input, mut piece) = (Vec::new(), [0; 4096]);
    while let Ok(read @ 1..) = server.read(&mut piece) {
        input.extend_from_slice(&piece[..read]);
        let mut out = Vec::new();
        while let Some((message, used)) = frame::decode(&input, accept).unwrap() {
            let json: Value = serde_json::from_slice(message.json).unwrap();
            let message = (json, message.attachment.map(<[u8]>::to_vec));
            let mut next = changes.lock().unwrap();
            let change = next.take_if(|(action, _)| message.0["action"] == *action);
            drop(next);
            let messages = match change {
                Some((_, change)) => change(message),
                None => vec![message],
            };
            for (json, attachment) in messages {
                if json == CUT {
                    let _ = client.write_all(&out);
                    let _ = client.shutdown(Shutdown::Both);
                    let _ = server.shutdown(Shutdown::Both);
                    return;
                }
                let json = json.to_string();
                let write = |out: &mut Vec<u8>| out.extend_from_slice(json.as_bytes());
                match attachment {
                    Some(raw) => frame::append_attachment(&mut out, &raw, write),
                    None => frame::append(&mut out, write),
                }
            }
            input.drain(..used);
        }
        if client.write_all(&out).is_err() {
            break;
        }
    }
}

#[test]
fn an_event_can_not_be_repeated_redirected_or_attributed_to_another_app() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let listener = relay.app(&server, "listener", keys(&set, READ));
    let mut news = listener.on("news").unwrap();
    let mut other = listener.on("other").unwrap();
    let sender = member(&server, "sender", keys(&set, READ));
    let mut next = || news.recv_timeout(TIMEOUT).unwrap().data::<u64>().unwrap();
    let emit = |number: u64| sender.emit("news", &number).send().unwrap();
    let kept = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&kept);
    relay.change("emit", move |message| {
        *keep.lock().unwrap() = Some(message.clone());
        vec![message.clone(), message]
    });
    emit(1);
    emit(2);
    assert_eq!((next(), next()), (1, 2), "not twice");
    let before: Message = kept.lock().unwrap().take().unwrap();
    let changes: [(&str, Change); 6] = [
        ("an old one again", Box::new(|new| vec![before, new])),
        (
            "another name",
            Box::new(|(mut json, sealed)| {
                json["process"] = "other".into();
                vec![(json, sealed)]
            }),
        ),
        (
            "another sender",
            Box::new(|(mut json, sealed)| {
                json["origin"]["app_id"] = "listener".into();
                vec![(json, sealed)]
            }),
        ),
        (
            "another receiver",
            Box::new(|(mut json, sealed)| {
                json["destination"] = "listener".into();
                vec![(json, sealed)]
            }),
        ),
        (
            "other content",
            Box::new(|(json, sealed)| {
                let mut sealed = sealed.unwrap();
                *sealed.last_mut().unwrap() ^= 1;
                vec![(json, Some(sealed))]
            }),
        ),
        (
            "not sealed",
            Box::new(|(mut json, _)| {
                json["data"] = 7.into();
                vec![(json, None)]
            }),
        ),
    ];
    for (number, (what, change)) in (10..).step_by(10).zip(changes) {
        relay.change("emit", change);
        emit(number);
        emit(number + 1);
        if what == "an old one again" {
            assert_eq!(next(), number, "{what}");
        }
        assert_eq!(next(), number + 1, "{what}");
    }
    // The repeated one and the six changed ones, each once.
    assert_eq!(listener.unverified(), 7);
    assert!(other.recv_timeout(Duration::ZERO).is_err());
}

#[test]
fn an_answer_belongs_to_its_call_and_the_server_s_own_word_is_marked() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    let echo = worker.serve("echo", |request| {
        let number: u64 = request.data()?;
        Ok::<_, HandlerError>(number)
    });
    echo.unwrap();
    let relay = Relay::new(&server);
    let caller = relay.app(&server, "caller", keys(&set, READ));
    let call = |number: u64| caller.call("echo", &number).send::<u64>();
    let kept = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&kept);
    relay.change("response", move |message| {
        *keep.lock().unwrap() = message.1.clone();
        vec![message]
    });
    assert_eq!(call(1).unwrap(), 1);
    let first: Option<Vec<u8>> = kept.lock().unwrap().take();
    assert!(first.is_some(), "an answer is sent as bytes");
    relay.change("response", |(json, _)| vec![(json, first)]);
    let error = call(2).unwrap_err();
    assert_eq!(error.kind(), Code::Integrity, "the answer to another call");
    relay.change("response", |(mut json, _)| {
        json["response"] = 2.into();
        vec![(json, None)]
    });
    let error = call(2).unwrap_err();
    assert_eq!(error.kind(), Code::Integrity, "not sealed");
    relay.change("response", |(json, sealed)| {
        let sealed = text::encode(&sealed.unwrap());
        let answer = json!({
            "action": "response", "in_reply_to": json["in_reply_to"], "status": "error",
            "error": {"code": "sealed", "message": "sealed", "data": sealed},
        });
        vec![(answer, None)]
    });
    let error = call(2).unwrap_err();
    assert_eq!(error.kind(), Code::Integrity, "another status");
    // It may end a call, and the error says that this is only the server's word.
    relay.change("response", |(json, _)| {
        let error = json!({"code": "refund_denied", "message": "no", "ran": "no"});
        let answer = json!({
            "action": "response", "in_reply_to": json["in_reply_to"], "status": "error",
            "error": error,
        });
        vec![(answer, None)]
    });
    let error = call(2).unwrap_err();
    assert_eq!(error.code(), "refund_denied");
    assert!(!error.is_authenticated());
    assert_eq!(call(3).unwrap(), 3);
}

/// The kind of a message is not secret: a server could pass it on as one that needs no signature.
#[test]
fn a_privileged_handler_sees_nothing_that_the_server_changed() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let worker = relay.app(&server, "worker", keys(&set, WRITE));
    let (heard, hears) = std::sync::mpsc::channel();
    let serving = worker.handler("admin").privileged();
    let serving = serving.serve(move |request| {
        let number = request.data::<u64>()?;
        let _ = heard.send(number);
        Ok::<_, HandlerError>(number)
    });
    serving.unwrap();
    let writer = member(&server, "writer", keys(&set, WRITE));
    let call = |number: u64, timeout| {
        let call = writer.call("admin", &number).privileged();
        call.timeout(timeout).send::<u64>()
    };
    // Nobody answers these.
    let fail = || call(1, Duration::from_millis(200)).unwrap_err();
    // The offset of the kind in an envelope; see `latzero_crypto::envelope`.
    const KIND: usize = 28;
    let of_kind = |kind: u8, has_signature: bool| -> Change {
        Box::new(move |(json, sealed)| {
            let mut sealed = sealed.unwrap();
            sealed[KIND] = kind;
            if !has_signature {
                sealed.truncate(sealed.len() - 64);
            }
            vec![(json, Some(sealed))]
        })
    };
    let changes: [Change; 5] = [
        of_kind(2, false),
        of_kind(2, true),
        of_kind(5, false),
        of_kind(6, true),
        Box::new(|(json, sealed)| {
            let mut sealed = sealed.unwrap();
            *sealed.last_mut().unwrap() ^= 1;
            vec![(json, Some(sealed))]
        }),
    ];
    for change in changes {
        relay.change("trigger", change);
        fail();
    }
    // As a call in a pool that is not encrypted, where nothing is checked.
    relay.change("trigger", |(mut json, _)| {
        json["pool"] = "default".into();
        json["data"] = 1.into();
        vec![(json, None)]
    });
    fail();
    relay.change("emit", |(mut json, _)| {
        json["pool"] = "default".into();
        json["data"] = 1.into();
        vec![(json, None)]
    });
    writer.emit("admin", &1).privileged().send().unwrap();
    assert_eq!(call(2, TIMEOUT).unwrap(), 2);
    assert_eq!(hears.try_iter().collect::<Vec<_>>(), [2]);
    // The answer to a signed call is signed too.
    let relay = Relay::new(&server);
    let caller = relay.app(&server, "caller", keys(&set, WRITE));
    relay.change("response", |(json, sealed)| {
        let mut sealed = sealed.unwrap();
        sealed.truncate(sealed.len() - 64);
        vec![(json, Some(sealed))]
    });
    let error = caller.call("admin", &3).privileged().send::<u64>();
    assert_eq!(error.unwrap_err().kind(), Code::Integrity);
}

/// What the server says of a pool decides neither whether a call is sealed, nor whether it is
/// answered.
#[test]
fn a_handler_of_an_encrypted_pool_takes_nothing_from_another_pool() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let worker = relay.builder(&server, "worker", keys(&set, WRITE));
    let worker = App::connect_with(worker.pools(["vault", "open"])).unwrap();
    let (ran, runs) = std::sync::mpsc::channel();
    let serve = |name: &'static str, pools: &[&str]| {
        let ran = ran.clone();
        let handler = worker.handler(name).pools(pools.iter().copied());
        let serving = handler.serve(move |request| {
            let _ = ran.send((name, request.pool().to_owned()));
            Ok::<_, HandlerError>("a secret of the handler")
        });
        serving.unwrap();
    };
    serve("pay", &["vault"]);
    serve("any", &[]);
    let mut news = worker.on("news").unwrap();
    let caller = member(&server, "caller", keys(&set, READ));
    let forged = |pool: Option<Value>| -> Change {
        Box::new(move |(mut json, _)| {
            match pool {
                Some(pool) => json["pool"] = pool,
                None => drop(json.as_object_mut().unwrap().remove("pool")),
            }
            json["data"] = 1.into();
            vec![(json, None)]
        })
    };
    let pools = [json!("default"), json!("nowhere"), Value::Null, json!(5)];
    let pools = pools.into_iter().map(Some).chain([None]);
    for pool in pools {
        for name in ["pay", "any"] {
            relay.change("trigger", forged(pool.clone()));
            let error = caller.call(name, &1).send::<Value>().unwrap_err();
            assert_eq!(error.kind(), Code::NoHandler, "{pool:?}");
            assert!(!error.is_authenticated());
        }
        relay.change("emit", forged(pool));
        caller.emit("news", &1).send().unwrap();
        relay.changed();
    }
    // The app is in this pool, and one of the handlers is too.
    relay.change("trigger", forged(Some("open".into())));
    let error = caller.call("pay", &1).send::<Value>().unwrap_err();
    assert_eq!(error.kind(), Code::NoHandler);
    relay.change("trigger", forged(Some("open".into())));
    // The caller is not, so the server refuses the answer.
    let unsealed = caller.call("any", &1).timeout(Duration::from_millis(200));
    assert!(!unsealed.send::<Value>().unwrap_err().is_authenticated());
    caller.call("pay", &1).send::<Value>().unwrap();
    let expected = [("any", "open".to_owned()), ("pay", "vault".to_owned())];
    assert_eq!(runs.try_iter().collect::<Vec<_>>(), expected);
    caller.emit("news", &2).send().unwrap();
    let first = news.recv_timeout(TIMEOUT).unwrap();
    assert_eq!(first.data::<u64>().unwrap(), 2);
}

#[test]
fn an_acknowledgement_changes_nothing_about_where_messages_go() {
    let (server, set) = vault();
    let worker = member(&server, "worker", keys(&set, WRITE));
    worker.serve("pay", |_| Ok::<_, HandlerError>(1)).unwrap();
    for pools in [json!(["default"]), json!([]), json!(["vault", "default"])] {
        let relay = Relay::new(&server);
        relay.change("handshake_ack", |(mut ack, _)| {
            ack["pools"] = pools;
            vec![(ack, None)]
        });
        let caller = relay.app(&server, "caller", keys(&set, WRITE));
        assert_eq!(caller.call("pay", &"TOP SECRET").send::<u64>().unwrap(), 1);
        caller.emit("pay", &"TOP SECRET").send().unwrap();
        let block = caller.block("b").create(64).send().unwrap();
        let mut draft = block.write(TIMEOUT).unwrap();
        draft.write(0, b"TOP SECRET").unwrap();
        draft.commit().unwrap();
        caller.block("b").remove().unwrap();
        assert!(!relay.saw("TOP SECRET"));
    }
    // With several pools, each message has to name its own.
    let relay = Relay::new(&server);
    let caller = relay.builder(&server, "caller", keys(&set, WRITE));
    let caller = App::connect_with(caller.pools(["vault", "open"])).unwrap();
    let error = caller.call("pay", &"TOP SECRET").send::<u64>().unwrap_err();
    assert_eq!(error.kind(), Code::BadMessage);
    assert!(error.message().contains("name the pool"), "{error}");
    assert!(caller.emit("pay", &"TOP SECRET").send().is_err());
    assert!(caller.block("b").create(64).send().is_err());
    let call = caller.call("pay", &"TOP SECRET").pool("vault");
    assert_eq!(call.send::<u64>().unwrap(), 1);
    assert!(!relay.saw("TOP SECRET"));
}

#[test]
fn a_block_is_the_one_that_was_asked_for() {
    let (server, set) = vault();
    let owner = member(&server, "owner", keys(&set, WRITE));
    let _block = owner.block("b").create(64).send().unwrap();
    let changes: [fn(&mut Value); 3] = [
        |block| {
            block["pool"] = "default".into();
            block.as_object_mut().unwrap().remove("sealed");
        },
        |block| drop(block.as_object_mut().unwrap().remove("sealed")),
        |block| block["block_id"] = "c".into(),
    ];
    for change in changes {
        let relay = Relay::new(&server);
        let app = relay.app(&server, "app", keys(&set, WRITE));
        relay.change("response", move |(mut reply, attachment)| {
            change(&mut reply["response"]);
            vec![(reply, attachment)]
        });
        let error = app.block("b").attach_writable().unwrap_err();
        assert!(
            matches!(error.kind(), Code::Integrity | Code::Downgrade),
            "{error}"
        );
    }
}

/// The server may end a membership at any time, but not to have a message handled again.
#[test]
fn nothing_runs_again_after_a_membership_that_the_server_ended() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let worker = relay.app(&server, "worker", keys(&set, WRITE));
    let mut news = worker.on("news").unwrap();
    let (ran, runs) = std::sync::mpsc::channel();
    let serving = worker.serve("pay", move |request| {
        let _ = ran.send(request.data::<u64>()?);
        Ok::<_, HandlerError>(())
    });
    serving.unwrap();
    let sender = member(&server, "sender", keys(&set, READ));
    let kept = Arc::new(Mutex::new(Vec::new()));
    let ended = json!({"action": "event", "event": "pool_rotated", "pool": "vault",
        "member": false});
    let keep = |action: &'static str, then: Vec<Message>| {
        let kept = Arc::clone(&kept);
        relay.change(action, move |message| {
            kept.lock().unwrap().push(message.clone());
            [vec![message], then].concat()
        });
    };
    keep("trigger", Vec::new());
    sender.call("pay", &1).park().send::<()>().unwrap();
    keep("emit", vec![(ended, None), (CUT.into(), None)]);
    sender.emit("news", &1).send().unwrap();
    assert_eq!(
        news.recv_timeout(TIMEOUT).unwrap().data::<u64>().unwrap(),
        1
    );
    // Handled once it is back, after what the server repeats.
    let again = std::mem::take(&mut *kept.lock().unwrap());
    relay.change("trigger", move |message| [again, vec![message]].concat());
    latzero_tests::eventually(|| worker.ping().is_ok());
    sender.call("pay", &2).park().send::<()>().unwrap();
    sender.emit("news", &2).send().unwrap();
    assert_eq!(
        news.recv_timeout(TIMEOUT).unwrap().data::<u64>().unwrap(),
        2
    );
    assert_eq!(runs.try_iter().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn an_answer_that_nobody_waits_for_is_sealed_too() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let app = relay.app(&server, "shop", keys(&set, READ));
    let mut answers = app.answers();
    let forged = |more: Value| -> Change {
        Box::new(move |message| {
            let mut answer = json!({"action": "response", "in_reply_to": "order-1"});
            let fields = answer.as_object_mut().unwrap();
            fields.extend(more.as_object().unwrap().clone());
            vec![(answer, None), message]
        })
    };
    let forgeries = [
        json!({"status": "ok", "response": {"paid": true}}),
        json!({"status": "ok", "response": {"paid": true}, "pool": "vault"}),
        json!({"status": "ok", "response": {"paid": true}, "pool": "default"}),
        json!({"status": "error", "error": {"code": "declined", "message": "no"}}),
    ];
    for more in forgeries {
        relay.change("response", forged(more));
        app.ping().unwrap();
        app.request(&json!({"action": "pool_info", "pool": "vault"}))
            .unwrap();
        let answer = answers.recv_timeout(TIMEOUT).unwrap();
        assert_eq!(answer.result().unwrap_err().kind(), Code::Integrity);
    }
    // Why a parked call failed is said by its handler, or marked.
    let worker = member(&server, "worker", keys(&set, WRITE));
    let fails = |_| Err::<(), _>(HandlerError::new("no_money", "try later"));
    worker.serve("pay", fails).unwrap();
    let failure = || {
        let parked = app.call("pay", &1).send_parked().unwrap();
        parked.answer::<Value>().unwrap_err()
    };
    let error = failure();
    assert_eq!((error.code(), error.is_authenticated()), ("no_money", true));
    relay.change("response", |(mut answer, _)| {
        answer["error"] = json!({"code": "no_money", "message": "try later"});
        vec![(answer, None)]
    });
    let error = failure();
    assert_eq!(
        (error.code(), error.is_authenticated()),
        ("no_money", false)
    );
}

/// Another state of the pool than the accepted one is a matter for a person: the app ends, rather
/// than try again without a word.
#[test]
fn a_reconnect_to_another_state_of_the_pool_ends_the_app() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    let app = relay.app(&server, "app", keys(&set, READ));
    let mut news = app.on("news").unwrap();
    let next = Arc::clone(&relay.next);
    relay.change("emit", move |_| {
        // The first response is the challenge.
        let joined: Change = Box::new(|(mut joined, _)| {
            let descriptor = joined["response"]["descriptor"].as_str().unwrap();
            let mut descriptor = text::decode_within(descriptor, 4096).unwrap();
            *descriptor.last_mut().unwrap() ^= 1;
            joined["response"]["descriptor"] = text::encode(&descriptor).into();
            vec![(joined, None)]
        });
        let then = Arc::clone(&next);
        let challenge: Change = Box::new(move |challenge| {
            *then.lock().unwrap() = Some(("response", joined));
            vec![challenge]
        });
        *next.lock().unwrap() = Some(("response", challenge));
        vec![(CUT.into(), None)]
    });
    let sender = member(&server, "sender", keys(&set, READ));
    sender.emit("news", &1).send().unwrap();
    let ended = news.recv_timeout(TIMEOUT).unwrap_err();
    assert_eq!(ended.kind(), Code::Disconnected, "it did not end");
    let error = app.ping().unwrap_err();
    assert_eq!(error.kind(), Code::Integrity, "{error}");
}

/// While a client waits for an answer to its proof it keeps what else arrives, up to a limit.
#[test]
fn messages_before_the_answer_to_a_proof_are_kept_within_a_limit() {
    let (server, set) = vault();
    for (count, is_taken) in [(8, true), (80, false)] {
        let relay = Relay::new(&server);
        relay.change("response", move |reply| {
            let other = json!({"action": "event", "event": "x", "pad": "x".repeat(1 << 20)});
            let others = std::iter::repeat_n((other, None), count);
            others.chain([reply]).collect()
        });
        let app = App::connect_with(relay.builder(&server, "app", keys(&set, READ)));
        let error = app.err().map(|error| error.kind());
        assert_eq!(error, (!is_taken).then_some(Code::Disconnected));
    }
}

/// Emits alone do not end a connection that waits for an answer to its proof: there may be more of
/// them than the client keeps, because the server's outbox is filled while the client reads it.
#[test]
fn emits_before_the_answer_to_a_proof_are_dropped_and_counted_beyond_a_limit() {
    let (server, set) = vault();
    let relay = Relay::new(&server);
    relay.change("response", move |reply| {
        let pad = "x".repeat(1 << 20);
        let emit = json!({"action": "emit", "process": "news", "pool": "vault", "data": pad});
        let emits = std::iter::repeat_n((emit, None), 100);
        emits.chain([reply]).collect()
    });
    let listener = relay.app(&server, "listener", keys(&set, READ));
    let mut news = listener.on("news").unwrap();
    // Each is a little longer than a sixteenth of what is kept.
    assert_eq!(listener.lost(), 100 - 15);
    let sender = member(&server, "sender", keys(&set, READ));
    sender.emit("news", &1).send().unwrap();
    assert_eq!(news.recv_timeout(TIMEOUT).unwrap().lost(), 100 - 15);
}

/// A program that listens on the port of a server can't play it for an administrator: without the
/// token its answer is wrong, and nothing is requested of it.
#[test]
fn a_server_proves_the_token_to_an_administrator() {
    let server = Server::with(&["admin_over_plain_tcp=true"]);
    let token = std::fs::read_to_string(server.0.data_dir().join("admin.token")).unwrap();
    for is_changed in [false, true] {
        let relay = Relay::new(&server);
        let app = App::connect(&format!("latzero://far@{}", relay.address)).unwrap();
        let next = Arc::clone(&relay.next);
        // The first response is the challenge.
        relay.change("response", move |challenge| {
            let change: Change = Box::new(move |(mut proved, _)| {
                let mac = proved["response"]["mac"].as_str().unwrap().to_owned();
                let mut mac: [u8; 32] = text::decode(&mac).unwrap();
                mac[31] ^= u8::from(is_changed);
                proved["response"]["mac"] = text::encode(&mac).into();
                vec![(proved, None)]
            });
            *next.lock().unwrap() = Some(("response", change));
            vec![challenge]
        });
        let proved = app.prove_admin(&token, true).map_err(|error| error.kind());
        let expected = if is_changed {
            Err(Code::Unauthenticated)
        } else {
            Ok(())
        };
        assert_eq!(proved, expected);
    }
}
