//! Threads that drive an app without a runtime: they read while no caller does, and run handlers.
//!
//! One of them is the leader: it reads, and runs handlers itself, so a call costs no thread hop.
//! Before it runs a handler that was slow, or that has never run, it passes the lead to another
//! thread. If a handler that used to be fast is stuck, a watching thread takes the lead. All
//! threads stop with the app; those that are not needed for some time end.
//!
//! A blocked caller reads for itself. The leader does not read while callers have done so recently,
//! and checks again after a few milliseconds, so it costs such a caller nothing per call.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use latzero_protocol::{Code, Ran};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::drive::core::{Core, TICK};
use crate::drive::handlers::{self, HandlerJob, SLOW};
use crate::drive::handover::Reading;
use crate::error::Error;
use crate::sync::lock;
use crate::wire::input::{Input, Received};
use crate::wire::wait::timespec;

/// A thread without work ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// How long the leader at first does not read, because callers read for themselves.
const AWAY_MIN: Duration = Duration::from_millis(2);

/// How long it does not read at most, if the app serves triggers and if it does not.
const AWAY_MAX: (Duration, Duration) = (Duration::from_millis(4), Duration::from_millis(16));

/// How long the watching thread waits between checks of a leader whose handlers are fast.
const WATCH_MAX: Duration = Duration::from_millis(8);

/// The most threads of one app, as a multiple of `handler_threads`: a handler that waits for its
/// own call does not count against that limit, but against this one.
const NESTING: usize = 4;

#[derive(Debug)]
struct State {
    queue: VecDeque<HandlerJob>,
    threads: usize,
    idle: usize,
    /// Handlers that wait for their own calls.
    nested: usize,
    has_leader: bool,
    /// Whether the leader does not read for now.
    is_away: bool,
    is_stopped: bool,
}

impl std::fmt::Debug for HandlerJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Job")
    }
}

/// The threads of one app, and the jobs that wait.
#[derive(Debug)]
pub(crate) struct Workers {
    state: Mutex<State>,
    wake: Condvar,
    /// Interrupts the leader's poll.
    bell: OwnedFd,
    /// Incremented each time that the lead passes to another thread.
    lease: AtomicU64,
    /// When the leader's current handler began, in nanoseconds since `born`; 0 is none.
    busy_since: AtomicU64,
    /// How many jobs leaders ran, by which the watching thread sees that they make progress.
    runs: AtomicU64,
    /// Whether a thread watches the leader.
    is_watched: AtomicBool,
    queued: AtomicUsize,
    born: Instant,
    threads_max: usize,
}

thread_local! {
    /// The app whose handler this thread runs, as an address, which is enough for a comparison; 0
    /// is none.
    static IN_HANDLER_OF: Cell<usize> = const { Cell::new(0) };
}

