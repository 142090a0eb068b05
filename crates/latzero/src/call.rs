//! Calls and emits: builders, and the futures that they turn into.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use latzero_protocol::encode::append_str;
use latzero_protocol::{Code, InstanceId, Ran};
use serde::Deserialize;
use serde_json::Value;

use crate::app::App;
use crate::core::Leave;
use crate::error::Error;
use crate::message::Message;
use crate::outbox::By;
use crate::payload::{self, Bytes, FromPayload, IntoPayload, Payload, Reply};
use crate::pending::Key;
use crate::stream::Stream;

/// How long the server's own `timeout` is waited for beyond a call's time: half as long again, within these.
const GRACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What calls and emits have in common.
#[derive(Debug)]
struct Parts {
    app: App,
    message: Message,
    payload: Result<Payload, Error>,
    headers: Vec<u8>,
}

impl Parts {
    fn new(app: &App, action: &str, name: &str, payload: Result<Payload, Error>) -> Self {
        let mut message = Message::new(action);
        message.string("process", name);
        Parts {
            app: app.clone(),
            message,
            payload,
            headers: Vec::new(),
        }
    }

    fn set_app(&mut self, app_id: &str) {
        self.message.string("destination", app_id);
    }

    fn set_instance(&mut self, app_id: &str, instance: InstanceId) {
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

    fn finish(mut self) -> Result<(App, Message), Error> {
        if !self.headers.is_empty() {
            self.headers.push(b'}');
            self.message.json("headers", &self.headers);
        }
        self.message.payload("data", self.payload?);
        Ok((self.app, self.message))
    }
}

/// A call that is not sent yet. Awaiting it sends it and gives the answer as a JSON value; [`Call::send`] gives it as
/// any type.
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Call {
    parts: Parts,
    timeout: Duration,
    pub(crate) window: u64,
}

/// Items of a stream that may be under way, unless a call says otherwise.
const WINDOW: u64 = 64;

impl Call {
    pub(crate) fn new<T: IntoPayload + ?Sized>(app: &App, name: &str, data: &T) -> Self {
        Call {
            parts: Parts::new(app, "trigger", name, payload::write(data)),
            timeout: app.core().config.call_timeout,
            window: WINDOW,
        }
    }

    /// How long the answer may take, from now on.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Calls this app, whoever else serves the trigger.
    pub fn to(mut self, app_id: &str) -> Self {
        self.parts.set_app(app_id);
        self
    }

    /// Calls this instance of an app.
    pub fn to_instance(mut self, app_id: &str, instance: InstanceId) -> Self {
        self.parts.set_instance(app_id, instance);
        self
    }

    /// Calls in this pool. Needed where the app is in several.
    pub fn pool(mut self, pool: &str) -> Self {
        self.parts.message.string("pool", pool);
        self
    }

    /// What a sticky trigger goes by: calls with the same key reach the same handler.
    pub fn key(mut self, key: &str) -> Self {
        self.parts.message.string("key", key);
        self
    }

    /// Adds a header, passed to the handler untouched.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.parts.header(name, value);
        self
    }

    /// Where no handler is live, wait for one until the time is over.
    pub fn park(mut self) -> Self {
        self.parts.message.json("park", b"true");
        self
    }

