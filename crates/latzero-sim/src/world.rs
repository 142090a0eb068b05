//! A server without sockets, clock or threads: the real fabric, driven by the owner of the
//! [`World`].
//!
//! Bytes go in through [`World::feed`] and come out through [`World::read`], as they would over a
//! socket. Time stands still until [`World::advance`] moves it, and deadlines on the way fire
//! exactly on time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use latzero_crypto::proof::{ChannelBinding, Exchange};
use latzero_crypto::text;
use latzero_fabric::driver::{
    BlockStorage, BlockWrite, Check, Context, Observed, Promise, Report, Verifier, Written,
};
use latzero_fabric::ledger::{self, Holding, Ledger, Reservation, Resource, Users};
use latzero_fabric::link::Notice;
use latzero_fabric::memory::{Job, Numbers, StorageId};
use latzero_fabric::registry::View;
use latzero_fabric::rows::StoreChange;
use latzero_fabric::session::Terms;
use latzero_fabric::{
    Class, Driver, Effects, Flow, Limits, Now, Pool, Registry, Session, Time, Transport, Turn,
};
use latzero_protocol::frame::{self, Accept, Frame};
use latzero_protocol::memory::Access;
use latzero_protocol::message::AdminAction;
use latzero_protocol::{AppId, Code, PoolName, Refusal, encode};
use serde_json::Value;

use crate::line::{Bounds, Event, LENGTH_SLACK, Line, Observer, Peer, Totals};
use crate::storage::{Descriptor, Storages};
use crate::store::{Store, Waiter};

/// A pool of the world.
pub type PoolHandle = Rc<RefCell<Pool<World>>>;

/// The administrator's proof that every simulated server accepts.
const ADMIN_MAC: [u8; 32] = [7; 32];

/// The proof that a simulated administrator sends.
#[must_use]
pub fn admin_proof() -> [String; 2] {
    let (nonce, mac) = (text::encode(&[0; 32]), text::encode(&ADMIN_MAC));
    [
        r#"{"action":"challenge"}"#.into(),
        format!(
            r#"{{"action":"admin_proof","client_nonce":"{nonce}","mac":"{mac}","cb_type":"none"}}"#
        ),
    ]
}

/// The wall-clock time at the start of the world, in milliseconds since the Unix epoch.
pub(crate) const EPOCH_MS: u64 = 1_700_000_000_000;

/// The largest frame before the handshake, in bytes.
const MAX_FRAME_BEFORE_HANDSHAKE: usize = 64 * 1024;

/// The most proofs that may wait to be checked.
const PROOFS_HELD_MAX: usize = 16;

struct Connection {
    line: Line,
    /// Taken out while it handles a frame; `None` after the connection has ended.
    session: Option<Session<World>>,
    received: Vec<u8>,
    /// The memory of what was received.
    inbound: Reservation,
    /// Written by the server, and not read by the client.
    socket: VecDeque<u8>,
    /// Descriptors that were written.
    descriptors: u64,
    /// The socket accepts no more bytes.
    is_held: bool,
    is_open: bool,
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
    context: Arc<Context>,
    socket_bytes: usize,
    registry: Rc<RefCell<Registry<World>>>,
    effects: Effects<World>,
    observer: Observer,
    ending_steps: usize,
    storages: Storages,
    store: Store,
    /// All clients over TCP are one untrusted user; the others are the server's own user.
    users: Users<bool>,
    connections: Vec<Connection>,
    touched: Vec<PoolHandle>,
    /// Pools that were removed and have calls or waits to end.
    removed: Vec<PoolHandle>,
    /// Connections whose durable requests completed while another's message was handled.
    woken: Vec<Peer>,
    /// The number of nonces generated so far.
    nonces: u64,
    /// Proofs that wait to be checked; `None` if each is checked at once.
    proofs: Option<VecDeque<(Peer, Check)>>,
    /// What another thread of a server does while this one writes to a block.
    beside_write: Option<Beside>,
}

impl World {
    /// Creates a server that has just started.
    #[must_use]
    pub fn new(seed: u64, limits: Limits, bounds: Bounds) -> Self {
        World {
            now: Time::default(),
            registry: Rc::new(RefCell::new(Registry::new(EPOCH_MS, limits.clone(), seed))),
            context: Arc::new(Context {
                ledger: Ledger::new(&limits),
                limits,
                outbox: latzero_fabric::outbox::Bounds {
                    bytes_max: bounds.outbox_bytes,
                    headroom: bounds.headroom_bytes,
                },
                version: "0.0.0",
                node: "simulated".into(),
                instance: [1; 16],
                secret: [2; 32],
                admin_over_plain_tcp: true,
                require_channel_binding: false,
                allow_pidns: false,
                is_draining: AtomicBool::new(false),
            }),
            socket_bytes: bounds.socket_bytes,
            effects: Effects::default(),
            observer: Observer::default(),
            ending_steps: 0,
            storages: Storages::default(),
            store: Store::default(),
            nonces: 0,
            proofs: None,
            users: Users::default(),
            connections: Vec::new(),
            touched: Vec::new(),
            removed: Vec::new(),
            woken: Vec::new(),
            beside_write: None,
        }
    }

    /// Runs `f` in the middle of the next write to a block, as on a server with several threads.
    pub fn beside_next_write(&mut self, f: impl FnOnce(&mut World) + 'static) {
        self.beside_write = Some(Box::new(f));
    }

