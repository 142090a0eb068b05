//! The API: what programs use, async and blocking.

pub(crate) mod answers;
pub(crate) mod app;
pub(crate) mod block;
pub mod blocking;
pub(crate) mod builder;
pub(crate) mod call;
pub(crate) mod events;
pub(crate) mod keys;
pub(crate) mod outgoing;
mod request;
pub(crate) mod states;
pub(crate) mod stream;
mod unsent;
