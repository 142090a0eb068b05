//! The ledger of everything that clients make the server hold.
//!
//! Each resource is reserved in the account of the client before anything is copied. Dropping the
//! [`Reservation`] releases it. Accounts form a tree: the server, its users, their apps, and the
//! connections of the apps. A reservation counts in every account up to the root, and each account
//! has a limit. So an untrusted user leaves room for others, whatever names it invents and however
//! many connections it opens. Counters are atomic, because several event loops share them; nothing
//! here waits.

use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use hashbrown::HashMap;
use latzero_protocol::{Code, Refusal};
use serde_json::{Map, Value};

use crate::limits::Limits;
use crate::now::Time;

/// What is counted: first bytes of memory, then numbers of objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Resource {
    /// Bytes of frames that have not arrived in full.
    Inbound,
    /// Bytes that wait to be written.
    Outbox,
    /// Bytes of parked calls, and of answers that wait for their callers.
    Parked,
    /// Bytes of answers stored for repeats.
    Repeats,
    /// Bytes of calls that may be given to another handler.
    Redelivery,
    /// Bytes of registrations.
    Registrations,
    /// Bytes of calls in flight, and of requests that wait for a memory block.
    Calls,
    /// Bytes of memory blocks that are in memory rather than in files.
    SharedBlocks,
    /// Parked calls and waiting answers.
    ParkedCalls,
    /// Pools.
    Pools,
    /// Memory blocks.
    BlockCount,
    /// Bytes of memory blocks, files included.
    Blocks,
    /// Attachments to memory blocks.
    Attachments,
    /// Subscriptions to changes of memory blocks.
    Subscriptions,
    /// Requests that wait for a memory block.
    Waits,
}

/// Resources that are bytes of memory.
const BYTES: usize = 8;

/// How many resources there are.
const RESOURCES: usize = 15;

/// The index of the total memory in an account.
const MEMORY: usize = RESOURCES;

impl Resource {
    const ALL: [Resource; RESOURCES] = [
        Resource::Inbound,
        Resource::Outbox,
        Resource::Parked,
        Resource::Repeats,
        Resource::Redelivery,
        Resource::Registrations,
        Resource::Calls,
        Resource::SharedBlocks,
        Resource::ParkedCalls,
        Resource::Pools,
        Resource::BlockCount,
        Resource::Blocks,
        Resource::Attachments,
        Resource::Subscriptions,
        Resource::Waits,
    ];

    fn is_memory(self) -> bool {
        (self as usize) < BYTES
    }

    /// Its name in `stats`.
    fn name(self) -> &'static str {
        match self {
            Resource::Inbound => "inbound_bytes",
            Resource::Outbox => "outbox_bytes",
            Resource::Parked => "parked_bytes",
            Resource::Repeats => "repeats_bytes",
            Resource::Redelivery => "redelivery_bytes",
            Resource::Registrations => "registration_bytes",
            Resource::Calls => "call_bytes",
            Resource::SharedBlocks => "shared_block_bytes",
            Resource::ParkedCalls => "parked",
            Resource::Pools => "pools",
            Resource::BlockCount => "blocks",
            Resource::Blocks => "block_bytes",
            Resource::Attachments => "attachments",
            Resource::Subscriptions => "subscriptions",
            Resource::Waits => "waits",
        }
    }

    /// Its name for people, and the setting that bounds it.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Resource::Inbound => ("bytes of unfinished frames", "memory_max"),
            Resource::Outbox => ("bytes that wait to be written", "outbox_total_bytes_max"),
            Resource::Parked => ("bytes of parked calls", "parked_bytes_max"),
            Resource::Repeats => ("bytes of answers kept for repeats", "memory_max"),
            Resource::Redelivery => ("bytes of calls kept for redelivery", "memory_max"),
            Resource::Registrations => ("bytes of registrations", "memory_max"),
            Resource::Calls => ("bytes of calls in flight", "memory_max"),
            Resource::SharedBlocks => ("bytes of shared blocks", "memory_max"),
            Resource::ParkedCalls => ("parked calls and answers", "parked_max"),
            Resource::Pools => ("pools", "pools_max"),
            // The limit on descriptors may allow fewer than the setting.
            Resource::BlockCount => ("memory blocks", "blocks_max, RLIMIT_NOFILE"),
            Resource::Blocks => ("bytes of memory blocks", "memory_bytes_max"),
            Resource::Attachments => ("attachments to blocks", "attachments_per_app_max"),
            Resource::Subscriptions => ("subscriptions to blocks", "subscriptions_per_app_max"),
            Resource::Waits => ("requests that wait for a block", "waits_max"),
        }
    }

    /// The error code if there is not enough: `overloaded` for resources that become free by
    /// themselves, so that a retry may succeed.
    fn code(self) -> Code {
        match self {
            Resource::Registrations
            | Resource::SharedBlocks
            | Resource::Pools
            | Resource::BlockCount
            | Resource::Blocks
            | Resource::Attachments
            | Resource::Subscriptions => Code::Quota,
            _ => Code::Overloaded,
        }
    }
}

