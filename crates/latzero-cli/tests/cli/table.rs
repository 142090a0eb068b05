//! Runs every command with the server up, down, suspended, on a wrong port and without rights, on a
//! terminal, in a pipe and with `--json`, and compares exit code, stdout and stderr with snapshots.
//!
//! After an intended change, `INSTA_UPDATE=always cargo test -p latzero-cli table` updates them;
//! read the difference as a user would.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::process::Signal;

use crate::program::{Server, latzero};

/// How the server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Up,
    Down,
    Suspended,
    WrongPort,
    NoRights,
}

/// Who reads the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Terminal,
    Pipe,
    Json,
}

const STATES: [State; 5] = [
    State::Up,
    State::Down,
    State::Suspended,
    State::WrongPort,
    State::NoRights,
];
const READERS: [Reader; 3] = [Reader::Terminal, Reader::Pipe, Reader::Json];

/// The commands that reach a server, by the name of their snapshot.
const COMMANDS: &[(&str, &[&str])] = &[
    ("status", &["status"]),
    ("reload", &["reload"]),
    ("kick", &["kick", "nobody"]),
    ("backup", &["backup", "--to", "backup.db"]),
    ("call", &["call", "system/echo", "{\"x\":[1,\"two\"]}"]),
    ("call_no_handler", &["call", "system/ecoh"]),
    ("call_no_pool", &["call", "sytem/echo"]),
    ("call_stream", &["call", "system/echo", "1", "--stream"]),
    ("answers", &["answers", "--app", "me"]),
    ("emit", &["emit", "system/nobody"]),
    ("apps", &["apps", "--offline"]),
    ("apps_forget", &["apps", "forget", "nobody"]),
    ("pools_info", &["pools", "info", "system"]),
    ("pools_remove", &["pools", "remove", "nopool"]),
    ("ping", &["ping", "-c", "1"]),
    ("block_ls", &["block", "ls", "lab"]),
    ("block_read", &["block", "read", "lab/f"]),
    ("block_create_exists", &["block", "create", "lab/f", "5"]),
    ("block_cas", &["block", "cas", "lab/f", "x", "y"]),
    ("block_rm_none", &["block", "rm", "lab/none"]),
    ("block_bad_name", &["block", "create", "lab/a b", "5"]),
    ("block_flush", &["block", "flush", "lab/f"]),
    // It must not lock the block that other commands of the table use.
    ("block_write_none", &["block", "write", "lab/none", "x"]),
    ("block_resize_none", &["block", "resize", "lab/none", "5"]),
    ("block_dump", &["block", "dump", "lab/f", "-"]),
    ("block_load_none", &["block", "load", "lab/f", "nosuch.bin"]),
    ("parked_ls", &["parked", "ls", "--trigger", "lab/none"]),
    ("parked_show_none", &["parked", "show", "7"]),
    ("parked_cancel_none", &["parked", "cancel", "7"]),
    ("parked_retry_none", &["parked", "retry", "7"]),
    ("parked_purge_none", &["parked", "purge", "7"]),
    ("pools_create_exists", &["pools", "create", "lab"]),
    ("pools_reencrypt_plain", &["pools", "reencrypt", "lab"]),
    ("usage_flag", &["status", "--nonsense"]),
    ("usage_argument", &["call"]),
    ("usage_value", &["call", "x", "--timeout", "soon"]),
    ("usage_command", &["sttaus"]),
    ("usage_json", &["call", "x", "{x:1}"]),
];

/// Commands that do not end by themselves, or change what others see: not with a server that is up.
const NOT_WHEN_UP: &[(&str, &[&str])] = &[
    ("stop", &["stop"]),
    ("on", &["on", "x"]),
    ("serve", &["serve", "x", "--", "cat"]),
    ("watch", &["watch"]),
    ("stats", &["stats"]),
    // What it shows of limits depends on the machine.
    ("health", &["health"]),
    // The server does one at a time, and `backup` is one as well.
    ("db_check", &["db", "check"]),
    ("db_query", &["db", "query", "select 1"]),
    ("db_dump", &["db", "dump"]),
    ("pools", &["pools"]),
    ("block_info", &["block", "info", "lab/f"]),
    ("bench", &["bench", "call", "--calls", "1"]),
    ("block_watch", &["block", "watch", "lab/f"]),
    ("block_lock", &["block", "lock", "lab/f", "--", "true"]),
];

