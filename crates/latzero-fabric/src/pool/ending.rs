//! How calls end.
//!
//! Every call ends exactly once: by its handler's answer, its deadline, its caller's cancel, or the
//! end of either side. [`Pool::end`] is the only place where that happens.

use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::message::{Response, Status};
use latzero_protocol::{CallId, Code, Refusal};

use super::answer::Answered;
use super::calls::Call;
use super::routing::{forwarded_length, raw_length, too_large};
use super::{MemberKey, NOBODY, Pool};
use crate::driver::Driver;
use crate::effects::{CallEnd, Count};
use crate::outbox::{Class, Sent};
use crate::refusals;
use crate::slab::Key;
use crate::turn::Turn;

/// How a call ends.
#[derive(Clone, Copy)]
pub(super) enum EndReason<'a> {
    /// Its handler answered, and the answer has been sent.
    Answered { failed: bool },
    /// Its handler's connection or membership ended.
    HandlerGone,
    /// Its caller's connection or membership ended.
    CallerGone,
    /// Its caller cancelled it.
    Cancelled,
    /// It timed out.
    TimedOut,
    /// The server ended it.
    Refused(&'a Refusal),
    /// Its answer could not be forwarded, but the handler has run.
    Unfit {
        refusal: &'a Refusal,
        is_final: bool,
    },
}

