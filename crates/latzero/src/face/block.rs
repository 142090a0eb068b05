//! Memory blocks: mapped if the server passed a descriptor, else copied through the server.
//!
//! A [`Block`] is a handle for a name. The block behind it may change: the app reconnects, the
//! block grows into a new generation, the server ends. Reads continue from the mapping while there
//! is one; operations that need the server first attach again if necessary. Reading a mapped block,
//! waiting for its next version and writing under a lock that is already held work without the
//! server.
//!
//! A server that restarts after a crash has no shared memory. A client that has it mapped offers it
//! when it attaches after the reconnect, so the same handles keep working. For this each mapped
//! shared block keeps its file descriptor, one per attachment. If the process may open no more
//! (getrlimit(2), `RLIMIT_NOFILE`), the block works but cannot be offered.
//!
//! Limits: 1,024 futures of one app wait for blocks at a time ([`Block::wait_for`], else
//! `overloaded`); 64 attempts are made to read a complete version (else `contended`); and a version
//! of a copied block is at most as large as the server's `limits.max_frame`.

mod changes;
mod lock;
mod sealed;
mod shared;
mod typed;
mod waiter;
mod write;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use latzero_crypto::{Suite, text};
use latzero_protocol::limits::{READ_SLACK, TTL_MAX_MS};
use latzero_protocol::memory::{Access, Kind, Layout, Lifetime, LockMode};
use latzero_protocol::{BlockId, Code, Ran, Raw};
use latzero_shm::Attachment;
use serde_json::{Value, json};

use crate::drive::core::Core;
use crate::error::Error;
use crate::face::app::App;
use crate::face::outgoing::Calling;
use crate::keys::random;
use crate::payload::{Payload, Reply};
use crate::sync::lock;
use crate::wire::message::Message;

pub use changes::Changes;
pub use lock::{BlockLock, LOCKS_VARIABLE};
pub use typed::TypedBlock;
pub use write::{BlockWriter, Draft};

pub use latzero_shm::{Element, Exposed, OwnedView, PrivateMapping, View, Writing};
use sealed::Edit;
pub(crate) use shared::{BlockState, Blocks, Current};
use shared::{Described, LockState};
use waiter::Wait;

/// How long to wait for a request that may move a whole block.
const MOVE_TIME: Duration = Duration::from_secs(120);

/// A wait checks after this time what no wakeup tells it.
pub(crate) const WAIT_SLICE: Duration = Duration::from_millis(100);

/// The most bytes of one request if a block is copied through the server.
const CHUNK_BYTES: usize = 4 * 1024 * 1024;

/// Attempts to read a complete version before the error `contended`.
const TRIES_MAX: u32 = 64;

/// A block's name in a pool, before it is created or attached.
#[derive(Debug, Clone)]
#[must_use = "nothing happens before `create` or `attach`"]
pub struct BlockName {
    app: App,
    pool: Option<String>,
    id: String,
    layout: Option<Value>,
}

impl BlockName {
    pub(crate) fn new(app: &App, id: &str) -> Self {
        BlockName {
            app: app.clone(),
            pool: None,
            id: id.to_owned(),
            layout: None,
        }
    }

    /// The pool of the block. Required if the app is in several pools.
    pub fn pool(mut self, pool: &str) -> Self {
        self.pool = Some(pool.to_owned());
        self
    }

    /// The layout of the block, in numpy's notation: `layout("<f4", &[1080, 1920])`. A block with
    /// another layout is refused.
    pub fn layout(mut self, dtype: &str, shape: &[u64]) -> Self {
        self.layout = Some(json!({"dtype": dtype, "shape": shape}));
        self
    }

    /// Adds names for the elements of the last dimension to the layout, which is set before:
    /// `layout("<f4", &[1000, 2]).fields(&["x", "y"])`.
    pub fn fields<T: AsRef<str>>(mut self, names: &[T]) -> Self {
        if let Some(layout) = &mut self.layout {
            layout["fields"] = names.iter().map(AsRef::as_ref).collect();
        }
        self
    }

    /// Creates the block, with `size` bytes.
    pub fn create(self, size: u64) -> CreateBlock {
        let mut request = json!({"size": size});
        if let Some(layout) = &self.layout {
            request["layout"] = layout.clone();
        }
        CreateBlock {
            name: self,
            request,
        }
    }

    /// Attaches to the block, for reading.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `layout_mismatch`, `quota`.
    pub async fn attach(self) -> Result<Block, Error> {
        self.attach_as(Access::Read).await
    }

    /// Attaches to the block, for reading and writing.
    ///
    /// # Errors
    /// As [`BlockName::attach`].
    pub async fn attach_writable(self) -> Result<Block, Error> {
        self.attach_as(Access::Write).await
    }

