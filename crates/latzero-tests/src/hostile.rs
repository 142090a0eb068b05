//! Hostile clients that try to exhaust the server, one kind at a time, and a well-behaved client
//! next to them.
//!
//! The tests check memory and results under each kind; `cargo xtask hostile` measures how long the
//! well-behaved client waits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use latzero_protocol::frame;
use serde_json::{Value, json};

use crate::{Server, Via, Wire};

/// The setting that the server has for every kind.
pub const MEMORY_MAX: &str = "limits.memory_max=256MiB";

/// The most resident memory that the server may have under it: the limit and 64 MiB.
pub const RESIDENT_MAX: u64 = (256 + 64) << 20;

/// How long a hostile client waits for a server that does not read from it, or does not answer.
const TIMEOUT: Duration = Duration::from_millis(400);

const MIB: usize = 1 << 20;

/// One kind of hostile client.
#[derive(Clone, Copy)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// Attacks once; the connections stay open until they are dropped.
    pub attack: fn(&Server) -> Vec<Wire>,
    /// Whether the server's own memory accounting is compared with the kernel's.
    pub is_compared: bool,
}

const fn compared(name: &'static str, attack: fn(&Server) -> Vec<Wire>) -> Kind {
    Kind {
        name,
        attack,
        is_compared: true,
    }
}

const fn other(name: &'static str, attack: fn(&Server) -> Vec<Wire>) -> Kind {
    Kind {
        name,
        attack,
        is_compared: false,
    }
}

/// All kinds.
pub const KINDS: &[Kind] = &[
    compared("large emit to silent readers", large_emit),
    compared("small events to silent readers", small_events),
    compared("unfinished frames", unfinished_frames),
    compared("bodies kept for redelivery", redelivery),
    compared("answers kept for repeats", kept_answers),
    compared("triggers times pools", triggers_times_pools),
    // Rows that are being written to the disk leave holes in the heap, which the accounting can't
    // see.
    other("parked calls under many names", parked_calls),
    compared("registrations under many names", many_names),
    compared("calls that are never answered", never_answered),
    compared("waits for locks, and cancels", lock_waits),
    compared("descriptors that are not read", unread_descriptors),
    other("long lists", long_lists),
    other("flood of pings", ping_flood),
    other("half-written blocks", half_written),
    other("connections, pools and blocks", everything),
];

/// Encodes a message as a frame.
#[must_use]
pub fn framed(json: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len() + 4);
    frame::append(&mut out, |out| out.extend_from_slice(json.as_bytes()));
    out
}

/// Connects an app over TCP; `None` if the server refuses it.
fn stranger(server: &Server, app: &str, more: &Value) -> Option<Wire> {
    enter(server, Via::Tcp, app, more)
}

fn enter(server: &Server, via: Via, app: &str, more: &Value) -> Option<Wire> {
    let mut wire = server.try_connect(via).ok()?;
    wire.set_timeout(TIMEOUT);
    let mut handshake = more.clone();
    handshake["action"] = "handshake".into();
    handshake["app_id"] = app.into();
    wire.try_send(&handshake).ok()?;
    let (ack, _) = wire.try_receive().ok()??;
    (ack["status"] == "ok").then_some(wire)
}

/// Sends until the server accepts nothing more.
fn flood(wire: &mut Wire, frames: impl Iterator<Item = Vec<u8>>) {
    for frame in frames {
        if wire.try_send_bytes(&frame).is_err() {
            return;
        }
    }
}

/// Reads until nothing arrives within the timeout.
fn drain(wire: &mut Wire) {
    while let Ok(Some(_)) = wire.try_receive() {}
}

/// Sends a request and waits for its reply, until the timeout.
fn ask(wire: &mut Wire, mut message: Value) -> Option<Value> {
    message["id"] = "ask".into();
    wire.try_send(&message).ok()?;
    loop {
        let (reply, _) = wire.try_receive().ok()??;
        if reply["in_reply_to"] == "ask" {
            return Some(reply);
        }
    }
}

fn readers(server: &Server, count: usize) -> Vec<Wire> {
    let serve = json!({"transient": true, "triggers": [{"name": "news", "concurrency": 0}]});
    let readers = (0..count).filter_map(|n| stranger(server, &format!("reader{n}"), &serve));
    readers.collect()
}

fn large_emit(server: &Server) -> Vec<Wire> {
    let mut held = readers(server, 40);
    if let Some(mut sender) = stranger(server, "sender", &json!({"transient": true})) {
        let text = "x".repeat(15 * MIB);
        let emit = framed(&format!(
            r#"{{"action":"emit","process":"news","data":"{text}"}}"#
        ));
        flood(&mut sender, std::iter::once(emit));
        ask(&mut sender, json!({"action": "ping"}));
        held.push(sender);
    }
    held
}

