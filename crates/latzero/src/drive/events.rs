//! Emits of other apps and the events of pools, as bounded queues.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::task::{Context, Poll, Waker};

use latzero_protocol::InstanceId;
use serde_json::{Map, Value};

use crate::drive::request::{Origin, Request};
use crate::error::Error;
use crate::payload::{self, FromPayload, Payload};
use crate::sync::{lock, set_waker};

/// How many events wait to be read. Beyond that the newest are dropped and counted.
pub(crate) const EVENTS_MAX: usize = 1024;

/// An item that records how many were lost before it.
pub(crate) trait Lossy: Sized {
    fn add_lost(&mut self, lost: u64);
}

/// An emit that arrived.
#[derive(Debug, Clone)]
pub struct Emission {
    pub(crate) name: Box<str>,
    pub(crate) pool: Box<str>,
    pub(crate) origin: Origin,
    pub(crate) headers: Option<Box<str>>,
    pub(crate) payload: Payload,
    pub(crate) lost: u64,
}

impl Emission {
    pub(crate) fn from_request(request: &Request, lost: u64) -> Self {
        Emission {
            name: request.name().into(),
            pool: request.pool().into(),
            origin: request.origin(),
            headers: request.headers_json().map(Into::into),
            payload: request.payload(),
            lost,
        }
    }

    /// The trigger's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// The sender, as confirmed by the server.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The headers.
    #[must_use]
    pub fn headers(&self) -> Vec<(String, String)> {
        payload::read_headers(self.headers.as_deref())
    }

    /// The payload as `T`.
    ///
    /// # Errors
    /// `bad_message` if it is not a `T`.
    pub fn data<T: FromPayload>(&self) -> Result<T, Error> {
        payload::peek(&self.payload)
    }

    /// The payload's JSON text, if it is JSON.
    #[must_use]
    pub fn json(&self) -> Option<&str> {
        self.payload.json()
    }

    /// How many emits were dropped just before this one, because the reader was too slow.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl Lossy for Emission {
    fn add_lost(&mut self, lost: u64) {
        self.lost += lost;
    }
}

/// An event of a pool: apps that join and leave, triggers and blocks that change.
#[derive(Debug, Clone)]
pub struct Presence {
    pub(crate) event: String,
    pub(crate) pool: Option<String>,
    pub(crate) lost: u64,
    pub(crate) fields: Map<String, Value>,
}

impl Presence {
    /// What happened: `app_online`, `app_offline`, `trigger_added`, `draining`, …
    #[must_use]
    pub fn event(&self) -> &str {
        &self.event
    }

    /// The pool; `None` for an event of the whole server.
    #[must_use]
    pub fn pool(&self) -> Option<&str> {
        self.pool.as_deref()
    }

    /// The app that it is about.
    #[must_use]
    pub fn app_id(&self) -> Option<&str> {
        self.fields.get("app_id").and_then(Value::as_str)
    }

    /// The instance that it is about.
    #[must_use]
    pub fn instance(&self) -> Option<InstanceId> {
        self.fields
            .get("instance")
            .and_then(Value::as_str)
            .and_then(InstanceId::parse)
    }

    /// The whole message.
    #[must_use]
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// How many events were dropped just before this one, because the reader was too slow.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

impl Lossy for Presence {
    fn add_lost(&mut self, lost: u64) {
        self.lost += lost;
    }
}

/// An item was dropped, because nobody read those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// A bounded queue with one reader.
#[derive(Debug)]
pub(crate) struct Queue<T>(Mutex<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    items: VecDeque<T>,
    lost: u64,
    is_closed: bool,
    waker: Option<Waker>,
}

impl<T: Lossy> Queue<T> {
    pub(crate) fn new() -> Self {
        Queue(Mutex::new(Inner {
            items: VecDeque::new(),
            lost: 0,
            is_closed: false,
            waker: None,
        }))
    }

    /// Adds an item, or counts it as lost if the queue is full. Returns who waits for it.
    pub(crate) fn push(&self, mut item: T) -> Result<Option<Waker>, Full> {
        let mut inner = lock(&self.0);
        if inner.items.len() >= EVENTS_MAX {
            inner.lost += 1;
            return Err(Full);
        }
        item.add_lost(std::mem::take(&mut inner.lost));
        inner.items.push_back(item);
        Ok(inner.waker.take())
    }

    /// Losses that no item reports, once all items were read.
    pub(crate) fn take_lost(&self) -> u64 {
        let mut inner = lock(&self.0);
        match inner.items.is_empty() {
            true => std::mem::take(&mut inner.lost),
            false => 0,
        }
    }

    pub(crate) fn close(&self) {
        let waker = {
            let mut inner = lock(&self.0);
            inner.is_closed = true;
            inner.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut inner = lock(&self.0);
        if let Some(item) = inner.items.pop_front() {
            return Poll::Ready(Some(item));
        }
        if inner.is_closed {
            return Poll::Ready(None);
        }
        set_waker(&mut inner.waker, cx.waker());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Lossy for (u32, u64) {
        fn add_lost(&mut self, lost: u64) {
            self.1 += lost;
        }
    }

    #[test]
    fn a_full_queue_counts_what_it_drops() {
        let queue = Queue::new();
        for n in 0..EVENTS_MAX as u32 + 3 {
            let full = (n as usize >= EVENTS_MAX).then_some(Full);
            assert_eq!(queue.push((n, 0)).err(), full);
        }
        let cx = &mut Context::from_waker(Waker::noop());
        assert_eq!(queue.poll_next(cx), Poll::Ready(Some((0, 0))));
        assert!(queue.push((7, 0)).is_ok());
        queue.close();
        let mut last = None;
        while let Poll::Ready(Some(item)) = queue.poll_next(cx) {
            last = Some(item);
        }
        assert_eq!(last, Some((7, 3)));
    }
}
