//! A second mapping of a block, for code that may write by mistake what it should only read.
//!
//! JavaScript can write every array that it can read. In the mapping that all processes share, such
//! a write would end the process, or change what others see. In a private mapping it changes a page
//! of this process alone. That page no longer follows the block, so it is dropped before the next
//! reader gets the bytes.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, LazyLock};

use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::param::page_size;

use crate::attachment::{AttachError, Attachment};
use crate::mapped::Mapped;
use crate::view::OwnedView;

/// A private mapping of one generation of a block. What is written to it reaches nobody.
#[derive(Debug)]
pub struct PrivateMapping {
    attachment: Arc<Attachment>,
    mapped: Mapped,
}

impl OwnedView {
    /// Maps the block of this view once more, privately. `file` is a descriptor of its memory; it
    /// may be one for reading only.
    ///
    /// # Errors
    /// If it is not sealed memory of the block's length, or cannot be mapped.
    pub fn map_private(&self, file: impl AsFd) -> Result<PrivateMapping, AttachError> {
        let attachment = self.attachment();
        // A file that could become shorter would end the process that reads it.
        attachment.expected.check_memory(&file)?;
        let total = attachment.expected.geometry.total();
        Ok(PrivateMapping {
            mapped: Mapped::private(file, total)?,
            attachment: Arc::clone(attachment),
        })
    }
}

impl PrivateMapping {
    /// Whether the view is one of the generation that is mapped.
    #[must_use]
    pub fn has(&self, view: &OwnedView) -> bool {
        Arc::ptr_eq(&self.attachment, view.attachment())
    }

    /// Makes the bytes of a view those of the block again, wherever they were written here.
    ///
    /// # Errors
    /// If the view is of another generation, or the system refuses.
    pub fn restore(&self, view: &OwnedView) -> io::Result<()> {
        let at = self.offset(view).ok_or(io::ErrorKind::InvalidInput)?;
        let length = self.attachment.geometry().size;
        // To drop pages and to map them again takes longer than to look.
        if is_unwritten(self.mapped.base().addr().get() as u64 + at, length) {
            return Ok(());
        }
        self.mapped.restore(at, length)
    }

    /// The address of a view's first byte in this mapping; `None` if it is of another generation.
    /// Like those of [`View::as_ptr`](crate::View::as_ptr), the bytes may change at any time.
    #[must_use]
    pub fn as_mut_ptr(&self, view: &OwnedView) -> Option<*mut u8> {
        let at = usize::try_from(self.offset(view)?).ok()?;
        Some(self.mapped.base().as_ptr().wrapping_add(at))
    }

    fn offset(&self, view: &OwnedView) -> Option<u64> {
        let geometry = self.attachment.geometry();
        self.has(view).then(|| geometry.slot(view.slot()))
    }
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Whether no page of a private mapping is a copy that this process made by writing. Linux before
/// 6.7 can't tell.
fn is_unwritten(start: u64, length: u64) -> bool {
    const PAGEMAP_SCAN: rustix::ioctl::Opcode = opcode::read_write::<Scan>(b'f', 16);
    const PAGE_IS_FILE: u64 = 1 << 2;
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    const PAGE_IS_SWAPPED: u64 = 1 << 4;
    static PAGES: LazyLock<Option<File>> = LazyLock::new(|| File::open("/proc/self/pagemap").ok());
    let Some(pages) = &*PAGES else {
        return false;
    };
    // `struct page_region`: the start, the end and the categories of the pages that were found.
    let mut found = [0_u64; 3];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: start - start % page_size() as u64,
        end: start + length,
        vec: (&raw mut found).addr() as u64,
        vec_len: 1,
        max_pages: 1,
        category_inverted: PAGE_IS_FILE,
        category_mask: PAGE_IS_FILE,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_FILE,
        ..Scan::default()
    };
    // SAFETY: the kernel takes this type, and writes one region to `found`, which has room for it.
    // It looks at addresses, and touches none of the bytes there.
    let scanned = unsafe { ioctl(pages, Updater::<PAGEMAP_SCAN, _>::new(&mut scan)) };
    scanned.is_ok() && found == [0; 3]
}
