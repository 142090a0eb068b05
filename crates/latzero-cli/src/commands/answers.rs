//! `answers`: prints the answers to parked calls that arrived earlier, one JSON line each.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use latzero::{Answer, Code};
use serde_json::{Map, Value, json};

use crate::args::AnswersArgs;
use crate::connect::{ConnectOptions, Connection, ListKind, list};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, compact, count, hex};

use super::keys::default_names;

pub(crate) fn run(args: &AnswersArgs, output: &Output) -> CommandResult {
    if args.reach.app.is_none() && args.reach.url.is_none() {
        return Err(
            Failure::usage("choose the app whose answers to print with --app")
                .with_help("`latzero call --park` prints the AppID of the call"),
        );
    }
    let mut options = ConnectOptions::once("answers").waiting(args.wait.unwrap_or_default());
    let deadline = args.wait.map(|wait| Instant::now() + wait);
    let (with_keys, others) = pools(args, &options, output)?;
    options.pools = with_keys;
    let connection = args.reach.connect(&options)?;
    join(&connection, others, args, output)?;
    // The server sends all kept answers before it answers this ping.
    connection.app.ping()?;
    let mut answers = connection.app.answers();
    let mut seen = 0;
    while args.limit.wants_more(seen) {
        let left = deadline.map_or(Duration::ZERO, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        match answers.recv_timeout(left) {
            Ok(answer) => {
                seen += 1;
                if answer.lost() > 0 {
                    let lost = count(answer.lost(), "answer");
                    output.note(format_args!(
                        "{lost} before the next one were dropped, because the queue was full"
                    ));
                }
                output.json_line(&line(&answer))?;
            }
            Err(error) if error.kind() == Code::Timeout => break,
            Err(error) => return Err(error.into()),
        }
    }
    let app_id = connection.app.app_id();
    match args.wait {
        Some(_) if seen < args.limit.count.unwrap_or(1) => {
            let text = format!(
                "only {} for {app_id} arrived in time",
                count(seen, "answer")
            );
            Err(Failure::new(Exit::Timeout, text))
        }
        _ => {
            if seen == 0 && output.is_for_people() {
                output.note(format_args!("no answers for {app_id}"));
            }
            Ok(Exit::Ok)
        }
    }
}

/// The pools whose answers are wanted: those that are joined with keys while connecting, and the
/// others.
fn pools(
    args: &AnswersArgs,
    options: &ConnectOptions,
    output: &Output,
) -> Result<(Vec<String>, Vec<String>), Failure> {
    let has_keys = |pool: &String| args.reach.key_file(pool).is_some();
    if !args.pool.is_empty() {
        return Ok(args.pool.iter().cloned().partition(has_keys));
    }
    let mut scouting = options.clone().scouting();
    let scout = match args.reach.connect(&scouting) {
        // A certificate may allow only the app itself.
        Err(failure) if failure.exit == Exit::Denied => {
            scouting = options.clone();
            args.reach.connect(&scouting)?
        }
        scout => scout?,
    };
    let all = list(&scout.app, &json!({"action": "pool_list"}), ListKind::Pools)?;
    let names = |is_encrypted: bool| {
        all.iter()
            .filter(move |pool| (pool["encrypted"] == true) == is_encrypted)
            .filter_map(|pool| pool["pool"].as_str())
            .filter(|name| *name != "system")
            .map(str::to_owned)
    };
    let others: Vec<String> = names(false).collect();
    // An encrypted pool is listed only for administrators and its members.
    let mut encrypted: BTreeSet<String> = names(true).collect();
    if args.reach.keys.is_none() {
        let with_files = default_names("keys").into_iter();
        encrypted.extend(with_files.filter(|name| !others.contains(name)));
    } else if encrypted.is_empty() {
        output.note("there is no encrypted pool to be seen; name the pool of the keys with --pool");
    }
    let mut with_keys = Vec::new();
    for name in encrypted {
        if !has_keys(&name) {
            output.note(format_args!(
                "skipped pool {name}: it is encrypted, and its keys are missing; give them with \
                 --keys"
            ));
            continue;
        }
        // Keys that do not fit are no reason to print no answers of other pools.
        match args.reach.connect(&scouting.clone().in_pool(Some(&name))) {
            Ok(_) => with_keys.push(name),
            Err(failure) if failure.exit == Exit::NotRunning => return Err(failure),
            Err(failure) if failure.is_of(Code::NoPool) => {}
            Err(failure) => {
                let why = failure.errors.join("; ");
                output.note(format_args!("skipped pool {name}: {why}"));
            }
        }
    }
    Ok((with_keys, others))
}

/// Joins pools whose answers are wanted: the server sends answers only to members.
fn join(
    connection: &Connection,
    pools: Vec<String>,
    args: &AnswersArgs,
    output: &Output,
) -> Result<(), Failure> {
    let app = &connection.app;
    let joined = app.joined();
    for name in pools.into_iter().filter(|name| !joined.contains(name)) {
        match app.join(&name) {
            Ok(()) => {}
            Err(error) if !args.pool.is_empty() => return Err(error.into()),
            // The pool was removed in the meantime, with its answers.
            Err(error) if error.kind() == Code::NoPool => {}
            Err(error) => output.note(format_args!("skipped pool {name}: {}", error.message())),
        }
    }
    Ok(())
}

/// An answer on one line, with the payload's text as it arrived: no fields are reordered and no
/// numbers rounded.
pub(crate) fn line(answer: &Answer) -> String {
    let mut head = json!({"id": answer.id()});
    if let Some(pool) = answer.pool() {
        head["pool"] = json!(pool);
    }
    let (name, text) = match answer.result() {
        Err(error) => {
            let mut error_json = json!({"code": error.code(), "message": error.message()});
            if let Some(data) = error.data() {
                error_json["data"] = data.clone();
            }
            ("error", error_json.to_string())
        }
        Ok(reply) => {
            let headers: Map<String, Value> = reply
                .headers()
                .into_iter()
                .map(|(name, value)| (name, Value::String(value)))
                .collect();
            if !headers.is_empty() {
                head["headers"] = Value::Object(headers);
            }
            match reply.bytes() {
                Some(bytes) => ("hex", format!("\"{}\"", hex(bytes))),
                None => ("data", compact(reply.json().unwrap_or("null"))),
            }
        }
    };
    let mut line = head.to_string();
    line.pop();
    line.push_str(&format!(",\"{name}\":{text}}}"));
    line
}
