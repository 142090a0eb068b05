//! Restores a backup, in steps that each survive a crash.
//!
//! The new database is built beside the old one. When it is complete and synced it is renamed to
//! `data.db.next`, which commits the restore. From then on every start continues an interrupted
//! restore: the old files are moved aside, and the new one is renamed.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::DATABASE;
use crate::backup::{self, Backup, Summary, open_backup};
use crate::block_backup::BlockHead;
use crate::calendar::now_ms;
use crate::error::{BackupError, OpenError};
use crate::failpoint;
use crate::faults::Faults;
use crate::files;
use crate::location::DatabasePath;
use crate::open::{connect, findings};
use crate::retention;
use crate::rows::{BindingRow, Record as _};
use crate::schema;

/// The suffix of the database to which a restore is committed.
const NEXT: &str = ".next";

/// The run state of a database that a person has restored.
const BY_HAND: &str = "restored";

/// Like [`BY_HAND`], for a database that replaced a damaged one at a start. Starts report it until
/// a run uses it.
pub(crate) const BY_ITSELF: &str = "recovered";

/// When the database was restored last, in Unix milliseconds.
pub(crate) const RESTORED: &str = "restored_ms";

/// The result of a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The contents of the backup.
    pub summary: Summary,
    /// Where the former database's files are now.
    pub set_aside: Vec<PathBuf>,
}

/// Makes `backup` the database of `data_dir`, which no server may be using. The whole backup is
/// verified first.
///
/// `put_block` gets the bytes of each block before anything is switched. It should write them under
/// a separate name, so that a failed restore does not affect the old blocks. The former database is
/// kept as `replaced-…`.
pub fn restore(
    backup: &Path,
    data_dir: &Path,
    put_block: impl FnMut(BlockHead, &mut dyn Read) -> io::Result<()>,
) -> Result<Restored, OpenError> {
    restore_with(backup, data_dir, put_block, &Faults::none())
}

/// [`restore`], with steps that fail.
#[doc(hidden)]
pub fn restore_with(
    backup: &Path,
    data_dir: &Path,
    mut put_block: impl FnMut(BlockHead, &mut dyn Read) -> io::Result<()>,
    faults: &Faults,
) -> Result<Restored, OpenError> {
    let place = DatabasePath::of(data_dir)
        .map_err(|error| OpenError::file("follow the link", &data_dir.join(DATABASE), error))?;
    refuse_in_use(place.database())?;
    let backup = open_backup(backup)?;
    backup.verify()?;
    // The switch is the last step that can fail.
    let summary = backup.summary()?;
    finish_decided(&place, faults)?;
    let temporary = build(&backup, place.home(), BY_HAND, faults)?;
    if let Err(error) = carry_bindings(&temporary, place.database(), faults) {
        backup::remove_temporary(&temporary);
        return Err(error.into());
    }
    let mut put_all = || -> Result<(), BackupError> {
        for head in backup.blocks()? {
            let shown = backup.path();
            let failed = |error| BackupError::file("restore a block of", shown, error);
            let mut reader = backup.read_block(&head).map_err(failed)?;
            put_block(head, &mut reader).map_err(failed)?;
        }
        Ok(())
    };
    if let Err(error) = put_all() {
        backup::remove_temporary(&temporary);
        return Err(error.into());
    }
    decide(&temporary, &place, faults)?;
    let set_aside = switch(&place, "replaced", faults)?;
    Ok(Restored { summary, set_aside })
}

/// Builds the next database from the newest valid backup, and commits the restore. Returns the
/// backup.
pub(crate) fn prepare_newest(
    place: &DatabasePath,
    faults: &Faults,
    texts: &mut Vec<String>,
) -> Result<Option<PathBuf>, OpenError> {
    for found in retention::list(&place.backups()).into_iter().rev() {
        let backup = open_backup(&found.path).and_then(|backup| {
            backup.verify()?;
            Ok(backup)
        });
        match backup {
            Ok(backup) => {
                let temporary = build(&backup, place.home(), BY_ITSELF, faults)?;
                decide(&temporary, place, faults)?;
                return Ok(Some(found.path));
            }
            Err(error) => texts.push(error.to_string()),
        }
    }
    Ok(None)
}

