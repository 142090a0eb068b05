//! `kick`: closes the connections of an app.

use serde_json::{Value, json};

use crate::args::KickArgs;
use crate::connect::{ConnectOptions, Connection, ListKind, list};
use crate::exit::{CommandResult, Exit, Failure};
use crate::names::{did_you_mean, nearest};
use crate::output::{Output, count};

pub(crate) fn run(args: &KickArgs, output: &Output) -> CommandResult {
    let mut options = ConnectOptions::once("kick");
    // Under a name of its own, so that it does not close its own connection.
    options.app_id = Some(args.reach.own_app_id(None));
    let connection = args.reach.connect(&options)?;
    let mut request = json!({"action": "kick", "app_id": args.kicked});
    if let Some(instance) = &args.instance {
        request["instance"] = json!(instance);
    }
    let done = connection.administer(&request)?;
    if done["kicked"] == 0 {
        return Err(none_found(args, &connection));
    }
    match output.json {
        true => output.value(&done)?,
        false => {
            let n = done["kicked"].as_u64().unwrap_or(0);
            output.line(format_args!(
                "closed {} of {}",
                count(n, "connection"),
                args.kicked
            ))?;
        }
    }
    Ok(Exit::Ok)
}

fn none_found(args: &KickArgs, connection: &Connection) -> Failure {
    let text = match &args.instance {
        Some(instance) => format!("app '{}' has no instance {instance}", args.kicked),
        None => format!("app '{}' is not connected", args.kicked),
    };
    // Without the list there is no suggestion, but the error is still reported.
    let apps = list(
        &connection.app,
        &json!({"action": "app_list"}),
        ListKind::Apps,
    );
    let apps = apps.unwrap_or_default();
    let live = apps.iter().filter(|app| app["live"] == true);
    let names = live.filter_map(|app| app["app_id"].as_str());
    let is_other = |name: &&str| ![&args.kicked, connection.app.app_id()].contains(name);
    let names: Vec<&str> = names.filter(is_other).collect();
    let near = did_you_mean(&nearest(&args.kicked, names));
    let help = near.unwrap_or_else(|| "`latzero apps --live` lists the connected apps".to_owned());
    let mut failure = Failure::new(Exit::Answered, &text).with_help(help);
    failure.wire = Some::<Value>(json!({"code": "no_app", "message": text}));
    failure
}
