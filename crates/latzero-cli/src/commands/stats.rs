//! `stats`: the server's counters and resource usage.

use serde_json::{Value, json};

use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit};
use crate::output::{Cell, Output, Tone, bytes, toned, uptime};

/// The parts, in the order in which people read them; parts that this program does not know follow.
const PARTS: [&str; 7] = [
    "server",
    "triggers",
    "transport",
    "apps",
    "pools",
    "resources",
    "errors",
];

pub(crate) fn run(reach: &ServerArgs, output: &Output) -> CommandResult {
    let connection = reach.connect(&ConnectOptions::once("stats"))?;
    let stats = connection.app.request(&json!({"action": "stats"}))?;
    if output.json {
        output.value(&stats)?;
        return Ok(Exit::Ok);
    }
    let Some(parts) = stats.as_object() else {
        return Ok(Exit::Ok);
    };
    let unknown = parts
        .keys()
        .map(String::as_str)
        .filter(|name| !PARTS.contains(name));
    let mut rows: Vec<Vec<Cell>> = Vec::new();
    for part in PARTS.into_iter().chain(unknown) {
        let before = rows.len();
        for (name, value) in parts
            .get(part)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            push(&mut rows, name, value);
        }
        // Only the first line of a part names it; for scripts every line does.
        for (index, row) in rows[before..].iter_mut().enumerate() {
            let name = if index == 0 || !output.is_terminal {
                part
            } else {
                ""
            };
            row.insert(0, toned(name, Tone::Strong));
        }
    }
    output.table(&["", "", ""], &rows)?;
    Ok(Exit::Ok)
}

fn push(rows: &mut Vec<Vec<Cell>>, name: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (inner, value) in fields {
                push(rows, &format!("{name}.{inner}"), value);
            }
        }
        Value::Array(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            rows.push(vec![name.into(), items.join("  ").into()]);
        }
        Value::Null => {}
        other => rows.push(vec![name.into(), shown(name, other).into()]),
    }
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn shown(name: &str, value: &Value) -> String {
    match value.as_u64() {
        Some(n) if name.ends_with("_bytes") || name.starts_with("bytes_") => bytes(n),
        Some(ms) if name == "uptime_ms" => uptime(ms),
        _ => plain(value),
    }
}
