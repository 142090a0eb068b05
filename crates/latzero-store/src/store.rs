//! The handle of the store: passes changes and requests to its thread.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::change::RowChange;
use crate::error::{BackupError, StoreError, SubmitError};
use crate::faults::Faults;
use crate::files::with_suffix;
use crate::location::{Guard, Missing};
use crate::options::Ticket;
use crate::queue::{Changes, Queue, Teller};

/// Requests (backups, checks) that may wait for the thread.
const REQUESTS_MAX: usize = 64;

/// The store. Clones are handles of the same one.
///
/// When the last handle is dropped without [`Store::close`], queued changes are written if
/// possible, and the next start checks the database.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// How the store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Why nothing can be stored: the database's files were moved or removed.
    pub misplaced: Option<&'static str>,
    /// How many times the files were removed and recreated.
    pub rebuilt: u64,
    /// Why the last transaction failed; none if writing works.
    pub failing: Option<String>,
    /// Since when it fails, unix ms.
    pub failing_since: Option<i64>,
    /// Promised changes that wait for a transaction.
    pub waiting: usize,
    /// Eventual changes that are not on disk yet.
    pub retained: usize,
    /// Transactions since opening.
    pub commits: u64,
    /// Changes in them.
    pub changes: u64,
    /// Transactions that failed.
    pub failures: u64,
    /// Eventual changes that were dropped: no room, or refused by the database.
    pub dropped: u64,
    /// When the newest backup of this run was finished, unix ms.
    pub last_backup: Option<i64>,
    /// Bytes of the database file.
    pub db_bytes: u64,
    /// Bytes of the write-ahead log.
    pub wal_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<StoreState>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The state that the handles and the thread share.
#[derive(Debug)]
pub(crate) struct StoreState {
    pub(crate) state: Mutex<State>,
    pub(crate) wake: Condvar,
    /// Called after each transaction.
    pub(crate) settled: Condvar,
    /// The data directory.
    pub(crate) dir: PathBuf,
    /// Taken after the state, or alone.
    pub(crate) guard: Mutex<Guard>,
    pub(crate) faults: Faults,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) queue: Queue,
    pub(crate) requests: VecDeque<Request>,
    /// Nothing more is accepted.
    pub(crate) is_closing: bool,
    /// The last handle was dropped.
    pub(crate) is_abandoned: bool,
    /// The thread waits and must be woken.
    pub(crate) is_asleep: bool,
    pub(crate) failing: Option<Failing>,
    pub(crate) commits: u64,
    pub(crate) changes: u64,
    pub(crate) failures: u64,
    pub(crate) refused: u64,
    pub(crate) rebuilt: u64,
    /// A transaction must be tried although nothing waits.
    pub(crate) is_probed: bool,
    pub(crate) last_backup: Option<i64>,
}

/// The disk cannot be written.
#[derive(Debug)]
pub(crate) struct Failing {
    pub(crate) reason: String,
    /// Unix ms.
    pub(crate) since: i64,
    pub(crate) next_try: Instant,
    pub(crate) back_off: Duration,
}

/// What the thread does besides writing.
#[derive(Debug)]
pub(crate) enum Request {
    /// Copies the database into a new file.
    Copy {
        to: PathBuf,
        reply: SyncSender<Result<(), BackupError>>,
    },
    Check {
        full: bool,
        reply: SyncSender<Result<Vec<String>, StoreError>>,
    },
    Close {
        reply: SyncSender<Result<(), StoreError>>,
    },
}

impl Store {
    pub(crate) fn new(shared: Arc<StoreState>, thread: JoinHandle<()>) -> Self {
        let thread = Mutex::new(Some(thread));
        Self {
            inner: Arc::new(Inner { shared, thread }),
        }
    }

    /// Submits one change: a promise with a ticket, else an eventual change. Never blocks and never
    /// does IO.
    ///
    /// A promise is reported to `on_done` once it is on disk, or once it failed and was dropped. An
    /// eventual change is retried until it is written; a later one of the same row replaces it.
    pub fn submit(&self, change: RowChange, ticket: Option<Ticket>) -> Result<(), SubmitError> {
        let mut state = self.open_state()?;
        match ticket {
            Some(ticket) => state
                .queue
                .promise(Changes::One(change), Teller::Ticket(ticket))?,
            None => state.queue.eventual(change)?,
        }
        self.inner.shared.wake(state);
        Ok(())
    }

    /// Writes `changes`, all or none, and waits for the commit. For worker threads; never from
    /// `on_done`.
    pub fn commit(&self, changes: Vec<RowChange>) -> Result<(), StoreError> {
        let (reply, receiver) = sync_channel(1);
        let mut state = self.open_state()?;
        state
            .queue
            .promise(Changes::Together(changes), Teller::Waiter(reply))?;
        self.inner.shared.wake(state);
        wait(&receiver)?
    }

