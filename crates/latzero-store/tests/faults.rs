//! The N-th step of the store fails, once or from then on, for N = 1, 2, … until a run succeeds.
//!
//! After each run the database is opened again. Acknowledged changes are there, no change is there
//! in part, and eventual changes are there too if the disk had recovered.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::Receiver;

use common::{TIMEOUT, Told, answer, app, block, call, contents, options, pool, reopen, set};
use latzero_store::{Contents, Faults, Lasts, Options, RowChange, StoreError, open, restore_with};

/// More than the number of steps of the script.
const STEPS_MAX: u64 = 2_000;

/// The notifications of a run.
#[derive(Debug, Default)]
struct Record {
    outcomes: BTreeMap<u64, bool>,
    together: Option<bool>,
    is_closed_well: bool,
    has_backup: bool,
}

/// The durable changes, by ticket.
fn promises() -> Vec<RowChange> {
    vec![
        RowChange::PutApp(app("a")),
        RowChange::PutPool(pool("p")),
        RowChange::PutBlock(block("p", "b")),
        RowChange::PutCall(call(1)),
        RowChange::PutCall(call(2)),
        RowChange::PutAnswer {
            answer: answer(1),
            ends_call: Some(2),
        },
        set("promised", "yes"),
    ]
}

fn script(dir: &Path, faults: &Faults, lasts: Lasts) -> Option<Record> {
    let (plain, done) = options();
    let options = Options {
        group_max: 2,
        backup_step_pages: 2,
        faults: faults.clone(),
        ..plain
    };
    // A store that cannot be opened acknowledged nothing.
    let store = open(dir, options).ok()?.store;
    let mut record = Record::default();
    store.submit(set("eventual", "old"), None).unwrap();
    for (ticket, change) in (1..).zip(promises()) {
        store.submit(change, Some(ticket)).unwrap();
        if ticket % 2 == 0 {
            hear(&done, 2, &mut record);
        }
    }
    hear(&done, 1, &mut record);
    store.submit(set("eventual", "new"), None).unwrap();
    store
        .submit(
            RowChange::PutAnswer {
                answer: answer(9),
                ends_call: Some(1),
            },
            None,
        )
        .unwrap();
    let together = vec![RowChange::PutApp(app("x")), RowChange::PutApp(app("y"))];
    record.together = Some(store.commit(together).is_ok());
    record.has_backup = store.backup(None).is_ok();
    if lasts == Lasts::ForEver {
        if record.together == Some(false) {
            assert!(store.status().failing.is_some());
        }
        faults.heal();
    }
    // It retries automatically; no durable change is added in the meantime.
    assert!(store.wait_settled(TIMEOUT), "{:?}", store.status());
    record.is_closed_well = store.close().is_ok();
    Some(record)
}

fn hear(done: &Receiver<Told>, count: usize, record: &mut Record) {
    for _ in 0..count {
        let (ticket, outcome) = done
            .recv_timeout(TIMEOUT)
            .expect("every acknowledged change is reported");
        if let Err(error) = &outcome {
            assert!(matches!(error, StoreError::Disk { .. }), "{error}");
        }
        assert_eq!(record.outcomes.insert(ticket, outcome.is_ok()), None);
    }
}

fn check(dir: &Path, record: &Record, what: &str) {
    let kept = contents(dir);
    let is_there = |change: &RowChange| match change {
        RowChange::PutApp(row) => kept.apps.contains(row),
        RowChange::PutPool(row) => kept.pools.contains(row),
        RowChange::PutBlock(row) => kept.blocks.contains(row),
        // One call was ended by the eventual answer, the other by the durable one.
        RowChange::PutCall(row) => row.number == 1 || is_ended(&kept, row.number, record),
        RowChange::PutAnswer { answer, .. } => kept.answers.contains(answer),
        RowChange::PutSetting { key, value } => {
            kept.settings.contains(&(key.clone(), value.clone()))
        }
        _ => false,
    };
    for (ticket, change) in (1..).zip(promises()) {
        if record.outcomes[&ticket] {
            assert!(is_there(&change), "{what}: {change:?} was acknowledged");
        }
    }
    assert!(is_there(&set("eventual", "new")), "{what}: {kept:?}");
    assert!(kept.answers.contains(&answer(9)), "{what}: {kept:?}");
    assert!(!kept.calls.iter().any(|call| call.number == 1), "{what}");
    let (x, y) = (kept.apps.contains(&app("x")), kept.apps.contains(&app("y")));
    assert_eq!(x, y, "{what}: only one of two");
    if record.together == Some(true) {
        assert!(x, "{what}");
    }
}

