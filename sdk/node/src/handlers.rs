//! Requests on their way to JavaScript functions.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Wake, Waker};

use latzero::{Data, HandlerError, Request, Unanswered};
use serde_json::{Value, json};

use crate::mailbox::{Mailbox, News};

/// Emits that a handler may have waiting or be at. Beyond them the newest are dropped and counted:
/// nobody limits those who send them.
const EMITS_MAX: u64 = 1024;

/// What the emits of one trigger have in common.
#[derive(Default)]
pub(crate) struct Emits {
    open: AtomicU64,
    lost: AtomicU64,
}

/// One emit of those that are open.
struct Open(Arc<Emits>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

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
    /// Emits that were dropped just before this one.
    lost: u64,
    _open: Option<Open>,
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
            self.lost,
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
pub(crate) fn hand_over(
    unanswered: Unanswered,
    trigger: u32,
    mailbox: &Arc<Mailbox>,
    emits: &Arc<Emits>,
) {
    let (mut lost, mut open) = (0, None);
    if unanswered.request().is_emit() {
        let before = emits.open.fetch_add(1, Ordering::AcqRel);
        open = Some(Open(emits.clone()));
        if before >= EMITS_MAX {
            emits.lost.fetch_add(1, Ordering::AcqRel);
            return;
        }
        lost = emits.lost.swap(0, Ordering::AcqRel);
    }
    let number = mailbox.number();
    let cancelling = Arc::new(Cancelling {
        number,
        mailbox: mailbox.clone(),
    });
    unanswered.on_cancel(&Waker::from(cancelling));
    let active = Box::new(Active {
        unanswered,
        trigger,
        lost,
        _open: open,
    });
    mailbox.push(News::Request(Incoming::Begin(number, active)));
}
