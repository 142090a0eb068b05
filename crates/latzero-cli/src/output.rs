//! What people and scripts see: tables and colours on a terminal, tab-separated lines or JSON elsewhere.
//!
//! Tables are drawn here, in forty lines: a table crate would bring borders, wrapping and a Unicode width table that
//! names of this protocol, all ASCII, do not need.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::exit::{Exit, Failure};

/// When to colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

/// What a word means, which is what its colour says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Strong,
    Dim,
    Good,
    Warn,
    Bad,
}

impl Tone {
    /// The SGR parameters (ECMA-48).
    fn sgr(self) -> &'static str {
        match self {
            Tone::Plain => "0",
            Tone::Strong => "1",
            Tone::Dim => "2",
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
        }
    }
}

/// Text with its tone.
#[derive(Clone, Debug)]
pub(crate) struct Cell(String, Tone);

impl<T: Display> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell(text.to_string(), Tone::Plain)
    }
}

/// Text in a tone.
pub(crate) fn toned(text: impl Display, tone: Tone) -> Cell {
    Cell(text.to_string(), tone)
}

/// How the output looks.
#[derive(Debug)]
pub(crate) struct Output {
    /// Whether a script reads: JSON.
    pub(crate) json: bool,
    /// Whether stdout is a terminal.
    pub(crate) is_terminal: bool,
    is_err_terminal: bool,
    colors_out: bool,
    colors_err: bool,
}

impl Output {
    pub(crate) fn new(json: bool, color: Color) -> Output {
        let is_terminal = io::stdout().is_terminal();
        let is_err_terminal = io::stderr().is_terminal();
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colors = |is_terminal| match color {
            Color::Auto => is_terminal && !no_color,
            Color::Always => true,
            Color::Never => false,
        };
        Output {
            json,
            is_terminal,
            is_err_terminal,
            colors_out: colors(is_terminal),
            colors_err: colors(is_err_terminal),
        }
    }

    /// Whether a person reads.
    pub(crate) fn is_for_people(&self) -> bool {
        self.is_terminal && !self.json
    }

    /// Whether progress may be shown on stderr.
    pub(crate) fn shows_progress(&self) -> bool {
        self.is_err_terminal && !self.json
    }

