//! The checkers: a model of what clients were promised, held against everything that happens.
//!
//! The model shares no code with the fabric. It learns from the log alone: what the server took in, what it wrote, and
//! when. After every step it must be able to account for each message that was sent, and nothing may be missing.
//!
//! Messages carry a tag in their headers, which the server passes through; by it a delivery is tied to its call.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use latzero_fabric::keep::AppRow;
use latzero_fabric::{Class, Count, Limits, Time};
use latzero_protocol::Code;
use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_POOL, TTL_DEFAULT_MS};
use serde_json::Value;

use crate::client::strings;
use crate::outbox::{Event, Peer};
use crate::world::{self, Message, World};

/// What a checker found wrong.
pub(crate) type Found = String;

macro_rules! ensure {
    ($holds:expr, $($what:tt)*) => {
        if !$holds {
            return Err(format!($($what)*));
        }
    };
}

/// A trigger as it was registered.
#[derive(Debug, Clone, Default, PartialEq)]
struct Spec {
    pools: Option<Vec<String>>,
    concurrency: Option<u64>,
}

/// What an app registered last.
#[derive(Debug, Clone, Default)]
struct Registered {
    pools: BTreeSet<String>,
    triggers: BTreeMap<String, Spec>,
    watches: BTreeMap<String, Option<Vec<String>>>,
}

#[derive(Debug, Default)]
struct Conn {
    is_open: bool,
    app: Option<String>,
    instance: String,
    attachments: bool,
    pools: BTreeSet<String>,
    triggers: BTreeMap<String, Spec>,
    watches: BTreeMap<String, Option<Vec<String>>>,
    /// Its calls in flight, by id.
    calls: BTreeMap<String, u64>,
    /// The newest call that it sent to each handler.
    newest: BTreeMap<Peer, u64>,
    /// How often it began to serve anew, by pool and trigger.
    epochs: BTreeMap<(String, String), u64>,
}

impl Conn {
    fn serves(&self, pool: &str, process: &str) -> bool {
        self.is_open
            && pool != SYSTEM_POOL
            && self.pools.contains(pool)
            && self
                .triggers
                .get(process)
                .is_some_and(|spec| is_for(spec, pool))
    }

    fn presence(&self) -> Presence {
        let serves = |pool: &String| {
            let served = self.triggers.keys().filter(|name| self.serves(pool, name));
            let served: Vec<_> = served
                .map(|name| (pool.clone(), Some(name.clone())))
                .collect();
            served
        };
        let served = self.pools.iter().flat_map(serves);
        served
            .chain(self.pools.iter().map(|pool| (pool.clone(), None)))
            .collect()
    }

    fn watches(&self, pool: &str, event: &str) -> bool {
        let wanted = self.watches.get(pool);
        let wants = |events: &Option<Vec<String>>| {
            events
                .as_ref()
                .is_none_or(|events| events.iter().any(|e| e == event))
        };
        self.is_open && self.pools.contains(pool) && wanted.is_some_and(wants)
    }

    fn is_meant(&self, destination: &Value) -> bool {
        let app = self.app.as_deref();
        match destination {
            Value::Null => true,
            Value::String(wanted) => app == Some(wanted),
            _ => {
                let instance = destination["instance"].as_str();
                destination["app_id"].as_str() == app
                    && instance.is_none_or(|wanted| wanted == self.instance)
            }
        }
    }

    /// Leaves a pool: what it served there it serves no longer.
    fn leave(&mut self, pool: &str) {
        self.pools.remove(pool);
        self.watches.remove(pool);
        for ((_, _), epoch) in self.epochs.iter_mut().filter(|((p, _), _)| p == pool) {
            *epoch += 1;
        }
    }
}

fn is_for(spec: &Spec, pool: &str) -> bool {
    spec.pools
        .as_ref()
        .is_none_or(|pools| pools.iter().any(|p| p == pool))
}

/// A call in flight.
#[derive(Debug)]
struct Call {
    caller: Peer,
    id: Option<String>,
    pool: String,
    process: String,
    request: Message,
    deadline: Time,
    handler: Option<Peer>,
    /// The id that its handler knows it by.
    handle: String,
    epoch: u64,
    window: Option<u64>,
    acknowledged: u64,
    items: u64,
    /// Its handler was told that it ended.
    is_cancelled: bool,
}

/// The pools that a connection is in (`None`), and what it serves in each.
type Presence = BTreeSet<(String, Option<String>)>;

/// The frame that is being handled.
#[derive(Debug)]
struct Current {
    peer: Peer,
    message: Option<Message>,
    /// The call that it makes, if any.
    call: Option<u64>,
    /// It names a call that is in flight already.
    is_duplicate: bool,
    /// Its reply, and whether it was an `error` message instead.
    replies: Vec<Value>,
    errors: u64,
    /// Who got its emit, and who lost it.
    recipients: Vec<Peer>,
    /// Who should.
    meant: BTreeSet<Peer>,
    lost: Vec<Peer>,
    is_refused: bool,
    /// It is in force, but could not be stored.
    is_unstored: bool,
    /// Where the sender was and what it served before.
    presence: Presence,
    /// Who was told of which change.
    told: BTreeSet<(Peer, String, String, Option<String>)>,
    /// The handler's answer was passed on, or its call ended otherwise.
    is_answered: bool,
}

