//! Startup: the steps before the server may listen. Each is a small function that succeeds or says
//! what is wrong and how to fix it.
//!
//! The order matters. The umask comes first, so that no file is ever readable by others. The
//! instance lock comes before any socket: its holder knows that an existing socket file is stale.
//! The kernel releases the lock when the process ends, and its file is never removed; a pid file
//! would have race conditions.

pub mod created_files;
pub mod data_dir;
pub mod descriptors;
pub mod lock;
pub mod sockets;
pub mod systemd;
pub mod token;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::address;
use crate::settings::{Environment, Settings, SocketChoice};

use data_dir::DataDir;
use descriptors::SpareDescriptor;
use lock::{Holder, InstanceLock};
use sockets::{BoundSocket, Listening};
use systemd::Activation;

/// Why a server does not start. Each says the cause and the remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StartupError {
    /// The data directory, or something in it, may not be used by this user.
    #[error(
        "permission denied: {path}: {action} failed; give {user} write access to it, \
         or choose another directory with --data-dir",
        path = path.display(),
        user = user()
    )]
    PermissionDenied {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
    },
    /// The path exists and is not a directory.
    #[error("{} is not a directory; choose another with --data-dir", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// The directory belongs to another user.
    #[error(
        "{path} belongs to user {owner}, not to {user}; run as that user, \
         or `chown {euid} {path}`, or choose another directory with --data-dir",
        path = path.display(),
        user = user(),
        euid = rustix::process::geteuid().as_raw()
    )]
    OtherOwner {
        /// The directory.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
    },
    /// Others may write in the directory.
    #[error(
        "other users can write to {path} (mode {mode:04o}); run `chmod 700 {path}`",
        path = path.display()
    )]
    OthersMayWrite {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The directory is on a file system whose locks and mappings cannot be relied upon.
    #[error(
        "{path} is on a network file system ({kind}), where file locks and memory mappings are \
         unreliable; choose a local directory with --data-dir",
        path = path.display()
    )]
    NetworkFileSystem {
        /// The directory.
        path: PathBuf,
        /// The file system: `NFS`, `SMB`, `FUSE`, …
        kind: &'static str,
    },
    /// The directory is in a file system of the kernel, such as /proc.
    #[error(
        "{path} is in a kernel file system, which cannot store files; \
         choose another directory with --data-dir",
        path = path.display()
    )]
    KernelFileSystem {
        /// The directory.
        path: PathBuf,
    },
    /// Another server uses the data directory.
    #[error("{}", another_server(data_dir, holder))]
    AnotherServer {
        /// The directory.
        data_dir: PathBuf,
        /// The server that uses it, as far as that is known.
        holder: Holder,
    },
    /// A certificate was given without its key, or a key without its certificate.
    #[error(
        "tls_cert and tls_key go together; set both, or neither for a certificate that the \
             server makes for itself"
    )]
    HalfCertificate,
    /// The certificate of the TLS port cannot be used.
    #[error("cannot use TLS: {0}")]
    Certificate(String),
    /// The certificate of the TLS port, or its key, may not be read.
    #[error(
        "permission denied: cannot read {}; give {} access to it",
        path.display(),
        user()
    )]
    CertificateDenied {
        /// The file.
        path: PathBuf,
    },
    /// The port is taken.
    #[error("{}", port_in_use(*port, host, listener.as_ref()))]
    PortInUse {
        /// The host as set.
        host: String,
        /// The port.
        port: u16,
        /// The process that listens on it, as far as `/proc` shows it.
        listener: Option<Listening>,
    },
    /// A port below 1024 needs a privilege.
    #[error(
        "permission denied: port {port} needs the privilege to bind ports below 1024; choose a \
         port from 1024 up with --port"
    )]
    PrivilegedPort {
        /// The port.
        port: u16,
    },
    /// The host is not an address of this machine.
    #[error("cannot listen on {host}: {source}; choose an address of this machine with --host")]
    BadHost {
        /// The host as set.
        host: String,
        /// What the system said.
        source: io::Error,
    },
    /// The socket's path is longer than the system allows.
    #[error(
        "the socket path {path} is {length} bytes long; the maximum is {max}; choose a shorter \
         one with the setting `socket`, or \"auto\"",
        path = path.display(),
        length = path.as_os_str().len(),
        max = address::SOCKET_PATH_BYTES_MAX
    )]
    SocketPathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The path of the socket exists and is not a socket, so it is not removed.
    #[error(
        "{} exists and is not a socket; move it away, or set `socket` to another path",
        path.display()
    )]
    SocketPathTaken {
        /// The path.
        path: PathBuf,
    },
    /// A process listens on the path of the socket.
    #[error(
        "another program listens on {}; stop it, or set `socket` to another path",
        path.display()
    )]
    SocketInUse {
        /// The path.
        path: PathBuf,
    },
    /// The admin token's file has no token, or one that others may know.
    #[error(
        "the admin token {} {reason}; remove it, and the next start writes a new one",
        path.display()
    )]
    BadToken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A socket that systemd passed cannot be used.
    #[error(
        "socket {index} from systemd is not a listening TCP or Unix stream socket ({reason}); \
         correct the ListenStream= lines of the socket unit"
    )]
    BadActivation {
        /// Its number, from 0.
        index: usize,
        /// Why.
        reason: String,
    },
    /// The running server does not hand over.
    #[error("the server of {path} cannot hand over: {reason}", path = data_dir.display())]
    TakeOver {
        /// The directory.
        data_dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// The database can't be used.
    #[error(transparent)]
    Store(latzero_store::OpenError),
    /// Another operation of the system failed.
    #[error("{action} {path}: {source}", path = path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl StartupError {
    /// The exit code for this error: 2 where a setting is wrong; from `sysexits.h`, 75 (try again
    /// later) where another program is in the way and 77 where a permission is; else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            StartupError::AnotherServer { .. }
            | StartupError::PortInUse { .. }
            | StartupError::SocketInUse { .. } => 75,
            StartupError::PermissionDenied { .. }
            | StartupError::CertificateDenied { .. }
            | StartupError::OtherOwner { .. }
            | StartupError::OthersMayWrite { .. }
            | StartupError::PrivilegedPort { .. } => 77,
            StartupError::NotADirectory { .. }
            | StartupError::NetworkFileSystem { .. }
            | StartupError::KernelFileSystem { .. }
            | StartupError::BadHost { .. }
            | StartupError::SocketPathTooLong { .. }
            | StartupError::SocketPathTaken { .. }
            | StartupError::HalfCertificate
            | StartupError::Certificate(_) => 2,
            StartupError::BadToken { .. }
            | StartupError::BadActivation { .. }
            | StartupError::Store(_)
            | StartupError::TakeOver { .. }
            | StartupError::System { .. } => 1,
        }
    }

    /// The part of the server that it concerns, as `doctor` names it.
    #[must_use]
    pub(crate) fn part(&self) -> &'static str {
        match self {
            StartupError::HalfCertificate
            | StartupError::Certificate(_)
            | StartupError::CertificateDenied { .. } => "tls",
            StartupError::PortInUse { .. }
            | StartupError::PrivilegedPort { .. }
            | StartupError::BadHost { .. } => "port",
            StartupError::SocketPathTooLong { .. }
            | StartupError::SocketPathTaken { .. }
            | StartupError::SocketInUse { .. } => "socket",
            StartupError::NetworkFileSystem { .. } | StartupError::KernelFileSystem { .. } => {
                "file system"
            }
            _ => "data directory",
        }
    }

    /// Distinguishes a missing permission from other errors with a path.
    pub(crate) fn of_io(action: &'static str, path: &Path, source: io::Error) -> StartupError {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => StartupError::PermissionDenied { path, action },
            _ => StartupError::System {
                action,
                path,
                source,
            },
        }
    }
}

