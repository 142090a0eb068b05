//! One destination of the log: a bounded queue, and the thread that writes it.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use latzero_crypto::text::redact;

/// Lines that may wait to be written. With [`LINE_BYTES_MAX`] it bounds the memory of a destination
/// that hangs.
const QUEUE_LINES_MAX: usize = 4096;

/// The longest line, in bytes; longer lines are truncated.
const LINE_BYTES_MAX: usize = 16 << 10;

/// How long [`Sink::flush`] waits for a destination that hangs.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// How long [`Sink::flush`] pauses before it tries a full queue again.
const FLUSH_PAUSE: Duration = Duration::from_millis(5);

enum Entry {
    Line(Vec<u8>),
    /// Answered when everything before it was written.
    Flush(SyncSender<()>),
}

/// A destination.
#[derive(Debug)]
pub(super) struct Sink {
    queue: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Sink {
    /// Starts the thread that writes to `destination`. It ends when the sink and all its writers
    /// are gone.
    pub(super) fn spawn(name: &str, destination: impl Write + Send + 'static) -> io::Result<Sink> {
        let (queue, entries) = sync_channel(QUEUE_LINES_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lost);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&entries, destination, &counter))?;
        Ok(Sink { queue, lost })
    }

    pub(super) fn writer(&self) -> SinkWriter {
        SinkWriter {
            queue: self.queue.clone(),
            lost: Arc::clone(&self.lost),
        }
    }

    /// Lines that were not written.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until the queued lines are written, at most [`FLUSH_MAX`].
    pub(super) fn flush(&self) {
        let deadline = Instant::now() + FLUSH_MAX;
        let (done, is_done) = sync_channel(1);
        let mut entry = Entry::Flush(done);
        loop {
            match self.queue.try_send(entry) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => {
                    entry = back;
                    thread::sleep(FLUSH_PAUSE);
                }
                Err(_) => return,
            }
        }
        // Ends early if the thread has ended; after the deadline the destination hangs. In both
        // cases nothing more can be done.
        let _done_or_not = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush();
    }
}

fn run(entries: &Receiver<Entry>, mut destination: impl Write, lost: &AtomicU64) {
    while let Ok(entry) = entries.recv() {
        match entry {
            Entry::Line(line) => {
                if destination
                    .write_all(&line)
                    .and_then(|()| destination.flush())
                    .is_err()
                {
                    lost.fetch_add(1, Ordering::Relaxed);
                }
            }
            // After the deadline nothing waits any longer.
            Entry::Flush(done) => drop(done.try_send(())),
        }
    }
}

/// Puts lines into a sink's queue. Never waits and never fails: a line that does not fit is
/// counted.
#[derive(Clone, Debug)]
pub(super) struct SinkWriter {
    queue: SyncSender<Entry>,
    lost: Arc<AtomicU64>,
}

impl Write for SinkWriter {
    /// Takes one whole line, as the formatter writes it.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self
            .queue
            .try_send(Entry::Line(cut(&without_tokens(line))))
            .is_err()
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Clients choose names, and a mistake may put a key into one.
fn without_tokens(line: &[u8]) -> Cow<'_, [u8]> {
    match String::from_utf8_lossy(line) {
        Cow::Borrowed(text) => match redact(text) {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        },
        Cow::Owned(text) => Cow::Owned(redact(&text).into_owned().into_bytes()),
    }
}

fn cut(line: &[u8]) -> Vec<u8> {
    if line.len() <= LINE_BYTES_MAX {
        return line.to_vec();
    }
    // Not within a character, so that the file stays UTF-8.
    let mut end = LINE_BYTES_MAX - 1;
    while end > 0 && line[end] & 0xc0 == 0x80 {
        end -= 1;
    }
    let mut cut = line[..end].to_vec();
    cut.push(b'\n');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_that_hangs_costs_a_full_queue_and_no_time() {
        struct Hangs(Receiver<()>);
        impl Write for Hangs {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let _released = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (release, held) = sync_channel(0);
        let sink = Sink::spawn("test", Hangs(held)).unwrap();
        let mut writer = sink.writer();
        for _ in 0..QUEUE_LINES_MAX + 10 {
            writer.write_all(b"line\n").unwrap();
        }
        // One line may be in the thread's hands.
        assert!((9..=10).contains(&sink.lost()), "{}", sink.lost());
        drop(release);
        sink.flush();
    }

    #[test]
    fn lines_are_cut_between_characters() {
        assert_eq!(cut(b"short\n"), b"short\n");
        for shift in 0..4 {
            let line = format!("{}{}\n", "x".repeat(shift), "é€😀".repeat(10_000));
            let cut = String::from_utf8(cut(line.as_bytes())).unwrap();
            assert!(cut.len() <= LINE_BYTES_MAX && cut.len() > LINE_BYTES_MAX - 5);
            assert!(cut.ends_with('\n'));
        }
    }
}
