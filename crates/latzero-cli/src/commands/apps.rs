//! `apps`: the apps that the server knows, and what they serve.

use serde_json::{Value, json};

use crate::args::AppsArgs;
use crate::exit::{Done, Exit};
use crate::output::{Cell, Output, Tone, toned};
use crate::reach::{Listed, Wish, list};

/// Names of one kind that a row of the table shows; `--json` shows all.
const NAMES_MAX: usize = 8;

pub(crate) fn run(args: &AppsArgs, output: &Output) -> Done {
    let reached = args.reach.connect(&Wish::once("apps"))?;
    let mut request = json!({"action": "app_list"});
    if let Some(pool) = &args.pool {
        request["pool"] = json!(pool);
    }
    let mut apps = list(&reached.app, &request, Listed::Apps)?;
    if args.live {
        apps.retain(|app| app["live"] == true);
    }
    if output.json {
        output.value(&json!({"apps": apps}))?;
        return Ok(Exit::Ok);
    }
    // This command's own connection is not what people look for.
    let own = reached.app.app_id();
    let is_own = |app: &Value| app["app_id"] == own && app["instances_total"] == 1;
    let rows: Vec<Vec<Cell>> = apps.iter().filter(|app| !is_own(app)).map(row).collect();
    output.table(&["APP", "INSTANCES", "POOLS", "TRIGGERS"], &rows)?;
    Ok(Exit::Ok)
}

fn row(app: &Value) -> Vec<Cell> {
    let instances = app["instances_total"].as_u64().unwrap_or(0);
    let instances = match instances {
        0 => toned("offline", Tone::Dim),
        n => toned(n, Tone::Good),
    };
    vec![
        app["app_id"].as_str().unwrap_or("").into(),
        instances,
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
