//! A version that a client is writing.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::attachment::{Attachment, Bytes, on};
use crate::custodian::unix_ns;
use crate::format::{Access, State, at};
use crate::memory::Memory;
use crate::slots::{self, Draft, ReadError, Stamp, WriteError};

impl Attachment {
    /// Begins the next version, under the lock with this fence.
    ///
    /// # Errors
    /// [`WriteError::LeaseLost`] if the header shows another fence, [`WriteError::Contended`] if
    /// another thread has a write of this attachment in progress.
    pub fn begin(self: &Arc<Self>, fence: u64) -> Result<Writing, WriteError> {
        if self.expected.access != Access::Write {
            return Err(WriteError::ReadOnly);
        }
        self.check_lease(fence)?;
        if self.is_writing.swap(true, Acquire) {
            return Err(WriteError::Contended);
        }
        let turn = WriteGuard(Arc::clone(self));
        let draft = on!(&self.bytes, memory => slots::begin(memory, &self.expected.geometry))?;
        Ok(Writing { draft, fence, turn })
    }

    fn check_lease(&self, fence: u64) -> Result<(), WriteError> {
        let current = on!(&self.bytes, memory => memory.load(at::FENCE, Acquire))?;
        if current == fence && self.state() == State::Live {
            Ok(())
        } else {
            Err(WriteError::LeaseLost)
        }
    }
}

/// A version in progress. If it is dropped, it is discarded. In a raw block, which is written in
/// place, the bytes stay but there is no new version.
#[derive(Debug)]
#[must_use]
pub struct Writing {
    draft: Draft,
    fence: u64,
    turn: WriteGuard,
}

/// The attachment's turn to write, over when this is dropped.
#[derive(Debug)]
struct WriteGuard(Arc<Attachment>);

impl Drop for WriteGuard {
    fn drop(&mut self) {
        self.0.is_writing.store(false, Release);
    }
}

impl Writing {
    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let draft = &mut self.draft;
        on!(&self.turn.0.bytes, memory => draft.write(memory, offset, bytes))
    }

    /// Writes `byte` over `length` bytes from `offset` on.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn fill(&mut self, offset: u64, length: u64, byte: u8) -> Result<(), WriteError> {
        let draft = &mut self.draft;
        on!(&self.turn.0.bytes, memory => draft.fill(memory, offset, length, byte))
    }

    /// Leaves it to the caller to bring the version up to date: from here on [`Writing::read_into`]
    /// returns the content of the slot that is written. Returns whether that is one complete
    /// published version; if not, it may be anything. For a block with snapshots whose content
    /// itself shows which parts differ.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn leave_behind(&mut self) -> Result<bool, WriteError> {
        let draft = &mut self.draft;
        Ok(on!(&self.turn.0.bytes, memory => draft.leave_behind(memory))?)
    }

    /// Whether the bytes are mapped, so that [`Writing::expose`] works.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.turn.0.bytes, Bytes::Mapped(_))
    }

    /// Prepares `length` bytes from `offset` on for writing in place. With `keeps` they start as a
    /// copy of the previous version; otherwise they contain arbitrary old bytes, and all of them
    /// must be written.
    ///
    /// # Errors
    /// As [`WriteError`] says; [`WriteError::ReadOnly`] if the bytes are not mapped.
    pub fn expose(&mut self, offset: u64, length: u64, keeps: bool) -> Result<Exposed, WriteError> {
        let Bytes::Mapped(mapped) = &self.turn.0.bytes else {
            return Err(WriteError::ReadOnly);
        };
        let at = self.draft.expose(mapped, offset, length, keeps)?;
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| WriteError::OutOfRange);
        Ok(Exposed {
            attachment: Arc::clone(&self.turn.0),
            at: size(at)?,
            length: size(length)?,
        })
    }

    /// The version that this will be.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.draft.version()
    }

    /// Reads bytes of this version: what was written, and elsewhere the content of the previous
    /// one.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        let draft = &self.draft;
        on!(&self.turn.0.bytes, memory => draft.read(memory, offset, to))
    }

    /// Publishes it and wakes waiting readers; returns the version.
    ///
    /// # Errors
    /// [`WriteError::LeaseLost`] if the lock is no longer held; nothing is published then.
    pub fn publish(self) -> Result<u64, WriteError> {
        self.turn.0.check_lease(self.fence)?;
        let stamp = Stamp {
            fence: self.fence,
            unix_ns: unix_ns(),
        };
        let draft = self.draft;
        let version = on!(&self.turn.0.bytes, memory => draft.publish(memory, stamp));
        Ok(version?)
    }
}

/// Bytes of a version in progress, in place. They stay mapped for as long as this exists. Writing
/// them after the version was published or dropped changes what readers see.
#[derive(Debug, Clone)]
pub struct Exposed {
    attachment: Arc<Attachment>,
    at: usize,
    length: usize,
}

impl Exposed {
    /// The address of the first byte in this process.
    #[must_use]
    pub fn as_mut_ptr(&self) -> *mut u8 {
        let Bytes::Mapped(mapped) = &self.attachment.bytes else {
            unreachable!("only mapped bytes are exposed");
        };
        mapped.base().as_ptr().wrapping_add(self.at)
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}
