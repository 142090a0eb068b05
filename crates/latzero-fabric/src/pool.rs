//! One pool, as a state machine: its members, its triggers and their handlers, and its calls in
//! progress.
//!
//! A pool decides; it never acts. Every method takes the time and an input, and returns in
//! [`Effects`] what to send. Messages are appended while the pool is locked, so each client sees
//! them in the order of the pool's decisions.
//!
//! This module has the members; `routing` passes calls to handlers, `ending` passes answers back,
//! `park` stores calls that outlive a connection, `blocks` is the shared memory.

mod answer;
mod blocks;
mod calls;
mod ending;
mod lock;
mod park;
mod pick;
mod repeats;
mod rotation;
mod routing;

use std::cell::Cell;
use std::collections::BTreeSet;

use hashbrown::HashMap;
use latzero_protocol::encode::{self, Attachments, Origin};
use latzero_protocol::message::{Event, EventSet, Strategy, TriggerSpec};
use latzero_protocol::{AppId, CallId, Code, InstanceId, PoolName, Refusal, TriggerName};

use crate::driver::{Driver, Peer};
use crate::limits::Limits;
use crate::now::{Time, earliest};
use crate::outbox::Class;
use crate::prng::Prng;
use crate::slab::{Key, Slab};
use crate::turn::Turn;
use blocks::Blocks;
pub use blocks::{
    Asking, BlockCounts, BlockKey, BlockTag, Found, LockRequest, ReadPlan, Replied, SealedContent,
    WritePlan,
};
use calls::Calls;
use ending::EndReason;
use park::ParkedCalls;
pub use park::ParkedCounts;
use repeats::Repeats;
pub use rotation::Purged;
pub use routing::Routed;
pub(crate) use routing::id_in_use;
use routing::not_member;

/// How many triggers of a pool, and handlers of each, its description lists.
const TRIGGERS_SHOWN_MAX: usize = 1000;
/// Leaves room on a page for the rest of the description.
const TRIGGERS_SHOWN_BYTES_MAX: usize = crate::registry::PAGE_BYTES_MAX / 2;
const HANDLERS_SHOWN_MAX: usize = 20;

/// The key of a member in its pool.
pub type MemberKey = Key<MemberTag>;

/// Marks keys of members. A member is generic over its connection; its key is not.
#[derive(Debug)]
pub enum MemberTag {}

type HandlerKey = Key<Handler>;

/// The caller of a call without a connection: a parked call, or one with an idempotency key.
const NOBODY: MemberKey = Key::new(u32::MAX, u32::MAX);

/// Who calls.
#[derive(Debug, Clone, Copy)]
enum Caller<'a> {
    Member(MemberKey),
    /// The caller of a parked call, which may have disconnected.
    Absent(&'a AppId, InstanceId),
}

impl Caller<'_> {
    fn member(self) -> Option<MemberKey> {
        match self {
            Caller::Member(member) => Some(member),
            Caller::Absent(..) => None,
        }
    }
}

/// One instance in the pool.
struct Member<D: Driver> {
    peer: D::Peer,
    app: AppId,
    instance: InstanceId,
    /// The user of its connection, and whether that user is untrusted.
    user: u64,
    is_stranger: bool,
    attachments: Attachments,
    watch: Option<EventSet>,
    triggers: Vec<TriggerName>,
    /// Calls it made and calls it serves; at zero, no search is needed when it leaves.
    calling: u32,
    serving: u32,
    /// Whether file descriptors can be passed to it.
    takes_descriptors: bool,
    /// Blocks to check when it leaves.
    blocks: BTreeSet<BlockKey>,
}

impl<D: Driver> Member<D> {
    fn origin(&self) -> Origin<'_> {
        Origin {
            app_id: self.app.as_str(),
            instance: self.instance,
        }
    }
}

/// One instance as the handler of one trigger.
struct Handler {
    member: MemberKey,
    process: TriggerName,
    in_flight: u32,
    concurrency: u32,
}

/// A named handler in the pool.
struct Served {
    name: TriggerName,
    strategy: Strategy,
    doc: Option<String>,
    handlers: Vec<HandlerKey>,
    /// Where the next turn begins.
    turn: Cell<usize>,
}

