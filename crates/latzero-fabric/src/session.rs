//! One connection, from its handshake to its end: turns each message into decisions of the registry
//! and of pools.
//!
//! The thread that read a message runs the session, one frame at a time. A session has its own
//! memberships, so a call reaches its pool without the registry.

mod admin;
mod deferred;
mod entry;
mod memory;
mod parked;
mod pending;
mod pools;
mod proofs;

use std::collections::VecDeque;
use std::sync::Arc;

use latzero_crypto::keys::Roles;
use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::frame::{Accept, Frame, FrameError};
use latzero_protocol::memory::Access;
use latzero_protocol::message::{
    Admin, AdminAction, CallRef, Emit, Features, Request, Response, Status, Trigger, TriggerSpec,
};
use latzero_protocol::policy::Right;
use latzero_protocol::{
    Ahead, AppId, Body, CallId, Code, Envelope, InstanceId, PoolName, Ran, Raw, Refusal,
};
use serde_json::json;

use crate::driver::{Driver, Peer as _, Report, Transport};
use crate::effects::{Audit, Count};
use crate::ledger::Account;
use crate::limits::Limits;
use crate::now::Time;
use crate::outbox::Class;
use crate::pool::{CallError, Routed};
use crate::refusals;
use crate::registry::{Instance, Membership, View, Whereabouts, Who};
use crate::turn::Turn;
use deferred::DeferredFrames;
use pending::{Awaited, PendingReply, Reply};
use pools::pool_info;
use proofs::Proofs;

/// About how many calls, waits and handlers of members that leave are ended in one step.
const ENDED_AT_ONCE_MAX: usize = 1024;

/// As how many of these the end of a membership counts.
const MEMBERSHIP_COST: usize = 16;

/// Whether a connection continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Flow {
    /// Read on.
    Continue,
    /// Close it once its outbox is written.
    Close,
}

/// The app behind a connection, once its handshake succeeded.
struct Ready {
    app: AppId,
    instance: InstanceId,
    /// Those that it serves: it registered them itself, or they came back with a proof.
    triggers: Vec<TriggerSpec>,
    /// Those that came back with the handshake. Somebody without a proof may have registered them,
    /// so they are not served in encrypted pools.
    outside: Vec<TriggerSpec>,
    /// What happens to the triggers that the app had in an encrypted pool, with the proof.
    earlier: Earlier,
    /// Whether it gets no answers to parked calls.
    holds_answers: bool,
}

/// What happens to the triggers that an app had in an encrypted pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Earlier {
    /// The handshake listed others, which replace them.
    Replaced,
    /// They are served again.
    Restored,
    /// They stay registered, and are served once the instance registers them again.
    Held,
}

/// What the server knows about a new connection, and its limits.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The account of its user.
    pub user: Arc<Account>,
    /// Its transport.
    pub transport: Transport,
    /// Whether its user is the server's own user, or the machine's administrator.
    pub is_own: bool,
    /// The channel binding for proofs.
    pub binding: ChannelBinding,
    /// Whether it comes from this machine.
    pub is_loopback: bool,
    /// The user of this machine, if the kernel reports it.
    pub uid: Option<u32>,
    /// Whether it has administrator rights.
    pub is_admin: bool,
    /// Largest payload of a frame before the handshake, in bytes.
    pub max_frame_before_handshake: usize,
}

/// One connection.
pub struct Session<D: Driver> {
    peer: D::Peer,
    terms: Terms,
    who: Who,
    proofs: Proofs,
    features: Features,
    ready: Option<Ready>,
    memberships: Vec<Membership<D>>,
    /// Replies that wait for the disk, in order.
    awaited: VecDeque<Awaited<D>>,
    /// New work that waits for room.
    held: DeferredFrames,
    /// A request to leave a pool, which takes several steps, and its id.
    leaving: Option<(Option<Box<str>>, PoolName)>,
    /// It has ended, or was displaced while it joined: its further messages are not handled.
    is_over: bool,
}

