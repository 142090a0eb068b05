//! Every known app and every pool.
//!
//! The registry admits apps and remembers what each last registered, so that an app that reconnects
//! with only its AppID gets its pools, triggers and watches back. It knows pools only by handle,
//! and the registry and a pool are never locked together. A pool's members are counted here before
//! they join and after they have left, so that a pool is never forgotten while an app is joining
//! it.

mod admission;
mod identity;
mod listing;
mod offline;
mod pools;
mod registered;
mod sealed;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::{Arc, Weak};

use latzero_crypto::Suite;
use latzero_crypto::keys::Roles;
use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_POOL};
use latzero_protocol::message::{EventSet, Fields, Response, TriggerSpec, too_many};
use latzero_protocol::policy::{Actor, Policy, Right, Rights};
use latzero_protocol::proof::is_sealed;
use latzero_protocol::{AppId, BlockId, Body, InstanceId, PoolName, Refusal};
use serde_json::Value;

use crate::driver::{Driver, Peer, Transport};
use crate::ledger::{Account, Ledger, Reservation, Resource};
use crate::limits::Limits;
use crate::now::Time;
use crate::pool::MemberKey;
use crate::prng::Prng;
use crate::refusals;
use crate::registration::{Registration, Remembered};
use crate::rows::{AppRow, StoreChange};
use crate::turn::Turn;
pub(crate) use admission::{check_pools, check_triggers, dedup_triggers, remove_triggers};
use identity::Binding;
pub use identity::Who;
pub use listing::{Counts, View};
pub(crate) use listing::{PAGE_BYTES_MAX, PageText, append};
use offline::Offline;
pub use pools::NewPool;
use sealed::Sealed;
pub(crate) use sealed::rotated_event;
pub use sealed::{Proved, Rotated, Said, Successor};

struct App<D: Driver> {
    registration: Remembered,
    /// Its memory, with that of its instances.
    held: Reservation,
    /// The user that it belongs to.
    user: u64,
    instances: Vec<Instance<D>>,
    /// When it was first and last seen, in milliseconds since the Unix epoch.
    registered: u64,
    last_seen: u64,
    /// Whether it outlives its last instance, and the server: the built-in app and transient tools
    /// do not.
    is_persistent: bool,
}

impl<D: Driver> App<D> {
    /// Its memory: what it registered, and what its live instances use in the pools.
    fn bytes(&self) -> u64 {
        let live = match &self.registration {
            Remembered::Read(registration) if !self.instances.is_empty() => registration.live(),
            _ => 0,
        };
        self.registration.bytes() + live * self.instances.len() as u64
    }

    /// Emits the row to store; false if nothing of the app is stored.
    fn store(&self, app_id: &AppId, promise: Option<&D::Peer>, turn: &mut Turn<'_, D>) -> bool {
        if self.is_persistent {
            let last_seen = if self.instances.is_empty() {
                self.last_seen
            } else {
                0
            };
            let registration = self.registration.get();
            let row = registration.row(app_id, self.registered, last_seen);
            turn.store(StoreChange::App(Box::new(row)), promise);
        }
        self.is_persistent
    }
}

/// One live connection of an app.
pub struct Instance<D: Driver> {
    /// Its id.
    pub id: InstanceId,
    /// Its connection.
    pub peer: D::Peer,
    /// The pools that it is in, with its membership in each.
    pub memberships: Vec<Membership<D>>,
    exclusive: bool,
    since: Time,
    /// Its user, if the kernel reports it.
    uid: Option<u32>,
    /// Whether it is authenticated: as a user of this machine, or with the app's key.
    is_known: bool,
}

/// An instance's membership in one pool. It has the fields of its [`Entrance`].
pub struct Membership<D: Driver> {
    /// The pool, and what the app may do there.
    pub entrance: Entrance<D>,
    /// The place.
    pub member: MemberKey,
}

/// What a member of an encrypted pool proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The roles.
    pub roles: Roles,
    /// How the pool protects blocks.
    pub suite: Suite,
}

