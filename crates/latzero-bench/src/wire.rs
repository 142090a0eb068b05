//! One connection to LatZero, frame by frame: what a client library would do for itself is not in the way here.

use crate::failure::{During, Failure};
use crate::server::Running;
use crate::stream::{Stream, Transport};
use latzero_protocol::frame::{self, Accept};
use latzero_protocol::limits::MAX_FRAME_DEFAULT;
use serde::Deserialize;
use serde_json::Value;
use std::io::{Read, Write};
use std::time::Duration;

/// How long the server may take to answer.
const ANSWER_WAIT: Duration = Duration::from_secs(20);

const READ_BYTES: usize = 16 * 1024;

/// A connection after its handshake.
pub(crate) struct Wire {
    stream: Stream,
    out: Vec<u8>,
    input: Vec<u8>,
    /// Bytes of `input` that were used.
    used: usize,
}

impl Wire {
    /// Connects and introduces itself with `handshake`, which needs `app_id` at least.
    pub(crate) fn connect(
        server: &Running,
        transport: Transport,
        mut handshake: Value,
    ) -> Result<Self, Failure> {
        let stream = Stream::connect(transport, server.address(transport))?;
        stream.set_read_timeout(Some(ANSWER_WAIT))?;
        let mut wire = Self {
            stream,
            out: Vec::new(),
            input: Vec::new(),
            used: 0,
        };
        handshake["action"] = "handshake".into();
        handshake["id"] = "h".into();
        let ack = wire.ask(&handshake.to_string())?;
        if ack["status"] != "ok" {
            return Err(Failure::said(format!("the handshake was refused: {ack}")));
        }
        // Thousands of these wait side by side.
        wire.out = Vec::new();
        wire.input = wire.input.split_off(wire.used);
        wire.used = 0;
        Ok(wire)
    }

    /// Sends the message `json`.
    pub(crate) fn send(&mut self, json: &str) -> Result<(), Failure> {
        self.out.clear();
        frame::append(&mut self.out, |out| out.extend_from_slice(json.as_bytes()));
        self.stream
            .write_all(&self.out)
            .during("write to the server")
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Result<&[u8], Failure> {
        let accept = Accept {
            max_frame: MAX_FRAME_DEFAULT,
            attachments: false,
        };
        let length = loop {
            let unused = &self.input[self.used..];
            if let Some((_, length)) =
                frame::decode(unused, accept).map_err(|error| Failure::said(error.to_string()))?
            {
                break length;
            }
            self.input.drain(..self.used);
            self.used = 0;
            let mut bytes = [0; READ_BYTES];
            match self
                .stream
                .read(&mut bytes)
                .during("read from the server")?
            {
                0 => return Err(Failure::said("the server closed the connection")),
                n => self.input.extend_from_slice(&bytes[..n]),
            }
        };
        let start = self.used + frame::PREFIX;
        self.used += length;
        Ok(&self.input[start..self.used])
    }

    /// Sends `json`, and returns the next message that replies to anything.
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

    /// Sends the call `json`, and fails unless it is answered with `ok`.
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

    /// Answers every call with its own data, and passes over everything else, until the connection ends.
    pub(crate) fn serve(mut self) {
        // No call may come for a long time: nothing is wrong then.
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

fn parse<'a, T: Deserialize<'a>>(message: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(message).map_err(|error| {
        Failure::said(format!(
            "{error}, in the server's {}",
            String::from_utf8_lossy(message)
        ))
    })
}
