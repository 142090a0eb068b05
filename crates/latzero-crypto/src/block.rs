//! Sealed blocks: chunks of ciphertext, a table of their hashes, and a manifest that signs the
//! table's root.
//!
//! A slot of the block's memory holds `manifest ‖ table ‖ padding ‖ chunks`. Nothing here reads
//! shared memory: callers copy first and verify the copy, so that nobody can change bytes between
//! the check and their use.

use crate::backend::{self, TAG_BYTES};
use crate::bytes::{Bytes, Cursor};
use crate::keys::PoolKey;
use crate::sign::{PublicKey, SigningKey};
use crate::xaes::{Nonce, Xaes};
use crate::{Suite, hash};

const MAGIC: &[u8; 4] = b"LZMF";
const VERSION: u16 = 1;
/// The length of a manifest.
pub const MANIFEST_BYTES: usize = 256;
/// The part of a manifest that its signature covers.
const SIGNED_BYTES: usize = 192;
/// The length of a table entry.
pub const ENTRY_BYTES: usize = 64;
/// The plaintext bytes of a chunk; the last one may be shorter.
pub const CHUNK_BYTES: usize = 65_536;
/// The distance from one chunk to the next: ciphertext and tag.
pub const CHUNK_STRIDE: usize = CHUNK_BYTES + TAG_BYTES;
const PAGE_BYTES: u64 = 4096;
/// The largest sealed block: 1 TiB, of which manifest and table are 1 GiB.
pub const SIZE_MAX: u64 = 1 << 40;

/// Why a version of a block is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// `integrity`.
    #[error("the block does not verify: {0}")]
    Integrity(&'static str),
    /// `downgrade`.
    #[error("the block has another {0} than this pool; find out who wrote it")]
    Downgrade(&'static str),
    /// `stale_epoch`.
    #[error(
        "the block is of epoch {0}, whose content is not accepted any more; \
         a writer must publish it again"
    )]
    StaleEpoch(u32),
    /// `rollback`.
    #[error("the block has version {0}, older than version {1} that was seen before")]
    Rollback(u64, u64),
    /// `fork`.
    #[error("the block has two histories at version {0}; find out who wrote the second")]
    Fork(u64),
    /// `version_conflict`, at the server.
    #[error("the block's next version is {expected}, not {got}")]
    VersionConflict {
        /// The next version.
        expected: u64,
        /// The received version.
        got: u64,
    },
}

/// Nobody with the seal wrote it.
const NOT_SIGNED: BlockError = Integrity("its manifest is not signed by a writer");

use BlockError::{Downgrade, Fork, Integrity, Rollback, StaleEpoch, VersionConflict};

/// The layout of a block in its slots, for a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    chunks_max: u32,
    chunks_at: u64,
}

impl Geometry {
    /// The geometry of a block for up to `size` bytes of plaintext; `None` above [`SIZE_MAX`].
    #[must_use]
    pub fn of(size: u64) -> Option<Self> {
        if size > SIZE_MAX {
            return None;
        }
        let chunks_max = u32::try_from(size.div_ceil(CHUNK_BYTES as u64)).ok()?;
        let head = MANIFEST_BYTES as u64 + ENTRY_BYTES as u64 * u64::from(chunks_max);
        Some(Geometry {
            chunks_max,
            chunks_at: head.div_ceil(PAGE_BYTES) * PAGE_BYTES,
        })
    }

    /// The largest number of chunks.
    #[must_use]
    pub fn chunks_max(&self) -> u32 {
        self.chunks_max
    }

    /// The size of a slot in bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.chunks_at + u64::from(self.chunks_max) * CHUNK_STRIDE as u64
    }

    /// The bytes of a slot that a plaintext of `length` bytes uses; the plaintext must fit.
    #[must_use]
    pub fn slot_len(&self, length: u64) -> Option<u64> {
        let chunks = chunk_count(length).filter(|chunks| *chunks <= self.chunks_max)?;
        let Some(last) = chunks.checked_sub(1) else {
            return Some(MANIFEST_BYTES as u64);
        };
        self.chunk(last, length).map(|range| range.end)
    }

    /// The range of chunk `i` with its tag, for a plaintext of `length` bytes.
    #[must_use]
    pub fn chunk(&self, i: u32, length: u64) -> Option<std::ops::Range<u64>> {
        let bytes = chunk_len(i, length).filter(|_| i < self.chunks_max)?;
        let start = self.chunks_at + u64::from(i) * CHUNK_STRIDE as u64;
        Some(start..start + u64::from(bytes) + TAG_BYTES as u64)
    }
}

