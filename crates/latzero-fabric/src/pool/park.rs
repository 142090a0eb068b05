//! Calls that outlive a connection: a small job queue.
//!
//! A call is parked if no handler can take it now. It has a number, a row on disk, and a caller by
//! name instead of a connection. It is delivered at least once: its row is deleted when it ends, so
//! a server that is killed before that delivers it again. The attempt number in the message tells
//! the handler.
//!
//! Callers take turns ([`turns`]). A call whose handler dies waits before it is redelivered, longer
//! each time, behind the calls in the queue. After its last attempt it is dead and stays stored for
//! inspection ([`attempts`]). A call that is not parked goes to the next handler ([`orphans`]). The
//! end of a call (an answer, its deadline, a cancel) is sent to its caller if an instance of it is
//! in the pool, and otherwise stored for it ([`answers`]).

mod answers;
mod attempts;
mod dispatch;
mod durable;
mod listing;
mod orphans;
mod turns;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;
use latzero_protocol::message::Trigger;
use latzero_protocol::{AppId, Ran, Refusal, TriggerName};

use super::answer::Answered;
use super::calls::Call;
use super::durable::DurableCalls;
use super::ending::EndReason;
use super::members::{MemberKey, NOBODY};
use super::repeats::{scoped, scoped_key};

use super::{CallError, Pool, PoolInfo};
use crate::driver::{Driver, Peer};
use crate::ledger::{Account, Full, Reservation, Resource};
use crate::now::{Time, earliest};
use crate::refusals;
use crate::rows::{CallRow, Death, StoreChange};
use crate::slab::Key;
use crate::turn::Turn;
use answers::KeptAnswers;
use dispatch::Stall;
use durable::split_envelope;
pub(super) use durable::{DurableCall, bytes};
pub use listing::ParkedCounts;
use orphans::Orphans;
use turns::{Lines, QueuedCalls};

/// Parked calls or answers sent in one step; the rest follow when the driver calls again.
const GIVEN_AT_ONCE_MAX: usize = 256;

/// Bytes of calls after which the rest follows in another step: each is read and copied.
const GIVEN_BYTES_AT_ONCE: u64 = 1 << 20;

/// The bytes that a parked call, or its answer, takes in the ledger.
struct HeldCall {
    bytes: Reservation,
    _count: Reservation,
}

/// Approximate size of the answer to a dead call, in bytes.
const SMALL_BYTES: usize = 512;

impl HeldCall {
    /// Reserves room for a call.
    fn new(account: &Arc<Account>, bytes: usize) -> Result<HeldCall, Full> {
        Ok(HeldCall {
            _count: account.reserve(Resource::ParkedCalls, 1)?,
            bytes: account.reserve(Resource::Parked, bytes as u64)?,
        })
    }

    /// Reserves room in the same account for a short answer, even beyond the limits.
    fn small(&self) -> HeldCall {
        HeldCall::restored(self.bytes.account(), SMALL_BYTES)
    }

    /// Reserves room for what an earlier run stored, even beyond the present limits.
    fn restored(account: &Arc<Account>, bytes: usize) -> HeldCall {
        let forced = |what: Resource, amount: u64| {
            let mut hold = account.hold(what);
            hold.force(amount);
            hold
        };
        HeldCall {
            _count: forced(Resource::ParkedCalls, 1),
            bytes: forced(Resource::Parked, bytes as u64),
        }
    }
}

/// The state of a parked call.
enum State {
    /// It waits for a handler.
    Waiting(Box<DurableCall>),
    /// It waits for the answer of the call that it repeats.
    Following(Box<DurableCall>),
    /// It pauses before it waits for a handler again, because the last one died.
    Paused(Box<DurableCall>, Time),
    /// A handler has it.
    Given(Key<Call>),
    /// Every attempt failed, and its caller was notified.
    Dead(Box<DurableCall>),
}

/// A parked call that is between two states.
const NO_CALL: Key<Call> = Key::new(u32::MAX, u32::MAX);

