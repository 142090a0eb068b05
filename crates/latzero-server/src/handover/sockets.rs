//! Which sockets of the old server the new one takes over, and which it binds itself.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use latzero_protocol::address;

use crate::settings::{Environment, Settings, SocketChoice};
use crate::startup::StartupError;
use crate::startup::data_dir::DataDir;
use crate::startup::sockets::{self, BoundSocket, SocketFile};

/// The path of the Unix socket in the new settings, where the old server most likely listens too.
pub(super) fn candidates(settings: &Settings, environment: &Environment) -> Vec<PathBuf> {
    match &settings.socket {
        SocketChoice::Off => Vec::new(),
        SocketChoice::Path(path) => vec![path.clone()],
        SocketChoice::Auto => {
            let Ok(directory) = settings.data_dir.canonicalize() else {
                return Vec::new();
            };
            let runtime = environment.var("XDG_RUNTIME_DIR").map(Path::new);
            let uid = rustix::process::geteuid().as_raw();
            address::socket_candidates(&directory, runtime, uid)
        }
    }
}

/// Binds the Unix socket of the settings, unless it is one of the old server's. Only one server at
/// a time is given everything, so this is as safe as under the lock of the data directory.
pub(super) fn bind_unix(
    settings: &Settings,
    environment: &Environment,
    data_dir: &DataDir,
) -> Result<Option<BoundSocket>, StartupError> {
    match &settings.socket {
        SocketChoice::Off => Ok(None),
        SocketChoice::Auto => {
            let runtime = environment.var("XDG_RUNTIME_DIR").map(Path::new);
            sockets::bind_unix_auto(data_dir.path(), runtime).map(Some)
        }
        SocketChoice::Path(path) => sockets::bind_unix(path).map(Some),
    }
}

/// Takes over the old server's TCP sockets that the settings name, and binds others that they name.
/// The rest is closed.
pub(super) fn settle_tcp(
    given: Vec<TcpListener>,
    settings: &Settings,
    tcp: &mut Vec<TcpListener>,
) -> Result<(), StartupError> {
    if !tcp.is_empty() {
        return Ok(());
    }
    let (host, port) = (&settings.host, settings.port);
    let (taken, left): (Vec<_>, Vec<_>) = given
        .into_iter()
        .partition(|listener| sockets::is_bound_to(listener, host, port));
    let is_on_it = |left: &TcpListener| left.local_addr().is_ok_and(|a| a.port() == port);
    tcp.extend(taken);
    if tcp.is_empty() {
        match sockets::bind_tcp(host, port) {
            Ok(listener) => tcp.push(listener),
            // The old server uses it until its end: it is bound after that.
            Err(StartupError::PortInUse { .. }) if left.iter().any(is_on_it) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A Unix socket of the old server, whose file must not be touched until that server has ended.
pub(super) struct GivenUnix {
    listener: UnixListener,
    path: PathBuf,
    /// The inode of its file; absent if the file is gone and no client can find it.
    identity: Option<(u64, u64)>,
    /// A service manager created it.
    is_passed: bool,
}

impl GivenUnix {
    pub(super) fn new(fd: OwnedFd, is_passed: bool) -> io::Result<GivenUnix> {
        let listener = UnixListener::from(fd);
        let address = listener.local_addr()?;
        let path = address.as_pathname().map(Path::to_owned);
        let path = path.ok_or_else(|| io::Error::other("received a Unix socket without a path"))?;
        Ok(GivenUnix {
            identity: sockets::identity(&path).ok(),
            listener,
            path,
            is_passed,
        })
    }

    /// The same file may be named in several ways.
    pub(super) fn is_one_of(&self, candidates: &[PathBuf]) -> bool {
        self.identity.is_some()
            && candidates
                .iter()
                .any(|path| sockets::identity(path).ok() == self.identity)
    }

    /// Makes it a socket of this server; nothing if its file was replaced or removed.
    pub(super) fn inherit(self) -> Option<BoundSocket> {
        let identity = self
            .identity
            .filter(|known| sockets::identity(&self.path).ok() == Some(*known))?;
        let listens = sockets::listen_again(&self.listener);
        let file = if self.is_passed {
            SocketFile::foreign(self.path)
        } else {
            SocketFile::taken_over(self.path, identity)
        };
        listens.is_ok().then_some(BoundSocket {
            listener: self.listener,
            file,
        })
    }

    /// Removes its file, because the old server, which handed it over, does not.
    pub(super) fn remove(self) {
        if let Some(identity) = self.identity.filter(|_| !self.is_passed) {
            drop(SocketFile::taken_over(self.path, identity));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_server_s_file_stays_until_it_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let given = |name: &str, is_passed| {
            let path = dir.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            (GivenUnix::new(listener.into(), is_passed).unwrap(), path)
        };
        let (socket, path) = given("dropped", false);
        drop(socket);
        assert!(path.exists());
        let (socket, path) = given("wanted", false);
        assert!(socket.is_one_of(&[dir.path().join("."), dir.path().join("./wanted")]));
        assert!(!socket.is_one_of(&[dir.path().join("dropped")]));
        drop(socket.inherit().unwrap());
        assert!(!path.exists(), "only this call removes it");
        let (socket, path) = given("unwanted", false);
        socket.remove();
        assert!(!path.exists());
        // Sockets of a service manager stay.
        let (socket, path) = given("passed", true);
        drop(socket.inherit().unwrap());
        assert!(path.exists());
        // Nobody can connect to a socket whose file was removed.
        let (socket, path) = given("gone", false);
        std::fs::remove_file(&path).unwrap();
        assert!(socket.inherit().is_none());
    }
}