/// Commands that need no server.
const LOCAL: &[(&str, &[&str])] = &[
    ("backup_ls", &["backup", "ls"]),
    ("restore", &["restore", "nosuch.db"]),
    ("logs", &["logs"]),
    ("config_default_wrong", &["config", "default", "more"]),
    ("trust_nobody", &["trust", "127.0.0.1:1"]),
    ("completion_wrong", &["completion", "nosuch"]),
    ("keys_new_bad_name", &["keys", "new", "a b"]),
    ("keys_check_none", &["keys", "check", "nopool"]),
    ("keys_rotate_none", &["keys", "rotate", "nopool"]),
    (
        "keys_accept_restore_none",
        &["keys", "accept-restore", "nopool"],
    ),
    (
        "keys_from_passphrase_bad_name",
        &["keys", "from-passphrase", "a b"],
    ),
    ("app_key_new_bad_name", &["app", "key", "new", "a b"]),
    ("keys_show_none", &["keys", "show", "nopool"]),
    (
        "keys_export_none",
        &["keys", "export", "nopool", "--role", "read", "--to", "x"],
    ),
    ("app_key_show_none", &["app", "key", "show", "nobody"]),
    ("doctor_usage", &["doctor", "--set", "nosuch=1"]),
    ("config_show", &["config", "show", "--changed"]),
    ("serve_nothing", &["serve", "x", "--", "no-such-program"]),
    ("start_bare_host", &["start", "-h"]),
    ("start_wrong", &["start", "--port", "x"]),
    ("service_show", &["service", "show", "--port", "1234"]),
    ("service_uninstall_none", &["service", "uninstall"]),
    // It would start a server; service.rs runs it.
    (
        "service_install_wrong",
        &["service", "install", "--port", "x"],
    ),
];

fn run(home: &Path, args: &[&str], reader: Reader, homes: &[&Path]) -> String {
    let mut args: Vec<&str> = args.to_vec();
    if reader == Reader::Json {
        // Behind the command, but not among another program's arguments.
        let at = args
            .iter()
            .position(|arg| *arg == "--")
            .unwrap_or(args.len());
        args.insert(at, "--json");
    }
    let mut command = match reader {
        Reader::Terminal => {
            let quote = |word: &&str| format!("'{}'", word.replace('\'', "'\\''"));
            let words: Vec<String> = args.iter().map(quote).collect();
            let line = format!("{} {}", env!("CARGO_BIN_EXE_latzero"), words.join(" "));
            let mut command = Command::new("script");
            command
                .args(["-qec", &line, "/dev/null"])
                .env_clear()
                .env("PATH", std::env::var_os("PATH").unwrap_or_default())
                .env("HOME", home)
                .env("TERM", "xterm")
                .stdin(std::process::Stdio::null());
            command
        }
        _ => latzero(home, &args),
    };
    let done = command
        .current_dir(home)
        .output()
        .expect("script(1) is installed");
    let mut text = format!("exit code {}\n", done.status.code().unwrap_or(-1));
    for (name, bytes) in [("stdout", &done.stdout), ("stderr", &done.stderr)] {
        // What a terminal shows of them, and what is erased from it, is not shown here.
        for line in String::from_utf8_lossy(bytes).lines() {
            let line = line
                .rsplit('\r')
                .find(|part| !part.is_empty())
                .unwrap_or("");
            writeln!(text, "{name} | {}", normal(line, homes)).unwrap();
        }
    }
    text
}

