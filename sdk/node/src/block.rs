//! Memory blocks: handles, versions that are being written, and locks.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use latzero::{
    App, Block, BlockLock, BlockWriter, Code, Draft, Error, LockMode, OwnedView, PrivateMapping,
    Writing,
};
use napi::bindgen_prelude::{Array, ArrayBuffer, Uint8ArraySlice};
use napi::{Env, Result};
use napi_derive::napi;
use serde::Deserialize;

use crate::app::NativeApp;
use crate::batch::Outcome;
use crate::errors::{misuse, thrown};
use crate::memory::{Extra, lend, may_share, share};
use crate::options::time;
use crate::streams::Inflow;

/// How a block is opened.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Open {
    pool: Option<String>,
    /// A dtype of numpy, and a shape.
    layout: Option<(String, Vec<u64>)>,
    size: u64,
    /// `attach` makes it or takes one that is alike, `new` makes it.
    create: Option<String>,
    write: Option<bool>,
    kind: String,
    consistency: String,
    slots: u32,
    lifetime: String,
    readable_by: Option<Vec<String>>,
    writable_by: Option<Vec<String>>,
}

fn names(apps: &[String]) -> Vec<&str> {
    apps.iter().map(String::as_str).collect()
}

impl Open {
    pub(crate) fn open(
        self,
        app: &App,
        id: &str,
    ) -> Result<impl Future<Output = std::result::Result<Block, Error>> + use<>> {
        let mut name = app.block(id);
        if let Some(pool) = &self.pool {
            name = name.pool(pool);
        }
        if let Some((dtype, shape)) = &self.layout {
            name = name.layout(dtype, shape);
        }
        let mut making = name.clone().create(self.size);
        match self.create.as_deref() {
            None | Some("new") => {}
            Some("attach") => making = making.or_attach(),
            Some(other) => return Err(misuse(format!("there is no create '{other}'"))),
        }
        match self.kind.as_str() {
            "shared" => {}
            "persistent" => making = making.persistent(),
            other => return Err(misuse(format!("there is no kind '{other}'"))),
        }
        match self.consistency.as_str() {
            "snapshot" => making = making.slots(self.slots),
            "raw" => making = making.raw(),
            other => return Err(misuse(format!("there is no consistency '{other}'"))),
        }
        match self.lifetime.as_str() {
            "pool" => {}
            "attached" => making = making.while_attached(),
            other => return Err(misuse(format!("there is no lifetime '{other}'"))),
        }
        if let Some(apps) = &self.writable_by {
            making = making.writable_by(&names(apps));
        }
        if let Some(apps) = &self.readable_by {
            making = making.readable_by(&names(apps));
        }
        let (creates, write) = (self.create.is_some(), self.write);
        Ok(async move {
            match (creates, write) {
                (true, _) => making.send().await,
                (false, Some(true)) => name.attach_writable().await,
                (false, Some(false)) => name.attach().await,
                (false, None) => match name.clone().attach_writable().await {
                    Err(e) if e.kind() == Code::Forbidden => name.attach().await,
                    attached => attached,
                },
            }
        })
    }
}

/// The result of a future that is ready at once; else it is dropped.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut cx = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut cx) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

fn version(number: u64) -> f64 {
    // Exact up to 2^53: a version a microsecond for 285 years.
    number as f64
}

/// A block that the app takes part in.
#[napi(js_name = "Block")]
pub struct NativeBlock {
    block: RefCell<Option<Block>>,
    /// The generation that was mapped last for arrays, and how many were before it.
    mapped: RefCell<Option<Arc<PrivateMapping>>>,
    mappings: Cell<u32>,
    /// Versions that functions of the user's are reading.
    reads: RefCell<HashMap<u32, OwnedView>>,
}

impl NativeBlock {
    pub(crate) fn new(block: Block) -> NativeBlock {
        NativeBlock {
            block: RefCell::new(Some(block)),
            mapped: RefCell::default(),
            mappings: Cell::new(0),
            reads: RefCell::default(),
        }
    }

    /// The block, unless this was closed.
    pub(crate) fn get(&self) -> Result<Block> {
        let block = self.block.borrow().clone();
        block.ok_or_else(|| misuse("the block was closed here"))
    }

