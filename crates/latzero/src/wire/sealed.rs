//! Encrypted pools: messages are sealed before they are sent, and opened before anybody sees them.
//!
//! The server routes envelopes, and can neither read nor forge them. Its own errors about a call
//! (that nobody serves it, or that it timed out) are marked: [`Error::is_authenticated`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use latzero_crypto::descriptor::{Descriptor, Expected, History, NewEpoch, OldContent};
use latzero_crypto::envelope::{Body, Opened};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::events::{
    Act, Action, Answer, DEFERRED_MAX, Dropped, Id, Incoming, IncomingAnswer, Outgoing,
    PendingCall, Receiver, ReplyTo, Sender,
};
use latzero_crypto::keys::Kind;
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta, LentBlock};
use latzero_crypto::sign::SigningKey;
use latzero_crypto::xaes::{NONCE_BYTES, Nonce};
use latzero_crypto::{Suite, text};
use latzero_protocol::{Code, Envelope, Ran, Raw};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::keys::{Keys, now_ms, random};
use crate::payload::Payload;
use crate::sync::lock;
use crate::wire::prove::unfit;

/// An encrypted pool for which the app has keys.
pub(crate) struct SealedPool {
    name: Box<str>,
    keys: Keys,
    /// Where its accepted state is stored.
    state_dir: Option<PathBuf>,
    /// Signs content. Deriving it takes longer than sealing a message.
    seal_key: OnceLock<Option<SigningKey>>,
    open: Mutex<Option<Open>>,
}

/// The state of a member that can read.
struct Open {
    epochs: Epochs,
    sender: Sender,
    receiver: Receiver,
    finished: Option<Arc<Finished>>,
}

/// The server's reply to a proof.
pub(crate) struct Joined {
    pub(crate) descriptor: Descriptor,
    pub(crate) chain: Vec<Descriptor>,
    pub(crate) at_ms: u64,
    /// When the pool was restored from a backup, as the server says.
    pub(crate) restored_ms: Option<u64>,
}

/// A call or an emit before it is sealed.
pub(crate) struct Unsealed<'a> {
    pub(crate) act: Act,
    pub(crate) name: &'a str,
    pub(crate) destination: &'a str,
    pub(crate) meta: CallMeta,
    pub(crate) body: Body<'a>,
    /// Whether it is signed, for a handler that takes nothing else.
    pub(crate) is_privileged: bool,
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
    /// The call's id and expiry once it is answered, where the call must not run again.
    finished: OnceLock<(Id, u64)>,
}

