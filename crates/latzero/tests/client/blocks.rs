//! Memory blocks against a server that keeps one: what it may do wrong with descriptors, and what a
//! client must not forget.

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Code, LockMode, Reconnect};
use latzero_shm::fds::recv_with_fds;
use latzero_shm::{Custodian, Description, Geometry, State};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::fake::{Fake, Over, Peer, Socket, ack, frame};

const TIMEOUT: Duration = Duration::from_secs(20);

fn custodian(size: u64, generation: u64) -> Custodian {
    let description = Description {
        block_id: [1; 16],
        pool_id: [2; 16],
        generation,
        geometry: Geometry::new(size, 2).unwrap(),
        is_persistent: false,
        created_unix_ns: 3,
    };
    Custodian::create_shared("lz:test", &description).unwrap()
}

/// A server that keeps block `b` of pool `alpha`.
struct BlockServer {
    custodian: Mutex<Arc<Custodian>>,
    /// Whether descriptors travel.
    is_mapped: bool,
    heard: Mutex<Vec<Value>>,
    peer: Mutex<Option<Peer>>,
}

/// What a test answers itself; true where it did.
type Special = dyn Fn(&BlockServer, &mut Peer, &Value) -> bool + Send + Sync;

impl BlockServer {
    fn start(is_mapped: bool, size: u64, special: Box<Special>) -> (Fake, Arc<BlockServer>) {
        let server = Arc::new(BlockServer {
            custodian: Mutex::new(Arc::new(custodian(size, 1))),
            is_mapped,
            heard: Mutex::default(),
            peer: Mutex::default(),
        });
        let served = server.clone();
        let fake = Fake::scripted(Over::Unix, move |_, peer| served.serve(peer, &*special));
        (fake, server)
    }

    fn serve(&self, mut peer: Peer, special: &Special) {
        let Some((hello, _)) = peer.read() else {
            return;
        };
        let mut answer = ack(&hello, 1, &json!({"max_frame": 65536}));
        if self.is_mapped {
            answer["features"] = json!(["attachments", "fd_passing"]);
        }
        if special(self, &mut peer, &hello) {
            return;
        }
        peer.send(&answer);
        *self.peer.lock().unwrap() = Some(peer.clone());
        while let Some((message, raw)) = peer.read() {
            self.heard.lock().unwrap().push(message.clone());
            if !special(self, &mut peer, &message) {
                self.answer(&mut peer, &message, raw.as_deref());
            }
        }
    }

    fn block(&self) -> Arc<Custodian> {
        self.custodian.lock().unwrap().clone()
    }

    fn describe(&self, mode: &str) -> Value {
        let block = self.block();
        let d = block.description();
        json!({
            "block_id": "b", "pool": "alpha", "size": d.geometry.size, "kind": "shared",
            "consistency": "snapshot",
            "version": block.version().unwrap(), "mode": mode, "generation": d.generation,
            "header": 1,
            "slots": d.geometry.slots, "slot_offset": d.geometry.slot_offset,
            "slot_stride": d.geometry.slot_stride,
            "owner": "me", "lifetime": "pool",
            "access": if self.is_mapped { "mapped" } else { "copied" }, "fence": 0,
        })
    }

    fn answer(&self, peer: &mut Peer, message: &Value, raw: Option<&[u8]>) {
        let block = self.block();
        match message["action"].as_str().unwrap() {
            "memory_create" | "memory_attach" if !message["id"].is_null() => {
                let mode = message["mode"].as_str().unwrap_or("write").to_owned();
                let mut reply = response(message, self.describe(&mode));
                if self.is_mapped {
                    reply["descriptors"] = json!(1);
                    let fd = match mode.as_str() {
                        "read" => block.lend(latzero_shm::Access::Read).unwrap(),
                        _ => block.lend(latzero_shm::Access::Write).unwrap(),
                    };
                    send(peer, &reply, &[fd.as_fd()]);
                } else {
                    peer.send(&reply);
                }
            }
            "memory_read" => {
                let mut bytes = vec![0; message["length"].as_u64().unwrap() as usize];
                let from = message["offset"].as_u64().unwrap();
                let version = block.read(from, &mut bytes, None).unwrap();
                let reply = response(message, json!({"version": version, "generation": 1}));
                peer.write(&frame(&reply, Some(&bytes)));
            }
            "memory_write" => {
                let at = message["offset"].as_u64().unwrap();
                let version = block.write(at, raw.unwrap(), None).unwrap();
                peer.reply(message, &json!({"version": version}));
            }
            "memory_lock" => {
                block.set_lease(7, true).unwrap();
                peer.reply(message, &json!({"lock": "7", "fence": 7}));
            }
            "memory_subscribe" => {
                let version = block.version().unwrap();
                peer.reply(message, &json!({"version": version, "generation": 1}));
            }
            _ if message["id"].is_null() => {}
            _ => peer.reply(message, &json!({})),
        }
    }