/// The model.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    now: Time,
    conns: BTreeMap<Peer, Conn>,
    apps: BTreeMap<String, Registered>,
    calls: BTreeMap<u64, Call>,
    handles: BTreeMap<String, u64>,
    current: Option<Current>,
    untagged: u64,
    told: u64,
    delivered: u64,
    /// The disk takes nothing, and may miss what was done since it did.
    is_disk_full: bool,
    may_miss: bool,
}

impl Checker {
    /// Holds one step's log against the model.
    pub(crate) fn step(&mut self, log: &[Event], world: &World) -> Result<(), Found> {
        let limits = world.bounds_of_core();
        for event in log {
            self.event(event, limits)?;
        }
        self.after(world)
    }

    /// Whether every call has ended and every connection is gone.
    pub(crate) fn at_end(&self) -> Result<(), Found> {
        ensure!(self.calls.is_empty(), "calls are left: {:?}", self.calls);
        ensure!(
            self.told == self.delivered,
            "told {} deliveries of {}",
            self.told,
            self.delivered
        );
        Ok(())
    }

    fn event(&mut self, event: &Event, limits: &Limits) -> Result<(), Found> {
        let now = self.now;
        match event {
            Event::Now(now) => {
                self.now = *now;
                Ok(())
            }
            Event::Handling {
                peer,
                json,
                attachment,
            } => {
                let json = serde_json::from_slice(json).ok();
                let attachment = attachment.clone();
                let message = json.map(|json| Message { json, attachment });
                self.begin(*peer, message, now)
            }
            Event::Rejecting(_) => Ok(()),
            // What could not be stored is in force all the same.
            Event::Refused(Code::Storage) => {
                if let Some(current) = &mut self.current {
                    current.is_unstored = true;
                }
                Ok(())
            }
            Event::Refused(_) => {
                if let Some(current) = &mut self.current {
                    current.is_refused = true;
                }
                Ok(())
            }
            Event::Handled(peer) => self.handled(*peer),
            Event::Sent { peer, class, frame } => {
                let Some((message, used)) = world::decode(frame) else {
                    return Err(format!("half a frame was sent to {peer:?}"));
                };
                ensure!(
                    used == frame.len(),
                    "more than a frame was sent to {peer:?}"
                );
                self.sent(*peer, *class, &message, now, limits)
            }
            Event::Lost(peer) => {
                if let Some(current) = &mut self.current {
                    current.lost.push(*peer);
                }
                Ok(())
            }
            Event::Closed(peer) => {
                self.conn(*peer).is_open = false;
                Ok(())
            }
            Event::Departed(peer) => self.departed(*peer),
            Event::Counted(Count::Delivered) => {
                self.delivered += 1;
                Ok(())
            }
            Event::Counted(_) => Ok(()),
            Event::DiskFull(is_full) => {
                self.is_disk_full = *is_full;
                self.may_miss |= *is_full;
                Ok(())
            }
            Event::Restarted(rows) => self.restarted(rows),
        }
    }

    /// After a kill, everything that was acknowledged is on the disk, unless the disk was full at a time.
    fn restarted(&mut self, rows: &crate::store::Rows) -> Result<(), Found> {
        let list = |text: &str| -> Value { serde_json::from_str(text).unwrap_or_default() };
        let read = |row: &AppRow| Registered {
            pools: strings(&list(&row.pools)).into_iter().collect(),
            triggers: specs(&list(&row.triggers)),
            watches: list(&row.watches)["events"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|pair| (text_of(&pair[0]), Some(strings(&pair[1]))))
                .collect(),
        };
        let stored: BTreeMap<String, Registered> = rows
            .apps
            .values()
            .map(|row| (row.app_id.to_string(), read(row)))
            .collect();
        if !self.may_miss {
            let same = |a: &Registered, b: &Registered| {
                a.pools == b.pools
                    && a.triggers == b.triggers
                    && a.watches.keys().eq(b.watches.keys())
            };
            for (app, known) in &self.apps {
                let row = stored.get(app);
                ensure!(
                    row.is_some_and(|row| same(row, known)),
                    "app '{app}' was acknowledged with {known:?}, and {row:?} is on the disk"
                );
            }
        }
        *self = Checker {
            now: self.now,
            untagged: self.untagged,
            apps: stored,
            is_disk_full: self.is_disk_full,
            may_miss: self.is_disk_full,
            ..Checker::default()
        };
        Ok(())
    }

    fn conn(&mut self, peer: Peer) -> &mut Conn {
        self.conns.entry(peer).or_insert_with(|| Conn {
            is_open: true,
            ..Conn::default()
        })
    }

    // What the server takes in.

