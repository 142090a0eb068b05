//! Measures the store on this machine: loading apps, and commits per second with one submitter and
//! with many.
//!
//! `cargo run --release -p latzero-store --example measure_store -- [DIRECTORY]`; the numbers
//! depend on the disk of DIRECTORY.

use std::error::Error;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use latzero_store::{AppRow, CallRow, Options, RowChange, Store, open};

const APPS: usize = 100_000;
const RUN: Duration = Duration::from_secs(3);

fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args_os()
        .nth(1)
        .unwrap_or_else(|| std::env::temp_dir().into());
    let dir = tempfile::tempdir_in(parent)?;
    load(dir.path())?;
    let store = open(dir.path(), options())?.store;
    committing(&store, 1)?;
    committing(&store, 64)?;
    store.close()?;
    in_flight(dir.path(), 1)?;
    in_flight(dir.path(), 64)?;
    in_flight(dir.path(), 1_024)?;
    bare(dir.path())
}

fn options() -> Options {
    Options {
        boot_id: "measured".into(),
        ..Options::default()
    }
}

fn load(dir: &Path) -> Result<(), Box<dyn Error>> {
    let store = open(dir, options())?.store;
    let start = Instant::now();
    for first in (0..APPS).step_by(1_000) {
        store.commit(
            (first..first + 1_000)
                .map(|n| RowChange::PutApp(app(n)))
                .collect(),
        )?;
    }
    println!("{APPS} apps written in {:?}", start.elapsed());
    store.close()?;
    for (name, boot_id) in [("clean", "measured"), ("new boot, full check", "another")] {
        let options = Options {
            boot_id: boot_id.into(),
            ..Options::default()
        };
        let start = Instant::now();
        let opened = open(dir, options)?;
        let elapsed = start.elapsed();
        println!(
            "{} apps opened in {elapsed:?} ({name})",
            opened.contents.apps.len()
        );
        opened.store.close()?;
    }
    let store = open(dir, options())?.store;
    let start = Instant::now();
    let backup = store.backup(None)?;
    println!(
        "backup of {} bytes in {:?}",
        store.status().db_bytes,
        start.elapsed()
    );
    let start = Instant::now();
    backup.verify()?;
    println!("verified in {:?}", start.elapsed());
    Ok(store.close()?)
}

/// Threads that each wait for their own commit.
fn committing(store: &Store, threads: u64) -> Result<(), Box<dyn Error>> {
    let before = store.status();
    let start = Instant::now();
    let done: u64 = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mut count = 0;
                    while start.elapsed() < RUN {
                        let number = thread << 32 | count;
                        if store
                            .commit(vec![RowChange::PutCall(call(number))])
                            .is_err()
                        {
                            break;
                        }
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or(0))
            .sum()
    });
    let seconds = start.elapsed().as_secs_f64();
    let commits = store.status().commits - before.commits;
    println!(
        "{threads} waiting threads: {:.0} calls/s durable, {:.0} transactions/s",
        done as f64 / seconds,
        commits as f64 / seconds
    );
    Ok(())
}

/// One thread that keeps `count` promises in flight, as a server does for `count` callers.
fn in_flight(dir: &Path, count: u64) -> Result<(), Box<dyn Error>> {
    let (tell, finished) = channel();
    let options = Options {
        on_done: Box::new(move |done| {
            let batch = std::mem::take(done);
            let _ = tell.send(batch);
        }),
        ..options()
    };
    let store = open(dir, options)?.store;
    let start = Instant::now();
    let (mut next, mut done) = (1 << 50, 0_u64);
    let mut submit = |n: usize| -> Result<(), Box<dyn Error>> {
        for _ in 0..n {
            store.submit(RowChange::PutCall(call(next)), Some(next))?;
            next += 1;
        }
        Ok(())
    };
    submit(usize::try_from(count)?)?;
    while start.elapsed() < RUN {
        let batch = finished.recv()?;
        for (_, outcome) in &batch {
            outcome.clone()?;
        }
        done += batch.len() as u64;
        submit(batch.len())?;
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{count} promises in flight: {:.0} calls/s durable, {:.0} transactions/s",
        done as f64 / seconds,
        store.status().commits as f64 / seconds
    );
    Ok(store.close()?)
}

/// SQLite alone, one row per transaction, on the same disk.
fn bare(dir: &Path) -> Result<(), Box<dyn Error>> {
    let conn = rusqlite::Connection::open(dir.join("bare.db"))?;
    conn.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
         CREATE TABLE calls (number INTEGER PRIMARY KEY, envelope TEXT NOT NULL) STRICT",
    )?;
    let mut insert = conn.prepare("INSERT INTO calls (number, envelope) VALUES (?1, ?2)")?;
    let envelope = call(0).envelope;
    let start = Instant::now();
    let mut count = 0_i64;
    while start.elapsed() < RUN {
        insert.execute((count, &envelope))?;
        count += 1;
    }
    println!(
        "SQLite alone: {:.0} rows/s",
        count as f64 / start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn app(n: usize) -> AppRow {
    AppRow {
        app_id: format!("{n:08x}-app-of-the-measurement"),
        pools: r#"["demo"]"#.into(),
        triggers: r#"[{"process":"add","pool":"demo"},{"process":"sub","pool":"demo"}]"#.into(),
        watches: "[]".into(),
        meta: Some(r#"{"language":"rust","version":"1.0"}"#.into()),
        protocol_version: 1,
        registered: 1_700_000_000_000,
        last_seen: 1_700_000_000_000,
    }
}

fn call(number: u64) -> CallRow {
    CallRow {
        number,
        pool: "demo".into(),
        process: "add".into(),
        destination: Some("worker".into()),
        caller: "caller".into(),
        call_id: format!("call-{number}"),
        envelope: format!(r#"{{"process":"add","args":"{}"}}"#, "x".repeat(200)),
        attachment: None,
        idempotency_key: None,
        expires: 4_000_000_000_000,
        attempt: 0,
        parked: 1_700_000_000_000,
        died: None,
        cause: None,
    }
}
