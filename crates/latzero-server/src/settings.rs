//! Settings: one table, four places they may come from, and where each value did come from.
//!
//! The command line beats the environment, which beats files, which beat the defaults. Everything
//! here is a function of its inputs: the environment, the files and the flags are handed in, so a
//! test needs no global state. Only [`Environment::of_process`] and [`load`] look at the machine.

mod file;
mod reference;
mod table;
mod value;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use file::{FILE_BYTES_MAX, FILES_MAX, Layer, load, parse_file};
pub use latzero_fabric::limits::{Limits, Takes};
pub use reference::default_config;
pub use table::{SETTINGS, Setting, Settings};
pub use value::{Kind, LogFormat, LogLevel, SocketChoice, StoreDurability, Value};

/// What every variable of this project begins with.
const VARIABLE_PREFIX: &str = "LATZERO_";

/// Variables that are no settings: clients read them, handlers that `latzero serve` runs, and crash tests.
pub const OTHER_VARIABLES: &[&str] = &[
    "LATZERO_URL",
    "LATZERO_ADMIN_TOKEN",
    "LATZERO_BIN",
    "LATZERO_TRIGGER",
    "LATZERO_POOL",
    "LATZERO_CALLER",
    "LATZERO_CALLER_INSTANCE",
    "LATZERO_HEADERS",
    "LATZERO_DEADLINE",
    "LATZERO_ATTEMPT",
    "LATZERO_ID",
    "LATZERO_BLOCK",
    "LATZERO_FENCE",
    "LATZERO_LOCKS",
    "LATZERO_FAILPOINT",
];

/// The exit code of a program that was given bad settings: usage, as for a bad flag.
pub const EXIT_SETTINGS: u8 = 2;

/// The environment, as far as settings and start-up look at it.
#[derive(Clone, Debug, Default)]
pub struct Environment(BTreeMap<String, OsString>);

impl Environment {
    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        // A variable whose name is not UTF-8 is none of ours.
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect()
    }

    /// The value of a variable that is set and not empty.
    #[must_use]
    pub fn var(&self, name: &str) -> Option<&std::ffi::OsStr> {
        self.0
            .get(name)
            .map(OsString::as_os_str)
            .filter(|value| !value.is_empty())
    }
}

impl<K: Into<String>, V: Into<OsString>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        Environment(
            pairs
                .into_iter()
                .map(|(k, v)| (k.into(), v.into()))
                .collect(),
        )
    }
}

/// One value from the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// The setting's name: `port`.
    pub name: String,
    /// Its value as typed.
    pub value: String,
    /// The flag as a person knows it: `--port`.
    pub flag: String,
}

impl Override {
    /// An override of the setting `name` by `flag`.
    pub fn new(
        name: impl Into<String>,
        value: impl Into<String>,
        flag: impl Into<String>,
    ) -> Override {
        Override {
            name: name.into(),
            value: value.into(),
            flag: flag.into(),
        }
    }
}

/// A settings file that was read.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// Its path, for messages.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// How it was found.
    pub found: Found,
}

/// How a settings file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// In `<data-dir>/config/`; so it cannot say where the data directory is.
    InDataDir,
    /// Named with `--config`.
    Named,
}

/// Everything that settings are made of.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The environment.
    pub environment: Environment,
    /// Files, the later ones winning.
    pub files: Vec<ConfigFile>,
    /// The command line, the later ones winning.
    pub command_line: Vec<Override>,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The table.
    Default,
    /// This file.
    File(PathBuf),
    /// This variable.
    Environment(String),
    /// This flag.
    CommandLine(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::File(path) => write!(f, "file {}", path.display()),
            Source::Environment(variable) => write!(f, "environment {variable}"),
            Source::CommandLine(flag) => write!(f, "command line {flag}"),
        }
    }
}

/// A place in a file, both counted from 1, the column in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

