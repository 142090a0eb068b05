//! The lock of one block: who holds it, who waits, and until when.
//!
//! Claims are granted in order, and readers share the lock. Each grant has a greater fence, so
//! writes under an older fence can be recognised. Time is an input.

use std::collections::{BTreeMap, BTreeSet};

use latzero_protocol::memory::LockMode;

use super::MemberKey;
use super::blocks::Seat;
use crate::ledger::Reservation;
use crate::now::Time;

/// A request for a lock.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) member: MemberKey,
    /// The id of the request, for the reply.
    pub(super) id: Option<Box<str>>,
    pub(super) mode: LockMode,
    pub(super) lease_ms: Option<u64>,
    /// Its place in the queue, which is never reused.
    pub(super) place: u64,
    /// Its reservation, while it waits.
    pub(super) seat: Option<Seat>,
    /// The reservation of the lock, until that is released.
    pub(super) held: Option<Reservation>,
}

/// The result of a claim.
#[derive(Debug)]
pub(super) enum Claimed {
    Granted(Grant),
    /// It waits, at this place in the queue.
    Waits(u64),
    Refused,
}

/// A holder of the lock.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) member: MemberKey,
    pub(super) fence: u64,
    pub(super) mode: LockMode,
    pub(super) until: Option<Time>,
    _held: Option<Reservation>,
}

/// A claim that was granted.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) claim: Claim,
    pub(super) fence: u64,
}

/// A lock or a wait that ended involuntarily.
#[derive(Debug)]
pub(super) enum Expired {
    Lease(Holder),
    Wait(Claim),
}

/// The lock.
#[derive(Debug, Default)]
pub(super) struct Lock {
    fence: u64,
    holders: Vec<Holder>,
    /// The waiting claims and their deadlines, by their places in the queue.
    waiting: BTreeMap<u64, (Claim, Time)>,
    /// When waits end, and their places.
    ends: BTreeSet<(Time, u64)>,
    places: u64,
    /// Exclusive operations of the server itself.
    held_by_server: u32,
}

impl Lock {
    /// A free lock whose fences continue from `fence`.
    pub(super) fn after(fence: u64) -> Lock {
        Lock {
            fence,
            ..Lock::default()
        }
    }

    /// The newest fence: that of the newest grant, or of its end.
    pub(super) fn fence(&self) -> u64 {
        self.fence
    }