    fn send_event(&self, event: &Value) {
        let peer = self.peer.lock().unwrap().as_ref().unwrap().clone();
        let mut push =
            json!({"action": "event", "pool": "alpha", "block_id": "b", "generation": 1});
        for (key, value) in event.as_object().unwrap() {
            push[key] = value.clone();
        }
        { peer }.send(&push);
    }

    fn count(&self, action: &str) -> usize {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|m| m["action"] == action).count()
    }

    /// Waits until it has heard that many messages of an action.
    fn wait_heard(&self, action: &str, count: usize) {
        let end = Instant::now() + TIMEOUT;
        while self.count(action) < count {
            assert!(
                Instant::now() < end,
                "expected {count} {action}: {:?}",
                self.heard
            );
            std::thread::yield_now();
        }
    }
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "json!({…}) reads best as it is"
)]
fn response(to: &Value, response: Value) -> Value {
    json!({"action": "response", "in_reply_to": to["id"], "status": "ok", "response": response})
}

fn refusal(to: &Value, code: &str) -> Value {
    json!({"action": "response", "in_reply_to": to["id"], "status": "error",
        "error": {"code": code, "message": "the server says so", "ran": "no"}})
}

fn send(peer: &Peer, message: &Value, fds: &[BorrowedFd<'_>]) {
    let Socket::Unix(stream) = &peer.socket else {
        panic!("only Unix sockets pass descriptors");
    };
    let bytes = frame(message, None);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = sendmsg(
        stream,
        &[IoSlice::new(&bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
    assert_eq!(sent.unwrap(), bytes.len());
}

fn as_it_is() -> Box<Special> {
    Box::new(|_, _, _| false)
}

fn connect(fake: &Fake) -> App {
    let reconnect = Reconnect {
        pause_min: Duration::from_millis(1),
        pause_max: Duration::from_millis(20),
        ..Reconnect::default()
    };
    App::connect_with(latzero::App::builder(&fake.url("me")).reconnect(reconnect)).unwrap()
}

/// Attaches `b` where the server answers the first attempt with `fds` and says that `announced`
/// come.
fn attach_with(
    announced: Option<u64>,
    fds: impl Fn() -> Vec<OwnedFd> + Send + Sync + 'static,
) -> (Code, String) {
    let is_first = AtomicBool::new(true);
    let special = move |server: &BlockServer, peer: &mut Peer, message: &Value| {
        if message["action"] != "memory_attach" || !is_first.swap(false, Ordering::SeqCst) {
            return false;
        }
        let mut reply = response(message, server.describe("read"));
        if let Some(announced) = announced {
            reply["descriptors"] = json!(announced);
        }
        let fds = fds();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(peer, &reply, &fds);
        true
    };
    let (fake, server) = BlockServer::start(true, 100, Box::new(special));
    let app = connect(&fake);
    let error = app.block("b").attach().unwrap_err();
    // Whatever was wrong, the next attempt is a fresh one.
    assert_eq!(app.block("b").attach().unwrap().read().unwrap().0, [0; 100]);
    drop((app, server));
    (error.kind(), error.message().to_owned())
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn unsealed(length: u64) -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(length).unwrap();
    file.into()
}

#[test]
fn descriptors_that_do_not_fit_their_message_end_the_connection() {
    let (kind, text) = attach_with(Some(1), Vec::new);
    assert_eq!(kind, Code::Disconnected);
    assert!(
        text.contains("names 1 file descriptors, but 0 arrived"),
        "{text}"
    );
    for announced in [None, Some(1)] {
        let (kind, text) = attach_with(announced, || vec![null(), null()]);
        assert_eq!(kind, Code::Disconnected, "{text}");
        assert!(
            text.contains("more file descriptors than its messages name"),
            "{text}"
        );
    }
    // More than the control data has room for: the kernel says that it was cut short.
    let (kind, text) = attach_with(Some(200), || (0..200).map(|_| null()).collect());
    assert_eq!(kind, Code::Disconnected, "{text}");
    assert!(text.contains("all of them were closed"), "{text}");
}

#[test]
fn descriptors_of_something_else_are_refused_by_name() {
    let total = Geometry::new(100, 2).unwrap().total();
    type Make = fn(u64) -> OwnedFd;
    let checks: [(Make, &str); 5] = [
        (|_| null(), "not a regular file"),
        (
            |_| UnixStream::pair().unwrap().0.into(),
            "not a regular file",
        ),
        (|_| unsealed(5000), "5000 bytes"),
        (unsealed, "not sealed"),
        (
            |_| {
                custodian(100, 2)
                    .lend(latzero_shm::Access::Read)
                    .unwrap()
                    .try_clone()
                    .unwrap()
            },
            "generation",
        ),
    ];
    for (fd, expected) in checks {
        let (kind, text) = attach_with(Some(1), move || vec![fd(total)]);
        assert_eq!(kind, Code::Storage);
        assert!(
            text.contains("block 'b' can't be mapped") && text.contains(expected),
            "{text}"
        );
    }
    // One that allows more than was granted.
    let (_, text) = attach_with(Some(1), || {
        vec![custodian(100, 1).file().try_clone().unwrap()]
    });
    assert!(text.contains("access mode"), "{text}");
    // Announced as mapped, and none came: the reply is invalid.
    let (kind, _) = attach_with(None, Vec::new);
    assert_eq!(kind, Code::BadMessage);
}

#[test]
fn descriptors_that_are_refused_are_closed() {
    for announced in [None, Some(1), Some(2), Some(3)] {
        let (kept, sent): (Vec<_>, Vec<_>) = [(); 2]
            .map(|()| UnixStream::pair().unwrap())
            .into_iter()
            .unzip();
        let sent = Mutex::new(sent);
        attach_with(announced, move || {
            sent.lock().unwrap().drain(..).map(Into::into).collect()
        });
        for mut kept in kept {
            kept.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(kept.read(&mut [0]).unwrap(), 0, "{announced:?}");
        }
    }
}

#[test]
fn a_call_right_behind_the_acknowledgement_brings_its_block() {
    let special = |server: &BlockServer, peer: &mut Peer, message: &Value| {
        if message["action"] != "handshake" || message["triggers"] == json!([]) {
            return false;
        }
        // The reconnect lists the trigger, so the first call may come in one piece with the
        // acknowledgement.
        let mut hello = ack(message, 1, &json!({}));
        hello["features"] = json!(["attachments", "fd_passing"]);
        peer.send(&hello);
        server.block().write(0, b"early", None).unwrap();
        let call = json!({
            "action": "trigger", "id": "c1", "process": "t", "pool": "alpha",
            "origin": {"app_id": "x", "instance": "1"},
            "blocks": [server.describe("read")], "descriptors": 1, "data": null,
        });
        send(
            peer,
            &call,
            &[server
                .block()
                .lend(latzero_shm::Access::Read)
                .unwrap()
                .as_fd()],
        );
        while let Some((message, _)) = peer.read() {
            server.heard.lock().unwrap().push(message);
        }
        true
    };
    let (fake, server) = BlockServer::start(true, 5, Box::new(special));
    let app = connect(&fake);
    app.serve("t", |request| {
        assert_eq!(request.block_ids(), ["b"]);
        let block = request.block("b")?;
        assert!(block.is_mapped());
        assert_eq!(request.block("c").unwrap_err().kind(), Code::NoBlock);
        Ok(String::from_utf8(block.read()?.0)?)
    })
    .unwrap();
    fake.cut();
    server.wait_heard("response", 1);
    let heard = server.heard.lock().unwrap();
    let answer = heard.iter().find(|m| m["action"] == "response").unwrap();
    assert_eq!(answer["response"], "early", "{answer}");
    // It was lent: there is nothing to detach.
    assert!(heard.iter().all(|m| m["action"] != "memory_detach"));
}

#[test]
fn the_last_handle_of_a_block_detaches_it() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    let writer = app.block("b").create(10).send().unwrap();
    let reader = app.block("b").attach().unwrap();
    let clone = reader.clone();
    drop((writer, clone));
    app.ping().unwrap();
    assert_eq!(server.count("memory_detach"), 0);
    drop(reader);
    server.wait_heard("memory_detach", 1);
    app.ping().unwrap();
    assert_eq!(server.count("memory_detach"), 1);
}

#[test]
fn handles_of_a_block_share_one_subscription() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    let (one, two) = (
        app.block("b").attach().unwrap(),
        app.block("b").attach().unwrap(),
    );
    let (first, mut second) = (one.changes().unwrap(), two.changes().unwrap());
    drop(first);
    app.ping().unwrap();
    assert_eq!(server.count("memory_unsubscribe"), 0);
    for version in [3, 4, 9] {
        server.send_event(&json!({"event": "block_changed", "version": version}));
    }
    while second.recv_timeout(TIMEOUT).unwrap() != Some(9) {}
    drop(second);
    server.wait_heard("memory_unsubscribe", 1);
    let mut third = one.changes().unwrap();
    server.send_event(&json!({"event": "block_removed"}));
    while third.recv_timeout(TIMEOUT).unwrap().is_some() {}
}

#[test]
fn listing_readers_does_not_let_everybody_write() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    app.block("b")
        .create(10)
        .readable_by(&["x"])
        .send()
        .unwrap();
    app.block("b")
        .create(10)
        .writable_by(&["y"])
        .readable_by(&["x"])
        .send()
        .unwrap();
    app.block("b")
        .create(10)
        .writable_by(&["y"])
        .send()
        .unwrap();
    let heard = server.heard.lock().unwrap();
    let asked: Vec<_> = heard
        .iter()
        .filter(|m| m["action"] == "memory_create")
        .collect();
    assert_eq!(asked[0]["permissions"], json!({"read": ["x"], "write": []}));
    assert_eq!(
        asked[1]["permissions"],
        json!({"read": ["x"], "write": ["y"]})
    );
    assert_eq!(asked[2]["permissions"], json!({"write": ["y"]}));
}

#[test]
fn a_block_under_constant_writes_is_contended() {
    // Large enough for two reads, of which the second never has the first one's version; or never
    // the size that was told.
    for code in ["version_conflict", "out_of_range"] {
        let special = move |_: &BlockServer, peer: &mut Peer, message: &Value| {
            let is_it = message["action"] == "memory_read" && message["offset"] != 0;
            if is_it {
                peer.send(&refusal(message, code));
            }
            is_it
        };
        let (fake, _keeper) = BlockServer::start(false, 100_000, Box::new(special));
        let app = connect(&fake);
        let block = app.block("b").attach().unwrap();
        assert!(!block.is_mapped());
        assert_eq!(block.read().unwrap_err().kind(), Code::Contended);
    }
}

#[test]
fn a_draft_dropped_by_a_panic_is_never_visible() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    let block = app.block("b").create(10).send().unwrap();
    let panicked = std::thread::scope(|scope| {
        let handle = scope.spawn(|| {
            let mut draft = block.write(TIMEOUT).unwrap();
            draft.write(0, b"half").unwrap();
            panic!("on purpose");
        });
        handle.join()
    });
    assert!(panicked.is_err());
    server.wait_heard("memory_unlock", 1);
    assert_eq!((block.version(), server.block().version().unwrap()), (0, 0));
    let mut draft = block.write(TIMEOUT).unwrap();
    draft.write(0, b"whole").unwrap();
    assert_eq!(draft.commit().unwrap(), 1);
    assert_eq!(block.read().unwrap().0, b"whole\0\0\0\0\0");
}

