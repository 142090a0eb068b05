//! `start`: the server, in this process, until a signal or `latzero stop` ends it.

use std::path::{Path, PathBuf};

use latzero_server::settings::Environment;
use latzero_server::startup::private_umask;
use latzero_server::{Origins, Server};
use serde_json::json;

use crate::args::StartArgs;
use crate::exit::{Done, Exit, Failure};
use crate::output::Output;
use crate::parse::shell;
use crate::reach::try_line;

pub(crate) fn run(args: &StartArgs, output: &Output) -> Done {
    // The first step: from here on nothing is created that others could read.
    private_umask();
    let environment = Environment::of_process();
    let origins = Origins {
        environment: environment.clone(),
        overrides: args.settings.overrides(),
        file: args.settings.config.clone(),
        takes_over: args.takeover,
    };
    let server = Server::bind(origins)?;
    let ready = Ready {
        addresses: server.addresses(),
        data_dir: server.data_dir(),
        program: program(),
        home: environment.var("HOME").map(PathBuf::from),
    };
    // A server whose output nobody reads is a server all the same.
    let _ = match output.json {
        true => output.line(ready.to_json()),
        false => output.line(ready.text()),
    };
    server.run().map_err(|error| {
        Failure::new(Exit::Failure, format!("the server's loop failed: {error}"))
            .with_help("its log says more; `latzero start --log-level debug` the most")
    })?;
    Ok(Exit::Ok)
}

/// What is printed once the server listens.
struct Ready<'a> {
    addresses: &'a [String],
    data_dir: &'a Path,
    program: String,
    home: Option<PathBuf>,
}

impl Ready<'_> {
    /// Two lines: one for programs that wait for it, and one for people to try. The addresses end the first, the
    /// Unix socket last of all: paths may have blanks.
    fn text(&self) -> String {
        format!(
            "latzero ready {} pid {} data {} {}\ntry: {}",
            env!("CARGO_PKG_VERSION"),
            std::process::id(),
            self.data_dir.display(),
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
        self.addresses
            .iter()
            .find_map(|address| address.strip_prefix("tcp://")?.rsplit_once(':'))
    }
}

/// How the program is started from where it was started: `latzero` where a shell finds it, else the path that was used.
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
