//! Durable state: the connection between the core and the store.
//!
//! Changes go to the store's thread without waiting. If a client waits for a change, it carries a
//! ticket. The store's reply goes to the mailbox of the connection's loop, whose session then
//! answers. The state of an earlier run is loaded before the server listens.

mod pending;
mod rows;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use latzero_fabric::driver::Promise;
use latzero_fabric::ledger::Account;
use latzero_fabric::rows::StoreChange;
use latzero_fabric::{Driver as _, Pool, Time, Turn};
use latzero_protocol::{AppId, Code, PoolName, Refusal};
use latzero_store::{BlockRow, Contents, Durability, Opened, Options, Report, Store, StoreError};
use serde_json::{Value, json};

use crate::blocks::ENDED;
use crate::host::IoHost;
use crate::losses::{Loss, LossList, Part};
use crate::settings::{Settings, StoreDurability};
use crate::shared::ServerState;
use crate::startup::StartupError;
use pending::PendingReplies;
use rows::{answer_of, app_of, binding_of, call_of, ms, pool_of, row};

/// The kernel's name for this run of the machine (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name under which the time of the last heartbeat is stored, in milliseconds since the Unix
/// epoch.
const ALIVE: &str = "alive";

/// The name under which the state of the clocks is stored, in the form of [`crate::steps`].
const CLOCK: &str = "clock";

/// The name under which the kernel's name for the run of the machine is stored.
const BOOT: &str = "boot";

/// The name under which unsettled losses are stored.
const LOSSES: &str = "losses";

/// The name of the stored secret that makes unknown pools look like encrypted ones.
const POOL_SECRET: &str = "pool_secret";

/// The store and its pending replies.
pub(crate) struct Persistence {
    store: Store,
    promises: Arc<PendingReplies>,
    next_ticket: AtomicU64,
    /// The greatest number of the parked calls and answers of earlier runs.
    pub(crate) last_number: u64,
    losses: Arc<LossList>,
    boot_id: String,
    /// When the last scheduled backup started.
    last_backup: Mutex<LastBackup>,
    /// Taken when the earlier run's contents are loaded.
    contents: Mutex<Option<Contents>>,
}

impl Persistence {
    /// Opens the store of a data directory. See [`latzero_store::open`] for what that checks and
    /// repairs.
    ///
    /// # Errors
    /// If there is no usable database.
    pub(crate) fn open(
        directory: &std::path::Path,
        settings: &Settings,
    ) -> Result<Persistence, StartupError> {
        let boot_id = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
        let boot_id = boot_id.trim().to_owned();
        let promises = Arc::new(PendingReplies::default());
        let pending = Arc::clone(&promises);
        let options = Options {
            durability: match settings.durability {
                StoreDurability::Full => Durability::Full,
                StoreDurability::Normal => Durability::Normal,
            },
            boot_id: boot_id.clone(),
            on_done: Box::new(move |done| pending.done(done)),
            ..Options::default()
        };
        let Opened {
            store,
            contents,
            report,
        } = latzero_store::open(directory, options).map_err(StartupError::Store)?;
        let calls = contents.calls.iter().map(|row| row.number);
        let answers = contents.answers.iter().map(|row| row.number);
        let last = calls.chain(answers).max().unwrap_or(0);
        let last_backup = Mutex::new(LastBackup::before(store.status().last_backup, now_ms()));
        let losses = Arc::new(LossList::default());
        if let Some((_, earlier)) = contents.settings.iter().find(|(key, _)| key == LOSSES) {
            losses.load(earlier);
        }
        note_report(&losses, &report);
        Ok(Persistence {
            store,
            promises,
            next_ticket: AtomicU64::new(1),
            last_number: last,
            losses,
            boot_id,
            last_backup,
            contents: Mutex::new(Some(contents)),
        })
    }

    /// The receiver of the store's results.
    pub(crate) fn attach(&self, shared: &Arc<ServerState>) {
        assert!(
            self.promises.shared.set(Arc::downgrade(shared)).is_ok(),
            "a store is attached once"
        );
    }

