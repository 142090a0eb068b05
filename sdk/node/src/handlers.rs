//! Requests on their way to JavaScript functions.

use std::sync::Arc;
use std::task::{Wake, Waker};

use latzero::{Data, HandlerError, Request, Unanswered};
use serde_json::{Value, json};

use crate::mailbox::{Mailbox, News};

/// News of a request.
pub(crate) enum Incoming {
    /// The request of this number is to be answered.
    Begin(u64, Box<Active>),
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

/// Tells JavaScript that a request was cancelled.
struct Cancelling {
    number: u64,
    mailbox: Arc<Mailbox>,
}

impl Wake for Cancelling {
    fn wake(self: Arc<Self>) {
        let cancel = Incoming::Cancel(self.number);
        self.mailbox.push(News::Request(cancel));
    }
}

/// Gives a request to JavaScript.
pub(crate) fn hand_over(unanswered: Unanswered, trigger: u32, mailbox: &Arc<Mailbox>) {
    let number = mailbox.number();
    let cancelling = Arc::new(Cancelling {
        number,
        mailbox: mailbox.clone(),
    });
    unanswered.on_cancel(&Waker::from(cancelling));
    let active = Box::new(Active {
        unanswered,
        trigger,
    });
    mailbox.push(News::Request(Incoming::Begin(number, active)));
}
