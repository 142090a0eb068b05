//! `restore`: restores a backup into a data directory that no server uses.

use std::io::IsTerminal as _;
use std::path::Path;

use latzero_server::maintenance::{self, Depth, Offline, Summary};
use latzero_server::startup::lock;
use latzero_server::startup::{StartupError, private_umask};
use serde_json::json;

use crate::args::RestoreArgs;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Cell, Output, count};

use super::store::{contents, creation_time, to_json};

pub(crate) fn run(args: &RestoreArgs, output: &Output) -> CommandResult {
    // A server reads these files later; no other user may read them.
    private_umask();
    let file = &args.file;
    if let Err(error) = std::fs::File::open(file) {
        let text = format!("the backup '{}' cannot be opened: {error}", file.display());
        return Err(Failure::usage(text).with_help(
            "`latzero backup ls` lists the backups of a data \
                directory",
        ));
    }
    // Checked before anything is read, because it is the likeliest mistake.
    let dir = args.dir.path();
    refuse_running(&dir)?;
    let summary =
        maintenance::inspect(file, Depth::Glance).map_err(maintenance::MaintenanceError::from)?;
    let offline = Offline::lock(&dir)?;
    if !args.yes && std::io::stdin().is_terminal() && !is_wanted(file, &summary, &offline, output)?
    {
        return Err(Failure::new(
            Exit::Failure,
            "cancelled; nothing was changed",
        ));
    }
    let doing = format!("restoring {}", file.display());
    let restored = output.while_working(doing, || offline.restore(file))?;
    let dir = offline.path().display().to_string();
    if output.json {
        output.value(&json!({
            "restored": file, "data_dir": dir, "holds": to_json(&restored.summary),
            "set_aside": restored.set_aside, "blocks_set_aside": restored.blocks_set_aside,
        }))?;
        return Ok(Exit::Ok);
    }
    let mut facts: Vec<(&str, Cell)> = vec![
        ("restored", file.display().into()),
        ("into", dir.into()),
        ("made", creation_time(&restored.summary).into()),
        ("contents", contents(&to_json(&restored.summary)).into()),
    ];
    if let Some(former) = restored.set_aside.first() {
        facts.push(("kept", former.display().into()));
    }
    let blocks = restored.blocks_set_aside as u64;
    if blocks > 0 {
        let place = offline.path().join("memory/.orphans");
        let kept = format!(
            "{} from before, in {}",
            count(blocks, "block"),
            place.display()
        );
        facts.push(("kept", kept.into()));
    }
    output.facts(&facts)?;
    Ok(Exit::Ok)
}

fn refuse_running(dir: &Path) -> Result<(), Failure> {
    let Ok(data_dir) = dir.canonicalize() else {
        return Ok(());
    };
    match lock::holder(&data_dir) {
        Some(holder) => Err(
            maintenance::MaintenanceError::from(StartupError::AnotherServer { data_dir, holder })
                .into(),
        ),
        None => Ok(()),
    }
}

fn is_wanted(
    file: &Path,
    summary: &Summary,
    offline: &Offline,
    output: &Output,
) -> Result<bool, Failure> {
    output.note(format_args!(
        "{}, made {}: {}",
        file.display(),
        creation_time(summary),
        contents(&to_json(summary))
    ));
    let dir = offline.path().display();
    output.note(match offline.has_database() {
        true => format!(
            "It replaces the database in {dir}. The current one is kept in that directory as \
             replaced-…."
        ),
        false => format!("There is no database in {dir} yet."),
    });
    Ok(output.asks("Restore it?")?)
}
