//! The decisions that the driver still has to carry out, and counters.
//!
//! The driver carries them out after the pool or the registry is released. They return no result.

use latzero_protocol::{Code, PoolName};

use crate::driver::Driver;
use crate::memory::Job;
use crate::now::Time;

/// A call that ended.
#[derive(Debug, Clone, Copy)]
pub struct CallEnd {
    /// When the call arrived.
    pub started: Time,
    /// When it ended.
    pub ended: Time,
    /// The error code if the server ended the call; `None` if the handler answered.
    pub code: Option<Code>,
    /// Whether the handler answered with an error.
    pub failed: bool,
}

/// Things that are counted and shown in the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Count {
    /// An emit was accepted.
    Emit,
    /// A notice of an emit was appended for a handler.
    Delivered,
    /// A response came after its call had ended.
    LateResponse,
    /// A response came from another instance than the one that was called.
    ForeignResponse,
    /// An item or a progress report of a stream was forwarded.
    Partial,
    /// A cancel or ack named no call in flight.
    StrayReference,
}

impl Count {
    /// How many kinds there are.
    pub const KINDS: usize = 6;
}

/// An entry of the audit log.
#[derive(Debug, Clone)]
pub struct Audit<'a> {
    /// The name of the event.
    pub event: &'static str,
    /// The app, if the connection has named it.
    pub app: Option<&'a latzero_protocol::AppId>,
    /// Its instance.
    pub instance: Option<latzero_protocol::InstanceId>,
    /// Further details, as a JSON object.
    pub detail: serde_json::Value,
}

/// What the driver does once the pool is released: field by field, each list in order.
pub struct Effects<D: Driver> {
    /// Connections with something to write, each once.
    pub touched: Vec<D::Peer>,
    /// Connections to close once their outbox is written.
    pub closing: Vec<D::Peer>,
    /// Connections that have room for more calls again: their sessions continue
    /// ([`crate::Session::resume`]).
    pub resumed: Vec<D::Peer>,
    /// Jobs for the storage of blocks.
    pub jobs: Vec<Job<D::Peer>>,
    /// How the number of a pool's blocks, parked calls and answers changed, for
    /// [`crate::Registry::count_held`].
    pub held: Vec<(PoolName, u32, i32)>,
    /// When everything that was appended for a connection so far is written,
    /// [`crate::DurableCalls::answer_delivered`] is to be called with these numbers.
    pub delivered: Vec<(D::Peer, u64)>,
    /// More answers are stored for repeats than the limit allows.
    pub(crate) is_over_repeats: bool,
    /// A message was neither a call nor an answer, and may have taken longer than these do. The
    /// driver takes this as a hint to read its clock.
    pub was_request: bool,
    /// About how many bytes were appended since the last write.
    pub appended: usize,
    /// Counters of what happened.
    pub tally: Counters,
    /// Buffers to reuse.
    pub buffers: Buffers,
}

impl<D: Driver> Default for Effects<D> {
    fn default() -> Self {
        Effects {
            touched: Vec::new(),
            closing: Vec::new(),
            resumed: Vec::new(),
            jobs: Vec::new(),
            held: Vec::new(),
            delivered: Vec::new(),
            is_over_repeats: false,
            was_request: false,
            appended: 0,
            tally: Counters::default(),
            buffers: Buffers::default(),
        }
    }
}

/// Counters since the driver last took them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls that began.
    pub started: u64,
    /// Calls that ended.
    pub ended: Vec<CallEnd>,
    /// Requests that were refused.
    pub refused: Vec<Code>,
    /// Events by [`Count`].
    pub counts: [u64; Count::KINDS],
}

/// Limits on the spare buffers of a loop: their number, the size of one, and their total size.
const SPARE_MAX: usize = 64;
const SPARE_TOTAL_BYTES_MAX: usize = 4 * 1024 * 1024;
const SPARE_BYTES_MAX: usize = 1024 * 1024;

/// The number of large buffers that a loop keeps: fresh memory costs more than the copy into it.
const LARGE_MAX: usize = 2;
const LARGE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Buffers for reuse.
#[derive(Debug, Default)]
pub struct Buffers {
    spare: Vec<Vec<u8>>,
    /// The total size of the spare buffers in bytes.
    spare_bytes: usize,
    large: Vec<Vec<u8>>,
    /// The next large one, as far as it is ready.
    preparing: Option<Vec<u8>>,
}

/// How many bytes of a large buffer are made ready at once.
const PREPARED_AT_ONCE: usize = 1024 * 1024;

impl Buffers {
    /// An empty buffer for about `length` bytes.
    #[must_use]
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        if length > SPARE_BYTES_MAX {
            let large = self.large.pop().or_else(|| self.preparing.take());
            let mut large = large.unwrap_or_default();
            large.clear();
            return large;
        }
        let spare = self.spare.pop().unwrap_or_default();
        self.spare_bytes -= spare.capacity();
        spare
    }

    /// A large buffer, if one is kept.
    #[must_use]
    pub fn take_large(&mut self) -> Option<Vec<u8>> {
        let mut large = self.large.pop()?;
        large.clear();
        Some(large)
    }

    /// Makes a buffer of `length` bytes ready, a part each time, unless a large one is kept. The
    /// kernel takes many milliseconds for so much fresh memory: with a call for each part of a
    /// message that arrives, the copy for its receiver finds it ready.
    pub fn prepare(&mut self, length: usize) {
        if length <= SPARE_BYTES_MAX || !self.large.is_empty() {
            return;
        }
        let new = || Vec::with_capacity(length.min(LARGE_BYTES_MAX));
        let buffer = self.preparing.get_or_insert_with(new);
        let ready = (buffer.len() + PREPARED_AT_ONCE).min(buffer.capacity());
        buffer.resize(ready, 0);
        if ready == buffer.capacity() {
            self.large.extend(self.preparing.take());
        }
    }

    /// Whether a large buffer is kept.
    #[must_use]
    pub fn has_large(&self) -> bool {
        !self.large.is_empty() || self.preparing.is_some()
    }

    /// Frees the large buffers.
    pub fn free_large(&mut self) {
        self.large.clear();
        self.preparing = None;
    }

    /// Takes a buffer back.
    pub fn recycle(&mut self, mut buf: Vec<u8>) {
        buf.clear();
        if buf.capacity() <= SPARE_BYTES_MAX {
            let bytes = self.spare_bytes + buf.capacity();
            if self.spare.len() < SPARE_MAX && buf.capacity() > 0 && bytes <= SPARE_TOTAL_BYTES_MAX
            {
                self.spare_bytes = bytes;
                self.spare.push(buf);
            }
        } else if self.large.len() < LARGE_MAX && buf.capacity() <= LARGE_BYTES_MAX {
            self.large.push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_is_made_ready_in_parts() {
        let mut buffers = Buffers::default();
        let length = 5 * PREPARED_AT_ONCE / 2;
        for ready in [1, 2] {
            buffers.prepare(length);
            let preparing = buffers.preparing.as_ref().map(Vec::len);
            assert_eq!(preparing, Some(ready * PREPARED_AT_ONCE));
        }
        buffers.prepare(length);
        buffers.prepare(length);
        assert_eq!(
            (buffers.large.len(), buffers.preparing.is_none()),
            (1, true)
        );
        let taken = buffers.take(length);
        assert!(taken.is_empty() && taken.capacity() >= length);
        // One that is not ready in full is better than none.
        buffers.prepare(length);
        let taken = buffers.take(length);
        assert!(taken.is_empty() && taken.capacity() >= length && !buffers.has_large());
    }
}
