//! `health`: the health of every component.

use serde_json::{Value, json};

use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit};
use crate::output::{Output, Tone, toned};

use super::store::{further_losses, losses, sentences};

pub(crate) fn run(reach: &ServerArgs, output: &Output) -> CommandResult {
    let connection = reach.connect(&ConnectOptions::once("health"))?;
    let health = connection.app.request(&json!({"action": "health"}))?;
    let exit = match health["status"] == "ok" {
        true => Exit::Ok,
        false => Exit::Unhealthy,
    };
    if output.json {
        output.value(&health)?;
        return Ok(exit);
    }
    let tone = |status: &str| {
        if status == "ok" {
            Tone::Good
        } else {
            Tone::Bad
        }
    };
    let overall = health["status"].as_str().unwrap_or("unknown");
    let mut rows = vec![vec![
        toned("server", Tone::Strong),
        toned(overall, tone(overall)),
        "".into(),
    ]];
    for (name, part) in health["components"].as_object().into_iter().flatten() {
        let status = part["status"].as_str().unwrap_or("unknown");
        let mut lines = losses(&health, Some(name));
        match name.as_str() {
            "store" => lines.extend(sentences(&part["seen"])),
            _ => lines.push(seen(&part["seen"])),
        }
        // One line per finding for people, one line in all for scripts.
        let lines = match output.is_terminal {
            true => lines,
            false => vec![lines.join("; ")],
        };
        for (index, line) in lines.into_iter().enumerate() {
            rows.push(match index {
                0 => vec![name.into(), toned(status, tone(status)), line.into()],
                _ => vec!["".into(), "".into(), line.into()],
            });
        }
    }
    if let Some(further) = further_losses(&health) {
        rows.push(vec![
            "losses".into(),
            toned("degraded", Tone::Bad),
            further.into(),
        ]);
    }
    output.table(&["COMPONENT", "STATUS", "DETAILS"], &rows)?;
    Ok(exit)
}

fn seen(seen: &Value) -> String {
    let fields = seen.as_object().into_iter().flatten();
    let fields = fields.filter(|(_, value)| !value.is_null());
    let fields = fields.map(|(name, value)| match value {
        Value::Object(_) => format!("{name}: {}", self::seen(value)),
        value => format!("{name} {value}"),
    });
    fields.collect::<Vec<_>>().join(", ")
}
