//! How the JavaScript thread learns what became ready: it is queued, and other threads wake it once
//! for all of it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use napi::bindgen_prelude::Function;
use napi::threadsafe_function::{ThreadsafeFunction, ThreadsafeFunctionCallMode};
use napi::{Result, Status};

use crate::handlers::Incoming;

/// It does not keep the process alive: what is pending does, and JavaScript counts that.
type Bell = ThreadsafeFunction<(), (), (), Status, false, true>;

pub(crate) fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// News for the JavaScript thread.
pub(crate) enum News {
    /// The operation of this number may continue.
    Ready(u64),
    /// Something about a request.
    Request(Incoming),
}

impl News {
    /// Whether it is a request that was cancelled.
    fn is_void(&self) -> bool {
        matches!(self, News::Request(Incoming::Begin(_, arriving)) if arriving.is_empty())
    }
}

/// A queue shorter than this is not swept.
const SWEPT_MIN: usize = 1024;

#[derive(Default)]
struct Queue {
    news: VecDeque<News>,
    /// How many there were after the last sweep.
    swept: usize,
    is_signalled: bool,
    is_closed: bool,
}

/// What became ready since the JavaScript thread last looked.
pub(crate) struct Mailbox {
    queue: Mutex<Queue>,
    bell: Bell,
    requests: AtomicU64,
}

impl Mailbox {
    pub(crate) fn new(wake: &Function<'_, (), ()>) -> Result<Mailbox> {
        let bell = wake
            .build_threadsafe_function::<()>()
            .weak::<true>()
            .build()?;
        Ok(Mailbox {
            queue: Mutex::default(),
            bell,
            requests: AtomicU64::new(1),
        })
    }

    pub(crate) fn push(&self, news: News) {
        let is_signalled = {
            let mut queue = lock(&self.queue);
            if queue.is_closed {
                drop(queue);
                drop(news);
                return;
            }
            queue.news.push_back(news);
            // The places of cancelled requests would fill a queue that nobody looks into.
            if queue.news.len() > 2 * queue.swept.max(SWEPT_MIN) {
                queue.news.retain(|news| !news.is_void());
                queue.swept = queue.news.len();
            }
            std::mem::replace(&mut queue.is_signalled, true)
        };
        if !is_signalled {
            // It fails when the environment ends: then nobody looks any more.
            let _ = self.bell.call((), ThreadsafeFunctionCallMode::NonBlocking);
        }
    }

    /// Makes JavaScript look, though there may be no news.
    pub(crate) fn ring(&self) {
        let was_signalled = std::mem::replace(&mut lock(&self.queue).is_signalled, true);
        if !was_signalled {
            let _ = self.bell.call((), ThreadsafeFunctionCallMode::NonBlocking);
        }
    }

    /// From here on news wakes nobody, since the JavaScript thread looks at the end of its turn.
    /// Whether it was woken before.
    pub(crate) fn begin_turn(&self) -> bool {
        std::mem::replace(&mut lock(&self.queue).is_signalled, true)
    }

    /// The turn ends: whether there is news, which is to be taken now.
    pub(crate) fn end_turn(&self, was_signalled: bool) -> bool {
        let mut queue = lock(&self.queue);
        if queue.news.is_empty() {
            queue.is_signalled = was_signalled;
        }
        !queue.news.is_empty()
    }

    /// Takes all news. What comes after that wakes again.
    pub(crate) fn take(&self) -> VecDeque<News> {
        let mut queue = lock(&self.queue);
        queue.is_signalled = false;
        queue.swept = 0;
        std::mem::take(&mut queue.news)
    }

    /// Drops all news, now and from now on: a request that stayed here would keep its app.
    pub(crate) fn close(&self) {
        let news = {
            let mut queue = lock(&self.queue);
            queue.is_closed = true;
            std::mem::take(&mut queue.news)
        };
        drop(news);
    }

    /// A number for a request.
    pub(crate) fn number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }
}

/// Wakes one operation.
pub(crate) struct Waker {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) token: u64,
    pub(crate) is_queued: AtomicBool,
}

impl Wake for Waker {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.mailbox.push(News::Ready(self.token));
        }
    }
}
