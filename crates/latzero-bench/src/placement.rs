//! The CPUs on which the processes of a measurement run.

use crate::failure::{During, Failure};
use std::process::{Child, Command};

/// Where caller, server and handler run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Placement {
    /// All three on one CPU: the figures vary least.
    OneCpu,
    /// Left to the scheduler: what users see.
    Free,
}

impl Placement {
    pub(crate) const ALL: [Self; 2] = [Self::OneCpu, Self::Free];

    /// The placement whose figures vary least, if the system supports it.
    pub(crate) fn steadiest() -> Self {
        if cfg!(target_os = "linux") {
            Self::OneCpu
        } else {
            Self::Free
        }
    }

    /// As [`Self::describe`], for a measurement that is not three processes.
    pub(crate) fn describe_one(self) -> &'static str {
        match self {
            Self::OneCpu => "everything on one CPU",
            Self::Free => self.describe(),
        }
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::OneCpu => "all three processes on one CPU",
            Self::Free => "left to the scheduler",
        }
    }

    /// Starts `command` with this placement for all its threads.
    pub(crate) fn spawn(self, command: &mut Command) -> Result<Child, Failure> {
        let program = command.get_program().display().to_string();
        let spawn = |command: &mut Command| command.spawn().during(format!("start {program}"));
        match self {
            Self::Free => spawn(command),
            // A child inherits the CPUs of the thread that starts it. So it is pinned before its
            // first instruction, and so are its threads; a runtime that counts CPUs when it starts
            // counts one.
            Self::OneCpu => cpus::on_one(|| spawn(command))?,
        }
    }

    /// Runs `act`, and the threads and processes that it starts, with this placement.
    pub(crate) fn run<T>(self, act: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
        match self {
            Self::Free => act(),
            Self::OneCpu => cpus::on_one(act)?,
        }
    }

    /// Runs `act` on this thread where what [`Placement::run`] places does not run, if there is
    /// another CPU.
    pub(crate) fn run_beside<T>(
        self,
        act: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        match self {
            Self::Free => act(),
            Self::OneCpu => cpus::on_others(act)?,
        }
    }

    /// Fails if a thread of process `pid` may run elsewhere.
    pub(crate) fn check(self, pid: u32) -> Result<(), Failure> {
        match self {
            Self::Free => Ok(()),
            Self::OneCpu => cpus::check_one(pid),
        }
    }
}

#[cfg(target_os = "linux")]
mod cpus {
    use super::{During, Failure};
    use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
    use std::io;

    /// Runs `act` with this thread on one CPU, then restores its CPUs.
    pub(super) fn on_one<T>(act: impl FnOnce() -> T) -> Result<T, Failure> {
        let before = affinity(None).during("read this thread's CPUs")?;
        let mut one = CpuSet::new();
        one.set(last(&before));
        on(&one, &before, act)
    }

    /// Runs `act` with this thread on all CPUs but that of [`on_one`], unless there is only one.
    pub(super) fn on_others<T>(act: impl FnOnce() -> T) -> Result<T, Failure> {
        let before = affinity(None).during("read this thread's CPUs")?;
        let mut others = before;
        if before.count() > 1 {
            others.unset(last(&before));
        }
        on(&others, &before, act)
    }

    /// The last CPU: most systems send their interrupts to the first one.
    fn last(cpus: &CpuSet) -> usize {
        (0..CpuSet::MAX_CPU)
            .rev()
            .find(|cpu| cpus.is_set(*cpu))
            .expect("a running thread may run on some CPU")
    }

    fn on<T>(cpus: &CpuSet, before: &CpuSet, act: impl FnOnce() -> T) -> Result<T, Failure> {
        sched_setaffinity(None, cpus)
            .map_err(io::Error::from)
            .during("pin to CPUs")?;
        let done = act();
        sched_setaffinity(None, before)
            .map_err(io::Error::from)
            .during("unpin")?;
        Ok(done)
    }

    pub(super) fn check_one(pid: u32) -> Result<(), Failure> {
        let what = format!("read the threads of process {pid}");
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).during(&what)? {
            let name = thread.during(&what)?.file_name();
            let id = name
                .to_str()
                .and_then(|name| name.parse().ok())
                .and_then(Pid::from_raw);
            match affinity(id) {
                Ok(cpus) if cpus.count() != 1 => {
                    return Err(Failure::said(format!(
                        "thread {} of process {pid} left its one CPU: the figures would not \
                         compare",
                        name.display()
                    )));
                }
                // The thread has ended in the meantime.
                _ => {}
            }
        }
        Ok(())
    }

    fn affinity(thread: Option<Pid>) -> io::Result<CpuSet> {
        Ok(sched_getaffinity(thread)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod cpus {
    use super::Failure;

    pub(super) fn on_one<T>(_act: impl FnOnce() -> T) -> Result<T, Failure> {
        Err(Failure::said(
            "processes can be pinned on Linux only: use `--placement free`",
        ))
    }

    pub(super) fn on_others<T>(act: impl FnOnce() -> T) -> Result<T, Failure> {
        Ok(act())
    }

    pub(super) fn check_one(_pid: u32) -> Result<(), Failure> {
        Ok(())
    }
}
