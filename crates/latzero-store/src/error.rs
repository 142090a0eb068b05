//! Errors of the store: the cause, and what to do about it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::ErrorCode;

use crate::location::Missing;

/// Why a change, a backup or a check failed. Cheap to clone, because one error is reported for many
/// tickets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The transaction could not be written. It was rolled back; after a crash at this moment it
    /// may still exist completely.
    #[error("the store could not {step}: {reason}; {advice}")]
    Disk {
        /// What was being done.
        step: &'static str,
        /// SQLite's or the system's words.
        reason: Arc<str>,
        /// What to do.
        advice: &'static str,
    },
    /// This change cannot be stored; others are not affected. Repeating it does not help.
    #[error("cannot store {what}: {reason}; correct the value")]
    Refused {
        /// Which record.
        what: Arc<str>,
        /// SQLite's words, or the bound that was exceeded.
        reason: Arc<str>,
    },
    /// Too many changes wait.
    #[error("{0}")]
    Submit(#[from] SubmitError),
    /// A backup failed; the database is not affected.
    #[error("{0}")]
    Backup(Arc<BackupError>),
}

/// Why a change was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many changes wait, because the disk is slower than the changes arrive, or fails.
    #[error(
        "the store's queue is full: {max} {what} changes are waiting; try again later, and check \
         the disk"
    )]
    Full {
        /// "promised" or "eventual".
        what: &'static str,
        /// The bound: `queue_max` or `retained_max`.
        max: usize,
    },
    /// The store was closed.
    #[error("the store is closed; open it again")]
    Closed,
}

/// Why a backup could not be made, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file operation failed.
    #[error("cannot {step} {}: {source}; {}", path.display(), advice_io(source))]
    File {
        /// What was being done.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// SQLite failed.
    #[error("cannot {step} {}: {source}; {}", path.display(), advice(source))]
    Sqlite {
        /// What was being done.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
    /// The file is not a good backup.
    #[error(
        "{} is not a valid backup: {findings}; use another one from the same directory",
        path.display()
    )]
    Bad {
        /// Which file.
        path: PathBuf,
        /// What was found.
        findings: String,
    },
    /// The target exists.
    #[error("{} already exists; choose another file, or move the existing one", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// A block returned another number of bytes than announced.
    #[error("block {block_id} of pool {pool}: announced {announced} bytes, had {found}; try again")]
    BlockLength {
        /// The block's pool.
        pool: String,
        /// The block.
        block_id: String,
        /// Bytes announced.
        announced: u64,
        /// Bytes read; one more than announced stands for "more".
        found: u64,
    },
    /// An SQL query cannot be run.
    #[error("cannot run the query: {0}; only one SELECT within the limits is allowed")]
    Query(String),
    /// The store stopped in the meantime.
    #[error("{0}")]
    Store(StoreError),
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The SQLite library is one that can lose commits (before 3.51.3:
    /// <https://sqlite.org/wal.html#walresetbug>).
    #[error("SQLite {found} is too old: 3.51.3 or newer is needed; build with the bundled library")]
    Library {
        /// The version found.
        found: String,
    },
    /// A newer version created this database.
    #[error(
        "{} has schema {found}; this version supports up to {known}; start the newer version, or \
         restore a backup `pre-migration-{known}-…` from the directory backups beside it",
        path.display()
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest schema known here.
        known: i64,
    },
    /// The file is another program's database.
    #[error("{} is another program's database (application_id {found:#x}); move it away, or \
        choose another data directory", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Its application id.
        found: i64,
    },
    /// Another process has it open.
    #[error("{} is in use by another process; stop it first", path.display())]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// SQLite failed for another reason than damage.
    #[error("cannot {step} {}: {source}; {}", path.display(), advice(source))]
    Sqlite {
        /// What was being done.
        step: &'static str,
        /// The database.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
    /// A file operation failed.
    #[error("cannot {step} {}: {source}; {}", path.display(), advice_io(source))]
    File {
        /// What was being done.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The backup before a migration failed, so nothing was migrated.
    #[error(
        "{} has schema {found} and was not migrated, because the backup before it failed: {reason}",
        path.display()
    )]
    Migration {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// Why there is no backup.
        reason: Box<BackupError>,
    },
    /// A backup cannot be read or restored.
    #[error("{0}")]
    Backup(#[from] BackupError),
    /// The database was damaged, and so is what was restored.
    #[error("{} is still damaged after restoring: {reason}; check the disk, then restore a \
        backup with `latzero restore`", path.display())]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
}

impl StoreError {
    pub(crate) fn missing(missing: Missing) -> Self {
        Self::Disk {
            step: "keep a change",
            reason: missing.reason().into(),
            advice: match missing {
                Missing::Directory => "move the data directory back, or stop the server",
                Missing::Database | Missing::Log => {
                    "the server is recreating it from memory; \
                    try again"
                }
            },
        }
    }

    pub(crate) fn disk(step: &'static str, error: &rusqlite::Error) -> Self {
        Self::Disk {
            step,
            reason: error.to_string().into(),
            advice: advice(error),
        }
    }
}

impl From<BackupError> for StoreError {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Store(error) => error,
            error => Self::Backup(Arc::new(error)),
        }
    }
}

impl PartialEq for BackupError {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Eq for BackupError {}

impl BackupError {
    pub(crate) fn file(step: &'static str, path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        Self::File { step, path, source }
    }

    pub(crate) fn sqlite(step: &'static str, path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        Self::Sqlite { step, path, source }
    }
}

impl OpenError {
    pub(crate) fn file(step: &'static str, path: &Path, source: std::io::Error) -> Self {
        let path = path.to_owned();
        Self::File { step, path, source }
    }

    pub(crate) fn sqlite(step: &'static str, path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        if source.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) {
            return Self::InUse { path };
        }
        Self::Sqlite { step, path, source }
    }
}

/// Whether the change itself is invalid, so that others of its transaction may continue.
pub(crate) fn is_of_the_change(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => matches!(
            failure.code,
            ErrorCode::ConstraintViolation | ErrorCode::TooBig | ErrorCode::TypeMismatch
        ),
        rusqlite::Error::ToSqlConversionFailure(_) => true,
        _ => false,
    }
}

/// Whether the file's contents are damaged: then it is moved aside. Other problems may be
/// temporary, and the file stays.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    match error {
        rusqlite::Error::SqliteFailure(failure, _) => matches!(
            failure.code,
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase
        ),
        rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::Utf8Error(..) => true,
        _ => false,
    }
}

fn advice(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "free space on the disk of the data directory",
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen) => {
            "make the data directory writable for this user"
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            "close the other program that has data.db open"
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "restart the server: it restores the newest valid backup"
        }
        Some(ErrorCode::OutOfMemory) => "free memory",
        _ => "check the disk and the kernel log; the server retries automatically",
    }
}

fn advice_io(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free space on that disk",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "make it writable for this user"
        }
        ErrorKind::NotFound => "check the path",
        _ => "check the disk and the kernel log",
    }
}
