//! The client against a fake server, over both kinds of sockets and through all three faces.

#![allow(
    clippy::unwrap_used,
    reason = "a helper of a test that fails fails its test"
)]

#[path = "../fake/mod.rs"]
mod fake;

mod blocking;
mod blocks;
mod driven;
mod executor;
mod loss;
mod parked;
mod tokio_face;
mod wire;
