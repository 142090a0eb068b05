//! The core's driver: pools and registry behind mutexes, outboxes written to sockets.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use latzero_crypto::proof::{self, Exchange, Side};
use latzero_fabric::driver::{
    BlockStorage, BlockWrite, Check, Context, Observed, Promise, Report, Verifier, Written,
};
use latzero_fabric::ledger::Resource;
use latzero_fabric::link::Notice;
use latzero_fabric::memory::{Numbers, StorageId};
use latzero_fabric::pool::ParkedCounts;
use latzero_fabric::registry::View;
use latzero_fabric::rows::StoreChange;
use latzero_fabric::{Class, Driver, Effects, Now, Pool, Registry, Sent, Time, Turn};
use latzero_protocol::memory::Access;
use latzero_protocol::message::AdminAction;
use latzero_protocol::{AppId, BlockId, Code, PoolName, Refusal};
use serde_json::json;

use crate::blocks::{Blocks, Finished, JobResult};
use crate::handover::{self, Step};
use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::Socket;
use crate::stats::{Traffic, resources};
use crate::timers::PoolCell;

/// The driver of one loop.
pub(crate) struct IoHost {
    pub(crate) shared: Arc<ServerState>,
    home: usize,
    /// When the loop was woken.
    pub(crate) now: Now,
    pub(crate) effects: Effects<IoHost>,
    pub(crate) traffic: Traffic,
    /// Connections whose bytes the kernel has started or stopped to accept.
    pub(crate) changed: Vec<Arc<Peer>>,
    /// Connections with something to write, for which a flush had no time. Each is here once: what
    /// is appended to it meanwhile does not touch it again.
    behind: VecDeque<Arc<Peer>>,
    /// Notices that are due.
    noticed: Vec<Notice<Arc<PoolCell>>>,
    /// Connections to write to again after some time, because too many descriptors are in flight.
    pub(crate) crowded: Vec<Arc<Peer>>,
    /// Connections not to read for a while, because their users guess.
    pub(crate) resting: Vec<Arc<Peer>>,
    /// Descriptors that came with the current message.
    pub(crate) offers: VecDeque<OwnedFd>,
}

/// How long one flush writes, in microseconds.
const WRITES_US: u64 = 500;

/// How many connections are written between two looks at the clock.
const WRITES_PER_LOOK: u32 = 4;

/// The time that one flush may take.
#[derive(Default)]
struct WriteBudget {
    written: u32,
    until: Option<Time>,
    is_spent: bool,
}

impl WriteBudget {
    /// Counts a connection; returns whether the time is over. Most flushes write few, and never
    /// read the clock.
    fn spend_one(&mut self, shared: &ServerState) -> bool {
        self.written += 1;
        if !self.is_spent && self.written.is_multiple_of(WRITES_PER_LOOK) {
            let now = shared.clock.now();
            let until = *self.until.get_or_insert(Time(now.0 + WRITES_US));
            self.is_spent = now >= until;
        }
        self.is_spent
    }
}

impl IoHost {
    pub(crate) fn new(shared: &Arc<ServerState>, home: usize) -> Self {
        IoHost {
            shared: Arc::clone(shared),
            home,
            now: shared.clock.read(),
            effects: Effects::default(),
            traffic: Traffic::default(),
            changed: Vec::new(),
            behind: VecDeque::new(),
            noticed: Vec::new(),
            crowded: Vec::new(),
            resting: Vec::new(),
            offers: VecDeque::new(),
        }
    }

