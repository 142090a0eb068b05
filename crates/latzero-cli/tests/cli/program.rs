//! What the tests stand on: the program with a clean environment, and private servers.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long a test waits for what must come. Only a failing test ever waits this long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// The program, with no variable that it reads but `HOME`, which holds nothing.
pub(crate) fn latzero(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latzero"));
    command
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .stdin(Stdio::null());
    command
}

/// How a run of the program ended.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ran {
    /// What it printed, as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|e| panic!("{e}: {:?} {}", self.out, self.err))
    }

    /// It ended with this code; its output.
    #[track_caller]
    pub(crate) fn ended_with(self, code: i32) -> Ran {
        assert_eq!(
            self.code, code,
            "stdout: {}\nstderr: {}",
            self.out, self.err
        );
        self
    }

    /// It said this on stderr.
    #[track_caller]
    pub(crate) fn said(self, text: &str) -> Ran {
        assert!(self.err.contains(text), "{text:?} is not in: {}", self.err);
        self
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Ran {
    let done = command.output().expect("the program is built");
    Ran {
        code: done.status.code().expect("it exited without a signal"),
        out: String::from_utf8(done.stdout).expect("it prints UTF-8"),
        err: String::from_utf8(done.stderr).expect("it prints UTF-8"),
    }
}

/// Runs a command to its end, with this on its stdin.
pub(crate) fn run_with(command: &mut Command, input: &str) -> Ran {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program is built");
    let mut stdin = child.stdin.take().expect("the pipe was requested");
    stdin
        .write_all(input.as_bytes())
        .expect("it reads its input");
    drop(stdin);
    let done = child.wait_with_output().expect("it ends");
    Ran {
        code: done.status.code().expect("it exited without a signal"),
        out: String::from_utf8(done.stdout).expect("it prints UTF-8"),
        err: String::from_utf8(done.stderr).expect("it prints UTF-8"),
    }
}

/// Tries until it is so.
#[track_caller]
pub(crate) fn eventually(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(
            Instant::now() < deadline,
            "the condition was not met in time"
        );
    }
}

/// A program that runs, whose lines are awaited one by one.
pub(crate) struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    /// Starts it; its lines come from stdout.
    pub(crate) fn start(command: &mut Command) -> Running {
        Running::of(command.stdout(Stdio::piped()), |child| {
            Box::new(child.stdout.take().expect("the pipe was requested"))
        })
    }

    /// Starts it; its lines come from stderr.
    pub(crate) fn start_err(command: &mut Command) -> Running {
        Running::of(command.stderr(Stdio::piped()), |child| {
            Box::new(child.stderr.take().expect("the pipe was requested"))
        })
    }

    fn of(command: &mut Command, pipe: impl Fn(&mut Child) -> Box<dyn Read + Send>) -> Running {
        let mut child = command.spawn().expect("the program is built");
        let pipe = pipe(&mut child);
        let (sender, lines) = mpsc::channel();
        // A pipe can't be read with a deadline; a channel can.
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Running { child, lines }
    }

    /// The next line.
    #[track_caller]
    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(TIMEOUT).expect("a line comes")
    }

    /// The next line that has this in it.
    #[track_caller]
    pub(crate) fn line_with(&self, text: &str) -> String {
        loop {
            let line = self.line();
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        let ended = self.child.try_wait();
        ended.expect("it is a child of this process").is_some()
    }

    /// Waits until it has ended.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.child.wait().expect("it is a child of this process")
    }

    /// Waits until it has ended by itself; its exit code.
    #[track_caller]
    pub(crate) fn exit_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("it exited without a signal: {status}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A private server.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) ready: String,
    pub(crate) try_line: String,
    home: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start() -> Server {
        Server::with(&[])
    }

    pub(crate) fn with(args: &[&str]) -> Server {
        Server::in_home(tempfile::tempdir().expect("there is room"), args)
    }

    pub(crate) fn in_home(home: tempfile::TempDir, args: &[&str]) -> Server {
        let base = ["start", "--port", "0", "--log-level", "warn"];
        let mut command = latzero(home.path(), &[&base, args].concat());
        let running = Running::start(&mut command);
        let ready = running.line();
        assert!(ready.starts_with("latzero ready"), "{ready}");
        let try_line = running.line();
        Server {
            running,
            ready,
            try_line,
            home,
        }
    }

    /// Kills it as a crash would; what it left stays.
    pub(crate) fn crash(mut self) -> tempfile::TempDir {
        self.running.signal(Signal::KILL);
        self.running.wait();
        self.home
    }

    /// Stops it as people do; what it keeps stays.
    pub(crate) fn stop(mut self) -> tempfile::TempDir {
        self.run(&["stop"]).ended_with(0);
        assert_eq!(self.running.exit_code(), 0);
        self.home
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.home.path().join(".latzero")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// The TCP port that it listens on.
    pub(crate) fn port(&self) -> String {
        let word = self
            .ready
            .split(' ')
            .filter_map(|word| word.split_once("://127.0.0.1:"))
            .find_map(|(scheme, port)| ["tcp", "tls"].contains(&scheme).then_some(port));
        word.expect("the ready line has it").to_owned()
    }

    /// The program, told nothing of where the server is: it finds it by `HOME`.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        latzero(self.home(), args)
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args))
    }

    /// Starts `latzero serve` and waits until it serves.
    pub(crate) fn serve(&self, args: &[&str]) -> Running {
        let serving = Running::start_err(&mut self.command(&[&["serve"], args].concat()));
        serving.line_with("serving ");
        serving
    }
}

/// Reads to the end of what a program printed.
pub(crate) fn rest(mut stdout: ChildStdout) -> String {
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("it prints UTF-8");
    text
}
