//! Calls and emits: builders and their futures.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use latzero_crypto::envelope::Body;
use latzero_crypto::events::Act;
use latzero_crypto::meta::{CallMeta, LentBlock};
use latzero_protocol::encode::append_str;
use latzero_protocol::limits::{ID_BYTES_MAX, PARKED_TTL_MAX_MS, TTL_MAX_MS};
use latzero_protocol::message::{IDEMPOTENCY_KEY, Park};
use latzero_protocol::{Code, InstanceId, Ran};
use serde::Deserialize;
use serde_json::Value;

use crate::drive::core::Leave;
use crate::error::Error;
use crate::face::app::App;
use crate::face::block::Block;
use crate::face::stream::Stream;
use crate::payload::{Bytes, FromPayload, IntoPayload, Payload, Reply};
use crate::sync::lock;
use crate::wire::message::Message;
use crate::wire::outbox::By;
use crate::wire::pending::{Id, Key, Name, silence};
use crate::wire::sealed::{SealedCall, Unsealed};

/// How long to wait for the server's `timeout` after a call's time has ended: half of that time,
/// within these bounds.
const GRACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A message that is being built, or waits to be sent. Boxed from the start, so that builders and
/// futures are cheap to move.
#[derive(Debug)]
struct Unsent {
    app: App,
    message: Message,
    headers: Vec<u8>,
    timeout: Duration,
    deadline: Option<Instant>,
    window: Option<u64>,
    /// Blocks that are passed with a call, as JSON.
    blocks: Vec<Value>,
    parking: ParkOptions,
    /// Its destination; only for an app with keys, which may have to seal it.
    route: Option<Box<Route>>,
    /// The keys to open its answer.
    sealed: Option<SealedCall>,
    failure: Option<Error>,
}

/// The fields of its envelope in addition to the content.
#[derive(Debug, Default)]
struct Route {
    name: String,
    pool: Option<String>,
    destination: String,
    key: Option<String>,
}

/// Options of a call that may outlive an attempt.
#[derive(Debug, Default)]
struct ParkOptions {
    park: Park,
    redeliver: bool,
    attempts: Option<u32>,
    idempotency_key: Option<String>,
    id: Option<Box<str>>,
}

impl ParkOptions {
    fn name(&self) -> Name<'_> {
        match &self.id {
            Some(id) => Name::Chosen(id),
            None if self.park.is_allowed() => Name::Durable,
            None => Name::Slot,
        }
    }
}

/// Checks an id that a caller chose.
fn check_id(id: &str) -> Result<(), Error> {
    let text = if id.is_empty() || id.len() > ID_BYTES_MAX {
        format!(
            "a call's id must have 1 to {ID_BYTES_MAX} bytes; this one has {}",
            id.len()
        )
    } else if Id::parse(id).is_some() {
        format!("id '{id}' has the form of generated ids; choose another")
    } else {
        return Ok(());
    };
    Err(Error::new(Code::BadMessage, text))
}

impl Unsent {
    fn new(app: &App, message: Message) -> Box<Self> {
        Box::new(Unsent {
            app: app.clone(),
            message,
            headers: Vec::new(),
            timeout: app.core().config.call_timeout,
            deadline: None,
            window: None,
            blocks: Vec::new(),
            parking: ParkOptions::default(),
            route: None,
            sealed: None,
            failure: None,
        })
    }

    fn with_data<T: IntoPayload + ?Sized>(
        app: &App,
        action: &str,
        name: &str,
        data: &T,
    ) -> Box<Self> {
        let mut message = Message::new(action);
        message.string("process", name);
        let failure = message.body("data", data).err();
        let mut unsent = Self::new(app, message);
        unsent.failure = failure;
        unsent.route = app.core().has_sealed().then(|| {
            let name = name.to_owned();
            Box::new(Route {
                name,
                ..Route::default()
            })
        });
        unsent
    }

