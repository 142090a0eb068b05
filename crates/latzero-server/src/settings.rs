//! Settings: one table, four sources, and the source of each value.
//!
//! The command line overrides the environment, which overrides files, which override the defaults.
//! Everything here is a function of its inputs: the environment, the files and the flags are
//! parameters, so tests need no global state. Only [`Environment::of_process`] and [`load`] access
//! the machine.

mod error;
mod file;
mod inputs;
mod reference;
mod resolve;
mod resolved;
mod table;
#[cfg(test)]
mod tests;
mod value;

use std::path::{Path, PathBuf};

pub use error::{Position, Problem, SettingsError, SettingsErrors, Source};
pub use file::{FILE_BYTES_MAX, FILES_MAX, Layer, load, parse_file};
pub use inputs::{ConfigFile, Environment, Found, Inputs, Override, SDK_VARIABLES};
pub use latzero_fabric::limits::{Limits, Takes};
pub use reference::default_config;
pub use resolve::{resolve, unknown_variables};
pub use resolved::{Reload, Resolved, SettingChange, Shown};
pub use table::{SETTINGS, Setting, Settings, is_path};
pub use value::{Kind, LogFormat, LogLevel, SocketChoice, StoreDurability, Value};

/// The exit code of a program with invalid settings: the same as for an invalid flag.
pub const EXIT_SETTINGS: u8 = 2;

/// The directory with the settings files of a data directory.
#[must_use]
pub fn config_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("config")
}