impl<D: Driver> Entrance<D> {
    /// How a trigger is served here, if at all. In an encrypted pool readers may listen, but not
    /// keep other readers from sending; elsewhere nothing can be privileged.
    pub(crate) fn served_as<'a>(&self, spec: &'a TriggerSpec) -> Option<Cow<'a, TriggerSpec>> {
        served_as(spec, self.rights, self.grant.map(|grant| grant.roles))
    }

    /// Whether answers to parked calls are delivered here: in an encrypted pool to readers.
    pub(crate) fn takes_answers(&self) -> bool {
        self.grant.is_none_or(|grant| grant.roles != Roles::Join)
    }
}

/// How a trigger is served in a pool, plain or with these roles proved, if at all.
fn served_as(
    spec: &TriggerSpec,
    rights: Rights,
    proved: Option<Roles>,
) -> Option<Cow<'_, TriggerSpec>> {
    if !rights.have(Right::Serve) {
        return None;
    }
    match proved {
        None => (!spec.privileged).then_some(Cow::Borrowed(spec)),
        Some(Roles::Write) => Some(Cow::Borrowed(spec)),
        Some(Roles::Read) if spec.concurrency == Some(0) => Some(Cow::Owned(TriggerSpec {
            privileged: false,
            ..spec.clone()
        })),
        Some(Roles::Read | Roles::Join) => None,
    }
}

impl<D: Driver> Membership<D> {
    /// Checks a trigger that names this pool, if it is encrypted; the registry checks the others.
    ///
    /// # Errors
    /// `forbidden` if it would not be served.
    pub(crate) fn check_named(&self, spec: &TriggerSpec) -> Result<(), Refusal> {
        let names_it = || spec.pools.is_some() && spec.is_for(&self.name);
        match self.grant.is_some() && names_it() {
            true => self.check_served(spec),
            false => Ok(()),
        }
    }

    /// Checks that a trigger would be served here.
    ///
    /// # Errors
    /// `forbidden` if not.
    pub(crate) fn check_served(&self, spec: &TriggerSpec) -> Result<(), Refusal> {
        if self.served_as(spec).is_some() {
            return Ok(());
        }
        self.check_right(Right::Serve)?;
        if self.grant.is_none() {
            return Err(refusals::privileged_in_plain_pool(&spec.name, &self.name));
        }
        self.check_roles(match spec.concurrency {
            Some(0) => Roles::Read,
            _ => Roles::Write,
        })
    }

    /// Checks a call or an emit of a member to a trigger that may be privileged.
    ///
    /// # Errors
    /// `forbidden` if it is, and the member did not prove that it may write.
    pub(crate) fn check_privilege(&self, pool: &crate::Pool<D>, name: &str) -> Result<(), Refusal> {
        match self.grant {
            // The pool itself refuses those who are members no longer.
            Some(grant)
                if grant.roles != Roles::Write
                    && pool.has_member(self.member)
                    && pool.is_privileged(name) =>
            {
                Err(refusals::trigger_is_privileged(name, &self.name))
            }
            _ => Ok(()),
        }
    }

    /// Whether the pool's policy lets the app do something.
    ///
    /// # Errors
    /// `forbidden`.
    #[inline]
    pub(crate) fn check_right(&self, right: Right) -> Result<(), Refusal> {
        match self.rights.have(right) {
            true => Ok(()),
            false => Err(refusals::right_is_denied(right.as_str(), &self.name)),
        }
    }

    /// Whether the proved roles are sufficient.
    ///
    /// # Errors
    /// `forbidden`.
    pub(crate) fn check_roles(&self, needed: Roles) -> Result<(), Refusal> {
        match self.grant {
            Some(grant) if grant.roles.number() < needed.number() => {
                let needed = match needed {
                    Roles::Join => "join",
                    Roles::Read => "read",
                    Roles::Write => "write",
                };
                Err(refusals::role_not_proved(needed, &self.name))
            }
            _ => Ok(()),
        }
    }

