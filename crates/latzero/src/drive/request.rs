//! A call as its handler sees it.

use std::any::Any;
use std::borrow::Cow;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use latzero_protocol::encode::append_str;
use latzero_protocol::{Code, Envelope, InstanceId, Ran, Raw, Refusal, encode, frame};
use serde::Deserialize;
use serde_json::Value;

use crate::drive::core::Core;
use crate::drive::handlers::OpenEmit;
use crate::error::{Error, HandlerError};
use crate::payload::{self, Body, FromPayload, IntoPayload, Payload};
use crate::sync::{lock, set_waker};
use crate::wire::message::Message;
use crate::wire::sealed::SealedReply;

/// The caller or sender, as confirmed by the server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// The AppID.
    pub app_id: String,
    /// The instance, sixteen hex digits.
    pub instance: String,
}

impl Origin {
    /// The instance as an id.
    #[must_use]
    pub fn instance_id(&self) -> Option<InstanceId> {
        InstanceId::parse(&self.instance)
    }
}

/// One call or emit as received, and the later messages about it. It takes one allocation, and one
/// for its text.
#[derive(Debug)]
pub(crate) struct Ticket {
    text: Box<str>,
    /// The id to answer to; none for an emit.
    id: Option<Range<usize>>,
    name: Range<usize>,
    pool: Range<usize>,
    origin: Range<usize>,
    headers: Range<usize>,
    key: Range<usize>,
    /// The payload if it is JSON; else empty.
    data: Range<usize>,
    /// The payload if it is raw bytes.
    bytes: Option<Vec<u8>>,
    received: Instant,
    ttl_ms: Option<u64>,
    pub(crate) epoch: u32,
    cancelled: AtomicBool,
    state: std::sync::Mutex<TicketState>,
    /// The keys to seal answers, in an encrypted pool.
    pub(crate) sealed: std::sync::OnceLock<SealedReply>,
    /// Blocks that came with the call: each with its name and, until it is used, its description
    /// and descriptor.
    pub(crate) blocks: std::sync::OnceLock<Vec<Lent>>,
}

/// A block that came with a call.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) id: String,
    pub(crate) description: Value,
    pub(crate) descriptor: std::sync::Mutex<Option<OwnedFd>>,
    /// What the API made of it.
    pub(crate) handle: std::sync::Mutex<Option<Box<dyn Any + Send + Sync>>>,
}

#[derive(Debug)]
struct TicketState {
    /// Items that may still be sent; `None` is no limit.
    credits: Option<u64>,
    /// Wakers of those that wait for credits or for the cancellation.
    wakers: [Option<Waker>; 2],
}

/// One of the two wakers of a ticket: the one that waits for credits, or the handler's task.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waits {
    ForCredits,
    ForCancel,
}

