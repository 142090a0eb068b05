//! The old server's side: hands over its sockets and blocks, and stops when the new one is ready.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use latzero_fabric::{Class, Sent};
use latzero_protocol::{BlockId, Code, PoolName, Refusal, encode};
use serde_json::{Value, json};

use super::{BLOCKS_AT_ONCE, DESCRIPTORS_MAX};
use crate::host::IoHost;
use crate::listener::Listener;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::{Socket, credentials};

/// A shared block and its memory.
type Block = (PoolName, BlockId, Arc<OwnedFd>);

/// The state of a hand-over.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// The new server has requested everything.
    Give,
    /// It has everything.
    Taken,
}

/// What was handed over, to whom, and whether the receiver has it.
#[derive(Debug, Default)]
pub(crate) struct Handover {
    state: Mutex<State>,
    /// Loops that no longer handle messages, except from the new server.
    quiet_loops: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    to: Weak<Peer>,
    /// The memory of each block that was handed over. Weak, so that removing a block frees its
    /// memory.
    blocks: BTreeMap<(PoolName, BlockId), Weak<OwnedFd>>,
    is_taken: bool,
}

impl Handover {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic happens under this lock")
    }

    /// Whether the sockets belong to another server now.
    pub(crate) fn is_taken(&self) -> bool {
        self.state().is_taken
    }

    /// The connection of the server that takes over, from when it has everything until it closes.
    pub(crate) fn taker(&self) -> Option<Arc<Peer>> {
        let state = self.state();
        state.is_taken.then(|| state.to.upgrade()).flatten()
    }

    /// Notes that one more loop handles messages only from the new server.
    pub(crate) fn note_quiet(&self) {
        self.quiet_loops.fetch_add(1, SeqCst);
    }

    /// Whether all loops have stopped changing anything.
    pub(crate) fn is_quiet(&self, loops: usize) -> bool {
        self.quiet_loops.load(SeqCst) >= loops
    }
}

/// Checks whether a client may take over the server, whatever token it has: only a process of this
/// user or of root may, whose program belongs to the owner of this one or to root. It gets writable
/// memory, also that of gated pools.
///
/// # Errors
/// `forbidden` if it may not.
pub(crate) fn check_asker(asker: &Peer) -> Result<(), Refusal> {
    let refuse = |message| Err(Refusal::new(Code::Forbidden, message));
    let Some(Socket::Unix(stream)) = &asker.socket else {
        return refuse("a server is taken over through its Unix socket");
    };
    let (pid, uid) = credentials(stream).unwrap_or((0, u32::MAX));
    if uid != rustix::process::geteuid().as_raw() {
        return refuse("only the server's user may take over");
    }
    let owners =
        program_owner(std::process::id()).zip(u32::try_from(pid).ok().and_then(program_owner));
    match owners {
        Some((own, theirs)) if is_fit(own, theirs) => Ok(()),
        _ => refuse("the program that takes over must belong to the owner of this one, or to root"),
    }
}

/// Whether a program of the owner `theirs` may replace one of `own`.
fn is_fit(own: u32, theirs: u32) -> bool {
    theirs == own || theirs == 0
}

/// The owner of the program file that a process runs; `None` for a process of another user or
/// outside of this PID namespace.
fn program_owner(pid: u32) -> Option<u32> {
    let program = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some(program.uid())
}

/// Hands the listening sockets and the shared blocks over to a new server, and starts to stop when
/// the new server reports that it has them all. If it dies before that, this server is unchanged.
/// `passed` are the paths of sockets that a service manager created.
pub(crate) fn hand_over(
    host: &mut IoHost,
    (listeners, passed): (&[Listener], &[PathBuf]),
    (to, id): (&Arc<Peer>, Option<&str>),
    step: Step,
) {
    let done = match step {
        Step::Give => offer(host, listeners, passed, to, id),
        Step::Taken => confirm(host, to, id),
    };
    if let Err(refusal) = done {
        tracing::warn!(reason = %refusal.message, "this server cannot hand over");
        let length = refusal.message.len() + 256;
        host.turn().send(to, Class::Control, length, |out| {
            encode::refusal(out, id, &refusal);
        });
    }
}

