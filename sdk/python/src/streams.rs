//! Streams: streamed answers, events, presence, answers to parked calls, changes of the connection,
//! and new versions of blocks.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use latzero::{Answer, App, Data, Emission, Error, Events, Presence, Reply, State, States};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::app::{check_process, headers_dict};
use crate::codec;
use crate::errors::exception;
use crate::gil::detach;
use crate::op::{Op, lock, op};

fn closed() -> PyErr {
    PyRuntimeError::new_err("it was closed, or is waited for already")
}

/// A source that one operation at a time reads.
pub(crate) struct Source<T>(Arc<Mutex<Option<T>>>);

/// A source that is in use, and is put back when this is dropped.
struct Taken<T> {
    source: Option<T>,
    place: Arc<Mutex<Option<T>>>,
}

impl<T> Drop for Taken<T> {
    fn drop(&mut self) {
        *lock(&self.place) = self.source.take();
    }
}

impl<T: Send> Source<T> {
    pub(crate) fn new(source: T) -> Self {
        Source(Arc::new(Mutex::new(Some(source))))
    }

    fn take(&self) -> PyResult<Taken<T>> {
        let source = lock(&self.0).take();
        if source.is_none() {
            return Err(closed());
        }
        Ok(Taken {
            source,
            place: self.0.clone(),
        })
    }

    fn close(&self, py: Python<'_>) {
        let source = lock(&self.0).take();
        detach(py, || drop(source));
    }
}

impl<T> Taken<T> {
    fn get(&mut self) -> &mut T {
        self.source.as_mut().expect("it is released by the end")
    }
}

/// The stream of a call. It stays here while somebody waits for its next item: others may cancel
/// the call.
struct Feed {
    /// None once the call was cancelled.
    stream: Option<latzero::Stream<Data>>,
    is_waited_for: bool,
    /// Wakes what waits for the next item.
    waiter: Option<Waker>,
}

/// The one operation that waits for the next item.
struct Turn(Arc<Mutex<Feed>>);

impl Drop for Turn {
    fn drop(&mut self) {
        let mut feed = lock(&self.0);
        feed.is_waited_for = false;
        feed.waiter = None;
    }
}

/// What a wait for the next item comes to.
enum Next {
    Item(Data),
    End,
    Cancelled,
}

impl Turn {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<Next, Error>> {
        let feed = &mut *lock(&self.0);
        let Some(stream) = &mut feed.stream else {
            return Poll::Ready(Ok(Next::Cancelled));
        };
        // Everything that it knows is in the stream: the future need not live on.
        let polled = pin!(stream.next()).poll(cx);
        if polled.is_pending() {
            feed.waiter = Some(cx.waker().clone());
        }
        polled.map(|item| Ok(item.transpose()?.map_or(Next::End, Next::Item)))
    }
}

/// A streamed answer.
#[pyclass(name = "Items", frozen, module = "latzero._latzero")]
pub(crate) struct PyItems {
    app: App,
    /// Whether the call may have been sent: that happens with the first wait.
    is_begun: AtomicBool,
    feed: Arc<Mutex<Feed>>,
}

impl PyItems {
    pub(crate) fn new(app: &App, stream: latzero::Stream<Data>) -> Self {
        PyItems {
            app: app.clone(),
            is_begun: AtomicBool::new(false),
            feed: Arc::new(Mutex::new(Feed {
                stream: Some(stream),
                is_waited_for: false,
                waiter: None,
            })),
        }
    }

    /// Refuses to go on with a stream of the parent process.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        check_process(py, &self.app, self.is_begun.load(Ordering::Relaxed))
    }

    fn with<R>(&self, f: impl FnOnce(&mut latzero::Stream<Data>) -> R) -> PyResult<R> {
        lock(&self.feed).stream.as_mut().map(f).ok_or_else(closed)
    }
}

#[pymethods]
impl PyItems {
    /// The next item in a list of one; `None` at the end.
    fn next(&self, py: Python<'_>) -> PyResult<Op> {
        self.check(py)?;
        self.is_begun.store(true, Ordering::Relaxed);
        let turn = {
            let mut feed = lock(&self.feed);
            if feed.stream.is_none() || feed.is_waited_for {
                return Err(closed());
            }
            feed.is_waited_for = true;
            Turn(self.feed.clone())
        };
        let next = std::future::poll_fn(move |cx| turn.poll(cx));
        Ok(op(&self.app, next, |py, next| match next {
            Next::Item(item) => PyList::new(py, [codec::read(py, &item)?])?.into_py_any(py),
            Next::End => Ok(py.None()),
            Next::Cancelled => Err(closed()),
        }))
    }

