//! Accepts connections: which ones, how many, and the reply to refused ones.

use std::collections::HashMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use latzero_fabric::ledger::{Account, Users};
use latzero_protocol::{Code, Refusal, encode};

use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::{Socket, User};
use crate::startup::descriptors::SpareDescriptor;
use crate::tls::Tls;

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

    fn accept(&self, tls: Option<&Tls>) -> io::Result<Socket> {
        match self {
            Listener::Tcp(listener) => listener.accept().and_then(|(stream, _)| match tls {
                None => Socket::tcp(stream),
                Some(tls) => Socket::tls(stream, &tls.acceptor()),
            }),
            Listener::Unix(listener) => listener
                .accept()
                .and_then(|(stream, _)| Socket::unix(stream)),
        }
    }
}

/// The origin of a connection.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) user: User,
    pub(crate) account: Arc<Account>,
}

/// This share of the connections is reserved for the server's user and administrators, and a single
/// untrusted user may not use this share of the rest.
const RESERVED_PART: usize = 8;

/// The most connections that are reserved for the server's own user and administrators.
const RESERVED_MAX: usize = 64;

/// The number of connections without a handshake, by user, which is bounded.
#[derive(Debug, Default)]
pub(crate) struct Unauthenticated {
    waiting: HashMap<User, usize>,
    total: usize,
    /// Connections of each user, after the handshake as before.
    open: HashMap<User, usize>,
    users: Users<User>,
}

impl Unauthenticated {
    /// Counts a new connection, or refuses it. Untrusted users leave room for the server's own user
    /// and administrators, and each of them leaves room for the others.
    fn admit(&mut self, user: User, shared: &ServerState) -> Result<(), Refusal> {
        let limits = shared.settings().limits.clone();
        let refuse = |count: usize, what: &str, limit: &str| {
            let message = format!("{count} connections {what} ({limit}); try again later");
            Err(Refusal::new(Code::Overloaded, message))
        };
        let places = |max: usize| match user.is_trusted() {
            true => (max, max),
            false => {
                let all = max - (max / RESERVED_PART).clamp(1, RESERVED_MAX).min(max - 1);
                (all, all - all / RESERVED_PART)
            }
        };
        let of_user = |of: &HashMap<User, usize>| of.get(&user).copied().unwrap_or(0);
        // A reload can change it, but never beyond the number of descriptors.
        let max = shared.config.machine.shares(&limits).connections;
        let limit = if max < limits.connections_max {
            "the limit on descriptors, RLIMIT_NOFILE"
        } else {
            "limits.connections_max"
        };
        let (all, own) = places(max);
        let open = shared.books.stats.connections.load(Relaxed);
        if open >= all {
            return refuse(open, "are open", limit);
        }
        let open = of_user(&self.open);
        if open >= own {
            return refuse(open, "of your user are open", limit);
        }
        let (all, _) = places(limits.connections_unauthenticated_max);
        if self.total >= all {
            let limit = "limits.connections_unauthenticated_max";
            return refuse(self.total, "have not completed their handshake", limit);
        }
        let waiting = of_user(&self.waiting);
        if waiting >= limits.connections_unauthenticated_per_user_max {
            let limit = "limits.connections_unauthenticated_per_user_max";
            return refuse(
                waiting,
                "of your user have not completed their handshake",
                limit,
            );
        }
        *self.waiting.entry(user).or_default() += 1;
        *self.open.entry(user).or_default() += 1;
        self.total += 1;
        Ok(())
    }

    /// A connection has completed its handshake, or ended without one.
    pub(crate) fn leave(&mut self, user: User) {
        if count_down(&mut self.waiting, user) {
            self.total -= 1;
        }
    }

    /// A connection ended.
    fn close(&mut self, user: User) {
        count_down(&mut self.open, user);
    }
}

/// Removes one from a user's count; false if there was none.
fn count_down(of: &mut HashMap<User, usize>, user: User) -> bool {
    let Some(count) = of.get_mut(&user) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        of.remove(&user);
    }
    true
}

/// The result of one attempt to accept.
pub(crate) enum Accepted {
    /// A connection.
    Peer(Arc<Peer>, Origin),
    /// A client that was refused and may retry later.
    Refused,
    /// No connection waits.
    Nobody,
    /// The system refuses; wait before the next attempt.
    Failed(io::Error),
}

/// Removes an accepted connection from the counts.
pub(crate) fn count_out(user: User, shared: &ServerState) {
    shared.unauthenticated().close(user);
    shared.books.stats.connections.fetch_sub(1, Relaxed);
    match user {
        User::Uid(_) => shared.books.stats.connections_unix.fetch_sub(1, Relaxed),
        _ => shared.books.stats.connections_tcp.fetch_sub(1, Relaxed),
    };
}

/// Accepts one connection.
pub(crate) fn accept(
    listener: &Listener,
    spare: &mut SpareDescriptor,
    shared: &ServerState,
) -> Accepted {
    let socket = match listener.accept(shared.access.tls.as_ref()) {
        Ok(socket) => socket,
        Err(error) => return failed(listener, spare, shared, error),
    };
    let user = socket.user();
    if let Err(refusal) = shared.unauthenticated().admit(user, shared) {
        shared.books.stats.connections_refused.fetch_add(1, Relaxed);
        let mut reply = Vec::new();
        encode::refusal(&mut reply, None, &refusal);
        // As much as fits without blocking: the server does not wait for a refused client.
        let _ = socket.write(&reply);
        return Accepted::Refused;
    }
    shared
        .books
        .stats
        .connections_accepted
        .fetch_add(1, Relaxed);
    // Counted here, so that connections on their way to other loops count for the next one.
    shared.books.stats.connections.fetch_add(1, Relaxed);
    match user {
        User::Uid(_) => shared.books.stats.connections_unix.fetch_add(1, Relaxed),
        _ => shared.books.stats.connections_tcp.fetch_add(1, Relaxed),
    };
    let ledger = &shared.core.context.ledger;
    let account = shared
        .unauthenticated()
        .users
        .account(user, user.is_trusted(), ledger);
    let peer = shared.new_peer(Some(socket), &account);
    Accepted::Peer(peer, Origin { user, account })
}

fn failed(
    listener: &Listener,
    spare: &mut SpareDescriptor,
    shared: &ServerState,
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
            // Without a free descriptor the client could not even be refused, and the listener
            // would stay readable forever.
            let sent_away = spare.lend(|| listener.accept(None).map(drop));
            if sent_away.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
                // accept(2) checks for a free descriptor before it checks for a waiting connection.
                return Accepted::Nobody;
            }
            shared.books.stats.connections_refused.fetch_add(1, Relaxed);
            Accepted::Failed(error)
        }
        _ => Accepted::Failed(error),
    }
}
