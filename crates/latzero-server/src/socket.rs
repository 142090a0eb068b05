//! A connected TCP or Unix stream that any thread can write to without blocking.
//!
//! Everything specific to Unix sockets is in this file.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use latzero_fabric::Transport;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// How often a process whose threads are just ending is looked at.
const LOOKS: u32 = 64;

/// A connected stream in non-blocking mode.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// More descriptors of this user are on their way than may be open at once (unix(7), ETOOMANYREFS):
/// the bytes that they travel with can be written when some of them were taken, by whomever. The
/// kernel does not say when that is.
#[derive(Debug, thiserror::Error)]
#[error("too many descriptors are in flight")]
struct Crowded;

impl From<Crowded> for io::Error {
    fn from(crowded: Crowded) -> io::Error {
        io::Error::new(io::ErrorKind::WouldBlock, crowded)
    }
}

/// Whether a write that would block is to be tried again by the clock, as the kernel will not say
/// when it can be.
pub(crate) fn is_crowded(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn std::error::Error + Send + Sync>::is::<Crowded>)
}

/// Who is at the other end, as far as the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum User {
    /// A user of this machine, by the Unix socket's peer credentials (unix(7), SO_PEERCRED).
    Uid(u32),
    /// An address.
    Address(IpAddr),
    /// The kernel did not say.
    Unknown,
}

impl User {
    /// Whether it is the server's own user, or the machine's administrator.
    pub(crate) fn is_trusted(self) -> bool {
        matches!(self, User::Uid(uid) if uid == 0 || uid == rustix::process::geteuid().as_raw())
    }

    /// Whether it is on this machine.
    pub(crate) fn is_of_this_machine(self) -> bool {
        match self {
            User::Uid(_) => true,
            User::Address(address) => address.is_loopback(),
            User::Unknown => false,
        }
    }

    /// The user of this machine, if the kernel reports it.
    pub(crate) fn uid(self) -> Option<u32> {
        match self {
            User::Uid(uid) => Some(uid),
            User::Address(_) | User::Unknown => None,
        }
    }

    /// A user at an address. All addresses of this machine are one user.
    fn at(address: IpAddr) -> User {
        let address = address.to_canonical();
        if address.is_loopback() {
            return User::Address(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        User::Address(match address {
            IpAddr::V4(_) => address,
            // A client that has one address of a /64 has all of them (RFC 6177).
            IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        })
    }
}

impl Socket {
    pub(crate) fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        // A message is written whole: waiting to fill a segment would only add latency.
        stream.set_nodelay(true)?;
        Ok(Socket::Tcp(stream))
    }

    pub(crate) fn unix(stream: UnixStream) -> io::Result<Socket> {
        stream.set_nonblocking(true)?;
        Ok(Socket::Unix(stream))
    }

    pub(crate) fn transport(&self) -> Transport {
        match self {
            Socket::Tcp(_) => Transport::Tcp,
            Socket::Unix(_) => Transport::Unix,
        }
    }

    pub(crate) fn user(&self) -> User {
        match self {
            Socket::Tcp(stream) => stream
                .peer_addr()
                .map_or(User::Unknown, |a| User::at(a.ip())),
            Socket::Unix(stream) => match credentials(stream) {
                Ok((_, uid)) => User::Uid(uid),
                Err(_) => User::Unknown,
            },
        }
    }

    pub(crate) fn raw_fd(&self) -> RawFd {
        match self {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// Reads what is there.
    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).read(buf),
            Socket::Unix(stream) => (&*stream).read(buf),
        }
    }

    /// Reads what is there, and takes the descriptors that came with it, `most` of them; where
    /// there are more, all of them are closed and the read fails.
    pub(crate) fn read_with(
        &self,
        buf: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
        most: usize,
    ) -> io::Result<usize> {
        match self {
            Socket::Tcp(_) => self.read(buf),
            Socket::Unix(stream) => {
                latzero_shm::fds::try_recv_with_fds(stream, buf, descriptors, most)
            }
        }
    }

    /// Reads what is there behind what `buf` holds, as far as its capacity goes.
    pub(crate) fn read_more(&self, buf: &mut Vec<u8>) -> io::Result<usize> {
        let room = rustix::buffer::spare_capacity(buf);
        let read = match self {
            Socket::Tcp(stream) => rustix::io::read(stream, room)?,
            Socket::Unix(stream) => rustix::io::read(stream, room)?,
        };
        Ok(read)
    }

