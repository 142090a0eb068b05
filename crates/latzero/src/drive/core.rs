//! The state that all handles of one app share, and the steps that every driver takes with it.
//!
//! An app is driven by a caller that blocks, a background thread, a task on the caller's runtime,
//! or the program's own loop. They share one role, reading, which a [`Handover`] passes on.
//! Lock order: followers → outbox → pending → job queue → running calls; and listeners → handlers.
//! Except wakers, no user code runs under any of them.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use latzero_protocol::limits::DEFAULT_POOL;
use latzero_protocol::{Code, Ran};
use serde_json::{Value, json};

use crate::config::Config;
use crate::drive::answers::{Answer, Unclaimed};
use crate::drive::events::{Presence, Queue};
use crate::drive::handlers::{HandlerJob, Handlers};
use crate::drive::handover::Handover;
use crate::drive::signal::Signal;
use crate::drive::states::{Followers, State};
use crate::drive::threads::Workers;
use crate::error::Error;
use crate::payload::Reply;
use crate::sync::lock;
use crate::wire::connect;
use crate::wire::input::Input;
use crate::wire::link::{Ack, Link};
use crate::wire::message::Message;
use crate::wire::outbox::{By, Flushed, Outbox, Phase, Submitted};
use crate::wire::pending::{InFlight, Key, Next, Pending};
use crate::wire::sealed::{SealedCall, SealedPool, is_sealed};

/// How often deadlines are checked that the server itself does not enforce.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// Bytes of triggers in the handshake of a reconnect. With metadata and pools they are shorter than
/// what a server takes before a handshake.
const HANDSHAKE_TRIGGERS_BYTES: usize = 32 * 1024;

/// What reads when no caller does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DriverKind {
    /// Threads of this crate.
    Threads,
    /// A task on the caller's tokio runtime, or its own event loop: it is woken, and nothing
    /// else reads or runs handlers.
    Woken,
}

/// When a message is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leave {
    /// With the next flush of the driver, if that is soon; else at once.
    Soon,
    /// At once.
    Now,
}

/// The watchers of each pool's events.
type Watchers = HashMap<Box<str>, Vec<Weak<Queue<Presence>>>>;

/// What the API has at the server in addition to the registration. The server drops it with a
/// connection, so it has to be renewed.
pub(crate) trait Resources: Any + Send + Sync {
    /// The first messages over a new connection.
    fn renewal(&self) -> Vec<Message>;

    /// Continues after a reconnect. It may wait for the server.
    fn restore(&self, core: &Arc<Core>);

    /// Takes an event of a pool, and adds who waits for it.
    fn event(&self, event: &str, pool: &str, text: &str, wake: &mut Vec<Waker>);

    /// Adds everybody who waits, at the end of the app.
    fn wake_all(&self, wake: &mut Vec<Waker>);
}

/// Keeps an app alive: when the last handle is dropped, this ends the app.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) core: Arc<Core>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.core.outbox.flush();
        self.core.end(&Core::closed_error());
    }
}

/// The state that all handles of one app share.
pub(crate) struct Core {
    /// The process that connected: a forked child has copies of everything but the threads.
    pub(crate) process: u32,
    pub(crate) config: Config,
    pub(crate) outbox: Outbox,
    pub(crate) pending: Mutex<Pending>,
    /// Answers to calls that nobody here waits for.
    pub(crate) answers: Unclaimed,
    pub(super) reader: Handover<Input>,
    pub(crate) handlers: Handlers,
    pub(crate) watchers: Mutex<Watchers>,
    /// Those who want to know which pools the app loses.
    pub(crate) departures: Mutex<Vec<Weak<Queue<Presence>>>>,
    pub(crate) resources: Box<dyn Resources>,
    /// The encrypted pools.
    sealed: Vec<Arc<SealedPool>>,
    /// How many emits and pushes the server dropped that have not been reported yet.
    pub(crate) lost: AtomicU64,
    /// How many emits and pushes were dropped since the app connected first.
    pub(crate) lost_ever: AtomicU64,
    /// Who follows the connection. Held while it changes, so that all see the same order.
    pub(crate) followers: Mutex<Followers>,
    /// The joined pools, as last acknowledged by the server and changed since.
    pub(crate) pools: Mutex<Vec<String>>,
    /// The pools that this process has keys for, was configured with or joined. With keys, the
    /// server's word does not make a message go to, or come from, any other pool: it would be
    /// unencrypted.
    named: Mutex<Vec<String>>,
    pub(crate) workers: Workers,
    pub(crate) signal: Signal,
    is_woken: AtomicBool,
    /// The last acknowledgement of the server.
    pub(crate) ack: Mutex<Ack>,
    pub(crate) owner: Mutex<Weak<Owner>>,
    epoch: AtomicU32,
    tick_armed: AtomicBool,
    is_closing: AtomicBool,
    ended: AtomicBool,
    /// Who is woken at the end; reconnects wait for the signal.
    end_lock: Mutex<Vec<Waker>>,
    end_signal: Condvar,
}