fn offer(
    host: &mut IoHost,
    listeners: &[Listener],
    passed: &[PathBuf],
    to: &Arc<Peer>,
    id: Option<&str>,
) -> Result<(), Refusal> {
    let shared = Arc::clone(&host.shared);
    if shared.core.context.is_draining() {
        let message = "this server is already stopping; start a new one when it has stopped";
        return Err(Refusal::new(Code::Draining, message));
    }
    let failed = |why: &str| Refusal::new(Code::Storage, format!("the sockets: {why}"));
    let (listed, descriptors) =
        sockets(listeners, passed).map_err(|error| failed(&error.to_string()))?;
    let blocks = shared.storage.blocks.shared();
    let reply = reply(&shared, &listed, blocks.len());
    let (count, length) = (descriptors.len(), reply.len() + 256);
    let sent = host
        .turn()
        .send_descriptors(to, Class::Control, length, descriptors, |out| {
            encode::reply_with(out, id.unwrap_or_default(), &reply, count);
        });
    if sent != Sent::Queued || !send_blocks(host, to, &blocks) {
        return Err(failed("they do not fit in the connection's outbox"));
    }
    let known = blocks
        .into_iter()
        .map(|(pool, block, fd)| ((pool, block), Arc::downgrade(&fd)));
    *shared.loops.handover.state() = State {
        to: Arc::downgrade(to),
        blocks: known.collect(),
        is_taken: false,
    };
    Ok(())
}

fn reply(shared: &ServerState, listed: &Value, blocks: usize) -> String {
    let drain_ms = u64::try_from(shared.settings().drain_timeout.as_millis()).unwrap_or(u64::MAX);
    let reply = json!({
        "pid": std::process::id(), "data_dir": shared.config.identity.data_dir, "listeners": listed,
        "blocks": blocks,
        "drain_timeout": drain_ms,
    });
    reply.to_string()
}

/// The listening sockets as the reply lists them, with a descriptor of each. Their addresses are in
/// the sockets themselves.
fn sockets(listeners: &[Listener], passed: &[PathBuf]) -> io::Result<(Value, Vec<Arc<OwnedFd>>)> {
    if listeners.len() > DESCRIPTORS_MAX {
        let text = format!(
            "more than {DESCRIPTORS_MAX} sockets cannot be handed over; stop this \
            server instead"
        );
        return Err(io::Error::other(text));
    }
    let mut listed = Vec::new();
    let mut descriptors = Vec::new();
    for listener in listeners {
        let (what, fd) = match listener {
            Listener::Tcp(tcp) => (json!({"kind": "tcp"}), tcp.as_fd()),
            Listener::Unix(unix) => {
                let address = unix.local_addr()?;
                let path = address.as_pathname();
                let is_passed = path.is_some_and(|path| passed.iter().any(|known| known == path));
                (json!({"kind": "unix", "passed": is_passed}), unix.as_fd())
            }
        };
        listed.push(what);
        descriptors.push(Arc::new(fd.try_clone_to_owned()?));
    }
    Ok((Value::Array(listed), descriptors))
}

/// Whether all of them were sent.
fn send_blocks(host: &mut IoHost, to: &Arc<Peer>, blocks: &[Block]) -> bool {
    blocks.chunks(BLOCKS_AT_ONCE).all(|some| {
        let listed: Vec<_> = some
            .iter()
            .map(|(pool, block, _)| json!({"pool": pool, "block_id": block}))
            .collect();
        let message = json!({
            "action": "event", "event": "handed_over", "descriptors": some.len(), "blocks": listed,
        });
        let message = message.to_string();
        let descriptors = some.iter().map(|(.., fd)| Arc::clone(fd)).collect();
        let sent =
            host.turn()
                .send_descriptors(to, Class::Control, message.len(), descriptors, |out| {
                    encode::message(out, &message);
                });
        sent == Sent::Queued
    })
}