impl Workers {
    pub(crate) fn new(threads_max: usize) -> Result<Self, Error> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| {
            Error::new(
                Code::Internal,
                format!("cannot create an event descriptor: {e}"),
            )
            .with_ran(Ran::No)
            .with_source(e)
        })?;
        Ok(Workers {
            state: Mutex::new(State {
                queue: VecDeque::new(),
                threads: 0,
                idle: 0,
                nested: 0,
                has_leader: false,
                is_away: false,
                is_stopped: false,
            }),
            wake: Condvar::new(),
            bell,
            lease: AtomicU64::new(0),
            busy_since: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            is_watched: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            born: Instant::now(),
            threads_max: threads_max.max(1),
        })
    }

    /// Queues jobs; a thread must then be notified.
    pub(crate) fn push(&self, jobs: &mut Vec<HandlerJob>) {
        let mut state = lock(&self.state);
        if state.is_stopped {
            drop(state);
            jobs.clear();
            return;
        }
        state.queue.extend(jobs.drain(..));
        self.queued.store(state.queue.len(), Ordering::Release);
    }

    /// The next job.
    pub(crate) fn pop(&self, core: &Core) -> Option<HandlerJob> {
        if self.queued.load(Ordering::Acquire) == 0 {
            return None;
        }
        self.pop_from(&mut lock(&self.state), core)
    }

    /// A call is noted under the lock, so that its cancel finds it here or there.
    fn pop_from(&self, state: &mut State, core: &Core) -> Option<HandlerJob> {
        let job = state.queue.pop_front()?;
        // Before the count, which says whether a cancel has to look here.
        core.note(&job);
        self.queued.store(state.queue.len(), Ordering::Release);
        Some(job)
    }

    /// How many jobs wait.
    pub(crate) fn queued(&self) -> usize {
        self.queued.load(Ordering::Acquire)
    }

    /// Drops call `id` if it has not been started.
    pub(crate) fn drop_queued(&self, id: &str) {
        if self.queued.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut state = lock(&self.state);
        let found = state.queue.iter().position(|job| job.is_start_of(id));
        let dropped = found.and_then(|at| state.queue.remove(at));
        self.queued.store(state.queue.len(), Ordering::Release);
        drop(state);
        drop(dropped);
    }

    /// Interrupts the leader, which waits for the socket.
    pub(super) fn ring(&self) {
        // A full counter already interrupts the poll.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    fn stop(&self) {
        let jobs = {
            let mut state = lock(&self.state);
            state.is_stopped = true;
            self.queued.store(0, Ordering::Release);
            std::mem::take(&mut state.queue)
        };
        drop(jobs);
        self.wake.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.wake
            .wait_timeout(state, time)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Provides a thread for queued jobs or for the lead: wakes a free one, or starts one.
    fn another(&self, core: &Arc<Core>) -> bool {
        let mut state = lock(&self.state);
        if state.idle > 0 {
            drop(state);
            self.wake.notify_one();
            return true;
        }
        let is_full = state.threads.saturating_sub(state.nested) >= self.threads_max
            || state.threads >= self.threads_max * NESTING;
        if is_full || state.is_stopped {
            return false;
        }
        state.threads += 1;
        drop(state);
        let spawned = start_thread(core);
        if !spawned {
            lock(&self.state).threads -= 1;
        }
        spawned
    }

    fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    fn at(&self, moment: Instant) -> u64 {
        u64::try_from((moment - self.born).as_nanos())
            .unwrap_or(u64::MAX)
            .max(1)
    }
}

impl Core {
    /// Makes the leader check everything again.
    pub(super) fn notify_workers(&self) {
        drop(lock(&self.workers.state));
        self.workers.wake.notify_all();
        self.interrupt();
    }

    /// Ends every thread of the app, after what they run now.
    pub(super) fn stop_workers(&self) {
        self.workers.stop();
        self.interrupt();
    }

    fn interrupt(&self) {
        if self.reader.must_interrupt() {
            self.workers.ring();
        }
    }
}

fn start_thread(core: &Arc<Core>) -> bool {
    let core = core.clone();
    std::thread::Builder::new()
        .name("latzero".into())
        .spawn(move || work(&core))
        .is_ok()
}

/// Starts a thread of the app.
pub(crate) fn spawn_worker(core: &Arc<Core>) -> Result<(), Error> {
    if core.workers.another(core) {
        return Ok(());
    }
    Err(Error::new(Code::Internal, "no thread could be started").with_ran(Ran::No))
}

/// Makes sure that a thread runs the queued jobs.
pub(crate) fn ensure_worker(core: &Arc<Core>) {
    let workers = &core.workers;
    if core.reader.must_interrupt() {
        workers.ring();
    } else {
        workers.another(core);
    }
}

