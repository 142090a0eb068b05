//! Tasks of this repository, one command each: `cargo xtask help`.

mod bench;
mod codegen;
mod crash;
mod cross;
mod dev;
mod examples;
mod node;
mod python;
mod reference;
mod tidy;
mod vectors;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cross::Target;

const HELP: &str = "\
cargo xtask COMMAND

  test                 every check: format, lints, generated files, tidiness, all tests and
                       2200 simulated seeds
  test --unit          only unit tests
  test --integration   only integration tests
  test --python        only the tests of the Python package
  test --node          only the tests of the Node package
  test --scenarios     only the scenarios that Rust, Python and Node share
  test --examples      only the examples in several languages, and the notebook
  lint                 tidiness, format and lint checks
  lint --fix           fix what the format and lint checks can fix
  coverage             line coverage of all tests (needs cargo-llvm-cov)
  dev [ARGS]           run the server and restart it when a source file changes; ARGS are passed to
                       `latzero start`
  codegen [--check]    write generated files (docs/errors.md, conformance vectors), or check that
                       they are current
  sim ARGS             run the simulator: --seed N, or --seeds A..B; --durable for calls that
                       outlive connections, --hostile for clients that attack the server,
                       --vault for an encrypted pool
  hostile [ARGS]       run an innocent client beside each kind of hostile one: --seconds N,
                       --only TEXT, --json
  crash [ARGS]         kill and restart processes and check the result: --rounds N, --seed S
  reference            build the reference of the crate and the packages: target/reference
  wheel                build the wheel of the Python package, with the program in it
  npm                  make the npm packages of this platform, with the program in them
  wheel --target NAME, npm --target NAME
                       the same for other machines: x86_64-unknown-linux-gnu (an older glibc),
                       aarch64-unknown-linux-gnu, x86_64-unknown-linux-musl,
                       aarch64-unknown-linux-musl
  bench NAME [ARGS]    run a benchmark; `cargo xtask bench --help` lists them
  fuzz TARGET [ARGS]   fuzz a parser (needs cargo-fuzz)
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["test"] => test(),
        ["test", "--unit"] => unit_tests(),
        ["test", "--integration"] => integration_tests(),
        ["test", "--python"] => python::test(),
        ["test", "--node"] => node::test(),
        ["test", "--scenarios"] => scenarios(),
        ["test", "--examples"] => examples::test(),
        ["npm", rest @ ..] => Target::of_args(rest).and_then(|to| node::pack(to.as_ref())),
        ["wheel", rest @ ..] => Target::of_args(rest).and_then(|to| python::wheel(to.as_ref())),
        ["reference"] => reference::build(),
        ["lint"] => lint(),
        ["lint", "--fix"] => lint_fix(),
        ["coverage", rest @ ..] => coverage(rest),
        ["dev", rest @ ..] => dev::run(rest),
        ["codegen"] => codegen::write(),
        ["codegen", "--check"] => codegen::check(),
        ["sim", rest @ ..] => sim(rest),
        ["hostile", rest @ ..] => hostile(rest),
        ["crash", rest @ ..] => crash::crash(rest),
        ["bench", rest @ ..] => bench::bench(rest),
        ["fuzz", rest @ ..] => fuzz(rest),
        ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The result of a step: nothing, or an error message.
type Done = Result<(), String>;

/// Tests that also run with several IO threads.
const THREADED: &[&str] = &["bounds", "ends", "blocks", "block_client"];

fn test() -> Done {
    lint()?;
    codegen::check()?;
    // The tests start the real program.
    cargo(&["build", "--workspace", "--all-targets"])?;
    cargo(&["test", "--workspace"])?;
    // Again with several IO threads: only this shows how loops affect each other. The vectors are
    // excluded, because they assume that the end of one connection is processed before the next
    // message of another.
    let mut threads = vec!["test", "--package", "latzero-tests"];
    threads.extend(THREADED.iter().flat_map(|name| ["--test", name]));
    println!("$ LATZERO_IO_THREADS=4 cargo {}", threads.join(" "));
    run(Command::new(cargo_program())
        .args(threads)
        .env("LATZERO_IO_THREADS", "4")
        .current_dir(root()))?;
    sim(&["--seeds", "0..200"])?;
    sim(&["--durable", "--seeds", "0..2000"])?;
    sim(&["--hostile", "--seeds", "0..200"])?;
    sim(&["--vault", "--seeds", "0..200"])?;
    python::test()?;
    node::test()?;
    scenarios()?;
    examples::test()?;
    println!("\nall checks passed");
    Ok(())
}

