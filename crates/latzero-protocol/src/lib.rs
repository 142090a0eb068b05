//! The LatZero wire protocol: frames, messages, names, limits and error codes.
//!
//! This crate turns bytes into borrowed views and views into bytes. It knows no socket, no runtime and no state:
//! what a message *does* is decided in `latzero-fabric`, and what travels is decided by whoever owns the socket.
//!
//! Payloads stay opaque. A message is scanned once ([`scan`]), its routing fields are read from the envelope
//! ([`Envelope`]), and the bytes of `data` or `response` are passed on as they came.

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
pub mod proof;
pub mod scan;

pub use envelope::{Body, Envelope, Raw, Salvaged, salvage};
pub use error::{Code, Ran, Refusal};
pub use frame::{Frame, FrameError};
pub use id::{CallId, InstanceId};
pub use message::Request;
pub use name::{AppId, BlockId, NameError, PoolName, TriggerName};
