//! `answers`: prints the answers to parked calls that arrived earlier, one JSON line each.

use std::time::{Duration, Instant};

use latzero::{Answer, Code};
use serde_json::{Map, Value, json};

use crate::args::AnswersArgs;
use crate::connect::{ConnectOptions, Connection, ListKind, list};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, compact, count, hex};

pub(crate) fn run(args: &AnswersArgs, output: &Output) -> CommandResult {
    if args.reach.app.is_none() && args.reach.url.is_none() {
        return Err(
            Failure::usage("choose the app whose answers to print with --app")
                .with_help("`latzero call --park` prints the AppID of the call"),
        );
    }
    let mut options = ConnectOptions::once("answers").waiting(args.wait.unwrap_or_default());
    options.takes_answers = true;
    options.pools = with_keys(args, output);
    let connection = args.reach.connect(&options)?;
    let deadline = args.wait.map(|wait| Instant::now() + wait);
    join(&connection, args, output)?;
    // The server sends all kept answers before it answers this ping.
    connection.app.ping()?;
    let mut answers = connection.app.answers();
    let mut seen = 0;
    let mut print = |answer: Answer| {
        seen += 1;
        if answer.lost() > 0 {
            let lost = count(answer.lost(), "answer");
            output.note(format_args!(
                "{lost} before the next one were dropped, because the queue was full"
            ));
        }
        output.json_line(&line(&answer)).map(|()| seen)
    };
    let mut printed = 0;
    while args.limit.wants_more(printed) {
        let left = deadline.map_or(Duration::ZERO, |deadline| {
            deadline.saturating_duration_since(Instant::now())
        });
        match answers.recv_timeout(left) {
            Ok(answer) => printed = print(answer)?,
            Err(error) if error.kind() == Code::Timeout => break,
            Err(error) => return Err(error.into()),
        }
    }
    // The server no longer has what has arrived, even if that is more than --count.
    while let Ok(answer) = answers.recv_timeout(Duration::ZERO) {
        printed = print(answer)?;
    }
    let app_id = connection.app.app_id();
    match args.wait {
        Some(_) if printed < args.limit.count.unwrap_or(1) => {
            let text = format!(
                "only {} for {app_id} arrived in time",
                count(printed, "answer")
            );
            Err(Failure::new(Exit::Timeout, text))
        }
        _ => {
            if printed == 0 && output.is_for_people() {
                output.note(format_args!("no answers for {app_id}"));
            }
            Ok(Exit::Ok)
        }
    }
}

/// The encrypted pools whose answers are wanted, which are joined while connecting.
fn with_keys(args: &AnswersArgs, output: &Output) -> Vec<String> {
    let has_keys = |pool: &String| args.reach.key_file(pool).is_some();
    if !args.pool.is_empty() {
        return args
            .pool
            .iter()
            .filter(|pool| has_keys(pool))
            .cloned()
            .collect();
    }
    let app_id = args.reach.app.as_deref();
    let awaited = app_id.map(latzero::awaited_in).unwrap_or_default();
    let (with_keys, without): (Vec<_>, Vec<_>) = awaited.into_iter().partition(has_keys);
    for pool in without {
        output.note(format_args!(
            "skipped pool {pool}: it is encrypted; name it and its keys with --pool and --keys"
        ));
    }
    with_keys
}

/// Joins the other pools whose answers are wanted: the server sends answers only to members.
fn join(connection: &Connection, args: &AnswersArgs, output: &Output) -> Result<(), Failure> {
    let app = &connection.app;
    let joined = app.joined();
    for pool in args.pool.iter().filter(|pool| !joined.contains(pool)) {
        app.join(pool)?;
    }
    if !args.pool.is_empty() {
        return Ok(());
    }
    let pools = list(app, &json!({"action": "pool_list"}), ListKind::Pools)?;
    let plain = pools.iter().filter(|pool| pool["encrypted"] != true);
    let names = plain.filter_map(|pool| pool["pool"].as_str());
    for name in names.filter(|name| *name != "system" && !joined.iter().any(|j| j == name)) {
        match app.join(name) {
            Ok(()) => {}
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
