//! Encrypted pools: messages are sealed before they are sent, and opened before anybody sees them.
//!
//! The server routes envelopes, and can neither read nor forge them. Its own errors about a call
//! (that nobody serves it, or that it timed out) are marked: [`Error::is_authenticated`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use latzero_crypto::descriptor::{Descriptor, Expected, History, NewEpoch, OldContent};
use latzero_crypto::envelope::{Body, Opened};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::events::{
    Act, Action, Answer, Incoming, IncomingAnswer, Outgoing, PendingCall, Receiver, ReplyTo, Sender,
};
use latzero_crypto::keys::Kind;
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta, LentBlock};
use latzero_crypto::{Suite, text};
use latzero_protocol::{Code, Envelope, Ran, Raw};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::error::Error;
use crate::keys::{Keys, now_ms, random};
use crate::payload::Payload;
use crate::prove::unfit;
use crate::sync::lock;

/// An encrypted pool for which the app has keys.
pub(crate) struct SealedPool {
    name: Box<str>,
    keys: Keys,
    /// Where its accepted state is stored.
    state_dir: Option<PathBuf>,
    open: Mutex<Option<Open>>,
}

/// The state of a member that can read.
struct Open {
    epochs: Epochs,
    sender: Sender,
    receiver: Receiver,
}

/// The server's reply to a proof.
pub(crate) struct Joined {
    pub(crate) descriptor: Descriptor,
    pub(crate) chain: Vec<Descriptor>,
    pub(crate) at_ms: u64,
}

/// A call or an emit before it is sealed.
pub(crate) struct Unsealed<'a> {
    pub(crate) act: Act,
    pub(crate) name: &'a str,
    pub(crate) destination: &'a str,
    pub(crate) meta: CallMeta,
    pub(crate) body: Body<'a>,
}

/// A call in an encrypted pool whose answer is awaited.
pub(crate) struct SealedCall {
    pool: Arc<SealedPool>,
    msg_id: [u8; 16],
}

/// What is needed to answer a call in an encrypted pool.
pub(crate) struct SealedReply {
    pool: Arc<SealedPool>,
    to: ReplyTo,
    /// How many items were sent.
    items: AtomicU64,
}

/// A message in the form that it would have in an unencrypted pool.
pub(crate) struct Plain {
    pub(crate) text: String,
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) reply: SealedReply,
}

/// An answer in the form that it would have in an unencrypted pool.
pub(crate) struct PlainAnswer {
    pub(crate) payload: Payload,
    pub(crate) headers: Option<Box<str>>,
}

impl std::fmt::Debug for SealedPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedPool")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for SealedCall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealedCall(..)")
    }
}

impl std::fmt::Debug for SealedReply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealedReply(..)")
    }
}

