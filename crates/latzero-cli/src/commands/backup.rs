//! `backup`: makes a backup with the server, and lists the backups of a directory.

use latzero_server::maintenance::{self, Depth};
use serde_json::{Value, json};

use crate::args::{BackupArgs, BackupCommand, BackupListArgs};
use crate::connect::ConnectOptions;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output, Tone, bytes, toned};

use super::store::{contents, creation_time, duration, to_json};

pub(crate) fn run(args: &BackupArgs, output: &Output) -> CommandResult {
    if let Some(BackupCommand::Ls(args)) = &args.command {
        return list(args, output);
    }
    let mut request = json!({"action": "backup"});
    if let Some(to) = &args.to {
        // The server has another working directory.
        let to = std::path::absolute(to)
            .map_err(|error| Failure::usage(format!("--to {}: {error}", to.display())))?;
        let Some(to) = to.to_str() else {
            let text = format!("--to {}: the path is not valid UTF-8", to.display());
            return Err(Failure::usage(text));
        };
        request["to"] = json!(to);
    }
    let connection = args
        .reach
        .connect(&ConnectOptions::once("backup").waiting_for_disk())?;
    let done = output.while_working("making a backup", || connection.administer(&request));
    let done = done.map_err(explained)?;
    if output.json {
        output.value(&done)?;
        return Ok(Exit::Ok);
    }
    let number = |field: &str| done[field].as_u64().unwrap_or(0);
    output.facts(&[
        ("backup", done["file"].as_str().unwrap_or("").into()),
        ("size", bytes(number("bytes")).into()),
        ("contents", contents(&done).into()),
        ("took", duration(&done).into()),
    ])?;
    Ok(Exit::Ok)
}

/// The store's message says what to do after a semicolon, which helps more than the general remedy
/// for `storage`.
fn explained(mut failure: Failure) -> Failure {
    let wire = failure.wire.as_ref();
    let message = wire.and_then(|wire| wire["message"].as_str()).unwrap_or("");
    if let Some((what, remedy)) = message.split_once("; ") {
        failure.errors = vec![what.to_owned()];
        failure.help = Some(remedy.to_owned());
    }
    failure
}

fn list(args: &BackupListArgs, output: &Output) -> CommandResult {
    let dir = args.dir.path();
    let files = maintenance::files(&dir).map_err(|error| {
        let text = format!("cannot list the backups of {}: {error}", dir.display());
        Failure::new(Exit::of_io(&error), text)
    })?;
    let depth = match args.verify {
        true => Depth::Whole,
        false => Depth::Glance,
    };
    let mut listed = Vec::new();
    for file in files {
        let doing = format!("verifying {}", file.display());
        listed.push(output.while_working(doing, move || maintenance::list_one(file, depth)));
    }
    let exit = match listed.iter().all(|backup| backup.summary.is_ok()) {
        true => Exit::Ok,
        false => Exit::Unhealthy,
    };
    if output.json {
        let backups: Vec<Value> = listed
            .iter()
            .map(|listed| listed_json(listed, depth))
            .collect();
        output.value(&json!({"backups": backups}))?;
        return Ok(exit);
    }
    if listed.is_empty() && output.is_for_people() {
        output.note(format_args!(
            "no backups in {}; `latzero backup` makes one",
            dir.join("backups").display()
        ));
    }
    let rows: Vec<Vec<Cell>> = listed.iter().map(|listed| row(listed, depth)).collect();
    output.table(&["FILE", "CREATED", "SIZE", "STATE", "CONTENTS"], &rows)?;
    Ok(exit)
}

fn row(listed: &maintenance::BackupEntry, depth: Depth) -> Vec<Cell> {
    let file = listed.file.display();
    let size = bytes(listed.bytes);
    match &listed.summary {
        Ok(summary) => vec![
            file.into(),
            creation_time(summary).into(),
            size.into(),
            match depth {
                Depth::Whole => toned("verified", Tone::Good),
                Depth::Glance => toned("not verified", Tone::Dim),
            },
            contents(&to_json(summary)).into(),
        ],
        Err(error) => vec![
            file.into(),
            "-".into(),
            size.into(),
            toned("damaged", Tone::Bad),
            error.to_string().into(),
        ],
    }
}

fn listed_json(listed: &maintenance::BackupEntry, depth: Depth) -> Value {
    let mut backup = json!({"file": listed.file, "bytes": listed.bytes});
    match &listed.summary {
        Ok(summary) => {
            backup["ok"] = true.into();
            backup["verified"] = (depth == Depth::Whole).into();
            let fields = to_json(summary);
            for (name, value) in fields.as_object().into_iter().flatten() {
                backup[name] = value.clone();
            }
        }
        Err(error) => {
            backup["ok"] = false.into();
            backup["error"] = error.to_string().into();
        }
    }
    backup
}