/// A parked call in the queue.
struct Parked {
    state: State,
    process: TriggerName,
    destination: Option<AppId>,
    caller: AppId,
    /// The user of its caller, for its turns.
    user: u64,
    /// The calling instance, which gets the answer if it is still there.
    from: MemberKey,
    /// Empty if the caller wants no answer.
    id: Box<str>,
    /// Its position among its caller's calls: its number, until an attempt fails.
    rank: u64,
    deadline: Time,
    held: HeldCall,
    attempt: u32,
    attempts: u32,
    /// Why the last attempt failed.
    cause: Option<Box<str>>,
    idempotency_key: Option<Box<str>>,
    /// When it was parked and when it expires, on the steady clock.
    parked_ms: u64,
    expires_ms: u64,
}

impl Parked {
    fn is_dead(&self) -> bool {
        matches!(self.state, State::Dead(_))
    }

    /// Whether it has no attempt left.
    fn is_last_attempt(&self) -> bool {
        self.attempt >= self.attempts
    }

    fn durable(&self) -> Option<&DurableCall> {
        match &self.state {
            State::Waiting(durable)
            | State::Following(durable)
            | State::Paused(durable, _)
            | State::Dead(durable) => Some(durable),
            State::Given(_) => None,
        }
    }

    /// Takes the call out, to enter another state.
    fn dequeue(&mut self) -> Option<Box<DurableCall>> {
        match std::mem::replace(&mut self.state, State::Given(NO_CALL)) {
            State::Waiting(durable)
            | State::Following(durable)
            | State::Paused(durable, _)
            | State::Dead(durable) => Some(durable),
            State::Given(key) => {
                self.state = State::Given(key);
                None
            }
        }
    }

    fn is_following(&self) -> bool {
        matches!(self.state, State::Following(_))
    }

    /// A call that waited for a handler waits for the answer of another one.
    fn follow(&mut self) {
        if let Some(durable) = self.dequeue() {
            self.state = State::Following(durable);
        }
    }

    fn waiting(&self, number: u64) -> QueuedCalls {
        QueuedCalls {
            user: self.user,
            app: self.caller.clone(),
            place: (self.rank, number),
        }
    }

    /// Whether a handler may have run it: it was delivered, or an earlier run of the server may
    /// have ended before it stored the delivery.
    fn ran(&self) -> Ran {
        if self.attempt == 0 && self.from != NOBODY && !self.is_following() {
            Ran::No
        } else {
            Ran::Unknown
        }
    }

    /// It expired before it had an answer.
    fn too_late(&self) -> Refusal {
        let refusal = match (self.attempt, &self.cause) {
            (0, _) => refusals::never_taken(),
            (n, Some(cause)) => refusals::no_answer_after(n, cause),
            (_, None) => refusals::no_answer(),
        };
        refusal.with_ran(self.ran())
    }

    fn row(
        &self,
        number: u64,
        pool: &latzero_protocol::PoolName,
        durable: &DurableCall,
    ) -> CallRow {
        let key = self.idempotency_key.as_deref();
        CallRow {
            number,
            pool: pool.clone(),
            process: self.process.to_string(),
            destination: self.destination.as_ref().map(ToString::to_string),
            caller: self.caller.clone(),
            id: self.id.to_string(),
            envelope: format!(
                "{{\"instance\":\"{}\",\"call\":{}}}",
                durable.instance, durable.message
            ),
            attachment: durable.attachment.as_deref().map(Into::into),
            idempotency_key: key.map(|key| super::repeats::unscoped(key).into()),
            expires: self.expires_ms,
            attempt: self.attempt,
            parked: self.parked_ms,
            death: None,
        }
    }
}

