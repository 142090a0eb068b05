//! A sealed message: a header that everybody can read and nobody can change, and a body that only
//! readers can open.

use zeroize::Zeroizing;

use crate::backend::{self, TAG_BYTES};
use crate::bytes::{Bytes, Cursor};
use crate::keys::KeyError;
use crate::keys::Kind as KeyKind;
use crate::meta::META_BYTES_MAX;
use crate::sign::{PublicKey, SignatureBytes, SigningKey};
use crate::xaes::{Nonce, Xaes};
use crate::{Suite, is_name};

const MAGIC: &[u8; 4] = b"LZEV";
const VERSION: u16 = 1;

/// The longest name, sender or destination in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// The largest ciphertext with its tag.
pub const SEALED_BYTES_MAX: usize = 16 << 20;
/// The first characters of an envelope's base64url text.
pub const TEXT_START: &str = "TFpFVgAB";

const META: u8 = 1;
const BYTES: u8 = 2;
const SIGNED: u8 = 4;

/// The kind of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// An emit.
    Emit = 1,
    /// A call that ends with its caller's connection.
    Trigger = 2,
    /// The answer to a `Trigger`.
    Response = 3,
    /// An emit that a writer signed.
    PrivilegedEmit = 4,
    /// A call that a writer signed.
    PrivilegedTrigger = 5,
    /// A call that may be parked, redelivered or repeated.
    DeferredTrigger = 6,
    /// The answer to a `DeferredTrigger`.
    DeferredResponse = 7,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Kind::Emit,
            2 => Kind::Trigger,
            3 => Kind::Response,
            4 => Kind::PrivilegedEmit,
            5 => Kind::PrivilegedTrigger,
            6 => Kind::DeferredTrigger,
            7 => Kind::DeferredResponse,
            _ => return None,
        })
    }

    /// Whether messages of this kind have an expiry time.
    #[must_use]
    pub fn is_deferred(self) -> bool {
        matches!(self, Kind::DeferredTrigger | Kind::DeferredResponse)
    }

    /// Whether messages of this kind answer others.
    #[must_use]
    pub fn is_response(self) -> bool {
        matches!(self, Kind::Response | Kind::DeferredResponse)
    }

    /// Whether every message of this kind is signed.
    #[must_use]
    pub fn is_privileged(self) -> bool {
        matches!(self, Kind::PrivilegedEmit | Kind::PrivilegedTrigger)
    }
}

/// The header of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header<'a> {
    /// The pool's suite.
    pub suite: Suite,
    /// The pool's id.
    pub pool_id: [u8; 16],
    /// The sender's epoch.
    pub epoch: u32,
    /// What the message is.
    pub kind: Kind,
    /// 16 random bytes, which the sender generates for each connection.
    pub session: [u8; 16],
    /// The number of the message in the session and the pool, from 1.
    pub seq: u64,
    /// When it was sealed, by the sender's clock, in Unix milliseconds.
    pub sent_ms: u64,
    /// 16 random bytes.
    pub msg_id: [u8; 16],
    /// The call that a response answers; 0 for all other kinds.
    pub in_reply_to: [u8; 16],
    /// The trigger's name; a response has the name of its call.
    pub name: &'a str,
    /// The AppID of the sender.
    pub sender: &'a str,
    /// The AppID of the receiver, or an empty string.
    pub destination: &'a str,
    /// When a deferred message expires; 0 for all other kinds, which lack the field.
    pub expires_ms: u64,
}

/// The content of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body<'a> {
    /// No `data`.
    Empty,
    /// JSON text.
    Json(&'a str),
    /// Raw bytes.
    Bytes(&'a [u8]),
}

/// Why a message cannot be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// A privileged message without the key to sign it.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A name that is invalid or too long.
    #[error("names in sealed messages have 1 to 128 bytes without control characters")]
    Name,
    /// More metadata than fits.
    #[error("headers and options of a sealed message have at most 32 KiB; send less of them")]
    Meta,
    /// A body that is too large.
    #[error("a sealed message has at most 16 MiB; send a block instead")]
    TooLarge,
    /// A ttl that is too long for a deferred message.
    #[error("a call that may be deferred has a ttl of at most 30 days")]
    Ttl,
    /// The session has used up its message numbers.
    #[error("this connection has used up its message numbers; connect again")]
    Numbers,
    /// The reader's key is missing.
    #[error("the {} is missing, without which nothing can be sealed", KeyKind::Shard.name())]
    NoReader,
}

