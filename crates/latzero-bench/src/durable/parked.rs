//! Parked calls: each is on disk before its caller gets the acknowledgement.
//!
//! One thread plays all callers, so that switching between them is not measured. Each has its own
//! connection and app. For comparison, SQLite writes the rows of such calls to the same tables on
//! the same file system, one row per transaction, with the settings of the store.
//!
//! After each turn the server is killed, and its database is searched for every call that was
//! acknowledged.

use super::{DurableArgs, Found};
use crate::failure::{During, Failure};
use crate::frame::PAYLOAD;
use crate::report::median;
use crate::results::{Finding, Unit};
use crate::server::{Running, data_dir};
use crate::stream::Transport;
use crate::wire::{Fill, Wire, parse};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// The fewest parked calls per second that many callers must reach.
const RATE_MIN: f64 = 10_000.0;

/// How long the server may send nothing to any caller.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// The number of callers, and of calls that each has in flight.
#[derive(Clone, Copy)]
struct Crowd {
    callers: usize,
    each: u64,
    rate_min: Option<f64>,
}

const CROWDS: [Crowd; 3] = [
    Crowd {
        callers: 1,
        each: 1,
        rate_min: None,
    },
    Crowd {
        callers: 64,
        each: 1,
        rate_min: Some(RATE_MIN),
    },
    Crowd {
        callers: 64,
        each: 4,
        rate_min: None,
    },
];

impl Crowd {
    fn describe(self) -> String {
        match (self.callers, self.each) {
            (1, 1) => "1 caller".to_owned(),
            (callers, 1) => format!("{callers} callers"),
            (callers, each) => format!("{callers} callers, {each} calls each"),
        }
    }
}

/// One turn of one group of callers.
#[derive(Clone, Copy, Debug, Serialize)]
struct Turn {
    parked: u64,
    elapsed_ms: f64,
    per_second: f64,
    /// The average number of rows in one of the store's transactions, including rows of handshakes.
    rows_per_transaction: f64,
}

pub(super) fn run(args: &DurableArgs) -> Result<Found, Failure> {
    let time = Duration::from_millis(args.or(args.park_ms, 2_000, 100));
    let rounds = args.rounds();
    let mut alone = Vec::new();
    let mut turns: [Vec<Turn>; CROWDS.len()] = Default::default();
    for round in 1..=rounds {
        eprintln!("parked calls: round {round} of {rounds}");
        alone.push(rows_per_second(time)?);
        for (crowd, turns) in CROWDS.into_iter().zip(&mut turns) {
            let turn = take_turn(crowd, time)
                .map_err(|failure| Failure::said(format!("{}: {failure}", crowd.describe())))?;
            turns.push(turn);
        }
    }

    let middle = |values: Vec<f64>| median(values).expect("there was a round");
    let base = middle(alone.clone());
    let mut findings = vec![Finding::new(
        "SQLite alone, a row per commit",
        base,
        Unit::PerSecond,
    )];
    for (crowd, turns) in CROWDS.into_iter().zip(&turns) {
        let name = format!("parked, {}", crowd.describe());
        let rate = middle(turns.iter().map(|turn| turn.per_second).collect());
        let finding = Finding::new(&name, rate, Unit::PerSecond);
        let ratios = turns
            .iter()
            .zip(&alone)
            .map(|(t, base)| t.per_second / base);
        findings.extend([
            match crowd.rate_min {
                Some(bound) => finding.expect_at_least(bound),
                None => finding,
            },
            Finding::new(
                format!("{name}: ÷ SQLite alone"),
                middle(ratios.collect()),
                Unit::Ratio,
            ),
        ]);
    }
    let of_crowds = CROWDS.iter().zip(&turns).map(
        |(crowd, turns)| json!({"callers": crowd.callers, "each": crowd.each, "turns": turns}),
    );
    Ok(Found {
        findings,
        rounds: json!({
            "sqlite_rows_per_second": alone,
            "crowds": of_crowds.collect::<Vec<_>>(),
        }),
    })
}

/// SQLite's own rate: the rows of parked calls, each in its own transaction, with the store's
/// schema and pragmas.
pub(super) fn rows_per_second(time: Duration) -> Result<f64, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for SQLite")?;
    make_database(scratch.path())?;
    let failed = |error: rusqlite::Error| Failure::said(format!("SQLite: {error}"));
    let path = scratch.path().join(latzero_store::DATABASE);
    let conn = rusqlite::Connection::open(path).map_err(failed)?;
    conn.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = 1000;",
    )
    .map_err(failed)?;
    let mut insert = conn
        .prepare(
            "INSERT INTO parked_calls (number, pool, process, destination, caller, call_id, \
             envelope, attachment, \
             idempotency_key, expires, attempt, parked) \
             VALUES (?1, 'bench', 'late', NULL, 'caller-00', ?2, ?3, NULL, NULL, ?4, 0, ?5)",
        )
        .map_err(failed)?;
    let begin = Instant::now();
    let mut rows = 0_i64;
    while begin.elapsed() < time {
        let id = format!("{rows}");
        // The envelope as the server writes it.
        let envelope = format!(
            r#"{{"instance":"0123456789abcdef","call":{{"action":"trigger","process":"late","id":"{id}","data":{PAYLOAD},"park":true}}}}"#
        );
        insert
            .execute((
                rows,
                id,
                envelope,
                4_000_000_000_000_i64,
                1_700_000_000_000_i64,
            ))
            .map_err(failed)?;
        rows += 1;
    }
    Ok(rows as f64 / begin.elapsed().as_secs_f64())
}

fn make_database(dir: &Path) -> Result<(), Failure> {
    let opened = latzero_store::open(dir, latzero_store::Options::default())
        .map_err(|error| Failure::said(error.to_string()))?;
    opened
        .store
        .close()
        .map_err(|error| Failure::said(error.to_string()))
}

