//! Kills the process, at failpoints and at random moments: every acknowledged change is there
//! afterwards.
//!
//! The test binary runs itself as the process that dies, and reads the acknowledgements from a
//! pipe.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{answer, app, call, options, reopen, set};
use latzero_store::{BACKUPS, Contents, RowChange, failpoint, open, open_backup, restore};

const DIR: &str = "LATZERO_STORE_KILL_DIR";
const MODE: &str = "LATZERO_STORE_KILL_MODE";

/// Not a test: the process that dies.
#[test]
fn child() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    match std::env::var(MODE).as_deref() {
        Ok("restore") => {
            let backup = dir.join("backup.db");
            restore(&backup, dir, |_, _| Ok(())).unwrap();
            tell("restored");
        }
        _ => work(dir),
    }
}

/// Prints with one write, so that a line is complete or absent.
fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\nack {line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn work(dir: &Path) {
    let (mut options, _) = options();
    options.on_done = Box::new(|done| {
        for (ticket, outcome) in done.drain(..) {
            if outcome.is_ok() {
                tell(&ticket.to_string());
            }
        }
    });
    let opened = open(dir, options).unwrap();
    let first = 1 + opened
        .contents
        .settings
        .iter()
        .find(|(key, _)| key == "next")
        .map_or(0, |(_, value)| value.parse().unwrap());
    for n in first..first + 40 {
        let name = format!("app-{n:06}");
        opened
            .store
            .submit(RowChange::PutApp(app(&name)), Some(n))
            .unwrap();
        let seen = RowChange::SeenApp {
            app_id: name,
            last_seen: 1_800_000_000_000,
        };
        opened.store.submit(seen, None).unwrap();
        // Both or neither: call n and the setting `next` are stored in one transaction.
        opened
            .store
            .commit(vec![
                RowChange::PutCall(call(n)),
                set("next", &n.to_string()),
            ])
            .unwrap();
        tell(&format!("call {n}"));
        let answered = RowChange::PutAnswer {
            answer: answer(n),
            ends_call: Some(n),
        };
        opened.store.submit(answered, None).unwrap();
        if n % 16 == 0 {
            let backup = opened.store.backup(None).unwrap();
            tell(&format!("backup {}", backup.path().display()));
        }
    }
    opened.store.close().unwrap();
    tell("closed");
}

/// Runs the child until it dies or ends, and kills it after `lines` lines. Returns what it printed.
fn run(dir: &Path, mode: &str, place: Option<(&str, u64)>, lines: usize) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(MODE, mode)
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some((name, pass)) = place {
        command.env("LATZERO_FAILPOINT", format!("{name}:{pass}"));
    }
    let mut child = command.spawn().unwrap();
    let mut printed = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some(line) = line.strip_prefix("ack ") {
            printed.push(line.to_owned());
        }
        if printed.len() == lines {
            // Lines that it printed before it died are still read.
            child.kill().unwrap();
        }
    }
    let status = child.wait().unwrap();
    // It must die of the signal or exit with success; a failed assertion is neither.
    assert!(
        status.success() || status.signal() == Some(9),
        "{status}, {printed:?}"
    );
    printed
}

fn check(contents: &Contents, printed: &[String], what: &str) {
    for line in printed {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["call", n] => {
                let n: u64 = n.parse().unwrap();
                let has_call = contents.calls.iter().any(|call| call.number == n);
                let has_answer = contents.answers.iter().any(|answer| answer.number == n);
                assert!(has_call ^ has_answer, "{what}: call {n}");
            }
            ["backup", path] => {
                open_backup(Path::new(path))
                    .and_then(|backup| backup.verify())
                    .unwrap();
            }
            ["closed" | "restored"] => {}
            [ticket] => {
                let name = format!("app-{:06}", ticket.parse::<u64>().unwrap());
                assert!(
                    contents.apps.iter().any(|app| app.app_id == name),
                    "{what}: {name}"
                );
            }
            _ => panic!("{what}: {line}"),
        }
    }
}

/// Opens the database that the dead process left, and checks everything that was printed.
fn reopened(dir: &Path, printed: &[String], what: &str) {
    let opened = reopen(dir);
    assert!(
        !opened.report.is_degraded,
        "{what}: {:?}",
        opened.report.texts
    );
    assert_eq!(
        opened.store.check(true).unwrap(),
        Vec::<String>::new(),
        "{what}"
    );
    check(&opened.contents, printed, what);
    for entry in std::fs::read_dir(dir.join(BACKUPS)).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        assert!(
            name.ends_with(".db") && !name.starts_with('.'),
            "{what}: {name} is left"
        );
    }
    drop(opened);
}

#[test]
fn a_crash_at_every_failpoint() {
    let is_crash = cfg!(debug_assertions);
    for name in failpoint::names()
        .iter()
        .filter(|name| !name.starts_with("restore."))
    {
        let dir = tempfile::tempdir().unwrap();
        let mut printed = Vec::new();
        for pass in [1, 2, 7] {
            let before = printed.len();
            printed.extend(run(dir.path(), "work", Some((name, pass)), usize::MAX));
            let is_once = ["checkpoint", "migrate"]
                .iter()
                .any(|part| name.contains(part));
            let is_rare = is_once && pass > 1 || name.starts_with("backup") && pass > 2;
            if is_crash && !is_rare {
                let ended = printed[before..].iter().any(|line| line == "closed");
                assert!(!ended, "{name}:{pass} is passed");
            }
            reopened(dir.path(), &printed, &format!("{name}:{pass}"));
        }
    }
}

#[test]
fn a_crash_at_random_times() {
    let dir = tempfile::tempdir().unwrap();
    let mut printed = Vec::new();
    let mut seed = u64::from(std::process::id()) | 1 << 40;
    for round in 0..24 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let lines = 1 + (seed >> 33) as usize % 60;
        printed.extend(run(dir.path(), "work", None, lines));
        reopened(
            dir.path(),
            &printed,
            &format!("round {round}, {lines} lines"),
        );
    }
    assert!(printed.len() > 24);
}

#[test]
fn restoring_may_fail_at_every_step() {
    for name in failpoint::names()
        .iter()
        .filter(|name| name.starts_with("restore."))
    {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path()).store;
        store.commit(vec![set("k", "restored")]).unwrap();
        store.backup(Some(&dir.path().join("backup.db"))).unwrap();
        store.commit(vec![set("k", "old")]).unwrap();
        store.close().unwrap();
        let printed = run(dir.path(), "restore", Some((name, 1)), usize::MAX);
        assert_eq!(printed.is_empty(), cfg!(debug_assertions), "{name}");
        let opened = reopen(dir.path());
        let expected = if printed.is_empty() && *name == "restore.built" {
            "old"
        } else {
            "restored"
        };
        assert_eq!(opened.contents.settings[0].1, expected, "{name}");
        assert_eq!(opened.store.check(true).unwrap(), Vec::<String>::new());
        assert!(!dir.path().join("data.db.next").exists());
    }
}
