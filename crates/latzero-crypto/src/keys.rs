//! The keys of a pool: SigilKey joins, CipherShard reads, OblivionSeal writes; an owner key may
//! decide rotations.
//!
//! A key is passed around as a token, which contains its kind and the pin of the pool's owner, and
//! detects typing errors. Everything else is derived from the keys here, with a label for each use.

use std::fmt::Write as _;

use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::backend::{self, Backend};
use crate::bytes::Bytes;
use crate::sign::{PublicKey, SigningKey};
use crate::text;
use crate::xaes::Xaes;
use crate::{derive, expand, hash};

/// A secret of 32 bytes. It is wiped when dropped, and can't be printed or copied by accident.
pub struct Secret(Zeroizing<[u8; 32]>);

impl Secret {
    /// Wraps a secret. The caller must wipe its own copy.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Secret(Zeroizing::new(bytes))
    }

    /// Fills a secret in place, for example with random bytes.
    ///
    /// # Errors
    /// The errors of `fill`.
    pub fn filled<E>(fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Secret::new([0; 32]);
        fill(&mut secret.0[..])?;
        Ok(secret)
    }

    /// Copies a secret from a slice of 32 bytes.
    pub(crate) fn copied(bytes: &[u8]) -> Self {
        let mut secret = Secret::new([0; 32]);
        secret.0.copy_from_slice(bytes);
        secret
    }

    /// A second copy.
    pub(crate) fn again(&self) -> Self {
        Secret::copied(&self.0[..])
    }
}

impl std::ops::Deref for Secret {
    type Target = [u8; 32];

    fn deref(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Whose signature a pool's descriptor must carry: a short hash of the owner's public key.
pub type Pin = [u8; 16];

/// The length of a token in bytes.
pub const TOKEN_BYTES: usize = 75;

/// The largest key file.
pub const KEY_FILE_BYTES_MAX: usize = 64 << 10;

/// The kind of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// SigilKey: joins.
    Sigil = 1,
    /// CipherShard: reads, together with the sigil.
    Shard = 2,
    /// OblivionSeal: writes, together with both.
    Seal = 3,
    /// The optional owner key: required for creation and rotation.
    Owner = 4,
}

impl Kind {
    /// Every kind, in the order of a key file.
    pub const ALL: [Kind; 4] = [Kind::Sigil, Kind::Shard, Kind::Seal, Kind::Owner];

    /// The prefix of its tokens.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Kind::Sigil => "lzs1_",
            Kind::Shard => "lzc1_",
            Kind::Seal => "lzo1_",
            Kind::Owner => "lzw1_",
        }
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Sigil => "SigilKey",
            Kind::Shard => "CipherShard",
            Kind::Seal => "OblivionSeal",
            Kind::Owner => "owner key",
        }
    }
}

/// What can be proved: each role includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Roles {
    /// May be a member.
    Join = 1,
    /// May read too.
    Read = 3,
    /// May write too.
    Write = 7,
}

