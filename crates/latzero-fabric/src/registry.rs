//! Every app that was seen and every pool there is.
//!
//! The registry admits apps and remembers what each registered last, so that an app that comes back with its AppID
//! alone has its pools, triggers and watches again. It knows pools by handle only: what happens inside one is the
//! pool's, and the two are never held together. A pool's members are counted here before they join and after they
//! left, so that a pool is never forgotten while somebody is on the way into it.

use std::collections::{BTreeMap, BTreeSet};

use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_APP, SYSTEM_POOL};
use latzero_protocol::message::{EventSet, Handshake, Page, TriggerSpec};
use latzero_protocol::{AppId, Code, InstanceId, PoolName, Refusal};
use serde_json::{Value, json};

use crate::host::{Host, Transport};
use crate::limits::Limits;
use crate::pool::{MemberKey, Pool};
use crate::prng::Prng;
use crate::time::Time;

/// Bytes of a listing after which it goes on on the next page: far below what a frame may have.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// Instances of one app that a listing shows one by one.
const INSTANCES_SHOWN_MAX: usize = 100;

/// What an app asked for last, restored when it comes back.
#[derive(Debug, Clone, Default)]
struct Registration {
    pools: Vec<PoolName>,
    triggers: Vec<TriggerSpec>,
    watches: Vec<(PoolName, EventSet)>,
    meta: Option<Value>,
}

struct App<H: Host> {
    registration: Registration,
    instances: Vec<Instance<H>>,
    registered: Time,
    last_seen: Time,
}

/// One live connection of an app.
pub struct Instance<H: Host> {
    /// Its id.
    pub id: InstanceId,
    /// Its connection.
    pub peer: H::Peer,
    /// The pools it is in, with its place in each.
    pub memberships: Vec<Membership<H>>,
    exclusive: bool,
    since: Time,
}

/// An instance's place in one pool.
pub struct Membership<H: Host> {
    /// The pool's name.
    pub name: PoolName,
    /// The pool's number, which the ids of its calls begin with.
    pub number: u32,
    /// The pool's handle.
    pub pool: H::Pool,
    /// The place.
    pub member: MemberKey,
}

impl<H: Host> Clone for Membership<H> {
    fn clone(&self) -> Self {
        Membership {
            name: self.name.clone(),
            number: self.number,
            pool: self.pool.clone(),
            member: self.member,
        }
    }
}

/// A pool to be joined.
pub struct Entrance<H: Host> {
    /// Its name.
    pub name: PoolName,
    /// Its number.
    pub number: u32,
    /// Its handle.
    pub pool: H::Pool,
}

struct PoolEntry<H: Host> {
    number: u32,
    pool: H::Pool,
    members: usize,
    /// Blocks of memory in it; a pool with blocks stays.
    blocks: usize,
    /// Stays without members: made on purpose rather than by being named.
    kept: bool,
    owner: Option<AppId>,
    properties: Option<Value>,
    created: Time,
}

/// What a handshake was granted.
pub struct Admission<H: Host> {
    /// The new instance's id.
    pub instance: InstanceId,
    /// The pools to join.
    pub pools: Vec<Entrance<H>>,
    /// The triggers to serve.
    pub triggers: Vec<TriggerSpec>,
    /// The pools to watch.
    pub watches: Vec<(PoolName, EventSet)>,
    /// Whether what the app had was restored.
    pub rehydrated: bool,
    /// Instances that must go first.
    pub displaced: Vec<Instance<H>>,
}

/// What the registry knows of an app that a pool does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// Never seen.
    Unknown,
    /// Known, and in that pool when it lives, but no instance of it lives.
    Offline,
    /// Known, but not in that pool.
    Elsewhere,
}

/// Every app that was seen and every pool there is.
pub struct Registry<H: Host> {
    apps: BTreeMap<AppId, App<H>>,
    /// Apps without an instance, the longest gone first: who makes room for a new one.
    offline: BTreeSet<(Time, AppId)>,
    pools: BTreeMap<PoolName, PoolEntry<H>>,
    next_number: u32,
    instances: usize,
    limits: Limits,
    prng: Prng,
}

