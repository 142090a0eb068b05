//! Encrypted pools: their descriptors, and admission by proof.
//!
//! The server has only public keys. To a connection that has not proved a pool, the pool does not
//! exist.

use std::collections::BTreeSet;
use std::sync::Arc;

use latzero_crypto::descriptor::{self, Descriptor, StoreError};
use latzero_crypto::keys::Roles;
use latzero_crypto::{Suite, text};
use latzero_protocol::message::{EventSet, TriggerSpec};
use latzero_protocol::proof::Sealed as Asked;
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};
use serde_json::{Value, json};

use super::registered::{outside, replace_sealed};
use super::{Entrance, Grant, Membership, PoolEntry, Registry, View, Who, served_as};
use crate::driver::{Driver, Peer};
use crate::ledger::{Ledger, Resource};
use crate::refusals;
use crate::registration::Registration;
use crate::rows::{PoolRow, StoreChange};
use crate::turn::Turn;

/// How many descriptors of earlier epochs the reply to a proof has.
const CHAIN_TOLD: usize = 16;

/// Most bytes of a descriptor, which has a name of at most 255 bytes.
const DESCRIPTOR_BYTES_MAX: usize = 1024;

/// About how many bytes of memory the descriptor of an earlier epoch takes besides its own.
const OLDER_BYTES: usize = 64;

/// The descriptors of an encrypted pool.
pub(super) struct Sealed {
    pub(super) descriptor: Arc<Descriptor>,
    /// The descriptors of earlier epochs, ascending.
    older: Vec<Arc<[u8]>>,
    /// When it was restored from a backup, so that its members may have seen newer epochs.
    restored_ms: Option<u64>,
}

/// What a proof grants.
pub struct Proved<D: Driver> {
    /// What the join needs; absent for a member.
    pub entrance: Option<Entrance<D>>,
    /// The newest descriptors before the current one, ascending.
    pub chain: Vec<Arc<[u8]>>,
    /// Whether the app's state in the pool was restored.
    pub rehydrated: bool,
    /// What it watched.
    pub watch: Option<EventSet>,
    /// The blocks that it subscribed to.
    pub subscriptions: Vec<BlockId>,
    /// Its triggers there.
    pub triggers: Vec<TriggerSpec>,
    /// When the pool was restored from a backup, in Unix milliseconds.
    pub restored_ms: Option<u64>,
}

/// The triggers of an instance that proves a pool.
pub struct Said<'a> {
    /// Those that it registered itself, or got back with a proof.
    pub triggers: &'a [TriggerSpec],
    /// Whether its handshake listed them, so that they replace what the app had in the pool.
    pub replace: bool,
    /// Whether it is in no plain pool.
    pub is_inside: bool,
    /// Whether it is in the pool already, where it registered them.
    pub is_member: bool,
}

/// A descriptor that may replace the current one.
#[derive(Debug, Clone)]
pub struct Successor {
    current: Arc<Descriptor>,
    next: Arc<Descriptor>,
}

impl Successor {
    /// Whether the owners of both epochs signed it.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.next.is_signed_after(&self.current)
    }
}

/// The result of a rotation.
pub struct Rotated<D: Driver> {
    /// The new descriptor.
    pub descriptor: Arc<Descriptor>,
    /// How many members stay.
    pub kept: Vec<D::Peer>,
    /// The pool.
    pub pool: D::Pool,
    /// Whether calls and answers sealed for the previous epoch end.
    pub purges: bool,
    /// Whether blocks move to new generations.
    pub moves: bool,
    /// Members that must prove the pool again, and leave.
    pub dropped: Vec<(D::Peer, Membership<D>)>,
}

/// Reads the descriptor of a new pool. Its signature is not checked.
///
/// # Errors
/// `bad_message`.
pub(super) fn read(asked: &Asked<'_>, name: &PoolName) -> Result<Arc<Descriptor>, Refusal> {
    let bytes = bytes_of(&asked.descriptor)?;
    let descriptor = descriptor::read_creation(&bytes, name.as_str()).map_err(refusal)?;
    if asked.is_gated != (descriptor.suite() == Suite::Gated) {
        return Err(refusals::memory_does_not_fit());
    }
    Ok(Arc::new(descriptor))
}

impl Sealed {
    pub(super) fn new(descriptor: Arc<Descriptor>) -> Sealed {
        Sealed {
            descriptor,
            older: Vec::new(),
            restored_ms: None,
        }
    }

