//! The bytes of memory blocks: one [`Custodian`] for each generation, and the thread for slow jobs.
//!
//! Pools decide about blocks and refer to storage by number; this module maps the numbers to memory
//! and files. Creating or moving a large block touches all of its memory, and a flush waits for the
//! disk. Such jobs run on a separate thread, so that no connection waits for them.

mod files;
mod places;
pub(crate) mod restore;
mod rows;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use latzero_fabric::ledger::{Ledger, Resource};
use latzero_fabric::memory::{Job, Making, Numbers, StorageId};
use latzero_fabric::pool::Found;
use latzero_fabric::{BlockKey, Limits, Time};
use latzero_protocol::memory::{Access, Kind};
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};
use latzero_shm::{Cas, CreateError, Custodian, Description, Geometry, State};
use latzero_store::{BlockRow, Store};
use serde_json::{Value, json};

use self::files::{Files, Names};
pub(crate) use self::rows::{ENDED, Rows};
use crate::host::IoHost;
use crate::losses::{Loss, Part};
use crate::peer::Peer;
use crate::shared::{Command, ServerState};
use crate::timers::PoolCell;

/// Storage up to this many bytes is created directly by the loop that got the request: it takes
/// less than a millisecond.
const INLINE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Jobs for storage with at least this many bytes have a separate thread.
const LARGE_BYTES_MIN: u64 = 32 * 1024 * 1024;

/// The highest fence of an earlier run that is accepted to continue from.
const FENCE_KEPT_MAX: u64 = 1 << 62;

/// How many descriptors blocks leave free for everything else.
const DESCRIPTORS_LEFT_MIN: u64 = 32;

/// How many bytes of a block a backup may hold in memory, to read them at once.
const WHOLE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// How many times a backup reads a block again that is written in the meantime.
const BACKUP_TRIES: u32 = 100;

/// How many corrupt blocks `health` names.
const CORRUPT_SHOWN_MAX: usize = 20;

/// One generation of a block.
struct StoredBlock {
    custodian: Custodian,
    pool: PoolName,
    block: BlockId,
    kind: Kind,
    /// The newest reported version, which is used while the version cannot be read without
    /// blocking.
    version: AtomicU64,
    names: Option<Names>,
    /// False once it is dropped. Locked while the record of its block is changed for a generation
    /// copied from it, so that a removed block does not come back.
    is_wanted: Mutex<bool>,
}

impl StoredBlock {
    fn new(
        custodian: Custodian,
        pool: PoolName,
        block: BlockId,
        version: u64,
        names: Option<Names>,
    ) -> StoredBlock {
        let is_persistent = custodian.description().is_persistent;
        StoredBlock {
            custodian,
            pool,
            block,
            kind: if is_persistent {
                Kind::Persistent
            } else {
                Kind::Shared
            },
            version: AtomicU64::new(version),
            names,
            is_wanted: Mutex::new(true),
        }
    }

    fn is_wanted(&self) -> MutexGuard<'_, bool> {
        self.is_wanted
            .lock()
            .expect("nothing panics under this lock")
    }

    fn take_results(&self, version: u64) -> u64 {
        self.version.fetch_max(version, Relaxed).max(version)
    }
}

/// A finished job for a block, for its pool.
pub(crate) struct JobResult {
    pub(crate) pool: Arc<PoolCell>,
    pub(crate) what: Finished,
}

/// The result.
pub(crate) enum Finished {
    Made(BlockKey, Result<Option<StorageId>, Refusal>),
    Flushed(BlockKey, u64, Result<u64, Refusal>),
}

/// A job for the blocks' thread.
enum Work {
    Job(Arc<ServerState>, Arc<PoolCell>, Job<Arc<Peer>>),
    /// Storage to drop, which frees its memory; and the database in which its removal is recorded,
    /// if it is removed.
    Free(Arc<StoredBlock>, Option<Store>),
}

/// The threads for slow jobs: those of small blocks do not wait for those of large ones.
struct Workers {
    small: Sender<Work>,
    large: Sender<Work>,
}

impl Workers {
    fn send(&self, bytes: u64, work: Work) {
        let worker = match bytes {
            0..LARGE_BYTES_MIN => &self.small,
            _ => &self.large,
        };
        worker
            .send(work)
            .expect("the blocks' threads live as long as the server");
    }
}

/// The storage of all blocks.
pub(crate) struct Blocks {
    stored: RwLock<HashMap<StorageId, Arc<StoredBlock>>>,
    numbers: Mutex<Numbers>,
    files: Arc<Files>,
    rows: Rows,
    // At most one job of each kind for each block and waiter, which are bounded.
    work: Workers,
}

impl Blocks {
    /// Starts without blocks; files of persistent ones are in `directory`.
    ///
    /// # Errors
    /// If the directory cannot be opened, or the thread cannot be started.
    pub(crate) fn new(directory: &Path, rows: Rows) -> std::io::Result<Blocks> {
        let files = Arc::new(Files::open(directory)?);
        let worker = |name: &str| {
            let (work, queue) = channel();
            let files = Arc::clone(&files);
            let thread = std::thread::Builder::new().name(name.into());
            thread.spawn(move || run(&queue, &files))?;
            std::io::Result::Ok(work)
        };
        let work = Workers {
            small: worker("blocks")?,
            large: worker("large-blocks")?,
        };
        Ok(Blocks {
            stored: RwLock::new(HashMap::new()),
            numbers: Mutex::new(Numbers::default()),
            files,
            rows,
            work,
        })
    }

    pub(crate) fn with_numbers<R>(&self, f: impl FnOnce(&mut Numbers) -> R) -> R {
        f(&mut self.numbers())
    }

