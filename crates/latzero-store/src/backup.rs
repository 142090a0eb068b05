//! Backups: a consistent copy of the database, and the bytes of persistent blocks, in one file.
//!
//! The copy is written under a temporary name, checked, synced, and only then renamed. Checksums
//! cover every record and every block, because SQLite's own check does not look at contents.

use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::backup::StepResult;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};

use crate::block_backup::{self, AddError, BlockHead, BlockReader};
use crate::calendar::{now_ms, stamp};
use crate::checksum::Crc;
use crate::error::{BackupError, StoreError};
use crate::failpoint;
use crate::faults::Faults;
use crate::files;
use crate::open::{connect, findings, load, try_reading};
use crate::retention;
use crate::rows::BlockRow;
use crate::schema::{self, SCHEMA_VERSION};
use crate::store::Store;
use crate::{BACKUPS, open::Contents};

/// Tables that only backups have; they are not restored.
pub(crate) const OWN_TABLES: [&str; 3] = ["backup_info", "block_files", "block_chunks"];

const TEMPORARY: &str = ".tmp-";

/// A finished backup, open for reading.
#[derive(Debug)]
pub struct Backup {
    path: PathBuf,
    conn: Connection,
}

/// The contents of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The schema of its records.
    pub schema: i64,
    /// When it was created, unix ms.
    pub made: i64,
    /// How many apps.
    pub apps: u64,
    /// How many pools.
    pub pools: u64,
    /// How many block records.
    pub blocks: u64,
    /// How many parked calls.
    pub calls: u64,
    /// How many stored answers.
    pub answers: u64,
    /// How many blocks with their bytes.
    pub block_files: u64,
    /// The total size of these blocks in bytes.
    pub block_bytes: u64,
}

/// Adds blocks to a backup in progress. Runs on the requesting thread; the store continues in the
/// meantime.
#[derive(Debug)]
pub struct BackupWriter<'b> {
    conn: &'b Connection,
    path: &'b Path,
    faults: &'b Faults,
}

impl Store {
    /// Makes a backup without the bytes of blocks, at `to` or as a new file in the directory of
    /// backups.
    pub fn backup(&self, to: Option<&Path>) -> Result<Backup, StoreError> {
        self.backup_with(to, |_| Ok(()))
    }

    /// Makes a backup to which `add` adds the bytes of blocks. For worker threads; never from
    /// `on_done`.
    pub fn backup_with(
        &self,
        to: Option<&Path>,
        add: impl FnOnce(&mut BackupWriter<'_>) -> Result<(), BackupError>,
    ) -> Result<Backup, StoreError> {
        let backups = self.dir().join(BACKUPS);
        let dir = to.map_or(backups.as_path(), files::parent);
        if let Some(to) = to
            && fs::symlink_metadata(to).is_ok()
        {
            return Err(BackupError::Exists {
                path: to.to_owned(),
            }
            .into());
        }
        let temporary = temporary(dir);
        let made = self.fill(&temporary, add).and_then(|()| match to {
            None => publish(&temporary, dir, "latzero", self.faults()),
            Some(to) => publish_as(&temporary, to, self.faults()).map(|()| to.to_owned()),
        });
        if made.is_err() {
            remove_temporary(&temporary);
        }
        let backup = open_backup(&made?)?;
        self.note_backup(now_ms());
        Ok(backup)
    }

    fn fill(
        &self,
        temporary: &Path,
        add: impl FnOnce(&mut BackupWriter<'_>) -> Result<(), BackupError>,
    ) -> Result<(), BackupError> {
        self.copy_to(temporary.to_owned())?;
        compact(temporary)?;
        failpoint::reached("backup.copied");
        let failed = |step| move |error| BackupError::sqlite(step, temporary, error);
        let conn = connect(temporary).map_err(failed("open"))?;
        unshare(&conn).map_err(failed("prepare"))?;
        block_backup::create_tables(&conn).map_err(failed("prepare"))?;
        let mut writer = BackupWriter {
            conn: &conn,
            path: temporary,
            faults: self.faults(),
        };
        add(&mut writer)?;
        drop(conn);
        finish(temporary, self.faults())
    }
}

impl BackupWriter<'_> {
    /// The block records in the backup, so that their bytes can be added.
    pub fn block_rows(&self) -> Result<Vec<BlockRow>, BackupError> {
        load(self.conn)
            .map(|contents| contents.blocks)
            .map_err(|error| BackupError::sqlite("read", self.path, error))
    }

    /// Adds one block: exactly `head.size` bytes. After an error the block is not in the backup;
    /// others may follow.
    pub fn add_block(&mut self, head: &BlockHead, bytes: &mut dyn Read) -> Result<(), BackupError> {
        let added = self.try_add(head, bytes);
        if !self.conn.is_autocommit() {
            let _ = self.conn.execute_batch("ROLLBACK");
        }
        added.map_err(|error| match error {
            AddError::Read(error) => BackupError::file("read a block for", self.path, error),
            AddError::Sqlite(error) => BackupError::sqlite("write a block to", self.path, error),
            AddError::Length(found) => BackupError::BlockLength {
                pool: head.pool.clone(),
                block_id: head.block_id.clone(),
                announced: head.size,
                found,
            },
        })
    }

    fn try_add(&self, head: &BlockHead, bytes: &mut dyn Read) -> Result<(), AddError> {
        self.faults
            .step("backup: a block")
            .map_err(rusqlite::Error::from)?;
        self.conn.execute_batch("BEGIN")?;
        block_backup::add(self.conn, head, bytes)?;
        Ok(self.conn.execute_batch("COMMIT")?)
    }
}

/// A backup's name for SQLite, so that files beside it (a log, a journal) are not read: a backup is
/// one file.
pub(crate) fn alone(path: &Path) -> Result<String, BackupError> {
    let absolute = std::path::absolute(path).map_err(|e| BackupError::file("find", path, e))?;
    // As in a URI (https://sqlite.org/uri.html): every byte that could mean something else there.
    let mut uri = "file:".to_owned();
    for &byte in absolute.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' => uri.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(byte)),
            byte => uri.push_str(&format!("%{byte:02x}")),
        }
    }
    Ok(uri + "?immutable=1")
}

