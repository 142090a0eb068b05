//! XAES-256-GCM as the C2SP specifies it: AES-256-GCM under its own key for each random
//! 24-byte nonce.
//!
//! Random nonces need no state, so forked workers and restored snapshots cannot repeat one, and
//! many writers share a key without a counter.

use aes::Aes256Enc;
use aes::cipher::{BlockCipherEncrypt as _, KeyInit as _};
use zeroize::{Zeroize as _, Zeroizing};

use crate::backend::{Backend, TAG_BYTES};

/// The length of a nonce in bytes.
pub const NONCE_BYTES: usize = 24;

/// A nonce, which the caller generates at random for each use.
pub type Nonce = [u8; NONCE_BYTES];

/// A key, ready for use.
pub struct Xaes {
    cipher: Aes256Enc,
    /// The first subkey of CMAC.
    k1: Zeroizing<[u8; 16]>,
    backend: &'static dyn Backend,
}

impl Xaes {
    /// Prepares a key.
    #[must_use]
    pub fn new(key: &[u8; 32], backend: &'static dyn Backend) -> Self {
        let cipher = Aes256Enc::new(key.into());
        let mut block = [0; 16].into();
        cipher.encrypt_block(&mut block);
        // Doubling in GF(2^128), without a branch on the secret's top bit.
        let doubled = u128::from_be_bytes(block.into());
        let doubled = (doubled << 1) ^ (0x87 * (doubled >> 127));
        block.zeroize();
        Xaes {
            cipher,
            k1: Zeroizing::new(doubled.to_be_bytes()),
            backend,
        }
    }

    /// Ciphertext and tag of `plain`.
    #[must_use]
    pub fn seal(&self, nonce: &Nonce, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut sealed = Vec::with_capacity(plain.len() + TAG_BYTES);
        sealed.extend_from_slice(plain);
        let (key, nonce) = self.split(nonce);
        let tag = self.backend.seal(&key, &nonce, aad, &mut sealed);
        sealed.extend_from_slice(&tag);
        sealed
    }

    /// Decrypts `sealed`, which is taken by value so that it cannot change between check and use.
    /// Returns nothing if the tag is wrong.
    #[must_use]
    pub fn open(&self, nonce: &Nonce, aad: &[u8], mut sealed: Vec<u8>) -> Option<Vec<u8>> {
        let length = sealed.len().checked_sub(TAG_BYTES)?;
        let (key, nonce) = self.split(nonce);
        if !self.backend.open(&key, &nonce, aad, &mut sealed) {
            sealed.zeroize();
            return None;
        }
        sealed.truncate(length);
        Some(sealed)
    }

    /// The key and the nonce of AES-256-GCM for a nonce.
    fn split(&self, nonce: &Nonce) -> (Zeroizing<[u8; 32]>, [u8; 12]) {
        let mut key = Zeroizing::new([0; 32]);
        for (i, half) in (1..).zip(key.chunks_exact_mut(16)) {
            let mut block = [0, i, b'X', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            block[4..].copy_from_slice(&nonce[..12]);
            for (byte, mask) in block.iter_mut().zip(*self.k1) {
                *byte ^= mask;
            }
            let mut block = block.into();
            self.cipher.encrypt_block(&mut block);
            half.copy_from_slice(&block);
            block.zeroize();
        }
        let rest = nonce[12..].try_into().expect("half of 24 bytes");
        (key, rest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend;

    #[test]
    fn a_sealed_message_opens_with_its_own_key_nonce_and_context_alone() {
        for &backend in backend::all() {
            let (key, other) = (Xaes::new(&[1; 32], backend), Xaes::new(&[2; 32], backend));
            let sealed = key.seal(&[3; 24], b"context", b"text");
            assert_eq!(
                key.open(&[3; 24], b"context", sealed.clone()).as_deref(),
                Some(&b"text"[..])
            );
            assert_eq!(other.open(&[3; 24], b"context", sealed.clone()), None);
            assert_eq!(key.open(&[4; 24], b"context", sealed.clone()), None);
            assert_eq!(key.open(&[3; 24], b"another", sealed.clone()), None);
            for bit in 0..sealed.len() * 8 {
                let mut changed = sealed.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(key.open(&[3; 24], b"context", changed), None, "bit {bit}");
            }
            for length in 0..sealed.len() {
                assert_eq!(
                    key.open(&[3; 24], b"context", sealed[..length].to_vec()),
                    None
                );
            }
        }
    }

    proptest! {
        #[test]
        fn back_ends_agree(
            key: [u8; 32],
            nonce: [u8; 24],
            aad: Vec<u8>,
            plain in prop::collection::vec(any::<u8>(), 0..3000),
        ) {
            let sealed: Vec<_> = backend::all()
                .iter()
                .map(|&backend| Xaes::new(&key, backend).seal(&nonce, &aad, &plain))
                .collect();
            for &backend in backend::all() {
                for sealed in &sealed {
                    let opened = Xaes::new(&key, backend).open(&nonce, &aad, sealed.clone());
                    prop_assert_eq!(opened.as_ref(), Some(&plain));
                }
                let parts: [&[u8]; 2] = [&aad, &plain];
                prop_assert_eq!(backend.sha256(&parts), backend::preferred().sha256(&parts));
            }
        }
    }
}