    /// Restores the generations of blocks that an earlier run removed.
    pub(crate) fn restore_removed(&self, noted: &str) {
        let Ok(generation) = noted.parse() else {
            tracing::warn!(noted, "a stored block generation is invalid");
            return;
        };
        self.rows.set_ended(generation);
        self.numbers().set_ended_floor(generation);
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers
            .lock()
            .expect("a panic in the numbers ends the server")
    }

    fn at(&self, storage: StorageId) -> Option<Arc<StoredBlock>> {
        let stored = self.stored.read().expect("nothing panics under this lock");
        stored.get(&storage).map(Arc::clone)
    }

    fn found(&self, storage: StorageId) -> Result<Arc<StoredBlock>, Refusal> {
        // Another loop may have removed it since the pool decided.
        self.at(storage).ok_or_else(removed)
    }

    fn all(&self) -> Vec<Arc<StoredBlock>> {
        let stored = self.stored.read().expect("nothing panics under this lock");
        stored.values().map(Arc::clone).collect()
    }

    fn insert(&self, storage: StorageId, stored: StoredBlock) {
        self.stored
            .write()
            .expect("nothing panics under this lock")
            .insert(storage, Arc::new(stored));
    }

    /// The descriptor to pass for `access`, if there is one.
    pub(crate) fn descriptor(&self, storage: StorageId, access: Access) -> Option<Arc<OwnedFd>> {
        let stored = self.at(storage)?;
        stored.custodian.lend(match access {
            Access::Write => latzero_shm::Access::Write,
            Access::Read => latzero_shm::Access::Read,
        })
    }

    /// The newest version that is known without blocking.
    pub(crate) fn version(&self, storage: StorageId) -> u64 {
        let Some(stored) = self.at(storage) else {
            return 0;
        };
        match stored.kind {
            // Its header is mapped.
            Kind::Shared => stored.custodian.version().unwrap_or(0),
            Kind::Persistent => stored.version.load(Relaxed),
        }
    }

    /// A client reports a newer version. The block's header decides: its page was just written, so
    /// reading it does not need the disk.
    pub(crate) fn note_version(&self, storage: StorageId, version: u64) -> u64 {
        let Some(stored) = self.at(storage) else {
            return 0;
        };
        match stored.custodian.version() {
            Ok(current) => stored.take_results(version.min(current)),
            Err(_) => stored.version.load(Relaxed),
        }
    }

    /// Writes the fence of a block's lock to its header, for its writers.
    pub(crate) fn set_fence(&self, storage: StorageId, fence: u64, is_held: bool) {
        if let Some(stored) = self.at(storage)
            && let Err(error) = stored.custodian.set_lease(fence, is_held)
        {
            tracing::warn!(pool = %stored.pool, block = %stored.block, %error, "cannot publish \
                the lock of a block to its writers");
        }
    }

    pub(crate) fn check(&self, storage: StorageId) -> Result<(), Refusal> {
        let stored = self.found(storage)?;
        stored
            .custodian
            .check()
            .map_err(|error| corrupt(&stored, &error))
    }

    pub(crate) fn read(
        &self,
        storage: StorageId,
        offset: u64,
        buffer: &mut [u8],
        if_version: Option<u64>,
    ) -> Result<u64, Refusal> {
        use latzero_shm::ReadError;
        let stored = self.found(storage)?;
        let version = stored.custodian.read(offset, buffer, if_version);
        version
            .map(|version| stored.take_results(version).min(version))
            .map_err(|error| match error {
                ReadError::OutOfRange => out_of_range(&stored),
                ReadError::Version(current) => conflict(&stored, current),
                ReadError::Contended => contended(&stored),
                ReadError::Fault(fault) => corrupt(&stored, &fault),
            })
    }

