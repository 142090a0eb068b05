//! Dispatch of parked calls to handlers, in fair turns, while the handlers have room.

use std::collections::BTreeSet;

use latzero_protocol::message::Strategy;
use latzero_protocol::{AppId, Code};

use super::super::calls::Call;
use super::super::members::{MemberKey, Members};
use super::super::triggers::Triggers;
use super::super::{CallError, Caller, Pool};
use super::durable::DurableCall;
use super::{ParkedCalls, State, at_once, soon};
use crate::driver::Driver;
use crate::now::Time;
use crate::refusals;
use crate::rows::StoreChange;
use crate::slab::Key;
use crate::turn::Turn;

/// After how long parked calls are offered again to handlers whose outbox was full, in
/// milliseconds: the pool is not notified when an outbox has room again.
const GIVE_AGAIN_MS: u64 = 1000;

/// Why not all calls of a trigger were dispatched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stall {
    /// There were many, and others need the pool too.
    Many,
    /// The handlers were below their concurrency, but accepted none.
    Full,
}

/// What happened to the next call of a queue.
enum Next {
    /// It was given to a handler, which copied this many bytes.
    Given(u64),
    /// It could not be dispatched now, but those behind it may be.
    Passed,
    /// There was none to dispatch: the queue is empty, or its handlers are busy.
    None,
}

impl ParkedCalls {
    /// The destinations that calls of a trigger wait for and that have a handler: any app, or an
    /// app by name.
    fn takers<D: Driver>(
        &self,
        process: &str,
        triggers: &Triggers,
        members: &Members<D>,
    ) -> Vec<Option<AppId>> {
        let (Some(served), Some(lines)) = (triggers.get(process), self.lines.get(process)) else {
            return Vec::new();
        };
        let mut takers: BTreeSet<Option<AppId>> = BTreeSet::new();
        if lines.has(None) {
            takers.insert(None);
        }
        if lines.has_named() {
            let handlers = triggers.handlers_of(served);
            let apps = handlers.filter_map(|h| Some(&members.at(h.member)?.app));
            let awaited = apps.filter(|app| lines.has(Some(app.as_str())));
            takers.extend(awaited.map(|app| Some(app.clone())));
        }
        takers.into_iter().collect()
    }

    /// Calls of a trigger wait for a later dispatch.
    fn stall(&mut self, process: &str, why: Stall, at: Time) {
        if let Some((name, _)) = self.lines.get_key_value(process) {
            self.stalled.insert(name.clone(), why);
            let earlier = self.goes_on.unwrap_or(at);
            self.goes_on = Some(at.min(earlier));
        }
    }
}

impl<D: Driver> Pool<D> {
    /// Handles what is left at the end of a step: handlers with room.
    pub(crate) fn settle(&mut self, turn: &mut Turn<'_, D>) {
        while !self.parked.room.is_empty() {
            let among = self.parked.room.len();
            let process = self.parked.room.pop_first().expect("just checked");
            self.dispatch_parked(process.as_str(), among, turn);
        }
    }

    /// Dispatches calls that wait for the handlers of a trigger, one of `among` that share this
    /// step: first those whose handler died.
    pub(in crate::pool) fn dispatch_parked(
        &mut self,
        process: &str,
        among: usize,
        turn: &mut Turn<'_, D>,
    ) {
        self.give_waiting(process, among, turn);
        if let Some(lines) = self.parked.lines.get_mut(process) {
            lines.begin_round();
            self.dispatch_round(process, among, turn);
        }
    }

    /// Dispatches the calls that were not skipped in this round.
    fn dispatch_round(&mut self, process: &str, among: usize, turn: &mut Turn<'_, D>) {
        self.parked.stalled.remove(process);
        let mut takers = self.parked.takers(process, &self.triggers, &self.members);
        let (tried_max, bytes_max) = at_once(among);
        let (mut tried, mut bytes) = (0, 0);
        while !takers.is_empty() {
            let mut goes_on = Vec::new();
            for taker in takers {
                if tried == tried_max || bytes >= bytes_max {
                    self.parked.stall(process, Stall::Many, soon(turn.time()));
                    return;
                }
                bytes += match self.dispatch_next(process, taker.as_ref(), turn) {
                    Next::Given(bytes) => bytes,
                    Next::Passed => 0,
                    Next::None => continue,
                };
                tried += 1;
                goes_on.push(taker);
            }
            takers = goes_on;
        }
    }

