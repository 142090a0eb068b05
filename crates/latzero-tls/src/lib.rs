//! TLS 1.3 for both ends of a connection: pins, certificates, and the records of one connection.
//!
//! - [`Pin`]: how a client recognises a server
//! - [`Stream`]: the state of one connection; the caller has the socket
//! - [`client`] and [`server`]: what each side accepts
//!
//! It opens no socket and keeps no state between connections: there are no session tickets, so
//! each connection proves its certificate anew, and no early data, which could be replayed.

pub mod client;
pub mod pem;
pub mod pin;
pub mod server;
mod stream;

use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;

pub use pin::Pin;
pub use rustls::Error as TlsError;
pub use stream::{PLAIN_BYTES_MAX, Stream, Unfinished};

/// The algorithms: those of AWS-LC, without a process-wide default that others might change.
static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));

fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// Whether bytes begin like a TLS record: a handshake or an alert (RFC 8446, section 5.1). As the
/// length of a frame they would be far above any limit.
#[must_use]
pub fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x15 | 0x16, 0x03, ..])
}
