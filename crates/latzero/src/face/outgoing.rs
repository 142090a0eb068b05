//! A request that is not answered yet. One type stands for it from its message to its reply; the
//! futures that programs get say what they read of it.

use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::drive::core::Leave;
use crate::error::Error;
use crate::face::app::App;
use crate::face::unsent::{Unsent, grace, too_late};
use crate::payload::{FromPayload, Reply};
use crate::sync::lock;
use crate::wire::message::Message;
use crate::wire::outbox::By;
use crate::wire::pending::{Id, Key, silence};
use crate::wire::sealed::SealedCall;

/// A request that waits to be sent, or for its reply.
#[derive(Debug)]
pub(crate) struct Outgoing(pub(super) Stage);

/// How far a request has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// It was not sent yet.
    Unsent(Box<Unsent>),
    /// It was sent: [`Pending`](crate::wire::pending::Pending) has what arrives.
    Sent(Sent),
    /// Its reply was taken, or it failed.
    Ended,
}

/// A request that was sent.
#[derive(Debug)]
pub(super) struct Sent {
    app: App,
    key: Key,
    /// When the client gives up, if the server does not.
    deadline: Instant,
    /// The id that its caller chose.
    chosen: Option<Box<str>>,
    /// The keys to open the answer, in an encrypted pool.
    sealed: Option<SealedCall>,
    at_drop: AtDrop,
}

/// What happens to a request when its owner is dropped.
#[derive(Debug, Clone, Copy)]
enum AtDrop {
    /// A cancel is sent to the server.
    Cancel,
    /// It continues, because the server has stored it.
    Leave,
}

impl Sent {
    /// The id by which a call that lasts is known.
    fn id(&self) -> Box<str> {
        self.chosen.clone().unwrap_or_else(|| {
            let life = Some(lock(&self.app.core().pending).life);
            let key = self.key;
            Id { key, life }.text()
        })
    }
}

impl Outgoing {
    pub(crate) fn of_message(app: &App, message: Message) -> Self {
        Outgoing(Stage::Unsent(Unsent::new(app, message)))
    }

    /// The app and the key of a request that was sent and has not ended.
    pub(crate) fn sent(&self) -> Option<(&App, Key)> {
        match &self.0 {
            Stage::Sent(sent) => Some((&sent.app, sent.key)),
            _ => None,
        }
    }

    /// The keys to open answers and items, in an encrypted pool.
    pub(crate) fn sealed(&self) -> Option<&SealedCall> {
        match &self.0 {
            Stage::Sent(sent) => sent.sealed.as_ref(),
            _ => None,
        }
    }

    pub(crate) fn app(&self) -> Option<&App> {
        match &self.0 {
            Stage::Unsent(unsent) => Some(&unsent.app),
            Stage::Sent(sent) => Some(&sent.app),
            Stage::Ended => None,
        }
    }

    /// When a blocked caller gives up, if neither the server nor the driver does.
    pub(crate) fn wait_until(&self) -> Option<Instant> {
        match &self.0 {
            Stage::Unsent(unsent) => Some(Instant::now() + unsent.timeout + grace(unsent.timeout)),
            Stage::Sent(sent) => Some(sent.deadline),
            Stage::Ended => None,
        }
    }

    /// Notes that the reply was taken.
    pub(crate) fn done(&mut self) {
        self.0 = Stage::Ended;
    }

