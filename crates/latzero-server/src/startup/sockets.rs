//! Binds the Unix socket and the TCP port, and finds out which process is using them if that fails.

use std::fmt;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::StartupError;
use crate::address;

/// Connections that may wait to be accepted. The system caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// How many descriptors of other processes are checked at most to find who listens on a port.
const DESCRIPTORS_LOOKED_AT_MAX: usize = 200_000;

/// A listening Unix socket and its file. They are two fields, because the event loop takes the
/// listener, and the file must stay until the end.
#[derive(Debug)]
pub struct BoundSocket {
    /// The listener, non-blocking.
    pub listener: UnixListener,
    /// Its file, removed when dropped.
    pub file: SocketFile,
}

/// The file of a Unix socket. Dropping it removes the file, unless another has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode of the bound socket; `None` for a file that this server must not remove.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// A file that another process created and removes.
    pub(crate) fn foreign(path: PathBuf) -> SocketFile {
        SocketFile {
            path,
            identity: None,
        }
    }

    /// The file of a socket that another server has handed over; from here on it is removed by this
    /// one, if it still is that of `identity`.
    pub(crate) fn taken_over(path: PathBuf, identity: (u64, u64)) -> SocketFile {
        SocketFile {
            path,
            identity: Some(identity),
        }
    }

    /// Whether another process created it and removes it.
    pub(crate) fn is_foreign(&self) -> bool {
        self.identity.is_none()
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path).ok() == self.identity {
            drop(fs::remove_file(&self.path));
        }
    }
}

/// Device and inode of a socket's file, by which it is recognised.
pub(crate) fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Binds the socket where clients look for it: at the first candidate of [`address`] whose
/// directory can be used. The caller holds the instance lock.
///
/// # Errors
/// Why the last candidate cannot be used.
pub fn bind_unix_auto(
    canonical_data_dir: &Path,
    runtime_dir: Option<&Path>,
) -> Result<BoundSocket, StartupError> {
    let uid = rustix::process::geteuid().as_raw();
    let mut candidates = address::socket_candidates(canonical_data_dir, runtime_dir, uid);
    let last = candidates.pop().expect("a candidate exists");
    for candidate in candidates {
        if private_parent(&candidate, uid).is_ok() {
            return bind_unix(&candidate);
        }
    }
    if last.parent() != Some(canonical_data_dir) {
        private_parent(&last, uid)?;
    }
    bind_unix(&last)
}

/// Makes the directory of a socket private. Anyone who can write there could replace the socket,
/// and anyone may have created the name in `/tmp`.
fn private_parent(socket: &Path, uid: u32) -> Result<(), StartupError> {
    let dir = socket.parent().expect("a candidate has a directory");
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            return Err(StartupError::of_io("creating it", dir, cause));
        }
        _ => {}
    }
    let metadata =
        fs::symlink_metadata(dir).map_err(|cause| StartupError::of_io("reading it", dir, cause))?;
    if !metadata.is_dir() {
        return Err(StartupError::NotADirectory {
            path: dir.to_owned(),
        });
    }
    if metadata.uid() != uid {
        return Err(StartupError::OtherOwner {
            path: dir.to_owned(),
            owner: metadata.uid(),
        });
    }
    if metadata.mode() & 0o777 != 0o700 {
        fs::set_permissions(dir, Permissions::from_mode(0o700))
            .map_err(|cause| StartupError::of_io("chmod 700", dir, cause))?;
    }
    Ok(())
}

/// Binds a Unix socket at `path`, mode 0600, in place of a stale one. The caller holds the instance
/// lock, so a socket that does not respond is stale. One that responds belongs to a server of
/// another data directory, and stays.
///
/// # Errors
/// If the path is too long or something else is there.
pub fn bind_unix(path: &Path) -> Result<BoundSocket, StartupError> {
    if !address::fits(path) {
        return Err(StartupError::SocketPathTooLong {
            path: path.to_owned(),
        });
    }
    remove_stale(path)?;
    let refused = |cause| StartupError::of_io("binding the socket", path, cause);
    let listener = UnixListener::bind(path).map_err(refused)?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: Some(identity(path).map_err(refused)?),
    };
    // The umask kept others out since the bind; this takes the executable bit, which means nothing,
    // too.
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(refused)?;
    rustix::net::listen(&listener, BACKLOG).map_err(|cause| refused(cause.into()))?;
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(BoundSocket { listener, file })
}

/// Why a socket cannot be bound at `path`, found without changing anything. It does not check
/// whether a process listens there.
pub(super) fn check_path(path: &Path) -> Result<(), StartupError> {
    if !address::fits(path) {
        return Err(StartupError::SocketPathTooLong {
            path: path.to_owned(),
        });
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(()),
        Ok(_) => Err(StartupError::SocketPathTaken {
            path: path.to_owned(),
        }),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            let dir = dir.unwrap_or(Path::new("."));
            let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
            rustix::fs::access(dir, access)
                .map_err(|cause| StartupError::of_io("binding the socket", path, cause.into()))
        }
        Err(cause) => Err(StartupError::of_io("reading", path, cause)),
    }
}