    /// The private mapping in which a view lies.
    fn mapping(&self, view: &OwnedView) -> Option<Arc<PrivateMapping>> {
        let mut mapped = self.mapped.borrow_mut();
        if let Some(mapping) = mapped.as_ref().filter(|mapping| mapping.has(view)) {
            return Some(mapping.clone());
        }
        let mapping = Arc::new(self.get().ok()?.map_private(view)?);
        self.mappings.set(self.mappings.get().wrapping_add(1));
        *mapped = Some(mapping.clone());
        Some(mapping)
    }
}

/// How many numbers each mapping reserves for its slots; a block has fewer slots.
#[napi]
#[allow(unreachable_pub, reason = "the macro asks for it")]
pub const PLACES: u32 = 16;

#[napi]
impl NativeBlock {
    /// Its name.
    #[napi(getter)]
    pub fn id(&self) -> Result<String> {
        Ok(self.get()?.id().to_owned())
    }

    /// Its pool.
    #[napi(getter)]
    pub fn pool(&self) -> Result<String> {
        Ok(self.get()?.pool().to_owned())
    }

    /// Its size in bytes.
    #[napi(getter)]
    pub fn nbytes(&self) -> Result<f64> {
        Ok(self.get()?.size() as f64)
    }

    /// Its newest version.
    #[napi(getter)]
    pub fn version(&self) -> Result<f64> {
        Ok(version(self.get()?.version()))
    }

    /// Its generation.
    #[napi(getter)]
    pub fn generation(&self) -> Result<f64> {
        Ok(version(self.get()?.generation()))
    }

    /// Whether the server is connected and has it.
    #[napi(getter)]
    pub fn is_live(&self) -> bool {
        self.get().is_ok_and(|block| block.is_live())
    }

    /// Whether its bytes are mapped into this process.
    #[napi(getter)]
    pub fn is_mapped(&self) -> bool {
        self.get().is_ok_and(|block| block.is_viewable())
    }

    /// Its layout, as JSON.
    #[napi(getter)]
    pub fn layout(&self) -> Result<Option<String>> {
        Ok(self.get()?.layout().map(|layout| layout.to_string()))
    }

    /// Detaches from the block.
    #[napi]
    pub fn close(&self) {
        self.block.take();
        self.mapped.take();
    }

    /// Copies the newest version from `offset` on into `target`; the version. `null` if it
    /// would have to wait, or if the block got another size or generation: read it anew then.
    #[napi]
    pub fn read_now(&self, mut target: Uint8ArraySlice<'_>, offset: i64) -> Result<Option<f64>> {
        let block = self.get()?;
        let generation = block.generation();
        if !block.is_viewable() || offset < 0 {
            return Ok(None);
        }
        let into = crate::memory::bytes_of(&mut target);
        let read = at_once(block.read_into(offset.unsigned_abs(), into));
        match read {
            Some(Ok(number)) if block.generation() == generation => Ok(Some(version(number))),
            Some(Err(error)) if block.generation() == generation => Err(thrown(&error)),
            _ => Ok(None),
        }
    }

