//! Blocks of encrypted pools: this process verifies and opens what it reads, and seals and signs
//! what it writes.
//!
//! A slot holds a signed manifest, a table of hashes, and chunks of ciphertext. A reader copies
//! them first and checks the copy. A writer seals the changed chunks and signs the table again; the
//! other chunks are reused unchanged. Only a holder of the seal can sign, so anything that others
//! write into the memory or the file is refused.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use latzero_crypto::block::{
    BlockError, BlockId, CHUNK_BYTES, Checks, ChunkKey, ENTRY_BYTES, Geometry, MANIFEST_BYTES,
    Manifest, Next, PublishError, Verified,
};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::{Suite, text};
use latzero_protocol::memory::LockMode;
use latzero_protocol::{Code, Ran};
use latzero_shm::{View, Writing};
use serde_json::{Value, json};

use super::lock::BlockLock;
use super::{Block, TRIES_MAX, contended, number, read_error, write_error};
use crate::drive::core::Core;
use crate::error::Error;
use crate::keys::{now_ms, random};
use crate::sync::lock;
use crate::wire::sealed::SealedPool;

/// How long a write without a lock of its own waits for the block's lock.
const EDIT_WAIT: Duration = Duration::from_secs(10);

/// What the server stated about a sealed block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SealedAs {
    pub(super) uid: [u8; 16],
    pub(super) geometry: Geometry,
}

/// A sealed block, and what this process has verified of it.
#[derive(Debug)]
pub(crate) struct SealedBlock {
    pool: Arc<SealedPool>,
    name: String,
    /// The most plaintext in bytes.
    size: u64,
    pub(super) said: SealedAs,
    /// The newest version that was verified here. An older one is a rollback.
    newest: Mutex<Option<Arc<Verified>>>,
}

/// A change of a sealed block's content.
#[derive(Debug, Default)]
pub(super) struct Edit<'a> {
    /// Bytes and their offsets.
    pub(super) writes: &'a [(u64, Vec<u8>)],
    /// The new length in bytes.
    pub(super) length: Option<u64>,
    /// The version that the block must have.
    pub(super) if_version: Option<u64>,
    /// Whether content stays that is too old to be read.
    pub(super) keeps_stale: bool,
}

/// The lock under which a change is made.
enum Under {
    /// A lock that the app holds.
    Held(u64),
    /// A lock taken only for this change.
    Taken(BlockLock),
}

/// The destination of a new version.
enum Target {
    /// In place.
    Slot {
        writing: Box<Writing>,
        /// The table in the slot, if all of it belongs to one version.
        table: Option<Vec<u8>>,
    },
    /// In one message.
    Message(Vec<u8>),
}

impl SealedAs {
    /// Parses the sealed properties in a description.
    pub(super) fn of(description: &Value) -> Option<SealedAs> {
        let said = SealedAs {
            uid: text::decode(description["block_uid"].as_str()?)?,
            geometry: Geometry::of(description["size"].as_u64()?)?,
        };
        (description["capacity"] == said.capacity()).then_some(said)
    }

    /// The size of a slot in bytes.
    pub(super) fn capacity(self) -> u64 {
        self.geometry.capacity()
    }
}

impl SealedBlock {
    pub(super) fn new(core: &Core, pool: &str, name: &str, size: u64, said: SealedAs) -> Self {
        let pool = core.sealed_pool(pool);
        SealedBlock {
            pool: Arc::clone(pool.expect("`check` found it")),
            name: name.to_owned(),
            size,
            said,
            newest: Mutex::default(),
        }
    }

