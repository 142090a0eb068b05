//! TLS on a connection of the TCP port: the socket and the state of its records, behind one lock.
//!
//! The loop that the connection belongs to reads; any loop that sends to it writes. A full
//! handshake costs a fraction of a millisecond of its loop's time (`cargo xtask bench keys`), and
//! the loop spends a bounded part of each turn on handshakes; see `event_loop`.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, MutexGuard};

use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::AppId;
use latzero_tls::Stream;
use latzero_tls::server::{Acceptor, app_ids};

/// A TCP stream with TLS.
#[derive(Debug)]
pub(crate) struct TlsSocket {
    stream: TcpStream,
    tls: Mutex<Stream>,
    /// Whether the client must present a certificate.
    is_mutual: bool,
}

impl TlsSocket {
    pub(crate) fn new(stream: TcpStream, acceptor: &Acceptor) -> io::Result<TlsSocket> {
        let tls = acceptor.begin().map_err(io::Error::other)?;
        Ok(TlsSocket {
            stream,
            tls: Mutex::new(tls),
            is_mutual: acceptor.is_mutual(),
        })
    }

    fn tls(&self) -> MutexGuard<'_, Stream> {
        self.tls.lock().expect("no panic happens under this lock")
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.tls().is_handshaking()
    }

    /// How much of the server's memory it uses, in bytes, in addition to the queues of the
    /// connection.
    pub(crate) fn held(&self) -> usize {
        self.tls().held()
    }

    /// What binds proofs to it, and the AppIDs that its certificate names, if it had to show
    /// one; `None` before the end of the handshake.
    pub(crate) fn secured(&self) -> Option<(ChannelBinding, Option<Vec<AppId>>)> {
        let tls = self.tls();
        let binding = ChannelBinding::TlsExporter(tls.binding()?);
        let certified = self.is_mutual.then(|| {
            let own = tls.certificates().first();
            let names = own.map(app_ids).unwrap_or_default();
            // A host name need not be an AppID.
            names
                .iter()
                .filter_map(|name| AppId::new(name).ok())
                .collect()
        });
        Some((binding, certified))
    }

    /// Whether the last read has emptied the socket.
    pub(crate) fn is_drained(&self) -> bool {
        self.tls().is_drained()
    }

    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        self.tls().read(&mut &self.stream, &mut &self.stream, buf)
    }

    /// Reads and discards received bytes, for a connection whose messages are no longer handled.
    pub(crate) fn read_raw(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(buf)
    }

    pub(crate) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        let mut tls = self.tls();
        if tls.is_handshaking() {
            // A refusal of one that came no further: there is no key yet to say it with.
            return Ok(buf.len());
        }
        tls.write(&mut &self.stream, buf)
    }

    /// Writes messages of TLS itself, as much as the socket accepts.
    pub(crate) fn flush(&self) {
        // What went wrong is found by the next read.
        let _ = self.tls().flush(&mut &self.stream);
    }

    /// Ends the sending side.
    pub(crate) fn finish(&self) {
        self.tls().finish(&mut &self.stream);
        let _ = (&self.stream).flush();
    }
}
