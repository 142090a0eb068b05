//! Backups of a running server: on request, and on a schedule.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use latzero_tests::site::{Site, Start};
use latzero_tests::{TIMEOUT, Wire};
use serde_json::{Value, json};

fn backups(site: &Site) -> Vec<PathBuf> {
    let files = std::fs::read_dir(site.data_dir().join("backups")).unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|e| e == "db"));
    files.sort();
    files
}

fn backup(wire: &mut Wire, to: Option<&Path>) -> Value {
    wire.request(json!({"action": "backup", "to": to}))
}

#[test]
fn a_backup_is_complete_and_is_written_to_the_given_path() {
    let site = Site::new();
    let server = site.start();
    let (mut wire, _) = server.app(json!({"app_id": "a", "pools": ["p"], "triggers": ["t"]}));
    wire.request(json!({"action": "pool_create", "pool": "d", "durable": true}));
    wire.request(json!({"action": "trigger", "process": "late", "park": true, "id": "1"}));
    wire.request(
        json!({"action": "memory_create", "block_id": "b", "size": 5000, "kind": "persistent"}),
    );
    wire.request(json!({"action": "memory_write", "block_id": "b", "data": "a2VwdA=="}));
    let made = backup(&mut wire, None)["response"].clone();
    assert_eq!(
        (
            &made["apps"],
            &made["pools"],
            &made["calls"],
            &made["blocks"],
            &made["block_bytes"]
        ),
        (&1.into(), &1.into(), &1.into(), &1.into(), &5000.into()),
        "{made}"
    );
    assert_eq!(backups(&site).len(), 1);
    let to = site.data_dir().join("logs/mine.db");
    let made = backup(&mut wire, Some(&to))["response"].clone();
    assert_eq!(made["file"], to.to_str().unwrap());
    assert!(to.exists());
    // An existing file is not overwritten, and the path must be absolute.
    assert_eq!(backup(&mut wire, Some(&to))["error"]["code"], "storage");
    assert_eq!(
        backup(&mut wire, Some(Path::new("x.db")))["error"]["code"],
        "bad_message"
    );
    let checked = wire.request(json!({"action": "db_check", "full": true}))["response"].clone();
    assert_eq!(
        (&checked["ok"], &checked["full"]),
        (&true.into(), &true.into())
    );
}

/// The name of a backup that was made this many days ago.
fn name_of(days_ago: u64) -> String {
    let then = SystemTime::now() - Duration::from_secs(days_ago * 24 * 3600);
    let seconds = then.duration_since(UNIX_EPOCH).unwrap().as_secs();
    let date = Command::new("date")
        .args(["-u", "-d", &format!("@{seconds}"), "+%Y%m%d-%H%M%S"])
        .output()
        .unwrap();
    let stamp = String::from_utf8(date.stdout).unwrap();
    format!("latzero-{}.db", stamp.trim())
}

#[test]
fn scheduled_backups_are_made_when_due_and_surplus_ones_are_deleted() {
    let site = Site::new();
    let server = site.start();
    let (mut wire, _) = server.app(json!({"app_id": "a"}));
    backup(&mut wire, None);
    assert!(server.stop().success());
    let first = backups(&site).remove(0);
    let named = |name: &str| first.with_file_name(name);
    let days: Vec<PathBuf> = (2..=9).map(|day| named(&name_of(day))).collect();
    let migrated = named("pre-migration-1-20200101-000000.db");
    for copy in days.iter().skip(1).chain([&migrated]) {
        std::fs::copy(&first, copy).unwrap();
    }
    std::fs::rename(&first, &days[0]).unwrap();
    let before: BTreeSet<PathBuf> = days.iter().chain([&migrated]).cloned().collect();
    // No backup is made if the interval is zero.
    let never = Start {
        settings: vec!["backup_interval=0".into()],
        ..Start::default()
    };
    let server = site.start_with(&never).unwrap();
    let (mut wire, _) = server.app(json!({"app_id": "b"}));
    let mut last_backup = || {
        let stats = wire.request(json!({"action": "stats"}));
        stats["response"]["store"]["last_backup"].as_u64().unwrap()
    };
    let known = last_backup();
    assert!(server.stop().success());
    assert_eq!(BTreeSet::from_iter(backups(&site)), before);
    let server = site.start();
    let begin = Instant::now();
    let (mut wire, _) = server.app(json!({"app_id": "c"}));
    let mut last_backup = || {
        let stats = wire.request(json!({"action": "stats"}));
        stats["response"]["store"]["last_backup"].as_u64().unwrap()
    };
    // Together with today's backup, the last seven days reach back to the seventh day before today.
    let too_many = &days[6..];
    let is_pruned = || too_many.iter().any(|backup| !backup.exists());
    while last_backup() == known || !is_pruned() {
        assert!(begin.elapsed() < TIMEOUT, "the backup failed");
    }
    assert!(server.stop().success());
    let after = BTreeSet::from_iter(backups(&site));
    // One of the deleted days may be the newest of its week.
    let gone: Vec<_> = before.difference(&after).collect();
    assert!(gone.iter().all(|gone| too_many.contains(gone)), "{gone:?}");
    let new: Vec<_> = after.difference(&before).collect();
    assert_eq!(new.len(), 1, "{new:?}");
}
