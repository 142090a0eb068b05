//! What clients that stop reading cost the server and other clients.
//!
//! A caller makes calls one at a time. In the same pool are readers that receive events and calls:
//! first until their outboxes are full, then at a steady rate while the calls are timed. The same
//! messages are sent without readers, and with readers that read, so the difference in p99 is due
//! to the readers and not to the sender. Everything runs on one CPU, the steady placement.

use crate::failure::Failure;
use crate::frame::PAYLOAD;
use crate::machine::Machine;
use crate::placement::Placement;
use crate::plan::{Latency, Load, Plan, time_each};
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::Running;
use crate::stream::Transport;
use crate::wire::Wire;
use serde::Serialize;
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The largest ratio of the caller's p99 with readers to that without.
const RATIO_MAX: f64 = 1.5;

/// The largest ratio of the growth of the server's memory to the sum of the outbox limits; the rest
/// is for the allocator.
const GROWTH_MAX: f64 = 1.1;

/// The size of events while the outboxes fill; while calls are timed, events are as small as calls.
const FILLING_BYTES: usize = 64 * 1024;

/// The interval between events; every tenth is a call instead.
const THROW_EVERY: Duration = Duration::from_millis(1);

/// The trigger that every reader serves.
const TARGET: &str = "thrown";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct SlowReaderArgs {
    /// Few readers and calls, one round: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds, in each of which every case has its turn [default: 7]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Calls in one turn [default: 5000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    calls: Option<u64>,
    /// The outbox limit, in KiB [default: 8192, as the server's]
    #[arg(long, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    outbox_kib: Option<u64>,
}

/// What the readers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Readers {
    Absent,
    Reading(usize),
    Stopped(usize),
}

/// The others are compared with the first.
const CASES: [Readers; 5] = [
    Readers::Absent,
    Readers::Reading(1),
    Readers::Stopped(1),
    Readers::Reading(100),
    Readers::Stopped(100),
];

impl Readers {
    fn count(self) -> usize {
        match self {
            Self::Absent => 0,
            Self::Reading(count) | Self::Stopped(count) => count,
        }
    }

    fn describe(self) -> String {
        match self {
            Self::Absent => "no readers".to_owned(),
            Self::Reading(count) => format!("{count} reading"),
            Self::Stopped(count) => format!("{count} stopped"),
        }
    }
}

/// One turn of one case.
#[derive(Clone, Copy, Debug, Serialize)]
struct Turn {
    latency: Latency,
    /// How much the server's resident memory grew after the readers had connected.
    growth_bytes: u64,
}

/// Runs the benchmark.
pub(crate) fn run(args: &SlowReaderArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 7 });
    let calls = args.calls.unwrap_or(if args.quick { 50 } else { 5_000 });
    let outbox_kib = args
        .outbox_kib
        .unwrap_or(if args.quick { 128 } else { 8192 });
    let placement = Placement::steadiest();
    let place = placement.describe_one();

    let mut turns: [Vec<Turn>; CASES.len()] = Default::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for (readers, turns) in CASES.into_iter().zip(&mut turns) {
            let turn = placement
                .run(|| take_turn(readers, calls, outbox_kib * 1024))
                .map_err(|failure| Failure::said(format!("{}: {failure}", readers.describe())))?;
            turns.push(turn);
        }
    }

    let sheet = Sheet {
        bench: "slow-reader",
        about: format!(
            "p99 of calls beside readers of whom some stopped reading; {rounds} × {calls} calls \
             each, {place}"
        ),
        quick: args.quick,
        machine,
        findings: findings(&turns, outbox_kib),
        rounds: CASES
            .iter()
            .zip(&turns)
            .map(|(readers, turns)| json!({"readers": readers, "turns": turns}))
            .collect(),
    };
    Ok(sheet.to_results())
}

fn findings(turns: &[Vec<Turn>; CASES.len()], outbox_kib: u64) -> Vec<Finding> {
    let of = |case: usize, value: &dyn Fn(&Turn) -> f64| {
        median(turns[case].iter().map(value).collect()).expect("there was a round")
    };
    let p50 = |case| of(case, &|turn| turn.latency.p50_ns as f64 / 1000.0);
    let p99 = |case| of(case, &|turn| turn.latency.p99_ns as f64 / 1000.0);
    let growth_mib = |case| of(case, &|turn| turn.growth_bytes as f64 / 1024.0 / 1024.0);

    let mut findings = Vec::new();
    for (case, readers) in CASES.into_iter().enumerate() {
        let name = readers.describe();
        findings.extend([
            Finding::new(format!("{name}: p50"), p50(case), Unit::Micros),
            Finding::new(format!("{name}: p99"), p99(case), Unit::Micros),
        ]);
        if readers == Readers::Absent {
            continue;
        }
        let ratio = Finding::new(
            format!("{name}: p99 ÷ no readers"),
            p99(case) / p99(0),
            Unit::Ratio,
        );
        let Readers::Stopped(count) = readers else {
            findings.push(ratio);
            continue;
        };
        let bound_mib = count as f64 * outbox_kib as f64 / 1024.0;
        findings.extend([
            ratio.expect_at_most(RATIO_MAX),
            Finding::new(
                format!("{name}: memory grew by"),
                growth_mib(case),
                Unit::Mebibytes,
            ),
            Finding::new(
                format!("{name}: growth ÷ outbox bounds"),
                growth_mib(case) / bound_mib,
                Unit::Ratio,
            )
            .expect_at_most(GROWTH_MAX),
        ]);
    }
    findings
}

