//! The descriptor of a pool: public, signed by its owner, one for each epoch and never changed.
//!
//! The server stores descriptors and knows nothing else about keys. A client accepts one only after
//! [`Descriptor::accept`], because the server may have forged any part.

use subtle::ConstantTimeEq as _;

use crate::bytes::{Bytes, Cursor};
use crate::keys::{EpochId, KeyError, KeySet, Kind, Pin, PoolKey, Roles, pin_of};
use crate::sign::{PublicKey, SignatureBytes, SigningKey};
use crate::xaes::Nonce;
use crate::{NAME_BYTES_MAX, Suite, hash, is_name};

const MAGIC: &[u8; 4] = b"LZPD";
const VERSION: u16 = 1;
/// The part that the wraps are bound to: everything before them.
const BOUND_BYTES: usize = 296;
const WRAP_BYTES: usize = 48;
const SIGNATURES_BYTES: usize = 128;
/// The largest descriptor.
pub const BYTES_MAX: usize =
    BOUND_BYTES + 2 * (24 + WRAP_BYTES) + 2 + NAME_BYTES_MAX + SIGNATURES_BYTES;

/// Why a descriptor is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DescriptorError {
    /// It does not verify: `integrity`.
    #[error("the pool's descriptor does not verify: {0}")]
    Invalid(&'static str),
    /// The tokens name another owner, and no known descriptor leads from that one to this one's:
    /// `integrity`, if the server has no earlier descriptors.
    #[error("the pool's descriptor does not verify: its owner is not the one that the tokens name")]
    OtherOwner,
    /// A descriptor between the stored one and this one is needed: `integrity`, if the server did
    /// not return it on request.
    #[error("the pool's descriptor does not verify: the descriptor of epoch {0} is missing")]
    Missing(u32),
    /// Another version or suite: `downgrade`.
    #[error(
        "the pool's descriptor has another {0} than this program knows; upgrade the older side"
    )]
    Downgrade(&'static str),
    /// The server reports less protection than requested: `downgrade`.
    #[error("the server answers {0}; do not use the pool, and find out why")]
    Unprotected(&'static str),
    /// Older than the one accepted before, or another pool with the same name: `rollback`.
    #[error("the pool's descriptor {0} than the one accepted before; find out who restored it")]
    Rollback(&'static str),
    /// Two descriptors of one epoch: `fork`.
    #[error("the pool has two descriptors of epoch {0}; find out who made the second")]
    Fork(u32),
}

use DescriptorError::{Downgrade, Fork, Invalid, Missing, OtherOwner, Rollback, Unprotected};

/// The public keys of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKeys {
    /// Signs descriptors.
    pub owner: PublicKey,
    /// Proves the role join.
    pub join: PublicKey,
    /// Proves the role read.
    pub read: PublicKey,
    /// Proves the role write.
    pub write: PublicKey,
    /// Signs content.
    pub seal: PublicKey,
}

/// A descriptor with a valid layout; [`Descriptor::accept`] decides whether it can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    bytes: Vec<u8>,
    suite: Suite,
    id: EpochId,
    min_content_epoch: u32,
    created_ms: u64,
    keys: PublicKeys,
    check_value: [u8; 32],
    prev_hash: [u8; 32],
    name: String,
}

/// What the server stated about the pool before the proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected<'a> {
    /// The requested name.
    pub name: &'a str,
    /// The challenge's pool id.
    pub pool_id: [u8; 16],
    /// The challenge's epoch.
    pub epoch: u32,
    /// The challenge's suite.
    pub suite: u16,
}

impl Descriptor {
    /// Parses a descriptor; no bytes may be left over.
    ///
    /// # Errors
    /// If the layout is wrong, or version or suite are unknown.
    pub fn parse(bytes: &[u8]) -> Result<Self, DescriptorError> {
        const CUT: DescriptorError = Invalid("it is cut off");
        let mut cursor = Cursor::new(bytes);
        if cursor.take(4) != Some(MAGIC) {
            return Err(Invalid("it does not begin like one"));
        }
        if cursor.u16().ok_or(CUT)? != VERSION {
            return Err(Downgrade("version"));
        }
        let suite = Suite::from_number(cursor.u16().ok_or(CUT)?).ok_or(Downgrade("suite"))?;
        Self::fields(bytes, cursor, suite).ok_or(CUT)?
    }

