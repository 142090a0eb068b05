//! `block lock`: runs a command while the lock of a block is held.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use latzero::blocking::{Block, BlockLock};
use latzero::{Code, LOCKS_VARIABLE, LockMode};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::termios::tcgetpgrp;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::BlockHandle;
use crate::args::BlockLockArgs;
use crate::connect::ConnectOptions;
use crate::executor::block_on;
use crate::exit::{CommandResult, Exit, Failure};
use crate::launch;

/// How often the lock is checked while the command runs.
const CHECK_INTERVAL: Duration = Duration::from_millis(200);

/// How long the command may take to end after SIGTERM, once its lock is lost.
const END_TIME: Duration = Duration::from_secs(5);

pub(super) fn run(args: &BlockLockArgs) -> CommandResult {
    let program = args.command.first();
    let program = program.ok_or_else(|| Failure::usage("no command is given"))?;
    launch::check(program)?;
    let options = ConnectOptions::once("block").waiting(args.wait);
    let at = BlockHandle::find(&args.at, &args.reach, options)?;
    let (block, mode) = match args.shared {
        true => (at.name().attach()?, LockMode::Shared),
        false => (at.name().attach_writable()?, LockMode::Exclusive),
    };
    let held = block.lock(mode, args.wait)?;
    if held.is_inherited() {
        check_inherited(&block, held.fence())?;
    }
    let mut command = launch::command(&args.command);
    command
        .envs(args.reach.environment())
        .env("LATZERO_BLOCK", format!("{}/{}", block.pool(), at.id))
        .env("LATZERO_FENCE", held.fence().to_string());
    if !held.is_inherited() {
        command.env(LOCKS_VARIABLE, locks_with(&block, mode, held.fence()));
    }
    let status = wait_for(&mut command, program, &held)?;
    match held.unlock() {
        Ok(()) => {}
        // The command may remove the block, and the lock with it.
        Err(error) if error.kind() == Code::NoBlock => {}
        Err(error) if is_lost(&error) => return Err(lost(program, &at.id)),
        Err(error) => return Err(error.into()),
    }
    match (status.code(), status.signal()) {
        (Some(0), _) => Ok(Exit::Ok),
        // The command's own exit code; a signal is shown as shells show it.
        (Some(code), _) => std::process::exit(code),
        (None, Some(signal)) => std::process::exit(128 + signal),
        (None, None) => Ok(Exit::Failure),
    }
}

/// The locks that the command runs under: those passed to this program, and the new one.
fn locks_with(block: &Block, mode: LockMode, fence: u64) -> String {
    let mut own = format!("{}/{}={fence}", block.pool(), block.id());
    if mode == LockMode::Shared {
        own.push_str("/shared");
    }
    match std::env::var(LOCKS_VARIABLE) {
        Ok(given) if !given.is_empty() => format!("{given} {own}"),
        _ => own,
    }
}

/// A nested lock: an outer `block lock` already holds it, unless it was lost in the meantime.
fn check_inherited(block: &Block, fence: u64) -> Result<(), Failure> {
    let info = block.info()?;
    let holders = info["lock"]["holders"].as_array().into_iter().flatten();
    match holders.into_iter().any(|holder| holder["fence"] == fence) {
        true => Ok(()),
        false => {
            let text = format!("the lock of block '{}' was lost", block.id());
            Err(Failure::new(Exit::Answered, text)
                .with_help("run the command that took the lock again"))
        }
    }
}

fn is_lost(error: &latzero::Error) -> bool {
    matches!(error.kind(), Code::LockLost | Code::Disconnected)
}

fn lost(program: &OsString, block: &str) -> Failure {
    let text = format!(
        "the lock of block '{block}' was lost while '{}' ran, so the command was ended",
        program.display()
    );
    Failure::new(Exit::Answered, text).with_help(
        "earlier writes are in the block, and later ones were refused; check the block and run \
         the command again",
    )
}

enum Event {
    Ended(std::io::Result<ExitStatus>),
    Signal(i32),
}

/// Runs the command to its end. Signals are passed on to the command, so that the lock is held as
/// long as it runs; if the lock is lost, the command is ended.
fn wait_for(
    command: &mut std::process::Command,
    program: &OsString,
    held: &BlockLock,
) -> Result<ExitStatus, Failure> {
    let failed =
        |what: &str, error: std::io::Error| Failure::new(Exit::Failure, format!("{what}: {error}"));
    let mut signals = Signals::new([SIGTERM, SIGHUP, SIGINT, SIGQUIT])
        .map_err(|error| failed("signals cannot be received", error))?;
    let mut child = command
        .spawn()
        .map_err(|error| failed(&format!("'{}' cannot be started", program.display()), error))?;
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
        .map_err(|error| failed("the command cannot be watched", error.into()))?;
    let (sender, events) = channel();
    let of_signals = sender.clone();
    thread::spawn(move || {
        let send = |signal| of_signals.send(Event::Signal(signal));
        signals
            .forever()
            .map(send)
            .take_while(Result::is_ok)
            .count()
    });
    thread::spawn(move || sender.send(Event::Ended(child.wait())));
    let mut lost_at: Option<Instant> = None;
    let is_removed =
        || block_on(held.block().info()).is_err_and(|error| error.kind() == Code::NoBlock);
    loop {
        match events.recv_timeout(CHECK_INTERVAL) {
            Ok(Event::Ended(status)) if lost_at.is_none() => {
                return status.map_err(|error| failed("the command cannot be waited for", error));
            }
            Ok(Event::Ended(_)) => return Err(lost(program, held.block().id())),
            Ok(Event::Signal(signal)) => pass_on(&process, signal),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                unreachable!("the thread that waits for the command holds a sender")
            }
        }
        match lost_at {
            None if !held.is_held() && !is_removed() => {
                lost_at = Some(Instant::now());
                let _ = pidfd_send_signal(&process, Signal::TERM);
            }
            Some(at) if at.elapsed() >= END_TIME => {
                let _ = pidfd_send_signal(&process, Signal::KILL);
            }
            _ => {}
        }
    }
}

/// Passes a signal on, unless the terminal sent it to the command as well.
fn pass_on(process: &OwnedFd, signal: i32) {
    let is_of_keys = matches!(signal, SIGINT | SIGQUIT);
    if is_of_keys && is_in_foreground() {
        return;
    }
    if let Some(signal) = Signal::from_named_raw(signal) {
        let _ = pidfd_send_signal(process, signal);
    }
}

fn is_in_foreground() -> bool {
    let terminal = std::fs::File::open("/dev/tty");
    terminal.is_ok_and(|tty| tcgetpgrp(&tty).ok() == Some(rustix::process::getpgrp()))
}
