//! Keys, proofs and sealing of encrypted pools, exact to the byte.
//!
//! Everything here is a function of its arguments: no IO, no clock, no randomness, no threads.
//! Nonces, secrets and the time come from the caller, so a server that only checks proofs, a
//! client, a tool and a simulator share one implementation, and a test can replay it. It knows
//! nothing of sockets, messages, or who asks.
//!
//! - [`keys`]: the keys of a pool, their tokens and what is derived from them
//! - [`descriptor`]: the public, signed description of a pool; creation, rotation and acceptance
//! - [`proof`]: joining a pool, app keys, and the mutual proof of administrators
//! - [`block`]: blocks in chunks under a signed manifest
//! - [`envelope`]: one sealed event, call or answer
//! - [`events`]: the state of senders and receivers, against replay and re-routing
//! - [`xaes`] and [`backend`]: the cipher, and the two libraries that can provide it
//!
//! Secrets are wiped when dropped, and no type that holds a key can be printed, except the text of
//! a token. Errors never quote their input.

pub mod app_key;
pub mod backend;
pub mod block;
mod bytes;
pub mod descriptor;
pub mod envelope;
pub mod epochs;
pub mod events;
pub mod keys;
pub mod meta;
pub mod passphrase;
pub mod proof;
pub mod sign;
pub mod text;
pub mod xaes;

/// Wipes its content when dropped.
pub use zeroize::Zeroizing;

use bytes::Bytes;
use keys::Secret;

/// How blocks and events of a pool are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Suite {
    /// Blocks and events are sealed.
    Sealed = 0x0001,
    /// Events are sealed; blocks are plain, and the keys decide who may access their memory.
    Gated = 0x0101,
}

impl Suite {
    /// Converts a suite's number. Any other number is a downgrade, or a newer version.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        match number {
            0x0001 => Some(Suite::Sealed),
            0x0101 => Some(Suite::Gated),
            _ => None,
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// The protocol version that proofs are bound to.
pub const PROTO: u16 = 1;

/// The longest name in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Whether `name` is 1 to 255 bytes without control characters.
///
/// Names are compared byte by byte, because normalization differs between Unicode implementations.
#[must_use]
pub fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// HKDF-SHA256, extract and expand: 32 bytes.
fn derive(salt: &[u8; 32], ikm: &[u8], info: &[u8]) -> Secret {
    expand_by(&hkdf::Hkdf::new(Some(salt), ikm), info)
}

/// HKDF-SHA256, expand only: 32 bytes from a key that is already uniform.
fn expand(key: &[u8; 32], info: &[u8]) -> Secret {
    let key = hkdf::Hkdf::from_prk(key).expect("a key has the length of a hash");
    expand_by(&key, info)
}

fn expand_by(key: &hkdf::Hkdf<sha2::Sha256>, info: &[u8]) -> Secret {
    let expanded = Secret::filled(|out| key.expand(info, out));
    expanded.expect("32 bytes are within HKDF's limit")
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    backend::preferred().sha256(&[bytes])
}

/// SHA-256 of the written bytes.
fn hash(bytes: &Bytes) -> [u8; 32] {
    sha256(bytes.as_slice())
}
