//! The new server's side: connects to the old one, receives what it hands over, and waits for its
//! end.
//!
//! Everything that can be checked is checked before the old server must stop. Until then an error
//! leaves the old one unchanged, including its socket files.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Write as _};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use latzero_protocol::frame::{self, Accept};
use latzero_protocol::{BlockId, Code, PoolName};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use super::sockets::{GivenUnix, bind_unix, candidates, settle_tcp};
use super::{DESCRIPTORS_MAX, is_trusted};
use crate::settings::{Environment, Settings};
use crate::socket::credentials;
use crate::startup::StartupError;
use crate::startup::data_dir::DataDir;
use crate::startup::descriptors::raise_limit;
use crate::startup::lock::{InstanceLock, holder};
use crate::startup::systemd::Activation;

/// How long the old server may take to hand over everything; and how long it may take to end, in
/// addition to the time for running calls.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take until the lock of a server that died is released.
const FALL: Duration = Duration::from_secs(1);

/// How often the lock is tried.
const TRY_EVERY: Duration = Duration::from_millis(10);

/// The longest time for running calls that the old server may name: the maximum of the setting.
const DRAIN_MAX: Duration = Duration::from_secs(3600);

/// The AppID of a new server that takes over.
const APP: &str = "latzero-takeover";

/// What a new server starts with.
pub(crate) struct Inherited {
    /// Listening sockets that replace those that would be bound.
    pub(crate) sockets: Activation,
    /// Shared blocks, with a descriptor of each.
    pub(crate) blocks: Vec<(PoolName, BlockId, OwnedFd)>,
    /// The lock of the data directory, if a server held it before.
    pub(crate) lock: Option<InstanceLock>,
    pub(crate) before: Before,
}

impl Inherited {
    /// Nothing but what a service manager passed.
    pub(crate) fn nothing(sockets: Activation) -> Inherited {
        Inherited {
            sockets,
            blocks: Vec::new(),
            lock: None,
            before: Before::Nobody,
        }
    }
}

/// The previous server, to be logged as soon as there is a log.
pub(crate) enum Before {
    Nobody,
    /// A server that stopped in an orderly way, and its number of blocks.
    HandedOver {
        pid: i32,
        blocks: usize,
    },
    /// A server that ended during the hand-over.
    Died(io::Error),
}

impl Before {
    /// Whether there was a server that stopped in an orderly way.
    pub(crate) fn is_handed_over(&self) -> bool {
        matches!(self, Before::HandedOver { .. })
    }

    pub(crate) fn log(&self) {
        match self {
            Before::Nobody => {}
            Before::HandedOver { pid, blocks } => {
                tracing::info!(pid, blocks, "the old server has handed over");
            }
            Before::Died(error) => {
                tracing::warn!(%error, "the old server died during the hand-over; starting as \
                    after a crash");
            }
        }
    }
}