    pub(crate) fn write(
        &self,
        storage: StorageId,
        offset: u64,
        data: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, Refusal> {
        let stored = self.found(storage)?;
        let version = stored.custodian.write(offset, data, if_version);
        version
            .inspect(|&version| {
                stored.take_results(version);
            })
            .map_err(|error| write_error(&stored, error))
    }

    pub(crate) fn swap(
        &self,
        storage: StorageId,
        offset: u64,
        expected: &[u8],
        data: &[u8],
    ) -> Result<(u64, Option<Vec<u8>>), Refusal> {
        let stored = self.found(storage)?;
        match stored.custodian.cas(offset, expected, data) {
            Ok(Cas::Swapped { version }) => {
                stored.take_results(version);
                Ok((version, None))
            }
            Ok(Cas::Differs { current, version }) => Ok((version, Some(current))),
            Err(error) => Err(write_error(&stored, error)),
        }
    }

    /// Runs `job`, or queues it for the blocks' thread. Returns the result for the pool, if there
    /// is one.
    pub(crate) fn run_or_pass_on(
        shared: &Arc<ServerState>,
        pool: &Arc<PoolCell>,
        job: Job<Arc<Peer>>,
    ) -> Option<JobResult> {
        let bytes = match &job {
            Job::Make { making, .. } => making.geometry.total().unwrap_or(u64::MAX),
            Job::Flush { storage, .. } | Job::Drop { storage, .. } => {
                let stored = shared.storage.blocks.at(*storage);
                stored.map_or(0, |stored| stored.custodian.description().geometry.total())
            }
        };
        let takes_long = match &job {
            Job::Make { making, .. } => {
                making.kind == Kind::Persistent
                    || making.geometry.total().unwrap_or(u64::MAX) > INLINE_BYTES_MAX
                    || has_rights(making)
            }
            Job::Flush { .. } => true,
            Job::Drop { .. } => false,
        };
        if takes_long {
            let work = Work::Job(Arc::clone(shared), Arc::clone(pool), job);
            shared.storage.blocks.work.send(bytes, work);
            return None;
        }
        let what = shared.storage.blocks.run(job)?;
        Some(JobResult {
            pool: Arc::clone(pool),
            what,
        })
    }

    fn run(&self, job: Job<Arc<Peer>>) -> Option<Finished> {
        match job {
            Job::Make {
                key,
                making,
                unless_dead,
            } => {
                let is_dead = unless_dead.is_some_and(|peer| peer.is_dead());
                let made = if is_dead {
                    Ok(None)
                } else {
                    self.make(&making).map(|()| Some(making.storage))
                };
                if let Err(refusal) = &made
                    && refusal.code != Code::NoBlock
                {
                    let (pool, block) = (&making.pool, &making.block);
                    tracing::warn!(%pool, %block, error = %refusal, "cannot create a block");
                }
                Some(Finished::Made(key, made))
            }
            Job::Drop {
                storage,
                is_superseded,
            } => {
                self.drop_storage(storage, is_superseded);
                None
            }
            Job::Flush {
                key,
                storage,
                ticket,
            } => {
                let version = self.flush(storage);
                Some(Finished::Flushed(key, ticket, version))
            }
        }
    }

    fn flush(&self, storage: StorageId) -> Result<u64, Refusal> {
        let stored = self.found(storage)?;
        let version = stored.custodian.sync();
        let version = version.map_err(|error| corrupt(&stored, &error))?;
        self.check_place(&stored)?;
        Ok(version)
    }

    fn make(&self, making: &Making) -> Result<(), Refusal> {
        let from = making.from.map(|from| self.found(from)).transpose()?;
        let stored = self.build(making, from.as_deref())?;
        self.persist(making, from.as_deref(), &stored)?;
        self.check_place(&stored)?;
        self.rows.note(&stored, &making.record);
        self.insert(making.storage, stored);
        Ok(())
    }

    /// Creates a generation with its initial content. If that fails, nothing is left of it.
    fn build(&self, making: &Making, from: Option<&StoredBlock>) -> Result<StoredBlock, Refusal> {
        let asked = making.geometry;
        let geometry = match asked.spares {
            0 => Geometry::new(asked.size, asked.slots),
            _ => Geometry::with_spares(asked.size, asked.slots),
        };
        let geometry = geometry.map_err(|error| Refusal::new(Code::TooLarge, error.to_string()))?;
        let block_id = match from {
            Some(from) => from.custodian.description().block_id,
            None => crate::random::bytes(),
        };
        let description = Description {
            block_id,
            pool_id: pool_id(&making.pool),
            generation: making.generation,
            geometry,
            is_persistent: making.kind == Kind::Persistent,
            created_unix_ns: unix_ns(),
        };
        let refused = |error: CreateError| no_storage(making, &error);
        let (custodian, names) = match making.kind {
            Kind::Shared => {
                let name = format!("lz:{}", &making.pool.as_str());
                (
                    Custodian::create_shared(&name, &description).map_err(refused)?,
                    None,
                )
            }
            Kind::Persistent => {
                let (custodian, names) = self.files.create(&description).map_err(refused)?;
                (custodian, Some(names))
            }
        };
        if let Some(boot) = self.rows.boot()
            && let Err(error) = custodian.set_boot(boot)
        {
            tracing::warn!(pool = %making.pool, block = %making.block, %error, "cannot store the \
                boot id in a block");
        }
        if let Err(refusal) = check_descriptor(making, &custodian) {
            if let Some(names) = &names {
                self.files.abandon(names);
            }
            return Err(refusal);
        }
        let (pool, block) = (making.pool.clone(), making.block.clone());
        let stored = StoredBlock::new(custodian, pool, block, 0, names);
        if let Some(from) = from {
            // Once its record is active, a restart continues from the fence in its header.
            let leased = from.custodian.lease();
            let leased = leased.and_then(|fence| stored.custodian.set_lease(fence, false));
            match leased.and_then(|()| from.custodian.copy_to(&stored.custodian)) {
                Ok(version) => stored.take_results(version),
                Err(error) => {
                    if let Some(names) = &stored.names {
                        self.files.abandon(names);
                    }
                    return Err(corrupt(from, &error));
                }
            };
        }
        Ok(stored)
    }

    /// Makes a persistent generation survive a restart. One that fails is removed.
    fn persist(
        &self,
        making: &Making,
        from: Option<&StoredBlock>,
        stored: &StoredBlock,
    ) -> Result<(), Refusal> {
        let Some(names) = &stored.names else {
            return Ok(());
        };
        let record = &making.record;
        let kept = match stored.custodian.sync() {
            Ok(_) => self
                .persist_record(names, record, from)
                .unwrap_or_else(|error| {
                    let block = &making.block;
                    let message = format!("cannot write the record of block '{block}': {error}");
                    Err(Refusal::new(Code::Storage, message))
                }),
            Err(error) => Err(corrupt(stored, &error)),
        };
        if kept.is_err() {
            self.files.abandon(names);
        }
        kept
    }

    /// Activates a record, unless its block was removed since its generation was copied.
    fn persist_record(
        &self,
        names: &Names,
        record: &str,
        from: Option<&StoredBlock>,
    ) -> std::io::Result<Result<(), Refusal>> {
        let before = self.files.record(names)?;
        self.files.prepare(names, record)?;
        // Held only while a name is changed, not while waiting for the disk.
        if !change_if_wanted(from, || self.files.commit(names))? {
            return Ok(Err(removed()));
        }
        let Err(error) = self.files.sync() else {
            return Ok(Ok(()));
        };
        if let Err(error) = self.restore_record(names, before.as_deref(), from) {
            tracing::error!(file = %names, %error, "cannot restore the record of a block");
        }
        Err(error)
    }

    /// Restores the record of the previous generation, which stays in use.
    fn restore_record(
        &self,
        names: &Names,
        before: Option<&str>,
        from: Option<&StoredBlock>,
    ) -> std::io::Result<()> {
        if let Some(record) = before {
            self.files.write_new_record(names, record)?;
        }
        change_if_wanted(from, || match before {
            Some(_) => self.files.commit(names),
            None => self.files.remove_record(names),
        })?;
        self.files.sync()
    }

    fn drop_storage(&self, storage: StorageId, is_superseded: bool) {
        let stored = self
            .stored
            .write()
            .expect("nothing panics under this lock")
            .remove(&storage);
        let Some(stored) = stored else { return };
        let state = if is_superseded {
            State::Superseded
        } else {
            State::Closed
        };
        if let Err(error) = stored.custodian.set_state(state) {
            tracing::debug!(pool = %stored.pool, block = %stored.block, %error, "cannot mark a \
                removed block in its header");
        }
        if let Some(names) = &stored.names {
            let mut is_wanted = stored.is_wanted();
            *is_wanted = false;
            self.files.remove(names, is_superseded);
        }
        if !is_superseded {
            let generation = stored.custodian.description().generation;
            self.rows.note_end(generation);
            self.rows.forget(&stored.pool, &stored.block);
        }
        // Deleting a file and freeing much memory both take time.
        let bytes = stored.custodian.description().geometry.total();
        let store = self.rows.store().filter(|_| !is_superseded).cloned();
        self.work.send(bytes, Work::Free(stored, store));
    }

    /// All shared blocks, with a descriptor of each.
    pub(crate) fn shared(&self) -> Vec<(PoolName, BlockId, Arc<OwnedFd>)> {
        let all = self.all();
        let shared = all.iter().filter(|stored| stored.kind == Kind::Shared);
        shared
            .filter_map(|stored| {
                let fd = stored.custodian.lend(latzero_shm::Access::Write)?;
                Some((stored.pool.clone(), stored.block.clone(), fd))
            })
            .collect()
    }

    /// Whether the server waits for clients that still hold shared blocks of an earlier run.
    pub(crate) fn is_awaiting(&self) -> bool {
        self.rows.is_awaiting()
    }

    /// The owner of a block whose memory clients may still offer: of that block, or of any in the
    /// pool.
    pub(crate) fn awaited_owner(&self, pool: &PoolName, block: Option<&BlockId>) -> Option<AppId> {
        self.rows.awaited_owner(pool, block)
    }

    /// The row of a block whose memory clients may still offer.
    ///
    /// # Errors
    /// `no_block` if there is none.
    pub(crate) fn awaited_row(
        &self,
        pool: &PoolName,
        block: &BlockId,
    ) -> Result<BlockRow, Refusal> {
        let row = self.rows.awaited_row(pool, block);
        row.ok_or_else(|| {
            let message = format!("the server is not waiting for block '{block}' of pool '{pool}'");
            Refusal::new(Code::NoBlock, message)
        })
    }

    /// The blocks in `stats`.
    pub(crate) fn to_json(&self, limits: &Limits, ledger: &Ledger) -> Value {
        let kinds = |kind| self.all().iter().filter(|s| s.kind == kind).count();
        let all = ledger.all();
        json!({
            "blocks": all.used(Resource::BlockCount),
            "blocks_max": limits.blocks_max,
            "bytes": all.used(Resource::Blocks),
            "bytes_max": limits.memory_bytes_max,
            "storages_shared": kinds(Kind::Shared),
            "storages_persistent": kinds(Kind::Persistent),
        })
    }

    /// The blocks in `health`: checks each header and names corrupt blocks.
    pub(crate) fn health(&self) -> (bool, Value) {
        let all = self.all();
        let mut corrupt: Vec<Value> = Vec::new();
        for stored in &all {
            if let Err(error) = stored.custodian.check() {
                corrupt.push(json!({
                    "pool": stored.pool, "block_id": stored.block, "error": error.to_string(),
                }));
            }
        }
        let total = corrupt.len();
        corrupt.truncate(CORRUPT_SHOWN_MAX);
        let seen = json!({"blocks": all.len(), "corrupt_total": total, "corrupt": corrupt});
        (total == 0, seen)
    }

    /// Adds the bytes of every persistent block to a backup, each of one version.
    pub(crate) fn back_up(
        &self,
        writer: &mut latzero_store::BackupWriter<'_>,
    ) -> Result<(), latzero_store::BackupError> {
        // While a block moves, two generations of it exist.
        let mut added = std::collections::HashSet::new();
        for stored in self.all() {
            let Some(names) = stored
                .names
                .as_ref()
                .filter(|_| stored.kind == Kind::Persistent)
            else {
                continue;
            };
            if added.contains(&(stored.pool.clone(), stored.block.clone())) {
                continue;
            }
            let Ok(Some(record)) = self.files.record(names) else {
                // Removed, or being created.
                continue;
            };
            let description = stored.custodian.description();
            let head = |version| latzero_store::BlockHead {
                pool: stored.pool.as_str().into(),
                block_id: stored.block.as_str().into(),
                generation: description.generation,
                version,
                size: description.geometry.size,
                slots: description.geometry.slots,
                description: record.clone().into_bytes(),
            };
            let is_added = match stored.custodian.hold() {
                Ok(Some(held)) => {
                    let left = description.geometry.size;
                    writer.add_block(&head(held.version()), &mut Holding { held, at: 0, left })?;
                    true
                }
                Ok(None) => false,
                Err(error) => {
                    tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a block \
                        is missing from the backup, because it cannot be flushed");
                    continue;
                }
            };
            if is_added {
                added.insert((stored.pool.clone(), stored.block.clone()));
                continue;
            }
            for left in (0..BACKUP_TRIES).rev() {
                // Read at once if it fits, so that a writer is unlikely to interfere.
                let size = description.geometry.size;
                let mut whole = match usize::try_from(size) {
                    Ok(bytes) if size <= WHOLE_BYTES_MAX => Some(vec![0; bytes]),
                    _ => None,
                };
                let version = match &mut whole {
                    Some(whole) => stored.custodian.read(0, whole, None),
                    None => stored.custodian.version().map_err(Into::into),
                };
                let version = match version {
                    Ok(version) => version,
                    Err(latzero_shm::ReadError::Contended) if left > 0 => continue,
                    Err(error) => {
                        tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a \
                            block is missing from the backup, because it cannot be read");
                        break;
                    }
                };
                let mut by_piece = OneVersion {
                    custodian: &stored.custodian,
                    version,
                    at: 0,
                };
                let added_block = match &whole {
                    Some(whole) => writer.add_block(&head(version), &mut &whole[..]),
                    None => writer.add_block(&head(version), &mut by_piece),
                };
                match added_block {
                    Ok(()) => {
                        added.insert((stored.pool.clone(), stored.block.clone()));
                        break;
                    }
                    // It was written in the meantime: try again with the new version.
                    Err(_) if left > 0 && stored.custodian.version().ok() != Some(version) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Flushes every persistent block to disk. `progress` gets the count done and the total before
    /// each.
    pub(crate) fn sync_all(&self, mut progress: impl FnMut(usize, usize)) {
        if let Err(error) = self.files.sync() {
            tracing::error!(%error, "cannot flush the directory of persistent blocks");
        }
        let mut persistent = self.all();
        persistent.retain(|stored| stored.kind == Kind::Persistent);
        for (done, stored) in persistent.iter().enumerate() {
            progress(done, persistent.len());
            let synced = stored.custodian.sync().map_err(|error| error.to_string());
            let kept = synced.and_then(|_| self.put_back(stored).map_err(|e| e.to_string()));
            if let Err(error) = kept {
                tracing::error!(pool = %stored.pool, block = %stored.block, error, "cannot flush \
                    a persistent block");
            }
        }
    }
}

/// A reader of the bytes of a version that is held.
struct Holding<'a> {
    held: latzero_shm::ReadGuard<'a>,
    at: u64,
    left: u64,
}

impl std::io::Read for Holding<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = usize::try_from(self.left).unwrap_or(usize::MAX);
        let n = n.min(buffer.len());
        self.held
            .read(self.at, &mut buffer[..n])
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.at += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A reader of the bytes of one version of a block; it fails once there is a newer one.
struct OneVersion<'a> {
    custodian: &'a Custodian,
    version: u64,
    at: u64,
}

impl std::io::Read for OneVersion<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.custodian.description().geometry.size - self.at;
        let n = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if n == 0 {
            return Ok(0);
        }
        self.custodian
            .read(self.at, &mut buffer[..n], Some(self.version))
            .map_err(|error| std::io::Error::other(error.to_string()))?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Whether access to a shared block is restricted: then its name is reserved for its owner after a
/// restart, from the first reply on.
fn has_rights(making: &Making) -> bool {
    let record: Value = serde_json::from_str(&making.record).unwrap_or_default();
    let is_open = |right: &str| record["permissions"][right] == json!(["*"]);
    making.kind == Kind::Shared && !(is_open("read") && is_open("write"))
}

/// Restores the blocks of an earlier run: persistent ones from their files; clients may offer
/// shared ones. After a power loss, the checksums decide which content of a file is valid.
pub(crate) fn adopt_all(host: &mut IoHost, rows: Vec<BlockRow>, is_same_boot: bool) {
    let shared = Arc::clone(&host.shared);
    shared.storage.blocks.with_numbers(|numbers| {
        for row in &rows {
            let name = (PoolName::new(&row.pool), BlockId::new(&row.block_id));
            if let (Ok(pool), Ok(block)) = name {
                numbers.forget_process(&pool, &block, row.generation);
            }
        }
    });
    let mut missing: HashMap<(String, String), BlockRow> = shared
        .storage
        .blocks
        .rows
        .expect_blocks(rows)
        .into_iter()
        .map(|row| ((row.pool.clone(), row.block_id.clone()), row))
        .collect();
    let losses = Arc::clone(shared.storage.persistence.losses());
    let records = missing.values().filter_map(|row| {
        let file = row.file.clone()?;
        Some((file, rows::record(row)))
    });
    let records: HashMap<String, String> = records.collect();
    let remedy = "restore the block from a backup with `latzero restore`; the server never \
    deletes files that it moved aside";
    let mut lost = |affected: String, happened: String| {
        losses.note(Loss::new(Part::Memory, affected, happened, remedy));
    };
    let (kept, removed) = shared.storage.blocks.files.scan_with(&records, &mut lost);
    for mut kept in kept {
        let mut may_have_writer = false;
        if let Ok(custodian) = &kept.open {
            match resume(custodian, shared.storage.blocks.rows.boot(), is_same_boot) {
                Ok(is_same_boot) => may_have_writer = is_same_boot,
                Err(error) => kept.open = Err(error.to_string()),
            }
        }
        let (names, record) = (&kept.names, &kept.record);
        match adopt(host, kept.open, names, record, may_have_writer) {
            Ok((pool, block)) => {
                let losses = shared.storage.persistence.losses();
                losses.settle(Part::Memory, &room_for(&pool, &block));
                missing.remove(&(pool.as_str().into(), block.as_str().into()));
            }
            // With a higher limit it is restored completely.
            Err(refusal) if is_limit(&refusal) => {
                let name = Found { record, fence: 0 }.name();
                let affected = match &name {
                    Ok((pool, block)) => {
                        missing.remove(&(pool.as_str().into(), block.as_str().into()));
                        room_for(pool, block)
                    }
                    Err(_) => format!("memory/{names}"),
                };
                let happened =
                    format!("it was not loaded, because of a limit: {}", refusal.message);
                let remedy = "raise the limit and restart the server; the block's file and name \
                    are kept until then";
                let losses = shared.storage.persistence.losses();
                losses.note(Loss::new(Part::Memory, affected, happened, remedy));
            }
            Err(refusal) => {
                let affected = match (Found { record, fence: 0 }).name() {
                    Ok((pool, block)) => {
                        missing.remove(&(pool.as_str().into(), block.as_str().into()));
                        shared.storage.blocks.rows.forget(&pool, &block);
                        format!("block '{block}' of pool '{pool}'")
                    }
                    Err(_) => format!("memory/{names}"),
                };
                let happened = format!(
                    "it is unusable ({}); its file {names} was moved to memory/.orphans",
                    refusal.message
                );
                lost(affected, happened);
                shared.storage.blocks.files.set_aside(names);
            }
        }
    }
    for row in missing.into_values() {
        let left = Found {
            record: &rows::record(&row),
            fence: 0,
        };
        // Unless the last run removed it, and ended before its row was deleted.
        if !row.file.as_ref().is_some_and(|file| removed.contains(file)) {
            let affected = format!("block '{}' of pool '{}'", row.block_id, row.pool);
            lost(affected, "its file is missing, so the block is lost".into());
        }
        if let Ok((pool, block)) = left.name() {
            shared.storage.blocks.rows.forget(&pool, &block);
        }
    }
    // As at the end of a block: its mark goes after its row.
    let store = shared.storage.persistence.store();
    if !removed.is_empty() && store.commit(Vec::new()).is_ok() {
        removed
            .iter()
            .for_each(|id| shared.storage.blocks.files.forget(id));
    }
    shared.storage.persistence.store_losses();
    let (files, bytes) = shared.storage.blocks.files.orphans();
    if files > 0 {
        tracing::warn!(
            files,
            bytes,
            "memory/.orphans has files of persistent blocks that were moved there now or \
             earlier; the server never deletes them"
        );
    }
}

/// Makes a file's content safe to use. After a reboot the checksums decide, otherwise the header.
/// Returns whether the machine has not rebooted. `is_same_boot` is used for files that do not
/// record the boot.
fn resume(
    custodian: &Custodian,
    boot: Option<u64>,
    is_same_boot: bool,
) -> Result<bool, latzero_shm::Fault> {
    let is_same_boot = match (custodian.boot()?, boot) {
        (_, None) => false,
        (0, Some(_)) => is_same_boot,
        (noted, Some(boot)) => noted == boot,
    };
    if is_same_boot {
        custodian.forget_flush()?;
    } else {
        let version = custodian.recover()?;
        let description = custodian.description();
        tracing::debug!(
            version,
            generation = description.generation,
            "recovered a block after a reboot"
        );
    }
    // Only now, so that after an interrupted start the next one recovers again.
    custodian.set_boot(boot.unwrap_or(0))?;
    Ok(is_same_boot)
}

fn adopt(
    host: &mut IoHost,
    open: Result<Custodian, String>,
    names: &Names,
    record: &str,
    may_have_writer: bool,
) -> Result<(PoolName, BlockId), Refusal> {
    let custodian = open.map_err(|error| Refusal::new(Code::Storage, error))?;
    let (pool_name, block) = Found { record, fence: 0 }.name()?;
    let unix_ms = host.now.unix_ms;
    let (number, pool) =
        host.with_registry(|registry, _| registry.pool_for_kept(unix_ms, &pool_name))?;
    let name = (pool_name.clone(), block.clone());
    let taken = take(
        host,
        &pool,
        custodian,
        name,
        record,
        Some(names.clone()),
        may_have_writer,
    );
    if let Err(refusal) = &taken
        && is_limit(refusal)
    {
        let why = refusal.message.as_ref();
        host.with_pool(&pool, |pool, fx| {
            pool.blocks().reserve_name(&block, why, fx)
        });
    }
    if taken.is_err() {
        // The pool is removed again if it was created only for this block.
        host.effects.held.push((pool_name.clone(), number, 0));
        host.with_pool(&pool, |_, _| ());
    }
    taken.map(|()| (pool_name, block))
}

/// Whether the error means that there is no room for a block, not that the block is invalid.
fn is_limit(refusal: &Refusal) -> bool {
    matches!(refusal.code, Code::Quota | Code::TooLarge)
}

/// What is missing if a limit excludes a block, in the form of losses.
fn room_for(pool: &PoolName, block: &BlockId) -> String {
    format!("room for block '{block}' of pool '{pool}'")
}

/// Restores a block of an earlier run in its pool.
fn take(
    host: &mut IoHost,
    pool: &Arc<PoolCell>,
    custodian: Custodian,
    (pool_name, block): (PoolName, BlockId),
    record: &str,
    names: Option<Names>,
    may_have_writer: bool,
) -> Result<(), Refusal> {
    let faulty = |error: latzero_shm::Fault| Refusal::new(Code::Storage, error.to_string());
    // The process that held the lock when the server died may still write, so fences continue above
    // all earlier ones. An invalid header must not use up the fences.
    let fence = custodian.lease().map_err(faulty)?.min(FENCE_KEPT_MAX) + 1;
    let version = custodian.version().map_err(faulty)?;
    // Nor may it write into a version that another writer begins: the block moves, and until then
    // its header says that it must.
    let has_writer = may_have_writer && custodian.is_lease_held().map_err(faulty)?;
    let found = Found { record, fence };
    let owner = found.owner()?;
    let account = host.with_registry(|registry, turn| registry.kept_account(&owner, turn));
    let storage = host.with_pool(pool, |pool, fx| pool.blocks().adopt(&found, &account, fx))?;
    let stored = StoredBlock::new(custodian, pool_name, block.clone(), version, names);
    if let Err(error) = stored.custodian.set_lease(fence, has_writer) {
        tracing::warn!(pool = %stored.pool, block = %stored.block, %error, "cannot reset the \
            lock of a block");
    }
    host.shared.storage.blocks.rows.note(&stored, record);
    host.shared.storage.blocks.insert(storage, stored);
    host.with_pool(pool, |pool, fx| {
        if has_writer {
            pool.blocks().abandon_writer(&block, fx);
        }
        pool.blocks().add_spares(&block, fx);
    });
    Ok(())
}

/// Accepts the memory that a client offers for a block of an earlier run.
///
/// # Errors
/// `forbidden` if it is not the memory of that block; and those of the pool.
pub(crate) fn reoffer(
    host: &mut IoHost,
    pool: &Arc<PoolCell>,
    (pool_name, block): (&PoolName, &BlockId),
    row: &BlockRow,
    offered: &OwnedFd,
) -> Result<(), Refusal> {
    let another = |why: String| {
        let message = format!(
            "the memory offered for block '{block}' is not the block's memory: \
            {why}"
        );
        Refusal::new(Code::Forbidden, message)
    };
    let custodian = Custodian::from_fd(offered).map_err(|error| another(error.to_string()))?;
    let identity = custodian
        .identity()
        .map_err(|error| another(error.to_string()))?;
    let description = custodian.description();
    let is_it = (Some(identity.0), Some(identity.1)) == (row.dev, row.ino)
        && description.generation == row.generation
        && (description.geometry.size, description.geometry.slots) == (row.size, row.slots);
    if !is_it {
        return Err(another("it belongs to another block or generation".into()));
    }
    // Its header says that it was removed: the server died before that was stored.
    if custodian.state().is_ok_and(|state| state != State::Live) {
        host.shared.storage.blocks.rows.forget(pool_name, block);
        let message = format!("block '{block}' of pool '{pool_name}' was removed");
        return Err(Refusal::new(Code::NoBlock, message));
    }
    let name = (pool_name.clone(), block.clone());
    take(host, pool, custodian, name, &rows::record(row), None, true)?;
    tracing::info!(pool = %pool_name, %block, "recovered a shared block from a client");
    Ok(())
}

/// Takes over the shared blocks of the previous server.
pub(crate) fn take_over(host: &mut IoHost, blocks: Vec<(PoolName, BlockId, OwnedFd)>) {
    for (pool_name, block, offered) in blocks {
        let unix_ms = host.now.unix_ms;
        let taken = host
            .with_registry(|registry, _| registry.pool_for_kept(unix_ms, &pool_name))
            .and_then(|(number, pool)| {
                let row = host.shared.storage.blocks.awaited_row(&pool_name, &block);
                let taken =
                    row.and_then(|row| reoffer(host, &pool, (&pool_name, &block), &row, &offered));
                if taken.is_err() {
                    host.effects.held.push((pool_name.clone(), number, 0));
                    host.with_pool(&pool, |_, _| ());
                }
                taken
            });
        if let Err(error) = taken {
            tracing::warn!(pool = %pool_name, %block, %error, "cannot take over a block");
        }
    }
}

/// Drops the blocks of an earlier run that nobody offered in time.
pub(crate) fn end_grace(shared: &ServerState, now: Time) {
    let gone = shared
        .storage
        .blocks
        .rows
        .end_grace(shared.books.started, now);
    if gone > 0 {
        tracing::info!(
            blocks = gone,
            "shared blocks of an earlier run were lost, because no client had them mapped"
        );
    }
}

/// The loop of a thread for blocks: one job after the other, until the server ends.
fn run(queue: &Receiver<Work>, files: &Files) {
    let mut waiting = VecDeque::new();
    while let Some(work) = waiting.pop_front().or_else(|| queue.recv().ok()) {
        match work {
            Work::Job(
                shared,
                pool,
                Job::Flush {
                    key,
                    storage,
                    ticket,
                },
            ) => {
                // Requests that arrived before the flush starts are covered by it.
                waiting.extend(queue.try_iter());
                let same = take_where(&mut waiting, |work| match work {
                    Work::Job(_, _, Job::Flush { storage: also, .. }) => *also == storage,
                    _ => false,
                });
                let version = shared.storage.blocks.flush(storage);
                let others = same.into_iter().filter_map(|work| match work {
                    Work::Job(_, pool, Job::Flush { key, ticket, .. }) => Some((pool, key, ticket)),
                    _ => None,
                });
                for (pool, key, ticket) in std::iter::once((pool, key, ticket)).chain(others) {
                    let what = Finished::Flushed(key, ticket, version.clone());
                    shared.loops.mailboxes[0].send(Command::BlockDone(JobResult { pool, what }));
                }
            }
            Work::Job(shared, pool, job) => {
                let keeps_name = matches!(&job, Job::Make { making, .. } if has_rights(making));
                if let Some(what) = shared.storage.blocks.run(job) {
                    if keeps_name {
                        // After a kill right behind the reply, the server must still know the owner
                        // of the name.
                        shared.storage.blocks.rows.settle_on_disk();
                    }
                    shared.loops.mailboxes[0].send(Command::BlockDone(JobResult { pool, what }));
                }
            }
            Work::Free(stored, store) => {
                let Some(names) = &stored.names else { continue };
                if let Err(error) = files.sync() {
                    tracing::warn!(file = %names, %error, "cannot flush the removal of a block's \
                        file");
                }
                // Nothing more: what was handed in before is written then, its row's end too. Where
                // the disk refuses, the next start removes the mark.
                if store.is_some_and(|store| store.commit(Vec::new()).is_ok()) {
                    files.forget(names.id());
                }
            }
        }
    }
}

/// Removes the elements that match; both lists keep their order.
fn take_where<T>(all: &mut VecDeque<T>, is_so: impl Fn(&T) -> bool) -> Vec<T> {
    let (taken, left) = std::mem::take(all)
        .into_iter()
        .partition::<Vec<_>, _>(is_so);
    *all = left.into();
    taken
}

/// Changes a block's names, unless the generation that the new one is copied from was dropped.
/// Returns whether it did.
fn change_if_wanted(
    from: Option<&StoredBlock>,
    change: impl FnOnce() -> std::io::Result<()>,
) -> std::io::Result<bool> {
    let is_wanted = from.map(StoredBlock::is_wanted);
    if is_wanted.as_ref().is_some_and(|is_wanted| !**is_wanted) {
        return Ok(false);
    }
    change()?;
    Ok(true)
}

fn removed() -> Refusal {
    Refusal::new(Code::NoBlock, "the block was just removed")
}

/// Blocks leave some descriptors to connections and administrators. The kernel gives the lowest
/// number that is free (open(2)), so the number tells how many are in use.
fn check_descriptor(making: &Making, custodian: &Custodian) -> Result<(), Refusal> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let number = u64::try_from(custodian.file().as_raw_fd()).unwrap_or(0);
    if limit.is_none_or(|limit| number < limit.saturating_sub(DESCRIPTORS_LEFT_MIN)) {
        return Ok(());
    }
    let message = format!(
        "cannot create block '{}': the server may open {} descriptors and reserves the last \
         {DESCRIPTORS_LEFT_MIN} for connections; raise the limit (ulimit -n, or LimitNOFILE= of \
         a service)",
        making.block,
        limit.unwrap_or(0)
    );
    Err(Refusal::new(Code::Quota, message))
}

fn no_storage(making: &Making, error: &CreateError) -> Refusal {
    Refusal::new(
        Code::Storage,
        format!("cannot create block '{}': {error}", making.block),
    )
}

/// What caused an error: the disk, which may recover, or the block.
trait Blame: std::fmt::Display {
    fn is_of_disk(&self) -> bool;
}

impl Blame for latzero_shm::Fault {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::Fault::Io(_))
    }
}

