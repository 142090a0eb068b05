//! Restores a backup, or checks for damage, in a data directory that no server is using.
//!
//! The directory is locked as a server does it, so the two never run at the same time.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use latzero_store::{BackupError, DATABASE, OpenError, Options, QueryLimits, Summary};
use serde_json::Value;
use thiserror::Error;

use crate::blocks::restore::Restoring;
use crate::machine_limits::survive_file_size_limit;
use crate::startup::data_dir::DataDir;
use crate::startup::lock::InstanceLock;
use crate::startup::{StartupError, descriptors, lock};

/// The directory to which a database is copied, so that a check changes nothing.
const COPY: &str = ".check";

/// A data directory that is locked, so that no server can use it until this is dropped.
#[derive(Debug)]
pub struct Offline {
    data_dir: DataDir,
    _lock: InstanceLock,
}

/// The result of a restore.
#[derive(Debug)]
pub struct Restored {
    /// The contents of the backup.
    pub summary: Summary,
    /// Where the former database's files are now.
    pub set_aside: Vec<PathBuf>,
    /// How many blocks were moved aside to `memory/.orphans/`, because the backup has them too.
    pub blocks_set_aside: usize,
}

/// Why maintenance of a directory without a server failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MaintenanceError {
    /// The directory is not available.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The backup cannot be used.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The database cannot be replaced or opened.
    #[error(transparent)]
    Store(OpenError),
    /// The database was restored, but not every block.
    #[error(
        "the database was restored, but not every persistent block: {0}; restore the same backup \
         again"
    )]
    Blocks(#[source] io::Error),
    /// Another operation of the system failed.
    #[error("{action} {}: {source}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl From<OpenError> for MaintenanceError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Backup(error) => MaintenanceError::Backup(error),
            error => MaintenanceError::Store(error),
        }
    }
}

impl Offline {
    /// Locks a data directory, which is created if it does not exist.
    ///
    /// # Errors
    /// [`StartupError::AnotherServer`] if a server uses it, and everything that would prevent a
    /// server from starting on it.
    pub fn lock(path: &Path) -> Result<Offline, MaintenanceError> {
        lock::refuse_held(path)?;
        let data_dir = DataDir::prepare(path)?;
        let lock = InstanceLock::acquire(data_dir.path())?;
        // Each block that is checked needs a few descriptors.
        descriptors::raise_limit();
        // Without it, a write beyond the limit ends the process.
        let _ = survive_file_size_limit();
        Ok(Offline {
            data_dir,
            _lock: lock,
        })
    }

    /// The directory's canonical path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.data_dir.path()
    }

    /// Whether there is a database.
    #[must_use]
    pub fn has_database(&self) -> bool {
        fs::metadata(self.path().join(DATABASE)).is_ok_and(|file| file.len() > 0)
    }

    /// Replaces the database with a backup, and restores its persistent blocks. The whole backup is
    /// verified first; what it replaces is moved aside.
    ///
    /// # Errors
    /// If the backup is invalid, or the disk fails: then nothing has changed, except with
    /// [`MaintenanceError::Blocks`].
    pub fn restore(&self, backup: &Path) -> Result<Restored, MaintenanceError> {
        let memory = self.path().join("memory");
        // If the backup is invalid, even the checks of blocks that a start makes were not done.
        let mut restoring: Option<Restoring> = None;
        let restored = latzero_store::restore(backup, self.path(), |head, bytes| {
            let restoring = match &mut restoring {
                Some(restoring) => restoring,
                None => restoring.insert(Restoring::begin(&memory)?),
            };
            restoring.put(&head, bytes)
        })?;
        let blocks_set_aside = restoring
            .map_or_else(|| Restoring::begin(&memory), Ok)
            .and_then(Restoring::commit)
            .map_err(MaintenanceError::Blocks)?;
        Ok(Restored {
            summary: restored.summary,
            set_aside: restored.set_aside,
            blocks_set_aside,
        })
    }

    /// Checks a copy of the database for damage; `is_thorough` reads everything. No findings mean
    /// that there is no damage.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn check(&self, is_thorough: bool) -> Result<Vec<String>, MaintenanceError> {
        let copy = Copy::of_database(self.path())?;
        let opened = match latzero_store::open(&copy.directory, Options::default()) {
            Ok(opened) => opened,
            Err(
                error @ (OpenError::Newer { .. }
                | OpenError::Foreign { .. }
                | OpenError::Damaged { .. }),
            ) => return Ok(vec![copy.in_words_of_the_original(&error.to_string())]),
            Err(error) => return Err(error.into()),
        };
        let mut findings: Vec<String> = if opened.report.is_degraded {
            let texts = opened.report.texts.iter();
            texts
                .map(|text| copy.in_words_of_the_original(text))
                .collect()
        } else {
            Vec::new()
        };
        let found = opened.store.check(is_thorough);
        findings.extend(found.unwrap_or_else(|error| vec![error.to_string()]));
        drop(opened);
        Ok(findings)
    }
}

