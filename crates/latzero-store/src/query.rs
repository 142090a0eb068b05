//! Queries of a database in SQL, and a dump as text. Both use a copy, so they block nothing and
//! cannot change anything.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};

use crate::backup;
use crate::error::{BackupError, StoreError};
use crate::files;
use crate::schema;
use crate::store::Store;

/// The limits of one query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueryLimits {
    /// Bytes of its text.
    pub sql_bytes_max: usize,
    /// Rows of its result.
    pub rows_max: usize,
    /// Bytes of its result.
    pub bytes_max: usize,
    /// Its running time.
    pub time_max: Duration,
}

impl Default for QueryLimits {
    fn default() -> Self {
        Self {
            sql_bytes_max: 64 << 10,
            rows_max: 10_000,
            bytes_max: 1 << 20,
            time_max: Duration::from_secs(5),
        }
    }
}

/// Most bytes of one value that SQLite creates during a query: a call's attachment and some more.
const VALUE_BYTES_MAX: i32 = 64 << 20;

/// How many steps SQLite runs between two checks of the time.
const STEPS_PER_LOOK: i32 = 10_000;

/// A value in a result.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// No value.
    Null,
    /// A whole number.
    Integer(i64),
    /// Another number.
    Real(f64),
    /// Text, in which invalid UTF-8 is replaced.
    Text(String),
    /// Bytes.
    Blob(Vec<u8>),
}

/// The result of a query.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The names of its columns.
    pub columns: Vec<String>,
    /// Its rows.
    pub rows: Vec<Vec<Value>>,
    /// Whether there are more rows than the limits allow.
    pub is_cut: bool,
}

impl Store {
    /// Runs one SELECT on the present database. Changes continue in the meantime. For worker
    /// threads.
    pub fn query(&self, sql: &str, limits: &QueryLimits) -> Result<Answer, StoreError> {
        let copy = backup::temporary(&self.dir().join(crate::BACKUPS));
        let answer = self
            .copy_to(copy.clone())
            .and_then(|()| query(&copy, sql, limits));
        backup::remove_temporary(&copy);
        Ok(answer?)
    }
}

/// Runs one SELECT on the database in `path`, which no other process may be using.
pub fn query(path: &Path, sql: &str, limits: &QueryLimits) -> Result<Answer, BackupError> {
    if sql.len() > limits.sql_bytes_max {
        return Err(BackupError::Query(format!(
            "it has {} bytes; the maximum is {}",
            sql.len(),
            limits.sql_bytes_max
        )));
    }
    let mut conn = open(path)?;
    let mut asked = || -> rusqlite::Result<Answer> {
        conn.set_limit(Limit::SQLITE_LIMIT_LENGTH, VALUE_BYTES_MAX)?;
        conn.set_limit(Limit::SQLITE_LIMIT_ATTACHED, 0)?;
        let end = Instant::now() + limits.time_max;
        conn.progress_handler(STEPS_PER_LOOK, Some(move || Instant::now() > end))?;
        conn.authorizer(Some(|context: AuthContext<'_>| match context.action {
            AuthAction::Select
            | AuthAction::Read { .. }
            | AuthAction::Function { .. }
            | AuthAction::Recursive => Authorization::Allow,
            _ => Authorization::Deny,
        }))?;
        answer(&conn, sql, limits)
    };
    asked().map_err(|error| {
        let is_late = error.sqlite_error_code() == Some(rusqlite::ErrorCode::OperationInterrupted);
        BackupError::Query(match is_late {
            true => format!("it took longer than {} s", limits.time_max.as_secs()),
            false => error.to_string(),
        })
    })
}

