//! Connecting again after a loss: full jitter over a growing pause, so that a server that restarts
//! is not met by everybody at once.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use latzero_protocol::{Code, Ran};

use crate::core::Core;
use crate::error::Error;

/// A random part of `most`. The standard library's hasher keys are the one source of randomness it
/// has.
fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

/// The pause before attempt `n`, counted from 0, is drawn from this much.
fn pause_max(core: &Core, n: u32) -> Duration {
    let reconnect = &core.config.reconnect;
    reconnect
        .pause_min
        .saturating_mul(1 << n.min(20))
        .min(reconnect.pause_max)
}

/// Whether another attempt can end differently without anybody changing anything.
fn is_final(error: &Error) -> bool {
    matches!(
        error.kind(),
        Code::InvalidName
            | Code::UnsupportedProtocol
            | Code::Forbidden
            | Code::Unauthenticated
            | Code::BadMessage
    )
}

/// Starts a thread that connects again, and ends with that.
pub(crate) fn spawn(core: &Arc<Core>) -> Result<(), Error> {
    let core = core.clone();
    let spawned = std::thread::Builder::new()
        .name("latzero-connect".into())
        .spawn(move || reconnect(&core));
    spawned.map(drop).map_err(|e| {
        Error::new(Code::Internal, "no thread could be started to reconnect")
            .with_ran(Ran::No)
            .with_source(e)
    })
}

fn reconnect(core: &Arc<Core>) {
    for n in 0.. {
        if core.wait_for_end(jitter(pause_max(core, n))) {
            return;
        }
        match core.dial(&core.next_handshake()) {
            Ok(link) => {
                // An app that ended meanwhile drops the connection.
                if core.install(link).is_ok() {
                    core.notify_driver();
                    core.blocks.restore(core);
                }
                return;
            }
            Err(error) if is_final(&error) => return core.end(&error),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_random_and_bounded() {
        let most = Duration::from_millis(50);
        let pauses: Vec<_> = (0..64).map(|_| jitter(most)).collect();
        assert!(pauses.iter().all(|pause| *pause < most));
        assert!(pauses.iter().any(|pause| *pause != pauses[0]));
    }
}
