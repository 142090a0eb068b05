//! The new server's side: asks the old one, takes what it gives, waits for its end.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latzero_protocol::frame::{self, Accept};
use latzero_protocol::{BlockId, PoolName, address};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use super::DESCRIPTORS_MAX;
use crate::settings::{Environment, Settings, SocketChoice};
use crate::startup::StartupError;
use crate::startup::descriptors::raise_limit;
use crate::startup::lock::holder;
use crate::startup::sockets::{BACKLOG, BoundSocket, SocketFile};
use crate::startup::systemd::Activation;

/// How long the old server may take to give everything; and how long for its end, beyond what it gives running calls.
const PATIENCE: Duration = Duration::from_secs(10);

/// The AppID under which a new server asks.
const APP: &str = "latzero-takeover";

/// What a new server got from the old one.
#[derive(Default)]
pub(crate) struct Inherited {
    /// Listening sockets that take the place of those that would be bound.
    pub(crate) sockets: Activation,
    /// Shared blocks, with a descriptor of each.
    pub(crate) blocks: Vec<(PoolName, BlockId, OwnedFd)>,
    /// Files of sockets that this server does not want: gone when this is dropped.
    unwanted: Vec<SocketFile>,
}

/// Asks the server of the data directory to hand over, and waits until it has ended; nothing where none runs.
///
/// # Errors
/// Where it refuses, does not understand, or does not end in time.
pub(crate) fn ask(
    settings: &Settings,
    environment: &Environment,
) -> Result<Option<Inherited>, StartupError> {
    let failed = |reason: String| StartupError::TakeOver {
        data_dir: settings.data_dir.clone(),
        reason,
    };
    let candidates = candidates(settings, environment);
    let holder = holder(&settings.data_dir);
    // It may have been started with other settings than this one.
    let recorded = holder.as_ref().and_then(|holder| holder.record.as_ref());
    let recorded = recorded.into_iter().flat_map(|record| &record.addresses);
    let recorded = recorded.filter_map(|address| address.strip_prefix("unix:"));
    let stream = candidates
        .iter()
        .map(PathBuf::as_path)
        .chain(recorded.map(Path::new))
        .find_map(|path| UnixStream::connect(path).ok());
    let Some(stream) = stream else {
        let Some(holder) = &holder else {
            return Ok(None);
        };
        let pid = holder
            .pid
            .map_or_else(String::new, |pid| format!(" (pid {pid})"));
        return Err(failed(format!(
            "one runs{pid}, but not on a Unix socket, over which alone it could; stop it with `latzero stop`, and start without --takeover"
        )));
    };
    // It may have more blocks than a process usually has descriptors.
    raise_limit();
    let mut old = Old {
        stream,
        received: Vec::new(),
        descriptors: VecDeque::new(),
        deadline: Instant::now() + PATIENCE,
    };
    old.check_user()
        .map_err(|error| failed(error.to_string()))?;
    let given = old
        .ask(settings, &candidates)
        .map_err(|error| failed(error.to_string()))?;
    tracing::info!(
        pid = given.pid,
        blocks = given.inherited.blocks.len(),
        "the server that ran hands over"
    );
    // It gives running calls their time, and then some to close its database.
    let patience = given.drain_timeout + PATIENCE;
    if !old.wait_for_end(given.process.as_ref(), patience) {
        return Err(failed(format!(
            "it has not ended {} s after it handed over; see its log, or stop it with `latzero stop`",
            patience.as_secs()
        )));
    }
    Ok(Some(given.inherited))
}

/// Where the old server may listen.
fn candidates(settings: &Settings, environment: &Environment) -> Vec<PathBuf> {
    match &settings.socket {
        SocketChoice::Off => Vec::new(),
        SocketChoice::Path(path) => vec![path.clone()],
        SocketChoice::Auto => {
            let Ok(directory) = settings.data_dir.canonicalize() else {
                return Vec::new();
            };
            let runtime = environment.var("XDG_RUNTIME_DIR").map(Path::new);
            let uid = rustix::process::geteuid().as_raw();
            address::socket_candidates(&directory, runtime, uid)
        }
    }
}

/// What came of asking.
struct Given {
    inherited: Inherited,
    pid: i32,
    /// Absent where it ended meanwhile, or is of another pid namespace (pid_namespaces(7)).
    process: Option<OwnedFd>,
    drain_timeout: Duration,
}

/// The connection to the old server.
struct Old {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// It is to have given everything by then.
    deadline: Instant,
}

impl Old {
    /// Whoever listens here must be this user, or root: it is given nothing, but what it gives is trusted.
    fn check_user(&self) -> io::Result<()> {
        let uid = rustix::net::sockopt::socket_peercred(&self.stream)?.uid;
        if uid == rustix::process::geteuid() || uid.is_root() {
            return Ok(());
        }
        let text = format!(
            "it is another user's (uid {}), from whom nothing is taken over",
            uid.as_raw()
        );
        Err(io::Error::other(text))
    }

