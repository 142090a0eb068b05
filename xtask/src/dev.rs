//! Runs the server, and rebuilds and restarts it when a source file changes.

use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, SystemTime};

use crate::{Done, cargo_program, root};

/// How often the sources are checked for changes.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Runs until it is interrupted.
pub(crate) fn run(args: &[&str]) -> Done {
    let mut seen = newest(&root())?;
    let mut server = start(args);
    loop {
        std::thread::sleep(LOOK_EVERY);
        let now = newest(&root())?;
        if now != seen {
            seen = now;
            println!("dev: a source file changed; restarting");
            if let Some(child) = &mut server {
                // The server drains on SIGTERM, which is sent with `kill`; the wait follows.
                let _ = Command::new("kill").arg(child.id().to_string()).status();
                let _ = child.wait();
            }
            server = start(args);
        }
    }
}

fn start(args: &[&str]) -> Option<Child> {
    let built = Command::new(cargo_program())
        .args(["build", "--package", "latzero-cli"])
        .current_dir(root())
        .status();
    if !built.is_ok_and(|status| status.success()) {
        println!("dev: it does not build; waiting for the next change");
        return None;
    }
    match Command::new(root().join("target/debug/latzero"))
        .arg("start")
        .args(args)
        .spawn()
    {
        Ok(child) => Some(child),
        Err(error) => {
            println!("dev: it does not start: {error}");
            None
        }
    }
}

/// The time of the latest change of a source file.
fn newest(dir: &Path) -> Result<Option<SystemTime>, String> {
    let mut newest = None;
    for part in ["crates", "Cargo.toml"] {
        newest = newest.max(newest_below(&dir.join(part))?);
    }
    Ok(newest)
}

fn newest_below(path: &Path) -> Result<Option<SystemTime>, String> {
    let metadata =
        std::fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    if !metadata.is_dir() {
        return Ok(metadata.modified().ok());
    }
    let mut newest = None;
    let entries =
        std::fs::read_dir(path).map_err(|error| format!("{}: {error}", path.display()))?;
    for entry in entries.filter_map(Result::ok) {
        newest = newest.max(newest_below(&entry.path())?);
    }
    Ok(newest)
}
