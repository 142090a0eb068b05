//! Moves an encrypted pool to its next epoch: ends calls and drops answers sealed for the last one.

use super::Pool;
use crate::driver::Driver;
use crate::turn::Turn;

/// What a rotation ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Purged {
    /// Calls that waited for their handlers.
    pub parked: usize,
    /// Answers that waited for their callers.
    pub answers: usize,
    /// Answers stored for repeats.
    pub repeats: usize,
}

impl<D: Driver> Pool<D> {
    /// Ends waiting calls and stored answers: nobody in the new epoch can open them.
    pub fn purge(&mut self, turn: &mut Turn<'_, D>) -> Purged {
        let counts = self.parked.counts();
        self.drop_orphans(turn);
        self.close_parked(turn);
        let mut repeats = 0;
        while self.repeats.forget_oldest() {
            repeats += 1;
        }
        Purged {
            parked: counts.waiting + counts.running + counts.dead,
            answers: counts.answered,
            repeats,
        }
    }
}