    /// Sends these bytes instead of the data, beside the JSON and as they are.
    pub fn raw_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.parts.payload = Ok(Payload::Bytes(bytes));
        self
    }

    /// Items of a streamed answer that may be under way (default 64): the bound of what waits here.
    pub fn window(mut self, window: u64) -> Self {
        self.window = window.clamp(1, latzero_protocol::limits::WINDOW_MAX);
        self
    }

    /// Sends the call; the future gives the answer as `R`. Dropping the future cancels the call.
    pub fn send<R: FromPayload>(self) -> Calling<R> {
        Calling {
            outgoing: Outgoing::of_call(self, None),
            read: Reply::into,
            result: PhantomData,
        }
    }

    /// Sends the call; the future gives the answer as it came, with its headers.
    pub fn reply(self) -> Calling<Reply> {
        Calling {
            outgoing: Outgoing::of_call(self, None),
            read: Ok,
            result: PhantomData,
        }
    }

    /// Sends the call; the future gives the answer's raw bytes.
    pub fn bytes(self) -> Calling<Bytes> {
        self.send()
    }

    /// Opens a streamed answer. The call is sent when the first item is asked for; its time covers the whole stream.
    pub fn stream<R: FromPayload>(mut self) -> Stream<R> {
        let window = self.window;
        self.parts.message.number("window", window);
        Stream::new(
            self.parts.app.clone(),
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

/// A request on its way: waiting to be sent, or for its reply.
#[derive(Debug)]
pub(crate) struct Outgoing(State);

#[derive(Debug)]
enum State {
    Unsent(Box<Unsent>),
    Sent(App, Key),
    Done,
}

#[derive(Debug)]
struct Unsent {
    app: App,
    message: Message,
    timeout: Duration,
    deadline: Option<Instant>,
    window: Option<u64>,
    failure: Option<Error>,
}

impl Outgoing {
    fn of_call(call: Call, window: Option<u64>) -> Self {
        let timeout = call.timeout;
        let app = call.parts.app.clone();
        let (message, failure) = match call.parts.finish() {
            Ok((_, mut message)) => {
                let ttl = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                message.number("ttl", ttl.clamp(1, latzero_protocol::limits::TTL_MAX_MS));
                (message, None)
            }
            Err(error) => (Message::new("trigger"), Some(error.with_ran(Ran::No))),
        };
        let unsent = Unsent {
            app,
            message,
            timeout,
            deadline: None,
            window,
            failure,
        };
        Outgoing(State::Unsent(Box::new(unsent)))
    }

    pub(crate) fn of_message(app: &App, message: Message) -> Self {
        let timeout = app.core().config.call_timeout;
        let app = app.clone();
        let unsent = Unsent {
            app,
            message,
            timeout,
            deadline: None,
            window: None,
            failure: None,
        };
        Outgoing(State::Unsent(Box::new(unsent)))
    }

    /// The app and the key of a request that was sent and has not ended.
    pub(crate) fn sent(&self) -> Option<(&App, Key)> {
        match &self.0 {
            State::Sent(app, key) => Some((app, *key)),
            _ => None,
        }
    }

    pub(crate) fn app(&self) -> Option<&App> {
        match &self.0 {
            State::Unsent(unsent) => Some(&unsent.app),
            State::Sent(app, _) => Some(app),
            State::Done => None,
        }
    }

    /// When a blocked caller gives up, where neither the server nor the driver does.
    pub(crate) fn patience(&self) -> Option<Instant> {
        match &self.0 {
            State::Unsent(unsent) => Some(Instant::now() + unsent.timeout + grace(unsent.timeout)),
            _ => None,
        }
    }

    /// Notes that the reply was taken.
    pub(crate) fn done(&mut self) {
        self.0 = State::Done;
    }

    /// Sends the request, where that is not done; its key then.
    pub(crate) fn poll_sent(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Key, Error>> {
        let unsent = match &mut self.0 {
            State::Sent(_, key) => return Poll::Ready(Ok(*key)),
            State::Done => panic!("polled after it ended"),
            State::Unsent(unsent) => unsent,
        };
        if let Some(error) = unsent.failure.take() {
            self.0 = State::Done;
            return Poll::Ready(Err(error));
        }
        let now = Instant::now();
        let deadline = *unsent.deadline.get_or_insert(now + unsent.timeout);
        let by = By::Call {
            deadline: deadline + grace(unsent.timeout),
            window: unsent.window,
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
        self.0 = State::Sent(unsent.app, key);
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
        let State::Sent(app, _) = &self.0 else {
            unreachable!("it was just sent")
        };
        let reply = std::task::ready!(app.core().poll_reply(key, cx));
        self.0 = State::Done;
        Poll::Ready(reply)
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let State::Sent(app, key) = &self.0 {
            app.core().forget(*key);
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
            "too much is waiting to be sent or answered; the call's time ended before its turn",
        ),
        false => Error::new(
            Code::Disconnected,
            "there was no connection to the server within the call's time; is it running?",
        ),
    };
    error.with_ran(Ran::No)
}

/// A call whose answer is awaited. Dropping it cancels the call.
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

    /// Waits for the answer on this thread.
    pub(crate) fn wait(mut self) -> Result<R, Error> {
        let app = self.outgoing.app().cloned().expect("it was not polled yet");
        let patience = self.outgoing.patience();
        let poll = |cx: &mut Context<'_>| self.outgoing.poll_reply(Leave::Now, cx);
        match app.core().block_on(patience, poll) {
            Some(reply) => reply.and_then(self.read),
            None => Err(Error::new(
                Code::Timeout,
                "no answer came, not even the server's own; is it stuck?",
            )),
        }
    }
}

impl<R> Future for Calling<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let read = self.read;
        self.outgoing
            .poll_reply(Leave::Soon, cx)
            .map(|reply| reply.and_then(read))
    }
}

/// An emit that is not sent yet; awaiting it sends it.
#[derive(Debug)]
#[must_use = "an emit is sent when it is awaited"]
pub struct Emit(Parts);

impl Emit {
    pub(crate) fn new<T: IntoPayload + ?Sized>(app: &App, name: &str, data: &T) -> Self {
        Emit(Parts::new(app, "emit", name, payload::write(data)))
    }

    /// To this app alone.
    pub fn to(mut self, app_id: &str) -> Self {
        self.0.set_app(app_id);
        self
    }

    /// To this instance of an app alone.
    pub fn to_instance(mut self, app_id: &str, instance: InstanceId) -> Self {
        self.0.set_instance(app_id, instance);
        self
    }

    /// To one handler rather than to all.
    pub fn one(mut self) -> Self {
        self.0.message.string("deliver", "one");
        self
    }

    /// In this pool. Needed where the app is in several.
    pub fn pool(mut self, pool: &str) -> Self {
        self.0.message.string("pool", pool);
        self
    }

    /// What a sticky trigger goes by when one handler is picked.
    pub fn key(mut self, key: &str) -> Self {
        self.0.message.string("key", key);
        self
    }

    /// Adds a header, passed to the handlers untouched.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.0.header(name, value);
        self
    }

    /// Sends these bytes instead of the data, beside the JSON and as they are.
    pub fn raw_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.0.payload = Ok(Payload::Bytes(bytes));
        self
    }

    /// Sends it, and gives the number of handlers that it went to.
    pub fn counted(self) -> Calling<u64> {
        #[derive(Deserialize)]
        struct Delivered {
            delivered: u64,
        }
        let app = self.0.app.clone();
        let read = |reply: Reply| reply.into::<Delivered>().map(|d| d.delivered);
        match self.0.finish() {
            Ok((_, message)) => Calling::of_message(&app, message, read),
            Err(error) => {
                let mut calling = Calling::of_message(&app, Message::new("emit"), read);
                if let State::Unsent(unsent) = &mut calling.outgoing.0 {
                    unsent.failure = Some(error);
                }
                calling
            }
        }
    }
}

