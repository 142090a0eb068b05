//! The script of the clients: the seed decides what happens in each step.
//!
//! The script misbehaves on purpose. Clients answer calls of others, answer twice, exceed their
//! windows, disconnect in the middle of a frame, stop reading, and send invalid messages.

use latzero_fabric::{Prng, Transport};
use serde_json::{Value, json};

use crate::client::{Client, OwnCall, tagged};
use crate::world::{World, admin_proof, encode_frame};

const APPS: [&str; 8] = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"];
const POOLS: [&str; 7] = [
    "default", "alpha", "beta", "gamma", "delta", "made", "system",
];
const TRIGGERS: [&str; 5] = ["work", "count/words", "img:resize", "echo", "slow.one"];
const STRATEGIES: [&str; 4] = ["round_robin", "random", "least_busy", "sticky"];
const EVENTS: [&str; 4] = [
    "app_online",
    "app_offline",
    "trigger_added",
    "trigger_removed",
];

/// Objects that the server must refuse without closing the connection of a ready session.
const WRONG: [&str; 18] = [
    r#"{}"#,
    r#"{"action":7}"#,
    r#"{"action":"fly","id":"w"}"#,
    r#"{"action":"trigger","id":"w"}"#,
    r#"{"action":"trigger","process":"work","ttl":0}"#,
    r#"{"action":"trigger","process":"no good","id":"w"}"#,
    r#"{"action":"trigger","process":"work","id":"","data":1}"#,
    r#"{"action":"trigger","process":"work","id":"w","destination":[]}"#,
    r#"{"action":"trigger","process":"work","id":"w","id":"w"}"#,
    r#"{"action":"emit","process":"work","deliver":"some","id":"w"}"#,
    r#"{"action":"response","in_reply_to":"0.0.0","status":"fine"}"#,
    r#"{"action":"response","in_reply_to":"nonsense","status":"ok"}"#,
    r#"{"action":"ack","id":"w"}"#,
    r#"{"action":"pool_join","pool":"a b","id":"w"}"#,
    r#"{"action":"watch","pool":"default","events":["app_up"],"id":"w"}"#,
    r#"{"action":"pool_create","pool":"x","encrypted":true,"id":"w"}"#,
    r#"{"action":"handshake","app_id":"late","id":"w"}"#,
    r#"{"action":"shutdown","id":"w"}"#,
];

/// Bytes that end their connection.
const FATAL: [&[u8]; 6] = [
    &[0, 0, 0, 0],
    b"GET / HTTP/1.1\r\n\r\n",
    &[0x16, 0x03, 0x01, 0x02, 0x00],
    &[0, 0, 0, 2, b'[', b']'],
    &[0, 0, 0, 3, b'{', 0xff, b'}'],
    &[0, 0, 0, 4, b'{', b'"', b'a', b'"'],
];

/// The clients and the random numbers.
pub(crate) struct Script {
    pub(crate) clients: Vec<Client>,
    prng: Prng,
    next_tag: u64,
}

impl Script {
    pub(crate) fn new(seed: u64, clients: usize) -> Self {
        Script {
            clients: (0..clients)
                .map(|at| Client::new(APPS[at % APPS.len()].to_owned()))
                .collect(),
            prng: Prng::new(seed),
            next_tag: 0,
        }
    }

    /// Performs one step; returns its description.
    pub(crate) fn step(&mut self, world: &mut World) -> String {
        // A draining server stops soon.
        if world.is_stopping() && self.prng.below(30) == 0 {
            world.restart(self.prng.next_u64());
            return "the server restarts".into();
        }
        match self.prng.below(2000) {
            0 => {
                world.restart(self.prng.next_u64());
                return "the server crashes and restarts".into();
            }
            1 => {
                world.drain();
                return "the server drains".into();
            }
            2 => {
                world.fill_disk(!world.is_disk_full());
                return "the disk fills, or is emptied".into();
            }
            3..=4 => {
                let ms = 500 + self.prng.below(3000) as u64;
                world.advance(ms);
                return format!("{ms} ms pass");
            }
            5..=599 => {
                world.advance(self.prng.below(12) as u64);
            }
            _ => {}
        }
        let at = self.prng.below(self.clients.len());
        let what = self.act(at, world);
        // What was queued reaches the server whole, in part, or later.
        let most = match self.prng.below(8) {
            0 => 0,
            1 => self.prng.below(40),
            _ => usize::MAX,
        };
        self.clients[at].flush(most, world);
        for reader in 0..self.clients.len() {
            if self.prng.below(3) > 0 {
                continue;
            }
            let most = match self.prng.below(8) {
                0 => self.prng.below(60),
                _ => usize::MAX,
            };
            let client = &mut self.clients[reader];
            client.flush(usize::MAX, world);
            if !client.is_slow {
                client.read(most, world);
            }
        }
        format!("client {at} ({}) {what}", self.clients[at].app)
    }

