//! The cost of encryption: a call in a plain and in an encrypted pool of one server, a change of a
//! large block, and a call over TLS.
//!
//! Caller and handler are two apps of this process, so that the two pools differ only in the keys.
//! Turns are interleaved, and the encrypted pool is reported as a multiple of the plain one. In
//! addition, the time to seal a large message is compared with the cipher alone, calls are timed
//! beside clients that try to send 10,000 wrong proofs a second, and so are refusals of proofs with
//! different faults.

mod blocks;
mod joins;
mod refusals;
mod tls;

use std::time::Instant;

use joins::Guessed;
use latzero::blocking::App;
use latzero::{Bytes, HandlerError, Keys};
use latzero_crypto::Suite;
use latzero_crypto::envelope::{self, Body, Header, Kind};
use latzero_crypto::keys::{KeySet, Kind as KeyKind, NewKeys, Secret};
use serde_json::json;

use crate::failure::Failure;
use crate::machine::Machine;
use crate::placement::Placement;
use crate::plan::{Latency, Load, Outcome, Plan, time_each};
use crate::report::median;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::Running;
use crate::stream::Transport;

/// The largest ratio of a call's time to that in a plain pool.
const CALL_RATIO_MAX: f64 = 1.15;

/// The largest ratio of a call's time over TLS to that over plain TCP.
const TLS_RATIO_MAX: f64 = 1.4;

/// The largest ratio of the 99th percentile of a call's time beside wrong proofs to that without.
const JOINS_RATIO_MAX: f64 = 1.2;

/// The largest ratio between the times of refusing proofs with different faults.
const REFUSALS_RATIO_MAX: f64 = 1.1;

/// The longest that a TLS handshake may occupy a loop, in microseconds.
const HANDSHAKE_MICROS_MAX: f64 = 1000.0;

/// The lowest speed of sealing a message, as a ratio to the cipher alone.
const SEAL_RATIO_MIN: f64 = 0.7;

/// The largest ratio of the time of a version of a large block that changes one chunk to the time
/// of sealing that chunk.
const PUBLISH_RATIO_MAX: f64 = 3.0;

/// The size in bytes of a call, and of a large message.
const SMALL: usize = 64;
const LARGE: usize = 64 * 1024;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct KeysArgs {
    /// Few calls and one round: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON, every round of them
    #[arg(long)]
    pub(crate) json: bool,
    /// Rounds, in each of which both pools have their turn [default: 15]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
    /// Calls in one turn [default: 3000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    calls: Option<u64>,
}

/// The pools, the plain one first.
const POOLS: [&str; 2] = ["plain", "sealed"];

fn failed(what: &'static str) -> impl Fn(latzero::Error) -> Failure {
    move |error| Failure::said(format!("{what}: {error}"))
}

fn key_set() -> KeySet {
    KeySet::new_pool(NewKeys {
        sigil: Secret::new([1; 32]),
        shard: Secret::new([2; 32]),
        seal: Secret::new([3; 32]),
        owner: None,
    })
}

fn keys() -> Result<Keys, Failure> {
    let set = key_set();
    let tokens = [KeyKind::Sigil, KeyKind::Shard, KeyKind::Seal].map(|kind| set.token(kind));
    let tokens = tokens.iter().flatten().map(|token| token.as_str());
    Keys::from_tokens(tokens).map_err(failed("keys"))
}

