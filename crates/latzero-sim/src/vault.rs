//! An encrypted pool among apps with all of its keys, some, old ones or wrong ones.
//!
//! Each app proves what it can, and tries what it can't: it proves twice, late, in another's name,
//! with keys of before a rotation. Verdicts may come later than other messages. The model knows
//! which proof is good, and holds every message against it: nobody without a good proof on its
//! connection gets a message of the pool or learns that it is there, and an app that comes back
//! gets what it had behind its proof, and nothing before. A privileged trigger gets messages
//! only from writers.

use std::collections::{BTreeMap, BTreeSet};

use latzero_crypto::descriptor::{Descriptor, History, NewEpoch, NewPool, OldContent};
use latzero_crypto::keys::{KeySet, Kind, NewKeys, Roles, Secret};
use latzero_crypto::proof::{ChannelBinding, Exchange, Joining};
use latzero_crypto::{Suite, text};
use latzero_fabric::{Prng, Time, Transport};
use serde_json::{Value, json};

use crate::line::{Event, Peer};
use crate::report::{Reached, Scenario};
use crate::world::{Message, World, encode_frame};

type Found = Result<(), String>;

/// The pool's name, which is in no other message.
const POOL: &str = "vault";

/// The trigger that its handlers register as privileged.
const PRIVILEGED: &str = "admin";

/// How everything sealed begins, and nothing else.
const SEALED: &str = "TFpFVgAB";

const APPS: usize = 8;

/// How long a challenge holds, in milliseconds.
const CHALLENGE_MS: u64 = 30_000;

/// What the keys are made of: for joining, reading, writing.
type Seeds = [u8; 3];

fn key_set(seeds: Seeds) -> KeySet {
    let [sigil, shard, seal] = seeds.map(|seed| Secret::new([seed; 32]));
    let owner = None;
    KeySet::new_pool(NewKeys {
        sigil,
        shard,
        seal,
        owner,
    })
}

/// Those of the keys that a role has.
fn held(seeds: Seeds, roles: Roles) -> KeySet {
    let set = key_set(seeds);
    let kinds: &[Kind] = match roles {
        Roles::Join => &[Kind::Sigil],
        Roles::Read => &[Kind::Sigil, Kind::Shard],
        Roles::Write => &[Kind::Sigil, Kind::Shard, Kind::Seal],
    };
    let tokens = kinds.iter().map(|kind| set.token(*kind));
    let tokens: Vec<_> = tokens
        .map(|token| token.expect("every client is connected"))
        .collect();
    let held = KeySet::from_tokens(tokens.iter().map(|token| token.as_str()));
    held.expect("they belong together")
}

/// What apps serve.
fn triggers() -> Value {
    json!(["work", "late", {"name": PRIVILEGED, "privileged": true}])
}

/// A challenge that an app was given.
struct Challenge {
    said: Value,
    at: Time,
    is_spent: bool,
}

/// A proof whose verdict has not come.
struct Asked {
    id: String,
    roles: Roles,
    epoch: u64,
    /// Good, but for what happens until the verdict.
    is_good: bool,
}

/// An app, on one connection at a time.
struct App {
    name: String,
    roles: Roles,
    /// The keys that it has, which may be old.
    seeds: Seeds,
    peer: Option<Peer>,
    is_ready: bool,
    challenge: Option<Challenge>,
    asked: Option<Asked>,
    /// What it proved on this connection.
    proved: Option<Roles>,
    /// The server remembers it in the pool.
    is_remembered: bool,
    calls: Vec<String>,
    /// Calls that are kept for it, whatever becomes of its connection.
    parked: BTreeSet<String>,
}

pub(crate) struct Vault {
    prng: Prng,
    apps: Vec<App>,
    /// The pool's own.
    seeds: Seeds,
    descriptor: Option<Descriptor>,
    /// Those of the epoch before.
    before: Seeds,
    /// The rotation that the owner asked for.
    next: Option<(Descriptor, Seeds)>,
    ids: u64,
    is_holding: bool,
    reached: BTreeMap<&'static str, u64>,
    found: Found,
}