/// An instance that joins a pool.
#[derive(Debug, Clone)]
pub struct Joining<D: Driver> {
    /// The connection.
    pub peer: D::Peer,
    /// The app.
    pub app: AppId,
    /// The instance.
    pub instance: InstanceId,
    /// Whether it takes attachment frames.
    pub attachments: Attachments,
    /// Whether file descriptors can be passed to it.
    pub takes_descriptors: bool,
}

/// Why a call was not started.
#[derive(Debug)]
pub enum CallError {
    /// It is refused.
    Refused(Refusal),
    /// Its destination is not in this pool; the registry knows whether the app exists.
    UnknownDestination,
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        CallError::Refused(refusal)
    }
}

/// Counters of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Live members.
    pub members: usize,
    /// Triggers with at least one handler.
    pub triggers: usize,
    /// Calls in progress.
    pub calls_in_flight: usize,
    /// Calls since the pool was created.
    pub calls: u64,
    /// Emits since the pool was created.
    pub emits: u64,
    /// Blocks of memory.
    pub blocks: usize,
    /// Bytes of its blocks, slots and headers included.
    pub block_bytes: u64,
    /// Calls that are parked, and answers that wait for their callers.
    pub parked: ParkedCounts,
    /// Bytes of parked calls and of these answers.
    pub parked_bytes: u64,
    /// Bytes of answers stored for repeats.
    pub repeats_bytes: u64,
    /// Bytes of calls stored for redelivery.
    pub redelivery_bytes: u64,
}

/// A namespace of triggers, with the calls between its members.
pub struct Pool<D: Driver> {
    /// Distinguishes its call ids from those of other runs of the server.
    epoch: u64,
    number: u32,
    name: PoolName,
    limits: Limits,
    prng: Prng,
    hash_seed: u64,
    members: Slab<Member<D>, MemberTag>,
    triggers: HashMap<TriggerName, Served>,
    handlers: Slab<Handler>,
    calls: Calls,
    calls_total: u64,
    emits_total: u64,
    blocks: Blocks,
    parked: ParkedCalls,
    repeats: Repeats,
    /// Members that watch for changes to blocks.
    change_watchers: usize,
    closed: bool,
    /// Whether its content may outlive the server: so does its policy, or it has none.
    outlives: bool,
    scratch: Vec<u8>,
}

impl<D: Driver> std::fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<D: Driver> Pool<D> {
    /// An empty pool. `number` is part of the ids of its calls; no two pools of a server share one.
    #[must_use]
    pub fn new(number: u32, name: PoolName, limits: Limits, mut prng: Prng) -> Self {
        let hash_seed = prng.next_u64();
        Pool {
            epoch: prng.next_u64() >> 16,
            number,
            name,
            limits,
            hash_seed,
            calls: Calls::new(prng.next_u64()),
            prng,
            members: Slab::default(),
            triggers: HashMap::new(),
            handlers: Slab::default(),
            calls_total: 0,
            emits_total: 0,
            blocks: Blocks::default(),
            parked: ParkedCalls::default(),
            repeats: Repeats::default(),
            change_watchers: 0,
            closed: false,
            outlives: true,
            scratch: Vec::new(),
        }
    }

    /// Whether `member` is still a member.
    #[must_use]
    pub fn has_member(&self, member: MemberKey) -> bool {
        self.members.at(member).is_some()
    }

    /// Whether it may have deadlines: it has members, or calls or answers that wait for some.
    #[must_use]
    pub fn is_due_to_wake(&self) -> bool {
        self.members.len() > 0 || self.parked.has_any()
    }

    /// Sets whether its content may outlive the server. If its policy does not, calls and blocks
    /// must not either: they would become accessible to everybody.
    pub fn set_outlives(&mut self, outlives: bool) {
        self.outlives = outlives;
    }

    /// Refuses durable content if the pool's policy is not durable.
    fn check_outlives(&self, what: &str) -> Result<(), Refusal> {
        if self.outlives {
            return Ok(());
        }
        let message = format!(
            "{what} would outlive the policy of pool '{}': create the pool with \"durable\":true",
            self.name
        );
        Err(Refusal::new(Code::BadMessage, message))
    }

    /// When the oldest answer stored for repeats expires.
    pub(crate) fn oldest_repeat(&self) -> Option<Time> {
        self.repeats.oldest()
    }

    pub(crate) fn forget_oldest_repeat(&mut self) {
        self.repeats.forget_oldest();
    }

