//! The fuzz targets: each accepts any bytes, and panics if a property is violated.
//!
//! They are here and not in `fuzz/`, which needs a fuzzer's compiler flags, so that the ordinary
//! tests can replay the corpus (`fuzz/corpus/<target>/`) with a stable compiler.

mod backup;
mod crypto;
mod header;
mod rows;
mod session;

use std::path::Path;

use latzero_fabric::Limits;
use latzero_protocol::frame::{self, Accept};
use latzero_protocol::{Ahead, Envelope, Frame, FrameError, Request, scan};
use latzero_server::settings;
use serde::de::IgnoredAny;
use serde_json::Value;

pub use backup::backup;
pub use crypto::{descriptor, envelope, manifest, proof, tokens};
pub use header::header;
pub use rows::rows;
pub use session::session;

/// The decoded frames, and the error that ended them.
type Decoded = (Vec<(Vec<u8>, Option<Vec<u8>>)>, Option<FrameError>);

/// The frame decoder: the result is the same however the bytes are split. The first byte chooses
/// the accepted frames.
///
/// # Panics
/// If it is not.
pub fn frame(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    let accept = Accept {
        max_frame: if choice & 2 == 0 { 64 } else { 16 << 20 },
        attachments: choice & 1 == 1,
    };
    let whole = decode([bytes], accept);
    assert_eq!(decode(bytes.chunks(1), accept), whole, "byte by byte");
    // Every split of a short input, and evenly spread splits of a long one.
    for cut in (0..=bytes.len()).step_by(1 + bytes.len() / 512) {
        let (head, tail) = bytes.split_at(cut);
        assert_eq!(decode([head, tail], accept), whole, "split at {cut}");
    }
}

/// Decodes bytes that arrive in parts.
fn decode<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, accept: Accept) -> Decoded {
    let (mut buffer, mut frames) = (Vec::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match frame::decode(&buffer, accept) {
                Ok(Some((Frame { json, attachment }, used))) => {
                    assert_eq!(frame::length(&buffer, accept), Ok(Some(used)));
                    frames.push((json.to_vec(), attachment.map(<[u8]>::to_vec)));
                    buffer.drain(..used);
                }
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// Messages: no bytes make the envelope or the decoder panic, and the scanner accepts exactly JSON.
///
/// # Panics
/// If that is not true.
pub fn message(data: &[u8]) {
    for attachment in [None, Some(&data[data.len() / 2..])] {
        let envelope = Envelope::parse(Frame {
            json: data,
            attachment,
        });
        match envelope {
            Ok(Ok(envelope)) => {
                let _ = envelope.correlation_id();
                if let Err(refusal) = Request::decode(&envelope, &Limits::default().lists()) {
                    assert!(!refusal.message.is_empty());
                }
            }
            // Even if it is refused as a message, it is JSON.
            Ok(Err(_)) => assert!(serde_json::from_slice::<IgnoredAny>(data).is_ok()),
            Err(refusal) => assert!(refusal.message.len() < 512),
        }
    }
    let frame = Frame {
        json: data,
        attachment: None,
    };
    let mut ahead = Ahead::default();
    while !ahead.step(data, 1 + data.len() % 13) {}
    let scanned = Envelope::parse_scanned(frame, Some(&ahead)).map(|envelope| envelope.is_ok());
    let plain = Envelope::parse(frame).map(|envelope| envelope.is_ok());
    let (scanned, plain) = (scanned.map_err(|r| r.code), plain.map_err(|r| r.code));
    assert_eq!(scanned, plain, "in slices");
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let is_json = scan::value(text).is_ok();
    match serde_json::from_str::<Value>(text) {
        // It has fewer than the 128 levels that data may have.
        Ok(_) => assert!(is_json, "the scanner refuses JSON: {:?}", scan::value(text)),
        // Numbers are forwarded as text, even if they would overflow, and so is half a surrogate
        // pair.
        Err(error)
            if [
                "number out of range",
                "surrogate",
                "end of hex escape",
                "recursion limit",
            ]
            .iter()
            .any(|known| error.to_string().contains(known)) => {}
        Err(error) => assert!(!is_json, "the scanner accepts invalid JSON: {error}"),
    }
}

/// Settings files: no input makes the parser panic, and each error has a position.
///
/// # Panics
/// If that is not true.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Err(errors) = settings::parse_file(Path::new("config.toml"), &text) {
        assert!(!errors.errors().is_empty(), "refused without a reason");
        let lines = text.lines().count() + 1;
        for error in errors.errors() {
            assert!(error.to_string().contains("config.toml"), "{error}");
            if let Some(at) = &error.at {
                assert!(at.line >= 1 && at.line <= lines, "{error}");
            }
        }
    }
}