impl Vault {
    pub(crate) fn new(seed: u64) -> Self {
        let seeds = [1, 2, 3];
        let app = |at: usize| App {
            name: format!("app{at}"),
            roles: [Roles::Write, Roles::Write, Roles::Read, Roles::Join][at % 4],
            // The last one never had the keys.
            seeds: if at == APPS - 1 { [91, 92, 93] } else { seeds },
            peer: None,
            is_ready: false,
            challenge: None,
            asked: None,
            proved: None,
            is_remembered: false,
            calls: Vec::new(),
            parked: BTreeSet::new(),
        };
        Vault {
            prng: Prng::new(seed),
            apps: (0..APPS).map(app).collect(),
            seeds,
            before: seeds,
            descriptor: None,
            next: None,
            ids: 0,
            is_holding: false,
            reached: BTreeMap::new(),
            found: Ok(()),
        }
    }

    fn id(&mut self, kind: &str) -> String {
        self.ids += 1;
        format!("{kind}-{}", self.ids)
    }

    fn note(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    fn epoch(&self) -> u64 {
        self.descriptor.as_ref().map_or(0, |d| d.epoch().into())
    }

    fn say(&self, at: usize, world: &mut World, message: &Value) {
        if let Some(peer) = self.apps[at].peer {
            world.feed(peer, &encode_frame(&message.to_string(), None));
        }
    }

    fn act(&mut self, at: usize, world: &mut World) -> String {
        if self.apps[at].peer.is_none() {
            self.apps[at].peer = Some(world.connect(Transport::Tcp));
            let mut hello = json!({"action": "handshake", "app_id": self.apps[at].name});
            match self.prng.below(3) {
                0 => hello["pools"] = json!(["default"]),
                1 => hello["encrypted_pools"] = json!([POOL]),
                _ => {}
            }
            if self.prng.below(2) == 0 {
                hello["triggers"] = triggers();
            }
            self.say(at, world, &hello);
            return format!("comes: {hello}");
        }
        let rotates = at == 0 && self.next.is_some();
        if self.apps[at].asked.is_some() || rotates {
            return "waits for a verdict".into();
        }
        // Most apps try to get in first.
        let app = &self.apps[at];
        let is_out = app.is_ready && app.proved.is_none() && self.prng.below(2) == 0;
        let can_prove = app
            .challenge
            .as_ref()
            .is_some_and(|challenge| !challenge.is_spent);
        let has_no_pool = at == 0 && app.is_ready && self.descriptor.is_none();
        let what = match (is_out, can_prove) {
            _ if has_no_pool => 9,
            (true, true) => 5,
            (true, false) => 1,
            (false, _) => self.prng.below(20),
        };
        let message = match what {
            0 => {
                let peer = self.apps[at].peer.expect("just checked");
                world.hang_up(peer);
                self.forget_connection(at);
                return "goes".into();
            }
            1..=4 => {
                let id = self.id("c");
                json!({"action": "pool_challenge", "pool": POOL, "id": id})
            }
            5..=8 => match self.prove(at, world.now(), true) {
                Some(proof) => proof,
                None => return "has no challenge".into(),
            },
            9 | 12 => match self.rotate(at) {
                Some(rotation) => rotation,
                None => return "does not rotate".into(),
            },
            10 => {
                self.apps[at].seeds = match at == APPS - 1 {
                    true => [91, 92, 93],
                    false => self.seeds,
                };
                return "is given the keys".into();
            }
            11 => {
                let id = self.id("l");
                let action = ["pool_list", "app_list"][self.prng.below(2)];
                json!({"action": action, "id": id})
            }
            _ => self.request(at),
        };
        self.say(at, world, &message);
        format!("says {message}")
    }

    /// Something in the pool, whether it may or not.
    fn request(&mut self, at: usize) -> Value {
        let id = self.id("v");
        let block = format!("b{}", self.prng.below(4));
        let data = format!("{SEALED}{}", "A".repeat(self.prng.below(40)));
        let work = ["work", PRIVILEGED][self.prng.below(2)];
        let mut message = match self.prng.below(12) {
            0..=1 => json!({"action": "trigger", "process": work, "data": data}),
            2..=3 => json!({
                "action": "trigger", "process": "late", "data": data, "park": true,
                "ttl": 20 * 24 * 3_600_000_u64,
            }),
            4 => json!({"action": "emit", "process": work, "data": data}),
            5 => json!({"action": "watch"}),
            6 => json!({"action": "pool_info"}),
            7 => {
                let uid = text::encode(&[self.ids as u8; 16]);
                json!({"action": "memory_create", "block_id": block, "size": 70_000,
                    "block_uid": uid, "attach": false})
            }
            8 => json!({"action": "memory_subscribe", "block_id": block}),
            9 => json!({"action": "memory_list"}),
            10 => json!({"action": "memory_lock", "block_id": block, "mode": "shared"}),
            _ if self.prng.below(6) == 0 => {
                let id = self.id("leave");
                return json!({"action": "pool_leave", "pool": POOL, "id": id});
            }
            _ => {
                return json!({"action": "trigger_register", "id": self.id("t"),
                    "triggers": triggers()});
            }
        };
        message["pool"] = POOL.into();
        message["id"] = id.into();
        // An answer to each call that waits here, sometimes.
        if self.prng.below(2) == 0
            && let Some(call) = self.apps[at].calls.pop()
        {
            return json!({"action": "response", "in_reply_to": call, "status": "ok",
                "response": data});
        }
        message
    }

    /// A proof for the challenge at hand, most of the time a good one of this app.
    fn prove(&mut self, at: usize, now: Time, may_lie: bool) -> Option<Value> {
        let challenge = self.apps[at].challenge.as_ref()?;
        let said = challenge.said.clone();
        let is_fresh =
            !challenge.is_spent && now.since(challenge.at).as_millis() as u64 <= CHALLENGE_MS;
        fn binary<const N: usize>(value: &Value) -> [u8; N] {
            let text = value.as_str().unwrap_or_default();
            text::decode(text).expect("a challenge has fields of their size")
        }
        let (mut name, roles) = (self.apps[at].name.clone(), self.apps[at].roles);
        if may_lie && self.prng.below(10) == 0 {
            name = format!("app{}", (at + 1) % APPS);
        }
        let is_own = name == self.apps[at].name;
        let (seeds, epoch) = (self.apps[at].seeds, said["epoch"].as_u64()?);
        let joining = Joining {
            pool: POOL,
            pool_id: binary(&said["pool_id"]),
            epoch: u32::try_from(epoch).ok()?,
            suite: 1,
            app_id: &name,
            exchange: Exchange {
                client_nonce: [self.prng.below(256) as u8; 32],
                server_nonce: binary(&said["server_nonce"]),
                server_instance: binary(&said["server_instance"]),
                binding: ChannelBinding::None,
            },
        };
        let proof = joining.prove(&held(seeds, roles), roles).ok()?;
        let proof: Value = serde_json::from_str(&proof.to_json()).ok()?;
        let id = self.id("p");
        // Reader and joiner have no use for the keys that they lack.
        let known = match roles {
            Roles::Join => 1,
            Roles::Read => 2,
            Roles::Write => 3,
        };
        let is_there = said["pool_id"] == text::encode(&[5; 16]);
        let has_keys = seeds[..known] == self.seeds[..known];
        let app = &mut self.apps[at];
        app.challenge.as_mut()?.is_spent = true;
        app.asked = Some(Asked {
            id: id.clone(),
            roles,
            epoch,
            is_good: is_fresh && is_own && has_keys && is_there,
        });
        Some(json!({"action": "pool_join", "pool": POOL, "id": id, "proof": proof}))
    }

    /// The first app makes the pool, and moves it to other keys now and then.
    fn rotate(&mut self, at: usize) -> Option<Value> {
        if at != 0 || !self.apps[0].is_ready || self.next.is_some() {
            return None;
        }
        let Some(current) = &self.descriptor else {
            let pool = NewPool {
                name: POOL,
                suite: Suite::Sealed,
                pool_id: [5; 16],
                salt: [6; 32],
                created_ms: 1,
                wrap_nonce: [7; 24],
            };
            let first = Descriptor::create(&key_set(self.seeds), &pool).ok()?;
            let descriptor = text::encode(first.as_bytes());
            self.next = Some((first, self.seeds));
            let id = self.id("r");
            return Some(
                json!({"action": "pool_create", "pool": POOL, "encrypted": true,
                "descriptor": descriptor, "id": id}),
            );
        };
        let fresh = 10 + (self.epoch() as u8 % 20) * 3;
        let [join, read, write] = self.seeds;
        let seeds = match self.prng.below(4) {
            0 => self.seeds,
            1 => [fresh, fresh + 1, write],
            2 => [fresh, fresh + 1, fresh + 2],
            _ => [join, read, fresh + 2],
        };
        let to = NewEpoch {
            salt: [fresh; 32],
            created_ms: 2,
            wrap_nonce: [fresh; 24],
            content: OldContent::AsBefore,
            history: History::Cut,
        };
        let next = current
            .rotate(&key_set(self.seeds), &key_set(seeds), &to)
            .ok()?;
        let descriptor = text::encode(next.as_bytes());
        self.next = Some((next, seeds));
        let id = self.id("r");
        Some(json!({"action": "pool_rotate", "pool": POOL, "descriptor": descriptor, "id": id}))
    }

    fn forget_connection(&mut self, at: usize) {
        let app = &mut self.apps[at];
        app.peer = None;
        app.is_ready = false;
        app.challenge = None;
        app.asked = None;
        app.proved = None;
        app.calls.clear();
        if at == 0 {
            self.next = None;
        }
    }

    /// Everybody reads what came.
    fn read(&mut self, world: &mut World) -> Found {
        // The owner knows first whether the pool has another epoch.
        for at in 0..APPS {
            let Some(peer) = self.apps[at].peer else {
                continue;
            };
            for message in world.messages(peer) {
                self.hear(at, &message, world.now())
                    .map_err(|why| format!("{} got {}: {why}", self.apps[at].name, message.json))?;
            }
            if !world.is_open(peer) {
                self.forget_connection(at);
            }
        }
        Ok(())
    }

    fn hear(&mut self, at: usize, message: &Message, now: Time) -> Found {
        let json = &message.json;
        let text = json.to_string();
        let field = |name: &str| json[name].as_str().unwrap_or_default();
        let (action, of) = (field("action").to_owned(), field("in_reply_to").to_owned());
        let is_ok = field("status") == "ok";
        let code = json["error"]["code"].as_str().unwrap_or_default();
        let kind = of.split('-').next().unwrap_or_default();
        if message.attachment.is_some() {
            return Err("nobody sends attachments".into());
        }
        if self.apps[at]
            .asked
            .as_ref()
            .is_some_and(|asked| asked.id == of)
        {
            return self.hear_verdict(at, is_ok, code, json);
        }
        if kind == "r" {
            if let Some((next, seeds)) = self.next.take().filter(|_| is_ok) {
                self.descriptor = Some(next);
                self.before = std::mem::replace(&mut self.seeds, seeds);
                if self.before[..2] != seeds[..2] {
                    // What was sealed for the readers of before has ended.
                    self.apps.iter_mut().for_each(|app| app.parked.clear());
                }
                self.note("rotations");
            }
            return Ok(());
        }
        if kind == "leave" && is_ok {
            let app = &mut self.apps[at];
            app.is_remembered = false;
            return match app.proved.take() {
                Some(_) => Ok(()),
                None => Err("it left what it was not in".into()),
            };
        }
        if kind == "c" && is_ok {
            let said = json["response"].clone();
            let is_spent = false;
            self.apps[at].challenge = Some(Challenge {
                said,
                at: now,
                is_spent,
            });
            return Ok(());
        }
        let proved = self.apps[at].proved;
        if matches!(action.as_str(), "trigger" | "emit") && field("process") == PRIVILEGED {
            self.note("privileged");
            let sender = json["origin"]["app_id"].as_str();
            let sender = self.apps.iter().find(|app| sender == Some(&app.name));
            if sender.is_none_or(|app| app.proved != Some(Roles::Write)) {
                return Err("its sender is no writer".into());
            }
        }
        if action == "event" && field("event") == "pool_rotated" {
            return self.hear_rotation(at, json);
        }
        match action.as_str() {
            "handshake_ack" => {
                self.apps[at].is_ready = true;
                if text.contains(POOL) {
                    return Err("a handshake gives nothing back of the pool".into());
                }
                return Ok(());
            }
            "trigger" if text.contains(SEALED) => {
                self.note("calls");
                self.apps[at].calls.push(field("id").to_owned());
                if proved != Some(Roles::Write) {
                    return Err("it may not serve".into());
                }
            }
            "emit" if text.contains(SEALED) => {
                self.note("emits");
                if !matches!(proved, Some(Roles::Read | Roles::Write)) {
                    return Err("it may not read".into());
                }
            }
            "response" if text.contains(SEALED) => {
                self.note("answers");
                if !matches!(proved, Some(Roles::Read | Roles::Write)) {
                    return Err("it may not read".into());
                }
            }
            _ => {}
        }
        if action == "response" && field("status") == "parked" {
            self.apps[at].parked.insert(of);
            return Ok(());
        }
        if action == "response" {
            self.apps[at].parked.remove(&of);
        }
        // Its own words come back to it, in refusals; that of a trigger names a pool that it was
        // in.
        let is_about_own = !is_ok && matches!(kind, "v" | "c" | "leave" | "t") || action == "error";
        if proved.is_none() && !is_about_own && (text.contains(POOL) || text.contains(SEALED)) {
            return Err("it has proved nothing".into());
        }
        if kind == "v" && is_ok && proved.is_none() {
            return Err("it was let do something without a proof".into());
        }
        Ok(())
    }

    fn hear_verdict(&mut self, at: usize, is_ok: bool, code: &str, json: &Value) -> Found {
        let asked = self.apps[at].asked.take().expect("just checked");
        let is_good = asked.is_good && asked.epoch == self.epoch();
        if !is_ok {
            self.note("refused");
            return match code {
                "unauthenticated" if is_good => Err("its proof is good".into()),
                "unauthenticated" => Ok(()),
                "overloaded" if self.is_holding => Ok(()),
                _ => Err("a proof has another end".into()),
            };
        }
        if !is_good {
            return Err("its proof is not good".into());
        }
        self.note("proved");
        let app = &mut self.apps[at];
        let reply = &json["response"];
        if reply["roles"] != asked.roles.number() {
            return Err("it has other roles than it proved".into());
        }
        if reply["rehydrated"] != app.is_remembered {
            return Err(format!("remembered: {}", app.is_remembered));
        }
        app.proved = Some(asked.roles);
        if std::mem::replace(&mut app.is_remembered, true) {
            self.note("rehydrated");
        }
        Ok(())
    }

    fn hear_rotation(&mut self, at: usize, json: &Value) -> Found {
        let stays = json["member"] == true;
        let Some(roles) = self.apps[at].proved else {
            return Err("it was no member".into());
        };
        // The owner hears the event before its reply.
        let pending = self.next.as_ref().map(|(_, seeds)| *seeds);
        let (old, new) = match pending {
            Some(new) => (self.seeds, new),
            None => (self.before, self.seeds),
        };
        let known = match roles {
            Roles::Join => 1,
            Roles::Read => 2,
            Roles::Write => 3,
        };
        if stays != (old[..known] == new[..known]) {
            return Err(format!("keys {old:?} became {new:?}"));
        }
        if !stays {
            self.note("dropped");
            self.apps[at].proved = None;
        }
        Ok(())
    }
}

impl Scenario for Vault {
    fn step(&mut self, world: &mut World) -> String {
        let what = match self.prng.below(60) {
            0 => {
                // Sometimes longer than a challenge holds.
                let ms = self.prng.below(40_000) as u64;
                world.advance(ms);
                format!("{ms} ms pass")
            }
            1 if self.prng.below(6) == 0 => {
                world.restart(self.prng.next_u64());
                (0..APPS).for_each(|at| self.forget_connection(at));
                "the server crashes and restarts".into()
            }
            // One verdict in each step: the order of messages to different apps is not seen.
            2 if self.is_holding && world.check_proof() => "a verdict comes".into(),
            2 => {
                self.is_holding = !self.is_holding;
                world.hold_proofs(self.is_holding);
                format!("verdicts come later: {}", self.is_holding)
            }
            3..=9 if self.is_holding => {
                world.check_proof();
                "a verdict comes".into()
            }
            _ => {
                let at = self.prng.below(APPS);
                let what = self.act(at, world);
                format!("{} {what}", self.apps[at].name)
            }
        };
        self.found = self.read(world);
        what
    }

