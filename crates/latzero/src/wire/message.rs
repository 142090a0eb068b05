//! Messages to the server, written as text once and finished when their id is known.

use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base64::Engine as _;
use latzero_protocol::encode::{append_str, append_u64};
use latzero_protocol::frame::{ATTACHMENT_BIT, PREFIX};

use crate::error::Error;
use crate::payload::{self, IntoPayload, Payload};
use crate::wire::pending::Id;

/// A message that has not been sent yet: an unfinished JSON object, so that its id can be added
/// last.
///
/// The text begins with room for both length prefixes of an attachment frame, so that the finished
/// frame is contiguous and never moves.
#[derive(Debug)]
pub(crate) struct Message {
    text: Vec<u8>,
    raw: Option<(&'static str, Vec<u8>)>,
    /// The position of the field of [`Message::body`].
    body: Range<usize>,
    /// The descriptor to send with its first byte; the message is sent only over a connection that
    /// passes descriptors.
    pub(crate) descriptor: Option<Arc<OwnedFd>>,
}

/// Bytes that the id, its key and the closing brace may need, and the `encoding` field.
const FINISH_BYTES_MAX: usize = 64;

/// First size of a message's text in bytes.
const BUFFER_BYTES: usize = 256;

/// Buffers above this size in bytes are not kept.
const BUFFER_BYTES_KEPT: usize = 1024;

/// How many buffers are kept per thread at most.
const BUFFERS_KEPT: usize = 64;

thread_local! {
    /// Buffers of messages that were sent, for the next ones: with many calls in flight fresh
    /// memory from the allocator is not in the cache.
    static BUFFERS: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Message {
    fn drop(&mut self) {
        let mut text = std::mem::take(&mut self.text);
        if text.capacity() > BUFFER_BYTES_KEPT {
            return;
        }
        text.clear();
        // A thread that ends keeps no buffers.
        let _ = BUFFERS.try_with(|buffers| {
            let mut buffers = buffers.borrow_mut();
            if buffers.len() < BUFFERS_KEPT {
                buffers.push(text);
            }
        });
    }
}

impl Message {
    pub(crate) fn new(action: &str) -> Self {
        let mut text = BUFFERS
            .try_with(|buffers| buffers.borrow_mut().pop())
            .ok()
            .flatten()
            .unwrap_or_else(|| Vec::with_capacity(BUFFER_BYTES));
        text.extend_from_slice(&[0; 2 * PREFIX]);
        text.extend_from_slice(b"{\"action\":\"");
        text.extend_from_slice(action.as_bytes());
        text.push(b'"');
        Message {
            text,
            raw: None,
            body: 0..0,
            descriptor: None,
        }
    }

    /// A message with a given text: a JSON object with an action and without an id.
    pub(crate) fn from_object(json: &str) -> Self {
        let open = json.trim_end().strip_suffix('}').unwrap_or(json);
        let mut text = Vec::with_capacity(json.len() + FINISH_BYTES_MAX);
        text.extend_from_slice(&[0; 2 * PREFIX]);
        text.extend_from_slice(open.trim_start().as_bytes());
        Message {
            text,
            raw: None,
            body: 0..0,
            descriptor: None,
        }
    }

    fn key(&mut self, key: &str) {
        self.text.extend_from_slice(b",\"");
        self.text.extend_from_slice(key.as_bytes());
        self.text.extend_from_slice(b"\":");
    }

    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key);
        append_str(&mut self.text, value);
    }

    pub(crate) fn number(&mut self, key: &str, value: u64) {
        self.key(key);
        append_u64(&mut self.text, value);
    }

    /// Sends a descriptor with the message.
    pub(crate) fn carry(&mut self, descriptor: Arc<OwnedFd>) {
        self.number("descriptors", 1);
        self.descriptor = Some(descriptor);
    }

    /// Adds a field whose value is JSON text.
    pub(crate) fn json(&mut self, key: &str, value: &[u8]) {
        self.key(key);
        self.text.extend_from_slice(value);
    }

    /// Adds a payload, in `field` or next to the JSON.
    pub(crate) fn payload(&mut self, field: &'static str, payload: Payload) {
        match payload {
            Payload::None => {}
            Payload::Json(json) => self.json(field, json.as_bytes()),
            Payload::Bytes(bytes) => self.raw = Some((field, bytes)),
        }
    }

