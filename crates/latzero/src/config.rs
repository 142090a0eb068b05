//! How an app connects.

use std::path::PathBuf;
use std::time::Duration;

use latzero_protocol::PoolName;
use serde_json::Value;

use crate::keys::{AppKey, Keys};
use crate::url::Url;

/// Threads that run blocking handlers, by default.
pub(crate) const HANDLER_THREADS: usize = 16;

/// Whether and how to reconnect after the connection was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconnect {
    /// Whether to reconnect at all; if not, a lost connection ends the app.
    pub enabled: bool,
    /// The first pause is a random time up to this. It doubles with each attempt.
    pub pause_min: Duration,
    /// The limit of the doubled pause.
    pub pause_max: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Reconnect {
            enabled: true,
            pause_min: Duration::from_millis(50),
            pause_max: Duration::from_secs(5),
        }
    }
}

/// The configuration of an app before it connects.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) url: Url,
    pub(crate) exclusive: bool,
    pub(crate) takeover: bool,
    pub(crate) rehydrate: bool,
    pub(crate) transient: bool,
    pub(crate) hold_answers: bool,
    pub(crate) meta: Option<Value>,
    pub(crate) app_key: Option<AppKey>,
    /// The keys of encrypted pools.
    pub(crate) keys: Vec<(PoolName, Keys)>,
    /// Whether to send proofs over a connection that they are not bound to.
    pub(crate) unbound: bool,
    /// Where the accepted state of encrypted pools is stored.
    pub(crate) state_dir: Option<PathBuf>,
    pub(crate) reconnect: Reconnect,
    pub(crate) handler_threads: usize,
    pub(crate) connect_timeout: Duration,
    pub(crate) call_timeout: Duration,
}
