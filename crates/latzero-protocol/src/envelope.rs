//! The envelope of a message: its routing fields as raw text, found in one scan.

use std::borrow::Cow;

use crate::error::{Code, Refusal};
use crate::frame::Frame;
use crate::limits::{
    ENVELOPE_FIELDS_MAX, FIELD_DEPTH_MAX, FIELD_NAME_BYTES_MAX, HEADERS_BYTES_MAX, ID_BYTES_MAX,
    STRING_BYTES_MAX,
};
use crate::scan::{self, Ahead, ScanError, Spelling};

/// The text of one JSON value, already checked to be JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raw<'a>(&'a str);

impl<'a> Raw<'a> {
    /// The value `null`.
    pub const NULL: Raw<'static> = Raw("null");

    /// Takes `text` after checking that it is one JSON value.
    ///
    /// # Errors
    /// If it is not.
    pub fn new(text: &'a str) -> Result<Self, ScanError> {
        scan::value(text).map(|()| Raw(text))
    }

    /// Takes the text of a value that the scanner found, which has checked it.
    pub(crate) fn scanned(text: &'a str) -> Self {
        Raw(text)
    }

    /// The JSON text.
    #[must_use]
    pub fn text(self) -> &'a str {
        self.0
    }

    /// The value as a string, with its escapes decoded. `None` if it is not a string, or contains
    /// an unpaired surrogate, which a Rust string cannot hold.
    #[must_use]
    pub fn as_str(self) -> Option<Cow<'a, str>> {
        let inner = self.0.strip_prefix('"')?.strip_suffix('"')?;
        unescape(inner)
    }

    /// The value as a string of at most [`STRING_BYTES_MAX`]: longer ones are not copied.
    pub(crate) fn as_short_str(self) -> Option<Cow<'a, str>> {
        if self.is_long() { None } else { self.as_str() }
    }

    fn is_long(self) -> bool {
        self.0.len() > STRING_BYTES_MAX
    }

    /// The value as a whole number.
    #[must_use]
    pub fn as_u64(self) -> Option<u64> {
        self.0.parse().ok()
    }

    /// The value as true or false.
    #[must_use]
    pub fn as_bool(self) -> Option<bool> {
        self.0.parse().ok()
    }

    /// Whether the value is `null`.
    #[must_use]
    pub fn is_null(self) -> bool {
        self.0 == "null"
    }

    /// Whether the value is an object.
    #[must_use]
    pub fn is_object(self) -> bool {
        self.0.starts_with('{')
    }
}

/// Decodes the escapes in the content of a scanned string; `None` if it contains an unpaired
/// surrogate.
pub(crate) fn unescape(inner: &str) -> Option<Cow<'_, str>> {
    if !inner.as_bytes().contains(&b'\\') {
        return Some(Cow::Borrowed(inner));
    }
    let quoted = format!("\"{inner}\"");
    serde_json::from_str(&quoted).ok().map(Cow::Owned)
}

/// The name of a field, with its escapes decoded.
pub(crate) fn field_name(inner: &str) -> Result<Cow<'_, str>, Refusal> {
    if inner.len() > FIELD_NAME_BYTES_MAX {
        let message = format!(
            "a field name may have at most {FIELD_NAME_BYTES_MAX} bytes; '{}' is longer",
            shorten(inner)
        );
        return Err(Refusal::new(Code::BadMessage, message));
    }
    // With an unpaired surrogate it is not text, so it is not a known name.
    Ok(unescape(inner).unwrap_or(Cow::Borrowed(inner)))
}

/// The body of a message, which the server forwards unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// No body.
    None,
    /// A JSON value.
    Json(Raw<'a>),
    /// The raw bytes of an attachment frame.
    Bytes(&'a [u8]),
}

impl Body<'_> {
    /// The body's length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Body::None => 0,
            Body::Json(raw) => raw.0.len(),
            Body::Bytes(bytes) => bytes.len(),
        }
    }

    /// Whether there is no body, or an empty one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

