//! Writes a database of the current schema to the path in the first argument: the fixture that
//! later releases must open.
//!
//! `cargo run -p latzero-store --example make_fixture --
//! crates/latzero-store/tests/fixtures/schema-1.db`, once per schema.

use std::error::Error;
use std::path::PathBuf;

use latzero_store::{AnswerRow, AppRow, BlockRow, CallRow, Options, PoolRow, RowChange, open};

fn main() -> Result<(), Box<dyn Error>> {
    let target = PathBuf::from(std::env::args_os().nth(1).ok_or("name the file to write")?);
    let dir = tempfile::tempdir()?;
    let options = Options {
        boot_id: "the boot of the fixture".into(),
        ..Options::default()
    };
    let store = open(dir.path(), options)?.store;
    store.commit(changes())?;
    store.close()?;
    std::fs::copy(dir.path().join(latzero_store::DATABASE), target)?;
    Ok(())
}

fn changes() -> Vec<RowChange> {
    let app = |app_id: &str, meta: Option<&str>| {
        RowChange::PutApp(AppRow {
            app_id: app_id.into(),
            pools: r#"["demo"]"#.into(),
            triggers: r#"[{"process":"add"}]"#.into(),
            watches: "[]".into(),
            meta: meta.map(Into::into),
            protocol_version: 1,
            registered: 1_700_000_000_000,
            last_seen: 1_700_000_000_001,
        })
    };
    let call = |number| {
        RowChange::PutCall(CallRow {
            number,
            pool: "demo".into(),
            process: "add".into(),
            destination: Some("one".into()),
            caller: "two".into(),
            call_id: format!("call-{number}"),
            envelope: "{}".into(),
            attachment: (number == 1).then(|| vec![0; 10_000]),
            idempotency_key: Some("once".into()),
            expires: 4_000_000_000_000,
            attempt: 1,
            parked: 1_700_000_000_000,
            died: None,
            cause: None,
        })
    };
    vec![
        app("one", None),
        app("two", Some(r#"{"note":"naïve ☃"}"#)),
        RowChange::PutPool(PoolRow {
            name: "demo".into(),
            kind: "durable".into(),
            encrypted: true,
            owner: Some("one".into()),
            policy: Some("{}".into()),
            properties: Some("{}".into()),
            descriptor: Some(vec![1, 2, 3]),
            created: 1_700_000_000_000,
            updated: 1_700_000_000_000,
        }),
        RowChange::PutBlock(BlockRow {
            pool: "demo".into(),
            block_id: "frames".into(),
            kind: "persistent".into(),
            size: 1 << 40,
            slots: 3,
            layout: Some("u8[1024]".into()),
            permissions: "{}".into(),
            owner: "one".into(),
            lifetime: "pool".into(),
            generation: 2,
            version: 9,
            fence: 4,
            boot_id: Some("the boot of the fixture".into()),
            dev: Some(1),
            ino: Some(u64::MAX),
            file: None,
            created: 1_700_000_000_000,
            updated: 1_700_000_000_000,
            sealed: Some("{}".into()),
        }),
        call(1),
        call(2),
        call(3),
        RowChange::PutAnswer {
            answer: AnswerRow {
                number: 1,
                caller: "two".into(),
                call_id: "call-2".into(),
                pool: "demo".into(),
                idempotency_key: None,
                frame: vec![0xff; 300],
                expires: 4_000_000_000_000,
                process: "work".into(),
            },
            ends_call: Some(2),
        },
        RowChange::PutSetting {
            key: "node".into(),
            value: "first".into(),
        },
    ]
}
