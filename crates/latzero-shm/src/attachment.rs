//! A client's side of a block: a descriptor that was passed to it, checked and mapped.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat};
use thiserror::Error;

use crate::file::FileMemory;
use crate::format::{Access, Description, FIXED_BYTES, HeaderError, State, at};
use crate::geometry::Geometry;
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots::{self, ReadError, Wait};

/// The server's description of the block that a descriptor must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its generation.
    pub generation: u64,
    /// Its geometry.
    pub geometry: Geometry,
    /// Whether it is a file; one that is not must be sealed.
    pub is_persistent: bool,
    /// The access that the descriptor must allow.
    pub access: Access,
}

impl Expected {
    /// Checks that a file is one of the block's length, and sealed if it is memory: then it can be
    /// mapped without a risk.
    pub(crate) fn check_memory(&self, file: impl AsFd) -> Result<(), AttachError> {
        let stat = fstat(&file).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(AttachError::NotAFile);
        }
        let (length, total) = (stat.st_size as u64, self.geometry.total());
        if length != total {
            return Err(AttachError::Length {
                length,
                expected: total,
            });
        }
        if !self.is_persistent {
            let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            let seals = fcntl_get_seals(&file).map_err(|_| AttachError::NotSealed)?;
            if !seals.contains(wanted) {
                return Err(AttachError::NotSealed);
            }
        }
        Ok(())
    }
}

/// Why a descriptor is not the block that was announced. It is closed.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The system refused.
    #[error("the descriptor is unusable: {0}")]
    Io(#[from] io::Error),
    /// It is not a regular file.
    #[error("the descriptor is not a regular file")]
    NotAFile,
    /// It has another length.
    #[error("the file has {length} bytes, not {expected}")]
    Length {
        /// The length that it has.
        length: u64,
        /// The length that it should have.
        expected: u64,
    },
    /// It could be shortened while it is mapped.
    #[error("the memory is not sealed against shrinking")]
    NotSealed,
    /// Its access mode is not the one that was granted.
    #[error("the descriptor's access mode is not the one that was granted")]
    AccessMode,
    /// Its header is invalid or belongs to another block.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mapped),
    /// A file that anybody may shorten is read and written, not mapped.
    File(FileMemory),
}

/// Does the same on either kind of bytes.
macro_rules! on {
    ($bytes:expr, $memory:ident => $what:expr) => {
        match $bytes {
            Bytes::Mapped($memory) => $what,
            Bytes::File($memory) => $what,
        }
    };
}

pub(crate) use on;

/// One generation of a block, attached.
#[derive(Debug)]
pub struct Attachment {
    pub(crate) bytes: Bytes,
    pub(crate) expected: Expected,
    /// Whether a write of this attachment is in progress: the lock of the block excludes other
    /// clients, and this excludes its own threads.
    pub(crate) is_writing: AtomicBool,
}

impl Attachment {
    /// Takes a descriptor from the server, and checks that it matches the server's description.
    ///
    /// # Errors
    /// If it does not, or cannot be mapped.
    pub fn new(file: OwnedFd, expected: &Expected) -> Result<Attachment, AttachError> {
        expected.check_memory(&file)?;
        let total = expected.geometry.total();
        let mode = fcntl_getfl(&file).map_err(io::Error::from)? & OFlags::ACCMODE;
        let granted = match expected.access {
            Access::Read => OFlags::RDONLY,
            Access::Write => OFlags::RDWR,
        };
        if mode != granted {
            return Err(AttachError::AccessMode);
        }
        let bytes = if expected.is_persistent {
            Bytes::File(FileMemory::new(Arc::new(file)))
        } else {
            Bytes::Mapped(Mapped::new(&file, total, expected.access)?)
        };
        let mut header = [0; FIXED_BYTES];
        on!(&bytes, memory => memory.read(0, &mut header))
            .map_err(|fault| HeaderError::Unreadable(fault.to_string()))?;
        let description = Description::decode(&header)?;
        for (holds, what) in [
            (description.geometry == expected.geometry, "geometry"),
            (description.generation == expected.generation, "generation"),
            (description.is_persistent == expected.is_persistent, "kind"),
        ] {
            if !holds {
                return Err(HeaderError::Unexpected(what).into());
            }
        }
        Ok(Attachment {
            bytes,
            expected: expected.clone(),
            is_writing: AtomicBool::new(false),
        })
    }

    /// How its bytes lie.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.expected.geometry
    }

    /// Its generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.expected.generation
    }

    /// Whether its bytes are mapped; a file's are not.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(_))
    }

    /// Its access.
    #[must_use]
    pub fn access(&self) -> Access {
        self.expected.access
    }

    /// The newest version; 0 if it was never written, or cannot be read any more.
    #[must_use]
    pub fn version(&self) -> u64 {
        let head = on!(&self.bytes, memory => slots::head(memory, &self.expected.geometry));
        head.map_or(0, |head| head.version)
    }

    /// The state of the block, from its header.
    #[must_use]
    pub fn state(&self) -> State {
        let word = on!(&self.bytes, memory => memory.load_half(at::STATE));
        word.map_or(State::Corrupt, State::of)
    }

    /// Copies bytes of one version out; returns the version.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<u64, ReadError> {
        let geometry = &self.expected.geometry;
        on!(&self.bytes, memory => slots::read(memory, geometry, offset, to, Wait::Wait))
    }

    /// Copies all of one version out; returns it with the version.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read(&self) -> Result<(Vec<u8>, u64), ReadError> {
        let size =
            usize::try_from(self.expected.geometry.size).map_err(|_| ReadError::OutOfRange)?;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(size)
            .map_err(|_| Fault::Io(io::ErrorKind::OutOfMemory.into()))?;
        let version = on!(&self.bytes, memory => {
            slots::consistent(memory, &self.expected.geometry, None, |slot| {
                bytes.clear();
                match slot {
                    Some(slot) => memory.append(slot, size, &mut bytes),
                    None => {
                        bytes.resize(size, 0);
                        Ok(())
                    }
                }
            })
        })?;
        Ok((bytes, version))
    }
}
