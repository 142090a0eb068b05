//! The backups in a data directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use latzero_store::{BACKUPS, BackupError, Summary, open_backup};

/// How thoroughly a backup is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Its header.
    Glance,
    /// Every byte, against its checksums.
    Whole,
}

/// A file in the directory of backups.
#[derive(Debug)]
pub struct BackupEntry {
    /// Its path.
    pub file: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its contents, or why it cannot be used.
    pub summary: Result<Summary, BackupError>,
}

/// The files that may be backups, newest first; those with other names come last. None if the
/// directory does not exist.
///
/// # Errors
/// If the directory cannot be read.
pub fn files(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(data_dir.join(BACKUPS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // A name that begins with a dot is an incomplete backup.
        let is_hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !is_hidden && path.extension().is_some_and(|extension| extension == "db") {
            files.push(path);
        }
    }
    // By their numbers; other names come last.
    let known = latzero_store::backups(data_dir);
    let place = |path: &PathBuf| known.iter().position(|known| known == path);
    files.sort_by_cached_key(|path| (place(path).unwrap_or(known.len()), path.clone()));
    Ok(files)
}

/// Examines a backup at any path.
///
/// # Errors
/// Why it cannot be used.
pub fn inspect(file: &Path, look: Depth) -> Result<Summary, BackupError> {
    let backup = open_backup(file)?;
    let summary = backup.summary();
    // If it is not a backup at all, this error says what it is.
    if look == Depth::Whole || summary.is_err() {
        backup.verify()?;
    }
    summary
}

/// A file of the directory of backups, looked at.
#[must_use]
pub fn list_one(file: PathBuf, look: Depth) -> BackupEntry {
    BackupEntry {
        bytes: fs::metadata(&file).map_or(0, |metadata| metadata.len()),
        summary: inspect(&file, look),
        file,
    }
}
