//! Memory blocks in the blocking API.

use std::pin::pin;
use std::time::{Duration, Instant};

use latzero_protocol::memory::LockMode;
use latzero_shm::{Element, Exposed, OwnedView};
use serde_json::Value;

use super::App;
use crate::error::Error;
use crate::face::block::{Slice, View, WAIT_SLICE, deadline, timed_out};

/// Runs `future`, which depends on the app, on this thread.
pub(super) fn run<T>(
    app: &crate::App,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut future = pin!(future);
    app.core()
        .block_on(None, |cx| future.as_mut().poll(cx))
        .unwrap_or_else(|| Err(super::interrupted()))
}

impl App {
    /// The memory block `id`, to create it or attach to it.
    pub fn block(&self, id: &str) -> BlockName {
        BlockName(self.0.clone(), self.0.block(id))
    }

    /// The memory blocks of a pool, as the server describes them. Without a name it is the app's
    /// only pool.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn blocks(&self, pool: Option<&str>) -> Result<Vec<Value>, Error> {
        run(&self.0, self.0.blocks(pool))
    }
}

/// A block's name in a pool, before it is created or attached; see [`crate::BlockName`].
#[derive(Debug, Clone)]
#[must_use = "nothing happens before `create` or `attach`"]
pub struct BlockName(crate::App, crate::BlockName);

impl BlockName {
    /// The pool of the block. Required if the app is in several pools.
    pub fn pool(self, pool: &str) -> Self {
        BlockName(self.0, self.1.pool(pool))
    }

    /// The layout of the block, in numpy's notation. A block with another layout is refused.
    pub fn layout(self, dtype: &str, shape: &[u64]) -> Self {
        BlockName(self.0, self.1.layout(dtype, shape))
    }

    /// Adds names for the elements of the last dimension to the layout, which is set before.
    pub fn fields<T: AsRef<str>>(self, names: &[T]) -> Self {
        BlockName(self.0, self.1.fields(names))
    }

    /// Creates the block, with `size` bytes.
    pub fn create(self, size: u64) -> CreateBlock {
        CreateBlock(self.0, self.1.create(size))
    }

    /// Attaches to the block, for reading.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `layout_mismatch`, `quota`.
    pub fn attach(self) -> Result<Block, Error> {
        run(&self.0, self.1.attach()).map(Block)
    }

    /// Attaches to the block, for reading and writing.
    ///
    /// # Errors
    /// As [`BlockName::attach`].
    pub fn attach_writable(self) -> Result<Block, Error> {
        run(&self.0, self.1.attach_writable()).map(Block)
    }

    /// Removes the block, even if others are attached.
    ///
    /// # Errors
    /// `no_block`, `forbidden`, `locked`.
    pub fn remove(self) -> Result<(), Error> {
        run(&self.0, self.1.remove())
    }
}

/// A block that is about to be created; see [`crate::CreateBlock`].
#[derive(Debug, Clone)]
#[must_use = "nothing is made before it is sent"]
pub struct CreateBlock(crate::App, crate::CreateBlock);

macro_rules! create_methods {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*);)*) => {
        $($(#[$doc])* pub fn $name(self, $($arg: $type),*) -> Self {
            CreateBlock(self.0, self.1.$name($($arg),*))
        })*
    };
}

impl CreateBlock {
    create_methods! {
        /// Stores it in a file of the server's data directory, so that it survives restarts.
        persistent();
        /// Makes it a raw block, written in place without snapshots: its users must take its lock.
        raw();
        /// The number of slots: how many versions it holds, two to four (default two).
        slots(slots: u32);
        /// Only these apps may read it, and those that may write it.
        readable_by(apps: &[&str]);
        /// Only these apps may write it, and this one.
        writable_by(apps: &[&str]);
        /// Removes it when its last attachment ends.
        while_attached();
        /// If the block exists and its size and layout match, attaches to it.
        or_attach();
    }

    /// Creates it, and attaches to it for writing.
    ///
    /// # Errors
    /// `block_exists`, `quota`, `too_large`, `storage`, `layout_mismatch`.
    pub fn send(self) -> Result<Block, Error> {
        run(&self.0, self.1.send()).map(Block)
    }
}