    /// All of the newest version, in new memory, with the version.
    #[napi]
    pub fn read(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move {
            let (bytes, number) = block.read().await?;
            Ok(Outcome::memory(bytes, number))
        }))
    }

    /// Some bytes of the newest version, in new memory, with the version.
    #[napi]
    pub fn read_at(&self, app: &NativeApp, token: i64, offset: i64, length: i64) -> Result<bool> {
        let block = self.get()?;
        let (offset, length) = (unsigned(offset)?, unsigned(length)?);
        Ok(app.begin(token, async move {
            loop {
                // One byte past the end is enough to be refused, and takes no memory.
                let room = block.size().saturating_sub(offset).saturating_add(1);
                let mut bytes = vec![0; usize::try_from(length.min(room)).unwrap_or(0)];
                let number = block.read_into(offset, &mut bytes).await?;
                // Else it has grown meanwhile.
                if length <= room {
                    return Ok(Outcome::memory(bytes, number));
                }
            }
        }))
    }

    /// Writes bytes through the server; the version.
    #[napi]
    pub fn write_at(
        &self,
        app: &NativeApp,
        token: i64,
        offset: i64,
        bytes: Uint8ArraySlice<'_>,
        if_version: Option<i64>,
    ) -> Result<bool> {
        let (block, bytes) = (self.get()?, bytes.to_vec());
        let (offset, if_version) = (unsigned(offset)?, if_version.map(unsigned).transpose()?);
        Ok(app.begin(token, async move {
            let number = match if_version {
                Some(version) => block.write_if(version, offset, &bytes).await?,
                None => block.write_at(offset, &bytes).await?,
            };
            Ok(Outcome::of(number))
        }))
    }

    /// Swaps bytes; nothing if that was done, else those that are there.
    #[napi]
    pub fn cas(
        &self,
        app: &NativeApp,
        token: i64,
        offset: i64,
        expected: Uint8ArraySlice<'_>,
        bytes: Uint8ArraySlice<'_>,
    ) -> Result<bool> {
        let (block, offset) = (self.get()?, unsigned(offset)?);
        let (expected, bytes) = (expected.to_vec(), bytes.to_vec());
        Ok(app.begin(token, async move {
            Ok(match block.cas(offset, &expected, &bytes).await? {
                Ok(_) => Outcome::nothing(),
                Err(found) => Outcome::extra(Extra::Buffer(found)),
            })
        }))
    }

    /// Waits for a version beyond `beyond`.
    #[napi]
    pub fn wait(
        &self,
        app: &NativeApp,
        token: i64,
        beyond: i64,
        timeout_ms: Option<f64>,
    ) -> Result<bool> {
        let (block, beyond) = (self.get()?, unsigned(beyond)?);
        let timeout = timeout_ms.map(time).transpose()?;
        Ok(app.begin(token, async move {
            loop {
                let waited = block.wait_for(beyond, timeout.unwrap_or(LONG)).await;
                match waited {
                    Err(e) if e.kind() == Code::Timeout && timeout.is_none() => {}
                    waited => return Ok(Outcome::of(waited?)),
                }
            }
        }))
    }

    /// The versions to come.
    #[napi]
    pub fn changes(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move {
            let changes = Inflow::changes(block.changes().await?);
            Ok(Outcome::extra(Extra::Inflow(changes)))
        }))
    }

    /// Begins to read the newest version in place, as the read of this number: its memory, its
    /// number, and how many mappings there were: in one mapping the layout is the same. `null` if
    /// there is no such memory, or that would have to wait.
    #[napi]
    pub fn begin_read<'env>(&self, env: &'env Env, number: u32) -> Result<Option<Array<'env>>> {
        let block = self.get()?;
        if !may_share() || !block.is_viewable() {
            return Ok(None);
        }
        let view = at_once(async move { block.owned_view().await });
        let Some(view) = view.transpose().map_err(|e| thrown(&e))? else {
            return Ok(None);
        };
        let Some(mapping) = self.mapping(&view).filter(|it| it.restore(&view).is_ok()) else {
            return Ok(None);
        };
        let Some(memory) = lend(env, &mapping, &view)? else {
            return Ok(None);
        };
        let mut begun = env.create_array(3)?;
        begun.set(0, memory)?;
        begun.set(1, version(view.get().version()))?;
        begun.set(2, self.mappings.get())?;
        self.reads.borrow_mut().insert(number, view);
        Ok(Some(begun))
    }

    /// Ends a read, and takes its memory back; whether the version was whole until now.
    #[napi]
    pub fn end_read(&self, number: u32, memory: ArrayBuffer<'_>) -> Result<bool> {
        let view = self.reads.borrow_mut().remove(&number);
        crate::memory::detach(memory)?;
        Ok(view.is_some_and(|view| view.get().is_valid()))
    }

    /// The newest version in place; `null` if that would have to wait.
    #[napi]
    pub fn view_now(&self) -> Result<Option<NativeView>> {
        let block = self.get()?;
        let view = at_once(async move { block.owned_view().await });
        view.transpose()
            .map_err(|e| thrown(&e))
            .map(|view| view.map(NativeView))
    }

    /// Where a view lies among the memory that arrays may have: the same number for the same
    /// memory. What was written there by mistake is gone. `null` if arrays can't have it.
    #[napi]
    pub fn place(&self, view: &NativeView) -> Option<u32> {
        let mapping = self.mapping(&view.0).filter(|_| may_share())?;
        mapping.restore(&view.0).ok()?;
        let slot = view.0.slot();
        (slot < PLACES).then(|| self.mappings.get().wrapping_mul(PLACES) + slot)
    }

    /// The memory of a view.
    #[napi]
    pub fn memory<'env>(
        &self,
        env: &'env Env,
        view: &NativeView,
    ) -> Result<Option<ArrayBuffer<'env>>> {
        match self.mapping(&view.0) {
            Some(mapping) => lend(env, &mapping, &view.0),
            None => Ok(None),
        }
    }

    /// The newest version in place.
    #[napi]
    pub fn view(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move {
            let view = NativeView(block.owned_view().await?);
            Ok(Outcome::extra(Extra::View(view)))
        }))
    }

    /// Begins a version, under the block's lock.
    #[napi]
    pub fn draft(&self, app: &NativeApp, token: i64, wait_ms: f64) -> Result<bool> {
        let (block, wait) = (self.get()?, time(wait_ms)?);
        Ok(app.begin(token, async move {
            let draft = NativeDraft(Rc::new(Draftable(RefCell::new(Some(
                block.write(wait).await?,
            )))));
            Ok(Outcome::extra(Extra::Draft(draft)))
        }))
    }

    /// Takes the block's lock, for many versions.
    #[napi]
    pub fn writer(&self, app: &NativeApp, token: i64, wait_ms: f64) -> Result<bool> {
        let (block, wait) = (self.get()?, time(wait_ms)?);
        Ok(app.begin(token, async move {
            let writer = Held::new(block.writer(wait).await?);
            Ok(Outcome::extra(Extra::Writer(NativeWriter(writer))))
        }))
    }

    /// Takes the block's lock.
    #[napi]
    pub fn lock(
        &self,
        app: &NativeApp,
        token: i64,
        is_shared: bool,
        wait_ms: f64,
        lease_ms: Option<f64>,
    ) -> Result<bool> {
        let mode = match is_shared {
            true => LockMode::Shared,
            false => LockMode::Exclusive,
        };
        let block = self.get()?;
        let (wait, lease) = (time(wait_ms)?, lease_ms.map(time).transpose()?);
        Ok(app.begin(token, async move {
            let held = match lease {
                Some(lease) => block.lock_for(mode, wait, lease).await?,
                None => block.lock(mode, wait).await?,
            };
            Ok(Outcome::extra(Extra::Lock(NativeLock(Held::new(held)))))
        }))
    }

    /// Gives it another size.
    #[napi]
    pub fn resize(&self, app: &NativeApp, token: i64, size: i64) -> Result<bool> {
        let (block, size) = (self.get()?, unsigned(size)?);
        Ok(app.begin(token, async move {
            block.resize(size).await?;
            Ok(Outcome::nothing())
        }))
    }

    /// Flushes a persistent block; the version on disk.
    #[napi]
    pub fn flush(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move { Ok(Outcome::of(block.flush().await?)) }))
    }

    /// Removes it.
    #[napi]
    pub fn remove(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move {
            block.remove().await?;
            Ok(Outcome::nothing())
        }))
    }

    /// All about it, as the server describes it.
    #[napi]
    pub fn info(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let block = self.get()?;
        Ok(app.begin(token, async move { Ok(Outcome::of(block.info().await?)) }))
    }
}

