//! The interface through which the core uses its environment.

use std::ops::DerefMut;
use std::sync::Arc;

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
use crate::prng::Prng;
use crate::registry::{Registry, View};
use crate::rows::StoreChange;
use crate::turn::Turn;

/// How a connection came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// The Unix socket.
    Unix,
    /// Inside the server: the built-in app.
    BuiltIn,
}

/// What the core knows of the server that it is part of.
#[derive(Debug)]
pub struct Context {
    /// The bounds.
    pub limits: Limits,
    /// What clients make the server hold.
    pub ledger: Ledger,
    /// The bounds of each outbox.
    pub outbox: Bounds,
    /// The server's version.
    pub version: &'static str,
    /// The node's name.
    pub node: String,
    /// Drawn at each start: proofs are bound to it.
    pub instance: [u8; 16],
    /// What makes names that are no encrypted pool's look like one, the same over restarts.
    pub secret: [u8; 32],
    /// Whether administrators may prove themselves over plain TCP.
    pub admin_over_plain_tcp: bool,
    /// Whether proofs over plain TCP are refused.
    pub require_channel_binding: bool,
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
    /// Where they begin.
    pub offset: u64,
    /// The bytes.
    pub data: &'a [u8],
    /// The version that the block must have.
    pub if_version: Option<u64>,
    /// The bytes that must be there now, as many as `data`.
    pub expected: Option<&'a [u8]>,
}

/// What became of a [`BlockWrite`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Written {
    /// The block's new version.
    Version(u64),
    /// The block has other bytes than expected; they, and its version.
    Differs(u64, Vec<u8>),
}

impl Written {
    pub(crate) fn version(&self) -> Option<u64> {
        match self {
            Written::Version(version) => Some(*version),
            Written::Differs(..) => None,
        }
    }
}

/// Who hears that a row is on disk, or that it can't be stored.
pub enum Promise<'a, D: Driver> {
    /// The session of a connection, in the order of its promises
    /// ([`crate::Session::handle_stored`]).
    Session(&'a D::Peer),
    /// The pool of the answer that the row holds ([`crate::Pool::answer_stored`]). A row that
    /// can't be stored is given up: the pool stores it again.
    Answer,
}

/// Whether a proof is good. It takes long, and needs nothing of the core.
pub type Check = Box<dyn FnOnce() -> bool + Send>;

/// A connection's handle. Two handles are equal if they are of the same connection.
pub trait Peer<D: Driver>: Clone + Eq {
    /// What the core keeps of the connection, for this caller alone and for a moment.
    fn link(&self) -> impl DerefMut<Target = Link<D>>;

    /// Its own calls in flight.
    fn in_flight(&self) -> &InFlight;
}

/// The environment of the core: access to registry and pools, bytes of blocks, rows to keep, and
/// what only a server knows. Called while a pool or the registry is locked, so nothing here may
/// wait, but for [`Driver::read_block`] and [`Driver::write_block`], which are called with nothing
/// locked.
///
/// The server keeps pools behind mutexes and the simulator keeps them in a table. The core holds
/// one of them at a time, and never the registry together with a pool.
pub trait Driver: Sized {
    /// A connection.
    type Peer: Peer<Self>;
    /// A pool's handle.
    type Pool: Clone;
    /// A descriptor of a block's storage.
    type Fd;

    /// What was decided and is still to be done.
    fn effects(&mut self) -> &mut Effects<Self>;

    /// What the core knows of its server.
    fn context(&self) -> &Arc<Context>;

    /// Whether the server is shutting down and accepts no new calls.
    fn is_draining(&self) -> bool;

    /// A handle of a new pool. Called while the registry is held.
    fn new_pool(pool: Pool<Self>) -> Self::Pool;

