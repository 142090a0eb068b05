//! The fabric's host: its pools and registry behind mutexes, its effects as bytes in outboxes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use latzero_fabric::memory::{Change, Descriptor, Job, Ledger, StorageId};
use latzero_fabric::{CallEnd, Class, Count, Effects, Host, Limits, Pool, Registry, Sent, Time};
use latzero_protocol::memory::Access;
use latzero_protocol::message::AdminAction;
use latzero_protocol::{BlockId, Code, PoolName, Refusal};
use serde_json::json;

use crate::blocks::{Blocks, Done, Finished};
use crate::handover::{self, Step};
use crate::peer::Peer;
use crate::shared::{Command, Shared};
use crate::stats::{Batch, resources};
use crate::timers::PoolCell;

/// Spare buffers that a loop keeps, and the largest that it keeps.
const SPARE_MAX: usize = 64;
const SPARE_BYTES_MAX: usize = 1024 * 1024;

/// Larger buffers that a loop keeps, for frames that need them: fresh memory costs more than the copy into it.
const LARGE_MAX: usize = 2;
const LARGE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Largest buffer for copies of blocks that a loop keeps.
const READ_BUFFER_BYTES_KEPT: usize = 16 * 1024 * 1024;

/// Effects of one loop: appended to outboxes at once, written when the loop flushes.
pub(crate) struct IoEffects {
    shared: Arc<Shared>,
    home: usize,
    /// Connections with something appended since the last flush, in the order of their first append.
    pub(crate) touched: Vec<Arc<Peer>>,
    /// Something was refused because all outboxes together are full.
    pub(crate) is_over_total: bool,
    /// Bytes appended since the last flush, about.
    pub(crate) appended: usize,
    /// Connections to close once their outbox is written.
    pub(crate) closing: Vec<Arc<Peer>>,
    /// Connections of this loop that may be read again.
    pub(crate) resumed: Vec<Arc<Peer>>,
    pub(crate) batch: Batch,
    spare: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    /// What pools asked for while they were held: jobs about blocks, and changes in their number.
    jobs: Vec<Job<Arc<Peer>>>,
    counted: Vec<(PoolName, u32, i32)>,
    /// What was appended that a pool wants to know of when it has left.
    told: Vec<(Arc<Peer>, u64)>,
}

impl IoEffects {
    fn new(shared: Arc<Shared>, home: usize) -> Self {
        IoEffects {
            shared,
            home,
            touched: Vec::new(),
            is_over_total: false,
            appended: 0,
            closing: Vec::new(),
            resumed: Vec::new(),
            batch: Batch::default(),
            spare: Vec::new(),
            large: Vec::new(),
            jobs: Vec::new(),
            counted: Vec::new(),
            told: Vec::new(),
        }
    }

    pub(crate) fn recycle(&mut self, mut buf: Vec<u8>) {
        buf.clear();
        if buf.capacity() <= SPARE_BYTES_MAX {
            if self.spare.len() < SPARE_MAX {
                self.spare.push(buf);
            }
        } else if self.large.len() < LARGE_MAX && buf.capacity() <= LARGE_BYTES_MAX {
            self.large.push(buf);
        }
    }

    /// A large buffer, where one is kept.
    pub(crate) fn large(&mut self) -> Option<Vec<u8>> {
        self.large.pop()
    }

    /// Has `peer` read again if its loop stopped and may go on.
    fn resume(&mut self, peer: &Arc<Peer>) {
        if peer.is_paused.load(SeqCst) && !peer.should_pause(self.shared.limits.in_flight_max) {
            peer.is_paused.store(false, SeqCst);
            self.read_again(peer);
        }
    }

    /// Has the loop of `peer` read it, whether the kernel says that there is something or not.
    fn read_again(&mut self, peer: &Arc<Peer>) {
        if peer.home == self.home {
            self.resumed.push(Arc::clone(peer));
        } else {
            self.shared.mailboxes[peer.home].send(Command::Resume(Arc::clone(peer)));
        }
    }
}

