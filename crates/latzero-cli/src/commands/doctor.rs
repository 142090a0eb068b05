//! `doctor`: diagnoses why the server cannot start or does not run well.

use std::time::Duration;

use latzero_server::doctor::{self, Finding, Status};
use latzero_server::maintenance::{self, Depth};
use latzero_server::settings::{Environment, Settings, load};
use latzero_server::startup::lock;
use serde_json::json;

use crate::args::SettingsArgs;
use crate::connect::{ConnectOptions, ServerArgs};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, Tone, toned};
use crate::parse::shell;

use super::store::{creation_time, losses, sentences};

/// How long a server may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &SettingsArgs, output: &Output) -> CommandResult {
    let environment = Environment::of_process();
    let overrides = args.overrides();
    let resolved = load(&environment, &overrides, args.config.as_deref());
    let mut findings = doctor::examine(&resolved, &environment);
    if let Ok(resolved) = &resolved {
        findings.extend(store(&resolved.settings));
        findings.extend(backups(&resolved.settings));
    }
    let worst = findings.iter().map(|finding| finding.status).max();
    let exit = match worst {
        Some(Status::Fail) => Exit::Unhealthy,
        Some(Status::Warn | Status::Ok) | None => Exit::Ok,
    };
    if output.json {
        output.value(&json!({"status": worst, "findings": findings}))?;
        return Ok(exit);
    }
    let mut rows = Vec::new();
    for finding in &findings {
        let (word, tone) = match finding.status {
            Status::Ok => ("ok", Tone::Good),
            Status::Warn => ("warn", Tone::Warn),
            Status::Fail => ("fail", Tone::Bad),
        };
        let mut row = vec![
            toned(word, tone),
            finding.name.into(),
            finding.what.as_str().into(),
        ];
        let Some(command) = &finding.command else {
            rows.push(row);
            continue;
        };
        match output.is_terminal {
            true => {
                rows.push(row);
                let mends = toned(format!("fix it with: {command}"), Tone::Strong);
                rows.push(vec!["".into(), "".into(), mends]);
            }
            false => {
                row.push(command.into());
                rows.push(row);
            }
        }
    }
    output.table(&["", "", ""], &rows)?;
    Ok(exit)
}

/// What the server that runs on the directory reports about its store; nothing if none runs.
fn store(settings: &Settings) -> Option<Finding> {
    let dir = settings.data_dir.canonicalize().ok()?;
    let pid = lock::holder(&dir)?.pid?;
    let reach = ServerArgs {
        data_dir: Some(dir.clone()),
        ..ServerArgs::default()
    };
    let shown = shell(&dir.to_string_lossy());
    let options = ConnectOptions::once("doctor").within(ANSWER_TIME);
    let health = reach.connect(&options).and_then(|connection| {
        let health = connection.app.request(&json!({"action": "health"}));
        health.map_err(Failure::from)
    });
    let health = match health {
        Ok(health) => health,
        Err(failure) => {
            return Some(Finding {
                name: "server",
                status: Status::Fail,
                what: format!("pid {pid}: {}", failure.errors.join("; ")),
                command: Some(format!("latzero logs --data-dir {shown}")),
            });
        }
    };
    let part = &health["components"]["store"];
    let (status, command) = match (part["status"] == "ok", part["seen"]["failing"].as_str()) {
        (true, _) => (Status::Ok, None),
        (false, Some(_)) => (Status::Fail, Some(format!("df -h {shown}"))),
        (false, None) => (
            Status::Warn,
            Some(format!("latzero backup ls --verify --data-dir {shown}")),
        ),
    };
    let mut what = losses(&health, Some("store"));
    what.extend(sentences(&part["seen"]));
    Some(Finding {
        name: "store",
        status,
        what: what.join("; "),
        command,
    })
}

/// Whether there is a backup to restore.
fn backups(settings: &Settings) -> Option<Finding> {
    let dir = &settings.data_dir;
    if !dir.join("data.db").exists() {
        return None;
    }
    let shown = shell(&dir.to_string_lossy());
    let files = maintenance::files(dir).ok()?;
    let total = files.len();
    let newest = files.into_iter().next();
    let (status, what, command) =
        match newest.map(|file| maintenance::list_one(file, Depth::Glance)) {
            None if settings.backup_interval.is_zero() => (
                Status::Warn,
                "there is no backup, and `backup_interval` is 0".to_owned(),
                Some(format!("latzero backup --data-dir {shown}")),
            ),
            None => (
                Status::Ok,
                "none yet; the server makes one every `backup_interval`".to_owned(),
                None,
            ),
            Some(maintenance::BackupEntry {
                summary: Ok(summary),
                ..
            }) => (
                Status::Ok,
                format!("{total}; the newest was made {}", creation_time(&summary)),
                None,
            ),
            Some(maintenance::BackupEntry {
                summary: Err(error),
                ..
            }) => (
                Status::Fail,
                format!("the newest is damaged: {error}"),
                Some(format!("latzero backup --data-dir {shown}")),
            ),
        };
    Some(Finding {
        name: "backups",
        status,
        what,
        command,
    })
}
