//! What a session needs around it: exclusive access to the registry and to pools, and what only a server knows.

use latzero_protocol::Refusal;
use latzero_protocol::message::AdminAction;

use crate::effects::Effects;
use crate::limits::Limits;
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

    /// Carries out a request for administrators that is not the core's own; returns the reply's JSON text.
    ///
    /// # Errors
    /// Where it can't be done.
    fn admin(&mut self, action: &AdminAction) -> Result<String, Refusal>;
}
