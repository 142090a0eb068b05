//! The async API: an app, its handlers and its events.

use std::future::Future;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use latzero_crypto::proof::{self, Side};
use latzero_crypto::text;
use latzero_protocol::message::Strategy;
use latzero_protocol::{Code, InstanceId, Ran, TriggerName};
use serde_json::{Value, json};

use crate::drive::core::{Core, Owner};
use crate::drive::events::{Emission, Presence, Queue};
use crate::drive::handlers::{Entry, Kind, Registered, Spec, listener};
use crate::drive::request::{Request, Unanswered, write_answer};
use crate::error::{Error, HandlerError};
use crate::face::answers::Answers;
use crate::face::block::BlockName;
use crate::face::blocking;
use crate::face::builder::{Builder, on_thread};
use crate::face::call::{Call, Emit};
use crate::face::events::Events;
use crate::face::outgoing::Calling;
use crate::face::states::States;
use crate::face::stream::Stream;
use crate::keys::Keys;
use crate::payload::{FromPayload, IntoPayload, Reply};
use crate::sync::lock;
use crate::wire::message::Message;
use crate::wire::outbox::Phase;
use crate::wire::prove::{binary, check_bound, exchange};

/// How long a clean close waits for running handlers, and for the server to take their answers.
pub(crate) const CLOSE_TIME: Duration = Duration::from_secs(5);

/// One app's connection: calls triggers, serves triggers, sends and receives events. Cheap to
/// clone; when the last clone is dropped, the connection closes.
#[derive(Debug, Clone)]
pub struct App {
    owner: Arc<Owner>,
}

impl App {
    /// Connects to `latzero://APP_ID[@HOST[:PORT]][?socket=PATH][&pool=NAME…]`.
    ///
    /// Without host and socket it connects to the server of this machine: the Unix socket in
    /// `LATZERO_DATA_DIR` or `~/.latzero`, else 127.0.0.1:45227. On a tokio runtime (with
    /// `enable_all`) a task there drives the app, elsewhere a background thread.
    ///
    /// # Errors
    /// If the address is wrong, no server answers, or it refuses the handshake.
    pub async fn connect(url: &str) -> Result<App, Error> {
        App::builder(url).connect().await
    }

    /// Connects with more options than an address has.
    #[must_use]
    pub fn builder(url: &str) -> Builder {
        Builder::new(url)
    }

    pub(crate) fn owning(core: Arc<Core>) -> App {
        let owner = Arc::new(Owner { core });
        *lock(&owner.core.owner) = Arc::downgrade(&owner);
        App { owner }
    }

    /// A handle to use while a handler runs.
    pub(crate) fn lent(core: &Arc<Core>) -> App {
        let owner = lock(&core.owner).upgrade();
        match owner {
            Some(owner) => App { owner },
            // The last handle was dropped, which ended the app: this handle only returns errors.
            None => App {
                owner: Arc::new(Owner { core: core.clone() }),
            },
        }
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.owner.core
    }

    /// The AppID.
    #[must_use]
    pub fn app_id(&self) -> &str {
        self.core().config.url.app_id.as_str()
    }