impl IntoFuture for Emit {
    type Output = Result<(), Error>;
    type IntoFuture = Emitting;

    fn into_future(self) -> Emitting {
        let timeout = self.0.app.core().config.call_timeout;
        Emitting {
            sending: Some(self.0.finish()),
            timeout,
            deadline: None,
        }
    }
}

/// An emit on its way. It is done when it is handed to the connection.
#[derive(Debug)]
#[must_use = "an emit is sent when it is awaited"]
pub struct Emitting {
    sending: Option<Result<(App, Message), Error>>,
    timeout: Duration,
    deadline: Option<Instant>,
}

impl Emitting {
    fn poll_with(&mut self, leave: Leave, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let (app, message) = match self.sending.as_mut().expect("not polled after it ended") {
            Ok(sending) => (&sending.0, &mut sending.1),
            Err(_) => return Poll::Ready(self.sending.take().expect("just seen").map(|_| ())),
        };
        let core = app.core();
        let result = match core.poll_submit(message, By::Any, leave, cx) {
            Poll::Ready(result) => result.map(|_| ()),
            Poll::Pending => {
                // The clock is read only where there is something to wait for.
                let now = Instant::now();
                if now < *self.deadline.get_or_insert(now + self.timeout) {
                    return Poll::Pending;
                }
                Err(too_late(core.is_connected()))
            }
        };
        self.sending = None;
        Poll::Ready(result)
    }

    /// Sends it from this thread.
    pub(crate) fn wait(mut self) -> Result<(), Error> {
        let app = match &self.sending {
            Some(Ok((app, _))) => app.clone(),
            Some(Err(error)) => return Err(error.clone()),
            None => return Ok(()),
        };
        let patience = Instant::now() + self.timeout + GRACE.1;
        app.core()
            .block_on(Some(patience), |cx| self.poll_with(Leave::Now, cx))
            .unwrap_or_else(|| Err(too_late(app.core().is_connected())))
    }
}

impl Future for Emitting {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_with(Leave::Soon, cx)
    }
}
