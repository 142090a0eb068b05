//! The program `latzero`: starts a server, talks to one, and makes any program a handler.
//!
//! It has no logic of its own beyond the server and the client: every command is a few calls into
//! one of the two, and text for people. `args` defines the command line, `usage` explains mistakes
//! in it, each file in `commands` is a command, `connect` finds the server, `launch` starts other
//! programs, and `output` and `exit` report the result.

mod args;
mod commands;
mod connect;
mod executor;
mod exit;
mod launch;
mod names;
mod output;
mod parse;
mod usage;

use std::process::ExitCode;

use crate::args::Command;
use crate::output::Output;

fn main() -> ExitCode {
    if let Some(code) = launch::run_internal() {
        std::process::exit(code);
    }
    let cli = match usage::parse() {
        Ok(cli) => cli,
        Err(exit) => return exit,
    };
    let output = Output::new(cli.json, cli.color);
    let done = match cli.command {
        Command::Start(args) => commands::start::run(&args, &output),
        Command::Status(args) => commands::status::run(&args, &output),
        Command::Stop(args) => commands::stop::run(&args, &output),
        Command::Reload(args) => commands::reload::run(&args, &output),
        Command::Logs(args) => commands::logs::run(&args, &output),
        Command::Service(args) => commands::service::run(&args, &output),
        Command::Kick(args) => commands::kick::run(&args, &output),
        Command::Trust(args) => commands::trust::run(&args, &output),
        Command::Backup(args) => commands::backup::run(&args, &output),
        Command::Restore(args) => commands::restore::run(&args, &output),
        Command::Db(args) => commands::db::run(&args.command, &output),
        Command::Call(args) => commands::call::run(&args, &output),
        Command::Answers(args) => commands::answers::run(&args, &output),
        Command::Emit(args) => commands::emit::run(&args, &output),
        Command::Serve(args) => commands::serve::run(args, &output),
        Command::On(args) => commands::on::run(&args, &output),
        Command::Apps(args) => commands::apps::run(&args, &output),
        Command::Parked(args) => commands::parked::run(&args, &output),
        Command::Pools(args) => commands::pools::run(&args, &output),
        Command::Watch(args) => commands::watch::run(&args, &output),
        Command::Stats(args) => commands::stats::run(&args, &output),
        Command::Health(args) => commands::health::run(&args, &output),
        Command::Ping(args) => commands::ping::run(&args, &output),
        Command::Bench(args) => commands::bench::run(&args, &output),
        Command::Block(args) => commands::block::run(&args.command, &output),
        Command::Doctor(args) => commands::doctor::run(&args, &output),
        Command::Config(args) => commands::config::run(&args, &output),
        Command::Keys(args) => commands::keys::run(&args, &output),
        Command::App(args) => commands::keys::run_app(&args, &output),
        Command::Completion(args) => commands::completion::run(&args, &output),
    };
    match done {
        Ok(exit) => exit.into(),
        Err(failure) => output.failure(&failure).into(),
    }
}