impl<D: Driver> Session<D> {
    /// A connection that has sent nothing yet.
    pub fn new(peer: D::Peer, terms: Terms) -> Self {
        let who = Who {
            uid: terms.uid,
            is_own: terms.is_own,
            proved: None,
            certified: None,
        };
        Session {
            peer,
            terms,
            who,
            proofs: Proofs::default(),
            features: Features::default(),
            ready: None,
            memberships: Vec::new(),
            awaited: VecDeque::new(),
            held: DeferredFrames::default(),
            leaving: None,
            is_over: false,
        }
    }

    /// The TLS handshake has ended, before any message: sets the channel binding for proofs, and
    /// the AppIDs that the client's certificate names, if one was required.
    pub fn secured(&mut self, binding: ChannelBinding, certified: Option<Vec<AppId>>) {
        self.terms.binding = binding;
        self.who.certified = certified;
    }

    /// Whether no input is accepted until [`Session::handle_stored`] or
    /// [`Session::handle_verified`], or until a write of a block is done
    /// ([`crate::Effects::resumed`]).
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.is_busy() || self.has_shaken_hands()
    }

    /// Whether another thread works for the connection, which it waits for, or it leaves a pool.
    fn is_busy(&self) -> bool {
        self.is_proving() || self.peer.in_flight().is_writing() || self.leaving.is_some()
    }

    /// Whether the handshake came, and is being stored.
    #[must_use]
    pub fn has_shaken_hands(&self) -> bool {
        matches!(self.awaited.front(), Some(Awaited::Handshake { .. }))
    }

    /// What frames are accepted at this point.
    pub fn accept(&self, limits: &Limits) -> Accept {
        Accept {
            max_frame: if self.ready.is_some() {
                limits.max_frame
            } else {
                self.terms.max_frame_before_handshake.min(limits.max_frame)
            },
            attachments: self.features.attachments,
        }
    }

    /// Whether the handshake succeeded.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    /// The app behind the connection.
    #[must_use]
    pub fn app(&self) -> Option<(&AppId, InstanceId)> {
        self.ready
            .as_ref()
            .map(|ready| (&ready.app, ready.instance))
    }

    /// Handles one frame.
    pub fn handle(&mut self, frame: Frame<'_>, turn: &mut Turn<'_, D>) -> Flow {
        self.run(frame, None, None, turn)
    }

    /// Handles one frame that was scanned in slices, because it is large.
    pub fn handle_scanned(
        &mut self,
        frame: Frame<'_>,
        ahead: &Ahead,
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        self.run(frame, Some(ahead), None, turn)
    }

    /// Handles one frame, which may have waited since it arrived.
    fn run(
        &mut self,
        frame: Frame<'_>,
        ahead: Option<&Ahead>,
        came: Option<Time>,
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        if self.is_over {
            return Flow::Close;
        }
        let envelope = match Envelope::parse_scanned(frame, ahead) {
            Ok(Ok(envelope)) => envelope,
            Ok(Err(refusal)) | Err(refusal) if self.ready.is_some() => {
                self.fail_message(frame, refusal, turn);
                return Flow::Continue;
            }
            Ok(Err(refusal)) => {
                self.refuse(None, &refusal, turn);
                return Flow::Continue;
            }
            Err(refusal) => return self.reject(&refusal, turn),
        };
        let bounds = turn.limits().lists();
        let mut decoded = Request::decode(&envelope, &bounds);
        let id = match &decoded {
            Ok(Request::Trigger(trigger)) => Ok(trigger.id.clone()),
            _ => envelope.correlation_id(),
        };
        let id = match id {
            Ok(id) => id,
            Err(refusal) => {
                self.refuse(None, &refusal, turn);
                return self.flow();
            }
        };
        // A response names no request of the sender; if it fails, the sender gets an `error`
        // message.
        let id = id.as_deref();
        if self.ready.is_some()
            && let Ok(request) = &mut decoded
        {
            let waits = match came {
                Some(came) => wait_less(request, turn.time().since(came)).map(|()| false),
                None => self.hold((frame, ahead, id), request, turn),
            };
            match waits {
                Ok(true) => return Flow::Continue,
                Ok(false) => {}
                Err(refusal) => {
                    self.refuse(id, &refusal, turn);
                    return Flow::Continue;
                }
            }
        }
        match decoded {
            Ok(Request::Handshake(handshake)) => self.handshake(id, &handshake, frame.json, turn),
            Ok(request @ (Request::Challenge | Request::AppProof(_) | Request::AdminProof(_))) => {
                self.prove(id, &request, frame.json.len(), turn)
            }
            Ok(_) if self.ready.is_none() => self.not_ready(id, turn),
            Ok(Request::PoolProve(pool, proof)) => {
                let result = self.pool_prove(id, &pool, proof.text(), turn);
                self.answer_request(id, result, turn)
            }
            Ok(Request::Trigger(trigger)) => {
                if let Err(refusal) = self.call(&trigger, turn) {
                    turn.refused(refusal.code);
                    self.send_refusal(id, &refusal, turn);
                }
                Flow::Continue
            }
            Ok(Request::Response(response)) => {
                if let Err(refusal) = self.respond(&response, turn) {
                    self.refuse(None, &refusal, turn);
                }
                Flow::Continue
            }
            Ok(Request::Cancel(call)) => {
                // Its id is that of the call, which is answered when the call ends.
                let found = self.cancel_held(&call.id, turn);
                self.each_membership(&call, found, turn, crate::Pool::cancel);
                Flow::Continue
            }
            Ok(Request::Ack(call, count)) => {
                self.each_membership(&call, false, turn, |pool, m, id, turn| {
                    pool.ack(m, id, count, turn)
                });
                Flow::Continue
            }
            Ok(Request::Memory(memory)) => {
                match self.memory(id, &memory, turn) {
                    Ok(Some(reply)) => self.reply(id, &reply, turn),
                    Ok(None) => {}
                    Err(refusal) => self.refuse(id, &refusal, turn),
                }
                Flow::Continue
            }
            // Its only effect is its reply, which nobody would get.
            Ok(request) if id.is_none() && request.is_question() => Flow::Continue,
            Ok(request) => {
                turn.driver.effects().was_request = true;
                let result = self.request(id, request, turn);
                self.answer_request(id, result, turn)
            }
            Err(refusal) => {
                let action = envelope.action.and_then(Raw::as_str);
                match (action.as_deref(), self.ready.is_some()) {
                    // A handshake that fails ends the connection; anything else that fails is
                    // answered.
                    (Some("handshake"), false) => {
                        self.refuse(id, &refusal, turn);
                        Flow::Close
                    }
                    (_, false) => self.not_ready(id, turn),
                    // The call that it answers must not wait for another answer until it expires.
                    (Some("response"), true) => {
                        let of = envelope.in_reply_to.and_then(Raw::as_str);
                        self.fail_answer(of.as_deref(), &refusal, turn);
                        self.refuse(None, &refusal, turn);
                        Flow::Continue
                    }
                    // Their id is that of a call, which does not end because they are invalid.
                    (Some("cancel" | "ack"), true) => {
                        self.refuse(None, &refusal, turn);
                        Flow::Continue
                    }
                    (_, true) => {
                        self.refuse(id, &refusal, turn);
                        Flow::Continue
                    }
                }
            }
        }
    }

    /// A message's JSON is invalid: only this message fails, since its length delimits it.
    fn fail_message(&mut self, frame: Frame<'_>, refusal: Refusal, turn: &mut Turn<'_, D>) {
        let refusal = match refusal.code {
            Code::BadFrame => Refusal::new(Code::BadMessage, refusal.message),
            _ => refusal,
        };
        let whose = latzero_protocol::salvage(frame.json);
        match whose.action.as_deref() {
            Some("response") => {
                self.fail_answer(whose.in_reply_to.as_deref(), &refusal, turn);
                self.refuse(None, &refusal, turn);
            }
            // Their id is that of a call.
            Some("cancel" | "ack") => self.refuse(None, &refusal, turn),
            _ => self.refuse(whose.id.as_deref(), &refusal, turn),
        }
    }

    /// A handler's answer is invalid: reports that to the caller.
    fn fail_answer(&mut self, call: Option<&str>, why: &Refusal, turn: &mut Turn<'_, D>) {
        let Some(call) = call else { return };
        let message = format!("the handler's answer is invalid: {}", why.message);
        let code = Code::HandlerError.as_str();
        let error = json!({"code": code, "message": message, "ran": "unknown"}).to_string();
        let response = Response {
            in_reply_to: call.into(),
            status: Status::Error,
            error: Raw::new(&error).ok(),
            headers: None,
            body: Body::None,
        };
        // A call that belongs to another handler does not end, and the error has been sent.
        let _ = self.respond(&response, turn);
    }

    fn not_ready(&self, id: Option<&str>, turn: &mut Turn<'_, D>) -> Flow {
        self.refuse(id, &refusals::not_ready(), turn);
        Flow::Continue
    }

    /// Answers bytes that are not a frame. If [`FrameError::skips`] says where the next frame
    /// begins, the driver and the session continue there.
    pub fn reject_frame(&mut self, error: FrameError, turn: &mut Turn<'_, D>) -> Flow {
        if self.ready.is_none() || error.skips().is_none() {
            return self.reject(&error.into(), turn);
        }
        let refusal = Refusal::new(Code::BadMessage, error.to_string());
        self.refuse(None, &refusal, turn);
        Flow::Continue
    }

    /// Answers bytes that are not a message; nothing more is read from the connection.
    pub fn reject(&mut self, refusal: &Refusal, turn: &mut Turn<'_, D>) -> Flow {
        self.refuse(None, refusal, turn);
        Flow::Close
    }

    /// The connection has ended: ends its calls, and remembers its app. That is done in steps,
    /// because it may have a great many calls and waits: call it again, before long, while it
    /// returns true.
    #[must_use]
    pub fn closed(&mut self, turn: &mut Turn<'_, D>) -> bool {
        self.is_over = true;
        self.drop_held();
        if self.ready.is_none() {
            return false;
        }
        let mut budget = ENDED_AT_ONCE_MAX;
        if !self
            .memberships
            .iter()
            .all(|m| wind_down(m, &mut budget, turn))
        {
            return true;
        }
        let Some(ready) = self.ready.take() else {
            return false;
        };
        turn.with_registry(|registry, turn| registry.depart(&ready.app, ready.instance, turn));
        for membership in std::mem::take(&mut self.memberships) {
            leave(&membership, turn);
        }
        false
    }

    /// Goes on with what takes several steps: its end, or that of a membership. The driver calls it
    /// before it reads the connection. True while there is more.
    #[must_use]
    pub fn go_on(&mut self, turn: &mut Turn<'_, D>) -> bool {
        if self.is_over {
            return self.closed(turn);
        }
        let Some((id, name)) = self.leaving.take() else {
            return false;
        };
        let result = self.pool_leave(id.as_deref(), &name, turn);
        let _ = self.answer_request(id.as_deref(), result, turn);
        // What came behind it has waited.
        turn.driver.effects().resumed.push(self.peer.clone());
        self.leaving.is_some()
    }

    fn flow(&self) -> Flow {
        if self.ready.is_some() {
            Flow::Continue
        } else {
            Flow::Close
        }
    }

    fn attachments(&self) -> Attachments {
        if self.features.attachments {
            Attachments::Taken
        } else {
            Attachments::NotTaken
        }
    }

    /// The membership that a message refers to, by the rule of [`Self::membership`]. Removed pools
    /// are not counted.
    #[inline]
    fn current_membership(
        &mut self,
        pool: Option<&str>,
        turn: &mut Turn<'_, D>,
    ) -> Result<&Membership<D>, Refusal> {
        if pool.is_none() && self.membership(None).is_err() {
            self.forget_removed(turn);
        }
        self.membership(pool)
    }

    /// Like [`Self::current_membership`], for requests that the pool itself does not check. A
    /// rotation ends memberships in an encrypted pool, and their sessions find out here.
    fn checked_membership(
        &mut self,
        pool: Option<&str>,
        turn: &mut Turn<'_, D>,
    ) -> Result<&Membership<D>, Refusal> {
        let m = self.current_membership(pool, turn)?;
        let has_ended =
            m.grant.is_some() && !turn.with_pool(&m.pool, |pool, _| pool.has_member(m.member));
        if has_ended {
            self.forget_left(turn);
        }
        self.membership(pool)
    }

    /// The membership that a message refers to: the pool that it names, else the only one, else
    /// `default`.
    fn membership(&self, pool: Option<&str>) -> Result<&Membership<D>, Refusal> {
        let name = match (pool, &self.memberships[..]) {
            (Some(name), _) => name,
            (None, [only]) => return Ok(only),
            (None, _) => latzero_protocol::limits::DEFAULT_POOL,
        };
        if let Some(membership) = self.memberships.iter().find(|m| m.name.as_str() == name) {
            return Ok(membership);
        }
        PoolName::check(name)?;
        Err(refusals::not_member(name))
    }

    #[inline]
    fn call(&mut self, trigger: &Trigger<'_>, turn: &mut Turn<'_, D>) -> Result<(), Refusal> {
        if turn.driver.context().is_draining() {
            return Err(refusals::draining_calls());
        }
        let m = self.current_membership(trigger.pool.as_deref(), turn)?;
        m.check_right(Right::Call)?;
        m.check_roles(Roles::Read)?;
        if trigger.blocks.iter().any(|lent| lent.mode == Access::Write) {
            m.check_roles(Roles::Write)?;
        }
        m.check_body(trigger.body)?;
        let routed = turn.with_pool(&m.pool, |pool, turn| {
            m.check_privilege(pool, &trigger.process)?;
            pool.call(m.member, trigger, turn)
        });
        match routed {
            Ok(Routed::Begun) => Ok(()),
            Ok(routed @ (Routed::Parked(number) | Routed::ParkedBefore(number))) => {
                let pool = m.pool.clone();
                let ready = self.ready.as_ref().expect("only a ready session calls");
                turn.with_registry(|registry, turn| registry.outlast(&ready.app, turn));
                self.awaited.push_back(Awaited::Parked {
                    id: trigger.id.as_deref().map(Into::into),
                    pool,
                    number,
                    is_new: matches!(routed, Routed::Parked(_)),
                });
                Ok(())
            }
            Err(CallError::Refused(refusal)) => Err(refusal),
            Err(CallError::UnknownDestination) => {
                let app = trigger.destination.as_ref().map_or("", |d| &d.app_id);
                let instance = trigger.destination.as_ref().and_then(|d| d.instance);
                AppId::check(app)?;
                let whereabouts =
                    turn.with_registry(|registry, _| registry.whereabouts(app, &m.name));
                let refusal = match whereabouts {
                    Whereabouts::Unknown => refusals::no_app(app),
                    Whereabouts::Elsewhere if instance.is_some() => {
                        refusals::no_instance(app, &m.name)
                    }
                    Whereabouts::Elsewhere => refusals::app_not_in_pool(app, &m.name),
                    Whereabouts::Offline => refusals::app_is_offline(app),
                };
                Err(refusal)
            }
        }
    }

    #[inline]
    fn respond(&mut self, response: &Response<'_>, turn: &mut Turn<'_, D>) -> Result<(), Refusal> {
        let id = CallId::parse(&response.in_reply_to);
        let Some((id, m)) =
            id.and_then(|id| Some((id, self.memberships.iter().find(|m| m.number == id.pool)?)))
        else {
            // The answer to a ping, which needs no handling, or to a call in a pool that was left.
            if id.is_some() {
                turn.count(Count::LateResponse);
            }
            return Ok(());
        };
        m.check_roles(Roles::Write)?;
        match response.status {
            // The sealed error is in the error object.
            Status::Error if m.grant.is_some() => m.check_error(response)?,
            Status::Error => {}
            _ => m.check_body(response.body)?,
        }
        turn.with_pool(&m.pool, |pool, turn| {
            pool.respond(m.member, id, response, turn)
        })
    }

    fn request(
        &mut self,
        id: Option<&str>,
        request: Request<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let reply = match request {
            Request::TriggerRegister(specs) => return self.register(&specs, turn),
            Request::TriggerUnregister(specs) => return self.unregister(&specs, turn),
            Request::PoolCreate(create) => return self.pool_create(id, create, turn),
            Request::PoolJoin(name) => return self.pool_join(&name, turn),
            Request::PoolLeave(name) => return self.pool_leave(id, &name, turn),
            Request::PoolRemove(name, force) => return self.pool_remove(&name, force, turn),
            Request::Watch(pool, events) => return self.watch(&pool, Some(events), turn),
            Request::Unwatch(pool) => return self.watch(&pool, None, turn),
            Request::Parked(parked) => return self.parked(&parked, turn),
            Request::Admin(admin) => return self.admin(id, &admin, turn),
            Request::Emit(emit) => self.emit(&emit, turn)?,
            Request::PoolList(page) => {
                let view = self.view();
                turn.with_registry(|registry, _| registry.list_pools(&page, &view))
            }
            Request::PoolChallenge(name) => self.pool_challenge(&name, turn),
            Request::PoolChain(asked) => self.pool_chain(&asked, turn)?,
            Request::PoolRotate(name, descriptor) => {
                return self.pool_rotate(id, &name, &descriptor, turn);
            }
            Request::PoolInfo(name, trigger) => {
                pool_info(&name, trigger.as_ref(), &self.view(), turn)?
            }
            Request::AppList(pool, page) => {
                let (now, view) = (turn.now, self.view());
                turn.with_registry(|registry, _| {
                    let unix_ms = |then| now.unix_ms_at(then);
                    registry.list_apps(pool.as_ref(), &page, &view, unix_ms)
                })?
            }
            Request::Ping => format!("{{\"time\":{}}}", turn.unix_ms()),
            Request::Stats => D::report(turn, Report::Stats, &self.view()),
            Request::Health => D::report(turn, Report::Health, &self.view()),
            Request::Handshake(_)
            | Request::Challenge
            | Request::AppProof(_)
            | Request::AdminProof(_)
            | Request::PoolProve(..)
            | Request::Memory(_)
            | Request::Trigger(_)
            | Request::Response(_)
            | Request::Cancel(_)
            | Request::Ack(..) => {
                unreachable!("these are handled on arrival")
            }
        };
        Ok(Reply::Now(reply))
    }

    /// What this connection may see.
    pub(super) fn view(&self) -> View<'_> {
        let ready = self.ready.as_ref().expect("only a ready session lists");
        View {
            app: &ready.app,
            uid: self.who.uid,
            is_admin: self.terms.is_admin,
            instance: Some(ready.instance),
        }
    }

    fn emit(&mut self, emit: &Emit<'_>, turn: &mut Turn<'_, D>) -> Result<String, Refusal> {
        let m = self.current_membership(emit.pool.as_deref(), turn)?;
        m.check_right(Right::Emit)?;
        m.check_roles(Roles::Read)?;
        m.check_body(emit.body)?;
        let delivered = turn.with_pool(&m.pool, |pool, turn| {
            m.check_privilege(pool, &emit.process)?;
            pool.emit(m.member, emit, turn)
        })?;
        Ok(format!("{{\"delivered\":{delivered}}}"))
    }

    /// Only an id names a call, so it is looked up in each pool of the caller.
    fn each_membership(
        &self,
        call: &CallRef<'_>,
        mut found: bool,
        turn: &mut Turn<'_, D>,
        mut ask: impl FnMut(&mut crate::Pool<D>, crate::MemberKey, &str, &mut Turn<'_, D>) -> bool,
    ) {
        for m in &self.memberships {
            found |= turn.with_pool(&m.pool, |pool, turn| ask(pool, m.member, &call.id, turn));
        }
        if !found {
            turn.count(Count::StrayReference);
        }
    }

    fn reply(&self, id: Option<&str>, reply: &str, turn: &mut Turn<'_, D>) {
        if let Some(id) = id {
            self.send(Class::Control, reply.len() + 256, turn, |out| {
                encode::reply(out, id, reply)
            });
        }
    }

    fn audit(
        &self,
        event: &'static str,
        (app, instance): (&AppId, InstanceId),
        detail: serde_json::Value,
        turn: &mut Turn<'_, D>,
    ) {
        let audit = Audit {
            event,
            app: Some(app),
            instance: Some(instance),
            detail,
        };
        turn.audit(&self.peer, &audit);
    }

    fn refuse(&self, id: Option<&str>, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        turn.refused(refusal.code);
        // What a client was not allowed to do.
        if matches!(refusal.code, Code::Forbidden | Code::AppInUse) {
            let audit = Audit {
                event: "refused",
                app: self.ready.as_ref().map(|ready| &ready.app),
                instance: self.ready.as_ref().map(|ready| ready.instance),
                detail: json!({"code": refusal.code.as_str(), "message": refusal.message}),
            };
            turn.audit(&self.peer, &audit);
        }
        self.send_refusal(id, refusal, turn);
    }

    fn send_refusal(&self, id: Option<&str>, refusal: &Refusal, turn: &mut Turn<'_, D>) {
        self.send(Class::Control, refusal.message.len() + 256, turn, |out| {
            encode::refusal(out, id, refusal)
        });
    }

    fn send(
        &self,
        class: Class,
        length: usize,
        turn: &mut Turn<'_, D>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) {
        turn.send(&self.peer, class, length, encode);
    }
}