fn take_turn(readers: Readers, calls: u64, outbox_bytes: u64) -> Result<Turn, Failure> {
    let all_bytes = outbox_bytes * (readers.count() as u64 + 2) * 2;
    let server = Running::start(&[
        format!("limits.outbox_bytes_max={outbox_bytes}"),
        // The default total outbox limit would close some of the readers, and the default write
        // timeout all of them.
        format!("limits.outbox_total_bytes_max={all_bytes}"),
        "write_stall_timeout=1h".to_owned(),
    ])?;
    let connect = |app_id: &str, triggers: &[&str]| {
        let handshake = json!({"app_id": app_id, "pools": ["bench"], "triggers": triggers});
        Wire::connect(&server, Transport::Unix, handshake)
    };
    let handler = connect("handler", &["echo"])?;
    std::thread::spawn(move || handler.serve());
    let mut caller = connect("caller", &[])?;
    let mut thrower = connect("thrower", &[])?;
    let mut stopped = Vec::new();
    for number in 0..readers.count() {
        let reader = connect(&format!("reader-{number:03}"), &[TARGET])?;
        match readers {
            Readers::Stopped(_) => stopped.push(reader),
            _ => {
                std::thread::spawn(move || reader.serve());
            }
        }
    }

    let before = server.memory()?;
    if !stopped.is_empty() {
        fill(&mut thrower, outbox_bytes)?;
    }
    let plan = Plan {
        load: Load::OneAtATime,
        warmup: calls / 10,
        calls,
    };
    let call = format!(
        r#"{{"action":"trigger","id":"1","process":"echo","pool":"bench","data":{PAYLOAD}}}"#
    );
    let is_over = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        let throwing = scope.spawn(|| throw(&mut thrower, &is_over));
        let outcome = time_each(&plan, || caller.call(&call));
        is_over.store(true, Ordering::Relaxed);
        throwing.join().expect("dropping does not panic")?;
        outcome
    })?;
    let after = server.memory()?;
    check(readers, &mut thrower)?;
    Ok(Turn {
        latency: outcome.latency.expect("each call was timed"),
        growth_bytes: after.since(before).resident,
    })
}

fn emit(id: Option<&str>, bytes: usize) -> String {
    let id = id.map_or_else(String::new, |id| format!(r#""id":"{id}","#));
    let data = "x".repeat(bytes);
    format!(r#"{{"action":"emit",{id}"process":"{TARGET}","pool":"bench","data":"{data}"}}"#)
}

/// Sends events until no reader accepts one: large ones first, then smaller ones for the rest.
fn fill(thrower: &mut Wire, outbox_bytes: u64) -> Result<(), Failure> {
    let mut bytes = FILLING_BYTES;
    // The kernel's socket buffers add to the outbox, but never ten times as much.
    for _ in 0..10_000 + outbox_bytes / 1024 {
        if delivered(thrower, bytes)? > 0 {
            continue;
        }
        if bytes <= PAYLOAD.len() {
            return Ok(());
        }
        bytes = (bytes / 8).max(PAYLOAD.len());
    }
    Err(Failure::said(
        "the readers that read nothing still take events: their outboxes have no bound",
    ))
}

/// How many readers accepted an event.
fn delivered(thrower: &mut Wire, bytes: usize) -> Result<u64, Failure> {
    let reply = thrower.ask(&emit(Some("e"), bytes))?;
    reply["response"]["delivered"]
        .as_u64()
        .ok_or_else(|| Failure::said(format!("an event was answered with {reply}")))
}

/// Sends events and calls at a steady rate until `is_over` is set.
fn throw(thrower: &mut Wire, is_over: &AtomicBool) -> Result<(), Failure> {
    let event = emit(None, PAYLOAD.len());
    let call = format!(
        r#"{{"action":"trigger","id":"c","process":"{TARGET}","pool":"bench","data":{PAYLOAD}}}"#
    );
    for turn in 1_u64.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        if turn.is_multiple_of(10) {
            // Answered, or refused at once: `no_handler` without readers, `overloaded` with those
            // that stopped.
            thrower.ask(&call)?;
        } else {
            thrower.send(&event)?;
        }
        std::thread::sleep(THROW_EVERY);
    }
    Ok(())
}

/// Checks that the readers behaved to the end as the case requires.
fn check(readers: Readers, thrower: &mut Wire) -> Result<(), Failure> {
    let expected = match readers {
        Readers::Reading(count) => count as u64,
        Readers::Absent | Readers::Stopped(_) => 0,
    };
    let found = delivered(thrower, PAYLOAD.len())?;
    if found != expected {
        return Err(Failure::said(format!(
            "an event was delivered to {found} readers where {expected} were expected"
        )));
    }
    let call = format!(
        r#"{{"action":"trigger","id":"c","process":"{TARGET}","pool":"bench","data":{PAYLOAD}}}"#
    );
    let reply = thrower.ask(&call)?;
    let answer = match readers {
        Readers::Absent => "no_handler",
        Readers::Reading(_) => "ok",
        Readers::Stopped(_) => "overloaded",
    };
    let is_expected = reply["status"] == answer || reply["error"]["code"] == answer;
    if is_expected {
        return Ok(());
    }
    Err(Failure::said(format!(
        "a call was answered with {reply} where {answer} was expected"
    )))
}
