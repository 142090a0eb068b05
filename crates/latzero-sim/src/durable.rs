//! Calls that outlive connections, servers and failing disks: a script for them, and a model of the
//! required results.
//!
//! Callers park calls, request redelivery, repeat calls with a key, leave and return. Handlers
//! connect, answer, or die while they have calls. The disk is slow or full, output stays in the
//! server for a while, and the server is killed. The model learns only from what clients see. It
//! checks that an acknowledged call ends with an answer, once on each connection; that a refused
//! call never runs; that first deliveries keep the order of the calls; that attempts are counted
//! and limited to the requested number; that callers take turns; that of calls with one key only
//! one runs at a time; and that an answer to a call of an earlier life of the server, or of a
//! connection that has ended, reaches nobody.

use std::collections::{BTreeMap, BTreeSet};

use latzero_fabric::{Prng, Time, Transport};
use serde_json::{Value, json};

use crate::line::{Event, Peer};
use crate::report::Scenario;
use crate::world::{World, encode_frame};

const CALLERS: [&str; 3] = ["ann", "bob", "cyd"];
const HANDLERS: [&str; 2] = ["hal", "ida"];
const TRIGGERS: [&str; 2] = ["t", "u"];

/// An app that never connects.
const AWAY: &str = "away";

/// Connected instances of one app.
const INSTANCES: usize = 2;

/// The most deliveries of a call: the protocol's default.
const ATTEMPTS: u64 = latzero_protocol::limits::ATTEMPTS_DEFAULT as u64;

/// How many calls of another caller may be delivered before one that waits, in addition to its own:
/// calls in progress when it arrives, and calls that arrive in the same step.
const TURNS_SLACK: usize = 4;

/// Handles of old calls that are remembered for late answers.
const STALE_MAX: usize = 32;

/// The longest time to live of a call whose handler may never come, in milliseconds.
const SHORT_TTL_MS: u64 = 3000;

/// The longest time to live of a call that can wait for its handler, in milliseconds: longer than
/// any run.
const LONG_TTL_MS: u64 = 24 * 3600 * 1000;

/// Rounds at the end in which everything is answered, after which nothing may be left. They last
/// longer than every timeout of the core.
const LAST_TURNS: u32 = 16;

/// A connection, and the calls that it was given.
struct Conn {
    app: &'static str,
    peer: Peer,
    jobs: Vec<Job>,
    is_ready: bool,
    is_slow: bool,
}

/// A trigger and the app that must handle it: calls within one queue stay in order.
type Queue = (&'static str, Option<&'static str>);

impl Conn {
    fn is_caller(&self) -> bool {
        CALLERS.contains(&self.app)
    }
}

/// A call that a handler is working on.
struct Job {
    handle: String,
    n: u64,
}

/// A call and its result.
#[derive(Debug)]
struct Call {
    app: &'static str,
    asked_on: Peer,
    /// The call has an id, so an answer is expected.
    has_id: bool,
    park: bool,
    redeliver: bool,
    key: Option<u64>,
    window: Option<u64>,
    queue: Queue,
    /// Absent while the call waits behind a handshake: its time starts when it is read.
    deadline: Option<Time>,
    is_parked: bool,
    is_refused: bool,
    /// Items that its handlers sent, and of which it was notified.
    sent: u64,
    items: u64,
    answers: u64,
    answered_on: BTreeSet<Peer>,
    /// How many answers beyond the first one kills and lost connections may have caused.
    may_repeat: u64,
    /// The latest attempt, and the life of the server in which it was made.
    attempt: Option<(u64, u64)>,
    /// How many parked calls had been delivered when this one was acknowledged as parked.
    waits_since: Option<usize>,
    /// It was delivered as often as allowed.
    is_dead: bool,
}