/// Takes over from the server of the data directory, and waits until that has ended. If none runs,
/// only what a service manager `passed` is inherited.
///
/// # Errors
/// If the old server refuses, does not understand, or does not end in time; or if this server could
/// not listen. Unless the old server has been told to end, it continues as before.
pub(crate) fn ask(
    settings: &Settings,
    environment: &Environment,
    passed: Activation,
) -> Result<Inherited, StartupError> {
    let failed = |reason: String| StartupError::TakeOver {
        data_dir: settings.data_dir.clone(),
        reason,
    };
    let candidates = candidates(settings, environment);
    let deadline = Instant::now() + TIMEOUT;
    let Some(stream) = reach(settings, &candidates).map_err(&failed)? else {
        return Ok(Inherited::nothing(passed));
    };
    // The old server may have more blocks than a process usually has descriptors.
    raise_limit();
    let data_dir = DataDir::prepare(&settings.data_dir)?;
    let mut old = Old {
        stream,
        received: Vec::new(),
        descriptors: VecDeque::new(),
        deadline,
    };
    old.check_user().map_err(&failed)?;
    let offer = match old.ask(data_dir.path()) {
        Ok(offer) => offer,
        Err(Failure::Refuses(reason)) => return Err(failed(reason)),
        Err(Failure::Gone(error)) => {
            let lock = fallen(data_dir.path(), &error).map_err(&failed)?;
            return Ok(Inherited {
                lock: Some(lock),
                before: Before::Died(error),
                ..Inherited::nothing(passed)
            });
        }
    };
    let Offer {
        pid,
        process,
        drain_timeout,
        tcp,
        unix,
        mut blocks,
    } = offer;
    let (taken, left) = unix
        .into_iter()
        .partition::<Vec<_>, _>(|socket| passed.unix.is_empty() && socket.is_one_of(&candidates));
    let mut sockets = passed;
    if taken.is_empty() && sockets.unix.is_empty() {
        sockets
            .unix
            .extend(bind_unix(settings, environment, &data_dir)?);
    }
    settle_tcp(tcp, settings, &mut sockets.tcp)?;
    let (lock, before) = match old.confirm() {
        Ok(()) => {
            let timeout = drain_timeout + TIMEOUT;
            let end = Instant::now() + timeout;
            let is_over = old.wait_for_exit(&mut blocks, process.as_ref(), end);
            // From here on this server is the only one, so it must not fail.
            if !is_over {
                insist(pid, process.as_ref(), timeout);
            }
            let lock = lock_after(data_dir.path(), pid)?;
            let blocks = blocks.len();
            (lock, Before::HandedOver { pid, blocks })
        }
        Err(Failure::Refuses(reason)) => return Err(failed(reason)),
        Err(Failure::Gone(error)) => {
            let lock = fallen(data_dir.path(), &error).map_err(&failed)?;
            (lock, Before::Died(error))
        }
    };
    // Their files belonged to the old server until now.
    sockets
        .unix
        .extend(taken.into_iter().filter_map(GivenUnix::inherit));
    left.into_iter().for_each(GivenUnix::remove);
    Ok(Inherited {
        sockets,
        blocks,
        lock: Some(lock),
        before,
    })
}

/// A connection to the server of the data directory; `None` if none runs.
fn reach(settings: &Settings, candidates: &[PathBuf]) -> Result<Option<UnixStream>, String> {
    let holder = holder(&settings.data_dir);
    // The old server may have been started with other settings.
    let recorded = holder.as_ref().and_then(|holder| holder.record.as_ref());
    let recorded = recorded.into_iter().flat_map(|record| &record.addresses);
    let recorded = recorded.filter_map(|address| address.strip_prefix("unix:"));
    let paths = recorded
        .map(Path::new)
        .chain(candidates.iter().map(PathBuf::as_path));
    for path in paths {
        match connect_within(path, TIMEOUT) {
            Ok(stream) => return Ok(Some(stream)),
            Err(rustix::io::Errno::AGAIN) => {
                let waited = TIMEOUT.as_secs();
                return Err(format!("it did not accept a connection within {waited} s"));
            }
            Err(_) => {}
        }
    }
    let Some(holder) = &holder else {
        return Ok(None);
    };
    let pid = holder
        .pid
        .map_or_else(String::new, |pid| format!(" (pid {pid})"));
    Err(format!(
        "a server is running{pid} but has no Unix socket, which --takeover needs; stop it with \
         `latzero stop`, then start without --takeover"
    ))
}

/// Connects. If the queue of the listener is full, it waits this long (`SO_SNDTIMEO` in socket(7));
/// `EAGAIN` after that.
fn connect_within(path: &Path, timeout: Duration) -> rustix::io::Result<UnixStream> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// The lock of a server that seems to have died during the hand-over, as `error` suggests.
fn fallen(data_dir: &Path, error: &io::Error) -> Result<InstanceLock, String> {
    lock_by(data_dir, Instant::now() + FALL).map_err(|_| {
        format!(
            "it closed the connection and is still running ({error}); see its \
            log"
        )
    })
}

