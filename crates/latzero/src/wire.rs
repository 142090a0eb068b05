//! The connection: the socket and its handshake, bytes that are sent and received, and calls that
//! wait for their reply. Nothing here knows who reads or which API the messages belong to.

pub(crate) mod connect;
pub(crate) mod input;
pub mod known_hosts;
pub(crate) mod link;
mod local;
pub(crate) mod message;
pub(crate) mod outbox;
pub(crate) mod pending;
pub(crate) mod prove;
pub(crate) mod sealed;
pub(crate) mod stored;
pub(crate) mod tls;
pub(crate) mod wait;
