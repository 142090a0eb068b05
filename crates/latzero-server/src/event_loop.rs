//! The loop that reads connections, runs what was read, and writes each touched connection once.
//!
//! One thread, one `epoll` set. A turn: wait; read each ready connection until its socket is empty
//! or its budget is spent, running the messages as they come; end what is due; then write what was
//! appended, each connection once. A long turn puts off what is left to read, and there users take
//! turns.
//!
//! A message is never handed to another thread on its way. Measured against a runtime's tasks this
//! saves a wakeup per hop: sockets are watched for reading, and for writing only while the
//! kernel takes nothing, because a Unix socket otherwise reports "writable" each time its peer
//! reads. Those with TLS are always watched for both: TLS writes by itself too, and TCP reports
//! "writable" only if it was full.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use latzero_fabric::ledger::{Account, Resource};
use latzero_fabric::{Class, Flow, Session, Time, Turn, ledger};
use latzero_protocol::{BlockId, PoolName, encode};
use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use crate::attempts::REST_MS;
use crate::builtin::BuiltIn;
use crate::connection::{Connection, Liveness, ReadOutcome, Timeouts};
use crate::handover;
use crate::host::IoHost;
use crate::listener::{Accepted, Listener, Origin, accept, count_out};
use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::Socket;
use crate::startup::descriptors::{AcceptBackoff, SpareDescriptor};
use crate::startup::systemd::Notifier;
use crate::steps::Watch;
use crate::turns::Turns;

const WAKER: Token = Token(0);
const FIRST_LISTENER: usize = 1;
const FIRST_CONNECTION: usize = 1024;

/// A bit in the token of a connection: the event is about the process that opened it.
const OF_PROCESS: usize = 1 << (usize::BITS - 1);

/// Bytes read from a socket at once.
const READ_BYTES: usize = 256 * 1024;

/// How many connections are accepted in one turn, so that a burst does not delay established ones;
/// and few enough that their handshakes are read before the limit is reached.
const ACCEPTS_PER_TURN: usize = 16;

/// How long the other loops have to read what was accepted for them, before more is accepted.
const ACCEPT_AGAIN_MS: u64 = 1;

/// How long a turn reads connections, in microseconds; those that are left wait for the next turn,
/// after those that become ready. The server's own user is not put off, so a call of that user
/// waits for two turns at most: one for the call, one for the answer.
const TURN_US: u64 = 500;

/// How much time of one turn is spent on TLS handshakes; the rest of them wait for the next turn,
/// after the connections that are ready then.
const HANDSHAKES_PER_TURN: Duration = Duration::from_micros(500);

/// The coarsest step of the clock when many connections have timeouts, in milliseconds.
const SWEEP_EVERY_MS: u64 = 100;

/// How long large buffers are kept for the next large frames, in milliseconds.
const LARGE_KEPT_MS: u64 = 250;

/// How often a connection is written to again while too many descriptors are in flight, in
/// milliseconds.
const CROWDED_EVERY_MS: u64 = 10;

/// While draining: how often to check whether the last call has ended, and over how many checks
/// closing the connections is spread.
const DRAIN_LOOK_MS: u64 = 20;
const DRAIN_SPREAD: usize = 100;

/// The parts that only the first loop has.
pub(crate) struct Front {
    pub(crate) listeners: Vec<Listener>,
    /// Paths of sockets that a service manager created.
    pub(crate) passed: Vec<PathBuf>,
    pub(crate) spare: SpareDescriptor,
    pub(crate) notifier: Option<Notifier>,
    pub(crate) watchdog: Option<Duration>,
}

/// Which connections a turn of a loop reads as they become readable. The others are queued by user.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reads {
    /// Any of them.
    Any,
    /// Those of trusted users: others have waited.
    Trusted,
    /// Any of them until the turn is late: one has been read.
    Begun,
}

/// One loop.
pub(crate) struct EventLoop {
    index: usize,
    host: IoHost,
    poll: Poll,
    connections: Vec<Option<Box<Connection>>>,
    free: Vec<usize>,
    live: usize,
    /// Connections that have more data, or may be read again, and whether they had completed no
    /// handshake.
    ready: Turns<(usize, bool)>,
    /// What other threads sent.
    commands: VecDeque<Command>,
    scratch: Vec<u8>,
    /// When this turn puts off what is left to read.
    late_at: Time,
    /// How much time of this turn was spent on TLS handshakes.
    handshaking: Duration,
    sweep_at: Option<Time>,
    /// Connections of this loop to write to again, and when.
    crowded: Vec<Arc<Peer>>,
    crowded_at: Option<Time>,
    /// Connections that are not read because their users guess, and until when. One that is closed
    /// meanwhile keeps no descriptor open.
    resting: VecDeque<(Time, Weak<Peer>)>,
    front: Option<Front>,
    backoff: AcceptBackoff,
    /// When accepting continues, after the system refused.
    accept_at: Option<Time>,
    watchdog_at: Option<Time>,
    /// The store's heartbeat, and scheduled backups.
    upkeep_at: Option<Time>,
    drain: Option<Drain>,
}