/// Whether another program listens at `path`.
pub(super) fn check_unused(path: &Path) -> Result<(), StartupError> {
    let is_used = path.symlink_metadata().is_ok() && answers(path);
    match is_used {
        true => Err(StartupError::SocketInUse {
            path: path.to_owned(),
        }),
        false => Ok(()),
    }
}

fn remove_stale(path: &Path) -> Result<(), StartupError> {
    match fs::symlink_metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(StartupError::of_io("reading", path, cause)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(StartupError::SocketPathTaken {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    if answers(path) {
        return Err(StartupError::SocketInUse {
            path: path.to_owned(),
        });
    }
    fs::remove_file(path).map_err(|cause| StartupError::of_io("removing the stale", path, cause))
}

/// Whether a process listens on a Unix socket. Never blocks: a full queue (`EAGAIN`) counts too.
fn answers(path: &Path) -> bool {
    let attempt = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)
    };
    matches!(
        attempt(),
        Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INPROGRESS)
    )
}

/// Makes an inherited socket report this process to clients, which see the last one that called
/// listen (unix(7), SO_PEERCRED).
///
/// # Errors
/// As listen(2).
pub(crate) fn listen_again(listener: &UnixListener) -> io::Result<()> {
    rustix::net::listen(listener, BACKLOG)?;
    listener.set_nonblocking(true)
}

/// The addresses of a host: an address, in brackets or not, or the addresses of a name.
fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let bare = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    (bare, port).to_socket_addrs().map(Iterator::collect)
}

/// Whether a socket listens where [`bind_tcp`] might have bound it: on one of the host's addresses
/// and the port, or on any port if that is 0. False for a host that cannot be resolved.
pub(crate) fn is_bound_to(listener: &TcpListener, host: &str, port: u16) -> bool {
    let (Ok(wanted), Ok(bound)) = (resolve(host, port), listener.local_addr()) else {
        return false;
    };
    let is_it =
        |wanted: &SocketAddr| wanted.ip() == bound.ip() && (port == 0 || port == bound.port());
    wanted.iter().any(is_it)
}

/// Binds the TCP port, non-blocking; port 0 lets the system choose. The standard library sets
/// `SO_REUSEADDR`, and `SO_REUSEPORT` is never set: it would let another process of this user share
/// the port.
///
/// # Errors
/// If the port is in use (with the process that listens there) or needs a privilege, or the host is
/// not an address of this machine.
pub fn bind_tcp(host: &str, port: u16) -> Result<TcpListener, StartupError> {
    let refused = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => StartupError::PortInUse {
            host: host.to_owned(),
            port,
            listener: find_listener(port),
        },
        io::ErrorKind::PermissionDenied if (1..1024).contains(&port) => {
            StartupError::PrivilegedPort { port }
        }
        _ => StartupError::BadHost {
            host: host.to_owned(),
            source,
        },
    };
    let addresses = resolve(host, port).map_err(refused)?;
    let listener = TcpListener::bind(&addresses[..]).map_err(refused)?;
    rustix::net::listen(&listener, BACKLOG).map_err(|cause| refused(cause.into()))?;
    listener.set_nonblocking(true).map_err(refused)?;
    Ok(listener)
}

/// A process that listens on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listening {
    /// Its process id.
    pub pid: u32,
    /// Its name, as the kernel keeps it: 15 bytes at most.
    pub command: String,
}

impl fmt::Display for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.command, self.pid)
    }
}

/// The process that listens on a TCP port, from `/proc`. `None` if there is none, or if it belongs
/// to another user and its descriptors are not visible.
#[must_use]
pub fn find_listener(port: u16) -> Option<Listening> {
    let inodes = listeners(port);
    if inodes.is_empty() {
        return None;
    }
    let sought: Vec<PathBuf> = inodes
        .iter()
        .map(|inode| PathBuf::from(format!("socket:[{inode}]")))
        .collect();
    let mut looked_at = 0;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        for descriptor in descriptors.flatten() {
            looked_at += 1;
            if looked_at > DESCRIPTORS_LOOKED_AT_MAX {
                return None;
            }
            if fs::read_link(descriptor.path()).is_ok_and(|target| sought.contains(&target)) {
                let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(Listening {
                    pid,
                    command: command.trim().escape_debug().to_string(),
                });
            }
        }
    }
    None
}

/// Whether any process listens on a TCP port, on any address. It never binds the port, because that
/// would make a server fail that starts at that moment.
#[must_use]
pub fn is_port_taken(port: u16) -> bool {
    !listeners(port).is_empty()
}

fn listeners(port: u16) -> Vec<u64> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .collect()
}

