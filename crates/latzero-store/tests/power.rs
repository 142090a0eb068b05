//! Power loss: data that was not synced is cut off, zeroed or random. Every acknowledged commit is
//! there afterwards.
//!
//! The kernel may have written any part of the data after the last fsync. So the files are copied
//! at each commit, with the length of the log that was synced, and each copy is damaged behind that
//! point in many ways.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::Path;

use common::{BOOT, app, call, options, reopen, set};
use latzero_store::{Contents, DATABASE, Options, RowChange, open};

const LOG: &str = "data.db-wal";

/// The files as they were after the `commits`-th commit.
struct Point {
    commits: usize,
    database: Vec<u8>,
    log: Vec<u8>,
}

fn point(dir: &Path, commits: usize) -> Point {
    Point {
        commits,
        database: fs::read(dir.join(DATABASE)).unwrap(),
        log: fs::read(dir.join(LOG)).unwrap_or_default(),
    }
}

fn changes(n: usize) -> Vec<RowChange> {
    let number = n as u64;
    vec![
        RowChange::PutApp(app(&format!("app-{n:03}"))),
        RowChange::PutCall(call(number)),
        set("last", &n.to_string()),
    ]
}

/// Opens a copy in another boot, as after a power loss; returns the number of complete commits.
fn commits_in(database: &[u8], log: &[u8]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(DATABASE), database).unwrap();
    fs::write(dir.path().join(LOG), log).unwrap();
    let options = Options {
        boot_id: "the boot after".into(),
        ..options().0
    };
    let opened = open(dir.path(), options).unwrap();
    assert!(!opened.report.is_degraded, "{:?}", opened.report.texts);
    assert_eq!(opened.report.checked, "full");
    let commits = whole_commits(&opened.contents);
    opened.store.close().unwrap();
    commits
}

fn whole_commits(contents: &Contents) -> usize {
    let count = contents.apps.len();
    assert_eq!(contents.calls.len(), count);
    let last = contents
        .settings
        .first()
        .map_or(0, |(_, value)| value.parse().unwrap());
    assert_eq!(last, count);
    count
}

#[test]
fn acknowledged_commits_survive_any_damage_to_later_data() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let mut points = Vec::new();
    for n in 1..=12 {
        store.commit(changes(n)).unwrap();
        points.push(point(dir.path(), n));
    }
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for pair in points.windows(2) {
        let [synced, later] = pair else {
            unreachable!("windows of two")
        };
        let from = synced.log.len();
        assert!(later.log.len() > from && later.log[..from] == synced.log);
        let tail = later.log.len() - from;
        // All of the database file belongs to the previous checkpoint, which is synced.
        for cut in [0, 1, 24, tail / 2, tail - 1, random() as usize % tail] {
            let found = commits_in(&later.database, &later.log[..from + cut]);
            assert_eq!(found, synced.commits, "cut at {cut} of {tail}");
        }
        for _ in 0..4 {
            // Some parts of the tail were written, others still have their previous bytes.
            let mut log = later.log.clone();
            let (a, b) = (random() as usize % tail, random() as usize % tail);
            let part = from + a.min(b)..from + a.max(b) + 1;
            for byte in &mut log[part] {
                *byte = if a % 2 == 0 { 0 } else { random() as u8 };
            }
            let found = commits_in(&later.database, &log);
            assert!((synced.commits..=later.commits).contains(&found), "{found}");
        }
        assert_eq!(commits_in(&later.database, &later.log), later.commits);
    }
}

/// After a checkpoint, the log starts again over old frames. Their content was synced to the
/// database before.
#[test]
fn a_new_log_does_not_restore_old_commits() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let mut highest = 0;
    let mut has_begun_anew = false;
    for n in 1..=16 {
        let mut all = changes(n);
        // A new letter each time, because SQLite does not write a page whose bytes stay the same.
        let letter = char::from(b'a' + n as u8).to_string();
        all.push(set("large", &letter.repeat(700_000)));
        store.commit(all).unwrap();
        let now = point(dir.path(), n);
        has_begun_anew |= n > 1 && now.log.len() == highest;
        highest = highest.max(now.log.len());
        let opened_at = commits_with_large(&now.database, &now.log);
        assert_eq!(opened_at, n);
    }
    assert!(has_begun_anew, "the script is long enough for a checkpoint");
}

fn commits_with_large(database: &[u8], log: &[u8]) -> usize {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(DATABASE), database).unwrap();
    fs::write(dir.path().join(LOG), log).unwrap();
    let options = Options {
        boot_id: BOOT.into(),
        ..options().0
    };
    let opened = open(dir.path(), options).unwrap();
    assert!(!opened.report.is_degraded, "{:?}", opened.report.texts);
    let mut contents = opened.contents;
    contents.settings.retain(|(key, _)| key == "last");
    whole_commits(&contents)
}
