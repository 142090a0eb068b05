//! What becomes of a parked call's answer: its caller is told, or it is kept for it.

use latzero_protocol::encode;
use latzero_protocol::message::Response;
use latzero_protocol::{AppId, Code, InstanceId, Refusal};

use super::super::answer::{Answered, checked};
use super::super::routing::{forwarded_length, raw_length, too_large};
use super::super::{Member, Pool};
use super::{ANSWER_AGAIN_MS, Kept};
use crate::effects::{Class, Effects, Sent};
use crate::keep::{AnswerRow, Change};
use crate::memory::check_parked;
use crate::time::Time;

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
            (row.caller.clone(), row.id.as_str().into()),
            answer,
            expires,
            fx,
        );
        true
    }

    pub(in crate::pool) fn keep_answer<E: Effects<Peer = P>>(
        &mut self,
        number: u64,
        (caller, id): (AppId, Box<str>),
        answer: Answered,
        expires: Time,
        fx: &mut E,
    ) {
        let bytes = answer.bytes();
        fx.with_ledger(|ledger| ledger.park(bytes));
        self.parked.deadlines.insert((expires, number));
        let kept = Kept {
            caller,
            id,
            answer,
            bytes,
            expires,
            again: None,
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
        let whom = (&parked.caller, Some(parked.instance));
        if self.tell_answer(whom, &parked.id, &answer, fx) {
            fx.keep(Change::EndCall(number), None);
            return;
        }
        let (bytes, limits) = (answer.bytes(), &self.limits);
        if let Err(refusal) = fx.with_ledger(|ledger| check_parked(ledger, bytes, limits)) {
            // Its caller is told at least that there was an answer.
            let refusal = Refusal::new(
                Code::HandlerGone,
                format!("the answer could not be kept: {}", refusal.message),
            );
            answer = Answered::refused(&refusal);
        } else {
            fx.with_ledger(|ledger| ledger.unpark(bytes));
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
        let whose = (parked.caller, parked.id);
        self.keep_answer(number, whose, answer, now.after_ms(ttl_ms), fx);
    }

    /// Passes an answer to the instance that called, else to the one of its app that came last; false where there is none
    /// that takes it.
    pub(super) fn tell_answer<E: Effects<Peer = P>>(
        &self,
        (caller, instance): (&AppId, Option<InstanceId>),
        id: &str,
        answer: &Answered,
        fx: &mut E,
    ) -> bool {
        let instances = self.members.iter().filter(|(_, m)| m.app == *caller);
        let mut instances: Vec<&Member<P>> = instances.map(|(_, member)| member).collect();
        instances.reverse();
        instances.sort_by_key(|member| Some(member.instance) != instance);
        instances
            .into_iter()
            .any(|to| self.send_answer(to, id, answer, fx) == Sent::Queued)
    }

    /// Sends an answer that was kept.
    pub(in crate::pool) fn send_answer<E: Effects<Peer = P>>(
        &self,
        to: &Member<P>,
        id: &str,
        answer: &Answered,
        fx: &mut E,
    ) -> Sent {
        if to.attachments == encode::Attachments::NotTaken
            && too_large(answer.body(), self.limits.max_frame)
        {
            return Sent::Full;
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
        fx.send(&to.peer, Class::Reply, length, |out| {
            encode::answer(out, &message, to.attachments);
        })
    }

    /// Tells an app that is back what was answered while it was away.
    pub fn tell_answers<E: Effects<Peer = P>>(&mut self, now: Time, app: &AppId, fx: &mut E) {
        let numbers: Vec<u64> = self
            .parked
            .answers
            .iter()
            .filter(|(_, kept)| kept.caller == *app)
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.tell_kept(now, number, fx);
        }
    }

    pub(in crate::pool) fn tell_kept<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        number: u64,
        fx: &mut E,
    ) {
        let Some(kept) = self.parked.answers.get(&number) else {
            return;
        };
        if self.tell_answer((&kept.caller, None), &kept.id, &kept.answer, fx) {
            self.drop_answer(number, fx);
            return;
        }
        let is_here = self.members.iter().any(|(_, m)| m.app == kept.caller);
        if is_here {
            let again = now.after_ms(ANSWER_AGAIN_MS);
            let kept = self.parked.answers.get_mut(&number).expect("just found");
            if let Some(before) = kept.again.replace(again) {
                self.parked.deadlines.remove(&(before, number));
            }
            self.parked.deadlines.insert((again, number));
        }
    }

    pub(in crate::pool) fn drop_answer<E: Effects<Peer = P>>(&mut self, number: u64, fx: &mut E) {
        if let Some(kept) = self.parked.remove_answer(number) {
            fx.with_ledger(|ledger| ledger.unpark(kept.bytes));
            fx.count_held(&self.name, self.number, -1);
            fx.keep(Change::EndAnswer(number), None);
        }
    }
}
