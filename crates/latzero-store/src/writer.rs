//! The thread that owns the connection: takes the queued changes, writes them in one transaction,
//! notifies, and repeats.
//!
//! While it commits, the next group gathers, so a busy store needs one fsync for many changes, and
//! an idle one adds no delay. A change that is invalid by itself does not delay its group. If the
//! disk fails, the transaction is rolled back, every waiting promise is notified, and eventual
//! changes are retried: at the next promise, or after a pause that doubles.

use std::path::Path;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::backup;
use crate::calendar::now_ms;
use crate::error::{BackupError, StoreError, SubmitError, is_of_the_change};
use crate::failpoint;
use crate::faults::Faults;
use crate::files;
use crate::location::{Guard, Mark, MarkFile, Missing};
use crate::open::{connect, findings, prepare, skip_checkpoint_on_close, state};
use crate::options::{Options, Ticket};
use crate::queue::{Changes, Job, Teller};
use crate::schema;
use crate::statements::{Run, Statements};
use crate::store::{Failing, Request, State, StoreState};

/// How long the log may hold what was changed or deleted since, while nothing is written.
const LOG_KEPT: Duration = Duration::from_secs(60);

/// Runs until the store is closed or abandoned.
pub(crate) fn run(mut conn: Connection, shared: Arc<StoreState>, mut options: Options) {
    let end = NotifyOnDrop(shared);
    let mut jobs = Vec::new();
    let closing = loop {
        let writer = Writer::new(&conn, &end.0, &mut options, std::mem::take(&mut jobs));
        match writer.run() {
            Ended::Closed(closing) => break Some(closing),
            Ended::Abandoned => break None,
            Ended::Rebuilt(fresh, waiting) => {
                jobs = waiting;
                let old = std::mem::replace(&mut conn, fresh);
                // Closing it must not remove by name what belongs to the new one.
                if let Err(error) = skip_checkpoint_on_close(&old, true) {
                    tracing::error!(%error, "the old data.db stays open");
                    std::mem::forget(old);
                }
            }
        }
    };
    // Closing moves the log into the database and removes it.
    let is_in_place = end.0.guard().check().is_ok();
    let kept = if is_in_place {
        Ok(())
    } else {
        skip_checkpoint_on_close(&conn, true)
    };
    let closed = kept.map_err(|error| StoreError::disk("close data.db", &error));
    let closed = closed.and_then(|()| {
        conn.close()
            .map_err(|(_, error)| StoreError::disk("close data.db", &error))
    });
    if let Some((reply, outcome)) = closing {
        let _ = reply.send(outcome.and(closed));
    }
}

/// Notifies everyone who waits if the thread ends for any reason.
struct NotifyOnDrop(Arc<StoreState>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_closing = true;
        state.requests.clear();
        self.0.settled.notify_all();
        let mut jobs = Vec::new();
        state.queue.take(usize::MAX, &mut jobs);
        drop(state);
    }
}

/// Why a writer ended.
enum Ended {
    /// It was requested; the requester is notified.
    Closed(Closing),
    Abandoned,
    /// The database's files were removed and have been recreated from this connection. Some changes
    /// are not written yet.
    Rebuilt(Connection, Vec<Job>),
}

type Closing = (SyncSender<Result<(), StoreError>>, Result<(), StoreError>);

enum Work {
    Batch,
    Request(Request),
    /// Nothing was written for a while.
    EmptyLog,
    Stop,
}

struct Writer<'c> {
    conn: &'c Connection,
    shared: &'c StoreState,
    statements: Statements<'c>,
    options: &'c mut Options,
    mark: Mark,
    mark_file: MarkFile,
    /// The log may contain data that was deleted from the database.
    is_log_filled: bool,
    /// Since when files of the database are missing.
    gone_since: Option<Instant>,
    /// The database is marked as in use. That is not needed before the first transaction, because
    /// nothing differs until then.
    is_marked: bool,
    /// A request was the last thing done, so waiting changes come first now.
    batch_first: bool,
    jobs: Vec<Job>,
    refusals: Vec<Option<StoreError>>,
    outcomes: Vec<(Ticket, Result<(), StoreError>)>,
}

impl<'c> Writer<'c> {
    fn new(
        conn: &'c Connection,
        shared: &'c StoreState,
        options: &'c mut Options,
        jobs: Vec<Job>,
    ) -> Self {
        let commits = state(conn, "commits").and_then(|commits| commits.parse().ok());
        let mark = Mark {
            id: state(conn, "id").unwrap_or_else(random_id),
            commits: commits.unwrap_or(0),
        };
        let mark_file = MarkFile::open(&shared.guard().place().mark());
        Self {
            conn,
            shared,
            statements: Statements::new(conn, options.faults.clone()),
            options,
            mark,
            mark_file,
            is_log_filled: false,
            gone_since: None,
            is_marked: false,
            batch_first: true,
            jobs,
            refusals: Vec::new(),
            outcomes: Vec::new(),
        }
    }

