//! A running server hands over to a new one: its listening sockets, so that nobody is turned away in between, and the memory
//! of shared blocks, so that it lives on even where no client holds it.
//!
//! The new process asks over the Unix socket (`hand_over`, for administrators). The old one answers with descriptors, drains as
//! it does for a stop, closes its database and ends; the new one waits for that end and starts. Connections that come in between
//! wait in the sockets' queues. What the old one knew is on disk.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use latzero_protocol::frame::{self, Accept};
use latzero_protocol::{BlockId, PoolName, address};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use crate::listener::Listener;
use crate::settings::{Environment, Settings, SocketChoice};
use crate::startup::StartupError;
use crate::startup::sockets::{BoundSocket, SocketFile};
use crate::startup::systemd::Activation;

/// Blocks whose descriptors travel with one message.
pub(crate) const BLOCKS_AT_ONCE: usize = 32;

/// How long the old server may take for one message.
const PATIENCE: Duration = Duration::from_secs(10);

/// Descriptors that are taken with one message.
const DESCRIPTORS_MAX: usize = 64;

/// The AppID under which a new server asks.
const APP: &str = "latzero-takeover";

/// What the old server gives up, as its reply lists it, with the descriptors in the same order.
pub(crate) fn listeners(listeners: &[Listener]) -> io::Result<(Value, Vec<Arc<OwnedFd>>)> {
    use std::os::fd::AsFd;
    let mut listed = Vec::new();
    let mut descriptors = Vec::new();
    for listener in listeners {
        let (what, fd) = match listener {
            Listener::Tcp(tcp) => (json!({"kind": "tcp"}), tcp.as_fd()),
            Listener::Unix(unix) => {
                let path = unix.local_addr()?.as_pathname().map(Path::to_owned);
                (json!({"kind": "unix", "path": path}), unix.as_fd())
            }
        };
        listed.push(what);
        descriptors.push(Arc::new(fd.try_clone_to_owned()?));
    }
    Ok((Value::Array(listed), descriptors))
}

/// What a new server got from the old one.
#[derive(Default)]
pub(crate) struct Inherited {
    /// Listening sockets that take the place of those that would be bound.
    pub(crate) sockets: Activation,
    /// Shared blocks, with a descriptor of each.
    pub(crate) blocks: Vec<(PoolName, BlockId, OwnedFd)>,
}

