//! The interface through which the core uses its environment.

use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use latzero_crypto::proof::Exchange;
use latzero_protocol::memory::Access;
use latzero_protocol::message::AdminAction;
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};

use crate::effects::{Audit, Count, Effects};
use crate::in_flight::InFlight;
use crate::ledger::Ledger;
use crate::limits::Limits;
use crate::link::Link;
use crate::memory::{Numbers, StorageId};
use crate::outbox::{Bounds, Class, Sent};
use crate::pool::Pool;
use crate::registry::{Registry, View};
use crate::rows::StoreChange;
use crate::turn::Turn;

/// The transport of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// The Unix socket.
    Unix,
    /// Inside the server: the built-in app.
    BuiltIn,
}

/// What the core knows about its server.
#[derive(Debug)]
pub struct Context {
    /// The bounds.
    pub limits: Limits,
    /// The accounts of what clients make the server hold.
    pub ledger: Ledger,
    /// The bounds of each outbox.
    pub outbox: Bounds,
    /// The server's version.
    pub version: &'static str,
    /// The node's name.
    pub node: String,
    /// A random id of this run of the server, which proofs are bound to.
    pub instance: [u8; 16],
    /// A secret that survives restarts. It makes a name that is not an encrypted pool look like
    /// one.
    pub secret: [u8; 32],
    /// Whether administrators may prove themselves over plain TCP.
    pub admin_over_plain_tcp: bool,
    /// Whether proofs over plain TCP are refused.
    pub require_channel_binding: bool,
    /// Whether a client may read 0 as the server's process id, as in another PID namespace.
    pub allow_pidns: bool,
    /// Whether the server is shutting down and accepts no new calls.
    pub is_draining: AtomicBool,
}

impl Context {
    /// Whether the server is shutting down and accepts no new calls.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Relaxed)
    }
}

/// A report for people, as JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// The reply to `stats`.
    Stats,
    /// The reply to `health`.
    Health,
}

/// Bytes to write into a block.
#[derive(Debug, Clone, Copy)]
pub struct BlockWrite<'a> {
    /// The offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
    /// The version that the block must have.
    pub if_version: Option<u64>,
    /// The bytes that the block must have there now, as many as `data`.
    pub expected: Option<&'a [u8]>,
    /// How many of the block's other bytes may be copied from its newest version.
    pub copied_max: u64,
}

/// The result of a [`BlockWrite`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// The block's new version.
    Version(u64),
    /// The block has other bytes than expected; they, and its version.
    Differs(u64, Vec<u8>),
    /// Nothing was written: more would be copied than allowed.
    Slow,
}

impl Written {
    pub(crate) fn version(&self) -> Option<u64> {
        match self {
            Written::Version(version) => Some(*version),
            Written::Differs(..) | Written::Slow => None,
        }
    }
}

/// Who is notified that a row is on disk, or cannot be stored.
pub enum Promise<'a, D: Driver> {
    /// The session of a connection, in the order of its promises
    /// ([`crate::Session::handle_stored`]).
    Session(&'a D::Peer),
    /// The pool of the answer in the row ([`crate::DurableCalls::answer_stored`]). A row that
    /// cannot be stored is dropped, and the pool stores it again.
    Answer,
}

/// Whether a proof is good. It is slow, and needs nothing of the core.
pub type Check = Box<dyn FnOnce() -> bool + Send>;

/// A handle of a connection. Two handles are equal if they belong to the same connection.
pub trait Peer<D: Driver>: Clone + Eq {
    /// Locks what the core stores for the connection.
    fn link(&self) -> impl DerefMut<Target = Link<D>>;

    /// The calls that it has in flight.
    fn in_flight(&self) -> &InFlight;
}

/// The bytes of blocks. Nothing here may block, except [`BlockStorage::read_block`] and
/// [`BlockStorage::write_block`], which are called without a lock.
pub trait BlockStorage {
    /// A descriptor of a block's storage.
    type Fd;

    /// A descriptor of a block's storage with this access, if there is one.
    fn descriptor(&self, storage: StorageId, access: Access) -> Option<Self::Fd>;

    /// A block's version as far as it is known without blocking. It is at least `noted`, which a
    /// client reported, if the block's header confirms that.
    fn block_version(&mut self, storage: StorageId, noted: Option<u64>) -> u64;

    /// Writes to a block's header the fence of its lock, and whether the exclusive lock is held.
    fn set_fence(&mut self, storage: StorageId, fence: u64, is_held: bool);

    /// Copies a range within a block from one version; returns the bytes and that version. The
    /// buffer is returned to [`Effects::buffers`]. An empty range only checks that the storage is
    /// valid.
    ///
    /// # Errors
    /// `version_conflict`, `contended`, `storage`.
    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal>;

    /// Writes bytes into a block, unless that copies too much.
    ///
    /// # Errors
    /// `out_of_range`, `version_conflict`, `contended`, `storage`; nothing was written.
    fn write_block(
        &mut self,
        storage: StorageId,
        write: &BlockWrite<'_>,
    ) -> Result<Written, Refusal>;

