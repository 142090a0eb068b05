//! The SDKs of Python and Node, each against Rust, against a client written by hand in the same
//! language, and against what people use now.
//!
//! Every contestant is a process that obeys orders: `sdk/worker.py`, `sdk/worker.mjs`, or this
//! program for Rust. They stay alive during the whole run, and take their turns in each round.

mod rust;
mod workers;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::failure::{During, Failure};
use crate::machine::Machine;
use crate::placement::Placement;
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::Running;
use crate::stream::Transport;

pub(crate) use rust::{RoleArgs, play};
use workers::{Order, Worker};

#[derive(Debug, Default, clap::Args)]
pub(crate) struct SdkArgs {
    /// Few calls and one round: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds, in each of which every contestant has its turn [default: 11]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// A Python in which the package `latzero` is installed; `cargo xtask bench sdk` makes one
    #[arg(long)]
    python: Option<PathBuf>,
    /// A newer Python with the package, whose tasks start eagerly
    #[arg(long)]
    newest_python: Option<PathBuf>,
    /// The program `node`
    #[arg(long)]
    node: Option<PathBuf>,
}

/// One measurement: a caller with its load, and the handler that it calls.
struct Cell {
    name: &'static str,
    /// The kind of the worker that calls.
    caller: &'static str,
    /// The kind of the worker that answers; none where the caller has its own.
    handler: Option<&'static str>,
    load: &'static str,
    calls: u64,
}

const fn cell(
    name: &'static str,
    caller: &'static str,
    handler: Option<&'static str>,
    load: &'static str,
) -> Cell {
    let calls = match load.as_bytes() {
        b"one" => 3_000,
        b"in_flight" | b"threads" => 19_200,
        b"argument" => 50,
        b"pipe" => 1,
        // Each may copy a gibibyte.
        b"first" => 3,
        _ => 1_000,
    };
    Cell {
        name,
        caller,
        handler,
        load,
        calls,
    }
}

/// How many calls are in flight, and how many threads call.
const WINDOW: u64 = 64;

const RUST: Option<&str> = Some("rust handler");

/// All measurements. The kind of a worker begins with the language that runs it.
const CELLS: &[Cell] = &[
    cell("rust one", "rust caller", RUST, "one"),
    cell("rust in flight", "rust caller", RUST, "in_flight"),
    cell("rust threads", "rust caller", RUST, "threads"),
    cell("python one", "python latzero_caller", RUST, "one"),
    cell("python threads", "python latzero_caller", RUST, "threads"),
    cell("bare python one", "python bare_caller", RUST, "one"),
    cell("asyncio one", "python aio_caller", RUST, "one"),
    cell("asyncio in flight", "python aio_caller", RUST, "in_flight"),
    cell("uvloop one", "python uvloop_caller", RUST, "one"),
    cell(
        "bare asyncio in flight",
        "python bare_aio_caller",
        RUST,
        "in_flight",
    ),
    cell("node one", "node caller", RUST, "one"),
    cell("node in flight", "node caller", RUST, "in_flight"),
    cell("bare node one", "node bareCaller", RUST, "one"),
    cell("bare node in flight", "node bareCaller", RUST, "in_flight"),
    cell("node thread one", "thread caller", RUST, "one"),
    cell("node thread in flight", "thread caller", RUST, "in_flight"),
    cell(
        "python handler one",
        "rust caller",
        Some("python latzero_handler"),
        "one",
    ),
    cell(
        "python handler in flight",
        "rust caller",
        Some("python latzero_handler"),
        "in_flight",
    ),
    cell(
        "asyncio handler in flight",
        "rust caller",
        Some("python aio_handler"),
        "in_flight",
    ),
    cell(
        "inline handler in flight",
        "rust caller",
        Some("python inline_handler"),
        "in_flight",
    ),
    cell(
        "node handler in flight",
        "rust caller",
        Some("node handler"),
        "in_flight",
    ),
    cell(
        "bare node handler in flight",
        "rust caller",
        Some("node bareHandler"),
        "in_flight",
    ),
    cell(
        "python to python",
        "python latzero_caller",
        Some("python latzero_handler"),
        "one",
    ),
    cell(
        "asyncio to asyncio",
        "python aio_caller",
        Some("python aio_handler"),
        "in_flight",
    ),
    cell(
        "newest asyncio handler in flight",
        "rust caller",
        Some("newest aio_handler"),
        "in_flight",
    ),
    cell(
        "newest inline handler in flight",
        "rust caller",
        Some("newest inline_handler"),
        "in_flight",
    ),
    cell(
        "newest asyncio to asyncio",
        "newest aio_caller",
        Some("newest aio_handler"),
        "in_flight",
    ),
    cell(
        "newest nats-py in flight",
        "newest nats_caller",
        Some("newest nats_handler"),
        "in_flight",
    ),
    cell(
        "nats-py one",
        "python nats_caller",
        Some("python nats_handler"),
        "one",
    ),
    cell(
        "nats-py in flight",
        "python nats_caller",
        Some("python nats_handler"),
        "in_flight",
    ),
    cell(
        "redis-py one",
        "python redis_caller",
        Some("python redis_handler"),
        "one",
    ),
    cell(
        "pyzmq one",
        "python zmq_caller",
        Some("python zmq_handler"),
        "one",
    ),
    cell("mp.Pipe one", "python pipe_caller", None, "one"),
    cell(
        "block argument",
        "python block_caller",
        Some("python block_handler"),
        "argument",
    ),
    cell("large mp.Pipe", "python large_pipe_caller", None, "pipe"),
    cell("large redis-py", "python large_redis_caller", None, "pipe"),
    cell(
        "attach",
        "python block_caller",
        Some("python block_handler"),
        "attach",
    ),
    cell(
        "view",
        "python block_caller",
        Some("python block_handler"),
        "view",
    ),
    cell("node array", "node blockCaller", None, "array"),
    cell("node read", "node blockCaller", None, "read"),
    cell("node first view", "node blockCaller", None, "first"),
    cell("import", "python import", None, "import"),
    cell("require", "node import", None, "import"),
];

