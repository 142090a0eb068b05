//! Restores persistent blocks from a backup: creates them beside the existing ones, and replaces
//! those once all are complete.
//!
//! Until [`Restoring::commit`] nothing existing changes. Blocks that are replaced are moved to
//! `.orphans/`, never deleted.

use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

use latzero_fabric::pool::Found;
use latzero_protocol::{BlockId, PoolName};
use latzero_shm::{Custodian, Description, Geometry};
use latzero_store::BlockHead;
use serde_json::Value;

use super::files::{Files, Names};
use super::{FENCE_KEPT_MAX, pool_id, unix_ns};

/// Blocks being restored from a backup. Dropping this deletes those that are not committed.
pub(crate) struct Restoring {
    files: Files,
    present: Vec<Present>,
    made: Vec<Made>,
}

/// An existing block.
struct Present {
    pool: PoolName,
    block: BlockId,
    names: Names,
    generation: u64,
    version: u64,
    fence: u64,
}

/// A block that is complete but does not have its name yet.
struct Made {
    pool: PoolName,
    block: BlockId,
    names: Names,
    record: String,
}

impl Restoring {
    /// Looks at the blocks in `directory`, which no server may be using, as a start does. What was
    /// written since the machine started is flushed: to the start that follows, the database is of
    /// another run of the machine, and then what was not flushed counts for nothing.
    ///
    /// # Errors
    /// If the directory can't be opened.
    pub(crate) fn begin(directory: &Path) -> io::Result<Restoring> {
        let files = Files::open(directory)?;
        let booted = booted();
        let present = files.scan().into_iter().filter_map(|kept| {
            if let Ok(custodian) = &kept.open
                && is_written_since(&directory.join(kept.names.to_string()), booted)
                && let Err(error) = custodian.sync()
            {
                tracing::warn!(file = %kept.names, %error, "cannot flush a block");
            }
            let record = &kept.record;
            let (pool, block) = Found { record, fence: 0 }.name().ok()?;
            let record: Value = serde_json::from_str(record).ok()?;
            let lease = kept.open.as_ref().ok().map(Custodian::lease);
            let version = kept.open.as_ref().ok().map(Custodian::version);
            Some(Present {
                pool,
                block,
                generation: record["generation"].as_u64().unwrap_or(0),
                version: version.and_then(Result::ok).unwrap_or(0),
                fence: lease.and_then(Result::ok).unwrap_or(0),
                names: kept.names,
            })
        });
        Ok(Restoring {
            present: present.collect(),
            made: Vec::new(),
            files,
        })
    }

    /// Creates a block from a backup, under a name that a start ignores.
    ///
    /// # Errors
    /// If the backup's record of it is invalid, its bytes can't be read, or the disk has no
    /// room.
    pub(crate) fn put(&mut self, head: &BlockHead, bytes: &mut dyn Read) -> io::Result<()> {
        let senseless = |why: String| {
            let text = format!("block '{}' of pool '{}': {why}", head.block_id, head.pool);
            io::Error::new(io::ErrorKind::InvalidData, text)
        };
        let record =
            std::str::from_utf8(&head.description).map_err(|error| senseless(error.to_string()))?;
        let name = Found { record, fence: 0 }.name();
        let (pool, block) = name.map_err(|error| senseless(error.to_string()))?;
        let mut record: Value = serde_json::from_str(record)?;
        let before = || {
            let present = self.present.iter();
            present.filter(|present| present.pool == pool && present.block == block)
        };
        // Clients that still map the former block must not mistake this one for it.
        let generation = before()
            .map(|present| present.generation)
            .fold(head.generation, u64::max)
            + 1;
        // Clients that wait for a newer version are notified of this one.
        let version = before()
            .map(|present| present.version + 1)
            .fold(head.version, u64::max);
        let fence = before().map(|present| present.fence).max().unwrap_or(0);
        record["generation"] = generation.into();
        record["spares"] = latzero_shm::SPARES.into();
        let geometry = Geometry::with_spares(head.size, head.slots)
            .map_err(|error| senseless(error.to_string()))?;
        let description = Description {
            block_id: crate::random::bytes(),
            pool_id: pool_id(&pool),
            generation,
            geometry,
            is_persistent: true,
            created_unix_ns: unix_ns(),
        };
        let created = self.files.create(&description);
        let (custodian, names) =
            created.map_err(|error| io::Error::other(senseless(error.to_string())))?;
        // From here on it is deleted if the restore is not committed.
        self.made.push(Made {
            pool,
            block,
            names,
            record: record.to_string(),
        });
        custodian.fill(bytes, version)?;
        custodian
            .set_lease(fence.min(FENCE_KEPT_MAX), false)
            .and_then(|()| custodian.sync())
            .map_err(|error| senseless(error.to_string()))?;
        Ok(())
    }

    /// Moves every created block into place. Returns how many others were moved aside for them.
    ///
    /// # Errors
    /// The first failure. The blocks before it are restored, and the others are unchanged.
    pub(crate) fn commit(mut self) -> io::Result<usize> {
        let mut set_aside = 0;
        while let Some(made) = self.made.last() {
            let failed = |error: io::Error| {
                let (block, pool) = (&made.block, &made.pool);
                io::Error::new(
                    error.kind(),
                    format!("block '{block}' of pool '{pool}': {error}"),
                )
            };
            let committed = self.files.prepare(&made.names, &made.record);
            committed
                .and_then(|()| self.files.commit(&made.names))
                .map_err(failed)?;
            // After that, because a start uses the newer of two blocks with the same name.
            let is_same =
                |present: &Present| present.pool == made.pool && present.block == made.block;
            for present in self.present.iter().filter(|present| is_same(present)) {
                self.files.set_aside(&present.names);
                set_aside += 1;
            }
            self.made.pop();
        }
        self.files.sync()?;
        Ok(set_aside)
    }
}

