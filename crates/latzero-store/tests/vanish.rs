//! Files that disappear while the store is running or between two runs, and foreign files that
//! replace them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{TIMEOUT, app, call, contents, options, reopen};
use latzero_store::{
    BACKUPS, BackupError, DATABASE, OpenError, Options, RowChange, Store, StoreError, open,
    open_backup, restore,
};
use rusqlite::Connection;

const LOG: &str = "data.db-wal";
const MARK: &str = "data.db.mark";

fn put(name: &str) -> Vec<RowChange> {
    vec![RowChange::PutApp(app(name))]
}

/// A store that recreates missing files immediately.
fn quick(dir: &Path) -> Store {
    let options = Options {
        rebuild_after: Duration::ZERO,
        ..options().0
    };
    open(dir, options).unwrap().store
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

fn apps(dir: &Path) -> Vec<String> {
    let mut apps: Vec<_> = contents(dir)
        .apps
        .into_iter()
        .map(|app| app.app_id)
        .collect();
    apps.sort();
    apps
}

#[test]
fn removed_files_are_recreated_and_nothing_is_lost() {
    for gone in [vec![DATABASE], vec![LOG], vec![DATABASE, LOG, MARK]] {
        let dir = tempfile::tempdir().unwrap();
        let store = quick(dir.path());
        store.commit(put("a")).unwrap();
        for name in &gone {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        // Also when no change waits to be written.
        store.check_files();
        until("it is recreated", || {
            let status = store.status();
            status.misplaced.is_none() && status.rebuilt == 1
        });
        store.commit(put("b")).unwrap();
        // A copy as a crash would leave it.
        let copy = tempfile::tempdir().unwrap();
        for name in [DATABASE, LOG, MARK] {
            fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
        }
        assert_eq!(apps(copy.path()), ["a", "b"], "{gone:?}");
        fs::remove_file(dir.path().join(DATABASE)).unwrap();
        store.close().unwrap();
        assert_eq!(apps(dir.path()), ["a", "b"], "{gone:?}");
    }
}

#[test]
fn a_foreign_file_in_its_place_is_moved_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = quick(dir.path());
    store.commit(put("a")).unwrap();
    fs::remove_file(dir.path().join(DATABASE)).unwrap();
    fs::write(dir.path().join(DATABASE), "another").unwrap();
    store.check_files();
    until("it is recreated", || store.status().rebuilt == 1);
    store.close().unwrap();
    assert_eq!(apps(dir.path()), ["a"]);
    let aside = fs::read_dir(dir.path()).unwrap().flatten().find(|entry| {
        let name = entry.file_name().into_string().unwrap();
        name.starts_with("replaced-") && name.ends_with(DATABASE)
    });
    assert_eq!(fs::read(aside.unwrap().path()).unwrap(), b"another");
}

#[test]
fn acknowledged_changes_fail_while_the_directory_is_missing() {
    let home = tempfile::tempdir().unwrap();
    let (dir, moved) = (home.path().join("data"), home.path().join("moved"));
    fs::create_dir(&dir).unwrap();
    let store = quick(&dir);
    store.commit(put("a")).unwrap();
    fs::rename(&dir, &moved).unwrap();
    let error = store.commit(put("b")).unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }), "{error}");
    assert!(
        error.to_string().contains("move the data directory back"),
        "{error}"
    );
    assert!(store.status().misplaced.is_some());
    // Another directory at the same path is not accepted.
    fs::create_dir(&dir).unwrap();
    assert!(store.commit(put("c")).is_err());
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    fs::remove_dir(&dir).unwrap();
    fs::rename(&moved, &dir).unwrap();
    store.commit(put("d")).unwrap();
    assert_eq!(store.status().misplaced, None);
    store.close().unwrap();
    assert_eq!(apps(&dir), ["a", "d"]);
}