    /// All clients send what they have queued, read everything, and send nothing new; then time
    /// advances past every deadline.
    pub(crate) fn settle(&mut self, world: &mut World) {
        for client in &mut self.clients {
            client.flush(usize::MAX, world);
        }
        world.advance(LONGEST_TTL_MS);
        for client in &mut self.clients {
            client.read(usize::MAX, world);
        }
    }

    /// Everybody disconnects.
    pub(crate) fn leave(&mut self, world: &mut World) {
        for client in &mut self.clients {
            if let Some(peer) = client.peer {
                world.hang_up(peer);
            }
            client.reset();
        }
    }

    fn act(&mut self, at: usize, world: &mut World) -> String {
        if self.clients[at].peer.is_none() {
            let transport = if self.prng.below(2) == 0 {
                Transport::Tcp
            } else {
                Transport::Unix
            };
            self.clients[at].peer = Some(world.connect(transport));
            return self.hello(at);
        }
        let p = self.prng.below(1000);
        if !self.clients[at].is_ready {
            // Waits for the acknowledgement, or for the end.
            return match p {
                0..=19 => self.wrong(at),
                20..=49 => self.hang_up(at, world),
                50..=69 if !self.clients[at].has_said_hello => self.hello(at),
                _ => "waits".into(),
            };
        }
        match p {
            0..=349 => self.call(at),
            350..=629 => {
                // A client that has something to answer, if there is one.
                let mut from = self
                    .clients
                    .iter()
                    .cycle()
                    .skip(at)
                    .take(self.clients.len());
                let busy = from.position(|client| !client.jobs.is_empty()).unwrap_or(0);
                let at = (at + busy) % self.clients.len();
                format!("(for {at}) {}", self.answer(at))
            }
            630..=659 => self.emit(at),
            660..=699 => self.cancel(at),
            700..=739 => self.acknowledge(at),
            740..=769 => self.pool(at),
            770..=799 => self.triggers(at),
            800..=829 => self.watch(at),
            830..=859 => self.ask(at),
            860..=879 => self.wrong(at),
            880..=882 => self.fatal(at),
            883..=889 => self.hang_up(at, world),
            890 => self.kick(at),
            891..=915 => {
                let is_slow = self.prng.below(3) == 0;
                let client = &mut self.clients[at];
                client.is_slow = is_slow;
                format!("reads: {}", !client.is_slow)
            }
            _ => {
                // Several emits in a row fill the outboxes of clients that do not read.
                let what = self.emit(at);
                for _ in 0..self.prng.below(8) {
                    self.emit(at);
                }
                format!("{what}, and more")
            }
        }
    }

    fn hello(&mut self, at: usize) -> String {
        let prng = &mut self.prng;
        let mut message = json!({"action": "handshake", "app_id": self.clients[at].app});
        if prng.below(3) > 0 {
            message["id"] = self.clients[at].fresh_id().into();
        }
        if prng.below(4) > 0 {
            message["pools"] = some(&POOLS[..5], prng);
        }
        if prng.below(4) > 0 {
            let count = prng.below(4);
            message["triggers"] = (0..count).map(|_| trigger_spec(prng)).collect();
        }
        let attachments = prng.below(2) == 0;
        if attachments {
            message["features"] = json!(["attachments", "fd_passing", "unheard_of"]);
        }
        match prng.below(24) {
            0 => message["exclusive"] = true.into(),
            1 => message["takeover"] = true.into(),
            2 => message["protocol"] = 2.into(),
            3 => message["app_id"] = "latzero".into(),
            4 => message["meta"] = json!({"version": "1.2.3"}),
            _ => {}
        }
        let client = &mut self.clients[at];
        client.has_said_hello = true;
        client.say(&message, None);
        client.takes_attachments = attachments;
        format!("says {message}")
    }

