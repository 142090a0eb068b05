//! The machine that was measured. A figure means nothing without it.

use serde::Serialize;
use std::fmt;
use std::fs;

/// The machine's properties. Those that it does not report are empty.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    system: String,
    kernel: String,
    cpu: String,
    cpus: usize,
    virtual_machine: bool,
    memory_mib: u64,
    /// One-minute load average before the first run.
    load_before: String,
    /// `release`, or a profile whose figures are not representative.
    profile: &'static str,
}

impl Machine {
    pub(crate) fn observe() -> Self {
        let uname = rustix::system::uname();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory_kib: u64 = read("/proc/meminfo")
            .split_whitespace()
            .nth(1)
            .and_then(|kib| kib.parse().ok())
            .unwrap_or_default();
        let flags = field("flags").unwrap_or_default();
        Self {
            system: uname.sysname().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            cpu: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            virtual_machine: flags.split_whitespace().any(|flag| flag == "hypervisor"),
            memory_mib: memory_kib / 1024,
            load_before: load(),
            profile: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
        }
    }

    /// Whether others were using the machine when the run began.
    pub(crate) fn was_busy(&self) -> bool {
        self.load_before.parse().is_ok_and(|load: f64| load > 0.5)
    }

    /// Warns on standard error if this build's figures are not representative.
    pub(crate) fn warn_of_debug_build(&self, is_quick: bool) {
        if self.profile != "release" && !is_quick {
            eprintln!("this is a debug build: its figures mean nothing; use --release");
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            system,
            kernel,
            cpu,
            cpus,
            memory_mib,
            load_before,
            profile,
            ..
        } = self;
        let kind = if self.virtual_machine {
            ", virtual machine"
        } else {
            ""
        };
        write!(
            f,
            "{cpus} × {cpu}{kind}, {memory_mib} MiB, {system} {kernel}, "
        )?;
        write!(f, "load {load_before}, {profile} build")
    }
}

/// The load average over the last minute.
pub(crate) fn load() -> String {
    read("/proc/loadavg")
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
