//! Repeats of a call, recognised by the caller and its idempotency key: they get the answer of the
//! first call, and the handler runs once.
//!
//! While the first call is in progress its repeats wait with it, each within its own ttl. A repeat
//! that is cancelled or expires does not affect the first call. The answer is kept for some time,
//! so that a caller that lost its connection can ask again. A call that ends without an answer (it
//! expired, or its handler died) is forgotten: a repeat is then a new call, and may be the second
//! one that the handler sees.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hashbrown::HashMap;
use latzero_protocol::message::Trigger;
use latzero_protocol::{AppId, Refusal};

use super::answer::Answered;
use super::durable::DurableCalls;
use super::members::MemberKey;
use crate::driver::{Driver, Peer};
use crate::ledger::{Account, Reservation, Resource};
use crate::limits::Limits;
use crate::now::{Time, earliest};
use crate::outbox::Sent;
use crate::refusals;
use crate::turn::Turn;

/// Repeats that wait for the answer of one call.
const WAITING_MAX: usize = 16;

/// The caller and its key, in the form of [`scoped`].
type Known = (AppId, Box<str>);

/// Bytes of a key that is in use, in addition to those of its text: it is in two tables.
const KEY_BYTES: usize = 256;

fn key_bytes(known: &Known) -> usize {
    2 * (known.0.as_str().len() + known.1.len()) + KEY_BYTES
}

/// A key belongs to the trigger and the destination that it was used with, so that one order can be
/// billed and shipped under the same number.
pub(super) fn scoped(process: &str, destination: Option<&str>, key: &str) -> Box<str> {
    // Names contain no line breaks.
    format!("{process}\n{}\n{key}", destination.unwrap_or_default()).into()
}

/// The key that [`scoped`] was given.
pub(super) fn unscoped(scoped: &str) -> &str {
    scoped.splitn(3, '\n').nth(2).unwrap_or_default()
}

/// Like [`scoped`], for a call.
pub(super) fn scoped_key(trigger: &Trigger<'_>) -> Option<Box<str>> {
    let key = trigger.idempotency_key.as_deref()?;
    let destination = trigger.destination.as_ref().map(|d| &*d.app_id);
    Some(scoped(&trigger.process, destination, key))
}

fn check_waiting(count: usize) -> Result<(), Refusal> {
    if count < WAITING_MAX {
        return Ok(());
    }
    Err(refusals::too_many_repeats_of_call(WAITING_MAX))
}

/// A member's place in an order, and the id of its repeat.
type Waiter = ((u32, u32), Box<str>);

fn waiter(member: MemberKey, id: &str) -> Waiter {
    ((member.slot, member.generation), id.into())
}

/// Members with a repeat each, by its id.
type Repeaters = Vec<(MemberKey, Box<str>)>;

enum Repeat {
    Running {
        /// Repeats that wait for the answer.
        waiting: Repeaters,
        /// Its reservation, in the account in which the answer will be counted.
        held: Reservation,
        /// Parked repeats that wait for the answer.
        followers: Vec<u64>,
    },
    Answered {
        answer: Answered,
        expires: Time,
        /// Its reservation.
        held: Reservation,
    },
}

/// A repeat that waits with the first call.
struct Wait {
    known: Known,
    deadline: Time,
}

/// Calls with an idempotency key: those in progress, and the answers of others.
#[derive(Default)]
pub(super) struct Repeats {
    known: HashMap<Known, Repeat>,
    /// When answers expire.
    expires: BTreeSet<(Time, Known)>,
    /// Bytes of the answers.
    bytes: usize,
    /// Bytes of the keys of calls in progress.
    running_bytes: u64,
    /// The repeats that wait, by member.
    waits: BTreeMap<Waiter, Wait>,
    /// When they expire.
    wait_deadlines: BTreeSet<(Time, Waiter)>,
}

/// What the key of a call says about it.
pub(super) enum Seen {
    First,
    /// It is a repeat: it got, or will get, the answer of the first call.
    Repeat,
    /// It is the first call, which is parked under this number: its caller has reconnected.
    Itself(u64),
}

impl Repeats {
    pub(super) fn next_deadline(&self) -> Option<Time> {
        let answer = self.expires.first().map(|(at, _)| *at);
        let wait = self.wait_deadlines.first().map(|(at, _)| *at);
        earliest([answer, wait])
    }

    /// Whether a repeat with this id waits.
    pub(super) fn awaits(&self, member: MemberKey, id: &str) -> bool {
        !self.waits.is_empty() && self.waits.contains_key(&waiter(member, id))
    }

