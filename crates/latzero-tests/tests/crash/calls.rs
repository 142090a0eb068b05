//! Parked calls between a caller process and a handler process, and a record of what was
//! acknowledged and answered.

use std::collections::BTreeMap;
use std::sync::Mutex;

use latzero_tests::site::{ControlledProcess, Daemon};
use serde_json::{Value, json};

use crate::random::Random;
use crate::round::Round;

/// The client process.
const CLIENT: &str = env!("CARGO_BIN_EXE_latzero-test-client");

/// Calls during one life of the server.
const CALLS: u64 = 20;

/// What is known about one call.
#[derive(Debug, Default, Clone)]
struct Call {
    is_acknowledged: bool,
    is_refused: bool,
    /// The lives of the server in which it was answered.
    answered: Vec<u64>,
    /// Its answer may have been delivered to a caller that was killed.
    may_be_lost: bool,
}

/// Every call of all lives of the server.
#[derive(Default)]
pub(crate) struct Calls {
    book: Mutex<BTreeMap<u64, Call>>,
    life: u64,
}

impl Calls {
    fn with<R>(&self, n: u64, look: impl FnOnce(&mut Call) -> R) -> R {
        let mut book = self
            .book
            .lock()
            .unwrap_or_else(|_| panic!("the other side failed"));
        look(book.entry(n).or_default())
    }

    /// Records that another server starts.
    pub(crate) fn new_life(&mut self) {
        self.life += 1;
    }

    pub(crate) fn counts(&self) -> (usize, usize) {
        let book = self
            .book
            .lock()
            .unwrap_or_else(|_| panic!("the other side failed"));
        let acknowledged = book.values().filter(|call| call.is_acknowledged).count();
        (
            acknowledged,
            book.values().map(|call| call.answered.len()).sum(),
        )
    }

