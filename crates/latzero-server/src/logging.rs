//! Logs: to stderr for people, and to `logs/server.log`.
//!
//! Logging never stops the server and never waits. Each destination has a bounded queue and a
//! thread that writes it, so a paused terminal or a full disk delays nothing. Lines that do not fit
//! in the queue, or cannot be written, are counted and dropped.

mod rotate;
mod sink;

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use tracing::Dispatch;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};
use tracing_subscriber::reload;

use crate::settings::{Environment, LogFormat, LogLevel, Settings};

use rotate::RotatingFile;
use sink::{Sink, SinkWriter};

/// The name of the current log file. Rotated files have `.1`, `.2`, … appended; `.1` is the newest.
pub const LOG_NAME: &str = "server.log";

/// The configuration of logging.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// How much to log.
    pub level: LogLevel,
    /// The form of a line.
    pub format: LogFormat,
    /// Whether human lines on stderr have colour.
    pub colour: Colour,
    /// The size at which a file is rotated, in bytes.
    pub file_bytes_max: u64,
    /// Files kept, the current one included.
    pub files_max: usize,
}

/// Whether there is colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Colour.
    On,
    /// None.
    Off,
}

impl LogOptions {
    /// What the settings say; colour where stderr is a terminal and `NO_COLOR` is unset or empty
    /// (<https://no-color.org>).
    #[must_use]
    pub fn new(settings: &Settings, environment: &Environment) -> LogOptions {
        LogOptions {
            level: settings.log_level,
            format: settings.log_format,
            colour: colour(io::stderr().is_terminal(), environment),
            file_bytes_max: settings.log_file_bytes_max,
            files_max: settings.log_files_max,
        }
    }
}

fn colour(terminal: bool, environment: &Environment) -> Colour {
    if terminal && environment.var("NO_COLOR").is_none() {
        Colour::On
    } else {
        Colour::Off
    }
}

/// Why logging cannot start.
#[derive(Debug, Error)]
pub enum LogError {
    /// The log file cannot be opened.
    #[error("cannot open the log {path}: {source}; give this user write access to it")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The threads that write cannot be started.
    #[error("cannot start a thread for the log: {0}")]
    Thread(io::Error),
    /// Logging has already been started in this process.
    #[error("logging is already set up in this process")]
    AlreadyBegun,
}

/// Lines that were lost, per destination, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinesLost {
    /// On stderr.
    pub stderr: u64,
    /// In the file.
    pub file: u64,
}

/// The running log. Dropping the last handle writes the queued lines, and waits at most a second
/// for that.
#[derive(Clone, Debug)]
pub struct Logs {
    level: reload::Handle<LevelFilter, Registry>,
    stderr: Arc<Sink>,
    file: Arc<Sink>,
    rotating: Arc<Mutex<RotatingFile>>,
}

impl Logs {
    /// Starts logging for the whole process, to stderr and into `logs_dir`.
    ///
    /// # Errors
    /// If the file cannot be opened, a thread cannot be started, or logging was already started.
    pub fn begin(options: &LogOptions, logs_dir: &Path) -> Result<Logs, LogError> {
        let (dispatch, logs) = Logs::build(options, logs_dir, io::stderr())?;
        tracing::dispatcher::set_global_default(dispatch).map_err(|_| LogError::AlreadyBegun)?;
        Ok(logs)
    }

