//! A program that answers calls: started, fed, listened to, and reaped.
//!
//! One thread does all of it, with poll(2) over the program's pipes and a descriptor of the process itself: so a
//! program that neither reads nor ends, or leaves children behind that hold its pipes, keeps nobody waiting.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};

use latzero::HandlerError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde_json::json;
use serde_json::value::RawValue;

use crate::output::compact;
use crate::parse::Target;

use super::how_it_ended;
use super::queue::{Job, Outcome, Registry};

/// The longest answer of a program, in bytes: as much as a frame takes by default.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// How much of the end of a program's stderr goes with its error, in bytes.
const STDERR_BYTES_MAX: usize = 4 << 10;

/// How to run the program.
pub(super) struct Recipe {
    /// The program and its arguments.
    pub(super) command: Vec<String>,
    /// With `--lines`: the trigger of the one program for all calls.
    pub(super) lines: Option<Target>,
}

fn failed(message: impl Into<String>) -> HandlerError {
    HandlerError::new("handler_error", message)
}

impl Recipe {
    /// Has a program answer one call. With `--lines`, `kept` is the program that answered the last.
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
        let mut command = self.command();
        command
            .env("LATZERO_TRIGGER", request.name())
            .env("LATZERO_POOL", request.pool())
            .env("LATZERO_CALLER", request.origin().app_id)
            .env(
                "LATZERO_ID",
                format!("{}-{}", std::process::id(), job.number),
            )
            .stderr(Stdio::piped());
        let mut program = registry.start(request, || self.start(command))?;
        let end = program.turn(&input, Until::End);
        if !matches!(end, Ok(End::Exited)) {
            program.kill();
        }
        // It ended, or is about to: nothing outlives the kill above.
        let status = registry.reap(&mut program);
        match (end, status) {
            (Ok(End::TooLong), _) => Err(too_long()),
            (Err(error), _) | (_, Err(error)) => {
                Err(failed(format!("{}: {error}", self.command[0])))
            }
            (_, Ok(status)) if status.success() => Ok(answer(&program.received)),
            (_, Ok(status)) => Err(self.ended(status, &program.errors)),
        }
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
                // It ended, or printed what nobody asked for: its next line would be no answer.
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
        match program.turn(&line, Until::Line) {
            Ok(End::Line(line)) => {
                registry.release(program.pid);
                *kept = Some(program);
                Ok(answer(&line))
            }
            end => {
                program.kill();
                let status = registry.reap(&mut program);
                match (end, status) {
                    (Ok(End::TooLong), _) => Err(too_long()),
                    (Ok(_), Ok(status)) => Err(self.ended(status, &program.errors)),
                    (Err(error), _) | (_, Err(error)) => {
                        Err(failed(format!("{}: {error}", self.command[0])))
                    }
                }
            }
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.command[0]);
        command
            .args(&self.command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A group of its own: what it starts ends with it, and a Ctrl-C here is not one there.
            .process_group(0);
        command
    }

    fn start(&self, mut command: Command) -> Result<Program, HandlerError> {
        let child = command
            .spawn()
            .map_err(|error| failed(format!("{} cannot be started: {error}", self.command[0])))?;
        Program::new(child).map_err(|error| failed(format!("{}: {error}", self.command[0])))
    }

    fn ended(&self, status: ExitStatus, errors: &[u8]) -> HandlerError {
        failed(how_it_ended(&self.command[0], status)).with_data(json!({
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

/// What a program printed, as JSON: as it is where it is JSON, else its text.
fn answer(printed: &[u8]) -> Box<RawValue> {
    let text = String::from_utf8_lossy(printed);
    let trimmed = text.trim();
    let json = match trimmed.is_empty() {
        true => "null".to_owned(),
        false => trimmed.to_owned(),
    };
    RawValue::from_string(json).unwrap_or_else(|_| {
        let text = text.strip_suffix('\n').unwrap_or(&text);
        serde_json::value::to_raw_value(text).expect("a text is JSON")
    })
}

/// When a turn of a program is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// When it printed a line.
    Line,
    /// When it ended.
    End,
}

/// How a turn of a program was over.
enum End {
    Line(Vec<u8>),
    Exited,
    TooLong,
}

/// A program that runs.
pub(super) struct Program {
    child: Child,
    pub(super) pid: Pid,
    process: OwnedFd,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// What it printed and nobody took.
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
                // It can't be listened to, so it must not run.
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

    /// Ends it and what it started.
    fn kill(&self) {
        let _ = kill_process_group(self.pid, Signal::KILL);
    }

    pub(super) fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Whether it waits for a line: it lives, and printed nothing that nobody asked for.
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

    /// Feeds it `input` and takes what it prints, until it printed a line or ended.
    fn turn(&mut self, input: &[u8], until: Until) -> io::Result<End> {
        let mut rest = input;
        loop {
            if rest.is_empty() && until == Until::End {
                // The end of its input.
                self.stdin = None;
            }
            let (can_write, can_read, has_errors, has_ended) = self.wait_for(!rest.is_empty())?;
            if can_write {
                match self.stdin.as_mut().map(|stdin| stdin.write(rest)) {
                    Some(Ok(n)) => rest = &rest[n..],
                    Some(Err(error)) if is_for_later(&error) => {}
                    // It does not want its input, which is its own affair.
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
            if self.received.len() > ANSWER_BYTES_MAX {
                return Ok(End::TooLong);
            }
            if until == Until::Line
                && let Some(at) = self.received.iter().position(|&byte| byte == b'\n')
            {
                let after = self.received.split_off(at + 1);
                return Ok(End::Line(std::mem::replace(&mut self.received, after)));
            }
            // Everything that it printed itself is in the pipe by now; children that it left may print on, unheard.
            if has_ended || (until == Until::Line && self.stdout.is_none()) {
                return Ok(End::Exited);
            }
        }
    }

    /// Waits until there is something to do: what can be written to, what can be read, and whether it ended.
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

    /// What it prints on stderr is for whoever runs it, and its end for the caller.
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
    use super::*;

    #[test]
    fn what_is_printed_becomes_json() {
        let check = |printed: &str, json: &str| assert_eq!(answer(printed.as_bytes()).get(), json);
        check(" {\"a\": 1}\n", "{\"a\": 1}");
        check("5\n", "5");
        check("", "null");
        check("hello\n", "\"hello\"");
        check("two\nlines\n", "\"two\\nlines\"");
    }
}