    fn run(mut self) -> Ended {
        if !self.jobs.is_empty() {
            drop(self.write_batch());
        }
        loop {
            match self.next() {
                Work::Batch => {
                    if let Some(conn) = self.rebuild_where_gone() {
                        return Ended::Rebuilt(conn, self.jobs);
                    }
                    drop(self.write_batch());
                }
                Work::EmptyLog => self.empty_log(),
                Work::Request(Request::Copy { to, reply }) => {
                    let outcome = self.copy(&to);
                    let _ = reply.send(outcome);
                }
                Work::Request(Request::Check { full, reply }) => {
                    let outcome = findings(self.conn, full)
                        .map_err(|error| StoreError::disk("check data.db", &error));
                    let _ = reply.send(outcome);
                }
                Work::Request(Request::Close { reply }) => {
                    if let Some(conn) = self.rebuild_where_gone() {
                        let again = Request::Close { reply };
                        self.shared.lock().requests.push_front(again);
                        return Ended::Rebuilt(conn, self.jobs);
                    }
                    let outcome = self.finish();
                    return Ended::Closed((reply, outcome));
                }
                Work::Stop => return Ended::Abandoned,
            }
        }
    }

    /// Waits for something to do, and puts a batch into `jobs`.
    fn next(&mut self) -> Work {
        let mut state = self.shared.lock();
        loop {
            let now = Instant::now();
            let is_due = is_due(&state, now);
            if is_due && (self.batch_first || state.requests.is_empty()) {
                self.batch_first = false;
                state.is_probed = false;
                state
                    .queue
                    .take(self.options.group_max.max(1), &mut self.jobs);
                return Work::Batch;
            }
            self.batch_first = true;
            if let Some(request) = state.requests.pop_front() {
                return Work::Request(request);
            }
            if is_due {
                continue;
            }
            if state.is_abandoned && (state.queue.is_empty() || state.failing.is_some()) {
                return Work::Stop;
            }
            let idle = if self.is_log_filled {
                LOG_KEPT
            } else {
                Duration::MAX
            };
            let pause = state.failing.as_ref().map_or(idle, |failing| {
                failing.next_try.saturating_duration_since(now)
            });
            state.is_asleep = true;
            let waited = self.shared.wake.wait_timeout(state, pause);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.is_asleep = false;
            if timeout.timed_out() && state.failing.is_none() {
                return Work::EmptyLog;
            }
        }
    }

    /// Writes waiting changes between two steps of a longer operation.
    fn write_waiting(&mut self) {
        let mut state = self.shared.lock();
        if is_due(&state, Instant::now()) {
            state
                .queue
                .take(self.options.group_max.max(1), &mut self.jobs);
            drop(state);
            drop(self.write_batch());
        }
    }

    /// Writes `jobs` and notifies everyone who waits for them.
    fn write_batch(&mut self) -> Result<(), StoreError> {
        let outcome = self.transact();
        let mut state = self.shared.lock();
        match &outcome {
            Ok(()) => {
                state.queue.written();
                state.commits += 1;
                for (job, refusal) in self.jobs.iter().zip(&self.refusals) {
                    match refusal {
                        None => state.changes += job.changes.as_slice().len() as u64,
                        Some(reason) if !job.is_promise() => {
                            state.refused += 1;
                            tracing::error!(%reason, "a change was dropped");
                        }
                        Some(_) => {}
                    }
                }
                if let Some(failing) = state.failing.take() {
                    tracing::info!(since_ms = failing.since, "the store is writing again");
                }
            }
            Err(error) => {
                state.queue.put_back(&mut self.jobs);
                state.failures += 1;
                self.note_failure(&mut state, error);
            }
        }
        drop(state);
        self.notify(outcome.as_ref().err());
        self.shared.settled.notify_all();
        outcome
    }

    fn note_failure(&self, state: &mut State, error: &StoreError) {
        let reason = error.to_string();
        let now = Instant::now();
        match &mut state.failing {
            Some(failing) => {
                failing.back_off = (failing.back_off * 2).min(self.options.retry_max);
                failing.next_try = now + failing.back_off;
                failing.reason = reason;
            }
            None => {
                tracing::error!(%reason, "the store cannot write; it retries automatically");
                state.failing = Some(Failing {
                    reason,
                    since: now_ms(),
                    next_try: now + self.options.retry_first,
                    back_off: self.options.retry_first,
                });
            }
        }
    }

