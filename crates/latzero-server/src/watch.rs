//! Checks that the data directory and its files are still in place, and recreates what can be
//! recreated.
//!
//! The kernel keeps an open file alive after it was renamed or removed. Without this check, a
//! server whose directory was removed or moved would continue as if nothing had happened, and lose
//! everything at its end.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::losses::{Loss, LossList, Part};
use crate::shared::ServerState;
use crate::startup::data_dir::SUBDIRECTORIES;
use crate::startup::lock::InstanceLock;
use crate::startup::token::TOKEN_NAME;

/// How often to check.
const EVERY: Duration = Duration::from_secs(1);

/// How many checks are made between two of the files of blocks, of which there may be thousands.
const LOOKS_PER_BLOCKS: u32 = 4;

/// How many checks in a row something must be missing before it is recreated, because removing a
/// whole directory takes a moment.
const LOOKS_BEFORE_MAKING: u32 = 3;

/// What may be missing in an existing directory.
const LOCK: &str = "lock of the data directory";
const MEMORY: &str = "directory memory";

/// A thread that checks until this is dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to check the directory of `shared`, whose lock is `lock`.
    ///
    /// # Errors
    /// If the thread cannot be started, or the directory is already missing.
    pub(crate) fn begin(
        shared: &Arc<ServerState>,
        lock: &Arc<Mutex<InstanceLock>>,
    ) -> std::io::Result<Watch> {
        let mut looks = Looks {
            data_dir: PathBuf::from(&shared.config.identity.data_dir),
            identity: identity(Path::new(&shared.config.identity.data_dir))?,
            shared: Arc::clone(shared),
            lock: Arc::clone(lock),
            count: 0,
            incomplete: 0,
        };
        let (stop, stopped) = channel();
        let thread = std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                    looks.check();
                }
            })?;
        Ok(Watch {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported where it happened.
            let _ = thread.join();
        }
    }
}

struct Looks {
    data_dir: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    shared: Arc<ServerState>,
    lock: Arc<Mutex<InstanceLock>>,
    count: u32,
    /// For how many checks something in the directory has been missing.
    incomplete: u32,
}

impl Looks {
    fn check(&mut self) {
        let lock = Arc::clone(&self.lock);
        let mut lock = lock
            .lock()
            .expect("no thread panics while holding this lock");
        lock.answer();
        let name = format!("data directory {}", self.data_dir.display());
        let is_here = identity(&self.data_dir).is_ok_and(|found| found == self.identity);
        if is_here {
            self.losses().settle(Part::Store, &name);
            self.check_contents(&mut lock);
        } else {
            self.incomplete = 0;
            self.losses().note(
                Loss::new(
                    Part::Store,
                    &name,
                    "it was moved or removed while the server is running, and nothing is being \
                     stored",
                    "move it back, or stop the server and start it where the directory is now",
                )
                .passing(),
            );
        }
        let store = self.shared.storage.persistence.store();
        store.check_files();
        self.note_or_settle(
            Part::Store,
            "files of data.db",
            store.status().misplaced,
            "see the log for why they cannot be recreated",
        );
        self.count = self.count.wrapping_add(1);
        if self.count.is_multiple_of(LOOKS_PER_BLOCKS) {
            self.check_block_files(is_here);
        }
        self.shared.storage.persistence.store_losses();
    }

    /// Checks the contents of a directory that still has its path.
    fn check_contents(&mut self, lock: &mut InstanceLock) {
        let names = SUBDIRECTORIES.into_iter().chain([TOKEN_NAME]);
        let is_complete = lock.is_in(&self.data_dir)
            && names
                .map(|name| self.data_dir.join(name))
                .all(|path| fs::symlink_metadata(path).is_ok());
        if is_complete {
            self.incomplete = 0;
            self.losses().settle(Part::Store, LOCK);
            self.losses().settle(Part::Memory, MEMORY);
            return;
        }
        self.incomplete += 1;
        if self.incomplete < LOOKS_BEFORE_MAKING {
            return;
        }
        if !lock.is_in(&self.data_dir) {
            let renewed = lock.renew(&self.data_dir, &self.shared.config.identity.addresses);
            let missing = (!renewed).then_some("its file was removed and cannot be recreated");
            self.note_or_settle(
                Part::Store,
                LOCK,
                missing,
                "stop the other server that uses the directory",
            );
        }
        for name in SUBDIRECTORIES {
            let path = self.data_dir.join(name);
            if fs::symlink_metadata(&path).is_ok() {
                continue;
            }
            if name == "memory" {
                // Blocks are created through a descriptor of their directory, which a new directory
                // does not have.
                self.losses().note(Loss::new(
                    Part::Memory,
                    MEMORY,
                    "it was moved or removed while the server is running; persistent blocks \
                     cannot be created or flushed",
                    "move it back, or save blocks with `latzero block dump` and restart the server",
                ).passing());
            } else {
                let made = fs::DirBuilder::new().mode(0o700).create(&path);
                tracing::warn!(directory = %path.display(), ?made, "a directory was removed; \
                    recreating it");
            }
        }
        if fs::symlink_metadata(self.data_dir.join(TOKEN_NAME)).is_err() {
            match self.shared.access.token.write(&self.data_dir) {
                Ok(()) => tracing::warn!("{TOKEN_NAME} was removed; recreating it"),
                Err(error) => tracing::warn!(%error, "{TOKEN_NAME} was removed"),
            }
        }
    }

    fn check_block_files(&self, is_here: bool) {
        for (name, is_in_place) in self.shared.storage.blocks.places() {
            let missing = (!is_in_place).then_some(match is_here {
                true => {
                    "its file was moved or removed while the server is running; it cannot be \
                    flushed"
                }
                false => "its file was removed with the data directory",
            });
            let remedy = "its content is still in memory: save it with `latzero block dump`, or \
                stop the server, which writes it to a new file";
            self.note_or_settle(Part::Memory, &name, missing, remedy);
        }
    }

    fn note_or_settle(&self, part: Part, affected: &str, missing: Option<&str>, remedy: &str) {
        match missing {
            Some(happened) => self
                .losses()
                .note(Loss::new(part, affected, happened, remedy).passing()),
            None => self.losses().settle(part, affected),
        }
    }

    fn losses(&self) -> &LossList {
        self.shared.storage.persistence.losses()
    }
}

fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
    let found = fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}