impl Roles {
    /// Converts the number on the wire: 1, 3 or 7.
    #[must_use]
    pub fn from_number(number: u64) -> Option<Self> {
        match number {
            1 => Some(Roles::Join),
            3 => Some(Roles::Read),
            7 => Some(Roles::Write),
            _ => None,
        }
    }

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// Why keys are rejected: `key_format`. No message quotes the rejected text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The wrong length for a token.
    #[error("a token has 75 characters; check that it was copied completely")]
    TokenLength,
    /// An unknown token prefix.
    #[error("a token begins with lzs1_, lzc1_, lzo1_ or lzw1_")]
    TokenPrefix,
    /// A key of another kind than required.
    #[error("this token is not a {}; one kind of key cannot replace another", .0.name())]
    WrongKind(Kind),
    /// Characters that are not allowed in a token.
    #[error("a token has letters, digits, '-' and '_' only; check that it was copied completely")]
    TokenText,
    /// The checksum is wrong.
    #[error("the token's checksum is wrong; it was mistyped or not copied completely")]
    Checksum,
    /// Tokens of two pools, or of a pool before and after its owner changed.
    #[error("the tokens belong to different owners; use tokens that were made together")]
    Pins,
    /// Two keys of one kind.
    #[error("there are two of the same kind: {}", .0.name())]
    Twice(Kind),
    /// A required key is missing.
    #[error("the {} is missing", .0.name())]
    Missing(Kind),
    /// A key that is too short.
    #[error(
        "a key has 32 random bytes, and this one is shorter; make keys with `latzero keys new`, \
         or derive them with `latzero keys from-passphrase`"
    )]
    TooShort,
    /// A key that is too long.
    #[error("a key has 32 bytes, and this one is longer; tokens are read as text, not as raw keys")]
    TooLong,
    /// A passphrase instead of a key.
    #[error(
        "these 32 bytes are text, not a random key; derive keys with `latzero keys \
             from-passphrase`"
    )]
    Passphrase,
    /// A key file that is not text, or is too large.
    #[error("a key file is UTF-8 text of at most 64 KiB, one token a line")]
    File,
    /// An app key that is not well formed.
    #[error("an app key is one line: lza1_ and 48 characters; check that it was copied completely")]
    AppKey,
}

/// Checks a raw key: exactly 32 bytes, which are not all printable.
///
/// # Errors
/// If the length is wrong, or the bytes look like a passphrase.
pub fn raw_key(bytes: &[u8]) -> Result<Secret, KeyError> {
    if bytes.len() < 32 {
        return Err(KeyError::TooShort);
    }
    let key: &[u8; 32] = bytes.try_into().map_err(|_| KeyError::TooLong)?;
    if key.iter().all(|byte| (0x20..=0x7e).contains(byte)) {
        return Err(KeyError::Passphrase);
    }
    Ok(Secret::copied(key))
}

/// A parsed token.
pub struct Token {
    /// What it is for.
    pub kind: Kind,
    /// The key.
    pub secret: Secret,
    /// The owner's pin.
    pub pin: Pin,
}

impl Token {
    /// Parses a token.
    ///
    /// # Errors
    /// If the text is not a valid token.
    pub fn parse(token: &str) -> Result<Self, KeyError> {
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| token.starts_with(kind.prefix()))
            .ok_or(KeyError::TokenPrefix)?;
        if token.len() != TOKEN_BYTES {
            return Err(KeyError::TokenLength);
        }
        let bytes = text::decode_secret::<52>(&token[5..]).ok_or(KeyError::TokenText)?;
        let (body, check) = bytes.split_at(48);
        if !bool::from(checksum(kind.prefix(), body).ct_eq(check)) {
            return Err(KeyError::Checksum);
        }
        let (secret, pin) = body.split_at(32);
        Ok(Token {
            kind,
            secret: Secret::copied(secret),
            pin: pin.try_into().expect("16 of 48 bytes"),
        })
    }

    /// Parses a token that must be of this kind.
    ///
    /// # Errors
    /// If the text is not a valid token, or is of another kind.
    pub fn parse_as(kind: Kind, token: &str) -> Result<Self, KeyError> {
        let token = Token::parse(token)?;
        if token.kind == kind {
            Ok(token)
        } else {
            Err(KeyError::WrongKind(kind))
        }
    }

    /// The token as text.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let body = Bytes::new().raw(&*self.secret).raw(&self.pin);
        with_checksum(self.kind.prefix(), body.as_slice())
    }
}

/// `prefix`, followed by `body` and its checksum as text.
pub(crate) fn with_checksum(prefix: &str, body: &[u8]) -> Zeroizing<String> {
    let check = checksum(prefix, body);
    let encoded = Zeroizing::new(text::encode(Bytes::new().raw(body).raw(&check).as_slice()));
    // One allocation, so that no part of the secret stays in another buffer.
    let mut token = Zeroizing::new(String::with_capacity(prefix.len() + encoded.len()));
    token.push_str(prefix);
    token.push_str(&encoded);
    token
}

