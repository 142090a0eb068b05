//! Calls whose handler died before it answered, and that go to another one.
//!
//! They keep their place: they are in flight for their callers until another handler has them.
//! While all handlers are busy, a call that may be parked is parked, and any other waits for the
//! next handler with room, before parked calls. A step gives as many as [`GIVEN_AT_ONCE_MAX`] and
//! [`GIVEN_BYTES_AT_ONCE`] allow.

use std::collections::{BTreeMap, VecDeque};

use hashbrown::HashMap;
use latzero_protocol::limits::WINDOW_MAX;
use latzero_protocol::message::Trigger;
use latzero_protocol::{Code, Refusal, TriggerName};

use super::super::calls::count_down;
use super::super::durable::DurableCalls;
use super::super::members::MemberKey;
use super::super::{CallError, Pool};
use super::attempts::{PAUSE_MS, exhausted};
use super::durable::DurableCall;
use super::{
    GIVEN_AT_ONCE_MAX, GIVEN_BYTES_AT_ONCE, ParkedCalls, State, StoreChange, at_once, soon,
};
use crate::driver::Driver;
use crate::effects::CallEnd;
use crate::now::{Time, earliest};
use crate::refusals;
use crate::turn::Turn;

/// A call whose handler has left, or is leaving.
pub(in crate::pool) struct Orphan {
    /// The caller, if the call belongs to a connection.
    caller: MemberKey,
    id: Option<Box<str>>,
    process: TriggerName,
    durable: Box<DurableCall>,
    /// How its attempt ended. It is in flight for its caller until another handler has it or it is
    /// refused, so that other calls do not take its place.
    ended: Option<CallEnd>,
    /// What happened to its handler.
    cause: String,
}

impl Orphan {
    fn is(&self, caller: MemberKey, id: &str) -> bool {
        self.caller == caller && self.id.as_deref() == Some(id)
    }

    fn bytes(&self) -> u64 {
        self.durable.bytes() as u64
    }
}

/// The calls whose handler has left, until another one has them.
#[derive(Default)]
pub(super) struct Orphans {
    /// Those that were not offered to another handler yet, the oldest first.
    new: VecDeque<Orphan>,
    /// Those that found all handlers busy, by trigger, the oldest first.
    waiting: BTreeMap<TriggerName, VecDeque<Orphan>>,
    /// When these are offered again. A handler that finishes a call takes one before.
    retry: Option<Time>,
    /// When the next step is due.
    step: Option<Time>,
    /// How many there are by caller and id, because each call asks whether its id is in use.
    ids: HashMap<(MemberKey, Box<str>), u32>,
}

impl Orphans {
    fn note(&mut self, orphan: &Orphan) {
        if let Some(id) = &orphan.id {
            *self.ids.entry((orphan.caller, id.clone())).or_default() += 1;
        }
    }

    fn forget(&mut self, orphan: &Orphan) {
        if let Some(id) = &orphan.id {
            count_down(&mut self.ids, (orphan.caller, id.clone()));
        }
    }

    fn push_new(&mut self, orphan: Orphan) {
        self.note(&orphan);
        self.new.push_back(orphan);
    }

    fn pop_new(&mut self) -> Option<Orphan> {
        let first = self.new.pop_front()?;
        self.forget(&first);
        Some(first)
    }

