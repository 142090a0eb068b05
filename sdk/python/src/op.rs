//! Operations that take time. The blocking API waits for them, and the asyncio API awaits them,
//! while a [`Loop`](crate::event_loop::Loop) polls them.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use latzero::{App, Code, Error};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::app::{PyApp, check_process, seconds};
use crate::errors::{exception, raised, wait_any};
use crate::gil::detach;

/// Converts a result to a Python object.
pub(crate) type Make = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
pub(crate) type Running = Pin<Box<dyn Future<Output = Result<Make, Error>> + Send>>;

/// An operation that has not been started yet.
#[pyclass(frozen, module = "latzero._latzero")]
pub(crate) struct Op {
    /// The app whose connection the waiting thread reads.
    pub(crate) app: Option<App>,
    /// Whether polling it takes so little time that the GIL is kept.
    pub(crate) is_short: bool,
    /// Whether something of it may have been sent.
    is_begun: AtomicBool,
    place: Mutex<Place>,
}

pub(crate) enum State {
    Running(Running),
    Ready(Result<Make, Error>),
    /// Its result was taken, or it runs elsewhere.
    Taken,
    /// It was ended early.
    Dropped,
}

/// Where an operation stays while a thread waits for it: others may end it.
struct Place {
    state: State,
    is_waited_for: bool,
    /// Wakes the thread that waits.
    waiter: Option<Waker>,
}

pub(crate) fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `future` as an operation; `read` converts its result to a Python object.
pub(crate) fn op<T: Send + 'static>(
    app: &App,
    future: impl Future<Output = Result<T, Error>> + Send + 'static,
    read: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
) -> Op {
    Op::new(Some(app.clone()), future, read)
}

/// Like [`op`], for an operation without a result.
pub(crate) fn done(
    app: &App,
    future: impl Future<Output = Result<(), Error>> + Send + 'static,
) -> Op {
    op(app, future, |py, ()| Ok(py.None()))
}

/// Like [`op`], for a result that is already a Python object.
pub(crate) fn plain<T>(
    app: &App,
    future: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Op
where
    T: Send + 'static + for<'py> IntoPyObjectExt<'py>,
{
    op(app, future, |py, value| value.into_py_any(py))
}

impl Op {
    fn new<T: Send + 'static>(
        app: Option<App>,
        future: impl Future<Output = Result<T, Error>> + Send + 'static,
        read: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Op {
        let running = async move {
            let value = future.await?;
            let make: Make = Box::new(move |py| read(py, value));
            Ok(make)
        };
        Op {
            app,
            is_short: false,
            is_begun: AtomicBool::new(false),
            place: Mutex::new(Place {
                state: State::Running(Box::pin(running)),
                is_waited_for: false,
                waiter: None,
            }),
        }
    }

    /// An operation that makes the app. Only an event loop can run it.
    pub(crate) fn connecting(
        future: impl Future<Output = Result<PyApp, Error>> + Send + 'static,
    ) -> Op {
        Op::new(None, future, |py, app| app.into_py_any(py))
    }

    /// It only sends a message and takes its answer.
    pub(crate) fn short(mut self) -> Self {
        self.is_short = true;
        self
    }

    pub(crate) fn take(&self) -> PyResult<State> {
        self.is_begun.store(true, Ordering::Relaxed);
        let mut place = lock(&self.place);
        match &place.state {
            State::Running(_) | State::Ready(_) if !place.is_waited_for => {
                Ok(std::mem::replace(&mut place.state, State::Taken))
            }
            _ => Err(taken()),
        }
    }

    /// Refuses to go on with what belongs to the parent process.
    pub(crate) fn check(&self, py: Python<'_>) -> PyResult<()> {
        let is_begun = self.is_begun.load(Ordering::Relaxed);
        self.app
            .as_ref()
            .map_or(Ok(()), |app| check_process(py, app, is_begun))
    }
}

pub(crate) fn taken() -> PyErr {
    PyRuntimeError::new_err("it is waited for already, or its result was taken")
}

#[pymethods]
impl Op {
    /// Starts it without waiting; returns whether it is done.
    fn poll(&self, py: Python<'_>) -> PyResult<bool> {
        self.check(py)?;
        self.is_begun.store(true, Ordering::Relaxed);
        Ok(detach(py, || {
            let place = &mut *lock(&self.place);
            if let State::Running(running) = &mut place.state {
                // The last waker counts: a thread that waits must still be woken.
                let waker = place.waiter.as_ref().unwrap_or(Waker::noop());
                let polled = running.as_mut().poll(&mut Context::from_waker(waker));
                if let Poll::Ready(result) = polled {
                    place.state = State::Ready(result);
                    place.waiter.take().into_iter().for_each(Waker::wake);
                }
            }
            !matches!(place.state, State::Running(_))
        }))
    }

    /// Waits on this thread.
    pub(crate) fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match self.wait_for(py, None)? {
            Some(result) => Ok(result),
            None => Err(PyRuntimeError::new_err("the wait was interrupted")),
        }
    }

    /// Waits on this thread for at most this many seconds; returns the result in a list of one, or
    /// `None` if it is not done.
    fn wait_within(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<(Py<PyAny>,)>> {
        let deadline = Instant::now().checked_add(seconds(timeout)?);
        Ok(self.wait_for(py, deadline)?.map(|result| (result,)))
    }

    /// Ends it early, also while a thread waits for it: a call is cancelled. Returns whether it did
    /// that: what is done stays.
    fn drop(&self, py: Python<'_>) -> PyResult<bool> {
        // A forked child leaves the parent's as it is.
        if self.check(py).is_err() || self.poll(py)? {
            return Ok(false);
        }
        detach(py, || self.end());
        Ok(true)
    }
}

/// The wait of one thread for an operation.
struct Wait<'a>(&'a Op);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut place = lock(&self.0.place);
        place.is_waited_for = false;
        place.waiter = None;
    }
}

