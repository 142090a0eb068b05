//! The state that senders and receivers of sealed messages keep, so that the server cannot repeat,
//! re-route, delay or exchange a message unnoticed.
//!
//! A message that fails a rule is dropped and counted. Cheap rules come first, and nothing is
//! remembered of a message before its signature and its seal were verified.

use std::collections::{BTreeMap, BTreeSet};

use crate::envelope::{self, Body, Envelope, Header, Kind, OpenError, Opened, SealError};
use crate::epochs::Epochs;
use crate::keys::KeyError;
use crate::keys::Kind as KeyKind;
use crate::meta::{AnswerMeta, CallFrame, CallMeta};
use crate::sign::SigningKey;
use crate::xaes::Nonce;

/// The largest accepted difference between the clocks of sender and receiver.
pub const CLOCK_MS_MAX: u64 = 30_000;
/// How long before the receiver joined a message may have been sent.
pub const BEFORE_JOIN_MS_MAX: u64 = 2_000;
/// The longest life of a deferred message.
pub const DEFERRED_MS_MAX: u64 = 30 * 24 * 60 * 60 * 1000;
/// How far messages of a session may arrive out of order.
pub const WINDOW: u64 = 1024;
/// How many sessions a receiver remembers in a pool.
pub const SESSIONS_MAX: usize = 4096;
/// How long a session must be silent before it is forgotten.
pub const SESSION_MS: u64 = 60_000;
/// How many deferred calls a receiver remembers in a pool.
pub const DEFERRED_MAX: usize = 65_536;
/// How many calls may wait for answers in a pool.
pub const WAITING_MAX: usize = 65_536;

/// A message's or a session's id.
pub type Id = [u8; 16];

/// Why a message was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u8)]
pub enum Dropped {
    /// It is not an envelope.
    #[error("it is not a sealed message")]
    Layout,
    /// It belongs to another pool or suite.
    #[error("it belongs to another pool")]
    Pool,
    /// A kind that does not fit the frame's action.
    #[error("it is of another kind than its frame")]
    Kind,
    /// The frame differs from the header or the meta.
    #[error("its frame says something else")]
    Frame,
    /// Not signed, although only writers are accepted.
    #[error("it needs a writer's signature")]
    Unprivileged,
    /// An epoch whose messages are no longer accepted.
    #[error("it is of an epoch that is over")]
    Epoch,
    /// Too old or too new.
    #[error("it is from another time")]
    Time,
    /// Seen before.
    #[error("it was seen before")]
    Replay,
    /// Expired, or with an invalid expiry.
    #[error("it has expired")]
    Expired,
    /// A limit is reached.
    #[error("more senders or deferred calls than the receiver remembers")]
    Limit,
    /// A wrong signature.
    #[error("its signature is wrong")]
    Signature,
    /// It does not open.
    #[error("it does not open")]
    Seal,
    /// Malformed content.
    #[error("its content is malformed")]
    Content,
    /// An unexpected answer, or one to another call.
    #[error("nobody waits for it")]
    NotAwaited,
    /// An item of a stream out of order. A final answer with another count ends its call with
    /// `integrity`.
    #[error("items of its stream are missing")]
    Index,
}

impl Dropped {
    /// The number of reasons.
    const COUNT: usize = Dropped::Index as usize + 1;
}

/// The number of dropped messages, by reason.
#[derive(Debug, Default)]
pub struct Drops([u64; Dropped::COUNT]);

impl Drops {
    fn count(&mut self, why: Dropped) {
        let count = &mut self.0[why as usize];
        *count = count.saturating_add(1);
    }

    /// The count for this reason.
    #[must_use]
    pub fn of(&self, why: Dropped) -> u64 {
        self.0[why as usize]
    }

    /// The total count.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// Seals the messages of one connection in one pool.
pub struct Sender {
    app_id: String,
    session: Id,
    last_seq: u64,
}

/// The kind of message: emit or call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// An emit.
    Emit,
    /// A call.
    Call,
    /// A call with `park`, `redeliver` or an idempotency key.
    DeferredCall,
}

