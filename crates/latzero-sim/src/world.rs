//! A server without sockets, clock or threads: the real fabric, driven by whoever holds the [`World`].
//!
//! Bytes go in through [`World::feed`] and come out through [`World::read`], as they would over a socket. Time stands
//! still until [`World::advance`] moves it, and deadlines on the way fire at their very moment.

use std::cell::RefCell;
use std::rc::Rc;

use latzero_fabric::memory::{Job, StorageId};
use latzero_fabric::session::Terms;
use latzero_fabric::{
    Class, Effects as _, Flow, Host, Limits, Pool, Registry, Session, Time, Transport,
};
use latzero_protocol::frame::{self, Accept, Frame};
use latzero_protocol::message::AdminAction;
use latzero_protocol::{Code, PoolName, Refusal, encode};
use serde_json::Value;

use crate::outbox::{Bounds, Event, Outboxes, Peer, Totals};

/// A pool of the world.
pub type PoolHandle = Rc<RefCell<Pool<Peer>>>;

/// The token that every simulated server takes for its administrator's.
pub const ADMIN_TOKEN: &str = "simulated-admin-token";

/// A moment's wall-clock time at the world's begin, in milliseconds since the Unix epoch.
pub(crate) const EPOCH_MS: u64 = 1_700_000_000_000;

/// Largest frame before the handshake, in bytes.
const MAX_FRAME_BEFORE_HANDSHAKE: usize = 64 * 1024;

struct Connection {
    /// Taken out while it handles a frame, and gone when the connection has ended.
    session: Option<Session<World>>,
    received: Vec<u8>,
}

type Beside = Box<dyn FnOnce(&mut World)>;

/// One message that a client received.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// The JSON object.
    pub json: Value,
    /// The raw bytes of an attachment frame.
    pub attachment: Option<Vec<u8>>,
}

/// The simulated server, with the connections to it.
pub struct World {
    now: Time,
    limits: Limits,
    registry: Registry<World>,
    fx: Outboxes,
    connections: Vec<Connection>,
    is_draining: bool,
    touched: Vec<PoolHandle>,
    /// Whose promises were told of while another's message was handled.
    woken: Vec<Peer>,
    is_holding_told: bool,
    told_later: Vec<(PoolHandle, Peer, u64)>,
    /// What another thread of a server does while this one writes into a block.
    beside_write: Option<Beside>,
}

impl World {
    /// A server that has just started.
    #[must_use]
    pub fn new(seed: u64, limits: Limits, bounds: Bounds) -> Self {
        World {
            now: Time::default(),
            registry: Registry::new(EPOCH_MS, limits.clone(), seed),
            limits,
            fx: Outboxes::new(bounds),
            connections: Vec::new(),
            is_draining: false,
            touched: Vec::new(),
            woken: Vec::new(),
            is_holding_told: false,
            told_later: Vec::new(),
            beside_write: None,
        }
    }

