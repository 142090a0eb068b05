//! A task on the caller's tokio runtime that reads, flushes and drives handlers: a call needs no
//! other thread.
//!
//! Calls that are made in one turn of the scheduler are sent together: the first marks a flush as
//! due, and this task does it at its turn, after the tasks that were ready before it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::time::Sleep;

use crate::drive::core::{Core, TICK};
use crate::drive::handlers::HandlerJob;
use crate::wire::input::Received;
use crate::wire::link::Link;
use crate::wire::outbox::Flushed;

/// How many reads it makes in one turn before other tasks run.
const READS_MAX: usize = 16;

/// Whether the caller is on a tokio runtime.
pub(crate) fn has_runtime() -> bool {
    Handle::try_current().is_ok()
}

/// Registers a socket with the runtime's reactor.
#[allow(
    deprecated,
    reason = "its successor is unsafe because any type may claim any descriptor; a Link owns its \
    socket, and never replaces it"
)]
fn watch(link: Arc<Link>) -> std::io::Result<AsyncFd<Arc<Link>>> {
    AsyncFd::new(link)
}

/// Starts the task on the caller's runtime.
pub(crate) fn spawn(core: Arc<Core>) {
    let drive = Drive {
        core,
        socket: None,
        tick: None,
        jobs: Vec::new(),
        has_yielded: false,
        is_done: false,
    };
    Handle::current().spawn(drive);
}

struct Drive {
    core: Arc<Core>,
    socket: Option<AsyncFd<Arc<Link>>>,
    tick: Option<Pin<Box<Sleep>>>,
    jobs: Vec<HandlerJob>,
    has_yielded: bool,
    is_done: bool,
}

impl Future for Drive {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.core.signal.set_waker(cx.waker());
        if this.core.is_ended() {
            this.is_done = true;
            this.socket = None;
            return Poll::Ready(());
        }
        let mut must_flush = this.core.run_jobs(&mut this.jobs);
        must_flush |= this.read(cx);
        // A flush that is due waits one turn, so that tasks that are ready now can add to it.
        if this.core.signal.is_due() && !must_flush {
            if this.has_yielded {
                must_flush = true;
            } else {
                this.has_yielded = true;
                cx.waker().wake_by_ref();
            }
        }
        if must_flush {
            this.has_yielded = false;
            this.core.signal.flush_begins();
            this.core.outbox.flush();
        }
        this.write(cx);
        this.poll_deadlines(cx);
        Poll::Pending
    }
}

impl Drive {
    /// Reads available messages and runs their handlers; returns whether anything ran.
    fn read(&mut self, cx: &mut Context<'_>) -> bool {
        let core = self.core.clone();
        let mut has_run = false;
        for _ in 0..READS_MAX {
            let Some(mut input) = core.reader.try_take() else {
                cx.waker().wake_by_ref();
                return has_run;
            };
            if input.link.is_none() {
                self.socket = None;
                if !input.attach(&core.outbox) {
                    return has_run;
                }
            }
            let Some(link) = input.link.clone() else {
                return has_run;
            };
            let socket = match &mut self.socket {
                Some(socket) => socket,
                place => match watch(link.clone()) {
                    Ok(socket) => place.insert(socket),
                    Err(e) => {
                        core.settle(&mut input, Received::Lost(e.to_string()), &mut self.jobs);
                        continue;
                    }
                },
            };
            let received = if input.is_fresh {
                input.try_receive()
            } else {
                let Poll::Ready(ready) = socket.poll_read_ready(cx) else {
                    return has_run;
                };
                match ready {
                    Ok(mut ready) => {
                        let received = input.try_receive();
                        // A read that did not fill the buffer emptied the socket; what comes later
                        // is a new edge.
                        if matches!(
                            received,
                            Received::Nothing | Received::Bytes { short: true }
                        ) {
                            ready.clear_ready();
                        }
                        received
                    }
                    Err(e) => Received::Lost(e.to_string()),
                }
            };
            core.settle(&mut input, received, &mut self.jobs);
            drop(input);
            has_run |= core.run_jobs(&mut self.jobs);
        }
        cx.waker().wake_by_ref();
        has_run
    }

    /// Sends as much of the rest as the socket accepts.
    fn write(&mut self, cx: &mut Context<'_>) {
        let Some(socket) = &self.socket else { return };
        while self.core.outbox.is_blocked() {
            let Poll::Ready(Ok(mut ready)) = socket.poll_write_ready(cx) else {
                return;
            };
            if self.core.outbox.flush() == Flushed::Blocked {
                ready.clear_ready();
            }
        }
    }

    fn poll_deadlines(&mut self, cx: &mut Context<'_>) {
        while self.core.is_tick_armed() {
            let tick = self
                .tick
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(TICK)));
            if tick.as_mut().poll(cx).is_pending() {
                return;
            }
            self.tick = None;
            self.core.tick();
        }
        self.tick = None;
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        self.socket = None;
        if !self.is_done {
            self.core.drive_on();
        }
    }
}
