//! The receiving side of a connection: bytes become messages.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use latzero_protocol::{Envelope, Raw, frame};

use crate::sync::lock;
use crate::wire::link::Link;
use crate::wire::outbox::Outbox;

/// The most descriptors that wait for their message, whose frame may not be complete yet.
const DESCRIPTORS_KEPT_MAX: usize = 1024;

/// Initial size of the receive buffer in bytes. It grows with what arrives, not with what is
/// announced.
const BUFFER_BYTES: usize = 64 * 1024;

/// A receive buffer above this size in bytes is freed once it is empty. Like the send buffer, it
/// can hold one large message, rounded up to a power of two.
const BUFFER_BYTES_KEPT: usize = 32 * 1024 * 1024;

/// The receiving side, with the bytes that were not decoded yet.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) link: Option<Arc<Link>>,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    /// Received descriptors that no message has taken yet, in order.
    descriptors: Vec<OwnedFd>,
    /// Whether the buffer has bytes that came with the handshake and were not decoded yet.
    pub(crate) is_fresh: bool,
    /// Why the connection ends, once the bytes in the buffer are decoded.
    pub(crate) lost: Option<String>,
}

/// The result of a read.
#[derive(Debug)]
pub(crate) enum Received {
    /// Bytes; fewer than there was room for if `short`, so the socket is likely empty.
    Bytes { short: bool },
    /// Nothing, for now.
    Nothing,
    /// The connection is over.
    Lost(String),
}

impl Input {
    pub(crate) fn new() -> Self {
        Input {
            link: None,
            buf: Vec::new(),
            start: 0,
            end: 0,
            descriptors: Vec::new(),
            is_fresh: false,
            lost: None,
        }
    }

    /// Makes sure that the current connection is read. False if there is none.
    pub(crate) fn attach(&mut self, outbox: &Outbox) -> bool {
        if self.link.is_some() {
            return true;
        }
        self.link = outbox.link();
        let Some(link) = &self.link else { return false };
        self.lost = None;
        let early = std::mem::take(&mut *lock(&link.early));
        self.descriptors = std::mem::take(&mut *lock(&link.early_descriptors));
        self.buf.clear();
        self.buf.resize(BUFFER_BYTES.max(early.len()), 0);
        self.buf[..early.len()].copy_from_slice(&early);
        (self.start, self.end) = (0, early.len());
        self.is_fresh = !early.is_empty();
        true
    }

