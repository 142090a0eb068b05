//! One pool, as a state machine: its members, its triggers and their handlers, and its calls in
//! progress.
//!
//! A pool decides; it never acts. Every method takes the time and an input, and returns in
//! [`Effects`] what to send. Messages are appended while the pool is locked, so each client sees
//! them in the order of the pool's decisions.
//!
//! A pool is made of parts, which own their state: `members`, `triggers`, `calls`, `blocks`, and in
//! `durable` what outlives a connection. This module composes them; `routing` passes calls to
//! handlers, `ending` passes answers back.

mod answer;
mod blocks;
mod calls;
mod durable;
mod emits;
mod ending;
mod lock;
mod members;
mod park;
mod pick;
mod repeats;
mod routing;
mod triggers;

use std::borrow::Cow;

use latzero_protocol::encode;
use latzero_protocol::message::{Event, EventSet, TriggerSpec};
use latzero_protocol::{AppId, InstanceId, PoolName, Refusal, TriggerName};

use crate::driver::Driver;
use crate::limits::Limits;
use crate::now::{Time, earliest};
use crate::outbox::Class;
use crate::prng::Prng;
use crate::refusals;
use crate::turn::Turn;
use blocks::Blocks;
pub(crate) use blocks::written_json;
pub use blocks::{
    Asking, BlockCounts, BlockKey, BlockTag, Found, LockRequest, PoolBlocks, ReadPlan, Replied,
    SealedContent, WritePlan,
};
use calls::Calls;
pub use durable::{DurableCalls, Purged};
use ending::EndReason;
pub use members::{Joining, MemberKey, MemberTag};
use members::{Member, Members, NOBODY};
pub use park::ParkedCounts;
use park::{ParkedCalls, soon};
use repeats::Repeats;
pub use routing::Routed;

use triggers::{HandlerKey, Triggers};

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

/// What all parts of a pool know about it.
struct PoolInfo {
    /// Part of the ids of its calls.
    number: u32,
    name: PoolName,
    limits: Limits,
    /// Whether its content may outlive the server: so does its policy, or it has none.
    outlives: bool,
}

impl PoolInfo {
    /// Refuses durable content if the pool's policy is not durable.
    fn check_outlives(&self, what: &str) -> Result<(), Refusal> {
        if self.outlives {
            return Ok(());
        }
        Err(refusals::would_outlive(what, &self.name))
    }
}

/// A namespace of triggers, with the calls between its members.
pub struct Pool<D: Driver> {
    info: PoolInfo,
    members: Members<D>,
    triggers: Triggers,
    calls: Calls,
    blocks: Blocks,
    parked: ParkedCalls,
    /// Parked calls and answers that were removed all together, and end in steps.
    retired: Vec<ParkedCalls>,
    repeats: Repeats,
    /// For the choice of handlers.
    prng: Prng,
    hash_seed: u64,
    emits_total: u64,
    scratch: Vec<u8>,
    /// When what was due, and was too much for one step, goes on.
    goes_on: Option<Time>,
    closed: bool,
    /// The members of a removed pool, until their calls and waits have ended.
    left: Members<D>,
}

/// About how many calls, waits and answers that are due end in one step.
const DUE_AT_ONCE_MAX: usize = 1024;

impl<D: Driver> std::fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.info.name)
            .finish_non_exhaustive()
    }
}

impl<D: Driver> Pool<D> {
    /// An empty pool. `number` is part of the ids of its calls; no two pools of a server share one.
    #[must_use]
    pub fn new(number: u32, name: PoolName, limits: Limits, mut prng: Prng) -> Self {
        Pool {
            info: PoolInfo {
                number,
                name,
                limits,
                outlives: true,
            },
            members: Members::default(),
            triggers: Triggers::default(),
            hash_seed: prng.next_u64(),
            calls: Calls::new(number, &mut prng),
            blocks: Blocks::default(),
            parked: ParkedCalls::default(),
            retired: Vec::new(),
            repeats: Repeats::default(),
            prng,
            emits_total: 0,
            scratch: Vec::new(),
            goes_on: None,
            closed: false,
            left: Members::default(),
        }
    }

