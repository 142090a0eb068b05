//! The payloads of calls, emits and answers: JSON values or raw bytes.

use std::borrow::Cow;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use base64::Engine as _;
use latzero_protocol::limits::DATA_DEPTH_MAX;
use latzero_protocol::{Code, Envelope, Ran, Raw, scan};

use crate::error::Error;
use crate::sync::lock;

/// Raw bytes as a payload: sent unchanged, next to the JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

/// A payload whose kind is only known at run time: JSON text, or raw bytes.
#[derive(Debug, Clone)]
pub enum Data {
    /// One JSON value, sent with exactly this text. It is checked when it is sent.
    Json(String),
    /// Raw bytes.
    Bytes(Bytes),
}

/// A payload that is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Nothing.
    None,
    /// One JSON value.
    Json(String),
    /// Raw bytes.
    Bytes(Vec<u8>),
}

/// A received payload, from which a type is read.
pub(crate) enum Body<'a> {
    /// Nothing.
    None,
    /// One JSON value.
    Json(&'a str),
    /// Raw bytes, with their memory if it may be taken.
    Bytes(Cow<'a, [u8]>),
}

/// The raw bytes of a received message, if they are its body.
pub(crate) fn raw_bytes(envelope: &Envelope<'_>, field: Option<Raw<'_>>) -> Option<Vec<u8>> {
    if let Some(bytes) = envelope.attachment {
        return Some(bytes.to_vec());
    }
    // A peer without attachments sends raw bytes as base64 text, and marks it.
    envelope.encoding.filter(|e| e.text() == "\"base64\"")?;
    let text = field?.as_str()?;
    base64::engine::general_purpose::STANDARD
        .decode(&*text)
        .ok()
}

impl Payload {
    /// Copies the body of a received message.
    pub(crate) fn received(envelope: &Envelope<'_>, field: Option<Raw<'_>>) -> Payload {
        match (raw_bytes(envelope, field), field) {
            (Some(bytes), _) => Payload::Bytes(bytes),
            (None, Some(raw)) => Payload::Json(raw.text().to_owned()),
            (None, None) => Payload::None,
        }
    }

    /// Its length in bytes if raw bytes are sent as an attachment.
    pub(crate) fn len(&self) -> usize {
        match self {
            Payload::None => 0,
            Payload::Json(json) => json.len(),
            Payload::Bytes(bytes) => bytes.len(),
        }
    }

    /// The JSON text, if it is JSON.
    pub(crate) fn json(&self) -> Option<&str> {
        match self {
            Payload::Json(json) => Some(json),
            _ => None,
        }
    }

    fn body(&self) -> Body<'_> {
        match self {
            Payload::None => Body::None,
            Payload::Json(json) => Body::Json(json),
            Payload::Bytes(bytes) => Body::Bytes(Cow::Borrowed(bytes)),
        }
    }
}

mod sealed {
    use super::{Body, Payload};

    /// Writes itself as a payload.
    pub trait Write {
        #[doc(hidden)]
        #[allow(private_interfaces, reason = "sealed: no one else can name it")]
        fn write(&self) -> Result<Payload, serde_json::Error>;

        /// Appends itself to `out` as JSON; raw bytes are returned instead.
        #[doc(hidden)]
        fn append(&self, out: &mut Vec<u8>) -> Result<Option<Vec<u8>>, serde_json::Error>;
    }

    /// Reads itself from a payload.
    pub trait Read: Sized {
        #[doc(hidden)]
        #[allow(private_interfaces, reason = "sealed: no one else can name it")]
        fn read(body: Body<'_>) -> Result<Self, serde_json::Error>;
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
        serde_json::to_string(self).map(Payload::Json)
    }

    fn append(&self, out: &mut Vec<u8>) -> Result<Option<Vec<u8>>, serde_json::Error> {
        serde_json::to_writer(out, self).map(|()| None)
    }
}

impl IntoPayload for Bytes {}
impl sealed::Write for Bytes {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn write(&self) -> Result<Payload, serde_json::Error> {
        Ok(Payload::Bytes(self.0.clone()))
    }