    /// Restores the descriptor of an earlier run.
    pub(super) fn restore(bytes: &[u8]) -> Option<Sealed> {
        Some(Sealed::new(Arc::new(Descriptor::parse(bytes).ok()?)))
    }

    /// What members see of it in a description.
    pub(super) fn describe(&self, description: &mut Value) {
        let descriptor = &self.descriptor;
        let is_gated = descriptor.suite() == Suite::Gated;
        description["encrypted"] = true.into();
        description["pool_id"] = text::encode(&descriptor.pool_id()).into();
        description["epoch"] = descriptor.epoch().into();
        description["suite"] = descriptor.suite().number().into();
        description["memory"] = if is_gated { "gated" } else { "sealed" }.into();
        if let Some(unix_ms) = self.restored_ms {
            description["restored_ms"] = unix_ms.into();
        }
    }
}

impl<D: Driver> Registry<D> {
    /// The current descriptor of an encrypted pool.
    #[must_use]
    pub fn descriptor(&self, name: &PoolName) -> Option<Arc<Descriptor>> {
        let sealed = self.pools.get(name)?.sealed.as_ref()?;
        Some(Arc::clone(&sealed.descriptor))
    }

    pub(super) fn is_sealed(&self, name: &PoolName) -> bool {
        self.pools
            .get(name)
            .is_some_and(|entry| entry.sealed.is_some())
    }

    /// Whether this connection proved the role write in a pool.
    pub(super) fn may_write(&self, entry: &PoolEntry<D>, view: &View<'_>) -> bool {
        self.proved(entry, view) == Some(Roles::Write)
    }

    /// The roles that this connection proved in a pool.
    pub(super) fn proved(&self, entry: &PoolEntry<D>, view: &View<'_>) -> Option<Roles> {
        let instances = self.apps.get(view.app).map(|app| &app.instances[..]);
        let mut own = instances.unwrap_or_default().iter();
        let own = own.find(|instance| Some(instance.id) == view.instance);
        let m = own.and_then(|own| own.memberships.iter().find(|m| m.number == entry.number));
        Some(m?.grant?.roles)
    }

    /// Whether an encrypted pool has that id already.
    pub(super) fn has_pool_id(&self, id: [u8; 16]) -> bool {
        let mut sealed = self
            .pools
            .values()
            .filter_map(|entry| entry.sealed.as_ref());
        sealed.any(|sealed| sealed.descriptor.pool_id() == id)
    }

    /// Adds a descriptor of an earlier epoch; they must be added in the order of their epochs.
    pub fn restore_descriptor(
        &mut self,
        name: &PoolName,
        (epoch, bytes): (u32, Vec<u8>),
        ledger: &Ledger,
    ) {
        if let Some(entry) = self.pools.get_mut(name)
            && let Some(sealed) = &mut entry.sealed
            && epoch < sealed.descriptor.epoch()
        {
            let all = || ledger.all().hold(Resource::Registrations);
            let held = entry.memory.get_or_insert_with(all);
            held.force(held.amount() + (bytes.len() + OLDER_BYTES) as u64);
            sealed.older.push(bytes.into());
        }
    }

