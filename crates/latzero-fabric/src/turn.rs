//! The context of every decision: the time, and what the decision can access.

use std::sync::Arc;

use latzero_protocol::{Code, PoolName};

use crate::driver::{Driver, Observed, Peer, Promise};
use crate::effects::{Audit, Buffers, CallEnd, Count};
use crate::ledger::Account;
use crate::limits::Limits;
use crate::link::Notice;
use crate::memory::{Job, Numbers, StorageId};
use crate::now::{Now, Time};
use crate::outbox::{Class, Outbox, SHARE_BYTES, Sent, SharedBody};
use crate::pool::Pool;
use crate::registry::Registry;
use crate::rows::{AnswerRow, StoreChange};

/// One step of the core: an input at a point in time, and the decisions that follow from it.
pub struct Turn<'a, D: Driver> {
    /// When it happened.
    pub now: Now,
    /// The driver.
    pub driver: &'a mut D,
}

impl<D: Driver> Turn<'_, D> {
    /// Begins a step.
    pub fn new(now: Now, driver: &mut D) -> Turn<'_, D> {
        Turn { now, driver }
    }

    /// The moment, on the clock that only moves forward.
    #[inline]
    pub fn time(&self) -> Time {
        self.now.monotonic
    }

    pub(crate) fn unix_ms(&self) -> u64 {
        self.now.unix_ms
    }

    pub(crate) fn steady_ms(&self) -> u64 {
        self.now.steady_ms
    }

    /// The bounds.
    pub(crate) fn limits(&self) -> &Limits {
        &self.driver.context().limits
    }

    /// Runs `f` with the registry.
    pub fn with_registry<R>(
        &mut self,
        f: impl FnOnce(&mut Registry<D>, &mut Turn<'_, D>) -> R,
    ) -> R {
        D::with_registry(self, f)
    }

    /// Runs `f` with one pool.
    #[inline]
    pub fn with_pool<R>(
        &mut self,
        pool: &D::Pool,
        f: impl FnOnce(&mut Pool<D>, &mut Turn<'_, D>) -> R,
    ) -> R {
        let result = D::with_pool(self, pool, |pool, turn| {
            let result = f(pool, turn);
            pool.settle(turn);
            result
        });
        if std::mem::take(&mut self.driver.effects().is_over_repeats) {
            self.forget_repeats();
        }
        result
    }

    /// Drops the oldest answers that are stored for repeats, in any pool, until there is room.
    fn forget_repeats(&mut self) {
        while self.driver.context().ledger.is_over_repeats() {
            let pools = self.with_registry(|registry, _| {
                let handles = registry.pools().map(|(_, pool)| pool.clone());
                handles.collect::<Vec<_>>()
            });
            let mut oldest: Vec<_> = pools
                .into_iter()
                .filter_map(|pool| {
                    let at = D::with_pool(self, &pool, |pool, _| pool.durable().oldest_repeat())?;
                    Some((at, pool))
                })
                .collect();
            if oldest.is_empty() {
                return;
            }
            // Several at once, because finding them takes a look into every pool.
            oldest.sort_by_key(|(at, _)| *at);
            for (_, pool) in oldest.iter().take(8) {
                D::with_pool(self, pool, |pool, _| pool.durable().forget_oldest_repeat());
                if !self.driver.context().ledger.is_over_repeats() {
                    return;
                }
            }
        }
    }

    pub(crate) fn with_numbers<R>(&mut self, f: impl FnOnce(&mut Numbers) -> R) -> R {
        self.driver.with_numbers(f)
    }

    /// Appends one frame to `to`'s outbox: `encode` writes about `length` bytes, and is not called
    /// unless there is room.
    #[inline]
    pub fn send(
        &mut self,
        to: &D::Peer,
        class: Class,
        length: usize,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        self.append(to, class, (length, length), |outbox, buffers| {
            outbox.append(class, Vec::new(), || buffers.take(length), encode)
        })
    }

    /// Like [`Turn::send`], with descriptors that are sent with the frame's first byte.
    pub fn send_descriptors(
        &mut self,
        to: &D::Peer,
        class: Class,
        length: usize,
        descriptors: Vec<D::Fd>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        self.append(to, class, (length, length), |outbox, buffers| {
            outbox.append(class, descriptors, || buffers.take(length), encode)
        })
    }

    /// Appends a frame that is stored once for all its receivers.
    pub(crate) fn send_shared(&mut self, to: &D::Peer, class: Class, frame: &SharedBody) -> Sent {
        self.append(to, class, (frame.len(), 0), |outbox, _| {
            outbox.append_shared(class, frame.clone())
        })
    }

    /// Appends the frames of `count` events for all of `receivers`. Each gets all of them or none.
    pub(crate) fn send_events<'p>(
        &mut self,
        receivers: impl Iterator<Item = &'p D::Peer>,
        (frames, count): (&[u8], u64),
        account: &Arc<Account>,
    ) where
        D::Peer: 'p,
    {
        let class = Class::Event;
        let put = |out: &mut Vec<u8>| out.extend_from_slice(frames);
        let shared =
            (frames.len() >= SHARE_BYTES).then(|| SharedBody::encode(frames.len(), account, put));
        for to in receivers {
            let sent = match &shared {
                None => self.send(to, class, frames.len(), put),
                Some(Ok(shared)) => self.send_shared(to, class, shared),
                Some(Err(_)) => self.refuse(to, class),
            };
            if sent == Sent::Full && count > 1 {
                to.link().outbox.note_lost(count - 1);
                self.driver.observe(Observed::Lost(to, count - 1));
            }
        }
    }

    /// Drops a message for which there is no memory.
    fn refuse(&mut self, to: &D::Peer, class: Class) -> Sent {
        let sent = to.link().outbox.refuse(class);
        self.driver.observe(Observed::Message(to, class, sent, &[]));
        sent
    }

    #[inline]
    fn append(
        &mut self,
        to: &D::Peer,
        class: Class,
        lengths: (usize, usize),
        put: impl for<'l> FnOnce(&'l mut Outbox<D::Fd, Notice<D::Pool>>, &mut Buffers) -> &'l [u8],
    ) -> Sent {
        let site = self.driver.context();
        let mut link = to.link();
        let sent = link.admit(class, lengths, site.outbox, &site.ledger);
        if sent == Sent::Queued {
            let is_idle = link.outbox.queued() == 0 && !link.outbox.is_blocked();
            let effects = self.driver.effects();
            let before = link.outbox.queued();
            let frame = put(&mut link.outbox, &mut effects.buffers);
            self.driver
                .observe(Observed::Message(to, class, sent, frame));
            let effects = self.driver.effects();
            effects.appended += link.outbox.queued() - before;
            if is_idle {
                effects.touched.push(to.clone());
            }
        } else {
            drop(link);
            self.driver.observe(Observed::Message(to, class, sent, &[]));
            if sent == Sent::Full && class == Class::Control {
                // Not even its end could be sent.
                self.close(to);
            }
        }
        sent
    }

    /// Closes `peer` once its outbox is written.
    pub fn close(&mut self, peer: &D::Peer) {
        peer.link().outbox.seal();
        self.driver.observe(Observed::Closing(peer));
        self.driver.effects().closing.push(peer.clone());
    }

    /// Notifies `to` of a block's new version. A newer one replaces it until it is written; the
    /// last one is never lost.
    pub(crate) fn block_changed(
        &mut self,
        to: &D::Peer,
        change: &crate::memory::VersionNotice<'_>,
    ) {
        let is_new = to.link().outbox.note_change(change.topic, change.to_json());
        if is_new {
            self.driver.effects().touched.push(to.clone());
        }
    }

    /// A call of `caller`'s began. A parked call has no caller's connection.
    #[inline]
    pub(crate) fn call_started(&mut self, caller: Option<&D::Peer>) {
        if let Some(caller) = caller {
            caller.in_flight().start();
        }
        self.driver.effects().tally.started += 1;
    }

    /// A call of `caller`'s ended.
    #[inline]
    pub(crate) fn call_ended(&mut self, caller: Option<&D::Peer>, end: CallEnd) {
        self.driver.effects().tally.ended.push(end);
        let Some(caller) = caller else { return };
        let max = self.driver.context().limits.in_flight_max;
        if caller.in_flight().end(max) {
            self.driver.effects().resumed.push(caller.clone());
        }
    }

    /// A request was refused before it became a call.
    pub(crate) fn refused(&mut self, code: Code) {
        self.driver.effects().tally.refused.push(code);
        self.driver.observe(Observed::Refused(code));
    }

    pub(crate) fn count(&mut self, what: Count) {
        self.driver.effects().tally.counts[what as usize] += 1;
        self.driver.observe(Observed::Counted(what));
    }

    pub(crate) fn block_job(&mut self, job: Job<D::Peer>) {
        self.driver.effects().jobs.push(job);
    }

    pub(crate) fn count_held(&mut self, pool: &PoolName, number: u32, change: i32) {
        self.driver
            .effects()
            .held
            .push((pool.clone(), number, change));
    }

    pub(crate) fn store(&mut self, change: StoreChange, promise: Option<&D::Peer>) {
        self.driver.store(change, promise.map(Promise::Session));
    }

    /// Stores an answer; its pool hears when it is on disk.
    pub(crate) fn store_answer(&mut self, row: Box<AnswerRow>) {
        self.driver
            .store(StoreChange::Answer(row), Some(Promise::Answer));
    }

    /// Requests a call of [`crate::DurableCalls::answer_delivered`] when what was last appended for
    /// `to` is written.
    pub(crate) fn note_delivered(&mut self, to: &D::Peer, number: u64) {
        self.driver.effects().delivered.push((to.clone(), number));
    }

    pub(crate) fn audit(&mut self, by: &D::Peer, audit: &Audit<'_>) {
        self.driver.observe(Observed::Audit(by, audit));
    }

    pub(crate) fn next_number(&mut self) -> u64 {
        self.with_numbers(Numbers::next_call)
    }

    pub(crate) fn block_version(&mut self, storage: StorageId) -> u64 {
        self.driver.block_version(storage, None)
    }

    pub(crate) fn version_noted(&mut self, storage: StorageId, version: u64) -> u64 {
        self.driver.block_version(storage, Some(version))
    }
}