pub(crate) fn checksum(prefix: &str, body: &[u8]) -> [u8; 4] {
    let hash = hash(&Bytes::new().raw(prefix.as_bytes()).raw(body));
    [hash[0], hash[1], hash[2], hash[3]]
}

/// The pin of an owner.
#[must_use]
pub fn pin_of(owner: &PublicKey) -> Pin {
    let hash = hash(&Bytes::label("pin").raw(&owner.to_bytes()));
    hash[..16].try_into().expect("half of a hash")
}

/// The secrets of a new pool, from the system's random generator.
pub struct NewKeys {
    /// SigilKey.
    pub sigil: Secret,
    /// CipherShard.
    pub shard: Secret,
    /// OblivionSeal.
    pub seal: Secret,
    /// The owner key, if rotations need a key of their own.
    pub owner: Option<Secret>,
}

/// The keys of one pool that a client has.
pub struct KeySet {
    keys: [Option<Secret>; 4],
    pin: Option<Pin>,
    backend: &'static dyn Backend,
}

impl KeySet {
    fn empty() -> Self {
        KeySet {
            keys: [None, None, None, None],
            pin: None,
            backend: backend::preferred(),
        }
    }

    /// The keys of a new pool, pinned to its owner.
    #[must_use]
    pub fn new_pool(keys: NewKeys) -> Self {
        let mut set = KeySet::empty();
        set.keys = [
            Some(keys.sigil),
            Some(keys.shard),
            Some(keys.seal),
            keys.owner,
        ];
        set.pin = set.owner_key().map(|owner| pin_of(&owner.public()));
        set
    }

    /// Parses tokens: at most one of each kind, all of one owner.
    ///
    /// # Errors
    /// If one is invalid, or they do not belong together.
    pub fn from_tokens<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Result<Self, KeyError> {
        let mut set = KeySet::empty();
        for token in tokens {
            let Token { kind, secret, pin } = Token::parse(token)?;
            set.put(kind, secret)?;
            if *set.pin.get_or_insert(pin) != pin {
                return Err(KeyError::Pins);
            }
        }
        if set.pin.is_none() {
            return Err(KeyError::Missing(Kind::Sigil));
        }
        Ok(set)
    }

    /// Parses a key file: one token per line; empty lines and lines that begin with `#` are
    /// ignored.
    ///
    /// # Errors
    /// If it is not text, has an invalid line, or its tokens do not belong together.
    pub fn from_file(text: &[u8]) -> Result<Self, KeyError> {
        if text.len() > KEY_FILE_BYTES_MAX {
            return Err(KeyError::File);
        }
        let text = std::str::from_utf8(text).map_err(|_| KeyError::File)?;
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self::from_tokens(lines)
    }

    /// Parses the tokens of an environment variable, separated by spaces.
    ///
    /// # Errors
    /// If one is invalid, or they do not belong together.
    pub fn from_variable(text: &str) -> Result<Self, KeyError> {
        Self::from_tokens(text.split(' ').filter(|token| !token.is_empty()))
    }

    /// Creates a set of raw keys. They have no pin, so the first owner seen must be trusted.
    ///
    /// # Errors
    /// If one is not a valid key ([`raw_key`]), or two are of the same kind.
    pub fn from_raw(keys: &[(Kind, &[u8])]) -> Result<Self, KeyError> {
        let mut set = KeySet::empty();
        for (kind, bytes) in keys {
            set.put(*kind, raw_key(bytes)?)?;
        }
        Ok(set)
    }

    fn put(&mut self, kind: Kind, secret: Secret) -> Result<(), KeyError> {
        let place = &mut self.keys[kind as usize - 1];
        if place.is_some() {
            return Err(KeyError::Twice(kind));
        }
        *place = Some(secret);
        Ok(())
    }

    /// The same keys, used with another library.
    #[must_use]
    pub fn with_backend(mut self, backend: &'static dyn Backend) -> Self {
        self.backend = backend;
        self
    }