/// The calls of a pool that outlive a connection.
#[derive(Default)]
pub(super) struct ParkedCalls {
    calls: BTreeMap<u64, Parked>,
    /// Calls that wait for a handler, by trigger.
    lines: HashMap<TriggerName, Lines>,
    /// How many calls wait for the answers of others.
    following: usize,
    /// When pauses end.
    pauses: BTreeSet<(Time, u64)>,
    /// Dead calls, the oldest first.
    dead: BTreeSet<(Time, u64)>,
    by_id: HashMap<(AppId, Box<str>), u64>,
    answers: KeptAnswers,
    /// When a call expires.
    deadlines: BTreeSet<(Time, u64)>,
    /// The greatest number of a call that was parked here.
    newest: u64,
    /// More calls wait to be dispatched, or to be retried.
    goes_on: Option<Time>,
    /// Triggers whose calls could not all be dispatched.
    stalled: BTreeMap<TriggerName, Stall>,
    /// Triggers whose handlers may take more.
    room: BTreeSet<TriggerName>,
    orphans: Orphans,
}

impl ParkedCalls {
    /// The handlers of a trigger may take more: dispatches at the end of this step.
    pub(super) fn note_room(&mut self, process: &TriggerName) {
        if self.lines.contains_key(process) || self.orphans.wait_for(process.as_str()) {
            self.room.insert(process.clone());
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let first = |times: &BTreeSet<(Time, u64)>| times.first().map(|(at, _)| *at);
        earliest([
            first(&self.deadlines),
            first(&self.pauses),
            self.goes_on,
            self.orphans.due(),
            self.answers.next_deadline(),
        ])
    }

    /// The bytes of its calls and answers.
    pub(super) fn bytes(&self) -> u64 {
        let calls = self.calls.values().map(|parked| parked.held.bytes.amount());
        calls.sum::<u64>() + self.answers.bytes()
    }

    /// Whether similar calls already wait, which this one must not overtake.
    pub(super) fn waits_for(&self, process: &str, destination: Option<&str>) -> bool {
        let lines = self.lines.get(process);
        lines.is_some_and(|lines| lines.has(destination))
    }

    /// Whether an app's id belongs to a parked call, or to an answer that waits for it.
    pub(super) fn uses(&self, app: &AppId, id: &str) -> bool {
        self.find(app, id).is_some() || self.answers.uses(app, id)
    }

    pub(super) fn find(&self, caller: &AppId, id: &str) -> Option<u64> {
        if self.by_id.is_empty() {
            return None;
        }
        self.by_id.get(&(caller.clone(), id.into())).copied()
    }

    fn insert(&mut self, number: u64, parked: Parked) {
        self.newest = self.newest.max(number);
        self.deadlines.insert((parked.deadline, number));
        if !parked.id.is_empty() && !parked.is_dead() {
            self.by_id
                .insert((parked.caller.clone(), parked.id.clone()), number);
        }
        self.link(number, &parked);
        self.calls.insert(number, parked);
    }

    fn remove(&mut self, number: u64) -> Option<Parked> {
        let parked = self.calls.remove(&number)?;
        self.unlink(number, &parked);
        self.deadlines.remove(&(parked.deadline, number));
        self.free_id(&parked);
        Some(parked)
    }

    fn forget<D: Driver>(
        &mut self,
        number: u64,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) -> Option<Parked> {
        let parked = self.remove(number)?;
        turn.count_held(&pool.name, pool.number, -1);
        Some(parked)
    }

    /// The keys of the calls that others may repeat, with their callers.
    fn running_keys(&self) -> Vec<(AppId, Box<str>)> {
        let calls = self.calls.values().filter(|parked| !parked.is_following());
        let calls = calls.filter_map(|p| Some((p.caller.clone(), p.idempotency_key.clone()?)));
        calls.chain(self.answers.awaited_keys()).collect()
    }

    /// The numbers of its calls and answers, read from where they are close together.
    fn numbers(&self) -> impl Iterator<Item = u64> {
        let calls = self.deadlines.iter().map(|(_, number)| *number);
        calls.chain(self.answers.numbers())
    }

    fn free_id(&mut self, parked: &Parked) {
        if !parked.id.is_empty() && !parked.is_dead() {
            self.by_id
                .remove(&(parked.caller.clone(), parked.id.clone()));
        }
    }

    /// Adds a call to the index of its state.
    fn link(&mut self, number: u64, parked: &Parked) {
        match &parked.state {
            State::Waiting(_) => {
                let lines = self.lines.entry(parked.process.clone()).or_default();
                lines.insert(parked.destination.as_ref(), &parked.waiting(number));
            }
            State::Paused(_, until) => {
                self.pauses.insert((*until, number));
            }
            State::Dead(_) => {
                self.dead.insert((parked.deadline, number));
            }
            State::Following(_) => self.following += 1,
            State::Given(_) => {}
        }
    }

    fn unlink(&mut self, number: u64, parked: &Parked) {
        match &parked.state {
            State::Waiting(_) => {
                if let Some(lines) = self.lines.get_mut(&parked.process) {
                    lines.remove(parked.destination.as_ref(), &parked.waiting(number));
                    if lines.len() == 0 {
                        self.lines.remove(&parked.process);
                    }
                }
            }
            State::Paused(_, until) => {
                self.pauses.remove(&(*until, number));
            }
            State::Dead(_) => {
                self.dead.remove(&(parked.deadline, number));
            }
            State::Following(_) => self.following -= 1,
            State::Given(_) => {}
        }
    }

    /// Changes a call, and its index entries if its state changes.
    fn change<R>(&mut self, number: u64, change: impl FnOnce(&mut Parked) -> R) -> Option<R> {
        let mut parked = self.calls.remove(&number)?;
        self.unlink(number, &parked);
        let result = change(&mut parked);
        self.link(number, &parked);
        self.calls.insert(number, parked);
        Some(result)
    }

    pub(super) fn check(&self) {
        let count = |is: fn(&State) -> bool| self.calls.values().filter(|p| is(&p.state)).count();
        for (number, parked) in &self.calls {
            assert!(self.deadlines.contains(&(parked.deadline, *number)));
            assert!(!matches!(parked.state, State::Given(key) if key == NO_CALL));
            if !parked.is_dead() && !parked.id.is_empty() {
                assert_eq!(self.find(&parked.caller, &parked.id), Some(*number));
            }
        }
        assert_eq!(self.deadlines.len(), self.calls.len());
        self.answers.check();
        let waiting: usize = self.lines.values().map(Lines::len).sum();
        assert_eq!(waiting, count(|state| matches!(state, State::Waiting(_))));
        let following = count(|state| matches!(state, State::Following(_)));
        assert_eq!(self.following, following);
        let paused = count(|state| matches!(state, State::Paused(..)));
        assert_eq!(self.pauses.len(), paused);
        assert_eq!(
            self.dead.len(),
            count(|state| matches!(state, State::Dead(_)))
        );
        assert!(self.room.is_empty(), "nothing manages them any more");
    }

    pub(super) fn check_orphans(&self) {
        self.orphans.check();
    }
}

impl<D: Driver> DurableCalls<'_, D> {
    /// Parks a call durably; returns its number.
    pub(super) fn park(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        promise: Option<&D::Peer>,
        turn: &mut Turn<'_, D>,
    ) -> Result<u64, CallError> {
        let now = turn.time();
        let steady_ms = turn.steady_ms();
        let process = TriggerName::new(&trigger.process).map_err(Refusal::from)?;
        self.info.check_outlives("a parked call")?;
        let named = trigger.destination.as_ref();
        if named.is_some_and(|destination| destination.instance.is_some()) {
            return Err(refusals::parked_for_instance().into());
        }
        if trigger.window.is_some() {
            return Err(refusals::parked_with_window().into());
        }
        let member = self.members.at(caller).expect("its caller looked it up");
        let (app, instance) = (&member.app, member.instance);
        if let Some(id) = &trigger.id
            && (self.parked.uses(app, id) || self.calls.find(caller, id).is_some())
        {
            return Err(refusals::id_in_use(id.escape_debug()).into());
        }
        let deadline = now.after_ms(trigger.ttl_ms);
        let account = Arc::clone(member.peer.link().account());
        let held = HeldCall::new(&account, durable::bytes(trigger)).map_err(Refusal::from)?;
        let mut durable = DurableCall::new((app, instance), deadline, trigger, None);
        let number = turn.next_number();
        durable.number = Some(number);
        durable.attempt = 0;
        let destination = destination(trigger)?;
        let lines = self.parked.lines.get(&process);
        let user = lines.and_then(|lines| lines.user_of(destination.as_ref(), app));
        let mut parked = Parked {
            state: State::Given(NO_CALL),
            process,
            destination,
            caller: app.clone(),
            user: user.unwrap_or(member.user),
            from: caller,
            id: trigger.id.as_deref().unwrap_or_default().into(),
            rank: number,
            deadline,
            held,
            attempt: 0,
            attempts: trigger.attempts,
            cause: None,
            idempotency_key: scoped_key(trigger),
            parked_ms: steady_ms,
            expires_ms: steady_ms.saturating_add(trigger.ttl_ms),
        };
        let row = parked.row(number, &self.info.name, &durable);
        parked.state = State::Waiting(durable);
        turn.store(StoreChange::Call(Box::new(row)), promise);
        turn.count_held(&self.info.name, self.info.number, 1);
        self.parked.insert(number, parked);
        Ok(number)
    }

