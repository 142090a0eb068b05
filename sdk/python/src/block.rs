//! Memory blocks: handles, versions that are being written, and locks.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use latzero::{App, Block, BlockLock, BlockWriter, Code, Draft, Error, LockMode, Writing};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use serde_json::Value;

use crate::app::{check_process, seconds, text};
use crate::buffer::{Form, PySlot, PyView, write_into};
use crate::codec::{self, Given};
use crate::errors::{exception, raised, wait};
use crate::gil::detach;
use crate::handlers::Face;
use crate::op::{Op, done, lock, op, plain};
use crate::share::Share;
use crate::streams::Inflow;

/// How the bytes of a block are read: a dtype, a shape, and the names of the last dimension.
#[derive(Debug, Clone)]
pub(crate) struct Layout(pub(crate) Option<(String, Vec<u64>, Vec<String>)>);

impl Layout {
    fn of(block: &Block) -> Layout {
        let read = |layout: Value| {
            let dtype = layout["dtype"].as_str()?.to_owned();
            let shape = layout["shape"].as_array()?;
            let shape = shape.iter().map(Value::as_u64).collect::<Option<_>>()?;
            let fields = layout["fields"].as_array().into_iter().flatten();
            let fields = fields.filter_map(|name| Some(name.as_str()?.to_owned()));
            Some((dtype, shape, fields.collect()))
        };
        // A block that was resized keeps the layout that it was made with.
        let fits = |(dtype, shape, _): &(String, Vec<u64>, Vec<String>)| {
            let items = shape.iter().try_fold(1, |all: u64, n| all.checked_mul(*n));
            item_bytes(dtype)
                .is_none_or(|n| items.and_then(|all| all.checked_mul(n)) == Some(block.size()))
        };
        Layout(block.layout().and_then(read).filter(fits))
    }

    /// The dtype and the shape of the array. Names of the last dimension become part of the dtype.
    pub(crate) fn to_python<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let Some((dtype, shape, fields)) = &self.0 else {
            return Ok(py.None().into_bound(py));
        };
        match shape.split_last() {
            Some((_, outer)) if !fields.is_empty() => {
                let named: Vec<_> = fields.iter().map(|name| (name, dtype)).collect();
                (named, outer).into_bound_py_any(py)
            }
            _ => (dtype, shape).into_bound_py_any(py),
        }
    }
}

/// The bytes of one number of a dtype; `None` for other dtypes.
fn item_bytes(dtype: &str) -> Option<u64> {
    if dtype == "bf16" {
        return Some(2);
    }
    let name = dtype.trim_start_matches(['<', '>', '|', '=']);
    name.strip_prefix(['b', 'i', 'u', 'f', 'c'])?.parse().ok()
}

/// A block that the app is attached to.
#[pyclass(name = "Block", frozen, module = "latzero._latzero")]
pub(crate) struct PyBlock {
    pub(crate) block: Block,
    /// If `share` made it.
    pub(crate) share: Option<Share>,
}

fn no_such(option: &str, given: Option<&str>, known: &str) -> PyErr {
    let given = given.unwrap_or("None");
    PyValueError::new_err(format!("{option} is {known}, not {given}"))
}

/// Opens a block: creates it, or attaches to it.
pub(crate) fn open(app: &App, id: &str, options: &Bound<'_, PyDict>) -> PyResult<Op> {
    let mut name = app.block(id);
    if let Some(pool) = text(options, "pool")? {
        name = name.pool(&pool);
    }
    if let Layout(Some((dtype, shape, fields))) = Layout(codec::option(options, "layout")?) {
        name = name.layout(&dtype, &shape);
        if !fields.is_empty() {
            name = name.fields(&fields);
        }
    }
    let wrap = |py: Python<'_>, block: Block| PyBlock::new(block).into_py_any(py);
    let create = text(options, "create")?;
    let Some(create) = create else {
        let write: Option<bool> = codec::option(options, "write")?;
        let attach = async move {
            match write {
                Some(true) => name.attach_writable().await,
                Some(false) => name.attach().await,
                None => match name.clone().attach_writable().await {
                    Err(e) if e.kind() == Code::Forbidden => name.attach().await,
                    attached => attached,
                },
            }
        };
        return Ok(op(app, attach, wrap));
    };
    let mut making = name.create(codec::option(options, "size")?);
    if create == "attach" {
        making = making.or_attach();
    }
    match text(options, "kind")?.as_deref() {
        Some("shared") => {}
        Some("persistent") => making = making.persistent(),
        other => return Err(no_such("kind", other, "shared or persistent")),
    }
    match text(options, "consistency")?.as_deref() {
        Some("snapshot") => making = making.slots(codec::option(options, "slots")?),
        Some("raw") => making = making.raw(),
        other => return Err(no_such("consistency", other, "snapshot or raw")),
    }
    match text(options, "lifetime")?.as_deref() {
        Some("pool") => {}
        Some("attached") => making = making.while_attached(),
        other => return Err(no_such("lifetime", other, "pool or attached")),
    }
    let apps = |name: &str| codec::option::<Option<Vec<String>>>(options, name);
    if let Some(apps) = apps("writable_by")? {
        making = making.writable_by(&apps.iter().map(String::as_str).collect::<Vec<_>>());
    }
    if let Some(apps) = apps("readable_by")? {
        making = making.readable_by(&apps.iter().map(String::as_str).collect::<Vec<_>>());
    }
    Ok(op(app, making.send(), wrap))
}