    /// The owner's pin; `None` with raw keys.
    #[must_use]
    pub fn pin(&self) -> Option<Pin> {
        self.pin
    }

    /// Whether the set has a key of this kind.
    #[must_use]
    pub fn has(&self, kind: Kind) -> bool {
        self.keys[kind as usize - 1].is_some()
    }

    /// The highest role that these keys can prove.
    #[must_use]
    pub fn roles(&self) -> Option<Roles> {
        let [sigil, shard, seal, _] = Kind::ALL.map(|kind| self.has(kind));
        match (sigil, shard, seal) {
            (true, true, true) => Some(Roles::Write),
            (true, true, false) => Some(Roles::Read),
            (true, false, _) => Some(Roles::Join),
            (false, _, _) => None,
        }
    }

    /// The token of a key in this set; `None` for raw keys, which have no pin.
    #[must_use]
    pub fn token(&self, kind: Kind) -> Option<Zeroizing<String>> {
        let token = Token {
            kind,
            secret: self.keys[kind as usize - 1].as_ref()?.again(),
            pin: self.pin?,
        };
        Some(token.to_text())
    }

    /// The text of a key file with these kinds of keys.
    ///
    /// # Errors
    /// If the set lacks one of them.
    pub fn to_file(&self, kinds: &[Kind]) -> Result<Zeroizing<String>, KeyError> {
        let mut text = Zeroizing::new(String::with_capacity(kinds.len() * (TOKEN_BYTES + 1)));
        for kind in kinds {
            let token = self.token(*kind).ok_or(KeyError::Missing(*kind))?;
            writeln!(text, "{}", *token).expect("text is written to memory");
        }
        Ok(text)
    }

    pub(crate) fn require(&self, kind: Kind) -> Result<&Secret, KeyError> {
        self.keys[kind as usize - 1]
            .as_ref()
            .ok_or(KeyError::Missing(kind))
    }

    pub(crate) fn backend(&self) -> &'static dyn Backend {
        self.backend
    }

    fn signing(&self, kind: Kind, purpose: &str) -> Option<SigningKey> {
        let secret = self.require(kind).ok()?;
        Some(signing_key(&**secret, purpose))
    }

    /// Proves that its holder may join.
    #[must_use]
    pub fn join_key(&self) -> Option<SigningKey> {
        self.signing(Kind::Sigil, "sig/join")
    }

    /// Proves that its holder may read.
    #[must_use]
    pub fn read_key(&self) -> Option<SigningKey> {
        self.signing(Kind::Shard, "sig/read")
    }

    /// Proves that its holder may write. It signs only challenges, never content.
    #[must_use]
    pub fn write_key(&self) -> Option<SigningKey> {
        self.signing(Kind::Seal, "sig/write")
    }

    /// Signs content: block versions and privileged events. It signs no challenge.
    #[must_use]
    pub fn seal_key(&self) -> Option<SigningKey> {
        self.signing(Kind::Seal, "sig/seal")
    }

    /// Signs descriptors: the owner key if there is one, otherwise a key derived from all three
    /// keys.
    #[must_use]
    pub fn owner_key(&self) -> Option<SigningKey> {
        if let Some(key) = self.signing(Kind::Owner, "sig/owner") {
            return Some(key);
        }
        Some(signing_key(self.ikm3()?.as_slice(), "sig/owner"))
    }

    /// All three keys with their lengths, so that no other three keys give the same bytes.
    fn ikm3(&self) -> Option<Bytes> {
        Some(self.ikm2()?.prefixed(&**self.require(Kind::Seal).ok()?))
    }

    fn ikm2(&self) -> Option<Bytes> {
        let (sigil, shard) = (
            self.require(Kind::Sigil).ok()?,
            self.require(Kind::Shard).ok()?,
        );
        Some(Bytes::new().prefixed(&**sigil).prefixed(&**shard))
    }

    /// The pool key of an epoch, which writers derive and readers unwrap.
    #[must_use]
    pub fn pool_key(&self, epoch: &EpochId) -> Option<PoolKey> {
        let key = derive(
            &epoch.salt,
            self.ikm3()?.as_slice(),
            epoch.info("pool-key").as_slice(),
        );
        Some(PoolKey::new(key, self.backend))
    }

    /// The key under which an epoch's pool key is wrapped for readers.
    pub(crate) fn read_kek(&self, epoch: &EpochId) -> Option<Xaes> {
        Some(Xaes::new(&*self.read_kek_bytes(epoch)?, self.backend))
    }

    /// The same, as bytes, for vectors.
    #[doc(hidden)]
    #[must_use]
    pub fn read_kek_bytes(&self, epoch: &EpochId) -> Option<Secret> {
        Some(derive(
            &epoch.salt,
            self.ikm2()?.as_slice(),
            epoch.info("read-kek").as_slice(),
        ))
    }
}