/// The clients, the random numbers, and the model.
pub(crate) struct DurableScript {
    prng: Prng,
    /// In every third run, handlers take one call at a time, and more calls are made than they
    /// answer.
    is_busy: bool,
    is_ending: bool,
    conns: Vec<Conn>,
    calls: BTreeMap<u64, Call>,
    asked: u64,
    life: u64,
    /// The newest call of each queue that was delivered for the first time, by caller and handler
    /// connection.
    newest: BTreeMap<(Peer, Peer, Queue), u64>,
    /// The parked calls that were delivered for the first time, in order.
    first: Vec<(Queue, &'static str)>,
    /// Handles of handlers that are gone, and the calls that they belong to.
    stale: Vec<(String, u64)>,
    is_held: bool,
    /// When all clients had read everything sent until then.
    heard_at: Time,
    found: Result<(), String>,
}

impl DurableScript {
    pub(crate) fn new(seed: u64) -> Self {
        DurableScript {
            prng: Prng::new(seed ^ 0x1a57),
            is_busy: seed.is_multiple_of(3),
            is_ending: false,
            conns: Vec::new(),
            calls: BTreeMap::new(),
            asked: 0,
            life: 0,
            newest: BTreeMap::new(),
            first: Vec::new(),
            stale: Vec::new(),
            is_held: false,
            heard_at: Time::default(),
            found: Ok(()),
        }
    }

