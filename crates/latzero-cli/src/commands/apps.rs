//! `apps`: lists the apps that the server knows, and forgets offline ones.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::args::{AppsArgs, AppsCommand, ForgetArgs};
use crate::connect::{ConnectOptions, Connection, ListKind, list};
use crate::exit::{CommandResult, Exit, Failure};
use crate::names::{did_you_mean, nearest};
use crate::output::{Cell, Output, Tone, ago, toned};

/// How many names of one kind a row of the table shows; `--json` shows all.
const NAMES_MAX: usize = 8;

pub(crate) fn run(args: &AppsArgs, output: &Output) -> CommandResult {
    if let Some(AppsCommand::Forget(args)) = &args.command {
        return forget(args, output);
    }
    let connection = args.reach.connect(&ConnectOptions::once("apps"))?;
    let mut request = json!({"action": "app_list"});
    if let Some(pool) = &args.pool {
        request["pool"] = json!(pool);
    }
    let mut apps = list(&connection.app, &request, ListKind::Apps)?;
    if args.live || args.offline {
        apps.retain(|app| app["live"] == args.live);
    }
    if output.json {
        output.value(&json!({"apps": apps}))?;
        return Ok(Exit::Ok);
    }
    // This command's own connection is not listed.
    let own = connection.app.app_id();
    let is_own = |app: &Value| app["app_id"] == own && app["instances_total"] == 1;
    let rows: Vec<Vec<Cell>> = apps.iter().filter(|app| !is_own(app)).map(row).collect();
    output.table(&["APP", "INSTANCES", "SEEN", "POOLS", "TRIGGERS"], &rows)?;
    Ok(Exit::Ok)
}

fn row(app: &Value) -> Vec<Cell> {
    let (instances, seen) = match app["instances_total"].as_u64().unwrap_or(0) {
        0 => {
            let last_seen = app["last_seen"].as_u64().unwrap_or(0);
            (
                toned("offline", Tone::Dim),
                toned(ago(last_seen), Tone::Dim),
            )
        }
        n => (toned(n, Tone::Good), "now".into()),
    };
    vec![
        app["app_id"].as_str().unwrap_or("").into(),
        instances,
        seen,
        names(app["pools"].as_array(), Value::as_str).into(),
        names(app["triggers"].as_array(), |trigger| {
            trigger["name"].as_str()
        })
        .into(),
    ]
}

fn names(values: Option<&Vec<Value>>, name: impl Fn(&Value) -> Option<&str>) -> String {
    let all: Vec<&str> = values.into_iter().flatten().filter_map(name).collect();
    match all.len() {
        0 => "-".to_owned(),
        n if n > NAMES_MAX => format!("{} and {} more", all[..NAMES_MAX].join(" "), n - NAMES_MAX),
        _ => all.join(" "),
    }
}

fn forget(args: &ForgetArgs, output: &Output) -> CommandResult {
    let connection = args.reach.connect(&ConnectOptions::once("apps forget"))?;
    let Some(app_id) = &args.forgotten else {
        return forget_offline(args.older.unwrap_or_default(), &connection, output);
    };
    let mut failure = match connection.administer(&forgetting(app_id)) {
        Ok(_) => {
            match output.json {
                true => output.value(&json!({"forgotten": app_id}))?,
                false => output.line(format_args!("forgot {app_id}"))?,
            }
            return Ok(Exit::Ok);
        }
        Err(failure) => failure,
    };
    let hint = match code(&failure) {
        Some("no_app") => {
            // Without the list there is no suggestion, but the error is still reported.
            let offline = offline(&connection).unwrap_or_default();
            let names = offline.iter().filter_map(|app| app["app_id"].as_str());
            let near = did_you_mean(&nearest(app_id, names));
            near.unwrap_or_else(|| "`latzero apps --offline` lists the offline apps".to_owned())
        }
        Some("app_in_use") => {
            format!("stop its program first, or close its connections with `latzero kick {app_id}`")
        }
        _ => return Err(failure),
    };
    failure.help = Some(hint);
    Err::<Exit, Failure>(failure)
}

fn forgetting(app_id: &str) -> Value {
    json!({"action": "app_forget", "app_id": app_id})
}

fn code(failure: &Failure) -> Option<&str> {
    failure.wire.as_ref().and_then(|wire| wire["code"].as_str())
}

fn offline(connection: &Connection) -> Result<Vec<Value>, latzero::Error> {
    let mut apps = list(
        &connection.app,
        &json!({"action": "app_list"}),
        ListKind::Apps,
    )?;
    apps.retain(|app| app["live"] == false);
    Ok(apps)
}

/// Forgets every app that has been offline for longer than `older`.
fn forget_offline(older: Duration, connection: &Connection, output: &Output) -> CommandResult {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut forgotten = Vec::new();
    for app in offline(connection)? {
        let last_seen = Duration::from_millis(app["last_seen"].as_u64().unwrap_or(u64::MAX));
        if now.saturating_sub(last_seen) < older {
            continue;
        }
        let Some(app_id) = app["app_id"].as_str() else {
            continue;
        };
        match connection.administer(&forgetting(app_id)) {
            Ok(_) => forgotten.push(app_id.to_owned()),
            // It reconnected, or was already forgotten.
            Err(failure) if matches!(code(&failure), Some("no_app" | "app_in_use")) => {}
            Err(failure) => return Err(failure),
        }
    }
    if output.json {
        output.value(&json!({"forgotten": forgotten}))?;
        return Ok(Exit::Ok);
    }
    for app_id in &forgotten {
        output.line(format_args!("forgot {app_id}"))?;
    }
    if forgotten.is_empty() {
        output.note("no offline app matches");
    }
    Ok(Exit::Ok)
}
