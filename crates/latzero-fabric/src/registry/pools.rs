//! The pools: created explicitly or by use, and kept while anything needs them.

use std::sync::Arc;

use latzero_crypto::descriptor::Descriptor;
use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_POOL};
use latzero_protocol::message::PoolCreate;
use latzero_protocol::policy::{Actor, Policy};
use latzero_protocol::{AppId, PoolName, Raw, Refusal};
use serde_json::Value;

use super::{Entrance, PoolEntry, Registry, Sealed, View, Who, sealed};
use crate::driver::{Driver, Peer};
use crate::ledger::{Reservation, Resource};
use crate::now::Time;
use crate::pool::Pool;
use crate::prng::Prng;
use crate::refusals;
use crate::registration::{Registration, Remembered, json_bytes};
use crate::rows::{PoolRow, StoreChange};
use crate::turn::Turn;

/// How long the name of a non-durable pool with a policy is reserved for its owner after a restart.
const GRACE_MS: u64 = 30_000;

/// A pool to create, read from its message.
#[derive(Debug)]
pub struct NewPool {
    /// Its name.
    pub name: PoolName,
    properties: Option<Value>,
    durable: bool,
    policy: Policy,
    /// The descriptor of an encrypted pool, whose signature is not checked.
    pub descriptor: Option<Arc<Descriptor>>,
}

impl NewPool {
    /// About how many bytes of memory it takes. A value takes some times the bytes of its text.
    pub fn bytes(&self) -> usize {
        let properties = self.properties.as_ref().map_or(0, |p| p.to_string().len());
        1024 + 4 * (properties + self.policy.to_json().to_string().len())
    }
}

impl<D: Driver> Registry<D> {
    /// Whether a name is reserved for another app: the owner of a pool with a policy from before
    /// the server's start.
    pub(super) fn is_reserved(&self, app_id: &AppId, name: &PoolName, now: Time) -> bool {
        let kept = self.reserved.get(name);
        kept.is_some_and(|(owner, until)| owner != app_id && *until > now)
    }

    /// Restores a pool of an earlier run, even beyond the limit on pools.
    ///
    /// # Errors
    /// `storage` if its policy is invalid. The pool then exists, but only for its owner, because a
    /// pool without its policy would be open to everybody.
    pub fn restore_pool(&mut self, row: PoolRow, now: Time) -> Result<(), Refusal> {
        if !row.is_durable {
            if let Some(owner) = row.owner {
                let until = now.after_ms(GRACE_MS);
                self.reserved.insert(row.name, (owner, until));
            }
            return Ok(());
        }
        let policy = Raw::new(&row.policy).ok();
        let policy = policy.and_then(|policy| Policy::parse(policy).ok());
        let closed = policy
            .is_none()
            .then(|| refusals::policy_is_invalid(&row.name));
        let sealed = row.descriptor.as_deref().map(Sealed::restore);
        let is_damaged = matches!(sealed, Some(None));
        let closed =
            closed.or_else(|| is_damaged.then(|| refusals::descriptor_is_damaged(&row.name)));
        let policy = policy
            .filter(|_| !is_damaged)
            .unwrap_or_else(Policy::closed);
        let entry = self.insert_pool(row.created, row.name, (true, true), None);
        entry.durable = true;
        // A pool that was encrypted never opens as a plain one.
        entry.owner = row.owner.filter(|_| !is_damaged);
        entry.sealed = sealed.flatten();
        entry.policy = policy;
        entry.properties = row
            .properties
            .and_then(|properties| serde_json::from_str(&properties).ok());
        closed.map_or(Ok(()), Err)
    }

    /// Notes that a member has left a pool, or could not join it. A pool that was not created
    /// explicitly is removed with its last member.
    pub fn member_left(&mut self, name: &PoolName, number: u32) {
        let Some(entry) = self.pools.get_mut(name) else {
            return;
        };
        if entry.number != number {
            return;
        }
        entry.members -= 1;
        self.drop_if_unused(name);
    }

    /// The number of blocks, parked calls and answers in a pool changed. A pool that was not
    /// created explicitly is removed when it has neither them nor members. False if the pool no
    /// longer exists.
    pub fn count_held(&mut self, name: &PoolName, number: u32, change: i32) -> bool {
        let Some(entry) = self.pools.get_mut(name).filter(|e| e.number == number) else {
            return false;
        };
        entry.held = entry
            .held
            .checked_add_signed(change as isize)
            .expect("a call ends exactly once");
        self.drop_if_unused(name);
        true
    }

