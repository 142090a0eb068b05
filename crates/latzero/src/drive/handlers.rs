//! An app's handlers, the calls that they are handling, and its listeners for emits.

use std::borrow::Borrow;
use std::future::Future;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use hashbrown::{HashMap, HashSet};
use latzero_protocol::message::Strategy;
use serde_json::{Value, json};

use crate::drive::core::{Core, DriverKind};
use crate::drive::events::{Emission, Queue};
use crate::drive::request::{self, Outcome, Request, Ticket, Unanswered};
use crate::error::HandlerError;
use crate::sync::lock;

/// A handler that ran longer than this passes on the reading role before it runs again.
pub(crate) const SLOW: Duration = Duration::from_millis(1);

/// A handler's running future.
type Running = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// The kind of a handler.
pub(crate) enum Kind {
    /// Its future is polled by the driver.
    Async(Box<dyn Fn(Request) -> Running + Send + Sync>),
    /// It runs on the thread that read the call.
    Blocking(Box<dyn Fn(Request) -> Outcome + Send + Sync>),
    /// It takes the call, which is answered later.
    Detached(Box<dyn Fn(Unanswered) + Send + Sync>),
}

/// How many emits a handler may have waiting or be at. Beyond that the newest are dropped and
/// counted: unlike calls, no server limits how many are under way. While handlers that block occupy
/// all threads, no thread of the app reads, so theirs are not counted.
const EMITS_MAX: u64 = 1024;

/// The emits that a handler has.
#[derive(Debug, Default)]
pub(crate) struct Emits {
    open: AtomicU64,
    lost: AtomicU64,
}

/// One emit of those that wait or are handled.
#[derive(Debug)]
pub(crate) struct OpenEmit(Arc<Emits>);

impl Drop for OpenEmit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Emits {
    /// Takes an emit; returns how many were dropped just before it. `None` if it is dropped too.
    fn take(self: &Arc<Self>) -> Option<(OpenEmit, u64)> {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        let open = OpenEmit(self.clone());
        if before >= EMITS_MAX {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some((open, self.lost.swap(0, Ordering::Relaxed)))
    }
}

/// The options of a served trigger.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    pub(crate) strategy: Strategy,
    pub(crate) concurrency: Option<u32>,
    pub(crate) doc: Option<String>,
    pub(crate) pools: Vec<String>,
    /// Whether it takes only what was signed by a writer of an encrypted pool.
    pub(crate) is_privileged: bool,
    /// What it takes.
    pub(crate) schema: Option<Value>,
}

impl Spec {
    /// The trigger in the form of the protocol.
    pub(crate) fn to_json(&self, name: &str) -> Value {
        let mut spec = json!({ "name": name, "strategy": self.strategy.as_str() });
        if let Some(concurrency) = self.concurrency {
            spec["concurrency"] = json!(concurrency);
        }
        if let Some(doc) = &self.doc {
            spec["doc"] = json!(doc);
        }
        if !self.pools.is_empty() {
            spec["pools"] = json!(self.pools);
        }
        if self.is_privileged {
            spec["privileged"] = json!(true);
        }
        if let Some(schema) = &self.schema {
            spec["schema"] = schema.clone();
        }
        spec
    }
}

/// A trigger of which only emits are wanted, in the form of the protocol: calls go to handlers
/// elsewhere.
pub(crate) fn listener(name: &str) -> Value {
    json!({ "name": name, "concurrency": 0 })
}

/// One handler.
pub(crate) struct Entry {
    pub(crate) name: Box<str>,
    pub(crate) spec: Spec,
    pub(crate) kind: Kind,
    pub(crate) emits: Arc<Emits>,
    /// Whether its last run took long. A handler that has not run yet counts as slow, because it
    /// may block forever.
    pub(crate) is_slow: AtomicBool,
}

/// Something for the driver to run.
pub(crate) enum HandlerJob {
    /// A call or an emit that just arrived.
    Start(Arc<Entry>, Request),
    /// A handler's future that can continue.
    Poll(Arc<Task>),
}

