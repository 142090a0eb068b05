//! `parked`: lists, shows and changes parked calls.

use std::collections::BTreeMap;

use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::args::{ParkedArgs, ParkedCommand, ParkedFilterArgs, ParkedNumbersArgs};
use crate::connect::{ConnectOptions, Connection};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output, Tone, ago, bytes, count, toned};
use crate::parse::Target;

pub(crate) fn run(args: &ParkedArgs, output: &Output) -> CommandResult {
    match &args.command {
        ParkedCommand::Ls(args) => {
            let connection = args.reach.connect(&ConnectOptions::once("parked ls"))?;
            list(&connection, &args.filter, output)
        }
        ParkedCommand::Show(args) => {
            let connection = args.reach.connect(&ConnectOptions::once("parked show"))?;
            show(&connection, args.number, output)
        }
        ParkedCommand::Cancel(args) => {
            let connection = args.reach.connect(&ConnectOptions::once("parked cancel"))?;
            change(&connection, "parked_cancel", args, &json!({}), output)
        }
        ParkedCommand::Retry(args) => {
            let which = &args.which;
            let connection = which.reach.connect(&ConnectOptions::once("parked retry"))?;
            let ttl = args.ttl.map(|ttl| ttl.as_millis() as u64);
            let more = ttl.map_or(json!({}), |ttl| json!({"ttl": ttl}));
            change(&connection, "parked_retry", which, &more, output)
        }
        ParkedCommand::Purge(args) => {
            let connection = args.reach.connect(&ConnectOptions::once("parked purge"))?;
            change(&connection, "parked_purge", args, &json!({}), output)
        }
    }
}

/// A request about the calls that a filter names.
fn request(action: &str, filter: &ParkedFilterArgs) -> Result<Value, Failure> {
    let mut request = json!({"action": action});
    let target = filter.trigger.as_deref();
    let target = target.map(|trigger| Target::parse(trigger, filter.pool.as_deref()));
    let (pool, trigger) = match target.transpose()? {
        Some(target) => (target.pool, Some(target.trigger)),
        None => (filter.pool.clone(), None),
    };
    let state = match filter.dead {
        true => Some("dead"),
        false => filter.state.as_ref().map(|state| state.as_str()),
    };
    for (name, value) in [
        ("pool", pool.as_deref()),
        ("app_id", filter.caller.as_deref()),
        ("process", trigger.as_deref()),
        ("state", state),
    ] {
        if let Some(value) = value {
            request[name] = value.into();
        }
    }
    Ok(request)
}

fn list(connection: &Connection, filter: &ParkedFilterArgs, output: &Output) -> CommandResult {
    let mut request = request("parked_list", filter)?;
    let mut all: Vec<Value> = Vec::new();
    loop {
        let mut page = connection.administer(&request)?;
        if let Some(items) = page["parked"].as_array_mut() {
            all.append(items);
        }
        match page["after"].take() {
            Value::Null => break,
            after => request["after"] = after,
        }
    }
    if output.json {
        output.value(&json!({"parked": all}))?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<Vec<Cell>> = all.iter().map(row).collect();
    let head = [
        "NUMBER", "POOL", "TRIGGER", "STATE", "ATTEMPT", "CALLER", "ID", "PARKED", "SIZE",
    ];
    output.table(&head, &rows)?;
    if all.is_empty() && output.is_for_people() {
        output.note("no parked calls");
    }
    Ok(Exit::Ok)
}

fn row(call: &Value) -> Vec<Cell> {
    let text = |name: &str| call[name].as_str().unwrap_or("-").to_owned();
    let number = |name: &str| call[name].as_u64();
    let state = text("state");
    let tone = match state.as_str() {
        "dead" => Tone::Bad,
        "paused" => Tone::Warn,
        _ => Tone::Plain,
    };
    let attempt = number("attempt").zip(number("attempts"));
    vec![
        number("number").unwrap_or(0).into(),
        text("pool").into(),
        text("process").into(),
        toned(state, tone),
        attempt
            .map_or("-".to_owned(), |(n, most)| format!("{n} of {most}"))
            .into(),
        text("app_id").into(),
        text("id").into(),
        number("parked").map_or("-".to_owned(), ago).into(),
        bytes(number("bytes").unwrap_or(0)).into(),
    ]
}

fn show(connection: &Connection, number: u64, output: &Output) -> CommandResult {
    let request = json!({"action": "parked_info", "number": number});
    // The payload as received: numbers keep their digits.
    if output.json {
        let call: Box<RawValue> = connection.administer_as(&request)?;
        output.json_text(call.get())?;
        return Ok(Exit::Ok);
    }
    let call: BTreeMap<String, Box<RawValue>> = connection.administer_as(&request)?;
    let mut facts: Vec<(&str, Cell)> = Vec::new();
    for (name, raw) in &call {
        let number = || raw.get().parse().unwrap_or(0);
        let shown = match (name.as_str(), serde_json::from_str::<String>(raw.get())) {
            ("process", Ok(text)) => ("trigger", text),
            ("app_id", Ok(text)) => ("caller", text),
            ("parked", _) => ("parked", ago(number())),
            ("expires", _) => continue,
            ("bytes", _) => ("size", bytes(number())),
            // The server does not send these payloads.
            ("attachment_bytes", _) => ("data", format!("{} of raw bytes", bytes(number()))),
            ("data_bytes", _) => ("data", format!("{} of JSON", bytes(number()))),
            (name, Ok(text)) if name != "data" => (name, text),
            (name, _) => (name, raw.get().to_owned()),
        };
        facts.push((shown.0, shown.1.into()));
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

fn change(
    connection: &Connection,
    action: &str,
    which: &ParkedNumbersArgs,
    more: &Value,
    output: &Output,
) -> CommandResult {
    let mut requests: Vec<Value> = Vec::new();
    for number in &which.numbers {
        requests.push(json!({"action": action, "number": number}));
    }
    if requests.is_empty() {
        let request = request(action, &which.filter)?;
        if request.as_object().is_some_and(|fields| fields.len() == 1) {
            let text = "choose the calls by their numbers, or with --pool, --caller, --trigger, \
                        --state or --dead";
            return Err(Failure::usage(text).with_help("`latzero parked ls` lists the numbers"));
        }
        requests.push(request);
    }
    let mut changed = 0;
    // One number that is wrong does not keep the others from being changed.
    let mut failed = None;
    for request in &mut requests {
        for (name, value) in more.as_object().into_iter().flatten() {
            request[name] = value.clone();
        }
        loop {
            let reply = match connection.administer(request) {
                Ok(reply) => reply,
                Err(failure) => {
                    failed.get_or_insert(failure);
                    break;
                }
            };
            changed += reply["changed"].as_u64().unwrap_or(0);
            if reply["more"] != true || reply["changed"] == 0 {
                break;
            }
        }
    }
    if output.json {
        output.value(&json!({"changed": changed}))?;
        return failed.map_or(Ok(Exit::Ok), Err);
    }
    let done = match action {
        "parked_cancel" => "cancelled",
        "parked_retry" => "requeued",
        _ => "deleted",
    };
    output.line(format_args!("{done} {}", count(changed, "parked call")))?;
    failed.map_or(Ok(Exit::Ok), Err)
}
