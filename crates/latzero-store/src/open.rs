//! Opens the database: the checks before the first record is read, and what happens if they fail.
//!
//! A database that was closed cleanly since the last boot is trusted. Otherwise it is checked,
//! after a reboot completely. A damaged one is moved aside, never deleted, and the newest valid
//! backup is restored; the report says so. Temporary problems (a full disk, a directory that is not
//! writable) are errors and move nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::backup;
use crate::calendar::now_ms;
use crate::error::{BackupError, OpenError, is_damage};
use crate::faults::Faults;
use crate::files::{self, with_suffix};
use crate::location::{DatabasePath, Guard, Mark};
use crate::options::{Durability, Options};
use crate::queue::Queue;
use crate::restore;
use crate::retention;
use crate::rows::{
    AnswerRow, AppRow, BindingRow, BlockRow, CallRow, DescriptorRow, PoolRow, Record,
};
use crate::schema::{self, SCHEMA_VERSION};
use crate::store::{State, Store, StoreState};
use crate::writer;
use crate::{BACKUPS, DATABASE};

/// An open store and its contents.
#[derive(Debug)]
pub struct Opened {
    /// The handle.
    pub store: Store,
    /// All records.
    pub contents: Contents,
    /// What was done to open it.
    pub report: Report,
}

/// All records of a database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The known apps, in no particular order.
    pub apps: Vec<AppRow>,
    /// The durable pools, by name.
    pub pools: Vec<PoolRow>,
    /// The blocks, by pool and name.
    pub blocks: Vec<BlockRow>,
    /// The parked calls, by number.
    pub calls: Vec<CallRow>,
    /// The kept answers, by number.
    pub answers: Vec<AnswerRow>,
    /// The owners of AppIDs, by AppID.
    pub bindings: Vec<BindingRow>,
    /// The descriptors of encrypted pools, by pool and epoch.
    pub descriptors: Vec<DescriptorRow>,
    /// The settings, by name.
    pub settings: Vec<(String, String)>,
    /// When all of this was restored from a backup, in Unix milliseconds.
    pub restored_ms: Option<u64>,
}

/// What was done to open a database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Something was lost, or may be: a person should read `texts`.
    pub is_degraded: bool,
    /// What happened, one sentence each.
    pub texts: Vec<String>,
    /// There was no database; this is a new one.
    pub is_new: bool,
    /// The check that was done: `none`, `quick` or `full`.
    pub checked: &'static str,
    /// The schema before the migration, if it was older.
    pub migrated_from: Option<i64>,
    /// The backup that replaced a damaged database.
    pub restored_from: Option<PathBuf>,
}

/// Opens the database in `data_dir`, which must exist and be private to the caller; only one
/// process at a time may do so.
pub fn open(data_dir: &Path, options: Options) -> Result<Opened, OpenError> {
    if !schema::library_is_safe(rusqlite::version_number()) {
        let found = schema::library_version().to_owned();
        return Err(OpenError::Library { found });
    }
    let mut report = Report::default();
    let place = DatabasePath::of(data_dir)
        .map_err(|error| OpenError::file("follow the link", &data_dir.join(DATABASE), error))?;
    let (conn, contents) = open_files(&place, &options, &mut report)?;
    let guard = Guard::new(place)
        .map_err(|error| OpenError::file("look at", &data_dir.join(DATABASE), error))?;
    // It has been reported, so the next start does not report it. If the disk is full, it is
    // reported again.
    let mark_open = "UPDATE store_state SET value = 'open' WHERE key = 'run' AND value = ?1";
    if let Err(error) = conn.execute(mark_open, [restore::BY_ITSELF]) {
        tracing::warn!(%error, "the next start will report this again");
    }
    let shared = Arc::new(StoreState {
        state: Mutex::new(State {
            queue: Queue::new(options.queue_max, options.retained_max),
            requests: Default::default(),
            is_closing: false,
            is_abandoned: false,
            is_asleep: false,
            failing: None,
            commits: 0,
            changes: 0,
            failures: 0,
            refused: 0,
            rebuilt: 0,
            is_probed: false,
            // The last one, whatever the clock showed at that time.
            last_backup: retention::list(&data_dir.join(BACKUPS))
                .last()
                .map(|found| found.at * 1000),
        }),
        guard: Mutex::new(guard),
        wake: Condvar::new(),
        settled: Condvar::new(),
        dir: data_dir.to_owned(),
        faults: options.faults.clone(),
    });
    let thread = writer::start(conn, Arc::clone(&shared), options)
        .map_err(|error| OpenError::file("start the thread for", data_dir, error))?;
    Ok(Opened {
        store: Store::new(shared, thread),
        contents,
        report,
    })
}

