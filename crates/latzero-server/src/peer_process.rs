//! The process at the other end of a Unix socket, and whether it has ended.
//!
//! A child that a process forks has its socket too, and keeps it open when the process has ended,
//! so the socket alone does not show that its owner has ended. A descriptor of the process does
//! (pidfd_open(2)): it becomes readable when all threads have ended, whoever still has its files.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerPidfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};

use crate::socket::{Socket, credentials};

/// How often a process whose threads are ending is checked.
const LOOKS: u32 = 64;

/// The process that opened a connection.
#[derive(Debug)]
pub(crate) enum PeerProcess {
    /// The process is unknown, because it is connected over TCP; it has mapped nothing.
    Remote,
    /// It runs, or ran a moment ago, and the descriptor reports its end.
    Watched(OwnedFd, Option<Pid>),
    /// It had ended when its connection was accepted.
    Ended,
    /// The kernel provides no descriptor of it; its id, if it is visible here.
    Unwatched(Option<Pid>),
}

impl PeerProcess {
    /// The process at the other end of a socket that was just accepted.
    pub(crate) fn of(socket: &Socket) -> PeerProcess {
        let Socket::Unix(stream) = socket else {
            return PeerProcess::Remote;
        };
        // A process that is not visible here has no id.
        let pid = credentials(stream)
            .ok()
            .and_then(|(pid, _)| Pid::from_raw(pid));
        match descriptor(stream) {
            Some(process) => PeerProcess::Watched(process, pid),
            None => PeerProcess::by_id(pid),
        }
    }

    /// A process of which only the id is known. If it has ended and another process has the id now,
    /// the end of that one closes the connection: too late, but never too early.
    fn by_id(pid: Option<Pid>) -> PeerProcess {
        match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(process)) => PeerProcess::Watched(process, pid),
            Some(Err(Errno::SRCH)) => PeerProcess::Ended,
            // It is in another PID namespace, the kernel or a sandbox does not support the call, or
            // no descriptor is left.
            Some(Err(_)) | None => PeerProcess::Unwatched(pid),
        }
    }

    /// The descriptor to watch for its end.
    pub(crate) fn raw_fd(&self) -> Option<RawFd> {
        match self {
            PeerProcess::Watched(process, _) => Some(process.as_raw_fd()),
            PeerProcess::Remote | PeerProcess::Ended | PeerProcess::Unwatched(_) => None,
        }
    }

    /// Whether it has ended, with all its threads, as far as the kernel reports it. A process that
    /// is ending closes its sockets before that.
    pub(crate) fn has_ended(&self) -> bool {
        match self {
            PeerProcess::Watched(process, _) => is_readable(process.as_fd()),
            PeerProcess::Ended => true,
            PeerProcess::Remote | PeerProcess::Unwatched(_) => false,
        }
    }

    /// Whether it is certain that it no longer writes to its mappings: it has ended, or is about
    /// to.
    pub(crate) fn is_dead(&self) -> bool {
        match self {
            PeerProcess::Remote | PeerProcess::Ended => true,
            PeerProcess::Watched(process, pid) => {
                is_readable(process.as_fd()) || pid.is_some_and(has_ended)
            }
            PeerProcess::Unwatched(pid) => pid.is_some_and(has_ended),
        }
    }
}

/// The descriptor of the peer that the kernel provides since Linux 6.5 (unix(7), SO_PEERPIDFD). It
/// works for a process in another PID namespace, and never refers to a later process with its id.
fn descriptor(stream: &UnixStream) -> Option<OwnedFd> {
    getsockopt(stream, PeerPidfd).ok()
}

fn is_readable(process: BorrowedFd<'_>) -> bool {
    let mut look = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    poll(&mut look, Some(&Timespec::default())).is_ok() && !look[0].revents().is_empty()
}

/// Whether it is certain that the process `pid`, an id in this process's namespace, has ended with
/// all its threads.
///
/// A process releases its address space before its descriptors (exit(2) in the kernel), so a
/// process whose socket has closed and that still has memory is running. But each thread releases
/// it separately: the first one, which `/proc` shows for the process, may have ended long before
/// the others.
fn has_ended(pid: Pid) -> bool {
    for _ in 0..LOOKS {
        match read_process(pid) {
            Seen::Ended => return true,
            Seen::Alive => return false,
            // Perhaps the others are ending too, and will have ended in a moment.
            Seen::Headless(threads) if are_all_without_memory(pid, threads) => return true,
            Seen::Headless(_) => std::thread::yield_now(),
        }
    }
    false
}

/// The visible state of a process.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Ended,
    /// Its first thread has ended, and there are others: their total number.
    Headless(usize),
    /// Its state is unknown.
    Alive,
}

fn read_process(pid: Pid) -> Seen {
    // The only check that does not depend on what /proc shows to whom (proc(5), hidepid).
    if test_kill_process(pid) == Err(Errno::SRCH) {
        return Seen::Ended;
    }
    let shown = std::fs::read_link("/proc/self").ok();
    let own = std::process::id().to_string();
    if shown.is_none_or(|shown| shown.as_os_str() != own.as_str()) {
        // That of another namespace, where the same id is another process.
        return Seen::Alive;
    }
    let read =
        |what: &str| std::fs::read_to_string(format!("/proc/{}/{what}", pid.as_raw_nonzero())).ok();
    parse_process(read("statm").as_deref(), read("stat").as_deref())
}

