//! Where a server's Unix socket is, computed alike by the server and by every client, in any
//! language.
//!
//! # The rule, to the byte
//!
//! Inputs: the *canonical* data directory (absolute, symbolic links resolved, as `realpath(3)`
//! gives it, without a trailing slash), the environment variable `XDG_RUNTIME_DIR`, and the
//! effective user id.
//!
//! 1. `S` = data directory, then `/latzero.sock`. If `S` is at most 107 bytes long, the socket is
//!    `S`, and there is no other candidate. (`sun_path` holds 108 bytes with its closing zero:
//!    `unix(7)`.)
//! 2. Otherwise `H` = FNV-1a, 64 bits, over the bytes of the canonical data directory: start with
//!    `0xcbf29ce484222325`; for each byte, exclusive-or it into the hash, then multiply by
//!    `0x100000001b3`, modulo 2^64. `H8` = the first 8 of the 16 lowercase hexadecimal digits of
//!    `H`, zero-padded, most significant first.
//! 3. If `XDG_RUNTIME_DIR` is set and begins with `/`, trailing slashes are dropped, and
//!    `$XDG_RUNTIME_DIR/latzero/H8.sock` is a candidate if it is at most 107 bytes long.
//! 4. `/tmp/latzero-UID/H8.sock` is the last candidate, UID in decimal.
//!
//! The server listens on the first candidate whose directory it can use. A client tries each in
//! turn, as its `XDG_RUNTIME_DIR` may differ from the server's. Before it uses a candidate of step
//! 3 or 4, a client checks that the directory holding the socket belongs to itself and has mode
//! 0700: anyone may create a name in `/tmp`.
//!
//! This file depends only on the standard library, so that it can be copied.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The longest path of a Unix socket, in bytes, the closing zero not counted (`unix(7)`).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The socket's name inside the data directory.
pub const SOCKET_NAME: &str = "latzero.sock";

/// Where the server listens unless that directory cannot be used: the first of
/// [`socket_candidates`].
#[must_use]
pub fn socket_path(canonical_data_dir: &Path, runtime_dir: Option<&Path>, uid: u32) -> PathBuf {
    socket_candidates(canonical_data_dir, runtime_dir, uid).swap_remove(0)
}

/// Where a client looks for the socket, in this order. Never empty.
#[must_use]
pub fn socket_candidates(
    canonical_data_dir: &Path,
    runtime_dir: Option<&Path>,
    uid: u32,
) -> Vec<PathBuf> {
    let data_dir = without_trailing_slash(canonical_data_dir.as_os_str().as_bytes());
    let in_data_dir = join(data_dir, SOCKET_NAME);
    if fits(&in_data_dir) {
        return vec![in_data_dir];
    }
    let name = format!("{}.sock", hash8(data_dir));
    let mut candidates = Vec::with_capacity(2);
    if let Some(dir) = runtime_dir.map(|dir| dir.as_os_str().as_bytes())
        && dir.starts_with(b"/")
    {
        let path = join(without_trailing_slash(dir), &format!("latzero/{name}"));
        if fits(&path) {
            candidates.push(path);
        }
    }
    candidates.push(PathBuf::from(format!("/tmp/latzero-{uid}/{name}")));
    candidates
}

/// Whether a path is short enough for a Unix socket.
#[must_use]
pub fn fits(path: &Path) -> bool {
    path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX
}

/// The first 8 hexadecimal digits of the FNV-1a hash, 64 bits, of `bytes`.
#[must_use]
pub fn hash8(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{:08x}", hash >> 32)
}

/// `/` itself becomes empty, so that joining gives one slash.
fn without_trailing_slash(path: &[u8]) -> &[u8] {
    let end = path
        .iter()
        .rposition(|&byte| byte != b'/')
        .map_or(0, |last| last + 1);
    &path[..end]
}

fn join(dir: &[u8], name: &str) -> PathBuf {
    PathBuf::from(OsString::from_vec([dir, b"/", name.as_bytes()].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(data_dir: &str, runtime_dir: Option<&str>, expected: &[&str]) {
        let candidates = socket_candidates(Path::new(data_dir), runtime_dir.map(Path::new), 1000);
        let expected: Vec<PathBuf> = expected.iter().map(PathBuf::from).collect();
        assert_eq!(candidates, expected, "{data_dir}");
        assert_eq!(
            socket_path(Path::new(data_dir), runtime_dir.map(Path::new), 1000),
            expected[0]
        );
    }

    /// The vectors that FNV's authors published for FNV-1a, 64 bits.
    #[test]
    fn hash_vectors() {
        assert_eq!(hash8(b""), "cbf29ce4");
        assert_eq!(hash8(b"a"), "af63dc4c");
        assert_eq!(hash8(b"foobar"), "85944171");
    }

    #[test]
    fn a_short_data_dir_holds_its_socket() {
        let run = Some("/run/user/1000");
        check("/home/u/.latzero", run, &["/home/u/.latzero/latzero.sock"]);
        check(
            "/home/u/.latzero/",
            None,
            &["/home/u/.latzero/latzero.sock"],
        );
        check("/", None, &["/latzero.sock"]);
        // 94 bytes and "/latzero.sock" are 107.
        let just = format!("/{}", "d".repeat(93));
        check(&just, run, &[&format!("{just}/latzero.sock")]);
    }

    #[test]
    fn a_long_data_dir_has_its_socket_elsewhere() {
        let long = format!("/{}", "d".repeat(94));
        let name = format!("{}.sock", hash8(long.as_bytes()));
        let runtime = format!("/run/user/1000/latzero/{name}");
        let tmp = format!("/tmp/latzero-1000/{name}");
        check(&long, Some("/run/user/1000"), &[&runtime, &tmp]);
        check(&long, Some("/run/user/1000//"), &[&runtime, &tmp]);
        check(&long, None, &[&tmp]);
        check(&long, Some(""), &[&tmp]);
        check(&long, Some("run"), &[&tmp]);
        check(&long, Some(&format!("/{}", "r".repeat(100))), &[&tmp]);
    }
}