macro_rules! fields {
    ($($field:ident $key:literal,)*) => {
        /// The envelope of one message. Fields that routing needs are named; the others are read
        /// from [`Envelope::text`] by the code that handles the action.
        #[derive(Debug, Default, Clone, Copy)]
        pub struct Envelope<'a> {
            /// The whole JSON text.
            pub text: &'a str,
            /// Its long values, if they were scanned before.
            pub long: &'a [(usize, usize)],
            /// The raw bytes of an attachment frame.
            pub attachment: Option<&'a [u8]>,
            $(
                #[doc = concat!("The field `", stringify!($field), "`.")]
                pub $field: Option<Raw<'a>>,
            )*
        }

        impl<'a> Envelope<'a> {
            // By bytes: such a match compares the length first, then a few bytes.
            #[inline]
            fn slot(&mut self, key: &[u8]) -> Option<&mut Option<Raw<'a>>> {
                match key { $($key => Some(&mut self.$field),)* _ => None }
            }
        }
    };
}

fields! {
    action b"action", id b"id", process b"process", pool b"pool", data b"data", origin b"origin",
    destination b"destination", ttl b"ttl", in_reply_to b"in_reply_to", status b"status",
    response b"response", error b"error", headers b"headers", key b"key", window b"window",
    count b"count", deliver b"deliver", park b"park",
    redeliver b"redeliver", attempts b"attempts",
    encoding b"encoding", event b"event", blocks b"blocks", descriptors b"descriptors",
}

/// Why a frame's JSON is not an envelope.
enum Malformed {
    Json(ScanError),
    Message(Refusal),
}

impl From<ScanError> for Malformed {
    fn from(error: ScanError) -> Self {
        Malformed::Json(error)
    }
}

impl<'a> Envelope<'a> {
    /// Scans a frame. The outer error says that its JSON is broken or too deep, the inner one that
    /// it is an object with duplicate or too many fields. [`salvage`] finds the ids in a broken
    /// message.
    ///
    /// # Errors
    /// `bad_frame` or `too_deep` outside, `bad_message` inside.
    #[inline(always)]
    pub fn parse(frame: Frame<'a>) -> Result<Result<Self, Refusal>, Refusal> {
        Self::parse_scanned(frame, None)
    }

    /// As [`Envelope::parse`], of a message whose scan is done.
    ///
    /// # Errors
    /// As [`Envelope::parse`].
    #[inline(always)]
    pub fn parse_scanned(
        frame: Frame<'a>,
        ahead: Option<&'a Ahead>,
    ) -> Result<Result<Self, Refusal>, Refusal> {
        let bad_frame = |what: String| Refusal::new(Code::BadFrame, what);
        let text = std::str::from_utf8(frame.json).map_err(|e| {
            bad_frame(format!(
                "the frame is not UTF-8 at byte {}",
                e.valid_up_to()
            ))
        })?;
        if let Some(error) = ahead.and_then(|ahead| ahead.failed) {
            return Err(not_json(error));
        }
        let long = ahead.map_or(&[][..], |ahead| &ahead.long);
        let mut envelope = Envelope {
            text,
            long,
            attachment: frame.attachment,
            ..Envelope::default()
        };
        let mut others: Vec<Cow<'a, str>> = Vec::new();
        let scanned = scan::fields(text, long, |key, value| {
            if key.spelling == Spelling::Plain
                && let Some(slot @ None) = envelope.slot(key.bytes())
            {
                *slot = Some(Raw(value));
                return Ok(());
            }
            let key = field_name(key.text()).map_err(Malformed::Message)?;
            match envelope.slot(key.as_bytes()) {
                Some(slot) if slot.is_none() => *slot = Some(Raw(value)),
                Some(_) => return Err(Malformed::Message(duplicate(&key))),
                None if others.contains(&key) => return Err(Malformed::Message(duplicate(&key))),
                None if others.len() >= ENVELOPE_FIELDS_MAX => {
                    return Err(Malformed::Message(Refusal::new(
                        Code::BadMessage,
                        format!(
                            "a message may have at most {ENVELOPE_FIELDS_MAX} fields; put the \
                             rest into 'data'"
                        ),
                    )));
                }
                None => others.push(key),
            }
            Ok(())
        });
        match scanned {
            Ok(()) => Ok(Ok(envelope)),
            Err(Malformed::Json(error)) => Err(not_json(error)),
            Err(Malformed::Message(refusal)) => {
                // Whether it is JSON at all depends on the rest of the frame.
                if ahead.is_none() {
                    scan::object::<ScanError>(text, |_, _| Ok(())).map_err(not_json)?;
                }
                Ok(Err(refusal))
            }
        }
    }

