//! The queue of calls that wait for a program, and the threads that run the programs.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;

use crate::launch::Supervisor;
use latzero::{Data, HandlerError, Request};
use rustix::process::{Pid, Signal, kill_process_group};

use super::program::{Program, ProgramSpec};

/// Calls that wait for a program at most. Beyond them a call is answered with `overloaded`, and an
/// event is dropped.
pub(super) const QUEUED_MAX: usize = 256;

/// What a handler answers.
pub(super) type Outcome = Result<Data, HandlerError>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call that waits or runs.
pub(super) struct Job {
    pub(super) number: u64,
    pub(super) request: Request,
    place: Arc<Mutex<Slot>>,
}

/// Where the worker leaves an answer for the waiting future.
#[derive(Default)]
struct Slot {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

/// Running programs, by the number of their call. A program is in the map from its start until it
/// is reaped, and it is reaped under the lock. So a process id that is killed under the lock cannot
/// belong to another process.
#[derive(Default)]
struct Running {
    programs: HashMap<u64, Pid>,
    /// The program that waits for the next call, with `--lines`.
    idle: Option<Pid>,
    /// Programs that are being started and are not in the map yet.
    starting: usize,
    /// Whether no more programs are started.
    has_ended: bool,
}

/// The programs, and a signal for whoever waits until none is being started.
struct Programs {
    running: Mutex<Running>,
    settled: Condvar,
    /// Ends the programs if this process ends without doing so.
    supervisor: Supervisor,
}

/// The calls that wait, and the programs that run.
pub(super) struct Queue {
    sender: SyncSender<Job>,
    numbers: AtomicU64,
    events_dropped: AtomicU64,
    programs: Arc<Programs>,
}

impl Queue {
    /// Starts the threads.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub(super) fn start(recipe: ProgramSpec, workers: usize) -> io::Result<Arc<Queue>> {
        let (sender, receiver) = sync_channel(QUEUED_MAX);
        let receiver = Arc::new(Mutex::new(receiver));
        let recipe = Arc::new(recipe);
        let programs = Arc::new(Programs {
            running: Mutex::default(),
            settled: Condvar::new(),
            supervisor: Supervisor::start()?,
        });
        for worker in 0..workers {
            let worker = thread::Builder::new().name(format!("program-{worker}"));
            let (receiver, recipe) = (Arc::clone(&receiver), Arc::clone(&recipe));
            let programs = Arc::clone(&programs);
            worker.spawn(move || work(&receiver, &recipe, &programs))?;
        }
        Ok(Arc::new(Queue {
            sender,
            numbers: AtomicU64::new(1),
            events_dropped: AtomicU64::new(0),
            programs,
        }))
    }

    /// Dropped events, which have no caller to report to.
    pub(super) fn events_dropped(&self) -> u64 {
        self.events_dropped.load(Ordering::Relaxed)
    }