    fn begin(&mut self, peer: Peer, message: Option<Message>, now: Time) -> Result<(), Found> {
        ensure!(self.current.is_none(), "two frames are handled at once");
        let mut current = Current {
            peer,
            message: None,
            call: None,
            is_duplicate: false,
            replies: Vec::new(),
            errors: 0,
            recipients: Vec::new(),
            meant: BTreeSet::new(),
            lost: Vec::new(),
            is_refused: false,
            is_unstored: false,
            presence: self.conn(peer).presence(),
            told: BTreeSet::new(),
            is_answered: false,
        };
        ensure!(
            self.conn(peer).is_open,
            "a frame of closed {peer:?} is handled"
        );
        if let Some(message) = &message
            && message.json["action"] == "trigger"
            && self.conn(peer).app.is_some()
        {
            self.begin_call(&mut current, message, now);
        }
        if let Some(Message { json, .. }) = &message
            && json["action"] == "emit"
        {
            let (pool, process) = (text(json, "pool"), text(json, "process"));
            let is_meant =
                |conn: &Conn| conn.serves(&pool, &process) && conn.is_meant(&json["destination"]);
            let meant = self.conns.iter().filter(|(_, conn)| is_meant(conn));
            current.meant = meant.map(|(&peer, _)| peer).collect();
        }

        if let Some(message) = &message
            && message.json["action"] == "ack"
        {
            let id = message.json["id"].as_str().unwrap_or_default();
            let tag = self.conn(peer).calls.get(id).copied();
            if let Some(call) = tag.and_then(|tag| self.calls.get_mut(&tag)) {
                call.acknowledged += message.json["count"].as_u64().unwrap_or(0);
            }
        }
        current.message = message;
        self.current = Some(current);
        Ok(())
    }

    fn begin_call(&mut self, current: &mut Current, message: &Message, now: Time) {
        let json = &message.json;
        let tag = tag(json).unwrap_or_else(|| {
            // A message that is wrong in some way has no tag: it never becomes a call.
            self.untagged += 1;
            u64::MAX - self.untagged
        });
        let conn = self.conn(current.peer);
        let pool = match (json["pool"].as_str(), conn.pools.len()) {
            (Some(pool), _) => pool.to_owned(),
            (None, 1) => conn.pools.first().cloned().unwrap_or_default(),
            _ => DEFAULT_POOL.to_owned(),
        };
        let id = json["id"].as_str().map(str::to_owned);
        if let Some(id) = id.as_ref().filter(|id| !id.is_empty()) {
            if conn.calls.contains_key(id) {
                current.is_duplicate = true;
            } else {
                conn.calls.insert(id.clone(), tag);
            }
        }
        current.call = Some(tag);
        let ttl = json["ttl"].as_u64().unwrap_or(TTL_DEFAULT_MS);
        self.calls.insert(
            tag,
            Call {
                caller: current.peer,
                id: id.filter(|_| !current.is_duplicate),
                pool,
                process: json["process"].as_str().unwrap_or_default().to_owned(),
                request: message.clone(),
                deadline: now.after_ms(ttl),
                handler: None,
                handle: String::new(),
                epoch: 0,
                window: json["window"].as_u64(),
                acknowledged: 0,
                items: 0,
                is_cancelled: false,
            },
        );
    }

    // What the server has done with it.

    fn handled(&mut self, peer: Peer) -> Result<(), Found> {
        let current = self.current.take().ok_or("nothing was being handled")?;
        ensure!(
            current.peer == peer,
            "another connection's frame was handled"
        );
        let is_open = self.conn(peer).is_open;
        let Some(message) = &current.message else {
            // Not JSON: one error message, then the end, which the session reports.
            ensure!(
                current.errors == 1 || !is_open,
                "what is no JSON got no error message"
            );
            return Ok(());
        };
        let json = &message.json;
        let (action, id) = (
            json["action"].as_str().unwrap_or_default(),
            json["id"].as_str(),
        );
        if let Some(tag) = current.call {
            let began = self
                .calls
                .get(&tag)
                .is_some_and(|call| call.handler.is_some());
            if !began {
                self.forget(tag);
                let told = current.replies.len() as u64 + current.errors;
                ensure!(
                    told == 1 || !is_open || current.is_answered,
                    "a call that did not begin was answered {told} times"
                );
            }
            return Ok(());
        }
        let told = current.replies.len();
        let expects_reply = id.is_some_and(|id| !id.is_empty() && id.len() <= 128)
            && !matches!(action, "cancel" | "ack" | "response" | "handshake");
        if expects_reply {
            let refused = current.errors as usize;
            ensure!(
                told == 1 || (told == 0 && refused == 1) || !is_open,
                "request {id:?} got {told} replies"
            );
        } else if action != "handshake" {
            ensure!(
                told == 0,
                "a message without a reply got {:?}",
                current.replies
            );
        }
        // Not read from the reply, which may not have fitted into the outbox.
        let succeeded = !current.is_refused;
        if let Some(reply) = current.replies.first() {
            ensure!(
                (reply["status"] == "ok") == (succeeded && !current.is_unstored),
                "a refusal was not counted: {reply}"
            );
        }
        if action == "emit" && succeeded && tag(json).is_some() {
            self.emitted(peer, json, &current)?;
        }
        if action == "response" {
            self.responded(peer, json, &current)?;
        }
        if succeeded && self.conn(peer).app.is_some() {
            self.apply(peer, action, json);
        }
        self.changes_told(peer, &current)
    }

