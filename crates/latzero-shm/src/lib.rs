//! Memory blocks: their format, and the algorithms of the processes that use them.
//!
//! A block is a file without a name (memfd) or a file in the data directory, with a header and one
//! or more slots. The server uses it as a [`Custodian`], and a client as an [`Attachment`]. Both
//! publish and read versions with the same algorithm, [`slots`], which is generic over the memory
//! ([`Memory`]): mapped words, a file, or a model that checks every order of steps.
//!
//! This crate knows nothing of pools, permissions or messages. It is the only one with `unsafe`.
//! There is never a reference to bytes that another process may change: words are loaded and stored
//! as atomics, through pointers.
//!
//! With the feature `heap` it also tells the allocator to return freed memory, which needs `unsafe`
//! as well.

#![allow(
    unsafe_code,
    reason = "memory is mapped here, and nowhere else; each use says why it is sound"
)]

mod attachment;
#[cfg(feature = "bare")]
pub mod bare;
mod block_memory;
mod copy;
mod create;
mod custodian;
mod element;
pub mod fds;
mod file;
mod format;
mod futex;
mod geometry;
#[cfg(feature = "heap")]
pub mod heap;
mod mapped;
mod memory;
mod private;
mod recover;
pub mod slots;
mod view;
mod wait;
mod writing;

pub use attachment::{AttachError, Attachment, Expected};
pub use create::{CreateError, OpenError};
pub use custodian::{Cas, Custodian, ReadGuard};
pub use element::Element;
pub use format::{Access, Description, HEADER_BYTES, HeaderError, State};
pub use geometry::{Geometry, GeometryError, SPARES};
pub use memory::{Fault, Memory};
pub use private::PrivateMapping;
pub use slots::{ReadError, WriteError};
pub use view::{OwnedView, View};
pub use wait::{Seen, Waited, Watch};
pub use writing::{Exposed, Writing};