    /// Removes the block, even if others are attached.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`.
    pub async fn remove(self) -> Result<(), Error> {
        let mut request = json!({"action": "memory_remove", "block_id": self.id});
        if let Some(pool) = &self.pool {
            request["pool"] = pool.as_str().into();
            if let Some(fence) = lock::inherited_fence(pool, &self.id) {
                request["lock"] = fence.to_string().into();
            }
        }
        self.app.request(&request).await.map(drop)
    }

    async fn attach_as(self, access: Access) -> Result<Block, Error> {
        let mut request = json!({"mode": access.as_str()});
        if let Some(layout) = &self.layout {
            request["layout"] = layout.clone();
        }
        self.open("memory_attach", request, access).await
    }

    async fn open(self, action: &str, request: Value, access: Access) -> Result<Block, Error> {
        BlockId::check(&self.id)
            .map_err(|e| Error::new(Code::InvalidName, e.to_string()).with_ran(Ran::No))?;
        let core = self.app.core();
        let pool = core.pool_of(self.pool.as_deref())?;
        let message = message(action, pool.as_deref(), &self.id, &request);
        let uid = request["block_uid"].as_str().map(str::to_owned);
        // Locked until the handle is added, so that a concurrent drop does not detach it.
        let mut opening = Blocks::of(core).open(core, pool.as_deref(), &self.id);
        let reply = Calling::of_message(&self.app, message, Ok)
            .within(MOVE_TIME)
            .await;
        opening.is_answered = true;
        let reply = reply?;
        let current = Current::of_reply(core, reply, (pool.as_deref(), &self.id))?;
        let block = Block::new(&self.app, access, current);
        if uid.is_some() && request["if_exists"] != "attach" && uid != block.uid().map(encode) {
            let text = format!("the server did not create block '{}' as requested", self.id);
            return Err(Error::new(Code::Integrity, text));
        }
        block.verify_newest().await;
        Ok(block)
    }
}

/// A block that is about to be created.
#[derive(Debug, Clone)]
#[must_use = "nothing is made before it is sent"]
pub struct CreateBlock {
    name: BlockName,
    request: Value,
}

impl CreateBlock {
    /// Stores it in a file of the server's data directory, so that it survives restarts.
    pub fn persistent(mut self) -> Self {
        self.request["kind"] = Kind::Persistent.as_str().into();
        self
    }

    /// Makes it a raw block, written in place without snapshots: its users must take its lock.
    pub fn raw(mut self) -> Self {
        self.request["consistency"] = "raw".into();
        self
    }

    /// The number of slots: how many versions it holds, two to four (default two). With three or
    /// more a [`View`] stays valid for longer.
    pub fn slots(mut self, slots: u32) -> Self {
        self.request["slots"] = slots.into();
        self
    }

    /// Only these apps may read it, and this one, and those that [`CreateBlock::writable_by`]
    /// names.
    pub fn readable_by(mut self, apps: &[&str]) -> Self {
        let permissions = &mut self.request["permissions"];
        permissions["read"] = json!(apps);
        // Apps that may write may also read: without a list, everybody could write.
        if permissions["write"].is_null() {
            permissions["write"] = json!([]);
        }
        self
    }

    /// Only these apps may write it, and this one.
    pub fn writable_by(mut self, apps: &[&str]) -> Self {
        self.request["permissions"]["write"] = json!(apps);
        self
    }

    /// Removes it when its last attachment ends.
    pub fn while_attached(mut self) -> Self {
        self.request["lifetime"] = Lifetime::Attached.as_str().into();
        self
    }

    /// If the block exists and its size and layout match, attaches to it.
    pub fn or_attach(mut self) -> Self {
        self.request["if_exists"] = "attach".into();
        self
    }

    /// Creates it, and attaches to it for writing.
    ///
    /// # Errors
    /// `block_exists`, `quota`, `too_large`, `storage`, `layout_mismatch`.
    pub async fn send(self) -> Result<Block, Error> {
        let CreateBlock { name, mut request } = self;
        let core = name.app.core();
        let pool = core.pool_of(name.pool.as_deref())?;
        let sealed = pool.as_deref().and_then(|pool| core.sealed_pool(pool));
        if sealed.is_some_and(|pool| pool.suite() == Some(Suite::Sealed)) {
            request["block_uid"] = encode(random()?).into();
        }
        name.open("memory_create", request, Access::Write).await
    }
}