impl<H: Host> Registry<H> {
    /// A registry with the pools `default` and `system`. `seed` is all the randomness there is.
    #[must_use]
    pub fn new(now: Time, limits: Limits, seed: u64) -> Self {
        let mut registry = Registry {
            apps: BTreeMap::new(),
            offline: BTreeSet::new(),
            pools: BTreeMap::new(),
            next_number: 0,
            instances: 0,
            limits,
            prng: Prng::new(seed),
        };
        for name in [DEFAULT_POOL, SYSTEM_POOL] {
            let name = PoolName::new(name).expect("a built-in name is valid");
            registry.insert_pool(now, name, true);
        }
        registry
    }

    /// Admits an app's instance, or says why not.
    ///
    /// # Errors
    /// `forbidden`, `app_in_use`, `quota`, `too_large`: nothing changed then.
    pub fn admit(
        &mut self,
        now: Time,
        peer: &H::Peer,
        transport: Transport,
        handshake: &Handshake<'_>,
    ) -> Result<Admission<H>, Refusal> {
        let app_id = &handshake.app_id;
        if app_id.as_str() == SYSTEM_APP && transport != Transport::BuiltIn {
            return Err(Refusal::new(
                Code::Forbidden,
                format!("AppID '{SYSTEM_APP}' is the server's own; choose another"),
            ));
        }
        let known = self.apps.get(app_id);
        let remembered = known.map(|app| app.registration.clone());
        let rehydrated =
            handshake.pools.is_none() && handshake.triggers.is_none() && remembered.is_some();
        let mut registration = match remembered {
            Some(remembered) if rehydrated => remembered,
            _ => Registration {
                pools: handshake.pools.clone().unwrap_or_default(),
                triggers: handshake.triggers.clone().unwrap_or_default(),
                watches: Vec::new(),
                meta: None,
            },
        };
        if registration.pools.is_empty() {
            registration
                .pools
                .push(PoolName::new(DEFAULT_POOL).expect("a built-in name is valid"));
        }
        dedup_pools(&mut registration.pools);
        dedup_triggers(&mut registration.triggers);
        self.check_quota(&registration.pools, &registration.triggers)?;
        if transport != Transport::BuiltIn {
            check_reserved(&registration.triggers)?;
        }
        if let Some(meta) = handshake.meta {
            registration.meta = Some(self.free_json("meta", meta.text())?);
        }
        if let Some(app) = known {
            let alone = handshake.exclusive || app.instances.iter().any(|i| i.exclusive);
            if alone && !app.instances.is_empty() && !handshake.takeover {
                let message = format!(
                    "app '{app_id}' already has a live instance and one of the two wants to be alone; \
                     stop it, or send \"takeover\":true"
                );
                return Err(Refusal::new(Code::AppInUse, message));
            }
            if app.instances.len() >= self.limits.instances_per_app_max && !handshake.takeover {
                let max = self.limits.instances_per_app_max;
                let message =
                    format!("app '{app_id}' has {max} instances (limits.instances_per_app_max)");
                return Err(Refusal::new(Code::Quota, message));
            }
        }
        let is_known = known.is_some();
        let new_pools = registration
            .pools
            .iter()
            .filter(|name| !self.pools.contains_key(*name))
            .count();
        if self.pools.len() + new_pools > self.limits.pools_max {
            return Err(Refusal::new(
                Code::Quota,
                format!("there are {} pools (limits.pools_max)", self.pools.len()),
            ));
        }
        // The last that can fail: from here on things change.
        if !is_known {
            self.make_room()?;
        }

        let instance = InstanceId(self.prng.next_u64());
        let pools = registration
            .pools
            .clone()
            .into_iter()
            .map(|name| self.enter(now, name))
            .collect();
        let triggers = registration.triggers.clone();
        // Another instance may watch a pool that is not among those that are restored.
        let watches = registration
            .watches
            .iter()
            .filter(|(pool, _)| registration.pools.contains(pool))
            .cloned()
            .collect();
        let app = self.apps.entry(app_id.clone()).or_insert_with(|| App {
            registration: Registration::default(),
            instances: Vec::new(),
            registered: now,
            last_seen: now,
        });
        self.offline.remove(&(app.last_seen, app_id.clone()));
        app.registration = registration;
        app.last_seen = now;
        let displaced = if handshake.takeover {
            std::mem::take(&mut app.instances)
        } else {
            Vec::new()
        };
        app.instances.push(Instance {
            id: instance,
            peer: peer.clone(),
            memberships: Vec::new(),
            exclusive: handshake.exclusive,
            since: now,
        });
        self.instances = self.instances + 1 - displaced.len();
        Ok(Admission {
            instance,
            pools,
            triggers,
            watches,
            rehydrated,
            displaced,
        })
    }

