//! Runs every benchmark in turn.

use crate::block::{self, BlockArgs};
use crate::durable::{self, DurableArgs};
use crate::failure::Failure;
use crate::idle::{self, IdleArgs};
use crate::keys::{self, KeysArgs};
use crate::lookup::{self, LookupArgs};
use crate::results::Results;
use crate::rpc::{self, RpcArgs};
use crate::slow_reader::{self, SlowReaderArgs};
use crate::start::{self, StartArgs};
use serde_json::json;

#[derive(Debug, clap::Args)]
pub(crate) struct AllArgs {
    /// Run each with minimal work: shows that it works, measures nothing, installs nothing
    #[arg(long)]
    quick: bool,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs all benchmarks. Tables are printed one by one, JSON at the end.
pub(crate) fn run(args: &AllArgs) -> Result<(), Failure> {
    let AllArgs { quick, json } = *args;
    let mut start = StartArgs::default();
    let mut idle = IdleArgs::default();
    let mut keys = KeysArgs::default();
    let mut lookup = LookupArgs::default();
    let mut slow_reader = SlowReaderArgs::default();
    let mut block = BlockArgs::default();
    let mut durable = DurableArgs::default();
    let mut rpc = RpcArgs::default();
    start.quick = quick;
    idle.quick = quick;
    keys.quick = quick;
    lookup.quick = quick;
    slow_reader.quick = quick;
    block.quick = quick;
    durable.quick = quick;
    rpc.quick = quick;
    // The quickest first: a problem that stops one usually stops the others too.
    let benches: [&dyn Fn() -> Result<Results, Failure>; 8] = [
        &|| start::run(&start),
        &|| idle::run(&idle),
        &|| lookup::run(&lookup),
        &|| keys::run(&keys),
        &|| slow_reader::run(&slow_reader),
        &|| block::run(&block),
        &|| durable::run(&durable),
        &|| rpc::run(&rpc),
    ];
    let mut reports = Vec::new();
    for bench in benches {
        let results = bench()?;
        if !json {
            results.print(json);
        }
        reports.push(results.json);
    }
    if json {
        println!("{:#}", json!({"bench": "all", "benches": reports}));
    }
    Ok(())
}