/// The loop of one thread, until the app ends or the thread is not needed.
fn work(core: &Arc<Core>) {
    let workers = &core.workers;
    let mut runs_seen = workers.runs.load(Ordering::Relaxed);
    let mut watch = SLOW;
    let mut idle_since = Instant::now();
    let mut is_watching = false;
    let mut state = lock(&workers.state);
    loop {
        if state.is_stopped {
            break;
        }
        if !state.has_leader {
            state.has_leader = true;
            let lease = workers.lease.fetch_add(1, Ordering::AcqRel) + 1;
            drop(state);
            if is_watching {
                workers.is_watched.store(false, Ordering::Release);
                is_watching = false;
            }
            lead(core, lease);
            idle_since = Instant::now();
            state = lock(&workers.state);
            continue;
        }
        if let Some(job) = workers.pop_from(&mut state, core) {
            let has_more = !state.queue.is_empty();
            drop(state);
            if std::mem::take(&mut is_watching) {
                workers.is_watched.store(false, Ordering::Release);
            }
            // One wakeup may be for several jobs. And it may have been meant for a thread that
            // watches the leader: nobody reads while that runs a slow handler.
            if has_more || !workers.is_watched.load(Ordering::Acquire) {
                workers.another(core);
            }
            run(core, job, Instant::now());
            if workers.queued.load(Ordering::Acquire) == 0 {
                core.flush();
            }
            idle_since = Instant::now();
            state = lock(&workers.state);
            continue;
        }
        // Idle: one thread watches the leader closely while it runs handlers.
        let runs = workers.runs.load(Ordering::Relaxed);
        let busy_since = workers.busy_since.load(Ordering::Acquire);
        let is_active = runs != runs_seen || busy_since != 0;
        if is_active && (is_watching || !workers.is_watched.swap(true, Ordering::AcqRel)) {
            if !is_watching {
                watch = SLOW;
            }
            is_watching = true;
            let busy = Duration::from_nanos(workers.now().saturating_sub(busy_since));
            if busy_since != 0 && busy > SLOW {
                // Stuck: its answers so far are sent now, and this thread takes the lead.
                workers.busy_since.store(0, Ordering::Release);
                state.has_leader = false;
                drop(state);
                core.flush();
                state = lock(&workers.state);
                continue;
            }
        } else if is_watching {
            is_watching = false;
            workers.is_watched.store(false, Ordering::Release);
        }
        runs_seen = runs;
        let left = IDLE.saturating_sub(idle_since.elapsed());
        if left.is_zero() && !is_watching {
            break;
        }
        state.idle += 1;
        state = workers.wait(state, if is_watching { watch } else { left });
        state.idle -= 1;
        watch = (watch * 2).min(WATCH_MAX);
    }
    if is_watching {
        workers.is_watched.store(false, Ordering::Release);
    }
    state.threads -= 1;
}

fn run(core: &Arc<Core>, job: HandlerJob, started: Instant) -> Instant {
    IN_HANDLER_OF.set(Arc::as_ptr(core) as usize);
    let ended = handlers::run(core, job, started);
    IN_HANDLER_OF.set(0);
    ended
}

/// Gives up the lead, if this thread still has it.
fn resign(workers: &Workers, lease: u64) {
    let mut state = lock(&workers.state);
    if workers.lease.load(Ordering::Acquire) == lease && state.has_leader {
        state.has_leader = false;
        workers.lease.fetch_add(1, Ordering::AcqRel);
    }
}

/// Reads and runs until the lead is lost or the app ends.
fn lead(core: &Arc<Core>, lease: u64) {
    let workers = &core.workers;
    let mut jobs = Vec::new();
    let mut away = AWAY_MIN;
    let mut turns_seen = core.reader.turns();
    let mut is_quiet = true;
    let mut tick = Instant::now();
    loop {
        if workers.lease.load(Ordering::Acquire) != lease {
            return;
        }
        if core.is_ended() {
            resign(workers, lease);
            return;
        }
        while let Some(job) = workers.pop(core) {
            if !run_as_leader(core, lease, job) {
                return;
            }
            is_quiet = false;
        }
        if core.is_tick_armed() && tick.elapsed() >= TICK {
            tick = Instant::now();
            core.tick();
        }
        let Some(mut input) = core.reader.try_lead(&mut turns_seen) else {
            // Callers read for themselves.
            stay_away(core, away);
            let max = if core.handlers.is_empty() {
                AWAY_MAX.1
            } else {
                AWAY_MAX.0
            };
            away = (away * 2).min(max);
            continue;
        };
        away = AWAY_MIN;
        if !input.attach(&core.outbox) {
            drop(input);
            stay_away(core, TICK);
            continue;
        }
        let received = receive(core, &mut input, is_quiet);
        is_quiet = matches!(received, Received::Nothing);
        core.settle(&mut input, received, &mut jobs);
        // A single job is run directly; several are queued, so that other threads can take them if
        // one is stuck. Before another thread reads: a cancel must find them.
        let job = match jobs.len() {
            0 | 1 => jobs.pop(),
            _ => {
                workers.push(&mut jobs);
                None
            }
        };
        if let Some(job) = &job {
            core.note(job);
        }
        drop(input);
        if let Some(job) = job
            && !run_as_leader(core, lease, job)
        {
            return;
        }
    }
}

