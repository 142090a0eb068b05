//! What makes an app go on: the state that its handles share, the threads or the task that read,
//! handlers and queues of events, and reconnecting. The API is built on it, and not known here.

pub(crate) mod answers;
pub(crate) mod core;
pub(crate) mod events;
pub(crate) mod handlers;
mod handover;
mod inbound;
#[cfg(test)]
mod interleavings;
pub(crate) mod outside;
mod reader;
mod reconnect;
pub(crate) mod request;
#[cfg(feature = "tokio")]
mod runtime;
mod signal;
pub(crate) mod states;
mod threads;

/// What the hand-over is made of; its tests use those of a model checker.
mod cells {
    pub(super) use std::sync::{Mutex, MutexGuard};
    pub(super) use std::thread::{Thread, current};
}
