//! What becomes of a parked call's answer: its caller is told, or it is kept for it.
//!
//! The instance that called is told as long as it lives, and else whichever of its app's instances takes it. Answers of one
//! app are told in the order of their calls; one that does not fit into an outbox holds up those behind it for a while.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;

use latzero_protocol::encode;
use latzero_protocol::message::Response;
use latzero_protocol::{AppId, Code, Refusal};

use super::super::answer::{Answered, checked};
use super::super::routing::{forwarded_length, raw_length, too_large};
use super::super::{Member, MemberKey, NOBODY, Pool, place};
use super::{GIVEN_AT_ONCE_MAX, soon};
use crate::effects::{Class, Effects, Sent};
use crate::keep::{AnswerRow, Change};
use crate::memory::check_parked;
use crate::time::Time;

/// After how long answers that did not fit into their caller's outbox are tried again, in milliseconds.
const ANSWER_AGAIN_MS: u64 = 1000;

/// An answer that waits for its caller.
struct Kept {
    caller: AppId,
    /// Who called: told first, if it is still there.
    from: MemberKey,
    id: Box<str>,
    answer: Answered,
    bytes: usize,
    expires: Time,
}

/// What waits for one app.
#[derive(Default)]
struct Waiting {
    numbers: BTreeSet<u64>,
    /// Tried again then.
    again: Option<Time>,
}

/// The answers that a pool keeps.
#[derive(Default)]
pub(super) struct KeptAnswers {
    answers: BTreeMap<u64, Kept>,
    by_app: HashMap<AppId, Waiting>,
    expires: BTreeSet<(Time, u64)>,
    agains: BTreeSet<(Time, AppId)>,
}

impl KeptAnswers {
    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let expires = self.expires.first().map(|(at, _)| *at);
        let again = self.agains.first().map(|(at, _)| *at);
        expires.into_iter().chain(again).min()
    }

    pub(super) fn numbers(&self) -> Vec<u64> {
        self.answers.keys().copied().collect()
    }

    fn insert(&mut self, number: u64, kept: Kept) {
        self.expires.insert((kept.expires, number));
        let waiting = self.by_app.entry(kept.caller.clone()).or_default();
        waiting.numbers.insert(number);
        self.answers.insert(number, kept);
    }

    fn remove(&mut self, number: u64) -> Option<Kept> {
        let kept = self.answers.remove(&number)?;
        self.expires.remove(&(kept.expires, number));
        if let Some(waiting) = self.by_app.get_mut(&kept.caller) {
            waiting.numbers.remove(&number);
            if waiting.numbers.is_empty() {
                self.try_again(&kept.caller, None);
                self.by_app.remove(&kept.caller);
            }
        }
        Some(kept)
    }

    /// Has an app's answers tried again then, or not before it asks.
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

    pub(super) fn check(&self) {
        let waiting: usize = self.by_app.values().map(|w| w.numbers.len()).sum();
        assert_eq!(
            (waiting, self.expires.len()),
            (self.answers.len(), self.answers.len())
        );
        for (number, kept) in &self.answers {
            assert!(self.expires.contains(&(kept.expires, *number)));
            assert!(self.by_app[&kept.caller].numbers.contains(number));
        }
        let agains = self.by_app.values().filter(|w| w.again.is_some()).count();
        assert_eq!(agains, self.agains.len());
    }
}

/// What became of an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::pool) enum Told {
    /// It is on its way to its caller.
    Yes,
    /// Its caller has no room for it just now.
    NotNow,
    /// Nobody is there who could take it.
    Nobody,
}

impl<P: Clone> Pool<P> {
    /// Takes in an answer that an earlier run kept; false where its row makes no sense.
    pub fn restore_answer<E: Effects<Peer = P>>(
        &mut self,
        (now, unix_ms): (Time, u64),
        row: &AnswerRow,
        fx: &mut E,
    ) -> bool {
        let Some(answer) = Answered::read(&row.frame) else {
            return false;
        };
        let expires = now.after_ms(row.expires.saturating_sub(unix_ms));
        fx.count_held(&self.name, self.number, 1);
        self.keep_answer(
            row.number,
            (row.caller.clone(), NOBODY, row.id.as_str().into()),
            answer,
            expires,
            fx,
        );
        true
    }