    /// Its blocks.
    pub fn blocks(&mut self) -> PoolBlocks<'_, D> {
        PoolBlocks {
            blocks: &mut self.blocks,
            members: &self.members,
            info: &self.info,
        }
    }

    /// What outlives a connection.
    pub fn durable(&mut self) -> DurableCalls<'_, D> {
        DurableCalls {
            parked: &mut self.parked,
            repeats: &mut self.repeats,
            members: &self.members,
            calls: &self.calls,
            info: &self.info,
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
        self.members.len() > 0 || self.parked.has_any() || self.has_removed()
    }

    /// Whether something that was removed has not ended yet.
    fn has_removed(&self) -> bool {
        let has_orphans = || self.parked.has_orphans();
        let is_ending =
            self.closed && (self.calls.len() > 0 || self.blocks.len() > 0 || has_orphans());
        is_ending || !self.retired.is_empty() || self.blocks.has_ended()
    }

    /// Sets whether its content may outlive the server. If its policy does not, calls and blocks
    /// must not either: they would become accessible to everybody.
    pub fn set_outlives(&mut self, outlives: bool) {
        self.info.outlives = outlives;
    }

    /// The pool's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.info.number
    }

    /// Counters of the pool.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let all_parked = || self.retired.iter().chain([&self.parked]);
        let mut parked = ParkedCounts::default();
        all_parked().for_each(|calls| parked.add(&calls.counts()));
        PoolStats {
            members: self.members.len(),
            triggers: self.triggers.len(),
            calls_in_flight: self.calls.len() + self.parked.orphans_in_flight(),
            calls: self.calls.total(),
            emits: self.emits_total,
            blocks: self.blocks.len(),
            block_bytes: self.blocks.bytes(),
            parked,
            parked_bytes: all_parked().map(ParkedCalls::bytes).sum(),
            repeats_bytes: self.repeats.bytes(),
            redelivery_bytes: self.calls.redelivery_bytes() + self.parked.orphan_bytes(),
        }
    }

    /// Adds a member and notifies the watchers; `None` if the pool has been removed.
    pub fn join(&mut self, joining: Joining<D>, turn: &mut Turn<'_, D>) -> Option<MemberKey> {
        if self.closed {
            return None;
        }
        let key = self.members.insert(joining);
        self.members
            .notify_presence(Event::AppOnline, &self.info.name, key, turn);
        Some(key)
    }

    /// Ends what a member that is about to leave would leave behind, as much as `budget` allows:
    /// its handlers, its calls, and what it holds of blocks and waits for. The budget is 0 if there
    /// may be more; nobody reaches the member any more then, and it starts nothing.
    pub fn wind_down(&mut self, key: MemberKey, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let Some(member) = self.members.at_mut(key) else {
            return;
        };
        // First, so that it gets no more calls.
        let handlers = std::mem::take(&mut member.handlers);
        *budget = budget.saturating_sub(handlers.len());
        self.drop_handlers(key, handlers.into_iter().collect(), turn);
        self.end_calls_of(key, budget, turn);
        self.blocks().leave(key, budget, turn);
        if *budget > 0 {
            // It leaves in this step.
            return;
        }
        self.place_orphans(turn);
        let member = self.members.at_mut(key).expect("it has not left");
        member.takes_answers = false;
        if !std::mem::replace(&mut member.is_leaving, true) {
            self.members
                .notify_presence(Event::AppOffline, &self.info.name, key, turn);
        }
    }

    /// Ends a membership: ends its calls, removes its triggers, notifies the watchers. False if it
    /// had already ended.
    pub fn leave(&mut self, key: MemberKey, turn: &mut Turn<'_, D>) -> bool {
        if !self.has_member(key) {
            return false;
        }
        let mut all = usize::MAX;
        self.end_calls_of(key, &mut all, turn);
        self.durable().end_orphans_of(key, turn);
        self.repeats.leave(key);
        self.blocks().leave(key, &mut all, turn);
        let member = self.members.at_mut(key).expect("checked above");
        let handlers = std::mem::take(&mut member.handlers);
        let is_known = member.is_leaving;
        self.drop_handlers(key, handlers.into_iter().collect(), turn);
        if !is_known {
            self.members
                .notify_presence(Event::AppOffline, &self.info.name, key, turn);
        }
        let member = self.members.remove(key).expect("checked above");
        self.durable().take_answers_back((key, &member.app), turn);
        self.place_orphans(turn);
        true
    }

    /// Adds handlers of triggers, which get calls that were parked for them. Registering a trigger
    /// again changes its settings.
    pub fn serve<'s>(
        &mut self,
        key: MemberKey,
        specs: impl Iterator<Item = Cow<'s, TriggerSpec>>,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(member) = self.members.at_mut(key).filter(|m| !m.is_leaving) else {
            return;
        };
        let who = (key, member.instance);
        let (mut names, mut added) = (Vec::new(), Vec::new());
        for spec in specs {
            let has = member.handlers.get(&spec.name).copied();
            if let Some(handler) = self.triggers.serve(who, has, &spec) {
                member.handlers.insert(spec.name.clone(), handler);
                added.push(spec.name.clone());
            }
            names.push(spec.name.clone());
        }
        let pool = &self.info.name;
        self.members
            .notify_triggers(Event::TriggerAdded, pool, key, &added, turn);
        for name in &names {
            self.dispatch_parked(name.as_str(), names.len(), turn);
        }
    }

    /// Whether only members that may write can call a trigger or emit to it.
    pub(crate) fn is_privileged(&self, name: &str) -> bool {
        self.triggers.is_privileged(name)
    }

    /// Removes handlers of triggers. Calls in flight may still be answered.
    pub fn unserve<'n>(
        &mut self,
        key: MemberKey,
        names: impl Iterator<Item = &'n TriggerName>,
        turn: &mut Turn<'_, D>,
    ) {
        let Some(member) = self.members.at_mut(key) else {
            return;
        };
        let gone = names.filter_map(|name| member.handlers.remove_entry(name));
        let gone = gone.collect();
        self.drop_handlers(key, gone, turn);
    }

    fn drop_handlers(
        &mut self,
        key: MemberKey,
        gone: Vec<(TriggerName, HandlerKey)>,
        turn: &mut Turn<'_, D>,
    ) {
        let (names, handlers): (Vec<_>, Vec<_>) = gone.into_iter().unzip();
        handlers.into_iter().for_each(|h| self.triggers.unserve(h));
        let pool = &self.info.name;
        self.members
            .notify_triggers(Event::TriggerRemoved, pool, key, &names, turn);
    }

    /// Sets whether a member may have answers to parked calls of its app, and sends it those that
    /// wait.
    pub fn allow_answers(&mut self, key: MemberKey, is_allowed: bool, turn: &mut Turn<'_, D>) {
        let Some(member) = self.members.at_mut(key) else {
            return;
        };
        member.takes_answers = is_allowed;
        let app = member.app.clone();
        self.durable().deliver_answers(&app, turn);
    }

    /// Sends the pool's events to a member; `None` stops them. False if the membership has ended.
    pub fn watch(&mut self, key: MemberKey, events: Option<EventSet>) -> bool {
        self.members.watch(key, events)
    }

    /// When [`Pool::handle_timeout`] must be called at the latest. It may be too early, but never
    /// too late.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.goes_on.or_else(|| {
            earliest([
                self.calls.next_deadline(),
                self.blocks.next_deadline(),
                self.parked.next_deadline(),
                self.repeats.next_deadline(),
            ])
        })
    }

    /// Ends expired calls, waits and leases: many of them in steps, since a great many may expire
    /// at the same instant.
    pub fn handle_timeout(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let mut budget = DUE_AT_ONCE_MAX;
        if self.closed {
            std::mem::swap(&mut self.members, &mut self.left);
            self.end_removed(&mut budget, turn);
            std::mem::swap(&mut self.members, &mut self.left);
        } else {
            self.end_removed(&mut budget, turn);
            while budget > 0
                && let Some(key) = self.calls.pop_due(now)
            {
                budget -= 1;
                self.end(key, EndReason::TimedOut, turn);
            }
            self.blocks().handle_timeout(&mut budget, turn);
            self.go_on_with_orphans(turn);
            self.handle_parked_timeout(&mut budget, turn);
            self.durable().handle_repeats_timeout(&mut budget, turn);
        }
        self.go_on_after(budget, now);
    }

    /// Ends what was removed, as much as `budget` allows: parked calls and answers, waits for the
    /// locks of removed blocks, and the calls of a removed pool.
    fn end_removed(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        if self.closed {
            let keys: Vec<MemberKey> = self.members.iter().map(|(key, _)| key).collect();
            for key in keys {
                self.end_calls_of(key, budget, turn);
            }
            self.durable()
                .drop_orphans(&refusals::pool_removed(), budget, turn);
        }
        self.end_retired(budget, turn);
        self.blocks().end_waits(budget, turn);
        if self.closed {
            self.blocks().close(budget, turn);
        }
    }

    /// Another step follows if this one used up its budget.
    fn go_on_after(&mut self, budget: usize, now: Time) {
        self.goes_on = (budget == 0).then(|| soon(now));
        if self.closed && !self.has_removed() {
            self.left = Members::default();
        }
    }

    /// Removes the pool: ends its calls and notifies each member. Nobody can join again. What is
    /// too much for one step ends in later ones.
    pub fn close(&mut self, turn: &mut Turn<'_, D>) {
        self.closed = true;
        self.retire_parked(turn);
        let mut budget = DUE_AT_ONCE_MAX;
        self.end_removed(&mut budget, turn);
        self.triggers = Triggers::default();
        let json = format!(
            "{{\"action\":\"event\",\"event\":\"pool_removed\",\"pool\":\"{}\"}}",
            self.info.name
        );
        self.left = std::mem::take(&mut self.members);
        for (_, member) in self.left.iter() {
            turn.send(&member.peer, Class::Control, json.len(), |out| {
                encode::message(out, &json)
            });
        }
        let left = if self.has_removed() { 0 } else { budget };
        self.go_on_after(left, turn.time());
    }

    /// Releases what was added to a pool when it had already been removed.
    pub fn close_held(&mut self, turn: &mut Turn<'_, D>) {
        self.retire_parked(turn);
        let mut all = usize::MAX;
        self.end_retired(&mut all, turn);
        self.blocks().close(&mut all, turn);
    }

    /// Ends waiting calls and stored answers of an encrypted pool that moves to its next epoch:
    /// nobody in the new epoch can open them.
    pub fn purge(&mut self, turn: &mut Turn<'_, D>) -> Purged {
        let counts = self.parked.counts();
        let mut all = usize::MAX;
        self.durable()
            .drop_orphans(&refusals::handler_gone(), &mut all, turn);
        self.retire_parked(turn);
        let mut repeats = 0;
        while self.repeats.forget_oldest() {
            repeats += 1;
        }
        let mut budget = DUE_AT_ONCE_MAX;
        self.end_retired(&mut budget, turn);
        if budget == 0 {
            self.goes_on = Some(soon(turn.time()));
        }
        Purged {
            parked: counts.total() - counts.answered,
            answers: counts.answered,
            repeats,
        }
    }

    /// Whether the pool was removed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The pool's triggers as JSON: names, strategies and who serves them, in the order of their
    /// names.
    #[must_use]
    pub fn triggers_json(&self) -> Vec<serde_json::Value> {
        self.triggers.to_json(&self.members)
    }

    /// The same of one trigger, if it has a handler.
    #[must_use]
    pub fn trigger_json(&self, name: &TriggerName) -> Option<serde_json::Value> {
        let served = self.triggers.get(name.as_str())?;
        Some(self.triggers.one_to_json(served, &self.members))
    }

    /// The apps that serve a trigger, the newest handler first, up to a maximum.
    #[must_use]
    pub fn newest_handlers(&self, name: &TriggerName) -> Vec<AppId> {
        self.triggers.newest_handlers(name, &self.members)
    }

    /// Checks the invariants, which hold between any two inputs; for the simulator and tests.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn check(&self) {
        let (mut calling, mut serving) = (0, 0);
        let members = if self.closed {
            &self.left
        } else {
            &self.members
        };
        for (key, member) in members.iter() {
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
        assert!(self.calls.len() <= self.info.limits.pending_max);
        self.members.check();
        if !self.closed {
            self.parked.check_orphans();
            self.triggers.check(&self.members, &self.calls);
        }
        self.calls.check();
        self.retired
            .iter()
            .chain([&self.parked])
            .for_each(ParkedCalls::check);
        self.repeats.check();
        self.blocks.check(members);
    }
}