/// Opens a backup for reading; [`Backup::verify`] checks it.
pub fn open_backup(path: &Path) -> Result<Backup, BackupError> {
    files::check_regular(path).map_err(|error| BackupError::file("open", path, error))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    let conn = Connection::open_with_flags(alone(path)?, flags)
        .map_err(|error| BackupError::sqlite("open", path, error))?;
    conn.execute_batch("PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON")
        .map_err(|error| BackupError::sqlite("open", path, error))?;
    let path = path.to_owned();
    Ok(Backup { path, conn })
}

impl Backup {
    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the whole file: structure, checksums of records and of blocks.
    pub fn verify(&self) -> Result<(), BackupError> {
        let found = self
            .find_faults()
            .unwrap_or_else(|error| vec![error.to_string()]);
        self.check(&found)?;
        self.summary()?;
        for head in self.blocks()? {
            self.read_block(&head)
                .and_then(|mut reader| io::copy(&mut reader, &mut io::sink()))
                .map_err(|error| self.bad(error.to_string()))?;
        }
        Ok(())
    }

    /// The blocks in it, by pool and name.
    pub fn blocks(&self) -> Result<Vec<BlockHead>, BackupError> {
        block_backup::heads(&self.conn).map_err(|error| self.bad(error.to_string()))
    }