    /// The owner of a block of an earlier run whose memory clients may still offer; without a block
    /// name, the owner of any such block in the pool.
    fn awaited_owner(&self, pool: &PoolName, block: Option<&BlockId>) -> Option<AppId>;
}

/// Checks what clients prove, and bounds how often they may be wrong.
pub trait Verifier {
    /// A connection.
    type Peer;

    /// The server's own MAC for an exchange with an administrator, if the client's `mac` is
    /// correct. Takes the same time in either case.
    fn admin_mac(&self, exchange: &Exchange, mac: &[u8; 32]) -> Option<[u8; 32]>;

    /// Whether the user of a connection may send a proof now; false if too many were refused.
    fn may_prove(&mut self, asker: &Self::Peer) -> bool;

    /// Checks a proof of a connection. If it is wrong and `is_guess`, counts it as
    /// [`Verifier::note_refused`] does; what a member writes is no guess. Returns the result, or
    /// nothing if it comes later with [`crate::Session::handle_verified`]; until then the session
    /// takes no input.
    ///
    /// # Errors
    /// `overloaded`, if too many proofs wait to be checked.
    fn verify(
        &mut self,
        asker: &Self::Peer,
        check: Check,
        is_guess: bool,
    ) -> Result<Option<bool>, Refusal>;

    /// A proof of a connection's user was refused.
    fn note_refused(&mut self, asker: &Self::Peer);
}

/// The environment of the core: access to registry and pools, rows to store, and what only a server
/// knows; with [`BlockStorage`] and [`Verifier`]. It is called while a pool or the registry is
/// locked, so nothing here may block.
///
/// The server keeps pools behind mutexes and the simulator keeps them in a table. The core holds
/// one of them at a time, and never the registry together with a pool.
pub trait Driver: BlockStorage + Verifier<Peer: Peer<Self>> + Sized {
    /// A pool's handle.
    type Pool: Clone;

    /// The decisions that are still to be carried out.
    fn effects(&mut self) -> &mut Effects<Self>;

    /// What the core knows about its server.
    fn context(&self) -> &Arc<Context>;

    /// A handle of a new pool. Called while the registry is locked.
    fn new_pool(pool: Pool<Self>) -> Self::Pool;

    /// Runs `f` with the registry.
    fn with_registry<R>(
        turn: &mut Turn<'_, Self>,
        f: impl FnOnce(&mut Registry<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R;

    /// Runs `f` with one pool, then arms its deadline and starts the jobs that it requested for
    /// blocks.
    fn with_pool<R>(
        turn: &mut Turn<'_, Self>,
        pool: &Self::Pool,
        f: impl FnOnce(&mut Pool<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R;

    /// Runs `f` with the numbers that are never reused.
    fn with_numbers<R>(&mut self, f: impl FnOnce(&mut Numbers) -> R) -> R;

    /// Stores a row. `promise` says who is notified once the row is on disk or cannot be stored;
    /// without it, the change is retried until it is on disk.
    fn store(&mut self, change: StoreChange, promise: Option<Promise<'_, Self>>);

    /// Takes back the memory of a block of an earlier run, whose descriptor came with the current
    /// message, and adds the block to `pool` ([`crate::PoolBlocks::adopt`]).
    ///
    /// # Errors
    /// `no_block`, `bad_message`, `block_exists`, and those of [`crate::PoolBlocks::adopt`].
    fn reoffer(
        turn: &mut Turn<'_, Self>,
        pool: &Self::Pool,
        name: &PoolName,
        block: &BlockId,
    ) -> Result<(), Refusal>;

    /// A report about the server, with what the requesting client may see.
    fn report(turn: &mut Turn<'_, Self>, what: Report, view: &View<'_>) -> String;

    /// Random bytes, good enough to be a nonce; reproducible in the simulator.
    fn random(&mut self) -> [u8; 32];

    /// Carries out an administrator's request that concerns the driver; returns the reply's JSON
    /// text, or nothing if it is slow and the driver itself replies to `asker` under `id`.
    ///
    /// # Errors
    /// If the request fails.
    fn admin(
        &mut self,
        action: &AdminAction,
        asker: &Self::Peer,
        id: Option<&str>,
    ) -> Result<Option<String>, Refusal>;

    /// Reports an observation, to the audit log of a server or the checker of the simulator.
    fn observe(&mut self, what: Observed<'_, Self>);
}

/// What an observer can see.
pub enum Observed<'a, D: Driver> {
    /// A message for a connection and what happened to it, with the whole frame if it was appended.
    /// Events that are appended together are reported once, with all their frames.
    Message(&'a D::Peer, Class, Sent, &'a [u8]),
    /// So many further events were dropped with the one reported before.
    Lost(&'a D::Peer, u64),
    /// A connection will be closed.
    Closing(&'a D::Peer),
    /// A request was refused.
    Refused(Code),
    /// Something was counted.
    Counted(Count),
    /// Something for the audit log.
    Audit(&'a D::Peer, &'a Audit<'a>),
}