    /// The pool's name, if its blocks are sealed.
    pub(crate) fn name_if_sealed(&self) -> Option<PoolName> {
        let suite = self.grant.map(|grant| grant.suite);
        (suite == Some(Suite::Sealed)).then(|| self.name.clone())
    }

    /// Whether a failed answer may be sent here, in an encrypted pool: nothing of it may be in the
    /// clear but an error that names none of the handler's data.
    ///
    /// # Errors
    /// `bad_message`.
    pub(crate) fn check_error(&self, response: &Response<'_>) -> Result<(), Refusal> {
        let error = response.error.map(|error| Fields::of(error.text()));
        let data = error.transpose()?.and_then(|error| error.field("data"));
        data.map_or(Ok(()), |data| self.check_body(Body::Json(data)))?;
        match response.body {
            Body::None => Ok(()),
            body => self.check_body(body),
        }
    }

    /// Whether a payload may be sent here: in an encrypted pool it must be sealed.
    ///
    /// # Errors
    /// `bad_message`.
    pub(crate) fn check_body(&self, body: Body<'_>) -> Result<(), Refusal> {
        if self.grant.is_none() || is_sealed(body) {
            return Ok(());
        }
        Err(refusals::payload_not_sealed(&self.name))
    }
}

impl<D: Driver> Clone for Membership<D> {
    fn clone(&self) -> Self {
        Membership {
            entrance: self.entrance.clone(),
            member: self.member,
        }
    }
}

impl<D: Driver> Deref for Membership<D> {
    type Target = Entrance<D>;

    fn deref(&self) -> &Entrance<D> {
        &self.entrance
    }
}

/// A pool that an instance joins or is in.
pub struct Entrance<D: Driver> {
    /// Its name.
    pub name: PoolName,
    /// Its number, which is part of the ids of its calls.
    pub number: u32,
    /// Its handle.
    pub pool: D::Pool,
    /// What the pool's policy lets the app do.
    pub rights: Rights,
    /// What was proved, where the pool is encrypted.
    pub grant: Option<Grant>,
}

impl<D: Driver> Clone for Entrance<D> {
    fn clone(&self) -> Self {
        Entrance {
            name: self.name.clone(),
            pool: self.pool.clone(),
            ..*self
        }
    }
}

struct PoolEntry<D: Driver> {
    number: u32,
    pool: D::Pool,
    members: usize,
    /// Blocks, parked calls and stored answers in it; a pool with any stays.
    held: usize,
    /// Whether it stays without members, because it was created explicitly.
    kept: bool,
    /// Whether it outlives the server.
    durable: bool,
    owner: Option<AppId>,
    policy: Policy,
    properties: Option<Value>,
    /// When it was made, in milliseconds since the Unix epoch.
    created: u64,
    /// Its reservation, if a client created it.
    place: Option<Reservation>,
    /// The memory of its policy, properties and descriptor, likewise.
    memory: Option<Reservation>,
    /// Its descriptors, if it is an encrypted pool.
    sealed: Option<Sealed>,
}

impl<D: Driver> PoolEntry<D> {
    /// What an app may do here.
    fn rights(&self, actor: &Actor<'_>) -> Rights {
        match self.is_owned_by(actor) {
            true => Rights::ALL,
            false => self.policy.rights(actor),
        }
    }

    /// Whether an app has one right here.
    fn allows(&self, right: Right, actor: &Actor<'_>) -> bool {
        self.is_owned_by(actor) || self.policy.allows(right, actor)
    }

    fn admits(&self, actor: &Actor<'_>) -> bool {
        self.allows(Right::Join, actor)
    }

    fn is_owned_by(&self, actor: &Actor<'_>) -> bool {
        self.owner.as_ref() == Some(actor.app)
    }
}

/// The result of a handshake.
pub enum Admitted<D: Driver> {
    /// It was accepted, and the registration is being stored. Repeat the request once it is on
    /// disk, and pass whether the registration was restored.
    Later {
        /// Whether what the app had is restored.
        rehydrated: bool,
    },
    /// It was granted.
    Now(Box<Admission<D>>),
}