    /// Has `f` happen in the middle of the next write into a block, as on a server with several threads.
    pub fn beside_next_write(&mut self, f: impl FnOnce(&mut World) + 'static) {
        self.beside_write = Some(Box::new(f));
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// The bounds in force.
    #[must_use]
    pub fn bounds_of_core(&self) -> &Limits {
        &self.limits
    }

    /// A new connection over `transport`.
    pub fn connect(&mut self, transport: Transport) -> Peer {
        let peer = self.fx.open();
        let terms = Terms {
            transport,
            is_admin: transport == Transport::BuiltIn,
            max_frame_before_handshake: MAX_FRAME_BEFORE_HANDSHAKE,
        };
        self.connections.push(Connection {
            session: Some(Session::new(peer, terms)),
            received: Vec::new(),
        });
        peer
    }

    /// Hands bytes of a client to the server, which handles every whole frame that it has by now.
    pub fn feed(&mut self, peer: Peer, bytes: &[u8]) {
        if !self.fx.is_open(peer) {
            return;
        }
        self.connections[peer.0 as usize]
            .received
            .extend_from_slice(bytes);
        let mut received = std::mem::take(&mut self.connections[peer.0 as usize].received);
        let mut used = 0;
        while self.fx.is_open(peer)
            && !self.is_waiting(peer)
            && let Some(length) = self.handle_first(peer, &received[used..])
        {
            used += length;
        }
        received.drain(..used);
        self.connections[peer.0 as usize].received = received;
        self.reap();
        // What others sent while they waited.
        for peer in std::mem::take(&mut self.woken) {
            self.feed(peer, &[]);
        }
    }

    fn is_waiting(&self, peer: Peer) -> bool {
        let session = self.connections[peer.0 as usize].session.as_ref();
        session.is_some_and(Session::is_waiting)
    }

    /// Handles the first frame of `bytes`; returns its length, or `None` where there is none yet or ever.
    fn handle_first(&mut self, peer: Peer, bytes: &[u8]) -> Option<usize> {
        let mut session = self.connections[peer.0 as usize].session.take()?;
        let decoded = frame::decode(bytes, session.accept(self));
        let (flow, used) = match decoded {
            Ok(None) => (Flow::Continue, None),
            Ok(Some((frame, used))) => {
                self.fx.note(Event::Handling {
                    peer,
                    json: frame.json.to_vec(),
                    attachment: frame.attachment.map(<[u8]>::to_vec),
                });
                let mut flow = session.handle(self.now, frame, self);
                while let Some((promised, went_well)) = self.fx.store.write_next() {
                    let Some(promised) = promised else {
                        continue;
                    };
                    flow = if promised == peer {
                        session.kept(self.now, kept(went_well), self)
                    } else {
                        self.tell_kept(promised, went_well);
                        self.woken.push(promised);
                        flow
                    };
                }
                self.fx.note(Event::Handled(peer));
                (flow, Some(used))
            }
            Err(error) => {
                self.fx.note(Event::Rejecting(peer));
                (session.reject(&error.into(), self), None)
            }
        };
        self.connections[peer.0 as usize].session = Some(session);
        if flow == Flow::Close {
            self.fx.close(&peer);
        }
        used
    }

    /// Tells a session whether what it was promised is on disk.
    fn tell_kept(&mut self, peer: Peer, went_well: bool) {
        if let Some(mut session) = self.connections[peer.0 as usize].session.take() {
            let flow = session.kept(self.now, kept(went_well), self);
            self.connections[peer.0 as usize].session = Some(session);
            if flow == Flow::Close {
                self.fx.close(&peer);
            }
        }
    }

    /// Has what is to be written wait for [`World::hold_disk`]`(false)`.
    pub fn hold_disk(&mut self, is_holding: bool) {
        self.fx.store.is_holding = is_holding;
        self.write_down();
    }

    /// Has the disk take nothing more, or everything again.
    pub fn fill_disk(&mut self, is_full: bool) {
        self.fx.store.is_failing = is_full;
        self.fx.note(Event::DiskFull(is_full));
        self.write_down();
    }

    /// Whether the disk takes nothing.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.fx.store.is_failing
    }

    /// Takes what the audit log would tell: what happened, and its details as JSON.
    pub fn take_audit(&mut self) -> Vec<String> {
        std::mem::take(&mut self.fx.audited)
    }

    /// What is on the disk.
    #[must_use]
    pub fn rows(&self) -> &crate::store::Rows {
        &self.fx.store.rows
    }

    fn write_down(&mut self) {
        while let Some((promised, went_well)) = self.fx.store.write_next() {
            if let Some(peer) = promised {
                self.tell_kept(peer, went_well);
                // What it sent while it waited.
                self.feed(peer, &[]);
            }
        }
        self.reap();
    }

    /// Ends the sessions of connections that were closed, which may close others.
    fn reap(&mut self) {
        loop {
            let closed = self.fx.take_newly_closed();
            if closed.is_empty() {
                return;
            }
            for peer in closed {
                if let Some(mut session) = self.connections[peer.0 as usize].session.take() {
                    session.closed(self.now, self);
                    self.fx.note(Event::Departed(peer));
                }
                self.connections[peer.0 as usize].received = Vec::new();
            }
        }
    }

    /// The client ends its connection.
    pub fn hang_up(&mut self, peer: Peer) {
        self.fx.hang_up(peer);
        self.reap();
        self.write_down();
    }

    /// Takes at most `most` bytes that wait for a client.
    pub fn read(&mut self, peer: Peer, most: usize) -> Vec<u8> {
        self.fx.read(peer, most)
    }

    /// How many bytes wait for a client.
    #[must_use]
    pub fn waiting(&self, peer: Peer) -> usize {
        self.fx.waiting(peer)
    }

