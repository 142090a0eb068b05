//! The effects of the fabric in a simulated world: outboxes with bounds, counters, and a log of all that happened.
//!
//! An outbox is bytes that a client has not read yet. It has the same bounds as a server's: what is no control message
//! fits below `outbox_bytes`, control messages may also use the headroom, and where even that is full the connection
//! is closed.

use latzero_fabric::memory::{Change, Descriptor, Job, Ledger, StorageId};
use latzero_fabric::{CallEnd, Class, Count, Effects, Sent, Time};
use latzero_protocol::memory::Access;
use latzero_protocol::{Code, PoolName, encode};

use crate::storage::Storages;
use crate::store::{Rows, Store};

/// A connection of the simulated world, numbered in the order of coming; numbers are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub u32);

/// How much one outbox holds, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Messages of every class fit below this.
    pub outbox_bytes: usize,
    /// What control messages may use beyond it.
    pub headroom_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            outbox_bytes: 8 << 20,
            headroom_bytes: 1 << 20,
        }
    }
}

/// By how many bytes a frame may be longer than its sender announced: "about" leaves room for the prefix and for the
/// escapes in an id and a key.
pub const LENGTH_SLACK: usize = 8 * 1024;

/// Something that happened in the world, in the order in which it happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Time moved on.
    Now(Time),
    /// The server took a frame from a connection and begins to handle it.
    Handling {
        /// Who sent it.
        peer: Peer,
        /// The frame's JSON, as it came.
        json: Vec<u8>,
        /// The frame's raw bytes.
        attachment: Option<Vec<u8>>,
    },
    /// The server took bytes that are no frame.
    Rejecting(Peer),
    /// The frame has been handled.
    Handled(Peer),
    /// One frame was appended to an outbox.
    Sent {
        /// For whom.
        peer: Peer,
        /// What kind of message.
        class: Class,
        /// The whole frame, its prefix included.
        frame: Vec<u8>,
    },
    /// An emit or an event did not fit into an outbox.
    Lost(Peer),
    /// The server closes a connection, or its client did.
    Closed(Peer),
    /// The session of a closed connection has ended: the fabric knows it no longer.
    Departed(Peer),
    /// A request was refused.
    Refused(Code),
    /// Something was counted.
    Counted(Count),
    /// The disk takes nothing from now on, or takes everything again.
    DiskFull(bool),
    /// The server began again with what was written.
    Restarted(Box<Rows>),
}

#[derive(Debug, Default)]
struct Outbox {
    bytes: Vec<u8>,
    is_open: bool,
    lost: u64,
    in_flight: u32,
    /// Changes of blocks that are still to be told, the newest of each.
    changes: Vec<((u32, u32), String)>,
    descriptors: u64,
}

/// Totals of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Frames appended to outboxes.
    pub frames: u64,
    /// Calls that began.
    pub calls_started: u64,
    /// Calls that ended.
    pub calls_ended: u64,
    /// Calls that the server ended with `timeout`.
    pub timeouts: u64,
    /// Requests that were refused.
    pub refusals: u64,
    /// Messages dropped because their receiver did not read.
    pub lost: u64,
    /// Connections closed because even their headroom was full.
    pub overflowed: u64,
    /// What the core counted, by [`Count`].
    pub counts: [u64; Count::KINDS],
}

/// Every outbox of the world.
#[derive(Debug)]
pub struct Outboxes {
    bounds: Bounds,
    outboxes: Vec<Outbox>,
    newly_closed: Vec<Peer>,
    log: Vec<Event>,
    hash: u64,
    totals: Totals,
    pub(crate) storages: Storages,
    pub(crate) store: Store,
    /// Calls under way that no connection made: parked ones.
    detached: u32,
    numbers: u64,
    /// What the audit log would tell.
    pub(crate) audited: Vec<String>,
    /// What was told just now, and to whom.
    pub(crate) told: Vec<(Peer, u64)>,
}