/// The number of chunks of a plaintext.
fn chunk_count(length: u64) -> Option<u32> {
    u32::try_from(length.div_ceil(CHUNK_BYTES as u64)).ok()
}

/// The number of plaintext bytes in chunk `i`.
fn chunk_len(i: u32, length: u64) -> Option<u32> {
    let left = length
        .checked_sub(u64::from(i) * CHUNK_BYTES as u64)
        .filter(|left| *left > 0)?;
    u32::try_from(left.min(CHUNK_BYTES as u64)).ok()
}

/// The identity of a block, to which its content is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockId<'a> {
    /// The pool's id.
    pub pool_id: [u8; 16],
    /// The pool's suite.
    pub suite: Suite,
    /// 16 random bytes that the block's creator chose.
    pub uid: [u8; 16],
    /// The block's name.
    pub name: &'a str,
}

impl BlockId<'_> {
    /// The hash of the name in this pool, which binds a manifest to the block.
    #[must_use]
    pub fn name_hash(&self) -> [u8; 32] {
        hash(
            &Bytes::label("block-name")
                .raw(&self.pool_id)
                .prefixed(self.name.as_bytes()),
        )
    }
}

/// A chunk's entry in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The block version that wrote the chunk.
    pub version: u64,
    /// The chunk's nonce.
    pub nonce: Nonce,
    /// The hash of the chunk's ciphertext.
    pub leaf: [u8; 32],
}

impl Entry {
    /// A chunk that was never sealed: versions begin with 1.
    const NONE: Entry = Entry {
        version: 0,
        nonce: [0; 24],
        leaf: [0; 32],
    };

    /// The bytes of the entry in the table.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; ENTRY_BYTES] {
        let mut line = [0; ENTRY_BYTES];
        line[..8].copy_from_slice(&self.version.to_be_bytes());
        line[8..32].copy_from_slice(&self.nonce);
        line[32..].copy_from_slice(&self.leaf);
        line
    }
}

/// Seals and opens the chunks of one block in one epoch.
pub struct ChunkKey {
    key: Xaes,
    backend: &'static dyn crate::backend::Backend,
    pool_id: [u8; 16],
    epoch: u32,
    uid: [u8; 16],
}

impl ChunkKey {
    /// The key of a block in an epoch.
    #[must_use]
    pub fn new(pool_key: &PoolKey, id: &BlockId<'_>, epoch: u32) -> Self {
        ChunkKey {
            key: pool_key.block_key(&id.uid),
            backend: pool_key.backend(),
            pool_id: id.pool_id,
            epoch,
            uid: id.uid,
        }
    }

    fn aad(&self, i: u32, version: u64, plain_bytes: u32) -> Bytes {
        Bytes::label("chunk")
            .raw(&self.pool_id)
            .u32(self.epoch)
            .raw(&self.uid)
            .u32(i)
            .u64(version)
            .u32(plain_bytes)
    }

    fn leaf(&self, i: u32, version: u64, nonce: &Nonce, sealed: &[u8]) -> [u8; 32] {
        let length = u32::try_from(sealed.len()).expect("a chunk is small");
        let head = Bytes::label("leaf")
            .u32(i)
            .u64(version)
            .raw(nonce)
            .u32(length);
        self.backend.sha256(&[head.as_slice(), sealed])
    }