fn signing_key(secret: &[u8], purpose: &str) -> SigningKey {
    SigningKey::from_seed(&derive(&[0; 32], secret, Bytes::label(purpose).as_slice()))
}

/// The inputs from which the keys of an epoch are derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochId {
    /// The pool's id, random at its creation.
    pub pool_id: [u8; 16],
    /// The epoch's number, from 1.
    pub epoch: u32,
    /// The epoch's salt, random.
    pub salt: [u8; 32],
}

impl EpochId {
    fn info(&self, purpose: &str) -> Bytes {
        Bytes::label(purpose).raw(&self.pool_id).u32(self.epoch)
    }
}

/// The pool key of one epoch, from which other keys are derived.
pub struct PoolKey {
    key: Secret,
    backend: &'static dyn Backend,
}

impl PoolKey {
    pub(crate) fn new(key: Secret, backend: &'static dyn Backend) -> Self {
        PoolKey { key, backend }
    }

    pub(crate) fn unwrapped(mut key: Vec<u8>, backend: &'static dyn Backend) -> Option<Self> {
        let taken = (key.len() == 32).then(|| Secret::copied(&key));
        key.zeroize();
        Some(PoolKey::new(taken?, backend))
    }

    pub(crate) fn wrapped(&self, kek: &Xaes, nonce: &[u8; 24], aad: &[u8]) -> [u8; 48] {
        kek.seal(nonce, aad, &*self.key)
            .try_into()
            .expect("a key and a tag")
    }

    /// The key check value, which is public: it shows whether an unwrapped key is the right one.
    #[must_use]
    pub fn check_value(&self) -> [u8; 32] {
        *expand(&self.key, Bytes::label("key-check").as_slice())
    }

    /// Whether this key has the check value.
    #[must_use]
    pub fn fits(&self, check_value: &[u8; 32]) -> bool {
        self.check_value().ct_eq(check_value).into()
    }

    /// Whether both are the same key.
    #[must_use]
    pub fn is(&self, other: &PoolKey) -> bool {
        self.key.ct_eq(&*other.key).into()
    }

    /// Seals events.
    #[must_use]
    pub fn event_key(&self) -> Xaes {
        Xaes::new(
            &expand(&self.key, Bytes::label("event").as_slice()),
            self.backend,
        )
    }

    /// Seals the chunks of one block.
    #[must_use]
    pub fn block_key(&self, block_uid: &[u8; 16]) -> Xaes {
        let info = Bytes::label("block").raw(block_uid);
        Xaes::new(&expand(&self.key, info.as_slice()), self.backend)
    }

    /// Wraps the key of the previous epoch.
    pub(crate) fn previous_kek(&self) -> Xaes {
        Xaes::new(
            &expand(&self.key, Bytes::label("prev-wrap").as_slice()),
            self.backend,
        )
    }

    pub(crate) fn backend(&self) -> &'static dyn Backend {
        self.backend
    }

    /// The key itself, for vectors.
    #[doc(hidden)]
    #[must_use]
    pub fn bytes(&self) -> &[u8; 32] {
        &self.key
    }
}
