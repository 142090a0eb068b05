//! Streamed answers: items as they arrive, and never more in flight than the caller has room for.

use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use latzero_protocol::encode::append_u64;
use latzero_protocol::{Code, frame};

use crate::drive::core::Leave;
use crate::error::Error;
use crate::face::app::App;
use crate::face::outgoing::Outgoing;
use crate::payload::{self, FromPayload, Payload, Reply};
use crate::sync::lock;
use crate::wire::pending::Next;

/// A streamed answer. Its items come by [`Stream::next`] or as a [`futures_core::Stream`]; dropping
/// it cancels the call.
#[derive(Debug)]
#[must_use = "a stream's call is sent when its first item is asked for"]
pub struct Stream<R> {
    app: App,
    outgoing: Outgoing,
    window: u64,
    /// Items that were read and not yet acknowledged.
    taken: u64,
    progress: Option<Payload>,
    end: Option<Reply>,
    is_done: bool,
    deadline: Option<Instant>,
    item: PhantomData<fn() -> R>,
}

/// An element of a stream: an item or a progress report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Item(Payload),
    Progress,
}

impl<R: FromPayload> Stream<R> {
    pub(crate) fn new(app: App, outgoing: Outgoing, window: u64) -> Self {
        Stream {
            deadline: outgoing.wait_until(),
            app,
            outgoing,
            window,
            taken: 0,
            progress: None,
            end: None,
            is_done: false,
            item: PhantomData,
        }
    }

    /// The next item; `None` after the last one.
    pub async fn next(&mut self) -> Option<Result<R, Error>> {
        std::future::poll_fn(|cx| self.poll_item(Leave::Soon, cx)).await
    }

    /// The next item or report, whichever comes first; `None` after the last one.
    pub async fn next_or_progress(&mut self) -> Option<Result<ItemOrProgress<R>, Error>> {
        std::future::poll_fn(|cx| self.poll_either(Leave::Soon, cx)).await
    }

    /// The newest progress report of the handler, once; older ones are not kept.
    ///
    /// # Errors
    /// `bad_message` if it is not a `T`.
    pub fn progress<T: FromPayload>(&mut self) -> Option<Result<T, Error>> {
        self.progress.take().map(payload::read)
    }

    /// The handler's final answer, after the last item.
    #[must_use]
    pub fn end(&self) -> Option<&Reply> {
        self.end.as_ref()
    }

    fn poll_step(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Step, Error>>> {
        if self.is_done {
            return Poll::Ready(None);
        }
        let key = match std::task::ready!(self.outgoing.poll_sent(leave, cx)) {
            Ok(key) => key,
            Err(error) => {
                self.is_done = true;
                return Poll::Ready(Some(Err(error)));
            }
        };
        let next = loop {
            let next = std::task::ready!(self.app.core().poll_next(key, cx));
            // In an encrypted pool nobody but the server could have sent a report.
            if !(matches!(next, Next::Progress(_)) && self.outgoing.sealed().is_some()) {
                break next;
            }
        };
        match next {
            Next::Item(item) => {
                let opened = self
                    .outgoing
                    .sealed()
                    .map(|sealed| sealed.open("partial", &item));
                let item = match opened {
                    None => item,
                    Some(Ok(opened)) => opened.payload,
                    Some(Err(error)) => {
                        self.is_done = true;
                        return Poll::Ready(Some(Err(error)));
                    }
                };
                self.taken += 1;
                // After half a window, because an acknowledgement per item would cost a frame each.
                if self.taken * 2 >= self.window {
                    self.acknowledge();
                }
                Poll::Ready(Some(Ok(Step::Item(item))))
            }
            Next::Progress(report) => {
                self.progress = Some(report);
                Poll::Ready(Some(Ok(Step::Progress)))
            }
            Next::End(result) => {
                let result = match self.outgoing.sealed() {
                    Some(sealed) => sealed.open_reply(result),
                    None => result,
                };
                self.outgoing.done();
                self.is_done = true;
                match result {
                    Ok(reply) => {
                        self.end = Some(reply);
                        Poll::Ready(None)
                    }
                    Err(error) => Poll::Ready(Some(Err(error))),
                }
            }
        }
    }

    fn acknowledge(&mut self) {
        let count = std::mem::take(&mut self.taken);
        let Some((app, key)) = self.outgoing.sent() else {
            return;
        };
        let core = app.core();
        let Some(call) = lock(&core.pending).in_flight(key) else {
            return;
        };
        // A parked call has no items.
        let Some(epoch) = call.epoch else { return };
        core.outbox.append(epoch, |out, _| {
            frame::append(out, |out| {
                out.extend_from_slice(b"{\"action\":\"ack\",\"id\":");
                out.extend_from_slice(&call.id);
                out.extend_from_slice(b",\"count\":");
                append_u64(out, count);
                out.push(b'}');
            });
        });
        core.flush_soon();
    }

    fn poll_item(&mut self, leave: Leave, cx: &mut Context<'_>) -> Poll<Option<Result<R, Error>>> {
        loop {
            match std::task::ready!(self.poll_step(leave, cx)) {
                Some(Ok(Step::Progress)) => {}
                Some(Ok(Step::Item(item))) => return Poll::Ready(Some(payload::read(item))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
    }

    fn poll_either(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<ItemOrProgress<R>, Error>>> {
        self.poll_step(leave, cx).map(|step| {
            Some(match step? {
                Ok(Step::Item(item)) => payload::read(item).map(ItemOrProgress::Item),
                Ok(Step::Progress) => {
                    let report = self.progress.take().unwrap_or(Payload::None);
                    payload::read(report).map(ItemOrProgress::Progress)
                }
                Err(error) => Err(error),
            })
        })
    }

    fn block<T>(
        &mut self,
        mut poll: impl FnMut(&mut Self, &mut Context<'_>) -> Poll<Option<Result<T, Error>>>,
    ) -> Option<Result<T, Error>> {
        let core = self.app.core().clone();
        let deadline = self.deadline;
        match core.block_on(deadline, |cx| poll(self, cx)) {
            Some(item) => item,
            None => {
                self.is_done = true;
                Some(Err(Error::new(
                    Code::Timeout,
                    "the stream did not end in time",
                )))
            }
        }
    }

    /// Waits for the next item on this thread.
    pub(crate) fn wait_next(&mut self) -> Option<Result<R, Error>> {
        self.block(|stream, cx| stream.poll_item(Leave::Now, cx))
    }

    /// Waits for the next item or report on this thread.
    pub(crate) fn wait_either(&mut self) -> Option<Result<ItemOrProgress<R>, Error>> {
        self.block(|stream, cx| stream.poll_either(Leave::Now, cx))
    }
}

/// What a streamed call returns: items and progress reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ItemOrProgress<R> {
    /// One item.
    Item(R),
    /// One report.
    Progress(serde_json::Value),
}

impl<R: FromPayload> futures_core::Stream for Stream<R> {
    type Item = Result<R, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_item(Leave::Soon, cx)
    }
}
