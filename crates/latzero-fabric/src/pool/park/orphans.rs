//! Calls whose handler died before it answered: given to another one, or parked, or ended.

use latzero_protocol::encode;
use latzero_protocol::message::Trigger;
use latzero_protocol::{Code, Refusal};

use super::super::{MemberKey, Pool};
use super::lasting::Lasting;
use crate::driver::Driver;
use crate::keep::Change;
use crate::outbox::Class;
use crate::turn::Turn;

impl<D: Driver> Pool<D> {
    /// The handler of a lasting call died: it is given to another as soon as the dead one has left.
    pub(in crate::pool) fn orphan(
        &mut self,
        caller: MemberKey,
        id: Option<Box<str>>,
        lasting: Box<Lasting>,
    ) {
        match lasting.number {
            Some(number) => {
                let parked = self.parked.calls.get_mut(&number).expect("it was given");
                parked.given = None;
                parked.waiting = Some(lasting);
                let process = parked.process.clone();
                self.parked.await_handler(number, &process);
                self.parked.orphaned.push(process);
            }
            None => self.parked.orphans.push((caller, id, lasting)),
        }
    }

    /// Sees to calls whose handler died, now that it has left. What can't be given to another is parked where it may be,
    /// else its caller is told.
    pub(in crate::pool) fn see_to_orphans(&mut self, turn: &mut Turn<'_, D>) {
        for (caller, id, lasting) in std::mem::take(&mut self.parked.orphans) {
            let Some(member) = self.members.at(caller) else {
                self.drop_repeats_of(&lasting, turn);
                continue;
            };
            let peer = member.peer.clone();
            let Err((lasting, _)) = self.give(Some(caller), lasting, turn) else {
                continue;
            };
            let may_park = lasting.may_park;
            let parked = may_park.then(|| {
                lasting.read(|trigger| {
                    let left = lasting.deadline.since(turn.time()).as_millis();
                    let trigger = Trigger {
                        ttl_ms: u64::try_from(left).unwrap_or(u64::MAX).max(1),
                        id: trigger.id.clone(),
                        process: trigger.process.clone(),
                        pool: None,
                        destination: trigger.destination.clone(),
                        key: trigger.key.clone(),
                        window: None,
                        park: true,
                        redeliver: trigger.redeliver,
                        idempotency_key: trigger.idempotency_key.clone(),
                        blocks: Vec::new(),
                        headers: trigger.headers,
                        body: trigger.body,
                    };
                    self.park(caller, &trigger, None, turn)
                })
            });
            match parked.flatten() {
                Some(Ok(number)) => {
                    // The next attempt is not the first.
                    let parked = self.parked.calls.get_mut(&number).expect("just parked");
                    parked.attempt = lasting.attempt;
                    if let Some(waiting) = &mut parked.waiting {
                        waiting.attempt = lasting.attempt;
                    }
                    turn.keep(Change::Attempt(number, lasting.attempt), None);
                    // Others may serve it, and be busy just now.
                    let process = parked.process.clone();
                    self.parked.orphaned.push(process);
                }
                _ => {
                    self.drop_repeats_of(&lasting, turn);
                    let message = "the handler disconnected before it answered, and no other \
                        handler took the call";
                    let refusal = Refusal::new(Code::HandlerGone, message);
                    if let Some(id) = &id {
                        turn.send(&peer, Class::Control, 256, |out| {
                            encode::refusal(out, Some(id), &refusal);
                        });
                    }
                }
            }
        }
        for process in std::mem::take(&mut self.parked.orphaned) {
            self.give_parked(process.as_str(), turn);
        }
    }

    /// A lasting call is over without an answer: so are those that repeat it.
    /// Bytes of the calls that may be given to another handler.
    pub(in crate::pool) fn redelivery_bytes(&self) -> u64 {
        let lasting = self
            .calls
            .iter()
            .filter_map(|(_, call)| call.lasting.as_ref());
        let held = lasting.filter_map(|lasting| lasting.held.as_ref());
        held.map(crate::books::Hold::amount).sum()
    }

    pub(in crate::pool) fn drop_repeats_of(&mut self, lasting: &Lasting, turn: &mut Turn<'_, D>) {
        if let Some(key) = &lasting.idempotency_key {
            self.repeats_dropped(&lasting.caller, key, turn);
        }
    }

    /// Tells the callers of calls whose handler died that no other gets them: the pool goes.
    pub(in crate::pool) fn drop_orphans(&mut self, turn: &mut Turn<'_, D>) {
        self.parked.orphaned.clear();
        for (caller, id, lasting) in std::mem::take(&mut self.parked.orphans) {
            self.drop_repeats_of(&lasting, turn);
            let Some((member, id)) = self.members.at(caller).zip(id) else {
                continue;
            };
            let refusal = Refusal::new(Code::HandlerGone, "the pool was removed");
            turn.send(&member.peer, Class::Control, 256, |out| {
                encode::refusal(out, Some(&id), &refusal);
            });
        }
    }
}
