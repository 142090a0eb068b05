//! Names: AppIDs, pools, triggers, blocks. A value of these types is always valid.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// The error for text that is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{shown}' is not a valid {kind}: use 1 to {max} of {alphabet}")]
pub struct NameError {
    shown: String,
    kind: &'static str,
    max: usize,
    alphabet: &'static str,
}

/// Checks `text` against a rule of the protocol.
fn check(text: &str, kind: &'static str, max: usize, also: &[u8]) -> Result<(), NameError> {
    let allowed =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-') || also.contains(&b);
    if !text.is_empty() && text.len() <= max && text.bytes().all(allowed) {
        return Ok(());
    }
    // Shown in messages and logs: short, and nothing that could disturb a terminal.
    let shown: String = text
        .chars()
        .take(40)
        .flat_map(char::escape_default)
        .collect();
    let alphabet = if also.is_empty() {
        "A-Z a-z 0-9 . _ -"
    } else {
        "A-Z a-z 0-9 . _ - : /"
    };
    Err(NameError {
        shown,
        kind,
        max,
        alphabet,
    })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal, $max:literal, $also:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $type(Arc<str>);

        impl $type {
            /// Longest name in bytes.
            pub const BYTES_MAX: usize = $max;

            /// Takes `text` as a name.
            ///
            /// # Errors
            /// If it is empty, too long or has other characters than the protocol allows.
            pub fn new(text: &str) -> Result<Self, NameError> {
                Self::check(text)?;
                Ok($type(text.into()))
            }

            /// Checks `text` without keeping it.
            ///
            /// # Errors
            /// As [`Self::new`].
            pub fn check(text: &str) -> Result<(), NameError> {
                check(text, $kind, $max, $also)
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $type {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(&self.0)
            }
        }
    };
}

name!(
    /// An app's name: 1 to 128 bytes of `A-Z a-z 0-9 . _ -`, case-sensitive.
    AppId, "AppID", 128, b""
);
name!(
    /// A pool's name: 1 to 64 bytes of `A-Z a-z 0-9 . _ -`.
    PoolName, "pool name", 64, b""
);
name!(
    /// A trigger's name: 1 to 128 bytes of `A-Z a-z 0-9 . _ - : /`.
    TriggerName, "trigger name", 128, b":/"
);

name!(
    /// A memory block's name: 1 to 128 bytes of `A-Z a-z 0-9 . _ - : /`.
    BlockId, "block id", 128, b":/"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(AppId::new("my.App_1-x").is_ok());
        assert!(AppId::new("a/b").is_err());
        assert!(AppId::new("").is_err());
        assert!(AppId::new(&"a".repeat(128)).is_ok());
        assert!(AppId::new(&"a".repeat(129)).is_err());
        assert!(PoolName::new(&"a".repeat(64)).is_ok());
        assert!(PoolName::new(&"a".repeat(65)).is_err());
        assert!(TriggerName::new("img/resize:v2").is_ok());
        assert!(TriggerName::new("é").is_err());
        assert_eq!(
            PoolName::new("a b\n").unwrap_err().to_string(),
            "'a b\\n' is not a valid pool name: use 1 to 64 of A-Z a-z 0-9 . _ -"
        );
    }
}
