//! Support for end-to-end tests: a private server, and connections that speak the protocol
//! directly.
//!
//! The connections use no client library, so a test can send messages that no library would.

pub mod hostile;
pub mod site;
pub mod vault;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use latzero_protocol::frame::{self, Accept};
use latzero_tls::client::Trust;
use serde_json::Value;

/// How long a test waits for something that must happen. Only a failing test waits this long.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Waits up to [`TIMEOUT`] until a condition holds.
///
/// # Panics
/// If it does not hold in time.
#[track_caller]
pub fn eventually(mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < TIMEOUT, "the condition holds in time");
    }
}

/// Reads JSON that nests deeper than `serde_json` reads by itself.
///
/// # Errors
/// If it is not JSON.
pub fn read_deep(text: &str) -> serde_json::Result<Value> {
    let mut text = serde_json::Deserializer::from_str(text);
    text.disable_recursion_limit();
    text.into_iter().next().unwrap_or(Ok(Value::Null))
}

/// The most descriptors that one read receives.
const DESCRIPTORS_MAX: usize = 64;

/// How a connection is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// TCP.
    Tcp,
    /// The Unix socket.
    Unix,
    /// TLS, without checking the server's certificate.
    Tls,
}

/// A private server.
pub struct Server(pub latzero::testing::Server);

impl Server {
    /// Starts a server with default settings.
    #[must_use]
    pub fn start() -> Server {
        Server::with(&[])
    }

    /// Starts a server with these settings, each `name=value`.
    #[must_use]
    pub fn with(settings: &[&str]) -> Server {
        let args: Vec<&str> = settings
            .iter()
            .flat_map(|setting| ["--set", setting])
            .collect();
        Server(latzero::testing::server_with(&args).expect("the program is built (`cargo build`)"))
    }

    /// Kills the server at once, as a crash would.
    pub fn kill(&mut self) {
        self.0.kill();
    }

    /// Starts the server again on the same directory.
    pub fn restart(&mut self) {
        self.0
            .restart()
            .expect("a program that started once starts again");
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Whether the server is still running.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let state = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()));
        let state = state.as_deref().unwrap_or("").rsplit(") ").next();
        state.is_some_and(|state| !state.is_empty() && !state.starts_with('Z'))
    }

    /// Waits up to [`TIMEOUT`] until the server has ended; returns whether it has.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.expect("a child's id is positive");
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => site::readable(&process, TIMEOUT),
            Err(_) => true,
        }
    }

    /// Sends the server a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.0.pid())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .expect("a child's id is positive");
        rustix::process::kill_process(pid, signal).expect("the child accepts signals");
    }

    /// Sets how many open descriptors the system allows the server.
    pub fn limit_descriptors(&self, max: u64) {
        let pid = i32::try_from(self.0.pid())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        // The hard limit stays, because only root could raise it again.
        let maximum = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        let limit = rustix::process::Rlimit {
            current: Some(max),
            maximum,
        };
        let before = rustix::process::prlimit(pid, rustix::process::Resource::Nofile, limit);
        before.expect("the limit of the child can be set");
    }

    /// Opens a connection without sending anything.
    #[must_use]
    pub fn connect(&self, via: Via) -> Wire {
        self.try_connect(via).expect("the server listens")
    }

    /// Opens a connection without sending anything.
    ///
    /// # Errors
    /// If the server does not accept it.
    pub fn try_connect(&self, via: Via) -> io::Result<Wire> {
        let stream = match via {
            Via::Tcp => {
                let stream = TcpStream::connect(self.0.tcp())?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Via::Unix => Stream::Unix(UnixStream::connect(self.0.socket())?),
            Via::Tls => {
                let stream = TcpStream::connect(self.0.tcp())?;
                stream.set_nodelay(true)?;
                let begun = latzero_tls::client::begin("localhost", &Trust::Anybody, None);
                let (tls, _) = begun.map_err(io::Error::other)?;
                Stream::Tls(stream, Box::new(tls))
            }
        };
        Ok(Wire::new(stream))
    }

    /// Opens a connection and shakes hands; `handshake` is added to `{"action":"handshake"}`.
    #[must_use]
    pub fn app(&self, via: Via, handshake: Value) -> Wire {
        let mut wire = self.connect(via);
        let mut message = handshake;
        message["action"] = "handshake".into();
        wire.send(&message);
        let ack = wire.receive();
        assert_eq!(ack["status"], "ok", "{ack}");
        wire
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(TcpStream, Box<latzero_tls::Stream>),
}

impl Stream {
    fn set_timeout(&self, timeout: Duration) {
        let set = match self {
            Stream::Tcp(s) | Stream::Tls(s, _) => s
                .set_read_timeout(Some(timeout))
                .and(s.set_write_timeout(Some(timeout))),
            Stream::Unix(s) => s
                .set_read_timeout(Some(timeout))
                .and(s.set_write_timeout(Some(timeout))),
        };
        set.expect("a new socket accepts options");
    }

    fn read(&mut self, buf: &mut [u8], descriptors: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Tls(s, tls) => {
                tls.flush(&mut &*s)?;
                tls.read(&mut &*s, &mut &*s, buf)
            }
            Stream::Unix(s) => {
                let mut got = Vec::new();
                let n = latzero_shm::fds::recv_with_fds(&*s, buf, &mut got, DESCRIPTORS_MAX)?;
                descriptors.extend(got);
                Ok(n)
            }
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.write_all(bytes),
            Stream::Tls(s, tls) => {
                while tls.is_handshaking() {
                    tls.flush(&mut &*s)?;
                    tls.agree(&mut &*s, &mut &*s)?;
                }
                let mut rest = bytes;
                while !rest.is_empty() {
                    rest = &rest[tls.write(&mut &*s, rest)?..];
                }
                Ok(())
            }
            Stream::Unix(s) => s.write_all(bytes),
        }
    }
}

