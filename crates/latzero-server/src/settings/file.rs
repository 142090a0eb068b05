//! Settings files: reads them, and converts TOML to validated values with their positions.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::resolve::nearest_key;
use super::resolved::Entry;
use super::value::{Value, quote, quote_toml};
use super::{
    ConfigFile, Environment, Found, Inputs, Override, Position, Problem, Resolved, SETTINGS,
    SettingsError, SettingsErrors, Source, config_dir, resolve,
};

/// The largest settings file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// The most files that are read from the config directory.
pub const FILES_MAX: usize = 100;

/// The checked values of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    path: PathBuf,
    /// Index into the table, value, and position of its key.
    values: Vec<(usize, Value, Position)>,
}

impl Layer {
    /// Overrides the current values with the file's.
    pub(super) fn apply(
        self,
        found: Found,
        entries: &mut [Entry],
        errors: &mut Vec<SettingsError>,
    ) {
        for (index, value, at) in self.values {
            let source = Source::File(self.path.clone());
            if found == Found::InDataDir && SETTINGS[index].name == "data_dir" {
                errors.push(SettingsError {
                    source,
                    at: Some(at),
                    problem: Problem::DataDirInItself,
                });
                continue;
            }
            entries[index] = Entry {
                value,
                source,
                at: Some(at),
            };
        }
    }
}

/// Parses the text of a settings file. `path` is only used in messages. It never panics, whatever
/// the text is.
///
/// # Errors
/// Every unknown key and invalid value with its line and column, or where the text is not TOML.
pub fn parse_file(path: &Path, text: &str) -> Result<Layer, SettingsErrors> {
    let error = |offset: Option<usize>, problem| SettingsError {
        source: Source::File(path.to_owned()),
        at: offset.map(|offset| position(text, offset)),
        problem,
    };
    let document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(refused) => {
            let start = refused.span().map(|span| span.start);
            // The parser's message may have several lines; an error has one.
            let message = refused.message().replace('\n', "; ");
            return Err(error(start, Problem::Syntax(message)).into());
        }
    };

    let mut values = Vec::new();
    let mut errors = Vec::new();
    let mut check = |name: String, key_at: usize, value_at: usize, value: &DeValue<'_>| {
        let Some(index) = SETTINGS.iter().position(|setting| setting.name == name) else {
            let problem = Problem::UnknownKey {
                nearest: nearest_key(&name),
                key: quote(&name),
            };
            errors.push(error(Some(key_at), problem));
            return;
        };
        let setting = &SETTINGS[index];
        match setting.kind.parse_toml(value) {
            Some(value) => values.push((index, value, position(text, key_at))),
            None => errors.push(error(
                Some(value_at),
                Problem::BadValue {
                    key: setting.name,
                    expected: setting.kind.expected(),
                    found: quote_toml(value),
                },
            )),
        }
    };

    let mut misplaced = Vec::new();
    for (key, value) in document.get_ref() {
        let name = key.get_ref().as_ref();
        match value.get_ref() {
            // The keys of an unknown table are named one by one: each may have its nearest known
            // key.
            DeValue::Table(table) if !is_setting(name) && !table.is_empty() => {
                for (inner, value) in table {
                    let name = format!("{name}.{}", inner.get_ref());
                    check(
                        name,
                        inner.span().start,
                        value.span().start,
                        value.get_ref(),
                    );
                }
            }
            DeValue::Table(_) if name == "limits" => {}
            other if name == "limits" => misplaced.push(error(
                Some(value.span().start),
                Problem::BadValue {
                    key: "limits",
                    expected: "a table of settings".to_owned(),
                    found: quote_toml(other),
                },
            )),
            other => check(
                name.to_owned(),
                key.span().start,
                value_start(key, value),
                other,
            ),
        }
    }
    errors.append(&mut misplaced);
    errors.sort_by_key(|error| error.at.map(|at| (at.line, at.column)));
    SettingsErrors::check(errors)?;
    Ok(Layer {
        path: path.to_owned(),
        values,
    })
}

/// Where a value begins; for a table header, the position of its name.
fn value_start(
    key: &toml::Spanned<toml::de::DeString<'_>>,
    value: &toml::Spanned<DeValue<'_>>,
) -> usize {
    match value.get_ref() {
        DeValue::Table(_) => key.span().start,
        _ => value.span().start,
    }
}

fn is_setting(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.name == name)
}

/// The line and column of a byte offset, wherever it points.
fn position(text: &str, offset: usize) -> Position {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line_start = before
        .iter()
        .rposition(|&byte| byte == b'\n')
        .map_or(0, |at| at + 1);
    Position {
        line: before.iter().filter(|&&byte| byte == b'\n').count() + 1,
        column: String::from_utf8_lossy(&before[line_start..])
            .chars()
            .count()
            + 1,
    }
}

/// Reads all sources and combines them. With `named` (from `--config`), only that file is read;
/// otherwise the files `<data-dir>/config/*.toml` in lexical order, except those whose name begins
/// with a dot. A missing config directory counts as empty.
///
/// # Errors
/// Every unknown key and invalid value, or the file that cannot be read.
pub fn load(
    environment: &Environment,
    command_line: &[Override],
    named: Option<&Path>,
) -> Result<Resolved, SettingsErrors> {
    let mut inputs = Inputs {
        environment: environment.clone(),
        files: Vec::new(),
        command_line: command_line.to_vec(),
    };
    if let Some(path) = named {
        inputs.files.push(read(path, Found::Named)?);
        return resolve(&inputs);
    }
    // The first pass finds the data directory, the second one reads its files.
    let data_dir = resolve(&inputs)?.settings.data_dir;
    for path in list(&config_dir(&data_dir))? {
        inputs.files.push(read(&path, Found::InDataDir)?);
    }
    resolve(&inputs)
}

