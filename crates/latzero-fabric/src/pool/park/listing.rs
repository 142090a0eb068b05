//! Listing and changing parked calls.

use latzero_protocol::limits::FIELD_DEPTH_MAX;
use latzero_protocol::parked::{ParkedChange, ParkedFilter, ParkedState};
use latzero_protocol::{AppId, Body, scan};
use serde_json::{Value, json};

use super::super::Pool;
use super::super::durable::DurableCalls;
use super::{Parked, ParkedCalls, State};
use crate::driver::Driver;
use crate::now::Now;
use crate::turn::Turn;

/// How many bytes of a payload are shown.
const SHOWN_BYTES_MAX: usize = 64 * 1024;

/// Counters of the parked calls of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ParkedCounts {
    /// Calls that wait for a handler, or for the answer of the call that they repeat.
    pub waiting: usize,
    /// Calls whose last attempt failed, until they are offered again.
    pub paused: usize,
    /// Calls that a handler has.
    pub running: usize,
    /// Calls whose attempts all failed.
    pub dead: usize,
    /// Answers that wait for their callers.
    pub answered: usize,
    /// When the oldest call that is not dead was parked, in milliseconds on the steady clock
    /// ([`Now::unix_ms_of`]).
    pub oldest: Option<u64>,
}

impl ParkedCounts {
    /// All calls, and all answers.
    #[must_use]
    pub fn total(&self) -> usize {
        self.waiting + self.paused + self.running + self.dead + self.answered
    }

    /// Adds the counters of another pool.
    pub fn add(&mut self, other: &ParkedCounts) {
        self.waiting += other.waiting;
        self.paused += other.paused;
        self.running += other.running;
        self.dead += other.dead;
        self.answered += other.answered;
        self.oldest = self.oldest.into_iter().chain(other.oldest).min();
    }
}

impl Parked {
    fn shown_state(&self) -> ParkedState {
        match self.state {
            State::Waiting(_) | State::Following(_) => ParkedState::Waiting,
            State::Paused(..) => ParkedState::Paused,
            State::Given(_) => ParkedState::Running,
            State::Dead(_) => ParkedState::Dead,
        }
    }
}

impl ParkedCalls {
    pub(in crate::pool) fn counts(&self) -> ParkedCounts {
        let waiting: usize = self.lines.values().map(super::Lines::len).sum();
        let waiting = waiting + self.following;
        let paused = self.pauses.len();
        let oldest = self.calls.values().find(|parked| !parked.is_dead());
        ParkedCounts {
            waiting,
            paused,
            running: self.calls.len() - waiting - paused - self.dead.len(),
            dead: self.dead.len(),
            answered: self.answers.len(),
            oldest: oldest.map(|parked| parked.parked_ms),
        }
    }

    /// Whether there is any call or answer.
    pub(in crate::pool) fn has_any(&self) -> bool {
        !self.calls.is_empty() || self.answers.len() > 0
    }
}

/// Which calls of a pool a client may see: all, or those of one app.
pub(crate) type Viewer<'a> = Option<&'a AppId>;

