//! `service`: runs the server as a systemd user service.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use latzero_server::ServerError;
use latzero_server::settings::{Environment, is_path, load};
use latzero_server::startup::check;
use serde_json::json;

use crate::args::{ServiceArgs, ServiceCommand, SettingsArgs};
use crate::connect::{expand_home, variable};
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::Output;

/// The name of the unit.
const UNIT: &str = "latzero.service";

pub(crate) fn run(args: &ServiceArgs, output: &Output) -> CommandResult {
    match &args.command {
        ServiceCommand::Show(settings) => {
            let unit = unit(settings)?;
            match output.json {
                true => output.value(&json!({"path": path(), "unit": unit}))?,
                false => output.bytes(unit.as_bytes())?,
            }
            Ok(Exit::Ok)
        }
        ServiceCommand::Install(settings) => install(settings, output),
        ServiceCommand::Uninstall => uninstall(output),
    }
}

/// The directory of this user's units.
fn path() -> PathBuf {
    let config = variable("XDG_CONFIG_HOME").unwrap_or_else(|| "~/.config".to_owned());
    expand_home(&config).join("systemd/user").join(UNIT)
}

fn unit(settings: &SettingsArgs) -> Result<String, Failure> {
    // What `start` refuses would fail at the next login, where nobody sees it.
    let resolved = load(
        &Environment::of_process(),
        &settings.overrides(),
        settings.config.as_deref(),
    )?;
    resolved.check_available()?;
    check(&resolved.settings).map_err(ServerError::Startup)?;
    let program = std::env::current_exe()
        .map_err(|error| Failure::new(Exit::Failure, format!("the program's path: {error}")))?;
    let mut words = vec![program.to_string_lossy().into_owned(), "start".to_owned()];
    for setting in settings.overrides() {
        // The service has another working directory.
        let is_word =
            ["auto", "off"].contains(&setting.value.as_str()) && setting.name != "data_dir";
        let value = match is_path(&setting.name) && !is_word {
            true => absolute(&expand_home(&setting.value))?,
            false => setting.value,
        };
        words.extend(["--set".to_owned(), format!("{}={value}", setting.name)]);
    }
    if let Some(file) = &settings.config {
        words.extend(["--config".to_owned(), absolute(file)?]);
    }
    let command: Vec<String> = words.iter().map(|word| escape(word)).collect();
    Ok(format!(
        "[Unit]\n\
         Description=LatZero server\n\
         \n\
         [Service]\n\
         Type=notify\n\
         ExecStart={}\n\
         Restart=on-failure\n\
         # Invalid settings, port in use, permission denied: restarting would not help.\n\
         RestartPreventExitStatus=2 75 77\n\
         \n\
         [Install]\n\
         WantedBy=default.target\n",
        command.join(" ")
    ))
}

fn absolute(path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    Ok(absolute.to_string_lossy().into_owned())
}

/// A word of a command line in a unit (systemd.service(5), "Command lines").
fn escape(word: &str) -> String {
    let escaped = word
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%")
        .replace('$', "$$");
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%$".contains(c);
    match !word.is_empty() && word.chars().all(is_plain) {
        true => escaped,
        false => format!("\"{escaped}\""),
    }
}

/// The steps that were taken, as they are taken.
struct Steps<'a> {
    output: &'a Output,
    done: Vec<String>,
}

impl Steps<'_> {
    fn new(output: &Output) -> Steps<'_> {
        Steps {
            output,
            done: Vec::new(),
        }
    }

    fn add(&mut self, step: String) -> Result<(), Failure> {
        if !self.output.json {
            self.output.line(&step)?;
        }
        self.done.push(step);
        Ok(())
    }

    fn systemctl(&mut self, args: &[&str]) -> Result<(), Failure> {
        let shown = format!("systemctl --user {}", args.join(" "));
        let ran = Command::new("systemctl").arg("--user").args(args).output();
        let why = match ran {
            Ok(ran) if ran.status.success() => return self.add(format!("ran {shown}")),
            Ok(ran) => String::from_utf8_lossy(&ran.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let mut failure = Failure::new(Exit::Failure, format!("`{shown}` failed: {why}"));
        failure.details.clone_from(&self.done);
        Err(failure.with_help(
            "check that systemd runs for this user with `systemctl --user status`, and repeat it",
        ))
    }

    fn end(self) -> CommandResult {
        if self.output.json {
            self.output
                .value(&json!({"path": path(), "steps": self.done}))?;
        }
        Ok(Exit::Ok)
    }
}

fn install(settings: &SettingsArgs, output: &Output) -> CommandResult {
    let (path, unit) = (path(), unit(settings)?);
    let failed = |error: std::io::Error| {
        Failure::new(
            Exit::Failure,
            format!(
                "the unit file {} cannot be written: {error}",
                path.display()
            ),
        )
    };
    let dir = path.parent().expect("its name was joined to one");
    let is_new = !path.exists();
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    file.write_all(unit.as_bytes()).map_err(failed)?;
    file.persist(&path).map_err(|error| failed(error.error))?;
    let mut steps = Steps::new(output);
    steps.add(format!("wrote {}", path.display()))?;
    steps.systemctl(&["daemon-reload"]).map_err(|mut failure| {
        // Without systemd the file would be left over.
        if is_new && std::fs::remove_file(&path).is_ok() {
            failure.details.push(format!("removed {}", path.display()));
        }
        failure
    })?;
    steps.systemctl(&["enable", UNIT])?;
    // Restarted, so that a running service gets the new settings.
    steps.systemctl(&["restart", UNIT])?;
    steps.end()
}

fn uninstall(output: &Output) -> CommandResult {
    let path = path();
    if !path.exists() {
        let text = format!("there is no unit file {}", path.display());
        return Err(Failure::new(Exit::Failure, text)
            .with_help("`latzero service install` installs the service"));
    }
    let mut steps = Steps::new(output);
    steps.systemctl(&["disable", "--now", UNIT])?;
    std::fs::remove_file(&path).map_err(|error| {
        let text = format!(
            "the unit file {} cannot be removed: {error}",
            path.display()
        );
        Failure::new(Exit::Failure, text)
    })?;
    steps.add(format!("removed {}", path.display()))?;
    steps.systemctl(&["daemon-reload"])?;
    steps.end()
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn words_of_a_unit() {
        assert_eq!(escape("/usr/bin/latzero"), "/usr/bin/latzero");
        assert_eq!(escape("data_dir=/a b"), "\"data_dir=/a b\"");
        assert_eq!(escape("50%"), "50%%");
        assert_eq!(escape("$HOME"), "$$HOME");
        assert_eq!(escape("a\"b\\c"), "\"a\\\"b\\\\c\"");
        assert_eq!(escape(""), "\"\"");
    }
}