    /// Opens an encrypted pool for an instance that proved roles in it, and remembers that its app
    /// is in it.
    ///
    /// # Errors
    /// `unauthenticated`, `forbidden`, `quota`.
    pub fn open_proved(
        &mut self,
        (app_id, who): (&AppId, &Who),
        name: &PoolName,
        (descriptor, roles): (&Arc<Descriptor>, Roles),
        said: &Said<'_>,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<Proved<D>, Refusal> {
        let unix_ms = turn.unix_ms();
        let entry = self.pools.get(name).ok_or_else(Refusal::unproved)?;
        let sealed = entry.sealed.as_ref().ok_or_else(Refusal::unproved)?;
        // The pool may have been rotated in the meantime.
        if !Arc::ptr_eq(&sealed.descriptor, descriptor) {
            return Err(Refusal::unproved());
        }
        let actor = who.actor(app_id);
        if !entry.admits(&actor) {
            return Err(refusals::pool_not_open(app_id, name));
        }
        let suite = sealed.descriptor.suite();
        let chain = sealed.older.iter().rev().take(CHAIN_TOLD).rev();
        let chain = chain.cloned().collect();
        let restored_ms = sealed.restored_ms;
        let rights = entry.rights(&actor);
        let app = self.apps.get(app_id);
        let registered = app.map(|app| app.registration.get());
        let registered = registered.as_deref();
        let known = registered.filter(|registered| registered.pools.contains(name));
        if known.is_none()
            && registered.is_some_and(|r| r.pools.len() >= self.limits.pools_per_app_max)
        {
            let max = self.limits.pools_per_app_max;
            return Err(latzero_protocol::message::too_many("pools", max));
        }
        let watch = known.and_then(|known| {
            let mut watches = known.watches.iter();
            watches.find_map(|(pool, events)| (pool == name).then_some(*events))
        });
        let subscriptions = known.map_or_else(Vec::new, |known| {
            let of_pool = known.subscriptions.iter().filter(|(pool, _)| pool == name);
            of_pool.map(|(_, block)| block.clone()).collect()
        });
        let rehydrated = known.is_some();
        let mut registration = registered.cloned().unwrap_or_default();
        let may = |spec: &TriggerSpec| served_as(spec, rights, Some(roles)).is_some();
        let triggers = prove_triggers(&mut registration, name, said, may);
        if !rehydrated {
            registration.pools.push(name.clone());
        }
        if let Some(app) = app {
            self.check_growth(app, &registration, promise)?;
        }
        let entrance = (!said.is_member).then(|| {
            let mut entrance = self.enter(unix_ms, &actor, name.clone(), &mut Vec::new());
            entrance.grant = Some(Grant { roles, suite });
            entrance
        });
        self.remember(app_id, None, turn, |known| *known = registration);
        Ok(Proved {
            entrance,
            chain,
            rehydrated,
            watch,
            subscriptions,
            triggers,
            restored_ms,
        })
    }

    /// Everything was restored from a backup then: the encrypted pools of that time say so, since
    /// their members may know newer epochs and blocks.
    pub fn mark_restored(&mut self, unix_ms: u64) {
        for entry in self.pools.values_mut() {
            if let Some(sealed) = entry.sealed.as_mut().filter(|_| entry.created <= unix_ms) {
                sealed.restored_ms = Some(unix_ms);
            }
        }
    }

    /// The newest `limit` descriptors of epochs below `before`, ascending, and whether there are
    /// more.
    #[must_use]
    pub fn chain(
        &self,
        name: &PoolName,
        before: Option<u32>,
        limit: usize,
    ) -> (Vec<Arc<[u8]>>, bool) {
        let entry = self.pools.get(name);
        let Some(sealed) = entry.and_then(|entry| entry.sealed.as_ref()) else {
            return (Vec::new(), false);
        };
        // The first of them is epoch 1.
        let end = before.map_or(sealed.older.len(), |before| before as usize - 1);
        let end = end.min(sealed.older.len());
        let start = end.saturating_sub(limit);
        (sealed.older[start..end].to_vec(), start > 0)
    }

    /// Reads the next descriptor of an encrypted pool. Its signatures are not checked.
    ///
    /// # Errors
    /// `bad_message`, `stale_epoch`, `unauthenticated`.
    pub fn next_descriptor(&self, name: &PoolName, said: &str) -> Result<Successor, Refusal> {
        let current = self.descriptor(name).ok_or_else(Refusal::unproved)?;
        let next = descriptor::read_rotation(&bytes_of(said)?, &current).map_err(refusal)?;
        let next = Arc::new(next);
        Ok(Successor { current, next })
    }