/// Asks the server of the data directory to hand over, and waits until it has ended; nothing where none runs.
///
/// # Errors
/// Where it refuses, does not understand, or does not end in time.
pub(crate) fn ask(
    settings: &Settings,
    environment: &Environment,
) -> Result<Option<Inherited>, StartupError> {
    let Some(stream) = connect(settings, environment) else {
        return Ok(None);
    };
    let failed = |reason: String| StartupError::TakeOver {
        data_dir: settings.data_dir.clone(),
        reason,
    };
    let mut old = Old {
        stream,
        received: Vec::new(),
        descriptors: VecDeque::new(),
    };
    let pid = rustix::net::sockopt::socket_peercred(&old.stream)
        .map_err(|error| failed(error.to_string()))?
        .pid;
    let ended = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.to_string()))?;
    let inherited = old
        .ask(settings)
        .map_err(|error| failed(error.to_string()))?;
    tracing::info!(
        pid = pid.as_raw_nonzero().get(),
        blocks = inherited.blocks.len(),
        "the server that ran hands over"
    );
    drop(old);
    // It gives running calls their time, and then some to close its database.
    let patience = settings.drain_timeout + PATIENCE;
    let limit = rustix::time::Timespec {
        tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let mut wait = [PollFd::new(&ended, PollFlags::IN)];
    match poll(&mut wait, Some(&limit)) {
        Ok(0) => Err(failed(format!(
            "it has not ended {} s after it handed over; see its log, or stop it with `latzero stop`",
            patience.as_secs()
        ))),
        Ok(_) => Ok(Some(inherited)),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn connect(settings: &Settings, environment: &Environment) -> Option<UnixStream> {
    let candidates = match &settings.socket {
        SocketChoice::Off => Vec::new(),
        SocketChoice::Path(path) => vec![path.clone()],
        SocketChoice::Auto => {
            let directory = settings.data_dir.canonicalize().ok()?;
            let runtime = environment.var("XDG_RUNTIME_DIR").map(Path::new);
            let uid = rustix::process::geteuid().as_raw();
            address::socket_candidates(&directory, runtime, uid)
        }
    };
    candidates
        .iter()
        .find_map(|path| UnixStream::connect(path).ok())
}

/// The connection to the old server.
struct Old {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Old {
    fn ask(&mut self, settings: &Settings) -> io::Result<Inherited> {
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let features = ["attachments", "fd_passing"];
        self.send(
            &json!({"action": "handshake", "app_id": APP, "transient": true, "features": features}),
        )?;
        let ack = self.receive()?;
        if ack["status"] != "ok" {
            return Err(refused(&ack));
        }
        self.send(&json!({"action": "hand_over", "id": "1"}))?;
        let reply = self.next(|message| message["in_reply_to"] == "1")?;
        if reply["status"] != "ok" {
            return Err(refused(&reply));
        }
        let mut inherited = Inherited::default();
        let listed = reply["response"]["listeners"].as_array().cloned();
        for listener in listed.unwrap_or_default() {
            let fd = self.descriptor()?;
            take_listener(&listener, fd, settings, &mut inherited.sockets)?;
        }
        let total = reply["response"]["blocks"].as_u64().unwrap_or(0);
        let mut taken = 0;
        while taken < total {
            let message = self.next(|message| message["event"] == "handed_over")?;
            for block in message["blocks"].as_array().into_iter().flatten() {
                let fd = self.descriptor()?;
                let text = |name: &str| block[name].as_str().unwrap_or_default();
                if let (Ok(pool), Ok(id)) =
                    (PoolName::new(text("pool")), BlockId::new(text("block_id")))
                {
                    inherited.blocks.push((pool, id, fd));
                }
                taken += 1;
            }
        }
        Ok(inherited)
    }

    fn send(&mut self, message: &Value) -> io::Result<()> {
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes());
        });
        self.stream.write_all(&out)
    }

    /// The next message that `is_it`; others are passed over.
    fn next(&mut self, is_it: impl Fn(&Value) -> bool) -> io::Result<Value> {
        loop {
            let message = self.receive()?;
            if is_it(&message) {
                return Ok(message);
            }
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        let accept = Accept {
            max_frame: 1 << 20,
            attachments: true,
        };
        loop {
            let decoded = frame::decode(&self.received, accept)
                .map_err(|_| io::Error::other("it does not speak as a server does"))?;
            if let Some((frame, used)) = decoded {
                let message = serde_json::from_slice(frame.json)?;
                self.received.drain(..used);
                return Ok(message);
            }
            let mut buffer = [0; 64 * 1024];
            let mut came = Vec::new();
            let n = latzero_shm::fds::recv_with_fds(
                &self.stream,
                &mut buffer,
                &mut came,
                DESCRIPTORS_MAX,
            )?;
            if n == 0 {
                return Err(io::Error::other("it ended before it had handed over"));
            }
            self.descriptors.extend(came);
            self.received.extend_from_slice(&buffer[..n]);
        }
    }

    fn descriptor(&mut self) -> io::Result<OwnedFd> {
        self.descriptors
            .pop_front()
            .ok_or_else(|| io::Error::other("a descriptor is missing"))
    }
}

fn refused(message: &Value) -> io::Error {
    let why = message["error"]["message"].as_str();
    io::Error::other(why.unwrap_or("it refuses").to_owned())
}

/// Takes a listening socket over where the new settings want one there too.
fn take_listener(
    listed: &Value,
    fd: OwnedFd,
    settings: &Settings,
    sockets: &mut Activation,
) -> io::Result<()> {
    match listed["kind"].as_str() {
        Some("tcp") => {
            let listener = TcpListener::from(fd);
            let port = listener.local_addr()?.port();
            if settings.port == 0 || settings.port == port {
                sockets.tcp.push(listener);
            }
        }
        Some("unix") => {
            let path = listed["path"].as_str().unwrap_or_default();
            let is_wanted = match &settings.socket {
                SocketChoice::Off => false,
                SocketChoice::Auto => true,
                SocketChoice::Path(wanted) => wanted.as_os_str() == path,
            };
            if is_wanted {
                sockets.unix.push(BoundSocket {
                    listener: UnixListener::from(fd),
                    file: SocketFile::taken_over(path.into()),
                });
            }
        }
        _ => {}
    }
    Ok(())
}
