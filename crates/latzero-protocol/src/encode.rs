//! Writes messages directly into a send buffer.
//!
//! Messages are not built first and serialised later: the routing fields are appended around the
//! bytes of the body, which are copied once and never parsed.

use base64::Engine as _;

use crate::envelope::{Body, Raw};
use crate::error::Refusal;
use crate::frame;
use crate::id::{CallId, InstanceId};
use crate::message::Status;

/// Whether the receiver takes attachment frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachments {
    /// It does: raw bytes travel as they are.
    Taken,
    /// It does not: raw bytes travel as base64 text, marked with `"encoding":"base64"`.
    NotTaken,
}

/// Appends `text` as a JSON string.
#[inline]
pub fn append_str(out: &mut Vec<u8>, text: &str) {
    out.reserve(text.len() + 2);
    out.push(b'"');
    // Without an early exit, so that the compiler can compare many bytes at a time.
    let special = text.bytes().fold(false, |special, b| {
        special | (b < 0x20) | (b == b'"') | (b == b'\\')
    });
    if !special {
        out.extend_from_slice(text.as_bytes());
    } else {
        for c in text.chars() {
            match c {
                '"' => out.extend_from_slice(b"\\\""),
                '\\' => out.extend_from_slice(b"\\\\"),
                '\n' => out.extend_from_slice(b"\\n"),
                c if (c as u32) < 0x20 => {
                    out.extend_from_slice(format!("\\u{:04x}", c as u32).as_bytes());
                }
                c => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
    out.push(b'"');
}

/// Appends `n` in decimal digits.
#[inline]
pub fn append_u64(out: &mut Vec<u8>, mut n: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn append_raw(out: &mut Vec<u8>, key: &[u8], value: Option<Raw<'_>>) {
    if let Some(raw) = value {
        out.extend_from_slice(key);
        out.extend_from_slice(raw.text().as_bytes());
    }
}

/// Appends a frame that ends with a body: as a field, as an attachment, or as base64 if the
/// receiver takes no attachments.
#[inline]
fn with_body(
    out: &mut Vec<u8>,
    body: Body<'_>,
    field: &[u8],
    attachments: Attachments,
    head: impl FnOnce(&mut Vec<u8>),
) {
    match (body, attachments) {
        (Body::Bytes(bytes), Attachments::Taken) => frame::append_attachment(out, bytes, |out| {
            head(out);
            out.push(b'}');
        }),
        _ => frame::append(out, |out| {
            head(out);
            match body {
                Body::None => {}
                Body::Json(raw) => {
                    out.extend_from_slice(field);
                    out.extend_from_slice(raw.text().as_bytes());
                }
                Body::Bytes(bytes) => {
                    out.extend_from_slice(b",\"encoding\":\"base64\"");
                    out.extend_from_slice(field);
                    append_base64(out, bytes);
                }
            }
            out.push(b'}');
        }),
    }
}

/// Who sent a call or an emit, as the server knows it.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// The AppID.
    pub app_id: &'a str,
    /// The instance.
    pub instance: InstanceId,
}

impl Origin<'_> {
    fn append(self, out: &mut Vec<u8>) {
        out.extend_from_slice(b",\"origin\":{\"app_id\":\"");
        out.extend_from_slice(self.app_id.as_bytes());
        out.extend_from_slice(b"\",\"instance\":\"");
        self.instance.append(out);
        out.extend_from_slice(b"\"}");
    }
}

/// A call that is sent to its handler.
#[derive(Debug, Clone, Copy)]
pub struct Delivery<'a> {
    /// The id that the handler's answer must name.
    pub call: CallId,
    /// The trigger.
    pub process: &'a str,
    /// The pool.
    pub pool: &'a str,
    /// The caller.
    pub origin: Origin<'a>,
    /// The remaining time to live, in milliseconds.
    pub ttl_ms: u64,
    /// The number of this attempt, for a call that may be delivered more than once.
    pub attempt: Option<u32>,
    /// The window of a streamed call, in items.
    pub window: Option<u64>,
    /// The caller's `key`.
    pub key: Option<&'a str>,
    /// The caller's `destination`.
    pub destination: Option<Raw<'a>>,
    /// Descriptions of the blocks that are passed with it, as a JSON array, and the number of file
    /// descriptors that are sent with them.
    pub blocks: Option<(&'a str, usize)>,
    /// Headers.
    pub headers: Option<Raw<'a>>,
    /// The payload.
    pub body: Body<'a>,
}

/// Appends a call for its handler.
#[inline]
pub fn delivery(out: &mut Vec<u8>, d: &Delivery<'_>, attachments: Attachments) {
    with_body(out, d.body, b",\"data\":", attachments, |out| {
        out.extend_from_slice(b"{\"action\":\"trigger\",\"id\":\"");
        d.call.append(out);
        out.extend_from_slice(b"\",\"process\":\"");
        out.extend_from_slice(d.process.as_bytes());
        out.extend_from_slice(b"\",\"pool\":\"");
        out.extend_from_slice(d.pool.as_bytes());
        out.push(b'"');
        d.origin.append(out);
        out.extend_from_slice(b",\"ttl\":");
        append_u64(out, d.ttl_ms);
        if let Some(attempt) = d.attempt {
            out.extend_from_slice(b",\"attempt\":");
            append_u64(out, attempt.into());
        }
        if let Some(window) = d.window {
            out.extend_from_slice(b",\"window\":");
            append_u64(out, window);
        }
        if let Some(key) = d.key {
            out.extend_from_slice(b",\"key\":");
            append_str(out, key);
        }
        append_raw(out, b",\"destination\":", d.destination);
        append_raw(out, b",\"headers\":", d.headers);
        if let Some((blocks, descriptors)) = d.blocks {
            append_descriptors(out, descriptors);
            out.extend_from_slice(b",\"blocks\":");
            out.extend_from_slice(blocks.as_bytes());
        }
    });
}

fn append_descriptors(out: &mut Vec<u8>, descriptors: usize) {
    if descriptors > 0 {
        out.extend_from_slice(b",\"descriptors\":");
        append_u64(out, descriptors as u64);
    }
}

/// An emit that is sent to a handler.
#[derive(Debug, Clone, Copy)]
pub struct Notice<'a> {
    /// The trigger.
    pub process: &'a str,
    /// The pool.
    pub pool: &'a str,
    /// The sender.
    pub origin: Origin<'a>,
    /// The sender's `destination`.
    pub destination: Option<Raw<'a>>,
    /// Headers.
    pub headers: Option<Raw<'a>>,
    /// The payload.
    pub body: Body<'a>,
}

/// Appends an emit for a handler.
pub fn notice(out: &mut Vec<u8>, n: &Notice<'_>, attachments: Attachments) {
    with_body(out, n.body, b",\"data\":", attachments, |out| {
        out.extend_from_slice(b"{\"action\":\"emit\",\"process\":\"");
        out.extend_from_slice(n.process.as_bytes());
        out.extend_from_slice(b"\",\"pool\":\"");
        out.extend_from_slice(n.pool.as_bytes());
        out.push(b'"');
        n.origin.append(out);
        append_raw(out, b",\"destination\":", n.destination);
        append_raw(out, b",\"headers\":", n.headers);
    });
}

/// A response that is sent to the caller.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The caller's id.
    pub in_reply_to: &'a str,
    /// The pool of the call, where its id alone may not tell: ids are unique in a pool.
    pub pool: Option<&'a str>,
    /// What it says about the call.
    pub status: Status,
    /// The handler's error object.
    pub error: Option<Raw<'a>>,
    /// Headers.
    pub headers: Option<Raw<'a>>,
    /// The payload.
    pub body: Body<'a>,
}

