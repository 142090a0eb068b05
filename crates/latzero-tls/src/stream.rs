//! One connection's TLS, between a socket that does not block and whoever reads and writes frames.

use std::io::{self, Read, Write};

use rustls::pki_types::CertificateDer;
use rustls::{Connection, IoState};

/// Most bytes that are encrypted before the socket is asked to take them: two records.
pub const PLAIN_BYTES_MAX: usize = 32 * 1024;

/// What a connection's state takes besides its buffers: keys, schedules, and the first read.
const BASE_BYTES: usize = 8 * 1024;

/// The largest record, as it travels (RFC 8446, section 5.2).
const RECORD_BYTES_MAX: usize = 5 + 16 * 1024 + 256;

/// More of a handshake is never kept.
const HANDSHAKE_BYTES_MAX: usize = 64 * 1024;

/// The label of the binding (RFC 9266).
const BINDING_LABEL: &[u8] = b"EXPORTER-Channel-Binding";

/// The TLS of one connection.
///
/// Whoever has the socket passes it in with each call. What was accepted for writing and was not
/// taken by the socket in full is reported without its last byte: so the caller keeps that byte,
/// waits for the socket as it does without TLS, and what it counts as written has left.
#[derive(Debug)]
pub struct Stream {
    connection: Connection,
    /// The last byte of the record that is being written was not reported yet.
    owes_byte: bool,
    /// Bytes that were read, and perhaps not used yet: an upper bound.
    unread: usize,
    /// The last read found less than it had room for.
    is_drained: bool,
}

/// A source that remembers whether it was emptied.
struct Watched<'a> {
    from: &'a mut dyn Read,
    is_short: bool,
}

impl Read for Watched<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(buf)?;
        self.is_short = n < buf.len();
        Ok(n)
    }
}

impl Stream {
    pub(crate) fn new(mut connection: Connection) -> Stream {
        // Each write is bounded below, and the next one waits for it.
        connection.set_buffer_limit(None);
        Stream {
            connection,
            owes_byte: false,
            unread: 0,
            is_drained: false,
        }
    }

    /// Whether the handshake is under way: until then nothing can be said.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether the socket has more to take.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// Whether the last read has emptied the socket.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.is_drained
    }

    /// An upper bound of the memory that it takes, in bytes.
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

    /// What binds proofs to the connection (RFC 9266); `None` before the end of the handshake.
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

    /// The certificates of the other end, its own first.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        self.connection.peer_certificates().unwrap_or_default()
    }

    /// Reads from the socket until `buf` is full or the socket is empty. What the protocol itself
    /// has to say is written to `to`. 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; `InvalidData` with a [`rustls::Error`] if what came is not
    /// TLS, or not acceptable; what the socket says.
    pub fn read(
        &mut self,
        from: &mut dyn Read,
        to: &mut dyn Write,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        self.is_drained = false;
        let (mut filled, mut is_short) = (0, false);
        loop {
            match self.connection.reader().read(&mut buf[filled..]) {
                Ok(0) => return Ok(filled),
                Ok(n) => {
                    filled += n;
                    if filled == buf.len() {
                        return Ok(filled);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if filled > 0 && is_short {
                        self.is_drained = true;
                        return Ok(filled);
                    }
                    let mut watched = Watched {
                        from: &mut *from,
                        is_short: false,
                    };
                    match self.connection.read_tls(&mut watched) {
                        Ok(n) => {
                            is_short = watched.is_short;
                            self.process(n, to)?;
                        }
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock && filled > 0 => {
                            self.is_drained = true;
                            return Ok(filled);
                        }
                        Err(error) => return Err(error),
                    }
                }
                // An end without a farewell: a frame says itself whether it is whole.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(filled),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes the handshake as far as what `from` has allows; whether it has ended.
    ///
    /// # Errors
    /// As [`Stream::read`], and `UnexpectedEof`.
    pub fn agree(&mut self, from: &mut dyn Read, to: &mut dyn Write) -> io::Result<bool> {
        while self.is_handshaking() {
            match self.connection.read_tls(from) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.process(n, to)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether something was read and decrypted that nobody has taken.
    #[must_use]
    pub fn has_plaintext(&mut self) -> bool {
        let state = self.connection.process_new_packets();
        state.is_ok_and(|state| state.plaintext_bytes_to_read() > 0)
    }

    fn process(&mut self, came: usize, to: &mut dyn Write) -> io::Result<()> {
        self.unread += came;
        let processed = self.connection.process_new_packets();
        let plain = processed
            .as_ref()
            .map_or(0, IoState::plaintext_bytes_to_read);
        if plain > 0 {
            // A record has ended: what is left came behind it.
            self.unread = came;
        }
        let flushed = match self.connection.wants_write() {
            true => self.flush(to),
            false => Ok(()),
        };
        if let Err(error) = processed {
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        match flushed {
            // It goes out with the next write, or when the socket takes more.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    /// Encrypts and writes what the socket takes.
    ///
    /// # Errors
    /// `WouldBlock` if it takes nothing; what the socket says.
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
        match self.flush(to) {
            Ok(()) => Ok(piece.len()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.owes_byte = true;
                match piece.len() - 1 {
                    0 => Err(error),
                    reported => Ok(reported),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Writes what was encrypted.
    ///
    /// # Errors
    /// `WouldBlock` if some of it is left; what the socket says.
    pub fn flush(&mut self, to: &mut dyn Write) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Says that nothing more comes, as far as the socket takes it.
    pub fn finish(&mut self, to: &mut dyn Write) {
        if !self.is_handshaking() {
            self.connection.send_close_notify();
            // Whoever does not read does not miss it.
            let _ = self.flush(to);
        }
    }
}
