//! Calls on their way to handlers.
//!
//! A call goes to one handler, which [`super::pick`] chooses; without one it may be parked. What a
//! receiver does not accept is refused at once, and nothing is sent.

use std::sync::Arc;

use latzero_protocol::encode::{self, Attachments, Origin};
use latzero_protocol::message::{Park, Trigger};
use latzero_protocol::{Body, Code, InstanceId, Refusal};

use super::calls::Call;
use super::park::DurableCall;
use super::pick::{self, Offer};
use super::repeats::{Seen, scoped_key};
use super::{CallError, Caller, Member, MemberKey, NOBODY, Pool};
use crate::driver::{Driver, Peer};
use crate::ledger::Resource;
use crate::now::Time;
use crate::outbox::{Class, Sent};
use crate::refusals;
use crate::slab::Key;
use crate::turn::Turn;

/// The state of a call that was not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routed {
    /// A handler has it, or it is a repeat that gets the answer of the first call.
    Begun,
    /// It is parked under this number; the caller's reply waits for the disk.
    Parked(u64),
    /// It was already parked under this number when its caller reconnected; the caller's reply
    /// waits for the disk.
    ParkedBefore(u64),
}

impl<D: Driver> Pool<D> {
    /// Routes a call to one handler, or parks it.
    ///
    /// # Errors
    /// The refusal for the caller; nothing was sent.
    pub fn call(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Routed, CallError> {
        let now = turn.time();
        let member = self.members.asker(caller, &self.info.name)?;
        if let Some(id) = &trigger.id
            && (self.repeats.awaits(caller, id) || self.parked.has_orphan(caller, id))
        {
            return Err(refusals::id_in_use(id.escape_debug()).into());
        }
        let Some(key) = &scoped_key(trigger) else {
            return self.call_once(caller, trigger, turn);
        };
        let app = member.app.clone();
        let deadline = now.after_ms(trigger.ttl_ms);
        let (peer, id) = (member.peer.clone(), trigger.id.as_deref());
        let is_parked = id.is_some_and(|id| self.parked.find(&app, id).is_some());
        if trigger.park.is_allowed()
            && !is_parked
            && let Some(room) = self.repeats.followers(&app, key)
        {
            room?;
            return self
                .durable()
                .park_repeat(caller, trigger, key, turn)
                .map(Routed::Parked);
        }
        match self
            .durable()
            .find_repeat(caller, (id, deadline), key, turn)?
        {
            Seen::First => {}
            Seen::Repeat => return Ok(Routed::Begun),
            Seen::Itself(number) if trigger.park.is_allowed() => {
                self.durable().promise_parked(number, &peer, turn);
                return Ok(Routed::ParkedBefore(number));
            }
            Seen::Itself(_) => return Ok(Routed::Begun),
        }
        let called = self.call_once(caller, trigger, turn);
        if called.is_err() {
            self.durable().repeats_dropped(&app, key, turn);
        }
        called
    }

    pub(super) fn call_once(
        &mut self,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Routed, CallError> {
        let now = turn.time();
        if let (Some(id), Some(member)) = (&trigger.id, self.members.at(caller))
            && self.parked.uses(&member.app, id)
        {
            return Err(refusals::id_in_use(id.escape_debug()).into());
        }
        let deadline = now.after_ms(trigger.ttl_ms);
        let from = Caller::Member(caller);
        if !trigger.park.is_allowed() && !trigger.redeliver {
            self.route(from, trigger, (deadline, None), turn)?;
            return Ok(Routed::Begun);
        }
        let member = self.members.at(caller).expect("its caller looked it up");
        let (app, instance) = (&member.app.clone(), member.instance);
        if !trigger.blocks.is_empty() {
            return Err(refusals::durable_call_with_blocks().into());
        }
        // Calls that already wait come first.
        let app_named = trigger.destination.as_ref().map(|d| &*d.app_id);
        let must_wait = match trigger.park {
            Park::No => false,
            Park::IfNeeded => self.parked.waits_for(&trigger.process, app_named),
            Park::Always => true,
        };
        let attempt = trigger.redeliver.then_some(1);
        let held = if trigger.redeliver && !must_wait {
            let account = Arc::clone(member.peer.link().account());
            let bytes = super::park::bytes(trigger) as u64;
            let hold = account.reserve(Resource::Redelivery, bytes);
            Some(hold.map_err(Refusal::from)?)
        } else {
            None
        };
        let routed = if must_wait {
            Err(CallError::UnknownDestination)
        } else {
            self.route(from, trigger, (deadline, attempt), turn)
        };
        match routed {
            Ok(key) => {
                if trigger.redeliver {
                    let call = self.calls.at_mut(key).expect("just begun");
                    let durable = DurableCall::new((app, instance), deadline, trigger, held);
                    call.durable = Some(durable);
                }
                Ok(Routed::Begun)
            }
            Err(error) => {
                // No handler can take it now.
                let may_wait = match &error {
                    CallError::UnknownDestination => true,
                    CallError::Refused(refusal) => {
                        matches!(refusal.code, Code::NoHandler | Code::Overloaded)
                    }
                };
                if !trigger.park.is_allowed() || !may_wait {
                    return Err(error);
                }
                let peer = self.members.at(caller).expect("found above").peer.clone();
                let number = self.durable().park(caller, trigger, Some(&peer), turn)?;
                if must_wait && let Some(served) = self.triggers.get(&trigger.process) {
                    self.parked.note_room(&served.name);
                }
                Ok(Routed::Parked(number))
            }
        }
    }

    /// Offers a call to the trigger's handlers, and starts it if one takes it.
    pub(super) fn route(
        &mut self,
        from: Caller<'_>,
        trigger: &Trigger<'_>,
        (deadline, attempt): (Time, Option<u32>),
        turn: &mut Turn<'_, D>,
    ) -> Result<Key<Call>, CallError> {
        let now = turn.time();
        let Some(served) = self.triggers.get(&trigger.process) else {
            let seen = pick::Seen::default();
            return Err(seen.error(trigger, &self.members, &self.info));
        };
        if let (Some(id), Some(caller)) = (&trigger.id, from.member())
            && self.calls.find(caller, id).is_some()
        {
            return Err(refusals::id_in_use(id.escape_debug()).into());
        }
        let member = from.member().and_then(|m| self.members.at(m));
        self.calls.check_room(member, &self.info)?;
        let (app, instance) = match (from, member) {
            (Caller::Absent(app, instance), _) => (app, instance),
            (Caller::Member(_), Some(member)) => (&member.app, member.instance),
            (Caller::Member(_), None) => return Err(refusals::not_member(&self.info.name).into()),
        };
        // A call that is redelivered still has its place among those of its caller.
        let is_new = attempt.is_none_or(|attempt| attempt == 1);
        let max = self.info.limits.in_flight_max;
        if is_new && member.is_some_and(|m| m.peer.in_flight().count() >= max) {
            return Err(refusals::too_many_in_flight(max).into());
        }
        let uses = match (&trigger.blocks[..], member) {
            ([], _) | (_, None) => Vec::new(),
            (named, Some(member)) => {
                let caller = member.claimant();
                self.blocks.check_uses(caller, named, &self.info)?
            }
        };
        let user = member.filter(|m| m.is_stranger).map(|m| m.user);
        let start = pick::start(served, &mut self.prng);
        let key = self.calls.next_key();
        let delivery = encode::Delivery {
            call: self.calls.id(key),
            process: served.name.as_str(),
            pool: self.info.name.as_str(),
            origin: Origin {
                app_id: app.as_str(),
                instance,
            },
            ttl_ms: match attempt {
                None => trigger.ttl_ms,
                Some(_) => u64::try_from(deadline.since(now).as_millis())
                    .unwrap_or(u64::MAX)
                    .max(1),
            },
            attempt,
            window: trigger.window,
            key: trigger.key.as_deref(),
            destination: trigger.destination.as_ref().map(|d| d.raw),
            blocks: None,
            headers: trigger.headers,
            body: trigger.body,
        };
        let around = trigger.key.as_ref().map_or(0, |key| key.len())
            + raw_length(delivery.destination)
            + raw_length(trigger.headers);
        let mut seen = pick::Seen::default();
        let (calls, per_handler_max) = (&self.calls, self.info.limits.in_flight_per_handler_max);
        let caller_key = from.member().unwrap_or(NOBODY);
        let is_busy_caller = member.is_some_and(|m| m.calling >= per_handler_max);
        let chosen = pick::each(
            served,
            &self.triggers,
            &self.members,
            start,
            || sticky(self.hash_seed, trigger.key.as_deref(), instance),
            |handler, to| {
                if !matches(trigger.destination.as_ref(), to) {
                    return Offer::NotMeant;
                }
                // It receives only emits and handles no calls.
                if handler.concurrency == 0 {
                    return Offer::NotMeant;
                }
                seen.matching = true;
                if !handler.has_room() {
                    return Offer::Busy;
                }
                // Looked up only if needed: most callers have few calls in flight.
                if is_busy_caller && calls.between(caller_key, handler.member) >= per_handler_max {
                    seen.silent = true;
                    return Offer::Busy;
                }
                if to.attachments == Attachments::NotTaken
                    && too_large(trigger.body, self.info.limits.max_frame)
                {
                    seen.too_large = true;
                    return Offer::Busy;
                }
                let length = around + forwarded_length(trigger.body, to.attachments);
                if !uses.is_empty() {
                    let max = self.info.limits.descriptors_unread_max;
                    if to.takes_descriptors && to.peer.link().outbox.descriptors() >= max {
                        return Offer::Busy;
                    }
                    let (blocks, descriptors) =
                        self.blocks
                            .describe_uses(&uses, to.takes_descriptors, &self.info, turn);
                    let delivery = encode::Delivery {
                        blocks: Some((&blocks, descriptors.len())),
                        ..delivery
                    };
                    let length = length + blocks.len();
                    return match turn.send_descriptors(
                        &to.peer,
                        Class::Call,
                        length,
                        descriptors,
                        |out| encode::delivery(out, &delivery, to.attachments),
                    ) {
                        Sent::Queued => Offer::Taken,
                        Sent::Full | Sent::Gone => Offer::Busy,
                    };
                }
                match turn.send(&to.peer, Class::Call, length, |out| {
                    encode::delivery(out, &delivery, to.attachments)
                }) {
                    Sent::Queued => Offer::Taken,
                    Sent::Full | Sent::Gone => Offer::Busy,
                }
            },
        );
        let Some((position, handler_key)) = chosen else {
            return Err(seen.error(trigger, &self.members, &self.info));
        };
        served.turn.set(position + 1);
        let handler = self.triggers.handler_mut(handler_key);
        let handler = handler.expect("it was just picked");
        handler.in_flight += 1;
        let serving = handler.member;
        let call = Call {
            caller: from.member().unwrap_or(NOBODY),
            user,
            // A parked call is found by its number.
            id: trigger
                .id
                .as_deref()
                .filter(|_| from.member().is_some())
                .map(Into::into),
            member: serving,
            handler: handler_key,
            started: now,
            deadline,
            credit: trigger.window,
            blocks: (!uses.is_empty()).then(|| uses.clone().into()),
            durable: None,
            repeat: match (scoped_key(trigger), from) {
                (Some(key), Caller::Member(_)) => Some(Box::new((app.clone(), key))),
                _ => None,
            },
        };
        self.calls.insert(key, call);
        if !uses.is_empty() {
            self.blocks.lend(serving, &uses);
        }
        let to = self
            .members
            .at_mut(serving)
            .expect("a handler's member lives");
        to.serving += 1;
        let caller = from.member().map(|caller| {
            let member = self.members.at_mut(caller).expect("the call succeeds");
            member.calling += 1;
            &member.peer
        });
        turn.call_started(caller);
        Ok(key)
    }
}

/// What a sticky trigger hashes: the key, or else the caller. A call and an emit with the same key
/// go to the same handler.
pub(super) fn sticky(seed: u64, key: Option<&str>, from: InstanceId) -> u64 {
    match key {
        Some(key) => crate::prng::hash(seed, key.as_bytes()),
        None => crate::prng::hash(seed, &from.0.to_le_bytes()),
    }
}

pub(super) fn matches<D: Driver>(
    destination: Option<&latzero_protocol::message::Destination<'_>>,
    member: &Member<D>,
) -> bool {
    destination.is_none_or(|d| {
        d.app_id == member.app.as_str()
            && d.instance
                .is_none_or(|instance| instance == member.instance)
    })
}

/// Approximate size of a forwarded message in bytes: the body in the form that its receiver
/// accepts, and the fields around it.
pub(super) fn forwarded_length(body: Body<'_>, attachments: Attachments) -> usize {
    let body = match (body, attachments) {
        (Body::Bytes(bytes), Attachments::NotTaken) => base64_length(bytes),
        _ => body.len(),
    };
    body + 512
}

pub(super) fn raw_length(field: Option<latzero_protocol::Raw<'_>>) -> usize {
    field.map_or(0, |raw| raw.text().len())
}

pub(super) fn base64_length(bytes: &[u8]) -> usize {
    bytes.len().div_ceil(3) * 4
}

/// Whether raw bytes would pass the frame limit once they are base64.
pub(super) fn too_large(body: Body<'_>, max_frame: usize) -> bool {
    matches!(body, Body::Bytes(bytes) if base64_length(bytes) > max_frame)
}
