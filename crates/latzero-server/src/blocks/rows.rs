//! The rows of blocks in the store. After a restart they identify memory that clients still hold,
//! and reveal missing files.
//!
//! A shared block is memory without a name. When the server dies, clients that have it mapped keep
//! it alive. When the server is back they offer their descriptors (`memory_reoffer`). A descriptor
//! with the boot, device and inode of a row is that block. The server waits for such offers for
//! some time after its start; then the rows are deleted.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use latzero_fabric::Time;
use latzero_protocol::memory::Kind;
use latzero_protocol::{AppId, BlockId, PoolName};
use latzero_store::{BlockRow, RowChange, Store};
use serde_json::Value;

use super::StoredBlock;

/// How long clients have to offer the blocks that they hold, in milliseconds.
pub(super) const GRACE_MS: u64 = 30_000;

type Name = (PoolName, BlockId);

/// The rows, and for which of them clients may still offer the memory.
#[derive(Default)]
pub(crate) struct Rows {
    /// Absent in tests that need only blocks.
    store: Option<Store>,
    boot_id: String,
    awaited: Mutex<HashMap<Name, BlockRow>>,
    is_awaiting: AtomicBool,
    /// The greatest generation of all ended blocks.
    ended: AtomicU64,
}

/// The setting that records it for the next run.
pub(crate) const ENDED: &str = "block_generations_ended";

impl Rows {
    pub(crate) fn new(store: Store, boot_id: &str) -> Rows {
        Rows {
            store: Some(store),
            boot_id: boot_id.to_owned(),
            ..Rows::default()
        }
    }

    /// This boot of the machine as a number that is not 0; none if the system does not report it,
    /// and then no two boots are equal.
    pub(super) fn boot(&self) -> Option<u64> {
        let bytes = self.boot_id.bytes();
        // FNV-1a.
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (!self.boot_id.is_empty()).then_some(hash | 1)
    }

    /// Sorts the rows of an earlier run: clients may offer shared blocks of this boot; the rows of
    /// persistent blocks are returned, and all others are deleted.
    pub(super) fn expect_blocks(&self, rows: Vec<BlockRow>) -> Vec<BlockRow> {
        let mut persistent = Vec::new();
        for row in rows {
            let name = (PoolName::new(&row.pool), BlockId::new(&row.block_id));
            match (row.kind.as_str(), name) {
                ("persistent", (Ok(_), Ok(_))) => persistent.push(row),
                ("shared", (Ok(pool), Ok(block)))
                    if row.boot_id.as_deref() == Some(&self.boot_id)
                        && !self.boot_id.is_empty() =>
                {
                    self.expected().insert((pool, block), row);
                }
                _ => self.submit(RowChange::RemoveBlock {
                    pool: row.pool,
                    block_id: row.block_id,
                }),
            }
        }
        let count = self.expected().len();
        if count > 0 {
            tracing::info!(
                blocks = count,
                "waiting for clients that still hold shared blocks of an earlier run"
            );
        }
        self.is_awaiting.store(count > 0, Relaxed);
        persistent
    }

