//! Checks whether the files of persistent blocks still exist under their names.

use std::os::unix::fs::MetadataExt;

use latzero_protocol::{Code, Refusal};

use super::{Blocks, StoredBlock};

impl Blocks {
    /// The file of each persistent block, and whether it still has its name.
    pub(crate) fn places(&self) -> Vec<(String, bool)> {
        let all = self.all();
        let persistent = all.iter().filter(|stored| stored.names.is_some());
        persistent
            .map(|stored| {
                let name = format!("file of block '{}' of pool '{}'", stored.block, stored.pool);
                (name, self.is_in_place(stored))
            })
            .collect()
    }

    /// Refuses to confirm that a block is on disk if the next start would not find its file.
    pub(super) fn check_place(&self, stored: &StoredBlock) -> Result<(), Refusal> {
        if stored.names.is_none() || self.is_in_place(stored) {
            return Ok(());
        }
        let message = format!(
            "the file of block '{}' of pool '{}' was moved or removed while the server is \
             running; its content is still in memory: read it, or put the file back",
            stored.block, stored.pool
        );
        Err(Refusal::new(Code::Storage, message))
    }

    fn is_in_place(&self, stored: &StoredBlock) -> bool {
        let Some(names) = &stored.names else {
            return true;
        };
        // A file that is being created gets its name only when it is complete; a dropped one needs
        // none.
        if !*stored.is_wanted() {
            return true;
        }
        let found = std::fs::symlink_metadata(self.files.path_of(names));
        let known = stored.custodian.identity();
        matches!((found, known), (Ok(found), Ok(known)) if (found.dev(), found.ino()) == known)
    }

    /// Writes the file of a block again if it was removed, so that the next start finds it. Used
    /// when the server stops.
    pub(super) fn put_back(&self, stored: &StoredBlock) -> std::io::Result<()> {
        let Some(names) = &stored.names else {
            return Ok(());
        };
        if self.is_in_place(stored) {
            return Ok(());
        }
        self.files.put_back(names, stored.custodian.file())?;
        tracing::warn!(pool = %stored.pool, block = %stored.block, "the file of a block was \
            missing and was written again");
        Ok(())
    }
}