    /// Gives this connection administrator rights: proves that the app has the token of the
    /// server's data directory, and that the server has it too. The token itself is not sent.
    ///
    /// # Errors
    /// `unauthenticated` if either side has another token, `downgrade` if the proof cannot be bound
    /// to the connection.
    pub fn prove_admin(&self, token: &str, may_be_unbound: bool) -> Result<(), Error> {
        let core = self.core();
        let link = core.outbox.link().ok_or_else(Core::closed_error)?;
        let binding = check_bound(link.binding, may_be_unbound)?;
        let digits = token.trim();
        let digit = |at: usize| {
            digits
                .get(at..at + 1)
                .and_then(|d| u8::from_str_radix(d, 16).ok())
        };
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let pair = digit(2 * at)
                .zip(digit(2 * at + 1))
                .filter(|_| digits.len() == 64);
            let (high, low) = pair.ok_or_else(|| {
                Error::new(Code::KeyFormat, "an admin token has 64 hexadecimal digits")
            })?;
            *byte = high << 4 | low;
        }
        let challenge: Value = self.requesting(&json!({"action": "challenge"}))?.wait()?;
        let exchange = exchange(&challenge, binding)?;
        let mac = proof::admin_mac(&bytes, Side::Client, &exchange);
        let said = self.requesting::<Value>(&json!({
            "action": "admin_proof", "client_nonce": text::encode(&exchange.client_nonce),
            "mac": text::encode(&mac), "cb_type": binding.name(),
        }))?;
        let said = said.wait()?;
        let theirs = binary(&said, "mac")?;
        if proof::verify_admin(&bytes, Side::Server, &exchange, &theirs) {
            return Ok(());
        }
        let text =
            "the server at this address does not have the admin token: it is not the expected one";
        Err(Error::new(Code::Unauthenticated, text))
    }

    /// Moves an encrypted pool of this app to its next epoch, with these keys. Members whose keys
    /// changed must prove the pool again. If the writers' key changed, content of earlier epochs is
    /// no longer accepted. With `is_history_cut`, holders of only the new keys cannot read content
    /// from before. The reply says what ended.
    ///
    /// # Errors
    /// `not_member` if the app has no keys of the pool, and if the server refuses.
    pub fn rotate_pool(
        &self,
        pool: &str,
        new: &Keys,
        is_history_cut: bool,
    ) -> Result<Value, Error> {
        let Some(sealed) = self.core().sealed_pool(pool) else {
            let text = format!("this app has no keys for pool '{pool}'");
            return Err(Error::new(Code::NotMember, text));
        };
        let descriptor = sealed.next_descriptor(new, is_history_cut)?;
        let request = json!({"action": "pool_rotate", "pool": pool, "descriptor": descriptor});
        self.requesting(&request)?.wait()
    }

    /// The id of the current connection; it changes with each reconnect.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceId> {
        InstanceId::parse(&lock(&self.core().ack).instance)
    }

    /// Whether the server restored the pools and triggers that it remembered for this AppID.
    #[must_use]
    pub fn is_rehydrated(&self) -> bool {
        lock(&self.core().ack).rehydrated
    }

    /// Whether the app's registration is on the server's disk. False if the server's last
    /// acknowledgement said that the disk cannot be written: pools and triggers are active, but are
    /// lost if the server stops before it can write them.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        lock(&self.core().ack).stored != Some(false)
    }

    /// The triggers that the server listed in its last acknowledgement.
    #[must_use]
    pub fn acknowledged_triggers(&self) -> Vec<Value> {
        lock(&self.core().ack).triggers.clone()
    }

    /// The pools that the app is in.
    #[must_use]
    pub fn joined(&self) -> Vec<String> {
        lock(&self.core().pools).clone()
    }

    /// Whether the app is connected now. Calls made while it is not wait for the connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.core().is_connected()
    }

    /// How many messages of encrypted pools were dropped since the app connected first, because
    /// they did not verify: no member sent them like that. They are a sign of a hostile server.
    #[must_use]
    pub fn unverified(&self) -> u64 {
        self.core().unverified()
    }

    /// How many emits, events of pools and answers to parked calls were dropped so far, because
    /// they were not read in time: by the server, or here. [`Emission::lost`] and its like say how
    /// many were lost just before one of them.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.core().lost_ever.load(Ordering::Relaxed) + self.core().answers.lost_ever()
    }

    /// The changes of the connection from now on: each loss, each reconnect, and the end.
    #[must_use]
    pub fn states(&self) -> States {
        States::new(self.core())
    }

    /// Why the app has ended for good; `None` while it has not.
    #[must_use]
    pub fn end_reason(&self) -> Option<Error> {
        match self.core().outbox.phase() {
            Phase::Ended(error) => Some(error),
            Phase::Up(_) | Phase::Down => None,
        }
    }

    /// The id of the process that connected. A child that was forked since cannot use the app,
    /// because it does not have its threads.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.core().process
    }

    /// The descriptor of the current connection, for a process that forks: if a child shut down the
    /// socket, that would end its parent's connection, so the child replaces the descriptor.
    #[must_use]
    pub fn descriptor(&self) -> Option<RawFd> {
        self.core().outbox.link().map(|link| link.as_raw_fd())
    }

    /// Calls the trigger `name`.
    pub fn call<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Call {
        Call::new(self, name, data)
    }

    /// Calls the trigger `name` for a streamed answer; [`Call::stream`] has more options.
    pub fn stream<R: FromPayload>(
        &self,
        name: &str,
        data: &(impl IntoPayload + ?Sized),
    ) -> Stream<R> {
        self.call(name, data).stream()
    }

    /// Sends an event to every handler of the trigger `name`, without an answer.
    pub fn emit<T: IntoPayload + ?Sized>(&self, name: &str, data: &T) -> Emit {
        Emit::new(self, name, data)
    }

    /// Serves the trigger `name`. The handler's future runs on the task that reads the connection,
    /// so long work without an await belongs on a separate thread. The future is dropped if the
    /// caller no longer wants the answer.
    ///
    /// A handler that calls others uses [`Request::app`]: a captured handle of its own app would
    /// keep it alive.
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub async fn serve<F, T>(
        &self,
        name: &str,
        handler: impl Fn(Request) -> F + Send + Sync + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<T, HandlerError>> + Send + 'static,
        T: IntoPayload + 'static,
    {
        self.handler(name).serve(handler).await
    }

    /// Serves a trigger with more options than its name.
    pub fn handler(&self, name: &str) -> Handler {
        Handler {
            app: self.clone(),
            name: name.to_owned(),
            spec: Spec::default(),
        }
    }

    /// Stops serving the trigger `name`. Running calls are finished.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn unserve(&self, name: &str) -> Result<(), Error> {
        let Some(calling) = self.unserving(name) else {
            return Ok(());
        };
        let ended = calling.await;
        self.renew(name);
        ended
    }

    /// Registers a name again that another thread began to serve or to listen to while it was being
    /// unregistered: its message may have been the earlier one.
    pub(super) fn renew(&self, name: &str) {
        if let Some(spec) = self.core().handlers.spec(name) {
            let mut message = Message::new("trigger_register");
            message.json("triggers", json!([spec]).to_string().as_bytes());
            self.core().send_oneway(message);
        }
    }

    pub(crate) fn unserving(&self, name: &str) -> Option<Calling<()>> {
        let handlers = &self.core().handlers;
        handlers
            .remove(name)
            .then(|| match handlers.is_listened(name) {
                true => self.triggers("trigger_register", &json!([listener(name)])),
                false => self.triggers("trigger_unregister", &json!([name])),
            })
    }

    /// Receives emits of the trigger `name`.
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub async fn on(&self, name: &str) -> Result<Events<Emission>, Error> {
        check_name(name)?;
        let queue = Arc::new(Queue::new());
        let events = Events {
            queue: queue.clone(),
            app: self.clone(),
        };
        if self.core().handlers.listen(name, &queue) == Registered::New {
            let triggers = json!([listener(name)]);
            self.ask_until_answered(|| self.triggers("trigger_register", &triggers))
                .await?;
        }
        Ok(events)
    }

    /// Asks again if the connection was lost before the answer, within the time of a call. What is
    /// asked for may be there twice.
    async fn ask_until_answered(&self, ask: impl Fn() -> Calling<()>) -> Result<(), Error> {
        let deadline = Instant::now() + self.core().config.call_timeout;
        loop {
            match ask().await {
                Err(e)
                    if e.kind() == Code::Disconnected
                        && Instant::now() < deadline
                        && !self.core().is_ended() => {}
                answered => return answered,
            }
        }
    }

    pub(crate) fn triggers(&self, action: &str, triggers: &Value) -> Calling<()> {
        let mut message = Message::new(action);
        message.json("triggers", triggers.to_string().as_bytes());
        self.asking(message)
    }

    /// A request whose reply only says that it succeeded.
    pub(crate) fn asking(&self, message: Message) -> Calling<()> {
        Calling::of_message(self, message, |_| Ok(()))
    }

    /// Receives the events of a pool: apps and triggers that appear and disappear.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn watch(&self, pool: &str) -> Result<Events<Presence>, Error> {
        let queue = Arc::new(Queue::new());
        let events = Events {
            queue: queue.clone(),
            app: self.clone(),
        };
        lock(&self.core().watchers)
            .entry(pool.into())
            .or_default()
            .push(Arc::downgrade(&queue));
        self.ask_until_answered(|| {
            let mut message = Message::new("watch");
            message.string("pool", pool);
            self.asking(message)
        })
        .await?;
        Ok(events)
    }

    /// The pools that the app is removed from, from now on: because they were removed
    /// (`pool_removed`), or because the app would have to prove them with other keys
    /// (`pool_rotated`). It serves nothing and hears nothing there any more.
    #[must_use]
    pub fn departures(&self) -> Events<Presence> {
        let queue = Arc::new(Queue::new());
        lock(&self.core().departures).push(Arc::downgrade(&queue));
        if self.core().is_ended() {
            queue.close();
        }
        Events {
            queue,
            app: self.clone(),
        }
    }

    /// The answers to parked calls that nobody in this process waits for: those of earlier
    /// processes of the app, which the server sends as soon as the app has reconnected, and those
    /// whose [`Parked`](crate::Parked) was dropped. [`Call::id`] gives a call an id by which its
    /// answer can be recognised.
    ///
    /// They are kept from the moment of connecting, so none is missed before this is called: the
    /// newest [`ANSWERS_MAX`](crate::ANSWERS_MAX) of them, of
    /// [`ANSWERS_BYTES_MAX`](crate::ANSWERS_BYTES_MAX) bytes at most. Beyond that the oldest are
    /// dropped, and [`Answer::lost`](crate::Answer::lost) of the next one says how many. There is
    /// one reader: calling this again ends the previous one.
    ///
    /// If several instances of the app are connected, the server sends an answer to one of them,
    /// usually the newest.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), latzero::Error> {
    /// let app = latzero::App::connect("latzero://shop?pool=alpha").await?;
    /// let mut answers = app.answers();
    /// while let Some(answer) = answers.next().await {
    ///     let id = answer.id().to_owned();
    ///     match answer.into::<serde_json::Value>() {
    ///         Ok(receipt) => println!("{id}: {receipt}"),
    ///         Err(error) => println!("{id} failed: {error}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn answers(&self) -> Answers {
        Answers::new(self)
    }

    /// Joins a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn join(&self, pool: &str) -> Result<(), Error> {
        self.core().note_named(pool);
        let joined = self.joining("pool_join", pool).await;
        self.core().note_joining(pool, joined)
    }

    /// Leaves a pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn leave(&self, pool: &str) -> Result<(), Error> {
        self.joining("pool_leave", pool).await?;
        self.core().note_left(pool);
        Ok(())
    }

    pub(crate) fn joining(&self, action: &str, pool: &str) -> Calling<()> {
        let mut message = Message::new(action);
        message.string("pool", pool);
        self.asking(message)
    }

    /// The memory block `id`, to create it or attach to it.
    pub fn block(&self, id: &str) -> BlockName {
        BlockName::new(self, id)
    }

    /// The memory blocks of a pool, as the server describes them. Without a name it is the app's
    /// only pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn blocks(&self, pool: Option<&str>) -> Result<Vec<Value>, Error> {
        let mut blocks: Vec<Value> = Vec::new();
        loop {
            let mut request = json!({"action": "memory_list"});
            if let Some(pool) = pool {
                request["pool"] = pool.into();
            }
            if let Some(last) = blocks.last() {
                request["after"] = last["block_id"].clone();
            }
            let mut page = self.request(&request).await?;
            let more = page["more"] == true;
            match page["blocks"].take() {
                Value::Array(page) if !page.is_empty() => blocks.extend(page),
                _ => return Ok(blocks),
            }
            if !more {
                return Ok(blocks);
            }
        }
    }

    /// The apps that the server knows, as it describes them.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn apps(&self) -> Result<Value, Error> {
        self.requesting(&json!({"action": "app_list"}))?.await
    }

    /// The pools that the server knows, as it describes them.
    ///
    /// # Errors
    /// If the server refuses.
    pub async fn pools(&self) -> Result<Value, Error> {
        self.requesting(&json!({"action": "pool_list"}))?.await
    }

    /// A trigger of a pool, as the server describes it: its `doc`, its `schema`, its handlers and
    /// more. `None` if nobody serves it.
    ///
    /// # Errors
    /// `no_pool` if the app can't see the pool.
    pub async fn trigger(&self, pool: &str, name: &str) -> Result<Option<Value>, Error> {
        let info: Value = self.requesting(&describing(pool, name))?.await?;
        Ok(described(info))
    }

    /// Sends any request to the server: `request` is a message of the protocol, with its `action`
    /// and without an `id`.
    ///
    /// # Errors
    /// If the server refuses, and `bad_message` if `request` is not such a message.
    pub async fn request(&self, request: &Value) -> Result<Value, Error> {
        self.requesting(request)?.await
    }

    pub(crate) fn requesting<R: FromPayload>(&self, request: &Value) -> Result<Calling<R>, Error> {
        let is_request =
            request.get("action").is_some_and(Value::is_string) && request.get("id").is_none();
        if !is_request {
            let text = "a request is a JSON object with an 'action' and without an 'id'";
            return Err(Error::new(Code::BadMessage, text));
        }
        let message = Message::from_object(&request.to_string());
        Ok(Calling::of_message(self, message, Reply::into))
    }

    /// Checks that the server responds; returns how long the answer took.
    ///
    /// # Errors
    /// If no answer arrives.
    pub async fn ping(&self) -> Result<Duration, Error> {
        let started = Instant::now();
        self.asking(Message::new("ping")).await?;
        Ok(started.elapsed())
    }

    /// Closes cleanly: waits up to five seconds for running handlers and sends their answers; then
    /// the connection ends, for every clone of this handle.
    ///
    /// # Errors
    /// `timeout` if handlers or the server took longer; the connection is closed anyway.
    pub async fn close(&self) -> Result<(), Error> {
        let core = self.core().clone();
        on_thread(move || close(&core, CLOSE_TIME)).await
    }

    /// Waits until the app has ended: it was closed, or lost its connection for good. It does not
    /// keep the app open.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + use<> {
        let core = self.core().clone();
        std::future::poll_fn(move |cx| core.poll_ended(cx))
    }

    pub(crate) fn close_within(&self, time: Duration) -> Result<(), Error> {
        close(self.core(), time)
    }
}