    /// Parks a repeat of a call that is in progress: it gets the same answer.
    pub(super) fn park_repeat(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        key: &str,
        turn: &mut Turn<'_, D>,
    ) -> Result<u64, CallError> {
        let member = self.members.at(caller).expect("its caller looked it up");
        let (app, peer) = (member.app.clone(), member.peer.clone());
        let number = self.park(caller, trigger, Some(&peer), turn)?;
        self.parked.change(number, Parked::follow);
        if let Some(Ok(followers)) = self.repeats.followers(&app, key) {
            followers.push(number);
        }
        Ok(number)
    }

    /// Promises a caller that reconnected that its parked call is on disk.
    pub(super) fn promise_parked(
        &mut self,
        number: u64,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) {
        if let Some(parked) = self.parked.calls.get(&number) {
            // It changes nothing, and follows the earlier writes of the call.
            turn.store(StoreChange::Attempt(number, parked.attempt), Some(promise));
        }
    }

    /// Whether a parked call still waits, or a handler has it.
    #[must_use]
    pub fn is_parked(&self, number: u64) -> bool {
        self.parked.calls.contains_key(&number)
    }

    /// A call could not be stored: it is not parked, unless a handler already has it.
    pub fn unpark(&mut self, number: u64, turn: &mut Turn<'_, D>) -> bool {
        let parked = self.parked.calls.get(&number);
        if parked.is_none_or(|parked| parked.attempt > 0) {
            return false;
        }
        if let Some(parked) = self.parked.forget(number, self.info, turn) {
            self.drop_key(number, &parked, turn);
        }
        true
    }