/// A block that this app is attached to; see [`crate::Block`], whose other methods it has too.
///
/// ```no_run
/// # fn main() -> Result<(), latzero::Error> {
/// use std::time::Duration;
///
/// let app = latzero::blocking::App::connect("latzero://camera?pool=alpha")?;
/// let frame = app.block("frame").create(1 << 20).or_attach().send()?;
/// // One lock, many versions: each is published without the server.
/// let writer = frame.writer(Duration::from_secs(1))?;
/// for n in 0..100_u64 {
///     writer.write(0, &n.to_le_bytes())?;
/// }
///
/// let app = latzero::blocking::App::connect("latzero://viewer?pool=alpha")?;
/// let frame = app.block("frame").attach()?;
/// let mut seen = 0;
/// while let Ok(version) = frame.wait_for(seen, Duration::from_secs(1)) {
///     let (bytes, _) = frame.read()?;
///     seen = version;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Block(pub(crate) crate::Block);

impl std::ops::Deref for Block {
    type Target = crate::Block;

    fn deref(&self) -> &crate::Block {
        &self.0
    }
}

impl From<crate::Block> for Block {
    /// The same block with its blocking API. Do not use it on a thread that drives the async API.
    fn from(block: crate::Block) -> Self {
        Block(block)
    }
}

impl Block {
    fn run<T>(&self, future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        run(self.0.app(), future)
    }

    /// All bytes of its newest version, and the version.
    ///
    /// # Errors
    /// `contended` if writers were too busy; the server's error if the block is not mapped.
    pub fn read(&self) -> Result<(Vec<u8>, u64), Error> {
        self.run(self.0.read())
    }

