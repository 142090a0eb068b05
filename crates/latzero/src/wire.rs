//! The connection: the socket and its handshake, bytes that are sent and received, and calls that
//! wait for their reply. Nothing here knows who reads or which API the messages belong to.

pub(crate) mod connection;
pub mod known_hosts;
mod local;
pub(crate) mod message;
pub(crate) mod outbox;
pub(crate) mod pending;
pub(crate) mod prove;
pub(crate) mod sealed;
pub(crate) mod tls;
