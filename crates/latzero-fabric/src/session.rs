//! One connection, from its handshake to its end: turns each message into decisions of the registry and of pools.
//!
//! A session is run by whoever read the message, one frame at a time. It holds its own memberships, so that a call goes
//! to its pool without a look into the registry.

mod memory;

use std::borrow::Cow;

use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::frame::{Accept, Frame};
use latzero_protocol::limits::{PROTOCOL_VERSION, SYSTEM_POOL};
use latzero_protocol::message::{
    Admin, AdminAction, CallRef, Emit, EventSet, Features, Handshake, PoolCreate, Request,
    Response, Trigger, TriggerSpec,
};
use latzero_protocol::{AppId, CallId, Code, Envelope, InstanceId, PoolName, Refusal};
use serde_json::json;

use crate::effects::{Class, Count, Effects};
use crate::host::{Host, Transport};
use crate::pool::{CallError, Joining};
use crate::registry::{Instance, Membership, Whereabouts};
use crate::time::Time;

/// Whether a connection goes on.
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
    triggers: Vec<TriggerSpec>,
}

/// What the server offers and knows of a connection when it comes in.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How it came in.
    pub transport: Transport,
    /// Whether it may do what administrators may.
    pub is_admin: bool,
    /// Largest payload of a frame before the handshake, in bytes.
    pub max_frame_before_handshake: usize,
}

/// One connection.
pub struct Session<H: Host> {
    peer: H::Peer,
    terms: Terms,
    features: Features,
    ready: Option<Ready>,
    memberships: Vec<Membership<H>>,
    /// It was displaced while it joined: nothing more of it is run.
    is_over: bool,
}

impl<H: Host> Session<H> {
    /// A connection that has said nothing yet.
    pub fn new(peer: H::Peer, terms: Terms) -> Self {
        Session {
            peer,
            terms,
            features: Features::default(),
            ready: None,
            memberships: Vec::new(),
            is_over: false,
        }
    }

