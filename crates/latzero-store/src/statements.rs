//! The prepared statements of the writer, created on first use and cached.

use rusqlite::{Connection, Statement};

use crate::calendar::now_ms;
use crate::change::RowChange;
use crate::faults::Faults;
use crate::rows::{
    AnswerRow, AppRow, BindingRow, BlockRow, CallRow, DescriptorRow, Ordered, PoolRow, Record,
    with_room,
};

/// The statements of the writer.
#[derive(Debug, Clone, Copy)]
enum Sql {
    Begin,
    Commit,
    Savepoint,
    Release,
    RollbackTo,
    MarkRun,
    Count,
    PutApp,
    AppWatches,
    SeenApp,
    ForgetApp,
    PutBinding,
    RemoveBinding,
    PutPool,
    RemovePool,
    RemoveCallsOf,
    RemoveAnswersOf,
    PutDescriptor,
    RemoveDescriptors,
    PutBlock,
    RemoveBlock,
    PutCall,
    NoteAttempt,
    RemoveCall,
    PutAnswer,
    RemoveAnswer,
    PutSetting,
}

const COUNT: usize = Sql::PutSetting as usize + 1;

impl Sql {
    fn text(self) -> String {
        match self {
            Self::Begin => "BEGIN IMMEDIATE".into(),
            Self::Commit => "COMMIT".into(),
            Self::Savepoint => "SAVEPOINT job".into(),
            Self::Release => "RELEASE job".into(),
            Self::RollbackTo => "ROLLBACK TO job".into(),
            Self::MarkRun => "INSERT OR REPLACE INTO store_state (key, value) VALUES \
                              ('run', ?1), ('boot_id', ?2), ('id', ?3)"
                .into(),
            Self::Count => "INSERT OR REPLACE INTO store_state (key, value) \
                            VALUES ('commits', ?1)"
                .into(),
            Self::PutApp => AppRow::upsert(),
            Self::AppWatches => format!(
                "UPDATE app_registry SET watches = {} WHERE app_id = ?1",
                with_room("watches", "?2")
            ),
            Self::SeenApp => "UPDATE app_registry SET last_seen = ?2 WHERE app_id = ?1".into(),
            Self::ForgetApp => "DELETE FROM app_registry WHERE app_id = ?1".into(),
            Self::PutBinding => BindingRow::upsert(),
            Self::RemoveBinding => "DELETE FROM app_bindings WHERE app_id = ?1".into(),
            Self::PutPool => PoolRow::upsert(),
            Self::RemovePool => "DELETE FROM pool_metadata WHERE name = ?1".into(),
            Self::RemoveCallsOf => "DELETE FROM parked_calls WHERE pool = ?1".into(),
            Self::RemoveAnswersOf => "DELETE FROM parked_answers WHERE pool = ?1".into(),
            Self::PutDescriptor => DescriptorRow::upsert(),
            Self::RemoveDescriptors => "DELETE FROM pool_descriptors WHERE pool = ?1".into(),
            Self::PutBlock => BlockRow::upsert(),
            Self::RemoveBlock => {
                "DELETE FROM memory_blocks WHERE pool = ?1 AND block_id = ?2".into()
            }
            Self::PutCall => CallRow::upsert(),
            Self::NoteAttempt => "UPDATE parked_calls SET attempt = ?2 WHERE number = ?1".into(),
            Self::RemoveCall => "DELETE FROM parked_calls WHERE number = ?1".into(),
            Self::PutAnswer => AnswerRow::upsert(),
            Self::RemoveAnswer => "DELETE FROM parked_answers WHERE number = ?1".into(),
            Self::PutSetting => {
                "INSERT INTO server_config (key, value, updated) VALUES (?1, ?2, ?3) \
                                 ON CONFLICT (key) DO UPDATE SET value = excluded.value, \
                                 updated = excluded.updated"
                    .into()
            }
        }
    }
}

/// The state of the run, for the next start.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Run {
    Open,
    Clean,
}

pub(crate) struct Statements<'c> {
    conn: &'c Connection,
    prepared: [Option<Statement<'c>>; COUNT],
    faults: Faults,
}

impl<'c> Statements<'c> {
    pub(crate) fn new(conn: &'c Connection, faults: Faults) -> Self {
        Self {
            conn,
            prepared: [const { None }; COUNT],
            faults,
        }
    }

    pub(crate) fn begin(&mut self) -> rusqlite::Result<()> {
        self.faults.step("begin")?;
        if !self.conn.is_autocommit() {
            // An earlier rollback failed; nothing may start inside that transaction.
            self.conn.execute_batch("ROLLBACK")?;
        }
        self.get(Sql::Begin)?.execute([]).map(drop)
    }

    pub(crate) fn commit(&mut self) -> rusqlite::Result<()> {
        self.faults.step("commit")?;
        self.get(Sql::Commit)?.execute([]).map(drop)
    }

