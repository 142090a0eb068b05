//! The private half of the Python package `latzero`: connections, calls, handlers and events. The
//! documented face is `python/latzero`.

mod codec;
mod errors;

use std::sync::Mutex;
use std::time::Duration;

use latzero::blocking::{App, Call, Events, Request, Stream};
use latzero::{Data, Emission, HandlerError, Strategy};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyIterator, PyList, PyString};

use crate::errors::{exception, handler_error, wait, wait_any};

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|e| PyValueError::new_err(format!("timeout: {e}")))
}

/// A connection.
#[pyclass(name = "App", frozen, module = "latzero._latzero")]
struct PyApp {
    app: App,
    tracebacks: bool,
}

/// Connects.
#[pyfunction]
fn connect(py: Python<'_>, url: &str, options: &Bound<'_, PyDict>) -> PyResult<PyApp> {
    let flag = |name: &str| codec::take(options, name)?.extract::<bool>();
    let time = |name: &str| seconds(codec::take(options, name)?.extract()?);
    let pools: Vec<String> = codec::take(options, "pools")?.extract()?;
    let mut builder = latzero::App::builder(url)
        .exclusive(flag("exclusive")?)
        .takeover(flag("takeover")?)
        .rehydrate(flag("rehydrate")?)
        .transient(flag("transient")?)
        .pools(pools)
        .handler_threads(codec::take(options, "handler_threads")?.extract()?)
        .connect_timeout(time("connect_timeout")?)
        .call_timeout(time("call_timeout")?)
        .reconnect(latzero::Reconnect {
            enabled: flag("reconnect")?,
            ..latzero::Reconnect::default()
        });
    let meta = codec::take(options, "meta")?;
    if !meta.is_none() {
        let json = codec::write_json(&meta)?;
        let meta = serde_json::from_str(json.get());
        builder = builder.meta(meta.map_err(|e| errors::bad_request(py, &e.to_string()))?);
    }
    let app = wait(py, || App::connect_with(builder))?;
    Ok(PyApp {
        app,
        tracebacks: flag("tracebacks")?,
    })
}

/// Sets what calls and emits have in common.
macro_rules! address {
    ($sending:ident, $options:ident) => {
        if let Some(to) = text($options, "to")? {
            $sending = $sending.to(&to);
        }
        if let Some(pool) = text($options, "pool")? {
            $sending = $sending.pool(&pool);
        }
        if let Some(key) = text($options, "key")? {
            $sending = $sending.key(&key);
        }
        if let Some(headers) = $options.get_item("headers")?
            && !headers.is_none()
        {
            for (name, value) in headers.cast::<PyDict>()?.iter() {
                let (name, value): (String, String) = (name.extract()?, value.extract()?);
                $sending = $sending.header(&name, &value);
            }
        }
    };
}

fn text(options: &Bound<'_, PyDict>, name: &str) -> PyResult<Option<String>> {
    match options.get_item(name)? {
        Some(value) => value.extract(),
        None => Ok(None),
    }
}

impl PyApp {
    fn calling(
        &self,
        name: &str,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Call> {
        let mut call = self.app.call(name, &codec::write(data)?);
        address!(call, options);
        if let Some(timeout) = options.get_item("timeout")?
            && !timeout.is_none()
        {
            call = call.timeout(seconds(timeout.extract()?)?);
        }
        if let Some(key) = text(options, "idempotency_key")? {
            call = call.idempotency_key(&key);
        }
        if let Some(redeliver) = options.get_item("redeliver")?
            && redeliver.is_truthy()?
        {
            call = call.redeliver();
        }
        Ok(call)
    }
}

fn headers_dict<'py>(
    py: Python<'py>,
    headers: Vec<(String, String)>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in headers {
        dict.set_item(name, value)?;
    }
    Ok(dict)
}

#[pymethods]
impl PyApp {
    #[getter]
    fn app_id(&self) -> &str {
        self.app.app_id()
    }

    #[getter]
    fn instance(&self) -> Option<String> {
        self.app.instance().map(|id| id.to_string())
    }

    #[getter]
    fn joined(&self) -> Vec<String> {
        self.app.joined()
    }

    #[getter]
    fn is_connected(&self) -> bool {
        self.app.is_connected()
    }

    #[getter]
    fn is_stored(&self) -> bool {
        self.app.is_stored()
    }

