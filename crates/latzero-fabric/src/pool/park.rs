//! Calls that outlive a connection: parked until a handler appears, given to the next one when the first one dies, and
//! their answers kept until the caller is back.
//!
//! A parked call is no longer its caller's connection's: it has a number, a row on disk, and a caller by name. It is
//! delivered in the order of the numbers, to the handler's side like any other call. What ends it (an answer, its
//! deadline, a cancel) is told to the caller if an instance of it is in the pool, and else kept for it.
//!
//! A row goes when the call is over, not when it is delivered: a server that is killed in between gives the call out
//! again. The attempt's number in the message tells a handler that this may be so.

mod answers;
mod lasting;
mod orphans;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;
use latzero_protocol::message::Trigger;
use latzero_protocol::{AppId, Code, Refusal, TriggerName};

use super::answer::Answered;
use super::calls::Call;
use super::ending::End;
use super::repeats::{scoped, scoped_key};
use super::{CallError, Caller, MemberKey, NOBODY, Pool};
use crate::books::{Account, Full, Hold, Resource};
use crate::driver::{Driver, Peer};
use crate::keep::{CallRow, Change};
use crate::now::Time;
use crate::slab::Key;
use crate::turn::Turn;
use answers::KeptAnswers;
use lasting::split_envelope;
pub(super) use lasting::{Lasting, bytes};

/// Parked calls that are given out at once; the rest follows when the driver calls again.
const GIVEN_AT_ONCE_MAX: usize = 256;

/// After how long parked calls are offered again to handlers that were busy, in milliseconds: a call that ends has it happen
/// at once.
const GIVE_AGAIN_MS: u64 = 1000;

/// The place of a parked call, and of its answer, in the books.
struct Held {
    bytes: Hold,
    _count: Hold,
}

impl Held {
    /// Reserves room for a call.
    fn new(account: &Arc<Account>, bytes: usize) -> Result<Held, Full> {
        Ok(Held {
            _count: account.reserve(Resource::ParkedCalls, 1)?,
            bytes: account.reserve(Resource::Parked, bytes as u64)?,
        })
    }

    /// Room for what an earlier run kept, whatever the limits are now.
    fn restored(account: &Arc<Account>, bytes: usize) -> Held {
        let forced = |what: Resource, amount: u64| {
            let mut hold = account.hold(what);
            hold.force(amount);
            hold
        };
        Held {
            _count: forced(Resource::ParkedCalls, 1),
            bytes: forced(Resource::Parked, bytes as u64),
        }
    }
}

/// A parked call's place among the others.
struct Parked {
    /// Absent while a handler has it.
    waiting: Option<Box<Lasting>>,
    /// Where it is while a handler has it.
    given: Option<Key<Call>>,
    process: TriggerName,
    caller: AppId,
    /// Who called: it is told first, if it is still there.
    from: MemberKey,
    /// Empty where the caller wants no answer.
    id: Box<str>,
    deadline: Time,
    held: Held,
    attempt: u32,
    idempotency_key: Option<Box<str>>,
}

/// What a pool keeps of calls that outlive a connection.
#[derive(Default)]
pub(super) struct ParkedCalls {
    calls: BTreeMap<u64, Parked>,
    /// Waiting calls by trigger, in order.
    by_process: HashMap<TriggerName, BTreeSet<u64>>,
    by_id: HashMap<(AppId, Box<str>), u64>,
    answers: KeptAnswers,
    /// When the time of a call is over.
    deadlines: BTreeSet<(Time, u64)>,
    /// There is more to give out than was given at once: at the next timeout.
    pub(super) goes_on: Option<Time>,
    /// Triggers whose handlers took no more, though calls wait; and behind which number those stand.
    stalled: BTreeMap<TriggerName, u64>,
    /// Calls whose handler died, to be given to another once it has left; and the triggers of those that are parked.
    orphans: Vec<(MemberKey, Option<Box<str>>, Box<Lasting>)>,
    orphaned: Vec<TriggerName>,
}

