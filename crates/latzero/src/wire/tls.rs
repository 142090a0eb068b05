//! TLS on a connection: which servers the client accepts, and reading and writing records.

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use latzero_crypto::proof::ChannelBinding;
use latzero_protocol::{Code, Ran};
use latzero_tls::client::{self, Fault, Seen, SetupError, Trust};
use latzero_tls::{Pin, Stream, Unfinished};
use rustix::event::PollFlags;
use rustix::fd::BorrowedFd;
use rustix::net::{RecvFlags, SendFlags};

use crate::error::Error;
use crate::sync::lock;
use crate::url::TlsOptions;
use crate::wire::known_hosts;
use crate::wire::wait::{HandshakeTimeout, wait};

/// How many bytes are read from the socket at once: four records.
const READ_BYTES: usize = 64 * 1024;

/// Bytes from the socket that were not decrypted yet.
#[derive(Debug)]
struct Inbox {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Read for Inbox {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let there = &self.buf[self.start..self.end];
        if there.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = there.len().min(buf.len());
        buf[..n].copy_from_slice(&there[..n]);
        self.start += n;
        Ok(n)
    }
}

/// Writes to a socket as much as it accepts without blocking.
struct Sink<'a>(BorrowedFd<'a>);

impl Write for Sink<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::send(self.0, buf, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The TLS of one connection. The reader holds the inbox, and waits for the socket without holding
/// the stream, so that others can write meanwhile.
#[derive(Debug)]
pub(crate) struct Tls {
    inbox: Mutex<Inbox>,
    stream: Mutex<Stream>,
    seen: Seen,
    /// The last read of the socket filled the inbox, or reached the end: there is more to read.
    may_have_more: AtomicBool,
}

impl Tls {
    /// Makes the TLS handshake, within the time that is left.
    pub(crate) fn connect(
        socket: BorrowedFd<'_>,
        (host, port): (&str, u16),
        options: &TlsOptions,
        deadline: Instant,
    ) -> Result<Tls, Error> {
        let trust = match (&options.pin, &options.ca) {
            (Some(pin), _) => Trust::Pin(*pin),
            (None, Some(ca)) => Trust::Authority(ca),
            (None, None) => match known_hosts::find(host, port)? {
                Some(pin) => Trust::Pin(pin),
                None => return Err(unknown(host, port)),
            },
        };
        let own = match (&options.cert, &options.key) {
            (Some(cert), Some(key)) => Some((cert.as_path(), key.as_path())),
            _ => None,
        };
        let tls = Tls::begin(host, &trust, own)?;
        tls.agree(socket, deadline)
            .map_err(|error| tls.explain(&error, &trust, (host, port)))?;
        Ok(tls)
    }

    /// The pin of the server on `socket`, which only proves that it has the key.
    pub(crate) fn fetch_pin(
        socket: BorrowedFd<'_>,
        (host, port): (&str, u16),
        deadline: Instant,
    ) -> Result<Pin, Error> {
        let trust = Trust::Anybody;
        let tls = Tls::begin(host, &trust, None)?;
        tls.agree(socket, deadline)
            .map_err(|error| tls.explain(&error, &trust, (host, port)))?;
        tls.seen
            .pin()
            .ok_or_else(|| lost("the server presented no certificate"))
    }

    fn begin(host: &str, trust: &Trust<'_>, own: Option<(&Path, &Path)>) -> Result<Tls, Error> {
        let (stream, seen) = client::begin(host, trust, own).map_err(unusable)?;
        Ok(Tls {
            inbox: Mutex::new(Inbox {
                buf: vec![0; READ_BYTES],
                start: 0,
                end: 0,
            }),
            stream: Mutex::new(stream),
            seen,
            may_have_more: AtomicBool::new(false),
        })
    }

    fn agree(&self, socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
        let mut inbox = lock(&self.inbox);
        let mut stream = lock(&self.stream);
        loop {
            let has_ended = stream.agree(&mut *inbox, &mut Sink(socket))?;
            match stream.flush(&mut Sink(socket)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(socket, PollFlags::OUT, deadline)?;
                    continue;
                }
                flushed => flushed?,
            }
            if has_ended {
                return Ok(());
            }
            wait(socket, PollFlags::IN, deadline)?;
            match rustix::net::recv(socket, &mut inbox.buf[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((n, _)) => (inbox.start, inbox.end) = (0, n),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The channel binding of the connection.
    pub(crate) fn binding(&self) -> Result<ChannelBinding, Error> {
        let exported = lock(&self.stream).binding();
        exported
            .map(ChannelBinding::TlsExporter)
            .ok_or_else(|| lost("TLS gives nothing to bind proofs to"))
    }

    /// Reads decrypted bytes into `buf`; 0 means that the peer closed the connection.
    pub(crate) fn recv(
        &self,
        socket: BorrowedFd<'_>,
        buf: &mut [u8],
        flags: RecvFlags,
    ) -> io::Result<usize> {
        let mut inbox = lock(&self.inbox);
        loop {
            let read = lock(&self.stream).read(&mut *inbox, &mut Sink(socket), buf);
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Others can write in between.
                Err(error) if Unfinished::is(&error) => continue,
                other => return other,
            }
            // The stream is not held, so that others can write while this one waits.
            let received = rustix::io::retry_on_intr(|| {
                rustix::net::recv(socket, &mut inbox.buf[..], flags).map(|(n, _)| n)
            });
            let is_full = received.is_ok_and(|n| n == 0 || n == READ_BYTES);
            self.may_have_more.store(is_full, Ordering::Release);
            match received? {
                0 => return Ok(0),
                n => (inbox.start, inbox.end) = (0, n),
            }
        }
    }

    /// Whether there is data that was already read from the socket.
    pub(crate) fn has_buffered(&self) -> bool {
        let inbox = lock(&self.inbox);
        inbox.start < inbox.end || lock(&self.stream).has_buffered()
    }

    /// Whether the socket may have more data, judging by the last read.
    pub(crate) fn may_have_more(&self) -> bool {
        self.may_have_more.load(Ordering::Acquire)
    }

    /// Sends as much as the socket accepts without blocking.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>, bytes: &[u8]) -> rustix::io::Result<usize> {
        let sent = lock(&self.stream).write(&mut Sink(socket), bytes);
        sent.map_err(|error| {
            rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
        })
    }

    /// How many bytes may have been sent although [`Tls::send`] did not report them.
    pub(crate) fn owed(&self) -> u64 {
        u64::from(lock(&self.stream).owes_byte())
    }

    /// Ends the sending side.
    pub(crate) fn finish(&self, socket: BorrowedFd<'_>) {
        lock(&self.stream).finish(&mut Sink(socket));
    }

    /// The cause of a failed read after the handshake, if TLS knows it.
    pub(crate) fn refusal(&self, error: &io::Error) -> Option<Error> {
        match client::explain(error, &self.seen) {
            Fault::Refused(why) => Some(refused(&why)),
            _ => None,
        }
    }

    fn explain(&self, error: &io::Error, trust: &Trust<'_>, (host, port): (&str, u16)) -> Error {
        let place = format!("{host}:{port}");
        if error
            .get_ref()
            .is_some_and(<dyn std::error::Error + Send + Sync>::is::<HandshakeTimeout>)
        {
            let late = io::Error::new(io::ErrorKind::TimedOut, HandshakeTimeout);
            return lost(&HandshakeTimeout.to_string()).with_source(late);
        }
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return lost(&format!(
                "the server at {place} closed the connection during the TLS handshake; it may have \
                 too many connections, or not use TLS there"
            ));
        }
        match (client::explain(error, &self.seen), trust) {
            (Fault::NoTls, _) => lost(&format!(
                "the server at {place} does not speak TLS; leave `tls` out of the address, or \
                 start it with `latzero start --tls`"
            )),
            (Fault::OtherPin(pin), Trust::Pin(wanted)) => Error::new(
                Code::Unauthenticated,
                format!(
                    "the server at {place} is not the one that you trust: its pin is {pin}, and \
                     {wanted} was expected. This may be another server. If its certificate was \
                     replaced on purpose, compare with `latzero status` on the server, and then \
                     change the pin in the address or run `latzero trust --replace {place}`"
                ),
            )
            .with_ran(Ran::No),
            (Fault::Certificate(why), Trust::Authority(ca)) => Error::new(
                Code::Unauthenticated,
                format!(
                    "the certificate of the server at {place} is not accepted by {}: {why}",
                    ca.display()
                ),
            )
            .with_ran(Ran::No),
            (Fault::Certificate(why) | Fault::Other(why), _) => {
                lost(&format!("TLS with {place} failed: {why}"))
            }
            (Fault::OtherPin(_), _) => lost(&format!("TLS with {place} failed")),
            (Fault::Refused(why), _) => refused(&why),
        }
    }
}

fn lost(text: &str) -> Error {
    Error::new(Code::Disconnected, text.to_owned()).with_ran(Ran::No)
}

fn refused(alert: &str) -> Error {
    Error::new(
        Code::Unauthenticated,
        format!(
            "the server refused the TLS handshake ({alert}); if it requires client certificates, \
             name one with `&cert=FILE&key=FILE` in the address, from an authority that it accepts"
        ),
    )
    .with_ran(Ran::No)
}

fn unknown(host: &str, port: u16) -> Error {
    let remedy = match known_hosts::path() {
        Some(_) => format!("run `latzero trust {host}:{port}`"),
        None => "set HOME, which contains the list of trusted servers".to_owned(),
    };
    Error::new(
        Code::Unauthenticated,
        format!(
            "the server at {host}:{port} is not trusted yet; {remedy}, or add `&pin=PIN` or \
             `&ca=FILE` to the address"
        ),
    )
    .with_ran(Ran::No)
}

#[allow(clippy::needless_pass_by_value, reason = "it is for map_err")]
fn unusable(error: SetupError) -> Error {
    Error::new(Code::BadMessage, format!("cannot set up TLS: {error}")).with_ran(Ran::No)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;
    use std::time::Duration;

    use latzero_tls::pem::Origin;
    use latzero_tls::server::{Acceptor, self_signed};
    use rustix::fd::AsFd as _;
    use rustix::net::sockopt;

    use super::*;
    use crate::wire::link::Link;
    use crate::wire::prove::Talk;

    /// Whom a server accepts.
    #[derive(Clone, Copy)]
    pub(crate) enum Clients {
        All,
        /// Those with a certificate of an authority that nobody has.
        Certified,
    }

    /// A connection that the client takes for agreed on, and the server's end of it, which takes no
    /// more than a few kilobytes.
    pub(crate) fn connection(clients: Clients) -> (Link, JoinHandle<(UnixStream, Stream)>) {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        let made = self_signed(vec!["localhost".to_owned()]).unwrap();
        fs::write(path("cert"), made.certificate).unwrap();
        fs::write(path("key"), made.key).unwrap();
        fs::set_permissions(path("key"), Permissions::from_mode(0o600)).unwrap();
        let authority = path("cert");
        let client_ca = match clients {
            Clients::All => None,
            Clients::Certified => Some(&*authority),
        };
        let acceptor = Acceptor::load(&path("cert"), &path("key"), client_ca, Origin::Own).unwrap();
        let options = TlsOptions {
            pin: Some(acceptor.pin()),
            ..TlsOptions::default()
        };
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        sockopt::set_socket_send_buffer_size(&ours, 4096).unwrap();
        let server = std::thread::spawn(move || {
            let mut stream = acceptor.begin().unwrap();
            let mut to = theirs.try_clone().unwrap();
            let agreed = stream.agree(&mut theirs, &mut to);
            assert_eq!(agreed.is_ok(), matches!(clients, Clients::All));
            (theirs, stream)
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let tls = Tls::connect(ours.as_fd(), ("localhost", 1), &options, deadline).unwrap();
        (Link::of(ours.into(), tls), server)
    }

    #[test]
    fn a_refused_certificate_is_said_where_sending_fails() {
        let (link, server) = connection(Clients::Certified);
        drop(server.join().unwrap());
        let deadline = Instant::now() + Duration::from_secs(60);
        let error = Talk::new(&link, deadline, 1024).say("{}").unwrap_err();
        assert!(error.to_string().contains("&cert=FILE"), "{error}");
        assert_eq!(error.kind(), Code::Unauthenticated);
    }
}