/// Call 2 is there, or its answer is.
fn is_ended(kept: &Contents, number: u64, record: &Record) -> bool {
    let has_call = kept.calls.iter().any(|call| call.number == number);
    let has_answer = kept.answers.contains(&answer(1));
    assert!(!(has_call && has_answer && record.outcomes[&6]), "{kept:?}");
    has_call || has_answer
}

fn run_all(lasts: Lasts) {
    for at in 1..STEPS_MAX {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::at(at, lasts);
        let what = format!("step {at}, {lasts:?}");
        match script(dir.path(), &faults, lasts) {
            Some(record) => check(dir.path(), &record, &what),
            // Nothing was acknowledged; the next start finds no damage.
            None => drop(contents(dir.path())),
        }
        if faults.failed() == 0 {
            assert!(at > 30, "only {at} runs");
            return;
        }
    }
    panic!("no run without a failure in {STEPS_MAX} steps");
}

#[test]
fn any_step_may_fail_once() {
    run_all(Lasts::Once);
}

#[test]
fn every_step_after_the_nth_may_fail() {
    run_all(Lasts::ForEver);
}

/// Restoring fails at any step: the database is the old one or the new one, and the next start
/// completes it.
#[test]
fn restoring_may_fail_at_any_step() {
    let origin = tempfile::tempdir().unwrap();
    let store = reopen(origin.path()).store;
    store.commit(vec![set("k", "restored")]).unwrap();
    let backup = store.backup(None).unwrap().path().to_owned();
    store.close().unwrap();
    for at in 1..STEPS_MAX {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path()).store;
        store.commit(vec![set("k", "old")]).unwrap();
        store.close().unwrap();
        let faults = Faults::at(at, Lasts::ForEver);
        let restored = restore_with(&backup, dir.path(), |_, _| Ok(()), &faults);
        let opened = reopen(dir.path());
        let value = &opened.contents.settings[0].1;
        match &restored {
            Ok(_) => assert_eq!(value, "restored"),
            Err(_) => assert!(
                ["old", "restored"].contains(&value.as_str()),
                "step {at}: {value}"
            ),
        }
        assert_eq!(opened.store.check(true).unwrap(), Vec::<String>::new());
        if faults.failed() == 0 {
            assert!(restored.is_ok() && at > 5);
            return;
        }
    }
    panic!("no run without a failure in {STEPS_MAX} steps");
}

/// A damaged database, and a disk that fails while a backup replaces it.
#[test]
fn moving_aside_may_fail_at_any_step() {
    for at in 1..STEPS_MAX {
        let dir = tempfile::tempdir().unwrap();
        let store = reopen(dir.path()).store;
        store.commit(vec![set("k", "v")]).unwrap();
        store.backup(None).unwrap();
        store.close().unwrap();
        std::fs::write(dir.path().join("data.db"), "garbage".repeat(1_000)).unwrap();
        let faults = Faults::at(at, Lasts::ForEver);
        let options = Options {
            faults: faults.clone(),
            ..options().0
        };
        let first = open(dir.path(), options);
        let is_open = first.is_ok();
        drop(first);
        let opened = reopen(dir.path());
        assert_eq!(
            opened.contents.settings,
            [("k".to_owned(), "v".to_owned())],
            "step {at}"
        );
        if faults.failed() == 0 {
            assert!(is_open && at > 3);
            return;
        }
    }
    panic!("no run without a failure in {STEPS_MAX} steps");
}