    /// The fields after the suite; `None` if bytes are missing.
    fn fields(
        bytes: &[u8],
        mut cursor: Cursor<'_>,
        suite: Suite,
    ) -> Option<Result<Self, DescriptorError>> {
        let pool_id = cursor.array()?;
        let (epoch, min_content_epoch) = (cursor.u32()?, cursor.u32()?);
        let created_ms = cursor.u64()?;
        let salt = cursor.array()?;
        let mut keys = [None; 5];
        for key in &mut keys {
            *key = PublicKey::parse(&cursor.array()?);
        }
        let (check_value, prev_hash) = (cursor.array()?, cursor.array()?);
        let _wrap = cursor.take(24 + WRAP_BYTES)?;
        let previous = cursor.take(24 + WRAP_BYTES)?;
        let name_bytes = usize::from(cursor.u16()?);
        let name = std::str::from_utf8(cursor.take(name_bytes)?);
        let (_sig_owner, sig_prev) = (cursor.take(64)?, cursor.take(64)?);
        if cursor.left() != 0 {
            return Some(Err(Invalid("bytes follow its end")));
        }
        let Some(name) = name.ok().filter(|name| is_name(name)) else {
            return Some(Err(Invalid("its name is not one")));
        };
        if epoch == 0 || min_content_epoch > epoch {
            return Some(Err(Invalid("its epochs are out of order")));
        }
        let [Some(owner), Some(join), Some(read), Some(write), Some(seal)] = keys else {
            return Some(Err(Invalid("one of its public keys is not acceptable")));
        };
        let nothing_before = is_zero(&prev_hash) && is_zero(previous) && is_zero(sig_prev);
        if epoch == 1 && !nothing_before {
            return Some(Err(Invalid("its first epoch names one before")));
        }
        Some(Ok(Descriptor {
            bytes: bytes.to_vec(),
            suite,
            id: EpochId {
                pool_id,
                epoch,
                salt,
            },
            min_content_epoch,
            created_ms,
            keys: PublicKeys {
                owner,
                join,
                read,
                write,
                seal,
            },
            check_value,
            prev_hash,
            name: name.to_owned(),
        }))
    }

    /// The descriptor's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How the pool is protected.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The pool's id.
    #[must_use]
    pub fn pool_id(&self) -> [u8; 16] {
        self.id.pool_id
    }

