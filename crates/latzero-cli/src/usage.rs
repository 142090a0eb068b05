//! Explains mistakes in the command line, as text or, with `--json`, as JSON.

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::builder::PossibleValue;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ColorChoice, Command, CommandFactory as _, FromArgMatches as _};
use latzero_crypto::text::redact;

use crate::args::Cli;
use crate::exit::{Exit, Failure};
use crate::names::nearest;
use crate::output::{Color, Output};

/// Lines of the help of `start` that are shown if `-h` may have been meant as help.
const HELP_LINES: usize = 12;

/// Parses the command line; returns the exit code if there is nothing to run.
pub(crate) fn parse() -> Result<Cli, ExitCode> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let flags = GlobalFlags::of(&args);
    let command = Cli::command().color(match flags.color {
        Color::Auto => ColorChoice::Auto,
        Color::Always => ColorChoice::Always,
        Color::Never => ColorChoice::Never,
    });
    let parsed = command
        .try_get_matches_from(&args)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let mut error = match parsed {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    let is_help = matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    if is_help {
        let Err(failed) = error.print().and_then(|()| std::io::stdout().flush()) else {
            return Err(Exit::Ok.into());
        };
        let output = Output::new(flags.json, flags.color);
        return Err(output.failure(&failed.into()).into());
    }
    if is_bare_host(&args) {
        return Err(explain_host(&flags));
    }
    add_tips(&mut error, &args);
    if flags.json {
        let output = Output::new(true, flags.color);
        return Err(output.failure(&failure(&error)).into());
    }
    let text = error.render().to_string();
    if let Cow::Owned(without_tokens) = redact(&text) {
        let _ = write!(std::io::stderr(), "{without_tokens}");
    } else {
        let _ = error.print();
    }
    Err(Exit::Usage.into())
}

/// The global flags that can be found in an invalid command line.
struct GlobalFlags {
    json: bool,
    color: Color,
}

impl GlobalFlags {
    fn of(args: &[OsString]) -> GlobalFlags {
        let own = args.iter().skip(1).take_while(|arg| *arg != "--");
        let words: Vec<&str> = own.filter_map(|arg| arg.to_str()).collect();
        let color = |word: &str| match word {
            "always" => Some(Color::Always),
            "never" => Some(Color::Never),
            _ => None,
        };
        let colors = words.iter().enumerate().filter_map(|(at, word)| {
            let value = match word.strip_prefix("--color") {
                Some("") => words.get(at + 1)?,
                Some(rest) => rest.strip_prefix('=')?,
                None => return None,
            };
            color(value)
        });
        GlobalFlags {
            json: words.contains(&"--json"),
            // The last one counts, as it does for clap.
            color: colors
                .fold(None, |_, color| Some(color))
                .unwrap_or(Color::Auto),
        }
    }
}

/// Adds what clap does not say: where a command is, and the values of an argument that is missing.
fn add_tips(error: &mut clap::Error, args: &[OsString]) {
    let wrong = match error.get(ContextKind::InvalidSubcommand) {
        Some(ContextValue::String(wrong)) => Some(wrong.clone()),
        _ => None,
    };
    let mut root = Cli::command();
    root.build();
    let (mut command, mut path) = (&root, String::new());
    let words = args.iter().skip(1).filter_map(|arg| arg.to_str());
    for word in words.take_while(|word| Some(*word) != wrong.as_deref()) {
        if let Some(found) = command.find_subcommand(word) {
            command = found;
            path = format!("{path}{word} ");
        }
    }
    if let Some(wrong) = wrong {
        let names = command.get_subcommands().map(Command::get_name);
        let mut similar: Vec<String> = nearest(&wrong, names).into_iter().map(Into::into).collect();
        find(&wrong, command, &path, &mut similar);
        error.remove(ContextKind::SuggestedSubcommand);
        // Even if it has no tips, clap shows it: as an empty line.
        error.remove(ContextKind::Suggested);
        if !similar.is_empty() {
            let similar = ContextValue::Strings(similar);
            error.insert(ContextKind::SuggestedSubcommand, similar);
        }
    }
    if error.kind() == ErrorKind::MissingRequiredArgument
        && let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg)
    {
        let missing = command
            .get_arguments()
            .filter(|arg| missing.contains(&arg.to_string()));
        let tips = missing.filter_map(|arg| {
            let values = arg.get_possible_values();
            let values: Vec<&str> = values.iter().map(PossibleValue::get_name).collect();
            (!values.is_empty()).then(|| format!("{arg} is one of {}", values.join(", ")).into())
        });
        let tips: Vec<_> = tips.collect();
        if !tips.is_empty() {
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
        }
    }
}

/// Adds the commands below `group` that have this name.
fn find(name: &str, group: &Command, path: &str, found: &mut Vec<String>) {
    let commands = group.get_subcommands();
    // `help` has every command once more.
    for command in commands.filter(|command| command.get_name() != "help") {
        let path = format!("{path}{} ", command.get_name());
        if command.get_name() == name {
            found.push(path.trim_end().to_owned());
        }
        find(name, command, &path, found);
    }
}

