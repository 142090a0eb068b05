//! Servers that a person has decided to trust: one line each, `HOST:PORT PIN`, in
//! `~/.config/latzero/known_hosts`.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use latzero_protocol::Code;
pub use latzero_tls::Pin;

use crate::error::Error;

/// The file, in the directory of the user's settings.
const NAME: &str = "latzero/known_hosts";

/// Where it is; `None` without a home directory.
#[must_use]
pub fn path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let config = set("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.filter(|path| path.is_absolute());
    let config = config.or_else(|| Some(PathBuf::from(set("HOME")?).join(".config")))?;
    Some(config.join(NAME))
}

/// A server's name in the file.
fn name_of(host: &str, port: u16) -> String {
    let host = host.trim_matches(['[', ']']).to_ascii_lowercase();
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

fn fault(path: &Path, what: &str) -> Error {
    Error::new(
        Code::BadMessage,
        format!(
            "{}: {what}; correct the file, or remove the line",
            path.display()
        ),
    )
}

/// The server that a line is about, and its pin; `None` for a comment.
fn parse(line: &str) -> Result<Option<(&str, Pin)>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, pin) = line
        .split_once(char::is_whitespace)
        .ok_or("a line has a host and a pin")?;
    let pin = pin
        .trim()
        .parse()
        .map_err(|error: latzero_tls::pin::NoPin| error.to_string())?;
    Ok(Some((name, pin)))
}

/// Whether the error means that there is no such file: the home directory of a service may not be a
/// directory.
fn is_absent(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn read(path: &Path) -> Result<String, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(error) if is_absent(error.kind()) => Ok(String::new()),
        Err(error) => Err(fault(path, &error.to_string())),
    }
}

/// The pin of a server that is trusted. Without a home directory there is none.
///
/// # Errors
/// If the file cannot be read, or has an invalid line.
pub fn find(host: &str, port: u16) -> Result<Option<Pin>, Error> {
    match path() {
        Some(path) => find_in(&path, host, port),
        None => Ok(None),
    }
}

fn find_in(path: &Path, host: &str, port: u16) -> Result<Option<Pin>, Error> {
    let name = name_of(host, port);
    for line in read(path)?.lines() {
        match parse(line).map_err(|why| fault(path, &why))? {
            Some((known, pin)) if known == name => return Ok(Some(pin)),
            _ => {}
        }
    }
    Ok(None)
}

/// The pin of the server at an address, which has proved that it has the key. A person has to
/// decide whether it is the right one.
///
/// # Errors
/// If no server answers there, or it does not use TLS.
pub fn fetch_pin(host: &str, port: u16, timeout: Duration) -> Result<Pin, Error> {
    crate::wire::connect::fetch_pin(host, port, timeout)
}

/// Trusts a server from now on, instead of the one that was trusted there before. Returns the file.
///
/// # Errors
/// If the file can't be read or written.
pub fn add(host: &str, port: u16, pin: Pin) -> Result<PathBuf, Error> {
    let path = path().ok_or_else(|| Error::new(Code::BadMessage, "HOME is not set"))?;
    add_to(&path, host, port, pin)?;
    Ok(path)
}

fn add_to(path: &Path, host: &str, port: u16, pin: Pin) -> Result<(), Error> {
    let name = name_of(host, port);
    let text = read(path)?;
    let mut kept: Vec<&str> = text
        .lines()
        .filter(|line| !matches!(parse(line), Ok(Some((known, _))) if known == name))
        .collect();
    let line = format!("{name} {pin}");
    kept.push(&line);
    let write = || -> io::Result<()> {
        if let Some(parent) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)?;
        }
        // Written to a new file and renamed, so that a crash leaves the old file or the new one.
        let beside = path.with_extension(format!("new.{}", std::process::id()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all((kept.join("\n") + "\n").as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|error| fault(path, &format!("cannot be written: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test says where by panicking")]

    use super::*;

    #[test]
    fn added_hosts_are_found_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/known_hosts");
        let pins: Vec<Pin> = ["A", "E"]
            .map(|c| c.repeat(42) + "A")
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        assert_eq!(find_in(&path, "host", 1).unwrap(), None);
        let no_home = Path::new("/dev/null/.config/latzero/known_hosts");
        assert_eq!(find_in(no_home, "host", 1).unwrap(), None);
        add_to(&path, "host", 1, pins[0]).unwrap();
        add_to(&path, "::1", 1, pins[1]).unwrap();
        assert_eq!(find_in(&path, "HOST", 1).unwrap(), Some(pins[0]));
        assert_eq!(find_in(&path, "[::1]", 1).unwrap(), Some(pins[1]));
        assert_eq!(find_in(&path, "host", 2).unwrap(), None);
        add_to(&path, "host", 1, pins[1]).unwrap();
        assert_eq!(find_in(&path, "host", 1).unwrap(), Some(pins[1]));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
        fs::write(&path, "# mine\nhost:1 short\n").unwrap();
        let error = find_in(&path, "host", 1).unwrap_err().to_string();
        assert!(error.contains("43 characters"), "{error}");
    }
}
