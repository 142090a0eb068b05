//! The memory that the algorithm uses: words that are loaded and stored one by one, and bytes that
//! are copied.

use std::io;
use std::sync::atomic::Ordering;

use thiserror::Error;

/// Something is wrong with a block's memory or file.
#[derive(Debug, Error)]
pub enum Fault {
    /// The system refused.
    #[error("cannot access its file: {0}")]
    Io(#[from] io::Error),
    /// The file is shorter than the block.
    #[error("its file was shortened")]
    Short,
    /// A word has an impossible value.
    #[error("its {0} is invalid")]
    Corrupt(&'static str),
}

/// A block's bytes, which other processes may change at any time.
///
/// Offsets are in bytes from the start of the file; those of words are multiples of eight.
pub trait Memory {
    /// Loads a word.
    ///
    /// # Errors
    /// If it can't be read.
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault>;

    /// Stores a word.
    ///
    /// # Errors
    /// If it can't be written.
    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault>;

    /// A full memory fence.
    fn fence(&self, order: Ordering);

    /// Copies bytes out, in no order.
    ///
    /// # Errors
    /// If they can't be read.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault>;

    /// Copies bytes in, in no order.
    ///
    /// # Errors
    /// If they can't be written.
    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault>;

    /// Copies `length` bytes from one place to another that does not overlap it, in no order.
    ///
    /// # Errors
    /// If they can't be read or written.
    fn copy(&self, from: u64, to: u64, length: u64) -> Result<(), Fault> {
        // Through private memory, in pieces that stay in the processor's cache.
        let mut piece = vec![0; usize::try_from(length.min(128 * 1024)).expect("it was bounded")];
        let mut done = 0;
        while done < length {
            let n = piece
                .len()
                .min(usize::try_from(length - done).unwrap_or(usize::MAX));
            self.read(from + done, &mut piece[..n])?;
            self.write(to + done, &piece[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// Increments the 32-bit word at `at` and wakes its waiters.
    ///
    /// # Errors
    /// If it can't be written.
    fn notify(&self, at: u64) -> Result<(), Fault>;

    /// Yields while a writer is in progress.
    fn relax(&self, tries: u32) {
        if tries < 16 {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}
