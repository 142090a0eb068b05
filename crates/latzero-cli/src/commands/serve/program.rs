//! Runs a program for a call: starts it, writes its input, reads its output, and waits for its end.
//!
//! One thread does all of this, with poll(2) on the pipes of the program and a descriptor of the
//! process. So a program that does not read or end, or whose children keep its pipes open, blocks
//! nothing else.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use latzero::{Bytes, Data, HandlerError, Request};
use latzero_crypto::text::holds_token;
use latzero_server::settings::SDK_VARIABLES;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::args::{Framing, OutputKind};
use crate::connect::{ADMIN_TOKEN, SERVER_VARIABLES};
use crate::executor::block_on;
use crate::launch;
use crate::output::compact;
use crate::parse::{Target, shell};

use super::how_it_ended;
use super::queue::{Job, Outcome, Registry};

/// The longest answer of a program, in bytes: as much as a frame takes by default.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// How many bytes of the end of a program's stderr are sent with its error.
const STDERR_BYTES_MAX: usize = 4 << 10;

/// Bytes of the length before each item with `--stream=length`, most significant first, as in the
/// frames of the protocol.
const LENGTH_BYTES: usize = 4;

/// How to run a program.
pub(super) struct ProgramSpec {
    /// The program and its arguments.
    pub(super) command: Vec<OsString>,
    /// Environment variables with which the program finds this server.
    pub(super) environment: Vec<(&'static str, OsString)>,
    /// With `--lines`: the trigger of the one program for all calls.
    pub(super) lines: Option<Target>,
    /// With `--stream`: how the items are separated.
    pub(super) stream: Option<Framing>,
    /// How to interpret the output.
    pub(super) printed: OutputKind,
}

fn failed(message: impl Into<String>) -> HandlerError {
    HandlerError::new("handler_error", message)
}

impl ProgramSpec {
    /// Runs a program for one call. With `--lines`, `kept` is the program that answered the last
    /// call.
    pub(super) fn run(
        &self,
        job: &Job,
        kept: &mut Option<Program>,
        registry: &Registry<'_>,
    ) -> Outcome {
        match &self.lines {
            None => self.run_once(job, registry),
            Some(target) => self.run_line(target, job, kept, registry),
        }
    }

    fn run_once(&self, job: &Job, registry: &Registry<'_>) -> Outcome {
        let request = &job.request;
        let input = match request.bytes() {
            Some(bytes) => bytes.to_vec(),
            None => request.json().unwrap_or("null").as_bytes().to_vec(),
        };
        let origin = request.origin();
        let headers: Map<String, Value> = request
            .headers()
            .into_iter()
            .map(|(name, value)| (name, Value::String(value)))
            .collect();
        let mut command = self.command();
        command
            .env("LATZERO_TRIGGER", request.name())
            .env("LATZERO_POOL", request.pool())
            .env("LATZERO_CALLER", origin.app_id)
            .env("LATZERO_CALLER_INSTANCE", origin.instance)
            .env("LATZERO_HEADERS", Value::Object(headers).to_string())
            .env("LATZERO_ATTEMPT", request.attempt().to_string())
            .env(
                "LATZERO_ID",
                format!("{}-{}", std::process::id(), job.number),
            )
            .stderr(Stdio::piped());
        if let Some(left) = request.time_left() {
            let at = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                + left;
            command.env("LATZERO_DEADLINE", at.as_millis().to_string());
        }
        let mut program = registry.start(request, || self.start(command))?;
        let mut refused = None;
        let mut send = |item: &[u8]| {
            let sent = self.item(request, item);
            refused = sent.err();
            refused.is_none()
        };
        let end = match self.stream {
            Some(framing) => program.turn(&input, &mut ReadUntil::Items(framing, &mut send)),
            None => program.turn(&input, &mut ReadUntil::End),
        };
        if !matches!(end, Ok(ReadEnd::Exited)) {
            program.kill();
        }
        // It has ended or is about to: nothing survives the signal above.
        let status = registry.reap(&mut program);
        if let Some(error) = refused {
            return Err(error);
        }
        match (end, status) {
            (Ok(ReadEnd::TooLong), _) => Err(too_long()),
            (Err(error), _) | (_, Err(error)) => Err(failed(format!("{}: {error}", self.name()))),
            (_, Ok(status)) if status.success() => match self.stream {
                Some(_) => Ok(Data::Json("null".to_owned())),
                None => self.printed.payload(&program.received),
            },
            (_, Ok(status)) => Err(self.ended(status, &program.errors)),
        }
    }