    fn id<'a>(&'a self, epochs: &Epochs) -> BlockId<'a> {
        let descriptor = epochs.current().descriptor();
        BlockId {
            pool_id: descriptor.pool_id(),
            suite: descriptor.suite(),
            uid: self.said.uid,
            name: &self.name,
        }
    }

    fn newest(&self) -> Option<Arc<Verified>> {
        lock(&self.newest).clone()
    }

    /// The length of the newest version in bytes, or the largest possible length.
    pub(super) fn length(&self) -> u64 {
        let newest = self.newest();
        newest.map_or(self.size, |newest| newest.manifest().length())
    }

    fn keep(&self, verified: Verified) -> Arc<Verified> {
        let verified = Arc::new(verified);
        let mut newest = lock(&self.newest);
        let version = |of: &Verified| of.manifest().version();
        let is_newer = newest
            .as_deref()
            .is_none_or(|known| version(known) < version(&verified));
        if is_newer {
            *newest = Some(Arc::clone(&verified));
        }
        verified
    }

    /// Verifies a private copy of manifest and table. `seen` was read before the copy was made.
    fn verify(
        &self,
        head: &[u8],
        version: u64,
        seen: Option<&Verified>,
        oldest: Oldest,
    ) -> Result<Verified, Error> {
        let verified = self.pool.with_epochs(|epochs| {
            let descriptor = epochs.current().descriptor();
            let checks = Checks {
                id: self.id(epochs),
                geometry: self.said.geometry,
                epoch: descriptor.epoch(),
                min_content_epoch: match oldest {
                    Oldest::Accepted => descriptor.min_content_epoch(),
                    Oldest::Any => 0,
                },
            };
            let seen = seen.map(Verified::seen);
            Verified::new(head, version, &checks, seen.as_ref(), |epoch| {
                epochs.seal_of(epoch)
            })
        })?;
        verified.map_err(|error| self.unfit(error))
    }

    fn chunk_key(&self, epoch: u32) -> Result<ChunkKey, Error> {
        let key = self
            .pool
            .with_epochs(|epochs| epochs.chunk_key(&self.id(epochs), epoch))?;
        key.ok_or_else(|| self.unfit(BlockError::StaleEpoch(epoch)))
    }

    fn unfit(&self, error: BlockError) -> Error {
        let code = match error {
            BlockError::Integrity(_) => Code::Integrity,
            BlockError::Downgrade(_) => Code::Downgrade,
            BlockError::StaleEpoch(_) => Code::StaleEpoch,
            BlockError::Rollback(..) => Code::Rollback,
            BlockError::Fork(_) => Code::Fork,
            BlockError::VersionConflict { .. } => Code::VersionConflict,
        };
        let text = format!(
            "block '{}' of pool '{}': {error}",
            self.name,
            self.pool.name()
        );
        Error::new(code, text)
    }

    fn unsigned(&self, error: PublishError) -> Error {
        let code = match error {
            PublishError::TooLarge(_) => Code::TooLarge,
            PublishError::Chunk(_) | PublishError::Versions => Code::Internal,
        };
        let text = format!("block '{}': {error}; nothing was written", self.name);
        Error::new(code, text).with_ran(Ran::No)
    }
}

/// The epochs whose content is accepted.
#[derive(Debug, Clone, Copy)]
enum Oldest {
    /// Those that the pool's descriptor accepts.
    Accepted,
    /// All epochs, because none of the content stays.
    Any,
}

/// Checks that the server describes a block as the pool's suite requires; otherwise the server
/// could see what is written.
pub(super) fn check(core: &Core, pool: &str, said: Option<&SealedAs>) -> Result<(), Error> {
    let suite = match core.sealed_pool(pool) {
        Some(pool) => pool.with_epochs(|epochs| Some(epochs.current().descriptor().suite()))?,
        None => None,
    };
    if (suite == Some(Suite::Sealed)) == said.is_some() {
        return Ok(());
    }
    let text = format!("the server describes a block of pool '{pool}' as of another kind of pool");
    Err(Error::new(Code::Downgrade, text))
}

impl Block {
    pub(super) fn sealed(&self) -> Option<&SealedBlock> {
        self.shared().sealed.as_ref()
    }

    /// The id that a sealed block's content is bound to, for calls that pass the block.
    pub(crate) fn uid(&self) -> Option<[u8; 16]> {
        self.sealed().map(|sealed| sealed.said.uid)
    }

    /// Verifies the newest version if that has not happened yet, so that its length is known.
    /// Errors are reported when the block is read.
    pub(super) async fn verify_newest(&self) {
        if let Some(sealed) = self.sealed() {
            let _ = self.verified(sealed, Oldest::Accepted).await;
        }
    }

