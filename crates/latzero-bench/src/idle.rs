//! Memory of an idle connection.
//!
//! Thousands of apps connect, send a handshake and then do nothing. The increase of the server's
//! memory is divided by their number. The first connection is not counted, because the server
//! allocates buffers for it.

use crate::failure::{During, Failure};
use crate::machine::Machine;
use crate::results::{Finding, Results, Sheet, Unit};
use crate::server::{Memory, Running};
use crate::stream::Transport;
use crate::wire::Wire;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

/// The most resident memory of one idle connection, in bytes.
const BYTES_MAX: f64 = 8192.0;

/// Descriptors that either process needs in addition to the connections.
const OTHER_DESCRIPTORS: u64 = 100;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct IdleArgs {
    /// Open only a few connections: shows that it works, measures nothing
    #[arg(long)]
    pub(crate) quick: bool,
    /// Print the results as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Connections that are opened, over each kind of socket [default: 10000]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    connections: Option<u64>,
}

/// What the apps that connect register.
#[derive(Clone, Copy)]
enum Registration {
    /// Only the app itself, in the default pool.
    Bare,
    /// One trigger as well.
    OneTrigger,
}

impl Registration {
    fn describe(self) -> &'static str {
        match self {
            Self::Bare => "serving nothing",
            Self::OneTrigger => "serving one trigger",
        }
    }

    fn handshake(self, number: u64) -> Value {
        let app_id = format!("idle-{number:07}");
        match self {
            Self::Bare => json!({"app_id": app_id}),
            Self::OneTrigger => json!({"app_id": app_id, "pools": ["idle"], "triggers": ["echo"]}),
        }
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &IdleArgs) -> Result<Results, Failure> {
    let machine = Machine::observe();
    machine.warn_of_debug_build(args.quick);
    let connections = args
        .connections
        .unwrap_or(if args.quick { 200 } else { 10_000 });
    raise_descriptors(connections + OTHER_DESCRIPTORS)?;

    let mut findings = Vec::new();
    let mut rounds = Vec::new();
    for (transport, socket) in [(Transport::Unix, "Unix"), (Transport::Tcp, "TCP")] {
        for registration in [Registration::Bare, Registration::OneTrigger] {
            let what = format!("{socket}, {}", registration.describe());
            eprintln!("{what}: {connections} connections");
            let (before, after) = measure(connections, transport, registration)?;
            let cost = after.since(before);
            let each = |bytes: u64| bytes as f64 / connections as f64;
            let finding = |kind: &str, bytes| {
                Finding::new(format!("{what}: {kind}"), each(bytes), Unit::Bytes)
            };
            findings.extend([
                finding("resident", cost.resident).expect_at_most(BYTES_MAX),
                finding("proportional", cost.proportional),
                finding("anonymous", cost.anonymous),
            ]);
            rounds.push(json!({
                "what": what, "connections": connections, "before": before, "after": after,
            }));
        }
    }
    let sheet = Sheet {
        bench: "idle",
        about: format!(
            "memory of the server for each of {connections} connections that did their handshake, \
             an app each"
        ),
        quick: args.quick,
        machine,
        findings,
        rounds: rounds.into(),
    };
    Ok(sheet.to_results())
}

/// The server's memory with one connection, and with `connections` more.
fn measure(
    connections: u64,
    transport: Transport,
    registration: Registration,
) -> Result<(Memory, Memory), Failure> {
    // Clients over TCP are one untrusted user, who may not use the whole limit.
    let bound = 2 * connections + 2;
    let names = [
        "connections_max",
        "connections_unauthenticated_max",
        "connections_unauthenticated_per_user_max",
        "apps_max",
    ];
    let server = Running::start(&names.map(|name| format!("limits.{name}={bound}")))?;
    let connect = |number| Wire::connect(&server, transport, registration.handshake(number));
    let _first = connect(0)?;
    let before = server.memory()?;
    let mut open = Vec::new();
    for number in 1..=connections {
        open.push(connect(number)?);
    }
    let after = server.memory()?;
    Ok((before, after))
}

/// Allows this process, and those it starts, `wanted` descriptors each (`RLIMIT_NOFILE`,
/// `getrlimit(2)`).
pub(crate) fn raise_descriptors(wanted: u64) -> Result<(), Failure> {
    let limit = getrlimit(Resource::Nofile);
    // `None` means no limit.
    if limit.maximum.is_some_and(|maximum| maximum < wanted) {
        return Err(Failure::said(format!(
            "{wanted} descriptors are needed, and {} allowed: open fewer with --connections, \
             or `sudo prlimit --pid $$ --nofile={wanted}:{wanted}`",
            limit.maximum.unwrap_or_default()
        )));
    }
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised)
        .map_err(std::io::Error::from)
        .during("allow this process more descriptors")
}