    /// Takes every message that waits for a client.
    ///
    /// # Panics
    /// Where what waits is not a row of whole frames with one JSON object each.
    pub fn messages(&mut self, peer: Peer) -> Vec<Message> {
        let bytes = self.fx.read(peer, usize::MAX);
        let mut rest = &bytes[..];
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let (message, used) = decode(rest).expect("the server writes whole frames");
            messages.push(message);
            rest = &rest[used..];
        }
        messages
    }

    /// Whether the connection is open.
    #[must_use]
    pub fn is_open(&self, peer: Peer) -> bool {
        self.fx.is_open(peer)
    }

    /// Moves time `ms` milliseconds on.
    pub fn advance(&mut self, ms: u64) {
        let until = self.now.after_ms(ms);
        loop {
            let due = |pool: &PoolHandle| {
                let wakes = pool.borrow().is_due_to_wake();
                let deadline = pool.borrow().next_deadline().filter(|_| wakes)?;
                Some((deadline, pool.clone()))
            };
            let next = self
                .registry
                .pools()
                .filter_map(|(_, pool)| due(pool))
                .min_by_key(|(deadline, _)| *deadline);
            match next {
                Some((deadline, pool)) if deadline <= until => {
                    self.now = self.now.max(deadline);
                    let now = self.now;
                    self.fx.note(Event::Now(now));
                    self.with_pool(&pool, |pool, fx| pool.handle_timeout(now, fx));
                    let later = pool.borrow().next_deadline();
                    assert!(
                        later.is_none_or(|later| later > now),
                        "a deadline did not fire"
                    );
                    self.reap();
                }
                _ => break,
            }
        }
        self.now = until;
        self.fx.note(Event::Now(until));
        self.write_down();
    }

    /// Takes no new calls from now on, and tells everybody.
    pub fn drain(&mut self) {
        self.is_draining = true;
        let told = r#"{"action":"event","event":"draining"}"#;
        for at in 0..self.connections.len() {
            let is_ready = self.connections[at]
                .session
                .as_ref()
                .is_some_and(Session::is_ready);
            if is_ready {
                let peer = Peer(at as u32);
                self.fx.send(&peer, Class::Control, told.len(), |out| {
                    encode::message(out, told);
                });
            }
        }
        self.reap();
    }

    /// Whether the server is about to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.is_draining
    }

    /// Begins again, as after a kill: connections are gone, apps and pools are as far as they were written down.
    ///
    /// # Panics
    /// Where a row that was written can't be taken in.
    pub fn restart(&mut self, seed: u64) {
        let left = self.begin_again(seed);
        assert_eq!(left, 0, "every row was written by the core itself");
    }

    /// Begins again with rows that anybody may have written; returns how many make no sense.
    pub fn restart_with(&mut self, seed: u64, rows: crate::store::Rows) -> usize {
        self.fx.store.rows = rows;
        self.begin_again(seed)
    }

    fn begin_again(&mut self, seed: u64) -> usize {
        for connection in &mut self.connections {
            connection.session = None;
            connection.received = Vec::new();
        }
        self.fx.crash();
        self.told_later.clear();
        self.is_draining = false;
        self.touched.clear();
        self.fx.storages = crate::storage::Storages::default();
        let unix_ms = EPOCH_MS + self.now.0 / 1000;
        self.registry = Registry::new(unix_ms, self.limits.clone(), seed);
        let rows = self.fx.store.rows.clone();
        let mut left = 0;
        for row in rows.pools.into_values() {
            left += usize::from(self.registry.restore_pool(row).is_err());
        }
        let times = (self.now, unix_ms);
        for row in rows.calls.values() {
            let taken = self.take_in(&row.pool, |pool, fx| pool.restore_call(times, row, fx));
            left += usize::from(!taken);
        }
        for row in rows.answers.values() {
            let taken = self.take_in(&row.pool, |pool, fx| pool.restore_answer(times, row, fx));
            left += usize::from(!taken);
        }
        for row in rows.apps.into_values() {
            left += usize::from(!self.registry.restore_app(row, unix_ms));
        }
        left
    }

    /// Has a pool take something in; one that was made for it goes again where it makes no sense.
    fn take_in(
        &mut self,
        name: &PoolName,
        restore: impl FnOnce(&mut Pool<Peer>, &mut Outboxes) -> bool,
    ) -> bool {
        let unix_ms = EPOCH_MS + self.now.0 / 1000;
        let Ok((number, pool)) = self.registry.pool_for_kept(unix_ms, name) else {
            return false;
        };
        let taken = self.with_pool(&pool, restore);
        if !taken {
            self.registry.count_held(name, number, 0);
        }
        taken
    }

    /// Takes the log of what happened since it was taken last.
    pub fn take_log(&mut self) -> Vec<Event> {
        self.fx.take_log()
    }

    /// A hash of everything that was sent so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.fx.hash()
    }

    /// Totals so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.fx.totals()
    }

    /// Calls under way in all pools.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        let pools = self.registry.pools();
        pools
            .map(|(_, pool)| pool.borrow().stats().calls_in_flight)
            .sum()
    }

    /// Has what is to be done about blocks wait for [`World::run_jobs`], as large blocks do on a server.
    pub fn hold_jobs(&mut self, is_holding: bool) {
        self.fx.storages.is_holding = is_holding;
        self.run_jobs();
    }

    /// Has what is appended to outboxes stay in the server, as far as it is told when it leaves. What was held up for
    /// connections that are gone by then was never told.
    pub fn hold_told(&mut self, is_holding: bool) {
        self.is_holding_told = is_holding;
        if is_holding {
            return;
        }
        for (pool, peer, number) in std::mem::take(&mut self.told_later) {
            if self.is_open(peer) {
                self.with_pool(&pool, |pool, fx| pool.told(number, fx));
            }
        }
        self.write_down();
    }

    /// Has no memory left for new blocks.
    pub fn fill_memory(&mut self, is_full: bool) {
        self.fx.storages.is_full = is_full;
    }

    /// Does what is to be done about blocks.
    pub fn run_jobs(&mut self) {
        while let Some((pool, job)) = self.fx.storages.waiting.pop_front() {
            match job {
                Job::Make {
                    key,
                    making,
                    unless_dead,
                } => {
                    // A client that hung up is a process that died.
                    let made = if unless_dead.is_some() {
                        Ok(None)
                    } else {
                        let made = self.fx.storages.make(&making);
                        made.map(|()| Some(making.storage))
                    };
                    let now = self.now;
                    self.with_pool(&pool, |pool, fx| {
                        pool.storage_made(now, key, made, fx);
                    });
                }
                Job::Drop { storage, .. } => self.fx.storages.drop_storage(storage),
                Job::Flush {
                    key,
                    storage,
                    ticket,
                } => {
                    let version = latzero_fabric::Effects::block_version(&self.fx, storage);
                    self.with_pool(&pool, |pool, fx| {
                        pool.flushed(key, ticket, Ok(version), fx);
                    });
                }
            }
        }
    }

    /// How many storages there are, and what is counted of blocks.
    #[must_use]
    pub fn storages(&self) -> &crate::storage::Storages {
        &self.fx.storages
    }

    /// How many descriptors were sent to a client.
    #[must_use]
    pub fn descriptors(&self, peer: Peer) -> u64 {
        self.fx.descriptors(peer)
    }

    /// The names of the pools there are, in order.
    #[must_use]
    pub fn pool_names(&self) -> Vec<String> {
        self.registry
            .pools()
            .map(|(name, _)| name.to_string())
            .collect()
    }

    /// Checks the invariants of the registry, of every pool touched since the last check, and of the outboxes.
    ///
    /// # Panics
    /// Where one is broken.
    pub fn check(&mut self) {
        self.registry.check();
        self.fx.check(self.limits.in_flight_max);
        for pool in std::mem::take(&mut self.touched) {
            pool.borrow().check();
        }
        assert_eq!(
            self.calls_in_flight(),
            self.fx.calls_in_flight(),
            "calls in pools and calls at callers"
        );
        let (blocks, bytes) = self
            .registry
            .pools()
            .fold((0, 0), |(blocks, bytes), (_, pool)| {
                let stats = pool.borrow().stats();
                (blocks + stats.blocks, bytes + stats.block_bytes)
            });
        let ledger = &self.fx.storages.ledger;
        assert_eq!(
            (ledger.blocks(), ledger.bytes()),
            (blocks, bytes),
            "blocks in pools and in the books"
        );
        let totals = self.fx.totals();
        assert_eq!(
            totals.calls_started - totals.calls_ended,
            self.calls_in_flight() as u64,
            "calls started and not ended"
        );
    }

    /// What the registry holds, in numbers.
    #[must_use]
    pub fn counts(&self) -> latzero_fabric::registry::Counts {
        self.registry.counts()
    }
}

