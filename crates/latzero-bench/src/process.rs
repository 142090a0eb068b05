//! Server, handler and caller as separate processes.
//!
//! The program starts itself once per role. A child writes lines to its standard output: `ready
//! ADDRESS` from a server or handler, one line of JSON from a caller. It is killed when its owner
//! is dropped.

use crate::failure::{During, Failure};
use crate::peers;
use crate::placement::Placement;
use crate::plan::{Load, Outcome, Plan};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long a server or handler may take until it is ready.
pub(crate) const READY_WAIT: Duration = Duration::from_secs(20);
/// How long one run of a caller may take.
const CALLER_WAIT: Duration = Duration::from_secs(120);

/// A child that is killed when this is dropped.
pub(crate) struct Process {
    what: String,
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    /// Starts `command` and reads its standard output line by line. `what` names it in messages.
    pub(crate) fn spawn(
        what: impl Into<String>,
        command: &mut Command,
        placement: Placement,
    ) -> Result<Self, Failure> {
        let mut child = placement.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()))?;
        let stdout = child.stdout.take().expect("its standard output is piped");
        let (sender, lines) = mpsc::channel();
        // Reads to the end even if nobody waits for lines any more: a full pipe would block the
        // child.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                sender.send(line).ok();
            }
        });
        Ok(Self {
            what: what.into(),
            child,
            lines,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first result of `pick` for a line of the child's.
    pub(crate) fn wait_for<T>(
        &self,
        wait: Duration,
        mut pick: impl FnMut(&str) -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + wait;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(found) = pick(&line) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::said(format!(
                        "{} said nothing of use within {} s",
                        self.what,
                        wait.as_secs()
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::said(format!(
                        "{} ended before it had answered; its own message stands above, if it \
                         left one",
                        self.what
                    )));
                }
            }
        }
    }

    /// Asks the child to end (SIGTERM), and waits until it has.
    pub(crate) fn end_orderly(mut self) -> Result<(), Failure> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(std::io::Error::from)
            .during(format!("end {}", self.what))?;
        // Its standard output is closed when it ends.
        let deadline = Instant::now() + READY_WAIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::said(format!(
                        "{} does not end within {} s",
                        self.what,
                        READY_WAIT.as_secs()
                    )));
                }
            }
        }
        let what = format!("wait for {}", self.what);
        self.child.wait().map(drop).during(what)
    }

    /// The address that it announced; see [`announce`].
    pub(crate) fn wait_until_ready(&self) -> Result<String, Failure> {
        self.wait_for(READY_WAIT, |line| {
            line.strip_prefix("ready ").map(str::to_owned)
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself; it is waited for in any case, so that it leaves no zombie.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A running server and its address.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) address: String,
}

/// Notifies the parent that this server is reachable at `address`, or that this handler (any
/// `address`) serves.
pub(crate) fn announce(address: &str) -> Result<(), Failure> {
    say(&format!("ready {address}"))
}

fn say(line: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .during("write to standard output")
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Role {
    Server,
    Handler,
    Caller,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RoleArgs {
    role: Role,
    #[arg(long)]
    peer: String,
    /// A server's directory for sockets and other files
    #[arg(long, default_value = ".")]
    scratch: PathBuf,
    #[arg(long, default_value_t)]
    address: String,
    /// Calls in flight; without it one at a time
    #[arg(long)]
    window: Option<u64>,
    #[arg(long, default_value_t = 0)]
    warmup: u64,
    #[arg(long, default_value_t = 0)]
    calls: u64,
}

/// Runs the role of one child.
pub(crate) fn play(args: &RoleArgs) -> Result<(), Failure> {
    end_with_parent()?;
    let peer = peers::by_name(&args.peer)?;
    match args.role {
        Role::Server => peer.serve(&args.scratch),
        Role::Handler => peer.handle(&args.address),
        Role::Caller => {
            let load = args.window.map_or(Load::OneAtATime, Load::InFlight);
            let plan = Plan {
                load,
                warmup: args.warmup,
                calls: args.calls,
            };
            let outcome = peer.call(&args.address, &plan)?;
            say(&serde_json::to_string(&outcome).expect("an outcome is plain numbers"))
        }
    }
}

/// Makes this process end with its parent. Dropping kills the children of a run that fails; this is
/// for a run that is killed itself. The setting survives exec.
pub(crate) fn end_with_parent() -> Result<(), Failure> {
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(std::io::Error::from)
        .during("ask to end with the parent")?;
    Ok(())
}

#[derive(Debug, clap::Args)]
pub(crate) struct TiedArgs {
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// A command that runs `program`, with the arguments added to it, as a child that ends with this
/// process.
pub(crate) fn tied_command(program: &Path) -> Result<Command, Failure> {
    let mut command = own_command()?;
    command.arg("tied").arg("--").arg(program);
    Ok(command)
}

/// Runs as a child of [`tied_command`].
pub(crate) fn exec_tied(args: &TiedArgs) -> Result<(), Failure> {
    end_with_parent()?;
    let (program, rest) = args.command.split_first().expect("clap requires one");
    Err(Command::new(program).args(rest).exec()).during(format!("run {}", program.display()))
}

/// Starts the role of `peer`'s server in its own process; see [`peers::Peer::start`].
pub(crate) fn start_server(
    peer: &str,
    scratch: &Path,
    placement: Placement,
) -> Result<Process, Failure> {
    let mut command = role_command(peer, Role::Server)?;
    command.arg("--scratch").arg(scratch);
    Process::spawn(format!("the server of {}", peer), &mut command, placement)
}

/// Starts `peer`'s handler, and returns once it serves.
pub(crate) fn start_handler(
    peer: &str,
    address: &str,
    placement: Placement,
) -> Result<Process, Failure> {
    let mut command = role_command(peer, Role::Handler)?;
    command.arg("--address").arg(address);
    let handler = Process::spawn(format!("the handler of {}", peer), &mut command, placement)?;
    handler.wait_until_ready()?;
    Ok(handler)
}

/// Runs `peer`'s caller through `plan`.
pub(crate) fn run_caller(
    peer: &str,
    address: &str,
    plan: &Plan,
    placement: Placement,
) -> Result<Outcome, Failure> {
    let mut command = role_command(peer, Role::Caller)?;
    command.arg("--address").arg(address);
    command.arg("--warmup").arg(plan.warmup.to_string());
    command.arg("--calls").arg(plan.calls.to_string());
    if let Load::InFlight(window) = plan.load {
        command.arg("--window").arg(window.to_string());
    }
    let caller = Process::spawn(format!("the caller of {}", peer), &mut command, placement)?;
    caller.wait_for(CALLER_WAIT, |line| serde_json::from_str(line).ok())
}

pub(crate) fn own_command() -> Result<Command, Failure> {
    let program = std::env::current_exe().during("find this program's own path")?;
    Ok(Command::new(program))
}

fn role_command(peer: &str, role: Role) -> Result<Command, Failure> {
    let mut command = own_command()?;
    command.arg("role").arg(match role {
        Role::Server => "server",
        Role::Handler => "handler",
        Role::Caller => "caller",
    });
    command.arg("--peer").arg(peer);
    Ok(command)
}