    /// The bytes of one of its blocks.
    pub fn read_block(&self, head: &BlockHead) -> io::Result<BlockReader<'_>> {
        BlockReader::new(&self.conn, head).map_err(io::Error::other)
    }

    /// What it holds.
    pub fn summary(&self) -> Result<Summary, BackupError> {
        let count = |table: &str| -> rusqlite::Result<u64> {
            self.conn
                .query_row(&format!("SELECT count(*) FROM {table}"), [], |row| {
                    row.get::<_, i64>(0).map(i64::cast_unsigned)
                })
        };
        let summary = || -> rusqlite::Result<Summary> {
            let heads = block_backup::heads(&self.conn)?;
            Ok(Summary {
                schema: schema::user_version(&self.conn)?,
                made: info(&self.conn, "made")?,
                apps: count("app_registry")?,
                pools: count("pool_metadata")?,
                blocks: count("memory_blocks")?,
                calls: count("parked_calls")?,
                answers: count("parked_answers")?,
                block_files: heads.len() as u64,
                block_bytes: heads.iter().map(|head| head.size).sum(),
            })
        };
        summary().map_err(|error| self.bad(error.to_string()))
    }

    /// Its records; for a backup of this schema.
    pub fn contents(&self) -> Result<Contents, BackupError> {
        load(&self.conn).map_err(|error| self.bad(error.to_string()))
    }

    fn find_faults(&self) -> rusqlite::Result<Vec<String>> {
        if schema::application_id(&self.conn)? != i64::from(schema::APPLICATION_ID) {
            return Ok(vec!["it is not a LatZero database".into()]);
        }
        let version = schema::user_version(&self.conn)?;
        if !(1..=SCHEMA_VERSION).contains(&version) {
            return Ok(vec![format!(
                "it has schema {version}; this version supports 1 to {SCHEMA_VERSION}"
            )]);
        }
        if let Some(finding) = self.find_foreign(version)? {
            return Ok(vec![finding]);
        }
        if version == SCHEMA_VERSION {
            try_reading(&self.conn)?;
        }
        let found = findings(&self.conn, true)?;
        if !found.is_empty() {
            return Ok(found);
        }
        if info(&self.conn, "checksum")? != i64::from(checksum(&self.conn)?) {
            return Ok(vec!["the checksum of its records differs".into()]);
        }
        Ok(found)
    }

    /// Checks a backup for objects that a backup of this program does not have, before anything of
    /// it is used.
    fn find_foreign(&self, version: i64) -> rusqlite::Result<Option<String>> {
        let own = OWN_TABLES.map(|name| ("table".to_owned(), name.to_owned()));
        let known = schema::objects_of(version)?;
        let found = schema::objects(&self.conn)?;
        let missing = known.difference(&found).next();
        let foreign = found
            .iter()
            .find(|&object| !known.contains(object) && !own.contains(object));
        Ok(match (foreign, missing) {
            (Some((kind, name)), _) => Some(format!(
                "it has a {kind} '{name}', which a LatZero backup does not have"
            )),
            (None, Some((kind, name))) => Some(format!("its {kind} '{name}' is missing")),
            (None, None) => None,
        })
    }

    fn check(&self, found: &[String]) -> Result<(), BackupError> {
        if found.is_empty() {
            return Ok(());
        }
        Err(self.bad(found.join("; ")))
    }

    fn bad(&self, findings: String) -> BackupError {
        let path = self.path.clone();
        BackupError::Bad { path, findings }
    }
}

/// A name in `dir` that no other backup uses.
pub(crate) fn temporary(dir: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    dir.join(format!("{TEMPORARY}{}-{count}.db", std::process::id()))
}

pub(crate) fn remove_temporary(path: &Path) {
    for suffix in files::COMPANIONS {
        let _ = fs::remove_file(files::with_suffix(path, suffix));
    }
}

/// Removes incomplete files of a process that died, which were never backups.
pub(crate) fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Copies all pages of `from` to a new file, `pages` at a time; `between` runs after each step but
/// the last.
pub(crate) fn copy(
    from: &Connection,
    to: &Path,
    pages: i32,
    faults: &Faults,
    mut between: impl FnMut() -> Result<(), BackupError>,
) -> Result<(), BackupError> {
    let failed = |step| move |error: rusqlite::Error| BackupError::sqlite(step, to, error);
    let is_new = files::private_file(to).map_err(|e| BackupError::file("make", to, e))?;
    if !is_new {
        return Err(BackupError::Exists {
            path: to.to_owned(),
        });
    }
    let mut target = connect(to).map_err(failed("open"))?;
    // The copy is not used before it was checked and synced completely.
    target
        .execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
        .map_err(failed("prepare"))?;
    let backup =
        rusqlite::backup::Backup::new(from, &mut target).map_err(failed("begin copying to"))?;
    loop {
        faults
            .step("backup step")
            .map_err(|injected| failed("copy to")(injected.into()))?;
        let result = backup.step(pages).map_err(failed("copy to"))?;
        failpoint::reached("backup.step");
        if result == StepResult::Done {
            break;
        }
        between()?;
    }
    drop(backup);
    target
        .close()
        .map_err(|(_, error)| BackupError::sqlite("close", to, error))
}

/// Rewrites the copy without free pages, so that a backup contains no deleted data.
pub(crate) fn compact(copied: &Path) -> Result<(), BackupError> {
    let failed = |error| BackupError::sqlite("compact", copied, error);
    let mut name = copied.as_os_str().to_owned();
    name.push(".compact");
    let compact = PathBuf::from(name);
    let vacuum = || -> rusqlite::Result<()> {
        let conn = connect(copied)?;
        let target = compact
            .to_str()
            .ok_or(rusqlite::Error::InvalidPath(compact.clone()))?;
        conn.execute_batch("PRAGMA journal_mode = DELETE")?;
        conn.execute("VACUUM INTO ?1", [target]).map(drop)
    };
    let made = files::private_file(&compact)
        .map_err(|error| BackupError::file("make", &compact, error))
        .and_then(|_| vacuum().map_err(failed))
        .and_then(|()| {
            fs::rename(&compact, copied).map_err(|e| BackupError::file("name", copied, e))
        });
    if made.is_err() {
        let _ = fs::remove_file(&compact);
    }
    made
}

