//! An answer stored for a caller that is offline, or for a repeat of its call.

use latzero_protocol::frame::Frame;
use latzero_protocol::message::{Response, Status};
use latzero_protocol::{Body, Envelope, Raw, Refusal};

/// An answer that owns its parts.
#[derive(Clone)]
pub(super) struct Answered {
    pub(super) status: Status,
    pub(super) error: Option<Box<str>>,
    pub(super) headers: Option<Box<str>>,
    json: Option<Box<str>>,
    raw: Option<Box<[u8]>>,
}

impl Answered {
    pub(super) fn of(response: &Response<'_>) -> Answered {
        let own = |raw: Option<Raw<'_>>| raw.map(|raw| raw.text().into());
        Answered {
            status: response.status,
            error: own(response.error),
            headers: own(response.headers),
            json: match response.body {
                Body::Json(json) => Some(json.text().into()),
                _ => None,
            },
            raw: match response.body {
                Body::Bytes(bytes) => Some(bytes.into()),
                _ => None,
            },
        }
    }

    pub(super) fn refused(refusal: &Refusal) -> Answered {
        let error = serde_json::json!({
            "code": refusal.code.as_str(), "message": refusal.message,
            "ran": refusal.ran().as_str(),
        });
        Answered {
            status: Status::Error,
            error: Some(error.to_string().into()),
            headers: None,
            json: None,
            raw: None,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let text = |text: &Option<Box<str>>| text.as_ref().map_or(0, |text| text.len());
        text(&self.error)
            + text(&self.headers)
            + text(&self.json)
            + self.raw.as_ref().map_or(0, |raw| raw.len())
            + 256
    }

    pub(super) fn body(&self) -> Body<'_> {
        match (&self.json, &self.raw) {
            (Some(json), _) => Body::Json(checked(json)),
            (None, Some(raw)) => Body::Bytes(raw),
            (None, None) => Body::None,
        }
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let mut text = format!("{{\"status\":\"{}\"", self.status.as_str());
        for (name, value) in [
            ("error", &self.error),
            ("headers", &self.headers),
            ("response", &self.json),
        ] {
            if let Some(value) = value {
                text.push_str(&format!(",\"{name}\":{value}"));
            }
        }
        text.push('}');
        let length = u32::try_from(text.len()).expect("a frame is smaller");
        let mut frame = length.to_le_bytes().to_vec();
        frame.extend_from_slice(text.as_bytes());
        frame.extend_from_slice(self.raw.as_deref().unwrap_or_default());
        frame
    }

    /// Reads what [`Answered::frame`] wrote.
    pub(super) fn read(frame: &[u8]) -> Option<Answered> {
        let (length, rest) = frame.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (json, raw) = rest.split_at_checked(length)?;
        let envelope = Envelope::parse(Frame {
            json,
            attachment: None,
        });
        let envelope = envelope.ok()?.ok()?;
        let own = |raw: Option<Raw<'_>>| raw.map(|raw| raw.text().into());
        Some(Answered {
            status: Status::parse(&envelope.status?.as_str()?)?,
            error: own(envelope.error),
            headers: own(envelope.headers),
            json: own(envelope.response),
            raw: (!raw.is_empty()).then(|| raw.into()),
        })
    }
}

pub(super) fn checked(text: &str) -> Raw<'_> {
    Raw::new(text).expect("it was checked on arrival")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_round_trips() {
        for (json, raw) in [
            (Some("{\"a\": 1.50}"), None),
            (None, Some(&[0u8, 255][..])),
            (None, None),
        ] {
            let answer = Answered {
                status: Status::Ok,
                error: None,
                headers: Some("{\"h\":\"v\"}".into()),
                json: json.map(Into::into),
                raw: raw.map(Into::into),
            };
            let read = Answered::read(&answer.frame()).unwrap();
            assert_eq!(read.json.as_deref(), json);
            assert_eq!(read.raw.as_deref(), raw);
            assert_eq!(read.headers.as_deref(), Some("{\"h\":\"v\"}"));
        }
        for senseless in [
            &b""[..],
            b"\xff\xff\xff\xff{}",
            b"\x02\0\0\0{}",
            b"\x01\0\0\0{",
        ] {
            assert!(Answered::read(senseless).is_none());
        }
    }
}
