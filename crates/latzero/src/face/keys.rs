//! What an app has accepted of an encrypted pool.

use latzero_protocol::Code;

use crate::error::Error;
use crate::keys::Keys;
use crate::wire::sealed::{DescriptorFile, SealedPool};

impl Keys {
    /// Deletes the accepted state of a pool, so that an older state is accepted once. A person
    /// decides this after a backup was restored on purpose. Returns whether there was any.
    ///
    /// # Errors
    /// `storage` if it cannot be deleted.
    pub fn accept_restore(&self, pool: &str) -> Result<bool, Error> {
        let stored = DescriptorFile::of(&SealedPool::new(pool, self.clone(), None));
        stored
            .map_or(Ok(false), |stored| stored.forget())
            .map_err(|error| {
                let text = format!("what was accepted of pool '{pool}' can't be removed: {error}");
                Error::new(Code::Storage, text).with_source(error)
            })
    }
}
