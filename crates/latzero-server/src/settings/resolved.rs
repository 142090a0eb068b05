//! The settings in force: their values, how they are shown, and what a reload changes.

use std::ffi::OsString;

use serde::Serialize;

use super::error::{Position, Problem, SettingsError, SettingsErrors, Source};
use super::inputs::{Environment, Inputs};
use super::{SETTINGS, Settings, Takes, Value, resolve};
use crate::machine_limits::{Derived, MachineLimits};

/// One setting with the value in force and where that came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) value: Value,
    pub(super) source: Source,
    pub(super) at: Option<Position>,
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
    /// The value in force, if the machine's limits override the setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_force: Option<Derived>,
    /// What it does.
    pub doc: String,
}

/// One setting that a reload would change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SettingChange {
    /// The key.
    pub name: &'static str,
    /// The current value, as people read it.
    pub from: String,
    /// The new value, as people read it.
    pub to: String,
    /// Where the new value comes from.
    pub source: String,
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reload {
    /// Changed and in force.
    pub applied: Vec<SettingChange>,
    /// Changed, but in force only after a restart.
    pub needs_restart: Vec<SettingChange>,
    /// The pin of the TLS port's certificate, which was reloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<String>,
}

impl Resolved {
    /// The default settings.
    ///
    /// # Errors
    /// If the home directory is not known.
    pub fn defaults(environment: &Environment) -> Result<Resolved, SettingsErrors> {
        let home = environment.var("HOME").map(OsString::from);
        let environment = home.map(|home| ("HOME", home)).into_iter().collect();
        resolve(&Inputs {
            environment,
            ..Inputs::default()
        })
    }

    /// What `config show` prints, in the order of the table, for a server with these
    /// `environment`.
    #[must_use]
    pub fn show(&self, machine: &MachineLimits) -> Vec<Shown> {
        let derived = machine.in_force(&self.settings.limits).derived;
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
                in_force: derived
                    .iter()
                    .find(|derived| derived.setting == setting.name)
                    .cloned(),
                doc: setting.doc(),
            })
            .collect()
    }

    /// Refuses settings that ask for something that is not implemented, naming where they were set.
    /// Separate from [`resolve`], so that `config show` still shows them.
    ///
    /// # Errors
    /// One [`Problem::NotInThisBuild`] for each, and [`Problem::Exposed`].
    pub fn check_available(&self) -> Result<(), SettingsErrors> {
        let mut errors: Vec<SettingsError> = SETTINGS
            .iter()
            .zip(&self.entries)
            .filter(|(setting, entry)| {
                setting.name == "cluster_mode" && entry.value == Value::Bool(true)
            })
            .map(|(setting, entry)| SettingsError {
                source: entry.source.clone(),
                at: entry.at,
                problem: Problem::NotInThisBuild { key: setting.name },
            })
            .collect();
        let host = &self.settings.host;
        let is_open = !self.settings.insecure && !self.settings.enable_tls;
        if is_open && is_beyond_this_machine(host) {
            let of_host = SETTINGS.iter().zip(&self.entries);
            let mut of_host = of_host.filter(|(setting, _)| setting.name == "host");
            errors.extend(of_host.next().map(|(_, entry)| SettingsError {
                source: entry.source.clone(),
                at: entry.at,
                problem: Problem::Exposed { host: host.clone() },
            }));
        }
        SettingsErrors::check(errors)
    }

    /// The settings after a reload that found `fresh`: settings that may change live are applied,
    /// the others keep their value until a restart.
    #[must_use]
    pub fn reload(&self, fresh: &Resolved) -> (Resolved, Reload) {
        let mut reload = Reload::default();
        let mut entries = Vec::with_capacity(SETTINGS.len());
        for ((setting, old), new) in SETTINGS.iter().zip(&self.entries).zip(&fresh.entries) {
            let change = || SettingChange {
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

    pub(super) fn from_entries(entries: Vec<Entry>) -> Resolved {
        let settings = Settings::from_values(entries.iter().map(|entry| &entry.value));
        Resolved { settings, entries }
    }
}

/// Whether other machines can reach an address. A host name counts as the addresses that it
/// resolves to; one without an address is refused later.
fn is_beyond_this_machine(host: &str) -> bool {
    use std::net::ToSocketAddrs as _;
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let bare = bare.unwrap_or(host);
    let addresses = (bare, 0).to_socket_addrs();
    addresses.is_ok_and(|mut addresses| addresses.any(|at| !at.ip().to_canonical().is_loopback()))
}
