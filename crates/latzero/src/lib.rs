//! The LatZero client for Rust: call triggers of other apps, serve triggers, send and receive
//! events.
//!
//! ```no_run
//! # async fn example() -> Result<(), latzero::Error> {
//! use serde_json::json;
//!
//! let calc = latzero::App::connect("latzero://calc?pool=alpha").await?;
//! calc.serve("double", |req| async move {
//!     let x: i64 = req.data()?;
//!     Ok(x * 2)
//! })
//! .await?;
//!
//! let app = latzero::App::connect("latzero://me?pool=alpha").await?;
//! let doubled: i64 = app.call("double", &21).send().await?;
//! assert_eq!(doubled, 42);
//! app.emit("done", &json!({"result": doubled})).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Without async, [`blocking::App`] does the same. A handle is a cheap clone; when the last one
//! drops, its socket closes and its threads end.
//!
//! A call may wait for a handler that is not connected yet, and outlive connections, servers and
//! the process itself:
//!
//! ```no_run
//! # async fn example() -> Result<(), latzero::Error> {
//! # let app = latzero::App::connect("latzero://me?pool=alpha").await?;
//! let parked = app.call("ship", &17).id("order-17").redeliver().send_parked().await?;
//! drop(parked); // It is on the server's disk; this process may end here.
//!
//! let mut answers = app.answers(); // To calls of this process and of earlier ones.
//! if let Some(answer) = answers.next().await {
//!     assert_eq!(answer.id(), "order-17");
//!     let receipt: String = answer.into()?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A call needs no thread hop: the caller's own thread writes the frame, a blocking caller that is
//! alone reads its own reply, and the async API runs on the caller's tokio runtime if there is one,
//! else on one background thread, with any executor. The public API has no types of a runtime. This
//! crate knows the wire protocol, but not how a server makes its decisions.

mod config;
mod drive;
mod error;
mod face;
mod interrupt;
mod keys;
mod payload;
mod sync;
pub mod testing;
mod url;
mod wire;

pub use config::Reconnect;
pub use drive::answers::{ANSWERS_BYTES_MAX, ANSWERS_MAX, Answer};
pub use drive::events::{Emission, Presence};
pub use drive::outside::Driver;
pub use drive::request::{Origin, Request, Unanswered};
pub use drive::states::{STATES_MAX, State};
pub use error::{Error, HandlerError};
pub use face::answers::Answers;
pub use face::app::{App, Handler};
pub use face::block::{
    Block, BlockLock, BlockName, BlockWriter, Changes, CreateBlock, Draft, Element, Exposed,
    LOCKS_VARIABLE, OwnedView, PrivateMapping, TypedBlock, View, Writing,
};
pub use face::blocking;
pub use face::builder::Builder;
pub use face::call::{Call, Emit, Emitting};
pub use face::events::Events;
pub use face::keys::awaited_in;
pub use face::outgoing::{Calling, Parked, Parking};
pub use face::states::States;
pub use face::stream::{ItemOrProgress, Stream};
pub use keys::{AppKey, Keys};
pub use latzero_protocol::limits::SCHEMA_BYTES_MAX;
pub use latzero_protocol::memory::LockMode;
pub use latzero_protocol::message::Strategy;
pub use latzero_protocol::policy::Right;
pub use latzero_protocol::{Code, Family, InstanceId, Ran};
pub use payload::{Bytes, Data, FromPayload, IntoPayload, Reply, check_json};
pub use wire::known_hosts;
pub use wire::wait::HandshakeTimeout;
