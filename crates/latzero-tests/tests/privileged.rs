//! Privileged triggers of an encrypted pool: only writers can reach them, whatever readers and the
//! server try.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use latzero::blocking::App;
use latzero::{Code, Error, HandlerError};
use latzero_tests::vault::{READ, WRITE, code, keys, member, prove, raw, vault};
use latzero_tests::{Server, TIMEOUT, Via, Wire, eventually};
use serde_json::{Value, json};

const SEALED: &str = "TFpFVgABAA";

fn register(wire: &mut Wire, spec: &Value) -> String {
    let request = json!({"action": "trigger_register", "triggers": [spec]});
    code(&wire.request(request)).to_owned()
}

fn emit(wire: &mut Wire, name: &str) -> String {
    let emit = json!({"action": "emit", "process": name, "pool": "vault", "data": SEALED});
    code(&wire.request(emit)).to_owned()
}

/// The code of a call that nobody answers: it fails at once, or its time ends.
fn call(wire: &mut Wire, name: &str) -> String {
    let call = json!({
        "action": "trigger", "process": name, "pool": "vault", "data": SEALED, "ttl": 1,
    });
    code(&wire.request(call)).to_owned()
}

fn shown(wire: &mut Wire, name: &str) -> Value {
    let info = wire.request(json!({"action": "pool_info", "pool": "vault"}));
    let triggers = info["response"]["triggers"].as_array().unwrap().clone();
    let found = triggers.into_iter().find(|t| t["name"] == name);
    found.unwrap_or_default()["privileged"].clone()
}

#[test]
fn the_server_passes_nothing_of_readers_to_a_privileged_trigger() {
    let (server, set) = vault();
    let [mut reader, mut writer, mut worker] = ["reader", "writer", "worker"].map(|app| {
        let mut wire = raw(&server, Via::Unix, app);
        let roles = if app == "reader" { READ } else { WRITE };
        prove(&mut wire, &server, &set, app, roles);
        wire
    });
    assert_eq!(register(&mut worker, &json!("plain")), "ok");
    let spec = json!({"name": "admin", "privileged": true});
    assert_eq!(register(&mut worker, &spec), "ok");
    assert_eq!(shown(&mut reader, "admin"), true);
    assert_eq!(shown(&mut reader, "plain"), Value::Null);
    assert_eq!(call(&mut reader, "admin"), "forbidden");
    assert_eq!(emit(&mut reader, "admin"), "forbidden");
    assert_eq!(call(&mut reader, "plain"), "timeout");
    assert_eq!(emit(&mut reader, "plain"), "ok");
    assert_eq!(call(&mut writer, "admin"), "timeout");
    assert_eq!(emit(&mut writer, "admin"), "ok");
    // One handler of several is enough, and the last one to go takes it along.
    assert_eq!(register(&mut writer, &json!("admin")), "ok");
    assert_eq!(call(&mut reader, "admin"), "forbidden");
    assert_eq!(register(&mut worker, &json!("admin")), "ok");
    assert_eq!(call(&mut reader, "admin"), "timeout");
    assert_eq!(register(&mut worker, &spec), "ok");
    assert_eq!(call(&mut reader, "admin"), "forbidden");
    drop(worker);
    drop(writer);
    // Nobody serves it: the server says so as soon as it has noticed.
    eventually(|| call(&mut reader, "admin") != "forbidden");
    assert_eq!(call(&mut reader, "admin"), "no_handler");
}

#[test]
fn a_reader_can_not_keep_other_readers_from_sending() {
    let (server, set) = vault();
    let mut wires = ["listener", "reader"].map(|app| raw(&server, Via::Unix, app));
    for (wire, app) in wires.iter_mut().zip(["listener", "reader"]) {
        prove(wire, &server, &set, app, READ);
    }
    let [listener, reader] = &mut wires;
    let spec = json!({"name": "news", "concurrency": 0, "privileged": true});
    assert_eq!(register(listener, &spec), "ok");
    assert_eq!(shown(reader, "news"), Value::Null);
    assert_eq!(emit(reader, "news"), "ok");
    assert_eq!(listener.receive()["process"], "news");
    // As a writer it can.
    prove(listener, &server, &set, "listener", WRITE);
    assert_eq!(shown(reader, "news"), true);
    assert_eq!(emit(reader, "news"), "forbidden");
    prove(listener, &server, &set, "listener", READ);
    assert_eq!(emit(reader, "news"), "ok");
}

#[test]
fn it_is_served_only_in_encrypted_pools_and_comes_back_as_it_was() {
    let (mut server, set) = vault();
    let mut worker = server.app(Via::Unix, json!({"app_id": "worker", "pools": ["open"]}));
    prove(&mut worker, &server, &set, "worker", WRITE);
    let named = json!({"name": "admin", "privileged": true, "pools": ["open"]});
    assert_eq!(register(&mut worker, &named), "bad_message");
    let everywhere = json!({"name": "admin", "privileged": true});
    assert_eq!(register(&mut worker, &everywhere), "ok");
    let mut caller = server.app(Via::Unix, json!({"app_id": "caller", "pools": ["open"]}));
    let plain = json!({"action": "trigger", "process": "admin", "pool": "open", "data": 1});
    assert_eq!(code(&caller.request(plain)), "no_handler");
    assert_eq!(shown(&mut worker, "admin"), true);
    let wrong = json!({"name": "admin", "privileged": "yes"});
    assert_eq!(register(&mut worker, &wrong), "bad_message");
    server.kill();
    server.restart();
    let mut worker = server.connect(Via::Unix);
    worker.send(&json!({"action": "handshake", "app_id": "worker"}));
    assert_eq!(worker.receive()["rehydrated"], true);
    prove(&mut worker, &server, &set, "worker", WRITE);
    assert_eq!(shown(&mut worker, "admin"), true);
    let mut reader = raw(&server, Via::Unix, "reader");
    prove(&mut reader, &server, &set, "reader", READ);
    assert_eq!(call(&mut reader, "admin"), "forbidden");
}

