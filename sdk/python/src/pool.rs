//! Threads for the plain functions that an app on an event loop serves: the loop's own thread must
//! not run them, because they may block.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::handlers::{Begun, Line};
use crate::op::lock;

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    /// At most as many as calls that the server lets be under way, and emits that the client lets
    /// wait.
    queue: Line<Begun>,
    threads: usize,
    idle: usize,
    is_stopped: bool,
}

/// The threads of one app, which are started when they are needed.
pub(crate) struct Pool {
    state: Mutex<State>,
    wake: Condvar,
    threads_max: usize,
}

impl Pool {
    pub(crate) fn new(threads_max: usize) -> Arc<Pool> {
        Arc::new(Pool {
            state: Mutex::default(),
            wake: Condvar::new(),
            threads_max: threads_max.max(1),
        })
    }

    /// Runs the plain function of `call` on a thread. A call that no thread can take is dropped.
    pub(crate) fn run(self: &Arc<Self>, call: Begun) {
        let mut state = lock(&self.state);
        if state.is_stopped {
            return;
        }
        state.queue.push(call);
        if state.queue.len() <= state.idle {
            drop(state);
            self.wake.notify_one();
            return;
        }
        if state.threads == self.threads_max {
            return;
        }
        state.threads += 1;
        drop(state);
        let pool = self.clone();
        let thread = std::thread::Builder::new().name("latzero".into());
        if thread.spawn(move || pool.work()).is_err() {
            let mut state = lock(&self.state);
            state.threads -= 1;
            if state.threads == 0 {
                let calls = std::mem::take(&mut state.queue);
                drop(state);
                drop(calls);
            }
        }
    }

    /// Ends the threads, after what they run now.
    pub(crate) fn stop(&self) {
        let calls = {
            let mut state = lock(&self.state);
            state.is_stopped = true;
            std::mem::take(&mut state.queue)
        };
        self.wake.notify_all();
        drop(calls);
    }

    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(call) = state.queue.pop() {
                drop(state);
                // What panics fails its own call only: its place is dropped.
                let _ = catch_unwind(AssertUnwindSafe(|| call.run()));
                state = lock(&self.state);
                continue;
            }
            if state.is_stopped {
                break;
            }
            state.idle += 1;
            let waited = self.wake.wait_timeout(state, IDLE);
            let (woken, time) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if time.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}