/// A connection that sends and receives frames.
pub struct Wire {
    stream: Stream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Wire {
    fn new(stream: Stream) -> Wire {
        stream.set_timeout(TIMEOUT);
        Wire {
            stream,
            received: Vec::new(),
            descriptors: VecDeque::new(),
        }
    }

    /// Sets the timeout of later reads and writes.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.stream.set_timeout(timeout);
    }

    /// A second handle to the same connection, for a thread that reads from now on.
    ///
    /// # Panics
    /// If the system has no descriptor left.
    #[must_use]
    pub fn reader(&mut self) -> Wire {
        let stream = match &self.stream {
            Stream::Tcp(s) => s.try_clone().map(Stream::Tcp),
            Stream::Unix(s) => s.try_clone().map(Stream::Unix),
            Stream::Tls(..) => Err(io::Error::other("TLS has one reader, which writes too")),
        };
        Wire {
            stream: stream.expect("there are descriptors"),
            received: std::mem::take(&mut self.received),
            descriptors: std::mem::take(&mut self.descriptors),
        }
    }

    /// A copy of the socket that a child process can inherit.
    ///
    /// # Panics
    /// If the connection is over TCP, or no descriptor is left.
    #[must_use]
    pub fn socket(&self) -> OwnedFd {
        match &self.stream {
            Stream::Tcp(_) | Stream::Tls(..) => panic!("over TCP no process is known"),
            Stream::Unix(s) => s.try_clone().expect("there are descriptors").into(),
        }
    }

    /// Reads and discards messages until none arrives within the timeout.
    pub fn discard(&mut self) {
        let mut buf = vec![0; 1 << 20];
        while self
            .stream
            .read(&mut buf, &mut self.descriptors)
            .is_ok_and(|n| n > 0)
        {}
    }

    /// Opens a connection to the Unix socket at `path`.
    #[must_use]
    pub fn unix(path: &Path) -> Wire {
        Wire::new(Stream::Unix(
            UnixStream::connect(path).expect("the server listens"),
        ))
    }

    /// Opens a connection to the Unix socket at `path`.
    ///
    /// # Errors
    /// If no server listens there.
    pub fn try_unix(path: &Path) -> io::Result<Wire> {
        UnixStream::connect(path).map(|stream| Wire::new(Stream::Unix(stream)))
    }

