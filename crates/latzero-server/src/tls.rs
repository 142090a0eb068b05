//! The TLS port's certificate: where it is, how it is made, and how it changes while the server
//! runs.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use latzero_tls::Pin;
use latzero_tls::server::{Acceptor, self_signed};

use crate::settings::Settings;
use crate::startup::StartupError;

/// Where a certificate that the server made for itself is, in the data directory.
const DIRECTORY: &str = "config/tls";

/// All that is made there.
pub(crate) const FILES: [&str; 3] = ["config/tls/cert.pem", "config/tls/key.pem", DIRECTORY];

/// Its files.
const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";

/// The words that stand in the place of paths.
const AUTO: &str = "auto";
const OFF: &str = "off";

/// What the TLS port begins connections with; replaced by a reload.
#[derive(Debug)]
pub(crate) struct Tls(Mutex<Acceptor>);

impl Tls {
    /// Loads the certificate, if the server uses TLS at all, and makes one where none was given.
    pub(crate) fn load(settings: &Settings, data_dir: &Path) -> Result<Option<Tls>, StartupError> {
        if !settings.enable_tls {
            return Ok(None);
        }
        let acceptor = load(settings, data_dir)?;
        Ok(Some(Tls(Mutex::new(acceptor))))
    }

    /// The certificate of new connections.
    pub(crate) fn acceptor(&self) -> Acceptor {
        self.0
            .lock()
            .expect("no panic happens under this lock")
            .clone()
    }

    /// The pin that clients know the server by.
    pub(crate) fn pin(&self) -> Pin {
        self.acceptor().pin()
    }

    /// Loads the certificate again, for connections that come from now on; those that are open keep
    /// theirs. Where that fails, all stays as it is.
    pub(crate) fn reload(&self, settings: &Settings, data_dir: &Path) -> Result<Pin, StartupError> {
        let fresh = load(settings, data_dir)?;
        let pin = fresh.pin();
        *self.0.lock().expect("no panic happens under this lock") = fresh;
        Ok(pin)
    }
}

fn load(settings: &Settings, data_dir: &Path) -> Result<Acceptor, StartupError> {
    let is_auto = |path: &Path| path == Path::new(AUTO);
    let (certificate, key) = match (is_auto(&settings.tls_cert), is_auto(&settings.tls_key)) {
        (true, true) => own(data_dir)?,
        (false, false) => (settings.tls_cert.clone(), settings.tls_key.clone()),
        _ => return Err(StartupError::HalfCertificate),
    };
    let client_ca = Some(&settings.tls_client_ca).filter(|path| *path != Path::new(OFF));
    check_private(&key)?;
    Acceptor::load(&certificate, &key, client_ca.map(PathBuf::as_path))
        .map_err(|error| StartupError::Certificate(error.to_string()))
}

/// Refuses a key that other users can read.
fn check_private(key: &Path) -> Result<(), StartupError> {
    let metadata = fs::metadata(key).map_err(|error| StartupError::of_io("reading", key, error))?;
    match metadata.mode() & 0o007 {
        0 => Ok(()),
        _ => Err(StartupError::Certificate(format!(
            "{0} can be read by other users; run `chmod o= {0}`, and use a new key if it may have \
             been copied",
            key.display()
        ))),
    }
}

/// The server's own certificate and key, made where there are none.
fn own(data_dir: &Path) -> Result<(PathBuf, PathBuf), StartupError> {
    let directory = data_dir.join(DIRECTORY);
    let (certificate, key) = (directory.join(CERTIFICATE), directory.join(KEY));
    if certificate.exists() && key.exists() {
        return Ok((certificate, key));
    }
    if certificate.exists() || key.exists() {
        // Clients have its pin: another key in its place would look like an attack.
        let (there, gone) = match certificate.exists() {
            true => (&certificate, &key),
            false => (&key, &certificate),
        };
        return Err(StartupError::Certificate(format!(
            "{} is there, and {} is not; restore it, or remove the other for a new certificate, \
             which clients have to trust anew",
            there.display(),
            gone.display()
        )));
    }
    let node = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let names = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    let with_node = names.iter().cloned().chain([node]).collect();
    // A node may have a name that can't stand in a certificate.
    let made = self_signed(with_node).or_else(|_| self_signed(names));
    let made = made.map_err(StartupError::Certificate)?;
    let write = || -> io::Result<()> {
        if !directory.is_dir() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&directory)?;
        }
        // The key first: a certificate without its key is never left.
        write_private(&key, &made.key)?;
        write_private(&certificate, &made.certificate)
    };
    write().map_err(|error| StartupError::of_io("writing", &directory, error))?;
    tracing::info!(certificate = %certificate.display(), "made a certificate for TLS");
    Ok((certificate, key))
}

/// Writes a file that only this user can read, in whole or not at all.
fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let beside = path.with_extension("new");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)
}
