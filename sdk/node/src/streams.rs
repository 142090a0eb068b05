//! What comes bit by bit: streamed answers, events, presence, answers to parked calls, changes of
//! the connection, and new versions of blocks.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, ready};

use latzero::{
    Answer, Answers, Calling, Code, Data, Emission, Events, ItemOrProgress, Parked, Presence,
    Reply, States,
};
use napi::Result;
use napi_derive::napi;
use serde_json::json;

use crate::app::NativeApp;
use crate::batch::{Outcome, Payload};
use crate::errors::{self, misuse};

/// A source that one operation at a time reads.
struct Source<T>(Rc<RefCell<State<T>>>);

enum State<T> {
    Idle(T),
    /// The operation of this number reads it.
    Taken(i64),
    Closed,
}

/// A source taken out of its place, given back when this is dropped.
struct Taken<T> {
    source: Option<T>,
    place: Rc<RefCell<State<T>>>,
}

impl<T> Drop for Taken<T> {
    fn drop(&mut self) {
        let Some(source) = self.source.take() else {
            return;
        };
        let mut place = self.place.borrow_mut();
        if matches!(*place, State::Taken(_)) {
            *place = State::Idle(source);
        }
    }
}

impl<T> Source<T> {
    fn new(source: T) -> Self {
        Source(Rc::new(RefCell::new(State::Idle(source))))
    }

    /// `None` if it was closed.
    fn take(&self, token: i64) -> Result<Option<Taken<T>>> {
        let mut place = self.0.borrow_mut();
        match std::mem::replace(&mut *place, State::Taken(token)) {
            State::Idle(source) => Ok(Some(Taken {
                source: Some(source),
                place: self.0.clone(),
            })),
            State::Taken(reader) => {
                *place = State::Taken(reader);
                Err(misuse("the next one is waited for already"))
            }
            State::Closed => {
                *place = State::Closed;
                Ok(None)
            }
        }
    }

    /// Closes it. Returns the operation that reads it, which is then to be cancelled.
    fn close(&self) -> Option<i64> {
        match self.0.replace(State::Closed) {
            State::Taken(token) => Some(token),
            State::Idle(_) | State::Closed => None,
        }
    }
}

impl<T> Taken<T> {
    fn get(&mut self) -> &mut T {
        self.source.as_mut().expect("it is released by the end")
    }
}

/// A streamed answer.
#[napi(js_name = "Stream")]
pub struct NativeStream(Source<latzero::Stream<Data>>);

impl NativeStream {
    pub(crate) fn new(stream: latzero::Stream<Data>) -> Self {
        NativeStream(Source::new(stream))
    }
}

#[napi]
impl NativeStream {
    /// The next item, report or end.
    #[napi]
    pub fn next(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let taken = self.0.take(token)?;
        Ok(app.begin(token, async move {
            let Some(mut taken) = taken else {
                return Ok(Outcome::Over);
            };
            match taken.get().next_or_progress().await.transpose()? {
                Some(ItemOrProgress::Item(item)) => Ok(Outcome::Value(Payload::Data(item), None)),
                Some(ItemOrProgress::Progress(report)) => Ok(Outcome::Progress(report)),
                None => Ok(Outcome::End(taken.get().end().cloned())),
            }
        }))
    }

    /// Cancels the call. Returns the operation that is then to be cancelled.
    #[napi]
    pub fn close(&self) -> Option<i64> {
        self.0.close()
    }
}

/// What an [`Inflow`] reads from.
enum Inner {
    Emissions(Events<Emission>),
    Presences(Events<Presence>),
    Answers(Answers),
    States(States),
    Changes(latzero::Changes),
}

impl Inner {
    async fn next(&mut self) -> Option<Outcome> {
        match self {
            Inner::Emissions(events) => events.next().await.map(of_emission),
            Inner::Presences(events) => events.next().await.map(|event| of_presence(&event)),
            Inner::Answers(answers) => answers.next().await.map(of_answer),
            Inner::States(states) => states.next().await.map(|s| Outcome::of(s.as_str())),
            Inner::Changes(changes) => changes.recv().await.map(Outcome::of),
        }
    }
}

fn of_emission(event: Emission) -> Outcome {
    let origin = event.origin();
    let headers: serde_json::Map<_, _> = event
        .headers()
        .into_iter()
        .map(|(name, value)| (name, value.into()))
        .collect();
    let meta = json!([
        event.name(),
        event.pool(),
        origin.app_id,
        origin.instance,
        headers,
        event.lost(),
    ]);
    Outcome::Value(Payload::Emission(Box::new(event)), Some(meta))
}

