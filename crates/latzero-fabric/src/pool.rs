//! One pool, as a state machine: who is in it, who serves what, and which calls are under way.
//!
//! A pool decides; it never acts. Every method takes the time and what happened, and says through [`Effects`] what is
//! to be sent. Messages to one connection are appended while the pool is held, so the order in which a client sees
//! them is the order in which the pool decided them.
//!
//! Every call ends exactly once: by its handler's answer, its deadline, its caller's cancel, or the end of either side.
//! [`Pool::end`] is the only place where that happens.

mod answer;
mod blocks;
mod calls;
mod lock;
mod park;
mod pick;
mod repeats;

use hashbrown::HashMap;
use latzero_protocol::encode::{self, Attachments, Origin};
use latzero_protocol::message::{
    Emit, Event, EventSet, Response, Status, Strategy, Trigger, TriggerSpec,
};
use latzero_protocol::{AppId, Body, CallId, Code, InstanceId, PoolName, Refusal, TriggerName};

use crate::effects::{CallEnd, Class, Count, Effects, Sent};
use crate::limits::Limits;
use crate::prng::Prng;
use crate::slab::{Key, Slab};
use crate::time::Time;
use answer::Answered;
use blocks::Blocks;
pub use blocks::{Asking, BlockKey, Found, LockWish, Place, ReadPlan, Replied, WritePlan};
use calls::{Call, Calls};
use park::{Lasting, ParkedCalls};
use pick::Offer;
use repeats::{Repeats, Seen};

/// Triggers of a pool, and handlers of each, that its description shows one by one.
const TRIGGERS_SHOWN_MAX: usize = 1000;
const HANDLERS_SHOWN_MAX: usize = 20;

/// A member's place in its pool.
pub type MemberKey = Key<Seat>;

/// Marks keys of members. The member itself is generic over its connection; its key need not be.
#[derive(Debug)]
pub enum Seat {}

type HandlerKey = Key<Handler>;

/// The caller of a call that is nobody's connection's: a parked one, or one whose caller may ask for its answer again.
const NOBODY: MemberKey = Key::new(u32::MAX, u32::MAX);

/// Who calls.
#[derive(Debug, Clone, Copy)]
enum Caller<'a> {
    Member(MemberKey),
    /// Of a parked call: whoever it was may be gone.
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

/// One instance in the pool.
struct Member<P> {
    peer: P,
    app: AppId,
    instance: InstanceId,
    attachments: Attachments,
    watch: Option<EventSet>,
    triggers: Vec<TriggerName>,
    /// Calls it made and calls it serves, so that its end need not search for none.
    calling: u32,
    serving: u32,
    /// Whether file descriptors can be passed to it.
    takes_descriptors: bool,
    /// Blocks that it may have something to do with, so that its end finds them.
    blocks: Vec<BlockKey>,
}

impl<P> Member<P> {
    fn origin(&self) -> Origin<'_> {
        Origin {
            app_id: self.app.as_str(),
            instance: self.instance,
        }
    }
}

/// One instance as the handler of one trigger.
struct Handler {
    member: MemberKey,
    in_flight: u32,
    concurrency: u32,
}

/// A named handler in the pool.
struct Served {
    name: TriggerName,
    strategy: Strategy,
    doc: Option<String>,
    handlers: Vec<HandlerKey>,
    /// Where the next turn of a round begins.
    turn: usize,
}

/// Who joins a pool.
#[derive(Debug, Clone)]
pub struct Joining<P> {
    /// The connection.
    pub peer: P,
    /// The app.
    pub app: AppId,
    /// The instance.
    pub instance: InstanceId,
    /// Whether it takes attachment frames.
    pub attachments: Attachments,
    /// Whether file descriptors can be passed to it.
    pub takes_descriptors: bool,
}

/// Why a call did not begin.
#[derive(Debug)]
pub enum CallError {
    /// It is refused.
    Refused(Refusal),
    /// Its destination is not in this pool; the registry knows whether there is such an app at all.
    UnknownDestination,
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        CallError::Refused(refusal)
    }
}

/// A pool in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Live members.
    pub members: usize,
    /// Triggers with at least one handler.
    pub triggers: usize,
    /// Calls under way.
    pub calls_in_flight: usize,
    /// Calls that began since the pool was made.
    pub calls: u64,
    /// Emits since the pool was made.
    pub emits: u64,
    /// Blocks of memory.
    pub blocks: usize,
    /// Bytes of its blocks, slots and headers included.
    pub block_bytes: u64,
    /// Calls that are parked, those that a handler has included.
    pub parked_calls: usize,
    /// Answers that wait for their callers.
    pub parked_answers: usize,
}

/// A namespace of triggers, with the calls between its members.
pub struct Pool<P> {
    number: u32,
    name: PoolName,
    limits: Limits,
    prng: Prng,
    hash_seed: u64,
    members: Slab<Member<P>>,
    triggers: HashMap<TriggerName, Served>,
    handlers: Slab<Handler>,
    calls: Calls,
    calls_total: u64,
    emits_total: u64,
    blocks: Blocks,
    parked: ParkedCalls,
    repeats: Repeats,
    /// Members that watch for changes of blocks.
    change_watchers: usize,
    closed: bool,
    scratch: Vec<u8>,
}

