//! `db`: queries the database and checks it for damage, through the server if one is running.

use std::path::Path;
use std::time::Instant;

use latzero_server::maintenance::{self, Offline};
use latzero_server::startup::private_umask;
use serde_json::{Value, json};

use crate::args::{DbCheckArgs, DbCommand, DbDumpArgs, DbQueryArgs};
use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output, Tone, toned};

use super::store::duration;

/// Who did the check.
const SERVER: &str = "by the server";
const FILES: &str = "read from the files, because no server is running";

pub(crate) fn run(command: &DbCommand, output: &Output) -> CommandResult {
    match command {
        DbCommand::Check(args) => check(args, output),
        DbCommand::Query(args) => query(args, output),
        DbCommand::Dump(args) => dump(args, output),
    }
}

fn check(args: &DbCheckArgs, output: &Output) -> CommandResult {
    let (mut done, by) = match args
        .reach
        .connect(&ConnectOptions::once("db check").waiting_for_disk())
    {
        Ok(connection) => {
            let request = json!({"action": "db_check", "full": args.full});
            let asked = output.while_working("checking", || connection.administer(&request))?;
            (asked, SERVER)
        }
        // Files are read only if the flags name a data directory, not another server's address.
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
        true => "every record was read",
        false => "the structure only; --full reads every record",
    };
    let state = match exit {
        Exit::Ok => toned("ok", Tone::Good),
        _ => toned("damaged", Tone::Bad),
    };
    let mut facts = vec![
        ("database", state),
        ("checked", format!("{by}; {depth}").into()),
        ("took", duration(&done).into()),
    ];
    facts.extend(
        findings
            .into_iter()
            .map(|finding| ("found", finding.into())),
    );
    output.facts(&facts)?;
    if exit != Exit::Ok && output.is_for_people() {
        output.note(match by {
            SERVER => {
                "the next start moves the database aside and restores the newest valid backup; \
                list the backups with `latzero backup ls --verify`"
            }
            _ => {
                "the next start moves the database aside and restores the newest valid backup; to \
                choose another: `latzero backup ls --verify`, then `latzero restore FILE`"
            }
        });
    }
    Ok(exit)
}

/// An error in the query rather than in the message that carried it.
fn explained(mut failure: Failure) -> Failure {
    let wire = failure
        .wire
        .as_ref()
        .filter(|wire| wire["code"] == "bad_message");
    let message = wire.and_then(|wire| wire["message"].as_str());
    if let Some((what, _)) = message.and_then(|message| message.rsplit_once("; ")) {
        failure.errors = vec![what.to_owned()];
        failure.help = Some(
            "a query is one SELECT; `latzero db query 'select sql from sqlite_schema'` shows the \
             tables"
                .to_owned(),
        );
    }
    failure
}

fn query(args: &DbQueryArgs, output: &Output) -> CommandResult {
    let answer = match args
        .reach
        .connect(&ConnectOptions::once("db query").waiting_for_disk())
    {
        Ok(reached) => {
            let request = json!({"action": "db_query", "sql": args.sql});
            let answer = output.while_working("running the query", || reached.administer(&request));
            answer.map_err(explained)?
        }
        Err(failure) if failure.exit == Exit::NotRunning && !args.reach.is_elsewhere() => {
            let offline = take_offline(&args.reach, failure)?;
            output.while_working("running the query", || offline.query(&args.sql))?
        }
        Err(failure) => return Err(failure),
    };
    if output.json {
        output.value(&answer)?;
        return Ok(Exit::Ok);
    }
    let texts = |values: &Value| -> Vec<String> {
        let values = values.as_array().into_iter().flatten();
        values
            .map(|value| match value {
                Value::String(text) => text.clone(),
                Value::Null => String::new(),
                other => other.to_string(),
            })
            .collect()
    };
    let head = texts(&answer["columns"]);
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let rows = answer["rows"].as_array().into_iter().flatten();
    let rows: Vec<Vec<Cell>> = rows
        .map(|row| texts(row).into_iter().map(Cell::from).collect())
        .collect();
    output.table(&head, &rows)?;
    if answer["cut"] == true {
        output.note("the result was cut off; use LIMIT and OFFSET to get the rest");
    }
    Ok(Exit::Ok)
}

fn dump(args: &DbDumpArgs, output: &Output) -> CommandResult {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match args
        .reach
        .connect(&ConnectOptions::once("db dump").waiting_for_disk())
    {
        Ok(reached) => {
            let stats = reached.app.request(&json!({"action": "stats"}))?;
            let dir = stats["server"]["data_dir"].as_str().unwrap_or_default();
            // A name that no start takes for a backup, and that the next one removes if this
            // program can't.
            let copy = Path::new(dir).join(format!("backups/.tmp-dump-{}.db", std::process::id()));
            let request = json!({"action": "backup", "to": copy, "without_blocks": true});
            output.while_working("copying the database", || reached.administer(&request))?;
            let dumped = maintenance::dump_backup(&copy, &mut out);
            let _ = std::fs::remove_file(&copy);
            dumped?;
        }
        Err(failure) if failure.exit == Exit::NotRunning && !args.reach.is_elsewhere() => {
            take_offline(&args.reach, failure)?.dump(&mut out)?;
        }
        Err(failure) => return Err(failure),
    }
    std::io::Write::flush(&mut out)?;
    Ok(Exit::Ok)
}

/// The directory that no server runs on, as `not_running` says; that stays the answer where there
/// is no database.
fn take_offline(reach: &ServerArgs, not_running: Failure) -> Result<Offline, Failure> {
    let dir = reach.data_dir().0;
    if !dir.join("data.db").exists() {
        return Err(not_running);
    }
    private_umask();
    Ok(Offline::lock(&dir)?)
}

fn check_files(args: &DbCheckArgs, failure: Failure, output: &Output) -> Result<Value, Failure> {
    let started = Instant::now();
    let offline = take_offline(&args.reach, failure)?;
    let findings = output.while_working("checking", || offline.check(args.full))?;
    Ok(json!({
        "ok": findings.is_empty(), "findings": findings, "full": args.full,
        "took_ms": started.elapsed().as_millis() as u64,
    }))
}