impl HandlerJob {
    /// Whether it may block its thread for long.
    pub(crate) fn may_be_slow(&self) -> bool {
        match self {
            HandlerJob::Start(entry, ..) => {
                matches!(entry.kind, Kind::Blocking(_)) && entry.is_slow.load(Ordering::Relaxed)
            }
            HandlerJob::Poll(_) => false,
        }
    }

    /// Whether it only takes a call, to be answered later.
    pub(crate) fn is_detached(&self) -> bool {
        matches!(self, HandlerJob::Start(entry, ..) if matches!(entry.kind, Kind::Detached(_)))
    }

    /// Whether it is the start of call `id`.
    pub(crate) fn is_start_of(&self, id: &str) -> bool {
        matches!(self, HandlerJob::Start(_, request) if request.ticket.id() == Some(id))
    }
}

/// The listeners for emits of each name.
type Listeners = HashMap<Box<str>, Vec<Weak<Queue<Emission>>>>;

/// The app's handlers and listeners.
#[derive(Default)]
pub(crate) struct Handlers {
    entries: RwLock<HashMap<Box<str>, Arc<Entry>>>,
    listeners: RwLock<Listeners>,
    running: Mutex<RunningCalls>,
}

/// The calls that handlers are handling.
#[derive(Default)]
struct RunningCalls {
    /// Those that occupy a thread: never more than there are threads, so a linear search is enough.
    blocking: Vec<Arc<Ticket>>,
    /// Those that are tasks.
    tasks: HashSet<Noted>,
    /// Wakers of those that wait for all of them to end.
    idle: Vec<Waker>,
}

impl RunningCalls {
    fn is_empty(&self) -> bool {
        self.blocking.is_empty() && self.tasks.is_empty()
    }

    /// The wakers to call if nothing runs any more.
    fn take_idle(&mut self) -> Vec<Waker> {
        match self.is_empty() {
            true => std::mem::take(&mut self.idle),
            false => Vec::new(),
        }
    }

    /// The index of a blocking call; the newest if a new connection reused the id of a lost call.
    fn blocking(&self, id: &str) -> Option<usize> {
        self.blocking
            .iter()
            .rposition(|ticket| ticket.id() == Some(id))
    }

    fn find(&self, id: &str) -> Option<Arc<Ticket>> {
        match self.blocking(id) {
            Some(at) => Some(self.blocking[at].clone()),
            None => self.tasks.get(id).map(|noted| noted.0.clone()),
        }
    }

    fn take(&mut self, id: &str) -> Option<Arc<Ticket>> {
        match self.blocking(id) {
            Some(at) => Some(self.blocking.swap_remove(at)),
            None => self.tasks.take(id).map(|noted| noted.0),
        }
    }
}

/// The result of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Registered {
    /// The server must be notified.
    New,
    /// The server knows the trigger already.
    Known,
}

impl Handlers {
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Entry>> {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    /// Adds a handler; returns the one whose place it takes.
    pub(crate) fn add(&self, entry: &Arc<Entry>) -> Option<Arc<Entry>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.insert(entry.name.clone(), entry.clone())
    }