    /// A parked call ended without an answer from its handler: ends its repeats too, unless it
    /// never ran and one of them can take its place.
    fn drop_key(&mut self, number: u64, parked: &Parked, turn: &mut Turn<'_, D>) {
        match &parked.idempotency_key {
            Some(key) if parked.is_following() => {
                self.repeats.unfollow(&parked.caller, key, number);
            }
            Some(key) if parked.ran() == Ran::No && self.promote(&parked.caller, key) => {}
            Some(key) => self.repeats_dropped(&parked.caller, key, turn),
            None => {}
        }
    }

    /// The oldest parked repeat of a call becomes the call; false if there is none.
    fn promote(&mut self, caller: &AppId, key: &str) -> bool {
        let Some(number) = self.repeats.next_follower(caller, key) else {
            return false;
        };
        let process = self.parked.change(number, |parked| {
            if let Some(durable) = parked.dequeue() {
                parked.state = State::Waiting(durable);
            }
            parked.process.clone()
        });
        if let Some(process) = &process {
            self.parked.note_room(process);
        }
        process.is_some()
    }

    /// Restores a parked call of an earlier run; false if the stored row is invalid.
    pub fn restore_call(
        &mut self,
        row: &CallRow,
        account: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let now = turn.time();
        let Some((instance, message)) = split_envelope(&row.envelope) else {
            return false;
        };
        let (Ok(process), Ok(destination)) = (
            TriggerName::new(&row.process),
            row.destination.as_deref().map(AppId::new).transpose(),
        ) else {
            return false;
        };
        // Never longer than requested, even if the clock has changed.
        let longest = row.expires.saturating_sub(row.death_or_parked());
        let left = row.expires.saturating_sub(turn.steady_ms()).min(longest);
        let deadline = now.after_ms(left);
        let mut durable = Box::new(DurableCall {
            message: message.into(),
            attachment: row.attachment.as_deref().map(Into::into),
            caller: row.caller.clone(),
            instance,
            deadline,
            attempt: row.attempt,
            attempts: 0,
            window: None,
            redeliver: false,
            may_park: true,
            idempotency_key: None,
            number: Some(row.number),
            held: None,
        });
        let read = durable.read(|trigger| (trigger.redeliver, trigger.attempts));
        let Some((redeliver, attempts)) = read else {
            return false;
        };
        (durable.redeliver, durable.attempts) = (redeliver, attempts);
        let is_last = row.attempt >= attempts;
        let held = HeldCall::restored(account, durable.bytes());
        turn.count_held(&self.info.name, self.info.number, 1);
        let idempotency_key = row
            .idempotency_key
            .as_deref()
            .map(|key| scoped(&row.process, row.destination.as_deref(), key));
        let mut parked = Parked {
            process,
            destination,
            caller: row.caller.clone(),
            user: account.user().id(),
            from: NOBODY,
            id: row.id.as_str().into(),
            rank: row.number,
            deadline,
            held,
            attempt: row.attempt,
            attempts,
            cause: match &row.death {
                Some(death) => Some(death.cause.as_str().into()),
                None if is_last => Some("the server ended while a handler had the call".into()),
                None => None,
            },
            idempotency_key: idempotency_key.filter(|_| row.death.is_none()),
            parked_ms: row.parked,
            expires_ms: row.expires,
            state: match row.death {
                Some(_) => State::Dead(durable),
                None if is_last => State::Paused(durable, now),
                None => State::Waiting(durable),
            },
        };
        let answer = parked.idempotency_key.as_deref();
        let answer = answer.and_then(|key| self.repeats.answer(&row.caller, key).cloned());
        if answer.is_none()
            && let Some(key) = &parked.idempotency_key
        {
            match self.repeats.followers(&row.caller, key) {
                Some(followers) => {
                    if let Ok(followers) = followers {
                        followers.push(row.number);
                    }
                    parked.follow();
                }
                None => self.repeats.restore(&row.caller, key, account),
            }
        }
        self.parked.insert(row.number, parked);
        if let Some(answer) = answer {
            self.finish_parked(row.number, (answer, true), turn);
        }
        true
    }

