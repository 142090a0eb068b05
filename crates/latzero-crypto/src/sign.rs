//! Signatures: Ed25519 with the strict rules, so that every implementation accepts the same ones.

use curve25519_dalek::edwards::CompressedEdwardsY;
use ed25519_dalek::{Signature, Signer as _, VerifyingKey};

/// A signature's bytes.
pub type SignatureBytes = [u8; 64];

/// A secret key. It is wiped when dropped.
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// The key of a seed; any 32 bytes are valid.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        SigningKey(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// The key that verifies what this one signs.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key())
    }

    /// Signs a message. The same message gives the same signature.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> SignatureBytes {
        self.0.sign(message).to_bytes()
    }
}

/// A public key that was checked: the canonical encoding of a point that is not of small order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(VerifyingKey);

impl PublicKey {
    /// Checks a key from an untrusted source.
    #[must_use]
    pub fn parse(bytes: &[u8; 32]) -> Option<Self> {
        let point = CompressedEdwardsY(*bytes).decompress()?;
        // `decompress` accepts two encodings of some points; only the canonical one is valid.
        if point.compress().as_bytes() != bytes || point.is_small_order() {
            return None;
        }
        VerifyingKey::from_bytes(bytes).ok().map(PublicKey)
    }

    /// The key's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// Whether `signature` is this key's signature of `message`. Malleable signatures are rejected,
    /// and signatures whose point is of small order or not canonically encoded.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &SignatureBytes) -> bool {
        let signature = Signature::from_bytes(signature);
        self.0.verify_strict(message, &signature).is_ok()
    }
}