    fn call(&mut self, at: usize) -> String {
        self.next_tag += 1;
        let (tag, prng) = (self.next_tag, &mut self.prng);
        let pool = self.clients[at].some_pool(&POOLS, prng);
        let mut message = json!({
            "action": "trigger", "process": TRIGGERS[prng.below(TRIGGERS.len())],
            "headers": tagged(tag),
        });
        let explicit = prng.below(8) > 0;
        if explicit {
            message["pool"] = pool.clone().into();
        }
        message["ttl"] = match prng.below(4) {
            0 => 1 + prng.below(30),
            1 => 1 + prng.below(300),
            _ => 1 + prng.below(LONGEST_TTL_MS as usize),
        }
        .into();
        if let Some(destination) = self.destination() {
            message["destination"] = destination;
        }
        let prng = &mut self.prng;
        if prng.below(4) == 0 {
            message["key"] = format!("key\n{}", prng.below(6)).into();
        }
        if prng.below(3) == 0 {
            message["window"] = (1 + prng.below(3)).into();
        }
        let (body, attachment) = body(prng);
        let wants_attachment = attachment.is_some() && self.clients[at].takes_attachments;
        if let Some(body) = body.filter(|_| !wants_attachment) {
            message["data"] = body;
        }
        let client = &mut self.clients[at];
        match prng.below(40) {
            0 => {}
            // An id that is in use already.
            1 => {
                let used = client.calls.iter().find(|call| call.pool.is_some());
                if let Some(used) = used {
                    message["id"] = used.id.clone().into();
                    message["pool"] = used.pool.clone().into();
                }
            }
            _ => {
                let id = client.fresh_id();
                message["id"] = id.clone().into();
                client.calls.push(OwnCall {
                    id,
                    pool: explicit.then_some(pool),
                    unacknowledged: 0,
                });
            }
        }
        client.say(&message, attachment.as_deref());
        format!("calls {message}")
    }

    fn answer(&mut self, at: usize) -> String {
        let prng = &mut self.prng;
        let foreign = prng.below(25) == 0;
        let from = if foreign {
            prng.below(self.clients.len())
        } else {
            at
        };
        let late = prng.below(25) == 0;
        if late || self.clients[from].jobs.is_empty() {
            let old = &self.clients[from].old_jobs;
            if old.is_empty() {
                return "has nothing to answer".into();
            }
            let call = old[prng.below(old.len())].clone();
            let message = json!({"action": "response", "in_reply_to": call, "status": "ok",
                "headers": tagged(0)});
            self.clients[at].say(&message, None);
            return format!("answers late: {message}");
        }
        let job = prng.below(self.clients[from].jobs.len());
        let Some(job) = self.clients[from].jobs.get_mut(job) else {
            return "has nothing to answer".into();
        };
        self.next_tag += 1;
        let mut message = json!({"action": "response", "in_reply_to": job.call,
            "headers": tagged(self.next_tag)});
        let (mut body, mut attachment) = body(prng);
        let overrun = prng.below(8) == 0;
        let may_send = job.credit.is_none_or(|credit| credit > 0) || overrun;
        match prng.below(10) {
            0..=2 if may_send => {
                message["status"] = "partial".into();
                if !foreign {
                    job.items += 1;
                    job.credit = job.credit.map(|credit| credit.saturating_sub(1));
                }
            }
            3 => message["status"] = "progress".into(),
            4 => {
                message["status"] = "error".into();
                (body, attachment) = (None, None);
                let long = if prng.below(6) == 0 {
                    12_000
                } else {
                    prng.below(300)
                };
                if prng.below(4) > 0 {
                    message["error"] =
                        json!({"code": "custom", "message": "as told", "data": "x".repeat(long)});
                }
            }
            _ => message["status"] = "ok".into(),
        }
        let is_final = matches!(message["status"].as_str(), Some("ok" | "error"));
        let call = job.call.clone();
        if attachment.is_none() || !self.clients[at].takes_attachments {
            message["response"] = body.unwrap_or_default();
        }
        if is_final && !foreign {
            self.clients[from].finish(&call);
        }
        self.clients[at].say(&message, attachment.as_deref());
        format!("answers {message}")
    }

