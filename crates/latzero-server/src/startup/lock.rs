//! One server per data directory: a kernel lock on a file that is never removed.
//!
//! The kernel releases the lock when its holder ends, for whatever reason. The content of the file
//! is only for people and error messages.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::{Deserialize, Serialize};

use super::StartupError;
use crate::utc::rfc3339;

/// The lock file's name inside the data directory.
pub const LOCK_NAME: &str = "lock";

/// How often `/proc/locks` is read again for a lock that should be in it.
const READS_MAX: usize = 5;

/// How many bytes of a lock file are read at most.
const RECORD_BYTES_MAX: u64 = 16 << 10;

/// How many bytes of a directory's name are used in a socket's name, which has 107 (unix(7)).
const NAME_BYTES_MAX: usize = 32;

/// How many times to search for a holder that must exist.
const LOOKS_MAX: u32 = 10;

/// What the holder writes into the lock file, as one line of JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The process id of the server.
    pub pid: u32,
    /// When it started: RFC 3339, UTC.
    #[serde(default)]
    pub started: String,
    /// Where it listens; empty until it does.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// The holder of a lock, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The process id: from the kernel if possible, else from the file.
    pub pid: Option<u32>,
    /// The content of the file, if the holder wrote it.
    pub record: Option<Record>,
}

/// The lock on a data directory, held until it is dropped.
#[derive(Debug)]
pub struct InstanceLock {
    file: File,
    started: String,
    /// A bound name, so that no other server starts on this path while its directory is missing.
    /// None if the kernel does not support such names.
    path: Option<UnixListener>,
}

impl InstanceLock {
    /// Takes the lock on `data_dir`, and writes its holder to the file.
    ///
    /// # Errors
    /// [`StartupError::AnotherServer`] if it is taken.
    pub fn acquire(data_dir: &Path) -> Result<InstanceLock, StartupError> {
        let by_path = PathName::of(data_dir).map(|name| name.take(data_dir));
        let by_path = by_path.transpose()?.flatten();
        let path = data_dir.join(LOCK_NAME);
        let file = open(&path).map_err(|cause| StartupError::of_io("opening", &path, cause))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                // The kernel's list is read in parts, and a part may miss a lock while others come
                // and go.
                let holder = (0..LOOKS_MAX).find_map(|_| holder(data_dir));
                let holder = holder.unwrap_or_default();
                return Err(StartupError::AnotherServer {
                    data_dir: data_dir.to_owned(),
                    holder,
                });
            }
            Err(cause) => return Err(StartupError::of_io("locking", &path, cause.into())),
        }
        let lock = InstanceLock {
            file,
            started: rfc3339(SystemTime::now()),
            path: by_path,
        };
        lock.record(&[]);
        Ok(lock)
    }

    /// Writes who holds the lock and where it listens. A failure is ignored: only messages depend
    /// on it.
    pub fn record(&self, addresses: &[String]) {
        let record = Record {
            pid: std::process::id(),
            started: self.started.clone(),
            addresses: addresses.to_vec(),
        };
        let mut line = serde_json::to_vec(&record).expect("a record is plain data");
        line.push(b'\n');
        self.overwrite(&line);
    }

    /// Whether the lock's file is still the one in `data_dir`.
    pub(crate) fn is_in(&self, data_dir: &Path) -> bool {
        let identity = |found: fs::Metadata| (found.dev(), found.ino());
        let held = self.file.metadata().map(identity);
        let found = fs::symlink_metadata(data_dir.join(LOCK_NAME)).map(identity);
        matches!((held, found), (Ok(held), Ok(found)) if held == found)
    }

    /// Recreates the lock file in a directory that lost it. False if another server was first, or
    /// the disk cannot be written.
    pub(crate) fn renew(&mut self, data_dir: &Path, addresses: &[String]) -> bool {
        let Ok(file) = open(&data_dir.join(LOCK_NAME)) else {
            return false;
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return false;
        }
        self.file = file;
        self.record(addresses);
        true
    }

    /// Closes the connections of processes that checked whether the path is in use.
    pub(crate) fn answer(&self) {
        if let Some(listener) = &self.path {
            while listener.accept().is_ok() {}
        }
    }

    fn overwrite(&self, bytes: &[u8]) {
        use std::io::{Seek, SeekFrom};
        let mut file = &self.file;
        let written = file
            .set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| file.write_all(bytes));
        drop(written);
    }
}