    /// Adds a body, in `field` or next to the JSON. Nothing is added if it cannot be encoded.
    pub(crate) fn body<T: IntoPayload + ?Sized>(
        &mut self,
        field: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        let start = self.text.len();
        self.key(field);
        match payload::append(value, &mut self.text) {
            Ok(None) => self.body = start..self.text.len(),
            Ok(Some(bytes)) => {
                self.text.truncate(start);
                self.raw = Some((field, bytes));
            }
            Err(error) => {
                self.text.truncate(start);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Replaces what [`Message::body`] added with raw bytes.
    pub(crate) fn replace_body(&mut self, field: &'static str, bytes: Vec<u8>) {
        self.text.drain(std::mem::take(&mut self.body));
        self.raw = Some((field, bytes));
    }

    /// Removes and returns the body that [`Message::body`] or [`Message::replace_body`] added: JSON
    /// text or raw bytes.
    pub(crate) fn take_body(&mut self, field: &'static str) -> Payload {
        if let Some((_, raw)) = self.raw.take() {
            return Payload::Bytes(raw);
        }
        let body = std::mem::take(&mut self.body);
        if body.is_empty() {
            return Payload::None;
        }
        // Behind the comma and the key.
        let value = body.start + field.len() + 4;
        let json = String::from_utf8_lossy(&self.text[value..body.end]).into_owned();
        self.text.drain(body);
        Payload::Json(json)
    }

    /// An upper bound of the finished frame's length in bytes, prefix excluded.
    pub(crate) fn len_max(&self) -> usize {
        let raw = self.raw.as_ref().map_or(0, |(_, raw)| raw.len());
        self.text.len() + raw + FINISH_BYTES_MAX
    }

    /// Finishes the message and appends its frame to `out`. Raw bytes are copied there directly.
    pub(crate) fn finish(&mut self, id: Option<Id>, attachments: bool, out: &mut Vec<u8>) {
        if let Some(id) = id {
            self.text.extend_from_slice(b",\"id\":\"");
            id.append(&mut self.text);
            self.text.push(b'"');
        }
        let raw = match self.raw.take() {
            Some((field, raw)) if !attachments => {
                self.string("encoding", "base64");
                let base64 = base64::engine::general_purpose::STANDARD.encode(raw);
                self.string(field, &base64);
                None
            }
            raw => raw,
        };
        self.text.push(b'}');
        let header = self.text.len() - 2 * PREFIX;
        let prefix = |n: usize| u32::try_from(n).expect("frames are checked against max_frame");
        match raw {
            None => {
                let length = prefix(header).to_be_bytes();
                self.text[PREFIX..2 * PREFIX].copy_from_slice(&length);
                out.extend_from_slice(&self.text[PREFIX..]);
            }
            Some((_, raw)) => {
                let length = prefix(PREFIX + header + raw.len()) | ATTACHMENT_BIT;
                self.text[..PREFIX].copy_from_slice(&length.to_be_bytes());
                self.text[PREFIX..2 * PREFIX].copy_from_slice(&prefix(header).to_be_bytes());
                out.reserve(self.text.len() + raw.len());
                out.extend_from_slice(&self.text);
                out.extend_from_slice(&raw);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use latzero_protocol::frame::{Accept, decode};

    fn check(payload: Payload, attachments: bool, json: &str, raw: Option<&[u8]>) {
        let mut message = Message::new("trigger");
        message.string("process", "fo\"o");
        message.payload("data", payload);
        let id = Id::parse("1f.3").unwrap();
        let accept = Accept {
            max_frame: 1000,
            attachments,
        };
        let mut bytes = Vec::new();
        message.finish(Some(id), attachments, &mut bytes);
        let (frame, used) = decode(&bytes, accept).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        assert_eq!(std::str::from_utf8(frame.json).unwrap(), json);
        assert_eq!(frame.attachment, raw);
    }

    #[test]
    fn messages_are_finished_with_their_id() {
        check(
            Payload::Json("[1]".into()),
            true,
            r#"{"action":"trigger","process":"fo\"o","data":[1],"id":"1f.3"}"#,
            None,
        );
        check(
            Payload::Bytes(vec![0, 255]),
            true,
            r#"{"action":"trigger","process":"fo\"o","id":"1f.3"}"#,
            Some(&[0, 255]),
        );
        check(
            Payload::Bytes(vec![0, 255]),
            false,
            r#"{"action":"trigger","process":"fo\"o","id":"1f.3","encoding":"base64","data":"AP8="}"#,
            None,
        );
    }
}