/// Adds a pool to those that are known.
fn insert(pools: &mut Vec<String>, pool: &str) {
    if !pools.iter().any(|known| known == pool) {
        pools.push(pool.to_owned());
    }
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("app_id", &self.config.url.app_id)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// Connects; blocks for at most the configured time. Nothing drives the app yet.
    pub(crate) fn connect(
        config: Config,
        resources: Box<dyn Resources>,
    ) -> Result<Arc<Core>, Error> {
        let sealed = config.keys.iter();
        let sealed = sealed.map(|(pool, keys)| {
            let state_dir = config.state_dir.clone();
            Arc::new(SealedPool::new(pool.as_str(), keys.clone(), state_dir))
        });
        let sealed: Vec<_> = sealed.collect();
        let mut named: Vec<String> = sealed.iter().map(|pool| pool.name().to_owned()).collect();
        for pool in &config.url.pools {
            insert(&mut named, pool.as_str());
        }
        let core = Core {
            process: std::process::id(),
            sealed,
            named: Mutex::new(named),
            outbox: Outbox::new(),
            pending: Mutex::new(Pending::new()),
            answers: Unclaimed::default(),
            reader: Handover::new(Input::new()),
            handlers: Handlers::default(),
            watchers: Mutex::default(),
            departures: Mutex::default(),
            resources,
            lost: AtomicU64::new(0),
            lost_ever: AtomicU64::new(0),
            followers: Mutex::default(),
            pools: Mutex::default(),
            workers: Workers::new(config.handler_threads)?,
            signal: Signal::default(),
            is_woken: AtomicBool::new(false),
            ack: Mutex::default(),
            owner: Mutex::new(Weak::new()),
            epoch: AtomicU32::new(0),
            tick_armed: AtomicBool::new(false),
            is_closing: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            end_lock: Mutex::default(),
            end_signal: Condvar::new(),
            config,
        };
        let link = core.dial(&core.first_handshake())?;
        core.install(link)?;
        Ok(Arc::new(core))
    }

    /// Opens a new connection, which is not used yet.
    pub(crate) fn dial(&self, handshake: &str) -> Result<Link, Error> {
        let epoch = self.epoch.fetch_add(1, Ordering::Relaxed);
        connect::connect(&self.config, handshake, epoch, &self.sealed)
    }

    /// Starts to use a new connection, and renews the state that the server drops with a
    /// connection.
    pub(crate) fn install(&self, link: Link) -> Result<(), Error> {
        let mut first = Vec::new();
        let mut late = self.handlers.specs();
        late.retain(|spec| !link.ack.triggers.contains(&spec["name"]));
        if !late.is_empty() {
            let mut message = Message::new("trigger_register");
            let late = Value::Array(late).to_string();
            message.json("triggers", late.as_bytes());
            message.finish(None, link.attachments, &mut first);
        }
        for pool in lock(&self.watchers).keys() {
            let mut message = Message::new("watch");
            message.string("pool", pool);
            message.finish(None, link.attachments, &mut first);
        }
        for mut message in self.resources.renewal() {
            message.finish(None, link.attachments, &mut first);
        }
        let mut pools = link.ack.pools.clone();
        pools.extend(self.sealed.iter().map(|pool| pool.name().to_owned()));
        *lock(&self.pools) = pools;
        lock(&self.ack).clone_from(&link.ack);
        let max = link
            .ack
            .limits
            .max_in_flight
            .unwrap_or(crate::wire::pending::IN_FLIGHT_MAX);
        lock(&self.pending).in_flight_max = max.clamp(1, crate::wire::pending::IN_FLIGHT_MAX);
        let mut wake = Vec::new();
        {
            let mut followers = lock(&self.followers);
            self.outbox.up(Arc::new(link), &first)?;
            followers.tell(State::Connected, &mut wake);
        }
        wake.into_iter().for_each(Waker::wake);
        // After that, so that a later cancel finds the connection.
        let unwanted = lock(&self.pending).unwanted();
        unwanted.iter().for_each(|call| self.append_cancel(call));
        self.outbox.flush();
        self.outbox.wake_waiting();
        Ok(())
    }

    fn first_handshake(&self) -> String {
        let config = &self.config;
        let mut handshake = self.handshake_fields();
        if !config.rehydrate {
            let plain = config
                .url
                .pools
                .iter()
                .filter(|pool| !self.is_sealed(pool.as_str()));
            let plain: Vec<_> = plain.collect();
            if !plain.is_empty() {
                handshake["pools"] = json!(plain);
            }
            self.name_encrypted(&mut handshake);
            handshake["triggers"] = json!([]);
        } else {
            // Until they are served here, calls wait at the server or go to other instances.
            handshake["hold_triggers"] = json!(true);
        }
        handshake["exclusive"] = json!(config.exclusive);
        handshake["takeover"] = json!(config.takeover);
        handshake.to_string()
    }

    /// The handshake of a reconnect: the present registration, except triggers that have no room
    /// ([`Core::install`] registers them). It displaces nobody: another instance that connected in
    /// the meantime stays.
    pub(crate) fn next_handshake(&self) -> String {
        let mut handshake = self.handshake_fields();
        let mut pools = lock(&self.pools).clone();
        pools.retain(|pool| !self.is_sealed(pool));
        handshake["pools"] = json!(pools);
        self.name_encrypted(&mut handshake);
        let mut room = HANDSHAKE_TRIGGERS_BYTES;
        let mut triggers = self.handlers.specs();
        triggers.retain(|spec| {
            let bytes = spec.to_string().len();
            let fits = bytes <= room;
            room -= if fits { bytes } else { 0 };
            fits
        });
        handshake["triggers"] = Value::Array(triggers);
        handshake["exclusive"] = json!(self.config.exclusive);
        handshake.to_string()
    }

    fn name_encrypted(&self, handshake: &mut Value) {
        if !self.sealed.is_empty() {
            handshake["encrypted_pools"] = self.sealed.iter().map(|pool| pool.name()).collect();
        }
    }

    fn is_sealed(&self, pool: &str) -> bool {
        self.sealed.iter().any(|sealed| sealed.name() == pool)
    }

    /// Whether the app has keys for any pool.
    pub(crate) fn has_sealed(&self) -> bool {
        !self.sealed.is_empty()
    }

    /// The encrypted pool of this name, if the app has keys for it.
    pub(crate) fn sealed_pool(&self, pool: &str) -> Option<&Arc<SealedPool>> {
        self.sealed.iter().find(|sealed| sealed.name() == pool)
    }

    /// The pool that a message is sent to. An app with keys says which one, because what the server
    /// takes it for decides whether the message is encrypted.
    ///
    /// # Errors
    /// `bad_message` if it names none, and the app has keys and several pools.
    pub(crate) fn pool_of<'a>(&self, pool: Option<&'a str>) -> Result<Option<Cow<'a, str>>, Error> {
        if pool.is_some() || !self.has_sealed() {
            return Ok(pool.map(Cow::Borrowed));
        }
        match &lock(&self.named)[..] {
            [only] => Ok(Some(only.clone().into())),
            several => {
                let text = format!("name the pool: the app is in {}", several.join(", "));
                Err(Error::new(Code::BadMessage, text).with_ran(Ran::No))
            }
        }
    }

    /// How many messages of encrypted pools did not verify.
    pub(crate) fn unverified(&self) -> u64 {
        self.sealed.iter().map(|pool| pool.unverified()).sum()
    }

    /// Whether this process itself named a pool.
    pub(crate) fn has_named(&self, pool: &str) -> bool {
        lock(&self.named).iter().any(|named| named == pool)
    }

    /// Checks that the app is in the pool that a message names, or else goes to, or is joining it.
    /// The server's refusal of an emit would reach nobody.
    ///
    /// # Errors
    /// `not_member`.
    pub(crate) fn check_member(&self, pool: Option<&str>) -> Result<(), Error> {
        let pools = lock(&self.pools);
        let pool = match (pool, &pools[..]) {
            (Some(pool), _) => pool,
            (None, [_]) => return Ok(()),
            (None, _) => DEFAULT_POOL,
        };
        if pools.iter().any(|known| known == pool) || self.has_named(pool) {
            return Ok(());
        }
        let text = format!("this app is not in pool '{pool}': join it, or name one of the app's");
        Err(Error::new(Code::NotMember, text).with_ran(Ran::No))
    }

    /// The app is about to join a pool. Answers that wait there arrive before the reply.
    pub(crate) fn note_named(&self, pool: &str) {
        insert(&mut lock(&self.named), pool);
    }

    /// Notes whether the app joined a pool.
    pub(crate) fn note_joining(&self, pool: &str, joined: Result<(), Error>) -> Result<(), Error> {
        if joined.is_err() {
            let is_sealed = self.is_sealed(pool);
            let is_in = lock(&self.pools).iter().any(|known| known == pool);
            lock(&self.named).retain(|known| known != pool || is_sealed || is_in);
            return joined;
        }
        insert(&mut lock(&self.pools), pool);
        joined
    }

    pub(crate) fn note_left(&self, pool: &str) {
        for pools in [&self.pools, &self.named] {
            lock(pools).retain(|known| known != pool);
        }
    }

    fn handshake_fields(&self) -> Value {
        let mut handshake = json!({
            "action": "handshake",
            "id": "h",
            "protocol": latzero_protocol::limits::PROTOCOL_VERSION,
            "app_id": self.config.url.app_id,
            "features": ["attachments", "fd_passing"],
        });
        if let Some(meta) = &self.config.meta {
            handshake["meta"] = meta.clone();
        }
        if self.config.transient {
            handshake["transient"] = json!(true);
        }
        if self.config.hold_answers {
            handshake["hold_answers"] = json!(true);
        }
        handshake
    }

    /// What reads when no caller does.
    pub(crate) fn driver_kind(&self) -> DriverKind {
        match self.is_woken.load(Ordering::Acquire) {
            true => DriverKind::Woken,
            false => DriverKind::Threads,
        }
    }

    /// Starts what drives the app while nobody waits: a task on the caller's runtime if there is
    /// one and `may_use_runtime` is set, else a thread.
    pub(crate) fn start(self: &Arc<Self>, may_use_runtime: bool) -> Result<(), Error> {
        #[cfg(feature = "tokio")]
        if may_use_runtime && crate::drive::runtime::has_runtime() {
            self.is_woken.store(true, Ordering::Release);
            crate::drive::runtime::spawn(self.clone());
            return Ok(());
        }
        #[cfg(not(feature = "tokio"))]
        let _ = may_use_runtime;
        crate::drive::threads::spawn_worker(self)
    }

    /// Notes that an event loop of the program drives the app, which `waker` wakes.
    pub(super) fn drive_outside(&self, waker: &Waker) {
        self.signal.set_waker(waker);
        self.is_woken.store(true, Ordering::Release);
    }

    /// Continues with a thread after the runtime or event loop that drove the app has ended. If
    /// that cannot be started, the app ends.
    pub(super) fn drive_on(self: &Arc<Self>) {
        self.is_woken.store(false, Ordering::Release);
        if !self.is_ended()
            && let Err(error) = crate::drive::threads::spawn_worker(self)
        {
            self.end(&error);
        }
    }

    /// Whether the app ended permanently.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Makes the driver check the outbox, the connection, and whether the app has ended.
    pub(crate) fn notify_driver(&self) {
        match self.driver_kind() {
            DriverKind::Threads => self.notify_workers(),
            DriverKind::Woken => self.signal.wake(),
        }
    }

    /// Passes jobs to the driver.
    pub(crate) fn push_jobs(self: &Arc<Self>, jobs: &mut Vec<HandlerJob>) {
        if jobs.is_empty() {
            return;
        }
        self.workers.push(jobs);
        match self.driver_kind() {
            DriverKind::Threads => crate::drive::threads::ensure_worker(self),
            DriverKind::Woken => self.signal.wake(),
        }
    }

    /// Sends a message; see [`Outbox::poll_submit`].
    pub(crate) fn poll_submit(
        &self,
        message: &mut Message,
        by: By<'_>,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Submitted, Error>> {
        let may_wait = leave == Leave::Soon && self.driver_kind() != DriverKind::Threads;
        let now = |submitted: &Submitted| !may_wait || submitted.alone;
        let polled = self.outbox.poll_submit(&self.pending, message, by, now, cx);
        if polled.is_pending() {
            self.arm_tick();
            return Poll::Pending;
        }
        let (submitted, flushed) = std::task::ready!(polled)?;
        if flushed == Flushed::Blocked {
            self.notify_driver();
        } else if !now(&submitted) {
            self.flush_soon();
        }
        Poll::Ready(Ok(submitted))
    }

    /// Sends what was appended; if a runtime drives the app, with its next flush.
    pub(crate) fn flush_soon(&self) {
        match self.driver_kind() {
            DriverKind::Threads => self.flush(),
            DriverKind::Woken => self.signal.flush_due(),
        }
    }

    /// Sends what was appended; the driver sends what the socket does not accept now.
    pub(crate) fn flush(&self) {
        if self.outbox.flush() == Flushed::Blocked {
            self.notify_driver();
        }
    }

    /// Makes sure that deadlines are checked as long as anything waits.
    pub(crate) fn arm_tick(&self) {
        if !self.tick_armed.load(Ordering::Relaxed) && !self.tick_armed.swap(true, Ordering::AcqRel)
        {
            self.notify_driver();
        }
    }

    /// Whether deadlines must be checked.
    pub(crate) fn is_tick_armed(&self) -> bool {
        self.tick_armed.load(Ordering::Acquire)
    }

    /// Checks the deadlines.
    pub(crate) fn tick(&self) {
        let mut wake = Vec::new();
        self.tick_armed.store(false, Ordering::Release);
        let is_needed = {
            let mut pending = lock(&self.pending);
            pending.expire(Instant::now(), &mut wake);
            pending.waiting() > 0
        };
        if is_needed || self.outbox.has_waiting() {
            self.tick_armed.store(true, Ordering::Release);
        }
        wake.into_iter().for_each(Waker::wake);
        self.outbox.wake_waiting();
    }

    /// Ends a call that its owner has dropped; cancels it at the server if it is still in flight.
    pub(crate) fn forget(&self, key: Key) {
        let mut wake = Vec::new();
        let in_flight = lock(&self.pending).forget(key, &mut wake);
        wake.into_iter().for_each(Waker::wake);
        if let Some(call) = in_flight {
            // A call that the server has stored may end only at its deadline.
            self.arm_tick();
            self.cancel(&call);
        }
    }

    /// Detaches a parked call; its answer goes to [`App::answers`](crate::App::answers).
    pub(crate) fn leave(&self, key: Key, id: &str, sealed: Option<&SealedCall>) {
        let mut wake = Vec::new();
        let answer = lock(&self.pending).leave(key, &mut wake);
        match (answer, sealed) {
            (None, None) => {}
            (None, Some(sealed)) => sealed.leave(),
            (Some(result), sealed) => {
                let result = match sealed {
                    Some(sealed) => sealed.open_reply(result),
                    None => result,
                };
                wake.extend(self.answers.push(Answer::new(id, None, result)));
            }
        }
        wake.into_iter().for_each(Waker::wake);
    }

    /// Opens the answer to a parked call for which nobody here waits, if it is sealed.
    pub(super) fn open_late(
        &self,
        pool: Option<&str>,
        id: &str,
        answer: Result<Reply, Error>,
    ) -> Result<Reply, Error> {
        // An id is unique in its pool, which the server names if it stored the answer.
        let may_be_of = |sealed: &&Arc<SealedPool>| pool.is_none_or(|pool| pool == sealed.name());
        let mut opened = None;
        for sealed in self.sealed.iter().filter(may_be_of) {
            if let Some(result) = sealed.open_late(id, &answer) {
                let is_its = !matches!(&result, Err(e) if e.kind() == Code::Integrity);
                opened = Some(result);
                if is_its {
                    break;
                }
            }
        }
        if let Some(opened) = opened {
            return opened;
        }
        let may_be_plain = match pool {
            Some(pool) => !self.is_sealed(pool) && self.has_named(pool),
            None => lock(&self.named).len() > self.sealed.len(),
        };
        if self.has_sealed() && (!may_be_plain || is_sealed(id, &answer)) {
            let text = format!(
                "the answer to call '{id}' can't be opened: this app awaits none, because it was \
                answered before, or was parked with another state directory"
            );
            return Err(Error::new(Code::Integrity, text));
        }
        answer
    }

    /// Sends the server a cancel for a call.
    pub(crate) fn cancel(&self, call: &InFlight) {
        self.append_cancel(call);
        self.flush_soon();
    }

    fn append_cancel(&self, call: &InFlight) {
        let Some(epoch) = call.epoch.or_else(|| self.epoch_now()) else {
            return;
        };
        self.outbox.append(epoch, |out, _| {
            latzero_protocol::frame::append(out, |out| {
                out.extend_from_slice(b"{\"action\":\"cancel\",\"id\":");
                out.extend_from_slice(&call.id);
                out.push(b'}');
            });
        });
    }

    /// The reply to a call.
    pub(crate) fn poll_reply(&self, key: Key, cx: &mut Context<'_>) -> Poll<Result<Reply, Error>> {
        let reply = lock(&self.pending).poll(key, cx);
        reply.map_err(|e| self.unless_closing(e))
    }

    /// The next item or report of a streamed call.
    pub(crate) fn poll_next(&self, key: Key, cx: &mut Context<'_>) -> Poll<Next> {
        lock(&self.pending)
            .poll_next(key, cx)
            .map(|next| match next {
                Next::End(Err(e)) => Next::End(Err(self.unless_closing(e))),
                next => next,
            })
    }

    /// The server cancels the calls of an app that leaves.
    fn unless_closing(&self, e: Error) -> Error {
        match e.kind() {
            Code::Cancelled if self.is_closing.load(Ordering::Acquire) => {
                Self::closed_error().with_ran(Ran::Unknown)
            }
            _ => e,
        }
    }

    /// A connection was lost: ends its calls, except those that the server has stored, and
    /// reconnects.
    pub(crate) fn lost(self: &Arc<Self>, link: &Link, why: &str) {
        let is_closing = self.is_closing.load(Ordering::Acquire);
        let mut wake = Vec::new();
        let attempted = {
            let mut followers = lock(&self.followers);
            let Some(attempted) = self.outbox.down(link.epoch) else {
                return;
            };
            // The end of a clean close is no loss.
            if !is_closing {
                followers.tell(State::Disconnected, &mut wake);
            }
            attempted
        };
        link.end();
        wake.into_iter().for_each(Waker::wake);
        // A forked child would be a second instance of the app, with its parent's triggers.
        let then = if self.process != std::process::id() {
            Some("this process was forked from the one that connected")
        } else if !self.config.reconnect.enabled {
            Some("reconnecting is off")
        } else {
            None
        };
        let then_text = then.unwrap_or("the app reconnects by itself");
        let error = match is_closing {
            true => Self::closed_error(),
            false => Error::new(
                Code::Disconnected,
                format!("the connection to the server was lost ({why}); {then_text}"),
            ),
        };
        self.end_calls(link.epoch, attempted, &error);
        if self.is_ended() {
            return;
        }
        if is_closing || then.is_some() {
            self.end(&error);
        } else if let Err(error) = crate::drive::reconnect::spawn(self) {
            self.end(&error);
        }
        self.notify_driver();
    }

    fn end_calls(&self, epoch: u32, attempted: u64, error: &Error) {
        let mut wake = Vec::new();
        lock(&self.pending).end_connection(epoch, attempted, error, &mut wake);
        wake.into_iter().for_each(Waker::wake);
        self.handlers.cancel_all();
    }

    /// Ends the app: every call and every wait fails with `error`, threads and tasks stop.
    pub(crate) fn end(&self, error: &Error) {
        self.ended.store(true, Ordering::Release);
        let mut wake = Vec::new();
        let ended = {
            let mut followers = lock(&self.followers);
            let ended = self.outbox.end(error.clone());
            followers.tell_end(error, &mut wake);
            ended
        };
        if let Some((link, attempted)) = ended {
            link.end();
            self.end_calls(link.epoch, attempted, error);
        }
        lock(&self.pending).end_parked(error, &mut wake);
        wake.extend(self.answers.close());
        wake.into_iter().for_each(Waker::wake);
        for queues in lock(&self.watchers).values() {
            queues
                .iter()
                .filter_map(Weak::upgrade)
                .for_each(|queue| queue.close());
        }
        let departures = std::mem::take(&mut *lock(&self.departures));
        departures
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|queue| queue.close());
        let mut wake = Vec::new();
        self.resources.wake_all(&mut wake);
        wake.into_iter().for_each(Waker::wake);
        self.handlers.close();
        self.stop_workers();
        self.signal.wake();
        let wake = std::mem::take(&mut *lock(&self.end_lock));
        self.end_signal.notify_all();
        wake.into_iter().for_each(Waker::wake);
    }

    /// Waits for `time` or the end of the app, whichever is first; whether it ended.
    pub(crate) fn wait_for_end(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut guard = lock(&self.end_lock);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.is_ended() || left.is_zero() {
                return self.is_ended();
            }
            guard = self
                .end_signal
                .wait_timeout(guard, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }

    /// Ready if the app has ended permanently; else registers a waker for its end.
    pub(crate) fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut wakers = lock(&self.end_lock);
        if self.is_ended() {
            return Poll::Ready(());
        }
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// The next loss of the connection is the server's part of a clean close.
    pub(crate) fn begin_close(&self) {
        self.is_closing.store(true, Ordering::Release);
    }

    /// The error for operations after the last handle was dropped or `close` was called.
    pub(crate) fn closed_error() -> Error {
        Error::new(Code::Disconnected, "the app was closed").with_ran(Ran::No)
    }

    /// The number of the current connection.
    pub(crate) fn epoch_now(&self) -> Option<u32> {
        self.outbox.link().map(|link| link.epoch)
    }

    /// Whether there is a connection now.
    pub(crate) fn is_connected(&self) -> bool {
        matches!(self.outbox.phase(), Phase::Up(_))
    }
}

impl Core {
    /// Sends a message without a reply, if there is a connection. Such messages are small, and
    /// their number is bounded by that of earlier requests.
    pub(crate) fn send_oneway(&self, message: Message) {
        self.append(message);
        self.flush_soon();
    }

    /// Like [`Core::send_oneway`], but the caller flushes.
    pub(crate) fn append(&self, mut message: Message) {
        if let Some(link) = self.outbox.link() {
            self.outbox.append(link.epoch, |out, link| {
                message.finish(None, link.attachments, out);
            });
        }
    }
}