#[test]
fn times_beyond_the_range_mean_forever() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    let block = app.block("b").create(10).send().unwrap();
    let held = block
        .lock_for(LockMode::Exclusive, Duration::MAX, Duration::MAX)
        .unwrap();
    held.renew(Some(Duration::MAX)).unwrap();
    drop(held);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| block.wait_for(0, Duration::MAX).unwrap());
        server.block().write(0, b"x", None).unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
    });
}

#[test]
fn a_wait_continues_on_the_replacement_block() {
    let (fake, server) = BlockServer::start(true, 10, as_it_is());
    let app = connect(&fake);
    let block = app.block("b").attach().unwrap();
    let old = server.block();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| block.wait_for(0, TIMEOUT).unwrap());
        // By the word in the header alone: no event is needed.
        let new = Arc::new(custodian(20, 2));
        *server.custodian.lock().unwrap() = new.clone();
        old.set_state(State::Superseded).unwrap();
        new.write(15, b"x", None).unwrap();
        assert_eq!(waiter.join().unwrap(), 1);
    });
    assert_eq!((block.size(), block.generation()), (20, 2));
    assert_eq!(
        block.view(|view| view.load::<u8>(15).unwrap()).unwrap(),
        b'x'
    );
}

#[test]
fn a_draft_shows_its_writer_the_next_version() {
    for is_mapped in [true, false] {
        let (fake, _keeper) = BlockServer::start(is_mapped, 10, as_it_is());
        let app = connect(&fake);
        let block = app.block("b").create(10).send().unwrap();
        block.write_at(0, b"0123456789").unwrap();
        let mut draft = block.write(TIMEOUT).unwrap();
        draft.write(0, b"ab").unwrap();
        draft.write(7, b"xyz").unwrap();
        draft.write(8, b"Y").unwrap();
        for (offset, expected) in [(0, &b"ab23456xYz"[..]), (1, b"b2"), (8, b"Yz"), (3, b"34")] {
            let mut bytes = vec![0; expected.len()];
            draft.read_into(offset, &mut bytes).unwrap();
            assert_eq!(bytes, expected, "{is_mapped} {offset}");
        }
        draft.abandon();
        assert_eq!(block.read().unwrap(), (b"0123456789".to_vec(), 1));
    }
}