impl Host for World {
    type Peer = Peer;
    type Pool = PoolHandle;
    type Effects = Outboxes;

    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn effects(&mut self) -> &mut Outboxes {
        &mut self.fx
    }

    fn with_registry<R>(&mut self, f: impl FnOnce(&mut Registry<Self>, &mut Outboxes) -> R) -> R {
        f(&mut self.registry, &mut self.fx)
    }

    fn with_pool<R>(
        &mut self,
        pool: &PoolHandle,
        f: impl FnOnce(&mut Pool<Peer>, &mut Outboxes) -> R,
    ) -> R {
        if !self.touched.iter().any(|known| Rc::ptr_eq(known, pool)) {
            self.touched.push(pool.clone());
        }
        let result = f(&mut pool.borrow_mut(), &mut self.fx);
        for (peer, number) in std::mem::take(&mut self.fx.told) {
            if self.is_holding_told {
                self.told_later.push((pool.clone(), peer, number));
            } else {
                pool.borrow_mut().told(number, &mut self.fx);
            }
        }
        let counted = std::mem::take(&mut self.fx.storages.counted);
        if let Some((name, number, _)) = counted.first().cloned() {
            let change: i32 = counted.iter().map(|(.., change)| change).sum();
            if !self.registry.count_held(&name, number, change) && change > 0 {
                pool.borrow_mut().close_held(&mut self.fx);
            }
        }
        let asked = std::mem::take(&mut self.fx.storages.asked);
        for job in asked {
            self.fx.storages.waiting.push_back((pool.clone(), job));
        }
        if !self.fx.storages.is_holding {
            self.run_jobs();
        }
        result
    }