    /// Every watcher is told where the sender of a message now is and what it serves now.
    fn changes_told(&mut self, peer: Peer, current: &Current) -> Result<(), Found> {
        let Some(conn) = self.conns.get(&peer).filter(|conn| conn.is_open) else {
            return Ok(());
        };
        let after = conn.presence();
        let come = after
            .difference(&current.presence)
            .map(|change| (change, ["app_online", "trigger_added"]));
        let gone = current
            .presence
            .difference(&after)
            .map(|change| (change, ["app_offline", "trigger_removed"]));
        let is_removal = current
            .message
            .as_ref()
            .is_some_and(|m| m.json["action"] == "pool_remove");
        for ((pool, trigger), [of_app, of_trigger]) in come.chain(gone.filter(|_| !is_removal)) {
            let event = if trigger.is_some() {
                of_trigger
            } else {
                of_app
            };
            let watchers = self.conns.iter().filter(|&(&watcher, conn)| {
                watcher != peer && conn.watches(pool, event) && !current.lost.contains(&watcher)
            });
            for (&watcher, _) in watchers {
                let told = (watcher, event.to_owned(), pool.clone(), trigger.clone());
                ensure!(
                    current.told.contains(&told),
                    "{watcher:?} was not told of {event} in '{pool}'"
                );
            }
        }
        Ok(())
    }

    /// An emit goes to each handler that it is meant for, once, and its sender is told how many that were.
    fn emitted(&mut self, peer: Peer, json: &Value, current: &Current) -> Result<(), Found> {
        let Some(pool) = json["pool"].as_str() else {
            return Ok(());
        };
        ensure!(
            self.conn(peer).pools.contains(pool),
            "{peer:?} emits into a pool that it is not in"
        );
        let got = &current.recipients;
        let distinct: BTreeSet<Peer> = got.iter().chain(&current.lost).copied().collect();
        ensure!(
            distinct.len() == got.len() + current.lost.len(),
            "an emit reached somebody twice"
        );
        let meant = &current.meant;
        ensure!(
            distinct.is_subset(meant),
            "an emit for {meant:?} reached {distinct:?}"
        );
        if json["deliver"] == "one" {
            let expected = usize::from(!meant.is_empty() && current.lost.is_empty());
            let most = usize::from(!meant.is_empty());
            ensure!(
                (expected..=most).contains(&got.len()),
                "an emit to one reached {}",
                got.len()
            );
        } else {
            ensure!(
                distinct == *meant,
                "an emit for {meant:?} reached {distinct:?} alone"
            );
        }
        if let Some(reply) = current.replies.first() {
            let said = reply["response"]["delivered"].as_u64();
            ensure!(
                said == Some(got.len() as u64),
                "{} got an emit, told was {said:?}",
                got.len()
            );
        }
        self.told += got.len() as u64;
        Ok(())
    }

    /// An answer to a live call by its handler reaches the caller at once, or ends the call.
    fn responded(&mut self, peer: Peer, json: &Value, current: &Current) -> Result<(), Found> {
        let handle = json["in_reply_to"].as_str().unwrap_or_default();
        let live = self
            .handles
            .get(handle)
            .and_then(|tag| self.calls.get(tag).map(|call| (*tag, call)));
        let Some((tag, call)) = live else {
            return Ok(());
        };
        if call.handler != Some(peer) || current.errors > 0 {
            return Ok(());
        }
        let is_final = is_last(json);
        let caller = call.caller;
        if call.id.is_none() || !self.conns.get(&caller).is_some_and(|conn| conn.is_open) {
            if is_final {
                self.forget(tag);
            }
            return Ok(());
        }
        ensure!(
            current.is_answered,
            "an answer to {handle} did not reach its caller"
        );
        Ok(())
    }

    /// Takes over what a request that succeeded has changed.
    fn apply(&mut self, peer: Peer, action: &str, json: &Value) {
        let conn = self.conns.entry(peer).or_default();
        let Some(app) = conn.app.clone() else { return };
        let registered = self.apps.entry(app.clone()).or_default();
        let pool = json["pool"].as_str().unwrap_or_default().to_owned();
        match action {
            // Joining again changes nothing, not even what is remembered.
            "pool_join" if conn.pools.contains(&pool) => {}
            "pool_join" => {
                conn.pools.insert(pool.clone());
                registered.pools.insert(pool);
            }
            "pool_leave" => {
                conn.leave(&pool);
                let stays = self
                    .conns
                    .values()
                    .any(|other| other.app.as_ref() == Some(&app) && other.pools.contains(&pool));
                if !stays {
                    registered.pools.remove(&pool);
                    registered.watches.remove(&pool);
                }
            }
            "pool_remove" => {
                for registered in self.apps.values_mut() {
                    registered.pools.remove(&pool);
                    registered.watches.remove(&pool);
                }
            }
            "trigger_register" => {
                for (name, spec) in specs(&json["triggers"]) {
                    for ((pool, _), epoch) in
                        conn.epochs.iter_mut().filter(|((_, n), _)| *n == name)
                    {
                        *epoch += u64::from(!is_for(&spec, pool));
                    }
                    conn.triggers.insert(name.clone(), spec.clone());
                    registered.triggers.insert(name, spec);
                }
            }
            "trigger_unregister" => {
                for (name, _) in specs(&json["triggers"]) {
                    conn.triggers.remove(&name);
                    registered.triggers.remove(&name);
                    for (_, epoch) in conn.epochs.iter_mut().filter(|((_, n), _)| *n == name) {
                        *epoch += 1;
                    }
                }
            }
            "watch" => {
                let events = json["events"].is_array().then(|| strings(&json["events"]));
                conn.watches.insert(pool.clone(), events.clone());
                registered.watches.insert(pool, events);
            }
            "unwatch" => {
                conn.watches.remove(&pool);
                registered.watches.remove(&pool);
            }
            _ => {}
        }
    }