impl Ticket {
    /// The id to answer to; none for an emit.
    pub(crate) fn id(&self) -> Option<&str> {
        self.id.clone().map(|id| &self.text[id])
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Whether the caller counts items.
    pub(crate) fn has_window(&self) -> bool {
        lock(&self.state).credits.is_some()
    }

    fn wake(&self) {
        let wakers = std::mem::take(&mut lock(&self.state).wakers);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.wake();
    }

    /// The caller accepts `count` more items.
    pub(crate) fn grant(&self, count: u64) {
        let waker = {
            let mut state = lock(&self.state);
            state.credits = state.credits.map(|credits| credits.saturating_add(count));
            state.wakers[Waits::ForCredits as usize].take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Notes whom a cancellation wakes.
    pub(crate) fn on_cancel(&self, waker: &Waker) {
        set_waker(
            &mut lock(&self.state).wakers[Waits::ForCancel as usize],
            waker,
        );
    }

    /// Nobody is woken by a cancellation any more.
    pub(crate) fn forget_waker(&self) {
        let waker = lock(&self.state).wakers[Waits::ForCancel as usize].take();
        drop(waker);
    }

    pub(crate) fn poll_credit(&self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let mut state = lock(&self.state);
        if self.is_cancelled() {
            return Poll::Ready(Err(cancelled()));
        }
        match &mut state.credits {
            None => Poll::Ready(Ok(())),
            Some(0) => {
                set_waker(&mut state.wakers[Waits::ForCredits as usize], cx.waker());
                Poll::Pending
            }
            Some(credits) => {
                *credits -= 1;
                Poll::Ready(Ok(()))
            }
        }
    }
}

pub(crate) fn cancelled() -> Error {
    Error::new(Code::Cancelled, "the caller no longer wants the answer")
}

/// A call, or an emit, as its handler sees it.
#[derive(Debug)]
pub struct Request {
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) core: Arc<Core>,
    /// Emits that were dropped just before this one.
    pub(crate) lost: u64,
}

/// The position of `part` in `whole`, of which it is a part.
fn place(whole: &str, part: Option<&str>) -> Range<usize> {
    let Some(part) = part else { return 0..0 };
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    start..start + part.len()
}

/// The content of a JSON string. Names have no escapes, so it is the name.
fn inside(raw: Raw<'_>) -> Option<&str> {
    raw.text().strip_prefix('"')?.strip_suffix('"')
}

impl Request {
    /// Decodes a call or an emit from the server; `None` if a required field is missing.
    pub(crate) fn received(
        core: &Arc<Core>,
        epoch: u32,
        now: Instant,
        e: &Envelope<'_>,
    ) -> Option<Self> {
        let id = match e.id {
            Some(raw) => Some(raw.as_str()?),
            None => None,
        };
        let name = place(e.text, Some(e.process.and_then(inside)?));
        let pool = place(e.text, e.pool.and_then(inside));
        let origin = place(e.text, e.origin.map(Raw::text));
        let headers = place(e.text, e.headers.map(Raw::text));
        let key = place(e.text, e.key.map(Raw::text));
        let bytes = payload::raw_bytes(e, e.data);
        let json = e.data.filter(|_| bytes.is_none());
        let data = place(e.text, json.map(Raw::text));
        let (text, id) = match id {
            // Servers write no escapes in ids. If there are any, the decoded id is appended to the
            // text.
            Some(Cow::Owned(id)) => {
                let range = e.text.len()..e.text.len() + id.len();
                ([e.text, &id].concat().into(), Some(range))
            }
            Some(Cow::Borrowed(id)) => (e.text.into(), Some(place(e.text, Some(id)))),
            None => (e.text.into(), None),
        };
        let ticket = Ticket {
            text,
            id,
            name,
            pool,
            origin,
            headers,
            key,
            data,
            bytes,
            received: now,
            ttl_ms: e.ttl.and_then(Raw::as_u64),
            epoch,
            cancelled: AtomicBool::new(false),
            state: std::sync::Mutex::new(TicketState {
                credits: e.window.and_then(Raw::as_u64),
                wakers: [None, None],
            }),
            sealed: std::sync::OnceLock::new(),
            blocks: std::sync::OnceLock::new(),
        };
        Some(Request {
            ticket: Arc::new(ticket),
            core: core.clone(),
            lost: 0,
        })
    }

    /// Takes the blocks that came with the call, with the descriptors of those that can be mapped,
    /// in order.
    pub(crate) fn lend(&self, blocks: Raw<'_>, descriptors: Vec<OwnedFd>) {
        let blocks: Vec<Value> = serde_json::from_str(blocks.text()).unwrap_or_default();
        let mut descriptors = descriptors.into_iter();
        let lent = blocks.into_iter();
        let lent = lent.map(|description| Lent {
            id: description["block_id"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
            descriptor: std::sync::Mutex::new(if description["access"] == "mapped" {
                descriptors.next()
            } else {
                None
            }),
            description,
            handle: std::sync::Mutex::new(None),
        });
        // Called once, before anybody else has the request.
        let _ = self.ticket.blocks.set(lent.collect());
    }

    fn part(&self, range: &Range<usize>) -> &str {
        &self.ticket.text[range.clone()]
    }

    /// The trigger's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.part(&self.ticket.name)
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &str {
        self.part(&self.ticket.pool)
    }

    /// The caller, as confirmed by the server.
    #[must_use]
    pub fn origin(&self) -> Origin {
        serde_json::from_str(self.part(&self.ticket.origin)).unwrap_or_default()
    }

    pub(crate) fn headers_json(&self) -> Option<&str> {
        let headers = self.part(&self.ticket.headers);
        (!headers.is_empty()).then_some(headers)
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> Vec<(String, String)> {
        payload::read_headers(self.headers_json())
    }

    /// One header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers()
            .into_iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value)
    }

    /// The caller's `key`.
    #[must_use]
    pub fn key(&self) -> Option<String> {
        serde_json::from_str(self.part(&self.ticket.key)).ok()
    }

    /// The number of this attempt at the call. More than 1 means that a handler may have run before
    /// and died, or that the server was restarted in between. This happens only to calls that are
    /// parked or may be redelivered. If something must happen only once, look it up by an id of the
    /// caller, such as one in the data.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        #[derive(Deserialize)]
        struct Attempt {
            #[serde(default = "first")]
            attempt: u32,
        }
        fn first() -> u32 {
            1
        }
        // Decoded on demand, because most handlers do not use it. Bytes after the message are
        // ignored.
        let mut text = serde_json::Deserializer::from_str(&self.ticket.text);
        Attempt::deserialize(&mut text).map_or(1, |read| read.attempt.max(1))
    }

    /// The remaining time to live of the call; `None` for an emit.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        let deadline = self.ticket.received + Duration::from_millis(self.ticket.ttl_ms?);
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    /// Whether it is an emit, whose answer nobody receives.
    #[must_use]
    pub fn is_emit(&self) -> bool {
        self.ticket.id().is_none()
    }

    /// How many emits of this trigger were dropped just before this one: a handler that does not
    /// block has at most 1024 that wait or are worked on.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// The payload as `T`.
    ///
    /// # Errors
    /// `bad_message` if it is not a `T`; handlers return it to the caller with `?`.
    pub fn data<T: FromPayload>(&self) -> Result<T, HandlerError> {
        let refuse = |e: Error| HandlerError::new(e.kind().as_str(), e.message());
        payload::read_body(self.body()).map_err(refuse)
    }

    /// The payload's JSON text, if it is JSON.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        let json = self.part(&self.ticket.data);
        (!json.is_empty()).then_some(json)
    }