/// A drain in progress.
struct Drain {
    deadline: Time,
    is_closing: bool,
    /// Whether messages are no longer handled here, except from a server that takes over.
    is_quiet: bool,
    per_look: usize,
    gone_by: Option<Time>,
    /// When the next connections are closed.
    next_at: Time,
}

impl EventLoop {
    /// A loop that is ready to run. The first one has the listeners and the built-in app.
    pub(crate) fn new(
        shared: &Arc<ServerState>,
        index: usize,
        front: Option<Front>,
    ) -> io::Result<EventLoop> {
        let poll = Poll::new()?;
        shared.loops.mailboxes[index].attach(Waker::new(poll.registry(), WAKER)?);
        let mut event_loop = EventLoop {
            index,
            host: IoHost::new(shared, index),
            poll,
            connections: Vec::new(),
            free: Vec::new(),
            live: 0,
            ready: Turns::default(),
            commands: VecDeque::new(),
            scratch: vec![0; READ_BYTES],
            late_at: Time::default(),
            handshaking: Duration::ZERO,
            sweep_at: None,
            crowded: Vec::new(),
            crowded_at: None,
            resting: VecDeque::new(),
            front: None,
            backoff: AcceptBackoff::default(),
            accept_at: None,
            watchdog_at: None,
            upkeep_at: None,
            drain: None,
        };
        if let Some(front) = front {
            let now = shared.clock.now();
            let (rows, is_same_boot) = crate::persistence::load(&mut event_loop.host);
            crate::blocks::adopt_all(&mut event_loop.host, rows, is_same_boot);
            let builtin = BuiltIn::start(&mut event_loop.host);
            *shared.core.builtin.lock().expect("nobody else is here yet") = Some(builtin);
            event_loop.host.flush();
            for (i, listener) in front.listeners.iter().enumerate() {
                let token = Token(FIRST_LISTENER + i);
                event_loop.poll.registry().register(
                    &mut SourceFd(&listener.raw_fd()),
                    token,
                    Interest::READABLE,
                )?;
            }
            event_loop.upkeep_at = Some(now);
            event_loop.watchdog_at = front
                .watchdog
                .map(|every| now.after_ms(every.as_millis() as u64 / 2));
            event_loop.front = Some(front);
        }
        Ok(event_loop)
    }

