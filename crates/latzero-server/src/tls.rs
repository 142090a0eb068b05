//! The certificate of the TLS port: its files, its creation, and its reload while the server runs.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use latzero_tls::Pin;
use latzero_tls::pem::{Origin, PemError};
use latzero_tls::server::{Acceptor, SelfSigned, self_signed};

use crate::settings::Settings;
use crate::startup::StartupError;

/// The directory of the certificate that the server creates, in the data directory.
const DIRECTORY: &str = "config/tls";

/// Where it is written first: it becomes [`DIRECTORY`] as a whole.
const NEW_DIRECTORY: &str = "config/tls.new";

/// All files that are created there.
pub(crate) const FILES: [&str; 3] = ["config/tls/cert.pem", "config/tls/key.pem", DIRECTORY];

/// Its files.
const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";

/// The words that are allowed instead of paths.
const AUTO: &str = "auto";
const OFF: &str = "off";

/// The configuration of new TLS connections; replaced by a reload.
#[derive(Debug)]
pub(crate) struct Tls(Mutex<Acceptor>);

impl Tls {
    /// Loads the certificate, if the server uses TLS, and creates one if none was given.
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

    /// The pin of the server.
    pub(crate) fn pin(&self) -> Pin {
        self.acceptor().pin()
    }

    /// Reloads the certificate for new connections; open ones keep theirs. If that fails, nothing
    /// changes.
    pub(crate) fn reload(&self, settings: &Settings, data_dir: &Path) -> Result<Pin, StartupError> {
        let fresh = load(settings, data_dir)?;
        let pin = fresh.pin();
        *self.0.lock().expect("no panic happens under this lock") = fresh;
        Ok(pin)
    }
}

/// The checks of a start that change nothing: files that the user set.
pub(crate) fn check(settings: &Settings) -> Result<(), StartupError> {
    if !settings.enable_tls {
        return Ok(());
    }
    let is_own = [&settings.tls_cert, &settings.tls_key].map(|path| path == Path::new(AUTO));
    if is_own != [true, true] {
        return load(settings, &settings.data_dir).map(drop);
    }
    // Its own certificate may not be there yet.
    let client_ca = Some(&settings.tls_client_ca).filter(|path| *path != Path::new(OFF));
    let opened = client_ca.map(|path| File::open(path).map_err(|error| unreadable(path, &error)));
    opened.transpose().map(drop)
}

fn unreadable(path: &Path, source: &io::Error) -> StartupError {
    match source.kind() {
        io::ErrorKind::NotFound => StartupError::Certificate(format!(
            "there is no file {}; correct its path, or create it",
            path.display()
        )),
        io::ErrorKind::PermissionDenied => StartupError::CertificateDenied {
            path: path.to_owned(),
        },
        _ => StartupError::Certificate(format!("{}: {source}", path.display())),
    }
}

fn load(settings: &Settings, data_dir: &Path) -> Result<Acceptor, StartupError> {
    let is_auto = |path: &Path| path == Path::new(AUTO);
    let is_own = (is_auto(&settings.tls_cert), is_auto(&settings.tls_key));
    let ((certificate, key), origin) = match is_own {
        (true, true) => (own(data_dir)?, Origin::Own),
        (false, false) => {
            let given = (settings.tls_cert.clone(), settings.tls_key.clone());
            (given, Origin::Given)
        }
        _ => return Err(StartupError::HalfCertificate),
    };
    let client_ca = Some(&settings.tls_client_ca).filter(|path| *path != Path::new(OFF));
    let client_ca = client_ca.map(PathBuf::as_path);
    Acceptor::load(&certificate, &key, client_ca, origin).map_err(|error| match error {
        PemError::Io { path, source } => unreadable(&path, &source),
        other => StartupError::Certificate(other.to_string()),
    })
}

