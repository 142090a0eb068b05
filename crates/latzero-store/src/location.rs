//! The location of the database: whether it is still in place, and how many commits it has had.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::files::{self, with_suffix};
use crate::{BACKUPS, DATABASE};

/// The suffix of the database's mark.
const MARK: &str = ".mark";

/// How many bytes of a mark are read at most: more than a complete one has.
const MARK_BYTES_MAX: u64 = 256;

/// The paths of a store. If `data.db` is a symbolic link, all files of the database are at its
/// target: the log is there too, and files are renamed within one directory.
#[derive(Debug, Clone)]
pub(crate) struct DatabasePath {
    dir: PathBuf,
    database: PathBuf,
}

impl DatabasePath {
    pub(crate) fn of(dir: &Path) -> io::Result<Self> {
        let named = dir.join(DATABASE);
        let is_link = fs::symlink_metadata(&named).is_ok_and(|named| named.is_symlink());
        let database = match is_link {
            // A dangling link is an error: a database must not be created at a guessed path.
            true => fs::canonicalize(&named)?,
            false => named,
        };
        Ok(Self {
            dir: dir.to_owned(),
            database,
        })
    }

    pub(crate) fn database(&self) -> &Path {
        &self.database
    }

    /// The directory of the database.
    pub(crate) fn home(&self) -> &Path {
        files::parent(&self.database)
    }

    pub(crate) fn backups(&self) -> PathBuf {
        self.dir.join(BACKUPS)
    }

    pub(crate) fn mark(&self) -> PathBuf {
        with_suffix(&self.database, MARK)
    }
}

/// The file that a name refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    dev: u64,
    ino: u64,
}

impl Identity {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
        })
    }
}

/// What was moved or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The directory. It may have been moved, or its disk unmounted: a new directory would hide it.
    Directory,
    /// The database or its log, in an existing directory. Both can be recreated.
    Database,
    Log,
}

impl Missing {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Missing::Directory => "its directory was moved or removed while the server is running",
            Missing::Database => "data.db was moved or removed while the server is running",
            Missing::Log => "data.db-wal was moved or removed while the server is running",
        }
    }
}

/// The identity of the files of an open database. A commit to a file that has lost its name is lost
/// at the next start.
#[derive(Debug)]
pub(crate) struct Guard {
    place: DatabasePath,
    dir: Identity,
    database: Identity,
    /// Known from the first commit on.
    log: Option<Identity>,
}

impl Guard {
    /// The files of a database that was just opened.
    pub(crate) fn new(place: DatabasePath) -> io::Result<Self> {
        Ok(Self {
            dir: Identity::of(place.home())?,
            database: Identity::of(place.database())?,
            log: None,
            place,
        })
    }

    pub(crate) fn place(&self) -> &DatabasePath {
        &self.place
    }

    /// Something was just committed, so there is a log.
    pub(crate) fn note_log(&mut self) {
        if self.log.is_none() {
            self.log = Identity::of(&with_suffix(self.place.database(), "-wal")).ok();
        }
    }

    pub(crate) fn check(&self) -> Result<(), Missing> {
        let is_there = |path: &Path, known| Identity::of(path).is_ok_and(|found| found == known);
        if !is_there(self.place.home(), self.dir) {
            return Err(Missing::Directory);
        }
        if !is_there(self.place.database(), self.database) {
            return Err(Missing::Database);
        }
        match self.log {
            Some(log) if !is_there(&with_suffix(self.place.database(), "-wal"), log) => {
                Err(Missing::Log)
            }
            _ => Ok(()),
        }
    }
}

/// A file beside the database with its number of commits: a database with fewer has lost some. It
/// is written after each commit without an fsync, so that it costs nothing; after a power loss it
/// may be older than the database, which means nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Which database.
    pub(crate) id: String,
    pub(crate) commits: u64,
}

impl Mark {
    /// The mark of the last run, if there is a valid one.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let mut text = String::new();
        file.ok()?
            .take(MARK_BYTES_MAX)
            .read_to_string(&mut text)
            .ok()?;
        let (id, commits) = text.strip_suffix('\n')?.split_once(' ')?;
        Some(Self {
            id: id.to_owned(),
            commits: commits.parse().ok()?,
        })
    }

    fn encode(&self) -> String {
        // All marks have the same length, so that one write replaces the whole mark.
        format!("{} {:020}\n", self.id, self.commits)
    }
}

/// The file that marks are written to.
#[derive(Debug)]
pub(crate) struct MarkFile(Option<File>);

impl MarkFile {
    /// Opens it and replaces what was there. If the disk fails, the database has no mark.
    pub(crate) fn open(path: &Path) -> Self {
        let is_file = fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
        if !is_file {
            let _ = fs::remove_file(path);
        }
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(flags)
            .open(path);
        Self(file.ok())
    }

    pub(crate) fn write(&self, mark: &Mark) {
        if let Some(file) = &self.0
            && let Err(error) = file.write_all_at(mark.encode().as_bytes(), 0)
        {
            tracing::debug!(%error, "cannot write the commit count beside data.db");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mark");
        assert_eq!(Mark::read(&path), None);
        let file = MarkFile::open(&path);
        for commits in [u64::MAX, 0, 7] {
            let id = "00ff".to_owned();
            let mark = Mark { id, commits };
            file.write(&mark);
            assert_eq!(Mark::read(&path), Some(mark));
        }
        for text in ["", "x", "x y\n", "x 1"] {
            fs::write(&path, text).unwrap();
            assert_eq!(Mark::read(&path), None, "{text}");
        }
    }

    #[test]
    fn a_guard_reports_missing_files() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        fs::create_dir(&dir).unwrap();
        let (database, log) = (dir.join(DATABASE), dir.join("data.db-wal"));
        fs::write(&database, "a").unwrap();
        fs::write(&log, "b").unwrap();
        let mut guard = Guard::new(DatabasePath::of(&dir).unwrap()).unwrap();
        guard.note_log();
        assert_eq!(guard.check(), Ok(()));
        let aside = dir.join("aside");
        fs::rename(&log, &aside).unwrap();
        assert_eq!(guard.check(), Err(Missing::Log));
        fs::write(&log, "another").unwrap();
        assert_eq!(guard.check(), Err(Missing::Log));
        fs::rename(&aside, &log).unwrap();
        fs::rename(&database, &aside).unwrap();
        assert_eq!(guard.check(), Err(Missing::Database));
        fs::rename(&aside, &database).unwrap();
        let moved = home.path().join("moved");
        fs::rename(&dir, &moved).unwrap();
        assert_eq!(guard.check(), Err(Missing::Directory));
        fs::create_dir(&dir).unwrap();
        assert_eq!(guard.check(), Err(Missing::Directory));
        fs::remove_dir(&dir).unwrap();
        fs::rename(&moved, &dir).unwrap();
        assert_eq!(guard.check(), Ok(()));
    }

    #[test]
    fn a_link_is_followed_to_its_target() {
        let home = tempfile::tempdir().unwrap();
        let disk = home.path().join("disk");
        fs::create_dir(&disk).unwrap();
        let target = disk.join("lz.db");
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, home.path().join(DATABASE)).unwrap();
        let place = DatabasePath::of(home.path()).unwrap();
        let disk = disk.canonicalize().unwrap();
        assert_eq!(place.database(), disk.join("lz.db"));
        assert_eq!(place.home(), disk);
        assert_eq!(place.backups(), home.path().join(BACKUPS));
        fs::remove_file(&target).unwrap();
        assert!(DatabasePath::of(home.path()).is_err());
    }
}
