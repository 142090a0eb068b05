//! A block as a client has it: a descriptor that was passed to it, checked and mapped.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags, SealFlags, fcntl_get_seals, fcntl_getfl, fstat};
use thiserror::Error;

use crate::custodian::unix_ns;
use crate::element::Element;
use crate::file::FileMemory;
use crate::format::{Access, Description, Geometry, HeaderError, State, at};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots::{self, Draft, ReadError, Stamp, WriteError};

/// The longest single sleep of a wait: a change that comes without a wake-up is seen after it.
const SLEEP_MAX: Duration = Duration::from_secs(1);

/// What the server said of the block that a descriptor is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its generation.
    pub generation: u64,
    /// How its bytes lie.
    pub geometry: Geometry,
    /// Whether it is a file; one that is not must be sealed.
    pub is_persistent: bool,
    /// What the descriptor must allow.
    pub access: Access,
}

/// Why a descriptor is not the block that was announced. It is closed.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The system refused.
    #[error("the descriptor can't be used: {0}")]
    Io(#[from] io::Error),
    /// It is something else than a file.
    #[error("the descriptor is no regular file")]
    NotAFile,
    /// It has another length.
    #[error("the file has {length} bytes, not {expected}")]
    Length {
        /// The length that it has.
        length: u64,
        /// The length that it should have.
        expected: u64,
    },
    /// It may be shortened under whoever maps it.
    #[error("the memory is not sealed against shrinking")]
    NotSealed,
    /// It allows more or less than was granted.
    #[error("the descriptor's access mode is not the one that was granted")]
    AccessMode,
    /// Its header is another block's.
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// There is a newer version: this one.
    Newer(u64),
    /// A newer generation took the block's place: attach again.
    Superseded,
    /// The block was removed.
    Closed,
    /// The time is over.
    TimedOut,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mapped),
    /// A file that anybody may shorten is read and written, not mapped.
    File(FileMemory),
}

macro_rules! on {
    ($bytes:expr, $memory:ident => $what:expr) => {
        match $bytes {
            Bytes::Mapped($memory) => $what,
            Bytes::File($memory) => $what,
        }
    };
}

/// One generation of a block, attached.
#[derive(Debug)]
pub struct Attachment {
    bytes: Bytes,
    expected: Expected,
}

impl Attachment {
    /// Takes a descriptor that the server passed, after checking that it is what the server said.
    ///
    /// # Errors
    /// Where it is not, or can't be mapped.
    pub fn new(file: OwnedFd, expected: &Expected) -> Result<Attachment, AttachError> {
        let stat = fstat(&file).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(AttachError::NotAFile);
        }
        let (length, total) = (stat.st_size as u64, expected.geometry.total());
        if length != total {
            return Err(AttachError::Length {
                length,
                expected: total,
            });
        }
        if !expected.is_persistent {
            let wanted = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            let seals = fcntl_get_seals(&file).map_err(|_| AttachError::NotSealed)?;
            if !seals.contains(wanted) {
                return Err(AttachError::NotSealed);
            }
        }
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
        let mut header = [0; 128];
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

    /// What it allows.
    #[must_use]
    pub fn access(&self) -> Access {
        self.expected.access
    }

    /// The newest version; 0 was never written, or can't be read any more.
    #[must_use]
    pub fn version(&self) -> u64 {
        let head = on!(&self.bytes, memory => slots::head(memory, &self.expected.geometry));
        head.map_or(0, |head| head.version)
    }

