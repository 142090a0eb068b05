//! `start`: runs the server, in this process or in the background, until a signal or `latzero stop`
//! ends it.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use latzero_server::settings::{Environment, load, unknown_variables};
use latzero_server::startup::StartupError;
use latzero_server::startup::created_files::CreatedFiles;
use latzero_server::startup::private_umask;
use latzero_server::{Origins, Server, ServerError};
use serde_json::{Value, json};

use crate::args::StartArgs;
use crate::connect::try_line;
use crate::exit::{CommandResult, Exit, Failure};
use crate::output::Output;
use crate::parse::shell;

pub(crate) fn run(args: &StartArgs, output: &Output) -> CommandResult {
    if args.detach {
        warn(&Environment::of_process(), output);
        return detach(output);
    }
    if !args.background {
        return serve(args, output);
    }
    // A new session, so that closing the terminal does not end it. It leads no group yet, so this
    // cannot fail.
    let _ = rustix::process::setsid();
    serve(args, output).or_else(|failure| {
        // The parent process reads this and prints it in its own format.
        output.raw_line(failure.to_json())?;
        Ok(failure.exit)
    })
}

/// Warns about variables that look like settings but are not.
fn warn(environment: &Environment, output: &Output) {
    for warning in unknown_variables(environment) {
        output.note(format_args!("warning: {warning}"));
    }
}

/// Starts the server in a separate process, and waits until it is ready or has failed.
fn detach(output: &Output) -> CommandResult {
    let failed = |error| Failure::new(Exit::Failure, format!("no process can be started: {error}"));
    let is_kept = |arg: &OsString| arg != "--detach";
    let mut child = Command::new("/proc/self/exe")
        .arg0(
            std::env::args_os()
                .next()
                .unwrap_or_else(|| "latzero".into()),
        )
        .args(std::env::args_os().skip(1).filter(is_kept))
        .arg("--background")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its messages are in its log file.
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let stdout = child.stdout.take().expect("the pipe was requested");
    let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let Some(first) = lines.next() else {
        let ended = child.wait().map_err(failed)?;
        let text = format!("the server ended before it was ready: {ended}");
        return Err(
            Failure::new(Exit::Failure, text).with_help("start it without --detach to see why")
        );
    };
    if let Ok(error) = serde_json::from_str::<Value>(&first)
        && let Some(failure) = Failure::of_json(&error)
    {
        let _ = child.wait();
        return Err(failure);
    }
    output.line(first)?;
    if !output.json
        && let Some(second) = lines.next()
    {
        output.line(second)?;
    }
    Ok(Exit::Ok)
}

fn serve(args: &StartArgs, output: &Output) -> CommandResult {
    // The first step: from here on nothing is created that others could read.
    private_umask();
    let environment = Environment::of_process();
    let origins = Origins {
        environment: environment.clone(),
        overrides: args.settings.overrides(),
        file: args.settings.config.clone(),
        takes_over: args.takeover,
    };
    if !args.background {
        warn(&environment, output);
    }
    let settings = load(&environment, &origins.overrides, origins.file.as_deref());
    let created = settings.map(|resolved| CreatedFiles::before(&resolved.settings.data_dir));
    let bound = Server::bind(origins);
    // Another server that starts at the same time uses what this one created.
    let is_beaten = |error: &ServerError| {
        matches!(
            error,
            ServerError::Startup(StartupError::AnotherServer { .. })
        )
    };
    if bound.as_ref().is_err_and(|error| !is_beaten(error))
        && let Ok(created) = created
    {
        created.remove();
    }
    let server = bound?;
    let ready = Ready {
        addresses: server.addresses(),
        data_dir: server.data_dir(),
        pin: server.pin(),
        program: program(),
        home: environment.var("HOME").map(PathBuf::from),
    };
    // The server continues even if nothing reads its output.
    let _ = match output.json {
        true => output.line(ready.to_json()),
        false => output.line(ready.text()),
    };
    server.run().map_err(|error| {
        Failure::new(
            Exit::Failure,
            format!("the server's event loop failed: {error}"),
        )
        .with_help("see `latzero logs`; `latzero start --log-level debug` logs more")
    })?;
    Ok(Exit::Ok)
}

