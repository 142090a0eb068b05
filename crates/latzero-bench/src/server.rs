//! The LatZero server for measurements without peers: the real program with its own data directory
//! and port, and its memory as reported by the kernel.

use crate::failure::{During, Failure};
use crate::placement::Placement;
use crate::process::{self, Process, READY_WAIT};
use crate::stream::Transport;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// The program `latzero`: the one that `LATZERO_BIN` names, or else the one next to this program.
pub(crate) fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("LATZERO_BIN") {
        return named.into();
    }
    let here = std::env::current_exe().unwrap_or_default();
    let near = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("latzero"))
        .find(|path| path.is_file());
    near.unwrap_or_else(|| here.with_file_name("latzero"))
}

/// Which program a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// [`program`].
    Now,
    /// [`program_before`].
    Before,
}

/// The variable that passes the path of the earlier program to the processes of a measurement.
pub(crate) const BEFORE: &str = "BENCH_BEFORE";

/// The program that `--before` names.
pub(crate) fn program_before() -> Option<PathBuf> {
    std::env::var_os(BEFORE).map(PathBuf::from)
}

/// Fails with a remedy if there is no such program.
pub(crate) fn check_program() -> Result<(), Failure> {
    let program = program();
    if program.is_file() {
        return Ok(());
    }
    Err(Failure::said(format!(
        "{} is not built: `cargo build --release -p latzero-cli`, or name the program in \
         LATZERO_BIN",
        program.display()
    )))
}

/// The data directory of a server that was started with its files under `scratch`.
pub(crate) fn data_dir(scratch: &Path) -> PathBuf {
    scratch.join("data")
}

/// Appends the arguments with which every server is started: quiet, and with its files under
/// `scratch`.
pub(crate) fn append_start_args(command: &mut Command, scratch: &Path) {
    command.args(["start", "--port", "0", "--log-level", "warn", "--data-dir"]);
    command.arg(data_dir(scratch));
}

/// The contents of the server's ready line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ready {
    /// `IP:PORT`.
    pub(crate) tcp: String,
    /// The socket's path.
    pub(crate) unix: String,
}

impl Ready {
    /// Reads `latzero ready … tcp://IP:PORT unix:PATH`; any other line is `None`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let words = line.strip_prefix("latzero ready")?;
        let word = |prefix: &str| {
            let found = words
                .split_whitespace()
                .find_map(|w| w.strip_prefix(prefix));
            found.map(str::to_owned)
        };
        Some(Self {
            tcp: word("tcp://").or_else(|| word("tls://"))?,
            unix: word("unix:")?,
        })
    }
}

/// A running server. Dropping it kills the server and removes its own files.
pub(crate) struct Running {
    process: Process,
    ready: Ready,
    /// Dropped after the process, which may write there until it ends.
    _scratch: Option<TempDir>,
}

impl Running {
    /// Starts a server with `settings`, each `NAME=VALUE`.
    pub(crate) fn start(settings: &[String]) -> Result<Self, Failure> {
        let scratch = tempfile::tempdir().during("make a directory for the server")?;
        let running = Self::start_in(scratch.path(), settings)?;
        Ok(Self {
            _scratch: Some(scratch),
            ..running
        })
    }

    /// As [`Running::start`], with files under `scratch`, which outlives the server.
    pub(crate) fn start_in(scratch: &Path, settings: &[String]) -> Result<Self, Failure> {
        check_program()?;
        Self::start_program(&program(), scratch, settings)
    }

    /// As [`Running::start_in`], with another program.
    pub(crate) fn start_program(
        program: &Path,
        scratch: &Path,
        settings: &[String],
    ) -> Result<Self, Failure> {
        let mut command = process::tied_command(program)?;
        append_start_args(&mut command, scratch);
        for setting in settings {
            command.arg("--set").arg(setting);
        }
        // The server inherits the placement of this thread.
        let process = Process::spawn("the server of LatZero", &mut command, Placement::Free)?;
        let ready = process.wait_for(READY_WAIT, Ready::parse)?;
        Ok(Self {
            process,
            ready,
            _scratch: None,
        })
    }

    /// Asks the server to end, and waits until it has. Dropping kills it instead.
    pub(crate) fn end_orderly(self) -> Result<(), Failure> {
        self.process.end_orderly()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(crate) fn address(&self, transport: Transport) -> &str {
        match transport {
            Transport::Tcp => &self.ready.tcp,
            Transport::Unix => &self.ready.unix,
        }
    }

    pub(crate) fn memory(&self) -> Result<Memory, Failure> {
        Memory::of(self.process.pid())
    }
}

/// A process's memory, in bytes; see `proc_pid_smaps_rollup(5)`. Socket buffers of the kernel are
/// not included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Pages in memory, including shared ones.
    pub(crate) resident: u64,
    /// Pages in memory, each divided by the number of processes that share it.
    pub(crate) proportional: u64,
    /// Pages without a file behind them: heap and stacks.
    pub(crate) anonymous: u64,
}

impl Memory {
    fn of(pid: u32) -> Result<Self, Failure> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path)
            .during(format!("read {path} (memory is measured only on Linux)"))?;
        Self::parse(&text).ok_or_else(|| Failure::said(format!("{path} is not as expected")))
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
            Some(kib * 1024)
        };
        Some(Self {
            resident: bytes("Rss:")?,
            proportional: bytes("Pss:")?,
            anonymous: bytes("Anonymous:")?,
        })
    }

    /// The increase since `before`; a decrease counts as zero.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            resident: self.resident.saturating_sub(before.resident),
            proportional: self.proportional.saturating_sub(before.proportional),
            anonymous: self.anonymous.saturating_sub(before.anonymous),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ready_line_is_found_among_others() {
        let line = "latzero ready 0.1.0 pid 7 data /d tcp://127.0.0.1:9 unix:/d/latzero.sock";
        let ready = Ready {
            tcp: "127.0.0.1:9".to_owned(),
            unix: "/d/latzero.sock".to_owned(),
        };
        assert_eq!(Ready::parse(line), Some(ready));
        assert_eq!(Ready::parse("try: latzero call system/echo"), None);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "55e-7ff ---p 00000000 00:00 0 [rollup]\nRss:     8 kB\nPss:   6 kB\n\
                    Pss_Anon:  3 kB\nAnonymous:  4 kB\n";
        let memory = Memory {
            resident: 8192,
            proportional: 6144,
            anonymous: 4096,
        };
        assert_eq!(Memory::parse(text), Some(memory));
        assert_eq!(Memory::parse("Rss: 8 kB"), None);
    }
}