impl Outboxes {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Outboxes {
            bounds,
            outboxes: Vec::new(),
            newly_closed: Vec::new(),
            log: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            totals: Totals::default(),
            storages: Storages::default(),
            store: Store::default(),
            detached: 0,
            audited: Vec::new(),
            told: Vec::new(),
            numbers: 0,
        }
    }

    pub(crate) fn open(&mut self) -> Peer {
        let peer = Peer(u32::try_from(self.outboxes.len()).expect("runs are short"));
        self.outboxes.push(Outbox {
            is_open: true,
            ..Outbox::default()
        });
        peer
    }

    pub(crate) fn is_open(&self, peer: Peer) -> bool {
        self.outboxes[peer.0 as usize].is_open
    }

    pub(crate) fn read(&mut self, peer: Peer, most: usize) -> Vec<u8> {
        let changes = std::mem::take(&mut self.outboxes[peer.0 as usize].changes);
        for (_, told) in changes {
            self.append(peer, Class::Event, |out| encode::message(out, &told));
        }
        let bytes = &mut self.outboxes[peer.0 as usize].bytes;
        let most = most.min(bytes.len());
        bytes.drain(..most).collect()
    }

    pub(crate) fn waiting(&self, peer: Peer) -> usize {
        self.outboxes[peer.0 as usize].bytes.len()
    }

    /// The client is gone: what it has not read is lost.
    pub(crate) fn hang_up(&mut self, peer: Peer) {
        self.close(&peer);
        self.outboxes[peer.0 as usize].bytes = Vec::new();
        self.outboxes[peer.0 as usize].changes = Vec::new();
    }

    /// How many descriptors were sent to a client.
    pub(crate) fn descriptors(&self, peer: Peer) -> u64 {
        self.outboxes[peer.0 as usize].descriptors
    }

    pub(crate) fn take_newly_closed(&mut self) -> Vec<Peer> {
        std::mem::take(&mut self.newly_closed)
    }

    /// Every connection ends at once, and nobody is told.
    pub(crate) fn crash(&mut self) {
        for outbox in &mut self.outboxes {
            *outbox = Outbox::default();
        }
        self.newly_closed.clear();
        self.totals.calls_ended = self.totals.calls_started;
        self.store.crash();
        self.detached = 0;
        let rows = Box::new(self.store.rows.clone());
        self.note(Event::Restarted(rows));
    }

    pub(crate) fn note(&mut self, event: Event) {
        self.log.push(event);
    }

    pub(crate) fn take_log(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.log)
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Calls in flight, as the effects count them: each once, at its caller.
    pub(crate) fn calls_in_flight(&self) -> usize {
        let attached: usize = self.outboxes.iter().map(|o| o.in_flight as usize).sum();
        attached + self.detached as usize
    }

    pub(crate) fn check(&self, in_flight_max: u32) {
        let most = self.bounds.outbox_bytes + self.bounds.headroom_bytes + LENGTH_SLACK;
        for (at, outbox) in self.outboxes.iter().enumerate() {
            let held = outbox.bytes.len();
            assert!(held <= most, "outbox {at} holds {held} bytes of {most}");
            assert!(
                outbox.in_flight <= in_flight_max,
                "connection {at} has {} calls in flight of {in_flight_max}",
                outbox.in_flight
            );
        }
    }

    fn append(&mut self, to: Peer, class: Class, encode: impl FnOnce(&mut Vec<u8>)) -> usize {
        let outbox = &mut self.outboxes[to.0 as usize];
        let start = outbox.bytes.len();
        encode(&mut outbox.bytes);
        let frame = outbox.bytes[start..].to_vec();
        let head = to.0.to_le_bytes();
        // FNV-1a: every run and machine agrees on it.
        self.hash = head.iter().chain(&frame).fold(self.hash, |h, &b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        self.totals.frames += 1;
        let written = frame.len();
        self.log.push(Event::Sent {
            peer: to,
            class,
            frame,
        });
        written
    }
}

impl Effects for Outboxes {
    type Peer = Peer;

    fn send(
        &mut self,
        to: &Peer,
        class: Class,
        len: usize,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        let outbox = &mut self.outboxes[to.0 as usize];
        if !outbox.is_open {
            return Sent::Gone;
        }
        let room = match class {
            Class::Control => self.bounds.outbox_bytes + self.bounds.headroom_bytes,
            Class::Call | Class::Reply | Class::Emit | Class::Event => self.bounds.outbox_bytes,
        };
        if outbox.bytes.len() + len > room {
            match class {
                Class::Control => {
                    self.totals.overflowed += 1;
                    self.close(to);
                }
                Class::Emit | Class::Event => {
                    outbox.lost += 1;
                    self.totals.lost += 1;
                    self.log.push(Event::Lost(*to));
                }
                Class::Call | Class::Reply => {}
            }
            return Sent::Full;
        }
        if outbox.lost > 0 {
            let told = format!(
                "{{\"action\":\"event\",\"event\":\"lost\",\"count\":{}}}",
                std::mem::take(&mut outbox.lost)
            );
            self.append(*to, Class::Control, |out| encode::message(out, &told));
        }
        let written = self.append(*to, class, encode);
        assert!(
            written <= len + LENGTH_SLACK,
            "a frame of {written} bytes was announced as {len}"
        );
        Sent::Queued
    }