impl SealedPool {
    pub(crate) fn new(name: &str, keys: Keys, state_dir: Option<PathBuf>) -> Self {
        SealedPool {
            name: name.into(),
            keys,
            state_dir: state_dir.or_else(Stored::directory),
            open: Mutex::new(None),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// How it protects blocks; unknown without its keys.
    pub(crate) fn suite(&self) -> Option<Suite> {
        let open = lock(&self.open);
        let open = open.as_ref()?;
        Some(open.epochs.current().descriptor().suite())
    }

    /// Calls `f` with the known epochs.
    pub(crate) fn with_epochs<R>(&self, f: impl FnOnce(&Epochs) -> R) -> Result<R, Error> {
        self.with_open(|epochs, _| f(epochs))
    }

    /// Calls `f` with the known epochs and the id of the session.
    pub(crate) fn with_open<R>(&self, f: impl FnOnce(&Epochs, [u8; 16]) -> R) -> Result<R, Error> {
        let open = lock(&self.open);
        let open = open.as_ref().ok_or_else(|| self.not_open())?;
        Ok(f(&open.epochs, open.sender.session()))
    }

    /// Accepts the server's descriptor if it agrees with the keys, the pin and the state that was
    /// accepted before. Each connection is a new session.
    pub(crate) fn joined(&self, app_id: &str, joined: &Joined) -> Result<(), Error> {
        let Joined {
            descriptor, chain, ..
        } = joined;
        let stored = Stored::of(self);
        let before = stored.as_ref().and_then(Stored::read);
        let expected = Expected {
            name: &self.name,
            pool_id: descriptor.pool_id(),
            epoch: descriptor.epoch(),
            suite: descriptor.suite().number(),
        };
        let key = descriptor
            .accept(&self.keys.0, &expected, chain, before.as_ref())
            .map_err(|error| unfit(&error))?;
        if let Some(stored) = &stored {
            stored.write(descriptor);
        }
        let mut open = lock(&self.open);
        let Some(key) = key else {
            *open = None;
            return Ok(());
        };
        let again = Descriptor::parse(descriptor.as_bytes()).map_err(|error| unfit(&error))?;
        let sender = Sender::new(app_id, random()?);
        let receiver = open.take().map(|open| open.receiver);
        let receiver = receiver.unwrap_or_else(|| Receiver::new(app_id, joined.at_ms));
        let mut epochs = Epochs::new(again, key, joined.at_ms);
        // To read content that was written before a rotation.
        for older in chain.iter().rev() {
            let older = Descriptor::parse(older.as_bytes()).map_err(|error| unfit(&error))?;
            if !matches!(epochs.add_older(older), Ok(true)) {
                break;
            }
        }
        *open = Some(Open {
            epochs,
            sender,
            receiver,
        });
        Ok(())
    }

    /// The descriptor that moves the pool to its next epoch, with the keys of that.
    pub(crate) fn next_descriptor(
        &self,
        new: &Keys,
        is_history_cut: bool,
    ) -> Result<String, Error> {
        let open = lock(&self.open);
        let open = open.as_ref().ok_or_else(|| self.not_open())?;
        let (old, new) = (&self.keys.0, &new.0);
        let removes_writer = old.token(Kind::Seal) != new.token(Kind::Seal);
        let to = NewEpoch {
            salt: random()?,
            created_ms: now_ms(),
            wrap_nonce: random()?,
            content: if removes_writer {
                OldContent::Refused
            } else {
                OldContent::AsBefore
            },
            history: if is_history_cut {
                History::Cut
            } else {
                History::Kept(random()?)
            },
        };
        let current = open.epochs.current().descriptor();
        let next = current.rotate(old, new, &to);
        let next = next.map_err(|error| Error::new(Code::KeyFormat, error.to_string()))?;
        Ok(text::encode(next.as_bytes()))
    }

    /// The pool has another epoch. Members that must prove it again no longer have its keys.
    pub(crate) fn rotated(&self, event: &Value) {
        let mut open = lock(&self.open);
        let bytes = event["descriptor"].as_str();
        let bytes = bytes.and_then(|bytes| text::decode_within(bytes, 4096));
        let next = bytes.and_then(|bytes| Descriptor::parse(&bytes).ok());
        let Some(next) = next.filter(|_| event["member"] == true) else {
            *open = None;
            return;
        };
        let Some(current) = open.as_mut() else { return };
        let expected = Expected {
            name: &self.name,
            pool_id: next.pool_id(),
            epoch: next.epoch(),
            suite: next.suite().number(),
        };
        let before = current.epochs.current().descriptor();
        match next.accept(&self.keys.0, &expected, &[], Some(before)) {
            Ok(Some(key)) => {
                if let Some(stored) = Stored::of(self) {
                    stored.write(&next);
                }
                current.epochs.advance(next, key, now_ms());
            }
            _ => *open = None,
        }
    }

    fn not_open(&self) -> Error {
        let text = format!(
            "the keys of pool '{}' are missing, or are not those of its epoch: nothing can be \
            sealed or opened",
            self.name
        );
        Error::new(Code::StaleEpoch, text).with_ran(Ran::No)
    }

    /// Seals a call or an emit; of a call the answer is awaited from then on.
    pub(crate) fn seal(
        self: &Arc<Self>,
        unsealed: &Unsealed<'_>,
    ) -> Result<(Vec<u8>, Option<SealedCall>), Error> {
        let mut open = lock(&self.open);
        let open = open.as_mut().ok_or_else(|| self.not_open())?;
        let (msg_id, nonce) = (random()?, random()?);
        let out = Outgoing {
            act: unsealed.act,
            name: unsealed.name,
            destination: unsealed.destination,
            msg_id,
            now_ms: now_ms(),
            meta: &unsealed.meta,
            body: unsealed.body,
            nonce,
        };
        let sealed = open.sender.seal(&open.epochs, &out, None);
        let sealed = sealed.map_err(|error| unsealable(&error))?;
        if unsealed.act == Act::Emit {
            return Ok((sealed, None));
        }
        let waiting = PendingCall {
            name: unsealed.name.to_owned(),
            destination: Some(unsealed.destination.to_owned()).filter(|app| !app.is_empty()),
            idempotency_key: unsealed.meta.idempotency_key.clone(),
            deferred: unsealed.act == Act::DeferredCall,
            signed: false,
            items: 0,
        };
        if !open.receiver.wait(msg_id, waiting) {
            let text = format!("too many calls wait for answers in pool '{}'", self.name);
            return Err(Error::new(Code::Overloaded, text));
        }
        let pool = Arc::clone(self);
        Ok((sealed, Some(SealedCall { pool, msg_id })))
    }

    /// Opens a call or an emit. One that cannot be opened is dropped and counted, because no member
    /// sent it.
    pub(crate) fn open(self: &Arc<Self>, action: Action, e: &Envelope<'_>) -> Option<Plain> {
        let sealed = envelope_of(&Payload::received(e, e.data))?;
        let fields: BTreeMap<String, Box<RawValue>> = serde_json::from_str(e.text).ok()?;
        let value = |name: &str| -> Value {
            let field = fields.get(name).map(|raw| raw.get());
            field
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default()
        };
        let (process, origin, headers) = (value("process"), value("origin"), value("headers"));
        let (destination, key, blocks) = (value("destination"), value("key"), value("blocks"));
        let destination = destination["app_id"].as_str().or(destination.as_str());
        let lent = blocks
            .as_array()
            .into_iter()
            .flatten()
            .map(|block| LentBlock {
                block_id: block["block_id"].as_str().unwrap_or_default().to_owned(),
                mode: block["mode"].as_str().unwrap_or_default().to_owned(),
                block_uid: block["block_uid"].as_str().map(str::to_owned),
            });
        let incoming = Incoming {
            action,
            process: process.as_str()?,
            origin: origin["app_id"].as_str()?,
            destination: destination.unwrap_or_default(),
            frame: CallFrame {
                ttl: e.ttl.and_then(Raw::as_u64),
                window: e.window.and_then(Raw::as_u64),
                key: key.as_str(),
                idempotency_key: headers["idempotency-key"].as_str(),
                blocks: lent.collect(),
            },
            privileged: false,
        };
        let received = {
            let mut open = lock(&self.open);
            let open = open.as_mut()?;
            open.receiver
                .receive(&open.epochs, &incoming, &sealed, now_ms())
                .ok()?
        };
        let mut plain = fields;
        let raw = |value: String| RawValue::from_string(value).ok();
        for gone in ["data", "encoding", "headers"] {
            plain.remove(gone);
        }
        let mut headers = received.meta.headers;
        if let Some(key) = received.meta.idempotency_key {
            headers.insert("idempotency-key".into(), key.into());
        }
        if !headers.is_empty() {
            plain.insert("headers".into(), raw(Value::Object(headers).to_string())?);
        }
        let bytes = match received.opened.body() {
            Body::Empty => None,
            Body::Json(json) => {
                plain.insert("data".into(), raw(json.to_owned())?);
                None
            }
            Body::Bytes(bytes) => Some(bytes.to_vec()),
        };
        Some(Plain {
            text: serde_json::to_string(&plain).ok()?,
            bytes,
            reply: SealedReply {
                pool: Arc::clone(self),
                to: received.reply_to,
                items: AtomicU64::new(0),
            },
        })
    }
}

impl SealedCall {
    /// Opens an answer or an item, depending on the frame's `status`.
    pub(crate) fn open(&self, status: &str, payload: &Payload) -> Result<PlainAnswer, Error> {
        let wrong = |why: &dyn std::fmt::Display| {
            let text = format!(
                "an answer in pool '{}' does not verify: {why}",
                self.pool.name
            );
            Error::new(Code::Integrity, text)
        };
        let sealed = envelope_of(payload).ok_or_else(|| wrong(&"it is not sealed"))?;
        let mut open = lock(&self.pool.open);
        let open = open
            .as_mut()
            .ok_or_else(|| self.pool.not_open().with_ran(Ran::Unknown))?;
        let frame = IncomingAnswer {
            call: self.msg_id,
            process: None,
            origin: None,
            status,
        };
        let answer = open
            .receiver
            .receive_answer(&open.epochs, &frame, &sealed, now_ms())
            .map_err(|dropped| wrong(&dropped))?;
        let headers = answer.meta.headers;
        let headers = (!headers.is_empty()).then(|| Value::Object(headers).to_string().into());
        Ok(PlainAnswer {
            payload: payload_of(&answer.opened),
            headers,
        })
    }

    /// Opens a handler's error. An error of the server is not sealed, and is marked.
    pub(crate) fn open_error(&self, error: Error) -> Error {
        let sealed = error.data().filter(|_| error.code() == "sealed");
        let Some(sealed) = sealed.and_then(Value::as_str) else {
            return error.of_server_alone();
        };
        let payload = Payload::Json(Value::from(sealed).to_string());
        match self.open("error", &payload) {
            Ok(PlainAnswer {
                payload: Payload::Json(json),
                ..
            }) => Error::from_wire(&json),
            Ok(_) => Error::new(Code::Integrity, "a sealed error has no content"),
            Err(error) => error,
        }
    }
}

impl Drop for SealedCall {
    fn drop(&mut self) {
        if let Some(open) = lock(&self.pool.open).as_mut() {
            open.receiver.forget(&self.msg_id);
        }
    }
}

impl SealedReply {
    /// Seals an answer, an item or an error.
    pub(crate) fn seal(&self, status: &str, payload: &Payload) -> Result<Vec<u8>, Error> {
        let items = self.items.load(Ordering::Relaxed);
        let is_item = status == "partial";
        let meta = AnswerMeta {
            status: status.to_owned(),
            index: (is_item || items > 0).then_some(items),
            ..AnswerMeta::default()
        };
        let mut open = lock(&self.pool.open);
        let open = open.as_mut().ok_or_else(|| self.pool.not_open())?;
        let answer = Answer {
            msg_id: random()?,
            now_ms: now_ms(),
            meta: &meta,
            body: match payload {
                Payload::None => Body::Empty,
                Payload::Json(json) => Body::Json(json),
                Payload::Bytes(bytes) => Body::Bytes(bytes),
            },
            nonce: random()?,
        };
        let seal = self.pool.keys.0.seal_key().filter(|_| self.to.is_signed());
        let sealed = open
            .sender
            .answer(&open.epochs, &self.to, &answer, seal.as_ref())
            .map_err(|error| unsealable(&error))?;
        if is_item {
            self.items.fetch_add(1, Ordering::Relaxed);
        } else {
            open.receiver.finish(&self.to);
        }
        Ok(sealed)
    }
}

impl Drop for SealedReply {
    fn drop(&mut self) {
        // If it was answered, there is nothing to abandon.
        if let Some(open) = lock(&self.pool.open).as_mut() {
            open.receiver.abandon(&self.to);
        }
    }
}

fn unsealable(error: &dyn std::fmt::Display) -> Error {
    Error::new(
        Code::TooLarge,
        format!("the message can't be sealed: {error}"),
    )
    .with_ran(Ran::No)
}

/// The envelope of a payload, which is sent as bytes or as text.
fn envelope_of(payload: &Payload) -> Option<Vec<u8>> {
    match payload {
        Payload::Bytes(bytes) => Some(bytes.clone()),
        Payload::Json(json) => {
            let sealed: String = serde_json::from_str(json).ok()?;
            text::decode_within(&sealed, usize::MAX / 8)
        }
        Payload::None => None,
    }
}

fn payload_of(opened: &Opened) -> Payload {
    match opened.body() {
        Body::Empty => Payload::None,
        Body::Json(json) => Payload::Json(json.to_owned()),
        Body::Bytes(bytes) => Payload::Bytes(bytes.to_vec()),
    }
}

/// The store of the newest accepted descriptor of each pool, by its pin and name. With it a client
/// detects that a pool was replaced by another one, or by an older state.
pub(crate) struct Stored(PathBuf);

impl Stored {
    pub(crate) fn of(pool: &SealedPool) -> Option<Stored> {
        let pin = pool.keys.0.pin()?;
        let directory = pool.state_dir.as_ref()?;
        Some(Stored(directory.join(Self::file(&pin, &pool.name))))
    }

    fn file(pin: &[u8; 16], pool: &str) -> String {
        format!("{}-{pool}", text::encode(pin))
    }

    fn directory() -> Option<PathBuf> {
        let absolute = |name| {
            let path = std::env::var_os(name).map(PathBuf::from);
            path.filter(|path| path.is_absolute())
        };
        let state = absolute("XDG_STATE_HOME");
        let state = state.or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
        Some(state.join("latzero/pools"))
    }

    /// Deletes it; returns whether there was anything.
    pub(crate) fn forget(&self) -> std::io::Result<bool> {
        match std::fs::remove_file(&self.0) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn read(&self) -> Option<Descriptor> {
        Descriptor::parse(&std::fs::read(&self.0).ok()?).ok()
    }

    /// If it cannot be stored, a later process trusts the first descriptor that it gets.
    fn write(&self, descriptor: &Descriptor) {
        if std::fs::read(&self.0).is_ok_and(|bytes| bytes == descriptor.as_bytes()) {
            return;
        }
        let beside = PathBuf::from(format!("{}.{}.new", self.0.display(), std::process::id()));
        let written = self
            .0
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(&beside, descriptor.as_bytes()))
            .and_then(|()| std::fs::rename(&beside, &self.0));
        if written.is_err() {
            let _ = std::fs::remove_file(&beside);
        }
    }
}