    /// The current time.
    #[must_use]
    pub fn now(&self) -> Time {
        self.now
    }

    /// The bounds in force.
    #[must_use]
    pub fn bounds_of_core(&self) -> &Limits {
        &self.context.limits
    }

    /// A new connection over `transport`.
    pub fn connect(&mut self, transport: Transport) -> Peer {
        let peer = Peer(u32::try_from(self.connections.len()).expect("runs are short"));
        let is_trusted = transport != Transport::Tcp;
        let ledger = &self.context.ledger;
        let user = self.users.account(is_trusted, is_trusted, ledger);
        let line = Line::new(peer, ledger.connection(&user));
        let terms = Terms {
            transport,
            is_own: false,
            binding: ChannelBinding::None,
            is_loopback: true,
            uid: None,
            is_admin: transport == Transport::BuiltIn,
            user,
            max_frame_before_handshake: MAX_FRAME_BEFORE_HANDSHAKE,
        };
        let inbound = line.link().account().hold(Resource::Inbound);
        self.connections.push(Connection {
            session: Some(Session::new(line.clone(), terms)),
            inbound,
            line,
            received: Vec::new(),
            socket: VecDeque::new(),
            descriptors: 0,
            is_held: false,
            is_open: true,
        });
        peer
    }

    /// Passes bytes of a client to the server, which handles every complete frame.
    pub fn feed(&mut self, peer: Peer, bytes: &[u8]) {
        self.resume(peer);
        if !self.is_open(peer) {
            return;
        }
        let connection = &mut self.connections[peer.0 as usize];
        let length = connection.received.len() + bytes.len();
        if !connection.received.is_empty() && connection.inbound.resize(length as u64).is_err() {
            // The server does not read, so the data stays with its client, and this one gives up.
            self.hang_up(peer);
            return;
        }
        connection.received.extend_from_slice(bytes);
        let mut received = std::mem::take(&mut self.connections[peer.0 as usize].received);
        let mut used = 0;
        while self.is_open(peer)
            && !self.is_waiting(peer)
            && let Some(length) = self.handle_first(peer, &received[used..])
        {
            used += length;
        }
        received.drain(..used);
        let connection = &mut self.connections[peer.0 as usize];
        connection.inbound.force(received.len() as u64);
        connection.received = received;
        self.reap();
        self.wake();
    }

    fn is_waiting(&self, peer: Peer) -> bool {
        let session = self.connections[peer.0 as usize].session.as_ref();
        session.is_some_and(Session::is_waiting)
    }

    /// Handles the first frame of `bytes`; returns its length, or `None` if there is no valid
    /// frame.
    fn handle_first(&mut self, peer: Peer, bytes: &[u8]) -> Option<usize> {
        let mut session = self.connections[peer.0 as usize].session.take()?;
        let decoded = frame::decode(bytes, session.accept(&self.context.limits));
        let (flow, used) = match decoded {
            Ok(None) => (Flow::Continue, None),
            Ok(Some((frame, used))) => {
                self.note_handling(peer, frame, None);
                let held = session.held_bytes();
                let flow = session.handle(frame, &mut self.turn());
                let is_held = session.held_bytes() > held;
                let flow = self.write_beside(peer, &mut session, flow);
                self.observer.note(match is_held {
                    true => Event::Held(peer),
                    false => Event::Handled(peer),
                });
                (flow, Some(used))
            }
            Err(error) => {
                self.observer.note(Event::Rejecting(peer));
                (session.reject_frame(error, &mut self.turn()), error.skips())
            }
        };
        self.connections[peer.0 as usize].session = Some(session);
        if flow == Flow::Close {
            self.close(peer);
        }
        used
    }

    fn note_handling(&mut self, peer: Peer, frame: Frame<'_>, came: Option<Time>) {
        self.observer.note(Event::Handling {
            peer,
            json: frame.json.to_vec(),
            attachment: frame.attachment.map(<[u8]>::to_vec),
            came,
        });
    }

    /// Writes what can be written while a session handles a message.
    fn write_beside(&mut self, peer: Peer, session: &mut Session<World>, flow: Flow) -> Flow {
        let mut flow = flow;
        while let Some((promised, went_well)) = self.store.write_next() {
            let promised = match promised {
                Some(Waiter::Session(promised)) => promised,
                Some(Waiter::Answer(pool, number)) => {
                    self.answer_stored(&pool, number, went_well);
                    continue;
                }
                None => continue,
            };
            if promised == peer {
                flow = session.handle_stored(store_result(went_well), &mut self.turn());
            } else {
                self.handle_stored(promised, went_well);
            }
            self.woken.push(promised);
        }
        flow
    }

    /// Lets a session handle the messages that waited in it.
    fn resume(&mut self, peer: Peer) {
        if let Some(mut session) = self.connections[peer.0 as usize].session.take() {
            while session.go_on(&mut self.turn()) {
                self.ending_steps += 1;
            }
            self.connections[peer.0 as usize].session = Some(session);
        }
        while self.is_open(peer)
            && let Some(mut session) = self.connections[peer.0 as usize].session.take()
        {
            let waiting = session.next_waiting(&self.turn());
            let Some(waiting) = waiting else {
                self.connections[peer.0 as usize].session = Some(session);
                return;
            };
            self.note_handling(peer, waiting.frame(), Some(waiting.came()));
            let flow = session.handle_waiting(&waiting, &mut self.turn());
            let flow = self.write_beside(peer, &mut session, flow);
            self.observer.note(Event::Handled(peer));
            self.connections[peer.0 as usize].session = Some(session);
            if flow == Flow::Close {
                self.close(peer);
            }
        }
    }

