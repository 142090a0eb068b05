//! `on`: prints events as they arrive, one JSON line each.

use std::future::poll_fn;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;

use latzero::{Bytes, Data, Emission, Events, Presence};
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::OnArgs;
use crate::connect::{ConnectOptions, Connection};
use crate::executor::block_on;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, compact, count, hex};
use crate::parse::Target;

use super::trigger::POOL_DEFAULT;
use super::watch::{left, over};

/// Events of one trigger.
struct Listening {
    target: Target,
    events: Events<Emission>,
}

/// What [`next`] found.
enum Next {
    Event(Emission),
    /// Events of a trigger were dropped, and no later event reports how many.
    Lost(Target, u64),
    /// The app is no longer in a pool.
    Left(Presence),
    /// The connection is over.
    End,
}

pub(crate) fn run(args: &OnArgs, output: &Output) -> CommandResult {
    let names_pools = args.reach.names_pools();
    let mut options = ConnectOptions::continuous("on");
    let mut targets = args.targets.parse()?;
    for target in &mut targets {
        if target.pool.is_none() && !names_pools {
            target.pool = Some(POOL_DEFAULT.to_owned());
        }
        options = options.in_pool(target.pool.as_deref());
    }
    let connection = args.reach.connect(&options)?;
    connection.report_losses(output);
    let mut departures = connection.app.as_async().departures();
    let mut listening = Vec::new();
    for target in targets {
        // Before the check, which registers too: what arrives from then on has its place.
        let events = block_on(connection.app.as_async().on(&target.trigger))?;
        if let Some(pool) = &target.pool {
            check_may_listen(&connection, pool, &target.trigger)?;
        }
        listening.push(Listening { target, events });
    }
    // Shared with the thread that reports losses when a signal ends the command.
    let listening = Arc::new(Mutex::new(listening));
    report_at_signal(&listening)?;
    if output.is_for_people() {
        output.note(format_args!(
            "listening at {}; press Ctrl-C to stop",
            connection.place()
        ));
    }
    let mut seen = 0;
    while args.limit.wants_more(seen) {
        match block_on(next(&listening, &mut departures)) {
            Next::Event(emission) => {
                seen += 1;
                output.json_line(&line(&emission)?)?;
            }
            Next::Lost(target, lost) => {
                let lost = json!({"trigger": target.trigger, "pool": target.pool, "lost": lost});
                output.json_line(&lost.to_string())?;
            }
            Next::Left(departure) => {
                report_lost(&mut lock(&listening), Unprinted::AreLost);
                return Err(left(&departure));
            }
            Next::End => return Err(over()),
        }
    }
    report_lost(&mut lock(&listening), Unprinted::AreDropped);
    Ok(Exit::Ok)
}

/// Checks that the server serves events of a pool to this app. It refuses a registration that names
/// the pool; of the client's, which names none, it leaves out what may not be served.
fn check_may_listen(connection: &Connection, pool: &str, trigger: &str) -> Result<(), Failure> {
    let everywhere = json!({"name": trigger, "concurrency": 0});
    let mut there = everywhere.clone();
    there["pools"] = json!([pool]);
    for listener in [there, everywhere] {
        let request = json!({"action": "trigger_register", "triggers": [listener]});
        let _: Value = connection.app.request(&request)?;
    }
    Ok(())
}

fn lock(listening: &Mutex<Vec<Listening>>) -> MutexGuard<'_, Vec<Listening>> {
    listening.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next event of any trigger, how many were lost after the last one, or why no more come.
async fn next(listening: &Mutex<Vec<Listening>>, departures: &mut Events<Presence>) -> Next {
    poll_fn(|cx| {
        for Listening { target, events } in lock(listening).iter_mut() {
            while let Poll::Ready(emission) = events.poll_next_event(cx) {
                let Some(emission) = emission else {
                    return Poll::Ready(Next::End);
                };
                // The app gets the event in every pool that it has joined, including those of the
                // other targets.
                let pool = target.pool.as_deref();
                if pool.is_none_or(|pool| pool == emission.pool()) {
                    return Poll::Ready(Next::Event(emission));
                }
            }
            let lost = events.take_lost();
            if lost > 0 {
                return Poll::Ready(Next::Lost(target.clone(), lost));
            }
        }
        // What arrived before it was printed first.
        departures
            .poll_next_event(cx)
            .map(|departure| departure.map_or(Next::End, Next::Left))
    })
    .await
}

/// What happens to events that arrived and were not printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unprinted {
    /// They were not asked for.
    AreDropped,
    /// They count as lost.
    AreLost,
}

/// Says on stderr what was lost and not reported yet.
fn report_lost(listening: &mut [Listening], waiting: Unprinted) {
    for Listening { target, events } in listening {
        let mut lost = 0;
        let cx = &mut Context::from_waker(Waker::noop());
        while let Poll::Ready(Some(emission)) = events.poll_next_event(cx) {
            lost += emission.lost() + u64::from(waiting == Unprinted::AreLost);
        }
        lost += events.take_lost();
        if lost > 0 {
            // If stderr is closed, the note is not needed.
            let lost = count(lost, "event");
            let _ = writeln!(std::io::stderr(), "lost {lost} of {}", target.trigger);
        }
    }
}

/// Starts a thread that ends the command at a signal, after a report of what was lost.
fn report_at_signal(listening: &Arc<Mutex<Vec<Listening>>>) -> Result<(), Failure> {
    let failed = |error| {
        Failure::new(
            Exit::Failure,
            format!("signals cannot be received: {error}"),
        )
    };
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let listening = Arc::clone(listening);
    let report = move || {
        if let Some(signal) = signals.forever().next() {
            report_lost(&mut lock(&listening), Unprinted::AreLost);
            std::process::exit(128 + signal);
        }
    };
    let spawned = thread::Builder::new().name("signals".into()).spawn(report);
    spawned.map(drop).map_err(failed)
}

fn line(emission: &Emission) -> Result<String, Failure> {
    let origin = emission.origin();
    let mut head = json!({
        "trigger": emission.name(),
        "pool": emission.pool(),
        "from": {"app_id": origin.app_id, "instance": origin.instance},
    });
    let headers: Map<String, Value> = emission
        .headers()
        .into_iter()
        .map(|(name, value)| (name, Value::String(value)))
        .collect();
    if !headers.is_empty() {
        head["headers"] = Value::Object(headers);
    }
    if emission.lost() > 0 {
        head["lost"] = json!(emission.lost());
    }
    let mut line = head.to_string();
    line.pop();
    let data = match emission.data()? {
        // The payload's own text: its fields keep their order and its numbers their digits.
        Data::Json(json) => compact(&json),
        Data::Bytes(Bytes(raw)) => json!({"hex": hex(&raw)}).to_string(),
    };
    line.push_str(&format!(",\"data\":{data}}}"));
    Ok(line)
}