    fn dispatch_next(
        &mut self,
        process: &str,
        app: Option<&AppId>,
        turn: &mut Turn<'_, D>,
    ) -> Next {
        let lines = self.parked.lines.get(process);
        let Some(waiting) = lines.and_then(|lines| lines.next(app)) else {
            return Next::None;
        };
        if !self.triggers.has_room(process, app, &self.members) {
            return Next::None;
        }
        let number = waiting.place.1;
        let parked = self.parked.calls.get_mut(&number).expect("it waits");
        if parked.deadline <= turn.time() {
            self.durable().parked_too_late(number, turn);
            return Next::Passed;
        }
        let durable = parked.dequeue().expect("queued calls wait");
        let (durable, error) = match self.dispatch(None, durable, turn) {
            Ok((key, durable)) => {
                let lines = self
                    .parked
                    .lines
                    .get_mut(process)
                    .expect("it was in a pool");
                lines.note_turn(app, &waiting);
                // Removed from the queue first, because the queue finds it by its state.
                let parked = self.parked.calls.get_mut(&number).expect("just found");
                let bytes = parked.held.bytes.amount();
                parked.state = State::Waiting(durable);
                let taken = self.parked.change(number, |parked| {
                    let durable = parked.dequeue();
                    parked.attempt += 1;
                    parked.state = State::Given(key);
                    (durable, parked.attempt)
                });
                let (durable, attempt) = taken.expect("just found");
                self.calls.at_mut(key).expect("just begun").durable = durable;
                turn.store(StoreChange::Attempt(number, attempt), None);
                return Next::Given(bytes);
            }
            Err(failed) => failed,
        };
        let parked = self.parked.calls.get_mut(&number).expect("just found");
        parked.state = State::Waiting(durable);
        let refusal = match error {
            CallError::UnknownDestination => None,
            CallError::Refused(refusal) => Some(refusal),
        };
        match refusal {
            Some(refusal) if refusal.code == Code::Overloaded => {
                // The handler of its key is busy, but calls with another key may be dispatched.
                let served = self.triggers.get(process);
                if served.is_none_or(|served| served.strategy != Strategy::Sticky) {
                    let again = turn.time().after_ms(GIVE_AGAIN_MS);
                    self.parked.stall(process, Stall::Full, again);
                    return Next::None;
                }
            }
            Some(refusal) if !matches!(refusal.code, Code::NoHandler | Code::TooLarge) => {
                self.durable().parked_refused(number, &refusal, turn);
                return Next::Passed;
            }
            _ => {}
        }
        if let Some(lines) = self.parked.lines.get_mut(process) {
            lines.pass(app, &waiting);
        }
        Next::Passed
    }

    /// Continues an unfinished dispatch.
    pub(super) fn go_on_giving(&mut self, turn: &mut Turn<'_, D>) {
        if self.parked.goes_on.is_none_or(|at| at > turn.time()) {
            return;
        }
        self.parked.goes_on = None;
        let stalled = std::mem::take(&mut self.parked.stalled);
        let among = stalled.len();
        for (process, why) in stalled {
            match why {
                Stall::Many => self.dispatch_round(process.as_str(), among, turn),
                Stall::Full => self.dispatch_parked(process.as_str(), among, turn),
            }
        }
    }

    /// Offers a durable call to the handlers; returns it whether one took it or not.
    #[expect(
        clippy::type_complexity,
        reason = "the call goes back to whoever keeps it"
    )]
    pub(super) fn dispatch(
        &mut self,
        caller: Option<MemberKey>,
        mut durable: Box<DurableCall>,
        turn: &mut Turn<'_, D>,
    ) -> Result<(Key<Call>, Box<DurableCall>), (Box<DurableCall>, CallError)> {
        durable.attempt += 1;
        let (attempt, deadline) = (durable.attempt, durable.deadline);
        let app = durable.caller.clone();
        let from = caller.map_or(Caller::Absent(&app, durable.instance), Caller::Member);
        let given =
            durable.read(|trigger| self.route(from, trigger, (deadline, Some(attempt)), turn));
        match given {
            Some(Ok(key)) => Ok((key, durable)),
            Some(Err(error)) => {
                durable.attempt -= 1;
                Err((durable, error))
            }
            None => Err((durable, refusals::stored_call_is_invalid().into())),
        }
    }
}