/// Appends a handler's answer, for its caller.
#[inline]
pub fn answer(out: &mut Vec<u8>, a: &Answer<'_>, attachments: Attachments) {
    with_body(out, a.body, b",\"response\":", attachments, |out| {
        out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
        append_str(out, a.in_reply_to);
        if let Some(pool) = a.pool {
            out.extend_from_slice(b",\"pool\":");
            append_str(out, pool);
        }
        out.extend_from_slice(b",\"status\":\"");
        out.extend_from_slice(a.status.as_str().as_bytes());
        out.push(b'"');
        match (a.status, a.error) {
            (Status::Error, None) => out.extend_from_slice(
                b",\"error\":{\"code\":\"handler_error\",\"message\":\"the handler failed \
                    without giving a reason\",\"ran\":\"unknown\"}",
            ),
            (_, error) => append_raw(out, b",\"error\":", error),
        }
        append_raw(out, b",\"headers\":", a.headers);
    });
}

/// Appends the server's own reply; `response` is JSON text.
pub fn reply(out: &mut Vec<u8>, in_reply_to: &str, response: &str) {
    reply_with(out, in_reply_to, response, 0);
}

/// Appends the notice that a call is parked: it is on disk, and its answer comes later.
pub fn parked(out: &mut Vec<u8>, in_reply_to: &str) {
    frame::append(out, |out| {
        out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
        append_str(out, in_reply_to);
        out.extend_from_slice(b",\"status\":\"parked\"}");
    });
}

