//! A client that registers and creates pools and persistent blocks, and a model of what was
//! acknowledged.

use std::collections::{BTreeMap, BTreeSet};

use latzero_tests::Wire;
use serde_json::{Value, json};

use crate::random::Random;
use crate::round::{Gone, Round, ask, ok, reply};

/// Steps during one life of the server.
const STEPS: u64 = 25;

/// The acknowledged state, and the state if the request that a kill interrupted was carried out.
#[derive(Debug, Clone, Default)]
struct Known<T> {
    stored: T,
    requested: Option<T>,
}

impl<T: PartialEq + Clone + std::fmt::Debug> Known<T> {
    fn request(&mut self, then: T) {
        self.requested = Some(then);
    }

    fn acknowledge(&mut self) {
        if let Some(then) = self.requested.take() {
            self.stored = then;
        }
    }

    /// Whatever is found must equal one of both.
    fn check(&mut self, what: &str, found: T) {
        let fits = found == self.stored || self.requested.as_ref() == Some(&found);
        assert!(fits, "{what} is {found:?} and should be {self:?}");
        *self = Known {
            stored: found,
            requested: None,
        };
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Registration {
    pools: BTreeSet<String>,
    triggers: BTreeSet<String>,
}

#[derive(Clone, PartialEq)]
struct Block {
    generation: u64,
    version: u64,
    content: Vec<u8>,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum = self.content.iter().fold(0u64, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
        let (generation, version, size) = (self.generation, self.version, self.content.len());
        write!(
            f,
            "generation {generation} version {version} of {size} bytes with sum {sum:x}"
        )
    }
}

/// A client, over all lives of the server.
pub(crate) struct Actor {
    name: String,
    random: Random,
    registration: Known<Option<Registration>>,
    pools: BTreeMap<String, Known<Option<u64>>>,
    blocks: BTreeMap<String, Known<Option<Block>>>,
    /// The states of each block since it was last certainly on the disk: after the machine ends,
    /// the block is in one of these.
    since_flush: BTreeMap<String, Vec<Block>>,
    has_lost_power: bool,
    /// The newest fence of each existing block.
    fences: BTreeMap<String, u64>,
    count: u64,
}

impl Actor {
    pub(crate) fn new(n: u64, random: Random) -> Actor {
        let names = |kind: &str| (0..2).map(|k| format!("{kind}{n}-{k}")).collect::<Vec<_>>();
        Actor {
            name: format!("actor{n}"),
            random,
            registration: Known::default(),
            pools: names("d")
                .into_iter()
                .map(|name| (name, Known::default()))
                .collect(),
            blocks: names("k")
                .into_iter()
                .map(|name| (name, Known::default()))
                .collect(),
            since_flush: BTreeMap::new(),
            has_lost_power: false,
            fences: BTreeMap::new(),
            count: 0,
        }
    }

    /// The machine ended: blocks may have gone back to their last flushed state, and no further.
    pub(crate) fn lose_power(&mut self) {
        self.has_lost_power = true;
    }

    /// The number of existing blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
            .values()
            .filter(|known| known.stored.is_some())
            .count()
    }

    /// Checks that everything acknowledged is there after a restart.
    pub(crate) fn verify(&mut self, server: &latzero_tests::site::Daemon) {
        if self.registration.stored.is_none() && self.registration.requested.is_none() {
            // It never connected, so it has nothing that could go back.
            self.has_lost_power = false;
            return;
        }
        let (mut wire, ack) = server.app(json!({"app_id": self.name, "features": ["attachments"]}));
        self.found_registration(&ack);
        let Ok(()) = self.verify_rest(&mut wire) else {
            panic!("the server ends by itself");
        };
    }

    fn found_registration(&mut self, ack: &Value) {
        let found = (ack["rehydrated"] == true).then(|| Registration {
            pools: strings(&ack["pools"]),
            triggers: strings(&ack["triggers"]),
        });
        self.registration.check(&self.name, found.clone());
        if found.is_none() {
            // The server remembers the app from this handshake on.
            let pools = strings(&ack["pools"]);
            let triggers = BTreeSet::new();
            self.registration.stored = Some(Registration { pools, triggers });
        }
    }

    fn verify_rest(&mut self, wire: &mut Wire) -> Result<(), Gone> {
        for (pool, known) in &mut self.pools {
            let reply = ask(wire, json!({"action": "pool_info", "pool": pool}))?;
            let info = &reply["response"];
            let found = match reply["status"] == "ok" {
                true => {
                    assert_eq!(
                        (&info["durable"], &info["owner"]),
                        (&json!(true), &json!(self.name)),
                        "{reply}"
                    );
                    Some(
                        info["properties"]["n"]
                            .as_u64()
                            .unwrap_or_else(|| panic!("{reply}")),
                    )
                }
                false => {
                    assert_eq!(reply["error"]["code"], "no_pool", "{reply}");
                    None
                }
            };
            known.check(pool, found);
        }
        if !self.in_base() {
            ok(
                "join",
                &ask(wire, json!({"action": "pool_join", "pool": "base"}))?,
            );
            if let Some(registration) = &mut self.registration.stored {
                registration.pools.insert("base".into());
            }
        }
        for (block, known) in &mut self.blocks {
            let mut found = read_block(wire, block)?;
            if let Some(found) = &mut found {
                let fence = self.fences.get(block).copied().unwrap_or(0);
                let now = lock(wire, block)?;
                assert!(
                    now > fence,
                    "fence {now} of {block} after {fence} (version {})",
                    found.version
                );
                self.fences.insert(block.clone(), now);
                // A block whose lock was held at the kill moves first, and can be locked only after
                // that.
                let moved = read_block(wire, block)?;
                *found = moved.unwrap_or_else(|| panic!("{block} is gone"));
            } else {
                self.fences.remove(block);
            }
            // The first generation of a new block is unknown if the reply did not arrive.
            if let (None, Some(Some(requested)), Some(found)) =
                (&known.stored, &mut known.requested, &found)
            {
                requested.generation = found.generation;
            }
            let may_be = self.since_flush.entry(block.clone()).or_default();
            if let (true, Some(found)) = (self.has_lost_power, &found) {
                may_be.extend(known.stored.take());
                may_be.extend(known.requested.take().flatten());
                let is_it =
                    |one: &Block| (one.version, &one.content) == (found.version, &found.content);
                assert!(
                    may_be.iter().any(is_it),
                    "{block} is {found:?} and was {may_be:?}"
                );
                known.stored = Some(found.clone());
                may_be.clear();
            } else {
                known.check(block, found);
            }
            may_be.extend(known.stored.clone());
        }
        self.has_lost_power = false;
        Ok(())
    }

    fn in_base(&self) -> bool {
        self.registration
            .stored
            .as_ref()
            .is_some_and(|r| r.pools.contains("base"))
    }

    /// Performs random requests until the server is gone or all steps are done.
    pub(crate) fn run(&mut self, round: &Round<'_>) {
        let done = self.act(round);
        if done.is_ok() {
            round.done();
        }
    }

    fn act(&mut self, round: &Round<'_>) -> Result<(), Gone> {
        let mut wire = self.come(round)?;
        for _ in 0..STEPS {
            round.step();
            match self.random.below(20) {
                0 | 1 => {
                    drop(wire);
                    wire = self.come(round)?;
                }
                2..=5 => self.change_triggers(&mut wire)?,
                6 | 7 => self.change_pools(&mut wire)?,
                8..=10 => self.make_or_remove_pool(&mut wire)?,
                _ => self.change_block(&mut wire)?,
            }
        }
        Ok(())
    }

    /// Connects, with only the AppID or with a new registration.
    fn come(&mut self, round: &Round<'_>) -> Result<Wire, Gone> {
        // State that one instance leaves stays while another is connected, so the earlier one ends
        // first.
        let mut handshake =
            json!({"app_id": self.name, "features": ["attachments"], "takeover": true});
        let is_anew = self.random.one_in(2) || !self.in_base();
        let mut registration = Registration::default();
        if is_anew {
            registration.pools.insert("base".into());
            if self.random.one_in(2) {
                registration.pools.insert(format!("{}-extra", self.name));
            }
            for n in 0..self.random.below(3) {
                registration.triggers.insert(format!("t{n}"));
            }
            handshake["pools"] = json!(registration.pools);
            handshake["triggers"] = json!(registration.triggers);
            self.registration.request(Some(registration));
        }
        let came = round.server.try_app(handshake);
        let (wire, ack) = came
            .unwrap_or_else(|error| panic!("no acknowledgement: {error}"))
            .ok_or(Gone)?;
        assert_eq!(ack["status"], "ok", "{ack}");
        assert_ne!(ack["stored"], false, "{ack}");
        match is_anew {
            true => self.registration.acknowledge(),
            false => self.found_registration(&ack),
        }
        Ok(wire)
    }

    fn registered(&self) -> Registration {
        self.registration.stored.clone().unwrap_or_default()
    }

    fn change_triggers(&mut self, wire: &mut Wire) -> Result<(), Gone> {
        let trigger = format!("t{}", self.random.below(6));
        let mut then = self.registered();
        let action = match self.random.one_in(2) {
            true => {
                then.triggers.insert(trigger.clone());
                "trigger_register"
            }
            false => {
                then.triggers.remove(&trigger);
                "trigger_unregister"
            }
        };
        self.registration.request(Some(then));
        let reply = ask(wire, json!({"action": action, "triggers": [trigger]}))?;
        ok(action, &reply);
        self.registration.acknowledge();
        Ok(())
    }

    fn change_pools(&mut self, wire: &mut Wire) -> Result<(), Gone> {
        let pool = format!("{}-{}", self.name, self.random.below(3));
        let mut then = self.registered();
        let action = match then.pools.remove(&pool) {
            true => "pool_leave",
            false => {
                then.pools.insert(pool.clone());
                "pool_join"
            }
        };
        self.registration.request(Some(then));
        let reply = ask(wire, json!({"action": action, "pool": pool}))?;
        ok(action, &reply);
        self.registration.acknowledge();
        Ok(())
    }

    fn make_or_remove_pool(&mut self, wire: &mut Wire) -> Result<(), Gone> {
        let names: Vec<String> = self.pools.keys().cloned().collect();
        let pool = &names[self.random.below(names.len() as u64) as usize];
        self.count += 1;
        let n = self.count;
        let Some(known) = self.pools.get_mut(pool) else {
            return Ok(());
        };
        let message = match known.stored {
            None => {
                known.request(Some(n));
                json!({"action": "pool_create", "pool": pool, "durable": true,
                    "properties": {"n": n}})
            }
            Some(_) => {
                known.request(None);
                json!({"action": "pool_remove", "pool": pool})
            }
        };
        ok(pool, &ask(wire, message)?);
        known.acknowledge();
        Ok(())
    }

    fn change_block(&mut self, wire: &mut Wire) -> Result<(), Gone> {
        let names: Vec<String> = self.blocks.keys().cloned().collect();
        let block = &names[self.random.below(names.len() as u64) as usize];
        let Some(known) = self.blocks.get_mut(block) else {
            return Ok(());
        };
        let base = |action: &str| json!({"action": action, "pool": "base", "block_id": block});
        let Some(now) = known.stored.clone() else {
            let size = self.random.pick(&[1, 100, 5000, 20_000]);
            let made = Block {
                generation: 1,
                version: 0,
                content: vec![0; size],
            };
            known.request(Some(made.clone()));
            let mut message = base("memory_create");
            message["size"] = size.into();
            message["kind"] = "persistent".into();
            message["slots"] = self.random.pick(&[2, 3]).into();
            let reply = ask(wire, message)?;
            // A name that was used before continues from its last generation.
            let generation = ok(block, &reply)["generation"].as_u64().unwrap_or(0);
            known.request(Some(Block { generation, ..made }));
            known.acknowledge();
            self.fences.insert(block.clone(), 0);
            let made = known.stored.clone();
            self.since_flush
                .insert(block.clone(), made.into_iter().collect());
            return Ok(());
        };
        let mut then = now.clone();
        let since = self.since_flush.entry(block.clone()).or_default();
        let which = self.random.below(16);
        match which {
            0..=7 => {
                let size = now.content.len() as u64;
                let (offset, length) = match self.random.one_in(2) {
                    true => (0, size),
                    false => {
                        let offset = self.random.below(size);
                        (offset, 1 + self.random.below(size - offset))
                    }
                };
                let bytes: Vec<u8> = (0..length).map(|_| self.random.next() as u8).collect();
                let at = offset as usize;
                then.content[at..at + bytes.len()].copy_from_slice(&bytes);
                then.version += 1;
                let version = then.version;
                known.request(Some(then));
                let mut header = base("memory_write");
                header["id"] = "r".into();
                header["offset"] = offset.into();
                let mut frame = Vec::new();
                latzero_protocol::frame::append_attachment(&mut frame, &bytes, |out| {
                    out.extend_from_slice(header.to_string().as_bytes());
                });
                wire.try_send_bytes(&frame).map_err(|_| Gone)?;
                let reply = reply(wire, &header)?;
                assert_eq!(ok(block, &reply)["version"], version, "{block}: {reply}");
            }
            8 | 9 => {
                let reply = ask(wire, base("memory_flush"))?;
                assert_eq!(
                    ok(block, &reply)["version"],
                    now.version,
                    "{block}: {reply}"
                );
            }
            10..=12 => {
                let size = self.random.pick(&[1, 300, 9000, 30_000]);
                then.content.resize(size, 0);
                then.generation += 1;
                let generation = then.generation;
                known.request(Some(then));
                let mut message = base("memory_resize");
                message["size"] = size.into();
                let reply = ask(wire, message)?;
                assert_eq!(
                    ok(block, &reply)["generation"],
                    generation,
                    "{block}: {reply}"
                );
            }
            13 | 14 => {
                let fence = self.fences.get(block).copied().unwrap_or(0);
                // If the lock is held at a kill, the block moves.
                then.generation += 1;
                known.request(Some(then));
                let now = lock(wire, block)?;
                known.requested = None;
                assert!(now > fence, "fence {now} of {block} after {fence}");
                self.fences.insert(block.clone(), now);
            }
            _ => {
                known.request(None);
                ok(block, &ask(wire, base("memory_remove"))?);
                self.fences.remove(block);
            }
        }
        known.acknowledge();
        if matches!(which, 8..=12) {
            since.clear();
        }
        since.extend(known.stored.clone());
        Ok(())
    }
}

fn strings(list: &Value) -> BTreeSet<String> {
    let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// Locks a block and releases the lock; returns its fence.
fn lock(wire: &mut Wire, block: &str) -> Result<u64, Gone> {
    let lock = json!({"action": "memory_lock", "pool": "base", "block_id": block, "wait": 10_000});
    let reply = ask(wire, lock)?;
    let lock = ok(block, &reply);
    let unlock =
        json!({"action": "memory_unlock", "pool": "base", "block_id": block, "lock": lock["lock"]});
    ok(block, &ask(wire, unlock)?);
    Ok(lock["fence"].as_u64().unwrap_or_else(|| panic!("{reply}")))
}

/// The current state of a block; `None` if it does not exist.
fn read_block(wire: &mut Wire, block: &str) -> Result<Option<Block>, Gone> {
    let read = json!({"action": "memory_read", "id": "r", "pool": "base", "block_id": block});
    wire.try_send(&read).map_err(|_| Gone)?;
    loop {
        let got = wire
            .try_receive()
            .unwrap_or_else(|error| panic!("no reply to {read}: {error}"));
        let (reply, bytes) = got.ok_or(Gone)?;
        if reply["in_reply_to"] != "r" {
            continue;
        }
        if reply["status"] != "ok" {
            assert_eq!(reply["error"]["code"], "no_block", "{block}: {reply}");
            return Ok(None);
        }
        let number = |name: &str| {
            reply["response"][name]
                .as_u64()
                .unwrap_or_else(|| panic!("{reply}"))
        };
        return Ok(Some(Block {
            generation: number("generation"),
            version: number("version"),
            content: bytes.unwrap_or_default(),
        }));
    }
}
