//! Shared by the examples: worker processes that end with their parent.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// A process of this program in another role. It is killed when this is dropped.
pub struct Worker(Child);

impl Worker {
    /// Starts this program again with `args`, and waits until it reports that it is ready.
    ///
    /// # Errors
    /// If it can't be started or ends before it is ready.
    pub fn start(args: &[&str]) -> std::io::Result<Worker> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().expect("the pipe was requested");
        let worker = Worker(child);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != "ready" {
            return Err(std::io::Error::other(
                "the worker ended before it was ready; is the server running?",
            ));
        }
        Ok(worker)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Kills it at once (SIGKILL), as a crash would.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reports that this worker is ready, and serves until it is killed.
pub fn serve_for_ever() -> ! {
    println!("ready");
    loop {
        std::thread::park();
    }
}
