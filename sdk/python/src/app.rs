//! Connections: calls, emits, handlers, events and requests to the server.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, ready};
use std::time::Duration;

use latzero::{
    App, Call, Calling, Code, Data, Driver, Emit, InstanceId, Reply, SCHEMA_BYTES_MAX, Strategy,
};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use crate::block;
use crate::codec::{self, Given};
use crate::errors::{self, exception, wait};
use crate::event_loop::Loop;
use crate::handlers::{Begun, Incoming, Trigger, answer};
use crate::op::{Op, cancelled, done, lock, op, plain};
use crate::pool::Pool;
use crate::share::Lent;
use crate::streams::{Feed, Inflow, PyItems};

pub(crate) fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|e| PyValueError::new_err(format!("timeout: {e}")))
}

/// A connection.
#[pyclass(name = "App", frozen, module = "latzero._latzero")]
pub(crate) struct PyApp {
    app: App,
    tracebacks: bool,
    /// What drives it, until an event loop takes it.
    driver: Mutex<Option<Driver>>,
    /// The threads of plain functions, if an event loop drives the app.
    pool: Option<Arc<Pool>>,
}

impl Drop for PyApp {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.stop();
        }
    }
}

fn builder(
    py: Python<'_>,
    url: &str,
    options: &Bound<'_, PyDict>,
) -> PyResult<(latzero::Builder, bool)> {
    let flag = |name: &str| codec::option::<bool>(options, name);
    let time = |name: &str| seconds(codec::option(options, name)?);
    let pools: Vec<String> = codec::option(options, "pools")?;
    let mut builder = App::builder(url)
        .exclusive(flag("exclusive")?)
        .takeover(flag("takeover")?)
        .rehydrate(flag("rehydrate")?)
        .transient(flag("transient")?)
        .pools(pools)
        .handler_threads(codec::option(options, "handler_threads")?)
        .connect_timeout(time("connect_timeout")?)
        .call_timeout(time("call_timeout")?)
        .reconnect(latzero::Reconnect {
            enabled: flag("reconnect")?,
            ..latzero::Reconnect::default()
        });
    let meta = codec::take(options, "meta")?;
    if !meta.is_none() {
        let json = codec::write_json(&meta)?;
        let meta = serde_json::from_str(&json);
        builder = builder.meta(meta.map_err(|e| errors::bad_request(py, &e.to_string()))?);
    }
    Ok((builder, flag("tracebacks")?))
}

/// Connects, on this thread.
#[pyfunction]
pub(crate) fn connect(py: Python<'_>, url: &str, options: &Bound<'_, PyDict>) -> PyResult<PyApp> {
    let (builder, tracebacks) = builder(py, url, options)?;
    let app = wait(py, || latzero::blocking::App::connect_with(builder))?;
    let app = app.as_async().clone();
    Ok(PyApp {
        app,
        tracebacks,
        driver: Mutex::default(),
        pool: None,
    })
}

/// Sets the options that calls and emits have in common.
macro_rules! address {
    ($sending:ident, $options:ident) => {
        if let Some(to) = $options.get_item("to")?
            && !to.is_none()
        {
            $sending = match to.extract::<(String, String)>() {
                Ok((app_id, instance)) => $sending.to_instance(&app_id, instance_id(&instance)?),
                Err(_) => $sending.to(&codec::named::<String>("to", &to)?),
            };
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
                let name: String = codec::named("headers", &name)?;
                let value: String = codec::named("headers", &value)?;
                $sending = $sending.header(&name, &value);
            }
        }
        if flag($options, "privileged")? {
            $sending = $sending.privileged();
        }
    };
}

fn instance_id(text: &str) -> PyResult<InstanceId> {
    InstanceId::parse(text)
        .ok_or_else(|| PyValueError::new_err(format!("'{text}' is no id of an instance")))
}

