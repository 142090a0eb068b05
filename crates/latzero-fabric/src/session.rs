//! One connection, from its handshake to its end: turns each message into decisions of the registry and of pools.
//!
//! A session is run by whoever read the message, one frame at a time. It holds its own memberships, so that a call goes
//! to its pool without a look into the registry.

mod memory;

use std::collections::VecDeque;

use latzero_protocol::encode::{self, Attachments};
use latzero_protocol::frame::{Accept, Frame};
use latzero_protocol::limits::{PROTOCOL_VERSION, SYSTEM_POOL};
use latzero_protocol::message::{
    Admin, AdminAction, CallRef, Emit, EventSet, Features, Handshake, PoolCreate, Request,
    Response, Trigger, TriggerSpec,
};
use latzero_protocol::{AppId, CallId, Code, Envelope, InstanceId, PoolName, Refusal};
use serde_json::json;

use crate::effects::{Audit, Class, Count, Effects};
use crate::host::{Host, Transport};
use crate::pool::{CallError, Joining};
use crate::registry::{Admission, Admitted, Instance, Membership, Whereabouts};
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

/// A reply that waits until what it promises is on disk.
enum Awaited<H: Host> {
    /// A call that waits for its handler.
    Parked {
        id: Option<Box<str>>,
        pool: H::Pool,
        number: u64,
    },
    /// A handshake, as it came; nothing more is read before it is answered.
    Handshake { json: Box<[u8]>, rehydrated: bool },
    /// The reply, and what is to be done where the promise can't be kept.
    Reply {
        id: Option<Box<str>>,
        reply: Box<str>,
        promise: Promise,
    },
}

/// How writing down a handshake went.
#[derive(Clone, Copy)]
struct Stored {
    is_on_disk: bool,
    /// Whether what the app had is restored, as it was found when the handshake came.
    rehydrated: bool,
}

/// What became of a handshake that was not refused.
enum Entry {
    In,
    /// Somebody took over meanwhile.
    Overtaken,
    /// It is to be written down first.
    Later {
        rehydrated: bool,
    },
}

/// What a reply promises to outlive the server.
enum Promise {
    /// What the app registered.
    Registration,
    /// A pool that was made.
    Pool(PoolName),
    /// That something is gone for good.
    Removal,
}

/// A reply to a request: at once, or when what it promises is on disk.
enum Reply {
    Now(String),
    Kept(String, Promise),
    /// The host gives it.
    Later,
}

