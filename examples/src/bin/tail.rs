//! Follows a file through the server, as `tail -f` does locally.
//!
//! ```text
//! tail serve              serves the trigger `tail`
//! tail follow FILE        prints FILE's lines, and what is appended, until it is interrupted
//! tail follow FILE N      ends after N lines
//! ```
//!
//! Lines are sent as a stream with credits: if a reader stops reading, the handler stops reading
//! the file, and the server uses no memory for it. When the reader disconnects, the handler is
//! notified and ends.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::time::Duration;

use latzero::HandlerError;
use latzero::blocking::{App, Request};
use latzero_examples::serve_for_ever;

/// How often the end of the file is checked for new lines.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A stream's time to live: a day.
const FOLLOW_FOR: Duration = Duration::from_secs(24 * 60 * 60);

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => serve(),
        ["follow", file] => follow(file, usize::MAX),
        ["follow", file, lines] => follow(file, lines.parse()?),
        _ => Err("usage: tail serve | tail follow FILE [LINES]".into()),
    }
}

fn serve() -> Result<(), Box<dyn Error>> {
    let app = App::connect("latzero://tail")?;
    app.serve("tail", |request| send_lines(&request))?;
    serve_for_ever()
}

/// Sends the file's lines until the caller cancels.
fn send_lines(request: &Request) -> Result<(), HandlerError> {
    let path: String = request.data()?;
    let file = File::open(&path)
        .map_err(|error| HandlerError::new("no_file", format!("{path}: {error}")))?;
    let mut lines = BufReader::new(file);
    let mut line = String::new();
    while !request.is_cancelled() {
        // A line without a line end is incomplete: its beginning stays in the buffer.
        if lines.read_line(&mut line)? == 0 || !line.ends_with('\n') {
            std::thread::sleep(LOOK_EVERY);
            continue;
        }
        request.partial(line.trim_end_matches('\n'))?;
        line.clear();
    }
    Ok(())
}

fn follow(file: &str, lines: usize) -> Result<(), Box<dyn Error>> {
    let path = std::path::absolute(file)?;
    let app = App::connect("latzero://tail-reader")?;
    let stream = app
        .call("tail", &path)
        .timeout(FOLLOW_FOR)
        .stream::<String>();
    let mut out = std::io::stdout().lock();
    for line in stream.take(lines) {
        writeln!(out, "{}", line?)?;
        out.flush()?;
    }
    Ok(())
}
