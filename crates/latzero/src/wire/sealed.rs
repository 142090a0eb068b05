//! Encrypted pools: messages are sealed before they are sent, and opened before anybody sees them.
//!
//! The server routes envelopes, and can neither read nor forge them. Its own errors about a call
//! (that nobody serves it, or that it timed out) are marked: [`Error::is_authenticated`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use latzero_crypto::descriptor::{
    Descriptor, DescriptorError, Expected, History, NewEpoch, OldContent,
};
use latzero_crypto::envelope::{Body, Opened};
use latzero_crypto::epochs::Epochs;
use latzero_crypto::events::{
    Act, Action, Answer, Dropped, Id, Incoming, IncomingAnswer, Outgoing, PendingCall, Receiver,
    ReplyTo, Sender,
};
use latzero_crypto::keys::{Kind, PoolKey};
use latzero_crypto::meta::{AnswerMeta, CallFrame, CallMeta, LentBlock};
use latzero_crypto::sign::SigningKey;
use latzero_crypto::xaes::{NONCE_BYTES, Nonce};
use latzero_crypto::{Suite, text};
use latzero_protocol::{Code, Envelope, Ran, Raw};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::keys::{Keys, now_ms, random};
use crate::payload::{Payload, Reply};
use crate::sync::lock;
use crate::wire::prove::{descriptor_bytes, unfit};
use crate::wire::stored::{AwaitedCalls, DescriptorFile, Finished};

/// How the ids of parked calls in encrypted pools begin, unless their callers choose them. Without
/// a call that is awaited, nothing with such an id is an answer.
pub(crate) const SEALED_ID: &str = "sealed.";

/// An encrypted pool for which the app has keys.
pub(crate) struct SealedPool {
    name: Box<str>,
    keys: Keys,
    /// Where its accepted state is stored.
    state_dir: Option<PathBuf>,
    /// Signs content. Deriving it takes longer than sealing a message.
    seal_key: OnceLock<Option<SigningKey>>,
    open: Mutex<Option<Open>>,
    /// The parked calls whose answers are awaited; known once the app has joined.
    awaited: OnceLock<Option<Arc<AwaitedCalls>>>,
}

/// The state of a member that can read.
struct Open {
    epochs: Epochs,
    sender: Sender,
    receiver: Receiver,
    finished: Option<Arc<Finished>>,
    /// Whether the keys are those of the current epoch. If not, nothing is sealed or opened until
    /// the next proof, and what the receiver knows of earlier messages stays.
    is_member: bool,
}

impl Open {
    fn of_member(open: &mut Option<Open>) -> Option<&mut Open> {
        open.as_mut().filter(|open| open.is_member)
    }
}

/// Whether a descriptor is accepted; the key to the pool's content, for those who can read.
type Accepted = Result<Option<PoolKey>, DescriptorError>;

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
    /// The id of a call whose answer may reach a later process.
    pub(crate) parked_as: Option<&'a str>,
}