/// A line without what differs from run to run.
fn normal(line: &str, homes: &[&Path]) -> String {
    let mut line = line.replace(env!("CARGO_BIN_EXE_latzero"), "/usr/bin/latzero");
    for home in homes {
        line = line.replace(home.canonicalize().unwrap().to_str().unwrap(), "/home/me");
    }
    // Progress is shown where something takes a second, and erased.
    line = line.replace("\u{1b}[K", "");
    let line = without_instances(&line).replace('\u{1b}', "^[");
    let line = line.replace(
        &format!("cli-{}", rustix::process::geteuid().as_raw()),
        "cli-UID",
    );
    let mut out = String::new();
    let mut was_digit = false;
    for c in line.chars() {
        let is_digit = c.is_ascii_digit() || (was_digit && c == '.');
        match is_digit {
            true if was_digit => {}
            true => out.push('#'),
            false => out.push(c),
        }
        was_digit = is_digit;
    }
    for unit in ["µs", "ms", "s"] {
        out = out.replace(&format!("# {unit}"), "# T");
    }
    // Another command of the table makes the backup.
    out = out
        .replace("# T ago", "just now")
        .replace("less than # T", "# T")
        .replace("last backup just now", "no backup yet")
        .replace("\"last_backup\":#", "\"last_backup\":null");
    // Columns are as wide as the numbers in them.
    out.split(' ')
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// A line without instance ids, which are sixteen hexadecimal digits.
fn without_instances(line: &str) -> String {
    let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    let mut out = String::new();
    let mut rest = line;
    while let Some(at) = rest.find(is_hex) {
        let (before, after) = rest.split_at(at);
        let end = after.find(|c| !is_hex(c)).unwrap_or(after.len());
        let (word, after) = after.split_at(end);
        out.push_str(before);
        out.push_str(if word.len() == 16 { "INSTANCE" } else { word });
        rest = after;
    }
    out + rest
}

/// The commands below `path` that have no subcommands, from the help.
fn commands(path: &[String]) -> Vec<Vec<String>> {
    let home = Path::new("/nonexistent");
    let args: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
    let help = crate::program::run(&mut latzero(home, &args))
        .ended_with(0)
        .out;
    if !help
        .lines()
        .any(|line| line.starts_with("Usage:") && line.contains("<COMMAND>"))
    {
        return vec![path.to_vec()];
    }
    let is_name = |word: &str| word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    help.lines()
        .take_while(|line| *line != "Options:")
        .filter_map(|line| line.strip_prefix("  ")?.split_once("  "))
        .map(|(name, _)| name)
        .filter(|name| !name.is_empty() && is_name(name) && *name != "help")
        .flat_map(|name| commands(&[path, &[name.to_owned()]].concat()))
        .collect()
}

#[test]
fn the_table_has_every_command() {
    let commands = commands(&[]);
    assert!(commands.len() > 50, "{commands:?}");
    let rows: Vec<&[&str]> = [COMMANDS, NOT_WHEN_UP, LOCAL]
        .concat()
        .iter()
        .map(|(_, args)| *args)
        .collect();
    for command in commands {
        let is_listed = rows.iter().any(|args| args.starts_with(&words(&command)));
        assert!(is_listed, "no row for `latzero {}`", command.join(" "));
    }
}

fn words(command: &[String]) -> Vec<&str> {
    command.iter().map(String::as_str).collect()
}

#[test]
fn every_command_in_every_state() {
    let up = Server::start();
    up.run(&["block", "create", "lab/f", "5"]).ended_with(0);
    let down = tempfile::tempdir().unwrap();
    let stranger = tempfile::tempdir().unwrap();
    let suspended = Server::start();
    suspended.running.signal(Signal::STOP);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free_port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let port = up.port();
    let (up_home, suspended_home) = (up.home().to_owned(), suspended.home().to_owned());
    let homes = [down.path(), stranger.path(), &up_home, &suspended_home];
    let place = |state: State| match state {
        State::Up => (up_home.as_path(), None),
        State::Down => (down.path(), None),
        State::Suspended => (suspended_home.as_path(), None),
        State::WrongPort => (up_home.as_path(), Some(free_port.as_str())),
        // Over TCP and without the token, which is in another directory.
        State::NoRights => (stranger.path(), Some(port.as_str())),
    };
    let show = |args: &[&str], states: &[State]| {
        let mut text = String::new();
        for &state in states {
            let (home, port) = place(state);
            let mut args = args.to_vec();
            if let Some(port) = port {
                let at = args
                    .iter()
                    .position(|arg| *arg == "--")
                    .unwrap_or(args.len());
                args.splice(at..at, ["--port", port]);
            }
            for reader in READERS {
                let ran = run(home, &args, reader, &homes);
                writeln!(text, "== {state:?}, {reader:?}: {ran}").unwrap();
            }
        }
        text
    };
    let one = |&(name, args): &(&'static str, &[&str])| (name, show(args, &STATES));
    let not_up = |&(name, args): &(&'static str, &[&str])| {
        let states = [State::Down, State::Suspended, State::WrongPort];
        (name, show(args, &states))
    };
    let local = |&(name, args): &(&'static str, &[&str])| (name, show(args, &[State::Down]));
    // Side by side, since a suspended server is waited for.
    let shown: Vec<(&str, String)> = thread::scope(|scope| {
        let mut running = Vec::new();
        running.extend(
            COMMANDS
                .iter()
                .map(|command| scope.spawn(move || one(command))),
        );
        running.extend(
            NOT_WHEN_UP
                .iter()
                .map(|command| scope.spawn(move || not_up(command))),
        );
        running.extend(
            LOCAL
                .iter()
                .map(|command| scope.spawn(move || local(command))),
        );
        running
            .into_iter()
            .map(|running| running.join().unwrap())
            .collect()
    });
    suspended.running.signal(Signal::CONT);
    for (name, text) in shown {
        insta::with_settings!({omit_expression => true, prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!(name, text);
        });
    }
}