    /// Takes the received descriptors that were not taken yet.
    pub fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        self.descriptors.drain(..).collect()
    }

    /// Takes the next `count` descriptors.
    ///
    /// # Panics
    /// If fewer have been received.
    pub fn take(&mut self, count: usize) -> Vec<OwnedFd> {
        self.descriptors.drain(..count).collect()
    }

    /// Sends one message with descriptors, over a Unix socket.
    pub fn send_with_descriptors(&mut self, message: &Value, descriptors: &[BorrowedFd<'_>]) {
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes())
        });
        let Stream::Unix(stream) = &self.stream else {
            panic!("only Unix sockets pass descriptors");
        };
        let n = latzero_shm::fds::send_with_fds(stream, &out, descriptors);
        assert_eq!(n.expect("the server accepts the message"), out.len());
    }

    /// Sends one message.
    pub fn send(&mut self, message: &Value) {
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes())
        });
        self.send_bytes(&out);
    }

    /// Sends one message with an attachment.
    pub fn send_attachment(&mut self, header: &Value, raw: &[u8]) {
        let mut out = Vec::new();
        frame::append_attachment(&mut out, raw, |out| {
            out.extend_from_slice(header.to_string().as_bytes())
        });
        self.send_bytes(&out);
    }

    /// Sends bytes unchanged.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream
            .write_all(bytes)
            .expect("the server accepts the message");
    }

    /// Sends one message, and reports whether the server still accepted it.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn try_send(&mut self, message: &Value) -> io::Result<()> {
        let mut out = Vec::new();
        frame::append(&mut out, |out| {
            out.extend_from_slice(message.to_string().as_bytes())
        });
        self.stream.write_all(&out)
    }

    /// Sends one message with an attachment, and reports whether the server still accepted it.
    ///
    /// # Errors
    /// If the connection has ended.
    pub fn try_send_attachment(&mut self, header: &Value, raw: &[u8]) -> io::Result<()> {
        let mut out = Vec::new();
        frame::append_attachment(&mut out, raw, |out| {
            out.extend_from_slice(header.to_string().as_bytes())
        });
        self.stream.write_all(&out)
    }

    /// Sends bytes unchanged, and reports whether the server still accepted them.
    pub fn try_send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next message.
    ///
    /// # Panics
    /// If none arrives in time, or the server closes the connection.
    pub fn receive(&mut self) -> Value {
        self.receive_whole().0
    }

    /// The next message with its attachment.
    ///
    /// # Panics
    /// As [`Wire::receive`].
    pub fn receive_whole(&mut self) -> (Value, Option<Vec<u8>>) {
        self.try_receive()
            .expect("a message comes in time")
            .expect("the connection is open")
    }

    /// The next message; `None` if the server closed the connection.
    ///
    /// # Errors
    /// If nothing arrives in time.
    pub fn try_receive(&mut self) -> io::Result<Option<(Value, Option<Vec<u8>>)>> {
        let accept = Accept {
            max_frame: 1 << 30,
            attachments: true,
        };
        loop {
            if let Some((frame, used)) =
                frame::decode(&self.received, accept).map_err(io::Error::other)?
            {
                let value = serde_json::from_slice(frame.json)?;
                let attachment = frame.attachment.map(<[u8]>::to_vec);
                self.received.drain(..used);
                return Ok(Some((value, attachment)));
            }
            let mut buf = [0; 65536];
            match self.stream.read(&mut buf, &mut self.descriptors) {
                Ok(0) => return Ok(None),
                Ok(n) => self.received.extend_from_slice(&buf[..n]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                // A read with a timeout is not restarted after a signal (signal(7)).
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether a message or the end of the connection arrives within `timeout`.
    #[must_use]
    pub fn has_more(&self, timeout: Duration) -> bool {
        !self.received.is_empty()
            || match &self.stream {
                Stream::Tcp(s) | Stream::Tls(s, _) => site::readable(s, timeout),
                Stream::Unix(s) => site::readable(s, timeout),
            }
    }

    /// Waits until the server closes the connection, and skips what it still sends.
    ///
    /// # Panics
    /// If that does not happen in time.
    pub fn wait_closed(&mut self) {
        while self
            .try_receive()
            .expect("the server closes the connection in time")
            .is_some()
        {}
    }

    /// Shuts down the sending side.
    pub fn shut(&mut self) {
        self.shutdown(Shutdown::Write);
    }

    /// Shuts down the receiving side; over a Unix socket the server's writes fail from now on.
    pub fn shut_reading(&mut self) {
        self.shutdown(Shutdown::Read);
    }

    fn shutdown(&self, how: Shutdown) {
        let shut = match &self.stream {
            Stream::Tcp(s) | Stream::Tls(s, _) => s.shutdown(how),
            Stream::Unix(s) => s.shutdown(how),
        };
        shut.expect("the connection is open");
    }

    /// Sends a request and waits for its reply; pushes that arrive before it are skipped.
    pub fn request(&mut self, mut message: Value) -> Value {
        message["id"] = "request".into();
        self.send(&message);
        loop {
            let reply = self.receive();
            if reply["in_reply_to"] == "request" {
                return reply;
            }
        }
    }
}

/// Whether `got` contains all that `expected` shows. `"*"` matches any value; `"$x"` matches a
/// string that is the same in every place.
pub fn matches(
    expected: &Value,
    got: &Value,
    bound: &mut std::collections::HashMap<String, String>,
) -> bool {
    match (expected, got) {
        (Value::String(pattern), _) if pattern == "*" => true,
        (Value::String(pattern), Value::String(text)) if pattern.starts_with('$') => {
            bound.entry(pattern.clone()).or_insert_with(|| text.clone()) == text
        }
        (Value::Object(expected), Value::Object(got)) => expected
            .iter()
            .all(|(key, value)| got.get(key).is_some_and(|got| matches(value, got, bound))),
        (Value::Array(expected), Value::Array(got)) => {
            expected.len() == got.len()
                && expected.iter().zip(got).all(|(e, g)| matches(e, g, bound))
        }
        _ => expected == got,
    }
}

/// Replaces names by the strings that they are bound to.
#[must_use]
pub fn fill(value: &Value, bound: &std::collections::HashMap<String, String>) -> Value {
    match value {
        Value::String(name) => bound.get(name).unwrap_or(name).clone().into(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), fill(value, bound)))
            .collect(),
        Value::Array(items) => items.iter().map(|item| fill(item, bound)).collect(),
        other => other.clone(),
    }
}