/// A message in the form that it would have in an unencrypted pool.
pub(crate) struct Plain {
    /// Its JSON text, where that is not the frame's own.
    pub(crate) text: Option<String>,
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) reply: SealedReply,
    /// Whether its signature is missing: the handler must not see it.
    pub(crate) is_unprivileged: bool,
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
            state_dir: state_dir.or_else(DescriptorFile::directory),
            seal_key: OnceLock::new(),
            open: Mutex::new(None),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The key that signs what only writers make, for those who have it.
    pub(crate) fn seal_key(&self) -> Option<&SigningKey> {
        let key = self.seal_key.get_or_init(|| self.keys.0.seal_key());
        key.as_ref()
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
        let stored = DescriptorFile::of(self);
        let before = stored.as_ref().and_then(DescriptorFile::read);
        let expected = Expected {
            name: &self.name,
            pool_id: descriptor.pool_id(),
            epoch: descriptor.epoch(),
            suite: descriptor.suite().number(),
        };
        let key = descriptor
            .accept(&self.keys.0, &expected, chain, before.as_ref())
            .map_err(|error| self.explain(unfit(&error), joined.restored_ms))?;
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
        let finished = Finished::of(self, app_id).map(Arc::new);
        let receiver = open.take().map(|open| open.receiver);
        let receiver = receiver.unwrap_or_else(|| {
            let mut receiver = Receiver::new(app_id, joined.at_ms);
            let known = finished.iter().flat_map(|finished| finished.read());
            receiver.restore(known, joined.at_ms);
            receiver
        });
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
            finished,
        });
        Ok(())
    }

    /// Says of an older state what may have led to it. The server's word changes only the text.
    fn explain(&self, error: Error, restored_ms: Option<u64>) -> Error {
        let Some(unix_ms) =
            restored_ms.filter(|_| matches!(error.kind(), Code::Rollback | Code::Fork))
        else {
            return error;
        };
        let ago_s = now_ms().saturating_sub(unix_ms) / 1000;
        let text = format!(
            "{}; the server says that pool '{}' was restored from a backup {ago_s} s ago: if that \
            was done on purpose, run `latzero keys accept-restore {}`",
            error.message(),
            self.name,
            self.name
        );
        Error::new(error.kind(), text)
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
                if let Some(stored) = DescriptorFile::of(self) {
                    stored.write(&next);
                }
                current.epochs.advance(next, key, now_ms());
            }
            _ => *open = None,
        }
    }

    fn not_open(&self) -> Error {
        if !self.keys.0.has(Kind::Shard) {
            // As the server says it of what it checks itself.
            let text = format!(
                "this needs the role 'read' in pool '{}'; prove it with the keys that have it",
                self.name
            );
            return Error::new(Code::Forbidden, text).with_ran(Ran::No);
        }
        let text = format!(
            "the keys of pool '{}' are missing, or are not those of its epoch: nothing can be \
            sealed or opened",
            self.name
        );
        Error::new(Code::StaleEpoch, text).with_ran(Ran::No)
    }

    fn no_seal(&self) -> Error {
        let text = format!(
            "a privileged call or emit in pool '{}' is signed with its OblivionSeal, and the app \
            has no such key",
            self.name
        );
        Error::new(Code::Forbidden, text).with_ran(Ran::No)
    }

    /// Seals a call or an emit; of a call the answer is awaited from then on.
    ///
    /// # Errors
    /// `stale_epoch` without the keys of the epoch; `forbidden` if the key to read is missing, or
    /// it is privileged and the key to sign it is; `too_large`, `overloaded`.
    pub(crate) fn seal(
        self: &Arc<Self>,
        unsealed: &Unsealed<'_>,
    ) -> Result<(Vec<u8>, Option<SealedCall>), Error> {
        let seal = match unsealed.is_privileged {
            true => Some(self.seal_key().ok_or_else(|| self.no_seal())?),
            false => None,
        };
        let mut open = lock(&self.open);
        let open = open.as_mut().ok_or_else(|| self.not_open())?;
        let (msg_id, nonce) = id_and_nonce()?;
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
        let sealed = open.sender.seal(&open.epochs, &out, seal);
        let sealed = sealed.map_err(|error| unsealable(&error))?;
        if unsealed.act == Act::Emit {
            return Ok((sealed, None));
        }
        let waiting = PendingCall {
            name: unsealed.name.to_owned(),
            destination: Some(unsealed.destination.to_owned()).filter(|app| !app.is_empty()),
            idempotency_key: unsealed.meta.idempotency_key.clone(),
            deferred: unsealed.act == Act::DeferredCall,
            signed: seal.is_some(),
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
    /// sent it. One to a privileged handler that is not signed is counted too, and opened only to
    /// be refused.
    pub(crate) fn open(
        self: &Arc<Self>,
        action: Action,
        is_privileged: bool,
        e: &Envelope<'_>,
    ) -> Option<Plain> {
        let sealed = envelope_of(&Payload::received(e, e.data))?;
        let string = |field: Option<Raw<'_>>| field.and_then(Raw::as_str).map(Cow::into_owned);
        let (process, key) = (string(e.process)?, string(e.key));
        let origin = app_of(e.origin?)?;
        let destination = match e.destination {
            Some(destination) => app_of(destination)?,
            None => Cow::Borrowed(""),
        };
        let value = |field: Option<Raw<'_>>| -> Option<Value> {
            field.map_or(Some(Value::Null), |raw| {
                serde_json::from_str(raw.text()).ok()
            })
        };
        let (headers, blocks) = (value(e.headers)?, value(e.blocks)?);
        let lent = blocks
            .as_array()
            .into_iter()
            .flatten()
            .map(|block| LentBlock {
                block_id: block["block_id"].as_str().unwrap_or_default().to_owned(),
                mode: block["mode"].as_str().unwrap_or_default().to_owned(),
                block_uid: block["block_uid"].as_str().map(str::to_owned),
            });
        let mut incoming = Incoming {
            action,
            process: &process,
            origin: &origin,
            destination: &destination,
            frame: CallFrame {
                ttl: e.ttl.and_then(Raw::as_u64),
                window: e.window.and_then(Raw::as_u64),
                key: key.as_deref(),
                idempotency_key: headers["idempotency-key"].as_str(),
                blocks: lent.collect(),
            },
            privileged: is_privileged,
        };
        let mut is_unprivileged = false;
        let received = {
            let mut open = lock(&self.open);
            let open = open.as_mut()?;
            let mut receive = |incoming: &Incoming<'_>| {
                open.receiver
                    .receive(&open.epochs, incoming, &sealed, now_ms())
            };
            match receive(&incoming) {
                Err(Dropped::Unprivileged) if action == Action::Trigger => {
                    (incoming.privileged, is_unprivileged) = (false, true);
                    receive(&incoming).ok()?
                }
                received => received.ok()?,
            }
        };
        let mut headers = received.meta.headers;
        if let Some(key) = received.meta.idempotency_key {
            headers.insert("idempotency-key".into(), key.into());
        }
        let (mut data, mut bytes) = (None, None);
        match received.opened.body() {
            Body::Empty => {}
            // What is no value could pass itself off as other fields.
            Body::Json(json) => data = Some(Raw::new(json).ok()?),
            Body::Bytes(body) => bytes = Some(body.to_vec()),
        }
        Some(Plain {
            text: plain_text(e, &headers, data)?,
            bytes,
            reply: SealedReply {
                pool: Arc::clone(self),
                to: received.reply_to,
                items: AtomicU64::new(0),
                finished: OnceLock::new(),
            },
            is_unprivileged,
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
    /// Whether a writer signed the call or the emit.
    pub(crate) fn is_signed(&self) -> bool {
        self.to.is_signed()
    }

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
        let (msg_id, nonce) = id_and_nonce()?;
        let answer = Answer {
            msg_id,
            now_ms: now_ms(),
            meta: &meta,
            body: match payload {
                Payload::None => Body::Empty,
                Payload::Json(json) => Body::Json(json),
                Payload::Bytes(bytes) => Body::Bytes(bytes),
            },
            nonce,
        };
        let seal = if self.to.is_signed() {
            self.pool.seal_key()
        } else {
            None
        };
        let sealed = open
            .sender
            .answer(&open.epochs, &self.to, &answer, seal)
            .map_err(|error| unsealable(&error))?;
        if is_item {
            self.items.fetch_add(1, Ordering::Relaxed);
        } else if let Some(finished) = open.receiver.finish(&self.to) {
            let _ = self.finished.set(finished);
        }
        Ok(sealed)
    }
}

impl Drop for SealedReply {
    fn drop(&mut self) {
        let kept = match lock(&self.pool.open).as_mut() {
            Some(open) => {
                // If it was answered, there is nothing to abandon.
                open.receiver.abandon(&self.to);
                open.finished.clone()
            }
            None => None,
        };
        // Not before: a call whose answer did not leave runs again after a crash.
        if let Some((kept, call)) = kept.zip(self.finished.get()) {
            kept.add(*call);
        }
    }
}

/// A message's id and its nonce, both new, with one request to the kernel.
fn id_and_nonce() -> Result<(Id, Nonce), Error> {
    let bytes: [u8; 16 + NONCE_BYTES] = random()?;
    let (id, nonce) = bytes.split_at(16);
    let nonce = nonce.try_into().expect("the rest");
    Ok((id.try_into().expect("sixteen bytes"), nonce))
}

fn unsealable(error: &dyn std::fmt::Display) -> Error {
    Error::new(
        Code::TooLarge,
        format!("the message can't be sealed: {error}"),
    )
    .with_ran(Ran::No)
}

/// The AppID that an origin or a destination names: a string, or an object's `app_id`.
fn app_of(raw: Raw<'_>) -> Option<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        app_id: Cow<'a, str>,
    }
    if !raw.is_object() {
        return raw.as_str();
    }
    let named: Named<'_> = serde_json::from_str(raw.text()).ok()?;
    Some(named.app_id)
}

