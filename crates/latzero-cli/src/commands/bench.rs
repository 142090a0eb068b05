//! `bench`: measures calls or events per second, and response times.
//!
//! With one call at a time, the caller reads its own answers, like a program that waits for each
//! answer. With several, one thread keeps that many in flight.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use latzero::{Code, Error};
use serde_json::json;
use serde_json::value::RawValue;

use crate::args::{BenchArgs, BenchKind};
use crate::connect::{ConnectOptions, Connection};
use crate::executor::run_many;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, count, time};
use crate::parse::Target;

use super::trigger::{enter, explain};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(100);

/// The trigger of the handler in this program.
const TRIGGER: &str = "bench";

/// The longest time that is recorded exactly, in tenths of a microsecond: the longest ttl of a
/// call, one day.
const TENTHS_MAX: u64 = 864_000_000_000;

/// What was measured.
struct Record {
    times: Histogram<u64>,
    failed: u64,
    first_error: Option<Error>,
    delivered: u64,
    done: u64,
}

impl Record {
    fn new() -> Record {
        Record {
            times: Histogram::new_with_bounds(1, TENTHS_MAX, 3).expect("the bounds are in order"),
            failed: 0,
            first_error: None,
            delivered: 0,
            done: 0,
        }
    }

    fn add(&mut self, took: Duration, result: Result<u64, Error>) {
        self.done += 1;
        match result {
            Ok(delivered) => {
                let tenths = (took.as_nanos() / 100).max(1);
                self.times
                    .saturating_record(u64::try_from(tenths).unwrap_or(TENTHS_MAX));
                self.delivered += delivered;
            }
            Err(error) => {
                self.failed += 1;
                self.first_error.get_or_insert(error);
            }
        }
    }

    fn at(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.times.value_at_quantile(quantile) * 100)
    }
}

pub(crate) fn run(args: &BenchArgs, output: &Output) -> CommandResult {
    let own_pool = format!("bench-{}", std::process::id());
    let target = match &args.to {
        Some(to) => Target::parse(to, None)?,
        None => Target {
            pool: Some(own_pool.clone()),
            trigger: TRIGGER.to_owned(),
        },
    };
    // Kept until the end: the handler lives as long as its connection.
    let handler = match &args.to {
        Some(_) => None,
        None => Some(own_handler(args, own_pool)?),
    };
    let connection = args.reach.connect(&ConnectOptions::once("bench"))?;
    let pool = enter(&connection, &args.reach, &target)?;
    let payload = RawValue::from_string(format!("\"{}\"", "x".repeat(args.size.saturating_sub(2))))
        .expect("a JSON string of one letter is JSON");

    let mut record = Record::new();
    let started = Instant::now();
    let mut shown = started;
    let left = Cell::new(args.calls);
    let mut tick = |record: &Record| {
        if shown.elapsed() >= TICK {
            shown = Instant::now();
            let rate = record.done as f64 / started.elapsed().as_secs_f64();
            output.progress(format_args!(
                "{} of {}, {rate:.0}/s",
                record.done, args.calls
            ));
        }
    };
    if args.in_flight == 1 {
        while left.get() > 0 {
            left.set(left.get() - 1);
            let begun = Instant::now();
            let result = send_and_wait(
                &connection,
                args.measured,
                &target,
                pool.as_deref(),
                &payload,
            );
            stop_if_lost(&result, &left);
            record.add(begun.elapsed(), result);
            tick(&record);
        }
    } else {
        let next = || {
            left.set(left.get().checked_sub(1)?);
            let begun = Instant::now();
            let sent = send(
                &connection,
                args.measured,
                &target,
                pool.as_deref(),
                &payload,
            );
            Some(async move {
                let result = sent.await;
                (begun.elapsed(), result)
            })
        };
        run_many(usize::from(args.in_flight), next, |(took, result)| {
            stop_if_lost(&result, &left);
            record.add(took, result);
            tick(&record);
        });
    }
    let took = started.elapsed();
    output.progress_done();
    drop(handler);
    if let Some(error) = record.first_error.take() {
        output.note(format_args!("{} of {} failed", record.failed, record.done));
        return Err(explain(&connection, &target, pool.as_deref(), None, error));
    }
    print(args, &connection, &record, took, output)
}