/// One thing wrong with the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsError {
    /// Where it was written.
    pub source: Source,
    /// Where in the file, as far as that is known.
    pub at: Option<Position>,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No setting has this name.
    UnknownKey {
        /// The key, or the variable, as written.
        key: String,
        /// The known one that looks most like it.
        nearest: Option<String>,
    },
    /// The value is not of the setting's kind, or out of its bounds.
    BadValue {
        /// The setting.
        key: &'static str,
        /// What would do.
        expected: String,
        /// What was there, shortened.
        found: String,
    },
    /// The file is not TOML.
    Syntax(String),
    /// The file or directory cannot be read.
    Unreadable(String),
    /// The file is larger than [`FILE_BYTES_MAX`].
    FileTooLarge,
    /// There are more files than [`FILES_MAX`].
    TooManyFiles,
    /// A file inside the data directory says where the data directory is.
    DataDirInItself,
    /// A path begins with `~` and `HOME` is not set.
    NoHome {
        /// The setting.
        key: &'static str,
    },
    /// The setting asks for what this build cannot do.
    NotInThisBuild {
        /// The setting.
        key: &'static str,
    },
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.source, self.at) {
            (Source::Default, _) => f.write_str("default")?,
            (Source::File(path), Some(at)) => {
                write!(f, "{}:{}:{}", path.display(), at.line, at.column)?;
            }
            (Source::File(path), None) => write!(f, "{}", path.display())?,
            (Source::Environment(variable), _) => write!(f, "environment variable {variable}")?,
            (Source::CommandLine(flag), _) => write!(f, "command line {flag}")?,
        }
        match &self.problem {
            Problem::UnknownKey { key, nearest } => {
                write!(f, ": there is no setting `{key}`")?;
                match nearest {
                    Some(nearest) => write!(f, "; the nearest is `{nearest}`"),
                    None => f.write_str("; `latzero config show` lists them all"),
                }
            }
            Problem::BadValue {
                key,
                expected,
                found,
            } => {
                write!(f, ": `{key}` must be {expected}, not {found}")
            }
            Problem::Syntax(message) => write!(f, ": not valid TOML: {message}"),
            Problem::Unreadable(message) => write!(f, ": cannot be read: {message}"),
            Problem::FileTooLarge => {
                write!(
                    f,
                    ": larger than {FILE_BYTES_MAX} bytes: that is no settings file"
                )
            }
            Problem::TooManyFiles => {
                write!(
                    f,
                    ": more than {FILES_MAX} settings files; put them together"
                )
            }
            Problem::DataDirInItself => f.write_str(
                ": `data_dir` cannot be set by a file inside the data directory; \
                 use --data-dir, LATZERO_DATA_DIR or a file named with --config",
            ),
            Problem::NoHome { key } => write!(
                f,
                ": `{key}` begins with ~ and HOME is not set; set HOME or write the whole path"
            ),
            Problem::NotInThisBuild { key } => write!(
                f,
                ": `{key}` is not in this build yet; leave it out, or set it to false"
            ),
        }
    }
}

impl std::error::Error for SettingsError {}

/// Everything wrong with the settings, one per line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsErrors(Vec<SettingsError>);

impl SettingsErrors {
    /// The errors; there is at least one.
    #[must_use]
    pub fn errors(&self) -> &[SettingsError] {
        &self.0
    }

    fn check(errors: Vec<SettingsError>) -> Result<(), SettingsErrors> {
        if errors.is_empty() {
            Ok(())
        } else {
            Err(SettingsErrors(errors))
        }
    }
}

impl From<SettingsError> for SettingsErrors {
    fn from(error: SettingsError) -> Self {
        SettingsErrors(vec![error])
    }
}

impl fmt::Display for SettingsErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SettingsErrors {}

/// One setting with the value in force and where that came from.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    value: Value,
    source: Source,
    at: Option<Position>,
}

/// The settings in force, each with where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// The typed values.
    pub settings: Settings,
    /// One per line of [`SETTINGS`].
    entries: Vec<Entry>,
}

/// One line of `config show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// The key.
    pub name: &'static str,
    /// The value, as a number, a boolean or text.
    pub value: Value,
    /// The value as people read it.
    pub text: String,
    /// The unit of a number: `bytes`, `ms` or nothing.
    pub unit: &'static str,
    /// Where the value comes from: `default`, `file PATH`, `environment VAR`, `command line FLAG`.
    pub source: String,
    /// The default as people read it.
    pub default: String,
    /// The variable that sets it.
    pub variable: String,
    /// Whether `reload` may change it.
    pub live: bool,
    /// What it does.
    pub doc: String,
}

/// One setting that a reload would change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The key.
    pub name: &'static str,
    /// The value so far, as people read it.
    pub from: String,
    /// The new one.
    pub to: String,
    /// Where the new one comes from.
    pub source: String,
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reload {
    /// In force from now on.
    pub applied: Vec<Change>,
    /// Changed, but in force only after a restart.
    pub needs_restart: Vec<Change>,
}

