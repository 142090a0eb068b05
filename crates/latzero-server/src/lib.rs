//! The server around the core: sockets, timers, settings, logs and shutdown.
//!
//! The server does everything that touches the machine, and makes no routing decisions; the core
//! (`latzero-fabric`) does. A start uses these modules in order: [`settings`] collects the settings
//! and where each comes from, [`logging`] starts the logs, [`startup`] opens the directory, the
//! lock and the sockets, and [`server`] runs the loops. `latzero_protocol::address` defines where
//! clients find the Unix socket, and [`doctor`] diagnoses problems.

mod attempts;
mod audit;
mod blocks;
mod builtin;
mod clock;
mod connection;
pub mod doctor;
mod event_loop;
mod handover;
mod health;
mod host;
mod listener;
pub mod logging;
mod losses;
pub mod machine_limits;
mod mailbox;
pub mod maintenance;
mod peer;
mod peer_process;
mod persistence;
mod proofs;
mod random;
pub mod server;
pub mod settings;
mod shared;
mod socket;
pub mod startup;
mod stats;
mod steps;
mod timers;
mod tls;
mod turns;
mod utc;
mod watch;

pub use latzero_protocol::address;
pub use server::{Origins, Server, ServerError};
