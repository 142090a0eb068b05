//! One connected stream, TCP or Unix, written to from any thread and never blocking.
//!
//! Everything that only Unix can do with a socket stands here; elsewhere the server knows bytes and errors.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use latzero_fabric::Transport;

/// A connected stream in non-blocking mode.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Who is at the other end, as far as the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum User {
    /// A user of this machine, by the Unix socket's peer credentials (unix(7), SO_PEERCRED).
    Uid(u32),
    /// An address.
    Address(IpAddr),
    /// The kernel did not say.
    Unknown,
}

impl Socket {
    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        // A message is written whole: waiting to fill a segment would only add latency.
        stream.set_nodelay(true)?;
        Ok(Socket::Tcp(stream))
    }

    pub(crate) fn unix(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        Ok(Socket::Unix(stream))
    }

    pub(crate) fn transport(&self) -> Transport {
        match self {
            Socket::Tcp(_) => Transport::Tcp,
            Socket::Unix(_) => Transport::Unix,
        }
    }

    pub(crate) fn user(&self) -> User {
        match self {
            Socket::Tcp(stream) => stream
                .peer_addr()
                .map_or(User::Unknown, |a| User::Address(a.ip())),
            Socket::Unix(stream) => match rustix::net::sockopt::socket_peercred(stream) {
                Ok(cred) => User::Uid(cred.uid.as_raw()),
                Err(_) => User::Unknown,
            },
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        match self {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).read(buf),
            Socket::Unix(stream) => (&*stream).read(buf),
        }
    }

    /// Writes what fits.
    pub(crate) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).write(buf),
            Socket::Unix(stream) => (&*stream).write(buf),
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that the other end was quicker.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}
