//! Frames: a big-endian length and one JSON object, or with an attachment a JSON header and raw
//! bytes.
//!
//! ```text
//! [u32 length][JSON object]
//! [u32 length | 1 << 31][u32 header length][JSON object][raw bytes]
//! ```

use crate::error::{Code, Refusal};

/// Bytes of the length prefix.
pub const PREFIX: usize = 4;

/// The length in bytes of the frame at the start of `buf`, including its prefix, if `buf` has the
/// prefix.
#[must_use]
pub fn announced(buf: &[u8]) -> usize {
    let Some(&prefix) = buf.first_chunk::<PREFIX>() else {
        return PREFIX;
    };
    let length = u32::from_be_bytes(prefix) & !ATTACHMENT_BIT;
    PREFIX + usize::try_from(length).unwrap_or(usize::MAX - PREFIX)
}

/// The bit of the length that marks an attachment frame.
pub const ATTACHMENT_BIT: u32 = 1 << 31;

/// One frame in the receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The JSON object, not yet checked.
    pub json: &'a [u8],
    /// The raw bytes of an attachment frame.
    pub attachment: Option<&'a [u8]>,
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A length of 0.
    #[error("a frame of length 0; every frame carries one JSON object")]
    Empty,
    /// More bytes announced than allowed.
    #[error("the frame has {announced} bytes; the maximum is {max}{}", hint(*.announced))]
    TooLarge {
        /// The length in the prefix, in bytes, including the attachment bit if it was set.
        announced: u64,
        /// The largest payload allowed, in bytes.
        max: usize,
    },
    /// An attachment frame whose header does not fit inside it.
    #[error(
        "an attachment frame's header length ({header} bytes) does not fit its payload \
         ({payload} bytes)"
    )]
    Header {
        /// The header length that was named, in bytes.
        header: u64,
        /// The payload's length in bytes.
        payload: usize,
    },
}

impl FrameError {
    /// Where the next frame begins, in bytes from the start of this one, if its length can be
    /// trusted.
    #[must_use]
    pub fn skips(self) -> Option<usize> {
        match self {
            FrameError::Empty => Some(PREFIX),
            FrameError::Header { payload, .. } => Some(PREFIX + payload),
            FrameError::TooLarge { .. } => None,
        }
    }
}

/// A hint if the first four bytes look like another protocol.
fn hint(announced: u64) -> &'static str {
    match u32::try_from(announced).unwrap_or(0).to_be_bytes() {
        [0x16, 0x03, ..] => "; this looks like TLS, which is not enabled on this port",
        [b'G', b'E', b'T', b' ']
        | [b'P', b'O', b'S', b'T']
        | [b'H', b'E', b'A', b'D']
        | [b'P', b'U', b'T', b' ']
        | [b'O', b'P', b'T', b'I']
        | [b'H', b'T', b'T', b'P'] => "; this looks like HTTP, not like LatZero's protocol",
        _ => "",
    }
}

impl From<FrameError> for Refusal {
    fn from(error: FrameError) -> Self {
        let code = match error {
            FrameError::Empty | FrameError::Header { .. } => Code::BadFrame,
            FrameError::TooLarge { .. } => Code::FrameTooLarge,
        };
        Refusal::new(code, error.to_string())
    }
}

/// What a receiver accepts at this point of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Accept {
    /// Largest payload in bytes.
    pub max_frame: usize,
    /// Whether both sides named the feature `attachments`.
    pub attachments: bool,
}

/// The total length in bytes of the frame that starts `buf`, its prefix included; `None` if the
/// prefix is not complete yet.
///
/// # Errors
/// As soon as the prefix shows that the frame is empty or too large, whatever else has arrived.
pub fn length(buf: &[u8], accept: Accept) -> Result<Option<usize>, FrameError> {
    let Some(prefix) = buf.first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    let announced = u32::from_be_bytes(*prefix);
    let is_attachment = accept.attachments && announced & ATTACHMENT_BIT != 0;
    let payload = if is_attachment {
        announced & !ATTACHMENT_BIT
    } else {
        announced
    } as usize;
    if payload == 0 {
        return Err(FrameError::Empty);
    }
    if payload > accept.max_frame {
        return Err(FrameError::TooLarge {
            announced: u64::from(announced),
            max: accept.max_frame,
        });
    }
    Ok(Some(PREFIX + payload))
}

