//! Runs the crash test with more rounds than CI, and a new seed each time.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Done, cargo, cargo_program, root, run};

const ROUNDS: &str = "1000";

/// Runs it; `args` may be `--rounds N` and `--seed S`. Without a seed, the clock chooses one; a
/// failing test prints its seed.
pub(crate) fn crash(args: &[&str]) -> Done {
    let mut rounds = ROUNDS.to_owned();
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let mut seed = clock.map_or(0, |since| since.as_secs()).to_string();
    for option in args.chunks(2) {
        let (target, value) = match option {
            ["--rounds", value] => (&mut rounds, value),
            ["--seed", value] => (&mut seed, value),
            _ => {
                return Err(format!(
                    "crash takes --rounds N and --seed S, not {option:?}"
                ));
            }
        };
        value
            .parse::<u64>()
            .map_err(|_| format!("'{value}' is no number"))?;
        *target = (*value).to_owned();
    }
    // The test starts the real program.
    cargo(&["build", "--package", "latzero-cli"])?;
    println!(
        "$ CRASH_ROUNDS={rounds} CRASH_SEED={seed} cargo test --package \
         latzero-tests --test crash"
    );
    run(Command::new(cargo_program())
        .args(["test", "--package", "latzero-tests", "--test", "crash"])
        .args(["--", "--nocapture"])
        .env("CRASH_ROUNDS", &rounds)
        .env("CRASH_SEED", &seed)
        .current_dir(root()))
}