/// A call or an emit to be sealed. Id and nonce are random.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// The kind.
    pub act: Act,
    /// The trigger's name.
    pub name: &'a str,
    /// The AppID that must handle it, or an empty string.
    pub destination: &'a str,
    /// The message's id.
    pub msg_id: Id,
    /// The time in Unix milliseconds.
    pub now_ms: u64,
    /// The metadata that is sealed with the body.
    pub meta: &'a CallMeta,
    /// The body.
    pub body: Body<'a>,
    /// The nonce.
    pub nonce: Nonce,
}

/// An answer to be sealed. Id and nonce are random.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The message's id.
    pub msg_id: Id,
    /// The time in Unix milliseconds.
    pub now_ms: u64,
    /// Status, index and headers; the call's idempotency key is added.
    pub meta: &'a AnswerMeta,
    /// The body; for `error` the error object.
    pub body: Body<'a>,
    /// The nonce.
    pub nonce: Nonce,
}

impl Sender {
    /// The session's id.
    #[must_use]
    pub fn session(&self) -> Id {
        self.session
    }

    /// Starts a session. `session` is random, generated for each connection.
    #[must_use]
    pub fn new(app_id: &str, session: Id) -> Self {
        Sender {
            app_id: app_id.to_owned(),
            session,
            last_seq: 0,
        }
    }

    /// Seals a call or an emit. With `seal` it is privileged, that is, signed.
    ///
    /// # Errors
    /// If a limit is exceeded.
    pub fn seal(
        &mut self,
        epochs: &Epochs,
        out: &Outgoing<'_>,
        seal: Option<&SigningKey>,
    ) -> Result<Vec<u8>, SealError> {
        let kind = match (out.act, seal) {
            (Act::Emit, None) => Kind::Emit,
            (Act::Emit, Some(_)) => Kind::PrivilegedEmit,
            (Act::Call, None) => Kind::Trigger,
            (Act::Call, Some(_)) => Kind::PrivilegedTrigger,
            (Act::DeferredCall, _) => Kind::DeferredTrigger,
        };
        let mut expires_ms = 0;
        if kind.is_deferred() {
            let ttl = Some(out.meta.ttl).filter(|ttl| *ttl <= DEFERRED_MS_MAX);
            expires_ms = ttl
                .and_then(|ttl| out.now_ms.checked_add(ttl))
                .ok_or(SealError::Ttl)?;
        }
        let header = Header {
            kind,
            sent_ms: out.now_ms,
            msg_id: out.msg_id,
            name: out.name,
            destination: out.destination,
            expires_ms,
            ..self.header(epochs)?
        };
        let meta = out.meta.to_text();
        let key = epochs.current().event_key();
        let sealed = envelope::seal(&header, meta.as_deref(), out.body, &out.nonce, key, seal)?;
        let seq = header.seq;
        self.last_seq = seq;
        Ok(sealed)
    }

    /// Seals an answer to a received call. The answer to a signed call is signed too, which needs
    /// `seal`.
    ///
    /// # Errors
    /// If a limit is exceeded, or the key is missing.
    pub fn answer(
        &mut self,
        epochs: &Epochs,
        to: &ReplyTo,
        out: &Answer<'_>,
        seal: Option<&SigningKey>,
    ) -> Result<Vec<u8>, SealError> {
        let seal = if to.signed {
            Some(seal.ok_or(KeyError::Missing(KeyKind::Seal))?)
        } else {
            None
        };
        let mut expires_ms = 0;
        if to.deferred {
            expires_ms = out
                .now_ms
                .checked_add(DEFERRED_MS_MAX)
                .ok_or(SealError::Ttl)?;
        }
        let header = Header {
            kind: if to.deferred {
                Kind::DeferredResponse
            } else {
                Kind::Response
            },
            sent_ms: out.now_ms,
            msg_id: out.msg_id,
            in_reply_to: to.msg_id,
            name: &to.name,
            destination: &to.caller,
            expires_ms,
            ..self.header(epochs)?
        };
        let meta = AnswerMeta {
            idempotency_key: to.idempotency_key.clone(),
            ..out.meta.clone()
        };
        let (meta, key) = (meta.to_text(), epochs.current().event_key());
        let sealed = envelope::seal(&header, Some(&meta), out.body, &out.nonce, key, seal)?;
        let seq = header.seq;
        self.last_seq = seq;
        Ok(sealed)
    }

