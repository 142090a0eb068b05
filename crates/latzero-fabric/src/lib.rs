//! The core of LatZero: pools, sessions and the registry, as state machines that decide and never act.
//!
//! A [`Session`] turns the messages of one connection into decisions, the [`Registry`] knows every app and pool, and a
//! [`Pool`] routes calls and emits between its members. They are fed what happened and the time, and answer through
//! [`Effects`]; a driver (the server's event loop, or the simulator) carries those out. There is no IO, clock,
//! randomness, thread or lock in this crate, so a run is a function of its inputs.

pub mod effects;
pub mod host;
pub mod keep;
pub mod limits;
pub mod memory;
pub mod pool;
mod prng;
mod registration;
pub mod registry;
pub mod session;
mod slab;
pub mod time;

pub use effects::{Audit, CallEnd, Class, Count, Effects, Sent};
pub use host::{Host, Transport};
pub use limits::Limits;
pub use pool::{BlockKey, MemberKey, Pool};
pub use prng::Prng;
pub use registry::Registry;
pub use session::{Flow, Session};
pub use time::Time;
