//! Taking connections in: who may come, how many, and what those hear who may not.

use std::collections::HashMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use latzero_protocol::{Code, Refusal, encode};

use crate::peer::Peer;
use crate::shared::Shared;
use crate::socket::{Socket, User};
use crate::startup::descriptors::SpareDescriptor;

/// A listening socket.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(crate) fn raw_fd(&self) -> RawFd {
        match self {
            Listener::Tcp(listener) => listener.as_raw_fd(),
            Listener::Unix(listener) => listener.as_raw_fd(),
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Tcp(listener) => listener
                .accept()
                .and_then(|(stream, _)| Socket::tcp(stream)),
            Listener::Unix(listener) => listener
                .accept()
                .and_then(|(stream, _)| Socket::unix(stream)),
        }
    }
}

/// Connections that have not had their handshake yet, by user: the crowd at the door is bounded.
#[derive(Debug, Default)]
pub(crate) struct Door {
    waiting: HashMap<User, usize>,
    total: usize,
}

impl Door {
    fn enter(&mut self, user: User, shared: &Shared) -> Result<(), Refusal> {
        let limits = &shared.settings().limits;
        let full = |what: &str, limit: &str, max: usize| {
            Refusal::new(
                Code::Overloaded,
                format!("{max} connections {what} ({limit}); wait and try again"),
            )
        };
        // Live with a reload, and never more than there are descriptors for.
        let max = shared.surroundings.shares(limits).connections;
        if shared.stats.connections.load(Relaxed) >= max {
            let limit = if max < limits.connections_max {
                "the limit on descriptors, RLIMIT_NOFILE"
            } else {
                "limits.connections_max"
            };
            return Err(full("are open", limit, max));
        }
        if self.total >= limits.connections_unauthenticated_max {
            let max = limits.connections_unauthenticated_max;
            return Err(full(
                "await their handshake",
                "limits.connections_unauthenticated_max",
                max,
            ));
        }
        let waiting = self.waiting.entry(user).or_default();
        if *waiting >= limits.connections_unauthenticated_per_user_max {
            let max = limits.connections_unauthenticated_per_user_max;
            return Err(full(
                "of one user await their handshake",
                "limits.connections_unauthenticated_per_user_max",
                max,
            ));
        }
        *waiting += 1;
        self.total += 1;
        Ok(())
    }

    /// A connection had its handshake, or ended without one.
    pub(crate) fn leave(&mut self, user: User) {
        if let Some(waiting) = self.waiting.get_mut(&user) {
            *waiting -= 1;
            if *waiting == 0 {
                self.waiting.remove(&user);
            }
            self.total -= 1;
        }
    }
}

/// What came of one attempt to accept.
pub(crate) enum Accepted {
    /// A connection.
    Peer(Arc<Peer>, User),
    /// Somebody who was told to come later.
    Refused,
    /// Nobody waits.
    Nobody,
    /// The system refuses; wait before the next attempt.
    Failed(io::Error),
}

/// Counts a connection out that was accepted.
pub(crate) fn count_out(user: User, shared: &Shared) {
    shared.stats.connections.fetch_sub(1, Relaxed);
    match user {
        User::Uid(_) => shared.stats.connections_unix.fetch_sub(1, Relaxed),
        _ => shared.stats.connections_tcp.fetch_sub(1, Relaxed),
    };
}

/// Accepts one connection.
pub(crate) fn accept(
    listener: &Listener,
    spare: &mut SpareDescriptor,
    shared: &Shared,
) -> Accepted {
    let socket = match listener.accept() {
        Ok(socket) => socket,
        Err(error) => return failed(listener, spare, shared, error),
    };
    let user = socket.user();
    if let Err(refusal) = shared.door().enter(user, shared) {
        shared.stats.connections_refused.fetch_add(1, Relaxed);
        let mut told = Vec::new();
        encode::refusal(&mut told, None, &refusal);
        // As much as fits at once: nobody waits for one who is sent away.
        let _ = socket.write(&told);
        return Accepted::Refused;
    }
    shared.stats.connections_accepted.fetch_add(1, Relaxed);
    // Counted here, so that those on their way to other loops count for the next one who comes.
    shared.stats.connections.fetch_add(1, Relaxed);
    match user {
        User::Uid(_) => shared.stats.connections_unix.fetch_add(1, Relaxed),
        _ => shared.stats.connections_tcp.fetch_add(1, Relaxed),
    };
    Accepted::Peer(shared.new_peer(Some(socket)), user)
}

fn failed(
    listener: &Listener,
    spare: &mut SpareDescriptor,
    shared: &Shared,
    error: io::Error,
) -> Accepted {
    let too_many =
        [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].map(rustix::io::Errno::raw_os_error);
    match error.raw_os_error() {
        _ if error.kind() == io::ErrorKind::WouldBlock => Accepted::Nobody,
        _ if matches!(
            error.kind(),
            io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
        ) =>
        {
            Accepted::Refused
        }
        Some(code) if too_many.contains(&code) => {
            // Without a descriptor the peer could not even be sent away, and the listener would stay ready for ever.
            let sent_away = spare.lend(|| listener.accept().map(drop));
            if sent_away.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                // accept(2) looks for a descriptor before it looks for who waits.
                return Accepted::Nobody;
            }
            shared.stats.connections_refused.fetch_add(1, Relaxed);
            Accepted::Failed(error)
        }
        _ => Accepted::Failed(error),
    }
}
