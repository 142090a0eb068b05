//! What an app has registered: its pools, triggers, watches and subscriptions.

use super::admission::check_reserved;
use super::pools::forget_pool;
use super::*;

impl<D: Driver> Registry<D> {
    /// Opens a pool for an instance that joins it, and records that its app is in it; returns
    /// whether the reply waits for the disk. `triggers` are those of an instance that was only in
    /// encrypted pools, where others do not see them.
    ///
    /// # Errors
    /// `quota`, `forbidden`.
    pub fn open(
        &mut self,
        (app_id, who): (&AppId, &Who),
        name: &PoolName,
        triggers: &[TriggerSpec],
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<(Entrance<D>, bool), Refusal> {
        let unix_ms = turn.unix_ms();
        let actor = who.actor(app_id);
        let registered = self.apps.get(app_id).map(|app| app.registration.get());
        let pools = registered.as_ref().map_or(&[][..], |r| &r.pools);
        if self.is_sealed(name) {
            return Err(Refusal::unproved());
        }
        if self
            .pools
            .get(name)
            .is_some_and(|entry| !entry.admits(&actor))
        {
            return Err(refusals::pool_not_open(app_id, name));
        }
        if !pools.contains(name) && pools.len() >= self.limits.pools_per_app_max {
            return Err(too_many("pools", self.limits.pools_per_app_max));
        }
        drop(registered);
        if self.is_reserved(app_id, name, turn.time()) {
            return Err(refusals::pool_not_open(app_id, name));
        }
        let place = if self.pools.contains_key(name) {
            None
        } else {
            self.check_room_for_pools(1)?;
            let place = promise.link().account().reserve(Resource::Pools, 1);
            Some(place.map_err(Refusal::from)?)
        };
        let mut places = Vec::from_iter(place);
        let entrance = self.enter(unix_ms, &actor, name.clone(), &mut places);
        let max = self.limits.triggers_per_app_max;
        let is_promised = self.remember(app_id, Some(promise), turn, |registration| {
            if !registration.pools.contains(name) {
                registration.pools.push(name.clone());
            }
            for spec in triggers.iter().filter(|spec| spec.pools.is_none()) {
                let mut known = registration.triggers.iter();
                if registration.triggers.len() < max && known.all(|known| known.name != spec.name) {
                    let spec = registration.with_schema(spec);
                    registration.triggers.push(spec);
                }
            }
        });
        Ok((entrance, is_promised))
    }

    /// Changes an app's registration; returns whether there is a change to store.
    pub(super) fn remember(
        &mut self,
        app_id: &AppId,
        promise: Option<&D::Peer>,
        turn: &mut Turn<'_, D>,
        change: impl FnOnce(&mut Registration),
    ) -> bool {
        let Some(app) = self.apps.get_mut(app_id) else {
            return false;
        };
        let registration = app.registration.get_mut();
        let before = registration.clone();
        change(registration);
        let is_changed = *registration != before;
        if is_changed {
            app.held.force(app.bytes());
        }
        is_changed && app.store(app_id, promise, turn)
    }

    /// Like [`Registry::remember`], for what the app watches and subscribes to: only that part of
    /// its row is written.
    pub(super) fn remember_watches(
        &mut self,
        app_id: &AppId,
        promise: Option<&D::Peer>,
        turn: &mut Turn<'_, D>,
        change: impl FnOnce(&mut Registration),
    ) -> bool {
        let Some(app) = self.apps.get_mut(app_id) else {
            return false;
        };
        let registration = app.registration.get_mut();
        let (watches, blocks) = (
            registration.watches.clone(),
            registration.subscriptions.clone(),
        );
        change(registration);
        if (&registration.watches, &registration.subscriptions) == (&watches, &blocks) {
            return false;
        }
        let after = registration.watches_json();
        app.held.force(app.bytes());
        if app.is_persistent {
            turn.store(StoreChange::Watches(app_id.clone(), after), promise);
        }
        app.is_persistent
    }

    /// Removes a pool that an app has left from its registration. Returns whether the reply waits
    /// for the disk.
    pub fn forget_pool(
        &mut self,
        app_id: &AppId,
        instance: InstanceId,
        name: &PoolName,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let Some(app) = self.apps.get_mut(app_id) else {
            return false;
        };
        if let Some(instance) = app.instances.iter_mut().find(|i| i.id == instance) {
            instance.memberships.retain(|m| m.name != *name);
        }
        // Another instance may still be in the pool: the registration belongs to the whole app.
        if app
            .instances
            .iter()
            .any(|i| i.memberships.iter().any(|m| m.name == *name))
        {
            return false;
        }
        self.remember(app_id, Some(promise), turn, |registration| {
            forget_pool(registration, name);
        })
    }

    /// Records the triggers that an app now serves; returns whether the reply waits for the disk.
    ///
    /// # Errors
    /// `quota`, `forbidden`; nothing was changed.
    pub fn remember_triggers(
        &mut self,
        (app_id, who): (&AppId, &Who),
        instance: InstanceId,
        add: &[TriggerSpec],
        transport: Transport,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<bool, Refusal> {
        if transport != Transport::BuiltIn {
            check_reserved(add)?;
        }
        self.check_service(&who.actor(app_id), add)?;
        let Some(app) = self.apps.get(app_id) else {
            return Ok(false);
        };
        let mut add = add.to_vec();
        dedup_triggers(&mut add);
        let mut registration = Registration::clone(&app.registration.get());
        put_triggers(&mut registration, app.memberships(instance), &add, &add);
        self.check_growth(app, &registration, promise)?;
        Ok(self.remember(app_id, Some(promise), turn, |known| *known = registration))
    }

    /// Whether there is room for a registration that replaces an app's present one.
    ///
    /// # Errors
    /// `quota`.
    pub(super) fn check_growth(
        &self,
        app: &App<D>,
        registration: &Registration,
        promise: &D::Peer,
    ) -> Result<(), Refusal> {
        self.check_quota(registration)?;
        let (had, instances) = (app.held.amount(), app.instances.len() as u64);
        let needed =
            Remembered::Read(registration.clone()).bytes() + registration.live() * instances;
        let account = promise.link().account().user().clone();
        let more = account.reserve(Resource::Registrations, needed.saturating_sub(had));
        drop(more.map_err(Refusal::from)?);
        Ok(())
    }

    /// Removes triggers that an app no longer serves; returns whether the reply waits for the disk.
    pub fn forget_triggers(
        &mut self,
        app_id: &AppId,
        instance: InstanceId,
        gone: &[TriggerSpec],
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let app = self.apps.get(app_id);
        let memberships = app
            .map_or(&[][..], |app| app.memberships(instance))
            .to_vec();
        self.remember(app_id, Some(promise), turn, |registration| {
            put_triggers(registration, &memberships, gone, &[]);
        })
    }

    /// Records what an app watches in a pool; `None` removes it. Returns whether the reply waits
    /// for the disk.
    pub fn remember_watch(
        &mut self,
        app_id: &AppId,
        pool: &PoolName,
        events: Option<EventSet>,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        self.remember_watches(app_id, Some(promise), turn, |registration| {
            registration.watches.retain(|(name, _)| name != pool);
            if let Some(events) = events {
                registration.watches.push((pool.clone(), events));
            }
        })
    }

    /// Records that an app subscribed to a block's changes, or removes that.
    pub fn remember_subscription(
        &mut self,
        app_id: &AppId,
        pool: &PoolName,
        block: &BlockId,
        is_on: bool,
        turn: &mut Turn<'_, D>,
    ) {
        let max = self.limits.subscriptions_per_app_max;
        self.remember_watches(app_id, None, turn, |registration| {
            let known = &mut registration.subscriptions;
            known.retain(|(p, b)| (p, b) != (pool, block));
            if is_on {
                if known.len() >= max {
                    // Probably of removed blocks.
                    known.remove(0);
                }
                known.push((pool.clone(), block.clone()));
            }
        });
    }
}

impl<D: Driver> App<D> {
    /// Where an instance is.
    fn memberships(&self, instance: InstanceId) -> &[Membership<D>] {
        let mut instances = self.instances.iter();
        let found = instances.find(|known| known.id == instance);
        found.map_or(&[], |found| &found.memberships)
    }
}

/// Replaces triggers, for an instance that is in these pools. In an encrypted pool only its members
/// do that, with the roles that the old and the new trigger need; and what is only in encrypted
/// pools is remembered only there.
fn put_triggers<D: Driver>(
    registration: &mut Registration,
    memberships: &[Membership<D>],
    old: &[TriggerSpec],
    new: &[TriggerSpec],
) {
    let is_proved = |name: &PoolName| {
        let mut own = memberships.iter();
        own.any(|m| m.name == *name && m.grant.is_some())
    };
    let is_inside = !memberships.is_empty() && memberships.iter().all(|m| m.grant.is_some());
    remove_triggers(&mut registration.triggers, old);
    let outside = new
        .iter()
        .filter_map(|spec| outside(spec, is_inside, is_proved));
    registration.triggers.extend(outside);
    for (pool, known) in &mut registration.sealed {
        let mut own = memberships.iter();
        let Some(m) = own.find(|m| m.name == *pool && m.grant.is_some()) else {
            continue;
        };
        replace_sealed(known, pool, old, new, |spec| m.served_as(spec).is_some());
    }
}

/// Replaces an app's triggers in an encrypted pool, as far as a member `may` serve the old and the
/// new ones.
pub(super) fn replace_sealed<'a>(
    known: &mut Vec<TriggerSpec>,
    pool: &PoolName,
    old: impl IntoIterator<Item = &'a TriggerSpec>,
    new: &[TriggerSpec],
    may: impl Fn(&TriggerSpec) -> bool,
) {
    let old: BTreeSet<_> = old.into_iter().map(|spec| &spec.name).collect();
    known.retain(|spec| !old.contains(&spec.name) || !may(spec));
    let kept: BTreeSet<_> = known.iter().map(|spec| spec.name.clone()).collect();
    let new = new.iter().filter(|spec| spec.is_for(pool) && may(spec));
    known.extend(new.filter(|spec| !kept.contains(&spec.name)).cloned());
}

/// The part of a trigger that is not only in encrypted pools.
pub(super) fn outside(
    spec: &TriggerSpec,
    is_inside: bool,
    is_proved: impl Fn(&PoolName) -> bool,
) -> Option<TriggerSpec> {
    let Some(pools) = &spec.pools else {
        return (!is_inside).then(|| spec.clone());
    };
    let others: Vec<_> = pools
        .iter()
        .filter(|pool| !is_proved(pool))
        .cloned()
        .collect();
    (pools.is_empty() || !others.is_empty()).then(|| TriggerSpec {
        pools: Some(others),
        ..spec.clone()
    })
}
