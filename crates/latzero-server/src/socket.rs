//! A connected TCP or Unix stream that any thread can write to without blocking.
//!
//! Everything specific to Unix sockets is in this file; TLS is in [`tls`].

mod tls;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use latzero_crypto::proof::ChannelBinding;
use latzero_fabric::Transport;
use latzero_protocol::AppId;
use latzero_tls::server::Acceptor;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use tls::TlsSocket;

/// A connected stream in non-blocking mode.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsSocket>),
}

/// More descriptors of this user are in flight than may be open at once (unix(7), ETOOMANYREFS).
/// The bytes that they are sent with can be written when some of them have been received, by any
/// process. The kernel does not report when that is.
#[derive(Debug, thiserror::Error)]
#[error("too many descriptors are in flight")]
struct Crowded;

impl From<Crowded> for io::Error {
    fn from(crowded: Crowded) -> io::Error {
        io::Error::new(io::ErrorKind::WouldBlock, crowded)
    }
}

/// Whether a write that would block must be retried after some time, because the kernel will not
/// report when it is possible.
pub(crate) fn is_crowded(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn std::error::Error + Send + Sync>::is::<Crowded>)
}

/// The user at the other end, as far as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum User {
    /// A user of this machine, by the Unix socket's peer credentials (unix(7), SO_PEERCRED).
    Uid(u32),
    /// An address.
    Address(IpAddr),
    /// Unknown.
    Unknown,
}

impl User {
    /// Whether it is the server's own user, or the machine's administrator.
    pub(crate) fn is_trusted(self) -> bool {
        matches!(self, User::Uid(uid) if uid == 0 || uid == rustix::process::geteuid().as_raw())
    }

    /// Whether it is on this machine.
    pub(crate) fn is_of_this_machine(self) -> bool {
        match self {
            User::Uid(_) => true,
            User::Address(address) => address.is_loopback(),
            User::Unknown => false,
        }
    }

    /// The user of this machine, if the kernel reports it.
    pub(crate) fn uid(self) -> Option<u32> {
        match self {
            User::Uid(uid) => Some(uid),
            User::Address(_) | User::Unknown => None,
        }
    }

    /// The user of an address. All addresses of this machine are one user.
    fn at(address: IpAddr) -> User {
        let address = address.to_canonical();
        if address.is_loopback() {
            return User::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        User::Address(match address {
            IpAddr::V4(_) => address,
            // A client that has one address of a /64 has all of them (RFC 6177).
            IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        })
    }
}

impl Socket {
    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        // A message is written whole: waiting to fill a segment would only add latency.
        stream.set_nodelay(true)?;
        Ok(Socket::Tcp(stream))
    }

