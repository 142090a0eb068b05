//! What outlives a connection: parked calls, the answers that wait for their callers, and the calls
//! with an idempotency key. They end each other, and are answered to the members.

use super::PoolInfo;
use super::calls::Calls;
use super::members::Members;
use super::park::{ParkedCalls, ParkedCounts};
use super::repeats::Repeats;
use crate::driver::Driver;
use crate::now::Time;

/// What a rotation to the next epoch ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Purged {
    /// Calls that waited for their handlers.
    pub parked: usize,
    /// Answers that waited for their callers.
    pub answers: usize,
    /// Answers stored for repeats.
    pub repeats: usize,
}

/// The parked calls and the repeats of a pool, with those to whom they are answered.
pub struct DurableCalls<'a, D: Driver> {
    pub(super) parked: &'a mut ParkedCalls,
    pub(super) repeats: &'a mut Repeats,
    pub(super) members: &'a Members<D>,
    pub(super) calls: &'a Calls,
    pub(super) info: &'a PoolInfo,
}

impl<D: Driver> DurableCalls<'_, D> {
    /// Counters of the parked calls and answers.
    #[must_use]
    pub fn counts(&self) -> ParkedCounts {
        self.parked.counts()
    }

    /// When the oldest answer stored for repeats expires.
    pub(crate) fn oldest_repeat(&self) -> Option<Time> {
        self.repeats.oldest()
    }

    pub(crate) fn forget_oldest_repeat(&mut self) {
        self.repeats.forget_oldest();
    }
}
