//! Combines the sources of settings: each overrides the one before.

use super::error::{Problem, SettingsError, SettingsErrors, Source};
use super::inputs::{Environment, Inputs, VARIABLE_PREFIX, other_variables};
use super::resolved::{Entry, Resolved};
use super::value::{self, Kind, Value};
use super::{SETTINGS, Setting, parse_file};

/// Combines the sources into settings.
///
/// # Errors
/// Every unknown key and invalid value, each with where it was written.
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
        if !variable.starts_with(VARIABLE_PREFIX)
            || other_variables().any(|other| other == variable)
        {
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

/// A warning for each variable that has the prefix of settings but is not a setting. It may be a
/// typing error, or belong to another program, so it is ignored.
#[must_use]
pub fn unknown_variables(environment: &Environment) -> Vec<String> {
    let is_unknown = |variable: &&String| {
        variable.starts_with(VARIABLE_PREFIX)
            && !other_variables().any(|other| other == *variable)
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

/// Replaces a leading `~` of paths with the home directory.
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

/// The known key that is most similar to `key`, if one is similar.
pub(super) fn nearest_key(key: &str) -> Option<String> {
    // A key in the wrong table is similar to the same key in the right one.
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
    let others = other_variables().map(str::to_owned);
    let name = variable.trim_start_matches(VARIABLE_PREFIX);
    let all: Vec<String> = SETTINGS
        .iter()
        .map(Setting::variable)
        .chain(others)
        .collect();
    let bare = all
        .iter()
        .map(|known| known.trim_start_matches(VARIABLE_PREFIX).to_owned());
    let near = nearest(name, bare);
    // A short name may share a few letters with any other.
    let near = near.filter(|near| strsim::normalized_levenshtein(name, near) >= 0.5);
    near.map(|near| format!("{VARIABLE_PREFIX}{near}"))
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