/// A call in an encrypted pool whose answer is awaited.
pub(crate) struct SealedCall {
    pool: Arc<SealedPool>,
    msg_id: Id,
    /// Where it is stored, with the id by which the server knows it.
    stored: Option<(Arc<AwaitedCalls>, Box<str>)>,
    /// Whether it stays stored.
    is_left: AtomicBool,
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
            awaited: OnceLock::new(),
        }
    }

    pub(super) fn state_dir(&self) -> Option<&Path> {
        self.state_dir.as_deref()
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

    /// How many messages did not verify.
    pub(crate) fn unverified(&self) -> u64 {
        let open = lock(&self.open);
        open.as_ref()
            .map_or(0, |open| open.receiver.drops().total())
    }

    /// Calls `f` with the known epochs.
    pub(crate) fn with_epochs<R>(&self, f: impl FnOnce(&Epochs) -> R) -> Result<R, Error> {
        self.with_open(|epochs, _| f(epochs))
    }

    /// Calls `f` with the known epochs and the id of the session.
    pub(crate) fn with_open<R>(&self, f: impl FnOnce(&Epochs, [u8; 16]) -> R) -> Result<R, Error> {
        let mut open = lock(&self.open);
        let open = Open::of_member(&mut open).ok_or_else(|| self.not_open())?;
        Ok(f(&open.epochs, open.sender.session()))
    }

    /// Whether the server's descriptor agrees with the keys, the pin and the state that was
    /// accepted before.
    pub(crate) fn accept(&self, joined: &Joined) -> Result<Accepted, Error> {
        let descriptor = &joined.descriptor;
        let expected = Expected {
            name: &self.name,
            pool_id: descriptor.pool_id(),
            epoch: descriptor.epoch(),
            suite: descriptor.suite().number(),
        };
        let accept = |before: Option<&Descriptor>| {
            descriptor.accept(&self.keys.0, &expected, &joined.chain, before)
        };
        // Another process of the app may have accepted a newer one, and the file may be gone.
        if let Some(open) = &*lock(&self.open)
            && let Err(error) = accept(Some(open.epochs.current().descriptor()))
        {
            return Ok(Err(error));
        }
        let stored = DescriptorFile::of(self).map_or(Ok(None), |stored| stored.read());
        Ok(accept(stored?.as_ref()))
    }

    /// Uses a descriptor that was accepted. Each connection is a new session.
    pub(crate) fn joined(
        &self,
        app_id: &str,
        joined: &Joined,
        accepted: Accepted,
    ) -> Result<(), Error> {
        let Joined {
            descriptor, chain, ..
        } = joined;
        let key = accepted.map_err(|error| self.explain(unfit(&error), joined.restored_ms))?;
        if let Some(stored) = DescriptorFile::of(self) {
            stored.write(descriptor);
        }
        let Some(key) = key else {
            *lock(&self.open) = None;
            return Ok(());
        };
        let again = Descriptor::parse(descriptor.as_bytes()).map_err(|error| unfit(&error))?;
        let sender = Sender::new(app_id, random()?);
        let finished = Finished::of(self, app_id).map(Arc::new);
        let awaited = || AwaitedCalls::of(self, app_id).map(Arc::new);
        self.awaited.get_or_init(awaited);
        // Each message takes this lock, and reading the stored calls may take long.
        let mut open = lock(&self.open);
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
            is_member: true,
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
        let mut open = lock(&self.open);
        let open = Open::of_member(&mut open).ok_or_else(|| self.not_open())?;
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
        let Some(current) = open.as_mut() else { return };
        let bytes = descriptor_bytes(&event["descriptor"]);
        let next = bytes.and_then(|bytes| Descriptor::parse(&bytes).ok());
        let Some(next) = next.filter(|_| event["member"] == true) else {
            current.is_member = false;
            return;
        };
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
            _ => current.is_member = false,
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
    /// it is privileged and the key to sign it is; `too_large`, `overloaded`, `storage`.
    pub(crate) fn seal(
        self: &Arc<Self>,
        unsealed: &Unsealed<'_>,
    ) -> Result<(Vec<u8>, Option<SealedCall>), Error> {
        let seal = match unsealed.is_privileged {
            true => Some(self.seal_key().ok_or_else(|| self.no_seal())?),
            false => None,
        };
        let mut guard = lock(&self.open);
        let open = Open::of_member(&mut guard).ok_or_else(|| self.not_open())?;
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
        let stored = unsealed.parked_as.zip(self.awaited());
        let to_store = stored.is_some().then(|| waiting.clone());
        let mut call = self.awaiting(open, msg_id, waiting)?;
        drop(guard);
        if let Some(((id, awaited), waiting)) = stored.zip(to_store) {
            awaited.add(id, &msg_id, &waiting)?;
            call.stored = Some((awaited, id.into()));
        }
        Ok((sealed, Some(call)))
    }

    fn awaited(&self) -> Option<Arc<AwaitedCalls>> {
        self.awaited.get().cloned().flatten()
    }

    /// Starts to await the answer to a call.
    fn awaiting(
        self: &Arc<Self>,
        open: &mut Open,
        msg_id: Id,
        waiting: PendingCall,
    ) -> Result<SealedCall, Error> {
        if !open.receiver.wait(msg_id, waiting) {
            let text = format!("too many calls wait for answers in pool '{}'", self.name);
            return Err(Error::new(Code::Overloaded, text).with_ran(Ran::No));
        }
        Ok(SealedCall {
            pool: Arc::clone(self),
            msg_id,
            stored: None,
            is_left: AtomicBool::new(false),
        })
    }

    /// Opens the answer to a parked call for which nobody here waits, if the app has parked a call
    /// with this id in the pool.
    pub(crate) fn open_late(
        self: &Arc<Self>,
        id: &str,
        answer: &Result<Reply, Error>,
    ) -> Option<Result<Reply, Error>> {
        let awaited = self.awaited()?;
        let mut last = None;
        for (msg_id, waiting) in awaited.find(id) {
            let call = match Open::of_member(&mut lock(&self.open)) {
                Some(open) => self.awaiting(open, msg_id, waiting),
                None => Err(self.not_open().with_ran(Ran::Unknown)),
            };
            let opened = call.and_then(|mut call| {
                call.stored = Some((Arc::clone(&awaited), id.into()));
                call.open_reply(answer.clone())
            });
            let is_its = !matches!(&opened, Err(error) if error.kind() == Code::Integrity);
            last = Some(opened);
            if is_its {
                break;
            }
        }
        last
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
        // What is no envelope counts as one that does not verify.
        let sealed = envelope_of(&Payload::received(e, e.data)).unwrap_or_default();
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
            let open = Open::of_member(&mut open)?;
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
    /// The answer may reach a later process of the app.
    pub(crate) fn leave(&self) {
        self.is_left.store(true, Ordering::Relaxed);
    }

    /// Opens the end of the call. What does not verify does not end the wait for an answer that
    /// does, and neither does the end of a connection.
    pub(crate) fn open_reply(&self, reply: Result<Reply, Error>) -> Result<Reply, Error> {
        let mut reply = reply.map_err(|error| self.open_error(error))?;
        let answer = self.open("ok", &reply.payload);
        let answer = answer.map_err(|error| self.unless_ended(error))?;
        (reply.payload, reply.headers) = (answer.payload, answer.headers);
        Ok(reply)
    }

    /// Notes that the call may still be answered, if the error leaves that open.
    fn unless_ended(&self, error: Error) -> Error {
        if let Code::Disconnected | Code::Integrity | Code::StaleEpoch = error.kind() {
            self.leave();
        }
        error
    }

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
        let open = Open::of_member(&mut open)
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
            return self.unless_ended(error.of_server_alone());
        };
        let payload = Payload::Json(Value::from(sealed).to_string());
        let opened = match self.open("error", &payload) {
            Ok(PlainAnswer {
                payload: Payload::Json(json),
                ..
            }) => Error::from_wire(&json),
            Ok(_) => Error::new(Code::Integrity, "a sealed error has no content"),
            Err(error) => error,
        };
        self.unless_ended(opened)
    }
}