fn flag(options: &Bound<'_, PyDict>, name: &str) -> PyResult<bool> {
    let value = options.get_item(name)?;
    value.map_or(Ok(false), |value| value.is_truthy())
}

pub(crate) fn text(options: &Bound<'_, PyDict>, name: &str) -> PyResult<Option<String>> {
    match options.get_item(name)? {
        Some(value) => codec::named(name, &value),
        None => Ok(None),
    }
}

fn json(options: &Bound<'_, PyDict>, name: &str) -> PyResult<Option<Value>> {
    let object = codec::take(options, name)?;
    if object.is_none() {
        return Ok(None);
    }
    let text = codec::write_json(&object)?;
    let value = serde_json::from_str(&text);
    value
        .map(Some)
        .map_err(|e| PyValueError::new_err(format!("{name}: {e}")))
}

pub(crate) fn headers_dict<'py>(
    py: Python<'py>,
    headers: Vec<(String, String)>,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for (name, value) in headers {
        dict.set_item(name, value)?;
    }
    Ok(dict)
}

/// The answer of a call, whose end is noted.
pub(crate) async fn ending<T>(calling: Calling<T>, lent: Lent) -> Result<T, latzero::Error> {
    let result = calling.await;
    lent.end(&result);
    result
}

/// The answer and its headers.
fn read_reply(py: Python<'_>, reply: Reply) -> PyResult<Py<PyAny>> {
    let headers = headers_dict(py, reply.headers())?;
    let data: Data = reply.into().map_err(|e| exception(py, &e))?;
    (codec::read(py, &data)?, headers).into_py_any(py)
}

fn read_value(py: Python<'_>, value: &Value) -> PyResult<Py<PyAny>> {
    Ok(codec::read_json(py, &value.to_string())?.unbind())
}

impl PyApp {
    /// What drives the app, for the event loop that asks first.
    pub(crate) fn take_driver(&self) -> Option<Driver> {
        lock(&self.driver).take()
    }

    pub(crate) fn calling(
        &self,
        name: &str,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<(Call, Lent)> {
        let (data, blocks) = codec::write_call(data)?;
        let mut call = self.app.call(name, &data);
        let mut shares = Lent::of(blocks.iter().filter_map(|lent| lent.share.clone()));
        for lent in &blocks {
            call = match lent.is_writable {
                true => call.block_writable(&lent.block),
                false => call.block(&lent.block),
            };
        }
        // As most calls.
        if options.is_empty() {
            return Ok((call, shares));
        }
        address!(call, options);
        if let Some(timeout) = options.get_item("timeout")?
            && !timeout.is_none()
        {
            call = call.timeout(seconds(codec::named("timeout", &timeout)?)?);
        }
        if let Some(key) = text(options, "idempotency_key")? {
            call = call.idempotency_key(&key);
        }
        if flag(options, "redeliver")? {
            call = call.redeliver();
            // An earlier handler may run on after another one has answered.
            drop(std::mem::take(&mut shares));
        }
        if let Some(attempts) = options.get_item("attempts")?
            && !attempts.is_none()
        {
            call = call.attempts(codec::named("attempts", &attempts)?);
        }
        if let Some(id) = text(options, "id")? {
            call = call.id(&id);
        }
        Ok((call, shares))
    }

    fn emitting(
        &self,
        name: &str,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        one: bool,
    ) -> PyResult<Emit> {
        let mut emit = self.app.emit(name, &codec::write(data)?);
        address!(emit, options);
        Ok(if one { emit.one() } else { emit })
    }
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

    /// How many events and answers were dropped so far.
    #[getter]
    fn lost(&self) -> u64 {
        self.app.lost()
    }

    /// The error with which the app ended for good, if it has.
    #[getter]
    fn end_error<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let reason = self.app.end_reason()?;
        Some(
            exception(py, &reason)
                .into_value(py)
                .into_bound(py)
                .into_any(),
        )
    }

    /// The descriptor of the current connection.
    #[getter]
    fn descriptor(&self) -> Option<i32> {
        self.app.descriptor()
    }

