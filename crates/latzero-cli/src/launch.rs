//! Starts programs that must not outlive this one, however it ends.
//!
//! The kernel can end a process when its parent dies (prctl(2), `PR_SET_PDEATHSIG`), but the
//! process itself has to ask for it, between fork and exec, where only unsafe code can run. So this
//! program starts itself first, asks, and then becomes the program. What the program starts in turn
//! is covered by a [`Supervisor`], which ends whole process groups.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::process::{Pid, Signal, getppid, kill_process_group, set_parent_process_death_signal};

use crate::exit::Failure;

/// The words that replace the command when this program starts itself.
const EXEC: &str = "__exec";
const SUPERVISE: &str = "__supervise";

/// The exit code of shells and env(1) if a program cannot be run.
const CANNOT_RUN: i32 = 126;

/// A command for a program that ends when this one does.
pub(crate) fn command(program: &[OsString]) -> Command {
    let mut command = this_program(EXEC);
    command.arg(std::process::id().to_string()).args(program);
    command
}

fn this_program(word: &str) -> Command {
    // The running program itself, even if its file was replaced.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("latzero").arg(word);
    command
}

/// Does the internal work if this program started itself.
pub(crate) fn run_internal() -> Option<i32> {
    let mut args = std::env::args_os().skip(1);
    match args.next()?.to_str()? {
        EXEC => Some(exec(args)),
        SUPERVISE => Some(supervise(io::stdin().lock())),
        _ => None,
    }
}

/// Becomes the program.
fn exec(mut args: impl Iterator<Item = OsString>) -> i32 {
    let parent = args.next().and_then(|pid| pid.to_str()?.parse().ok());
    let parent = parent.and_then(Pid::from_raw);
    let Some(program) = args.next() else {
        return CANNOT_RUN;
    };
    let asked = set_parent_process_death_signal(Some(Signal::KILL));
    // The parent may have ended before the kernel was asked.
    if asked.is_err() || parent.is_none() || getppid() != parent {
        return CANNOT_RUN;
    }
    let error = Command::new(&program).args(args).exec();
    eprintln!(
        "latzero: '{}' cannot be started: {error}",
        program.display()
    );
    CANNOT_RUN
}

/// A process that ends the process groups of this program's children if this program ends without
/// doing so.
#[derive(Debug)]
pub(crate) struct Supervisor {
    to: Mutex<ChildStdin>,
    _child: Child,
}

impl Supervisor {
    /// Starts it.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub(crate) fn start() -> io::Result<Supervisor> {
        let mut child = this_program(SUPERVISE)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            // It ignores Ctrl-C, because it must outlive this program.
            .process_group(0)
            .spawn()?;
        let to = child.stdin.take().expect("the pipe was requested");
        Ok(Supervisor {
            to: Mutex::new(to),
            _child: child,
        })
    }

    /// Registers a process group that ends with this program.
    pub(crate) fn add(&self, group: Pid) {
        self.send(&format!("+{}\n", group.as_raw_nonzero()));
    }

    /// Removes one that has ended.
    pub(crate) fn remove(&self, group: Pid) {
        self.send(&format!("-{}\n", group.as_raw_nonzero()));
    }

    fn send(&self, line: &str) {
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        // If it was killed, the programs still end with this one.
        let _ = to.write_all(line.as_bytes());
    }
}

/// Keeps the process groups that `input` registers, and ends them at the end of `input`.
fn supervise(input: impl io::BufRead) -> i32 {
    let mut groups = HashSet::new();
    for line in input.lines().map_while(Result::ok) {
        let (sign, number) = line.split_at_checked(1).unwrap_or_default();
        let Some(group) = number.parse().ok().and_then(Pid::from_raw) else {
            continue;
        };
        match sign {
            "+" => groups.insert(group),
            _ => groups.remove(&group),
        };
    }
    for group in groups {
        let _ = kill_process_group(group, Signal::KILL);
    }
    0
}

/// Refuses a program that cannot be started, before anything else is done.
///
/// # Errors
/// Exit 2, with what was looked for and where it was looked for.
pub(crate) fn check(program: &OsStr) -> Result<(), Failure> {
    let refused = |why: String| {
        let text = format!("'{}' cannot be started: {why}", program.display());
        Failure::usage(text)
            .with_help("name a program on the PATH, or the path of an executable file")
    };
    if program.as_bytes().contains(&b'/') {
        return match is_executable(Path::new(program)) {
            Ok(true) => Ok(()),
            Ok(false) => Err(refused("it is not an executable file".to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(refused("there is no such file".to_owned()))
            }
            Err(error) => Err(refused(error.kind().to_string())),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(program));
    match found.any(|file: PathBuf| is_executable(&file).unwrap_or(false)) {
        true => Ok(()),
        false => Err(refused("there is no such program on the PATH".to_owned())),
    }
}

fn is_executable(file: &Path) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_searched_on_the_path() {
        let is_ok = |program: &str| check(OsStr::new(program)).is_ok();
        assert!(is_ok("sh"));
        assert!(is_ok("/bin/sh"));
        assert!(!is_ok("/bin"));
        assert!(!is_ok("/nowhere/at/all"));
        assert!(!is_ok("no-such-program-anywhere"));
        assert!(!is_ok("/etc/passwd"));
        assert!(!is_ok(""));
    }

    #[test]
    fn the_supervisor_ignores_invalid_input() {
        assert_eq!(supervise(&b"+\n-\nx\n+0\n\n\xff\n"[..]), 0);
    }
}