    /// Notifies a session whether its durable request was stored.
    fn handle_stored(&mut self, peer: Peer, went_well: bool) {
        if let Some(mut session) = self.connections[peer.0 as usize].session.take() {
            let flow = session.handle_stored(store_result(went_well), &mut self.turn());
            self.connections[peer.0 as usize].session = Some(session);
            if flow == Flow::Close {
                self.close(peer);
            }
        }
    }

    /// Notifies a pool whether an answer was stored.
    fn answer_stored(&mut self, name: &PoolName, number: u64, went_well: bool) {
        let pool = self.registry.borrow().pool(name).cloned();
        if let Some(pool) = pool {
            self.turn().with_pool(&pool, |pool, turn| {
                pool.durable().answer_stored(number, went_well, turn);
            });
        }
    }

    /// Delays all writes until [`World::hold_disk`]`(false)`.
    pub fn hold_disk(&mut self, is_holding: bool) {
        self.store.is_holding = is_holding;
        self.write_down();
    }

    /// Makes the disk refuse all writes, or accept them again.
    pub fn fill_disk(&mut self, is_full: bool) {
        self.store.is_failing = is_full;
        self.observer.note(Event::DiskFull(is_full));
        self.write_down();
    }

    /// Makes proofs wait for [`World::check_proof`], or checks all of them and each new one at
    /// once.
    pub fn hold_proofs(&mut self, is_holding: bool) {
        if is_holding {
            self.proofs.get_or_insert_default();
        } else {
            while self.check_proof() {}
            self.proofs = None;
        }
    }

    /// Checks the proof that has waited longest, as a thread of a server does; false if none waits.
    pub fn check_proof(&mut self) -> bool {
        let Some((peer, check)) = self.proofs.as_mut().and_then(VecDeque::pop_front) else {
            return false;
        };
        let is_good = check();
        if let Some(mut session) = self.connections[peer.0 as usize].session.take() {
            let flow = session.handle_verified(Ok(is_good), &mut self.turn());
            let flow = self.write_beside(peer, &mut session, flow);
            self.connections[peer.0 as usize].session = Some(session);
            if flow == Flow::Close {
                self.close(peer);
            }
        }
        // Messages that it sent while it waited.
        self.feed(peer, &[]);
        self.reap();
        true
    }

