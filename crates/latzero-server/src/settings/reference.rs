//! `default-config.toml`, generated from the table of settings.

use std::fmt::Write;

use super::{Kind, SETTINGS, Setting, Takes};

/// Comments are wrapped before this column.
const COLUMNS_MAX: usize = 100;

const HEAD: &str = "\
LatZero's settings, each commented out and set to its default.

Copy the settings that you change to <data-dir>/config/NAME.toml. All *.toml files there are read
in alphabetical order; later files override earlier ones. With --config FILE only that file is
read. Environment variables override files, and the command line overrides both. `latzero config
show` prints the values in force and where each one comes from. `latzero reload` applies the
settings that can change while the server runs.

Sizes are numbers of bytes or text such as \"512 KiB\", \"16 MiB\", \"1 GiB\". Durations are
numbers of milliseconds or text such as \"500ms\", \"10s\", \"2m\".";

/// The commented reference of all settings: the text of `default-config.toml`.
#[must_use]
pub fn default_config() -> String {
    let mut text = String::new();
    for paragraph in HEAD.split("\n\n") {
        comment(&mut text, paragraph);
        text.push_str("#\n");
    }
    text.truncate(text.len() - "#\n".len());
    let mut table = "";
    for setting in SETTINGS.iter() {
        let (place, key) = setting.name.rsplit_once('.').unwrap_or(("", setting.name));
        if place != table {
            // Uncommented, so that a key below it can be uncommented alone.
            write!(text, "\n[{place}]\n").expect("writing to a string succeeds");
            table = place;
        }
        text.push('\n');
        comment(&mut text, &setting.doc());
        if let Some(answer) = setting.answer {
            comment(&mut text, &format!("At the limit: {answer}."));
        }
        comment(&mut text, &facts(setting));
        let value = setting.kind.render_toml(&setting.default);
        writeln!(text, "#{key} = {value}").expect("writing to a string succeeds");
    }
    text
}

fn facts(setting: &Setting) -> String {
    let kind = match setting.kind {
        // The head explains the spellings of these once.
        Kind::Bytes { min, max } => bounds("A size", setting.kind, min, max),
        Kind::Millis { min, max } => bounds("A duration", setting.kind, min, max),
        other => {
            let expected = other.expected();
            let mut chars = expected.chars();
            chars
                .next()
                .into_iter()
                .flat_map(char::to_uppercase)
                .chain(chars)
                .collect()
        }
    };
    let takes = match setting.takes {
        Takes::Live => "Applied by reload.",
        Takes::Restart => "Applied at the next start.",
    };
    format!("{kind}. {takes} Variable: {}", setting.variable())
}

fn bounds(what: &str, kind: Kind, min: u64, max: u64) -> String {
    let render = |number| kind.render(&super::Value::Integer(number));
    format!("{what} from {} to {}", render(min), render(max))
}

/// Appends text as comment lines, wrapped between words.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > COLUMNS_MAX {
            out.push_str(&line);
            out.push('\n');
            line = String::from("#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::machine_limits::MachineLimits;

    use super::super::{ConfigFile, Environment, Found, Inputs, Resolved, resolve};
    use super::*;

    #[test]
    fn the_checked_in_file_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../default-config.toml");
        let current = default_config();
        if std::fs::read_to_string(&path).is_ok_and(|text| text == current) {
            return;
        }
        std::fs::write(&path, current).unwrap();
        panic!("default-config.toml was stale and has been rewritten; check it and commit it");
    }

    #[test]
    fn uncommented_it_is_the_defaults() {
        let text: String = default_config()
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => key,
                _ => line,
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        let environment: Environment = [("HOME", "/home/u")].into_iter().collect();
        let file = ConfigFile {
            path: "default-config.toml".into(),
            text,
            found: Found::Named,
        };
        let read = resolve(&Inputs {
            environment: environment.clone(),
            files: vec![file],
            command_line: Vec::new(),
        })
        .unwrap();
        assert_eq!(
            read.settings,
            Resolved::defaults(&environment).unwrap().settings
        );
        assert!(
            read.show(&MachineLimits::of_process())
                .iter()
                .all(|shown| shown.source == "file default-config.toml")
        );
    }

    #[test]
    fn unchanged_it_sets_nothing_and_fits_the_width() {
        let text = default_config();
        super::super::parse_file(Path::new("x"), &text).unwrap();
        assert!(text.lines().all(|line| line.chars().count() <= COLUMNS_MAX));
    }
}
