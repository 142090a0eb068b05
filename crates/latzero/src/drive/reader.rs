//! Reading: one role, held by one thread or task at a time.
//!
//! A caller that blocks takes the role if it is free, reads, resolves other calls' replies on the
//! way, and passes the role on when it has its own reply. So a lone blocking caller pays one `recv`
//! per call and no thread hop.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::task::{Context, Poll};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::drive::core::{Core, DriverKind};
use crate::drive::threads;
use crate::interrupt::is_over;
use crate::sync::{lock, thread_waker};
use crate::wire::input::{Input, Received};
use crate::wire::wait::{RECV_TIMEOUT, timespec};

/// The reading role and its waiters.
#[derive(Debug)]
pub(crate) struct Reader {
    input: Mutex<Input>,
    waiting: Mutex<VecDeque<Thread>>,
    waiting_count: AtomicUsize,
    /// How many times a blocked caller took the role.
    turns: AtomicU64,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Reader {
            input: Mutex::new(Input::new()),
            waiting: Mutex::default(),
            waiting_count: AtomicUsize::new(0),
            turns: AtomicU64::new(0),
        }
    }

    /// Takes the role, if it is free.
    pub(crate) fn try_take(&self) -> Option<MutexGuard<'_, Input>> {
        match self.input.try_lock() {
            Ok(input) => Some(input),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Takes the role, for a driver that does not share it.
    #[cfg(feature = "tokio")]
    pub(crate) fn take(&self) -> MutexGuard<'_, Input> {
        lock(&self.input)
    }

    /// How many times a blocked caller has taken the role so far.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Whether a blocked caller waits for the role.
    pub(crate) fn is_wanted(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting_count.load(Ordering::SeqCst) > 0
    }

    /// Lets the next waiting caller try for the role; called after releasing it.
    pub(crate) fn pass_on(&self) {
        // Pairs with the fence at the start of a wait: one of the two sees the other.
        if !self.is_wanted() {
            return;
        }
        let next = {
            let mut waiting = lock(&self.waiting);
            let next = waiting.pop_front();
            self.waiting_count.store(waiting.len(), Ordering::SeqCst);
            next
        };
        if let Some(thread) = next {
            thread.unpark();
        }
    }

    fn begin_waiting(&self) {
        let mut waiting = lock(&self.waiting);
        waiting.push_back(std::thread::current());
        self.waiting_count.store(waiting.len(), Ordering::SeqCst);
        drop(waiting);
        fence(Ordering::SeqCst);
    }

    fn end_waiting(&self) {
        let me = std::thread::current().id();
        let mut waiting = lock(&self.waiting);
        waiting.retain(|thread| thread.id() != me);
        self.waiting_count.store(waiting.len(), Ordering::SeqCst);
    }
}

impl Core {
    /// Blocks until `attempt` is ready, and reads in the meantime if nobody else does. `None` if
    /// `deadline` has passed or the wait was interrupted.
    pub(crate) fn block_on<T>(
        self: &Arc<Self>,
        deadline: Option<Instant>,
        mut attempt: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Option<T> {
        let waker = thread_waker();
        let cx = &mut Context::from_waker(&waker);
        if let Poll::Ready(value) = attempt(cx) {
            return Some(value);
        }
        if self.driver_kind() != DriverKind::Threads {
            return self.park_on(deadline, cx, attempt);
        }
        let nested = threads::Nested::enter(self);
        let mut jobs = Vec::new();
        let mut waited = false;
        let result = loop {
            let Some(mut input) = self.reader.try_take() else {
                self.reader.begin_waiting();
                waited = true;
                self.workers.interrupt();
                // Between the two, the role may have become free without anybody being notified.
                if let Some(input) = self.reader.try_take() {
                    drop(input);
                } else if let Poll::Ready(value) = attempt(cx) {
                    self.reader.end_waiting();
                    break Some(value);
                } else {
                    self.park(deadline);
                }
                self.reader.end_waiting();
                if let Poll::Ready(value) = attempt(cx) {
                    break Some(value);
                }
                if is_over(deadline) {
                    break None;
                }
                continue;
            };
            // A handler's own call does not mean that callers read: the leader takes the role back
            // at once.
            if !nested.is_nested() {
                self.reader.turns.fetch_add(1, Ordering::Relaxed);
            }
            let done = loop {
                if !input.attach(&self.outbox) {
                    break None;
                }
                let received = self.receive_until(&mut input, deadline);
                self.settle(&mut input, received, &mut jobs);
                self.push_jobs(&mut jobs);
                if let Poll::Ready(value) = attempt(cx) {
                    break Some(Some(value));
                }
                if is_over(deadline) {
                    break Some(None);
                }
            };
            drop(input);
            match done {
                Some(result) => {
                    waited = true;
                    break result;
                }
                // No connection: the next one, or the end of the app, wakes this wait.
                None => {
                    self.reader.pass_on();
                    if let Poll::Ready(value) = attempt(cx) {
                        break Some(value);
                    }
                    if is_over(deadline) {
                        break None;
                    }
                    std::thread::park_timeout(wait_time(deadline).min(Duration::from_millis(20)));
                    if let Poll::Ready(value) = attempt(cx) {
                        break Some(value);
                    }
                }
            }
        };
        drop(nested);
        // Passes on the role, whether it was held or offered.
        if waited {
            self.reader.pass_on();
        }
        result
    }

    /// Blocks beside a task that reads.
    fn park_on<T>(
        &self,
        deadline: Option<Instant>,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Option<T> {
        loop {
            std::thread::park_timeout(wait_time(deadline));
            if let Poll::Ready(value) = attempt(cx) {
                return Some(value);
            }
            if is_over(deadline) {
                return None;
            }
        }
    }

    /// Waits for another reader; sends what the socket accepts in the meantime.
    fn park(&self, deadline: Option<Instant>) {
        match self
            .outbox
            .is_blocked()
            .then(|| self.outbox.link())
            .flatten()
        {
            None => std::thread::park_timeout(wait_time(deadline)),
            Some(link) => {
                let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), PollFlags::OUT)];
                // Short, because the reader does not interrupt it.
                let _ = poll(&mut fds, Some(&timespec(Duration::from_millis(5))));
                self.outbox.flush();
            }
        }
    }

    /// Waits for bytes, for a blocked caller; sends waiting messages when the socket accepts them.
    fn receive_until(self: &Arc<Self>, input: &mut Input, deadline: Option<Instant>) -> Received {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let is_short = left.is_some_and(|left| left < RECV_TIMEOUT);
        if input.is_fresh || (!is_short && !self.outbox.is_blocked()) {
            return input.receive();
        }
        let Some(link) = input.link.clone() else {
            return Received::Nothing;
        };
        let mut wanted = PollFlags::IN;
        if self.outbox.is_blocked() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = [PollFd::from_borrowed_fd(link.as_fd(), wanted)];
        let time = timespec(left.unwrap_or(RECV_TIMEOUT).min(RECV_TIMEOUT));
        // An interrupted or failed poll counts as an early one: the read decides.
        let _ = poll(&mut fds, Some(&time));
        let ready = fds[0].revents();
        if ready.contains(PollFlags::OUT) {
            self.outbox.flush();
        }
        if ready.difference(PollFlags::OUT).is_empty() {
            return Received::Nothing;
        }
        input.try_receive()
    }
}

/// How long to sleep at most before checking again.
fn wait_time(deadline: Option<Instant>) -> Duration {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    left.unwrap_or(RECV_TIMEOUT).min(RECV_TIMEOUT)
}
