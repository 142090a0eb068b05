//! The two libraries that can provide the ciphers and hashes, behind one trait.
//!
//! Both produce the same bytes; the tests run every vector on each. Signatures, key derivation and
//! the subkeys of XAES-256-GCM use the same code with both.

#[cfg(feature = "aws-lc")]
mod aws_lc;
mod rust_crypto;

#[cfg(feature = "aws-lc")]
pub use aws_lc::AwsLc;
pub use rust_crypto::RustCrypto;

/// The length of an authentication tag in bytes.
pub const TAG_BYTES: usize = 16;

/// The operations of a library.
pub trait Backend: Sync {
    /// The library's name.
    fn name(&self) -> &'static str;

    /// Encrypts `data` in place with AES-256-GCM and returns its tag. At most 64 GiB.
    fn seal(
        &self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES];

    /// Decrypts `sealed`, ciphertext followed by tag, in place. On success the plaintext is in
    /// front of the tag; otherwise the content of `sealed` is unspecified and must not be used.
    #[must_use]
    fn open(&self, key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], sealed: &mut [u8]) -> bool;

    /// SHA-256 of the concatenated parts.
    fn sha256(&self, parts: &[&[u8]]) -> [u8; 32];
}

/// Of both, what is faster: RustCrypto prepares a key in less time, AWS-LC encrypts more bytes per
/// second. Each message has its own key.
#[cfg(feature = "aws-lc")]
#[derive(Debug, Clone, Copy)]
struct Faster;

/// Up to this many bytes RustCrypto is faster.
#[cfg(feature = "aws-lc")]
const SHORT_BYTES_MAX: usize = 512;

#[cfg(feature = "aws-lc")]
impl Backend for Faster {
    fn name(&self) -> &'static str {
        "faster"
    }

    fn seal(
        &self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        if data.len() <= SHORT_BYTES_MAX {
            RustCrypto.seal(key, nonce, aad, data)
        } else {
            AwsLc.seal(key, nonce, aad, data)
        }
    }

    fn open(&self, key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], sealed: &mut [u8]) -> bool {
        if sealed.len() <= SHORT_BYTES_MAX + TAG_BYTES {
            RustCrypto.open(key, nonce, aad, sealed)
        } else {
            AwsLc.open(key, nonce, aad, sealed)
        }
    }

    fn sha256(&self, parts: &[&[u8]]) -> [u8; 32] {
        AwsLc.sha256(parts)
    }
}

/// The fastest backend of this build.
#[must_use]
pub fn preferred() -> &'static dyn Backend {
    #[cfg(feature = "aws-lc")]
    return &Faster;
    #[cfg(not(feature = "aws-lc"))]
    return &RustCrypto;
}

/// All backends of this build, for tests and measurements.
#[must_use]
pub fn all() -> &'static [&'static dyn Backend] {
    &[
        #[cfg(feature = "aws-lc")]
        &Faster,
        #[cfg(feature = "aws-lc")]
        &AwsLc,
        &RustCrypto,
    ]
}
