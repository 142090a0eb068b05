//! A connection as everyone but its own loop sees it: where to append, and what it owes and is owed.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::outbox::Outbox;
use crate::socket::Socket;

/// One connection, shared between its loop and whoever sends to it.
#[derive(Debug)]
pub(crate) struct Peer {
    /// The loop that reads it.
    pub(crate) home: usize,
    /// Its token there; set once it is registered.
    pub(crate) token: AtomicU32,
    /// Where bytes go; the built-in app has none.
    pub(crate) socket: Option<Socket>,
    outbox: Mutex<Outbox>,
    /// Calls it made that are under way.
    pub(crate) in_flight: AtomicU32,
    /// Calls it serves that are under way.
    pub(crate) owed: AtomicU32,
    /// Its loop stopped reading because of its calls in flight. In one order with the two counts above: who ends a call
    /// on another loop sees the pause, or the pause sees the end.
    pub(crate) is_paused: AtomicBool,
    /// Its other end takes nothing more, for good.
    pub(crate) is_deaf: AtomicBool,
    /// The ticket of what was promised to it last; see [`crate::keeper`].
    pub(crate) last_promise: AtomicU64,
    /// When the kernel first took nothing more, in microseconds of the server's clock; 0 while it does.
    pub(crate) stalled_since: AtomicU64,
}

impl Peer {
    pub(crate) fn new(home: usize, socket: Option<Socket>) -> Arc<Peer> {
        Arc::new(Peer {
            home,
            token: AtomicU32::new(u32::MAX),
            socket,
            outbox: Mutex::new(Outbox::default()),
            in_flight: AtomicU32::new(0),
            owed: AtomicU32::new(0),
            is_paused: AtomicBool::new(false),
            is_deaf: AtomicBool::new(false),
            last_promise: AtomicU64::new(0),
            stalled_since: AtomicU64::new(0),
        })
    }

    pub(crate) fn outbox(&self) -> MutexGuard<'_, Outbox> {
        // A panic while appending is a bug that stops the server; nothing is to be saved from a poisoned lock.
        self.outbox
            .lock()
            .expect("no panic happens under the outbox lock")
    }

    /// Whether the other end of its Unix socket has closed, though what it sent before may still be unread.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.socket.as_ref().is_some_and(Socket::has_hung_up)
    }

    /// Whether its loop should leave further messages unread: it has all the calls in flight that it may have. One that
    /// owes answers is read on, since its answers may be what its own calls wait for.
    pub(crate) fn should_pause(&self, in_flight_max: u32) -> bool {
        self.in_flight.load(SeqCst) >= in_flight_max && self.owed.load(SeqCst) == 0
    }
}