    pub(super) fn drop_if_unused(&mut self, name: &PoolName) {
        let is_unused = |e: &PoolEntry<D>| e.members == 0 && e.held == 0 && !e.kept;
        if self.pools.get(name).is_some_and(is_unused) {
            self.pools.remove(name);
        }
    }

    /// The pool that a block or a call of an earlier run belongs to; created if there is none. If
    /// nothing is added to it, count zero with [`Registry::count_held`].
    ///
    /// # Errors
    /// `quota`.
    pub fn pool_for_kept(
        &mut self,
        unix_ms: u64,
        name: &PoolName,
    ) -> Result<(u32, D::Pool), Refusal> {
        if !self.pools.contains_key(name) {
            self.check_room_for_pools(1)?;
            self.insert_pool(unix_ms, name.clone(), (false, true), None);
        }
        let entry = &self.pools[name];
        Ok((entry.number, entry.pool.clone()))
    }

    /// Creates a pool that stays until it is removed; returns whether the reply waits for the disk.
    ///
    /// # Errors
    /// `pool_exists`, `quota`, `too_large`.
    pub fn create_pool(
        &mut self,
        (owner, who): (&AppId, &Who),
        pool: NewPool,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<bool, Refusal> {
        let unix_ms = turn.unix_ms();
        let NewPool {
            name,
            properties,
            durable,
            policy,
            descriptor,
        } = pool;
        if let Some(entry) = self.pools.get(&name) {
            if entry.sealed.is_some() {
                return Err(Refusal::unproved());
            }
            if !entry.admits(&who.actor(owner)) {
                return Err(refusals::pool_not_open(owner, &name));
            }
            return Err(refusals::pool_exists(&name));
        }
        // Its owner is about to reconnect and must be able to join it.
        let awaited = turn.driver.awaited_owner(&name, None);
        if awaited.is_some_and(|of| of != *owner) || self.is_reserved(owner, &name, turn.time()) {
            return Err(refusals::pool_not_open(owner, &name));
        }
        if descriptor
            .as_ref()
            .is_some_and(|d| self.has_pool_id(d.pool_id()))
        {
            return Err(refusals::pool_id_in_use());
        }
        self.check_room_for_pools(1)?;
        let place = promise.link().account().reserve(Resource::Pools, 1);
        let place = place.map_err(Refusal::from)?;
        let bytes = policy.bytes()
            + properties.as_ref().map_or(0, json_bytes)
            + descriptor.as_ref().map_or(0, |d| d.as_bytes().len());
        let account = Arc::clone(promise.link().account());
        let held = account.reserve(Resource::Registrations, bytes as u64);
        let held = held.map_err(Refusal::from)?;
        let has_rules = policy != Policy::default();
        if durable || has_rules {
            let row = PoolRow {
                name: name.clone(),
                owner: Some(owner.clone()),
                policy: policy.to_json().to_string(),
                properties: properties.as_ref().map(Value::to_string),
                created: unix_ms,
                is_durable: durable,
                descriptor: descriptor.as_ref().map(|d| d.as_bytes().to_vec()),
            };
            turn.store(StoreChange::Pool(Box::new(row)), durable.then_some(promise));
        }
        self.reserved.remove(&name);
        let outlives = durable || !has_rules;
        let entry = self.insert_pool(unix_ms, name, (true, outlives), Some(place));
        entry.owner = Some(owner.clone());
        entry.durable = durable;
        entry.policy = policy;
        entry.properties = properties;
        entry.sealed = descriptor.map(Sealed::new);
        entry.memory = Some(held);
        Ok(durable)
    }

    /// Reads a pool to create. The signatures of its descriptor are not checked.
    ///
    /// # Errors
    /// `bad_message`, `too_large`.
    pub fn read_new_pool(&self, create: PoolCreate<'_>) -> Result<NewPool, Refusal> {
        let properties = create.properties;
        let descriptor = create
            .sealed
            .map(|asked| sealed::read(&asked, &create.pool));
        Ok(NewPool {
            name: create.pool,
            properties: properties
                .map(|raw| self.free_json("properties", raw.text()))
                .transpose()?,
            durable: create.durable,
            policy: create.policy,
            descriptor: descriptor.transpose()?,
        })
    }

    /// A durable pool could not be stored: it is removed with its last member. Its handle is
    /// returned if it has a policy, which its content must not outlive ([`Pool::set_outlives`]).
    pub fn release_pool(&mut self, name: &PoolName) -> Option<D::Pool> {
        let entry = self.pools.get_mut(name).filter(|entry| entry.durable)?;
        entry.durable = false;
        entry.kept = false;
        let has_rules = entry.policy != Policy::default();
        let pool = has_rules.then(|| entry.pool.clone());
        self.drop_if_unused(name);
        pool
    }

    /// Removes a pool from the registry and returns its handle, which the caller closes, and
    /// whether the reply waits for the disk.
    ///
    /// # Errors
    /// `no_pool`, `forbidden`.
    pub fn remove_pool(
        &mut self,
        view: &View<'_>,
        name: &PoolName,
        force: bool,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<(D::Pool, bool), Refusal> {
        let entry = self.shown_pool(name, view)?;
        if matches!(name.as_str(), DEFAULT_POOL | SYSTEM_POOL) {
            return Err(refusals::pool_is_built_in(name));
        }
        if entry.sealed.is_some() {
            // Only administrators and members see it, so the keys decide.
            if !view.is_admin && !self.may_write(entry, view) {
                return Err(refusals::removal_needs_write(name));
            }
        } else if entry.owner.as_ref() != Some(view.app) && !view.is_admin {
            let owner = entry
                .owner
                .as_ref()
                .map_or("nobody (it is removed with its last member)", AppId::as_str);
            return Err(refusals::pool_of_other(name, owner));
        }
        if entry.members > 0 && !force {
            return Err(refusals::pool_has_members(name, entry.members));
        }
        let entry = self.pools.remove(name).expect("found above");
        let has_row = entry.durable || entry.policy != Policy::default();
        let quoted = format!("\"{name}\"");
        for (app_id, app) in &mut self.apps {
            for instance in &mut app.instances {
                instance.memberships.retain(|m| m.number != entry.number);
            }
            // Most rows are still text, and need not be parsed for this.
            if let Remembered::Text(row) = &app.registration
                && !row.pools.contains(&quoted)
                && !row.watches.contains(&quoted)
            {
                continue;
            }
            if forget_pool(app.registration.get_mut(), name) {
                app.held.force(app.bytes());
                app.store(app_id, None, turn);
            }
        }
        if has_row {
            let promise = entry.durable.then_some(promise);
            turn.store(StoreChange::ForgetPool(name.clone()), promise);
        }
        Ok((entry.pool, entry.durable))
    }

    pub(super) fn enter(
        &mut self,
        unix_ms: u64,
        actor: &Actor<'_>,
        name: PoolName,
        places: &mut Vec<Reservation>,
    ) -> Entrance<D> {
        if !self.pools.contains_key(&name) {
            self.insert_pool(unix_ms, name.clone(), (false, true), places.pop());
        }
        let entry = self
            .pools
            .get_mut(&name)
            .expect("created above if it was missing");
        entry.members += 1;
        Entrance {
            number: entry.number,
            pool: entry.pool.clone(),
            rights: entry.rights(actor),
            grant: None,
            name,
        }
    }

    pub(super) fn insert_pool(
        &mut self,
        created: u64,
        name: PoolName,
        (kept, outlives): (bool, bool),
        place: Option<Reservation>,
    ) -> &mut PoolEntry<D> {
        let number = self.next_number;
        self.next_number += 1;
        let mut pool = Pool::new(
            number,
            name.clone(),
            self.limits.clone(),
            Prng::new(self.prng.next_u64()),
        );
        // Before anybody can use it.
        pool.set_outlives(outlives);
        let entry = PoolEntry {
            number,
            pool: D::new_pool(pool),
            members: 0,
            held: 0,
            kept,
            durable: false,
            owner: None,
            policy: Policy::default(),
            properties: None,
            created,
            place,
            memory: None,
            sealed: None,
        };
        self.pools.entry(name).or_insert(entry)
    }

    pub(super) fn check_room_for_pools(&self, more: usize) -> Result<(), Refusal> {
        if self.pools.len() + more > self.limits.pools_max {
            return Err(refusals::too_many_pools(self.pools.len()));
        }
        Ok(())
    }
}

/// Removes a pool from an app's registration; returns whether it was there. An instance of the app
/// may have watched it after another one registered without it.
pub(super) fn forget_pool(registration: &mut Registration, name: &PoolName) -> bool {
    let count =
        |r: &Registration| r.pools.len() + r.watches.len() + r.subscriptions.len() + r.sealed.len();
    let before = count(registration);
    registration.pools.retain(|pool| pool != name);
    registration.watches.retain(|(pool, _)| pool != name);
    registration.subscriptions.retain(|(pool, _)| pool != name);
    registration.sealed.retain(|(pool, _)| pool != name);
    count(registration) < before
}