/// A figure of the table: what it is, the two measurements whose ratio it is, and its bar.
struct Line {
    what: &'static str,
    of: &'static str,
    to: Option<&'static str>,
    bar: Bar,
}

#[derive(Clone, Copy)]
enum Bar {
    /// A ratio of times, at most.
    Times(f64),
    /// A ratio of times, at least.
    Slower(f64),
    /// A ratio of rates, at least.
    Rates(f64),
    /// A ratio of the CPU time of handlers per call, at most.
    Cpu(f64),
    /// Microseconds, at most.
    Micros(f64),
}

const fn line(what: &'static str, of: &'static str, to: &'static str, bar: Bar) -> Line {
    let to = if to.is_empty() { None } else { Some(to) };
    Line { what, of, to, bar }
}

use Bar::{Cpu, Micros, Rates, Slower, Times};

const LINES: &[Line] = &[
    line("Python: p50 ÷ Rust", "python one", "rust one", Times(1.15)),
    line(
        "… ÷ bare Python",
        "python one",
        "bare python one",
        Times(0.75),
    ),
    line(
        "asyncio: p50 ÷ Rust",
        "asyncio one",
        "rust one",
        Times(1.65),
    ),
    line("… with uvloop", "uvloop one", "rust one", Times(1.35)),
    line(
        "asyncio: 64 in flight ÷ bare asyncio",
        "asyncio in flight",
        "bare asyncio in flight",
        Rates(2.0),
    ),
    line(
        "… ÷ Rust",
        "asyncio in flight",
        "rust in flight",
        Rates(0.45),
    ),
    line(
        "Python: 64 threads ÷ Rust",
        "python threads",
        "rust threads",
        Rates(0.7),
    ),
    line(
        "Python handler: 64 in flight ÷ Rust handler",
        "python handler in flight",
        "rust in flight",
        Rates(0.7),
    ),
    line(
        "async def handler ÷ plain on the same loop",
        "asyncio handler in flight",
        "inline handler in flight",
        Rates(0.7),
    ),
    line(
        "… with eager tasks",
        "newest asyncio handler in flight",
        "newest inline handler in flight",
        Rates(0.7),
    ),
    line(
        "async def handler ÷ Rust handler",
        "asyncio handler in flight",
        "rust in flight",
        Rates(0.33),
    ),
    line(
        "Python handler: CPU per call ÷ Rust handler",
        "python handler in flight",
        "rust in flight",
        Cpu(2.5),
    ),
    line(
        "… p50 ÷ Rust handler",
        "python handler one",
        "rust one",
        Times(1.15),
    ),
    line("Node: p50 ÷ Rust", "node one", "rust one", Times(1.4)),
    line("… ÷ bare Node", "node one", "bare node one", Times(0.97)),
    line(
        "Node: 64 in flight ÷ Rust",
        "node in flight",
        "rust in flight",
        Rates(0.42),
    ),
    line(
        "… ÷ bare Node",
        "node in flight",
        "bare node in flight",
        Rates(1.2),
    ),
    line(
        "Node handler: 64 in flight ÷ Rust handler",
        "node handler in flight",
        "rust in flight",
        Rates(0.6),
    ),
    line(
        "… ÷ bare Node handler",
        "node handler in flight",
        "bare node handler in flight",
        Rates(1.4),
    ),
    line(
        "Node, thread driver: p50 ÷ Rust",
        "node thread one",
        "rust one",
        Times(1.7),
    ),
    line(
        "… 64 in flight ÷ bare Node",
        "node thread in flight",
        "bare node in flight",
        Rates(0.95),
    ),
    line(
        "Python ↔ Python: p50 ÷ nats-py",
        "python to python",
        "nats-py one",
        Times(0.12),
    ),
    line(
        "… ÷ redis-py lists",
        "python to python",
        "redis-py one",
        Times(0.12),
    ),
    line(
        "… ÷ pyzmq (no broker)",
        "python to python",
        "pyzmq one",
        Times(0.6),
    ),
    line(
        "… ÷ mp.Pipe (no broker)",
        "python to python",
        "mp.Pipe one",
        Times(1.4),
    ),
    line(
        "asyncio ↔ asyncio: 64 in flight ÷ nats-py",
        "asyncio to asyncio",
        "nats-py in flight",
        Rates(4.0),
    ),
    line(
        "… with eager tasks",
        "newest asyncio to asyncio",
        "newest nats-py in flight",
        Rates(4.0),
    ),
    line(
        "mp.Pipe ÷ a block of 256 MiB as an argument",
        "large mp.Pipe",
        "block argument",
        Slower(1000.0),
    ),
    line(
        "Redis SET + GET ÷ such a block",
        "large redis-py",
        "block argument",
        Slower(1000.0),
    ),
    line(
        "a block of 256 MiB as an argument",
        "block argument",
        "",
        Micros(500.0),
    ),
    line("Python: attach and view 1 GiB", "attach", "", Micros(80.0)),
    line("Python: view an attached block", "view", "", Micros(3.0)),
    line("Node: typed array of a view", "node array", "", Micros(2.0)),
    line("Node: read(fn) of 8 MiB", "node read", "", Micros(6.0)),
    line(
        "Node: first view of 1 GiB",
        "node first view",
        "",
        Micros(5_000.0),
    ),
    line("import latzero", "import", "", Micros(10_000.0)),
    line("require('latzero')", "require", "", Micros(10_000.0)),
];

