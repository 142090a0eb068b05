//! Commands to an event loop from other threads.

use std::sync::{Arc, Mutex, OnceLock};

use latzero_protocol::{PoolName, Refusal};
use mio::Waker;

use crate::blocks::JobResult;
use crate::handover::Step;
use crate::listener::Origin;
use crate::peer::Peer;

/// A command for a loop.
pub(crate) enum Command {
    /// Take a connection, which belongs to this loop from now on.
    Adopt(Arc<Peer>, Origin),
    /// Read a connection again.
    Resume(Arc<Peer>),
    /// Close a connection once its outbox is written.
    Close(Arc<Peer>),
    /// Watch a connection whose socket accepted less than it was offered.
    AwaitWritable(Arc<Peer>),
    /// Check what has changed: draining, deadlines.
    Look,
    /// Check every connection's timeouts and limits, which changed or were reached.
    Judge,
    /// Hand the sockets and blocks over to a client, as the reply with this id, and stop.
    HandOver(Arc<Peer>, Option<Box<str>>, Step),
    /// Send the reply to a slow request.
    Reply(Arc<Peer>, Box<str>, Result<String, Refusal>),
    /// A connection's change is on disk, or cannot be stored.
    StoreReply(Arc<Peer>, Result<(), Refusal>),
    /// The result of checking a connection's proof, or why it was not checked.
    Verified(Arc<Peer>, Result<bool, Refusal>),
    /// The awaited row of a pool's answer is on disk (true), or cannot be stored.
    AnswerStored(PoolName, u64, bool),
    /// A job for a block is finished.
    BlockDone(JobResult),
    /// Notify the service manager that the loop is alive (sd_notify(3), `WATCHDOG=1`).
    Watchdog,
}

/// How other threads reach a loop.
pub(crate) struct Mailbox {
    commands: Mutex<Vec<Command>>,
    waker: OnceLock<Waker>,
}

impl Mailbox {
    pub(crate) fn new() -> Self {
        Mailbox {
            commands: Mutex::new(Vec::new()),
            waker: OnceLock::new(),
        }
    }

    pub(crate) fn attach(&self, waker: Waker) {
        assert!(self.waker.set(waker).is_ok(), "a loop attaches once");
    }

    pub(crate) fn send(&self, command: Command) {
        self.commands
            .lock()
            .expect("no panic happens under the mailbox lock")
            .push(command);
        if let Some(waker) = self.waker.get()
            && let Err(error) = waker.wake()
        {
            tracing::error!(%error, "cannot wake an event loop");
        }
    }

    /// Sends several commands, and wakes the loop once.
    pub(crate) fn send_all(&self, mut several: Vec<Command>) {
        let Some(last) = several.pop() else {
            return;
        };
        let mut commands = self
            .commands
            .lock()
            .expect("no panic happens under the mailbox lock");
        commands.append(&mut several);
        drop(commands);
        self.send(last);
    }

    pub(crate) fn take(&self) -> Vec<Command> {
        std::mem::take(
            &mut *self
                .commands
                .lock()
                .expect("no panic happens under the mailbox lock"),
        )
    }
}