/// Makes the copy self-contained: a copy of a database in WAL mode would otherwise need a log
/// beside it.
fn unshare(conn: &Connection) -> rusqlite::Result<()> {
    conn.execute_batch(
        "PRAGMA journal_mode = DELETE; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF",
    )
}

/// Stores the checksum, checks the copy, and syncs it.
pub(crate) fn finish(temporary: &Path, faults: &Faults) -> Result<(), BackupError> {
    let failed = |step| move |error| BackupError::sqlite(step, temporary, error);
    let conn = connect(temporary).map_err(failed("open"))?;
    let complete = || -> rusqlite::Result<Vec<String>> {
        unshare(&conn)?;
        conn.execute_batch(
            "CREATE TABLE backup_info (key TEXT PRIMARY KEY NOT NULL, value INTEGER NOT NULL) \
             STRICT",
        )?;
        conn.execute(
            "INSERT INTO backup_info (key, value) VALUES ('made', ?1), ('checksum', ?2)",
            (now_ms(), checksum(&conn)?),
        )?;
        faults.step("backup: check")?;
        findings(&conn, false)
    };
    let found = complete().map_err(failed("check"))?;
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

/// Gives a finished backup the name `KIND-NUMBER-DATE-TIME.db` in `dir`, with the number after the
/// highest there. Numbers say which backup is the newest; dates are for people, since a clock may
/// be wrong.
pub(crate) fn publish(
    temporary: &Path,
    dir: &Path,
    kind: &str,
    faults: &Faults,
) -> Result<PathBuf, BackupError> {
    let mut number = retention::next_number(dir);
    loop {
        let path = dir.join(format!("{kind}-{number:06}-{}.db", stamp(now_ms())));
        match publish_as(temporary, &path, faults) {
            Err(BackupError::Exists { .. }) => number += 1,
            outcome => return outcome.map(|()| path),
        }
    }
}

fn publish_as(temporary: &Path, to: &Path, faults: &Faults) -> Result<(), BackupError> {
    failpoint::reached("backup.before_rename");
    files::rename_new(temporary, to, faults).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => BackupError::Exists {
            path: to.to_owned(),
        },
        _ => BackupError::file("name", to, error),
    })?;
    failpoint::reached("backup.after_rename");
    let dir = files::parent(to);
    files::sync_dir(dir, faults).map_err(|error| BackupError::file("sync", dir, error))
}

fn info(conn: &Connection, key: &str) -> rusqlite::Result<i64> {
    conn.query_row(
        "SELECT value FROM backup_info WHERE key = ?1",
        [key],
        |row| row.get(0),
    )
}

/// The checksum of every record: each table's name, each value's type, length and bytes.
fn checksum(conn: &Connection) -> rusqlite::Result<u32> {
    let tables: Vec<String> = conn
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")?
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    let mut crc = Crc::new();
    for table in tables {
        // Chunks are covered by their block's own checksum.
        if table == "backup_info" || table == "block_chunks" {
            continue;
        }
        crc.add(table.as_bytes());
        let mut statement = conn.prepare(&format!("SELECT * FROM \"{table}\" ORDER BY rowid"))?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            for column in 0..columns {
                add_value(&mut crc, row.get_ref(column)?);
            }
        }
    }
    Ok(crc.value())
}

fn add_value(crc: &mut Crc, value: ValueRef<'_>) {
    let mut sized = |kind: u8, bytes: &[u8]| {
        crc.add(&[kind]);
        crc.add(&(bytes.len() as u64).to_le_bytes());
        crc.add(bytes);
    };
    match value {
        ValueRef::Null => sized(0, &[]),
        ValueRef::Integer(number) => sized(1, &number.to_le_bytes()),
        ValueRef::Real(number) => sized(2, &number.to_le_bytes()),
        ValueRef::Text(bytes) => sized(3, bytes),
        ValueRef::Blob(bytes) => sized(4, bytes),
    }
}
