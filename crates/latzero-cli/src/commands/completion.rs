//! `completion`: prints a script with which a shell completes commands and options.

use clap::CommandFactory as _;

use crate::args::{Cli, CompletionArgs};
use crate::exit::{CommandResult, Exit};
use crate::output::Output;

pub(crate) fn run(args: &CompletionArgs, output: &Output) -> CommandResult {
    // Written to memory first, because the generator panics if its output is a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "latzero", &mut script);
    output.bytes(&script)?;
    Ok(Exit::Ok)
}
