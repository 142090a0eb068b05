//! Which handler takes a call: the trigger's strategy orders the handlers, and the first that can
//! take it does.

use std::cmp::Reverse;

use latzero_protocol::message::{Strategy, Trigger};
use latzero_protocol::{Refusal, TriggerName};

use super::members::{Member, Members};
use super::routing::matches;
use super::triggers::{Handler, HandlerKey, Served, Triggers};
use super::{CallError, PoolInfo};
use crate::driver::Driver;
use crate::prng::{Prng, mix};
use crate::refusals;

/// A handler's answer to the offer of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offer {
    /// It has the call.
    Taken,
    /// It cannot take it now.
    Busy,
    /// The call is not meant for it.
    NotMeant,
}

/// Why no handler took a call, for the caller's error.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// A handler belonged to the destination that the caller named.
    pub(super) matching: bool,
    /// A handler needs the payload as base64, which is too large.
    pub(super) too_large: bool,
    /// A handler has as many calls of this caller as it may have.
    pub(super) silent: bool,
}

impl Seen {
    /// The error for the caller.
    pub(super) fn error<D: Driver>(
        self,
        trigger: &Trigger<'_>,
        members: &Members<D>,
        pool: &PoolInfo,
    ) -> CallError {
        let process = &trigger.process;
        if self.too_large {
            return refusals::call_too_large_as_base64().into();
        }
        if self.silent {
            let max = pool.limits.in_flight_per_handler_max;
            return refusals::handler_is_silent(max, process).into();
        }
        if self.matching {
            return refusals::handlers_are_busy(process, &pool.name).into();
        }
        if let Err(error) = TriggerName::check(process) {
            return Refusal::from(error).into();
        }
        let Some(destination) = &trigger.destination else {
            return refusals::no_handler(process, &pool.name).into();
        };
        if members.iter().any(|(_, m)| matches(Some(destination), m)) {
            refusals::not_served_by(&destination.app_id, process, &pool.name).into()
        } else {
            CallError::UnknownDestination
        }
    }
}

/// Where to start among the handlers.
pub(super) fn start(served: &Served, prng: &mut Prng) -> usize {
    match served.strategy {
        Strategy::Random if !served.handlers.is_empty() => prng.below(served.handlers.len()),
        _ => served.turn.get(),
    }
}

/// Offers the handlers to `offer`, in the order of the strategy, until one takes the call; returns
/// its position and key.
pub(super) fn each<D: Driver>(
    served: &Served,
    triggers: &Triggers,
    members: &Members<D>,
    start: usize,
    sticky: impl FnOnce() -> u64,
    mut offer: impl FnMut(&Handler, &Member<D>) -> Offer,
) -> Option<(usize, HandlerKey)> {
    let n = served.handlers.len();
    // Handlers may have gone since.
    let start = if start < n { start } else { 0 };
    let in_turn = || (start..n).chain(0..start);
    let handler = |position: usize| {
        let handler = triggers.handler(served.handlers[position]);
        handler.expect("a trigger's handlers exist")
    };
    let mut offer_to = |position: usize| {
        let handler = handler(position);
        let member = members.at(handler.member);
        offer(handler, member.expect("a handler's member lives"))
    };
    let mut takes = |position: &usize| offer_to(*position) == Offer::Taken;
    let chosen = match served.strategy {
        Strategy::RoundRobin | Strategy::Random => in_turn().find(takes),
        Strategy::LeastBusy => {
            let load = |position: &usize| handler(*position).in_flight;
            // The first minimum: among equals the next in turn is used.
            let first = in_turn().min_by_key(load)?;
            if takes(&first) {
                Some(first)
            } else {
                let mut others: Vec<_> = in_turn().filter(|other| *other != first).collect();
                others.sort_by_key(load);
                others.into_iter().find(takes)
            }
        }
        Strategy::Sticky => {
            // Highest random weight (Thaler and Ravishankar, 1998): when a handler goes, only its
            // keys move.
            let sticky = sticky();
            let weight = |&position: &usize| Reverse(mix(sticky ^ served.instances[position].0));
            // The first one almost always decides, and sorting takes longer than finding it.
            let first = in_turn().min_by_key(weight)?;
            let others = || {
                let mut others: Vec<_> = in_turn().filter(|other| *other != first).collect();
                others.sort_by_key(weight);
                others
            };
            let rest = std::iter::once_with(others).flatten();
            // If the handler of this key is busy, another one lacks its state.
            let decides = |position: usize| match offer_to(position) {
                Offer::Taken => Some(Some(position)),
                Offer::Busy => Some(None),
                Offer::NotMeant => None,
            };
            std::iter::once(first).chain(rest).find_map(decides)?
        }
    };
    chosen.map(|position| (position, served.handlers[position]))
}