    /// The server has refused `entry`: the one whose place it took serves on.
    pub(crate) fn take_back(&self, entry: &Arc<Entry>, earlier: Option<Arc<Entry>>) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let is_there = entries
            .get(&entry.name)
            .is_some_and(|now| Arc::ptr_eq(now, entry));
        match earlier {
            Some(earlier) if is_there => drop(entries.insert(entry.name.clone(), earlier)),
            None if is_there => drop(entries.remove(&entry.name)),
            _ => {}
        }
    }

    pub(crate) fn remove(&self, name: &str) -> bool {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let removed = entries.remove(name);
        drop(entries);
        removed.is_some()
    }

    pub(crate) fn listen(&self, name: &str, queue: &Arc<Queue<Emission>>) -> Registered {
        let mut listeners = self
            .listeners
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let queues = listeners.entry(name.into()).or_default();
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(queue));
        match queues.len() == 1 && self.find(name).is_none() {
            true => Registered::New,
            false => Registered::Known,
        }
    }

    /// Removes a listener; returns whether nobody listens to or serves `name` any more.
    pub(crate) fn unlisten(&self, queue: &Arc<Queue<Emission>>) -> Vec<String> {
        let mut listeners = self
            .listeners
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut gone = Vec::new();
        listeners.retain(|name, queues| {
            let before = queues.len();
            queues
                .retain(|q| q.strong_count() > 0 && !std::ptr::eq(q.as_ptr(), Arc::as_ptr(queue)));
            if queues.is_empty() && before > 0 && self.find(name).is_none() {
                gone.push(name.to_string());
            }
            !queues.is_empty()
        });
        gone
    }

    /// The listeners for emits of `name`.
    pub(crate) fn listeners(&self, name: &str) -> Vec<Arc<Queue<Emission>>> {
        let listeners = self
            .listeners
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        listeners
            .get(name)
            .into_iter()
            .flatten()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Whether there is a listener for emits of `name`.
    pub(crate) fn is_listened(&self, name: &str) -> bool {
        !self.listeners(name).is_empty()
    }

    /// All served and listened triggers, in the form of a handshake.
    pub(crate) fn specs(&self) -> Vec<Value> {
        let listeners = self
            .listeners
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let listened = listeners.keys().filter(|name| !entries.contains_key(*name));
        let served = entries
            .values()
            .map(|entry| entry.spec.to_json(&entry.name));
        served.chain(listened.map(|name| listener(name))).collect()
    }

    /// What `name` is served or listened to as, in the form of a handshake.
    pub(crate) fn spec(&self, name: &str) -> Option<Value> {
        match self.find(name) {
            Some(entry) => Some(entry.spec.to_json(name)),
            None => self.is_listened(name).then(|| listener(name)),
        }
    }

    /// Whether nothing is served or listened to.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
            && self
                .listeners
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty()
    }

    /// Notes a call whose handler occupies a thread.
    fn begin_blocking(&self, ticket: &Arc<Ticket>) {
        if ticket.id().is_some() {
            lock(&self.running).blocking.push(ticket.clone());
        }
    }

    /// Notes a call whose handler is a task.
    fn begin(&self, ticket: &Arc<Ticket>) {
        if ticket.id().is_some() {
            // A new connection may reuse the id of a lost call.
            lock(&self.running).tasks.replace(Noted(ticket.clone()));
        }
    }

    pub(crate) fn finish(&self, ticket: &Ticket) {
        let Some(id) = ticket.id() else { return };
        let idle = {
            let mut running = lock(&self.running);
            let is_it = |other: &Arc<Ticket>| std::ptr::eq(&**other, ticket);
            if let Some(at) = running.blocking.iter().rposition(is_it) {
                running.blocking.swap_remove(at);
            } else if running.tasks.get(id).is_some_and(|noted| is_it(&noted.0)) {
                // A new connection may have reused the id for another call, so that is checked
                // first.
                running.tasks.remove(id);
            }
            running.take_idle()
        };
        idle.into_iter().for_each(Waker::wake);
    }

    /// Whether no handler is running.
    pub(crate) fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut running = lock(&self.running);
        if running.is_empty() {
            return Poll::Ready(());
        }
        running.idle.push(cx.waker().clone());
        Poll::Pending
    }

    /// The caller of `id` accepts `count` more items.
    pub(crate) fn grant(&self, id: &str, count: u64) {
        let ticket = lock(&self.running).find(id);
        if let Some(ticket) = ticket {
            ticket.grant(count);
        }
    }

    /// The caller of `id` no longer wants the answer.
    pub(crate) fn cancel(&self, id: &str) {
        let ticket = lock(&self.running).take(id);
        if let Some(ticket) = ticket {
            ticket.cancel();
        }
    }

    /// The connection was lost, so nobody waits for the answers any more.
    pub(crate) fn cancel_all(&self) {
        let running = std::mem::take(&mut *lock(&self.running));
        running.blocking.iter().for_each(|ticket| ticket.cancel());
        running.tasks.iter().for_each(|noted| noted.0.cancel());
        running.idle.into_iter().for_each(Waker::wake);
    }

    /// The app ends: drops handlers and listeners, with everything that they hold.
    pub(crate) fn close(&self) {
        self.cancel_all();
        let entries =
            std::mem::take(&mut *self.entries.write().unwrap_or_else(PoisonError::into_inner));
        let listeners = std::mem::take(
            &mut *self
                .listeners
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        listeners
            .values()
            .flatten()
            .filter_map(Weak::upgrade)
            .for_each(|queue| queue.close());
        drop(entries);
    }
}