    /// Sends an item of a streamed answer, once the caller has room for it.
    fn item(&self, request: &Request, item: &[u8]) -> Result<(), HandlerError> {
        let data = self.printed.payload(item)?;
        if request.is_emit() {
            return Ok(());
        }
        block_on(request.partial(&data)).map_err(HandlerError::from)
    }

    fn run_line(
        &self,
        target: &Target,
        job: &Job,
        kept: &mut Option<Program>,
        registry: &Registry<'_>,
    ) -> Outcome {
        let request = &job.request;
        if request.bytes().is_some() {
            return Err(HandlerError::new(
                "bad_message",
                "this trigger takes JSON, not raw bytes",
            ));
        }
        let mut line = compact(request.json().unwrap_or("null")).into_bytes();
        line.push(b'\n');
        let kept_one = match kept.take() {
            Some(mut program) if !program.is_idle() => {
                // It ended, or printed an extra line, so its next line would not be the answer.
                program.kill();
                let _ = registry.reap(&mut program);
                None
            }
            kept_one => kept_one,
        };
        let mut program = match kept_one {
            Some(program) => {
                registry.begin(request, program.pid);
                program
            }
            None => {
                let mut command = self.command();
                command.env("LATZERO_TRIGGER", &target.trigger).env(
                    "LATZERO_POOL",
                    target.pool.as_deref().unwrap_or(request.pool()),
                );
                registry.start(request, || self.start(command))?
            }
        };
        match program.turn(&line, &mut ReadUntil::Line) {
            Ok(ReadEnd::Line(line)) => {
                registry.release(program.pid);
                *kept = Some(program);
                self.printed.payload(&line)
            }
            end => {
                program.kill();
                let status = registry.reap(&mut program);
                match (end, status) {
                    (Ok(ReadEnd::TooLong), _) => Err(too_long()),
                    (Ok(_), Ok(status)) => Err(self.ended(status, &program.errors)),
                    (Err(error), _) | (_, Err(error)) => {
                        Err(failed(format!("{}: {error}", self.name())))
                    }
                }
            }
        }
    }

    fn command(&self) -> Command {
        let mut command = launch::command(&self.command);
        let token = std::env::var_os(ADMIN_TOKEN);
        let is_kept = |name: &OsStr, value: &OsStr| is_passed_on(name, value, token.as_deref());
        for (name, _) in std::env::vars_os().filter(|(name, value)| !is_kept(name, value)) {
            command.env_remove(name);
        }
        command
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A separate process group: its children end with it, and Ctrl-C does not reach it.
            .process_group(0);
        command
    }

    fn start(&self, mut command: Command) -> Result<Program, HandlerError> {
        let child = command
            .spawn()
            .map_err(|error| failed(format!("{} cannot be started: {error}", self.name())))?;
        Program::new(child).map_err(|error| failed(format!("{}: {error}", self.name())))
    }

    fn name(&self) -> String {
        shell(&self.command[0].to_string_lossy())
    }

    fn ended(&self, status: ExitStatus, errors: &[u8]) -> HandlerError {
        failed(how_it_ended(&self.name(), status)).with_data(json!({
            "exit_code": status.code(),
            "stderr": String::from_utf8_lossy(errors),
        }))
    }
}

fn too_long() -> HandlerError {
    failed(format!(
        "the program's answer is longer than {ANSWER_BYTES_MAX} bytes"
    ))
}

/// LatZero's own variables that programs get: where the server is, and how the client libraries
/// work.
fn passed_on() -> impl Iterator<Item = &'static str> {
    SERVER_VARIABLES.into_iter().chain(SDK_VARIABLES)
}

/// Whether programs that answer other apps get a variable: none with a secret in it, and of
/// LatZero's own only [`passed_on`].
fn is_passed_on(name: &OsStr, value: &OsStr, admin_token: Option<&OsStr>) -> bool {
    let (name, value) = (name.to_string_lossy(), value.to_string_lossy());
    let is_known = !name.starts_with("LATZERO_") || passed_on().any(|known| known == name);
    let token = admin_token.map(OsStr::to_string_lossy);
    let has_token = token.is_some_and(|token| !token.is_empty() && value.contains(token.as_ref()));
    // Keys of pools and of apps, whatever the variable is called.
    is_known && !has_token && !holds_token(&value)
}