    fn check(&mut self, _log: &[Event], world: &World) -> Found {
        world.check_ledger();
        self.found.clone()
    }

    /// Everybody comes back with the keys, as a writer, and answers what waits.
    fn end(&mut self, at: u32, world: &mut World) -> Result<Option<String>, String> {
        let at = at as usize;
        if self.descriptor.is_none() || at > 2 * APPS {
            return Ok(None);
        }
        if at == 0 {
            while world.check_proof() {
                self.read(world)?;
            }
            world.hold_proofs(false);
            self.is_holding = false;
            self.read(world)?;
            for at in 0..APPS {
                if let Some(peer) = self.apps[at].peer {
                    world.hang_up(peer);
                }
                self.forget_connection(at);
                // What that did to the others.
                self.read(world)?;
            }
            return Ok(Some("all go".into()));
        }
        let at = (at - 1) % APPS;
        if self.apps[at].peer.is_none() {
            let app = &mut self.apps[at];
            (app.roles, app.seeds) = (Roles::Write, self.seeds);
            app.peer = Some(world.connect(Transport::Tcp));
            let hello = json!({"action": "handshake", "app_id": app.name, "triggers": ["late"]});
            self.say(at, world, &hello);
            let id = self.id("c");
            let ask = json!({"action": "pool_challenge", "pool": POOL, "id": id});
            self.say(at, world, &ask);
            self.read(world)?;
            // A challenge of before counts no more.
            while self.apps[at].proved.is_none() {
                if let Some(proof) = self.prove(at, world.now(), false) {
                    self.say(at, world, &proof);
                    self.read(world)?;
                }
                let id = self.id("c");
                let ask = json!({"action": "pool_challenge", "pool": POOL, "id": id});
                self.say(at, world, &ask);
                self.read(world)?;
                if self.apps[at].peer.is_none() {
                    return Err("it was sent away".into());
                }
            }
            return Ok(Some(format!("{} is back", self.apps[at].name)));
        }
        while let Some(call) = self.apps[at].calls.pop() {
            let answer = json!({"action": "response", "in_reply_to": call, "status": "ok",
                "response": SEALED});
            self.say(at, world, &answer);
            self.read(world)?;
        }
        Ok(Some(format!("{} answers", self.apps[at].name)))
    }

    /// Whoever parked a call has its answer.
    fn at_end(&self, world: &World) -> Found {
        world.check_ledger();
        match self.apps.iter().find(|app| !app.parked.is_empty()) {
            Some(app) => Err(format!("{} waits for {:?}", app.name, app.parked)),
            None => Ok(()),
        }
    }

    fn reached(&self) -> Reached {
        self.reached.clone()
    }
}
