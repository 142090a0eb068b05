//! Keys of encrypted pools and of apps, in files and variables.
//!
//! A key file is a regular file of its user that nobody else may read. Keys are never printed or
//! sent.

use std::fs::OpenOptions;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use latzero_crypto::app_key;
use latzero_crypto::descriptor::{Descriptor, NewPool};
use latzero_crypto::keys::{KeySet, Kind};
use latzero_crypto::{Suite, Zeroizing, passphrase, text};
use latzero_protocol::{Code, Ran};
use serde_json::{Value, json};

use crate::error::Error;

/// A key file has at most this many bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The keys of an encrypted pool: those for joining, reading and writing, or some of them.
#[derive(Clone)]
pub struct Keys(pub(crate) Arc<KeySet>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

impl Keys {
    /// Reads a key file: one token per line.
    ///
    /// # Errors
    /// `key_format` if it is not a key file, or others may read it.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Keys, Error> {
        let path = path.as_ref();
        let set = KeySet::from_file(&read(path)?).map_err(|e| bad(path, &e.to_string()))?;
        Ok(Keys(Arc::new(set)))
    }

    /// Reads tokens.
    ///
    /// # Errors
    /// `key_format` if one is not a token, or they do not belong together.
    pub fn from_tokens<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Result<Keys, Error> {
        let set = KeySet::from_tokens(tokens);
        let set = set.map_err(|error| Error::new(Code::KeyFormat, error.to_string()))?;
        Ok(Keys(Arc::new(set)))
    }

    /// Takes keys without tokens, of 32 random bytes each, that another program stores. They do not
    /// say who owns the pool, so the first owner that a server names is trusted, and nothing is
    /// stored between processes.
    ///
    /// # Errors
    /// `key_format` if a key does not have 32 bytes, or they are text.
    pub fn from_raw(
        sigil: &[u8],
        shard: Option<&[u8]>,
        seal: Option<&[u8]>,
    ) -> Result<Keys, Error> {
        let shard = shard.map(|bytes| (Kind::Shard, bytes));
        let seal = seal.map(|bytes| (Kind::Seal, bytes));
        let keys: Vec<_> = [(Kind::Sigil, sigil)]
            .into_iter()
            .chain(shard)
            .chain(seal)
            .collect();
        let set = KeySet::from_raw(&keys);
        let set = set.map_err(|error| Error::new(Code::KeyFormat, error.to_string()))?;
        Ok(Keys(Arc::new(set)))
    }

    /// Derives all three keys of a pool from a passphrase, as `latzero keys from-passphrase` does.
    /// It takes 64 MiB of memory and a second or two. Anyone with a copy of the server's data
    /// directory can guess the passphrase, so prefer random keys.
    ///
    /// # Errors
    /// `overloaded` if the memory is not available.
    pub fn from_passphrase(pool: &str, passphrase: &str) -> Result<Keys, Error> {
        let set = passphrase::keys(pool, passphrase.as_bytes());
        let set = set.map_err(|error| Error::new(Code::Overloaded, error.to_string()))?;
        Ok(Keys(Arc::new(set)))
    }

    /// The request that creates an encrypted pool with these keys, which must be all three. In a
    /// gated pool blocks are not encrypted, and the keys decide who can open them.
    ///
    /// # Errors
    /// `key_format` if a key is missing.
    pub fn pool_create(&self, pool: &str, is_gated: bool) -> Result<Value, Error> {
        let new = NewPool {
            name: pool,
            suite: if is_gated {
                Suite::Gated
            } else {
                Suite::Sealed
            },
            pool_id: random()?,
            salt: random()?,
            created_ms: now_ms(),
            wrap_nonce: random()?,
        };
        let descriptor = Descriptor::create(&self.0, &new);
        let descriptor =
            descriptor.map_err(|error| Error::new(Code::KeyFormat, error.to_string()))?;
        Ok(json!({
            "action": "pool_create", "pool": pool, "encrypted": true,
            "descriptor": text::encode(descriptor.as_bytes()),
            "memory": if is_gated { "gated" } else { "sealed" },
        }))
    }
}

/// The key that reserves an AppID for its holder.
#[derive(Clone)]
pub struct AppKey(pub(crate) Arc<app_key::AppKey>);

impl std::fmt::Debug for AppKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AppKey(..)")
    }
}

impl AppKey {
    /// Reads the file that `latzero app key new` writes.
    ///
    /// # Errors
    /// `key_format` if it is not a key, or others may read it.
    pub fn from_file(path: impl AsRef<Path>) -> Result<AppKey, Error> {
        let path = path.as_ref();
        let bytes = read(path)?;
        let line = std::str::from_utf8(&bytes).map_err(|_| bad(path, "it is no text"))?;
        let key = app_key::AppKey::parse(line).map_err(|e| bad(path, &e.to_string()))?;
        Ok(AppKey(Arc::new(key)))
    }
}

fn bad(path: &Path, why: &str) -> Error {
    let text = format!("{} can't be used as a key file: {why}", path.display());
    Error::new(Code::KeyFormat, text)
}

/// Reads a file that only its user may read, without following a link.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|e| bad(path, &e.to_string()).with_source(e))?;
    let metadata = file.metadata().map_err(|e| bad(path, &e.to_string()))?;
    if !metadata.is_file() {
        return Err(bad(path, "it is not a regular file"));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(bad(path, "it belongs to another user"));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(bad(path, "other users may read it; `chmod 600` it"));
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .map_err(|e| bad(path, &e.to_string()))?;
    Ok(bytes)
}

/// Random bytes, each time from the kernel, so that a fork does not repeat them.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                let failed = Error::new(Code::Internal, "the kernel gives no random bytes");
                return Err(failed.with_ran(Ran::No).with_source(error));
            }
        }
    }
    Ok(bytes)
}

/// The time in Unix milliseconds.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
