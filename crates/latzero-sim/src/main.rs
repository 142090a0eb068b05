//! `latzero-sim`: runs the simulator over a seed or a range of seeds.

use std::process::ExitCode;

use latzero_sim::{Plan, run};

const USAGE: &str = "usage: latzero-sim [--seed N | --seeds A..B] \
    [--durable | --hostile | --vault] [--steps N] [--json]";

struct Options {
    seeds: std::ops::Range<u64>,
    plan: fn(u64) -> Plan,
    /// The default number if absent.
    steps: Option<u32>,
    json: bool,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let (mut runs, mut steps, mut calls, mut frames) = (0_u64, 0, 0, 0);
    for seed in options.seeds {
        let mut plan = (options.plan)(seed);
        plan.steps = options.steps.unwrap_or(plan.steps);
        steps += u64::from(plan.steps);
        match run(&plan) {
            Ok(outcome) => {
                runs += 1;
                calls += outcome.totals.calls_started;
                frames += outcome.totals.frames;
                if options.json {
                    println!("{}", outcome.to_json());
                }
            }
            Err(violation) => {
                if options.json {
                    let line = serde_json::json!({"seed": violation.seed, "step": violation.step,
                        "violation": violation.what});
                    println!("{line}");
                }
                eprintln!("{violation}");
                return ExitCode::FAILURE;
            }
        }
    }
    if !options.json {
        println!("{runs} runs, {steps} steps: {calls} calls, {frames} frames, nothing broke");
    }
    ExitCode::SUCCESS
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        seeds: 0..1,
        plan: Plan::new,
        steps: None,
        json: false,
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--json" => options.json = true,
            "--durable" => options.plan = Plan::durable,
            "--hostile" => options.plan = Plan::hostile,
            "--vault" => options.plan = Plan::vault,
            "--seed" => {
                let seed = number(&flag, &value()?)?;
                options.seeds = seed..seed.saturating_add(1);
            }
            "--seeds" => {
                let text = value()?;
                let (from, to) = text
                    .split_once("..")
                    .ok_or(format!("--seeds takes A..B, not '{text}'"))?;
                options.seeds = number(&flag, from)?..number(&flag, to)?;
            }
            "--steps" => {
                let steps = u32::try_from(number(&flag, &value()?)?);
                let steps = steps.map_err(|_| "--steps takes at most 4294967295")?;
                options.steps = Some(steps);
            }
            _ => return Err(format!("unknown argument '{flag}'")),
        }
    }
    Ok(options)
}

fn number(flag: &str, text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("{flag} takes a whole number, not '{text}'"))
}
