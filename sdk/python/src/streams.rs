//! Streams: streamed answers, events, presence, answers to parked calls, changes of the connection,
//! and new versions of blocks.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use latzero::{Answer, App, Data, Emission, Error, Events, Presence, Reply, State, States};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyBaseException, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::app::{check_process, headers_dict};
use crate::codec;
use crate::errors::exception;
use crate::gil::detach;
use crate::op::{Op, lock, op};

/// What items are read from. It stays here while somebody waits for the next item: others may close
/// it.
pub(crate) struct Feed<T> {
    app: App,
    place: Arc<Mutex<Place<T>>>,
}

struct Place<T> {
    /// None once it was closed.
    source: Option<T>,
    is_waited_for: bool,
    /// Wakes what waits for the next item.
    waiter: Option<Waker>,
}

/// The one operation that waits for the next item.
struct Turn<T>(Arc<Mutex<Place<T>>>);

impl<T> Drop for Turn<T> {
    fn drop(&mut self) {
        let mut place = lock(&self.0);
        place.is_waited_for = false;
        place.waiter = None;
    }
}

impl<T: Send + 'static> Feed<T> {
    pub(crate) fn new(app: &App, source: T) -> Self {
        Feed {
            app: app.clone(),
            place: Arc::new(Mutex::new(Place {
                source: Some(source),
                is_waited_for: false,
                waiter: None,
            })),
        }
    }

    /// An operation that polls the source; `read` converts what that comes to, which is `None` if
    /// the source was closed.
    pub(crate) fn next<R: Send + 'static>(
        &self,
        poll: impl Fn(&mut T, &mut Context<'_>) -> Poll<Result<R, Error>> + Send + 'static,
        read: impl FnOnce(Python<'_>, Option<R>) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> PyResult<Op> {
        if std::mem::replace(&mut lock(&self.place).is_waited_for, true) {
            let message = "another thread or task waits for it already";
            return Err(PyRuntimeError::new_err(message));
        }
        let turn = Turn(self.place.clone());
        let next = std::future::poll_fn(move |cx| {
            let place = &mut *lock(&turn.0);
            let Some(source) = &mut place.source else {
                return Poll::Ready(Ok(None));
            };
            let polled = poll(source, cx);
            if polled.is_pending() {
                place.waiter = Some(cx.waker().clone());
            }
            polled.map_ok(Some)
        });
        Ok(op(&self.app, next, read))
    }

    /// What `f` returns; `None` if the source was closed.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        lock(&self.place).source.as_mut().map(f)
    }

    /// Closes the source, also while somebody waits for its next item.
    pub(crate) fn close(&self, py: Python<'_>, end: impl FnMut(T) + Send) {
        // A forked child leaves the parent's as it is.
        if check_process(py, &self.app, true).is_err() {
            return;
        }
        detach(py, || {
            let (source, waiter) = {
                let mut place = lock(&self.place);
                (place.source.take(), place.waiter.take())
            };
            // Before the wait ends: the server is to know by then.
            source.into_iter().for_each(end);
            waiter.into_iter().for_each(Waker::wake);
        });
    }
}

fn cancelled() -> PyErr {
    PyRuntimeError::new_err("the stream was cancelled")
}

/// A streamed answer.
#[pyclass(name = "Items", frozen, module = "latzero._latzero")]
pub(crate) struct PyItems {
    feed: Feed<latzero::Stream<Data>>,
    /// Whether the call may have been sent: that happens with the first wait.
    is_begun: AtomicBool,
}

impl PyItems {
    pub(crate) fn new(app: &App, stream: latzero::Stream<Data>) -> Self {
        PyItems {
            feed: Feed::new(app, stream),
            is_begun: AtomicBool::new(false),
        }
    }
}

#[pymethods]
impl PyItems {
    /// The next item in a list of one; `None` at the end.
    fn next(&self, py: Python<'_>) -> PyResult<Op> {
        check_process(py, &self.feed.app, self.is_begun.load(Ordering::Relaxed))?;
        self.is_begun.store(true, Ordering::Relaxed);
        self.feed.next(
            // Everything that it knows is in the stream: the future need not live on.
            |stream, cx| pin!(stream.next()).poll(cx).map(Option::transpose),
            |py, item| match item.ok_or_else(cancelled)? {
                Some(item) => PyList::new(py, [codec::read(py, &item)?])?.into_py_any(py),
                None => Ok(py.None()),
            },
        )
    }

    /// The newest progress report that was not read yet, else `None`.
    #[getter]
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let report = self.feed.with(|stream| stream.progress::<Data>()).flatten();
        match report.transpose().map_err(|e| exception(py, &e))? {
            Some(report) => codec::read(py, &report).map(Some),
            None => Ok(None),
        }
    }

    /// The handler's final answer after the last item.
    #[getter]
    fn end<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let end = self.feed.with(|stream| stream.end().cloned()).flatten();
        match end.map(Reply::into::<Data>).transpose() {
            Ok(Some(end)) => codec::read(py, &end).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(exception(py, &error)),
        }
    }

    /// Cancels the call, unless it has ended.
    fn cancel(&self, py: Python<'_>) {
        if self.feed.with(|stream| stream.end().is_some()) == Some(true) {
            return;
        }
        self.feed.close(py, drop);
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
pub(crate) struct Inflow(Feed<Inner>);

macro_rules! inflow_of {
    ($($name:ident($type:ty) = $variant:ident;)*) => {
        $(pub(crate) fn $name(app: &App, source: $type) -> Inflow {
            Inflow(Feed::new(app, Inner::$variant(source)))
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
                let data = event.data::<Data>().map_err(|e| exception(py, &e));
                let (data, error) = outcome(py, data.and_then(|data| codec::read(py, &data)));
                let origin = event.origin();
                let headers = headers_dict(py, event.headers())?;
                (
                    event.name(),
                    event.pool(),
                    data,
                    error,
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
                let (reply, error) = outcome(py, read_reply(py, answer.into_reply()));
                (id, pool, reply, error, lost).into_py_any(py)
            }
            Item::State(state) => state.as_str().into_py_any(py),
            Item::Version(version) => version.into_py_any(py),
        }
    }
}

/// What was read, or else the exception: whoever uses the item raises it, and the next ones arrive.
fn outcome<T>(py: Python<'_>, read: PyResult<T>) -> (Option<T>, Option<Py<PyBaseException>>) {
    match read {
        Ok(read) => (Some(read), None),
        Err(error) => (None, Some(error.into_value(py))),
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
    /// The next item in a list of one; `None` at the end, and once it was closed.
    fn next(&self) -> PyResult<Op> {
        self.0.next(
            |source, cx| pin!(source.next()).poll(cx).map(Ok),
            |py, item| match item.flatten() {
                Some(item) => PyList::new(py, [item.read(py)?])?.into_py_any(py),
                None => Ok(py.None()),
            },
        )
    }

    /// Stops listening.
    fn close(&self, py: Python<'_>) {
        self.0.close(py, drop);
    }
}
