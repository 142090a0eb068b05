//! The calls in progress in a pool, found by key, by their caller's id, and by their deadline.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

use compact_str::CompactString;
use hashbrown::{HashMap, HashTable};

use latzero_protocol::memory::Access;
use latzero_protocol::{AppId, CallId, Refusal};

use super::members::{Member, MemberKey, NOBODY};
use super::park::DurableCall;
use super::triggers::HandlerKey;
use super::{BlockKey, PoolInfo};
use crate::driver::Driver;
use crate::now::Time;
use crate::prng::Prng;
use crate::refusals;
use crate::slab::{Key, Slab};

/// One call in progress.
pub(super) struct Call {
    pub(super) caller: MemberKey,
    /// The user whose share it counts in: a stranger's.
    pub(super) user: Option<u64>,
    /// The caller's id; without one it wants no answer.
    pub(super) id: Option<CompactString>,
    pub(super) member: MemberKey,
    pub(super) handler: HandlerKey,
    pub(super) started: Time,
    pub(super) deadline: Time,
    /// Items that the handler may still send, if the caller set a window.
    pub(super) credit: Option<u64>,
    /// Blocks that its handler is attached to during the call.
    pub(super) blocks: Option<Box<[(BlockKey, Access)]>>,
    /// What redelivery to another handler needs.
    pub(super) durable: Option<Box<DurableCall>>,
    /// Its caller and its idempotency key.
    pub(super) repeat: Option<Box<(AppId, Box<str>)>>,
}

pub(super) struct Calls {
    /// The pool, for the ids of its calls.
    pool: u32,
    /// Distinguishes the ids from those of other runs of the server.
    epoch: u64,
    calls: Slab<Call>,
    /// Calls since the pool was created.
    total: u64,
    /// The places of calls with an id, by caller and id.
    by_id: HashTable<u32>,
    /// Deadlines in order. Ended calls stay until their deadline or the next sweep, so that ending
    /// a call is cheap.
    deadlines: BinaryHeap<Reverse<(Time, u32, u32)>>,
    hash_seed: u64,
    /// How many calls of each stranger are in progress.
    by_user: HashMap<u64, u32>,
    /// How many calls each caller has in progress at each handler.
    by_pair: HashMap<(MemberKey, MemberKey), u32>,
}

impl Calls {
    pub(super) fn new(pool: u32, prng: &mut Prng) -> Self {
        Calls {
            pool,
            epoch: prng.next_u64() >> 16,
            calls: Slab::default(),
            total: 0,
            by_id: HashTable::new(),
            deadlines: BinaryHeap::new(),
            hash_seed: prng.next_u64(),
            by_user: HashMap::new(),
            by_pair: HashMap::new(),
        }
    }

    /// How many calls of a stranger are in progress.
    pub(super) fn of_user(&self, user: u64) -> usize {
        self.by_user.get(&user).map_or(0, |&count| count as usize)
    }

    /// How many calls of one member another one is handling.
    pub(super) fn between(&self, caller: MemberKey, handler: MemberKey) -> u32 {
        self.by_pair.get(&(caller, handler)).copied().unwrap_or(0)
    }

    /// Whether the pool accepts one more call. The calls of one untrusted user leave half of the
    /// pool to others, and those of all untrusted users leave an eighth.
    pub(super) fn check_room<D: Driver>(
        &self,
        caller: Option<&Member<D>>,
        pool: &PoolInfo,
    ) -> Result<(), Refusal> {
        let (max, all) = (pool.limits.pending_max, self.len());
        let stranger = caller.filter(|m| m.is_stranger);
        let own = stranger.map_or(0, |m| self.of_user(m.user));
        let (most, whose) = match stranger {
            Some(_) if own >= max.div_ceil(2) => (own, "of your user"),
            Some(_) if all >= max - max / 8 => (all, "of all users"),
            _ if all >= max => (all, "of all users"),
            _ => return Ok(()),
        };
        Err(refusals::too_many_in_pool(&pool.name, most, whose, max))
    }

    fn count_in(&mut self, call: &Call) {
        if call.caller != NOBODY {
            if let Some(user) = call.user {
                *self.by_user.entry(user).or_default() += 1;
            }
            *self.by_pair.entry((call.caller, call.member)).or_default() += 1;
        }
    }