    /// Rolls the transaction back, unless SQLite has already done so.
    pub(crate) fn rollback(&mut self) {
        if !self.conn.is_autocommit() && self.faults.step("rollback").is_ok() {
            let _ = self.conn.execute_batch("ROLLBACK");
        }
    }

    pub(crate) fn savepoint(&mut self) -> rusqlite::Result<()> {
        self.get(Sql::Savepoint)?.execute([]).map(drop)
    }

    pub(crate) fn release(&mut self) -> rusqlite::Result<()> {
        self.get(Sql::Release)?.execute([]).map(drop)
    }

    pub(crate) fn rollback_to(&mut self) -> rusqlite::Result<()> {
        self.get(Sql::RollbackTo)?.execute([])?;
        self.release()
    }

    /// Notes how many commits there are with this one.
    pub(crate) fn count(&mut self, commits: u64) -> rusqlite::Result<()> {
        let commits = commits.to_string();
        self.get(Sql::Count)?.execute([commits]).map(drop)
    }

    pub(crate) fn mark(&mut self, run: Run, boot_id: &str, id: &str) -> rusqlite::Result<()> {
        let run = match run {
            Run::Open => "open",
            Run::Clean => "clean",
        };
        self.step(Sql::MarkRun)?
            .execute((run, boot_id, id))
            .map(drop)
    }

    /// Carries out `change` inside the open transaction. Several statements need a savepoint around
    /// them.
    pub(crate) fn apply(&mut self, change: &RowChange) -> rusqlite::Result<()> {
        match change {
            RowChange::PutApp(row) => row.write(self.step(Sql::PutApp)?),
            RowChange::AppWatches { app_id, watches } => {
                self.step(Sql::AppWatches)?.execute((app_id, watches))
            }
            RowChange::SeenApp { app_id, last_seen } => {
                self.step(Sql::SeenApp)?.execute((app_id, last_seen))
            }
            RowChange::ForgetApp { app_id } => self.step(Sql::ForgetApp)?.execute([app_id]),
            RowChange::PutBinding(row) => row.write(self.step(Sql::PutBinding)?),
            RowChange::RemoveBinding { app_id } => self.step(Sql::RemoveBinding)?.execute([app_id]),
            RowChange::PutPool(row) => row.write(self.step(Sql::PutPool)?),
            RowChange::PutDescriptor(row) => row.write(self.step(Sql::PutDescriptor)?),
            RowChange::RemovePool { name } => {
                self.step(Sql::RemoveDescriptors)?.execute([name])?;
                self.step(Sql::RemoveCallsOf)?.execute([name])?;
                self.step(Sql::RemoveAnswersOf)?.execute([name])?;
                self.step(Sql::RemovePool)?.execute([name])
            }
            RowChange::PutBlock(row) => row.write(self.step(Sql::PutBlock)?),
            RowChange::RemoveBlock { pool, block_id } => {
                self.step(Sql::RemoveBlock)?.execute((pool, block_id))
            }
            RowChange::PutCall(row) => row.write(self.step(Sql::PutCall)?),
            RowChange::NoteAttempt { number, attempt } => self
                .step(Sql::NoteAttempt)?
                .execute((Ordered(*number), attempt)),
            RowChange::RemoveCall { number } => {
                self.step(Sql::RemoveCall)?.execute([Ordered(*number)])
            }
            RowChange::PutAnswer { answer, ends_call } => {
                answer.write(self.step(Sql::PutAnswer)?)?;
                match ends_call {
                    Some(call) => self.step(Sql::RemoveCall)?.execute([Ordered(*call)]),
                    None => Ok(0),
                }
            }
            RowChange::RemoveAnswer { number } => {
                self.step(Sql::RemoveAnswer)?.execute([Ordered(*number)])
            }
            RowChange::RemoveParked { numbers } => {
                for number in numbers {
                    self.step(Sql::RemoveCall)?.execute([Ordered(*number)])?;
                    self.step(Sql::RemoveAnswer)?.execute([Ordered(*number)])?;
                }
                Ok(numbers.len())
            }
            RowChange::PutSetting { key, value } => {
                self.step(Sql::PutSetting)?.execute((key, value, now_ms()))
            }
        }
        .map(drop)
    }

    /// A statement that counts as a separate step.
    fn step(&mut self, sql: Sql) -> rusqlite::Result<&mut Statement<'c>> {
        self.faults.step("statement")?;
        self.get(sql)
    }

    fn get(&mut self, sql: Sql) -> rusqlite::Result<&mut Statement<'c>> {
        let place = &mut self.prepared[sql as usize];
        match place {
            Some(statement) => Ok(statement),
            None => Ok(place.insert(self.conn.prepare(&sql.text())?)),
        }
    }
}
