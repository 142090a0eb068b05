//! Python functions as handlers: on threads that the client runs, and as tasks of an event loop.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};

use latzero::{Data, HandlerError, Request, Unanswered};
use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyIterator, PyTuple, PyType};

use crate::app::headers_dict;
use crate::block::PyBlock;
use crate::codec::{self, Given};
use crate::errors::{exception, handler_error, refusal};
use crate::event_loop::{Loop, Mailbox};
use crate::gil::{attach, call, detach};
use crate::op::{Op, done, lock};

/// The state that the requests of one trigger share.
pub(crate) struct Trigger {
    /// Called with the request and the payload.
    pub(crate) handler: Py<PyAny>,
    /// A weak reference to the Python app.
    pub(crate) owner: Py<PyAny>,
    pub(crate) tracebacks: bool,
    /// Whether it is an `async` function, which runs as a task.
    pub(crate) is_async: bool,
}

/// Runs a plain function on the thread that took the request.
pub(crate) fn answer(request: Arc<Request>, trigger: &Trigger) -> Result<Data, HandlerError> {
    let run = |py: Python<'_>| -> PyResult<Data> {
        let (incoming, data) = arrive(py, request.clone(), trigger, Face::Blocking)?;
        let arguments = (incoming, data).into_pyobject(py)?;
        let result = call(trigger.handler.bind(py), arguments)?;
        match result.cast::<PyIterator>() {
            Ok(items) if is_generator(&result)? => stream_items(items, &request),
            _ => codec::write_answer(&result),
        }
    };
    let ended = || HandlerError::new("handler_error", "the handler's process is ending");
    attach(|py| run(py).map_err(|e| handler_error(py, &e, trigger.tracebacks)))
        .unwrap_or_else(|| Err(ended()))
}

/// The API of the objects of a request: blocking or asyncio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Face {
    Blocking,
    Asyncio,
}

/// The request and its payload as Python objects.
fn arrive<'py>(
    py: Python<'py>,
    request: Arc<Request>,
    trigger: &Trigger,
    face: Face,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let data = codec::read_request(py, &request, face).map_err(|e| refusal(py, e))?;
    let object = PyRequest {
        request: request.clone(),
        owner: trigger.owner.clone_ref(py),
        face,
    };
    let object = match face {
        Face::Blocking => Bound::new(py, object)?.into_any(),
        Face::Asyncio => {
            let whole = PyClassInitializer::from(object).add_subclass(PyAioRequest);
            Bound::new(py, whole)?.into_any()
        }
    };
    Ok((object, data))
}

/// Whether it is a generator: other iterators are not streams.
fn is_generator(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    object.is_instance(CLASS.import(object.py(), "types", "GeneratorType")?)
}

/// Streams what a generator yields; its return value is the final answer.
fn stream_items(items: &Bound<'_, PyIterator>, request: &Request) -> PyResult<Data> {
    let py = items.py();
    let progress = py.import("latzero._app")?.getattr("Progress")?;
    let app = latzero::blocking::App::from(request.app());
    let next = items.getattr("__next__")?;
    loop {
        let item = match call(&next, PyTuple::empty(py)) {
            Ok(item) => item,
            Err(e) if e.is_instance_of::<PyStopIteration>(py) => {
                return codec::write_answer(&e.value(py).getattr("value")?);
            }
            Err(e) => return Err(e),
        };
        let sent = if item.is_instance(&progress)? {
            let report = codec::write(&item.getattr("value")?)?;
            detach(py, || {
                app.run(None, &mut Box::pin(request.progress(&report)))
            })
        } else {
            let item = codec::write_answer(&item)?;
            detach(py, || app.run(None, &mut Box::pin(request.partial(&item))))
        };
        // Without an interrupt it waits until it is sent or cancelled.
        if let Some(Err(error)) = sent {
            if items.hasattr("close")? {
                items.call_method0("close")?;
            }
            return Err(exception(py, &error));
        }
    }
}

/// A call as its handler sees it.
#[pyclass(name = "Request", frozen, subclass, module = "latzero")]
pub(crate) struct PyRequest {
    request: Arc<Request>,
    owner: Py<PyAny>,
    face: Face,
}

impl PyRequest {
    fn reporting(&self, report: &Bound<'_, PyAny>) -> PyResult<Op> {
        let (request, report) = (self.request.clone(), codec::write(report)?);
        Ok(done(&self.request.app(), async move {
            request.progress(&report).await
        }))
    }
}

#[pymethods]
impl PyRequest {
    /// The name of the trigger.
    #[getter]
    fn name(&self) -> &str {
        self.request.name()
    }

