//! The cost of failed joins for others: clients that send wrong proofs of an encrypted pool over
//! TCP, at a fixed rate, beside an app that calls.
//!
//! Server, caller and handler share one CPU, as in the other parts; those who guess have another.
//! The server checks 20 wrong proofs of a user in a minute. It refuses further ones unchecked, and
//! then does not read their connections for a while: those who guess can't send what they would.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use latzero::blocking::App;
use latzero::{Bytes, HandlerError};
use latzero_crypto::text;
use serde::Serialize;
use serde_json::json;

use super::{SMALL, failed, keys};
use crate::failure::Failure;
use crate::placement::Placement;
use crate::plan::{Load, Outcome, Plan, time_each};
use crate::server::Running;
use crate::stream::Transport;
use crate::wire::{Fill, Wire};

/// Wrong proofs in a second, as far as the server takes them.
pub(super) const PER_SECOND: u128 = 10_000;

/// The connections that they come from.
const CONNECTIONS: usize = 64;

/// The longest pause between two looks at the clock.
const PAUSE: Duration = Duration::from_micros(50);

/// What happened to wrong proofs.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Guessed {
    /// Those whose signatures were checked.
    checked: u64,
    /// Those that were refused unchecked, because too many had been wrong.
    unchecked: u64,
    /// Those that were due while the server did not read their connection.
    held_back: u64,
    per_second: f64,
}

impl Guessed {
    pub(super) fn per_second(&self) -> f64 {
        self.per_second
    }
}

/// Times calls alone and beside wrong proofs, in turn.
pub(super) fn measure(
    rounds: u64,
    calls: u64,
    placement: Placement,
) -> Result<([Vec<Outcome>; 2], Vec<Guessed>), Failure> {
    let server = placement.run(|| Running::start(&[]))?;
    let socket = server.address(Transport::Unix);
    let connect = |app: &str| {
        let address = format!("latzero://{app}?socket={socket}&pool=plain");
        App::connect(&address).map_err(failed("connect"))
    };
    let (caller, handler) = placement.run(|| Ok((connect("caller")?, connect("handler")?)))?;
    let request = keys()?.pool_create("sealed", false);
    let request = request.map_err(failed("descriptor"))?;
    caller.request(&request).map_err(failed("pool_create"))?;
    let echo = handler.serve("echo", |request| {
        let bytes: Bytes = request.data()?;
        Ok::<_, HandlerError>(bytes)
    });
    echo.map_err(failed("serve"))?;
    let connections = 0..CONNECTIONS;
    let wires = connections.map(|n| {
        let guesser = json!({"app_id": format!("guesser-{n}"), "pools": [], "transient": true});
        let wire = Wire::connect(&server, Transport::Tcp, guesser)?;
        wire.set_nonblocking()?;
        Ok(wire)
    });
    let mut wires = wires.collect::<Result<Vec<_>, Failure>>()?;
    let plan = Plan {
        load: Load::OneAtATime,
        warmup: calls / 10,
        calls,
    };
    let body = Bytes(vec![7; SMALL]);
    let time = || {
        placement.run(|| {
            time_each(&plan, || {
                let answer = caller.call("echo", &body).bytes();
                answer.map(drop).map_err(failed("call"))
            })
        })
    };
    let (mut cells, mut guessed) = ([Vec::new(), Vec::new()], Vec::new());
    for round in 1..=rounds {
        eprintln!("wrong proofs: round {round} of {rounds}");
        cells[0].push(time()?);
        let is_over = AtomicBool::new(false);
        let beside = std::thread::scope(|scope| {
            let guessing = scope.spawn(|| placement.run_beside(|| guess(&mut wires, &is_over)));
            let beside = time();
            is_over.store(true, Ordering::Relaxed);
            guessed.push(guessing.join().expect("guessing does not panic")?);
            beside
        });
        cells[1].push(beside?);
    }
    Ok((cells, guessed))
}

/// Sends wrong proofs at the rate until `is_over` is set.
fn guess(wires: &mut [Wire], is_over: &AtomicBool) -> Result<Guessed, Failure> {
    let signature = text::encode(&[7; 64]);
    let proof = json!({
        "action": "pool_join", "pool": "sealed", "id": "p", "proof": {
            "client_nonce": text::encode(&[7; 32]), "roles": 7, "sig_join": signature,
            "sig_read": signature, "sig_write": signature, "cb_type": "none",
        },
    });
    let proof = proof.to_string();
    let challenge = r#"{"action":"pool_challenge","pool":"sealed","id":"c"}"#;
    let mut guessed = Guessed::default();
    let begin = Instant::now();
    let mut sent = 0;
    while !is_over.load(Ordering::Relaxed) {
        let due = begin.elapsed().as_micros() * PER_SECOND / 1_000_000;
        if sent >= due {
            sleep(PAUSE);
            continue;
        }
        let wire = &mut wires[(sent % CONNECTIONS as u128) as usize];
        drain(wire, &mut guessed)?;
        sent += 1;
        if wire.flush_some()? {
            wire.append(challenge);
            wire.append(&proof);
            wire.flush_some()?;
        } else {
            guessed.held_back += 1;
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    for wire in wires {
        drain(wire, &mut guessed)?;
    }
    guessed.per_second = (guessed.checked + guessed.unchecked) as f64 / seconds;
    Ok(guessed)
}

/// Counts the refusals that have arrived.
fn drain(wire: &mut Wire, guessed: &mut Guessed) -> Result<(), Failure> {
    loop {
        while let Some(reply) = wire.received()? {
            let has = |code: &str| {
                reply
                    .windows(code.len())
                    .any(|part| part == code.as_bytes())
            };
            guessed.checked += u64::from(has("unauthenticated"));
            guessed.unchecked += u64::from(has("overloaded"));
        }
        match wire.fill()? {
            Fill::Some => {}
            Fill::Nothing => return Ok(()),
            Fill::End => return Err(Failure::said("the server closed a connection that guesses")),
        }
    }
}
