//! Certificates and keys in files.

use std::path::{Path, PathBuf};

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Why a file is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    /// It can't be read.
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
                // Never with the content, which may be a key.
                _ => "it is damaged".to_owned(),
            },
        },
    }
}

/// The certificates of a file, in their order; at least one.
///
/// # Errors
/// If it can't be read or has none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let what = "certificate";
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fault(path, what, error))?;
    match found.is_empty() {
        true => Err(fault(path, what, pem::Error::NoItemsFound)),
        false => Ok(found),
    }
}

/// The private key of a file.
///
/// # Errors
/// If it can't be read or has none.
pub fn key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| fault(path, "private key", error))
}

pub(crate) fn roots(path: &Path) -> Result<rustls::RootCertStore, PemError> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| PemError::Unfit {
            path: path.to_owned(),
            source,
        })?;
    }
    Ok(roots)
}