    /// Prevents the connection from being dropped: in a forked child that would affect the parent's
    /// connection.
    fn leak(slf: Py<Self>) {
        std::mem::forget(slf);
    }

    /// Calls, and waits on this thread.
    fn call<'py>(
        &self,
        name: Given<&str>,
        data: &Bound<'py, PyAny>,
        options: &Bound<'py, PyDict>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = data.py();
        let (call, lent) = self.calling(name.0, data, options)?;
        let call = latzero::blocking::Call::from(call);
        let answer = wait(py, || {
            let answer = call.send::<Data>();
            lent.end(&answer);
            answer
        })?;
        codec::read(py, &answer)
    }

    /// Like `call`, with the headers.
    fn reply(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Py<PyAny>> {
        let py = data.py();
        let (call, lent) = self.calling(name.0, data, options)?;
        let call = latzero::blocking::Call::from(call);
        let reply = wait(py, || {
            let reply = call.reply();
            lent.end(&reply);
            reply
        })?;
        read_reply(py, reply)
    }

    fn call_op(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Op> {
        let (call, lent) = self.calling(name.0, data, options)?;
        let read = |py: Python<'_>, data| Ok(codec::read(py, &data)?.unbind());
        Ok(op(&self.app, ending(call.send::<Data>(), lent), read).short())
    }

    fn reply_op(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Op> {
        let (call, lent) = self.calling(name.0, data, options)?;
        Ok(op(&self.app, ending(call.reply(), lent), read_reply).short())
    }

    fn park(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Op> {
        // Stored even if a handler is free, as the caller may end after this has returned.
        let call = self.calling(name.0, data, options)?.0.always_park();
        let parking = call.send_parked();
        let app = self.app.clone();
        Ok(op(&self.app, parking, move |py, parked| {
            let id = parked.id().to_owned();
            let feed = Feed::new(&app, Some(parked.answer()));
            PyParked { app, id, feed }.into_py_any(py)
        }))
    }

    /// Answers that nobody in this process waits for.
    fn answers(&self) -> Inflow {
        Inflow::answers(&self.app, self.app.answers())
    }

    /// The changes of the connection from now on.
    fn states(&self) -> Inflow {
        Inflow::states(&self.app, self.app.states())
    }

    /// Waits until the app has ended, for whatever reason.
    fn ended(&self) -> Op {
        let ended = self.app.ended();
        done(&self.app, async move {
            ended.await;
            Ok(())
        })
    }

    fn stream(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        window: Given<u64>,
    ) -> PyResult<PyItems> {
        let call = self.calling(name.0, data, options)?.0.window(window.0);
        Ok(PyItems::new(&self.app, call.stream()))
    }

    /// Emits, and waits on this thread until it is sent.
    fn emit(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        one: bool,
        count: bool,
    ) -> PyResult<Option<u64>> {
        let emit = self.emitting(name.0, data, options, one)?;
        let emit = latzero::blocking::Emit::from(emit);
        wait(data.py(), || match count {
            true => emit.counted().map(Some),
            false => emit.send().map(|()| None),
        })
    }

    fn emit_op(
        &self,
        name: Given<&str>,
        data: &Bound<'_, PyAny>,
        options: &Bound<'_, PyDict>,
        one: bool,
        count: bool,
    ) -> PyResult<Op> {
        let emit = self.emitting(name.0, data, options, one)?;
        Ok(match count {
            true => plain(&self.app, emit.counted()).short(),
            false => done(&self.app, emit.into_future()).short(),
        })
    }

    /// Serves `name`: `handler` is called with each request, on a thread of the client, or with
    /// `on_loop` as a task of the app's event loop.
    fn serve(
        &self,
        name: Given<&str>,
        handler: Py<PyAny>,
        options: &Bound<'_, PyDict>,
        on_loop: Option<&Loop>,
    ) -> PyResult<Op> {
        let strategy: String = codec::option(options, "strategy")?;
        let strategy = Strategy::parse(&strategy)
            .ok_or_else(|| PyValueError::new_err(format!("no such strategy: {strategy:?}")))?;
        let mut serving = self.app.handler(name.0).strategy(strategy);
        let concurrency: Option<u32> = codec::option(options, "concurrency")?;
        if let Some(concurrency) = concurrency {
            serving = serving.concurrency(concurrency);
        }
        if codec::take(options, "privileged")?.is_truthy()? {
            serving = serving.privileged();
        }
        if let Some(doc) = text(options, "doc")? {
            serving = serving.doc(&doc);
        }
        if let Some(schema) = json(options, "schema")? {
            serving = serving.schema(schema);
        } else if let Some(schema) = json(options, "derived_schema")?
            && schema.to_string().len() <= SCHEMA_BYTES_MAX
        {
            // A server may refuse one that is longer.
            serving = serving.schema(schema);
        }
        let pools: Option<Vec<String>> = codec::option(options, "pools")?;
        if let Some(pools) = pools {
            serving = serving.pools(pools);
        }
        let trigger = Arc::new(Trigger {
            handler,
            owner: codec::take(options, "owner")?.unbind(),
            tracebacks: self.tracebacks,
            is_async: codec::take(options, "is_async")?.is_truthy()?,
        });
        Ok(match (on_loop, self.pool.clone()) {
            (Some(on_loop), _) => {
                let mailbox = on_loop.mailbox.clone();
                let take = move |call| {
                    let begun = Begun::new(call, trigger.clone());
                    mailbox.push_incoming(Incoming::Begin(begun));
                };
                done(&self.app, serving.serve_detached(take))
            }
            (None, Some(pool)) => {
                let take = move |call| pool.run(Begun::new(call, trigger.clone()));
                done(&self.app, serving.serve_detached(take))
            }
            (None, None) => {
                let run = move |request: latzero::blocking::Request| {
                    answer(Arc::new(request.into_async()), &trigger)
                };
                done(&self.app, serving.serve_blocking(run))
            }
        })
    }

    fn unserve(&self, name: Given<String>) -> Op {
        let app = self.app.clone();
        done(&self.app, async move { app.unserve(&name.0).await })
    }

    fn events(&self, name: Given<String>) -> Op {
        let (app, theirs) = (self.app.clone(), self.app.clone());
        let listen = async move { app.on(&name.0).await };
        op(&self.app, listen, move |py, events| {
            Inflow::emissions(&theirs, events).into_py_any(py)
        })
    }

    fn watch(&self, pool: Given<String>) -> Op {
        let (app, theirs) = (self.app.clone(), self.app.clone());
        let watch = async move { app.watch(&pool.0).await };
        op(&self.app, watch, move |py, events| {
            Inflow::presences(&theirs, events).into_py_any(py)
        })
    }

    fn join(&self, pool: Given<String>) -> Op {
        let app = self.app.clone();
        done(&self.app, async move { app.join(&pool.0).await })
    }

    fn leave(&self, pool: Given<String>) -> Op {
        let app = self.app.clone();
        done(&self.app, async move { app.leave(&pool.0).await })
    }

    fn request(&self, py: Python<'_>, message: &Bound<'_, PyAny>) -> PyResult<Op> {
        let json = codec::write_json(message)?;
        let message: Result<Value, _> = serde_json::from_str(&json);
        let message = message.map_err(|e| errors::bad_request(py, &e.to_string()))?;
        let app = self.app.clone();
        let ask = async move { app.request(&message).await };
        Ok(op(&self.app, ask, |py, answer| read_value(py, &answer)))
    }

    fn ping(&self) -> Op {
        let app = self.app.clone();
        plain(&self.app, async move {
            app.ping().await.map(|time| time.as_secs_f64())
        })
    }

    /// Opens a block.
    fn block(&self, id: Given<&str>, options: &Bound<'_, PyDict>) -> PyResult<Op> {
        block::open(&self.app, id.0, options)
    }

    /// The blocks of a pool, as the server describes them.
    fn blocks(&self, pool: Option<Given<String>>) -> Op {
        let (app, pool) = (self.app.clone(), pool.map(|pool| pool.0));
        let list = async move { app.blocks(pool.as_deref()).await };
        op(&self.app, list, |py, blocks| {
            read_value(py, &Value::Array(blocks))
        })
    }

    /// Closes, and waits on this thread for at most this many seconds.
    fn close(&self, py: Python<'_>, within: Option<f64>) -> PyResult<()> {
        let app = latzero::blocking::App::from(self.app.clone());
        let within = within.map(seconds).transpose()?;
        wait(py, || match within {
            Some(within) => app.close_within(within),
            None => app.close(),
        })
    }

    fn close_op(&self) -> Op {
        let app = self.app.clone();
        done(&self.app, async move { app.close().await })
    }
}

/// A call that the server stores until it is answered.
#[pyclass(name = "Parked", frozen, module = "latzero._latzero")]
pub(crate) struct PyParked {
    app: App,
    id: String,
    /// None once the answer was taken.
    feed: Feed<Option<Calling<Data>>>,
}

#[pymethods]
impl PyParked {
    #[getter]
    fn id(&self) -> &str {
        &self.id
    }

    /// Waits for the answer. A wait that ends early may be repeated.
    fn answer(&self, py: Python<'_>) -> PyResult<Op> {
        check_process(py, &self.app, true)?;
        let id = self.id.clone();
        self.feed.next(
            |call, cx| {
                let Some(calling) = call else {
                    return Poll::Ready(Ok(None));
                };
                let answer = ready!(Pin::new(calling).poll(cx));
                *call = None;
                Poll::Ready(answer.map(Some))
            },
            move |py, answer| match answer.ok_or_else(|| cancelled(py))? {
                Some(data) => Ok(codec::read(py, &data)?.unbind()),
                None => {
                    let message = format!(
                        "the answer of the parked call '{id}' was taken: keep what the first \
                         `answer` returned"
                    );
                    Err(errors::raised(py, Code::BadMessage, &message, None))
                }
            },
        )
    }

    /// Cancels the call, also while somebody waits for its answer.
    fn cancel(&self, py: Python<'_>) {
        if self.feed.with(|call| call.is_some()) == Some(true) {
            self.feed
                .close(py, |call| call.into_iter().for_each(Calling::cancel));
        }
    }
}

/// Connects on a separate thread; an event loop waits for it, and drives the app.
#[pyfunction]
pub(crate) fn connecting(py: Python<'_>, url: &str, options: &Bound<'_, PyDict>) -> PyResult<Op> {
    let (builder, tracebacks) = builder(py, url, options)?;
    let threads = codec::option(options, "handler_threads")?;
    Ok(Op::connecting(async move {
        let (app, driver) = builder.connect_driven().await?;
        Ok(PyApp {
            app,
            tracebacks,
            driver: Mutex::new(Some(driver)),
            pool: Some(Pool::new(threads)),
        })
    }))
}

/// Notes that this is a forked child.
#[pyfunction]
pub(crate) fn forked() {
    PROCESS.store(std::process::id(), Ordering::Relaxed);
}

/// This process; 0 until it is known to be a forked child.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// Refuses to wait for a connection of the parent process. What had begun before the fork is the
/// parent's, and nobody here can tell whether it ran.
pub(crate) fn check_process(py: Python<'_>, app: &App, is_begun: bool) -> PyResult<()> {
    let process = PROCESS.load(Ordering::Relaxed);
    if process == 0 || process == app.process() {
        return Ok(());
    }
    let message = "this belongs to the process that this one was forked from: make it anew here";
    let ran = if is_begun { "unknown" } else { "no" };
    Err(errors::raised(py, Code::Disconnected, message, Some(ran)))
}
