//! Blocking sockets for the callers and handlers of the relays: the minimum at either end.

use crate::failure::{During, Failure};
use crate::frame::Input;
use crate::plan::{Load, Outcome, Plan, RateClock, time_each};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The two kinds of socket that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// A connected socket of either kind.
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Connects to `address`: `IP:PORT`, or a socket's path.
    pub(crate) fn connect(transport: Transport, address: &str) -> Result<Self, Failure> {
        let connected = match transport {
            Transport::Tcp => TcpStream::connect(address).and_then(|stream| {
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }),
            Transport::Unix => UnixStream::connect(address).map(Self::Unix),
        };
        connected.during(format!("connect to {address}"))
    }

    /// Sets how long a read waits for data; with `None`, the initial value, it waits for ever.
    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) -> Result<(), Failure> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
        }
        .during("bound the wait for an answer")
    }

    /// Sets whether reads and writes fail with `WouldBlock` instead of waiting.
    pub(crate) fn set_nonblocking(&self, nonblocking: bool) -> Result<(), Failure> {
        match self {
            Self::Tcp(stream) => stream.set_nonblocking(nonblocking),
            Self::Unix(stream) => stream.set_nonblocking(nonblocking),
        }
        .during("choose whether a socket waits")
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
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

/// A caller's side of the protocol.
pub(crate) trait Calls {
    /// Appends the next call.
    fn append_call(&mut self, out: &mut Vec<u8>);
    /// Takes every complete answer, checks that it is the expected one, and returns their number.
    fn take_answers(&mut self, input: &mut Input) -> Result<u64, Failure>;
}

/// Runs a caller through `plan`: answers are read as they arrive, and all calls that follow from
/// one read are sent with one write.
pub(crate) fn run_calls(
    stream: &mut Stream,
    calls: &mut impl Calls,
    plan: &Plan,
) -> Result<Outcome, Failure> {
    let mut input = Input::new();
    let mut out = Vec::new();
    match plan.load {
        Load::OneAtATime => time_each(plan, || {
            calls.append_call(&mut out);
            write_out(stream, &mut out)?;
            while calls.take_answers(&mut input)? == 0 {
                read_some(stream, &mut input)?;
            }
            Ok(())
        }),
        Load::InFlight(window) => {
            let mut clock = RateClock::new(plan, window);
            while !clock.is_over() {
                for _ in 0..clock.ask() {
                    calls.append_call(&mut out);
                }
                write_out(stream, &mut out)?;
                read_some(stream, &mut input)?;
                clock.answered(calls.take_answers(&mut input)?);
            }
            Ok(clock.outcome())
        }
    }
}

/// Serves until the server ends the connection: `answer` immediately turns input into output.
pub(crate) fn run_handler(
    stream: &mut Stream,
    input: &mut Input,
    mut answer: impl FnMut(&mut Input, &mut Vec<u8>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut out = Vec::new();
    loop {
        answer(input, &mut out)?;
        write_out(stream, &mut out)?;
        read_some(stream, input)?;
    }
}

pub(crate) fn write_out(stream: &mut Stream, out: &mut Vec<u8>) -> Result<(), Failure> {
    if !out.is_empty() {
        stream.write_all(out).during("write to the server")?;
        out.clear();
    }
    Ok(())
}

pub(crate) fn read_some(stream: &mut Stream, input: &mut Input) -> Result<(), Failure> {
    match input.fill(stream).during("read from the server")? {
        0 => Err(Failure::said("the server closed the connection")),
        _ => Ok(()),
    }
}
