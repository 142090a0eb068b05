//! Certificates and keys in files.
//!
//! A file is opened once and checked by its descriptor, so that what is read is what was checked.
//! Opening never blocks, even for a named pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// How many bytes of a file are read at most.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Who created a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A person or another program. It may be a link. A key must belong to this user or to root,
    /// and be unreadable for users outside its group.
    Given,
    /// The program itself, as a regular file. A key must belong to this user and be readable only
    /// for this user.
    Own,
}

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It has no such part, or one that is damaged.
    #[error("{} holds no usable {what} in PEM form: {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What was found.
        why: String,
    },
    /// Its type, owner or mode is wrong.
    #[error("{} {why}", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// The parts do not fit together.
    #[error("{} cannot be used: {source}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

fn fault(path: &Path, what: &'static str, error: pem::Error) -> PemError {
    let path = path.to_owned();
    match error {
        pem::Error::Io(source) => PemError::Io { path, source },
        other => PemError::Content {
            path,
            what,
            why: match other {
                pem::Error::NoItemsFound => "there is none".to_owned(),
                // Never show the content, which may be a key.
                _ => "it is damaged".to_owned(),
            },
        },
    }
}

/// Opens a regular file.
fn open(path: &Path, origin: Origin) -> Result<File, PemError> {
    let unreadable = |error: io::Error| fault(path, "", pem::Error::Io(error));
    // The standard library adds O_CLOEXEC (open(2)).
    let flags = match origin {
        Origin::Given => OFlags::NONBLOCK,
        Origin::Own => OFlags::NONBLOCK | OFlags::NOFOLLOW,
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(unreadable)?;
    match file.metadata().map_err(unreadable)?.is_file() {
        true => Ok(file),
        false => Err(PemError::Unsafe {
            path: path.to_owned(),
            why: "is not a regular file".to_owned(),
        }),
    }
}

/// Refuses a key that others can read, or may have created.
fn check_private(file: &File, path: &Path, origin: Origin) -> Result<(), PemError> {
    let metadata = file
        .metadata()
        .map_err(|error| fault(path, "", pem::Error::Io(error)))?;
    let unsafe_for = |why: String| {
        let path = path.to_owned();
        Err(PemError::Unsafe { path, why })
    };
    let (user, owner) = (rustix::process::geteuid().as_raw(), metadata.uid());
    if owner != user && (origin == Origin::Own || owner != 0) {
        return unsafe_for(format!(
            "belongs to user {owner}, who can change it; give it to user {user}"
        ));
    }
    let (others, remedy) = match origin {
        Origin::Given => (0o007, "o="),
        Origin::Own => (0o077, "go="),
    };
    match metadata.mode() & others {
        0 => Ok(()),
        _ => unsafe_for(format!(
            "can be read by other users; run `chmod {remedy} {}`, and use a new key if it may have \
             been copied",
            path.display()
        )),
    }
}

/// The certificates of a file, in order; at least one.
///
/// # Errors
/// If it cannot be read or has none.
pub fn certificates(path: &Path, origin: Origin) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let what = "certificate";
    let file = open(path, origin)?;
    let found = CertificateDer::pem_reader_iter(file.take(FILE_BYTES_MAX))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| fault(path, what, error))?;
    match found.is_empty() {
        true => Err(fault(path, what, pem::Error::NoItemsFound)),
        false => Ok(found),
    }
}

/// The private key of a file.
///
/// # Errors
/// If it cannot be read or has none, or others can read it.
pub fn key(path: &Path, origin: Origin) -> Result<PrivateKeyDer<'static>, PemError> {
    let file = open(path, origin)?;
    check_private(&file, path, origin)?;
    PrivateKeyDer::from_pem_reader(file.take(FILE_BYTES_MAX))
        .map_err(|error| fault(path, "private key", error))
}

pub(crate) fn roots(path: &Path) -> Result<rustls::RootCertStore, PemError> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(path, Origin::Given)? {
        roots.add(certificate).map_err(|source| PemError::Unfit {
            path: path.to_owned(),
            source,
        })?;
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says where by panicking")]

    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::server::self_signed;

    #[test]
    fn keys_readable_by_others_and_non_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, self_signed(Vec::new()).unwrap().key).unwrap();
        for (mode, given, own) in [
            (0o600, true, true),
            (0o400, true, true),
            (0o640, true, false),
            (0o604, false, false),
            (0o602, false, false),
        ] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            for (origin, is_fit) in [(Origin::Given, given), (Origin::Own, own)] {
                match key(&path, origin) {
                    Ok(_) => assert!(is_fit, "{mode:o} {origin:?}"),
                    Err(error) => {
                        let text = error.to_string();
                        assert!(!is_fit && text.contains("run `chmod "), "{mode:o} {text}");
                    }
                }
            }
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        key(&link, Origin::Given).unwrap();
        assert!(matches!(key(&link, Origin::Own), Err(PemError::Io { .. })));
    }

    #[test]
    fn a_named_pipe_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for origin in [Origin::Given, Origin::Own] {
            let text = key(&pipe, origin).unwrap_err().to_string();
            assert!(text.ends_with("is not a regular file"), "{text}");
            let text = certificates(&pipe, origin).unwrap_err().to_string();
            assert!(text.ends_with("is not a regular file"), "{text}");
        }
    }
}
