//! The value of a setting: its kind with bounds, its text forms, its Rust type.
//!
//! Every value is checked by its [`Kind`], whether it comes from a file, a variable or a flag, so
//! all three accept the same forms and give the same errors.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use latzero_fabric::limits::Unit;
use serde::Serialize;
use toml::de::DeValue;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// How much of a refused value an error quotes, in characters.
const QUOTED_CHARS_MAX: usize = 64;

/// A checked value, before it becomes a field of `Settings`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Value {
    /// A count, a number of bytes or a number of milliseconds.
    Integer(u64),
    /// On or off.
    Bool(bool),
    /// Text, a path, or one of a closed list of words.
    Text(String),
}

/// What a setting accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An integer within bounds, both included.
    Integer {
        /// The least value.
        min: u64,
        /// The greatest value.
        max: u64,
    },
    /// A size: an integer of bytes, or text such as `16 MiB`.
    Bytes {
        /// The least value, in bytes.
        min: u64,
        /// The greatest value, in bytes.
        max: u64,
    },
    /// A duration: an integer of milliseconds, or text such as `10s`.
    Millis {
        /// The least value, in milliseconds.
        min: u64,
        /// The greatest value, in milliseconds.
        max: u64,
    },
    /// `true` or `false`.
    Bool,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any text that is not empty.
    Text,
    /// A path; a leading `~/` is the home directory.
    Path,
    /// `auto`, `off` or a path.
    Socket,
}

impl Kind {
    /// Parses the text of a variable or a flag. `None` means that the text is not such a value.
    pub(super) fn parse_text(self, text: &str) -> Option<Value> {
        match self {
            Kind::Integer { min, max } => in_bounds(text.trim().parse().ok()?, min, max),
            Kind::Bytes { min, max } => in_bounds(parse_bytes(text)?, min, max),
            Kind::Millis { min, max } => in_bounds(parse_millis(text)?, min, max),
            Kind::Bool => match text.trim().to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" => Some(Value::Bool(true)),
                "false" | "0" | "no" => Some(Value::Bool(false)),
                _ => None,
            },
            Kind::Choice(words) => {
                let word = text.trim().to_ascii_lowercase();
                words.contains(&word.as_str()).then_some(Value::Text(word))
            }
            Kind::Text | Kind::Path | Kind::Socket => {
                let usable = !text.trim().is_empty() && !text.contains('\0');
                usable.then(|| Value::Text(text.to_owned()))
            }
        }
    }

    /// Reads a value of a TOML file. Numbers and booleans are written as such; sizes and durations
    /// also as text.
    pub(super) fn parse_toml(self, value: &DeValue<'_>) -> Option<Value> {
        match (self, value) {
            (Kind::Bool, DeValue::Boolean(on)) => Some(Value::Bool(*on)),
            (
                Kind::Integer { min, max } | Kind::Bytes { min, max } | Kind::Millis { min, max },
                DeValue::Integer(number),
            ) => in_bounds(
                u64::from_str_radix(number.as_str(), number.radix()).ok()?,
                min,
                max,
            ),
            (Kind::Bool | Kind::Integer { .. }, _) => None,
            (kind, DeValue::String(text)) => kind.parse_text(text),
            _ => None,
        }
    }

    /// What an error says was expected.
    #[must_use]
    pub fn expected(self) -> String {
        match self {
            Kind::Integer { min, max } => format!("an integer from {min} to {max}"),
            Kind::Bytes { min, max } => format!(
                "a size from {} to {}: a number of bytes, or text such as \"512 KiB\", \"16 MiB\", \
                 \"1 GiB\"",
                Unit::Bytes.show(min),
                Unit::Bytes.show(max)
            ),
            Kind::Millis { min, max } => format!(
                "a duration from {} to {}: a number of milliseconds, or text such as \"500ms\", \
                 \"10s\", \"2m\"",
                Unit::Millis.show(min),
                Unit::Millis.show(max)
            ),
            Kind::Bool => "true or false".to_owned(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Text => "text that is not empty".to_owned(),
            Kind::Path => "a path".to_owned(),
            Kind::Socket => "a path, \"auto\" or \"off\"".to_owned(),
        }
    }

    /// The unit of an integer of this kind: `bytes`, `ms`, or nothing.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Kind::Bytes { .. } => "bytes",
            Kind::Millis { .. } => "ms",
            _ => "",
        }
    }

    /// A value as people read it: `16 MiB`, `10s`, `info`.
    #[must_use]
    pub fn render(self, value: &Value) -> String {
        match (self, value) {
            (Kind::Bytes { .. }, Value::Integer(bytes)) => Unit::Bytes.show(*bytes),
            (Kind::Millis { .. }, Value::Integer(ms)) => Unit::Millis.show(*ms),
            (_, Value::Integer(number)) => number.to_string(),
            (_, Value::Bool(on)) => on.to_string(),
            (_, Value::Text(text)) => text.clone(),
        }
    }

    /// A value as a TOML file holds it.
    pub(super) fn render_toml(self, value: &Value) -> String {
        let text = self.render(value);
        let plain = match value {
            Value::Integer(number) => text == number.to_string(),
            Value::Bool(_) => true,
            Value::Text(_) => false,
        };
        if plain { text } else { format!("{text:?}") }
    }
}

