//! What outlives the server: the store, and who waits for its word.
//!
//! Changes go to the store's thread without waiting. Where a connection was promised something, the promise carries a
//! ticket, and the store's word about it goes to the mailbox of the connection's loop, whose session then answers. What an
//! earlier run left is taken in before the server listens.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use latzero_fabric::keep::{AnswerRow, AppRow, CallRow, Change, PoolRow};
use latzero_fabric::{Host as _, Time};
use latzero_protocol::{AppId, Code, PoolName, Refusal};
use latzero_store::{
    BlockRow, Contents, Durability, Opened, Options, Report, Store, StoreError, Ticket,
};
use serde_json::{Value, json};

use crate::host::IoHost;
use crate::peer::Peer;
use crate::settings::{Settings, StoreDurability};
use crate::shared::{Command, Shared};
use crate::startup::StartupError;

/// The kernel's name for this run of the machine (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name under which the time of the last sign of life is stored, in milliseconds since the Unix epoch.
const ALIVE: &str = "alive";

/// The name under which the kernel's name for the run of the machine is stored.
const BOOT: &str = "boot";

/// Who was promised what, and whom to tell.
#[derive(Default)]
struct Promises {
    tickets: Mutex<HashMap<Ticket, Arc<Peer>>>,
    shared: OnceLock<Weak<Shared>>,
}

impl Promises {
    fn take(&self, ticket: Ticket) -> Option<Arc<Peer>> {
        self.tickets
            .lock()
            .expect("nothing panics under this lock")
            .remove(&ticket)
    }

    /// Tells the loops what became of promises, each loop once.
    fn tell(&self, done: &mut Vec<(Ticket, Result<(), StoreError>)>) {
        let Some(shared) = self.shared.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut told: Vec<Vec<Command>> = Vec::new();
        told.resize_with(shared.mailboxes.len(), Vec::new);
        for (ticket, result) in done.drain(..) {
            if let Some(peer) = self.take(ticket) {
                let result = result.map_err(|error| Refusal::new(Code::Storage, error.to_string()));
                told[peer.home].push(Command::Kept(peer, result));
            }
        }
        for (mailbox, commands) in shared.mailboxes.iter().zip(told) {
            mailbox.send_all(commands);
        }
    }
}

/// The store and its promises.
pub(crate) struct Keeper {
    store: Store,
    promises: Arc<Promises>,
    next_ticket: AtomicU64,
    next_number: AtomicU64,
    report: Report,
    boot_id: String,
    /// When the last backup by schedule began, in milliseconds since the Unix epoch; at first the newest one's time.
    last_backup: AtomicU64,
    /// Taken when the earlier run's contents are taken in.
    contents: Mutex<Option<Contents>>,
}

impl Keeper {
    /// Opens the store of a data directory. See [`latzero_store::open`] for what that checks and mends.
    ///
    /// # Errors
    /// Where there is no database that can be used.
    pub(crate) fn open(
        directory: &std::path::Path,
        settings: &Settings,
    ) -> Result<Keeper, StartupError> {
        let boot_id = std::fs::read_to_string(BOOT_ID).unwrap_or_default();
        let boot_id = boot_id.trim().to_owned();
        let promises = Arc::new(Promises::default());
        let told = Arc::clone(&promises);
        let options = Options {
            durability: match settings.durability {
                StoreDurability::Full => Durability::Full,
                StoreDurability::Normal => Durability::Normal,
            },
            boot_id: boot_id.clone(),
            on_done: Box::new(move |done| told.tell(done)),
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
        Ok(Keeper {
            store,
            promises,
            next_ticket: AtomicU64::new(0),
            next_number: AtomicU64::new(last + 1),
            report,
            boot_id,
            last_backup: AtomicU64::new(newest_backup(directory)),
            contents: Mutex::new(Some(contents)),
        })
    }

    /// Where to tell what became of promises.
    pub(crate) fn attach(&self, shared: &Arc<Shared>) {
        assert!(
            self.promises.shared.set(Arc::downgrade(shared)).is_ok(),
            "a keeper is attached once"
        );
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Relaxed)
    }

    pub(crate) fn last_backup(&self) -> u64 {
        self.last_backup.load(Relaxed)
    }