    fn append(&self, _out: &mut Vec<u8>) -> Result<Option<Vec<u8>>, serde_json::Error> {
        Ok(Some(self.0.clone()))
    }
}

impl<T: DeserializeOwned> FromPayload for T {}
impl<T: DeserializeOwned> sealed::Read for T {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn read(body: Body<'_>) -> Result<Self, serde_json::Error> {
        match body {
            Body::Json(json) => read_json(json),
            Body::None => serde_json::from_str("null"),
            Body::Bytes(bytes) => Err(serde::de::Error::custom(format!(
                "expected JSON, received {} raw bytes; take them as latzero::Bytes",
                bytes.len()
            ))),
        }
    }
}

impl IntoPayload for Data {}
impl sealed::Write for Data {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn write(&self) -> Result<Payload, serde_json::Error> {
        match self {
            Data::Json(json) => Ok(Payload::Json(json.clone())),
            Data::Bytes(bytes) => sealed::Write::write(bytes),
        }
    }

    fn append(&self, out: &mut Vec<u8>) -> Result<Option<Vec<u8>>, serde_json::Error> {
        match self {
            Data::Json(json) => {
                out.extend_from_slice(json.as_bytes());
                Ok(None)
            }
            Data::Bytes(bytes) => sealed::Write::append(bytes, out),
        }
    }
}

impl FromPayload for Data {}
impl sealed::Read for Data {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn read(body: Body<'_>) -> Result<Self, serde_json::Error> {
        match body {
            Body::Bytes(_) => sealed::Read::read(body).map(Data::Bytes),
            // The message that it is a part of was checked.
            Body::Json(json) => Ok(Data::Json(json.to_owned())),
            Body::None => Ok(Data::Json("null".to_owned())),
        }
    }
}

impl FromPayload for Bytes {}
impl sealed::Read for Bytes {
    #[allow(private_interfaces, reason = "sealed: no one else can name it")]
    fn read(body: Body<'_>) -> Result<Self, serde_json::Error> {
        match body {
            Body::Bytes(bytes) => Ok(Bytes(bytes.into_owned())),
            Body::None => Ok(Bytes::default()),
            Body::Json(_) => Err(serde::de::Error::custom(
                "expected raw bytes, received JSON",
            )),
        }
    }
}

/// Writes `value` as a payload.
pub(crate) fn write<T: IntoPayload + ?Sized>(value: &T) -> Result<Payload, Error> {
    let payload = sealed::Write::write(value).map_err(not_written)?;
    if let Payload::Json(json) = &payload {
        check_json(json)?;
    }
    Ok(payload)
}

/// Appends `value` to `out` as JSON; raw bytes are returned instead.
pub(crate) fn append<T: IntoPayload + ?Sized>(
    value: &T,
    out: &mut Vec<u8>,
) -> Result<Option<Vec<u8>>, Error> {
    let start = out.len();
    let bytes = sealed::Write::append(value, out).map_err(not_written)?;
    if bytes.is_none() {
        let text = std::str::from_utf8(&out[start..]);
        let checked = text.map_err(|e| not_sent(&e)).and_then(check_json);
        if checked.is_err() {
            out.truncate(start);
        }
        checked?;
    }
    Ok(bytes)
}

/// Reads JSON. `serde_json` refuses the 128th level, which data may have.
pub(crate) fn read_json<T: DeserializeOwned>(json: &str) -> Result<T, serde_json::Error> {
    serde_json::from_str(json).or_else(|error| {
        if json.len() < 2 * DATA_DEPTH_MAX as usize || scan::value(json).is_err() {
            return Err(error);
        }
        let mut deep = serde_json::Deserializer::from_str(json);
        deep.disable_recursion_limit();
        T::deserialize(&mut deep)
    })
}

/// Checks JSON by the rules of the protocol, which are stricter than those of a JSON library.
/// Invalid JSON would fail at the server.
///
/// # Errors
/// `bad_message`, with what is wrong and where.
pub fn check_json(text: &str) -> Result<(), Error> {
    scan::value(text).map_err(|e| not_sent(&e))
}

fn not_sent(why: &impl std::fmt::Display) -> Error {
    Error::new(
        Code::BadMessage,
        format!("the payload is not JSON that LatZero can send: {why}"),
    )
    .with_ran(Ran::No)
}

fn not_written(e: serde_json::Error) -> Error {
    Error::new(
        Code::BadMessage,
        format!("the payload cannot be encoded as JSON: {e}"),
    )
    .with_source(e)
}

/// Reads a payload as `T`.
pub(crate) fn read<T: FromPayload>(payload: Payload) -> Result<T, Error> {
    match payload {
        Payload::Bytes(bytes) => read_body(Body::Bytes(Cow::Owned(bytes))),
        payload => read_body(payload.body()),
    }
}

/// Reads a payload that stays where it is.
pub(crate) fn peek<T: FromPayload>(payload: &Payload) -> Result<T, Error> {
    read_body(payload.body())
}

/// Reads a body as `T`.
pub(crate) fn read_body<T: FromPayload>(body: Body<'_>) -> Result<T, Error> {
    sealed::Read::read(body).map_err(|e| {
        Error::new(
            Code::BadMessage,
            format!("the payload is not of the expected type: {e}"),
        )
        .with_source(e)
        .with_ran(latzero_protocol::Ran::Unknown)
    })
}

/// A reply as received: its payload, which is not decoded yet, and its headers.
#[derive(Debug, Clone)]
pub struct Reply {
    pub(crate) payload: Payload,
    pub(crate) headers: Option<Box<str>>,
    /// The parts that few replies have.
    pub(crate) beside: Option<Box<Beside>>,
    /// The connection that it arrived over.
    pub(crate) epoch: u32,
}

/// The parts that few replies have in addition to the payload.
#[derive(Debug, Clone, Default)]
pub(crate) struct Beside {
    /// The JSON of the response, if the payload is raw bytes.
    pub(crate) json: Box<str>,
    pub(crate) descriptors: Arc<Mutex<Vec<OwnedFd>>>,
}

impl Reply {
    /// The file descriptors that came with it; once.
    pub(crate) fn take_descriptors(&self) -> Vec<OwnedFd> {
        self.beside
            .as_ref()
            .map(|beside| std::mem::take(&mut *lock(&beside.descriptors)))
            .unwrap_or_default()
    }