    /// A parked call has expired.
    pub(super) fn parked_too_late(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        if let Some(refusal) = self.parked.calls.get(&number).map(Parked::too_late) {
            self.parked_refused(number, &refusal, turn);
        }
    }

    /// Ends one parked call, or one answer, of those that were removed together, and notifies its
    /// caller if that is connected; false if there is none. Its row is gone already.
    fn end_one_retired(&mut self, turn: &mut Turn<'_, D>) -> bool {
        let held = (&self.info.name, self.info.number, -1);
        if let Some((&number, _)) = self.parked.calls.first_key_value() {
            let parked = self.parked.remove(number).expect("just found");
            if !parked.is_dead() {
                let refusal = refusals::pool_removed_while_parked().with_ran(parked.ran());
                let whom = (&parked.caller, parked.from);
                self.deliver_answer(whom, &parked.id, &Answered::refused(&refusal), turn);
            }
        } else if !self.parked.answers.remove_first() {
            return false;
        }
        turn.count_held(held.0, held.1, held.2);
        true
    }
}

impl<D: Driver> Pool<D> {
    /// Removes all parked calls and answers: their rows now, in one change, and themselves in
    /// steps ([`Pool::end_retired`]), because there may be very many. Only keyed calls, which are
    /// fewer, leave the table of repeats at once, so that no new call waits for them.
    pub(super) fn retire_parked(&mut self, turn: &mut Turn<'_, D>) {
        if !self.parked.has_any() {
            return;
        }
        // Parked repeats hear of the removal, and not of the first call's end.
        if self.repeats.forget_followers() {
            for (caller, key) in self.parked.running_keys() {
                self.durable().repeats_dropped(&caller, &key, turn);
            }
        }
        let mut retired = std::mem::take(&mut self.parked);
        retired.room.clear();
        self.parked.newest = retired.newest;
        self.parked.orphans = std::mem::take(&mut retired.orphans);
        turn.store(StoreChange::EndParked(retired.numbers().collect()), None);
        self.retired.push(retired);
    }