impl<P> std::fmt::Debug for Pool<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<P: Clone> Pool<P> {
    /// An empty pool. `number` is what the ids of its calls begin with; no two pools of a server share one.
    #[must_use]
    pub fn new(number: u32, name: PoolName, limits: Limits, mut prng: Prng) -> Self {
        let hash_seed = prng.next_u64();
        Pool {
            number,
            name,
            limits,
            hash_seed,
            calls: Calls::new(prng.next_u64()),
            prng,
            members: Slab::default(),
            triggers: HashMap::new(),
            handlers: Slab::default(),
            calls_total: 0,
            emits_total: 0,
            blocks: Blocks::default(),
            parked: ParkedCalls::default(),
            repeats: Repeats::default(),
            change_watchers: 0,
            closed: false,
            scratch: Vec::new(),
        }
    }

    /// Whether anything in it may come due: it has members, or calls or answers that wait for some.
    #[must_use]
    pub fn is_due_to_wake(&self) -> bool {
        self.members.len() > 0 || self.parked.counts() != (0, 0)
    }

    /// The pool's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &PoolName {
        &self.name
    }

    /// The pool in numbers.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let (parked_calls, parked_answers) = self.parked.counts();
        PoolStats {
            members: self.members.len(),
            triggers: self.triggers.len(),
            calls_in_flight: self.calls.len(),
            calls: self.calls_total,
            emits: self.emits_total,
            blocks: self.blocks.len(),
            block_bytes: self.blocks.bytes(),
            parked_calls,
            parked_answers,
        }
    }

    /// Takes a member in and tells the watchers; `None` where the pool was removed meanwhile.
    pub fn join<E: Effects<Peer = P>>(
        &mut self,
        joining: Joining<P>,
        fx: &mut E,
    ) -> Option<MemberKey> {
        if self.closed {
            return None;
        }
        let Joining {
            peer,
            app,
            instance,
            attachments,
            takes_descriptors,
        } = joining;
        let event = Presence {
            app: &app,
            instance,
            trigger: None,
        };
        let told = self.presence_json(Event::AppOnline, &event);
        let member = Member {
            peer,
            app,
            instance,
            attachments,
            watch: None,
            triggers: Vec::new(),
            calling: 0,
            serving: 0,
            takes_descriptors,
            blocks: Vec::new(),
        };
        let key = seat(self.members.insert(member));
        self.tell(Event::AppOnline, &told, Some(key), fx);
        Some(key)
    }

    /// Ends a membership: its calls end, its triggers go, the watchers are told. False where it had ended before.
    pub fn leave<E: Effects<Peer = P>>(&mut self, now: Time, key: MemberKey, fx: &mut E) -> bool {
        if self.member(key).is_none() {
            return false;
        }
        self.end_calls_of(now, key, fx);
        self.leave_blocks(now, key, fx);
        self.watch(key, None);
        let names = self
            .member_mut(key)
            .map(|m| std::mem::take(&mut m.triggers))
            .unwrap_or_default();
        for name in names {
            self.drop_handler(key, &name, fx);
        }
        let member = self.members.remove(place(key)).expect("checked above");
        let event = Presence {
            app: &member.app,
            instance: member.instance,
            trigger: None,
        };
        let told = self.presence_json(Event::AppOffline, &event);
        self.tell(Event::AppOffline, &told, None, fx);
        self.see_to_orphans(now, fx);
        true
    }

    /// Serves a trigger: calls that were parked for it are given to the new handler. Registering it again changes its
    /// settings.
    pub fn serve<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        key: MemberKey,
        spec: &TriggerSpec,
        fx: &mut E,
    ) {
        if self.member(key).is_none() {
            return;
        }
        let concurrency = spec.concurrency.unwrap_or(u32::MAX);
        let served = self
            .triggers
            .entry(spec.name.clone())
            .or_insert_with(|| Served {
                name: spec.name.clone(),
                strategy: spec.strategy,
                doc: None,
                handlers: Vec::new(),
                turn: 0,
            });
        // The latest registration decides: a new version of an app may change how its calls are spread.
        served.strategy = spec.strategy;
        if spec.doc.is_some() {
            served.doc.clone_from(&spec.doc);
        }
        let known = served
            .handlers
            .iter()
            .copied()
            .find(|&h| self.handlers.at(h).is_some_and(|h| h.member == key));
        if let Some(handler) = known.and_then(|h| self.handlers.at_mut(h)) {
            handler.concurrency = concurrency;
            self.give_parked(now, spec.name.as_str(), fx);
            return;
        }
        served.handlers.push(self.handlers.insert(Handler {
            member: key,
            in_flight: 0,
            concurrency,
        }));
        let member = self.members.at_mut(place(key)).expect("checked above");
        member.triggers.push(spec.name.clone());
        let (app, instance) = (member.app.clone(), member.instance);
        let event = Presence {
            app: &app,
            instance,
            trigger: Some(&spec.name),
        };
        let told = self.presence_json(Event::TriggerAdded, &event);
        self.tell(Event::TriggerAdded, &told, Some(key), fx);
        self.give_parked(now, spec.name.as_str(), fx);
    }

    /// Serves a trigger no longer. Calls under way may still be answered.
    pub fn unserve<E: Effects<Peer = P>>(
        &mut self,
        key: MemberKey,
        name: &TriggerName,
        fx: &mut E,
    ) {
        let Some(member) = self.member_mut(key) else {
            return;
        };
        let Some(at) = member.triggers.iter().position(|t| t == name) else {
            return;
        };
        member.triggers.swap_remove(at);
        self.drop_handler(key, name, fx);
    }

    /// Sends the pool's events to a member; `None` stops them. False where the membership has ended.
    pub fn watch(&mut self, key: MemberKey, events: Option<EventSet>) -> bool {
        let Some(member) = self.member_mut(key) else {
            return false;
        };
        let watches = |set: Option<EventSet>| set.is_some_and(|set| set.has(Event::BlockChanged));
        let (before, after) = (watches(member.watch), watches(events));
        member.watch = events;
        self.change_watchers -= usize::from(before);
        self.change_watchers += usize::from(after);
        true
    }

    /// Routes a call to one handler. Where none is live and the call may wait for one, it is parked, with a promise to its
    /// caller: its number is returned.
    ///
    /// # Errors
    /// The refusal that the caller is to be told; nothing was sent then.
    pub fn call<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        fx: &mut E,
    ) -> Result<Option<u64>, CallError> {
        let Some(member) = self.members.at(place(caller)) else {
            return Err(not_member(&self.name).into());
        };
        let Some(key) = trigger.idempotency_key.as_deref() else {
            return self.call_once(now, caller, trigger, fx);
        };
        let app = member.app.clone();
        if let Seen::Repeat = self.look_up_repeat(caller, trigger.id.as_deref(), key, fx)? {
            return Ok(None);
        }
        let called = self.call_once(now, caller, trigger, fx);
        if called.is_err() {
            self.repeats_dropped(&app, key, fx);
        }
        called
    }

    fn call_once<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        caller: MemberKey,
        trigger: &Trigger<'_>,
        fx: &mut E,
    ) -> Result<Option<u64>, CallError> {
        let deadline = now.after_ms(trigger.ttl_ms);
        let from = Caller::Member(caller);
        if !trigger.park && !trigger.redeliver {
            self.route(now, from, trigger, (deadline, None), fx)?;
            return Ok(None);
        }
        let member = self.members.at(place(caller)).expect("its caller found it");
        let (app, instance) = (&member.app.clone(), member.instance);
        if !trigger.blocks.is_empty() {
            let message = "a call that may wait for its handler, or be given to another one, can't take blocks along";
            return Err(Refusal::new(Code::BadMessage, message).into());
        }
        if let Some(id) = &trigger.id
            && self.has_parked(app, id)
        {
            return Err(id_in_use(id).into());
        }
        // Those that wait already come first.
        let must_wait = trigger.park && self.parked.waits_for(&trigger.process);
        let attempt = trigger.redeliver.then_some(1);
        let routed = if must_wait {
            Err(CallError::UnknownDestination)
        } else {
            self.route(now, from, trigger, (deadline, attempt), fx)
        };
        match routed {
            Ok(key) => {
                if trigger.redeliver {
                    let call = self.calls.at_mut(key).expect("just begun");
                    call.lasting = Some(Lasting::new((app, instance), deadline, trigger));
                }
                Ok(None)
            }
            Err(error) => {
                let is_nobody_there = match &error {
                    CallError::UnknownDestination => true,
                    CallError::Refused(refusal) => refusal.code == Code::NoHandler,
                };
                if !trigger.park || !is_nobody_there {
                    return Err(error);
                }
                let peer = self
                    .members
                    .at(place(caller))
                    .expect("found above")
                    .peer
                    .clone();
                let times = (now, fx.unix_ms(now));
                let number = self.park(times, caller, trigger, Some(&peer), fx)?;
                if must_wait {
                    self.give_newcomer(now, &trigger.process, number, fx);
                }
                Ok(Some(number))
            }
        }
    }

    /// Offers a call to the trigger's handlers, and begins it where one takes it.
    fn route<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        from: Caller<'_>,
        trigger: &Trigger<'_>,
        (deadline, attempt): (Time, Option<u32>),
        fx: &mut E,
    ) -> Result<Key<Call>, CallError> {
        let Some(served) = self.triggers.get(&*trigger.process) else {
            return Err(self.no_handler(trigger));
        };
        if let (Some(id), Some(caller)) = (&trigger.id, from.member())
            && self.calls.find(caller, id).is_some()
        {
            return Err(id_in_use(id).into());
        }
        if self.calls.len() >= self.limits.pending_max {
            let message = format!(
                "pool '{}' holds {} calls (limits.pending_max)",
                self.name, self.limits.pending_max
            );
            return Err(Refusal::new(Code::Overloaded, message).into());
        }
        let member = from.member().and_then(|m| self.members.at(place(m)));
        let (app, instance) = match (from, member) {
            (Caller::Absent(app, instance), _) => (app, instance),
            (Caller::Member(_), Some(member)) => (&member.app, member.instance),
            (Caller::Member(_), None) => return Err(not_member(&self.name).into()),
        };
        if member.is_some_and(|m| fx.in_flight(&m.peer) >= self.limits.in_flight_max) {
            let message = format!(
                "{} calls of this connection are in flight (limits.in_flight_max)",
                self.limits.in_flight_max
            );
            return Err(Refusal::new(Code::Overloaded, message).into());
        }
        let uses = match (&trigger.blocks[..], from.member()) {
            ([], _) | (_, None) => Vec::new(),
            (named, Some(caller)) => self.check_uses(caller, named)?,
        };
        let sticky = self.sticky(trigger.key.as_deref(), instance);
        let start = pick::start(served, &mut self.prng);
        let key = self.calls.next_key();
        let delivery = encode::Delivery {
            call: CallId {
                pool: self.number,
                slot: key.slot,
                generation: key.generation,
            },
            process: served.name.as_str(),
            pool: self.name.as_str(),
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
        let chosen = pick::each(
            served,
            &self.handlers,
            &self.members,
            start,
            sticky,
            |handler, to| {
                if !matches(trigger.destination.as_ref(), to) {
                    return Offer::NotMeant;
                }
                // It listens to emits, and is no handler of calls.
                if handler.concurrency == 0 {
                    return Offer::NotMeant;
                }
                seen.matching = true;
                if handler.in_flight >= handler.concurrency {
                    return Offer::Busy;
                }
                if to.attachments == Attachments::NotTaken
                    && too_large(trigger.body, self.limits.max_frame)
                {
                    seen.too_large = true;
                    return Offer::Busy;
                }
                let length = around + forwarded_length(trigger.body, to.attachments);
                if !uses.is_empty() {
                    let (blocks, descriptors) = self.describe_uses(&uses, to.takes_descriptors, fx);
                    let delivery = encode::Delivery {
                        blocks: Some((&blocks, descriptors.len())),
                        ..delivery
                    };
                    let length = length + blocks.len();
                    return match fx.send_with(&to.peer, Class::Call, length, &descriptors, |out| {
                        encode::delivery(out, &delivery, to.attachments)
                    }) {
                        Sent::Queued => Offer::Taken,
                        Sent::Full | Sent::Gone => Offer::Busy,
                    };
                }
                match fx.send(&to.peer, Class::Call, length, |out| {
                    encode::delivery(out, &delivery, to.attachments)
                }) {
                    Sent::Queued => Offer::Taken,
                    Sent::Full | Sent::Gone => Offer::Busy,
                }
            },
        );
        let Some((position, handler_key)) = chosen else {
            return Err(self.none_taken(trigger, seen));
        };
        let handler = self
            .handlers
            .at_mut(handler_key)
            .expect("it was just picked");
        handler.in_flight += 1;
        let serving = handler.member;
        let call = Call {
            caller: from.member().unwrap_or(NOBODY),
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
            lasting: None,
            repeat: match (&trigger.idempotency_key, from) {
                (Some(key), Caller::Member(_)) => Some(Box::new((app.clone(), (&**key).into()))),
                _ => None,
            },
        };
        self.calls.insert(key, call);
        if !uses.is_empty() {
            self.lend(serving, &uses);
        }
        self.calls_total += 1;
        let served = self
            .triggers
            .get_mut(&*trigger.process)
            .expect("found above");
        served.turn = position + 1;
        let to = self
            .members
            .at_mut(place(serving))
            .expect("a handler's member lives");
        to.serving += 1;
        let handler_peer = to.peer.clone();
        let caller = from.member().map(|caller| {
            let member = self.members.at_mut(place(caller)).expect("it calls");
            member.calling += 1;
            &member.peer
        });
        fx.call_started(caller, &handler_peer);
        Ok(key)
    }

    /// Takes a handler's answer and passes it on. An answer to an ended call is dropped and counted.
    ///
    /// # Errors
    /// Where the call was sent to somebody else.
    pub fn respond<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        from: MemberKey,
        id: CallId,
        response: &Response<'_>,
        fx: &mut E,
    ) -> Result<(), Refusal> {
        let key = Key::new(id.slot, id.generation);
        let Some(call) = self.calls.at_mut(key) else {
            fx.count(Count::LateResponse);
            return Ok(());
        };
        if call.member != from {
            fx.count(Count::ForeignResponse);
            return Err(Refusal::new(
                Code::Forbidden,
                "this call was sent to another instance, which alone may answer it",
            ));
        }
        if let Some(number) = call.lasting.as_ref().and_then(|lasting| lasting.number) {
            // Its caller may be gone: it has one answer, and nothing on the way to it.
            if response.status.is_final() {
                let failed = response.status == Status::Error;
                self.parked_answered(now, number, response, fx);
                self.end(now, key, End::Answered { failed }, fx);
            }
            return Ok(());
        }
        if response.status.is_final()
            && let Some(repeat) = call.repeat.take()
        {
            let (app, repeated) = *repeat;
            let is_detached = call.caller == NOBODY;
            self.repeats_answered(now, &app, &repeated, &Answered::of(response), fx);
            if is_detached {
                let failed = response.status == Status::Error;
                self.end(now, key, End::Answered { failed }, fx);
                return Ok(());
            }
        }
        let call = self.calls.at_mut(key).expect("found above");
        if response.status == Status::Partial {
            match &mut call.credit {
                Some(0) => {
                    let message = "the handler sent more items than the stream's window allows";
                    self.end(
                        now,
                        key,
                        End::Refused(&Refusal::new(Code::HandlerError, message)),
                        fx,
                    );
                    return Ok(());
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        let Some(caller) = self.members.at(place(call.caller)) else {
            return Ok(());
        };
        let Some(caller_id) = call.id.as_deref() else {
            // Without an id the caller wants no answer.
            if response.status.is_final() {
                self.end(
                    now,
                    key,
                    End::Answered {
                        failed: response.status == Status::Error,
                    },
                    fx,
                );
            }
            return Ok(());
        };
        let answer = encode::Answer {
            in_reply_to: caller_id,
            status: response.status,
            error: response.error,
            headers: response.headers,
            body: response.body,
        };
        let length = forwarded_length(response.body, caller.attachments)
            + raw_length(response.error)
            + raw_length(response.headers);
        if caller.attachments == Attachments::NotTaken
            && too_large(response.body, self.limits.max_frame)
        {
            let message = "the answer's raw bytes are too large for a caller without the feature 'attachments'";
            self.end(
                now,
                key,
                End::Unfit {
                    refusal: &Refusal::new(Code::TooLarge, message),
                    is_final: response.status.is_final(),
                },
                fx,
            );
            return Ok(());
        }
        let sent = fx.send(&caller.peer, Class::Reply, length, |out| {
            encode::answer(out, &answer, caller.attachments)
        });
        match (sent, response.status.is_final()) {
            (Sent::Queued, true) => {
                self.end(
                    now,
                    key,
                    End::Answered {
                        failed: response.status == Status::Error,
                    },
                    fx,
                );
            }
            (Sent::Queued, false) => fx.count(Count::Partial),
            (Sent::Full, is_final) => {
                // Never dropped silently: a short error takes the place of what did not fit.
                let message = "the answer did not fit into the caller's outbox (limits.outbox_bytes_max): read faster";
                self.end(
                    now,
                    key,
                    End::Unfit {
                        refusal: &Refusal::new(Code::Overloaded, message),
                        is_final,
                    },
                    fx,
                );
            }
            // The caller's connection has ended; its leaving ends the call.
            (Sent::Gone, _) => {}
        }
        Ok(())
    }

    /// Ends a call at its caller's wish; false where the caller has no such call here.
    pub fn cancel<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        caller: MemberKey,
        id: &str,
        fx: &mut E,
    ) -> bool {
        let Some(key) = self.calls.find(caller, id) else {
            return self.cancel_parked(now, caller, id, fx)
                || self.cancel_lock(now, caller, id, fx);
        };
        self.end(now, key, End::Cancelled, fx);
        true
    }

    /// Grants `count` further items of a stream; false where the caller has no such call here.
    pub fn ack<E: Effects<Peer = P>>(
        &mut self,
        caller: MemberKey,
        id: &str,
        count: u64,
        fx: &mut E,
    ) -> bool {
        let Some(key) = self.calls.find(caller, id) else {
            return false;
        };
        let call = self.calls.at_mut(key).expect("just found");
        let Some(credit) = &mut call.credit else {
            return true;
        };
        *credit = credit
            .saturating_add(count)
            .min(latzero_protocol::limits::WINDOW_MAX);
        let call_id = CallId {
            pool: self.number,
            slot: key.slot,
            generation: key.generation,
        };
        if let Some(member) = self.members.at(place(call.member)) {
            fx.send(&member.peer, Class::Control, 64, |out| {
                encode::ack(out, call_id, count)
            });
        }
        true
    }

    /// Passes an emit to the trigger's handlers; returns how many it was appended for.
    ///
    /// # Errors
    /// Where the sender is no member, or the name is none.
    pub fn emit<E: Effects<Peer = P>>(
        &mut self,
        from: MemberKey,
        emit: &Emit<'_>,
        fx: &mut E,
    ) -> Result<usize, Refusal> {
        let Some(sender) = self.members.at(place(from)) else {
            return Err(not_member(&self.name));
        };
        fx.count(Count::Emit);
        self.emits_total += 1;
        let Some(served) = self.triggers.get(&*emit.process) else {
            TriggerName::check(&emit.process)?;
            return Ok(0);
        };
        let notice = encode::Notice {
            process: served.name.as_str(),
            pool: self.name.as_str(),
            origin: sender.origin(),
            destination: emit.destination.as_ref().map(|d| d.raw),
            headers: emit.headers,
            body: emit.body,
        };
        let sticky = self.sticky(emit.key.as_deref(), sender.instance);
        let mut delivered = 0;
        // Encoded once for all who take the same form.
        let mut encoded: [Option<std::ops::Range<usize>>; 2] = [None, None];
        let scratch = &mut self.scratch;
        scratch.clear();
        let max_frame = self.limits.max_frame;
        let mut deliver = |to: &Member<P>| {
            if !matches(emit.destination.as_ref(), to)
                || (to.attachments == Attachments::NotTaken && too_large(emit.body, max_frame))
            {
                return Offer::NotMeant;
            }
            let form = usize::from(to.attachments == Attachments::Taken);
            let range = encoded[form].get_or_insert_with(|| {
                let start = scratch.len();
                encode::notice(scratch, &notice, to.attachments);
                start..scratch.len()
            });
            let bytes = &scratch[range.clone()];
            let sent = fx.send(&to.peer, Class::Emit, bytes.len(), |out| {
                out.extend_from_slice(bytes)
            });
            delivered += usize::from(sent == Sent::Queued);
            if sent == Sent::Queued {
                Offer::Taken
            } else {
                Offer::Busy
            }
        };
        if emit.one {
            let start = pick::start(served, &mut self.prng);
            let chosen = pick::each(
                served,
                &self.handlers,
                &self.members,
                start,
                sticky,
                |_, to| deliver(to),
            );
            if let Some((position, _)) = chosen {
                self.triggers
                    .get_mut(&*emit.process)
                    .expect("found above")
                    .turn = position + 1;
            }
        } else {
            for &handler in &served.handlers {
                let handler = self
                    .handlers
                    .at(handler)
                    .expect("a trigger's handlers exist");
                deliver(
                    self.members
                        .at(place(handler.member))
                        .expect("a handler's member lives"),
                );
            }
        }
        for _ in 0..delivered {
            fx.count(Count::Delivered);
        }
        if self.scratch.capacity() > 64 * 1024 {
            self.scratch = Vec::new();
        }
        Ok(delivered)
    }

    /// When the pool wants [`Pool::handle_timeout`] to be called at the latest. It may be early, never late.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let others = self.blocks.next_deadline().into_iter();
        let others = others
            .chain(self.parked.next_deadline())
            .chain(self.repeats.next_deadline());
        self.calls.next_deadline().into_iter().chain(others).min()
    }

    /// Ends the calls whose time to live is over, and the waits and leases of locks.
    pub fn handle_timeout<E: Effects<Peer = P>>(&mut self, now: Time, fx: &mut E) {
        while let Some(key) = self.calls.pop_due(now) {
            self.end(now, key, End::TimedOut, fx);
        }
        self.handle_block_timeout(now, fx);
        self.handle_parked_timeout(now, fx);
        self.handle_repeats_timeout(now);
    }

    /// Removes the pool under its members: calls end, each member is told, nobody can join again. Returns the members'
    /// instances.
    pub fn close<E: Effects<Peer = P>>(&mut self, now: Time, fx: &mut E) -> Vec<InstanceId> {
        self.closed = true;
        let keys: Vec<MemberKey> = self.members.iter().map(|(key, _)| seat(key)).collect();
        for &key in &keys {
            self.end_calls_of(now, key, fx);
        }
        self.drop_orphans(fx);
        self.close_parked(fx);
        self.close_blocks(fx);
        self.change_watchers = 0;
        let told = format!(
            "{{\"action\":\"event\",\"event\":\"pool_removed\",\"pool\":\"{}\"}}",
            self.name
        );
        let mut instances = Vec::new();
        self.triggers.clear();
        self.handlers = Slab::default();
        for key in keys {
            let member = self.members.remove(place(key)).expect("listed above");
            fx.send(&member.peer, Class::Control, told.len(), |out| {
                encode::message(out, &told)
            });
            instances.push(member.instance);
        }
        instances
    }

    /// Whether the pool was removed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The pool's triggers as JSON: names, strategies and who serves them, in the order of their names.
    #[must_use]
    pub fn triggers_json(&self) -> serde_json::Value {
        let mut names: Vec<&Served> = self.triggers.values().collect();
        names.sort_by(|a, b| a.name.cmp(&b.name));
        let trigger = |served: &Served| {
            let handlers: Vec<_> = served
                .handlers
                .iter()
                .filter_map(|&h| self.handlers.at(h))
                .filter_map(|h| Some((h, self.members.at(place(h.member))?)))
                .take(HANDLERS_SHOWN_MAX)
                .map(|(h, member)| {
                    serde_json::json!({"app_id": member.app, "instance": member.instance, "in_flight": h.in_flight})
                })
                .collect();
            serde_json::json!({
                "name": served.name, "strategy": served.strategy.as_str(), "doc": served.doc, "handlers": handlers,
                "handlers_total": served.handlers.len(),
            })
        };
        names
            .into_iter()
            .take(TRIGGERS_SHOWN_MAX)
            .map(trigger)
            .collect()
    }

    /// Checks what must hold between any two inputs; for the simulator and tests.
    ///
    /// # Panics
    /// Where an invariant is broken.
    pub fn check(&self) {
        let (mut calling, mut serving) = (0, 0);
        for (key, member) in self.members.iter() {
            let key = seat(key);
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
            for name in &member.triggers {
                let served = self
                    .triggers
                    .get(name)
                    .expect("a member's trigger is served");
                let own = |&h: &HandlerKey| self.handlers.at(h).is_some_and(|h| h.member == key);
                assert_eq!(served.handlers.iter().filter(|h| own(h)).count(), 1);
            }
        }
        // No call without both its sides, but for parked ones: nothing reaches a non-member.
        let parked = self
            .calls
            .iter()
            .filter(|(_, c)| c.caller == NOBODY)
            .count();
        assert_eq!(
            (calling + parked, serving),
            (self.calls.len(), self.calls.len())
        );
        self.parked.check();
        self.repeats.check();
        assert!(self.calls.len() <= self.limits.pending_max);
        let handlers: usize = self.triggers.values().map(|t| t.handlers.len()).sum();
        assert_eq!(handlers, self.handlers.len());
        for (key, handler) in self.handlers.iter() {
            let in_flight = self.calls.iter().filter(|(_, c)| c.handler == key).count();
            // Not compared with the concurrency, which a registration may lower while calls are under way.
            assert_eq!(in_flight, handler.in_flight as usize);
        }
        self.calls.check();
        self.check_blocks();
        let watches = |m: &Member<P>| m.watch.is_some_and(|set| set.has(Event::BlockChanged));
        let watching = self.members.iter().filter(|(_, m)| watches(m)).count();
        assert_eq!(watching, self.change_watchers);
    }

    /// What a sticky trigger goes by: the key, else who asks. A call and an emit with one key go to one handler.
    fn sticky(&self, key: Option<&str>, from: InstanceId) -> u64 {
        match key {
            Some(key) => crate::prng::hash(self.hash_seed, key.as_bytes()),
            None => crate::prng::hash(self.hash_seed, &from.0.to_le_bytes()),
        }
    }

    fn member(&self, key: MemberKey) -> Option<&Member<P>> {
        self.members.at(place(key))
    }

    fn member_mut(&mut self, key: MemberKey) -> Option<&mut Member<P>> {
        self.members.at_mut(place(key))
    }

    /// Ends a call for both sides. A call that already ended is not found: the answer and the deadline may cross on
    /// the way, and the first to reach the pool wins.
    fn end<E: Effects<Peer = P>>(&mut self, now: Time, key: Key<Call>, how: End<'_>, fx: &mut E) {
        let Some(mut call) = self.calls.remove(key) else {
            return;
        };
        self.parked.note_room(now);
        if let Some(handler) = self.handlers.at_mut(call.handler) {
            handler.in_flight -= 1;
        }
        if let Some(uses) = &call.blocks {
            self.take_back(now, call.member, uses, fx);
        }
        let call_id = CallId {
            pool: self.number,
            slot: key.slot,
            generation: key.generation,
        };
        if let Some(handler) = self.members.at_mut(place(call.member)) {
            handler.serving -= 1;
            let reason = match how {
                // A handler that has answered for good has nothing to stop.
                End::Answered { .. } | End::HandlerGone | End::Unfit { is_final: true, .. } => None,
                End::Cancelled => Some("cancelled"),
                End::CallerGone => Some("caller_gone"),
                End::TimedOut => Some("timeout"),
                End::Refused(refusal) | End::Unfit { refusal, .. } => Some(refusal.code.as_str()),
            };
            if let Some(reason) = reason {
                fx.send(&handler.peer, Class::Control, 96, |out| {
                    encode::cancel(out, call_id, reason)
                });
            }
        }
        let refusal = match how {
            End::Answered { .. } => None,
            // One that left its pool but not the server still waits.
            End::CallerGone => Some(Refusal::new(
                Code::Cancelled,
                "the caller is in the call's pool no longer",
            )),
            End::HandlerGone => {
                let message = "the handler's connection ended before it answered; repeat the call if it may run twice";
                Some(Refusal::new(Code::HandlerGone, message))
            }
            End::Cancelled => Some(Refusal::new(
                Code::Cancelled,
                "the caller cancelled the call",
            )),
            End::TimedOut => {
                let ms = call.deadline.since(call.started).as_millis();
                Some(Refusal::new(
                    Code::Timeout,
                    format!("no answer within the call's ttl of {ms} ms"),
                ))
            }
            End::Refused(refusal) | End::Unfit { refusal, .. } => Some(refusal.clone()),
        };
        let failed = matches!(how, End::Answered { failed: true });
        let is_orphan = matches!(how, End::HandlerGone)
            && call
                .lasting
                .as_ref()
                .is_some_and(|lasting| lasting.redeliver);
        let end = CallEnd {
            started: call.started,
            ended: now,
            code: refusal.as_ref().map(|r| r.code),
            failed,
        };
        if call.caller == NOBODY {
            let handler = self.members.at(place(call.member));
            fx.call_ended(
                None,
                &handler.expect("it leaves after its calls ended").peer,
                end,
            );
            let Some(lasting) = call.lasting.take() else {
                // Its caller went; a repeat may ask for the answer until it is clear that none comes.
                if let Some(repeat) = call.repeat {
                    self.repeats_dropped(&repeat.0, &repeat.1, fx);
                }
                return;
            };
            match (lasting.number, &refusal) {
                (Some(_), Some(_)) if is_orphan => self.orphan(NOBODY, None, lasting),
                (Some(number), Some(refusal)) => self.parked_refused(now, number, refusal, fx),
                (None, Some(_)) => self.drop_repeats_of(&lasting, fx),
                _ => {}
            }
            return;
        }
        let caller = self
            .members
            .at_mut(place(call.caller))
            .expect("a call's caller leaves after its calls ended");
        caller.calling -= 1;
        if let Some(repeat) = call.repeat.take().filter(|_| !is_orphan) {
            self.repeats_dropped(&repeat.0, &repeat.1, fx);
        }
        let caller = self
            .members
            .at_mut(place(call.caller))
            .expect("found above");
        if is_orphan {
            let lasting = call.lasting.take().expect("just seen");
            let peer = caller.peer.clone();
            let handler = self.members.at(place(call.member));
            fx.call_ended(Some(&peer), &handler.expect("it is leaving").peer, end);
            self.orphan(call.caller, call.id.as_deref().map(Into::into), lasting);
            return;
        }
        if let (Some(refusal), Some(id)) = (&refusal, &call.id) {
            fx.send(
                &caller.peer,
                Class::Control,
                refusal.message.len() + 256,
                |out| match how {
                    End::Unfit { refusal, .. } => append_unfit(out, id, refusal),
                    _ => encode::refusal(out, Some(id), refusal),
                },
            );
        }
        let caller = caller.peer.clone();
        let handler = self
            .members
            .at(place(call.member))
            .map_or_else(|| caller.clone(), |m| m.peer.clone());
        fx.call_ended(Some(&caller), &handler, end);
    }

    fn end_calls_of<E: Effects<Peer = P>>(&mut self, now: Time, key: MemberKey, fx: &mut E) {
        let mut slot = 0;
        // Stops as soon as the member has none left: most have few, and many leave with none.
        while let Some(member) = self.member(key)
            && member.calling + member.serving > 0
        {
            let Some((call_key, call)) = self.calls.from(slot) else {
                break;
            };
            let how = if call.member == key {
                Some(End::HandlerGone)
            } else if call.caller == key && call.repeat.is_some() {
                self.detach(now, call_key, fx);
                None
            } else {
                (call.caller == key).then_some(End::CallerGone)
            };
            if let Some(how) = how {
                self.end(now, call_key, how, fx);
            }
            slot = call_key.slot + 1;
        }
    }

    /// The caller of a call with an idempotency key has gone, and may come back for the answer: its handler goes on.
    fn detach<E: Effects<Peer = P>>(&mut self, now: Time, key: Key<Call>, fx: &mut E) {
        let call = self.calls.at_mut(key).expect("its caller found it");
        let (started, caller, handler) = (call.started, call.caller, call.member);
        self.calls.detach(key);
        let member = self.members.at_mut(place(caller)).expect("it is leaving");
        member.calling -= 1;
        let peer = member.peer.clone();
        let handler = self.members.at(place(handler)).expect("it serves");
        let end = CallEnd {
            started,
            ended: now,
            code: Some(Code::Cancelled),
            failed: false,
        };
        fx.call_ended(Some(&peer), &handler.peer, end);
        fx.call_started(None, &handler.peer);
    }

    fn drop_handler<E: Effects<Peer = P>>(
        &mut self,
        key: MemberKey,
        name: &TriggerName,
        fx: &mut E,
    ) {
        let Some(served) = self.triggers.get_mut(name) else {
            return;
        };
        let own = |h: &HandlerKey| self.handlers.at(*h).is_some_and(|h| h.member == key);
        let Some(at) = served.handlers.iter().position(own) else {
            return;
        };
        let handler = served.handlers.remove(at);
        if served.turn > at {
            served.turn -= 1;
        }
        if served.handlers.is_empty() {
            self.triggers.remove(name);
        }
        self.handlers.remove(handler);
        let Some(member) = self.member(key) else {
            return;
        };
        let event = Presence {
            app: &member.app,
            instance: member.instance,
            trigger: Some(name),
        };
        let told = self.presence_json(Event::TriggerRemoved, &event);
        self.tell(Event::TriggerRemoved, &told, Some(key), fx);
    }

    /// Tells the watchers, all but the member that the event is about.
    fn tell<E: Effects<Peer = P>>(
        &self,
        event: Event,
        json: &str,
        about: Option<MemberKey>,
        fx: &mut E,
    ) {
        for (key, member) in self.members.iter() {
            if Some(seat(key)) != about && member.watch.is_some_and(|set| set.has(event)) {
                fx.send(&member.peer, Class::Event, json.len(), |out| {
                    encode::message(out, json)
                });
            }
        }
    }

    fn presence_json(&self, event: Event, presence: &Presence<'_>) -> String {
        let trigger = presence
            .trigger
            .map_or(String::new(), |t| format!(",\"trigger\":\"{t}\""));
        format!(
            "{{\"action\":\"event\",\"event\":\"{}\",\"pool\":\"{}\",\"app_id\":\"{}\",\"instance\":\"{}\"{trigger}}}",
            event.as_str(),
            self.name,
            presence.app,
            presence.instance,
        )
    }

    fn no_handler(&self, trigger: &Trigger<'_>) -> CallError {
        if let Err(error) = TriggerName::check(&trigger.process) {
            return Refusal::from(error).into();
        }
        if let Some(destination) = &trigger.destination {
            let present = self
                .members
                .iter()
                .any(|(_, m)| matches(Some(destination), m));
            if !present {
                return CallError::UnknownDestination;
            }
            let message = format!(
                "app '{}' does not serve trigger '{}' in pool '{}'",
                destination.app_id, trigger.process, self.name
            );
            return Refusal::new(Code::NoHandler, message).into();
        }
        let message = format!(
            "no app serves trigger '{}' in pool '{}'",
            trigger.process, self.name
        );
        Refusal::new(Code::NoHandler, message).into()
    }

    /// Why none of a trigger's handlers took a call.
    fn none_taken(&self, trigger: &Trigger<'_>, seen: pick::Seen) -> CallError {
        if seen.too_large {
            let message = "the payload is too large as base64 for a handler without the feature 'attachments'";
            return Refusal::new(Code::TooLarge, message).into();
        }
        if !seen.matching {
            return self.no_handler(trigger);
        }
        let message = format!(
            "every handler of trigger '{}' in pool '{}' is at its concurrency or has a full outbox; \
             wait and repeat, or add handlers",
            trigger.process, self.name
        );
        Refusal::new(Code::Overloaded, message).into()
    }
}