    fn ask(&mut self, settings: &Settings, candidates: &[PathBuf]) -> io::Result<Given> {
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
        let response = &reply["response"];
        let pid = response["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok());
        // Before it is told to end: its number is its own until then.
        let process = pid
            .and_then(Pid::from_raw)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let drain_timeout = response["drain_timeout"]
            .as_u64()
            .map(Duration::from_millis);
        let mut inherited = Inherited::default();
        let wanted = wanted_addresses(settings);
        let listed = response["listeners"].as_array().cloned();
        for listener in listed.unwrap_or_default() {
            let fd = self.descriptor()?;
            take_listener(&listener, fd, &wanted, candidates, &mut inherited)?;
        }
        let total = response["blocks"].as_u64().unwrap_or(0);
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
        self.send(&json!({"action": "hand_over", "id": "2", "taken": true}))?;
        let reply = self.next(|message| message["in_reply_to"] == "2")?;
        if reply["status"] != "ok" {
            return Err(refused(&reply));
        }
        Ok(Given {
            inherited,
            pid: pid.unwrap_or_default(),
            process,
            drain_timeout: drain_timeout.unwrap_or(settings.drain_timeout),
        })
    }

    /// Whether it has ended in time. Without its process, the end of the connection has to do: the lock of the data directory
    /// tells the rest.
    fn wait_for_end(self, process: Option<&OwnedFd>, patience: Duration) -> bool {
        let limit = rustix::time::Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let mut wait = match process {
            Some(process) => [PollFd::new(process, PollFlags::IN)],
            None => [PollFd::new(&self.stream, PollFlags::RDHUP)],
        };
        // Interrupted by a signal it is asked again, at most for as long once more.
        matches!(
            poll(&mut wait, Some(&limit)).or_else(|_| poll(&mut wait, Some(&limit))),
            Ok(1..)
        )
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
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(too_slow());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 64 * 1024];
            let mut came = Vec::new();
            let n = latzero_shm::fds::recv_with_fds(
                &self.stream,
                &mut buffer,
                &mut came,
                DESCRIPTORS_MAX,
            )
            .map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => too_slow(),
                _ => error,
            })?;
            if n == 0 {
                return Err(io::Error::other("it ended before it had handed over"));
            }
            self.descriptors.extend(came);
            self.received.extend_from_slice(&buffer[..n]);
        }
    }

    fn descriptor(&mut self) -> io::Result<OwnedFd> {
        self.descriptors.pop_front().ok_or_else(|| {
            io::Error::other("a descriptor is missing: this process may have too few (`ulimit -n`)")
        })
    }
}

fn refused(message: &Value) -> io::Error {
    let why = message["error"]["message"].as_str();
    io::Error::other(why.unwrap_or("it refuses").to_owned())
}

fn too_slow() -> io::Error {
    let text = format!(
        "it has not given everything within {} s",
        PATIENCE.as_secs()
    );
    io::Error::other(text)
}

/// The addresses that the settings name; with port 0 any port does.
fn wanted_addresses(settings: &Settings) -> Vec<SocketAddr> {
    let host = settings.host.trim_start_matches('[').trim_end_matches(']');
    let addresses = (host, settings.port).to_socket_addrs();
    addresses.map_or_else(|_| Vec::new(), Iterator::collect)
}

/// Takes a listening socket over where the new settings want one there too. What they do not want is closed, by both.
fn take_listener(
    listed: &Value,
    fd: OwnedFd,
    wanted: &[SocketAddr],
    candidates: &[PathBuf],
    inherited: &mut Inherited,
) -> io::Result<()> {
    match listed["kind"].as_str() {
        Some("tcp") => {
            let listener = TcpListener::from(fd);
            let address = listener.local_addr()?;
            let is_it = |wanted: &SocketAddr| {
                wanted.ip() == address.ip()
                    && (wanted.port() == 0 || wanted.port() == address.port())
            };
            if wanted.iter().any(is_it) {
                inherited.sockets.tcp.push(listener);
            }
        }
        Some("unix") => {
            let path = PathBuf::from(listed["path"].as_str().unwrap_or_default());
            // The same file may be named in several ways.
            let place = |path: &Path| path.canonicalize().ok();
            let is_wanted = place(&path).is_some()
                && candidates
                    .iter()
                    .any(|wanted| place(wanted) == place(&path));
            let file = SocketFile::taken_over(path);
            if !is_wanted {
                inherited.unwanted.push(file);
                return Ok(());
            }
            // Who connects is told the credentials of who listened last (unix(7)).
            rustix::net::listen(&fd, BACKLOG)?;
            inherited.sockets.unix.push(BoundSocket {
                listener: UnixListener::from(fd),
                file,
            });
        }
        _ => {}
    }
    Ok(())
}