    /// Waits until everything submitted is on disk or was reported as failed, and writing works.
    /// False if that did not happen within `timeout`, or the store was closed. For worker threads.
    #[must_use]
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut state = self.inner.shared.lock();
        loop {
            let waiting = state.queue.promised() + state.queue.retained();
            if waiting == 0 && state.failing.is_none() {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || state.is_closing {
                return false;
            }
            state = match self.inner.shared.settled.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Looks for damage: `full` reads everything (`integrity_check`, `foreign_key_check`), else
    /// `quick_check`. No findings mean no damage. Writing waits in the meantime.
    pub fn check(&self, full: bool) -> Result<Vec<String>, StoreError> {
        let (reply, receiver) = sync_channel(1);
        self.request(Request::Check { full, reply })?;
        wait(&receiver)?
    }

    /// How the store is.
    #[must_use]
    pub fn status(&self) -> Status {
        let (misplaced, database) = {
            let guard = self.inner.shared.guard();
            let misplaced = guard.check().err().map(Missing::reason);
            (misplaced, guard.place().database().to_owned())
        };
        let bytes = |suffix| {
            let path = with_suffix(&database, suffix);
            fs::metadata(path).map_or(0, |metadata| metadata.len())
        };
        let (db_bytes, wal_bytes) = (bytes(""), bytes("-wal"));
        let state = self.inner.shared.lock();
        Status {
            misplaced,
            rebuilt: state.rebuilt,
            failing: state.failing.as_ref().map(|failing| failing.reason.clone()),
            failing_since: state.failing.as_ref().map(|failing| failing.since),
            waiting: state.queue.promised(),
            retained: state.queue.retained(),
            commits: state.commits,
            changes: state.changes,
            failures: state.failures,
            dropped: state.queue.dropped() + state.refused,
            last_backup: state.last_backup,
            db_bytes,
            wal_bytes,
        }
    }

    /// Checks that the database's files are in place. If not, it tries a transaction, which
    /// recreates them or says why that is impossible.
    pub fn check_files(&self) {
        if self.inner.shared.guard().check().is_ok() {
            return;
        }
        let mut state = self.inner.shared.lock();
        state.is_probed = true;
        self.inner.shared.wake(state);
    }

    /// Writes waiting changes, moves the log into the database, marks it clean, and ends the
    /// thread. For other handles the store is then closed. An error says what was not written;
    /// changes that were reported before are on disk.
    pub fn close(self) -> Result<(), StoreError> {
        let (reply, receiver) = sync_channel(1);
        let mut state = self.open_state()?;
        state.is_closing = true;
        state.requests.push_back(Request::Close { reply });
        self.inner.shared.wake(state);
        let outcome = wait(&receiver);
        self.inner.join();
        outcome?
    }

    /// The data directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.shared.dir
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.inner.shared.faults
    }

    pub(crate) fn note_backup(&self, unix_ms: i64) {
        self.inner.shared.lock().last_backup = Some(unix_ms);
    }

    /// Copies the database to `to`, which must not exist, and waits for it.
    pub(crate) fn copy_to(&self, to: PathBuf) -> Result<(), BackupError> {
        let (reply, receiver) = sync_channel(1);
        self.request(Request::Copy { to, reply })
            .map_err(|error| BackupError::Store(error.into()))?;
        wait(&receiver).map_err(BackupError::Store)?
    }

    fn request(&self, request: Request) -> Result<(), SubmitError> {
        let mut state = self.open_state()?;
        if state.requests.len() >= REQUESTS_MAX {
            return Err(SubmitError::Full {
                what: "administrative",
                max: REQUESTS_MAX,
            });
        }
        state.requests.push_back(request);
        self.inner.shared.wake(state);
        Ok(())
    }

    fn open_state(&self) -> Result<MutexGuard<'_, State>, SubmitError> {
        let state = self.inner.shared.lock();
        if state.is_closing {
            return Err(SubmitError::Closed);
        }
        Ok(state)
    }
}

impl StoreState {
    /// The state is whole at every step, so a panic of another thread does not spoil it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the thread if it sleeps, after the lock is released, because the thread needs the
    /// lock.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let was_asleep = std::mem::take(&mut state.is_asleep);
        drop(state);
        if was_asleep {
            self.wake.notify_one();
        }
    }
}

impl Inner {
    fn join(&self) {
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic of the thread was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.is_closing = true;
        state.is_abandoned = true;
        self.shared.wake(state);
        self.join();
    }
}

/// Waits for the thread's reply. If there is none, the thread has ended.
fn wait<T>(receiver: &Receiver<T>) -> Result<T, StoreError> {
    receiver
        .recv()
        .map_err(|_| StoreError::Submit(SubmitError::Closed))
}
