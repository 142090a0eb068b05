//! The handshake, from its message to the memberships it grants.

use std::collections::BTreeMap;
use std::sync::Arc;

use latzero_protocol::encode;
use latzero_protocol::limits::{PROTOCOL_VERSION, SYSTEM_POOL};
use latzero_protocol::message::{EventSet, Features, Handshake, TriggerSpec};
use latzero_protocol::{PoolName, Refusal};
use serde_json::json;

use super::pending::Awaited;
use super::pools::{NAMES_SHOWN_MAX, shown};
use super::{Earlier, Flow, Ready, Session, announce_departure, expel, leave};
use crate::driver::{Driver, Peer, Transport};
use crate::outbox::Class;
use crate::pool::Joining;
use crate::refusals;
use crate::registry::{Admission, Admitted, Membership};
use crate::turn::Turn;

/// The result of storing a handshake.
#[derive(Clone, Copy)]
pub(super) struct StoredRegistration {
    pub(super) is_on_disk: bool,
    /// Whether the app's registration is restored, as determined when the handshake arrived.
    pub(super) rehydrated: bool,
}

/// The state of a handshake that was not refused.
pub(super) enum Entry {
    In,
    /// Another instance took over in the meantime.
    Overtaken,
    /// It must be stored first.
    Later {
        rehydrated: bool,
    },
}

