//! `watch`: prints the presence events of a pool.

use latzero::Presence;
use serde_json::Value;

use crate::args::WatchArgs;
use crate::connect::ConnectOptions;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, Tone};

pub(crate) fn run(args: &WatchArgs, output: &Output) -> CommandResult {
    let options = ConnectOptions::continuous("watch").in_pool(Some(&args.pool));
    let connection = args.reach.connect(&options)?;
    connection.report_losses(output);
    let mut events = connection.app.watch(&args.pool)?;
    if output.is_for_people() {
        output.note(format_args!(
            "watching pool {} at {}; press Ctrl-C to stop",
            args.pool,
            connection.place()
        ));
    }
    let mut seen = 0;
    while args.limit.wants_more(seen) {
        let Some(event) = events.recv() else {
            return Err(over());
        };
        seen += 1;
        let fields = Value::Object(event.fields().clone());
        if !output.is_for_people() {
            output.line(&fields)?;
            continue;
        }
        let (name, about) = (event.event(), about(&fields));
        let tone = match name {
            "app_online" | "trigger_added" => Tone::Good,
            "app_offline" | "trigger_removed" => Tone::Warn,
            _ => Tone::Strong,
        };
        output.toned_line(format_args!("{name:15}  "), tone, about)?;
        if event.lost() > 0 {
            output.note(format_args!("{} events before it were lost", event.lost()));
        }
    }
    Ok(Exit::Ok)
}

/// The connection was closed and will not be opened again.
pub(crate) fn over() -> Failure {
    Failure::new(Exit::Failure, "the server closed the connection")
        .with_help("another instance may have taken over the AppID; choose another one with --app")
}

/// The app is no longer in a pool that the command is for.
pub(crate) fn left(departure: &Presence) -> Failure {
    let pool = departure.pool().unwrap_or_default();
    match departure.event() {
        "pool_removed" => Failure::new(Exit::Failure, format!("pool '{pool}' was removed"))
            .with_help("create it again if it is needed, and start this command again"),
        _ => {
            let text =
                format!("pool '{pool}' has new keys, and this program would have to prove them");
            Failure::new(Exit::Failure, text)
                .with_help("start this command again, with a file of the new keys")
        }
    }
}

/// The fields of an event, on one line.
fn about(fields: &Value) -> String {
    let fields = fields.as_object().into_iter().flatten();
    let fields: Vec<String> = fields
        .filter(|(name, _)| !matches!(name.as_str(), "action" | "event" | "pool"))
        .map(|(name, value)| match value.as_str() {
            Some(text) => format!("{name}={text}"),
            None => format!("{name}={value}"),
        })
        .collect();
    fields.join(" ")
}