    /// Queues a call; the future returns the answer.
    ///
    /// # Errors
    /// `overloaded` if too many calls wait.
    pub(super) fn push(&self, request: Request) -> Result<PendingAnswer, HandlerError> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let place = Arc::new(Mutex::new(Slot::default()));
        let is_emit = request.is_emit();
        let job = Job {
            number,
            request,
            place: Arc::clone(&place),
        };
        match self.sender.try_send(job) {
            Ok(()) => Ok(PendingAnswer {
                number,
                place,
                programs: Arc::clone(&self.programs),
            }),
            Err(TrySendError::Full(_)) => {
                if is_emit && self.events_dropped.fetch_add(1, Ordering::Relaxed) == 0 {
                    eprintln!(
                        "events arrive faster than the program handles them; some are \
                        dropped"
                    );
                }
                let text = format!(
                    "{QUEUED_MAX} calls are already waiting; raise --concurrency or start a \
                     second `latzero serve`"
                );
                Err(HandlerError::new("overloaded", text))
            }
            Err(TrySendError::Disconnected(_)) => Err(HandlerError::new(
                "handler_error",
                "the programs' threads are gone",
            )),
        }
    }

    /// Ends every program and its children, and starts no more. It waits for programs that are just
    /// being started, because nothing could end them after this process has ended.
    pub(super) fn end(&self) {
        let mut running = lock(&self.programs.running);
        running.has_ended = true;
        let programs = running.programs.values().chain(&running.idle);
        programs.for_each(|&pid| kill(pid));
        while running.starting > 0 {
            let settled = self.programs.settled.wait(running);
            running = settled.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Waits for an answer. Dropping it cancels the call and ends its program.
pub(super) struct PendingAnswer {
    number: u64,
    place: Arc<Mutex<Slot>>,
    programs: Arc<Programs>,
}

impl Future for PendingAnswer {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let mut place = lock(&self.place);
        if let Some(outcome) = place.outcome.take() {
            return Poll::Ready(outcome);
        }
        place.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for PendingAnswer {
    fn drop(&mut self) {
        let running = lock(&self.programs.running);
        if let Some(&pid) = running.programs.get(&self.number) {
            kill(pid);
        }
    }
}

/// Ends a program and its children: it leads its own process group.
fn kill(pid: Pid) {
    // The group may have ended by itself; then there is nothing to do.
    let _ = kill_process_group(pid, Signal::KILL);
}

fn work(receiver: &Mutex<Receiver<Job>>, recipe: &ProgramSpec, programs: &Programs) {
    let mut kept = None;
    loop {
        // The lock is held while waiting: one thread waits for a call, the others for the lock.
        let Ok(job) = lock(receiver).recv() else {
            return;
        };
        // Cancelled while it waited: by the server, or because the other end was dropped.
        if job.request.is_cancelled() {
            continue;
        }
        let outcome = recipe.run(
            &job,
            &mut kept,
            &Registry {
                number: job.number,
                programs,
            },
        );
        let waker = {
            let mut place = lock(&job.place);
            place.outcome = Some(outcome);
            place.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Where a worker notes which program runs for its call.
pub(super) struct Registry<'a> {
    number: u64,
    programs: &'a Programs,
}

impl Registry<'_> {
    /// Starts a program for the call, unless the queue is ending. It does not hold the lock, which
    /// every other start would wait for. Starts are counted instead, and the end of the queue waits
    /// for them.
    ///
    /// # Errors
    /// Those of `start`, and if no more programs are started.
    pub(super) fn start(
        &self,
        request: &Request,
        start: impl FnOnce() -> Result<Program, HandlerError>,
    ) -> Result<Program, HandlerError> {
        let mut running = lock(&self.programs.running);
        if running.has_ended {
            return Err(HandlerError::new(
                "handler_error",
                "the handler is stopping and accepts no more calls",
            ));
        }
        running.starting += 1;
        drop(running);
        let started = start();
        let mut running = lock(&self.programs.running);
        running.starting -= 1;
        if let Ok(program) = &started {
            self.programs.supervisor.add(program.pid);
            running.programs.insert(self.number, program.pid);
            if running.has_ended || request.is_cancelled() {
                kill(program.pid);
            }
        }
        drop(running);
        self.programs.settled.notify_all();
        started
    }

    /// The idle program now belongs to this call, so cancelling the call can end it.
    pub(super) fn begin(&self, request: &Request, pid: Pid) {
        let mut running = lock(&self.programs.running);
        running.idle = None;
        running.programs.insert(self.number, pid);
        if running.has_ended || request.is_cancelled() {
            kill(pid);
        }
    }

    /// The program no longer belongs to this call; it waits for the next one.
    pub(super) fn release(&self, pid: Pid) {
        let mut running = lock(&self.programs.running);
        running.programs.remove(&self.number);
        running.idle = Some(pid);
    }

    /// The program has ended: reaps it.
    pub(super) fn reap(&self, program: &mut Program) -> io::Result<std::process::ExitStatus> {
        let mut running = lock(&self.programs.running);
        running.programs.remove(&self.number);
        running.idle = None;
        let status = program.wait();
        // Children that it left behind keep running: it ended by itself, or its group was killed
        // with it.
        self.programs.supervisor.remove(program.pid);
        status
    }
}