    /// Sends the request, unless that is done; returns its key.
    pub(crate) fn poll_sent(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Key, Error>> {
        let unsent = match &mut self.0 {
            Stage::Sent(sent) => return Poll::Ready(Ok(sent.key)),
            Stage::Ended => panic!("polled after it ended"),
            Stage::Unsent(unsent) => unsent,
        };
        if let Some(error) = unsent.failure.take() {
            self.0 = Stage::Ended;
            return Poll::Ready(Err(error));
        }
        let now = Instant::now();
        let deadline = *unsent.deadline.get_or_insert(now + unsent.timeout);
        let given_up = deadline + grace(unsent.timeout);
        let by = By::Call {
            deadline: given_up,
            window: unsent.window,
            name: unsent.parking.name(),
        };
        let core = unsent.app.core();
        let submitted = match core.poll_submit(&mut unsent.message, by, leave, cx) {
            Poll::Ready(Ok(submitted)) => submitted,
            Poll::Ready(Err(error)) => {
                self.0 = Stage::Ended;
                return Poll::Ready(Err(error));
            }
            Poll::Pending if now < deadline => return Poll::Pending,
            Poll::Pending => {
                let error = too_late(core.is_connected());
                self.0 = Stage::Ended;
                return Poll::Ready(Err(error));
            }
        };
        if leave == Leave::Soon {
            core.arm_tick();
        }
        let key = submitted.key.expect("a call has a key");
        let Stage::Unsent(unsent) = std::mem::replace(&mut self.0, Stage::Ended) else {
            unreachable!("it was just seen");
        };
        self.0 = Stage::Sent(Sent {
            app: unsent.app,
            key,
            deadline: given_up,
            chosen: unsent.parking.id,
            sealed: unsent.sealed,
            at_drop: AtDrop::Cancel,
        });
        Poll::Ready(Ok(key))
    }

    /// Sends the request and waits for its reply.
    pub(crate) fn poll_reply(
        &mut self,
        leave: Leave,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Reply, Error>> {
        let key = match std::task::ready!(self.poll_sent(leave, cx)) {
            Ok(key) => key,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let Stage::Sent(sent) = &mut self.0 else {
            unreachable!("it was just sent")
        };
        let reply = std::task::ready!(sent.app.core().poll_reply(key, cx));
        let reply = match &sent.sealed {
            Some(sealed) => sealed.open_reply(reply),
            None => reply,
        };
        self.0 = Stage::Ended;
        Poll::Ready(reply)
    }

    /// Sends the request and waits until the server has stored it, or it is answered.
    fn poll_parked(&mut self, leave: Leave, cx: &mut Context<'_>) -> Poll<Result<Parked, Error>> {
        let key = match std::task::ready!(self.poll_sent(leave, cx)) {
            Ok(key) => key,
            Err(error) => return Poll::Ready(Err(error)),
        };
        let Stage::Sent(sent) = &mut self.0 else {
            unreachable!("it was just sent")
        };
        let core = sent.app.core();
        let parked = lock(&core.pending).poll_parked(key, cx);
        if let Err(error) = std::task::ready!(parked) {
            let error = match &sent.sealed {
                Some(sealed) => sealed.open_error(error),
                None => error,
            };
            self.0 = Stage::Ended;
            return Poll::Ready(Err(error));
        }
        // Nobody else may be watching the time.
        core.arm_tick();
        let id = sent.id();
        sent.at_drop = AtDrop::Leave;
        let outgoing = Outgoing(std::mem::replace(&mut self.0, Stage::Ended));
        Poll::Ready(Ok(Parked { outgoing, id }))
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if let Stage::Sent(sent) = &self.0 {
            let core = sent.app.core();
            match sent.at_drop {
                AtDrop::Cancel => core.forget(sent.key),
                AtDrop::Leave => core.leave(sent.key, &sent.id(), sent.sealed.as_ref()),
            }
        }
    }
}

/// A call whose answer is awaited. Dropping it cancels the call, unless it is that of a [`Parked`]:
/// [`Calling::cancel`] cancels either.
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Calling<R> {
    pub(super) outgoing: Outgoing,
    pub(super) read: fn(Reply) -> Result<R, Error>,
    pub(super) result: PhantomData<fn() -> R>,
}

impl<R> Calling<R> {
    pub(crate) fn of_message(
        app: &App,
        message: Message,
        read: fn(Reply) -> Result<R, Error>,
    ) -> Self {
        Calling {
            outgoing: Outgoing::of_message(app, message),
            read,
            result: PhantomData,
        }
    }

    /// Sets another time limit for the answer than the app's default.
    pub(crate) fn within(mut self, timeout: Duration) -> Self {
        if let Stage::Unsent(unsent) = &mut self.outgoing.0 {
            unsent.timeout = timeout;
        }
        self
    }

    /// Like the poll of its future, without the pin.
    pub(crate) fn poll_reply(&mut self, cx: &mut Context<'_>) -> Poll<Result<R, Error>> {
        let read = self.read;
        let reply = self.outgoing.poll_reply(Leave::Soon, cx);
        reply.map(|reply| reply.and_then(read))
    }

    /// Cancels the request but still waits for its answer; false if it was not sent.
    pub(crate) fn send_cancel(&self) -> bool {
        let Some((app, key)) = self.outgoing.sent() else {
            return false;
        };
        let core = app.core();
        let in_flight = lock(&core.pending).in_flight(key);
        if let Some(call) = in_flight {
            core.cancel(&call);
        }
        true
    }

    /// Cancels the call, also one that the server stores: it is removed, or cancelled at its
    /// handler. If there is no connection, the cancel is sent over the next one.
    pub fn cancel(mut self) {
        if let Stage::Sent(sent) = &mut self.outgoing.0 {
            sent.at_drop = AtDrop::Cancel;
        }
    }

    /// Waits for the answer on this thread.
    pub(crate) fn wait(mut self) -> Result<R, Error> {
        let app = self.outgoing.app().cloned().expect("it was not polled yet");
        let deadline = self.outgoing.wait_until();
        let poll = |cx: &mut Context<'_>| self.outgoing.poll_reply(Leave::Now, cx);
        match app.core().block_on(deadline, poll) {
            Some(reply) => reply.and_then(self.read),
            None => Err(silence()),
        }
    }
}

impl<R> Future for Calling<R> {
    type Output = Result<R, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_reply(cx)
    }
}

/// A call that is sent to be stored by the server. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "a call is sent when it is awaited"]
pub struct Parking(pub(super) Outgoing);

impl Parking {
    /// Waits on this thread until the call is on disk, or answered.
    pub(crate) fn wait(mut self) -> Result<Parked, Error> {
        let app = self.0.app().cloned().expect("it was not polled yet");
        let deadline = self.0.wait_until();
        app.core()
            .block_on(deadline, |cx| self.0.poll_parked(Leave::Now, cx))
            .unwrap_or_else(|| Err(silence()))
    }
}

impl Future for Parking {
    type Output = Result<Parked, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_parked(Leave::Soon, cx)
    }
}

/// A call that the server stores until it is answered, or that is already answered. The call
/// continues if this, or the wait for its answer, is dropped: its answer then goes to
/// [`App::answers`].
#[derive(Debug)]
pub struct Parked {
    outgoing: Outgoing,
    id: Box<str>,
}

impl Parked {
    /// The call's id, by which [`App::answers`] names it, in later processes of the app too.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Waits for the answer as `R`. A lost connection does not end the wait; closing the app or the
    /// call's deadline does.
    pub fn answer<R: FromPayload>(self) -> Calling<R> {
        Calling {
            outgoing: self.outgoing,
            read: Reply::into,
            result: PhantomData,
        }
    }

    /// Like [`Parked::answer`], but returns the answer as received, with its headers.
    pub fn reply(self) -> Calling<Reply> {
        Calling {
            outgoing: self.outgoing,
            read: Ok,
            result: PhantomData,
        }
    }

    /// Cancels the call; see [`Calling::cancel`].
    pub fn cancel(self) {
        self.reply().cancel();
    }
}

impl IntoFuture for Parked {
    type Output = Result<Value, Error>;
    type IntoFuture = Calling<Value>;

    fn into_future(self) -> Calling<Value> {
        self.answer()
    }
}