    pub(crate) fn tls(stream: TcpStream, acceptor: &Acceptor) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Socket::Tls(Box::new(TlsSocket::new(stream, acceptor)?)))
    }

    pub(crate) fn unix(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        Ok(Socket::Unix(stream))
    }

    pub(crate) fn transport(&self) -> Transport {
        match self {
            Socket::Tcp(_) | Socket::Tls(_) => Transport::Tcp,
            Socket::Unix(_) => Transport::Unix,
        }
    }

    pub(crate) fn user(&self) -> User {
        match self {
            Socket::Tcp(_) | Socket::Tls(_) => {
                let address = self.peer_addr();
                address.map_or(User::Unknown, |address| User::at(address.ip()))
            }
            Socket::Unix(stream) => match credentials(stream) {
                Ok((_, uid)) => User::Uid(uid),
                Err(_) => User::Unknown,
            },
        }
    }

    /// The address of the other end, if it has one.
    pub(crate) fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Socket::Tcp(stream) => stream.peer_addr().ok(),
            Socket::Tls(socket) => socket.stream().peer_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        match self {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Tls(socket) => socket.stream().as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).read(buf),
            Socket::Tls(socket) => socket.read(buf),
            Socket::Unix(stream) => (&*stream).read(buf),
        }
    }

    /// Reads available bytes and at most `most` descriptors that came with them. If there are more,
    /// all of them are closed and the read fails.
    pub(crate) fn read_with(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        most: usize,
    ) -> io::Result<usize> {
        match self {
            Socket::Tcp(_) | Socket::Tls(_) => self.read(buf),
            Socket::Unix(stream) => {
                latzero_shm::fds::try_recv_with_fds(stream, buf, descriptors, most)
            }
        }
    }

    /// Whether [`Socket::read_more`] can be used: records of TLS are decrypted elsewhere first.
    pub(crate) fn reads_in_place(&self) -> bool {
        !matches!(self, Socket::Tls(_))
    }

    /// Reads available bytes and appends them to `buf`, up to its capacity.
    pub(crate) fn read_more(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        let room = rustix::buffer::spare_capacity(buf);
        let read = match self {
            Socket::Tcp(stream) => rustix::io::read(stream, room)?,
            Socket::Tls(_) => unreachable!("the caller asks first"),
            Socket::Unix(stream) => rustix::io::read(stream, room)?,
        };
        Ok(read)
    }

    /// Writes as much as the socket accepts.
    pub(crate) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).write(buf),
            Socket::Tls(socket) => socket.write(buf),
            Socket::Unix(stream) => (&*stream).write(buf),
        }
    }

    /// Writes as much as the socket accepts, with descriptors at the first byte (unix(7),
    /// SCM_RIGHTS). If too many are already in flight it would block, which [`is_crowded`] reports.
    pub(crate) fn write_with(&self, buf: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<usize> {
        match self {
            _ if descriptors.is_empty() => self.write(buf),
            Socket::Tcp(_) | Socket::Tls(_) => {
                unreachable!("descriptors are sent only to clients that accept them")
            }
            Socket::Unix(stream) => {
                let descriptors: Vec<_> = descriptors.iter().map(|d| d.as_fd()).collect();
                latzero_shm::fds::send_with_fds(stream, buf, &descriptors).map_err(|error| {
                    match Errno::from_io_error(&error) {
                        Some(Errno::TOOMANYREFS) => Crowded.into(),
                        _ => error,
                    }
                })
            }
        }
    }

    /// Whether the other end has closed, though what it sent before may still be unread (poll(2),
    /// `POLLHUP`).
    pub(crate) fn has_hung_up(&self) -> bool {
        let none = PollFlags::empty();
        let mut look = match self {
            Socket::Tcp(stream) => [PollFd::new(stream, none)],
            Socket::Tls(socket) => [PollFd::new(socket.stream(), none)],
            Socket::Unix(stream) => [PollFd::new(stream, none)],
        };
        let now = Timespec::default();
        poll(&mut look, Some(&now)).is_ok() && look[0].revents().contains(PollFlags::HUP)
    }

    /// Whether a read of `n` bytes, where `room` could have been read, has emptied the socket
    /// (epoll(7)).
    pub(crate) fn is_drained(&self, n: usize, room: usize) -> bool {
        match self {
            Socket::Tcp(_) | Socket::Unix(_) => n < room,
            Socket::Tls(socket) => socket.is_drained(),
        }
    }

    /// Reads available bytes and discards them without decrypting.
    pub(crate) fn discard(&self, scratch: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(_) | Socket::Unix(_) => self.read(scratch),
            Socket::Tls(socket) => socket.read_raw(scratch),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Socket::Tls(_))
    }

    /// Whether the TLS handshake is in progress.
    pub(crate) fn is_handshaking(&self) -> bool {
        match self {
            Socket::Tcp(_) | Socket::Unix(_) => false,
            Socket::Tls(socket) => socket.is_handshaking(),
        }
    }

    /// Writes messages of TLS itself.
    pub(crate) fn flush(&self) {
        if let Socket::Tls(socket) = self {
            socket.flush();
        }
    }

    /// How much of the server's memory it uses, in bytes.
    pub(crate) fn held(&self) -> u64 {
        match self {
            Socket::Tcp(_) | Socket::Unix(_) => 0,
            Socket::Tls(socket) => socket.held() as u64,
        }
    }

    /// The result of the TLS handshake: the channel binding for proofs, and the AppIDs that the
    /// client's certificate names, if one was required.
    pub(crate) fn secured(&self) -> Option<(ChannelBinding, Option<Vec<AppId>>)> {
        match self {
            Socket::Tcp(_) | Socket::Unix(_) => None,
            Socket::Tls(socket) => socket.secured(),
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that the other end was quicker.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Tls(socket) => {
                socket.finish();
                socket.stream().shutdown(how)
            }
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}

/// The process and the user at the other end of a Unix socket (unix(7), SO_PEERCRED). The pid is 0
/// if the process is in a PID namespace that is not visible here; its user is still known.
pub(crate) fn credentials(socket: &impl AsFd) -> io::Result<(i32, u32)> {
    let found = getsockopt(socket, PeerCredentials)?;
    Ok((found.pid(), found.uid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_descriptors_on_their_way_are_waited_for() {
        let error: io::Error = Crowded.into();
        assert!(error.kind() == io::ErrorKind::WouldBlock && is_crowded(&error));
        let full: io::Error = Errno::AGAIN.into();
        assert!(full.kind() == io::ErrorKind::WouldBlock && !is_crowded(&full));
    }
}
