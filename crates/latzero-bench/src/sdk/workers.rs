//! The processes of the measurement: workers that obey orders, and the servers of the peers.

use std::io::{BufRead, BufReader, Read as _, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::SdkArgs;
use crate::failure::{During, Failure};
use crate::process::{own_command, tied_command};

/// How long the server of a peer may take until it answers.
const READY_WAIT: Duration = Duration::from_secs(20);

/// What a caller is told.
#[derive(Debug, Serialize)]
pub(super) struct Order {
    pub(super) load: &'static str,
    pub(super) warmup: u64,
    pub(super) calls: u64,
    pub(super) window: u64,
}

/// The program that runs a kind of worker, without its address; an error says why there is none.
pub(super) fn command(args: &SdkArgs, kind: &str) -> Result<Command, String> {
    let (language, kind) = kind.split_once(' ').expect("a kind begins with a language");
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("sdk");
    let tied = |program: &Path| tied_command(program).map_err(|why| why.to_string());
    match language {
        "rust" => {
            let mut command = own_command().map_err(|why| why.to_string())?;
            command.arg("sdk-role").arg(kind);
            Ok(command)
        }
        "python" | "newest" => {
            let python = match language {
                "python" => &args.python,
                _ => &args.newest_python,
            };
            let python = python.as_ref().ok_or("no such Python was named")?;
            let mut command = tied(python)?;
            command.arg(here.join("worker.py")).arg(kind);
            Ok(command)
        }
        _ => {
            let node = args.node.as_ref().ok_or("no Node was named")?;
            let mut command = tied(node)?;
            command.arg(here.join("worker.mjs")).arg(kind);
            if language == "thread" {
                command.env("LATZERO_NODE_DRIVER", "thread");
            }
            Ok(command)
        }
    }
}

/// A process that takes orders, or serves. It is killed when this is dropped.
pub(super) struct Worker {
    kind: String,
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts it and waits until it is ready.
    pub(super) fn start(kind: &str, command: &mut Command) -> Result<Worker, Failure> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .during(format!("start {kind}"))?;
        let mut worker = Worker {
            kind: kind.to_owned(),
            to: child.stdin.take().expect("it is piped"),
            from: BufReader::new(child.stdout.take().expect("it is piped")),
            child,
        };
        let line = worker.line()?;
        match line.trim() {
            "ready" => Ok(worker),
            other => Err(Failure::said(format!("{kind} said '{other}'"))),
        }
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        let read = self.from.read_line(&mut line);
        match read.during(format!("read from {}", self.kind))? {
            0 => Err(Failure::said(format!("{} has ended", self.kind))),
            _ => Ok(line),
        }
    }

    /// Gives an order, and waits for the figures.
    pub(super) fn obey(&mut self, order: &Order) -> Result<Value, Failure> {
        let text = serde_json::to_string(order).expect("an order is plain");
        writeln!(self.to, "{text}").during(format!("order {}", self.kind))?;
        let line = self.line()?;
        serde_json::from_str(&line)
            .map_err(|_| Failure::said(format!("{} said '{line}'", self.kind)))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The CPU time that the threads of a process have had, in nanoseconds.
pub(super) fn cpu_ns(pid: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    let paths = threads
        .into_iter()
        .flatten()
        .flatten()
        .map(|thread| thread.path());
    let times = paths.filter_map(|path| {
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    times.sum()
}

/// How many microseconds a new interpreter takes to import the package.
pub(super) fn import(args: &SdkArgs, kind: &str) -> Result<f64, Failure> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../sdk/node/lib/index.cjs");
    let (program, script) = match kind {
        "python import" => (
            &args.python,
            "import time; t = time.perf_counter_ns(); import latzero; \
             print(time.perf_counter_ns() - t)"
                .to_owned(),
        ),
        _ => (
            &args.node,
            format!(
                "const t = process.hrtime.bigint(); require({:?}); \
                 console.log(String(process.hrtime.bigint() - t))",
                package.display().to_string()
            ),
        ),
    };
    let program = program.as_ref().expect("it was checked before");
    let flag = if kind == "python import" { "-c" } else { "-e" };
    let output = Command::new(program)
        .args([flag, &script])
        .output()
        .during(format!("run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let ns: Result<f64, _> = text.trim().parse();
    ns.map(|ns| ns / 1000.0)
        .map_err(|_| Failure::said(format!("the import failed: {text}")))
}

/// The server of a peer.
pub(super) struct Broker {
    child: Child,
    pub(super) address: String,
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Broker {
    /// `nats-server`, if it is installed.
    pub(super) fn nats(scratch: &Path) -> Result<Option<Broker>, Failure> {
        if !is_installed("nats-server") {
            return Ok(None);
        }
        let mut command = tied_command(Path::new("nats-server"))?;
        // It writes the port that it found into a file.
        command
            .args(["--addr", "127.0.0.1", "--port", "-1", "--ports_file_dir"])
            .arg(scratch);
        let child = quiet(&mut command)?;
        let mut broker = Broker {
            child,
            address: String::new(),
        };
        let pid = broker.child.id();
        let file = scratch.join(format!("nats-server_{pid}.ports"));
        broker.address = wait(|| {
            let text = std::fs::read_to_string(&file).ok()?;
            let ports: Value = serde_json::from_str(&text).ok()?;
            ports["nats"][0].as_str().map(str::to_owned)
        })?;
        Ok(Some(broker))
    }

    /// `redis-server`, if it is installed.
    pub(super) fn redis(scratch: &Path) -> Result<Option<Broker>, Failure> {
        if !is_installed("redis-server") {
            return Ok(None);
        }
        let socket = scratch.join("redis");
        let mut command = tied_command(Path::new("redis-server"))?;
        command
            .args([
                "--port",
                "0",
                "--save",
                "",
                "--appendonly",
                "no",
                "--unixsocket",
            ])
            .arg(&socket)
            .current_dir(scratch);
        let child = quiet(&mut command)?;
        let address = socket.display().to_string();
        let broker = Broker { child, address };
        wait(|| std::os::unix::net::UnixStream::connect(&socket).ok())?;
        Ok(Some(broker))
    }
}

fn quiet(command: &mut Command) -> Result<Child, Failure> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .during("start the server of a peer")
}

fn is_installed(program: &str) -> bool {
    let version = Command::new(program).arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

/// The first result of `look`, which is asked until there is one.
fn wait<T>(mut look: impl FnMut() -> Option<T>) -> Result<T, Failure> {
    let end = Instant::now() + READY_WAIT;
    while Instant::now() < end {
        if let Some(found) = look() {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(Failure::said("the server of a peer does not start"))
}

/// Reads orders until the input ends.
pub(super) fn orders(
    mut obey: impl FnMut(&Value) -> Result<Value, Failure>,
) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    writeln!(out, "ready").during("write")?;
    for line in std::io::stdin().lines() {
        let order = serde_json::from_str(&line.during("read an order")?);
        let order = order.map_err(|why| Failure::said(format!("an order: {why}")))?;
        writeln!(out, "{}", obey(&order)?).during("write")?;
    }
    Ok(())
}

/// Serves until the parent is gone.
pub(super) fn serve() -> Result<(), Failure> {
    writeln!(std::io::stdout(), "ready").during("write")?;
    std::io::stdin()
        .read_to_end(&mut Vec::new())
        .map(drop)
        .during("wait for the end")
}