    /// The payload's raw bytes, if it is raw bytes.
    #[must_use]
    pub fn bytes(&self) -> Option<&[u8]> {
        self.ticket.bytes.as_deref()
    }

    fn body(&self) -> Body<'_> {
        match (self.bytes(), self.json()) {
            (Some(bytes), _) => Body::Bytes(Cow::Borrowed(bytes)),
            (None, Some(json)) => Body::Json(json),
            (None, None) => Body::None,
        }
    }

    /// A copy of the payload.
    pub(crate) fn payload(&self) -> Payload {
        match self.body() {
            Body::None => Payload::None,
            Body::Json(json) => Payload::Json(json.to_owned()),
            Body::Bytes(bytes) => Payload::Bytes(bytes.into_owned()),
        }
    }

    /// Whether the caller no longer wants the answer, or the connection that the call arrived over
    /// has ended.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.ticket.is_cancelled()
    }

    /// Whether a writer of an encrypted pool signed it.
    pub(crate) fn is_privileged(&self) -> bool {
        let sealed = self.ticket.sealed.get();
        sealed.is_some_and(SealedReply::is_signed)
    }

    /// Answers with a refusal of this library.
    pub(crate) fn refuse(&self, refusal: &Refusal) {
        if let Some(id) = self.ticket.id() {
            self.core.outbox.append(self.ticket.epoch, |out, _| {
                encode::refusal(out, Some(id), refusal)
            });
        }
    }
}

/// A call that was taken and is answered later, from any thread; see
/// [`Handler::serve_detached`](crate::Handler::serve_detached). Dropped without an answer, it
/// answers `handler_error`.
#[derive(Debug)]
pub struct Unanswered {
    request: Arc<Request>,
    is_answered: bool,
    _open: Option<OpenEmit>,
}

impl Unanswered {
    pub(crate) fn new(request: Request, open: Option<OpenEmit>) -> Self {
        Unanswered {
            request: Arc::new(request),
            is_answered: false,
            _open: open,
        }
    }

    /// The call; items of a streamed answer are sent by it.
    #[must_use]
    pub fn request(&self) -> &Arc<Request> {
        &self.request
    }

    /// Wakes `waker` when the caller does not want the answer any more; at once if that is so.
    pub fn on_cancel(&self, waker: &Waker) {
        let ticket = &self.request.ticket;
        ticket.on_cancel(waker);
        if ticket.is_cancelled() {
            waker.wake_by_ref();
        }
    }

    /// Answers the call. The answer of an emit, and of a call that was cancelled, goes nowhere.
    pub fn answer<T: IntoPayload>(mut self, answer: Result<T, HandlerError>) {
        let answer = answer.and_then(|answer| write_answer(&answer));
        self.end(answer);
    }

    fn end(&mut self, outcome: Outcome) {
        self.is_answered = true;
        let (core, ticket) = (&self.request.core, &self.request.ticket);
        ticket.forget_waker();
        if !ticket.is_cancelled() && ticket.id().is_some() {
            answer(core, ticket, outcome);
            core.flush_soon();
        }
        core.handlers.finish(ticket);
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if !self.is_answered {
            let text = "the handler ended without an answer";
            self.end(Err(HandlerError::new("handler_error", text)));
        }
    }
}

/// Bytes that an answer's frame may need around its payload.
const ENVELOPE_BYTES_MAX: usize = 512;

