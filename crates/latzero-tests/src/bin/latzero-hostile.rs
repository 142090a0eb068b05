//! Measures how long calls of a well-behaved client take while a hostile client attacks: `cargo
//! xtask hostile`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use latzero_tests::Server;
use latzero_tests::hostile::{Innocent, KINDS, Kind, MEMORY_MAX, RESIDENT_MAX, resident_peak};
use serde_json::{Value, json};

const HELP: &str = "\
cargo xtask hostile [--seconds N] [--only TEXT] [--everywhere] [--json]

Measures calls of a well-behaved client without and with each kind of hostile client, and the
server's peak resident memory. The hostile client has a processor of its own, so that the times
are the server's; with --everywhere all have all of them, and the kernel's time slices of some
milliseconds count too. The first line has no hostile client, only busy processors: the server
does not cause these times. N seconds for each kind [default: 3]; TEXT is part of a kind's name.
";

/// No attack: what busy processors alone cost, to compare the others with.
const BUSY: Kind = Kind {
    name: "no attack, busy processors",
    attack: |_| {
        let end = Instant::now() + Duration::from_millis(100);
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| while Instant::now() < end {});
            }
        });
        Vec::new()
    },
    is_compared: false,
};

/// Whose processors a thread has, and the threads and processes that it starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    /// The server's and the well-behaved client's: all but the last.
    Server,
    /// The hostile client's: the last.
    Hostile,
}

/// Leaves this thread the processors of a side, if there are several.
fn confine(side: Side) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    // Once, because the threads of one side come from the other's.
    static ALL: std::sync::OnceLock<Option<CpuSet>> = std::sync::OnceLock::new();
    let Some(all) = ALL.get_or_init(|| sched_getaffinity(None).ok()) else {
        return;
    };
    let last = (0..CpuSet::MAX_CPU).rfind(|cpu| all.is_set(*cpu));
    let mut own = CpuSet::new();
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)) {
        if (side == Side::Hostile) == (last == Some(cpu)) {
            own.set(cpu);
        }
    }
    if all.count() > 1
        && let Err(error) = sched_setaffinity(None, &own)
    {
        eprintln!("server and hostile client share the processors: {error}");
    }
}

/// The longest that a call may take during an attack.
const MAX_MS: f64 = 50.0;

/// The duration of each call.
struct Times {
    sorted: Vec<Duration>,
}

impl Times {
    fn at(&self, quantile: f64) -> f64 {
        let last = self.sorted.len().saturating_sub(1);
        let at = (self.sorted.len() as f64 * quantile) as usize;
        let time = self.sorted.get(at.min(last));
        time.map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    }

    /// p50, p99 and the maximum in milliseconds.
    fn figures(&self) -> [f64; 3] {
        [self.at(0.5), self.at(0.99), self.at(1.0)]
    }
}

/// Makes calls until `is_enough` returns true.
fn calls(innocent: &mut Innocent, mut is_enough: impl FnMut() -> bool) -> Times {
    let mut sorted = Vec::new();
    while !is_enough() {
        sorted.push(innocent.call());
        // Without a pause, this client would be a load itself.
        std::thread::sleep(Duration::from_micros(300));
    }
    sorted.sort_unstable();
    Times { sorted }
}

/// Measures one kind: calls before the attack, calls during it, and the server's peak memory.
fn measure(kind: &Kind, time: Duration, is_confined: bool) -> (Times, Times, u64) {
    if is_confined {
        confine(Side::Server);
    }
    let server = Server::with(&[MEMORY_MAX]);
    let mut innocent = Innocent::new(&server);
    let end = Instant::now() + time;
    let quiet = calls(&mut innocent, || Instant::now() >= end);
    let is_over = AtomicBool::new(false);
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| {
            if is_confined {
                confine(Side::Hostile);
            }
            let end = Instant::now() + time;
            let mut held = Vec::new();
            while Instant::now() < end {
                // The connections of one attack stay open until the next attack has its own.
                let more = (kind.attack)(&server);
                held = more;
            }
            is_over.store(true, Ordering::Release);
            drop(held);
        });
        calls(&mut innocent, || is_over.load(Ordering::Acquire))
    });
    (quiet, beside, resident_peak(&server))
}

fn main() -> ExitCode {
    let (mut seconds, mut only, mut is_json, mut is_confined) = (3, String::new(), false, true);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let taken = match arg.as_str() {
            "--json" => {
                is_json = true;
                true
            }
            "--everywhere" => {
                is_confined = false;
                true
            }
            "--seconds" => args
                .next()
                .and_then(|text| text.parse().ok())
                .map(|n: u64| seconds = n)
                .is_some(),
            "--only" => args.next().map(|text| only = text).is_some(),
            _ => false,
        };
        if !taken {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    }
    let mut rows: Vec<Value> = Vec::new();
    if !is_json {
        println!(
            "{:34} {:>24}   {:>24}   {:>9}",
            "milliseconds of a call", "quiet p50 p99 max", "beside p50 p99 max", "peak MiB"
        );
    }
    let mut is_well = true;
    let kinds = std::iter::once(&BUSY).chain(KINDS);
    for kind in kinds.filter(|kind| kind.name.contains(&only)) {
        let (quiet, beside, peak) = measure(kind, Duration::from_secs(seconds), is_confined);
        let ([q50, q99, q_max], [b50, b99, b_max]) = (quiet.figures(), beside.figures());
        let is_fast = b99 <= 2.0 * q99 + 2.0 && b_max < MAX_MS;
        let is_small = peak <= RESIDENT_MAX;
        is_well &= is_fast && is_small;
        rows.push(json!({
            "kind": kind.name, "calls": beside.sorted.len(), "well": is_fast && is_small,
            "quiet_ms": {"p50": q50, "p99": q99, "max": q_max},
            "beside_ms": {"p50": b50, "p99": b99, "max": b_max},
            "resident_peak_bytes": peak, "resident_max_bytes": RESIDENT_MAX,
        }));
        if !is_json {
            let peak = peak >> 20;
            let mark = match (is_fast, is_small) {
                (true, true) => "",
                (false, true) => "  slow",
                (true, false) => "  large",
                (false, false) => "  slow, large",
            };
            println!(
                "{:34} {q50:8.2}{q99:8.2}{q_max:8.2}   {b50:8.2}{b99:8.2}{b_max:8.2}   \
                 {peak:>5}/{}{mark}",
                kind.name,
                RESIDENT_MAX >> 20
            );
        }
    }
    if is_json {
        println!("{}", json!({"kinds": rows}));
    }
    if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