    fn set_bytes(&mut self, bytes: Vec<u8>) {
        self.message.replace_body("data", bytes);
        self.failure = None;
    }

    fn set_pool(&mut self, pool: &str) {
        if let Some(route) = &mut self.route {
            route.pool = Some(pool.to_owned());
        }
        self.message.string("pool", pool);
    }

    fn set_key(&mut self, key: &str) {
        if let Some(route) = &mut self.route {
            route.key = Some(key.to_owned());
        }
        self.message.string("key", key);
    }

    /// Seals a message to an encrypted pool: data, headers, and a copy of the fields that the
    /// server reads.
    fn seal(&mut self, act: Act, ttl: Option<u64>) {
        let Some(route) = self.route.take() else {
            return;
        };
        let core = self.app.core().clone();
        let Some(pool) = core.sealed_pool(route.pool.as_deref()) else {
            return;
        };
        self.headers.push(b'}');
        let headers = serde_json::from_slice(&std::mem::take(&mut self.headers));
        let mut headers: serde_json::Map<String, Value> = headers.unwrap_or_default();
        let key = headers.remove(IDEMPOTENCY_KEY);
        let idempotency_key = key.and_then(|key| key.as_str().map(str::to_owned));
        if let Some(key) = &idempotency_key {
            // The server recognises repeats by this header.
            self.header(IDEMPOTENCY_KEY, key);
        }
        let blocks = self.blocks.iter().map(|block| LentBlock {
            block_id: block["block_id"].as_str().unwrap_or_default().to_owned(),
            mode: block["mode"].as_str().unwrap_or_default().to_owned(),
            block_uid: block["block_uid"].as_str().map(str::to_owned),
        });
        let meta = CallMeta {
            headers,
            ttl: ttl.unwrap_or(CallMeta::default().ttl),
            window: self.window,
            key: route.key.clone(),
            idempotency_key,
            blocks: blocks.collect(),
        };
        let body = self.message.take_body("data");
        let unsealed = Unsealed {
            act,
            name: &route.name,
            destination: &route.destination,
            meta,
            body: match &body {
                Payload::None => Body::Empty,
                Payload::Json(json) => Body::Json(json),
                Payload::Bytes(bytes) => Body::Bytes(bytes),
            },
        };
        match pool.seal(&unsealed) {
            Ok((envelope, call)) => {
                self.message.replace_body("data", envelope);
                self.sealed = call;
            }
            Err(error) => self.failure = self.failure.take().or(Some(error)),
        }
    }

    fn set_app(&mut self, app_id: &str) {
        self.set_destination(app_id);
        self.message.string("destination", app_id);
    }

    fn set_destination(&mut self, app_id: &str) {
        if let Some(route) = &mut self.route {
            app_id.clone_into(&mut route.destination);
        }
    }

    fn set_instance(&mut self, app_id: &str, instance: InstanceId) {
        self.set_destination(app_id);
        let destination = serde_json::json!({ "app_id": app_id, "instance": instance });
        self.message
            .json("destination", destination.to_string().as_bytes());
    }

    fn header(&mut self, name: &str, value: &str) {
        self.headers
            .push(if self.headers.is_empty() { b'{' } else { b',' });
        append_str(&mut self.headers, name);
        self.headers.push(b':');
        append_str(&mut self.headers, value);
    }

    /// Adds the headers, once all are known.
    fn finish(&mut self) {
        if !self.headers.is_empty() {
            self.headers.push(b'}');
            self.message.json("headers", &self.headers);
        }
        if !self.blocks.is_empty() {
            let blocks = Value::Array(std::mem::take(&mut self.blocks));
            self.message.json("blocks", blocks.to_string().as_bytes());
        }
    }
}

/// A call that has not been sent yet. Awaiting it sends it and returns the answer as a JSON value;
/// [`Call::send`] returns it as any type.
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Call {
    unsent: Box<Unsent>,
    window: u64,
}

/// How many items of a stream may be sent before they are read, by default.
const WINDOW: u64 = 64;

