//! `status`: whether the server is running, where, and how busy it is.

use latzero_server::startup::lock;
use serde_json::json;

use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, Tone, ago, count, toned, uptime};

use super::store::{further_losses, losses, sentences};

pub(crate) fn run(reach: &ServerArgs, output: &Output) -> CommandResult {
    let connection = match reach.connect(&ConnectOptions::once("status")) {
        Ok(connection) => connection,
        Err(failure) if matches!(failure.exit, Exit::NotRunning | Exit::Timeout) => {
            return not_running(reach, failure, output);
        }
        Err(failure) => return Err(failure),
    };
    let stats = connection.app.request(&json!({"action": "stats"}))?;
    let health = connection.app.request(&json!({"action": "health"}))?;
    let (server, apps) = (&stats["server"], &stats["apps"]);
    if output.json {
        output.value(&json!({
            "running": true,
            "reached": connection.place(),
            "health": health["status"],
            "store": health["components"]["store"],
            "losses": health["losses"],
            "losses_total": health["losses_total"],
            "version": server["version"],
            "pid": server["pid"],
            "uptime_ms": server["uptime_ms"],
            "addresses": server["addresses"],
            "data_dir": server["data_dir"],
            "pin": server["pin"],
            "apps_live": apps["apps_live"],
            "apps_known": apps["apps_known"],
            "instances": apps["instances"],
            "pools": stats["pools"]["pools"],
            "pools_encrypted": stats["pools"]["encrypted"],
            "triggers": stats["triggers"]["served"],
            "connections": stats["transport"]["connections"],
            "calls": stats["triggers"]["calls"],
            "calls_in_flight": stats["triggers"]["calls_in_flight"],
            "calls_per_second": stats["triggers"]["calls_per_second"],
            "parked": stats["parked"],
        }))?;
        return Ok(Exit::Ok);
    }
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
    let text = |value: &serde_json::Value| value.as_str().unwrap_or("").to_owned();
    let addresses = server["addresses"].as_array().into_iter().flatten();
    let addresses: Vec<&str> = addresses.filter_map(|address| address.as_str()).collect();
    let status = text(&health["status"]);
    let tone = match status.as_str() {
        "ok" => Tone::Good,
        _ => Tone::Warn,
    };
    let store = &health["components"]["store"];
    let store_tone = match store["status"] == "ok" {
        true => Tone::Plain,
        false => Tone::Warn,
    };
    let store = sentences(&store["seen"]);
    // One line per address for people, one line in all for scripts.
    let store = match output.is_terminal {
        true => store,
        false => vec![store.join("; ")],
    };
    let mut facts = vec![
        ("status", toned(format!("running, {status}"), tone)),
        ("pid", number(&server["pid"]).into()),
        ("uptime", uptime(number(&server["uptime_ms"])).into()),
        ("version", text(&server["version"]).into()),
        ("addresses", addresses.join("  ").into()),
        (
            "apps",
            format!("{} live, {} known", apps["apps_live"], apps["apps_known"]).into(),
        ),
        (
            "pools",
            format!(
                "{}, {} encrypted, {}",
                count(number(&stats["pools"]["pools"]), "pool"),
                number(&stats["pools"]["encrypted"]),
                count(number(&stats["triggers"]["served"]), "trigger")
            )
            .into(),
        ),
        (
            "connections",
            number(&stats["transport"]["connections"]).into(),
        ),
        (
            "calls",
            format!(
                "{} per second, {} in flight, {} in total",
                stats["triggers"]["calls_per_second"],
                stats["triggers"]["calls_in_flight"],
                stats["triggers"]["calls"]
            )
            .into(),
        ),
    ];
    // Only administrators are told.
    if let Some(dir) = server["data_dir"].as_str() {
        facts.insert(5, ("data", dir.into()));
    }
    // It belongs to the addresses, so it follows them.
    let has_tcp = |address: &&str| !address.starts_with("unix:");
    match server["pin"].as_str() {
        Some(pin) => facts.insert(5, ("tls", format!("on, pin {pin}").into())),
        None if addresses.iter().any(has_tcp) => facts.insert(5, ("tls", "off".into())),
        None => {}
    }
    let parked = &stats["parked"];
    if ["waiting", "paused", "running", "dead", "answered"]
        .iter()
        .any(|name| number(&parked[name]) > 0)
    {
        let oldest = match parked["oldest"].as_u64() {
            Some(at) => format!(", the oldest parked {}", ago(at)),
            None => String::new(),
        };
        let text = format!(
            "{} waiting, {} paused, {} running, {} dead, {}{oldest}",
            number(&parked["waiting"]),
            number(&parked["paused"]),
            number(&parked["running"]),
            number(&parked["dead"]),
            count(number(&parked["answered"]), "unread answer"),
        );
        let tone = match number(&parked["dead"]) {
            0 => Tone::Plain,
            _ => Tone::Warn,
        };
        facts.push(("parked", toned(text, tone)));
    }
    for (index, sentence) in store.into_iter().enumerate() {
        let name = if index == 0 { "store" } else { "" };
        facts.push((name, toned(sentence, store_tone)));
    }
    let lost = losses(&health, None).into_iter();
    for loss in lost.chain(further_losses(&health)) {
        facts.push(("lost", toned(loss, Tone::Bad)));
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

/// No server responds. A process may still be using the directory: one that is starting, hangs, or
/// listens elsewhere.
fn not_running(reach: &ServerArgs, mut failure: Failure, output: &Output) -> CommandResult {
    let dir = reach.data_dir().0;
    let dir = dir.canonicalize().unwrap_or(dir);
    // If an address was given, the server of the data directory is irrelevant.
    let holder = lock::holder(&dir).filter(|_| !reach.is_elsewhere());
    let pid = holder.as_ref().and_then(|holder| holder.pid);
    if output.json {
        output.value(&json!({
            "running": failure.exit == Exit::Timeout,
            "error": failure.errors.join("\n"),
            "data_dir": dir.display().to_string(),
            "lock_held": holder.is_some(),
            "lock_pid": pid,
            "looked": failure.details,
        }))?;
        return Ok(failure.exit);
    }
    if holder.is_some() && failure.exit == Exit::NotRunning {
        let pid = pid.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"));
        failure.errors[0] = "the server does not respond".to_owned();
        failure.details.push(format!(
            "{} is in use by another process, {pid}",
            dir.display()
        ));
        failure.help = Some("check `latzero logs`; kill the process if it hangs".to_owned());
    }
    Err(failure)
}
