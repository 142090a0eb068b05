//! Bytes on their way to one connection: appended while a pool is held, flushed after it.
//!
//! The bound is in bytes. What does not fit is refused, dropped and counted, or takes the headroom, by its class; the
//! reader of a full outbox costs the server this much and others nothing. Whoever flushes takes the bytes out, writes
//! them without the lock, and puts back what the kernel did not take, so that appending never waits for a write.

use latzero_fabric::{Class, Sent};
use latzero_protocol::encode;

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
}

/// What a flush took out to write.
pub(crate) struct Taken {
    pub(crate) buf: Vec<u8>,
    pub(crate) head: usize,
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
        if self.is_writing || self.buf.len() == self.head {
            return None;
        }
        self.is_writing = true;
        self.writing = self.buf.len() - self.head;
        Some(Taken {
            buf: std::mem::take(&mut self.buf),
            head: std::mem::take(&mut self.head),
        })
    }

    /// Puts back what was not written. Returns a buffer to reuse where all of it was.
    pub(crate) fn put_back(&mut self, taken: Taken) -> Option<Vec<u8>> {
        self.is_writing = false;
        self.writing = 0;
        let Taken { mut buf, head } = taken;
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
        if self.head > 64 * 1024 && self.head > self.buf.len() / 2 {
            self.buf.drain(..self.head);
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
