//! The face for people without async: the same app, with calls that wait.
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

use crate::answers::Answer;
use crate::app::CLOSE_TIME;
use crate::builder;
use crate::error::{Error, HandlerError};
use crate::events::{Emission, Lossy, Presence};
use crate::message::Message;
use crate::payload::{self, Bytes, FromPayload, IntoPayload, Reply};
use crate::stream::ItemOrProgress;

pub use block::{
    Block, BlockLock, BlockName, BlockWriter, Changes, CreateBlock, Draft, TypedBlock,
};

/// One app's connection: calls triggers, serves triggers, sends and receives events. Cheap to
/// clone; when the last clone goes, the connection closes and its threads end.
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

    /// Connects with more to say than an address.
    ///
    /// # Errors
    /// As [`App::connect`].
    pub fn connect_with(builder: builder::Builder) -> Result<App, Error> {
        builder.connect_blocking().map(App)
    }

    /// The same app with its async face.
    #[must_use]
    pub fn as_async(&self) -> &crate::App {
        &self.0
    }

    /// Runs a future of the async face on this thread, which reads the connection meanwhile if
    /// nobody else does. `None` if it is not done at `deadline`, or [`interruptible`] ended the
    /// wait; it may be run on then.
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

    /// The id of the live connection; another one after a reconnect.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceId> {
        self.0.instance()
    }

    /// The pools that the app is in.
    #[must_use]
    pub fn joined(&self) -> Vec<String> {
        self.0.joined()
    }

    /// Whether there is a connection just now. Calls made while there is none wait for it.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    /// Calls the trigger `name`.
    pub fn call<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Call {
        Call(self.0.call(name, data))
    }

    /// Calls the trigger `name` for a streamed answer; [`Call::stream`] has more to say.
    pub fn stream<R: FromPayload>(
        &self,
        name: &str,
        data: &(impl IntoPayload + ?Sized),
    ) -> Stream<R> {
        Stream(self.0.stream(name, data))
    }

    /// Tells every handler of the trigger `name`, without an answer.
    pub fn emit<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Emit {
        Emit(self.0.emit(name, data))
    }

    /// Serves the trigger `name`. The handler runs on the thread that read the call; where it takes
    /// long, another thread reads on, up to as many as [`crate::Builder::handler_threads`] says.
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

    /// Serves a trigger with more to say than its name.
    pub fn handler(&self, name: &str) -> Handler {
        Handler(self.0.handler(name))
    }

    /// Serves the trigger `name` no longer. Calls that run are finished.
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
        let (events, calling) = self.0.listening(name)?;
        calling.map_or(Ok(()), crate::Calling::wait)?;
        Ok(Events(events))
    }

    /// Receives the events of a pool: apps and triggers that come and go.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn watch(&self, pool: &str) -> Result<Events<Presence>, Error> {
        let (events, calling) = self.0.watching(pool);
        calling.wait()?;
        Ok(Events(events))
    }

    /// The answers to parked calls that nobody in this process waits for, those of an earlier life
    /// of it among them; see [`crate::App::answers`].
    #[must_use]
    pub fn answers(&self) -> Answers {
        Answers(self.0.answers())
    }

    /// Whether the server has on disk what the app registered; see [`crate::App::is_stored`].
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.0.is_stored()
    }

    /// Joins a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn join(&self, pool: &str) -> Result<(), Error> {
        self.0.joining("pool_join", pool).wait()?;
        self.0.note_joined(pool);
        Ok(())
    }

    /// Leaves a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn leave(&self, pool: &str) -> Result<(), Error> {
        self.0.joining("pool_leave", pool).wait()?;
        self.0.note_left(pool);
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

    /// Asks the server for anything: `request` is a message of the protocol, with its `action` and
    /// without an `id`.
    ///
    /// # Errors
    /// If the server refuses, and `bad_message` if `request` is no such message.
    pub fn request(&self, request: &Value) -> Result<Value, Error> {
        self.0.requesting(request)?.wait()
    }

    /// As [`App::request`], for the answer as another type: `Box<RawValue>` is its text as it came.
    ///
    /// # Errors
    /// As there.
    pub fn request_as<R: FromPayload>(&self, request: &Value) -> Result<R, Error> {
        self.0.requesting(request)?.wait()
    }

    /// Makes this an administrator's connection; see [`crate::App::prove_admin`].
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

    /// Asks the server whether it lives; how long the answer took.
    ///
    /// # Errors
    /// If no answer comes.
    pub fn ping(&self) -> Result<Duration, Error> {
        let started = Instant::now();
        self.0.asking(Message::new("ping")).wait()?;
        Ok(started.elapsed())
    }

    /// Closes cleanly; see [`crate::App::close`].
    ///
    /// # Errors
    /// `timeout` if handlers or the server took longer; the connection is closed all the same.
    pub fn close(&self) -> Result<(), Error> {
        self.close_within(CLOSE_TIME)
    }

    /// As [`App::close`], waiting for `time` at most.
    ///
    /// # Errors
    /// As [`App::close`].
    pub fn close_within(&self, time: Duration) -> Result<(), Error> {
        self.0.close_within(time)
    }
}