    /// The epoch, from 1.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.id.epoch
    }

    /// The epoch's identity, from which keys are derived.
    #[must_use]
    pub fn epoch_id(&self) -> &EpochId {
        &self.id
    }

    /// The oldest epoch whose content is still accepted; 0 accepts all epochs.
    #[must_use]
    pub fn min_content_epoch(&self) -> u32 {
        self.min_content_epoch
    }

    /// When it was created, in Unix milliseconds.
    #[must_use]
    pub fn created_ms(&self) -> u64 {
        self.created_ms
    }

    /// The epoch's public keys.
    #[must_use]
    pub fn keys(&self) -> &PublicKeys {
        &self.keys
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hash by which the next descriptor refers to this one.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        hash(&Bytes::new().raw(&self.bytes))
    }

    /// The hash of the previous descriptor; zero in epoch 1.
    #[must_use]
    pub fn prev_hash(&self) -> [u8; 32] {
        self.prev_hash
    }

    /// The pin of its owner.
    #[must_use]
    pub fn pin(&self) -> Pin {
        pin_of(&self.keys.owner)
    }

    fn signature(&self, from_end: usize) -> SignatureBytes {
        let at = self.bytes.len() - from_end;
        self.bytes[at..at + 64]
            .try_into()
            .expect("the layout was checked")
    }

    /// Whether it is signed by the owner that it names.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.keys
            .owner
            .verify(&self.message(), &self.signature(128))
    }

    /// Whether it is signed by the owner that it names and by the owner of `previous`.
    #[must_use]
    pub fn is_signed_after(&self, previous: &Descriptor) -> bool {
        let owner = &previous.keys.owner;
        self.is_signed() && owner.verify(&self.message(), &self.signature(64))
    }

    fn message(&self) -> Vec<u8> {
        signed_message(&self.bytes[..self.bytes.len() - SIGNATURES_BYTES])
    }

    /// Whether this descriptor succeeds `previous`, signatures included.
    #[must_use]
    pub fn succeeds(&self, previous: &Descriptor) -> bool {
        self.follows(previous) && self.is_signed_after(previous)
    }

    /// As above, without checking signatures.
    fn follows(&self, previous: &Descriptor) -> bool {
        previous.epoch().checked_add(1) == Some(self.epoch())
            && self.prev_hash == previous.hash()
            && self.pool_id() == previous.pool_id()
            && self.name == previous.name
            && self.suite == previous.suite
            && self.min_content_epoch >= previous.min_content_epoch
    }

    /// Decides whether a client with `keys` accepts this descriptor, and returns the epoch's pool
    /// key if the client may read.
    ///
    /// `chain` has earlier descriptors in ascending order, as the server sent them; `stored` is the
    /// newest one accepted before. On success the caller stores this descriptor instead.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn accept(
        &self,
        keys: &KeySet,
        expected: &Expected<'_>,
        chain: &[Descriptor],
        stored: Option<&Descriptor>,
    ) -> Result<Option<PoolKey>, DescriptorError> {
        if self.name != expected.name {
            return Err(Invalid("it belongs to a pool of another name"));
        }
        if (self.pool_id(), self.epoch(), self.suite.number())
            != (expected.pool_id, expected.epoch, expected.suite)
        {
            return Err(Invalid("it is not the one of the server's challenge"));
        }
        if !self.is_signed() {
            return Err(Invalid("its owner's signature is wrong"));
        }
        if let Some(pin) = keys.pin() {
            self.check_pin(&pin, chain)?;
        }
        if let Some(stored) = stored {
            self.check_stored(stored, chain)?;
        }
        self.check_own_keys(keys)?;
        self.open(keys)
    }

    /// Checks that the tokens name the owner, or that the named owner made this one its successor.
    fn check_pin(&self, pin: &Pin, chain: &[Descriptor]) -> Result<(), DescriptorError> {
        let mut current = self;
        let mut before = chain.iter().rev();
        while !bool::from(current.pin().ct_eq(pin)) {
            let previous = before.next().ok_or(OtherOwner)?;
            if !current.succeeds(previous) {
                return Err(OtherOwner);
            }
            current = previous;
        }
        if current.is_signed() {
            Ok(())
        } else {
            Err(OtherOwner)
        }
    }

    /// Checks that it equals the stored descriptor, or that a chain of successions leads to it.
    fn check_stored(
        &self,
        stored: &Descriptor,
        chain: &[Descriptor],
    ) -> Result<(), DescriptorError> {
        if self.pool_id() != stored.pool_id() {
            return Err(Rollback("belongs to another pool of the same name"));
        }
        if self.epoch() < stored.epoch() {
            return Err(Rollback("is older"));
        }
        if self.epoch() == stored.epoch() {
            let same = self.bytes == stored.bytes;
            return if same {
                Ok(())
            } else {
                Err(Fork(self.epoch()))
            };
        }
        let mut current = stored;
        while current.epoch() < self.epoch() {
            let next = current.epoch() + 1;
            let step = if next == self.epoch() {
                self
            } else {
                chain
                    .iter()
                    .find(|step| step.epoch() == next)
                    .ok_or(Missing(next))?
            };
            if !step.succeeds(current) {
                return Err(Invalid("it does not succeed the one accepted before"));
            }
            current = step;
        }
        Ok(())
    }

    /// Checks that the holder's own keys produce the public keys of the descriptor.
    fn check_own_keys(&self, keys: &KeySet) -> Result<(), DescriptorError> {
        let owner = if keys.has(Kind::Owner) {
            keys.owner_key()
        } else {
            None
        };
        let own = [
            (owner, &self.keys.owner),
            (keys.join_key(), &self.keys.join),
            (keys.read_key(), &self.keys.read),
            (keys.write_key(), &self.keys.write),
            (keys.seal_key(), &self.keys.seal),
        ];
        for (own, public) in own {
            if own.is_some_and(|own| own.public() != *public) {
                return Err(Invalid("the keys are not those of this epoch"));
            }
        }
        Ok(())
    }

    /// Unwraps the pool key; `None` for clients that may not read.
    fn open(&self, keys: &KeySet) -> Result<Option<PoolKey>, DescriptorError> {
        const OTHER_KEY: DescriptorError =
            Invalid("it wraps another pool key than the one it names");
        let Some(kek) = keys.read_kek(&self.id) else {
            return Ok(None);
        };
        let opened = kek.open(self.nonce(0), &self.bound("wrap"), self.wrap(0).to_vec());
        let key = opened
            .and_then(|key| PoolKey::unwrapped(key, keys.backend()))
            .ok_or(Invalid("its pool key does not open"))?;
        if !key.fits(&self.check_value) {
            return Err(OTHER_KEY);
        }
        if keys.pool_key(&self.id).is_some_and(|own| !own.is(&key)) {
            return Err(OTHER_KEY);
        }
        Ok(Some(key))
    }

    /// The pool key of the previous epoch; `None` if the history was cut.
    ///
    /// `previous` is checked only by hash and signature: it may be older than any accepted
    /// descriptor.
    ///
    /// # Errors
    /// If `previous` is not the one that this descriptor refers to, or its key can't be unwrapped.
    pub fn open_previous(
        &self,
        key: &PoolKey,
        previous: &Descriptor,
    ) -> Result<Option<PoolKey>, DescriptorError> {
        if self.prev_hash != previous.hash() || !previous.is_signed() {
            return Err(Invalid("an older one is not the one that it names"));
        }
        if is_zero(self.wrap(1)) {
            return Ok(None);
        }
        let aad = self.bound("prev-wrap");
        let opened = key
            .previous_kek()
            .open(self.nonce(1), &aad, self.wrap(1).to_vec());
        let key = opened
            .and_then(|opened| PoolKey::unwrapped(opened, key.backend()))
            .filter(|key| key.fits(&previous.check_value))
            .ok_or(Invalid("the pool key of the epoch before does not open"))?;
        Ok(Some(key))
    }

    /// The nonce of the pool key's wrap (0) or of the previous key's wrap (1).
    fn nonce(&self, which: usize) -> &Nonce {
        let at = BOUND_BYTES + which * (24 + WRAP_BYTES);
        self.bytes[at..at + 24]
            .try_into()
            .expect("the layout was checked")
    }

    fn wrap(&self, which: usize) -> &[u8; WRAP_BYTES] {
        let at = BOUND_BYTES + which * (24 + WRAP_BYTES) + 24;
        self.bytes[at..at + WRAP_BYTES]
            .try_into()
            .expect("the layout was checked")
    }

    fn bound(&self, purpose: &str) -> Vec<u8> {
        Bytes::label(purpose)
            .raw(&self.bytes[..BOUND_BYTES])
            .into_vec()
    }

    /// Which public keys differ from those of `previous`.
    #[must_use]
    pub fn changes(&self, previous: &Descriptor) -> Changes {
        let (old, new) = (&previous.keys, &self.keys);
        Changes {
            join: old.join != new.join,
            read: old.read != new.read,
            write: old.write != new.write,
            seal: old.seal != new.seal,
        }
    }
}

