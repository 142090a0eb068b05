//! systemd: socket activation, and notifications of the server's state.
//!
//! Implements `sd_listen_fds(3)`, `sd_notify(3)` and `sd_watchdog_enabled(3)` in a few lines each,
//! so no library is needed.

use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

use super::StartupError;
use super::sockets::{BoundSocket, SocketFile};
use crate::settings::Environment;

/// The most sockets that are taken over.
const SOCKETS_MAX: usize = 64;

/// Sockets that systemd passed.
#[derive(Debug, Default)]
pub struct Activation {
    /// TCP listeners.
    pub tcp: Vec<TcpListener>,
    /// Unix stream listeners. Their files belong to systemd and stay.
    pub unix: Vec<BoundSocket>,
}

impl Activation {
    /// Takes over the sockets that systemd passed to this process (`LISTEN_PID`). It changes the
    /// environment, so that children do not take the same sockets. So call it before any other
    /// thread runs and before anything is opened.
    ///
    /// # Errors
    /// If one of them is neither a TCP nor a Unix stream socket that listens.
    pub fn of_process(environment: &Environment) -> Result<Activation, StartupError> {
        let mut activation = Activation::default();
        let count = passed(environment, std::process::id());
        if count == 0 {
            return Ok(activation);
        }
        let mut passed = ListenFd::from_env();
        for index in 0..count.min(passed.len()) {
            let bad = |cause: io::Error| StartupError::BadActivation {
                index,
                reason: cause.to_string(),
            };
            // A socket that is not of this family is kept for the other one.
            if let Ok(Some(listener)) = passed.take_tcp_listener(index) {
                let listens = socket_acceptconn(&listener).map_err(|cause| bad(cause.into()))?;
                check_listens(listens).map_err(bad)?;
                listener.set_nonblocking(true).map_err(bad)?;
                activation.tcp.push(listener);
            } else if let Some(listener) = passed.take_unix_listener(index).map_err(bad)? {
                let listens = socket_acceptconn(&listener).map_err(|cause| bad(cause.into()))?;
                check_listens(listens).map_err(bad)?;
                listener.set_nonblocking(true).map_err(bad)?;
                let address = listener.local_addr().map_err(bad)?;
                let path = address
                    .as_pathname()
                    .unwrap_or("(unnamed)".as_ref())
                    .to_owned();
                activation.unix.push(BoundSocket {
                    listener,
                    file: SocketFile::foreign(path),
                });
            }
        }
        Ok(activation)
    }
}

fn check_listens(listens: bool) -> io::Result<()> {
    if listens {
        Ok(())
    } else {
        Err(io::Error::other("it does not listen"))
    }
}

/// How many sockets the environment says were passed to process `pid`.
fn passed(environment: &Environment, pid: u32) -> usize {
    let number = |name| environment.var(name)?.to_str()?.parse::<usize>().ok();
    if number("LISTEN_PID") != Some(pid as usize) {
        return 0;
    }
    // A count above the limit cannot be meant for this process; trusting it would cost memory.
    number("LISTEN_FDS")
        .filter(|&count| count <= SOCKETS_MAX)
        .unwrap_or(0)
}

/// Reports the state of the server to systemd.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Notifier {
    /// The notifier for `$NOTIFY_SOCKET`; `None` if it is not set.
    ///
    /// # Errors
    /// If the variable holds no address, or there is no descriptor left.
    pub fn new(environment: &Environment) -> io::Result<Option<Notifier>> {
        let Some(name) = environment.var("NOTIFY_SOCKET") else {
            return Ok(None);
        };
        let address = match name.as_bytes() {
            // A leading @ stands for the zero byte of an abstract address.
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        // The server never blocks on systemd.
        socket.set_nonblocking(true)?;
        Ok(Some(Notifier { socket, address }))
    }

    /// Sends `state`: `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=…`.
    ///
    /// # Errors
    /// If it cannot be sent. The server continues; the caller may log it.
    pub fn notify(&self, state: &str) -> io::Result<()> {
        self.socket
            .send_to_addr(state.as_bytes(), &self.address)
            .map(drop)
    }
}

/// How long systemd waits between two `WATCHDOG=1` before it ends the server; `None` if it does
/// not watch. Send one at half of it.
#[must_use]
pub fn watchdog_interval(environment: &Environment) -> Option<Duration> {
    watchdog_of(environment, std::process::id())
}

fn watchdog_of(environment: &Environment, pid: u32) -> Option<Duration> {
    let number = |name| environment.var(name)?.to_str()?.parse::<u64>().ok();
    if environment.var("WATCHDOG_PID").is_some() && number("WATCHDOG_PID") != Some(pid.into()) {
        return None;
    }
    number("WATCHDOG_USEC")
        .filter(|&us| us > 0)
        .map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        pairs.iter().copied().collect()
    }

    #[test]
    fn sockets_are_only_taken_when_they_are_ours() {
        let check = |pairs: &[(&str, &str)], expected| {
            assert_eq!(passed(&environment(pairs), 42), expected, "{pairs:?}");
        };
        check(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "2")], 2);
        check(&[("LISTEN_PID", "41"), ("LISTEN_FDS", "2")], 0);
        check(&[("LISTEN_FDS", "2")], 0);
        check(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "-1")], 0);
        check(&[("LISTEN_PID", "42"), ("LISTEN_FDS", "2000000000")], 0);
        check(&[], 0);
        let none = Activation::of_process(&environment(&[])).unwrap();
        assert!(none.tcp.is_empty() && none.unix.is_empty());
    }

    #[test]
    fn notifications_reach_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let environment = environment(&[("NOTIFY_SOCKET", path.to_str().unwrap())]);
        Notifier::new(&environment)
            .unwrap()
            .unwrap()
            .notify("READY=1")
            .unwrap();
        let mut buffer = [0; 64];
        let length = systemd.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
        drop(systemd);
        Notifier::new(&environment)
            .unwrap()
            .unwrap()
            .notify("READY=1")
            .unwrap_err();
    }

    #[test]
    fn notifications_reach_an_abstract_address() {
        let name = format!("latzero-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let systemd = UnixDatagram::bind_addr(&address).unwrap();
        let environment = environment(&[("NOTIFY_SOCKET", &format!("@{name}"))]);
        Notifier::new(&environment)
            .unwrap()
            .unwrap()
            .notify("STOPPING=1")
            .unwrap();
        let mut buffer = [0; 64];
        let length = systemd.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STOPPING=1");
    }

    #[test]
    fn nobody_to_notify() {
        assert!(Notifier::new(&environment(&[])).unwrap().is_none());
        assert!(
            Notifier::new(&environment(&[("NOTIFY_SOCKET", "")]))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_watchdog() {
        let check = |pairs: &[(&str, &str)], expected: Option<u64>| {
            let expected = expected.map(Duration::from_micros);
            assert_eq!(watchdog_of(&environment(pairs), 42), expected, "{pairs:?}");
        };
        check(&[("WATCHDOG_USEC", "30000000")], Some(30_000_000));
        check(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "42")], Some(5));
        check(&[("WATCHDOG_USEC", "5"), ("WATCHDOG_PID", "43")], None);
        check(&[("WATCHDOG_USEC", "0")], None);
        check(&[], None);
    }
}