/// The owner of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Server,
    User,
    App,
    Connection,
}

impl Owner {
    fn words(self) -> &'static str {
        match self {
            Owner::Server => "this server",
            Owner::User => "your user",
            Owner::App => "this app",
            Owner::Connection => "this connection",
        }
    }
}

/// The most of each resource, and of total memory, that an account of one kind may hold.
#[derive(Debug)]
struct Bounds {
    owner: Owner,
    /// The bounds of an account that may use everything.
    is_all: bool,
    max: [u64; RESOURCES + 1],
}

/// The bounds of every kind of account.
#[derive(Debug)]
struct Plan {
    trusted: Arc<Bounds>,
    stranger: Arc<Bounds>,
    app: Arc<Bounds>,
    connection: Arc<Bounds>,
}

/// The resources that one owner holds.
#[derive(Debug)]
pub struct Account {
    /// No two accounts share it; the server's own is 0.
    id: u64,
    bounds: Arc<Bounds>,
    parent: Option<Arc<Account>>,
    used: [AtomicU64; RESOURCES + 1],
}

/// The error if there is not enough of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full {
    what: Resource,
    owner: Owner,
    is_memory: bool,
    needed: u64,
    free: u64,
    max: u64,
}

impl Full {
    /// Whether the whole server has reached its limit, rather than one user, app or connection.
    #[must_use]
    pub fn is_of_server(&self) -> bool {
        self.owner == Owner::Server
    }
}

impl From<Full> for Refusal {
    fn from(full: Full) -> Refusal {
        let Full {
            what,
            owner,
            is_memory,
            needed,
            free,
            max,
        } = full;
        let (words, limit) = what.words();
        let limit = match (what, owner) {
            _ if is_memory => "memory_max",
            (Resource::Blocks, Owner::App) => "memory_bytes_per_app_max",
            (Resource::ParkedCalls, Owner::App) => "parked_per_app_max",
            (Resource::Parked, Owner::App) => "parked_bytes_per_app_max",
            (Resource::Waits, Owner::Connection) => "waits_per_connection_max",
            _ => limit,
        };
        let remedy = match what.code() {
            Code::Quota => "remove what is no longer needed, or raise the limit",
            _ => "try again later, or raise the limit",
        };
        let whose = owner.words();
        let message = format!(
            "this needs {needed} {words}, but only {free} of {max} are free for {whose} \
             (limits.{limit}); {remedy}"
        );
        Refusal::new(what.code(), message)
    }
}

impl Account {
    fn new(id: u64, bounds: &Arc<Bounds>, parent: Option<&Arc<Account>>) -> Arc<Account> {
        Arc::new(Account {
            id,
            bounds: Arc::clone(bounds),
            parent: parent.map(Arc::clone),
            used: Default::default(),
        })
    }

    /// How much of a resource its owner holds.
    #[must_use]
    pub fn used(&self, what: Resource) -> u64 {
        self.used[what as usize].load(Relaxed)
    }