impl From<crate::App> for App {
    /// The same app with its blocking face. Not to be used on a thread that drives the async one.
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
    /// The same call, to be waited for.
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
        /// Adds a header, passed to the handler untouched.
        header(name: &str, value: &str);
        /// If no handler can take the call now, the server keeps it on disk until one can; see
        /// [`crate::Call::park`].
        park();
        /// As [`Call::park`], but the call goes to the disk even if a handler can take it at once;
        /// see [`crate::Call::always_park`].
        always_park();
        /// Gives the call to another handler if its handler's connection ends before it answered;
        /// see [`crate::Call::redeliver`].
        redeliver();
        /// The most handlers that a parked or redelivered call is given to; see
        /// [`crate::Call::attempts`].
        attempts(attempts: u32);
        /// Makes the call safe to repeat; see [`crate::Call::idempotency_key`].
        idempotency_key(key: &str);
        /// Gives the call an id of the caller's own, 1 to 128 bytes; see [`crate::Call::id`].
        id(id: &str);
        /// Sends these bytes unchanged instead of the data, next to the JSON.
        raw_bytes(bytes: Vec<u8>);
        /// Items of a streamed answer that may be under way (default 64).
        window(window: u64);
    }

    /// Gives the handler a memory block of the call's pool to read, for the length of the call.
    pub fn block(self, block: &Block) -> Self {
        Call(self.0.block(&block.0))
    }

    /// As [`Call::block`], to write too.
    pub fn block_writable(self, block: &Block) -> Self {
        Call(self.0.block_writable(&block.0))
    }

    /// Sends the call and waits for the answer.
    ///
    /// # Errors
    /// What the handler or the server answered; `bad_message` if the answer is not an `R`.
    pub fn send<R: FromPayload>(self) -> Result<R, Error> {
        self.0.send().wait()
    }

    /// Sends the call to be kept by the server until it is answered, and waits until it is on disk,
    /// or answered where a handler is live; see [`crate::Call::send_parked`].
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
    /// `storage` if the disk takes nothing, `overloaded` if the server keeps too many already, else
    /// what the handler or the server answered.
    pub fn send_parked(self) -> Result<Parked, Error> {
        self.0.send_parked().wait().map(Parked)
    }

    /// Sends the call and waits for the answer as it comes, with its headers.
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

    /// Opens a streamed answer. The call is sent when the first item is asked for; its time covers
    /// the whole stream.
    pub fn stream<R: FromPayload>(self) -> Stream<R> {
        Stream(self.0.stream())
    }
}

/// A call that the server keeps until it is answered, or that is answered already. Dropping it lets
/// the call continue: its answer then goes to [`App::answers`].
#[derive(Debug)]
pub struct Parked(crate::Parked);