/// One version of a block, in place.
#[napi(js_name = "View")]
pub struct NativeView(OwnedView);

#[napi]
impl NativeView {
    /// The number of the version.
    #[napi(getter)]
    pub fn version(&self) -> f64 {
        version(self.0.get().version())
    }

    /// Its size in bytes.
    #[napi(getter)]
    pub fn nbytes(&self) -> f64 {
        self.0.get().len() as f64
    }

    /// Whether it was not written over.
    #[napi(getter)]
    pub fn is_valid(&self) -> bool {
        self.0.get().is_valid()
    }

    /// Whether the block was resized or removed since.
    #[napi(getter)]
    pub fn is_stale(&self) -> bool {
        self.0.is_stale()
    }

    /// Copies it; false if it was written over meanwhile.
    #[napi]
    pub fn copy_to(&self, mut target: Uint8ArraySlice<'_>) -> bool {
        let view = self.0.get();
        let copied = view.copy_to(0, crate::memory::bytes_of(&mut target));
        copied.is_ok() && view.is_valid()
    }
}

/// A wait without an end is made of waits of this time.
const LONG: Duration = Duration::from_secs(3600);

fn unsigned(number: i64) -> Result<u64> {
    u64::try_from(number).map_err(|_| misuse(format!("{number} is less than 0")))
}