    /// What became of the block, as its header says.
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
        on!(&self.bytes, memory => slots::read(memory, &self.expected.geometry, offset, to))
    }

    /// Copies all of one version out; returns it with the version.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read(&self) -> Result<(Vec<u8>, u64), ReadError> {
        let size =
            usize::try_from(self.expected.geometry.size).map_err(|_| ReadError::OutOfRange)?;
        let mut bytes = vec![0; size];
        let version = self.read_into(0, &mut bytes)?;
        Ok((bytes, version))
    }

    /// Waits until there is a version newer than `beyond`, without the server.
    #[must_use]
    pub fn wait(&self, beyond: u64, timeout: Option<Duration>) -> Waited {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let page = match &self.bytes {
            Bytes::Mapped(mapped) => Some(mapped),
            Bytes::File(file) => file.page(),
        };
        loop {
            // Read before what it announces, so that a change in between ends the sleep at once.
            let seen = on!(&self.bytes, memory => memory.load_half(at::NOTIFY)).unwrap_or(0);
            let version = self.version();
            if version > beyond {
                return Waited::Newer(version);
            }
            match self.state() {
                State::Live => {}
                State::Superseded => return Waited::Superseded,
                State::Closed | State::Corrupt => return Waited::Closed,
            }
            let left = match deadline {
                None => SLEEP_MAX,
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => left.min(SLEEP_MAX),
                    _ => return Waited::TimedOut,
                },
            };
            let slept = page.map(|page| page.wait(at::NOTIFY, seen, Some(left)));
            if !matches!(slept, Some(Ok(()))) {
                // The futex can't be had: look again soon.
                std::thread::sleep(left.min(Duration::from_millis(20)));
            }
        }
    }

    /// The newest version in place, without a copy.
    ///
    /// # Errors
    /// Where the block is no sealed memory (a file could be shortened under a pointer into it), or is contended.
    pub fn view(&self) -> Result<View<'_>, ReadError> {
        let Bytes::Mapped(mapped) = &self.bytes else {
            return Err(ReadError::Fault(Fault::Io(io::Error::new(
                io::ErrorKind::Unsupported,
                "a persistent block is read by copies: its file could be shortened under a view",
            ))));
        };
        let geometry = self.expected.geometry;
        let mut tries = 0;
        loop {
            let head = slots::head(mapped, &geometry)?;
            let slot = head.slot % geometry.slots;
            let sequence = mapped.load(at::slot(slot) + at::SEQUENCE, Acquire)?;
            if sequence & 1 == 0 || head.version == 0 || geometry.is_raw() {
                return Ok(View {
                    mapped,
                    geometry,
                    slot,
                    sequence,
                    version: head.version,
                });
            }
            tries += 1;
            if tries > 1_000 {
                return Err(ReadError::Contended);
            }
            mapped.relax(tries);
        }
    }

    /// Begins the next version, under the lock with this fence.
    ///
    /// # Errors
    /// [`WriteError::LeaseLost`] where the header shows another fence.
    pub fn begin(self: &Arc<Self>, fence: u64) -> Result<Writing, WriteError> {
        if self.expected.access != Access::Write {
            return Err(WriteError::ReadOnly);
        }
        self.check_lease(fence)?;
        let draft = on!(&self.bytes, memory => slots::begin(memory, &self.expected.geometry))?;
        Ok(Writing {
            attachment: Arc::clone(self),
            draft,
            fence,
        })
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

/// A version under way. Dropped, it never was.
#[derive(Debug)]
#[must_use]
pub struct Writing {
    attachment: Arc<Attachment>,
    draft: Draft,
    fence: u64,
}

impl Writing {
    /// The version that this will be.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.draft.version()
    }

    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        let draft = &mut self.draft;
        on!(&self.attachment.bytes, memory => draft.write(memory, offset, bytes))
    }

    /// Reads bytes of this version: what was written, and else what the one before has.
    ///
    /// # Errors
    /// As [`ReadError`] says.
    pub fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        on!(&self.attachment.bytes, memory => self.draft.read(memory, offset, to))
    }

    /// Lets readers see it, and wakes who waits; returns the version.
    ///
    /// # Errors
    /// [`WriteError::LeaseLost`] where the lock is held no longer: nobody sees it then.
    pub fn publish(self) -> Result<u64, WriteError> {
        self.attachment.check_lease(self.fence)?;
        let stamp = Stamp {
            fence: self.fence,
            unix_ns: unix_ns(),
            with_checksum: false,
        };
        let draft = self.draft;
        let version = on!(&self.attachment.bytes, memory => draft.publish(memory, stamp));
        Ok(version?)
    }
}

/// A version in place. What is read through it is only to be trusted if [`View::is_valid`] says so afterwards.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    mapped: &'a Mapped,
    geometry: Geometry,
    slot: u32,
    sequence: u64,
    version: u64,
}

impl View<'_> {
    /// Which version it is; 0 reads as zeros.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether nobody has begun to write over it since it was taken. Always true of a raw block, whose users take its lock.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.mapped.fence(Acquire);
        let sequence = self
            .mapped
            .load(at::slot(self.slot) + at::SEQUENCE, Relaxed);
        self.geometry.is_raw() || matches!(sequence, Ok(now) if now == self.sequence)
    }

    /// Where its first byte lies in this process. The bytes may change at any time, so no reference to them may be made; a
    /// foreign library that reads through this pointer has to be told [`View::is_valid`] afterwards.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        let at = usize::try_from(self.geometry.slot(self.slot)).expect("it is mapped");
        self.mapped.base().as_ptr().wrapping_add(at)
    }

    /// Bytes of the version.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.geometry.size
    }

    /// Whether it has no bytes; a block always has some.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// Where they lie outside the block.
    pub fn copy_to(&self, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        if !self.geometry.contains(offset, to.len()) {
            return Err(ReadError::OutOfRange);
        }
        self.mapped
            .read(self.geometry.slot(self.slot) + offset, to)?;
        Ok(())
    }

    /// The number at `index`, counted in numbers of its type.
    ///
    /// # Errors
    /// Where it lies outside the block.
    pub fn load<T: Element>(&self, index: u64) -> Result<T, ReadError> {
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..T::BYTES];
        let offset = index.checked_mul(T::BYTES as u64);
        self.copy_to(offset.ok_or(ReadError::OutOfRange)?, bytes)?;
        Ok(T::from_le(bytes))
    }
}
