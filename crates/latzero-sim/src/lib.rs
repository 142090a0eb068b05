//! A deterministic simulator of the fabric, for tests.
//!
//! Many scripted clients talk to the real core through the real wire format, in virtual time; a
//! model checks every message. There is no socket, clock, thread or other randomness than the seed,
//! so a seed replays to the same bytes.
//!
//! [`World`] is the server without its sockets and may be driven by hand; [`run`] lets the script
//! drive it.

mod check;
mod client;
mod durable;
mod hostile;
mod line;
mod report;
mod script;
mod storage;
mod store;
mod vault;
mod world;

pub use line::{Bounds, Event, LENGTH_SLACK, Line, Peer, Totals};
pub use report::{Outcome, Plan, Reached, STEPS_DEFAULT, Theme, Violation, run};
pub use storage::{Descriptor, Storages, StoredBlock};
pub use store::Rows;
pub use world::{Message, PoolHandle, World, admin_proof, decode, encode_frame};
