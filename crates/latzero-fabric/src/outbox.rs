//! The outbox: bytes that wait to be written to one connection.
//!
//! Messages are appended while a pool is locked, and written after it is released. The limit is in
//! bytes. The [`Class`] of a message that does not fit decides whether it is refused, dropped and
//! counted, or may use the headroom. So a slow reader costs the server a bounded amount, and other
//! clients nothing. A body for many readers is stored once and shared. The writer takes the bytes
//! out, writes them without the lock, and puts back what the kernel did not accept, so appending
//! never waits.

use std::collections::VecDeque;
use std::sync::Arc;

use latzero_protocol::encode;

use crate::ledger::{Account, Full, Reservation, Resource};

/// The kind of a message, which decides what happens when its receiver does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A call for a handler: refused with [`Sent::Full`], and its caller gets `overloaded`.
    Call,
    /// An answer for a caller: refused with [`Sent::Full`], and a short error replaces it.
    Reply,
    /// An emit: dropped and counted, and the receiver learns how many it lost.
    Emit,
    /// A push to a watcher: treated like an emit.
    Event,
    /// A message that must arrive (an error, a cancel, an end): it may use the headroom. If that is
    /// full too, the connection is closed.
    Control,
}

/// What happened to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is in the receiver's outbox.
    Queued,
    /// The outbox is full; nothing was appended.
    Full,
    /// The receiver's connection has ended.
    Gone,
}

/// The limits of an outbox.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes for all messages except control messages. An empty outbox accepts one larger frame.
    pub bytes_max: usize,
    /// Further bytes for control messages.
    pub headroom: usize,
}

/// A frame that several outboxes share, and its reservation. Cloning it copies no bytes.
#[derive(Debug, Clone)]
pub struct SharedBody(Arc<(Box<[u8]>, Reservation)>);

impl SharedBody {
    /// Has `encode` write a frame of at most about `length` bytes, which `account` has room for.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn encode(
        length: usize,
        account: &Arc<Account>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Self, Full> {
        let mut hold = account.reserve(Resource::Outbox, length as u64)?;
        let mut frame = Vec::with_capacity(length);
        encode(&mut frame);
        hold.force(frame.len() as u64);
        Ok(SharedBody(Arc::new((frame.into_boxed_slice(), hold))))
    }
}

impl std::ops::Deref for SharedBody {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.0
    }
}

/// A chunk of bytes: owned by this outbox, or shared with others.
#[derive(Debug)]
enum Chunk {
    Own(Vec<u8>),
    Shared(SharedBody),
}

impl Chunk {
    fn bytes(&self) -> &[u8] {
        match self {
            Chunk::Own(bytes) => bytes,
            Chunk::Shared(bytes) => bytes,
        }
    }
}

/// Bytes that wait to be written. `F` is a descriptor that is sent with a message, `N` is who is
/// notified when a message was written.
#[derive(Debug)]
pub struct Outbox<F, N> {
    chunks: VecDeque<Chunk>,
    /// Bytes of all chunks.
    length: usize,
    /// The bytes among them that no other outbox holds.
    own: usize,
    /// Bytes of the first chunk that are written already.
    head: usize,
    /// Bytes that a writer has taken out.
    writing: usize,
    is_writing: bool,
    /// Emits and events dropped since the last notice to the reader.
    lost: u64,
    lost_total: u64,
    /// Nothing more is appended: the connection ends once everything is written.
    is_sealed: bool,
    /// Nothing more is written.
    is_closed: bool,
    /// The kernel accepted less than it was offered.
    is_blocked: bool,
    /// The position of the first unwritten byte, counted since the connection began.
    start: u64,
    descriptors: VecDeque<Travelling<F>>,
    /// The newest versions of blocks that are not yet sent to the reader, by topic.
    changes: Vec<((u32, u32), String)>,
    /// Who to notify once everything up to a position is written, in the order of the positions.
    notices: VecDeque<(u64, N)>,
}

impl<F, N> Default for Outbox<F, N> {
    fn default() -> Self {
        Outbox {
            chunks: VecDeque::new(),
            length: 0,
            own: 0,
            head: 0,
            writing: 0,
            is_writing: false,
            lost: 0,
            lost_total: 0,
            is_sealed: false,
            is_closed: false,
            is_blocked: false,
            start: 0,
            descriptors: VecDeque::new(),
            changes: Vec::new(),
            notices: VecDeque::new(),
        }
    }
}