    /// Runs `f` with the registry.
    fn with_registry<R>(
        turn: &mut Turn<'_, Self>,
        f: impl FnOnce(&mut Registry<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R;

    /// Runs `f` with one pool, then arms its deadline and carries out what it asked for about
    /// blocks.
    fn with_pool<R>(
        turn: &mut Turn<'_, Self>,
        pool: &Self::Pool,
        f: impl FnOnce(&mut Pool<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R;

    /// Runs `f` with the numbers that are given once.
    fn with_numbers<R>(&mut self, f: impl FnOnce(&mut Numbers) -> R) -> R;

    /// Stores a row. With `promise`, that is kept once the row is on disk or can't be stored;
    /// without it, the change is retried until it is on disk.
    fn store(&mut self, change: StoreChange, promise: Option<Promise<'_, Self>>);

    /// A descriptor of a block's storage with this access, if there is one.
    fn descriptor(&self, storage: StorageId, access: Access) -> Option<Self::Fd>;

    /// A block's version, as far as it is known without waiting; at least `noted`, which a client
    /// reported, if the block itself agrees.
    fn block_version(&mut self, storage: StorageId, noted: Option<u64>) -> u64;

    /// Writes the fence of a block's lock where its writers look, and whether anybody holds it
    /// alone.
    fn set_fence(&mut self, storage: StorageId, fence: u64, is_held: bool);

    /// A copy of a block's bytes in a range that it has, of one version, which is returned. The
    /// buffer goes back to [`Effects::buffers`]. An empty range only checks that the storage is
    /// sound.
    ///
    /// # Errors
    /// `version_conflict`, `contended`, `storage`.
    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal>;

    /// Writes bytes into a block.
    ///
    /// # Errors
    /// `out_of_range`, `version_conflict`, `contended`, `storage`: nothing was written then.
    fn write_block(
        &mut self,
        storage: StorageId,
        write: &BlockWrite<'_>,
    ) -> Result<Written, Refusal>;

    /// Takes back the memory of a block that an earlier run made, whose descriptor came with the
    /// message that is being handled; the block is in `pool` then ([`Pool::adopt_block`]).
    ///
    /// # Errors
    /// `no_block`, `bad_message`, `block_exists`, and as [`Pool::adopt_block`].
    fn reoffer(
        turn: &mut Turn<'_, Self>,
        pool: &Self::Pool,
        name: &PoolName,
        block: &BlockId,
    ) -> Result<(), Refusal>;

    /// The owner of the memory that is awaited back from an earlier run under that name; without a
    /// block, of any in the pool.
    fn awaited_owner(&self, pool: &PoolName, block: Option<&BlockId>) -> Option<AppId>;

    /// A report about the server, of what the asking client may see.
    fn report(turn: &mut Turn<'_, Self>, what: Report, view: &View<'_>) -> String;

    /// Random bytes, good enough to be a nonce.
    fn nonce(&mut self) -> [u8; 32];

    /// An id that nobody can guess; a run that is to be repeated draws it from `prng`.
    fn fresh_id(&mut self, prng: &mut Prng) -> u64;

    /// The server's own MAC for an exchange with an administrator, where `mac` is the right one of
    /// the client. Takes the same time whatever the answer.
    fn admin_mac(&self, exchange: &Exchange, mac: &[u8; 32]) -> Option<[u8; 32]>;

    /// Whether the user of a connection may prove something now, or had too many proofs refused.
    fn may_prove(&mut self, asker: &Self::Peer) -> bool;

    /// Checks a proof of a connection, and counts it as [`Driver::note_refused`] does if it is not
    /// good. Returns the verdict, or nothing if it comes later: then
    /// [`crate::Session::handle_verified`] is told, and the session takes no input until it is.
    ///
    /// # Errors
    /// `overloaded`, if too many proofs wait to be checked.
    fn verify(&mut self, asker: &Self::Peer, check: Check) -> Result<Option<bool>, Refusal>;

    /// A proof of a connection's user was refused.
    fn note_refused(&mut self, asker: &Self::Peer);

    /// Carries out a request of an administrator that is not the core's own; returns the reply's
    /// JSON text, or nothing if it is slow and the driver itself replies to `asker` under `id`.
    ///
    /// # Errors
    /// If it can't be done.
    fn admin(
        &mut self,
        action: &AdminAction,
        asker: &Self::Peer,
        id: Option<&str>,
    ) -> Result<Option<String>, Refusal>;

    /// Shows an observer what happens: the audit log of a server, the checker of the simulator.
    fn observe(&mut self, what: Observed<'_, Self>);
}

/// Something to be seen from outside.
pub enum Observed<'a, D: Driver> {
    /// A message for a connection, and what happened to it: its whole frame if it was appended,
    /// else nothing.
    Message(&'a D::Peer, Class, Sent, &'a [u8]),
    /// A connection will be closed.
    Closing(&'a D::Peer),
    /// A request was refused.
    Refused(Code),
    /// Something was counted.
    Counted(Count),
    /// Something for the audit log.
    Audit(&'a D::Peer, &'a Audit<'a>),
}