impl ParkedCalls {
    /// A handler may have room again.
    pub(super) fn note_room(&mut self, now: Time) {
        if !self.stalled.is_empty() {
            self.goes_on = Some(soon(now));
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let first = self.deadlines.first().map(|(at, _)| *at);
        let others = self.goes_on.into_iter().chain(self.answers.next_deadline());
        first.into_iter().chain(others).min()
    }

    /// Bytes of calls and answers.
    pub(super) fn bytes(&self) -> u64 {
        let calls = self.calls.values().map(|parked| parked.held.bytes.amount());
        calls.sum::<u64>() + self.answers.bytes()
    }

    pub(super) fn counts(&self) -> (usize, usize) {
        (self.calls.len(), self.answers.len())
    }

    /// Whether calls of this trigger wait already: a later one must not overtake them.
    pub(super) fn waits_for(&self, process: &str) -> bool {
        !self.by_process.is_empty() && self.by_process.contains_key(process)
    }

    fn find(&self, caller: &AppId, id: &str) -> Option<u64> {
        if self.by_id.is_empty() {
            return None;
        }
        self.by_id.get(&(caller.clone(), id.into())).copied()
    }

    fn insert(&mut self, number: u64, parked: Parked) {
        self.deadlines.insert((parked.deadline, number));
        if parked.waiting.is_some() {
            self.await_handler(number, &parked.process);
        }
        if !parked.id.is_empty() {
            self.by_id
                .insert((parked.caller.clone(), parked.id.clone()), number);
        }
        self.calls.insert(number, parked);
    }

    fn await_handler(&mut self, number: u64, process: &TriggerName) {
        self.by_process
            .entry(process.clone())
            .or_default()
            .insert(number);
    }

    fn await_no_handler(&mut self, number: u64, process: &str) {
        if let Some(numbers) = self.by_process.get_mut(process) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.by_process.remove(process);
            }
        }
    }

    fn remove(&mut self, number: u64) -> Option<Parked> {
        let parked = self.calls.remove(&number)?;
        self.deadlines.remove(&(parked.deadline, number));
        self.await_no_handler(number, parked.process.as_str());
        if !parked.id.is_empty() {
            self.by_id
                .remove(&(parked.caller.clone(), parked.id.clone()));
        }
        Some(parked)
    }

    pub(super) fn check(&self) {
        for (number, parked) in &self.calls {
            assert!(parked.waiting.is_some() != parked.given.is_some());
            assert!(self.deadlines.contains(&(parked.deadline, *number)));
            let waits = self
                .by_process
                .get(&parked.process)
                .is_some_and(|numbers| numbers.contains(number));
            assert_eq!(waits, parked.waiting.is_some());
        }
        assert_eq!(self.deadlines.len(), self.calls.len());
        self.answers.check();
        let waiting: usize = self.by_process.values().map(BTreeSet::len).sum();
        let without = self.calls.values().filter(|p| p.waiting.is_some()).count();
        assert_eq!(waiting, without);
        assert!(
            self.orphans.is_empty() && self.orphaned.is_empty(),
            "nobody sees to them any more"
        );
    }
}