#[test]
fn a_lost_log_is_reported() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 4] = [
        ("removed", |log| fs::remove_file(log).unwrap()),
        ("emptied", |log| fs::write(log, "").unwrap()),
        ("cut", |log| {
            let bytes = fs::read(log).unwrap();
            fs::write(log, &bytes[..bytes.len() - 10]).unwrap();
        }),
        ("damaged", |log| {
            let mut bytes = fs::read(log).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(log, bytes).unwrap();
        }),
    ];
    for (name, spoil) in spoils {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path()).store;
        for n in 0..20 {
            store.commit(put(&format!("app-{n}"))).unwrap();
        }
        // As after a kill: neither the log nor the mark of a clean end is updated.
        let copy = tempfile::tempdir().unwrap();
        for file in [DATABASE, LOG, MARK] {
            fs::copy(dir.path().join(file), copy.path().join(file)).unwrap();
        }
        assert_eq!(contents(copy.path()).apps.len(), 20);
        for file in [DATABASE, LOG, MARK] {
            fs::copy(dir.path().join(file), copy.path().join(file)).unwrap();
        }
        spoil(&copy.path().join(LOG));
        let opened = reopen(copy.path());
        assert!(opened.report.is_degraded, "{name}");
        let texts = opened.report.texts.join("; ");
        assert!(texts.contains("missing"), "{name}: {texts}");
        opened.store.commit(put("later")).unwrap();
        opened.store.close().unwrap();
        let again = reopen(copy.path());
        assert!(
            !again.report.is_degraded,
            "{name}: {:?}",
            again.report.texts
        );
    }
}

#[test]
fn an_older_copy_of_the_database_is_detected() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join(DATABASE);
    let run = |name: &str| {
        let store = reopen(dir.path()).store;
        store.commit(put(name)).unwrap();
        store.close().unwrap();
    };
    run("a");
    let older = fs::read(&database).unwrap();
    run("b");
    fs::write(&database, older).unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded);
    assert!(
        opened.report.texts[0].contains("the last 2 changes"),
        "{:?}",
        opened.report.texts
    );
    opened.store.close().unwrap();
    fs::remove_file(&database).unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded && opened.report.is_new);
}

#[test]
fn a_restored_database_restarts_its_commit_count() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(put("a")).unwrap();
    let backup = store.backup(None).unwrap().path().to_owned();
    for n in 0..9 {
        store.commit(put(&format!("b{n}"))).unwrap();
    }
    store.close().unwrap();
    restore(&backup, dir.path(), |_, _| Ok(())).unwrap();
    assert_eq!(apps(dir.path()), ["a"]);
}

/// A directory in which `data.db` is a link to another directory.
fn linked() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let (dir, disk) = (home.path().join("data"), home.path().join("disk"));
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&disk).unwrap();
    fs::write(disk.join("lz.db"), "").unwrap();
    symlink(disk.join("lz.db"), dir.join(DATABASE)).unwrap();
    (home, dir, disk)
}

#[test]
fn a_linked_database_stays_linked() {
    let (_home, dir, disk) = linked();
    let is_link = || {
        fs::symlink_metadata(dir.join(DATABASE))
            .unwrap()
            .is_symlink()
    };
    let store = quick(&dir);
    store.commit(put("a")).unwrap();
    let backup = store.backup(None).unwrap().path().to_owned();
    store.commit(put("b")).unwrap();
    fs::remove_file(disk.join("lz.db")).unwrap();
    store.check_files();
    until("it is recreated", || store.status().rebuilt == 1);
    store.close().unwrap();
    assert!(is_link());
    assert_eq!(apps(&dir), ["a", "b"]);
    let restored = restore(&backup, &dir, |_, _| Ok(())).unwrap();
    assert!(is_link() && restored.set_aside[0].starts_with(disk.canonicalize().unwrap()));
    assert_eq!(apps(&dir), ["a"]);
    // A damaged database is moved aside in the directory where it is.
    fs::write(disk.join("lz.db"), "garbage".repeat(1000)).unwrap();
    let opened = reopen(&dir);
    assert_eq!(opened.report.restored_from.as_deref(), Some(&*backup));
    drop(opened);
    assert!(is_link());
    fs::remove_file(disk.join("lz.db")).unwrap();
    let error = open(&dir, options().0).unwrap_err();
    assert!(matches!(error, OpenError::File { .. }), "{error}");
    assert!(restore(&backup, &dir, |_, _| Ok(())).is_err());
}

