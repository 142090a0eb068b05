//! Writing versions: one under its own lock, or many under one lock.

use latzero_protocol::Code;
use latzero_shm::{Attachment, Exposed, Writing};
use serde_json::json;
use std::sync::Arc;

use super::lock::BlockLock;
use super::sealed::{Edit, SealedBlock};
use super::{Block, read_error, write_error};
use crate::error::Error;
use crate::sync::lock;

/// A version that is being written, under the block's lock. Nobody sees it before it is committed.
///
/// If the block is mapped, bytes are written in place, into a slot that readers do not use. If it
/// is not mapped, or is sealed, they are collected here and sent with the commit, as one version if
/// they fit into one request.
#[derive(Debug)]
pub struct Draft {
    lock: Option<BlockLock>,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    InPlace(Option<Box<Writing>>),
    Waiting(Vec<(u64, Vec<u8>)>),
}

impl Draft {
    pub(super) async fn begin(held: BlockLock) -> Result<Draft, Error> {
        let block = held.block().clone();
        let attached = block.writable().await?;
        let bytes = match &attached.attachment {
            Some(attachment) if !held.is_inherited() && block.sealed().is_none() => {
                let writing = begin(&block, attachment, held.fence())?;
                Bytes::InPlace(Some(Box::new(writing)))
            }
            _ => Bytes::Waiting(Vec::new()),
        };
        Ok(Draft {
            lock: Some(held),
            bytes,
        })
    }

