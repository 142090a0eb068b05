//! Errors in settings, and where they were written.

use std::fmt;
use std::path::PathBuf;

use super::{FILE_BYTES_MAX, FILES_MAX};

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
    /// Where in the file, if that is known.
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
        /// The known one that is most similar to it.
        nearest: Option<String>,
    },
    /// The value is not of the setting's kind, or is out of its bounds.
    BadValue {
        /// The setting.
        key: &'static str,
        /// What is accepted.
        expected: String,
        /// What was written, shortened.
        found: String,
    },
    /// The file is not TOML.
    Syntax(String),
    /// The file or directory cannot be read: whether for want of permission, and why.
    Unreadable {
        /// Whether permission was denied.
        is_denied: bool,
        /// What the system said.
        why: String,
    },
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
    /// The setting asks for something that is not implemented.
    NotInThisBuild {
        /// The setting.
        key: &'static str,
    },
    /// The server would listen for other machines without encryption.
    Exposed {
        /// The address.
        host: String,
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
            Problem::Unreadable { why, .. } => write!(f, ": cannot be read: {why}"),
            Problem::FileTooLarge => {
                write!(
                    f,
                    ": larger than {FILE_BYTES_MAX} bytes: this is not a settings file"
                )
            }
            Problem::TooManyFiles => {
                write!(f, ": more than {FILES_MAX} settings files; merge them")
            }
            Problem::DataDirInItself => f.write_str(
                ": `data_dir` cannot be set by a file inside the data directory; \
                 use --data-dir, LATZERO_DATA_DIR or a file named with --config",
            ),
            Problem::NoHome { key } => write!(
                f,
                ": `{key}` begins with ~, but HOME is not set; set HOME or use an absolute path"
            ),
            Problem::Exposed { host } => write!(
                f,
                ": other machines can reach `{host}`, and the traffic would not be encrypted; \
                 use --tls (docs/security.md), or allow it with --insecure"
            ),
            Problem::NotInThisBuild { key } => write!(
                f,
                ": `{key}` is not implemented yet; remove it, or set it to false"
            ),
        }
    }
}

impl std::error::Error for SettingsError {}

/// Everything wrong with the settings, one per line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingsErrors(pub(super) Vec<SettingsError>);

impl SettingsErrors {
    /// Whether the only problem is that permission was denied.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        let is_denied = |problem: &Problem| match problem {
            Problem::Unreadable { is_denied, .. } => *is_denied,
            _ => false,
        };
        self.0.iter().all(|error| is_denied(&error.problem))
    }

    /// The errors; there is at least one.
    #[must_use]
    pub fn errors(&self) -> &[SettingsError] {
        &self.0
    }

    pub(super) fn check(errors: Vec<SettingsError>) -> Result<(), SettingsErrors> {
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