/// A draft that is discarded when it is dropped.
struct Draftable(RefCell<Option<Draft>>);

impl Drop for Draftable {
    fn drop(&mut self) {
        if let Some(draft) = self.0.take() {
            draft.abandon();
        }
    }
}

/// A version that is being written, under a lock of its own. Dropped, it is discarded.
#[napi(js_name = "Draft")]
pub struct NativeDraft(Rc<Draftable>);

fn ended() -> napi::Error {
    misuse("the version was ended before")
}

#[napi]
impl NativeDraft {
    /// The bytes in place; `null` if there are none that JavaScript can have.
    #[napi]
    pub fn expose<'env>(
        &self,
        env: &'env Env,
        offset: i64,
        length: i64,
        keeps: bool,
    ) -> Result<Option<ArrayBuffer<'env>>> {
        let mut draft = self.0.0.borrow_mut();
        let draft = draft.as_mut().ok_or_else(ended)?;
        if !draft.is_in_place() {
            return Ok(None);
        }
        let exposed = draft.expose(unsigned(offset)?, unsigned(length)?, keeps);
        share(env, exposed.map_err(|e| thrown(&e))?)
    }

    /// Writes bytes.
    #[napi]
    pub fn write(&self, offset: i64, bytes: Uint8ArraySlice<'_>) -> Result<()> {
        let mut draft = self.0.0.borrow_mut();
        let draft = draft.as_mut().ok_or_else(ended)?;
        let written = draft.write(unsigned(offset)?, &bytes);
        written.map_err(|e| thrown(&e))
    }

    /// Publishes it, and gives the lock back; the version.
    #[napi]
    pub fn commit(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let draft = self.0.0.take().ok_or_else(ended)?;
        Ok(app.begin(token, async move { Ok(Outcome::of(draft.commit().await?)) }))
    }

    /// Discards it.
    #[napi]
    pub fn abandon(&self) {
        if let Some(draft) = self.0.0.take() {
            draft.abandon();
        }
    }
}

/// An owner of a block's lock.
trait Locking {
    /// The error for using it after it was closed.
    const ENDED: &'static str;

    fn lock(&self) -> &BlockLock;
}

impl Locking for BlockWriter {
    const ENDED: &'static str = "the writer was closed before";

    fn lock(&self) -> &BlockLock {
        BlockWriter::lock(self)
    }
}

impl Locking for BlockLock {
    const ENDED: &'static str = "the lock was given back before";

    fn lock(&self) -> &BlockLock {
        self
    }
}

/// A lock until it is given back. Dropped, it is given back.
struct Held<T>(RefCell<Option<Rc<T>>>);

impl<T: Locking> Held<T> {
    fn new(held: T) -> Self {
        Held(RefCell::new(Some(Rc::new(held))))
    }

    fn get(&self) -> Result<Rc<T>> {
        let held = self.0.borrow().clone();
        held.ok_or_else(|| misuse(T::ENDED))
    }

    fn take(&self) -> Result<Rc<T>> {
        self.0.take().ok_or_else(|| misuse(T::ENDED))
    }

    fn fence(&self) -> Result<f64> {
        Ok(version(self.get()?.lock().fence()))
    }

    fn is_held(&self) -> bool {
        self.get().is_ok_and(|held| held.lock().is_held())
    }
}

/// The lock of a block under which many versions are written. Dropped, it is given back.
#[napi(js_name = "Writer")]
pub struct NativeWriter(Held<BlockWriter>);

#[napi]
impl NativeWriter {
    /// Larger than that of every lock of this block before.
    #[napi(getter)]
    pub fn fence(&self) -> Result<f64> {
        self.0.fence()
    }

    /// Whether the lock is held, as far as is known here.
    #[napi(getter)]
    pub fn is_held(&self) -> bool {
        self.0.is_held()
    }

