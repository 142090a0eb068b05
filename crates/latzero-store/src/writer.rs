//! The thread that owns the connection: takes what waits, writes it in one transaction, tells, and begins again.
//!
//! While it commits, the next group gathers, so a busy store pays one fsync for many changes and an idle one waits for nobody.
//! A change that is refused for itself does not hold up its group. When the disk refuses, the transaction is rolled back,
//! every promise that waits is told, and eventual changes are tried again: at the next promise, or after a pause that doubles.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::backup;
use crate::calendar::now_ms;
use crate::error::{BackupError, StoreError, SubmitError, is_of_the_change};
use crate::failpoint;
use crate::faults::Faults;
use crate::open::findings;
use crate::options::{Done, Options, Ticket};
use crate::queue::{Changes, Job, Teller};
use crate::statements::{Run, Statements};
use crate::store::{Failing, Request, Shared, State};

/// Runs until the store is closed or abandoned.
pub(crate) fn run(conn: Connection, shared: Arc<Shared>, options: Options) {
    let end = End(shared);
    let closing = Writer::new(&conn, &end.0, options).run();
    // Closing moves the log into the database and removes it.
    let closed = conn
        .close()
        .map_err(|(_, error)| StoreError::disk("close data.db", &error));
    if let Some((reply, outcome)) = closing {
        let _ = reply.send(outcome.and(closed));
    }
}

/// Leaves nobody waiting for a thread that is gone, whatever ended it.
struct End(Arc<Shared>);

impl Drop for End {
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

type Closing = (SyncSender<Result<(), StoreError>>, Result<(), StoreError>);

enum Work {
    Batch,
    Request(Request),
    Stop,
}

struct Writer<'c> {
    conn: &'c Connection,
    shared: &'c Shared,
    statements: Statements<'c>,
    on_done: Done,
    boot_id: String,
    group_max: usize,
    retry_first: Duration,
    retry_max: Duration,
    backup_step_pages: i32,
    faults: Faults,
    /// The database says that it is in use. It need not before the first transaction: until then nothing differs.
    is_marked: bool,
    /// A request was the last thing done, so waiting changes come first now.
    batch_first: bool,
    jobs: Vec<Job>,
    refusals: Vec<Option<StoreError>>,
    told: Vec<(Ticket, Result<(), StoreError>)>,
}

impl<'c> Writer<'c> {
    fn new(conn: &'c Connection, shared: &'c Shared, options: Options) -> Self {
        Self {
            conn,
            shared,
            statements: Statements::new(conn, options.faults.clone()),
            on_done: options.on_done,
            boot_id: options.boot_id,
            group_max: options.group_max.max(1),
            retry_first: options.retry_first,
            retry_max: options.retry_max,
            backup_step_pages: options.backup_step_pages.max(1),
            faults: options.faults,
            is_marked: false,
            batch_first: true,
            jobs: Vec::new(),
            refusals: Vec::new(),
            told: Vec::new(),
        }
    }