/// The frame's text with the headers and data that were sealed instead of its own; `Some(None)` if
/// it is the same.
fn plain_text(
    e: &Envelope<'_>,
    headers: &Map<String, Value>,
    data: Option<Raw<'_>>,
) -> Option<Option<String>> {
    let has_own = e.data.is_some() || e.encoding.is_some() || e.headers.is_some();
    if !has_own && headers.is_empty() && data.is_none() {
        return Some(None);
    }
    let mut text = if has_own {
        let mut fields: BTreeMap<String, &RawValue> = serde_json::from_str(e.text).ok()?;
        for own in ["data", "encoding", "headers"] {
            fields.remove(own);
        }
        serde_json::to_string(&fields).ok()?
    } else {
        let more = data.map_or(0, |data| data.text().len());
        let mut text = String::with_capacity(e.text.len() + more + 16);
        text.push_str(e.text.trim_end());
        text
    };
    // There are other fields: without an action it would not have come here.
    text.pop();
    if !headers.is_empty() {
        text.push_str(",\"headers\":");
        text.push_str(&serde_json::to_string(headers).ok()?);
    }
    if let Some(data) = data {
        text.push_str(",\"data\":");
        text.push_str(data.text());
    }
    text.push('}');
    Some(Some(text))
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

/// The file with the ids of the calls that an app finished, until they expire: a call runs once,
/// even if the server delivers it again after the app's restart. An entry has [`FINISHED_BYTES`]:
/// the id, and the time of expiry in Unix milliseconds, big-endian.
struct Finished(PathBuf);

const FINISHED_BYTES: usize = 24;

/// A larger file is rewritten without the expired entries.
const FINISHED_FILE_BYTES_MAX: u64 = 2 * (DEFERRED_MAX * FINISHED_BYTES) as u64;

impl Finished {
    fn of(pool: &SealedPool, app_id: &str) -> Option<Finished> {
        let DescriptorFile(path) = DescriptorFile::of(pool)?;
        let name = format!("{}@{app_id}", path.file_name()?.to_str()?);
        Some(Finished(path.with_file_name(name)))
    }

    /// The newest entries that have not expired. A crash may leave half an entry at the end.
    fn read(&self) -> Vec<(Id, u64)> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&self.0);
        let read = file.and_then(|file| {
            let most = FINISHED_FILE_BYTES_MAX + FINISHED_BYTES as u64;
            file.take(most).read_to_end(&mut bytes)
        });
        if read.is_err() {
            return Vec::new();
        }
        let now = now_ms();
        let (entries, _) = bytes.as_chunks::<FINISHED_BYTES>();
        let mut known = Vec::new();
        for entry in entries.iter().rev() {
            let (id, expires_ms) = entry.split_at(16);
            let id: Id = id.try_into().expect("sixteen bytes");
            let expires_ms = u64::from_be_bytes(expires_ms.try_into().expect("eight bytes"));
            if expires_ms >= now && known.len() < DEFERRED_MAX {
                known.push((id, expires_ms));
            }
        }
        known
    }

    /// Adds a call. If it cannot be stored, the call may run once more after a restart.
    fn add(&self, call: (Id, u64)) {
        let appended = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.0)
            .and_then(|mut file| {
                file.write_all(&Self::entry(&call))?;
                file.metadata()
            });
        if appended.is_ok_and(|file| file.len() > FINISHED_FILE_BYTES_MAX) {
            let known = self.read();
            let entries = known.iter().rev().flat_map(Self::entry);
            replace(&self.0, &entries.collect::<Vec<u8>>());
        }
    }

    fn entry((id, expires_ms): &(Id, u64)) -> [u8; FINISHED_BYTES] {
        let mut entry = [0; FINISHED_BYTES];
        entry[..16].copy_from_slice(id);
        entry[16..].copy_from_slice(&expires_ms.to_be_bytes());
        entry
    }
}