    /// Begins a step of the core.
    pub(crate) fn turn(&mut self) -> Turn<'_, IoHost> {
        Turn::new(self.now, self)
    }

    /// Runs `f` with the registry.
    pub(crate) fn with_registry<R>(
        &mut self,
        f: impl FnOnce(&mut Registry<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        self.turn().with_registry(f)
    }

    /// Runs `f` with one pool.
    pub(crate) fn with_pool<R>(
        &mut self,
        pool: &Arc<PoolCell>,
        f: impl FnOnce(&mut Pool<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        self.turn().with_pool(pool, f)
    }

    /// Makes the loop of `peer` read it, even if the kernel reports nothing.
    fn resume_reading(&mut self, peer: &Arc<Peer>) {
        if peer.home == self.home {
            self.effects.resumed.push(Arc::clone(peer));
        } else {
            self.shared.loops.mailboxes[peer.home].send(Command::Resume(Arc::clone(peer)));
        }
    }

    /// Adds the counters since the last call to the shared statistics.
    pub(crate) fn count(&mut self) {
        let now = self.now.monotonic;
        let stats = &self.shared.books.stats;
        stats.add(now, &mut self.effects.tally, &mut self.traffic);
    }

    /// Runs the jobs that a pool requested for its blocks, now that it is released. Slow ones go to
    /// the blocks' thread, and their results come back through the first loop's mailbox.
    fn run_block_jobs(&mut self, pool: &Arc<PoolCell>) {
        // Removals and additions of one pool are counted together: in between it might seem empty.
        let mut counted: Vec<(PoolName, u32, i32)> = Vec::new();
        for (name, number, change) in std::mem::take(&mut self.effects.held) {
            match counted.iter_mut().find(|(_, known, _)| *known == number) {
                Some((.., sum)) => *sum += change,
                None => counted.push((name, number, change)),
            }
        }
        for (name, number, change) in counted {
            let is_there =
                self.with_registry(|registry, _| registry.count_held(&name, number, change));
            if !is_there && change > 0 {
                // The pool was removed with its last member before the block was added to it.
                self.with_pool(pool, Pool::close_held);
            }
        }
        for job in std::mem::take(&mut self.effects.jobs) {
            if let Some(done) = Blocks::run_or_pass_on(&self.shared, pool, job) {
                self.handle_done(done);
            }
        }
    }

    /// Reports a finished block job to its pool.
    pub(crate) fn handle_done(&mut self, done: JobResult) {
        self.with_pool(&done.pool, |pool, turn| match done.what {
            Finished::Made(key, made) => pool.blocks().storage_made(key, made, turn),
            Finished::Flushed(key, ticket, version) => {
                pool.blocks().flushed(key, ticket, version, turn)
            }
            Finished::Written(slow, result) => pool.blocks().written(*slow, result, turn),
        });
    }

    /// Handles the deadlines of a pool that have passed.
    pub(crate) fn handle_timeout(&mut self, pool: &Arc<PoolCell>) {
        self.with_pool(pool, Pool::handle_timeout);
    }

    /// What is in the pools that a client may see.
    fn seen(&mut self, view: &View<'_>) -> Seen {
        let (pools, encrypted) = self.with_registry(|registry, _| registry.seen_pools(view));
        let mut seen = Seen {
            pools: pools.len(),
            encrypted,
            ..Seen::default()
        };
        for pool in &pools {
            let stats = self.with_pool(pool, |pool, _| pool.stats());
            seen.triggers += stats.triggers;
            seen.members += stats.members;
            seen.blocks += stats.blocks;
            seen.block_bytes += stats.block_bytes;
            seen.parked.add(&stats.parked);
        }
        seen.parked.oldest = seen.parked.oldest.map(|ms| self.now.unix_ms_of(ms));
        seen
    }

    fn stats(&mut self, view: &View<'_>) -> String {
        self.count();
        let now = self.now.monotonic;
        let mut counts = self.with_registry(|registry, _| registry.counts());
        let seen = self.seen(view);
        counts.pools = seen.pools;
        let mut stats = self.shared.books.stats.to_json(now);
        let identity = &self.shared.config.identity;
        let addresses = identity.addresses.iter();
        // Paths are not for everyone who reaches a port.
        let addresses = addresses.filter(|text| view.is_admin || !text.starts_with("unix:"));
        stats["server"] = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": identity.node,
            "pid": std::process::id(),
            "uptime_ms": now.since(self.shared.books.started).as_millis() as u64,
            "addresses": addresses.collect::<Vec<_>>(),
            "draining": self.shared.core.context.is_draining(),
            "pin": self.shared.access.tls.as_ref().map(|tls| tls.pin().to_string()),
            "io_threads": self.shared.loops.mailboxes.len(),
            "log_lines_lost": (self.shared.books.log_lines_lost)(),
        });
        if view.is_admin {
            stats["server"]["data_dir"] = json!(identity.data_dir);
        }
        let ledger = &self.shared.core.context.ledger;
        stats["transport"]["outbox_bytes"] = ledger.all().used(Resource::Outbox).into();
        stats["apps"] = json!(counts);
        stats["pools"] = json!({
            "pools": seen.pools, "encrypted": seen.encrypted, "memberships": seen.members,
        });
        stats["triggers"]["served"] = seen.triggers.into();
        stats["parked"] = json!(seen.parked);
        // Totals over all pools would count those that are hidden from the client.
        if view.is_admin {
            stats["ledger"] = ledger.to_json();
            let blocks = &self.shared.storage.blocks;
            stats["memory"] = blocks.to_json(&self.shared.core.context.limits, ledger);
        } else {
            stats["memory"] = json!({"blocks": seen.blocks, "bytes": seen.block_bytes});
        }
        stats["store"] = self.shared.storage.persistence.to_json();
        stats["resources"] = resources(&self.shared.config.machine);
        stats.to_string()
    }
}