fn user() -> String {
    format!("user {}", rustix::process::geteuid().as_raw())
}

fn another_server(data_dir: &Path, holder: &Holder) -> String {
    let mut text = format!("another server uses {}", data_dir.display());
    if let Some(pid) = holder.pid {
        text.push_str(&format!(": pid {pid}"));
    }
    if let Some(record) = &holder.record {
        if !record.started.is_empty() {
            text.push_str(&format!(", started {}", record.started));
        }
        if !record.addresses.is_empty() {
            text.push_str(&format!(
                ", listening on {}",
                record.addresses.join(" and ")
            ));
        }
    }
    text.push_str("; stop it with `latzero stop`, or choose another directory with --data-dir");
    text
}

fn port_in_use(port: u16, host: &str, listener: Option<&Listening>) -> String {
    let by = listener.map_or_else(|| "another program".to_owned(), ToString::to_string);
    format!(
        "port {port} on {host} is in use by {by}; choose another with --port, or stop that program"
    )
}

/// Sets the umask to 077, so that only this user can read files that the process creates. The
/// umask belongs to the whole process, so this is the program's first step and no test calls it.
pub fn private_umask() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}

/// The resources of a server once it may listen. Dropping it removes the socket and releases the
/// lock.
#[derive(Debug)]
pub struct Started {
    /// TCP listeners, non-blocking: one, or those that systemd passed.
    pub tcp: Vec<TcpListener>,
    /// Unix sockets, non-blocking: none, one, or those that systemd passed.
    pub unix: Vec<BoundSocket>,
    /// A spare descriptor, for when descriptors run out.
    pub spare: SpareDescriptor,
    /// The admin token.
    pub token: token::AdminToken,
    /// The data directory. After the sockets: fields are dropped in order, and the lock must
    /// outlive them.
    pub data_dir: DataDir,
    /// Held until the server ends.
    pub lock: InstanceLock,
}

