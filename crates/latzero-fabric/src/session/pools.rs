//! Requests about a connection's registration and about pools: join, leave, create, remove, watch,
//! serve.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use latzero_protocol::limits::SYSTEM_POOL;
use latzero_protocol::message::{EventSet, PoolCreate, TriggerSpec, push_field};
use latzero_protocol::{PoolName, Refusal, TriggerName};
use serde_json::json;

use super::pending::{PendingReply, Reply};
use super::{ENDED_AT_ONCE_MAX, Session, leave, wind_down};
use crate::driver::{Driver, Transport};
use crate::effects::Audit;
use crate::refusals;
use crate::registry::{Membership, NewPool, View, dedup_triggers, remove_triggers};
use crate::turn::Turn;

impl<D: Driver> Session<D> {
    pub(super) fn register(
        &mut self,
        specs: &[TriggerSpec],
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        for m in &self.memberships {
            specs.iter().try_for_each(|spec| m.check_named(spec))?;
        }
        specs
            .iter()
            .try_for_each(|spec| self.check_anywhere(spec))?;
        let peer = self.peer.clone();
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let transport = self.terms.transport;
        // The registry alone keeps the schemas.
        let mut news: Vec<_> = specs.iter().map(TriggerSpec::without_schema).collect();
        dedup_triggers(&mut news);
        let mut triggers = ready.triggers.clone();
        remove_triggers(&mut triggers, specs);
        triggers.extend_from_slice(&news);
        let mut outside = ready.outside.clone();
        remove_triggers(&mut outside, specs);
        // The triggers of this instance count in addition to the app's registration, which another
        // instance may have replaced.
        crate::registry::check_triggers(triggers.len() + outside.len(), turn.limits())?;
        let who = &self.who;
        let by = (&ready.app, who);
        let is_promised = turn.with_registry(|registry, turn| {
            registry.remember_triggers(by, ready.instance, specs, transport, &peer, turn)
        })?;
        let known = ready.outside.iter().chain(&ready.triggers);
        let known: BTreeMap<_, _> = known.map(|t| (&t.name, t)).collect();
        let is_news = triggers
            .iter()
            .any(|spec| known.get(&spec.name) != Some(&spec));
        ready.triggers = triggers;
        ready.outside = outside;
        if is_news {
            let audit = Audit {
                event: "registered",
                app: Some(&ready.app),
                instance: Some(ready.instance),
                detail: json!({"triggers": shown(specs), "triggers_total": specs.len()}),
            };
            turn.audit(&peer, &audit);
        }
        for m in &self.memberships {
            let reserved = m.name.as_str() == SYSTEM_POOL && transport != Transport::BuiltIn;
            let served = |spec| {
                let here = Some(spec).filter(|spec: &&TriggerSpec| spec.is_for(&m.name));
                here.filter(|_| !reserved)
                    .and_then(|spec| m.served_as(spec))
            };
            turn.with_pool(&m.pool, |pool, turn| {
                let gone = news.iter().filter(|spec| served(spec).is_none());
                pool.unserve(m.member, gone.map(|spec| &spec.name), turn);
                pool.serve(m.member, news.iter().filter_map(served), turn);
            });
        }
        let reply = self.triggers_json();
        Ok(Reply::kept_if(
            is_promised,
            reply,
            PendingReply::Registration,
        ))
    }

    /// Refuses a trigger for all pools that none of the session's pools lets it serve: its app
    /// would wait in vain.
    fn check_anywhere(&self, spec: &TriggerSpec) -> Result<(), Refusal> {
        let own = |m: &&Membership<D>| m.name.as_str() != SYSTEM_POOL;
        let pools = self.memberships.iter().filter(own);
        let served = pools.map(|m| m.check_served(spec)).reduce(Result::or);
        served.filter(|_| spec.pools.is_none()).unwrap_or(Ok(()))
    }

    pub(super) fn unregister(
        &mut self,
        specs: &[TriggerSpec],
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
        let ready = self.ready.as_mut().expect("only a ready session gets here");
        let is_promised = turn.with_registry(|registry, turn| {
            registry.forget_triggers(&ready.app, ready.instance, specs, &peer, turn)
        });
        remove_triggers(&mut ready.triggers, specs);
        remove_triggers(&mut ready.outside, specs);
        for m in &self.memberships {
            turn.with_pool(&m.pool, |pool, turn| {
                pool.unserve(m.member, specs.iter().map(|spec| &spec.name), turn);
            });
        }
        let reply = self.triggers_json();
        Ok(Reply::kept_if(
            is_promised,
            reply,
            PendingReply::Registration,
        ))
    }