impl Drop for InstanceLock {
    fn drop(&mut self) {
        // Emptied while still held, so that the file never describes a server that has ended.
        self.overwrite(b"");
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    // The standard library opens with O_CLOEXEC, so that no child keeps the lock. Opening a pipe
    // does not block.
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed())
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is not a regular file; remove it"));
    }
    Ok(file)
}

/// An abstract socket (unix(7)) that is named after a data directory's path. If the directory is
/// moved away, the lock file is moved with it; this name stays, and is released when the process
/// ends. Each network namespace has its own names, so this is used in addition to the lock in the
/// file.
struct PathName(SocketAddr);

impl PathName {
    /// The name for a path, from its parent directory and its last part. None if they cannot be
    /// determined.
    fn of(data_dir: &Path) -> Option<PathName> {
        let path = match data_dir.canonicalize() {
            Ok(path) => path,
            // For a directory that does not exist.
            Err(_) => {
                let parent = std::path::absolute(data_dir).ok()?;
                parent
                    .parent()?
                    .canonicalize()
                    .ok()?
                    .join(data_dir.file_name()?)
            }
        };
        let parent = fs::metadata(path.parent()?).ok()?;
        let mut name = format!(
            "latzero/{}/{:x}.{:x}/",
            rustix::process::geteuid().as_raw(),
            parent.dev(),
            parent.ino()
        )
        .into_bytes();
        let last = path.file_name()?.as_bytes();
        match last.len() <= NAME_BYTES_MAX {
            true => name.extend_from_slice(last),
            // Longer than a socket's name may be: use its end and a hash of all of it (FNV-1a).
            false => {
                let hash = last.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
                });
                name.extend_from_slice(format!("{hash:016x}").as_bytes());
                name.extend_from_slice(&last[last.len() - NAME_BYTES_MAX / 2..]);
            }
        }
        SocketAddr::from_abstract_name(name).ok().map(PathName)
    }

    /// Binds the name until the listener is dropped.
    fn take(&self, data_dir: &Path) -> Result<Option<UnixListener>, StartupError> {
        match UnixListener::bind_addr(&self.0) {
            Ok(listener) => Ok(listener.set_nonblocking(true).is_ok().then_some(listener)),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                match self.holder() {
                    Some(pid) => Err(another(data_dir, pid)),
                    // It belongs to another user, who must not prevent this start.
                    None => Ok(None),
                }
            }
            Err(_) => Ok(None),
        }
    }

    /// The pid of this user's, or root's, process that has the name; 0 if it is of another pid
    /// namespace.
    fn holder(&self) -> Option<i32> {
        let kind = SocketType::STREAM;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).ok()?;
        let address = SocketAddrUnix::new_abstract_name(self.0.as_abstract_name()?).ok()?;
        connect(&socket, &address).ok()?;
        let (pid, uid) = crate::socket::credentials(&socket).ok()?;
        (uid == 0 || uid == rustix::process::geteuid().as_raw()).then_some(pid)
    }
}

fn another(data_dir: &Path, pid: i32) -> StartupError {
    // From the lock file, if the directory exists.
    let known = holder(data_dir);
    let pid = u32::try_from(pid).ok().filter(|&pid| pid != 0);
    StartupError::AnotherServer {
        data_dir: data_dir.to_owned(),
        holder: known.unwrap_or(Holder { pid, record: None }),
    }
}

/// Refuses a path whose server is running, even if its directory was moved away, before a new
/// directory is created there.
///
/// # Errors
/// [`StartupError::AnotherServer`] if one runs.
pub(crate) fn refuse_held(data_dir: &Path) -> Result<(), StartupError> {
    match PathName::of(data_dir).and_then(|name| name.holder()) {
        Some(pid) => Err(another(data_dir, pid)),
        None => Ok(()),
    }
}

/// The current holder of the lock on `data_dir`, or `None`. It only reads and never locks, because
/// locking would make a server fail that starts at that moment.
#[must_use]
pub fn holder(data_dir: &Path) -> Option<Holder> {
    let path = data_dir.join(LOCK_NAME);
    let metadata = fs::metadata(&path).ok()?;
    let record = read_record(&path);
    let device = (
        rustix::fs::major(metadata.dev()),
        rustix::fs::minor(metadata.dev()),
    );
    let recorded = record.as_ref().map(|record| record.pid);
    let find = || {
        let locks = fs::read_to_string("/proc/locks").ok()?;
        find_holder(&locks, device, metadata.ino(), recorded)
    };
    // The kernel returns the list in parts, and may leave out an entry while others are added and
    // removed. So a recorded process that is running is searched for again.
    let is_alive = || recorded.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists());
    let again = || (0..READS_MAX).find_map(|_| find());
    let pid = find().or_else(|| is_alive().then(again)?)?;
    // A lock from another pid namespace is listed with pid 0 (or not at all).
    let pid = if pid == 0 {
        record.as_ref().map(|r| r.pid)
    } else {
        Some(pid)
    };
    let record = record.filter(|record| Some(record.pid) == pid);
    Some(Holder { pid, record })
}