/// A block that this app is attached to. Cheap to clone; when the last clone is dropped, the app
/// detaches.
///
/// ```no_run
/// # async fn example(app: latzero::App) -> Result<(), latzero::Error> {
/// use std::time::Duration;
///
/// let frame = app.block("frame").layout("<f4", &[1080, 1920]);
/// let frame = frame.create(1080 * 1920 * 4).send().await?;
/// let mut draft = frame.write(Duration::from_secs(1)).await?;
/// draft.write(0, &1.5_f32.to_le_bytes())?;
/// let version = draft.commit().await?;
///
/// // In another process of the pool:
/// let frame = app.block("frame").attach().await?;
/// let version = frame.wait_for(version - 1, Duration::from_secs(1)).await?;
/// let (bytes, version) = frame.read().await?;
/// let sum = frame
///     .view(|view| (0..100).map(|i| view.load::<f32>(i).unwrap_or(0.0)).sum::<f32>())
///     .await?;
///
/// // A block of any size can be an argument: the handler calls `request.block("frame")?`.
/// let call = app.call("brightness", &frame.reference()).block(&frame);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Block {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    app: App,
    access: Access,
    shared: Arc<BlockState>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        let core = self.app.core();
        // The server detaches a block that came with a call, unless it was attached again.
        let is_attached = self.shared.is_attached.load(Ordering::Acquire);
        Blocks::of(core).forget(core, &self.shared, is_attached);
    }
}

/// One message about a block.
fn message(action: &str, pool: Option<&str>, id: &str, more: &Value) -> Message {
    let mut message = Message::new(action);
    if let Some(pool) = pool {
        message.string("pool", pool);
    }
    message.string("block_id", id);
    for (key, value) in more.as_object().into_iter().flatten() {
        message.json(key, value.to_string().as_bytes());
    }
    message
}

impl Block {
    fn new(app: &App, access: Access, current: Current) -> Block {
        Block::make(app, access, current, false)
    }

    /// A block that came with a call.
    pub(crate) fn lent(app: &App, current: Current) -> Block {
        let access = current.described.access;
        Block::make(app, access, current, true)
    }

    fn make(app: &App, access: Access, current: Current, is_lent: bool) -> Block {
        let shared = Arc::new(BlockState::new(app.core(), current, !is_lent));
        Blocks::of(app.core()).add(&shared, access, is_lent);
        Block {
            inner: Arc::new(Inner {
                app: app.clone(),
                access,
                shared,
            }),
        }
    }

    fn shared(&self) -> &Arc<BlockState> {
        &self.inner.shared
    }

    /// The app that this handle belongs to.
    #[must_use]
    pub fn app(&self) -> &App {
        &self.inner.app
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.shared().id
    }

    /// Its pool.
    #[must_use]
    pub fn pool(&self) -> &str {
        &self.shared().pool
    }

