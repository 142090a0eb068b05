//! The text form of bytes: base64url without padding, with exactly one text for each value.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use zeroize::Zeroizing;

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
}
