//! Answers to parked calls: each is stored until its caller has it.
//!
//! An answer goes to the instance that called while it is connected, and otherwise to any instance
//! of its app that accepts it. Answers of one app are sent in the order of their calls; one that
//! does not fit into an outbox delays those behind it. An answer is delivered once the kernel has
//! accepted it: until then it is on its way, and waits again if the connection ends. If the server
//! ends before that, the call or the answer is on disk.
//!
//! An end after which the call must not run again (cancelled, expired, attempts exhausted, or
//! answered under an idempotency key) is sent only once it is on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::sync::Arc;

use hashbrown::HashMap;

use latzero_protocol::encode;
use latzero_protocol::{AppId, PoolName, Refusal};

use super::super::PoolInfo;
use super::super::answer::{Answered, checked};
use super::super::durable::DurableCalls;
use super::super::members::{Member, MemberKey, NOBODY};
use super::super::routing::{forwarded_length, raw_length, too_large};
use super::HeldCall;
use super::{GIVEN_AT_ONCE_MAX, soon};
use crate::driver::Driver;
use crate::ledger::Account;
use crate::now::{Time, earliest};
use crate::outbox::{Class, Sent};
use crate::refusals;
use crate::rows::{AnswerRow, StoreChange};
use crate::turn::Turn;

/// After how long answers that did not fit into their caller's outbox are tried again, in
/// milliseconds.
const ANSWER_AGAIN_MS: u64 = 1000;

/// The receiver of a stored answer, and the trigger that it called.
pub(super) struct AnswerReceiver {
    /// The trigger; empty if a version before schema 5 stored the answer.
    pub(super) process: Box<str>,
    pub(super) caller: AppId,
    /// The calling instance, which gets the answer if it is still there.
    pub(super) from: MemberKey,
    /// The caller's id of the call.
    pub(super) id: Box<str>,
}

/// An answer that waits for its caller.
struct StoredAnswer {
    whom: AnswerReceiver,
    key: Option<Box<str>>,
    answer: Answered,
    held: HeldCall,
    expires: Time,
    row: AnswerRowState,
    /// The member whose outbox it is in.
    on_way: Option<MemberOrder>,
}

/// Whether an answer is on disk, where it replaces its call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AnswerRowState {
    /// No: its call is.
    Absent,
    /// The answer is sent once it is written.
    Awaited,
    /// It is written, or will be without anybody waiting.
    Stored,
}

/// A member's place in an order.
type MemberOrder = (u32, u32);

fn order_key(member: MemberKey) -> MemberOrder {
    (member.slot, member.generation)
}

/// The answers that wait for one app.
#[derive(Default)]
struct PendingAnswers {
    numbers: BTreeSet<u64>,
    /// When they are retried.
    again: Option<Time>,
}

/// The stored answers of a pool.
#[derive(Default)]
pub(super) struct KeptAnswers {
    answers: BTreeMap<u64, StoredAnswer>,
    /// Ids of answers that wait for their app. Once an answer is on its way, the app may reuse its
    /// id.
    by_id: HashMap<(AppId, Box<str>), u64>,
    by_app: HashMap<AppId, PendingAnswers>,
    expires: BTreeSet<(Time, u64)>,
    agains: BTreeSet<(Time, AppId)>,
    on_way: HashMap<MemberOrder, BTreeSet<u64>>,
}

impl KeptAnswers {
    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    /// Whether an answer under this id waits for the app.
    pub(super) fn uses(&self, app: &AppId, id: &str) -> bool {
        !self.by_id.is_empty() && self.by_id.contains_key(&(app.clone(), id.into()))
    }

    /// The answers with these numbers that wait for their callers, with their callers and triggers.
    pub(super) fn among(
        &self,
        numbers: RangeInclusive<u64>,
    ) -> impl Iterator<Item = (u64, &AppId, &str)> {
        let answers = self.answers.range(numbers);
        answers.map(|(number, kept)| (*number, &kept.whom.caller, &*kept.whom.process))
    }

