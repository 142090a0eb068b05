//! The server's access to a block: the words of a sealed memfd's header through a mapping, large
//! copies through a temporary mapping, everything else through the file.

use std::sync::atomic::Ordering;

use crate::file::FileMemory;
use crate::format::{Access, FIXED_BYTES};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};

/// Words through the mapped header if there is one, everything else through the file.
#[derive(Debug)]
pub(crate) struct BlockMemory {
    pub(crate) file: FileMemory,
    pub(crate) header: Option<Mapped>,
}

/// From this many bytes on, a temporary mapping is worth its cost for a copy: a system call copies
/// memory page by page, at about a third of the speed.
const WINDOW_BYTES_MIN: u64 = 256 * 1024;

/// Bytes copied from one slot to another at a time, by way of the processor's cache.
const PIECE_BYTES: u64 = 128 * 1024;

/// Bytes that are compared at a time: a page of the disk's cache.
const COMPARED_BYTES: usize = 4096;

/// The largest page size that systems have.
const PAGE_BYTES: u64 = 64 * 1024;

impl BlockMemory {
    /// Maps a range during one copy, if that is safe: the memfd is sealed against shrinking, so
    /// that no page of it can disappear, and all of its memory was allocated when it was created.
    /// Returns where in the mapping the range begins.
    fn window(&self, at: u64, length: u64, access: Access) -> Option<(Mapped, u64)> {
        self.header.as_ref()?;
        if length < WINDOW_BYTES_MIN {
            return None;
        }
        let start = at / PAGE_BYTES * PAGE_BYTES;
        let begin = at - start;
        // If no more can be mapped, the file is used.
        let window = Mapped::window(self.file.descriptor(), start, begin + length, access).ok()?;
        Some((window, begin))
    }

    /// The header's first bytes, which never change.
    pub(crate) fn fixed(&self) -> Result<[u8; FIXED_BYTES], Fault> {
        let mut bytes = [0; FIXED_BYTES];
        match &self.header {
            Some(header) => header.read(0, &mut bytes)?,
            None => self.file.read(0, &mut bytes)?,
        }
        Ok(bytes)
    }

    /// Copies from one place to another, either all bytes or only those that differ, so that no
    /// more is written to disk; returns the checksum of a version with this content.
    pub(crate) fn copy_changed(
        &self,
        from: u64,
        to: u64,
        length: u64,
        is_written_anew: bool,
        version: u64,
    ) -> Result<u32, Fault> {
        let mut sum = crc32c::crc32c(&version.to_le_bytes());
        sum = crc32c::crc32c_append(sum, &length.to_le_bytes());
        let size = usize::try_from(length.min(PIECE_BYTES)).expect("bounded");
        let (mut new, mut old) = (vec![0; size], vec![0; size]);
        let mut done = 0;
        while done < length {
            let n = usize::try_from((length - done).min(size as u64)).expect("bounded");
            self.file.read(from + done, &mut new[..n])?;
            self.file.read(to + done, &mut old[..n])?;
            sum = crc32c::crc32c_append(sum, &new[..n]);
            let pages = new[..n]
                .chunks(COMPARED_BYTES)
                .zip(old[..n].chunks(COMPARED_BYTES));
            for (i, (new, old)) in pages.enumerate() {
                if is_written_anew || new != old {
                    let at = to + done + (i * COMPARED_BYTES) as u64;
                    self.file.write(at, new)?;
                }
            }
            done += n as u64;
        }
        Ok(sum)
    }

    /// Writes the content of a range again.
    pub(crate) fn write_over(&self, at: u64, length: u64) -> Result<(), Fault> {
        let mut piece = vec![0; usize::try_from(length.min(PIECE_BYTES)).expect("bounded")];
        let mut done = 0;
        while done < length {
            let n = usize::try_from((length - done).min(piece.len() as u64)).expect("bounded");
            self.file.read(at + done, &mut piece[..n])?;
            self.file.write(at + done, &piece[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    pub(crate) fn load_half(&self, at: u64) -> Result<u32, Fault> {
        match &self.header {
            Some(header) => header.load_half(at),
            None => self.file.load_half(at),
        }
    }

    pub(crate) fn store_half(&self, at: u64, value: u32) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.store_half(at, value),
            None => self.file.store_half(at, value),
        }
    }
}

impl Memory for BlockMemory {
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
        match self.window(at, to.len() as u64, Access::Read) {
            Some((window, begin)) => window.read(begin, to),
            None => self.file.read(at, to),
        }
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        match self.window(at, from.len() as u64, Access::Write) {
            Some((window, begin)) => window.write(begin, from),
            None => self.file.write(at, from),
        }
    }

    fn copy(&self, from: u64, to: u64, length: u64) -> Result<(), Fault> {
        let windows = (
            self.window(from, length, Access::Read),
            self.window(to, length, Access::Write),
        );
        let mut piece = vec![0; usize::try_from(length.min(PIECE_BYTES)).expect("bounded")];
        let mut done = 0;
        while done < length {
            let n = usize::try_from((length - done).min(piece.len() as u64)).expect("bounded");
            match &windows {
                (Some((source, a)), Some((target, b))) => {
                    source.read(a + done, &mut piece[..n])?;
                    target.write(b + done, &piece[..n])?;
                }
                _ => {
                    self.file.read(from + done, &mut piece[..n])?;
                    self.file.write(to + done, &piece[..n])?;
                }
            }
            done += n as u64;
        }
        Ok(())
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.notify(at),
            None => self.file.notify(at),
        }
    }
}