    /// The pool of the trigger.
    #[getter]
    fn pool(&self) -> &str {
        self.request.pool()
    }

    /// The caller: its AppID and instance.
    #[getter]
    fn origin(&self) -> (String, String) {
        let origin = self.request.origin();
        (origin.app_id, origin.instance)
    }

    /// The headers of the call: strings.
    #[getter]
    fn headers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        headers_dict(py, self.request.headers())
    }

    /// The caller's `key`.
    #[getter]
    fn key(&self) -> Option<String> {
        self.request.key()
    }

    /// Whether nobody waits for an answer.
    #[getter]
    fn is_emit(&self) -> bool {
        self.request.is_emit()
    }

    /// The number of this attempt at the call. More than 1 means that a handler may have run before
    /// and died, or that the server was restarted in between.
    #[getter]
    fn attempt(&self) -> u32 {
        self.request.attempt()
    }

    /// How many emits were dropped just before this one.
    #[getter]
    fn lost(&self) -> u64 {
        self.request.lost()
    }

    /// How many seconds are left, or `None` for an emit.
    #[getter]
    fn time_left(&self) -> Option<f64> {
        self.request.time_left().map(|time| time.as_secs_f64())
    }

    /// Whether the caller no longer wants the answer.
    #[getter]
    fn cancelled(&self) -> bool {
        self.request.is_cancelled()
    }

    /// The app that serves it.
    #[getter]
    fn app<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.owner.bind(py).call0()
    }

    /// A block that was passed with the call, for use during the call.
    fn block<'py>(&self, py: Python<'py>, id: Given<&str>) -> PyResult<Bound<'py, PyAny>> {
        let block = self.request.block(id.0).map_err(|e| exception(py, &e))?;
        PyBlock::new(block).wrapped(py, self.face)
    }

    /// Reports the progress of the work.
    fn progress(&self, py: Python<'_>, report: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        self.reporting(report)?.wait(py)
    }

    fn __repr__(&self) -> String {
        let (name, pool) = (self.request.name(), self.request.pool());
        format!("<latzero.Request {pool}/{name}>")
    }
}

/// A call as its handler on an event loop sees it.
#[pyclass(name = "Request", extends = PyRequest, frozen, module = "latzero.aio")]
pub(crate) struct PyAioRequest;

#[pymethods]
impl PyAioRequest {
    /// Reports the progress of the work: awaitable.
    fn progress<'py>(
        slf: PyRef<'py, Self>,
        report: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let op = slf.into_super().reporting(report)?;
        py.import("latzero.aio")?.call_method1("_run", (op,))
    }

    /// The operation that sends one item of a streamed answer.
    fn _item(slf: PyRef<'_, Self>, item: &Bound<'_, PyAny>) -> PyResult<Op> {
        let (request, item) = (slf.into_super().request.clone(), codec::write_answer(item)?);
        Ok(done(
            &request.app(),
            async move { request.partial(&item).await },
        ))
    }

    /// The operation that reports the progress of the work.
    fn _report(slf: PyRef<'_, Self>, report: &Bound<'_, PyAny>) -> PyResult<Op> {
        slf.into_super().reporting(report)
    }
}

/// A call until its handler begins. It is dropped, with its payload, when it is cancelled.
#[derive(Default)]
struct Unbegun(Mutex<Option<Unanswered>>);

impl Unbegun {
    fn take(&self) -> Option<Unanswered> {
        lock(&self.0).take()
    }
}

impl Wake for Unbegun {
    fn wake(self: Arc<Self>) {
        drop(self.take());
    }
}

/// A call that waits for the beginning of its handler.
pub(crate) struct Begun {
    call: Arc<Unbegun>,
    trigger: Arc<Trigger>,
}

impl Drop for Begun {
    fn drop(&mut self) {
        // The call refers to its place.
        drop(self.call.take());
    }
}

impl Begun {
    pub(crate) fn new(call: Unanswered, trigger: Arc<Trigger>) -> Self {
        let (place, request) = (Arc::<Unbegun>::default(), call.request().clone());
        call.on_cancel(&Waker::from(place.clone()));
        *lock(&place.0) = Some(call);
        if request.is_cancelled() {
            // It may have been before the call was there.
            drop(place.take());
        }
        Begun {
            call: place,
            trigger,
        }
    }

    /// Runs a plain function on this thread, unless its call was cancelled: nobody waits for it.
    pub(crate) fn run(self) {
        if let Some(call) = self.call.take() {
            let request = call.request().clone();
            call.answer(answer(request, &self.trigger));
        }
    }
}