    /// Moves an encrypted pool to its next epoch, whose descriptor is signed. Members whose keys
    /// are the same stay; the others are returned, and must leave.
    ///
    /// # Errors
    /// `stale_epoch`, `unauthenticated`; `quota` if there is no memory for one more descriptor.
    pub fn rotate(
        &mut self,
        name: &PoolName,
        Successor { current, next }: Successor,
        promise: &D::Peer,
        turn: &mut Turn<'_, D>,
    ) -> Result<Rotated<D>, Refusal> {
        let entry = self.pools.get_mut(name);
        let entry = entry.filter(|entry| entry.sealed.is_some());
        let entry = entry.ok_or_else(Refusal::unproved)?;
        let sealed = entry.sealed.as_mut().expect("just checked");
        if !Arc::ptr_eq(&sealed.descriptor, &current) {
            return Err(refusal(StoreError::StaleEpoch(sealed.descriptor.epoch())));
        }
        // The chain of earlier descriptors grows with each rotation, and belongs to the pool.
        let account = Arc::clone(promise.link().account().app());
        let own = || account.hold(Resource::Registrations);
        let held = entry.memory.get_or_insert_with(own);
        held.resize(held.amount() + (current.as_bytes().len() + OLDER_BYTES) as u64)?;
        let changes = next.changes(&current);
        sealed.older.push(current.as_bytes().into());
        sealed.descriptor = Arc::clone(&next);
        let (number, pool) = (entry.number, entry.pool.clone());
        let older = current.as_bytes().to_vec();
        turn.store(
            StoreChange::Descriptor(name.clone(), current.epoch(), older),
            None,
        );
        turn.store(StoreChange::Pool(Box::new(row(name, entry))), Some(promise));
        let keeps = |roles: Roles| {
            !(changes.join
                || (changes.read && roles != Roles::Join)
                || (changes.write && roles == Roles::Write))
        };
        let (mut kept, mut dropped) = (Vec::new(), Vec::new());
        for app in self.apps.values_mut() {
            for instance in &mut app.instances {
                let at = instance.memberships.iter().position(|m| m.number == number);
                let Some(at) = at else { continue };
                let roles = instance.memberships[at].grant.map(|grant| grant.roles);
                if roles.is_some_and(keeps) {
                    kept.push(instance.peer.clone());
                    continue;
                }
                let m = instance.memberships.swap_remove(at);
                dropped.push((instance.peer.clone(), m));
            }
        }
        Ok(Rotated {
            descriptor: next,
            pool,
            purges: changes.join || changes.read,
            moves: changes.join || changes.read || changes.write || changes.seal,
            kept,
            dropped,
        })
    }
}

/// What an app has in an encrypted pool after an instance proved it, which `may` serve some
/// triggers. From now on only members see what is there.
fn prove_triggers(
    registration: &mut Registration,
    pool: &PoolName,
    said: &Said<'_>,
    may: impl Fn(&TriggerSpec) -> bool,
) -> Vec<TriggerSpec> {
    let mut here = registration.sealed_in(pool).unwrap_or_default().to_vec();
    let new = said.triggers.iter();
    let new: Vec<_> = new.map(|spec| registration.with_schema(spec)).collect();
    let old = match (said.is_member, said.replace) {
        (true, _) => Vec::new(),
        (false, true) => here.clone(),
        (false, false) => new.clone(),
    };
    replace_sealed(&mut here, pool, &old, &new, may);
    let names: BTreeSet<_> = here.iter().map(|spec| &spec.name).collect();
    let outsides = registration.triggers.iter().filter_map(|spec| {
        let is_inside = said.is_inside && names.contains(&spec.name);
        outside(spec, is_inside, |name| name == pool)
    });
    registration.triggers = outsides.collect();
    registration.sealed.retain(|(name, _)| name != pool);
    registration.sealed.push((pool.clone(), here.clone()));
    here
}

/// The row of a pool that stays.
fn row<D: Driver>(name: &PoolName, entry: &PoolEntry<D>) -> PoolRow {
    let sealed = entry.sealed.as_ref();
    PoolRow {
        name: name.clone(),
        owner: entry.owner.clone(),
        policy: entry.policy.to_json().to_string(),
        properties: entry.properties.as_ref().map(Value::to_string),
        created: entry.created,
        is_durable: true,
        descriptor: sealed.map(|sealed| sealed.descriptor.as_bytes().to_vec()),
    }
}

/// The bytes of a descriptor on the wire.
fn bytes_of(said: &str) -> Result<Vec<u8>, Refusal> {
    let bytes = text::decode_within(said, DESCRIPTOR_BYTES_MAX);
    bytes.ok_or_else(refusals::not_a_descriptor)
}

fn refusal(error: StoreError) -> Refusal {
    match error {
        StoreError::StaleEpoch(_) => Refusal::new(Code::StaleEpoch, error.to_string()),
        StoreError::Layout(_) | StoreError::Unfit(_) => {
            Refusal::new(Code::BadMessage, error.to_string())
        }
    }
}

/// The event about a rotation.
pub(crate) fn rotated_event(name: &PoolName, descriptor: &Descriptor, is_member: bool) -> Value {
    let mut event = json!({
        "action": "event", "event": "pool_rotated", "pool": name, "epoch": descriptor.epoch(),
        "member": is_member,
    });
    if is_member {
        event["descriptor"] = text::encode(descriptor.as_bytes()).into();
    }
    event
}
