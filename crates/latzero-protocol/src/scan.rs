//! A validating JSON scanner that finds where values begin and end.
//!
//! The server routes by a few envelope fields, but must still refuse bytes that are not JSON ([RFC
//! 8259](https://www.rfc-editor.org/rfc/rfc8259)). A general parser builds or visits every value.
//! This one checks the grammar in one pass without allocating, and returns the raw text of each
//! field. Nesting is stored in the bits of one integer, so depth is bounded by construction, and
//! deep input cannot exhaust the stack.

use crate::limits::{DATA_DEPTH_MAX, JSON_DEPTH_MAX};

/// What a [`ScanError`] says about nesting.
const TOO_DEEP: &str = "nested too deeply (at most 128 levels of data)";

/// Where and why a text is not JSON that LatZero accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {offset}")]
pub struct ScanError {
    /// Offset in bytes from the start of the scanned text.
    pub offset: usize,
    /// What was wrong there.
    pub what: &'static str,
}

impl ScanError {
    /// Whether the text may be JSON, but has more levels than [`JSON_DEPTH_MAX`].
    #[must_use]
    pub fn is_too_deep(&self) -> bool {
        self.what == TOO_DEEP
    }
}

/// Scans `text`, which must be one JSON object, and calls `on_field` with the raw text of each key
/// (without its quotes, escapes untouched) and of each value.
///
/// # Errors
/// The first place where `text` is not a JSON object of depth [`JSON_DEPTH_MAX`] or less, or what
/// `on_field` returned.
pub fn object<'a, E: From<ScanError>>(
    text: &'a str,
    mut on_field: impl FnMut(&'a str, &'a str) -> Result<(), E>,
) -> Result<(), E> {
    fields(text, &[], |key, value| on_field(key.text(), value))
}

/// Values from here on are passed over when a message is scanned again, in bytes.
const LONG: usize = 4096;

/// The scan of a large message, in slices: no message may occupy its reader for long. What scans
/// the message afterwards passes over the long values that were found.
#[derive(Debug, Clone, Default)]
pub struct Ahead {
    at: usize,
    has_begun: bool,
    /// Whether it is inside a key of the message.
    in_key: bool,
    /// Where the present value begins, and what is open in it.
    inside: Option<(usize, Nest)>,
    pub(crate) long: Vec<(usize, usize)>,
    pub(crate) failed: Option<ScanError>,
}

impl Ahead {
    /// Scans about `bytes` more bytes of the same `json`; true once it is done. Long runs of text
    /// without escapes, of digits and of blanks are passed over at once, which is fast.
    pub fn step(&mut self, json: &[u8], bytes: usize) -> bool {
        let mut s = Scanner {
            bytes: json,
            at: self.at,
        };
        let until = self.at.saturating_add(bytes);
        let done = self.advance(&mut s, until);
        self.at = s.at;
        done.unwrap_or_else(|error| {
            self.failed = Some(error);
            true
        })
    }

    fn advance(&mut self, s: &mut Scanner<'_>, until: usize) -> Result<bool, ScanError> {
        if !std::mem::replace(&mut self.has_begun, true) {
            s.space();
            if s.peek() != Some(b'{') {
                return Err(s.error("expected a JSON object"));
            }
            s.at += 1;
            s.space();
            if s.peek() == Some(b'}') {
                s.at += 1;
                return s.end().map(|()| true);
            }
        }
        loop {
            let (from, nest) = match &mut self.inside {
                Some(inside) => inside,
                None => {
                    if !std::mem::replace(&mut self.in_key, true) {
                        s.space();
                        s.open_key()?;
                    }
                    if !s.string_until(until)? {
                        return Ok(false);
                    }
                    s.colon()?;
                    self.in_key = false;
                    s.space();
                    self.inside.insert((s.at, Nest::new(1)))
                }
            };
            if !s.nested::<true>(nest, until)? {
                return Ok(false);
            }
            if s.at - *from >= LONG {
                self.long.push((*from, s.at));
            }
            self.inside = None;
            s.space();
            match s.next() {
                Some(b',') => {}
                Some(b'}') => return s.end().map(|()| true),
                _ => return Err(s.error_before("expected ',' or '}'")),
            }
        }
    }
}

