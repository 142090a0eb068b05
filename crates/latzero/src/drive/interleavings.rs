//! Tests every order of the steps by which blocked callers and a leading thread share the reading
//! role. Nothing here times out: a wakeup that is lost is a deadlock, which loom reports.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::atomic::AtomicBool;
use loom::sync::{Arc, Condvar};
use loom::thread;

use cells::{Mutex, Thread, current, park};
use handover::Handover;

/// The same code as the client's, made of what loom watches.
#[path = "handover.rs"]
#[allow(
    dead_code,
    clippy::duplicate_mod,
    reason = "it is made of other parts here, and a task on a runtime does not share the role"
)]
mod handover;

mod cells {
    use loom::sync::{Arc, Condvar};
    pub(super) use loom::sync::{Mutex, MutexGuard};

    /// A thread that can be unparked. loom's own forgets that while the thread waits for a lock.
    #[derive(Debug, Clone)]
    pub(super) struct Thread(Arc<(Mutex<bool>, Condvar)>);

    impl Thread {
        pub(super) fn unpark(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_one();
        }
    }

    loom::thread_local! {
        static CURRENT: Thread = Thread(Arc::new((Mutex::new(false), Condvar::new())));
    }

    pub(super) fn current() -> Thread {
        CURRENT.with(Thread::clone)
    }

    pub(super) fn park() {
        let me = current();
        let mut is_unparked = me.0.0.lock().unwrap();
        while !std::mem::take(&mut *is_unparked) {
            is_unparked = me.0.1.wait(is_unparked).unwrap();
        }
    }
}

/// What arrives: replies, each for one caller.
#[derive(Default)]
struct Arrived {
    replies: VecDeque<usize>,
    /// Whether the leader is interrupted.
    is_rung: bool,
}

/// A call that waits for its reply.
#[derive(Default)]
struct Call {
    is_answered: bool,
    waiter: Option<Thread>,
}

struct App {
    reader: Handover<()>,
    socket: Mutex<Arrived>,
    arrival: Condvar,
    calls: Vec<Mutex<Call>>,
    has_ended: AtomicBool,
}

impl App {
    fn new(calls: usize) -> App {
        App {
            reader: Handover::new(()),
            socket: Mutex::new(Arrived::default()),
            arrival: Condvar::new(),
            calls: (0..calls).map(|_| Mutex::new(Call::default())).collect(),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Sends a call, whose reply arrives at once.
    fn send(&self, call: usize) {
        self.socket.lock().unwrap().replies.push_back(call);
        self.arrival.notify_all();
    }

    fn ring(&self) {
        self.socket.lock().unwrap().is_rung = true;
        self.arrival.notify_all();
    }

    /// The next reply; `None` if the bell rang first and `is_interruptible` is set.
    fn wait(&self, is_interruptible: bool) -> Option<usize> {
        let mut socket = self.socket.lock().unwrap();
        loop {
            if let Some(call) = socket.replies.pop_front() {
                return Some(call);
            }
            if is_interruptible && std::mem::take(&mut socket.is_rung) {
                return None;
            }
            socket = self.arrival.wait(socket).unwrap();
        }
    }

    fn answer(&self, call: usize) {
        let waiter = {
            let mut call = self.calls[call].lock().unwrap();
            call.is_answered = true;
            call.waiter.take()
        };
        if let Some(waiter) = waiter {
            waiter.unpark();
        }
    }

    /// Whether a call is answered; if not, this thread is unparked when it is.
    fn is_answered(&self, call: usize) -> bool {
        let mut call = self.calls[call].lock().unwrap();
        if !call.is_answered {
            call.waiter = Some(current());
        }
        call.is_answered
    }

    /// A blocked caller, as in `Core::block_on`.
    fn call(&self, call: usize) {
        self.send(call);
        if self.is_answered(call) {
            return;
        }
        let mut caller = self.reader.caller(true);
        loop {
            match caller.take() {
                Ok(_role) => {
                    while !self.is_answered(call) {
                        let other = self.wait(false).expect("it is not interrupted");
                        self.answer(other);
                    }
                    return;
                }
                Err(queued) => {
                    if queued.must_interrupt {
                        self.ring();
                    }
                    park();
                    if self.is_answered(call) {
                        return;
                    }
                }
            }
        }
    }

    /// The leading thread, as in `threads::lead`.
    fn lead(&self) {
        let mut seen = 0;
        while !self.has_ended.load(Relaxed) {
            let Some(role) = self.reader.try_lead(&mut seen) else {
                thread::yield_now();
                continue;
            };
            // Relaxed: the order comes from the lock of the hand-over.
            let reply = match role.begin_sleep() && !self.has_ended.load(Relaxed) {
                true => self.wait(true),
                false => None,
            };
            role.end_sleep();
            if let Some(call) = reply {
                self.answer(call);
            }
        }
    }

    fn end(&self) {
        self.has_ended.store(true, Relaxed);
        if self.reader.must_interrupt() {
            self.ring();
        }
    }
}

fn check(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(test);
}

fn spawn(app: &Arc<App>, work: impl FnOnce(&App) + 'static) -> thread::JoinHandle<()> {
    let app = app.clone();
    thread::spawn(move || work(&app))
}

#[test]
fn callers_pass_the_role_on() {
    check(3, || {
        let app = Arc::new(App::new(3));
        let others = [1, 2].map(|call| spawn(&app, move |app| app.call(call)));
        app.call(0);
        for other in others {
            other.join().unwrap();
        }
    });
}

#[test]
fn a_sleeping_leader_gives_the_role_up() {
    check(3, || {
        let app = Arc::new(App::new(0));
        let leader = spawn(&app, App::lead);
        // Nothing arrives that could wake the leader.
        let take = |app: &App| {
            let mut caller = app.reader.caller(true);
            while let Err(queued) = caller.take() {
                if queued.must_interrupt {
                    app.ring();
                }
                park();
            }
        };
        let other = spawn(&app, take);
        take(&app);
        other.join().unwrap();
        app.end();
        leader.join().unwrap();
    });
}

#[test]
fn the_leader_reads_for_callers_and_ends() {
    check(2, || {
        let app = Arc::new(App::new(2));
        let leader = spawn(&app, App::lead);
        let other = spawn(&app, |app| app.call(1));
        app.call(0);
        other.join().unwrap();
        app.end();
        leader.join().unwrap();
    });
}

#[test]
fn a_caller_that_gives_up_keeps_the_role_from_nobody() {
    check(3, || {
        let app = Arc::new(App::new(2));
        let patient = spawn(&app, |app| app.call(1));
        // Its time is over at once, whether or not it was woken for the role.
        let hasty = spawn(&app, |app| {
            let _ = app.reader.caller(true).take();
        });
        app.call(0);
        patient.join().unwrap();
        hasty.join().unwrap();
    });
}