#[test]
fn an_attach_that_nobody_waits_for_is_detached() {
    let special =
        |_: &BlockServer, _: &mut Peer, message: &Value| message["action"] == "memory_attach";
    let (fake, server) = BlockServer::start(true, 10, Box::new(special));
    let app = connect(&fake);
    {
        let mut attaching = pin!(app.as_async().block("b").attach());
        assert!(poll(attaching.as_mut()).is_pending());
        server.wait_heard("memory_attach", 1);
    }
    server.wait_heard("memory_detach", 1);
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn a_lock_granted_to_a_gone_client_is_released() {
    // The grant crosses the cancellation on its way.
    let asked = Mutex::new(None);
    let special =
        move |_: &BlockServer, peer: &mut Peer, message: &Value| match message["action"].as_str() {
            Some("memory_lock") => {
                *asked.lock().unwrap() = Some(message.clone());
                true
            }
            Some("cancel") => {
                let lock = asked.lock().unwrap().take().unwrap();
                assert_eq!(lock["id"], message["id"]);
                peer.reply(&lock, &json!({"lock": "7", "fence": 7}));
                true
            }
            _ => false,
        };
    let (fake, server) = BlockServer::start(true, 10, Box::new(special));
    let app = connect(&fake);
    let block = app.as_async().block("b");
    let block = app.block("b").attach().map(|_| block).unwrap();
    let mut attaching = pin!(block.attach_writable());
    let block = loop {
        if let Poll::Ready(block) = poll(attaching.as_mut()) {
            break block.unwrap();
        }
        std::thread::yield_now();
    };
    {
        let mut locking = pin!(block.lock(LockMode::Exclusive, TIMEOUT));
        assert!(poll(locking.as_mut()).is_pending());
        server.wait_heard("memory_lock", 1);
    }
    server.wait_heard("memory_unlock", 1);
    let heard = server.heard.lock().unwrap();
    let unlock = heard
        .iter()
        .find(|m| m["action"] == "memory_unlock")
        .unwrap();
    assert_eq!(unlock["lock"], "7");
}

#[test]
fn futures_wait_for_versions_and_see_changes() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for is_mapped in [true, false] {
        let (fake, server) = BlockServer::start(is_mapped, 10, as_it_is());
        runtime.block_on(async {
            let app = latzero::App::connect(&fake.url("me")).await.unwrap();
            let block = app.block("b").attach_writable().await.unwrap();
            assert_eq!(block.is_mapped(), is_mapped);
            let error = block
                .wait_for(0, Duration::from_millis(5))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), Code::Timeout);
            let (theirs, waiting) = (server.clone(), block.clone());
            let waiter = tokio::spawn(async move { waiting.wait_for(0, TIMEOUT).await });
            let writer = std::thread::spawn(move || {
                let version = theirs.block().write(0, b"x", None).unwrap();
                // Subscribed, or about to ask for the version.
                if !theirs.is_mapped {
                    theirs.wait_heard("memory_subscribe", 2);
                    theirs.send_event(&json!({"event": "block_changed", "version": version}));
                }
            });
            assert_eq!(waiter.await.unwrap().unwrap(), 1);
            writer.join().unwrap();
            let mut changes = block.changes().await.unwrap();
            server.send_event(&json!({"event": "block_changed", "version": 5}));
            assert_eq!(changes.recv().await, Some(5));
            assert_eq!(block.read().await.unwrap().0[0], b'x');
            drop(changes);
            let mut changes = block.changes().await.unwrap();
            app.close().await.unwrap();
            while changes.recv().await.is_some() {}
        });
    }
}