/// What waits in a [`Line`].
pub(crate) trait Waits {
    /// Whether it is no longer wanted.
    fn is_over(&self) -> bool;
}

impl Waits for Begun {
    fn is_over(&self) -> bool {
        lock(&self.call.0).is_none()
    }
}

impl Waits for Incoming {
    fn is_over(&self) -> bool {
        matches!(self, Incoming::Begin(begun) if begun.is_over())
    }
}

/// What waits for its turn, in order. What is no longer wanted is removed whenever the line has
/// doubled, so that it costs little and is not longer than twice what the server allows.
pub(crate) struct Line<T> {
    entries: VecDeque<T>,
    length_max: usize,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Line {
            entries: VecDeque::new(),
            length_max: LINE_LENGTH_MIN,
        }
    }
}

/// The length up to which a line is left as it is.
const LINE_LENGTH_MIN: usize = 64;

impl<T: Waits> Line<T> {
    pub(crate) fn push(&mut self, entry: T) {
        if self.entries.len() >= self.length_max {
            self.entries.retain(|entry| !entry.is_over());
            self.length_max = LINE_LENGTH_MIN.max(2 * self.entries.len());
        }
        self.entries.push_back(entry);
    }
}

impl<T> Line<T> {
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.entries.pop_front()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl<T> IntoIterator for Line<T> {
    type Item = T;
    type IntoIter = std::collections::vec_deque::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.entries.into_iter()
    }
}

/// Cancels the task of a handler when its caller no longer wants the answer.
struct CancelBell {
    mailbox: Arc<Mailbox>,
    task: Mutex<Option<Py<PyAny>>>,
}

impl Wake for CancelBell {
    fn wake(self: Arc<Self>) {
        if let Some(task) = lock(&self.task).take() {
            self.mailbox.push_incoming(Incoming::Cancel(task));
        }
    }
}

/// An event about a request, for an event loop.
pub(crate) enum Incoming {
    /// A new request.
    Begin(Begun),
    /// The caller no longer wants the answer of this task.
    Cancel(Py<PyAny>),
}

impl Incoming {
    /// Begins or cancels the task.
    pub(crate) fn begin(self, py: Python<'_>, on: &Loop) -> PyResult<()> {
        let begun = match self {
            Incoming::Begin(begun) => begun,
            Incoming::Cancel(task) => return on.cancel_handler(task.bind(py)),
        };
        let trigger = &begun.trigger;
        let Some(call) = begun.call.take() else {
            return Ok(());
        };
        let request = call.request().clone();
        let arrived = arrive(py, request, trigger, Face::Asyncio);
        let (request, data) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                call.answer::<Data>(Err(handler_error(py, &error, trigger.tracebacks)));
                return Ok(());
            }
        };
        let place = PyAnswer {
            call: Mutex::new(Some(call)),
            tracebacks: trigger.tracebacks,
        };
        let place = Bound::new(py, place)?;
        let task = on.begin(trigger, request, data, &place)?;
        if let Some(call) = &*lock(&place.get().call)
            && !task.is_none()
        {
            let bell = CancelBell {
                mailbox: on.mailbox.clone(),
                task: Mutex::new(Some(task.unbind())),
            };
            call.on_cancel(&Waker::from(Arc::new(bell)));
        }
        Ok(())
    }
}

/// Where a task leaves its answer.
#[pyclass(name = "Answer", frozen, module = "latzero._latzero")]
pub(crate) struct PyAnswer {
    call: Mutex<Option<Unanswered>>,
    tracebacks: bool,
}

impl PyAnswer {
    fn end(&self, result: Result<Data, HandlerError>) {
        let call = lock(&self.call).take();
        if let Some(call) = call {
            call.answer(result);
        }
    }

    /// Answers.
    pub(crate) fn send(&self, result: &Bound<'_, PyAny>) {
        match codec::write_answer(result) {
            Ok(data) => self.end(Ok(data)),
            Err(error) => self.end(Err(handler_error(result.py(), &error, self.tracebacks))),
        }
    }

    /// Answers with what the handler raised.
    pub(crate) fn fail(&self, raised: Bound<'_, PyAny>) {
        let py = raised.py();
        let error = PyErr::from_value(raised);
        self.end(Err(handler_error(py, &error, self.tracebacks)));
    }
}

impl Drop for PyAnswer {
    fn drop(&mut self) {
        // A task that never ran, or was cancelled by its own side.
        self.end(Err(HandlerError::new(
            "handler_error",
            "the handler was cancelled before it answered",
        )));
    }
}