/// The inodes of the sockets that listen on `port`, from the text of `/proc/net/tcp`
/// (`proc_pid_net(5)`): the second field is `ADDRESS:PORT` in hexadecimal, the fourth the state (0A
/// listens), the tenth the inode.
fn listening_inodes(table: &str, port: u16) -> Vec<u64> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
            let listens = *fields.get(3)? == "0A";
            let same = u16::from_str_radix(local_port, 16) == Ok(port);
            if listens && same {
                fields.get(9)?.parse().ok()
            } else {
                None
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // Dropping a listener leaves its file: that is a stale socket.
        drop(UnixListener::bind(&path).unwrap());
        let bound = bind_unix(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        UnixStream::connect(&path).unwrap();
        let error = bind_unix(&path).unwrap_err();
        assert!(matches!(error, StartupError::SocketInUse { .. }), "{error}");
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_not_a_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        fs::write(&path, "precious").unwrap();
        let error = bind_unix(&path).unwrap_err();
        assert!(
            matches!(error, StartupError::SocketPathTaken { .. }),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn only_our_own_socket_is_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = bind_unix(&path).unwrap();
        // A successor's socket, made before ours went, so it cannot have our inode.
        let other = dir.path().join("other");
        let _successor = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        drop(bound);
        assert!(path.exists());
    }

    #[test]
    fn a_path_that_is_too_long_is_refused() {
        let path = PathBuf::from(format!("/{}", "x".repeat(107)));
        let error = bind_unix(&path).unwrap_err().to_string();
        assert!(
            error.contains("108 bytes long; the maximum is 107"),
            "{error}"
        );
    }

    #[test]
    fn a_long_data_dir_has_its_socket_in_the_runtime_dir() {
        let home = tempfile::tempdir().unwrap();
        let long = PathBuf::from(format!("/{}", "d".repeat(120)));
        let bound = bind_unix_auto(&long, Some(home.path())).unwrap();
        let dir = home.path().join("latzero");
        assert_eq!(bound.file.path().parent(), Some(dir.as_path()));
        assert_eq!(mode(&dir), 0o700);
        drop(bound);

        // Too open: closed again. Another's, or a link: refused.
        fs::set_permissions(&dir, Permissions::from_mode(0o777)).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        private_parent(&dir.join("s"), uid).unwrap();
        assert_eq!(mode(&dir), 0o700);
        let error = private_parent(&dir.join("s"), uid + 1).unwrap_err();
        assert!(matches!(error, StartupError::OtherOwner { .. }), "{error}");
        let link = home.path().join("link");
        std::os::unix::fs::symlink(&dir, &link).unwrap();
        let error = private_parent(&link.join("s"), uid).unwrap_err();
        assert!(
            matches!(error, StartupError::NotADirectory { .. }),
            "{error}"
        );
    }

    #[test]
    fn a_port_that_is_taken_names_who_has_it() {
        let listener = bind_tcp("127.0.0.1", 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = bind_tcp("127.0.0.1", port).unwrap_err();
        let StartupError::PortInUse {
            listener: Some(found),
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(found.pid, std::process::id());
        assert!(!found.command.is_empty());
    }

    #[test]
    fn a_socket_is_identified_by_its_whole_address() {
        let listener = bind_tcp("127.0.0.1", 0).unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost"] {
            assert!(is_bound_to(&listener, host, port), "{host}");
            assert!(is_bound_to(&listener, host, 0), "{host}");
            assert!(!is_bound_to(&listener, host, port ^ 1), "{host}");
        }
        for host in ["127.0.0.2", "0.0.0.0", "::1", "[::1]", "no such host"] {
            assert!(!is_bound_to(&listener, host, port), "{host}");
            assert!(!is_bound_to(&listener, host, 0), "{host}");
        }
        let wide = bind_tcp("0.0.0.0", 0).unwrap();
        assert!(is_bound_to(&wide, "0.0.0.0", 0));
        assert!(!is_bound_to(&wide, "127.0.0.1", 0));
    }

    #[test]
    fn a_foreign_host_is_named() {
        // A literal, so that no name is looked up. 192.0.2.0/24 is for documentation (RFC 5737).
        let error = bind_tcp("192.0.2.1", 0).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.starts_with("cannot listen on 192.0.2.1: "), "{text}");
        assert!(
            text.ends_with("choose an address of this machine with --host"),
            "{text}"
        );
    }

    #[test]
    fn the_kernel_s_socket_table() {
        let table = "\
            \x20 sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n\
            0: 0100007F:B0AB 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 5151 1 0\n\
            1: 0100007F:B0AB 0100007F:1234 01 00000000:00000000 00:00000000 00000000 0 0 5252 1 0\n\
            2: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 5353 1 0\n\
            garbage\n";
        assert_eq!(listening_inodes(table, 0xb0ab), [5151]);
        assert_eq!(listening_inodes(table, 22), [5353]);
        assert_eq!(listening_inodes(table, 1), [] as [u64; 0]);
        assert_eq!(listening_inodes("", 1), [] as [u64; 0]);
    }
}