    /// Whether the last scheduled backup is older than `interval_ms`; then the next one starts now.
    pub(crate) fn is_backup_due(&self, now: Time, interval_ms: u64) -> bool {
        let last = self.last_backup.lock();
        let mut last = last.expect("no thread panics while holding this lock");
        let is_due = interval_ms > 0 && last.age_ms(now) >= interval_ms;
        if is_due {
            *last = LastBackup {
                age_ms: 0,
                at: Some(now),
            };
        }
        is_due
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// The list of losses, for components that find one.
    pub(crate) fn losses(&self) -> &Arc<LossList> {
        &self.losses
    }

    /// Stores what is lost, so that a crash does not hide it.
    pub(crate) fn store_losses(&self) {
        if let Some(losses) = self.losses.changed() {
            self.set(LOSSES, &losses);
        }
    }

    /// Passes a change to the store, with or without a pending reply.
    pub(crate) fn write(&self, change: StoreChange, promise: Option<Promise<'_, IoHost>>) {
        let Some(promise) = promise else {
            if let Err(error) = self.store.submit(row(change), None) {
                tracing::warn!(%error, "cannot store a change; it is lost at the next restart");
            }
            return;
        };
        let ticket = self.next_ticket.fetch_add(1, Relaxed);
        // Before the store can have an answer.
        let before = match (promise, &change) {
            (Promise::Session(peer), _) => self.promises.line().promise(ticket, peer),
            (Promise::Answer, StoreChange::Answer(row)) => {
                let answer = (row.pool.clone(), row.number);
                self.promises.line().await_answer(ticket, answer);
                None
            }
            (Promise::Answer, _) => unreachable!("only an answer's row is awaited like this"),
        };
        if let Err(error) = self.store.submit(row(change), Some(ticket)) {
            let full = Refusal::new(Code::Storage, StoreError::from(error).to_string());
            let mut line = self.promises.line();
            let word = line.refused((ticket, before), full);
            self.promises.reply(&line, word.into_iter().collect());
        }
    }

    /// Stores a heartbeat: after a kill it says until when apps were connected at least.
    /// Notes the state of all clocks for the next start.
    pub(crate) fn note_clock(&self, record: &str) {
        self.set(CLOCK, record);
    }

    pub(crate) fn note_alive(&self, unix_ms: u64) {
        self.set(ALIVE, &unix_ms.to_string());
    }

    fn set(&self, key: &str, value: &str) {
        let change = latzero_store::RowChange::PutSetting {
            key: key.into(),
            value: value.into(),
        };
        if let Err(error) = self.store.submit(change, None) {
            tracing::debug!(key, %error, "cannot store a setting");
        }
    }

    /// The secret that makes a name that is not an encrypted pool look like one. It is generated
    /// once and then stays the same.
    pub(crate) fn pool_secret(&self) -> [u8; 32] {
        let contents = self
            .contents
            .lock()
            .expect("no thread panics while holding this lock");
        let settings = contents.iter().flat_map(|contents| &contents.settings);
        let mut known = settings.filter(|(key, _)| key == POOL_SECRET);
        let known = known.find_map(|(_, value)| latzero_crypto::text::decode(value));
        known.unwrap_or_else(|| {
            let secret = crate::random::bytes();
            self.set(POOL_SECRET, &latzero_crypto::text::encode(&secret));
            secret
        })
    }

    /// The kernel's name for this run of the machine; empty if it has none.
    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The store as `health` and `stats` show it.
    pub(crate) fn to_json(&self) -> Value {
        let status = self.store.status();
        json!({
            "failing": status.failing, "failing_since": status.failing_since,
            "waiting": status.waiting,
            "retained": status.retained, "commits": status.commits, "changes": status.changes,
            "failures": status.failures, "dropped": status.dropped,
            "last_backup": status.last_backup,
            "db_bytes": status.db_bytes, "wal_bytes": status.wal_bytes,
        })
    }

    /// Whether the store is healthy, with details.
    pub(crate) fn health(&self) -> (bool, Value) {
        let status = self.store.status();
        let mut seen = json!({"retained": status.retained, "last_backup": status.last_backup});
        if let Some(reason) = &status.failing {
            seen["failing"] = reason.as_str().into();
            seen["failing_since"] = status.failing_since.into();
        }
        if let Some(reason) = status.misplaced {
            seen["misplaced"] = reason.into();
        }
        let writes = status.failing.is_none() && status.misplaced.is_none();
        (writes && status.dropped == 0, seen)
    }

    /// Writes pending changes and closes the database cleanly, when the server ends.
    pub(crate) fn close(&self) {
        // An orderly end: what was lost was there to be seen.
        self.set(LOSSES, "[]");
        if let Err(error) = self.store.clone().close() {
            tracing::error!(%error, "the database could not be closed cleanly");
        }
    }
}

/// What opening the database found.
fn note_report(losses: &LossList, report: &Report) {
    if report.is_degraded {
        let remedy =
            "check the files kept beside it; `latzero backup ls --verify` lists the backups";
        losses.note(Loss::new(
            Part::Store,
            "data.db",
            report.texts.join("; "),
            remedy,
        ));
    }
}

/// When the last backup was made, by a monotonic clock, because the wall clock may jump.
struct LastBackup {
    /// Its age, in milliseconds, …
    age_ms: u64,
    /// … at this time; at the first check if there is none yet.
    at: Option<Time>,
}

impl LastBackup {
    /// The age of the newest backup at the start. A new server does not start with a backup.
    fn before(newest: Option<i64>, now: i64) -> LastBackup {
        let age_ms = match newest {
            None => 0,
            // The clock was ahead then, so its age is unknown.
            Some(newest) if newest > now => u64::MAX / 2,
            Some(newest) => ms(now - newest),
        };
        LastBackup { age_ms, at: None }
    }

