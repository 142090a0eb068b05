//! Memory that JavaScript gets: copies, the slot of a block that is being written, and private
//! mappings of memory that is only read.
//!
//! Whatever JavaScript can read it can also write. A write into a private mapping reaches nobody,
//! while one into the mapping that readers share would be seen by everybody or end the process.

#![allow(
    unsafe_code,
    reason = "memory that is not V8's is given to it as a pointer"
)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use latzero::{Exposed, OwnedView, PrivateMapping};
use napi::bindgen_prelude::{Array, ArrayBuffer, BufferSlice, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::block::{NativeBlock, NativeDraft, NativeLock, NativeView, NativeWriter};
use crate::streams::{Inflow, Parking};

/// What travels to JavaScript beside the text of a batch.
pub(crate) enum Extra {
    /// Bytes of a payload, as a `Buffer`.
    Buffer(Vec<u8>),
    /// Bytes of a block, as an `ArrayBuffer`.
    Memory(Vec<u8>),
    Block(NativeBlock),
    Draft(NativeDraft),
    Inflow(Inflow),
    Lock(NativeLock),
    Parked(Parking),
    View(NativeView),
    Writer(NativeWriter),
}

impl Extra {
    pub(crate) fn insert(self, env: &Env, array: &mut Array<'_>) -> Result<()> {
        match self {
            Extra::Buffer(bytes) => array.insert(BufferSlice::copy_from(env, bytes)?),
            Extra::Memory(bytes) => array.insert(ArrayBuffer::copy_from(env, bytes)?),
            Extra::Block(block) => array.insert(block),
            Extra::Draft(draft) => array.insert(draft),
            Extra::Inflow(inflow) => array.insert(inflow),
            Extra::Lock(lock) => array.insert(lock),
            Extra::Parked(parked) => array.insert(parked),
            Extra::View(view) => array.insert(view),
            Extra::Writer(writer) => array.insert(writer),
        }
    }
}

/// Set when the engine refused memory that is not its own.
static IS_REFUSED: AtomicBool = AtomicBool::new(false);

/// Whether memory may be given out without a copy, where the engine allows that.
pub(crate) fn may_share() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    let is_off = |value| value == "1";
    *MAY.get_or_init(|| !std::env::var_os("LATZERO_NO_EXTERNAL").is_some_and(is_off))
        && !IS_REFUSED.load(Ordering::Relaxed)
}

/// The array, unless the engine made a copy because it takes no such memory.
fn unless_copied(array: ArrayBuffer<'_>, start: *const u8) -> Option<ArrayBuffer<'_>> {
    let is_shared = std::ptr::eq(array.as_ptr(), start);
    if !is_shared {
        IS_REFUSED.store(true, Ordering::Relaxed);
    }
    is_shared.then_some(array)
}

/// The slot of a version that is being written, in place. `None` where the engine takes no memory
/// that is not its own.
pub(crate) fn share(env: &Env, exposed: Exposed) -> Result<Option<ArrayBuffer<'_>>> {
    if !may_share() || exposed.is_empty() {
        return Ok(None);
    }
    let (start, length) = (exposed.as_mut_ptr(), exposed.len());
    // SAFETY: the bytes lie in a mapping that is writable, since the block is being written, and
    // that `exposed` keeps in place; it is dropped when the engine has let go of the bytes. Other
    // processes do not write them while the block's lock is held, and if that is lost, both write
    // plain bytes, which no code of this process has a reference to.
    let shared = unsafe { ArrayBuffer::from_external(env, start, length, exposed, |_, e| drop(e)) };
    Ok(unless_copied(shared?, start))
}

/// The bytes of a view, in a private mapping of its block. `None` where the engine takes no memory
/// that is not its own, or the view is of another generation than the mapping.
pub(crate) fn lend<'env>(
    env: &'env Env,
    mapping: &Arc<PrivateMapping>,
    view: &OwnedView,
) -> Result<Option<ArrayBuffer<'env>>> {
    let length = usize::try_from(view.get().len()).unwrap_or(0);
    let Some(start) = mapping
        .as_mut_ptr(view)
        .filter(|_| may_share() && length > 0)
    else {
        return Ok(None);
    };
    let kept = mapping.clone();
    // SAFETY: the bytes lie in a mapping that is writable, and that `kept` keeps in place; it is
    // dropped when the engine has let go of the bytes. Other processes may change those that were
    // not written here, but no code of this process has a reference to them. Arrays of the same
    // bytes may exist at a time: they are used only on this thread.
    let lent = unsafe { ArrayBuffer::from_external(env, start, length, kept, |_, m| drop(m)) }?;
    Ok(unless_copied(lent, start))
}

/// Takes the memory from an `ArrayBuffer`: its length is 0 from then on.
#[napi]
#[allow(unreachable_pub, reason = "the macro asks for it")]
pub fn detach(buffer: ArrayBuffer<'_>) -> Result<()> {
    match buffer.is_detached()? {
        true => Ok(()),
        false => buffer.detach(),
    }
}

/// The bytes of an array, to be filled. It must be the only use of them for that time.
pub(crate) fn bytes_of<'a>(target: &'a mut Uint8ArraySlice<'_>) -> &'a mut [u8] {
    // SAFETY: JavaScript runs on this thread, so nothing else uses the memory before the call that
    // it was passed to returns. `lib/` passes no memory that is shared with other threads.
    unsafe { target.as_mut() }
}