    fn run(mut self) -> Option<Closing> {
        loop {
            match self.next() {
                Work::Batch => drop(self.write_batch()),
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
                    let outcome = self.finish();
                    return Some((reply, outcome));
                }
                Work::Stop => return None,
            }
        }
    }

    /// Waits for something to do; a batch is in `jobs` then.
    fn next(&mut self) -> Work {
        let mut state = self.shared.lock();
        loop {
            let now = Instant::now();
            let is_due = is_due(&state, now);
            if is_due && (self.batch_first || state.requests.is_empty()) {
                self.batch_first = false;
                state.queue.take(self.group_max, &mut self.jobs);
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
            let pause = state.failing.as_ref().map_or(Duration::MAX, |failing| {
                failing.next_try.saturating_duration_since(now)
            });
            state.is_asleep = true;
            state = match self.shared.wake.wait_timeout(state, pause) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
            state.is_asleep = false;
        }
    }

    /// Between two steps of something longer: writes what waits, if anything.
    fn write_waiting(&mut self) {
        let mut state = self.shared.lock();
        if is_due(&state, Instant::now()) {
            state.queue.take(self.group_max, &mut self.jobs);
            drop(state);
            drop(self.write_batch());
        }
    }

    /// Writes `jobs` and tells everyone concerned.
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
                    tracing::info!(since_ms = failing.since, "the store writes again");
                }
            }
            Err(error) => {
                state.queue.put_back(&mut self.jobs);
                state.failures += 1;
                self.note_failure(&mut state, error);
            }
        }
        drop(state);
        self.tell(outcome.as_ref().err());
        self.shared.settled.notify_all();
        outcome
    }

    fn note_failure(&self, state: &mut State, error: &StoreError) {
        let reason = error.to_string();
        let now = Instant::now();
        match &mut state.failing {
            Some(failing) => {
                failing.back_off = (failing.back_off * 2).min(self.retry_max);
                failing.next_try = now + failing.back_off;
                failing.reason = reason;
            }
            None => {
                tracing::error!(%reason, "the store does not write; it tries again by itself");
                state.failing = Some(Failing {
                    reason,
                    since: now_ms(),
                    next_try: now + self.retry_first,
                    back_off: self.retry_first,
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
            // The next transaction writes in any case, so that its success says something of the disk.
            self.is_marked = false;
        }
        outcome
    }

    fn transact_jobs(&mut self, jobs: &[Job]) -> Result<(), StoreError> {
        let failed = |step| move |error: rusqlite::Error| StoreError::disk(step, &error);
        self.statements
            .begin()
            .map_err(failed("begin a transaction"))?;
        failpoint::reached("store.begin");
        if !self.is_marked {
            self.statements
                .mark(Run::Open, &self.boot_id)
                .map_err(failed("mark data.db as in use"))?;
        }
        for job in jobs {
            let refusal = self.write(&job.changes).map_err(failed("write a change"))?;
            self.refusals.push(refusal);
        }
        failpoint::reached("store.before_commit");
        self.statements.commit().map_err(failed("commit"))?;
        failpoint::reached("store.after_commit");
        self.is_marked = true;
        Ok(())
    }

    /// Writes one job; `Some` says why it alone was refused.
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

    /// Tells what became of `jobs`: `failed` for all, or for each its own refusal.
    fn tell(&mut self, failed: Option<&StoreError>) {
        failpoint::reached("store.before_tell");
        for (at, job) in self.jobs.drain(..).enumerate() {
            let own = || self.refusals.get(at).and_then(Option::as_ref);
            let outcome = match failed.or_else(own) {
                Some(error) => Err(error.clone()),
                None => Ok(()),
            };
            match job.teller {
                Teller::Nobody => {}
                Teller::Ticket(ticket) => self.told.push((ticket, outcome)),
                // A waiter that is gone does not want to know.
                Teller::Waiter(reply) => drop(reply.send(outcome)),
            }
        }
        if !self.told.is_empty() {
            (self.on_done)(&mut self.told);
            self.told.clear();
        }
    }

    /// Copies the database page by page into `to`; changes are written in between and appear in the copy.
    fn copy(&mut self, to: &Path) -> Result<(), BackupError> {
        let (conn, pages, faults) = (self.conn, self.backup_step_pages, self.faults.clone());
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
                .take(self.group_max, &mut self.jobs);
            if self.jobs.is_empty() {
                break;
            }
            self.write_batch()?;
        }
        let mut mark = || -> rusqlite::Result<()> {
            self.statements.begin()?;
            self.statements.mark(Run::Clean, &self.boot_id)?;
            self.statements.commit()
        };
        if let Err(error) = mark() {
            self.statements.rollback();
            return Err(StoreError::disk("mark data.db as clean", &error));
        }
        failpoint::reached("store.before_checkpoint");
        let checkpoint = || -> rusqlite::Result<()> {
            self.faults.step("checkpoint")?;
            self.conn
                .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
        };
        checkpoint().map_err(|error| StoreError::disk("empty the log of data.db", &error))?;
        failpoint::reached("store.after_checkpoint");
        Ok(())
    }
}

/// Whether a transaction should be tried now. While the disk refuses, that is so even if nothing waits: how else would
/// anybody learn that it is well again?
fn is_due(state: &State, now: Instant) -> bool {
    match &state.failing {
        Some(failing) => state.queue.has_promises() || now >= failing.next_try,
        None => !state.queue.is_empty(),
    }
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
    shared: Arc<Shared>,
    options: Options,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("store".into())
        .spawn(move || run(conn, shared, options))
}