/// A refused value as an error quotes it: short, on one line, without control characters.
pub(super) fn quote(text: &str) -> String {
    let mut quoted: String = text.chars().take(QUOTED_CHARS_MAX).collect();
    if quoted.len() < text.len() {
        quoted.push('…');
    }
    quoted.escape_debug().to_string()
}

/// A TOML value as an error quotes it.
pub(super) fn quote_toml(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("\"{}\"", quote(text)),
        DeValue::Integer(number) => quote(&number.to_string()),
        DeValue::Float(number) => quote(&number.to_string()),
        DeValue::Boolean(on) => on.to_string(),
        DeValue::Datetime(time) => time.to_string(),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

fn in_bounds(number: u64, min: u64, max: u64) -> Option<Value> {
    (min..=max)
        .contains(&number)
        .then_some(Value::Integer(number))
}

/// Splits `10s` into `(10, "s")`. No sign, no fraction.
fn split_unit(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => KIB,
        "mib" => MIB,
        "gib" => GIB,
        _ => return None,
    };
    number.checked_mul(factor)
}

fn parse_millis(text: &str) -> Option<u64> {
    let (number, unit) = split_unit(text)?;
    let factor = match unit {
        "" | "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// The level of detail of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// A person must act.
    Error,
    /// Odd, still working.
    Warn,
    /// A state that an operator cares about.
    Info,
    /// One decision.
    Debug,
    /// One message.
    Trace,
}

impl LogLevel {
    /// The word for it in settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people on stderr, JSON in the file.
    Auto,
    /// For people in both.
    Human,
    /// JSON in both.
    Json,
}

/// What the acknowledgement of a durable change waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreDurability {
    /// For the disk.
    Full,
    /// For the kernel.
    Normal,
}

/// Which Unix socket the server listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketChoice {
    /// Where clients look for it: see [`crate::address`].
    Auto,
    /// None.
    Off,
    /// At this path.
    Path(PathBuf),
}

/// Turns a checked value into a field's type. The table pairs each type with a kind whose values
/// fit it, and a test tries both bounds of every setting; a mismatch is a bug in the table, hence
/// the panics.
pub(super) trait Typed {
    fn typed(value: &Value) -> Self;
}

fn number(value: &Value) -> u64 {
    match value {
        Value::Integer(number) => *number,
        other => unreachable!("the table gives this field an integer, not {other:?}"),
    }
}

fn text(value: &Value) -> &str {
    match value {
        Value::Text(text) => text,
        other => unreachable!("the table gives this field text, not {other:?}"),
    }
}

impl Typed for u16 {
    fn typed(value: &Value) -> Self {
        u16::try_from(number(value)).expect("the table bounds this field to 16 bits")
    }
}

impl Typed for u64 {
    fn typed(value: &Value) -> Self {
        number(value)
    }
}

impl Typed for usize {
    fn typed(value: &Value) -> Self {
        // On a 32-bit machine a bound beyond the address space is the address space.
        usize::try_from(number(value)).unwrap_or(usize::MAX)
    }
}

impl Typed for bool {
    fn typed(value: &Value) -> Self {
        match value {
            Value::Bool(on) => *on,
            other => unreachable!("the table gives this field a boolean, not {other:?}"),
        }
    }
}

