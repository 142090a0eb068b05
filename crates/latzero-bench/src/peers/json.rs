//! A minimal relay for framed JSON: the limit for any broker that reads the routing fields of a
//! JSON envelope.
//!
//! The server parses each frame, finds the handler by name, gives the call a new id and forwards
//! the payload unread. The response is matched by that id. There are no pools, deadlines, limits or
//! errors.

use super::Peer;
use crate::failure::Failure;
use crate::frame::{self, Input};
use crate::plan::{Outcome, Plan};
use crate::process::announce;
use crate::stream::{Calls, Stream, Transport, read_some, run_calls, run_handler, write_out};
use crate::switch::{self, Outboxes, Switch};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::path::Path;

/// The JSON relay over one kind of socket.
pub(crate) struct Json(pub(crate) Transport);

impl Peer for Json {
    fn name(&self) -> &'static str {
        match self.0 {
            Transport::Tcp => "json-tcp",
            Transport::Unix => "json-unix",
        }
    }

    fn transport(&self) -> Transport {
        self.0
    }

    fn serve(&self, scratch: &Path) -> Result<(), Failure> {
        switch::serve(self.0, scratch, &mut Router::new())
    }

    fn handle(&self, address: &str) -> Result<(), Failure> {
        let mut stream = Stream::connect(self.0, address)?;
        let mut input = Input::new();
        let mut out = Vec::new();
        frame::append_frame(&mut out, |out| {
            out.extend_from_slice(br#"{"action":"handshake","id":"h1","process":""#);
            out.extend_from_slice(frame::PROCESS.as_bytes());
            out.extend_from_slice(br#""}"#);
        });
        write_out(&mut stream, &mut out)?;
        while input.next_frame()?.is_none() {
            read_some(&mut stream, &mut input)?;
        }
        announce(address)?;
        run_handler(&mut stream, &mut input, |input, out| {
            while let Some(body) = input.next_frame()? {
                let Message {
                    action: "trigger",
                    id: Some(id),
                    data: Some(data),
                    ..
                } = parse(body)?
                else {
                    return Err(Failure::said(
                        "the handler was sent something other than a call",
                    ));
                };
                frame::append_response(out, id, "ok", data.get());
            }
            Ok(())
        })
    }

    fn call(&self, address: &str, plan: &Plan) -> Result<Outcome, Failure> {
        let mut calls = Numbered {
            next: frame::FIRST_ID,
            expected: frame::FIRST_ID,
        };
        run_calls(&mut Stream::connect(self.0, address)?, &mut calls, plan)
    }
}

/// The fields that the relay reads. The payload stays unparsed.
#[derive(Deserialize)]
struct Message<'a> {
    action: &'a str,
    id: Option<&'a str>,
    process: Option<&'a str>,
    pool: Option<&'a str>,
    ttl: Option<u64>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
    in_reply_to: Option<&'a str>,
    status: Option<&'a str>,
    #[serde(borrow)]
    response: Option<&'a RawValue>,
}

fn parse(body: &[u8]) -> Result<Message<'_>, Failure> {
    serde_json::from_slice(body)
        .map_err(|error| Failure::said(format!("a message that cannot be read: {error}")))
}

/// The server's whole state.
struct Router {
    handlers: HashMap<String, usize>,
    calls: HashMap<u64, Caller>,
    next_id: u64,
}

/// A call's connection, and its id there.
struct Caller {
    connection: usize,
    id: Box<str>,
}

impl Router {
    fn new() -> Self {
        Self {
            handlers: HashMap::new(),
            calls: HashMap::new(),
            next_id: frame::FIRST_ID,
        }
    }

    /// The reaction to `message` from the connection `from`. `None` if it is invalid here.
    fn route(
        &mut self,
        from: usize,
        message: &Message<'_>,
        out: &mut Outboxes,
    ) -> Option<Result<(), Failure>> {
        match message.action {
            "trigger" => {
                let process = message.process?;
                let to = *self.handlers.get(process)?;
                let id = self.next_id;
                self.next_id += 1;
                self.calls.insert(
                    id,
                    Caller {
                        connection: from,
                        id: message.id?.into(),
                    },
                );
                let (pool, ttl_ms, data) = (message.pool?, message.ttl?, message.data?.get());
                Some(out.touch(to).map(|out| {
                    frame::append_forwarded_call(out, id, process, pool, ttl_ms, data);
                }))
            }
            "response" => {
                let caller = self.calls.remove(&message.in_reply_to?.parse().ok()?)?;
                let (status, response) = (message.status?, message.response?.get());
                Some(out.touch(caller.connection).map(|out| {
                    frame::append_response(out, &caller.id, status, response);
                }))
            }
            "handshake" => {
                self.handlers.insert(message.process?.to_owned(), from);
                let id = message.id?;
                Some(
                    out.touch(from)
                        .map(|out| frame::append_response(out, id, "ok", "{}")),
                )
            }
            _ => None,
        }
    }
}

impl Switch for Router {
    fn switch(
        &mut self,
        from: usize,
        input: &mut Input,
        out: &mut Outboxes,
    ) -> Result<(), Failure> {
        while let Some(body) = input.next_frame()? {
            let message = parse(body)?;
            self.route(from, &message, out).unwrap_or_else(|| {
                let body = String::from_utf8_lossy(body);
                Err(Failure::said(format!(
                    "a message that fits nothing: {body}"
                )))
            })?;
        }
        Ok(())
    }
}

/// Calls with ids that count up. One handler answers in order, so the answers must count up too.
struct Numbered {
    next: u64,
    expected: u64,
}

impl Calls for Numbered {
    fn append_call(&mut self, out: &mut Vec<u8>) {
        frame::append_call(out, self.next);
        self.next += 1;
    }

    fn take_answers(&mut self, input: &mut Input) -> Result<u64, Failure> {
        let before = self.expected;
        while let Some(body) = input.next_frame()? {
            let answer = parse(body)?;
            let id = answer.in_reply_to.and_then(|id| id.parse().ok());
            let response = answer.response.map(RawValue::get);
            if id != Some(self.expected) || response != Some(frame::PAYLOAD) {
                let body = String::from_utf8_lossy(body);
                return Err(Failure::said(format!(
                    "expected the answer to {}, got {body}",
                    self.expected
                )));
            }
            self.expected += 1;
        }
        Ok(self.expected - before)
    }
}