/// Runs the benchmark.
pub(crate) fn run(args: &KeysArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let rounds = args.rounds.unwrap_or(if args.quick { 1 } else { 15 });
    let calls = args.calls.unwrap_or(if args.quick { 100 } else { 3_000 });
    let placement = Placement::steadiest();
    let place = placement.describe_one();
    let handshakes = if args.quick { 5 } else { 300 };
    let (cells, sealing, (publishing, chunk), over, handshake) = placement.run(|| {
        let cells = measure(rounds, calls)?;
        let over = tls::measure(rounds, calls)?;
        Ok((
            cells,
            sealing(args.quick),
            blocks::measure(args.quick)?,
            over,
            tls::handshake(handshakes)?,
        ))
    })?;
    let (joins, guessed) = joins::measure(rounds, calls, placement)?;
    let refusals = placement.run(|| refusals::measure(args.quick))?;
    let middle = |outcomes: &[Outcome], of: fn(&Latency) -> u64| {
        let micros = |outcome: &Outcome| Some(of(outcome.latency.as_ref()?) as f64 / 1000.0);
        median(outcomes.iter().filter_map(micros).collect()).expect("there is a round")
    };
    let p50 = |outcomes: &[Outcome]| middle(outcomes, |latency| latency.p50_ns);
    let p99 = |outcomes: &[Outcome]| middle(outcomes, |latency| latency.p99_ns);
    let (alone, beside) = (p99(&joins[0]), p99(&joins[1]));
    let rates = guessed.iter().map(Guessed::per_second).collect();
    let (plain, sealed) = (p50(&cells[0]), p50(&cells[1]));
    let (tcp, by_tls) = (p50(&over[0]), p50(&over[1]));
    let findings = vec![
        Finding::new("a call in a plain pool: p50", plain, Unit::Micros),
        Finding::new("a call in an encrypted pool: p50", sealed, Unit::Micros),
        Finding::new("encrypted ÷ plain", sealed / plain, Unit::Ratio)
            .expect_at_most(CALL_RATIO_MAX),
        Finding::new(
            "sealing 64 KiB ÷ the cipher alone, speed",
            sealing,
            Unit::Ratio,
        )
        .expect_at_least(SEAL_RATIO_MIN),
        Finding::new("sealing a chunk of 64 KiB alone", chunk, Unit::Micros),
        Finding::new(
            "publishing that chunk in a block of 64 MiB",
            publishing,
            Unit::Micros,
        ),
        Finding::new("publishing ÷ sealing", publishing / chunk, Unit::Ratio)
            .expect_at_most(PUBLISH_RATIO_MAX),
        Finding::new("a call over plain TCP: p50", tcp, Unit::Micros),
        Finding::new("a call over TLS: p50", by_tls, Unit::Micros),
        Finding::new("TLS ÷ plain TCP", by_tls / tcp, Unit::Ratio).expect_at_most(TLS_RATIO_MAX),
        Finding::new("a TLS handshake, of the server", handshake.0, Unit::Micros),
        Finding::new("its longest step", handshake.1, Unit::Micros)
            .expect_at_most(HANDSHAKE_MICROS_MAX),
        Finding::new(
            "wrong proofs that were answered, of 10,000 a second",
            median(rates).expect("there is a round"),
            Unit::PerSecond,
        ),
        Finding::new("another client's call: p99", alone, Unit::Micros),
        Finding::new("beside the wrong proofs: p99", beside, Unit::Micros),
        Finding::new("beside ÷ alone", beside / alone, Unit::Ratio).expect_at_most(JOINS_RATIO_MAX),
        Finding::new(
            "refusing a proof: the slowest cause ÷ the fastest",
            refusals,
            Unit::Ratio,
        )
        .expect_at_most(REFUSALS_RATIO_MAX),
    ];
    let sheet = Sheet {
        bench: "keys",
        about: format!("calls of {SMALL} bytes; {rounds} × {calls} calls in each pool, {place}"),
        quick: args.quick,
        machine,
        findings,
        rounds: json!({
            "plain": cells[0], "sealed": cells[1], "tcp": over[0], "tls": over[1],
            "alone": joins[0], "beside": joins[1], "guessed": guessed,
        }),
    };
    Ok(sheet.to_results())
}

fn measure(rounds: u64, calls: u64) -> Result<[Vec<Outcome>; 2], Failure> {
    let server = Running::start(&[])?;
    let scratch = tempfile::tempdir().map_err(|e| Failure::said(e.to_string()))?;
    let address = server.address(Transport::Unix);
    let connect = |app: &str| {
        let builder =
            latzero::App::builder(&format!("latzero://{app}?socket={address}&pool=plain"));
        let builder = builder
            .keys("sealed", keys()?)
            .state_dir(scratch.path().join(app));
        App::connect_with(builder).map_err(failed("connect"))
    };
    let maker = App::connect(&format!("latzero://maker?socket={address}"));
    let request = keys()?
        .pool_create("sealed", false)
        .map_err(failed("descriptor"))?;
    let made = maker.and_then(|maker| maker.request(&request));
    made.map_err(failed("pool_create"))?;
    let handler = connect("handler")?;
    let echo = handler.serve("echo", |request| {
        let bytes: Bytes = request.data()?;
        Ok::<_, HandlerError>(bytes)
    });
    echo.map_err(failed("serve"))?;
    let caller = connect("caller")?;
    let plan = Plan {
        load: Load::OneAtATime,
        warmup: calls / 10,
        calls,
    };
    let body = Bytes(vec![7; SMALL]);
    let mut cells = [Vec::new(), Vec::new()];
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for (pool, outcomes) in POOLS.iter().zip(&mut cells) {
            outcomes.push(time_each(&plan, || {
                let answer = caller.call("echo", &body).pool(pool).bytes();
                answer.map(drop).map_err(failed("call"))
            })?);
        }
    }
    Ok(cells)
}

/// The speed of sealing a large message, as a ratio to the cipher alone.
fn sealing(is_quick: bool) -> f64 {
    let set = key_set();
    let epoch = latzero_crypto::keys::EpochId {
        pool_id: [1; 16],
        epoch: 1,
        salt: [2; 32],
    };
    let key = set.pool_key(&epoch).expect("all keys are here").event_key();
    let body = vec![7; LARGE];
    let header = Header {
        suite: Suite::Sealed,
        pool_id: [1; 16],
        epoch: 1,
        kind: Kind::Trigger,
        session: [3; 16],
        seq: 1,
        sent_ms: 0,
        msg_id: [4; 16],
        in_reply_to: [0; 16],
        name: "echo",
        sender: "caller",
        destination: "",
        expires_ms: 0,
    };
    let times = if is_quick { 10 } else { 2_000 };
    let time = |act: &mut dyn FnMut()| {
        let begin = Instant::now();
        (0..times).for_each(|_| act());
        begin.elapsed().as_secs_f64()
    };
    let mut ratios = Vec::new();
    for _ in 0..5 {
        let alone = time(&mut || drop(std::hint::black_box(key.seal(&[5; 24], &[6; 64], &body))));
        let whole = time(&mut || {
            let sealed = envelope::seal(&header, None, Body::Bytes(&body), &[5; 24], &key, None);
            drop(std::hint::black_box(sealed));
        });
        ratios.push(alone / whole);
    }
    median(ratios).expect("there is at least one")
}