impl Parked {
    /// The call's id, by which [`App::answers`] knows it, in a later life of the process too.
    #[must_use]
    pub fn id(&self) -> &str {
        self.0.id()
    }

    /// Waits for the answer. A lost connection does not end the wait; that the app is closed does.
    ///
    /// # Errors
    /// What the handler or the server answered; `timeout` if the call's time ended before;
    /// `bad_message` if the answer is not an `R`.
    pub fn answer<R: FromPayload>(self) -> Result<R, Error> {
        self.0.answer().wait()
    }

    /// As [`Parked::answer`], the answer as it comes, with its headers.
    ///
    /// # Errors
    /// What the handler or the server answered.
    pub fn reply(self) -> Result<Reply, Error> {
        self.0.reply().wait()
    }

    /// Ends the call; see [`crate::Parked::cancel`].
    pub fn cancel(self) {
        self.0.cancel();
    }
}

/// Answers to calls that nobody here waits for, by iterating, until the app is closed;
/// [`App::answers`] gives it.
#[derive(Debug)]
pub struct Answers(crate::Answers);

impl Answers {
    /// The next answer; `None` after the app was closed, or [`App::answers`] was asked again.
    pub fn recv(&mut self) -> Option<Answer> {
        let core = self.0.app.core().clone();
        core.block_on(None, |cx| self.0.poll_next_answer(cx))
            .flatten()
    }

    /// The next answer, waited for `timeout` at most.
    ///
    /// # Errors
    /// `timeout` if none came; `disconnected` after the app was closed, or [`App::answers`] was
    /// asked again.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Answer, Error> {
        let core = self.0.app.core().clone();
        let deadline = Some(Instant::now() + timeout);
        match core.block_on(deadline, |cx| self.0.poll_next_answer(cx)) {
            Some(Some(answer)) => Ok(answer),
            Some(None) => Err(crate::core::Core::closed_error()),
            None => Err(Error::new(Code::Timeout, "no answer came in this time")),
        }
    }
}

impl Iterator for Answers {
    type Item = Answer;

    fn next(&mut self) -> Option<Answer> {
        self.recv()
    }
}

/// An emit that is not sent yet.
#[derive(Debug)]
#[must_use = "an emit is sent by `send`"]
pub struct Emit(crate::Emit);

impl From<crate::Emit> for Emit {
    /// The same emit, sent from the thread that waits.
    fn from(emit: crate::Emit) -> Self {
        Emit(emit)
    }
}

impl Emit {
    builder_methods! {
        /// To this app alone.
        to(app_id: &str);
        /// To this instance of an app alone.
        to_instance(app_id: &str, instance: InstanceId);
        /// To one handler rather than to all.
        one();
        /// In this pool. Needed where the app is in several.
        pool(pool: &str);
        /// What a sticky trigger goes by when one handler is picked.
        key(key: &str);
        /// Adds a header, passed to the handlers untouched.
        header(name: &str, value: &str);
        /// Sends these bytes unchanged instead of the data, next to the JSON.
        raw_bytes(bytes: Vec<u8>);
    }

    /// Sends it. It is done when it is handed to the connection.
    ///
    /// # Errors
    /// If there is no connection, or the data can't be written.
    pub fn send(self) -> Result<(), Error> {
        std::future::IntoFuture::into_future(self.0).wait()
    }

    /// Sends it, and gives the number of handlers that it went to.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn counted(self) -> Result<u64, Error> {
        self.0.counted().wait()
    }
}

/// A streamed answer; its items come by iterating. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "a stream's call is sent when its first item is asked for"]
pub struct Stream<R>(crate::Stream<R>);

impl<R: FromPayload> Stream<R> {
    /// The next item or report, whichever comes first; `None` after the last one.
    pub fn next_or_progress(&mut self) -> Option<Result<ItemOrProgress<R>, Error>> {
        self.0.wait_either()
    }