    fn age_ms(&mut self, now: Time) -> u64 {
        let at = *self.at.get_or_insert(now);
        self.age_ms + now.since(at).as_millis() as u64
    }
}

fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

/// Loads the state of an earlier run: pools first, then their parked calls and answers, then apps.
/// Returns the rows of blocks, and whether the machine has not rebooted since.
pub(crate) fn load(host: &mut IoHost) -> (Vec<BlockRow>, bool) {
    let shared = Arc::clone(&host.shared);
    let keeper = &shared.storage.persistence;
    let contents = keeper
        .contents
        .lock()
        .expect("no thread panics while holding this lock")
        .take();
    let Some(contents) = contents else {
        return (Vec::new(), true);
    };
    host.with_numbers(|numbers| numbers.count_on_after(keeper.last_number));
    let clock = contents.settings.iter().find(|(key, _)| key == CLOCK);
    if let Some((_, record)) = clock {
        crate::steps::restore(record, &shared);
        host.now = shared.clock.read();
    }
    keeper.note_clock(&crate::steps::record(&shared));
    let unix_ms = host.now.unix_ms;
    let alive = contents.settings.iter().find(|(key, _)| key == ALIVE);
    let alive_until = alive.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
    let (mut apps, mut pools, mut calls, mut answers) = (0, 0, 0, 0);
    for row in contents.pools {
        let name = row.name.clone();
        let taken = pool_of(row).and_then(|row| {
            if !row.is_durable {
                keeper.write(StoreChange::ForgetPool(row.name.clone()), None);
            }
            host.with_registry(|registry, turn| registry.restore_pool(row, turn.time()))
        });
        match taken {
            Ok(()) => pools += 1,
            Err(error) => {
                tracing::error!(pool = %name, %error, "the policy of a stored pool is invalid, \
                    so only its owner may use the pool; remove the pool, or restore a backup")
            }
        }
    }
    host.with_registry(|registry, _| {
        if let Some(unix_ms) = contents.restored_ms {
            registry.mark_restored(unix_ms);
        }
        for row in contents.descriptors {
            if let Ok(pool) = PoolName::new(&row.pool) {
                let ledger = &shared.core.context.ledger;
                registry.restore_descriptor(&pool, (row.epoch, row.descriptor), ledger);
            }
        }
    });
    // Before the calls: one that repeats an answered call gets that answer.
    for row in contents.answers {
        let number = row.number;
        let taken = answer_of(row).and_then(|row| {
            let account = account_of(host, &row.caller);
            restore_parked(host, unix_ms, &row.pool, |pool, turn| {
                pool.durable().restore_answer(&row, &account, turn)
            })
        });
        match taken {
            Ok(()) => answers += 1,
            Err(error) => {
                tracing::error!(number, %error, "cannot restore an answer; it stays in the \
                    database")
            }
        }
    }
    for row in contents.calls {
        let number = row.number;
        let taken = call_of(row).and_then(|row| {
            let account = account_of(host, &row.caller);
            restore_parked(host, unix_ms, &row.pool, |pool, turn| {
                pool.durable().restore_call(&row, &account, turn)
            })
        });
        match taken {
            Ok(()) => calls += 1,
            Err(error) => {
                tracing::error!(number, %error, "cannot restore a parked call; it stays in the \
                    database")
            }
        }
    }
    host.with_registry(|registry, _| {
        // Before any app is admitted.
        for row in contents.bindings {
            if let Some(row) = binding_of(row) {
                registry.restore_binding(&row);
            }
        }
        for row in contents.apps {
            let Some(row) = app_of(row) else {
                continue;
            };
            if registry.restore_app(row, alive_until, &shared.core.context.ledger) {
                apps += 1;
            }
        }
    });
    if apps + pools + calls + answers > 0 {
        tracing::info!(
            apps,
            pools,
            calls,
            answers,
            "restored the state of the earlier run"
        );
    }
    keeper.note_alive(unix_ms);
    if let Some((_, ended)) = contents.settings.iter().find(|(key, _)| key == ENDED) {
        shared.storage.blocks.restore_removed(ended);
    }
    // Before any client is served, so that a crash does not hide what this start found.
    if let Some(losses) = keeper.losses.changed() {
        let change = latzero_store::RowChange::PutSetting {
            key: LOSSES.into(),
            value: losses,
        };
        if let Err(error) = keeper.store.commit(vec![change]) {
            tracing::warn!(%error, "cannot store the losses found at this start");
        }
    }
    let boot = contents.settings.iter().find(|(key, _)| key == BOOT);
    // If the boot id is not readable, the machine may have rebooted.
    let is_same_boot =
        !keeper.boot_id.is_empty() && boot.is_some_and(|(_, boot)| *boot == keeper.boot_id);
    keeper.set(BOOT, &keeper.boot_id);
    (contents.blocks, is_same_boot)
}

fn account_of(host: &mut IoHost, app: &AppId) -> Arc<Account> {
    host.with_registry(|registry, turn| registry.kept_account(app, turn))
}

/// Restores a waiting call or answer in its pool.
fn restore_parked(
    host: &mut IoHost,
    unix_ms: u64,
    name: &PoolName,
    restore: impl FnOnce(&mut Pool<IoHost>, &mut Turn<'_, IoHost>) -> bool,
) -> Result<(), Refusal> {
    let (number, pool) = host.with_registry(|registry, _| registry.pool_for_kept(unix_ms, name))?;
    if host.with_pool(&pool, restore) {
        return Ok(());
    }
    // A pool that was created for it is removed again.
    host.with_registry(|registry, _| registry.count_held(name, number, 0));
    Err(invalid_row())
}

fn invalid_row() -> Refusal {
    Refusal::new(Code::Storage, "the stored row is invalid")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * 60 * 60 * 1000;

    fn age(newest: Option<i64>, now: i64) -> u64 {
        LastBackup::before(newest, now).age_ms(Time(7))
    }

    #[test]
    fn a_clock_that_was_ahead_does_not_stop_the_schedule() {
        let now = 1_700_000_000_000;
        let day = i64::try_from(DAY_MS).unwrap();
        assert_eq!(age(None, now), 0);
        assert_eq!(age(Some(now - 2 * day), now), 2 * DAY_MS);
        assert!(age(Some(now + 365 * day), now) >= DAY_MS);
    }

    #[test]
    fn the_age_uses_the_monotonic_clock() {
        let mut last = LastBackup::before(None, 0);
        assert_eq!(last.age_ms(Time(1_000_000)), 0);
        assert_eq!(last.age_ms(Time(5_000_000)), 4_000);
    }
}