#[test]
fn a_reconnect_brings_versions_and_removals_that_were_missed() {
    let is_gone = Arc::new(AtomicBool::new(false));
    let gone = is_gone.clone();
    let special = move |_: &BlockServer, peer: &mut Peer, message: &Value| {
        let is_it = gone.load(Ordering::SeqCst) && message["action"] == "memory_attach";
        if is_it && !message["id"].is_null() {
            peer.send(&refusal(message, "no_block"));
        }
        is_it
    };
    let (fake, server) = BlockServer::start(true, 4, Box::new(special));
    let app = connect(&fake);
    let block = app.block("b").attach().unwrap();
    let mut changes = block.changes().unwrap();
    // Written while nobody could be told.
    server.block().write(0, b"miss", None).unwrap();
    fake.cut();
    assert_eq!(changes.recv_timeout(TIMEOUT).unwrap(), Some(1));
    assert!(block.is_live());
    is_gone.store(true, Ordering::SeqCst);
    fake.cut();
    assert_eq!(changes.recv_timeout(TIMEOUT).unwrap(), None);
    // What was mapped can still be read, and says what it is.
    assert_eq!(block.read().unwrap(), (b"miss".to_vec(), 1));
    assert!(!block.is_live());
    assert_eq!(
        block.writer(Duration::ZERO).unwrap_err().kind(),
        Code::NoBlock
    );
    // Offered once, to the server that did not have it.
    assert_eq!(server.count("memory_reoffer"), 1);
}

