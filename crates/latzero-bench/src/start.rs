//! The time of a start, and the size of the program.
//!
//! The time is measured from before the program is executed until its ready line has been read.
//! `--version` is timed in the same rounds, to show the share of the system and the loader.

use crate::failure::{During, Failure};
use crate::machine::Machine;
use crate::placement::Placement;
use crate::process::{Process, READY_WAIT};
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::{Ready, append_start_args, check_program, program};
use serde_json::json;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const START_MS_MAX: f64 = 50.0;
const PROGRAM_MB_MAX: f64 = 15.0;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct StartArgs {
    /// Start only twice: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every start of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Starts of each kind [default: 30]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    starts: Option<u64>,
}

/// Runs the benchmark.
pub(crate) fn run(args: &StartArgs) -> Result<Results, Failure> {
    check_program()?;
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let starts = args.starts.unwrap_or(if args.quick { 2 } else { 30 });
    let program = program();
    let size = std::fs::metadata(&program)
        .during(format!("look at {}", program.display()))?
        .len();

    let (mut versions, mut firsts, mut agains) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..starts {
        let scratch = tempfile::tempdir().during("make a directory for the server")?;
        versions.push(time(Command::new(&program).arg("--version"), |_| Some(()))?);
        firsts.push(start(&program, scratch.path())?);
        // The previous server was killed, and left its socket and its lock behind.
        agains.push(start(&program, scratch.path())?);
    }

    let kinds = [
        ("the program's --version", &versions, None),
        ("start in a new directory", &firsts, Some(START_MS_MAX)),
        ("start after a kill", &agains, Some(START_MS_MAX)),
    ];
    let mut findings = Vec::new();
    for (name, times, bound) in kinds {
        let middle = median(times.clone()).expect("there was a start");
        let longest = times.iter().copied().fold(0.0, f64::max);
        for (figure, value) in [("median", middle), ("longest", longest)] {
            let finding = Finding::new(format!("{name}: {figure}"), value, Unit::Millis);
            findings.push(match bound {
                Some(bound) => finding.expect_at_most(bound),
                None => finding,
            });
        }
    }
    findings.push(
        Finding::new("the program", size as f64 / 1e6, Unit::Megabytes)
            .expect_at_most(PROGRAM_MB_MAX),
    );
    let sheet = Sheet {
        bench: "start",
        about: format!("from exec to the ready line, {starts} starts of each kind"),
        quick: args.quick,
        machine,
        findings,
        rounds: json!({
            "version_ms": versions,
            "first_ms": firsts,
            "again_ms": agains,
            "program_bytes": size,
        }),
    };
    Ok(sheet.to_results())
}

/// Milliseconds from exec to ready; the server is killed afterwards.
fn start(program: &Path, scratch: &Path) -> Result<f64, Failure> {
    let mut command = Command::new(program);
    append_start_args(&mut command, scratch);
    time(&mut command, Ready::parse)
}

/// Milliseconds until `command` writes a line for which `pick` returns a value.
fn time<T>(command: &mut Command, pick: impl FnMut(&str) -> Option<T>) -> Result<f64, Failure> {
    let begin = Instant::now();
    let process = Process::spawn("latzero", command, Placement::Free)?;
    process.wait_for(READY_WAIT, pick)?;
    Ok(begin.elapsed().as_secs_f64() * 1000.0)
}
