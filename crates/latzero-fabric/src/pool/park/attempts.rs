//! The failed attempts of parked calls: each pauses, or is dead.
//!
//! A parked call pauses after each failed attempt, [`PAUSE_MS`] at first and four times as long
//! each time. It is then queued behind the calls that were parked in the meantime, so that a call
//! that kills its handlers does not delay others. After its last attempt it is dead. Its caller is
//! notified, and the call stays stored for [`crate::limits::Limits::dead_ttl_ms`], so that an
//! operator can inspect it and run it again.

use latzero_protocol::Refusal;

use super::super::durable::DurableCalls;
use super::answers::AnswerReceiver;
use super::durable::DurableCall;
use super::{Death, Parked, ParkedCalls, State, StoreChange};
use crate::driver::Driver;
use crate::now::Time;
use crate::refusals;
use crate::turn::Turn;

/// How long a call pauses after its first failed attempt, in milliseconds.
pub(super) const PAUSE_MS: u64 = 100;

/// The longest pause, in milliseconds.
const PAUSE_MAX_MS: u64 = 60_000;

/// How long a call pauses after this many failed attempts, in milliseconds.
fn pause_ms(failed: u32) -> u64 {
    let times = 4_u64.saturating_pow(failed.saturating_sub(1));
    PAUSE_MS.saturating_mul(times).min(PAUSE_MAX_MS)
}

impl ParkedCalls {
    /// The server stops while a handler has a parked call: the call stays stored as it is.
    pub(in crate::pool) fn interrupted(
        &mut self,
        number: u64,
        mut durable: Box<DurableCall>,
        now: Time,
    ) {
        durable.number = Some(number);
        (durable.window, durable.held) = (None, None);
        let until = now.after_ms(PAUSE_MAX_MS);
        self.change(number, |parked| {
            parked.state = State::Paused(durable, until);
        });
    }
}

impl<D: Driver> DurableCalls<'_, D> {
    /// A parked call's attempt failed: it pauses, or is dead.
    pub(super) fn attempt_failed(
        &mut self,
        number: u64,
        mut durable: Box<DurableCall>,
        cause: &str,
        turn: &mut Turn<'_, D>,
    ) {
        durable.number = Some(number);
        (durable.window, durable.held) = (None, None);
        // Queued behind everything that is parked now.
        let (now, rank) = (turn.time(), self.parked.newest.saturating_add(1));
        let is_last = self.parked.change(number, |parked| {
            parked.cause = Some(cause.into());
            parked.rank = rank;
            let until = now.after_ms(pause_ms(parked.attempt));
            parked.state = State::Paused(durable, until);
            parked.is_last_attempt()
        });
        if is_last == Some(true) {
            self.die(number, turn);
        }
    }

    /// The last attempt of a parked call failed: notifies its caller, and keeps the dead call.
    fn die(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        let (now, steady_ms) = (turn.time(), turn.steady_ms());
        let ttl_ms = self.info.limits.dead_ttl_ms;
        let Some(mut parked) = self.parked.remove(number) else {
            return;
        };
        let refusal = exhausted(parked.attempt, parked.cause.as_deref().unwrap_or_default());
        if let Some(key) = parked.idempotency_key.take() {
            self.repeats_dropped(&parked.caller, &key, turn);
        }
        parked.deadline = now.after_ms(ttl_ms);
        parked.expires_ms = steady_ms.saturating_add(ttl_ms);
        let durable = parked.dequeue().expect("it was paused");
        let row = crate::rows::CallRow {
            death: Some(Death {
                at: steady_ms,
                cause: parked.cause.as_deref().unwrap_or_default().into(),
            }),
            ..parked.row(number, &self.info.name, &durable)
        };
        parked.state = State::Dead(durable);
        turn.store(StoreChange::Call(Box::new(row)), None);
        let whom = AnswerReceiver {
            process: parked.process.as_str().into(),
            caller: parked.caller.clone(),
            from: parked.from,
            id: parked.id.clone(),
        };
        let held = parked.held.small();
        self.parked.insert(number, parked);
        if !whom.id.is_empty() {
            turn.count_held(&self.info.name, self.info.number, 1);
            let answer = super::Answered::refused(&refusal);
            let number = turn.next_number();
            self.parked
                .answers
                .keep(number, whom, None, (answer, held), self.info, turn);
            self.parked
                .answers
                .write_awaited(number, &self.info.name, turn);
        }
        while self.parked.dead.len() > self.info.limits.dead_max {
            let (_, oldest) = *self.parked.dead.first().expect("there are too many");
            self.bury(oldest, turn);
        }
    }

    /// Forgets a dead call.
    pub(super) fn bury(&mut self, number: u64, turn: &mut Turn<'_, D>) {
        if self.parked.forget(number, self.info, turn).is_some() {
            turn.store(StoreChange::EndCall(number), None);
        }
    }

    /// Runs a dead call again, as a new call without a caller: the caller was told that it failed.
    /// False if there is no such dead call.
    pub fn retry_parked(&mut self, number: u64, ttl_ms: u64, turn: &mut Turn<'_, D>) -> bool {
        let parked = self.parked.calls.get(&number);
        if !parked.is_some_and(Parked::is_dead) {
            return false;
        }
        let Some(mut parked) = self.parked.remove(number) else {
            return false;
        };
        let mut durable = parked.dequeue().expect("it was stopped");
        parked.deadline = turn.time().after_ms(ttl_ms);
        parked.parked_ms = turn.steady_ms();
        parked.expires_ms = parked.parked_ms.saturating_add(ttl_ms);
        (parked.attempt, parked.cause, parked.id) = (0, None, "".into());
        (durable.attempt, durable.deadline) = (0, parked.deadline);
        parked.rank = self.parked.newest.saturating_add(1);
        let row = parked.row(number, &self.info.name, &durable);
        turn.store(StoreChange::Call(Box::new(row)), None);
        parked.state = State::Waiting(durable);
        let process = parked.process.clone();
        self.parked.insert(number, parked);
        self.parked.note_room(&process);
        true
    }

    /// Resumes calls whose pause is over.
    pub(super) fn end_pauses(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        while *budget > 0
            && let Some(&(_, number)) = self.parked.pauses.first().filter(|pause| pause.0 <= now)
        {
            *budget -= 1;
            // A call of an earlier run, which ended during the last attempt.
            if self
                .parked
                .calls
                .get(&number)
                .is_some_and(Parked::is_last_attempt)
            {
                self.die(number, turn);
                continue;
            }
            let process = self.parked.change(number, |parked| {
                parked.state = State::Waiting(parked.dequeue().expect("the program paused"));
                parked.process.clone()
            });
            if let Some(process) = process {
                self.parked.note_room(&process);
            }
        }
    }

    /// A durable call ended without an answer: ends its repeats too.
    pub(in crate::pool) fn drop_repeats_of(
        &mut self,
        durable: &DurableCall,
        turn: &mut Turn<'_, D>,
    ) {
        if let Some(key) = &durable.idempotency_key {
            self.repeats_dropped(&durable.caller, key, turn);
        }
    }
}

pub(super) fn exhausted(attempts: u32, cause: &str) -> Refusal {
    let times = if attempts == 1 { "attempt" } else { "attempts" };
    refusals::attempts_exhausted(format_args!("{attempts} {times}"), cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_minute() {
        let pauses: Vec<u64> = (1..8).map(pause_ms).collect();
        assert_eq!(
            pauses,
            [100, 400, 1600, 6400, 25_600, PAUSE_MAX_MS, PAUSE_MAX_MS]
        );
        assert_eq!(pause_ms(u32::MAX), PAUSE_MAX_MS);
    }
}