/// Reads a message, and how many descriptors came with its first byte.
fn read_with(stream: &UnixStream) -> Option<(Value, Vec<OwnedFd>)> {
    fn fill(stream: &UnixStream, mut to: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
        while !to.is_empty() {
            match recv_with_fds(stream, to, fds, 8).ok()? {
                0 => return None,
                n => to = &mut to[n..],
            }
        }
        Some(())
    }
    let (mut fds, mut others) = (Vec::new(), Vec::new());
    let mut prefix = [0; 4];
    fill(stream, &mut prefix[..1], &mut fds)?;
    fill(stream, &mut prefix[1..], &mut others)?;
    let mut text = vec![0; u32::from_be_bytes(prefix) as usize];
    fill(stream, &mut text, &mut others)?;
    assert!(
        others.is_empty(),
        "a descriptor came within a message, not with its begin"
    );
    Some((serde_json::from_slice(&text).unwrap(), fds))
}

/// Emits that wait in front of the offer, far more than a socket takes.
const EMITS: u64 = 500;

/// A server whose second life knows nothing of its block until it is offered. It says in `asked`
/// that it was asked for the block, and reads on when `go_on` says so.
fn forgetful(
    asked: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
    features: Value,
) -> (Fake, Arc<BlockServer>) {
    let lives = AtomicUsize::new(0);
    let gate = Mutex::new((asked, go_on));
    let special = move |server: &BlockServer, peer: &mut Peer, message: &Value| {
        if message["action"] != "handshake" || lives.fetch_add(1, Ordering::SeqCst) == 0 {
            return false;
        }
        let mut hello = ack(message, 1, &json!({}));
        hello["features"] = features.clone();
        peer.send(&hello);
        let Socket::Unix(stream) = peer.clone().socket else {
            panic!("it listens on a Unix socket");
        };
        let (mut is_there, mut emits) = (false, 0);
        while let Some((message, fds)) = read_with(&stream) {
            server.heard.lock().unwrap().push(message.clone());
            let action = message["action"].as_str().unwrap();
            assert_eq!(fds.len(), usize::from(action == "memory_reoffer"));
            match action {
                "memory_attach" if !message["id"].is_null() && !is_there => {
                    let (asked, go_on) = &*gate.lock().unwrap();
                    asked.send(()).unwrap();
                    go_on.recv().unwrap();
                    peer.send(&refusal(&message, "no_block"));
                }
                "memory_reoffer" => {
                    let id = |fd: BorrowedFd<'_>| {
                        let stat = rustix::fs::fstat(fd).unwrap();
                        (stat.st_dev, stat.st_ino)
                    };
                    let block = server.block();
                    assert_eq!(id(fds[0].as_fd()), id(block.file().as_fd()));
                    assert_eq!((&message["descriptors"], emits), (&json!(1), EMITS));
                    is_there = true;
                    peer.reply(&message, &json!({}));
                }
                "emit" => {
                    assert_eq!(message["data"]["n"], emits);
                    emits += 1;
                }
                _ => server.answer(peer, &message, None),
            }
        }
        true
    };
    BlockServer::start(true, 100, Box::new(special))
}