fn panicked() -> Outcome {
    Err(HandlerError::new(
        "handler_error",
        "the handler panicked; its log says where",
    ))
}

/// A running call, found by its id.
struct Noted(Arc<Ticket>);

impl Noted {
    fn id(&self) -> &str {
        self.0.id().unwrap_or_default()
    }
}

impl Borrow<str> for Noted {
    fn borrow(&self) -> &str {
        self.id()
    }
}

impl PartialEq for Noted {
    fn eq(&self, other: &Self) -> bool {
        self.id() == other.id()
    }
}

impl Eq for Noted {}

impl Hash for Noted {
    fn hash<S: Hasher>(&self, state: &mut S) {
        self.id().hash(state);
    }
}

/// Runs a job that starts at `started`; returns when it ended, if that was measured. Answers are
/// appended, not flushed.
pub(crate) fn run(core: &Arc<Core>, job: HandlerJob, started: Instant) -> Instant {
    match job {
        HandlerJob::Poll(task) => {
            task.run(core);
            started
        }
        HandlerJob::Start(entry, request) => start(core, &entry, request, started),
    }
}

/// Begins a call or an emit, which was noted, and runs it to its end if its handler blocks.
fn start(core: &Arc<Core>, entry: &Entry, mut request: Request, started: Instant) -> Instant {
    if request.ticket.is_cancelled() {
        core.handlers.finish(&request.ticket);
        return started;
    }
    let mut open = None;
    if request.is_emit() && !matches!(entry.kind, Kind::Blocking(_)) {
        let Some((taken, lost)) = entry.emits.take() else {
            core.lost_ever.fetch_add(1, Ordering::Relaxed);
            return started;
        };
        (open, request.lost) = (Some(taken), lost);
    }
    match &entry.kind {
        Kind::Blocking(handler) => {
            let ticket = request.ticket.clone();
            let outcome = catch_unwind(AssertUnwindSafe(|| handler(request)));
            let ended = Instant::now();
            entry
                .is_slow
                .store(ended - started > SLOW, Ordering::Relaxed);
            request::answer(core, &ticket, outcome.unwrap_or_else(|_| panicked()));
            core.handlers.finish(&ticket);
            ended
        }
        Kind::Detached(handler) => {
            let unanswered = Unanswered::new(request, open);
            // Dropped by a panic, it says so.
            let _ = catch_unwind(AssertUnwindSafe(|| handler(unanswered)));
            started
        }
        Kind::Async(handler) => {
            let ticket = request.ticket.clone();
            let is_noted = core.notes_at_start(&ticket);
            match catch_unwind(AssertUnwindSafe(|| handler(request))) {
                Ok(future) => {
                    let future: Running = match open {
                        None => future,
                        Some(open) => Box::pin(async move {
                            let _open = open;
                            future.await
                        }),
                    };
                    Task::start(core, ticket, future, is_noted);
                }
                Err(_) => {
                    request::answer(core, &ticket, panicked());
                    core.handlers.finish(&ticket);
                }
            }
            started
        }
    }
}

impl Core {
    /// Notes the call that a job starts, so that a cancel finds it from now on.
    pub(super) fn note(&self, job: &HandlerJob) {
        let HandlerJob::Start(entry, request) = job else {
            return;
        };
        let ticket = &request.ticket;
        match &entry.kind {
            Kind::Blocking(_) => self.handlers.begin_blocking(ticket),
            Kind::Detached(_) => self.handlers.begin(ticket),
            Kind::Async(_) if self.notes_at_start(ticket) => self.handlers.begin(ticket),
            Kind::Async(_) => {}
        }
    }