    /// An answer as a listing shows it.
    pub(super) fn describe(&self, number: u64) -> Option<serde_json::Value> {
        let kept = self.answers.get(&number)?;
        Some(serde_json::json!({
            "number": number, "state": "answered", "process": kept.whom.process,
            "app_id": kept.whom.caller,
            "id": kept.whom.id, "status": kept.answer.status.as_str(),
            "bytes": kept.held.bytes.amount(),
        }))
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let expires = self.expires.first().map(|(at, _)| *at);
        let again = self.agains.first().map(|(at, _)| *at);
        earliest([expires, again])
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> {
        self.expires.iter().map(|(_, number)| *number)
    }

    /// The keys of calls whose repeats wait until the answer is on disk, with their callers.
    pub(super) fn awaited_keys(&self) -> impl Iterator<Item = (AppId, Box<str>)> {
        let kept = self.answers.values();
        let awaited = kept.filter(|kept| kept.row == AnswerRowState::Awaited);
        awaited.filter_map(|kept| Some((kept.whom.caller.clone(), kept.key.clone()?)))
    }

    /// Removes the oldest answer; false if there is none.
    pub(super) fn remove_first(&mut self) -> bool {
        let first = self.answers.first_key_value().map(|(number, _)| *number);
        first.is_some_and(|number| self.remove(number).is_some())
    }

    fn insert(&mut self, number: u64, kept: StoredAnswer) {
        self.expires.insert((kept.expires, number));
        self.place(number, &kept);
        self.answers.insert(number, kept);
    }

    fn remove(&mut self, number: u64) -> Option<StoredAnswer> {
        let kept = self.answers.remove(&number)?;
        self.expires.remove(&(kept.expires, number));
        self.displace(number, &kept);
        Some(kept)
    }

    /// Records where an answer is: on its way, or waiting for its app.
    fn place(&mut self, number: u64, kept: &StoredAnswer) {
        match kept.on_way {
            Some(to) => self.on_way.entry(to).or_default().insert(number),
            None => {
                let (app, id) = (kept.whom.caller.clone(), kept.whom.id.clone());
                self.by_id.insert((app.clone(), id), number);
                let waiting = self.by_app.entry(app).or_default();
                waiting.numbers.insert(number)
            }
        };
    }

    fn displace(&mut self, number: u64, kept: &StoredAnswer) {
        if let Some(to) = kept.on_way {
            if let Some(numbers) = self.on_way.get_mut(&to) {
                numbers.remove(&number);
                if numbers.is_empty() {
                    self.on_way.remove(&to);
                }
            }
            return;
        }
        let (app, id) = (&kept.whom.caller, &kept.whom.id);
        let key = (app.clone(), id.clone());
        if self.by_id.get(&key) == Some(&number) {
            self.by_id.remove(&key);
        }
        if let Some(waiting) = self.by_app.get_mut(app) {
            waiting.numbers.remove(&number);
            if waiting.numbers.is_empty() {
                self.try_again(app, None);
                self.by_app.remove(app);
            }
        }
    }

    /// An answer has entered or left a member's outbox.
    fn move_to(&mut self, number: u64, on_way: Option<MemberKey>) {
        if let Some(mut kept) = self.answers.remove(&number) {
            self.displace(number, &kept);
            kept.on_way = on_way.map(order_key);
            self.place(number, &kept);
            self.answers.insert(number, kept);
        }
    }

    /// The answers that were on their way to a member.
    fn on_way_to(&self, member: MemberKey) -> Vec<u64> {
        if self.on_way.is_empty() {
            return Vec::new();
        }
        let numbers = self.on_way.get(&order_key(member));
        numbers.into_iter().flatten().copied().collect()
    }

    /// Schedules a retry of an app's answers, or none until the app reconnects.
    fn try_again(&mut self, app: &AppId, at: Option<Time>) {
        let Some(waiting) = self.by_app.get_mut(app) else {
            return;
        };
        if let Some(before) = std::mem::replace(&mut waiting.again, at) {
            self.agains.remove(&(before, app.clone()));
        }
        if let Some(at) = at {
            self.agains.insert((at, app.clone()));
        }
    }

    fn is_due_again(&self, app: &AppId) -> bool {
        !self.agains.is_empty() && self.by_app.get(app).is_some_and(|w| w.again.is_some())
    }

    /// Keeps an answer until it is delivered; nothing is sent yet. It takes over the call's
    /// reservation.
    pub(super) fn keep<D: Driver>(
        &mut self,
        number: u64,
        whom: AnswerReceiver,
        key: Option<Box<str>>,
        (answer, held): (Answered, HeldCall),
        pool: &PoolInfo,
        turn: &Turn<'_, D>,
    ) {
        let kept = StoredAnswer {
            whom,
            key,
            held,
            answer,
            expires: turn.time().after_ms(pool.limits.answer_ttl_ms),
            row: AnswerRowState::Absent,
            on_way: None,
        };
        self.insert(number, kept);
    }

    /// Stores an answer, which is sent when it is on disk ([`DurableCalls::answer_stored`]).
    pub(super) fn write_awaited<D: Driver>(
        &mut self,
        number: u64,
        pool: &PoolName,
        turn: &mut Turn<'_, D>,
    ) {
        self.note_full(number);
        if let Some(row) = self.row(number, AnswerRowState::Awaited, pool, turn) {
            turn.store_answer(row);
        }
    }

    /// An answer has to wait. If there is no memory for it, a short error replaces it, so that the
    /// caller learns that there was one.
    fn note_full(&mut self, number: u64) {
        let Some(kept) = self.answers.get_mut(&number) else {
            return;
        };
        if let Err(full) = kept.held.bytes.resize(kept.answer.bytes() as u64) {
            let why = Refusal::from(full).message;
            kept.answer = Answered::refused(&refusals::answer_not_kept(why));
            kept.held.bytes.force(kept.answer.bytes() as u64);
        }
    }

    /// Stores an answer in place of its call, unless that was done before.
    fn write<D: Driver>(&mut self, number: u64, pool: &PoolName, turn: &mut Turn<'_, D>) {
        if let Some(row) = self.row(number, AnswerRowState::Stored, pool, turn) {
            turn.store(StoreChange::Answer(row), None);
        }
    }

    /// The row of an answer that is not on disk yet; it is written next.
    fn row<D: Driver>(
        &mut self,
        number: u64,
        next: AnswerRowState,
        pool: &PoolName,
        turn: &Turn<'_, D>,
    ) -> Option<Box<AnswerRow>> {
        let kept = self.answers.get_mut(&number)?;
        if kept.row != AnswerRowState::Absent {
            return None;
        }
        kept.row = next;
        let left = kept.expires.since(turn.time()).as_millis();
        let left = u64::try_from(left).unwrap_or(u64::MAX);
        Some(Box::new(AnswerRow {
            number,
            pool: pool.clone(),
            process: kept.whom.process.to_string(),
            caller: kept.whom.caller.clone(),
            id: kept.whom.id.to_string(),
            idempotency_key: kept.key.as_deref().map(Into::into),
            frame: kept.answer.frame(),
            expires: turn.steady_ms().saturating_add(left),
        }))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.answers
            .values()
            .map(|kept| kept.held.bytes.amount())
            .sum()
    }

    pub(super) fn check(&self) {
        let waiting: usize = self.by_app.values().map(|w| w.numbers.len()).sum();
        let on_way: usize = self.on_way.values().map(BTreeSet::len).sum();
        assert_eq!(
            (waiting + on_way, self.expires.len()),
            (self.answers.len(), self.answers.len())
        );
        for (number, kept) in &self.answers {
            assert!(self.expires.contains(&(kept.expires, *number)));
            let numbers = match &kept.on_way {
                Some(to) => &self.on_way[to],
                None => &self.by_app[&kept.whom.caller].numbers,
            };
            assert!(numbers.contains(number));
        }
        let agains = self.by_app.values().filter(|w| w.again.is_some()).count();
        assert_eq!(agains, self.agains.len());
    }
}

impl<D: Driver> Member<D> {
    /// Sends a stored answer; `None` if the receiver can never accept it.
    pub(in crate::pool) fn send_answer(
        &self,
        id: &str,
        answer: &Answered,
        pool: &PoolInfo,
        turn: &mut Turn<'_, D>,
    ) -> Option<Sent> {
        if self.attachments == encode::Attachments::NotTaken
            && too_large(answer.body(), pool.limits.max_frame)
        {
            return None;
        }
        let message = encode::Answer {
            in_reply_to: id,
            pool: Some(pool.name.as_str()),
            status: answer.status,
            error: answer.error.as_deref().map(checked),
            headers: answer.headers.as_deref().map(checked),
            body: answer.body(),
        };
        let length = forwarded_length(message.body, self.attachments)
            + raw_length(message.error)
            + raw_length(message.headers);
        let sent = turn.send(&self.peer, Class::Reply, length, |out| {
            encode::answer(out, &message, self.attachments);
        });
        Some(sent)
    }
}

/// The delivery state of an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::pool) enum DeliveryState {
    /// It is on its way to this instance.
    Yes(MemberKey),
    /// Its caller has no room for it just now.
    NotNow,
    /// No receiver is connected.
    Nobody,
}