    fn count_out(&mut self, (caller, member, user): (MemberKey, MemberKey, Option<u64>)) {
        if caller != NOBODY {
            if let Some(user) = user {
                count_down(&mut self.by_user, user);
            }
            count_down(&mut self.by_pair, (caller, member));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.calls.len()
    }

    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The id of a call, as its handler receives it.
    #[inline]
    pub(super) fn id(&self, key: Key<Call>) -> CallId {
        CallId {
            epoch: self.epoch,
            pool: self.pool,
            slot: key.slot,
            generation: key.generation,
        }
    }

    /// The call that a handler knows by this id.
    #[inline]
    pub(super) fn by_id(&mut self, id: CallId) -> Option<(Key<Call>, &mut Call)> {
        let key = Key::new(id.slot, id.generation);
        let call = self.calls.at_mut(key).filter(|_| id.epoch == self.epoch);
        Some((key, call?))
    }

    /// The key that the next insertion gets.
    pub(super) fn next_key(&self) -> Key<Call> {
        self.calls.next_key()
    }

    pub(super) fn insert(&mut self, expected: Key<Call>, call: Call) {
        let (deadline, hash) = (
            call.deadline,
            call.id.as_deref().map(|id| self.hash(call.caller, id)),
        );
        self.count_in(&call);
        self.total += 1;
        let key = self.calls.insert(call);
        debug_assert_eq!(key, expected);
        if let Some(hash) = hash {
            let (calls, seed) = (&self.calls, self.hash_seed);
            self.by_id
                .insert_unique(hash, key.slot, |&slot| rehash(calls, seed, slot));
        }
        self.deadlines
            .push(Reverse((deadline, key.slot, key.generation)));
        // Each sweep costs about what was pushed since the last one: constant per call.
        if self.deadlines.len() > 2 * self.calls.len() + 1024 {
            let calls = &self.calls;
            self.deadlines.retain(|Reverse((_, slot, generation))| {
                calls.at(Key::new(*slot, *generation)).is_some()
            });
        }
    }

    pub(super) fn remove(&mut self, key: Key<Call>) -> Option<Call> {
        let call = self.calls.remove(key)?;
        self.count_out((call.caller, call.member, call.user));
        if let Some(id) = &call.id {
            let hash = self.hash(call.caller, id);
            if let Ok(entry) = self.by_id.find_entry(hash, |&slot| slot == key.slot) {
                entry.remove();
            }
        }
        Some(call)
    }

    /// Detaches a call from its caller, which has left: the caller's id no longer finds it.
    pub(super) fn detach(&mut self, key: Key<Call>) {
        let Some(call) = self.calls.at(key) else {
            return;
        };
        if let Some(id) = &call.id {
            let hash = self.hash(call.caller, id);
            if let Ok(entry) = self.by_id.find_entry(hash, |&slot| slot == key.slot) {
                entry.remove();
            }
        }
        let call = self.calls.at_mut(key).expect("just found");
        call.id = None;
        let counted = (call.caller, call.member, call.user);
        call.caller = NOBODY;
        self.count_out(counted);
    }

    pub(super) fn at(&self, key: Key<Call>) -> Option<&Call> {
        self.calls.at(key)
    }

    #[inline]
    pub(super) fn at_mut(&mut self, key: Key<Call>) -> Option<&mut Call> {
        self.calls.at_mut(key)
    }

    /// The call that `caller` named `id`.
    pub(super) fn find(&self, caller: MemberKey, id: &str) -> Option<Key<Call>> {
        let is_it = |&slot: &u32| {
            self.calls
                .in_slot(slot)
                .is_some_and(|(_, call)| call.caller == caller && call.id.as_deref() == Some(id))
        };
        let &slot = self.by_id.find(self.hash(caller, id), is_it)?;
        self.calls.in_slot(slot).map(|(key, _)| key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Key<Call>, &Call)> {
        self.calls.iter()
    }

    pub(super) fn from(&self, slot: u32) -> Option<(Key<Call>, &Call)> {
        self.calls.from(slot)
    }

    /// Bytes of the calls that may be given to another handler.
    pub(super) fn redelivery_bytes(&self) -> u64 {
        let durable = self.iter().filter_map(|(_, call)| call.durable.as_ref());
        let held = durable.filter_map(|durable| durable.held.as_ref());
        held.map(crate::ledger::Reservation::amount).sum()
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.deadlines
            .peek()
            .map(|Reverse((deadline, ..))| *deadline)
    }

    /// Removes and returns a call whose deadline has passed.
    pub(super) fn pop_due(&mut self, now: Time) -> Option<Key<Call>> {
        while let Some(&Reverse((deadline, slot, generation))) = self.deadlines.peek() {
            let key = Key::new(slot, generation);
            let live = self.calls.at(key).is_some();
            if live && deadline > now {
                return None;
            }
            self.deadlines.pop();
            if live {
                return Some(key);
            }
        }
        None
    }

    pub(super) fn check(&self) {
        let named = self.calls.iter().filter(|(_, c)| c.id.is_some()).count();
        assert_eq!(self.by_id.len(), named);
        let own = self
            .calls
            .iter()
            .filter(|(_, c)| c.caller != NOBODY)
            .count();
        let sum = |counts: u32, count: &u32| counts + count;
        let of_strangers = self.calls.iter().filter(|(_, c)| c.caller != NOBODY);
        let of_strangers = of_strangers.filter(|(_, c)| c.user.is_some()).count();
        assert_eq!(self.by_user.values().fold(0, sum) as usize, of_strangers);
        assert_eq!(self.by_pair.values().fold(0, sum) as usize, own);
        for (key, call) in self.calls.iter() {
            if let Some(id) = &call.id {
                assert_eq!(self.find(call.caller, id), Some(key));
            }
        }
        let due: BTreeSet<_> = self
            .deadlines
            .iter()
            .map(|Reverse((deadline, slot, generation))| (*slot, *generation, *deadline))
            .collect();
        let is_due =
            |key: Key<Call>, call: &Call| due.contains(&(key.slot, key.generation, call.deadline));
        assert!(self.calls.iter().all(|(key, call)| is_due(key, call)));
    }

    fn hash(&self, caller: MemberKey, id: &str) -> u64 {
        hash(self.hash_seed, caller, id)
    }
}

/// Decrements a count, and removes it at 0.
pub(super) fn count_down<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: K) {
    if let hashbrown::hash_map::Entry::Occupied(mut entry) = counts.entry(key) {
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

fn hash(seed: u64, caller: MemberKey, id: &str) -> u64 {
    let salt = seed ^ (u64::from(caller.slot) << 32 | u64::from(caller.generation));
    crate::prng::hash(salt, id.as_bytes())
}

fn rehash(calls: &Slab<Call>, seed: u64, slot: u32) -> u64 {
    let (_, call) = calls
        .in_slot(slot)
        .expect("only live calls are in the table");
    hash(seed, call.caller, call.id.as_deref().unwrap_or_default())
}
