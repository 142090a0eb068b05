//! Access to a version in place: pointers and copies of single numbers, with a check afterwards
//! whether they were consistent.

use std::io;
use std::sync::Arc;

use crate::attachment::{Attachment, Bytes};
use crate::element::Element;
use crate::format::State;
use crate::geometry::Geometry;
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots::{self, ReadError};

/// How many times a view is tried before the block counts as contended.
const TRIES: u32 = 1_000;

impl Attachment {
    /// The newest version in place, without a copy.
    ///
    /// # Errors
    /// If the block is not sealed memory (a file could be shortened under a pointer into it), or is
    /// contended.
    pub fn view(&self) -> Result<View<'_>, ReadError> {
        let Bytes::Mapped(mapped) = &self.bytes else {
            return Err(ReadError::Fault(Fault::Io(io::Error::new(
                io::ErrorKind::Unsupported,
                "a persistent block can only be read by copying, because its file could be \
                 shortened during a view",
            ))));
        };
        let geometry = self.expected.geometry;
        let mut tries = 0;
        loop {
            let head = slots::head(mapped, &geometry)?;
            let (slot, sequence) = if geometry.is_raw() {
                (0, Some(0))
            } else if head.version == 0 {
                // The slot that is written last: it still contains zeros, while the first version
                // may be in progress in the first slot.
                let slot = geometry.slots - 1;
                (
                    slot,
                    slots::settled(mapped, &slots::Head { version: 0, slot })?,
                )
            } else {
                (head.slot, slots::settled(mapped, &head)?)
            };
            if let Some(sequence) = sequence {
                return Ok(View {
                    bytes: Source::Slot {
                        mapped,
                        geometry,
                        slot,
                        sequence,
                    },
                    version: head.version,
                });
            }
            tries += 1;
            if tries > TRIES {
                return Err(ReadError::Contended);
            }
            mapped.relax(tries);
        }
    }
}

impl Attachment {
    /// The newest version in place, which keeps the mapping.
    ///
    /// # Errors
    /// As [`Attachment::view`].
    pub fn owned_view(self: &Arc<Self>) -> Result<OwnedView, ReadError> {
        let View { bytes, version } = self.view()?;
        let Source::Slot { slot, sequence, .. } = bytes else {
            unreachable!("an attachment gives a view of its slot");
        };
        Ok(OwnedView {
            attachment: Arc::clone(self),
            slot,
            sequence,
            version,
        })
    }
}

/// A version in place that keeps the mapping: its memory stays readable for as long as this exists,
/// even after the block was resized or removed or the server ended.
#[derive(Debug, Clone)]
pub struct OwnedView {
    attachment: Arc<Attachment>,
    slot: u32,
    sequence: u64,
    version: u64,
}

impl OwnedView {
    /// The same version, borrowed.
    #[must_use]
    pub fn get(&self) -> View<'_> {
        let Bytes::Mapped(mapped) = &self.attachment.bytes else {
            unreachable!("only mapped bytes give a view");
        };
        View {
            bytes: Source::Slot {
                mapped,
                geometry: self.attachment.expected.geometry,
                slot: self.slot,
                sequence: self.sequence,
            },
            version: self.version,
        }
    }

    pub(crate) fn attachment(&self) -> &Arc<Attachment> {
        &self.attachment
    }

    /// In which slot of the block it lies.
    #[must_use]
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether it is a view of this attachment.
    #[must_use]
    pub fn is_of(&self, attachment: &Arc<Attachment>) -> bool {
        Arc::ptr_eq(&self.attachment, attachment)
    }

    /// Whether the block has a newer generation, or was removed: then nothing will be written here
    /// any more.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.attachment.state() != State::Live
    }
}

/// A version in place. What was read through it is only valid if [`View::is_valid`] says so
/// afterwards.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    bytes: Source<'a>,
    version: u64,
}

#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Slot {
        mapped: &'a Mapped,
        geometry: Geometry,
        slot: u32,
        sequence: u64,
    },
    Copy(&'a [u8]),
}

impl<'a> View<'a> {
    /// A copy of a version.
    #[must_use]
    pub fn of_copy(bytes: &'a [u8], version: u64) -> View<'a> {
        View {
            bytes: Source::Copy(bytes),
            version,
        }
    }

    /// Which version it is; 0 reads as zeros.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether it has not been overwritten since it was taken. Always true for a raw block, whose
    /// users take its lock, and for a copy.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        match self.bytes {
            Source::Slot {
                mapped,
                geometry,
                slot,
                sequence,
            } => geometry.is_raw() || slots::is_untouched(mapped, slot, sequence).unwrap_or(false),
            Source::Copy(_) => true,
        }
    }

    /// The address of its first byte in this process. The bytes may change at any time, so no
    /// reference to them may be created. After a foreign library has read through this pointer,
    /// check [`View::is_valid`].
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        match self.bytes {
            Source::Slot {
                mapped,
                geometry,
                slot,
                ..
            } => {
                let at = usize::try_from(geometry.slot(slot)).expect("it is mapped");
                mapped.base().as_ptr().wrapping_add(at)
            }
            Source::Copy(bytes) => bytes.as_ptr(),
        }
    }

    /// Bytes of the version.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self.bytes {
            Source::Slot { geometry, .. } => geometry.size,
            Source::Copy(bytes) => bytes.len() as u64,
        }
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// If they lie outside the block.
    pub fn copy_to(&self, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        match self.bytes {
            Source::Slot {
                mapped,
                geometry,
                slot,
                ..
            } => {
                if !geometry.contains(offset, to.len()) {
                    return Err(ReadError::OutOfRange);
                }
                mapped.read(geometry.slot(slot) + offset, to)?;
            }
            Source::Copy(bytes) => {
                let from = usize::try_from(offset)
                    .ok()
                    .and_then(|at| bytes.get(at..)?.get(..to.len()));
                to.copy_from_slice(from.ok_or(ReadError::OutOfRange)?);
            }
        }
        Ok(())
    }

    /// The number at `index`, counted in numbers of its type.
    ///
    /// # Errors
    /// If it lies outside the block.
    pub fn load<T: Element>(&self, index: u64) -> Result<T, ReadError> {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..T::BYTES];
        let offset = index.checked_mul(T::BYTES as u64);
        self.copy_to(offset.ok_or(ReadError::OutOfRange)?, bytes)?;
        Ok(T::from_le(bytes))
    }
}
