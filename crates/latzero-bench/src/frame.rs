//! The bytes on the wire, the same for every peer that uses frames.
//!
//! `[u32 length, big-endian][JSON]`, with the fields of a call and its response. The byte relay
//! carries the same bytes without parsing them, so the difference is the work, not the size.

use crate::failure::Failure;
use std::io::{self, Read};

/// The data of every call and every response: 64 bytes of JSON.
pub(crate) const PAYLOAD: &str =
    r#"{"x":42,"text":"sixty-four bytes, quotes and braces counted in"}"#;
const _: () = assert!(PAYLOAD.len() == 64);

/// The name of the handler's trigger.
pub(crate) const PROCESS: &str = "echo";

/// Ids count up from here, so all ids of a run have the same length.
pub(crate) const FIRST_ID: u64 = 1_000_000;

/// Bytes read from a socket at once, as in the server under test.
pub(crate) const READ_BYTES_MAX: usize = 256 * 1024;

/// Frames here are below 300 bytes; a longer one is a bug in a contestant.
const FRAME_BYTES_MAX: usize = 4 * 1024;

const HEADER_BYTES: usize = 4;

/// Appends one frame whose JSON is what `append_body` appends.
pub(crate) fn append_frame(out: &mut Vec<u8>, append_body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    append_body(out);
    let length = u32::try_from(out.len() - start - HEADER_BYTES).expect("frames are short");
    out[start..start + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
}

/// Appends a call as its caller sends it.
pub(crate) fn append_call(out: &mut Vec<u8>, id: u64) {
    append_forwarded_call(out, id, PROCESS, "bench", 30_000, PAYLOAD);
}

/// Appends a call as the server forwards it.
pub(crate) fn append_forwarded_call(
    out: &mut Vec<u8>,
    id: u64,
    process: &str,
    pool: &str,
    ttl_ms: u64,
    data: &str,
) {
    append_frame(out, |out| {
        out.extend_from_slice(br#"{"action":"trigger","id":""#);
        append_decimal(out, id);
        out.extend_from_slice(br#"","process":""#);
        out.extend_from_slice(process.as_bytes());
        out.extend_from_slice(br#"","pool":""#);
        out.extend_from_slice(pool.as_bytes());
        out.extend_from_slice(br#"","ttl":"#);
        append_decimal(out, ttl_ms);
        out.extend_from_slice(br#","data":"#);
        out.extend_from_slice(data.as_bytes());
        out.push(b'}');
    });
}

/// Appends the response to the call `id`.
pub(crate) fn append_response(out: &mut Vec<u8>, id: &str, status: &str, response: &str) {
    append_frame(out, |out| {
        out.extend_from_slice(br#"{"action":"response","in_reply_to":""#);
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(br#"","status":""#);
        out.extend_from_slice(status.as_bytes());
        out.extend_from_slice(br#"","response":"#);
        out.extend_from_slice(response.as_bytes());
        out.push(b'}');
    });
}

/// Appends `number` as text. The formatting machinery would be a visible part of a relay's work.
fn append_decimal(out: &mut Vec<u8>, mut number: u64) {
    let start = out.len();
    loop {
        let digit = u8::try_from(number % 10).expect("a digit fits into a byte");
        out.push(b'0' + digit);
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out[start..].reverse();
}

/// Bytes that were read from one socket and not yet used.
pub(crate) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![0; READ_BYTES_MAX].into(),
            start: 0,
            end: 0,
        }
    }

    /// Reads once, up to the free space of the buffer. `Ok(0)` is the end of the stream.
    pub(crate) fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let read = from.read(&mut self.bytes[self.end..])?;
        self.end += read;
        Ok(read)
    }

    /// Whether the last read filled the buffer, so the socket may have more.
    pub(crate) fn is_full(&self) -> bool {
        self.end == self.bytes.len()
    }

    /// The body of the next complete frame, if there is one.
    pub(crate) fn next_frame(&mut self) -> Result<Option<&[u8]>, Failure> {
        let unused = &self.bytes[self.start..self.end];
        let Some((header, rest)) = unused.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(Failure::said(format!(
                "a frame of {length} bytes, {FRAME_BYTES_MAX} at most"
            )));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        self.start += HEADER_BYTES + length;
        Ok(Some(body))
    }

    /// All unused bytes, complete frames or not.
    pub(crate) fn take_all(&mut self) -> &[u8] {
        let unused = self.start..self.end;
        self.start = self.end;
        &self.bytes[unused]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_split_at_every_byte_is_one_frame() {
        let mut bytes = Vec::new();
        append_call(&mut bytes, FIRST_ID);
        for cut in 0..bytes.len() {
            let mut input = Input::new();
            let (mut first, mut second) = bytes.split_at(cut);
            input.fill(&mut first).unwrap();
            assert_eq!(input.next_frame().unwrap(), None, "cut at {cut}");
            input.fill(&mut second).unwrap();
            assert_eq!(input.next_frame().unwrap(), Some(&bytes[HEADER_BYTES..]));
            assert_eq!(input.next_frame().unwrap(), None);
        }
    }

    #[test]
    fn an_endless_frame_is_refused() {
        let mut input = Input::new();
        input.fill(&mut &b"GET / HTTP/1.1\r\n"[..]).unwrap();
        assert!(input.next_frame().is_err());
    }

    #[test]
    fn decimals() {
        for number in [0, 7, 10, 30_000, FIRST_ID, u64::MAX] {
            let mut out = Vec::new();
            append_decimal(&mut out, number);
            assert_eq!(out, number.to_string().as_bytes());
        }
    }

    #[test]
    fn frames_are_json_of_the_agreed_size() {
        let mut call = Vec::new();
        append_call(&mut call, FIRST_ID);
        let mut response = Vec::new();
        append_response(&mut response, "1000000", "ok", PAYLOAD);
        for frame in [call, response] {
            assert!((120..=200).contains(&frame.len()), "{} bytes", frame.len());
            serde_json::from_slice::<serde_json::Value>(&frame[HEADER_BYTES..]).unwrap();
        }
    }
}