    /// Begins a version.
    #[napi]
    pub fn begin(&self) -> Result<NativeVersion> {
        let writer = self.0.get()?;
        let held = writer.lock();
        let bytes = match held.block().is_viewable() && !held.is_inherited() {
            true => {
                let writing = writer.begin().map_err(|e| thrown(&e))?;
                Bytes::InPlace(Box::new(writing))
            }
            false => Bytes::Waiting(Vec::new()),
        };
        let version = Some((writer, bytes));
        Ok(NativeVersion(RefCell::new(version)))
    }

    /// Gives the lock back, at the end of a version that is being written.
    #[napi]
    pub fn close(&self) {
        // One that was closed before stays closed.
        let _ = self.0.take();
    }
}

/// The bytes of a version that a writer writes.
enum Bytes {
    InPlace(Box<Writing>),
    /// What is sent with the end of the version.
    Waiting(Vec<(u64, Vec<u8>)>),
}

/// A version that is being written, under the lock of a writer. Dropped, it is discarded.
#[napi(js_name = "Version")]
pub struct NativeVersion(RefCell<Option<(Rc<BlockWriter>, Bytes)>>);

#[napi]
impl NativeVersion {
    /// As that of a draft.
    #[napi]
    pub fn expose<'env>(
        &self,
        env: &'env Env,
        offset: i64,
        length: i64,
        keeps: bool,
    ) -> Result<Option<ArrayBuffer<'env>>> {
        let mut version = self.0.borrow_mut();
        let (writer, bytes) = version.as_mut().ok_or_else(ended)?;
        let Bytes::InPlace(writing) = bytes else {
            return Ok(None);
        };
        let exposed = writer.expose(writing, unsigned(offset)?, unsigned(length)?, keeps);
        share(env, exposed.map_err(|e| thrown(&e))?)
    }

    /// Writes bytes within the block.
    #[napi]
    pub fn write(&self, offset: i64, bytes: Uint8ArraySlice<'_>) -> Result<()> {
        let offset = unsigned(offset)?;
        match self.0.borrow_mut().as_mut().ok_or_else(ended)? {
            (_, Bytes::InPlace(writing)) => writing
                .write(offset, &bytes)
                .map_err(|e| misuse(e.to_string())),
            (_, Bytes::Waiting(pieces)) => {
                pieces.push((offset, bytes.to_vec()));
                Ok(())
            }
        }
    }

    /// Publishes it; its number.
    #[napi]
    pub fn commit(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let (writer, bytes) = self.0.take().ok_or_else(ended)?;
        Ok(app.begin(token, async move {
            Ok(Outcome::of(match bytes {
                Bytes::InPlace(writing) => writer.publish(*writing)?,
                Bytes::Waiting(pieces) => writer.write_pieces(&pieces).await?,
            }))
        }))
    }

    /// Discards it.
    #[napi]
    pub fn abandon(&self) {
        self.0.take();
    }
}

/// A block's lock.
#[napi(js_name = "Lock")]
pub struct NativeLock(Held<BlockLock>);

#[napi]
impl NativeLock {
    /// Larger than that of every lock of this block before.
    #[napi(getter)]
    pub fn fence(&self) -> Result<f64> {
        self.0.fence()
    }

    /// Whether it is held, as far as is known here.
    #[napi(getter)]
    pub fn is_held(&self) -> bool {
        self.0.is_held()
    }

    /// Renews its lease.
    #[napi]
    pub fn renew(&self, app: &NativeApp, token: i64, lease_ms: Option<f64>) -> Result<bool> {
        let (held, lease) = (self.0.get()?, lease_ms.map(time).transpose()?);
        Ok(app.begin(token, async move {
            held.renew(lease).await?;
            Ok(Outcome::nothing())
        }))
    }

    /// Gives it back.
    #[napi]
    pub fn unlock(&self, app: &NativeApp, token: i64) -> Result<bool> {
        let held = self.0.take()?;
        Ok(app.begin(token, async move {
            match Rc::try_unwrap(held) {
                Ok(held) => held.unlock().await?,
                // While it is being renewed: the last one gives it back.
                Err(held) => drop(held),
            }
            Ok(Outcome::nothing())
        }))
    }
}