    /// Seals chunk `i` for block version `version`. `plain` has 1 to 65,536 bytes.
    ///
    /// # Panics
    /// If `plain` is empty or too long.
    #[must_use]
    pub fn seal(&self, i: u32, version: u64, nonce: Nonce, plain: &[u8]) -> (Entry, Vec<u8>) {
        assert!(
            (1..=CHUNK_BYTES).contains(&plain.len()),
            "a chunk has 1 to 65,536 bytes"
        );
        let aad = self.aad(
            i,
            version,
            u32::try_from(plain.len()).expect("a chunk is small"),
        );
        let sealed = self.key.seal(&nonce, aad.as_slice(), plain);
        let leaf = self.leaf(i, version, &nonce, &sealed);
        (
            Entry {
                version,
                nonce,
                leaf,
            },
            sealed,
        )
    }

    /// Opens chunk `i` of a verified version. `sealed` is a private copy of the chunk's bytes.
    ///
    /// # Errors
    /// If it is not the chunk that the table describes.
    pub fn open(&self, of: &Verified, i: u32, sealed: Vec<u8>) -> Result<Vec<u8>, BlockError> {
        let manifest = &of.manifest;
        let entry = of
            .table
            .get(i as usize)
            .ok_or(Integrity("it has no such chunk"))?;
        let plain_bytes = chunk_len(i, manifest.length).ok_or(Integrity("it has no such chunk"))?;
        if (self.epoch, self.uid) != (manifest.epoch, manifest.uid) {
            return Err(Integrity("the chunk's key is of another epoch or block"));
        }
        if sealed.len() != plain_bytes as usize + TAG_BYTES {
            return Err(Integrity("a chunk has another length"));
        }
        // The tag alone proves nothing: anyone with the key can create other bytes with the same
        // tag.
        if self.leaf(i, entry.version, &entry.nonce, &sealed) != entry.leaf {
            return Err(Integrity("a chunk is not the one that was signed"));
        }
        let aad = self.aad(i, entry.version, plain_bytes);
        self.key
            .open(&entry.nonce, aad.as_slice(), sealed)
            .ok_or(Integrity("a chunk does not open"))
    }
}

/// The root of the tree: a hash over all leaves.
fn root_of(table: &[Entry]) -> [u8; 32] {
    let count = u32::try_from(table.len()).expect("a table is bounded by the geometry");
    let head = Bytes::label("root").u32(count);
    let mut leaves = Vec::with_capacity(32 * table.len());
    for entry in table {
        leaves.extend_from_slice(&entry.leaf);
    }
    backend::preferred().sha256(&[head.as_slice(), &leaves])
}

/// The signed head of a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    bytes: [u8; MANIFEST_BYTES],
    suite: Suite,
    pool_id: [u8; 16],
    uid: [u8; 16],
    epoch: u32,
    version: u64,
    length: u64,
    chunks: u32,
    written_ms: u64,
    session: [u8; 16],
    root: [u8; 32],
    prev_hash: [u8; 32],
    name_hash: [u8; 32],
}

impl Manifest {
    /// Reads a manifest. It can be trusted only as part of a [`Verified`] version.
    ///
    /// # Errors
    /// If the layout is wrong, or version or suite are unknown.
    pub fn parse(bytes: &[u8; MANIFEST_BYTES]) -> Result<Self, BlockError> {
        let mut cursor = Cursor::new(bytes);
        if cursor.take(4) != Some(MAGIC) {
            return Err(Integrity("its manifest does not begin like one"));
        }
        if cursor.u16() != Some(VERSION) {
            return Err(Downgrade("version of the manifest"));
        }
        let suite = cursor
            .u16()
            .and_then(Suite::from_number)
            .ok_or(Downgrade("suite"))?;
        Self::fields(bytes, cursor, suite).ok_or(Integrity("its manifest contradicts itself"))
    }

    /// The fields after the suite; `None` if they contradict each other.
    fn fields(bytes: &[u8; MANIFEST_BYTES], mut cursor: Cursor<'_>, suite: Suite) -> Option<Self> {
        let (pool_id, uid) = (cursor.array()?, cursor.array()?);
        let (epoch, chunk_size) = (cursor.u32()?, cursor.u32()?);
        let (version, length) = (cursor.u64()?, cursor.u64()?);
        let (chunks, flags) = (cursor.u32()?, cursor.u32()?);
        let manifest = Manifest {
            bytes: *bytes,
            suite,
            pool_id,
            uid,
            epoch,
            version,
            length,
            chunks,
            written_ms: cursor.u64()?,
            session: cursor.array()?,
            root: cursor.array()?,
            prev_hash: cursor.array()?,
            name_hash: cursor.array()?,
        };
        let fits = chunk_size as usize == CHUNK_BYTES
            && flags == 0
            && version > 0
            && epoch > 0
            && chunk_count(length) == Some(chunks);
        fits.then_some(manifest)
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; MANIFEST_BYTES] {
        &self.bytes
    }

