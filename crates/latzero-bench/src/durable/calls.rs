//! Calls that are not parked, compared with another server: what durability costs calls that do not
//! use it.
//!
//! Two servers run at the same time, each with a handler. The same caller program calls them in
//! turn, in changing order, so that changes of the machine affect both. Every pair of servers is
//! started afresh, because the placement in memory matters too. Ratios are computed per pair first,
//! so that their spread shows how reliable they are.

use super::{DurableArgs, Found};
use crate::failure::{During, Failure};
use crate::placement::Placement;
use crate::plan::{Latency, Load, Plan};
use crate::process::{self, Process};
use crate::report::median;
use crate::results::{Finding, Unit};
use crate::server::{Running, check_program, program};
use crate::stream::Transport;
use serde::Serialize;
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;

/// The largest ratio of its p50 to the other's.
const RATIO_MAX: f64 = 1.03;

/// How many turns each server of a pair has.
const TURNS: usize = 8;

/// The contestant that uses LatZero over its Unix socket.
const PEER: &str = "latzero-unix";

/// One server of a pair.
struct Contestant {
    address: String,
    server: Running,
    _handler: Process,
    /// Dropped last.
    _scratch: TempDir,
}

impl Contestant {
    fn start(program: &Path, placement: Placement) -> Result<Self, Failure> {
        let scratch = tempfile::tempdir().during("make a directory for the server")?;
        let server = placement.run(|| Running::start_program(program, scratch.path(), &[]))?;
        let address = format!("?socket={}", server.address(Transport::Unix));
        let handler = process::start_handler(PEER, &address, placement)?;
        Ok(Self {
            address,
            server,
            _handler: handler,
            _scratch: scratch,
        })
    }

    fn take_turn(&self, plan: &Plan, placement: Placement) -> Result<Latency, Failure> {
        let outcome = process::run_caller(PEER, &self.address, plan, placement)?;
        placement.check(self.server.pid())?;
        outcome
            .latency
            .ok_or_else(|| Failure::said("a caller timed no call"))
    }
}

/// Medians over the turns of one pair, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Pair {
    before: Micros,
    now: Micros,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Micros {
    p50: f64,
    p99: f64,
}

impl Micros {
    fn of(turns: &[Latency]) -> Self {
        let middle = |value: &dyn Fn(&Latency) -> u64| {
            let micros = turns.iter().map(|turn| value(turn) as f64 / 1000.0);
            median(micros.collect()).expect("there was a turn")
        };
        Self {
            p50: middle(&|turn| turn.p50_ns),
            p99: middle(&|turn| turn.p99_ns),
        }
    }
}

pub(super) fn run(args: &DurableArgs, before: &Path) -> Result<Found, Failure> {
    check_program()?;
    let pairs = args.or(args.pairs, 10, 1);
    let calls = args.or(args.calls, 3_000, 100);
    let plan = Plan {
        load: Load::OneAtATime,
        warmup: calls / 10,
        calls,
    };
    let mut findings = Vec::new();
    let mut rounds = Vec::new();
    for placement in Placement::ALL {
        let mut of_place = Vec::new();
        for pair in 1..=pairs {
            eprintln!(
                "calls beside another server's, {}: pair {pair} of {pairs}",
                placement.describe()
            );
            of_place.push(measure(before, &plan, placement)?);
        }
        findings.extend(evaluate(&of_place, placement));
        rounds.push(json!({"placement": placement, "pairs": of_place}));
    }
    Ok(Found {
        findings,
        rounds: rounds.into(),
    })
}

fn measure(before: &Path, plan: &Plan, placement: Placement) -> Result<Pair, Failure> {
    let contestants = [
        Contestant::start(before, placement)?,
        Contestant::start(&program(), placement)?,
    ];
    let mut latencies: [Vec<Latency>; 2] = Default::default();
    for turn in 0..TURNS {
        for place in [turn % 2, 1 - turn % 2] {
            latencies[place].push(contestants[place].take_turn(plan, placement)?);
        }
    }
    Ok(Pair {
        before: Micros::of(&latencies[0]),
        now: Micros::of(&latencies[1]),
    })
}

fn evaluate(pairs: &[Pair], placement: Placement) -> Vec<Finding> {
    let name = match placement {
        Placement::OneCpu => "calls on one CPU",
        Placement::Free => "calls left to the scheduler",
    };
    let middle = |value: &dyn Fn(&Pair) -> f64| {
        median(pairs.iter().map(value).collect()).expect("there was a pair")
    };
    let ratio = |pair: &Pair| pair.now.p50 / pair.before.p50;
    let lowest = pairs.iter().map(ratio).fold(f64::INFINITY, f64::min);
    let highest = pairs.iter().map(ratio).fold(0.0, f64::max);
    let micros = |what: &str, value| Finding::new(format!("{name}: {what}"), value, Unit::Micros);
    let times = |what: &str, value| Finding::new(format!("{name}: {what}"), value, Unit::Ratio);
    let p50 = times("p50 ÷ before", middle(&ratio));
    vec![
        micros("p50 before", middle(&|pair| pair.before.p50)),
        micros("p50", middle(&|pair| pair.now.p50)),
        match placement {
            Placement::OneCpu => p50.expect_at_most(RATIO_MAX),
            // Wakeups across CPUs vary more than the difference to be measured.
            Placement::Free => p50,
        },
        times("p50 ÷ before, lowest pair", lowest),
        times("p50 ÷ before, highest pair", highest),
        times(
            "p99 ÷ before",
            middle(&|pair| pair.now.p99 / pair.before.p99),
        ),
    ]
}
