//! The reply to `health`: each component `ok` or `degraded`, with details.

use std::sync::atomic::Ordering::Relaxed;

use latzero_fabric::Time;
use serde_json::{Map, Value, json};

use crate::host::Seen;
use crate::losses::Part;
use crate::machine_limits::Derived;
use crate::shared::ServerState;

/// Checks every component. The pools, blocks and parked calls that it counts are those that the
/// client may see.
pub(crate) fn report(shared: &ServerState, seen: &Seen, now: Time) -> Value {
    let settings = shared.settings();
    let connections = shared.books.stats.connections.load(Relaxed);
    let blocked = shared.books.stats.slow_readers.load(Relaxed);
    let connections_max = shared.config.machine.shares(&settings.limits).connections;
    let transport = part(
        connections < connections_max,
        &json!({"connections": connections, "connections_max": connections_max,
            "slow_readers": blocked}),
    );
    let counts = shared
        .core
        .registry
        .lock()
        .expect("a panic under the registry's lock ends the server")
        .counts();
    let apps = part(
        counts.apps_known < shared.core.context.limits.apps_max,
        &json!({"known": counts.apps_known, "live": counts.apps_live}),
    );
    let pools = part(
        counts.pools < shared.core.context.limits.pools_max,
        &json!({"pools": seen.pools}),
    );
    let in_flight = shared.books.stats.calls_in_flight.load(Relaxed);
    // If the first deadline is a second late, the first loop is stuck.
    let late = shared
        .core
        .timers
        .next()
        .map_or(0, |next| now.since(next).as_millis() as u64);
    let triggers = part(
        late < 1000,
        &json!({"calls_in_flight": in_flight, "deadlines_late_ms": late, "parked": seen.parked}),
    );
    let (blocks_ok, mut blocks) = shared.storage.blocks.health();
    blocks["blocks"] = seen.blocks.into();
    let losses = shared.storage.persistence.losses();
    let memory = part(blocks_ok && losses.is_none_of(Part::Memory), &blocks);
    let (store_ok, store) = shared.storage.persistence.health();
    let store = part(store_ok && losses.is_none_of(Part::Store), &store);
    let lost = (shared.books.log_lines_lost)() + shared.books.audit_log.lost();
    let logs_ok = lost == 0 && losses.is_none_of(Part::Logs);
    let logs = part(logs_ok, &json!({"lines_lost": lost}));
    let mut limits: Map<String, Value> = (shared.config.machine.facts().into_iter())
        .map(|(name, text)| (name.to_owned(), text.into()))
        .collect();
    for Derived {
        setting,
        text,
        from,
        ..
    } in &shared.config.derived
    {
        limits.insert((*setting).to_owned(), format!("{text}, from {from}").into());
    }
    let limits = part(true, &limits.into());
    let parts = json!({"transport": transport, "apps": apps, "pools": pools, "triggers": triggers,
        "memory": memory, "store": store, "logs": logs, "limits": limits});
    let all_ok = parts
        .as_object()
        .is_some_and(|parts| parts.values().all(|part| part["status"] == "ok"));
    let status = match (shared.core.context.is_draining(), all_ok) {
        (true, _) => "draining",
        (false, true) => "ok",
        (false, false) => "degraded",
    };
    let (losses, losses_total) = losses.to_json();
    json!({"status": status, "components": parts, "losses": losses, "losses_total": losses_total})
}

fn part(is_ok: bool, seen: &Value) -> Value {
    json!({"status": if is_ok { "ok" } else { "degraded" }, "seen": seen})
}