impl Call {
    pub(crate) fn new<T: IntoPayload + ?Sized>(app: &App, name: &str, data: &T) -> Self {
        Call {
            unsent: Unsent::with_data(app, "trigger", name, data),
            window: WINDOW,
        }
    }

    /// How long the answer may take, from now on: at most 24 hours, or 30 days for a call that may
    /// be parked.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.unsent.timeout = timeout;
        self
    }

    /// Calls this app, even if others serve the trigger.
    pub fn to(mut self, app_id: &str) -> Self {
        self.unsent.set_app(app_id);
        self
    }

    /// Calls this instance of an app.
    pub fn to_instance(mut self, app_id: &str, instance: InstanceId) -> Self {
        self.unsent.set_instance(app_id, instance);
        self
    }

    /// Calls in this pool. Required if the app is in several pools.
    pub fn pool(mut self, pool: &str) -> Self {
        self.unsent.set_pool(pool);
        self
    }

    /// The key of a sticky trigger: calls with the same key reach the same handler.
    pub fn key(mut self, key: &str) -> Self {
        self.unsent.set_key(key);
        self
    }

    /// Adds a header, which the handler receives unchanged.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.unsent.header(name, value);
        self
    }

    /// Lets the handler read a memory block of the call's pool during the call. The data refers to
    /// it by [`Block::reference`].
    pub fn block(self, block: &Block) -> Self {
        self.with_block(block, "read")
    }

    /// Like [`Call::block`], for reading and writing.
    pub fn block_writable(self, block: &Block) -> Self {
        self.with_block(block, "write")
    }

    fn with_block(mut self, block: &Block, mode: &str) -> Self {
        let mut lent = serde_json::json!({"block_id": block.id(), "mode": mode});
        if let Some(uid) = block.uid() {
            lent["block_uid"] = latzero_crypto::text::encode(&uid).into();
        }
        self.unsent.blocks.push(lent);
        self
    }

    /// If no handler can take the call now, the server stores it on disk until one can, for as long
    /// as [`Call::timeout`] says (30 days at most). From then on it outlives handlers, the server
    /// and this connection: a lost connection does not fail it, and an answer that was given in the
    /// meantime arrives right after the reconnect.
    ///
    /// Such a call has one answer and cannot pass blocks. Dropping its future still cancels it;
    /// [`Call::send_parked`] returns a handle that may be dropped, once the call is on disk. Until
    /// then a lost connection fails it like any other call; [`Call::idempotency_key`] makes it safe
    /// to repeat.
    ///
    /// It fails with `storage` if the disk cannot be written, and with `overloaded` if the server
    /// already stores too many calls.
    pub fn park(mut self) -> Self {
        self.unsent.parking.park = Park::IfNeeded;
        self
    }

    /// Like [`Call::park`], but the call is stored even if a handler can take it at once: after
    /// [`Call::send_parked`] has returned, the caller may end.
    pub fn always_park(mut self) -> Self {
        self.unsent.parking.park = Park::Always;
        self
    }

    /// Gives the call to another handler if its handler's connection ends before it answered: the
    /// call may run more than once. The handler reads the number of the attempt from
    /// [`Request::attempt`](crate::Request::attempt). [`Call::attempts`] limits the attempts.
    pub fn redeliver(mut self) -> Self {
        self.unsent.parking.redeliver = true;
        self
    }

    /// How many times a parked or redelivered call may be delivered: 1 to 1000, 5 by default. If no
    /// handler answers, the call fails with `attempts_exhausted`.
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.unsent.parking.attempts = Some(attempts);
        self
    }

    /// Makes the call safe to repeat: for a bounded time (a setting of the server), calls of this
    /// app with the same key (1 to 1024 bytes) to the same trigger, pool and destination get the
    /// answer of the first one. The key is sent as the header `idempotency-key`.
    pub fn idempotency_key(mut self, key: &str) -> Self {
        self.unsent.parking.idempotency_key = Some(key.to_owned());
        self
    }

    /// Chooses the id of the call, 1 to 128 bytes, by which its answer can be recognised even after
    /// the process was restarted; see [`App::answers`]. Otherwise the call gets a generated id.
    ///
    /// It fails with `bad_message` if another call of the app in flight has the id.
    pub fn id(mut self, id: &str) -> Self {
        self.unsent.parking.id = Some(id.into());
        self
    }

    /// Sends these bytes unchanged instead of the data, next to the JSON.
    pub fn raw_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.unsent.set_bytes(bytes);
        self
    }

    /// How many items of a streamed answer may be sent before they are read (default 64), which
    /// bounds how many wait here.
    pub fn window(mut self, window: u64) -> Self {
        self.window = window.clamp(1, latzero_protocol::limits::WINDOW_MAX);
        self
    }

    /// Sends the call; the future returns the answer as `R`. Dropping the future cancels the call.
    pub fn send<R: FromPayload>(self) -> Calling<R> {
        Calling {
            outgoing: Outgoing::of_call(self, None),
            read: Reply::into,
            result: PhantomData,
        }
    }

    /// Sends the call to be stored by the server until it is answered, as with [`Call::park`]. The
    /// future completes once the call is on disk, or answered if a handler takes it at once;
    /// dropping the future before that cancels the call. The handle that it returns may be dropped:
    /// the call continues, and its answer goes to [`App::answers`], in later processes of the app
    /// too.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), latzero::Error> {
    /// use std::time::Duration;
    ///
    /// let app = latzero::App::connect("latzero://shop?pool=alpha").await?;
    /// let parked = app
    ///     .call("ship", &"order 17")
    ///     .id("order-17")
    ///     .timeout(Duration::from_secs(3600))
    ///     .send_parked()
    ///     .await?;
    /// let receipt: String = parked.answer().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn send_parked(self) -> Parking {
        let call = match self.unsent.parking.park {
            Park::No => self.park(),
            Park::IfNeeded | Park::Always => self,
        };
        Parking(Outgoing::of_call(call, None))
    }

    /// Sends the call; the future returns the answer as received, with its headers.
    pub fn reply(self) -> Calling<Reply> {
        Calling {
            outgoing: Outgoing::of_call(self, None),
            read: Ok,
            result: PhantomData,
        }
    }

    /// Sends the call; the future returns the answer's raw bytes.
    pub fn bytes(self) -> Calling<Bytes> {
        self.send()
    }

    /// Opens a streamed answer. The call is sent when the first item is requested; its time covers
    /// the whole stream.
    pub fn stream<R: FromPayload>(mut self) -> Stream<R> {
        let window = self.window;
        self.unsent.message.number("window", window);
        Stream::new(
            self.unsent.app.clone(),
            Outgoing::of_call(self, Some(window)),
            window,
        )
    }
}