/// Takes the lock of the data directory as soon as it is free. Another server, which a service
/// manager may start at this moment, can be first; but it ends again, because it does not have the
/// sockets.
fn lock_by(data_dir: &Path, end: Instant) -> Result<InstanceLock, StartupError> {
    loop {
        match InstanceLock::acquire(data_dir) {
            Err(StartupError::AnotherServer { .. }) if Instant::now() < end => {
                std::thread::sleep(TRY_EVERY);
            }
            done => return done,
        }
    }
}

/// Kills a server that has handed over and does not end by itself. What it acknowledged is on disk,
/// and memory of blocks is in files and descriptors that outlive it, so this loses nothing.
fn insist(pid: i32, process: Option<&OwnedFd>, waited: Duration) {
    let waited = waited.as_secs();
    report_progress(&format!(
        "the old server (pid {pid}) did not stop within {waited} s; killing it"
    ));
    if let Some(process) = process
        && let Err(error) = pidfd_send_signal(process, Signal::KILL)
    {
        report_progress(&format!("cannot kill it: {error}"));
    }
}

/// Takes the lock of a server that has handed over, however long the disk delays that server.
/// Another server, which a service manager may have started at this moment, ends again, because it
/// does not have the sockets.
fn lock_after(data_dir: &Path, pid: i32) -> Result<InstanceLock, StartupError> {
    let since = Instant::now();
    loop {
        match lock_by(data_dir, Instant::now() + TIMEOUT) {
            Err(StartupError::AnotherServer { holder, .. })
                if holder
                    .pid
                    .is_none_or(|holder| i64::from(holder) == i64::from(pid)) =>
            {
                let waited = since.elapsed().as_secs();
                report_progress(&format!(
                    "waiting for the old server to stop (pid {pid}): {waited} s"
                ));
            }
            done => return done,
        }
    }
}

/// Reports progress on stderr, before the log is open.
fn report_progress(text: &str) {
    // stderr may be closed.
    let _ = writeln!(io::stderr(), "latzero: {text}");
}

/// What the old server offers.
struct Offer {
    pid: i32,
    /// Its process; absent if it has ended, or is in another pid namespace (pid_namespaces(7)).
    process: Option<OwnedFd>,
    drain_timeout: Duration,
    tcp: Vec<TcpListener>,
    unix: Vec<GivenUnix>,
    blocks: Vec<(PoolName, BlockId, OwnedFd)>,
}

/// Why nothing was handed over.
#[derive(Debug)]
enum Failure {
    /// It ended the connection, perhaps because it died.
    Gone(io::Error),
    /// Anything else; the text says what.
    Refuses(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        match error.kind() {
            BrokenPipe | ConnectionReset | UnexpectedEof => Failure::Gone(error),
            _ => Failure::Refuses(error.to_string()),
        }
    }
}

impl Failure {
    fn refused(message: &Value) -> Failure {
        let error = &message["error"];
        if error["code"] == Code::UnknownAction.as_str() {
            return Failure::Refuses(
                "its version cannot hand over; stop it with `latzero stop`, then start without \
                 --takeover"
                    .into(),
            );
        }
        let why = error["message"].as_str();
        Failure::Refuses(why.unwrap_or("it refuses").to_owned())
    }
}

/// The connection to the old server.
struct Old {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// The deadline of every wait.
    deadline: Instant,
}

impl Old {
    /// The process that listens here must belong to this user or to root: it gets nothing, but its
    /// messages are trusted.
    fn check_user(&self) -> Result<(), String> {
        let (_, uid) = credentials(&self.stream).map_err(|error| error.to_string())?;
        if is_trusted(uid) {
            return Ok(());
        }
        Err(format!("it belongs to another user (uid {uid})"))
    }