/// What a handshake grants.
pub struct Admission<D: Driver> {
    /// The new instance's id.
    pub instance: InstanceId,
    /// The pools to join.
    pub pools: Vec<Entrance<D>>,
    /// The triggers to serve. The registry alone keeps their schemas.
    pub triggers: Vec<TriggerSpec>,
    /// The pools to watch.
    pub watches: Vec<(PoolName, EventSet)>,
    /// The blocks that it subscribed to.
    pub subscriptions: Vec<(PoolName, BlockId)>,
    /// Whether what the app had was restored.
    pub rehydrated: bool,
    /// Instances that must be removed first.
    pub displaced: Vec<Instance<D>>,
}

/// What the registry knows about an app that is not in a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// Never seen.
    Unknown,
    /// Known, and a member of that pool when it is online, but no instance is connected.
    Offline,
    /// Known, but not in that pool.
    Elsewhere,
}

/// Every known app and every pool.
pub struct Registry<D: Driver> {
    apps: BTreeMap<AppId, App<D>>,
    /// Apps without an instance: which one to forget for a new one.
    offline: Offline,
    /// The owners of AppIDs, and how many AppIDs have a key.
    bindings: BTreeMap<AppId, Binding>,
    keys: usize,
    pools: BTreeMap<PoolName, PoolEntry<D>>,
    /// Pool names reserved for their owners from before the server's start, and until when.
    reserved: BTreeMap<PoolName, (AppId, Time)>,
    next_number: u32,
    instances: usize,
    limits: Limits,
    prng: Prng,
    /// The accounts of apps that hold something or have a connection.
    accounts: BTreeMap<AppId, Weak<Account>>,
}

impl<D: Driver> Registry<D> {
    /// A registry with the pools `default` and `system`. `seed` is its only randomness.
    #[must_use]
    pub fn new(unix_ms: u64, limits: Limits, seed: u64) -> Self {
        let mut registry = Registry {
            apps: BTreeMap::new(),
            offline: Offline::default(),
            bindings: BTreeMap::new(),
            keys: 0,
            pools: BTreeMap::new(),
            reserved: BTreeMap::new(),
            next_number: 0,
            instances: 0,
            limits,
            prng: Prng::new(seed),
            accounts: BTreeMap::new(),
        };
        for name in [DEFAULT_POOL, SYSTEM_POOL] {
            let name = PoolName::new(name).expect("a built-in name is valid");
            registry.insert_pool(unix_ms, name, (true, true), None);
        }
        registry
    }

    /// Restores an app of an earlier run. For apps that were online, `alive_until` is when that run
    /// ended, as far as that is known. False if there is no room for it.
    pub fn restore_app(&mut self, row: AppRow, alive_until: u64, ledger: &Ledger) -> bool {
        if self.apps.len() >= self.limits.apps_max {
            return false;
        }
        let last_seen = match row.last_seen {
            0 => alive_until.max(row.registered),
            seen => seen,
        };
        let (app_id, registered) = (row.app_id.clone(), row.registered);
        let registration = Remembered::Text(Box::new(row));
        let mut held = ledger.all().hold(Resource::Registrations);
        held.force(registration.bytes());
        let app = App {
            held,
            user: ledger.all().id(),
            registered,
            last_seen,
            registration,
            instances: Vec::new(),
            is_persistent: true,
        };
        self.offline.insert(app.user, last_seen, app_id.clone());
        self.apps.insert(app_id, app);
        true
    }

    /// The bytes of registrations, and the number of pools that clients created.
    #[must_use]
    pub fn held(&self) -> (u64, u64) {
        let apps = self.apps.values().map(|app| app.held.amount());
        let pools = self.pools.values().filter_map(|pool| pool.memory.as_ref());
        let registered = apps.chain(pools.map(Reservation::amount)).sum();
        let made = self.pools.values().filter(|entry| entry.place.is_some());
        (registered, made.count() as u64)
    }

