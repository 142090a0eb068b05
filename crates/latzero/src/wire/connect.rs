//! Opening a connection: the socket, TLS, proofs and the handshake.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::frame::Accept;
use latzero_protocol::limits::{DEFAULT_PORT, FORWARD_SLACK, MAX_FRAME_DEFAULT};
use latzero_protocol::{Code, Ran};
use latzero_tls::Pin;
use rustix::net::sockopt;

use crate::config::Config;
use crate::error::Error;
use crate::url::Endpoint;
use crate::wire::known_hosts;
use crate::wire::link::{Ack, Link};
use crate::wire::local;
use crate::wire::prove::{Talk, check_bound};
use crate::wire::sealed::SealedPool;
use crate::wire::tls::Tls;
use crate::wire::wait::{HandshakeTimeout, RECV_TIMEOUT};

fn unreachable(place: &str, error: io::Error) -> Error {
    Error::new(
        Code::Disconnected,
        format!(
            "no server answers at {place}: {error}; start one with `latzero start`, or \
        correct the address"
        ),
    )
    .with_ran(Ran::No)
    .with_source(error)
}

/// Connects to a Unix socket. If the server does not accept connections, its queue fills up, and
/// connect(2) would wait without a limit.
fn unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(path)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                // Nothing reports when there is room again.
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::AGAIN) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, HandshakeTimeout));
            }
            Err(error) => return Err(error.into()),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// Opens a socket; true if it is a Unix one.
fn open(place: &Endpoint, timeout: Duration, has_keys: bool) -> Result<(OwnedFd, bool), Error> {
    let deadline = Instant::now() + timeout;
    let by_tcp = |host: &str, port| tcp(host, port, timeout).map(|socket| (socket, false));
    let in_the_clear = |host: &str, port| check_plain(host, port).and_then(|()| by_tcp(host, port));
    match place {
        Endpoint::Local => {
            let mut sockets = local::sockets().into_iter();
            match sockets.find_map(|path| unix(&path, deadline).ok()) {
                Some(socket) => Ok((socket, true)),
                // Another process that uses the port while the server is down would get the proofs.
                None if has_keys => Err(Error::new(
                    Code::Disconnected,
                    "no server answers on the Unix socket of this machine, and keys are not \
                    proved elsewhere unasked",
                )
                .with_ran(Ran::No)),
                None => in_the_clear("127.0.0.1", DEFAULT_PORT),
            }
        }
        Endpoint::Socket(path) => match unix(path, deadline) {
            Ok(socket) => Ok((socket, true)),
            Err(e) => Err(unreachable(&path.display().to_string(), e)),
        },
        Endpoint::Tcp(host, port) => in_the_clear(host, *port),
        Endpoint::Tls(host, port, _) => by_tcp(host, *port),
    }
}

/// Refuses plain TCP to a server that the user has trusted by its pin, because another server in
/// its place would not be noticed.
fn check_plain(host: &str, port: u16) -> Result<(), Error> {
    // If the file cannot be read, plain TCP is refused too.
    match known_hosts::find(host, port)? {
        None => Ok(()),
        Some(_) => Err(Error::new(
            Code::Downgrade,
            format!(
                "the server at {host}:{port} was trusted with `latzero trust`, so it is not \
                 spoken to without TLS; say `?tls` in the address"
            ),
        )
        .with_ran(Ran::No)),
    }
}

fn tcp(host: &str, port: u16, timeout: Duration) -> Result<OwnedFd, Error> {
    let place = format!("{host}:{port}");
    let addresses = (host, port)
        .to_socket_addrs()
        .map_err(|e| unreachable(&place, e))?;
    let mut last = io::Error::other("the name has no address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream
                    .set_nodelay(true)
                    .map_err(|e| unreachable(&place, e))?;
                return Ok(stream.into());
            }
            Err(e) => last = e,
        }
    }
    Err(unreachable(&place, last))
}

