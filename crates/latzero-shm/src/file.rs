//! A file that another process may shorten at any time, and that is therefore never mapped: words
//! and bytes are accessed with pread(2) and pwrite(2), which return fewer bytes where a mapping
//! would raise SIGBUS.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::io::Errno;

use crate::format::{Access, HEADER_BYTES, at};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};

/// A block's file.
#[derive(Debug)]
pub(crate) struct FileMemory {
    file: Arc<OwnedFd>,
    /// The header's page, only for the address of the futex: nothing here reads or writes through
    /// it, and the kernel answers EFAULT for one that is gone.
    page: Option<Mapped>,
}

impl FileMemory {
    pub(crate) fn new(file: Arc<OwnedFd>) -> FileMemory {
        let page = Mapped::new(file.as_fd(), HEADER_BYTES, Access::Read).ok();
        FileMemory { file, page }
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.file
    }

    /// The page that holds the futex.
    pub(crate) fn page(&self) -> Option<&Mapped> {
        self.page.as_ref()
    }

    /// Appends `length` bytes to `to`, without filling its memory twice.
    pub(crate) fn append(&self, at: u64, length: usize, to: &mut Vec<u8>) -> Result<(), Fault> {
        to.reserve_exact(length);
        let (begin, end) = (to.len(), to.len() + length);
        while to.len() < end {
            let from = at + (to.len() - begin) as u64;
            match rustix::io::pread(&self.file, rustix::buffer::spare_capacity(to), from) {
                Ok(0) => return Err(Fault::Short),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::Io(error.into())),
            }
        }
        // The allocator may have given more than was asked for.
        to.truncate(end);
        Ok(())
    }

    pub(crate) fn load_half(&self, at: u64) -> Result<u32, Fault> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn store_half(&self, at: u64, value: u32) -> Result<(), Fault> {
        self.write(at, &value.to_le_bytes())
    }
}

impl Memory for FileMemory {
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        if order != Ordering::Relaxed {
            fence(Ordering::SeqCst);
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        if order != Ordering::Relaxed {
            fence(Ordering::SeqCst);
        }
        self.write(at, &word.to_le_bytes())
    }

    fn fence(&self, _order: Ordering) {
        fence(Ordering::SeqCst);
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < to.len() {
            match rustix::io::pread(&self.file, &mut to[done..], at + done as u64) {
                Ok(0) => return Err(Fault::Short),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::Io(error.into())),
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < from.len() {
            match rustix::io::pwrite(&self.file, &from[done..], at + done as u64) {
                Ok(0) => return Err(Fault::Short),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::Io(error.into())),
            }
        }
        Ok(())
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        debug_assert_eq!(at, at::NOTIFY);
        let next = self.load_half(at)?.wrapping_add(1);
        self.store_half(at, next)?;
        if let Some(page) = &self.page {
            page.wake(at)?;
        }
        Ok(())
    }
}