/// Finishes a restore that was committed before a crash. Returns whether there was one.
pub(crate) fn finish_decided(place: &DatabasePath, faults: &Faults) -> Result<bool, OpenError> {
    let dir = place.home();
    backup::remove_leftovers(dir).map_err(|error| OpenError::file("tidy", dir, error))?;
    if fs::symlink_metadata(next(place)).is_err() {
        return Ok(false);
    }
    switch(place, "replaced", faults)?;
    Ok(true)
}

/// Moves the old database aside and renames the next one.
pub(crate) fn switch(
    place: &DatabasePath,
    why: &str,
    faults: &Faults,
) -> Result<Vec<PathBuf>, OpenError> {
    let (dir, database) = (place.home(), place.database());
    let next = next(place);
    let moved = files::set_aside(database, why, now_ms(), faults)
        .map_err(|error| OpenError::file("set aside", database, error))?;
    // It counts the commits of the old database.
    let _ = fs::remove_file(place.mark());
    failpoint::reached("restore.set_aside");
    files::rename_new(&next, database, faults)
        .map_err(|error| OpenError::file("rename", &next, error))?;
    failpoint::reached("restore.renamed");
    files::sync_dir(dir, faults).map_err(|error| OpenError::file("sync", dir, error))?;
    Ok(moved)
}

/// The first schema with the owners of AppIDs.
const BINDINGS_SINCE: i64 = 4;

/// The database to which a restore was committed.
fn next(place: &DatabasePath) -> PathBuf {
    files::with_suffix(place.database(), NEXT)
}

fn decide(temporary: &Path, place: &DatabasePath, faults: &Faults) -> Result<(), OpenError> {
    failpoint::reached("restore.built");
    let (dir, next) = (place.home(), next(place));
    files::rename_new(temporary, &next, faults)
        .map_err(|error| OpenError::file("rename", temporary, error))?;
    files::sync_dir(dir, faults).map_err(|error| OpenError::file("sync", dir, error))?;
    failpoint::reached("restore.decided");
    Ok(())
}

/// Creates a database with the backup's records, without the tables that only backups have, under a
/// temporary name.
fn build(backup: &Backup, dir: &Path, how: &str, faults: &Faults) -> Result<PathBuf, BackupError> {
    let temporary = backup::temporary(dir);
    let built = build_at(&temporary, backup, how, faults);
    if built.is_err() {
        backup::remove_temporary(&temporary);
    }
    built.map(|()| temporary)
}

/// Keeps the owners of AppIDs: a restore adds owners but does not remove those in the database that
/// it replaces. If that database cannot be read, or is too old, it adds none.
fn carry_bindings(temporary: &Path, replaced: &Path, faults: &Faults) -> Result<(), BackupError> {
    let failed = |error| BackupError::sqlite("add to", temporary, error);
    let is_file = fs::symlink_metadata(replaced).is_ok_and(|metadata| metadata.is_file());
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let Some(old) = is_file
        .then(|| Connection::open_with_flags(replaced, flags).ok())
        .flatten()
    else {
        return Ok(());
    };
    let read = || -> rusqlite::Result<Vec<BindingRow>> {
        old.execute_batch("PRAGMA trusted_schema = OFF")?;
        let mut statement = old.prepare(&BindingRow::select())?;
        let rows = statement.query_map([], BindingRow::read)?;
        rows.collect()
    };
    let rows = read().unwrap_or_default();
    if rows.is_empty() {
        return Ok(());
    }
    let conn = Connection::open(temporary).map_err(failed)?;
    let is_older = schema::user_version(&conn).map_err(failed)? < BINDINGS_SINCE;
    if is_older {
        return Ok(());
    }
    let add = || -> rusqlite::Result<()> {
        conn.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")?;
        let mut statement = conn.prepare(&BindingRow::upsert())?;
        for row in &rows {
            row.write(&mut statement)?;
        }
        drop(statement);
        conn.execute_batch("COMMIT")
    };
    add().map_err(failed)?;
    conn.close()
        .map_err(|(_, error)| BackupError::sqlite("close", temporary, error))?;
    files::sync_file(temporary, faults).map_err(|e| BackupError::file("sync", temporary, e))
}

