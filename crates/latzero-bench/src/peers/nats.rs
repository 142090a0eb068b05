//! NATS request and reply, through its own Rust client.
//!
//! The server is Debian's `nats-server`, started for this run on a free port. Handler and caller
//! use async-nats in the usual way: a loop over a subscription that publishes to the reply subject
//! of each message, and `Client::request`. Needs the cargo feature `nats`.

use super::{Install, Peer};
use crate::failure::{During, Failure};
use crate::placement::Placement;
use crate::plan::{Outcome, Plan};
use crate::process::{self, READY_WAIT, Server};
use crate::stream::Transport;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// NATS, over TCP: it has no other transport for clients.
pub(crate) struct Nats;

impl Peer for Nats {
    fn name(&self) -> &'static str {
        "nats"
    }

    fn transport(&self) -> Transport {
        Transport::Tcp
    }

    fn prepare(&self, install: Install) -> Result<(), String> {
        if !cfg!(feature = "nats") {
            return Err("this program was built without the cargo feature `nats`".to_owned());
        }
        if server_version().is_some() {
            return Ok(());
        }
        match install {
            Install::Never => Err("nats-server is not installed".to_owned()),
            Install::Allowed => apt_install(),
        }
    }

    fn start(&self, scratch: &Path, placement: Placement) -> Result<Server, Failure> {
        let process = process::start_server(self.name(), scratch, placement)?;
        let mut address = None;
        process.wait_for(READY_WAIT, |line| {
            if let Some((_, at)) = line.split_once("Listening for client connections on ") {
                address = Some(at.trim().to_owned());
            }
            line.contains("Server is ready").then_some(())
        })?;
        let address = address
            .ok_or_else(|| Failure::said("nats-server is ready but did not say on which port"))?;
        Ok(Server { process, address })
    }

    fn serve(&self, scratch: &Path) -> Result<(), Failure> {
        // The parent reads its log.
        let stdout = std::io::stdout().as_fd().try_clone_to_owned();
        let mut command = Command::new("nats-server");
        command
            .args(["--addr", "127.0.0.1", "--port", "-1"])
            .current_dir(scratch);
        command.stderr(Stdio::from(stdout.during("duplicate standard output")?));
        Err(command.exec()).during("run nats-server")
    }

    fn handle(&self, address: &str) -> Result<(), Failure> {
        client::handle(address)
    }

    fn call(&self, address: &str, plan: &Plan) -> Result<Outcome, Failure> {
        client::call(address, plan)
    }
}

/// The output of `nats-server --version`; `None` if it is not installed.
pub(crate) fn server_version() -> Option<String> {
    let output = Command::new("nats-server").arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// Installs the Debian package, and stops the system service that comes with it.
fn apt_install() -> Result<(), String> {
    const BY_HAND: &str = "install it with `apt-get install nats-server` to have it compared";
    if !rustix::process::geteuid().is_root() {
        return Err(format!(
            "nats-server is not installed, and only root may; {BY_HAND}"
        ));
    }
    eprintln!("nats-server is missing: installing the Debian package");
    let mut command = Command::new("apt-get");
    command.args(["install", "--yes", "--no-install-recommends", "nats-server"]);
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    let output = command.output().map_err(|error| {
        format!("nats-server is not installed, nor apt-get: {error}; {BY_HAND}")
    })?;
    if !output.status.success() || server_version().is_none() {
        let text = String::from_utf8_lossy(&output.stderr);
        let said = text.lines().last().unwrap_or("no reason given");
        return Err(format!(
            "apt-get could not install nats-server: {said}; {BY_HAND}"
        ));
    }
    // The package starts a service if systemd runs. It is not needed: this run starts its own
    // server.
    if Path::new("/run/systemd/system").exists() {
        Command::new("systemctl")
            .args(["disable", "--now", "nats-server"])
            .output()
            .ok();
    }
    Ok(())
}

#[cfg(not(feature = "nats"))]
mod client {
    use super::{Failure, Outcome, Plan};

    pub(super) fn handle(_address: &str) -> Result<(), Failure> {
        Err(Failure::said("built without the cargo feature `nats`"))
    }

    pub(super) fn call(_address: &str, _plan: &Plan) -> Result<Outcome, Failure> {
        Err(Failure::said("built without the cargo feature `nats`"))
    }
}

#[cfg(feature = "nats")]
mod client {
    use super::{During, Failure, Outcome, Plan};
    use crate::frame::{PAYLOAD, PROCESS};
    use crate::plan::{LatencyClock, Load, RateClock};
    use crate::process::announce;
    use async_nats::Client;
    use futures_util::StreamExt;
    use futures_util::stream::FuturesUnordered;
    use std::fmt::Display;
    use std::time::Instant;

    pub(super) fn handle(address: &str) -> Result<(), Failure> {
        run(async {
            let client = connect(address).await?;
            let mut calls = client.subscribe(PROCESS).await.map_err(failure)?;
            // The server handles a connection's messages in order: once it has answered this
            // request with "no responders", it knows the subscription.
            client.request("nobody", "".into()).await.ok();
            announce(address)?;
            while let Some(call) = calls.next().await {
                let Some(reply) = call.reply else { continue };
                client.publish(reply, call.payload).await.map_err(failure)?;
            }
            Err(Failure::said("nats-server ended the subscription"))
        })
    }

    pub(super) fn call(address: &str, plan: &Plan) -> Result<Outcome, Failure> {
        run(async {
            let client = connect(address).await?;
            match plan.load {
                Load::OneAtATime => {
                    let mut clock = LatencyClock::new(plan);
                    while clock.wants_call() {
                        let begin = Instant::now();
                        request(&client).await?;
                        clock.answered(begin.elapsed());
                    }
                    Ok(clock.outcome())
                }
                Load::InFlight(window) => {
                    let mut clock = RateClock::new(plan, window);
                    let mut in_flight = FuturesUnordered::new();
                    while !clock.is_over() {
                        for _ in 0..clock.ask() {
                            in_flight.push(request(&client));
                        }
                        in_flight
                            .next()
                            .await
                            .expect("calls in flight are counted until they end")?;
                        clock.answered(1);
                    }
                    Ok(clock.outcome())
                }
            }
        })
    }

    async fn request(client: &Client) -> Result<(), Failure> {
        let answer = client
            .request(PROCESS, PAYLOAD.into())
            .await
            .map_err(failure)?;
        if answer.payload != PAYLOAD {
            return Err(Failure::said(
                "NATS returned something other than what was sent",
            ));
        }
        Ok(())
    }

    async fn connect(address: &str) -> Result<Client, Failure> {
        async_nats::connect(address).await.map_err(failure)
    }

    fn failure(error: impl Display) -> Failure {
        Failure::said(format!("NATS: {error}"))
    }

    /// One thread. On two CPUs that was best for NATS: several threads took a third longer for a
    /// single call on one CPU, and were faster, by about a tenth, only with 1024 calls in flight
    /// and free placement.
    fn run<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.during("start a runtime")?.block_on(work)
    }
}