    /// The newest version, verified; `None` before the first one.
    async fn verified(
        &self,
        sealed: &SealedBlock,
        oldest: Oldest,
    ) -> Result<Option<Arc<Verified>>, Error> {
        let mut has_asked = false;
        for _ in 0..TRIES_MAX {
            // Read before the slot, because another thread may verify a newer version in the
            // meantime.
            let known = sealed.newest();
            let mut manifest = [0; MANIFEST_BYTES];
            let version = self.slot_into(0, &mut manifest).await?;
            match &known {
                None if version == 0 => return Ok(None),
                Some(known) if version == 0 => {
                    let seen = known.manifest().version();
                    return Err(sealed.unfit(BlockError::Rollback(0, seen)));
                }
                Some(known)
                    if known.manifest().as_bytes() == &manifest
                        && known.manifest().version() == version =>
                {
                    let is_stale = sealed.pool.with_epochs(|epochs| {
                        let oldest = epochs.current().descriptor().min_content_epoch();
                        known.manifest().epoch() < oldest
                    })?;
                    if !is_stale {
                        return Ok(Some(Arc::clone(known)));
                    }
                }
                _ => {}
            }
            let manifest = Manifest::parse(&manifest).map_err(|error| sealed.unfit(error))?;
            if manifest.chunks() > sealed.said.geometry.chunks_max() {
                let error = BlockError::Integrity("it has more chunks than the block takes");
                return Err(sealed.unfit(error));
            }
            let epoch = sealed
                .pool
                .with_epochs(|epochs| epochs.current().descriptor().epoch())?;
            if manifest.epoch() > epoch && !has_asked {
                // The notice of the rotation arrives before any reply.
                has_asked = true;
                self.info().await?;
                continue;
            }
            let mut head = vec![0; manifest.head_bytes()];
            if self.slot_into(0, &mut head).await? != version {
                continue;
            }
            let verified = sealed.verify(&head, version, known.as_deref(), oldest)?;
            return Ok(Some(sealed.keep(verified)));
        }
        Err(contended(self.id()))
    }