    /// Whether the disk refuses writes.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.store.is_failing
    }

    /// Takes the entries of the audit log: what happened, and its details as JSON.
    pub fn take_audit(&mut self) -> Vec<String> {
        std::mem::take(&mut self.observer.audited)
    }

    /// The rows on the disk.
    #[must_use]
    pub fn rows(&self) -> &crate::store::Rows {
        &self.store.rows
    }

    fn write_down(&mut self) {
        while let Some((promised, went_well)) = self.store.write_next() {
            match promised {
                Some(Waiter::Session(peer)) => {
                    self.handle_stored(peer, went_well);
                    // Messages that it sent while it waited.
                    self.feed(peer, &[]);
                }
                Some(Waiter::Answer(pool, number)) => {
                    self.answer_stored(&pool, number, went_well);
                }
                None => {}
            }
        }
        self.reap();
    }

    fn turn(&mut self) -> Turn<'_, World> {
        let now = Now {
            monotonic: self.now,
            unix_ms: EPOCH_MS + self.now.0 / 1000,
            steady_ms: EPOCH_MS + self.now.0 / 1000,
        };
        Turn::new(now, self)
    }

    fn line(&self, peer: Peer) -> &Line {
        &self.connections[peer.0 as usize].line
    }

    fn close(&mut self, peer: Peer) {
        let line = self.line(peer).clone();
        self.turn().close(&line);
    }

    /// Carries out decisions: writes to sockets, then ends the connections that must be closed,
    /// which may close others.
    fn reap(&mut self) {
        loop {
            for line in std::mem::take(&mut self.effects.resumed) {
                self.resume(line.id);
                if !self.connections[line.id.0 as usize].received.is_empty() {
                    self.woken.push(line.id);
                }
            }
            let tally = std::mem::take(&mut self.effects.tally);
            self.observer.count(tally);
            self.effects.appended = 0;
            for line in std::mem::take(&mut self.effects.touched) {
                self.write(line.id, 0);
            }
            let Some(line) = self.effects.closing.pop() else {
                if self.effects.touched.is_empty() {
                    return;
                }
                continue;
            };
            let connection = &mut self.connections[line.id.0 as usize];
            connection.received = Vec::new();
            connection.inbound.force(0);
            let session = connection.session.take();
            if let Some(mut session) = session {
                self.ending_steps = 1;
                while session.closed(&mut self.turn()) {
                    self.ending_steps += 1;
                }
                self.observer.note(Event::Departed(line.id));
            }
        }
    }

    /// Writes from an outbox as much as the socket accepts: up to its size, or `wanted` bytes if
    /// its client reads that many.
    fn write(&mut self, peer: Peer, wanted: usize) {
        let at = peer.0 as usize;
        loop {
            if self.connections[at].is_held {
                return;
            }
            let line = self.line(peer).clone();
            let Some(mut taken) = line.link().outbox.take() else {
                return;
            };
            let connection = &mut self.connections[at];
            let mut written = 0;
            while !taken.is_done() {
                let (bytes, descriptors) = taken.next();
                let room = wanted.max(self.socket_bytes);
                let n = room
                    .saturating_sub(connection.socket.len())
                    .min(bytes.len());
                if n == 0 {
                    break;
                }
                connection.descriptors += descriptors.len() as u64;
                connection.socket.extend(&bytes[..n]);
                taken.advance(n);
                written += n;
            }
            let mut link = line.link();
            link.put_back(self.now, taken, written);
            let is_blocked = link.outbox.is_blocked();
            let notices: Vec<_> = std::iter::from_fn(|| link.outbox.take_notice()).collect();
            drop(link);
            for Notice { pool, number } in notices {
                self.turn().with_pool(&pool, |pool, turn| {
                    pool.durable().answer_delivered(number, turn)
                });
            }
            if is_blocked {
                return;
            }
        }
    }

    /// In how many steps the last connection ended, and how many were added since by members that
    /// leave: not the first of such a member, nor the last.
    #[must_use]
    pub fn ending_steps(&self) -> usize {
        self.ending_steps
    }

    /// The client ends its connection: what it has not read is lost.
    pub fn hang_up(&mut self, peer: Peer) {
        self.line(peer).link().close();
        self.connections[peer.0 as usize].socket.clear();
        self.close(peer);
        self.reap();
        self.write_down();
    }

    /// Takes at most `most` bytes that wait for a client.
    pub fn read(&mut self, peer: Peer, most: usize) -> Vec<u8> {
        self.write(peer, most);
        let socket = &mut self.connections[peer.0 as usize].socket;
        let most = most.min(socket.len());
        let bytes = socket.drain(..most).collect();
        self.write(peer, 0);
        self.reap();
        self.write_down();
        bytes
    }

    /// How many bytes wait for a client.
    #[must_use]
    pub fn waiting(&self, peer: Peer) -> usize {
        let connection = &self.connections[peer.0 as usize];
        connection.socket.len() + connection.line.link().outbox.queued()
    }

    /// Takes every message that waits for a client.
    ///
    /// # Panics
    /// If the waiting bytes are not a sequence of complete frames with one JSON object each.
    pub fn messages(&mut self, peer: Peer) -> Vec<Message> {
        let bytes = self.read(peer, usize::MAX);
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
        self.connections[peer.0 as usize].is_open
    }

    /// Advances time by `ms` milliseconds. Returns how often a pool's deadline passed.
    pub fn advance(&mut self, ms: u64) -> usize {
        let (until, mut steps) = (self.now.after_ms(ms), 0);
        loop {
            let due = |pool: &PoolHandle| {
                let wakes = pool.borrow().is_due_to_wake();
                let deadline = pool.borrow().next_deadline().filter(|_| wakes)?;
                Some((deadline, pool.clone()))
            };
            let next = self
                .registry
                .borrow()
                .pools()
                .map(|(_, pool)| pool)
                .chain(&self.removed)
                .filter_map(due)
                .min_by_key(|(deadline, _)| *deadline);
            match next {
                Some((deadline, pool)) if deadline <= until => {
                    steps += 1;
                    self.now = self.now.max(deadline);
                    let now = self.now;
                    self.observer.note(Event::Now(now));
                    self.turn().with_pool(&pool, Pool::handle_timeout);
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
        self.observer.note(Event::Now(until));
        self.expire_deferred();
        self.write_down();
        steps
    }

    /// Ends the calls that expired inside their sessions.
    fn expire_deferred(&mut self) {
        for at in 0..self.connections.len() {
            if let Some(mut session) = self.connections[at].session.take() {
                let has_room = session.handle_timeout(&mut self.turn());
                self.connections[at].session = Some(session);
                if has_room {
                    self.resume(Peer(at as u32));
                }
            }
        }
    }

    /// Accepts no new calls from now on, and notifies everybody.
    pub fn drain(&mut self) {
        self.context.is_draining.store(true, Relaxed);
        let event = r#"{"action":"event","event":"draining"}"#;
        for at in 0..self.connections.len() {
            let is_ready = self.connections[at]
                .session
                .as_ref()
                .is_some_and(Session::is_ready);
            if is_ready {
                let line = self.connections[at].line.clone();
                self.turn().send(&line, Class::Control, event.len(), |out| {
                    encode::message(out, event);
                });
            }
        }
        self.reap();
    }

    /// Whether the server is about to stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.context.is_draining()
    }

    /// Restarts as after a kill: connections are gone, and apps and pools are as they were stored.
    ///
    /// # Panics
    /// If a stored row can't be restored.
    pub fn restart(&mut self, seed: u64) {
        let left = self.begin_again(seed);
        assert_eq!(left, 0, "every row was written by the core itself");
    }

    /// Restarts with rows from any source; returns how many are invalid.
    pub fn restart_with(&mut self, seed: u64, rows: crate::store::Rows) -> usize {
        self.store.rows = rows;
        self.begin_again(seed)
    }

    fn begin_again(&mut self, seed: u64) -> usize {
        for connection in &mut self.connections {
            let account = Arc::clone(connection.line.link().account());
            let line = Line::new(connection.line.id, account);
            line.link().close();
            let inbound = line.link().account().hold(Resource::Inbound);
            *connection = Connection {
                inbound,
                line,
                session: None,
                received: Vec::new(),
                socket: VecDeque::new(),
                descriptors: 0,
                is_held: false,
                is_open: false,
            };
        }
        self.effects = Effects::default();
        self.store.crash();
        self.observer.crash(&self.store.rows);
        self.context.is_draining.store(false, Relaxed);
        self.proofs.iter_mut().for_each(VecDeque::clear);
        self.touched.clear();
        self.storages = Storages::default();
        let unix_ms = EPOCH_MS + self.now.0 / 1000;
        let registry = Registry::new(unix_ms, self.context.limits.clone(), seed);
        self.registry = Rc::new(RefCell::new(registry));
        let rows = self.store.rows.clone();
        let numbers = rows.calls.keys().chain(rows.answers.keys());
        let last = numbers.max().copied().unwrap_or(0);
        self.storages.numbers.count_on_after(last);
        let mut left = 0;
        for row in rows.pools.into_values() {
            left += usize::from(
                self.registry
                    .borrow_mut()
                    .restore_pool(row, self.now)
                    .is_err(),
            );
        }
        let user = self.context.ledger.user(true);
        let account = |world: &mut World, app: &AppId| {
            let mut turn = world.turn();
            turn.with_registry(|registry, turn| registry.account(app, &user, turn))
        };
        for row in rows.answers.values() {
            let account = account(self, &row.caller);
            let taken = self.restore_into(&row.pool, |pool, turn| {
                pool.durable().restore_answer(row, &account, turn)
            });
            left += usize::from(!taken);
        }
        for row in rows.calls.values() {
            let account = account(self, &row.caller);
            let taken = self.restore_into(&row.pool, |pool, turn| {
                pool.durable().restore_call(row, &account, turn)
            });
            left += usize::from(!taken);
        }
        for row in rows.apps.into_values() {
            let ledger = &self.context.ledger;
            let taken = self.registry.borrow_mut().restore_app(row, unix_ms, ledger);
            left += usize::from(!taken);
        }
        left
    }

    /// Restores a row into a pool. A pool that was created for a row is removed again if the row is
    /// invalid.
    fn restore_into(
        &mut self,
        name: &PoolName,
        restore: impl FnOnce(&mut Pool<World>, &mut Turn<'_, World>) -> bool,
    ) -> bool {
        let unix_ms = EPOCH_MS + self.now.0 / 1000;
        let made = self.registry.borrow_mut().pool_for_kept(unix_ms, name);
        let Ok((number, pool)) = made else {
            return false;
        };
        let taken = self.turn().with_pool(&pool, restore);
        if !taken {
            self.registry.borrow_mut().count_held(name, number, 0);
        }
        taken
    }

    /// Takes the log of what happened since the last call.
    pub fn take_log(&mut self) -> Vec<Event> {
        self.observer.take_log()
    }

    /// A hash of everything that was sent so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.observer.hash()
    }

    /// Totals so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.observer.totals
    }

    /// Calls in progress in all pools.
    #[must_use]
    pub fn calls_in_flight(&self) -> usize {
        let registry = self.registry.borrow();
        let pools = registry.pools().map(|(_, pool)| pool);
        let pools = pools.chain(&self.removed);
        pools.map(|p| p.borrow().stats().calls_in_flight).sum()
    }

    /// Delays block operations until [`World::run_jobs`], as with large blocks on a server.
    pub fn hold_jobs(&mut self, is_holding: bool) {
        self.storages.is_holding = is_holding;
        self.run_jobs();
        self.reap();
        self.wake();
    }

    /// Handles messages that others sent while they waited.
    fn wake(&mut self) {
        for peer in std::mem::take(&mut self.woken) {
            self.feed(peer, &[]);
        }
    }

    /// Makes the sockets of all current connections accept no more bytes, or accept them again.
    pub fn hold_writes(&mut self, is_holding: bool) {
        for at in 0..self.connections.len() {
            self.hold_writes_of(Peer(at as u32), is_holding);
        }
    }

    /// Makes the socket of a connection accept no more bytes, or accept them again.
    pub fn hold_writes_of(&mut self, peer: Peer, is_holding: bool) {
        self.connections[peer.0 as usize].is_held = is_holding;
        self.write(peer, 0);
        self.reap();
        self.write_down();
    }

    /// Makes every write a job that leaves more than this many bytes of its block as they are.
    pub fn limit_copies(&mut self, copied_max: u64) {
        self.storages.copied_max = copied_max;
    }

    /// Makes every creation of a block fail for lack of memory, or succeed again.
    pub fn fill_memory(&mut self, is_full: bool) {
        self.storages.is_full = is_full;
    }

    /// Performs the waiting block operations.
    pub fn run_jobs(&mut self) {
        while let Some((pool, job)) = self.storages.waiting.pop_front() {
            match job {
                Job::Make {
                    key,
                    making,
                    unless_dead,
                } => {
                    // A client that hung up counts as a process that died.
                    let made = if unless_dead.is_some() {
                        Ok(None)
                    } else {
                        let made = self.storages.make(&making);
                        made.map(|()| Some(making.storage))
                    };
                    self.turn().with_pool(&pool, |pool, turn| {
                        pool.blocks().storage_made(key, made, turn)
                    });
                }
                Job::Drop { storage, .. } => self.storages.drop_storage(storage),
                Job::Flush {
                    key,
                    storage,
                    ticket,
                } => {
                    let version = self.block_version(storage, None);
                    self.turn().with_pool(&pool, |pool, turn| {
                        pool.blocks().flushed(key, ticket, Ok(version), turn);
                    });
                }
                Job::Write(slow) => {
                    let storage = slow.storage();
                    let written = match self.storages.stored.contains_key(&storage) {
                        true => self.write_block(storage, &slow.write()),
                        false => Err(Refusal::new(Code::NoBlock, "the block was removed")),
                    };
                    self.turn().with_pool(&pool, |pool, turn| {
                        pool.blocks().written(*slow, written, turn);
                    });
                }
            }
        }
    }

    /// The number of storages, and the counters of blocks.
    #[must_use]
    pub fn storages(&self) -> &crate::storage::Storages {
        &self.storages
    }

    /// How many descriptors were sent to a client.
    #[must_use]
    pub fn descriptors(&self, peer: Peer) -> u64 {
        self.connections[peer.0 as usize].descriptors
    }

    /// The names of all pools, in order.
    #[must_use]
    pub fn pool_names(&self) -> Vec<String> {
        let registry = self.registry.borrow();
        registry.pools().map(|(name, _)| name.to_string()).collect()
    }

    /// Statistics of a pool.
    #[must_use]
    pub fn pool_stats(&self, name: &str) -> Option<latzero_fabric::pool::PoolStats> {
        let registry = self.registry.borrow();
        let mut pools = registry.pools();
        let (_, pool) = pools.find(|(known, _)| known.as_str() == name)?;
        Some(pool.borrow().stats())
    }

    /// Checks the invariants of the registry, of every pool touched since the last check, and of
    /// the outboxes.
    ///
    /// # Panics
    /// If one is broken.
    pub fn check(&mut self) {
        self.registry.borrow().check();
        for pool in std::mem::take(&mut self.touched) {
            pool.borrow().check();
        }
        let (bounds, in_flight_max) = (self.context.outbox, self.context.limits.in_flight_max);
        let most = bounds.bytes_max + bounds.headroom + LENGTH_SLACK;
        for connection in &self.connections {
            let (link, id) = (connection.line.link(), connection.line.id);
            let held = link.outbox.queued();
            assert!(held <= most, "{id:?} holds {held} bytes of {most}");
            let in_flight = latzero_fabric::Peer::in_flight(&connection.line).count();
            assert!(
                in_flight <= in_flight_max,
                "{id:?} has {in_flight} calls in flight of {in_flight_max}"
            );
        }
        let registry = self.registry.borrow();
        let pools = registry.pools().map(|(_, pool)| pool);
        let (blocks, bytes) = pools
            .chain(&self.removed)
            .map(|pool| pool.borrow().stats())
            .fold((0, 0), |(blocks, bytes), stats| {
                (blocks + stats.blocks, bytes + stats.block_bytes)
            });
        let all = self.context.ledger.all();
        assert_eq!(
            (all.used(Resource::BlockCount), all.used(Resource::Blocks)),
            (blocks as u64, bytes),
            "blocks in pools and in the ledger"
        );
        let totals = self.observer.totals;
        assert_eq!(
            totals.calls_started - totals.calls_ended,
            self.calls_in_flight() as u64,
            "calls started and not ended"
        );
    }

    /// Closes connections while memory is short, as a server does.
    pub fn shed(&mut self) {
        while self.context.ledger.is_over_limit() {
            let connections = self.connections.iter().filter(|c| c.is_open);
            let holdings = connections.map(|connection| {
                let (bytes, since) = connection.line.link().holding();
                Holding {
                    key: connection.line.id,
                    bytes: bytes + connection.inbound.amount(),
                    since,
                }
            });
            let Some(victim) = ledger::victim(self.now, holdings) else {
                return;
            };
            self.hang_up(victim);
        }
    }

    /// Checks that the ledger equals the sum of what exists.
    ///
    /// # Panics
    /// If it does not.
    pub fn check_ledger(&self) {
        let all = self.context.ledger.all();
        let connections = || self.connections.iter();
        let waiting = |c: &Connection| c.session.as_ref().map_or(0, Session::held_bytes);
        let inbound = |c: &Connection| c.inbound.amount() + waiting(c) as u64;
        let jobs = self.storages.waiting.iter();
        let writes = jobs.map(|(_, job)| match job {
            Job::Write(slow) => slow.bytes(),
            _ => 0,
        });
        let inbound = connections().map(inbound).sum::<u64>() + writes.sum::<u64>();
        assert_eq!(all.used(Resource::Inbound), inbound, "unfinished frames");
        // Frames that several outboxes share are counted separately.
        let outbox: u64 = connections().map(|c| c.line.link().held()).sum();
        assert!(all.used(Resource::Outbox) >= outbox, "outboxes");
        let registry = self.registry.borrow();
        let (mut registered, made) = registry.held();
        assert_eq!(all.used(Resource::Pools), made, "pools");
        let (mut waits, mut attachments, mut subscriptions) = (0, 0, 0);
        let (mut parked, mut bytes, mut repeats, mut redelivery) = (0, 0, 0, 0);
        for pool in registry.pools().map(|(_, pool)| pool).chain(&self.removed) {
            let stats = pool.borrow().stats();
            parked += stats.parked.total() as u64;
            bytes += stats.parked_bytes;
            repeats += stats.repeats_bytes;
            redelivery += stats.redelivery_bytes;
            let blocks = pool.borrow_mut().blocks().counts();
            waits += blocks.waits;
            registered += blocks.about_bytes;
            attachments += blocks.attachments;
            subscriptions += blocks.subscriptions;
        }
        let used = all.used(Resource::Registrations);
        assert_eq!(used, registered, "registrations");
        assert_eq!(all.used(Resource::Waits), waits, "waits");
        assert_eq!(all.used(Resource::Attachments), attachments, "attachments");
        let subscribed = all.used(Resource::Subscriptions);
        assert_eq!(subscribed, subscriptions, "subscriptions");
        assert_eq!(all.used(Resource::ParkedCalls), parked, "parked calls");
        assert_eq!(all.used(Resource::Parked), bytes, "bytes of parked calls");
        assert_eq!(all.used(Resource::Repeats), repeats, "answers kept");
        assert_eq!(all.used(Resource::Redelivery), redelivery, "redelivery");
    }

    /// How much of a resource the ledger counts for all clients.
    #[must_use]
    pub fn held(&self, what: Resource) -> u64 {
        self.context.ledger.all().used(what)
    }

    /// Statistics of the registry.
    #[must_use]
    pub fn counts(&self) -> latzero_fabric::registry::Counts {
        self.registry.borrow().counts()
    }
}