    /// Runs until the server ends.
    ///
    /// # Errors
    /// If the kernel's poll fails, which leaves nothing to turn on.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let shared = Arc::clone(&self.host.shared);
        let mut watch = Watch::new(shared.clock.read());
        loop {
            let timeout = self.timeout(shared.clock.now());
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => other?,
            }
            self.host.now = shared.clock.read();
            if self.index == 0 && watch.check(self.host.now, &shared) {
                self.host.now = shared.clock.read();
            }
            let now = self.host.now.monotonic;
            self.handshaking = Duration::ZERO;
            self.late_at = Time(now.0 + TURN_US);
            // What waited since the last turn comes first, and one connection is always read.
            let mut reads = match self.ready.is_empty() {
                true => Reads::Any,
                false => Reads::Trusted,
            };
            for event in &events {
                self.handle_event(now, event, &mut reads);
            }
            self.handle_commands(now);
            if !self.ready.is_empty() {
                // What was read so far does not wait for the others, which may take a turn's time.
                self.host.flush();
            }
            for _ in 0..self.ready.len() {
                if reads == Reads::Begun && self.is_late() {
                    break;
                }
                let Some((_, (slot, is_unauthenticated))) = self.ready.pop() else {
                    break;
                };
                reads = Reads::Begun;
                if is_unauthenticated {
                    shared.loops.unread.fetch_sub(1, Relaxed);
                }
                if let Some(Some(connection)) = self.connections.get_mut(slot) {
                    connection.is_queued = false;
                }
                self.read(now, slot);
            }
            self.handle_deadlines(now);
            self.finish_turn(now);
            if shared.loops.is_over.load(Relaxed) || self.drain(now) {
                while !self.commands.is_empty() {
                    self.handle_commands(now);
                }
                self.finish_turn(now);
                while self.host.catch_up() {}
                return Ok(());
            }
        }
    }

    /// How long the kernel may let the loop wait.
    fn timeout(&self, now: Time) -> Option<Duration> {
        let effects = &self.host.effects;
        let is_left = !self.commands.is_empty() || !effects.closing.is_empty();
        if is_left || !self.ready.is_empty() || self.host.is_behind() {
            return Some(Duration::ZERO);
        }
        let timers = (self.index == 0)
            .then(|| self.host.shared.core.timers.next())
            .flatten();
        let drain = self.drain.is_some().then(|| now.after_ms(DRAIN_LOOK_MS));
        let next = [
            timers,
            self.sweep_at,
            self.crowded_at,
            self.resting.front().map(|(until, _)| *until),
            self.accept_at,
            self.watchdog_at,
            self.upkeep_at,
            drain,
        ]
        .into_iter()
        .flatten()
        .min()?;
        // Rounded up: a wait that ends too early would be followed by another.
        Some(next.since(now) + Duration::from_micros(u64::from(next > now) * 500))
    }

    /// Whether this turn has taken so long that what is left to read waits for the next.
    fn is_late(&self) -> bool {
        self.host.shared.clock.now() >= self.late_at
    }

    /// Handles an event.
    fn handle_event(&mut self, now: Time, event: &Event, reads: &mut Reads) {
        let Token(token) = event.token();
        if event.token() == WAKER {
            let commands = self.host.shared.loops.mailboxes[self.index].take();
            self.commands.extend(commands);
        } else if token & OF_PROCESS != 0 {
            self.handle_process_end((token & !OF_PROCESS) - FIRST_CONNECTION);
        } else if token < FIRST_CONNECTION {
            self.accept(now, token - FIRST_LISTENER);
        } else {
            let slot = token - FIRST_CONNECTION;
            if event.is_writable()
                && let Some(Some(connection)) = self.connections.get(slot)
            {
                let peer = Arc::clone(&connection.peer);
                if let Some(socket) = &peer.socket {
                    socket.flush();
                }
                // If a write fails because too many descriptors are in flight, the kernel still
                // reports "writable" at once, so the write is retried by time.
                if !self.crowded.iter().any(|known| Arc::ptr_eq(known, &peer)) {
                    self.host.flush_peer(&peer);
                }
            }
            if event.is_readable() || event.is_read_closed() || event.is_error() {
                let Some(Some(connection)) = self.connections.get_mut(slot) else {
                    return;
                };
                connection.is_ending |= event.is_read_closed() || event.is_error();
                let (is_queued, user) = (connection.is_queued, connection.user);
                if is_queued {
                    // Its turn comes.
                } else if user.is_trusted() {
                    self.read(now, slot);
                } else if *reads == Reads::Any || *reads == Reads::Begun && !self.is_late() {
                    *reads = Reads::Begun;
                    self.read(now, slot);
                } else {
                    self.read_later(slot);
                }
            }
        }
    }

    /// The process that opened a connection has ended, and others may hold the socket. What was
    /// sent until now is still read, as at any end; the kernel reports that end then.
    fn handle_process_end(&self, slot: usize) {
        // The event may belong to an earlier connection in this slot.
        if let Some(Some(connection)) = self.connections.get(slot)
            && connection.peer.process.has_ended()
            && let Some(socket) = &connection.peer.socket
            && !socket.has_hung_up()
        {
            connection.peer.is_outlived.store(true, Relaxed);
            socket.shutdown(std::net::Shutdown::Read);
        }
    }

    /// Handles what came from other threads, in its order. One commit of the store may answer very
    /// many calls, so what is left after some time waits for the next turn.
    fn handle_commands(&mut self, now: Time) {
        let until = Time(self.host.shared.clock.now().0 + TURN_US);
        while let Some(command) = self.commands.pop_front() {
            self.handle_command(now, command);
            if self.host.shared.clock.now() >= until {
                break;
            }
        }
    }

    fn handle_command(&mut self, now: Time, command: Command) {
        match command {
            Command::Adopt(peer, origin) => {
                self.adopt(now, peer, origin);
                self.host.shared.loops.unread.fetch_sub(1, Relaxed);
            }
            Command::Resume(peer) => self.resume_connections(now, &peer),
            Command::Close(peer) => self.close_peer(now, &peer),
            Command::AwaitWritable(peer) => self.await_writable(&peer),
            Command::Look => {}
            Command::Judge => self.schedule_sweep(now),
            Command::Reply(peer, id, result) => {
                self.host
                    .turn()
                    .send(&peer, Class::Control, 512, |out| match &result {
                        Ok(reply) => encode::reply(out, &id, reply),
                        Err(refusal) => encode::refusal(out, Some(&id), refusal),
                    });
            }
            Command::HandOver(peer, id, step) => {
                let front = self.front.as_ref();
                let sockets = front.map(|front| (&front.listeners[..], &front.passed[..]));
                let sockets = sockets.unwrap_or_default();
                handover::hand_over(&mut self.host, sockets, (&peer, id.as_deref()), step);
            }
            Command::StoreReply(peer, result) => {
                self.answer_session(now, &peer, |session, turn| {
                    session.handle_stored(result, turn)
                })
            }
            Command::Verified(peer, verdict) => self.answer_session(now, &peer, |session, turn| {
                session.handle_verified(verdict, turn)
            }),
            Command::AnswerStored(pool, number, is_on_disk) => {
                self.host.answer_stored(&pool, number, is_on_disk);
            }
            Command::BlockDone(done) => self.host.handle_done(done),
            Command::Watchdog => {
                if let Some(notifier) = self
                    .front
                    .as_ref()
                    .and_then(|front| front.notifier.as_ref())
                    && let Err(error) = notifier.notify("WATCHDOG=1")
                {
                    tracing::warn!(%error, "cannot notify the service manager's watchdog");
                }
            }
        }
    }

    /// Takes over what the previous server handed over.
    pub(crate) fn take_over(&mut self, blocks: Vec<(PoolName, BlockId, OwnedFd)>) {
        crate::blocks::take_over(&mut self.host, blocks);
    }

    /// Gives a session the answer that it waits for.
    fn answer_session(
        &mut self,
        now: Time,
        peer: &Arc<Peer>,
        answer: impl FnOnce(&mut Session<IoHost>, &mut Turn<'_, IoHost>) -> Flow,
    ) {
        let Some(slot) = self.slot_of(peer) else {
            return;
        };
        let Some(mut connection) = self.connections[slot].take() else {
            return;
        };
        if connection.is_closing() {
            self.connections[slot] = Some(connection);
            return;
        }
        let mut flow = answer(&mut connection.session, &mut self.host.turn());
        if flow == Flow::Continue {
            flow = connection.session.resume(&mut self.host.turn());
        }
        if connection.session.is_ready() {
            connection.count_for_app();
        }
        self.connections[slot] = Some(connection);
        if flow == Flow::Close {
            self.close_peer(now, peer);
        } else {
            // Handles what it sent while it waited.
            self.read_later(slot);
        }
    }

    /// A connection has room for more calls: handles those that wait, then reads it.
    fn resume_connections(&mut self, now: Time, peer: &Arc<Peer>) {
        let Some(slot) = self.slot_of(peer) else {
            return;
        };
        let Some(mut connection) = self.connections[slot].take() else {
            return;
        };
        let flow = match connection.is_closing() {
            true => Flow::Continue,
            false => connection.session.resume(&mut self.host.turn()),
        };
        self.connections[slot] = Some(connection);
        match flow {
            Flow::Close => self.close_peer(now, peer),
            Flow::Continue => self.read_later(slot),
        }
    }

    fn slot_of(&self, peer: &Arc<Peer>) -> Option<usize> {
        let slot = peer.token.load(Relaxed) as usize;
        let connection = self.connections.get(slot)?.as_ref()?;
        Arc::ptr_eq(&connection.peer, peer).then_some(slot)
    }

    fn accept(&mut self, now: Time, index: usize) {
        let shared = Arc::clone(&self.host.shared);
        // Those before them complete their handshakes first, or they would count as silent.
        for _ in shared.loops.unread.load(Relaxed)..ACCEPTS_PER_TURN {
            let Some(front) = &mut self.front else { return };
            let Some(listener) = front.listeners.get(index) else {
                return;
            };
            match accept(listener, &mut front.spare, &shared) {
                Accepted::Peer(peer, origin) => {
                    self.backoff.succeeded();
                    if peer.home == self.index {
                        self.adopt(now, peer, origin);
                    } else {
                        // Read once that loop gets to it.
                        shared.loops.unread.fetch_add(1, Relaxed);
                        shared.loops.mailboxes[peer.home].send(Command::Adopt(peer, origin));
                    }
                }
                Accepted::Refused => {}
                Accepted::Nobody => return,
                Accepted::Failed(error) => {
                    let wait = self.backoff.failed();
                    tracing::warn!(%error, retry_ms = wait.as_millis() as u64, "cannot accept a \
                        connection");
                    self.accept_at = Some(now.after_ms(wait.as_millis() as u64));
                    return;
                }
            }
        }
        // There may be more: an edge is reported once. Other loops are given time to read.
        let wait = if self.ready.is_empty() {
            ACCEPT_AGAIN_MS
        } else {
            0
        };
        self.accept_at = Some(now.after_ms(wait));
    }

    fn adopt(&mut self, now: Time, peer: Arc<Peer>, origin: Origin) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        peer.token.store(
            u32::try_from(slot).expect("connections are bounded far below 2^32"),
            Relaxed,
        );
        let fd = raw_fd(&peer);
        let token = Token(FIRST_CONNECTION + slot);
        if let Err(error) =
            self.poll
                .registry()
                .register(&mut SourceFd(&fd), token, interest(&peer, false))
        {
            tracing::warn!(%error, "cannot watch a connection");
            self.free.push(slot);
            self.host.shared.unauthenticated().leave(origin.user);
            count_out(origin.user, &self.host.shared);
            return;
        }
        self.watch_process(slot, &peer);
        let connection = Connection::new(now, peer, origin, &self.host);
        self.connections[slot] = Some(Box::new(connection));
        self.live += 1;
        self.schedule_sweep(
            now.after_ms(self.host.shared.settings().handshake_timeout.as_millis() as u64),
        );
        // Data that arrived with the connection is read at once.
        self.read_later(slot);
    }

    fn watch_process(&self, slot: usize, peer: &Peer) {
        if let Some(process) = peer.process.raw_fd() {
            let token = Token(OF_PROCESS | (FIRST_CONNECTION + slot));
            let registry = self.poll.registry();
            // A process that has already ended is reported at once.
            if let Err(error) =
                registry.register(&mut SourceFd(&process), token, Interest::READABLE)
            {
                tracing::warn!(%error, "cannot watch the process of a connection");
            }
        } else if peer.process.has_ended()
            && let Some(socket) = &peer.socket
        {
            socket.shutdown(std::net::Shutdown::Read);
        }
    }

    /// Reads a connection in the next turn: it is in the list once, however often it is requested.
    fn read_later(&mut self, slot: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(slot)
            && !std::mem::replace(&mut connection.is_queued, true)
        {
            let is_unauthenticated = connection.is_unauthenticated;
            self.ready.push(connection.user, (slot, is_unauthenticated));
            if is_unauthenticated {
                self.host.shared.loops.unread.fetch_add(1, Relaxed);
            }
        }
    }

    fn read(&mut self, now: Time, slot: usize) {
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return;
        };
        if connection.is_gone {
            self.remove(slot, connection);
            return;
        }
        if connection.session.go_on(&mut self.host.turn()) {
            self.connections[slot] = Some(connection);
            self.read_later(slot);
            return;
        }
        // If writing to it failed, what it sent is read to the end, and then it is closed.
        let write_failed = connection.peer.write_failed.load(Relaxed);
        connection.is_ending |= write_failed;
        if connection.is_paused(&self.host) && !write_failed {
            self.connections[slot] = Some(connection);
            return;
        }
        // What it sends is not run any more, also while others are closed before it.
        if let Some(at) = (self.host.effects.closing.iter())
            .position(|closing| Arc::ptr_eq(closing, &connection.peer))
        {
            let peer = self.host.effects.closing.swap_remove(at);
            self.connections[slot] = Some(connection);
            self.close_peer(now, &peer);
            return;
        }
        let is_handshaking = connection.is_handshaking();
        if is_handshaking && self.handshaking >= HANDSHAKES_PER_TURN {
            self.connections[slot] = Some(connection);
            self.read_later(slot);
            return;
        }
        let began = is_handshaking.then(Instant::now);
        let budget = self.read_budget();
        let turn = match connection.read(now, &mut self.host, &mut self.scratch, budget) {
            ReadOutcome::Idle if write_failed => ReadOutcome::Ended,
            turn => turn,
        };
        self.handshaking += began.map_or(Duration::ZERO, |began| began.elapsed());
        // A handshake that is being stored has arrived completely.
        let session = &connection.session;
        let has_come = session.is_ready() || session.has_shaken_hands();
        if connection.is_unauthenticated && (has_come || turn == ReadOutcome::Ended) {
            connection.is_unauthenticated = false;
            connection.count_for_app();
            self.host.shared.unauthenticated().leave(connection.user);
        }
        if let Some(at) = connection.session.next_deadline() {
            self.schedule_sweep(at.max(now.after_ms(SWEEP_EVERY_MS)));
        }
        match turn {
            ReadOutcome::Idle | ReadOutcome::Paused => self.connections[slot] = Some(connection),
            ReadOutcome::Starved => {
                self.connections[slot] = Some(connection);
                self.schedule_sweep(now.after_ms(SWEEP_EVERY_MS));
            }
            ReadOutcome::More => {
                self.connections[slot] = Some(connection);
                self.read_later(slot);
            }
            ReadOutcome::Close => {
                let peer = Arc::clone(&connection.peer);
                self.connections[slot] = Some(connection);
                // At once: nothing of what stands behind may be run.
                self.close_peer(now, &peer);
            }
            ReadOutcome::Ended => {
                let _ = connection.session.closed(&mut self.host.turn());
                // Answers to what came just before the end still go out, as far as the socket takes
                // them.
                self.host.flush();
                self.host.flush_peer(&connection.peer);
                self.remove(slot, connection);
            }
        }
    }

    fn read_budget(&self) -> usize {
        self.host.shared.config.read_budget
    }

    /// Removes a connection, once its session has ended.
    fn remove(&mut self, slot: usize, mut connection: Box<Connection>) {
        if connection.session.closed(&mut self.host.turn()) {
            connection.is_gone = true;
            self.close_link(&connection.peer);
            self.connections[slot] = Some(connection);
            self.read_later(slot);
            return;
        }
        if connection.is_unauthenticated {
            self.host.shared.unauthenticated().leave(connection.user);
        }
        let peer = &connection.peer;
        if let Err(error) = self
            .poll
            .registry()
            .deregister(&mut SourceFd(&raw_fd(peer)))
        {
            tracing::debug!(%error, "a connection was no longer watched");
        }
        if let Some(process) = peer.process.raw_fd()
            && let Err(error) = self.poll.registry().deregister(&mut SourceFd(&process))
        {
            tracing::debug!(%error, "the process of a connection was no longer watched");
        }
        self.close_link(peer);
        count_out(connection.user, &self.host.shared);
        if let Some(socket) = &peer.socket {
            // Others may hold the socket a moment longer; the other end should not have to wait for
            // them.
            socket.shutdown(std::net::Shutdown::Both);
        }
        self.live -= 1;
        self.free.push(slot);
    }

    fn close_link(&self, peer: &Peer) {
        let mut link = peer.link();
        if link.outbox.is_blocked() {
            let stats = &self.host.shared.books.stats;
            stats.slow_readers.fetch_sub(1, Relaxed);
        }
        link.close();
    }

    fn close_peer(&mut self, now: Time, peer: &Arc<Peer>) {
        if peer.home != self.index {
            self.host.shared.loops.mailboxes[peer.home].send(Command::Close(Arc::clone(peer)));
            return;
        }
        let Some(slot) = self.slot_of(peer) else {
            return;
        };
        let Some(mut connection) = self.connections[slot].take() else {
            return;
        };
        connection.close(now, &mut self.host);
        self.connections[slot] = Some(connection);
        self.host.flush();
        self.host.flush_peer(peer);
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            connection.shut_when_written();
        }
        self.schedule_sweep(now.after_ms(SWEEP_EVERY_MS));
        self.read_later(slot);
    }

    fn await_writable(&mut self, peer: &Arc<Peer>) {
        let Some(slot) = self.slot_of(peer) else {
            return;
        };
        let is_blocked = peer.link().outbox.is_blocked();
        if let Some(Some(connection)) = self.connections.get_mut(slot) {
            connection.count_tls_output();
        }
        let interest = interest(peer, is_blocked);
        let token = Token(FIRST_CONNECTION + slot);
        if let Err(error) =
            self.poll
                .registry()
                .reregister(&mut SourceFd(&raw_fd(peer)), token, interest)
        {
            tracing::warn!(%error, "cannot watch a connection for writing");
        }
        self.schedule_sweep(self.host.shared.clock.now().after_ms(SWEEP_EVERY_MS));
    }

    /// Writes what was appended and closes what is to be closed.
    fn finish_turn(&mut self, now: Time) {
        loop {
            for peer in std::mem::take(&mut self.host.effects.resumed) {
                if peer.home == self.index {
                    self.resume_connections(now, &peer);
                } else {
                    self.host.shared.loops.mailboxes[peer.home].send(Command::Resume(peer));
                }
            }
            self.host.flush();
            self.host.catch_up();
            // One message may close all connections of an app.
            let until = Time(self.host.shared.clock.now().0 + TURN_US);
            while let Some(peer) = self.host.effects.closing.pop() {
                self.close_peer(now, &peer);
                if self.host.shared.clock.now() >= until {
                    break;
                }
            }
            if self.host.effects.resumed.is_empty() {
                break;
            }
        }
        for peer in std::mem::take(&mut self.host.changed) {
            if peer.home == self.index {
                self.await_writable(&peer);
                if let Some(slot) = self.slot_of(&peer)
                    && let Some(connection) = &mut self.connections[slot]
                {
                    connection.shut_when_written();
                }
            } else {
                self.host.shared.loops.mailboxes[peer.home].send(Command::AwaitWritable(peer));
            }
        }
        for peer in std::mem::take(&mut self.host.crowded) {
            if peer.home != self.index {
                // Its own loop tries again, as soon as it watches it for writing.
                self.host.shared.loops.mailboxes[peer.home].send(Command::AwaitWritable(peer));
            } else if !self.crowded.iter().any(|known| Arc::ptr_eq(known, &peer)) {
                self.crowded.push(peer);
                self.crowded_at = Some(now.after_ms(CROWDED_EVERY_MS));
            }
        }
        for peer in std::mem::take(&mut self.host.resting) {
            self.await_writable(&peer);
            let until = now.after_ms(REST_MS);
            self.resting.push_back((until, Arc::downgrade(&peer)));
        }
        self.host.count();
        if self.host.shared.core.context.ledger.is_over_limit() {
            self.schedule_sweep(now.after_ms(SWEEP_EVERY_MS));
        }
        if self.host.effects.buffers.has_large() {
            self.schedule_sweep(now.after_ms(LARGE_KEPT_MS));
        }
    }

    fn handle_deadlines(&mut self, now: Time) {
        if self.index == 0 {
            let shared = Arc::clone(&self.host.shared);
            // Each ends a bounded number of calls and waits; the rest is due in the next turn.
            let late_at = Time(shared.clock.now().0 + TURN_US);
            while let Some(pool) = shared.core.timers.pop_due(now) {
                self.host.handle_timeout(&pool);
                if shared.clock.now() >= late_at {
                    break;
                }
            }
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept_at = None;
            for index in 0..self.front.as_ref().map_or(0, |front| front.listeners.len()) {
                self.accept(now, index);
            }
        }
        if self.upkeep_at.is_some_and(|at| at <= now) {
            self.upkeep_at = Some(now.after_ms(crate::maintenance::CHECK_EVERY_MS));
            crate::maintenance::run_schedule(&self.host.shared, now);
        }
        if self.watchdog_at.is_some_and(|at| at <= now) {
            let every = self.front.as_ref().and_then(|front| front.watchdog);
            self.watchdog_at = every.map(|every| now.after_ms(every.as_millis() as u64 / 2));
            self.host.shared.loops.mailboxes[self.index].send(Command::Watchdog);
        }
        if self.crowded_at.is_some_and(|at| at <= now) {
            self.crowded_at = None;
            for peer in std::mem::take(&mut self.crowded) {
                self.host.flush_peer(&peer);
            }
        }
        while let Some((until, _)) = self.resting.front()
            && *until <= now
            && let Some((_, peer)) = self.resting.pop_front()
        {
            let Some(peer) = peer.upgrade() else {
                continue;
            };
            peer.is_resting.store(false, Relaxed);
            self.await_writable(&peer);
            if let Some(slot) = self.slot_of(&peer) {
                self.read_later(slot);
            }
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep(now);
        }
    }

    fn schedule_sweep(&mut self, at: Time) {
        self.sweep_at = Some(self.sweep_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Checks the timeouts of every connection, and makes room if memory is short.
    fn sweep(&mut self, now: Time) {
        let settings = self.host.shared.settings();
        let timeout = Timeouts {
            handshake_ms: settings.handshake_timeout.as_millis() as u64,
            ping_interval_ms: settings.ping_interval.as_millis() as u64,
            ping_timeout_ms: settings.ping_timeout.as_millis() as u64,
            write_stall_ms: settings.write_stall_timeout.as_millis() as u64,
        };
        self.shed_load(now);
        self.host.effects.buffers.free_large();
        let mut next: Option<Time> = None;
        for slot in 0..self.connections.len() {
            let Some(connection) = &mut self.connections[slot] else {
                continue;
            };
            let session = &mut connection.session;
            if session.handle_timeout(&mut self.host.turn())
                && session.resume(&mut self.host.turn()) == Flow::Close
            {
                let peer = Arc::clone(&connection.peer);
                self.host.effects.closing.push(peer);
            }
            let verdict = connection.check_liveness(now, &timeout, &self.host);
            // Another loop may have written the last of it.
            connection.shut_when_written();
            match verdict {
                Liveness::Wait(at) => next = next.into_iter().chain(at).min(),
                Liveness::Ping => {
                    connection.ping(now, &mut self.host);
                    next = next
                        .into_iter()
                        .chain([now.after_ms(timeout.ping_timeout_ms)])
                        .min();
                }
                Liveness::NoHandshake => {
                    connection.refuse_silence(&mut self.host);
                    let peer = Arc::clone(&connection.peer);
                    self.host.effects.closing.push(peer);
                }
                Liveness::Remove(why) => {
                    let connection = self.connections[slot].take().expect("it was just found");
                    self.note_removal(&connection, why);
                    self.remove(slot, connection);
                }
            }
        }
        self.sweep_at = next.map(|at| at.max(now.after_ms(SWEEP_EVERY_MS)));
    }

    /// Closes connections while the data that waits for them uses up the memory, and reads those
    /// again that were not read because of that.
    fn shed_load(&mut self, now: Time) {
        let shared = Arc::clone(&self.host.shared);
        while shared.core.context.ledger.is_over_limit() {
            let connections = self.connections.iter().enumerate();
            let holdings = connections.filter_map(|(slot, c)| c.as_ref().map(|c| c.holding(slot)));
            let Some(slot) = ledger::victim(now, holdings) else {
                break;
            };
            let connection = self.connections[slot].take().expect("it was just seen");
            self.note_removal(
                &connection,
                "memory is short, and this connection has held the most for the longest",
            );
            self.remove(slot, connection);
        }
        for slot in 0..self.connections.len() {
            if let Some(Some(connection)) = self.connections.get_mut(slot)
                && connection.lacks > 0
            {
                let lacks = std::mem::take(&mut connection.lacks);
                let account = Arc::clone(connection.peer.link().account());
                while let Some(lacking) = account.lacking(Resource::Inbound, lacks)
                    && self.make_room(now, slot, lacking)
                {}
                self.read_later(slot);
            }
        }
    }

    /// Closes the connection that holds the most for the longest in an account, so that another one
    /// can be read; false if there is none.
    fn make_room(&mut self, now: Time, for_slot: usize, lacking: &Arc<Account>) -> bool {
        let connections = self.connections.iter().enumerate();
        let others = connections.filter_map(|(slot, c)| Some((slot, c.as_ref()?)));
        let holdings = others
            .filter(|(slot, c)| *slot != for_slot && c.peer.link().account().is_of(lacking))
            .map(|(slot, c)| c.holding(slot));
        let Some(slot) = ledger::victim(now, holdings) else {
            return false;
        };
        let connection = self.connections[slot].take().expect("it was just seen");
        self.note_removal(&connection, "it holds memory that other connections need");
        self.remove(slot, connection);
        true
    }

    fn note_removal(&self, connection: &Connection, why: &'static str) {
        if connection.is_closing() {
            return;
        }
        let stats = &self.host.shared.books.stats;
        let counter = if why.contains("ping") {
            &stats.connections_silent
        } else {
            &stats.connections_stalled
        };
        counter.fetch_add(1, Relaxed);
        let app = connection.session.app().map_or("", |(app, _)| app.as_str());
        tracing::warn!(
            app,
            why,
            lost = connection.peer.link().outbox.lost_total(),
            "connection closed"
        );
    }

    /// Continues with a drain; true once this loop has nothing left.
    fn drain(&mut self, now: Time) -> bool {
        let shared = Arc::clone(&self.host.shared);
        if !shared.core.context.is_draining() {
            return false;
        }
        if self.drain.is_none() {
            if let Some(front) = &mut self.front {
                for listener in front.listeners.drain(..) {
                    let _ = self
                        .poll
                        .registry()
                        .deregister(&mut SourceFd(&listener.raw_fd()));
                }
                if let Some(notifier) = &front.notifier {
                    let _ = notifier.notify("STOPPING=1");
                }
            }
            let event = "{\"action\":\"event\",\"event\":\"draining\"}";
            for connection in self
                .connections
                .iter()
                .flatten()
                .filter(|c| c.session.is_ready())
            {
                self.host
                    .turn()
                    .send(&connection.peer, Class::Control, event.len(), |out| {
                        encode::message(out, event)
                    });
            }
            let deadline = now.after_ms(shared.settings().drain_timeout.as_millis() as u64);
            self.drain = Some(Drain {
                deadline,
                is_closing: false,
                is_quiet: false,
                per_look: 0,
                gone_by: None,
                next_at: now,
            });
            self.host.flush();
        }
        let live = self.live;
        let Some(drain) = &mut self.drain else {
            return false;
        };
        if !drain.is_closing
            && (shared.books.stats.calls_in_flight.load(Relaxed) == 0 || drain.deadline <= now)
        {
            drain.is_closing = true;
            // Spread over time, so that not all clients reconnect at once.
            drain.per_look = live.div_ceil(DRAIN_SPREAD).max(64);
            drain.gone_by = Some(now.after_ms(4000));
        }
        if !drain.is_closing {
            return false;
        }
        let (per_look, gone_by) = (drain.per_look, drain.gone_by);
        if drain.next_at <= now {
            drain.next_at = now.after_ms(DRAIN_LOOK_MS);
            self.close_some(now, per_look);
        }
        // Connections that arrived after the listeners were closed are not waited for.
        self.live == 0 || gone_by.is_some_and(|at| at <= now)
    }

    /// Closes this many connections; that of a server that takes over comes last, since it gets the
    /// final report.
    fn close_some(&mut self, now: Time, many: usize) {
        let shared = Arc::clone(&self.host.shared);
        let taker = shared.loops.handover.taker();
        let is_taker = |peer: &Arc<Peer>| taker.as_ref().is_some_and(|t| Arc::ptr_eq(t, peer));
        let open = self.connections.iter().flatten();
        let mut open = open
            .filter(|c| !c.is_closing() && !is_taker(&c.peer))
            .map(|c| Arc::clone(&c.peer));
        let peers: Vec<_> = open.by_ref().take(many).collect();
        let is_quiet = open.next().is_none();
        for peer in peers {
            self.close_peer(now, &peer);
        }
        let Some(drain) = &mut self.drain else { return };
        if is_quiet && !drain.is_quiet {
            drain.is_quiet = true;
            shared.loops.handover.note_quiet();
        }
        let Some(taker) = taker.filter(|taker| taker.home == self.index) else {
            return;
        };
        let slot = self.slot_of(&taker);
        let taker_is_open = slot
            .and_then(|slot| self.connections[slot].as_ref())
            .is_some_and(|connection| !connection.is_closing());
        if taker_is_open && shared.loops.handover.is_quiet(shared.loops.mailboxes.len()) {
            handover::send_rest(&mut self.host, &taker);
            self.close_peer(now, &taker);
        }
    }
}

/// The events that a connection is watched for.
fn interest(peer: &Peer, is_blocked: bool) -> Interest {
    let is_tls = peer.socket.as_ref().is_some_and(Socket::is_tls);
    if peer.is_resting.load(Relaxed) {
        // What comes meanwhile wakes nobody.
        return Interest::WRITABLE;
    }
    match is_blocked || is_tls {
        true => Interest::READABLE | Interest::WRITABLE,
        false => Interest::READABLE,
    }
}

fn raw_fd(peer: &Peer) -> RawFd {
    peer.socket
        .as_ref()
        .expect("only the built-in app has no socket")
        .raw_fd()
}