impl<D: Driver> Pool<D> {
    /// Has a call wait for its handler, durably; returns its number.
    pub(super) fn park(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        promise: Option<&D::Peer>,
        turn: &mut Turn<'_, D>,
    ) -> Result<u64, CallError> {
        let now = turn.time();
        let unix_ms = turn.unix_ms();
        let process = TriggerName::new(&trigger.process).map_err(Refusal::from)?;
        self.check_outlives("a parked call")?;
        if let Some(destination) = &trigger.destination {
            AppId::check(&destination.app_id).map_err(Refusal::from)?;
            if destination.instance.is_some() {
                let message = "a parked call waits for an app, not for an instance, because \
                    instances do not come back";
                return Err(Refusal::new(Code::BadMessage, message).into());
            }
        }
        if trigger.window.is_some() {
            let message = "a parked call has only one answer: remove 'window'";
            return Err(Refusal::new(Code::BadMessage, message).into());
        }
        let member = self.members.at(caller).expect("its caller found it");
        let app = member.app.clone();
        let from_instance = member.instance;
        let deadline = now.after_ms(trigger.ttl_ms);
        let account = Arc::clone(member.peer.link().account());
        let held = Held::new(&account, lasting::bytes(trigger)).map_err(Refusal::from)?;
        let mut lasting = Lasting::new((&app, from_instance), deadline, trigger, None);
        let number = turn.next_number();
        lasting.number = Some(number);
        lasting.attempt = 0;
        let row = CallRow {
            number,
            pool: self.name.clone(),
            process: process.to_string(),
            destination: trigger.destination.as_ref().map(|d| d.app_id.to_string()),
            caller: app.clone(),
            id: trigger.id.as_deref().unwrap_or_default().to_owned(),
            envelope: format!(
                "{{\"instance\":\"{}\",\"call\":{}}}",
                from_instance, lasting.message
            ),
            attachment: lasting.attachment.as_deref().map(Into::into),
            idempotency_key: trigger.idempotency_key.as_deref().map(Into::into),
            expires: unix_ms + trigger.ttl_ms,
            attempt: 0,
            parked: unix_ms,
        };
        turn.keep(Change::Call(Box::new(row)), promise);
        turn.count_held(&self.name, self.number, 1);
        let parked = Parked {
            waiting: Some(lasting),
            given: None,
            process,
            caller: app,
            from: caller,
            id: trigger.id.as_deref().unwrap_or_default().into(),
            deadline,
            held,
            attempt: 0,
            idempotency_key: scoped_key(trigger),
        };
        self.parked.insert(number, parked);
        Ok(number)
    }

    /// Whether a parked call waits still, or its handler has it.
    #[must_use]
    pub fn is_parked(&self, number: u64) -> bool {
        self.parked.calls.contains_key(&number)
    }

    /// A call could not be written down: it is as if it had not been parked, unless a handler has it by now.
    pub fn unpark(&mut self, number: u64, turn: &mut Turn<'_, D>) -> bool {
        let waits = self.parked.calls.get(&number);
        if waits.is_none_or(|parked| parked.waiting.is_none()) {
            return false;
        }
        if let Some(parked) = self.forget_parked(number, turn)
            && let Some(key) = &parked.idempotency_key
        {
            self.repeats_dropped(&parked.caller, key, turn);
        }
        true
    }

    /// Takes in a call that an earlier run parked; false where the stored row is invalid.
    pub fn restore_call(
        &mut self,
        row: &CallRow,
        account: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let now = turn.time();
        let unix_ms = turn.unix_ms();
        let Some((instance, message)) = split_envelope(&row.envelope) else {
            return false;
        };
        let Ok(process) = TriggerName::new(&row.process) else {
            return false;
        };
        let deadline = now.after_ms(row.expires.saturating_sub(unix_ms));
        let mut lasting = Box::new(Lasting {
            message: message.into(),
            attachment: row.attachment.as_deref().map(Into::into),
            caller: row.caller.clone(),
            instance,
            deadline,
            attempt: row.attempt,
            window: None,
            redeliver: false,
            may_park: true,
            idempotency_key: None,
            number: Some(row.number),
            held: None,
        });
        let Some(redeliver) = lasting.read(|trigger| trigger.redeliver) else {
            return false;
        };
        lasting.redeliver = redeliver;
        let held = Held::restored(account, lasting.bytes());
        turn.count_held(&self.name, self.number, 1);
        let parked = Parked {
            waiting: Some(lasting),
            given: None,
            process,
            caller: row.caller.clone(),
            from: NOBODY,
            id: row.id.as_str().into(),
            deadline,
            held,
            attempt: row.attempt,
            idempotency_key: row
                .idempotency_key
                .as_deref()
                .map(|key| scoped(&row.process, row.destination.as_deref(), key)),
        };
        if let Some(key) = &parked.idempotency_key {
            self.repeats.restore(&row.caller, key, account);
        }
        self.parked.insert(row.number, parked);
        true
    }

