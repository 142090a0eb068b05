//! Whether a call takes longer when more is registered.
//!
//! Several servers run at the same time: a small one; some with many pools, of which caller and
//! handler are in one, in as many as an app usually may join, or in all; and one with many triggers
//! in one pool. Each has one caller and one handler, so they differ only in what is registered.
//! Calls to the most recently registered trigger measure the lookup itself. Calls to every trigger
//! in scattered order add the cost of cache misses. Everything runs on one CPU, the steady
//! placement.

use crate::failure::Failure;
use crate::frame::PAYLOAD;
use crate::machine::Machine;
use crate::placement::Placement;
use crate::plan::{Load, Outcome, Plan, time_each};
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::Running;
use crate::stream::Transport;
use crate::wire::Wire;
use serde_json::{Value, json};

/// The largest ratio of a call's time to that in the small server.
const RATIO_MAX: f64 = 1.1;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct LookupArgs {
    /// Few calls and one round: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds, in each of which every server has its turn [default: 15]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Calls in one turn [default: 3000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    calls: Option<u64>,
}

/// How much is registered.
#[derive(Clone, Copy)]
struct Size {
    pools: usize,
    triggers_per_pool: usize,
    /// How many pools caller and handler are in, the last ones. Other apps, which do nothing, are
    /// in the others.
    pools_in_use: usize,
}

/// Pools that each of the other apps is in.
const POOLS_PER_OTHER: usize = 250;

/// The others are compared with the first.
const SIZES: [Size; 5] = [
    Size {
        pools: 1,
        triggers_per_pool: 10,
        pools_in_use: 1,
    },
    Size {
        pools: 1_000,
        triggers_per_pool: 10,
        pools_in_use: 1,
    },
    Size {
        pools: 1_000,
        triggers_per_pool: 10,
        pools_in_use: 250,
    },
    // More pools in one app than the server's default limit allows, so that a linear search would
    // be visible.
    Size {
        pools: 1_000,
        triggers_per_pool: 10,
        pools_in_use: 1_000,
    },
    Size {
        pools: 1,
        triggers_per_pool: 10_000,
        pools_in_use: 1,
    },
];

impl Size {
    fn describe(self) -> String {
        let Self {
            pools,
            triggers_per_pool,
            pools_in_use,
        } = self;
        let plural = if pools == 1 { "" } else { "s" };
        let used = match pools_in_use {
            used if used == pools => String::new(),
            used => format!(", {used} in use"),
        };
        format!("{pools} pool{plural} of {triggers_per_pool} triggers{used}")
    }

    fn pool_names(self) -> Vec<String> {
        (0..self.pools).map(|n| format!("pool-{n:04}")).collect()
    }

    fn trigger_names(self) -> Vec<String> {
        (0..self.triggers_per_pool)
            .map(|n| format!("trigger-{n:05}"))
            .collect()
    }
}

/// Which triggers are called.
#[derive(Clone, Copy)]
enum Reach {
    Last,
    Every,
}

impl Reach {
    const ALL: [Self; 2] = [Self::Last, Self::Every];

    fn describe(self) -> &'static str {
        match self {
            Self::Last => "the last trigger",
            Self::Every => "every trigger",
        }
    }
}

/// A server of one size, and its caller.
struct Subject {
    size: Size,
    caller: Wire,
    _others: Vec<Wire>,
    /// A call of the trigger registered last, in the pool joined last.
    last_call: String,
    /// A call of each trigger in each pool in use, in scattered order.
    calls: Vec<String>,
    next: usize,
    _server: Running,
}

impl Subject {
    fn start(size: Size) -> Result<Self, Failure> {
        let settings = [
            "pools_per_app_max=1024",
            "triggers_per_app_max=16384",
            "served_per_app_max=1000000",
            "registration_bytes_max=4MiB",
            "max_frame_before_handshake=4MiB",
        ];
        let server = Running::start(&settings.map(|setting| format!("limits.{setting}")))?;
        let pools = size.pool_names();
        let triggers = size.trigger_names();
        let (others_pools, pools) = pools.split_at(size.pools - size.pools_in_use);
        let connect = |app_id: &str, pools: &[String], triggers: &[String]| {
            let handshake = json!({"app_id": app_id, "pools": pools, "triggers": triggers});
            Wire::connect(&server, Transport::Unix, handshake)
        };
        let mut others = Vec::new();
        for (number, pools) in others_pools.chunks(POOLS_PER_OTHER).enumerate() {
            others.push(connect(&format!("other-{number}"), pools, &triggers)?);
        }
        let handler = connect("handler", pools, &triggers)?;
        let caller = connect("caller", pools, &[])?;
        std::thread::spawn(move || handler.serve());
        let in_order = calls(pools, &triggers);
        Ok(Self {
            size,
            caller,
            _others: others,
            last_call: in_order.last().expect("no size is zero").clone(),
            calls: scatter(&in_order),
            next: 0,
            _server: server,
        })
    }