impl IntoFuture for Call {
    type Output = Result<Value, Error>;
    type IntoFuture = Calling<Value>;

    fn into_future(self) -> Calling<Value> {
        self.send()
    }
}

/// A request that waits to be sent, or for its reply.
#[derive(Debug)]
pub(crate) struct Outgoing(State);

#[derive(Debug)]
enum State {
    Unsent(Box<Unsent>),
    Sent(SentRequest),
    Done,
}

/// A request that was sent.
#[derive(Debug)]
struct SentRequest {
    app: App,
    key: Key,
    /// When the client gives up, if the server does not.
    deadline: Instant,
    /// The id that its caller chose.
    chosen: Option<Box<str>>,
    /// The keys to open the answer, in an encrypted pool.
    sealed: Option<SealedCall>,
    at_drop: AtDrop,
}

/// What happens to a request when its owner is dropped.
#[derive(Debug)]
enum AtDrop {
    /// A cancel is sent to the server.
    Cancel,
    /// The request with this id continues.
    Leave(Box<str>),
}

impl Outgoing {
    fn of_call(call: Call, window: Option<u64>) -> Self {
        let mut unsent = call.unsent;
        unsent.window = window;
        let parking = &mut unsent.parking;
        match parking.park {
            Park::No => {}
            Park::IfNeeded => unsent.message.json("park", b"true"),
            Park::Always => unsent.message.json("park", b"\"always\""),
        }
        if parking.redeliver {
            unsent.message.json("redeliver", b"true");
        }
        if let Some(attempts) = parking.attempts {
            unsent
                .message
                .json("attempts", attempts.to_string().as_bytes());
        }
        if let Some(id) = &parking.id {
            unsent.message.string("id", id);
            unsent.failure = unsent.failure.or_else(|| check_id(id).err());
        }
        let is_repeatable = parking.idempotency_key.is_some();
        if let Some(key) = parking.idempotency_key.take() {
            unsent.header(IDEMPOTENCY_KEY, &key);
        }
        let ttl = u64::try_from(unsent.timeout.as_millis()).unwrap_or(u64::MAX);
        let ttl_max = if unsent.parking.park.is_allowed() {
            PARKED_TTL_MAX_MS
        } else {
            TTL_MAX_MS
        };
        let ttl = ttl.clamp(1, ttl_max);
        let may_wait = may_outlive_window(&unsent.parking) || is_repeatable;
        let act = if may_wait {
            Act::DeferredCall
        } else {
            Act::Call
        };
        unsent.seal(act, Some(ttl));
        unsent.finish();
        unsent.message.number("ttl", ttl);
        unsent.failure = unsent.failure.map(|error| error.with_ran(Ran::No));
        Outgoing(State::Unsent(unsent))
    }