    fn wait(&mut self, known: Known, (member, id): (MemberKey, &str), deadline: Time) {
        let waiter = waiter(member, id);
        self.wait_deadlines.insert((deadline, waiter.clone()));
        self.waits.insert(waiter, Wait { known, deadline });
    }

    /// A repeat stops waiting; the call that it repeats continues.
    fn cancel(&mut self, waiter: &Waiter) -> bool {
        let Some(wait) = self.forget_wait(waiter) else {
            return false;
        };
        if let Some(Repeat::Running { waiting, .. }) = self.known.get_mut(&wait.known) {
            let is_it = |(m, id): &(MemberKey, Box<str>)| {
                (m.slot, m.generation) == waiter.0 && *id == waiter.1
            };
            waiting.retain(|entry| !is_it(entry));
        }
        true
    }

    fn forget_wait(&mut self, waiter: &Waiter) -> Option<Wait> {
        let wait = self.waits.remove(waiter)?;
        self.wait_deadlines.remove(&(wait.deadline, waiter.clone()));
        Some(wait)
    }

    /// Ends a call that is in progress; returns the repeats that wait with it, connected and
    /// parked.
    fn take_running(&mut self, known: &Known) -> Option<(Repeaters, Vec<u64>, Reservation)> {
        let Some(Repeat::Running { .. }) = self.known.get(known) else {
            return None;
        };
        let Some(Repeat::Running {
            waiting,
            held,
            followers,
        }) = self.known.remove(known)
        else {
            unreachable!("just seen");
        };
        for (member, id) in &waiting {
            self.forget_wait(&waiter(*member, id));
        }
        self.running_bytes -= held.amount();
        Some((waiting, followers, held))
    }

    /// A member leaves: removes its waiting repeats.
    pub(super) fn leave(&mut self, member: MemberKey) {
        let first = waiter(member, "");
        let own = self.waits.range(first.clone()..);
        let own: Vec<Waiter> = own
            .map(|(waiter, _)| waiter.clone())
            .take_while(|waiter| waiter.0 == first.0)
            .collect();
        for waiter in own {
            self.cancel(&waiter);
        }
    }

    /// Restores the key of a call that an earlier run parked.
    pub(super) fn restore(&mut self, caller: &AppId, key: &str, account: &Arc<Account>) {
        let known = (caller.clone(), key.into());
        let mut held = account.hold(Resource::Repeats);
        held.force(key_bytes(&known) as u64);
        self.begin(known, held);
    }

    fn begin(&mut self, known: Known, held: Reservation) {
        self.running_bytes += held.amount();
        let repeat = Repeat::Running {
            waiting: Vec::new(),
            held,
            followers: Vec::new(),
        };
        self.known.insert(known, repeat);
    }

    /// The parked repeats of a call that is in progress, with room for one more.
    pub(super) fn followers(
        &mut self,
        caller: &AppId,
        key: &str,
    ) -> Option<Result<&mut Vec<u64>, Refusal>> {
        let known = (caller.clone(), Box::from(key));
        match self.known.get_mut(&known)? {
            Repeat::Running {
                waiting, followers, ..
            } => Some(check_waiting(waiting.len() + followers.len()).map(|()| followers)),
            Repeat::Answered { .. } => None,
        }
    }

    /// A parked repeat stops waiting.
    pub(super) fn unfollow(&mut self, caller: &AppId, key: &str, number: u64) {
        let known = (caller.clone(), Box::from(key));
        if let Some(Repeat::Running { followers, .. }) = self.known.get_mut(&known) {
            followers.retain(|follower| *follower != number);
        }
    }

    /// All parked repeats were removed; false if there is no call with a key.
    pub(super) fn forget_followers(&mut self) -> bool {
        for repeat in self.known.values_mut() {
            if let Repeat::Running { followers, .. } = repeat {
                followers.clear();
            }
        }
        !self.known.is_empty()
    }

    /// Takes the oldest parked repeat of a call that is under way.
    pub(super) fn next_follower(&mut self, caller: &AppId, key: &str) -> Option<u64> {
        match self.known.get_mut(&(caller.clone(), Box::from(key)))? {
            Repeat::Running { followers, .. } => {
                let oldest = followers.iter().min().copied()?;
                followers.retain(|follower| *follower != oldest);
                Some(oldest)
            }
            Repeat::Answered { .. } => None,
        }
    }

    /// The answer that is kept for a key.
    pub(super) fn answer(&self, caller: &AppId, key: &str) -> Option<&Answered> {
        match self.known.get(&(caller.clone(), Box::from(key)))? {
            Repeat::Answered { answer, .. } => Some(answer),
            Repeat::Running { .. } => None,
        }
    }