    /// Notes the pools that an instance has joined; false where it was displaced meanwhile.
    pub fn settle(
        &mut self,
        app: &AppId,
        instance: InstanceId,
        memberships: &[Membership<H>],
    ) -> bool {
        let Some(instance) = self.instance_mut(app, instance) else {
            return false;
        };
        instance.memberships = memberships.to_vec();
        true
    }

    /// Forgets an instance, but not what its app registered; returns the pools that it is still in.
    pub fn depart(
        &mut self,
        now: Time,
        app_id: &AppId,
        instance: InstanceId,
    ) -> Vec<Membership<H>> {
        let Some(app) = self.apps.get_mut(app_id) else {
            return Vec::new();
        };
        let Some(at) = app.instances.iter().position(|i| i.id == instance) else {
            return Vec::new();
        };
        let gone = app.instances.swap_remove(at);
        app.last_seen = now;
        if app.instances.is_empty() {
            self.offline.insert((now, app_id.clone()));
        }
        self.instances -= 1;
        gone.memberships
    }

    /// Takes instances of an app away from it, as `kick` asks; they are to be told, and to leave their pools.
    pub fn evict(
        &mut self,
        now: Time,
        app_id: &AppId,
        instance: Option<InstanceId>,
    ) -> Vec<Instance<H>> {
        let Some(app) = self.apps.get_mut(app_id) else {
            return Vec::new();
        };
        let (gone, stay) = std::mem::take(&mut app.instances)
            .into_iter()
            .partition(|i| instance.is_none_or(|id| id == i.id));
        let gone: Vec<Instance<H>> = gone;
        app.instances = stay;
        if gone.is_empty() {
            return gone;
        }
        app.last_seen = now;
        if app.instances.is_empty() {
            self.offline.insert((now, app_id.clone()));
        }
        self.instances -= gone.len();
        gone
    }

    /// Opens a pool for an instance that wants to join it, and remembers that its app is in it.
    ///
    /// # Errors
    /// `quota`.
    pub fn open(
        &mut self,
        now: Time,
        app_id: &AppId,
        name: &PoolName,
    ) -> Result<Entrance<H>, Refusal> {
        let pools = self
            .apps
            .get(app_id)
            .map_or(&[][..], |app| &app.registration.pools);
        if !pools.contains(name) && pools.len() >= self.limits.pools_per_app_max {
            return Err(too_many(
                "pools",
                self.limits.pools_per_app_max,
                "limits.pools_per_app_max",
            ));
        }
        if !self.pools.contains_key(name) && self.pools.len() >= self.limits.pools_max {
            return Err(Refusal::new(
                Code::Quota,
                format!("there are {} pools (limits.pools_max)", self.pools.len()),
            ));
        }
        let entrance = self.enter(now, name.clone());
        if let Some(app) = self.apps.get_mut(app_id)
            && !app.registration.pools.contains(name)
        {
            app.registration.pools.push(name.clone());
        }
        Ok(entrance)
    }

    /// Notes that a member has left a pool (or could not join it after all). A pool that nobody asked to keep goes with
    /// its last member.
    pub fn left(&mut self, name: &PoolName, number: u32) {
        let Some(entry) = self.pools.get_mut(name) else {
            return;
        };
        if entry.number != number {
            return;
        }
        entry.members -= 1;
        self.drop_if_unused(name);
    }

    /// The number of blocks in a pool changed. A pool that nobody made on purpose goes with its last member and block.
    /// False where the pool is there no longer.
    pub fn count_blocks(&mut self, name: &PoolName, number: u32, change: i32) -> bool {
        let Some(entry) = self.pools.get_mut(name).filter(|e| e.number == number) else {
            return false;
        };
        entry.blocks = entry
            .blocks
            .checked_add_signed(change as isize)
            .expect("a block ends once, after it began");
        self.drop_if_unused(name);
        true
    }

    fn drop_if_unused(&mut self, name: &PoolName) {
        let is_unused = |e: &PoolEntry<H>| e.members == 0 && e.blocks == 0 && !e.kept;
        if self.pools.get(name).is_some_and(is_unused) {
            self.pools.remove(name);
        }
    }

