//! Results of operations, and the JSON text that carries them to JavaScript.
//!
//! A batch is one JSON array: for each item its number, what it is, details, and a payload.
//! Payloads are copied into the text as they were received. Values that JSON cannot express are in
//! a second array; the text has their index.

use std::fmt::Write as _;

use latzero::{Code, Data, Emission, Error, Reply};
use napi_derive::napi;
use serde::Serialize;
use serde_json::Value;

use crate::errors;
use crate::memory::Extra;

/// The longest JSON text of one payload. V8's strings are at most about twice as long.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Why a longer one does not arrive.
pub(crate) const TOO_LONG: &str = "the payload is too long for a string of JavaScript";

/// What an item of a batch is.
#[napi]
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the macro asks for it")]
pub enum What {
    /// An operation's result, as JSON.
    Json = 0,
    /// An operation's result among the extras.
    Extra = 1,
    /// An operation failed.
    Error = 2,
    /// A streamed answer ended; its end as JSON, or among the extras.
    EndJson = 3,
    EndExtra = 4,
    /// A report on the progress of a streamed answer.
    Progress = 5,
    /// A parked call of an earlier life failed.
    Failed = 6,
    /// A source has nothing more.
    Over = 7,
    /// A request with JSON, or with bytes among the extras.
    RequestJson = 8,
    RequestExtra = 9,
    /// The caller does not want the answer any more.
    Cancel = 10,
}

/// A payload, in the form in which it was received.
pub(crate) enum Payload {
    Reply(Reply),
    Data(Data),
    Emission(Box<Emission>),
    Value(Value),
    Extra(Extra),
}

/// The result of an operation.
pub(crate) enum Outcome {
    /// A value, and details.
    Value(Payload, Option<Value>),
    /// The end of a streamed answer.
    End(Option<Reply>),
    /// A report on the progress of one.
    Progress(Value),
    /// A parked call's failure.
    Failed(Error, Value),
    /// A source has nothing more.
    Over,
}

impl Outcome {
    pub(crate) fn nothing() -> Outcome {
        Outcome::Value(Payload::Value(Value::Null), None)
    }

    pub(crate) fn of(value: impl Serialize) -> Outcome {
        let value = serde_json::to_value(value).unwrap_or(Value::Null);
        Outcome::Value(Payload::Value(value), None)
    }

    /// Bytes of a block, with their version.
    pub(crate) fn memory(bytes: Vec<u8>, version: u64) -> Outcome {
        let meta = Some(version.into());
        Outcome::Value(Payload::Extra(Extra::Memory(bytes)), meta)
    }

    pub(crate) fn extra(extra: Extra) -> Outcome {
        Outcome::Value(Payload::Extra(extra), None)
    }
}

/// A batch that is being put together.
#[derive(Default)]
pub(crate) struct Batch {
    text: String,
    pub(crate) extras: Vec<Extra>,
}

