//! A connection as other loops see it: its outbox, and calls in flight in both directions.

use std::ops::DerefMut;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard};

use latzero_fabric::ledger::Account;
use latzero_fabric::{InFlight, Link};

use crate::host::IoHost;
use crate::peer_process::PeerProcess;
use crate::socket::Socket;

/// One connection, shared between its loop and the loops that send to it.
pub(crate) struct Peer {
    /// The loop that reads it.
    pub(crate) home: usize,
    /// Its token there; set once it is registered.
    pub(crate) token: AtomicU32,
    /// Its socket; the built-in app has none.
    pub(crate) socket: Option<Socket>,
    /// The process that opened the connection.
    pub(crate) process: PeerProcess,
    /// Whether that process has ended while others still have the socket.
    pub(crate) is_outlived: AtomicBool,
    link: Mutex<Link<IoHost>>,
    in_flight: InFlight,
    /// Whether it is not read for a while, because its user guesses.
    pub(crate) is_resting: AtomicBool,
    /// Whether its other end has permanently stopped accepting data.
    pub(crate) write_failed: AtomicBool,
    /// The ticket of its last pending reply; see [`crate::persistence`].
    pub(crate) last_promise: AtomicU64,
}

impl Peer {
    pub(crate) fn new(home: usize, socket: Option<Socket>, account: Arc<Account>) -> Arc<Peer> {
        Arc::new(Peer {
            home,
            token: AtomicU32::new(u32::MAX),
            process: socket.as_ref().map_or(PeerProcess::Remote, PeerProcess::of),
            is_outlived: AtomicBool::new(false),
            socket,
            link: Mutex::new(Link::new(account)),
            in_flight: InFlight::default(),
            is_resting: AtomicBool::new(false),
            write_failed: AtomicBool::new(false),
            last_promise: AtomicU64::new(0),
        })
    }

    pub(crate) fn link(&self) -> MutexGuard<'_, Link<IoHost>> {
        // A panic while appending is a bug that stops the server, so a poisoned lock is not
        // handled.
        self.link
            .lock()
            .expect("no panic happens under a link's lock")
    }

    /// Whether it is certain that nobody writes any more to memory that was mapped over this
    /// connection. Children that have its socket may have its mappings too; nothing is known about
    /// others.
    pub(crate) fn is_dead(&self) -> bool {
        self.process.is_dead() && !self.is_outlived.load(Relaxed)
    }

    /// Whether the other end of its Unix socket has closed, though what it sent before may still be
    /// unread.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.socket.as_ref().is_some_and(Socket::has_hung_up)
    }
}

impl latzero_fabric::Peer<IoHost> for Arc<Peer> {
    fn link(&self) -> impl DerefMut<Target = Link<IoHost>> {
        Peer::link(self)
    }

    fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }
}

impl PartialEq for Peer {
    fn eq(&self, other: &Peer) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Peer {}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("home", &self.home)
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