impl PyBlock {
    pub(crate) fn new(block: Block) -> Self {
        PyBlock { block, share: None }
    }

    /// The block in this API.
    pub(crate) fn wrapped<'py>(self, py: Python<'py>, face: Face) -> PyResult<Bound<'py, PyAny>> {
        let module = match face {
            Face::Blocking => "latzero._block",
            Face::Asyncio => "latzero.aio",
        };
        let class = py.import(module)?.getattr("Block")?;
        class.call1((Bound::new(py, self)?,))
    }

    fn op<T: Send + 'static, F: Future<Output = Result<T, Error>> + Send + 'static>(
        &self,
        work: impl FnOnce(Block) -> F,
        read: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Op {
        op(self.block.app(), work(self.block.clone()), read)
    }
}

fn not_open(py: Python<'_>) -> PyErr {
    raised(py, Code::LockLost, "it was ended before", Some("no"))
}

#[pymethods]
impl PyBlock {
    #[getter]
    fn id(&self) -> &str {
        self.block.id()
    }

    #[getter]
    fn app_id(&self) -> &str {
        self.block.app().app_id()
    }

    #[getter]
    fn pool(&self) -> &str {
        self.block.pool()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.block.size()
    }

    #[getter]
    fn version(&self) -> u64 {
        self.block.version()
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.block.generation()
    }

    #[getter]
    fn is_live(&self) -> bool {
        self.block.is_live()
    }

    #[getter]
    fn is_mapped(&self) -> bool {
        self.block.is_viewable()
    }

