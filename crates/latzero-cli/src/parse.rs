//! Parses arguments: durations, sizes, payloads, headers, and the names of triggers.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use serde_json::value::RawValue;

use crate::exit::Failure;

/// The longest time that an argument may give: that of a call's ttl.
const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

/// The longest time for which a call may be parked.
const LONG_DURATION_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// The longest age: a century.
const AGE_MAX: Duration = Duration::from_secs(36_525 * 24 * 3600);

/// How much of a file or of stdin is read for a payload at most, in bytes: more than a server
/// accepts by default.
pub(crate) const INPUT_BYTES_MAX: u64 = 16 << 20;

/// A duration with its unit, up to a day: `500ms`, `5s`, `2m`, `1h`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    duration_up_to(text, DURATION_MAX)
}

/// A duration with its unit, up to 30 days: `90s`, `12h`, `7d`.
pub(crate) fn long_duration(text: &str) -> Result<Duration, String> {
    duration_up_to(text, LONG_DURATION_MAX)
}

/// An age: a duration with a limit so high that nobody reaches it.
pub(crate) fn age(text: &str) -> Result<Duration, String> {
    duration_up_to(text, AGE_MAX)
}

fn duration_up_to(text: &str, max: Duration) -> Result<Duration, String> {
    let expected =
        || format!("expected a duration with its unit, like 500ms, 5s, 2m or 1h, not '{text}'");
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(expected)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| expected())?;
    let seconds = match unit {
        "us" => number / 1e6,
        "ms" => number / 1e3,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        _ => return Err(expected()),
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration > Duration::ZERO && duration <= max => Ok(duration),
        _ => Err(format!(
            "must be more than 0 and at most {}h",
            max.as_secs() / 3600
        )),
    }
}

/// A size in bytes, with or without a unit: `64`, `4KiB`, `1MiB`.
pub(crate) fn size(text: &str) -> Result<usize, String> {
    let expected = || format!("expected a size like 64, 4KiB or 1MiB, not '{text}'");
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: usize = number.parse().map_err(|_| expected())?;
    let factor = match unit.trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        _ => return Err(expected()),
    };
    let bytes = number.checked_mul(factor).ok_or_else(expected)?;
    match bytes as u64 > INPUT_BYTES_MAX {
        true => Err(format!("must be at most {INPUT_BYTES_MAX} bytes")),
        false => Ok(bytes),
    }
}

/// The size of a block in bytes, with or without a unit: `4096`, `64KiB`, `1GiB`.
pub(crate) fn block_size(text: &str) -> Result<u64, String> {
    let expected = || format!("expected a size like 4096, 64KiB or 1GiB, not '{text}'");
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let factor = match unit.trim() {
        "" | "B" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return Err(expected()),
    };
    number.checked_mul(factor).ok_or_else(expected)
}

/// The bytes of an argument: its text, `-` for stdin or `@FILE` for a file, at most `max` bytes.
pub(crate) fn bytes(argument: &str, max: u64) -> Result<Vec<u8>, Failure> {
    let source: (Box<dyn std::io::Read>, &str) = match (argument, argument.strip_prefix('@')) {
        ("-", _) => (Box::new(std::io::stdin()), "stdin"),
        (_, Some(path)) => {
            let file = File::open(path).map_err(|error| {
                Failure::usage(format!("the file '{path}' cannot be read: {error}"))
            })?;
            (Box::new(file), path)
        }
        _ => return Ok(argument.as_bytes().to_vec()),
    };
    let (source, name) = source;
    let mut bytes = Vec::new();
    let read = source.take(max + 1).read_to_end(&mut bytes);
    read.map_err(|error| Failure::usage(format!("{name} cannot be read: {error}")))?;
    if bytes.len() as u64 > max {
        let text = format!("{name} is longer than the {max} bytes that fit in the block");
        return Err(Failure::usage(text));
    }
    Ok(bytes)
}

/// `NAME=VALUE`.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("expected NAME=VALUE, not '{text}'")),
    }
}

/// How many are wanted.
pub(crate) fn count(text: &str) -> Result<u64, String> {
    let count = text.parse().ok().filter(|count| *count > 0);
    count.ok_or_else(|| format!("a count is at least 1, not '{text}'"))
}

/// The number of a parked call.
pub(crate) fn parked_number(text: &str) -> Result<u64, String> {
    let expected = |_| "expected the number that `latzero parked ls` shows".to_owned();
    text.parse().map_err(expected)
}

/// A port.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    let expected = |_| "expected a number from 0 to 65535".to_owned();
    text.parse().map_err(expected)
}

/// A trigger and its pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// The pool, if one was named.
    pub(crate) pool: Option<String>,
    /// The trigger.
    pub(crate) trigger: String,
}

impl Target {
    /// Parses `[POOL/]TRIGGER`. A trigger's name may contain `/`: the pool is the part before the
    /// first one. With `--pool`, the whole text is the trigger.
    pub(crate) fn parse(text: &str, pool: Option<&str>) -> Result<Target, Failure> {
        let (pool, trigger) = match (pool, text.split_once('/')) {
            (Some(pool), _) => (Some(pool), text),
            (None, Some((pool, trigger))) => (Some(pool), trigger),
            (None, None) => (None, text),
        };
        if trigger.is_empty() || pool == Some("") {
            return Err(Failure::usage(format!("'{text}' is not a complete name"))
                .with_help("write TRIGGER, POOL/TRIGGER, or --pool POOL TRIGGER"));
        }
        Ok(Target {
            pool: pool.map(str::to_owned),
            trigger: trigger.to_owned(),
        })
    }
}

