//! What the core keeps of one connection: its outbox, and the calls that it has under way.

use crate::driver::Driver;
use crate::outbox::Outbox;

/// Whoever wants to know that a message was written: a number for [`crate::Pool::told`] of that pool.
#[derive(Debug, Clone)]
pub struct Notice<H> {
    /// The pool.
    pub pool: H,
    /// The number.
    pub number: u64,
}

/// One connection, as the core sees it.
pub struct Link<D: Driver> {
    /// What waits to be written.
    pub outbox: Outbox<D::Fd, Notice<D::Pool>>,
    /// Calls it made that are under way.
    in_flight: u32,
    /// Calls it serves that are under way.
    owed: u32,
    /// Its driver stopped reading, because of its calls under way.
    is_paused: bool,
}

impl<D: Driver> Default for Link<D> {
    fn default() -> Self {
        Link {
            outbox: Outbox::default(),
            in_flight: 0,
            owed: 0,
            is_paused: false,
        }
    }
}

impl<D: Driver> Link<D> {
    /// Calls it made that are under way.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether its driver stopped reading.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Reads on, whatever is under way: the connection ends.
    pub fn resume(&mut self) {
        self.is_paused = false;
    }

    /// Whether its driver is to leave further messages unread, since it has all the calls under way that it may have. One
    /// that owes answers is read on: its answers may be what its own calls wait for. [`crate::Effects::resumed`] says when it
    /// is read again.
    pub fn pause(&mut self, in_flight_max: u32) -> bool {
        self.is_paused = self.must_pause(in_flight_max);
        self.is_paused
    }

    fn must_pause(&self, in_flight_max: u32) -> bool {
        self.in_flight >= in_flight_max && self.owed == 0
    }

    pub(crate) fn change_in_flight(&mut self, by: i32) {
        self.in_flight = self
            .in_flight
            .checked_add_signed(by)
            .expect("a call ends once, after it began");
    }

    pub(crate) fn change_owed(&mut self, by: i32) {
        self.owed = self
            .owed
            .checked_add_signed(by)
            .expect("a call ends once, after it began");
    }

    /// Whether it was paused and may be read again.
    pub(crate) fn try_resume(&mut self, in_flight_max: u32) -> bool {
        let may = self.is_paused && !self.must_pause(in_flight_max);
        self.is_paused &= !may;
        may
    }
}