    /// The dtype and the shape, or `None`.
    #[getter]
    fn layout<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        Layout::of(&self.block).to_python(py)
    }

    /// The same block, as what `share` keeps.
    fn kept(&self) -> PyBlock {
        PyBlock {
            block: self.block.clone(),
            share: Some(Share::default()),
        }
    }

    /// Of what `share` keeps: whether it may be filled again.
    #[getter]
    fn is_free(&self) -> bool {
        self.share.as_ref().is_some_and(Share::is_free)
    }

    /// Of what `share` keeps: a handle of it.
    fn lend(&self) -> PyBlock {
        PyBlock {
            block: self.block.clone(),
            share: self.share.clone(),
        }
    }

    /// Copies a version from `offset` on into a buffer, on this thread and without the GIL; returns
    /// the version.
    fn read_into(&self, offset: Given<u64>, out: &Bound<'_, PyAny>) -> PyResult<u64> {
        if !self.block.is_viewable() {
            check_process(out.py(), self.block.app(), false)?;
        }
        let block = latzero::blocking::Block::from(self.block.clone());
        write_into(out, |py, to| wait(py, || block.read_into(offset.0, to.0)))
    }

    fn view(&self) -> Op {
        let (block, share) = (self.block.clone(), self.share.clone());
        self.op(
            async move |block| block.owned_view().await,
            move |py, view| {
                let layout = Layout::of(&block);
                let form = Form::of(&layout, view.get().len());
                let id = block.id().to_owned();
                PyView {
                    id,
                    view,
                    layout,
                    form,
                    _share: share,
                }
                .into_py_any(py)
            },
        )
    }

    fn write_at(&self, offset: Given<u64>, bytes: Vec<u8>, if_version: Option<Given<u64>>) -> Op {
        let write = async move |block: Block| match if_version {
            Some(version) => block.write_if(version.0, offset.0, &bytes).await,
            None => block.write_at(offset.0, &bytes).await,
        };
        self.op(write, |py, version| version.into_py_any(py))
    }

    /// `None` if the bytes were swapped, else the present bytes.
    fn cas(&self, offset: Given<u64>, expected: Vec<u8>, bytes: Vec<u8>) -> Op {
        let swap = async move |block: Block| block.cas(offset.0, &expected, &bytes).await;
        self.op(swap, |py, swapped| match swapped {
            Ok(_) => Ok(py.None()),
            Err(found) => PyBytes::new(py, &found).into_py_any(py),
        })
    }

    /// Waits for a version beyond `beyond` on this thread.
    fn wait_here(&self, py: Python<'_>, beyond: Given<u64>, timeout: f64) -> PyResult<u64> {
        check_process(py, self.block.app(), false)?;
        let block = latzero::blocking::Block::from(self.block.clone());
        let timeout = seconds(timeout)?;
        wait(py, || block.wait_for(beyond.0, timeout))
    }

    fn wait(&self, beyond: Given<u64>, timeout: f64) -> PyResult<Op> {
        let timeout = seconds(timeout)?;
        let wait = async move |block: Block| block.wait_for(beyond.0, timeout).await;
        Ok(self.op(wait, |py, version| version.into_py_any(py)))
    }

    fn changes(&self) -> Op {
        let app = self.block.app().clone();
        self.op(
            async move |block: Block| block.changes().await,
            move |py, changes| Inflow::changes(&app, changes).into_py_any(py),
        )
    }

    fn draft(&self, wait: f64) -> PyResult<Op> {
        let (wait, app) = (seconds(wait)?, self.block.app().clone());
        Ok(self.op(
            async move |block: Block| block.write(wait).await,
            move |py, draft| {
                let draft = Mutex::new(Some(draft));
                PyDraft { app, draft }.into_py_any(py)
            },
        ))
    }

    fn writer(&self, wait: f64) -> PyResult<Op> {
        let (wait, app) = (seconds(wait)?, self.block.app().clone());
        Ok(self.op(
            async move |block: Block| block.writer(wait).await,
            move |py, writer| {
                let writer = Mutex::new(Some(Arc::new(writer)));
                PyWriter { app, writer }.into_py_any(py)
            },
        ))
    }

    fn lock(&self, shared: bool, wait: f64, lease: Option<f64>) -> PyResult<Op> {
        let mode = if shared {
            LockMode::Shared
        } else {
            LockMode::Exclusive
        };
        let (wait, lease) = (seconds(wait)?, lease.map(seconds).transpose()?);
        let app = self.block.app().clone();
        Ok(self.op(
            async move |block: Block| match lease {
                Some(lease) => block.lock_for(mode, wait, lease).await,
                None => block.lock(mode, wait).await,
            },
            move |py, held| {
                let held = Mutex::new(Some(Arc::new(held)));
                PyLock { app, held }.into_py_any(py)
            },
        ))
    }

    fn resize(&self, size: Given<u64>) -> Op {
        let block = self.block.clone();
        done(self.block.app(), async move { block.resize(size.0).await })
    }

    fn flush(&self) -> Op {
        let block = self.block.clone();
        plain(self.block.app(), async move { block.flush().await })
    }

    fn remove(&self) -> Op {
        let block = self.block.clone();
        done(self.block.app(), async move { block.remove().await })
    }

    fn info(&self) -> Op {
        self.op(
            async move |block: Block| block.info().await,
            |py, info| Ok(codec::read_json(py, &info.to_string())?.unbind()),
        )
    }
}

/// A version that is being written, under its own lock. Dropping it discards the version.
#[pyclass(name = "Draft", frozen, module = "latzero._latzero")]
pub(crate) struct PyDraft {
    app: App,
    draft: Mutex<Option<Draft>>,
}

impl Drop for PyDraft {
    fn drop(&mut self) {
        if let Some(draft) = lock(&self.draft).take() {
            draft.abandon();
        }
    }
}

#[pymethods]
impl PyDraft {
    /// The bytes in place; `None` if the block is not mapped.
    fn expose(
        &self,
        py: Python<'_>,
        offset: u64,
        length: u64,
        keeps: bool,
    ) -> PyResult<Option<PySlot>> {
        let exposed = detach(py, || {
            let mut draft = lock(&self.draft);
            let draft = draft.as_mut()?;
            Some(match draft.is_in_place() {
                true => draft.expose(offset, length, keeps).map(Some),
                false => Ok(None),
            })
        });
        let exposed = exposed.ok_or_else(|| not_open(py))?;
        let exposed = exposed.map_err(|e| exception(py, &e))?;
        Ok(exposed.map(PySlot::new))
    }

    fn write(&self, py: Python<'_>, offset: u64, bytes: &[u8]) -> PyResult<()> {
        let mut draft = lock(&self.draft);
        let draft = draft.as_mut().ok_or_else(|| not_open(py))?;
        let written = draft.write(offset, bytes);
        written.map_err(|e| exception(py, &e))
    }

    /// Publishes it and releases the lock; returns the version.
    fn commit(&self, py: Python<'_>) -> PyResult<Op> {
        let draft = lock(&self.draft).take().ok_or_else(|| not_open(py))?;
        Ok(plain(&self.app, draft.commit()))
    }