/// Which keys a rotation changed; that decides who must prove again, and what is purged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four keys, each of which changed or did not"
)]
pub struct Changes {
    /// The key that proves join.
    pub join: bool,
    /// The key that proves read.
    pub read: bool,
    /// The key that proves write.
    pub write: bool,
    /// The key that signs content.
    pub seal: bool,
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

fn signed_message(body: &[u8]) -> Vec<u8> {
    Bytes::label("descriptor").raw(body).into_vec()
}

/// The inputs for a new pool. Id, salt and nonce are random.
#[derive(Debug, Clone, Copy)]
pub struct NewPool<'a> {
    /// The pool's name.
    pub name: &'a str,
    /// How it is protected.
    pub suite: Suite,
    /// Its id.
    pub pool_id: [u8; 16],
    /// The first epoch's salt.
    pub salt: [u8; 32],
    /// The time in Unix milliseconds.
    pub created_ms: u64,
    /// The nonce of the pool key's wrap.
    pub wrap_nonce: Nonce,
}

/// The inputs for a new epoch. Salt and nonces are random.
#[derive(Debug, Clone, Copy)]
pub struct NewEpoch {
    /// The epoch's salt.
    pub salt: [u8; 32],
    /// The time in Unix milliseconds.
    pub created_ms: u64,
    /// The nonce of the pool key's wrap.
    pub wrap_nonce: Nonce,
    /// The oldest epoch whose content stays acceptable. To remove a writer, it is set to the new
    /// epoch.
    pub content: OldContent,
    /// Whether readers of the new epoch can read the content of the old one.
    pub history: History,
}