    /// What frames are accepted at this point.
    pub fn accept(&self, host: &H) -> Accept {
        Accept {
            max_frame: if self.ready.is_some() {
                host.limits().max_frame
            } else {
                self.terms
                    .max_frame_before_handshake
                    .min(host.limits().max_frame)
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
    pub fn handle(&mut self, now: Time, frame: Frame<'_>, host: &mut H) -> Flow {
        if self.is_over {
            return Flow::Close;
        }
        let envelope = match Envelope::parse(frame) {
            Ok(Ok(envelope)) => envelope,
            Ok(Err(refusal)) => {
                self.refuse(None, &refusal, host);
                return Flow::Continue;
            }
            Err(refusal) => return self.reject(&refusal, host),
        };
        let id = match envelope.correlation_id() {
            Ok(id) => id,
            Err(refusal) => {
                self.refuse(None, &refusal, host);
                return self.flow();
            }
        };
        // What is sent in answer names no request of the sender's; a failed one gets an `error` message.
        let id = id.as_deref();
        match Request::decode(&envelope) {
            Ok(Request::Handshake(handshake)) => self.handshake(now, id, &handshake, host),
            Ok(_) if self.ready.is_none() => self.not_ready(id, host),
            Ok(Request::Trigger(trigger)) => {
                if let Err(refusal) = self.call(now, &trigger, host) {
                    host.effects().refused(refusal.code);
                    self.tell_refusal(id, &refusal, host);
                }
                Flow::Continue
            }
            Ok(Request::Response(response)) => {
                if let Err(refusal) = self.respond(now, &response, host) {
                    self.refuse(None, &refusal, host);
                }
                Flow::Continue
            }
            Ok(Request::Cancel(call)) => {
                // Its id is the call's, whose own end answers it.
                self.each_membership(&call, host, |pool, m, id, fx| pool.cancel(now, m, id, fx));
                Flow::Continue
            }
            Ok(Request::Ack(call, count)) => {
                self.each_membership(&call, host, |pool, m, id, fx| pool.ack(m, id, count, fx));
                Flow::Continue
            }
            Ok(Request::Memory(memory)) => {
                match self.memory(now, id, &memory, host) {
                    Ok(Some(reply)) => self.reply(id, &reply, host),
                    Ok(None) => {}
                    Err(refusal) => self.refuse(id, &refusal, host),
                }
                Flow::Continue
            }
            Ok(request) => {
                match self.request(now, request, host) {
                    Ok(reply) => self.reply(id, &reply, host),
                    Err(refusal) => self.refuse(id, &refusal, host),
                }
                Flow::Continue
            }
            Err(refusal) => {
                let action = envelope.action.and_then(latzero_protocol::Raw::as_str);
                match (action.as_deref(), self.ready.is_some()) {
                    // A handshake that fails ends the connection; anything else that fails is answered.
                    (Some("handshake"), false) => {
                        self.refuse(id, &refusal, host);
                        Flow::Close
                    }
                    (_, false) => self.not_ready(id, host),
                    // Their id is a call's, which is not over because they are wrong.
                    (Some("cancel" | "ack"), true) => {
                        self.refuse(None, &refusal, host);
                        Flow::Continue
                    }
                    (_, true) => {
                        self.refuse(id, &refusal, host);
                        Flow::Continue
                    }
                }
            }
        }
    }

    fn not_ready(&self, id: Option<&str>, host: &mut H) -> Flow {
        let message =
            "the first message must be a handshake: {\"action\":\"handshake\",\"app_id\":\"…\"}";
        self.refuse(id, &Refusal::new(Code::NotReady, message), host);
        Flow::Continue
    }

    /// Answers bytes that are no frame; nothing more is read from the connection.
    pub fn reject(&mut self, refusal: &Refusal, host: &mut H) -> Flow {
        self.refuse(None, refusal, host);
        Flow::Close
    }

    /// The connection has ended: its calls end, and its app is remembered.
    pub fn closed(&mut self, now: Time, host: &mut H) {
        let Some(ready) = self.ready.take() else {
            return;
        };
        host.with_registry(|registry, _| registry.depart(now, &ready.app, ready.instance));
        for membership in std::mem::take(&mut self.memberships) {
            leave(now, &membership, host);
        }
    }

    fn flow(&self) -> Flow {
        if self.ready.is_some() {
            Flow::Continue
        } else {
            Flow::Close
        }
    }

    fn handshake(
        &mut self,
        now: Time,
        id: Option<&str>,
        handshake: &Handshake<'_>,
        host: &mut H,
    ) -> Flow {
        if self.ready.is_some() {
            let refusal = Refusal::new(
                Code::AlreadyReady,
                "this connection had its handshake; open another for another app",
            );
            self.refuse(id, &refusal, host);
            return Flow::Continue;
        }
        match self.admit(now, id, handshake, host) {
            Ok(flow) => flow,
            Err(refusal) => {
                self.refuse(id, &refusal, host);
                Flow::Close
            }
        }
    }

    fn admit(
        &mut self,
        now: Time,
        id: Option<&str>,
        handshake: &Handshake<'_>,
        host: &mut H,
    ) -> Result<Flow, Refusal> {
        if handshake.protocol != PROTOCOL_VERSION {
            let message = format!(
                "protocol {} is not spoken here; this server speaks {PROTOCOL_VERSION}",
                handshake.protocol
            );
            return Err(Refusal::new(Code::UnsupportedProtocol, message));
        }
        if host.is_draining() {
            return Err(Refusal::new(
                Code::Draining,
                "the server is about to stop; reconnect in a moment",
            ));
        }
        let (peer, transport) = (self.peer.clone(), self.terms.transport);
        let admission =
            host.with_registry(|registry, _| registry.admit(now, &peer, transport, handshake))?;
        // Whoever is displaced has left before the newcomer joins, so no call can reach it any more.
        for instance in &admission.displaced {
            expel(now, instance, "displaced", host);
        }
        self.features = handshake.features.and(Features {
            attachments: true,
            // Descriptors only travel over Unix sockets, and what they replace travels as attachments.
            fd_passing: transport == Transport::Unix && handshake.features.attachments,
        });
        let names = |list: &[TriggerSpec]| list.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        let limits = host.limits();
        let (version, node) = host.identity();
        let mut ack = json!({
            "action": "handshake_ack", "status": "ok", "app_id": handshake.app_id, "instance": admission.instance,
            "pools": admission.pools.iter().map(|p| &p.name).collect::<Vec<_>>(),
            "triggers": names(&admission.triggers), "rehydrated": admission.rehydrated,
            "protocol": PROTOCOL_VERSION, "server": {"version": version, "node": node},
            "features": self.features.names(),
            "limits": {
                "max_frame": limits.max_frame, "max_in_flight": limits.in_flight_max, "max_block": limits.block_bytes_max,
            },
        });
        if let Some(id) = id {
            ack["in_reply_to"] = id.into();
        }
        if admission.rehydrated && !admission.watches.is_empty() {
            ack["watches"] = admission
                .watches
                .iter()
                .map(|(pool, _)| pool.as_str())
                .collect();
        }
        let ack = ack.to_string();
        // Before the joins: the acknowledgement is the first thing that a client sees.
        self.send(Class::Control, ack.len(), host, |out| {
            encode::message(out, &ack)
        });
        self.ready = Some(Ready {
            app: handshake.app_id.clone(),
            instance: admission.instance,
            triggers: admission.triggers,
        });
        for entrance in admission.pools {
            let watch = admission
                .watches
                .iter()
                .find(|(pool, _)| *pool == entrance.name)
                .map(|(_, events)| *events);
            self.enter(entrance, watch, host);
        }
        Ok(if self.settle(host) {
            Flow::Continue
        } else {
            self.overtaken(now, host)
        })
    }

    /// Joins a pool that the registry opened.
    fn enter(
        &mut self,
        entrance: crate::registry::Entrance<H>,
        watch: Option<EventSet>,
        host: &mut H,
    ) {
        let ready = self.ready.as_ref().expect("only a ready session joins");
        let joining = Joining {
            peer: self.peer.clone(),
            app: ready.app.clone(),
            instance: ready.instance,
            attachments: self.attachments(),
            takes_descriptors: self.features.fd_passing,
        };
        let own = |spec: &&TriggerSpec| {
            spec.is_for(&entrance.name)
                && (entrance.name.as_str() != SYSTEM_POOL
                    || self.terms.transport == Transport::BuiltIn)
        };
        let member = host.with_pool(&entrance.pool, |pool, fx| {
            let member = pool.join(joining, fx)?;
            pool.watch(member, watch);
            for spec in ready.triggers.iter().filter(own) {
                pool.serve(member, spec, fx);
            }
            Some(member)
        });
        let crate::registry::Entrance { name, number, pool } = entrance;
        match member {
            Some(member) => self.memberships.push(Membership {
                name,
                number,
                pool,
                member,
            }),
            // Removed between the registry's word and ours: as if it had been removed right after.
            None => {
                let told = format!(
                    "{{\"action\":\"event\",\"event\":\"pool_removed\",\"pool\":\"{name}\"}}"
                );
                self.send(Class::Control, told.len(), host, |out| {
                    encode::message(out, &told)
                });
            }
        }
    }

    /// Tells the registry where this session is; false where it was displaced meanwhile.
    fn settle(&self, host: &mut H) -> bool {
        let Some(ready) = &self.ready else {
            return false;
        };
        host.with_registry(|registry, _| {
            registry.settle(&ready.app, ready.instance, &self.memberships)
        })
    }

    /// Somebody took over while this session was still joining: it leaves again. It is told here: whoever took over may
    /// find its connection closed already.
    fn overtaken(&mut self, now: Time, host: &mut H) -> Flow {
        if let Some(ready) = &self.ready {
            tell_departure(&self.peer, ready.instance, "displaced", host);
        }
        for membership in std::mem::take(&mut self.memberships) {
            leave(now, &membership, host);
        }
        self.ready = None;
        self.is_over = true;
        Flow::Close
    }

    fn attachments(&self) -> Attachments {
        if self.features.attachments {
            Attachments::Taken
        } else {
            Attachments::NotTaken
        }
    }

    /// The membership that a message is about, as [`Self::membership`] has it. A pool that was removed does not count
    /// as one of several.
    #[inline]
    fn current_membership(
        &mut self,
        pool: Option<&str>,
        host: &mut H,
    ) -> Result<&Membership<H>, Refusal> {
        if pool.is_none() && self.membership(None).is_err() {
            self.forget_removed(host);
        }
        self.membership(pool)
    }

    /// The membership that a message is about: the pool it names, else the only one, else `default`.
    fn membership(&self, pool: Option<&str>) -> Result<&Membership<H>, Refusal> {
        let name = match (pool, &self.memberships[..]) {
            (Some(name), _) => name,
            (None, [only]) => return Ok(only),
            (None, _) => latzero_protocol::limits::DEFAULT_POOL,
        };
        if let Some(membership) = self.memberships.iter().find(|m| m.name.as_str() == name) {
            return Ok(membership);
        }
        PoolName::check(name)?;
        let message =
            format!("this app is not in pool '{name}'; name it in the handshake or send pool_join");
        Err(Refusal::new(Code::NotMember, message))
    }

    #[inline]
    fn call(&mut self, now: Time, trigger: &Trigger<'_>, host: &mut H) -> Result<(), Refusal> {
        if host.is_draining() {
            return Err(Refusal::new(
                Code::Draining,
                "the server is about to stop and takes no new calls",
            ));
        }
        let m = self.current_membership(trigger.pool.as_deref(), host)?;
        match host.with_pool(&m.pool, |pool, fx| pool.call(now, m.member, trigger, fx)) {
            Ok(()) => Ok(()),
            Err(CallError::Refused(refusal)) => Err(explain_park(trigger, refusal)),
            Err(CallError::UnknownDestination) => {
                let app = trigger.destination.as_ref().map_or("", |d| &d.app_id);
                let instance = trigger.destination.as_ref().and_then(|d| d.instance);
                AppId::check(app)?;
                let whereabouts =
                    host.with_registry(|registry, _| registry.whereabouts(app, &m.name));
                let refusal = match whereabouts {
                    Whereabouts::Unknown => {
                        Refusal::new(Code::NoApp, format!("no app '{app}' was ever seen here"))
                    }
                    Whereabouts::Elsewhere if instance.is_some() => Refusal::new(
                        Code::Offline,
                        format!("app '{app}' has no such instance in pool '{}'", m.name),
                    ),
                    Whereabouts::Elsewhere => Refusal::new(
                        Code::NotMember,
                        format!("app '{app}' is not in pool '{}'", m.name),
                    ),
                    Whereabouts::Offline => Refusal::new(
                        Code::Offline,
                        format!("app '{app}' is known, but no instance of it lives"),
                    ),
                };
                Err(explain_park(trigger, refusal))
            }
        }
    }

    #[inline]
    fn respond(&mut self, now: Time, response: &Response<'_>, host: &mut H) -> Result<(), Refusal> {
        let id = CallId::parse(&response.in_reply_to);
        let Some((id, m)) =
            id.and_then(|id| Some((id, self.memberships.iter().find(|m| m.number == id.pool)?)))
        else {
            // The answer to a ping, which has done its work by arriving, or to a call of a pool that was left.
            if id.is_some() {
                host.effects().count(Count::LateResponse);
            }
            return Ok(());
        };
        host.with_pool(&m.pool, |pool, fx| {
            pool.respond(now, m.member, id, response, fx)
        })
    }

    fn request(
        &mut self,
        now: Time,
        request: Request<'_>,
        host: &mut H,
    ) -> Result<String, Refusal> {
        match request {
            Request::Emit(emit) => self.emit(&emit, host),
            Request::TriggerRegister(specs) => self.register(&specs, host),
            Request::TriggerUnregister(specs) => self.unregister(&specs, host),
            Request::PoolCreate(create) => self.pool_create(now, create, host),
            Request::PoolJoin(name) => self.pool_join(now, &name, host),
            Request::PoolLeave(name) => self.pool_leave(now, &name, host),
            Request::PoolList(page) => {
                let clock = clock(now, host);
                Ok(host
                    .with_registry(|registry, _| registry.list_pools(&page, clock))
                    .to_string())
            }
            Request::PoolInfo(name) => pool_info(now, &name, host),
            Request::PoolRemove(name, force) => self.pool_remove(now, &name, force, host),
            Request::AppList(pool, page) => {
                let clock = clock(now, host);
                let apps = host
                    .with_registry(|registry, _| registry.list_apps(pool.as_ref(), &page, clock))?;
                Ok(apps.to_string())
            }
            Request::Watch(pool, events) => self.watch(&pool, Some(events), host),
            Request::Unwatch(pool) => self.watch(&pool, None, host),
            Request::Ping => Ok(format!("{{\"time\":{}}}", host.unix_ms(now))),
            Request::Stats => Ok(host.stats(now)),
            Request::Health => Ok(host.health(now)),
            Request::Admin(admin) => self.admin(now, &admin, host),
            Request::Handshake(_)
            | Request::Memory(_)
            | Request::Trigger(_)
            | Request::Response(_)
            | Request::Cancel(_)
            | Request::Ack(..) => {
                unreachable!("these are handled where the frame came in")
            }
        }
    }

    fn emit(&mut self, emit: &Emit<'_>, host: &mut H) -> Result<String, Refusal> {
        let m = self.current_membership(emit.pool.as_deref(), host)?;
        let delivered = host.with_pool(&m.pool, |pool, fx| pool.emit(m.member, emit, fx))?;
        Ok(format!("{{\"delivered\":{delivered}}}"))
    }

    /// A call is named by its id alone: each pool of the caller is asked whether it is there.
    fn each_membership(
        &self,
        call: &CallRef<'_>,
        host: &mut H,
        mut ask: impl FnMut(&mut crate::Pool<H::Peer>, crate::MemberKey, &str, &mut H::Effects) -> bool,
    ) {
        let mut found = false;
        for m in &self.memberships {
            found |= host.with_pool(&m.pool, |pool, fx| ask(pool, m.member, &call.id, fx));
        }
        if !found {
            host.effects().count(Count::StrayReference);
        }
    }

    fn register(&mut self, specs: &[TriggerSpec], host: &mut H) -> Result<String, Refusal> {
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let transport = self.terms.transport;
        let mut triggers = ready.triggers.clone();
        for spec in specs {
            triggers.retain(|known| known.name != spec.name);
            triggers.push(spec.clone());
        }
        // What this instance serves counts besides what the app is remembered with: another instance may have
        // replaced that.
        crate::registry::check_triggers(&triggers, host.limits())?;
        host.with_registry(|registry, _| registry.remember_triggers(&ready.app, specs, transport))?;
        ready.triggers = triggers;
        for m in &self.memberships {
            let reserved = m.name.as_str() == SYSTEM_POOL && transport != Transport::BuiltIn;
            host.with_pool(&m.pool, |pool, fx| {
                for spec in specs {
                    if spec.is_for(&m.name) && !reserved {
                        pool.serve(m.member, spec, fx);
                    } else {
                        pool.unserve(m.member, &spec.name, fx);
                    }
                }
            });
        }
        Ok(self.triggers_json())
    }

    fn unregister(&mut self, specs: &[TriggerSpec], host: &mut H) -> Result<String, Refusal> {
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        host.with_registry(|registry, _| registry.forget_triggers(&ready.app, specs));
        ready
            .triggers
            .retain(|known| !specs.iter().any(|spec| spec.name == known.name));
        for m in &self.memberships {
            host.with_pool(&m.pool, |pool, fx| {
                specs
                    .iter()
                    .for_each(|spec| pool.unserve(m.member, &spec.name, fx))
            });
        }
        Ok(self.triggers_json())
    }

    fn triggers_json(&self) -> String {
        let triggers: Vec<_> = self
            .ready
            .iter()
            .flat_map(|r| &r.triggers)
            .map(|t| &t.name)
            .collect();
        json!({"triggers": triggers}).to_string()
    }

    fn pool_create(
        &mut self,
        now: Time,
        create: PoolCreate<'_>,
        host: &mut H,
    ) -> Result<String, Refusal> {
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let name = create.pool.clone();
        let properties = create.properties.map(latzero_protocol::Raw::text);
        host.with_registry(|registry, _| registry.create_pool(now, &app, create.pool, properties))?;
        pool_info(now, &name, host)
    }

    fn pool_join(&mut self, now: Time, name: &PoolName, host: &mut H) -> Result<String, Refusal> {
        self.forget_removed(host);
        if self.memberships.iter().any(|m| m.name == *name) {
            return Ok("{}".into());
        }
        crate::registry::check_pools(self.memberships.len() + 1, host.limits())?;
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let entrance = host.with_registry(|registry, _| registry.open(now, &app, name))?;
        self.enter(entrance, None, host);
        if !self.settle(host) {
            let _ = self.overtaken(now, host);
        }
        Ok("{}".into())
    }

    fn pool_leave(&mut self, now: Time, name: &PoolName, host: &mut H) -> Result<String, Refusal> {
        let Some(at) = self.memberships.iter().position(|m| m.name == *name) else {
            return Err(Refusal::new(
                Code::NotMember,
                format!("this app is not in pool '{name}'"),
            ));
        };
        let membership = self.memberships.swap_remove(at);
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        host.with_registry(|registry, _| registry.forget_pool(&ready.app, ready.instance, name));
        leave(now, &membership, host);
        Ok("{}".into())
    }

    fn pool_remove(
        &mut self,
        now: Time,
        name: &PoolName,
        force: bool,
        host: &mut H,
    ) -> Result<String, Refusal> {
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let is_admin = self.terms.is_admin;
        let pool =
            host.with_registry(|registry, _| registry.remove_pool(&app, is_admin, name, force))?;
        host.with_pool(&pool, |pool, fx| pool.close(now, fx));
        self.forget_removed(host);
        Ok("{}".into())
    }

    /// Drops memberships of pools that were removed, so that a new pool of the same name can be joined.
    fn forget_removed(&mut self, host: &mut H) {
        self.memberships
            .retain(|m| !host.with_pool(&m.pool, |pool, _| pool.is_closed()));
    }

    fn watch(
        &mut self,
        name: &PoolName,
        events: Option<EventSet>,
        host: &mut H,
    ) -> Result<String, Refusal> {
        let m = self.membership(Some(name.as_str()))?;
        if !host.with_pool(&m.pool, |pool, _| pool.watch(m.member, events)) {
            return Err(Refusal::new(
                Code::NotMember,
                format!("pool '{name}' was removed; join it again with pool_join"),
            ));
        }
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        host.with_registry(|registry, _| registry.remember_watch(&ready.app, name, events));
        Ok("{}".into())
    }

    fn admin(&mut self, now: Time, admin: &Admin<'_>, host: &mut H) -> Result<String, Refusal> {
        let by_token = admin
            .token
            .as_ref()
            .is_some_and(|token| host.is_admin_token(token));
        if !self.terms.is_admin && !by_token {
            let message = "only the server's own user over the Unix socket, or the admin token of the data directory, may do this";
            return Err(Refusal::new(Code::Forbidden, message));
        }
        let AdminAction::Kick(app, instance) = &admin.action else {
            return host.admin(&admin.action);
        };
        let gone = host.with_registry(|registry, _| registry.evict(now, app, *instance));
        for instance in &gone {
            expel(now, instance, "kicked", host);
        }
        Ok(format!("{{\"kicked\":{}}}", gone.len()))
    }

    fn reply(&self, id: Option<&str>, reply: &str, host: &mut H) {
        if let Some(id) = id {
            self.send(Class::Control, reply.len() + 256, host, |out| {
                encode::reply(out, id, reply)
            });
        }
    }

    fn refuse(&self, id: Option<&str>, refusal: &Refusal, host: &mut H) {
        host.effects().refused(refusal.code);
        self.tell_refusal(id, refusal, host);
    }

    fn tell_refusal(&self, id: Option<&str>, refusal: &Refusal, host: &mut H) {
        self.send(Class::Control, refusal.message.len() + 256, host, |out| {
            encode::refusal(out, id, refusal)
        });
    }

    fn send(&self, class: Class, length: usize, host: &mut H, encode: impl FnOnce(&mut Vec<u8>)) {
        host.effects().send(&self.peer, class, length, encode);
    }
}

/// A call that asked to wait is told that it did not.
fn explain_park(trigger: &Trigger<'_>, refusal: Refusal) -> Refusal {
    match refusal.code {
        Code::NoHandler | Code::Offline if trigger.park => Refusal {
            message: Cow::Owned(format!(
                "{} (this version of the server does not park calls)",
                refusal.message
            )),
            ..refusal
        },
        _ => refusal,
    }
}

/// Ends a membership in its pool, then in the registry. One that somebody else ended is left alone, so that it is
/// counted out once.
fn leave<H: Host>(now: Time, m: &Membership<H>, host: &mut H) {
    if host.with_pool(&m.pool, |pool, fx| pool.leave(now, m.member, fx)) {
        host.with_registry(|registry, _| registry.left(&m.name, m.number));
    }
}

/// Tells an instance that it must go, takes it out of its pools and closes its connection.
fn expel<H: Host>(now: Time, instance: &Instance<H>, event: &str, host: &mut H) {
    tell_departure(&instance.peer, instance.id, event, host);
    for membership in &instance.memberships {
        leave(now, membership, host);
    }
    host.effects().close(&instance.peer);
}

fn tell_departure<H: Host>(peer: &H::Peer, instance: InstanceId, event: &str, host: &mut H) {
    let told =
        format!("{{\"action\":\"event\",\"event\":\"{event}\",\"instance\":\"{instance}\"}}");
    host.effects()
        .send(peer, Class::Control, told.len(), |out| {
            encode::message(out, &told)
        });
}

fn pool_info<H: Host>(now: Time, name: &PoolName, host: &mut H) -> Result<String, Refusal> {
    let clock = clock(now, host);
    let (pool, mut description) =
        host.with_registry(|registry, _| registry.describe_pool(name, clock))?;
    let (stats, triggers) = host.with_pool(&pool, |pool, _| (pool.stats(), pool.triggers_json()));
    description["triggers"] = triggers;
    description["triggers_total"] = stats.triggers.into();
    description["calls_in_flight"] = stats.calls_in_flight.into();
    description["blocks"] = stats.blocks.into();
    description["block_bytes"] = stats.block_bytes.into();
    description["calls"] = stats.calls.into();
    description["emits"] = stats.emits.into();
    Ok(description.to_string())
}

/// Turns the core's times into wall-clock milliseconds, while the host itself is in use.
fn clock<H: Host>(now: Time, host: &H) -> impl Fn(Time) -> u64 + use<H> {
    let wall = host.unix_ms(now);
    move |then| wall.saturating_sub(now.since(then).as_millis() as u64)
}