    fn header(&self, epochs: &Epochs) -> Result<Header<'_>, SealError> {
        let descriptor = epochs.current().descriptor();
        Ok(Header {
            suite: descriptor.suite(),
            pool_id: descriptor.pool_id(),
            epoch: descriptor.epoch(),
            kind: Kind::Emit,
            session: self.session,
            seq: self.last_seq.checked_add(1).ok_or(SealError::Numbers)?,
            sent_ms: 0,
            msg_id: [0; 16],
            in_reply_to: [0; 16],
            name: "",
            sender: &self.app_id,
            destination: "",
            expires_ms: 0,
        })
    }
}

/// The action of the frame that carries a call or an emit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `emit`.
    Emit,
    /// `trigger`.
    Trigger,
}

/// The frame in which a call or an emit arrived.
#[derive(Debug, Clone)]
pub struct Incoming<'a> {
    /// Its action.
    pub action: Action,
    /// `process`.
    pub process: &'a str,
    /// `origin.app_id`.
    pub origin: &'a str,
    /// `destination`, or its `app_id`; empty if the frame has none.
    pub destination: &'a str,
    /// Its other fields.
    pub frame: CallFrame<'a>,
    /// Whether the handler was registered as privileged.
    pub privileged: bool,
}

/// A call or an emit that was received.
pub struct Received {
    /// What is needed to answer it.
    pub reply_to: ReplyTo,
    /// The metadata that was sealed with the body.
    pub meta: CallMeta,
    /// The content.
    pub opened: Opened,
}

/// What is needed to answer a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTo {
    msg_id: Id,
    name: String,
    caller: String,
    idempotency_key: Option<String>,
    deferred: bool,
    signed: bool,
    expires_ms: u64,
}

impl ReplyTo {
    /// The call's id.
    #[must_use]
    pub fn msg_id(&self) -> Id {
        self.msg_id
    }

    /// Whether the call must be [finished](Receiver::finish).
    #[must_use]
    pub fn is_deferred(&self) -> bool {
        self.deferred
    }

    /// Whether a writer signed the call.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.signed
    }
}

/// The frame in which an answer arrived.
#[derive(Debug, Clone, Copy)]
pub struct IncomingAnswer<'a> {
    /// The id of the call that the frame answers.
    pub call: Id,
    /// `process`, if the frame has it.
    pub process: Option<&'a str>,
    /// `origin.app_id`, if the frame has it.
    pub origin: Option<&'a str>,
    /// `status`.
    pub status: &'a str,
}

/// An answer that was received.
pub struct ReceivedAnswer {
    /// Status, index and headers.
    pub meta: AnswerMeta,
    /// The content.
    pub opened: Opened,
    /// The AppID that answered.
    pub from: String,
}

/// A call that waits for its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingCall {
    /// The trigger's name.
    pub name: String,
    /// The AppID that must answer, if the call named one.
    pub destination: Option<String>,
    /// The call's idempotency key.
    pub idempotency_key: Option<String>,
    /// Whether it was sent as a deferred call.
    pub deferred: bool,
    /// Whether it was signed.
    pub signed: bool,
    /// How many items of its stream have arrived.
    pub items: u64,
}

/// Receives the messages of one pool for one app.
pub struct Receiver {
    app_id: String,
    joined_ms: u64,
    sessions: BTreeMap<Id, Window>,
    swept_ms: u64,
    under_way: BTreeSet<Id>,
    finished: BTreeMap<Id, u64>,
    waiting: BTreeMap<Id, PendingCall>,
    drops: Drops,
}

/// The numbers of a session that have been seen.
struct Window {
    highest: u64,
    seen: [u64; (WINDOW / 64) as usize],
    last_ms: u64,
}