/// Runs a private server and its callers, kills it and checks its database.
fn take_turn(crowd: Crowd, time: Duration) -> Result<Turn, Failure> {
    let scratch = tempfile::tempdir().during("make a directory for the server")?;
    // No handler takes the calls, so all of a turn wait together.
    let settings = ["limits.parked_max=10000000", "limits.parked_bytes_max=8GiB"];
    let server = Running::start_in(scratch.path(), &settings.map(str::to_owned))?;
    let mut callers = Callers::connect(&server, crowd)?;
    callers.run(time / 5, crowd.each)?;
    let mut observer = Wire::connect(&server, Transport::Unix, json!({"app_id": "observer"}))?;
    let before = Commits::of(&mut observer)?;
    let already = callers.parked;
    let begin = Instant::now();
    callers.run(time, crowd.each)?;
    let elapsed = begin.elapsed();
    let parked = callers.parked - already;
    let after = Commits::of(&mut observer)?;
    let all = callers.parked;
    // The server is killed, so the disk has only what was written by now.
    drop(server);
    check_kept(scratch.path(), all)?;
    Ok(Turn {
        parked,
        elapsed_ms: elapsed.as_secs_f64() * 1000.0,
        per_second: parked as f64 / elapsed.as_secs_f64(),
        rows_per_transaction: (after.changes - before.changes) as f64
            / (after.commits - before.commits).max(1) as f64,
    })
}

/// Fails if a call that was acknowledged as parked is not in the database.
fn check_kept(scratch: &Path, parked: u64) -> Result<(), Failure> {
    let opened = latzero_store::open(&data_dir(scratch), latzero_store::Options::default())
        .map_err(|error| Failure::said(error.to_string()))?;
    let kept = opened.contents.calls.len() as u64;
    if kept < parked {
        return Err(Failure::said(format!(
            "{parked} calls were parked, and {kept} are in the database after the server was killed"
        )));
    }
    Ok(())
}

/// The store's counters so far.
struct Commits {
    commits: u64,
    changes: u64,
}

impl Commits {
    fn of(observer: &mut Wire) -> Result<Self, Failure> {
        let stats = observer.ask(r#"{"action":"stats","id":"s"}"#)?;
        let count = |name: &str| {
            stats["response"]["store"][name]
                .as_u64()
                .ok_or_else(|| Failure::said(format!("no store.{name} in {stats}")))
        };
        Ok(Self {
            commits: count("commits")?,
            changes: count("changes")?,
        })
    }
}

/// Callers whose calls wait for a handler that never comes.
struct Callers {
    wires: Vec<Wire>,
    poll: Poll,
    next_id: u64,
    /// Calls that were acknowledged as parked.
    parked: u64,
}

impl Callers {
    fn connect(server: &Running, crowd: Crowd) -> Result<Self, Failure> {
        let poll = Poll::new().during("make a poll")?;
        let mut wires = Vec::new();
        for number in 0..crowd.callers {
            let handshake = json!({"app_id": format!("caller-{number:02}"), "pools": ["bench"]});
            let wire = Wire::connect(server, Transport::Unix, handshake)?;
            wire.set_nonblocking()?;
            poll.registry()
                .register(
                    &mut SourceFd(&wire.as_raw_fd()),
                    Token(number),
                    Interest::READABLE,
                )
                .during("watch a connection")?;
            wires.push(wire);
        }
        Ok(Self {
            wires,
            poll,
            next_id: 0,
            parked: 0,
        })
    }

    /// Keeps `each` calls of each caller in flight for `time`, and returns when the last of them is
    /// parked.
    fn run(&mut self, time: Duration, each: u64) -> Result<(), Failure> {
        let deadline = Instant::now() + time;
        let mut in_flight = 0;
        for caller in 0..self.wires.len() {
            self.call(caller, each)?;
            in_flight += each;
        }
        let mut events = Events::with_capacity(self.wires.len());
        while in_flight > 0 {
            self.poll
                .poll(&mut events, Some(SILENCE_MAX))
                .during("wait for the server")?;
            if events.is_empty() {
                return Err(Failure::said("the server parks no more calls"));
            }
            let is_over = Instant::now() >= deadline;
            for event in &events {
                let caller = event.token().0;
                let parked = self.take_parked(caller)?;
                self.parked += parked;
                if is_over {
                    in_flight -= parked;
                } else if parked > 0 {
                    self.call(caller, parked)?;
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, caller: usize, count: u64) -> Result<(), Failure> {
        let wire = &mut self.wires[caller];
        for _ in 0..count {
            let id = self.next_id;
            self.next_id += 1;
            wire.append(&format!(
                r#"{{"action":"trigger","id":"{id}","process":"late","pool":"bench","park":true,"ttl":3600000,"data":{PAYLOAD}}}"#
            ));
        }
        wire.flush()
    }

    /// Reads all acknowledgements that a caller has received.
    fn take_parked(&mut self, caller: usize) -> Result<u64, Failure> {
        #[derive(Deserialize)]
        struct Reply<'a> {
            status: Option<&'a str>,
        }
        let wire = &mut self.wires[caller];
        let mut count = 0;
        loop {
            match wire.fill()? {
                Fill::Some => {}
                Fill::Nothing => return Ok(count),
                Fill::End => return Err(Failure::said("the server closed the connection")),
            }
            while let Some(message) = wire.received()? {
                if parse::<Reply<'_>>(message)?.status != Some("parked") {
                    return Err(Failure::said(format!(
                        "a call was not parked but answered with {}",
                        String::from_utf8_lossy(message)
                    )));
                }
                count += 1;
            }
        }
    }
}