    /// Receives its sockets and blocks. It continues to serve.
    fn ask(&mut self, data_dir: &Path) -> Result<Offer, Failure> {
        let features = ["attachments", "fd_passing"];
        self.send(
            &json!({"action": "handshake", "app_id": APP, "transient": true, "features": features}),
        )?;
        let ack = self.receive()?;
        if ack["status"] != "ok" {
            return Err(Failure::refused(&ack));
        }
        self.send(&json!({"action": "hand_over", "id": "1"}))?;
        let reply = self.next(|message| message["in_reply_to"] == "1")?;
        if reply["status"] != "ok" {
            return Err(Failure::refused(&reply));
        }
        let response = &reply["response"];
        let theirs = response["data_dir"].as_str().unwrap_or_default();
        if theirs != data_dir.display().to_string() {
            let listens = "the server that listens there";
            return Err(Failure::Refuses(format!("{listens} is that of {theirs}")));
        }
        let pid = response["pid"].as_i64();
        let pid = pid
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or(0)
            .max(0);
        // Before it is told to stop: until then its pid cannot be reused.
        let process = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let drain_timeout = response["drain_timeout"].as_u64();
        let mut offer = Offer {
            pid,
            process,
            drain_timeout: drain_timeout
                .map_or(DRAIN_MAX, Duration::from_millis)
                .min(DRAIN_MAX),
            tcp: Vec::new(),
            unix: Vec::new(),
            blocks: Vec::new(),
        };
        for listed in response["listeners"].as_array().into_iter().flatten() {
            let fd = self.descriptor()?;
            match listed["kind"].as_str() {
                Some("tcp") => offer.tcp.push(TcpListener::from(fd)),
                Some("unix") => {
                    let is_passed = listed["passed"] == true;
                    offer.unix.push(GivenUnix::new(fd, is_passed)?);
                }
                // From a later version: closed.
                _ => {}
            }
        }
        let total = response["blocks"].as_u64().unwrap_or(0);
        let mut taken = 0;
        while taken < total {
            let message = self.next(|message| message["event"] == "handed_over")?;
            taken += self.take_blocks(&message, &mut offer.blocks)?;
        }
        Ok(offer)
    }

    /// Takes the blocks of a message; returns how many there are.
    fn take_blocks(
        &mut self,
        message: &Value,
        blocks: &mut Vec<(PoolName, BlockId, OwnedFd)>,
    ) -> io::Result<u64> {
        let mut taken = 0;
        for block in message["blocks"].as_array().into_iter().flatten() {
            let fd = self.descriptor()?;
            let text = |name: &str| block[name].as_str().unwrap_or_default();
            if let (Ok(pool), Ok(id)) =
                (PoolName::new(text("pool")), BlockId::new(text("block_id")))
            {
                blocks.push((pool, id, fd));
            }
            taken += 1;
        }
        Ok(taken)
    }

    /// Tells it that this server has everything: from here on it drains.
    fn confirm(&mut self) -> Result<(), Failure> {
        self.send(&json!({"action": "hand_over", "id": "2", "taken": true}))?;
        let reply = self.next(|message| message["in_reply_to"] == "2")?;
        if reply["status"] != "ok" {
            return Err(Failure::refused(&reply));
        }
        Ok(())
    }