    /// Like [`Logs::begin`], for a separate `Dispatch`, with any writer instead of stderr.
    ///
    /// # Errors
    /// As [`Logs::begin`].
    pub fn build(
        options: &LogOptions,
        logs_dir: &Path,
        stderr: impl io::Write + Send + 'static,
    ) -> Result<(Dispatch, Logs), LogError> {
        let path = logs_dir.join(LOG_NAME);
        let rotating = RotatingFile::open(&path, options.file_bytes_max, options.files_max)
            .map_err(|source| LogError::File {
                path: path.display().to_string(),
                source,
            })?;
        let rotating = Arc::new(Mutex::new(rotating));
        let stderr = Arc::new(Sink::spawn("log-stderr", stderr).map_err(LogError::Thread)?);
        let writer = SharedLogFile(Arc::clone(&rotating));
        let file = Arc::new(Sink::spawn("log-file", writer).map_err(LogError::Thread)?);

        let (level, handle) = reload::Layer::new(filter(options.level));
        let (on_stderr, in_file) = match options.format {
            LogFormat::Auto => (Form::Human(options.colour), Form::Json),
            LogFormat::Human => (Form::Human(options.colour), Form::Human(Colour::Off)),
            LogFormat::Json => (Form::Json, Form::Json),
        };
        let subscriber = tracing_subscriber::registry()
            .with(level)
            .with(layer(on_stderr, stderr.writer()))
            .with(layer(in_file, file.writer()));
        Ok((
            Dispatch::new(subscriber),
            Logs {
                level: handle,
                stderr,
                file,
                rotating,
            },
        ))
    }

    /// Changes how much is logged from now on.
    pub fn set_level(&self, level: LogLevel) {
        // Fails only if the subscriber is gone, and then there is no log.
        drop(self.level.reload(filter(level)));
    }

    /// Applies the settings that `reload` may change: level, size and number of files.
    pub fn apply(&self, settings: &Settings) {
        self.set_level(settings.log_level);
        lock(&self.rotating).set_bounds(settings.log_file_bytes_max, settings.log_files_max);
    }

    /// Lines lost so far.
    #[must_use]
    pub fn lost(&self) -> LinesLost {
        LinesLost {
            stderr: self.stderr.lost(),
            file: self.file.lost(),
        }
    }

    /// Waits until everything logged so far is written, at most a second per destination.
    pub fn flush(&self) {
        self.stderr.flush();
        self.file.flush();
    }
}

/// A file of lines beside the log, written by a separate thread and rotated by size.
#[derive(Debug)]
pub(crate) struct LineFile(Sink);

impl LineFile {
    /// Opens the file for appending.
    ///
    /// # Errors
    /// If it cannot be opened, or the thread cannot be started.
    pub(crate) fn open(
        path: &Path,
        bytes_max: u64,
        files_max: usize,
    ) -> Result<LineFile, LogError> {
        let rotating = RotatingFile::open(path, bytes_max, files_max);
        let rotating = rotating.map_err(|source| LogError::File {
            path: path.display().to_string(),
            source,
        })?;
        let writer = SharedLogFile(Arc::new(Mutex::new(rotating)));
        let sink = Sink::spawn("lines", writer).map_err(LogError::Thread)?;
        Ok(LineFile(sink))
    }

    /// Appends one line, given without its line break. Never blocks.
    pub(crate) fn write(&self, line: &str) {
        // Its writer takes every line, or counts it.
        let _ = io::Write::write(&mut self.0.writer(), format!("{line}\n").as_bytes());
    }

    /// Lines that were not written.
    pub(crate) fn lost(&self) -> u64 {
        self.0.lost()
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

#[derive(Clone, Copy)]
enum Form {
    Human(Colour),
    Json,
}

/// One destination. Times are UTC, RFC 3339: the formatter's default.
fn layer<S>(form: Form, writer: SinkWriter) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    // The formatter would report a failed write on stderr, and panic if stderr is closed.
    let base = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .log_internal_errors(false);
    match form {
        Form::Human(colour) => base
            .with_ansi(colour == Colour::On)
            .with_target(false)
            .boxed(),
        Form::Json => base.json().flatten_event(true).boxed(),
    }
}

impl<'a> MakeWriter<'a> for SinkWriter {
    type Writer = SinkWriter;

    fn make_writer(&'a self) -> SinkWriter {
        self.clone()
    }
}

/// The file as its thread writes it, and as `apply` changes its bounds.
struct SharedLogFile(Arc<Mutex<RotatingFile>>);

impl io::Write for SharedLogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        lock(&self.0).write_line(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A poisoned lock is used anyway: a log file is usable after any panic.
fn lock(rotating: &Mutex<RotatingFile>) -> std::sync::MutexGuard<'_, RotatingFile> {
    rotating.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tracing::dispatcher::with_default;

    use super::*;

    /// A stand-in for stderr that keeps what is written.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Screen {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn options(format: LogFormat, colour: Colour) -> LogOptions {
        LogOptions {
            level: LogLevel::Info,
            format,
            colour,
            file_bytes_max: 1 << 20,
            files_max: 2,
        }
    }

