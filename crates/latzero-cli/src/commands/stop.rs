//! `stop`: asks the server to drain and end, and waits until it has.

use std::time::{Duration, Instant};

use latzero_server::startup::lock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

use crate::args::StopArgs;
use crate::connect::ConnectOptions;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::Output;

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

pub(crate) fn run(args: &StopArgs, output: &Output) -> CommandResult {
    let started = Instant::now();
    let deadline = started + args.timeout;
    let connection = args
        .reach
        .connect(&ConnectOptions::once("stop").within(args.timeout))?;
    let stats = connection.app.request(&json!({"action": "stats"}))?;
    let pid = stats["server"]["pid"].as_u64().unwrap_or(0);
    let data_dir = stats["server"]["data_dir"]
        .as_str()
        .unwrap_or("")
        .to_owned();
    // Opened while the server is certainly running, so that it cannot be another process.
    let process = process_of(&data_dir, pid);
    connection.administer(&json!({"action": "shutdown"}))?;
    let place = connection.place();
    drop(connection);
    let Some(process) = process else {
        output.line(match output.json {
            true => json!({"stopping": true, "pid": pid}).to_string(),
            false => format!(
                "asked {place} to stop; it runs on another machine, so this command cannot see \
                 when it stops"
            ),
        })?;
        return Ok(Exit::Ok);
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if has_ended(&process, left.min(TICK))? {
            break;
        }
        if left.is_zero() {
            output.progress_done();
            let text = format!(
                "the server, pid {pid}, is still finishing calls after {:?}",
                args.timeout
            );
            return Err(Failure::new(Exit::Timeout, text).with_help(format!(
                "it stops after its `drain_timeout` at the latest; to end it at once: kill -9 {pid}"
            )));
        }
        let seconds = started.elapsed().as_secs();
        output.progress(format_args!(
            "stopping, pid {pid}: running calls are finished … {seconds} s"
        ));
    }
    output.progress_done();
    output.line(match output.json {
        true => json!({"stopped": true, "pid": pid}).to_string(),
        false => format!("stopped, pid {pid}"),
    })?;
    Ok(Exit::Ok)
}

/// The server's process if it runs on this machine, which is so if the kernel says that it holds
/// the directory's lock. The kernel drops the lock when the process ends.
fn process_of(data_dir: &str, pid: u64) -> Option<rustix::fd::OwnedFd> {
    let pid = u32::try_from(pid).ok()?;
    let holder = lock::holder(data_dir.as_ref())?;
    if holder.pid != Some(pid) {
        return None;
    }
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

/// Waits for the end of a process; its descriptor becomes readable then (pidfd_open(2)).
fn has_ended(process: &rustix::fd::OwnedFd, wait: Duration) -> Result<bool, Failure> {
    let wait = Timespec::try_from(wait).expect("it is at most one tick");
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    match poll(&mut fds, Some(&wait)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(Failure::new(
            Exit::Failure,
            format!("waiting for it failed: {error}"),
        )),
    }
}