    fn emit(&mut self, at: usize) -> String {
        self.next_tag += 1;
        let (tag, prng) = (self.next_tag, &mut self.prng);
        let mut message = json!({
            "action": "emit", "process": TRIGGERS[prng.below(TRIGGERS.len())],
            "headers": tagged(tag),
            "pool": self.clients[at].some_pool(&POOLS, prng),
        });
        if prng.below(3) > 0 {
            message["id"] = self.clients[at].fresh_id().into();
        }
        if prng.below(3) == 0 {
            message["deliver"] = "one".into();
        }
        if let Some(destination) = self.destination() {
            message["destination"] = destination;
        }
        let (body, attachment) = body(&mut self.prng);
        if attachment.is_none() || !self.clients[at].takes_attachments {
            message["data"] = body.unwrap_or_default();
        }
        self.clients[at].say(&message, attachment.as_deref());
        format!("emits {message}")
    }

    /// Usually none, or else an app, a current or former instance, or an app that never existed.
    fn destination(&mut self) -> Option<Value> {
        let other = &self.clients[self.prng.below(self.clients.len())];
        match self.prng.below(12) {
            0..=2 => Some(other.app.clone().into()),
            3 => Some(json!({"app_id": other.app, "instance": other.instance})),
            4 => Some("nobody".into()),
            _ => None,
        }
    }

    fn cancel(&mut self, at: usize) -> String {
        let client = &mut self.clients[at];
        let id = if client.calls.is_empty() || self.prng.below(10) == 0 {
            "unheard-of".to_owned()
        } else {
            client.calls[self.prng.below(client.calls.len())].id.clone()
        };
        let message = json!({"action": "cancel", "id": id});
        client.say(&message, None);
        format!("cancels {id}")
    }

    fn acknowledge(&mut self, at: usize) -> String {
        let client = &mut self.clients[at];
        let Some(call) = client.calls.iter_mut().find(|call| call.unacknowledged > 0) else {
            return "has nothing to acknowledge".into();
        };
        let message = json!({"action": "ack", "id": call.id, "count": call.unacknowledged});
        call.unacknowledged = 0;
        client.say(&message, None);
        format!("acknowledges {message}")
    }

    fn pool(&mut self, at: usize) -> String {
        let prng = &mut self.prng;
        let name = POOLS[prng.below(POOLS.len())];
        let mut message = match prng.below(10) {
            0..=3 => {
                let client = &mut self.clients[at];
                if !client.pools.iter().any(|pool| pool == name) {
                    client.pools.push(name.into());
                }
                json!({"action": "pool_join", "pool": name})
            }
            4..=5 => {
                let pool = self.clients[at].some_pool(&POOLS, prng);
                self.clients[at].pools.retain(|known| *known != pool);
                json!({"action": "pool_leave", "pool": pool})
            }
            6..=7 => {
                json!({"action": "pool_create", "pool": POOLS[3 + prng.below(3)],
                    "properties": {"a": 1}})
            }
            8 => json!({"action": "pool_remove", "pool": name, "force": true}),
            _ => json!({"action": "pool_remove", "pool": name}),
        };
        self.request(at, &mut message)
    }

    fn triggers(&mut self, at: usize) -> String {
        let prng = &mut self.prng;
        let action = if prng.below(3) > 0 {
            "trigger_register"
        } else {
            "trigger_unregister"
        };
        let specs: Vec<Value> = (0..=prng.below(2)).map(|_| trigger_spec(prng)).collect();
        self.request(at, &mut json!({"action": action, "triggers": specs}))
    }