    /// The id of a call, as its handler receives it.
    fn call_id(&self, key: Key<calls::Call>) -> CallId {
        CallId {
            epoch: self.epoch,
            pool: self.number,
            slot: key.slot,
            generation: key.generation,
        }
    }

    /// The pool's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// Counters of its parked calls and answers.
    #[must_use]
    pub fn parked_counts(&self) -> ParkedCounts {
        self.parked.counts()
    }

    /// Counters of the pool.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            members: self.members.len(),
            triggers: self.triggers.len(),
            calls_in_flight: self.calls.len(),
            calls: self.calls_total,
            emits: self.emits_total,
            blocks: self.blocks.len(),
            block_bytes: self.blocks.bytes(),
            parked: self.parked.counts(),
            parked_bytes: self.parked.bytes(),
            repeats_bytes: self.repeats.bytes(),
            redelivery_bytes: self.redelivery_bytes(),
        }
    }

    /// Adds a member and notifies the watchers; `None` if the pool has been removed.
    pub fn join(&mut self, joining: Joining<D>, turn: &mut Turn<'_, D>) -> Option<MemberKey> {
        if self.closed {
            return None;
        }
        let Joining {
            peer,
            app,
            instance,
            attachments,
            takes_descriptors,
        } = joining;
        let event = Presence {
            app: &app,
            instance,
            trigger: None,
        };
        let json = self.presence_json(Event::AppOnline, &event);
        let (user, is_stranger) = {
            let link = peer.link();
            let user = link.account().user();
            (user.id(), user.is_stranger())
        };
        let member = Member {
            peer,
            user,
            is_stranger,
            app,
            instance,
            attachments,
            watch: None,
            triggers: Vec::new(),
            calling: 0,
            serving: 0,
            takes_descriptors,
            blocks: BTreeSet::new(),
        };
        let key = self.members.insert(member);
        self.notify(Event::AppOnline, &json, Some(key), turn);
        Some(key)
    }

    /// Ends a membership: ends its calls, removes its triggers, notifies the watchers. False if it
    /// had already ended.
    pub fn leave(&mut self, key: MemberKey, turn: &mut Turn<'_, D>) -> bool {
        if self.member(key).is_none() {
            return false;
        }
        self.end_calls_of(key, turn);
        self.repeats.leave(key);
        self.leave_blocks(key, turn);
        self.watch(key, None);
        let names = self
            .member_mut(key)
            .map(|m| std::mem::take(&mut m.triggers))
            .unwrap_or_default();
        for name in names {
            self.drop_handler(key, &name, turn);
        }
        let member = self.members.remove(key).expect("checked above");
        let event = Presence {
            app: &member.app,
            instance: member.instance,
            trigger: None,
        };
        let json = self.presence_json(Event::AppOffline, &event);
        self.notify(Event::AppOffline, &json, None, turn);
        self.take_answers_back((key, &member.app), turn);
        self.place_orphans(turn);
        true
    }

    /// Adds a handler of a trigger, which gets calls that were parked for it. Registering the
    /// trigger again changes its settings.
    pub fn serve(&mut self, key: MemberKey, spec: &TriggerSpec, turn: &mut Turn<'_, D>) {
        if self.member(key).is_none() {
            return;
        }
        let concurrency = spec.concurrency.unwrap_or(u32::MAX);
        let served = self
            .triggers
            .entry(spec.name.clone())
            .or_insert_with(|| Served {
                name: spec.name.clone(),
                strategy: spec.strategy,
                doc: None,
                handlers: Vec::new(),
                turn: Cell::new(0),
            });
        // The latest registration decides: a new version of an app may change how its calls are
        // spread.
        served.strategy = spec.strategy;
        if spec.doc.is_some() {
            served.doc.clone_from(&spec.doc);
        }
        let known = served
            .handlers
            .iter()
            .copied()
            .find(|&h| self.handlers.at(h).is_some_and(|h| h.member == key));
        if let Some(handler) = known.and_then(|h| self.handlers.at_mut(h)) {
            handler.concurrency = concurrency;
            self.dispatch_parked(spec.name.as_str(), turn);
            return;
        }
        served.handlers.push(self.handlers.insert(Handler {
            member: key,
            process: spec.name.clone(),
            in_flight: 0,
            concurrency,
        }));
        let member = self.members.at_mut(key).expect("checked above");
        member.triggers.push(spec.name.clone());
        let (app, instance) = (member.app.clone(), member.instance);
        let event = Presence {
            app: &app,
            instance,
            trigger: Some(&spec.name),
        };
        let json = self.presence_json(Event::TriggerAdded, &event);
        self.notify(Event::TriggerAdded, &json, Some(key), turn);
        self.dispatch_parked(spec.name.as_str(), turn);
    }

    /// Removes a handler of a trigger. Calls in flight may still be answered.
    pub fn unserve(&mut self, key: MemberKey, name: &TriggerName, turn: &mut Turn<'_, D>) {
        let Some(member) = self.member_mut(key) else {
            return;
        };
        let Some(at) = member.triggers.iter().position(|t| t == name) else {
            return;
        };
        member.triggers.swap_remove(at);
        self.drop_handler(key, name, turn);
    }

    /// Sends the pool's events to a member; `None` stops them. False if the membership has ended.
    pub fn watch(&mut self, key: MemberKey, events: Option<EventSet>) -> bool {
        let Some(member) = self.member_mut(key) else {
            return false;
        };
        let watches = |set: Option<EventSet>| set.is_some_and(|set| set.has(Event::BlockChanged));
        let (before, after) = (watches(member.watch), watches(events));
        member.watch = events;
        self.change_watchers -= usize::from(before);
        self.change_watchers += usize::from(after);
        true
    }

    /// When [`Pool::handle_timeout`] must be called at the latest. It may be too early, but never
    /// too late.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        earliest([
            self.calls.next_deadline(),
            self.blocks.next_deadline(),
            self.parked.next_deadline(),
            self.repeats.next_deadline(),
        ])
    }

    /// Ends expired calls, waits and leases.
    pub fn handle_timeout(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while let Some(key) = self.calls.pop_due(now) {
            self.end(key, EndReason::TimedOut, turn);
        }
        self.handle_block_timeout(turn);
        self.handle_parked_timeout(turn);
        self.handle_repeats_timeout(turn);
    }

    /// Removes the pool: ends its calls and notifies each member. Nobody can join again. Returns
    /// the members' instances.
    pub fn close(&mut self, turn: &mut Turn<'_, D>) -> Vec<InstanceId> {
        self.closed = true;
        let keys: Vec<MemberKey> = self.members.iter().map(|(key, _)| key).collect();
        for &key in &keys {
            self.end_calls_of(key, turn);
        }
        self.drop_orphans(turn);
        self.close_parked(turn);
        self.close_blocks(turn);
        self.change_watchers = 0;
        let json = format!(
            "{{\"action\":\"event\",\"event\":\"pool_removed\",\"pool\":\"{}\"}}",
            self.name
        );
        let mut instances = Vec::new();
        self.triggers.clear();
        self.handlers = Slab::default();
        for key in keys {
            let member = self.members.remove(key).expect("listed above");
            turn.send(&member.peer, Class::Control, json.len(), |out| {
                encode::message(out, &json)
            });
            instances.push(member.instance);
        }
        instances
    }

    /// Whether the pool was removed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The pool's triggers as JSON: names, strategies and who serves them, in the order of their
    /// names.
    #[must_use]
    pub fn triggers_json(&self) -> serde_json::Value {
        let mut names: Vec<&Served> = self.triggers.values().collect();
        if names.len() > TRIGGERS_SHOWN_MAX {
            names.select_nth_unstable_by(TRIGGERS_SHOWN_MAX, |a, b| a.name.cmp(&b.name));
            names.truncate(TRIGGERS_SHOWN_MAX);
        }
        names.sort_by(|a, b| a.name.cmp(&b.name));
        let trigger = |served: &Served| {
            let handlers: Vec<_> = served
                .handlers
                .iter()
                .filter_map(|&h| self.handlers.at(h))
                .filter_map(|h| Some((h, self.members.at(h.member)?)))
                .take(HANDLERS_SHOWN_MAX)
                .map(|(h, member)| {
                    serde_json::json!({
                        "app_id": member.app, "instance": member.instance, "in_flight": h.in_flight,
                    })
                })
                .collect();
            serde_json::json!({
                "name": served.name, "strategy": served.strategy.as_str(), "doc": served.doc,
                "handlers": handlers,
                "handlers_total": served.handlers.len(),
            })
        };
        let mut bytes = 0;
        let fits = |trigger: &serde_json::Value| {
            bytes += trigger.to_string().len();
            bytes <= TRIGGERS_SHOWN_BYTES_MAX
        };
        names.into_iter().map(trigger).take_while(fits).collect()
    }

    /// Checks the invariants, which hold between any two inputs; for the simulator and tests.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn check(&self) {
        let (mut calling, mut serving) = (0, 0);
        for (key, member) in self.members.iter() {
            let made = self.calls.iter().filter(|(_, c)| c.caller == key).count();
            let served = self.calls.iter().filter(|(_, c)| c.member == key).count();
            assert_eq!(
                made, member.calling as usize,
                "calls made by {}",
                member.app
            );
            assert_eq!(
                served, member.serving as usize,
                "calls served by {}",
                member.app
            );
            calling += made;
            serving += served;
            for name in &member.triggers {
                let served = self
                    .triggers
                    .get(name)
                    .expect("a member's trigger is served");
                let own = |&h: &HandlerKey| self.handlers.at(h).is_some_and(|h| h.member == key);
                assert_eq!(served.handlers.iter().filter(|h| own(h)).count(), 1);
            }
        }
        // Every call has both its sides, except parked calls: nothing reaches a non-member.
        let parked = self
            .calls
            .iter()
            .filter(|(_, c)| c.caller == NOBODY)
            .count();
        assert_eq!(
            (calling + parked, serving),
            (self.calls.len(), self.calls.len())
        );
        self.parked.check();
        self.repeats.check();
        assert!(self.calls.len() <= self.limits.pending_max);
        let handlers: usize = self.triggers.values().map(|t| t.handlers.len()).sum();
        assert_eq!(handlers, self.handlers.len());
        for (key, handler) in self.handlers.iter() {
            let in_flight = self.calls.iter().filter(|(_, c)| c.handler == key).count();
            // Not compared with the concurrency, which a registration may lower while calls are in
            // progress.
            assert_eq!(in_flight, handler.in_flight as usize);
        }
        self.calls.check();
        self.check_blocks();
        let watches = |m: &Member<D>| m.watch.is_some_and(|set| set.has(Event::BlockChanged));
        let watching = self.members.iter().filter(|(_, m)| watches(m)).count();
        assert_eq!(watching, self.change_watchers);
    }

    fn member(&self, key: MemberKey) -> Option<&Member<D>> {
        self.members.at(key)
    }

    fn member_mut(&mut self, key: MemberKey) -> Option<&mut Member<D>> {
        self.members.at_mut(key)
    }

    fn drop_handler(&mut self, key: MemberKey, name: &TriggerName, turn: &mut Turn<'_, D>) {
        let Some(served) = self.triggers.get_mut(name) else {
            return;
        };
        let own = |h: &HandlerKey| self.handlers.at(*h).is_some_and(|h| h.member == key);
        let Some(at) = served.handlers.iter().position(own) else {
            return;
        };
        let handler = served.handlers.remove(at);
        if served.turn.get() > at {
            served.turn.set(served.turn.get() - 1);
        }
        if served.handlers.is_empty() {
            self.triggers.remove(name);
        }
        self.handlers.remove(handler);
        let Some(member) = self.member(key) else {
            return;
        };
        let event = Presence {
            app: &member.app,
            instance: member.instance,
            trigger: Some(name),
        };
        let json = self.presence_json(Event::TriggerRemoved, &event);
        self.notify(Event::TriggerRemoved, &json, Some(key), turn);
    }

    /// Notifies the watchers, except the member that the event is about.
    fn notify(&self, event: Event, json: &str, about: Option<MemberKey>, turn: &mut Turn<'_, D>) {
        for (key, member) in self.members.iter() {
            if Some(key) != about && member.watch.is_some_and(|set| set.has(event)) {
                turn.send(&member.peer, Class::Event, json.len(), |out| {
                    encode::message(out, json)
                });
            }
        }
    }

    fn presence_json(&self, event: Event, presence: &Presence<'_>) -> String {
        let trigger = presence
            .trigger
            .map_or(String::new(), |t| format!(",\"trigger\":\"{t}\""));
        format!(
            "{{\"action\":\"event\",\"event\":\"{}\",\"pool\":\"{}\",\"app_id\":\"{}\",\
            \"instance\":\"{}\"{trigger}}}",
            event.as_str(),
            self.name,
            presence.app,
            presence.instance,
        )
    }
}

struct Presence<'a> {
    app: &'a AppId,
    instance: InstanceId,
    trigger: Option<&'a TriggerName>,
}