    /// The pool that a block of an earlier run belongs to; made where there is none. Where no block comes into it, it
    /// is to be counted out again with [`Registry::count_blocks`].
    ///
    /// # Errors
    /// `quota`.
    pub fn pool_for_blocks(
        &mut self,
        now: Time,
        name: &PoolName,
    ) -> Result<(u32, H::Pool), Refusal> {
        if !self.pools.contains_key(name) {
            if self.pools.len() >= self.limits.pools_max {
                let message = format!(
                    "there are {} pools (limits.pools_max)",
                    self.limits.pools_max
                );
                return Err(Refusal::new(Code::Quota, message));
            }
            self.insert_pool(now, name.clone(), false);
        }
        let entry = &self.pools[name];
        Ok((entry.number, entry.pool.clone()))
    }

    /// Forgets that an app is in a pool: it left on purpose.
    pub fn forget_pool(&mut self, app_id: &AppId, instance: InstanceId, name: &PoolName) {
        let Some(app) = self.apps.get_mut(app_id) else {
            return;
        };
        if let Some(instance) = app.instances.iter_mut().find(|i| i.id == instance) {
            instance.memberships.retain(|m| m.name != *name);
        }
        // Another instance may still be there; what comes back is what the app as a whole had.
        if !app
            .instances
            .iter()
            .any(|i| i.memberships.iter().any(|m| m.name == *name))
        {
            app.registration.pools.retain(|pool| pool != name);
            app.registration.watches.retain(|(pool, _)| pool != name);
        }
    }

    /// Remembers the triggers that an app serves now.
    ///
    /// # Errors
    /// `quota`, `forbidden`: nothing changed then.
    pub fn remember_triggers(
        &mut self,
        app_id: &AppId,
        add: &[TriggerSpec],
        transport: Transport,
    ) -> Result<(), Refusal> {
        if transport != Transport::BuiltIn {
            check_reserved(add)?;
        }
        let Some(app) = self.apps.get(app_id) else {
            return Ok(());
        };
        let mut triggers = app.registration.triggers.clone();
        for spec in add {
            triggers.retain(|known| known.name != spec.name);
            triggers.push(spec.clone());
        }
        self.check_quota(&[], &triggers)?;
        self.apps
            .get_mut(app_id)
            .expect("found above")
            .registration
            .triggers = triggers;
        Ok(())
    }

    /// Forgets triggers that an app serves no longer.
    pub fn forget_triggers(&mut self, app_id: &AppId, gone: &[TriggerSpec]) {
        if let Some(app) = self.apps.get_mut(app_id) {
            app.registration
                .triggers
                .retain(|known| !gone.iter().any(|spec| spec.name == known.name));
        }
    }

    /// Remembers what an app watches in a pool; `None` forgets it.
    pub fn remember_watch(&mut self, app_id: &AppId, pool: &PoolName, events: Option<EventSet>) {
        let Some(app) = self.apps.get_mut(app_id) else {
            return;
        };
        app.registration.watches.retain(|(name, _)| name != pool);
        if let Some(events) = events {
            app.registration.watches.push((pool.clone(), events));
        }
    }

    /// Makes a pool that stays until it is removed.
    ///
    /// # Errors
    /// `pool_exists`, `quota`, `too_large`.
    pub fn create_pool(
        &mut self,
        now: Time,
        owner: &AppId,
        name: PoolName,
        properties: Option<&str>,
    ) -> Result<(), Refusal> {
        if self.pools.contains_key(&name) {
            return Err(Refusal::new(
                Code::PoolExists,
                format!("pool '{name}' exists; join it, or choose another name"),
            ));
        }
        if self.pools.len() >= self.limits.pools_max {
            return Err(Refusal::new(
                Code::Quota,
                format!("there are {} pools (limits.pools_max)", self.pools.len()),
            ));
        }
        let properties = properties
            .map(|text| self.free_json("properties", text))
            .transpose()?;
        let entry = self.insert_pool(now, name, true);
        entry.owner = Some(owner.clone());
        entry.properties = properties;
        Ok(())
    }