/// A body as JSON text or as bytes.
enum Body<'a> {
    Json(&'a str),
    Bytes(&'a [u8]),
}

impl Batch {
    pub(crate) fn len(&self) -> usize {
        self.text.len()
    }

    /// The whole text; its last element says whether there is more.
    pub(crate) fn finish(mut self, more: bool) -> (String, Vec<Extra>) {
        self.text.insert(0, '[');
        let _ = write!(self.text, "{more}]");
        (self.text, self.extras)
    }

    fn begin(&mut self, token: u64, what: What, meta: Option<&Value>) {
        let _ = write!(self.text, "{token},{},", what as u8);
        match meta {
            Some(meta) => {
                let _ = write!(self.text, "{meta},");
            }
            None => self.text.push_str("0,"),
        }
    }

    fn add_json(&mut self, token: u64, what: What, meta: Option<&Value>, json: &str) {
        if json.len() > PAYLOAD_BYTES_MAX {
            self.add_description(token, &errors::own(Code::TooLarge, TOO_LONG, None));
            return;
        }
        self.begin(token, what, meta);
        self.text.push_str(json);
        self.text.push(',');
    }

    fn add_extra(&mut self, token: u64, what: What, meta: Option<&Value>, extra: Extra) {
        self.begin(token, what, meta);
        let _ = write!(self.text, "{},", self.extras.len());
        self.extras.push(extra);
    }

    fn add_description(&mut self, token: u64, description: &Value) {
        self.begin(token, What::Error, None);
        let _ = write!(self.text, "{description},");
    }

    fn add_body(
        &mut self,
        token: u64,
        (as_json, as_bytes): (What, What),
        meta: Option<&Value>,
        body: Body<'_>,
    ) {
        match body {
            Body::Json(json) => self.add_json(token, as_json, meta, json),
            Body::Bytes(bytes) => {
                self.add_extra(token, as_bytes, meta, Extra::Buffer(bytes.to_vec()));
            }
        }
    }

    /// Adds the result of an operation.
    pub(crate) fn add(&mut self, token: u64, result: Result<Outcome, Error>) {
        const VALUE: (What, What) = (What::Json, What::Extra);
        match result {
            Err(error) => self.add_description(token, &errors::describe(&error)),
            Ok(Outcome::Over) => self.add_json(token, What::Over, None, "0"),
            Ok(Outcome::Progress(report)) => {
                self.add_json(token, What::Progress, None, &report.to_string());
            }
            Ok(Outcome::Failed(error, meta)) => {
                let description = errors::describe(&error).to_string();
                self.add_json(token, What::Failed, Some(&meta), &description);
            }
            Ok(Outcome::End(end)) => {
                let whats = (What::EndJson, What::EndExtra);
                let body = end.as_ref().map_or(Body::Json("null"), of_reply);
                self.add_body(token, whats, None, body);
            }
            Ok(Outcome::Value(payload, meta)) => {
                let meta = meta.as_ref();
                match payload {
                    Payload::Reply(reply) => self.add_body(token, VALUE, meta, of_reply(&reply)),
                    Payload::Data(Data::Json(json)) => {
                        self.add_json(token, What::Json, meta, &json);
                    }
                    Payload::Data(Data::Bytes(bytes)) => {
                        self.add_extra(token, What::Extra, meta, Extra::Buffer(bytes.0));
                    }
                    Payload::Emission(event) => match event.data::<latzero::Bytes>() {
                        Ok(bytes) if event.json().is_none() => {
                            self.add_extra(token, What::Extra, meta, Extra::Buffer(bytes.0));
                        }
                        _ => {
                            let json = event.json().unwrap_or("null");
                            self.add_json(token, What::Json, meta, json);
                        }
                    },
                    Payload::Value(value) => {
                        self.add_json(token, What::Json, meta, &value.to_string());
                    }
                    Payload::Extra(extra) => self.add_extra(token, What::Extra, meta, extra),
                }
            }
        }
    }

    /// Adds a request that is to be answered; false if its payload is too long.
    pub(crate) fn add_request(
        &mut self,
        number: u64,
        meta: &Value,
        request: &latzero::Request,
    ) -> bool {
        let body = match (request.bytes(), request.json()) {
            (Some(bytes), _) => Body::Bytes(bytes),
            (None, json) => Body::Json(json.unwrap_or("null")),
        };
        if matches!(body, Body::Json(json) if json.len() > PAYLOAD_BYTES_MAX) {
            return false;
        }
        let whats = (What::RequestJson, What::RequestExtra);
        self.add_body(number, whats, Some(meta), body);
        true
    }

    /// Adds that the caller of a request is gone.
    pub(crate) fn add_cancel(&mut self, number: u64) {
        self.add_json(number, What::Cancel, None, "0");
    }
}

fn of_reply(reply: &Reply) -> Body<'_> {
    match (reply.bytes(), reply.json()) {
        (Some(bytes), _) => Body::Bytes(bytes),
        (None, json) => Body::Json(json.unwrap_or("null")),
    }
}