impl BlockStorage for World {
    type Fd = Descriptor;

    fn descriptor(&self, storage: StorageId, access: Access) -> Option<Descriptor> {
        self.storages.descriptor(storage, access)
    }

    fn block_version(&mut self, storage: StorageId, noted: Option<u64>) -> u64 {
        // Nothing is mapped here, so an announced version has been written.
        let Some(stored) = self.storages.stored.get_mut(&storage) else {
            return 0;
        };
        // The largest number means that no version was announced: the block itself is read.
        let noted = noted.filter(|version| *version < u64::MAX);
        stored.version = stored.version.max(noted.unwrap_or(0));
        stored.version
    }

    fn set_fence(&mut self, storage: StorageId, fence: u64, _is_held: bool) {
        if let Some(stored) = self.storages.stored.get_mut(&storage) {
            stored.fence = fence;
        }
    }

    fn read_block(
        &mut self,
        storage: StorageId,
        range: std::ops::Range<u64>,
        if_version: Option<u64>,
    ) -> Result<(Vec<u8>, u64), Refusal> {
        let length = usize::try_from(range.end - range.start).expect("checked by the core");
        let (stored, range) =
            self.storages
                .write_range(storage, range.start, length, if_version)?;
        Ok((stored.bytes[range].to_vec(), stored.version))
    }