/// Checks the reply to a proof: it must have the requested roles and a descriptor.
///
/// # Errors
/// If the server replies as for a plain pool, or grants less.
pub fn check_reply(
    asked: Roles,
    roles: Option<u64>,
    descriptor: Option<&[u8]>,
) -> Result<&[u8], DescriptorError> {
    let descriptor = descriptor.ok_or(Unprotected("as if the pool were plain"))?;
    if roles.and_then(Roles::from_number) != Some(asked) {
        return Err(Unprotected("with other roles than were proved"));
    }
    Ok(descriptor)
}

/// Which content stays acceptable after a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldContent {
    /// The same as before.
    AsBefore,
    /// Only content of the new epoch.
    Refused,
}

/// Whether an epoch gives access to the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    /// It wraps the previous key, with this nonce.
    Kept(Nonce),
    /// It does not.
    Cut,
}

/// Why a descriptor cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MakeError {
    /// A key is missing.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The name is invalid.
    #[error("a pool's name is 1 to 255 bytes without control characters")]
    Name,
    /// The old keys are not those of the pool's current epoch.
    #[error("the keys are not the owner's of the pool's current epoch; get the current ones")]
    NotOwner,
    /// The epoch numbers are used up.
    #[error("the pool has used up its epochs; make a new pool")]
    Epochs,
}

impl Descriptor {
    /// Creates the descriptor of a new pool.
    ///
    /// # Errors
    /// If one of the three keys is missing, or the name is invalid.
    pub fn create(keys: &KeySet, pool: &NewPool<'_>) -> Result<Self, MakeError> {
        let draft = Draft {
            name: pool.name,
            suite: pool.suite,
            id: EpochId {
                pool_id: pool.pool_id,
                epoch: 1,
                salt: pool.salt,
            },
            min_content_epoch: 0,
            created_ms: pool.created_ms,
            prev_hash: [0; 32],
            wrap_nonce: pool.wrap_nonce,
            previous: None,
        };
        draft.sign(keys, None)
    }

    /// Creates the descriptor of the next epoch. `old` are the keys of this epoch, `new` those of
    /// the next.
    ///
    /// # Errors
    /// If keys are missing, or `old` are not the owner's of this epoch.
    pub fn rotate(&self, old: &KeySet, new: &KeySet, to: &NewEpoch) -> Result<Self, MakeError> {
        let owner = old.owner_key().ok_or(KeyError::Missing(Kind::Owner))?;
        if owner.public() != self.keys.owner {
            return Err(MakeError::NotOwner);
        }
        let epoch = self.epoch().checked_add(1).ok_or(MakeError::Epochs)?;
        let previous = match to.history {
            History::Cut => None,
            History::Kept(nonce) => {
                let key = old
                    .pool_key(&self.id)
                    .ok_or(KeyError::Missing(Kind::Seal))?;
                if !key.fits(&self.check_value) {
                    return Err(MakeError::NotOwner);
                }
                Some((nonce, key))
            }
        };
        let draft = Draft {
            name: &self.name,
            suite: self.suite,
            id: EpochId {
                pool_id: self.pool_id(),
                epoch,
                salt: to.salt,
            },
            min_content_epoch: match to.content {
                OldContent::AsBefore => self.min_content_epoch,
                OldContent::Refused => epoch,
            },
            created_ms: to.created_ms,
            prev_hash: self.hash(),
            wrap_nonce: to.wrap_nonce,
            previous,
        };
        draft.sign(new, Some(&owner))
    }
}

/// A descriptor before it is signed.
struct Draft<'a> {
    name: &'a str,
    suite: Suite,
    id: EpochId,
    min_content_epoch: u32,
    created_ms: u64,
    prev_hash: [u8; 32],
    wrap_nonce: Nonce,
    /// The key of the previous epoch, and the nonce of its wrap.
    previous: Option<(Nonce, PoolKey)>,
}

