//! The TLS state of one connection, between a non-blocking socket and the code that reads and
//! writes frames.

use std::io::{self, BufRead as _, Read, Write};

use rustls::pki_types::CertificateDer;
use rustls::{Connection, IoState};

/// Most records, and most encrypted bytes, that one read takes from the socket: records may be tiny
/// or empty, so the number of decrypted bytes is no bound. One more system call may be included.
const RECORDS_PER_READ: usize = 256;
const WIRE_BYTES_PER_READ: usize = 64 * 1024;

/// The head of a record: its type, a version and its length (RFC 8446, section 5.1).
const HEAD_BYTES: usize = 5;

/// Most bytes that are encrypted before they are written to the socket: two records.
pub const PLAIN_BYTES_MAX: usize = 32 * 1024;

/// Memory of a connection's state in addition to its buffers: keys, schedules, and the first read.
const BASE_BYTES: usize = 8 * 1024;

/// The largest encrypted record (RFC 8446, section 5.2).
const RECORD_BYTES_MAX: usize = HEAD_BYTES + 16 * 1024 + 256;

/// How many bytes of a handshake are kept at most.
const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;

/// The label of the binding (RFC 9266).
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// A read took as much from the socket as it may, but has nothing to return: the caller should read
/// again, and may handle others first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("as much was read at once as may be")]
pub struct Unfinished;

impl From<Unfinished> for io::Error {
    fn from(unfinished: Unfinished) -> io::Error {
        io::Error::other(unfinished)
    }
}

impl Unfinished {
    /// Whether an error is this one.
    #[must_use]
    pub fn is(error: &io::Error) -> bool {
        error
            .get_ref()
            .is_some_and(<dyn std::error::Error + Send + Sync>::is::<Unfinished>)
    }
}

/// The TLS of one connection.
///
/// The caller passes the socket with each call. If bytes were accepted for writing but the socket
/// did not accept all of them, they are reported without the last byte. So the caller keeps that
/// byte and waits for the socket as it does without TLS, and what it counts as written has been
/// sent.
#[derive(Debug)]
pub struct Stream {
    connection: Connection,
    /// Whether the last byte of the record that is being written was not reported yet.
    owes_byte: bool,
    /// Whether the last encrypted data was refused completely: it will never be sent.
    is_write_dead: bool,
    /// An upper bound of the bytes that were read and not used yet.
    unread: usize,
    /// Whether the last read found less than it had room for.
    is_drained: bool,
    /// Where records end in the received bytes.
    records: Records,
    /// Why nothing more can be read, after the bytes before it.
    failure: Option<Failure>,
}

/// Why nothing more can be read. It is kept, so it is reported each time.
#[derive(Debug)]
enum Failure {
    Tls(rustls::Error),
    Socket(io::ErrorKind, Option<i32>),
}

impl Failure {
    fn of_socket(error: &io::Error) -> Failure {
        Failure::Socket(error.kind(), error.raw_os_error())
    }

    fn to_error(&self) -> io::Error {
        match self {
            Failure::Tls(error) => io::Error::new(io::ErrorKind::InvalidData, error.clone()),
            Failure::Socket(_, Some(code)) => io::Error::from_raw_os_error(*code),
            Failure::Socket(kind, None) => (*kind).into(),
        }
    }
}

/// Finds where records end in the bytes of a connection.
#[derive(Debug, Default)]
struct Records {
    /// How many bytes of a record's header have arrived.
    head: usize,
    /// How many bytes of its body have not arrived yet, according to its header.
    left: usize,
}

impl Records {
    /// How many records end in the next bytes.
    fn count(&mut self, mut bytes: &[u8]) -> usize {
        let mut ended = 0;
        while let [first, rest @ ..] = bytes {
            if self.head == HEAD_BYTES {
                let n = self.left.min(bytes.len());
                self.left -= n;
                bytes = &bytes[n..];
            } else {
                // The length is in the last two bytes of the header.
                if self.head + 2 >= HEAD_BYTES {
                    self.left = self.left << 8 | usize::from(*first);
                }
                self.head += 1;
                bytes = rest;
            }
            if self.head == HEAD_BYTES && self.left == 0 {
                self.head = 0;
                ended += 1;
            }
        }
        ended
    }
}

