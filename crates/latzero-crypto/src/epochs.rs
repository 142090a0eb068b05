//! The epochs of a pool that a member knows: the one accepted last, and earlier ones.

use std::collections::VecDeque;

use crate::block::{BlockId, ChunkKey};
use crate::descriptor::{Descriptor, DescriptorError};
use crate::envelope::Kind;
use crate::keys::PoolKey;
use crate::sign::PublicKey;
use crate::xaes::Xaes;

/// Of how many epochs a member stores the keys. Older content needs their descriptors again.
pub const EPOCHS_MAX: usize = 256;

/// How long messages of the previous epoch are accepted after a rotation.
pub const GRACE_MS: u64 = 30_000;

/// One epoch.
pub struct Epoch {
    descriptor: Descriptor,
    key: PoolKey,
    event_key: Xaes,
}

impl Epoch {
    fn new(descriptor: Descriptor, key: PoolKey) -> Self {
        Epoch {
            event_key: key.event_key(),
            descriptor,
            key,
        }
    }

    /// Its descriptor.
    #[must_use]
    pub fn descriptor(&self) -> &Descriptor {
        &self.descriptor
    }

    /// Seals and opens its events.
    #[must_use]
    pub fn event_key(&self) -> &Xaes {
        &self.event_key
    }
}

/// The epochs of one pool, for a member that reads.
pub struct Epochs {
    /// The newest first.
    known: VecDeque<Epoch>,
    accepted_ms: u64,
}

impl Epochs {
    /// Starts with an accepted descriptor and its pool key.
    #[must_use]
    pub fn new(descriptor: Descriptor, key: PoolKey, now_ms: u64) -> Self {
        Epochs {
            known: VecDeque::from([Epoch::new(descriptor, key)]),
            accepted_ms: now_ms,
        }
    }

    /// The current epoch.
    #[must_use]
    pub fn current(&self) -> &Epoch {
        &self.known[0]
    }

    /// Advances to an accepted epoch. Epochs between it and the current one are unknown and count
    /// as a change of membership.
    pub fn advance(&mut self, descriptor: Descriptor, key: PoolKey, now_ms: u64) {
        if descriptor.epoch() <= self.current().descriptor.epoch() {
            return;
        }
        self.known.push_front(Epoch::new(descriptor, key));
        self.known.truncate(EPOCHS_MAX);
        self.accepted_ms = now_ms;
    }

    /// Adds the epoch before the oldest known one, for old content. Returns `false` if the history
    /// was cut there, or if [`EPOCHS_MAX`] are known.
    ///
    /// # Errors
    /// If the oldest known descriptor does not refer to this one.
    pub fn add_older(&mut self, descriptor: Descriptor) -> Result<bool, DescriptorError> {
        let oldest = &self.known[self.known.len() - 1];
        let Some(key) = oldest.descriptor.open_previous(&oldest.key, &descriptor)? else {
            return Ok(false);
        };
        if self.known.len() == EPOCHS_MAX {
            return Ok(false);
        }
        self.known.push_back(Epoch::new(descriptor, key));
        Ok(true)
    }

    /// An epoch by its number.
    #[must_use]
    pub fn find(&self, epoch: u32) -> Option<&Epoch> {
        self.known
            .iter()
            .find(|known| known.descriptor.epoch() == epoch)
    }

    /// The epoch of a message, if its messages are still accepted.
    #[must_use]
    pub fn of_message(&self, epoch: u32, kind: Kind, now_ms: u64) -> Option<&Epoch> {
        let current = &self.current().descriptor;
        if epoch == current.epoch() {
            return Some(self.current());
        }
        if epoch < current.min_content_epoch() {
            return None;
        }
        // Goes back from the current epoch while there is no gap and no removal of members.
        let mut expected = current.epoch();
        let mut found = None;
        for known in &self.known {
            let descriptor = &known.descriptor;
            let same_members = descriptor.keys().join == current.keys().join
                && descriptor.keys().read == current.keys().read;
            if descriptor.epoch() != expected || !same_members {
                return None;
            }
            if expected == epoch {
                found = Some(known);
                break;
            }
            expected = expected.checked_sub(1)?;
        }
        let just_before = epoch.checked_add(1) == Some(current.epoch());
        let in_grace = just_before && now_ms.saturating_sub(self.accepted_ms) <= GRACE_MS;
        found.filter(|_| kind.is_deferred() || in_grace)
    }

    /// The key that signed content in an epoch.
    #[must_use]
    pub fn seal_of(&self, epoch: u32) -> Option<PublicKey> {
        self.find(epoch).map(|known| known.descriptor.keys().seal)
    }

    /// The key of a block's chunks in an epoch.
    #[must_use]
    pub fn chunk_key(&self, id: &BlockId<'_>, epoch: u32) -> Option<ChunkKey> {
        self.find(epoch)
            .map(|known| ChunkKey::new(&known.key, id, epoch))
    }
}
