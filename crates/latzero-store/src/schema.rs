//! The tables, and how an older database becomes a current one.
//!
//! `user_version` says which schema a database has. Each migration is one transaction, and the database is copied to
//! `backups/` before the first. A migration that was released never changes.

use rusqlite::Connection;

use crate::failpoint;
use crate::faults::Faults;

/// Marks a database as one of this program ("LtZ0"): <https://sqlite.org/pragma.html#pragma_application_id>.
pub const APPLICATION_ID: i32 = 0x4c74_5a30;

/// The schema that this program writes.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// The first library without the race between two checkpoints that loses commits.
const LIBRARY_MIN: i32 = 3_051_003;

/// The n-th entry leads from schema n to schema n + 1.
const MIGRATIONS: &[&str] = &[include_str!("schema/1.sql")];

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

/// Whether the database has no tables at all, so that it may become ours.
pub(crate) fn is_blank(conn: &Connection) -> rusqlite::Result<bool> {
    conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| {
        row.get::<_, i64>(0).map(|tables| tables == 0)
    })
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
    fn libraries_with_the_race_are_refused() {
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
