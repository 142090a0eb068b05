//! The blocking API: the same app, with calls that wait.
//!
//! ```no_run
//! use latzero::blocking::App;
//!
//! # fn main() -> Result<(), latzero::Error> {
//! let calc = App::connect("latzero://calc?pool=alpha")?;
//! calc.serve("double", |req| Ok(req.data::<i64>()? * 2))?;
//!
//! let app = App::connect("latzero://me?pool=alpha")?;
//! let doubled: i64 = app.call("double", &21).send()?;
//! assert_eq!(doubled, 42);
//! # Ok(())
//! # }
//! ```

mod block;

pub use crate::interrupt::interruptible;

use std::ops::Deref;
use std::time::{Duration, Instant};

use latzero_protocol::message::Strategy;
use latzero_protocol::{Code, InstanceId};
use serde_json::{Value, json};

use crate::drive::answers::Answer;
use crate::drive::events::{Emission, Presence};
use crate::drive::states::State;
use crate::error::{Error, HandlerError};
use crate::face::app::{CLOSE_TIME, described, describing};
use crate::face::builder;
use crate::face::events::Event;
use crate::face::request::Interim;
use crate::face::stream::ItemOrProgress;
use crate::payload::{self, Bytes, FromPayload, IntoPayload, Reply};
use crate::wire::message::Message;

pub use block::{
    Block, BlockLock, BlockName, BlockWriter, Changes, CreateBlock, Draft, TypedBlock,
};

/// One app's connection: calls triggers, serves triggers, sends and receives events. Cheap to
/// clone; when the last clone is dropped, the connection closes and its threads end.
#[derive(Debug, Clone)]
pub struct App(crate::App);

impl App {
    /// Connects; see [`crate::App::connect`] for addresses.
    ///
    /// # Errors
    /// If the address is wrong, no server answers, or it refuses the handshake.
    pub fn connect(url: &str) -> Result<App, Error> {
        App::connect_with(crate::App::builder(url))
    }

    /// Connects with more options than an address has.
    ///
    /// # Errors
    /// As [`App::connect`].
    pub fn connect_with(builder: builder::Builder) -> Result<App, Error> {
        builder.connect_blocking().map(App)
    }

    /// The same app with its async API.
    #[must_use]
    pub fn as_async(&self) -> &crate::App {
        &self.0
    }

    /// Runs a future of the async API on this thread, which also reads the connection if nobody
    /// else does. `None` if it is not done at `deadline`, or [`interruptible`] ended the wait; the
    /// future may then be run further.
    pub fn run<T>(
        &self,
        deadline: Option<Instant>,
        future: &mut (impl Future<Output = T> + Unpin),
    ) -> Option<T> {
        let mut future = std::pin::Pin::new(future);
        self.0
            .core()
            .block_on(deadline, |cx| future.as_mut().poll(cx))
    }

    /// The AppID.
    #[must_use]
    pub fn app_id(&self) -> &str {
        self.0.app_id()
    }