/// Appends the server's own reply, with which `descriptors` file descriptors are sent.
pub fn reply_with(out: &mut Vec<u8>, in_reply_to: &str, response: &str, descriptors: usize) {
    frame::append(out, |out| {
        append_reply(out, in_reply_to, response, descriptors)
    });
}

fn append_reply(out: &mut Vec<u8>, in_reply_to: &str, response: &str, descriptors: usize) {
    out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
    append_str(out, in_reply_to);
    out.extend_from_slice(b",\"status\":\"ok\"");
    append_descriptors(out, descriptors);
    out.extend_from_slice(b",\"response\":");
    out.extend_from_slice(response.as_bytes());
    out.push(b'}');
}

/// Appends the reply with a block's bytes: as an attachment if the receiver takes attachments, else
/// as base64 in its `data`.
pub fn block_bytes(
    out: &mut Vec<u8>,
    in_reply_to: &str,
    (version, generation): (u64, u64),
    bytes: &[u8],
    attachments: Attachments,
) {
    let response = format!("{{\"version\":{version},\"generation\":{generation}}}");
    if attachments == Attachments::Taken {
        frame::append_attachment(out, bytes, |out| {
            append_reply(out, in_reply_to, &response, 0);
        });
        return;
    }
    frame::append(out, |out| {
        append_reply(out, in_reply_to, &response, 0);
        // Into the response's object, whose end and the message's are the last two bytes.
        out.truncate(out.len() - 2);
        out.extend_from_slice(b",\"data\":");
        append_base64(out, bytes);
        out.extend_from_slice(b"}}");
    });
}

/// Appends `bytes` as a JSON string of base64 text.
pub fn append_base64(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    base64::engine::general_purpose::STANDARD
        .encode_slice(bytes, &mut out[start..])
        .expect("the space was just reserved");
    out.push(b'"');
}

/// Appends a refusal: as the reply to `in_reply_to`, or as an `error` message if it answers no
/// request.
pub fn refusal(out: &mut Vec<u8>, in_reply_to: Option<&str>, refusal: &Refusal) {
    frame::append(out, |out| {
        match in_reply_to {
            Some(id) => {
                out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
                append_str(out, id);
                out.extend_from_slice(b",\"status\":\"error\",\"error\":{\"code\":\"");
            }
            None => out.extend_from_slice(b"{\"action\":\"error\",\"error\":{\"code\":\""),
        }
        out.extend_from_slice(refusal.code.as_str().as_bytes());
        out.extend_from_slice(b"\",\"message\":");
        append_str(out, &refusal.message);
        if in_reply_to.is_some() {
            out.extend_from_slice(b",\"ran\":\"");
            out.extend_from_slice(refusal.ran().as_str().as_bytes());
            out.push(b'"');
        }
        out.extend_from_slice(b"}}");
    });
}

/// Appends a `cancel` for the handler of a call.
pub fn cancel(out: &mut Vec<u8>, call: CallId, code: &str) {
    frame::append(out, |out| {
        out.extend_from_slice(b"{\"action\":\"cancel\",\"id\":\"");
        call.append(out);
        out.extend_from_slice(b"\",\"reason\":\"");
        out.extend_from_slice(code.as_bytes());
        out.extend_from_slice(b"\"}");
    });
}

