//! The core's state of one connection: its outbox and its counters.

use std::sync::Arc;

use crate::driver::Driver;
use crate::ledger::{Account, Ledger, Reservation, Resource};
use crate::now::Time;
use crate::outbox::{Bounds, Class, Outbox, PendingWrite, Sent};

/// A request to report that a message was written: a number for
/// [`crate::DurableCalls::answer_delivered`] of that pool.
#[derive(Debug, Clone)]
pub struct Notice<H> {
    /// The pool.
    pub pool: H,
    /// The number.
    pub number: u64,
}

/// One connection, as the core sees it.
pub struct Link<D: Driver> {
    /// The messages that wait to be written.
    pub outbox: Outbox<D::Fd, Notice<D::Pool>>,
    /// The account of the connection.
    account: Arc<Account>,
    /// Messages that wait while the socket accepts no data.
    held: Reservation,
    /// The driver writes later what waits.
    is_deferred: bool,
    /// When its socket last accepted data, or stopped accepting it.
    progress: Time,
}

/// From this many bytes on, a message is counted before it is copied. What is smaller is counted
/// where it can't be written at once.
const LARGE_BYTES: usize = 64 * 1024;

impl<D: Driver> Link<D> {
    /// A connection without calls in flight.
    #[must_use]
    pub fn new(account: Arc<Account>) -> Self {
        Link {
            outbox: Outbox::default(),
            held: account.hold(Resource::Outbox),
            is_deferred: false,
            account,
            progress: Time::default(),
        }
    }

    /// Bytes that are counted of what waits to be written.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.held.amount()
    }

    /// The account of the connection.
    #[must_use]
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Counts what is held from now on in another account: the app behind the connection is known.
    pub(crate) fn set_account(&mut self, account: Arc<Account>) {
        let mut held = account.hold(Resource::Outbox);
        held.force(self.held.amount());
        self.held = held;
        self.account = account;
    }

    /// Whether there is room for a message of `length` bytes, of which no other outbox holds `own`.
    /// New work is refused when memory is short; messages that end work may use the rest.
    #[inline]
    pub(crate) fn admit(
        &mut self,
        class: Class,
        (length, own): (usize, usize),
        bounds: Bounds,
        ledger: &Ledger,
    ) -> Sent {
        let sent = self.outbox.admit(class, length, bounds);
        if sent != Sent::Queued {
            return sent;
        }
        if !self.outbox.is_blocked() && !self.is_deferred && own < LARGE_BYTES {
            // It is about to be written, and is counted if that fails. A client whose own account
            // is full gets no new work; if the server is full, others have caused it.
            let has_room =
                class == Class::Control || self.account.has_own_room(Resource::Outbox, own as u64);
            return match has_room {
                true => Sent::Queued,
                false => self.outbox.refuse(class),
            };
        }
        let amount = (self.outbox.own() + own) as u64;
        let has_room = match class {
            _ if own < LARGE_BYTES && ledger.is_modest(&self.account) => {
                self.held.force(amount);
                true
            }
            Class::Control => self.held.resize(amount).is_ok(),
            // What answers leave free is for the short errors that replace answers: a connection
            // without room for these is closed.
            Class::Reply => {
                let more = amount.saturating_sub(self.held.amount());
                let room = more + ledger.kept_for_errors();
                self.account.has_own_room(Resource::Outbox, room)
                    && self.held.resize(amount).is_ok()
            }
            Class::Call | Class::Emit | Class::Event => {
                !ledger.is_short() && self.held.resize(amount).is_ok()
            }
        };
        if has_room {
            Sent::Queued
        } else {
            self.outbox.refuse(class)
        }
    }

    /// The driver has no time to write what waits, which is counted until it does.
    pub fn defer(&mut self) {
        self.is_deferred = true;
        self.held.force(self.outbox.own() as u64);
    }

    /// Puts back what a writer did not write, and counts it. Returns a buffer to reuse.
    pub fn put_back(
        &mut self,
        now: Time,
        taken: PendingWrite<D::Fd>,
        written: usize,
    ) -> Option<Vec<u8>> {
        let was_blocked = self.outbox.is_blocked();
        self.is_deferred = false;
        let spare = self.outbox.put_back(taken);
        let is_blocked = self.outbox.is_blocked();
        self.held.force(if is_blocked {
            self.outbox.own() as u64
        } else {
            0
        });
        if written > 0 || !was_blocked {
            self.progress = now;
        }
        spare
    }

    /// Accepts nothing more, and drops what waits.
    pub fn close(&mut self) {
        self.outbox.close();
        self.held.force(0);
    }

    /// How many outgoing bytes it holds, and when data last moved.
    #[must_use]
    pub fn holding(&self) -> (u64, Time) {
        (self.outbox.queued() as u64, self.progress)
    }

    /// Since when its socket has accepted no data although some is waiting.
    #[must_use]
    pub fn stalled_since(&self) -> Option<Time> {
        self.outbox.is_blocked().then_some(self.progress)
    }
}
