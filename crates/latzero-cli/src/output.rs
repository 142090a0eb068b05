//! What people and scripts see: tables and colours on a terminal, tab-separated lines or JSON
//! elsewhere.
//!
//! Text from other programs is escaped before it reaches a terminal, so that control sequences in
//! it have no effect. Only [`Output::bytes`] and [`Output::raw_line`] print text unchanged.
//!
//! Tables are drawn here, in forty lines: a table crate would bring borders, wrapping and a Unicode
//! width table that the protocol's names, all ASCII, do not need.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use latzero_crypto::text::redact;
use serde_json::Value;

use crate::exit::{Exit, Failure};

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set or TERM is dumb
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(250);

/// What a word means, which its colour shows.
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

/// Creates text with a tone.
pub(crate) fn toned(text: impl Display, tone: Tone) -> Cell {
    Cell(text.to_string(), tone)
}

/// How the output looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Whether to print JSON, for scripts.
    pub(crate) json: bool,
    /// Whether stdout is a terminal.
    pub(crate) is_terminal: bool,
    is_err_terminal: bool,
    can_move: bool,
    colors_out: bool,
    colors_err: bool,
}

impl Output {
    pub(crate) fn new(json: bool, color: Color) -> Output {
        let is_terminal = io::stdout().is_terminal();
        let is_err_terminal = io::stderr().is_terminal();
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        // A terminal whose type is unknown or `dumb` gets plain lines.
        let is_capable = is_set("TERM") && std::env::var_os("TERM").is_some_and(|t| t != "dumb");
        let colors = |is_terminal| match color {
            Color::Auto => is_terminal && is_capable && !is_set("NO_COLOR"),
            Color::Always => true,
            Color::Never => false,
        };
        Output {
            json,
            is_terminal,
            is_err_terminal,
            can_move: is_capable,
            colors_out: colors(is_terminal),
            colors_err: colors(is_err_terminal),
        }
    }

    /// Whether a person reads the output.
    pub(crate) fn is_for_people(&self) -> bool {
        self.is_terminal && !self.json
    }

    /// Whether a person sees what is written to stderr.
    pub(crate) fn is_watched(&self) -> bool {
        self.is_err_terminal && !self.json
    }

    /// Whether progress may be shown on stderr.
    pub(crate) fn shows_progress(&self) -> bool {
        self.is_watched() && self.can_move
    }

    /// One line on stdout, escaped on a terminal.
    pub(crate) fn line(&self, line: impl Display) -> io::Result<()> {
        match self.is_terminal {
            true => self.raw_line(escaped(&line.to_string())),
            false => self.raw_line(line),
        }
    }

    /// One line on stdout, unchanged.
    pub(crate) fn raw_line(&self, line: impl Display) -> io::Result<()> {
        writeln!(io::stdout().lock(), "{line}")
    }

    /// A line of JSON that is valid JSON on a terminal too.
    fn json_out(&self, json: &str) -> io::Result<()> {
        match self.is_terminal {
            true => self.raw_line(escaped_json(json)),
            false => self.raw_line(json),
        }
    }

    /// Bytes on stdout, unchanged.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }

    /// A JSON value: over several lines for people, on one for scripts.
    pub(crate) fn value(&self, value: &Value) -> io::Result<()> {
        match self.is_for_people() {
            true => self.json_out(&format!("{value:#}")),
            false => self.json_out(&value.to_string()),
        }
    }

    /// JSON text with its fields in their own order and its numbers with all their digits: indented
    /// for people, on one line for scripts.
    pub(crate) fn json_text(&self, json: &str) -> io::Result<()> {
        match self.is_for_people() {
            true => self.json_out(&pretty(json)),
            false => self.json_line(json),
        }
    }

    /// JSON text on one line.
    pub(crate) fn json_line(&self, json: &str) -> io::Result<()> {
        self.json_out(&compact(json))
    }

    /// One line on stdout whose first words have a tone.
    pub(crate) fn toned_line(
        &self,
        first: impl Display,
        tone: Tone,
        rest: impl Display,
    ) -> io::Result<()> {
        let first = paint(escaped(&first.to_string()), tone, self.colors_out);
        self.raw_line(format_args!("{first}{}", escaped(&rest.to_string())))
    }

