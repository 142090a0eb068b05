//! Plain shared memory, for benchmarks to compare with: the cost of the kernel and the processor
//! alone.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use crate::format::Access;
use crate::mapped::Mapped;
use crate::memory::Fault;

/// The first bytes of a file, mapped.
#[derive(Debug)]
pub struct Bare(Mapped);

/// Position of the futex; the bytes begin a page later.
const WORD: u64 = 0;
const BYTES: usize = 4096;

impl Bare {
    /// Maps the first `length` bytes of a file of one's own, and a page more before them.
    ///
    /// # Errors
    /// If it can't be opened or mapped.
    pub fn open(path: &Path, length: usize) -> io::Result<Bare> {
        let file = File::options().read(true).write(true).open(path)?;
        Mapped::new(&file, (length + BYTES) as u64, Access::Write).map(Bare)
    }

    /// The byte at `index`.
    #[must_use]
    pub fn byte(&self, index: usize) -> u8 {
        // SAFETY: benchmarks only ask for bytes of the length that they mapped.
        unsafe { self.0.base().as_ptr().add(BYTES + index).read_volatile() }
    }

    /// Copies bytes in, as memcpy does, and wakes who waits.
    ///
    /// # Errors
    /// If the futex can't be reached.
    pub fn publish(&self, bytes: &[u8]) -> Result<(), Fault> {
        // SAFETY: benchmarks only copy as many bytes as they mapped, and read none of them
        // meanwhile.
        unsafe {
            let to = self.0.base().as_ptr().add(BYTES);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        self.bump()
    }

    /// Adds one to the word and wakes who waits.
    ///
    /// # Errors
    /// If the futex can't be reached.
    pub fn bump(&self) -> Result<(), Fault> {
        use crate::memory::Memory as _;
        self.0.notify(WORD)
    }

    /// The word.
    ///
    /// # Errors
    /// None; the word is always there.
    pub fn word(&self) -> Result<u32, Fault> {
        self.0.load_half(WORD)
    }

    /// Sleeps while the word is `seen`.
    ///
    /// # Errors
    /// If it stays so for twenty seconds: whoever should have changed it is gone.
    pub fn wait(&self, seen: u32) -> Result<(), Fault> {
        for _ in 0..20 {
            if self.word()? != seen {
                return Ok(());
            }
            self.0.wait(WORD, seen, Some(Duration::from_secs(1)))?;
        }
        match self.word()? == seen {
            true => Err(Fault::Io(io::ErrorKind::TimedOut.into())),
            false => Ok(()),
        }
    }
}
