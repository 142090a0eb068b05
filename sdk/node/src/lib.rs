//! The private half of the npm package `latzero`: connections, calls, handlers, events and blocks.
//! The documented interface is `lib/`.
//!
//! Everything except wakers runs on the JavaScript thread that made the connection. In Node its
//! event loop also reads the socket; elsewhere a thread of the client does. Operations that take
//! time are futures: they are polled on that thread, and their results are passed to JavaScript in
//! batches, as one JSON text for each wake.

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

/// The version of the addon, which `lib/` must have too.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Every code of the protocol, with the family of its error and what to do about it.
#[napi]
pub fn codes() -> Vec<Vec<&'static str>> {
    let codes = latzero::Code::ALL.iter();
    codes
        .map(|&code| vec![code.as_str(), code.family().as_str(), code.remedy()])
        .collect()
}
