//! Files that a start creates, so that a failed start can remove them.

use std::fs;
use std::path::{Path, PathBuf};

use super::data_dir::SUBDIRECTORIES;
use super::lock::{self, LOCK_NAME};
use super::token::TOKEN_NAME;

/// The paths of a data directory that did not exist before a start.
#[derive(Debug)]
pub struct CreatedFiles {
    data_dir: PathBuf,
    /// Missing directories above and the data directory itself, the outermost first.
    directories: Vec<PathBuf>,
    /// Missing files inside, if the directory itself exists.
    inside: Vec<PathBuf>,
}

impl CreatedFiles {
    /// Records what is missing.
    #[must_use]
    pub fn before(data_dir: &Path) -> CreatedFiles {
        let data_dir = std::path::absolute(data_dir).unwrap_or_else(|_| data_dir.to_owned());
        let is_missing = |path: &Path| path.symlink_metadata().is_err();
        let mut directories: Vec<PathBuf> = data_dir
            .ancestors()
            .take_while(|path| is_missing(path))
            .map(Path::to_owned)
            .collect();
        directories.reverse();
        let names = SUBDIRECTORIES.into_iter().chain([LOCK_NAME, TOKEN_NAME]);
        // Inner paths are removed first.
        let inside = crate::tls::FILES
            .into_iter()
            .chain(names)
            .map(|name| data_dir.join(name))
            .filter(|path| is_missing(path))
            .collect();
        CreatedFiles {
            data_dir,
            directories,
            inside,
        }
    }

    /// Removes what was created, unless another process uses the directory now. Errors are ignored:
    /// the start has failed for another reason, which is reported.
    pub fn remove(self) {
        if lock::holder(&self.data_dir).is_some() {
            return;
        }
        if self.directories.contains(&self.data_dir) {
            let _ = fs::remove_dir_all(&self.data_dir);
        } else {
            for path in &self.inside {
                // A directory with other files is not empty, and stays.
                let _ = match path.is_dir() {
                    true => fs::remove_dir(path),
                    false => fs::remove_file(path),
                };
            }
        }
        for path in self
            .directories
            .iter()
            .rev()
            .filter(|p| **p != self.data_dir)
        {
            let _ = fs::remove_dir(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::startup::data_dir::DataDir;

    #[test]
    fn files_made_by_a_failed_start_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("a/b/data");
        let created = CreatedFiles::before(&dir);
        DataDir::prepare(&dir).unwrap();
        fs::write(dir.join(LOCK_NAME), "").unwrap();
        created.remove();
        assert!(!home.path().join("a").exists());
    }

    #[test]
    fn existing_files_stay() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        DataDir::prepare(&dir).unwrap();
        fs::remove_dir(dir.join("logs")).unwrap();
        fs::write(dir.join(TOKEN_NAME), "x").unwrap();
        let created = CreatedFiles::before(&dir);
        DataDir::prepare(&dir).unwrap();
        created.remove();
        assert!(dir.join(TOKEN_NAME).exists() && dir.join("config").exists());
        assert!(!dir.join("logs").exists());
    }

    #[test]
    fn a_directory_that_is_in_use_stays() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let created = CreatedFiles::before(&dir);
        DataDir::prepare(&dir).unwrap();
        let _lock = lock::InstanceLock::acquire(&dir).unwrap();
        created.remove();
        assert!(dir.join("logs").exists());
    }
}
