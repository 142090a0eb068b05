//! `logs`: prints the server's log.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use latzero_server::logging::LOG_NAME;
use serde_json::Value;

use crate::args::LogsArgs;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::{Output, Tone};

/// How often a followed log is read.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Bytes read at a time.
const CHUNK_BYTES: u64 = 64 << 10;

/// The longest line that is printed whole, in bytes; a longer one comes in pieces.
const LINE_BYTES_MAX: usize = 1 << 20;

pub(crate) fn run(args: &LogsArgs, output: &Output) -> CommandResult {
    let path = args.dir.path().join("logs").join(LOG_NAME);
    let mut file = open(&path)?;
    let failed = |error| unreadable(&path, &error);
    let start = start_of_last(&mut file, args.lines).map_err(failed)?;
    file.seek(SeekFrom::Start(start)).map_err(failed)?;
    let mut log = Log {
        inode: file.metadata().map_err(failed)?.ino(),
        file,
        path: path.clone(),
        rest: Vec::new(),
    };
    loop {
        log.print(output)?;
        if !args.follow {
            break;
        }
        thread::sleep(FOLLOW_INTERVAL);
        log.reopen_if_rotated(output)?;
    }
    if !log.rest.is_empty() {
        print_line(&log.rest, output)?;
    }
    Ok(Exit::Ok)
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let text = format!("the log {} does not exist", path.display());
            Failure::new(Exit::Failure, text)
                .with_help("name the server's data directory with --data-dir")
        }
        _ => unreadable(path, &error),
    })
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        Exit::of_io(error),
        format!("the log {} cannot be read: {error}", path.display()),
    )
}

/// Where the last `lines` lines begin.
fn start_of_last(file: &mut File, lines: u32) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut breaks = 0;
    let mut is_end = true;
    let mut chunk = Vec::new();
    while end > 0 {
        let from = end.saturating_sub(CHUNK_BYTES);
        chunk.clear();
        file.seek(SeekFrom::Start(from))?;
        file.take(end - from).read_to_end(&mut chunk)?;
        for (at, _) in chunk.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            // The break at the very end belongs to the last line.
            let is_last = std::mem::replace(&mut is_end, false) && at + 1 == chunk.len();
            breaks += u32::from(!is_last);
            if breaks >= lines {
                return Ok(from + at as u64 + 1);
            }
        }
        is_end = false;
        end = from;
    }
    Ok(0)
}

/// A log that is being read.
struct Log {
    path: PathBuf,
    file: File,
    inode: u64,
    /// The beginning of a line.
    rest: Vec<u8>,
}

impl Log {
    /// Prints the lines that are complete.
    fn print(&mut self, output: &Output) -> Result<(), Failure> {
        let mut chunk = vec![0; CHUNK_BYTES as usize];
        loop {
            let n = match self.file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(error) => return Err(unreadable(&self.path, &error)),
            };
            self.rest.extend_from_slice(&chunk[..n]);
            let mut begin = 0;
            while let Some(length) = self.rest[begin..].iter().position(|&b| b == b'\n') {
                print_line(&self.rest[begin..begin + length], output)?;
                begin += length + 1;
            }
            self.rest.drain(..begin);
            if self.rest.len() > LINE_BYTES_MAX {
                print_line(&std::mem::take(&mut self.rest), output)?;
            }
        }
    }

    /// Continues with the new file after a rotation.
    fn reopen_if_rotated(&mut self, output: &Output) -> Result<(), Failure> {
        // During a rotation there is no file for a moment.
        let Ok(metadata) = self.path.metadata() else {
            return Ok(());
        };
        if metadata.ino() != self.inode {
            self.print(output)?;
            self.file = open(&self.path)?;
            self.inode = metadata.ino();
        }
        Ok(())
    }
}

fn print_line(line: &[u8], output: &Output) -> io::Result<()> {
    let text = String::from_utf8_lossy(line);
    let entry = serde_json::from_str(&text).ok();
    match entry.filter(Value::is_object).filter(|_| !output.json) {
        Some(entry) => {
            let (first, tone, rest) = for_people(&entry);
            output.toned_line(first, tone, rest)
        }
        None => output.line(text),
    }
}

/// A log entry as text: time, level, and the rest.
fn for_people(entry: &Value) -> (String, Tone, String) {
    let text = |name: &str| entry[name].as_str().unwrap_or("");
    let level = text("level");
    let tone = match level {
        "ERROR" => Tone::Bad,
        "WARN" => Tone::Warn,
        _ => Tone::Dim,
    };
    let mut rest = String::new();
    let message = entry["fields"]["message"].as_str();
    rest.push_str(message.unwrap_or(text("message")));
    let flat = entry.as_object().into_iter().flatten();
    let nested = entry["fields"].as_object().into_iter().flatten();
    for (name, value) in flat.chain(nested) {
        let is_shown_above = matches!(
            name.as_str(),
            "timestamp"
                | "level"
                | "message"
                | "fields"
                | "target"
                | "threadName"
                | "span"
                | "spans"
        );
        if !is_shown_above {
            match value.as_str() {
                Some(text) => rest.push_str(&format!(" {name}={text}")),
                None => rest.push_str(&format!(" {name}={value}")),
            }
        }
    }
    (format!("{} {level:5} ", text("timestamp")), tone, rest)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let check = |text: &str, lines: u32, expected: &str| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            let start = start_of_last(&mut file, lines).unwrap();
            assert_eq!(&text[start as usize..], expected, "{lines} of {text:?}");
        };
        check("", 2, "");
        check("a\nb\nc\n", 0, "");
        check("a\nb\nc\n", 2, "b\nc\n");
        check("a\nb\nc", 2, "b\nc");
        check("a\nb\n", 9, "a\nb\n");
        let long = format!("x\n{}\nend\n", "y".repeat(200_000));
        check(&long, 1, "end\n");
        check(&long, 2, &long[2..]);
    }
}