    /// How much memory its owner holds.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.used[MEMORY].load(Relaxed)
    }

    /// The account of the user that it belongs to, or the server's own.
    #[must_use]
    pub fn user(self: &Arc<Self>) -> &Arc<Account> {
        let mut account = self;
        while let Owner::App | Owner::Connection = account.bounds.owner {
            let Some(parent) = &account.parent else { break };
            account = parent;
        }
        account
    }

    /// The account of the app that it belongs to, or itself if it has none: for what outlives a
    /// connection.
    #[must_use]
    pub fn app(self: &Arc<Self>) -> &Arc<Account> {
        match (self.bounds.owner, &self.parent) {
            (Owner::Connection, Some(parent)) => parent,
            _ => self,
        }
    }

    /// Its number, which no other account has.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether its user may hold only a share of each resource.
    #[must_use]
    pub fn is_stranger(&self) -> bool {
        self.bounds.owner == Owner::User && !self.bounds.is_all
    }

    /// Whether its parent is `parent`.
    pub(crate) fn is_under(&self, parent: &Arc<Account>) -> bool {
        self.parent
            .as_ref()
            .is_some_and(|own| Arc::ptr_eq(own, parent))
    }

    /// Reserves an amount of a resource.
    ///
    /// # Errors
    /// If this account or one above it has no room; nothing was reserved.
    pub fn reserve(self: &Arc<Self>, what: Resource, amount: u64) -> Result<Reservation, Full> {
        let mut hold = self.hold(what);
        hold.resize(amount)?;
        Ok(hold)
    }

    /// A reservation of nothing, which can grow.
    #[must_use]
    pub fn hold(self: &Arc<Self>, what: Resource) -> Reservation {
        Reservation {
            account: Arc::clone(self),
            what,
            amount: 0,
        }
    }

    /// The account, this one or one above it, that has no room for that much of a resource.
    #[must_use]
    pub fn lacking(self: &Arc<Self>, what: Resource, amount: u64) -> Option<&Arc<Account>> {
        let mut account = Some(self);
        while let Some(at) = account {
            if at.lacks(what, amount).is_some() {
                return Some(at);
            }
            account = at.parent.as_ref();
        }
        None
    }

    /// Whether it is that account, or below it.
    #[must_use]
    pub fn is_of(self: &Arc<Self>, other: &Arc<Account>) -> bool {
        let mut account = Some(self);
        while let Some(at) = account {
            if Arc::ptr_eq(at, other) {
                return true;
            }
            account = at.parent.as_ref();
        }
        false
    }

    /// Whether `amount` of a resource would have room.
    #[must_use]
    pub fn has_room(&self, what: Resource, amount: u64) -> bool {
        self.has_room_here(what, amount, |_| true)
    }

    /// Whether its owner, and the untrusted user that it belongs to, may hold that much more. The
    /// limit of the whole server is not checked.
    #[must_use]
    pub fn has_own_room(&self, what: Resource, amount: u64) -> bool {
        self.has_room_here(what, amount, |bounds| !bounds.is_all)
    }

    fn has_room_here(
        &self,
        what: Resource,
        amount: u64,
        is_asked: impl Fn(&Bounds) -> bool,
    ) -> bool {
        let mut account = Some(self);
        while let Some(at) = account {
            if is_asked(&at.bounds) && at.lacks(what, amount).is_some() {
                return false;
            }
            account = at.parent.as_deref();
        }
        true
    }

    /// The error for an account that has no room for that much more.
    fn lacks(&self, what: Resource, amount: u64) -> Option<Full> {
        let places = [what as usize, MEMORY];
        let places = &places[..1 + usize::from(what.is_memory())];
        places.iter().find_map(|&place| {
            let (used, max) = (self.used[place].load(Relaxed), self.bounds.max[place]);
            let free = max.saturating_sub(used);
            (amount > free).then_some(Full {
                what,
                owner: self.bounds.owner,
                is_memory: place == MEMORY,
                needed: amount,
                free,
                max,
            })
        })
    }

    fn add(&self, what: Resource, amount: u64) {
        let mut account = Some(self);
        while let Some(at) = account {
            at.used[what as usize].fetch_add(amount, Relaxed);
            if what.is_memory() {
                at.used[MEMORY].fetch_add(amount, Relaxed);
            }
            account = at.parent.as_deref();
        }
    }

    fn subtract(&self, what: Resource, amount: u64) {
        let mut account = Some(self);
        while let Some(at) = account {
            at.used[what as usize].fetch_sub(amount, Relaxed);
            if what.is_memory() {
                at.used[MEMORY].fetch_sub(amount, Relaxed);
            }
            account = at.parent.as_deref();
        }
    }
}

/// An amount of a resource, reserved until this is dropped.
#[derive(Debug)]
pub struct Reservation {
    account: Arc<Account>,
    what: Resource,
    amount: u64,
}

impl Reservation {
    /// The account that holds it.
    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// How much is held.
    #[must_use]
    pub fn amount(&self) -> u64 {
        self.amount
    }

    /// Whether there is room to hold that amount.
    #[inline]
    #[must_use]
    pub fn has_room(&self, amount: u64) -> bool {
        amount <= self.amount || self.account.has_room(self.what, amount - self.amount)
    }