/// How a call ends.
#[derive(Clone, Copy)]
enum End<'a> {
    /// Its handler answered; the answer is already on its way.
    Answered { failed: bool },
    /// Its handler's connection or membership ended.
    HandlerGone,
    /// Its caller's connection or membership ended.
    CallerGone,
    /// Its caller ended it.
    Cancelled,
    /// Its time to live is over.
    TimedOut,
    /// The server ended it.
    Refused(&'a Refusal),
    /// Its answer could not be passed on: the handler has run all the same.
    Unfit {
        refusal: &'a Refusal,
        is_final: bool,
    },
}

struct Presence<'a> {
    app: &'a AppId,
    instance: InstanceId,
    trigger: Option<&'a TriggerName>,
}

/// `overloaded` and `too_large` mean "did not run" everywhere but here, where only the answer was lost.
fn append_unfit(out: &mut Vec<u8>, id: &str, refusal: &Refusal) {
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

fn id_in_use(id: &str) -> Refusal {
    let message = format!(
        "id '{}' is in use by another call of yours in flight",
        id.escape_debug()
    );
    Refusal::new(Code::BadMessage, message)
}

fn matches<P>(
    destination: Option<&latzero_protocol::message::Destination<'_>>,
    member: &Member<P>,
) -> bool {
    destination.is_none_or(|d| {
        d.app_id == member.app.as_str()
            && d.instance
                .is_none_or(|instance| instance == member.instance)
    })
}

fn not_member(pool: &PoolName) -> Refusal {
    Refusal::new(
        Code::NotMember,
        format!("this app is not in pool '{pool}'; name it in the handshake or send pool_join"),
    )
}

/// About how many bytes a forwarded message takes: the body in the form that its receiver takes, and what always
/// stands around it.
fn forwarded_length(body: Body<'_>, attachments: Attachments) -> usize {
    let body = match (body, attachments) {
        (Body::Bytes(bytes), Attachments::NotTaken) => base64_length(bytes),
        _ => body.len(),
    };
    body + 512
}

fn raw_length(field: Option<latzero_protocol::Raw<'_>>) -> usize {
    field.map_or(0, |raw| raw.text().len())
}

fn base64_length(bytes: &[u8]) -> usize {
    bytes.len().div_ceil(3) * 4
}

/// Whether raw bytes would pass the frame limit once they are base64.
fn too_large(body: Body<'_>, max_frame: usize) -> bool {
    matches!(body, Body::Bytes(bytes) if base64_length(bytes) > max_frame)
}

fn seat<P>(key: Key<Member<P>>) -> MemberKey {
    Key::new(key.slot, key.generation)
}

fn place<P>(key: MemberKey) -> Key<Member<P>> {
    Key::new(key.slot, key.generation)
}