fn open_files(
    place: &DatabasePath,
    options: &Options,
    report: &mut Report,
) -> Result<(Connection, Contents), OpenError> {
    let database = place.database();
    let backups = place.backups();
    let faults = &options.faults;
    files::private_dir(&backups).map_err(|e| OpenError::file("make", &backups, e))?;
    backup::remove_leftovers(&backups).map_err(|e| OpenError::file("tidy", &backups, e))?;
    if restore::finish_decided(place, faults)? {
        report.texts.push(format!(
            "an interrupted restore was completed; the former database is kept beside {}",
            database.display()
        ));
        report.is_degraded = true;
    }
    let reason = match try_open(place, options, report) {
        Ok(opened) => return Ok(opened),
        Err(Trouble::Other(error)) => return Err(error),
        Err(Trouble::Damage(reason)) => reason,
    };

    report.is_degraded = true;
    let mut text = format!("{} is damaged ({reason})", database.display());
    match restore::prepare_newest(place, faults, &mut report.texts)? {
        Some(from) => {
            restore::switch(place, "corrupt", faults)?;
            text += &format!("; {} was restored instead", from.display());
            report.restored_from = Some(from);
        }
        None => {
            files::set_aside(database, "corrupt", now_ms(), faults)
                .map_err(|e| OpenError::file("set aside", database, e))?;
            let _ = fs::remove_file(place.mark());
            text += "; there is no valid backup, so everything starts empty";
        }
    }
    text += "; the damaged files were kept as corrupt-… beside it";
    report.texts.push(text);
    match try_open(place, options, report) {
        Ok(opened) => Ok(opened),
        Err(Trouble::Other(error)) => Err(error),
        Err(Trouble::Damage(reason)) => Err(OpenError::Damaged {
            path: database.to_owned(),
            reason,
        }),
    }
}

/// Why a database could not be opened as it is.
enum Trouble {
    /// Its contents are damaged.
    Damage(String),
    Other(OpenError),
}

impl From<OpenError> for Trouble {
    fn from(error: OpenError) -> Self {
        Self::Other(error)
    }
}

fn try_open(
    place: &DatabasePath,
    options: &Options,
    report: &mut Report,
) -> Result<(Connection, Contents), Trouble> {
    let (dir, database) = (place.home(), place.database().to_owned());
    let faults = &options.faults;
    let failed = |step: &'static str| {
        let database = database.clone();
        move |error: rusqlite::Error| {
            if is_damage(&error) {
                Trouble::Damage(error.to_string())
            } else {
                Trouble::Other(OpenError::sqlite(step, &database, error))
            }
        }
    };
    for suffix in files::COMPANIONS {
        let path = with_suffix(&database, suffix);
        files::check_regular(&path).map_err(|error| OpenError::file("open", &path, error))?;
    }
    let size = fs::metadata(&database).map_or(0, |metadata| metadata.len());
    if size == 0 {
        set_stray_log_aside(&database, report, faults)?;
        note_what_is_missing(place, report);
    }
    let had_log = fs::metadata(with_suffix(&database, "-wal")).is_ok_and(|log| log.len() > 0);
    let is_made = files::private_file(&database)
        .map_err(|error| OpenError::file("make", &database, error))?;
    if is_made {
        // The name must outlast a power loss before the first commit does.
        files::sync_dir(dir, faults).map_err(|error| OpenError::file("sync", dir, error))?;
    }
    let conn = connect(&database).map_err(failed("open"))?;
    skip_checkpoint_on_close(&conn, true).map_err(failed("prepare"))?;
    prepare(&conn, options.durability).map_err(failed("prepare"))?;

    let application = schema::application_id(&conn).map_err(failed("read"))?;
    let version = schema::user_version(&conn).map_err(failed("read"))?;
    let is_blank = schema::is_blank(&conn).map_err(failed("read"))?;
    report.is_new = is_blank;
    if application != i64::from(schema::APPLICATION_ID) && !is_blank {
        return Err(Trouble::Other(OpenError::Foreign {
            path: database,
            found: application,
        }));
    }
    if version > SCHEMA_VERSION {
        return Err(Trouble::Other(OpenError::Newer {
            path: database,
            found: version,
            known: SCHEMA_VERSION,
        }));
    }
    report.checked = "none";
    let run = state(&conn, "run");
    if run.as_deref() == Some(restore::BY_ITSELF)
        && report.restored_from.is_none()
        && report.texts.is_empty()
    {
        report.texts.push(format!(
            "{} was damaged at an earlier start that did not complete; a backup was restored, \
             and the damaged files were kept as corrupt-… beside it",
            database.display()
        ));
        report.is_degraded = true;
    }
    let missing = missing_commits(&conn, place, is_blank);
    let check = match missing {
        // Without its log, a database may be incomplete.
        Some(_) => Some(true),
        None => check_needed(&conn, &options.boot_id, had_log),
    };
    if !is_blank && let Some(full) = check {
        report.checked = if full { "full" } else { "quick" };
        let found = findings(&conn, full).map_err(failed("check"))?;
        if !found.is_empty() {
            return Err(Trouble::Damage(found.join("; ")));
        }
    }
    if let Some(text) = missing {
        report.texts.push(format!("{}: {text}", database.display()));
        report.is_degraded = true;
    }
    for name in schema::drop_foreign(&conn).map_err(failed("clean"))? {
        report.texts.push(format!(
            "{} had a {name} that LatZero did not create; it was removed",
            database.display()
        ));
        report.is_degraded = true;
    }
    if version < SCHEMA_VERSION {
        if !is_blank {
            back_up_before_migration(&conn, place, version, faults)?;
            report.migrated_from = Some(version);
        }
        schema::migrate(&conn, version, faults).map_err(failed("migrate"))?;
        if !is_blank {
            // Data that was deleted before `secure_delete` was set is still in free pages.
            if let Err(error) = conn.execute_batch("VACUUM") {
                tracing::warn!(%error, "free pages of data.db may still contain deleted data");
            }
        }
    }
    let contents = load(&conn).map_err(failed("read"))?;
    skip_checkpoint_on_close(&conn, false).map_err(failed("prepare"))?;
    Ok((conn, contents))
}