#[test]
fn pipes_do_not_block_a_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(put("a")).unwrap();
    store.close().unwrap();
    let pipe = |path: &Path| {
        let mode = rustix::fs::Mode::from(0o600);
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, 0).unwrap();
    };
    for name in [LOG, "data.db-journal", "data.db-shm"] {
        pipe(&dir.path().join(name));
        let error = open(dir.path(), options().0).unwrap_err();
        assert!(
            error.to_string().contains("regular file"),
            "{name}: {error}"
        );
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    // A start does not wait for files that it does not need.
    let backup = dir
        .path()
        .join(BACKUPS)
        .join("latzero-000007-20260102-030405.db");
    pipe(&backup);
    fs::remove_file(dir.path().join(MARK)).unwrap();
    pipe(&dir.path().join(MARK));
    assert_eq!(apps(dir.path()), ["a"]);
    assert!(open_backup(&backup).is_err());
    fs::remove_file(dir.path().join(DATABASE)).unwrap();
    pipe(&dir.path().join(DATABASE));
    assert!(open(dir.path(), options().0).is_err());
}

#[test]
fn foreign_triggers_and_views_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(put("a")).unwrap();
    store.close().unwrap();
    let conn = Connection::open(dir.path().join(DATABASE)).unwrap();
    conn.execute_batch(
        "CREATE TRIGGER \"odd \"\" name\" AFTER INSERT ON app_registry BEGIN
             DELETE FROM app_registry; END;
         CREATE VIEW v AS SELECT 1;
         CREATE INDEX i ON app_registry (meta)",
    )
    .unwrap();
    conn.close().unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded);
    assert_eq!(opened.report.texts.len(), 3, "{:?}", opened.report.texts);
    opened.store.commit(put("b")).unwrap();
    opened.store.close().unwrap();
    assert_eq!(apps(dir.path()), ["a", "b"]);
}

#[test]
fn a_backup_is_one_file_with_exactly_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(put("a")).unwrap();
    let good = store.backup(None).unwrap().path().to_owned();
    store.close().unwrap();
    let foreign = [
        "CREATE TRIGGER t AFTER INSERT ON app_registry BEGIN SELECT 1; END",
        "CREATE VIEW v AS SELECT 1",
        "CREATE INDEX i ON app_registry (meta)",
        "CREATE TABLE t (x)",
        "CREATE VIRTUAL TABLE t USING dbstat",
        "DROP TABLE parked_calls",
        "DROP TABLE parked_calls; CREATE VIEW parked_calls AS SELECT * FROM app_registry",
    ];
    for (n, sql) in foreign.into_iter().enumerate() {
        let bad = dir.path().join(format!("bad-{n}.db"));
        fs::copy(&good, &bad).unwrap();
        let conn = Connection::open(&bad).unwrap();
        if conn.execute_batch(sql).is_err() {
            // This library lacks the module.
            continue;
        }
        conn.close().unwrap();
        let error = open_backup(&bad).unwrap().verify().unwrap_err();
        assert!(matches!(error, BackupError::Bad { .. }), "{sql}: {error}");
        assert!(restore(&bad, dir.path(), |_, _| Ok(())).is_err(), "{sql}");
        assert_eq!(apps(dir.path()), ["a"]);
    }
    // A log next to it that would change it.
    let (odd, work) = (dir.path().join("odd %3f#?'.db"), dir.path().join("work.db"));
    fs::copy(&good, &odd).unwrap();
    fs::copy(&good, &work).unwrap();
    let conn = Connection::open(&work).unwrap();
    conn.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; DELETE FROM app_registry",
    )
    .unwrap();
    for companion in ["-wal", "-shm"] {
        let beside = format!("odd %3f#?'.db{companion}");
        fs::copy(
            dir.path().join(format!("work.db{companion}")),
            dir.path().join(beside),
        )
        .unwrap();
    }
    drop(conn);
    open_backup(&odd).unwrap().verify().unwrap();
    restore(&odd, dir.path(), |_, _| Ok(())).unwrap();
    assert_eq!(apps(dir.path()), ["a"]);
}

#[test]
fn deleted_data_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let mut row = call(1);
    row.envelope = format!("{{\"data\":\"CARD-NUMBER{}\"}}", "x".repeat(400));
    for number in 1..50 {
        row.number = number;
        store.commit(vec![RowChange::PutCall(row.clone())]).unwrap();
    }
    for number in 1..50 {
        store
            .commit(vec![RowChange::RemoveCall { number }])
            .unwrap();
    }
    let backup = store.backup(None).unwrap().path().to_owned();
    store.close().unwrap();
    for file in [backup, dir.path().join(DATABASE)] {
        let bytes = fs::read(&file).unwrap();
        let is_there = bytes.windows(11).any(|part| part == b"CARD-NUMBER");
        assert!(!is_there, "{}", file.display());
    }
}
