//! A data directory that outlives its servers, for tests that kill them, and client processes that
//! tests can kill.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, prlimit, waitpid};
use serde_json::Value;

use crate::{TIMEOUT, Wire};

/// A private data directory. Servers can start and end on it; it is removed when this is dropped.
pub struct Site {
    root: PathBuf,
    /// The path at which the servers see the directory, if it differs from this process's path.
    inside: Option<Namespace>,
}

/// A file system that only the servers of one site have mounted, and the process that holds it.
struct Namespace {
    holder: Child,
    at: PathBuf,
}

/// How a server is started.
#[derive(Debug, Default, Clone)]
pub struct Start {
    /// Settings, each `name=value`.
    pub settings: Vec<String>,
    /// The failpoint at which the server kills itself, as `NAME:N`.
    pub failpoint: Option<String>,
    /// How many descriptors the server may have open; sets the soft and the hard limit.
    pub descriptors: Option<u64>,
    /// The new server takes over from the one that is running.
    pub takes_over: bool,
    /// Another file with the program.
    pub program: Option<PathBuf>,
    /// The user that it runs as; setting it needs root.
    pub uid: Option<u32>,
}

/// Why a server did not get ready.
#[derive(Debug)]
pub struct Refused {
    /// The exit status of its process.
    pub status: ExitStatus,
    /// Its standard error.
    pub said: String,
}