    /// The id of the current connection; it changes with each reconnect.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceId> {
        self.0.instance()
    }

    /// The pools that the app is in.
    #[must_use]
    pub fn joined(&self) -> Vec<String> {
        self.0.joined()
    }

    /// Whether the app is connected now. Calls made while it is not wait for the connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    /// Calls the trigger `name`.
    pub fn call<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Call {
        Call(self.0.call(name, data))
    }

    /// Calls the trigger `name` for a streamed answer; [`Call::stream`] has more options.
    pub fn stream<R: FromPayload>(
        &self,
        name: &str,
        data: &(impl IntoPayload + ?Sized),
    ) -> Stream<R> {
        Stream(self.0.stream(name, data))
    }

    /// Sends an event to every handler of the trigger `name`, without an answer.
    pub fn emit<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Emit {
        Emit(self.0.emit(name, data))
    }

    /// Serves the trigger `name`. The handler runs on the thread that read the call. If that takes
    /// long, another thread continues to read; there are at most as many as
    /// [`crate::Builder::handler_threads`] says.
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub fn serve<T: IntoPayload>(
        &self,
        name: &str,
        handler: impl Fn(Request) -> Result<T, HandlerError> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.handler(name).serve(handler)
    }

    /// Serves a trigger with more options than its name.
    pub fn handler(&self, name: &str) -> Handler {
        Handler(self.0.handler(name))
    }

    /// Stops serving the trigger `name`. Running calls are finished.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn unserve(&self, name: &str) -> Result<(), Error> {
        self.0.unserving(name).map_or(Ok(()), crate::Calling::wait)
    }

    /// Receives emits of the trigger `name`.
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub fn on(&self, name: &str) -> Result<Events<Emission>, Error> {
        block::run(&self.0, self.0.on(name)).map(Events)
    }

    /// Receives the events of a pool: apps and triggers that appear and disappear.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn watch(&self, pool: &str) -> Result<Events<Presence>, Error> {
        block::run(&self.0, self.0.watch(pool)).map(Events)
    }

    /// The answers to parked calls that nobody in this process waits for, including calls of
    /// earlier processes of the app; see [`crate::App::answers`].
    #[must_use]
    pub fn answers(&self) -> Answers {
        Answers(self.0.answers())
    }

    /// The changes of the connection from now on: each loss, each reconnect, and the end.
    #[must_use]
    pub fn states(&self) -> States {
        States(self.0.states())
    }

    /// How many events and answers were dropped so far; see [`crate::App::lost`].
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.0.lost()
    }

    /// Whether the app's registration is on the server's disk; see [`crate::App::is_stored`].
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.0.is_stored()
    }

    /// As [`App::unverified`](crate::App::unverified).
    #[must_use]
    pub fn unverified(&self) -> u64 {
        self.0.unverified()
    }

    /// Joins a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn join(&self, pool: &str) -> Result<(), Error> {
        self.0.core().note_named(pool);
        let joined = self.0.joining("pool_join", pool).wait();
        self.0.core().note_joining(pool, joined)
    }

    /// Leaves a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn leave(&self, pool: &str) -> Result<(), Error> {
        self.0.joining("pool_leave", pool).wait()?;
        self.0.core().note_left(pool);
        Ok(())
    }

    /// The apps that the server knows, as it describes them.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn apps(&self) -> Result<Value, Error> {
        self.request(&json!({"action": "app_list"}))
    }

    /// The pools that the server knows, as it describes them.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn pools(&self) -> Result<Value, Error> {
        self.request(&json!({"action": "pool_list"}))
    }

    /// A trigger of a pool, as the server describes it; see [`crate::App::trigger`].
    ///
    /// # Errors
    /// `no_pool` if the app can't see the pool.
    pub fn trigger(&self, pool: &str, name: &str) -> Result<Option<Value>, Error> {
        self.request(&describing(pool, name)).map(described)
    }

    /// Sends any request to the server: `request` is a message of the protocol, with its `action`
    /// and without an `id`.
    ///
    /// # Errors
    /// If the server refuses, and `bad_message` if `request` is not such a message.
    pub fn request(&self, request: &Value) -> Result<Value, Error> {
        self.0.requesting(request)?.wait()
    }

    /// Like [`App::request`], with the answer as another type: `Box<RawValue>` is its text as
    /// received.
    ///
    /// # Errors
    /// As there.
    pub fn request_as<R: FromPayload>(&self, request: &Value) -> Result<R, Error> {
        self.0.requesting(request)?.wait()
    }

    /// Gives this connection administrator rights; see [`crate::App::prove_admin`].
    ///
    /// # Errors
    /// As there.
    pub fn prove_admin(&self, token: &str, may_be_unbound: bool) -> Result<(), Error> {
        self.0.prove_admin(token, may_be_unbound)
    }

    /// Moves an encrypted pool to its next epoch; see [`crate::App::rotate_pool`].
    ///
    /// # Errors
    /// As there.
    pub fn rotate_pool(
        &self,
        pool: &str,
        new: &crate::Keys,
        is_history_cut: bool,
    ) -> Result<Value, Error> {
        self.0.rotate_pool(pool, new, is_history_cut)
    }

    /// Checks that the server responds; returns how long the answer took.
    ///
    /// # Errors
    /// If no answer arrives.
    pub fn ping(&self) -> Result<Duration, Error> {
        let started = Instant::now();
        self.0.asking(Message::new("ping")).wait()?;
        Ok(started.elapsed())
    }

    /// Closes cleanly; see [`crate::App::close`].
    ///
    /// # Errors
    /// `timeout` if handlers or the server took longer; the connection is closed anyway.
    pub fn close(&self) -> Result<(), Error> {
        self.close_within(CLOSE_TIME)
    }

    /// Like [`App::close`], but waits at most `time`.
    ///
    /// # Errors
    /// As [`App::close`].
    pub fn close_within(&self, time: Duration) -> Result<(), Error> {
        self.0.close_within(time)
    }
}

impl From<crate::App> for App {
    /// The same app with its blocking API. Do not use it on a thread that drives the async API.
    fn from(app: crate::App) -> Self {
        App(app)
    }
}

