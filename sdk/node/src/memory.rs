//! Memory that JavaScript gets: copies, and the slot of a block that is being written.
//!
//! Nothing else of a block is given out without a copy: whatever JavaScript can read it can also
//! write, and a write into what readers see would be seen by everybody.

#![allow(
    unsafe_code,
    reason = "memory that is not V8's is given to it as a pointer"
)]

use std::sync::OnceLock;

use latzero::Exposed;
use napi::bindgen_prelude::{Array, ArrayBuffer, BufferSlice, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;

use crate::block::{NativeBlock, NativeDraft, NativeLock, NativeView};
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
        }
    }
}

/// Whether memory may be given out without a copy, where the engine allows that.
fn may_share() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    *MAY.get_or_init(|| std::env::var_os("LATZERO_NO_EXTERNAL").is_none_or(|value| value != "1"))
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
    let shared = shared?;
    // An engine that takes no such memory has made a copy, which nobody would read.
    Ok(std::ptr::eq(shared.as_ptr(), start).then_some(shared))
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
    // it was passed to returns. The face passes no memory that is shared with other threads.
    unsafe { target.as_mut() }
}
