//! A block as the server has it: it makes and keeps the memory or file, and reads and writes it for those who can't map it.
//!
//! The server is not to die of what somebody does to a file. So payloads are only touched by pread and pwrite; what is mapped
//! is the header of a sealed memfd, which nobody can shorten.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, fallocate, fchmod, fcntl_add_seals,
    fdatasync, fstat, ftruncate, memfd_create, openat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::file::FileMemory;
use crate::format::{Access, Description, HEADER_BYTES, HeaderError, State, at};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots::{self, ReadError, Stamp, WriteError};

/// Longest name of a memfd in bytes (memfd_create(2)).
const NAME_BYTES_MAX: usize = 200;

/// Why a block can't be made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// There is no room for it.
    #[error("{needed} bytes are needed and {free} are free")]
    NoSpace {
        /// Bytes of the block, its header and slots included.
        needed: u64,
        /// Bytes that the memory or the disk has left.
        free: u64,
    },
    /// The system refused.
    #[error("{action} failed: {source}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Why a file can't be opened as a block.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused.
    #[error("it can't be opened: {0}")]
    Io(#[from] io::Error),
    /// Its header makes no sense.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It has another length than its header says.
    #[error("it has {length} bytes, and its header says {expected}")]
    Length {
        /// The length that it has.
        length: u64,
        /// The length that it should have.
        expected: u64,
    },
}

/// What became of a compare-and-swap.
#[derive(Debug, PartialEq, Eq)]
pub enum Cas {
    /// The bytes were as expected, and are new now.
    Swapped {
        /// The new version.
        version: u64,
    },
    /// The bytes are others; nothing was written.
    Differs {
        /// What stands there.
        current: Vec<u8>,
        /// In this version.
        version: u64,
    },
}

/// Words through the mapped header where there is one, everything else through the file.
#[derive(Debug)]
struct Kept {
    file: FileMemory,
    header: Option<Mapped>,
}

impl Kept {
    fn load_half(&self, at: u64) -> Result<u32, Fault> {
        match &self.header {
            Some(header) => header.load_half(at),
            None => self.file.load_half(at),
        }
    }

    fn store_half(&self, at: u64, value: u32) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.store_half(at, value),
            None => self.file.store_half(at, value),
        }
    }
}

impl Memory for Kept {
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault> {
        match &self.header {
            Some(header) => header.load(at, order),
            None => self.file.load(at, order),
        }
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.store(at, word, order),
            None => self.file.store(at, word, order),
        }
    }

    fn fence(&self, order: Ordering) {
        self.file.fence(order);
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        self.file.read(at, to)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        self.file.write(at, from)
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.notify(at),
            None => self.file.notify(at),
        }
    }
}

/// One generation of a block, as the server keeps it.
#[derive(Debug)]
pub struct Custodian {
    description: Description,
    writable: Arc<OwnedFd>,
    read_only: Option<Arc<OwnedFd>>,
    memory: Kept,
    /// One writer at a time on this side; on the other side the block's lock sees to it.
    writing: Mutex<()>,
}

impl Custodian {
    /// Makes a block of memory: all of it allocated, sealed against growing and shrinking, without a name that could be
    /// left behind. `name` is for people who look into `/proc`.
    ///
    /// # Errors
    /// [`CreateError::NoSpace`] where there is no room; nothing is left then.
    pub fn create_shared(name: &str, description: &Description) -> Result<Custodian, CreateError> {
        let name: String = name.chars().filter(|c| *c != '\0').collect();
        let mut end = name.len().min(NAME_BYTES_MAX);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = match memfd_create(&name[..end], flags | MemfdFlags::NOEXEC_SEAL) {
            // Before Linux 6.3.
            Err(Errno::INVAL) => memfd_create(&name[..end], flags),
            other => other,
        };
        let file = file.map_err(system("making a memfd"))?;
        prepare(&file, description, free_memory)?;
        let header = Mapped::new(file.as_fd(), HEADER_BYTES, Access::Write).map_err(|source| {
            CreateError::System {
                action: "mapping the header",
                source,
            }
        })?;
        // A writable mapping is no obstacle for these seals.
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(system("sealing the memfd"))?;
        fchmod(&file, Mode::from(0o600)).map_err(system("setting the memfd's mode"))?;
        Ok(Custodian::of(file, Some(header), description.clone()))
    }