impl Wait<'_> {
    /// The result; `None` if another thread ended the operation.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Make, Error>>> {
        let place = &mut *lock(&self.0.place);
        if let State::Running(running) = &mut place.state {
            match running.as_mut().poll(cx) {
                Poll::Ready(result) => place.state = State::Ready(result),
                Poll::Pending => {
                    place.waiter = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
        if !matches!(place.state, State::Ready(_)) {
            return Poll::Ready(None);
        }
        match std::mem::replace(&mut place.state, State::Taken) {
            State::Ready(result) => Poll::Ready(Some(result)),
            _ => Poll::Ready(None),
        }
    }
}

impl Op {
    fn end(&self) {
        let mut place = lock(&self.place);
        if matches!(place.state, State::Taken) {
            return;
        }
        let state = std::mem::replace(&mut place.state, State::Dropped);
        let waiter = place.waiter.take();
        drop(place);
        // Before the waiting thread goes on: the server is to know by then.
        drop(state);
        waiter.into_iter().for_each(Waker::wake);
    }

    fn begin_wait(&self, py: Python<'_>) -> PyResult<Wait<'_>> {
        let mut place = lock(&self.place);
        match place.state {
            State::Running(_) | State::Ready(_) if !place.is_waited_for => {
                place.is_waited_for = true;
                Ok(Wait(self))
            }
            State::Dropped => Err(cancelled(py)),
            _ => Err(taken()),
        }
    }

    fn wait_for(&self, py: Python<'_>, deadline: Option<Instant>) -> PyResult<Option<Py<PyAny>>> {
        let app = self.app.clone();
        let app = app.ok_or_else(|| PyRuntimeError::new_err("only an event loop can run this"))?;
        self.check(py)?;
        self.is_begun.store(true, Ordering::Relaxed);
        let wait = self.begin_wait(py)?;
        let app = latzero::blocking::App::from(app);
        let waited = wait_any(py, || {
            app.run(deadline, &mut std::future::poll_fn(|cx| wait.poll(cx)))
        });
        drop(wait);
        match waited {
            Ok(Some(Some(result))) => finish(py, result).map(Some),
            Ok(Some(None)) => Err(cancelled(py)),
            Ok(None) => Ok(None),
            Err(error) => {
                // A signal ended the wait, and with it the call.
                detach(py, || self.end());
                Err(error)
            }
        }
    }
}

pub(crate) fn cancelled(py: Python<'_>) -> PyErr {
    raised(
        py,
        Code::Cancelled,
        "the call was cancelled",
        Some("unknown"),
    )
}

fn finish(py: Python<'_>, result: Result<Make, Error>) -> PyResult<Py<PyAny>> {
    result.map_err(|e| exception(py, &e))?(py)
}
