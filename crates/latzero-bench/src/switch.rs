//! The event loop of the relays: one thread, epoll, non-blocking sockets.
//!
//! Sockets are edge-triggered and registered only for reading. Each ready connection is read until
//! it is empty, the data is moved to outboxes, and each changed outbox is written once. Only a full
//! socket is registered for writing, until it has accepted everything.

use crate::failure::{During, Failure};
use crate::frame::Input;
use crate::process::announce;
use crate::stream::Transport;
use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Events, Interest, Poll, Registry, Token};
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

/// How a relay moves the bytes. Connections are numbered in the order in which they were accepted.
pub(crate) trait Switch {
    /// Handles the bytes that were read from the connection `from`.
    fn switch(&mut self, from: usize, input: &mut Input, out: &mut Outboxes)
    -> Result<(), Failure>;
}

/// The bytes that wait for each connection.
#[derive(Default)]
pub(crate) struct Outboxes {
    outboxes: Vec<Vec<u8>>,
    touched: Vec<usize>,
}

impl Outboxes {
    /// The outbox of `connection`, which is written at the end of this batch.
    pub(crate) fn touch(&mut self, connection: usize) -> Result<&mut Vec<u8>, Failure> {
        let Some(outbox) = self.outboxes.get_mut(connection) else {
            return Err(Failure::said(format!(
                "there is no connection {connection} yet"
            )));
        };
        if outbox.is_empty() {
            self.touched.push(connection);
        }
        Ok(outbox)
    }
}

/// Listens, announces its address, and runs until it is killed. Loopback or a socket in `scratch`
/// only.
pub(crate) fn serve(
    transport: Transport,
    scratch: &Path,
    switch: &mut impl Switch,
) -> Result<(), Failure> {
    let mut listener = Listener::bind(transport, scratch)?;
    let mut poll = Poll::new().during("open epoll")?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)
        .during("register the listener")?;
    announce(&listener.address()?)?;

    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut out = Outboxes::default();
    let mut events = Events::with_capacity(64);
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            polled => polled.during("wait for sockets")?,
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Some(socket) = listener.accept().during("accept")? {
                    let connection = Connection::open(socket, connections.len(), poll.registry())
                        .during("set up a connection")?;
                    connections.push(Some(connection));
                    out.outboxes.push(Vec::new());
                }
                continue;
            }
            let from = event.token().0;
            let Some(Some(connection)) = connections.get_mut(from) else {
                continue;
            };
            if event.is_writable() && connection.is_full {
                out.touched.push(from);
            }
            let state = connection.read_all(|input| switch.switch(from, input, &mut out))?;
            if state == State::Ended {
                connections[from] = None;
            }
        }
        for to in out.touched.drain(..) {
            let outbox = &mut out.outboxes[to];
            match connections[to]
                .as_mut()
                .map(|it| it.write(outbox, to, poll.registry()))
            {
                Some(Ok(())) => {}
                // The connection has ended, so nobody reads these bytes.
                Some(Err(_)) | None => {
                    connections[to] = None;
                    outbox.clear();
                }
            }
        }
    }
}

const LISTENER: Token = Token(usize::MAX);

#[derive(PartialEq, Eq)]
enum State {
    Open,
    Ended,
}

struct Connection {
    socket: Socket,
    input: Input,
    /// It accepted only a part, and is registered for writing until it has accepted the rest.
    is_full: bool,
}

impl Connection {
    fn open(mut socket: Socket, number: usize, registry: &Registry) -> io::Result<Self> {
        if let Socket::Tcp(stream) = &socket {
            stream.set_nodelay(true)?;
        }
        registry.register(&mut socket, Token(number), Interest::READABLE)?;
        Ok(Self {
            socket,
            input: Input::new(),
            is_full: false,
        })
    }

    fn read_all(
        &mut self,
        mut switch: impl FnMut(&mut Input) -> Result<(), Failure>,
    ) -> Result<State, Failure> {
        loop {
            match self.input.fill(&mut self.socket) {
                Ok(0) => return Ok(State::Ended),
                Ok(_) => {
                    let was_full = self.input.is_full();
                    switch(&mut self.input)?;
                    // A stream that returned less than there was room for is empty, and its next
                    // byte is a new edge: epoll(7), question 9. No second read is needed to find
                    // that out.
                    if !was_full {
                        return Ok(State::Open);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(State::Open),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Ok(State::Ended),
            }
        }
    }

    fn write(&mut self, outbox: &mut Vec<u8>, number: usize, on: &Registry) -> io::Result<()> {
        let mut written = 0;
        while written < outbox.len() {
            match self.socket.write(&outbox[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        outbox.drain(..written);
        let is_full = !outbox.is_empty();
        if is_full != self.is_full {
            let both = Interest::READABLE | Interest::WRITABLE;
            let interest = if is_full { both } else { Interest::READABLE };
            on.reregister(&mut self.socket, Token(number), interest)?;
            self.is_full = is_full;
        }
        Ok(())
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, String),
}

impl Listener {
    fn bind(transport: Transport, scratch: &Path) -> Result<Self, Failure> {
        match transport {
            Transport::Tcp => {
                let any_port = "127.0.0.1:0".parse().expect("an IP and a port");
                Ok(Self::Tcp(
                    TcpListener::bind(any_port).during("listen on 127.0.0.1")?,
                ))
            }
            Transport::Unix => {
                let path = scratch.join("relay.sock");
                let text = path.display().to_string();
                Ok(Self::Unix(
                    UnixListener::bind(&path).during(format!("listen on {text}"))?,
                    text,
                ))
            }
        }
    }

    fn address(&self) -> Result<String, Failure> {
        match self {
            Self::Tcp(listener) => Ok(listener
                .local_addr()
                .during("read the listener's address")?
                .to_string()),
            Self::Unix(_, path) => Ok(path.clone()),
        }
    }

    fn accept(&self) -> io::Result<Option<Socket>> {
        let accepted = match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
        };
        match accepted {
            Ok(socket) => Ok(Some(socket)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Source for Listener {
    fn register(&mut self, on: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.register(on, token, interest),
            Self::Unix(listener, _) => listener.register(on, token, interest),
        }
    }

    fn reregister(&mut self, on: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.reregister(on, token, interest),
            Self::Unix(listener, _) => listener.reregister(on, token, interest),
        }
    }

    fn deregister(&mut self, on: &Registry) -> io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.deregister(on),
            Self::Unix(listener, _) => listener.deregister(on),
        }
    }
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Source for Socket {
    fn register(&mut self, on: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.register(on, token, interest),
            Self::Unix(stream) => stream.register(on, token, interest),
        }
    }

    fn reregister(&mut self, on: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.reregister(on, token, interest),
            Self::Unix(stream) => stream.reregister(on, token, interest),
        }
    }

    fn deregister(&mut self, on: &Registry) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.deregister(on),
            Self::Unix(stream) => stream.deregister(on),
        }
    }
}