impl Started {
    /// The TCP addresses in force, with the ports that the system chose.
    #[must_use]
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        self.tcp
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .collect()
    }
}

/// The checks of a start that change nothing: directory, token, socket, certificate, address.
///
/// # Errors
/// The first one that fails.
pub fn check(settings: &Settings) -> Result<(), StartupError> {
    data_dir::check(&settings.data_dir)?;
    if let Ok(dir) = settings.data_dir.canonicalize() {
        token::AdminToken::load(&dir)?;
    }
    if let SocketChoice::Path(path) = &settings.socket {
        sockets::check_path(path)?;
        // The server that runs on the directory has its socket.
        if lock::holder(&settings.data_dir).is_none() {
            sockets::check_unused(path)?;
        }
    }
    crate::tls::check(settings)?;
    // Any port of the address will do: whether it is one of this machine.
    sockets::bind_tcp(&settings.host, 0).map(drop)
}

/// All steps except the umask and the store: directory, lock, token, descriptors, sockets.
/// Connections that arrive from here on wait in the listeners' queues until the caller accepts.
/// `lock` is the lock of the data directory, if the caller already has it.
///
/// # Errors
/// The first step that fails. What was created before it stays; the lock and the sockets are
/// released.
pub fn prepare(
    settings: &Settings,
    environment: &Environment,
    activation: Activation,
    lock: Option<InstanceLock>,
) -> Result<Started, StartupError> {
    if lock.is_none() {
        // Before a directory is created instead of one that was moved away.
        lock::refuse_held(&settings.data_dir)?;
    }
    let data_dir = DataDir::prepare(&settings.data_dir)?;
    let lock = match lock {
        Some(lock) => lock,
        None => InstanceLock::acquire(data_dir.path())?,
    };
    let token = if settings.admin_token_pinned {
        token::AdminToken::load_or_create(data_dir.path())?
    } else {
        token::AdminToken::renew(data_dir.path())?
    };
    descriptors::raise_limit();
    latzero_shm::heap::give_back();
    let spare = SpareDescriptor::new()
        .map_err(|source| StartupError::of_io("opening", Path::new("/dev/null"), source))?;

    // Sockets that systemd passed replace those that would be bound here, kind by kind.
    let Activation { mut tcp, mut unix } = activation;
    if unix.is_empty() {
        match &settings.socket {
            SocketChoice::Off => {}
            SocketChoice::Auto => unix.push(sockets::bind_unix_auto(
                data_dir.path(),
                environment.var("XDG_RUNTIME_DIR").map(Path::new),
            )?),
            SocketChoice::Path(path) => unix.push(sockets::bind_unix(path)?),
        }
    }
    if tcp.is_empty() {
        tcp.push(sockets::bind_tcp(&settings.host, settings.port)?);
    }

    let started = Started {
        tcp,
        unix,
        spare,
        token,
        data_dir,
        lock,
    };
    let tcp = started
        .tcp_addresses()
        .into_iter()
        .map(|address| address.to_string());
    let unix = started
        .unix
        .iter()
        .map(|socket| socket.file.path().display().to_string());
    started.lock.record(&tcp.chain(unix).collect::<Vec<_>>());
    Ok(started)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::settings::{Inputs, Override, resolve};

    use super::lock::Record;
    use super::*;

    fn settings(data_dir: &Path, more: &[(&str, &str)]) -> Settings {
        let data_dir = data_dir.to_str().unwrap();
        let flags = [("data_dir", data_dir), ("port", "0")]
            .into_iter()
            .chain(more.iter().copied());
        let command_line = flags
            .map(|(name, value)| Override::new(name, value, name))
            .collect();
        resolve(&Inputs {
            command_line,
            ..Inputs::default()
        })
        .unwrap()
        .settings
    }

    fn start(settings: &Settings) -> Result<Started, StartupError> {
        prepare(
            settings,
            &Environment::default(),
            Activation::default(),
            None,
        )
    }

    #[test]
    fn a_server_starts_and_leaves_nothing_but_its_files() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let started = start(&settings(&dir, &[])).unwrap();
        let socket = dir.join(address::SOCKET_NAME);
        assert!(socket.exists());
        assert_ne!(started.tcp_addresses()[0].port(), 0);
        let record: Record = serde_json::from_slice(&fs::read(dir.join("lock")).unwrap()).unwrap();
        assert_eq!(record.pid, std::process::id());
        assert_eq!(record.addresses.len(), 2);

        // The same port, another directory: the error says who listens there.
        let port = started.tcp_addresses()[0].port().to_string();
        let other = home.path().join("other");
        let refused = start(&settings(&other, &[("port", &port)])).unwrap_err();
        assert_eq!(refused.exit_code(), 75);
        let text = refused.to_string();
        assert!(
            text.starts_with(&format!("port {port} on 127.0.0.1 is in use by ")),
            "{text}"
        );
        assert!(
            text.contains(&format!("(pid {})", std::process::id())),
            "{text}"
        );
        assert!(text.contains("choose another with --port"), "{text}");
        assert!(
            !other.join(address::SOCKET_NAME).exists(),
            "the refused server left its socket"
        );

        // The same directory: the error says who has it.
        let refused = start(&settings(&dir, &[])).unwrap_err();
        assert_eq!(refused.exit_code(), 75);
        let text = refused.to_string();
        let canonical = dir.canonicalize().unwrap();
        assert!(
            text.starts_with(&format!(
                "another server uses {}: pid {}, started 20",
                canonical.display(),
                std::process::id()
            )),
            "{text}"
        );
        assert!(
            text.contains(&format!("listening on 127.0.0.1:{port} and ")),
            "{text}"
        );
        assert!(
            text.ends_with("or choose another directory with --data-dir"),
            "{text}"
        );
        assert!(
            socket.exists(),
            "the refused server removed the socket of the other"
        );

        drop(started);
        assert!(!socket.exists());
        assert!(dir.join("lock").exists());
        drop(start(&settings(&dir, &[])).unwrap());
    }

    #[test]
    fn the_socket_can_be_elsewhere_or_off() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let elsewhere = home.path().join("x.sock");
        let path = elsewhere.to_str().unwrap();
        let started = start(&settings(&dir, &[("socket", path)])).unwrap();
        assert_eq!(started.unix[0].file.path(), elsewhere);
        drop(started);
        assert!(
            start(&settings(&dir, &[("socket", "off")]))
                .unwrap()
                .unix
                .is_empty()
        );
    }

    #[test]
    fn messages_name_cause_and_remedy() {
        let path = PathBuf::from("/d");
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let euid = rustix::process::geteuid().as_raw();
        for (error, code, text) in [
            (
                StartupError::of_io("creating it", &path, denied),
                77,
                format!(
                    "permission denied: /d: creating it failed; give user {euid} write access \
                     to it, or choose another directory with --data-dir"
                ),
            ),
            (
                StartupError::OtherOwner {
                    path: path.clone(),
                    owner: 7,
                },
                77,
                format!(
                    "/d belongs to user 7, not to user {euid}; run as that user, \
                     or `chown {euid} /d`, or choose another directory with --data-dir"
                ),
            ),
            (
                StartupError::OthersMayWrite {
                    path: path.clone(),
                    mode: 0o770,
                },
                77,
                "other users can write to /d (mode 0770); run `chmod 700 /d`".to_owned(),
            ),
            (
                StartupError::PortInUse {
                    host: "::1".into(),
                    port: 5,
                    listener: None,
                },
                75,
                "port 5 on ::1 is in use by another program; choose another with --port, \
                 or stop that program"
                    .to_owned(),
            ),
            (
                StartupError::AnotherServer {
                    data_dir: path,
                    holder: Holder::default(),
                },
                75,
                "another server uses /d; stop it with `latzero stop`, \
                 or choose another directory with --data-dir"
                    .to_owned(),
            ),
        ] {
            assert_eq!(error.to_string(), text);
            assert_eq!(error.exit_code(), code, "{text}");
        }
    }
}