    pub(crate) fn of_message(app: &App, message: Message) -> Self {
        Outgoing(State::Unsent(Unsent::new(app, message)))
    }

    /// The app and the key of a request that was sent and has not ended.
    pub(crate) fn sent(&self) -> Option<(&App, Key)> {
        match &self.0 {
            State::Sent(sent) => Some((&sent.app, sent.key)),
            _ => None,
        }
    }

    /// The keys to open answers and items, in an encrypted pool.
    pub(crate) fn sealed(&self) -> Option<&SealedCall> {
        match &self.0 {
            State::Sent(sent) => sent.sealed.as_ref(),
            _ => None,
        }
    }

    pub(crate) fn app(&self) -> Option<&App> {
        match &self.0 {
            State::Unsent(unsent) => Some(&unsent.app),
            State::Sent(sent) => Some(&sent.app),
            State::Done => None,
        }
    }

    /// When a blocked caller gives up, if neither the server nor the driver does.
    pub(crate) fn wait_until(&self) -> Option<Instant> {
        match &self.0 {
            State::Unsent(unsent) => Some(Instant::now() + unsent.timeout + grace(unsent.timeout)),
            State::Sent(sent) => Some(sent.deadline),
            State::Done => None,
        }
    }

    /// Notes that the reply was taken.
    pub(crate) fn done(&mut self) {
        self.0 = State::Done;
    }