    fn measure(&mut self, reach: Reach, calls: u64) -> Result<Outcome, Failure> {
        let plan = Plan {
            load: Load::OneAtATime,
            warmup: calls / 10,
            calls,
        };
        time_each(&plan, || {
            let call = match reach {
                Reach::Last => &self.last_call,
                Reach::Every => {
                    self.next = (self.next + 1) % self.calls.len();
                    &self.calls[self.next]
                }
            };
            self.caller.call(call)
        })
    }
}

/// A call of every trigger in every pool.
fn calls(pools: &[String], triggers: &[String]) -> Vec<String> {
    pools
        .iter()
        .flat_map(|pool| triggers.iter().map(move |trigger| call(pool, trigger)))
        .collect()
}

/// The same calls, reordered so that neighbors are far apart.
fn scatter(calls: &[String]) -> Vec<String> {
    // A stride without a common divisor reaches each call once: this one is prime, and the number
    // of calls is no multiple of it.
    let stride = 7_919;
    (0..calls.len())
        .map(|n| calls[n * stride % calls.len()].clone())
        .collect()
}

fn call(pool: &str, trigger: &str) -> String {
    format!(
        r#"{{"action":"trigger","id":"1","process":"{trigger}","pool":"{pool}","data":{PAYLOAD}}}"#
    )
}

/// Runs the benchmark.
pub(crate) fn run(args: &LookupArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 15 });
    let calls = args.calls.unwrap_or(if args.quick { 100 } else { 3_000 });
    let placement = Placement::steadiest();
    let place = placement.describe_one();
    let cells = placement.run(|| measure(rounds, calls))?;

    let mut findings = Vec::new();
    for reach in Reach::ALL {
        let of = |size: usize| {
            let outcomes = &cells[reach as usize][size];
            let p50 = |outcome: &Outcome| Some(outcome.latency?.p50_ns as f64 / 1000.0);
            median(outcomes.iter().filter_map(p50).collect()).expect("there is a round")
        };
        for (n, size) in SIZES.iter().enumerate() {
            let name = format!("{}, {}", size.describe(), reach.describe());
            findings.push(Finding::new(format!("{name}: p50"), of(n), Unit::Micros));
            if n > 0 {
                let ratio = of(n) / of(0);
                findings.push(
                    Finding::new(format!("{name}: ÷ the first"), ratio, Unit::Ratio)
                        .expect_at_most(RATIO_MAX),
                );
            }
        }
    }
    let sheet = Sheet {
        bench: "lookup",
        about: format!(
            "round trip of a call by what is registered; {rounds} × {calls} calls each, {place}"
        ),
        quick: args.quick,
        machine,
        findings,
        rounds: rounds_json(&cells),
    };
    Ok(sheet.to_results())
}

/// Outcomes by reach, then by size, then by round.
type Cells = [[Vec<Outcome>; SIZES.len()]; Reach::ALL.len()];

fn measure(rounds: u64, calls: u64) -> Result<Cells, Failure> {
    let mut subjects = Vec::new();
    for size in SIZES {
        subjects.push(Subject::start(size)?);
    }
    let mut cells = Cells::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for reach in Reach::ALL {
            for (subject, outcomes) in subjects.iter_mut().zip(&mut cells[reach as usize]) {
                let outcome = subject.measure(reach, calls).map_err(|failure| {
                    Failure::said(format!("{}: {failure}", subject.size.describe()))
                })?;
                outcomes.push(outcome);
            }
        }
    }
    Ok(cells)
}

fn rounds_json(cells: &Cells) -> Value {
    let mut all = Vec::new();
    for reach in Reach::ALL {
        for (size, outcomes) in SIZES.iter().zip(&cells[reach as usize]) {
            all.push(json!({
                "pools": size.pools,
                "triggers_per_pool": size.triggers_per_pool,
                "pools_in_use": size.pools_in_use,
                "called": reach.describe(),
                "rounds": outcomes,
            }));
        }
    }
    all.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_trigger_is_called_once_before_any_again() {
        for size in SIZES {
            let calls = scatter(&calls(&size.pool_names(), &size.trigger_names()));
            assert_eq!(calls.len(), size.pools * size.triggers_per_pool);
            assert_eq!(BTreeSet::from_iter(&calls).len(), calls.len());
        }
    }
}
