//! The handshake, from its words to the memberships it grants.

use latzero_protocol::encode;
use latzero_protocol::limits::{PROTOCOL_VERSION, SYSTEM_POOL};
use latzero_protocol::message::{EventSet, Features, Handshake, TriggerSpec};
use latzero_protocol::{Code, Refusal};
use serde_json::json;

use super::pools::{NAMES_SHOWN_MAX, shown};
use super::promises::Awaited;
use super::{Flow, Ready, Session, expel, leave, tell_departure};
use crate::effects::Class;
use crate::host::{Host, Transport};
use crate::pool::Joining;
use crate::registry::{Admission, Admitted, Membership};
use crate::time::Time;

/// How writing down a handshake went.
#[derive(Clone, Copy)]
pub(super) struct Stored {
    pub(super) is_on_disk: bool,
    /// Whether what the app had is restored, as it was found when the handshake came.
    pub(super) rehydrated: bool,
}

/// What became of a handshake that was not refused.
pub(super) enum Entry {
    In,
    /// Somebody took over meanwhile.
    Overtaken,
    /// It is to be written down first.
    Later {
        rehydrated: bool,
    },
}

impl<H: Host> Session<H> {
    pub(super) fn handshake(
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
    pub(super) fn admit(
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
            json!({"pools": pools.iter().map(|p| &p.name).take(NAMES_SHOWN_MAX).collect::<Vec<_>>(),
                "triggers": shown(&triggers), "triggers_total": triggers.len(),
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
    pub(super) fn enter(
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
    pub(super) fn settle(&self, host: &mut H) -> bool {
        let Some(ready) = &self.ready else {
            return false;
        };
        host.with_registry(|registry, _| {
            registry.settle(&ready.app, ready.instance, &self.memberships)
        })
    }

    /// Somebody took over while this session was still joining: it leaves again. It is told here: whoever took over may
    /// find its connection closed already.
    pub(super) fn overtaken(&mut self, now: Time, host: &mut H) -> Flow {
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
}
