//! The tables, and the migration of older databases.
//!
//! `user_version` is the schema of a database. Each migration is one transaction, and the database
//! is copied to `backups/` before the first one. A released migration never changes.

use std::collections::BTreeSet;

use rusqlite::Connection;

use crate::failpoint;
use crate::faults::Faults;

/// Marks a database as one of this program ("LtZ0"):
/// <https://sqlite.org/pragma.html#pragma_application_id>.
pub const APPLICATION_ID: i32 = 0x4c74_5a30;

/// The schema that this program writes.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// The first library without the race between two checkpoints that loses commits.
const LIBRARY_MIN: i32 = 3_051_003;

/// The n-th entry leads from schema n to schema n + 1.
const MIGRATIONS: &[&str] = &[
    include_str!("schema/1.sql"),
    include_str!("schema/2.sql"),
    include_str!("schema/3.sql"),
    include_str!("schema/4.sql"),
    include_str!("schema/5.sql"),
    include_str!("schema/6.sql"),
];

/// The version of the SQLite library in use.
#[must_use]
pub fn library_version() -> &'static str {
    rusqlite::version()
}

pub(crate) fn library_is_safe(number: i32) -> bool {
    // The fix was also made in two older lines.
    number >= LIBRARY_MIN
        || (3_050_007..3_051_000).contains(&number)
        || (3_044_006..3_045_000).contains(&number)
}

pub(crate) fn user_version(conn: &Connection) -> rusqlite::Result<i64> {
    conn.query_row("PRAGMA user_version", [], |row| row.get(0))
}

pub(crate) fn application_id(conn: &Connection) -> rusqlite::Result<i64> {
    conn.query_row("PRAGMA application_id", [], |row| row.get(0))
}

/// Whether the database has no tables, so that this program may use it.
pub(crate) fn is_blank(conn: &Connection) -> rusqlite::Result<bool> {
    conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| {
        row.get::<_, i64>(0).map(|tables| tables == 0)
    })
}

/// Kind and name of everything that a database of schema `version` consists of.
pub(crate) fn objects_of(version: i64) -> rusqlite::Result<BTreeSet<(String, String)>> {
    let scratch = Connection::open_in_memory()?;
    make(&scratch, version)?;
    objects(&scratch)
}

/// Makes the tables of schema `version`.
pub(crate) fn make(conn: &Connection, version: i64) -> rusqlite::Result<()> {
    let scripts = MIGRATIONS
        .iter()
        .take(usize::try_from(version).unwrap_or(0));
    scripts
        .into_iter()
        .try_for_each(|script| conn.execute_batch(script))
}

/// Kind and name of everything in a database that SQLite did not create itself.
pub(crate) fn objects(conn: &Connection) -> rusqlite::Result<BTreeSet<(String, String)>> {
    conn.prepare(
        "SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'",
    )?
    .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
    .collect()
}

/// Removes triggers, views and indexes, which no schema has. A previous owner of the file may have
/// added them, and a trigger runs on every write. Returns what was removed.
pub(crate) fn drop_foreign(conn: &Connection) -> rusqlite::Result<Vec<String>> {
    let found = objects(conn)?;
    // Triggers first, because dropping a view drops its triggers.
    let foreign = ["trigger", "view", "index"].into_iter().flat_map(|kind| {
        let of_kind = found.iter().filter(move |(found, _)| found == kind);
        of_kind.map(|(kind, name)| (kind, name.replace('"', "\"\"")))
    });
    let mut dropped = Vec::new();
    for (kind, name) in foreign {
        conn.execute_batch(&format!("DROP {kind} IF EXISTS \"{name}\""))?;
        dropped.push(format!("{kind} '{name}'"));
    }
    Ok(dropped)
}

/// Brings the database from schema `from` to the current one.
pub(crate) fn migrate(conn: &Connection, from: i64, faults: &Faults) -> rusqlite::Result<()> {
    let from = usize::try_from(from).unwrap_or_default();
    for (version, script) in MIGRATIONS.iter().enumerate().skip(from) {
        let step = || -> rusqlite::Result<()> {
            faults.step("migration: begin")?;
            conn.execute_batch("BEGIN IMMEDIATE")?;
            faults.step("migration: statements")?;
            conn.execute_batch(script)?;
            conn.execute_batch(&format!(
                "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {}",
                version + 1
            ))?;
            failpoint::reached("migrate.before_commit");
            faults.step("migration: commit")?;
            conn.execute_batch("COMMIT")?;
            failpoint::reached("migrate.after_commit");
            Ok(())
        };
        if let Err(error) = step() {
            if !conn.is_autocommit() {
                let _ = conn.execute_batch("ROLLBACK");
            }
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sqlite_versions_with_the_wal_race_are_refused() {
        for (number, safe) in [
            (3_044_005, false),
            (3_044_006, true),
            (3_045_000, false),
            (3_050_006, false),
            (3_050_007, true),
            (3_051_002, false),
            (3_051_003, true),
            (3_054_001, true),
        ] {
            assert_eq!(library_is_safe(number), safe, "{number}");
        }
        assert!(library_is_safe(rusqlite::version_number()));
    }
}
