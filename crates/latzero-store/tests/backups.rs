//! Backups: created while the store is working, read, restored, pruned.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{app, block, call, contents, options, reopen, set};
use latzero_store::{
    BACKUPS, BackupError, BlockHead, DATABASE, OpenError, Options, Policy, RowChange, StoreError,
    open, open_backup, prune, restore,
};

fn head(name: &str, size: u64) -> BlockHead {
    BlockHead {
        pool: "p".into(),
        block_id: name.into(),
        generation: 2,
        version: 7,
        size,
        slots: 1,
        description: vec![9, 8, 7],
    }
}

fn pattern(size: u64) -> Vec<u8> {
    (0..size).map(|i| (i * 31 % 251) as u8).collect()
}

fn no_blocks(_: BlockHead, _: &mut dyn Read) -> io::Result<()> {
    Ok(())
}

#[test]
fn a_backup_is_made_while_changes_continue() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _told) = options();
    let options = Options {
        backup_step_pages: 1,
        ..options
    };
    let store = open(dir.path(), options).unwrap().store;
    store
        .commit((0..500).map(|n| RowChange::PutCall(call(n))).collect())
        .unwrap();
    let is_done = AtomicBool::new(false);
    let (backup, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 1_000;
            while !is_done.load(Ordering::Relaxed) {
                store
                    .commit(vec![RowChange::PutCall(call(number))])
                    .unwrap();
                number += 1;
            }
            number
        });
        let backup = store.backup(None).unwrap();
        is_done.store(true, Ordering::Relaxed);
        (backup, writer.join().unwrap())
    });
    backup.verify().unwrap();
    // The copy is a consistent snapshot: it has no call without everything written before it.
    let numbers: Vec<_> = backup
        .contents()
        .unwrap()
        .calls
        .iter()
        .map(|c| c.number)
        .collect();
    assert_eq!(numbers[..500], (0..500).collect::<Vec<_>>());
    let later = &numbers[500..];
    assert_eq!(
        later,
        (1_000..1_000 + later.len() as u64).collect::<Vec<_>>()
    );
    assert!(written > 1_000);
    assert!(store.status().last_backup.is_some());
    store.close().unwrap();
    let names: Vec<_> = fs::read_dir(dir.path().join(BACKUPS)).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn blocks_are_backed_up_and_restored_completely() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store
        .commit(vec![
            RowChange::PutBlock(block("p", "b")),
            RowChange::PutApp(app("a")),
        ])
        .unwrap();
    let to = dir.path().join("elsewhere.db");
    let sizes = [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_000];
    let backup = store
        .backup_with(Some(&to), |writer| {
            assert_eq!(writer.block_rows()?, [block("p", "b")]);
            for size in sizes {
                writer.add_block(&head(&format!("b{size}"), size), &mut &pattern(size)[..])?;
            }
            // A block with too few or too many bytes is refused, and a failed backup leaves
            // nothing.
            for size in [2_000_000_u64, 2_000_002] {
                let error = writer
                    .add_block(&head("odd", size), &mut &pattern(2_000_001)[..])
                    .unwrap_err();
                assert!(matches!(error, BackupError::BlockLength { .. }), "{error}");
            }
            Ok(())
        })
        .unwrap();
    backup.verify().unwrap();
    let summary = backup.summary().unwrap();
    assert_eq!(
        (summary.apps, summary.blocks, summary.block_files),
        (1, 1, 6)
    );
    assert_eq!(summary.block_bytes, sizes.iter().sum::<u64>());
    let error = store.backup(Some(&to)).unwrap_err();
    assert!(error.to_string().contains("already exists"), "{error}");
    store.close().unwrap();

    let fresh = tempfile::tempdir().unwrap();
    let mut blocks = BTreeMap::new();
    let restored = restore(&to, fresh.path(), |head, bytes| {
        let mut all = Vec::new();
        bytes.read_to_end(&mut all)?;
        blocks.insert(head.size, (head, all));
        Ok(())
    })
    .unwrap();
    assert!(restored.set_aside.is_empty());
    for size in sizes {
        let (found, bytes) = &blocks[&size];
        assert_eq!(*found, head(&format!("b{size}"), size));
        assert!(*bytes == pattern(size));
    }
    let opened = reopen(fresh.path());
    assert_eq!(opened.report.checked, "quick");
    assert_eq!(opened.contents.blocks, [block("p", "b")]);
    // Block bytes are only in backups, so the database is small.
    assert!(opened.store.status().db_bytes < 200_000);
}

