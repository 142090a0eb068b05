//! The systems under comparison.
//!
//! Each has its own file and implements [`Peer`]. To add one, write its file and add it to [`ALL`].

mod json;
mod latzero;
pub(crate) mod nats;
mod relay;

use crate::failure::Failure;
use crate::placement::Placement;
use crate::plan::{Outcome, Plan};
use crate::process::{self, Server};
use crate::server::Which;
use crate::stream::Transport;
use std::path::Path;

/// Every contestant, in the order in which they run and are reported.
pub(crate) const ALL: &[&dyn Peer] = &[
    &relay::Relay(Transport::Tcp),
    &relay::Relay(Transport::Unix),
    &json::Json(Transport::Tcp),
    &json::Json(Transport::Unix),
    &latzero::LatZero(Transport::Tcp, Which::Now),
    &latzero::LatZero(Transport::Unix, Which::Now),
    &latzero::LatZero(Transport::Tcp, Which::Before),
    &latzero::LatZero(Transport::Unix, Which::Before),
    &nats::Nats,
];

/// One way to send a request from a caller to a handler and its reply back.
///
/// `serve`, `handle` and `call` each run in a process of their own.
pub(crate) trait Peer: Sync {
    /// Its name on the command line and in the results.
    fn name(&self) -> &'static str;

    /// What its clients connect with: it is compared with the relays over the same transport.
    fn transport(&self) -> Transport;

    /// Obtains what the contestant needs, or returns why it cannot take part.
    fn prepare(&self, _install: Install) -> Result<(), String> {
        Ok(())
    }

    /// Starts the server, in the parent process, and returns once it can be connected to. Its
    /// process must be started through [`process::Process::spawn`], which pins it. `scratch` is an
    /// empty directory of its own.
    ///
    /// By default this program runs [`Peer::serve`], and is ready when that calls
    /// [`process::announce`].
    fn start(&self, scratch: &Path, placement: Placement) -> Result<Server, Failure> {
        let process = process::start_server(self.name(), scratch, placement)?;
        let address = process.wait_until_ready()?;
        Ok(Server { process, address })
    }

    /// The server's process: announces its address and serves until it is killed.
    fn serve(&self, scratch: &Path) -> Result<(), Failure>;

    /// The handler's process: announces itself once calls reach it, and answers until it is killed.
    fn handle(&self, address: &str) -> Result<(), Failure>;

    /// The caller's process: makes the calls of `plan`. An unexpected answer is a failure.
    fn call(&self, address: &str, plan: &Plan) -> Result<Outcome, Failure>;
}

/// Whether a contestant may install a program that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Install {
    Allowed,
    Never,
}

/// The contestant with this name.
pub(crate) fn by_name(name: &str) -> Result<&'static dyn Peer, Failure> {
    ALL.iter()
        .copied()
        .find(|peer| peer.name() == name)
        .ok_or_else(|| {
            let names: Vec<_> = ALL.iter().map(|peer| peer.name()).collect();
            Failure::said(format!(
                "no contestant is called '{name}'; there are {}",
                names.join(", ")
            ))
        })
}
