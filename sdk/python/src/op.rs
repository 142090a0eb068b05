//! Operations that take time. The blocking API waits for them, and the asyncio API awaits them.
//!
//! With asyncio a [`Loop`] polls the operations on the event loop's own thread. A waker queues the
//! operation that becomes ready, and a byte on a socket wakes the event loop once for all of them.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use latzero::{App, Error};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::app::{PyApp, check_process, seconds};
use crate::errors::{exception, wait_any};
use crate::gil::detach;
use crate::handlers::Incoming;

/// Converts a result to a Python object.
type Make = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
type Running = Pin<Box<dyn Future<Output = Result<Make, Error>> + Send>>;

/// An operation that has not been started yet.
#[pyclass(frozen, module = "latzero._latzero")]
pub(crate) struct Op {
    /// The app whose connection the waiting thread reads.
    app: Option<App>,
    state: Mutex<State>,
}

enum State {
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
            state: Mutex::new(State::Running(Box::pin(running))),
        }
    }

    /// An operation that makes the app. Only an event loop can run it.
    pub(crate) fn connecting(
        future: impl Future<Output = Result<PyApp, Error>> + Send + 'static,
    ) -> Op {
        Op::new(None, future, |py, app| app.into_py_any(py))
    }

    fn take(&self) -> PyResult<State> {
        match std::mem::replace(&mut *lock(&self.state), State::Taken) {
            State::Taken => Err(PyRuntimeError::new_err(
                "it is waited for already, or its result was taken",
            )),
            state => Ok(state),
        }
    }
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

/// The operations that were woken since the event loop last checked.
#[derive(Default)]
struct Ready {
    tokens: Vec<u64>,
    incoming: Vec<Incoming>,
    is_signalled: bool,
}

/// How other threads wake the event loop.
pub(crate) struct Mailbox {
    ready: Mutex<Ready>,
    bell: UnixStream,
}

impl Mailbox {
    fn push(&self, add: impl FnOnce(&mut Ready)) {
        let mut ready = lock(&self.ready);
        add(&mut ready);
        if std::mem::replace(&mut ready.is_signalled, true) {
            return;
        }
        drop(ready);
        // A full socket means that the loop has been woken.
        let _ = (&self.bell).write(&[1]);
    }

    pub(crate) fn push_incoming(&self, incoming: Incoming) {
        self.push(|ready| ready.incoming.push(incoming));
    }
}

/// Wakes one operation.
struct Bell {
    mailbox: Arc<Mailbox>,
    token: u64,
    is_queued: AtomicBool,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::AcqRel) {
            self.mailbox.push(|ready| ready.tokens.push(self.token));
        }
    }
}

/// An operation in progress, with the asyncio future that waits for it.
struct Task {
    running: Running,
    future: Py<PyAny>,
    bell: Arc<Bell>,
    waker: Waker,
}

/// The operations of an event loop. Its methods are called on the loop's thread.
#[pyclass(frozen, module = "latzero._latzero")]
pub(crate) struct Loop {
    pub(crate) mailbox: Arc<Mailbox>,
    inbox: UnixStream,
    tasks: Mutex<HashMap<u64, Task>>,
    next: AtomicU64,
}

impl Loop {
    /// Polls a task; keeps it if it is not done.
    fn poll(&self, py: Python<'_>, token: u64, mut task: Task) -> PyResult<()> {
        task.bell.is_queued.store(false, Ordering::Release);
        let polled = detach(py, || {
            task.running
                .as_mut()
                .poll(&mut Context::from_waker(&task.waker))
        });
        let Poll::Ready(result) = polled else {
            lock(&self.tasks).insert(token, task);
            return Ok(());
        };
        let future = task.future.bind(py);
        if future.call_method0("done")?.is_truthy()? {
            return Ok(());
        }
        match finish(py, result) {
            Ok(object) => future.call_method1("set_result", (object,))?,
            Err(error) => future.call_method1("set_exception", (error.value(py),))?,
        };
        Ok(())
    }
}

#[pymethods]
impl Loop {
    #[new]
    fn new() -> PyResult<Loop> {
        let (bell, inbox) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        inbox.set_nonblocking(true)?;
        Ok(Loop {
            mailbox: Arc::new(Mailbox {
                ready: Mutex::default(),
                bell,
            }),
            inbox,
            tasks: Mutex::default(),
            next: AtomicU64::new(1),
        })
    }

    /// Readable when `turn` has something to do.
    fn fileno(&self) -> i32 {
        self.inbox.as_raw_fd()
    }

    /// Starts an operation, whose result is set on `future`; returns its number, for `cancel`.
    fn start(&self, py: Python<'_>, op: &Op, future: Py<PyAny>) -> PyResult<u64> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let bell = Arc::new(Bell {
            mailbox: self.mailbox.clone(),
            token,
            is_queued: AtomicBool::new(false),
        });
        op.app
            .as_ref()
            .map_or(Ok(()), |app| check_process(py, app))?;
        let running = match op.take()? {
            State::Running(running) => running,
            State::Ready(result) => Box::pin(std::future::ready(result)),
            State::Taken => return Ok(token),
        };
        let task = Task {
            running,
            future,
            waker: Waker::from(bell.clone()),
            bell,
        };
        self.poll(py, token, task)?;
        Ok(token)
    }

    /// Ends an operation early, if it is in progress.
    fn cancel(&self, py: Python<'_>, token: u64) {
        let task = lock(&self.tasks).remove(&token);
        if let Some(Task { running, .. }) = task {
            detach(py, || drop(running));
        }
    }

    /// Completes the operations that are ready, and passes new requests to `begin`.
    fn turn(&self, py: Python<'_>, begin: &Bound<'_, PyAny>) -> PyResult<()> {
        // Before the queue is read: later entries signal again.
        let _ = (&self.inbox).read(&mut [0; 64]);
        let (tokens, incoming) = {
            let mut ready = lock(&self.mailbox.ready);
            ready.is_signalled = false;
            (
                std::mem::take(&mut ready.tokens),
                std::mem::take(&mut ready.incoming),
            )
        };
        for token in tokens {
            let task = lock(&self.tasks).remove(&token);
            if let Some(task) = task {
                self.poll(py, token, task)?;
            }
        }
        for incoming in incoming {
            incoming.begin(py, begin)?;
        }
        Ok(())
    }

    /// Drops all operations.
    fn close(&self, py: Python<'_>) {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        let incoming = std::mem::take(&mut lock(&self.mailbox.ready).incoming);
        let running: Vec<_> = tasks.into_values().map(|task| task.running).collect();
        detach(py, || drop((running, incoming)));
    }
}