/// Subtracts the time that a call waited from its time to live.
fn wait_less(request: &mut Request<'_>, waited: std::time::Duration) -> Result<(), Refusal> {
    let Request::Trigger(trigger) = request else {
        return Ok(());
    };
    let waited = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
    if waited >= trigger.ttl_ms {
        return Err(expired_here());
    }
    trigger.ttl_ms -= waited;
    Ok(())
}

fn expired_here() -> Refusal {
    refusals::expired_before_its_turn().with_ran(Ran::No)
}

/// Ends a membership in its pool, then in the registry. A membership that has already ended is
/// skipped, so that it is counted once.
fn leave<D: Driver>(m: &Membership<D>, turn: &mut Turn<'_, D>) {
    if turn.with_pool(&m.pool, |pool, turn| pool.leave(m.member, turn)) {
        turn.with_registry(|registry, _| registry.member_left(&m.name, m.number));
    }
}

/// Ends what a membership would leave behind, as much as `budget` allows; false if there may be
/// more, which the next step ends.
fn wind_down<D: Driver>(m: &Membership<D>, budget: &mut usize, turn: &mut Turn<'_, D>) -> bool {
    turn.with_pool(&m.pool, |pool, turn| pool.wind_down(m.member, budget, turn));
    *budget > 0
}

/// Notifies instances, closes their connections, which keeps calls from them, and removes them from
/// their pools. What is too much for one step ends with the connection.
fn expel<D: Driver>(instances: &[Instance<D>], event: &str, turn: &mut Turn<'_, D>) {
    for instance in instances {
        announce_departure(&instance.peer, instance.id, event, turn);
        turn.close(&instance.peer);
    }
    let mut budget = ENDED_AT_ONCE_MAX;
    for membership in instances.iter().flat_map(|i| &i.memberships) {
        if budget == 0 {
            break;
        }
        if wind_down(membership, &mut budget, turn) {
            leave(membership, turn);
            budget = budget.saturating_sub(MEMBERSHIP_COST);
        }
    }
}

fn announce_departure<D: Driver>(
    peer: &D::Peer,
    instance: InstanceId,
    event: &str,
    turn: &mut Turn<'_, D>,
) {
    let json =
        format!("{{\"action\":\"event\",\"event\":\"{event}\",\"instance\":\"{instance}\"}}");
    turn.send(peer, Class::Control, json.len(), |out| {
        encode::message(out, &json)
    });
}