fn close(core: &Arc<Core>, time: Duration) -> Result<(), Error> {
    let deadline = Some(Instant::now() + time);
    let is_idle = core
        .block_on(deadline, |cx| core.handlers.poll_idle(cx))
        .is_some();
    core.flush();
    let is_sent = core
        .block_on(deadline, |cx| core.outbox.poll_empty(cx))
        .is_some();
    if let Some(link) = core.outbox.link()
        && is_sent
    {
        // The server closes when it has received everything. Closing first could lose data that is
        // still being sent.
        core.begin_close();
        link.finish_sending();
        core.block_on(deadline, |cx| core.poll_ended(cx));
    }
    core.end(&Core::closed_error());
    match is_idle && is_sent {
        true => Ok(()),
        false => Err(Error::new(
            Code::Timeout,
            "handlers were still running, or the server did not receive their answers; the app was \
            closed anyway",
        )),
    }
}

/// The request for the description of one trigger.
pub(crate) fn describing(pool: &str, name: &str) -> Value {
    json!({"action": "pool_info", "pool": pool, "trigger": name})
}

/// The trigger that a description of its pool shows.
pub(crate) fn described(mut info: Value) -> Option<Value> {
    info["triggers"].get_mut(0).map(Value::take)
}

pub(super) fn check_name(name: &str) -> Result<(), Error> {
    TriggerName::check(name)
        .map_err(|e| Error::new(Code::InvalidName, e.to_string()).with_ran(Ran::No))
}