/// What is printed once the server listens.
struct Ready<'a> {
    addresses: &'a [String],
    data_dir: &'a Path,
    /// The pin by which clients recognise the TLS server.
    pin: Option<String>,
    program: String,
    home: Option<PathBuf>,
}

impl Ready<'_> {
    /// Two lines: one that programs can wait for, and one that people can try. The first line ends
    /// with the addresses, and those with the Unix socket, because its path may contain blanks.
    fn text(&self) -> String {
        let pin = self.pin.as_ref().map(|pin| format!("pin {pin} "));
        format!(
            "latzero ready {} pid {} data {} {}{}\ntry: {}",
            env!("CARGO_PKG_VERSION"),
            std::process::id(),
            self.data_dir.display(),
            pin.unwrap_or_default(),
            self.addresses.join(" "),
            self.try_line()
        )
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "ready": true,
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "data_dir": self.data_dir.display().to_string(),
            "addresses": self.addresses,
            "pin": self.pin,
            "try": self.try_line(),
        })
    }

    fn try_line(&self) -> String {
        let default_dir = self
            .home
            .as_ref()
            .and_then(|home| home.join(".latzero").canonicalize().ok());
        let mut options = Vec::new();
        if default_dir.as_deref() != Some(self.data_dir) {
            options.push("--data-dir".to_owned());
            options.push(self.data_dir.display().to_string());
        } else if !self.addresses.iter().any(|a| a.starts_with("unix:"))
            && let Some((host, port)) = self.tcp()
        {
            if host != "127.0.0.1" && host != "0.0.0.0" {
                options.extend(["--host".to_owned(), host.to_owned()]);
            }
            options.extend(["--port".to_owned(), port.to_owned()]);
        }
        try_line(&self.program, &options)
    }

    fn tcp(&self) -> Option<(&str, &str)> {
        self.addresses.iter().find_map(|address| {
            let tcp = address.strip_prefix("tcp://");
            tcp.or_else(|| address.strip_prefix("tls://"))?
                .rsplit_once(':')
        })
    }
}

/// How to start this program again: `latzero` if a shell finds it, otherwise the path that was
/// used.
fn program() -> String {
    const NAME: &str = "latzero";
    let this = std::env::current_exe().and_then(|path| path.canonicalize());
    let on_path = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|dir| dir.join(NAME))
            .find(|file| file.is_file())
    });
    let found = on_path.and_then(|file| file.canonicalize().ok());
    match (this.ok(), found, std::env::args().next()) {
        (Some(this), Some(found), _) if this == found => NAME.to_owned(),
        (_, _, Some(typed)) => shell(&typed),
        (Some(this), _, None) => shell(&this.to_string_lossy()),
        (None, _, None) => NAME.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(home: &str, data_dir: &str, addresses: &[&str], expected: &str) {
        let addresses: Vec<String> = addresses.iter().map(|&a| a.to_owned()).collect();
        let ready = Ready {
            addresses: &addresses,
            data_dir: Path::new(data_dir),
            pin: None,
            program: "latzero".to_owned(),
            home: Some(home.into()),
        };
        let line = format!("latzero call{expected} system/echo '{{\"x\":42}}'");
        assert_eq!(ready.try_line(), line);
        let text = ready.text();
        assert!(text.starts_with("latzero ready "), "{text}");
        assert!(
            text.lines()
                .next()
                .unwrap()
                .ends_with(addresses.last().unwrap()),
            "{text}"
        );
    }

    #[test]
    fn the_line_to_try_says_what_it_must() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let dir = home.join(".latzero");
        std::fs::create_dir(&dir).unwrap();
        let (home, dir) = (home.to_str().unwrap(), dir.to_str().unwrap());
        check(home, dir, &["tcp://127.0.0.1:45227", "unix:/s"], "");
        check(home, dir, &["tcp://127.0.0.1:9", "unix:/s"], "");
        check(home, dir, &["tcp://127.0.0.1:9"], " --port 9");
        check(home, dir, &["tcp://[::1]:9"], " --host '[::1]' --port 9");
        check(
            home,
            "/d d",
            &["tcp://127.0.0.1:45227", "unix:/s"],
            " --data-dir '/d d'",
        );
    }
}