/// The figures of one measurement, of each round.
#[derive(Default)]
struct Figures {
    p50_us: Vec<f64>,
    per_second: Vec<f64>,
    handler_cpu_us: Vec<f64>,
}

impl Figures {
    fn to_json(&self) -> Value {
        json!({
            "p50_us": self.p50_us, "per_second": self.per_second,
            "handler_cpu_us": self.handler_cpu_us,
        })
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &SdkArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 11 });
    let placement = Placement::steadiest();
    let figures = placement.run(|| measure(args, rounds))?;
    let mut findings = Vec::new();
    for cell in CELLS {
        let Some(found) = figures.get(cell.name) else {
            continue;
        };
        if let Some(p50) = median(found.p50_us.clone()) {
            findings.push(Finding::new(
                format!("({}: p50)", cell.name),
                p50,
                Unit::Micros,
            ));
        }
        if let Some(rate) = median(found.per_second.clone()) {
            findings.push(Finding::new(
                format!("({})", cell.name),
                rate,
                Unit::PerSecond,
            ));
        }
    }
    findings.extend(LINES.iter().filter_map(|line| finding(line, &figures)));
    let all = figures
        .iter()
        .map(|(name, of)| (name.to_string(), of.to_json()));
    let sheet = Sheet {
        bench: "sdk",
        about: format!(
            "{rounds} rounds, {WINDOW} in flight or one at a time, {}",
            placement.describe_one()
        ),
        quick: args.quick,
        machine,
        findings,
        rounds: Value::Object(all.collect()),
    };
    Ok(sheet.to_results())
}

fn finding(line: &Line, figures: &BTreeMap<&str, Figures>) -> Option<Finding> {
    let value = |of: &str| -> Option<f64> {
        let figures = figures.get(of)?;
        median(match line.bar {
            Times(_) | Slower(_) | Micros(_) => figures.p50_us.clone(),
            Rates(_) => figures.per_second.clone(),
            Cpu(_) => figures.handler_cpu_us.clone(),
        })
    };
    let of = value(line.of)?;
    let found = match line.to {
        Some(to) => of / value(to)?,
        None => of,
    };
    Some(match line.bar {
        Times(bar) | Cpu(bar) => Finding::new(line.what, found, Unit::Ratio).expect_at_most(bar),
        Rates(bar) | Slower(bar) => {
            Finding::new(line.what, found, Unit::Ratio).expect_at_least(bar)
        }
        Micros(bar) => Finding::new(line.what, found, Unit::Micros).expect_at_most(bar),
    })
}

