//! Reconnects after the connection was lost. Full jitter over a growing pause, so that not all
//! clients connect to a restarted server at once.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use latzero_protocol::{Code, Ran};

use crate::drive::core::Core;
use crate::error::Error;

/// A random part of `most`. The keys of its hasher are the only source of randomness in the
/// standard library.
fn jitter(most: Duration) -> Duration {
    let random = RandomState::new().build_hasher().finish();
    most.mul_f64((random >> 11) as f64 / (1_u64 << 53) as f64)
}

/// The limit of the random pause before attempt `n`, counted from 0.
fn pause_max(core: &Core, n: u32) -> Duration {
    let reconnect = &core.config.reconnect;
    reconnect
        .pause_min
        .saturating_mul(1 << n.min(20))
        .min(reconnect.pause_max)
}

/// Whether another attempt may succeed without anybody changing anything.
fn is_final(error: &Error) -> bool {
    matches!(
        error.kind(),
        Code::InvalidName
            | Code::UnsupportedProtocol
            | Code::Forbidden
            | Code::Unauthenticated
            | Code::BadMessage
            // The server changed, and somebody has to find out why.
            | Code::Rollback
            | Code::Fork
            | Code::Downgrade
            | Code::Integrity
    )
}

/// Starts a thread that reconnects and then ends.
pub(crate) fn spawn(core: &Arc<Core>) -> Result<(), Error> {
    let core = core.clone();
    let spawned = std::thread::Builder::new()
        .name("latzero-connect".into())
        .spawn(move || reconnect(&core));
    spawned.map(drop).map_err(|e| {
        Error::new(Code::Internal, "cannot start a thread to reconnect")
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
                // If the app has ended in the meantime, the connection is dropped.
                if core.install(link).is_ok() {
                    core.notify_driver();
                    core.resources.restore(core);
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