fn answer(conn: &Connection, sql: &str, limits: &QueryLimits) -> rusqlite::Result<Answer> {
    // One statement: what comes behind it is an error.
    let mut statement = conn.prepare(sql)?;
    let columns: Vec<String> = statement.column_names().map(Into::into).collect();
    let mut answer = Answer {
        rows: Vec::new(),
        is_cut: false,
        columns,
    };
    let mut bytes = 0;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let values: Vec<Value> = (0..answer.columns.len())
            .map(|column| row.get_ref(column).map(|value| value_of(value, &mut bytes)))
            .collect::<Result<_, _>>()?;
        if bytes > limits.bytes_max || answer.rows.len() == limits.rows_max {
            answer.is_cut = true;
            break;
        }
        answer.rows.push(values);
    }
    Ok(answer)
}

/// A value, whose bytes as text are added to `bytes`.
fn value_of(value: ValueRef<'_>, bytes: &mut usize) -> Value {
    *bytes += 24;
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(number) => Value::Integer(number),
        ValueRef::Real(number) => Value::Real(number),
        ValueRef::Text(text) => {
            // Where every byte must be escaped.
            *bytes += 6 * text.len();
            Value::Text(String::from_utf8_lossy(text).into_owned())
        }
        ValueRef::Blob(blob) => {
            *bytes += 2 * blob.len();
            Value::Blob(blob.to_vec())
        }
    }
}

/// Writes a database, or a backup, as SQL that recreates it, without the tables that only backups
/// have.
pub fn dump(path: &Path, out: &mut dyn Write) -> Result<(), BackupError> {
    let conn = open(path)?;
    let failed = |error| BackupError::sqlite("read", path, error);
    let written = |error| BackupError::file("write the text of", path, error);
    let version = schema::user_version(&conn).map_err(failed)?;
    let objects = schema::objects(&conn).map_err(failed)?;
    writeln!(out, "BEGIN;").map_err(written)?;
    let tables = objects
        .iter()
        .filter(|(kind, name)| kind == "table" && !backup::OWN_TABLES.contains(&name.as_str()));
    for (_, name) in tables {
        let sql: String = conn
            .query_row(
                "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ?1",
                [name],
                |row| row.get(0),
            )
            .map_err(failed)?;
        writeln!(out, "{sql};").map_err(written)?;
        dump_rows(&conn, name, out)?.map_err(written)?;
    }
    writeln!(
        out,
        "PRAGMA application_id = {}; PRAGMA user_version = {version};\nCOMMIT;",
        schema::APPLICATION_ID
    )
    .map_err(written)
}

fn dump_rows(
    conn: &Connection,
    table: &str,
    out: &mut dyn Write,
) -> Result<io::Result<()>, BackupError> {
    let failed = |error| BackupError::sqlite("read", Path::new(table), error);
    let quoted = table.replace('"', "\"\"");
    let columns = conn
        .prepare(&format!("SELECT * FROM \"{quoted}\""))
        .map(|statement| {
            let names = statement.column_names();
            let names: Vec<String> = names
                .map(|name| format!("quote(\"{}\")", name.replace('"', "\"\"")))
                .collect();
            names.join(" || ',' || ")
        })
        .map_err(failed)?;
    let mut statement = conn
        .prepare(&format!(
            "SELECT {columns} FROM \"{quoted}\" ORDER BY rowid"
        ))
        .map_err(failed)?;
    let mut rows = statement.query([]).map_err(failed)?;
    while let Some(row) = rows.next().map_err(failed)? {
        let values: String = row.get(0).map_err(failed)?;
        if let Err(error) = writeln!(out, "INSERT INTO \"{quoted}\" VALUES({values});") {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

/// Opens a file that nobody else uses, with its log if it has one, so that SQL cannot change it.
fn open(path: &Path) -> Result<Connection, BackupError> {
    files::check_regular(path).map_err(|error| BackupError::file("open", path, error))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let open = || -> rusqlite::Result<Connection> {
        let conn = Connection::open_with_flags(path, flags)?;
        conn.execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA trusted_schema = OFF;
             PRAGMA cell_size_check = ON; PRAGMA query_only = ON",
        )?;
        Ok(conn)
    };
    open().map_err(|error| BackupError::sqlite("open", path, error))
}
