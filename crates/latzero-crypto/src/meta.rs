//! Metadata that is sealed with a body. The server has a copy in the clear, which it could change.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The default ttl of a call, in milliseconds.
pub const TTL_MS_DEFAULT: u64 = 30_000;

/// The longest meta in bytes.
pub const META_BYTES_MAX: usize = 32 << 10;

/// A block that a call lends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LentBlock {
    /// The block's name.
    pub block_id: String,
    /// `read` or `write`.
    pub mode: String,
    /// The block's id, in sealed pools.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_uid: Option<String>,
}

/// The meta of calls and emits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallMeta {
    /// The caller's headers.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub headers: Map<String, Value>,
    /// How long the call may take, in milliseconds.
    #[serde(skip_serializing_if = "is_default_ttl")]
    pub ttl: u64,
    /// The first credit of a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<u64>,
    /// The key of a sticky route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The key that identifies repeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// The blocks that the call lends, in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<LentBlock>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_default_ttl(ttl: &u64) -> bool {
    *ttl == TTL_MS_DEFAULT
}

impl Default for CallMeta {
    fn default() -> Self {
        CallMeta {
            headers: Map::new(),
            ttl: TTL_MS_DEFAULT,
            window: None,
            key: None,
            idempotency_key: None,
            blocks: Vec::new(),
        }
    }
}

/// The fields in the clear of the frame around a call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallFrame<'a> {
    /// The remaining ttl; the default if the frame has none.
    pub ttl: Option<u64>,
    /// `window`.
    pub window: Option<u64>,
    /// `key`.
    pub key: Option<&'a str>,
    /// The header `idempotency-key`.
    pub idempotency_key: Option<&'a str>,
    /// `blocks`; the frame may have more fields for each.
    pub blocks: Vec<LentBlock>,
}

impl CallMeta {
    /// Parses the meta of an envelope; absent fields have their defaults.
    #[must_use]
    pub fn parse(meta: Option<&str>) -> Option<Self> {
        object(meta)
    }

    /// The text to be sealed; `None` if everything has its default.
    #[must_use]
    pub fn to_text(&self) -> Option<String> {
        (*self != Self::default()).then(|| json(self))
    }

    /// Whether the fields that the frame has agree with the meta.
    #[must_use]
    pub fn agrees(&self, frame: &CallFrame<'_>) -> bool {
        frame.ttl.unwrap_or(TTL_MS_DEFAULT) <= self.ttl
            && frame.window == self.window
            && frame.key == self.key.as_deref()
            && frame.idempotency_key == self.idempotency_key.as_deref()
            && frame.blocks == self.blocks
    }
}

/// The meta of responses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerMeta {
    /// `ok`, `partial`, `error`.
    pub status: String,
    /// The number of a `partial` item from 0, or the total in a final response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u64>,
    /// The idempotency key of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// The handler's headers.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub headers: Map<String, Value>,
}

impl AnswerMeta {
    /// Parses the meta of an envelope; a response always has one.
    #[must_use]
    pub fn parse(meta: Option<&str>) -> Option<Self> {
        object(Some(meta?))
    }

    /// The text to be sealed.
    #[must_use]
    pub fn to_text(&self) -> String {
        json(self)
    }

    /// Whether this is an item of a stream, so that others follow.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.status == "partial"
    }
}

fn json(meta: &impl Serialize) -> String {
    serde_json::to_string(meta).expect("strings, numbers and JSON")
}

/// Parses an object. serde would accept an array too, but other languages would not.
fn object<T: for<'a> Deserialize<'a>>(meta: Option<&str>) -> Option<T> {
    let text = meta.unwrap_or("{}");
    let opens = text
        .trim_start_matches([' ', '\t', '\r', '\n'])
        .starts_with('{');
    serde_json::from_str(text).ok().filter(|_| opens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meta_is_an_object_with_typed_members() {
        let good = |text| CallMeta::parse(Some(text)).is_some();
        assert!(good("{}") && good(" {\"ttl\":5} ") && good("{\"unknown\":[1]}"));
        for text in [
            "",
            "null",
            "[]",
            "5",
            "{\"ttl\":-1}",
            "{\"ttl\":\"5\"}",
            "{\"ttl\":1,\"ttl\":2}",
            "{\"headers\":[]}",
            "{\"blocks\":{}}",
            "{\"blocks\":[{\"mode\":\"read\"}]}",
            "{}{}",
        ] {
            assert!(!good(text), "{text}");
        }
        assert_eq!(AnswerMeta::parse(None), None);
        assert_eq!(AnswerMeta::parse(Some("{}")), None);
        assert_eq!(AnswerMeta::parse(Some("[\"ok\",null,null,{}]")), None);
    }

    #[test]
    fn a_frame_matches_its_header_or_is_refused() {
        let lent = |mode: &str| LentBlock {
            block_id: "frame".into(),
            mode: mode.into(),
            block_uid: None,
        };
        let meta = CallMeta {
            ttl: 1000,
            window: Some(2),
            key: Some("k".into()),
            idempotency_key: Some("i".into()),
            blocks: vec![lent("read")],
            ..CallMeta::default()
        };
        let frame = CallFrame {
            ttl: Some(900),
            window: Some(2),
            key: Some("k"),
            idempotency_key: Some("i"),
            blocks: vec![lent("read")],
        };
        assert!(meta.agrees(&frame));
        for other in [
            CallFrame {
                ttl: Some(1001),
                ..frame.clone()
            },
            CallFrame {
                ttl: None,
                ..frame.clone()
            },
            CallFrame {
                window: None,
                ..frame.clone()
            },
            CallFrame {
                window: Some(3),
                ..frame.clone()
            },
            CallFrame {
                key: None,
                ..frame.clone()
            },
            CallFrame {
                key: Some("K"),
                ..frame.clone()
            },
            CallFrame {
                idempotency_key: None,
                ..frame.clone()
            },
            CallFrame {
                idempotency_key: Some("j"),
                ..frame.clone()
            },
            CallFrame {
                blocks: vec![],
                ..frame.clone()
            },
            CallFrame {
                blocks: vec![lent("write")],
                ..frame.clone()
            },
            CallFrame {
                blocks: vec![lent("read"), lent("read")],
                ..frame.clone()
            },
        ] {
            assert!(!meta.agrees(&other), "{other:?}");
        }
        assert!(CallMeta::default().agrees(&CallFrame::default()));
        assert_eq!(CallMeta::default().to_text(), None);
        assert_eq!(
            CallMeta::parse(Some(&meta.to_text().expect("it prints something"))),
            Some(meta)
        );
    }
}