/// Seals a message. `seal` signs it: required for privileged kinds, allowed for answers and
/// deferred kinds, and ignored for others.
///
/// # Errors
/// If a limit is exceeded, or the key for a privileged message is missing.
pub fn seal(
    header: &Header<'_>,
    meta: Option<&str>,
    body: Body<'_>,
    nonce: &Nonce,
    key: &Xaes,
    seal: Option<&SigningKey>,
) -> Result<Vec<u8>, SealError> {
    let (bytes, raw): (&[u8], _) = match body {
        Body::Empty => (&[], false),
        Body::Json(text) => (text.as_bytes(), false),
        Body::Bytes(bytes) => (bytes, true),
    };
    let kind = header.kind;
    let seal = match seal {
        None if kind.is_privileged() => return Err(KeyError::Missing(KeyKind::Seal).into()),
        seal => seal.filter(|_| kind.is_privileged() || may_be_signed(kind)),
    };
    let signed = seal.is_some() && !kind.is_privileged();
    let flags = flag(META, meta.is_some()) | flag(BYTES, raw) | flag(SIGNED, signed);
    let names = [header.name, header.sender];
    let destination_fits = header.destination.is_empty() || is_short_name(header.destination);
    if !names.into_iter().all(is_short_name) || !destination_fits {
        return Err(SealError::Name);
    }
    if meta.is_some_and(|meta| meta.len() > META_BYTES_MAX) {
        return Err(SealError::Meta);
    }
    let meta_bytes = meta.map_or(0, |meta| 4 + meta.len());
    if bytes.len() > SEALED_BYTES_MAX - TAG_BYTES - meta_bytes {
        return Err(SealError::TooLarge);
    }
    let label = Bytes::label("event-aad");
    let header_at = label.as_slice().len();
    let aad = header.append(flags, label);
    let header = &aad.as_slice()[header_at..];
    let sealed = match meta {
        None => key.seal(nonce, aad.as_slice(), bytes),
        Some(meta) => {
            // Allocated at once, so that growing leaves no plaintext behind.
            let mut plain = Zeroizing::new(Vec::with_capacity(meta_bytes + bytes.len()));
            let length = u32::try_from(meta.len()).expect("the limit was checked");
            plain.extend_from_slice(&length.to_be_bytes());
            plain.extend_from_slice(meta.as_bytes());
            plain.extend_from_slice(bytes);
            key.seal(nonce, aad.as_slice(), &plain)
        }
    };
    let signature = seal.map(|seal| {
        let message = signed_message(header, nonce, &sealed);
        seal.sign(message.as_slice())
    });
    let length = u32::try_from(sealed.len()).expect("the limit was checked");
    let mut envelope = Vec::with_capacity(header.len() + 28 + sealed.len() + 64);
    envelope.extend_from_slice(header);
    envelope.extend_from_slice(nonce);
    envelope.extend_from_slice(&length.to_be_bytes());
    envelope.extend_from_slice(&sealed);
    envelope.extend_from_slice(signature.as_ref().map_or(&[], |signature| &signature[..]));
    Ok(envelope)
}

fn flag(flag: u8, set: bool) -> u8 {
    if set { flag } else { 0 }
}

fn may_be_signed(kind: Kind) -> bool {
    kind.is_response() || kind.is_deferred()
}

fn is_short_name(name: &str) -> bool {
    is_name(name) && name.len() <= NAME_BYTES_MAX
}

fn signed_message(header: &[u8], nonce: &Nonce, sealed: &[u8]) -> Bytes {
    // The hash of the ciphertext, not its tag, because anyone with the key can create other bytes
    // with the same tag.
    let digest = backend::preferred().sha256(&[sealed]);
    Bytes::label("event-sig")
        .raw(header)
        .raw(nonce)
        .raw(&digest)
}

impl Header<'_> {
    fn append(&self, flags: u8, to: Bytes) -> Bytes {
        let header = to
            .raw(MAGIC)
            .u16(VERSION)
            .u16(self.suite.number())
            .raw(&self.pool_id)
            .u32(self.epoch)
            .u8(self.kind as u8)
            .u8(flags)
            .u16(0)
            .raw(&self.session)
            .u64(self.seq)
            .u64(self.sent_ms)
            .raw(&self.msg_id)
            .raw(&self.in_reply_to)
            .prefixed(self.name.as_bytes())
            .prefixed(self.sender.as_bytes())
            .prefixed(self.destination.as_bytes());
        if self.kind.is_deferred() {
            header.u64(self.expires_ms)
        } else {
            header
        }
    }
}

/// A sealed message with a valid layout.
#[derive(Debug, Clone, Copy)]
pub struct Envelope<'a> {
    /// Its header.
    pub header: Header<'a>,
    flags: u8,
    header_bytes: &'a [u8],
    nonce: &'a Nonce,
    sealed: &'a [u8],
    signature: Option<&'a SignatureBytes>,
}

/// A message that has been opened.
pub struct Opened {
    plain: Zeroizing<Vec<u8>>,
    meta: Option<std::ops::Range<usize>>,
    raw: bool,
}