/// Appends an `ack` for the handler of a streamed call.
pub fn ack(out: &mut Vec<u8>, call: CallId, count: u64) {
    frame::append(out, |out| {
        out.extend_from_slice(b"{\"action\":\"ack\",\"id\":\"");
        call.append(out);
        out.extend_from_slice(b"\",\"count\":");
        append_u64(out, count);
        out.push(b'}');
    });
}

/// Appends any other message; `json` is its text, an object.
pub fn message(out: &mut Vec<u8>, json: &str) {
    frame::append(out, |out| out.extend_from_slice(json.as_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use crate::frame::{Accept, decode};

    const ACCEPT: Accept = Accept {
        max_frame: 1 << 20,
        attachments: true,
    };

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> (String, Option<Vec<u8>>) {
        let mut out = Vec::new();
        write(&mut out);
        let (frame, used) = decode(&out, ACCEPT).unwrap().unwrap();
        assert_eq!(used, out.len());
        let text = String::from_utf8(frame.json.to_vec()).unwrap();
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        (text, frame.attachment.map(<[u8]>::to_vec))
    }

    #[test]
    fn messages() {
        let call = CallId {
            epoch: 9,
            pool: 1,
            slot: 2,
            generation: 3,
        };
        let origin = Origin {
            app_id: "me",
            instance: InstanceId(7),
        };
        let mut d = Delivery {
            call,
            process: "foo",
            pool: "alpha",
            origin,
            ttl_ms: 99,
            attempt: None,
            window: Some(4),
            key: Some("k\""),
            destination: None,
            blocks: None,
            headers: Some(Raw::new("{\"a\":\"b\"}").unwrap()),
            body: Body::Json(Raw::new("{\"x\":42}").unwrap()),
        };
        assert_eq!(
            written(|out| delivery(out, &d, Attachments::Taken)).0,
            r#"{"action":"trigger","id":"9.1.2.3","process":"foo","pool":"alpha","origin":{"app_id":"me","instance":"0000000000000007"},"ttl":99,"window":4,"key":"k\"","headers":{"a":"b"},"data":{"x":42}}"#
        );
        d.body = Body::Bytes(b"\x00\xff");
        let (text, raw) = written(|out| delivery(out, &d, Attachments::Taken));
        assert!(!text.contains("data") && raw.as_deref() == Some(b"\x00\xff"));
        let (text, raw) = written(|out| delivery(out, &d, Attachments::NotTaken));
        assert!(
            text.ends_with(r#""encoding":"base64","data":"AP8="}"#) && raw.is_none(),
            "{text}"
        );
        d.blocks = Some(("[{}]", 1));
        let (text, _) = written(|out| delivery(out, &d, Attachments::Taken));
        assert!(
            text.ends_with(r#","descriptors":1,"blocks":[{}]}"#),
            "{text}"
        );
        let bytes =
            |attachments| written(|out| block_bytes(out, "i", (2, 1), b"\x00\xff", attachments));
        assert_eq!(
            bytes(Attachments::NotTaken).0,
            r#"{"action":"response","in_reply_to":"i","status":"ok","response":{"version":2,"generation":1,"data":"AP8="}}"#
        );
        let (text, raw) = bytes(Attachments::Taken);
        assert!(
            text.ends_with(r#""response":{"version":2,"generation":1}}"#),
            "{text}"
        );
        assert_eq!(raw.as_deref(), Some(&b"\x00\xff"[..]));
        let refused = Refusal::new(Code::Timeout, "too \u{1} late");
        assert_eq!(
            written(|out| refusal(out, Some("i"), &refused)).0,
            r#"{"action":"response","in_reply_to":"i","status":"error","error":{"code":"timeout","message":"too \u0001 late","ran":"unknown"}}"#
        );
        assert_eq!(
            written(|out| refusal(out, None, &refused)).0,
            r#"{"action":"error","error":{"code":"timeout","message":"too \u0001 late"}}"#
        );
        assert_eq!(
            written(|out| ack(out, call, 10)).0,
            r#"{"action":"ack","id":"9.1.2.3","count":10}"#
        );
        assert_eq!(
            written(|out| cancel(out, call, "timeout")).0,
            r#"{"action":"cancel","id":"9.1.2.3","reason":"timeout"}"#
        );
    }
}
