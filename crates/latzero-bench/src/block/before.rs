//! The server's block operations compared with another server, for example one built before a
//! change: flushes, and writes, reads and new blocks through the server.
//!
//! Two servers run at the same time, and each operation is done on both in turn, in changing order,
//! so that changes of the machine affect both. Every pair of servers is started afresh, because the
//! placement in memory and on the processor can matter more than the difference to be measured.

use super::{BlockArgs, MIB, app, did, middle, us};
use crate::failure::{During, Failure};
use crate::placement::Placement;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::{Running, check_program, program};
use crate::stream::Transport;
use latzero::blocking::{App, Block};
use serde_json::{Map, json};
use std::path::Path;
use std::time::Instant;
use tempfile::TempDir;

/// The largest ratio to the other server's time: for a flush, and for any other operation.
const FLUSH_RATIO_MAX: f64 = 1.2;
const RATIO_MAX: f64 = 1.05;

/// The number of server pairs.
const PAIRS: u64 = 15;

/// Bytes that are written and read through the server.
const SMALL_BYTES: usize = 4096;

/// One of the two servers, and a block there of each kind.
struct Contestant {
    /// The app that maps blocks.
    mapped: App,
    persistent: Block,
    /// A block that the same app uses over TCP, so that the server copies it.
    copied: Block,
    copied_persistent: Block,
    _server: Running,
    /// Dropped last.
    _scratch: TempDir,
}

impl Contestant {
    fn start(program: &Path) -> Result<Self, Failure> {
        let scratch = tempfile::tempdir().during("make a directory for the server")?;
        let server = Running::start_program(program, scratch.path(), &[])?;
        let unix = server.address(Transport::Unix);
        let mapped = app(&format!("latzero://mapping?socket={unix}"))?;
        let tcp = server.address(Transport::Tcp);
        let copies = app(&format!("latzero://copying@{tcp}"))?;
        let make = |app: &App, name: &str, is_persistent: bool| {
            let create = app.block(name).create(MIB as u64);
            let create = match is_persistent {
                true => create.persistent(),
                false => create,
            };
            let block = did("make a block", create.send())?;
            did("fill a block", block.write_at(0, &vec![1; MIB]))?;
            Ok::<_, Failure>(block)
        };
        Ok(Self {
            persistent: make(&mapped, "persistent", true)?,
            copied: make(&copies, "copied", false)?,
            copied_persistent: make(&copies, "copied-persistent", true)?,
            mapped,
            _server: server,
            _scratch: scratch,
        })
    }
}

/// One operation, and how long it takes in microseconds.
struct Operation {
    name: &'static str,
    ratio_max: f64,
    run: fn(&Contestant) -> Result<f64, Failure>,
}

const OPERATIONS: [Operation; 6] = [
    Operation {
        name: "flush of 1 MiB with 4 KiB changed",
        ratio_max: FLUSH_RATIO_MAX,
        run: |on| {
            did("write", on.persistent.write_at(0, &[2; SMALL_BYTES]))?;
            timed("flush", || on.persistent.flush())
        },
    },
    Operation {
        name: "flush of 1 MiB, all of it changed",
        ratio_max: FLUSH_RATIO_MAX,
        run: |on| {
            did("write", on.persistent.write_at(0, &vec![3; MIB]))?;
            timed("flush", || on.persistent.flush())
        },
    },
    Operation {
        name: "write of 4 KiB by a copy",
        ratio_max: RATIO_MAX,
        run: |on| timed("write", || on.copied.write_at(0, &[4; SMALL_BYTES])),
    },
    Operation {
        name: "write of 4 KiB by a copy, persistent",
        ratio_max: RATIO_MAX,
        run: |on| {
            timed("write", || {
                on.copied_persistent.write_at(0, &[5; SMALL_BYTES])
            })
        },
    },
    Operation {
        name: "read of 4 KiB by a copy",
        ratio_max: RATIO_MAX,
        run: |on| timed("read", || on.copied.read_into(0, &mut [0; SMALL_BYTES])),
    },
    Operation {
        name: "a new block of 64 KiB, until it is removed",
        ratio_max: RATIO_MAX,
        run: |on| {
            timed("make and remove a block", || {
                on.mapped.block("new").create(64 * 1024).send()?.remove()
            })
        },
    },
];

fn timed<T>(what: &str, run: impl FnOnce() -> Result<T, latzero::Error>) -> Result<f64, Failure> {
    let begin = Instant::now();
    did(what, run())?;
    Ok(us(begin))
}

/// Compares this server with the program `before`.
pub(super) fn run(args: &BlockArgs, before: &Path, mut sheet: Sheet) -> Result<Results, Failure> {
    check_program()?;
    let samples = args.samples.unwrap_or(if args.quick { 2 } else { 2000 });
    let pairs = if args.quick { 1 } else { PAIRS };
    let each = samples.div_ceil(pairs);
    let placement = Placement::steadiest();
    let mut medians: [Vec<[f64; 2]>; OPERATIONS.len()] = Default::default();
    for pair in 1..=pairs {
        eprintln!("blocks beside another server's: pair {pair} of {pairs}");
        let found = placement.run(|| measure(before, each, pair % 2 == 1))?;
        for (of_all, of_pair) in medians.iter_mut().zip(found) {
            of_all.push(of_pair);
        }
    }
    let mut rounds = Map::new();
    for (operation, of_pairs) in OPERATIONS.iter().zip(medians) {
        sheet.findings.extend(evaluate(operation, &of_pairs));
        rounds.insert(operation.name.into(), json!(of_pairs));
    }
    sheet.about = format!(
        "blocks beside another server's, {pairs} pairs of servers, {each} samples of each kind in \
         a pair, {}; medians",
        placement.describe_one()
    );
    sheet.rounds = rounds.into();
    Ok(sheet.to_results())
}

/// The median time of each operation with one pair of servers: before and now.
fn measure(before: &Path, samples: u64, is_first: bool) -> Result<Vec<[f64; 2]>, Failure> {
    let [older, newer] = match is_first {
        true => [Contestant::start(before)?, Contestant::start(&program())?],
        false => {
            let newer = Contestant::start(&program())?;
            [Contestant::start(before)?, newer]
        }
    };
    let contestants = [older, newer];
    let mut medians = Vec::new();
    for operation in &OPERATIONS {
        let mut times: [Vec<f64>; 2] = Default::default();
        let warmup = samples / 10;
        for sample in 0..warmup + samples {
            let first = usize::from(sample % 2 == 1);
            for place in [first, 1 - first] {
                let time = (operation.run)(&contestants[place])?;
                if sample >= warmup {
                    times[place].push(time);
                }
            }
        }
        medians.push(times.map(|times| middle(&times)));
    }
    Ok(medians)
}

/// Ratios are computed per pair first, so that their spread shows how reliable they are.
fn evaluate(operation: &Operation, pairs: &[[f64; 2]]) -> [Finding; 5] {
    let name = operation.name;
    let of = |place: usize| middle(&pairs.iter().map(|pair| pair[place]).collect::<Vec<_>>());
    let ratios: Vec<f64> = pairs.iter().map(|[before, now]| now / before).collect();
    let lowest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = ratios.iter().copied().fold(0.0, f64::max);
    let times = |what: &str, value| Finding::new(format!("… {what}"), value, Unit::Ratio);
    [
        Finding::new(name, of(1), Unit::Micros),
        Finding::new("… before", of(0), Unit::Micros),
        times("now ÷ before", middle(&ratios)).expect_at_most(operation.ratio_max),
        times("lowest pair", lowest),
        times("highest pair", highest),
    ]
}