impl IoEffects {
    #[inline]
    pub(crate) fn append(
        &mut self,
        to: &Arc<Peer>,
        class: Class,
        length: usize,
        descriptors: Vec<Arc<OwnedFd>>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        let mut outbox = to.outbox();
        let before = outbox.queued();
        // All outboxes together are bounded too: the largest one goes, and until then nothing is added.
        let is_over_total = outbox.is_blocked()
            && class != Class::Control
            && before > 0
            && self.shared.stats.outbox_bytes.load(Relaxed) + length > self.shared.outbox_total_max;
        self.is_over_total |= is_over_total;
        let spare = if length > SPARE_BYTES_MAX {
            &mut self.large
        } else {
            &mut self.spare
        };
        let carries = !descriptors.is_empty();
        if carries {
            outbox.attach(descriptors);
        }
        let sent = if is_over_total {
            outbox.refuse(class)
        } else {
            outbox.append(
                class,
                length,
                self.shared.bounds,
                || spare.pop().unwrap_or_default(),
                encode,
            )
        };
        if carries && sent != Sent::Queued {
            outbox.detach();
        }
        match sent {
            Sent::Queued => {
                let added = outbox.queued() - before;
                if outbox.is_blocked() {
                    outbox.account();
                    self.shared.stats.outbox_bytes.fetch_add(added, Relaxed);
                } else if before == 0 {
                    drop(outbox);
                    self.touched.push(Arc::clone(to));
                }
                self.appended += added;
            }
            Sent::Full if class == Class::Control => {
                // Not even its end could be told: the connection goes.
                drop(outbox);
                self.closing.push(Arc::clone(to));
            }
            Sent::Full if matches!(class, Class::Emit | Class::Event) => {
                self.shared.stats.messages_lost.fetch_add(1, Relaxed);
            }
            Sent::Full | Sent::Gone => {}
        }
        sent
    }
}

impl Effects for IoEffects {
    type Peer = Arc<Peer>;

    #[inline]
    fn send(
        &mut self,
        to: &Arc<Peer>,
        class: Class,
        length: usize,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        self.append(to, class, length, Vec::new(), encode)
    }

    fn close(&mut self, peer: &Arc<Peer>) {
        self.closing.push(Arc::clone(peer));
    }

    #[inline]
    fn in_flight(&self, peer: &Arc<Peer>) -> u32 {
        peer.in_flight.load(Relaxed)
    }

    #[inline]
    fn call_started(&mut self, caller: Option<&Arc<Peer>>, handler: &Arc<Peer>) {
        if let Some(caller) = caller {
            caller.in_flight.fetch_add(1, SeqCst);
        }
        handler.owed.fetch_add(1, SeqCst);
        self.shared.stats.calls_in_flight.fetch_add(1, Relaxed);
        // Its answers may be what its own calls wait for.
        self.resume(handler);
    }

    #[inline]
    fn call_ended(&mut self, caller: Option<&Arc<Peer>>, handler: &Arc<Peer>, end: CallEnd) {
        if let Some(caller) = caller {
            caller.in_flight.fetch_sub(1, SeqCst);
        }
        handler.owed.fetch_sub(1, SeqCst);
        self.shared.stats.calls_in_flight.fetch_sub(1, Relaxed);
        self.batch.call_ended(end);
        if let Some(caller) = caller {
            self.resume(caller);
        }
    }

    fn refused(&mut self, code: Code) {
        self.batch.refused(code);
    }

    fn count(&mut self, what: Count) {
        self.batch.count(what);
    }