    /// Takes a pool out of the registry; its handle is to be closed.
    ///
    /// # Errors
    /// `no_pool`, `forbidden`.
    pub fn remove_pool(
        &mut self,
        who: &AppId,
        is_admin: bool,
        name: &PoolName,
        force: bool,
    ) -> Result<H::Pool, Refusal> {
        let Some(entry) = self.pools.get(name) else {
            return Err(no_pool(name));
        };
        if matches!(name.as_str(), DEFAULT_POOL | SYSTEM_POOL) {
            return Err(Refusal::new(
                Code::Forbidden,
                format!("pool '{name}' is built in and stays"),
            ));
        }
        if entry.owner.as_ref() != Some(who) && !is_admin {
            let owner = entry
                .owner
                .as_ref()
                .map_or("nobody (it goes with its last member)", AppId::as_str);
            return Err(Refusal::new(
                Code::Forbidden,
                format!("pool '{name}' is owned by {owner}, who alone may remove it"),
            ));
        }
        if entry.members > 0 && !force {
            let message = format!(
                "pool '{name}' has {} members; add \"force\":true to remove it under them",
                entry.members
            );
            return Err(Refusal::new(Code::Forbidden, message));
        }
        let entry = self.pools.remove(name).expect("found above");
        for app in self.apps.values_mut() {
            app.registration.pools.retain(|pool| pool != name);
            app.registration.watches.retain(|(pool, _)| pool != name);
            for instance in &mut app.instances {
                instance.memberships.retain(|m| m.number != entry.number);
            }
        }
        Ok(entry.pool)
    }

    /// Where an app is that a pool does not know.
    #[must_use]
    pub fn whereabouts(&self, app_id: &str, pool: &PoolName) -> Whereabouts {
        match self.apps.get(app_id) {
            None => Whereabouts::Unknown,
            Some(app) if app.instances.is_empty() && app.registration.pools.contains(pool) => {
                Whereabouts::Offline
            }
            Some(_) => Whereabouts::Elsewhere,
        }
    }