impl Window {
    fn has(&self, seq: u64) -> bool {
        if seq > self.highest {
            return false;
        }
        self.highest - seq >= WINDOW || self.seen[word(seq)] & bit(seq) != 0
    }

    fn put(&mut self, seq: u64, now_ms: u64) {
        if seq > self.highest {
            // Skipped numbers have not been seen yet, and their bits still belong to older numbers.
            if seq - self.highest >= WINDOW {
                self.seen = [0; (WINDOW / 64) as usize];
            } else {
                for passed in self.highest + 1..seq {
                    self.seen[word(passed)] &= !bit(passed);
                }
            }
            self.highest = seq;
        }
        self.seen[word(seq)] |= bit(seq);
        self.last_ms = self.last_ms.max(now_ms);
    }
}

fn word(seq: u64) -> usize {
    (seq % WINDOW / 64) as usize
}

fn bit(seq: u64) -> u64 {
    1 << (seq % 64)
}

impl Receiver {
    /// Starts when the app has joined.
    #[must_use]
    pub fn new(app_id: &str, now_ms: u64) -> Self {
        Receiver {
            app_id: app_id.to_owned(),
            joined_ms: now_ms,
            sessions: BTreeMap::new(),
            swept_ms: now_ms,
            under_way: BTreeSet::new(),
            finished: BTreeMap::new(),
            waiting: BTreeMap::new(),
            drops: Drops::default(),
        }
    }

    /// The counters of dropped messages.
    #[must_use]
    pub fn drops(&self) -> &Drops {
        &self.drops
    }

    /// Receives a call or an emit.
    ///
    /// # Errors
    /// If a rule fails. The message is dropped and counted.
    pub fn receive(
        &mut self,
        epochs: &Epochs,
        frame: &Incoming<'_>,
        envelope: &[u8],
        now_ms: u64,
    ) -> Result<Received, Dropped> {
        let received = self.try_receive(epochs, frame, envelope, now_ms);
        received.inspect_err(|why| self.drops.count(*why))
    }

    fn try_receive(
        &mut self,
        epochs: &Epochs,
        frame: &Incoming<'_>,
        envelope: &[u8],
        now_ms: u64,
    ) -> Result<Received, Dropped> {
        let envelope = Envelope::parse(envelope).ok_or(Dropped::Layout)?;
        let header = &envelope.header;
        let fits = match frame.action {
            Action::Emit => matches!(header.kind, Kind::Emit | Kind::PrivilegedEmit),
            Action::Trigger => matches!(
                header.kind,
                Kind::Trigger | Kind::PrivilegedTrigger | Kind::DeferredTrigger
            ),
        };
        if !fits {
            return Err(Dropped::Kind);
        }
        let for_me = header.destination.is_empty() || header.destination == self.app_id;
        let same = frame.process == header.name
            && frame.origin == header.sender
            && frame.destination == header.destination;
        if !for_me || !same {
            return Err(Dropped::Frame);
        }
        if frame.privileged && !envelope.is_signed() {
            return Err(Dropped::Unprivileged);
        }
        let opened = self.open(epochs, &envelope, now_ms)?;
        let meta = CallMeta::parse(opened.meta()).ok_or(Dropped::Content)?;
        if !meta.agrees(&frame.frame) {
            return Err(Dropped::Frame);
        }
        self.remember(header, now_ms);
        if header.kind == Kind::DeferredTrigger {
            self.under_way.insert(header.msg_id);
        }
        let reply_to = ReplyTo {
            msg_id: header.msg_id,
            name: header.name.to_owned(),
            caller: header.sender.to_owned(),
            idempotency_key: meta.idempotency_key.clone(),
            deferred: header.kind == Kind::DeferredTrigger,
            signed: envelope.is_signed(),
            expires_ms: header.expires_ms,
        };
        Ok(Received {
            reply_to,
            meta,
            opened,
        })
    }