    fn send_with(
        &mut self,
        to: &Arc<Peer>,
        class: Class,
        length: usize,
        descriptors: &[Descriptor],
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Sent {
        let blocks = &self.shared.blocks;
        let descriptors = descriptors.iter().map(|d| {
            blocks
                .descriptor(d.storage, d.access)
                .expect("the pool asked whether it can be shared")
        });
        let descriptors = descriptors.collect();
        self.append(to, class, length, descriptors, encode)
    }

    fn block_changed(&mut self, to: &Arc<Peer>, change: &Change<'_>) {
        if to.outbox().note_change(change.topic, change.to_json()) {
            self.touched.push(Arc::clone(to));
        }
    }

    fn block_job(&mut self, job: Job<Arc<Peer>>) {
        self.jobs.push(job);
    }

    fn keep(&mut self, change: latzero_fabric::keep::Change, promise: Option<&Arc<Peer>>) {
        self.shared.keeper.keep(change, promise);
    }

    fn note_told(&mut self, to: &Arc<Peer>, number: u64) {
        self.told.push((Arc::clone(to), number));
    }

    fn audit(&mut self, by: &Arc<Peer>, audit: &latzero_fabric::Audit<'_>) {
        // The server's own doings are in its log.
        if by.socket.is_some() {
            self.shared.audit_log.note(by, audit);
        }
    }

    fn next_number(&mut self) -> u64 {
        self.shared.keeper.next_number()
    }

    fn unix_ms(&self, now: Time) -> u64 {
        self.shared.clock.unix_ms(now)
    }

    fn count_held(&mut self, pool: &PoolName, number: u32, change: i32) {
        self.counted.push((pool.clone(), number, change));
    }

    fn with_ledger<R>(&mut self, f: impl FnOnce(&mut Ledger) -> R) -> R {
        self.shared.blocks.with_ledger(f)
    }

    fn block_version(&self, storage: StorageId) -> u64 {
        self.shared.blocks.version(storage)
    }

    fn version_noted(&mut self, storage: StorageId, version: u64) -> u64 {
        self.shared.blocks.note_version(storage, version)
    }

    fn set_fence(&mut self, storage: StorageId, fence: u64, is_held: bool) {
        self.shared.blocks.set_fence(storage, fence, is_held);
    }

    fn can_share(&self, storage: StorageId, access: Access) -> bool {
        self.shared.blocks.descriptor(storage, access).is_some()
    }
}

/// The host of the sessions of one loop.
pub(crate) struct IoHost {
    pub(crate) shared: Arc<Shared>,
    pub(crate) fx: IoEffects,
    /// Connections that the kernel began or ceased to take bytes of.
    pub(crate) changed: Vec<Arc<Peer>>,
    /// What pools are to be told has left for its receiver.
    left: Vec<(Arc<PoolCell>, u64)>,
    /// Connections to write to again by the clock: too many descriptors are on their way.
    pub(crate) crowded: Vec<Arc<Peer>>,
    /// For copies of blocks on their way into an outbox.
    read_buffer: Vec<u8>,
    /// Descriptors that came with what is being run.
    pub(crate) offers: VecDeque<OwnedFd>,
}

impl IoHost {
    pub(crate) fn new(shared: &Arc<Shared>, home: usize) -> Self {
        IoHost {
            shared: Arc::clone(shared),
            fx: IoEffects::new(Arc::clone(shared), home),
            changed: Vec::new(),
            left: Vec::new(),
            crowded: Vec::new(),
            read_buffer: Vec::new(),
            offers: VecDeque::new(),
        }
    }

    /// Does what a pool asked for about its blocks, now that it is free. What takes long goes to the blocks' own thread,
    /// whose word comes back through the first loop's mailbox.
    fn see_to_blocks(&mut self, pool: &Arc<PoolCell>) {
        // What went and came of one pool is told at once: in between it might seem to hold nothing.
        let mut counted: Vec<(PoolName, u32, i32)> = Vec::new();
        for (name, number, change) in std::mem::take(&mut self.fx.counted) {
            match counted.iter_mut().find(|(_, known, _)| *known == number) {
                Some((.., sum)) => *sum += change,
                None => counted.push((name, number, change)),
            }
        }
        for (name, number, change) in counted {
            let is_there =
                self.with_registry(|registry, _| registry.count_held(&name, number, change));
            if !is_there && change > 0 {
                // The pool went with its last member while the block was on its way into it.
                self.with_pool(pool, Pool::close_held);
            }
        }
        for job in std::mem::take(&mut self.fx.jobs) {
            if let Some(done) = Blocks::run_or_pass_on(&self.shared, pool, job) {
                self.handle_done(done);
            }
        }
    }