fn read_record(path: &PathBuf) -> Option<Record> {
    let mut text = String::new();
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
    file.ok()?
        .take(RECORD_BYTES_MAX)
        .read_to_string(&mut text)
        .ok()?;
    serde_json::from_str(&text).ok()
}

/// The pid that `/proc/locks` gives for the exclusive `flock` of a file. A line of it
/// (`proc_locks(5)`) is `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`. Some file systems show
/// another device there than `stat(2)` does, so a matching inode counts too where the pid is the
/// one that the lock file names.
fn find_holder(locks: &str, device: (u32, u32), inode: u64, recorded: Option<u32>) -> Option<u32> {
    locks.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        // A waiter has "->" here.
        if fields.next() != Some("FLOCK") || fields.nth(1) != Some("WRITE") {
            return None;
        }
        // The kernel writes -1 for some locks of remote file systems.
        let pid = fields
            .next()?
            .parse::<i64>()
            .ok()
            .and_then(|pid| u32::try_from(pid).ok())?;
        let mut place = fields.next()?.split(':');
        let major = u32::from_str_radix(place.next()?, 16).ok()?;
        let minor = u32::from_str_radix(place.next()?, 16).ok()?;
        let same_inode = place.next()?.parse() == Ok(inode);
        (same_inode && ((major, minor) == device || Some(pid) == recorded)).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(holder(dir.path()), None);
        let lock = InstanceLock::acquire(dir.path()).unwrap();
        lock.record(&["127.0.0.1:1".to_owned()]);
        let found = holder(dir.path()).unwrap();
        assert_eq!(found.pid, Some(std::process::id()));
        assert_eq!(found.record.unwrap().addresses, ["127.0.0.1:1"]);
        let error = InstanceLock::acquire(dir.path()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("pid {}", std::process::id())),
            "{error}"
        );
        drop(lock);
        assert_eq!(holder(dir.path()), None);
        let path = dir.path().join(LOCK_NAME);
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(InstanceLock::acquire(dir.path()).unwrap());
    }

    #[test]
    fn exactly_one_of_many_starts_wins() {
        let dir = tempfile::tempdir().unwrap();
        let barrier = std::sync::Barrier::new(20);
        let winners = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..20)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        let lock = InstanceLock::acquire(dir.path()).ok();
                        // Nobody lets go before everybody has tried.
                        barrier.wait();
                        lock.is_some()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap())
                .filter(|&won| won)
                .count()
        });
        assert_eq!(winners, 1);
    }

    #[test]
    fn records_of_a_dead_server_are_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOCK_NAME);
        fs::write(
            &path,
            format!("{{\"pid\":1,\"addresses\":[\"{}\"]}}", "x".repeat(500)),
        )
        .unwrap();
        assert_eq!(holder(dir.path()), None);
        let _lock = InstanceLock::acquire(dir.path()).unwrap();
        let record: Record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!((record.pid, record.addresses), (std::process::id(), vec![]));
    }

    #[test]
    fn the_kernels_list_of_locks() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:5678 0 EOF\n\
                     2: FLOCK  ADVISORY  READ  12 fe:00:5678 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 fe:00:999 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 14 fe:00:5678 0 EOF\n\
                     4: -> FLOCK  ADVISORY  WRITE 15 fe:00:5678 0 EOF\n\
                     garbage\n";
        assert_eq!(find_holder(locks, (0xfe, 0), 5678, None), Some(14));
        assert_eq!(find_holder(locks, (0, 0x1d), 5678, Some(14)), Some(14));
        assert_eq!(find_holder(locks, (0, 0x1d), 5678, Some(15)), None);
        assert_eq!(find_holder(locks, (0xfe, 0), 1, None), None);
        assert_eq!(find_holder("", (0, 0), 0, None), None);
    }
}
