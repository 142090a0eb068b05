//! Where the server of this machine listens: the client's side of [`latzero_protocol::address`].
//!
//! A directory outside the data directory is used only if it belongs to this user and is closed to
//! others, because anyone may create a name in `/tmp`.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use latzero_protocol::address::socket_candidates;

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The default data directory of the server: `LATZERO_DATA_DIR`, else `~/.latzero`.
fn data_dir() -> Option<PathBuf> {
    let named = variable("LATZERO_DATA_DIR").map(PathBuf::from);
    let dir = named.or_else(|| variable("HOME").map(|home| Path::new(&home).join(".latzero")))?;
    dir.canonicalize().ok()
}

/// The sockets to try, in this order.
pub(crate) fn sockets() -> Vec<PathBuf> {
    let Some(data_dir) = data_dir() else {
        return Vec::new();
    };
    let uid = rustix::process::geteuid().as_raw();
    let runtime_dir = variable("XDG_RUNTIME_DIR").map(PathBuf::from);
    let mut sockets = socket_candidates(&data_dir, runtime_dir.as_deref(), uid);
    sockets.retain(|socket| {
        let dir = socket.parent().unwrap_or(socket);
        let is_private = |dir: &Path| {
            dir.symlink_metadata()
                .is_ok_and(|m| m.is_dir() && m.uid() == uid && m.mode() & 0o777 == 0o700)
        };
        dir == data_dir || is_private(dir)
    });
    sockets
}
