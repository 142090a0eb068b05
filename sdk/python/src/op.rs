//! Operations that take time. The blocking API waits for them, and the asyncio API awaits them,
//! while a [`Loop`](crate::event_loop::Loop) polls them.

use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use latzero::{App, Error};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::app::{PyApp, check_process, seconds};
use crate::errors::{exception, wait_any};
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
    state: Mutex<State>,
}

pub(crate) enum State {
    Running(Running),
    Ready(Result<Make, Error>),
    /// Its result was taken, or it runs elsewhere.
    Taken,
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
            state: Mutex::new(State::Running(Box::pin(running))),
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
        match std::mem::replace(&mut *lock(&self.state), State::Taken) {
            State::Taken => Err(taken()),
            state => Ok(state),
        }
    }
}

pub(crate) fn taken() -> PyErr {
    PyRuntimeError::new_err("it is waited for already, or its result was taken")
}

#[pymethods]
impl Op {
    /// Starts it without waiting; returns whether it is done.
    fn poll(&self, py: Python<'_>) -> PyResult<bool> {
        self.app
            .as_ref()
            .map_or(Ok(()), |app| check_process(py, app))?;
        Ok(detach(py, || {
            let mut state = lock(&self.state);
            if let State::Running(running) = &mut *state {
                let mut cx = Context::from_waker(Waker::noop());
                if let Poll::Ready(result) = running.as_mut().poll(&mut cx) {
                    *state = State::Ready(result);
                }
            }
            !matches!(*state, State::Running(_))
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

    /// Ends it early: a call is cancelled.
    fn drop(&self, py: Python<'_>) {
        let state = std::mem::replace(&mut *lock(&self.state), State::Taken);
        detach(py, || drop(state));
    }
}

impl Op {
    fn wait_for(&self, py: Python<'_>, deadline: Option<Instant>) -> PyResult<Option<Py<PyAny>>> {
        let app = self.app.clone();
        let app = app.ok_or_else(|| PyRuntimeError::new_err("only an event loop can run this"))?;
        check_process(py, &app)?;
        let mut running = match self.take()? {
            State::Running(running) => running,
            State::Ready(result) => return finish(py, result).map(Some),
            State::Taken => return Ok(None),
        };
        let app = latzero::blocking::App::from(app);
        let waited = wait_any(py, || app.run(deadline, &mut running))?;
        match waited {
            Some(result) => finish(py, result).map(Some),
            None => {
                *lock(&self.state) = State::Running(running);
                Ok(None)
            }
        }
    }
}

fn finish(py: Python<'_>, result: Result<Make, Error>) -> PyResult<Py<PyAny>> {
    result.map_err(|e| exception(py, &e))?(py)
}