/// A handler's answer.
pub(crate) type Outcome = Result<Payload, HandlerError>;

/// The payload of an answer. The caller hears that the handler failed if it is not JSON: a code of
/// the server would say that the call was wrong.
pub(crate) fn write_answer<T: IntoPayload>(answer: &T) -> Outcome {
    let failed = |error: Error| {
        let text = format!("the answer can't be sent: {}", error.message());
        HandlerError::new("handler_error", text)
    };
    payload::write(answer).map_err(failed)
}

/// Seals a handler's answer.
fn seal(sealed: &SealedReply, outcome: Outcome) -> Outcome {
    match outcome {
        Ok(payload) => sealed
            .seal("ok", &payload)
            .map(Payload::Bytes)
            .map_err(HandlerError::from),
        Err(error) => {
            let mut object = serde_json::json!({"code": error.code, "message": error.message});
            if let Some(data) = error.data {
                object["data"] = data;
            }
            let envelope = sealed.seal("error", &Payload::Json(object.to_string()))?;
            let envelope = latzero_crypto::text::encode(&envelope);
            Err(HandlerError::new("sealed", "sealed").with_data(envelope))
        }
    }
}

/// Bytes of a message that are kept of an error that does not fit.
const MESSAGE_BYTES_KEPT: usize = 1024;

/// An error that fits into a message with so much room for it. Otherwise its data is left out, and
/// the end of its message.
fn fitting(mut error: HandlerError, room: usize) -> HandlerError {
    let data = error.data.as_ref().map_or(0, |data| data.to_string().len());
    let message = match error.message.len() {
        // A control character takes six bytes in JSON.
        bytes if bytes <= room / 8 => bytes * 6,
        _ => Value::from(error.message.as_str()).to_string().len(),
    };
    if message + data > room {
        let mut end = MESSAGE_BYTES_KEPT.min(error.message.len());
        while !error.message.is_char_boundary(end) {
            end -= 1;
        }
        error.message.truncate(end);
        error.message.push_str(
            " (the error does not fit into a message, limits.max_frame: its data was left out)",
        );
        error.data = None;
    }
    error
}

/// Appends a handler's answer, which is sent with the next flush.
pub(crate) fn answer(core: &Core, ticket: &Ticket, outcome: Outcome) {
    let Some(id) = ticket.id() else {
        return;
    };
    let sealed = ticket.sealed.get();
    let room = core.outbox.link().map_or(usize::MAX, |link| {
        let room = link.max_frame.saturating_sub(ENVELOPE_BYTES_MAX);
        // A sealed error is text in base64.
        if sealed.is_some() { room / 2 } else { room }
    });
    let outcome = outcome.map_err(|error| fitting(error, room));
    let outcome = match sealed {
        Some(sealed) => seal(sealed, outcome),
        None => outcome,
    };
    let begin = |out: &mut Vec<u8>, status: &str| {
        out.extend_from_slice(b"{\"action\":\"response\",\"in_reply_to\":");
        append_str(out, id);
        out.extend_from_slice(b",\"status\":\"");
        out.extend_from_slice(status.as_bytes());
        out.push(b'"');
    };
    core.outbox.append(ticket.epoch, |out, link| match outcome {
        Ok(payload) if payload.len() + ENVELOPE_BYTES_MAX > link.max_frame => {
            let text = format!(
                "the handler's answer of {} bytes does not fit into a message of {} bytes \
                (limits.max_frame)",
                payload.len(),
                link.max_frame
            );
            let refusal = Refusal::new(Code::TooLarge, text).with_ran(Ran::Unknown);
            encode::refusal(out, Some(id), &refusal);
        }
        Ok(Payload::Bytes(bytes)) => {
            let mut message = Message::new("response");
            message.string("in_reply_to", id);
            message.string("status", "ok");
            message.payload("response", Payload::Bytes(bytes));
            message.finish(None, link.attachments, out);
        }
        Ok(payload) => frame::append(out, |out| {
            begin(out, "ok");
            out.extend_from_slice(b",\"response\":");
            out.extend_from_slice(payload.json().unwrap_or("null").as_bytes());
            out.push(b'}');
        }),
        Err(error) => frame::append(out, |out| {
            begin(out, "error");
            out.extend_from_slice(b",\"error\":{\"code\":");
            append_str(out, &error.code);
            out.extend_from_slice(b",\"message\":");
            append_str(out, &error.message);
            if let Some(data) = &error.data {
                out.extend_from_slice(b",\"data\":");
                out.extend_from_slice(data.to_string().as_bytes());
            }
            out.extend_from_slice(b"}}");
        }),
    });
}
