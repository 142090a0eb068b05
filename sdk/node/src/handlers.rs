//! Requests on their way to JavaScript functions, and the answers on their way back.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use latzero::{Data, HandlerError, Request};
use serde_json::{Value, json};

use crate::mailbox::{Mailbox, News, lock};

/// Where an answer is left for the client.
#[derive(Default)]
struct Slot {
    result: Option<Result<Data, HandlerError>>,
    waker: Option<Waker>,
}

/// News of a request.
pub(crate) enum Incoming {
    /// The request of this number is to be answered.
    Begin(u64, Box<Active>),
    /// The caller does not want the answer any more.
    Cancel(u64),
}

/// JavaScript's half of a request. Dropped without an answer, it says so.
pub(crate) struct Active {
    pub(crate) request: Arc<Request>,
    trigger: u32,
    slot: Arc<Mutex<Slot>>,
}

impl Active {
    /// What a handler is most likely to ask of its request.
    pub(crate) fn meta(&self) -> Value {
        let (request, origin) = (&self.request, self.request.origin());
        json!([
            self.trigger,
            request.pool(),
            origin.app_id,
            origin.instance,
            request.is_emit(),
            request.block_ids(),
        ])
    }

    pub(crate) fn end(&self, result: Result<Data, HandlerError>) {
        let waker = {
            let mut slot = lock(&self.slot);
            if slot.result.is_none() {
                slot.result = Some(result);
            }
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let text = "the handler's app ended before it answered";
        self.end(Err(HandlerError::new("handler_error", text)));
    }
}

/// The client's half: ready once JavaScript has answered. Dropped before, it cancels the request.
pub(crate) struct Answering {
    number: u64,
    slot: Arc<Mutex<Slot>>,
    mailbox: Arc<Mailbox>,
    is_over: bool,
}

impl Future for Answering {
    type Output = Result<Data, HandlerError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let mut slot = lock(&self.slot);
            if slot.result.is_none() {
                slot.waker = Some(cx.waker().clone());
            }
            slot.result.take()
        };
        match result {
            Some(result) => {
                self.is_over = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if !self.is_over {
            let cancel = Incoming::Cancel(self.number);
            self.mailbox.push(News::Request(cancel));
        }
    }
}

/// Gives a request to JavaScript.
pub(crate) fn hand_over(request: Request, trigger: u32, mailbox: Arc<Mailbox>) -> Answering {
    let slot = Arc::new(Mutex::new(Slot::default()));
    let number = mailbox.number();
    let active = Active {
        request: Arc::new(request),
        trigger,
        slot: slot.clone(),
    };
    mailbox.push(News::Request(Incoming::Begin(number, Box::new(active))));
    Answering {
        number,
        slot,
        mailbox,
        is_over: false,
    }
}