/// What is open inside a value.
#[derive(Debug, Clone, Copy)]
struct Nest {
    /// How many containers are open around the value: at least the message.
    base: u32,
    depth: u32,
    /// One bit per open container, the innermost lowest: 1 is an object, 0 an array.
    open: u128,
    within: Within,
}

/// Where a scan in slices stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Within {
    /// Before a value.
    Nothing,
    Key,
    Text,
}

impl Nest {
    #[inline]
    fn new(base: u32) -> Nest {
        const { assert!(JSON_DEPTH_MAX - 1 <= u128::BITS) }
        Nest {
            base,
            depth: base,
            open: 0,
            within: Within::Nothing,
        }
    }
}

/// How a string is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// Without escapes.
    Plain,
    /// With escapes.
    Escaped,
}

/// The key of a field in the text. Most keys are only compared with a few names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key<'a> {
    text: &'a str,
    from: usize,
    to: usize,
    pub(crate) spelling: Spelling,
}

impl<'a> Key<'a> {
    /// The bytes between the quotes, escapes untouched.
    #[inline]
    pub(crate) fn bytes(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.from..self.to]
    }

    /// The text between the quotes, escapes untouched.
    pub(crate) fn text(&self) -> &'a str {
        &self.text[self.from..self.to]
    }
}

/// Like [`object`], with keys that say whether they have escapes. The values at `long` were scanned
/// before.
#[inline]
pub(crate) fn fields<'a, E: From<ScanError>>(
    text: &'a str,
    long: &[(usize, usize)],
    mut on_field: impl FnMut(Key<'a>, &'a str) -> Result<(), E>,
) -> Result<(), E> {
    let mut s = Scanner::new(text);
    s.space();
    if s.peek() != Some(b'{') {
        return Err(s.error("expected a JSON object").into());
    }
    s.at += 1;
    s.space();
    if s.peek() == Some(b'}') {
        s.at += 1;
    } else {
        loop {
            s.space();
            let from = s.at + 1;
            let (to, spelling) = s.key_here()?;
            let key = Key {
                text,
                from,
                to,
                spelling,
            };
            s.space();
            let from = s.at;
            let end = long.iter().find(|(start, _)| *start == from);
            match (end, s.peek()) {
                (Some((_, end)), _) => s.at = *end,
                (None, Some(b'"')) => {
                    s.string()?;
                }
                (None, _) => s.value(1)?,
            }
            on_field(key, &text[from..s.at])?;
            s.space();
            match s.next() {
                Some(b',') => {}
                Some(b'}') => break,
                _ => return Err(s.error_before("expected ',' or '}'").into()),
            }
        }
    }
    s.end()?;
    Ok(())
}

/// Scans `text`, which must be one JSON array, and calls `on_item` with the raw text of each item.
///
/// # Errors
/// As [`object`].
pub fn array<'a, E: From<ScanError>>(
    text: &'a str,
    mut on_item: impl FnMut(&'a str) -> Result<(), E>,
) -> Result<(), E> {
    let mut s = Scanner::new(text);
    s.space();
    if s.peek() != Some(b'[') {
        return Err(s.error("expected a JSON array").into());
    }
    s.at += 1;
    s.space();
    if s.peek() == Some(b']') {
        s.at += 1;
    } else {
        loop {
            s.space();
            let from = s.at;
            s.value(1)?;
            on_item(&text[from..s.at])?;
            s.space();
            match s.next() {
                Some(b',') => {}
                Some(b']') => break,
                _ => return Err(s.error_before("expected ',' or ']'").into()),
            }
        }
    }
    s.end()?;
    Ok(())
}

/// Checks that `text` is exactly one JSON value of depth [`DATA_DEPTH_MAX`] or less.
///
/// # Errors
/// The first place where it is not.
pub fn value(text: &str) -> Result<(), ScanError> {
    value_within(text, DATA_DEPTH_MAX)
}

