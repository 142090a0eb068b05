//! The LatZero wire protocol: frames, messages, names, limits and error codes.
//!
//! This crate converts bytes to borrowed views and views to bytes. It has no sockets, runtime or
//! state: `latzero-fabric` decides what a message does, and the owner of the socket decides what is
//! sent.
//!
//! Payloads are opaque. A message is scanned once ([`scan`]), its routing fields are read from the
//! envelope ([`Envelope`]), and the bytes of `data` or `response` are forwarded unchanged.

pub mod address;
pub mod encode;
pub mod envelope;
pub mod error;
pub mod frame;
pub mod id;
pub mod limits;
pub mod memory;
pub mod message;
pub mod name;
pub mod parked;
pub mod policy;
pub mod proof;
pub mod scan;

pub use envelope::{Body, Envelope, Raw, Salvaged, salvage};
pub use error::{Code, Family, Ran, Refusal};
pub use frame::{Frame, FrameError};
pub use id::{CallId, InstanceId};
pub use message::Request;
pub use name::{AppId, BlockId, NameError, PoolName, TriggerName};
pub use scan::Ahead;