    /// Changes the amount.
    ///
    /// # Errors
    /// If there is no room for the difference; the amount is unchanged.
    #[inline]
    pub fn resize(&mut self, amount: u64) -> Result<(), Full> {
        if amount > self.amount {
            let more = amount - self.amount;
            let mut account = Some(&*self.account);
            while let Some(at) = account {
                if let Some(full) = at.lacks(self.what, more) {
                    return Err(full);
                }
                account = at.parent.as_deref();
            }
        }
        self.force(amount);
        Ok(())
    }

    /// Changes the amount even if there is no room: for what already exists.
    #[inline]
    pub fn force(&mut self, amount: u64) {
        match amount.checked_sub(self.amount) {
            Some(0) => {}
            Some(more) => self.account.add(self.what, more),
            None => self.account.subtract(self.what, self.amount - amount),
        }
        self.amount = amount;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.force(0);
    }
}

/// The server's ledger.
#[derive(Debug)]
pub struct Ledger {
    root: Arc<Account>,
    earlier: Arc<Account>,
    plan: Plan,
    accounts: AtomicU64,
}

/// A connection may hold this part of all memory, and at least two frames: one that arrives and one
/// that is sent.
const CONNECTION_PART: u64 = 4;

/// An untrusted user may hold this part of every resource; the rest is for others.
const STRANGER_PART: u64 = 2;

/// A user that holds less than 1/8 of all outboxes counts as modest.
const MODEST_PART: u64 = 8;

/// Which part of the bytes that may wait to be written each user's answers leave to short errors.
const ERRORS_PART: u64 = 32;

/// This part of memory is reserved for answers and errors of work in progress; new work is refused.
const RESERVED_PART: u64 = 16;

impl Ledger {
    /// An empty ledger with these bounds.
    #[must_use]
    pub fn new(limits: &Limits) -> Ledger {
        let max = |what: Resource| match what {
            Resource::Outbox => limits.outbox_total_bytes_max as u64,
            Resource::Parked => limits.parked_bytes_max as u64,
            Resource::Repeats => limits.memory_max / 4,
            Resource::Registrations => limits.memory_max / 2,
            Resource::Blocks => limits.memory_bytes_max,
            Resource::Waits => limits.waits_max as u64,
            Resource::Attachments | Resource::Subscriptions => u64::MAX,
            Resource::ParkedCalls => limits.parked_max as u64,
            // The built-in pools always exist.
            Resource::Pools => limits.pools_max as u64,
            Resource::BlockCount => limits.blocks_max as u64,
            Resource::Inbound | Resource::Redelivery | Resource::Calls | Resource::SharedBlocks => {
                limits.memory_max
            }
        };
        let bounds = |owner: Owner, max: &dyn Fn(Resource) -> u64, memory: u64| {
            let mut all = [memory; RESOURCES + 1];
            for what in Resource::ALL {
                all[what as usize] = max(what);
            }
            let is_all =
                matches!(owner, Owner::Server | Owner::User) && memory == limits.memory_max;
            Arc::new(Bounds {
                owner,
                is_all,
                max: all,
            })
        };
        let part = |what: Resource| max(what).div_ceil(STRANGER_PART);
        let per_app = |what: Resource| match what {
            Resource::ParkedCalls => limits.parked_per_app_max as u64,
            Resource::Parked => limits.parked_bytes_per_app_max as u64,
            Resource::Blocks => limits.memory_bytes_per_app_max,
            Resource::Attachments => limits.attachments_per_app_max as u64,
            Resource::Subscriptions => limits.subscriptions_per_app_max as u64,
            _ => u64::MAX,
        };
        let per_connection = |what: Resource| match what {
            Resource::Outbox => limits.outbox_total_bytes_max as u64 / 4 * 3,
            Resource::Waits => limits.waits_per_connection_max as u64,
            _ => u64::MAX,
        };
        let frames = 2 * limits.max_frame as u64 + (1 << 20);
        let connection = (limits.memory_max / CONNECTION_PART).max(frames);
        let all = limits.memory_max;
        let server = bounds(Owner::Server, &max, all);
        let (root, trusted) = (
            Account::new(0, &server, None),
            bounds(Owner::User, &max, all),
        );
        Ledger {
            earlier: Account::new(1, &trusted, Some(&root)),
            root,
            accounts: AtomicU64::new(2),
            plan: Plan {
                trusted,
                stranger: bounds(Owner::User, &part, all / STRANGER_PART),
                app: bounds(Owner::App, &per_app, u64::MAX),
                connection: bounds(Owner::Connection, &per_connection, connection),
            },
        }
    }