    /// Ends parked calls and answers that were removed, as many as `budget` allows.
    pub(super) fn end_retired(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        while *budget > 0
            && let Some(parked) = self.retired.last_mut()
        {
            let mut durable = DurableCalls {
                parked,
                repeats: &mut self.repeats,
                members: &self.members,
                calls: &self.calls,
                info: &self.info,
            };
            match durable.end_one_retired(turn) {
                true => *budget -= 1,
                false => drop(self.retired.pop()),
            }
        }
    }

    /// Cancels a parked call for its caller; false if there is none with that id.
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
        self.end_parked(number, turn);
        true
    }

    /// Ends a parked call as cancelled.
    fn end_parked(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        let Some(parked) = self.parked.calls.get(&number) else {
            return;
        };
        match parked.state {
            State::Given(key) => self.end(key, EndReason::Cancelled, turn),
            State::Dead(_) => self.durable().bury(number, turn),
            State::Waiting(_) | State::Following(_) | State::Paused(..) => {
                let refusal = refusals::call_cancelled().with_ran(parked.ran());
                self.durable().parked_refused(number, &refusal, turn);
            }
        }
    }

    /// Ends what has expired, as much as `budget` allows, and pauses that are over; and retries
    /// what is due.
    pub(super) fn handle_parked_timeout(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while *budget > 0
            && let Some(&(_, number)) = self.parked.deadlines.first().filter(|due| due.0 <= now)
        {
            *budget -= 1;
            self.parked.deadlines.pop_first();
            let Some(parked) = self.parked.calls.get(&number) else {
                continue;
            };
            match parked.state {
                State::Given(key) => self.end(key, EndReason::TimedOut, turn),
                State::Dead(_) => self.durable().bury(number, turn),
                State::Waiting(_) | State::Following(_) | State::Paused(..) => {
                    self.durable().parked_too_late(number, turn);
                }
            }
        }
        self.durable().end_pauses(budget, turn);
        self.durable().handle_answers_timeout(budget, turn);
        self.go_on_giving(turn);
    }
}

/// The app that a call names.
fn destination(trigger: &Trigger<'_>) -> Result<Option<AppId>, Refusal> {
    let app = trigger.destination.as_ref().map(|d| AppId::new(&d.app_id));
    Ok(app.transpose()?)
}

/// How many calls, and bytes of them, a step gives to the handlers of one trigger of `among`.
fn at_once(among: usize) -> (usize, u64) {
    let among = among.max(1);
    (
        (GIVEN_AT_ONCE_MAX / among).max(1),
        (GIVEN_BYTES_AT_ONCE / among as u64).max(1),
    )
}

/// The next moment, so that the driver first handles what else is due.
pub(super) fn soon(now: Time) -> Time {
    Time(now.0 + 1)
}