    pub(super) fn triggers_json(&self) -> String {
        let ready = self.ready.iter();
        let triggers = ready.flat_map(|r| r.outside.iter().chain(&r.triggers));
        let mut seen = BTreeSet::new();
        let names = triggers.map(|t| &t.name).filter(|name| seen.insert(*name));
        json!({"triggers": names.collect::<Vec<_>>()}).to_string()
    }

    pub(super) fn pool_create(
        &mut self,
        id: Option<&str>,
        create: PoolCreate<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let pool = turn.with_registry(|registry, _| registry.read_new_pool(create))?;
        match pool.descriptor.clone() {
            Some(descriptor) => self.prove_creation(id, pool, descriptor, turn),
            None => self.create(pool, turn),
        }
    }

    /// Creates a pool whose descriptor, if it has one, is signed.
    pub(super) fn create(
        &mut self,
        pool: NewPool,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let app = self
            .ready
            .as_ref()
            .expect("only a ready session gets here")
            .app
            .clone();
        let name = pool.name.clone();
        let peer = self.peer.clone();
        let by = (&app, &self.who);
        let is_promised = turn
            .with_registry(|registry, turn| registry.create_pool(by, pool, &peer, turn))
            .map_err(|refusal| self.refuse_guess(refusal, turn))?;
        // It may be removed now; the reply is sent anyway.
        let made = turn.with_registry(|registry, _| registry.describe_new_pool(&name));
        let reply = made.map_or_else(
            || "{}".into(),
            |(pool, description)| with_stats(&pool, description, None, turn),
        );
        Ok(Reply::kept_if(is_promised, reply, PendingReply::Pool(name)))
    }

    pub(super) fn pool_join(
        &mut self,
        name: &PoolName,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        self.forget_removed(turn);
        if self.memberships.iter().any(|m| m.name == *name) {
            return Ok(Reply::Now("{}".into()));
        }
        crate::registry::check_pools(self.memberships.len() + 1, turn.limits())?;
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        let peer = self.peer.clone();
        let by = (&ready.app, &self.who);
        let triggers = match self.is_inside() {
            true => &ready.triggers[..],
            false => &[],
        };
        let (entrance, is_promised) = turn
            .with_registry(|registry, turn| registry.open(by, name, triggers, &peer, turn))
            .map_err(|refusal| self.refuse_guess(refusal, turn))?;
        self.enter(entrance, None, turn);
        if !self.settle(turn) {
            let _ = self.overtaken(turn);
        }
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            PendingReply::Registration,
        ))
    }

    /// Leaves a pool, or goes on with that.
    pub(super) fn pool_leave(
        &mut self,
        id: Option<&str>,
        name: &PoolName,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        // What an app has in an encrypted pool only its members change.
        if self
            .memberships
            .iter()
            .any(|m| m.name == *name && m.grant.is_some())
        {
            self.forget_left(turn);
        }
        let Some(at) = self.memberships.iter().position(|m| m.name == *name) else {
            return Err(refusals::nothing_to_leave(name));
        };
        if !wind_down(&self.memberships[at], &mut { ENDED_AT_ONCE_MAX }, turn) {
            self.leaving = Some((id.map(Into::into), name.clone()));
            turn.driver.effects().resumed.push(self.peer.clone());
            return Ok(Reply::Later);
        }
        let membership = self.memberships.swap_remove(at);
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        let is_promised = turn.with_registry(|registry, turn| {
            registry.forget_pool(&ready.app, ready.instance, name, &self.peer, turn)
        });
        leave(&membership, turn);
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            PendingReply::Registration,
        ))
    }

    pub(super) fn pool_remove(
        &mut self,
        name: &PoolName,
        force: bool,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let peer = self.peer.clone();
        let view = self.view();
        let (pool, is_promised) = turn.with_registry(|registry, turn| {
            registry.remove_pool(&view, name, force, &peer, turn)
        })?;
        turn.with_pool(&pool, crate::Pool::close);
        self.forget_removed(turn);
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            PendingReply::Removal,
        ))
    }

    /// Drops memberships that were ended elsewhere, so that the pool can be joined again.
    pub(super) fn forget_left(&mut self, turn: &mut Turn<'_, D>) {
        self.memberships
            .retain(|m| turn.with_pool(&m.pool, |pool, _| pool.has_member(m.member)));
    }

    /// Drops memberships of pools that were removed, so that a new pool of the same name can be
    /// joined.
    pub(super) fn forget_removed(&mut self, turn: &mut Turn<'_, D>) {
        self.memberships
            .retain(|m| !turn.with_pool(&m.pool, |pool, _| pool.is_closed()));
    }

    pub(super) fn watch(
        &mut self,
        name: &PoolName,
        events: Option<EventSet>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reply, Refusal> {
        let m = self.membership(Some(name.as_str()))?;
        if !turn.with_pool(&m.pool, |pool, _| pool.watch(m.member, events)) {
            return Err(refusals::pool_was_removed(name));
        }
        let ready = self.ready.as_ref().expect("only a ready session gets here");
        let is_promised = turn.with_registry(|registry, turn| {
            registry.remember_watch(&ready.app, name, events, &self.peer, turn)
        });
        Ok(Reply::kept_if(
            is_promised,
            "{}".into(),
            PendingReply::Registration,
        ))
    }
}

