//! Calls whose handler died before it answered: redelivered, parked, or dead.
//!
//! A parked call pauses after each failed attempt, [`PAUSE_MS`] at first and four times as long
//! each time. It is then queued behind the calls that were parked in the meantime, so that a call
//! that kills its handlers does not delay others. After its last attempt it is dead. Its caller is
//! notified, and the call stays stored for [`crate::limits::Limits::dead_ttl_ms`], so that an
//! operator can inspect it and run it again.

use std::collections::VecDeque;

use latzero_protocol::limits::WINDOW_MAX;
use latzero_protocol::message::Trigger;
use latzero_protocol::{Code, Refusal};

use super::super::durable::DurableCalls;
use super::super::members::MemberKey;
use super::super::{CallError, Pool};
use super::answers::AnswerReceiver;
use super::durable::DurableCall;
use super::{
    Death, GIVEN_AT_ONCE_MAX, GIVEN_BYTES_AT_ONCE, Parked, ParkedCalls, State, StoreChange, soon,
};
use crate::driver::Driver;
use crate::effects::CallEnd;
use crate::now::Time;
use crate::refusals;
use crate::turn::Turn;

/// How long a call pauses after its first failed attempt, in milliseconds.
const PAUSE_MS: u64 = 100;

/// The longest pause, in milliseconds.
const PAUSE_MAX_MS: u64 = 60_000;

/// How long a call pauses after this many failed attempts, in milliseconds.
fn pause_ms(failed: u32) -> u64 {
    let times = 4_u64.saturating_pow(failed.saturating_sub(1));
    PAUSE_MS.saturating_mul(times).min(PAUSE_MAX_MS)
}

/// A call whose handler has left, or is leaving.
pub(super) struct Orphan {
    /// The caller, if the call belongs to a connection.
    caller: MemberKey,
    id: Option<Box<str>>,
    durable: Box<DurableCall>,
    /// What happened to its handler.
    cause: String,
    /// How its attempt ended. It is in flight for its caller until it is given to another handler
    /// or refused, so that other calls do not take its place.
    ended: Option<CallEnd>,
}

impl Orphan {
    fn is(&self, caller: MemberKey, id: &str) -> bool {
        self.caller == caller && self.id.as_deref() == Some(id)
    }
}

impl ParkedCalls {
    /// Calls that wait for another handler and are in flight for their callers.
    pub(in crate::pool) fn orphans_in_flight(&self) -> usize {
        self.orphans.iter().filter(|o| o.ended.is_some()).count()
    }

    /// Bytes of the calls that wait for another handler.
    pub(in crate::pool) fn orphan_bytes(&self) -> u64 {
        let held = self.orphans.iter().filter_map(|o| o.durable.held.as_ref());
        held.map(crate::ledger::Reservation::amount).sum()
    }

    /// Whether a call that waits for another handler has this id.
    pub(in crate::pool) fn has_orphan(&self, caller: MemberKey, id: &str) -> bool {
        self.orphans.iter().any(|o| o.is(caller, id))
    }

    /// The server stops while a handler has a parked call: the call stays stored as it is.
    pub(in crate::pool) fn interrupted(
        &mut self,
        number: u64,
        mut durable: Box<DurableCall>,
        now: Time,
    ) {
        durable.number = Some(number);
        (durable.window, durable.held) = (None, None);
        let until = now.after_ms(PAUSE_MAX_MS);
        self.change(number, |parked| {
            parked.state = State::Paused(durable, until);
        });
    }
}