    /// The payload as `T`.
    ///
    /// # Errors
    /// `bad_message` if it is not a `T`.
    pub fn into<T: FromPayload>(self) -> Result<T, Error> {
        read(self.payload)
    }

    /// The payload's JSON text, if it is JSON.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.payload.json()
    }

    /// The payload's raw bytes, if it is raw bytes.
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
    fn floats_are_exact() {
        // Some of these differ in the last bit without `float_roundtrip` of serde_json.
        for float in [
            1.4186613525849614e134,
            -7.571968556055867e-74,
            10_928_588.983213553,
            2.2250738585072014e-308,
        ] {
            let written = write(&float).unwrap();
            assert_eq!(read::<f64>(written.clone()).unwrap(), float);
            assert_eq!(read::<Value>(written).unwrap(), Value::from(float));
        }
    }

    #[test]
    fn payloads_read_back() {
        assert_eq!(write(&1).unwrap(), Payload::Json("1".into()));
        assert_eq!(read::<u8>(Payload::Json("1".into())).unwrap(), 1);
        read::<()>(Payload::None).unwrap();
        let raw = write(&Bytes(vec![0, 255])).unwrap();
        assert_eq!(read::<Bytes>(raw.clone()).unwrap(), Bytes(vec![0, 255]));
        let error = read::<u8>(raw).unwrap_err();
        assert!(
            error.message().contains("take them as latzero::Bytes"),
            "{error}"
        );
        assert!(read::<Bytes>(Payload::Json("1".into())).is_err());
    }
}