impl<D: Driver> DurableCalls<'_, D> {
    /// The numbers of at most `limit` calls and answers that match a filter and may be in their
    /// state, in order, after the number `after`.
    pub(crate) fn find_parked(
        &self,
        filter: &ParkedFilter,
        viewer: Viewer<'_>,
        (after, limit): (u64, usize),
        may: &dyn Fn(ParkedState) -> bool,
    ) -> Vec<u64> {
        let from = after.saturating_add(1);
        let range = match filter.number {
            Some(number) => number.max(from)..=number,
            None => from..=u64::MAX,
        };
        if range.is_empty() {
            return Vec::new();
        }
        let is_app = |app: &AppId| {
            viewer.is_none_or(|viewer| viewer == app)
                && filter.app.as_ref().is_none_or(|wanted| wanted == app)
        };
        let is_state = |state| may(state) && filter.state.is_none_or(|wanted| wanted == state);
        let calls = self.parked.calls.range(range.clone());
        let calls = calls.filter(|(_, parked)| {
            is_app(&parked.caller)
                && is_state(parked.shown_state())
                && (filter.process.as_ref()).is_none_or(|wanted| *wanted == parked.process)
        });
        let mut numbers: Vec<u64> = calls.map(|(number, _)| *number).take(limit).collect();
        if is_state(ParkedState::Answered) {
            let answers = self.parked.answers.among(range);
            let answers = answers.filter(|(_, app, process)| {
                is_app(app)
                    && (filter.process.as_ref()).is_none_or(|wanted| wanted.as_str() == *process)
            });
            numbers.extend(answers.map(|(number, ..)| number).take(limit));
            numbers.sort_unstable();
            numbers.truncate(limit);
        }
        numbers
    }

    /// A call or an answer as a listing shows it, as JSON text.
    pub(crate) fn describe_parked(&self, number: u64, is_whole: bool, now: &Now) -> Option<String> {
        let Some(parked) = self.parked.calls.get(&number) else {
            let mut shown = self.parked.answers.describe(number)?;
            shown["pool"] = self.info.name.as_str().into();
            return Some(shown.to_string());
        };
        let given = match parked.state {
            State::Given(key) => self.calls.at(key),
            _ => None,
        };
        let durable = given.and_then(|call| call.durable.as_deref());
        let durable = parked.durable().or(durable);
        let handler = given.and_then(|call| self.members.at(call.member));
        let mut shown = json!({
            "number": number, "pool": self.info.name, "state": parked.shown_state().as_str(),
            "process": parked.process, "app_id": parked.caller, "id": parked.id,
            "attempt": parked.attempt, "attempts": parked.attempts,
            "parked": now.unix_ms_of(parked.parked_ms),
            "expires": now.unix_ms_of(parked.expires_ms),
            "bytes": parked.held.bytes.amount(),
        });
        let mut note = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                shown[name] = value;
            }
        };
        let text = |text: &str| Value::from(text);
        note(
            "destination",
            parked.destination.as_ref().map(|d| text(d.as_str())),
        );
        note("cause", parked.cause.as_deref().map(text));
        note("handler", handler.map(|m| text(m.app.as_str())));
        let Some(durable) = durable.filter(|_| is_whole) else {
            return Some(shown.to_string());
        };
        note("redeliver", Some(durable.redeliver.into()));
        note(
            "attachment_bytes",
            durable.attachment.as_ref().map(|raw| raw.len().into()),
        );
        let fields = durable.read(|call| {
            let key = call.key.as_deref().map(|key| text(key).to_string());
            let data = match call.body {
                Body::Json(data) => Some(data.text()),
                _ => None,
            };
            let size = data.map(|data| data.len().to_string());
            let data = data.filter(|data| {
                let has_room = data.len() <= SHOWN_BYTES_MAX;
                has_room && scan::value_within(data, FIELD_DEPTH_MAX).is_ok()
            });
            let size = size.filter(|_| data.is_none());
            let headers = call.headers.map(|headers| headers.text().to_owned());
            [
                ("key", key),
                ("headers", headers),
                ("data", data.map(str::to_owned)),
                ("data_bytes", size),
            ]
        });
        // Unchanged, so that numbers keep their digits.
        let mut shown = shown.to_string();
        for (name, value) in fields.into_iter().flatten() {
            if let Some(value) = value {
                let end = shown.len() - 1;
                shown.insert_str(end, &format!(",\"{name}\":{value}"));
            }
        }
        Some(shown)
    }
}

impl<D: Driver> Pool<D> {
    /// Changes a call or an answer; false if its state does not allow that.
    pub(crate) fn change_parked(
        &mut self,
        number: u64,
        change: ParkedChange,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let state = match self.parked.calls.get(&number) {
            Some(parked) => parked.shown_state(),
            None => ParkedState::Answered,
        };
        if !change.applies_to(state) {
            return false;
        }
        match change {
            ParkedChange::Cancel => self.end_parked(number, turn),
            ParkedChange::Retry(ttl_ms) => {
                return self.durable().retry_parked(number, ttl_ms, turn);
            }
            ParkedChange::Purge if state == ParkedState::Dead => self.durable().bury(number, turn),
            ParkedChange::Purge => self.durable().drop_answer(number, turn),
        }
        true
    }
}