    /// Reads bytes of its newest version from `offset` on; returns the version.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<u64, Error> {
        self.run(self.0.read_into(offset, to))
    }

    /// The newest version in place; see [`crate::Block::view`].
    ///
    /// # Errors
    /// As there.
    pub fn view<R>(&self, f: impl FnMut(View<'_>) -> R) -> Result<R, Error> {
        self.run(self.0.view(f))
    }

    /// The newest version in place, for as long as the result is kept; see
    /// [`crate::Block::owned_view`].
    ///
    /// # Errors
    /// As there.
    pub fn owned_view(&self) -> Result<OwnedView, Error> {
        self.run(self.0.owned_view())
    }

    /// Waits for a version newer than `beyond`; returns it. For a mapped block this thread waits
    /// without the server.
    ///
    /// # Errors
    /// `timeout`; `no_block` if it was removed.
    pub fn wait_for(&self, beyond: u64, timeout: Duration) -> Result<u64, Error> {
        let deadline = deadline(timeout);
        while self.run(self.0.ensure_attached())? {
            while self.is_mapped() {
                let left = deadline.saturating_duration_since(Instant::now());
                match self.0.wait_slice(beyond, left.min(WAIT_SLICE))? {
                    Slice::Newer(version) => return Ok(version),
                    Slice::Moved => break,
                    Slice::Over if crate::interrupt::is_due() => {
                        return Err(super::interrupted());
                    }
                    Slice::Over if Instant::now() < deadline => {}
                    Slice::Over => return Err(timed_out(self.id())),
                }
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        self.run(self.0.wait_for(beyond, left))
    }

    /// New versions, as they appear; see [`crate::Changes`].
    ///
    /// # Errors
    /// The server's error.
    pub fn changes(&self) -> Result<Changes, Error> {
        self.run(self.0.changes()).map(Changes)
    }

    /// Writes bytes through the server, as one version; returns the version.
    ///
    /// # Errors
    /// `out_of_range`, `forbidden`, `locked`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.run(self.0.write_at(offset, bytes))
    }

    /// Like [`Block::write_at`], but only if the block has version `version`.
    ///
    /// # Errors
    /// `version_conflict`, and as [`Block::write_at`].
    pub fn write_if(&self, version: u64, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        self.run(self.0.write_if(version, offset, bytes))
    }

    /// Writes `bytes` at `offset` if the block has the bytes `expected` there, which must be as
    /// many; otherwise returns the bytes that it has.
    ///
    /// # Errors
    /// `out_of_range`, `forbidden`, `locked`.
    pub fn cas(
        &self,
        offset: u64,
        expected: &[u8],
        bytes: &[u8],
    ) -> Result<Result<u64, Vec<u8>>, Error> {
        self.run(self.0.cas(offset, expected, bytes))
    }

    /// Begins a new version, under the block's lock; see [`crate::Block::write`].
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub fn write(&self, wait: Duration) -> Result<Draft, Error> {
        let draft = self.run(self.0.write(wait))?;
        Ok(Draft(self.0.app().clone(), draft))
    }

    /// Takes the block's lock to write many versions; see [`crate::BlockWriter`].
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub fn writer(&self, wait: Duration) -> Result<BlockWriter, Error> {
        self.run(self.0.writer(wait)).map(BlockWriter)
    }

    /// Takes the block's lock, for which it waits at most `wait`. Dropping the guard releases it.
    ///
    /// # Errors
    /// `locked`, `forbidden`.
    pub fn lock(&self, mode: LockMode, wait: Duration) -> Result<BlockLock, Error> {
        self.run(self.0.lock(mode, wait)).map(BlockLock)
    }

    /// Like [`Block::lock`], but the lock expires after `lease` unless it is renewed.
    ///
    /// # Errors
    /// As [`Block::lock`].
    pub fn lock_for(
        &self,
        mode: LockMode,
        wait: Duration,
        lease: Duration,
    ) -> Result<BlockLock, Error> {
        self.run(self.0.lock_for(mode, wait, lease)).map(BlockLock)
    }

    /// Changes the size of the block, which gets a new generation that everybody continues with.
    ///
    /// # Errors
    /// `forbidden`, `locked`, `quota`, `too_large`, `storage`.
    pub fn resize(&self, size: u64) -> Result<(), Error> {
        self.run(self.0.resize(size))
    }

    /// Seals the content anew; see [`crate::Block::reencrypt`].
    ///
    /// # Errors
    /// `bad_message` if the block is not sealed; `stale_epoch`, `forbidden`, `locked`, `integrity`.
    pub fn reencrypt(&self, keeps_stale: bool) -> Result<Option<u64>, Error> {
        self.run(self.0.reencrypt(keeps_stale))
    }

    /// Flushes a persistent block to disk; returns the version on disk.
    ///
    /// # Errors
    /// `bad_message` if the block is not persistent; `storage`.
    pub fn flush(&self) -> Result<u64, Error> {
        self.run(self.0.flush())
    }

    /// Removes the block, even if others are attached.
    ///
    /// # Errors
    /// `forbidden`, `locked`.
    pub fn remove(&self) -> Result<(), Error> {
        self.run(self.0.remove())
    }

    /// Its full description by the server.
    ///
    /// # Errors
    /// `no_block`.
    pub fn info(&self) -> Result<Value, Error> {
        self.run(self.0.info())
    }

    /// The block's bytes as numbers of type `T`.
    ///
    /// # Errors
    /// `layout_mismatch` if its layout has another element type.
    pub fn typed<T: Element>(&self) -> Result<TypedBlock<T>, Error> {
        self.0.typed().map(TypedBlock)
    }
}

/// An iterator over new versions of a block.
#[derive(Debug)]
pub struct Changes(crate::Changes);

impl Changes {
    /// Waits for the next version, at most `timeout`; `None` after the block was removed or the app
    /// closed.
    ///
    /// # Errors
    /// `timeout`.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Result<Option<u64>, Error> {
        let core = self.0.app().core().clone();
        let deadline = Some(deadline(timeout));
        core.block_on(deadline, |cx| self.0.poll_version(cx))
            .ok_or_else(|| {
                Error::new(
                    latzero_protocol::Code::Timeout,
                    "there was no new version in time",
                )
            })
    }
}

impl Iterator for Changes {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let core = self.0.app().core().clone();
        core.block_on(None, |cx| self.0.poll_version(cx)).flatten()
    }
}

/// A version that is being written; see [`crate::Draft`].
#[derive(Debug)]
pub struct Draft(crate::App, crate::Draft);