    fn call<'py>(
        &self,
        name: &Bound<'py, PyString>,
        data: &Bound<'py, PyAny>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = name.py();
        let call = self.calling(name.to_str()?, data, options)?;
        let answer = wait(py, || call.send::<Data>())?;
        codec::read(py, &answer)
    }

    fn reply<'py>(
        &self,
        name: &Bound<'py, PyString>,
        data: &Bound<'py, PyAny>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyDict>)> {
        let py = name.py();
        let call = self.calling(name.to_str()?, data, options)?;
        let reply = wait(py, || call.reply())?;
        let headers = headers_dict(py, reply.headers())?;
        let data: Data = reply.into().map_err(|e| exception(py, &e))?;
        Ok((codec::read(py, &data)?, headers))
    }

    fn stream(
        &self,
        name: &str,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        window: u64,
    ) -> PyResult<PyStream> {
        let call = self.calling(name, data, options)?.window(window);
        Ok(PyStream(Mutex::new(Some(call.stream()))))
    }

    fn emit(
        &self,
        py: Python<'_>,
        name: &str,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        one: bool,
        count: bool,
    ) -> PyResult<Option<u64>> {
        let mut emit = self.app.emit(name, &codec::write(data)?);
        address!(emit, options);
        if one {
            emit = emit.one();
        }
        wait(py, || match count {
            true => emit.counted().map(Some),
            false => emit.send().map(|()| None),
        })
    }

    /// Serves `name`: `handler` is called with each request.
    fn serve(
        &self,
        name: &Bound<'_, PyString>,
        handler: Py<PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<()> {
        let py = name.py();
        let strategy: String = codec::take(options, "strategy")?.extract()?;
        let strategy = Strategy::parse(&strategy)
            .ok_or_else(|| PyValueError::new_err(format!("no such strategy: {strategy:?}")))?;
        let mut serving = self.app.handler(name.to_str()?).strategy(strategy);
        let concurrency: Option<u32> = codec::take(options, "concurrency")?.extract()?;
        if let Some(concurrency) = concurrency {
            serving = serving.concurrency(concurrency);
        }
        if let Some(doc) = text(options, "doc")? {
            serving = serving.doc(&doc);
        }
        let pools: Option<Vec<String>> = codec::take(options, "pools")?.extract()?;
        if let Some(pools) = pools {
            serving = serving.pools(pools);
        }
        let tracebacks = self.tracebacks;
        let run = move |request| answer(request, &handler, tracebacks);
        wait(py, || serving.serve(run))
    }

    fn unserve(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        wait(py, || self.app.unserve(name))
    }

    fn events(&self, py: Python<'_>, name: &str) -> PyResult<PyEvents> {
        let events = wait(py, || self.app.on(name))?;
        Ok(PyEvents(Mutex::new(Some(events))))
    }

    fn join(&self, py: Python<'_>, pool: &str) -> PyResult<()> {
        wait(py, || self.app.join(pool))
    }

    fn leave(&self, py: Python<'_>, pool: &str) -> PyResult<()> {
        wait(py, || self.app.leave(pool))
    }

    fn request<'py>(
        &self,
        py: Python<'py>,
        message: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let json = codec::write_json(message)?;
        let message = serde_json::from_str(json.get());
        let message = message.map_err(|e| errors::bad_request(py, &e.to_string()))?;
        let answer = wait(py, || self.app.request(&message))?;
        codec::read_json(py, &answer.to_string())
    }

    fn ping(&self, py: Python<'_>) -> PyResult<f64> {
        wait(py, || self.app.ping()).map(|time| time.as_secs_f64())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        wait(py, || self.app.close())
    }
}

/// Runs a Python handler on the thread that took the request.
fn answer(request: Request, handler: &Py<PyAny>, tracebacks: bool) -> Result<Data, HandlerError> {
    let run = |py: Python<'_>| -> PyResult<Data> {
        let data: Data = request
            .data()
            .map_err(|e: HandlerError| errors::bad_request(py, e.message()))?;
        let data = codec::read(py, &data)?;
        let request = Bound::new(py, PyRequest { request })?;
        let result = handler.bind(py).call1((&request, data))?;
        let Ok(items) = result.cast::<PyIterator>() else {
            return codec::write(&result);
        };
        stream_items(items, request.get())
    };
    let ended = || HandlerError::new("handler_error", "the handler's process is ending");
    Python::try_attach(|py| run(py).map_err(|e| handler_error(py, &e, tracebacks)))
        .unwrap_or_else(|| Err(ended()))
}

/// Streams what a generator yields; what it returned is the end.
fn stream_items(items: &Bound<'_, PyIterator>, request: &PyRequest) -> PyResult<Data> {
    let py = items.py();
    let progress = py.import("latzero._app")?.getattr("Progress")?;
    loop {
        let item = match items.call_method0("__next__") {
            Ok(item) => item,
            Err(e) if e.is_instance_of::<pyo3::exceptions::PyStopIteration>(py) => {
                return codec::write(&e.value(py).getattr("value")?);
            }
            Err(e) => return Err(e),
        };
        let sent = if item.is_instance(&progress)? {
            let report = codec::write(&item.getattr("value")?)?;
            py.detach(|| request.request.progress(&report))
        } else {
            let item = codec::write(&item)?;
            py.detach(|| request.request.partial(&item))
        };
        if let Err(error) = sent {
            if items.hasattr("close")? {
                items.call_method0("close")?;
            }
            return Err(exception(py, &error));
        }
    }
}