/// A trigger that is about to be served.
///
/// Unless its handler blocks, at most 1024 of its emits wait or are worked on. Beyond them the
/// newest are dropped, and [`Request::lost`](crate::Request::lost) of the next one says how many.
#[derive(Debug)]
#[must_use = "nothing is served before `serve`"]
pub struct Handler {
    pub(super) app: App,
    name: String,
    spec: Spec,
}

fn blocking_kind<T: IntoPayload>(
    handler: impl Fn(blocking::Request) -> Result<T, HandlerError> + Send + Sync + 'static,
) -> Kind {
    Kind::Blocking(Box::new(move |request| {
        write_answer(&handler(blocking::Request(request))?)
    }))
}

impl Handler {
    /// How calls are spread over the handlers of this trigger (default: each in turn).
    pub fn strategy(mut self, strategy: Strategy) -> Self {
        self.spec.strategy = strategy;
        self
    }

    /// How many calls this instance handles at a time at most.
    pub fn concurrency(mut self, calls: u32) -> Self {
        self.spec.concurrency = Some(calls);
        self
    }

    /// A description of the trigger for people.
    pub fn doc(mut self, doc: &str) -> Self {
        self.spec.doc = Some(doc.to_owned());
        self
    }

    /// Describes what the trigger takes, by convention in JSON Schema 2020-12: an object of at most
    /// 4 KiB as JSON, which the server shows ([`App::trigger`]) but does not enforce.
    pub fn schema(mut self, schema: Value) -> Self {
        self.spec.schema = Some(schema);
        self
    }