fn unit_tests() -> Done {
    cargo(&["test", "--workspace", "--lib", "--bins"])
}

fn integration_tests() -> Done {
    cargo(&["build", "--workspace"])?;
    cargo(&["test", "--workspace", "--test", "*"])
}

/// Runs the shared scenarios between every two languages, with the packages as they are built.
fn scenarios() -> Done {
    cargo(&["build", "--package", "latzero-cli"])?;
    let mut test = Command::new(cargo_program());
    test.args(["test", "--package", "latzero-tests", "--test", "scenarios"])
        .args(["--", "--nocapture"])
        .current_dir(root());
    match python::environment() {
        Ok(python) => {
            python::install(&python)?;
            test.env("PEER_PYTHON", python);
        }
        Err(why) => leave_out("the scenarios with Python", &why)?,
    }
    match node::suits() {
        Ok(()) => {
            node::build_for_tests()?;
            test.env("PEER_NODE", "node");
        }
        Err(why) => leave_out("the scenarios with Node", &why)?,
    }
    run(&mut test)
}

/// Says that tests are left out; in continuous integration (`CI` is set) that is a failure.
fn leave_out(what: &str, why: &str) -> Done {
    if std::env::var_os("CI").is_some() {
        return Err(format!("{what} must run here: {why}"));
    }
    println!("LEFT OUT: {what}: {why}");
    Ok(())
}

fn lint() -> Done {
    tidy::check()?;
    cargo(&["fmt", "--all", "--check"])?;
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])?;
    python::lint()?;
    node::lint()
}

fn lint_fix() -> Done {
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--fix",
        "--allow-dirty",
        "--allow-staged",
    ])?;
    cargo(&["fmt", "--all"])?;
    python::lint_fix()?;
    node::lint_fix()
}

fn coverage(rest: &[&str]) -> Done {
    let mut args = vec!["llvm-cov", "--workspace"];
    args.extend(rest);
    cargo(&args).map_err(|error| {
        format!(
            "{error}\nif cargo-llvm-cov is missing: cargo install cargo-llvm-cov && rustup \
                 component add llvm-tools"
        )
    })
}

fn sim(rest: &[&str]) -> Done {
    let mut args = vec!["run", "--quiet", "--package", "latzero-sim", "--"];
    args.extend(rest);
    cargo(&args)
}

fn hostile(rest: &[&str]) -> Done {
    cargo(&["build", "--release", "--package", "latzero-cli"])?;
    let mut args = vec!["run", "--release", "--package", "latzero-tests"];
    args.extend(["--bin", "latzero-hostile", "--"]);
    args.extend(rest);
    cargo(&args)
}

fn fuzz(rest: &[&str]) -> Done {
    let mut args = vec!["fuzz", "run"];
    args.extend(rest);
    // libFuzzer's instrumentation needs flags that a stable compiler accepts only this way.
    run(Command::new(cargo_program())
        .args(&args)
        .env("RUSTC_BOOTSTRAP", "1")
        .current_dir(root()))
}

fn cargo(args: &[&str]) -> Done {
    println!("$ cargo {}", args.join(" "));
    run(Command::new(cargo_program()).args(args).current_dir(root()))
}

fn cargo_program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

fn run(command: &mut Command) -> Done {
    let status = command
        .status()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("{command:?} ended with {status}"))
    }
}

/// Runs a command; what it wrote is part of its error.
fn quiet(command: &mut Command) -> Done {
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => Err(format!("{command:?}: {error}")),
    }
}

/// The repository's root.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .expect("xtask lies in the repository's root")
        .to_owned()
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}
