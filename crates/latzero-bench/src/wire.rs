//! A connection to LatZero at the level of frames, without the work of a client library.

use crate::failure::{During, Failure};
use crate::server::Running;
use crate::stream::{Stream, Transport};
use latzero_protocol::frame::{self, Accept};
use latzero_protocol::limits::MAX_FRAME_DEFAULT;
use serde::Deserialize;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// How long the server may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(20);

const READ_BYTES: usize = 16 * 1024;

/// A connection after its handshake.
pub(crate) struct Wire {
    stream: Stream,
    out: Vec<u8>,
    input: Vec<u8>,
    /// How many bytes of `input` were used.
    used: usize,
}

/// The result of one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Some,
    /// There is nothing to read yet.
    Nothing,
    /// The server closed the connection.
    End,
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl Wire {
    /// Connects and sends `handshake`, which needs at least `app_id`.
    pub(crate) fn connect(
        server: &Running,
        transport: Transport,
        handshake: Value,
    ) -> Result<Self, Failure> {
        let mut wire = Self::open(server, transport)?;
        wire.introduce(handshake)?;
        Ok(wire)
    }

    /// Connects without sending anything.
    pub(crate) fn open(server: &Running, transport: Transport) -> Result<Self, Failure> {
        let stream = Stream::connect(transport, server.address(transport))?;
        stream.set_read_timeout(Some(ANSWER_WAIT))?;
        Ok(Self {
            stream,
            out: Vec::new(),
            input: Vec::new(),
            used: 0,
        })
    }

    /// Performs the handshake, and returns the acknowledgement.
    pub(crate) fn introduce(&mut self, handshake: Value) -> Result<Value, Failure> {
        let ack = self.ask(&handshake_json(handshake))?;
        if ack["status"] != "ok" {
            return Err(Failure::said(format!("the handshake was refused: {ack}")));
        }
        // Thousands of these exist at the same time, so the buffers are freed.
        self.out = Vec::new();
        self.input = self.input.split_off(self.used);
        self.used = 0;
        Ok(ack)
    }

    /// Makes reads and writes non-blocking: see [`Wire::fill`].
    pub(crate) fn set_nonblocking(&self) -> Result<(), Failure> {
        self.stream.set_nonblocking(true)
    }

    /// Sends the message `json`.
    pub(crate) fn send(&mut self, json: &str) -> Result<(), Failure> {
        self.append(json);
        self.flush()
    }

    /// Appends the message `json` to those that [`Wire::flush`] sends.
    pub(crate) fn append(&mut self, json: &str) {
        frame::append(&mut self.out, |out| out.extend_from_slice(json.as_bytes()));
    }

    /// Sends what was appended, as far as the socket takes it now; returns whether it took all.
    pub(crate) fn flush_some(&mut self) -> Result<bool, Failure> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error).during("write to the server"),
            }
        }
        Ok(true)
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        let written = self.stream.write_all(&self.out);
        self.out.clear();
        written.during("write to the server")
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Result<&[u8], Failure> {
        loop {
            if let Some(range) = self.next_received()? {
                return Ok(&self.input[range]);
            }
            match self.fill()? {
                Fill::Some => {}
                Fill::Nothing => return Err(Failure::said("the server does not answer")),
                Fill::End => return Err(Failure::said("the server closed the connection")),
            }
        }
    }

    /// The next message, if it has been read completely.
    pub(crate) fn received(&mut self) -> Result<Option<&[u8]>, Failure> {
        Ok(self.next_received()?.map(|range| &self.input[range]))
    }

    fn next_received(&mut self) -> Result<Option<Range<usize>>, Failure> {
        let accept = Accept {
            max_frame: MAX_FRAME_DEFAULT,
            attachments: false,
        };
        let decoded = frame::decode(&self.input[self.used..], accept)
            .map_err(|error| Failure::said(error.to_string()))?;
        let Some((_, length)) = decoded else {
            return Ok(None);
        };
        let start = self.used + frame::PREFIX;
        self.used += length;
        Ok(Some(start..self.used))
    }

    /// Reads once; discards the messages that were returned before.
    pub(crate) fn fill(&mut self) -> Result<Fill, Failure> {
        self.input.drain(..self.used);
        self.used = 0;
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => Ok(Fill::End),
            Ok(n) => {
                self.input.extend_from_slice(&bytes[..n]);
                Ok(Fill::Some)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Fill::Nothing),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Fill::End),
            Err(error) => Err(error).during("read from the server"),
        }
    }

    /// Sends `json`, and returns the next message that is a reply.
    pub(crate) fn ask(&mut self, json: &str) -> Result<Value, Failure> {
        self.send(json)?;
        loop {
            let reply: Value = parse(self.receive()?)?;
            if reply["in_reply_to"].is_string() {
                return Ok(reply);
            }
            if reply["action"] == "error" {
                return Err(Failure::said(format!("the server says {reply}")));
            }
        }
    }

    /// Sends the call `json`, and fails unless the answer is `ok`.
    pub(crate) fn call(&mut self, json: &str) -> Result<(), Failure> {
        #[derive(Deserialize)]
        struct Reply<'a> {
            status: Option<&'a str>,
        }
        self.send(json)?;
        let message = self.receive()?;
        match parse::<Reply<'_>>(message)?.status {
            Some("ok") => Ok(()),
            _ => Err(Failure::said(format!(
                "a call was answered with {}",
                String::from_utf8_lossy(message)
            ))),
        }
    }

    /// Answers every call with its own data, and ignores everything else, until the connection
    /// ends.
    pub(crate) fn serve(mut self) {
        // Calls may be far apart, so there is no timeout.
        if self.stream.set_read_timeout(None).is_ok() {
            while self.answer_next().is_ok() {}
        }
    }

    fn answer_next(&mut self) -> Result<(), Failure> {
        #[derive(Deserialize)]
        struct Message<'a> {
            action: &'a str,
            id: Option<&'a str>,
            #[serde(borrow)]
            data: Option<&'a serde_json::value::RawValue>,
        }
        let message: Message<'_> = parse(self.receive()?)?;
        let ("trigger", Some(id)) = (message.action, message.id) else {
            return Ok(());
        };
        let data = message
            .data
            .map_or("null", serde_json::value::RawValue::get);
        let answer = format!(
            r#"{{"action":"response","in_reply_to":"{id}","status":"ok","response":{data}}}"#
        );
        self.send(&answer)
    }
}

/// The handshake message; it needs at least `app_id`.
pub(crate) fn handshake_json(mut handshake: Value) -> String {
    handshake["action"] = "handshake".into();
    handshake["id"] = "h".into();
    handshake.to_string()
}

pub(crate) fn parse<'a, T: Deserialize<'a>>(message: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(message).map_err(|error| {
        Failure::said(format!(
            "{error}, in the server's {}",
            String::from_utf8_lossy(message)
        ))
    })
}