    /// Like [`Repeats::restore`], for a call that has its answer, which is sent next. False if
    /// there is no room for it, or it is already known.
    pub(super) fn restore_answered(
        &mut self,
        caller: &AppId,
        key: &str,
        account: &Arc<Account>,
        limits: &Limits,
    ) -> bool {
        let is_known = self.known.contains_key(&(caller.clone(), key.into()));
        let has_room = !is_known && self.known.len() < limits.repeats_max;
        if has_room {
            self.restore(caller, key, account);
        }
        has_room
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes as u64 + self.running_bytes
    }

    /// When the oldest answer expires.
    pub(super) fn oldest(&self) -> Option<Time> {
        self.expires.first().map(|(expires, _)| *expires)
    }

    pub(super) fn forget_oldest(&mut self) -> bool {
        let Some((_, known)) = self.expires.pop_first() else {
            return false;
        };
        if let Some(Repeat::Answered { held, .. }) = self.known.remove(&known) {
            self.bytes -= held.amount() as usize;
        }
        true
    }

    pub(super) fn check(&self) {
        let (mut bytes, mut running_bytes) = (0, 0);
        let mut answered = 0;
        let mut waiting = 0;
        for (known, repeat) in &self.known {
            match repeat {
                Repeat::Answered {
                    answer,
                    expires,
                    held,
                } => {
                    let all = key_bytes(known) + answer.bytes();
                    assert_eq!(held.amount(), all as u64);
                    bytes += all;
                    answered += 1;
                    assert!(self.expires.contains(&(*expires, known.clone())));
                }
                Repeat::Running {
                    waiting: with,
                    held,
                    ..
                } => {
                    assert_eq!(held.amount(), key_bytes(known) as u64);
                    running_bytes += held.amount();
                    waiting += with.len();
                    for (member, id) in with {
                        assert_eq!(self.waits[&waiter(*member, id)].known, *known);
                    }
                }
            }
        }
        assert_eq!(waiting, self.waits.len());
        assert_eq!(waiting, self.wait_deadlines.len());
        assert_eq!((bytes, answered), (self.bytes, self.expires.len()));
        assert_eq!(running_bytes, self.running_bytes);
    }
}

