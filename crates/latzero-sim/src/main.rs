//! `latzero-sim`: runs the simulator over a seed or a range of seeds.

use std::process::ExitCode;

use latzero_sim::{Plan, STEPS_DEFAULT, run};

const USAGE: &str = "usage: latzero-sim [--seed N | --seeds A..B] [--steps N] [--json]";

struct Options {
    seeds: std::ops::Range<u64>,
    steps: u32,
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
    let (mut runs, mut calls, mut frames) = (0_u64, 0, 0);
    for seed in options.seeds {
        let plan = Plan {
            steps: options.steps,
            ..Plan::new(seed)
        };
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
                    let told = serde_json::json!({"seed": violation.seed, "step": violation.step, "violation": violation.what});
                    println!("{told}");
                }
                eprintln!("{violation}");
                return ExitCode::FAILURE;
            }
        }
    }
    if !options.json {
        println!(
            "{runs} runs of {} steps: {calls} calls, {frames} frames, nothing broke",
            options.steps
        );
    }
    ExitCode::SUCCESS
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options {
        seeds: 0..1,
        steps: STEPS_DEFAULT,
        json: false,
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--json" => options.json = true,
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
                options.steps = u32::try_from(number(&flag, &value()?)?)
                    .map_err(|_| "--steps takes at most 4294967295".to_owned())?;
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
