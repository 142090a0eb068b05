//! A private server for tests, with its own process, data directory, socket and port.
//!
//! ```no_run
//! let server = latzero::testing::server().expect("the program `latzero` is built");
//! let app = latzero::blocking::App::connect(&server.url("me")).expect("it listens");
//! ```

use std::ffi::OsString;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// How long a server may take to become ready.
const READY_TIME: Duration = Duration::from_secs(10);

/// Lines that a server may print before its ready line.
const LINES_MAX: usize = 100;

/// Why a server could not be started.
#[derive(Debug)]
pub struct StartError(String);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// A running private server. When this is dropped, the server is killed and its directory removed.
#[derive(Debug)]
pub struct Server {
    child: Child,
    dir: PathBuf,
    tcp: String,
    socket: PathBuf,
    args: Vec<String>,
}

/// Starts a server with its own data directory and port. The program is the one that `LATZERO_BIN`
/// names, else `latzero` beside the running executable or in one of its parent directories, else
/// the one on the `PATH`.
///
/// # Errors
/// If the program is not found or does not become ready; the text says what it printed.
pub fn server() -> Result<Server, StartError> {
    server_with(&[])
}

/// Like [`server`], with further arguments for `latzero start`.
///
/// # Errors
/// As [`server`].
pub fn server_with(args: &[&str]) -> Result<Server, StartError> {
    let dir = private_dir()?;
    let program = program();
    let result = start(&program, &dir, args);
    if result.is_err() {
        // Files that could not be removed are left in the system's temporary directory.
        let _ = std::fs::remove_dir_all(&dir);
    }
    result
}

fn start(program: &OsString, dir: &Path, args: &[&str]) -> Result<Server, StartError> {
    let mut child = Command::new(program)
        .args(["start", "--port", "0", "--log-level", "warn", "--data-dir"])
        .arg(dir)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| {
            StartError(format!(
                "'{}' could not be started: {e}; build it with `cargo build`, or name it in \
                LATZERO_BIN",
                program.display()
            ))
        })?;
    let stdout = child.stdout.take().expect("the pipe was requested");
    match ready_line(stdout) {
        Ok((tcp, socket)) => Ok(Server {
            child,
            dir: dir.to_owned(),
            tcp,
            socket,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
        }),
        Err(why) => {
            let _ = child.kill();
            let status = child
                .wait()
                .map_or_else(|e| e.to_string(), |status| status.to_string());
            Err(StartError(format!(
                "'{}' did not become ready: {why} ({status})",
                program.display()
            )))
        }
    }
}

/// Waits for the line that begins with `latzero ready` and names `tcp://HOST:PORT` and `unix:PATH`.
fn ready_line(stdout: std::process::ChildStdout) -> Result<(String, PathBuf), String> {
    let (tx, rx) = mpsc::channel();
    // A thread, because a pipe cannot be read with a deadline. It reads to the end: a server whose
    // output nobody reads would block at a full pipe.
    let reading = std::thread::Builder::new()
        .name("latzero-output".into())
        .spawn(move || {
            let mut seen = Vec::new();
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if seen.len() > LINES_MAX {
                    continue;
                }
                if let Some(addresses) = line.strip_prefix("latzero ready").and_then(parse_ready) {
                    let _ = tx.send(Ok(addresses));
                    seen.resize(LINES_MAX + 1, String::new());
                } else {
                    seen.push(line);
                }
            }
            let _ = tx.send(Err(seen.join("\n")));
        });
    reading.map_err(|e| e.to_string())?;
    match rx.recv_timeout(READY_TIME) {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(printed)) => Err(format!("it ended, having printed {printed:?}")),
        Err(_) => Err(format!(
            "no ready line appeared within {} s",
            READY_TIME.as_secs()
        )),
    }
}

fn parse_ready(rest: &str) -> Option<(String, PathBuf)> {
    let tcp = rest.split_whitespace().find_map(|word| {
        word.strip_prefix("tcp://")
            .or_else(|| word.strip_prefix("tls://"))
    })?;
    // A path may hold blanks; it runs to the next address or the end.
    let path = rest.split_once("unix:")?.1;
    let path = path.split(" tcp://").next()?.split(" pid=").next()?;
    Some((tcp.to_owned(), PathBuf::from(path.trim_end())))
}

fn private_dir() -> Result<PathBuf, StartError> {
    use std::os::unix::fs::DirBuilderExt;
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut last = None;
    for _ in 0..1000 {
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("latzero-test-{}-{n}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => last = Some(e),
            Err(e) => {
                return Err(StartError(format!(
                    "{} cannot be created: {e}",
                    dir.display()
                )));
            }
        }
    }
    Err(StartError(format!("no directory could be made: {last:?}")))
}

fn program() -> OsString {
    if let Some(named) = std::env::var_os("LATZERO_BIN").filter(|named| !named.is_empty()) {
        return named;
    }
    // Tests run from target/PROFILE/deps, examples from target/PROFILE/examples, the program is in
    // target/PROFILE.
    let here = std::env::current_exe().unwrap_or_default();
    let near = here
        .ancestors()
        .skip(1)
        .take(3)
        .map(|dir| dir.join("latzero"));
    let found = near
        .into_iter()
        .find(|path| path.is_file() && *path != here);
    found.map_or_else(|| "latzero".into(), PathBuf::into_os_string)
}

impl Server {
    /// The address of the app `app_id` over the server's Unix socket. Append `&pool=NAME` to join a
    /// pool.
    #[must_use]
    pub fn url(&self, app_id: &str) -> String {
        format!(
            "latzero://{app_id}?socket={}",
            escape(&self.socket.to_string_lossy())
        )
    }

    /// The address of the app `app_id` over TCP. Append `&pool=NAME` to join a pool.
    #[must_use]
    pub fn tcp_url(&self, app_id: &str) -> String {
        format!("latzero://{app_id}@{}?", self.tcp)
    }

    /// Its TCP address, `HOST:PORT`.
    #[must_use]
    pub fn tcp(&self) -> &str {
        &self.tcp
    }

    /// The path of its Unix socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.dir
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Restarts it on its directory with the same arguments. Its TCP port may change.
    ///
    /// # Errors
    /// As [`server`].
    pub fn restart(&mut self) -> Result<(), StartError> {
        self.kill();
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let mut fresh = start(&program(), &self.dir, &args)?;
        std::mem::swap(self, &mut fresh);
        // The dropped value is the killed server; the directory is still in use.
        fresh.dir = PathBuf::new();
        Ok(())
    }

    /// Kills it at once, as a crash would.
    pub fn kill(&mut self) {
        // It may have ended by itself, which is the same.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn escape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        match c {
            '%' | '&' | '?' | ' ' | '#' => out.push_str(&format!("%{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if !self.dir.as_os_str().is_empty() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_lines_are_read() {
        let check = |line: &str, tcp: &str, socket: &str| {
            let rest = line.strip_prefix("latzero ready").unwrap();
            assert_eq!(
                parse_ready(rest),
                Some((tcp.to_owned(), socket.into())),
                "{line}"
            );
        };
        check(
            "latzero ready tcp://127.0.0.1:99 unix:/tmp/a/s.sock pid=7",
            "127.0.0.1:99",
            "/tmp/a/s.sock",
        );
        check(
            "latzero ready: unix:/tmp/a b/s.sock tcp://[::1]:99",
            "[::1]:99",
            "/tmp/a b/s.sock",
        );
        assert_eq!(parse_ready(" on port 99"), None);
    }
}
