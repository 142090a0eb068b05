//! What a connection asks about its registration and about pools: joined, left, made, removed, watched, served.

use std::collections::BTreeMap;

use latzero_protocol::limits::SYSTEM_POOL;
use latzero_protocol::message::{EventSet, PoolCreate, TriggerSpec};
use latzero_protocol::{Code, PoolName, Refusal, TriggerName};
use serde_json::json;

use super::promises::{Promise, Reply};
use super::{Session, leave};
use crate::effects::{Audit, Effects};
use crate::host::{Host, Transport};
use crate::registry::{dedup_triggers, remove_triggers};
use crate::time::Time;

impl<H: Host> Session<H> {
    pub(super) fn register(
        &mut self,
        now: Time,
        specs: &[TriggerSpec],
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let transport = self.terms.transport;
        let mut triggers = ready.triggers.clone();
        triggers.extend_from_slice(specs);
        dedup_triggers(&mut triggers);
        // What this instance serves counts besides what the app is remembered with: another instance may have
        // replaced that.
        crate::registry::check_triggers(&triggers, host.limits())?;
        let is_promised = host.with_registry(|registry, fx| {
            registry.remember_triggers(&ready.app, specs, transport, &peer, fx)
        })?;
        let known: BTreeMap<_, _> = ready.triggers.iter().map(|t| (&t.name, t)).collect();
        let is_news = specs
            .iter()
            .any(|spec| known.get(&spec.name) != Some(&spec));
        ready.triggers = triggers;
        if is_news {
            let audit = Audit {
                event: "registered",
                app: Some(&ready.app),
                instance: Some(ready.instance),
                detail: json!({"triggers": shown(specs), "triggers_total": specs.len()}),
            };
            host.effects().audit(&peer, &audit);
        }
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

    pub(super) fn unregister(
        &mut self,
        specs: &[TriggerSpec],
        host: &mut H,
    ) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let is_promised = host
            .with_registry(|registry, fx| registry.forget_triggers(&ready.app, specs, &peer, fx));
        remove_triggers(&mut ready.triggers, specs);
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

    pub(super) fn triggers_json(&self) -> String {
        let triggers: Vec<_> = self
            .ready
            .iter()
            .flat_map(|r| &r.triggers)
            .map(|t| &t.name)
            .collect();
        json!({"triggers": triggers}).to_string()
    }

    pub(super) fn pool_create(
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

    pub(super) fn pool_join(
        &mut self,
        now: Time,
        name: &PoolName,
        host: &mut H,
    ) -> Result<Reply, Refusal> {
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

    pub(super) fn pool_leave(
        &mut self,
        now: Time,
        name: &PoolName,
        host: &mut H,
    ) -> Result<Reply, Refusal> {
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

    pub(super) fn pool_remove(
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
    pub(super) fn forget_removed(&mut self, host: &mut H) {
        self.memberships
            .retain(|m| !host.with_pool(&m.pool, |pool, _| pool.is_closed()));
    }

    pub(super) fn watch(
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
}

pub(super) fn pool_info<H: Host>(name: &PoolName, host: &mut H) -> Result<String, Refusal> {
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

/// Names that the audit log tells one by one.
pub(super) const NAMES_SHOWN_MAX: usize = 32;

/// The names of triggers, as far as the audit log tells them.
pub(super) fn shown(specs: &[TriggerSpec]) -> Vec<&TriggerName> {
    let names = specs.iter().map(|spec| &spec.name);
    names.take(NAMES_SHOWN_MAX).collect()
}