    /// A pool's handle and what the registry knows of it.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn describe_pool(
        &self,
        name: &PoolName,
        unix_ms: impl Fn(Time) -> u64,
    ) -> Result<(H::Pool, Value), Refusal> {
        let entry = self.pools.get(name).ok_or_else(|| no_pool(name))?;
        Ok((entry.pool.clone(), pool_json(name, entry, unix_ms)))
    }

    /// The pools, a page of them.
    #[must_use]
    pub fn list_pools(&self, page: &Page<'_>, unix_ms: impl Fn(Time) -> u64) -> Value {
        let rest = self
            .pools
            .iter()
            .filter(|(name, _)| is_after(name.as_str(), page))
            .map(|(name, entry)| pool_json(name, entry, &unix_ms));
        let (pools, more) = fill_page(rest, page.limit);
        json!({"pools": pools, "more": more})
    }

    /// The apps, a page of them: of one pool, or all.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn list_apps(
        &self,
        pool: Option<&PoolName>,
        page: &Page<'_>,
        unix_ms: impl Fn(Time) -> u64,
    ) -> Result<Value, Refusal> {
        if let Some(name) = pool.filter(|name| !self.pools.contains_key(*name)) {
            return Err(no_pool(name));
        }
        let is_in = |app: &App<H>| {
            pool.is_none_or(|pool| {
                app.registration.pools.contains(pool)
                    || app
                        .instances
                        .iter()
                        .any(|i| i.memberships.iter().any(|m| m.name == *pool))
            })
        };
        let rest = self
            .apps
            .iter()
            .filter(|(id, app)| is_after(id.as_str(), page) && is_in(app))
            .map(|(id, app)| app_json(id, app, &unix_ms));
        let (apps, more) = fill_page(rest, page.limit);
        Ok(json!({"apps": apps, "more": more}))
    }

    /// How many apps are known, how many of them live, and how many instances and pools there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            apps_known: self.apps.len(),
            apps_live: self.apps.len() - self.offline.len(),
            instances: self.instances,
            pools: self.pools.len(),
        }
    }

    /// The handles of all pools.
    pub fn pools(&self) -> impl Iterator<Item = (&PoolName, &H::Pool)> {
        self.pools.iter().map(|(name, entry)| (name, &entry.pool))
    }

    /// Checks what must hold between any two inputs; for the simulator and tests.
    ///
    /// # Panics
    /// Where an invariant is broken.
    pub fn check(&self) {
        let live: usize = self.apps.values().map(|app| app.instances.len()).sum();
        assert_eq!(live, self.instances);
        let offline: BTreeSet<_> = self
            .apps
            .iter()
            .filter(|(_, app)| app.instances.is_empty())
            .map(|(id, app)| (app.last_seen, id.clone()))
            .collect();
        assert_eq!(offline, self.offline);
        assert!(
            self.apps.len() <= self.limits.apps_max && self.pools.len() <= self.limits.pools_max
        );
        for (name, entry) in &self.pools {
            let members = self
                .apps
                .values()
                .flat_map(|app| &app.instances)
                .flat_map(|i| &i.memberships);
            let members = members.filter(|m| m.number == entry.number).count();
            assert_eq!(members, entry.members, "members of pool '{name}'");
            assert!(
                entry.kept || entry.members > 0 || entry.blocks > 0,
                "pool '{name}' should have gone"
            );
        }
    }

    fn instance_mut(&mut self, app: &AppId, instance: InstanceId) -> Option<&mut Instance<H>> {
        self.apps
            .get_mut(app)?
            .instances
            .iter_mut()
            .find(|i| i.id == instance)
    }

    fn enter(&mut self, now: Time, name: PoolName) -> Entrance<H> {
        if !self.pools.contains_key(&name) {
            self.insert_pool(now, name.clone(), false);
        }
        let entry = self
            .pools
            .get_mut(&name)
            .expect("made above where it was missing");
        entry.members += 1;
        Entrance {
            number: entry.number,
            pool: entry.pool.clone(),
            name,
        }
    }

    fn insert_pool(&mut self, now: Time, name: PoolName, kept: bool) -> &mut PoolEntry<H> {
        let number = self.next_number;
        self.next_number += 1;
        let pool = Pool::new(
            number,
            name.clone(),
            self.limits.clone(),
            Prng::new(self.prng.next_u64()),
        );
        let entry = PoolEntry {
            number,
            pool: H::new_pool(pool),
            members: 0,
            blocks: 0,
            kept,
            owner: None,
            properties: None,
            created: now,
        };
        self.pools.entry(name).or_insert(entry)
    }

    /// Forgets the app that was offline longest where there is no room for another.
    fn make_room(&mut self) -> Result<(), Refusal> {
        if self.apps.len() < self.limits.apps_max {
            return Ok(());
        }
        let Some((_, longest_gone)) = self.offline.pop_first() else {
            let message = format!("{} apps live (limits.apps_max)", self.apps.len());
            return Err(Refusal::new(Code::Quota, message));
        };
        self.apps.remove(&longest_gone);
        Ok(())
    }

    fn check_quota(&self, pools: &[PoolName], triggers: &[TriggerSpec]) -> Result<(), Refusal> {
        check_pools(pools.len(), &self.limits)?;
        check_triggers(triggers, &self.limits)?;
        let pool_bytes =
            |pools: &[PoolName]| pools.iter().map(|name| name.as_str().len()).sum::<usize>();
        let trigger_bytes = |spec: &TriggerSpec| {
            spec.name.as_str().len()
                + spec.doc.as_ref().map_or(0, String::len)
                + spec.pools.as_deref().map_or(0, pool_bytes)
        };
        let bytes = pool_bytes(pools) + triggers.iter().map(trigger_bytes).sum::<usize>();
        if bytes > self.limits.registration_bytes_max {
            let max = self.limits.registration_bytes_max;
            let message = format!(
                "an app may register {max} bytes of names, pools and docs (limits.registration_bytes_max)"
            );
            return Err(Refusal::new(Code::Quota, message));
        }
        Ok(())
    }

    /// JSON that an app may say freely, within its size.
    fn free_json(&self, field: &str, text: &str) -> Result<Value, Refusal> {
        if text.len() > self.limits.meta_bytes_max {
            let message = format!(
                "field '{field}' has {} bytes, at most {} are kept (limits.meta_bytes_max)",
                text.len(),
                self.limits.meta_bytes_max
            );
            return Err(Refusal::new(Code::TooLarge, message));
        }
        serde_json::from_str(text).map_err(|error| {
            Refusal::new(
                Code::BadMessage,
                format!("field '{field}' can't be kept: {error}"),
            )
        })
    }
}

/// What the registry holds, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Apps that are remembered.
    pub apps_known: usize,
    /// Apps with a live instance.
    pub apps_live: usize,
    /// Live instances.
    pub instances: usize,
    /// Pools.
    pub pools: usize,
}

