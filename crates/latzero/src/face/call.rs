//! Calls and emits: builders and their futures.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use latzero_crypto::events::Act;
use latzero_protocol::limits::{PARKED_TTL_MAX_MS, TTL_MAX_MS};
use latzero_protocol::message::{IDEMPOTENCY_KEY, Park};
use latzero_protocol::{InstanceId, Ran};
use serde::Deserialize;
use serde_json::Value;

use crate::drive::core::Leave;
use crate::error::Error;
use crate::face::app::{App, check_name};
use crate::face::block::Block;
use crate::face::outgoing::{Calling, Outgoing, Parking, Stage};
use crate::face::stream::Stream;
use crate::face::unsent::{GRACE, ParkOptions, Unsent, check_id, too_late};
use crate::payload::{Bytes, FromPayload, IntoPayload, Reply};
use crate::wire::outbox::By;

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

    /// Signs the call, for a [privileged](crate::Handler::privileged) trigger. The answer is signed
    /// too.
    ///
    /// It fails with `forbidden` if the app does not have the pool's OblivionSeal, and with
    /// `bad_message` if the pool is not encrypted.
    pub fn privileged(mut self) -> Self {
        self.unsent.is_privileged = true;
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

    /// Adds what follows from its options; it is complete then.
    fn outgoing(self, window: Option<u64>) -> Outgoing {
        let mut unsent = self.unsent;
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
        Outgoing(Stage::Unsent(unsent))
    }

    /// Sends the call; the future returns the answer as `R`. Dropping the future cancels the call.
    pub fn send<R: FromPayload>(self) -> Calling<R> {
        Calling {
            outgoing: self.outgoing(None),
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
        Parking(call.outgoing(None))
    }

    /// Sends the call; the future returns the answer as received, with its headers.
    pub fn reply(self) -> Calling<Reply> {
        Calling {
            outgoing: self.outgoing(None),
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
        Stream::new(self.unsent.app.clone(), self.outgoing(Some(window)), window)
    }
}

impl IntoFuture for Call {
    type Output = Result<Value, Error>;
    type IntoFuture = Calling<Value>;

    fn into_future(self) -> Calling<Value> {
        self.send()
    }
}

/// Whether a call may live longer than the time window of messages: its envelope says when it
/// expires.
fn may_outlive_window(parking: &ParkOptions) -> bool {
    parking.park.is_allowed() || parking.redeliver
}

/// An emit that has not been sent yet; awaiting it sends it.
#[derive(Debug)]
#[must_use = "an emit is sent when it is awaited"]
pub struct Emit {
    unsent: Box<Unsent>,
    names_pool: bool,
}

impl Emit {
    pub(crate) fn new<T: IntoPayload + ?Sized>(app: &App, name: &str, data: &T) -> Self {
        let mut emit = Emit {
            unsent: Unsent::with_data(app, "emit", name, data),
            names_pool: false,
        };
        emit.check(check_name(name));
        emit
    }

    /// Keeps the first failure. The server's refusal of an emit reaches nobody.
    fn check(&mut self, checked: Result<(), Error>) {
        if let Err(error) = checked {
            self.unsent.failure.get_or_insert(error);
        }
    }

    fn finish(&mut self) {
        if !self.names_pool {
            let checked = self.unsent.app.core().check_member(None);
            self.check(checked);
        }
        self.unsent.seal(Act::Emit, None);
        self.unsent.finish();
    }

    /// Sends it only to this app.
    pub fn to(mut self, app_id: &str) -> Self {
        self.unsent.set_app(app_id);
        self
    }

    /// Sends it only to this instance of an app.
    pub fn to_instance(mut self, app_id: &str, instance: InstanceId) -> Self {
        self.unsent.set_instance(app_id, instance);
        self
    }

    /// Sends it to one handler rather than to all.
    pub fn one(mut self) -> Self {
        self.unsent.message.string("deliver", "one");
        self
    }

    /// Sends it in this pool. Required if the app is in several pools.
    pub fn pool(mut self, pool: &str) -> Self {
        let checked = self.unsent.app.core().check_member(Some(pool));
        self.check(checked);
        self.unsent.set_pool(pool);
        self.names_pool = true;
        self
    }

    /// The key by which a sticky trigger chooses a handler.
    pub fn key(mut self, key: &str) -> Self {
        self.unsent.set_key(key);
        self
    }

    /// Signs it, for [privileged](crate::Handler::privileged) handlers; see [`Call::privileged`].
    pub fn privileged(mut self) -> Self {
        self.unsent.is_privileged = true;
        self
    }

    /// Adds a header, which the handlers receive unchanged.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.unsent.header(name, value);
        self
    }

    /// Sends these bytes unchanged instead of the data, next to the JSON.
    pub fn raw_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.unsent.set_bytes(bytes);
        self
    }

    /// Sends it; the future returns the number of handlers that it was sent to.
    pub fn counted(mut self) -> Calling<u64> {
        #[derive(Deserialize)]
        struct Delivered {
            delivered: u64,
        }
        self.finish();
        Calling {
            outgoing: Outgoing(Stage::Unsent(self.unsent)),
            read: |reply| reply.into::<Delivered>().map(|d| d.delivered),
            result: PhantomData,
        }
    }
}

impl IntoFuture for Emit {
    type Output = Result<(), Error>;
    type IntoFuture = Emitting;

    fn into_future(mut self) -> Emitting {
        self.finish();
        Emitting(Some(self.unsent))
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
