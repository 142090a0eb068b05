//! The pin of a server: a hash of its public key, short enough to be compared by eye.

use std::fmt;
use std::str::FromStr;

use latzero_crypto::text;
use rustls::pki_types::CertificateDer;
use rustls::server::ParsedCertificate;

/// SHA-256 over a certificate's SubjectPublicKeyInfo. A certificate that is renewed with the same
/// key keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pin([u8; 32]);

/// The error for text that is not a pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a pin has 43 characters from A-Z, a-z, 0-9, '-' and '_', as `latzero status` shows it on the \
     server"
)]
pub struct NoPin;

impl Pin {
    /// The pin of a certificate.
    ///
    /// # Errors
    /// If it is not an X.509 version 3 certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Pin, rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let key = parsed.subject_public_key_info();
        Ok(Pin(latzero_crypto::sha256(&key)))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&text::encode(&self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

impl FromStr for Pin {
    type Err = NoPin;

    fn from_str(text: &str) -> Result<Pin, NoPin> {
        text::decode(text).map(Pin).ok_or(NoPin)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says where by panicking")]

    use super::*;

    #[test]
    fn a_token_has_43_characters_and_round_trips() {
        let pin = Pin([7; 32]);
        let text = pin.to_string();
        assert_eq!(text.len(), 43);
        assert_eq!(text.parse::<Pin>().unwrap(), pin);
        for bad in [
            "",
            "abc",
            &text[..42],
            &format!("{text}A"),
            &text.replace('B', "+"),
        ] {
            assert_eq!(bad.parse::<Pin>(), Err(NoPin), "{bad}");
        }
    }
}
