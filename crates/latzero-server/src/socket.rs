//! One connected stream, TCP or Unix, written to from any thread and never blocking.
//!
//! Everything that only Unix can do with a socket stands here; elsewhere the server knows bytes and errors.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

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

    /// Reads what is there behind what `buf` holds, as far as its capacity goes.
    pub(crate) fn read_more(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        let room = rustix::buffer::spare_capacity(buf);
        let read = match self {
            Socket::Tcp(stream) => rustix::io::read(stream, room)?,
            Socket::Unix(stream) => rustix::io::read(stream, room)?,
        };
        Ok(read)
    }

    /// Writes what fits.
    pub(crate) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).write(buf),
            Socket::Unix(stream) => (&*stream).write(buf),
        }
    }

    /// Writes what fits, with descriptors that travel with the first byte (unix(7), SCM_RIGHTS).
    pub(crate) fn write_with(&self, buf: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<usize> {
        match self {
            _ if descriptors.is_empty() => self.write(buf),
            Socket::Tcp(_) => unreachable!("descriptors are only sent to who can take them"),
            Socket::Unix(stream) => {
                let descriptors: Vec<_> = descriptors.iter().map(|d| d.as_fd()).collect();
                latzero_shm::fds::send_with_fds(stream, buf, &descriptors)
            }
        }
    }

    /// Whether the process at the other end has surely ended. Its address space goes before its descriptors do
    /// (exit(2) in the kernel), so one whose socket has closed and that still has memory is alive, and may write to
    /// what it has mapped.
    pub(crate) fn is_process_dead(&self) -> bool {
        let Socket::Unix(stream) = self else {
            // Over TCP nothing is mapped.
            return true;
        };
        let Ok(cred) = rustix::net::sockopt::socket_peercred(stream) else {
            return false;
        };
        let statm = format!("/proc/{}/statm", cred.pid.as_raw_nonzero());
        match std::fs::read_to_string(statm) {
            Ok(pages) => pages.starts_with("0 "),
            Err(error) => {
                // Without /proc nobody is known to be dead.
                error.kind() == io::ErrorKind::NotFound
                    && std::path::Path::new("/proc/self").exists()
                    || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
            }
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
