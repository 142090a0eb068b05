//! LatZero through its Rust client.
//!
//! The server is the real program with its own data directory and port. Calls one at a time use the
//! blocking API, and calls in flight the async one, on the same runtime as NATS. The handler is
//! blocking.

use super::{Install, Peer};
use crate::failure::{During, Failure};
use crate::frame::{PAYLOAD, PROCESS};
use crate::placement::Placement;
use crate::plan::{Load, Outcome, Plan, RateClock, time_each};
use crate::process::{self, READY_WAIT, Server, announce};
use crate::server::{self, Ready, Which};
use crate::stream::Transport;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use latzero::blocking;
use serde_json::value::RawValue;
use std::fmt::Display;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// LatZero over one of its transports: the current server, or the one for comparison.
pub(crate) struct LatZero(pub(crate) Transport, pub(crate) Which);

impl Peer for LatZero {
    fn name(&self) -> &'static str {
        match (self.0, self.1) {
            (Transport::Tcp, Which::Now) => "latzero-tcp",
            (Transport::Unix, Which::Now) => "latzero-unix",
            (Transport::Tcp, Which::Before) => "before-tcp",
            (Transport::Unix, Which::Before) => "before-unix",
        }
    }

    fn transport(&self) -> Transport {
        self.0
    }

    fn prepare(&self, _install: Install) -> Result<(), String> {
        match self.1 {
            Which::Now => server::check_program().map_err(|failure| failure.to_string()),
            Which::Before if server::program_before().is_some() => Ok(()),
            Which::Before => Err("--before names no program".into()),
        }
    }

    fn start(&self, scratch: &Path, placement: Placement) -> Result<Server, Failure> {
        let process = process::start_server(self.name(), scratch, placement)?;
        let ready = process.wait_for(READY_WAIT, Ready::parse)?;
        let address = match self.0 {
            Transport::Tcp => format!("@{}", ready.tcp),
            Transport::Unix => format!("?socket={}", ready.unix),
        };
        Ok(Server { process, address })
    }

    fn serve(&self, scratch: &Path) -> Result<(), Failure> {
        let before = server::program_before().filter(|_| self.1 == Which::Before);
        let mut command = Command::new(before.unwrap_or_else(server::program));
        server::append_start_args(&mut command, scratch);
        Err(command.exec()).during("run latzero")
    }

    fn handle(&self, address: &str) -> Result<(), Failure> {
        let app =
            blocking::App::connect(&format!("latzero://handler{address}")).map_err(failure)?;
        app.serve(PROCESS, |request| request.data::<Box<RawValue>>())
            .map_err(failure)?;
        announce(address)?;
        loop {
            std::thread::park();
        }
    }

    fn call(&self, address: &str, plan: &Plan) -> Result<Outcome, Failure> {
        let url = format!("latzero://caller{address}");
        let payload: Box<RawValue> =
            RawValue::from_string(PAYLOAD.to_owned()).expect("the payload is JSON");
        match plan.load {
            Load::OneAtATime => {
                let app = blocking::App::connect(&url).map_err(failure)?;
                time_each(plan, || {
                    check(&app.call(PROCESS, &payload).send::<Box<RawValue>>())
                })
            }
            Load::InFlight(window) => {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build();
                runtime.during("start a runtime")?.block_on(async {
                    let app = latzero::App::connect(&url).await.map_err(failure)?;
                    let mut clock = RateClock::new(plan, window);
                    let mut in_flight = FuturesUnordered::new();
                    while !clock.is_over() {
                        for _ in 0..clock.ask() {
                            in_flight.push(app.call(PROCESS, &payload).send::<Box<RawValue>>());
                        }
                        check(
                            &in_flight
                                .next()
                                .await
                                .expect("calls in flight are counted until they end"),
                        )?;
                        clock.answered(1);
                    }
                    Ok(clock.outcome())
                })
            }
        }
    }
}

fn check(answer: &Result<Box<RawValue>, latzero::Error>) -> Result<(), Failure> {
    match answer {
        Ok(text) if text.get() == PAYLOAD => Ok(()),
        Ok(_) => Err(Failure::said(
            "LatZero returned something other than what was sent",
        )),
        Err(error) => Err(failure(error)),
    }
}

fn failure(error: impl Display) -> Failure {
    Failure::said(format!("LatZero: {error}"))
}