    fn expected(&self) -> std::sync::MutexGuard<'_, HashMap<Name, BlockRow>> {
        self.awaited
            .lock()
            .expect("no thread panics while holding this lock")
    }

    /// Whether clients may still offer any block.
    pub(crate) fn is_awaiting(&self) -> bool {
        self.is_awaiting.load(Relaxed)
    }

    /// The row of a block whose memory is awaited.
    pub(super) fn awaited_row(&self, pool: &PoolName, block: &BlockId) -> Option<BlockRow> {
        self.expected().get(&(pool.clone(), block.clone())).cloned()
    }

    /// The owner of memory that is awaited: of that block, or of any in the pool.
    pub(super) fn awaited_owner(&self, pool: &PoolName, block: Option<&BlockId>) -> Option<AppId> {
        if !self.is_awaiting() {
            return None;
        }
        let awaited = self.expected();
        let row = match block {
            Some(block) => awaited.get(&(pool.clone(), block.clone())),
            None => {
                let mut all = awaited.iter();
                all.find_map(|((of, _), row)| (of == pool).then_some(row))
            }
        };
        AppId::new(&row?.owner).ok()
    }

    /// A block was restored or removed: it is no longer expected.
    fn settle(&self, pool: &PoolName, block: &BlockId) {
        if !self.is_awaiting() {
            return;
        }
        let mut awaited = self.expected();
        awaited.remove(&(pool.clone(), block.clone()));
        self.is_awaiting.store(!awaited.is_empty(), Relaxed);
    }

    /// Where the rows are.
    pub(super) fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Stops waiting for blocks that no client offered, and returns their number.
    pub(super) fn end_grace(&self, since_start: Time, now: Time) -> usize {
        if !self.is_awaiting() || now < since_start.after_ms(GRACE_MS) {
            return 0;
        }
        let gone = std::mem::take(&mut *self.expected());
        self.is_awaiting.store(false, Relaxed);
        for ((pool, block), row) in &gone {
            self.note_end(row.generation);
            self.forget(pool, block);
        }
        gone.len()
    }

    /// Stores a block's current state, from its record.
    pub(super) fn note(&self, stored: &StoredBlock, record: &str) {
        self.settle(&stored.pool, &stored.block);
        let Ok(record) = serde_json::from_str::<Value>(record) else {
            return;
        };
        // The block ends with the server, like the policy of its pool.
        if record["outlives"] == false {
            return;
        }
        let Some(row) = self.row(stored, &record) else {
            tracing::warn!(pool = %stored.pool, block = %stored.block, "cannot write the row of \
                a block");
            return;
        };
        self.submit(RowChange::PutBlock(row));
    }

    fn row(&self, stored: &StoredBlock, record: &Value) -> Option<BlockRow> {
        let description = stored.custodian.description();
        let (dev, ino) = stored.custodian.identity().ok()?;
        let is_shared = stored.kind == Kind::Shared;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX));
        Some(BlockRow {
            pool: stored.pool.as_str().into(),
            block_id: stored.block.as_str().into(),
            kind: stored.kind.as_str().into(),
            size: description.geometry.size,
            slots: description.geometry.slots,
            layout: record.get("layout").map(Value::to_string),
            permissions: record["permissions"].to_string(),
            owner: record["owner"].as_str()?.into(),
            lifetime: record["lifetime"].as_str().unwrap_or("pool").into(),
            generation: description.generation,
            // Both are in the block's own header, where they stay true.
            version: 0,
            fence: 0,
            boot_id: is_shared.then(|| self.boot_id.clone()),
            dev: is_shared.then_some(dev),
            ino: is_shared.then_some(ino),
            file: stored.names.as_ref().map(|names| names.id().to_owned()),
            created: record["created"].as_i64().unwrap_or(now),
            updated: now,
            sealed: record.get("sealed").map(Value::to_string),
        })
    }

    /// A block ended in this generation: a block of a later run with its name starts after it.
    pub(super) fn note_end(&self, generation: u64) {
        if self.ended.fetch_max(generation, Relaxed) < generation {
            self.submit(RowChange::PutSetting {
                key: ENDED.into(),
                value: generation.to_string(),
            });
        }
    }

    pub(super) fn set_ended(&self, generation: u64) {
        self.ended.fetch_max(generation, Relaxed);
    }

    /// A block was removed.
    pub(super) fn forget(&self, pool: &PoolName, block: &BlockId) {
        self.settle(pool, block);
        self.submit(RowChange::RemoveBlock {
            pool: pool.as_str().into(),
            block_id: block.as_str().into(),
        });
    }

    /// Waits until the rows that were written so far are on disk, or cannot be stored.
    pub(super) fn settle_on_disk(&self) {
        let Some(store) = &self.store else { return };
        // This number does not exist: the request only serves to be queued after the others.
        if let Err(error) = store.commit(vec![RowChange::RemoveAnswer { number: 0 }]) {
            tracing::warn!(%error, "cannot store the record of a block");
        }
    }

    fn submit(&self, change: RowChange) {
        if let Some(store) = &self.store
            && let Err(error) = store.submit(change, None)
        {
            tracing::warn!(%error, "cannot store the record of a block");
        }
    }
}

/// The record that a row was made from.
pub(super) fn record(row: &BlockRow) -> String {
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let mut record = serde_json::json!({
        "pool": row.pool, "block_id": row.block_id, "kind": row.kind, "size": row.size,
        "slots": row.slots,
        "owner": row.owner, "generation": row.generation, "created": row.created,
        "lifetime": row.lifetime,
        "permissions": json(&row.permissions),
    });
    if let Some(layout) = &row.layout {
        record["layout"] = json(layout);
    }
    if let Some(sealed) = &row.sealed {
        record["sealed"] = json(sealed);
    }
    record.to_string()
}