    /// A table on a terminal; elsewhere a line of tab-separated cells per row, without the head.
    pub(crate) fn table(&self, head: &[&str], rows: &[Vec<Cell>]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        // A cell has one line and no tab, whatever is in it.
        let one_line = |cell: &Cell| {
            let text = cell.0.replace('\n', "\\n").replace('\t', "\\t");
            match self.is_terminal {
                true => Cell(escaped(&text), cell.1),
                false => Cell(text, cell.1),
            }
        };
        let rows: Vec<Vec<Cell>> = rows
            .iter()
            .map(|row| row.iter().map(one_line).collect())
            .collect();
        if !self.is_terminal {
            for row in &rows {
                let cells = row
                    .iter()
                    .map(|cell| paint(&cell.0, cell.1, self.colors_out));
                writeln!(out, "{}", cells.collect::<Vec<String>>().join("\t"))?;
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
        for row in has_head.then_some(&head).into_iter().chain(&rows) {
            let mut line = String::new();
            for (index, (cell, &widest)) in row.iter().zip(&widths).enumerate() {
                line.push_str(&paint(&cell.0, cell.1, self.colors_out));
                // No padding after the last column.
                if index + 1 < row.len() {
                    let padding = widest - width(&cell.0) + 2;
                    line.extend(std::iter::repeat_n(' ', padding));
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Names with their values, one per line.
    pub(crate) fn facts(&self, facts: &[(&str, Cell)]) -> io::Result<()> {
        let rows: Vec<Vec<Cell>> = facts
            .iter()
            .map(|(name, value)| vec![toned(name, Tone::Dim), value.clone()])
            .collect();
        self.table(&["", ""], &rows)
    }

    /// A note on stderr, for people.
    pub(crate) fn note(&self, text: impl Display) {
        self.raw_note(escaped(&text.to_string()));
    }

    fn raw_note(&self, text: impl Display) {
        let text = text.to_string();
        // If stderr is closed, the note is not needed.
        let _ = writeln!(io::stderr().lock(), "{}", redact(&text));
    }

    /// Progress on stderr, which replaces the last; nothing unless stderr is a terminal.
    pub(crate) fn progress(&self, text: impl Display) {
        if self.shows_progress() {
            let mut err = io::stderr().lock();
            let text = escaped(&text.to_string()).replace('\n', " ");
            // EL (ECMA-48) erases the rest of the line.
            let _ = write!(err, "\r{text}\x1b[K").and_then(|()| err.flush());
        }
    }

    /// Erases the progress.
    pub(crate) fn progress_done(&self) {
        self.progress("");
    }

    /// Does `work`, and shows progress on stderr when it takes longer than a second.
    pub(crate) fn while_working<T: Send>(
        &self,
        doing: impl Display,
        work: impl FnOnce() -> T + Send,
    ) -> T {
        if !self.shows_progress() {
            return work();
        }
        let started = Instant::now();
        let (working, ended) = channel();
        std::thread::scope(|scope| {
            let worker = scope.spawn(move || {
                // Dropped when the work ends, even if it panics.
                let _working: std::sync::mpsc::Sender<()> = working;
                work()
            });
            while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                let seconds = started.elapsed().as_secs();
                if seconds > 0 {
                    self.progress(format_args!("{doing} … {seconds} s"));
                }
            }
            if started.elapsed() >= Duration::from_secs(1) {
                self.progress_done();
            }
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Asks a question; anything but yes is no.
    pub(crate) fn asks(&self, question: impl Display) -> io::Result<bool> {
        let mut err = io::stderr().lock();
        write!(err, "{} [y/N] ", escaped(&question.to_string()))?;
        err.flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(
            answer.trim().to_ascii_lowercase().as_str(),
            "y" | "yes"
        ))
    }

    /// Reports on stderr why the command failed.
    pub(crate) fn failure(&self, failure: &Failure) -> Exit {
        if failure.is_quiet {
            return failure.exit;
        }
        if self.json {
            let json = failure.to_json().to_string();
            self.raw_note(escaped_json(&json));
            return failure.exit;
        }
        let label = |text: &str, tone| paint(text, tone, self.colors_err);
        for error in &failure.errors {
            let error = escaped(error);
            self.raw_note(format_args!("{} {error}", label("error:", Tone::Bad)));
        }
        for detail in &failure.details {
            self.note(format_args!("  {detail}"));
        }
        if let Some(data) = failure.wire.as_ref().and_then(|wire| wire.get("data")) {
            let data = escaped_json(&data.to_string());
            self.raw_note(format_args!("{} {data}", label("data:", Tone::Dim)));
        }
        if let Some(help) = &failure.help {
            let help = escaped(help);
            self.raw_note(format_args!("{} {help}", label("help:", Tone::Good)));
        }
        failure.exit
    }
}

/// The tokens of valid JSON text: strings, other scalars and punctuation, without white space.
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

/// A duration for people, with three significant digits.
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

/// How long something has been going on.
pub(crate) fn uptime(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..60 => format!("{s} s"),
        60..3_600 => format!("{} min {} s", s / 60, s % 60),
        3_600..86_400 => format!("{} h {} min", s / 3_600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3_600 % 24),
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A count with its noun.
pub(crate) fn count(n: u64, noun: &str) -> String {
    match n {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

/// Whether a character controls a terminal or changes the order in which others are shown: C0 and
/// C1 controls and DEL, line and paragraph separators, and the marks of bidirectional text (Unicode
/// Standard Annex 9).
fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

/// Text without control characters except line breaks and tabs.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if is_obeyed(c) => out.extend(c.escape_unicode()),
            c => out.push(c),
        }
    }
    out
}

/// JSON text without control characters. Inside strings an escape means the same; outside they are
/// white space.
fn escaped_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            // Each of them is in the basic multilingual plane, so one escape is enough.
            c if is_obeyed(c) => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_on_a_terminal() {
        let check = |text: &str, shown: &str, json: &str| {
            assert_eq!(escaped(text), shown);
            assert_eq!(escaped_json(text), json);
        };
        check("a\n\té", "a\n\té", "a\n\té");
        check("\u{1b}[31m", "\\u{1b}[31m", "\\u001b[31m");
        check(
            "\u{9b}\u{7f}\r",
            "\\u{9b}\\u{7f}\\u{d}",
            "\\u009b\\u007f\\u000d",
        );
        check("\u{202e}\u{2066}", "\\u{202e}\\u{2066}", "\\u202e\\u2066");
        check("\u{200f}\u{2028}", "\\u{200f}\\u{2028}", "\\u200f\\u2028");
    }

    #[test]
    fn json_keeps_order_and_digits() {
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
    fn large_numbers_are_readable() {
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