    fn of(&self, apps: &[&'static str]) -> Vec<usize> {
        let is_one = |conn: &Conn| apps.contains(&conn.app);
        (0..self.conns.len())
            .filter(|&at| is_one(&self.conns[at]))
            .collect()
    }

    fn one_of(&mut self, apps: &[&'static str]) -> Option<usize> {
        let all = self.of(apps);
        (!all.is_empty()).then(|| all[self.prng.below(all.len())])
    }

    fn say(&self, at: usize, message: &Value, world: &mut World) {
        world.feed(
            self.conns[at].peer,
            &encode_frame(&message.to_string(), None),
        );
    }

    fn act(&mut self, world: &mut World) -> String {
        match self.prng.below(100) {
            0..=29 if self.is_busy => {
                let calls: Vec<String> = (0..4).map(|_| self.call(world)).collect();
                calls.join("; ")
            }
            0..=29 => self.call(world),
            30..=49 => self.answer(world),
            50..=52 => self.answer_late(world),
            53..=64 => self.come(world),
            65..=71 => self.go(world),
            72..=75 => self.cancel(world),
            76..=78 => {
                let is_holding = self.prng.below(2) == 0;
                world.hold_disk(is_holding);
                format!("the disk is slow: {is_holding}")
            }
            79..=80 => {
                let is_full = self.prng.below(3) == 0;
                world.fill_disk(is_full);
                format!("the disk is full: {is_full}")
            }
            81..=83 => {
                if !self.is_held {
                    // Earlier output has left the server.
                    self.conns.iter_mut().for_each(|conn| conn.is_slow = false);
                    self.listen(world);
                }
                self.is_held = self.prng.below(2) == 0;
                for conn in self.conns.iter().filter(|conn| conn.is_caller()) {
                    world.hold_writes_of(conn.peer, self.is_held);
                }
                format!("what is sent stays in the server: {}", self.is_held)
            }
            84..=85 => self.kill(world),
            _ => {
                let ms = self.prng.below(900) as u64;
                world.advance(ms);
                format!("{ms} ms pass")
            }
        }
    }

    fn call(&mut self, world: &mut World) -> String {
        let Some(at) = self.one_of(&CALLERS) else {
            return "nobody is there to call".into();
        };
        self.asked += 1;
        let (n, prng) = (self.asked, &mut self.prng);
        let trigger = TRIGGERS[prng.below(2)];
        let destination = match prng.below(8) {
            0 => Some(HANDLERS[prng.below(2)]),
            1 => Some(AWAY),
            _ => None,
        };
        let park = prng.below(3) > 0;
        let redeliver = prng.below(2) == 0;
        let window = (!park && redeliver && prng.below(2) == 0).then(|| 1 + prng.below(3) as u64);
        let key = (prng.below(4) == 0).then(|| prng.below(3) as u64);
        let is_patient = park && destination != Some(AWAY) && prng.below(2) == 0;
        let ttl = if is_patient {
            LONG_TTL_MS
        } else {
            1 + prng.below(SHORT_TTL_MS as usize) as u64
        };
        let has_id = prng.below(12) > 0;
        let mut message = json!({"action": "trigger", "process": trigger, "ttl": ttl, "data": n});
        for (name, is_set) in [("park", park), ("redeliver", redeliver)] {
            if is_set {
                message[name] = true.into();
            }
        }
        if has_id {
            message["id"] = format!("c{n}").into();
        }
        if let Some(destination) = destination {
            message["destination"] = destination.into();
        }
        if let Some(window) = window {
            message["window"] = window.into();
        }
        if let Some(key) = key {
            message["headers"] = json!({"idempotency-key": format!("k{key}")});
        }
        let conn = &self.conns[at];
        let call = Call {
            app: conn.app,
            asked_on: conn.peer,
            has_id,
            park,
            redeliver,
            key,
            window,
            queue: (trigger, destination),
            deadline: conn.is_ready.then(|| world.now().after_ms(ttl)),
            is_parked: false,
            is_refused: false,
            sent: 0,
            items: 0,
            answers: 0,
            answered_on: BTreeSet::new(),
            may_repeat: 0,
            attempt: None,
            waits_since: None,
            is_dead: false,
        };
        self.calls.insert(n, call);
        self.say(at, &message, world);
        format!("{} calls {message}", self.conns[at].app)
    }

    fn answer(&mut self, world: &mut World) -> String {
        let busy: Vec<usize> = (0..self.conns.len())
            .filter(|&at| !self.conns[at].jobs.is_empty())
            .collect();
        if busy.is_empty() {
            return "nobody has anything to answer".into();
        }
        let at = busy[self.prng.below(busy.len())];
        let job = self.prng.below(self.conns[at].jobs.len());
        let is_stream = self.calls[&self.conns[at].jobs[job].n].window.is_some();
        let status = match self.prng.below(5) {
            0 => "error",
            1 => "partial",
            2..=3 if is_stream => "partial",
            _ => "ok",
        };
        self.respond(at, job, status, world)
    }

    fn respond(&mut self, at: usize, job: usize, status: &str, world: &mut World) -> String {
        let Job { handle, n } = &self.conns[at].jobs[job];
        let mut message = json!({"action": "response", "in_reply_to": handle, "status": status});
        if status == "error" {
            message["error"] = json!({"code": "custom", "message": n.to_string()});
        } else {
            message["response"] = (*n).into();
        }
        if status == "partial" {
            let call = self.calls.get_mut(n).expect("the pipe was requested");
            call.sent += 1;
        } else {
            self.conns[at].jobs.remove(job);
        }
        self.say(at, &message, world);
        format!("{} answers {message}", self.conns[at].app)
    }

    /// A handler answers a call of an earlier life of its own, or of the server.
    fn answer_late(&mut self, world: &mut World) -> String {
        let Some(at) = self.one_of(&HANDLERS).filter(|_| !self.stale.is_empty()) else {
            return "nobody answers late".into();
        };
        let (handle, n) = self.stale.swap_remove(self.prng.below(self.stale.len()));
        let message = json!({"action": "response", "in_reply_to": handle, "status": "ok",
            "response": format!("late {n}")});
        self.say(at, &message, world);
        format!("{} answers late: {message}", self.conns[at].app)
    }

    fn forget_jobs(&mut self, conn: &Conn) {
        let jobs = conn.jobs.iter();
        self.stale
            .extend(jobs.map(|job| (job.handle.clone(), job.n)));
        let too_many = self.stale.len().saturating_sub(STALE_MAX);
        self.stale.drain(..too_many);
    }

    fn come(&mut self, world: &mut World) -> String {
        let at = self.prng.below(CALLERS.len() + HANDLERS.len());
        let app = CALLERS.iter().chain(&HANDLERS).nth(at).expect("it is one");
        if self.of(&[app]).len() == INSTANCES {
            return format!("{app} is there already");
        }
        let concurrency = match self.prng.below(3) {
            _ if self.is_busy => json!(1),
            0 => json!(1 + self.prng.below(2)),
            _ => Value::Null,
        };
        let triggers = match self.prng.below(3) {
            0 => &TRIGGERS[..1],
            1 => &TRIGGERS[1..],
            _ => &TRIGGERS[..],
        };
        self.join(app, triggers, &concurrency, world)
    }

    fn join(
        &mut self,
        app: &'static str,
        triggers: &[&str],
        concurrency: &Value,
        world: &mut World,
    ) -> String {
        let mut message = json!({"action": "handshake", "app_id": app});
        if HANDLERS.contains(&app) {
            let spec = |name: &&str| match concurrency {
                Value::Null => json!(name),
                concurrency => json!({"name": name, "concurrency": concurrency}),
            };
            message["triggers"] = triggers.iter().map(spec).collect();
        }
        let peer = world.connect(Transport::Unix);
        self.conns.push(Conn {
            app,
            peer,
            jobs: Vec::new(),
            is_ready: false,
            is_slow: false,
        });
        self.say(self.conns.len() - 1, &message, world);
        format!("{message}")
    }

    fn go(&mut self, world: &mut World) -> String {
        if self.conns.is_empty() {
            return "nobody is there to go".into();
        }
        let at = self.prng.below(self.conns.len());
        // It has read what has left the server.
        self.conns[at].is_slow = self.is_held && self.conns[at].is_caller();
        self.listen(world);
        if at >= self.conns.len() {
            return "it is gone already".into();
        }
        let conn = self.conns.remove(at);
        self.forget_jobs(&conn);
        world.hang_up(conn.peer);
        format!("{} hangs up", conn.app)
    }

    fn cancel(&mut self, world: &mut World) -> String {
        let Some(at) = self.one_of(&CALLERS) else {
            return "nobody is there to cancel".into();
        };
        let app = self.conns[at].app;
        let own = self.calls.iter().filter(|(_, call)| call.app == app);
        let own: Vec<u64> = own.map(|(n, _)| *n).rev().take(8).collect();
        if own.is_empty() {
            return "has nothing to cancel".into();
        }
        let message =
            json!({"action": "cancel", "id": format!("c{}", own[self.prng.below(own.len())])});
        self.say(at, &message, world);
        format!("{app} says {message}")
    }

    fn kill(&mut self, world: &mut World) -> String {
        for conn in &mut self.conns {
            conn.is_slow = self.is_held && conn.is_caller();
        }
        self.listen(world);
        // Answers may not have been stored yet.
        self.calls
            .values_mut()
            .for_each(|call| call.may_repeat += 1);
        world.restart(self.prng.next_u64());
        for conn in std::mem::take(&mut self.conns) {
            self.forget_jobs(&conn);
        }
        self.life += 1;
        "the server is killed and starts".into()
    }

    /// All clients except slow ones read everything that was sent.
    fn listen(&mut self, world: &mut World) {
        let mut found = Ok(());
        for at in 0..self.conns.len() {
            let conn = &self.conns[at];
            if conn.is_slow && world.is_open(conn.peer) {
                continue;
            }
            for message in world.messages(conn.peer) {
                found = found.and_then(|()| self.hear(at, &message.json));
            }
        }
        if !self.is_held {
            self.heard_at = world.now();
        }
        self.conns.retain(|conn| world.is_open(conn.peer));
        let found = found.and_then(|()| self.check_keys());
        if self.found.is_ok() {
            self.found = found;
        }
    }

    fn hear(&mut self, at: usize, message: &Value) -> Result<(), String> {
        match message["action"].as_str() {
            Some("handshake_ack") => {
                self.conns[at].is_ready = true;
                Ok(())
            }
            Some("trigger") => self.handle_call(at, message),
            Some("cancel") => {
                let handle = &message["id"];
                self.conns[at].jobs.retain(|job| job.handle != *handle);
                Ok(())
            }
            Some("response") => self.handle_response(at, message),
            _ => Ok(()),
        }
    }

    /// A handler receives a call.
    fn handle_call(&mut self, at: usize, message: &Value) -> Result<(), String> {
        let n = message["data"].as_u64().ok_or("a call that nobody made")?;
        let (life, to, heard_at) = (self.life, self.conns[at].peer, self.heard_at);
        let call = self.calls.get_mut(&n).ok_or("a call that nobody made")?;
        let attempt = message["attempt"].as_u64();
        let fault = |what: &str| Err(format!("call {n} {what}: {call:?}, now {message}"));
        if call.is_refused {
            return fault("was refused and is given out");
        }
        if call.deadline.is_some_and(|deadline| heard_at >= deadline) {
            return fault("is given out after its time");
        }
        // A call that may only be parked reports an attempt only if it was parked.
        if attempt.is_some() != call.redeliver && !call.park {
            return fault("has an attempt without need, or none");
        }
        let left = call.window.map(|window| window.saturating_sub(call.sent));
        if message["window"].as_u64() != left {
            return fault("has another window than what is left of it");
        }
        match call.attempt {
            None => {}
            Some((before, then)) => {
                let may = if then == life {
                    call.redeliver && attempt == Some(before + 1)
                } else {
                    // After a kill, an older count may be restored.
                    call.park && attempt.is_none_or(|attempt| attempt <= before + 1)
                };
                if !may {
                    return fault("is given out again, or its attempts are miscounted");
                }
            }
        }
        if call.is_dead {
            return fault("is given out though it is dead");
        }
        if attempt.is_some_and(|attempt| attempt > ATTEMPTS) {
            return fault("is given out too often");
        }
        // At the end, many calls are delivered in one step and read in a different order.
        if let (None, Some(since), false) = (call.attempt, call.waits_since, self.is_ending) {
            let ahead = self.first[since..]
                .iter()
                .filter(|(queue, _)| *queue == call.queue);
            let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
            for (_, app) in ahead {
                *counts.entry(app).or_default() += 1;
            }
            let own = counts.remove(call.app).unwrap_or(0);
            let most = own + TURNS_SLACK + usize::try_from(life).unwrap_or(0);
            if counts.values().any(|&others| others > most) {
                return fault("waits while another caller has many turns");
            }
        }
        if call.attempt.is_none() && call.park {
            self.first.push((call.queue, call.app));
            let newest = self
                .newest
                .entry((to, call.asked_on, call.queue))
                .or_default();
            if *newest > n {
                return fault("comes after one that was asked for later");
            }
            *newest = n;
        }
        call.attempt = Some((attempt.unwrap_or(1), life));
        let handle = message["id"].as_str().unwrap_or_default().to_owned();
        self.conns[at].jobs.push(Job { handle, n });
        Ok(())
    }

    /// A caller receives a response to a call.
    fn handle_response(&mut self, at: usize, message: &Value) -> Result<(), String> {
        let id = message["in_reply_to"].as_str().unwrap_or_default();
        let Some(n) = id.strip_prefix('c').and_then(|n| n.parse::<u64>().ok()) else {
            return Ok(());
        };
        let conn = &self.conns[at];
        let app = conn.app;
        let peer = conn.peer;
        let call = self.calls.get(&n);
        let (key, queue) = call.map_or((None, None), |call| (call.key, Some(call.queue)));
        let is_answer_of = |n: &Value| {
            let n = n.as_u64().or_else(|| n.as_str()?.parse().ok());
            let of = n.and_then(|n| self.calls.get(&n));
            of.is_some_and(|of| {
                of.app == app && key.is_some() && of.key == key && Some(of.queue) == queue
            })
        };
        let shown = &message["response"];
        let is_own = *shown == n || message["error"]["message"].as_str() == Some(&n.to_string());
        let is_right = is_own || is_answer_of(shown) || is_answer_of(&message["error"]["message"]);
        let call = self.calls.get_mut(&n).ok_or("an answer to no call")?;
        let fault = if call.app != app {
            Some("is another app's")
        } else if call.is_refused {
            Some("was refused, and more is said of it")
        } else {
            match message["status"].as_str() {
                Some("parked") => {
                    let may = call.park && !call.is_parked && call.answers == 0;
                    call.is_parked = true;
                    call.waits_since = Some(self.first.len());
                    (!may).then_some("is said to be parked, when it is not")
                }
                Some("partial") => {
                    call.items += 1;
                    let may = !call.is_parked && call.window.is_none_or(|most| call.items <= most);
                    (!may).then_some("sends more items than it may")
                }
                Some("error") if is_over_unheard(message) => {
                    call.answers += 1;
                    let is_first = call.answered_on.insert(peer);
                    if call.attempt.is_some() && message["error"]["ran"] == "no" {
                        Some("is said not to have run, and was given out")
                    } else if !is_first || call.answers > 1 + call.may_repeat {
                        Some("is answered twice")
                    } else {
                        None
                    }
                }
                Some("error") if message["error"]["ran"] == "no" => {
                    call.is_refused = true;
                    let was_accepted = call.is_parked || call.answers > 0;
                    was_accepted.then_some("was accepted, and is refused now")
                }
                Some("ok" | "error") => {
                    let code = &message["error"]["code"];
                    let is_server_s = message["status"] == "error" && code != "custom";
                    call.is_dead |= code == "attempts_exhausted";
                    call.answers += 1;
                    let is_first = call.answered_on.insert(peer);
                    if !is_right && !is_server_s {
                        Some("has the answer of another")
                    } else if !is_first || call.answers > 1 + call.may_repeat {
                        Some("is answered twice")
                    } else {
                        None
                    }
                }
                _ => Some("is told something unheard of"),
            }
        };
        match fault {
            None => Ok(()),
            Some(what) => Err(format!("call {n} {what}: {call:?}, now {message}")),
        }
    }

    /// Checks that of calls with the same app, trigger, destination and key, only one at a time is
    /// with a handler.
    fn check_keys(&self) -> Result<(), String> {
        let mut running = BTreeMap::new();
        for job in self.conns.iter().flat_map(|conn| &conn.jobs) {
            let call = &self.calls[&job.n];
            if let Some(key) = call.key
                && let Some(other) = running.insert((call.app, key, call.queue), job.n)
            {
                let n = job.n;
                return Err(format!("calls {other} and {n} run at once under one key"));
            }
        }
        Ok(())
    }
}

/// Whether a call that was accepted ended before any handler answered: it expired, or was
/// cancelled.
fn is_over_unheard(message: &Value) -> bool {
    let code = &message["error"]["code"];
    code == "timeout" || code == "cancelled"
}

impl Scenario for DurableScript {
    fn step(&mut self, world: &mut World) -> String {
        let what = self.act(world);
        for conn in &mut self.conns {
            conn.is_slow = conn.is_caller() && (self.is_held || self.prng.below(4) == 0);
        }
        self.listen(world);
        what
    }

    fn check(&mut self, _log: &[Event], _world: &World) -> Result<(), String> {
        std::mem::replace(&mut self.found, Ok(()))
    }

    /// Everybody connects, the disk works, and every call is answered, until nothing is left to do.
    fn end(&mut self, at: u32, world: &mut World) -> Result<Option<String>, String> {
        if at == 0 {
            self.is_ending = true;
            world.hold_disk(false);
            world.fill_disk(false);
            self.is_held = false;
            world.hold_writes(false);
            for app in CALLERS.iter().chain(&HANDLERS) {
                while self.of(&[app]).len() < INSTANCES {
                    self.join(app, &TRIGGERS, &Value::Null, world);
                }
            }
            for at in self.of(&HANDLERS) {
                let message = json!({"action": "trigger_register", "triggers": TRIGGERS});
                self.say(at, &message, world);
            }
        } else if at > LAST_TURNS {
            return Ok(None);
        } else {
            for at in 0..self.conns.len() {
                while !self.conns[at].jobs.is_empty() {
                    self.respond(at, 0, "ok", world);
                }
            }
            world.advance(1100);
        }
        self.conns.iter_mut().for_each(|conn| conn.is_slow = false);
        self.listen(world);
        Ok(Some("everybody is there and answers".into()))
    }

    fn at_end(&self, world: &World) -> Result<(), String> {
        for (n, call) in &self.calls {
            let is_there = self.conns.iter().any(|conn| conn.peer == call.asked_on);
            let is_owed = call.has_id && !call.is_refused && (call.is_parked || is_there);
            if is_owed && call.answers == 0 {
                return Err(format!("call {n} has no answer: {call:?}"));
            }
        }
        let rows = world.rows();
        let calls = rows
            .calls
            .values()
            .filter(|row| row.death.is_none())
            .count();
        let answers = rows.answers.len();
        if calls > 0 || answers > 0 {
            return Err(format!(
                "{calls} calls and {answers} answers are left on disk"
            ));
        }
        if world.calls_in_flight() > 0 {
            return Err("calls are left in flight".into());
        }
        if !world.storages().is_empty() {
            return Err("something is counted that is there no longer".into());
        }
        Ok(())
    }
}