impl<D: Driver> DurableCalls<'_, D> {
    /// The handler of a durable call died; [`Pool::place_orphans`] follows once the handler has
    /// left.
    pub(in crate::pool) fn orphan(
        &mut self,
        (caller, id): (MemberKey, Option<Box<str>>),
        (durable, ended): (Box<DurableCall>, Option<CallEnd>),
        handler: MemberKey,
    ) {
        let app = self.members.at(handler).map_or("?", |m| m.app.as_str());
        let cause = format!("handler '{app}' disconnected before it answered");
        self.parked.orphans.push_back(Orphan {
            caller,
            id,
            durable,
            cause,
            ended,
        });
    }

    /// An attempt of a call counts as ended.
    fn attempt_ended(&mut self, orphan: &mut Orphan, turn: &mut Turn<'_, D>) {
        if let Some(end) = orphan.ended.take() {
            let caller = self.members.at(orphan.caller).map(|m| m.peer.clone());
            turn.call_ended(caller.as_ref(), end);
        }
    }

    /// Allows `count` further items of a call that waits for another handler; false if there is
    /// none with that id.
    pub(in crate::pool) fn ack_orphan(&mut self, caller: MemberKey, id: &str, count: u64) -> bool {
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
    ) -> Result<u64, super::CallError> {
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

    /// A parked call's attempt failed: it pauses, or is dead.
    fn attempt_failed(
        &mut self,
        number: u64,
        mut durable: Box<DurableCall>,
        cause: &str,
        turn: &mut Turn<'_, D>,
    ) {
        durable.number = Some(number);
        (durable.window, durable.held) = (None, None);
        // Queued behind everything that is parked now.
        let (now, rank) = (turn.time(), self.parked.newest.saturating_add(1));
        let is_last = self.parked.change(number, |parked| {
            parked.cause = Some(cause.into());
            parked.rank = rank;
            let until = now.after_ms(pause_ms(parked.attempt));
            parked.state = State::Paused(durable, until);
            parked.is_last_attempt()
        });
        if is_last == Some(true) {
            self.die(number, turn);
        }
    }

    /// The last attempt of a parked call failed: notifies its caller, and keeps the dead call.
    fn die(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        let (now, steady_ms) = (turn.time(), turn.steady_ms());
        let ttl_ms = self.info.limits.dead_ttl_ms;
        let Some(mut parked) = self.parked.remove(number) else {
            return;
        };
        let refusal = exhausted(parked.attempt, parked.cause.as_deref().unwrap_or_default());
        if let Some(key) = parked.idempotency_key.take() {
            self.repeats_dropped(&parked.caller, &key, turn);
        }
        parked.deadline = now.after_ms(ttl_ms);
        parked.expires_ms = steady_ms.saturating_add(ttl_ms);
        let durable = parked.dequeue().expect("it was paused");
        let row = crate::rows::CallRow {
            death: Some(Death {
                at: steady_ms,
                cause: parked.cause.as_deref().unwrap_or_default().into(),
            }),
            ..parked.row(number, &self.info.name, &durable)
        };
        parked.state = State::Dead(durable);
        turn.store(StoreChange::Call(Box::new(row)), None);
        let whom = AnswerReceiver {
            process: parked.process.as_str().into(),
            caller: parked.caller.clone(),
            from: parked.from,
            id: parked.id.clone(),
        };
        let held = parked.held.small();
        self.parked.insert(number, parked);
        if !whom.id.is_empty() {
            turn.count_held(&self.info.name, self.info.number, 1);
            let answer = super::Answered::refused(&refusal);
            let number = turn.next_number();
            self.parked
                .answers
                .keep(number, whom, None, (answer, held), self.info, turn);
            self.parked
                .answers
                .write_awaited(number, &self.info.name, turn);
        }
        while self.parked.dead.len() > self.info.limits.dead_max {
            let (_, oldest) = *self.parked.dead.first().expect("there are too many");
            self.bury(oldest, turn);
        }
    }

    /// Forgets a dead call.
    pub(super) fn bury(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        if self.parked.forget(number, self.info, turn).is_some() {
            turn.store(StoreChange::EndCall(number), None);
        }
    }

    /// Runs a dead call again, as a new call without a caller: the caller was told that it failed.
    /// False if there is no such dead call.
    pub fn retry_parked(&mut self, number: u64, ttl_ms: u64, turn: &mut Turn<'_, D>) -> bool {
        let parked = self.parked.calls.get(&number);
        if !parked.is_some_and(Parked::is_dead) {
            return false;
        }
        let Some(mut parked) = self.parked.remove(number) else {
            return false;
        };
        let mut durable = parked.dequeue().expect("it was stopped");
        parked.deadline = turn.time().after_ms(ttl_ms);
        parked.parked_ms = turn.steady_ms();
        parked.expires_ms = parked.parked_ms.saturating_add(ttl_ms);
        (parked.attempt, parked.cause, parked.id) = (0, None, "".into());
        (durable.attempt, durable.deadline) = (0, parked.deadline);
        parked.rank = self.parked.newest.saturating_add(1);
        let row = parked.row(number, &self.info.name, &durable);
        turn.store(StoreChange::Call(Box::new(row)), None);
        parked.state = State::Waiting(durable);
        let process = parked.process.clone();
        self.parked.insert(number, parked);
        self.parked.note_room(&process);
        true
    }

    /// Resumes calls whose pause is over.
    pub(super) fn end_pauses(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while let Some(&(_, number)) = self.parked.pauses.first().filter(|pause| pause.0 <= now) {
            // A call of an earlier run, which ended during the last attempt.
            if self
                .parked
                .calls
                .get(&number)
                .is_some_and(Parked::is_last_attempt)
            {
                self.die(number, turn);
                continue;
            }
            let process = self.parked.change(number, |parked| {
                parked.state = State::Waiting(parked.dequeue().expect("the program paused"));
                parked.process.clone()
            });
            if let Some(process) = process {
                self.parked.note_room(&process);
            }
        }
    }

    /// A durable call ended without an answer: ends its repeats too.
    pub(in crate::pool) fn drop_repeats_of(
        &mut self,
        durable: &DurableCall,
        turn: &mut Turn<'_, D>,
    ) {
        if let Some(key) = &durable.idempotency_key {
            self.repeats_dropped(&durable.caller, key, turn);
        }
    }

    /// Cancels a call that waits for another handler; false if there is none with that id.
    pub(in crate::pool) fn cancel_orphan(
        &mut self,
        caller: MemberKey,
        id: &str,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let found = self.parked.orphans.iter().position(|o| o.is(caller, id));
        let orphan = found.and_then(|at| self.parked.orphans.remove(at));
        let refusal = refusals::call_cancelled();
        let cancel = |orphan| self.refuse_orphan(orphan, &refusal, turn);
        orphan.map(cancel).is_some()
    }

    /// A caller leaves: its calls do not wait for another handler any more.
    pub(in crate::pool) fn end_orphans_of(&mut self, caller: MemberKey, turn: &mut Turn<'_, D>) {
        if !self.parked.orphans.iter().any(|o| o.caller == caller) {
            return;
        }
        let orphans = std::mem::take(&mut self.parked.orphans).into_iter();
        let is_own = |o: &Orphan| o.caller == caller && o.durable.number.is_none();
        let (own, others): (VecDeque<_>, _) = orphans.partition(is_own);
        self.parked.orphans = others;
        for orphan in own {
            self.refuse_orphan(orphan, &refusals::caller_left(), turn);
        }
    }

    /// Refuses calls whose handler died, because the pool is removed or moves to its next epoch.
    pub(in crate::pool) fn drop_orphans(&mut self, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        for orphan in std::mem::take(&mut self.parked.orphans) {
            if let Some(number) = orphan.durable.number {
                // With the other parked calls.
                let state = State::Waiting(orphan.durable);
                self.parked.change(number, |parked| parked.state = state);
                continue;
            }
            self.refuse_orphan(orphan, refusal, turn);
        }
    }

    fn refuse_orphan(&mut self, mut orphan: Orphan, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        self.attempt_ended(&mut orphan, turn);
        self.drop_repeats_of(&orphan.durable, turn);
        if let Some((member, id)) = self.members.at(orphan.caller).zip(orphan.id) {
            member.refuse(&id, refusal, turn);
        }
    }
}