    /// Reads its last messages, and waits for its end. False if it has not ended in time. If its
    /// process is unknown, this waits for the end of the connection; after that the lock of the
    /// data directory shows when it has ended.
    fn wait_for_exit(
        mut self,
        blocks: &mut Vec<(PoolName, BlockId, OwnedFd)>,
        process: Option<&OwnedFd>,
        end: Instant,
    ) -> bool {
        self.deadline = end;
        let mut last = Vec::new();
        while let Ok(message) = self.receive() {
            if message["event"] == "handed_over" && self.take_blocks(&message, &mut last).is_err() {
                break;
            }
        }
        // The last message about a block counts.
        let renewed: BTreeSet<_> = last.iter().map(|(pool, id, _)| (pool, id)).collect();
        blocks.retain(|(pool, id, _)| !renewed.contains(&(pool, id)));
        blocks.append(&mut last);
        drop(self);
        let Some(process) = process else {
            return Instant::now() < end;
        };
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(process, PollFlags::IN)], limit.as_ref()) {
                Err(rustix::io::Errno::INTR) => {}
                ended => return matches!(ended, Ok(1..)),
            }
        }
    }

    fn send(&mut self, message: &Value) -> io::Result<()> {
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes());
        });
        self.stream.write_all(&out)
    }

    /// The next message that `is_it` accepts; others are skipped.
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
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(too_slow());
            }
            let decoded = frame::decode(&self.received, accept)
                .map_err(|_| io::Error::other("it did not reply like a LatZero server"))?;
            if let Some((frame, used)) = decoded {
                let message = serde_json::from_slice(frame.json)?;
                self.received.drain(..used);
                return Ok(message);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 64 * 1024];
            let mut came = Vec::new();
            let got = latzero_shm::fds::recv_with_fds(
                &self.stream,
                &mut buffer,
                &mut came,
                DESCRIPTORS_MAX,
            );
            match got {
                Ok(0) => {
                    let text = "it ended before the hand-over was complete";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                Ok(n) => {
                    self.descriptors.extend(came);
                    self.received.extend_from_slice(&buffer[..n]);
                }
                // A wait with a timeout is not restarted after a signal (signal(7)); the deadline
                // is checked above.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn descriptor(&mut self) -> io::Result<OwnedFd> {
        self.descriptors.pop_front().ok_or_else(|| {
            io::Error::other("a descriptor is missing: this process may have too few (`ulimit -n`)")
        })
    }
}

fn too_slow() -> io::Error {
    io::Error::other(format!(
        "it did not hand over everything within {} s",
        TIMEOUT.as_secs()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn old(stream: UnixStream, timeout: Duration) -> Old {
        Old {
            stream,
            received: Vec::new(),
            descriptors: VecDeque::new(),
            deadline: Instant::now() + timeout,
        }
    }

    #[test]
    fn a_server_that_never_answers_the_question_is_given_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let talker = std::thread::spawn(move || {
            let mut out = Vec::new();
            frame::append(&mut out, |out| {
                out.extend_from_slice(b"{\"action\":\"ping\",\"status\":\"ok\"}");
            });
            while theirs.write_all(&out).is_ok() {}
        });
        let asked = old(ours, Duration::from_millis(100)).ask(Path::new("/"));
        let Err(Failure::Refuses(why)) = asked else {
            panic!("it has granted nothing");
        };
        assert!(why.contains("did not hand over everything"), "{why}");
        talker.join().unwrap();
    }

    #[test]
    fn a_dead_server_is_distinguished_from_one_that_refuses() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let asked = old(ours, TIMEOUT).ask(Path::new("/"));
        assert!(matches!(asked, Err(Failure::Gone(_))));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(b"{\"error\":{\"code\":\"draining\",\"message\":\"why\"}}");
        });
        theirs.write_all(&out).unwrap();
        let asked = old(ours, TIMEOUT).ask(Path::new("/"));
        assert!(matches!(asked, Err(Failure::Refuses(why)) if why == "why"));
    }

    #[test]
    fn the_lock_is_taken_when_the_first_holder_releases_it() {
        let dir = tempfile::tempdir().unwrap();
        let first = InstanceLock::acquire(dir.path()).unwrap();
        let late = lock_by(dir.path(), Instant::now());
        assert!(matches!(late, Err(StartupError::AnotherServer { .. })));
        std::thread::scope(|scope| {
            let second = scope.spawn(|| lock_by(dir.path(), Instant::now() + TIMEOUT));
            drop(first);
            assert!(second.join().unwrap().is_ok());
        });
    }
}
