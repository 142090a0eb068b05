//! A simulated server, and shorthand with which tests describe what its clients see.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeMap;

use latzero_fabric::{Limits, Transport};
use latzero_sim::{Bounds, Message, Peer, World, encode_frame};
use serde_json::Value;

/// A server with clients that the test drives step by step.
pub(crate) struct Net {
    pub(crate) world: World,
    /// The ids of the calls that each client received, in order.
    calls: BTreeMap<Peer, Vec<String>>,
}

impl Net {
    pub(crate) fn new() -> Self {
        Self::with(|_| ())
    }

    /// A server with limits that differ from the defaults.
    pub(crate) fn with(change: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        change(&mut limits);
        Self::bounded(limits, Bounds::default())
    }

    pub(crate) fn bounded(limits: Limits, bounds: Bounds) -> Self {
        Net {
            world: World::new(7, limits, bounds),
            calls: BTreeMap::new(),
        }
    }

    pub(crate) fn connect(&mut self) -> Peer {
        self.world.connect(Transport::Unix)
    }

    pub(crate) fn connect_stranger(&mut self) -> Peer {
        self.world.connect(Transport::Tcp)
    }

    /// An app of a different user than all others.
    pub(crate) fn stranger(&mut self, app_id: &str, more: &str) -> Peer {
        let peer = self.connect_stranger();
        let more = comma(more);
        let handshake = format!(r#"{{"action":"handshake","app_id":"{app_id}"{more}}}"#);
        let seen = self.ask(peer, &handshake);
        assert!(seen.starts_with("hello "), "{app_id}: {seen}");
        peer
    }

    /// An app that is connected; `more` has further fields of its handshake.
    pub(crate) fn app(&mut self, app_id: &str, more: &str) -> Peer {
        let (peer, seen) = self.hello(app_id, more);
        assert!(seen.starts_with("hello "), "{app_id}: {seen}");
        peer
    }

    /// Sends a handshake; returns the app and what it sees.
    pub(crate) fn hello(&mut self, app_id: &str, more: &str) -> (Peer, String) {
        let peer = self.connect();
        let more = comma(more);
        let seen = self.ask(
            peer,
            &format!(r#"{{"action":"handshake","app_id":"{app_id}"{more}}}"#),
        );
        (peer, seen)
    }

    pub(crate) fn say(&mut self, peer: Peer, json: &str) {
        self.world.feed(peer, &encode_frame(json, None));
        self.world.check();
    }

    pub(crate) fn say_raw(&mut self, peer: Peer, json: &str, raw: &[u8]) {
        self.world.feed(peer, &encode_frame(json, Some(raw)));
        self.world.check();
    }

    /// Sends a message; returns what the client then sees.
    pub(crate) fn ask(&mut self, peer: Peer, json: &str) -> String {
        self.say(peer, json);
        self.sees(peer)
    }

    /// Calls trigger `t` with this id; returns what the caller then sees.
    pub(crate) fn call(&mut self, peer: Peer, id: &str, more: &str) -> String {
        let more = comma(more);
        self.ask(
            peer,
            &format!(r#"{{"action":"trigger","process":"t","id":"{id}"{more}}}"#),
        )
    }

    /// Answers the latest call; returns what the handler then sees.
    pub(crate) fn answer(&mut self, peer: Peer, fields: &str) -> String {
        let call = self.last_call(peer);
        self.answer_to(peer, &call, fields)
    }

    pub(crate) fn answer_to(&mut self, peer: Peer, call: &str, fields: &str) -> String {
        self.ask(
            peer,
            &format!(r#"{{"action":"response","in_reply_to":"{call}",{fields}}}"#),
        )
    }

    /// The id of the latest call.
    pub(crate) fn last_call(&mut self, peer: Peer) -> String {
        self.sees(peer);
        let calls = self.calls.get(&peer).expect("it was called");
        calls.last().expect("it was called").clone()
    }

    /// The ids of all calls that a client received.
    pub(crate) fn calls_of(&mut self, peer: Peer) -> Vec<String> {
        self.sees(peer);
        self.calls.get(&peer).cloned().unwrap_or_default()
    }

    pub(crate) fn messages(&mut self, peer: Peer) -> Vec<Message> {
        let messages = self.world.messages(peer);
        for message in &messages {
            if message.json["action"] == "trigger" {
                let id = message.json["id"].as_str().expect("a call has an id");
                self.calls.entry(peer).or_default().push(id.to_owned());
            }
        }
        messages
    }

    /// What a client received since the last look, messages separated by `; `, with `(closed)` at
    /// the end if the connection was closed.
    pub(crate) fn sees(&mut self, peer: Peer) -> String {
        let mut seen: Vec<String> = self.messages(peer).iter().map(gist).collect();
        if !self.world.is_open(peer) {
            seen.push("(closed)".into());
        }
        seen.join("; ")
    }

    /// Returns how often a pool's deadline passed.
    pub(crate) fn advance(&mut self, ms: u64) -> usize {
        let steps = self.world.advance(ms);
        self.world.check();
        steps
    }

    pub(crate) fn hang_up(&mut self, peer: Peer) {
        self.world.hang_up(peer);
        self.world.check();
    }
}

fn comma(more: &str) -> String {
    if more.is_empty() {
        String::new()
    } else {
        format!(",{more}")
    }
}

/// A message in short form: its kind, its id, and the fields that tests compare.
fn gist(message: &Message) -> String {
    let json = &message.json;
    let word = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    let field = |name: &str| word(&json[name]);
    let body = |name: &str| match &message.attachment {
        Some(raw) => format!("raw:{}", raw.escape_ascii()),
        None if json["encoding"].is_string() => format!("{}:{}", field("encoding"), field(name)),
        None => json[name].to_string(),
    };
    let from = || word(&json["origin"]["app_id"]);
    let error = || match &json["error"]["ran"] {
        Value::Null => word(&json["error"]["code"]),
        ran => format!("{} ran={}", word(&json["error"]["code"]), word(ran)),
    };
    match (field("action").as_str(), field("status").as_str()) {
        ("handshake_ack", _) => {
            let rehydrated = if json["rehydrated"] == true {
                " rehydrated"
            } else {
                ""
            };
            format!("hello {} {}{rehydrated}", json["pools"], json["triggers"])
        }
        ("trigger", _) => format!(
            "call {} from {}: {}",
            field("process"),
            from(),
            body("data")
        ),
        ("emit", _) => format!(
            "emit {} from {}: {}",
            field("process"),
            from(),
            body("data")
        ),
        ("response", "error") => format!("{} failed: {}", field("in_reply_to"), error()),
        ("response", status) => format!("{} {status}: {}", field("in_reply_to"), body("response")),
        ("error", _) => format!("error {}", error()),
        ("cancel", _) => format!("cancel {}", field("reason")),
        ("ack", _) => format!("ack {}", field("count")),
        ("event", _) => {
            let parts = [
                field("event"),
                field("pool"),
                field("app_id"),
                field("trigger"),
                field("count"),
                field("block_id"),
                field("version"),
                field("reason"),
            ];
            let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
            parts.join(" ")
        }
        _ => json.to_string(),
    }
}