    /// One transaction with all of `jobs`. After an error nothing of it is in the database.
    fn transact(&mut self) -> Result<(), StoreError> {
        self.refusals.clear();
        let jobs = std::mem::take(&mut self.jobs);
        let outcome = self.transact_jobs(&jobs);
        self.jobs = jobs;
        if outcome.is_err() {
            self.statements.rollback();
            // The next transaction always writes something, so that its success shows that the disk
            // works.
            self.is_marked = false;
        }
        outcome
    }

    fn transact_jobs(&mut self, jobs: &[Job]) -> Result<(), StoreError> {
        self.check_place()?;
        let failed = |step| move |error: rusqlite::Error| StoreError::disk(step, &error);
        self.statements
            .begin()
            .map_err(failed("begin a transaction"))?;
        failpoint::reached("store.begin");
        if !self.is_marked {
            self.statements
                .mark(Run::Open, &self.options.boot_id, &self.mark.id)
                .map_err(failed("mark data.db as in use"))?;
        }
        let commits = self.mark.commits + 1;
        let counted = self.statements.count(commits);
        counted.map_err(failed("count the commits of data.db"))?;
        for job in jobs {
            let refusal = self.write(&job.changes).map_err(failed("write a change"))?;
            self.refusals.push(refusal);
        }
        failpoint::reached("store.before_commit");
        self.statements.commit().map_err(failed("commit"))?;
        failpoint::reached("store.after_commit");
        self.is_marked = true;
        self.note_commit();
        // Promised changes must be in the file under its name, not in one that was removed.
        self.check_place()
    }

    fn note_commit(&mut self) {
        self.mark.commits += 1;
        self.mark_file.write(&self.mark);
        self.is_log_filled = true;
        self.shared.guard().note_log();
    }

    fn check_place(&self) -> Result<(), StoreError> {
        let checked = self.shared.guard().check();
        checked.map_err(StoreError::missing)
    }

    /// Recreates the database's files if they were removed or moved, from the open connection,
    /// which still has them. None if nothing is missing, or nothing can be recreated.
    fn rebuild_where_gone(&mut self) -> Option<Connection> {
        let gone = self.shared.guard().check().err();
        let Some(gone) = gone.filter(|gone| *gone != Missing::Directory) else {
            self.gone_since = None;
            return None;
        };
        let since = *self.gone_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.options.rebuild_after {
            return None;
        }
        match self.rebuild() {
            Ok(conn) => {
                self.shared.lock().rebuilt += 1;
                let reason = gone.reason();
                tracing::warn!("{reason}; it was recreated from memory, and nothing was lost");
                Some(conn)
            }
            Err(error) => {
                tracing::error!(%error, "cannot recreate data.db; retrying");
                None
            }
        }
    }

    fn rebuild(&mut self) -> Result<Connection, BackupError> {
        let place = self.shared.guard().place().clone();
        let (database, faults) = (place.database(), &self.options.faults);
        let temporary = backup::temporary(place.home());
        let made = backup::copy(self.conn, &temporary, i32::MAX, faults, || Ok(()))
            .and_then(|()| put_in_place(&temporary, database, faults))
            .and_then(|()| {
                let failed = |error| BackupError::sqlite("open", database, error);
                let conn = connect(database).map_err(failed)?;
                prepare(&conn, self.options.durability).map_err(failed)?;
                // The first that is read takes the lock.
                schema::user_version(&conn).map_err(failed)?;
                let guard = Guard::new(place.clone());
                let guard = guard.map_err(|error| BackupError::file("look at", database, error))?;
                *self.shared.guard() = guard;
                Ok(conn)
            });
        if made.is_err() {
            backup::remove_temporary(&temporary);
        }
        made
    }

    /// Empties the log, so that deleted data does not stay in it for long.
    fn empty_log(&mut self) {
        self.is_log_filled = false;
        let emptied = self
            .conn
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(error) = emptied {
            tracing::debug!(%error, "cannot empty the log of data.db");
        }
    }

    /// Writes one job; `Some` is the reason why only this job was refused.
    fn write(&mut self, changes: &Changes) -> rusqlite::Result<Option<StoreError>> {
        // A single statement undoes itself when it fails (ON CONFLICT ABORT).
        if let Changes::One(change) = changes
            && !change.reaches_further()
        {
            return match self.statements.apply(change) {
                Ok(()) => Ok(None),
                Err(error) => refusal(change.name(), error).map(Some),
            };
        }
        self.statements.savepoint()?;
        for change in changes.as_slice() {
            if let Err(error) = self.statements.apply(change) {
                let refusal = refusal(change.name(), error)?;
                self.statements.rollback_to()?;
                return Ok(Some(refusal));
            }
        }
        self.statements.release()?;
        Ok(None)
    }