impl Drop for Restoring {
    fn drop(&mut self) {
        for made in &self.made {
            self.files.abandon(&made.names);
        }
    }
}

/// When the machine was booted; none if the kernel does not report it (proc_uptime(5)).
fn booted() -> Option<SystemTime> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    SystemTime::now().checked_sub(Duration::try_from_secs_f64(seconds).ok()?)
}

/// A version that was written before that may have been torn by a power loss, which a checksum
/// computed now would hide.
fn is_written_since(file: &Path, booted: Option<SystemTime>) -> bool {
    let modified = std::fs::metadata(file).and_then(|file| file.modified());
    booted.is_some_and(|booted| modified.is_ok_and(|modified| modified > booted))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn head(generation: u64, version: u64, slots: u32, size: u64) -> BlockHead {
        let record = json!({
            "pool": "p", "block_id": "b", "size": size, "slots": slots, "generation": generation,
            "owner": "a", "permissions": {"read": ["*"], "write": ["*"]},
        });
        BlockHead {
            pool: "p".into(),
            block_id: "b".into(),
            generation,
            version,
            size,
            slots,
            description: record.to_string().into_bytes(),
        }
    }

    fn restore(directory: &TempDir, head: &BlockHead, bytes: &[u8]) -> usize {
        let mut restoring = Restoring::begin(directory.path()).unwrap();
        restoring.put(head, &mut &bytes[..]).unwrap();
        restoring.commit().unwrap()
    }

    /// The block that a start finds: generation, version, fence, bytes.
    fn found(directory: &TempDir) -> (u64, u64, u64, Vec<u8>) {
        let mut kept = Files::open(directory.path()).unwrap().scan();
        assert_eq!(kept.len(), 1);
        let custodian = kept.remove(0).open.unwrap();
        let description = custodian.description();
        let mut bytes = vec![0; usize::try_from(description.geometry.size).unwrap()];
        let version = custodian.read(0, &mut bytes, None).unwrap();
        (
            description.generation,
            version,
            custodian.lease().unwrap(),
            bytes,
        )
    }

    #[test]
    fn a_block_replaces_an_existing_one() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(restore(&directory, &head(3, 7, 2, 5), b"first"), 0);
        assert_eq!(found(&directory), (4, 7, 0, b"first".to_vec()));
        let files = Files::open(directory.path()).unwrap();
        let kept = files.scan().remove(0);
        kept.open.unwrap().set_lease(9, false).unwrap();
        assert_eq!(restore(&directory, &head(1, 2, 2, 5), b"older"), 1);
        // Generations, versions and fences only grow.
        assert_eq!(found(&directory), (5, 8, 9, b"older".to_vec()));
        assert_eq!(files.orphans().0, 2);
    }

    #[test]
    fn unflushed_changes_count_too() {
        let directory = tempfile::tempdir().unwrap();
        restore(&directory, &head(1, 1, 2, 5), b"first");
        let open = || {
            let kept = Files::open(directory.path()).unwrap().scan().remove(0);
            kept.open.unwrap()
        };
        assert_eq!(open().write(0, b"later", None).unwrap(), 2);
        drop(Restoring::begin(directory.path()).unwrap());
        assert_eq!(open().recover().unwrap(), 2);
        // What the machine may have lost stays as it is.
        let bytes = std::fs::read_dir(directory.path()).unwrap();
        let mut bytes = bytes.map(|entry| entry.unwrap().path());
        let file = bytes.find(|path| path.extension().is_some_and(|e| e == "lzb"));
        assert_eq!(open().write(0, b"newer", None).unwrap(), 3);
        let file = std::fs::File::options().write(true).open(file.unwrap());
        file.unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        drop(Restoring::begin(directory.path()).unwrap());
        assert_eq!(open().recover().unwrap(), 2);
    }

    #[test]
    fn an_uncommitted_restore_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        restore(&directory, &head(1, 1, 2, 5), b"first");
        let names = || {
            let entries = std::fs::read_dir(directory.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = names();
        let mut restoring = Restoring::begin(directory.path()).unwrap();
        restoring
            .put(&head(2, 5, 2, 5), &mut &b"other"[..])
            .unwrap();
        assert!(restoring.put(&head(2, 5, 2, 5), &mut &b"shor"[..]).is_err());
        drop(restoring);
        assert_eq!(names(), before);
        assert_eq!(found(&directory).3, b"first");
    }

    #[test]
    fn a_block_written_in_place_is_restored_without_a_version() {
        let directory = tempfile::tempdir().unwrap();
        restore(&directory, &head(1, 0, 1, 5), b"bytes");
        assert_eq!(found(&directory).3, b"bytes");
        restore(&directory, &head(1, 0, 2, 5), &[0; 5]);
        assert_eq!((found(&directory).1, found(&directory).3), (1, vec![0; 5]));
    }
}
