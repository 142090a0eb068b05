//! Groups of changes: what is collected while the thread is busy, the limits, and the end of the
//! store.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::mpsc::{Receiver, Sender, channel};

use common::{TIMEOUT, app, block, contents, options, reopen, set};
use latzero_store::{
    Faults, Lasts, Options, RowChange, Store, StoreError, SubmitError, Ticket, open,
};

/// A store whose thread stops at the first ticket until it is released, and reports the number of
/// tickets of each notification.
struct Held {
    dir: tempfile::TempDir,
    store: Store,
    done: Receiver<Vec<Ticket>>,
    go: Sender<()>,
}

fn held(options: Options) -> Held {
    let dir = tempfile::tempdir().unwrap();
    let (tell, done) = channel();
    let (go, may_go) = channel::<()>();
    let options = Options {
        on_done: Box::new(move |done| {
            let tickets: Vec<_> = done.iter().map(|(ticket, _)| *ticket).collect();
            let is_first = tickets == [0];
            let _ = tell.send(tickets);
            if is_first {
                let _ = may_go.recv_timeout(TIMEOUT);
            }
        }),
        ..options
    };
    let store = open(dir.path(), options).unwrap().store;
    store.submit(set("first", "0"), Some(0)).unwrap();
    assert_eq!(done.recv_timeout(TIMEOUT).unwrap(), [0]);
    Held {
        dir,
        store,
        done,
        go,
    }
}

#[test]
fn batched_changes_share_one_transaction() {
    let held = held(options().0);
    for ticket in 1..=300 {
        held.store
            .submit(set("k", &ticket.to_string()), Some(ticket))
            .unwrap();
    }
    assert_eq!(held.store.status().waiting, 300);
    held.go.send(()).unwrap();
    assert_eq!(
        held.done.recv_timeout(TIMEOUT).unwrap(),
        (1..=256).collect::<Vec<_>>()
    );
    assert_eq!(
        held.done.recv_timeout(TIMEOUT).unwrap(),
        (257..=300).collect::<Vec<_>>()
    );
    let status = held.store.status();
    assert_eq!((status.commits, status.changes), (3, 301));
    assert!(status.wal_bytes > 0);
    held.store.close().unwrap();
    assert_eq!(contents(held.dir.path()).settings[1].1, "300");
}

#[test]
fn the_bounds_hold() {
    let held = held(Options {
        queue_max: 3,
        retained_max: 2,
        ..options().0
    });
    let submit = |change: RowChange, ticket| held.store.submit(change, ticket);
    for ticket in 1..=3 {
        submit(set("k", "promised"), Some(ticket)).unwrap();
    }
    let full = |what, max| Err(SubmitError::Full { what, max });
    assert_eq!(submit(set("k", "promised"), Some(4)), full("promised", 3));
    let error = held.store.commit(vec![set("k", "promised")]).unwrap_err();
    assert!(
        error.to_string().contains("the store's queue is full"),
        "{error}"
    );

    let seen = |last_seen| RowChange::SeenApp {
        app_id: "a".into(),
        last_seen,
    };
    submit(seen(1), None).unwrap();
    for n in 0..1_000 {
        submit(set("e", &n.to_string()), None).unwrap();
    }
    assert_eq!(
        (held.store.status().retained, held.store.status().dropped),
        (2, 0)
    );
    submit(set("f", "f"), None).unwrap();
    assert_eq!(
        (held.store.status().retained, held.store.status().dropped),
        (2, 1)
    );
    assert_eq!(submit(set("g", "g"), None), full("eventual", 2));
    held.go.send(()).unwrap();
    assert!(held.store.wait_settled(TIMEOUT));
    assert_eq!(held.store.status().changes, 1 + 3 + 2);
    held.store.close().unwrap();
    let kept = contents(held.dir.path()).settings;
    let value = |key: &str| {
        kept.iter()
            .find(|(name, _)| name == key)
            .map(|(_, v)| v.as_str())
    };
    assert_eq!(
        (value("e"), value("f"), value("g")),
        (Some("999"), Some("f"), None)
    );
}

#[test]
fn an_eventual_change_that_cannot_be_stored_is_dropped_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let store = reopen(dir.path()).store;
    let mut odd = block("p", "odd");
    odd.kind = "other".into();
    store.submit(RowChange::PutBlock(odd), None).unwrap();
    store.submit(RowChange::PutApp(app("a")), None).unwrap();
    assert!(store.wait_settled(TIMEOUT));
    assert_eq!(store.status().dropped, 1);
    store.close().unwrap();
    assert_eq!(contents(dir.path()).apps, [app("a")]);
}

#[test]
fn a_panic_of_the_thread_wakes_all_waiters() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        on_done: Box::new(|_| panic!("a panic made by the test")),
        ..options().0
    };
    let store = open(dir.path(), options).unwrap().store;
    store.submit(set("k", "v"), Some(1)).unwrap();
    // Whichever happens first, the change or the panic, this returns.
    let outcome = (0..1_000).find_map(|_| store.commit(vec![set("l", "v")]).err());
    assert_eq!(outcome, Some(StoreError::Submit(SubmitError::Closed)));
    assert!(!store.wait_settled(TIMEOUT) || store.status().waiting == 0);
    drop(store);
    assert_eq!(contents(dir.path()).settings[0].0, "k");
}

#[test]
fn closing_on_a_failing_disk_reports_an_error() {
    let dir = tempfile::tempdir().unwrap();
    reopen(dir.path()).store.close().unwrap();
    let options = Options {
        faults: Faults::at(1, Lasts::ForEver),
        ..options().0
    };
    let store = open(dir.path(), options).unwrap().store;
    store.submit(set("k", "v"), None).unwrap();
    let error = store.close().unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }), "{error}");
    assert!(error.to_string().contains("injected at begin"), "{error}");
    assert!(contents(dir.path()).settings.is_empty());
}

#[test]
fn the_store_recovers_from_disk_errors_automatically() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, done) = options();
    let faults = Faults::at(1, Lasts::ForEver);
    reopen(dir.path()).store.close().unwrap();
    let options = Options {
        faults: faults.clone(),
        ..plain
    };
    let store = open(dir.path(), options).unwrap().store;
    store.submit(set("k", "v"), Some(1)).unwrap();
    let (ticket, outcome) = done.recv_timeout(TIMEOUT).unwrap();
    assert_eq!(ticket, 1);
    assert!(
        matches!(outcome, Err(StoreError::Disk { .. })),
        "{outcome:?}"
    );
    let status = store.status();
    assert!(status.failing.is_some() && status.failing_since.is_some());
    faults.heal();
    assert!(store.wait_settled(TIMEOUT));
    assert_eq!(store.status().failing, None);
}
