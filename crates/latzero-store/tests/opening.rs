//! What happens when a database is opened: clean, damaged, missing or foreign.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{BOOT, app, contents, options, reopen, set};
use latzero_store::{
    APPLICATION_ID, BACKUPS, DATABASE, OpenError, Opened, Options, RowChange, SCHEMA_VERSION,
    library_version, open,
};
use rusqlite::Connection;

const FIXTURE_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn filled() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(vec![RowChange::PutApp(app("a"))]).unwrap();
    store.close().unwrap();
    dir
}

fn in_boot(dir: &Path, boot_id: &str) -> Opened {
    let options = Options {
        boot_id: boot_id.into(),
        ..options().0
    };
    open(dir, options).unwrap()
}

fn aside(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy();
            name.starts_with(prefix)
        })
        .collect();
    paths.sort();
    paths
}

#[test]
fn the_depth_of_the_check_depends_on_how_the_last_run_ended() {
    let dir = filled();
    let check = |opened: Opened, expected: &str| {
        assert_eq!(opened.report.checked, expected);
        assert!(!opened.report.is_degraded && !opened.report.is_new);
        opened
    };
    // A run without changes leaves the database clean, however it ends.
    drop(check(in_boot(dir.path(), BOOT), "none"));
    let opened = check(in_boot(dir.path(), BOOT), "none");
    opened.store.commit(vec![set("k", "v")]).unwrap();
    drop(opened);
    let opened = check(in_boot(dir.path(), BOOT), "quick");
    opened.store.close().unwrap();
    check(in_boot(dir.path(), BOOT), "none");
    check(in_boot(dir.path(), "another boot"), "full");
    check(in_boot(dir.path(), ""), "full");
}

#[test]
fn files_are_private() {
    let dir = filled();
    fs::set_permissions(dir.path().join(DATABASE), fs::Permissions::from_mode(0o644)).unwrap();
    let opened = reopen(dir.path());
    opened.store.commit(vec![set("k", "v")]).unwrap();
    let backup = opened.store.backup(None).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&dir.path().join(DATABASE)), 0o600);
    assert_eq!(mode(&dir.path().join("data.db-wal")), 0o600);
    assert_eq!(mode(backup.path()), 0o600);
    assert_eq!(mode(&dir.path().join(BACKUPS)), 0o700);
    assert!(!dir.path().join("data.db-shm").exists());
}

#[test]
fn a_database_in_use_cannot_be_opened_again() {
    let dir = filled();
    let opened = reopen(dir.path());
    let other = Connection::open(dir.path().join(DATABASE)).unwrap();
    other.busy_timeout(std::time::Duration::ZERO).unwrap();
    let error = other
        .query_row("SELECT count(*) FROM app_registry", [], |_| Ok(()))
        .unwrap_err();
    assert_eq!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseBusy)
    );
    drop(other);
    drop(opened);
}

#[test]
fn garbage_is_moved_aside_and_the_newest_valid_backup_restored() {
    type Spoil = fn(&Path);
    let spoils: [(&str, Spoil); 3] = [
        ("not a database", |path| {
            fs::write(path, "garbage".repeat(2_000)).unwrap()
        }),
        ("zeroed pages", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[4_096..].fill(0);
            fs::write(path, bytes).unwrap();
        }),
        ("cut short", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
    ];
    for (name, spoil) in spoils {
        let dir = filled();
        let opened = reopen(dir.path());
        let good = opened.store.backup(None).unwrap().path().to_owned();
        opened
            .store
            .commit(vec![RowChange::PutApp(app("b"))])
            .unwrap();
        let bad = opened.store.backup(None).unwrap().path().to_owned();
        opened.store.close().unwrap();
        let mut bytes = fs::read(&bad).unwrap();
        let text = bytes
            .windows(5)
            .position(|part| part == "naïve".as_bytes()[..5].as_ref());
        bytes[text.expect("the app's text is in the backup")] ^= 1;
        fs::write(&bad, bytes).unwrap();
        spoil(&dir.path().join(DATABASE));

        let opened = in_boot(dir.path(), "another boot");
        assert!(opened.report.is_degraded, "{name}");
        assert_eq!(
            opened.report.restored_from.as_deref(),
            Some(&*good),
            "{name}"
        );
        assert_eq!(opened.contents.apps, [app("a")], "{name}");
        assert_eq!(opened.report.texts.len(), 2, "{:?}", opened.report.texts);
        let kept = aside(dir.path(), "corrupt-");
        assert!(
            kept[0].to_string_lossy().ends_with("-data.db"),
            "{name}: {kept:?}"
        );
        opened.store.close().unwrap();
        let opened = reopen(dir.path());
        assert!(!opened.report.is_degraded);
        assert_eq!(opened.contents.apps, [app("a")]);
    }
}

#[test]
fn without_a_valid_backup_the_store_starts_empty_and_deletes_nothing() {
    let dir = filled();
    let garbage = "garbage".repeat(2_000);
    fs::write(dir.path().join(DATABASE), &garbage).unwrap();
    fs::write(dir.path().join("data.db-wal"), "a log").unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded && opened.report.is_new);
    assert!(opened.contents.apps.is_empty());
    let kept = aside(dir.path(), "corrupt-");
    assert_eq!(kept.len(), 2, "{kept:?}");
    assert_eq!(fs::read_to_string(&kept[0]).unwrap(), garbage);
    assert_eq!(fs::read_to_string(&kept[1]).unwrap(), "a log");
}