fn small_events(server: &Server) -> Vec<Wire> {
    let mut held = readers(server, 20);
    if let Some(mut sender) = stranger(server, "sender", &json!({"transient": true})) {
        let text = "x".repeat(100_000);
        let emit = framed(&format!(
            r#"{{"action":"emit","process":"news","data":"{text}"}}"#
        ));
        flood(&mut sender, std::iter::repeat_n(emit, 1000));
        ask(&mut sender, json!({"action": "ping"}));
        held.push(sender);
    }
    held
}

fn unfinished_frames(server: &Server) -> Vec<Wire> {
    let mut part = u32::to_be_bytes(16 * MIB as u32 - 1).to_vec();
    part.extend_from_slice(br#"{"action":"emit","data":""#);
    part.resize(15 * MIB, b'x');
    let mut held = Vec::new();
    for n in 0..24 {
        if let Some(mut wire) = stranger(server, &format!("sender{}", n % 4), &json!({})) {
            flood(&mut wire, std::iter::once(part.clone()));
            held.push(wire);
        }
    }
    held
}

fn redelivery(server: &Server) -> Vec<Wire> {
    let worker = stranger(server, "worker", &json!({"triggers": ["job"]}));
    let caller = stranger(server, "caller", &json!({}));
    let (Some(mut worker), Some(mut caller)) = (worker, caller) else {
        return Vec::new();
    };
    let text = "x".repeat(7 * MIB);
    std::thread::scope(|scope| {
        scope.spawn(|| drain(&mut worker));
        let call = |n: usize| {
            framed(&format!(
                r#"{{"action":"trigger","id":"{n}","process":"job","redeliver":true,"data":"{text}"}}"#
            ))
        };
        flood(&mut caller, (0..60).map(call));
    });
    vec![worker, caller]
}

fn kept_answers(server: &Server) -> Vec<Wire> {
    let pools: Vec<String> = (0..30).map(|n| format!("pool{n}")).collect();
    let more = json!({"pools": pools, "triggers": ["job"], "features": ["attachments"]});
    let worker = stranger(server, "worker", &more);
    let caller = stranger(
        server,
        "caller",
        &json!({"pools": pools, "features": ["attachments"]}),
    );
    let (Some(mut worker), Some(mut caller)) = (worker, caller) else {
        return Vec::new();
    };
    let answer = vec![b'z'; 15 * MIB];
    for pool in &pools {
        let call = json!({"action": "trigger", "id": pool, "process": "job", "pool": pool,
            "headers": {"idempotency-key": "k"}});
        let Ok(()) = caller.try_send(&call) else {
            break;
        };
        let Ok(Some((call, _))) = worker.try_receive() else {
            break;
        };
        let head = json!({"action": "response", "in_reply_to": call["id"], "status": "ok"});
        if worker.try_send_attachment(&head, &answer).is_err() {
            break;
        }
        let Ok(Some(_)) = caller.try_receive() else {
            break;
        };
    }
    vec![worker, caller]
}

fn triggers_times_pools(server: &Server) -> Vec<Wire> {
    let names = |letter: char, count: usize| -> Vec<String> {
        (0..count).map(|n| format!("{letter}{n:x}")).collect()
    };
    let products = [(256, 1024), (256, 16), (64, 64), (4, 1024)];
    let clients = (0..20).filter_map(|n| {
        let (pools, triggers) = products[n % products.len()];
        let more = json!({"transient": true, "pools": names('p', pools), "triggers": names('t',
            triggers)});
        stranger(server, &format!("service{n}"), &more)
    });
    clients.collect()
}

fn parked_calls(server: &Server) -> Vec<Wire> {
    let text = "x".repeat(4000);
    let clients = (0..50).filter_map(|n| {
        let mut wire = stranger(server, &format!("parker{n}"), &json!({"transient": true}))?;
        let call = |id: usize| {
            framed(&format!(
                r#"{{"action":"trigger","id":"{id}","process":"never","park":true,"ttl":2592000000,"data":"{text}"}}"#
            ))
        };
        // Each call is acknowledged once it is on the disk.
        wire.set_timeout(crate::TIMEOUT);
        flood(&mut wire, (0..800).map(call));
        ask(&mut wire, json!({"action": "ping"}));
        Some(wire)
    });
    clients.collect()
}

fn many_names(server: &Server) -> Vec<Wire> {
    let doc = "d".repeat(1000);
    let triggers: Vec<Value> = (0..200)
        .map(|n| json!({"name": format!("t{n}"), "doc": doc}))
        .collect();
    for n in 0..700 {
        let Some(mut wire) = stranger(server, &format!("name{n}"), &json!({"pools": ["p"]})) else {
            continue;
        };
        ask(
            &mut wire,
            json!({"action": "trigger_register", "triggers": triggers}),
        );
    }
    Vec::new()
}

fn never_answered(server: &Server) -> Vec<Wire> {
    let mut held = Vec::new();
    held.extend(stranger(
        server,
        "silent",
        &json!({"triggers": [{"name": "hole", "concurrency": 1_000_000}]}),
    ));
    for n in 0..16 {
        let Some(mut caller) = stranger(server, &format!("caller{n}"), &json!({})) else {
            continue;
        };
        let call = |id: usize| {
            framed(&format!(
                r#"{{"action":"trigger","id":"{id}","process":"hole","headers":{{"idempotency-key":"{id}"}}}}"#
            ))
        };
        flood(&mut caller, (0..3000).map(call));
        held.push(caller);
    }
    held
}

fn lock_waits(server: &Server) -> Vec<Wire> {
    let Some(mut holder) = stranger(server, "holder", &json!({"pools": ["p"]})) else {
        return Vec::new();
    };
    for n in 0..200 {
        for action in ["memory_create", "memory_lock"] {
            ask(
                &mut holder,
                json!({"action": action, "block_id": format!("b{n}"), "size": 1}),
            );
        }
    }
    let mut held = vec![holder];
    for n in 0..4 {
        let Some(mut waiter) = stranger(server, &format!("waiter{n}"), &json!({"pools": ["p"]}))
        else {
            continue;
        };
        std::thread::scope(|scope| {
            let mut reader = waiter.reader();
            scope.spawn(move || drain(&mut reader));
            let wait = |k: usize| {
                let block = k % 200;
                framed(&format!(
                    r#"{{"action":"memory_lock","id":"{k}","block_id":"b{block}","wait":600000}}"#
                ))
            };
            flood(&mut waiter, (0..10_000).map(wait));
            let cancel = |k: usize| framed(&format!(r#"{{"action":"cancel","id":"{}"}}"#, k * 2));
            flood(&mut waiter, (0..1500).map(cancel));
        });
        held.push(waiter);
    }
    held
}

fn unread_descriptors(server: &Server) -> Vec<Wire> {
    let more = json!({"pools": ["p"], "features": ["attachments", "fd_passing"]});
    let clients = (0..8).filter_map(|n| {
        let mut wire = enter(server, Via::Unix, &format!("mapper{n}"), &more)?;
        let block = format!("d{n}");
        let create = json!({"action": "memory_create", "block_id": block, "size": 65536,
            "if_exists": "attach"});
        ask(&mut wire, create);
        let attach = framed(&format!(
            r#"{{"action":"memory_attach","id":"a","block_id":"{block}","mode":"read"}}"#
        ));
        flood(&mut wire, std::iter::repeat_n(attach, 20_000));
        Some(wire)
    });
    clients.collect()
}

fn long_lists(server: &Server) -> Vec<Wire> {
    for name in ["60000", "3000000"] {
        let Some(mut wire) = stranger(server, "lister", &json!({"transient": true})) else {
            continue;
        };
        let count: usize = name.parse().expect("these are numbers");
        let mut json = String::from(r#"{"action":"trigger_register","id":"1","triggers":["#);
        for n in 0..count {
            json.push_str(if n == 0 { "\"aa\"" } else { ",\"aa\"" });
        }
        json.push_str("]}");
        flood(&mut wire, std::iter::once(framed(&json)));
        drain(&mut wire);
    }
    let Some(mut wire) = stranger(server, "reader", &json!({"transient": true})) else {
        return Vec::new();
    };
    let list = framed(r#"{"action":"app_list"}"#);
    flood(&mut wire, std::iter::repeat_n(list, 400));
    let list = framed(r#"{"action":"app_list","id":"1"}"#);
    flood(&mut wire, std::iter::repeat_n(list, 20));
    drain(&mut wire);
    vec![wire]
}

fn ping_flood(server: &Server) -> Vec<Wire> {
    let Some(mut wire) = stranger(server, "flooder", &json!({"transient": true})) else {
        return Vec::new();
    };
    let pings = framed(r#"{"action":"ping","id":"p"}"#).repeat(1000);
    std::thread::scope(|scope| {
        let mut reader = wire.reader();
        scope.spawn(move || reader.discard());
        flood(&mut wire, std::iter::repeat_n(pings, 200));
    });
    vec![wire]
}

/// Leaves the newest version of a block as a writer does that dies in the middle of it.
fn half_write(block: &File) -> io::Result<()> {
    let word = |at: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        block.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let slot = word(128)? & 255;
    let at = 512 + 128 * slot;
    block.write_all_at(&(word(at)? | 1).to_le_bytes(), at)
}

fn half_written(server: &Server) -> Vec<Wire> {
    let more = json!({"pools": ["p"], "features": ["attachments", "fd_passing"]});
    let writer = enter(server, Via::Unix, "writer", &more);
    let reader = stranger(server, "reader", &json!({"pools": ["p"]}));
    let (Some(mut writer), Some(mut reader)) = (writer, reader) else {
        return Vec::new();
    };
    let create = json!({"action": "memory_create", "block_id": "frame", "size": 4096,
        "if_exists": "attach"});
    ask(&mut writer, create);
    ask(
        &mut writer,
        json!({"action": "memory_write", "block_id": "frame", "data": "AAAA"}),
    );
    for fd in writer.take_descriptors() {
        // A read-only descriptor can't damage the block, so this kind is harmless then.
        let _ = half_write(&File::from(fd));
    }
    let read = framed(r#"{"action":"memory_read","id":"r","block_id":"frame"}"#);
    flood(&mut reader, std::iter::repeat_n(read, 200));
    drain(&mut reader);
    vec![writer, reader]
}

fn everything(server: &Server) -> Vec<Wire> {
    let mut held: Vec<Wire> = (0..600)
        .map_while(|n| {
            stranger(
                server,
                &format!("one{}", n % 7),
                &json!({"transient": true}),
            )
        })
        .collect();
    if let Some(mut wire) = stranger(server, "greedy", &json!({"pools": ["p"]})) {
        let pools =
            (0..10_100).map(|n| framed(&format!(r#"{{"action":"pool_create","pool":"pool{n}"}}"#)));
        flood(&mut wire, pools);
        for size in [64, 32, 16, 8, 4, 2, 1] {
            let create = json!({"action": "memory_create", "pool": "p",
                "block_id": format!("b{size}"), "size": size * MIB});
            ask(&mut wire, create);
        }
        held.push(wire);
    }
    held
}

/// A well-behaved caller and handler that run as the server's own user.
pub struct Innocent {
    caller: Wire,
    handler: Wire,
}

impl Innocent {
    /// Connects both.
    #[must_use]
    pub fn new(server: &Server) -> Innocent {
        Innocent {
            handler: server.app(
                Via::Unix,
                json!({"app_id": "innocent-handler", "triggers": ["polite"], "transient": true}),
            ),
            caller: server.app(Via::Unix, json!({"app_id": "innocent", "transient": true})),
        }
    }

    /// Makes a call, waits for its answer, and returns how long that took.
    ///
    /// # Panics
    /// If it is not answered.
    pub fn call(&mut self) -> Duration {
        let began = Instant::now();
        self.caller.send(
            &json!({"action": "trigger", "id": "polite", "process": "polite", "data": "hello"}),
        );
        let call = self.handler.receive();
        self.handler.send(
            &json!({"action": "response", "in_reply_to": call["id"], "status": "ok",
                "response": call["data"]}),
        );
        let answer = self.caller.receive();
        assert_eq!(
            (&answer["status"], &answer["response"]),
            (&json!("ok"), &json!("hello")),
            "{answer}"
        );
        began.elapsed()
    }

    /// What the server accounts for: all memory, and how much of it is in blocks, which other
    /// processes may hold.
    pub fn books(&mut self) -> (u64, u64) {
        let stats = self.caller.request(json!({"action": "stats"}));
        let ledger = &stats["response"]["ledger"];
        let bytes = |name: &str| ledger[name].as_u64().unwrap_or(0);
        (bytes("memory_bytes"), bytes("shared_block_bytes"))
    }
}

/// A field of `/proc/PID/status`, in bytes.
fn status(server: &Server, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", server.pid()));
    let text = text.expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.trim_start_matches(':').trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .expect("the kernel says so")
        * 1024
}

/// The server's resident memory, in bytes.
#[must_use]
pub fn resident(server: &Server) -> u64 {
    status(server, "VmRSS")
}

/// The peak of the server's resident memory, in bytes.
#[must_use]
pub fn resident_peak(server: &Server) -> u64 {
    status(server, "VmHWM")
}
