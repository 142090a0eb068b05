//! A server that knows many apps: its start, its memory, and handshakes of known and new apps.
//!
//! The apps are written through the store once, and each round uses a copy of that database. The
//! database says that the machine has rebooted since, so the first start of a round checks it
//! completely. The second start follows a kill, and the third an orderly stop.

use super::parked::rows_per_second;
use super::{DurableArgs, Found};
use crate::failure::{During, Failure};
use crate::report::median;
use crate::results::{Finding, Unit};
use crate::server::{Memory, Running, data_dir};
use crate::stream::Transport;
use crate::wire::Wire;
use latzero_store::{AppRow, Options, RowChange};
use serde::Serialize;
use serde_json::json;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

const START_MS_MAX: f64 = 500.0;
const HANDSHAKE_MICROS_MAX: f64 = 1_000.0;

/// Known apps whose handshake is timed in a round; as many pings are timed for comparison.
const RETURNS: u64 = 2_000;
/// New apps whose handshake is timed in a round.
const NEWCOMERS: u64 = 300;

/// How long SQLite writes rows for comparison.
const ROWS_TIME: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize)]
struct Round {
    /// The time from exec to the ready line, by what preceded the start.
    start_ms: [f64; After::ALL.len()],
    memory: Memory,
    /// The memory of a server that knows no apps.
    memory_empty: Memory,
    ping: Micros,
    returning: Micros,
    newcomer: Micros,
    sqlite_row_micros: f64,
}

/// What preceded a start, in the order of a round.
#[derive(Clone, Copy)]
enum After {
    NewBoot,
    Kill,
    End,
}

impl After {
    const ALL: [Self; 3] = [Self::NewBoot, Self::Kill, Self::End];

    fn describe(self) -> &'static str {
        match self {
            Self::NewBoot => "a new start of the machine",
            Self::Kill => "a kill",
            Self::End => "an orderly end",
        }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Micros {
    p50: f64,
    p99: f64,
}

impl Micros {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |part: f64| {
            let place = (times.len() as f64 * part) as usize;
            times[place.min(times.len() - 1)].as_secs_f64() * 1e6
        };
        Self {
            p50: at(0.5),
            p99: at(0.99),
        }
    }
}

pub(super) fn run(args: &DurableArgs) -> Result<Found, Failure> {
    let known = args.or(args.known, 100_000, 500);
    let rounds = args.rounds();
    eprintln!("known apps: {known} are written");
    let seed = tempfile::tempdir().during("make a directory for the known apps")?;
    write_apps(seed.path(), known)?;
    let mut all = Vec::new();
    for round in 1..=rounds {
        eprintln!("known apps: round {round} of {rounds}");
        all.push(measure(args, seed.path(), known)?);
    }

    let middle = |value: &dyn Fn(&Round) -> f64| {
        median(all.iter().map(value).collect()).expect("there was a round")
    };
    let mut findings = Vec::new();
    for after in After::ALL {
        let value = |round: &Round| round.start_ms[after as usize];
        let name = format!("{known} known apps, start after {}", after.describe());
        findings.extend([
            Finding::new(&name, middle(&value), Unit::Millis).expect_at_most(START_MS_MAX),
            Finding::new(
                format!("{name}: longest"),
                all.iter().map(value).fold(0.0, f64::max),
                Unit::Millis,
            ),
        ]);
    }
    let mebibytes = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    let each =
        |round: &Round| round.memory.since(round.memory_empty).resident as f64 / known as f64;
    findings.extend([
        Finding::new(
            "resident memory then",
            middle(&|round| mebibytes(round.memory.resident)),
            Unit::Mebibytes,
        ),
        Finding::new("memory of each known app", middle(&each), Unit::Bytes),
        Finding::new("a ping: p50", middle(&|round| round.ping.p50), Unit::Micros),
        Finding::new(
            "handshake of a known app: p50",
            middle(&|round| round.returning.p50),
            Unit::Micros,
        )
        .expect_at_most(HANDSHAKE_MICROS_MAX),
        Finding::new(
            "handshake of a known app: p99",
            middle(&|round| round.returning.p99),
            Unit::Micros,
        ),
        Finding::new(
            "handshake of a known app: p50 ÷ a ping",
            middle(&|round| round.returning.p50 / round.ping.p50),
            Unit::Ratio,
        ),
        Finding::new(
            "handshake of a new app: p50",
            middle(&|round| round.newcomer.p50),
            Unit::Micros,
        ),
        Finding::new(
            "handshake of a new app: p50 ÷ SQLite's commit of a row",
            middle(&|round| round.newcomer.p50 / round.sqlite_row_micros),
            Unit::Ratio,
        ),
    ]);
    Ok(Found {
        findings,
        rounds: json!({"known": known, "rounds": all}),
    })
}