    /// Its last known size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        match self.sealed() {
            Some(sealed) => sealed.length(),
            None => self.described(|d| d.size),
        }
    }

    /// Its last known generation: one more with each resize.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.described(|d| d.generation)
    }

    /// Its layout, in numpy's notation.
    #[must_use]
    pub fn layout(&self) -> Option<Value> {
        self.described(|d| d.layout.clone())
    }

    /// Whether its bytes are mapped into this process, rather than copied through the server.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        lock(&self.shared().current).attachment.is_some()
    }

    /// Whether its bytes can be viewed in place; those of persistent and sealed blocks cannot.
    #[must_use]
    pub fn is_viewable(&self) -> bool {
        let held = lock(&self.shared().current);
        let is_mapped = held.attachment.as_ref().is_some_and(|a| a.is_mapped());
        is_mapped && self.sealed().is_none()
    }

    /// Whether the server is connected and has the block. If not, a mapped block can still be read:
    /// it shows the last version.
    #[must_use]
    pub fn is_live(&self) -> bool {
        let held = lock(&self.shared().current);
        let is_current = self.inner.app.core().epoch_now() == Some(held.epoch);
        is_current && !self.shared().is_gone.load(Ordering::Acquire)
    }

    fn described<R>(&self, f: impl FnOnce(&Described) -> R) -> R {
        f(&lock(&self.shared().current).described)
    }

    /// Its newest version, as far as it is known without a request; 0 if it was never written.
    #[must_use]
    pub fn version(&self) -> u64 {
        let held = lock(&self.shared().current);
        match &held.attachment {
            Some(attachment) => attachment.version(),
            // A new connection has received no events yet.
            None => match self.shared().newest.load(Ordering::Acquire) {
                0 => held.described.version,
                newest => newest,
            },
        }
    }

    /// A reference to this block for the data of a call; [`crate::Call::block`] passes the block
    /// itself.
    #[must_use]
    pub fn reference(&self) -> Value {
        json!({"$block": self.id(), "pool": self.pool(), "version": self.version()})
    }

    /// The block's bytes as numbers of type `T`.
    ///
    /// # Errors
    /// `layout_mismatch` if its layout has another element type.
    pub fn typed<T: Element>(&self) -> Result<TypedBlock<T>, Error> {
        TypedBlock::of(self)
    }

    /// All bytes of its newest version, and the version.
    ///
    /// # Errors
    /// `contended` if writers were too busy; the server's error if the block is not mapped.
    pub async fn read(&self) -> Result<(Vec<u8>, u64), Error> {
        if let Some(sealed) = self.sealed() {
            return self.open(sealed, 0, None).await;
        }
        for _ in 0..TRIES_MAX {
            let held = self.readable().await?;
            if let Some(attachment) = &held.attachment {
                return attachment.read().map_err(|e| read_error(self.id(), e));
            }
            let size = held.described.size;
            let mut bytes = Vec::new();
            let mut version = None;
            loop {
                let from = bytes.len() as u64;
                let to = size.min(from + self.chunk() as u64);
                match self.fetch(from..to, version).await {
                    // All of it in one part, which needs no further copy.
                    Ok((part, v)) if from == 0 && to == size => return Ok((part, v)),
                    Ok((part, v)) => {
                        bytes.extend_from_slice(&part);
                        version = Some(v);
                        if to == size {
                            return Ok((bytes, v));
                        }
                    }
                    // There is a newer version: start again.
                    Err(e) if e.kind() == Code::VersionConflict => break,
                    // Its size has changed.
                    Err(e) if e.kind() == Code::OutOfRange => {
                        self.shared().must_attach.store(true, Ordering::Release);
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
        }
        Err(contended(self.id()))
    }

    /// Reads bytes of its newest version from `offset` on; returns the version.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub async fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<u64, Error> {
        let Some(sealed) = self.sealed() else {
            return self.slot_into(offset, to).await;
        };
        let (bytes, version) = self.open(sealed, offset, Some(to.len() as u64)).await?;
        to.copy_from_slice(&bytes);
        Ok(version)
    }

    /// Reads bytes of the newest version as they are in its slot: ciphertext if it is sealed.
    async fn slot_into(&self, offset: u64, to: &mut [u8]) -> Result<u64, Error> {
        let held = self.readable().await?;
        if let Some(attachment) = &held.attachment {
            return attachment
                .read_into(offset, to)
                .map_err(|e| read_error(self.id(), e));
        }
        for _ in 0..TRIES_MAX {
            let mut version = None;
            let mut done = 0;
            while done < to.len() || version.is_none() {
                let n = (to.len() - done).min(self.chunk());
                let from = offset.saturating_add(done as u64);
                match self
                    .fetch(from..from.saturating_add(n as u64), version)
                    .await
                {
                    Ok((part, v)) => {
                        to[done..done + n].copy_from_slice(&part);
                        done += n;
                        version = Some(v);
                    }
                    Err(e) if e.kind() == Code::VersionConflict => break,
                    Err(e) => return Err(e),
                }
            }
            if let Some(version) = version.filter(|_| done == to.len()) {
                return Ok(version);
            }
        }
        Err(contended(self.id()))
    }

    /// Passes the newest version to `f` in place, without a copy. The result of `f` is only
    /// returned if nobody overwrote the version in the meantime; otherwise `f` runs again, a few
    /// times. In a sealed pool `f` gets a decrypted copy.
    ///
    /// # Errors
    /// `contended` if writers were too busy; `storage` if the block is not mapped: use
    /// [`Block::read`] instead.
    pub async fn view<R>(&self, mut f: impl FnMut(View<'_>) -> R) -> Result<R, Error> {
        if let Some(sealed) = self.sealed() {
            return self.view_opened(sealed, f).await;
        }
        let attachment = self.readable().await?.attachment;
        let Some(attachment) = attachment.filter(|a| a.is_mapped()) else {
            return Err(not_mapped(self.id(), "read"));
        };
        for _ in 0..TRIES_MAX {
            let view = attachment.view().map_err(|e| read_error(self.id(), e))?;
            let result = f(view);
            if view.is_valid() {
                return Ok(result);
            }
        }
        Err(contended(self.id()))
    }

    /// The newest version in place, for as long as the result is kept. Newer versions may overwrite
    /// it, which [`View::is_valid`] reports.
    ///
    /// # Errors
    /// `contended` if writers were too busy; `storage` if the block is not mapped, or is sealed:
    /// use [`Block::read`] instead.
    pub async fn owned_view(&self) -> Result<OwnedView, Error> {
        let attachment = self.readable().await?.attachment;
        let attachment = attachment.filter(|a| a.is_mapped() && self.sealed().is_none());
        let attachment = attachment.ok_or_else(|| not_mapped(self.id(), "read"))?;
        attachment
            .owned_view()
            .map_err(|e| read_error(self.id(), e))
    }

    /// Maps the block of a view once more, for code that may write by mistake what it should only
    /// read; see [`PrivateMapping`]. `None` if the block has moved since, or can't be mapped again.
    #[must_use]
    pub fn map_private(&self, view: &OwnedView) -> Option<PrivateMapping> {
        let memory = lock(&self.shared().current).memory_of(view)?;
        view.map_private(memory).ok()
    }

    /// Waits for a version newer than `beyond`; returns it. For a mapped block the wait does not
    /// involve the server: one thread of the app sleeps for up to 127 such waits, and ends soon
    /// after the last one.
    ///
    /// # Errors
    /// `timeout`; `no_block` if it was removed; `overloaded` if 1,024 futures wait already.
    pub async fn wait_for(&self, beyond: u64, timeout: Duration) -> Result<u64, Error> {
        let deadline = deadline(timeout);
        loop {
            let is_mapped = self.readable().await?.attachment.is_some();
            let _announced = match is_mapped {
                true => None,
                false => Some(self.changes().await?),
            };
            match Wait::run(self, beyond, deadline).await? {
                Slice::Newer(version) => return Ok(version),
                Slice::Over => return Err(timed_out(self.id())),
                Slice::Moved => {}
            }
        }
    }

    /// Attaches again if necessary; returns whether the block is mapped.
    pub(crate) async fn ensure_attached(&self) -> Result<bool, Error> {
        Ok(self.readable().await?.attachment.is_some())
    }

    fn attachment(&self) -> Option<Arc<Attachment>> {
        lock(&self.shared().current).attachment.clone()
    }

    /// Waits on this thread for `time`, without a request. A version of a block that is not mapped
    /// has to be announced.
    pub(crate) fn wait_slice(&self, beyond: u64, time: Duration) -> Result<Slice, Error> {
        use latzero_shm::Waited;
        let held = lock(&self.shared().current).held();
        let epoch = self.app().core().epoch_now();
        let waited = match &held.attachment {
            Some(attachment) => attachment.wait(beyond, Some(time)),
            None => match self.shared().newest.load(Ordering::Acquire) {
                newest if newest > beyond => Waited::Newer(newest),
                _ => Waited::TimedOut,
            },
        };
        match waited {
            Waited::Newer(version) => return Ok(Slice::Newer(version)),
            _ if self.app().core().is_ended() => return Err(Core::closed_error()),
            Waited::Closed => self.shared().is_gone.store(true, Ordering::Release),
            // If the newer generation is not available now, the futex no longer changes.
            Waited::Superseded if epoch.is_none() => std::thread::sleep(time),
            Waited::Superseded | Waited::TimedOut => {}
        }
        let is_current = epoch.is_none_or(|epoch| epoch == held.epoch);
        if self.shared().is_gone.load(Ordering::Acquire) && (is_current || waited == Waited::Closed)
        {
            return Err(removed(self.id()));
        }
        Ok(match epoch.is_some() && self.must_move(&held, epoch) {
            true => Slice::Moved,
            false => Slice::Over,
        })
    }

    /// A stream of new versions. If several appear between two reads, it returns only the newest.
    ///
    /// # Errors
    /// The server's error.
    pub async fn changes(&self) -> Result<Changes, Error> {
        Changes::open(self).await
    }

    /// Writes bytes through the server; returns the version. If the app has the block's lock, it
    /// writes under that. Bytes that fit into one message (`limits.max_frame`) are one version;
    /// more need several messages, each of which is a version.
    ///
    /// # Errors
    /// `out_of_range`, `forbidden`, `locked`.
    pub async fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.write_through(offset, bytes, None, None).await
    }

    /// Like [`Block::write_at`], but only if the block has version `version`.
    ///
    /// # Errors
    /// `version_conflict`, and as [`Block::write_at`].
    pub async fn write_if(&self, version: u64, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.write_through(offset, bytes, Some(version), None).await
    }

    fn inherited_fence(&self) -> Option<u64> {
        lock::inherited_fence(self.pool(), self.id())
    }

    /// Adds to a request the lock that the program that started this one holds.
    fn name_inherited(&self, request: &mut Value) {
        if let Some(fence) = self.inherited_fence() {
            request["lock"] = fence.to_string().into();
        }
    }

    /// Writes through the server, in as many requests as it takes.
    async fn write_through(
        &self,
        offset: u64,
        bytes: &[u8],
        mut if_version: Option<u64>,
        fence: Option<u64>,
    ) -> Result<u64, Error> {
        self.check_writable()?;
        if let Some(sealed) = self.sealed() {
            let edit = Edit {
                writes: &[(offset, bytes.to_vec())],
                if_version,
                ..Edit::default()
            };
            return self.edit(sealed, &edit).await;
        }
        let mut done = 0;
        loop {
            let n = (bytes.len() - done).min(self.room());
            let part = &bytes[done..done + n];
            let mut more = json!({"offset": offset.saturating_add(done as u64)});
            if let Some(version) = if_version {
                more["if_version"] = version.into();
            }
            if let Some(fence) = fence.or_else(|| self.inherited_fence()) {
                more["lock"] = fence.to_string().into();
            }
            let reply = self.ask_with("memory_write", &more, Some(part)).await?;
            let version = number(&reply, "version");
            self.shared().heard(version);
            done += n;
            if done >= bytes.len() {
                return Ok(version);
            }
            if_version = if_version.map(|_| version);
        }
    }

    /// Writes `bytes` at `offset` if the block has the bytes `expected` there, which must be as
    /// many; otherwise returns the bytes that it has.
    ///
    /// # Errors
    /// `out_of_range`, `forbidden`, `locked`.
    pub async fn cas(
        &self,
        offset: u64,
        expected: &[u8],
        bytes: &[u8],
    ) -> Result<Result<u64, Vec<u8>>, Error> {
        self.check_writable()?;
        if let Some(sealed) = self.sealed() {
            return self.cas_sealed(sealed, offset, expected, bytes).await;
        }
        let mut more = json!({"offset": offset, "expected": STANDARD.encode(expected)});
        self.name_inherited(&mut more);
        let reply = self.ask_with("memory_cas", &more, Some(bytes)).await?;
        if reply["swapped"] == true {
            let version = number(&reply, "version");
            self.shared().heard(version);
            return Ok(Ok(version));
        }
        let current = reply["current"].as_str().map(|text| STANDARD.decode(text));
        match current {
            Some(Ok(current)) => Ok(Err(current)),
            _ => Err(unreadable()),
        }
    }

    /// Begins a new version under the block's lock, for which it waits at most `wait`. The lock is
    /// released with the draft. [`Draft::commit`] publishes the version. Dropping the draft
    /// publishes it too, and the block's next use returns an error of that; a draft that is dropped
    /// by a panic is discarded.
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub async fn write(&self, wait: Duration) -> Result<Draft, Error> {
        let lock = self.lock(LockMode::Exclusive, wait).await?;
        Draft::begin(lock).await
    }

    /// Takes the block's lock to write many versions, each of which is written and published
    /// without the server.
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub async fn writer(&self, wait: Duration) -> Result<BlockWriter, Error> {
        let lock = self.lock(LockMode::Exclusive, wait).await?;
        BlockWriter::new(lock).await
    }

    /// Takes the block's lock, for which it waits at most `wait`. Dropping the guard releases it.
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub async fn lock(&self, mode: LockMode, wait: Duration) -> Result<BlockLock, Error> {
        let lock = BlockLock::take(self, mode, wait, None).await?;
        Ok(lock.used_by_edits(mode))
    }

    /// Like [`Block::lock`], but the lock expires after `lease` unless it is renewed.
    ///
    /// # Errors
    /// As [`Block::lock`].
    pub async fn lock_for(
        &self,
        mode: LockMode,
        wait: Duration,
        lease: Duration,
    ) -> Result<BlockLock, Error> {
        let lock = BlockLock::take(self, mode, wait, Some(lease)).await?;
        Ok(lock.used_by_edits(mode))
    }

    /// Changes the size of the block, which gets a new generation that everybody continues with.
    /// Added bytes are zeros. In a sealed pool it is a new version, with at most the size that the
    /// block was created with.
    ///
    /// # Errors
    /// `forbidden`, `locked`, `quota`, `too_large`, `storage`.
    pub async fn resize(&self, size: u64) -> Result<(), Error> {
        if let Some(sealed) = self.sealed() {
            self.check_layout(size)?;
            let edit = Edit {
                length: Some(size),
                ..Edit::default()
            };
            return self.edit(sealed, &edit).await.map(drop);
        }
        let mut more = json!({"size": size});
        self.name_inherited(&mut more);
        self.ask("memory_resize", &more).await?;
        self.shared().must_attach.store(true, Ordering::Release);
        self.readable().await.map(drop)
    }

    /// Seals the content of a block in an encrypted pool with the keys of the pool's epoch, if it
    /// was sealed with earlier ones; the new version, if there is one. Content that does not count
    /// any more, since a writer was removed, is only taken with `keeps_stale`: that writer may have
    /// changed it until then, and nobody can tell.
    ///
    /// # Errors
    /// `bad_message` if the block is not sealed; `stale_epoch`, `forbidden`, `locked`, `integrity`.
    pub async fn reencrypt(&self, keeps_stale: bool) -> Result<Option<u64>, Error> {
        let sealed = self.sealed().ok_or_else(|| {
            let text = format!("block '{}' is not sealed", self.id());
            Error::new(Code::BadMessage, text).with_ran(Ran::No)
        })?;
        self.reseal(sealed, keeps_stale).await
    }

    /// Whether the block's layout fits into `size` bytes.
    fn check_layout(&self, size: u64) -> Result<(), Error> {
        let text = self.layout().map(|layout| layout.to_string());
        let raw = text.as_deref().and_then(|text| Raw::new(text).ok());
        let layout = raw.and_then(|raw| Layout::parse(raw).ok());
        let needed = layout.and_then(|layout| layout.bytes());
        let Some(needed) = needed.filter(|needed| *needed > size) else {
            return Ok(());
        };
        let text = format!("the block's layout needs {needed} bytes, more than {size}");
        Err(Error::new(Code::LayoutMismatch, text).with_ran(Ran::No))
    }

    /// Flushes a persistent block to disk; returns the version on disk.
    ///
    /// # Errors
    /// `bad_message` if the block is not persistent; `storage`.
    pub async fn flush(&self) -> Result<u64, Error> {
        let reply = self.ask("memory_flush", &json!({})).await?;
        Ok(number(&reply, "version"))
    }

    /// Removes the block, even if others are attached.
    ///
    /// # Errors
    /// `forbidden`, `locked`.
    pub async fn remove(&self) -> Result<(), Error> {
        let mut more = json!({});
        self.name_inherited(&mut more);
        self.ask("memory_remove", &more).await?;
        self.shared().is_gone.store(true, Ordering::Release);
        self.shared().wake_waiting();
        Ok(())
    }

    /// Its full description by the server.
    ///
    /// # Errors
    /// `no_block`.
    pub async fn info(&self) -> Result<Value, Error> {
        self.ask("memory_info", &json!({})).await
    }

    /// An error since the last use that could not be returned: a version that could not be
    /// published when its draft was dropped.
    fn check_fault(&self) -> Result<(), Error> {
        lock(&self.shared().fault).take().map_or(Ok(()), Err)
    }

    /// Whether the state is out of date for connection `epoch`.
    fn must_move(&self, held: &LockState, epoch: Option<u32>) -> bool {
        self.shared().must_attach.load(Ordering::Acquire)
            || epoch.is_some_and(|epoch| epoch != held.epoch)
            || held.attachment.as_deref().is_some_and(is_superseded)
    }

    /// The state to read from; attaches again if the block moved or the app reconnected.
    async fn readable(&self) -> Result<LockState, Error> {
        self.check_fault()?;
        let held = lock(&self.shared().current).held();
        let epoch = self.app().core().epoch_now();
        if !self.must_move(&held, epoch) {
            return Ok(held);
        }
        // The mapping still shows the last version, which is better than an error; `is_live` is
        // false then.
        let is_mapped = held.attachment.is_some();
        let is_gone = self.shared().is_gone.load(Ordering::Acquire);
        if is_mapped && (epoch.is_none() || is_gone && epoch == Some(held.epoch)) {
            return Ok(held);
        }
        let attached = self.shared().attach(self.app(), self.inner.access).await;
        match attached {
            Err(e) if is_mapped && matches!(e.kind(), Code::NoBlock | Code::Disconnected) => {
                Ok(held)
            }
            other => other,
        }
    }

    /// What was attached for reading is not written, also through the server.
    fn check_writable(&self) -> Result<(), Error> {
        match self.inner.access {
            Access::Write => Ok(()),
            Access::Read => Err(read_only(self.id())),
        }
    }

    /// The state to write to.
    async fn writable(&self) -> Result<LockState, Error> {
        if self.shared().is_gone.load(Ordering::Acquire) {
            return Err(removed(self.id()));
        }
        self.check_writable()?;
        self.readable().await
    }

    async fn fetch(
        &self,
        range: Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Error> {
        let mut more = json!({"offset": range.start, "length": range.end - range.start});
        if let Some(version) = if_version {
            more["if_version"] = version.into();
        }
        let message = self.shared().message("memory_read", &more);
        let reply = Calling::of_message(&self.inner.app, message, Ok).await?;
        let (json, bytes) = match (reply.payload, reply.beside) {
            (Payload::Bytes(bytes), Some(beside)) => (beside.json, bytes),
            (Payload::Json(json), _) => {
                let value: Value = serde_json::from_str(&json).unwrap_or_default();
                let data = value["data"].as_str().map(|text| STANDARD.decode(text));
                let Some(Ok(bytes)) = data else {
                    return Err(unreadable());
                };
                (json.into(), bytes)
            }
            _ => return Err(unreadable()),
        };
        let value: Value = serde_json::from_str(&json).unwrap_or_default();
        let version = number(&value, "version");
        self.shared().heard(version);
        if bytes.len() as u64 != range.end - range.start {
            return Err(unreadable());
        }
        Ok((bytes, version))
    }

    async fn ask(&self, action: &str, more: &Value) -> Result<Value, Error> {
        self.ask_with(action, more, None).await
    }

    async fn ask_with(
        &self,
        action: &str,
        more: &Value,
        bytes: Option<&[u8]>,
    ) -> Result<Value, Error> {
        self.check_fault()?;
        let ask = || {
            let mut message = self.shared().message(action, more);
            if let Some(bytes) = bytes {
                message.payload("data", Payload::Bytes(bytes.to_vec()));
            }
            Calling::of_message(&self.inner.app, message, Reply::into).within(MOVE_TIME)
        };
        let known = lock(&self.shared().current).held();
        match ask().await {
            Err(e) if e.kind() == Code::NoBlock && self.is_back(&known).await => ask().await,
            answer => answer,
        }
    }

    /// Whether the server has the block now, although it did not know it before: `known` is from an
    /// earlier connection, and the block was offered over this one.
    async fn is_back(&self, known: &LockState) -> bool {
        known.attachment.is_some()
            && self.app().core().epoch_now() != Some(known.epoch)
            && self.readable().await.is_ok()
            && self.is_live()
    }

    /// Bytes that fit into one message.
    fn room(&self) -> usize {
        let link = self.inner.app.core().outbox.link();
        link.map_or(64 * 1024, |link| {
            let room = link.max_frame.saturating_sub(READ_SLACK);
            if link.attachments { room } else { room / 4 * 3 }.max(1)
        })
    }

    /// Bytes that are read with one request; more would only wait in buffers.
    fn chunk(&self) -> usize {
        self.room().min(CHUNK_BYTES)
    }
}

/// How a short wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slice {
    /// There is a newer version: this one.
    Newer(u64),
    /// The time ended.
    Over,
    /// The block must be attached again.
    Moved,
}

/// When a wait of `timeout` ends. A wait longer than the server's maximum has no deadline.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(Duration::from_millis(TTL_MAX_MS))
}