    fn close(&mut self, peer: &Peer) {
        let outbox = &mut self.outboxes[peer.0 as usize];
        if std::mem::take(&mut outbox.is_open) {
            self.newly_closed.push(*peer);
            self.log.push(Event::Closed(*peer));
        }
    }

    fn in_flight(&self, peer: &Peer) -> u32 {
        self.outboxes[peer.0 as usize].in_flight
    }

    fn call_started(&mut self, caller: Option<&Peer>, _handler: &Peer) {
        match caller {
            Some(caller) => self.outboxes[caller.0 as usize].in_flight += 1,
            None => self.detached += 1,
        }
        self.totals.calls_started += 1;
    }

    fn call_ended(&mut self, caller: Option<&Peer>, _handler: &Peer, end: CallEnd) {
        let in_flight = match caller {
            Some(caller) => &mut self.outboxes[caller.0 as usize].in_flight,
            None => &mut self.detached,
        };
        *in_flight = in_flight
            .checked_sub(1)
            .expect("a call ends once, after it began");
        self.totals.calls_ended += 1;
        self.totals.timeouts += u64::from(end.code == Some(Code::Timeout));
        assert!(end.started <= end.ended, "a call ended before it began");
    }

    fn refused(&mut self, code: Code) {
        self.totals.refusals += 1;
        self.log.push(Event::Refused(code));
    }

    fn count(&mut self, what: Count) {
        self.totals.counts[what as usize] += 1;
        self.log.push(Event::Counted(what));
    }

    fn send_with(
        &mut self,
        to: &Peer,
        class: Class,
        len: usize,
        descriptors: &[Descriptor],
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        for descriptor in descriptors {
            assert!(self.can_share(descriptor.storage, descriptor.access));
        }
        let sent = self.send(to, class, len, encode);
        if sent == Sent::Queued {
            self.outboxes[to.0 as usize].descriptors += descriptors.len() as u64;
        }
        sent
    }

    fn block_changed(&mut self, to: &Peer, change: &Change<'_>) {
        let outbox = &mut self.outboxes[to.0 as usize];
        if !outbox.is_open {
            return;
        }
        let told = change.to_json();
        match outbox
            .changes
            .iter_mut()
            .find(|(topic, _)| *topic == change.topic)
        {
            Some((_, waiting)) => *waiting = told,
            None => outbox.changes.push((change.topic, told)),
        }
    }

    fn block_job(&mut self, job: Job<Peer>) {
        self.storages.asked.push(job);
    }

    fn keep(&mut self, change: latzero_fabric::keep::Change, promise: Option<&Peer>) {
        self.store.keep(change, promise.copied());
    }

    fn note_told(&mut self, to: &Peer, number: u64) {
        self.told.push((*to, number));
    }

    fn audit(&mut self, _by: &Peer, audit: &latzero_fabric::Audit<'_>) {
        self.audited
            .push(format!("{} {}", audit.event, audit.detail));
    }

    fn next_number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn unix_ms(&self, now: Time) -> u64 {
        crate::world::EPOCH_MS + now.0 / 1000
    }

    fn count_held(&mut self, pool: &PoolName, number: u32, change: i32) {
        self.storages.counted.push((pool.clone(), number, change));
    }

    fn with_ledger<R>(&mut self, f: impl FnOnce(&mut Ledger) -> R) -> R {
        f(&mut self.storages.ledger)
    }

    fn block_version(&self, storage: StorageId) -> u64 {
        self.storages.at(storage).map_or(0, |stored| stored.version)
    }

    fn version_noted(&mut self, storage: StorageId, version: u64) -> u64 {
        // Nobody maps anything here: what is said to be written is written.
        let Some(stored) = self.storages.stored.get_mut(&storage) else {
            return 0;
        };
        // The largest number says that nothing was said, and asks the block itself.
        if version < u64::MAX {
            stored.version = stored.version.max(version);
        }
        stored.version
    }

    fn set_fence(&mut self, storage: StorageId, fence: u64, _is_held: bool) {
        if let Some(stored) = self.storages.stored.get_mut(&storage) {
            stored.fence = fence;
        }
    }

    fn can_share(&self, storage: StorageId, access: Access) -> bool {
        self.storages.can_share(storage, access)
    }
}