/// What the workers connect to.
struct Places {
    latzero: Running,
    nats: Option<workers::Broker>,
    redis: Option<workers::Broker>,
    scratch: tempfile::TempDir,
}

impl Places {
    /// The address for a kind of worker; an error says why there is none.
    fn address(&self, kind: &str) -> Result<String, String> {
        let of = |broker: &Option<workers::Broker>, name: &str| match broker {
            Some(broker) => Ok(broker.address.clone()),
            None => Err(format!("{name} is not installed")),
        };
        if kind.contains("nats") {
            return of(&self.nats, "nats-server");
        }
        if kind.contains("redis") {
            return of(&self.redis, "redis-server");
        }
        if kind.contains("zmq") {
            return Ok(self.scratch.path().join("zmq").display().to_string());
        }
        Ok(self.latzero.address(Transport::Unix).to_owned())
    }
}

fn measure(args: &SdkArgs, rounds: u64) -> Result<BTreeMap<&'static str, Figures>, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for the sockets")?;
    let places = Places {
        // Two slots of each block, and the largest has 1 GiB.
        latzero: Running::start(&["limits.memory_bytes_max=8 GiB".to_owned()])?,
        nats: workers::Broker::nats(scratch.path())?,
        redis: workers::Broker::redis(scratch.path())?,
        scratch,
    };
    let mut workers: BTreeMap<String, Worker> = BTreeMap::new();
    let mut present = Vec::new();
    for cell in CELLS {
        match start(args, &places, cell, &mut workers) {
            Ok(()) => present.push(cell),
            Err(why) => eprintln!("LEFT OUT: {}: {why}", cell.name),
        }
    }
    let mut figures: BTreeMap<&str, Figures> = BTreeMap::new();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for cell in &present {
            let found = figures.entry(cell.name).or_default();
            if cell.load == "import" {
                found.p50_us.push(workers::import(args, cell.caller)?);
                continue;
            }
            let calls = if args.quick {
                cell.calls.min(WINDOW)
            } else {
                cell.calls
            };
            let order = Order {
                load: cell.load,
                warmup: if calls >= 50 {
                    (calls / 10).max(1).next_multiple_of(WINDOW)
                } else {
                    0
                },
                calls,
                window: WINDOW,
            };
            let handler = cell.handler.and_then(|kind| workers.get(kind));
            let pid = handler.map(Worker::pid);
            let before = pid.map(workers::cpu_ns);
            let caller = workers.get_mut(&key(cell)).expect("it was started");
            let answer = caller.obey(&order)?;
            if let Some(ns) = answer["p50_ns"].as_f64() {
                found.p50_us.push(ns / 1000.0);
            }
            found.per_second.extend(answer["per_second"].as_f64());
            if let (Some(pid), Some(before)) = (pid, before) {
                let spent = workers::cpu_ns(pid).saturating_sub(before);
                let calls = (order.calls + order.warmup) as f64;
                found.handler_cpu_us.push(spent as f64 / 1000.0 / calls);
            }
        }
    }
    Ok(figures)
}

/// A caller is one process for each handler that it calls.
fn key(cell: &Cell) -> String {
    format!("{} of {}", cell.caller, cell.handler.unwrap_or_default())
}

/// Starts the workers of a measurement that do not run yet.
fn start(
    args: &SdkArgs,
    places: &Places,
    cell: &Cell,
    workers: &mut BTreeMap<String, Worker>,
) -> Result<(), String> {
    if cell.load == "import" {
        return workers::command(args, cell.caller).map(drop);
    }
    let trigger = cell.handler.unwrap_or("none").replace([' ', '_'], "-");
    let wanted = [
        cell.handler.map(|kind| (kind.to_owned(), kind)),
        Some((key(cell), cell.caller)),
    ];
    for (key, kind) in wanted.into_iter().flatten() {
        if let Entry::Vacant(place) = workers.entry(key) {
            let mut command = workers::command(args, kind)?;
            command.arg(places.address(kind)?).arg(&trigger);
            let worker = Worker::start(kind, &mut command).map_err(|why| why.to_string())?;
            place.insert(worker);
        }
    }
    Ok(())
}
