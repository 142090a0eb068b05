//! Shared by the tests of the store: rows, and a store that collects its notifications.
#![allow(dead_code, reason = "no test uses all of it")]

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use latzero_store::{
    AnswerRow, AppRow, BlockRow, CallRow, Contents, Opened, Options, PoolRow, RowChange, Store,
    StoreError, Ticket, open,
};

pub(crate) type Told = (Ticket, Result<(), StoreError>);

/// Longer than any step here takes; a test that waits this long fails.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) const BOOT: &str = "00000000-0000-4000-8000-000000000001";

/// Options whose notifications arrive in the channel.
pub(crate) fn options() -> (Options, Receiver<Told>) {
    let (tell, done) = channel();
    let options = Options {
        boot_id: BOOT.into(),
        retry_first: Duration::from_millis(1),
        retry_max: Duration::from_millis(4),
        on_done: Box::new(move |done| {
            for one in done.drain(..) {
                let _ = tell.send(one);
            }
        }),
        ..Options::default()
    };
    (options, done)
}

pub(crate) fn reopen(dir: &Path) -> Opened {
    open(dir, options().0).expect("the store opens")
}

/// The content of the database of `dir`, which no store has open.
pub(crate) fn contents(dir: &Path) -> Contents {
    let opened = reopen(dir);
    assert!(!opened.report.is_degraded, "{:?}", opened.report.texts);
    assert_eq!(
        opened.store.check(true).expect("a check"),
        Vec::<String>::new()
    );
    opened.store.close().expect("a clean end");
    opened.contents
}

/// Waits until no eventual change is queued: a commit queued after them completes after them.
pub(crate) fn settle(store: &Store) {
    store.commit(Vec::new()).expect("the store recovers");
}

pub(crate) fn app(name: &str) -> AppRow {
    AppRow {
        app_id: name.into(),
        pools: r#"["demo"]"#.into(),
        triggers: r#"[{"process":"add","pool":"demo"}]"#.into(),
        watches: "[]".into(),
        meta: Some(r#"{"language":"rust","note":"naïve ☃"}"#.into()),
        protocol_version: 1,
        registered: 1_700_000_000_000,
        last_seen: 1_700_000_000_001,
    }
}

pub(crate) fn pool(name: &str) -> PoolRow {
    PoolRow {
        name: name.into(),
        kind: "durable".into(),
        encrypted: true,
        owner: Some("app".into()),
        policy: Some("{}".into()),
        properties: None,
        descriptor: Some(vec![0, 1, 255]),
        created: 1,
        updated: 2,
    }
}

pub(crate) fn block(pool: &str, name: &str) -> BlockRow {
    BlockRow {
        pool: pool.into(),
        block_id: name.into(),
        kind: "shared".into(),
        size: i64::MAX as u64,
        slots: u32::MAX,
        layout: Some("f32[4]".into()),
        permissions: "{}".into(),
        owner: "app".into(),
        lifetime: "pool".into(),
        generation: 3,
        version: 4,
        fence: 5,
        boot_id: Some(BOOT.into()),
        dev: Some(u64::MAX),
        ino: Some(1 << 63),
        file: Some("0f".repeat(16)),
        created: -1,
        updated: i64::MAX,
        sealed: Some("{}".into()),
    }
}

pub(crate) fn call(number: u64) -> CallRow {
    CallRow {
        number,
        pool: "demo".into(),
        process: "add".into(),
        destination: None,
        caller: "app".into(),
        call_id: format!("call-{number}"),
        envelope: r#"{"process":"add"}"#.into(),
        attachment: Some(vec![7; 33]),
        idempotency_key: Some("once".into()),
        expires: 9,
        attempt: 0,
        parked: 8,
        died: None,
        cause: None,
    }
}

pub(crate) fn answer(number: u64) -> AnswerRow {
    AnswerRow {
        number,
        caller: "app".into(),
        call_id: format!("call-{number}"),
        pool: "demo".into(),
        idempotency_key: None,
        frame: vec![1, 2, 3],
        expires: 10,
        process: "work".into(),
    }
}

pub(crate) fn set(key: &str, value: &str) -> RowChange {
    RowChange::PutSetting {
        key: key.into(),
        value: value.into(),
    }
}