/// Waits for bytes: only in `recv` while calls arrive, so that each costs one system call; else in
/// a poll that can be interrupted.
fn receive(core: &Core, input: &mut Reading<'_, Input>, is_quiet: bool) -> Received {
    let workers = &core.workers;
    if input.is_fresh {
        return input.try_receive();
    }
    let can_wait = !is_quiet
        && workers.threads_max > 1
        && !core.outbox.is_blocked()
        && !core.is_tick_armed()
        && !core.handlers.is_empty();
    if can_wait {
        return input.receive();
    }
    let Some(link) = input.link.clone() else {
        return Received::Nothing;
    };
    let may_sleep =
        input.begin_sleep() && workers.queued.load(Ordering::Acquire) == 0 && !core.is_ended();
    let mut received = Received::Nothing;
    if may_sleep {
        let is_blocked = core.outbox.is_blocked();
        let wanted = if is_blocked {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        let mut fds = [
            PollFd::from_borrowed_fd(link.as_fd(), wanted),
            PollFd::from_borrowed_fd(workers.bell.as_fd(), PollFlags::IN),
        ];
        let time = core.is_tick_armed().then(|| timespec(TICK));
        // An interrupted or failed poll counts as an early one: the read decides.
        let _ = poll(&mut fds, time.as_ref());
        let ready = fds[0].revents();
        if !fds[1].revents().is_empty() {
            let _ = rustix::io::read(&workers.bell, &mut [0; 8]);
        }
        if ready.contains(PollFlags::OUT) {
            core.outbox.flush();
        }
        if !ready.difference(PollFlags::OUT).is_empty() {
            received = input.try_receive();
        }
    }
    input.end_sleep();
    received
}

/// Waits for `time` or an event, and sends what the socket accepts in the meantime.
fn stay_away(core: &Arc<Core>, time: Duration) {
    let workers = &core.workers;
    if core.outbox.is_blocked()
        && let Some(link) = core.outbox.link()
    {
        let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), PollFlags::OUT)];
        let _ = poll(&mut fds, Some(&timespec(time)));
        core.outbox.flush();
        return;
    }
    let mut state = lock(&workers.state);
    if !state.queue.is_empty() || state.is_stopped {
        return;
    }
    state.is_away = true;
    state.idle += 1;
    state = workers.wait(state, time);
    state.idle -= 1;
    state.is_away = false;
}

/// Runs a job and the queued ones behind it; returns whether this thread still leads.
fn run_as_leader(core: &Arc<Core>, lease: u64, job: HandlerJob) -> bool {
    let workers = &core.workers;
    let mut next = Some(job);
    // The clock is read once per job: the end of one is the start of the next.
    let mut now = Instant::now();
    while let Some(job) = next {
        if job.may_be_slow() && workers.threads_max > 1 {
            core.flush();
            resign(workers, lease);
            workers.another(core);
            run(core, job, Instant::now());
            core.flush();
            return false;
        }
        workers.runs.fetch_add(1, Ordering::Relaxed);
        let began = workers.at(now);
        workers.busy_since.store(began, Ordering::Release);
        // After that: a thread that sees nothing to watch goes to sleep.
        if !workers.is_watched.load(Ordering::Acquire) && workers.threads_max > 1 {
            workers.another(core);
        }
        now = run(core, job, now);
        let _ = workers
            .busy_since
            .compare_exchange(began, 0, Ordering::AcqRel, Ordering::Relaxed);
        if workers.lease.load(Ordering::Acquire) != lease {
            core.flush();
            return false;
        }
        next = workers.pop(core);
    }
    core.flush();
    true
}

/// Notes that a handler waits for its own call, so that another thread may take its place.
pub(crate) struct Nested<'a>(Option<&'a Arc<Core>>);

impl<'a> Nested<'a> {
    pub(crate) fn enter(core: &'a Arc<Core>) -> Self {
        if IN_HANDLER_OF.get() != Arc::as_ptr(core) as usize {
            return Nested(None);
        }
        lock(&core.workers.state).nested += 1;
        // When the last jobs arrived, this thread was busy, and there may have been no other.
        if core.workers.queued.load(Ordering::Acquire) > 0 {
            ensure_worker(core);
        }
        Nested(Some(core))
    }

    /// Whether this thread runs a handler of the app.
    pub(crate) fn is_nested(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Nested<'_> {
    fn drop(&mut self) {
        let Some(core) = self.0 else { return };
        let workers = &core.workers;
        let is_away = {
            let mut state = lock(&workers.state);
            state.nested -= 1;
            state.is_away
        };
        // The reading role is free again, and the leader may be waiting for it.
        if is_away {
            workers.wake.notify_all();
        }
    }
}
