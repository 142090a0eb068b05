//! Bytes on their way to one connection: appended while a pool is held, flushed after it.
//!
//! The bound is in bytes. What does not fit is refused, dropped and counted, or takes the headroom, by its class; the
//! reader of a full outbox costs the server this much and others nothing. Whoever flushes takes the bytes out, writes
//! them without the lock, and puts back what the kernel did not take, so that appending never waits for a write.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use latzero_fabric::{Class, Sent};
use latzero_protocol::encode;

use crate::timers::PoolCell;

/// How much an outbox holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Bytes for everything but control messages. One frame that is larger alone is taken by an empty outbox.
    pub(crate) bytes_max: usize,
    /// Bytes more for control messages.
    pub(crate) headroom: usize,
}

/// Bytes that wait for the kernel.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    buf: Vec<u8>,
    /// Bytes of `buf` that are written already.
    head: usize,
    /// Bytes that a flush has taken out.
    writing: usize,
    is_writing: bool,
    /// Emits and events dropped since the reader was told.
    lost: u64,
    lost_total: u64,
    /// Nothing more is taken: the connection ends.
    is_closed: bool,
    /// The kernel took less than it was offered.
    is_blocked: bool,
    /// Bytes counted into the total of all outboxes: those that the kernel would not take.
    accounted: usize,
    /// Where `buf` begins, in bytes since the connection began.
    start: u64,
    /// Descriptors that travel with the byte at their place.
    descriptors: VecDeque<Travelling>,
    /// Newest versions of blocks that the reader is still to be told, by topic.
    changes: Vec<((u32, u32), String)>,
    /// Whom to tell that everything up to a place has left, in the order of the places.
    leaving: VecDeque<Leaving>,
}

/// What a pool waits for: that everything before a byte, counted since the connection began, has left.
#[derive(Debug)]
struct Leaving {
    at: u64,
    pool: Arc<PoolCell>,
    number: u64,
}

/// Descriptors on their way, and the byte that they travel with, counted since the connection began.
#[derive(Debug)]
pub(crate) struct Travelling {
    pub(crate) at: u64,
    pub(crate) descriptors: Vec<Arc<OwnedFd>>,
}

/// What a flush took out to write.
pub(crate) struct Taken {
    pub(crate) buf: Vec<u8>,
    pub(crate) head: usize,
    /// Where `buf` begins, in bytes since the connection began.
    pub(crate) start: u64,
    pub(crate) descriptors: VecDeque<Travelling>,
}

impl Taken {
    /// What is to be written next: bytes up to those that descriptors travel with, and the descriptors that travel with
    /// the first of them.
    pub(crate) fn next(&self) -> (&[u8], &[Arc<OwnedFd>]) {
        let here = self.start + self.head as u64;
        let mut places = self.descriptors.iter();
        let first = places.next();
        let (descriptors, limit) = match first {
            Some(first) if first.at == here => {
                (&first.descriptors[..], places.next().map(|next| next.at))
            }
            other => (&[][..], other.map(|next| next.at)),
        };
        let end = limit.map_or(self.buf.len(), |at| {
            usize::try_from(at - self.start).expect("within the buffer")
        });
        (&self.buf[self.head..end], descriptors)
    }

    /// Notes that `n` bytes were written.
    pub(crate) fn advance(&mut self, n: usize) {
        let here = self.start + self.head as u64;
        if n > 0 && self.descriptors.front().is_some_and(|d| d.at == here) {
            self.descriptors.pop_front();
        }
        self.head += n;
    }
}

impl Outbox {
    /// Bytes that wait.
    pub(crate) fn queued(&self) -> usize {
        self.buf.len() - self.head + self.writing
    }

    pub(crate) fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    pub(crate) fn lost_total(&self) -> u64 {
        self.lost_total
    }