/// Opens an existing file. A connection is used by one thread at a time, so it needs no lock.
pub(crate) fn connect(path: &Path) -> rusqlite::Result<Connection> {
    Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )
}

pub(crate) fn prepare(conn: &Connection, durability: Durability) -> rusqlite::Result<()> {
    let synchronous = match durability {
        Durability::Full => "FULL",
        Durability::Normal => "NORMAL",
    };
    // The exclusive lock comes before the journal's mode: then no other process, with whatever
    // SQLite, can open the file, and there is no shared index file
    // (https://sqlite.org/wal.html#noshm).
    conn.execute_batch(&format!(
        "PRAGMA busy_timeout = 5000;
         PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA trusted_schema = OFF;
         PRAGMA cell_size_check = ON;
         PRAGMA secure_delete = ON;
         PRAGMA mmap_size = 0;
         PRAGMA temp_store = MEMORY;
         PRAGMA foreign_keys = ON;
         PRAGMA journal_mode = WAL;
         PRAGMA synchronous = {synchronous};
         PRAGMA wal_autocheckpoint = 1000;
         PRAGMA journal_size_limit = 67108864;"
    ))
}

/// Whether closing keeps the log: until a database is known to be valid, the log may be needed to
/// examine the damage.
pub(crate) fn skip_checkpoint_on_close(conn: &Connection, keep: bool) -> rusqlite::Result<()> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, keep)
        .map(drop)
}

/// What the last run stored about itself.
pub(crate) fn state(conn: &Connection, key: &str) -> Option<String> {
    conn.query_row(
        "SELECT value FROM store_state WHERE key = ?1",
        [key],
        |row| row.get(0),
    )
    .ok()
}

/// What is missing from the database, if it has had fewer commits than the last run counted.
fn missing_commits(conn: &Connection, place: &DatabasePath, is_blank: bool) -> Option<String> {
    let mark = Mark::read(&place.mark())?;
    if is_blank {
        return Some(format!(
            "all {} changes of previous runs are missing; the database or its log data.db-wal \
             was removed or damaged",
            mark.commits
        ));
    }
    let id = state(conn, "id");
    if id.is_some_and(|id| id != mark.id) {
        return Some("it is not the database of the last run".into());
    }
    let commits = state(conn, "commits").and_then(|commits| commits.parse().ok());
    let missing = mark.commits.checked_sub(commits.unwrap_or(0))?;
    (missing > 0).then(|| {
        format!(
            "the last {missing} changes of the previous run are missing; the log data.db-wal was \
             lost or damaged, or the machine stopped before they were on disk"
        )
    })
}

/// Which check a start needs: none, quick (`Some(false)`) or full (`Some(true)`).
fn check_needed(conn: &Connection, boot_id: &str, had_log: bool) -> Option<bool> {
    let is_same_boot = !boot_id.is_empty() && state(conn, "boot_id").as_deref() == Some(boot_id);
    let is_clean = !had_log && state(conn, "run").as_deref() == Some("clean");
    match (is_same_boot, is_clean) {
        (true, true) => None,
        (true, false) => Some(false),
        (false, _) => Some(true),
    }
}