/// A call as its handler sees it.
#[pyclass(name = "Request", frozen, module = "latzero")]
struct PyRequest {
    request: Request,
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

    /// Who calls: the AppID and the instance.
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

    /// Seconds that are left, or `None` for an emit.
    #[getter]
    fn time_left(&self) -> Option<f64> {
        self.request.time_left().map(|time| time.as_secs_f64())
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.request.is_cancelled()
    }

    /// Reports how far the work is.
    fn progress(&self, py: Python<'_>, report: &Bound<'_, PyAny>) -> PyResult<()> {
        let report = codec::write(report)?;
        py.detach(|| self.request.progress(&report))
            .map_err(|e| exception(py, &e))
    }

    fn __repr__(&self) -> String {
        let (name, pool) = (self.request.name(), self.request.pool());
        format!("<latzero.Request {pool}/{name}>")
    }
}

/// Items of a streamed answer.
#[pyclass(name = "Stream", frozen, module = "latzero")]
struct PyStream(Mutex<Option<Stream<Data>>>);

impl PyStream {
    /// The stream, for one thread at a time.
    fn take(&self) -> PyResult<Stream<Data>> {
        let stream = self.0.lock().ok().and_then(|mut stream| stream.take());
        stream.ok_or_else(|| {
            PyRuntimeError::new_err("the stream was cancelled, or another thread waits for it")
        })
    }

    fn put(&self, stream: Stream<Data>) {
        if let Ok(mut place) = self.0.lock() {
            *place = Some(stream);
        }
    }
}

#[pymethods]
impl PyStream {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut stream = self.take()?;
        let item = wait_any(py, || stream.next());
        // Interrupted: leaving drops the stream, which cancels the call.
        let item = item?;
        self.put(stream);
        match item {
            None => Ok(None),
            Some(Ok(item)) => codec::read(py, &item).map(Some),
            Some(Err(error)) => Err(exception(py, &error)),
        }
    }

    /// The newest report of the handler that was not read yet, else `None`.
    #[getter]
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut stream = self.take()?;
        let report = stream.progress::<Data>();
        self.put(stream);
        match report.transpose().map_err(|e| exception(py, &e))? {
            Some(report) => codec::read(py, &report).map(Some),
            None => Ok(None),
        }
    }

    /// What the handler answered behind the last item.
    #[getter]
    fn end<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let stream = self.take()?;
        let end = stream.end().cloned();
        self.put(stream);
        match end.map(latzero::Reply::into::<Data>).transpose() {
            Ok(Some(end)) => codec::read(py, &end).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(exception(py, &error)),
        }
    }

    /// Cancels the call.
    fn cancel(&self, py: Python<'_>) {
        let stream = self.0.lock().ok().and_then(|mut stream| stream.take());
        py.detach(|| drop(stream));
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, pyo3::types::PyTuple>) {
        self.cancel(py);
    }
}

/// Emits of one trigger.
#[pyclass(name = "Events", frozen, module = "latzero")]
struct PyEvents(Mutex<Option<Events<Emission>>>);

#[pymethods]
impl PyEvents {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// The next one as (name, pool, data, app, instance, headers, lost).
    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        let taken = self.0.lock().ok().and_then(|mut events| events.take());
        let mut events = taken.ok_or_else(|| {
            PyRuntimeError::new_err("the events were closed, or another thread waits for them")
        })?;
        let event = wait_any(py, || events.recv());
        if let Ok(mut place) = self.0.lock() {
            *place = Some(events);
        }
        let Some(event) = event? else { return Ok(None) };
        let data: Data = event.data().map_err(|e| exception(py, &e))?;
        let all = PyList::empty(py);
        all.append(event.name())?;
        all.append(event.pool())?;
        all.append(codec::read(py, &data)?)?;
        all.append(&event.origin().app_id)?;
        all.append(&event.origin().instance)?;
        all.append(headers_dict(py, event.headers())?)?;
        all.append(event.lost())?;
        Ok(Some(all))
    }

    /// Stops listening.
    fn close(&self, py: Python<'_>) {
        let events = self.0.lock().ok().and_then(|mut events| events.take());
        py.detach(|| drop(events));
    }
}

/// Every code of the protocol with the class of its exception.
#[pyfunction]
fn families() -> Vec<(&'static str, &'static str)> {
    let codes = latzero::Code::ALL.iter();
    codes
        .map(|&code| (code.as_str(), errors::family(code)))
        .collect()
}

/// The private half of `latzero`; it has no stable interface.
#[pymodule(gil_used = false)]
fn _latzero(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<PyApp>()?;
    module.add_class::<PyRequest>()?;
    module.add_class::<PyStream>()?;
    module.add_class::<PyEvents>()?;
    module.add_function(wrap_pyfunction!(connect, module)?)?;
    module.add_function(wrap_pyfunction!(families, module)?)?;
    Ok(())
}