/// What is in the pools that a client may see.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) pools: usize,
    encrypted: usize,
    members: usize,
    triggers: usize,
    pub(crate) blocks: usize,
    block_bytes: u64,
    pub(crate) parked: ParkedCounts,
}

impl IoHost {
    /// Removes from a report what is in pools that are hidden from a client.
    fn hide(&mut self, report: &mut serde_json::Value, view: &View<'_>) {
        let memory = &mut report["components"]["memory"]["seen"];
        if let Some(corrupt) = memory["corrupt"].as_array_mut() {
            corrupt.retain(|of| self.may_see(of["pool"].as_str().unwrap_or_default(), view));
            memory["corrupt_total"] = memory["corrupt"].as_array().map(Vec::len).into();
        }
        if let Some(losses) = report["losses"].as_array_mut() {
            losses.retain(|loss| self.may_know(loss, view));
            report["losses_total"] = report["losses"].as_array().map(Vec::len).into();
        }
    }

    /// Whether a client without administrator rights may see a loss: not in a pool that is hidden
    /// from it.
    fn may_know(&mut self, loss: &serde_json::Value, view: &View<'_>) -> bool {
        let affected = loss["affected"].as_str().unwrap_or_default();
        let Some((_, pool)) = affected.split_once("pool '") else {
            return true;
        };
        self.may_see(pool.split('\'').next().unwrap_or_default(), view)
    }

    fn may_see(&mut self, pool: &str, view: &View<'_>) -> bool {
        let name = PoolName::new(pool);
        name.is_ok_and(|name| {
            self.with_registry(|registry, _| registry.describe_pool(&name, view).is_ok())
        })
    }
}

impl BlockStorage for IoHost {
    type Fd = Arc<OwnedFd>;

    fn descriptor(&self, storage: StorageId, access: Access) -> Option<Arc<OwnedFd>> {
        self.shared.storage.blocks.descriptor(storage, access)
    }

    fn block_version(&mut self, storage: StorageId, noted: Option<u64>) -> u64 {
        match noted {
            Some(version) => self.shared.storage.blocks.note_version(storage, version),
            None => self.shared.storage.blocks.version(storage),
        }
    }

    fn set_fence(&mut self, storage: StorageId, fence: u64, is_held: bool) {
        self.shared
            .storage
            .blocks
            .set_fence(storage, fence, is_held);
    }

    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal> {
        let blocks = &self.shared.storage.blocks;
        if range.is_empty() {
            blocks.check(storage)?;
            return Ok((Vec::new(), blocks.version(storage)));
        }
        let length = usize::try_from(range.end - range.start).expect("it fits into a frame");
        let mut buffer = self.effects.buffers.take(length);
        buffer.resize(length, 0);
        match blocks.read(storage, range.start, &mut buffer, if_version) {
            Ok(version) => Ok((buffer, version)),
            Err(refusal) => {
                self.effects.buffers.recycle(buffer);
                Err(refusal)
            }
        }
    }