fn build_at(
    temporary: &Path,
    backup: &Backup,
    how: &str,
    faults: &Faults,
) -> Result<(), BackupError> {
    files::private_file(temporary).map_err(|e| BackupError::file("make", temporary, e))?;
    let failed = |step| move |error| BackupError::sqlite(step, temporary, error);
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    let conn = Connection::open_with_flags(temporary, flags).map_err(failed("open"))?;
    let source = backup::alone(backup.path())?;
    let fill = || -> rusqlite::Result<Vec<String>> {
        conn.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")?;
        conn.execute("ATTACH ?1 AS source", [source])?;
        faults.step("restore: copy")?;
        copy_records(&conn, how)?;
        conn.execute_batch("DETACH source")?;
        faults.step("restore: check")?;
        findings(&conn, true)
    };
    let found = fill().map_err(failed("fill"))?;
    if !found.is_empty() {
        return Err(BackupError::Bad {
            path: temporary.to_owned(),
            findings: found.join("; "),
        });
    }
    conn.close()
        .map_err(|(_, error)| BackupError::sqlite("close", temporary, error))?;
    files::sync_file(temporary, faults).map_err(|e| BackupError::file("sync", temporary, e))
}

fn copy_records(conn: &Connection, how: &str) -> rusqlite::Result<()> {
    let version: i64 = conn.query_row("PRAGMA source.user_version", [], |row| row.get(0))?;
    conn.execute_batch("PRAGMA trusted_schema = OFF; BEGIN")?;
    // The tables are this program's own; of the backup only its records count.
    schema::make(conn, version)?;
    for (_, name) in schema::objects_of(version)? {
        let columns = columns_of(conn, &name)?;
        conn.execute_batch(&format!(
            "INSERT INTO main.\"{name}\" ({columns})
             SELECT {columns} FROM source.\"{name}\" ORDER BY rowid"
        ))?;
    }
    conn.execute_batch(&format!(
        "UPDATE main.store_state SET value = '{how}' WHERE key = 'run';
         INSERT OR REPLACE INTO main.store_state (key, value) VALUES ('{RESTORED}', {});
         DELETE FROM main.store_state WHERE key IN ('id', 'commits');
         PRAGMA main.application_id = {};
         PRAGMA main.user_version = {version};
         COMMIT",
        now_ms(),
        schema::APPLICATION_ID
    ))
}

/// The columns of one of this program's tables, for SQL.
fn columns_of(conn: &Connection, table: &str) -> rusqlite::Result<String> {
    let columns: Vec<String> = conn
        .prepare("SELECT name FROM pragma_table_info(?1, 'main')")?
        .query_map([table], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(columns.join(", "))
}

/// A server that has the database open holds its lock.
fn refuse_in_use(database: &Path) -> Result<(), OpenError> {
    if fs::metadata(database).is_err() {
        return Ok(());
    }
    let look = || -> rusqlite::Result<()> {
        let conn = connect(database)?;
        conn.execute_batch("PRAGMA busy_timeout = 0; PRAGMA locking_mode = EXCLUSIVE")?;
        schema::user_version(&conn).map(drop)
    };
    match look() {
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
            Err(OpenError::InUse {
                path: database.to_owned(),
            })
        }
        // Other problems do not matter, because it is about to be replaced.
        _ => Ok(()),
    }
}