    /// Reports the result of `jobs`: `failed` for all, or for each its own refusal.
    fn notify(&mut self, failed: Option<&StoreError>) {
        failpoint::reached("store.before_tell");
        for (at, job) in self.jobs.drain(..).enumerate() {
            let own = || self.refusals.get(at).and_then(Option::as_ref);
            let outcome = match failed.or_else(own) {
                Some(error) => Err(error.clone()),
                None => Ok(()),
            };
            match job.teller {
                Teller::Nobody => {}
                Teller::Ticket(ticket) => self.outcomes.push((ticket, outcome)),
                // If the waiter has ended, nobody needs the result.
                Teller::Waiter(reply) => drop(reply.send(outcome)),
            }
        }
        if !self.outcomes.is_empty() {
            (self.options.on_done)(&mut self.outcomes);
            self.outcomes.clear();
        }
    }

    /// Copies the database page by page into `to`; changes are written in between and appear in the
    /// copy.
    fn copy(&mut self, to: &Path) -> Result<(), BackupError> {
        let (conn, faults) = (self.conn, self.options.faults.clone());
        let pages = self.options.backup_step_pages.max(1);
        backup::copy(conn, to, pages, &faults, || {
            if self.shared.lock().is_closing {
                return Err(BackupError::Store(SubmitError::Closed.into()));
            }
            self.write_waiting();
            Ok(())
        })
    }

    /// The last transactions, and the mark of a clean end.
    fn finish(&mut self) -> Result<(), StoreError> {
        loop {
            self.shared
                .lock()
                .queue
                .take(self.options.group_max.max(1), &mut self.jobs);
            if self.jobs.is_empty() {
                break;
            }
            self.write_batch()?;
        }
        self.check_place()?;
        let mut mark = || -> rusqlite::Result<()> {
            self.statements.begin()?;
            let (boot_id, id) = (&self.options.boot_id, &self.mark.id);
            self.statements.mark(Run::Clean, boot_id, id)?;
            self.statements.count(self.mark.commits + 1)?;
            self.statements.commit()
        };
        if let Err(error) = mark() {
            self.statements.rollback();
            return Err(StoreError::disk("mark data.db as clean", &error));
        }
        self.note_commit();
        failpoint::reached("store.before_checkpoint");
        let checkpoint = || -> rusqlite::Result<()> {
            self.options.faults.step("checkpoint")?;
            self.conn
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        checkpoint().map_err(|error| StoreError::disk("empty the log of data.db", &error))?;
        failpoint::reached("store.after_checkpoint");
        Ok(())
    }
}

/// Whether a transaction should be tried now. While the disk cannot be written, that is so even if
/// nothing waits, to find out when it works again.
fn is_due(state: &State, now: Instant) -> bool {
    match &state.failing {
        _ if state.is_probed => true,
        Some(failing) => state.queue.has_promises() || now >= failing.next_try,
        None => !state.queue.is_empty(),
    }
}

/// Renames a copy of the database to its final name. Files in its place, such as a log without its
/// database, are moved aside.
fn put_in_place(temporary: &Path, database: &Path, faults: &Faults) -> Result<(), BackupError> {
    let failed = |error| BackupError::file("make", database, error);
    files::sync_file(temporary, faults).map_err(failed)?;
    files::set_aside(database, "replaced", now_ms(), faults).map_err(failed)?;
    files::rename_new(temporary, database, faults).map_err(failed)?;
    files::sync_dir(files::parent(database), faults).map_err(failed)
}

/// A unique name for a database.
fn random_id() -> String {
    let mut id = [0_u8; 16];
    if rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::NONBLOCK).is_err() {
        // Early after boot there may be none. A time and a process id are unique too.
        id[..8].copy_from_slice(&now_ms().to_le_bytes());
        id[8..12].copy_from_slice(&std::process::id().to_le_bytes());
    }
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The refusal of one record, or the error that concerns all.
fn refusal(what: String, error: rusqlite::Error) -> rusqlite::Result<StoreError> {
    if !is_of_the_change(&error) {
        return Err(error);
    }
    Ok(StoreError::Refused {
        what: what.into(),
        reason: error.to_string().into(),
    })
}

/// Starts the thread.
pub(crate) fn start(
    conn: Connection,
    shared: Arc<StoreState>,
    options: Options,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("store".into())
        .spawn(move || run(conn, shared, options))
}