impl<D: Driver> Pool<D> {
    /// Decides about calls whose handler died, now that it has left.
    pub(in crate::pool) fn place_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let orphans = std::mem::take(&mut self.parked.orphans).into_iter();
        let is_parked = |orphan: &Orphan| orphan.durable.number.is_some();
        let (parked, others): (VecDeque<_>, _) = orphans.partition(is_parked);
        self.parked.orphans = others;
        for Orphan { durable, cause, .. } in parked {
            let number = durable.number.expect("just checked");
            self.durable().attempt_failed(number, durable, &cause, turn);
        }
        self.give_orphans(turn);
    }

    /// Gives calls whose handler died to others, as many as one step may give.
    fn give_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let bytes = |o: &Orphan| o.durable.bytes() as u64;
        let parked = &mut self.parked;
        // Where one step is not enough, later calls may take the handlers' room meanwhile. Those
        // that waited then wait on, because they would have had that room.
        let all = parked.orphans.iter().map(bytes).sum::<u64>();
        let is_split = parked.orphans_due.take().is_some()
            || parked.orphans.len() > GIVEN_AT_ONCE_MAX
            || all > GIVEN_BYTES_AT_ONCE;
        let (mut given, mut left) = (0, parked.orphans.len());
        for _ in 0..left.min(GIVEN_AT_ONCE_MAX) {
            if given >= GIVEN_BYTES_AT_ONCE {
                break;
            }
            left -= 1;
            let orphan = self.parked.orphans.pop_front().expect("there is one");
            given += bytes(&orphan);
            if let Some(orphan) = self.redeliver(orphan, is_split, turn) {
                self.parked.orphans.push_back(orphan);
                let again = turn.time().after_ms(PAUSE_MS);
                let due = &mut self.parked.orphans_due;
                *due = Some(due.map_or(again, |at| at.min(again)));
            }
        }
        if left > 0 {
            self.parked.orphans_due = Some(soon(turn.time()));
        }
    }

    /// Gives those that did not fit into the step before.
    pub(in crate::pool) fn go_on_with_orphans(&mut self, turn: &mut Turn<'_, D>) {
        let due = self.parked.orphans_due;
        if due.is_some_and(|due| due <= turn.time()) {
            self.give_orphans(turn);
        }
    }

    /// Redelivers a call to another handler; else parks it if it may wait, or notifies its caller.
    /// If it `waits_on`, it is returned when all handlers are busy.
    fn redeliver(
        &mut self,
        mut orphan: Orphan,
        waits_on: bool,
        turn: &mut Turn<'_, D>,
    ) -> Option<Orphan> {
        self.durable().attempt_ended(&mut orphan, turn);
        if self.members.at(orphan.caller).is_none() {
            self.durable().drop_repeats_of(&orphan.durable, turn);
            return None;
        }
        if orphan.durable.deadline <= turn.time() {
            let refusal = refusals::no_answer();
            self.durable().refuse_orphan(orphan, &refusal, turn);
            return None;
        }
        let Orphan {
            caller,
            id,
            mut durable,
            cause,
            ended,
        } = orphan;
        let is_last = durable.attempt >= durable.attempts;
        if !is_last {
            match self.dispatch(Some(caller), durable, turn) {
                Ok((key, durable)) => {
                    self.calls.at_mut(key).expect("just begun").durable = Some(durable);
                    return None;
                }
                Err((back, CallError::Refused(refusal)))
                    if waits_on && refusal.code == Code::Overloaded =>
                {
                    return Some(Orphan {
                        caller,
                        id,
                        durable: back,
                        cause,
                        ended,
                    });
                }
                Err((back, _)) => durable = back,
            }
        }
        let parked = durable.may_park.then(|| {
            durable.read(|trigger| self.durable().park_orphan(caller, trigger, &durable, turn))
        });
        if let Some(Some(Ok(number))) = parked {
            self.durable().attempt_failed(number, durable, &cause, turn);
            return None;
        }
        let refusal = if is_last {
            exhausted(durable.attempt, &cause)
        } else {
            refusals::no_other_handler(&cause)
        };
        let orphan = Orphan {
            caller,
            id,
            durable,
            cause,
            ended,
        };
        self.durable().refuse_orphan(orphan, &refusal, turn);
        None
    }
}

fn exhausted(attempts: u32, cause: &str) -> Refusal {
    let times = if attempts == 1 { "attempt" } else { "attempts" };
    refusals::attempts_exhausted(format_args!("{attempts} {times}"), cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_minute() {
        let pauses: Vec<u64> = (1..8).map(pause_ms).collect();
        assert_eq!(
            pauses,
            [100, 400, 1600, 6400, 25_600, PAUSE_MAX_MS, PAUSE_MAX_MS]
        );
        assert_eq!(pause_ms(u32::MAX), PAUSE_MAX_MS);
    }
}