impl<D: Driver> Pool<D> {
    /// Forwards a handler's answer. An answer to an ended call is dropped and counted.
    ///
    /// # Errors
    /// If the call was sent to another handler.
    pub fn respond(
        &mut self,
        from: MemberKey,
        id: CallId,
        response: &Response<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<(), Refusal> {
        let found = self.calls.by_id(id).filter(|_| !self.closed);
        let Some((key, call)) = found else {
            turn.count(Count::LateResponse);
            return Ok(());
        };
        if call.member != from {
            turn.count(Count::ForeignResponse);
            return Err(refusals::call_of_other_handler());
        }
        if let Some(number) = call.durable.as_ref().and_then(|durable| durable.number) {
            // Its caller may have left: such a call gets only its answer, no items or progress.
            if response.status.is_final() {
                let failed = response.status == Status::Error;
                let answer = (Answered::of(response), true);
                self.durable().finish_parked(number, answer, turn);
                self.end(key, EndReason::Answered { failed }, turn);
            }
            return Ok(());
        }
        if response.status.is_final()
            && let Some(repeat) = call.repeat.take()
        {
            let (app, repeated) = *repeat;
            let is_detached = call.caller == NOBODY;
            self.durable()
                .repeats_answered(&app, &repeated, &Answered::of(response), turn);
            if is_detached {
                let failed = response.status == Status::Error;
                self.end(key, EndReason::Answered { failed }, turn);
                return Ok(());
            }
        }
        let call = self.calls.at_mut(key).expect("found above");
        if response.status == Status::Partial {
            match &mut call.credit {
                Some(0) => {
                    self.end(key, EndReason::Refused(&refusals::window_exceeded()), turn);
                    return Ok(());
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        let Some(caller) = self.members.at(call.caller) else {
            return Ok(());
        };
        let Some(caller_id) = call.id.as_deref() else {
            // Without an id the caller wants no answer.
            if response.status.is_final() {
                self.end(
                    key,
                    EndReason::Answered {
                        failed: response.status == Status::Error,
                    },
                    turn,
                );
            }
            return Ok(());
        };
        let answer = encode::Answer {
            in_reply_to: caller_id,
            // It may outlive the connection, and the caller's other calls there.
            pool: call.durable.as_ref().map(|_| self.info.name.as_str()),
            status: response.status,
            error: response.error,
            headers: response.headers,
            body: response.body,
        };
        let length = forwarded_length(response.body, caller.attachments)
            + raw_length(response.error)
            + raw_length(response.headers);
        if caller.attachments == Attachments::NotTaken
            && too_large(response.body, self.info.limits.max_frame)
        {
            self.end(
                key,
                EndReason::Unfit {
                    refusal: &refusals::answer_too_large_as_base64(),
                    is_final: response.status.is_final(),
                },
                turn,
            );
            return Ok(());
        }
        let sent = turn.send(&caller.peer, Class::Reply, length, |out| {
            encode::answer(out, &answer, caller.attachments)
        });
        match (sent, response.status.is_final()) {
            (Sent::Queued, true) => {
                self.end(
                    key,
                    EndReason::Answered {
                        failed: response.status == Status::Error,
                    },
                    turn,
                );
            }
            (Sent::Queued, false) => turn.count(Count::Partial),
            (Sent::Full, is_final) => {
                // Never dropped silently: a short error replaces an answer that does not fit.
                self.end(
                    key,
                    EndReason::Unfit {
                        refusal: &refusals::answer_did_not_fit(),
                        is_final,
                    },
                    turn,
                );
            }
            // The caller's connection has ended, and the call ends when the caller leaves.
            (Sent::Gone, _) => {}
        }
        Ok(())
    }

    /// Whether the caller has a call of this id in flight.
    pub(crate) fn has_call(&self, caller: MemberKey, id: &str) -> bool {
        self.calls.find(caller, id).is_some() || self.parked.has_orphan(caller, id)
    }

    /// Cancels a call for its caller; false if the caller has no such call here.
    pub fn cancel(&mut self, caller: MemberKey, id: &str, turn: &mut Turn<'_, D>) -> bool {
        if self.closed {
            return false;
        }
        let Some(key) = self.calls.find(caller, id) else {
            return self.durable().cancel_repeat(caller, id, turn)
                || self.durable().cancel_orphan(caller, id, turn)
                || self.cancel_parked(caller, id, turn)
                || self.blocks().cancel_lock(caller, id, turn);
        };
        self.end(key, EndReason::Cancelled, turn);
        true
    }

    /// Allows `count` further items of a stream; false if the caller has no such call here.
    pub fn ack(&mut self, caller: MemberKey, id: &str, count: u64, turn: &mut Turn<'_, D>) -> bool {
        if self.closed {
            return false;
        }
        let Some(key) = self.calls.find(caller, id) else {
            return self.durable().ack_orphan(caller, id, count);
        };
        let call_id = self.calls.id(key);
        let call = self.calls.at_mut(key).expect("just found");
        let Some(credit) = &mut call.credit else {
            return true;
        };
        *credit = credit
            .saturating_add(count)
            .min(latzero_protocol::limits::WINDOW_MAX);
        if let Some(member) = self.members.at(call.member) {
            turn.send(&member.peer, Class::Control, 64, |out| {
                encode::ack(out, call_id, count)
            });
        }
        true
    }

    /// Ends a call for both sides. A call that already ended is not found: the answer and the
    /// deadline may cross on the way, and the first to reach the pool wins.
    pub(super) fn end(&mut self, key: Key<Call>, how: EndReason<'_>, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let Some(mut call) = self.calls.remove(key) else {
            return;
        };
        let mut process = None;
        if let Some(handler) = self.triggers.handler_mut(call.handler) {
            handler.in_flight -= 1;
            self.parked.note_room(&handler.process);
            process = call.durable.as_ref().map(|_| handler.process.clone());
        }
        if let Some(uses) = &call.blocks {
            self.blocks().revoke(call.member, uses, turn);
        }
        let call_id = self.calls.id(key);
        if let Some(handler) = self.members.at_mut(call.member) {
            handler.serving -= 1;
            let reason = match how {
                // A handler that has sent its final answer has nothing to stop.
                EndReason::Answered { .. }
                | EndReason::HandlerGone
                | EndReason::Unfit { is_final: true, .. } => None,
                EndReason::Cancelled => Some("cancelled"),
                EndReason::CallerGone => Some("caller_gone"),
                EndReason::TimedOut => Some("timeout"),
                EndReason::Refused(refusal) | EndReason::Unfit { refusal, .. } => {
                    Some(refusal.code.as_str())
                }
            };
            if let Some(reason) = reason {
                turn.send(&handler.peer, Class::Control, 96, |out| {
                    encode::cancel(out, call_id, reason)
                });
            }
        }
        let refusal = match how {
            EndReason::Answered { .. } => None,
            // A caller that left the pool but not the server still waits.
            EndReason::CallerGone => Some(refusals::caller_left()),
            EndReason::HandlerGone => Some(refusals::handler_gone()),
            EndReason::Cancelled => Some(refusals::call_cancelled()),
            EndReason::TimedOut => {
                let ms = call.deadline.since(call.started).as_millis();
                Some(refusals::no_answer_in_time(ms))
            }
            EndReason::Refused(refusal) | EndReason::Unfit { refusal, .. } => Some(refusal.clone()),
        };
        let failed = matches!(how, EndReason::Answered { failed: true });
        let is_orphan = matches!(how, EndReason::HandlerGone)
            && call
                .durable
                .as_ref()
                .is_some_and(|durable| durable.redeliver);
        let end = CallEnd {
            started: call.started,
            ended: now,
            code: refusal.as_ref().map(|r| r.code),
            failed,
        };
        if call.caller == NOBODY {
            turn.call_ended(None, end);
            let Some(durable) = call.durable.take() else {
                // Its caller left; a repeat may still ask for the answer.
                if let Some(repeat) = call.repeat {
                    self.durable().repeats_dropped(&repeat.0, &repeat.1, turn);
                }
                return;
            };
            match (durable.number, &refusal) {
                // The server is stopping, not the handler: the next server delivers the call again.
                (Some(number), Some(_))
                    if matches!(how, EndReason::HandlerGone)
                        && turn.driver.context().is_draining() =>
                {
                    self.parked.interrupted(number, durable, now);
                }
                (Some(_), Some(_)) if is_orphan => {
                    let handler = (call.member, process);
                    self.durable()
                        .orphan((NOBODY, None), (durable, None), handler);
                }
                (Some(number), Some(_)) if matches!(how, EndReason::TimedOut) => {
                    self.durable().parked_too_late(number, turn);
                }
                (Some(number), Some(refusal)) => {
                    self.durable().parked_refused(number, refusal, turn)
                }
                (None, Some(_)) => self.durable().drop_repeats_of(&durable, turn),
                _ => {}
            }
            return;
        }
        let caller = self
            .members
            .at_mut(call.caller)
            .expect("a call's caller leaves after its calls ended");
        caller.calling -= 1;
        if let Some(repeat) = call.repeat.take().filter(|_| !is_orphan) {
            self.durable().repeats_dropped(&repeat.0, &repeat.1, turn);
        }
        let caller = self.members.at_mut(call.caller).expect("found above");
        if is_orphan {
            let mut durable = call.durable.take().expect("just seen");
            // The caller counts the items of all attempts together.
            durable.window = call.credit;
            let id = call.id.as_deref().map(Into::into);
            let handler = (call.member, process);
            self.durable()
                .orphan((call.caller, id), (durable, Some(end)), handler);
            return;
        }
        if let (Some(refusal), Some(id)) = (&refusal, &call.id) {
            turn.send(
                &caller.peer,
                Class::Control,
                refusal.message.len() + 256,
                |out| match how {
                    EndReason::Unfit { refusal, .. } => append_unfit(out, id, refusal),
                    _ => encode::refusal(out, Some(id), refusal),
                },
            );
        }
        let caller = caller.peer.clone();
        turn.call_ended(Some(&caller), end);
    }

    /// Ends the calls that a member made and serves, as many as `budget` allows.
    pub(super) fn end_calls_of(
        &mut self,
        key: MemberKey,
        budget: &mut usize,
        turn: &mut Turn<'_, D>,
    ) {
        let mut slot = 0;
        // Stops as soon as the member has no calls left: most have few, and many leave with none.
        while let Some(member) = self.members.at(key)
            && member.calling + member.serving > 0
            && *budget > 0
        {
            let Some((call_key, call)) = self.calls.from(slot) else {
                break;
            };
            let is_own = call.member == key || call.caller == key;
            let how = if call.member == key {
                Some(EndReason::HandlerGone)
            } else if call.caller == key && call.repeat.is_some() {
                self.detach(call_key, turn);
                None
            } else {
                (call.caller == key).then_some(EndReason::CallerGone)
            };
            if let Some(how) = how {
                self.end(call_key, how, turn);
            }
            if is_own {
                *budget -= 1;
            }
            slot = call_key.slot + 1;
        }
    }

    /// The caller of a call with an idempotency key has left. It may return for the answer, so the
    /// handler continues.
    pub(super) fn detach(&mut self, key: Key<Call>, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let call = self.calls.at_mut(key).expect("its caller looked it up");
        let (started, caller) = (call.started, call.caller);
        self.calls.detach(key);
        let member = self.members.at_mut(caller).expect("it is leaving");
        member.calling -= 1;
        let peer = member.peer.clone();
        let end = CallEnd {
            started,
            ended: now,
            code: Some(Code::Cancelled),
            failed: false,
        };
        turn.call_ended(Some(&peer), end);
        turn.call_started(None);
    }
}

/// `overloaded` and `too_large` mean "did not run" everywhere but here, where only the answer was
/// lost.
pub(super) fn append_unfit(out: &mut Vec<u8>, id: &str, refusal: &Refusal) {
    latzero_protocol::frame::append(out, |out| {
        out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
        encode::append_str(out, id);
        out.extend_from_slice(b",\"status\":\"error\",\"error\":{\"code\":\"");
        out.extend_from_slice(refusal.code.as_str().as_bytes());
        out.extend_from_slice(b"\",\"message\":");
        encode::append_str(out, &refusal.message);
        out.extend_from_slice(b",\"ran\":\"unknown\"}}");
    });
}