impl Offline {
    /// Runs one SELECT on the database, which does not change.
    ///
    /// # Errors
    /// If it cannot be read, or the query is invalid.
    pub fn query(&self, sql: &str) -> Result<Value, MaintenanceError> {
        let copy = Copy::of_database(self.path())?;
        let path = copy.directory.join(DATABASE);
        let answer = latzero_store::query(&path, sql, &QueryLimits::default())?;
        Ok(super::answer_json(&answer))
    }

    /// Writes the database as SQL that recreates it.
    ///
    /// # Errors
    /// If it cannot be read, or the text cannot be written.
    pub fn dump(&self, out: &mut dyn io::Write) -> Result<(), MaintenanceError> {
        let copy = Copy::of_database(self.path())?;
        Ok(latzero_store::dump(&copy.directory.join(DATABASE), out)?)
    }
}

/// Writes a backup's records as SQL that recreates them.
///
/// # Errors
/// If it cannot be read, or the text cannot be written.
pub fn dump_backup(file: &Path, out: &mut dyn io::Write) -> Result<(), MaintenanceError> {
    Ok(latzero_store::dump(file, out)?)
}

/// A copy of the database in a temporary directory, because opening a database repairs it, and a
/// check must not. Deleted when dropped.
struct Copy {
    directory: PathBuf,
    original: PathBuf,
}

impl Copy {
    fn of_database(data_dir: &Path) -> Result<Copy, MaintenanceError> {
        let copy = Copy {
            directory: data_dir.join(COPY),
            original: data_dir.to_owned(),
        };
        // A directory left by a check that was killed can be deleted, because the lock is held.
        copy.remove();
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| MaintenanceError::System {
                action,
                path,
                source,
            }
        };
        DirBuilder::new()
            .mode(0o700)
            .create(&copy.directory)
            .map_err(failed("creating", &copy.directory))?;
        // Commits are in both files until the log is moved into the database
        // (https://sqlite.org/wal.html).
        for name in [DATABASE.to_owned(), format!("{DATABASE}-wal")] {
            let from = data_dir.join(&name);
            match fs::copy(&from, copy.directory.join(&name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => drop(done.map_err(failed("copying", &from))?),
            }
        }
        Ok(copy)
    }

    /// The findings of opening the copy, as they apply to the original. Repairs of the copy are
    /// left out.
    fn in_words_of_the_original(&self, text: &str) -> String {
        let copy = self.directory.display().to_string();
        let text = text.replace(&copy, &self.original.display().to_string());
        match text.split_once("; there is no valid backup") {
            Some((damage, _)) => damage.to_owned(),
            None => text,
        }
    }

    fn remove(&self) {
        // Files that cannot be removed are found by the next check.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn with_database() -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("data");
        let offline = Offline::lock(&path).unwrap();
        let opened = latzero_store::open(offline.path(), Options::default()).unwrap();
        opened.store.close().unwrap();
        (home, path)
    }

    /// Every file of a directory with its bytes.
    fn contents(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries
            .filter(|path| path.is_file() && !path.ends_with("lock"))
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a_check_finds_damage_and_changes_nothing() {
        let (_home, path) = with_database();
        let offline = Offline::lock(&path).unwrap();
        assert!(offline.has_database());
        for is_thorough in [false, true] {
            assert_eq!(offline.check(is_thorough).unwrap(), [""; 0]);
        }
        let file = fs::OpenOptions::new().write(true).open(path.join(DATABASE));
        // The second page and all that follow.
        let length = fs::metadata(path.join(DATABASE)).unwrap().len();
        let junk = vec![0xa5; usize::try_from(length - 4096).unwrap()];
        file.unwrap().write_all_at(&junk, 4096).unwrap();
        let before = contents(&path);
        let findings = offline.check(true).unwrap();
        let database = offline.path().join(DATABASE);
        let start = format!("{} is damaged (", database.display());
        assert!(findings[0].starts_with(&start), "{findings:?}");
        assert!(
            !findings.concat().contains("everything starts empty"),
            "{findings:?}"
        );
        assert_eq!(contents(&path), before);
        assert!(!path.join(COPY).exists());
    }

    #[test]
    fn a_directory_has_one_owner() {
        let (_home, path) = with_database();
        let _one = Offline::lock(&path).unwrap();
        let error = Offline::lock(&path).unwrap_err();
        assert!(
            matches!(
                error,
                MaintenanceError::Startup(StartupError::AnotherServer { .. })
            ),
            "{error}"
        );
    }
}