impl<D: Driver> DurableCalls<'_, D> {
    /// Looks a call with a key up; a repeat is answered, or waits for the first one's answer.
    pub(super) fn find_repeat(
        &mut self,
        caller: MemberKey,
        (id, deadline): (Option<&str>, Time),
        key: &str,
        turn: &mut Turn<'_, D>,
    ) -> Result<Seen, Refusal> {
        let member = self.members.at(caller).expect("the call succeeds");
        let account = Arc::clone(member.peer.link().account());
        let mut known = (member.app.clone(), Box::from(key));
        // An older server stored answers under the key without its scope.
        if let Some((_, bare)) = key.rsplit_once('\n')
            && !self.repeats.known.contains_key(&known)
        {
            let unscoped = (known.0.clone(), Box::from(bare));
            if self.repeats.known.contains_key(&unscoped) {
                known = unscoped;
            }
        }
        // The caller has reconnected and sent the parked call again: it waits as itself.
        let itself = id.and_then(|id| self.parked.find(&known.0, id));
        match self.repeats.known.get_mut(&known) {
            Some(Repeat::Running { .. }) if let Some(number) = itself => Ok(Seen::Itself(number)),
            None => {
                let limits = &self.info.limits;
                while self.repeats.known.len() >= limits.repeats_max {
                    if !self.repeats.forget_oldest() {
                        return Err(refusals::too_many_keyed_calls(limits.repeats_max));
                    }
                }
                let bytes = key_bytes(&known) as u64;
                let mut held = account.hold(Resource::Repeats);
                while let Err(full) = held.resize(bytes) {
                    if self.repeats.forget_oldest() {
                        continue;
                    }
                    // The next such call has the room of the oldest answers of other pools.
                    turn.driver.effects().is_over_repeats |= full.is_of_server();
                    return Err(full.into());
                }
                self.repeats.begin(known, held);
                Ok(Seen::First)
            }
            Some(Repeat::Running {
                waiting, followers, ..
            }) => {
                check_waiting(waiting.len() + followers.len())?;
                let Some(id) = id else {
                    return Ok(Seen::Repeat);
                };
                if self.calls.find(caller, id).is_some() {
                    return Err(refusals::id_in_use(id.escape_debug()));
                }
                if self.repeats.waits.len() >= self.info.limits.repeats_max {
                    return Err(refusals::too_many_repeats(self.info.limits.repeats_max));
                }
                waiting.push((caller, id.into()));
                self.repeats.wait(known, (caller, id), deadline);
                Ok(Seen::Repeat)
            }
            Some(Repeat::Answered { .. }) => {
                let Some(Repeat::Answered { answer, .. }) = self.repeats.known.get(&known) else {
                    unreachable!("just seen");
                };
                if let Some(id) = id
                    && member
                        .send_answer(id, answer, self.info, turn)
                        .is_none_or(|sent| sent == Sent::Full)
                {
                    return Err(refusals::answer_did_not_fit());
                }
                Ok(Seen::Repeat)
            }
        }
    }

    /// The first call is answered: answers the repeats that wait, and stores the answer for later
    /// ones.
    pub(super) fn repeats_answered(
        &mut self,
        caller: &AppId,
        key: &str,
        answer: &Answered,
        turn: &mut Turn<'_, D>,
    ) {
        let now = turn.time();
        let known = (caller.clone(), Box::from(key));
        let Some((waiting, followers, mut held)) = self.repeats.take_running(&known) else {
            return;
        };
        for (member, id) in waiting {
            if let Some(to) = self.members.at(member)
                && to
                    .send_answer(&id, answer, self.info, turn)
                    .is_none_or(|sent| sent == Sent::Full)
            {
                to.refuse(&id, &refusals::repeats_answer_did_not_fit(), turn);
            }
        }
        for number in followers {
            self.finish_parked(number, (answer.clone(), true), turn);
        }
        let bytes = key_bytes(&known) + answer.bytes();
        if bytes > self.info.limits.repeats_bytes_max {
            return;
        }
        while self.repeats.bytes + bytes > self.info.limits.repeats_bytes_max {
            self.repeats.forget_oldest();
        }
        while let Err(full) = held.resize(bytes as u64) {
            if full.is_of_server() {
                // The oldest answers of all pools are dropped once this pool is released.
                held.force(bytes as u64);
                turn.driver.effects().is_over_repeats = true;
            } else if !self.repeats.forget_oldest() {
                return;
            }
        }
        let expires = now.after_ms(self.info.limits.repeats_ttl_ms);
        self.repeats.bytes += bytes;
        self.repeats.expires.insert((expires, known.clone()));
        let answer = answer.clone();
        self.repeats.known.insert(
            known,
            Repeat::Answered {
                answer,
                expires,
                held,
            },
        );
    }

    /// The first call ended without an answer: notifies those that wait with it; the next repeat is
    /// a new call.
    pub(super) fn repeats_dropped(&mut self, caller: &AppId, key: &str, turn: &mut Turn<'_, D>) {
        let known = (caller.clone(), Box::from(key));
        let Some((waiting, followers, _)) = self.repeats.take_running(&known) else {
            return;
        };
        let refusal = refusals::original_not_answered();
        for (member, id) in waiting {
            if let Some(to) = self.members.at(member) {
                to.refuse(&id, &refusal, turn);
            }
        }
        for number in followers {
            self.parked_refused(number, &refusal, turn);
        }
    }

    /// Cancels a repeat for its caller; false if there is none with that id.
    pub(super) fn cancel_repeat(
        &mut self,
        caller: MemberKey,
        id: &str,
        turn: &mut Turn<'_, D>,
    ) -> bool {
        let gave_up = self.repeats.cancel(&waiter(caller, id));
        if let Some(to) = self.members.at(caller).filter(|_| gave_up) {
            to.refuse(id, &refusals::repeat_cancelled(), turn);
        }
        gave_up
    }

    /// Drops expired answers, and ends expired waits.
    pub(super) fn handle_repeats_timeout(&mut self, budget: &mut usize, turn: &mut Turn<'_, D>) {
        let now = turn.time();
        let is_over = |(at, _): &(Time, _)| *at <= now;
        while *budget > 0 && self.repeats.expires.first().is_some_and(is_over) {
            *budget -= 1;
            self.repeats.forget_oldest();
        }
        while *budget > 0
            && let Some((_, waiter)) = self.repeats.wait_deadlines.first().filter(|w| w.0 <= now)
        {
            *budget -= 1;
            let waiter = waiter.clone();
            self.repeats.cancel(&waiter);
            let ((slot, generation), id) = waiter;
            let Some(to) = self.members.at(MemberKey::new(slot, generation)) else {
                continue;
            };
            to.refuse(&id, &refusals::repeat_expired(), turn);
        }
    }
}
