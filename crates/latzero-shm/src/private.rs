//! A second mapping of a block, for code that may write by mistake what it should only read.
//!
//! JavaScript can write every array that it can read. In the mapping that all processes share, such
//! a write would end the process, or change what others see. In a private mapping it changes a page
//! of this process alone. That page no longer follows the block, so it is dropped before the next
//! reader gets the bytes.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

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
        self.mapped.restore(at, self.attachment.geometry().size)
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