/// The damage that SQLite finds; empty if there is none.
pub(crate) fn findings(conn: &Connection, full: bool) -> rusqlite::Result<Vec<String>> {
    let check = if full {
        "PRAGMA integrity_check"
    } else {
        "PRAGMA quick_check"
    };
    let mut found: Vec<String> = conn
        .prepare(check)?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    found.retain(|line| line != "ok");
    if full {
        let mut statement = conn.prepare("PRAGMA foreign_key_check")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let table: String = row.get(0)?;
            found.push(format!("a row of {table} refers to one that is missing"));
        }
    }
    Ok(found)
}

fn set_stray_log_aside(
    database: &Path,
    report: &mut Report,
    faults: &Faults,
) -> Result<(), OpenError> {
    let log = with_suffix(database, "-wal");
    if !fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
        return Ok(());
    }
    files::set_aside(&log, "corrupt", now_ms(), faults)
        .map_err(|error| OpenError::file("set aside", &log, error))?;
    report.is_degraded = true;
    report.texts.push(format!(
        "{} existed without its database; it was kept as corrupt-… beside it",
        log.display()
    ));
    Ok(())
}

/// A data directory with backups but without a database is not new, so this is reported.
fn note_what_is_missing(place: &DatabasePath, report: &mut Report) {
    if report.is_degraded {
        return;
    }
    if let Some(newest) = retention::list(&place.backups()).last() {
        report.is_degraded = true;
        report.texts.push(format!(
            "{} is missing, although there are backups; the server starts empty; restore {} if \
             that is not intended",
            place.database().display(),
            newest.path.display()
        ));
    }
}

fn back_up_before_migration(
    conn: &Connection,
    place: &DatabasePath,
    version: i64,
    faults: &Faults,
) -> Result<(), OpenError> {
    let backups = place.backups();
    let temporary = backup::temporary(&backups);
    let back_up = || -> Result<(), BackupError> {
        backup::copy(conn, &temporary, i32::MAX, faults, || Ok(()))?;
        backup::compact(&temporary)?;
        backup::finish(&temporary, faults)?;
        let kind = format!("pre-migration-{version}");
        backup::publish(&temporary, &backups, &kind, faults).map(drop)
    };
    back_up().map_err(|reason| OpenError::Migration {
        path: place.database().to_owned(),
        found: version,
        reason: Box::new(reason),
    })
}

/// Whether the tables have all columns that are read.
pub(crate) fn try_reading(conn: &Connection) -> rusqlite::Result<()> {
    for select in [
        AppRow::select(),
        PoolRow::select(),
        BlockRow::select(),
        CallRow::select(),
        AnswerRow::select(),
        BindingRow::select(),
        DescriptorRow::select(),
    ] {
        conn.prepare(&select)?;
    }
    conn.prepare(
        "SELECT key, value FROM server_config UNION ALL SELECT key, value FROM store_state",
    )
    .map(drop)
}

/// Reads every record.
pub(crate) fn load(conn: &Connection) -> rusqlite::Result<Contents> {
    Ok(Contents {
        apps: all(conn)?,
        pools: all(conn)?,
        blocks: all(conn)?,
        calls: all(conn)?,
        answers: all(conn)?,
        bindings: all(conn)?,
        descriptors: all(conn)?,
        settings: conn
            .prepare("SELECT key, value FROM server_config ORDER BY key")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<Result<_, _>>()?,
        restored_ms: state(conn, restore::RESTORED).and_then(|ms| ms.parse().ok()),
    })
}

fn all<R: Record>(conn: &Connection) -> rusqlite::Result<Vec<R>> {
    let mut statement = conn.prepare(&R::select())?;
    let mut rows = statement.query([])?;
    let mut records = Vec::new();
    while let Some(row) = rows.next()? {
        records.push(R::read(row)?);
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_has_the_documented_settings() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DATABASE);
        files::private_file(&path).unwrap();
        for (durability, synchronous) in [(Durability::Full, "2"), (Durability::Normal, "1")] {
            let conn = connect(&path).unwrap();
            prepare(&conn, durability).unwrap();
            for (pragma, expected) in [
                ("journal_mode", "wal"),
                ("locking_mode", "exclusive"),
                ("synchronous", synchronous),
                ("busy_timeout", "5000"),
                ("trusted_schema", "0"),
                ("cell_size_check", "1"),
                ("secure_delete", "1"),
                ("temp_store", "2"),
                ("foreign_keys", "1"),
                ("wal_autocheckpoint", "1000"),
                ("journal_size_limit", "67108864"),
                ("mmap_size", "0"),
            ] {
                let value: rusqlite::types::Value = conn
                    .query_row(&format!("PRAGMA {pragma}"), [], |row| row.get(0))
                    .unwrap();
                let value = match value {
                    rusqlite::types::Value::Integer(number) => number.to_string(),
                    rusqlite::types::Value::Text(text) => text,
                    other => panic!("{pragma}: {other:?}"),
                };
                assert_eq!(value, expected, "{pragma}");
            }
        }
    }
}
