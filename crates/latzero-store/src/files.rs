//! Durable operations on files and directories: an fsync of the directory follows each change of a
//! name.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};

use crate::faults::Faults;

/// The suffixes of the files that belong to a database.
pub(crate) const COMPANIONS: [&str; 4] = ["", "-wal", "-shm", "-journal"];

/// `path` with `suffix` at its end.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Ensures that `path` exists and is private (0600). Returns whether it was created.
pub(crate) fn private_file(path: &Path) -> io::Result<bool> {
    match OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Ok(_) => return Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    for suffix in COMPANIONS {
        let path = with_suffix(path, suffix);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.permissions().mode() & 0o777 != 0o600 => {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Refuses anything but a regular file: opening a pipe would block, and a device may do anything.
pub(crate) fn check_regular(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => Ok(()),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file; move it away",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Ensures that the directory `path` exists; a new one is private (0700).
pub(crate) fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

pub(crate) fn sync_file(path: &Path, faults: &Faults) -> io::Result<()> {
    faults.step("fsync of a file")?;
    File::open(path)?.sync_all()
}

pub(crate) fn sync_dir(path: &Path, faults: &Faults) -> io::Result<()> {
    faults.step("fsync of a directory")?;
    File::open(path)?.sync_all()
}

/// Renames within a directory or between two of one disk. An existing `to` is never replaced:
/// `AlreadyExists`.
pub(crate) fn rename_new(from: &Path, to: &Path, faults: &Faults) -> io::Result<()> {
    faults.step("rename")?;
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system does not support the flag (renameat2(2)), so a check before the rename
        // has to be enough.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        done => Ok(done?),
    }
}

/// The directory of a file.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Moves a database and its companions aside under `<why>-<unix ms>-<name>`, one time for all of
/// them.
///
/// If this is repeated after a crash, it moves the rest. The main file is moved first, so the rest
/// cannot be mistaken for a complete database.
pub(crate) fn set_aside(
    database: &Path,
    why: &str,
    unix_ms: i64,
    faults: &Faults,
) -> io::Result<Vec<PathBuf>> {
    let name = database
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let dir = parent(database);
    let target = |at: i64, suffix: &str| dir.join(format!("{why}-{at}-{name}{suffix}"));
    let is_there = |path: &Path| fs::symlink_metadata(path).is_ok();
    let is_taken = |at: &i64| {
        COMPANIONS
            .iter()
            .any(|suffix| is_there(&target(*at, suffix)))
    };
    let Some(at) = (unix_ms..i64::MAX).find(|at| !is_taken(at)) else {
        return Err(io::ErrorKind::AlreadyExists.into());
    };
    let mut moved = Vec::new();
    for suffix in COMPANIONS {
        let from = with_suffix(database, suffix);
        if is_there(&from) {
            let to = target(at, suffix);
            rename_new(&from, &to, faults)?;
            moved.push(to);
        }
    }
    if !moved.is_empty() {
        sync_dir(dir, faults)?;
    }
    Ok(moved)
}
