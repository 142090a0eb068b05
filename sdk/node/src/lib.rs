//! The private half of the npm package `latzero`: connections, calls, handlers, events and blocks.
//! The documented face is `lib/`.
//!
//! Everything here runs on the JavaScript thread that made the connection, but for wakers. In Node
//! its event loop also reads the socket; elsewhere a thread of the client does. Operations that
//! take time are futures: they are polled on that thread, and what they come to travels to
//! JavaScript in batches, as one JSON text for each wake.

mod app;
mod batch;
mod block;
mod errors;
mod handlers;
mod mailbox;
mod memory;
mod options;
mod streams;
mod uv;

use napi_derive::napi;

/// The version of the addon, which its face must have too.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Every code of the protocol, with the family of its error and what to do about it.
#[napi]
pub fn codes() -> Vec<Vec<&'static str>> {
    let codes = latzero::Code::ALL.iter();
    codes
        .map(|&code| vec![code.as_str(), errors::family(code), code.remedy()])
        .collect()
}