    /// Tells a pool that something about its blocks is done.
    pub(crate) fn handle_done(&mut self, done: Done) {
        let now = self.shared.clock.now();
        self.with_pool(&done.pool, |pool, fx| match done.what {
            Finished::Made(key, made) => pool.storage_made(now, key, made, fx),
            Finished::Flushed(key, ticket, version) => pool.flushed(key, ticket, version, fx),
        });
    }

    /// Ends what is due in a pool.
    pub(crate) fn handle_timeout(&mut self, now: Time, pool: &Arc<PoolCell>) {
        self.with_pool(pool, |pool, fx| pool.handle_timeout(now, fx));
    }
}

impl Host for IoHost {
    type Peer = Arc<Peer>;
    type Pool = Arc<PoolCell>;
    type Effects = IoEffects;

    fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    fn effects(&mut self) -> &mut IoEffects {
        &mut self.fx
    }

    fn with_registry<R>(&mut self, f: impl FnOnce(&mut Registry<Self>, &mut IoEffects) -> R) -> R {
        let mut registry = self
            .shared
            .registry
            .lock()
            .expect("a panic under the registry's lock ends the server");
        f(&mut registry, &mut self.fx)
    }

    #[inline]
    fn with_pool<R>(
        &mut self,
        pool: &Arc<PoolCell>,
        f: impl FnOnce(&mut Pool<Arc<Peer>>, &mut IoEffects) -> R,
    ) -> R {
        let mut guard = pool
            .pool
            .lock()
            .expect("a panic under a pool's lock ends the server");
        let result = f(&mut guard, &mut self.fx);
        let is_first = match guard.next_deadline() {
            Some(deadline) if guard.is_due_to_wake() => self.shared.timers.arm(pool, deadline),
            // Without members and what waits there are no calls; a pool that goes should not wait for its last deadline.
            _ => {
                self.shared.timers.disarm(pool);
                false
            }
        };
        drop(guard);
        if is_first && self.fx.home != 0 {
            self.shared.mailboxes[0].send(Command::Look);
        }
        for (peer, number) in std::mem::take(&mut self.fx.told) {
            if peer.outbox().note_leaving(pool, number) {
                self.left.push((Arc::clone(pool), number));
            }
        }
        if !self.fx.jobs.is_empty() || !self.fx.counted.is_empty() {
            self.see_to_blocks(pool);
        }
        result
    }

    fn new_pool(pool: Pool<Arc<Peer>>) -> Arc<PoolCell> {
        PoolCell::new(pool)
    }

    fn unix_ms(&self, now: Time) -> u64 {
        self.shared.clock.unix_ms(now)
    }

    fn identity(&self) -> (&str, &str) {
        (env!("CARGO_PKG_VERSION"), &self.shared.identity.node)
    }

    fn is_draining(&self) -> bool {
        self.shared.is_draining.load(Relaxed)
    }