impl Site {
    /// Creates an empty directory.
    ///
    /// # Panics
    /// If none can be created.
    #[must_use]
    pub fn new() -> Site {
        use std::os::unix::fs::DirBuilderExt;
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("latzero-site-{}-{n}", std::process::id());
        let root = std::env::temp_dir().join(name);
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o700);
        builder.create(&root).expect("a new directory can be made");
        builder
            .create(root.join("data"))
            .expect("a new directory can be made");
        Site { root, inside: None }
    }

    /// Creates an empty directory on a private in-memory file system of `bytes`.
    ///
    /// # Errors
    /// If this user may not mount one; the text has the reason.
    pub fn on_small_disk(bytes: u64) -> Result<Site, String> {
        let mut site = Site::new();
        let data = site.root.join("data");
        let script = format!(
            "mount -t tmpfs -o size={bytes},mode=700 none \"$0\" && echo mounted && exec cat"
        );
        let mut holder = Command::new("unshare")
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
            .arg(&data)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let stdout = holder.stdout.take().expect("the pipe was requested");
        let said = Lines::new(stdout).next(TIMEOUT);
        if said.as_deref() != Ok("mounted") {
            let mut why = String::new();
            if let Some(stderr) = &mut holder.stderr {
                stderr.read_to_string(&mut why).unwrap_or_default();
            }
            end(&mut holder);
            return Err(format!("no small disk: {}", why.trim()));
        }
        let at = PathBuf::from(format!("/proc/{}/root", holder.id()));
        let at = at.join(data.strip_prefix("/").unwrap_or(&data));
        site.inside = Some(Namespace { holder, at });
        Ok(site)
    }

    /// Creates a second site with a copy of the files under `data`, which nobody may be changing.
    ///
    /// # Panics
    /// If they can't be copied.
    #[must_use]
    pub fn copied(&self) -> Site {
        let copy = Site::new();
        copy_files(&self.data_dir(), &copy.data_dir()).expect("the files can be copied");
        copy
    }

    /// Simulates the end of the machine, with no server running: each persistent block's file notes
    /// another boot, and only the version that the file reports as flushed keeps its content.
    ///
    /// # Errors
    /// If a file can't be read or written.
    pub fn lose_power(&self) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        for entry in std::fs::read_dir(self.data_dir().join("memory"))? {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "lzb") {
                continue;
            }
            let file = File::options().read(true).write(true).open(path)?;
            let word = |at: u64| {
                let mut bytes = [0; 8];
                file.read_exact_at(&mut bytes, at)?;
                io::Result::Ok(u64::from_le_bytes(bytes))
            };
            // docs/protocol.md, "Mapping a block".
            let (size, first, stride) = (word(64)?, word(72)?, word(80)?);
            let slots = (word(88)? & 0xff) + (word(104)? & 0xff);
            let flushed = word(400)?;
            let kept = (flushed >> 8 > 0 || word(88)? & 0xff == 1).then_some(flushed & 0xff);
            for slot in (0..slots).filter(|slot| Some(*slot) != kept) {
                let torn = [0x5a; 16];
                let length = usize::try_from(size.min(16)).unwrap_or(16);
                file.write_all_at(&torn[..length], first + stride * slot)?;
            }
            file.write_all_at(&(word(416)? ^ 0x5a5a).to_le_bytes(), 416)?;
        }
        Ok(())
    }

    /// The path of the data directory in this process.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        match &self.inside {
            Some(inside) => inside.at.clone(),
            None => self.root.join("data"),
        }
    }

    /// A copy of a program, or of the server's, that belongs to a user and that every user may run.
    /// The directory around the data directory becomes accessible. Needs root, for another user.
    ///
    /// # Panics
    /// If it can't be made.
    #[must_use]
    pub fn program_of(&self, owner: u32, original: Option<&str>) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let original = original.map_or_else(program, PathBuf::from);
        let name = original
            .file_name()
            .expect("it is a file")
            .to_string_lossy();
        let copy = self.root.join(format!("{name}-of-{owner}"));
        std::fs::copy(original, &copy).expect("the program is built (`cargo build`)");
        std::os::unix::fs::chown(&copy, Some(owner), None).expect("this user is root");
        for path in [&copy, &self.root] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))
                .expect("they are this user's");
        }
        copy
    }

    /// The standard error of all servers of this site.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.root.join("stderr")).unwrap_or_default()
    }

    /// Starts a server that becomes ready.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn start(&self) -> Daemon {
        self.start_with(&Start::default())
            .unwrap_or_else(|refused| panic!("the server does not start: {refused:?}"))
    }

    /// Starts a server and waits until it is ready.
    ///
    /// # Errors
    /// If it ends before that.
    pub fn start_with(&self, start: &Start) -> Result<Daemon, Refused> {
        let before = self.said().len();
        let stderr = File::options()
            .create(true)
            .append(true)
            .open(self.root.join("stderr"))
            .expect("the directory accepts files");
        let mut child = self
            .command(start)
            .stderr(stderr)
            .spawn()
            .expect("the program is built (`cargo build`)");
        let stdout = child.stdout.take().expect("the pipe was requested");
        let mut lines = Lines::new(stdout);
        match lines.next(TIMEOUT) {
            Ok(line) if line.starts_with("latzero ready") => {
                let tcp = line
                    .split_whitespace()
                    .find_map(|word| word.strip_prefix("tcp://").or(word.strip_prefix("tls://")))
                    .expect("the ready line names its address")
                    .to_owned();
                Ok(Daemon {
                    child,
                    tcp,
                    socket: self.data_dir().join("latzero.sock"),
                    _lines: lines,
                })
            }
            _ => {
                // It ended, or printed nothing in time.
                if matches!(lines.next(Duration::from_millis(1)), Err(Silence::Waiting)) {
                    let _ = child.kill();
                }
                let status = child.wait().expect("the child can be waited for");
                let said = self.said();
                Err(Refused {
                    status,
                    said: said.get(before..).unwrap_or_default().to_owned(),
                })
            }
        }
    }

    /// Starts many servers at the same time; each becomes ready or ends.
    #[must_use]
    pub fn race(&self, many: usize) -> Vec<Result<Daemon, Refused>> {
        let barrier = std::sync::Barrier::new(many);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..many)
                .map(|n| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let path = self.root.join(format!("stderr-{n}"));
                        let stderr = File::create(&path).expect("the directory accepts files");
                        barrier.wait();
                        let mut child = self
                            .command(&Start::default())
                            .stderr(stderr)
                            .spawn()
                            .expect("the program is built (`cargo build`)");
                        let mut lines = Lines::new(child.stdout.take().expect("asked for"));
                        match lines.next(TIMEOUT) {
                            Ok(_) => Ok(Daemon {
                                child,
                                tcp: String::new(),
                                socket: self.data_dir().join("latzero.sock"),
                                _lines: lines,
                            }),
                            Err(_) => {
                                let _ = child.kill();
                                Err(Refused {
                                    status: child.wait().expect("a child can be waited for"),
                                    said: std::fs::read_to_string(&path).unwrap_or_default(),
                                })
                            }
                        }
                    })
                })
                .collect();
            let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended
                .map(|outcome| outcome.expect("the thread does not panic"))
                .collect()
        })
    }

    fn command(&self, start: &Start) -> Command {
        let program = start.program.clone().unwrap_or_else(program);
        let mut command = match (&self.inside, start.descriptors) {
            (Some(inside), _) => {
                let mut command = Command::new("nsenter");
                let holder = inside.holder.id().to_string();
                command
                    .args(["--target", &holder, "--user", "--preserve-credentials"])
                    .arg("--mount")
                    .arg(program);
                command
            }
            (None, Some(max)) => {
                let mut command = Command::new("sh");
                let script = format!("ulimit -n {max} && exec \"$0\" \"$@\"");
                command.args(["-c", &script]).arg(program);
                command
            }
            (None, None) => Command::new(program),
        };
        command
            .args(["start", "--port", "0", "--log-level", "warn", "--data-dir"])
            .arg(self.root.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .env_remove("LATZERO_FAILPOINT");
        if let Some(uid) = start.uid {
            command.uid(uid).gid(uid);
        }
        if start.takes_over {
            command.arg("--takeover");
        }
        for setting in &start.settings {
            command.args(["--set", setting]);
        }
        if let Some(failpoint) = &start.failpoint {
            command.env("LATZERO_FAILPOINT", failpoint);
        }
        command
    }
}