#[test]
fn a_log_without_its_database_is_kept_and_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("data.db-wal"), "a log").unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded && opened.report.is_new);
    assert_eq!(aside(dir.path(), "corrupt-").len(), 1);
}

#[test]
fn a_missing_database_with_backups_is_reported() {
    let dir = filled();
    let opened = reopen(dir.path());
    opened.store.backup(None).unwrap();
    opened.store.close().unwrap();
    fs::remove_file(dir.path().join(DATABASE)).unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded && opened.report.is_new);
    assert!(
        opened.report.texts[0].contains("restore"),
        "{:?}",
        opened.report.texts
    );
}

#[test]
fn newer_schemas_and_foreign_databases_are_refused_and_unchanged() {
    let dir = filled();
    let database = dir.path().join(DATABASE);
    let spoil = |pragma: String| Connection::open(&database).unwrap().execute_batch(&pragma);
    spoil(format!("PRAGMA user_version = {}", SCHEMA_VERSION + 1)).unwrap();
    let error = open(dir.path(), options().0).unwrap_err();
    assert!(matches!(error, OpenError::Newer { .. }), "{error}");
    assert!(
        error.to_string().contains("start the newer version"),
        "{error}"
    );
    spoil(format!(
        "PRAGMA user_version = {SCHEMA_VERSION}; PRAGMA application_id = 7"
    ))
    .unwrap();
    let error = open(dir.path(), options().0).unwrap_err();
    assert!(
        matches!(error, OpenError::Foreign { found: 7, .. }),
        "{error}"
    );
    spoil(format!("PRAGMA application_id = {APPLICATION_ID}")).unwrap();
    assert_eq!(contents(dir.path()).apps, [app("a")]);
    assert!(aside(dir.path(), "corrupt-").is_empty());
}

#[test]
fn an_unusable_directory_is_an_error_and_moves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let error = open(&dir.path().join("missing/deeper\0"), options().0).unwrap_err();
    assert!(matches!(error, OpenError::File { .. }), "{error}");
    fs::create_dir(dir.path().join(DATABASE)).unwrap();
    let error = open(dir.path(), options().0).unwrap_err();
    assert!(error.to_string().contains("data.db"), "{error}");
    assert!(aside(dir.path(), "corrupt-").is_empty());
}

/// Each released schema has a database here, made by `examples/make_fixture.rs` of that release.
#[test]
fn databases_of_every_schema_open() {
    for version in 1..=SCHEMA_VERSION {
        let dir = tempfile::tempdir().unwrap();
        let fixture = format!("{FIXTURE_DIR}/schema-{version}.db");
        fs::copy(&fixture, dir.path().join(DATABASE)).expect(&fixture);
        let opened = reopen(dir.path());
        assert!(!opened.report.is_degraded, "{:?}", opened.report.texts);
        assert_eq!(opened.report.checked, "full");
        let migrated = (version < SCHEMA_VERSION).then_some(version);
        assert_eq!(opened.report.migrated_from, migrated);
        let kept = opened.contents;
        assert_eq!(kept.apps.len(), 2);
        assert_eq!(kept.pools.len(), 1);
        assert_eq!(kept.blocks.len(), 1);
        assert_eq!(kept.blocks[0].ino, Some(u64::MAX));
        assert_eq!(
            kept.calls
                .iter()
                .map(|call| call.number)
                .collect::<Vec<_>>(),
            [1, 3]
        );
        assert_eq!(kept.answers.len(), 1);
        let process = if version < 5 { "" } else { "work" };
        assert_eq!(kept.answers[0].process, process);
        assert_eq!(kept.settings, [("node".to_owned(), "first".to_owned())]);
        opened.store.close().unwrap();
        contents(dir.path());
    }
}

#[test]
fn the_sqlite_version_is_recent_enough() {
    assert!(
        rusqlite::version_number() >= 3_051_003,
        "{}",
        library_version()
    );
}

fn older(dir: &Path, script: &str) {
    let conn = Connection::open(dir.join(DATABASE)).unwrap();
    let ours = format!("PRAGMA application_id = {APPLICATION_ID}; {script}");
    conn.execute_batch(&ours).unwrap();
}

#[test]
fn an_older_schema_is_backed_up_and_then_migrated() {
    let dir = tempfile::tempdir().unwrap();
    older(
        dir.path(),
        "CREATE TABLE before (x); INSERT INTO before VALUES (42)",
    );
    let opened = reopen(dir.path());
    assert_eq!(opened.report.migrated_from, Some(0));
    assert!(!opened.report.is_degraded, "{:?}", opened.report.texts);
    opened
        .store
        .commit(vec![RowChange::PutApp(app("a"))])
        .unwrap();
    opened.store.close().unwrap();
    assert_eq!(reopen(dir.path()).report.migrated_from, None);

    let backups = aside(&dir.path().join(BACKUPS), "pre-migration-0-");
    assert_eq!(backups.len(), 1);
    let before = Connection::open(&backups[0]).unwrap();
    let kept: i64 = before
        .query_row("SELECT x FROM before", [], |row| row.get(0))
        .unwrap();
    assert_eq!(kept, 42);
}

#[test]
fn a_migration_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    older(dir.path(), "CREATE TABLE parked_answers (x)");
    for _ in 0..2 {
        let error = open(dir.path(), options().0).unwrap_err();
        assert!(error.to_string().contains("cannot migrate"), "{error}");
    }
    let conn = Connection::open(dir.path().join(DATABASE)).unwrap();
    let tables: i64 = conn
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .unwrap();
    assert_eq!(tables, 1);
    assert!(aside(dir.path(), "corrupt-").is_empty());
}
