//! `config`: the settings in force and where each one comes from, and the commented default file.

use latzero_server::machine_limits::MachineLimits;
use latzero_server::settings::{self, Environment, Shown, load};
use serde_json::json;

use crate::args::{ConfigArgs, ConfigCommand, SettingsArgs};
use crate::exit::{CommandResult, Exit};
use crate::output::{Output, Tone, toned};

pub(crate) fn run(args: &ConfigArgs, output: &Output) -> CommandResult {
    match &args.what {
        ConfigCommand::Show(args) => show(&args.settings, args.changed, output),
        ConfigCommand::Default => {
            output.bytes(settings::default_config().as_bytes())?;
            Ok(Exit::Ok)
        }
    }
}

fn show(args: &SettingsArgs, only_changed: bool, output: &Output) -> CommandResult {
    let environment = Environment::of_process();
    let resolved = load(&environment, &args.overrides(), args.config.as_deref())?;
    let is_shown = |shown: &Shown| !only_changed || shown.source != "default";
    let shown = resolved.show(&MachineLimits::of_process());
    let shown: Vec<Shown> = shown.into_iter().filter(is_shown).collect();
    if output.json {
        output.value(&json!(shown))?;
        return Ok(Exit::Ok);
    }
    let rows: Vec<_> = shown
        .iter()
        .map(|shown| {
            let tone = match shown.source.as_str() {
                "default" => Tone::Dim,
                _ => Tone::Strong,
            };
            let (text, source) = match &shown.in_force {
                Some(in_force) => (
                    &in_force.text,
                    format!("{}; {}", shown.source, in_force.from),
                ),
                None => (&shown.text, shown.source.clone()),
            };
            vec![shown.name.into(), toned(text, tone), toned(source, tone)]
        })
        .collect();
    output.table(&["SETTING", "VALUE", "FROM"], &rows)?;
    Ok(Exit::Ok)
}
