//! A file mapped into this process: words as atomics, through pointers, and never a reference to
//! its bytes.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::copy::{copy_in, copy_out};
use crate::format::Access;
use crate::futex;
use crate::memory::{Fault, Memory};

/// A mapping of the first `length` bytes of a file. Its file must not become shorter while words of
/// it are touched: it is sealed against that.
#[derive(Debug)]
pub(crate) struct Mapped {
    base: NonNull<u8>,
    length: usize,
    access: Access,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only accessed through
// atomics.
unsafe impl Send for Mapped {}
// SAFETY: as above; all methods take `&self` and only touch the bytes with atomic loads and stores.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `length` bytes of `file`, shared with everybody else who does.
    pub(crate) fn new(file: impl AsFd, length: u64, access: Access) -> io::Result<Mapped> {
        Mapped::at(file, 0, length, access, MapFlags::SHARED)
    }

    /// Maps a part of `file` for the time of one copy, all of its pages at once. `start` is a
    /// multiple of the page size.
    pub(crate) fn window(
        file: impl AsFd,
        start: u64,
        length: u64,
        access: Access,
    ) -> io::Result<Mapped> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        Mapped::at(file, start, length, access, flags)
    }

    /// Maps the first `length` bytes of `file` privately: a page that is written becomes this
    /// process's own. Nothing of this crate writes it.
    pub(crate) fn private(file: impl AsFd, length: u64) -> io::Result<Mapped> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // Without the flag the system would count all of it as memory that may be needed.
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        Mapped::protected(file, 0, length, protection, flags, Access::Read)
    }

    fn at(
        file: impl AsFd,
        start: u64,
        length: u64,
        access: Access,
        flags: MapFlags,
    ) -> io::Result<Mapped> {
        let protection = match access {
            Access::Read => ProtFlags::READ,
            Access::Write => ProtFlags::READ | ProtFlags::WRITE,
        };
        Mapped::protected(file, start, length, protection, flags, access)
    }

    fn protected(
        file: impl AsFd,
        start: u64,
        length: u64,
        protection: ProtFlags,
        flags: MapFlags,
        access: Access,
    ) -> io::Result<Mapped> {
        let length = usize::try_from(length).map_err(io::Error::other)?;
        // SAFETY: no address is asked for, so nothing that is mapped already is replaced.
        let base = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, file, start) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapped {
            base,
            length,
            access,
        })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Drops the pages of a private mapping that this process wrote within a range, and with them
    /// what else it wrote into the first and the last of them.
    pub(crate) fn restore(&self, at: u64, length: u64) -> io::Result<()> {
        let page = rustix::param::page_size();
        let size = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
        let (at, length) = (size(at)?, size(length)?);
        let start = at - at % page;
        let end = at.checked_add(length).filter(|&end| end <= self.length);
        let length = end.ok_or(io::ErrorKind::InvalidInput)? - start;
        // SAFETY: the range lies within the mapping and begins at a page, and no reference to its
        // bytes exists. After it they are those of the file, as after any write by others.
        unsafe {
            let start = self.base.as_ptr().add(start);
            madvise(start.cast(), length, Advice::LinuxDontNeed)?;
        }
        Ok(())
    }

    fn word(&self, at: u64) -> Result<&AtomicU64, Fault> {
        let at = usize::try_from(at).map_err(|_| Fault::Short)?;
        if at % 8 != 0 || at.checked_add(8).is_none_or(|end| end > self.length) {
            return Err(Fault::Short);
        }
        // SAFETY: the eight bytes lie within the mapping, which lives as long as `self`; they are
        // aligned, since the mapping begins at a page; and every access to them, here and in other
        // processes, is atomic or by the kernel.
        Ok(unsafe { AtomicU64::from_ptr(self.base.as_ptr().add(at).cast()) })
    }

    pub(crate) fn half(&self, at: u64) -> Result<&AtomicU32, Fault> {
        let at = usize::try_from(at).map_err(|_| Fault::Short)?;
        if at % 4 != 0 || at.checked_add(4).is_none_or(|end| end > self.length) {
            return Err(Fault::Short);
        }
        // SAFETY: as for words, with four bytes.
        Ok(unsafe { AtomicU32::from_ptr(self.base.as_ptr().add(at).cast()) })
    }

    /// The start of a range within the mapping.
    fn range(&self, at: u64, length: usize) -> Result<*mut u8, Fault> {
        let at = usize::try_from(at).map_err(|_| Fault::Short)?;
        if at.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(Fault::Short);
        }
        // SAFETY: the offset lies within the mapping or at its end.
        Ok(unsafe { self.base.as_ptr().add(at) })
    }

    pub(crate) fn load_half(&self, at: u64) -> Result<u32, Fault> {
        Ok(self.half(at)?.load(Ordering::Acquire))
    }

    pub(crate) fn store_half(&self, at: u64, value: u32) -> Result<(), Fault> {
        self.check_writable()?;
        self.half(at)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Sleeps while the 32-bit word at `at` is `value`, at most `timeout`.
    pub(crate) fn wait(&self, at: u64, value: u32, timeout: Option<Duration>) -> Result<(), Fault> {
        futex::wait(self.half(at)?, value, timeout)
    }

    pub(crate) fn wake(&self, at: u64) -> Result<(), Fault> {
        futex::wake(self.half(at)?);
        Ok(())
    }

    /// Appends `length` bytes to `to`, without filling its memory twice.
    pub(crate) fn append(&self, at: u64, length: usize, to: &mut Vec<u8>) -> Result<(), Fault> {
        let from = self.range(at, length)?;
        to.reserve_exact(length);
        let end = to.len();
        // SAFETY: `range` checked that the source lies within the mapping; `to` has room for
        // `length` bytes behind its end, nobody else accesses them, and they are all written before
        // they count as part of it.
        unsafe {
            copy_out(from, to.as_mut_ptr().add(end), length);
            to.set_len(end + length);
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Fault> {
        match self.access {
            Access::Write => Ok(()),
            Access::Read => Err(Fault::Io(io::ErrorKind::PermissionDenied.into())),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this is the mapping's own range, and nothing borrowed from it outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
    }
}

impl Memory for Mapped {
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault> {
        Ok(u64::from_le(self.word(at)?.load(order)))
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        self.check_writable()?;
        self.word(at)?.store(word.to_le(), order);
        Ok(())
    }

    fn fence(&self, order: Ordering) {
        fence(order);
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let from = self.range(at, to.len())?;
        // SAFETY: `range` checked that the bytes lie within the mapping; `to` is memory that
        // only this process has.
        unsafe { copy_out(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        self.check_writable()?;
        let to = self.range(at, from.len())?;
        // SAFETY: `range` checked that the bytes lie within the mapping, which is writable.
        unsafe { copy_in(from.as_ptr(), to, from.len()) };
        Ok(())
    }

    fn copy(&self, from: u64, to: u64, length: u64) -> Result<(), Fault> {
        // Through a buffer that stays in the processor's nearest cache, and no allocation for small
        // changes.
        let mut piece = [0; 4096];
        let mut done = 0;
        while done < length {
            let n = usize::try_from((length - done).min(piece.len() as u64)).expect("bounded");
            self.read(from + done, &mut piece[..n])?;
            self.write(to + done, &piece[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        self.check_writable()?;
        self.half(at)?.fetch_add(1, Ordering::Release);
        self.wake(at)
    }
}