/// A member that serves `admin` as privileged, and counts what its handler saw.
fn guarded(server: &Server, set: &latzero_crypto::keys::KeySet) -> (App, Arc<AtomicU64>) {
    let worker = member(server, "worker", keys(set, WRITE));
    let runs = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&runs);
    let serving = worker.handler("admin").privileged();
    let served = serving.serve(move |request| {
        count.fetch_add(1, Ordering::SeqCst);
        for item in 0..2 {
            let _ = request.partial(&item);
        }
        request.data::<Value>()
    });
    served.unwrap();
    (worker, runs)
}

#[test]
fn members_with_the_seal_use_it_as_any_trigger() {
    let (server, set) = vault();
    let (_worker, runs) = guarded(&server, &set);
    let writer = member(&server, "writer", keys(&set, WRITE));
    let call = || writer.call("admin", &7).privileged();
    assert_eq!(call().send::<u64>().unwrap(), 7);
    assert_eq!(call().redeliver().send::<u64>().unwrap(), 7);
    assert_eq!(call().park().send::<u64>().unwrap(), 7);
    for _ in 0..2 {
        assert_eq!(call().idempotency_key("k").send::<u64>().unwrap(), 7);
    }
    let items: Vec<u64> = call().stream().map(Result::unwrap).collect();
    assert_eq!(items, [0, 1]);
    let delivered = writer.emit("admin", &7).privileged().counted();
    assert_eq!(delivered.unwrap(), 1);
    // A signed message may also go to an ordinary trigger.
    let echo = |request: latzero::blocking::Request| request.data::<u64>();
    writer.serve("echo", echo).unwrap();
    assert_eq!(
        writer.call("echo", &8).privileged().send::<u64>().unwrap(),
        8
    );
    assert!(runs.load(Ordering::SeqCst) >= 5);
}

#[test]
fn what_is_not_signed_is_refused_by_whoever_can_tell() {
    let (server, set) = vault();
    let (_worker, runs) = guarded(&server, &set);
    let writer = member(&server, "writer", keys(&set, WRITE));
    let reader = member(&server, "reader", keys(&set, READ));
    let kind = |result: Result<Value, Error>| {
        let error = result.unwrap_err();
        (error.kind(), error.is_authenticated())
    };
    // The handler's own word: the writer forgot to sign, which the server can't see.
    assert_eq!(
        kind(writer.call("admin", &1).send()),
        (Code::Forbidden, true)
    );
    let parked = writer.call("admin", &1).park().send();
    assert_eq!(kind(parked), (Code::Forbidden, true));
    // The server's, for members that can't sign.
    assert_eq!(
        kind(reader.call("admin", &1).send()),
        (Code::Forbidden, false)
    );
    // The client's, before anything is sent.
    let error = reader.call("admin", &1).privileged().send::<Value>();
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Code::Forbidden);
    assert!(error.message().contains("OblivionSeal"), "{error}");
    let error = reader.emit("admin", &1).privileged().send().unwrap_err();
    assert_eq!(error.kind(), Code::Forbidden);
    let builder = latzero_tests::vault::builder(&server, "plain");
    let plain = App::connect_with(builder).unwrap();
    let calls = [plain.call("t", &1), plain.call("t", &1).raw_bytes(vec![1])];
    for call in calls {
        let error = call.privileged().send::<Value>().unwrap_err();
        assert_eq!(error.kind(), Code::BadMessage);
    }
    // An emit that is not signed is dropped; the next one shows that nothing else was.
    writer.emit("admin", &1).send().unwrap();
    let signed = writer.call("admin", &2).privileged().send::<u64>();
    assert_eq!(signed.unwrap(), 2);
    assert_eq!(runs.load(Ordering::SeqCst), 1);
}

/// It was accepted when nobody served the trigger: its caller learns that it will not run.
#[test]
fn a_parked_call_of_a_reader_ends_when_a_privileged_handler_comes() {
    let (server, set) = vault();
    let reader = member(&server, "reader", keys(&set, READ));
    let call = reader.call("admin", &1).timeout(Duration::from_secs(60));
    let parked = call.send_parked().unwrap();
    let (_worker, runs) = guarded(&server, &set);
    let error = parked.answer::<Value>().unwrap_err();
    assert_eq!(
        (error.kind(), error.is_authenticated()),
        (Code::Forbidden, true)
    );
    assert_eq!(runs.load(Ordering::SeqCst), 0);
}

/// A listener that takes only emits may be privileged too.
#[test]
fn signed_emits_reach_privileged_listeners() {
    let (server, set) = vault();
    let reader = member(&server, "reader", keys(&set, READ));
    let (heard, hears) = std::sync::mpsc::channel();
    let listening = reader.handler("news").concurrency(0).privileged();
    let listening = listening.serve(move |request| {
        let _ = heard.send(request.data::<u64>()?);
        Ok::<_, HandlerError>(())
    });
    listening.unwrap();
    let writer = member(&server, "writer", keys(&set, WRITE));
    writer.emit("news", &1).send().unwrap();
    writer.emit("news", &2).privileged().send().unwrap();
    assert_eq!(hears.recv_timeout(TIMEOUT).unwrap(), 2);
}
