//! What a handler does with its call: use blocks that came with it, and send items of a stream.

use std::future::poll_fn;
use std::task::{Context, Poll};

use latzero_protocol::Code;

use crate::drive::core::Leave;
use crate::drive::request::{Request, cancelled};
use crate::error::Error;
use crate::face::app::App;
use crate::face::block::{Block, Current};
use crate::payload::{self, IntoPayload, Payload};
use crate::sync::lock;
use crate::wire::message::Message;
use crate::wire::outbox::By;

impl Request {
    /// The names of the memory blocks that the caller passed.
    #[must_use]
    pub fn block_ids(&self) -> Vec<&str> {
        let lent = self.ticket.blocks.get().into_iter().flatten();
        lent.map(|lent| lent.id.as_str()).collect()
    }

    /// A memory block that the caller passed, for use during the call.
    ///
    /// # Errors
    /// `no_block` if the caller passed no such block.
    pub fn block(&self, id: &str) -> Result<Block, Error> {
        let lent = self.ticket.blocks.get().into_iter().flatten();
        let Some(lent) = lent.into_iter().find(|lent| lent.id == id) else {
            return Err(Error::new(
                Code::NoBlock,
                format!(
                    "the caller passed no block '{id}', but {:?}",
                    self.block_ids()
                ),
            ));
        };
        let mut handle = lock(&lent.handle);
        let block = handle.as_ref().and_then(|handle| handle.downcast_ref());
        if let Some(block) = block {
            return Ok(Block::clone(block));
        }
        let descriptor = lock(&lent.descriptor).take();
        let current = Current::new(
            &self.core,
            &lent.description,
            descriptor,
            self.ticket.epoch,
            (Some(self.pool()), id),
        )?;
        let block = Block::lent(&self.app(), current);
        *handle = Some(Box::new(block.clone()));
        Ok(block)
    }

    /// The app that handles this, for further calls. A handler that captured a handle of its app
    /// would keep the app alive forever; this one does not.
    #[must_use]
    pub fn app(&self) -> App {
        App::lent(&self.core)
    }

    /// Sends one item of a streamed answer, once the caller has room for it.
    ///
    /// # Errors
    /// `cancelled` if the caller has gone, `bad_message` if the item cannot be encoded.
    pub async fn partial<T: IntoPayload + ?Sized>(&self, item: &T) -> Result<(), Error> {
        self.interim(Interim::Item, payload::write(item)?).await
    }

    /// Reports the progress of the work. Reports are not items: the caller may see only the newest,
    /// and none in an encrypted pool.
    ///
    /// # Errors
    /// `cancelled` if the caller has gone, `bad_message` if the report cannot be encoded.
    pub async fn progress<T: IntoPayload + ?Sized>(&self, report: &T) -> Result<(), Error> {
        self.interim(Interim::Progress, payload::write(report)?)
            .await
    }

    async fn interim(&self, what: Interim, payload: Payload) -> Result<(), Error> {
        match self.sending(what, payload)? {
            Some(mut sending) => poll_fn(|cx| sending.poll(self, cx)).await,
            None => Ok(()),
        }
    }

    /// An item or report for the caller, unless it takes none.
    pub(crate) fn sending(
        &self,
        what: Interim,
        payload: Payload,
    ) -> Result<Option<Sending>, Error> {
        if self.ticket.is_cancelled() {
            return Err(cancelled());
        }
        let payload = match self.ticket.sealed.get() {
            None => payload,
            // An item that is sealed counts, so a caller without a stream would miss it at the end.
            Some(sealed) if what == Interim::Item && self.ticket.has_window() => {
                Payload::Bytes(sealed.seal(what.status(), &payload)?)
            }
            Some(_) => return Ok(None),
        };
        let mut message = Message::new("response");
        message.string("in_reply_to", self.ticket.id().unwrap_or(""));
        message.string("status", what.status());
        message.payload("response", payload);
        Ok(Some(Sending {
            message,
            has_credit: what == Interim::Progress,
        }))
    }
}

/// What a handler sends before its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interim {
    Item,
    Progress,
}

impl Interim {
    fn status(self) -> &'static str {
        match self {
            Interim::Item => "partial",
            Interim::Progress => "progress",
        }
    }
}

/// An item or report that is being sent.
pub(crate) struct Sending {
    message: Message,
    has_credit: bool,
}

impl Sending {
    pub(crate) fn poll(
        &mut self,
        request: &Request,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        if request.ticket.is_cancelled() {
            return Poll::Ready(Err(cancelled()));
        }
        if request.is_emit() {
            return Poll::Ready(Ok(()));
        }
        if !self.has_credit {
            std::task::ready!(request.ticket.poll_credit(cx))?;
            self.has_credit = true;
        }
        let by = By::Connection(request.ticket.epoch);
        request
            .core
            .poll_submit(&mut self.message, by, Leave::Soon, cx)
            .map(|result| result.map(|_| ()))
    }
}
