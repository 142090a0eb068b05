//! Several IO threads: how the messages of one loop affect the connections of another.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use latzero_tests::{Server, TIMEOUT, Via, Wire};
use serde_json::{Value, json};

/// How long the crowd works.
const STRESS: Duration = Duration::from_secs(3);

/// xorshift64: the same run for the same seed, except for the timing of threads.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What became of a connection of the crowd.
#[derive(PartialEq)]
enum Fate {
    /// It continues.
    Lives,
    /// It ended for a valid reason: displaced, or dropped on purpose.
    Over,
}

/// One connection of the crowd: it makes calls and serves calls.
struct Client<'a> {
    wire: Wire,
    chance: &'a mut Chance,
    /// Its calls, and whether each has ended.
    calls: HashMap<String, bool>,
    is_displaced: bool,
    log: Vec<String>,
}

impl Client<'_> {
    /// Receives messages until each of its calls has ended.
    fn settle(&mut self) -> Fate {
        while self.calls.values().any(|ended| !ended) {
            let Some((message, _)) = self.wire.try_receive().expect("every call ends in time")
            else {
                assert!(
                    self.is_displaced,
                    "a connection ends for a reason: {:#?}",
                    self.log
                );
                return Fate::Over;
            };
            self.log.push(message.to_string());
            match message["action"].as_str().unwrap() {
                "trigger" => {
                    let id = &message["id"];
                    let answer = |status: &str| {
                        json!({"action": "response", "in_reply_to": id,
                        "status": status})
                    };
                    let answers = match self.chance.below(20) {
                        0 => return Fate::Over,
                        // The ttl ends it.
                        1 => vec![],
                        2..5 => vec![answer("partial"), answer("ok")],
                        5 => vec![answer("ok"), answer("ok")],
                        _ => vec![answer("ok")],
                    };
                    for answer in answers {
                        // A connection that was displaced in the meantime finds out when it reads.
                        let _ = self.wire.try_send(&answer);
                    }
                }
                "response" if message["status"] != "partial" => {
                    let id = message["in_reply_to"].as_str().unwrap();
                    let ended = self.calls.get_mut(id).expect("an answer to its own call");
                    assert!(!*ended, "a call ended twice: {message}");
                    *ended = true;
                }
                "event" => self.is_displaced |= message["event"] == "displaced",
                "handshake_ack" | "response" | "cancel" => {}
                other => panic!("not expected here: {other}"),
            }
        }
        Fate::Lives
    }
}

/// Connects, calls and disconnects until the time is over; returns how many of its calls ended.
fn crowd(server: &Server, seed: u64, until: Instant) -> usize {
    let mut chance = Chance(seed);
    let mut ended = 0;
    while Instant::now() < until {
        let via = [Via::Tcp, Via::Unix][chance.below(2) as usize];
        let mut wire = server.connect(via);
        // An AppID that is used over the Unix socket belongs to its user, and over TCP to nobody.
        let app = format!("{via:?}-app{}", chance.below(3));
        let handshake = json!({
            "action": "handshake", "app_id": app, "pools": ["p", "system"], "triggers": ["work"],
            "takeover": chance.one_in(8),
        });
        wire.send(&handshake);
        let mut client = Client {
            wire,
            chance: &mut chance,
            calls: HashMap::new(),
            is_displaced: false,
            log: vec![],
        };
        for round in 0..1 + client.chance.below(20) {
            client.calls.clear();
            for call in 0..1 + client.chance.below(12) {
                let id = format!("{round}.{call}");
                let (pool, process) = [("p", "work"), ("p", "work"), ("system", "echo")]
                    [client.chance.below(3) as usize];
                let ttl = 20 + client.chance.below(200);
                let trigger = json!({
                    "action": "trigger", "id": id, "pool": pool, "process": process, "ttl": ttl,
                    "data": call,
                });
                let _ = client.wire.try_send(&trigger);
                if client.chance.one_in(6) {
                    let _ = client.wire.try_send(&json!({"action": "cancel", "id": id}));
                }
                client.calls.insert(id, false);
            }
            if client.chance.one_in(20) || client.settle() == Fate::Over {
                break;
            }
            ended += client.calls.len();
        }
    }
    ended
}

fn figures(watch: &mut Wire) -> [Value; 4] {
    let stats = watch.request(json!({"action": "stats"}))["response"].take();
    [
        stats["transport"]["connections"].clone(),
        stats["transport"]["outbox_bytes"].clone(),
        stats["triggers"]["calls_in_flight"].clone(),
        stats["resources"]["descriptors"].clone(),
    ]
}

#[test]
fn every_call_of_reconnecting_clients_ends_once_and_leaves_nothing() {
    let server = Server::with(&["io_threads=4", "limits.in_flight_max=8"]);
    let mut watch = server.app(Via::Unix, json!({"app_id": "watch"}));
    let before = figures(&mut watch);
    let until = Instant::now() + STRESS;
    let ended: usize = std::thread::scope(|scope| {
        let server = &server;
        let crowd: Vec<_> = (1..=8u64)
            .map(|seed| scope.spawn(move || crowd(server, seed << 40 | 0x9e37_79b9, until)))
            .collect();
        crowd.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert!(ended > 100, "only {ended} calls ended");
    let end = Instant::now() + TIMEOUT;
    let mut after = figures(&mut watch);
    while after != before {
        assert!(Instant::now() < end, "{before:?} before, {after:?} after");
        after = figures(&mut watch);
    }
}

#[test]
fn the_built_in_app_answers_callers_on_every_loop_at_once() {
    let server = Server::with(&["io_threads=4"]);
    std::thread::scope(|scope| {
        for who in 0..8 {
            let server = &server;
            scope.spawn(move || {
                let mut caller = server.app(
                    Via::Unix,
                    json!({"app_id": format!("c{who}"),
                        "pools": ["system"]}),
                );
                for round in 0..300 {
                    for id in 0..4 {
                        caller.send(&json!({"action": "trigger", "id": format!("{id}"),
                            "process": "echo", "data": round}));
                    }
                    for id in 0..4 {
                        let reply = caller.receive();
                        assert_eq!(
                            (&reply["in_reply_to"], &reply["response"]),
                            (&json!(format!("{id}")), &json!(round))
                        );
                    }
                }
            });
        }
    });
}