/// Takes the first frame of `buf`, with its total length in bytes; `None` if more bytes are
/// needed.
///
/// # Errors
/// As [`length`], and if an attachment frame's header does not fit inside it.
#[inline]
pub fn decode(buf: &[u8], accept: Accept) -> Result<Option<(Frame<'_>, usize)>, FrameError> {
    let Some(total) = length(buf, accept)? else {
        return Ok(None);
    };
    let Some(payload) = buf.get(PREFIX..total) else {
        return Ok(None);
    };
    let is_attachment = accept.attachments && buf[0] & 0x80 != 0;
    if !is_attachment {
        return Ok(Some((
            Frame {
                json: payload,
                attachment: None,
            },
            total,
        )));
    }
    let Some((prefix, rest)) = payload.split_first_chunk::<PREFIX>() else {
        return Err(FrameError::Header {
            header: 0,
            payload: payload.len(),
        });
    };
    let header = u32::from_be_bytes(*prefix);
    match rest.split_at_checked(header as usize) {
        Some((json, raw)) if header > 0 => Ok(Some((
            Frame {
                json,
                attachment: Some(raw),
            },
            total,
        ))),
        _ => Err(FrameError::Header {
            header: u64::from(header),
            payload: payload.len(),
        }),
    }
}

/// Appends a frame to `out` whose JSON is what `write` appends.
#[inline]
pub fn append(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; PREFIX]);
    write(out);
    let length = u32::try_from(out.len() - start - PREFIX).expect("a frame is smaller than 4 GiB");
    out[start..start + PREFIX].copy_from_slice(&length.to_be_bytes());
}

/// Appends an attachment frame to `out` whose JSON header is what `write` appends.
pub fn append_attachment(out: &mut Vec<u8>, raw: &[u8], write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 2 * PREFIX]);
    write(out);
    let header =
        u32::try_from(out.len() - start - 2 * PREFIX).expect("a frame is smaller than 4 GiB");
    out.extend_from_slice(raw);
    let length = u32::try_from(out.len() - start - PREFIX).expect("a frame is smaller than 4 GiB");
    out[start..start + PREFIX].copy_from_slice(&(length | ATTACHMENT_BIT).to_be_bytes());
    out[start + PREFIX..start + 2 * PREFIX].copy_from_slice(&header.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ACCEPT: Accept = Accept {
        max_frame: 1000,
        attachments: true,
    };

    #[test]
    fn frames_read_back() {
        let mut buf = Vec::new();
        append(&mut buf, |out| out.extend_from_slice(b"{}"));
        append_attachment(&mut buf, b"raw", |out| out.extend_from_slice(b"{\"a\":1}"));
        let (first, used) = decode(&buf, ACCEPT).unwrap().unwrap();
        assert_eq!(
            first,
            Frame {
                json: b"{}",
                attachment: None
            }
        );
        let (second, rest) = decode(&buf[used..], ACCEPT).unwrap().unwrap();
        assert_eq!(
            second,
            Frame {
                json: b"{\"a\":1}",
                attachment: Some(b"raw")
            }
        );
        assert_eq!(used + rest, buf.len());
    }

    #[test]
    fn bad_frames_are_refused_by_their_prefix() {
        assert_eq!(decode(&[0, 0, 0, 0], ACCEPT), Err(FrameError::Empty));
        assert_eq!(decode(&[0x80, 0, 0, 0], ACCEPT), Err(FrameError::Empty));
        let too_large = |b: &[u8]| Refusal::from(decode(b, ACCEPT).unwrap_err());
        assert_eq!(too_large(&[0, 0, 3, 0xe9]).code, Code::FrameTooLarge);
        assert!(
            too_large(b"GET / HTTP/1.1")
                .message
                .contains("looks like HTTP")
        );
        assert!(
            too_large(&[0x16, 3, 1, 2])
                .message
                .contains("looks like TLS")
        );
        // Without the feature the bit is part of the length.
        let plain = Accept {
            attachments: false,
            ..ACCEPT
        };
        assert!(matches!(
            decode(&[0x80, 0, 0, 1], plain),
            Err(FrameError::TooLarge { .. })
        ));
        // Headers that do not fit.
        for bad in [
            &[0x80, 0, 0, 3, 0, 0, 0][..],
            &[0x80, 0, 0, 4, 0, 0, 0, 0],
            &[0x80, 0, 0, 5, 0, 0, 0, 9, 1],
        ] {
            assert!(
                matches!(decode(bad, ACCEPT), Err(FrameError::Header { .. })),
                "{bad:?}"
            );
        }
    }

    proptest! {
        /// However bytes arrive, a prefix of a frame is never an error and never a frame.
        #[test]
    fn split_anywhere(
            json in proptest::collection::vec(any::<u8>(), 1..80),
            raw in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..80)),
        ) {
            let mut buf = Vec::new();
            match &raw {
                None => append(&mut buf, |out| out.extend_from_slice(&json)),
                Some(raw) => append_attachment(&mut buf, raw, |out| out.extend_from_slice(&json)),
            }
            for cut in 0..buf.len() {
                prop_assert_eq!(decode(&buf[..cut], ACCEPT), Ok(None));
            }
            let (frame, used) = decode(&buf, ACCEPT).unwrap().unwrap();
            prop_assert_eq!(frame, Frame { json: &json, attachment: raw.as_deref() });
            prop_assert_eq!(used, buf.len());
        }
    }
}