fn bulk(n: u64) -> Value {
    json!({"n": n, "text": "x".repeat(8000)})
}

#[test]
fn held_blocks_are_returned_to_a_restarted_server() {
    let (asked, was_asked) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (fake, server) = forgetful(asked, may_go_on, json!(["attachments", "fd_passing"]));
    let app = connect(&fake);
    let block = app.block("b").attach().unwrap();
    let mut changes = block.changes().unwrap();
    server.block().write(0, b"kept", None).unwrap();
    fake.cut();
    was_asked.recv_timeout(TIMEOUT).unwrap();
    for n in 0..EMITS {
        app.emit("news", &bulk(n)).send().unwrap();
    }
    go_on.send(()).unwrap();
    assert_eq!(changes.recv_timeout(TIMEOUT).unwrap(), Some(1));
    assert!(block.is_live());
    assert_eq!(&block.read().unwrap().0[..4], b"kept");
    // It is told of changes again, which could not be asked for before the block was there: first,
    // with its handle's first connection, then blindly, then for good.
    server.wait_heard("memory_subscribe", 3);
    app.emit("news", &bulk(EMITS)).send().unwrap();
    server.wait_heard("emit", EMITS as usize + 1);
    assert_eq!(server.count("memory_reoffer"), 1);
}

#[test]
fn descriptors_are_returned_in_an_async_runtime_too() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let (asked, was_asked) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (fake, server) = forgetful(asked, may_go_on, json!(["attachments", "fd_passing"]));
    runtime.block_on(async {
        let app = latzero::App::connect(&fake.url("me")).await.unwrap();
        let block = app.block("b").attach_writable().await.unwrap();
        let mut changes = block.changes().await.unwrap();
        server.block().write(0, b"kept", None).unwrap();
        fake.cut();
        was_asked.recv_timeout(TIMEOUT).unwrap();
        for n in 0..EMITS {
            app.emit("news", &bulk(n)).await.unwrap();
        }
        go_on.send(()).unwrap();
        assert_eq!(changes.recv().await, Some(1));
        assert_eq!(&block.read().await.unwrap().0[..4], b"kept");
        app.emit("news", &bulk(EMITS)).await.unwrap();
        server.wait_heard("emit", EMITS as usize + 1);
        assert_eq!(server.count("memory_reoffer"), 1);
    });
}

#[test]
fn mapped_memory_is_not_offered_without_descriptor_passing() {
    let (asked, was_asked) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (fake, server) = forgetful(asked, may_go_on, json!(["attachments"]));
    let app = connect(&fake);
    let block = app.block("b").attach().unwrap();
    let mut changes = block.changes().unwrap();
    fake.cut();
    was_asked.recv_timeout(TIMEOUT).unwrap();
    go_on.send(()).unwrap();
    assert_eq!(changes.recv_timeout(TIMEOUT).unwrap(), None);
    assert!(!block.is_live());
    assert_eq!(block.read().unwrap(), (vec![0; 100], 0));
    assert_eq!(server.count("memory_reoffer"), 0);
}
