//! Backups that a running server makes: asked for, and by schedule.

#![allow(
    clippy::unwrap_used,
    reason = "a test that can't go on says where by panicking"
)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use latzero_tests::site::{Site, Start};
use latzero_tests::{PATIENCE, Wire};
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
fn a_backup_has_everything_and_goes_where_it_is_asked_to() {
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
    // What is there is not written over, and a place must be named whole.
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

#[test]
fn a_backup_is_made_when_the_last_one_is_old() {
    let site = Site::new();
    let server = site.start();
    let (mut wire, _) = server.app(json!({"app_id": "a"}));
    backup(&mut wire, None);
    assert!(server.stop().success());
    let first = backups(&site).remove(0);
    let two_days_ago = SystemTime::now() - Duration::from_secs(48 * 3600);
    File::options()
        .write(true)
        .open(&first)
        .unwrap()
        .set_modified(two_days_ago)
        .unwrap();
    // Not where nobody wants one.
    let never = Start {
        settings: vec!["backup_interval=0".into()],
        ..Start::default()
    };
    let server = site.start_with(&never).unwrap();
    server
        .app(json!({"app_id": "b"}))
        .0
        .request(json!({"action": "ping"}));
    assert!(server.stop().success());
    assert_eq!(backups(&site).len(), 1);
    let server = site.start();
    let begin = Instant::now();
    let (mut wire, _) = server.app(json!({"app_id": "c"}));
    while wire.request(json!({"action": "stats"}))["response"]["store"]["last_backup"].is_null() {
        assert!(begin.elapsed() < PATIENCE, "no backup was made");
    }
    assert!(server.stop().success());
    let after = backups(&site);
    assert!(after.iter().any(|file| *file != first), "{after:?}");
}