/// The payload of an argument: JSON, `-` for stdin or `@FILE` for a file; `null` without an
/// argument.
pub(crate) fn payload(argument: Option<&str>) -> Result<Box<RawValue>, Failure> {
    let (text, place) = match argument {
        None => ("null".to_owned(), "the argument"),
        Some("-") => (read(std::io::stdin(), "stdin")?, "stdin"),
        Some(text) => match text.strip_prefix('@') {
            Some(path) => (read_file(path)?, path),
            None => (text.to_owned(), "the argument"),
        },
    };
    RawValue::from_string(text.trim().to_owned()).map_err(|error| {
        let failure = Failure::usage(format!("{place} is not JSON: {error}"));
        let help = argument.filter(|_| place == "the argument");
        match help.and_then(suggest_quoting) {
            Some(help) => failure.with_help(help),
            None => failure,
        }
    })
}

/// The JSON in a file.
pub(crate) fn json_file(path: &Path) -> Result<serde_json::Value, Failure> {
    let name = path.to_string_lossy();
    serde_json::from_str(&read_file(&name)?)
        .map_err(|error| Failure::usage(format!("{name} is not JSON: {error}")))
}

fn read_file(path: &str) -> Result<String, Failure> {
    let file = File::open(path)
        .map_err(|error| Failure::usage(format!("the file '{path}' cannot be read: {error}")))?;
    read(file, path)
}

fn read(source: impl std::io::Read, name: &str) -> Result<String, Failure> {
    let mut text = String::new();
    let read = source.take(INPUT_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| Failure::usage(format!("{name} cannot be read: {error}")))?;
    if text.len() as u64 > INPUT_BYTES_MAX {
        let text = format!("{name} is longer than {INPUT_BYTES_MAX} bytes");
        return Err(Failure::usage(text));
    }
    Ok(text)
}

/// A hint at what the text may have been meant to be.
fn suggest_quoting(text: &str) -> Option<String> {
    if text.trim_start().starts_with(['{', '[', '"']) {
        // What is left of {"x":42} if it is not quoted in a shell.
        let looks_stripped = !text.contains(['"', '\'']) && text.contains(char::is_alphabetic);
        return looks_stripped.then(|| {
            "the shell removes double quotes; put the whole value in single quotes: '{\"x\":42}'"
                .to_owned()
        });
    }
    let as_json = serde_json::Value::from(text).to_string();
    Some(format!(
        "write text as a JSON string, in double quotes: {}",
        shell(&as_json)
    ))
}

/// Text as one word of a shell's command line.
pub(crate) fn shell(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        let check = |text: &str, ms: u64| {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        };
        check("500ms", 500);
        check("5s", 5_000);
        check("1.5s", 1_500);
        check("2m", 120_000);
        check("24h", 86_400_000);
        assert_eq!(long_duration("30d"), Ok(LONG_DURATION_MAX));
        assert!(long_duration("721h").is_err());
        for bad in ["5", "s", "", "5 weeks", "0s", "25h", "-5s", "1e9s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("64"), Ok(64));
        assert_eq!(size("4KiB"), Ok(4096));
        assert_eq!(size("16MiB"), Ok(16 << 20));
        for bad in ["", "x", "17MiB", "1G", "99999999999999999999"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn targets() {
        let check = |text: &str, pool: Option<&str>, expected: (Option<&str>, &str)| {
            let target = Target::parse(text, pool).unwrap();
            assert_eq!(
                (target.pool.as_deref(), &*target.trigger),
                expected,
                "{text}"
            );
        };
        check("foo", None, (None, "foo"));
        check("alpha/foo", None, (Some("alpha"), "foo"));
        check("alpha/a/b:c", None, (Some("alpha"), "a/b:c"));
        check("a/b", Some("alpha"), (Some("alpha"), "a/b"));
        for bad in ["", "/", "a/", "/b"] {
            assert!(Target::parse(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn payloads_say_how_to_quote() {
        let no_help = |text: &str| payload(Some(text)).unwrap_err().help;
        let help = |text: &str| no_help(text).unwrap();
        assert_eq!(
            payload(Some(r#" {"x": 42} "#)).unwrap().get(),
            r#"{"x": 42}"#
        );
        assert_eq!(payload(None).unwrap().get(), "null");
        assert!(help("{x:42}").contains(r#"'{"x":42}'"#));
        for broken in [r#"{"x":1"#, r#""x"#, "[1,", "{'x':1}"] {
            assert_eq!(no_help(broken), None, "{broken}");
        }
        assert!(help("it's me").ends_with(r#"'"it'\''s me"'"#));
        assert!(payload(Some("@/nowhere/at/all")).is_err());
    }

    #[test]
    fn words_of_a_shell() {
        assert_eq!(shell("/a/b-c.d"), "/a/b-c.d");
        assert_eq!(shell("a b"), "'a b'");
        assert_eq!(shell("it's"), r"'it'\''s'");
        assert_eq!(shell(""), "''");
    }
}