impl Default for Site {
    fn default() -> Site {
        Site::new()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(inside) = &mut self.inside {
            end(&mut inside.holder);
        }
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.root);
            return;
        }
        eprintln!("the files are kept in {}", self.root.display());
    }
}

/// A server on a [`Site`]. It is killed when this is dropped.
pub struct Daemon {
    child: Child,
    tcp: String,
    socket: PathBuf,
    /// Kept open so that the server's later output does not fail; nobody reads it.
    _lines: Lines,
}

impl Daemon {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The path of its socket in this process.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its TCP address.
    #[must_use]
    pub fn tcp(&self) -> &str {
        &self.tcp
    }

    /// Kills it and waits until it has ended.
    pub fn kill(mut self) {
        end(&mut self.child);
    }

    /// Sends SIGKILL without waiting.
    pub fn send_kill(&self) {
        // It may have ended by itself.
        let _ = kill_process(self.id(), Signal::KILL);
    }

    /// Sends SIGTERM without waiting.
    pub fn ask_to_stop(&self) {
        // It may have ended by itself.
        let _ = kill_process(self.id(), Signal::TERM);
    }

    /// Stops it, waits until it has ended, and returns its exit status.
    ///
    /// # Panics
    /// If it does not end in time.
    pub fn stop(mut self) -> ExitStatus {
        kill_process(self.id(), Signal::TERM).expect("the child accepts signals");
        wait(&mut self.child, TIMEOUT).expect("it ends in time")
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// If it does not end in time.
    pub fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child, TIMEOUT).expect("it ends in time")
    }

    /// Stops all its threads, runs `look`, and lets the threads continue.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn while_stopped<R>(&self, look: impl FnOnce() -> R) -> R {
        kill_process(self.id(), Signal::STOP).expect("the child accepts signals");
        // The kernel reports the stop once every thread has stopped.
        waitpid(Some(self.id()), WaitOptions::UNTRACED).expect("the child is waited for");
        let seen = look();
        kill_process(self.id(), Signal::CONT).expect("the child accepts signals");
        seen
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Limits the size of files that it may write, in bytes; `None` removes the limit.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn limit_files(&self, bytes: Option<u64>) {
        let limit = Rlimit {
            current: bytes,
            maximum: rustix::process::getrlimit(Resource::Fsize).maximum,
        };
        prlimit(Some(self.id()), Resource::Fsize, limit)
            .expect("the limit of the child can be set");
    }

    /// Opens a connection over the Unix socket, without a handshake.
    ///
    /// # Errors
    /// If no server listens any more.
    pub fn connect(&self) -> io::Result<Wire> {
        Wire::try_unix(&self.socket)
    }

    /// Opens a connection and shakes hands; `None` if the server ended in between.
    ///
    /// # Errors
    /// If nothing arrives in time.
    pub fn try_app(&self, mut handshake: Value) -> io::Result<Option<(Wire, Value)>> {
        handshake["action"] = "handshake".into();
        let Ok(mut wire) = self.connect() else {
            return Ok(None);
        };
        if wire.try_send(&handshake).is_err() {
            return Ok(None);
        }
        Ok(wire.try_receive()?.map(|(ack, _)| (wire, ack)))
    }

    /// Opens a connection and shakes hands; also returns the acknowledgement.
    ///
    /// # Panics
    /// If the server refuses.
    #[must_use]
    pub fn app(&self, handshake: Value) -> (Wire, Value) {
        let (wire, ack) = self
            .try_app(handshake)
            .expect("an answer comes in time")
            .expect("the server listens");
        assert_eq!(ack["status"], "ok", "{ack}");
        (wire, ack)
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A client in a process of its own, so that tests can kill it. It sends each message that it is
/// given, one a line.
pub struct ControlledProcess {
    child: Child,
    to: Option<ChildStdin>,
    from: Lines,
}

impl ControlledProcess {
    /// Starts `program`, the binary `latzero-test-client`, with its arguments.
    ///
    /// # Panics
    /// If it can't be started.
    #[must_use]
    pub fn start(program: &str, args: &[&str]) -> ControlledProcess {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the client is built with the tests");
        ControlledProcess {
            to: child.stdin.take(),
            from: Lines::new(child.stdout.take().expect("the pipe was requested")),
            child,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes the client send a message.
    ///
    /// # Panics
    /// If it has ended.
    pub fn send(&mut self, message: &Value) {
        let to = self.to.as_mut().expect("it was not told to end");
        writeln!(to, "{message}").expect("it reads its input");
    }

    /// Makes the client send a message; false if it has ended.
    pub fn try_send(&mut self, message: &Value) -> bool {
        self.to
            .as_mut()
            .is_some_and(|to| writeln!(to, "{message}").is_ok())
    }

    /// The next message that it received.
    ///
    /// # Panics
    /// If none arrives in time.
    pub fn receive(&mut self) -> Value {
        let line = self.from.next(TIMEOUT).expect("a message comes in time");
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("it printed: {line}"))
    }

    /// The next line that it prints; `None` at its end.
    ///
    /// # Panics
    /// If none arrives in time.
    pub fn line(&mut self) -> Option<String> {
        match self.from.next(TIMEOUT) {
            Ok(line) => Some(line),
            Err(Silence::End) => None,
            Err(Silence::Waiting) => panic!("process {} printed nothing", self.pid()),
        }
    }

    /// The next line, if it has been printed already.
    pub fn line_so_far(&mut self) -> Option<String> {
        self.from.next(Duration::ZERO).ok()
    }

    /// Kills it and waits until it has ended.
    pub fn kill(&mut self) {
        end(&mut self.child);
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Closes its input.
    pub fn shut(&mut self) {
        self.to = None;
    }

    /// Waits until it ends; returns its exit status and the lines that were not read yet.
    ///
    /// # Panics
    /// If it does not end in time.
    pub fn wait(&mut self) -> (ExitStatus, Vec<String>) {
        let mut lines = Vec::new();
        while let Some(line) = self.line() {
            lines.push(line);
        }
        let status = wait(&mut self.child, TIMEOUT).expect("it ends in time");
        (status, lines)
    }
}

impl Drop for ControlledProcess {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Why there is no line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silence {
    End,
    Waiting,
}

/// The lines of a process, each of which is waited for with a timeout.
struct Lines {
    reader: BufReader<ChildStdout>,
    line: String,
    bytes: Vec<u8>,
}

impl Lines {
    fn new(stdout: ChildStdout) -> Lines {
        Lines {
            reader: BufReader::new(stdout),
            line: String::new(),
            bytes: Vec::new(),
        }
    }

    fn next(&mut self, timeout: Duration) -> Result<String, Silence> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(at) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let rest = self.bytes.split_off(at + 1);
                let line = std::mem::replace(&mut self.bytes, rest);
                self.line = String::from_utf8_lossy(&line[..at]).into_owned();
                return Ok(std::mem::take(&mut self.line));
            }
            if !readable(
                self.reader.get_ref(),
                end.saturating_duration_since(Instant::now()),
            ) {
                return Err(Silence::Waiting);
            }
            let got = self.reader.fill_buf().map_err(|_| Silence::End)?;
            if got.is_empty() {
                return Err(Silence::End);
            }
            let n = got.len();
            self.bytes.extend_from_slice(got);
            self.reader.consume(n);
        }
    }
}

/// Whether there is something to read, or the end, within `timeout`.
pub(crate) fn readable(from: impl AsFd, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).ok();
    let mut fds = [PollFd::new(&from, PollFlags::IN)];
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|n| n > 0),
        }
    }
}

