//! Keys from passphrases, for people who must type them. An attacker with the server's data can
//! guess them offline.

use zeroize::Zeroize as _;

use crate::bytes::Bytes;
use crate::hash;
use crate::keys::{KeySet, Kind, NewKeys, Secret};

/// Memory of one derivation in KiB. The parameters are fixed by the version of the label: no server
/// chooses them.
const MEMORY_KIB: u32 = 65_536;
const PASSES: u32 = 3;
const LANES: u32 = 4;

/// The warning that must be shown wherever a passphrase is used.
pub const WARNING: &str =
    "anyone with a copy of the server's data directory can guess the passphrase";

/// The salt of a key: the same everywhere, so that only the passphrase is needed.
#[must_use]
pub fn salt(kind: Kind, pool: &str) -> [u8; 16] {
    let hash = hash(
        &Bytes::label("passphrase")
            .u8(kind as u8)
            .prefixed(pool.as_bytes()),
    );
    hash[..16].try_into().expect("half of a hash")
}

/// Derives a key with Argon2id, using 64 MiB of memory and most of a second.
///
/// # Errors
/// If the memory is not available.
pub fn key(kind: Kind, pool: &str, passphrase: &[u8]) -> Result<Secret, OutOfMemory> {
    let params = argon2::Params::new(MEMORY_KIB, PASSES, LANES, Some(32)).expect("constants");
    let mut blocks: Vec<argon2::Block> = Vec::new();
    blocks
        .try_reserve_exact(params.block_count())
        .map_err(|_| OutOfMemory)?;
    blocks.resize(params.block_count(), argon2::Block::default());
    let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
    let salt = salt(kind, pool);
    let key = Secret::filled(|key| {
        argon2.hash_password_into_with_memory(passphrase, &salt, key, &mut blocks)
    });
    // The passphrase cannot be read from the blocks, but it could be guessed from them.
    blocks.zeroize();
    key.map_err(|_| OutOfMemory)
}

/// Derives all keys of a pool.
///
/// # Errors
/// If the memory is not available.
pub fn keys(pool: &str, passphrase: &[u8]) -> Result<KeySet, OutOfMemory> {
    Ok(KeySet::new_pool(NewKeys {
        sigil: key(Kind::Sigil, pool, passphrase)?,
        shard: key(Kind::Shard, pool, passphrase)?,
        seal: key(Kind::Seal, pool, passphrase)?,
        owner: None,
    }))
}

/// There is not enough memory for the derivation, or the passphrase has 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("64 MiB of memory are needed to derive a key from a passphrase")]
pub struct OutOfMemory;
