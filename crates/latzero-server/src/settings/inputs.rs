//! The sources of settings before they are parsed: the environment, files and the command line.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

/// The prefix of all variables of this project.
pub(super) const VARIABLE_PREFIX: &str = "LATZERO_";

/// Variables that change how the client libraries work: which `latzero` they start, and what they
/// check and avoid. There is no secret in them, and `latzero serve` passes them on.
pub const SDK_VARIABLES: [&str; 4] = [
    "LATZERO_BIN",
    "LATZERO_DEBUG",
    "LATZERO_NODE_DRIVER",
    "LATZERO_NO_EXTERNAL",
];

/// Other variables that are not settings: they are for clients, for handlers that `latzero serve`
/// runs, and for crash tests.
const OTHER_VARIABLES: [&str; 16] = [
    "LATZERO_URL",
    "LATZERO_ADMIN_TOKEN",
    "LATZERO_KEYS",
    "LATZERO_KEY_FILE",
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

/// The variables with the prefix that are not settings.
pub(super) fn other_variables() -> impl Iterator<Item = &'static str> {
    SDK_VARIABLES.into_iter().chain(OTHER_VARIABLES)
}

/// The environment variables that settings and startup use.
#[derive(Clone, Debug, Default)]
pub struct Environment(pub(super) BTreeMap<String, OsString>);

impl Environment {
    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        // A variable whose name is not UTF-8 is not one of this project.
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
    /// The flag as it is typed: `--port`.
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
    /// In `<data-dir>/config/`, so it cannot set the data directory.
    InDataDir,
    /// Named with `--config`.
    Named,
}

/// All sources of settings.
#[derive(Clone, Debug, Default)]
pub struct Inputs {
    /// The environment.
    pub environment: Environment,
    /// Files, the later ones winning.
    pub files: Vec<ConfigFile>,
    /// The command line, the later ones winning.
    pub command_line: Vec<Override>,
}