    /// The epoch in which it was written.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The block's version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The length of the plaintext.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// When it was written, by the writer's clock, in Unix milliseconds.
    #[must_use]
    pub fn written_ms(&self) -> u64 {
        self.written_ms
    }

    /// The writer's session, as stated by the writer.
    #[must_use]
    pub fn session(&self) -> [u8; 16] {
        self.session
    }

    /// The size of manifest and table, which a reader copies first.
    #[must_use]
    pub fn head_bytes(&self) -> usize {
        MANIFEST_BYTES + ENTRY_BYTES * self.chunks as usize
    }

    /// The hash by which the next version refers to this one.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        hash(&self.message())
    }

    fn seen(&self) -> Seen {
        Seen {
            version: self.version,
            hash: self.hash(),
        }
    }

    fn message(&self) -> Bytes {
        Bytes::label("manifest").raw(&self.bytes[..SIGNED_BYTES])
    }

    /// Whether a writer with this seal signed it.
    #[must_use]
    pub fn is_signed(&self, seal: &PublicKey) -> bool {
        let signature = self.bytes[SIGNED_BYTES..]
            .try_into()
            .expect("64 bytes are left");
        seal.verify(self.message().as_slice(), &signature)
    }
}

/// The newest version that a client saw, to detect rollback and forks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its number.
    pub version: u64,
    /// Its manifest's hash.
    pub hash: [u8; 32],
}

/// The values that a version is checked against.
pub struct Checks<'a> {
    /// The block.
    pub id: BlockId<'a>,
    /// Its geometry, from the block's own description rather than the manifest.
    pub geometry: Geometry,
    /// The pool's epoch.
    pub epoch: u32,
    /// The oldest epoch whose content is accepted.
    pub min_content_epoch: u32,
}

/// A version that was verified or created here. Successors can be created only from it.
#[derive(Debug, Clone)]
pub struct Verified {
    manifest: Manifest,
    table: Vec<Entry>,
}

impl Verified {
    /// Verifies manifest and table. `head` is a private copy of the start of the slot,
    /// `slot_version` the slot's own number. `seal_of` returns the key that signed content in an
    /// epoch.
    ///
    /// # Errors
    /// The first check that fails. If the slot changed in the meantime, the read was torn: try
    /// again.
    pub fn new(
        head: &[u8],
        slot_version: u64,
        checks: &Checks<'_>,
        seen: Option<&Seen>,
        seal_of: impl FnOnce(u32) -> Option<PublicKey>,
    ) -> Result<Self, BlockError> {
        let manifest = checks.manifest(head)?;
        if manifest.version != slot_version {
            return Err(Integrity("its slot has another version"));
        }
        if manifest.epoch < checks.min_content_epoch {
            return Err(StaleEpoch(manifest.epoch));
        }
        if manifest.epoch > checks.epoch {
            return Err(Integrity("it is of an epoch that the pool has not reached"));
        }
        let seal = seal_of(manifest.epoch).ok_or(Integrity("the key of its epoch is not known"))?;
        if !manifest.is_signed(&seal) {
            return Err(NOT_SIGNED);
        }
        let verified = Self::unsigned(manifest, head)?;
        verified.check_seen(seen)?;
        Ok(verified)
    }

    /// Checks root and table, but not the signature.
    fn unsigned(manifest: Manifest, head: &[u8]) -> Result<Self, BlockError> {
        let table = table(&head[MANIFEST_BYTES..manifest.head_bytes()]);
        if root_of(&table) != manifest.root {
            return Err(Integrity("its table is not the one that was signed"));
        }
        if table
            .iter()
            .any(|entry| entry.version == 0 || entry.version > manifest.version)
        {
            return Err(Integrity("a chunk is newer than its block"));
        }
        Ok(Verified { manifest, table })
    }

