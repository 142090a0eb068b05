//! Copies persistent blocks to a backup, each in one version.

use super::*;

/// How many bytes of a block a backup may hold in memory, to read them at once.
const WHOLE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// How many times a backup reads a block again that is written in the meantime.
const BACKUP_TRIES: u32 = 100;

impl Blocks {
    /// Adds the bytes of every persistent block to a backup, each of one version.
    pub(crate) fn back_up(
        &self,
        writer: &mut latzero_store::BackupWriter<'_>,
    ) -> Result<(), latzero_store::BackupError> {
        // While a block moves, two generations of it exist.
        let mut added = std::collections::HashSet::new();
        for stored in self.all() {
            let Some(names) = stored
                .names
                .as_ref()
                .filter(|_| stored.kind == Kind::Persistent)
            else {
                continue;
            };
            if added.contains(&(stored.pool.clone(), stored.block.clone())) {
                continue;
            }
            let Ok(Some(record)) = self.files.record(names) else {
                // Removed, or being created.
                continue;
            };
            let description = stored.custodian.description();
            let head = |version| latzero_store::BlockHead {
                pool: stored.pool.as_str().into(),
                block_id: stored.block.as_str().into(),
                generation: description.generation,
                version,
                size: description.geometry.size,
                slots: description.geometry.slots,
                description: record.clone().into_bytes(),
            };
            let is_added = match stored.custodian.hold() {
                Ok(Some(held)) => {
                    let left = description.geometry.size;
                    writer.add_block(&head(held.version()), &mut Holding { held, at: 0, left })?;
                    true
                }
                Ok(None) => false,
                Err(error) => {
                    tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a block \
                        is missing from the backup, because it cannot be flushed");
                    continue;
                }
            };
            if is_added {
                added.insert((stored.pool.clone(), stored.block.clone()));
                continue;
            }
            for left in (0..BACKUP_TRIES).rev() {
                // Read at once if it fits, so that a writer is unlikely to interfere.
                let size = description.geometry.size;
                let mut whole = match usize::try_from(size) {
                    Ok(bytes) if size <= WHOLE_BYTES_MAX => Some(vec![0; bytes]),
                    _ => None,
                };
                let version = match &mut whole {
                    Some(whole) => stored.custodian.read(0, whole, None),
                    None => stored.custodian.version().map_err(Into::into),
                };
                let version = match version {
                    Ok(version) => version,
                    Err(latzero_shm::ReadError::Contended) if left > 0 => continue,
                    Err(error) => {
                        tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a \
                            block is missing from the backup, because it cannot be read");
                        break;
                    }
                };
                let mut by_piece = OneVersion {
                    custodian: &stored.custodian,
                    version,
                    at: 0,
                };
                let added_block = match &whole {
                    Some(whole) => writer.add_block(&head(version), &mut &whole[..]),
                    None => writer.add_block(&head(version), &mut by_piece),
                };
                match added_block {
                    Ok(()) => {
                        added.insert((stored.pool.clone(), stored.block.clone()));
                        break;
                    }
                    // It was written in the meantime: try again with the new version.
                    Err(_) if left > 0 && stored.custodian.version().ok() != Some(version) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// A reader of the bytes of a version that is held.
struct Holding<'a> {
    held: latzero_shm::ReadGuard<'a>,
    at: u64,
    left: u64,
}

impl std::io::Read for Holding<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = usize::try_from(self.left).unwrap_or(usize::MAX);
        let n = n.min(buffer.len());
        self.held
            .read(self.at, &mut buffer[..n])
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A reader of the bytes of one version of a block; it fails once there is a newer one.
struct OneVersion<'a> {
    custodian: &'a Custodian,
    version: u64,
    at: u64,
}

impl std::io::Read for OneVersion<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.custodian.description().geometry.size - self.at;
        let n = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if n == 0 {
            return Ok(0);
        }
        self.custodian
            .read(self.at, &mut buffer[..n], Some(self.version))
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.at += n as u64;
        Ok(n)
    }
}