/// Creates the directory of a file. Names of files in it are those of encrypted pools, which not
/// every user may know.
fn make_directory_of(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), |directory| {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
    })
}

/// Writes a whole file, which is private, or leaves it unchanged.
fn replace(path: &Path, bytes: &[u8]) {
    let beside = PathBuf::from(format!("{}.{}.new", path.display(), std::process::id()));
    let written = make_directory_of(path)
        .and_then(|()| {
            std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)
        })
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
}

/// The store of the newest accepted descriptor of each pool, by its pin and name. With it a client
/// detects that a pool was replaced by another one, or by an older state.
pub(crate) struct DescriptorFile(PathBuf);

impl DescriptorFile {
    pub(crate) fn of(pool: &SealedPool) -> Option<DescriptorFile> {
        let pin = pool.keys.0.pin()?;
        let directory = pool.state_dir.as_ref()?;
        Some(DescriptorFile(directory.join(Self::file(&pin, &pool.name))))
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
        replace(&self.0, descriptor.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use latzero_crypto::descriptor::NewPool;
    use latzero_crypto::keys::{KeySet, NewKeys, Secret};

    use super::*;

    #[test]
    fn finished_calls_are_kept_until_they_expire_and_the_file_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Finished(directory.path().join("pin-pool@app"));
        assert_eq!(kept.read(), []);
        let later = now_ms() + 1_000_000;
        kept.add(([1; 16], later));
        kept.add(([2; 16], 1));
        kept.add(([3; 16], later));
        assert_eq!(kept.read(), [([3; 16], later), ([1; 16], later)]);
        // A crash in the middle of an entry loses no other.
        let mut bytes = std::fs::read(&kept.0).unwrap();
        bytes.extend_from_slice(&[9; 5]);
        std::fs::write(&kept.0, &bytes).unwrap();
        assert_eq!(kept.read().len(), 2);
        // What has expired goes when the file is large.
        let old = Finished::entry(&([4; 16], 1));
        let entries = FINISHED_FILE_BYTES_MAX as usize / FINISHED_BYTES;
        std::fs::write(&kept.0, old.repeat(entries)).unwrap();
        kept.add(([5; 16], later));
        assert_eq!(kept.read(), [([5; 16], later)]);
        assert_eq!(std::fs::read(&kept.0).unwrap().len(), FINISHED_BYTES);
    }

    /// The same pool for two apps.
    fn pools() -> [Arc<SealedPool>; 2] {
        let set = KeySet::new_pool(NewKeys {
            sigil: Secret::new([1; 32]),
            shard: Secret::new([2; 32]),
            seal: Secret::new([3; 32]),
            owner: None,
        });
        let new = NewPool {
            name: "vault",
            suite: Suite::Sealed,
            pool_id: [5; 16],
            salt: [6; 32],
            created_ms: 1,
            wrap_nonce: [7; 24],
        };
        let descriptor = Descriptor::create(&set, &new).unwrap();
        let keys = Keys(Arc::new(set));
        let directory = tempfile::tempdir().unwrap();
        ["caller", "worker"].map(|app| {
            let state_dir = Some(directory.path().to_owned());
            let pool = SealedPool::new("vault", keys.clone(), state_dir);
            let joined = Joined {
                descriptor: Descriptor::parse(descriptor.as_bytes()).unwrap(),
                chain: Vec::new(),
                at_ms: now_ms(),
                restored_ms: None,
            };
            pool.joined(app, &joined).unwrap();
            Arc::new(pool)
        })
    }

    fn call<'a>(body: Body<'a>, headers: &Value) -> Unsealed<'a> {
        let headers = headers.as_object().cloned().unwrap_or_default();
        Unsealed {
            act: Act::Call,
            name: "echo",
            destination: "",
            meta: CallMeta {
                headers,
                ..CallMeta::default()
            },
            body,
            is_privileged: false,
        }
    }

    /// What the worker sees of a call in a frame with these further fields.
    fn opened(body: Body<'_>, headers: &Value, more: &str) -> Option<(Value, Option<Vec<u8>>)> {
        let [caller, worker] = pools();
        let (sealed, _call) = caller.seal(&call(body, headers)).unwrap();
        let json = format!(
            r#"{{"action":"trigger","id":"1.2.3","process":"echo","pool":"vault",
            "origin":{{"app_id":"caller","instance":"12fa"}},"ttl":30000{more}}} "#
        );
        let frame = latzero_protocol::Frame {
            json: json.as_bytes(),
            attachment: Some(&sealed),
        };
        let envelope = Envelope::parse(frame).unwrap().unwrap();
        let plain = worker.open(Action::Trigger, false, &envelope)?;
        let text = plain.text.as_deref().unwrap_or(&json);
        Some((serde_json::from_str(text).unwrap(), plain.bytes.clone()))
    }

    #[test]
    fn a_call_is_opened_into_the_frame_that_it_came_in() {
        let frame = serde_json::json!({
            "action": "trigger", "id": "1.2.3", "process": "echo", "pool": "vault",
            "origin": {"app_id": "caller", "instance": "12fa"}, "ttl": 30000,
        });
        let none = Value::Null;
        let bytes = opened(Body::Bytes(b"raw"), &none, "").unwrap();
        assert_eq!(bytes, (frame.clone(), Some(b"raw".to_vec())));
        assert_eq!(
            opened(Body::Empty, &none, "").unwrap(),
            (frame.clone(), None)
        );
        let mut whole = frame.clone();
        whole["data"] = serde_json::json!({"x": [1, "}"]});
        let json = opened(Body::Json(r#"{"x":[1,"}"]}"#), &none, "").unwrap();
        assert_eq!(json, (whole.clone(), None));
        // What the frame says of headers and data by itself does not count.
        whole["headers"] = serde_json::json!({"trace": "t\"1"});
        let own = r#","headers":{"forged":"yes"},"encoding":"base64""#;
        let json = opened(Body::Json(r#"{"x":[1,"}"]}"#), &whole["headers"], own).unwrap();
        assert_eq!(json, (whole, None));
        let (bare, _) = opened(Body::Empty, &none, own).unwrap();
        assert_eq!(bare, frame);
        // Data that is no value would stand for other fields.
        for data in [r#"1,"origin":{"app_id":"x"}"#, "", "1 2", "{"] {
            let expected = data.is_empty().then(|| (frame.clone(), None));
            assert_eq!(opened(Body::Json(data), &none, ""), expected, "{data}");
        }
        // Of another sender, or of nobody.
        assert!(opened(Body::Empty, &none, r#","destination":"other""#).is_none());
    }

    #[test]
    fn an_answer_opens_as_it_was_sealed_and_needs_no_seal() {
        let [caller, worker] = pools();
        let (sealed, call) = caller.seal(&call(Body::Empty, &Value::Null)).unwrap();
        let json = r#"{"action":"trigger","process":"echo","origin":{"app_id":"caller"}}"#;
        let frame = latzero_protocol::Frame {
            json: json.as_bytes(),
            attachment: Some(&sealed),
        };
        let envelope = Envelope::parse(frame).unwrap().unwrap();
        let plain = worker.open(Action::Trigger, false, &envelope).unwrap();
        let answer = plain.reply.seal("ok", &Payload::Json("42".into())).unwrap();
        assert!(
            worker.seal_key.get().is_none(),
            "no key is derived for an answer that is not signed"
        );
        let answer = call.unwrap().open("ok", &Payload::Bytes(answer)).unwrap();
        assert!(matches!(answer.payload, Payload::Json(json) if json == "42"));
    }
}