/// Descriptors, and the byte that they travel with, counted since the connection began.
#[derive(Debug)]
struct Travelling<F> {
    at: u64,
    descriptors: Vec<F>,
}

/// What a writer took out.
#[derive(Debug)]
pub struct PendingWrite<F> {
    chunks: VecDeque<Chunk>,
    length: usize,
    own: usize,
    head: usize,
    start: u64,
    descriptors: VecDeque<Travelling<F>>,
    spare: Option<Vec<u8>>,
}

impl<F> PendingWrite<F> {
    /// Whether everything is written.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.chunks.is_empty()
    }

    /// What to write next: bytes up to the next ones that have descriptors, and the descriptors to
    /// send with the first byte.
    #[must_use]
    pub fn next(&self) -> (&[u8], &[F]) {
        let Some(chunk) = self.chunks.front() else {
            return (&[], &[]);
        };
        let rest = &chunk.bytes()[self.head..];
        let mut places = self.descriptors.iter();
        let first = places.next();
        let (descriptors, limit) = match first {
            Some(first) if first.at == self.start => {
                (&first.descriptors[..], places.next().map(|next| next.at))
            }
            other => (&[][..], other.map(|next| next.at)),
        };
        let until = limit.map_or(rest.len(), |at| {
            usize::try_from(at - self.start).map_or(rest.len(), |n| n.min(rest.len()))
        });
        (&rest[..until], descriptors)
    }

    /// Notes that `n` bytes were written, of those that [`PendingWrite::next`] returned.
    pub fn advance(&mut self, n: usize) {
        if n > 0 && self.descriptors.front().is_some_and(|d| d.at == self.start) {
            self.descriptors.pop_front();
        }
        self.start += n as u64;
        self.head += n;
        self.length -= n;
        if matches!(self.chunks.front(), Some(Chunk::Own(_))) {
            self.own -= n;
        }
        if let Some(chunk) = self.chunks.front()
            && self.head == chunk.bytes().len()
        {
            self.head = 0;
            if let Some(Chunk::Own(mut buf)) = self.chunks.pop_front() {
                buf.clear();
                self.spare = Some(buf);
            }
        }
    }
}

/// From this many bytes on, an emit to several receivers has a buffer that they share.
pub const SHARE_BYTES: usize = 4096;

/// A chunk of this many bytes is followed by another one, rather than grown.
const CHUNK_BYTES: usize = 256 * 1024;