/// Whether each of a process's `threads` has released its address space. A listing may miss some
/// while others end, so it counts only if it has as many as there were before.
fn are_all_without_memory(pid: Pid, threads: usize) -> bool {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    let Ok(tasks) = std::fs::read_dir(tasks) else {
        return false;
    };
    let has_none = |task: std::fs::DirEntry| {
        let statm = std::fs::read_to_string(task.path().join("statm"));
        statm.is_ok_and(|statm| statm.starts_with("0 "))
    };
    let listed: Vec<bool> = tasks.flatten().map(has_none).collect();
    listed.len() == threads && listed.into_iter().all(|has_none| has_none)
}

/// What `/proc/PID/statm` and then `/proc/PID/stat` say about an existing process
/// (proc_pid_stat(5)).
fn parse_process(statm: Option<&str>, stat: Option<&str>) -> Seen {
    let (Some(statm), Some(stat)) = (statm, stat) else {
        return Seen::Alive;
    };
    if !statm.starts_with("0 ") {
        return Seen::Alive;
    }
    // Its name is in parentheses, and may contain some. After it the state is field 3, and the
    // number of threads is field 20.
    let behind = stat.rsplit_once(") ").map(|(_, behind)| behind);
    let threads = behind.and_then(|fields| fields.split(' ').nth(17));
    match threads.and_then(|threads| threads.parse::<usize>().ok()) {
        Some(1) => Seen::Ended,
        Some(threads @ 2..) => Seen::Headless(threads),
        // It just became none.
        Some(0) | None => Seen::Alive,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, BufRead};
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Command, Stdio};

    use rustix::process::{WaitId, WaitIdOptions, waitid};

    use super::*;

    fn pid(child: &Child) -> Pid {
        Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
    }

    fn start(program: &str, args: &[&str]) -> io::Result<Child> {
        Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
    }

    /// Waits until a child has ended, and leaves it to be waited for.
    fn wait_for_end(child: &Child) {
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(pid(child)), flags).unwrap().unwrap();
    }

    #[test]
    fn a_process_is_reported_dead_only_after_it_was_killed() {
        let mut child = start("cat", &[]).unwrap();
        assert!(!has_ended(pid(&child)));
        child.kill().unwrap();
        wait_for_end(&child);
        assert!(has_ended(pid(&child)), "a stopped writer writes nothing");
        child.wait().unwrap();
        assert!(has_ended(pid(&child)));
    }

    #[test]
    fn a_process_whose_main_thread_has_ended_is_alive() {
        // Its first thread ends while another one reads on.
        let script = "import ctypes, sys, threading\n\
            threading.Thread(target=sys.stdin.read).start()\n\
            print('up', flush=True)\n\
            ctypes.CDLL(None).pthread_exit(None)\n";
        let Ok(mut child) = start("python3", &["-c", script]) else {
            // Only here; `parse_process` is tested everywhere.
            return;
        };
        let mut line = String::new();
        let mut out = io::BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        let statm = format!("/proc/{}/statm", child.id());
        while !std::fs::read_to_string(&statm).unwrap().starts_with("0 ") {
            std::thread::yield_now();
        }
        assert!(!has_ended(pid(&child)));
        child.kill().unwrap();
        wait_for_end(&child);
        assert!(has_ended(pid(&child)));
        child.wait().unwrap();
    }

    #[test]
    fn an_unknown_process_counts_as_alive() {
        let stat = |threads: &str| {
            format!("7 (a) Z 1) Z 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 {threads} 0 5 0 0")
        };
        let (none, some) = ("0 0 0 0 0 0 0\n", "2048 400 300 5 0 100 0\n");
        for (statm, stat, expected) in [
            (Some(none), Some(stat("1")), Seen::Ended),
            (Some(none), Some(stat("2")), Seen::Headless(2)),
            (Some(none), Some(stat("0")), Seen::Alive),
            (Some(none), Some("7 (a".into()), Seen::Alive),
            (Some(none), None, Seen::Alive),
            (Some(some), Some(stat("1")), Seen::Alive),
            // Hidden.
            (None, None, Seen::Alive),
            (None, Some(stat("1")), Seen::Alive),
        ] {
            assert_eq!(
                parse_process(statm, stat.as_deref()),
                expected,
                "{statm:?} {stat:?}"
            );
        }
    }

    #[test]
    fn the_init_process_always_counts_as_alive() {
        assert!(!has_ended(Pid::INIT));
    }

    #[test]
    fn a_peer_is_judged_by_its_own_process() {
        let (own, _other) = UnixStream::pair().unwrap();
        let process = PeerProcess::of(&Socket::unix(own).unwrap());
        assert!(process.raw_fd().is_some());
        assert!(!process.has_ended() && !process.is_dead());
    }

    #[test]
    fn without_kernel_information_no_process_counts_as_dead() {
        let process = PeerProcess::by_id(None);
        assert!(matches!(process, PeerProcess::Unwatched(None)));
        assert!(process.raw_fd().is_none() && !process.has_ended() && !process.is_dead());
    }

    #[test]
    fn a_process_is_watched_by_its_pid_until_it_ends() {
        let mut child = start("cat", &[]).unwrap();
        let process = PeerProcess::by_id(Some(pid(&child)));
        assert!(process.raw_fd().is_some() && !process.has_ended());
        child.kill().unwrap();
        wait_for_end(&child);
        assert!(
            process.has_ended() && process.is_dead(),
            "as a stopped writer"
        );
        child.wait().unwrap();
        assert!(process.has_ended());
        let process = PeerProcess::by_id(Some(pid(&child)));
        assert!(matches!(process, PeerProcess::Ended));
    }
}