    fn watch(&mut self, at: usize) -> String {
        let pool = self.clients[at].some_pool(&POOLS, &mut self.prng);
        let mut message = match self.prng.below(3) {
            0 => json!({"action": "unwatch", "pool": pool}),
            1 => json!({"action": "watch", "pool": pool, "events": some(&EVENTS, &mut self.prng)}),
            _ => json!({"action": "watch", "pool": pool}),
        };
        self.request(at, &mut message)
    }

    fn ask(&mut self, at: usize) -> String {
        let pool = POOLS[self.prng.below(POOLS.len())];
        let mut message = match self.prng.below(6) {
            0 => json!({"action": "ping"}),
            1 => json!({"action": "pool_list", "limit": 3}),
            2 => json!({"action": "pool_info", "pool": pool}),
            3 => json!({"action": "app_list", "pool": pool}),
            4 => json!({"action": "app_list", "after": "cat"}),
            _ => json!({"action": "stats"}),
        };
        self.request(at, &mut message)
    }

    fn kick(&mut self, at: usize) -> String {
        let other = &self.clients[self.prng.below(self.clients.len())];
        let mut message = json!({"action": "kick", "app_id": other.app});
        if self.prng.below(2) == 0 {
            message["instance"] = other.instance.clone().into();
        }
        // Some requests lack the right.
        if self.prng.below(4) > 0 {
            for said in admin_proof() {
                let said = encode_frame(&said, None);
                self.clients[at].outgoing.extend(said);
            }
        }
        self.request(at, &mut message)
    }

    fn request(&mut self, at: usize, message: &mut Value) -> String {
        if self.prng.below(5) > 0 {
            message["id"] = self.clients[at].fresh_id().into();
        }
        self.clients[at].say(message, None);
        format!("asks {message}")
    }

    fn wrong(&mut self, at: usize) -> String {
        let text = WRONG[self.prng.below(WRONG.len())];
        self.clients[at].outgoing.extend(encode_frame(text, None));
        format!("says what is wrong: {text}")
    }

    fn fatal(&mut self, at: usize) -> String {
        let bytes = FATAL[self.prng.below(FATAL.len())];
        self.clients[at].outgoing.extend_from_slice(bytes);
        format!("writes {}", bytes.escape_ascii())
    }

    fn hang_up(&mut self, at: usize, world: &mut World) -> String {
        // This may end in the middle of a frame.
        let most = self.prng.below(30);
        self.clients[at].flush(most, world);
        if let Some(peer) = self.clients[at].peer {
            world.hang_up(peer);
        }
        self.clients[at].reset();
        "hangs up".into()
    }
}

/// The longest time to live that a scripted call asks for, in milliseconds.
const LONGEST_TTL_MS: u64 = 2500;

fn some(names: &[&str], prng: &mut Prng) -> Value {
    (0..prng.below(4))
        .map(|_| names[prng.below(names.len())])
        .collect()
}

fn trigger_spec(prng: &mut Prng) -> Value {
    let name = TRIGGERS[prng.below(TRIGGERS.len())];
    if prng.below(2) == 0 {
        return name.into();
    }
    let mut spec = json!({"name": name});
    if prng.below(2) == 0 {
        spec["strategy"] = STRATEGIES[prng.below(STRATEGIES.len())].into();
    }
    if prng.below(3) == 0 {
        spec["concurrency"] = (1 + prng.below(3)).into();
    }
    if prng.below(4) == 0 {
        spec["pools"] = some(&POOLS[..6], prng);
    }
    if prng.below(4) == 0 {
        spec["doc"] = "what it does".into();
    }
    spec
}

/// A body as JSON and as raw bytes; the latter is used if the client may send attachments.
fn body(prng: &mut Prng) -> (Option<Value>, Option<Vec<u8>>) {
    let length = match prng.below(8) {
        0 => prng.below(2000),
        _ => prng.below(60),
    };
    match prng.below(6) {
        0 => (None, None),
        1 | 2 => (Some("…".into()), Some(vec![0xa7; length])),
        _ => (Some(json!({"x": "y".repeat(length)})), None),
    }
}