    /// Sends the request, unless that is done; returns its key.
    pub(crate) fn poll_sent(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Key, Error>> {
        let unsent = match &mut self.0 {
            State::Sent(sent) => return Poll::Ready(Ok(sent.key)),
            State::Done => panic!("polled after it ended"),
            State::Unsent(unsent) => unsent,
        };
        if let Some(error) = unsent.failure.take() {
            self.0 = State::Done;
            return Poll::Ready(Err(error));
        }
        let now = Instant::now();
        let deadline = *unsent.deadline.get_or_insert(now + unsent.timeout);
        let given_up = deadline + grace(unsent.timeout);
        let by = By::Call {
            deadline: given_up,
            window: unsent.window,
            name: unsent.parking.name(),
        };
        let core = unsent.app.core();
        let submitted = match core.poll_submit(&mut unsent.message, by, leave, cx) {
            Poll::Ready(Ok(submitted)) => submitted,
            Poll::Ready(Err(error)) => {
                self.0 = State::Done;
                return Poll::Ready(Err(error));
            }
            Poll::Pending if now < deadline => return Poll::Pending,
            Poll::Pending => {
                let error = too_late(core.is_connected());
                self.0 = State::Done;
                return Poll::Ready(Err(error));
            }
        };
        if leave == Leave::Soon {
            core.arm_tick();
        }
        let key = submitted.key.expect("a call has a key");
        let State::Unsent(unsent) = std::mem::replace(&mut self.0, State::Done) else {
            unreachable!("it was just seen");
        };
        self.0 = State::Sent(SentRequest {
            app: unsent.app,
            key,
            deadline: given_up,
            chosen: unsent.parking.id,
            sealed: unsent.sealed,
            at_drop: AtDrop::Cancel,
        });
        Poll::Ready(Ok(key))
    }

    /// Sends the request and waits for its reply.
    pub(crate) fn poll_reply(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Reply, Error>> {
        let key = match std::task::ready!(self.poll_sent(leave, cx)) {
            Ok(key) => key,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let State::Sent(sent) = &self.0 else {
            unreachable!("it was just sent")
        };
        let reply = std::task::ready!(sent.app.core().poll_reply(key, cx));
        let reply = match &sent.sealed {
            Some(sealed) => open_reply(sealed, reply),
            None => reply,
        };
        self.0 = State::Done;
        Poll::Ready(reply)
    }

    /// Sends the request and waits until the server has stored it, or it is answered.
    fn poll_parked(&mut self, leave: Leave, cx: &mut Context<'_>) -> Poll<Result<Parked, Error>> {
        let key = match std::task::ready!(self.poll_sent(leave, cx)) {
            Ok(key) => key,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let State::Sent(sent) = &mut self.0 else {
            unreachable!("it was just sent")
        };
        let core = sent.app.core();
        let parked = lock(&core.pending).poll_parked(key, cx);
        if let Err(error) = std::task::ready!(parked) {
            self.0 = State::Done;
            return Poll::Ready(Err(error));
        }
        // Nobody else may be watching the time.
        core.arm_tick();
        let id = match sent.chosen.take() {
            Some(id) => id,
            None => {
                let life = Some(lock(&core.pending).life);
                Id { key, life }.text()
            }
        };
        sent.at_drop = AtDrop::Leave(id.clone());
        let outgoing = Outgoing(std::mem::replace(&mut self.0, State::Done));
        Poll::Ready(Ok(Parked { outgoing, id }))
    }
}

/// Opens the end of a call in an encrypted pool.
pub(crate) fn open_reply(sealed: &SealedCall, reply: Result<Reply, Error>) -> Result<Reply, Error> {
    let mut reply = reply.map_err(|error| sealed.open_error(error))?;
    let answer = sealed.open("ok", &reply.payload)?;
    (reply.payload, reply.headers) = (answer.payload, answer.headers);
    Ok(reply)
}

/// Whether a call may live longer than the time window of messages: its envelope says when it
/// expires.
fn may_outlive_window(parking: &ParkOptions) -> bool {
    parking.park.is_allowed() || parking.redeliver
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let State::Sent(sent) = &self.0 {
            match &sent.at_drop {
                AtDrop::Cancel => sent.app.core().forget(sent.key),
                AtDrop::Leave(id) => sent.app.core().leave(sent.key, id),
            }
        }
    }
}

fn grace(timeout: Duration) -> Duration {
    (timeout / 2).clamp(GRACE.0, GRACE.1)
}

fn too_late(is_connected: bool) -> Error {
    let error = match is_connected {
        true => Error::new(
            Code::Overloaded,
            "the call's time ended while it waited to be sent: too many calls are waiting",
        ),
        false => Error::new(
            Code::Disconnected,
            "there was no connection to the server within the call's time; is it running?",
        ),
    };
    error.with_ran(Ran::No)
}

/// A call whose answer is awaited. Dropping it cancels the call, unless it belongs to a [`Parked`].
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Calling<R> {
    outgoing: Outgoing,
    read: fn(Reply) -> Result<R, Error>,
    result: PhantomData<fn() -> R>,
}

impl<R> Calling<R> {
    pub(crate) fn of_message(
        app: &App,
        message: Message,
        read: fn(Reply) -> Result<R, Error>,
    ) -> Self {
        Calling {
            outgoing: Outgoing::of_message(app, message),
            read,
            result: PhantomData,
        }
    }

    /// Sets another time limit for the answer than the app's default.
    pub(crate) fn within(mut self, timeout: Duration) -> Self {
        if let Outgoing(State::Unsent(unsent)) = &mut self.outgoing {
            unsent.timeout = timeout;
        }
        self
    }

    /// Like the poll of its future, without the pin.
    pub(crate) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<R, Error>> {
        let read = self.read;
        let reply = self.outgoing.poll_reply(Leave::Soon, cx);
        reply.map(|reply| reply.and_then(read))
    }

    /// Cancels the request but still waits for its answer; false if it was not sent.
    pub(crate) fn cancel(&self) -> bool {
        let Some((app, key)) = self.outgoing.sent() else {
            return false;
        };
        let core = app.core();
        let in_flight = lock(&core.pending).in_flight(key);
        if let Some(call) = in_flight {
            core.cancel(&call);
        }
        true
    }

    /// Waits for the answer on this thread.
    pub(crate) fn wait(mut self) -> Result<R, Error> {
        let app = self.outgoing.app().cloned().expect("it was not polled yet");
        let deadline = self.outgoing.wait_until();
        let poll = |cx: &mut Context<'_>| self.outgoing.poll_reply(Leave::Now, cx);
        match app.core().block_on(deadline, poll) {
            Some(reply) => reply.and_then(self.read),
            None => Err(silence()),
        }
    }
}

impl<R> Future for Calling<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_reply(cx)
    }
}

/// A call that is sent to be stored by the server. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Parking(Outgoing);

impl Parking {
    /// Waits on this thread until the call is on disk, or answered.
    pub(crate) fn wait(mut self) -> Result<Parked, Error> {
        let app = self.0.app().cloned().expect("it was not polled yet");
        let deadline = self.0.wait_until();
        app.core()
            .block_on(deadline, |cx| self.0.poll_parked(Leave::Now, cx))
            .unwrap_or_else(|| Err(silence()))
    }
}

impl Future for Parking {
    type Output = Result<Parked, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_parked(Leave::Soon, cx)
    }
}