    /// One line on stdout.
    pub(crate) fn line(&self, line: impl Display) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{line}")
    }

    /// Bytes on stdout as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }

    /// A JSON value: over several lines for people, on one for scripts.
    pub(crate) fn value(&self, value: &Value) -> io::Result<()> {
        match self.is_for_people() {
            true => self.line(format_args!("{value:#}")),
            false => self.line(value),
        }
    }

    /// JSON text as it came, its fields in their own order and its numbers with all their digits: indented for people,
    /// on one line for scripts.
    pub(crate) fn json_text(&self, json: &str) -> io::Result<()> {
        match self.is_for_people() {
            true => self.line(pretty(json)),
            false => self.json_line(json),
        }
    }

    /// JSON text on one line.
    pub(crate) fn json_line(&self, json: &str) -> io::Result<()> {
        self.line(compact(json))
    }

    /// Text in a tone, for stdout.
    pub(crate) fn paint(&self, text: impl Display, tone: Tone) -> String {
        paint(text, tone, self.colors_out)
    }

    /// A table on a terminal; elsewhere a line of tab-separated cells per row, without the head.
    pub(crate) fn table(&self, head: &[&str], rows: &[Vec<Cell>]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !self.is_terminal {
            for row in rows {
                let cells: Vec<&str> = row.iter().map(|cell| cell.0.as_str()).collect();
                writeln!(out, "{}", cells.join("\t"))?;
            }
            return Ok(());
        }
        let width = |text: &str| text.chars().count();
        let widths: Vec<usize> = (0..head.len())
            .map(|column| {
                let cells = rows.iter().filter_map(|row| row.get(column));
                let widest = cells.map(|cell| width(&cell.0)).max().unwrap_or(0);
                widest.max(width(head[column]))
            })
            .collect();
        let head: Vec<Cell> = head.iter().map(|name| toned(name, Tone::Dim)).collect();
        let has_head = head.iter().any(|cell| !cell.0.is_empty());
        for row in has_head.then_some(&head).into_iter().chain(rows) {
            let mut line = String::new();
            for (index, (cell, &widest)) in row.iter().zip(&widths).enumerate() {
                line.push_str(&paint(&cell.0, cell.1, self.colors_out));
                // Nothing trails the last column.
                if index + 1 < row.len() {
                    let padding = widest - width(&cell.0) + 2;
                    line.extend(std::iter::repeat_n(' ', padding));
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Names with their values, one each line.
    pub(crate) fn facts(&self, facts: &[(&str, Cell)]) -> io::Result<()> {
        let rows: Vec<Vec<Cell>> = facts
            .iter()
            .map(|(name, value)| vec![toned(name, Tone::Dim), value.clone()])
            .collect();
        self.table(&["", ""], &rows)
    }

    /// A note on stderr, for people.
    pub(crate) fn note(&self, text: impl Display) {
        // Where stderr is gone, nobody misses it.
        let _ = writeln!(io::stderr().lock(), "{text}");
    }

    /// Progress on stderr, each over the last; nothing where stderr is no terminal.
    pub(crate) fn progress(&self, text: impl Display) {
        if self.shows_progress() {
            let mut err = io::stderr().lock();
            // EL (ECMA-48) erases what the last one left.
            let _ = write!(err, "\r{text}\x1b[K").and_then(|()| err.flush());
        }
    }

    /// Takes the progress away.
    pub(crate) fn progress_done(&self) {
        self.progress("");
    }

    /// Does `work`, and shows on stderr that it goes on where it takes longer than a moment.
    pub(crate) fn while_working<T: Send>(
        &self,
        doing: impl Display,
        work: impl FnOnce() -> T + Send,
    ) -> T {
        if !self.shows_progress() {
            return work();
        }
        let started = Instant::now();
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            let working = scope.spawn(move || {
                // Dropped at the work's end, however it ends.
                let _tell: std::sync::mpsc::Sender<()> = tell;
                work()
            });
            while told.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let seconds = started.elapsed().as_secs();
                if seconds > 0 {
                    self.progress(format_args!("{doing} … {seconds} s"));
                }
            }
            if started.elapsed() >= Duration::from_secs(1) {
                self.progress_done();
            }
            working
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Asks a question that is answered with yes or no; no where nothing is typed.
    pub(crate) fn asks(&self, question: impl Display) -> io::Result<bool> {
        let mut err = io::stderr().lock();
        write!(err, "{question} [y/N] ")?;
        err.flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(
            answer.trim().to_ascii_lowercase().as_str(),
            "y" | "yes"
        ))
    }

    /// Says on stderr why the command failed.
    pub(crate) fn failure(&self, failure: &Failure) -> Exit {
        if failure.is_quiet {
            return failure.exit;
        }
        if self.json {
            self.note(failure.to_json());
            return failure.exit;
        }
        for error in &failure.errors {
            let label = paint("error:", Tone::Bad, self.colors_err);
            self.note(format_args!("{label} {}", harmless(&error.to_string())));
        }
        for detail in &failure.details {
            self.note(format_args!("  {}", harmless(&detail.to_string())));
        }
        if let Some(data) = failure.wire.as_ref().and_then(|wire| wire.get("data")) {
            self.note(format_args!(
                "{} {data}",
                paint("data:", Tone::Dim, self.colors_err)
            ));
        }
        if let Some(help) = &failure.help {
            let label = paint("help:", Tone::Good, self.colors_err);
            self.note(format_args!("{label} {help}"));
        }
        failure.exit
    }
}

/// The pieces of valid JSON text: strings and other scalars whole, punctuation alone, blanks left out.
fn tokens(json: &str) -> impl Iterator<Item = &str> {
    let mut rest = json;
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let mut chars = rest.char_indices();
        let (_, first) = chars.next()?;
        let end = match first {
            '{' | '}' | '[' | ']' | ',' | ':' => 1,
            '"' => {
                let mut is_escaped = false;
                let end = chars.find(|&(_, c)| {
                    let is_end = c == '"' && !is_escaped;
                    is_escaped = c == '\\' && !is_escaped;
                    is_end
                });
                end.map_or(rest.len(), |(at, _)| at + 1)
            }
            _ => rest
                .find(|c: char| ",:]}".contains(c) || c.is_whitespace())
                .unwrap_or(rest.len()),
        };
        let (token, after) = rest.split_at(end);
        rest = after;
        Some(token)
    })
}