    // What the server writes.

    fn sent(
        &mut self,
        to: Peer,
        class: Class,
        message: &Message,
        now: Time,
        limits: &Limits,
    ) -> Result<(), Found> {
        let json = &message.json;
        ensure!(self.conn(to).is_open, "closed {to:?} is sent {json}");
        let attachments = self.conn(to).attachments;
        ensure!(
            message.attachment.is_none() || attachments,
            "{to:?} takes no attachments"
        );
        match json["action"].as_str() {
            Some("handshake_ack") => self.acknowledged(to, json),
            Some("trigger") => {
                ensure!(class == Class::Call, "a call was sent as {class:?}");
                self.delivered_call(to, message, now, limits)
            }
            Some("emit") => {
                ensure!(class == Class::Emit, "an emit was sent as {class:?}");
                self.delivered_emit(to, message)
            }
            Some("response") => self.response(to, message, now),
            Some("error") => {
                if let Some(current) = &mut self.current
                    && current.peer == to
                {
                    current.errors += 1;
                }
                Ok(())
            }
            Some("cancel") => self.cancelled(to, json, now),
            Some("ack") => {
                let handle = json["id"].as_str().unwrap_or_default();
                let call = self.handles.get(handle).and_then(|tag| self.calls.get(tag));
                let fits =
                    call.is_some_and(|call| call.handler == Some(to) && call.window.is_some());
                ensure!(fits, "{to:?} got an ack for a call that is not its: {json}");
                Ok(())
            }
            Some("event") => self.pushed(to, json),
            other => Err(format!("{to:?} got a message of action {other:?}")),
        }
    }

    fn acknowledged(&mut self, to: Peer, json: &Value) -> Result<(), Found> {
        let current = self
            .current
            .as_ref()
            .ok_or("an acknowledgement out of nowhere")?;
        let asked = current.message.as_ref().map(|message| message.json.clone());
        let asked = asked.filter(|asked| asked["action"] == "handshake" && current.peer == to);
        let asked = asked.ok_or("an acknowledgement of no handshake")?;
        let app = asked["app_id"].as_str().unwrap_or_default().to_owned();
        let known = self.apps.get(&app);
        let wants_back = asked["pools"].is_null() && asked["triggers"].is_null();
        let rehydrated = wants_back && known.is_some();
        ensure!(
            json["rehydrated"] == rehydrated,
            "rehydrated should be {rehydrated}: {json}"
        );
        let mut registered = match known {
            Some(known) if rehydrated => known.clone(),
            _ => Registered {
                pools: strings(&asked["pools"]).into_iter().collect(),
                triggers: specs(&asked["triggers"]),
                watches: BTreeMap::new(),
            },
        };
        if registered.pools.is_empty() {
            registered.pools.insert(DEFAULT_POOL.to_owned());
        }
        let pools: BTreeSet<String> = strings(&json["pools"]).into_iter().collect();
        let triggers: BTreeSet<String> = strings(&json["triggers"]).into_iter().collect();
        ensure!(
            pools == registered.pools,
            "pools {pools:?}, not {:?}",
            registered.pools
        );
        let expected: BTreeSet<String> = registered.triggers.keys().cloned().collect();
        ensure!(
            triggers == expected,
            "triggers {triggers:?}, not {expected:?}"
        );
        let attachments = strings(&asked["features"])
            .iter()
            .any(|f| f == "attachments");
        let exclusive_alone = asked["takeover"] != true
            && asked["exclusive"] == true
            && self
                .conns
                .values()
                .any(|c| c.is_open && c.app.as_ref() == Some(&app));
        ensure!(!exclusive_alone, "app '{app}' is not alone");
        let conn = self.conn(to);
        ensure!(conn.app.is_none(), "{to:?} is acknowledged twice");
        conn.app = Some(app.clone());
        conn.instance = json["instance"].as_str().unwrap_or_default().to_owned();
        conn.attachments = attachments;
        conn.pools.clone_from(&registered.pools);
        conn.triggers.clone_from(&registered.triggers);
        let watches = registered
            .watches
            .iter()
            .filter(|(pool, _)| registered.pools.contains(*pool));
        conn.watches = watches
            .map(|(pool, events)| (pool.clone(), events.clone()))
            .collect();
        self.apps.insert(app, registered);
        Ok(())
    }