    /// The account of an app of a user.
    pub fn account(
        &mut self,
        app: &AppId,
        user: &Arc<Account>,
        turn: &mut Turn<'_, D>,
    ) -> Arc<Account> {
        let known = self.accounts.get(app).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|account| account.is_under(user)) {
            return known;
        }
        if self.accounts.len() > 2 * self.apps.len() + 64 {
            self.accounts
                .retain(|_, account| account.strong_count() > 0);
        }
        let account = turn.driver.context().ledger.app(user);
        self.accounts.insert(app.clone(), Arc::downgrade(&account));
        account
    }

    /// The account of an app for its state from an earlier run.
    pub fn kept_account(&mut self, app: &AppId, turn: &mut Turn<'_, D>) -> Arc<Account> {
        let known = self.accounts.get(app).and_then(Weak::upgrade);
        known.unwrap_or_else(|| {
            let earlier = Arc::clone(turn.driver.context().ledger.earlier());
            self.account(app, &earlier, turn)
        })
    }

    /// Emits an app's registration again, after it could not be stored.
    pub fn store_app(&self, app_id: &AppId, turn: &mut Turn<'_, D>) {
        if let Some(app) = self.apps.get(app_id) {
            app.store(app_id, None, turn);
        }
    }

    /// Forgets an app that has no instance.
    ///
    /// # Errors
    /// `no_app`, `app_in_use`.
    pub fn forget_app(
        &mut self,
        app_id: &AppId,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<(), Refusal> {
        match self.apps.get(app_id) {
            None => Err(refusals::no_app(app_id)),
            Some(app) if !app.instances.is_empty() => Err(refusals::app_is_connected(app_id)),
            Some(app) => {
                self.offline.remove(app.user, app.last_seen, app_id);
                self.apps.remove(app_id);
                self.unbind(app_id, turn);
                turn.store(StoreChange::ForgetApp(app_id.clone()), Some(promise));
                Ok(())
            }
        }
    }

    /// Records the pools that an instance has joined; false if it was displaced meanwhile.
    pub fn settle(
        &mut self,
        app: &AppId,
        instance: InstanceId,
        memberships: &[Membership<D>],
    ) -> bool {
        let Some(instance) = self.instance_mut(app, instance) else {
            return false;
        };
        instance.memberships = memberships.to_vec();
        true
    }

    /// Removes an instance, but not the registration of its app; returns the pools that it is still
    /// in.
    pub fn depart(
        &mut self,
        app_id: &AppId,
        instance: InstanceId,
        turn: &mut Turn<'_, D>,
    ) -> Vec<Membership<D>> {
        let Some(app) = self.apps.get_mut(app_id) else {
            return Vec::new();
        };
        let Some(at) = app.instances.iter().position(|i| i.id == instance) else {
            return Vec::new();
        };
        let gone = app.instances.swap_remove(at);
        self.instances -= 1;
        self.mark_offline(app_id, turn);
        gone.memberships
    }

    /// Notes that an instance of an app has gone.
    fn mark_offline(&mut self, app_id: &AppId, turn: &mut Turn<'_, D>) {
        let unix_ms = turn.unix_ms();
        let Some(app) = self.apps.get_mut(app_id) else {
            return;
        };
        app.last_seen = unix_ms;
        app.held.force(app.bytes());
        if !app.instances.is_empty() {
            return;
        }
        if app.is_persistent {
            self.offline.insert(app.user, unix_ms, app_id.clone());
            turn.store(StoreChange::Seen(app_id.clone(), unix_ms), None);
        } else {
            self.apps.remove(app_id);
            self.unbind(app_id, turn);
        }
    }

    /// Removes instances of an app, for `kick`; the caller notifies them and removes them from
    /// their pools.
    pub fn evict(
        &mut self,
        app_id: &AppId,
        instance: Option<InstanceId>,
        turn: &mut Turn<'_, D>,
    ) -> Vec<Instance<D>> {
        let Some(app) = self.apps.get_mut(app_id) else {
            return Vec::new();
        };
        let (gone, stay) = std::mem::take(&mut app.instances)
            .into_iter()
            .partition(|i| instance.is_none_or(|id| id == i.id));
        let gone: Vec<Instance<D>> = gone;
        app.instances = stay;
        if gone.is_empty() {
            return gone;
        }
        self.instances -= gone.len();
        self.mark_offline(app_id, turn);
        gone
    }

    /// The user of an instance, if it is connected and the kernel reports it.
    #[must_use]
    pub fn uid_of(&self, app: &AppId, instance: InstanceId) -> Option<u32> {
        let instances = &self.apps.get(app)?.instances;
        instances.iter().find(|i| i.id == instance)?.uid
    }

    /// What is known about an app that is not in a pool.
    #[must_use]
    pub fn whereabouts(&self, app_id: &str, pool: &PoolName) -> Whereabouts {
        match self.apps.get(app_id) {
            None => Whereabouts::Unknown,
            Some(app)
                if app.instances.is_empty() && app.registration.get().pools.contains(pool) =>
            {
                Whereabouts::Offline
            }
            Some(_) => Whereabouts::Elsewhere,
        }
    }

    /// The handle of one pool.
    #[must_use]
    pub fn pool(&self, name: &PoolName) -> Option<&D::Pool> {
        self.pools.get(name).map(|entry| &entry.pool)
    }

    /// The handles of all pools.
    pub fn pools(&self) -> impl Iterator<Item = (&PoolName, &D::Pool)> {
        self.pools.iter().map(|(name, entry)| (name, &entry.pool))
    }

    /// The handle of one pool, or of all, and whether an app owns it. Nothing if there is no such
    /// pool, or it is hidden. In an encrypted pool calls are visible to connections that proved the
    /// role read, and it is owned by those that proved the role write.
    pub(crate) fn owned(&self, name: Option<&PoolName>, view: &View<'_>) -> Vec<(D::Pool, bool)> {
        let one = name.map(|name| self.pools.get(name));
        let all = name.is_none().then(|| self.pools.values());
        let entries = one.flatten().into_iter().chain(all.into_iter().flatten());
        let seen = entries.filter_map(|entry| {
            let is_own = match &entry.sealed {
                Some(_) => match self.proved(entry, view) {
                    None | Some(Roles::Join) if !view.is_admin => return None,
                    roles => roles == Some(Roles::Write),
                },
                None => entry.owner.as_ref() == Some(view.app),
            };
            Some((entry.pool.clone(), is_own))
        });
        seen.collect()
    }

    /// Checks the invariants, which hold between any two inputs; for the simulator and tests.
    ///
    /// # Panics
    /// If an invariant is broken.
    pub fn check(&self) {
        let live: usize = self.apps.values().map(|app| app.instances.len()).sum();
        assert_eq!(live, self.instances);
        let offline: BTreeSet<_> = self
            .apps
            .iter()
            .filter(|(_, app)| app.instances.is_empty())
            .map(|(id, app)| (app.user, (app.last_seen, id.clone())))
            .collect();
        let listed = self.offline.iter();
        let listed: BTreeSet<_> = listed.map(|(user, entry)| (user, entry.clone())).collect();
        assert_eq!(offline, listed);
        assert_eq!(offline.len(), self.offline.len());
        for (id, app) in &self.apps {
            assert_eq!(app.held.amount(), app.bytes(), "memory of app '{id}'");
        }
        // Pools of an earlier run are all restored.
        let durable = self.pools.values().filter(|entry| entry.durable).count();
        assert!(
            self.apps.len() <= self.limits.apps_max
                && self.pools.len() <= self.limits.pools_max.max(durable + 2)
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
                entry.kept || entry.members > 0 || entry.held > 0,
                "pool '{name}' still exists"
            );
        }
    }

    fn instance_mut(&mut self, app: &AppId, instance: InstanceId) -> Option<&mut Instance<D>> {
        self.apps
            .get_mut(app)?
            .instances
            .iter_mut()
            .find(|i| i.id == instance)
    }
}
