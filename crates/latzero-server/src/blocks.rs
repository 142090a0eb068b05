//! The bytes of memory blocks: one [`Custodian`] for each generation, and the thread for slow jobs.
//!
//! Pools decide about blocks and refer to storage by number; this module maps the numbers to memory
//! and files. Creating or moving a large block touches all of its memory, and a flush waits for the
//! disk. Such jobs run on a separate thread, so that no connection waits for them.

mod backup;
mod earlier;
mod errors;
mod files;
mod places;
pub(crate) mod restore;
mod rows;
mod workers;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use latzero_fabric::driver::{BlockWrite, Written};
use latzero_fabric::ledger::{Ledger, Resource};
use latzero_fabric::memory::{Job, Making, Numbers, SlowWrite, StorageId};
use latzero_fabric::pool::Found;
use latzero_fabric::{BlockKey, Limits, Time};
use latzero_protocol::memory::{Access, Kind};
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};
use latzero_shm::{Cas, CreateError, Custodian, Description, Geometry, State};
use latzero_store::{BlockRow, Store};
use serde_json::{Value, json};

pub(crate) use self::earlier::{adopt_all, end_grace, reoffer, take_over};
use self::errors::*;
use self::files::{Files, Names};
pub(crate) use self::rows::{ENDED, Rows};
use self::workers::{Work, Workers, run};
use crate::host::IoHost;
use crate::losses::{Loss, Part};
use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::timers::PoolCell;

/// Storage up to this many bytes is created directly by the loop that got the request: it takes
/// less than a millisecond.
const INLINE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The highest fence of an earlier run that is accepted to continue from.
const FENCE_KEPT_MAX: u64 = 1 << 62;

/// How many descriptors blocks leave free for everything else.
const DESCRIPTORS_LEFT_MIN: u64 = 32;

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
            .expect("no thread panics while holding this lock")
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
    Written(Box<SlowWrite<Arc<Peer>>>, Result<Written, Refusal>),
}

/// The storage of all blocks.
pub(crate) struct Blocks {
    stored: RwLock<HashMap<StorageId, Arc<StoredBlock>>>,
    numbers: Mutex<Numbers>,
    files: Arc<Files>,
    rows: Rows,
    // At most one job of each kind for each block and waiter, which are bounded, and one write for
    // each connection.
    work: Workers,
    /// The loops have ended: nobody waits for a write any more.
    is_ending: AtomicBool,
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
            writes: worker("block-writes")?,
        };
        Ok(Blocks {
            stored: RwLock::new(HashMap::new()),
            numbers: Mutex::new(Numbers::default()),
            files,
            rows,
            work,
            is_ending: AtomicBool::new(false),
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
        let stored = self
            .stored
            .read()
            .expect("no thread panics while holding this lock");
        stored.get(&storage).map(Arc::clone)
    }

    fn found(&self, storage: StorageId) -> Result<Arc<StoredBlock>, Refusal> {
        // Another loop may have removed it since the pool decided.
        self.at(storage).ok_or_else(removed)
    }

    fn all(&self) -> Vec<Arc<StoredBlock>> {
        let stored = self
            .stored
            .read()
            .expect("no thread panics while holding this lock");
        stored.values().map(Arc::clone).collect()
    }

    fn insert(&self, storage: StorageId, stored: StoredBlock) {
        self.stored
            .write()
            .expect("no thread panics while holding this lock")
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
        write: &BlockWrite<'_>,
    ) -> Result<Written, Refusal> {
        let &BlockWrite {
            offset,
            data,
            if_version,
            expected,
            copied_max,
        } = write;
        let stored = self.found(storage)?;
        let custodian = &stored.custodian;
        let written = match expected {
            None => {
                let version = custodian.write_within(copied_max, offset, data, if_version);
                version.map(|version| version.map_or(Written::Slow, Written::Version))
            }
            Some(expected) => {
                let swapped = custodian.cas_within(copied_max, offset, expected, data);
                swapped.map(|swapped| match swapped {
                    None => Written::Slow,
                    Some(Cas::Swapped { version }) => Written::Version(version),
                    Some(Cas::Differs { current, version }) => Written::Differs(version, current),
                })
            }
        };
        if let Ok(Written::Version(version)) = written {
            stored.take_results(version);
        }
        written.map_err(|error| write_error(&stored, error))
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
            Job::Write(_) => 0,
        };
        let takes_long = match &job {
            Job::Make { making, .. } => {
                making.kind == Kind::Persistent
                    || making.geometry.total().unwrap_or(u64::MAX) > INLINE_BYTES_MAX
                    || has_rights(making)
            }
            Job::Flush { .. } => true,
            Job::Drop { .. } | Job::Write(_) => false,
        };
        if let Job::Write(_) = &job {
            let work = Work::Job(Arc::clone(shared), Arc::clone(pool), job);
            shared.storage.blocks.work.write(work);
            return None;
        }
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
            Job::Write(slow) if self.is_ending.load(Relaxed) => {
                Some(Finished::Written(slow, Err(stopped())))
            }
            Job::Write(slow) => {
                let written = self.write(slow.storage(), &slow.write());
                Some(Finished::Written(slow, written))
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
            .expect("no thread panics while holding this lock")
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
        let seen = json!({"corrupt_total": total, "corrupt": corrupt});
        (total == 0, seen)
    }

    /// Waits for the write in progress, and drops those that wait: after this, no block changes by
    /// this server.
    pub(crate) fn end_writes(&self) {
        self.is_ending.store(true, Relaxed);
        let (done, is_done) = channel();
        self.work.write(Work::Report(done));
        if is_done.recv().is_err() {
            tracing::error!("the thread that writes blocks has ended");
        }
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

/// Whether access to a shared block is restricted: then its name is reserved for its owner after a
/// restart, from the first reply on.
fn has_rights(making: &Making) -> bool {
    let record: Value = serde_json::from_str(&making.record).unwrap_or_default();
    let is_open = |right: &str| record["permissions"][right] == json!(["*"]);
    making.kind == Kind::Shared && !(is_open("read") && is_open("write"))
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
