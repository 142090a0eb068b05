//! Waiting for a socket.

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;

use crate::interrupt;

/// How long a thread waits in `recv` before it checks its deadlines and for an interrupt.
pub(crate) const RECV_TIMEOUT: Duration = Duration::from_millis(100);

/// `time` for `poll`.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    })
}

/// Waits until a socket is ready, or for a while: whoever calls this looks again. Fails when the
/// time is over, or [`interruptible`](crate::blocking::interruptible) ends the wait.
pub(crate) fn wait(socket: BorrowedFd<'_>, what: PollFlags, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() || interrupt::is_due() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, HandshakeTimeout));
    }
    let mut fds = [PollFd::from_borrowed_fd(socket, what)];
    // One that fails or ends early is followed by another look.
    let _ = poll(
        &mut fds,
        Some(&timespec(
            left.clamp(Duration::from_millis(1), RECV_TIMEOUT),
        )),
    );
    Ok(())
}

/// The source of an error: something accepted the connection and did not answer the handshake in
/// time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandshakeTimeout;

impl std::fmt::Display for HandshakeTimeout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the server did not answer the handshake in time")
    }
}

impl std::error::Error for HandshakeTimeout {}