    /// The newest progress report that was not read yet, else `None`.
    #[getter]
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let report = self.with(|stream| stream.progress::<Data>())?;
        match report.transpose().map_err(|e| exception(py, &e))? {
            Some(report) => codec::read(py, &report).map(Some),
            None => Ok(None),
        }
    }

    /// The handler's final answer after the last item.
    #[getter]
    fn end<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let end = self.with(|stream| stream.end().cloned())?;
        match end.map(Reply::into::<Data>).transpose() {
            Ok(Some(end)) => codec::read(py, &end).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(exception(py, &error)),
        }
    }

    /// Cancels the call, also while somebody waits for its next item.
    fn cancel(&self, py: Python<'_>) {
        // A forked child leaves the parent's as it is.
        if self.check(py).is_err() {
            return;
        }
        detach(py, || {
            let (stream, waiter) = {
                let mut feed = lock(&self.feed);
                (feed.stream.take(), feed.waiter.take())
            };
            // Before the wait ends: the server is to know by then.
            drop(stream);
            waiter.into_iter().for_each(Waker::wake);
        });
    }
}

/// The source of an [`Inflow`].
enum Inner {
    Emissions(Events<Emission>),
    Presences(Events<Presence>),
    Answers(latzero::Answers),
    States(States),
    Changes(latzero::Changes),
}

/// An item of an [`Inflow`].
enum Item {
    Emission(Emission),
    Presence(Presence),
    Answer(Answer),
    State(State),
    Version(u64),
}

/// Events of some kind, one after the other.
#[pyclass(name = "Inflow", frozen, module = "latzero._latzero")]
pub(crate) struct Inflow {
    app: App,
    source: Source<Inner>,
}

macro_rules! inflow_of {
    ($($name:ident($type:ty) = $variant:ident;)*) => {
        $(pub(crate) fn $name(app: &App, source: $type) -> Inflow {
            Inflow {
                app: app.clone(),
                source: Source::new(Inner::$variant(source)),
            }
        })*
    };
}

impl Inflow {
    inflow_of! {
        emissions(Events<Emission>) = Emissions;
        presences(Events<Presence>) = Presences;
        answers(latzero::Answers) = Answers;
        states(States) = States;
        changes(latzero::Changes) = Changes;
    }
}

impl Inner {
    async fn next(&mut self) -> Option<Item> {
        match self {
            Inner::Emissions(events) => events.next().await.map(Item::Emission),
            Inner::Presences(events) => events.next().await.map(Item::Presence),
            Inner::Answers(answers) => answers.next().await.map(Item::Answer),
            Inner::States(states) => states.next().await.map(Item::State),
            Inner::Changes(changes) => changes.recv().await.map(Item::Version),
        }
    }
}

impl Item {
    /// Its fields, in the form that the Python class takes.
    fn read(self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self {
            Item::Emission(event) => {
                let data: Data = event.data().map_err(|e| exception(py, &e))?;
                let origin = event.origin();
                let headers = headers_dict(py, event.headers())?;
                (
                    event.name(),
                    event.pool(),
                    codec::read(py, &data)?,
                    (&origin.app_id, &origin.instance),
                    headers,
                    event.lost(),
                )
                    .into_py_any(py)
            }
            Item::Presence(event) => {
                let fields = serde_json::Value::Object(event.fields().clone()).to_string();
                (
                    event.event(),
                    event.pool(),
                    event.app_id(),
                    event.instance().map(|id| id.to_string()),
                    codec::read_json(py, &fields)?,
                    event.lost(),
                )
                    .into_py_any(py)
            }
            Item::Answer(answer) => {
                let (id, lost) = (answer.id().to_owned(), answer.lost());
                let pool = answer.pool().map(str::to_owned);
                match read_reply(py, answer.into_reply()) {
                    Ok(reply) => (id, pool, reply, py.None(), lost).into_py_any(py),
                    Err(error) => (id, pool, py.None(), error.value(py), lost).into_py_any(py),
                }
            }
            Item::State(state) => state.as_str().into_py_any(py),
            Item::Version(version) => version.into_py_any(py),
        }
    }
}

fn read_reply(py: Python<'_>, reply: Result<Reply, Error>) -> PyResult<Py<PyAny>> {
    let reply = reply.map_err(|e| exception(py, &e))?;
    let headers = headers_dict(py, reply.headers())?;
    let data: Data = reply.into().map_err(|e| exception(py, &e))?;
    (codec::read(py, &data)?, headers).into_py_any(py)
}

#[pymethods]
impl Inflow {
    /// The next item in a list of one; `None` at the end.
    fn next(&self) -> PyResult<Op> {
        let mut source = self.source.take()?;
        let next = async move { Ok::<_, Error>(source.get().next().await) };
        Ok(op(&self.app, next, |py, item| match item {
            Some(item) => PyList::new(py, [item.read(py)?])?.into_py_any(py),
            None => Ok(py.None()),
        }))
    }

    /// Stops listening.
    fn close(&self, py: Python<'_>) {
        self.source.close(py);
    }
}
