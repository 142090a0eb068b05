//! Messages to the server, written as text once and finished when their id is known.

use base64::Engine as _;
use latzero_protocol::encode::{append_str, append_u64};
use latzero_protocol::frame::{ATTACHMENT_BIT, PREFIX};

use crate::payload::Payload;
use crate::pending::Key;

/// A message that is not sent yet: an object still open, so that its id can be added last.
///
/// The text begins with room for both length prefixes of an attachment frame, so that the finished frame is one
/// piece of memory and never moves.
#[derive(Debug)]
pub(crate) struct Message {
    text: Vec<u8>,
    raw: Option<(&'static str, Vec<u8>)>,
}

/// Bytes that the id, its key and the closing brace may need, and the `encoding` field.
const FINISH_BYTES_MAX: usize = 64;

impl Message {
    pub(crate) fn new(action: &str) -> Self {
        let mut text = Vec::with_capacity(256);
        text.extend_from_slice(&[0; 2 * PREFIX]);
        text.extend_from_slice(b"{\"action\":\"");
        text.extend_from_slice(action.as_bytes());
        text.push(b'"');
        Message { text, raw: None }
    }

    /// A message whose text is there: a JSON object with an action and without an id.
    pub(crate) fn from_object(json: &str) -> Self {
        let open = json.trim_end().strip_suffix('}').unwrap_or(json);
        let mut text = Vec::with_capacity(json.len() + FINISH_BYTES_MAX);
        text.extend_from_slice(&[0; 2 * PREFIX]);
        text.extend_from_slice(open.trim_start().as_bytes());
        Message { text, raw: None }
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

    /// Adds a field whose value is JSON text.
    pub(crate) fn json(&mut self, key: &str, value: &[u8]) {
        self.key(key);
        self.text.extend_from_slice(value);
    }

    /// Adds a payload, in `field` or beside the JSON.
    pub(crate) fn payload(&mut self, field: &'static str, payload: Payload) {
        match payload {
            Payload::None => {}
            Payload::Json(json) => self.json(field, &json),
            Payload::Bytes(bytes) => self.raw = Some((field, bytes)),
        }
    }

    /// An upper bound of the finished frame's length in bytes, prefix excluded.
    pub(crate) fn len_max(&self) -> usize {
        let raw = self.raw.as_ref().map_or(0, |(_, raw)| raw.len());
        self.text.len() + raw + FINISH_BYTES_MAX
    }

    /// Finishes the message; the frame is what [`Message::frame`] then returns.
    pub(crate) fn finish(&mut self, id: Option<Key>, attachments: bool) -> &[u8] {
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
                &self.text[PREFIX..]
            }
            Some((_, raw)) => {
                self.text.extend_from_slice(&raw);
                let length = prefix(PREFIX + header + raw.len()) | ATTACHMENT_BIT;
                self.text[..PREFIX].copy_from_slice(&length.to_be_bytes());
                self.text[PREFIX..2 * PREFIX].copy_from_slice(&prefix(header).to_be_bytes());
                &self.text
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
        let id = Key {
            slot: 0x1f,
            generation: 3,
        };
        let accept = Accept {
            max_frame: 1000,
            attachments,
        };
        let bytes = message.finish(Some(id), attachments);
        let (frame, used) = decode(bytes, accept).unwrap().unwrap();
        assert_eq!(used, bytes.len());
        assert_eq!(std::str::from_utf8(frame.json).unwrap(), json);
        assert_eq!(frame.attachment, raw);
    }

    #[test]
    fn messages_are_finished_with_their_id() {
        check(
            Payload::Json(b"[1]".to_vec()),
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