    /// A call reaches a handler that serves it, is a member and is meant; once, untouched and in order.
    fn delivered_call(
        &mut self,
        to: Peer,
        message: &Message,
        now: Time,
        limits: &Limits,
    ) -> Result<(), Found> {
        let json = &message.json;
        let current = self
            .current
            .as_ref()
            .map(|current| (current.peer, current.call, current.is_duplicate));
        let Some((caller, Some(tag), is_duplicate)) = current else {
            return Err(format!("{to:?} got a call that nobody made: {json}"));
        };
        ensure!(
            self::tag(json) == Some(tag),
            "{to:?} got another call than the one being made"
        );
        ensure!(!is_duplicate, "a call was taken whose id is in use");
        let (pool, process) = (text(json, "pool"), text(json, "process"));
        let handle = text(json, "id");
        ensure!(
            !self.handles.contains_key(&handle),
            "call id {handle} is used twice"
        );
        let destination = self.calls[&tag].request.json["destination"].clone();
        let conn = self.conn(to);
        ensure!(
            conn.pools.contains(&pool),
            "a call reached {to:?}, which is not in pool '{pool}'"
        );
        ensure!(
            conn.serves(&pool, &process),
            "a call reached {to:?}, which does not serve '{process}'"
        );
        let epoch = *conn
            .epochs
            .entry((pool.clone(), process.clone()))
            .or_default();
        let concurrency = conn.triggers[&process].concurrency;
        let is_meant = conn.is_meant(&destination);
        ensure!(is_meant, "a call reached {to:?}, for which it is not meant");
        let serving = self.calls.values().filter(|call| {
            call.handler == Some(to)
                && call.pool == pool
                && call.process == process
                && call.epoch == epoch
        });
        let serving = serving.count() as u64;
        ensure!(
            concurrency.is_none_or(|most| serving < most),
            "{to:?} serves {serving} calls of '{process}' with concurrency {concurrency:?}"
        );
        let in_pool = self
            .calls
            .values()
            .filter(|c| c.handler.is_some() && c.pool == pool)
            .count();
        ensure!(
            in_pool < limits.pending_max,
            "pool '{pool}' holds more than {in_pool} calls"
        );
        let from = self.conn(caller);
        ensure!(
            from.pools.contains(&pool),
            "{caller:?} calls in a pool that it is not in"
        );
        let origin = &json["origin"];
        ensure!(
            origin["app_id"].as_str() == from.app.as_deref()
                && origin["instance"] == *from.instance,
            "a call of {caller:?} claims to be of {origin}"
        );
        let before = from.newest.insert(to, tag);
        ensure!(
            before.is_none_or(|before| before < tag),
            "calls of {caller:?} reach {to:?} out of order"
        );
        let call = self
            .calls
            .get_mut(&tag)
            .ok_or("a call that is not in flight")?;
        ensure!(call.handler.is_none(), "a call was delivered twice");
        ensure!(
            call.pool == pool && call.process == process,
            "a call went astray: {json}"
        );
        let left = call.deadline.since(now).as_millis() as u64;
        ensure!(
            json["ttl"].as_u64().is_some_and(|ttl| ttl <= left),
            "a call's ttl grew: {json}"
        );
        ensure!(
            json["window"].as_u64() == call.window,
            "a window changed: {json}"
        );
        same_body(&call.request, message, "data")?;
        (call.handler, call.handle, call.epoch) = (Some(to), handle.clone(), epoch);
        self.handles.insert(handle, tag);
        Ok(())
    }

    fn delivered_emit(&mut self, to: Peer, message: &Message) -> Result<(), Found> {
        let json = &message.json;
        let (pool, process) = (text(json, "pool"), text(json, "process"));
        ensure!(
            self.conn(to).serves(&pool, &process),
            "an emit reached {to:?}, which does not serve '{process}' in pool '{pool}'"
        );
        let current = self.current.as_mut().ok_or("an emit out of nowhere")?;
        let sender = current.peer;
        let asked = current.message.as_ref().ok_or("an emit that nobody sent")?;
        ensure!(
            tag(&asked.json) == tag(json),
            "{to:?} got another emit than the one being sent"
        );
        same_body(asked, message, "data")?;
        current.recipients.push(to);
        let from = self.conn(sender);
        let origin = &json["origin"];
        ensure!(
            origin["instance"] == *from.instance
                && origin["app_id"].as_str() == from.app.as_deref(),
            "an emit of {sender:?} claims to be another's"
        );
        Ok(())
    }