    /// Makes a block in a new file of `directory`.
    ///
    /// # Errors
    /// [`CreateError::NoSpace`] where the disk has no room. The file may be there then, and is the caller's to remove.
    pub fn create_persistent(
        directory: BorrowedFd<'_>,
        file: &str,
        description: &Description,
    ) -> Result<Custodian, CreateError> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            openat(directory, file, flags, Mode::from(0o600)).map_err(system("making the file"))?;
        prepare(&file, description, free_disk)?;
        Ok(Custodian::of(file, None, description.clone()))
    }

    /// Opens a block's file.
    ///
    /// # Errors
    /// Where it is none, or not whole.
    pub fn open_persistent(directory: BorrowedFd<'_>, file: &str) -> Result<Custodian, OpenError> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(directory, file, flags, Mode::empty()).map_err(io::Error::from)?;
        let mut bytes = [0; 128];
        let got = rustix::io::pread(&file, &mut bytes, 0).map_err(io::Error::from)?;
        let description = Description::decode(&bytes[..got])?;
        let length = fstat(&file).map_err(io::Error::from)?.st_size as u64;
        let expected = description.geometry.total();
        if length != expected {
            return Err(OpenError::Length { length, expected });
        }
        Ok(Custodian::of(file, None, description))
    }

    fn of(file: OwnedFd, header: Option<Mapped>, description: Description) -> Custodian {
        let read_only = reopened(&file).map(Arc::new);
        let writable = Arc::new(file);
        Custodian {
            description,
            read_only,
            memory: Kept {
                file: FileMemory::new(Arc::clone(&writable)),
                header,
            },
            writable,
            writing: Mutex::new(()),
        }
    }

    /// The descriptor for writers.
    #[must_use]
    pub fn writable(&self) -> &Arc<OwnedFd> {
        &self.writable
    }

    /// The descriptor for readers, opened for reading alone; none where the system has no `/proc`.
    #[must_use]
    pub fn read_only(&self) -> Option<&Arc<OwnedFd>> {
        self.read_only.as_ref()
    }

    /// Device and inode of the file, by which it is known again.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = fstat(&self.writable)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// What never changes of it.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The newest version; 0 was never written.
    ///
    /// # Errors
    /// Where the head makes no sense or can't be read.
    pub fn version(&self) -> Result<u64, Fault> {
        Ok(slots::head(&self.memory, &self.description.geometry)?.version)
    }

    /// Copies bytes of one version out; returns the version.
    ///
    /// # Errors
    /// As [`ReadError`] says. With `if_version`, another version is an error.
    pub fn read(
        &self,
        offset: u64,
        to: &mut [u8],
        if_version: Option<u64>,
    ) -> Result<u64, ReadError> {
        self.check_fixed()?;
        let version = slots::read(&self.memory, &self.description.geometry, offset, to)?;
        match if_version {
            Some(wanted) if wanted != version => Err(ReadError::Version(version)),
            _ => Ok(version),
        }
    }

    /// Writes bytes as a new version; returns it.
    ///
    /// # Errors
    /// As [`WriteError`] says. With `if_version`, another version is an error.
    pub fn write(
        &self,
        offset: u64,
        bytes: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, WriteError> {
        if !self.description.geometry.contains(offset, bytes.len()) {
            return Err(WriteError::OutOfRange);
        }
        self.check_fixed()?;
        let _alone = self.alone();
        let current = self.version()?;
        if if_version.is_some_and(|wanted| wanted != current) {
            return Err(WriteError::Conflict { current });
        }
        self.publish(offset, bytes)
    }

    /// Writes bytes as a new version where `expected` stands, as many bytes.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn cas(&self, offset: u64, expected: &[u8], bytes: &[u8]) -> Result<Cas, WriteError> {
        if expected.len() != bytes.len() || !self.description.geometry.contains(offset, bytes.len())
        {
            return Err(WriteError::OutOfRange);
        }
        self.check_fixed()?;
        let _alone = self.alone();
        let mut current = vec![0; bytes.len()];
        let version = slots::read(
            &self.memory,
            &self.description.geometry,
            offset,
            &mut current,
        )?;
        if current != expected {
            return Ok(Cas::Differs { current, version });
        }
        Ok(Cas::Swapped {
            version: self.publish(offset, bytes)?,
        })
    }

    fn publish(&self, offset: u64, bytes: &[u8]) -> Result<u64, WriteError> {
        let mut draft = slots::begin(&self.memory, &self.description.geometry)?;
        draft.write(&self.memory, offset, bytes)?;
        Ok(draft.publish(&self.memory, self.stamp()?)?)
    }

    fn stamp(&self) -> Result<Stamp, Fault> {
        Ok(Stamp {
            fence: self.memory.load(at::FENCE, Ordering::Relaxed)?,
            unix_ns: unix_ns(),
            with_checksum: false,
        })
    }

    /// Shows writers the fence of the exclusive lock.
    ///
    /// # Errors
    /// Where it can't be written.
    pub fn set_lease(&self, fence: u64) -> Result<(), Fault> {
        self.memory.store(at::FENCE, fence, Ordering::Release)
    }

    /// Shows everybody what became of the block, and wakes who waits for it.
    ///
    /// # Errors
    /// Where it can't be written.
    pub fn set_state(&self, state: State) -> Result<(), Fault> {
        self.memory.store_half(at::STATE, state as u32)?;
        self.memory.notify(at::NOTIFY)
    }

    /// Copies the newest version into a fresh block, under the same number; bytes that the other does not have room for are
    /// left out, and what it has more is zeros. Returns the version.
    ///
    /// # Errors
    /// Where either can't be read or written.
    pub fn copy_to(&self, other: &Custodian) -> Result<u64, Fault> {
        let _alone = self.alone();
        let head = slots::head(&self.memory, &self.description.geometry)?;
        let from = &self.description.geometry;
        if head.version == 0 && !from.is_raw() {
            return Ok(0);
        }
        let mut draft = slots::begin(&other.memory, &other.description.geometry)?;
        let size = from.size.min(other.description.geometry.size);
        let mut piece = vec![0; usize::try_from(size.min(1024 * 1024)).expect("bounded")];
        let mut done = 0;
        while done < size {
            let n = usize::try_from((size - done).min(piece.len() as u64)).expect("bounded");
            self.memory
                .read(from.slot(head.slot % from.slots) + done, &mut piece[..n])?;
            let written = draft.write(&other.memory, done, &piece[..n]);
            written.map_err(|error| match error {
                WriteError::Fault(fault) => fault,
                _ => Fault::Corrupt("size"),
            })?;
            done += n as u64;
        }
        if head.version == 0 {
            return Ok(0);
        }
        draft.publish_as(&other.memory, head.version, self.stamp()?)
    }

    /// Looks at the header: that nobody wrote over what never changes, and that the head names a slot.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), HeaderError> {
        let unreadable = |fault: Fault| HeaderError::Unreadable(fault.to_string());
        let found = self.fixed().map_err(unreadable)?;
        if Description::decode(&found)? != self.description {
            return Err(HeaderError::Unexpected("description"));
        }
        let geometry = &self.description.geometry;
        slots::head(&self.memory, geometry).map_err(|_| HeaderError::Field("head"))?;
        let length =
            fstat(&self.writable).map_err(|error| HeaderError::Unreadable(error.to_string()))?;
        if (length.st_size as u64) < geometry.total() {
            return Err(HeaderError::Unreadable("the file was shortened".into()));
        }
        Ok(())
    }

    fn fixed(&self) -> Result<[u8; 128], Fault> {
        let mut bytes = [0; 128];
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let value = self.memory.load(8 * i as u64, Ordering::Relaxed)?;
            word.copy_from_slice(&value.to_le_bytes());
        }
        Ok(bytes)
    }

    /// A header that somebody wrote over makes the whole block suspect.
    fn check_fixed(&self) -> Result<(), Fault> {
        if self.fixed()? == self.description.encode() {
            Ok(())
        } else {
            Err(Fault::Corrupt("header"))
        }
    }

    /// Has all that was written so far reach the disk, with a checksum of the newest version; returns that version.
    ///
    /// # Errors
    /// Where the system refuses.
    pub fn sync(&self) -> Result<u64, Fault> {
        let _alone = self.alone();
        let geometry = &self.description.geometry;
        let head = slots::head(&self.memory, geometry)?;
        if head.version > 0 {
            let words = at::slot(head.slot);
            let version = self.memory.load(words + at::VERSION, Ordering::Acquire)?;
            let sum = slots::content_checksum(&self.memory, geometry, head.slot, version)?;
            self.memory
                .store(words + at::CHECKSUM, u64::from(sum), Ordering::Release)?;
        }
        fdatasync(&self.writable).map_err(io::Error::from)?;
        Ok(head.version)
    }

    /// The state that its header shows.
    ///
    /// # Errors
    /// Where it can't be read.
    pub fn state(&self) -> Result<State, Fault> {
        Ok(State::of(self.memory.load_half(at::STATE)?))
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        // Nothing is kept under this lock that a panic could have left half done: slots are begun again.
        self.writing
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Gives a new file its length, its memory and its header.
fn prepare(
    file: &OwnedFd,
    description: &Description,
    free: impl FnOnce(&OwnedFd) -> u64,
) -> Result<(), CreateError> {
    let needed = description.geometry.total();
    // Without this a full memory would be a signal at the first touch, not an error here.
    let allocated = ftruncate(file, needed).and_then(|()| {
        loop {
            match fallocate(file, FallocateFlags::empty(), 0, needed) {
                Err(Errno::INTR) => {}
                other => return other,
            }
        }
    });
    match allocated {
        Ok(()) => {}
        Err(Errno::NOSPC | Errno::NOMEM | Errno::DQUOT | Errno::FBIG) => {
            let free = free(file);
            return Err(CreateError::NoSpace { needed, free });
        }
        Err(error) => return Err(system("allocating the block")(error)),
    }
    let header = description.encode();
    match rustix::io::pwrite(file, &header, 0) {
        Ok(n) if n == header.len() => Ok(()),
        Ok(_) => Err(system("writing the header")(Errno::IO)),
        Err(error) => Err(system("writing the header")(error)),
    }
}

fn system(action: &'static str) -> impl Fn(Errno) -> CreateError {
    move |errno| CreateError::System {
        action,
        source: errno.into(),
    }
}

fn free_memory(_file: &OwnedFd) -> u64 {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    #[allow(
        clippy::useless_conversion,
        reason = "the fields are 32 bits wide on 32-bit systems"
    )]
    let pages = u64::from(info.freeram).saturating_add(u64::from(info.freeswap));
    pages.saturating_mul(unit)
}

fn free_disk(file: &OwnedFd) -> u64 {
    rustix::fs::fstatvfs(file).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The same file, opened for reading alone: another description, which the kernel lets nobody map writable.
fn reopened(file: &OwnedFd) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

pub(crate) fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}
