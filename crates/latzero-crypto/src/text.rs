//! The text form of bytes: base64url without padding, with exactly one text for each value.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

use crate::app_key;
use crate::keys::Kind;

/// Writes bytes as text.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Decodes text of exactly `N` bytes. Padding, other characters, unused bits that are not 0 and
/// other lengths are refused. The length is checked first, so nothing large is decoded.
#[must_use]
pub fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    decode_secret(text).map(|bytes| *bytes)
}

/// Decodes text of at most `max` bytes, by the same rules.
#[must_use]
pub fn decode_within(text: &str, max: usize) -> Option<Vec<u8>> {
    if text.len() > (max * 8).div_ceil(6) {
        return None;
    }
    URL_SAFE_NO_PAD.decode(text).ok()
}

/// As [`decode`], for secrets.
pub(crate) fn decode_secret<const N: usize>(text: &str) -> Option<Zeroizing<[u8; N]>> {
    if text.len() != (N * 8).div_ceil(6) {
        return None;
    }
    let mut bytes = Zeroizing::new([0; N]);
    let written = URL_SAFE_NO_PAD
        .decode_slice_unchecked(text, &mut *bytes)
        .ok()?;
    (written == N).then_some(bytes)
}

/// Where the first prefix of a token or an app key ends.
fn prefix_in(text: &str) -> Option<usize> {
    let prefixes = Kind::ALL.map(Kind::prefix).into_iter();
    let ends = prefixes.chain([app_key::PREFIX]);
    ends.filter_map(|prefix| Some(text.find(prefix)? + prefix.len()))
        .min()
}

/// Whether a text contains what looks like a token or an app key.
#[must_use]
pub fn holds_token(text: &str) -> bool {
    prefix_in(text).is_some()
}

/// Hides the tokens in a text that people or programs will read, such as an error: somebody may
/// have given one in the place of a file's name. Of a token its kind stays, so that the text still
/// says what was given.
#[must_use]
pub fn redact(text: &str) -> Cow<'_, str> {
    let Some(mut end) = prefix_in(text) else {
        return Cow::Borrowed(text);
    };
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    loop {
        out.push_str(&rest[..end]);
        let after = &rest[end..];
        rest = after.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-_".contains(c));
        out.push_str(if rest.len() < after.len() { "..." } else { "" });
        match prefix_in(rest) {
            Some(next) => end = next,
            None => {
                out.push_str(rest);
                return Cow::Owned(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_has_one_text() {
        assert_eq!(encode(&[0xfb, 0xff]), "-_8");
        assert_eq!(decode::<2>("-_8"), Some([0xfb, 0xff]));
        // Another alphabet, padding, non-zero unused bits, spaces, wrong lengths, other scripts.
        for text in ["+/8", "-_8=", "-_9", "-_ ", " -_", "", "-_8A", "-_", "é8"] {
            assert_eq!(decode::<2>(text), None, "{text}");
        }
    }

    #[test]
    fn tokens_are_hidden() {
        let same = ["", "l", "lzs", "lzs1", "lzx1_abc", "é lzs2_é"];
        for text in same {
            assert_eq!(redact(text), text);
        }
        assert_eq!(redact("lzs1_"), "lzs1_");
        assert_eq!(redact("no file 'lzo1_aB-_9'"), "no file 'lzo1_...'");
        let two = "élzc1_abc,lzw1_d\u{e9} lza1_lzs1_x";
        assert_eq!(redact(two), "élzc1_...,lzw1_...\u{e9} lza1_...");
    }
}