/// Takes entries until there are `limit` of them or they fill a reply; says whether there are more.
fn fill_page(mut rest: impl Iterator<Item = Value>, limit: usize) -> (Vec<Value>, bool) {
    let mut page = Vec::new();
    let mut bytes = 0;
    for entry in rest.by_ref() {
        bytes += entry.to_string().len();
        page.push(entry);
        if page.len() == limit || bytes >= PAGE_BYTES_MAX {
            break;
        }
    }
    (page, rest.next().is_some())
}

fn is_after(name: &str, page: &Page<'_>) -> bool {
    page.after.as_deref().is_none_or(|after| name > after)
}

fn dedup_pools(pools: &mut Vec<PoolName>) {
    let mut seen = BTreeSet::new();
    pools.retain(|name| seen.insert(name.clone()));
}

/// Of triggers named twice the last counts.
fn dedup_triggers(triggers: &mut Vec<TriggerSpec>) {
    let mut seen = BTreeSet::new();
    triggers.reverse();
    triggers.retain(|spec| seen.insert(spec.name.clone()));
    triggers.reverse();
}

fn check_reserved(triggers: &[TriggerSpec]) -> Result<(), Refusal> {
    let names_system = |spec: &&TriggerSpec| {
        spec.pools
            .as_ref()
            .is_some_and(|pools| pools.iter().any(|p| p.as_str() == SYSTEM_POOL))
    };
    match triggers.iter().find(names_system) {
        Some(spec) => {
            let message = format!(
                "trigger '{}' can't be served in pool '{SYSTEM_POOL}', which is the server's own",
                spec.name
            );
            Err(Refusal::new(Code::Forbidden, message))
        }
        None => Ok(()),
    }
}

/// Whether an app, or one instance of it, may be in that many pools.
pub(crate) fn check_pools(pools: usize, limits: &Limits) -> Result<(), Refusal> {
    if pools > limits.pools_per_app_max {
        return Err(too_many(
            "pools",
            limits.pools_per_app_max,
            "limits.pools_per_app_max",
        ));
    }
    Ok(())
}

/// Whether an app, or one instance of it, may serve these triggers.
pub(crate) fn check_triggers(triggers: &[TriggerSpec], limits: &Limits) -> Result<(), Refusal> {
    if triggers.len() > limits.triggers_per_app_max {
        return Err(too_many(
            "triggers",
            limits.triggers_per_app_max,
            "limits.triggers_per_app_max",
        ));
    }
    Ok(())
}

fn too_many(what: &str, max: usize, limit: &str) -> Refusal {
    Refusal::new(
        Code::Quota,
        format!("an app may have {max} {what} ({limit})"),
    )
}

fn no_pool(name: &PoolName) -> Refusal {
    Refusal::new(Code::NoPool, format!("there is no pool '{name}'"))
}

fn pool_json<H: Host>(
    name: &PoolName,
    entry: &PoolEntry<H>,
    unix_ms: impl Fn(Time) -> u64,
) -> Value {
    json!({
        "pool": name, "kind": "local", "durable": false, "encrypted": false, "owner": entry.owner,
        "properties": entry.properties, "members": entry.members, "created": unix_ms(entry.created),
    })
}

fn app_json<H: Host>(id: &AppId, app: &App<H>, unix_ms: impl Fn(Time) -> u64) -> Value {
    let instance = |i: &Instance<H>| {
        let pools: Vec<_> = i.memberships.iter().map(|m| &m.name).collect();
        json!({"instance": i.id, "pools": pools, "since": unix_ms(i.since)})
    };
    let trigger = |spec: &TriggerSpec| {
        json!({
            "name": spec.name, "pools": spec.pools, "strategy": spec.strategy.as_str(),
            "concurrency": spec.concurrency, "doc": spec.doc,
        })
    };
    json!({
        "app_id": id,
        "live": !app.instances.is_empty(),
        "instances": app.instances.iter().take(INSTANCES_SHOWN_MAX).map(instance).collect::<Vec<_>>(),
        "instances_total": app.instances.len(),
        "pools": app.registration.pools,
        "triggers": app.registration.triggers.iter().map(trigger).collect::<Vec<_>>(),
        "meta": app.registration.meta,
        "registered": unix_ms(app.registered),
        "last_seen": unix_ms(app.last_seen),
    })
}
