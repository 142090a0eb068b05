//! Hostile clients that try to exhaust the server, and a well-behaved pair next to them.
//!
//! The hostile ones connect over TCP with invented names. They read nothing, flood, register many
//! pools and triggers, park calls under many names, request redelivery, keep answers under keys,
//! leave blocks locked and never answer. After every step the ledger equals the sum of what exists,
//! and a call of the well-behaved pair over the Unix socket is decided at once.

use latzero_fabric::{Prng, Transport};

use crate::line::{Event, Peer};
use crate::report::Scenario;
use crate::world::{World, encode_frame};

/// How many connections the strangers have at a time.
const STRANGERS: usize = 12;

pub(crate) struct Hostile {
    prng: Prng,
    polite: Option<(Peer, Peer)>,
    strangers: Vec<Peer>,
    names: u64,
    ids: u64,
    found: Result<(), String>,
}

impl Hostile {
    pub(crate) fn new(seed: u64) -> Self {
        Hostile {
            prng: Prng::new(seed),
            polite: None,
            strangers: Vec::new(),
            names: 0,
            ids: 0,
            found: Ok(()),
        }
    }

    fn say(world: &mut World, peer: Peer, json: &str) {
        world.feed(peer, &encode_frame(json, None));
    }

    fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn stranger(&mut self, world: &mut World) -> Peer {
        self.strangers.retain(|&peer| world.is_open(peer));
        if self.strangers.len() < STRANGERS {
            let peer = world.connect(Transport::Tcp);
            self.names += 1;
            let pools: Vec<String> = (0..self.prng.below(12))
                .map(|n| format!("\"p{n}\""))
                .collect();
            let triggers: Vec<String> = (0..self.prng.below(12))
                .map(|n| format!("\"t{n}\""))
                .collect();
            let handshake = format!(
                r#"{{"action":"handshake","app_id":"stranger{}","pools":["default"{}{}],"triggers":[{}]}}"#,
                self.names % 50,
                if pools.is_empty() { "" } else { "," },
                pools.join(","),
                triggers.join(","),
            );
            Self::say(world, peer, &handshake);
            self.strangers.push(peer);
        }
        self.strangers[self.prng.below(self.strangers.len())]
    }

    fn attack(&mut self, world: &mut World) -> String {
        let peer = self.stranger(world);
        let id = self.next_id();
        let body = "x".repeat(self.prng.below(6000));
        let kind = self.prng.below(12);
        match kind {
            0 => {
                world.hang_up(peer);
                return format!("{peer:?} goes");
            }
            1 => {
                world.read(peer, 1 + self.prng.below(9000));
                return format!("{peer:?} reads a little");
            }
            2 => {
                // Many small messages in one write.
                let flood: Vec<u8> = (0..200)
                    .flat_map(|_| encode_frame(r#"{"action":"ping","id":"f"}"#, None))
                    .collect();
                world.feed(peer, &flood);
                return format!("{peer:?} floods");
            }
            3 => {
                let frame = encode_frame(&format!(r#"{{"action":"emit","data":"{body}"}}"#), None);
                world.feed(peer, &frame[..frame.len() / 2]);
                return format!("{peer:?} leaves a frame unfinished");
            }
            _ => {}
        }
        let trigger = self.prng.below(12);
        let pool = self.prng.below(12);
        let request = match kind {
            4 => {
                format!(
                    r#"{{"action":"emit","process":"t{trigger}","pool":"p{pool}","data":"{body}"}}"#
                )
            }
            5 => format!(
                r#"{{"action":"trigger","id":"{id}","process":"never","park":true,"ttl":2592000000,"data":"{body}"}}"#
            ),
            6 => format!(
                r#"{{"action":"trigger","id":"{id}","process":"t{trigger}","redeliver":true,"data":"{body}"}}"#
            ),
            7 => format!(
                r#"{{"action":"trigger","id":"{id}","process":"echo","headers":{{"idempotency-key":"{id}"}},"data":"{body}"}}"#
            ),
            8 => format!(r#"{{"action":"pool_create","id":"{id}","pool":"made{id}"}}"#),
            9 => format!(
                r#"{{"action":"memory_create","id":"{id}","block_id":"b{pool}","size":{}}}"#,
                1 + body.len()
            ),
            10 => format!(
                r#"{{"action":"memory_lock","id":"{id}","block_id":"b{pool}","wait":600000}}"#
            ),
            _ => format!(r#"{{"action":"trigger","id":"{id}","process":"t{trigger}"}}"#),
        };
        Self::say(world, peer, &request);
        format!("{peer:?} says {}", &request[..request.len().min(100)])
    }

    /// A polite call is answered at once: neither refused nor left waiting.
    fn polite_call(&mut self, world: &mut World) -> Result<(), String> {
        let id = self.next_id();
        let (caller, handler) = *self.polite.get_or_insert_with(|| {
            let mut come = |handshake: &str| {
                let peer = world.connect(Transport::Unix);
                Self::say(world, peer, handshake);
                peer
            };
            let handler =
                come(r#"{"action":"handshake","app_id":"echo","triggers":["echo","polite"]}"#);
            let caller = come(r#"{"action":"handshake","app_id":"caller","transient":true}"#);
            (caller, handler)
        });
        let call = format!(r#"{{"action":"trigger","id":"{id}","process":"polite","data":{id}}}"#);
        Self::say(world, caller, &call);
        for message in world.messages(handler) {
            if message.json["action"] == "trigger" {
                let to = &message.json["id"];
                let echo = &message.json["data"];
                let answer = format!(
                    r#"{{"action":"response","in_reply_to":{to},"status":"ok","response":{echo}}}"#
                );
                Self::say(world, handler, &answer);
            }
        }
        let id = id.to_string();
        let seen = world.messages(caller);
        let is_answered = seen
            .iter()
            .any(|m| m.json["in_reply_to"] == *id && m.json["status"] == "ok");
        if is_answered {
            Ok(())
        } else {
            let seen: Vec<String> = seen.iter().map(|m| m.json.to_string()).collect();
            Err(format!("the polite call {id} was not answered: {seen:?}"))
        }
    }
}

impl Scenario for Hostile {
    fn step(&mut self, world: &mut World) -> String {
        if self.prng.below(20) == 0 {
            let ms = self.prng.below(3000) as u64;
            world.advance(ms);
            world.shed();
            return format!("{ms} ms pass");
        }
        let what = self.attack(world);
        self.found = self.polite_call(world);
        what
    }

    fn check(&mut self, _log: &[Event], world: &World) -> Result<(), String> {
        world.check_ledger();
        self.found.clone()
    }

    fn end(&mut self, at: u32, world: &mut World) -> Result<Option<String>, String> {
        match (at, self.strangers.pop()) {
            (_, Some(peer)) => {
                world.hang_up(peer);
                Ok(Some(format!("{peer:?} goes")))
            }
            (0..1000, None) if self.polite.is_some() => {
                let (caller, handler) = self.polite.take().expect("just seen");
                world.hang_up(caller);
                world.hang_up(handler);
                Ok(Some("the polite ones go".into()))
            }
            _ => Ok(None),
        }
    }

    fn at_end(&self, world: &World) -> Result<(), String> {
        world.check_ledger();
        Ok(())
    }
}
