//! What an app has accepted of an encrypted pool.

use latzero_protocol::Code;

use crate::error::Error;
use crate::keys::Keys;
use crate::wire::sealed::SealedPool;
use crate::wire::stored::DescriptorFile;

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

/// The encrypted pools in which an app awaits answers to calls that it parked, according to the
/// default [`state_dir`](crate::Builder::state_dir).
#[must_use]
pub fn awaited_in(app_id: &str) -> Vec<String> {
    crate::wire::stored::awaited_in(app_id)
}