    fn block(&self) -> &Block {
        self.lock.as_ref().expect("only the end takes it").block()
    }

    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// `out_of_range`; nothing was written.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let block = self.block().clone();
        match &mut self.bytes {
            Bytes::InPlace(writing) => writing
                .as_mut()
                .expect("only the end takes it")
                .write(offset, bytes)
                .map_err(|e| write_error(block.id(), e)),
            Bytes::Waiting(waiting) => {
                let end = offset.checked_add(bytes.len() as u64);
                if end.is_none_or(|end| end > block.size()) {
                    return Err(write_error(block.id(), latzero_shm::WriteError::OutOfRange));
                }
                waiting.push((offset, bytes.to_vec()));
                Ok(())
            }
        }
    }

    /// Reads bytes of the draft from `offset` on: what was written, and elsewhere the content of
    /// the previous version.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub async fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        let block = self.block();
        match &self.bytes {
            Bytes::InPlace(writing) => writing
                .as_ref()
                .expect("only the end takes it")
                .read_into(offset, to)
                .map_err(|e| read_error(block.id(), e)),
            Bytes::Waiting(waiting) => {
                // Under the lock nobody else writes, so the previous version is still the newest.
                block.read_into(offset, to).await?;
                for (at, bytes) in waiting {
                    let from = offset.max(*at);
                    let end = (offset + to.len() as u64).min(at + bytes.len() as u64);
                    if from < end {
                        let place = |base: u64| {
                            let index = |at: u64| usize::try_from(at - base);
                            index(from).and_then(|from| Ok(from..index(end)?))
                        };
                        if let (Ok(into), Ok(out)) = (place(offset), place(*at)) {
                            to[into].copy_from_slice(&bytes[out]);
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// Whether it is written into the mapped block, so that [`Draft::expose`] works.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        matches!(&self.bytes, Bytes::InPlace(Some(writing)) if writing.is_mapped())
    }

    /// Prepares `length` bytes from `offset` on for writing in place; see [`Writing::expose`].
    ///
    /// # Errors
    /// `out_of_range`; `storage` if the block is not mapped.
    pub fn expose(&mut self, offset: u64, length: u64, keeps: bool) -> Result<Exposed, Error> {
        let block = self.block().clone();
        match &mut self.bytes {
            Bytes::InPlace(Some(writing)) if writing.is_mapped() => writing
                .expose(offset, length, keeps)
                .map_err(|e| write_error(block.id(), e)),
            _ => Err(super::not_mapped(block.id(), "write")),
        }
    }

    /// Publishes the version and releases the lock; returns the version.
    ///
    /// # Errors
    /// `lock_lost` if the lock was lost in the meantime: the version is not published.
    pub async fn commit(mut self) -> Result<u64, Error> {
        let held = self.lock.take().expect("only the end takes it");
        held.check()?;
        let block = held.block().clone();
        let version = match std::mem::replace(&mut self.bytes, Bytes::Waiting(Vec::new())) {
            Bytes::InPlace(writing) => {
                let writing = writing.expect("only the end takes it");
                let version = writing.publish().map_err(|e| write_error(block.id(), e))?;
                notify(&block, version);
                version
            }
            Bytes::Waiting(waiting) => {
                let mut version = block.version();
                if let Some(sealed) = block.sealed() {
                    version = publish_sealed(sealed, &held, &waiting).await?;
                    notify(&block, version);
                } else if let Some((offset, bytes)) = one_range(&block, &waiting).await? {
                    version = block
                        .write_through(offset, &bytes, None, Some(held.fence()))
                        .await?;
                }
                version
            }
        };
        // The version is already published, whatever happens to the lock.
        let _ = held.unlock().await;
        Ok(version)
    }

    /// Discards the version: it is never published.
    pub fn abandon(mut self) {
        self.bytes = Bytes::Waiting(Vec::new());
        self.lock = None;
    }
}

/// The pieces as one range, so that they are one version: the bytes between the pieces are read
/// first.
async fn one_range(
    block: &Block,
    waiting: &[(u64, Vec<u8>)],
) -> Result<Option<(u64, Vec<u8>)>, Error> {
    let start = waiting.iter().map(|(offset, _)| *offset).min();
    let end = waiting
        .iter()
        .map(|(at, bytes)| at + bytes.len() as u64)
        .max();
    let (Some(start), Some(end)) = (start, end) else {
        return Ok(None);
    };
    if let [(offset, bytes)] = waiting {
        return Ok(Some((*offset, bytes.clone())));
    }
    let length = usize::try_from(end - start).map_err(|_| {
        Error::new(
            Code::TooLarge,
            "the range is larger than this machine's memory",
        )
    })?;
    let mut range = vec![0; length];
    block.read_into(start, &mut range).await?;
    for (offset, bytes) in waiting {
        let at = usize::try_from(offset - start).expect("within the range");
        range[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok(Some((start, range)))
}

impl Drop for Draft {
    fn drop(&mut self) {
        let Some(held) = self.lock.take() else { return };
        if std::thread::panicking() {
            // It may be incomplete.
            return;
        }
        let block = held.block().clone();
        let result = match &mut self.bytes {
            Bytes::InPlace(writing) => match writing.take() {
                Some(writing) => writing
                    .publish()
                    .map_err(|e| write_error(block.id(), e))
                    .map(|version| notify(&block, version)),
                None => Ok(()),
            },
            // It is not possible to wait for a request here.
            Bytes::Waiting(waiting) if !waiting.is_empty() => Err(Error::new(
                Code::Cancelled,
                format!(
                    "a draft of block '{}' was dropped without `commit`, and is not mapped: \
                    the version was not published",
                    block.id()
                ),
            )),
            Bytes::Waiting(_) => Ok(()),
        };
        if let Err(error) = result {
            *lock(&block.shared().fault) = Some(error);
        }
    }
}

/// Writes many versions under one lock, without the server.
#[derive(Debug)]
pub struct BlockWriter {
    lock: BlockLock,
    tells_server: bool,
}

impl BlockWriter {
    pub(super) async fn new(held: BlockLock) -> Result<BlockWriter, Error> {
        held.block().writable().await?;
        Ok(BlockWriter {
            lock: held,
            tells_server: true,
        })
    }

    /// The lock under which it writes.
    #[must_use]
    pub fn lock(&self) -> &BlockLock {
        &self.lock
    }

    /// Whether each version is announced to the server (the default), for subscribers and for
    /// clients that cannot map the block. Clients that wait on a mapping are always woken.
    pub fn tell_server(&mut self, tells: bool) {
        self.tells_server = tells;
    }

    /// Writes one version with several pieces, each from its offset on; later ones count where they
    /// overlap. The lock stays for the next one, in encrypted pools too.
    ///
    /// # Errors
    /// `out_of_range`: nothing was written; `lock_lost`.
    pub async fn write_pieces(&self, pieces: &[(u64, Vec<u8>)]) -> Result<u64, Error> {
        self.lock.check()?;
        let block = self.lock.block();
        let has_mapping = block.writable().await?.attachment.is_some();
        if block.sealed().is_none() && has_mapping && !self.lock.is_inherited() {
            let mut writing = self.begin()?;
            for (offset, bytes) in pieces {
                let written = writing.write(*offset, bytes);
                written.map_err(|e| write_error(block.id(), e))?;
            }
            return self.publish(writing);
        }
        if let Some(sealed) = block.sealed() {
            let version = publish_sealed(sealed, &self.lock, pieces).await?;
            if self.tells_server {
                notify(block, version);
            }
            return Ok(version);
        }
        match one_range(block, pieces).await? {
            Some((offset, bytes)) => {
                let fence = Some(self.lock.fence());
                block.write_through(offset, &bytes, None, fence).await
            }
            None => Ok(block.version()),
        }
    }

    /// Begins a version, which [`Writing::publish`] of the mapped block or [`BlockWriter::publish`]
    /// publishes.
    ///
    /// # Errors
    /// `lock_lost`; `storage` if the block is not mapped, or sealed: use [`BlockWriter::write`] or
    /// [`BlockWriter::write_pieces`] instead.
    pub fn begin(&self) -> Result<Writing, Error> {
        let block = self.lock.block();
        self.lock.check()?;
        let attachment = lock(&block.shared().current).attachment.clone();
        let attachment =
            attachment.filter(|_| !self.lock.is_inherited() && block.sealed().is_none());
        let attachment = attachment.ok_or_else(|| super::not_mapped(block.id(), "write"))?;
        begin(block, &attachment, self.lock.fence())
    }

    /// Begins one last version, at whose end the lock is released.
    ///
    /// # Errors
    /// `lock_lost`, and as [`Block::read`].
    pub async fn into_draft(self) -> Result<Draft, Error> {
        self.lock.check()?;
        Draft::begin(self.lock).await
    }

    /// Makes `length` bytes of a version from `offset` on ready to be written in place; see
    /// [`Writing::expose`].
    ///
    /// # Errors
    /// `out_of_range`; `storage` if the block is not mapped.
    pub fn expose(
        &self,
        writing: &mut Writing,
        offset: u64,
        length: u64,
        keeps: bool,
    ) -> Result<Exposed, Error> {
        let id = self.lock.block().id();
        let exposed = writing.expose(offset, length, keeps);
        exposed.map_err(|e| write_error(id, e))
    }

    /// Publishes a version; returns its number.
    ///
    /// # Errors
    /// `lock_lost`: the version is not published.
    pub fn publish(&self, writing: Writing) -> Result<u64, Error> {
        let block = self.lock.block();
        let version = writing.publish().map_err(|e| write_error(block.id(), e))?;
        if self.tells_server {
            notify(block, version);
        }
        Ok(version)
    }

    /// Writes one version that has these bytes from `offset` on.
    ///
    /// # Errors
    /// `out_of_range`, `lock_lost`.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.lock.check()?;
        let block = self.lock.block();
        if let Some(sealed) = block.sealed() {
            let writes = [(offset, bytes.to_vec())];
            let version = publish_sealed(sealed, &self.lock, &writes).await?;
            if self.tells_server {
                notify(block, version);
            }
            return Ok(version);
        }
        let is_mapped = block.writable().await?.attachment.is_some();
        if !is_mapped || self.lock.is_inherited() {
            return block
                .write_through(offset, bytes, None, Some(self.lock.fence()))
                .await;
        }
        let mut writing = self.begin()?;
        let id = self.lock.block().id();
        writing
            .write(offset, bytes)
            .map_err(|e| write_error(id, e))?;
        self.publish(writing)
    }
}

/// Publishes one version of a sealed block that has these bytes.
async fn publish_sealed(
    sealed: &SealedBlock,
    held: &BlockLock,
    writes: &[(u64, Vec<u8>)],
) -> Result<u64, Error> {
    let edit = Edit {
        writes,
        ..Edit::default()
    };
    let block = held.block();
    let is_inherited = held.is_inherited();
    block
        .publish(sealed, held.fence(), is_inherited, &edit)
        .await
}

pub(super) fn begin(
    block: &Block,
    attachment: &Arc<Attachment>,
    fence: u64,
) -> Result<Writing, Error> {
    attachment
        .begin(fence)
        .map_err(|e| write_error(block.id(), e))
}

/// Announces a version that was written through the mapping.
pub(super) fn notify(block: &Block, version: u64) {
    let shared = block.shared();
    shared.heard(version);
    let message = shared.message("memory_notify", &json!({"version": version}));
    block.app().core().send_oneway(message);
}