/// A call that the server stores until it is answered, or that is already answered. The call
/// continues if this, or the wait for its answer, is dropped: its answer then goes to
/// [`App::answers`].
#[derive(Debug)]
pub struct Parked {
    outgoing: Outgoing,
    id: Box<str>,
}

impl Parked {
    /// The call's id, by which [`App::answers`] names it, in later processes of the app too.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Waits for the answer as `R`. A lost connection does not end the wait; closing the app or the
    /// call's deadline does.
    pub fn answer<R: FromPayload>(self) -> Calling<R> {
        Calling {
            outgoing: self.outgoing,
            read: Reply::into,
            result: PhantomData,
        }
    }

    /// Like [`Parked::answer`], but returns the answer as received, with its headers.
    pub fn reply(self) -> Calling<Reply> {
        Calling {
            outgoing: self.outgoing,
            read: Ok,
            result: PhantomData,
        }
    }

    /// Cancels the call: the server removes it, or cancels it at its handler. If there is no
    /// connection, the cancel is sent over the next one.
    pub fn cancel(mut self) {
        if let State::Sent(sent) = &mut self.outgoing.0 {
            sent.at_drop = AtDrop::Cancel;
        }
    }
}

impl IntoFuture for Parked {
    type Output = Result<Value, Error>;
    type IntoFuture = Calling<Value>;