impl<D: Driver> Session<D> {
    pub(super) fn handshake(
        &mut self,
        id: Option<&str>,
        handshake: &Handshake<'_>,
        json: &[u8],
        turn: &mut Turn<'_, D>,
    ) -> Flow {
        if self.ready.is_some() {
            let refusal = refusals::already_ready();
            self.refuse(id, &refusal, turn);
            return Flow::Continue;
        }
        match self.admit(id, handshake, None, turn) {
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
                let is_guess = refusal == Refusal::unproved();
                let refusal = self.refuse_guess(refusal, turn);
                self.refuse(id, &refusal, turn);
                if is_guess {
                    let _ = self.count_refused(&refusal, turn);
                }
                Flow::Close
            }
        }
    }

    /// Admits an app. `stored` is the result of storing the handshake, if that was done.
    pub(super) fn admit(
        &mut self,
        id: Option<&str>,
        handshake: &Handshake<'_>,
        stored: Option<StoredRegistration>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Entry, Refusal> {
        if handshake.protocol != PROTOCOL_VERSION {
            let asked = handshake.protocol;
            return Err(refusals::unsupported_protocol(asked, PROTOCOL_VERSION));
        }
        if turn.driver.context().is_draining() {
            return Err(refusals::draining_handshakes());
        }
        let (peer, transport) = (self.peer.clone(), self.terms.transport);
        let kept = stored.map(|stored| stored.rehydrated);
        let admitted = turn.with_registry(|registry, turn| {
            registry.admit(&peer, (transport, &self.who), handshake, kept, turn)
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
            turn,
        );
        if self.who.proved.is_some() {
            self.audit("app_proved", (&handshake.app_id, instance), json!({}), turn);
        }
        for displaced in &displaced {
            let by = (&handshake.app_id, instance);
            self.audit("took_over", by, json!({"displaced": displaced.id}), turn);
        }
        // A displaced instance leaves before the new one joins, so no call can reach it any more.
        expel(&displaced, "displaced", turn);
        self.features = handshake.features.and(Features {
            attachments: true,
            // Descriptors can only be sent over Unix sockets, and the bytes that they replace are
            // sent as attachments.
            fd_passing: transport == Transport::Unix && handshake.features.attachments,
        });
        let site = std::sync::Arc::clone(turn.driver.context());
        let limits = &site.limits;
        let mut ack = json!({
            "action": "handshake_ack", "status": "ok", "app_id": handshake.app_id,
            "instance": instance,
            "pools": pools.iter().map(|p| &p.name).collect::<Vec<_>>(),
            "triggers": names(&triggers), "rehydrated": rehydrated,
            "protocol": PROTOCOL_VERSION, "server": {"version": site.version, "node": site.node},
            "features": self.features.names(),
            "limits": {
                "max_frame": limits.max_frame, "max_in_flight": limits.in_flight_max,
                "max_block": limits.block_bytes_max,
            },
        });
        if let Some(id) = id {
            ack["in_reply_to"] = id.into();
        }
        if stored.is_some_and(|stored| !stored.is_on_disk) {
            // An app must be able to work while the disk is full, and to know that it is not
            // stored.
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
        // Before the joins, because the acknowledgement must be the first message that a client
        // gets.
        self.send(Class::Control, ack.len(), turn, |out| {
            encode::message(out, &ack)
        });
        let user = Arc::clone(&self.terms.user);
        let app =
            turn.with_registry(|registry, turn| registry.account(&handshake.app_id, &user, turn));
        let account = turn.driver.context().ledger.connection(&app);
        self.peer.link().set_account(account);
        let (triggers, outside, earlier) = match handshake.triggers {
            Some(_) => (triggers, Vec::new(), Earlier::Replaced),
            // They stay in the registration, but this instance serves none of them.
            None if handshake.hold_triggers => (Vec::new(), Vec::new(), Earlier::Held),
            None => (Vec::new(), triggers, Earlier::Restored),
        };
        self.ready = Some(Ready {
            app: handshake.app_id.clone(),
            instance,
            triggers,
            outside,
            earlier,
            holds_answers: handshake.hold_answers,
        });
        let mut watches: BTreeMap<_, _> = watches.into_iter().collect();
        let mut subscribed: BTreeMap<PoolName, Vec<_>> = BTreeMap::new();
        for (pool, block) in subscriptions {
            subscribed.entry(pool).or_default().push(block);
        }
        for entrance in pools {
            let name = entrance.name.clone();
            self.enter(entrance, watches.remove(&name), turn);
            if let Some(m) = self.memberships.last().filter(|m| m.name == name) {
                for block in subscribed.remove(&name).unwrap_or_default() {
                    // A removed block does not change any more.
                    let _ = turn.with_pool(&m.pool, |pool, turn| {
                        pool.blocks().subscribe(m.member, &block, turn)
                    });
                }
            }
        }
        if self.settle(turn) {
            return Ok(Entry::In);
        }
        let _ = self.overtaken(turn);
        Ok(Entry::Overtaken)
    }

    /// Joins a pool that the registry opened.
    pub(super) fn enter(
        &mut self,
        entrance: crate::registry::Entrance<D>,
        watch: Option<EventSet>,
        turn: &mut Turn<'_, D>,
    ) {
        let ready = self.ready.as_ref().expect("only a ready session joins");
        let joining = Joining {
            peer: self.peer.clone(),
            app: ready.app.clone(),
            instance: ready.instance,
            attachments: self.attachments(),
            takes_descriptors: self.features.fd_passing,
            rights: entrance.rights,
            takes_answers: !ready.holds_answers && entrance.takes_answers(),
        };
        let is_open =
            entrance.name.as_str() != SYSTEM_POOL || self.terms.transport == Transport::BuiltIn;
        let own = |spec: &&TriggerSpec| is_open && spec.is_for(&entrance.name);
        let member = turn.with_pool(&entrance.pool, |pool, turn| {
            let member = pool.join(joining, turn)?;
            pool.watch(member, watch);
            pool.durable().deliver_answers(&ready.app, turn);
            let outside = ready.outside.iter().filter(|_| entrance.grant.is_none());
            let own = outside.chain(&ready.triggers).filter(own);
            let own = own.filter_map(|spec| entrance.served_as(spec));
            pool.serve(member, own, turn);
            Some(member)
        });
        match member {
            Some(member) => self.memberships.push(Membership { entrance, member }),
            // Removed after the registry's reply: handled as if it had been removed right
            // afterwards.
            None => {
                let json = format!(
                    "{{\"action\":\"event\",\"event\":\"pool_removed\",\"pool\":\"{}\"}}",
                    entrance.name
                );
                self.send(Class::Control, json.len(), turn, |out| {
                    encode::message(out, &json)
                });
            }
        }
    }

    /// Reports this session's memberships to the registry; false if it was displaced in the
    /// meantime.
    pub(super) fn settle(&self, turn: &mut Turn<'_, D>) -> bool {
        let Some(ready) = &self.ready else {
            return false;
        };
        turn.with_registry(|registry, _| {
            registry.settle(&ready.app, ready.instance, &self.memberships)
        })
    }

    /// Another instance took over while this session was joining: it leaves again. It is notified
    /// here, since its connection may already be closed for the new instance.
    pub(super) fn overtaken(&mut self, turn: &mut Turn<'_, D>) -> Flow {
        if let Some(ready) = &self.ready {
            announce_departure(&self.peer, ready.instance, "displaced", turn);
        }
        for membership in std::mem::take(&mut self.memberships) {
            leave(&membership, turn);
        }
        self.ready = None;
        self.is_over = true;
        Flow::Close
    }
}