    fn check_seen(&self, seen: Option<&Seen>) -> Result<(), BlockError> {
        let (Some(seen), version) = (seen, self.manifest.version) else {
            return Ok(());
        };
        if version < seen.version {
            return Err(Rollback(version, seen.version));
        }
        let forked = if version == seen.version {
            self.manifest.hash() != seen.hash
        } else {
            version - seen.version == 1 && self.manifest.prev_hash != seen.hash
        };
        if forked { Err(Fork(version)) } else { Ok(()) }
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its table.
    #[must_use]
    pub fn table(&self) -> &[Entry] {
        &self.table
    }

    /// The version's number and hash, to be remembered.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.manifest.seen()
    }

    /// Manifest and table, as at the start of the slot.
    #[must_use]
    pub fn head(&self) -> Vec<u8> {
        let mut head = Vec::with_capacity(self.manifest.head_bytes());
        head.extend_from_slice(&self.manifest.bytes);
        for entry in &self.table {
            head.extend_from_slice(&entry.to_bytes());
        }
        head
    }
}

fn table(bytes: &[u8]) -> Vec<Entry> {
    let (lines, _) = bytes.as_chunks::<ENTRY_BYTES>();
    let entry = |line: &[u8; ENTRY_BYTES]| {
        let mut cursor = Cursor::new(line);
        Some(Entry {
            version: cursor.u64()?,
            nonce: cursor.array()?,
            leaf: cursor.array()?,
        })
    };
    lines
        .iter()
        .map(|line| entry(line).expect("a line has 64 bytes"))
        .collect()
}

impl Checks<'_> {
    /// Checks what needs no key: layout, identity, and that the table is complete.
    fn manifest(&self, head: &[u8]) -> Result<Manifest, BlockError> {
        let bytes = head
            .first_chunk()
            .ok_or(Integrity("its manifest is cut off"))?;
        let manifest = Manifest::parse(bytes)?;
        if (manifest.pool_id, manifest.uid) != (self.id.pool_id, self.id.uid) {
            return Err(Integrity("it is another block's content"));
        }
        if manifest.suite != self.id.suite {
            return Err(Downgrade("suite"));
        }
        if manifest.name_hash != self.id.name_hash() {
            return Err(Integrity("it was written under another name"));
        }
        if manifest.chunks > self.geometry.chunks_max || head.len() < manifest.head_bytes() {
            return Err(Integrity("it has more chunks than the block takes"));
        }
        Ok(manifest)
    }

    /// Checks a slot that a client writes, but not its signature
    /// ([`Manifest::is_signed`]). `version` is the block's current one, 0 before the first.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn unsigned(&self, slot: &[u8], version: u64) -> Result<Manifest, BlockError> {
        let manifest = self.manifest(slot)?;
        if self.geometry.slot_len(manifest.length) != Some(slot.len() as u64) {
            return Err(Integrity("it has another size than its manifest says"));
        }
        let manifest = Verified::unsigned(manifest, slot)?.manifest;
        if manifest.epoch != self.epoch {
            return Err(StaleEpoch(manifest.epoch));
        }
        let (expected, got) = (version.saturating_add(1), manifest.version);
        if expected != got {
            return Err(VersionConflict { expected, got });
        }
        Ok(manifest)
    }

    /// As [`Checks::unsigned`], with the signature. The server needs only the pool's public key for
    /// that.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn written(&self, slot: &[u8], version: u64, seal: &PublicKey) -> Result<Seen, BlockError> {
        let manifest = self.unsigned(slot, version)?;
        if !manifest.is_signed(seal) {
            return Err(NOT_SIGNED);
        }
        Ok(manifest.seen())
    }
}

