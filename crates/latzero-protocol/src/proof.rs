//! Messages that prove an identity: of an app, an administrator, or a member of an encrypted pool.
//!
//! Binary fields are text in base64url. They are not decoded here but where the proof is checked.

use std::borrow::Cow;

use crate::envelope::{Body, Envelope};
use crate::error::{Code, Refusal};
use crate::message::{Fields, Request, pool_field};
use crate::name::{AppId, PoolName};

/// Largest message with a proof before the handshake, in bytes.
pub const PROOF_BYTES_MAX: usize = 4096;

/// Maximum and default number of descriptors in one reply to `pool_chain`.
pub const CHAIN_MAX: usize = 64;

/// Proves that an app has its key.
#[derive(Debug)]
pub struct AppProof<'a> {
    /// The AppID, which the handshake must name.
    pub app_id: AppId,
    /// The public key.
    pub app_key: Cow<'a, str>,
    /// The client's nonce.
    pub client_nonce: Cow<'a, str>,
    /// The signature.
    pub sig: Cow<'a, str>,
    /// The kind of channel binding.
    pub cb_type: Cow<'a, str>,
}

/// Proves that an administrator has the token, without sending the token.
#[derive(Debug)]
pub struct AdminProof<'a> {
    /// The client's nonce.
    pub client_nonce: Cow<'a, str>,
    /// The MAC.
    pub mac: Cow<'a, str>,
    /// The kind of channel binding.
    pub cb_type: Cow<'a, str>,
}

/// What an encrypted pool is created from.
#[derive(Debug)]
pub struct Sealed<'a> {
    /// The descriptor of its first epoch.
    pub descriptor: Cow<'a, str>,
    /// Whether blocks are not encrypted, and the keys only decide who gets their memory.
    pub is_gated: bool,
}

/// A request for descriptors of a pool.
#[derive(Debug)]
pub struct Chain {
    /// The pool.
    pub pool: PoolName,
    /// Only those of epochs below this one.
    pub before: Option<u32>,
    /// The maximum number; the newest are returned.
    pub limit: usize,
}

pub(crate) fn app_proof<'a>(e: &Envelope<'a>) -> Result<Request<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    Ok(Request::AppProof(Box::new(AppProof {
        app_id: AppId::new(&fields.required_string("app_id")?)?,
        app_key: fields.required_string("app_key")?,
        client_nonce: fields.required_string("client_nonce")?,
        sig: fields.required_string("sig")?,
        cb_type: fields.required_string("cb_type")?,
    })))
}

pub(crate) fn admin_proof<'a>(e: &Envelope<'a>) -> Result<Request<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    Ok(Request::AdminProof(Box::new(AdminProof {
        client_nonce: fields.required_string("client_nonce")?,
        mac: fields.required_string("mac")?,
        cb_type: fields.required_string("cb_type")?,
    })))
}

pub(crate) fn pool_join<'a>(e: &Envelope<'a>) -> Result<Request<'a>, Refusal> {
    let pool = pool_field(e)?;
    Ok(match Fields::of_message(e)?.field("proof") {
        Some(proof) => Request::PoolProve(pool, proof),
        None => Request::PoolJoin(pool),
    })
}

pub(crate) fn pool_chain<'a>(e: &Envelope<'a>) -> Result<Request<'a>, Refusal> {
    let fields = Fields::of_message(e)?;
    let before = fields.field("before");
    let before = Envelope::number(before, "before", 1..=u64::from(u32::MAX))?;
    let limit = Envelope::number(fields.field("limit"), "limit", 1..=CHAIN_MAX as u64)?;
    Ok(Request::PoolChain(Chain {
        pool: pool_field(e)?,
        before: before.and_then(|before| u32::try_from(before).ok()),
        limit: limit.map_or(CHAIN_MAX, |limit| limit as usize),
    }))
}

pub(crate) fn pool_rotate<'a>(e: &Envelope<'a>) -> Result<Request<'a>, Refusal> {
    let descriptor = Fields::of_message(e)?.required_string("descriptor")?;
    Ok(Request::PoolRotate(pool_field(e)?, descriptor))
}

/// Reads the fields that make a new pool an encrypted one.
pub(crate) fn sealed<'a>(fields: &Fields<'a>) -> Result<Option<Sealed<'a>>, Refusal> {
    let bad = |message| Err(Refusal::new(Code::BadMessage, message));
    let (is_encrypted, descriptor) = (fields.flag("encrypted")?, fields.string("descriptor")?);
    let memory = fields.string("memory")?;
    let Some(descriptor) = descriptor else {
        return match (is_encrypted, memory) {
            (true, _) => {
                bad("an encrypted pool is made of its 'descriptor'; `latzero keys new` makes keys")
            }
            (false, Some(_)) => bad("field 'memory' is only for encrypted pools"),
            (false, None) => Ok(None),
        };
    };
    if !is_encrypted {
        return bad("a 'descriptor' is for a pool with \"encrypted\":true");
    }
    if fields
        .field("durable")
        .is_some_and(|raw| raw.text() == "false")
    {
        return bad("an encrypted pool is always durable");
    }
    match memory.as_deref() {
        None | Some("sealed") => Ok(Some(Sealed {
            descriptor,
            is_gated: false,
        })),
        Some("gated") => Ok(Some(Sealed {
            descriptor,
            is_gated: true,
        })),
        Some(_) => bad("field 'memory' must be \"sealed\" or \"gated\""),
    }
}

/// Whether a payload looks like an envelope of an encrypted pool: it begins with `LZEV` and
/// version 1.
#[must_use]
pub fn is_sealed(body: Body<'_>) -> bool {
    match body {
        Body::Json(raw) => raw.text().starts_with("\"TFpFVgAB"),
        Body::Bytes(bytes) => bytes.starts_with(b"LZEV\0\x01"),
        Body::None => false,
    }
}