fn unreadable(path: &Path, cause: &io::Error) -> SettingsError {
    SettingsError {
        source: Source::File(path.to_owned()),
        at: None,
        problem: Problem::Unreadable {
            is_denied: cause.kind() == io::ErrorKind::PermissionDenied,
            why: cause.to_string(),
        },
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, SettingsError> {
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        // Where a file stands in for the data directory, the start says so.
        Err(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(cause) => return Err(unreadable(dir, &cause)),
    };
    let mut paths = Vec::new();
    for entry in read {
        let entry = entry.map_err(|cause| unreadable(dir, &cause))?;
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if hidden || path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        if paths.len() == FILES_MAX {
            return Err(SettingsError {
                source: Source::File(dir.to_owned()),
                at: None,
                problem: Problem::TooManyFiles,
            });
        }
        paths.push(path);
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path, found: Found) -> Result<ConfigFile, SettingsError> {
    let mut text = String::new();
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        let cause = io::Error::other("it is not a regular file; move it away");
        return Err(unreadable(path, &cause));
    }
    let file = fs::File::open(path).map_err(|cause| unreadable(path, &cause))?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|cause| unreadable(path, &cause))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(SettingsError {
            source: Source::File(path.to_owned()),
            at: None,
            problem: Problem::FileTooLarge,
        });
    }
    Ok(ConfigFile {
        path: path.to_owned(),
        text,
        found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(home: &Path) -> Environment {
        [("HOME", home.as_os_str())].into_iter().collect()
    }

    #[test]
    fn files_are_read_in_lexical_order() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join(".latzero/config");
        fs::create_dir_all(&config).unwrap();
        fs::write(config.join("20.toml"), "port = 20").unwrap();
        fs::write(config.join("10.toml"), "port = 10\nio_threads = 3").unwrap();
        fs::write(config.join("30.toml.bak"), "not toml").unwrap();
        fs::write(config.join(".99.toml"), "not toml").unwrap();
        let settings = load(&environment(home.path()), &[], None).unwrap().settings;
        assert_eq!((settings.port, settings.io_threads), (20, 3));

        let named = home.path().join("mine.toml");
        fs::write(&named, "[limits]\nmax_frame = '1 MiB'\n").unwrap();
        let settings = load(&environment(home.path()), &[], Some(&named))
            .unwrap()
            .settings;
        assert_eq!((settings.port, settings.limits.max_frame), (45227, 1 << 20));
    }

    #[test]
    fn the_command_line_says_where_the_files_are() {
        let home = tempfile::tempdir().unwrap();
        let other = home.path().join("other");
        fs::create_dir_all(other.join("config")).unwrap();
        fs::write(other.join("config/a.toml"), "port = 7").unwrap();
        let flag = Override::new("data_dir", "~/other", "--data-dir");
        let settings = load(&environment(home.path()), &[flag], None)
            .unwrap()
            .settings;
        assert_eq!((settings.port, settings.data_dir), (7, other));
    }

    #[test]
    fn files_that_cannot_be_read_are_named() {
        let home = tempfile::tempdir().unwrap();
        let missing = home.path().join("none.toml");
        let error = load(&environment(home.path()), &[], Some(&missing))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with(&format!("{}: cannot be read: ", missing.display())),
            "{error}"
        );

        let config = home.path().join(".latzero/config");
        fs::create_dir_all(&config).unwrap();
        fs::write(config.join("a.toml"), [b'#', 0xff]).unwrap();
        let error = load(&environment(home.path()), &[], None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("a.toml: cannot be read: "), "{error}");

        fs::write(
            config.join("a.toml"),
            "#".repeat(FILE_BYTES_MAX as usize + 1),
        )
        .unwrap();
        let error = load(&environment(home.path()), &[], None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("this is not a settings file"), "{error}");

        fs::write(config.join("a.toml"), "").unwrap();
        for index in 0..FILES_MAX {
            fs::write(config.join(format!("{index}.toml")), "").unwrap();
        }
        let error = load(&environment(home.path()), &[], None)
            .unwrap_err()
            .to_string();
        assert!(error.contains("more than 100 settings files"), "{error}");
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        let seed = "port = 1 # é\n[limits]\nmax_frame = \"16 MiB\"\n\"a\\u00e9.b\" = [1, {x = 2}]\n\
                    [[t]]\nd = 1979-05-27T07:32:00Z\nf = -inf\n[a.b.c]\n";
        for cut in 0..=seed.len() {
            let (Some(head), Some(tail)) = (seed.get(..cut), seed.get(cut..)) else {
                continue;
            };
            for text in [
                head,
                tail,
                &format!("{tail}{head}"),
                &format!("{head}\"{tail}"),
            ] {
                drop(parse_file(Path::new("f"), text));
            }
        }
        for text in [
            "[".repeat(100_000),
            "a.".repeat(50_000),
            "a=[".repeat(10_000),
        ] {
            drop(parse_file(Path::new("f"), &text));
        }
    }
}
