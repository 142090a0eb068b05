//! Changes are stored as records, and records are read back unchanged.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{TIMEOUT, answer, app, block, call, contents, options, pool, reopen, set, settle};
use latzero_store::{AppRow, RowChange, StoreError, SubmitError, open};

#[test]
fn every_kind_of_record_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let (options, done) = options();
    let opened = open(dir.path(), options).unwrap();
    assert!(opened.report.is_new && !opened.report.is_degraded);
    let changes = [
        RowChange::PutApp(app("a")),
        RowChange::PutPool(pool("p")),
        RowChange::PutBlock(block("p", "b")),
        RowChange::PutCall(call(2)),
        RowChange::PutCall(call(1)),
        RowChange::PutAnswer {
            answer: answer(5),
            ends_call: Some(2),
        },
        set("k", "v"),
    ];
    for (ticket, change) in (1..).zip(changes) {
        opened.store.submit(change, Some(ticket)).unwrap();
    }
    for ticket in 1..=7 {
        assert_eq!(done.recv_timeout(TIMEOUT).unwrap(), (ticket, Ok(())));
    }
    opened.store.close().unwrap();

    let kept = contents(dir.path());
    assert_eq!(kept.apps, [app("a")]);
    assert_eq!(kept.pools, [pool("p")]);
    assert_eq!(kept.blocks, [block("p", "b")]);
    assert_eq!(kept.calls, [call(1)]);
    assert_eq!(kept.answers, [answer(5)]);
    assert_eq!(kept.settings, [("k".to_owned(), "v".to_owned())]);

    let opened = reopen(dir.path());
    let seen = |last_seen| RowChange::SeenApp {
        app_id: "a".into(),
        last_seen,
    };
    for change in [
        seen(1_800_000_000_000),
        RowChange::NoteAttempt {
            number: 1,
            attempt: 2,
        },
        RowChange::RemovePool { name: "p".into() },
        RowChange::RemoveBlock {
            pool: "p".into(),
            block_id: "b".into(),
        },
        RowChange::RemoveAnswer { number: 5 },
        set("k", "w"),
    ] {
        opened.store.submit(change, None).unwrap();
    }
    settle(&opened.store);
    opened.store.close().unwrap();

    let kept = contents(dir.path());
    assert_eq!(kept.apps[0].last_seen, 1_800_000_000_000);
    assert_eq!(kept.calls[0].attempt, 2);
    assert!(kept.pools.is_empty() && kept.blocks.is_empty() && kept.answers.is_empty());
    assert_eq!(kept.settings, [("k".to_owned(), "w".to_owned())]);
}

#[test]
fn an_invalid_change_does_not_delay_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let (options, done) = options();
    let opened = open(dir.path(), options).unwrap();
    let mut odd = block("p", "odd");
    odd.kind = "other".into();
    let mut large = block("p", "large");
    large.version = 1 << 63;
    let promises = [
        RowChange::PutApp(app("a")),
        RowChange::PutBlock(odd),
        RowChange::PutBlock(large),
        RowChange::PutAnswer {
            answer: answer(1),
            ends_call: Some(u64::MAX),
        },
        RowChange::PutApp(app("b")),
    ];
    for (ticket, change) in (1..).zip(promises) {
        opened.store.submit(change, Some(ticket)).unwrap();
    }
    for ticket in 1..=5 {
        let (number, outcome) = done.recv_timeout(TIMEOUT).unwrap();
        assert_eq!(number, ticket);
        match ticket {
            1 | 5 => outcome.unwrap(),
            _ => assert!(
                matches!(outcome, Err(StoreError::Refused { .. })),
                "{outcome:?}"
            ),
        }
    }
    let together = vec![
        RowChange::PutApp(app("c")),
        RowChange::RemoveCall { number: u64::MAX },
    ];
    let error = opened.store.commit(together).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot store call 18446744073709551615"),
        "{error}"
    );
    opened.store.close().unwrap();
    let kept = contents(dir.path());
    assert_eq!(kept.apps, [app("a"), app("b")]);
    assert!(kept.blocks.is_empty() && kept.answers.is_empty());
}

#[test]
fn a_closed_store_reports_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let opened = reopen(dir.path());
    let other = opened.store.clone();
    opened.store.close().unwrap();
    assert_eq!(other.submit(set("k", "v"), None), Err(SubmitError::Closed));
    let closed = StoreError::Submit(SubmitError::Closed);
    assert_eq!(other.commit(Vec::new()), Err(closed.clone()));
    assert_eq!(other.check(false), Err(closed.clone()));
    assert_eq!(other.close(), Err(closed));
}

#[test]
fn a_dropped_store_writes_queued_changes() {
    let dir = tempfile::tempdir().unwrap();
    let opened = reopen(dir.path());
    opened.store.submit(set("k", "v"), None).unwrap();
    drop(opened.store);
    let opened = reopen(dir.path());
    assert_eq!(opened.report.checked, "quick");
    assert_eq!(opened.contents.settings, [("k".to_owned(), "v".to_owned())]);
}

#[test]
fn a_small_change_of_a_large_row_is_a_small_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let log = dir.path().join("data.db-wal");
    let names = |n: usize| -> String {
        let names =
            (0..n).map(|n| format!("{{\"name\":\"t{n}\",\"doc\":\"ä{}\"}}", "d".repeat(1000)));
        format!("[{}]", names.collect::<Vec<_>>().join(","))
    };
    let large = |triggers: usize, last_seen: i64| {
        let triggers = names(triggers);
        RowChange::PutApp(AppRow {
            triggers,
            last_seen,
            ..common::app("a")
        })
    };
    let watches = |watches: &str| RowChange::AppWatches {
        app_id: "a".into(),
        watches: watches.into(),
    };
    let seen = |last_seen| RowChange::SeenApp {
        app_id: "a".into(),
        last_seen,
    };
    let time = 1_700_000_000_000;
    // The first change may make room.
    for change in [
        large(220, time),
        large(221, time),
        watches("[1]"),
        watches("[]"),
    ] {
        store.commit(vec![change]).unwrap();
    }
    let length = || std::fs::metadata(&log).unwrap().len();
    let cost = |change: RowChange| {
        let before = length();
        store.commit(vec![change]).unwrap();
        length() - before
    };
    for n in 0..10 {
        for change in [
            watches("[1,2,3,4,5,6,7,8]"),
            watches("[]"),
            seen(time + n),
            large(222, -(1 << 46)),
            large(221, time),
        ] {
            let what = format!("{change:?}");
            let cost = cost(change);
            assert!(cost < 40_000, "{cost} bytes for {}", &what[..60]);
        }
    }
    store.close().unwrap();
    let kept = contents(dir.path());
    assert_eq!(
        (kept.apps[0].watches.as_str(), &kept.apps[0].triggers),
        ("[]", &names(221))
    );
}