    fn write_block(
        &mut self,
        storage: StorageId,
        write: &BlockWrite<'_>,
    ) -> Result<Written, Refusal> {
        if write.expected.is_none()
            && let Some(beside) = self.beside_write.take()
        {
            beside(self);
        }
        let slow = match write.copied_max {
            u64::MAX => u64::MAX,
            _ => self.storages.copied_max,
        };
        let (stored, range) =
            self.storages
                .write_range(storage, write.offset, write.data.len(), write.if_version)?;
        if (stored.bytes.len() - range.len()) as u64 > write.copied_max.min(slow) {
            return Ok(Written::Slow);
        }
        let current = &mut stored.bytes[range];
        if write.expected.is_some_and(|expected| expected != current) {
            return Ok(Written::Differs(stored.version, current.to_vec()));
        }
        current.copy_from_slice(write.data);
        stored.version += 1;
        Ok(Written::Version(stored.version))
    }

    fn awaited_owner(
        &self,
        _pool: &PoolName,
        _block: Option<&latzero_protocol::BlockId>,
    ) -> Option<AppId> {
        None
    }
}

impl Verifier for World {
    type Peer = Line;

    fn admin_mac(&self, _exchange: &Exchange, mac: &[u8; 32]) -> Option<[u8; 32]> {
        (*mac == ADMIN_MAC).then_some(ADMIN_MAC)
    }