    /// Has one wait for a handler with room, as the first or the last of its trigger.
    fn wait(&mut self, orphan: Orphan, is_first: bool) {
        self.note(&orphan);
        let queue = self.waiting.entry(orphan.process.clone()).or_default();
        match is_first {
            true => queue.push_front(orphan),
            false => queue.push_back(orphan),
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Orphan> {
        self.new.iter().chain(self.waiting.values().flatten())
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut Orphan> {
        let waiting = self.waiting.values_mut().flatten();
        self.new.iter_mut().chain(waiting)
    }

    /// Takes those that `is_meant` says, in their order.
    fn take_if(&mut self, is_meant: impl Fn(&Orphan) -> bool) -> Vec<Orphan> {
        if !self.iter().any(&is_meant) {
            return Vec::new();
        }
        let mut taken = Vec::new();
        for queue in std::iter::once(&mut self.new).chain(self.waiting.values_mut()) {
            let (meant, others): (VecDeque<_>, _) =
                std::mem::take(queue).into_iter().partition(&is_meant);
            *queue = others;
            taken.extend(meant);
        }
        taken.iter().for_each(|orphan| self.forget(orphan));
        self.waiting.retain(|_, queue| !queue.is_empty());
        taken
    }

    /// Whether calls of a trigger wait for a handler with room.
    pub(super) fn wait_for(&self, process: &str) -> bool {
        self.waiting.contains_key(process)
    }

    /// The one that waited longest for a handler of a trigger.
    fn take_waiting(&mut self, process: &str) -> Option<Orphan> {
        let queue = self.waiting.get_mut(process)?;
        let first = queue.pop_front()?;
        if queue.is_empty() {
            self.waiting.remove(process);
        }
        self.forget(&first);
        Some(first)
    }

    /// Takes any, the new ones first.
    fn pop(&mut self) -> Option<Orphan> {
        if let Some(first) = self.pop_new() {
            return Some(first);
        }
        let mut queue = self.waiting.first_entry()?;
        let first = queue.get_mut().pop_front()?;
        if queue.get().is_empty() {
            queue.remove();
        }
        self.forget(&first);
        Some(first)
    }

    /// Has those that wait tried again.
    fn retry(&mut self, now: Time) {
        if self.retry.is_some_and(|at| at <= now) {
            self.retry = None;
            let waiting = std::mem::take(&mut self.waiting).into_values().flatten();
            self.new.extend(waiting);
        }
    }

    /// When there is something to do.
    pub(super) fn due(&self) -> Option<Time> {
        earliest([self.step, self.retry])
    }

    pub(super) fn check(&self) {
        assert!(self.new.is_empty() || self.step.is_some());
        assert!(self.waiting.is_empty() || self.retry.is_some());
        assert!(self.waiting.values().all(|queue| !queue.is_empty()));
        let named = self.iter().filter(|orphan| orphan.id.is_some()).count();
        assert_eq!(self.ids.values().sum::<u32>() as usize, named);
    }
}

impl ParkedCalls {
    /// Calls that wait for another handler and are in flight for their callers.
    pub(in crate::pool) fn orphans_in_flight(&self) -> usize {
        self.orphans.iter().filter(|o| o.ended.is_some()).count()
    }

    /// Whether calls wait for another handler.
    pub(in crate::pool) fn has_orphans(&self) -> bool {
        self.orphans.iter().next().is_some()
    }

    /// Bytes of the calls that wait for another handler.
    pub(in crate::pool) fn orphan_bytes(&self) -> u64 {
        let held = self.orphans.iter().filter_map(|o| o.durable.held.as_ref());
        held.map(crate::ledger::Reservation::amount).sum()
    }

    /// Whether a call that waits for another handler has this id.
    pub(in crate::pool) fn has_orphan(&self, caller: MemberKey, id: &str) -> bool {
        let ids = &self.orphans.ids;
        !ids.is_empty() && ids.contains_key(&(caller, id.into()))
    }
}

impl<D: Driver> DurableCalls<'_, D> {
    /// The handler of a durable call died; [`Pool::place_orphans`] follows once the handler has
    /// left.
    pub(in crate::pool) fn orphan(
        &mut self,
        (caller, id): (MemberKey, Option<Box<str>>),
        (durable, ended): (Box<DurableCall>, Option<CallEnd>),
        (handler, process): (MemberKey, Option<TriggerName>),
    ) {
        // Read from the call only if its handler no longer served the trigger.
        let read = || durable.read(|trigger| TriggerName::new(&trigger.process).ok())?;
        let process = process.or_else(read).expect("it was read when it arrived");
        let app = self.members.at(handler).map_or("?", |m| m.app.as_str());
        let cause = format!("handler '{app}' disconnected before it answered");
        self.parked.orphans.push_new(Orphan {
            caller,
            id,
            process,
            durable,
            ended,
            cause,
        });
    }

    /// An attempt of a call counts as ended: it has left its place among its caller's calls.
    fn attempt_ended(&mut self, caller: MemberKey, ended: Option<CallEnd>, turn: &mut Turn<'_, D>) {
        if let Some(end) = ended {
            let caller = self.members.at(caller).map(|m| m.peer.clone());
            turn.call_ended(caller.as_ref(), end);
        }
    }

    /// Allows `count` further items of a call that waits for another handler; false if there is
    /// none with that id.
    pub(in crate::pool) fn ack_orphan(&mut self, caller: MemberKey, id: &str, count: u64) -> bool {
        if !self.parked.has_orphan(caller, id) {
            return false;
        }
        let mut orphans = self.parked.orphans.iter_mut();
        let Some(orphan) = orphans.find(|o| o.is(caller, id)) else {
            return false;
        };
        if let Some(window) = &mut orphan.durable.window {
            *window = window.saturating_add(count).min(WINDOW_MAX);
        }
        true
    }

    fn park_orphan(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        durable: &DurableCall,
        turn: &mut Turn<'_, D>,
    ) -> Result<u64, CallError> {
        let left = durable.deadline.since(turn.time()).as_millis();
        let trigger = Trigger {
            ttl_ms: u64::try_from(left).unwrap_or(u64::MAX).max(1),
            id: trigger.id.clone(),
            process: trigger.process.clone(),
            pool: None,
            destination: trigger.destination.clone(),
            key: trigger.key.clone(),
            window: None,
            park: trigger.park,
            redeliver: trigger.redeliver,
            attempts: trigger.attempts,
            idempotency_key: trigger.idempotency_key.clone(),
            blocks: Vec::new(),
            headers: trigger.headers,
            body: trigger.body,
        };
        let number = self.park(caller, &trigger, None, turn)?;
        let attempt = durable.attempt;
        self.parked
            .change(number, |parked| parked.attempt = attempt);
        turn.store(StoreChange::Attempt(number, attempt), None);
        Ok(number)
    }

    /// Cancels a call that waits for another handler; false if there is none with that id.
    pub(in crate::pool) fn cancel_orphan(
        &mut self,
        caller: MemberKey,
        id: &str,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        if !self.parked.has_orphan(caller, id) {
            return false;
        }
        let found = self.parked.orphans.take_if(|o| o.is(caller, id));
        let was_there = !found.is_empty();
        for orphan in found {
            self.refuse_orphan(orphan, &refusals::call_cancelled(), turn);
        }
        was_there
    }

    /// A caller leaves: its calls do not wait for another handler any more.
    pub(in crate::pool) fn end_orphans_of(&mut self, caller: MemberKey, turn: &mut Turn<'_, D>) {
        let is_own = |o: &Orphan| o.caller == caller && o.durable.number.is_none();
        for orphan in self.parked.orphans.take_if(is_own) {
            self.refuse_orphan(orphan, &refusals::caller_left(), turn);
        }
    }

    /// Refuses calls whose handler died, as many as `budget` allows, because the pool is removed
    /// or moves to its next epoch.
    pub(in crate::pool) fn drop_orphans(
        &mut self,
        refusal: &Refusal,
        budget: &mut usize,
        turn: &mut Turn<'_, D>,
    ) {
        while *budget > 0
            && let Some(orphan) = self.parked.orphans.pop()
        {
            *budget -= 1;
            if let Some(number) = orphan.durable.number {
                // With the other parked calls.
                let state = State::Waiting(orphan.durable);
                self.parked.change(number, |parked| parked.state = state);
                continue;
            }
            self.refuse_orphan(orphan, refusal, turn);
        }
    }

    fn refuse_orphan(&mut self, orphan: Orphan, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        self.attempt_ended(orphan.caller, orphan.ended, turn);
        self.drop_repeats_of(&orphan.durable, turn);
        if let Some((member, id)) = self.members.at(orphan.caller).zip(orphan.id) {
            member.refuse(&id, refusal, turn);
        }
    }
}

impl<D: Driver> Pool<D> {
    /// Decides about calls whose handler died, now that it has left.
    pub(in crate::pool) fn place_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let is_parked = |orphan: &Orphan| orphan.durable.number.is_some();
        for Orphan { durable, cause, .. } in self.parked.orphans.take_if(is_parked) {
            let number = durable.number.expect("just checked");
            self.durable().attempt_failed(number, durable, &cause, turn);
        }
        self.give_orphans(turn);
    }

    /// Gives calls whose handler died to others, as many as one step may give.
    fn give_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let (mut tried, mut bytes) = (0, 0);
        while tried < GIVEN_AT_ONCE_MAX
            && bytes < GIVEN_BYTES_AT_ONCE
            && let Some(orphan) = self.parked.orphans.pop_new()
        {
            tried += 1;
            bytes += orphan.bytes();
            if let Some(orphan) = self.redeliver(orphan, turn) {
                let orphans = &mut self.parked.orphans;
                orphans.wait(orphan, false);
                let retry = turn.time().after_ms(PAUSE_MS);
                orphans.retry.get_or_insert(retry);
            }
        }
        let orphans = &mut self.parked.orphans;
        orphans.step = (!orphans.new.is_empty()).then(|| soon(turn.time()));
    }

