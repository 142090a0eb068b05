//! Every app that was seen and every pool there is.
//!
//! The registry admits apps and remembers what each registered last, so that an app that comes back with its AppID
//! alone has its pools, triggers and watches again. It knows pools by handle only: what happens inside one is the
//! pool's, and the two are never held together. A pool's members are counted here before they join and after they
//! left, so that a pool is never forgotten while somebody is on the way into it.

use std::collections::{BTreeMap, BTreeSet};

use latzero_protocol::limits::{DEFAULT_POOL, SYSTEM_APP, SYSTEM_POOL};
use latzero_protocol::message::{EventSet, Handshake, Page, Policy, PoolCreate, TriggerSpec};
use latzero_protocol::{AppId, BlockId, Code, InstanceId, PoolName, Raw, Refusal};
use serde_json::{Value, json};

use crate::effects::Effects;
use crate::host::{Host, Transport};
use crate::keep::{AppRow, Change, PoolRow};
use crate::limits::Limits;
use crate::pool::{MemberKey, Pool};
use crate::prng::Prng;
use crate::registration::{Registration, Remembered};
use crate::time::Time;

/// Bytes of a listing after which it goes on on the next page: far below what a frame may have.
const PAGE_BYTES_MAX: usize = 1024 * 1024;

/// Instances of one app that a listing shows one by one.
const INSTANCES_SHOWN_MAX: usize = 100;

struct App<H: Host> {
    registration: Remembered,
    instances: Vec<Instance<H>>,
    /// When it was seen first and last, in milliseconds since the Unix epoch.
    registered: u64,
    last_seen: u64,
    /// Whether it outlives its last instance, and the server: the built-in app and tools that come and go do not.
    is_lasting: bool,
}

impl<H: Host> App<H> {
    /// Hands out the row to keep; false where nothing of the app is kept.
    fn keep(&self, app_id: &AppId, promise: Option<&H::Peer>, fx: &mut H::Effects) -> bool {
        if self.is_lasting {
            let last_seen = if self.instances.is_empty() {
                self.last_seen
            } else {
                0
            };
            let registration = self.registration.get();
            let row = registration.row(app_id, self.registered, last_seen);
            fx.keep(Change::App(Box::new(row)), promise);
        }
        self.is_lasting
    }
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
    /// Whether the app may serve triggers in it.
    pub may_serve: bool,
}