impl Opened {
    /// The meta, if it has one.
    #[must_use]
    pub fn meta(&self) -> Option<&str> {
        let range = self.meta.clone()?;
        Some(std::str::from_utf8(&self.plain[range]).expect("it was checked when it was opened"))
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> Body<'_> {
        let bytes = &self.plain[self.meta.as_ref().map_or(0, |range| range.end)..];
        match std::str::from_utf8(bytes) {
            _ if bytes.is_empty() && !self.raw => Body::Empty,
            Ok(text) if !self.raw => Body::Json(text),
            _ => Body::Bytes(bytes),
        }
    }
}

/// Why a message can't be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The signature is wrong.
    #[error("its signature is wrong")]
    Signature,
    /// It was not sealed with this key, or was changed.
    #[error("it does not open")]
    Seal,
    /// Its meta or its body does not match the flags.
    #[error("its content is malformed")]
    Content,
}

impl<'a> Envelope<'a> {
    /// Parses an envelope, with no bytes left over; `None` if it is invalid.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        if cursor.take(4)? != MAGIC || cursor.u16()? != VERSION {
            return None;
        }
        let suite = Suite::from_number(cursor.u16()?)?;
        let (pool_id, epoch) = (cursor.array()?, cursor.u32()?);
        let kind = Kind::from_number(cursor.u8()?)?;
        let (flags, reserved) = (cursor.u8()?, cursor.u16()?);
        let session = cursor.array()?;
        let (seq, sent_ms) = (cursor.u64()?, cursor.u64()?);
        let (msg_id, in_reply_to) = (cursor.array()?, cursor.array()?);
        let mut name = || std::str::from_utf8(cursor.prefixed(NAME_BYTES_MAX)?).ok();
        let (name, sender, destination) = (name()?, name()?, name()?);
        let expires_ms = if kind.is_deferred() { cursor.u64()? } else { 0 };
        let header_bytes = &bytes[..bytes.len() - cursor.left()];
        let nonce = cursor.take(24)?.try_into().ok()?;
        let sealed = cursor.prefixed(SEALED_BYTES_MAX)?;
        let signed = kind.is_privileged() || flags & SIGNED != 0;
        let signature = if signed {
            Some(cursor.take(64)?.try_into().ok()?)
        } else {
            None
        };

        let allowed = META | BYTES | flag(SIGNED, may_be_signed(kind));
        let fits = cursor.left() == 0
            && flags & !allowed == 0
            && reserved == 0
            && seq > 0
            && (in_reply_to != [0; 16]) == kind.is_response()
            && is_name(name)
            && is_name(sender)
            && (destination.is_empty() || is_name(destination))
            && sealed.len() >= TAG_BYTES;
        let header = Header {
            suite,
            pool_id,
            epoch,
            kind,
            session,
            seq,
            sent_ms,
            msg_id,
            in_reply_to,
            name,
            sender,
            destination,
            expires_ms,
        };
        fits.then_some(Envelope {
            header,
            flags,
            header_bytes,
            nonce,
            sealed,
            signature,
        })
    }

    /// Whether it has a signature. [`Envelope::open`] verifies it.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.signature.is_some()
    }

    /// The bytes of the header, for vectors.
    #[doc(hidden)]
    #[must_use]
    pub fn header_bytes(&self) -> &'a [u8] {
        self.header_bytes
    }

    /// Checks the signature if there is one, and opens the message.
    ///
    /// # Errors
    /// If the signature is wrong, or the message can't be opened.
    pub fn open(&self, key: &Xaes, seal: &PublicKey) -> Result<Opened, OpenError> {
        if let Some(signature) = self.signature {
            let message = signed_message(self.header_bytes, self.nonce, self.sealed);
            if !seal.verify(message.as_slice(), signature) {
                return Err(OpenError::Signature);
            }
        }
        let aad = Bytes::label("event-aad").raw(self.header_bytes);
        let plain = key.open(self.nonce, aad.as_slice(), self.sealed.to_vec());
        let plain = Zeroizing::new(plain.ok_or(OpenError::Seal)?);
        let mut meta = None;
        if self.flags & META != 0 {
            let text = Cursor::new(&plain)
                .prefixed(META_BYTES_MAX)
                .ok_or(OpenError::Content)?;
            std::str::from_utf8(text).map_err(|_| OpenError::Content)?;
            meta = Some(4..4 + text.len());
        }
        let raw = self.flags & BYTES != 0;
        let opened = Opened { plain, meta, raw };
        // JSON must be UTF-8; the consumer checks the rest.
        if !raw && matches!(opened.body(), Body::Bytes(_)) {
            return Err(OpenError::Content);
        }
        Ok(opened)
    }
}