impl<D: Driver> DurableCalls<'_, D> {
    /// Restores an answer of an earlier run; false if the stored row is invalid.
    pub fn restore_answer(
        &mut self,
        row: &AnswerRow,
        account: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let now = turn.time();
        let steady_ms = turn.steady_ms();
        let Some(answer) = Answered::read(&row.frame) else {
            return false;
        };
        // Never longer than promised, even if the clock has changed.
        let left = row.expires.saturating_sub(steady_ms);
        let expires = now.after_ms(left.min(self.info.limits.answer_ttl_ms));
        turn.count_held(&self.info.name, self.info.number, 1);
        let kept = StoredAnswer {
            whom: AnswerReceiver {
                process: row.process.as_str().into(),
                caller: row.caller.clone(),
                from: NOBODY,
                id: row.id.as_str().into(),
            },
            key: row.idempotency_key.as_deref().map(Into::into),
            held: HeldCall::restored(account, answer.bytes()),
            answer,
            expires,
            row: AnswerRowState::Stored,
            on_way: None,
        };
        if let Some(key) = &kept.key
            && self
                .repeats
                .restore_answered(&kept.whom.caller, key, account, &self.info.limits)
        {
            self.repeats_answered(&kept.whom.caller, key, &kept.answer, turn);
        }
        self.parked.answers.insert(row.number, kept);
        true
    }

    /// A parked call ended without a handler's answer.
    pub(in crate::pool) fn parked_refused(
        &mut self,
        number: u64,
        refusal: &Refusal,
        turn: &mut Turn<'_, D>,
    ) {
        self.finish_parked(number, (Answered::refused(refusal), false), turn);
    }

    /// A parked call ended: notifies its caller, or stores the answer.
    pub(in crate::pool) fn finish_parked(
        &mut self,
        number: u64,
        (answer, is_answered): (Answered, bool),
        turn: &mut Turn<'_, D>,
    ) {
        let Some(parked) = self.parked.remove(number) else {
            return;
        };
        if !is_answered {
            self.drop_key(number, &parked, turn);
        }
        let key = parked.idempotency_key.filter(|_| is_answered);
        if parked.id.is_empty() {
            if let Some(key) = &key {
                self.repeats_answered(&parked.caller, key, &answer, turn);
            }
            turn.count_held(&self.info.name, self.info.number, -1);
            turn.store(StoreChange::EndCall(number), None);
            return;
        }
        let runs_once = !is_answered || key.is_some();
        let whom = AnswerReceiver {
            process: parked.process.as_str().into(),
            caller: parked.caller,
            from: parked.from,
            id: parked.id,
        };
        self.parked
            .answers
            .keep(number, whom, key, (answer, parked.held), self.info, turn);
        if runs_once {
            self.parked
                .answers
                .write_awaited(number, &self.info.name, turn);
        } else {
            self.pass_on(number, turn);
        }
    }

    /// An answer whose row was awaited ([`crate::driver::Promise::Answer`]) is on disk, or cannot
    /// be stored now: sends it, and writes it as soon as the disk can be written.
    pub fn answer_stored(&mut self, number: u64, is_on_disk: bool, turn: &mut Turn<'_, D>) {
        let Some(kept) = self.parked.answers.answers.get_mut(&number) else {
            return;
        };
        if kept.row != AnswerRowState::Awaited {
            return;
        }
        kept.row = if is_on_disk {
            AnswerRowState::Stored
        } else {
            AnswerRowState::Absent
        };
        if let Some(key) = kept.key.clone() {
            let (caller, answer) = (kept.whom.caller.clone(), kept.answer.clone());
            self.repeats_answered(&caller, &key, &answer, turn);
        }
        self.parked.answers.write(number, &self.info.name, turn);
        self.pass_on(number, turn);
    }

    /// Sends a new answer; one that cannot be sent now is stored.
    fn pass_on(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let kept = &self.parked.answers.answers[&number];
        let app = kept.whom.caller.clone();
        // Answers that already wait for room in the caller's outbox come first.
        let is_behind = self.parked.answers.is_due_again(&app);
        let delivery = if is_behind {
            DeliveryState::NotNow
        } else {
            self.deliver_answer((&app, kept.whom.from), &kept.whom.id, &kept.answer, turn)
        };
        if let DeliveryState::Yes(member) = delivery {
            let kept = self.parked.answers.answers.get_mut(&number);
            let kept = kept.expect("it is kept until it is sent");
            kept.held.bytes.force(kept.answer.bytes() as u64);
            return self.send_on_way(number, member, turn);
        }
        if delivery == DeliveryState::NotNow && !is_behind {
            let again = now.after_ms(ANSWER_AGAIN_MS);
            self.parked.answers.try_again(&app, Some(again));
        }
        self.parked.answers.note_full(number);
        self.parked.answers.write(number, &self.info.name, turn);
    }

    /// An answer is in a member's outbox; the driver reports when it has left.
    fn send_on_way(&mut self, number: u64, member: MemberKey, turn: &mut Turn<'_, D>) {
        self.parked.answers.move_to(number, Some(member));
        if let Some(to) = self.members.at(member) {
            turn.note_delivered(&to.peer, number);
        }
    }

    /// An answer was written, with everything that was appended before it ([`Effects::delivered`]).
    pub fn answer_delivered(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        let answers = &self.parked.answers.answers;
        if answers
            .get(&number)
            .is_some_and(|kept| kept.on_way.is_some())
        {
            self.drop_answer(number, turn);
        }
    }

    /// A member left while answers were in its outbox: they wait again.
    pub(in crate::pool) fn take_answers_back(
        &mut self,
        (key, app): (MemberKey, &AppId),
        turn: &mut Turn<'_, D>,
    ) {
        let numbers = self.parked.answers.on_way_to(key);
        for &number in &numbers {
            self.parked.answers.move_to(number, None);
            self.parked.answers.write(number, &self.info.name, turn);
        }
        if !numbers.is_empty() {
            self.deliver_answers(app, turn);
        }
    }

    /// Sends an answer to the member that called if it is still connected, else to the newest
    /// instance of its app that accepts it. An instance with another call in flight under the same
    /// id is skipped.
    pub(in crate::pool) fn deliver_answer(
        &self,
        (caller, from): (&AppId, MemberKey),
        id: &str,
        answer: &Answered,
        turn: &mut Turn<'_, D>,
    ) -> DeliveryState {
        let is_free = |member| self.calls.find(member, id).is_none();
        if let Some(member) = self.members.at(from).filter(|m| m.takes_answers) {
            match member.send_answer(id, answer, self.info, turn) {
                Some(Sent::Queued) => return DeliveryState::Yes(from),
                Some(Sent::Full) => return DeliveryState::NotNow,
                Some(Sent::Gone) | None => {}
            }
        }
        let instances: Vec<_> = self
            .members
            .iter()
            .filter(|(_, m)| m.app == *caller && m.takes_answers)
            .collect();
        let mut delivery = DeliveryState::Nobody;
        for (key, to) in instances.into_iter().rev() {
            if !is_free(key) {
                delivery = DeliveryState::NotNow;
                continue;
            }
            match to.send_answer(id, answer, self.info, turn) {
                Some(Sent::Queued) => return DeliveryState::Yes(key),
                Some(Sent::Full) => delivery = DeliveryState::NotNow,
                Some(Sent::Gone) | None => {}
            }
        }
        delivery
    }

    /// Sends an app that has reconnected the answers that arrived while it was offline.
    pub fn deliver_answers(&mut self, app: &AppId, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let Some(waiting) = self.parked.answers.by_app.get(app) else {
            return;
        };
        let numbers = waiting.numbers.iter().take(GIVEN_AT_ONCE_MAX + 1);
        let numbers: Vec<u64> = numbers.copied().collect();
        let mut again = None;
        for (seen, &number) in numbers.iter().enumerate() {
            if seen == GIVEN_AT_ONCE_MAX {
                // Others need the pool too.
                again = Some(soon(now));
                break;
            }
            let kept = &self.parked.answers.answers[&number];
            if kept.row == AnswerRowState::Awaited {
                continue;
            }
            match self.deliver_answer((app, kept.whom.from), &kept.whom.id, &kept.answer, turn) {
                DeliveryState::Yes(member) => self.send_on_way(number, member, turn),
                DeliveryState::NotNow => {
                    again = Some(now.after_ms(ANSWER_AGAIN_MS));
                    break;
                }
                // Another instance may accept it.
                DeliveryState::Nobody => {}
            }
        }
        self.parked.answers.try_again(app, again);
    }

    /// Retries answers that did not fit, and drops expired ones.
    pub(super) fn handle_answers_timeout(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while *budget > 0
            && let Some(&(_, number)) = self.parked.answers.expires.first().filter(|e| e.0 <= now)
        {
            *budget -= 1;
            self.drop_answer(number, turn);
        }
        while let Some((_, app)) = self.parked.answers.agains.first().filter(|a| a.0 <= now) {
            let app = app.clone();
            self.deliver_answers(&app, turn);
        }
    }

    pub(in crate::pool) fn drop_answer(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        if let Some(kept) = self.parked.answers.remove(number) {
            turn.count_held(&self.info.name, self.info.number, -1);
            if kept.row != AnswerRowState::Stored {
                turn.store(StoreChange::EndCall(number), None);
            }
            if kept.row != AnswerRowState::Absent {
                turn.store(StoreChange::EndAnswer(number), None);
            }
            if let (AnswerRowState::Awaited, Some(key)) = (kept.row, &kept.key) {
                self.repeats_dropped(&kept.whom.caller, key, turn);
            }
        }
    }
}