impl<H: Host> Clone for Membership<H> {
    fn clone(&self) -> Self {
        Membership {
            name: self.name.clone(),
            number: self.number,
            pool: self.pool.clone(),
            member: self.member,
            may_serve: self.may_serve,
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
    /// Whether the app may serve triggers in it.
    pub may_serve: bool,
}

struct PoolEntry<H: Host> {
    number: u32,
    pool: H::Pool,
    members: usize,
    /// Blocks of memory, parked calls and kept answers in it; a pool with any stays.
    held: usize,
    /// Stays without members: made on purpose rather than by being named.
    kept: bool,
    /// Outlives the server.
    durable: bool,
    owner: Option<AppId>,
    policy: Policy,
    properties: Option<Value>,
    /// When it was made, in milliseconds since the Unix epoch.
    created: u64,
}

impl<H: Host> PoolEntry<H> {
    fn admits(&self, app: &AppId) -> bool {
        self.policy.join.contain(app) || self.owner.as_ref() == Some(app)
    }

    fn may_serve(&self, app: &AppId) -> bool {
        self.policy.serve.contain(app) || self.owner.as_ref() == Some(app)
    }
}

/// What becomes of a handshake.
pub enum Admitted<H: Host> {
    /// It was accepted, and what the app registers is on its way to the disk: ask again when it is there, and hand in
    /// whether it was restored.
    Later {
        /// Whether what the app had is restored.
        rehydrated: bool,
    },
    /// It was granted.
    Now(Box<Admission<H>>),
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
    /// The blocks whose changes it is told.
    pub subscriptions: Vec<(PoolName, BlockId)>,
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
    offline: BTreeSet<(u64, AppId)>,
    pools: BTreeMap<PoolName, PoolEntry<H>>,
    next_number: u32,
    instances: usize,
    limits: Limits,
    prng: Prng,
}

impl<H: Host> Registry<H> {
    /// A registry with the pools `default` and `system`. `seed` is all the randomness there is.
    #[must_use]
    pub fn new(unix_ms: u64, limits: Limits, seed: u64) -> Self {
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
            registry.insert_pool(unix_ms, name, true);
        }
        registry
    }

    /// Takes in an app of an earlier run. `alive_until` is when that run ended, as far as is known: for apps that lived
    /// then. False where there is no room for it.
    pub fn restore_app(&mut self, row: AppRow, alive_until: u64) -> bool {
        if self.apps.len() >= self.limits.apps_max {
            return false;
        }
        let last_seen = match row.last_seen {
            0 => alive_until.max(row.registered),
            seen => seen,
        };
        let app_id = row.app_id.clone();
        let app = App {
            registered: row.registered,
            last_seen,
            registration: Remembered::Text(Box::new(row)),
            instances: Vec::new(),
            is_lasting: true,
        };
        self.offline.insert((last_seen, app_id.clone()));
        self.apps.insert(app_id, app);
        true
    }

    /// Takes in a pool of an earlier run.
    ///
    /// # Errors
    /// `quota`, or where its policy makes no sense: a pool that lets in whoever it should not is worse than none.
    pub fn restore_pool(&mut self, row: PoolRow) -> Result<(), Refusal> {
        let policy = Raw::new(&row.policy).map_err(|_| {
            Refusal::new(
                Code::Storage,
                format!("the policy of pool '{}' makes no sense", row.name),
            )
        })?;
        let policy = Policy::parse(policy)?;
        self.check_room_for_pools(1)?;
        let entry = self.insert_pool(row.created, row.name, true);
        entry.durable = true;
        entry.owner = row.owner;
        entry.policy = policy;
        entry.properties = row
            .properties
            .and_then(|properties| serde_json::from_str(&properties).ok());
        Ok(())
    }

    /// Admits an app's instance, or says why not. Where the handshake changes what the app registered, that is handed out
    /// to be kept first, with a promise to `peer`; the handshake is to be asked again when it is, with `kept` as [`Admitted::Later`] said.
    ///
    /// # Errors
    /// `forbidden`, `app_in_use`, `quota`, `too_large`: nothing changed then.
    #[allow(
        clippy::too_many_lines,
        reason = "one decision after the other, none of which can be moved"
    )]
    pub fn admit(
        &mut self,
        (now, unix_ms): (Time, u64),
        peer: &H::Peer,
        transport: Transport,
        handshake: &Handshake<'_>,
        kept: Option<bool>,
        fx: &mut H::Effects,
    ) -> Result<Admitted<H>, Refusal> {
        let app_id = &handshake.app_id;
        if app_id.as_str() == SYSTEM_APP && transport != Transport::BuiltIn {
            return Err(Refusal::new(
                Code::Forbidden,
                format!("AppID '{SYSTEM_APP}' is the server's own; choose another"),
            ));
        }
        let known = self.apps.get(app_id);
        let remembered = known.map(|app| app.registration.get());
        let is_kept = kept.is_some();
        let wants_back =
            handshake.pools.is_none() && handshake.triggers.is_none() && remembered.is_some();
        // What was kept just now is not what the app had.
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
            // A pool that closed itself to the app meanwhile is not asked for.
            let is_open = |name: &PoolName| self.pools.get(name).is_none_or(|p| p.admits(app_id));
            registration.pools.retain(is_open);
            // Nor a trigger where it may no longer be served.
            registration.triggers.retain(|spec| {
                self.check_service(app_id, std::slice::from_ref(spec))
                    .is_ok()
            });
        }
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
        self.check_policies(app_id, &registration)?;
        if let Some(meta) = handshake.meta {
            registration.meta = Some(self.free_json("meta", meta.text())?);
        }
        let is_same = remembered.as_ref().is_some_and(|remembered| {
            let meta = registration.meta.clone();
            // What an app tells about itself is worth no wait.
            let remembered = Registration {
                meta,
                ..Registration::clone(remembered)
            };
            remembered == registration
        });
        let is_told = remembered.is_none_or(|remembered| remembered.meta != registration.meta);
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
        self.check_room_for_pools(new_pools)?;
        // The last that can fail: from here on things change.
        if !is_known {
            self.make_room(fx)?;
        }
        let is_lasting = transport != Transport::BuiltIn && !handshake.transient;
        let app = self.apps.entry(app_id.clone()).or_insert_with(|| App {
            registration: Remembered::Read(Registration::default()),
            instances: Vec::new(),
            registered: unix_ms,
            last_seen: unix_ms,
            is_lasting,
        });
        if !is_known {
            self.offline.insert((app.last_seen, app_id.clone()));
        }
        let becomes_lasting = is_lasting && !app.is_lasting;
        // A tool's visit under an app's name does not make the app less lasting, and an app may follow a tool.
        app.is_lasting |= is_lasting;
        app.registration = Remembered::Read(registration.clone());
        if (!is_same || becomes_lasting) && !is_kept && app.keep(app_id, Some(peer), fx) {
            return Ok(Admitted::Later { rehydrated });
        }

        let instance = InstanceId(self.prng.next_u64());
        let pools = registration
            .pools
            .clone()
            .into_iter()
            .map(|name| self.enter(unix_ms, app_id, name))
            .collect();
        let triggers = registration.triggers.clone();
        // Another instance may watch a pool that is not among those that are restored.
        let watches = registration
            .watches
            .iter()
            .filter(|(pool, _)| registration.pools.contains(pool))
            .cloned()
            .collect();
        let app = self.apps.get_mut(app_id).expect("it was made above");
        self.offline.remove(&(app.last_seen, app_id.clone()));
        let was_offline = app.instances.is_empty();
        app.last_seen = unix_ms;
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
        if is_told || (is_kept && !is_same) {
            app.keep(app_id, None, fx);
        } else if was_offline && app.is_lasting {
            fx.keep(Change::Seen(app_id.clone(), 0), None);
        }
        Ok(Admitted::Now(Box::new(Admission {
            instance,
            pools,
            triggers,
            watches,
            subscriptions: registration.subscriptions,
            rehydrated,
            displaced,
        })))
    }

    /// Hands what an app registered out once more: it could not be kept when it was to be.
    pub fn keep_app(&self, app_id: &AppId, fx: &mut H::Effects) {
        if let Some(app) = self.apps.get(app_id) {
            app.keep(app_id, None, fx);
        }
    }

    /// Forgets an app that has no instance.
    ///
    /// # Errors
    /// `no_app`, `app_in_use`.
    pub fn forget_app(
        &mut self,
        app_id: &AppId,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> Result<(), Refusal> {
        match self.apps.get(app_id) {
            None => Err(Refusal::new(
                Code::NoApp,
                format!("no app '{app_id}' was ever seen here"),
            )),
            Some(app) if !app.instances.is_empty() => Err(Refusal::new(
                Code::AppInUse,
                format!("app '{app_id}' lives; stop it first, or `latzero kick {app_id}`"),
            )),
            Some(app) => {
                self.offline.remove(&(app.last_seen, app_id.clone()));
                self.apps.remove(app_id);
                fx.keep(Change::ForgetApp(app_id.clone()), Some(promise));
                Ok(())
            }
        }
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
        unix_ms: u64,
        app_id: &AppId,
        instance: InstanceId,
        fx: &mut H::Effects,
    ) -> Vec<Membership<H>> {
        let Some(app) = self.apps.get_mut(app_id) else {
            return Vec::new();
        };
        let Some(at) = app.instances.iter().position(|i| i.id == instance) else {
            return Vec::new();
        };
        let gone = app.instances.swap_remove(at);
        self.instances -= 1;
        self.note_gone(unix_ms, app_id, fx);
        gone.memberships
    }

    /// Notes that an instance of an app has gone.
    fn note_gone(&mut self, unix_ms: u64, app_id: &AppId, fx: &mut H::Effects) {
        let Some(app) = self.apps.get_mut(app_id) else {
            return;
        };
        app.last_seen = unix_ms;
        if !app.instances.is_empty() {
            return;
        }
        if app.is_lasting {
            self.offline.insert((unix_ms, app_id.clone()));
            fx.keep(Change::Seen(app_id.clone(), unix_ms), None);
        } else {
            self.apps.remove(app_id);
        }
    }

    /// Takes instances of an app away from it, as `kick` asks; they are to be told, and to leave their pools.
    pub fn evict(
        &mut self,
        unix_ms: u64,
        app_id: &AppId,
        instance: Option<InstanceId>,
        fx: &mut H::Effects,
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
        self.instances -= gone.len();
        self.note_gone(unix_ms, app_id, fx);
        gone
    }

    /// Opens a pool for an instance that wants to join it, and remembers that its app is in it; says whether there is a
    /// promise that it is kept.
    ///
    /// # Errors
    /// `quota`, `forbidden`.
    pub fn open(
        &mut self,
        unix_ms: u64,
        app_id: &AppId,
        name: &PoolName,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> Result<(Entrance<H>, bool), Refusal> {
        let registered = self.apps.get(app_id).map(|app| app.registration.get());
        let pools = registered.as_ref().map_or(&[][..], |r| &r.pools);
        if let Some(entry) = self.pools.get(name).filter(|entry| !entry.admits(app_id)) {
            return Err(not_admitted(app_id, name, entry));
        }
        if !pools.contains(name) && pools.len() >= self.limits.pools_per_app_max {
            return Err(too_many(
                "pools",
                self.limits.pools_per_app_max,
                "limits.pools_per_app_max",
            ));
        }
        drop(registered);
        if !self.pools.contains_key(name) {
            self.check_room_for_pools(1)?;
        }
        let entrance = self.enter(unix_ms, app_id, name.clone());
        let is_promised = self.remember(app_id, Some(promise), fx, |registration| {
            if !registration.pools.contains(name) {
                registration.pools.push(name.clone());
            }
        });
        Ok((entrance, is_promised))
    }

    /// Changes what an app registered; says whether anything changed and is to be kept.
    fn remember(
        &mut self,
        app_id: &AppId,
        promise: Option<&H::Peer>,
        fx: &mut H::Effects,
        change: impl FnOnce(&mut Registration),
    ) -> bool {
        let Some(app) = self.apps.get_mut(app_id) else {
            return false;
        };
        let registration = app.registration.get_mut();
        let before = registration.clone();
        change(registration);
        *registration != before && app.keep(app_id, promise, fx)
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

    /// The number of blocks, parked calls and answers in a pool changed. A pool that nobody made on purpose goes with the
    /// last of them and its last member.
    /// False where the pool is there no longer.
    pub fn count_held(&mut self, name: &PoolName, number: u32, change: i32) -> bool {
        let Some(entry) = self.pools.get_mut(name).filter(|e| e.number == number) else {
            return false;
        };
        entry.held = entry
            .held
            .checked_add_signed(change as isize)
            .expect("what ends began, and ends once");
        self.drop_if_unused(name);
        true
    }

    fn drop_if_unused(&mut self, name: &PoolName) {
        let is_unused = |e: &PoolEntry<H>| e.members == 0 && e.held == 0 && !e.kept;
        if self.pools.get(name).is_some_and(is_unused) {
            self.pools.remove(name);
        }
    }

    /// The pool that a block or a call of an earlier run belongs to; made where there is none. Where nothing comes into it,
    /// zero is to be counted with [`Registry::count_held`].
    ///
    /// # Errors
    /// `quota`.
    pub fn pool_for_kept(
        &mut self,
        unix_ms: u64,
        name: &PoolName,
    ) -> Result<(u32, H::Pool), Refusal> {
        if !self.pools.contains_key(name) {
            self.check_room_for_pools(1)?;
            self.insert_pool(unix_ms, name.clone(), false);
        }
        let entry = &self.pools[name];
        Ok((entry.number, entry.pool.clone()))
    }

    /// Forgets that an app is in a pool: it left on purpose. Says whether there is a promise that it is kept.
    pub fn forget_pool(
        &mut self,
        app_id: &AppId,
        instance: InstanceId,
        name: &PoolName,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> bool {
        let Some(app) = self.apps.get_mut(app_id) else {
            return false;
        };
        if let Some(instance) = app.instances.iter_mut().find(|i| i.id == instance) {
            instance.memberships.retain(|m| m.name != *name);
        }
        // Another instance may still be there; what comes back is what the app as a whole had.
        if app
            .instances
            .iter()
            .any(|i| i.memberships.iter().any(|m| m.name == *name))
        {
            return false;
        }
        self.remember(app_id, Some(promise), fx, |registration| {
            forget_pool(registration, name);
        })
    }

    /// Remembers the triggers that an app serves now; says whether there is a promise that they are kept.
    ///
    /// # Errors
    /// `quota`, `forbidden`: nothing changed then.
    pub fn remember_triggers(
        &mut self,
        app_id: &AppId,
        add: &[TriggerSpec],
        transport: Transport,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> Result<bool, Refusal> {
        if transport != Transport::BuiltIn {
            check_reserved(add)?;
        }
        self.check_service(app_id, add)?;
        let Some(app) = self.apps.get(app_id) else {
            return Ok(false);
        };
        let mut triggers = app.registration.get().triggers.clone();
        for spec in add {
            triggers.retain(|known| known.name != spec.name);
            triggers.push(spec.clone());
        }
        self.check_quota(&[], &triggers)?;
        Ok(self.remember(app_id, Some(promise), fx, |registration| {
            registration.triggers = triggers;
        }))
    }

    /// Forgets triggers that an app serves no longer; says whether there is a promise that this is kept.
    pub fn forget_triggers(
        &mut self,
        app_id: &AppId,
        gone: &[TriggerSpec],
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> bool {
        self.remember(app_id, Some(promise), fx, |registration| {
            let stays = |known: &TriggerSpec| !gone.iter().any(|spec| spec.name == known.name);
            registration.triggers.retain(stays);
        })
    }

    /// Remembers what an app watches in a pool; `None` forgets it. Says whether there is a promise that it is kept.
    pub fn remember_watch(
        &mut self,
        app_id: &AppId,
        pool: &PoolName,
        events: Option<EventSet>,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> bool {
        self.remember(app_id, Some(promise), fx, |registration| {
            registration.watches.retain(|(name, _)| name != pool);
            if let Some(events) = events {
                registration.watches.push((pool.clone(), events));
            }
        })
    }

    /// Remembers that an app is told of a block's changes, or forgets it.
    pub fn remember_subscription(
        &mut self,
        app_id: &AppId,
        pool: &PoolName,
        block: &BlockId,
        is_on: bool,
        fx: &mut H::Effects,
    ) {
        let max = self.limits.subscriptions_per_app_max;
        self.remember(app_id, None, fx, |registration| {
            let known = &mut registration.subscriptions;
            known.retain(|(p, b)| (p, b) != (pool, block));
            if is_on {
                if known.len() >= max {
                    // Of blocks that are gone, most likely.
                    known.remove(0);
                }
                known.push((pool.clone(), block.clone()));
            }
        });
    }

    /// Makes a pool that stays until it is removed; says whether there is a promise that it is kept.
    ///
    /// # Errors
    /// `pool_exists`, `quota`, `too_large`.
    pub fn create_pool(
        &mut self,
        unix_ms: u64,
        owner: &AppId,
        create: PoolCreate<'_>,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> Result<bool, Refusal> {
        let PoolCreate {
            pool: name,
            properties,
            durable,
            policy,
        } = create;
        if self.pools.contains_key(&name) {
            return Err(Refusal::new(
                Code::PoolExists,
                format!("pool '{name}' exists; join it, or choose another name"),
            ));
        }
        self.check_room_for_pools(1)?;
        let properties = properties
            .map(|raw| self.free_json("properties", raw.text()))
            .transpose()?;
        if durable {
            let row = PoolRow {
                name: name.clone(),
                owner: Some(owner.clone()),
                policy: policy.to_json(),
                properties: properties.as_ref().map(Value::to_string),
                created: unix_ms,
            };
            fx.keep(Change::Pool(Box::new(row)), Some(promise));
        }
        let entry = self.insert_pool(unix_ms, name, true);
        entry.owner = Some(owner.clone());
        entry.durable = durable;
        entry.policy = policy;
        entry.properties = properties;
        Ok(durable)
    }

    /// A pool that was to outlive the server could not be kept: it goes with its last member.
    pub fn release_pool(&mut self, name: &PoolName) {
        if let Some(entry) = self.pools.get_mut(name).filter(|entry| entry.durable) {
            entry.durable = false;
            entry.kept = false;
            self.drop_if_unused(name);
        }
    }

    /// Takes a pool out of the registry; its handle is to be closed. Says whether there is a promise that this is kept.
    ///
    /// # Errors
    /// `no_pool`, `forbidden`.
    pub fn remove_pool(
        &mut self,
        (who, is_admin): (&AppId, bool),
        name: &PoolName,
        force: bool,
        promise: &H::Peer,
        fx: &mut H::Effects,
    ) -> Result<(H::Pool, bool), Refusal> {
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
        let quoted = format!("\"{name}\"");
        for (app_id, app) in &mut self.apps {
            for instance in &mut app.instances {
                instance.memberships.retain(|m| m.number != entry.number);
            }
            if matches!(&app.registration, Remembered::Text(row) if !row.pools.contains(&quoted)) {
                continue;
            }
            let registration = app.registration.get_mut();
            if registration.pools.contains(name) {
                forget_pool(registration, name);
                app.keep(app_id, None, fx);
            }
        }
        if entry.durable {
            fx.keep(Change::ForgetPool(name.clone()), Some(promise));
        }
        Ok((entry.pool, entry.durable))
    }

    /// Where an app is that a pool does not know.
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

    /// A pool's handle and what the registry knows of it.
    ///
    /// # Errors
    /// `no_pool`.
    pub fn describe_pool(&self, name: &PoolName) -> Result<(H::Pool, Value), Refusal> {
        let entry = self.pools.get(name).ok_or_else(|| no_pool(name))?;
        Ok((entry.pool.clone(), pool_json(name, entry)))
    }

    /// The pools, a page of them.
    #[must_use]
    pub fn list_pools(&self, page: &Page<'_>) -> Value {
        let rest = self
            .pools
            .iter()
            .filter(|(name, _)| is_after(name.as_str(), page))
            .map(|(name, entry)| pool_json(name, entry));
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
                app.registration.get().pools.contains(pool)
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
                entry.kept || entry.members > 0 || entry.held > 0,
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

    fn enter(&mut self, unix_ms: u64, app: &AppId, name: PoolName) -> Entrance<H> {
        if !self.pools.contains_key(&name) {
            self.insert_pool(unix_ms, name.clone(), false);
        }
        let entry = self
            .pools
            .get_mut(&name)
            .expect("made above where it was missing");
        entry.members += 1;
        Entrance {
            number: entry.number,
            pool: entry.pool.clone(),
            may_serve: entry.may_serve(app),
            name,
        }
    }

    fn insert_pool(&mut self, created: u64, name: PoolName, kept: bool) -> &mut PoolEntry<H> {
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
            held: 0,
            kept,
            durable: false,
            owner: None,
            policy: Policy::default(),
            properties: None,
            created,
        };
        self.pools.entry(name).or_insert(entry)
    }

    /// Forgets the app that was offline longest where there is no room for another.
    fn make_room(&mut self, fx: &mut H::Effects) -> Result<(), Refusal> {
        if self.apps.len() < self.limits.apps_max {
            return Ok(());
        }
        let Some((_, longest_gone)) = self.offline.pop_first() else {
            let message = format!("{} apps live (limits.apps_max)", self.apps.len());
            return Err(Refusal::new(Code::Quota, message));
        };
        self.apps.remove(&longest_gone);
        fx.keep(Change::ForgetApp(longest_gone), None);
        Ok(())
    }

    fn check_room_for_pools(&self, more: usize) -> Result<(), Refusal> {
        if self.pools.len() + more > self.limits.pools_max {
            let message = format!("there are {} pools (limits.pools_max)", self.pools.len());
            return Err(Refusal::new(Code::Quota, message));
        }
        Ok(())
    }

    /// Whether the pools' rules let an app in, and serve where it says that it does.
    fn check_policies(&self, app_id: &AppId, registration: &Registration) -> Result<(), Refusal> {
        for name in &registration.pools {
            if let Some(entry) = self.pools.get(name).filter(|entry| !entry.admits(app_id)) {
                return Err(not_admitted(app_id, name, entry));
            }
        }
        self.check_service(app_id, &registration.triggers)
    }

    fn check_service(&self, app_id: &AppId, triggers: &[TriggerSpec]) -> Result<(), Refusal> {
        for name in triggers.iter().flat_map(|spec| spec.pools.iter().flatten()) {
            if self
                .pools
                .get(name)
                .is_some_and(|entry| !entry.may_serve(app_id))
            {
                return Err(Refusal::new(
                    Code::Forbidden,
                    format!(
                        "app '{app_id}' may not serve triggers in pool '{name}' (its policy's \"serve\")"
                    ),
                ));
            }
        }
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

fn forget_pool(registration: &mut Registration, name: &PoolName) {
    registration.pools.retain(|pool| pool != name);
    registration.watches.retain(|(pool, _)| pool != name);
    registration.subscriptions.retain(|(pool, _)| pool != name);
}

fn not_admitted<H: Host>(app_id: &AppId, name: &PoolName, entry: &PoolEntry<H>) -> Refusal {
    let owner = entry.owner.as_ref().map_or("nobody", AppId::as_str);
    Refusal::new(
        Code::Forbidden,
        format!(
            "app '{app_id}' may not join pool '{name}' (its policy's \"join\"); its owner is '{owner}'"
        ),
    )
}

fn no_pool(name: &PoolName) -> Refusal {
    Refusal::new(Code::NoPool, format!("there is no pool '{name}'"))
}

fn pool_json<H: Host>(name: &PoolName, entry: &PoolEntry<H>) -> Value {
    json!({
        "pool": name, "kind": "local", "durable": entry.durable, "encrypted": false, "owner": entry.owner,
        "policy": {"join": entry.policy.join.names(), "serve": entry.policy.serve.names()},
        "properties": entry.properties, "members": entry.members, "created": entry.created,
    })
}

fn app_json<H: Host>(id: &AppId, app: &App<H>, unix_ms: impl Fn(Time) -> u64) -> Value {
    let instance = |i: &Instance<H>| {
        let pools: Vec<_> = i.memberships.iter().map(|m| &m.name).collect();
        json!({"instance": i.id, "pools": pools, "since": unix_ms(i.since)})
    };
    let registration = app.registration.get();
    json!({
        "app_id": id,
        "live": !app.instances.is_empty(),
        "instances": app.instances.iter().take(INSTANCES_SHOWN_MAX).map(instance).collect::<Vec<_>>(),
        "instances_total": app.instances.len(),
        "pools": registration.pools,
        "triggers": registration.triggers.iter().map(TriggerSpec::to_json).collect::<Vec<_>>(),
        "meta": registration.meta,
        "registered": app.registered,
        "last_seen": app.last_seen,
    })
}