    /// The account of the whole server.
    #[must_use]
    pub fn all(&self) -> &Arc<Account> {
        &self.root
    }

    /// The account of state from an earlier run, whose users are no longer known.
    #[must_use]
    pub fn earlier(&self) -> &Arc<Account> {
        &self.earlier
    }

    /// An account for a user. A trusted user may use everything, an untrusted one a share.
    #[must_use]
    pub fn user(&self, is_trusted: bool) -> Arc<Account> {
        let bounds = if is_trusted {
            &self.plan.trusted
        } else {
            &self.plan.stranger
        };
        self.open(bounds, &self.root)
    }

    /// An account for an app of a user.
    #[must_use]
    pub fn app(&self, user: &Arc<Account>) -> Arc<Account> {
        self.open(&self.plan.app, user)
    }

    /// An account for a connection of a user or of an app.
    #[must_use]
    pub fn connection(&self, of: &Arc<Account>) -> Arc<Account> {
        self.open(&self.plan.connection, of)
    }

    fn open(&self, bounds: &Arc<Bounds>, parent: &Arc<Account>) -> Arc<Account> {
        let id = self.accounts.fetch_add(1, Relaxed);
        Account::new(id, bounds, Some(parent))
    }

    /// Whether more answers are stored for repeats than the limit allows.
    pub(crate) fn is_over_repeats(&self) -> bool {
        let what = Resource::Repeats;
        self.root.used(what) > self.root.bounds.max[what as usize]
            || self.root.memory() > self.root.bounds.max[MEMORY]
    }

    /// Whether memory is so short that new work is refused, and connections that hold much are
    /// closed.
    #[must_use]
    pub fn is_short(&self) -> bool {
        let short = |place: usize| {
            let (used, max) = (
                self.root.used[place].load(Relaxed),
                self.root.bounds.max[place],
            );
            used >= max - max / RESERVED_PART
        };
        short(MEMORY) || short(Resource::Outbox as usize)
    }

    /// Whether a user holds so few bytes that wait to be written that it does not cause a shortage
    /// of memory: its small messages are sent while connections of others are closed.
    pub(crate) fn is_modest(&self, account: &Arc<Account>) -> bool {
        let max = self.root.bounds.max[Resource::Outbox as usize];
        account.user().used(Resource::Outbox) < max / MODEST_PART
    }

    /// How much of its share a user's answers leave free, in bytes.
    pub(crate) fn kept_for_errors(&self) -> u64 {
        self.root.bounds.max[Resource::Outbox as usize] / ERRORS_PART
    }

    /// Whether connections must be closed to make room, because their incoming and outgoing bytes
    /// use up the memory.
    #[must_use]
    pub fn is_over_limit(&self) -> bool {
        let on_way = self.root.used(Resource::Inbound) + self.root.used(Resource::Outbox);
        self.is_short() && on_way >= self.root.bounds.max[Resource::Outbox as usize] / 4
    }

    /// How much is held of each resource, with the bound on memory.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut all = Map::new();
        for what in Resource::ALL {
            all.insert(what.name().into(), self.root.used(what).into());
        }
        all.insert("memory_bytes".into(), self.root.memory().into());
        all.insert("memory_max".into(), self.root.bounds.max[MEMORY].into());
        Value::Object(all)
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root.used.iter().all(|used| used.load(Relaxed) == 0)
    }
}

/// The incoming and outgoing bytes that a connection holds.
#[derive(Debug, Clone, Copy)]
pub struct Holding<K> {
    /// Which connection.
    pub key: K,
    /// How many bytes.
    pub bytes: u64,
    /// When it last received or sent something.
    pub since: Time,
}

/// A connection that holds fewer bytes than this is not closed.
const SHED_BYTES_MIN: u64 = 64 * 1024;

/// A connection that moved data within this time is not closed, in milliseconds, so that a large
/// new answer can be sent.
const SHED_AGE_MIN_MS: u64 = 1000;

/// The connection to close when memory is short: the one that holds the most for the longest.
pub fn victim<K>(now: Time, holdings: impl Iterator<Item = Holding<K>>) -> Option<K> {
    let age = |holding: &Holding<K>| now.since(holding.since).as_millis() as u64;
    holdings
        .filter(|holding| holding.bytes >= SHED_BYTES_MIN && age(holding) >= SHED_AGE_MIN_MS)
        .max_by_key(|holding| holding.bytes.saturating_mul(age(holding)))
        .map(|holding| holding.key)
}