    /// Writes what fits.
    pub(crate) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => (&*stream).write(buf),
            Socket::Unix(stream) => (&*stream).write(buf),
        }
    }

    /// Writes what fits, with descriptors that travel with the first byte (unix(7), SCM_RIGHTS).
    /// Where too many are on their way already it would block, as [`is_crowded`] tells.
    pub(crate) fn write_with(&self, buf: &[u8], descriptors: &[Arc<OwnedFd>]) -> io::Result<usize> {
        match self {
            _ if descriptors.is_empty() => self.write(buf),
            Socket::Tcp(_) => unreachable!("descriptors are only sent to who can take them"),
            Socket::Unix(stream) => {
                let descriptors: Vec<_> = descriptors.iter().map(|d| d.as_fd()).collect();
                latzero_shm::fds::send_with_fds(stream, buf, &descriptors).map_err(|error| {
                    match Errno::from_io_error(&error) {
                        Some(Errno::TOOMANYREFS) => Crowded.into(),
                        _ => error,
                    }
                })
            }
        }
    }

    /// Whether the process that opened the connection has surely ended, so that it writes no more
    /// to what it has mapped. What it has handed on to children of its own is not seen.
    pub(crate) fn is_process_dead(&self) -> bool {
        let Socket::Unix(stream) = self else {
            // Over TCP nothing is mapped.
            return true;
        };
        // One that can't be seen from here has no id, and is not known to be dead.
        let pid = credentials(stream)
            .ok()
            .and_then(|(pid, _)| Pid::from_raw(pid));
        pid.is_some_and(has_ended)
    }

    /// Whether the other end has closed, though what it sent before may still be unread (poll(2),
    /// `POLLHUP`).
    pub(crate) fn has_hung_up(&self) -> bool {
        let none = PollFlags::empty();
        let mut look = match self {
            Socket::Tcp(stream) => [PollFd::new(stream, none)],
            Socket::Unix(stream) => [PollFd::new(stream, none)],
        };
        let now = Timespec::default();
        poll(&mut look, Some(&now)).is_ok() && look[0].revents().contains(PollFlags::HUP)
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // An error means that the other end was quicker.
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(how),
            Socket::Unix(stream) => stream.shutdown(how),
        };
    }
}

/// The process and the user at the other end of a Unix socket (unix(7), SO_PEERCRED). The pid is 0
/// if that process is of a PID namespace that can't be seen from here; its user is known all the
/// same.
pub(crate) fn credentials(socket: &impl AsFd) -> io::Result<(i32, u32)> {
    let found = getsockopt(socket, PeerCredentials)?;
    Ok((found.pid(), found.uid()))
}

/// Whether the process `pid`, an id of this process's own namespace, has surely ended: all its
/// threads.
///
/// A process gives up its address space before its descriptors (exit(2) in the kernel), so one
/// whose socket has closed and that still has memory lives. But each thread gives it up for itself:
/// the first one, which `/proc` shows for the process, may have ended long before the others.
fn has_ended(pid: Pid) -> bool {
    for _ in 0..LOOKS {
        match read_process(pid) {
            Seen::Ended => return true,
            Seen::Alive => return false,
            // Perhaps the others are ending too, and are gone in a moment.
            Seen::Headless(threads) if are_all_without_memory(pid, threads) => return true,
            Seen::Headless(_) => std::thread::yield_now(),
        }
    }
    false
}

/// What there is to be seen of a process.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Ended,
    /// Its first thread has ended, and there are others: their total number.
    Headless(usize),
    /// Or nobody knows.
    Alive,
}

fn read_process(pid: Pid) -> Seen {
    // The only word that does not depend on what of /proc is shown, and to whom (proc(5), hidepid).
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

/// Whether each of a process's `threads` has given its address space up. A listing may miss some
/// while others end, so it counts only where it is of as many as there were before.
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

/// What `/proc/PID/statm` and then `/proc/PID/stat` say of a process that is there
/// (proc_pid_stat(5)).
fn parse_process(statm: Option<&str>, stat: Option<&str>) -> Seen {
    let (Some(statm), Some(stat)) = (statm, stat) else {
        return Seen::Alive;
    };
    if !statm.starts_with("0 ") {
        return Seen::Alive;
    }
    // Its name stands in parentheses, and may have such itself. Behind it the state is field 3, and
    // the number of threads 20.
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
    use std::io::BufRead;
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
    fn a_process_has_ended_when_it_was_killed_and_not_before() {
        let mut child = start("cat", &[]).unwrap();
        assert!(!has_ended(pid(&child)));
        child.kill().unwrap();
        wait_for_end(&child);
        assert!(has_ended(pid(&child)), "a zombie writes no more");
        child.wait().unwrap();
        assert!(has_ended(pid(&child)));
    }

    #[test]
    fn a_process_whose_first_thread_has_ended_lives() {
        // Its first thread ends while another one reads on.
        let script = "import ctypes, sys, threading\n\
            threading.Thread(target=sys.stdin.read).start()\n\
            print('up', flush=True)\n\
            ctypes.CDLL(None).pthread_exit(None)\n";
        let Ok(mut child) = start("python3", &["-c", script]) else {
            // Only here; `judge` is tested everywhere.
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
    fn what_can_not_be_seen_for_sure_is_alive() {
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
    fn init_is_alive_whatever_is_shown_of_it() {
        assert!(!has_ended(Pid::INIT));
    }

    #[test]
    fn a_peer_is_judged_by_its_own_process() {
        let (own, _other) = UnixStream::pair().unwrap();
        assert!(!Socket::unix(own).unwrap().is_process_dead());
    }

    #[test]
    fn too_many_descriptors_on_their_way_are_waited_for() {
        let error: io::Error = Crowded.into();
        assert!(error.kind() == io::ErrorKind::WouldBlock && is_crowded(&error));
        let full: io::Error = Errno::AGAIN.into();
        assert!(full.kind() == io::ErrorKind::WouldBlock && !is_crowded(&full));
    }
}