/// The description of a pool, with all of its triggers or one, of which it shows the schema.
pub(super) fn pool_info<D: Driver>(
    name: &PoolName,
    trigger: Option<&TriggerName>,
    view: &View<'_>,
    turn: &mut Turn<'_, D>,
) -> Result<String, Refusal> {
    let (pool, description) =
        turn.with_registry(|registry, _| registry.describe_pool(name, view))?;
    let schema = trigger.and_then(|trigger| {
        let apps = turn.with_pool(&pool, |pool, _| pool.newest_handlers(trigger));
        turn.with_registry(|registry, _| registry.schema_of(name, trigger, &apps))
    });
    let only = trigger.map(|trigger| OneTrigger {
        name: trigger,
        schema,
    });
    Ok(with_stats(&pool, description, only.as_ref(), turn))
}

/// The only trigger that a description shows.
struct OneTrigger<'a> {
    name: &'a TriggerName,
    schema: Option<Arc<str>>,
}

/// A description, with the part that the pool itself knows.
fn with_stats<D: Driver>(
    pool: &D::Pool,
    mut description: serde_json::Value,
    only: Option<&OneTrigger<'_>>,
    turn: &mut Turn<'_, D>,
) -> String {
    let (stats, triggers) = turn.with_pool(pool, |pool, _| {
        let triggers = match only {
            None => pool.triggers_json(),
            Some(only) => pool.trigger_json(only.name).into_iter().collect(),
        };
        (pool.stats(), triggers)
    });
    // Without the policy, the content of the pool is hidden from this client.
    let is_shown = !description["policy"].is_null();
    description["triggers_total"] = stats.triggers.into();
    description["calls_in_flight"] = stats.calls_in_flight.into();
    description["blocks"] = stats.blocks.into();
    description["block_bytes"] = stats.block_bytes.into();
    description["calls"] = stats.calls.into();
    description["emits"] = stats.emits.into();
    let mut text = description.to_string();
    if is_shown {
        let mut triggers: Vec<String> = triggers.iter().map(ToString::to_string).collect();
        // The schema stays as it was registered, in the order of its fields too.
        let schema = only.and_then(|only| only.schema.as_deref());
        if let (Some(trigger), Some(schema)) = (triggers.first_mut(), schema) {
            push_field(trigger, "schema", schema);
        }
        push_field(&mut text, "triggers", &format!("[{}]", triggers.join(",")));
    }
    text
}

/// How many names an entry of the audit log lists.
pub(super) const NAMES_SHOWN_MAX: usize = 32;

/// The names of triggers that the audit log lists.
pub(super) fn shown(specs: &[TriggerSpec]) -> Vec<&TriggerName> {
    let names = specs.iter().map(|spec| &spec.name);
    names.take(NAMES_SHOWN_MAX).collect()
}