    fn may_prove(&mut self, _asker: &Line) -> bool {
        true
    }

    fn verify(
        &mut self,
        asker: &Line,
        check: Check,
        _is_guess: bool,
    ) -> Result<Option<bool>, Refusal> {
        match &mut self.proofs {
            None => Ok(Some(check())),
            Some(waiting) if waiting.len() >= PROOFS_HELD_MAX => {
                Err(Refusal::new(Code::Overloaded, "too many proofs wait"))
            }
            Some(waiting) => {
                waiting.push_back((asker.id, check));
                Ok(None)
            }
        }
    }

    fn note_refused(&mut self, _asker: &Line) {}
}

impl Driver for World {
    type Pool = PoolHandle;

    fn effects(&mut self) -> &mut Effects<World> {
        &mut self.effects
    }

    fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn new_pool(pool: Pool<World>) -> PoolHandle {
        Rc::new(RefCell::new(pool))
    }

    fn with_registry<R>(
        turn: &mut Turn<'_, Self>,
        f: impl FnOnce(&mut Registry<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        let registry = Rc::clone(&turn.driver.registry);
        f(&mut registry.borrow_mut(), turn)
    }

    fn with_pool<R>(
        turn: &mut Turn<'_, Self>,
        pool: &PoolHandle,
        f: impl FnOnce(&mut Pool<Self>, &mut Turn<'_, Self>) -> R,
    ) -> R {
        let touched = &mut turn.driver.touched;
        if !touched.iter().any(|known| Rc::ptr_eq(known, pool)) {
            touched.push(pool.clone());
        }
        let result = f(&mut pool.borrow_mut(), turn);
        let removed = &mut turn.driver.removed;
        removed.retain(|known| !Rc::ptr_eq(known, pool));
        if pool.borrow().is_closed() && pool.borrow().is_due_to_wake() {
            removed.push(pool.clone());
        }
        for (line, number) in std::mem::take(&mut turn.driver.effects.delivered) {
            let pool = pool.clone();
            let due = line
                .link()
                .outbox
                .notify_when_written(Notice { pool, number });
            if let Some(Notice { pool, number }) = due {
                pool.borrow_mut().durable().answer_delivered(number, turn);
            }
        }
        let held = std::mem::take(&mut turn.driver.effects.held);
        if let Some((name, number, _)) = held.first().cloned() {
            let change: i32 = held.iter().map(|(.., change)| change).sum();
            let is_there = turn
                .driver
                .registry
                .borrow_mut()
                .count_held(&name, number, change);
            if !is_there && change > 0 {
                pool.borrow_mut().close_held(turn);
            }
        }
        let world = &mut *turn.driver;
        for job in std::mem::take(&mut world.effects.jobs) {
            world.storages.waiting.push_back((pool.clone(), job));
        }
        if !world.storages.is_holding {
            world.run_jobs();
        }
        result
    }

    fn with_numbers<R>(&mut self, f: impl FnOnce(&mut Numbers) -> R) -> R {
        f(&mut self.storages.numbers)
    }

    fn store(&mut self, change: StoreChange, promise: Option<Promise<'_, World>>) {
        let promised = promise.map(|promise| match (promise, &change) {
            (Promise::Session(line), _) => Waiter::Session(line.id),
            (Promise::Answer, StoreChange::Answer(row)) => {
                Waiter::Answer(row.pool.clone(), row.number)
            }
            (Promise::Answer, _) => unreachable!("only an answer's row is awaited like this"),
        });
        self.store.push(change, promised);
    }

    fn reoffer(
        _turn: &mut Turn<'_, Self>,
        _pool: &PoolHandle,
        _name: &PoolName,
        block: &latzero_protocol::BlockId,
    ) -> Result<(), Refusal> {
        // No client here holds a descriptor to offer.
        Err(Refusal::new(
            Code::NoBlock,
            format!("block '{block}' is not awaited"),
        ))
    }

    fn report(_turn: &mut Turn<'_, Self>, what: Report, _view: &View<'_>) -> String {
        match what {
            Report::Stats => "{}".into(),
            Report::Health => r#"{"status":"ok"}"#.into(),
        }
    }

    fn random(&mut self) -> [u8; 32] {
        self.nonces += 1;
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&self.nonces.to_be_bytes());
        nonce
    }

    fn admin(
        &mut self,
        _action: &AdminAction,
        _asker: &Line,
        _id: Option<&str>,
    ) -> Result<Option<String>, Refusal> {
        Ok(Some("{}".into()))
    }

    fn observe(&mut self, what: Observed<'_, Self>) {
        match what {
            Observed::Message(to, class, sent, frame) => {
                self.observer.message(to.id, class, sent, frame);
            }
            Observed::Lost(to, count) => {
                (0..count).for_each(|_| {
                    self.observer
                        .message(to.id, Class::Event, latzero_fabric::Sent::Full, &[])
                });
            }
            Observed::Closing(line) => {
                let connection = &mut self.connections[line.id.0 as usize];
                if std::mem::take(&mut connection.is_open) {
                    self.observer.note(Event::Closed(line.id));
                }
            }
            Observed::Refused(code) => self.observer.note(Event::Refused(code)),
            Observed::Counted(what) => self.observer.note(Event::Counted(what)),
            Observed::Audit(_, audit) => {
                let text = format!("{} {}", audit.event, audit.detail);
                self.observer.audited.push(text);
            }
        }
    }
}

fn store_result(went_well: bool) -> Result<(), Refusal> {
    if went_well {
        return Ok(());
    }
    Err(Refusal::new(Code::Storage, "the disk is full"))
}

/// Takes the first frame from a server's output, with its length; `None` if it is incomplete.
///
/// # Panics
/// If the bytes are not what a server may write.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<(Message, usize)> {
    let accept = Accept {
        max_frame: latzero_protocol::limits::MAX_FRAME_DEFAULT
            + latzero_protocol::limits::FORWARD_SLACK,
        attachments: true,
    };
    let (Frame { json, attachment }, used) =
        frame::decode(bytes, accept).expect("the server writes frames")?;
    let mut json = serde_json::Deserializer::from_slice(json);
    // Data may nest deeper than the usual limit.
    json.disable_recursion_limit();
    let json = json.into_iter().next().expect("the server writes JSON");
    let json = json.expect("the server writes JSON");
    let attachment = attachment.map(<[u8]>::to_vec);
    Some((Message { json, attachment }, used))
}

/// Encodes a frame as a client does: `json`, with raw bytes if there are any.
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
