//! What a session needs around it: exclusive access to the registry and to pools, and what only a server knows.

use latzero_protocol::message::AdminAction;
use latzero_protocol::{BlockId, PoolName, Refusal};

use crate::effects::Effects;
use crate::limits::Limits;
use crate::memory::StorageId;
use crate::pool::Pool;
use crate::registry::Registry;
use crate::time::Time;

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

/// The surroundings of a session. The server keeps pools behind mutexes and the simulator keeps them in a table; the
/// core only ever sees one of them at a time, and never the registry together with a pool.
pub trait Host: Sized {
    /// A connection.
    type Peer: Clone;
    /// A pool's handle.
    type Pool: Clone;
    /// What carries effects out.
    type Effects: Effects<Peer = Self::Peer>;

    /// The core's bounds.
    fn limits(&self) -> &Limits;

    /// The effects, where neither the registry nor a pool is held.
    fn effects(&mut self) -> &mut Self::Effects;

    /// Runs `f` with the registry.
    fn with_registry<R>(
        &mut self,
        f: impl FnOnce(&mut Registry<Self>, &mut Self::Effects) -> R,
    ) -> R;

    /// Runs `f` with one pool, and sees to its deadlines afterwards.
    fn with_pool<R>(
        &mut self,
        pool: &Self::Pool,
        f: impl FnOnce(&mut Pool<Self::Peer>, &mut Self::Effects) -> R,
    ) -> R;

    /// Makes a handle for a new pool. Called while the registry is held.
    fn new_pool(pool: Pool<Self::Peer>) -> Self::Pool;

    /// `now` as milliseconds since the Unix epoch.
    fn unix_ms(&self, now: Time) -> u64;

    /// The server's version and node name, for the handshake acknowledgement.
    fn identity(&self) -> (&str, &str);

    /// Whether the server is about to stop and takes no new calls.
    fn is_draining(&self) -> bool;

    /// The reply to `stats`, as JSON text.
    fn stats(&mut self, now: Time) -> String;

    /// The reply to `health`, as JSON text.
    fn health(&mut self, now: Time) -> String;

    /// Whether `token` is the admin token. Takes the same time whatever the answer.
    fn is_admin_token(&self, token: &str) -> bool;

    /// A copy of a block's bytes from `offset` on, of one version, which is returned. The buffer is to be given back with
    /// [`Host::recycle`].
    ///
    /// # Errors
    /// `version_conflict`, `contended`, `storage`. The range is one that the block has.
    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal>;

    /// Whether a block's storage is fit to be attached.
    ///
    /// # Errors
    /// `storage`, where it is corrupt.
    fn check_block(&mut self, storage: StorageId) -> Result<(), Refusal>;

    /// Takes the memory of a block back whose descriptor came with the message that is being handled, where it is the one
    /// that an earlier run made; the block is in `pool` then ([`Pool::adopt_block`]).
    ///
    /// # Errors
    /// `no_block`, `bad_message`, `block_exists`, and as [`Pool::adopt_block`].
    fn take_back(
        &mut self,
        now: Time,
        pool: &Self::Pool,
        name: &PoolName,
        block: &BlockId,
    ) -> Result<(), Refusal>;

    /// Takes a buffer back.
    fn recycle(&mut self, buffer: Vec<u8>);

    /// Writes bytes into a block; returns its new version.
    ///
    /// # Errors
    /// `out_of_range`, `version_conflict`, `contended`, `storage`: nothing was written then.
    fn write_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        data: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, Refusal>;

    /// Writes bytes into a block where it has the bytes expected; returns its version, and its bytes where they are
    /// others.
    ///
    /// # Errors
    /// As [`Host::write_block`].
    fn swap_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        expected: &[u8],
        data: &[u8],
    ) -> Result<(u64, Option<Vec<u8>>), Refusal>;

    /// Carries out a request for administrators that is not the core's own; returns the reply's JSON text, or nothing where
    /// it takes long and the host itself replies to `asker` under `id`.
    ///
    /// # Errors
    /// Where it can't be done.
    fn admin(
        &mut self,
        action: &AdminAction,
        asker: &Self::Peer,
        id: Option<&str>,
    ) -> Result<Option<String>, Refusal>;
}
