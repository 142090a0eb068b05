//! What calls, emits and answers carry: JSON values or raw bytes.

use std::borrow::Cow;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use base64::Engine as _;
use latzero_protocol::{Code, Envelope, Raw};

use crate::error::Error;

/// Raw bytes as a payload: they travel as they are, beside the JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

/// A payload on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Nothing.
    None,
    /// One JSON value.
    Json(Vec<u8>),
    /// Raw bytes.
    Bytes(Vec<u8>),
}

impl Payload {
    /// Copies the body of a received message.
    pub(crate) fn received(envelope: &Envelope<'_>, field: Option<Raw<'_>>) -> Payload {
        match (field, envelope.attachment) {
            (_, Some(bytes)) => Payload::Bytes(bytes.to_vec()),
            (Some(raw), None) => {
                // A peer without attachments writes raw bytes as base64 text, and says so.
                let is_base64 = envelope.encoding.is_some_and(|e| e.text() == "\"base64\"");
                if let Some(text) = is_base64.then(|| raw.as_str()).flatten()
                    && let Ok(bytes) = base64::engine::general_purpose::STANDARD.decode(&*text)
                {
                    return Payload::Bytes(bytes);
                }
                Payload::Json(raw.text().as_bytes().to_vec())
            }
            (None, None) => Payload::None,
        }
    }

    /// Its length in bytes, as it travels where raw bytes may.
    pub(crate) fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Json(bytes) | Payload::Bytes(bytes) => bytes.len(),
        }
    }

    /// The JSON text, where it is JSON.
    pub(crate) fn json(&self) -> Option<&[u8]> {
        match self {
            Payload::Json(json) => Some(json),
            _ => None,
        }
    }
}

mod sealed {
    use super::Payload;

    /// Writes itself as a payload.
    pub trait Write {
        #[doc(hidden)]
        #[allow(private_interfaces, reason = "sealed: no one else can name it")]
        fn write(&self) -> Result<Payload, serde_json::Error>;
    }

    /// Reads itself from a payload.
    pub trait Read: Sized {
        #[doc(hidden)]
        #[allow(private_interfaces, reason = "sealed: no one else can name it")]
        fn read(payload: std::borrow::Cow<'_, Payload>) -> Result<Self, serde_json::Error>;
    }
}

/// What can be sent: everything that serialises, and [`Bytes`].
pub trait IntoPayload: sealed::Write {}

/// What can be received: everything that deserialises, and [`Bytes`].
pub trait FromPayload: sealed::Read {}

impl<T: Serialize + ?Sized> IntoPayload for T {}
impl<T: Serialize + ?Sized> sealed::Write for T {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn write(&self) -> Result<Payload, serde_json::Error> {
        serde_json::to_vec(self).map(Payload::Json)
    }
}

impl IntoPayload for Bytes {}
impl sealed::Write for Bytes {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn write(&self) -> Result<Payload, serde_json::Error> {
        Ok(Payload::Bytes(self.0.clone()))
    }
}

impl<T: DeserializeOwned> FromPayload for T {}
impl<T: DeserializeOwned> sealed::Read for T {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn read(payload: Cow<'_, Payload>) -> Result<Self, serde_json::Error> {
        match &*payload {
            Payload::Json(json) => serde_json::from_slice(json),
            Payload::None => serde_json::from_str("null"),
            Payload::Bytes(bytes) => Err(serde::de::Error::custom(format!(
                "expected JSON, received {} raw bytes; take them as latzero::Bytes",
                bytes.len()
            ))),
        }
    }
}

impl FromPayload for Bytes {}
impl sealed::Read for Bytes {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn read(payload: Cow<'_, Payload>) -> Result<Self, serde_json::Error> {
        match payload.into_owned() {
            Payload::Bytes(bytes) => Ok(Bytes(bytes)),
            Payload::None => Ok(Bytes::default()),
            Payload::Json(_) => Err(serde::de::Error::custom(
                "expected raw bytes, received JSON",
            )),
        }
    }
}

/// Writes `value` as a payload.
pub(crate) fn write<T: IntoPayload + ?Sized>(value: &T) -> Result<Payload, Error> {
    sealed::Write::write(value).map_err(|e| {
        Error::new(
            Code::BadMessage,
            format!("the payload can't be written as JSON: {e}"),
        )
        .with_source(e)
    })
}

/// Reads a payload as `T`.
pub(crate) fn read<T: FromPayload>(payload: Payload) -> Result<T, Error> {
    read_cow(Cow::Owned(payload))
}

/// Reads a payload that stays where it is.
pub(crate) fn peek<T: FromPayload>(payload: &Payload) -> Result<T, Error> {
    read_cow(Cow::Borrowed(payload))
}

fn read_cow<T: FromPayload>(payload: Cow<'_, Payload>) -> Result<T, Error> {
    sealed::Read::read(payload).map_err(|e| {
        Error::new(
            Code::BadMessage,
            format!("the payload is not of the expected type: {e}"),
        )
        .with_source(e)
        .with_ran(latzero_protocol::Ran::Unknown)
    })
}

/// A reply as it came: its payload, not read yet, and its headers.
#[derive(Debug, Clone)]
pub struct Reply {
    pub(crate) payload: Payload,
    pub(crate) headers: Option<Box<str>>,
}

impl Reply {
    /// The payload as `T`.
    ///
    /// # Errors
    /// `bad_message` where it is not a `T`.
    pub fn into<T: FromPayload>(self) -> Result<T, Error> {
        read(self.payload)
    }

    /// The payload's JSON text, where it is JSON.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.payload
            .json()
            .and_then(|json| std::str::from_utf8(json).ok())
    }

    /// The payload's raw bytes, where it is raw bytes.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        match &self.payload {
            Payload::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> Vec<(String, String)> {
        read_headers(self.headers.as_deref())
    }
}

pub(crate) fn read_headers(json: Option<&str>) -> Vec<(String, String)> {
    let Some(Ok(Value::Object(map))) = json.map(serde_json::from_str) else {
        return Vec::new();
    };
    map.into_iter()
        .filter_map(|(k, v)| v.as_str().map(|v| (k.clone(), v.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_read_back() {
        assert_eq!(write(&1).unwrap(), Payload::Json(b"1".to_vec()));
        assert_eq!(read::<u8>(Payload::Json(b"1".to_vec())).unwrap(), 1);
        read::<()>(Payload::None).unwrap();
        let raw = write(&Bytes(vec![0, 255])).unwrap();
        assert_eq!(read::<Bytes>(raw.clone()).unwrap(), Bytes(vec![0, 255]));
        let error = read::<u8>(raw).unwrap_err();
        assert!(
            error.message().contains("take them as latzero::Bytes"),
            "{error}"
        );
        assert!(read::<Bytes>(Payload::Json(b"1".to_vec())).is_err());
    }
}