/// Valid JSON text on one line.
pub(crate) fn compact(json: &str) -> String {
    tokens(json).collect()
}

/// Valid JSON text indented.
fn pretty(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth = 0;
    let mut before = "";
    let new_line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    for token in tokens(json) {
        let opens = matches!(before, "{" | "[");
        match token {
            "}" | "]" => {
                depth -= 1;
                if !opens {
                    new_line(&mut out, depth);
                }
            }
            _ if opens || before == "," => new_line(&mut out, depth),
            _ => {}
        }
        out.push_str(token);
        match token {
            "{" | "[" => depth += 1,
            ":" => out.push(' '),
            _ => {}
        }
        before = token;
    }
    out
}

fn paint(text: impl Display, tone: Tone, colors: bool) -> String {
    match colors && tone != Tone::Plain {
        true => format!("\x1b[{}m{text}\x1b[0m", tone.sgr()),
        false => text.to_string(),
    }
}

/// A duration as people read it, with three digits that matter.
pub(crate) fn time(duration: Duration) -> String {
    let us = duration.as_secs_f64() * 1e6;
    match us {
        ..1e3 => format!("{us:.1} µs"),
        ..1e6 => format!("{:.2} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

/// How long ago a time was, by this machine's clock; in milliseconds since the Unix epoch.
pub(crate) fn ago(unix_ms: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_millis() as u64);
    since(now.saturating_sub(unix_ms))
}

fn since(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..5 => "just now".to_owned(),
        5..60 => format!("{s} s ago"),
        60..3_600 => format!("{} min ago", s / 60),
        3_600..86_400 => format!("{} h ago", s / 3_600),
        _ => format!("{} d ago", s / 86_400),
    }
}

/// How long something has lasted.
pub(crate) fn uptime(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s} s"),
        60..3_600 => format!("{} min {} s", s / 60, s % 60),
        3_600..86_400 => format!("{} h {} min", s / 3_600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3_600 % 24),
    }
}

/// Bytes as people read them.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// A count with its noun.
pub(crate) fn count(n: u64, noun: &str) -> String {
    match n {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

/// Text from elsewhere with nothing in it that a terminal would obey.
fn harmless(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c.to_string(),
        c if c.is_control() => c.escape_default().to_string(),
        c => c.to_string(),
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_told_nothing_by_strangers() {
        assert_eq!(
            harmless("a\u{1b}[31mb\u{7}\n\té"),
            "a\\u{1b}[31mb\\u{7}\n\té"
        );
    }

    #[test]
    fn json_keeps_its_order_and_its_digits() {
        let json =
            r#" {"b" : [1.000, 12345678901234567890123, {}, []],"a\\\"": "x, {y}:\\" , "c":null} "#;
        let one_line =
            r#"{"b":[1.000,12345678901234567890123,{},[]],"a\\\"":"x, {y}:\\","c":null}"#;
        assert_eq!(compact(json), one_line);
        let indented = [
            "{",
            "  \"b\": [",
            "    1.000,",
            "    12345678901234567890123,",
            "    {},",
            "    []",
            "  ],",
            r#"  "a\\\"": "x, {y}:\\","#,
            "  \"c\": null",
            "}",
        ];
        assert_eq!(pretty(json), indented.join("\n"));
        assert_eq!(pretty("\"x\""), "\"x\"");
        assert_eq!(pretty("-5"), "-5");
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(time(Duration::from_nanos(34_720)), "34.7 µs");
        assert_eq!(time(Duration::from_micros(1_500)), "1.50 ms");
        assert_eq!(time(Duration::from_secs(2)), "2.00 s");
        assert_eq!(uptime(59_999), "59 s");
        assert_eq!(uptime(61_000), "1 min 1 s");
        assert_eq!(uptime(90_000_000), "1 d 1 h");
        assert_eq!(since(4_999), "just now");
        assert_eq!(since(59_999), "59 s ago");
        assert_eq!(since(12 * 60_000), "12 min ago");
        assert_eq!(since(36 * 3_600_000), "1 d ago");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(count(1, "app"), "1 app");
        assert_eq!(count(0, "app"), "0 apps");
        assert_eq!(paint("x", Tone::Bad, true), "\x1b[31mx\x1b[0m");
        assert_eq!(paint("x", Tone::Bad, false), "x");
    }
}
