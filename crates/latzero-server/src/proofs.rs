//! Threads that check proofs: signatures take a hundred times as long as a message.
//!
//! Users take turns, one proof at a time: a crowd of one user's proofs delays another user's by one
//! proof. Whoever had too many refused while theirs waited gets `overloaded`, unlooked at.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, available_parallelism};

use latzero_fabric::driver::Check;
use latzero_protocol::{Code, Refusal};

use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::{Socket, User};
use crate::turns::Turns;

/// Proofs of one user that wait. A connection has one at a time.
const OF_USER_MAX: usize = 1024;

/// Proofs of all users that wait, but for those of the server's own user.
const OF_ALL_MAX: usize = 4096;

/// A proof to check, and who is told.
struct Job {
    shared: Arc<ServerState>,
    peer: Arc<Peer>,
    user: User,
    check: Check,
    /// Whether it counts among its user's attempts.
    is_guess: bool,
}

impl Job {
    fn run(self) {
        let Job {
            shared,
            peer,
            user,
            check,
            is_guess,
        } = self;
        let now = shared.clock.now();
        let may = !is_guess || shared.attempts().may(user, now);
        let verdict = may.then(check).ok_or_else(Refusal::too_many_refused);
        if is_guess && verdict == Ok(false) {
            shared.attempts().note(user, now);
        }
        shared.loops.mailboxes[peer.home].send(Command::Verified(peer, verdict));
    }
}

/// What waits, within its bounds.
struct Waiting<T> {
    turns: Turns<T>,
    /// Those that do not belong to the server's own user.
    of_others: usize,
    is_closed: bool,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Waiting {
            turns: Turns::default(),
            of_others: 0,
            is_closed: false,
        }
    }
}

impl<T> Waiting<T> {
    /// Queues something of a user; false if there is no room.
    fn push(&mut self, user: User, what: T) -> bool {
        let is_other = !user.is_trusted();
        let is_full = is_other && self.of_others >= OF_ALL_MAX;
        if is_full || self.turns.len_of(user) >= OF_USER_MAX {
            return false;
        }
        self.turns.push(user, what);
        self.of_others += usize::from(is_other);
        true
    }

    /// The next one of the user whose turn it is.
    fn pop(&mut self) -> Option<T> {
        let (user, next) = self.turns.pop()?;
        self.of_others -= usize::from(!user.is_trusted());
        Some(next)
    }
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting<Job>>,
    changed: Condvar,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting<Job>> {
        self.waiting
            .lock()
            .expect("no thread panics while holding this lock")
    }

    /// The next proof; `None` once the queue is closed.
    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting();
        loop {
            if waiting.is_closed {
                return None;
            }
            if let Some(job) = waiting.pop() {
                return Some(job);
            }
            waiting = self
                .changed
                .wait(waiting)
                .expect("no thread panics while holding this lock");
        }
    }
}

/// The threads, and what waits for them.
pub(crate) struct Verifier {
    queue: Arc<Queue>,
}

impl Verifier {
    /// Starts a thread for each four processors, and at least one.
    ///
    /// # Errors
    /// If a thread can't be started.
    pub(crate) fn new() -> io::Result<Verifier> {
        let verifier = Verifier {
            queue: Arc::default(),
        };
        let processors = available_parallelism().map_or(1, usize::from);
        for _ in 0..(processors / 4).max(1) {
            let queue = Arc::clone(&verifier.queue);
            Builder::new().name("proofs".into()).spawn(move || {
                while let Some(job) = queue.next() {
                    job.run();
                }
            })?;
        }
        Ok(verifier)
    }

    /// Queues the check of a connection's proof; its loop is told the verdict.
    ///
    /// # Errors
    /// `overloaded`, if too many wait.
    pub(crate) fn pass_on(
        &self,
        shared: &Arc<ServerState>,
        peer: &Arc<Peer>,
        check: Check,
        is_guess: bool,
    ) -> Result<(), Refusal> {
        let user = peer.socket.as_ref().map_or(User::Unknown, Socket::user);
        let job = Job {
            shared: Arc::clone(shared),
            peer: Arc::clone(peer),
            user,
            check,
            is_guess,
        };
        if !self.queue.waiting().push(user, job) {
            let message = "too many proofs wait to be checked; try again";
            return Err(Refusal::new(Code::Overloaded, message));
        }
        self.queue.changed.notify_one();
        Ok(())
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.queue.waiting().is_closed = true;
        self.queue.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(n: u32) -> User {
        // Neither root nor the user of the tests.
        let own = rustix::process::geteuid().as_raw();
        User::Uid((own.max(1) + 1).wrapping_add(n))
    }

    #[test]
    fn waiting_proofs_are_bounded_and_leave_room_for_the_own_user() {
        let mut waiting = Waiting::default();
        for n in 0..OF_USER_MAX {
            assert!(waiting.push(other(0), n));
        }
        assert!(!waiting.push(other(0), 0), "of one user");
        for user in 1..4 {
            for n in 0..OF_USER_MAX {
                assert!(waiting.push(other(user), n));
            }
        }
        assert!(!waiting.push(other(4), 0), "of all");
        let own = User::Uid(rustix::process::geteuid().as_raw());
        assert!(waiting.push(own, 0));
        waiting.pop();
        assert!(waiting.push(other(4), 0), "there is room again");
    }
}
