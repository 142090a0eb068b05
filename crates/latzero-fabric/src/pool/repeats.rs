//! Repeats of a call, known by their caller and its idempotency key: they get the first one's answer, and the handler runs
//! once.
//!
//! While the first call is under way its repeats wait with it. Its answer is kept for a time, so that a caller that lost its
//! connection may ask again. A call that ends without an answer (its time was over, its handler died) is forgotten: a repeat
//! is then a call of its own, and may be the second that the handler sees.

use std::collections::BTreeSet;

use hashbrown::HashMap;
use latzero_protocol::encode;
use latzero_protocol::{AppId, Code, Refusal};

use super::answer::Answered;
use super::{MemberKey, Pool, place};
use crate::effects::{Class, Effects, Sent};
use crate::time::Time;

/// Repeats that wait for the answer of one call.
const WAITING_MAX: usize = 16;

/// Who calls, and its key.
type Known = (AppId, Box<str>);

enum Repeat {
    Running(Vec<(MemberKey, Box<str>)>),
    Answered { answer: Answered, expires: Time },
}

/// Calls with an idempotency key: those under way, and the answers of others.
#[derive(Default)]
pub(super) struct Repeats {
    known: HashMap<Known, Repeat>,
    /// When answers are given up.
    expires: BTreeSet<(Time, Known)>,
    bytes: usize,
}

/// What a call is in view of its key.
pub(super) enum Seen {
    First,
    /// Its answer comes, or came, with the first one's.
    Repeat,
}

impl Repeats {
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.expires.first().map(|(at, _)| *at)
    }

    /// A call that an earlier run parked waits on.
    pub(super) fn restore(&mut self, caller: &AppId, key: &str) {
        let known = (caller.clone(), key.into());
        self.known.insert(known, Repeat::Running(Vec::new()));
    }

    fn forget_oldest(&mut self) -> bool {
        let Some((_, known)) = self.expires.pop_first() else {
            return false;
        };
        if let Some(Repeat::Answered { answer, .. }) = self.known.remove(&known) {
            self.bytes -= answer.bytes();
        }
        true
    }

    pub(super) fn check(&self) {
        let mut bytes = 0;
        let mut answered = 0;
        for (known, repeat) in &self.known {
            if let Repeat::Answered { answer, expires } = repeat {
                bytes += answer.bytes();
                answered += 1;
                assert!(self.expires.contains(&(*expires, known.clone())));
            }
        }
        assert_eq!((bytes, answered), (self.bytes, self.expires.len()));
    }
}

impl<P: Clone> Pool<P> {
    /// Looks a call with a key up; a repeat is answered, or waits for the first one's answer.
    pub(super) fn look_up_repeat<E: Effects<Peer = P>>(
        &mut self,
        caller: MemberKey,
        id: Option<&str>,
        key: &str,
        fx: &mut E,
    ) -> Result<Seen, Refusal> {
        let member = self.members.at(place(caller)).expect("it calls");
        let known = (member.app.clone(), Box::from(key));
        // The very call that is parked, said again by a caller that came back: it waits by itself.
        let is_itself = id.is_some_and(|id| self.has_parked(&known.0, id));
        match self.repeats.known.get_mut(&known) {
            Some(Repeat::Running(_)) if is_itself => Ok(Seen::Repeat),
            None => {
                let limits = &self.limits;
                while self.repeats.known.len() >= limits.repeats_max {
                    if !self.repeats.forget_oldest() {
                        let message = format!(
                            "{} calls with an idempotency key are under way (limits.repeats_max)",
                            limits.repeats_max
                        );
                        return Err(Refusal::new(Code::Overloaded, message));
                    }
                }
                self.repeats
                    .known
                    .insert(known, Repeat::Running(Vec::new()));
                Ok(Seen::First)
            }
            Some(Repeat::Running(waiting)) => {
                // Those whose connection ended wait no more.
                waiting.retain(|(member, _)| self.members.at(place(*member)).is_some());
                if waiting.len() >= WAITING_MAX {
                    let message = format!("{WAITING_MAX} repeats of this call wait for its answer");
                    return Err(Refusal::new(Code::Overloaded, message));
                }
                if let Some(id) = id {
                    waiting.push((caller, id.into()));
                }
                Ok(Seen::Repeat)
            }
            Some(Repeat::Answered { .. }) => {
                let Some(Repeat::Answered { answer, .. }) = self.repeats.known.get(&known) else {
                    unreachable!("just seen");
                };
                if let Some(id) = id
                    && self.send_answer(member, id, answer, fx) == Sent::Full
                {
                    let message = "the answer did not fit into your outbox (limits.outbox_bytes_max): read faster";
                    return Err(Refusal::new(Code::Overloaded, message));
                }
                Ok(Seen::Repeat)
            }
        }
    }

    /// The first call is answered: so are those that wait with it, and for a time those that come.
    pub(super) fn repeats_answered<E: Effects<Peer = P>>(
        &mut self,
        now: Time,
        caller: &AppId,
        key: &str,
        answer: &Answered,
        fx: &mut E,
    ) {
        let known = (caller.clone(), Box::from(key));
        let Some(Repeat::Running(waiting)) = self.repeats.known.remove(&known) else {
            return;
        };
        for (member, id) in waiting {
            if let Some(to) = self.members.at(place(member))
                && self.send_answer(to, &id, answer, fx) == Sent::Full
            {
                let message = "the answer did not fit into your outbox (limits.outbox_bytes_max): read faster, and repeat the call";
                let refusal = Refusal::new(Code::HandlerGone, message);
                fx.send(&to.peer, Class::Control, 256, |out| {
                    encode::refusal(out, Some(&id), &refusal);
                });
            }
        }
        let bytes = answer.bytes();
        if bytes > self.limits.repeats_bytes_max {
            return;
        }
        while self.repeats.bytes + bytes > self.limits.repeats_bytes_max {
            self.repeats.forget_oldest();
        }
        let expires = now.after_ms(self.limits.repeats_ttl_ms);
        self.repeats.bytes += bytes;
        self.repeats.expires.insert((expires, known.clone()));
        let answer = answer.clone();
        self.repeats
            .known
            .insert(known, Repeat::Answered { answer, expires });
    }

    /// The first call ended without an answer: those that wait with it are told, and the next one is a call of its own.
    pub(super) fn repeats_dropped<E: Effects<Peer = P>>(
        &mut self,
        caller: &AppId,
        key: &str,
        fx: &mut E,
    ) {
        let known = (caller.clone(), Box::from(key));
        let Some(Repeat::Running(waiting)) = self.repeats.known.remove(&known) else {
            return;
        };
        let message =
            "the call that this one repeats ended without an answer; repeat it if it may run twice";
        let refusal = Refusal::new(Code::HandlerGone, message);
        for (member, id) in waiting {
            if let Some(to) = self.members.at(place(member)) {
                fx.send(&to.peer, Class::Control, 256, |out| {
                    encode::refusal(out, Some(&id), &refusal);
                });
            }
        }
    }

    /// Gives up answers whose time is over.
    pub(super) fn handle_repeats_timeout(&mut self, now: Time) {
        while self.repeats.next_deadline().is_some_and(|at| at <= now) {
            self.repeats.forget_oldest();
        }
    }
}