/// Stops sending once the server is gone: all remaining calls would fail.
fn stop_if_lost(result: &Result<u64, Error>, left: &Cell<u64>) {
    if matches!(result, Err(error) if error.kind() == Code::Disconnected) {
        left.set(0);
    }
}

fn own_handler(args: &BenchArgs, pool: String) -> Result<(Connection, Arc<AtomicU64>), Failure> {
    let options = ConnectOptions {
        app_id: Some("bench-handler".to_owned()),
        pools: vec![pool],
        ..ConnectOptions::once("bench")
    };
    // Two connections, so that both ends are measured, as with two programs.
    let mut reach = args.reach.clone();
    reach.app = None;
    let connection = reach.connect(&options)?;
    let events = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&events);
    connection.app.serve(TRIGGER, move |request| {
        if request.is_emit() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        request.data::<Box<RawValue>>()
    })?;
    Ok((connection, events))
}

/// Sends one, without waiting; the future returns how many handlers it reached.
fn send(
    connection: &Connection,
    measured: BenchKind,
    target: &Target,
    pool: Option<&str>,
    payload: &RawValue,
) -> impl Future<Output = Result<u64, Error>> + use<> {
    let app = connection.app.as_async();
    let sent = match measured {
        BenchKind::Call => {
            let mut call = app.call(&target.trigger, payload);
            if let Some(pool) = pool {
                call = call.pool(pool);
            }
            (Some(call.reply()), None)
        }
        BenchKind::Emit => {
            let mut emit = app.emit(&target.trigger, payload);
            if let Some(pool) = pool {
                emit = emit.pool(pool);
            }
            (None, Some(emit.counted()))
        }
    };
    async move {
        match sent {
            (Some(call), _) => call.await.map(|_| 1),
            (None, Some(emit)) => emit.await,
            (None, None) => Ok(0),
        }
    }
}

/// Sends one and waits, on this thread.
fn send_and_wait(
    connection: &Connection,
    measured: BenchKind,
    target: &Target,
    pool: Option<&str>,
    payload: &RawValue,
) -> Result<u64, Error> {
    match measured {
        BenchKind::Call => {
            let mut call = connection.app.call(&target.trigger, payload);
            if let Some(pool) = pool {
                call = call.pool(pool);
            }
            call.reply().map(|_| 1)
        }
        BenchKind::Emit => {
            let mut emit = connection.app.emit(&target.trigger, payload);
            if let Some(pool) = pool {
                emit = emit.pool(pool);
            }
            emit.counted()
        }
    }
}

fn print(
    args: &BenchArgs,
    connection: &Connection,
    record: &Record,
    took: Duration,
    output: &Output,
) -> CommandResult {
    let rate = record.done as f64 / took.as_secs_f64();
    let noun = match args.measured {
        BenchKind::Call => "call",
        BenchKind::Emit => "event",
    };
    let us = |quantile: f64| record.times.value_at_quantile(quantile) as f64 / 10.0;
    if output.json {
        output.value(&json!({
            "measured": noun, "place": connection.place(), "count": record.done,
            "in_flight": args.in_flight,
            "payload_bytes": args.size, "seconds": took.as_secs_f64(), "per_second": rate.round(),
            "delivered": record.delivered,
            "p50_us": us(0.5), "p90_us": us(0.9), "p99_us": us(0.99), "max_us": us(1.0),
        }))?;
        return Ok(Exit::Ok);
    }
    output.facts(&[
        (
            "done",
            format!("{} in {}", count(record.done, noun), time(took)).into(),
        ),
        ("rate", format!("{rate:.0} {noun}s per second").into()),
        (
            "under way",
            format!("{} at a time, {} bytes each", args.in_flight, args.size).into(),
        ),
        ("over", connection.place().into()),
        (
            "time each",
            format!(
                "p50 {}, p90 {}, p99 {}, max {}",
                time(record.at(0.5)),
                time(record.at(0.9)),
                time(record.at(0.99)),
                time(record.at(1.0))
            )
            .into(),
        ),
    ])?;
    if args.measured == BenchKind::Emit {
        output.facts(&[("delivered", count(record.delivered, "time").into())])?;
    }
    Ok(Exit::Ok)
}
