//! Sockets, timers, settings, logs and drain around the fabric.
//!
//! The server owns everything that touches the machine and decides nothing about routing: that is the fabric's.
//! A start goes through these modules in order: [`settings`] says what is wanted and where each wish comes from,
//! [`logging`] begins to tell, [`startup`] takes directory, lock and sockets, and [`server`] runs the loops.
//! The rule by which clients find the Unix socket is `latzero_protocol::address`, and [`doctor`] says what stands in the way.

mod attempts;
mod audit;
mod blocks;
mod builtin;
mod connection;
pub mod doctor;
mod event_loop;
mod handover;
mod health;
mod host;
mod keeper;
mod listener;
pub mod logging;
mod losses;
mod peer;
mod random;
pub mod server;
pub mod settings;
mod shared;
mod socket;
pub mod startup;
mod stats;
pub mod surroundings;
mod timers;
pub mod upkeep;
mod utc;
mod watch;

pub use latzero_protocol::address;
pub use server::{Origins, Server, ServerError};