impl Drop for SealedCall {
    fn drop(&mut self) {
        if let Some(open) = lock(&self.pool.open).as_mut() {
            open.receiver.forget(&self.msg_id);
        }
        if let Some((awaited, id)) = &self.stored
            && !self.is_left.load(Ordering::Relaxed)
        {
            awaited.remove(id, &self.msg_id);
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
        let open = Open::of_member(&mut open).ok_or_else(|| self.pool.not_open())?;
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

/// Whether the answer to a call that nobody awaits comes from an encrypted pool.
pub(crate) fn is_sealed(id: &str, answer: &Result<Reply, Error>) -> bool {
    let is_envelope = match answer {
        Ok(reply) => envelope_of(&reply.payload).is_some_and(|bytes| bytes.starts_with(b"LZEV")),
        Err(error) => error.code() == "sealed",
    };
    is_envelope || id.starts_with(SEALED_ID)
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

#[cfg(test)]
mod tests {
    use latzero_crypto::descriptor::NewPool;
    use latzero_crypto::keys::{KeySet, NewKeys, Secret};

    use super::*;

    /// The same pool for two apps.
    fn pools() -> [Arc<SealedPool>; 2] {
        pools_in(tempfile::tempdir().unwrap().path())
    }

    fn pools_in(directory: &Path) -> [Arc<SealedPool>; 2] {
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
        ["caller", "worker"].map(|app| {
            let state_dir = Some(directory.to_owned());
            let pool = SealedPool::new("vault", keys.clone(), state_dir);
            let joined = Joined {
                descriptor: Descriptor::parse(descriptor.as_bytes()).unwrap(),
                chain: Vec::new(),
                at_ms: now_ms(),
                restored_ms: None,
            };
            pool.joined(app, &joined, pool.accept(&joined).unwrap())
                .unwrap();
            Arc::new(pool)
        })
    }

    /// The file is for later processes: this one refuses an older state without it, too.
    #[test]
    fn an_older_state_is_refused_without_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let [pool, _] = pools_in(directory.path());
        let state = |descriptor: &Descriptor| Joined {
            descriptor: Descriptor::parse(descriptor.as_bytes()).unwrap(),
            chain: Vec::new(),
            at_ms: now_ms(),
            restored_ms: None,
        };
        let current = |pool: &SealedPool| {
            let bytes =
                pool.with_epochs(|epochs| epochs.current().descriptor().as_bytes().to_vec());
            state(&Descriptor::parse(&bytes.unwrap()).unwrap())
        };
        let first = current(&pool);
        let next = pool.next_descriptor(&pool.keys, false).unwrap();
        pool.rotated(&serde_json::json!({"member": true, "descriptor": next}));
        let second = current(&pool);
        assert_eq!(second.descriptor.epoch(), 2);
        std::fs::remove_dir_all(directory.path()).unwrap();
        assert_eq!(pool.accept(&second).unwrap().err(), None);
        let refused = pool.accept(&first).unwrap().err();
        assert_eq!(refused, Some(DescriptorError::Rollback("is older")));
        let ended = serde_json::json!({"member": false});
        pool.rotated(&ended);
        let refused = pool.accept(&first).unwrap().err();
        assert_eq!(refused, Some(DescriptorError::Rollback("is older")));
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
            parked_as: None,
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

    #[test]
    fn an_answer_is_opened_by_a_later_process_once() {
        let directory = tempfile::tempdir().unwrap();
        let [caller, worker] = pools_in(directory.path());
        let parked = |id: &'static str| Unsealed {
            act: Act::DeferredCall,
            parked_as: Some(id),
            ..call(Body::Empty, &Value::Null)
        };
        let answer_to = |sealed: &[u8], data: &str| {
            let json = r#"{"action":"trigger","process":"echo","origin":{"app_id":"caller"}}"#;
            let frame = latzero_protocol::Frame {
                json: json.as_bytes(),
                attachment: Some(sealed),
            };
            let envelope = Envelope::parse(frame).unwrap().unwrap();
            let plain = worker.open(Action::Trigger, false, &envelope).unwrap();
            let answer = plain.reply.seal("ok", &Payload::Json(data.into())).unwrap();
            Ok(Reply {
                payload: Payload::Bytes(answer),
                headers: None,
                beside: None,
                epoch: 0,
            })
        };
        let (first, call) = caller.seal(&parked("a")).unwrap();
        call.unwrap().leave();
        let (second, call) = caller.seal(&parked("b")).unwrap();
        call.unwrap().leave();
        // The server refuses a second call with an id in use.
        drop(caller.seal(&parked("a")).unwrap());
        let (first, second) = (answer_to(&first, "1"), answer_to(&second, "2"));
        drop(caller);
        let [later, _] = pools_in(directory.path());
        let error = |opened: Option<Result<Reply, Error>>| opened.unwrap().unwrap_err().kind();
        // Neither another call's answer nor a forged one ends the wait.
        assert_eq!(error(later.open_late("a", &second)), Code::Integrity);
        let forged = Payload::Json("1".into());
        let forged = first.clone().map(|reply| Reply {
            payload: forged,
            ..reply
        });
        assert_eq!(error(later.open_late("a", &forged)), Code::Integrity);
        let opened = later.open_late("a", &first).unwrap().unwrap();
        assert!(matches!(opened.payload, Payload::Json(json) if json == "1"));
        assert!(later.open_late("a", &first).is_none());
        assert!(is_sealed("a", &first) && is_sealed("sealed.x", &forged));
        assert!(!is_sealed("a", &forged));
        // What the server says by itself ends the wait too, and is marked.
        let timeout = Err(Error::new(Code::Timeout, "too late"));
        let ended = later.open_late("b", &timeout).unwrap().unwrap_err();
        assert!(!ended.is_authenticated());
        assert!(later.open_late("b", &second).is_none());
    }
}