    pub(super) fn holders(&self) -> &[Holder] {
        &self.holders
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The exclusive holder.
    pub(super) fn exclusive(&self) -> Option<&Holder> {
        self.holders
            .first()
            .filter(|holder| holder.mode == LockMode::Exclusive)
    }

    fn admits(&self, mode: LockMode) -> bool {
        self.held_by_server == 0
            && match mode {
                LockMode::Exclusive => self.holders.is_empty(),
                LockMode::Shared => self.exclusive().is_none(),
            }
    }

    /// Requests the lock. The claim is granted, or waits until `until`; with `None` it does not
    /// wait.
    pub(super) fn claim(&mut self, now: Time, mut claim: Claim, until: Option<Time>) -> Claimed {
        if self.waiting.is_empty() && self.admits(claim.mode) {
            return Claimed::Granted(self.grant(now, claim));
        }
        let Some(until) = until else {
            return Claimed::Refused;
        };
        self.places += 1;
        claim.place = self.places;
        self.ends.insert((until, self.places));
        self.waiting.insert(self.places, (claim, until));
        Claimed::Waits(self.places)
    }

    /// Removes a wait by its place in the queue.
    pub(super) fn take(&mut self, place: u64) -> Option<Claim> {
        let (claim, until) = self.waiting.remove(&place)?;
        self.ends.remove(&(until, place));
        Some(claim)
    }

    fn grant(&mut self, now: Time, mut claim: Claim) -> Grant {
        claim.seat = None;
        self.fence += 1;
        self.holders.push(Holder {
            member: claim.member,
            fence: self.fence,
            mode: claim.mode,
            until: claim.lease_ms.map(|ms| now.after_ms(ms)),
            _held: claim.held.take(),
        });
        Grant {
            claim,
            fence: self.fence,
        }
    }

    /// The next waiter, if the lock admits it.
    pub(super) fn grant_next(&mut self, now: Time) -> Option<Grant> {
        let (&place, (claim, _)) = self.waiting.first_key_value()?;
        if !self.admits(claim.mode) {
            return None;
        }
        let claim = self.take(place)?;
        Some(self.grant(now, claim))
    }

    /// Releases the lock; `None` if `member` does not hold it under `fence`.
    pub(super) fn release(&mut self, member: MemberKey, fence: u64) -> Option<Holder> {
        let at = self
            .holders
            .iter()
            .position(|h| h.member == member && h.fence == fence)?;
        Some(self.end(at))
    }

    /// Renews a lease; false if `member` does not hold the lock under `fence`.
    pub(super) fn renew(
        &mut self,
        now: Time,
        member: MemberKey,
        fence: u64,
        lease_ms: Option<u64>,
    ) -> bool {
        let holder = self
            .holders
            .iter_mut()
            .find(|h| h.member == member && h.fence == fence);
        holder.is_some_and(|holder| {
            holder.until = lease_ms.map(|ms| now.after_ms(ms));
            true
        })
    }

    /// Removes `member`, except in modes that it may keep; returns what it held and waited for.
    pub(super) fn leave(
        &mut self,
        member: MemberKey,
        keeps: impl Fn(LockMode) -> bool,
    ) -> (Vec<Holder>, Vec<Claim>) {
        let leaves = |claim: &Claim| claim.member == member && !keeps(claim.mode);
        let waits = self.waiting.iter().filter(|(_, (claim, _))| leaves(claim));
        let places: Vec<u64> = waits.map(|(place, _)| *place).collect();
        let waited = places.into_iter().filter_map(|place| self.take(place));
        let waited = waited.collect();
        let goes = |h: &mut Holder| h.member == member && !keeps(h.mode);
        let held: Vec<Holder> = self.holders.extract_if(.., goes).collect();
        self.fence += held.len() as u64;
        (held, waited)
    }

    /// Ends all holds.
    pub(super) fn end_holders(&mut self) {
        self.holders.clear();
    }

    /// Removes and returns the claim that waited longest.
    pub(super) fn pop_waiting(&mut self) -> Option<Claim> {
        let (place, (claim, until)) = self.waiting.pop_first()?;
        self.ends.remove(&(until, place));
        Some(claim)
    }

    fn end(&mut self, at: usize) -> Holder {
        // The end of a hold raises the fence too, so that late writes under the old one are
        // recognised.
        self.fence += 1;
        self.holders.remove(at)
    }

    /// Starts an exclusive operation of the server.
    pub(super) fn begin_server(&mut self) {
        self.held_by_server += 1;
    }

    pub(super) fn end_server(&mut self) {
        self.held_by_server -= 1;
    }

    pub(super) fn is_held_by_server(&self) -> bool {
        self.held_by_server > 0
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let leases = self.holders.iter().filter_map(|h| h.until);
        let wait = self.ends.first().map(|(until, _)| *until);
        leases.chain(wait).min()
    }

    /// A lease or a wait that has expired.
    pub(super) fn pop_due(&mut self, now: Time) -> Option<Expired> {
        let is_over = |holder: &Holder| holder.until.is_some_and(|until| until <= now);
        if let Some(at) = self.holders.iter().position(is_over) {
            return Some(Expired::Lease(self.end(at)));
        }
        let &(_, place) = self.ends.first().filter(|(until, _)| *until <= now)?;
        self.take(place).map(Expired::Wait)
    }

    /// Whether there is such a wait; for checks.
    pub(super) fn waits(&self, member: MemberKey, id: &str, place: u64) -> bool {
        self.waiting
            .get(&place)
            .is_some_and(|(claim, _)| claim.member == member && claim.id.as_deref() == Some(id))
    }

    pub(super) fn check(&self) {
        let exclusive = self
            .holders
            .iter()
            .filter(|h| h.mode == LockMode::Exclusive)
            .count();
        assert!(exclusive == 0 || self.holders.len() == 1, "one alone");
        assert!(self.holders.iter().all(|h| h.fence <= self.fence));
        assert_eq!(self.ends.len(), self.waiting.len());
        // No waiting claim could be granted.
        if let Some((_, (claim, _))) = self.waiting.first_key_value() {
            assert!(!self.admits(claim.mode), "the first waiter could have it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slab::Key;

    const NOW: Time = Time(0);

    fn claim(who: u32, mode: LockMode) -> Claim {
        Claim {
            member: Key::new(who, 0),
            id: Some(who.to_string().into()),
            mode,
            lease_ms: None,
            place: 0,
            seat: None,
            held: None,
        }
    }

    /// Members ask in turn ("1" exclusive, "2s" shared); returns who holds it then.
    fn after(asks: &[&str]) -> Lock {
        let mut lock = Lock::default();
        for ask in asks {
            let (who, mode) = match ask.strip_suffix('s') {
                Some(who) => (who, LockMode::Shared),
                None => (*ask, LockMode::Exclusive),
            };
            let _ = lock.claim(
                NOW,
                claim(who.parse().unwrap(), mode),
                Some(NOW.after_ms(10)),
            );
            lock.check();
        }
        lock
    }

    fn holders(lock: &Lock) -> Vec<u32> {
        lock.holders.iter().map(|h| h.member.slot).collect()
    }

    fn grant_all(lock: &mut Lock) -> Vec<u64> {
        std::iter::from_fn(|| lock.grant_next(NOW).map(|grant| grant.fence)).collect()
    }

    #[test]
    fn one_writer_or_many_readers() {
        assert_eq!(holders(&after(&["1", "2"])), [1]);
        assert_eq!(holders(&after(&["1s", "2s"])), [1, 2]);
        // A reader does not overtake a writer that already waits.
        assert_eq!(holders(&after(&["1s", "2", "3s"])), [1]);
    }

    #[test]
    fn fencing_tokens_grow_and_waiters_are_served_in_order() {
        let mut lock = after(&["1", "2", "3s", "4s"]);
        assert_eq!(lock.fence(), 1);
        assert!(lock.release(Key::new(1, 0), 9).is_none());
        assert!(lock.release(Key::new(1, 0), 1).is_some());
        assert_eq!(grant_all(&mut lock), [3]);
        assert_eq!(lock.leave(Key::new(2, 0), |_| false).0.len(), 1);
        assert_eq!(grant_all(&mut lock), [5, 6]);
        assert_eq!(holders(&lock), [3, 4]);
        lock.check();
    }

    #[test]
    fn waits_and_leases_end() {
        let mut lock = after(&["1", "2"]);
        assert!(lock.renew(NOW, Key::new(1, 0), 1, Some(20)));
        assert_eq!(lock.next_deadline(), Some(NOW.after_ms(10)));
        assert!(lock.pop_due(NOW.after_ms(9)).is_none());
        let over = lock.pop_due(NOW.after_ms(10));
        assert!(matches!(over, Some(Expired::Wait(claim)) if claim.member.slot == 2));
        let over = lock.pop_due(NOW.after_ms(20));
        assert!(matches!(over, Some(Expired::Lease(holder)) if holder.member.slot == 1));
        assert_eq!(lock.next_deadline(), None);
    }

    #[test]
    fn the_server_waits_for_the_lock_too() {
        let mut lock = Lock::default();
        lock.begin_server();
        let refused = lock.claim(NOW, claim(1, LockMode::Shared), None);
        assert!(matches!(refused, Claimed::Refused));
        let until = Some(NOW.after_ms(1));
        let waits = lock.claim(NOW, claim(2, LockMode::Exclusive), until);
        assert!(matches!(waits, Claimed::Waits(1)));
        lock.end_server();
        assert_eq!(grant_all(&mut lock), [1]);
        assert!(lock.take(1).is_none());
    }
}
