//! Python functions as handlers: on threads that the client runs, and as tasks of an event loop.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use latzero::{Data, HandlerError, Request};
use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyTuple};

use crate::app::headers_dict;
use crate::block::PyBlock;
use crate::codec::{self, Lender};
use crate::errors::{self, exception, handler_error};
use crate::gil::{attach, call, detach};
use crate::op::{Mailbox, Op, done, lock};

/// The state that the requests of one trigger share.
pub(crate) struct Trigger {
    /// Called with the request and the payload.
    pub(crate) handler: Py<PyAny>,
    /// A weak reference to the Python app.
    pub(crate) owner: Py<PyAny>,
    pub(crate) tracebacks: bool,
}

/// Runs a plain function on the thread that took the request.
pub(crate) fn answer(request: Request, trigger: &Trigger) -> Result<Data, HandlerError> {
    let request = Arc::new(request);
    let run = |py: Python<'_>| -> PyResult<Data> {
        let (incoming, data) = arrive(py, request.clone(), trigger, Face::Blocking)?;
        let arguments = (incoming, data).into_pyobject(py)?;
        let result = call(trigger.handler.bind(py), arguments)?;
        let Ok(items) = result.cast::<PyIterator>() else {
            return codec::write(&result);
        };
        stream_items(items, &request)
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
    let data: Data = request
        .data()
        .map_err(|e: HandlerError| errors::bad_request(py, e.message()))?;
    let lender = Lender {
        request: &request,
        face,
    };
    let data = codec::read_lent(py, &data, &lender)?;
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
                return codec::write(&e.value(py).getattr("value")?);
            }
            Err(e) => return Err(e),
        };
        let sent = if item.is_instance(&progress)? {
            let report = codec::write(&item.getattr("value")?)?;
            detach(py, || {
                app.run(None, &mut Box::pin(request.progress(&report)))
            })
        } else {
            let item = codec::write(&item)?;
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
    #[getter]
    fn name(&self) -> &str {
        self.request.name()
    }

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

    #[getter]
    fn headers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        headers_dict(py, self.request.headers())
    }

    #[getter]
    fn key(&self) -> Option<String> {
        self.request.key()
    }

    #[getter]
    fn attempt(&self) -> u32 {
        self.request.attempt()
    }

    /// How many seconds are left, or `None` for an emit.
    #[getter]
    fn time_left(&self) -> Option<f64> {
        self.request.time_left().map(|time| time.as_secs_f64())
    }

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
    fn block<'py>(&self, py: Python<'py>, id: &str) -> PyResult<Bound<'py, PyAny>> {
        let block = self.request.block(id).map_err(|e| exception(py, &e))?;
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
        let (request, item) = (slf.into_super().request.clone(), codec::write(item)?);
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

/// Where a task leaves its answer for the client.
#[derive(Default)]
struct Slot {
    result: Option<Result<Data, HandlerError>>,
    waker: Option<Waker>,
    task: Option<Py<PyAny>>,
}

/// The client's half: ready once the task has answered. Dropping it earlier cancels the task.
pub(crate) struct Answering {
    slot: Arc<Mutex<Slot>>,
    mailbox: Arc<Mailbox>,
    is_over: bool,
}

impl Future for Answering {
    type Output = Result<Data, HandlerError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = {
            let mut slot = lock(&self.slot);
            if slot.result.is_none() {
                slot.waker = Some(cx.waker().clone());
            }
            slot.result.take()
        };
        match result {
            Some(result) => {
                self.is_over = true;
                Poll::Ready(result)
            }
            None => Poll::Pending,
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if !self.is_over {
            self.mailbox.push_incoming(Incoming::Cancel(Unanswered {
                slot: self.slot.clone(),
            }));
        }
    }
}

/// The event loop's half of a request that has no answer yet.
pub(crate) struct Unanswered {
    slot: Arc<Mutex<Slot>>,
}

/// An event about a request, for an event loop.
pub(crate) enum Incoming {
    /// A new request.
    Begin {
        request: Request,
        trigger: Arc<Trigger>,
        slot: Unanswered,
    },
    /// The caller no longer wants the answer.
    Cancel(Unanswered),
}

/// Passes a request to an event loop.
pub(crate) fn hand_over(
    request: Request,
    trigger: Arc<Trigger>,
    mailbox: Arc<Mailbox>,
) -> Answering {
    let slot = Arc::new(Mutex::new(Slot::default()));
    mailbox.push_incoming(Incoming::Begin {
        request,
        trigger,
        slot: Unanswered { slot: slot.clone() },
    });
    Answering {
        slot,
        mailbox,
        is_over: false,
    }
}

impl Incoming {
    /// Begins or cancels the task. `begin` makes the task of a handler, a request, its payload and
    /// the place for the answer.
    pub(crate) fn begin(self, py: Python<'_>, begin: &Bound<'_, PyAny>) -> PyResult<()> {
        let (request, trigger, slot) = match self {
            Incoming::Begin {
                request,
                trigger,
                slot,
            } => (request, trigger, slot.slot),
            Incoming::Cancel(unanswered) => {
                let task = lock(&unanswered.slot).task.take();
                if let Some(task) = task {
                    task.call_method0(py, "cancel")?;
                }
                return Ok(());
            }
        };
        let place = PyAnswer {
            slot: slot.clone(),
            tracebacks: trigger.tracebacks,
        };
        let arrived = arrive(py, Arc::new(request), &trigger, Face::Asyncio);
        let (request, data) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                place.end(Err(handler_error(py, &error, trigger.tracebacks)));
                return Ok(());
            }
        };
        let place = Bound::new(py, place)?;
        let task = begin.call1((trigger.handler.bind(py), request, data, place))?;
        let mut slot = lock(&slot);
        if slot.result.is_none() {
            slot.task = Some(task.unbind());
        }
        Ok(())
    }
}

/// Where a task leaves its answer.
#[pyclass(name = "Answer", frozen, module = "latzero._latzero")]
pub(crate) struct PyAnswer {
    slot: Arc<Mutex<Slot>>,
    tracebacks: bool,
}

impl PyAnswer {
    fn end(&self, result: Result<Data, HandlerError>) {
        let waker = {
            let mut slot = lock(&self.slot);
            slot.task = None;
            slot.result = Some(result);
            slot.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[pymethods]
impl PyAnswer {
    /// Answers.
    fn send(&self, py: Python<'_>, result: &Bound<'_, PyAny>) {
        match codec::write(result) {
            Ok(data) => self.end(Ok(data)),
            Err(error) => self.end(Err(handler_error(py, &error, self.tracebacks))),
        }
    }

    /// Answers with what the handler raised.
    fn fail(&self, py: Python<'_>, raised: Bound<'_, PyAny>) {
        let error = PyErr::from_value(raised);
        self.end(Err(handler_error(py, &error, self.tracebacks)));
    }
}

impl Drop for PyAnswer {
    fn drop(&mut self) {
        // A task that never ran, or was cancelled by its own side.
        let is_open = {
            let slot = lock(&self.slot);
            slot.result.is_none()
        };
        if is_open {
            self.end(Err(HandlerError::new(
                "handler_error",
                "the handler was cancelled before it answered",
            )));
        }
    }
}
