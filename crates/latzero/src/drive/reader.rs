//! Blocked callers. One reads if nobody else does, and resolves other calls' replies on the way: a
//! lone blocking caller pays one `recv` per call and no thread hop.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::drive::core::{Core, DriverKind};
use crate::drive::threads;
use crate::interrupt::is_over;
use crate::sync::thread_waker;
use crate::wire::input::{Input, Received};
use crate::wire::wait::{RECV_TIMEOUT, timespec};

/// How long a caller waits for a connection before it looks again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

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
        // A handler's own call does not mean that callers read: the leader takes the role back at
        // once.
        let is_turn = !nested.is_nested();
        let mut caller = self.reader.caller(is_turn);
        let mut jobs = Vec::new();
        loop {
            let mut input = match caller.take() {
                Ok(input) => input,
                Err(queued) => {
                    if queued.must_interrupt {
                        self.workers.ring();
                    }
                    self.park(deadline);
                    if let Some(result) = end_of_wait(&mut attempt, cx, deadline) {
                        return result;
                    }
                    continue;
                }
            };
            // Whoever read before may have received the reply.
            if let Poll::Ready(value) = attempt(cx) {
                return Some(value);
            }
            while input.attach(&self.outbox) {
                let received = self.receive_until(&mut input, deadline);
                self.settle(&mut input, received, &mut jobs);
                self.push_jobs(&mut jobs);
                if let Some(result) = end_of_wait(&mut attempt, cx, deadline) {
                    return result;
                }
            }
            drop(input);
            // No connection: the next one, or the end of the app, wakes this wait.
            if let Some(result) = end_of_wait(&mut attempt, cx, deadline) {
                return result;
            }
            std::thread::park_timeout(wait_time(deadline).min(RECONNECT_PAUSE));
            if let Some(result) = end_of_wait(&mut attempt, cx, deadline) {
                return result;
            }
        }
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

/// What ends a wait: the value, or nothing if it is over.
fn end_of_wait<T>(
    attempt: &mut impl FnMut(&mut Context<'_>) -> Poll<T>,
    cx: &mut Context<'_>,
    deadline: Option<Instant>,
) -> Option<Option<T>> {
    match attempt(cx) {
        Poll::Ready(value) => Some(Some(value)),
        Poll::Pending => is_over(deadline).then_some(None),
    }
}

/// How long to sleep at most before checking again.
fn wait_time(deadline: Option<Instant>) -> Duration {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    left.unwrap_or(RECV_TIMEOUT).min(RECV_TIMEOUT)
}