macro_rules! builder_methods {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            pub fn $name(self, $($arg: $type),*) -> Self {
                Self(self.0.$name($($arg),*))
            }
        )*
    };
}

/// A call that is not sent yet.
#[derive(Debug)]
#[must_use = "a call is sent by `send`"]
pub struct Call(crate::Call);

impl From<crate::Call> for Call {
    /// The same call, with methods that wait.
    fn from(call: crate::Call) -> Self {
        Call(call)
    }
}

impl Call {
    builder_methods! {
        /// How long the answer may take, from now on.
        timeout(timeout: Duration);
        /// Calls this app, even if others serve the trigger.
        to(app_id: &str);
        /// Calls this instance of an app.
        to_instance(app_id: &str, instance: InstanceId);
        /// Calls in this pool. Needed where the app is in several.
        pool(pool: &str);
        /// The key of a sticky trigger: calls with the same key reach the same handler.
        key(key: &str);
        /// Adds a header, which the handler receives unchanged.
        header(name: &str, value: &str);
        /// Signs the call, for a privileged trigger; see [`crate::Call::privileged`].
        privileged();
        /// If no handler can take the call now, the server keeps it on disk until one can; see
        /// [`crate::Call::park`].
        park();
        /// Like [`Call::park`], but the call is stored even if a handler can take it at once; see
        /// [`crate::Call::always_park`].
        always_park();
        /// Gives the call to another handler if its handler's connection ends before it answered;
        /// see [`crate::Call::redeliver`].
        redeliver();
        /// How many times a parked or redelivered call may be delivered; see
        /// [`crate::Call::attempts`].
        attempts(attempts: u32);
        /// Makes the call safe to repeat; see [`crate::Call::idempotency_key`].
        idempotency_key(key: &str);
        /// Chooses the id of the call, 1 to 128 bytes; see [`crate::Call::id`].
        id(id: &str);
        /// Sends these bytes unchanged instead of the data, next to the JSON.
        raw_bytes(bytes: Vec<u8>);
        /// How many items of a streamed answer may be sent before they are read (default 64).
        window(window: u64);
    }

    /// Lets the handler read a memory block of the call's pool during the call.
    pub fn block(self, block: &Block) -> Self {
        Call(self.0.block(&block.0))
    }

    /// Like [`Call::block`], for reading and writing.
    pub fn block_writable(self, block: &Block) -> Self {
        Call(self.0.block_writable(&block.0))
    }

    /// Sends the call and waits for the answer.
    ///
    /// # Errors
    /// The error of the handler or the server; `bad_message` if the answer is not an `R`.
    pub fn send<R: FromPayload>(self) -> Result<R, Error> {
        self.0.send().wait()
    }

    /// Sends the call to be stored by the server until it is answered, and waits until it is on
    /// disk, or answered if a handler takes it at once; see [`crate::Call::send_parked`].
    ///
    /// ```no_run
    /// use latzero::blocking::App;
    ///
    /// # fn main() -> Result<(), latzero::Error> {
    /// let app = App::connect("latzero://shop?pool=alpha")?;
    /// let parked = app.call("ship", &"order 17").id("order-17").send_parked()?;
    /// let receipt: String = parked.answer()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// `storage` if the disk cannot be written, `overloaded` if the server already stores too many
    /// calls, else the error of the handler or the server.
    pub fn send_parked(self) -> Result<Parked, Error> {
        self.0.send_parked().wait().map(Parked)
    }

    /// Sends the call and waits for the answer as received, with its headers.
    ///
    /// # Errors
    /// What the handler or the server answered.
    pub fn reply(self) -> Result<Reply, Error> {
        self.0.reply().wait()
    }

    /// Sends the call and waits for the answer's raw bytes.
    ///
    /// # Errors
    /// As [`Call::send`].
    pub fn bytes(self) -> Result<Bytes, Error> {
        self.send()
    }

    /// Opens a streamed answer. The call is sent when the first item is requested; its time covers
    /// the whole stream.
    pub fn stream<R: FromPayload>(self) -> Stream<R> {
        Stream(self.0.stream())
    }
}

/// A call that the server stores until it is answered, or that is already answered. The call
/// continues if this is dropped: its answer then goes to [`App::answers`].
#[derive(Debug)]
pub struct Parked(crate::Parked);