/// The accounts of users that hold something or have a connection. `K` identifies a user.
#[derive(Debug)]
pub struct Users<K> {
    accounts: HashMap<K, Weak<Account>>,
}

impl<K> Default for Users<K> {
    fn default() -> Self {
        Users {
            accounts: HashMap::new(),
        }
    }
}

impl<K: Hash + Eq> Users<K> {
    /// A user's account.
    pub fn account(&mut self, user: K, is_trusted: bool, ledger: &Ledger) -> Arc<Account> {
        if let Some(account) = self.accounts.get(&user).and_then(Weak::upgrade) {
            return account;
        }
        if self.accounts.len() == self.accounts.capacity() {
            self.accounts
                .retain(|_, account| account.strong_count() > 0);
        }
        let account = ledger.user(is_trusted);
        self.accounts.insert(user, Arc::downgrade(&account));
        account
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(&Limits {
            memory_max: 1000,
            max_frame: 0,
            outbox_total_bytes_max: 400,
            parked_max: 10,
            parked_per_app_max: 4,
            ..Limits::default()
        })
    }

    #[test]
    fn a_hold_releases_its_reservation() {
        let ledger = ledger();
        let user = ledger.user(true);
        let connection = ledger.connection(&ledger.app(&user));
        let mut hold = connection.reserve(Resource::Inbound, 300).unwrap();
        hold.resize(100).unwrap();
        hold.resize(200).unwrap();
        assert_eq!((user.memory(), ledger.all().memory()), (200, 200));
        assert!(hold.resize(2000).is_err());
        assert_eq!(hold.amount(), 200);
        drop(hold);
        assert!(ledger.is_empty());
    }

    #[test]
    fn an_untrusted_user_can_use_half_of_everything() {
        let ledger = ledger();
        let (stranger, own) = (ledger.user(false), ledger.user(true));
        let mut held: Vec<Reservation> = Vec::new();
        // The number of its names and connections does not matter.
        let full = loop {
            let app = ledger.app(&stranger);
            match app.reserve(Resource::ParkedCalls, 1) {
                Ok(hold) => held.push(hold),
                Err(full) => break full,
            }
        };
        assert_eq!(held.len(), 5);
        let refusal = Refusal::from(full);
        assert_eq!(refusal.code, Code::Overloaded);
        assert!(
            refusal
                .message
                .contains("0 of 5 are free for your user (limits.parked_max)"),
            "{refusal}"
        );
        let app = ledger.app(&own);
        let fits = (0..10).take_while(|_| {
            let hold = app.reserve(Resource::ParkedCalls, 1);
            hold.map(|hold| held.push(hold)).is_ok()
        });
        assert_eq!(fits.count(), 4, "the bound of one app");
    }

    #[test]
    fn the_largest_oldest_holder_is_closed_and_never_a_fresh_answer() {
        let now = Time(100_000_000);
        let check = |holdings: &[(u64, u64)], expected: Option<usize>| {
            let holdings = holdings.iter().enumerate();
            let holdings = holdings.map(|(key, &(mib, age_ms))| Holding {
                key,
                bytes: mib << 20,
                since: Time(now.0 - age_ms * 1000),
            });
            assert_eq!(victim(now, holdings), expected);
        };
        check(&[(16, 900), (4, 5000), (4, 6000)], Some(2));
        check(&[(16, 5000), (4, 5000)], Some(0));
        check(&[(16, 900), (0, 60_000)], None);
    }

    #[test]
    fn the_memory_total_is_the_sum_of_its_kinds() {
        let ledger = ledger();
        let user = ledger.user(true);
        let held = [
            user.reserve(Resource::Outbox, 400).unwrap(),
            user.reserve(Resource::Redelivery, 500).unwrap(),
        ];
        assert!(!user.has_room(Resource::Inbound, 101));
        assert!(user.has_room(Resource::Inbound, 100));
        assert!(ledger.is_short(), "the outboxes are full");
        let full = user.reserve(Resource::Redelivery, 101).unwrap_err();
        assert!(Refusal::from(full).message.contains("limits.memory_max"));
        // What already exists is counted even beyond the bound.
        let mut forced = user.hold(Resource::Outbox);
        forced.force(300);
        assert_eq!(ledger.all().memory(), 1200);
        drop((held, forced));
        assert!(ledger.is_empty());
    }
}