fn of_presence(event: &Presence) -> Outcome {
    Outcome::of(json!({
        "event": event.event(),
        "pool": event.pool(),
        "appId": event.app_id(),
        "instance": event.instance().map(|id| id.to_string()),
        "fields": event.fields(),
        "lost": event.lost(),
    }))
}

fn of_answer(answer: Answer) -> Outcome {
    let meta = json!([answer.id(), answer.pool(), answer.lost()]);
    match answer.into_reply() {
        Ok(reply) => Outcome::Value(Payload::Reply(reply), Some(meta)),
        Err(error) => Outcome::Failed(error, meta),
    }
}

/// Events of some kind, one after the other.
#[napi]
pub struct Inflow(Source<Inner>);

impl Inflow {
    pub(crate) fn emissions(source: Events<Emission>) -> Inflow {
        Inflow(Source::new(Inner::Emissions(source)))
    }

    pub(crate) fn presences(source: Events<Presence>) -> Inflow {
        Inflow(Source::new(Inner::Presences(source)))
    }

    pub(crate) fn answers(source: Answers) -> Inflow {
        Inflow(Source::new(Inner::Answers(source)))
    }

    pub(crate) fn states(source: States) -> Inflow {
        Inflow(Source::new(Inner::States(source)))
    }

    pub(crate) fn changes(source: latzero::Changes) -> Inflow {
        Inflow(Source::new(Inner::Changes(source)))
    }
}

#[napi]
impl Inflow {
    /// The next one.
    #[napi]
    pub fn next(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let taken = self.0.take(token)?;
        Ok(app.begin(token, async move {
            let Some(mut taken) = taken else {
                return Ok(Outcome::Over);
            };
            Ok(taken.get().next().await.unwrap_or(Outcome::Over))
        }))
    }

    /// Stops listening. Returns the operation that is then to be cancelled.
    #[napi]
    pub fn close(&self) -> Option<i64> {
        self.0.close()
    }
}

/// The wait for the answer of a parked call, until it ends or somebody takes it.
type Waiting = Rc<RefCell<Option<Calling<Reply>>>>;

/// A call that the server keeps until it is answered.
#[napi(js_name = "Parked")]
pub struct Parking {
    id: String,
    waiting: Waiting,
    /// The operation that waits for the answer.
    token: Rc<Cell<Option<i64>>>,
}

/// Notes that no operation waits any more, also if that one ended early.
struct EndOfWait(Rc<Cell<Option<i64>>>);

impl Drop for EndOfWait {
    fn drop(&mut self) {
        self.0.take();
    }
}

impl Parking {
    pub(crate) fn new(parked: Parked) -> Parking {
        Parking {
            id: parked.id().to_owned(),
            waiting: Rc::new(RefCell::new(Some(parked.reply()))),
            token: Rc::default(),
        }
    }
}

#[napi]
impl Parking {
    /// The call's id.
    #[napi(getter)]
    pub fn id(&self) -> String {
        self.id.clone()
    }

    /// Waits for the answer. A wait that ends early may be repeated.
    #[napi]
    pub fn answer(&self, app: &NativeApp, token: i64) -> Result<bool> {
        if self.waiting.borrow().is_none() {
            let message = format!(
                "the answer of the parked call '{}' was taken, or the call left or cancelled: \
                 keep what the first answer() gave",
                self.id
            );
            return Err(errors::refused(Code::BadMessage, &message, None));
        }
        if self.token.get().is_some() {
            return Err(misuse("its answer is waited for already"));
        }
        self.token.set(Some(token));
        let (waiting, end) = (self.waiting.clone(), EndOfWait(self.token.clone()));
        Ok(app.begin(token, async move {
            let _end = end;
            let reply = poll_fn(|cx| {
                let mut waiting = waiting.borrow_mut();
                let Some(calling) = waiting.as_mut() else {
                    // The operation is being ended.
                    return Poll::Pending;
                };
                let reply = ready!(Pin::new(calling).poll(cx));
                *waiting = None;
                Poll::Ready(reply)
            });
            Ok(Outcome::Value(Payload::Reply(reply.await?), None))
        }))
    }

    /// Leaves the call, which goes on: its answer goes to `answers`. Returns the operation
    /// that waits for it, which is then to be ended.
    #[napi]
    pub fn leave(&self) -> Option<i64> {
        drop(self.waiting.take()?);
        self.token.get()
    }

    /// Ends the call. Returns the operation that waits for it, which is then to be ended.
    #[napi]
    pub fn cancel(&self) -> Option<i64> {
        self.waiting.take()?.cancel();
        self.token.get()
    }
}