impl Parked {
    /// The call's id, by which [`App::answers`] names it, in later processes of the app too.
    #[must_use]
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// Waits for the answer. A lost connection does not end the wait; closing the app does.
    ///
    /// # Errors
    /// The error of the handler or the server; `timeout` if the call's time has ended;
    /// `bad_message` if the answer is not an `R`.
    pub fn answer<R: FromPayload>(self) -> Result<R, Error> {
        self.0.answer().wait()
    }

    /// Like [`Parked::answer`], but returns the answer as received, with its headers.
    ///
    /// # Errors
    /// What the handler or the server answered.
    pub fn reply(self) -> Result<Reply, Error> {
        self.0.reply().wait()
    }

    /// Cancels the call; see [`crate::Parked::cancel`].
    pub fn cancel(self) {
        self.0.cancel();
    }
}

/// An iterator over the answers to calls that nobody here waits for, until the app is closed;
/// returned by [`App::answers`].
#[derive(Debug)]
pub struct Answers(crate::Answers);

impl Answers {
    /// The next answer; `None` after the app was closed, or [`App::answers`] was called again.
    pub fn recv(&mut self) -> Option<Answer> {
        let core = self.0.app.core().clone();
        core.block_on(None, |cx| self.0.poll_next_answer(cx))
            .flatten()
    }

    /// Waits for the next answer, at most `timeout`.
    ///
    /// # Errors
    /// `timeout` if none arrived; `disconnected` after the app was closed, or [`App::answers`] was
    /// called again.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Answer, Error> {
        let core = self.0.app.core().clone();
        let deadline = Some(Instant::now() + timeout);
        match core.block_on(deadline, |cx| self.0.poll_next_answer(cx)) {
            Some(Some(answer)) => Ok(answer),
            Some(None) => Err(crate::drive::core::Core::closed_error()),
            None => Err(Error::new(Code::Timeout, "no answer arrived in time")),
        }
    }
}

impl Iterator for Answers {
    type Item = Answer;

    fn next(&mut self) -> Option<Answer> {
        self.recv()
    }
}

/// An iterator over the changes of an app's connection; returned by [`App::states`].
#[derive(Debug)]
pub struct States(crate::States);

impl Iterator for States {
    type Item = State;

    fn next(&mut self) -> Option<State> {
        let core = self.0.core.clone();
        core.block_on(None, |cx| self.0.poll_next_state(cx))
            .flatten()
    }
}

/// An emit that is not sent yet.
#[derive(Debug)]
#[must_use = "an emit is sent by `send`"]
pub struct Emit(crate::Emit);

impl From<crate::Emit> for Emit {
    /// The same emit, sent from the calling thread.
    fn from(emit: crate::Emit) -> Self {
        Emit(emit)
    }
}

impl Emit {
    builder_methods! {
        /// Only to this app.
        to(app_id: &str);
        /// Only to this instance of an app.
        to_instance(app_id: &str, instance: InstanceId);
        /// To one handler rather than to all.
        one();
        /// In this pool. Needed where the app is in several.
        pool(pool: &str);
        /// The key by which a sticky trigger chooses a handler.
        key(key: &str);
        /// Adds a header, which the handlers receive unchanged.
        header(name: &str, value: &str);
        /// Signs it, for privileged handlers; see [`crate::Call::privileged`].
        privileged();
        /// Sends these bytes unchanged instead of the data, next to the JSON.
        raw_bytes(bytes: Vec<u8>);
    }

    /// Sends it; returns when it is passed to the connection.
    ///
    /// # Errors
    /// If there is no connection, or the data cannot be encoded.
    pub fn send(self) -> Result<(), Error> {
        std::future::IntoFuture::into_future(self.0).wait()
    }

    /// Sends it; returns the number of handlers that it was sent to.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn counted(self) -> Result<u64, Error> {
        self.0.counted().wait()
    }
}

/// A streamed answer, as an iterator over its items. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "a stream's call is sent when its first item is asked for"]
pub struct Stream<R>(crate::Stream<R>);

impl<R: FromPayload> Stream<R> {
    /// The next item or report, whichever comes first; `None` after the last one.
    pub fn next_or_progress(&mut self) -> Option<Result<ItemOrProgress<R>, Error>> {
        self.0.wait_either()
    }

    /// The newest progress report of the handler, once; older ones are not kept.
    pub fn progress<T: FromPayload>(&mut self) -> Option<Result<T, Error>> {
        self.0.progress()
    }

    /// The handler's final answer, after the last item.
    #[must_use]
    pub fn end(&self) -> Option<&Reply> {
        self.0.end()
    }
}

impl<R: FromPayload> Iterator for Stream<R> {
    type Item = Result<R, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.wait_next()
    }
}