#[test]
fn a_damaged_backup_is_never_restored() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(vec![RowChange::PutApp(app("a"))]).unwrap();
    let backup = store
        .backup_with(None, |writer| {
            writer.add_block(&head("b", 50_000), &mut &pattern(50_000)[..])
        })
        .unwrap();
    store.close().unwrap();
    let good = fs::read(backup.path()).unwrap();
    let spoilt = dir.path().join("spoilt.db");
    let pages = good.len() / 4_096;
    let mut noticed = 0;
    for at in (0..pages).map(|page| page * 4_096 + 4_000) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        fs::write(&spoilt, &bytes).unwrap();
        let verified = open_backup(&spoilt).and_then(|backup| backup.verify());
        noticed += usize::from(verified.is_err());
        if verified.is_ok() {
            // Unused bytes may change without effect: the content is still the same.
            let backup = open_backup(&spoilt).unwrap();
            assert_eq!(backup.contents().unwrap().apps, [app("a")]);
        } else {
            let result = restore(&spoilt, dir.path(), no_blocks);
            assert!(matches!(result, Err(OpenError::Backup(_))), "{result:?}");
        }
    }
    // The block's bytes alone fill twelve pages.
    assert!(noticed >= 12, "{noticed} of {pages}");
    fs::write(&spoilt, &good[..good.len() - 4_096]).unwrap();
    assert!(
        open_backup(&spoilt)
            .and_then(|backup| backup.verify())
            .is_err()
    );
    assert_eq!(contents(dir.path()).apps, [app("a")]);
}

/// Backups of strangers: an extra trigger would run at each write, a log beside the file would take
/// the place of its content, and a pipe would never end.
#[test]
fn foreign_tables_in_a_backup_have_no_effect() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store
        .commit(vec![RowChange::PutApp(app("a")), set("k", "mine")])
        .unwrap();
    let backup = store.backup(None).unwrap();
    store.close().unwrap();
    let strange = |name: &str| {
        let path = dir.path().join(name);
        fs::copy(backup.path(), &path).unwrap();
        path
    };
    let into = |path: &Path| {
        let target = tempfile::tempdir().unwrap();
        restore(path, target.path(), no_blocks).map(|_| target)
    };

    let triggered = strange("trigger.db");
    let conn = rusqlite::Connection::open(&triggered).unwrap();
    conn.execute_batch(
        "CREATE TRIGGER strange AFTER INSERT ON server_config BEGIN
             DELETE FROM app_registry;
         END",
    )
    .unwrap();
    drop(conn);
    match into(&triggered) {
        Ok(target) => {
            let store = reopen(target.path()).store;
            store.commit(vec![set("k", "new")]).unwrap();
            store.close().unwrap();
            assert_eq!(contents(target.path()).apps, [app("a")], "the trigger ran");
        }
        Err(error) => assert!(matches!(error, OpenError::Backup(_)), "{error}"),
    }

    // The log of a writer that says something else, and never wrote it into the file.
    let logged = strange("logged.db");
    let conn = rusqlite::Connection::open(&logged).unwrap();
    conn.execute_batch("PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0")
        .unwrap();
    conn.execute(
        "UPDATE server_config SET value = 'forged' WHERE key = 'k'",
        [],
    )
    .unwrap();
    let log = fs::read(dir.path().join("logged.db-wal")).unwrap();
    assert!(!log.is_empty());
    let beside = strange("beside.db");
    fs::write(dir.path().join("beside.db-wal"), &log).unwrap();
    let target = into(&beside).unwrap();
    assert_eq!(contents(target.path()).settings[0].1, "mine");
    drop(conn);

    let pipe = dir.path().join("pipe.db");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    assert!(matches!(into(&pipe), Err(OpenError::Backup(_))));
}

