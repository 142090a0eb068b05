//! Benchmarks, quoted as ratios to something measured in the same run.
//!
//! A figure from one machine says little about another, and a virtual machine changes from hour to hour. So every
//! measurement here runs its contestants in turn, in interleaved rounds, and quotes each as a multiple of the
//! others. Each measurement is a module with its own arguments; this file only dispatches.

mod failure;
mod frame;
mod machine;
mod peers;
mod placement;
mod plan;
mod process;
mod report;
mod rpc;
mod stream;
mod switch;

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
    /// One process of a measurement; the program starts itself with this
    #[command(hide = true)]
    Role(process::RoleArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().bench {
        Bench::Rpc(args) => rpc::run(&args),
        Bench::Role(args) => process::play(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("latzero-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}