/// A source that records how much was read from it, and whether it was emptied.
struct Watched<'a> {
    from: &'a mut dyn Read,
    records: &'a mut Records,
    taken: Taken,
}

/// What one read has taken from its source.
#[derive(Debug, Clone, Copy, Default)]
struct Taken {
    records: usize,
    bytes: usize,
    is_short: bool,
}

impl Taken {
    fn is_enough(self) -> bool {
        self.records >= RECORDS_PER_READ || self.bytes >= WIRE_BYTES_PER_READ
    }
}

impl Read for Watched<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.taken.records += self.records.count(&buf[..n]);
        self.taken.bytes += n;
        self.taken.is_short = n < buf.len();
        Ok(n)
    }
}

impl Stream {
    pub(crate) fn new(mut connection: Connection) -> Stream {
        // Each write is bounded in the caller, and the next one waits for it.
        connection.set_buffer_limit(None);
        Stream {
            connection,
            owes_byte: false,
            is_write_dead: false,
            unread: 0,
            is_drained: false,
            records: Records::default(),
            failure: None,
        }
    }

    /// Whether the handshake is in progress, so that no data can be sent.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether there is more to write to the socket.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Whether the last read has emptied the socket.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.is_drained
    }

    /// An upper bound of the memory that it uses, in bytes.
    #[must_use]
    pub fn held(&self) -> usize {
        let unread = match self.is_handshaking() {
            true => self.unread.min(HANDSHAKE_BYTES_MAX),
            false => self.unread.min(2 * RECORD_BYTES_MAX),
        };
        let unsent = match self.wants_write() {
            true => PLAIN_BYTES_MAX + RECORD_BYTES_MAX,
            false => 0,
        };
        BASE_BYTES + unread + unsent
    }

    /// The channel binding (RFC 9266); `None` before the end of the handshake.
    #[must_use]
    pub fn binding(&self) -> Option<[u8; 32]> {
        if self.is_handshaking() {
            return None;
        }
        let exported = self
            .connection
            .export_keying_material([0; 32], BINDING_LABEL, Some(&[]));
        exported.ok()
    }

    /// The certificates of the other side, its own first.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        self.connection.peer_certificates().unwrap_or_default()
    }

    /// Reads from the socket until `buf` is full, the socket is empty, or the limit of one read is
    /// reached. Messages of TLS itself are written to `to`. 0 is the end.
    ///
    /// Data that arrived before a failure is returned first; after that the failure is reported.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; [`Unfinished`] if there may be more, but what was read
    /// contained no data; `InvalidData` with a [`rustls::Error`] if the bytes are not TLS, or not
    /// acceptable; errors of the socket.
    pub fn read(
        &mut self,
        from: &mut dyn Read,
        to: &mut dyn Write,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        self.is_drained = false;
        let (mut filled, mut taken) = (0, Taken::default());
        loop {
            match self.connection.reader().read(&mut buf[filled..]) {
                Ok(0) => return Ok(filled),
                Ok(n) => {
                    filled += n;
                    if filled == buf.len() {
                        return Ok(filled);
                    }
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The end without a close message is accepted: the length of a frame shows whether
                // it is complete.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(filled),
                Err(error) => return Err(error),
            }
            match &self.failure {
                Some(_) if filled > 0 => return Ok(filled),
                Some(failure) => return Err(failure.to_error()),
                None => {}
            }
            if filled > 0 && taken.is_short {
                self.is_drained = true;
                return Ok(filled);
            }
            if taken.is_enough() {
                return match filled {
                    0 => Err(Unfinished.into()),
                    filled => Ok(filled),
                };
            }
            match self.take(from, &mut taken) {
                Ok(n) => {
                    let processed = self.process(n, to);
                    self.failure = processed.err().map(Failure::Tls);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && filled > 0 => {
                    self.is_drained = true;
                    return Ok(filled);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
                Err(error) => self.failure = Some(Failure::of_socket(&error)),
            }
        }
    }

    /// Continues the handshake with the bytes that `from` has; returns whether it has ended.
    ///
    /// # Errors
    /// Those of [`Stream::read`], and `UnexpectedEof`.
    pub fn agree(&mut self, from: &mut dyn Read, to: &mut dyn Write) -> io::Result<bool> {
        while self.is_handshaking() {
            match self.take(from, &mut Taken::default()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self
                    .process(n, to)
                    .map_err(|error| Failure::Tls(error).to_error())?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether a read would return something without the socket: decrypted data that was not read,
    /// or why nothing more can be read.
    #[must_use]
    pub fn has_buffered(&mut self) -> bool {
        let mut reader = self.connection.reader();
        let there = reader.fill_buf();
        self.failure.is_some() || there.is_ok_and(|bytes| !bytes.is_empty())
    }

    fn take(&mut self, from: &mut dyn Read, taken: &mut Taken) -> io::Result<usize> {
        let mut watched = Watched {
            from,
            records: &mut self.records,
            taken: *taken,
        };
        let read = self.connection.read_tls(&mut watched);
        *taken = watched.taken;
        read
    }

    fn process(&mut self, came: usize, to: &mut dyn Write) -> Result<(), rustls::Error> {
        self.unread += came;
        let processed = self.connection.process_new_packets();
        let plain = processed
            .as_ref()
            .map_or(0, IoState::plaintext_bytes_to_read);
        if plain > 0 {
            // A record has ended: the rest follows it.
            self.unread = came;
        }
        // What the socket does not accept is sent with the next write, or when the socket accepts
        // more. An error concerns only writing, and the next write returns it too.
        let _ = self.flush(to);
        processed.map(drop)
    }

    /// Encrypts and writes as much as the socket accepts.
    ///
    /// # Errors
    /// `WouldBlock` if it accepts nothing; errors of the socket, and then none of `bytes` was sent
    /// or will be.
    pub fn write(&mut self, to: &mut dyn Write, bytes: &[u8]) -> io::Result<usize> {
        self.flush(to)?;
        if bytes.is_empty() {
            return Ok(0);
        }
        if std::mem::take(&mut self.owes_byte) {
            return Ok(1);
        }
        let piece = &bytes[..bytes.len().min(PLAIN_BYTES_MAX)];
        self.connection.writer().write_all(piece)?;
        let mut left = 0;
        match self.flush_counted(to, &mut left) {
            Ok(()) => Ok(piece.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.owes_byte = true;
                match piece.len() - 1 {
                    0 => Err(error),
                    reported => Ok(reported),
                }
            }
            // Some of its records may have arrived completely. The next write fails as well.
            Err(_) if left > 0 => Ok(piece.len()),
            Err(error) => {
                self.is_write_dead = true;
                Err(error)
            }
        }
    }

    /// Whether the last byte of what was written was not reported, although it may be sent, or have
    /// been sent, with messages of TLS itself.
    #[must_use]
    pub fn owes_byte(&self) -> bool {
        self.owes_byte
    }

    /// Writes encrypted data.
    ///
    /// # Errors
    /// `WouldBlock` if some of it is left; errors of the socket.
    pub fn flush(&mut self, to: &mut dyn Write) -> io::Result<()> {
        self.flush_counted(to, &mut 0)
    }

    fn flush_counted(&mut self, to: &mut dyn Write, left: &mut usize) -> io::Result<()> {
        if self.is_write_dead {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        while self.connection.wants_write() {
            match self.connection.write_tls(to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => *left += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends the close message, if the socket accepts it.
    pub fn finish(&mut self, to: &mut dyn Write) {
        if !self.is_handshaking() {
            self.connection.send_close_notify();
            // A peer that does not read does not need it.
            let _ = self.flush(to);
        }
    }
}

#[cfg(test)]
mod tests;