    fn new_pool(pool: Pool<Peer>) -> PoolHandle {
        Rc::new(RefCell::new(pool))
    }

    fn unix_ms(&self, now: Time) -> u64 {
        EPOCH_MS + now.0 / 1000
    }

    fn identity(&self) -> (&str, &str) {
        ("0.0.0", "simulated")
    }

    fn is_draining(&self) -> bool {
        self.is_draining
    }

    fn stats(&mut self, _now: Time) -> String {
        "{}".into()
    }

    fn health(&mut self, _now: Time) -> String {
        r#"{"status":"ok"}"#.into()
    }

    fn is_admin_token(&self, token: &str) -> bool {
        token == ADMIN_TOKEN
    }

    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal> {
        let length = usize::try_from(range.end - range.start).expect("checked by the core");
        let (stored, range) =
            self.fx
                .storages
                .write_range(storage, range.start, length, if_version)?;
        Ok((stored.bytes[range].to_vec(), stored.version))
    }

    fn check_block(&mut self, _storage: StorageId) -> Result<(), Refusal> {
        Ok(())
    }

    fn take_back(
        &mut self,
        _now: Time,
        _pool: &PoolHandle,
        _name: &PoolName,
        block: &latzero_protocol::BlockId,
    ) -> Result<(), Refusal> {
        // Nobody holds anything here.
        Err(Refusal::new(
            Code::NoBlock,
            format!("block '{block}' is not awaited"),
        ))
    }

    fn recycle(&mut self, _buffer: Vec<u8>) {}

    fn write_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        data: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, Refusal> {
        if let Some(beside) = self.beside_write.take() {
            beside(self);
        }
        let (stored, range) =
            self.fx
                .storages
                .write_range(storage, offset, data.len(), if_version)?;
        stored.bytes[range].copy_from_slice(data);
        stored.version += 1;
        Ok(stored.version)
    }

    fn swap_block(
        &mut self,
        storage: StorageId,
        offset: u64,
        expected: &[u8],
        data: &[u8],
    ) -> Result<(u64, Option<Vec<u8>>), Refusal> {
        let (stored, range) = self
            .fx
            .storages
            .write_range(storage, offset, data.len(), None)?;
        if stored.bytes[range.clone()] != *expected {
            return Ok((stored.version, Some(stored.bytes[range].to_vec())));
        }
        stored.bytes[range].copy_from_slice(data);
        stored.version += 1;
        Ok((stored.version, None))
    }

    fn admin(
        &mut self,
        _action: &AdminAction,
        _asker: &Peer,
        _id: Option<&str>,
    ) -> Result<Option<String>, Refusal> {
        Ok(Some("{}".into()))
    }
}

fn kept(went_well: bool) -> Result<(), Refusal> {
    if went_well {
        return Ok(());
    }
    Err(Refusal::new(Code::Storage, "the disk is full"))
}

/// Takes the first frame of what a server wrote, with its length; `None` where it is not complete.
///
/// # Panics
/// Where the bytes are not what a server may write.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<(Message, usize)> {
    let accept = Accept {
        max_frame: latzero_protocol::limits::MAX_FRAME_DEFAULT
            + latzero_protocol::limits::FORWARD_SLACK,
        attachments: true,
    };
    let (Frame { json, attachment }, used) =
        frame::decode(bytes, accept).expect("the server writes frames")?;
    let json = serde_json::from_slice(json).expect("the server writes JSON");
    let attachment = attachment.map(<[u8]>::to_vec);
    Some((Message { json, attachment }, used))
}

/// A frame as a client writes it: `json`, with raw bytes where there are any.
#[must_use]
pub fn encode_frame(json: &str, attachment: Option<&[u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    match attachment {
        Some(raw) => {
            frame::append_attachment(&mut out, raw, |out| out.extend_from_slice(json.as_bytes()));
        }
        None => frame::append(&mut out, |out| out.extend_from_slice(json.as_bytes())),
    }
    out
}