    fn response(&mut self, to: Peer, message: &Message, now: Time) -> Result<(), Found> {
        let json = &message.json;
        let id = text(json, "in_reply_to");
        let is_final = is_last(json);
        let code = json["error"]["code"].as_str().unwrap_or_default();
        if let Some(current) = &mut self.current
            && current.peer == to
            && current
                .message
                .as_ref()
                .is_some_and(|m| m.json["id"] == *id)
            && !matches!(
                current
                    .message
                    .as_ref()
                    .map(|m| text(&m.json, "action"))
                    .as_deref(),
                Some("cancel" | "ack")
            )
        {
            // The server's own word on the request that it handles.
            let begun = current
                .call
                .and_then(|tag| self.calls.get(&tag))
                .and_then(|call| call.handler);
            if begun.is_none() || current.is_duplicate {
                ensure!(is_final, "a request was answered with {json}");
                current.replies.push(json.clone());
                if let Some(tag) = current.call {
                    ensure!(
                        json["status"] == "error",
                        "a call that did not begin ended well"
                    );
                    ensure!(
                        json["error"]["ran"] == "no",
                        "a call that did not begin may have run: {json}"
                    );
                    self.refused(to, tag, code)?;
                }
                return Ok(());
            }
        }
        let Some(&tag) = self.conn(to).calls.get(&id) else {
            return Err(format!("{to:?} got an answer to nothing: {json}"));
        };
        let call = self
            .calls
            .get_mut(&tag)
            .ok_or("an answer to a call that ended")?;
        let (handler, is_cancelled) = (call.handler, call.is_cancelled);
        let handler = handler.ok_or("an answer to a call that did not begin")?;
        let current = self.current.as_mut();
        // A handler whose last word could not be passed on has no call left to be told of.
        let mut has_finished = false;
        let answer = current.filter(|current| {
            current.peer == handler
                && current.message.as_ref().is_some_and(|m| {
                    m.json["action"] == "response" && m.json["in_reply_to"] == *call.handle
                })
        });
        if let Some(current) = answer {
            current.is_answered = true;
            has_finished = current.message.as_ref().is_some_and(|m| is_last(&m.json));
            let asked = current
                .message
                .as_ref()
                .ok_or("an answer that nobody gave")?;
            if asked.json["status"] == json["status"] && asked.json["headers"] == json["headers"] {
                same_body(asked, message, "response")?;
                if json["status"] == "partial" {
                    call.items += 1;
                    let most = call.window.map(|window| window + call.acknowledged);
                    ensure!(
                        most.is_none_or(|most| call.items <= most),
                        "item {} of {most:?}",
                        call.items
                    );
                }
                let error = &asked.json["error"];
                ensure!(
                    error.is_null() || json["error"] == *error,
                    "a handler's error changed: {json}"
                );
                if is_final {
                    self.forget(tag);
                }
                return Ok(());
            }
        }
        // The server ends the call itself.
        ensure!(json["status"] == "error", "nobody gave the answer {json}");
        ensure!(
            json["error"]["ran"] == "unknown",
            "the handler of this call may have run: {json}"
        );
        let handler_stays = self.conn(handler).is_open && code != "handler_gone";
        let call = &self.calls[&tag];
        match code {
            "timeout" => ensure!(
                now >= call.deadline,
                "a call ended {:?} early",
                call.deadline.since(now)
            ),
            "handler_error" => {
                let overrun = call
                    .window
                    .is_some_and(|window| call.items >= window + call.acknowledged);
                ensure!(overrun, "a stream was ended within its window: {call:?}");
            }
            "handler_gone" | "cancelled" | "overloaded" | "too_large" => {}
            _ => return Err(format!("a call in flight ended with {code}")),
        }
        ensure!(
            is_cancelled || has_finished || !handler_stays,
            "{handler:?} was not told that its call ended: {json}"
        );
        self.forget(tag);
        Ok(())
    }

    /// Whether a refused call was refused for a reason.
    fn refused(&mut self, caller: Peer, tag: u64, code: &str) -> Result<(), Found> {
        let Some(call) = self.calls.get(&tag) else {
            return Ok(());
        };
        let destination = &call.request.json["destination"];
        let handlers = self
            .conns
            .values()
            .filter(|conn| conn.serves(&call.pool, &call.process) && conn.is_meant(destination));
        let handlers = handlers.count();
        let is_in = self.conns[&caller].pools.contains(&call.pool);
        match code {
            "no_handler" => ensure!(
                handlers == 0 && is_in,
                "no_handler, with {handlers} of them"
            ),
            "no_app" | "offline" => {
                ensure!(handlers == 0 && is_in, "{code}, with {handlers} handlers")
            }
            "not_member" => ensure!(
                !is_in || handlers == 0,
                "not_member, with {handlers} handlers"
            ),
            "overloaded" | "draining" | "bad_message" | "invalid_name" => {}
            _ => return Err(format!("a call was refused with {code}")),
        }
        Ok(())
    }

    fn cancelled(&mut self, to: Peer, json: &Value, now: Time) -> Result<(), Found> {
        let handle = text(json, "id");
        let live = self.handles.get(&handle).copied();
        let Some((tag, call)) = live.and_then(|tag| Some((tag, self.calls.get_mut(&tag)?))) else {
            return Err(format!(
                "{to:?} was told of the end of no call of its: {json}"
            ));
        };
        ensure!(
            call.handler == Some(to),
            "{to:?} was told of another's call: {json}"
        );
        ensure!(!call.is_cancelled, "{to:?} was told twice: {json}");
        if json["reason"] == "timeout" {
            ensure!(now >= call.deadline, "a call timed out early");
        }
        call.is_cancelled = true;
        let (caller, has_id) = (call.caller, call.id.is_some());
        if !has_id || !self.conn(caller).is_open {
            self.forget(tag);
        }
        if let Some(current) = &mut self.current {
            current.is_answered = true;
        }
        Ok(())
    }