impl OutputKind {
    /// What a program printed, as a payload.
    fn payload(self, printed: &[u8]) -> Outcome {
        let bytes = || Ok(Data::Bytes(Bytes(printed.to_vec())));
        let text = match std::str::from_utf8(printed) {
            _ if self == OutputKind::Bytes => return bytes(),
            Ok(text) => text,
            Err(_) if self == OutputKind::Auto => return bytes(),
            Err(error) => {
                let text = format!("the program's output is not UTF-8 text: {error}");
                return Err(failed(text));
            }
        };
        let as_text = || {
            let text = text.strip_suffix('\n').unwrap_or(text);
            Data::Json(Value::from(text).to_string())
        };
        if self == OutputKind::Text {
            return Ok(as_text());
        }
        let trimmed = text.trim();
        let json = match trimmed.is_empty() {
            true => RawValue::from_string("null".to_owned()),
            false => RawValue::from_string(trimmed.to_owned()),
        };
        match json {
            Ok(json) => match latzero::check_json(json.get()) {
                Ok(()) => Ok(Data::Json(json.get().to_owned())),
                Err(error) => Err(failed(format!("the program's output: {}", error.message()))),
            },
            Err(_) if self == OutputKind::Auto => Ok(as_text()),
            Err(error) => Err(failed(format!("the program's output is not JSON: {error}"))),
        }
    }
}

/// Takes the next whole item from what was received.
fn next_item(received: &mut Vec<u8>, framing: Framing) -> Option<Vec<u8>> {
    let (skip, end) = match framing {
        Framing::Lines => (0, received.iter().position(|&byte| byte == b'\n')? + 1),
        Framing::Length => {
            let length = received.first_chunk::<LENGTH_BYTES>()?;
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            (LENGTH_BYTES, LENGTH_BYTES + length)
        }
    };
    if received.len() < end {
        return None;
    }
    let after = received.split_off(end);
    let mut item = std::mem::replace(received, after);
    item.drain(..skip);
    Some(item)
}

/// When one run of a program is complete.
enum ReadUntil<'a> {
    /// Once it has printed a line.
    Line,
    /// Once it has ended.
    End,
    /// Once it has ended. Each item is passed to the function, which returns false to stop.
    Items(Framing, &'a mut dyn FnMut(&[u8]) -> bool),
}

/// How one run of a program ended.
enum ReadEnd {
    Line(Vec<u8>),
    Exited,
    TooLong,
    Unwanted,
}

/// A running program.
pub(super) struct Program {
    child: Child,
    pub(super) pid: Pid,
    process: OwnedFd,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// Output that was not consumed.
    received: Vec<u8>,
    /// The end of what it printed on stderr.
    errors: Vec<u8>,
}

impl Program {
    fn new(mut child: Child) -> io::Result<Program> {
        let pid = Pid::from_child(&child);
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let prepared = pidfd_open(pid, PidfdFlags::empty()).and_then(|process| {
            let pipes = [
                stdin.as_ref().map(AsFd::as_fd),
                stdout.as_ref().map(AsFd::as_fd),
                stderr.as_ref().map(AsFd::as_fd),
            ];
            for pipe in pipes.into_iter().flatten() {
                rustix::io::ioctl_fionbio(pipe, true)?;
            }
            Ok(process)
        });
        let process = match prepared {
            Ok(process) => process,
            Err(error) => {
                // Its output cannot be read, so it must not run.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.into());
            }
        };
        Ok(Program {
            child,
            pid,
            process,
            stdin,
            stdout,
            stderr,
            received: Vec::new(),
            errors: Vec::new(),
        })
    }

