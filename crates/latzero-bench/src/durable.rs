//! Benchmarks of durability.
//!
//! *Parked*: calls per second that are on disk before they are acknowledged, compared with SQLite
//! and one row per commit. *Calls*: the response time of calls that are not parked, compared with
//! another server, for example one built before a change. *Known*: a start with many known apps,
//! and their handshakes. *Back*: how long it takes until many apps have reconnected after the
//! server was killed. All of them use the real program over its Unix socket.

mod back;
mod calls;
mod known;
mod parked;

use crate::failure::Failure;
use crate::idle::raise_descriptors;
use crate::machine::{self, Machine};
use crate::results::{Finding, Results, Sheet};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// The most descriptors that either process needs: one per connection, and some more.
const DESCRIPTORS: u64 = 4_000;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct DurableArgs {
    /// Do minimal work: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Parts to measure, separated by commas; all by default
    #[arg(long, value_enum, value_delimiter = ',')]
    part: Vec<Part>,
    /// Another `latzero` program whose calls are compared with those of this one; without it, this
    /// part is skipped
    #[arg(long, value_name = "PROGRAM")]
    before: Option<PathBuf>,
    /// Rounds of each part [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: Option<u64>,
    /// Pairs of servers whose calls are compared [default: 10]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    pairs: Option<u64>,
    /// Calls in one turn of a pair [default: 3000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    calls: Option<u64>,
    /// Milliseconds for which calls are parked in one turn [default: 2000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    park_ms: Option<u64>,
    /// Apps that the server knows when it starts [default: 100000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(100..=1_000_000))]
    known: Option<u64>,
    /// Apps that reconnect at the same time [default: 1000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=3_000))]
    back: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Calls that are parked, per second
    Parked,
    /// Calls that are not parked, compared with another server
    Calls,
    /// A start with many known apps, and handshakes then
    Known,
    /// Many apps that reconnect at the same time
    Back,
}

impl Part {
    const ALL: [Self; 4] = [Self::Parked, Self::Calls, Self::Known, Self::Back];

    fn name(self) -> &'static str {
        match self {
            Self::Parked => "parked",
            Self::Calls => "calls",
            Self::Known => "known",
            Self::Back => "back",
        }
    }
}

impl DurableArgs {
    /// The requested number, or else the default: `quick` for a quick run, `usual` otherwise.
    fn or(&self, asked: Option<u64>, usual: u64, quick: u64) -> u64 {
        asked.unwrap_or(if self.quick { quick } else { usual })
    }

    fn rounds(&self) -> u64 {
        self.or(self.rounds, 5, 1)
    }
}

/// The results of one part, and its rounds for the JSON.
struct Found {
    findings: Vec<Finding>,
    rounds: Value,
}

/// Runs the benchmark.
pub(crate) fn run(args: &DurableArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    raise_descriptors(DESCRIPTORS)?;
    let parts = if args.part.is_empty() {
        &Part::ALL[..]
    } else {
        &args.part[..]
    };
    let mut findings = Vec::new();
    let mut rounds = Map::new();
    for &part in parts {
        let load_before = machine::load();
        let found = match part {
            Part::Parked => parked::run(args)?,
            Part::Known => known::run(args)?,
            Part::Back => back::run(args)?,
            Part::Calls => match &args.before {
                Some(before) => calls::run(args, before)?,
                None => {
                    eprintln!("without the part `calls`: --before names no server to compare with");
                    continue;
                }
            },
        };
        findings.extend(found.findings);
        let load = json!({"before": load_before, "after": machine::load()});
        rounds.insert(
            part.name().to_owned(),
            json!({"load": load, "rounds": found.rounds}),
        );
    }
    let sheet = Sheet {
        bench: "durable",
        about: "what is parked, remembered and restored; medians over the rounds".to_owned(),
        quick: args.quick,
        machine,
        findings,
        rounds: rounds.into(),
    };
    Ok(sheet.to_results())
}