    pub(in crate::pool) fn keep_answer<E: Effects<Peer = P>>(
        &mut self,
        number: u64,
        (caller, from, id): (AppId, MemberKey, Box<str>),
        answer: Answered,
        expires: Time,
        fx: &mut E,
    ) {
        let bytes = answer.bytes();
        fx.with_ledger(|ledger| ledger.park(&caller, bytes));
        let kept = Kept {
            caller,
            from,
            id,
            answer,
            bytes,
            expires,
        };
        self.parked.answers.insert(number, kept);
    }

    /// A handler answered a parked call.
    pub(in crate::pool) fn parked_answered<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        number: u64,
        response: &Response<'_>,
        fx: &mut E,
    ) {
        self.finish_parked(now, number, (Answered::of(response), true), fx);
    }

    /// A parked call is over without an answer of a handler's.
    pub(in crate::pool) fn parked_refused<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        number: u64,
        refusal: &Refusal,
        fx: &mut E,
    ) {
        self.finish_parked(now, number, (Answered::refused(refusal), false), fx);
    }

    /// A parked call is over: its caller is told, or its answer kept.
    pub(in crate::pool) fn finish_parked<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        number: u64,
        (mut answer, is_answered): (Answered, bool),
        fx: &mut E,
    ) {
        let Some(parked) = self.forget_parked(number, fx) else {
            return;
        };
        match &parked.idempotency_key {
            Some(key) if is_answered => {
                self.repeats_answered(now, &parked.caller, key, &answer, fx);
            }
            Some(key) => self.repeats_dropped(&parked.caller, key, fx),
            None => {}
        }
        if parked.id.is_empty() {
            fx.keep(Change::EndCall(number), None);
            return;
        }
        // Those that wait until there is room in the caller's outbox come first.
        let is_behind = self.parked.answers.is_due_again(&parked.caller);
        let told = if is_behind {
            Told::NotNow
        } else {
            let whom = (&parked.caller, parked.from);
            self.tell_answer(whom, &parked.id, &answer, fx)
        };
        if told == Told::Yes {
            fx.keep(Change::EndCall(number), None);
            return;
        }
        let (bytes, limits) = (answer.bytes(), &self.limits);
        let caller = &parked.caller;
        if let Err(refusal) = fx.with_ledger(|ledger| check_parked(ledger, caller, bytes, limits)) {
            // Its caller is told at least that there was an answer.
            let refusal = Refusal::new(
                Code::HandlerGone,
                format!("the answer could not be kept: {}", refusal.message),
            );
            answer = Answered::refused(&refusal);
        } else {
            fx.with_ledger(|ledger| ledger.unpark(caller, bytes));
        }
        let ttl_ms = self.limits.answer_ttl_ms;
        let row = AnswerRow {
            number,
            pool: self.name.clone(),
            caller: parked.caller.clone(),
            id: parked.id.to_string(),
            idempotency_key: parked.idempotency_key.as_deref().map(Into::into),
            frame: answer.frame(),
            expires: fx.unix_ms(now) + ttl_ms,
        };
        fx.keep(Change::Answer(Box::new(row)), None);
        fx.count_held(&self.name, self.number, 1);
        let whose = (parked.caller.clone(), parked.from, parked.id);
        self.keep_answer(number, whose, answer, now.after_ms(ttl_ms), fx);
        if told == Told::NotNow && !is_behind {
            let again = now.after_ms(ANSWER_AGAIN_MS);
            self.parked.answers.try_again(&parked.caller, Some(again));
        }
    }

    /// Passes an answer to the member that called while it is there, else to the instance of its app that came last and
    /// takes it.
    pub(in crate::pool) fn tell_answer<E: Effects<Peer = P>>(
        &self,
        (caller, from): (&AppId, MemberKey),
        id: &str,
        answer: &Answered,
        fx: &mut E,
    ) -> Told {
        if let Some(member) = self.members.at(place(from)) {
            match self.send_answer(member, id, answer, fx) {
                Some(Sent::Queued) => return Told::Yes,
                Some(Sent::Full) => return Told::NotNow,
                Some(Sent::Gone) | None => {}
            }
        }
        let instances = self.members.iter().filter(|(_, m)| m.app == *caller);
        let instances: Vec<&Member<P>> = instances.map(|(_, member)| member).collect();
        let mut told = Told::Nobody;
        for to in instances.into_iter().rev() {
            match self.send_answer(to, id, answer, fx) {
                Some(Sent::Queued) => return Told::Yes,
                Some(Sent::Full) => told = Told::NotNow,
                Some(Sent::Gone) | None => {}
            }
        }
        told
    }

    /// Sends an answer that was kept; `None` where the receiver can never take it.
    pub(in crate::pool) fn send_answer<E: Effects<Peer = P>>(
        &self,
        to: &Member<P>,
        id: &str,
        answer: &Answered,
        fx: &mut E,
    ) -> Option<Sent> {
        if to.attachments == encode::Attachments::NotTaken
            && too_large(answer.body(), self.limits.max_frame)
        {
            return None;
        }
        let message = encode::Answer {
            in_reply_to: id,
            status: answer.status,
            error: answer.error.as_deref().map(checked),
            headers: answer.headers.as_deref().map(checked),
            body: answer.body(),
        };
        let length = forwarded_length(message.body, to.attachments)
            + raw_length(message.error)
            + raw_length(message.headers);
        let sent = fx.send(&to.peer, Class::Reply, length, |out| {
            encode::answer(out, &message, to.attachments);
        });
        Some(sent)
    }

    /// Tells an app that is back what was answered while it was away.
    pub fn tell_answers<E: Effects<Peer = P>>(&mut self, now: Time, app: &AppId, fx: &mut E) {
        let Some(waiting) = self.parked.answers.by_app.get(app) else {
            return;
        };
        let numbers = waiting.numbers.iter().take(GIVEN_AT_ONCE_MAX + 1);
        let numbers: Vec<u64> = numbers.copied().collect();
        let mut again = None;
        for (seen, &number) in numbers.iter().enumerate() {
            if seen == GIVEN_AT_ONCE_MAX {
                // Others want the pool as well.
                again = Some(soon(now));
                break;
            }
            let kept = &self.parked.answers.answers[&number];
            match self.tell_answer((app, kept.from), &kept.id, &kept.answer, fx) {
                Told::Yes => self.drop_answer(number, fx),
                Told::NotNow => {
                    again = Some(now.after_ms(ANSWER_AGAIN_MS));
                    break;
                }
                // Another instance may take it.
                Told::Nobody => {}
            }
        }
        self.parked.answers.try_again(app, again);
    }

    /// Tries again what did not fit, and gives up what waited long enough.
    pub(super) fn handle_answers_timeout<E: Effects<Peer = P>>(&mut self, now: Time, fx: &mut E) {
        while let Some(&(_, number)) = self.parked.answers.expires.first().filter(|e| e.0 <= now) {
            self.drop_answer(number, fx);
        }
        while let Some((_, app)) = self.parked.answers.agains.first().filter(|a| a.0 <= now) {
            let app = app.clone();
            self.tell_answers(now, &app, fx);
        }
    }

    pub(in crate::pool) fn drop_answer<E: Effects<Peer = P>>(&mut self, number: u64, fx: &mut E) {
        if let Some(kept) = self.parked.answers.remove(number) {
            fx.with_ledger(|ledger| ledger.unpark(&kept.caller, kept.bytes));
            fx.count_held(&self.name, self.number, -1);
            fx.keep(Change::EndAnswer(number), None);
        }
    }
}