impl Draft<'_> {
    fn sign(self, keys: &KeySet, previous: Option<&SigningKey>) -> Result<Descriptor, MakeError> {
        if !is_name(self.name) {
            return Err(MakeError::Name);
        }
        for kind in [Kind::Sigil, Kind::Shard, Kind::Seal] {
            keys.require(kind)?;
        }
        const ALL_THREE: &str = "all three keys are here";
        let key = keys.pool_key(&self.id).expect(ALL_THREE);
        let owner = keys.owner_key().expect(ALL_THREE);
        let signing = [
            keys.join_key(),
            keys.read_key(),
            keys.write_key(),
            keys.seal_key(),
        ];
        let mut bound = Bytes::new()
            .raw(MAGIC)
            .u16(VERSION)
            .u16(self.suite.number())
            .raw(&self.id.pool_id)
            .u32(self.id.epoch)
            .u32(self.min_content_epoch)
            .u64(self.created_ms)
            .raw(&self.id.salt)
            .raw(&owner.public().to_bytes());
        for signing in signing {
            bound = bound.raw(&signing.expect(ALL_THREE).public().to_bytes());
        }
        let bound = bound.raw(&key.check_value()).raw(&self.prev_hash);
        let aad = |purpose| Bytes::label(purpose).raw(bound.as_slice()).into_vec();
        let kek = keys.read_kek(&self.id).expect(ALL_THREE);
        let wrap = key.wrapped(&kek, &self.wrap_nonce, &aad("wrap"));
        let (prev_nonce, prev_wrap) = match &self.previous {
            None => ([0; 24], [0; WRAP_BYTES]),
            Some((nonce, before)) => (
                *nonce,
                before.wrapped(&key.previous_kek(), nonce, &aad("prev-wrap")),
            ),
        };
        let name_bytes = u16::try_from(self.name.len()).expect("the name was checked");
        let body = Bytes::new()
            .raw(bound.as_slice())
            .raw(&self.wrap_nonce)
            .raw(&wrap)
            .raw(&prev_nonce)
            .raw(&prev_wrap)
            .u16(name_bytes)
            .raw(self.name.as_bytes());
        let message = signed_message(body.as_slice());
        let sig_prev = previous.map_or([0; 64], |previous| previous.sign(&message));
        let bytes = body.raw(&owner.sign(&message)).raw(&sig_prev);
        Ok(Descriptor::parse(bytes.as_slice()).expect("a written value can be read"))
    }
}

/// Why the server refuses a new pool or a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// `bad_message`.
    #[error(transparent)]
    Layout(DescriptorError),
    /// `bad_message`.
    #[error("the descriptor {0}")]
    Unfit(&'static str),
    /// `stale_epoch`.
    #[error("the pool is in epoch {0}; get its current descriptor and rotate from there")]
    StaleEpoch(u32),
}

/// Reads the descriptor of a new pool. The caller checks that name and id are not in use, and
/// [`Descriptor::is_signed`].
///
/// # Errors
/// If it is not the descriptor of a new pool with this name.
pub fn read_creation(bytes: &[u8], name: &str) -> Result<Descriptor, StoreError> {
    let descriptor = Descriptor::parse(bytes).map_err(StoreError::Layout)?;
    if descriptor.epoch() != 1 {
        return Err(StoreError::Unfit("of a new pool has epoch 1"));
    }
    if descriptor.name != name {
        return Err(StoreError::Unfit("has another name than the request"));
    }
    Ok(descriptor)
}

/// Reads the descriptor that follows `current`. The caller checks who asks for it, and
/// [`Descriptor::is_signed_after`].
///
/// # Errors
/// If the descriptor does not succeed `current`.
pub fn read_rotation(bytes: &[u8], current: &Descriptor) -> Result<Descriptor, StoreError> {
    let next = Descriptor::parse(bytes).map_err(StoreError::Layout)?;
    if current.epoch().checked_add(1) != Some(next.epoch()) || next.prev_hash != current.hash() {
        return Err(StoreError::StaleEpoch(current.epoch()));
    }
    if !next.follows(current) {
        return Err(StoreError::Unfit(
            "changes the pool's id, name or suite, or lowers min_content_epoch",
        ));
    }
    Ok(next)
}