impl<F, N> Outbox<F, N> {
    /// The number of bytes that wait, including those that a writer has taken out.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.length + self.writing
    }

    /// Those of them that no other outbox holds.
    #[must_use]
    pub fn own(&self) -> usize {
        self.own
    }

    /// Descriptors that wait.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        self.descriptors.iter().map(|t| t.descriptors.len()).sum()
    }

    /// Whether the kernel accepted less than it was offered.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// How many emits and events this connection lost.
    #[must_use]
    pub fn lost_total(&self) -> u64 {
        self.lost_total
    }

    /// Whether there is room for a message of `length` bytes ([`Sent::Queued`]). If not, a loss is
    /// counted.
    pub fn admit(&mut self, class: Class, length: usize, bounds: Bounds) -> Sent {
        if self.is_sealed {
            return Sent::Gone;
        }
        let queued = self.queued();
        let max = match class {
            Class::Control => bounds.bytes_max + bounds.headroom,
            _ => bounds.bytes_max,
        };
        if queued > 0 && queued + length > max {
            return self.refuse(class);
        }
        Sent::Queued
    }

    /// Drops a message for which there is no room; the client is notified how many emits and events
    /// it lost.
    pub fn refuse(&mut self, class: Class) -> Sent {
        if matches!(class, Class::Emit | Class::Event) {
            self.note_lost(1);
        }
        Sent::Full
    }

    /// Counts emits or events that were dropped.
    pub fn note_lost(&mut self, count: u64) {
        self.lost += count;
        self.lost_total += count;
    }

    /// Appends a message that was admitted, with the descriptors to send with its first byte.
    /// `spare` is used as the buffer if there is none. Returns the bytes of the message.
    pub fn append(
        &mut self,
        class: Class,
        descriptors: Vec<F>,
        spare: impl FnOnce() -> Vec<u8>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> &[u8] {
        if matches!(class, Class::Emit | Class::Event) {
            self.append_lost();
        }
        self.attach(descriptors);
        let has_room = |chunk: &Chunk| matches!(chunk, Chunk::Own(buf) if buf.len() < CHUNK_BYTES);
        if !self.chunks.back().is_some_and(has_room) {
            self.chunks.push_back(Chunk::Own(spare()));
        }
        let Some(Chunk::Own(buf)) = self.chunks.back_mut() else {
            unreachable!("it was just pushed");
        };
        let before = buf.len();
        encode(buf);
        self.length += buf.len() - before;
        self.own += buf.len() - before;
        &buf[before..]
    }

    /// Appends a shared frame that was admitted. Returns its bytes.
    pub fn append_shared(&mut self, class: Class, frame: SharedBody) -> &[u8] {
        if matches!(class, Class::Emit | Class::Event) {
            self.append_lost();
        }
        self.length += frame.len();
        self.chunks.push_back(Chunk::Shared(frame));
        self.chunks.back().map_or(&[], Chunk::bytes)
    }

    /// Reports how many messages were lost, before the first message after the gap, so that the
    /// reader knows where the gap is.
    fn append_lost(&mut self) {
        if self.lost > 0 {
            let lost = std::mem::take(&mut self.lost);
            self.append_text(&format!(
                "{{\"action\":\"event\",\"event\":\"lost\",\"count\":{lost}}}"
            ));
        }
    }

    fn append_text(&mut self, json: &str) {
        self.append(Class::Control, Vec::new(), Vec::new, |out| {
            encode::message(out, json);
        });
    }

    fn attach(&mut self, descriptors: Vec<F>) {
        if !descriptors.is_empty() {
            let at = self.start + self.length as u64;
            self.descriptors.push_back(Travelling { at, descriptors });
        }
    }

    /// Notifies the reader of a change; a newer one of the same topic replaces it. True if the
    /// outbox must be written.
    pub fn note_change(&mut self, topic: (u32, u32), event: String) -> bool {
        if self.is_sealed {
            return false;
        }
        match self.changes.iter_mut().find(|(known, _)| *known == topic) {
            Some((_, waiting)) => {
                *waiting = event;
                false
            }
            None => {
                self.changes.push((topic, event));
                !self.is_blocked
            }
        }
    }

    /// Notifies `who` when everything appended so far is written; returns `who` if it already is.
    pub fn notify_when_written(&mut self, who: N) -> Option<N> {
        if self.is_closed {
            return None;
        }
        if !self.is_writing && self.length == 0 {
            return Some(who);
        }
        self.notices
            .push_back((self.start + self.length as u64, who));
        None
    }

    /// Takes the next of those to notify.
    pub fn take_notice(&mut self) -> Option<N> {
        let is_due = |next: &(u64, N)| !self.is_writing && next.0 <= self.start;
        self.notices.front().filter(|next| is_due(next))?;
        self.notices.pop_front().map(|(_, who)| who)
    }

    /// Takes out what waits; `None` if there is nothing, or another writer is active.
    pub fn take(&mut self) -> Option<PendingWrite<F>> {
        if self.is_writing {
            return None;
        }
        for (_, event) in std::mem::take(&mut self.changes) {
            self.append_text(&event);
        }
        if self.length == 0 {
            return None;
        }
        self.is_writing = true;
        self.writing = std::mem::take(&mut self.length);
        let start = self.start;
        self.start += self.writing as u64;
        Some(PendingWrite {
            chunks: std::mem::take(&mut self.chunks),
            length: self.writing,
            own: std::mem::take(&mut self.own),
            head: std::mem::take(&mut self.head),
            start,
            descriptors: std::mem::take(&mut self.descriptors),
            spare: None,
        })
    }

    /// Puts back what was not written. Returns a buffer to reuse. If a client lost messages and has
    /// room again, it is notified now, because the next message may be a long time away.
    pub fn put_back(&mut self, taken: PendingWrite<F>) -> Option<Vec<u8>> {
        self.is_writing = false;
        self.writing = 0;
        let PendingWrite {
            mut chunks,
            length,
            own,
            head,
            start,
            mut descriptors,
            spare,
        } = taken;
        if self.is_closed {
            // The connection's loop closed it while another one was writing.
            return spare;
        }
        self.is_blocked = length > 0;
        if self.is_blocked {
            chunks.append(&mut self.chunks);
            self.chunks = chunks;
            self.length += length;
            self.own += own;
            self.head = head;
            self.start = start;
            descriptors.append(&mut self.descriptors);
            self.descriptors = descriptors;
        } else {
            if self.chunks.is_empty() {
                // Its allocation serves the next messages.
                self.chunks = chunks;
            }
            self.append_lost();
        }
        spare
    }

    /// Accepts nothing more; what waits is still written.
    pub fn seal(&mut self) {
        self.is_sealed = true;
    }

    /// Takes nothing more, and drops what waits.
    pub fn close(&mut self) {
        *self = Outbox {
            is_sealed: true,
            is_closed: true,
            lost_total: self.lost_total,
            is_writing: self.is_writing,
            writing: self.writing,
            ..Outbox::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Ledger;
    use crate::limits::Limits;

    const BOUNDS: Bounds = Bounds {
        bytes_max: 100,
        headroom: 50,
    };

    type TestOutbox = Outbox<u8, u64>;

    fn append(outbox: &mut TestOutbox, class: Class, length: usize) -> Sent {
        let sent = outbox.admit(class, length, BOUNDS);
        if sent == Sent::Queued {
            outbox.append(class, Vec::new(), Vec::new, |out| {
                out.resize(out.len() + length, b'x');
            });
        }
        sent
    }

    /// Writes at most `most` bytes; returns them.
    fn write(outbox: &mut TestOutbox, most: usize) -> Vec<u8> {
        let mut written = Vec::new();
        let Some(mut taken) = outbox.take() else {
            return written;
        };
        while written.len() < most && !taken.is_done() {
            let (bytes, _) = taken.next();
            let n = bytes.len().min(most - written.len());
            written.extend_from_slice(&bytes[..n]);
            taken.advance(n);
        }
        outbox.put_back(taken);
        written
    }

    #[test]
    fn each_class_has_a_response_at_its_bound() {
        let mut outbox = TestOutbox::default();
        assert_eq!(append(&mut outbox, Class::Call, 90), Sent::Queued);
        for class in [Class::Call, Class::Reply, Class::Emit, Class::Event] {
            assert_eq!(append(&mut outbox, class, 20), Sent::Full, "{class:?}");
        }
        assert_eq!(append(&mut outbox, Class::Control, 60), Sent::Queued);
        assert_eq!(append(&mut outbox, Class::Control, 1), Sent::Full);
        assert_eq!((outbox.queued(), outbox.lost_total()), (150, 2));
    }

    #[test]
    fn an_empty_outbox_takes_one_large_frame() {
        let mut outbox = TestOutbox::default();
        assert_eq!(append(&mut outbox, Class::Call, 1000), Sent::Queued);
        assert_eq!(append(&mut outbox, Class::Call, 1), Sent::Full);
    }

    #[test]
    fn a_reader_learns_what_it_lost_as_soon_as_there_is_room() {
        let mut outbox = TestOutbox::default();
        append(&mut outbox, Class::Call, 100);
        append(&mut outbox, Class::Emit, 10);
        append(&mut outbox, Class::Emit, 10);
        assert_eq!(write(&mut outbox, 100).len(), 100);
        append(&mut outbox, Class::Emit, 1);
        let text = String::from_utf8(write(&mut outbox, 1000)).unwrap();
        assert!(
            text.contains("\"event\":\"lost\",\"count\":2}") && text.ends_with('x'),
            "{text}"
        );
    }

    #[test]
    fn a_shared_frame_stays_in_its_place() {
        let ledger = Ledger::new(&Limits::default());
        let frame = SharedBody::encode(8, &ledger.user(true), |out| {
            out.extend_from_slice(b"-shared-");
        })
        .unwrap();
        let (mut a, mut b) = (TestOutbox::default(), TestOutbox::default());
        append(&mut a, Class::Call, 3);
        for outbox in [&mut a, &mut b] {
            outbox.append_shared(Class::Emit, frame.clone());
        }
        append(&mut a, Class::Call, 2);
        assert_eq!((a.queued(), b.queued()), (13, 8));
        assert_eq!(write(&mut a, 5), b"xxx-s");
        assert_eq!(write(&mut a, 100), b"hared-xx");
        assert_eq!(write(&mut b, 100), b"-shared-");
        assert_eq!((a.own(), ledger.all().used(Resource::Outbox)), (0, 8));
        drop(frame);
        assert!(ledger.is_empty(), "it is counted once while it waits");
    }

    #[test]
    fn notices_come_when_their_bytes_are_written() {
        let noticed = |outbox: &mut TestOutbox| -> Vec<u64> {
            std::iter::from_fn(|| outbox.take_notice()).collect()
        };
        let mut outbox = TestOutbox::default();
        assert_eq!(outbox.notify_when_written(1), Some(1), "nothing waits");
        append(&mut outbox, Class::Reply, 10);
        assert_eq!(outbox.notify_when_written(2), None);
        append(&mut outbox, Class::Reply, 10);
        assert_eq!(outbox.notify_when_written(3), None);
        let mut taken = outbox.take().unwrap();
        append(&mut outbox, Class::Reply, 5);
        assert_eq!(outbox.notify_when_written(4), None);
        assert!(noticed(&mut outbox).is_empty(), "it is being written");
        taken.advance(9);
        outbox.put_back(taken);
        assert!(noticed(&mut outbox).is_empty());
        write(&mut outbox, 1);
        assert_eq!(noticed(&mut outbox), [2]);
        write(&mut outbox, 15);
        assert_eq!(noticed(&mut outbox), [3, 4]);
        append(&mut outbox, Class::Reply, 10);
        outbox.notify_when_written(5);
        outbox.close();
        assert!(noticed(&mut outbox).is_empty(), "the rest is not written");
        assert_eq!(outbox.notify_when_written(6), None);
    }

    #[test]
    fn descriptors_travel_with_their_own_byte() {
        let mut outbox = TestOutbox::default();
        let mut send = |length: usize, descriptors: &[u8]| {
            outbox.append(Class::Call, descriptors.to_vec(), Vec::new, |out| {
                out.resize(out.len() + length, b'x');
            });
        };
        send(10, &[]);
        send(5, &[1]);
        send(3, &[2, 3]);
        let mut seen = Vec::new();
        // Three bytes at a time, put back and taken again in between.
        while let Some(mut taken) = outbox.take() {
            let (bytes, descriptors) = taken.next();
            let n = bytes.len().min(3);
            seen.push((n, descriptors.len()));
            taken.advance(n);
            outbox.put_back(taken);
        }
        let expected = [(3, 0), (3, 0), (3, 0), (1, 0), (3, 1), (2, 0), (3, 2)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_newest_change_is_reported_and_never_lost() {
        let mut outbox = TestOutbox::default();
        append(&mut outbox, Class::Call, 100);
        assert!(outbox.note_change((1, 1), "{1}".into()));
        assert!(!outbox.note_change((1, 1), "{2}".into()));
        assert!(outbox.note_change((1, 2), "{3}".into()));
        let bytes = write(&mut outbox, 1000);
        let text = String::from_utf8_lossy(&bytes[100..]).into_owned();
        assert_eq!(text.replace('\0', ""), "\u{3}{2}\u{3}{3}");
    }

    #[test]
    fn a_closed_outbox_drops_returned_frames() {
        let mut outbox = TestOutbox::default();
        append(&mut outbox, Class::Call, 10);
        let taken = outbox.take().unwrap();
        outbox.close();
        outbox.put_back(taken);
        assert_eq!(outbox.queued(), 0);
        assert_eq!(append(&mut outbox, Class::Call, 1), Sent::Gone);
    }

    #[test]
    fn unwritten_bytes_stay_first() {
        let mut outbox = TestOutbox::default();
        append(&mut outbox, Class::Call, 10);
        let mut taken = outbox.take().unwrap();
        assert!(outbox.take().is_none(), "one writer at a time");
        outbox.append(Class::Call, Vec::new(), Vec::new, |out| out.push(b'y'));
        assert!(outbox.take().is_none(), "one writer at a time");
        taken.advance(4);
        outbox.put_back(taken);
        assert!(outbox.is_blocked());
        assert_eq!(outbox.queued(), 7);
        assert_eq!(write(&mut outbox, 100), b"xxxxxxy");
    }
}
