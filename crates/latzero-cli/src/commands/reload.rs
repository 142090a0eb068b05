//! `reload`: reloads the server's settings.

use serde_json::{Value, json};

use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, Tone, toned};

pub(crate) fn run(reach: &ServerArgs, output: &Output) -> CommandResult {
    let connection = reach.connect(&ConnectOptions::once("reload"))?;
    let done = match connection.administer(&json!({"action": "reload"})) {
        Ok(done) => done,
        // The settings are wrong, not the message.
        Err(failure) if failure.exit == Exit::Answered => {
            let text = failure
                .wire
                .as_ref()
                .and_then(|wire| wire["message"].as_str());
            let mut wrong =
                Failure::usage("the settings were not reloaded, because the new ones are invalid");
            wrong
                .errors
                .extend(text.into_iter().flat_map(str::lines).map(str::to_owned));
            return Err(wrong.with_help("correct them and reload again"));
        }
        Err(failure) => return Err(failure),
    };
    if output.json {
        output.value(&done)?;
        return Ok(Exit::Ok);
    }
    let rows = |field: &str, note: &str, tone: Tone| -> Vec<Vec<_>> {
        let changes = done[field].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
        changes
            .map(|change| {
                vec![
                    text(&change["name"]).into(),
                    text(&change["from"]).into(),
                    text(&change["to"]).into(),
                    toned(note, tone),
                ]
            })
            .collect()
    };
    let mut all = rows("applied", "in force", Tone::Good);
    all.extend(rows("needs_restart", "needs a restart", Tone::Warn));
    if let Some(pin) = done["pin"].as_str() {
        output.line(format_args!("certificate read again, pin {pin}"))?;
    }
    match all.is_empty() {
        true if done["pin"].is_string() => {}
        true => output.line("nothing changed")?,
        false => output.table(&["SETTING", "FROM", "TO", ""], &all)?,
    }
    Ok(Exit::Ok)
}