    /// An optional string field.
    ///
    /// # Errors
    /// `bad_message` if it is present and not a string, `too_large` if it is too long.
    #[inline]
    pub fn string(field: Option<Raw<'a>>, name: &str) -> Result<Option<Cow<'a, str>>, Refusal> {
        let Some(raw) = field else {
            return Ok(None);
        };
        // Most strings are short and plain.
        if let [b'"', inner @ .., b'"'] = raw.0.as_bytes()
            && !raw.is_long()
            && !inner.contains(&b'\\')
        {
            return Ok(Some(Cow::Borrowed(&raw.0[1..raw.0.len() - 1])));
        }
        Self::unusual_string(raw, name)
    }

    #[cold]
    fn unusual_string(raw: Raw<'a>, name: &str) -> Result<Option<Cow<'a, str>>, Refusal> {
        if raw.is_null() {
            return Ok(None);
        }
        if raw.is_long() && raw.0.starts_with('"') {
            return Err(Refusal::new(
                Code::TooLarge,
                format!("field '{name}' has more than {STRING_BYTES_MAX} bytes"),
            ));
        }
        raw.as_str()
            .map(Some)
            .ok_or_else(|| mistyped(name, "a string", raw))
    }

    /// A string field that must be there.
    ///
    /// # Errors
    /// `bad_message` if it is missing or not a string.
    #[inline]
    pub fn required_string(field: Option<Raw<'a>>, name: &str) -> Result<Cow<'a, str>, Refusal> {
        Self::string(field, name)?.ok_or_else(|| missing(name, "a string"))
    }

    /// An optional whole number within `range`.
    ///
    /// # Errors
    /// `bad_message` if it is present and not such a number.
    #[inline]
    pub fn number(
        field: Option<Raw<'a>>,
        name: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, Refusal> {
        let Some(raw) = present(field) else {
            return Ok(None);
        };
        match raw.as_u64() {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(mistyped(
                name,
                &format!("a whole number from {} to {}", range.start(), range.end()),
                raw,
            )),
        }
    }

    /// An optional true or false; absent is false.
    ///
    /// # Errors
    /// `bad_message` if it is present and neither.
    pub fn flag(field: Option<Raw<'a>>, name: &str) -> Result<bool, Refusal> {
        let Some(raw) = present(field) else {
            return Ok(false);
        };
        raw.as_bool()
            .ok_or_else(|| mistyped(name, "true or false", raw))
    }

    /// The sender's correlation id.
    ///
    /// # Errors
    /// `bad_message` if it is present and not a string of 1 to 128 bytes.
    #[inline]
    pub fn correlation_id(&self) -> Result<Option<Cow<'a, str>>, Refusal> {
        id_field(self.id, "id")
    }

    /// The `headers` field, checked to be an object of strings within its size.
    ///
    /// # Errors
    /// `bad_message` or `too_large`.
    #[inline]
    pub fn checked_headers(&self) -> Result<Option<Raw<'a>>, Refusal> {
        let Some(raw) = present(self.headers) else {
            return Ok(None);
        };
        check_headers(raw)?;
        Ok(Some(raw))
    }

    /// The body, from the field `field` or from the attachment.
    ///
    /// # Errors
    /// `bad_message` if both are present.
    #[inline]
    pub fn body(&self, field: Option<Raw<'a>>, name: &str) -> Result<Body<'a>, Refusal> {
        match (field, self.attachment) {
            (Some(_), Some(_)) => Err(Refusal::new(
                Code::BadMessage,
                format!("the attachment replaces field '{name}', which must be absent"),
            )),
            (None, Some(bytes)) => Ok(Body::Bytes(bytes)),
            (Some(raw), None) => Ok(Body::Json(raw)),
            (None, None) => Ok(Body::None),
        }
    }
}

fn not_json(error: ScanError) -> Refusal {
    if error.is_too_deep() {
        return Refusal::new(Code::TooDeep, format!("the message is {error}"));
    }
    Refusal::new(
        Code::BadFrame,
        format!("the message is not a JSON object: {error}"),
    )
}

/// The fields that identify a message whose JSON is broken.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Salvaged {
    /// Its `action`.
    pub action: Option<String>,
    /// Its `id`.
    pub id: Option<String>,
    /// Its `in_reply_to`.
    pub in_reply_to: Option<String>,
}

/// How much of a broken message [`salvage`] looks at, in bytes.
const SALVAGED_BYTES_MAX: usize = 1 << 20;

/// Finds the identifying fields in JSON that [`Envelope::parse`] refused. The length before a frame
/// keeps its neighbours intact, so only one message fails and not the connection. Strings and
/// brackets are followed, whatever is between them, and only the outermost fields count. It looks
/// at the first mebibyte.
#[must_use]
pub fn salvage(json: &[u8]) -> Salvaged {
    let mut found = Salvaged::default();
    let mut depth = 0_u64;
    let mut at = 0;
    // The last outermost string, and whether a colon followed it.
    let (mut last, mut key): (Option<&[u8]>, Option<&[u8]>) = (None, None);
    let json = &json[..json.len().min(SALVAGED_BYTES_MAX)];
    while let Some(&byte) = json.get(at) {
        at += 1;
        match byte {
            b'"' => {
                let from = at;
                while let Some(&byte) = json.get(at).filter(|&&byte| byte != b'"') {
                    at += if byte == b'\\' { 2 } else { 1 };
                }
                let text = json.get(from..at).unwrap_or_default();
                at += 1;
                if depth == 1 {
                    match key.take() {
                        Some(key) => found.note(key, text),
                        None => last = Some(text),
                    }
                }
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b':' if depth == 1 => key = last.take(),
            b',' if depth == 1 => (last, key) = (None, None),
            _ => {}
        }
    }
    found
}

impl Salvaged {
    fn note(&mut self, key: &[u8], text: &[u8]) {
        let slot = match key {
            b"action" => &mut self.action,
            b"id" => &mut self.id,
            b"in_reply_to" => &mut self.in_reply_to,
            _ => return,
        };
        let text = std::str::from_utf8(text).ok().and_then(unescape);
        let text = text.filter(|text| !text.is_empty() && text.len() <= ID_BYTES_MAX);
        *slot = text.map(Cow::into_owned);
    }
}

/// A field with a value; `null` counts as absent everywhere but in bodies.
#[inline]
fn present(field: Option<Raw<'_>>) -> Option<Raw<'_>> {
    field.filter(|raw| !raw.is_null())
}

/// An id field of 1 to 128 bytes.
pub(crate) fn id_field<'a>(
    field: Option<Raw<'a>>,
    name: &str,
) -> Result<Option<Cow<'a, str>>, Refusal> {
    let id = Envelope::string(field, name)?;
    if id
        .as_ref()
        .is_some_and(|id| id.is_empty() || id.len() > ID_BYTES_MAX)
    {
        return Err(Refusal::new(
            Code::BadMessage,
            format!("field '{name}' must be a string of 1 to {ID_BYTES_MAX} bytes"),
        ));
    }
    Ok(id)
}

fn check_headers(raw: Raw<'_>) -> Result<(), Refusal> {
    if raw.0.len() > HEADERS_BYTES_MAX {
        return Err(Refusal::new(
            Code::TooLarge,
            format!(
                "field 'headers' has {} bytes; the maximum is {HEADERS_BYTES_MAX}",
                raw.0.len()
            ),
        ));
    }
    if !raw.is_object() {
        return Err(mistyped("headers", "an object of strings", raw));
    }
    let mut keys: Vec<Cow<'_, str>> = Vec::new();
    scan::object(raw.0, |key, value| {
        if !value.starts_with('"') {
            return Err(Malformed::Message(mistyped(
                "headers",
                "an object of strings",
                Raw(value),
            )));
        }
        keys.push(unescape(key).unwrap_or(Cow::Borrowed(key)));
        Ok(())
    })
    .map_err(|error| match error {
        Malformed::Message(refusal) => refusal,
        Malformed::Json(error) => {
            Refusal::new(Code::BadMessage, format!("field 'headers': {error}"))
        }
    })?;
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(duplicate(&format!("headers.{}", pair[0]))),
        None => Ok(()),
    }
}

fn duplicate(key: &str) -> Refusal {
    Refusal::new(
        Code::BadMessage,
        format!("field '{}' occurs twice", shorten(key)),
    )
}

pub(crate) fn missing(name: &str, expected: &str) -> Refusal {
    Refusal::new(
        Code::BadMessage,
        format!("field '{name}' is missing: expected {expected}"),
    )
}

/// An optional field with an object that the server stores.
pub(crate) fn stored_object<'a>(
    field: Option<Raw<'a>>,
    name: &str,
) -> Result<Option<Raw<'a>>, Refusal> {
    let Some(raw) = field else {
        return Ok(None);
    };
    if !raw.is_object() {
        return Err(mistyped(name, "an object", raw));
    }
    if scan::value_within(raw.0, FIELD_DEPTH_MAX).is_err() {
        let message = format!("field '{name}' may nest at most {FIELD_DEPTH_MAX} levels deep");
        return Err(Refusal::new(Code::TooDeep, message));
    }
    Ok(Some(raw))
}