impl Typed for Duration {
    fn typed(value: &Value) -> Self {
        Duration::from_millis(number(value))
    }
}

impl Typed for String {
    fn typed(value: &Value) -> Self {
        text(value).to_owned()
    }
}

impl Typed for PathBuf {
    fn typed(value: &Value) -> Self {
        PathBuf::from(text(value))
    }
}

impl Typed for SocketChoice {
    fn typed(value: &Value) -> Self {
        match text(value) {
            "auto" => SocketChoice::Auto,
            "off" => SocketChoice::Off,
            path => SocketChoice::Path(PathBuf::from(path)),
        }
    }
}

impl Typed for LogLevel {
    fn typed(value: &Value) -> Self {
        match text(value) {
            "error" => LogLevel::Error,
            "warn" => LogLevel::Warn,
            "info" => LogLevel::Info,
            "debug" => LogLevel::Debug,
            "trace" => LogLevel::Trace,
            other => unreachable!("the table lists the levels, and {other:?} is none"),
        }
    }
}

impl Typed for StoreDurability {
    fn typed(value: &Value) -> Self {
        match text(value) {
            "full" => StoreDurability::Full,
            "normal" => StoreDurability::Normal,
            other => unreachable!("the table bounds this field, and not to '{other}'"),
        }
    }
}

impl Typed for LogFormat {
    fn typed(value: &Value) -> Self {
        match text(value) {
            "auto" => LogFormat::Auto,
            "human" => LogFormat::Human,
            "json" => LogFormat::Json,
            other => unreachable!("the table lists the formats, and {other:?} is none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: Kind = Kind::Bytes {
        min: 0,
        max: u64::MAX,
    };
    const TIME: Kind = Kind::Millis {
        min: 0,
        max: u64::MAX,
    };

    fn check(kind: Kind, text: &str, expected: &Option<Value>) {
        assert_eq!(&kind.parse_text(text), expected, "{text:?} as {kind:?}");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            (" 64 KiB ", 64 * KIB),
            ("16MiB", 16 * MIB),
            ("2 gib", 2 * GIB),
            ("7 B", 7),
        ] {
            check(SIZE, text, &Some(Value::Integer(bytes)));
        }
        for text in [
            "",
            "MiB",
            "-1",
            "1.5 MiB",
            "16 MB",
            "1 KiB KiB",
            "99999999999999 GiB",
            "１",
        ] {
            check(SIZE, text, &None);
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("0", 0),
            ("250", 250),
            ("500ms", 500),
            ("10s", 10_000),
            ("2m", 120_000),
        ] {
            check(TIME, text, &Some(Value::Integer(ms)));
        }
        for text in ["", "s", "10 days", "-5s", "1.5s", "10S"] {
            check(TIME, text, &None);
        }
    }

    #[test]
    fn booleans() {
        for text in ["true", "1", "yes", "YES", " True "] {
            check(Kind::Bool, text, &Some(Value::Bool(true)));
        }
        for text in ["false", "0", "no"] {
            check(Kind::Bool, text, &Some(Value::Bool(false)));
        }
        for text in ["", "on", "2", "y"] {
            check(Kind::Bool, text, &None);
        }
    }

    #[test]
    fn bounds_are_included() {
        let kind = Kind::Integer { min: 1, max: 64 };
        check(kind, "0", &None);
        check(kind, "1", &Some(Value::Integer(1)));
        check(kind, "64", &Some(Value::Integer(64)));
        check(kind, "65", &None);
    }

    #[test]
    fn rendered_settings_round_trip() {
        for number in [
            0,
            1,
            500,
            1000,
            1024,
            90_000,
            3_600_000,
            16 * MIB,
            3 * GIB + 1,
        ] {
            for kind in [
                SIZE,
                TIME,
                Kind::Integer {
                    min: 0,
                    max: u64::MAX,
                },
            ] {
                let value = Value::Integer(number);
                check(kind, &kind.render(&value), &Some(value.clone()));
            }
        }
    }

    #[test]
    fn quotes_are_short_and_on_one_line() {
        assert_eq!(quote("a\nb\u{1b}"), "a\\nb\\u{1b}");
        assert!(quote(&"x".repeat(10_000)).chars().count() <= QUOTED_CHARS_MAX + 1);
    }
}
