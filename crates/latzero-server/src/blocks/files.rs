//! The files of persistent blocks, and the records that say what they are.
//!
//! A block is two files in `memory/`: `ID.GENERATION.lzb` with its bytes, and `ID.json` with its record, which names the
//! generation. A new file is called `….lzb.new` until its record is written: what has no record yet at a start was never
//! acknowledged, and goes; what had one and lost it is set aside under `memory/.orphans/`. Names that users gave never
//! become paths.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use latzero_shm::{CreateError, Custodian, Description};
use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

/// Where files go whose record is gone.
const ORPHANS: &str = ".orphans";

/// Largest record that is read, in bytes.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// What the files of one generation of a block are called.
#[derive(Debug, Clone)]
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

    fn bytes(&self) -> String {
        format!("{}.{}.lzb", self.id, self.generation)
    }

    fn new_bytes(&self) -> String {
        format!("{}.{}.lzb.new", self.id, self.generation)
    }

    fn record(&self) -> String {
        format!("{}.json", self.id)
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.bytes())
    }
}

/// A block that an earlier run left.
pub(super) struct Kept {
    pub(super) names: Names,
    pub(super) record: String,
    pub(super) open: Result<Custodian, String>,
}

/// The directory of persistent blocks.
pub(super) struct Files {
    directory: OwnedFd,
    path: PathBuf,
}

impl Files {
    pub(super) fn open(path: &Path) -> io::Result<Files> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Files {
            directory: rustix::fs::open(path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }

    /// Makes the bytes of a new generation, under the name that says that they have no record yet.
    pub(super) fn create(
        &self,
        description: &Description,
    ) -> Result<(Custodian, Names), CreateError> {
        let names = Names::of(description);
        let custodian =
            Custodian::create_persistent(self.directory.as_fd(), &names.new_bytes(), description);
        match custodian {
            Ok(custodian) => Ok((custodian, names)),
            Err(error) => {
                self.abandon(&names);
                Err(error)
            }
        }
    }

    /// Writes a generation's record and gives the bytes their name: from here on it is there after a restart.
    pub(super) fn keep(&self, names: &Names, record: &str) -> io::Result<()> {
        let new = format!("{}.new", names.record());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut file = File::from(openat(&self.directory, &new, flags, Mode::from(0o600))?);
        file.write_all(record.as_bytes())?;
        file.sync_all()?;
        renameat(&self.directory, &new, &self.directory, names.record())?;
        renameat(
            &self.directory,
            names.new_bytes(),
            &self.directory,
            names.bytes(),
        )?;
        rustix::fs::fsync(&self.directory)?;
        Ok(())
    }

    /// Removes bytes that never had a record.
    pub(super) fn abandon(&self, names: &Names) {
        self.unlink(&names.new_bytes());
        self.unlink(&format!("{}.new", names.record()));
    }

    /// Removes a generation; its record too, unless a newer generation has taken it over.
    pub(super) fn remove(&self, names: &Names, is_superseded: bool) {
        if !is_superseded {
            self.unlink(&names.record());
        }
        self.unlink(&names.bytes());
    }

    fn unlink(&self, name: &str) {
        match unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                let file = self.path.join(name);
                tracing::warn!(file = %file.display(), %error, "a file of a block can't be removed");
            }
        }
    }

    /// What an earlier run left, with what was never finished cleared away.
    pub(super) fn scan(&self) -> Vec<Kept> {
        let mut kept = Vec::new();
        let entries = match std::fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(directory = %self.path.display(), %error, "persistent blocks can't be looked for");
                return kept;
            }
        };
        let names: Vec<OsString> = entries.flatten().map(|entry| entry.file_name()).collect();
        let mut known: Vec<String> = Vec::new();
        for name in &names {
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            match self.read_record(id) {
                Ok((names, record)) => {
                    known.push(names.bytes());
                    // The server ended between the record and the name.
                    let _ = renameat(
                        &self.directory,
                        names.new_bytes(),
                        &self.directory,
                        names.bytes(),
                    );
                    let open = Custodian::open_persistent(self.directory.as_fd(), &names.bytes());
                    kept.push(Kept {
                        open: open.map_err(|error| error.to_string()),
                        names,
                        record,
                    });
                }
                Err(error) => {
                    let file = self.path.join(name);
                    tracing::error!(file = %file.display(), %error, "the record of a persistent block can't be read");
                    self.orphan(name.to_str().unwrap_or_default());
                }
            }
        }
        for name in names.iter().filter_map(|name| name.to_str()) {
            if name.ends_with(".new") {
                self.unlink(name);
            } else if name.ends_with(".lzb") && !known.iter().any(|known| known == name) {
                let id = name.split('.').next().unwrap_or_default();
                if known.iter().any(|known| known.starts_with(id)) {
                    // An older generation, whose successor's record was written just before the end.
                    self.unlink(name);
                } else {
                    tracing::warn!(file = name, "a block without a record is set aside");
                    self.orphan(name);
                }
            }
        }
        kept
    }

    fn read_record(&self, id: &str) -> io::Result<(Names, String)> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = File::from(openat(
            &self.directory,
            format!("{id}.json"),
            flags,
            Mode::empty(),
        )?);
        let mut record = String::new();
        file.take(RECORD_BYTES_MAX).read_to_string(&mut record)?;
        let value: serde_json::Value = serde_json::from_str(&record)?;
        let generation = value["generation"]
            .as_u64()
            .ok_or_else(|| io::Error::other("it names no generation"))?;
        let names = Names {
            id: id.to_owned(),
            generation,
        };
        Ok((names, record))
    }

    /// Puts a block that can't be used where it harms nobody and is not lost.
    pub(super) fn set_aside(&self, names: &Names) {
        self.orphan(&names.bytes());
        self.orphan(&names.record());
    }

    fn orphan(&self, name: &str) {
        let moved = rustix::fs::mkdirat(&self.directory, ORPHANS, Mode::from(0o700));
        let moved = match moved {
            Ok(()) | Err(rustix::io::Errno::EXIST) => renameat(
                &self.directory,
                name,
                &self.directory,
                format!("{ORPHANS}/{name}"),
            ),
            Err(error) => Err(error),
        };
        if let Err(error) = moved
            && error != rustix::io::Errno::NOENT
        {
            tracing::warn!(file = name, %error, "a file can't be set aside");
        }
    }
}