    fn write_block(
        &mut self,
        storage: StorageId,
        write: &BlockWrite<'_>,
    ) -> Result<Written, Refusal> {
        self.shared.storage.blocks.write(storage, write)
    }

    fn awaited_owner(&self, pool: &PoolName, block: Option<&BlockId>) -> Option<AppId> {
        self.shared.storage.blocks.awaited_owner(pool, block)
    }
}

impl Verifier for IoHost {
    type Peer = Arc<Peer>;

    fn admin_mac(&self, exchange: &Exchange, mac: &[u8; 32]) -> Option<[u8; 32]> {
        let token = self.shared.access.token.bytes();
        proof::verify_admin(&token, Side::Client, exchange, mac)
            .then(|| proof::admin_mac(&token, Side::Server, exchange))
    }

    fn may_prove(&mut self, asker: &Arc<Peer>) -> bool {
        let user = asker.socket.as_ref().map(Socket::user);
        let may = user.is_none_or(|user| self.shared.attempts().may(user, self.now.monotonic));
        if !may && !asker.is_resting.swap(true, Relaxed) {
            self.resting.push(Arc::clone(asker));
        }
        may
    }

    fn verify(
        &mut self,
        asker: &Arc<Peer>,
        check: Check,
        is_guess: bool,
    ) -> Result<Option<bool>, Refusal> {
        let verifier = &self.shared.access.verifier;
        let passed = verifier.pass_on(&self.shared, asker, check, is_guess);
        passed.map(|()| None)
    }

    fn note_refused(&mut self, asker: &Arc<Peer>) {
        if let Some(socket) = &asker.socket {
            self.shared
                .attempts()
                .note(socket.user(), self.now.monotonic);
        }
    }
}

impl Driver for IoHost {
    type Pool = Arc<PoolCell>;

    #[inline]
    fn effects(&mut self) -> &mut Effects<IoHost> {
        &mut self.effects
    }

    #[inline]
    fn context(&self) -> &Arc<Context> {
        &self.shared.core.context
    }

    fn new_pool(pool: Pool<Self>) -> Arc<PoolCell> {
        PoolCell::new(pool)
    }