    /// Appends a message of about `length` bytes. `spare` is a buffer to begin with where there is none.
    pub(crate) fn append(
        &mut self,
        class: Class,
        length: usize,
        bounds: Bounds,
        spare: impl FnOnce() -> Vec<u8>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        if self.is_closed {
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
        if self.buf.capacity() == 0 {
            self.buf = spare();
        }
        if self.lost > 0 && matches!(class, Class::Emit | Class::Event) {
            // Before the first message after the gap, so that the reader knows where it is.
            let lost = std::mem::take(&mut self.lost);
            encode::message(
                &mut self.buf,
                &format!("{{\"action\":\"event\",\"event\":\"lost\",\"count\":{lost}}}"),
            );
        }
        encode(&mut self.buf);
        Sent::Queued
    }

    /// Has descriptors travel with the message that is appended next.
    pub(crate) fn attach(&mut self, descriptors: Vec<Arc<OwnedFd>>) {
        let at = self.start + self.buf.len() as u64;
        self.descriptors.push_back(Travelling { at, descriptors });
    }

    /// Takes back what [`Outbox::attach`] said: the message was not appended.
    pub(crate) fn detach(&mut self) {
        self.descriptors.pop_back();
    }

    /// Has the reader told of a change; a newer one of the same topic takes its place. True where the outbox is to be
    /// flushed for it.
    pub(crate) fn note_change(&mut self, topic: (u32, u32), told: String) -> bool {
        if self.is_closed {
            return false;
        }
        match self.changes.iter_mut().find(|(known, _)| *known == topic) {
            Some((_, waiting)) => {
                *waiting = told;
                false
            }
            None => {
                self.changes.push((topic, told));
                !self.is_blocked
            }
        }
    }

    /// Has a pool told when all that was appended has left; true where it has already.
    pub(crate) fn note_leaving(&mut self, pool: &Arc<PoolCell>, number: u64) -> bool {
        let at = self.start + self.buf.len() as u64;
        if self.is_closed {
            return false;
        }
        if !self.is_writing && self.buf.len() == self.head {
            return true;
        }
        let pool = Arc::clone(pool);
        self.leaving.push_back(Leaving { at, pool, number });
        false
    }

    /// Takes the next of those whose bytes have left.
    pub(crate) fn take_left(&mut self) -> Option<(Arc<PoolCell>, u64)> {
        let left = self.start + self.head as u64;
        let is_due = |next: &Leaving| !self.is_writing && next.at <= left;
        self.leaving.front().filter(|next| is_due(next))?;
        let Leaving { pool, number, .. } = self.leaving.pop_front()?;
        Some((pool, number))
    }

    /// Leaves out a message for which there is no room; the reader is told how many emits and events it lost.
    pub(crate) fn refuse(&mut self, class: Class) -> Sent {
        if matches!(class, Class::Emit | Class::Event) {
            self.lost += 1;
            self.lost_total += 1;
        }
        Sent::Full
    }

    /// Takes out what waits; `None` where there is nothing, or somebody else is writing.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        if self.is_writing {
            return None;
        }
        for (_, told) in self.changes.drain(..) {
            encode::message(&mut self.buf, &told);
        }
        if self.buf.len() == self.head {
            return None;
        }
        self.is_writing = true;
        self.writing = self.buf.len() - self.head;
        let start = self.start;
        self.start += self.buf.len() as u64;
        Some(Taken {
            buf: std::mem::take(&mut self.buf),
            head: std::mem::take(&mut self.head),
            start,
            descriptors: std::mem::take(&mut self.descriptors),
        })
    }

    /// Puts back what was not written. Returns a buffer to reuse where all of it was.
    pub(crate) fn put_back(&mut self, taken: Taken) -> Option<Vec<u8>> {
        self.is_writing = false;
        self.writing = 0;
        let Taken {
            mut buf,
            head,
            start,
            mut descriptors,
        } = taken;
        if self.is_closed {
            // Closed by its own loop while another one was writing: what is left goes nowhere.
            buf.clear();
            return Some(buf);
        }
        self.is_blocked = head < buf.len();
        if !self.is_blocked {
            buf.clear();
            return Some(buf);
        }
        // Appended meanwhile: it comes after.
        buf.extend_from_slice(&self.buf);
        self.buf = buf;
        self.head = head;
        self.start = start;
        descriptors.append(&mut self.descriptors);
        self.descriptors = descriptors;
        if self.head > 64 * 1024 && self.head > self.buf.len() / 2 {
            self.buf.drain(..self.head);
            self.start += self.head as u64;
            self.head = 0;
        }
        None
    }

    /// Brings what is counted into the total up to date; returns what was counted before and what is now.
    pub(crate) fn account(&mut self) -> (usize, usize) {
        let before = self.accounted;
        self.accounted = if self.is_blocked { self.queued() } else { 0 };
        (before, self.accounted)
    }

    /// Takes nothing more, and forgets what waits; returns what was counted into the total.
    pub(crate) fn close(&mut self) -> usize {
        let accounted = self.accounted;
        *self = Outbox {
            is_closed: true,
            lost_total: self.lost_total,
            is_writing: self.is_writing,
            writing: self.writing,
            ..Outbox::default()
        };
        accounted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        bytes_max: 100,
        headroom: 50,
    };

    fn append(outbox: &mut Outbox, class: Class, length: usize) -> Sent {
        outbox.append(class, length, BOUNDS, Vec::new, |out| {
            out.resize(out.len() + length, b'x')
        })
    }

    #[test]
    fn each_class_has_its_answer_at_the_bound() {
        let mut outbox = Outbox::default();
        assert_eq!(append(&mut outbox, Class::Call, 90), Sent::Queued);
        for class in [Class::Call, Class::Reply, Class::Emit, Class::Event] {
            assert_eq!(append(&mut outbox, class, 20), Sent::Full, "{class:?}");
        }
        assert_eq!(append(&mut outbox, Class::Control, 60), Sent::Queued);
        assert_eq!(append(&mut outbox, Class::Control, 1), Sent::Full);
        assert_eq!((outbox.queued(), outbox.lost_total()), (150, 2));
    }

    #[test]
    fn a_large_frame_fits_an_empty_outbox() {
        let mut outbox = Outbox::default();
        assert_eq!(append(&mut outbox, Class::Call, 1000), Sent::Queued);
        assert_eq!(append(&mut outbox, Class::Call, 1), Sent::Full);
    }

    #[test]
    fn the_reader_learns_what_it_lost_before_what_comes_next() {
        let mut outbox = Outbox::default();
        append(&mut outbox, Class::Call, 100);
        append(&mut outbox, Class::Emit, 10);
        append(&mut outbox, Class::Emit, 10);
        let mut taken = outbox.take().unwrap();
        taken.head = taken.buf.len();
        assert!(outbox.put_back(taken).is_some());
        append(&mut outbox, Class::Emit, 1);
        let taken = outbox.take().unwrap();
        let text = String::from_utf8_lossy(&taken.buf).into_owned();
        assert!(
            text.contains("\"event\":\"lost\",\"count\":2}") && text.ends_with("x"),
            "{text}"
        );
    }

    #[test]
    fn pools_hear_when_what_they_wait_for_has_left() {
        let name = latzero_protocol::PoolName::new("p").unwrap();
        let pool = latzero_fabric::Pool::new(
            0,
            name,
            latzero_fabric::Limits::default(),
            latzero_fabric::Prng::new(1),
        );
        let pool = PoolCell::new(pool);
        let left = |outbox: &mut Outbox| -> Vec<u64> {
            std::iter::from_fn(|| outbox.take_left().map(|(_, number)| number)).collect()
        };
        let mut outbox = Outbox::default();
        // Nothing waits: it has left.
        assert!(outbox.note_leaving(&pool, 1));
        append(&mut outbox, Class::Reply, 10);
        assert!(!outbox.note_leaving(&pool, 2));
        append(&mut outbox, Class::Reply, 10);
        assert!(!outbox.note_leaving(&pool, 3));
        let mut taken = outbox.take().unwrap();
        append(&mut outbox, Class::Reply, 5);
        assert!(!outbox.note_leaving(&pool, 4));
        assert!(left(&mut outbox).is_empty(), "it is being written");
        taken.advance(9);
        outbox.put_back(taken);
        assert!(left(&mut outbox).is_empty());
        let mut taken = outbox.take().unwrap();
        taken.advance(1);
        outbox.put_back(taken);
        assert_eq!(left(&mut outbox), [2]);
        let mut taken = outbox.take().unwrap();
        taken.advance(15);
        assert!(outbox.put_back(taken).is_some());
        assert_eq!(left(&mut outbox), [3, 4]);
        // What is left at the end goes nowhere.
        append(&mut outbox, Class::Reply, 10);
        assert!(!outbox.note_leaving(&pool, 5));
        outbox.close();
        assert!(left(&mut outbox).is_empty());
        assert!(!outbox.note_leaving(&pool, 6));
    }

    #[test]
    fn descriptors_travel_with_their_own_byte() {
        let descriptor = || Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let mut outbox = Outbox::default();
        append(&mut outbox, Class::Call, 10);
        outbox.attach(vec![descriptor()]);
        append(&mut outbox, Class::Call, 5);
        outbox.attach(vec![descriptor(), descriptor()]);
        append(&mut outbox, Class::Call, 3);
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
    fn the_newest_change_is_told_and_never_lost() {
        let mut outbox = Outbox::default();
        append(&mut outbox, Class::Call, 100);
        assert!(outbox.note_change((1, 1), "{1}".into()));
        assert!(!outbox.note_change((1, 1), "{2}".into()));
        assert!(outbox.note_change((1, 2), "{3}".into()));
        let taken = outbox.take().unwrap();
        let text = String::from_utf8_lossy(&taken.buf[100..]).into_owned();
        assert_eq!(text.replace('\0', ""), "\u{3}{2}\u{3}{3}");
    }

    #[test]
    fn what_comes_back_to_a_closed_outbox_is_let_go() {
        let mut outbox = Outbox::default();
        append(&mut outbox, Class::Call, 10);
        let taken = outbox.take().unwrap();
        outbox.close();
        assert!(outbox.put_back(taken).is_some());
        assert_eq!((outbox.queued(), outbox.account()), (0, (0, 0)));
        assert_eq!(append(&mut outbox, Class::Call, 1), Sent::Gone);
    }

    #[test]
    fn what_was_not_written_stays_in_front() {
        let mut outbox = Outbox::default();
        append(&mut outbox, Class::Call, 10);
        let mut taken = outbox.take().unwrap();
        assert!(outbox.take().is_none());
        outbox.append(Class::Call, 1, BOUNDS, Vec::new, |out| out.push(b'y'));
        assert!(outbox.take().is_none(), "one writer at a time");
        taken.head = 4;
        assert!(outbox.put_back(taken).is_none());
        assert!(outbox.is_blocked());
        assert_eq!(outbox.queued(), 7);
        let taken = outbox.take().unwrap();
        assert_eq!(&taken.buf[taken.head..], b"xxxxxxy");
    }
}
