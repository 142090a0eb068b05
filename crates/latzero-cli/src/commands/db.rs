//! `db`: checks the database for damage, with the server if one runs.

use std::time::Instant;

use latzero_server::startup::private_umask;
use latzero_server::upkeep::Offline;
use serde_json::{Value, json};

use crate::args::{DbCheckArgs, DbCommand};
use crate::exit::{Done, Exit, Failure};
use crate::output::{Output, Tone, toned};
use crate::reach::ConnectOptions;

use super::store::took;

/// Who looked.
const SERVER: &str = "the server";
const FILES: &str = "the files, as no server runs";

pub(crate) fn run(command: &DbCommand, output: &Output) -> Done {
    match command {
        DbCommand::Check(args) => check(args, output),
    }
}

fn check(args: &DbCheckArgs, output: &Output) -> Done {
    let (mut done, by) = match args
        .reach
        .connect(&ConnectOptions::once("db check").patient())
    {
        Ok(connection) => {
            let request = json!({"action": "db_check", "full": args.full});
            let asked = output.while_working("checking", || connection.administer(&request))?;
            (asked, SERVER)
        }
        // Files are looked at where a directory is meant, not where a server somewhere is.
        Err(failure) if failure.exit == Exit::NotRunning && !args.reach.is_elsewhere() => {
            (check_files(args, failure, output)?, FILES)
        }
        Err(failure) => return Err(failure),
    };
    done["online"] = (by == SERVER).into();
    let exit = match done["ok"] == true {
        true => Exit::Ok,
        false => Exit::Unhealthy,
    };
    if output.json {
        output.value(&done)?;
        return Ok(exit);
    }
    let findings = done["findings"].as_array().into_iter().flatten();
    let findings: Vec<&str> = findings.filter_map(Value::as_str).collect();
    let depth = match args.full {
        true => "everything was read",
        false => "a quick look; --full reads everything",
    };
    let state = match exit {
        Exit::Ok => toned("ok", Tone::Good),
        _ => toned("damaged", Tone::Bad),
    };
    let mut facts = vec![
        ("database", state),
        ("looked", format!("{by}: {depth}").into()),
        ("took", took(&done).into()),
    ];
    facts.extend(
        findings
            .into_iter()
            .map(|finding| ("found", finding.into())),
    );
    output.facts(&facts)?;
    if exit != Exit::Ok && output.is_for_people() {
        output.note(match by {
            SERVER => "the next start sets it aside and restores the newest good backup; `latzero backup ls --verify` lists them",
            _ => "a start sets it aside and restores the newest good backup; to choose one: `latzero backup ls --verify`, then `latzero restore FILE`",
        });
    }
    Ok(exit)
}

fn check_files(args: &DbCheckArgs, failure: Failure, output: &Output) -> Result<Value, Failure> {
    let dir = args.reach.data_dir().0;
    if !dir.join("data.db").exists() {
        // Not one is made for the look.
        return Err(failure);
    }
    private_umask();
    let started = Instant::now();
    let offline = Offline::take(&dir)?;
    let findings = output.while_working("checking", || offline.check(args.full))?;
    Ok(json!({
        "ok": findings.is_empty(), "findings": findings, "full": args.full,
        "took_ms": started.elapsed().as_millis() as u64,
    }))
}