/// The same for depth `max`, which is at most [`DATA_DEPTH_MAX`].
///
/// # Errors
/// The first place where it is not.
pub fn value_within(text: &str, max: u32) -> Result<(), ScanError> {
    let mut s = Scanner::new(text);
    s.space();
    s.value(JSON_DEPTH_MAX - max.min(DATA_DEPTH_MAX))?;
    s.end()
}

/// From this many blanks on, they are skipped eight at a time.
const LONG_RUN: usize = 32;

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn new(text: &'a str) -> Self {
        Scanner {
            bytes: text.as_bytes(),
            at: 0,
        }
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[inline]
    fn next(&mut self) -> Option<u8> {
        let byte = self.peek();
        self.at += 1;
        byte
    }

    #[inline]
    fn space(&mut self) {
        let mut run = 0;
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
            run += 1;
            if run == LONG_RUN {
                self.blanks();
                run = 0;
            }
        }
    }

    /// Skips blanks, eight bytes at a time.
    #[cold]
    fn blanks(&mut self) {
        const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
        const ONES: u64 = 0x0101_0101_0101_0101;
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        for chunk in rest.as_chunks::<8>().0 {
            let word = u64::from_le_bytes(*chunk);
            // The high bit of each byte that is not `byte`.
            let differs = |byte: u8| {
                let x = word ^ (ONES * u64::from(byte));
                ((x & LOW) + LOW) | x
            };
            let other = differs(b' ') & differs(b'\t') & differs(b'\n') & differs(b'\r');
            if other & !LOW != 0 {
                return;
            }
            self.at += 8;
        }
    }

    fn error(&self, what: &'static str) -> ScanError {
        ScanError {
            offset: self.at.min(self.bytes.len()),
            what,
        }
    }

    fn error_before(&self, what: &'static str) -> ScanError {
        ScanError {
            offset: self.at.saturating_sub(1).min(self.bytes.len()),
            what,
        }
    }

    fn end(&mut self) -> Result<(), ScanError> {
        self.space();
        if self.at < self.bytes.len() {
            return Err(self.error("trailing characters after the JSON value"));
        }
        Ok(())
    }

    /// A key with its colon, inside a value.
    fn key(&mut self) -> Result<(), ScanError> {
        self.key_here().map(|_| ())
    }

    /// A key with its colon: where its closing quote is, and how it is written.
    #[inline(always)]
    fn key_here(&mut self) -> Result<(usize, Spelling), ScanError> {
        if self.peek() != Some(b'"') {
            return Err(self.error("expected a string as key"));
        }
        let spelling = self.string()?;
        let key = (self.at - 1, spelling);
        self.colon()?;
        Ok(key)
    }

    /// The colon behind a key.
    #[inline(always)]
    fn colon(&mut self) -> Result<(), ScanError> {
        // A space here is rare.
        if self.peek() == Some(b':') {
            self.at += 1;
            return Ok(());
        }
        self.space();
        if self.next() != Some(b':') {
            return Err(self.error_before("expected ':' after a key"));
        }
        Ok(())
    }

    /// The opening quote of a key.
    fn open_key(&mut self) -> Result<(), ScanError> {
        if self.peek() != Some(b'"') {
            return Err(self.error("expected a string as key"));
        }
        self.at += 1;
        Ok(())
    }

    /// One value; `depth` counts the containers that are already open around it.
    #[inline]
    fn value(&mut self, depth: u32) -> Result<(), ScanError> {
        let mut nest = Nest::new(depth);
        self.nested::<false>(&mut nest, usize::MAX).map(drop)
    }

    /// The rest of one value. If it is `SLICED`, it stops behind `until`, before an inner value or
    /// behind an escape of a string, and returns false.
    #[inline]
    fn nested<const SLICED: bool>(
        &mut self,
        nest: &mut Nest,
        until: usize,
    ) -> Result<bool, ScanError> {
        let Nest {
            base,
            mut depth,
            mut open,
            mut within,
        } = *nest;
        loop {
            if SLICED {
                let stops = match within {
                    Within::Nothing => self.at >= until,
                    Within::Key | Within::Text => !self.string_until(until)?,
                };
                if stops {
                    *nest = Nest {
                        base,
                        depth,
                        open,
                        within,
                    };
                    return Ok(false);
                }
                if within == Within::Key {
                    self.colon()?;
                    within = Within::Nothing;
                }
            }
            if !SLICED || within == Within::Nothing {
                self.space();
            }
            match self.peek() {
                // A string that went over several slices is complete.
                _ if SLICED && within == Within::Text => within = Within::Nothing,
                Some(b'"') if SLICED => {
                    self.at += 1;
                    within = Within::Text;
                    continue;
                }
                Some(b'"') => {
                    self.string()?;
                }
                Some(first @ (b'{' | b'[')) => {
                    if depth >= JSON_DEPTH_MAX {
                        return Err(self.error(TOO_DEEP));
                    }
                    self.at += 1;
                    depth += 1;
                    let is_object = first == b'{';
                    open = (open << 1) | u128::from(is_object);
                    self.space();
                    // In ASCII each closing bracket is its opening one plus two.
                    if self.peek() == Some(first + 2) {
                        self.at += 1;
                        depth -= 1;
                        open >>= 1;
                    } else {
                        if is_object && SLICED {
                            self.open_key()?;
                            within = Within::Key;
                        } else if is_object {
                            self.key()?;
                        }
                        continue;
                    }
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.literal("true")?,
                Some(b'f') => self.literal("false")?,
                Some(b'n') => self.literal("null")?,
                Some(_) => return Err(self.error("expected a JSON value")),
                None => return Err(self.error("the JSON text ends too early")),
            }
            // A value is complete: close the containers that end here, or go on to the next member.
            loop {
                if depth == base {
                    return Ok(true);
                }
                self.space();
                let is_object = open & 1 == 1;
                match (self.next(), is_object) {
                    (Some(b','), true) => {
                        self.space();
                        if SLICED {
                            self.open_key()?;
                            within = Within::Key;
                        } else {
                            self.key()?;
                        }
                        break;
                    }
                    (Some(b','), false) => break,
                    (Some(b'}'), true) | (Some(b']'), false) => {
                        depth -= 1;
                        open >>= 1;
                    }
                    (None, _) => return Err(self.error_before("the JSON text ends too early")),
                    (_, true) => return Err(self.error_before("expected ',' or '}'")),
                    (_, false) => return Err(self.error_before("expected ',' or ']'")),
                }
            }
        }
    }

    /// A string, from its opening quote past its closing one.
    #[inline(always)]
    fn string(&mut self) -> Result<Spelling, ScanError> {
        self.at += 1;
        self.plain();
        if self.peek() == Some(b'"') {
            self.at += 1;
            return Ok(Spelling::Plain);
        }
        self.rest_of_string()
    }

    /// The rest of a string, past its closing quote; false if it stopped behind `until`.
    fn string_until(&mut self, until: usize) -> Result<bool, ScanError> {
        loop {
            self.plain();
            match self.next() {
                Some(b'"') => return Ok(true),
                Some(b'\\') => self.escape()?,
                Some(_) => return Err(self.error_before("control character in a string")),
                None => return Err(self.error_before("the JSON text ends inside a string")),
            }
            if self.at >= until {
                return Ok(false);
            }
        }
    }

    /// Handles the first byte of a string that is neither ordinary text nor the closing quote.
    fn rest_of_string(&mut self) -> Result<Spelling, ScanError> {
        loop {
            match self.next() {
                Some(b'"') => return Ok(Spelling::Escaped),
                Some(b'\\') => self.escape()?,
                Some(_) => return Err(self.error_before("control character in a string")),
                None => return Err(self.error_before("the JSON text ends inside a string")),
            }
            self.plain();
        }
    }

    /// Skips ordinary text, eight bytes at a time.
    #[inline(always)]
    fn plain(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGH: u64 = 0x8080_8080_8080_8080;
        let mut rest = self.bytes.get(self.at..).unwrap_or_default();
        while let Some((chunk, behind)) = rest.split_first_chunk::<8>() {
            let word = u64::from_le_bytes(*chunk);
            // The classic "byte less than" and "byte is zero" tricks; bytes of 0x80 and above pass.
            let control = word.wrapping_sub(ONES * 0x20);
            let quote = (word ^ (ONES * b'"' as u64)).wrapping_sub(ONES);
            let slash = (word ^ (ONES * b'\\' as u64)).wrapping_sub(ONES);
            let special = (control | quote | slash) & !word & HIGH;
            if special != 0 {
                // The lowest set bit is exact: borrows only disturb bytes above the first match.
                self.at = self.bytes.len() - rest.len() + (special.trailing_zeros() / 8) as usize;
                return;
            }
            rest = behind;
        }
        self.at = self.bytes.len() - rest.len();
        while let Some(byte) = self.peek() {
            if byte < 0x20 || byte == b'"' || byte == b'\\' {
                return;
            }
            self.at += 1;
        }
    }

    fn escape(&mut self) -> Result<(), ScanError> {
        match self.next() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(()),
            Some(b'u') => {
                // An unpaired surrogate is allowed too, as in the grammar (RFC 8259, section 8.2):
                // Python and Node send such file names.
                self.hex4()
            }
            _ => Err(self.error_before("unknown escape in a string")),
        }
    }

    fn hex4(&mut self) -> Result<(), ScanError> {
        for _ in 0..4 {
            if !self.next().is_some_and(|b| b.is_ascii_hexdigit()) {
                return Err(self.error_before("expected four hex digits"));
            }
        }
        Ok(())
    }

    #[inline]
    fn number(&mut self) -> Result<(), ScanError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        match self.next() {
            Some(b'0') => {}
            Some(b'1'..=b'9') => self.digits(),
            _ => return Err(self.error_before("expected a digit")),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.some_digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.some_digits()?;
        }
        Ok(())
    }

    #[inline]
    fn digits(&mut self) {
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
    }

    fn some_digits(&mut self) -> Result<(), ScanError> {
        if !matches!(self.peek(), Some(b'0'..=b'9')) {
            return Err(self.error("expected a digit"));
        }
        self.digits();
        Ok(())
    }

    fn literal(&mut self, word: &'static str) -> Result<(), ScanError> {
        if !self.bytes[self.at..].starts_with(word.as_bytes()) {
            return Err(self.error("expected a JSON value"));
        }
        self.at += word.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(text: &str, valid: bool) {
        assert_eq!(value(text).is_ok(), valid, "{text:?}: {:?}", value(text));
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(text).is_ok(),
            valid,
            "{text:?}"
        );
    }

    #[test]
    fn the_grammar() {
        for good in [
            "0",
            "-0",
            "1.5e+10",
            "-12.25E-3",
            "true",
            "false",
            "null",
            "\"\"",
            "\"aé\\n\\u00e9\\ud83d\\ude00\"",
            "[]",
            "{}",
            " [ 1 , 2 ] ",
            "{\"a\":{\"b\":[{}]}}",
            "\"12345678\\\"12345678\"",
            "\t\r\n1",
        ] {
            check(good, true);
        }
        for bad in [
            "",
            "01",
            "1.",
            "1e",
            "-",
            "+1",
            "tru",
            "nulll",
            "\"",
            "\"\\x\"",
            "\"a\nb\"",
            "[1,]",
            "{,}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "[1 2]",
            "{a:1}",
            "1 2",
            "[}",
            "{]",
            "\"\u{1}\"",
            "\"123456789\u{1f}\"",
            "NaN",
            "[",
            "{\"a\":[",
            "'a'",
            "\u{feff}1",
        ] {
            check(bad, false);
        }
    }

    #[test]
    fn half_a_surrogate_pair_is_within_the_grammar() {
        for text in [
            "\"\\ud800\"",
            "\"\\uDC00\"",
            "\"\\ud800\\u0041\"",
            "\"caf\\udce9.txt\"",
        ] {
            assert!(value(text).is_ok(), "{text}");
        }
        assert!(value("\"\\ud80\"").is_err());
    }

    #[test]
    fn depth_is_bounded_at_128() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(value(&nested(128)).is_ok());
        assert_eq!(value(&nested(129)).map_err(|e| e.offset), Err(128));
        assert!(value_within(&nested(60), 60).is_ok());
        assert!(value_within(&nested(61), 60).is_err());
        // What is outermost is remembered to the end.
        let objects = |close: &str| format!("{}1{}{close}", "{\"a\":".repeat(128), "}".repeat(127));
        assert!(value(&objects("}")).is_ok());
        assert!(value(&objects("]")).is_err());
        assert!(value(&"[".repeat(1_000_000)).is_err());
        let in_object = |n: usize| format!("{{\"a\":{}}}", nested(n));
        let scan = |text: &str| object::<ScanError>(text, |_, _| Ok(()));
        assert!(scan(&in_object(128)).is_ok());
        assert!(scan(&in_object(129)).is_err());
    }

    #[test]
    fn long_runs_of_blanks_are_skipped() {
        for blanks in ["    ", "\t\n\r ", "\n\n\n\n", " \n\t\t"] {
            for n in 0..40 {
                let run = &blanks.repeat(20)[..n + 40];
                assert!(value(&format!("{run}[{run}1{run},{run}2{run}]{run}")).is_ok());
                assert!(value(&format!("{run}\u{b}{run}1")).is_err());
                assert!(value(&format!("[1{run}x]")).is_err());
            }
        }
    }

    #[test]
    fn long_strings_and_keys_are_scanned_in_slices() {
        let escapes = "\\n".repeat(2000);
        let json =
            format!("{{\"{escapes}\":{{\"{escapes}\":[\"{escapes}\",1]}},\"b\":\"{escapes}\"}}");
        let mut ahead = Ahead::default();
        let mut steps = 1;
        while !ahead.step(json.as_bytes(), 1000) {
            steps += 1;
        }
        assert_eq!(ahead.failed, None);
        assert!((14..20).contains(&steps), "{steps}");
    }

    #[test]
    fn fields_come_with_their_raw_text() {
        let mut fields = Vec::new();
        object::<ScanError>(" { \"a\" : [1, 2] , \"b\\n\":\"x\" } ", |k, v| {
            fields.push((k.to_owned(), v.to_owned()));
            Ok(())
        })
        .unwrap();
        assert_eq!(
            fields,
            [
                ("a".into(), "[1, 2]".into()),
                ("b\\n".into(), "\"x\"".into())
            ]
        );
    }

    proptest! {
        /// The scanner and serde_json agree about every text made of JSON's own characters.
        #[test]
        fn matches_serde_json(text in "[\\[\\]{}:,\"\\\\u0-9a-f.eE+\\- tnrlse\u{1}é]{0,40}") {
            let ours = value(&text).is_ok();
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            // serde_json also refuses numbers beyond f64 and unpaired surrogates; the grammar does
            // not.
            let is_stricter = theirs.as_ref().is_err_and(|e| {
                let why = e.to_string();
                ["out of range", "surrogate", "unexpected end of hex escape"]
                    .iter()
                    .any(|known| why.contains(known))
            });
            let agrees = ours == theirs.is_ok();
            prop_assert!((is_stricter && ours) || agrees, "{text:?}: {ours} {theirs:?}");
        }

        /// Whatever serde_json writes, the scanner accepts, and field texts parse back to the same
        /// values.
        #[test]
        fn accepts_what_serde_json_writes(
            keys in proptest::collection::vec(".{0,12}", 0..6),
            n in any::<i64>(),
        ) {
            let mut map = serde_json::Map::new();
            for key in keys {
                map.insert(key.clone(), serde_json::json!([key, n, {"k": key}]));
            }
            let text = serde_json::to_string(&map).unwrap();
            let mut seen = serde_json::Map::new();
            object::<ScanError>(&text, |k, v| {
                let key: String = serde_json::from_str(&format!("\"{k}\"")).unwrap();
                seen.insert(key, serde_json::from_str(v).unwrap());
                Ok(())
            }).unwrap();
            prop_assert_eq!(seen, map);
        }
    }
}
