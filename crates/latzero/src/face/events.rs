//! Reading events.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use serde_json::json;

use crate::drive::events::{Emission, Lossy, Presence, Queue};
use crate::face::app::App;
use crate::sync::lock;
use crate::wire::message::Message;

/// A kind of event that a program can read.
pub(crate) trait Event: Lossy {
    /// Stops listening for `queue`.
    fn forget(app: &App, queue: &Arc<Queue<Self>>);
}

impl Event for Emission {
    fn forget(app: &App, queue: &Arc<Queue<Self>>) {
        forget_emissions(app, queue);
    }
}

impl Event for Presence {
    fn forget(app: &App, queue: &Arc<Queue<Self>>) {
        forget_presence(app, queue);
    }
}

/// Events as they arrive, until the app is closed. Dropping it stops listening.
///
/// At most 1024 wait to be read. Beyond that the newest are dropped; the next event says how many,
/// or [`Events::take_lost`] if none follows.
#[derive(Debug)]
#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
pub struct Events<T: Event> {
    pub(crate) queue: Arc<Queue<T>>,
    pub(crate) app: App,
}

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Event> Events<T> {
    /// The next event; `None` after the app was closed.
    pub async fn next(&mut self) -> Option<T> {
        std::future::poll_fn(|cx| self.queue.poll_next(cx)).await
    }

    /// Like [`futures_core::Stream::poll_next`], without the pin.
    pub fn poll_next_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.queue.poll_next(cx)
    }

    /// How many events were dropped after the last one that was read, if no other event waits that
    /// would report them. They are reported once: here, or by the next event.
    pub fn take_lost(&mut self) -> u64 {
        self.queue.take_lost()
    }

    /// The app that listens.
    #[must_use]
    pub fn app(&self) -> &App {
        &self.app
    }
}

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Event> futures_core::Stream for Events<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.queue.poll_next(cx)
    }
}

#[allow(
    private_bounds,
    reason = "the two kinds of events are this crate's own"
)]
impl<T: Event> Drop for Events<T> {
    fn drop(&mut self) {
        T::forget(&self.app, &self.queue);
    }
}

/// Ends listening to a trigger without listeners.
fn forget_emissions(app: &App, queue: &Arc<Queue<Emission>>) {
    let gone = app.core().handlers.unlisten(queue);
    if !gone.is_empty() {
        let mut message = Message::new("trigger_unregister");
        message.json("triggers", json!(gone).to_string().as_bytes());
        app.core().send_oneway(message);
        gone.iter().for_each(|name| app.renew(name));
    }
}

/// Ends watching a pool without watchers.
fn forget_presence(app: &App, queue: &Arc<Queue<Presence>>) {
    let is_other = |q: &Weak<_>| !std::ptr::eq(q.as_ptr(), Arc::as_ptr(queue));
    lock(&app.core().departures).retain(is_other);
    let mut gone = Vec::new();
    lock(&app.core().watchers).retain(|pool, queues| {
        queues.retain(|q: &Weak<_>| {
            q.strong_count() > 0 && !std::ptr::eq(q.as_ptr(), Arc::as_ptr(queue))
        });
        if queues.is_empty() {
            gone.push(pool.clone());
        }
        !queues.is_empty()
    });
    for pool in gone {
        let mut message = Message::new("unwatch");
        message.string("pool", &pool);
        app.core().send_oneway(message);
        // Another thread may have begun to watch it, with an earlier message.
        if lock(&app.core().watchers).contains_key(&pool) {
            let mut message = Message::new("watch");
            message.string("pool", &pool);
            app.core().send_oneway(message);
        }
    }
}