/// The server's own certificate and key, created if there are none.
fn own(data_dir: &Path) -> Result<(PathBuf, PathBuf), StartupError> {
    let directory = data_dir.join(DIRECTORY);
    let (certificate, key) = (directory.join(CERTIFICATE), directory.join(KEY));
    if certificate.exists() && key.exists() {
        return Ok((certificate, key));
    }
    if certificate.exists() || key.exists() {
        // Clients have its pin, so a new key would look like an attack.
        let (there, gone) = match certificate.exists() {
            true => (&certificate, &key),
            false => (&key, &certificate),
        };
        return Err(StartupError::Certificate(format!(
            "{} exists, but {} does not; restore it, or remove the other for a new certificate, \
             which clients must then trust",
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
    let beside = data_dir.join(NEW_DIRECTORY);
    write(&beside, &directory, &made).map_err(|error| {
        // The next start would remove it as well.
        let _ = remove(&beside);
        match error.kind() {
            io::ErrorKind::DirectoryNotEmpty => StartupError::Certificate(format!(
                "{} holds other files, but neither a certificate nor a key; move them elsewhere",
                directory.display()
            )),
            _ => StartupError::of_io("writing", &directory, error),
        }
    })?;
    tracing::info!(certificate = %certificate.display(), "created a certificate for TLS");
    Ok((certificate, key))
}

/// Writes a certificate and its key: both or neither, even if the machine stops at any point.
fn write(beside: &Path, directory: &Path, made: &SelfSigned) -> io::Result<()> {
    remove(beside)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(beside)?;
    write_private(&beside.join(KEY), &made.key)?;
    write_private(&beside.join(CERTIFICATE), &made.certificate)?;
    File::open(beside)?.sync_all()?;
    // An empty directory may be there (rename(2)).
    fs::rename(beside, directory)?;
    let parent = directory.parent().unwrap_or(directory);
    File::open(parent)?.sync_all()
}

/// Removes the files of an interrupted start.
fn remove(beside: &Path) -> io::Result<()> {
    match fs::remove_dir_all(beside) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes a new file that only this user can read.
fn write_private(path: &Path, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::settings::{Inputs, Override, resolve};

    /// A data directory with a certificate of the server's own.
    fn made() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = own(dir.path()).unwrap();
        (dir, certificate, key)
    }

    /// As they are by default.
    fn settings(dir: &Path) -> Settings {
        let data_dir = Override::new("data_dir", dir.to_str().unwrap(), "data_dir");
        let inputs = Inputs {
            command_line: vec![data_dir],
            ..Inputs::default()
        };
        resolve(&inputs).unwrap().settings
    }

    fn load_error(settings: &Settings, dir: &Path) -> String {
        load(settings, dir).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn an_interrupted_start_does_not_block_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let beside = dir.path().join(NEW_DIRECTORY);
        fs::create_dir_all(&beside).unwrap();
        fs::write(beside.join(KEY), "half of a k").unwrap();
        // And an empty directory, as somebody may have left it.
        fs::create_dir(dir.path().join(DIRECTORY)).unwrap();
        let (certificate, key) = own(dir.path()).unwrap();
        assert!(certificate.exists() && key.exists() && !beside.exists());
        let pin = load(&settings(dir.path()), dir.path()).unwrap().pin();
        assert_eq!(load(&settings(dir.path()), dir.path()).unwrap().pin(), pin);
    }

    #[test]
    fn other_files_in_its_place_are_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(DIRECTORY)).unwrap();
        fs::write(dir.path().join(DIRECTORY).join("notes"), "").unwrap();
        let text = load_error(&settings(dir.path()), dir.path());
        assert!(text.contains("holds other files"), "{text}");
        assert!(!dir.path().join(NEW_DIRECTORY).exists());
    }

    #[test]
    fn the_private_key_is_readable_by_its_user_only() {
        let (dir, _, key) = made();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let text = load_error(&settings(dir.path()), dir.path());
        assert!(text.contains("can be read by other users"), "{text}");
    }

    #[test]
    fn a_named_pipe_delays_nothing() {
        let (dir, certificate, key) = made();
        let pipe = dir.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for (tls_cert, tls_key, tls_client_ca) in [
            (&pipe, &key, Path::new(OFF)),
            (&certificate, &pipe, Path::new(OFF)),
            (&certificate, &key, &*pipe),
        ] {
            let settings = Settings {
                tls_cert: tls_cert.clone(),
                tls_key: tls_key.clone(),
                tls_client_ca: tls_client_ca.to_owned(),
                ..settings(dir.path())
            };
            let text = load_error(&settings, dir.path());
            assert!(text.contains("is not a regular file"), "{text}");
        }
    }
}