/// Kills a child and waits until it has ended.
fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// Waits for a child's end with a timeout.
fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
    match pidfd {
        Ok(pidfd) if readable(&pidfd, timeout) => child.wait().ok(),
        // It has ended already.
        _ => child.try_wait().ok().flatten(),
    }
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    // The mark is copied before the database, so that it never counts more commits than the copy
    // holds.
    let mark = "data.db.mark";
    if from.join(mark).is_file() {
        std::fs::copy(from.join(mark), to.join(mark))?;
    }
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            std::fs::create_dir_all(&target)?;
            let mode = entry.metadata()?.permissions();
            std::fs::set_permissions(&target, mode)?;
            copy_files(&entry.path(), &target)?;
        } else if kind.is_file() && entry.file_name() != mark {
            std::fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Whether this user is root, which a test needs that runs programs as other users. If not, it says
/// that the test is left out.
#[must_use]
pub fn is_root(what: &str) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("LEFT OUT: {what} needs root");
    }
    is_root
}

/// The program under test: the one that `LATZERO_BIN` names, or else the one next to the tests.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("LATZERO_BIN").filter(|named| !named.is_empty()) {
        return named.into();
    }
    let here = std::env::current_exe().unwrap_or_default();
    let near = here.ancestors().skip(1).take(3);
    let found = near.map(|dir| dir.join("latzero")).find(|p| p.is_file());
    found.unwrap_or_else(|| "latzero".into())
}