pub(crate) fn mistyped(name: &str, expected: &str, got: Raw<'_>) -> Refusal {
    Refusal::new(
        Code::BadMessage,
        format!("field '{name}' must be {expected}, not {}", shorten(got.0)),
    )
}

/// The first characters of what a peer sent, safe to show.
pub(crate) fn shorten(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars().take(40) {
        match c {
            // Harmless, and frequent in JSON text.
            '"' | '\'' | '\\' => shown.push(c),
            c => shown.extend(c.escape_debug()),
        }
    }
    if text.chars().nth(40).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Result<Envelope<'_>, Refusal>, Refusal> {
        Envelope::parse(Frame {
            json: json.as_bytes(),
            attachment: None,
        })
    }

    fn check_message(json: &str, expected: &str) {
        assert_eq!(
            parse(json).unwrap().unwrap_err().to_string(),
            expected,
            "{json}"
        );
    }

    #[test]
    fn a_scan_in_slices_finds_the_same_fields() {
        let long = format!("[{}]", [r#"{"a":[1,"x\"]",{}],"b":null}"#; 400].join(","));
        let text = format!(
            r#"{{"action":"emit","id":"1","data":{long},"process":"{}","x":{{"y":{long}}}}}"#,
            "p".repeat(5000)
        );
        let scan = |json: &[u8], bytes: usize| {
            let mut ahead = Ahead::default();
            while !ahead.step(json, bytes) {}
            ahead
        };
        fn frame(json: &[u8]) -> Frame<'_> {
            Frame {
                json,
                attachment: None,
            }
        }
        let plain = Envelope::parse(frame(text.as_bytes())).unwrap().unwrap();
        for bytes in [1, 7, 4096, usize::MAX] {
            let ahead = scan(text.as_bytes(), bytes);
            let scanned = Envelope::parse_scanned(frame(text.as_bytes()), Some(&ahead));
            let scanned = scanned.unwrap().unwrap();
            assert_eq!(scanned.long.len(), 3, "in slices of {bytes}");
            let scanned = Envelope {
                long: &[],
                ..scanned
            };
            assert_eq!(format!("{scanned:?}"), format!("{plain:?}"));
        }
        // A broken message is refused with the same words.
        for at in (0..text.len()).step_by(61) {
            let mut broken = text.clone().into_bytes();
            broken[at] = 1;
            let ahead = scan(&broken, 64);
            let scanned = Envelope::parse_scanned(frame(&broken), Some(&ahead));
            let plain = Envelope::parse(frame(&broken));
            assert_eq!(scanned.map(|_| ()), plain.map(|_| ()), "byte {at}");
        }
    }

    #[test]
    fn fields_are_found_whatever_their_order_and_spelling() {
        let e = parse(
            r#"{"data":{"x":[1,{"action":"no"}]},"\u0061ction":"trigger","id":"a\"b","ttl":5}"#,
        )
        .unwrap()
        .unwrap();
        assert_eq!(e.action.unwrap().as_str().unwrap(), "trigger");
        assert_eq!(e.correlation_id().unwrap().unwrap(), "a\"b");
        assert_eq!(e.data.unwrap().text(), r#"{"x":[1,{"action":"no"}]}"#);
        assert_eq!(e.ttl.unwrap().as_u64(), Some(5));
    }

    #[test]
    fn a_message_that_is_not_an_object_ends_the_connection() {
        for bad in ["[]", "1", "", "{", "{\"a\":1}x", "{\"a\":1,\"a\":2"] {
            assert_eq!(parse(bad).unwrap_err().code, Code::BadFrame, "{bad}");
        }
        let not_utf8 = Envelope::parse(Frame {
            json: b"{\"a\":\"\xff\"}",
            attachment: None,
        });
        assert!(
            not_utf8
                .unwrap_err()
                .message
                .contains("not UTF-8 at byte 6")
        );
    }

    #[test]
    fn a_broken_message_still_says_whose_it_is() {
        let deep = format!(
            r#"{{"id":"7","data":{}{},"action":"trigger"}}"#,
            "[".repeat(99),
            "]".repeat(99)
        );
        for (json, action, id, in_reply_to) in [
            (
                r#"{"action":"trigger","id":"7","data":NaN}"#,
                "trigger",
                "7",
                "",
            ),
            (
                r#"{"data":NaN,"action":"trigger","id":"7"}"#,
                "trigger",
                "7",
                "",
            ),
            (
                r#"{"response":[1,],"in_reply_to":"a.b","action":"response"}"#,
                "response",
                "",
                "a.b",
            ),
            (
                r#"{"action":"response","response":{"id":"no","x":nope},"in_reply_to":"1"}"#,
                "response",
                "",
                "1",
            ),
            (
                r#"{"action":"trigger","id":"a\"b","data":"x"#,
                "trigger",
                "a\"b",
                "",
            ),
            (
                r#"{"action" : "trigger" , "id" : "7", "data": {]"#,
                "trigger",
                "7",
                "",
            ),
            (
                "{\"action\":\"emit\",\"data\":\"a\nb\",\"id\":\"7\"}",
                "emit",
                "7",
                "",
            ),
            (&deep, "trigger", "7", ""),
            (r#"["action","trigger"]"#, "", "", ""),
            ("\"", "", "", ""),
            ("", "", "", ""),
        ] {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let expected = Salvaged {
                action: some(action),
                id: some(id),
                in_reply_to: some(in_reply_to),
            };
            assert_eq!(salvage(json.as_bytes()), expected, "{json}");
        }
    }

    #[test]
    fn half_a_surrogate_pair_passes_in_bodies_and_is_no_id() {
        let e = parse(r#"{"action":"trigger","id":"\ud800","data":"\udce9"}"#);
        let e = e.unwrap().unwrap();
        assert_eq!(e.data.unwrap().text(), r#""\udce9""#);
        assert_eq!(e.correlation_id().unwrap_err().code, Code::BadMessage);
        // An unknown name is ignored, like other unknown names.
        let e = parse(r#"{"\ud800":1,"id":"7"}"#).unwrap().unwrap();
        assert_eq!(e.correlation_id().unwrap().as_deref(), Some("7"));
    }

    #[test]
    fn duplicates_are_answered() {
        check_message(
            r#"{"id":"1","id":"2"}"#,
            "bad_message: field 'id' occurs twice",
        );
        check_message(
            r#"{"other":"1","\u006fther":"2"}"#,
            "bad_message: field 'other' occurs twice",
        );
        let many: Vec<String> = (0..70).map(|i| format!("\"f{i}\":1")).collect();
        check_message(
            &format!("{{{}}}", many.join(",")),
            "bad_message: a message may have at most 64 fields; put the rest into 'data'",
        );
    }

    #[test]
    fn fields_of_a_wrong_type_are_named() {
        let e = parse(r#"{"id":"","ttl":-1,"process":7,"park":"yes","headers":{"a":1}}"#)
            .unwrap()
            .unwrap();
        let text = |r: Refusal| r.message.into_owned();
        assert_eq!(
            text(e.correlation_id().unwrap_err()),
            "field 'id' must be a string of 1 to 128 bytes"
        );
        assert_eq!(
            text(Envelope::number(e.ttl, "ttl", 1..=9).unwrap_err()),
            "field 'ttl' must be a whole number from 1 to 9, not -1"
        );
        assert_eq!(
            text(Envelope::string(e.process, "process").unwrap_err()),
            "field 'process' must be a string, not 7"
        );
        assert_eq!(
            text(Envelope::flag(e.park, "park").unwrap_err()),
            "field 'park' must be true or false, not \"yes\""
        );
        assert_eq!(
            text(e.checked_headers().unwrap_err()),
            "field 'headers' must be an object of strings, not 1"
        );
        let twice = parse(r#"{"headers":{"ab":"1","\u0061b":"2"}}"#)
            .unwrap()
            .unwrap();
        assert_eq!(
            text(twice.checked_headers().unwrap_err()),
            "field 'headers.ab' occurs twice"
        );
    }
}