    fn into_future(self) -> Calling<Value> {
        self.answer()
    }
}

/// An emit that has not been sent yet; awaiting it sends it.
#[derive(Debug)]
#[must_use = "an emit is sent when it is awaited"]
pub struct Emit(Box<Unsent>);

impl Emit {
    pub(crate) fn new<T: IntoPayload + ?Sized>(app: &App, name: &str, data: &T) -> Self {
        Emit(Unsent::with_data(app, "emit", name, data))
    }

    /// Sends it only to this app.
    pub fn to(mut self, app_id: &str) -> Self {
        self.0.set_app(app_id);
        self
    }

    /// Sends it only to this instance of an app.
    pub fn to_instance(mut self, app_id: &str, instance: InstanceId) -> Self {
        self.0.set_instance(app_id, instance);
        self
    }

    /// Sends it to one handler rather than to all.
    pub fn one(mut self) -> Self {
        self.0.message.string("deliver", "one");
        self
    }

    /// Sends it in this pool. Required if the app is in several pools.
    pub fn pool(mut self, pool: &str) -> Self {
        self.0.set_pool(pool);
        self
    }

    /// The key by which a sticky trigger chooses a handler.
    pub fn key(mut self, key: &str) -> Self {
        self.0.set_key(key);
        self
    }

    /// Adds a header, which the handlers receive unchanged.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.0.header(name, value);
        self
    }

    /// Sends these bytes unchanged instead of the data, next to the JSON.
    pub fn raw_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.0.set_bytes(bytes);
        self
    }

    /// Sends it; the future returns the number of handlers that it was sent to.
    pub fn counted(mut self) -> Calling<u64> {
        #[derive(Deserialize)]
        struct Delivered {
            delivered: u64,
        }
        self.0.seal(Act::Emit, None);
        self.0.finish();
        Calling {
            outgoing: Outgoing(State::Unsent(self.0)),
            read: |reply| reply.into::<Delivered>().map(|d| d.delivered),
            result: PhantomData,
        }
    }
}

impl IntoFuture for Emit {
    type Output = Result<(), Error>;
    type IntoFuture = Emitting;

    fn into_future(mut self) -> Emitting {
        self.0.seal(Act::Emit, None);
        self.0.finish();
        Emitting(Some(self.0))
    }
}

/// An emit that is being sent. It is done when it is passed to the connection.
#[derive(Debug)]
#[must_use = "an emit is sent when it is awaited"]
pub struct Emitting(Option<Box<Unsent>>);

impl Emitting {
    fn poll_with(&mut self, leave: Leave, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let unsent = self.0.as_mut().expect("not polled after it ended");
        if let Some(error) = unsent.failure.take() {
            self.0 = None;
            return Poll::Ready(Err(error));
        }
        let core = unsent.app.core();
        let result = match core.poll_submit(&mut unsent.message, By::Any, leave, cx) {
            Poll::Ready(result) => result.map(|_| ()),
            Poll::Pending => {
                // The clock is read only if there is something to wait for.
                let now = Instant::now();
                if now < *unsent.deadline.get_or_insert(now + unsent.timeout) {
                    return Poll::Pending;
                }
                Err(too_late(core.is_connected()))
            }
        };
        self.0 = None;
        Poll::Ready(result)
    }

    /// Sends it from this thread.
    pub(crate) fn wait(mut self) -> Result<(), Error> {
        let unsent = self.0.as_ref().expect("it was not polled yet");
        let app = unsent.app.clone();
        let deadline = Instant::now() + unsent.timeout + GRACE.1;
        app.core()
            .block_on(Some(deadline), |cx| self.poll_with(Leave::Now, cx))
            .unwrap_or_else(|| Err(too_late(app.core().is_connected())))
    }
}

impl Future for Emitting {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_with(Leave::Soon, cx)
    }
}