    /// Logs one line in a form, and returns what came out on the screen and in the file.
    fn one_line(format: LogFormat, colour: Colour) -> (String, String) {
        let dir = tempfile::tempdir().unwrap();
        let screen = Screen::default();
        let (dispatch, logs) =
            Logs::build(&options(format, colour), dir.path(), screen.clone()).unwrap();
        with_default(&dispatch, || {
            tracing::info!(port = 7, "listening\u{1b}[31m");
        });
        logs.flush();
        assert_eq!(logs.lost(), LinesLost::default());
        (
            screen.text(),
            fs::read_to_string(dir.path().join(LOG_NAME)).unwrap(),
        )
    }

    fn assert_json(line: &str) {
        let json: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            (&json["level"], &json["port"]),
            (&"INFO".into(), &7.into()),
            "{line}"
        );
        let time = json["timestamp"].as_str().unwrap();
        assert!(
            time.starts_with("20") && time.contains('T') && time.ends_with('Z'),
            "{time}"
        );
    }

    fn assert_human(line: &str) {
        assert!(line.starts_with("20"), "{line}");
        assert!(line.contains("Z  INFO listening"), "{line}");
        assert!(line.trim_end().ends_with("port=7"), "{line}");
        assert!(!line.contains('\u{1b}'), "{line:?}");
    }

    #[test]
    fn the_forms() {
        let (screen, file) = one_line(LogFormat::Auto, Colour::Off);
        assert_human(&screen);
        assert_json(&file);
        let (screen, file) = one_line(LogFormat::Human, Colour::On);
        assert!(screen.contains("\u{1b}["), "{screen:?}");
        assert!(
            !screen.contains("\u{1b}[31m"),
            "log lines must not change colours: {screen:?}"
        );
        assert_human(&file);
        let (screen, file) = one_line(LogFormat::Json, Colour::On);
        assert_json(&screen);
        assert_json(&file);
    }

    #[test]
    fn the_level_changes_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let screen = Screen::default();
        let (dispatch, logs) = Logs::build(
            &options(LogFormat::Auto, Colour::Off),
            dir.path(),
            screen.clone(),
        )
        .unwrap();
        with_default(&dispatch, || {
            let say = |what| tracing::debug!("{what}");
            say("one");
            logs.set_level(LogLevel::Debug);
            say("two");
            logs.set_level(LogLevel::Error);
            say("three");
            tracing::warn!("four");
        });
        logs.flush();
        let text = screen.text();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains("DEBUG two"), "{text}");
    }

    #[test]
    fn a_failing_destination_is_counted_and_harms_nothing() {
        struct Closed;
        impl io::Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let (dispatch, logs) =
            Logs::build(&options(LogFormat::Auto, Colour::Off), dir.path(), Closed).unwrap();
        with_default(&dispatch, || {
            tracing::info!("one");
            tracing::info!("two");
        });
        logs.flush();
        assert_eq!(logs.lost(), LinesLost { stderr: 2, file: 0 });
        let file = fs::read_to_string(dir.path().join(LOG_NAME)).unwrap();
        assert_eq!(file.lines().count(), 2);
    }

    #[test]
    fn a_log_that_cannot_be_opened_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Logs::build(
            &options(LogFormat::Auto, Colour::Off),
            &dir.path().join("x"),
            io::sink(),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.starts_with("cannot open the log ") && error.contains("/x/server.log"),
            "{error}"
        );
    }

    #[test]
    fn colour_is_for_terminals_and_can_be_refused() {
        let check = |terminal, no_color: Option<&str>, expected| {
            let pairs = no_color.map(|value| ("NO_COLOR", value));
            assert_eq!(colour(terminal, &pairs.into_iter().collect()), expected);
        };
        check(true, None, Colour::On);
        check(true, Some(""), Colour::On);
        check(true, Some("1"), Colour::Off);
        check(false, None, Colour::Off);
    }
}