    /// The checks of all messages: pool, epoch, time, repetition, signature and seal.
    fn open(
        &mut self,
        epochs: &Epochs,
        envelope: &Envelope<'_>,
        now_ms: u64,
    ) -> Result<Opened, Dropped> {
        let header = &envelope.header;
        let pool = epochs.current().descriptor();
        if (header.suite, header.pool_id) != (pool.suite(), pool.pool_id()) {
            return Err(Dropped::Pool);
        }
        let epoch = epochs
            .of_message(header.epoch, header.kind, now_ms)
            .ok_or(Dropped::Epoch)?;
        if header.kind.is_deferred() {
            self.check_deferred(header, now_ms)?;
        } else {
            self.check_window(header, now_ms)?;
        }
        let seal = &epoch.descriptor().keys().seal;
        envelope
            .open(epoch.event_key(), seal)
            .map_err(|error| match error {
                OpenError::Signature => Dropped::Signature,
                OpenError::Seal => Dropped::Seal,
                OpenError::Content => Dropped::Content,
            })
    }

    fn check_window(&mut self, header: &Header<'_>, now_ms: u64) -> Result<(), Dropped> {
        let sent_ms = header.sent_ms;
        let before_joining = sent_ms.saturating_add(BEFORE_JOIN_MS_MAX) < self.joined_ms;
        if sent_ms.abs_diff(now_ms) > CLOCK_MS_MAX || before_joining {
            return Err(Dropped::Time);
        }
        if let Some(window) = self.sessions.get(&header.session) {
            return if window.has(header.seq) {
                Err(Dropped::Replay)
            } else {
                Ok(())
            };
        }
        // A full table is searched at most once a second, however many messages arrive.
        if self.sessions.len() >= SESSIONS_MAX && now_ms.saturating_sub(self.swept_ms) >= 1000 {
            self.swept_ms = now_ms;
            self.sessions
                .retain(|_, window| now_ms.saturating_sub(window.last_ms) <= SESSION_MS);
        }
        if self.sessions.len() >= SESSIONS_MAX {
            Err(Dropped::Limit)
        } else {
            Ok(())
        }
    }

    fn check_deferred(&mut self, header: &Header<'_>, now_ms: u64) -> Result<(), Dropped> {
        let (sent_ms, expires_ms) = (header.sent_ms, header.expires_ms);
        if sent_ms.saturating_sub(now_ms) > CLOCK_MS_MAX {
            return Err(Dropped::Time);
        }
        let life = expires_ms.checked_sub(sent_ms).ok_or(Dropped::Expired)?;
        if life > DEFERRED_MS_MAX || now_ms > expires_ms {
            return Err(Dropped::Expired);
        }
        if header.kind == Kind::DeferredResponse {
            return Ok(());
        }
        if self.under_way.contains(&header.msg_id) || self.finished.contains_key(&header.msg_id) {
            return Err(Dropped::Replay);
        }
        if self.deferred() >= DEFERRED_MAX && now_ms.saturating_sub(self.swept_ms) >= 1000 {
            self.swept_ms = now_ms;
            self.finished.retain(|_, expires_ms| *expires_ms >= now_ms);
        }
        if self.deferred() >= DEFERRED_MAX {
            Err(Dropped::Limit)
        } else {
            Ok(())
        }
    }

    fn deferred(&self) -> usize {
        self.under_way.len() + self.finished.len()
    }

    fn remember(&mut self, header: &Header<'_>, now_ms: u64) {
        if header.kind.is_deferred() {
            return;
        }
        let new = Window {
            highest: 0,
            seen: [0; (WINDOW / 64) as usize],
            last_ms: now_ms,
        };
        self.sessions
            .entry(header.session)
            .or_insert(new)
            .put(header.seq, now_ms);
    }

    /// Records that the final answer of a deferred call was passed to the connection, so that the
    /// call does not run again. Returns what the caller must store on disk until it expires: the id
    /// and the time of expiry.
    pub fn finish(&mut self, call: &ReplyTo) -> Option<(Id, u64)> {
        if !self.under_way.remove(&call.msg_id) {
            return None;
        }
        self.finished.insert(call.msg_id, call.expires_ms);
        Some((call.msg_id, call.expires_ms))
    }