    fn forget_parked(&mut self, number: u64, turn: &mut Turn<'_, D>) -> Option<Parked> {
        let parked = self.parked.remove(number)?;
        turn.count_held(&self.name, self.number, -1);
        Some(parked)
    }

    /// Gives parked calls of a trigger to its handlers, in their order, as far as they take them.
    pub(super) fn give_parked(&mut self, process: &str, turn: &mut Turn<'_, D>) {
        self.give_parked_after(process, 0, turn);
    }

    /// Gives a call that was parked just now to a handler, if those before it wait for others: nobody is there for them, or
    /// they would be stalled, and it stood behind them. So each that is parked is looked at once, not with all before it.
    pub(super) fn give_newcomer(&mut self, process: &str, number: u64, turn: &mut Turn<'_, D>) {
        if !self.parked.stalled.contains_key(process) && self.triggers.contains_key(process) {
            self.give_parked_after(process, number - 1, turn);
        }
    }

    /// As [`Pool::give_parked`], for those with a greater number than `after`: nobody is there for the others.
    fn give_parked_after(&mut self, process: &str, after: u64, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        self.parked.stalled.remove(process);
        let Some(numbers) = self.parked.by_process.get(process) else {
            return;
        };
        let numbers = numbers.range(after.saturating_add(1)..);
        let numbers: Vec<u64> = numbers.take(GIVEN_AT_ONCE_MAX + 1).copied().collect();
        for (seen, &number) in numbers.iter().enumerate() {
            if seen == GIVEN_AT_ONCE_MAX {
                // Others want the pool as well.
                self.parked.goes_on = Some(soon(now));
                self.stall(process, numbers[seen - 1]);
                return;
            }
            let Some(parked) = self.parked.calls.get_mut(&number) else {
                continue;
            };
            if parked.deadline <= now {
                self.parked_refused(number, &too_late(), turn);
                continue;
            }
            let Some(lasting) = parked.waiting.take() else {
                continue;
            };
            match self.give(None, lasting, turn) {
                Ok(key) => {
                    let parked = self.parked.calls.get_mut(&number).expect("just found");
                    parked.given = Some(key);
                    parked.attempt += 1;
                    turn.keep(Change::Attempt(number, parked.attempt), None);
                    self.parked.await_no_handler(number, process);
                }
                Err((lasting, error)) => {
                    let parked = self.parked.calls.get_mut(&number).expect("just found");
                    parked.waiting = Some(lasting);
                    match error {
                        // Its destination is not here, or can't take it; the next one's may be.
                        CallError::UnknownDestination => {}
                        CallError::Refused(refusal)
                            if matches!(refusal.code, Code::NoHandler | Code::TooLarge) => {}
                        // All are busy: the order stays. A full outbox empties without a word to the pool.
                        CallError::Refused(refusal) if refusal.code == Code::Overloaded => {
                            self.stall(process, number - 1);
                            let again = now.after_ms(GIVE_AGAIN_MS);
                            let goes_on = self.parked.goes_on.map_or(again, |at| at.min(again));
                            self.parked.goes_on = Some(goes_on);
                            return;
                        }
                        CallError::Refused(refusal) => {
                            self.parked_refused(number, &refusal, turn);
                        }
                    }
                }
            }
        }
    }

    /// Calls of a trigger wait that may be given out later: those with a greater number than `after`.
    fn stall(&mut self, process: &str, after: u64) {
        if let Some((name, _)) = self.parked.by_process.get_key_value(process) {
            self.parked.stalled.insert(name.clone(), after);
        }
    }

