//! Creates blocks. The memory of a block is allocated completely, so that a lack of memory or disk
//! space is an error here and not a signal at the first access.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::fs::{
    FallocateFlags, FileType, MemfdFlags, Mode, OFlags, SealFlags, fallocate, fchmod,
    fcntl_add_seals, fstat, ftruncate, memfd_create, openat,
};
use rustix::io::Errno;
use thiserror::Error;

use crate::block_memory::BlockMemory;
use crate::custodian::Custodian;
use crate::file::FileMemory;
use crate::format::{Access, Description, FIXED_BYTES, HEADER_BYTES, HeaderError};
use crate::mapped::Mapped;

/// Longest name of a memfd in bytes (memfd_create(2)).
const NAME_BYTES_MAX: usize = 200;

/// Why a block cannot be created.
#[derive(Debug, Error)]
pub enum CreateError {
    /// There is no room for it.
    #[error("{needed} bytes are needed, but only {free} are free")]
    NoSpace {
        /// Bytes of the block, its header and slots included.
        needed: u64,
        /// Bytes that the memory or the disk has left.
        free: u64,
    },
    /// The file size limit is lower.
    #[error(
        "{needed} bytes are needed, but the file size limit is lower; raise it (ulimit -f, or \
         LimitFSIZE= of a service)"
    )]
    FileLimit {
        /// Bytes of the block, its header and slots included.
        needed: u64,
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

/// Why a file cannot be opened as a block.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused.
    #[error("cannot open it: {0}")]
    Io(#[from] io::Error),
    /// Its header is invalid.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// It has another length than its header says.
    #[error("it has {length} bytes, but its header says {expected}")]
    Length {
        /// The length that it has.
        length: u64,
        /// The length that it should have.
        expected: u64,
    },
}

impl Custodian {
    /// Creates a block in memory: completely allocated, sealed against growing and shrinking, and
    /// without a name that could be left behind. `name` is for people who look into `/proc`.
    ///
    /// # Errors
    /// [`CreateError::NoSpace`] if there is no room; nothing is left.
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
        let file = file.map_err(system("creating a memfd"))?;
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

    /// Creates a block in a new file in `directory`.
    ///
    /// # Errors
    /// [`CreateError::NoSpace`] if the disk has no room. The file may exist then, and the caller
    /// must remove it.
    pub fn create_persistent(
        directory: BorrowedFd<'_>,
        file: &str,
        description: &Description,
    ) -> Result<Custodian, CreateError> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, file, flags, Mode::from(0o600))
            .map_err(system("creating the file"))?;
        prepare(&file, description, free_disk)?;
        Ok(Custodian::of(file, None, description.clone()))
    }

    /// Opens a block's file.
    ///
    /// # Errors
    /// If it is not a block, or is incomplete.
    pub fn open_persistent(directory: BorrowedFd<'_>, file: &str) -> Result<Custodian, OpenError> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(directory, file, flags, Mode::empty()).map_err(io::Error::from)?;
        let stat = fstat(&file).map_err(io::Error::from)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(HeaderError::Magic.into());
        }
        let mut bytes = [0; FIXED_BYTES];
        let got = rustix::io::pread(&file, &mut bytes, 0).map_err(io::Error::from)?;
        let description = Description::decode(&bytes[..got])?;
        if !description.is_persistent {
            return Err(HeaderError::Unexpected("kind").into());
        }
        let length = stat.st_size as u64;
        let expected = description.geometry.total();
        if length != expected {
            return Err(OpenError::Length { length, expected });
        }
        Ok(Custodian::of(file, None, description))
    }

    pub(crate) fn of(file: OwnedFd, header: Option<Mapped>, description: Description) -> Custodian {
        Custodian {
            description,
            lent: Mutex::default(),
            memory: BlockMemory {
                file: FileMemory::new(Arc::new(file)),
                header,
            },
            writing: Mutex::new(()),
            flushing: Mutex::default(),
        }
    }
}

/// Gives a new file its length, its memory and its header.
fn prepare(
    file: &OwnedFd,
    description: &Description,
    free: impl Fn(&OwnedFd) -> u64,
) -> Result<(), CreateError> {
    let needed = description.geometry.total();
    // Checked before: the kernel would use all memory for a memfd, and then kill processes to get
    // more.
    let left = free(file);
    if needed > left {
        return Err(CreateError::NoSpace { needed, free: left });
    }
    // Without this a lack of memory would cause a signal at the first access, not an error here.
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
        Err(Errno::FBIG) => return Err(CreateError::FileLimit { needed }),
        Err(Errno::NOSPC | Errno::NOMEM | Errno::DQUOT) => {
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

/// Bytes of memory that are available without swapping.
fn free_memory(_file: &OwnedFd) -> u64 {
    let available = std::fs::read_to_string("/proc/meminfo").ok();
    let available = available.as_deref().and_then(available_bytes);
    available.unwrap_or_else(|| {
        let info = rustix::system::sysinfo();
        #[allow(
            clippy::useless_conversion,
            reason = "the fields are 32 bits wide on 32-bit systems"
        )]
        let units = u64::from(info.freeram).saturating_add(u64::from(info.bufferram));
        units.saturating_mul(u64::from(info.mem_unit))
    })
}

/// What `/proc/meminfo` says is available (proc_meminfo(5)).
fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

fn free_disk(file: &OwnedFd) -> u64 {
    rustix::fs::fstatvfs(file).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The same file, opened again: a separate open file description with its own flags and access
/// mode. The kernel refuses writable mappings of one that is opened read-only.
pub(crate) fn reopened(file: &OwnedFd, access: OFlags) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()).ok()
}