    fn abandon(&self, py: Python<'_>) {
        let draft = lock(&self.draft).take();
        detach(py, || draft.map(Draft::abandon));
    }
}

/// Writes many versions under one lock.
#[pyclass(name = "Writer", frozen, module = "latzero._latzero")]
pub(crate) struct PyWriter {
    app: App,
    writer: Mutex<Option<Arc<BlockWriter>>>,
}

impl PyWriter {
    fn open(&self, py: Python<'_>) -> PyResult<Arc<BlockWriter>> {
        lock(&self.writer).clone().ok_or_else(|| not_open(py))
    }
}

#[pymethods]
impl PyWriter {
    /// Begins a version; `None` if the block is not mapped.
    fn begin(&self, py: Python<'_>) -> PyResult<Option<PyVersion>> {
        let writer = self.open(py)?;
        let held = writer.lock();
        if held.is_inherited() || !held.block().is_viewable() {
            return Ok(None);
        }
        let writing = writer.begin().map_err(|e| exception(py, &e))?;
        Ok(Some(PyVersion(Mutex::new(Some((writer, writing))))))
    }

    /// Writes one version by copying; returns its number.
    fn write(&self, py: Python<'_>, offset: u64, bytes: Vec<u8>) -> PyResult<Op> {
        let writer = self.open(py)?;
        Ok(plain(&self.app, async move {
            writer.write(offset, &bytes).await
        }))
    }

    /// Releases the lock.
    fn close(&self, py: Python<'_>) {
        let writer = lock(&self.writer).take();
        detach(py, || drop(writer));
    }
}

/// A version that a [`PyWriter`] is writing, and its writer, whose lock it holds until its end.
#[pyclass(name = "Version", frozen, module = "latzero._latzero")]
pub(crate) struct PyVersion(Mutex<Option<(Arc<BlockWriter>, Writing)>>);

#[pymethods]
impl PyVersion {
    fn expose(&self, py: Python<'_>, offset: u64, length: u64, keeps: bool) -> PyResult<PySlot> {
        let exposed = detach(py, || {
            let mut version = lock(&self.0);
            let (writer, writing) = version.as_mut()?;
            Some(writer.expose(writing, offset, length, keeps))
        });
        let exposed = exposed.ok_or_else(|| not_open(py))?;
        exposed.map(PySlot::new).map_err(|e| exception(py, &e))
    }

    fn publish(&self, py: Python<'_>) -> PyResult<u64> {
        let mut version = lock(&self.0);
        if let Some((writer, _)) = &*version {
            check_process(py, writer.lock().block().app(), true)?;
        }
        let (writer, writing) = version.take().ok_or_else(|| not_open(py))?;
        drop(version);
        detach(py, || writer.publish(writing)).map_err(|e| exception(py, &e))
    }

    fn abandon(&self) {
        drop(lock(&self.0).take());
    }
}

/// A block's lock.
#[pyclass(name = "Lock", frozen, module = "latzero._latzero")]
pub(crate) struct PyLock {
    app: App,
    held: Mutex<Option<Arc<BlockLock>>>,
}

#[pymethods]
impl PyLock {
    #[getter]
    fn fence(&self, py: Python<'_>) -> PyResult<u64> {
        let held = lock(&self.held).clone().ok_or_else(|| not_open(py))?;
        Ok(held.fence())
    }

    #[getter]
    fn is_held(&self) -> bool {
        lock(&self.held).as_ref().is_some_and(|held| held.is_held())
    }

    fn renew(&self, py: Python<'_>, lease: Option<f64>) -> PyResult<Op> {
        let held = lock(&self.held).clone().ok_or_else(|| not_open(py))?;
        let lease: Option<Duration> = lease.map(seconds).transpose()?;
        Ok(done(&self.app, async move { held.renew(lease).await }))
    }

    fn unlock(&self, py: Python<'_>) -> PyResult<Op> {
        let held = lock(&self.held).take().ok_or_else(|| not_open(py))?;
        Ok(done(&self.app, async move {
            match Arc::try_unwrap(held) {
                Ok(held) => held.unlock().await,
                // It is being renewed, and is released after that.
                Err(_) => Ok(()),
            }
        }))
    }

    /// Releases it without waiting for the server.
    fn close(&self, py: Python<'_>) {
        let held = lock(&self.held).take();
        detach(py, || drop(held));
    }
}

/// Marks a block that the handler of a call may write.
#[pyclass(name = "Writable", frozen, module = "latzero._latzero")]
pub(crate) struct PyWritable(pub(crate) Py<PyBlock>);

#[pymethods]
impl PyWritable {
    #[new]
    fn new(block: Py<PyBlock>) -> Self {
        PyWritable(block)
    }
}
