//! `doctor`: what stands between this machine and a server that runs well.

use latzero_server::doctor::{self, Status};
use latzero_server::settings::{Environment, load};
use serde_json::json;

use crate::args::DoctorArgs;
use crate::exit::{Done, Exit};
use crate::output::{Output, Tone, toned};

pub(crate) fn run(args: &DoctorArgs, output: &Output) -> Done {
    let environment = Environment::of_process();
    let overrides = args.settings.overrides();
    let resolved = load(&environment, &overrides, args.settings.config.as_deref());
    let findings = doctor::examine(&resolved, &environment);
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
                let mends = toned(format!("mend it with: {command}"), Tone::Strong);
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