    /// Serves only in these pools, rather than in every pool that the app is in.
    pub fn pools<P: Into<String>>(mut self, pools: impl IntoIterator<Item = P>) -> Self {
        self.spec.pools = pools.into_iter().map(Into::into).collect();
        self
    }

    /// Takes only calls and emits that a writer of an encrypted pool signed
    /// ([`Call::privileged`](crate::Call::privileged)). The trigger is served only in encrypted
    /// pools. Readers of the pool can neither call it nor forge a call, even together with the
    /// server; a call that is not signed is answered with `forbidden`, such an emit is dropped.
    pub fn privileged(mut self) -> Self {
        self.spec.is_privileged = true;
        self
    }

    /// Serves the trigger; see [`App::serve`].
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub async fn serve<F, T>(
        self,
        handler: impl Fn(Request) -> F + Send + Sync + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<T, HandlerError>> + Send + 'static,
        T: IntoPayload + 'static,
    {
        let kind = Kind::Async(Box::new(move |request| {
            let running = handler(request);
            Box::pin(async move { write_answer(&running.await?) })
        }));
        self.register(kind).await
    }

    /// Serves the trigger with a handler that blocks; see [`crate::blocking::App::serve`].
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub async fn serve_blocking<T: IntoPayload>(
        self,
        handler: impl Fn(blocking::Request) -> Result<T, HandlerError> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.register(blocking_kind(handler)).await
    }

    /// Serves the trigger with a function that takes each call and returns at once, for programs
    /// with their own event loop: [`Unanswered::answer`] answers later, from any thread. Calls are
    /// taken in the order in which they arrived. `take` runs between two reads of the connection,
    /// so it must not block.
    ///
    /// # Errors
    /// If the name is not valid or the server refuses.
    pub async fn serve_detached(
        self,
        take: impl Fn(Unanswered) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        self.register(Kind::Detached(Box::new(take))).await
    }

    async fn register(self, kind: Kind) -> Result<(), Error> {
        let Handler { app, name, spec } = self;
        check_name(&name)?;
        let triggers = json!([spec.to_json(&name)]);
        // Registered before the request is sent: the first call may follow right after its reply.
        let entry = Arc::new(Entry {
            name: name.as_str().into(),
            spec,
            kind,
            emits: Arc::default(),
            is_slow: AtomicBool::new(true),
        });
        let earlier = app.core().handlers.add(&entry);
        let registered = app
            .ask_until_answered(|| app.triggers("trigger_register", &triggers))
            .await;
        if registered.is_err() {
            app.core().handlers.take_back(&entry, earlier);
        }
        registered
    }
}
