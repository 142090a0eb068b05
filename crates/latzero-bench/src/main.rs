//! Benchmarks, reported as ratios to something measured in the same run.
//!
//! A figure from one machine says little about another one, and a virtual machine changes from hour
//! to hour. So every benchmark measures its peers alternately, in rounds, and reports each as a
//! multiple of the others. Each benchmark is a module with its own arguments; this file only
//! dispatches.

mod all;
mod block;
mod durable;
mod failure;
mod frame;
mod idle;
mod keys;
mod lookup;
mod machine;
mod peers;
mod placement;
mod plan;
mod process;
mod report;
mod results;
mod rpc;
mod sdk;
mod server;
mod slow_reader;
mod start;
mod stream;
mod switch;
mod wire;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "latzero-bench",
    about = "Benchmarks, quoted as ratios within one run"
)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Request and reply between three processes: time of one call, and calls per second
    Rpc(rpc::RpcArgs),
    /// Memory of the server for each idle connection
    Idle(idle::IdleArgs),
    /// Time of a call in a server with few pools and triggers, and in one with many
    Lookup(lookup::LookupArgs),
    /// Cost of readers that stopped reading, for the server and for other clients
    SlowReader(slow_reader::SlowReaderArgs),
    /// Time from exec to the ready line, and the program's size
    Start(start::StartArgs),
    /// Memory blocks compared with bare mappings, memcpy, bare futexes and Redis
    Block(block::BlockArgs),
    /// Parked calls, starts and reconnects with many known apps, and calls compared with another
    /// server
    Durable(durable::DurableArgs),
    /// Calls in an encrypted pool compared with a plain one, and sealing compared with the cipher
    /// alone
    Keys(keys::KeysArgs),
    /// The SDKs of Python and Node, against Rust, against clients written by hand, and against what
    /// people use now
    Sdk(sdk::SdkArgs),
    /// Every benchmark but `sdk`, one after the other
    All(all::AllArgs),
    /// One process of a measurement; the program starts itself with this command
    #[command(hide = true)]
    Role(process::RoleArgs),
    /// One process of the block benchmark
    #[command(hide = true)]
    BlockRole(block::RoleArgs),
    /// One process of the benchmark of the SDKs
    #[command(hide = true)]
    SdkRole(sdk::RoleArgs),
    /// Becomes another program, which ends with the process that started this one
    #[command(hide = true)]
    Tied(process::TiedArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().bench {
        Bench::Rpc(args) => rpc::run(&args).map(|results| results.print(args.json)),
        Bench::Idle(args) => idle::run(&args).map(|results| results.print(args.json)),
        Bench::Lookup(args) => lookup::run(&args).map(|results| results.print(args.json)),
        Bench::SlowReader(args) => slow_reader::run(&args).map(|results| results.print(args.json)),
        Bench::Start(args) => start::run(&args).map(|results| results.print(args.json)),
        Bench::Block(args) => block::run(&args).map(|results| results.print(args.json)),
        Bench::Durable(args) => durable::run(&args).map(|results| results.print(args.json)),
        Bench::Keys(args) => keys::run(&args).map(|results| results.print(args.json)),
        Bench::Sdk(args) => sdk::run(&args).map(|results| results.print(args.json)),
        Bench::BlockRole(args) => block::play(&args),
        Bench::SdkRole(args) => sdk::play(&args),
        Bench::All(args) => all::run(&args),
        Bench::Role(args) => process::play(&args),
        Bench::Tied(args) => process::exec_tied(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("latzero-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
