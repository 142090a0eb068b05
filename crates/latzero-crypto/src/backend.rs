//! The two libraries that can do the heavy work, behind one trait.
//!
//! Both give the same bytes; the tests run every vector on each. Signatures, key derivation and the
//! subkeys of XAES-256-GCM are the same code on both.

#[cfg(feature = "aws-lc")]
mod aws_lc;
mod rust_crypto;

#[cfg(feature = "aws-lc")]
pub use aws_lc::AwsLc;
pub use rust_crypto::RustCrypto;

/// The length of an authentication tag in bytes.
pub const TAG_BYTES: usize = 16;

/// What a library has to provide.
pub trait Backend: Sync {
    /// The library's name.
    fn name(&self) -> &'static str;

    /// Encrypts `data` in place with AES-256-GCM, and gives its tag. At most 64 GiB.
    fn seal(
        &self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES];

    /// Decrypts `sealed`, ciphertext and then tag, in place. On success the plaintext stands before
    /// the tag's place; otherwise the content of `sealed` is unspecified and must not be used.
    #[must_use]
    fn open(&self, key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], sealed: &mut [u8]) -> bool;

    /// SHA-256 of the parts, one after the other.
    fn sha256(&self, parts: &[&[u8]]) -> [u8; 32];
}

/// The fastest that this build has.
#[must_use]
pub fn preferred() -> &'static dyn Backend {
    #[cfg(feature = "aws-lc")]
    return &AwsLc;
    #[cfg(not(feature = "aws-lc"))]
    return &RustCrypto;
}

/// All that this build has, for tests and measurements.
#[must_use]
pub fn all() -> &'static [&'static dyn Backend] {
    &[
        #[cfg(feature = "aws-lc")]
        &AwsLc,
        &RustCrypto,
    ]
}