    fn with_registry<R>(
        turn: &mut Turn<'_, Self>,
        f: impl FnOnce(&mut Registry<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        let shared = Arc::clone(&turn.driver.shared);
        let mut registry = shared
            .core
            .registry
            .lock()
            .expect("a panic under the registry's lock ends the server");
        f(&mut registry, turn)
    }

    #[inline]
    fn with_pool<R>(
        turn: &mut Turn<'_, Self>,
        pool: &Arc<PoolCell>,
        f: impl FnOnce(&mut Pool<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        let mut guard = pool
            .pool
            .lock()
            .expect("a panic under a pool's lock ends the server");
        let result = f(&mut guard, turn);
        let host = &mut *turn.driver;
        let is_first = match guard.next_deadline() {
            Some(deadline) if guard.is_due_to_wake() => host.shared.core.timers.arm(pool, deadline),
            // Without members and waiting calls there are no deadlines; a pool that is removed
            // should not stay for its last deadline.
            _ => {
                host.shared.core.timers.disarm(pool);
                false
            }
        };
        drop(guard);
        if is_first && host.home != 0 {
            host.shared.loops.mailboxes[0].send(Command::Look);
        }
        for (peer, number) in std::mem::take(&mut host.effects.delivered) {
            let notice = Notice {
                pool: Arc::clone(pool),
                number,
            };
            let is_due = peer.link().outbox.notify_when_written(notice);
            host.noticed.extend(is_due);
        }
        if !host.effects.jobs.is_empty() || !host.effects.held.is_empty() {
            host.run_block_jobs(pool);
        }
        result
    }

    fn with_numbers<R>(&mut self, f: impl FnOnce(&mut Numbers) -> R) -> R {
        self.shared.storage.blocks.with_numbers(f)
    }

    fn store(&mut self, change: StoreChange, promise: Option<Promise<'_, IoHost>>) {
        self.shared.storage.persistence.write(change, promise);
    }

    fn reoffer(
        turn: &mut Turn<'_, Self>,
        pool: &Arc<PoolCell>,
        name: &PoolName,
        block: &BlockId,
    ) -> Result<(), Refusal> {
        let host = &mut *turn.driver;
        let offered = host.offers.pop_front();
        let row = host.shared.storage.blocks.awaited_row(name, block)?;
        let Some(offered) = offered else {
            let message = "no descriptor was received; send it over the Unix socket, with the \
                first byte of the message";
            return Err(Refusal::new(Code::BadMessage, message));
        };
        crate::blocks::reoffer(host, pool, (name, block), &row, &offered)
    }

    fn report(turn: &mut Turn<'_, Self>, what: Report, view: &View<'_>) -> String {
        match what {
            Report::Stats => turn.driver.stats(view),
            Report::Health => {
                let host = &mut *turn.driver;
                let seen = host.seen(view);
                let now = host.now.monotonic;
                let mut report = crate::health::report(&host.shared, &seen, now);
                if !view.is_admin {
                    host.hide(&mut report, view);
                }
                report.to_string()
            }
        }
    }

    fn random(&mut self) -> [u8; 32] {
        crate::random::bytes()
    }

    fn admin(
        &mut self,
        action: &AdminAction,
        asker: &Arc<Peer>,
        id: Option<&str>,
    ) -> Result<Option<String>, Refusal> {
        match action {
            AdminAction::Shutdown => {
                tracing::info!("stopping: requested by an administrator");
                self.shared.drain();
                let reply = json!({"draining": true, "pid": std::process::id()});
                Ok(Some(reply.to_string()))
            }
            AdminAction::Reload => (self.shared.config.reload)(&self.shared)
                .map(Some)
                .map_err(|message| Refusal::new(Code::BadMessage, message)),
            AdminAction::HandOver { taken } => {
                handover::check_asker(asker)?;
                let step = if *taken { Step::Taken } else { Step::Give };
                let command = Command::HandOver(Arc::clone(asker), id.map(Into::into), step);
                self.shared.loops.mailboxes[0].send(command);
                Ok(None)
            }
            AdminAction::Backup { .. }
            | AdminAction::CheckDatabase(_)
            | AdminAction::QueryDatabase(_) => {
                crate::maintenance::begin(&self.shared, action.clone(), asker, id)?;
                Ok(None)
            }
            AdminAction::Kick(..) | AdminAction::Forget(_) | AdminAction::RemoveKey(_) => {
                unreachable!("the session performs these")
            }
        }
    }

    #[inline]
    fn observe(&mut self, what: Observed<'_, Self>) {
        match what {
            Observed::Message(_, Class::Emit | Class::Event, Sent::Full, _) => {
                self.shared.books.stats.messages_lost.fetch_add(1, Relaxed);
            }
            Observed::Message(..) => {}
            Observed::Lost(_, count) => {
                self.shared
                    .books
                    .stats
                    .messages_lost
                    .fetch_add(count, Relaxed);
            }
            // The actions of the server itself are in its log.
            Observed::Audit(by, audit) if by.socket.is_some() => {
                self.shared.books.audit_log.note(by, audit);
            }
            Observed::Audit(..)
            | Observed::Closing(_)
            | Observed::Refused(_)
            | Observed::Counted(_) => {}
        }
    }
}

impl IoHost {
    /// Writes what was appended since the last flush, each connection once, and lets the built-in
    /// app answer. A message may go to thousands of connections: those that this flush has no time
    /// for are behind those that are appended to in the meantime ([`IoHost::catch_up`]).
    pub(crate) fn flush(&mut self) {
        self.shared.books.stats.add_started(&mut self.effects.tally);
        let mut budget = WriteBudget::default();
        while !self.effects.touched.is_empty() {
            self.effects.appended = 0;
            for peer in std::mem::take(&mut self.effects.touched) {
                // The built-in app takes what waits for it without a write that would settle its
                // account.
                if budget.spend_one(&self.shared) && peer.socket.is_some() {
                    peer.link().defer();
                    self.behind.push_back(peer);
                } else {
                    self.flush_peer(&peer);
                }
            }
        }
    }

    /// Writes connections that flushes had no time for; returns whether there are more.
    pub(crate) fn catch_up(&mut self) -> bool {
        let mut budget = WriteBudget::default();
        while let Some(peer) = self.behind.pop_front() {
            self.flush_peer(&peer);
            if budget.spend_one(&self.shared) {
                break;
            }
        }
        self.is_behind()
    }

    /// Whether connections wait for [`IoHost::catch_up`].
    pub(crate) fn is_behind(&self) -> bool {
        !self.behind.is_empty()
    }

    /// Notifies a pool that the awaited row of an answer is on disk, or cannot be stored.
    pub(crate) fn answer_stored(&mut self, name: &PoolName, number: u64, is_on_disk: bool) {
        let pool = self
            .turn()
            .with_registry(|registry, _| registry.pool(name).cloned());
        if let Some(pool) = pool {
            self.with_pool(&pool, |pool, turn| {
                pool.durable().answer_stored(number, is_on_disk, turn);
            });
        }
    }

    /// Writes as much of one connection's outbox as its socket accepts, and reports deliveries that
    /// pools wait for.
    pub(crate) fn flush_peer(&mut self, peer: &Arc<Peer>) {
        self.write_to(peer);
        while !self.noticed.is_empty() {
            let mut noticed = std::mem::take(&mut self.noticed).into_iter().peekable();
            while let Some(Notice { pool, number }) = noticed.next() {
                let mut numbers = vec![number];
                while let Some(next) = noticed.next_if(|next| Arc::ptr_eq(&next.pool, &pool)) {
                    numbers.push(next.number);
                }
                self.with_pool(&pool, |pool, turn| {
                    numbers
                        .iter()
                        .for_each(|&number| pool.durable().answer_delivered(number, turn));
                });
            }
        }
    }

    fn write_to(&mut self, peer: &Arc<Peer>) {
        let Some(socket) = &peer.socket else {
            let shared = Arc::clone(&self.shared);
            let mut builtin = shared
                .core
                .builtin
                .lock()
                .expect("a panic in the built-in app ends the server");
            if let Some(builtin) = builtin.as_mut().filter(|builtin| builtin.is(peer)) {
                builtin.turn(self);
            }
            return;
        };
        loop {
            let Some(mut taken) = peer.link().outbox.take() else {
                return;
            };
            let (mut written, mut is_dead, mut is_crowded) = (0, false, false);
            while !taken.is_done() {
                let (bytes, descriptors) = taken.next();
                match socket.write_with(bytes, descriptors) {
                    Ok(n) => {
                        taken.advance(n);
                        written += n;
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        is_dead = error.kind() != std::io::ErrorKind::WouldBlock;
                        is_crowded = crate::socket::is_crowded(&error);
                        break;
                    }
                }
            }
            self.traffic.bytes_out += written as u64;
            let mut link = peer.link();
            let was_blocked = link.outbox.is_blocked();
            let reusable = link.put_back(self.now.monotonic, taken, written);
            if is_dead {
                if was_blocked {
                    self.shared.books.stats.slow_readers.fetch_sub(1, Relaxed);
                }
                link.close();
                drop(link);
                // What it sent before is still handled, then its own loop ends it.
                peer.write_failed.store(true, Relaxed);
                self.resume_reading(peer);
                return;
            }
            while let Some(notice) = link.outbox.take_notice() {
                self.noticed.push(notice);
            }
            let is_blocked = link.outbox.is_blocked();
            if is_blocked != was_blocked {
                if is_blocked {
                    self.shared.books.stats.slow_readers.fetch_add(1, Relaxed);
                } else {
                    self.shared.books.stats.slow_readers.fetch_sub(1, Relaxed);
                }
                self.changed.push(Arc::clone(peer));
            }
            drop(link);
            if let Some(buf) = reusable {
                self.effects.buffers.recycle(buf);
            }
            if is_blocked {
                if is_crowded {
                    self.crowded.push(Arc::clone(peer));
                }
                return;
            }
        }
    }
}
