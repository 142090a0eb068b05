//! Request and reply between three processes: the time of one call, and calls per second.
//!
//! Each cell of the result is one peer under one load in one placement. Cells are measured in
//! rounds, with all peers in turn in each round, so that changes of the machine affect all of them.
//! Every run of a cell starts server, handler and caller afresh.

use crate::failure::{During, Failure};
use crate::machine::Machine;
use crate::peers::{self, Install, Peer};
use crate::placement::Placement;
use crate::plan::{Load, Outcome, Plan};
use crate::process;
use crate::report::{Cell, Report, Skipped};
use crate::results::Results;
use crate::server::{BEFORE, program_before};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// Calls in flight, for the three rates that are reported.
pub(crate) const WINDOWS: [u64; 3] = [64, 256, 1024];

#[derive(Debug, Default, clap::Args)]
pub(crate) struct RpcArgs {
    /// A few hundred calls and one round: shows that it works, measures nothing, installs nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Contestants to run, separated by commas; all by default
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Placements to measure, separated by commas; both by default
    #[arg(long, value_enum, value_delimiter = ',')]
    placement: Vec<Placement>,
    /// An earlier `latzero` program, whose server is a contestant too
    #[arg(long, value_name = "PROGRAM")]
    before: Option<PathBuf>,
    /// Rounds of the calls per second [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: Option<u64>,
    /// Rounds of one call at a time [default: 5]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    latency_rounds: Option<u64>,
    /// Calls in one run with many in flight [default: 300000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    calls: Option<u64>,
    /// Calls in one run of one at a time [default: 20000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    latency_calls: Option<u64>,
}

impl RpcArgs {
    fn rounds(&self, load: Load) -> u64 {
        let (asked, usual) = match load {
            Load::OneAtATime => (self.latency_rounds, 5),
            Load::InFlight(_) => (self.rounds, 3),
        };
        asked.unwrap_or(if self.quick { 1 } else { usual })
    }

    fn plan(&self, load: Load) -> Plan {
        let (asked, usual, quick) = match load {
            Load::OneAtATime => (self.latency_calls, 20_000, 300),
            Load::InFlight(_) => (self.calls, 300_000, 500),
        };
        let calls = asked.unwrap_or(if self.quick { quick } else { usual });
        Plan {
            load,
            warmup: calls / 10,
            calls,
        }
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &RpcArgs) -> Result<Results, Failure> {
    if let Some(before) = args.before.as_ref().filter(|_| program_before().is_none()) {
        // Every process of the measurement must know it.
        let this = std::env::current_exe().during("find this program")?;
        let mut again = Command::new(this);
        again.args(std::env::args_os().skip(1)).env(BEFORE, before);
        return Err(again.exec()).during("run this program again");
    }
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let install = if args.quick {
        Install::Never
    } else {
        Install::Allowed
    };
    let (peers, skipped) = take_part(args, install)?;
    let placements = if args.placement.is_empty() {
        &Placement::ALL[..]
    } else {
        &args.placement[..]
    };
    let loads = [Load::OneAtATime]
        .into_iter()
        .chain(WINDOWS.map(Load::InFlight));

    let mut cells = Vec::new();
    for load in loads {
        for &placement in placements {
            cells.extend(measure(args, &peers, load, placement)?);
        }
    }
    Ok(Report::new(args.quick, machine, skipped, cells).to_results())
}

/// The contestants that run, and those that cannot.
fn take_part(
    args: &RpcArgs,
    install: Install,
) -> Result<(Vec<&'static dyn Peer>, Vec<Skipped>), Failure> {
    let asked = if args.peers.is_empty() {
        peers::ALL.to_vec()
    } else {
        args.peers
            .iter()
            .map(|name| peers::by_name(name))
            .collect::<Result<_, _>>()?
    };
    let mut peers = Vec::new();
    let mut skipped = Vec::new();
    for peer in asked {
        match peer.prepare(install) {
            Ok(()) => peers.push(peer),
            Err(reason) => {
                eprintln!("without {}: {reason}", peer.name());
                skipped.push(Skipped {
                    peer: peer.name(),
                    reason,
                });
            }
        }
    }
    Ok((peers, skipped))
}

/// Measures one load in one placement, for all contestants.
fn measure(
    args: &RpcArgs,
    peers: &[&'static dyn Peer],
    load: Load,
    placement: Placement,
) -> Result<Vec<Cell>, Failure> {
    let plan = args.plan(load);
    let new_cell =
        |peer: &&'static dyn Peer| Cell::new(peer.name(), peer.transport(), placement, load);
    let mut cells: Vec<_> = peers.iter().map(new_cell).collect();
    let rounds = args.rounds(load);
    for round in 1..=rounds {
        eprintln!(
            "{load}, {}: round {round} of {rounds}",
            placement.describe()
        );
        for (peer, cell) in peers.iter().zip(&mut cells) {
            let outcome = run_once(*peer, &plan, placement).map_err(|failure| {
                Failure::said(format!(
                    "{}, {load}, {}: {failure}",
                    peer.name(),
                    placement.describe()
                ))
            })?;
            cell.rounds.push(outcome);
        }
    }
    Ok(cells)
}

/// Starts three new processes and makes one run of the caller.
fn run_once(peer: &dyn Peer, plan: &Plan, placement: Placement) -> Result<Outcome, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for sockets")?;
    let server = peer.start(scratch.path(), placement)?;
    let handler = process::start_handler(peer.name(), &server.address, placement)?;
    let outcome = process::run_caller(peer.name(), &server.address, plan, placement)?;
    placement.check(server.process.pid())?;
    placement.check(handler.pid())?;
    if outcome.answered != outcome.asked {
        let Outcome {
            asked, answered, ..
        } = outcome;
        return Err(Failure::said(format!(
            "{answered} of {asked} calls were answered"
        )));
    }
    Ok(outcome)
}
