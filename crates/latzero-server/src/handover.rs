//! A running server hands over to a new one: its listening sockets, so that nobody is turned away in between, and the memory
//! of shared blocks, so that it lives on even where no client holds it.
//!
//! The new process asks over the Unix socket (`hand_over`, for administrators). The old one answers with descriptors and goes
//! on as before; only when the new one says that it has them all (`"taken":true`) does it drain as it does for a stop, close
//! its database and end. The new one waits for that end and starts. Connections that come in between wait in the sockets'
//! queues. What the old one knew is on disk.

mod take;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use crate::listener::Listener;
use crate::shared::Shared;
pub(crate) use take::ask;

/// Blocks whose descriptors travel with one message.
const BLOCKS_AT_ONCE: usize = 32;

/// Descriptors that are taken with one message.
const DESCRIPTORS_MAX: usize = 64;

/// Where a hand-over is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// The new server asks for everything.
    Give,
    /// It has everything.
    Taken,
}

/// A message of what is given, with descriptors in the order in which it names them.
pub(crate) struct Given {
    pub(crate) json: String,
    pub(crate) descriptors: Vec<Arc<OwnedFd>>,
}

/// What a server gives up: the sockets in the reply, the blocks in the messages after it.
///
/// # Errors
/// Where the process may have no more descriptors.
pub(crate) fn give(listeners: &[Listener], shared: &Shared) -> io::Result<Vec<Given>> {
    let mut listed = Vec::new();
    let mut descriptors = Vec::new();
    for listener in listeners {
        let (what, fd) = match listener {
            Listener::Tcp(tcp) => (json!({"kind": "tcp"}), tcp.as_fd()),
            Listener::Unix(unix) => {
                let path = unix.local_addr()?.as_pathname().map(Path::to_owned);
                (json!({"kind": "unix", "path": path}), unix.as_fd())
            }
        };
        listed.push(what);
        descriptors.push(Arc::new(fd.try_clone_to_owned()?));
    }
    let blocks = shared.blocks.shared();
    let drain_ms = u64::try_from(shared.settings().drain_timeout.as_millis()).unwrap_or(u64::MAX);
    let reply = json!({
        "pid": std::process::id(), "listeners": listed, "blocks": blocks.len(), "drain_timeout": drain_ms,
    });
    let mut given = vec![Given {
        json: reply.to_string(),
        descriptors,
    }];
    for some in blocks.chunks(BLOCKS_AT_ONCE) {
        let listed: Vec<_> = some
            .iter()
            .map(|(pool, block, _)| json!({"pool": pool, "block_id": block}))
            .collect();
        let told = json!({
            "action": "event", "event": "handed_over", "descriptors": some.len(), "blocks": listed,
        });
        given.push(Given {
            json: told.to_string(),
            descriptors: some.iter().map(|(.., fd)| Arc::clone(fd)).collect(),
        });
    }
    Ok(given)
}