    /// The newest report of the handler on its progress, once; older ones are not kept.
    pub fn progress<T: FromPayload>(&mut self) -> Option<Result<T, Error>> {
        self.0.progress()
    }

    /// What the handler answered at the end, behind the last item.
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

/// Events as they arrive, by iterating, until the app is closed. Dropping it stops listening.
#[derive(Debug)]
#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
pub struct Events<T: Lossy>(crate::Events<T>);

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Lossy> Events<T> {
    /// The next event; `None` after the app was closed.
    pub fn recv(&mut self) -> Option<T> {
        let core = self.0.app.core();
        core.block_on(None, |cx| self.0.queue.poll_next(cx))
            .flatten()
    }

    /// How many events were dropped and no event tells of; see [`crate::Events::take_lost`].
    pub fn take_lost(&mut self) -> u64 {
        self.0.take_lost()
    }

    /// The next event, waited for `timeout` at most.
    ///
    /// # Errors
    /// `timeout` if none came; `disconnected` after the app was closed.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<T, Error> {
        let core = self.0.app.core();
        let deadline = Some(Instant::now() + timeout);
        match core.block_on(deadline, |cx| self.0.queue.poll_next(cx)) {
            Some(Some(event)) => Ok(event),
            Some(None) => Err(crate::core::Core::closed_error()),
            None => Err(Error::new(Code::Timeout, "no event came in this time")),
        }
    }
}

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Lossy> Iterator for Events<T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        self.recv()
    }
}

/// A trigger about to be served.
#[derive(Debug)]
#[must_use = "nothing is served before `serve`"]
pub struct Handler(crate::Handler);

impl Handler {
    builder_methods! {
        /// How calls are spread over the handlers of this trigger (default: each in turn).
        strategy(strategy: Strategy);
        /// Calls at a time that this instance takes at most.
        concurrency(calls: u32);
        /// What the trigger does, for people.
        doc(doc: &str);
    }

    /// Serves in these pools alone, rather than in every pool that the app is in.
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
        self.0.serve_from_here(handler)
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
    /// The app that handles this, for calls of its own; see [`crate::Request::app`].
    #[must_use]
    pub fn app(&self) -> App {
        App(self.0.app())
    }

    /// The same request with its async face.
    #[must_use]
    pub fn into_async(self) -> crate::Request {
        self.0
    }

    /// A memory block that the caller gave along, for as long as the call lasts.
    ///
    /// # Errors
    /// `no_block` if it gave no such block.
    pub fn block(&self, id: &str) -> Result<Block, Error> {
        self.0.block(id).map(Block)
    }

    /// Sends one item of a streamed answer, once the caller has room for it.
    ///
    /// # Errors
    /// `cancelled` if the caller is gone, `bad_message` if the item can't be written.
    pub fn partial<T: IntoPayload + ?Sized>(&self, item: &T) -> Result<(), Error> {
        self.send("partial", item)
    }

    /// Reports how far the work is. Reports are not items: the caller may see only the newest, and
    /// none in an encrypted pool.
    ///
    /// # Errors
    /// `cancelled` if the caller is gone, `bad_message` if the report can't be written.
    pub fn progress<T: IntoPayload + ?Sized>(&self, report: &T) -> Result<(), Error> {
        if self.0.ticket.sealed.get().is_some() {
            return Ok(());
        }
        self.send("progress", report)
    }

    fn send<T: IntoPayload + ?Sized>(&self, status: &'static str, value: &T) -> Result<(), Error> {
        let mut sending = self.0.sending(status, payload::write(value)?)?;
        sending.has_credit = status == "progress";
        self.0
            .core
            .block_on(None, |cx| sending.poll(&self.0, cx))
            .unwrap_or_else(|| Err(interrupted()))
    }
}

/// What a wait without a deadline ends with if it was interrupted.
fn interrupted() -> Error {
    Error::new(Code::Cancelled, "the wait was interrupted")
}
