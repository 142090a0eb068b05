//! One scripted client: what it has sent and received, and what it must answer.
//!
//! A client knows only what it received. It writes frames to `outgoing`, which reach the server in
//! pieces of any size, and reads its outbox in pieces of any size too.

use latzero_fabric::Prng;
use serde_json::{Value, json};

use crate::line::Peer;
use crate::world::{self, Message, World};

/// A call that was sent to this client.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The id for the answer.
    pub(crate) call: String,
    /// Items that it may still send, if the stream has a window.
    pub(crate) credit: Option<u64>,
    /// Items sent so far.
    pub(crate) items: u64,
}

/// A call that this client made.
#[derive(Debug, Clone)]
pub(crate) struct OwnCall {
    pub(crate) id: String,
    /// The pool, if the call names one.
    pub(crate) pool: Option<String>,
    /// Items received and not acknowledged.
    pub(crate) unacknowledged: u64,
}

/// One scripted client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) app: String,
    pub(crate) peer: Option<Peer>,
    pub(crate) is_ready: bool,
    pub(crate) has_said_hello: bool,
    pub(crate) is_slow: bool,
    pub(crate) takes_attachments: bool,
    pub(crate) instance: Option<String>,
    pub(crate) pools: Vec<String>,
    pub(crate) jobs: Vec<Job>,
    /// Calls of jobs that have ended, for late answers.
    pub(crate) old_jobs: Vec<String>,
    pub(crate) calls: Vec<OwnCall>,
    pub(crate) outgoing: Vec<u8>,
    incoming: Vec<u8>,
    next_id: u64,
}

/// How many ended jobs a client remembers.
const OLD_JOBS_MAX: usize = 8;

impl Client {
    pub(crate) fn new(app: String) -> Self {
        Client {
            app,
            peer: None,
            is_ready: false,
            has_said_hello: false,
            is_slow: false,
            takes_attachments: false,
            instance: None,
            pools: Vec::new(),
            jobs: Vec::new(),
            old_jobs: Vec::new(),
            calls: Vec::new(),
            outgoing: Vec::new(),
            incoming: Vec::new(),
            next_id: 0,
        }
    }

    /// Clears the state of a connection that has ended.
    pub(crate) fn reset(&mut self) {
        let next_id = self.next_id;
        *self = Client {
            next_id,
            instance: self.instance.take(),
            ..Client::new(std::mem::take(&mut self.app))
        };
    }

    /// An id that this client has not used before.
    pub(crate) fn fresh_id(&mut self) -> String {
        self.next_id += 1;
        format!("{}-{}", self.app, self.next_id)
    }

    /// Queues one message; it reaches the server with [`Client::flush`].
    pub(crate) fn say(&mut self, json: &Value, attachment: Option<&[u8]>) {
        let attachment = attachment.filter(|_| self.takes_attachments);
        self.outgoing
            .extend(world::encode_frame(&json.to_string(), attachment));
    }

    /// Sends at most `most` queued bytes to the server.
    pub(crate) fn flush(&mut self, most: usize, world: &mut World) {
        let Some(peer) = self.peer else { return };
        let most = most.min(self.outgoing.len());
        let bytes: Vec<u8> = self.outgoing.drain(..most).collect();
        world.feed(peer, &bytes);
    }

    /// Reads some of what the server wrote.
    pub(crate) fn read(&mut self, most: usize, world: &mut World) {
        let Some(peer) = self.peer else { return };
        self.incoming.extend(world.read(peer, most));
        let mut used = 0;
        while let Some((message, length)) = world::decode(&self.incoming[used..]) {
            used += length;
            self.hear(&message);
        }
        self.incoming.drain(..used);
        if !world.is_open(peer) && world.waiting(peer) == 0 {
            self.reset();
        }
    }

    fn hear(&mut self, message: &Message) {
        let text = |name: &str| message.json[name].as_str().unwrap_or_default().to_owned();
        let call = || text("id");
        match message.json["action"].as_str() {
            Some("handshake_ack") => {
                self.is_ready = true;
                self.instance = Some(text("instance"));
                self.pools = strings(&message.json["pools"]);
            }
            Some("trigger") => self.jobs.push(Job {
                call: call(),
                credit: message.json["window"].as_u64(),
                items: 0,
            }),
            Some("cancel") => self.finish(&call()),
            Some("ack") => {
                let (call, count) = (call(), message.json["count"].as_u64().unwrap_or(0));
                for job in self.jobs.iter_mut().filter(|job| job.call == call) {
                    job.credit = job.credit.map(|credit| credit + count);
                }
            }
            Some("response") => {
                let id = text("in_reply_to");
                match message.json["status"].as_str() {
                    Some("partial") => {
                        for call in self.calls.iter_mut().filter(|call| call.id == id) {
                            call.unacknowledged += 1;
                        }
                    }
                    Some("progress") => {}
                    _ => self.calls.retain(|call| call.id != id),
                }
            }
            Some("event") if message.json["event"] == "pool_removed" => {
                let gone = text("pool");
                self.pools.retain(|pool| *pool != gone);
            }
            _ => {}
        }
    }

    /// Moves a job to those that have ended.
    pub(crate) fn finish(&mut self, call: &str) {
        self.jobs.retain(|job| job.call != call);
        self.old_jobs.push(call.to_owned());
        if self.old_jobs.len() > OLD_JOBS_MAX {
            self.old_jobs.remove(0);
        }
    }

    /// Usually one of the pools that the client believes it is in.
    pub(crate) fn some_pool(&self, names: &[&str], prng: &mut Prng) -> String {
        if self.pools.is_empty() || prng.below(10) == 0 {
            names[prng.below(names.len())].to_owned()
        } else {
            self.pools[prng.below(self.pools.len())].clone()
        }
    }
}

/// The strings of a JSON array.
pub(crate) fn strings(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// Headers with a tag by which the checkers recognize a message.
pub(crate) fn tagged(tag: u64) -> Value {
    json!({"tag": tag.to_string()})
}
