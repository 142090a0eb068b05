//! Requests on their way to JavaScript functions.

use std::sync::{Arc, Mutex, Weak};
use std::task::{Wake, Waker};

use latzero::{Data, HandlerError, Request, Unanswered};
use serde_json::{Value, json};

use crate::mailbox::{Mailbox, News, lock};

/// News of a request.
pub(crate) enum Incoming {
    /// The request of this number is to be answered.
    Begin(u64, Arc<Arriving>),
    /// The caller does not want the answer any more.
    Cancel(u64),
}

/// A request that JavaScript has not answered yet.
pub(crate) struct Active {
    unanswered: Unanswered,
    trigger: u32,
}

impl Active {
    pub(crate) fn request(&self) -> &Arc<Request> {
        self.unanswered.request()
    }

    /// What a handler is most likely to ask of its request.
    pub(crate) fn meta(&self) -> Value {
        let request = self.request();
        let origin = request.origin();
        json!([
            self.trigger,
            request.pool(),
            origin.app_id,
            origin.instance,
            request.is_emit(),
            request.block_ids(),
            request.lost(),
        ])
    }

    pub(crate) fn end(self, answer: Result<Data, HandlerError>) {
        self.unanswered.answer(answer);
    }
}

/// A request that JavaScript has not taken yet. Cancelled before that, it is dropped here, with its
/// payload: nobody waits for its answer, and a busy thread may not look for a long time.
pub(crate) struct Arriving(Mutex<Option<Active>>);

impl Arriving {
    /// Takes the request, unless it was cancelled.
    pub(crate) fn take(&self) -> Option<Active> {
        lock(&self.0).take()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).is_none()
    }
}

/// Drops a request that is cancelled, or tells JavaScript, which has it.
struct Cancelling {
    number: u64,
    arriving: Weak<Arriving>,
    mailbox: Arc<Mailbox>,
}

impl Wake for Cancelling {
    fn wake(self: Arc<Self>) {
        let dropped = self.arriving.upgrade().and_then(|it| it.take());
        if dropped.is_none() {
            let cancel = Incoming::Cancel(self.number);
            self.mailbox.push(News::Request(cancel));
        }
    }
}

/// Gives a request to JavaScript.
pub(crate) fn hand_over(unanswered: Unanswered, trigger: u32, mailbox: &Arc<Mailbox>) {
    let number = mailbox.number();
    let arriving = Arc::new(Arriving(Mutex::new(None)));
    let cancelling = Arc::new(Cancelling {
        number,
        arriving: Arc::downgrade(&arriving),
        mailbox: mailbox.clone(),
    });
    unanswered.on_cancel(&Waker::from(cancelling));
    let request = unanswered.request().clone();
    let active = Active {
        unanswered,
        trigger,
    };
    lock(&arriving.0).replace(active);
    if request.is_cancelled() {
        // It may have been cancelled before it was in its place.
        drop(arriving.take());
        return;
    }
    mailbox.push(News::Request(Incoming::Begin(number, arriving)));
}