    fn pushed(&mut self, to: Peer, json: &Value) -> Result<(), Found> {
        let (event, pool) = (text(json, "event"), text(json, "pool"));
        let conn = self.conn(to);
        match event.as_str() {
            "pool_removed" => conn.leave(&pool),
            "displaced" | "kicked" => {
                for pool in std::mem::take(&mut conn.pools) {
                    conn.leave(&pool);
                }
            }
            "draining" | "lost" => {}
            _ => {
                ensure!(
                    conn.pools.contains(&pool),
                    "{to:?} is told of a pool that it is not in: {json}"
                );
                let wanted = conn
                    .watches
                    .get(&pool)
                    .ok_or(format!("{to:?} does not watch: {json}"))?;
                let wants = wanted.as_ref().is_none_or(|events| events.contains(&event));
                ensure!(wants, "{to:?} does not watch this: {json}");
                ensure!(
                    json["instance"] != *conn.instance,
                    "{to:?} is told of itself: {json}"
                );
                if let Some(current) = &mut self.current {
                    let trigger = json["trigger"].as_str().map(str::to_owned);
                    current.told.insert((to, event, pool, trigger));
                }
            }
        }
        Ok(())
    }

    // What goes.

    fn departed(&mut self, peer: Peer) -> Result<(), Found> {
        let Some(gone) = self.conns.remove(&peer) else {
            return Ok(());
        };
        for tag in gone.calls.values() {
            if let Some(call) = self.calls.remove(tag) {
                let told = call.is_cancelled
                    || call
                        .handler
                        .is_none_or(|handler| !self.conns.get(&handler).is_some_and(|h| h.is_open));
                ensure!(
                    told,
                    "the handler of a call was not told that its caller has gone"
                );
                self.handles.remove(&call.handle);
            }
        }
        Ok(())
    }

    /// A call has ended.
    fn forget(&mut self, tag: u64) {
        let Some(call) = self.calls.remove(&tag) else {
            return;
        };
        self.handles.remove(&call.handle);
        if let Some(id) = &call.id
            && let Some(conn) = self.conns.get_mut(&call.caller)
        {
            conn.calls.remove(id);
        }
    }

    /// What must hold when a step is over.
    fn after(&mut self, world: &World) -> Result<(), Found> {
        ensure!(self.current.is_none(), "a frame was not handled to its end");
        let is_in = |peer: Peer, pool: &str| {
            self.conns
                .get(&peer)
                .is_some_and(|conn| conn.pools.contains(pool))
        };
        // Nobody is told of the end of a call that has no id when its handler goes.
        let silent: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, call)| {
                call.id.is_none()
                    && call
                        .handler
                        .is_none_or(|handler| !is_in(handler, &call.pool))
            })
            .map(|(&tag, _)| tag)
            .collect();
        silent.into_iter().for_each(|tag| self.forget(tag));
        for call in self.calls.values() {
            let handler = call.handler.ok_or("a call neither began nor ended")?;
            ensure!(
                call.deadline > world.now(),
                "a call outlives its ttl: {call:?}"
            );
            ensure!(
                !call.is_cancelled,
                "a call ended and its caller was not told: {call:?}"
            );
            for side in [handler, call.caller] {
                let conn = self.conns.get(&side);
                let stays =
                    conn.is_some_and(|conn| conn.is_open && conn.pools.contains(&call.pool));
                ensure!(stays, "a call lives on without {side:?}: {call:?}");
            }
        }
        let (model, real) = (self.calls.len(), world.calls_in_flight());
        ensure!(
            model == real,
            "{real} calls are in flight, {model} should be"
        );
        Ok(())
    }
}

fn text(json: &Value, name: &str) -> String {
    json[name].as_str().unwrap_or_default().to_owned()
}

/// Whether a response ends its call.
fn is_last(response: &Value) -> bool {
    matches!(response["status"].as_str(), Some("ok" | "error"))
}

fn tag(json: &Value) -> Option<u64> {
    json["headers"]["tag"].as_str()?.parse().ok()
}

/// Trigger specifications as a client writes them; of two with one name the last counts.
fn specs(list: &Value) -> BTreeMap<String, Spec> {
    let spec = |item: &Value| match item.as_str() {
        Some(name) => (name.to_owned(), Spec::default()),
        None => {
            let pools = item["pools"].is_array().then(|| strings(&item["pools"]));
            let concurrency = item["concurrency"].as_u64();
            (text(item, "name"), Spec { pools, concurrency })
        }
    };
    list.as_array().into_iter().flatten().map(spec).collect()
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// Whether a body arrived as it was sent: as JSON, as raw bytes, or as base64 of them.
fn same_body(sent: &Message, received: &Message, field: &str) -> Result<(), Found> {
    let arrived = &received.json[field];
    let is_same = match (&sent.attachment, &received.attachment) {
        (Some(sent), Some(received)) => sent == received,
        (Some(sent), None) => {
            let text = base64::engine::general_purpose::STANDARD.encode(sent);
            received.json["encoding"] == "base64" && *arrived == *text
        }
        (None, None) => sent.json[field] == *arrived,
        (None, Some(_)) => false,
    };
    ensure!(is_same, "a body changed on its way: {arrived}");
    ensure!(
        sent.json["headers"] == received.json["headers"],
        "headers changed on their way"
    );
    Ok(())
}