impl Resolved {
    /// The settings of a server that was told nothing.
    ///
    /// # Errors
    /// Where the home directory is not known.
    pub fn defaults(environment: &Environment) -> Result<Resolved, SettingsErrors> {
        let home = environment.var("HOME").map(OsString::from);
        let environment = home.map(|home| ("HOME", home)).into_iter().collect();
        resolve(&Inputs {
            environment,
            ..Inputs::default()
        })
    }

    /// What `config show` prints, in the order of the table.
    #[must_use]
    pub fn show(&self) -> Vec<Shown> {
        SETTINGS
            .iter()
            .zip(&self.entries)
            .map(|(setting, entry)| Shown {
                name: setting.name,
                text: setting.kind.render(&entry.value),
                value: entry.value.clone(),
                unit: setting.kind.unit(),
                source: entry.source.to_string(),
                default: setting.kind.render(&setting.default),
                variable: setting.variable(),
                live: setting.takes == Takes::Live,
                doc: setting.doc(),
            })
            .collect()
    }

    /// Refuses settings that ask for what this build cannot do, naming where they were set. Apart
    /// from [`resolve`], so that `config show` still shows them.
    ///
    /// # Errors
    /// One [`Problem::NotInThisBuild`] for each.
    pub fn check_available(&self) -> Result<(), SettingsErrors> {
        let errors = SETTINGS
            .iter()
            .zip(&self.entries)
            .filter(|(setting, entry)| {
                ["enable_tls", "cluster_mode"].contains(&setting.name)
                    && entry.value == Value::Bool(true)
            })
            .map(|(setting, entry)| SettingsError {
                source: entry.source.clone(),
                at: entry.at,
                problem: Problem::NotInThisBuild { key: setting.name },
            })
            .collect();
        SettingsErrors::check(errors)
    }

    /// The settings after a reload that found `fresh`: what may change live is taken over, the rest
    /// stays as it is until a restart.
    #[must_use]
    pub fn reload(&self, fresh: &Resolved) -> (Resolved, Reload) {
        let mut reload = Reload::default();
        let mut entries = Vec::with_capacity(SETTINGS.len());
        for ((setting, old), new) in SETTINGS.iter().zip(&self.entries).zip(&fresh.entries) {
            let change = || Change {
                name: setting.name,
                from: setting.kind.render(&old.value),
                to: setting.kind.render(&new.value),
                source: new.source.to_string(),
            };
            let taken = if old.value == new.value {
                new
            } else if setting.takes == Takes::Live {
                reload.applied.push(change());
                new
            } else {
                reload.needs_restart.push(change());
                old
            };
            entries.push(taken.clone());
        }
        (Resolved::from_entries(entries), reload)
    }

    fn from_entries(entries: Vec<Entry>) -> Resolved {
        let settings = Settings::from_values(entries.iter().map(|entry| &entry.value));
        Resolved { settings, entries }
    }
}

/// Puts the settings together.
///
/// # Errors
/// Every unknown key and bad value there is, each with where it was written.
pub fn resolve(inputs: &Inputs) -> Result<Resolved, SettingsErrors> {
    let mut errors = Vec::new();
    let mut entries: Vec<Entry> = SETTINGS
        .iter()
        .map(|setting| Entry {
            value: setting.default.clone(),
            source: Source::Default,
            at: None,
        })
        .collect();

    for file in &inputs.files {
        match parse_file(&file.path, &file.text) {
            Ok(layer) => layer.apply(file.found, &mut entries, &mut errors),
            Err(mut more) => errors.append(&mut more.0),
        }
    }
    apply_environment(&inputs.environment, &mut entries, &mut errors);
    for flag in &inputs.command_line {
        let source = Source::CommandLine(flag.flag.clone());
        match SETTINGS
            .iter()
            .position(|setting| setting.name == flag.name)
        {
            Some(index) => apply_text(index, &flag.value, source, &mut entries, &mut errors),
            None => errors.push(SettingsError {
                source,
                at: None,
                problem: Problem::UnknownKey {
                    key: value::quote(&flag.name),
                    nearest: nearest_key(&flag.name),
                },
            }),
        }
    }
    expand_home(&inputs.environment, &mut entries, &mut errors);

    SettingsErrors::check(errors)?;
    Ok(Resolved::from_entries(entries))
}