    /// Records that a deferred call ended without an answer and may be delivered again.
    pub fn abandon(&mut self, call: &ReplyTo) {
        self.under_way.remove(&call.msg_id);
    }

    /// Restores finished calls from disk.
    pub fn restore(&mut self, finished: impl IntoIterator<Item = (Id, u64)>, now_ms: u64) {
        let unexpired = finished
            .into_iter()
            .filter(|(_, expires_ms)| *expires_ms >= now_ms);
        self.finished.extend(unexpired.take(DEFERRED_MAX));
    }

    /// Starts to wait for the answers to a call. Returns `false` if [`WAITING_MAX`] calls are
    /// waiting: the call must not be sent then.
    #[must_use]
    pub fn wait(&mut self, msg_id: Id, waiting: PendingCall) -> bool {
        let room = self.waiting.len() < WAITING_MAX;
        if room {
            self.waiting.insert(msg_id, waiting);
        }
        room
    }

    /// Stops waiting: the call ended in another way.
    pub fn forget(&mut self, msg_id: &Id) -> Option<PendingCall> {
        self.waiting.remove(msg_id)
    }

    /// Receives an answer. A final one ends the wait.
    ///
    /// # Errors
    /// If a rule fails. The answer is dropped and counted, and the call keeps waiting, except after
    /// [`Dropped::Index`] for a final answer: the call then ends with `integrity`.
    pub fn receive_answer(
        &mut self,
        epochs: &Epochs,
        frame: &IncomingAnswer<'_>,
        envelope: &[u8],
        now_ms: u64,
    ) -> Result<ReceivedAnswer, Dropped> {
        let received = self.try_receive_answer(epochs, frame, envelope, now_ms);
        received.inspect_err(|why| self.drops.count(*why))
    }

    fn try_receive_answer(
        &mut self,
        epochs: &Epochs,
        frame: &IncomingAnswer<'_>,
        envelope: &[u8],
        now_ms: u64,
    ) -> Result<ReceivedAnswer, Dropped> {
        let envelope = Envelope::parse(envelope).ok_or(Dropped::Layout)?;
        let header = &envelope.header;
        if !header.kind.is_response() {
            return Err(Dropped::Kind);
        }
        let same = header.destination == self.app_id
            && frame.process.is_none_or(|process| process == header.name)
            && frame.origin.is_none_or(|origin| origin == header.sender);
        if !same {
            return Err(Dropped::Frame);
        }
        let waiting = self.waiting.get(&frame.call).ok_or(Dropped::NotAwaited)?;
        let awaited = waiting.name == header.name
            && waiting.destination.as_deref().is_none_or(|app| app == header.sender)
            && waiting.deferred == header.kind.is_deferred()
            && (!waiting.signed || envelope.is_signed())
            // The answer to a repeat may be the answer to the first call. Its key must then be the
            // same, which is checked below.
            && (header.in_reply_to == frame.call || waiting.idempotency_key.is_some());
        if !awaited {
            return Err(Dropped::NotAwaited);
        }
        let opened = self.open(epochs, &envelope, now_ms)?;
        let meta = AnswerMeta::parse(opened.meta()).ok_or(Dropped::Content)?;
        if meta.status != frame.status {
            return Err(Dropped::Frame);
        }
        let waiting = self
            .waiting
            .get_mut(&frame.call)
            .ok_or(Dropped::NotAwaited)?;
        if meta.idempotency_key != waiting.idempotency_key {
            return Err(Dropped::NotAwaited);
        }
        let counted = !waiting.deferred;
        let expected = Some(waiting.items);
        let in_order = if meta.is_partial() {
            meta.index == expected
        } else {
            meta.index.or(Some(0)) == expected
        };
        if meta.is_partial() {
            if counted && !in_order {
                return Err(Dropped::Index);
            }
            waiting.items = waiting.items.saturating_add(1);
        } else {
            self.waiting.remove(&frame.call);
        }
        self.remember(header, now_ms);
        if counted && !in_order {
            return Err(Dropped::Index);
        }
        Ok(ReceivedAnswer {
            meta,
            opened,
            from: header.sender.to_owned(),
        })
    }
}