/// An iterator over events as they arrive, until the app is closed. Dropping it stops listening.
#[derive(Debug)]
#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
pub struct Events<T: Event>(crate::Events<T>);

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Event> Events<T> {
    /// The next event; `None` after the app was closed.
    pub fn recv(&mut self) -> Option<T> {
        let core = self.0.app.core();
        core.block_on(None, |cx| self.0.queue.poll_next(cx))
            .flatten()
    }

    /// How many events were dropped that no later event reports; see [`crate::Events::take_lost`].
    pub fn take_lost(&mut self) -> u64 {
        self.0.take_lost()
    }

    /// Waits for the next event, at most `timeout`.
    ///
    /// # Errors
    /// `timeout` if none arrived; `disconnected` after the app was closed.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<T, Error> {
        let core = self.0.app.core();
        let deadline = Some(Instant::now() + timeout);
        match core.block_on(deadline, |cx| self.0.queue.poll_next(cx)) {
            Some(Some(event)) => Ok(event),
            Some(None) => Err(crate::drive::core::Core::closed_error()),
            None => Err(Error::new(Code::Timeout, "no event arrived in time")),
        }
    }
}

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Event> Iterator for Events<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.recv()
    }
}

/// A trigger that is about to be served.
#[derive(Debug)]
#[must_use = "nothing is served before `serve`"]
pub struct Handler(crate::Handler);

impl Handler {
    builder_methods! {
        /// How calls are spread over the handlers of this trigger (default: each in turn).
        strategy(strategy: Strategy);
        /// How many calls this instance handles at a time at most.
        concurrency(calls: u32);
        /// A description of the trigger for people.
        doc(doc: &str);
        /// Takes only what a writer of an encrypted pool signed; see
        /// [`crate::Handler::privileged`].
        privileged();
        /// Describes what the trigger takes; see [`crate::Handler::schema`].
        schema(schema: Value);
    }

    /// Serves only in these pools, rather than in every pool that the app is in.
    pub fn pools<P: Into<String>>(self, pools: impl IntoIterator<Item = P>) -> Self {
        Self(self.0.pools(pools))
    }

    /// Serves the trigger; see [`App::serve`].
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub fn serve<T: IntoPayload>(
        self,
        handler: impl Fn(Request) -> Result<T, HandlerError> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let app = self.0.app.clone();
        block::run(&app, self.0.serve_blocking(handler))
    }
}

/// A call, or an emit, as its handler sees it.
#[derive(Debug)]
pub struct Request(pub(crate) crate::Request);

impl Deref for Request {
    type Target = crate::Request;

    fn deref(&self) -> &crate::Request {
        &self.0
    }
}

impl Request {
    /// The app that handles this, for further calls; see [`crate::Request::app`].
    #[must_use]
    pub fn app(&self) -> App {
        App(self.0.app())
    }

    /// The same request with its async API.
    #[must_use]
    pub fn into_async(self) -> crate::Request {
        self.0
    }

    /// A memory block that the caller passed, for use during the call.
    ///
    /// # Errors
    /// `no_block` if the caller passed no such block.
    pub fn block(&self, id: &str) -> Result<Block, Error> {
        self.0.block(id).map(Block)
    }

    /// Sends one item of a streamed answer, once the caller has room for it.
    ///
    /// # Errors
    /// `cancelled` if the caller has gone, `bad_message` if the item cannot be encoded.
    pub fn partial<T: IntoPayload + ?Sized>(&self, item: &T) -> Result<(), Error> {
        self.send(Interim::Item, item)
    }

    /// Reports the progress of the work. Reports are not items: the caller may see only the newest,
    /// and none in an encrypted pool.
    ///
    /// # Errors
    /// `cancelled` if the caller has gone, `bad_message` if the report cannot be encoded.
    pub fn progress<T: IntoPayload + ?Sized>(&self, report: &T) -> Result<(), Error> {
        self.send(Interim::Progress, report)
    }

    fn send<T: IntoPayload + ?Sized>(&self, what: Interim, value: &T) -> Result<(), Error> {
        let Some(mut sending) = self.0.sending(what, payload::write(value)?)? else {
            return Ok(());
        };
        self.0
            .core
            .block_on(None, |cx| sending.poll(&self.0, cx))
            .unwrap_or_else(|| Err(interrupted()))
    }
}

/// The error of a wait without a deadline that was interrupted.
fn interrupted() -> Error {
    Error::new(Code::Cancelled, "the wait was interrupted")
}