    fn stats(&mut self, now: Time) -> String {
        self.shared.stats.add(now, &mut self.fx.batch);
        let (counts, pools) = self.with_registry(|registry, _| {
            (
                registry.counts(),
                registry
                    .pools()
                    .map(|(_, pool)| Arc::clone(pool))
                    .collect::<Vec<_>>(),
            )
        });
        let (mut triggers, mut members) = (0, 0);
        for pool in &pools {
            let stats = self.with_pool(pool, |pool, _| pool.stats());
            triggers += stats.triggers;
            members += stats.members;
        }
        let mut stats = self.shared.stats.to_json(now);
        stats["server"] = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": self.shared.identity.node,
            "pid": std::process::id(),
            "uptime_ms": now.since(self.shared.started).as_millis() as u64,
            "addresses": self.shared.identity.addresses,
            "data_dir": self.shared.identity.data_dir,
            "draining": self.is_draining(),
            "io_threads": self.shared.mailboxes.len(),
            "log_lines_lost": (self.shared.log_lines_lost)(),
        });
        stats["apps"] = json!(counts);
        stats["pools"] = json!({"pools": counts.pools, "memberships": members});
        stats["triggers"]["served"] = triggers.into();
        stats["memory"] = self.shared.blocks.to_json(&self.shared.limits);
        stats["store"] = self.shared.keeper.to_json();
        stats["resources"] = resources(&self.shared.surroundings);
        stats.to_string()
    }

    fn health(&mut self, now: Time) -> String {
        crate::health::report(&self.shared, now).to_string()
    }

    fn is_admin_token(&self, token: &str) -> bool {
        self.shared.token.matches(token)
    }

    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal> {
        let mut buffer = std::mem::take(&mut self.read_buffer);
        let length = usize::try_from(range.end - range.start).expect("it fits into a frame");
        buffer.resize(length, 0);
        match self
            .shared
            .blocks
            .read(storage, range.start, &mut buffer, if_version)
        {
            Ok(version) => Ok((buffer, version)),
            Err(refusal) => {
                self.recycle(buffer);
                Err(refusal)
            }
        }
    }

    fn take_back(
        &mut self,
        _now: Time,
        pool: &Arc<PoolCell>,
        name: &PoolName,
        block: &BlockId,
    ) -> Result<(), Refusal> {
        let offered = self.offers.pop_front();
        let row = self.shared.blocks.awaited_row(name, block)?;
        let Some(offered) = offered else {
            let message = "no descriptor came with it; it travels with the message's first byte, over the Unix socket";
            return Err(Refusal::new(Code::BadMessage, message));
        };
        crate::blocks::take_back(self, pool, (name, block), &row, &offered)
    }

    fn recycle(&mut self, buffer: Vec<u8>) {
        if buffer.capacity() <= READ_BUFFER_BYTES_KEPT {
            self.read_buffer = buffer;
        }
    }

    fn check_block(&mut self, storage: StorageId) -> Result<(), Refusal> {
        self.shared.blocks.check(storage)
    }

    fn write_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        data: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, Refusal> {
        self.shared.blocks.write(storage, offset, data, if_version)
    }

    fn swap_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        expected: &[u8],
        data: &[u8],
    ) -> Result<(u64, Option<Vec<u8>>), Refusal> {
        self.shared.blocks.swap(storage, offset, expected, data)
    }

    fn admin(
        &mut self,
        action: &AdminAction,
        asker: &Arc<Peer>,
        id: Option<&str>,
    ) -> Result<Option<String>, Refusal> {
        match action {
            AdminAction::Shutdown => {
                tracing::info!("stopping, as an administrator asked");
                self.shared.drain();
                let reply = json!({"draining": true, "pid": std::process::id()});
                Ok(Some(reply.to_string()))
            }
            AdminAction::Reload => (self.shared.reload)(&self.shared)
                .map(Some)
                .map_err(|message| Refusal::new(Code::BadMessage, message)),
            AdminAction::HandOver { taken } => {
                handover::check_asker(asker)?;
                let step = if *taken { Step::Taken } else { Step::Give };
                let command = Command::HandOver(Arc::clone(asker), id.map(Into::into), step);
                self.shared.mailboxes[0].send(command);
                Ok(None)
            }
            AdminAction::Backup(_) | AdminAction::CheckDatabase(_) => {
                crate::upkeep::begin(&self.shared, action.clone(), asker, id)?;
                Ok(None)
            }
            AdminAction::Kick(..) | AdminAction::Forget(_) => {
                unreachable!("the session carries these out")
            }
        }
    }
}