fn apply_environment(
    environment: &Environment,
    entries: &mut [Entry],
    errors: &mut Vec<SettingsError>,
) {
    for (variable, value) in &environment.0 {
        if !variable.starts_with(VARIABLE_PREFIX) || OTHER_VARIABLES.contains(&variable.as_str()) {
            continue;
        }
        let source = Source::Environment(variable.clone());
        // Any other variable may belong to another program: see `unknown_variables`.
        let Some(index) = SETTINGS
            .iter()
            .position(|setting| setting.variable() == *variable)
        else {
            continue;
        };
        let Some(text) = value.to_str() else {
            errors.push(SettingsError {
                source,
                at: None,
                problem: Problem::BadValue {
                    key: SETTINGS[index].name,
                    expected: SETTINGS[index].kind.expected(),
                    found: "bytes that are not UTF-8".to_owned(),
                },
            });
            continue;
        };
        apply_text(index, text, source, entries, errors);
    }
}

/// A warning for each variable that begins as settings do and is none. It may be a typing error, or
/// belong to another program, so it is ignored.
#[must_use]
pub fn unknown_variables(environment: &Environment) -> Vec<String> {
    let is_unknown = |variable: &&String| {
        variable.starts_with(VARIABLE_PREFIX)
            && !OTHER_VARIABLES.contains(&variable.as_str())
            && !SETTINGS
                .iter()
                .any(|setting| setting.variable() == **variable)
    };
    let warning = |variable: &String| {
        let near = nearest_variable(variable);
        let near = near.map_or_else(String::new, |near| format!("; the nearest is `{near}`"));
        format!(
            "environment variable {} is not a setting and is ignored{near}",
            value::quote(variable)
        )
    };
    environment
        .0
        .keys()
        .filter(is_unknown)
        .map(warning)
        .collect()
}

fn apply_text(
    index: usize,
    text: &str,
    source: Source,
    entries: &mut [Entry],
    errors: &mut Vec<SettingsError>,
) {
    let setting = &SETTINGS[index];
    match setting.kind.parse_text(text) {
        Some(value) => {
            entries[index] = Entry {
                value,
                source,
                at: None,
            }
        }
        None => errors.push(SettingsError {
            source,
            at: None,
            problem: Problem::BadValue {
                key: setting.name,
                expected: setting.kind.expected(),
                found: format!("\"{}\"", value::quote(text)),
            },
        }),
    }
}

/// Replaces a leading `~` of paths by the home directory.
fn expand_home(environment: &Environment, entries: &mut [Entry], errors: &mut Vec<SettingsError>) {
    let home = environment.var("HOME").and_then(|home| home.to_str());
    for (setting, entry) in SETTINGS.iter().zip(entries) {
        let (Kind::Path | Kind::Socket, Value::Text(path)) = (setting.kind, &mut entry.value)
        else {
            continue;
        };
        let rest = match path.strip_prefix('~') {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
            _ => continue,
        };
        match home {
            Some(home) => *path = format!("{}{rest}", home.trim_end_matches('/')),
            None => errors.push(SettingsError {
                source: entry.source.clone(),
                at: entry.at,
                problem: Problem::NoHome { key: setting.name },
            }),
        }
    }
}

/// The known key that looks most like `key`, where one does.
fn nearest_key(key: &str) -> Option<String> {
    // A key in the wrong table is near to the same key in the right one.
    let last = key.rsplit('.').next().unwrap_or(key);
    if let Some(setting) = SETTINGS
        .iter()
        .find(|s| s.name.rsplit('.').next() == Some(last))
    {
        return Some(setting.name.to_owned());
    }
    nearest(key, SETTINGS.iter().map(|setting| setting.name.to_owned()))
}

fn nearest_variable(variable: &str) -> Option<String> {
    let others = OTHER_VARIABLES.iter().map(|&other| other.to_owned());
    let name = variable.trim_start_matches(VARIABLE_PREFIX);
    let all: Vec<String> = SETTINGS
        .iter()
        .map(Setting::variable)
        .chain(others)
        .collect();
    let bare = all
        .iter()
        .map(|known| known.trim_start_matches(VARIABLE_PREFIX).to_owned());
    nearest(name, bare).map(|near| format!("{VARIABLE_PREFIX}{near}"))
}