fn app_id(number: u64) -> String {
    format!("known-app-{number:07}")
}

/// Writes rows of apps that are in two pools and serve two triggers, as the server does.
fn write_apps(scratch: &Path, known: u64) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::said(format!("the store: {error}"));
    let dir = data_dir(scratch);
    DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .during("make a data directory")?;
    let options = Options {
        boot_id: "another run of the machine".into(),
        ..Options::default()
    };
    let store = latzero_store::open(&dir, options)
        .map_err(|error| failed(&error))?
        .store;
    let trigger = |name: &str| {
        json!({"name": name, "pools": null, "strategy": "round_robin",
        "concurrency": null, "doc": null})
    };
    let triggers = json!([trigger("resize"), trigger("rotate")]).to_string();
    let numbers: Vec<u64> = (0..known).collect();
    for some in numbers.chunks(1_000) {
        let put = |&number: &u64| {
            RowChange::PutApp(AppRow {
                app_id: app_id(number),
                pools: json!([format!("team-{:02}", number % 100), "shared"]).to_string(),
                triggers: triggers.clone(),
                watches: r#"{"events":[],"blocks":[]}"#.into(),
                meta: Some(r#"{"version":"1.0.0","language":"rust"}"#.into()),
                protocol_version: 1,
                registered: 1_700_000_000_000,
                last_seen: 1_700_000_000_000,
            })
        };
        store
            .commit(some.iter().map(put).collect())
            .map_err(|error| failed(&error))?;
    }
    store.close().map_err(|error| failed(&error))
}

fn measure(args: &DurableArgs, seed: &Path, known: u64) -> Result<Round, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for the server")?;
    let dir = data_dir(scratch.path());
    DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .during("make a data directory")?;
    let database = dir.join(latzero_store::DATABASE);
    fs::copy(data_dir(seed).join(latzero_store::DATABASE), &database)
        .and_then(|_| fs::File::open(&database)?.sync_all())
        .during("copy the known apps")?;
    // Leaves room for the new apps.
    let settings = [format!("limits.apps_max={}", known + 10_000)];
    let start = || -> Result<_, Failure> {
        let begin = Instant::now();
        let server = Running::start_in(scratch.path(), &settings)?;
        Ok((server, begin.elapsed().as_secs_f64() * 1000.0))
    };
    let (killed, new_boot) = start()?;
    drop(killed);
    let (ended, after_kill) = start()?;
    ended.end_orderly()?;
    let (server, after_end) = start()?;
    let memory = server.memory()?;
    let memory_empty = Running::start(&[])?.memory()?;

    let (returns, newcomers) = if args.quick {
        (50, 5)
    } else {
        (RETURNS.min(known), NEWCOMERS)
    };
    // A stride without a common divisor reaches each app once; this stride is prime.
    let back = (0..returns).map(|n| json!({"app_id": app_id(n * 7_919 % known)}));
    let new = (0..newcomers).map(
        |n| json!({"app_id": format!("new-app-{n}"), "pools": ["shared"], "triggers": ["crop"]}),
    );
    let (returning, mut open) = time_handshakes(&server, back, true)?;
    let ping = time_pings(&mut open[0], returns)?;
    // The known apps stay connected, so that no writes for their disconnects interfere.
    let (newcomer, _new) = time_handshakes(&server, new, false)?;
    Ok(Round {
        start_ms: [new_boot, after_kill, after_end],
        memory,
        memory_empty,
        ping,
        returning,
        newcomer,
        sqlite_row_micros: 1e6 / rows_per_second(ROWS_TIME)?,
    })
}

/// Connects one handshake after the other; the connections stay open. The time is measured from
/// before connect(2) until the acknowledgement has been read.
fn time_handshakes(
    server: &Running,
    handshakes: impl Iterator<Item = serde_json::Value>,
    rehydrated: bool,
) -> Result<(Micros, Vec<Wire>), Failure> {
    let mut times = Vec::new();
    let mut open = Vec::new();
    for handshake in handshakes {
        let begin = Instant::now();
        let mut wire = Wire::open(server, Transport::Unix)?;
        let ack = wire.introduce(handshake)?;
        times.push(begin.elapsed());
        if ack["rehydrated"] != rehydrated || ack["stored"] == false {
            return Err(Failure::said(format!(
                "an app was to be restored: {rehydrated}; the server says {ack}"
            )));
        }
        open.push(wire);
    }
    Ok((Micros::of(times), open))
}

fn time_pings(wire: &mut Wire, count: u64) -> Result<Micros, Failure> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begin = Instant::now();
        wire.call(r#"{"action":"ping","id":"p"}"#)?;
        times.push(begin.elapsed());
    }
    Ok(Micros::of(times))
}
