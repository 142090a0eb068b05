//! A running server hands over to a new one: its listening sockets, so that no connection is
//! refused in between, and the memory of shared blocks, so that it survives even if no client holds
//! it.
//!
//! The new process asks over the Unix socket (`hand_over`, for administrators). The old one replies
//! with descriptors and continues to serve. Once the new one reports that it has everything
//! (`"taken":true`) and can listen, the old one drains, as it does for a stop. Its last messages
//! are the blocks that were created or moved in the meantime; then it closes its database and ends.
//! The new one takes the lock of the data directory as soon as it is free, and starts. Connections
//! that arrive in between wait in the queues of the sockets. All state of the old server is on
//! disk.

mod give;
mod sockets;
mod take;

pub(crate) use give::{Handover, Step, check_asker, hand_over, send_rest};
pub(crate) use take::{Inherited, ask};

/// How many blocks' descriptors are sent with one message.
const BLOCKS_AT_ONCE: usize = 32;

/// How many descriptors are accepted with one message.
const DESCRIPTORS_MAX: usize = latzero_shm::fds::DESCRIPTORS_MAX;

/// Whether a process of user `uid` may hand over a server: only processes of this user or of root
/// may.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_user_and_root_are_trusted() {
        let own = rustix::process::geteuid().as_raw();
        assert!(is_trusted(own) && is_trusted(0));
        assert!(!is_trusted(own + 1) && !is_trusted(u32::MAX));
    }
}