impl IoHost {
    /// Writes what was appended since the last flush, each connection once, and lets the built-in app answer.
    pub(crate) fn flush(&mut self, now: Time) {
        while !self.fx.touched.is_empty() {
            self.fx.appended = 0;
            for peer in std::mem::take(&mut self.fx.touched) {
                self.flush_peer(now, &peer);
            }
        }
    }

    /// Writes what waits for one connection, as far as its socket takes it, and tells pools what they wait for of it.
    pub(crate) fn flush_peer(&mut self, now: Time, peer: &Arc<Peer>) {
        self.write_to(now, peer);
        while !self.left.is_empty() {
            let mut left = std::mem::take(&mut self.left).into_iter().peekable();
            while let Some((pool, number)) = left.next() {
                let mut numbers = vec![number];
                while let Some((_, number)) = left.next_if(|(next, _)| Arc::ptr_eq(next, &pool)) {
                    numbers.push(number);
                }
                self.with_pool(&pool, |pool, fx| {
                    numbers.iter().for_each(|&number| pool.told(number, fx));
                });
            }
        }
    }

    fn write_to(&mut self, now: Time, peer: &Arc<Peer>) {
        let Some(socket) = &peer.socket else {
            let shared = Arc::clone(&self.shared);
            let mut builtin = shared
                .builtin
                .lock()
                .expect("a panic in the built-in app ends the server");
            if let Some(builtin) = builtin.as_mut().filter(|builtin| builtin.is(peer)) {
                builtin.turn(now, self);
            }
            return;
        };
        loop {
            let Some(mut taken) = peer.outbox().take() else {
                return;
            };
            let start = taken.head;
            let (mut is_dead, mut is_crowded) = (false, false);
            while taken.head < taken.buf.len() {
                let (bytes, descriptors) = taken.next();
                match socket.write_with(bytes, descriptors) {
                    Ok(n) => taken.advance(n),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => {
                        is_dead = error.kind() != std::io::ErrorKind::WouldBlock;
                        is_crowded = crate::socket::is_crowded(&error);
                        break;
                    }
                }
            }
            let written = taken.head - start;
            self.fx.batch.bytes_out += written as u64;
            let mut outbox = peer.outbox();
            let was_blocked = outbox.is_blocked();
            let reusable = outbox.put_back(taken);
            let (before, after) = outbox.account();
            // Under the outbox's lock: another loop may be next to write, and what it notes must come after this.
            self.shared.stats.outbox_bytes.fetch_add(after, Relaxed);
            self.shared.stats.outbox_bytes.fetch_sub(before, Relaxed);
            if is_dead {
                let accounted = outbox.close();
                self.shared.stats.outbox_bytes.fetch_sub(accounted, Relaxed);
                drop(outbox);
                // What it sent before is still run, then its own loop ends it.
                peer.is_deaf.store(true, Relaxed);
                self.fx.read_again(peer);
                return;
            }
            while let Some(left) = outbox.take_left() {
                self.left.push(left);
            }
            let is_blocked = outbox.is_blocked();
            if is_blocked && (written > 0 || !was_blocked) {
                peer.stalled_since.store(now.0.max(1), Relaxed);
            }
            if is_blocked != was_blocked {
                self.note_change(peer, is_blocked);
            }
            drop(outbox);
            if is_blocked {
                if is_crowded {
                    self.crowded.push(Arc::clone(peer));
                }
                return;
            }
            if let Some(buf) = reusable {
                self.fx.recycle(buf);
            }
        }
    }

    /// Called with the peer's outbox held.
    fn note_change(&mut self, peer: &Arc<Peer>, is_blocked: bool) {
        let mut blocked = self
            .shared
            .blocked
            .lock()
            .expect("no panic happens under this lock");
        if is_blocked {
            blocked.push(Arc::clone(peer));
        } else {
            peer.stalled_since.store(0, Relaxed);
            blocked.retain(|p| !Arc::ptr_eq(p, peer));
        }
        drop(blocked);
        self.changed.push(Arc::clone(peer));
    }
}