impl Blame for latzero_shm::HeaderError {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::HeaderError::Unreadable(_))
    }
}

impl Blame for latzero_shm::WriteError {
    fn is_of_disk(&self) -> bool {
        matches!(self, latzero_shm::WriteError::Fault(fault) if fault.is_of_disk())
    }
}

fn corrupt(stored: &StoredBlock, error: &impl Blame) -> Refusal {
    tracing::error!(pool = %stored.pool, block = %stored.block, %error, "a block is unusable");
    // The advice must not lose data: a file that cannot be read now may be intact on disk.
    let advice = match error.is_of_disk() {
        true => "check the disk and the kernel log, and restart the server when the disk works",
        false => "restore it from a backup, or remove and recreate it",
    };
    Refusal::new(
        Code::Storage,
        format!(
            "block '{}' of pool '{}' is unusable: {error}; {advice}",
            stored.block, stored.pool
        ),
    )
}

fn out_of_range(stored: &StoredBlock) -> Refusal {
    let size = stored.custodian.description().geometry.size;
    Refusal::new(
        Code::OutOfRange,
        format!(
            "the range is outside block '{}', which has {size} bytes; nothing was written",
            stored.block
        ),
    )
}

fn conflict(stored: &StoredBlock, current: u64) -> Refusal {
    Refusal::new(
        Code::VersionConflict,
        format!("block '{}' has version {current}", stored.block),
    )
}

fn contended(stored: &StoredBlock) -> Refusal {
    Refusal::new(
        Code::Contended,
        format!(
            "block '{}' is written too often to read a consistent version; try again",
            stored.block
        ),
    )
}

fn write_error(stored: &StoredBlock, error: latzero_shm::WriteError) -> Refusal {
    use latzero_shm::WriteError;
    match error {
        WriteError::OutOfRange => out_of_range(stored),
        WriteError::Conflict { current } => conflict(stored, current),
        WriteError::Contended => contended(stored),
        other => corrupt(stored, &other),
    }
}

/// The pool's name as sixteen bytes (FNV-1a, twice): the same on every start.
fn pool_id(pool: &PoolName) -> [u8; 16] {
    let hash = |start: u64| {
        pool.as_str().bytes().fold(start, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let mut id = [0; 16];
    id[..8].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_le_bytes());
    id[8..].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_le_bytes());
    id
}

fn unix_ns() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests;