    /// Makes room after the buffered bytes.
    fn make_room(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.buf.len() > BUFFER_BYTES_KEPT {
                self.buf.truncate(BUFFER_BYTES);
                self.buf.shrink_to_fit();
            }
        } else if self.end == self.buf.len() {
            if self.start > 0 {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                // One frame fills the buffer: it grows by as much as has arrived.
                self.buf.resize(self.buf.len() * 2, 0);
            }
        }
    }

    fn received(&mut self, result: io::Result<usize>) -> Received {
        match result {
            Ok(0) => Received::Lost("the server closed it".into()),
            Ok(n) => {
                self.end += n;
                Received::Bytes {
                    short: self.end < self.buf.len(),
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(e) => Received::Lost(e.to_string()),
        }
    }

    /// Takes everything that was read from the socket and decrypted, and an error that follows it:
    /// no poll would report them.
    fn received_by_tls(&mut self, link: &Link, result: io::Result<usize>) -> Received {
        let received = self.received(result);
        if !matches!(received, Received::Bytes { .. }) {
            return received;
        }
        while link.has_buffered() {
            self.make_room();
            let more = link.try_recv(&mut self.buf[self.end..], &mut self.descriptors);
            match self.received(more) {
                Received::Bytes { .. } => {}
                Received::Nothing => break,
                Received::Lost(why) => {
                    self.lost = Some(why);
                    break;
                }
            }
        }
        Received::Bytes {
            short: !link.may_have_more(),
        }
    }

    /// Reads available bytes.
    pub(crate) fn try_receive(&mut self) -> Received {
        if std::mem::take(&mut self.is_fresh) {
            return Received::Bytes { short: false };
        }
        self.make_room();
        let Some(link) = &self.link else {
            return Received::Nothing;
        };
        let result = link.try_recv(&mut self.buf[self.end..], &mut self.descriptors);
        if link.is_tls() {
            let link = Arc::clone(link);
            return self.received_by_tls(&link, result);
        }
        self.received(result)
    }

    /// Waits for bytes, up to [`RECV_TIMEOUT`].
    pub(crate) fn receive(&mut self) -> Received {
        if std::mem::take(&mut self.is_fresh) {
            return Received::Bytes { short: false };
        }
        self.make_room();
        let Some(link) = &self.link else {
            return Received::Nothing;
        };
        let result = link.recv(&mut self.buf[self.end..], &mut self.descriptors);
        if link.is_tls() {
            let link = Arc::clone(link);
            return self.received_by_tls(&link, result);
        }
        self.received(result)
    }

    /// Decodes every complete frame that was read, and passes each message on with the descriptors
    /// that came with it.
    ///
    /// # Errors
    /// If the bytes cannot be from a server: the connection is then unusable.
    pub(crate) fn decode(
        &mut self,
        mut take: impl FnMut(&Envelope<'_>, Vec<OwnedFd>) -> Result<(), String>,
    ) -> Result<(), String> {
        let Some(link) = &self.link else {
            return Ok(());
        };
        let accept = link.accept();
        loop {
            let decoded = frame::decode(&self.buf[self.start..self.end], accept);
            let decoded = decoded.map_err(|e| format!("it sent what is not a frame: {e}"))?;
            let Some((frame, used)) = decoded else {
                return Ok(());
            };
            let message = Envelope::parse(frame).and_then(|envelope| envelope);
            let envelope = message.map_err(|e| format!("it sent what is not a message: {e}"))?;
            self.start += used;
            let is_last = self.start == self.end;
            let own = own_descriptors(&envelope, &mut self.descriptors, is_last)?;
            take(&envelope, own)?;
        }
    }

    /// Gives the connection up.
    pub(crate) fn detach(&mut self) -> Option<Arc<Link>> {
        self.descriptors.clear();
        self.link.take()
    }
}

/// Takes the descriptors of a message from those that were received. They arrive with the first
/// byte of their message, so none can be left after the last message that was received.
fn own_descriptors(
    e: &Envelope<'_>,
    came: &mut Vec<OwnedFd>,
    is_last: bool,
) -> Result<Vec<OwnedFd>, String> {
    let named = match e.descriptors.and_then(Raw::as_u64) {
        None if came.is_empty() => return Ok(Vec::new()),
        named => named.unwrap_or(0),
    };
    let count = usize::try_from(named).unwrap_or(usize::MAX);
    if count > came.len() || came.len() - count > DESCRIPTORS_KEPT_MAX {
        let text = format!(
            "a message names {named} file descriptors, but {} arrived",
            came.len()
        );
        return Err(text);
    }
    let own = came.drain(..count).collect();
    match came.is_empty() || !is_last {
        true => Ok(own),
        false => Err("it sent more file descriptors than its messages name".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::wire::tls::tests::{Clients, connection};

    #[test]
    fn data_before_a_tls_failure_is_read() {
        let (link, server) = connection(Clients::All);
        let (mut theirs, mut tls) = server.join().unwrap();
        tls.write(&mut theirs, b"last words").unwrap();
        // A record that nobody can have encrypted (RFC 8446, section 5.1).
        theirs.write_all(&[0x17, 3, 3, 0, 20]).unwrap();
        theirs.write_all(&[0; 20]).unwrap();
        let mut input = Input {
            link: Some(Arc::new(link)),
            buf: vec![0; 100],
            ..Input::new()
        };
        assert!(matches!(input.try_receive(), Received::Bytes { .. }));
        assert_eq!(&input.buf[..input.end], b"last words");
        assert!(input.lost.is_some());
    }
}
