//! RustCrypto: builds on every platform that Rust supports.

use aes_gcm::aead::AeadInOut as _;
use aes_gcm::{Aes256Gcm, KeyInit as _};
use sha2::{Digest as _, Sha256};

use super::{Backend, TAG_BYTES};

/// AES-256-GCM and SHA-256 by RustCrypto.
#[derive(Debug, Clone, Copy)]
pub struct RustCrypto;

impl Backend for RustCrypto {
    fn name(&self) -> &'static str {
        "rust-crypto"
    }

    fn seal(
        &self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        Aes256Gcm::new(key.into())
            .encrypt_inout_detached(nonce.into(), aad, data.into())
            .expect("the limits of messages and chunks are below those of GCM")
            .into()
    }

    fn open(&self, key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], sealed: &mut [u8]) -> bool {
        let Some(at) = sealed.len().checked_sub(TAG_BYTES) else {
            return false;
        };
        let (data, tag) = sealed.split_at_mut(at);
        let tag: &[u8; TAG_BYTES] = (&*tag).try_into().expect("split at the tag");
        Aes256Gcm::new(key.into())
            .decrypt_inout_detached(nonce.into(), aad, data.into(), tag.into())
            .is_ok()
    }

    fn sha256(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update(part);
        }
        hash.finalize().into()
    }
}