fn is_superseded(attachment: &Attachment) -> bool {
    attachment.state() != latzero_shm::State::Live
}

fn encode(uid: [u8; 16]) -> String {
    text::encode(&uid)
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

fn unreadable() -> Error {
    Error::new(
        Code::BadMessage,
        "the server's reply about a block could not be read",
    )
    .with_ran(Ran::Unknown)
}

fn contended(id: &str) -> Error {
    Error::new(
        Code::Contended,
        format!(
            "block '{id}' is written too often to read a consistent version; try again, or \
            recreate it with more slots"
        ),
    )
}

fn removed(id: &str) -> Error {
    Error::new(
        Code::NoBlock,
        format!("block '{id}' was removed, or was lost with its server"),
    )
}

/// The error for in-place access to a block that is not mapped in this process.
fn not_mapped(id: &str, verb: &str) -> Error {
    let text = format!(
        "block '{id}' is not mapped in this process: {verb} it by copying, with `{verb}`. \
         Persistent and encrypted blocks are never mapped, and no block is over TCP"
    );
    Error::new(Code::Storage, text).with_ran(Ran::No)
}

pub(crate) fn timed_out(id: &str) -> Error {
    Error::new(
        Code::Timeout,
        format!("there was no new version of block '{id}' in time"),
    )
}

fn read_error(id: &str, error: latzero_shm::ReadError) -> Error {
    use latzero_shm::ReadError;
    match error {
        ReadError::OutOfRange => Error::new(
            Code::OutOfRange,
            format!("the range is outside block '{id}'"),
        ),
        ReadError::Contended | ReadError::Version(_) => contended(id),
        ReadError::Fault(fault) => Error::new(
            Code::Storage,
            format!("block '{id}' can't be read: {fault}"),
        )
        .with_source(fault),
    }
}

fn read_only(id: &str) -> Error {
    let text = format!(
        "block '{id}' is open for reading only: open it for writing, or have the caller pass it as \
         writable"
    );
    Error::new(Code::Forbidden, text).with_ran(Ran::No)
}

fn write_error(id: &str, error: latzero_shm::WriteError) -> Error {
    use latzero_shm::WriteError;
    match error {
        WriteError::OutOfRange => Error::new(
            Code::OutOfRange,
            format!("the range is outside block '{id}'; nothing was written"),
        ),
        WriteError::LeaseLost => Error::new(
            Code::LockLost,
            format!("the lock of block '{id}' was lost; the version was not published"),
        )
        .with_ran(Ran::No),
        WriteError::ReadOnly => read_only(id),
        WriteError::Contended | WriteError::Conflict { .. } => contended(id),
        WriteError::Fault(fault) => Error::new(
            Code::Storage,
            format!("block '{id}' can't be written: {fault}"),
        )
        .with_source(fault),
    }
}