/// The most similar of `known`, unless none is similar. Names longer than any known one are
/// compared by their beginning, so that the cost stays bounded.
fn nearest(name: &str, known: impl Iterator<Item = String>) -> Option<String> {
    /// Below this similarity (0 to 1) a hint would mislead.
    const SIMILAR_MIN: f64 = 0.7;
    let name: String = name.chars().take(64).collect();
    known
        .map(|candidate| (strsim::jaro_winkler(&name, &candidate), candidate))
        .filter(|(similarity, _)| *similarity >= SIMILAR_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Where the settings files of a data directory are.
#[must_use]
pub fn config_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("config")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        pairs
            .iter()
            .copied()
            .chain([("HOME", "/home/u"), ("PATH", "/bin")])
            .collect()
    }

    fn file(name: &str, text: &str) -> ConfigFile {
        ConfigFile {
            path: PathBuf::from(name),
            text: text.to_owned(),
            found: Found::InDataDir,
        }
    }

    fn inputs(files: &[&str], env: &[(&str, &str)], flags: &[(&str, &str)]) -> Inputs {
        Inputs {
            environment: environment(env),
            files: files
                .iter()
                .enumerate()
                .map(|(index, text)| file(&format!("/c/{index}.toml"), text))
                .collect(),
            command_line: flags
                .iter()
                .map(|(name, value)| {
                    Override::new(*name, *value, format!("--{}", name.replace('_', "-")))
                })
                .collect(),
        }
    }

    fn check_error(inputs: &Inputs, expected: &str) {
        let errors = resolve(inputs).expect_err("these settings are wrong");
        assert_eq!(errors.to_string(), expected);
    }

    fn source_of(resolved: &Resolved, name: &str) -> String {
        resolved
            .show()
            .into_iter()
            .find(|shown| shown.name == name)
            .unwrap()
            .source
    }

    #[test]
    fn defaults() {
        let Settings {
            port,
            host,
            data_dir,
            socket,
            log_level,
            drain_timeout,
            limits,
            ..
        } = resolve(&inputs(&[], &[], &[])).unwrap().settings;
        assert_eq!((port, host.as_str()), (45227, "127.0.0.1"));
        assert_eq!(data_dir, Path::new("/home/u/.latzero"));
        assert_eq!((socket, log_level), (SocketChoice::Auto, LogLevel::Info));
        assert_eq!(drain_timeout.as_millis(), 10_000);
        assert_eq!((limits.max_frame, limits.meta_bytes_max), (16 << 20, 8192));
        assert_eq!(
            (limits.outbox_total_bytes_max, limits.read_budget_bytes),
            (0, 262_144)
        );
    }

    #[test]
    fn each_place_beats_the_one_before() {
        let files = [
            "port = 1\nhost = 'a'\nio_threads = 2",
            "port = 2\nhost = 'b'",
        ];
        let all = inputs(
            &files,
            &[("LATZERO_PORT", "3"), ("LATZERO_LIMITS_MAX_FRAME", "1 MiB")],
            &[("port", "4")],
        );
        let resolved = resolve(&all).unwrap();
        assert_eq!(resolved.settings.port, 4);
        assert_eq!(resolved.settings.host, "b");
        assert_eq!(resolved.settings.io_threads, 2);
        assert_eq!(resolved.settings.limits.max_frame, 1 << 20);
        for (name, source) in [
            ("port", "command line --port"),
            ("host", "file /c/1.toml"),
            ("io_threads", "file /c/0.toml"),
            ("limits.max_frame", "environment LATZERO_LIMITS_MAX_FRAME"),
            ("log_level", "default"),
        ] {
            assert_eq!(source_of(&resolved, name), source, "{name}");
        }
        let without_flag = resolve(&Inputs {
            command_line: vec![],
            ..all
        })
        .unwrap();
        assert_eq!(without_flag.settings.port, 3);
    }

    #[test]
    fn every_setting_has_a_variable_and_a_flag() {
        for setting in SETTINGS.iter() {
            let default = setting.kind.render(&setting.default);
            let env = [(setting.variable(), default.clone())];
            let resolved = resolve(&Inputs {
                environment: env
                    .into_iter()
                    .chain([("HOME".into(), "/h".into())])
                    .collect(),
                ..Inputs::default()
            })
            .unwrap();
            assert!(source_of(&resolved, setting.name).starts_with("environment LATZERO_"));
            let resolved = resolve(&inputs(&[], &[], &[(setting.name, &default)])).unwrap();
            assert!(source_of(&resolved, setting.name).starts_with("command line --"));
        }
    }

    #[test]
    fn variables_of_others_are_left_alone() {
        let env = [
            ("LATZERO_URL", "latzero://x"),
            ("LATZERO_ADMIN_TOKEN", "t"),
            ("LATZERO_SOCKET", "off"),
        ];
        let resolved = resolve(&inputs(&[], &env, &[])).unwrap();
        assert_eq!(resolved.settings.socket, SocketChoice::Off);
    }

    #[test]
    fn unknown_variables_are_warnings() {
        let check = |name: &str, expected: &[&str]| {
            let environment = Environment::from_iter([(name.to_owned(), OsString::from("1"))]);
            assert_eq!(unknown_variables(&environment), expected);
            resolve(&Inputs {
                environment,
                ..Inputs::default()
            })
            .unwrap();
        };
        check("LATZERO_LOCKS", &[]);
        check("OTHER_PORT", &[]);
        check(
            "LATZERO_PROT",
            &[
                "environment variable `LATZERO_PROT` is not a setting and is ignored; \
               the nearest is `LATZERO_PORT`",
            ],
        );
        check(
            "LATZERO_XYZ",
            &["environment variable `LATZERO_XYZ` is not a setting and is ignored"],
        );
    }

    #[test]
    fn errors_of_variables() {
        check_error(
            &inputs(&[], &[("LATZERO_PORT", "70000")], &[]),
            "environment variable LATZERO_PORT: `port` must be an integer from 0 to 65535, \
             not \"70000\"",
        );
        check_error(
            &inputs(&[], &[("LATZERO_ENABLE_TLS", "maybe")], &[]),
            "environment variable LATZERO_ENABLE_TLS: `enable_tls` must be true or false, \
             not \"maybe\"",
        );
        check_error(
            &inputs(&[], &[("LATZERO_HOST", "")], &[]),
            "environment variable LATZERO_HOST: `host` must be text that is not empty, not \"\"",
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_variable_that_is_not_utf8_is_refused() {
        use std::os::unix::ffi::OsStringExt;
        let environment = [("LATZERO_HOST", OsString::from_vec(vec![0xff]))]
            .into_iter()
            .collect();
        let errors = resolve(&Inputs {
            environment,
            ..Inputs::default()
        })
        .unwrap_err();
        assert!(
            errors.to_string().contains("bytes that are not UTF-8"),
            "{errors}"
        );
    }

    #[test]
    fn errors_of_flags() {
        check_error(
            &inputs(&[], &[], &[("log_level", "loud")]),
            "command line --log-level: `log_level` must be one of error, warn, info, debug, \
             trace, not \"loud\"",
        );
        check_error(
            &inputs(&[], &[], &[("prot", "1")]),
            "command line --prot: there is no setting `prot`; the nearest is `port`",
        );
        check_error(
            &inputs(&[], &[], &[("zzz", "1")]),
            "command line --zzz: there is no setting `zzz`; `latzero config show` lists them all",
        );
    }

    #[test]
    fn errors_of_files() {
        for (text, expected) in [
            (
                "prot = 1",
                "/c/0.toml:1:1: there is no setting `prot`; the nearest is `port`",
            ),
            (
                "\n[limits]\nport = 1",
                "/c/0.toml:3:1: there is no setting `limits.port`; the nearest is `port`",
            ),
            (
                "max_frame = 1",
                "/c/0.toml:1:1: there is no setting `max_frame`; the nearest is `limits.max_frame`",
            ),
            (
                "[limit]\nmax_frame = 1",
                "/c/0.toml:2:1: there is no setting `limit.max_frame`; \
                 the nearest is `limits.max_frame`",
            ),
            (
                "# é\nport = 'abc'",
                "/c/0.toml:2:8: `port` must be an integer from 0 to 65535, not \"abc\"",
            ),
            (
                "port = -1",
                "/c/0.toml:1:8: `port` must be an integer from 0 to 65535, not -1",
            ),
            (
                "enable_tls = 1",
                "/c/0.toml:1:14: `enable_tls` must be true or false, not 1",
            ),
            (
                "[port]",
                "/c/0.toml:1:2: `port` must be an integer from 0 to 65535, not a table",
            ),
            (
                "limits = 3",
                "/c/0.toml:1:10: `limits` must be a table of settings, not 3",
            ),
            (
                "data_dir = '/x'",
                "/c/0.toml:1:1: `data_dir` cannot be set by a file inside the data directory; \
                 use --data-dir, LATZERO_DATA_DIR or a file named with --config",
            ),
        ] {
            check_error(&inputs(&[text], &[], &[]), expected);
        }
        let broken = resolve(&inputs(&["port = 1\nhost = \n"], &[], &[])).unwrap_err();
        assert!(
            broken
                .to_string()
                .starts_with("/c/0.toml:2:8: not valid TOML: "),
            "{broken}"
        );
        let twice = resolve(&inputs(&["port = 1\nport = 2"], &[], &[])).unwrap_err();
        assert!(
            twice
                .to_string()
                .starts_with("/c/0.toml:2:1: not valid TOML: "),
            "{twice}"
        );
    }

    #[test]
    fn all_errors_are_told_at_once() {
        let errors = resolve(&inputs(
            &["prot = 1\nhost = 3", "port = 'x'"],
            &[("LATZERO_PORTS", "1")],
            &[("host", "")],
        ))
        .unwrap_err();
        assert_eq!(errors.errors().len(), 5, "{errors}");
    }

    #[test]
    fn a_named_file_may_set_the_data_dir() {
        let mut inputs = inputs(&["data_dir = '~/x'"], &[], &[]);
        inputs.files[0].found = Found::Named;
        assert_eq!(
            resolve(&inputs).unwrap().settings.data_dir,
            Path::new("/home/u/x")
        );
    }

    #[test]
    fn home() {
        let inputs = Inputs::default();
        check_error(
            &inputs,
            "default: `data_dir` begins with ~ and HOME is not set; \
             set HOME or write the whole path",
        );
        let elsewhere = Inputs {
            command_line: vec![Override::new("data_dir", "/srv/~x", "--data-dir")],
            ..Inputs::default()
        };
        assert_eq!(
            resolve(&elsewhere).unwrap().settings.data_dir,
            Path::new("/srv/~x")
        );
    }

    #[test]
    fn a_reload_takes_what_may_change_live() {
        let old = resolve(&inputs(&["port = 1\nlog_level = 'info'"], &[], &[])).unwrap();
        let fresh = resolve(&inputs(
            &["port = 2\nlog_level = 'debug'\n[limits]\nconnections_max = 5"],
            &[],
            &[],
        ))
        .unwrap();
        let (now, reload) = old.reload(&fresh);
        assert_eq!(now.settings.port, 1);
        assert_eq!(now.settings.log_level, LogLevel::Debug);
        assert_eq!(now.settings.limits.connections_max, 5);
        let names = |changes: &[Change]| changes.iter().map(|c| c.name).collect::<Vec<_>>();
        assert_eq!(
            names(&reload.applied),
            ["log_level", "limits.connections_max"]
        );
        assert_eq!(names(&reload.needs_restart), ["port"]);
        assert_eq!(
            (
                reload.needs_restart[0].from.as_str(),
                reload.needs_restart[0].to.as_str()
            ),
            ("1", "2")
        );
        assert_eq!(now.reload(&now).1, Reload::default());
    }

    #[test]
    fn what_this_build_cannot_do_is_refused_by_name() {
        let resolved = resolve(&inputs(
            &[],
            &[("LATZERO_CLUSTER_MODE", "yes")],
            &[("enable_tls", "true")],
        ))
        .unwrap();
        assert_eq!(
            resolved.check_available().unwrap_err().to_string(),
            "command line --enable-tls: `enable_tls` is not in this build yet; \
             leave it out, or set it to false\n\
             environment variable LATZERO_CLUSTER_MODE: `cluster_mode` is not in this build yet; \
             leave it out, or set it to false"
        );
        assert_eq!(
            resolve(&inputs(&[], &[], &[])).unwrap().check_available(),
            Ok(())
        );
    }

    #[test]
    fn shown_as_json() {
        let shown = resolve(&inputs(&[], &[], &[])).unwrap().show();
        assert_eq!(shown.len(), SETTINGS.len());
        let json = serde_json::to_value(&shown[0]).unwrap();
        assert_eq!(json["name"], "port");
        assert_eq!(json["value"], 45227);
        assert_eq!(json["source"], "default");
        let frame = shown.iter().find(|s| s.name == "limits.max_frame").unwrap();
        assert_eq!((frame.text.as_str(), frame.unit), ("16 MiB", "bytes"));
    }
}