    /// Bytes of the newest version from `offset` on, up to the end if `length` is `None`; and the
    /// version.
    pub(super) async fn open(
        &self,
        sealed: &SealedBlock,
        offset: u64,
        length: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Error> {
        for _ in 0..TRIES_MAX {
            let verified = self.verified(sealed, Oldest::Accepted).await?;
            let manifest = verified.as_deref().map(Verified::manifest);
            let total = manifest.map_or(sealed.size, Manifest::length);
            let end = length.map_or(Some(total), |length| offset.checked_add(length));
            let end = end.filter(|end| (offset..=total).contains(end));
            let range = offset
                ..end.ok_or_else(|| read_error(self.id(), latzero_shm::ReadError::OutOfRange))?;
            let Some(verified) = verified else {
                return Ok((zeros(range.end - range.start)?, 0));
            };
            let version = verified.manifest().version();
            if let Some(bytes) = self.open_range(sealed, &verified, range).await? {
                return Ok((bytes, version));
            }
        }
        Err(contended(self.id()))
    }

    /// Opens bytes of a version; `None` if the block has a newer one by now.
    async fn open_range(
        &self,
        sealed: &SealedBlock,
        of: &Verified,
        range: Range<u64>,
    ) -> Result<Option<Vec<u8>>, Error> {
        let manifest = of.manifest();
        let mut plain = Vec::new();
        if range.is_empty() {
            return Ok(Some(plain));
        }
        let chunk = CHUNK_BYTES as u64;
        let (first, last) = (range.start / chunk, (range.end - 1) / chunk);
        let place = |i: u64| {
            let i = u32::try_from(i).ok()?;
            sealed.said.geometry.chunk(i, manifest.length())
        };
        let none = || sealed.unfit(BlockError::Integrity("it has no such chunk"));
        let start = place(first).ok_or_else(none)?.start;
        let end = place(last).ok_or_else(none)?.end;
        let mut copy = zeros(end - start)?;
        plain.reserve_exact(copy.len());
        if self.slot_into(start, &mut copy).await? != manifest.version() {
            return Ok(None);
        }
        let key = sealed.chunk_key(manifest.epoch())?;
        for i in first..=last {
            let place = place(i).ok_or_else(none)?;
            let ciphertext =
                copy[bytes_of(place.start - start)?..bytes_of(place.end - start)?].to_vec();
            let index = u32::try_from(i).map_err(|_| none())?;
            let opened = key
                .open(of, index, ciphertext)
                .map_err(|error| sealed.unfit(error))?;
            let from = bytes_of(range.start.saturating_sub(i * chunk))?;
            let to = bytes_of(range.end - i * chunk)?.min(opened.len());
            plain.extend_from_slice(&opened[from..to]);
        }
        Ok(Some(plain))
    }

    /// Passes a copy of the newest version to `f` as a view.
    pub(super) async fn view_opened<R>(
        &self,
        sealed: &SealedBlock,
        f: impl FnOnce(View<'_>) -> R,
    ) -> Result<R, Error> {
        let (bytes, version) = self.open(sealed, 0, None).await?;
        Ok(f(View::of_copy(&bytes, version)))
    }

    /// Changes the content under the app's lock, or a lock taken for this change; returns the new
    /// version.
    pub(super) async fn edit(&self, sealed: &SealedBlock, edit: &Edit<'_>) -> Result<u64, Error> {
        let under = self.lock_to_edit().await?;
        let version = self.publish_under(sealed, &under, edit).await;
        under.end().await;
        version
    }

    /// As [`Block::cas`].
    pub(super) async fn cas_sealed(
        &self,
        sealed: &SealedBlock,
        offset: u64,
        expected: &[u8],
        bytes: &[u8],
    ) -> Result<Result<u64, Vec<u8>>, Error> {
        if expected.len() != bytes.len() {
            let text = "a compare-and-swap takes as many bytes as it expects";
            return Err(Error::new(Code::BadMessage, text).with_ran(Ran::No));
        }
        let under = self.lock_to_edit().await?;
        let length = expected.len() as u64;
        let swapped = match self.open(sealed, offset, Some(length)).await {
            Ok((current, version)) if current == expected => {
                let edit = Edit {
                    writes: &[(offset, bytes.to_vec())],
                    if_version: Some(version),
                    ..Edit::default()
                };
                self.publish_under(sealed, &under, &edit).await.map(Ok)
            }
            other => other.map(|(current, _)| Err(current)),
        };
        under.end().await;
        swapped
    }

    /// Seals the content anew if it is of an earlier epoch; the new version.
    pub(super) async fn reseal(
        &self,
        sealed: &SealedBlock,
        keeps_stale: bool,
    ) -> Result<Option<u64>, Error> {
        let under = self.lock_to_edit().await?;
        let version = self.reseal_under(sealed, &under, keeps_stale).await;
        under.end().await;
        version
    }

    async fn reseal_under(
        &self,
        sealed: &SealedBlock,
        under: &Under,
        keeps_stale: bool,
    ) -> Result<Option<u64>, Error> {
        let edit = Edit {
            keeps_stale,
            ..Edit::default()
        };
        let Some(base) = self.base(sealed, &edit).await? else {
            return Ok(None);
        };
        let epochs = |epochs: &Epochs| epochs.current().descriptor().epoch();
        if base.manifest().epoch() == sealed.pool.with_epochs(epochs)? {
            return Ok(None);
        }
        let edit = Edit {
            if_version: Some(base.manifest().version()),
            ..edit
        };
        // A version never mixes epochs, so a change of nothing seals all of it.
        self.publish_under(sealed, under, &edit).await.map(Some)
    }

    async fn lock_to_edit(&self) -> Result<Under, Error> {
        match self.shared().exclusive() {
            Some(fence) => Ok(Under::Held(fence)),
            None => {
                let lock = BlockLock::take(self, LockMode::Exclusive, EDIT_WAIT, None).await?;
                Ok(Under::Taken(lock))
            }
        }
    }

    async fn publish_under(
        &self,
        sealed: &SealedBlock,
        under: &Under,
        edit: &Edit<'_>,
    ) -> Result<u64, Error> {
        let version = match under {
            Under::Held(fence) => self.publish(sealed, *fence, false, edit).await?,
            Under::Taken(lock) => {
                let is_inherited = lock.is_inherited();
                self.publish(sealed, lock.fence(), is_inherited, edit)
                    .await?
            }
        };
        super::write::notify(self, version);
        Ok(version)
    }

    /// Seals the changes, signs the version, and publishes it. Unchanged chunks are reused as
    /// ciphertext.
    pub(super) async fn publish(
        &self,
        sealed: &SealedBlock,
        fence: u64,
        is_inherited: bool,
        edit: &Edit<'_>,
    ) -> Result<u64, Error> {
        let held = self.writable().await?;
        let attachment = held.attachment.filter(|_| !is_inherited);
        let mut writing = match &attachment {
            Some(attachment) => Some(super::write::begin(self, attachment, fence)?),
            None => None,
        };
        let base = self.base(sealed, edit).await?;
        let base = base.as_deref();
        let version = base.map_or(0, |base| base.manifest().version());
        if let Some(wanted) = edit.if_version.filter(|wanted| *wanted != version) {
            let text = format!("block '{}' has version {version}, not {wanted}", self.id());
            return Err(Error::new(Code::VersionConflict, text).with_ran(Ran::No));
        }
        if writing
            .as_ref()
            .is_some_and(|writing| writing.version() != version + 1)
        {
            return Err(contended(self.id()));
        }
        let old_length = base.map_or(sealed.size, |base| base.manifest().length());
        let length = edit.length.unwrap_or(old_length);
        if length > sealed.size {
            return Err(sealed.unsigned(PublishError::TooLarge(sealed.size)));
        }
        if edit.ends().any(|end| end.is_none_or(|end| end > length)) {
            return Err(write_error(self.id(), latzero_shm::WriteError::OutOfRange));
        }
        let (id, epoch, session) = sealed.pool.with_open(|epochs, session| {
            let epoch = epochs.current().descriptor().epoch();
            (sealed.id(epochs), epoch, session)
        })?;
        let next = Next {
            id,
            geometry: sealed.said.geometry,
            epoch,
            length,
            written_ms: now_ms(),
            session,
        };
        let number = next.version(base).map_err(|error| sealed.unsigned(error))?;
        let key = sealed.chunk_key(epoch)?;
        let mut target = self.target(sealed, writing.take(), base, length).await?;
        let carried = base.filter(|base| base.manifest().epoch() == epoch);
        let mut changed = Vec::new();
        let mut i = 0;
        while let Some(place) = sealed.said.geometry.chunk(i, length) {
            let start = u64::from(i) * CHUNK_BYTES as u64;
            let bytes = bytes_of(place.end - place.start)? - latzero_crypto::backend::TAG_BYTES;
            let end = start + bytes as u64;
            let is_same = carried.is_some()
                && sealed.said.geometry.chunk(i, old_length).as_ref() == Some(&place)
                && !edit.touches(start..end);
            if let Some(base) = carried.filter(|_| is_same) {
                self.carry(&mut target, base, i, place).await?;
            } else {
                let plain = match edit.whole(start..end) {
                    Some(bytes) => Cow::Borrowed(bytes),
                    None => {
                        let mut plain = vec![0; bytes];
                        if let Some(base) = base.filter(|_| !edit.covers(start..end)) {
                            let old = start..end.min(old_length).max(start);
                            let old = self.open_range(sealed, base, old).await?;
                            let old = old.ok_or_else(|| contended(self.id()))?;
                            plain[..old.len()].copy_from_slice(&old);
                        }
                        edit.apply(start, &mut plain);
                        Cow::Owned(plain)
                    }
                };
                let (entry, ciphertext) = key.seal(i, number, random()?, &plain);
                changed.push((i, entry));
                target
                    .put(place.start, &ciphertext)
                    .map_err(|e| write_error(self.id(), e))?;
            }
            i += 1;
        }
        let seal = sealed.pool.seal_key().ok_or_else(|| {
            let text = format!("the keys of pool '{}' lack the seal", sealed.pool.name());
            Error::new(Code::Forbidden, text).with_ran(Ran::No)
        })?;
        let signed = next
            .sign(base, &changed, seal)
            .map_err(|error| sealed.unsigned(error))?;
        target
            .put_head(&signed)
            .map_err(|e| write_error(self.id(), e))?;
        let version = signed.manifest().version();
        let published = self.finish(target, fence).await?;
        if published != version {
            let text = format!(
                "block '{}': version {version} was signed, and the server says that it published \
                {published}",
                self.id()
            );
            return Err(Error::new(Code::Integrity, text));
        }
        sealed.keep(signed);
        Ok(version)
    }

    /// The version that a change is based on. Its chunks that are not replaced are signed again
    /// unopened, so it must be valid; content that is too old is accepted only if it is
    /// overwritten.
    async fn base(
        &self,
        sealed: &SealedBlock,
        edit: &Edit<'_>,
    ) -> Result<Option<Arc<Verified>>, Error> {
        match self.verified(sealed, Oldest::Accepted).await {
            Err(error) if error.kind() == Code::StaleEpoch => {
                let base = self.verified(sealed, Oldest::Any).await?;
                let length = base.as_deref().map_or(0, |base| base.manifest().length());
                if edit.keeps_stale || edit.covers(0..edit.length.unwrap_or(length)) {
                    return Ok(base);
                }
                Err(error)
            }
            base => base,
        }
    }

    async fn target(
        &self,
        sealed: &SealedBlock,
        writing: Option<Writing>,
        base: Option<&Verified>,
        length: u64,
    ) -> Result<Target, Error> {
        let Some(mut writing) = writing else {
            let slot = |length| sealed.said.geometry.slot_len(length);
            let mut message = zeros(slot(length).unwrap_or(u64::MAX))?;
            if message.len() > self.room() {
                let text = format!(
                    "{} bytes do not fit into one message, and block '{}' is not mapped here",
                    message.len(),
                    self.id()
                );
                return Err(Error::new(Code::TooLarge, text).with_ran(Ran::No));
            }
            if let Some(base) = base.map(Verified::manifest) {
                let known = bytes_of(slot(base.length()).unwrap_or(0))?.min(message.len());
                if self.slot_into(0, &mut message[..known]).await? != base.version() {
                    return Err(contended(self.id()));
                }
            }
            return Ok(Target::Message(message));
        };
        let is_whole = writing
            .leave_behind()
            .map_err(|e| write_error(self.id(), e))?;
        let mut table = vec![0; base.map_or(0, |base| base.table().len() * ENTRY_BYTES)];
        writing
            .read_into(MANIFEST_BYTES as u64, &mut table)
            .map_err(|e| read_error(self.id(), e))?;
        Ok(Target::Slot {
            writing: Box::new(writing),
            table: is_whole.then_some(table),
        })
    }

    /// Copies a chunk from the previous version, unless it is there already.
    async fn carry(
        &self,
        target: &mut Target,
        base: &Verified,
        i: u32,
        place: Range<u64>,
    ) -> Result<(), Error> {
        let Target::Slot { writing, table } = target else {
            return Ok(());
        };
        let at = i as usize * ENTRY_BYTES;
        let line = base.table()[i as usize].to_bytes();
        let there = table
            .as_ref()
            .and_then(|table| table.get(at..at + ENTRY_BYTES));
        if there == Some(&line[..]) {
            return Ok(());
        }
        let mut chunk = zeros(place.end - place.start)?;
        if self.slot_into(place.start, &mut chunk).await? != base.manifest().version() {
            return Err(contended(self.id()));
        }
        let written = writing.write(place.start, &chunk);
        written.map_err(|e| write_error(self.id(), e))
    }

    async fn finish(&self, target: Target, fence: u64) -> Result<u64, Error> {
        match target {
            Target::Slot { writing, .. } => {
                writing.publish().map_err(|e| write_error(self.id(), e))
            }
            Target::Message(slot) => {
                let more = json!({"lock": fence.to_string()});
                let reply = self.ask_with("memory_write", &more, Some(&slot)).await?;
                let version = number(&reply, "version");
                self.shared().heard(version);
                Ok(version)
            }
        }
    }
}

impl Target {
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), latzero_shm::WriteError> {
        match self {
            Target::Slot { writing, .. } => writing.write(at, bytes),
            Target::Message(slot) => {
                let at = usize::try_from(at).expect("within the message");
                slot[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// Writes manifest and table; of a table that is there already only the lines that differ.
    fn put_head(&mut self, signed: &Verified) -> Result<(), latzero_shm::WriteError> {
        let table = match self {
            Target::Slot { table, .. } => table.take(),
            Target::Message(_) => None,
        };
        let table = table.filter(|table| table.len() == signed.table().len() * ENTRY_BYTES);
        let Some(table) = table else {
            return self.put(0, &signed.head());
        };
        let mut at = MANIFEST_BYTES as u64;
        for (there, entry) in table.chunks_exact(ENTRY_BYTES).zip(signed.table()) {
            let line = entry.to_bytes();
            if there != line {
                self.put(at, &line)?;
            }
            at += ENTRY_BYTES as u64;
        }
        self.put(0, signed.manifest().as_bytes())
    }
}

impl Under {
    async fn end(self) {
        if let Under::Taken(lock) = self {
            // The version is published or not, whatever happens to the lock.
            let _ = lock.unlock().await;
        }
    }
}

impl Edit<'_> {
    fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let writes = self.writes.iter();
        writes.map(|(at, bytes)| *at..at.saturating_add(bytes.len() as u64))
    }

    fn ends(&self) -> impl Iterator<Item = Option<u64>> {
        let writes = self.writes.iter();
        writes.map(|(at, bytes)| at.checked_add(bytes.len() as u64))
    }

    fn touches(&self, range: Range<u64>) -> bool {
        self.ranges()
            .any(|write| write.start < range.end && range.start < write.end)
    }

    /// Whether a single write replaces the whole range.
    fn covers(&self, range: Range<u64>) -> bool {
        self.ranges()
            .any(|write| write.start <= range.start && range.end <= write.end)
    }

    /// The bytes that replace the whole range, if no other write touches it.
    fn whole(&self, range: Range<u64>) -> Option<&[u8]> {
        let writes = self.writes.iter().zip(self.ranges());
        let mut touching =
            writes.filter(|(_, write)| write.start < range.end && range.start < write.end);
        let ((_, bytes), write) = touching.next()?;
        if touching.next().is_some() || range.end > write.end {
            return None;
        }
        let from = usize::try_from(range.start.checked_sub(write.start)?).ok()?;
        let length = usize::try_from(range.end - range.start).ok()?;
        bytes.get(from..from + length)
    }

    /// Writes into a chunk that begins at `start`.
    fn apply(&self, start: u64, plain: &mut [u8]) {
        let end = start + plain.len() as u64;
        for (at, bytes) in self.writes {
            let (from, to) = (start.max(*at), end.min(at + bytes.len() as u64));
            if from >= to {
                continue;
            }
            let index = |at: u64, base: u64| usize::try_from(at - base).expect("within a chunk");
            let source = &bytes[index(from, *at)..index(to, *at)];
            plain[index(from, start)..index(to, start)].copy_from_slice(source);
        }
    }
}

/// Converts a number of bytes to `usize`.
fn bytes_of(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| too_large())
}

/// A buffer of zeros, if there is enough memory.
fn zeros(bytes: u64) -> Result<Vec<u8>, Error> {
    let bytes = bytes_of(bytes)?;
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(bytes).map_err(|_| too_large())?;
    zeros.resize(bytes, 0);
    Ok(zeros)
}

fn too_large() -> Error {
    let text = "the block is larger than this machine's memory";
    Error::new(Code::TooLarge, text).with_ran(Ran::No)
}