    /// Whether the call of a task is noted before its first poll. If one task reads and runs, no
    /// message about the call can arrive before that ends.
    fn notes_at_start(&self, ticket: &Ticket) -> bool {
        ticket.has_window() || self.driver_kind() == DriverKind::Threads
    }

    /// Runs `jobs` and those that are queued now, for a driver that runs handlers itself; returns
    /// whether there were any. A task that wakes itself waits for the next turn.
    pub(super) fn run_jobs(self: &Arc<Self>, jobs: &mut Vec<HandlerJob>) -> bool {
        let queued = (0..self.workers.queued()).map_while(|_| self.workers.pop(self));
        let mut has_run = false;
        let mut now = Instant::now();
        let arrived = jobs.drain(..).inspect(|job| self.note(job));
        for job in arrived.chain(queued) {
            now = run(self, job, now);
            has_run = true;
        }
        has_run
    }
}

/// A handler's future, with its call.
pub(crate) struct Task {
    core: Weak<Core>,
    ticket: Arc<Ticket>,
    future: Mutex<Option<Running>>,
    is_queued: AtomicBool,
    /// Whether the call is in the list of calls that can be cancelled.
    is_noted: AtomicBool,
}

impl Task {
    fn start(core: &Arc<Core>, ticket: Arc<Ticket>, future: Running, is_noted: bool) {
        let task = Arc::new(Task {
            core: Arc::downgrade(core),
            ticket,
            future: Mutex::new(Some(future)),
            is_queued: AtomicBool::new(true),
            is_noted: AtomicBool::new(is_noted),
        });
        task.run(core);
    }

    fn run(self: &Arc<Self>, core: &Arc<Core>) {
        // A wakeup from here on is not lost: it queues the task again.
        self.is_queued.store(false, Ordering::Release);
        let mut place = lock(&self.future);
        let Some(future) = place.as_mut() else { return };
        if self.ticket.is_cancelled() {
            // Dropping the future may use the app, but not this task.
            let dropped = place.take();
            drop(place);
            let _ = catch_unwind(AssertUnwindSafe(|| drop(dropped)));
            core.handlers.finish(&self.ticket);
            return;
        }
        let waker = Waker::from(self.clone());
        let polled = catch_unwind(AssertUnwindSafe(|| {
            future.as_mut().poll(&mut Context::from_waker(&waker))
        }));
        let outcome = match polled {
            Ok(Poll::Pending) => {
                // As long as it has its place: who ends the task forgets the waker after that.
                self.ticket.on_cancel(&waker);
                drop(place);
                if !self.is_noted.swap(true, Ordering::Relaxed) {
                    core.handlers.begin(&self.ticket);
                }
                // If it was cancelled in the meantime, there was no waker yet.
                if self.ticket.is_cancelled() {
                    waker.wake();
                }
                return;
            }
            Ok(Poll::Ready(outcome)) => outcome,
            Err(_) => panicked(),
        };
        let dropped = place.take();
        // It leads back to this task, which has the ticket.
        self.ticket.forget_waker();
        drop(place);
        let _ = catch_unwind(AssertUnwindSafe(|| drop(dropped)));
        request::answer(core, &self.ticket, outcome);
        core.handlers.finish(&self.ticket);
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel)
            && let Some(core) = self.core.upgrade()
        {
            core.push_jobs(&mut vec![HandlerJob::Poll(self)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emits_beyond_the_limit_are_counted() {
        let emits = Arc::new(Emits::default());
        let mut open: Vec<_> = (0..EMITS_MAX).filter_map(|_| emits.take()).collect();
        assert!(open.iter().all(|(_, lost)| *lost == 0));
        assert_eq!(
            (open.len() as u64, emits.take().is_none()),
            (EMITS_MAX, true)
        );
        assert!(emits.take().is_none());
        open.pop();
        let (_open, lost) = emits.take().unwrap();
        assert_eq!(lost, 2);
        assert!(emits.take().is_none());
    }
}
