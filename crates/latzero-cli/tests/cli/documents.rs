//! Runs the examples of the documents: every console block of the README and of docs/ runs in one
//! shell on one terminal, and must print what the document shows, except for numbers and times.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use crate::program::TIMEOUT;

/// Ends the output of a command; the command's number follows.
const MARK: char = '\u{1}';

/// A command, and what it prints.
#[derive(Debug)]
struct Step {
    place: String,
    command: String,
    expected: Vec<String>,
}

fn repository() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.join("../..").canonicalize().unwrap()
}

/// The blocks of one language in a document, each with the line that it begins at.
fn blocks(text: &str, language: &str) -> Vec<(usize, Vec<String>)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        if line.starts_with("```") {
            let body = lines.by_ref().map(|(_, line)| line);
            let body: Vec<String> = body
                .take_while(|line| *line != "```")
                .map(str::to_owned)
                .collect();
            if line == format!("```{language}") {
                blocks.push((at + 2, body));
            }
        }
    }
    blocks
}

fn steps(name: &str, text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for (start, block) in blocks(text, "console") {
        for (at, line) in block.iter().enumerate() {
            match (line.strip_prefix("$ "), steps.last_mut()) {
                (Some(command), _) => steps.push(Step {
                    place: format!("{name}:{}", start + at),
                    command: command.to_owned(),
                    expected: Vec::new(),
                }),
                (None, Some(step)) => step.expected.push(normal(line)),
                (None, None) => panic!("{name}:{start} begins without a command"),
            }
        }
    }
    steps
}

/// A line without what differs from run to run: numbers, times, the width of columns.
fn normal(line: &str) -> String {
    let mut out = String::new();
    for word in line.split_whitespace() {
        let mut was_digit = false;
        for c in word.chars() {
            let is_digit = c.is_ascii_digit() || (was_digit && c == '.');
            match is_digit {
                true if was_digit => {}
                true => out.push('#'),
                false => out.push(c),
            }
            was_digit = is_digit;
        }
        out.push(' ');
    }
    let ages = ["# s ago", "# min ago"];
    ages.iter()
        .fold(out, |out, age| out.replace(age, "just now"))
}

/// A shell on its own terminal.
struct Shell {
    child: Child,
    output: Receiver<String>,
    pending: String,
    home: tempfile::TempDir,
}

impl Shell {
    fn start(steps: &[Step]) -> Shell {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_latzero"), path.join("latzero")).unwrap();
        let mut script = "exec 3< gate\n".to_owned();
        for (number, step) in steps.iter().enumerate() {
            // Each command waits until the test has seen what the last one printed.
            writeln!(
                script,
                "{}\nprintf '\\001{number}\\n'; read -r _ <&3",
                step.command
            )
            .unwrap();
        }
        // The terminal is a session of its own, which the end of this group does not reach.
        script.push_str("kill $(jobs -p) 2> /dev/null\n");
        std::fs::write(path.join("script"), script).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(path.join("gate"))
                .status()
                .unwrap()
                .success()
        );
        let search = std::env::var("PATH").unwrap_or_default();
        let mut child = Command::new("script")
            .args(["-qec", "bash script", "/dev/null"])
            .current_dir(&path)
            .env_clear()
            .env("PATH", format!("{}:{search}", path.display()))
            .env("HOME", &path)
            .env("TERM", "dumb")
            .env("LATZERO_PORT", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // What it leaves behind ends with its group.
            .process_group(0)
            .spawn()
            .expect("script(1) is installed");
        let mut stdout = child.stdout.take().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n) = stdout.read(&mut chunk) {
                let text = String::from_utf8_lossy(&chunk[..n]).into_owned();
                if n == 0 || sender.send(text).is_err() {
                    return;
                }
            }
        });
        Shell {
            child,
            output,
            pending: String::new(),
            home,
        }
    }

    /// Waits for more output; false where none comes.
    fn more(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.output.recv_timeout(left) {
            Ok(text) => {
                self.pending.push_str(&text);
                true
            }
            Err(_) => false,
        }
    }

    /// What step `number` printed: up to its mark, and for a command in the background as much as
    /// is expected of it.
    fn output_of(&mut self, number: usize, step: &Step) -> Vec<String> {
        let deadline = Instant::now() + TIMEOUT;
        let home = self.home.path().canonicalize().unwrap();
        let home = home.to_str().unwrap().to_owned();
        let mark = format!("{MARK}{number}\r\n");
        loop {
            let is_over = self.pending.contains(&mark);
            let text = self.pending.replace(&mark, "").replace(&home, "/home/me");
            let lines: Vec<String> = text.lines().map(normal).collect();
            let is_awaited = step.command.ends_with('&') && lines.len() < step.expected.len();
            // A line may arrive in two parts.
            let is_whole = text.is_empty() || text.ends_with('\n');
            if is_over && is_whole && !is_awaited {
                self.pending.clear();
                return lines;
            }
            if !self.more(deadline) {
                return lines;
            }
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let latzero = |args: &[&str]| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_latzero"));
            let home = self.home.path();
            command.args(args).env_clear().env("HOME", home).output()
        };
        let _ = latzero(&["stop"]);
        let group = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = self.child.wait();
    }
}

#[test]
fn the_console_blocks_of_the_documents_run_as_printed() {
    let root = repository();
    let mut names = vec!["README.md".to_owned()];
    let docs = std::fs::read_dir(root.join("docs")).unwrap();
    let mut docs: Vec<String> = docs
        .map(|entry| format!("docs/{}", entry.unwrap().file_name().to_str().unwrap()))
        .filter(|name| name.ends_with(".md"))
        .collect();
    docs.sort();
    names.extend(docs);
    let read = |name: &String| std::fs::read_to_string(root.join(name)).unwrap();
    let mut all: Vec<Step> = names
        .iter()
        .flat_map(|name| steps(name, &read(name)))
        .collect();
    assert!(all.len() > 10, "the documents have examples");
    let python: Vec<String> = blocks(&read(&names[0]), "python")
        .into_iter()
        .flat_map(|(_, lines)| lines)
        .collect();
    let has_python = Command::new("python3").arg("--version").output().is_ok();
    if has_python {
        // Before the README's last command, which stops the server.
        let last = all
            .iter()
            .rposition(|step| step.place.starts_with("README.md"))
            .unwrap();
        all.insert(
            last,
            Step {
                place: "the README's Python".to_owned(),
                command: "python3 snippets.py >/dev/null && echo fine".to_owned(),
                expected: vec![normal("fine")],
            },
        );
    }
    let mut shell = Shell::start(&all);
    std::fs::write(shell.home.path().join("snippets.py"), python.join("\n")).unwrap();
    let mut gate = std::fs::OpenOptions::new()
        .write(true)
        .open(shell.home.path().join("gate"))
        .unwrap();
    for (number, step) in all.iter().enumerate() {
        let mut printed = shell.output_of(number, step);
        // What runs in the background says at any time that its server is gone or back.
        let is_note = |line: &str| {
            line.starts_with("lost the connection to ") || line.starts_with("connected to ")
        };
        printed.retain(|line| !is_note(line));
        assert_eq!(printed, step.expected, "{}: {}", step.place, step.command);
        gate.write_all(b"\n").unwrap();
    }
}
