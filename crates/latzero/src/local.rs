//! Where the server of this machine listens: the rule by which the server chose its Unix socket, followed again.
//!
//! The socket is `latzero.sock` in the data directory (canonical: absolute, without symbolic links) where that path has
//! at most 107 bytes (`unix(7)`: `sun_path` holds 108 with the closing zero). Otherwise it is `H8.sock`, `H8` being the
//! first 8 hexadecimal digits of the 64-bit FNV-1a hash of the data directory's bytes, in `$XDG_RUNTIME_DIR/latzero`,
//! else in `/tmp/latzero-UID`. Such a directory counts only if it is this user's own and closed to others: anyone may
//! create a name in `/tmp`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The longest path of a Unix socket, in bytes.
const PATH_BYTES_MAX: usize = 107;

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The data directory where the server lives unless told otherwise: `LATZERO_DATA_DIR`, else `~/.latzero`.
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
    let mut sockets = candidates(&data_dir, runtime_dir.as_deref(), uid);
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

fn candidates(data_dir: &Path, runtime_dir: Option<&Path>, uid: u32) -> Vec<PathBuf> {
    let fits = |path: &Path| path.as_os_str().len() <= PATH_BYTES_MAX;
    let inside = data_dir.join("latzero.sock");
    if fits(&inside) {
        return vec![inside];
    }
    let name = format!("{}.sock", hash8(data_dir.as_os_str().as_bytes()));
    let runtime = runtime_dir
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join("latzero").join(&name));
    let last = PathBuf::from(format!("/tmp/latzero-{uid}/{name}"));
    runtime
        .into_iter()
        .filter(|path| fits(path))
        .chain([last])
        .collect()
}

/// The first 8 hexadecimal digits of the 64-bit FNV-1a hash.
fn hash8(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{:08x}", hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule() {
        let check = |data_dir: &str, runtime: Option<&str>, expected: &[&str]| {
            let found = candidates(Path::new(data_dir), runtime.map(Path::new), 7);
            assert_eq!(
                found,
                expected.iter().map(PathBuf::from).collect::<Vec<_>>(),
                "{data_dir}"
            );
        };
        check(
            "/home/me/.latzero",
            Some("/run"),
            &["/home/me/.latzero/latzero.sock"],
        );
        let long = format!("/{}", "d".repeat(93));
        check(&long, None, &[&format!("{long}/latzero.sock")]);
        let long = format!("/{}", "d".repeat(94));
        let name = format!("{}.sock", hash8(long.as_bytes()));
        let last = format!("/tmp/latzero-7/{name}");
        check(&long, None, &[&last]);
        check(&long, Some("run"), &[&last]);
        check(
            &long,
            Some("/run/"),
            &[&format!("/run/latzero/{name}"), &last],
        );
        check(&long, Some(&format!("/{}", "r".repeat(90))), &[&last]);
        // The hash of the algorithm's authors' test vector "foobar" is 85944171f73967e8.
        assert_eq!(hash8(b"foobar"), "85944171");
    }
}
