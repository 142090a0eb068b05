//! Handshakes: which apps are admitted, and what they are granted.
//!
//! A changed registration is stored first; the app is admitted once that is on disk.

use std::collections::BTreeSet;
use std::sync::Arc;

use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_POOL};
use latzero_protocol::message::{Handshake, TriggerSpec, not_storable, too_many, too_many_bytes};
use latzero_protocol::policy::{Actor, Right};
use latzero_protocol::{AppId, InstanceId, PoolName, Refusal};
use serde_json::Value;

use super::{Admission, Admitted, App, Instance, Registry, Who};
use crate::driver::{Driver, Peer, Transport};
use crate::ledger::{Account, Reservation, Resource};
use crate::limits::Limits;
use crate::refusals;
use crate::registration::{Registration, Remembered};
use crate::rows::StoreChange;
use crate::turn::Turn;

impl<D: Driver> Registry<D> {
    /// Admits an instance of an app, or refuses it. If the handshake changes the registration, the
    /// change is stored first, and `peer` waits for it. Then this is called again, with `kept` from
    /// [`Admitted::Later`].
    ///
    /// # Errors
    /// `forbidden`, `unauthenticated`, `app_in_use`, `quota`, `too_large`; nothing was changed.
    #[allow(
        clippy::too_many_lines,
        reason = "one decision after the other, none of which can be moved"
    )]
    pub fn admit(
        &mut self,
        peer: &D::Peer,
        (transport, who): (Transport, &Who),
        handshake: &Handshake<'_>,
        kept: Option<bool>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Admitted<D>, Refusal> {
        let now = turn.time();
        let unix_ms = turn.unix_ms();
        let app_id = &handshake.app_id;
        self.check_identity(app_id, who, transport)?;
        let actor = who.actor(app_id);
        // Instances that connected before the AppID had an owner are displaced by the owner.
        let is_known_now = who.uid.is_some() || who.proved.is_some();
        let stays = |instance: &Instance<D>| instance.is_known || !is_known_now;
        let known = self.apps.get(app_id);
        let remembered = known.map(|app| app.registration.get());
        let is_kept = kept.is_some();
        let named = handshake.pools.as_deref().unwrap_or_default();
        if named.iter().any(|name| self.is_sealed(name)) {
            return Err(Refusal::unproved());
        }
        let wants_back = handshake.pools.is_none()
            && handshake.triggers.is_none()
            && !handshake.names_encrypted
            && remembered.is_some();
        // The registration that was just stored is not what the app had before.
        let rehydrated = kept.unwrap_or(wants_back);
        let mut registration = match &remembered {
            Some(remembered) if wants_back => Registration::clone(remembered),
            _ => Registration {
                pools: handshake.pools.clone().unwrap_or_default(),
                triggers: handshake.triggers.clone().unwrap_or_default(),
                ..Registration::default()
            },
        };
        if wants_back {
            // Pools whose policy now excludes the app are left out.
            registration.pools.retain(|name| {
                let is_kept = self.is_reserved(app_id, name, now);
                self.is_sealed(name)
                    || !is_kept && self.pools.get(name).is_none_or(|p| p.admits(&actor))
            });
            // So are triggers that it may no longer serve.
            registration.triggers.retain(|spec| {
                self.check_service(&actor, std::slice::from_ref(spec))
                    .is_ok()
            });
        }
        if registration.pools.is_empty() && !handshake.names_encrypted {
            registration
                .pools
                .push(PoolName::new(DEFAULT_POOL).expect("a built-in name is valid"));
        }
        if let Some(remembered) = remembered.as_deref().filter(|_| !wants_back) {
            self.carry_sealed(remembered, &mut registration);
        }
        dedup_pools(&mut registration.pools);
        dedup_triggers(&mut registration.triggers);
        self.check_quota(&registration)?;
        if transport != Transport::BuiltIn {
            check_reserved(&registration.triggers)?;
        }
        self.check_policies(&actor, &registration)?;
        let kept = |name: &&PoolName| self.is_reserved(app_id, name, now);
        if let Some(name) = registration.pools.iter().find(kept) {
            return Err(refusals::pool_not_open(app_id, name));
        }
        if let Some(meta) = handshake.meta {
            registration.meta = Some(self.free_json("meta", meta.text())?);
        }
        let is_same = remembered.as_ref().is_some_and(|remembered| {
            let meta = registration.meta.clone();
            // A change of only the metadata does not wait for the disk.
            let remembered = Registration {
                meta,
                ..Registration::clone(remembered)
            };
            remembered == registration
        });
        let meta_changed = remembered.is_none_or(|remembered| remembered.meta != registration.meta);
        if let Some(app) = known {
            let stay = || app.instances.iter().filter(|instance| stays(instance));
            let alone = handshake.exclusive || stay().any(|i| i.exclusive);
            if alone && stay().next().is_some() && !handshake.takeover {
                return Err(refusals::app_is_exclusive(app_id));
            }
            if stay().count() >= self.limits.instances_per_app_max && !handshake.takeover {
                let max = self.limits.instances_per_app_max;
                return Err(refusals::too_many_instances(app_id, max));
            }
        }
        let is_known = known.is_some();
        let new_pools = registration
            .pools
            .iter()
            .filter(|name| !self.pools.contains_key(*name))
            .count();
        self.check_room_for_pools(new_pools)?;
        let account = Arc::clone(peer.link().account());
        let user = Arc::clone(account.user());
        // The app itself must not be forgotten to make room.
        let own = self.apps.get(app_id);
        let own = own.filter(|app| app.instances.is_empty());
        let own = own.map(|app| (app.user, app.last_seen));
        if let Some((user, last_seen)) = own {
            self.offline.remove(user, last_seen, app_id);
        }
        let held = self.reserve_app(app_id, &registration, &user, turn);
        if let Some((user, last_seen)) = own {
            self.offline.insert(user, last_seen, app_id.clone());
        }
        let held = held?;
        let mut places = Vec::new();
        for _ in 0..new_pools {
            places.push(account.reserve(Resource::Pools, 1).map_err(Refusal::from)?);
        }
        // The last step that can fail: state changes from here on.
        if !is_known {
            self.make_room(&user, turn)?;
        }
        let is_persistent = transport != Transport::BuiltIn && !handshake.transient;
        let app = self.apps.entry(app_id.clone()).or_insert_with(|| App {
            held: user.hold(Resource::Registrations),
            user: user.id(),
            registration: Remembered::Read(Registration::default()),
            instances: Vec::new(),
            registered: unix_ms,
            last_seen: unix_ms,
            is_persistent,
        });
        if !is_known {
            self.offline.insert(app.user, app.last_seen, app_id.clone());
        }
        let becomes_persistent = is_persistent && !app.is_persistent;
        // A transient instance does not make a remembered app transient, and a later instance may
        // make a transient app a remembered one.
        app.is_persistent |= is_persistent;
        app.registration = Remembered::Read(registration.clone());
        app.held.force(app.bytes());
        self.bind(app_id, who, is_persistent, turn);
        let app = self.apps.get_mut(app_id).expect("it was created above");
        if (!is_same || becomes_persistent) && !is_kept && app.store(app_id, Some(peer), turn) {
            return Ok(Admitted::Later { rehydrated });
        }

        let random = turn.driver.random();
        let id = random.first_chunk().expect("32 bytes");
        let instance = InstanceId(u64::from_be_bytes(*id));
        // An encrypted pool is joined, and its state restored, only after a proof.
        let joined = registration
            .pools
            .iter()
            .filter(|name| !self.is_sealed(name));
        let joined: Vec<PoolName> = joined.cloned().collect();
        let watches = registration.watches.iter();
        let watches = watches
            .filter(|(pool, _)| joined.contains(pool))
            .cloned()
            .collect();
        let subscriptions = registration.subscriptions.iter();
        let subscriptions = subscriptions.filter(|(pool, _)| !self.is_sealed(pool));
        let subscriptions = subscriptions.cloned().collect();
        let pools = joined
            .into_iter()
            .map(|name| self.enter(unix_ms, &actor, name, &mut places))
            .collect();
        let triggers = registration.triggers.iter();
        let triggers = triggers.map(TriggerSpec::without_schema).collect();
        let app = self.apps.get_mut(app_id).expect("it was created above");
        self.offline.remove(app.user, app.last_seen, app_id);
        let was_offline = app.instances.is_empty();
        app.last_seen = unix_ms;
        let (stay, displaced): (Vec<_>, Vec<_>) = std::mem::take(&mut app.instances)
            .into_iter()
            .partition(|instance| stays(instance) && !handshake.takeover);
        app.instances = stay;
        app.instances.push(Instance {
            id: instance,
            peer: peer.clone(),
            memberships: Vec::new(),
            exclusive: handshake.exclusive,
            since: now,
            uid: who.uid,
            is_known: is_known_now,
        });
        // From now on it belongs to its newest user.
        app.user = user.id();
        app.held = held;
        app.held.force(app.bytes());
        self.instances = self.instances + 1 - displaced.len();
        if meta_changed || (is_kept && !is_same) {
            app.store(app_id, None, turn);
        } else if was_offline && app.is_persistent {
            turn.store(StoreChange::Seen(app_id.clone(), 0), None);
        }
        Ok(Admitted::Now(Box::new(Admission {
            instance,
            pools,
            triggers,
            watches,
            subscriptions,
            rehydrated,
            displaced,
        })))
    }

    /// Forgets the app that was offline longest if there is no room for another. For a new app of
    /// an untrusted user, an app of the same user is forgotten first.
    fn make_room(&mut self, user: &Arc<Account>, turn: &mut Turn<'_, D>) -> Result<(), Refusal> {
        if self.apps.len() < self.limits.apps_max {
            return Ok(());
        }
        if !self.forget_offline(user, user.is_stranger(), turn) && !self.forget_any(turn) {
            return Err(refusals::too_many_apps(self.apps.len()));
        }
        Ok(())
    }

    fn forget_offline(
        &mut self,
        user: &Arc<Account>,
        is_own_first: bool,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let gone = is_own_first
            .then(|| self.offline.pop_of(user.id()))
            .flatten();
        gone.is_some_and(|gone| self.forget_gone(gone, turn))
    }

    fn forget_any(&mut self, turn: &mut Turn<'_, D>) -> bool {
        let gone = self.offline.pop();
        gone.is_some_and(|gone| self.forget_gone(gone, turn))
    }

    fn forget_gone(&mut self, gone: AppId, turn: &mut Turn<'_, D>) -> bool {
        self.apps.remove(&gone);
        self.unbind(&gone, turn);
        turn.store(StoreChange::ForgetApp(gone), None);
        true
    }

    /// Reserves memory for what an app registers and one more instance of it. Apps that were
    /// offline longest are forgotten to make room.
    fn reserve_app(
        &mut self,
        app_id: &AppId,
        registration: &Registration,
        user: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> Result<Reservation, Refusal> {
        let registered = Remembered::Read(registration.clone()).bytes();
        let (had, instances) = self.apps.get(app_id).map_or((0, 0), |app| {
            (app.held.amount(), app.instances.len() as u64)
        });
        let needed = registered + registration.live() * (instances + 1);
        let mut held = user.hold(Resource::Registrations);
        loop {
            // Its present registration is released when it is replaced.
            let more = needed.saturating_sub(had);
            let Err(full) = held.resize(more) else {
                held.force(needed);
                return Ok(held);
            };
            let is_own = !full.is_of_server();
            if !self.forget_offline(user, is_own || user.is_stranger(), turn)
                && (is_own || !self.forget_any(turn))
            {
                return Err(full.into());
            }
        }
    }

    /// Only a connection that has proved an encrypted pool may change what an app has in it.
    fn carry_sealed(&self, remembered: &Registration, registration: &mut Registration) {
        registration.sealed.clone_from(&remembered.sealed);
        let is_carried = |pool: &PoolName| self.is_sealed(pool);
        let pools = remembered.pools.iter().filter(|pool| is_carried(pool));
        registration.pools.extend(pools.cloned());
        let watches = remembered.watches.iter();
        let watches = watches.filter(|(pool, _)| is_carried(pool));
        registration.watches.extend(watches.cloned());
        let subscriptions = remembered.subscriptions.iter();
        let subscriptions = subscriptions.filter(|(pool, _)| is_carried(pool));
        registration.subscriptions.extend(subscriptions.cloned());
    }

    /// Whether the policies of pools allow an app to join, and to serve its triggers where it says.
    pub(super) fn check_policies(
        &self,
        actor: &Actor<'_>,
        registration: &Registration,
    ) -> Result<(), Refusal> {
        for name in registration
            .pools
            .iter()
            .filter(|name| !self.is_sealed(name))
        {
            if self
                .pools
                .get(name)
                .is_some_and(|entry| !entry.admits(actor))
            {
                return Err(refusals::pool_not_open(actor.app, name));
            }
        }
        self.check_service(actor, &registration.triggers)
    }

    pub(super) fn check_service(
        &self,
        actor: &Actor<'_>,
        triggers: &[TriggerSpec],
    ) -> Result<(), Refusal> {
        let named = triggers
            .iter()
            .flat_map(|spec| spec.pools.iter().flatten().map(move |pool| (spec, pool)));
        for (spec, name) in named {
            let Some(entry) = self.pools.get(name) else {
                continue;
            };
            // This is decided when the pool is proved.
            if entry.sealed.is_some() {
                continue;
            }
            if !entry.admits(actor) {
                return Err(refusals::pool_not_open(actor.app, name));
            }
            if !entry.allows(Right::Serve, actor) {
                let right = Right::Serve.as_str();
                return Err(refusals::right_is_denied(right, name));
            }
            if spec.privileged {
                return Err(refusals::privileged_in_plain_pool(&spec.name, name));
            }
        }
        Ok(())
    }

    pub(super) fn check_quota(&self, registration: &Registration) -> Result<(), Refusal> {
        let pools = &registration.pools[..];
        check_pools(pools.len(), &self.limits)?;
        // Each encrypted pool has its own copy of what is served there.
        let sealed = registration.sealed.iter().flat_map(|(_, specs)| specs);
        let triggers = || registration.triggers.iter().chain(sealed.clone());
        let names: BTreeSet<_> = triggers().map(|spec| &spec.name).collect();
        check_triggers(names.len(), &self.limits)?;
        let pool_bytes =
            |pools: &[PoolName]| pools.iter().map(|name| name.as_str().len()).sum::<usize>();
        let bytes = pool_bytes(pools) + triggers().map(TriggerSpec::bytes).sum::<usize>();
        if bytes > self.limits.registration_bytes_max {
            return Err(too_many_bytes(self.limits.registration_bytes_max));
        }
        let (served, max) = (registration.served(), self.limits.served_per_app_max);
        if served > max {
            let (triggers, pools) = (names.len(), pools.len());
            return Err(refusals::too_many_served(triggers, pools, served, max));
        }
        Ok(())
    }

    /// Checks JSON that the server does not interpret: only its size is limited.
    pub(super) fn free_json(&self, field: &str, text: &str) -> Result<Value, Refusal> {
        if text.len() > self.limits.meta_bytes_max {
            let max = self.limits.meta_bytes_max;
            return Err(refusals::field_too_large(field, text.len(), max));
        }
        serde_json::from_str(text).map_err(|error| not_storable(field, error.column()))
    }
}

pub(super) fn dedup_pools(pools: &mut Vec<PoolName>) {
    let mut seen = BTreeSet::new();
    pools.retain(|name| seen.insert(name.clone()));
}

/// If a trigger is named twice, the last one counts.
pub(crate) fn dedup_triggers(triggers: &mut Vec<TriggerSpec>) {
    let mut seen = BTreeSet::new();
    triggers.reverse();
    triggers.retain(|spec| seen.insert(spec.name.clone()));
    triggers.reverse();
}

/// Removes those of the triggers that have the name of one in `gone`.
pub(crate) fn remove_triggers(triggers: &mut Vec<TriggerSpec>, gone: &[TriggerSpec]) {
    let gone: BTreeSet<_> = gone.iter().map(|spec| &spec.name).collect();
    triggers.retain(|known| !gone.contains(&known.name));
}

pub(super) fn check_reserved(triggers: &[TriggerSpec]) -> Result<(), Refusal> {
    let names_system = |spec: &&TriggerSpec| {
        spec.pools
            .as_ref()
            .is_some_and(|pools| pools.iter().any(|p| p.as_str() == SYSTEM_POOL))
    };
    match triggers.iter().find(names_system) {
        Some(spec) => Err(refusals::triggers_in_system_pool(&spec.name, SYSTEM_POOL)),
        None => Ok(()),
    }
}

/// Checks whether an app, or one instance of it, may be in that many pools.
pub(crate) fn check_pools(pools: usize, limits: &Limits) -> Result<(), Refusal> {
    if pools > limits.pools_per_app_max {
        return Err(too_many("pools", limits.pools_per_app_max));
    }
    Ok(())
}

/// Checks whether an app, or one instance of it, may serve that many triggers.
pub(crate) fn check_triggers(triggers: usize, limits: &Limits) -> Result<(), Refusal> {
    if triggers > limits.triggers_per_app_max {
        return Err(too_many("triggers", limits.triggers_per_app_max));
    }
    Ok(())
}