/// The parts of an error message from clap: what is wrong, and tips.
fn failure(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let mut message = Vec::new();
    let mut tips = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        match (line.strip_prefix("error: "), line.strip_prefix("tip: ")) {
            (Some(what), _) => message.push(what),
            (None, Some(tip)) => tips.push(tip),
            (None, None) => message.push(line),
        }
    }
    // Without arguments clap prints the help, not an error message.
    let message = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing".to_owned(),
        _ => message.join(" "),
    };
    let help = match tips.is_empty() {
        true => {
            "`latzero help` lists the commands, and `latzero COMMAND --help` its arguments".into()
        }
        false => tips.join("; "),
    };
    Failure::usage(message).with_help(help)
}

/// Whether `-h`, the host of `start`, has no value.
fn is_bare_host(args: &[OsString]) -> bool {
    let words: Vec<&str> = args.iter().skip(1).filter_map(|arg| arg.to_str()).collect();
    let command = words.iter().find(|word| !word.starts_with('-'));
    let at = words.iter().position(|word| *word == "-h");
    let value = at.and_then(|at| words.get(at + 1));
    command == Some(&"start") && at.is_some() && value.is_none_or(|value| value.starts_with('-'))
}

fn explain_host(flags: &GlobalFlags) -> ExitCode {
    let failure = Failure::usage(
        "-h needs a value here: for `start` it is the address to listen on",
    )
    .with_help(
        "`latzero start -h 127.0.0.1` sets it; `latzero start --help` prints the whole help",
    );
    let output = Output::new(flags.json, flags.color);
    if !flags.json {
        let mut command = Cli::command();
        command.build();
        let help = command
            .find_subcommand_mut("start")
            .map(|start| start.render_help().to_string());
        let lines: Vec<String> = help
            .iter()
            .flat_map(|help| help.lines())
            .take(HELP_LINES)
            .map(str::to_owned)
            .collect();
        output.note(lines.join("\n"));
        output.note("  …");
    }
    output.failure(&failure).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn a_host_without_a_value_is_detected() {
        let check = |text: &str, expected: bool| {
            assert_eq!(is_bare_host(&words(text)), expected, "{text}");
        };
        check("latzero start -h", true);
        check("latzero --json start -h -p 0", true);
        check("latzero start -h ::1", false);
        check("latzero start", false);
        check("latzero call -h", false);
    }

    #[test]
    fn global_flags_are_found_in_an_invalid_command_line() {
        let check = |text: &str, json: bool, color: Color| {
            let flags = GlobalFlags::of(&words(text));
            assert_eq!((flags.json, flags.color), (json, color), "{text}");
        };
        check("latzero nonsense --json --color never", true, Color::Never);
        check("latzero --color=always x -- --json", false, Color::Always);
        check("latzero --color", false, Color::Auto);
    }

    #[test]
    fn usage_errors_have_a_message_and_a_tip() {
        use clap::Parser as _;
        let failure = |text: &str| failure(&Cli::try_parse_from(words(text)).unwrap_err());
        let unknown = failure("latzero status --jsn");
        assert_eq!(unknown.errors, ["unexpected argument '--jsn' found"]);
        assert_eq!(
            unknown.help.as_deref(),
            Some("a similar argument exists: '--json'")
        );
        let missing = failure("latzero call");
        assert!(
            missing.errors[0].contains("[POOL/]TRIGGER"),
            "{:?}",
            missing.errors
        );
        assert_eq!(failure("latzero").errors, ["a command is missing"]);
    }

    #[test]
    fn tips_name_commands_and_values() {
        use clap::Parser as _;
        let tip = |text: &str| {
            let mut error = Cli::try_parse_from(words(text)).unwrap_err();
            add_tips(&mut error, &words(text));
            assert!(!error.to_string().contains("\n\n\n"), "{error}");
            failure(&error).help.unwrap()
        };
        let check = |text: &str, expected: &str| {
            let tip = tip(text);
            assert!(tip.contains(expected), "{text}: {tip}");
        };
        check("latzero nosuch", "`latzero help` lists the commands");
        check("latzero sttaus", "'status'");
        check("latzero --json app show x", "exists: 'app key show'");
        check("latzero purge", "exists: 'parked purge'");
        check("latzero bench", "<MEASURED> is one of call, emit");
        check("latzero completion", "<SHELL> is one of bash, ");
        check("latzero keys export p", "--role <ROLE> is one of join, ");
        check("latzero call", "`latzero help` lists the commands");
    }

    #[test]
    fn values_say_what_they_are() {
        use clap::Parser as _;
        let check = |text: &str, expected: &str| {
            let failure = failure(&Cli::try_parse_from(words(text)).unwrap_err());
            assert!(failure.errors[0].ends_with(expected), "{failure:?}");
        };
        check("latzero on x --count 0", "a count is at least 1, not '0'");
        let number = "expected the number that `latzero parked ls` shows";
        check("latzero parked show x", number);
        check("latzero parked cancel 1 x", number);
    }

    #[test]
    fn the_help_has_no_gaps() {
        let help = Cli::command().render_long_help().to_string();
        assert!(!help.contains("\n\n\n"), "{help}");
    }
}
