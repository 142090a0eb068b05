//! The files of persistent blocks, and their records.
//!
//! A block has two files in `memory/`: `ID.GENERATION.lzb` with its bytes, and `ID.json` with its
//! record, which names the generation. Bytes are called `….lzb.new` until they are complete and on
//! disk. Then they are renamed, and only after that the record that names them replaces the
//! previous one. So the record names complete bytes, whenever the server is killed. Names chosen by
//! users never become paths.

mod load;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use latzero_shm::{CreateError, Custodian, Description};
use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

/// Largest record that is read, in bytes.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// The names of the files of one generation of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    id: String,
    generation: u64,
}

impl Names {
    fn of(description: &Description) -> Names {
        let id = description.block_id.iter().map(|b| format!("{b:02x}"));
        Names {
            id: id.collect(),
            generation: description.generation,
        }
    }

    /// What the names of its record and of all its generations begin with.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    fn bytes(&self) -> String {
        format!("{}.{}.lzb", self.id, self.generation)
    }

    fn new_bytes(&self) -> String {
        format!("{}.{}.lzb.new", self.id, self.generation)
    }

    fn record(&self) -> String {
        format!("{}.json", self.id)
    }

    fn gone(&self) -> String {
        format!("{}.gone", self.id)
    }

    fn new_record(&self) -> String {
        format!("{}.json.new", self.id)
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.bytes())
    }
}

/// Reads a file from its start, independent of the position of others that have it open.
struct FromStart {
    bytes: File,
    at: u64,
    length: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.length - self.at).unwrap_or(usize::MAX);
        let n = left.min(buffer.len());
        let read = self.bytes.read_at(&mut buffer[..n], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The directory of persistent blocks.
pub(super) struct Files {
    directory: OwnedFd,
    path: PathBuf,
}

impl Files {
    pub(super) fn open(path: &Path) -> io::Result<Files> {
        // A link to a directory on another disk is followed, because it is in a private directory.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Files {
            directory: rustix::fs::open(path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }

    /// Creates the bytes of a new generation, under a name that marks them as incomplete.
    pub(super) fn create(
        &self,
        description: &Description,
    ) -> Result<(Custodian, Names), CreateError> {
        let names = Names::of(description);
        // An incomplete one belongs to no block.
        self.unlink(&names.new_bytes());
        let custodian =
            Custodian::create_persistent(self.directory.as_fd(), &names.new_bytes(), description);
        match custodian {
            Ok(custodian) => Ok((custodian, names)),
            Err(error) => {
                self.unlink(&names.new_bytes());
                Err(error)
            }
        }
    }

    /// Renames the bytes of a generation, which are on disk, to their final name, and writes its
    /// record beside the active one.
    pub(super) fn prepare(&self, names: &Names, record: &str) -> io::Result<()> {
        renameat(
            &self.directory,
            names.new_bytes(),
            &self.directory,
            names.bytes(),
        )?;
        // Before a record can name them.
        self.sync()?;
        self.write_new_record(names, record)
    }

    /// Activates the prepared record. It survives a restart once [`Files::sync`] has returned.
    pub(super) fn commit(&self, names: &Names) -> io::Result<()> {
        renameat(
            &self.directory,
            names.new_record(),
            &self.directory,
            names.record(),
        )?;
        Ok(())
    }

    /// The active record, if there is one.
    pub(super) fn record(&self, names: &Names) -> io::Result<Option<String>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match openat(&self.directory, names.record(), flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            other => File::from(other?),
        };
        let mut record = String::new();
        file.take(RECORD_BYTES_MAX).read_to_string(&mut record)?;
        Ok(Some(record))
    }

    /// Writes a record beside the active one.
    pub(super) fn write_new_record(&self, names: &Names, record: &str) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let new = openat(
            &self.directory,
            names.new_record(),
            flags,
            Mode::from(0o600),
        )?;
        let mut file = File::from(new);
        file.write_all(record.as_bytes())?;
        file.sync_all()
    }

    /// Removes the active record.
    pub(super) fn remove_record(&self, names: &Names) -> io::Result<()> {
        unlinkat(&self.directory, names.record(), AtFlags::empty())?;
        Ok(())
    }

    /// The path of the bytes of a generation.
    pub(super) fn path_of(&self, names: &Names) -> PathBuf {
        self.path.join(names.bytes())
    }

    /// Writes the bytes of an open file under their name, which was removed. The next start
    /// recreates the record from the database.
    pub(super) fn put_back(&self, names: &Names, bytes: &OwnedFd) -> io::Result<()> {
        let flags = OFlags::WRONLY
            | OFlags::CREATE
            | OFlags::TRUNC
            | OFlags::CLOEXEC
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK;
        let mode = Mode::from(0o600);
        let mut new = File::from(openat(&self.directory, names.new_bytes(), flags, mode)?);
        let bytes = File::from(bytes.try_clone()?);
        let length = bytes.metadata()?.len();
        io::copy(
            &mut FromStart {
                bytes,
                at: 0,
                length,
            },
            &mut new,
        )?;
        new.sync_all()?;
        let directory = &self.directory;
        renameat(directory, names.new_bytes(), directory, names.bytes())?;
        self.sync()
    }

    /// Flushes every created or removed name to disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        rustix::fs::fsync(&self.directory)?;
        Ok(())
    }

    /// Removes a generation that no record names.
    pub(super) fn abandon(&self, names: &Names) {
        self.unlink(&names.new_record());
        self.unlink(&names.new_bytes());
        self.unlink(&names.bytes());
    }

    /// Removes a generation, and its record unless a newer generation has taken it over. For a
    /// block that was removed, a mark stays until its row is deleted from the database too: see
    /// [`Files::forget`].
    pub(super) fn remove(&self, names: &Names, is_superseded: bool) {
        if !is_superseded {
            let directory = &self.directory;
            if renameat(directory, names.record(), directory, names.gone()).is_err() {
                self.unlink(&names.record());
            }
        }
        self.unlink(&names.bytes());
    }

    /// Removes the mark of a block that was removed, by its id.
    pub(super) fn forget(&self, id: &str) {
        self.unlink(&format!("{id}.gone"));
    }

    fn unlink(&self, name: &str) {
        match unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                let file = self.path.join(name);
                let file = file.display();
                tracing::warn!(%file, %error, "cannot remove a file of a block");
            }
        }
    }
}