    /// Gives those that did not fit into the step before, and those that waited for some time.
    pub(in crate::pool) fn go_on_with_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        if self.parked.orphans.due().is_some_and(|due| due <= now) {
            self.parked.orphans.retry(now);
            self.give_orphans(turn);
        }
    }

    /// A handler of a trigger may take more: gives it calls that wait for another handler.
    pub(super) fn give_waiting(&mut self, process: &str, among: usize, turn: &mut Turn<'_, D>) {
        for _ in 0..at_once(among).0 {
            if !self.triggers.has_room(process, None, &self.members) {
                return;
            }
            let Some(orphan) = self.parked.orphans.take_waiting(process) else {
                return;
            };
            if let Some(orphan) = self.redeliver(orphan, turn) {
                // Meant for another handler, or no handler reads what it gets.
                self.parked.orphans.wait(orphan, true);
                return;
            }
        }
    }

    /// Redelivers a call to another handler; else parks it if it may wait, or notifies its caller.
    /// Returns it if it waits for a handler, because all are busy.
    fn redeliver(&mut self, mut orphan: Orphan, turn: &mut Turn<'_, D>) -> Option<Orphan> {
        if self.members.at(orphan.caller).is_none() {
            self.durable()
                .refuse_orphan(orphan, &refusals::caller_left(), turn);
            return None;
        }
        if orphan.durable.deadline <= turn.time() {
            self.durable()
                .refuse_orphan(orphan, &refusals::no_answer(), turn);
            return None;
        }
        let is_last = orphan.durable.attempt >= orphan.durable.attempts;
        let mut are_busy = false;
        if !is_last {
            match self.dispatch(Some(orphan.caller), orphan.durable, turn) {
                Ok((key, durable)) => {
                    self.calls.at_mut(key).expect("just begun").durable = Some(durable);
                    self.durable()
                        .attempt_ended(orphan.caller, orphan.ended, turn);
                    return None;
                }
                Err((back, error)) => {
                    orphan.durable = back;
                    are_busy =
                        matches!(error, CallError::Refused(why) if why.code == Code::Overloaded);
                }
            }
        }
        let durable = &orphan.durable;
        let parked = durable.may_park.then(|| {
            let park = |trigger: &Trigger<'_>| {
                self.durable()
                    .park_orphan(orphan.caller, trigger, durable, turn)
            };
            durable.read(park)
        });
        if let Some(Some(Ok(number))) = parked {
            let Orphan {
                caller,
                durable,
                ended,
                cause,
                ..
            } = orphan;
            self.durable().attempt_ended(caller, ended, turn);
            self.durable().attempt_failed(number, durable, &cause, turn);
            return None;
        }
        if are_busy {
            return Some(orphan);
        }
        let refusal = if is_last {
            exhausted(orphan.durable.attempt, &orphan.cause)
        } else {
            refusals::no_other_handler(&orphan.cause)
        };
        self.durable().refuse_orphan(orphan, &refusal, turn);
        None
    }
}
