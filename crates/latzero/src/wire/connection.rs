//! One connection: a socket left in blocking mode, and its handshake.
//!
//! Non-blocking calls pass `MSG_DONTWAIT` (recv(2)), so one thread can simply wait in `recv` while
//! others try to write. A receive timeout lets such a thread check its deadlines with one system
//! call per wakeup.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::frame::Accept;
use latzero_protocol::limits::{DEFAULT_PORT, FORWARD_SLACK, MAX_FRAME_DEFAULT};
use latzero_protocol::{Code, Ran};
use latzero_shm::fds;
use latzero_tls::Pin;
use rustix::event::{PollFlags, Timespec};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg, sockopt,
};
use serde::Deserialize;

use crate::error::Error;
use crate::face::builder::Config;
use crate::url::Endpoint;
use crate::wire::known_hosts;
use crate::wire::local;
use crate::wire::prove::{Talk, check_bound};
use crate::wire::sealed::SealedPool;
use crate::wire::tls::{Tls, wait};

/// How long a thread waits in `recv` before it checks its deadlines and for an interrupt.
pub(crate) const RECV_TIMEOUT: Duration = Duration::from_millis(100);

/// Most descriptors that one read can receive.
const DESCRIPTORS_MAX: usize = fds::DESCRIPTORS_MAX;

/// A connection whose handshake is done.
#[derive(Debug)]
pub(crate) struct Link {
    socket: OwnedFd,
    tls: Option<Tls>,
    pub(crate) epoch: u32,
    /// Its channel binding for proofs.
    pub(crate) binding: ChannelBinding,
    pub(crate) ack: Ack,
    /// Whether attachment frames may be used.
    pub(crate) attachments: bool,
    /// Whether file descriptors may be passed, in both directions.
    pub(crate) takes_descriptors: bool,
    /// Descriptors that arrived right after the handshake's acknowledgement.
    pub(crate) early_descriptors: Mutex<Vec<OwnedFd>>,
    /// The largest payload that the server accepts, in bytes.
    pub(crate) max_frame: usize,
    /// Bytes that arrived right after the handshake's acknowledgement.
    pub(crate) early: Mutex<Vec<u8>>,
}

/// The server's acknowledgement of the handshake.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Ack {
    status: String,
    pub(crate) instance: String,
    pub(crate) pools: Vec<String>,
    pub(crate) triggers: Vec<serde_json::Value>,
    pub(crate) rehydrated: bool,
    /// Absent if the registration is stored.
    pub(crate) stored: Option<bool>,
    features: Vec<String>,
    pub(crate) limits: AckLimits,
    error: Option<Box<serde_json::value::RawValue>>,
}

/// The server's limits.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AckLimits {
    max_frame: Option<usize>,
    pub(crate) max_in_flight: Option<usize>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Link {
    /// The frames that are accepted from the server: as large as other clients may send, plus what
    /// the server adds.
    pub(crate) fn accept(&self) -> Accept {
        Accept {
            max_frame: self.max_frame.saturating_add(FORWARD_SLACK),
            attachments: self.attachments,
        }
    }

    /// Sends as much as the kernel accepts without blocking.
    pub(crate) fn try_send(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        if let Some(tls) = &self.tls {
            return tls.send(self.as_fd(), bytes);
        }
        rustix::io::retry_on_intr(|| {
            rustix::net::send(
                &self.socket,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }

    /// Sends as much as the kernel accepts without blocking, with a descriptor at the first byte
    /// (unix(7), `SCM_RIGHTS`).
    pub(crate) fn try_send_with(
        &self,
        bytes: &[u8],
        descriptor: &OwnedFd,
    ) -> rustix::io::Result<usize> {
        let descriptors = [descriptor.as_fd()];
        rustix::io::retry_on_intr(|| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let has_room = control.push(SendAncillaryMessage::ScmRights(&descriptors));
            debug_assert!(has_room, "there is space for one");
            sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }

    /// How many bytes may have been sent although no send reported them.
    pub(crate) fn owed(&self) -> u64 {
        self.tls.as_ref().map_or(0, Tls::owed)
    }

    /// Receives available bytes and the descriptors that came with them; 0 is the end.
    pub(crate) fn try_recv(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        self.receive(buf, descriptors, RecvFlags::DONTWAIT)
    }

    /// Waits up to [`RECV_TIMEOUT`] for bytes.
    pub(crate) fn recv(&self, buf: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.receive(buf, descriptors, RecvFlags::empty())
    }

    fn receive(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        flags: RecvFlags,
    ) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            return tls.recv(self.as_fd(), buf, flags);
        }
        loop {
            let received = if !self.takes_descriptors {
                rustix::net::recv(&self.socket, &mut *buf, flags)
                    .map(|(n, _)| n)
                    .map_err(io::Error::from)
            } else if flags.contains(RecvFlags::DONTWAIT) {
                fds::try_recv_with_fds(&self.socket, buf, descriptors, DESCRIPTORS_MAX)
            } else {
                fds::recv_with_fds(&self.socket, buf, descriptors, DESCRIPTORS_MAX)
            };
            match received {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    // A waiting thread checks whether the signal ends its wait.
                    if !flags.contains(RecvFlags::DONTWAIT) {
                        return Err(io::ErrorKind::WouldBlock.into());
                    }
                }
                other => return other,
            }
        }
    }

    /// Whether there is data that polling the socket does not report, because it was already read.
    pub(crate) fn has_buffered(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::has_buffered)
    }

    /// Whether TLS has left something in the socket, as far as it knows.
    pub(crate) fn may_have_more(&self) -> bool {
        self.tls.as_ref().is_some_and(Tls::may_have_more)
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Sends all of it, for a connection that nobody else uses yet.
    pub(crate) fn send_all(&self, bytes: &[u8], deadline: Instant) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.try_send(rest) {
                Ok(n) => rest = &rest[n..],
                Err(rustix::io::Errno::AGAIN) => wait(self.as_fd(), PollFlags::OUT, deadline)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The cause of a failed read, if more is known than the error says.
    pub(crate) fn explain(&self, error: &io::Error) -> Option<Error> {
        self.tls.as_ref()?.refusal(error)
    }

    /// Ends the sending side.
    pub(crate) fn finish_sending(&self) {
        if let Some(tls) = &self.tls {
            tls.finish(self.as_fd());
        }
        // A socket that the peer closed is finished already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// Ends the connection for everyone who waits on it.
    pub(crate) fn end(&self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }
}

#[cfg(test)]
impl Link {
    /// A connection before the server's first message.
    pub(crate) fn of(socket: OwnedFd, tls: Tls) -> Link {
        Link {
            socket,
            tls: Some(tls),
            epoch: 1,
            binding: ChannelBinding::None,
            ack: Ack::default(),
            attachments: false,
            takes_descriptors: false,
            early_descriptors: Mutex::default(),
            max_frame: MAX_FRAME_DEFAULT,
            early: Mutex::default(),
        }
    }
}

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

/// `time` for `poll`.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    })
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