impl Reply {
    fn kept_if(is_promised: bool, reply: String, promise: Promise) -> Reply {
        if is_promised {
            Reply::Kept(reply, promise)
        } else {
            Reply::Now(reply)
        }
    }
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
    /// What was promised and is not kept yet, in the order of the promises.
    awaited: VecDeque<Awaited<H>>,
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
            awaited: VecDeque::new(),
            is_over: false,
        }
    }

    /// Whether nothing may be handed in until [`Session::kept`]: the handshake is being written down.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        matches!(self.awaited.front(), Some(Awaited::Handshake { .. }))
    }

    /// The first promise that was made to this connection is kept, or can't be.
    pub fn kept(&mut self, now: Time, result: Result<(), Refusal>, host: &mut H) -> Flow {
        match self.awaited.pop_front() {
            None => self.flow(),
            Some(Awaited::Handshake { json, rehydrated }) => {
                let frame = Frame {
                    json: &json,
                    attachment: None,
                };
                let envelope = Envelope::parse(frame).ok().and_then(Result::ok);
                let envelope = envelope.expect("it was read before");
                let id = envelope.correlation_id().ok().flatten();
                let Ok(Request::Handshake(handshake)) = Request::decode(&envelope) else {
                    unreachable!("it was a handshake before");
                };
                if result.is_err() {
                    host.with_registry(|registry, fx| registry.keep_app(&handshake.app_id, fx));
                }
                let stored = Some(Stored {
                    is_on_disk: result.is_ok(),
                    rehydrated,
                });
                match self.admit(now, id.as_deref(), &handshake, stored, host) {
                    Ok(_) if self.ready.is_some() => Flow::Continue,
                    Ok(_) => Flow::Close,
                    Err(refusal) => {
                        self.refuse(id.as_deref(), &refusal, host);
                        Flow::Close
                    }
                }
            }
            Some(Awaited::Parked { id, pool, number }) => {
                match result {
                    Ok(()) => {
                        // Where its answer came first there is nothing more to say.
                        let waits = host.with_pool(&pool, |pool, _| pool.is_parked(number));
                        if let Some(id) = id.filter(|_| waits) {
                            self.send(Class::Control, 256, host, |out| encode::parked(out, &id));
                        }
                    }
                    Err(refusal) => {
                        if host.with_pool(&pool, |pool, fx| pool.unpark(number, fx)) {
                            let message = format!("{}; the call was not parked", refusal.message);
                            let refusal = Refusal::new(refusal.code, message);
                            self.refuse(id.as_deref(), &refusal, host);
                        }
                    }
                }
                self.flow()
            }
            Some(Awaited::Reply { id, reply, promise }) => {
                match result {
                    Ok(()) => self.reply(id.as_deref(), &reply, host),
                    Err(refusal) => self.break_promise(id.as_deref(), &promise, &refusal, host),
                }
                self.flow()
            }
        }
    }

    /// Something could not be written down: it is undone where nobody could count on it otherwise, and the asker is told.
    fn break_promise(
        &mut self,
        id: Option<&str>,
        promise: &Promise,
        refusal: &Refusal,
        host: &mut H,
    ) {
        let holds = match promise {
            Promise::Registration => {
                if let Some(ready) = &self.ready {
                    host.with_registry(|registry, fx| registry.keep_app(&ready.app, fx));
                }
                "it is in force, and is stored as soon as the disk takes it"
            }
            Promise::Pool(name) => {
                host.with_registry(|registry, _| registry.release_pool(name));
                "the pool is not durable and goes with its last member"
            }
            Promise::Removal => "it is gone, but may be back after the server's next start",
        };
        let message = format!("{}; {holds}", refusal.message);
        self.refuse(id, &Refusal::new(refusal.code, message), host);
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
            Ok(Request::Handshake(handshake)) => {
                self.handshake(now, id, &handshake, frame.json, host)
            }
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
                match self.request(now, id, request, host) {
                    Ok(Reply::Now(reply)) => self.reply(id, &reply, host),
                    Ok(Reply::Later) => {}
                    Ok(Reply::Kept(reply, promise)) => self.awaited.push_back(Awaited::Reply {
                        id: id.map(Into::into),
                        reply: reply.into(),
                        promise,
                    }),
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
        let unix_ms = host.unix_ms(now);
        host.with_registry(|registry, fx| registry.depart(unix_ms, &ready.app, ready.instance, fx));
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
        json: &[u8],
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
        match self.admit(now, id, handshake, None, host) {
            Ok(Entry::In) => Flow::Continue,
            Ok(Entry::Overtaken) => Flow::Close,
            Ok(Entry::Later { rehydrated }) => {
                self.awaited.push_back(Awaited::Handshake {
                    json: json.into(),
                    rehydrated,
                });
                Flow::Continue
            }
            Err(refusal) => {
                self.refuse(id, &refusal, host);
                Flow::Close
            }
        }
    }

    /// Lets an app in. `stored` is absent where nothing was written down yet, else how that went.
    fn admit(
        &mut self,
        now: Time,
        id: Option<&str>,
        handshake: &Handshake<'_>,
        stored: Option<Stored>,
        host: &mut H,
    ) -> Result<Entry, Refusal> {
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
        let times = (now, host.unix_ms(now));
        let kept = stored.map(|stored| stored.rehydrated);
        let admitted = host.with_registry(|registry, fx| {
            registry.admit(times, &peer, transport, handshake, kept, fx)
        })?;
        let admission = match admitted {
            Admitted::Now(admission) => admission,
            Admitted::Later { rehydrated } => return Ok(Entry::Later { rehydrated }),
        };
        let Admission {
            instance,
            pools,
            triggers,
            watches,
            subscriptions,
            rehydrated,
            displaced,
        } = *admission;
        let names = |list: &[TriggerSpec]| list.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
        self.audit(
            "joined",
            (&handshake.app_id, instance),
            json!({"pools": pools.iter().map(|p| &p.name).collect::<Vec<_>>(), "triggers": names(&triggers),
                "rehydrated": rehydrated}),
            host,
        );
        for displaced in &displaced {
            let by = (&handshake.app_id, instance);
            self.audit("took_over", by, json!({"displaced": displaced.id}), host);
        }
        // Whoever is displaced has left before the newcomer joins, so no call can reach it any more.
        for instance in &displaced {
            expel(now, instance, "displaced", host);
        }
        self.features = handshake.features.and(Features {
            attachments: true,
            // Descriptors only travel over Unix sockets, and what they replace travels as attachments.
            fd_passing: transport == Transport::Unix && handshake.features.attachments,
        });
        let limits = host.limits();
        let (version, node) = host.identity();
        let mut ack = json!({
            "action": "handshake_ack", "status": "ok", "app_id": handshake.app_id, "instance": instance,
            "pools": pools.iter().map(|p| &p.name).collect::<Vec<_>>(),
            "triggers": names(&triggers), "rehydrated": rehydrated,
            "protocol": PROTOCOL_VERSION, "server": {"version": version, "node": node},
            "features": self.features.names(),
            "limits": {
                "max_frame": limits.max_frame, "max_in_flight": limits.in_flight_max, "max_block": limits.block_bytes_max,
            },
        });
        if let Some(id) = id {
            ack["in_reply_to"] = id.into();
        }
        if stored.is_some_and(|stored| !stored.is_on_disk) {
            // An app must be able to work while the disk is full, and to know what that means for it.
            ack["stored"] = false.into();
        }
        if rehydrated && !watches.is_empty() {
            ack["watches"] = watches.iter().map(|(pool, _)| pool.as_str()).collect();
        }
        if rehydrated && !subscriptions.is_empty() {
            let subscription = |(pool, block)| json!({"pool": pool, "block_id": block});
            ack["subscriptions"] = subscriptions.iter().cloned().map(subscription).collect();
        }
        let ack = ack.to_string();
        // Before the joins: the acknowledgement is the first thing that a client sees.
        self.send(Class::Control, ack.len(), host, |out| {
            encode::message(out, &ack)
        });
        self.ready = Some(Ready {
            app: handshake.app_id.clone(),
            instance,
            triggers,
        });
        for entrance in pools {
            let watch = watches
                .iter()
                .find(|(pool, _)| *pool == entrance.name)
                .map(|(_, events)| *events);
            let name = entrance.name.clone();
            self.enter(now, entrance, watch, host);
            let blocks = subscriptions.iter().filter(|(pool, _)| *pool == name);
            if let Some(m) = self.memberships.last().filter(|m| m.name == name) {
                for (_, block) in blocks {
                    // A block that is gone has no changes to tell.
                    let _ = host.with_pool(&m.pool, |pool, fx| {
                        pool.subscribe_block(m.member, block, fx)
                    });
                }
            }
        }
        if self.settle(host) {
            return Ok(Entry::In);
        }
        let _ = self.overtaken(now, host);
        Ok(Entry::Overtaken)
    }

    /// Joins a pool that the registry opened.
    fn enter(
        &mut self,
        now: Time,
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
                && entrance.may_serve
                && (entrance.name.as_str() != SYSTEM_POOL
                    || self.terms.transport == Transport::BuiltIn)
        };
        let member = host.with_pool(&entrance.pool, |pool, fx| {
            let member = pool.join(joining, fx)?;
            pool.watch(member, watch);
            pool.tell_answers(now, &ready.app, fx);
            for spec in ready.triggers.iter().filter(own) {
                pool.serve(now, member, spec, fx);
            }
            Some(member)
        });
        let crate::registry::Entrance {
            name,
            number,
            pool,
            may_serve,
        } = entrance;
        match member {
            Some(member) => self.memberships.push(Membership {
                name,
                number,
                pool,
                member,
                may_serve,
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
            Ok(None) => Ok(()),
            Ok(Some(number)) => {
                let pool = m.pool.clone();
                self.awaited.push_back(Awaited::Parked {
                    id: trigger.id.as_deref().map(Into::into),
                    pool,
                    number,
                });
                Ok(())
            }
            Err(CallError::Refused(refusal)) => Err(refusal),
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
                Err(refusal)
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
        id: Option<&str>,
        request: Request<'_>,
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        if self.awaited.len() >= host.limits().in_flight_max as usize {
            let message = "too many of your requests wait for the disk (limits.in_flight_max)";
            return Err(Refusal::new(Code::Overloaded, message));
        }
        let reply = match request {
            Request::TriggerRegister(specs) => return self.register(now, &specs, host),
            Request::TriggerUnregister(specs) => return self.unregister(&specs, host),
            Request::PoolCreate(create) => return self.pool_create(now, create, host),
            Request::PoolJoin(name) => return self.pool_join(now, &name, host),
            Request::PoolLeave(name) => return self.pool_leave(now, &name, host),
            Request::PoolRemove(name, force) => return self.pool_remove(now, &name, force, host),
            Request::Watch(pool, events) => return self.watch(&pool, Some(events), host),
            Request::Unwatch(pool) => return self.watch(&pool, None, host),
            Request::Admin(admin) => return self.admin(now, id, &admin, host),
            Request::Emit(emit) => self.emit(&emit, host)?,
            Request::PoolList(page) => host
                .with_registry(|registry, _| registry.list_pools(&page))
                .to_string(),
            Request::PoolInfo(name) => pool_info(&name, host)?,
            Request::AppList(pool, page) => {
                let clock = clock(now, host);
                let apps = host
                    .with_registry(|registry, _| registry.list_apps(pool.as_ref(), &page, clock))?;
                apps.to_string()
            }
            Request::Ping => format!("{{\"time\":{}}}", host.unix_ms(now)),
            Request::Stats => host.stats(now),
            Request::Health => host.health(now),
            Request::Handshake(_)
            | Request::Memory(_)
            | Request::Trigger(_)
            | Request::Response(_)
            | Request::Cancel(_)
            | Request::Ack(..) => {
                unreachable!("these are handled where the frame came in")
            }
        };
        Ok(Reply::Now(reply))
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

    fn register(
        &mut self,
        now: Time,
        specs: &[TriggerSpec],
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
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
        let is_promised = host.with_registry(|registry, fx| {
            registry.remember_triggers(&ready.app, specs, transport, &peer, fx)
        })?;
        ready.triggers = triggers;
        let names: Vec<_> = specs.iter().map(|spec| &spec.name).collect();
        let audit = Audit {
            event: "registered",
            app: Some(&ready.app),
            instance: Some(ready.instance),
            detail: json!({"triggers": names}),
        };
        host.effects().audit(&peer, &audit);
        for m in &self.memberships {
            let reserved =
                (m.name.as_str() == SYSTEM_POOL && transport != Transport::BuiltIn) || !m.may_serve;
            host.with_pool(&m.pool, |pool, fx| {
                for spec in specs {
                    if spec.is_for(&m.name) && !reserved {
                        pool.serve(now, m.member, spec, fx);
                    } else {
                        pool.unserve(m.member, &spec.name, fx);
                    }
                }
            });
        }
        let reply = self.triggers_json();
        Ok(Reply::kept_if(is_promised, reply, Promise::Registration))
    }

    fn unregister(&mut self, specs: &[TriggerSpec], host: &mut H) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let is_promised = host
            .with_registry(|registry, fx| registry.forget_triggers(&ready.app, specs, &peer, fx));
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
        let reply = self.triggers_json();
        Ok(Reply::kept_if(is_promised, reply, Promise::Registration))
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
    ) -> Result<Reply, Refusal> {
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let name = create.pool.clone();
        let (unix_ms, peer) = (host.unix_ms(now), self.peer.clone());
        let is_promised = host
            .with_registry(|registry, fx| registry.create_pool(unix_ms, &app, create, &peer, fx))?;
        // It may be removed by now; what was promised is told all the same.
        let reply = pool_info(&name, host).unwrap_or_else(|_| "{}".into());
        Ok(Reply::kept_if(is_promised, reply, Promise::Pool(name)))
    }

    fn pool_join(&mut self, now: Time, name: &PoolName, host: &mut H) -> Result<Reply, Refusal> {
        self.forget_removed(host);
        if self.memberships.iter().any(|m| m.name == *name) {
            return Ok(Reply::Now("{}".into()));
        }
        crate::registry::check_pools(self.memberships.len() + 1, host.limits())?;
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let (unix_ms, peer) = (host.unix_ms(now), self.peer.clone());
        let (entrance, is_promised) =
            host.with_registry(|registry, fx| registry.open(unix_ms, &app, name, &peer, fx))?;
        self.enter(now, entrance, None, host);
        if !self.settle(host) {
            let _ = self.overtaken(now, host);
        }
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            Promise::Registration,
        ))
    }

    fn pool_leave(&mut self, now: Time, name: &PoolName, host: &mut H) -> Result<Reply, Refusal> {
        let Some(at) = self.memberships.iter().position(|m| m.name == *name) else {
            return Err(Refusal::new(
                Code::NotMember,
                format!("this app is not in pool '{name}'"),
            ));
        };
        let membership = self.memberships.swap_remove(at);
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        let is_promised = host.with_registry(|registry, fx| {
            registry.forget_pool(&ready.app, ready.instance, name, &self.peer, fx)
        });
        leave(now, &membership, host);
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            Promise::Registration,
        ))
    }

    fn pool_remove(
        &mut self,
        now: Time,
        name: &PoolName,
        force: bool,
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let is_admin = self.terms.is_admin;
        let peer = self.peer.clone();
        let (pool, is_promised) = host.with_registry(|registry, fx| {
            registry.remove_pool((&app, is_admin), name, force, &peer, fx)
        })?;
        host.with_pool(&pool, |pool, fx| pool.close(now, fx));
        self.forget_removed(host);
        Ok(Reply::kept_if(is_promised, "{}".into(), Promise::Removal))
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
    ) -> Result<Reply, Refusal> {
        let m = self.membership(Some(name.as_str()))?;
        if !host.with_pool(&m.pool, |pool, _| pool.watch(m.member, events)) {
            return Err(Refusal::new(
                Code::NotMember,
                format!("pool '{name}' was removed; join it again with pool_join"),
            ));
        }
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        let is_promised = host.with_registry(|registry, fx| {
            registry.remember_watch(&ready.app, name, events, &self.peer, fx)
        });
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            Promise::Registration,
        ))
    }

    fn admin(
        &mut self,
        now: Time,
        id: Option<&str>,
        admin: &Admin<'_>,
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        let by_token = admin
            .token
            .as_ref()
            .is_some_and(|token| host.is_admin_token(token));
        if !self.terms.is_admin && !by_token {
            let message = "only the server's own user over the Unix socket, or the admin token of the data directory, may do this";
            return Err(Refusal::new(Code::Forbidden, message));
        }
        if let Some(ready) = &self.ready {
            let what = match &admin.action {
                AdminAction::Shutdown => json!({"action": "shutdown"}),
                AdminAction::Reload => json!({"action": "reload"}),
                AdminAction::HandOver => json!({"action": "hand_over"}),
                AdminAction::Kick(app, instance) => {
                    json!({"action": "kick", "of": app, "of_instance": instance})
                }
                AdminAction::Forget(app) => json!({"action": "app_forget", "of": app}),
                AdminAction::Backup(to) => json!({"action": "backup", "to": to}),
                AdminAction::CheckDatabase(full) => json!({"action": "db_check", "full": full}),
            };
            self.audit("administered", (&ready.app, ready.instance), what, host);
        }
        match &admin.action {
            AdminAction::Kick(app, instance) => {
                let unix_ms = host.unix_ms(now);
                let gone =
                    host.with_registry(|registry, fx| registry.evict(unix_ms, app, *instance, fx));
                for instance in &gone {
                    expel(now, instance, "kicked", host);
                }
                Ok(Reply::Now(format!("{{\"kicked\":{}}}", gone.len())))
            }
            AdminAction::Forget(app) => {
                let peer = self.peer.clone();
                host.with_registry(|registry, fx| registry.forget_app(app, &peer, fx))?;
                Ok(Reply::Kept("{}".into(), Promise::Removal))
            }
            AdminAction::HandOver if !self.features.fd_passing => {
                let message = "sockets go over the Unix socket, with the features 'attachments' and 'fd_passing'";
                Err(Refusal::new(Code::BadMessage, message))
            }
            action => {
                let reply = host.admin(action, &self.peer, id)?;
                Ok(reply.map_or(Reply::Later, Reply::Now))
            }
        }
    }

    fn reply(&self, id: Option<&str>, reply: &str, host: &mut H) {
        if let Some(id) = id {
            self.send(Class::Control, reply.len() + 256, host, |out| {
                encode::reply(out, id, reply)
            });
        }
    }

    fn audit(
        &self,
        event: &'static str,
        (app, instance): (&AppId, InstanceId),
        detail: serde_json::Value,
        host: &mut H,
    ) {
        let audit = Audit {
            event,
            app: Some(app),
            instance: Some(instance),
            detail,
        };
        host.effects().audit(&self.peer, &audit);
    }

    fn refuse(&self, id: Option<&str>, refusal: &Refusal, host: &mut H) {
        host.effects().refused(refusal.code);
        // What somebody wanted who may not.
        if matches!(refusal.code, Code::Forbidden | Code::AppInUse) {
            let audit = Audit {
                event: "refused",
                app: self.ready.as_ref().map(|ready| &ready.app),
                instance: self.ready.as_ref().map(|ready| ready.instance),
                detail: json!({"code": refusal.code.as_str(), "message": refusal.message}),
            };
            host.effects().audit(&self.peer, &audit);
        }
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

fn pool_info<H: Host>(name: &PoolName, host: &mut H) -> Result<String, Refusal> {
    let (pool, mut description) = host.with_registry(|registry, _| registry.describe_pool(name))?;
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
