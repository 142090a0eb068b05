//! Restoring: a backup becomes the database, in steps of which each can be the last before a crash.
//!
//! The new database is built beside the old one. Once it is complete and synced it gets the name `data.db.next`: that decides.
//! From there on every start goes on where it stopped: the old files are set aside, and the new one takes the name.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode};

use crate::backup::{self, Backup, OWN_TABLES, Summary, open_backup};
use crate::blocks_kept::BlockHead;
use crate::calendar::now_ms;
use crate::error::{BackupError, OpenError};
use crate::failpoint;
use crate::faults::Faults;
use crate::files;
use crate::open::{connect, findings};
use crate::retention;
use crate::schema;
use crate::{BACKUPS, DATABASE};

const NEXT: &str = "data.db.next";

/// How a run ended, as a database says that a person had restored.
const BY_HAND: &str = "restored";

/// As [`BY_HAND`], of one that took a damaged one's place at a start. Until a run begins on it, starts tell of it.
pub(crate) const BY_ITSELF: &str = "recovered";

/// What restoring did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What the backup held.
    pub summary: Summary,
    /// Where the former database's files are now.
    pub set_aside: Vec<PathBuf>,
}

/// Makes `backup` the database of `data_dir`, which no server may be using. The whole backup is verified first.
///
/// `put_block` gets the bytes of each block before anything is switched; it should write them to a name of their own, so that
/// a restoring that fails half-way leaves the old blocks alone. The former database is kept as `replaced-…`.
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
    refuse_in_use(&data_dir.join(DATABASE))?;
    let backup = open_backup(backup)?;
    backup.verify()?;
    // Nothing that can fail comes after the switch but the switch itself.
    let summary = backup.summary()?;
    finish_decided(data_dir, faults)?;
    let temporary = build(&backup, data_dir, BY_HAND, faults)?;
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
    decide(&temporary, data_dir, faults)?;
    let set_aside = switch(data_dir, "replaced", faults)?;
    Ok(Restored { summary, set_aside })
}

/// Builds the next database from the newest backup that verifies, and decides for it. Tells which one it was.
pub(crate) fn prepare_newest(
    dir: &Path,
    faults: &Faults,
    texts: &mut Vec<String>,
) -> Result<Option<PathBuf>, OpenError> {
    for found in retention::list(&dir.join(BACKUPS)).into_iter().rev() {
        let backup = open_backup(&found.path).and_then(|backup| {
            backup.verify()?;
            Ok(backup)
        });
        match backup {
            Ok(backup) => {
                let temporary = build(&backup, dir, BY_ITSELF, faults)?;
                decide(&temporary, dir, faults)?;
                return Ok(Some(found.path));
            }
            Err(error) => texts.push(error.to_string()),
        }
    }
    Ok(None)
}

/// Goes on with a restoring that was decided before a crash. Tells whether there was one.
pub(crate) fn finish_decided(dir: &Path, faults: &Faults) -> Result<bool, OpenError> {
    backup::remove_leftovers(dir).map_err(|error| OpenError::file("tidy", dir, error))?;
    if fs::symlink_metadata(dir.join(NEXT)).is_err() {
        return Ok(false);
    }
    switch(dir, "replaced", faults)?;
    Ok(true)
}

/// Sets the old database aside and gives the next one its name.
pub(crate) fn switch(dir: &Path, why: &str, faults: &Faults) -> Result<Vec<PathBuf>, OpenError> {
    let database = dir.join(DATABASE);
    let next = dir.join(NEXT);
    let moved = files::set_aside(&database, why, now_ms(), faults)
        .map_err(|error| OpenError::file("set aside", &database, error))?;
    failpoint::reached("restore.set_aside");
    files::rename_new(&next, &database, faults)
        .map_err(|error| OpenError::file("rename", &next, error))?;
    failpoint::reached("restore.renamed");
    files::sync_dir(dir, faults).map_err(|error| OpenError::file("sync", dir, error))?;
    Ok(moved)
}

fn decide(temporary: &Path, dir: &Path, faults: &Faults) -> Result<(), OpenError> {
    failpoint::reached("restore.built");
    let next = dir.join(NEXT);
    files::rename_new(temporary, &next, faults)
        .map_err(|error| OpenError::file("rename", temporary, error))?;
    files::sync_dir(dir, faults).map_err(|error| OpenError::file("sync", dir, error))?;
    failpoint::reached("restore.decided");
    Ok(())
}

/// Makes a database with the backup's records, without what only backups have, under a temporary name.
fn build(backup: &Backup, dir: &Path, how: &str, faults: &Faults) -> Result<PathBuf, BackupError> {
    let temporary = backup::temporary(dir);
    let built = build_at(&temporary, backup, how, faults);
    if built.is_err() {
        backup::remove_temporary(&temporary);
    }
    built.map(|()| temporary)
}

fn build_at(
    temporary: &Path,
    backup: &Backup,
    how: &str,
    faults: &Faults,
) -> Result<(), BackupError> {
    files::private_file(temporary).map_err(|e| BackupError::file("make", temporary, e))?;
    let failed = |step| move |error| BackupError::sqlite(step, temporary, error);
    let conn = connect(temporary).map_err(failed("open"))?;
    let source = std::path::absolute(backup.path())
        .map_err(|error| BackupError::file("find", backup.path(), error))?;
    let Some(source) = source.to_str() else {
        return Err(BackupError::Bad {
            path: backup.path().to_owned(),
            findings: "its path is not UTF-8: move it".into(),
        });
    };
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

/// Kind, name and text of what a backup's records lie in, tables before what is built upon them.
fn schema_of(conn: &Connection, schema: &str) -> rusqlite::Result<Vec<(String, String, String)>> {
    let mut made: Vec<(String, String, String)> = conn
        .prepare(&format!(
            "SELECT type, name, sql FROM {schema}.sqlite_schema
             WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
             ORDER BY type <> 'table', rowid"
        ))?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<_, _>>()?;
    made.retain(|(_, name, _)| !OWN_TABLES.contains(&name.as_str()));
    Ok(made)
}

/// Whether the text of a backup's schema makes a database: no checksum of SQLite's is over it.
pub(crate) fn try_schema(conn: &Connection) -> rusqlite::Result<()> {
    let scratch = Connection::open_in_memory()?;
    for (_, _, sql) in schema_of(conn, "main")? {
        scratch.execute_batch(&sql)?;
    }
    Ok(())
}

fn copy_records(conn: &Connection, how: &str) -> rusqlite::Result<()> {
    let made = schema_of(conn, "source")?;
    conn.execute_batch("BEGIN")?;
    for (kind, name, sql) in &made {
        conn.execute_batch(sql)?;
        if kind == "table" {
            conn.execute_batch(&format!(
                "INSERT INTO main.\"{name}\" SELECT * FROM source.\"{name}\" ORDER BY rowid"
            ))?;
        }
    }
    let version: i64 = conn.query_row("PRAGMA source.user_version", [], |row| row.get(0))?;
    conn.execute_batch(&format!(
        "UPDATE store_state SET value = '{how}' WHERE key = 'run';
         PRAGMA main.application_id = {};
         PRAGMA main.user_version = {version};
         COMMIT",
        schema::APPLICATION_ID
    ))
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
        // Whatever else is wrong with it, it is about to be replaced.
        _ => Ok(()),
    }
}