    /// Records a line that the caller received.
    fn note(&self, line: &str) {
        let message: Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("not a message: {line}"));
        let id = message["in_reply_to"].as_str().unwrap_or_default();
        let Some(n) = id.strip_prefix('c').and_then(|n| n.parse().ok()) else {
            return;
        };
        let life = self.life;
        self.with(n, |call| {
            assert!(!call.is_refused, "call {n} was refused, then: {message}");
            let code = message["error"]["code"].as_str();
            if message["status"] == "parked" {
                assert!(!call.is_acknowledged, "call {n} is parked twice");
                call.is_acknowledged = true;
            } else if matches!(
                code,
                Some("storage" | "overloaded" | "bad_message" | "draining")
            ) {
                call.is_refused = true;
                assert!(
                    !call.is_acknowledged,
                    "call {n} was parked, then: {message}"
                );
            } else {
                let is_expected = message["status"] == "ok" && message["response"] == n
                    || matches!(code, Some("handler_gone" | "attempts_exhausted"));
                assert!(is_expected, "call {n}: {message}");
                assert!(
                    call.answered.last() != Some(&life),
                    "call {n} is answered twice: {call:?}"
                );
                call.answered.push(life);
            }
        });
    }

    /// Parks calls; sometimes the caller is killed and replaced.
    pub(crate) fn call(&self, round: &Round<'_>, mut random: Random) {
        let Some(mut caller) = come(
            round.server,
            &json!({"app_id": "caller", "pools": ["base"]}),
        ) else {
            return;
        };
        let mut is_over = false;
        for n in self.life * 1000..self.life * 1000 + CALLS {
            round.step();
            if random.one_in(12) {
                caller.kill();
                self.take_all(&mut caller);
                let mut book = self
                    .book
                    .lock()
                    .unwrap_or_else(|_| panic!("the other side failed"));
                book.values_mut().for_each(|call| call.may_be_lost = true);
                drop(book);
                match come(round.server, &json!({"app_id": "caller"})) {
                    Some(process) => caller = process,
                    None => return,
                }
            }
            self.with(n, |_| ());
            let trigger = json!({"action": "trigger", "id": format!("c{n}"), "process": "job",
                "pool": "base", "park": true,
                "ttl": 3_600_000, "redeliver": random.one_in(2), "data": n});
            if !caller.try_send(&trigger) {
                is_over = true;
                break;
            }
            while let Some(line) = caller.line_so_far() {
                self.note(&line);
            }
        }
        if !is_over {
            round.done();
        }
        self.take_all(&mut caller);
    }

    fn take_all(&self, caller: &mut ControlledProcess) {
        while let Some(line) = caller.line() {
            self.note(&line);
        }
    }

    /// Answers some calls; sometimes the handler is killed and replaced.
    pub(crate) fn handle(&self, round: &Round<'_>, mut random: Random) {
        let handshake = json!({"app_id": "handler", "pools": ["base"], "triggers": ["job"]});
        loop {
            let Some(mut handler) = come(round.server, &handshake) else {
                return;
            };
            let mut held = Vec::new();
            let mut newest = None;
            loop {
                let Some(line) = handler.line() else {
                    return;
                };
                let call = self.given(&line, &mut newest);
                if call["action"] != "trigger" {
                    continue;
                }
                match random.below(10) {
                    0..=5 => answer(&mut handler, &call),
                    6 | 7 => held.push(call),
                    8 => held.drain(..).for_each(|call| answer(&mut handler, &call)),
                    _ => {
                        handler.kill();
                        break;
                    }
                }
            }
        }
    }

    /// Checks and records a line that the handler received: it must not be a refused call, and
    /// first attempts arrive in the order of the calls.
    fn given(&self, line: &str, newest: &mut Option<u64>) -> Value {
        let message: Value =
            serde_json::from_str(line).unwrap_or_else(|_| panic!("not a message: {line}"));
        if message["action"] == "trigger" {
            let n = message["data"]
                .as_u64()
                .unwrap_or_else(|| panic!("{message}"));
            let is_refused = self.with(n, |call| call.is_refused);
            assert!(!is_refused, "call {n} was refused but delivered");
            if message["attempt"] == 1 {
                assert!(
                    newest.is_none_or(|newest| newest < n),
                    "call {n} comes after {newest:?}"
                );
                *newest = Some(n);
            }
        }
        message
    }

    /// Finally, both sides are connected: every acknowledged call gets an answer.
    pub(crate) fn settle(&self, server: &Daemon) {
        let left = || {
            let book = self
                .book
                .lock()
                .unwrap_or_else(|_| panic!("the other side failed"));
            let open = book.iter().filter(|(_, call)| {
                call.is_acknowledged && call.answered.is_empty() && !call.may_be_lost
            });
            open.map(|(n, _)| *n).collect::<Vec<_>>()
        };
        let here = || panic!("the server listens");
        let mut caller =
            come(server, &json!({"app_id": "caller", "pools": ["base"]})).unwrap_or_else(here);
        let handshake = json!({"app_id": "handler", "pools": ["base"], "triggers": ["job"]});
        let mut handler = come(server, &handshake).unwrap_or_else(here);
        std::thread::scope(|scope| {
            let pid = handler.pid();
            let handling = scope.spawn(move || {
                let mut newest = None;
                while let Some(line) = handler.line() {
                    let call = self.given(&line, &mut newest);
                    if call["action"] == "trigger" {
                        answer(&mut handler, &call);
                    }
                    if call["in_reply_to"] == "end" {
                        break;
                    }
                }
                pid
            });
            // This call is queued behind all others: when it is answered, they have been answered
            // too.
            let mut n = self.life * 1000 + 900;
            loop {
                caller.send(
                    &json!({"action": "trigger", "id": format!("c{n}"), "process": "job",
                    "pool": "base", "park": true, "data": n}),
                );
                while self.with(n, |call| call.answered.is_empty()) {
                    let line = caller
                        .line()
                        .unwrap_or_else(|| panic!("calls {:?} have no answer", left()));
                    self.note(&line);
                }
                n += 1;
                // Calls are delivered in batches, the rest with the next round; a lost call never
                // arrives.
                if left().is_empty() || n % 100 > 50 {
                    break;
                }
            }
            // Calls whose handlers died are delivered again after a pause.
            while !left().is_empty() {
                let line = caller
                    .line()
                    .unwrap_or_else(|| panic!("calls {:?} have no answer", left()));
                self.note(&line);
            }
            assert!(
                left().is_empty(),
                "calls {:?} have no answer: {:?}",
                left(),
                self.book
            );
            // Ends the handler's thread: its process ends with the connection.
            let (mut admin, _) = server.app(json!({"app_id": "admin"}));
            let kicked = admin.request(json!({"action": "kick", "app_id": "handler"}));
            assert_eq!(kicked["status"], "ok", "{kicked}");
            handling
                .join()
                .unwrap_or_else(|_| panic!("the handler failed"));
        });
    }

    /// Checks that a server that starts after [`Calls::settle`] has nothing left of any call.
    pub(crate) fn none_left(&self, server: &Daemon) {
        for handshake in [
            json!({"app_id": "caller", "pools": ["base"]}),
            json!({"app_id": "handler", "pools": ["base"], "triggers": ["job"]}),
        ] {
            let mut process =
                come(server, &handshake).unwrap_or_else(|| panic!("the server listens"));
            process.send(&json!({"action": "ping", "id": "p"}));
            let first = process.receive();
            assert_eq!(first["in_reply_to"], "p", "it is left: {first}");
        }
    }
}

/// Starts an app as a process; `None` if the server is gone.
fn come(server: &Daemon, handshake: &Value) -> Option<ControlledProcess> {
    let socket = server.socket().to_str().unwrap_or_default();
    let mut process = ControlledProcess::start(CLIENT, &[socket]);
    let mut handshake = handshake.clone();
    handshake["action"] = "handshake".into();
    process.try_send(&handshake);
    let ack: Value = serde_json::from_str(&process.line()?).ok()?;
    assert_eq!(ack["status"], "ok", "{ack}");
    Some(process)
}

fn answer(handler: &mut ControlledProcess, call: &Value) {
    handler.try_send(
        &json!({"action": "response", "in_reply_to": call["id"], "status": "ok",
        "response": call["data"]}),
    );
}