    /// Ends the program and everything that it started.
    fn kill(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    pub(super) fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Whether it waits for a line: it is running and has printed nothing unexpected.
    fn is_idle(&self) -> bool {
        let Some(stdout) = &self.stdout else {
            return false;
        };
        let mut fds = [
            PollFd::new(stdout, PollFlags::IN),
            PollFd::new(&self.process, PollFlags::IN),
        ];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        self.received.is_empty() && matches!(poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Writes `input` to the program and reads its output, until it has printed a line or ended.
    fn turn(&mut self, input: &[u8], until: &mut ReadUntil<'_>) -> io::Result<ReadEnd> {
        let is_line = matches!(until, ReadUntil::Line);
        let mut rest = input;
        loop {
            if rest.is_empty() && !is_line {
                // The end of its input.
                self.stdin = None;
            }
            let (can_write, can_read, has_errors, has_ended) = self.wait_for(!rest.is_empty())?;
            if can_write {
                match self.stdin.as_mut().map(|stdin| stdin.write(rest)) {
                    Some(Ok(n)) => rest = &rest[n..],
                    Some(Err(error)) if is_for_later(&error) => {}
                    // A program may leave its input unread.
                    Some(Err(_)) | None => {
                        rest = &[];
                        self.stdin = None;
                    }
                }
            }
            if has_errors || has_ended {
                self.take_errors();
            }
            if can_read || has_ended {
                self.take_output()?;
            }
            if let ReadUntil::Items(framing, send) = until
                && !self.hand_over(*framing, has_ended, send)?
            {
                return Ok(ReadEnd::Unwanted);
            }
            if self.received.len() > ANSWER_BYTES_MAX {
                return Ok(ReadEnd::TooLong);
            }
            if is_line && let Some(line) = next_item(&mut self.received, Framing::Lines) {
                return Ok(ReadEnd::Line(line));
            }
            // All of its own output has been read by now; output of children that it left
            // behind is ignored.
            if has_ended || (is_line && self.stdout.is_none()) {
                return Ok(ReadEnd::Exited);
            }
        }
    }

    /// Hands over the complete items; at the program's end the last line too.
    fn hand_over(
        &mut self,
        framing: Framing,
        has_ended: bool,
        send: &mut dyn FnMut(&[u8]) -> bool,
    ) -> io::Result<bool> {
        while let Some(item) = next_item(&mut self.received, framing) {
            if !send(&item) {
                return Ok(false);
            }
        }
        if !has_ended || self.received.is_empty() {
            return Ok(true);
        }
        match framing {
            Framing::Lines => Ok(send(&std::mem::take(&mut self.received))),
            Framing::Length => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the output ended in the middle of an item",
            )),
        }
    }

    /// Waits until there is something to do; returns what can be written and read, and whether the
    /// program has ended.
    fn wait_for(&self, has_input: bool) -> io::Result<(bool, bool, bool, bool)> {
        let stdin = self.stdin.as_ref().filter(|_| has_input);
        let mut fds = vec![PollFd::new(&self.process, PollFlags::IN)];
        let pipes = [
            stdin.map(|fd| PollFd::new(fd, PollFlags::OUT)),
            self.stdout
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::IN)),
            self.stderr
                .as_ref()
                .map(|fd| PollFd::new(fd, PollFlags::IN)),
        ];
        let places = pipes.map(|pipe| {
            fds.push(pipe?);
            Some(fds.len() - 1)
        });
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let is_ready = |place: Option<usize>| place.is_some_and(|at| !fds[at].revents().is_empty());
        let [stdin, stdout, stderr] = places.map(is_ready);
        Ok((stdin, stdout, stderr, !fds[0].revents().is_empty()))
    }

    fn take_output(&mut self) -> io::Result<()> {
        let Some(stdout) = &mut self.stdout else {
            return Ok(());
        };
        let mut chunk = [0; 16 << 10];
        while self.received.len() <= ANSWER_BYTES_MAX {
            match stdout.read(&mut chunk) {
                Ok(0) => {
                    self.stdout = None;
                    return Ok(());
                }
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Passes its stderr on to the person who runs `serve`; the caller gets the end of it.
    fn take_errors(&mut self) {
        let Some(stderr) = &mut self.stderr else {
            return;
        };
        let mut chunk = [0; 4 << 10];
        loop {
            match stderr.read(&mut chunk) {
                Ok(n) if n > 0 => {
                    let _ = io::stderr().write_all(&chunk[..n]);
                    self.errors.extend_from_slice(&chunk[..n]);
                    let excess = self.errors.len().saturating_sub(STDERR_BYTES_MAX);
                    self.errors.drain(..excess);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.stderr = None;
                    return;
                }
            }
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn output_is_json_text_or_bytes() {
        let check = |printed: &[u8], expected: Result<&str, &[u8]>| match (
            OutputKind::Auto.payload(printed).unwrap(),
            expected,
        ) {
            (Data::Json(json), Ok(expected)) => assert_eq!(json, expected),
            (Data::Bytes(bytes), Err(expected)) => assert_eq!(bytes.0, expected),
            (data, _) => panic!("{data:?}"),
        };
        check(b" {\"a\": 1}\n", Ok("{\"a\": 1}"));
        check(b"5\n", Ok("5"));
        check(b"", Ok("null"));
        check(b"hello\n", Ok("\"hello\""));
        check(b"two\nlines\n", Ok("\"two\\nlines\""));
        check(b"NaN", Ok("\"NaN\""));
        check(b"a\xff\n", Err(b"a\xff\n"));
    }

    #[test]
    fn output_can_be_declared() {
        let json = |printed: OutputKind, text: &[u8]| match printed.payload(text) {
            Ok(Data::Json(json)) => json,
            other => panic!("{other:?}"),
        };
        assert_eq!(json(OutputKind::Text, b"5\n"), "\"5\"");
        assert_eq!(json(OutputKind::Json, b"5\n"), "5");
        assert!(OutputKind::Json.payload(b"hello").is_err());
        assert!(OutputKind::Text.payload(b"\xff").is_err());
        assert!(matches!(
            OutputKind::Bytes.payload(b"5"),
            Ok(Data::Bytes(_))
        ));
    }

    #[test]
    fn invalid_output_is_an_error_of_the_program() {
        let deep = "[".repeat(129) + &"]".repeat(129);
        let error = OutputKind::Auto.payload(deep.as_bytes()).unwrap_err();
        assert_eq!(error.code(), "handler_error");
    }

    #[test]
    fn stream_items_are_delimited() {
        let items = |bytes: &[u8], framing| {
            let mut received = bytes.to_vec();
            let items: Vec<Vec<u8>> =
                std::iter::from_fn(|| next_item(&mut received, framing)).collect();
            (items, received)
        };
        let (lines, rest) = items(b"a\nbc\nd", Framing::Lines);
        assert_eq!(lines, [&b"a\n"[..], b"bc\n"]);
        assert_eq!(rest, b"d");
        let (counted, rest) = items(b"\0\0\0\x02ab\0\0\0\0\0\0\0\x09x", Framing::Length);
        assert_eq!(counted, [&b"ab"[..], b""]);
        assert_eq!(rest, b"\0\0\0\x09x");
    }

    #[test]
    fn no_secret_is_passed_on_whatever_its_variable_is_called() {
        let is_passed_on = |name: &str, value: &str| {
            is_passed_on(name.as_ref(), value.as_ref(), Some("f00d".as_ref()))
        };
        assert!(is_passed_on("LATZERO_DATA_DIR", "x"));
        assert!(is_passed_on("LATZERO_DEBUG", "1"));
        assert!(is_passed_on("MY_TOKEN", "x"));
        for (name, value) in [
            ("LATZERO_ADMIN_TOKEN", "f00d"),
            ("LATZERO_LOCKS", "x"),
            ("LATZERO_KEYS", "x"),
            ("LATZERO_ANYTHING", "x"),
            ("MY_TOKEN", "bearer f00d"),
            ("VAULT", "lzs1_AAEC lzc1_ICEi"),
            ("MINE", "key=lza1_kZKT"),
            ("LATZERO_URL", "latzero://app?key=lza1_kZKT"),
        ] {
            assert!(!is_passed_on(name, value), "{name}={value}");
        }
    }

    #[test]
    fn the_help_names_the_variables_that_are_passed_on() {
        let cli = crate::args::Cli::command();
        let serve = cli.find_subcommand("serve").expect("there is one");
        let help = serve.get_after_help().expect("it has one").to_string();
        let (_, list) = help.split_once("are passed on:").expect("it says so");
        let (list, _) = list.split_once('.').expect("the sentence ends");
        let named = list.split([',', ' ', '\n']).filter(|word| !word.is_empty());
        let named: Vec<_> = named.filter(|word| *word != "and").collect();
        let expected: Vec<_> = super::passed_on()
            .map(|name| name.trim_start_matches("LATZERO_"))
            .collect();
        assert_eq!(named, expected);
    }
}
