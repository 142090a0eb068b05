//! AWS-LC: faster than RustCrypto except for short messages, and the library that TLS uses.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::digest;

use super::{Backend, TAG_BYTES};

/// AES-256-GCM and SHA-256 by AWS-LC.
#[derive(Debug, Clone, Copy)]
pub struct AwsLc;

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("a key of 32 bytes"))
}

impl Backend for AwsLc {
    fn name(&self) -> &'static str {
        "aws-lc"
    }

    fn seal(
        &self,
        key: &[u8; 32],
        nonce: &[u8; 12],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_BYTES] {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = cipher(key)
            .seal_in_place_separate_tag(nonce, Aad::from(aad), data)
            .expect("the limits of messages and chunks are below those of GCM");
        tag.as_ref().try_into().expect("a tag of 16 bytes")
    }

    fn open(&self, key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], sealed: &mut [u8]) -> bool {
        let nonce = Nonce::assume_unique_for_key(*nonce);
        cipher(key)
            .open_in_place(nonce, Aad::from(aad), sealed)
            .is_ok()
    }

    fn sha256(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(part);
        }
        context
            .finish()
            .as_ref()
            .try_into()
            .expect("a hash of 32 bytes")
    }
}