/// The description of a version that is about to be signed.
pub struct Next<'a> {
    /// The block.
    pub id: BlockId<'a>,
    /// Its geometry.
    pub geometry: Geometry,
    /// The pool's epoch.
    pub epoch: u32,
    /// The length of the plaintext.
    pub length: u64,
    /// The time in Unix milliseconds.
    pub written_ms: u64,
    /// The writer's session.
    pub session: [u8; 16],
}

/// Why a version can't be signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The plaintext does not fit into the block.
    #[error("the block takes at most {0} bytes")]
    TooLarge(u64),
    /// A chunk is missing, or was not sealed for this version.
    #[error("chunk {0} was not sealed for this version, which changes or needs it")]
    Chunk(u32),
    /// The version numbers are used up.
    #[error("the block has used up its versions; make a new block")]
    Versions,
}

impl Next<'_> {
    /// The version's number, with which changed chunks are sealed.
    ///
    /// # Errors
    /// If the version numbers are used up.
    pub fn version(&self, base: Option<&Verified>) -> Result<u64, PublishError> {
        let base = base.map_or(0, |base| base.manifest.version);
        base.checked_add(1).ok_or(PublishError::Versions)
    }

    /// Signs the version. `base` is the current version, verified: its chunks that `changed` does
    /// not replace are signed again without being opened, so it must be valid. `changed` are chunks
    /// that were sealed for this version.
    ///
    /// # Errors
    /// If a chunk is missing or of another version. In a new epoch every chunk must be changed.
    pub fn sign(
        &self,
        base: Option<&Verified>,
        changed: &[(u32, Entry)],
        seal: &SigningKey,
    ) -> Result<Verified, PublishError> {
        let version = self.version(base)?;
        self.sign_as(version, base, changed, seal)
    }

    /// The same with its own version, for vectors.
    #[doc(hidden)]
    pub fn sign_as(
        &self,
        version: u64,
        base: Option<&Verified>,
        changed: &[(u32, Entry)],
        seal: &SigningKey,
    ) -> Result<Verified, PublishError> {
        let too_large =
            PublishError::TooLarge(u64::from(self.geometry.chunks_max) * CHUNK_BYTES as u64);
        let chunks = chunk_count(self.length).filter(|n| *n <= self.geometry.chunks_max);
        let chunks = chunks.ok_or(too_large)?;
        let base_here = base.filter(|base| base.manifest.epoch == self.epoch);
        let mut table = base_here.map_or_else(Vec::new, |base| base.table.clone());
        table.resize(chunks as usize, Entry::NONE);
        if let Some(base) = base_here.filter(|base| base.manifest.length != self.length) {
            // A chunk whose length changes must be sealed again: its length is bound to it.
            let old_length = base.manifest.length;
            for (i, entry) in (0..).zip(&mut table) {
                if chunk_len(i, old_length) != chunk_len(i, self.length) {
                    *entry = Entry::NONE;
                }
            }
        }
        for (i, entry) in changed {
            let place = table.get_mut(*i as usize).ok_or(PublishError::Chunk(*i))?;
            if entry.version != version {
                return Err(PublishError::Chunk(*i));
            }
            *place = *entry;
        }
        if let Some((i, _)) = (0..).zip(&table).find(|(_, entry)| entry.version == 0) {
            return Err(PublishError::Chunk(i));
        }
        let signed = Bytes::new()
            .raw(MAGIC)
            .u16(VERSION)
            .u16(self.id.suite.number())
            .raw(&self.id.pool_id)
            .raw(&self.id.uid)
            .u32(self.epoch)
            .u32(CHUNK_BYTES as u32)
            .u64(version)
            .u64(self.length)
            .u32(chunks)
            .u32(0)
            .u64(self.written_ms)
            .raw(&self.session)
            .raw(&root_of(&table))
            .raw(&base.map_or([0; 32], |base| base.manifest.hash()))
            .raw(&self.id.name_hash());
        let message = Bytes::label("manifest").raw(signed.as_slice());
        let bytes = signed.raw(&seal.sign(message.as_slice()));
        let bytes = bytes
            .as_slice()
            .try_into()
            .expect("a manifest has 256 bytes");
        let manifest = Manifest::parse(bytes).expect("a written value can be read");
        Ok(Verified { manifest, table })
    }
}
