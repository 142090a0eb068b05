//! The core of LatZero: pools, sessions and the registry, as state machines that decide but never
//! act.
//!
//! A [`Session`] turns the messages of one connection into decisions, the [`Registry`] knows every
//! app and pool, and a [`Pool`] routes calls and emits between its members. Their inputs are events
//! and the time, and their outputs are [`Effects`], which a [`Driver`] (the server's event loop, or
//! the simulator) carries out. A [`Turn`] is one such step. There is no IO, clock, randomness,
//! thread or lock in this crate, so a run is a function of its inputs.

pub mod driver;
pub mod effects;
pub mod in_flight;
pub mod ledger;
pub mod limits;
pub mod link;
pub mod memory;
pub mod now;
pub mod outbox;
pub mod pool;
mod prng;
mod refusals;
mod registration;
pub mod registry;
pub mod rows;
pub mod session;
mod slab;
pub mod turn;

pub use driver::{Driver, Peer, Transport};
pub use effects::{Audit, CallEnd, Count, Effects};
pub use in_flight::InFlight;
pub use limits::Limits;
pub use link::Link;
pub use now::{Now, Time};
pub use outbox::{Class, Sent};
pub use pool::{BlockKey, DurableCalls, MemberKey, Pool, PoolBlocks};
pub use prng::Prng;
pub use registry::Registry;
pub use session::{Flow, Session};
pub use turn::Turn;