/// The pin of the server at `host`, as the server presents it to any client.
pub(crate) fn fetch_pin(host: &str, port: u16, timeout: Duration) -> Result<Pin, Error> {
    let deadline = Instant::now() + timeout;
    let socket = tcp(host, port, timeout)?;
    Tls::fetch_pin(socket.as_fd(), (host, port), deadline)
}

/// Connects and makes the handshake; blocks for at most `config.connect_timeout`.
pub(crate) fn connect(
    config: &Config,
    handshake: &str,
    epoch: u32,
    sealed: &[Arc<SealedPool>],
) -> Result<Link, Error> {
    let deadline = Instant::now() + config.connect_timeout;
    let has_keys = config.app_key.is_some() || !sealed.is_empty();
    let (socket, is_unix) = open(&config.url.place, config.connect_timeout, has_keys)?;
    let fault = |e: rustix::io::Errno| {
        Error::new(Code::Disconnected, format!("the handshake failed: {e}"))
            .with_ran(Ran::No)
            .with_source(e)
    };
    let tls = match &config.url.place {
        Endpoint::Tls(host, port, options) => Some(Tls::connect(
            socket.as_fd(),
            (host, *port),
            options,
            deadline,
        )?),
        Endpoint::Local | Endpoint::Socket(_) | Endpoint::Tcp(..) => None,
    };
    let binding = if let Some(tls) = &tls {
        tls.binding()?
    } else if is_unix {
        let server = sockopt::socket_peercred(&socket).map_err(fault)?;
        ChannelBinding::Unix {
            uid: server.uid.as_raw(),
            pid: server.pid.as_raw_pid().cast_unsigned(),
        }
    } else {
        ChannelBinding::None
    };
    if has_keys {
        check_bound(binding, config.unbound)?;
    }
    let mut link = Link {
        socket,
        tls,
        binding,
        epoch,
        ack: Ack::default(),
        attachments: false,
        // From the first byte on: messages right after the acknowledgement may have descriptors.
        takes_descriptors: is_unix,
        early_descriptors: Mutex::default(),
        max_frame: MAX_FRAME_DEFAULT,
        early: Mutex::default(),
    };
    let (app_id, unbound) = (config.url.app_id.as_str(), config.unbound);
    let mut talk = Talk::new(&link, deadline, MAX_FRAME_DEFAULT);
    if let Some(key) = &config.app_key {
        talk.prove_app(app_id, key, unbound)?;
    }
    talk.say(handshake)?;
    // No message precedes it.
    let ack: Ack = talk.hear(|json| {
        let no_server = |e| format!("the program at this address is not a LatZero server: {e}");
        let ack = serde_json::from_slice(json);
        ack.map(Some)
            .map_err(|e| Error::new(Code::Disconnected, no_server(e)).with_ran(Ran::No))
    })?;
    if ack.status != "ok" {
        let wire = ack.error.as_ref().map_or("", |e| e.get());
        return Err(Error::from_wire(wire).with_ran(Ran::No));
    }
    let max_frame = ack.limits.max_frame.unwrap_or(MAX_FRAME_DEFAULT);
    talk.accept(Accept {
        max_frame: max_frame.saturating_add(FORWARD_SLACK),
        attachments: ack.features.iter().any(|f| f == "attachments"),
    });
    for pool in sealed {
        talk.prove_pool(app_id, pool, unbound)?;
    }
    let (early, descriptors) = talk.finish();
    sockopt::set_socket_timeout(&link.socket, sockopt::Timeout::Recv, Some(RECV_TIMEOUT))
        .map_err(fault)?;
    link.attachments = ack.features.iter().any(|f| f == "attachments");
    link.takes_descriptors = ack.features.iter().any(|f| f == "fd_passing");
    link.early_descriptors = Mutex::new(descriptors);
    link.max_frame = max_frame;
    link.ack = ack;
    link.early = Mutex::new(early);
    Ok(link)
}
