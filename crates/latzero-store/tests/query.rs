//! Queries of a database, and its dump as text.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::time::Duration;

use common::{app, block, call, contents, reopen, set};
use latzero_store::{BACKUPS, DATABASE, QueryLimits, RowChange, Value, dump};

fn filled() -> (tempfile::TempDir, latzero_store::Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let changes = vec![
        RowChange::PutApp(app("a")),
        RowChange::PutApp(app("it's")),
        RowChange::PutBlock(block("p", "b")),
        RowChange::PutCall(call(7)),
        set("k", "v"),
    ];
    store.commit(changes).unwrap();
    (dir, store)
}

#[test]
fn a_running_store_answers_queries_and_continues() {
    let (dir, store) = filled();
    let limits = QueryLimits::default();
    let ask = |sql: &str| store.query(sql, &limits);
    let answer = ask("SELECT app_id, 1.5, NULL, x'00ff' FROM app_registry ORDER BY 1").unwrap();
    assert_eq!(answer.columns[0], "app_id");
    assert_eq!(
        answer.rows[1],
        [
            Value::Text("it's".into()),
            Value::Real(1.5),
            Value::Null,
            Value::Blob(vec![0, 255])
        ]
    );
    assert_eq!((answer.rows.len(), answer.is_cut), (2, false));
    let bad = [
        "",
        "nonsense",
        "DELETE FROM app_registry",
        "INSERT INTO store_state VALUES ('a', 'b')",
        "UPDATE store_state SET value = 'clean' RETURNING value",
        "DROP TABLE app_registry",
        "PRAGMA query_only = OFF",
        "PRAGMA journal_mode = DELETE",
        "ATTACH '/tmp/other.db' AS other",
        "VACUUM INTO '/tmp/other.db'",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "CREATE TEMP TABLE t (x)",
        "EXPLAIN DELETE FROM app_registry",
    ];
    for sql in bad {
        assert!(ask(sql).is_err(), "{sql}");
    }
    store.commit(vec![RowChange::PutApp(app("c"))]).unwrap();
    let count = ask("SELECT count(*) FROM app_registry").unwrap();
    assert_eq!(count.rows, [[Value::Integer(3)]]);
    let left = fs::read_dir(dir.path().join(BACKUPS)).unwrap().count();
    assert_eq!(left, 0, "no copy is left");
    store.close().unwrap();
    assert_eq!(contents(dir.path()).apps.len(), 3);
}

#[test]
fn a_query_is_bounded() {
    let (_dir, store) = filled();
    let limits = QueryLimits {
        rows_max: 2,
        bytes_max: 1000,
        time_max: Duration::from_millis(50),
        ..QueryLimits::default()
    };
    let numbers = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT";
    let ask = |sql: &str| store.query(sql, &limits);
    let answer = ask(&format!("{numbers} x FROM n")).unwrap();
    assert_eq!((answer.rows.len(), answer.is_cut), (2, true));
    let answer = ask("SELECT 'a' UNION ALL SELECT hex(zeroblob(400))").unwrap();
    assert_eq!((answer.rows.len(), answer.is_cut), (1, true));
    let error = ask(&format!("{numbers} max(x) FROM n"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("took longer"), "{error}");
    let error = ask("SELECT length(zeroblob(1000000000))")
        .unwrap_err()
        .to_string();
    assert!(error.contains("too big"), "{error}");
    let long = format!("SELECT 1 -- {}", "x".repeat(limits.sql_bytes_max));
    assert!(ask(&long).is_err());
}

#[test]
fn a_dump_recreates_the_database() {
    let (dir, store) = filled();
    let backup = store.backup(None).unwrap().path().to_owned();
    let before = store
        .query("SELECT * FROM app_registry", &QueryLimits::default())
        .unwrap();
    store.close().unwrap();
    let mut text = Vec::new();
    dump(&backup, &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("'it''s'"), "{text}");
    let again = tempfile::tempdir().unwrap();
    let conn = rusqlite::Connection::open(again.path().join(DATABASE)).unwrap();
    conn.execute_batch(&text).unwrap();
    conn.close().unwrap();
    assert_eq!(contents(again.path()), contents(dir.path()));
    let store = reopen(again.path()).store;
    let after = store
        .query("SELECT * FROM app_registry", &QueryLimits::default())
        .unwrap();
    assert_eq!(before, after);
}