    pub(crate) fn note_backup(&self, unix_ms: u64) {
        self.last_backup.store(unix_ms, Relaxed);
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Hands a change to the store, with a promise or without.
    pub(crate) fn keep(&self, change: Change, promise: Option<&Arc<Peer>>) {
        let ticket = promise.map(|peer| {
            let ticket = self.next_ticket.fetch_add(1, Relaxed);
            let mut tickets = self.promises.tickets.lock();
            let tickets = tickets.as_mut().expect("nothing panics under this lock");
            tickets.insert(ticket, Arc::clone(peer));
            ticket
        });
        if let Err(error) = self.store.submit(row(change), ticket) {
            match ticket {
                Some(ticket) => {
                    let full = StoreError::from(error);
                    self.promises.tell(&mut vec![(ticket, Err(full))]);
                }
                None => {
                    tracing::warn!(%error, "something can't be stored; it is lost at the next restart")
                }
            }
        }
    }

    /// Leaves a sign of life: after a kill it says until when apps were seen at least.
    pub(crate) fn note_alive(&self, unix_ms: u64) {
        self.set(ALIVE, &unix_ms.to_string());
    }

    fn set(&self, key: &str, value: &str) {
        let change = latzero_store::Change::PutSetting {
            key: key.into(),
            value: value.into(),
        };
        if let Err(error) = self.store.submit(change, None) {
            tracing::debug!(key, %error, "a setting can't be stored");
        }
    }

    /// The kernel's name for this run of the machine; empty where it has none.
    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The store as `health` and `stats` show it.
    pub(crate) fn to_json(&self) -> Value {
        let status = self.store.status();
        json!({
            "failing": status.failing, "failing_since": status.failing_since, "waiting": status.waiting,
            "retained": status.retained, "commits": status.commits, "changes": status.changes,
            "failures": status.failures, "dropped": status.dropped, "last_backup": status.last_backup,
            "db_bytes": status.db_bytes, "wal_bytes": status.wal_bytes,
        })
    }

    /// Whether the store is well, and what was seen of it.
    pub(crate) fn health(&self) -> (bool, Value) {
        let status = self.store.status();
        let mut seen = json!({"retained": status.retained, "last_backup": status.last_backup});
        if let Some(reason) = &status.failing {
            seen["failing"] = reason.as_str().into();
            seen["failing_since"] = status.failing_since.into();
        }
        if self.report.is_degraded {
            // What was lost does not come back by itself; the next clean start no longer says it.
            seen["at_start"] = self.report.texts.clone().into();
        }
        let is_ok = status.failing.is_none() && status.dropped == 0 && !self.report.is_degraded;
        (is_ok, seen)
    }

    /// Writes what waits and closes the database cleanly; for the server's end.
    pub(crate) fn close(&self) {
        if let Err(error) = self.store.clone().close() {
            tracing::error!(%error, "the database could not be closed cleanly");
        }
    }
}

/// When the newest backup was made; now where there is none, so that a server that was just set up begins with its work.
fn newest_backup(directory: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(directory.join(latzero_store::BACKUPS));
    let times = files
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|file| file.metadata().ok()?.modified().ok());
    let newest = times.max().unwrap_or_else(std::time::SystemTime::now);
    let since = newest.duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Takes in what an earlier run left: pools first, then what waits in them, then apps. Returns the rows of blocks, and
/// whether the machine was not started anew since.
pub(crate) fn take_in(host: &mut IoHost, now: Time) -> (Vec<BlockRow>, bool) {
    let shared = Arc::clone(&host.shared);
    let keeper = &shared.keeper;
    let contents = keeper
        .contents
        .lock()
        .expect("nothing panics under this lock")
        .take();
    let Some(contents) = contents else {
        return (Vec::new(), true);
    };
    let unix_ms = host.unix_ms(now);
    let alive = contents.settings.iter().find(|(key, _)| key == ALIVE);
    let alive_until = alive.and_then(|(_, value)| value.parse().ok()).unwrap_or(0);
    let (mut apps, mut pools, mut calls, mut answers) = (0, 0, 0, 0);
    for row in contents.pools {
        let name = row.name.clone();
        let taken = pool_of(row)
            .and_then(|row| host.with_registry(|registry, _| registry.restore_pool(row)));
        match taken {
            Ok(()) => pools += 1,
            Err(error) => {
                tracing::error!(pool = %name, %error, "a pool of an earlier run can't be taken in; it stays in the database")
            }
        }
    }
    for row in contents.calls {
        let number = row.number;
        match call_of(row).map(|row| {
            let pool =
                host.with_registry(|registry, _| registry.pool_for_kept(unix_ms, &row.pool))?;
            let taken = host.with_pool(&pool.1, |pool, fx| {
                pool.restore_call((now, unix_ms), &row, fx)
            });
            taken.then_some(()).ok_or_else(senseless)
        }) {
            Ok(Ok(())) => calls += 1,
            Ok(Err(error)) | Err(error) => {
                tracing::error!(number, %error, "a parked call can't be taken in; it stays in the database")
            }
        }
    }
    for row in contents.answers {
        let number = row.number;
        match answer_of(row).map(|row| {
            let pool =
                host.with_registry(|registry, _| registry.pool_for_kept(unix_ms, &row.pool))?;
            let taken = host.with_pool(&pool.1, |pool, fx| {
                pool.restore_answer((now, unix_ms), &row, fx)
            });
            taken.then_some(()).ok_or_else(senseless)
        }) {
            Ok(Ok(())) => answers += 1,
            Ok(Err(error)) | Err(error) => {
                tracing::error!(number, %error, "an answer can't be taken in; it stays in the database")
            }
        }
    }
    host.with_registry(|registry, _| {
        for row in contents.apps {
            let Some(row) = app_of(row) else {
                continue;
            };
            if registry.restore_app(row, alive_until) {
                apps += 1;
            }
        }
    });
    if apps + pools + calls + answers > 0 {
        tracing::info!(apps, pools, calls, answers, "taken in from an earlier run");
    }
    keeper.note_alive(unix_ms);
    let boot = contents.settings.iter().find(|(key, _)| key == BOOT);
    let is_same_boot = boot.is_some_and(|(_, boot)| *boot == keeper.boot_id);
    keeper.set(BOOT, &keeper.boot_id);
    (contents.blocks, is_same_boot)
}

fn senseless() -> Refusal {
    Refusal::new(Code::Storage, "its row makes no sense")
}

fn ms(unix_ms: i64) -> u64 {
    u64::try_from(unix_ms).unwrap_or(0)
}

fn time(unix_ms: u64) -> i64 {
    i64::try_from(unix_ms).unwrap_or(i64::MAX)
}

fn app_of(row: latzero_store::AppRow) -> Option<AppRow> {
    Some(AppRow {
        app_id: AppId::new(&row.app_id).ok()?,
        pools: row.pools,
        triggers: row.triggers,
        watches: row.watches,
        meta: row.meta,
        registered: ms(row.registered),
        last_seen: ms(row.last_seen),
    })
}

fn pool_of(row: latzero_store::PoolRow) -> Result<PoolRow, Refusal> {
    Ok(PoolRow {
        name: PoolName::new(&row.name)?,
        owner: row.owner.map(|owner| AppId::new(&owner)).transpose()?,
        policy: row.policy.unwrap_or_else(|| "{}".into()),
        properties: row.properties,
        created: ms(row.created),
    })
}

fn call_of(row: latzero_store::CallRow) -> Result<CallRow, Refusal> {
    Ok(CallRow {
        number: row.number,
        pool: PoolName::new(&row.pool)?,
        process: row.process,
        destination: row.destination,
        caller: AppId::new(&row.caller)?,
        id: row.call_id,
        envelope: row.envelope,
        attachment: row.attachment,
        idempotency_key: row.idempotency_key,
        expires: ms(row.expires),
        attempt: row.attempt,
        parked: ms(row.parked),
    })
}

fn answer_of(row: latzero_store::AnswerRow) -> Result<AnswerRow, Refusal> {
    Ok(AnswerRow {
        number: row.number,
        pool: PoolName::new(&row.pool)?,
        caller: AppId::new(&row.caller)?,
        id: row.call_id,
        idempotency_key: row.idempotency_key,
        frame: row.frame,
        expires: ms(row.expires),
    })
}

/// A change as the store has it.
fn row(change: Change) -> latzero_store::Change {
    use latzero_store::Change as Stored;
    match change {
        Change::App(row) => Stored::PutApp(latzero_store::AppRow {
            app_id: row.app_id.as_str().into(),
            pools: row.pools,
            triggers: row.triggers,
            watches: row.watches,
            meta: row.meta,
            protocol_version: latzero_protocol::limits::PROTOCOL_VERSION
                .try_into()
                .unwrap_or(u32::MAX),
            registered: time(row.registered),
            last_seen: time(row.last_seen),
        }),
        Change::Seen(app, unix_ms) => Stored::SeenApp {
            app_id: app.as_str().into(),
            last_seen: time(unix_ms),
        },
        Change::ForgetApp(app) => Stored::ForgetApp {
            app_id: app.as_str().into(),
        },
        Change::Pool(row) => Stored::PutPool(latzero_store::PoolRow {
            name: row.name.as_str().into(),
            kind: "local".into(),
            encrypted: false,
            owner: row.owner.map(|owner| owner.as_str().into()),
            policy: Some(row.policy),
            properties: row.properties,
            descriptor: None,
            created: time(row.created),
            updated: time(row.created),
        }),
        Change::ForgetPool(name) => Stored::RemovePool {
            name: name.as_str().into(),
        },
        Change::Call(row) => Stored::PutCall(latzero_store::CallRow {
            number: row.number,
            pool: row.pool.as_str().into(),
            process: row.process,
            destination: row.destination,
            caller: row.caller.as_str().into(),
            call_id: row.id,
            envelope: row.envelope,
            attachment: row.attachment,
            idempotency_key: row.idempotency_key,
            expires: time(row.expires),
            attempt: row.attempt,
            parked: time(row.parked),
        }),
        Change::Attempt(number, attempt) => Stored::NoteAttempt { number, attempt },
        Change::EndCall(number) => Stored::RemoveCall { number },
        Change::Answer(row) => Stored::PutAnswer {
            ends_call: Some(row.number),
            answer: latzero_store::AnswerRow {
                number: row.number,
                caller: row.caller.as_str().into(),
                call_id: row.id,
                pool: row.pool.as_str().into(),
                idempotency_key: row.idempotency_key,
                frame: row.frame,
                expires: time(row.expires),
            },
        },
        Change::EndAnswer(number) => Stored::RemoveAnswer { number },
    }
}