    /// Goes on giving out what was left.
    pub(super) fn give_on(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        if self.parked.goes_on.is_none_or(|at| at > now) {
            return;
        }
        self.parked.goes_on = None;
        for (process, after) in std::mem::take(&mut self.parked.stalled) {
            self.give_parked_after(process.as_str(), after, turn);
        }
    }

    /// Offers a lasting call to the handlers once more.
    fn give(
        &mut self,
        caller: Option<MemberKey>,
        mut lasting: Box<Lasting>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Key<Call>, (Box<Lasting>, CallError)> {
        lasting.attempt += 1;
        let (attempt, deadline) = (lasting.attempt, lasting.deadline);
        let app = lasting.caller.clone();
        let from = caller.map_or(Caller::Absent(&app, lasting.instance), Caller::Member);
        let given =
            lasting.read(|trigger| self.route(from, trigger, (deadline, Some(attempt)), turn));
        match given {
            Some(Ok(key)) => {
                let call = self.calls.at_mut(key).expect("just begun");
                call.lasting = Some(lasting);
                Ok(key)
            }
            Some(Err(error)) => {
                lasting.attempt -= 1;
                Err((lasting, error))
            }
            None => {
                let refusal = Refusal::new(Code::Storage, "the stored call is invalid");
                Err((lasting, refusal.into()))
            }
        }
    }

    /// Ends a parked call at its caller's wish; false where it has none of that id.
    pub(super) fn cancel_parked(
        &mut self,
        caller: MemberKey,
        id: &str,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let Some(member) = self.members.at(caller) else {
            return false;
        };
        let Some(number) = self.parked.find(&member.app, id) else {
            return false;
        };
        let given = self.parked.calls.get(&number).and_then(|p| p.given);
        match given {
            Some(key) => self.end(key, End::Cancelled, turn),
            None => {
                let refusal = Refusal::new(Code::Cancelled, "the caller cancelled the call");
                self.parked_refused(number, &refusal, turn);
            }
        }
        true
    }

    /// Whether an app has a parked call of this id.
    pub(super) fn has_parked(&self, app: &AppId, id: &str) -> bool {
        self.parked.find(app, id).is_some()
    }

    /// Ends waits that are over, and tries what is to be tried again.
    pub(super) fn handle_parked_timeout(&mut self, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while let Some(&(at, number)) = self.parked.deadlines.first() {
            if at > now {
                break;
            }
            self.parked.deadlines.pop_first();
            if let Some(parked) = self.parked.calls.get(&number) {
                if parked.waiting.is_some() {
                    self.parked_refused(number, &too_late(), turn);
                } else if let Some(key) = parked.given {
                    self.end(key, End::TimedOut, turn);
                }
            }
        }
        self.handle_answers_timeout(turn);
        self.give_on(turn);
    }

    /// A pool that goes takes its parked calls along; their callers are told if they are here.
    pub(super) fn close_parked(&mut self, turn: &mut Turn<'_, D>) {
        let refusal = Refusal::new(Code::NoPool, "the pool was removed while the call waited");
        let answer = Answered::refused(&refusal);
        let numbers: Vec<u64> = self.parked.calls.keys().copied().collect();
        for number in numbers {
            if let Some(parked) = self.forget_parked(number, turn) {
                let whom = (&parked.caller, parked.from);
                self.tell_answer(whom, &parked.id, &answer, turn);
                if let Some(key) = &parked.idempotency_key {
                    self.repeats_dropped(&parked.caller, key, turn);
                }
                turn.keep(Change::EndCall(number), None);
            }
        }
        for number in self.parked.answers.numbers() {
            self.drop_answer(number, turn);
        }
    }
}

/// Nobody came in time.
fn too_late() -> Refusal {
    Refusal::new(Code::Timeout, "no handler appeared within the call's ttl")
}

/// The next moment: whoever drives the pool sees to what else is due first.
fn soon(now: Time) -> Time {
    Time(now.0 + 1)
}
