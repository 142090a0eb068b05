//! Clients that wait for the store, and the order in which they are answered.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use latzero_protocol::{Code, PoolName, Refusal};
use latzero_store::{StoreError, Ticket};

use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;

/// A change that the store has not answered yet.
enum PendingReply {
    Connection {
        peer: Arc<Peer>,
        /// Changes of the same connection that the store refused at once: their replies follow
        /// this one.
        behind: Vec<Refusal>,
    },
    /// The answer with this number, of this pool.
    Answer(PoolName, u64),
}

/// A reply for a connection, or for a pool.
pub(super) enum StoreReply {
    Connection(Arc<Peer>, Result<(), Refusal>),
    Answer(PoolName, u64, bool),
}

impl StoreReply {
    /// The loop that delivers it, of `count` loops, and the command for it.
    fn command(self, count: usize) -> (usize, Command) {
        match self {
            StoreReply::Connection(peer, result) => (peer.home, Command::StoreReply(peer, result)),
            StoreReply::Answer(pool, number, is_on_disk) => {
                let home = (number % count as u64) as usize;
                (home, Command::AnswerStored(pool, number, is_on_disk))
            }
        }
    }
}

/// The replies that wait for the store. Each connection gets its replies in order.
#[derive(Default)]
pub(super) struct Line(HashMap<Ticket, PendingReply>);

impl Line {
    pub(super) fn promise(&mut self, ticket: Ticket, peer: &Arc<Peer>) -> Option<Ticket> {
        let promised = PendingReply::Connection {
            peer: Arc::clone(peer),
            behind: Vec::new(),
        };
        self.0.insert(ticket, promised);
        Some(peer.last_promise.swap(ticket, Relaxed)).filter(|&before| before != 0)
    }

    pub(super) fn await_answer(&mut self, ticket: Ticket, (pool, number): (PoolName, u64)) {
        self.0.insert(ticket, PendingReply::Answer(pool, number));
    }

    /// The store refused the change; `before` is the one before it of the same connection.
    pub(super) fn refused(
        &mut self,
        (ticket, before): (Ticket, Option<Ticket>),
        refusal: Refusal,
    ) -> Option<StoreReply> {
        let peer = match self.0.remove(&ticket)? {
            PendingReply::Answer(pool, number) => {
                return Some(StoreReply::Answer(pool, number, false));
            }
            PendingReply::Connection { peer, .. } => peer,
        };
        peer.last_promise.store(before.unwrap_or(0), Relaxed);
        match before.and_then(|before| self.0.get_mut(&before)) {
            Some(PendingReply::Connection { behind, .. }) => {
                behind.push(refusal);
                None
            }
            _ => Some(StoreReply::Connection(peer, Err(refusal))),
        }
    }

    fn done(&mut self, ticket: Ticket, result: Result<(), Refusal>, words: &mut Vec<StoreReply>) {
        match self.0.remove(&ticket) {
            Some(PendingReply::Connection { peer, behind }) => {
                words.push(StoreReply::Connection(Arc::clone(&peer), result));
                let behind = behind
                    .into_iter()
                    .map(|refusal| StoreReply::Connection(Arc::clone(&peer), Err(refusal)));
                words.extend(behind);
            }
            Some(PendingReply::Answer(pool, number)) => {
                words.push(StoreReply::Answer(pool, number, result.is_ok()));
            }
            None => {}
        }
    }
}

/// The pending replies, and their receivers.
#[derive(Default)]
pub(super) struct PendingReplies {
    line: Mutex<Line>,
    pub(super) shared: OnceLock<Weak<ServerState>>,
}

impl PendingReplies {
    pub(super) fn line(&self) -> MutexGuard<'_, Line> {
        self.line
            .lock()
            .expect("no thread panics while holding this lock")
    }

    /// Sends the loops the results of changes, each loop once.
    pub(super) fn done(&self, done: &mut Vec<(Ticket, Result<(), StoreError>)>) {
        let mut words = Vec::with_capacity(done.len());
        let mut line = self.line();
        for (ticket, result) in done.drain(..) {
            let result = result.map_err(|error| Refusal::new(Code::Storage, error.to_string()));
            line.done(ticket, result, &mut words);
        }
        self.reply(&line, words);
    }

    /// Under the lock, so that no later reply overtakes these.
    pub(super) fn reply(&self, _line: &Line, words: Vec<StoreReply>) {
        let Some(shared) = self.shared.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut commands_by_loop: Vec<Vec<Command>> = Vec::new();
        commands_by_loop.resize_with(shared.loops.mailboxes.len(), Vec::new);
        for word in words {
            let (home, command) = word.command(commands_by_loop.len());
            commands_by_loop[home].push(command);
        }
        for (mailbox, commands) in shared.loops.mailboxes.iter().zip(commands_by_loop) {
            mailbox.send_all(commands);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal() -> Refusal {
        Refusal::new(Code::Storage, "full")
    }

    /// Whether the reply says that all went well, if it is for this connection.
    fn of_connection(reply: &StoreReply, wanted: &Arc<Peer>) -> Option<bool> {
        match reply {
            StoreReply::Connection(peer, result) if Arc::ptr_eq(peer, wanted) => {
                Some(result.is_ok())
            }
            _ => None,
        }
    }

    #[test]
    fn acknowledgements_come_in_the_order_of_the_changes() {
        let mut line = Line::default();
        let ledger = latzero_fabric::ledger::Ledger::new(&latzero_fabric::Limits::default());
        let peer = || Peer::new(0, None, ledger.connection(&ledger.user(true)));
        let (a, b) = (peer(), peer());
        let mut words = Vec::new();
        // No reply precedes it, so it is sent at once.
        let before = line.promise(1, &a);
        let word = line.refused((1, before), refusal()).unwrap();
        assert_eq!(of_connection(&word, &a), Some(false));
        // Its reply waits behind changes that are still being written, and so do later ones.
        assert_eq!(line.promise(2, &a), None);
        assert_eq!(line.promise(3, &b), None);
        for ticket in [4, 5] {
            let before = line.promise(ticket, &a);
            assert_eq!(before, Some(2));
            assert!(line.refused((ticket, before), refusal()).is_none());
        }
        assert_eq!(line.promise(6, &a), Some(2));
        line.done(3, Ok(()), &mut words);
        assert!(words.len() == 1 && of_connection(&words[0], &b).is_some());
        words.clear();
        line.done(2, Ok(()), &mut words);
        line.done(6, Ok(()), &mut words);
        let results: Vec<_> = words.iter().map(|word| of_connection(word, &a)).collect();
        assert_eq!(results, [true, false, false, true].map(Some));
        // Replies that were already sent delay nothing.
        let before = line.promise(7, &a);
        assert_eq!(before, Some(6));
        assert!(line.refused((7, before), refusal()).is_some());
        assert!(line.0.is_empty());
    }
}
