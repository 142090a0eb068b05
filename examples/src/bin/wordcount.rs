//! Counts the words of a text file with three worker processes.
//!
//! ```text
//! wordcount FILE          prints what `tr -s '[:space:]' '\n' < FILE | sort | uniq -c` prints
//! ```
//!
//! The caller cuts the file into pieces at white space and calls `wordcount/piece` for each; the
//! server passes each call to the worker with the fewest calls in flight. Progress is printed on
//! standard error.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;

use latzero::Strategy;
use latzero::blocking::App;
use latzero_examples::{Worker, serve_for_ever};

/// The number of workers, and of pieces in progress for each.
const WORKERS: usize = 3;
const PIECES_PER_WORKER: usize = 2;

/// The approximate size of a piece in bytes.
const PIECE_BYTES: usize = 64 * 1024;

const TRIGGER: &str = "wordcount/piece";

type Counts = BTreeMap<String, u64>;

fn main() -> Result<(), Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("worker") => work(),
        Some(file) => count(file),
        None => Err("usage: wordcount FILE".into()),
    }
}

/// The worker: counts the words of one piece.
fn work() -> Result<(), Box<dyn Error>> {
    let app = App::connect("latzero://wordcount-worker")?;
    app.handler(TRIGGER)
        .strategy(Strategy::LeastBusy)
        .serve(|request| {
            let piece: String = request.data()?;
            let mut counts = Counts::new();
            for word in piece.split_ascii_whitespace() {
                *counts.entry(word.to_owned()).or_default() += 1;
            }
            Ok(counts)
        })?;
    serve_for_ever()
}

/// The caller: distributes the pieces and adds up the results.
fn count(file: &str) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
    let workers = (0..WORKERS)
        .map(|_| Worker::start(&["worker"]))
        .collect::<Result<Vec<_>, _>>()?;
    let app = App::connect("latzero://wordcount")?;

    let pieces = cut(&text);
    let total = pieces.len();
    let pieces = Mutex::new(pieces.into_iter());
    let sum = Mutex::new((Counts::new(), 0));
    let next = || {
        pieces
            .lock()
            .expect("no thread panics while holding it")
            .next()
    };
    let add = |counts: Counts| {
        let mut sum = sum.lock().expect("no thread panics while holding it");
        for (word, n) in counts {
            *sum.0.entry(word).or_default() += n;
        }
        sum.1 += 1;
        show_progress(sum.1, total);
    };
    // As many caller threads as pieces in progress: each waits for its own answer.
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..WORKERS * PIECES_PER_WORKER)
            .map(|_| {
                scope.spawn(|| -> Result<(), latzero::Error> {
                    while let Some(piece) = next() {
                        add(app.call(TRIGGER, piece).send()?);
                    }
                    Ok(())
                })
            })
            .collect();
        callers
            .into_iter()
            .try_for_each(|caller| caller.join().expect("callers do not panic"))
    })?;
    drop(workers);

    let mut out = std::io::stdout().lock();
    for (word, n) in &sum.lock().expect("no thread panics while holding it").0 {
        writeln!(out, "{n:7} {word}")?;
    }
    Ok(())
}

/// Cuts `text` at white space into pieces of about [`PIECE_BYTES`].
fn cut(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while rest.len() > PIECE_BYTES {
        let bytes = rest.as_bytes();
        let at = (PIECE_BYTES..bytes.len())
            .find(|&i| bytes[i].is_ascii_whitespace())
            .unwrap_or(bytes.len());
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

fn show_progress(done: usize, total: usize) {
    let end = if std::io::stderr().is_terminal() && done < total {
        '\r'
    } else {
        '\n'
    };
    if end == '\r' || done == total {
        eprint!("{done} of {total} pieces{end}");
    }
}
