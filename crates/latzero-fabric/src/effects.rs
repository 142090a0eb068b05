//! What the core asks of its driver.

use latzero_protocol::memory::Access;
use latzero_protocol::{Code, PoolName};

use crate::memory::{Change, Descriptor, Job, Ledger, StorageId};
use crate::time::Time;

/// What a message is, which decides what becomes of it when its receiver does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A call for a handler: refused with [`Sent::Full`], the caller is told `overloaded`.
    Call,
    /// An answer for a caller: refused with [`Sent::Full`], a short error takes its place.
    Reply,
    /// An emit: dropped and counted, the receiver is told how many it lost.
    Emit,
    /// A push to a watcher: as an emit.
    Event,
    /// What must arrive (errors, cancels, ends): may use the outbox's headroom; where even that is full the
    /// connection is closed.
    Control,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It stands in the receiver's outbox.
    Queued,
    /// The outbox is full; nothing was appended.
    Full,
    /// The receiver's connection has ended.
    Gone,
}

/// A call that ended.
#[derive(Debug, Clone, Copy)]
pub struct CallEnd {
    /// When the call came.
    pub started: Time,
    /// When it ended.
    pub ended: Time,
    /// The server's error code, where the server ended it with one; `None` where the handler answered.
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
    /// An item or a report of a stream was passed on.
    Partial,
    /// A cancel or ack named no call in flight.
    StrayReference,
}

impl Count {
    /// How many kinds there are.
    pub const KINDS: usize = 6;
}

/// Something that the audit log tells.
#[derive(Debug, Clone)]
pub struct Audit<'a> {
    /// What happened, as one word.
    pub event: &'static str,
    /// The app, where the connection has said which it is.
    pub app: Option<&'a latzero_protocol::AppId>,
    /// Its instance.
    pub instance: Option<latzero_protocol::InstanceId>,
    /// What else there is to say, as an object.
    pub detail: serde_json::Value,
}

/// Carries out what the core decided. Called while a pool or the registry is held, so nothing here may wait.
pub trait Effects {
    /// A connection, as the driver knows it.
    type Peer: Clone;

    /// Appends one frame to `to`'s outbox: `encode` writes about `len` bytes, and is not called unless there is room.
    fn send(
        &mut self,
        to: &Self::Peer,
        class: Class,
        len: usize,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent;

    /// Closes `peer` once its outbox is written.
    fn close(&mut self, peer: &Self::Peer);

    /// How many calls of `peer`'s are in flight.
    fn in_flight(&self, peer: &Self::Peer) -> u32;

    /// A call began between two connections.
    ///
    /// A parked call has no caller's connection.
    fn call_started(&mut self, caller: Option<&Self::Peer>, handler: &Self::Peer);

    /// A call ended between two connections.
    fn call_ended(&mut self, caller: Option<&Self::Peer>, handler: &Self::Peer, end: CallEnd);

    /// A request was refused with `code` before it became a call.
    fn refused(&mut self, code: Code);

    /// Something happened that is only counted.
    fn count(&mut self, what: Count);

    /// As [`Effects::send`], with descriptors that travel with the frame's first byte.
    fn send_with(
        &mut self,
        to: &Self::Peer,
        class: Class,
        len: usize,
        descriptors: &[Descriptor],
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent;

    /// Tells `to` of a block's new version. Until it is told, a newer one takes its place; it is never lost.
    fn block_changed(&mut self, to: &Self::Peer, change: &Change<'_>);

    /// Something to do about a block's storage, once the pool is free.
    fn block_job(&mut self, job: Job<Self::Peer>);

    /// The number of a pool's blocks, parked calls and answers changed: the registry is to hear of it
    /// ([`crate::Registry::count_held`]).
    fn count_held(&mut self, pool: &PoolName, number: u32, change: i32);

    /// Has something remembered beyond the server's end. With a promise, the session of that connection hears of it when it
    /// is on disk, or can't be ([`crate::Session::kept`]), in the order in which it was promised; without one, it is
    /// tried until it can.
    fn keep(&mut self, change: crate::keep::Change, promise: Option<&Self::Peer>);

    /// Something that is kept until its receiver is told was appended to `to`'s outbox last. [`crate::Pool::told`] is to be
    /// called with `number` once that has left for the receiver, and never where its connection ends before.
    fn note_told(&mut self, to: &Self::Peer, number: u64);

    /// A number for a parked call: greater than any before it, those of earlier runs included.
    fn next_number(&mut self) -> u64;

    /// `now` as milliseconds since the Unix epoch.
    fn unix_ms(&self, now: Time) -> u64;

    /// Notes in the audit log what a connection did.
    fn audit(&mut self, by: &Self::Peer, audit: &Audit<'_>);

    /// Runs `f` with the count of what blocks use.
    fn with_ledger<R>(&mut self, f: impl FnOnce(&mut Ledger) -> R) -> R;

    /// A block's version, as far as it is known without waiting.
    fn block_version(&self, storage: StorageId) -> u64;

    /// Somebody says that a block has this version; returns the one that it has, as far as the block itself tells.
    fn version_noted(&mut self, storage: StorageId, version: u64) -> u64;

    /// Writes the fence of a block's lock where its writers look, at once: who holds the lock may write as soon as it is
    /// told. With it goes whether anybody holds it alone.
    fn set_fence(&mut self, storage: StorageId, fence: u64, is_held: bool);

    /// Whether there is a descriptor of a block's storage for this access.
    fn can_share(&self, storage: StorageId, access: Access) -> bool;
}