#[test]
fn restoring_keeps_the_previous_database() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(vec![set("k", "old")]).unwrap();
    let backup = store.backup(None).unwrap();
    store.commit(vec![set("k", "new")]).unwrap();
    let error = restore(backup.path(), dir.path(), no_blocks).unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    store.close().unwrap();

    let refuse = |_: BlockHead, _: &mut dyn Read| Err(io::Error::other("no room"));
    let with_block = reopen(dir.path()).store;
    let other = with_block
        .backup_with(None, |writer| {
            writer.add_block(&head("b", 3), &mut &[1, 2, 3][..])
        })
        .unwrap();
    with_block.close().unwrap();
    let error = restore(other.path(), dir.path(), refuse).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    assert_eq!(contents(dir.path()).settings[0].1, "new");

    let restored = restore(backup.path(), dir.path(), no_blocks).unwrap();
    // The database and its companion files.
    let names = restored.set_aside.iter().map(|path| {
        let name = path.file_name().unwrap();
        name.to_string_lossy().into_owned()
    });
    let names: Vec<String> = names.collect();
    assert!(names[0].ends_with("-data.db"), "{names:?}");
    assert!(
        names.iter().all(|name| name.starts_with("replaced-")),
        "{names:?}"
    );
    assert_eq!(contents(dir.path()).settings[0].1, "old");
    assert!(!dir.path().join("data.db.next").exists());
}

#[test]
fn an_interrupted_restore_is_completed_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    store.commit(vec![set("k", "new")]).unwrap();
    store.close().unwrap();
    let other = tempfile::tempdir().unwrap();
    let store = reopen(other.path()).store;
    store.commit(vec![set("k", "restored")]).unwrap();
    store.close().unwrap();
    fs::copy(other.path().join(DATABASE), dir.path().join("data.db.next")).unwrap();
    let opened = reopen(dir.path());
    assert!(opened.report.is_degraded);
    assert_eq!(opened.contents.settings[0].1, "restored");
}

#[test]
fn a_failing_writer_leaves_no_backup() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let error = store
        .backup_with(None, |writer| {
            let error = io::Error::other("the block's file is gone");
            writer.add_block(&head("b", 1), &mut Failing(Some(error)))
        })
        .unwrap_err();
    assert!(matches!(error, StoreError::Backup(_)));
    assert!(
        error.to_string().contains("the block's file is gone"),
        "{error}"
    );
    assert_eq!(fs::read_dir(dir.path().join(BACKUPS)).unwrap().count(), 0);
    assert_eq!(store.status().last_backup, None);
    // The next run knows the last run's backup.
    store.backup(None).unwrap();
    let made = store.status().last_backup.unwrap();
    store.close().unwrap();
    let known = reopen(dir.path()).store.status().last_backup.unwrap();
    // Names have a resolution of one second.
    assert_eq!(known, made - made % 1000);
}

struct Failing(Option<io::Error>);

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(self
            .0
            .take()
            .unwrap_or_else(|| io::Error::other("read again")))
    }
}

fn names(paths: &[std::path::PathBuf]) -> Vec<String> {
    paths
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn pruning_keeps_the_newest_valid_backup() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let made = store.backup(None).unwrap().path().to_owned();
    let backups = dir.path().join(BACKUPS);
    let place = |name: &str| fs::copy(&made, backups.join(name)).unwrap();
    place("latzero-20200101-000000.db");
    place("latzero-20200102-000000.db");
    fs::write(backups.join("latzero-20200103-000000.db"), "spoilt").unwrap();
    fs::write(backups.join("mine.txt"), "not a backup").unwrap();
    fs::remove_file(&made).unwrap();
    let last_day = Policy {
        daily: 1,
        weekly: 1,
        min_free_bytes: 0,
        ..Policy::default()
    };
    let pruned = prune(dir.path(), &last_day).unwrap();
    // The newest by the rule, which is damaged, and the newest that is valid.
    assert_eq!(
        names(&pruned.kept),
        ["latzero-20200102-000000.db", "latzero-20200103-000000.db"]
    );
    assert_eq!(names(&pruned.removed), ["latzero-20200101-000000.db"]);
    assert!(backups.join("mine.txt").exists());

    place_new(
        &backups,
        &[
            "pre-migration-1-20200101-000000.db",
            "latzero-20300101-000000.db",
        ],
    );
    let full = Policy {
        min_free_bytes: u64::MAX,
        ..Policy::default()
    };
    let pruned = prune(dir.path(), &full).unwrap();
    assert_eq!(names(&pruned.kept), ["latzero-20300101-000000.db"]);

    fs::write(backups.join("latzero-20300101-000000.db"), "spoilt").unwrap();
    let pruned = prune(dir.path(), &full).unwrap();
    assert!(pruned.removed.is_empty() && pruned.kept.len() == 1);
}

fn place_new(backups: &Path, names: &[&str]) {
    for name in names {
        fs::copy(
            backups.join("latzero-20200102-000000.db"),
            backups.join(name),
        )
        .unwrap();
    }
}