fn confirm(host: &mut IoHost, by: &Arc<Peer>, id: Option<&str>) -> Result<(), Refusal> {
    let shared = Arc::clone(&host.shared);
    let is_given = {
        let state = shared.loops.handover.state();
        let is_it = state.to.upgrade().is_some_and(|to| Arc::ptr_eq(&to, by));
        is_it && !state.is_taken
    };
    let refusal = |message: &'static str| Err(Refusal::new(Code::Draining, message));
    if !is_given {
        return refusal("nothing was handed over to this connection, or another one asked since");
    }
    if by.has_hung_up() {
        // The new server died after it reported that it has everything, so no server would be left.
        *shared.loops.handover.state() = State::default();
        return refusal("the server that asked to take over has ended");
    }
    // Before the drain: its connection may be another loop's, which would close it among the first.
    shared.loops.handover.state().is_taken = true;
    // Not if a stop was requested in between.
    if !shared.drain() {
        shared.loops.handover.state().is_taken = false;
        return refusal("this server is already stopping; start a new one when it has stopped");
    }
    tracing::info!("handing over to another server");
    if let Some(id) = id {
        host.turn().send(by, Class::Control, 256, |out| {
            encode::reply(out, id, "{\"draining\":true}");
        });
    }
    Ok(())
}

/// Hands over the blocks that were created since, or have different memory. Nothing changes any
/// more.
pub(crate) fn send_rest(host: &mut IoHost, to: &Arc<Peer>) {
    let shared = Arc::clone(&host.shared);
    // The new server has the same memory, and may write it as soon as it has everything.
    shared.storage.blocks.end_writes();
    let mut blocks = shared.storage.blocks.shared();
    let given = std::mem::take(&mut shared.loops.handover.state().blocks);
    blocks.retain(|(pool, block, fd)| {
        let known = given.get(&(pool.clone(), block.clone()));
        known.is_none_or(|known| !Weak::ptr_eq(known, &Arc::downgrade(fd)))
    });
    if !send_blocks(host, to, &blocks) {
        tracing::warn!(
            blocks = blocks.len(),
            "cannot hand over the most recent blocks"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_path_that_is_not_utf8_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(OsStr::from_bytes(b"\xff.sock"));
        let ours = Listener::Unix(UnixListener::bind(&path).unwrap());
        let passed = dir.path().join("passed");
        let theirs = Listener::Unix(UnixListener::bind(&passed).unwrap());
        let (listed, descriptors) = sockets(&[ours, theirs], &[passed]).unwrap();
        let expected = json!([
            {"kind": "unix", "passed": false}, {"kind": "unix", "passed": true},
        ]);
        assert_eq!((listed, descriptors.len()), (expected, 2));
    }

    #[test]
    fn a_new_handover_is_not_taken() {
        let handover = Handover::default();
        assert!(!handover.is_taken() && handover.taker().is_none());
        assert!(handover.is_quiet(0) && !handover.is_quiet(1));
        handover.note_quiet();
        assert!(handover.is_quiet(1) && !handover.is_quiet(2));
    }

    #[test]
    fn a_program_of_another_owner_does_not_take_over() {
        assert!(is_fit(1000, 1000) && is_fit(1000, 0) && is_fit(0, 0));
        assert!(!is_fit(1000, 1001) && !is_fit(0, 1000));
        // What runs this test is a file with an owner, and no process has the id 0.
        let program = std::env::current_exe().expect("it has a file");
        let owner = std::fs::metadata(program).expect("it exists").uid();
        assert_eq!(program_owner(std::process::id()), Some(owner));
        assert_eq!(program_owner(0), None);
    }
}