impl Draft {
    /// Writes bytes from `offset` on.
    ///
    /// # Errors
    /// `out_of_range`; nothing was written.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.1.write(offset, bytes)
    }

    /// Reads bytes of the draft from `offset` on: what was written, and elsewhere the content of
    /// the previous version.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub fn read_into(&self, offset: u64, to: &mut [u8]) -> Result<(), Error> {
        run(&self.0, self.1.read_into(offset, to))
    }

    /// Whether it is written into the mapped block, so that [`Draft::expose`] works.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.1.is_in_place()
    }

    /// Prepares bytes for writing in place; see [`crate::Draft::expose`].
    ///
    /// # Errors
    /// As there.
    pub fn expose(&mut self, offset: u64, length: u64, keeps: bool) -> Result<Exposed, Error> {
        self.1.expose(offset, length, keeps)
    }

    /// Publishes the version and releases the lock; returns the version.
    ///
    /// # Errors
    /// `lock_lost` if the lock was lost in the meantime: the version is not published.
    pub fn commit(self) -> Result<u64, Error> {
        run(&self.0, self.1.commit())
    }

    /// Discards the version: it is never published.
    pub fn abandon(self) {
        self.1.abandon();
    }
}

/// Writes many versions under one lock; see [`crate::BlockWriter`], whose other methods it has too.
#[derive(Debug)]
pub struct BlockWriter(crate::BlockWriter);

impl std::ops::Deref for BlockWriter {
    type Target = crate::BlockWriter;

    fn deref(&self) -> &crate::BlockWriter {
        &self.0
    }
}

impl std::ops::DerefMut for BlockWriter {
    fn deref_mut(&mut self) -> &mut crate::BlockWriter {
        &mut self.0
    }
}

impl BlockWriter {
    /// Writes one version with several pieces; see [`crate::BlockWriter::write_pieces`].
    ///
    /// # Errors
    /// `out_of_range`, `lock_lost`.
    pub fn write_pieces(&self, pieces: &[(u64, Vec<u8>)]) -> Result<u64, Error> {
        let app = self.0.lock().block().app().clone();
        run(&app, self.0.write_pieces(pieces))
    }

    /// Begins one last version, at whose end the lock is released.
    ///
    /// # Errors
    /// `lock_lost`, and as [`Block::read`].
    pub fn into_draft(self) -> Result<Draft, Error> {
        let app = self.0.lock().block().app().clone();
        let draft = run(&app, self.0.into_draft())?;
        Ok(Draft(app, draft))
    }

    /// Writes one version that has these bytes from `offset` on.
    ///
    /// # Errors
    /// `out_of_range`, `lock_lost`.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<u64, Error> {
        let app = self.0.lock().block().app().clone();
        run(&app, self.0.write(offset, bytes))
    }
}

/// A block's lock, released when this is dropped; see [`crate::BlockLock`], whose other methods it
/// has too.
#[derive(Debug)]
pub struct BlockLock(crate::BlockLock);

impl std::ops::Deref for BlockLock {
    type Target = crate::BlockLock;

    fn deref(&self) -> &crate::BlockLock {
        &self.0
    }
}

impl BlockLock {
    /// Renews its lease. A lock without a lease is held until the connection ends.
    ///
    /// # Errors
    /// `lock_lost`.
    pub fn renew(&self, lease: Option<Duration>) -> Result<(), Error> {
        run(self.0.block().app(), self.0.renew(lease))
    }

    /// Releases it, and waits until the server has confirmed that.
    ///
    /// # Errors
    /// `lock_lost` if it was lost before.
    pub fn unlock(self) -> Result<(), Error> {
        let app = self.0.block().app().clone();
        run(&app, self.0.unlock())
    }
}

/// A block as an array of numbers; see [`crate::TypedBlock`], whose other methods it has too.
#[derive(Debug, Clone)]
pub struct TypedBlock<T>(crate::TypedBlock<T>);

impl<T> std::ops::Deref for TypedBlock<T> {
    type Target = crate::TypedBlock<T>;

    fn deref(&self) -> &crate::TypedBlock<T> {
        &self.0
    }
}

impl<T: Element> TypedBlock<T> {
    /// All numbers of the newest version, in row-major order, and the version.
    ///
    /// # Errors
    /// As [`Block::read`].
    pub fn read(&self) -> Result<(Vec<T>, u64), Error> {
        run(self.0.block().app(), self.0.read())
    }

    /// The number at `index`, in row-major order.
    ///
    /// # Errors
    /// `out_of_range`, and as [`Block::read`].
    pub fn load(&self, index: u64) -> Result<T, Error> {
        run(self.0.block().app(), self.0.load(index))
    }

    /// Writes numbers from `index` on; see [`crate::TypedBlock::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write(&self, index: u64, numbers: &[T], wait: Duration) -> Result<u64, Error> {
        run(self.0.block().app(), self.0.write(index, numbers, wait))
    }
}
