//! One connection in its own loop: the socket, data that was read and not yet handled, and its
//! session.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use latzero_crypto::proof::ChannelBinding;
use latzero_fabric::ledger::{Holding, Reservation, Resource};
use latzero_fabric::session::Terms;
use latzero_fabric::{Class, Driver as _, Flow, Session, Time, Transport};
use latzero_protocol::limits::FORWARD_SLACK;
use latzero_protocol::{Ahead, Code, Refusal, encode, frame};
use latzero_tls::Unfinished;

use crate::host::IoHost;
use crate::listener::Origin;
use crate::peer::Peer;
use crate::socket::{Socket, User};

/// Messages from this size on are scanned in slices, one in each turn, because a scan takes up to
/// 5 ns for each byte. Sizes in bytes; such a message never lies in one read.
const SLICED_BYTES_MIN: usize = 512 * 1024;
const SLICE_BYTES: usize = 128 * 1024;

/// How long one connection is handled before the others, and after how many calls and answers the
/// clock is read.
const TIME_BUDGET: Duration = Duration::from_micros(250);
const FRAMES_PER_LOOK: u32 = 4;

/// How much is read at once when memory is short, in bytes.
const SMALL_BYTES: usize = 16 * 1024;

/// Bytes appended to outboxes before a long batch is interrupted to write them.
const FLUSH_BYTES: usize = 1024 * 1024;

/// From this many bytes on, the part of a frame that was read is not copied again.
const LARGE_BYTES: usize = 64 * 1024;

/// How many descriptors a connection may send ahead of the messages that offer them.
const OFFERS_MAX: usize = 64;

/// An idle connection keeps a buffer up to this capacity; larger ones are freed.
const IDLE_BYTES_MAX: usize = 2048;

/// How long, and for how many bytes, a closed connection's last input is read and discarded.
/// Without it the kernel would answer unread bytes with a reset, and the peer might never see why
/// it was closed.
const LINGER_MS: u64 = 1000;
const LINGER_BYTES: usize = 4 * 1024 * 1024;

/// The result of reading a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// The socket is empty.
    Idle,
    /// The budget is spent; there may be more.
    More,
    /// Reading pauses until calls end.
    Paused,
    /// Reading pauses until there is more memory.
    Starved,
    /// The connection closes once its outbox is written.
    Close,
    /// The other end has closed the connection.
    Ended,
}

enum Phase {
    Open,
    /// Messages are no longer handled; the outbox is written, then the rest of the input discarded.
    Closing {
        until: Time,
        left: usize,
        is_shut: bool,
    },
}

/// How many times as large a buffer gets as more of a large frame arrives, at most as large as the
/// frame. What arrived is copied each time, and all of one copy delays others: with 4, at most a
/// quarter of the frame.
const GROWTH: usize = 4;

/// One connection.
pub(crate) struct Connection {
    pub(crate) peer: Arc<Peer>,
    pub(crate) user: User,
    pub(crate) session: Session<IoHost>,
    /// Bytes that were read and not handled: the start of a frame, or frames left while paused.
    inbox: Vec<u8>,
    /// The scan of the large frame at the front of the inbox.
    ahead: Option<Ahead>,
    /// The reservation of the inbox.
    inbound: Reservation,
    /// The reservation of its TLS state.
    tls: Reservation,
    /// Whether its session knows the result of the TLS handshake.
    is_secured: bool,
    /// The number of bytes of memory that it waits for before it is read.
    pub(crate) lacks: u64,
    /// Whether it is in the loop's list of connections to read.
    pub(crate) is_queued: bool,
    /// Received descriptors that were not taken yet.
    offers: VecDeque<OwnedFd>,
    phase: Phase,
    transport: Transport,
    opened: Time,
    last_heard: Time,
    pinged: Option<Time>,
    /// The kernel reported that the other end sends no more: it is read to the end even if paused.
    pub(crate) is_ending: bool,
    /// It was read to the end.
    has_ended: bool,
    /// It is removed once its session has ended.
    pub(crate) is_gone: bool,
    /// Whether it counts among the connections without a handshake.
    pub(crate) is_unauthenticated: bool,
}

/// When to check a connection, and by which timeout.
pub(crate) struct Timeouts {
    pub(crate) handshake_ms: u64,
    pub(crate) ping_interval_ms: u64,
    pub(crate) ping_timeout_ms: u64,
    pub(crate) write_stall_ms: u64,
}

/// What to do with a connection now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    /// Nothing until that time.
    Wait(Option<Time>),
    /// A timeout has passed: close it.
    Remove(&'static str),
    /// It sent no handshake in time.
    NoHandshake,
    /// Send a ping.
    Ping,
}

impl Connection {
    pub(crate) fn new(now: Time, peer: Arc<Peer>, origin: Origin, host: &IoHost) -> Connection {
        let Origin { user, account } = origin;
        let socket = peer
            .socket
            .as_ref()
            .expect("only the built-in app has no socket");
        let transport = socket.transport();
        let terms = Terms {
            transport,
            is_own: user.is_trusted(),
            binding: match transport {
                Transport::Unix => ChannelBinding::Unix {
                    uid: rustix::process::geteuid().as_raw(),
                    pid: std::process::id(),
                },
                Transport::Tcp | Transport::BuiltIn => ChannelBinding::None,
            },
            is_loopback: user.is_of_this_machine(),
            uid: user.uid(),
            is_admin: user.is_trusted(),
            user: account,
            max_frame_before_handshake: host.shared.settings().limits.max_frame_before_handshake,
        };
        let is_secured = !socket.is_tls();
        let inbound = peer.link().account().hold(Resource::Inbound);
        let mut tls = peer.link().account().hold(Resource::Inbound);
        tls.force(socket.held());
        Connection {
            inbound,
            tls,
            is_secured,
            lacks: 0,
            ahead: None,
            is_queued: false,
            session: Session::new(Arc::clone(&peer), terms),
            peer,
            user,
            inbox: Vec::new(),
            offers: VecDeque::new(),
            phase: Phase::Open,
            transport,
            opened: now,
            last_heard: now,
            pinged: None,
            is_ending: false,
            is_gone: false,
            has_ended: false,
            is_unauthenticated: true,
        }
    }

    /// Reads until the socket is empty or `budget` bytes were read, and runs what was read.
    pub(crate) fn read(
        &mut self,
        now: Time,
        host: &mut IoHost,
        scratch: &mut [u8],
        budget: usize,
    ) -> ReadOutcome {
        let turn = self.read_some(now, host, scratch, budget);
        // Releases what was reserved for bytes that did not arrive.
        self.inbound.force(self.inbox.capacity() as u64);
        self.count_tls(turn)
    }

    /// Counts the memory of TLS. Before the end of the TLS handshake the limits apply.
    fn count_tls(&mut self, turn: ReadOutcome) -> ReadOutcome {
        let held = self.socket().held();
        if held == 0 {
            return turn;
        }
        if self.is_secured {
            self.tls.force(held);
            return turn;
        }
        match self.tls.resize(held) {
            Ok(()) => turn,
            Err(_) => ReadOutcome::Ended,
        }
    }

    /// Counts the memory of TLS for written data, when it starts to wait and when it was sent.
    pub(crate) fn count_tls_output(&mut self) {
        let held = self.socket().held();
        if held > 0 {
            self.tls.force(held);
        }
    }

    /// Whether the TLS handshake is in progress.
    pub(crate) fn is_handshaking(&self) -> bool {
        !self.is_secured && self.socket().is_handshaking()
    }

    fn read_some(
        &mut self,
        now: Time,
        host: &mut IoHost,
        scratch: &mut [u8],
        budget: usize,
    ) -> ReadOutcome {
        if matches!(self.phase, Phase::Closing { .. }) {
            return self.discard(scratch);
        }
        if self.has_ended {
            return self.end(host);
        }
        if !self.inbox.is_empty() {
            // Frames that were left when reading paused.
            if let Some(turn) = self.run_inbox(host) {
                return turn;
            }
        }
        let (mut total, started) = (0, Instant::now());
        loop {
            // The rest of a large frame is read directly behind its start, not through the scratch
            // buffer.
            let is_large = self.inbox.len() >= LARGE_BYTES;
            let is_in_place = is_large && self.socket().reads_in_place();
            let Some(room) = self.reserve(is_large, scratch.len(), host) else {
                return ReadOutcome::Starved;
            };
            let scratch = &mut scratch[..room];
            let has_offers = !is_in_place && self.accepts_offers(host);
            let read = if is_in_place {
                let mut inbox = std::mem::take(&mut self.inbox);
                let read = self.socket().read_more(&mut inbox);
                self.inbox = inbox;
                read
            } else if has_offers {
                self.read_offers(scratch)
            } else {
                self.socket().read(scratch)
            };
            let n = match read {
                Ok(0) => return self.end(host),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return ReadOutcome::Idle;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // It caused work but no message: other connections are handled before it continues.
                Err(error) if Unfinished::is(&error) => return ReadOutcome::More,
                Err(error) => {
                    if error.kind() == io::ErrorKind::InvalidData {
                        tracing::debug!(%error, "a connection that is not TLS, or not acceptable");
                    }
                    return self.end(host);
                }
            };
            if !self.is_secured
                && let Some((binding, certified)) = self.socket().secured()
            {
                self.is_secured = true;
                self.session.secured(binding, certified);
            }
            self.last_heard = now;
            self.pinged = None;
            host.traffic.bytes_in += n as u64;
            let stop = if is_in_place {
                self.run_inbox(host)
            } else if self.inbox.is_empty() {
                let (used, stop) = self.run(&scratch[..n], host);
                self.inbox.extend_from_slice(&scratch[used..n]);
                stop
            } else {
                self.inbox.extend_from_slice(&scratch[..n]);
                self.run_inbox(host)
            };
            self.inbound.force(self.inbox.capacity() as u64);
            if let Some(turn) = stop {
                return turn;
            }
            total += n;
            // A short read has emptied the socket (epoll(7)), unless an end is waiting behind the
            // data, or descriptors: recvmsg(2) stops after a message with some (unix(7)).
            let is_drained = !has_offers && self.socket().is_drained(n, scratch.len());
            if is_drained && !self.is_ending {
                return ReadOutcome::Idle;
            }
            if total >= budget || started.elapsed() >= TIME_BUDGET {
                return ReadOutcome::More;
            }
        }
    }

    /// Nothing more arrives. Its pending changes are stored, but nobody is notified.
    fn end(&mut self, host: &mut IoHost) -> ReadOutcome {
        self.has_ended = true;
        if self.session.finish(&mut host.turn()) {
            ReadOutcome::Paused
        } else {
            ReadOutcome::Ended
        }
    }

    /// Makes room for the next read, and returns how many bytes that may be; `None` if there is no
    /// memory. Bytes that do not continue a frame are always read, in small pieces: they may be a
    /// message that frees memory, or from an administrator.
    fn reserve(&mut self, is_large: bool, most: usize, host: &mut IoHost) -> Option<usize> {
        let (length, capacity) = (self.inbox.len(), self.inbox.capacity());
        if !is_large {
            // It is read into the loop's scratch buffer; what is left of it is counted afterwards.
            if self.inbound.has_room((length + most).max(capacity) as u64) {
                return Some(most);
            }
            if length < SMALL_BYTES {
                return Some(SMALL_BYTES.min(most));
            }
            return self.starve((length + most) as u64);
        }
        // As large as the frame's length says, and no larger.
        let whole = frame::announced(&self.inbox);
        if length > whole / 2 {
            host.effects.buffers.prepare(whole + FORWARD_SLACK);
        }
        if length + most <= capacity || (length < capacity && whole <= capacity) {
            return Some(most.min(capacity - length));
        }
        let mut grown = (GROWTH * capacity).max(length + most);
        if whole > length {
            grown = grown.min(whole);
        }
        if self.inbound.resize(grown as u64).is_err() {
            return self.starve(grown as u64);
        }
        match host.effects.buffers.take_large() {
            Some(mut larger) if larger.capacity() >= grown => {
                larger.extend_from_slice(&self.inbox);
                let smaller = std::mem::replace(&mut self.inbox, larger);
                host.effects.buffers.recycle(smaller);
            }
            kept => {
                kept.into_iter()
                    .for_each(|buffer| host.effects.buffers.recycle(buffer));
                self.inbox.reserve_exact(grown - length);
            }
        }
        Some(most.min(self.inbox.capacity() - length))
    }

    /// Nothing is read until there is memory to hold this much.
    fn starve<T>(&mut self, needed: u64) -> Option<T> {
        self.lacks = needed.saturating_sub(self.inbound.amount());
        None
    }

    /// The app of the connection is known: from now on reads count in its account.
    pub(crate) fn count_for_app(&mut self) {
        let mut inbound = self.peer.link().account().hold(Resource::Inbound);
        inbound.force(self.inbound.amount());
        self.inbound = inbound;
        let mut tls = self.peer.link().account().hold(Resource::Inbound);
        tls.force(self.tls.amount());
        self.tls = tls;
    }

    /// Its incoming and outgoing bytes, and when data last moved.
    pub(crate) fn holding<K>(&self, key: K) -> Holding<K> {
        let (outbound, written) = self.peer.link().holding();
        let inbound = self.inbound.amount();
        let since = match (outbound, inbound) {
            (0, _) => self.last_heard,
            (_, 0) => written,
            _ => written.max(self.last_heard),
        };
        Holding {
            key,
            bytes: outbound + inbound + self.tls.amount(),
            since,
        }
    }

    /// Whether descriptors are accepted from this client: while clients may offer blocks of an
    /// earlier run.
    fn accepts_offers(&self, host: &IoHost) -> bool {
        self.transport == Transport::Unix
            && self.session.is_ready()
            && host.shared.storage.blocks.is_awaiting()
    }

    fn read_offers(&mut self, scratch: &mut [u8]) -> io::Result<usize> {
        let mut came = Vec::new();
        let room = OFFERS_MAX - self.offers.len();
        let n = self.socket().read_with(scratch, &mut came, room)?;
        self.offers.extend(came);
        Ok(n)
    }

    fn run_inbox(&mut self, host: &mut IoHost) -> Option<ReadOutcome> {
        let mut inbox = std::mem::take(&mut self.inbox);
        let (used, stop) = self.run(&inbox, host);
        if used == inbox.len() {
            inbox.clear();
            if inbox.capacity() > IDLE_BYTES_MAX {
                host.effects.buffers.recycle(std::mem::take(&mut inbox));
            }
        } else if used > 0 {
            inbox.drain(..used);
        }
        self.inbox = inbox;
        self.inbound.force(self.inbox.capacity() as u64);
        stop
    }

    /// Handles the complete frames in `buf`; returns how many bytes they were, and why it stopped
    /// early.
    fn run(&mut self, buf: &[u8], host: &mut IoHost) -> (usize, Option<ReadOutcome>) {
        let (mut used, mut frames, started) = (0, 0u32, Instant::now());
        loop {
            if self.session.is_waiting() || self.is_paused(host) {
                return (used, Some(ReadOutcome::Paused));
            }
            match frame::decode(&buf[used..], self.session.accept(&host.context().limits)) {
                Ok(Some((frame, length))) => {
                    if frame.json.len() >= SLICED_BYTES_MIN {
                        let ahead = self.ahead.get_or_insert_default();
                        if !ahead.step(frame.json, SLICE_BYTES) {
                            return (used, Some(ReadOutcome::More));
                        }
                    }
                    let ahead = self.ahead.take();
                    used += length;
                    host.traffic.frames_in += 1;
                    // A message that brings no descriptor has none to take, so the queue is as good
                    // as the message's own.
                    let has_offers = !self.offers.is_empty();
                    if has_offers {
                        std::mem::swap(&mut self.offers, &mut host.offers);
                    }
                    let turn = &mut host.turn();
                    let flow = match &ahead {
                        None => self.session.handle(frame, turn),
                        Some(ahead) => self.session.handle_scanned(frame, ahead, turn),
                    };
                    if has_offers {
                        std::mem::swap(&mut self.offers, &mut host.offers);
                    }
                    if flow == Flow::Close {
                        return (used, Some(ReadOutcome::Close));
                    }
                }
                Ok(None) => return (used, None),
                Err(error) => {
                    // A reload may have lowered the limit during the scan.
                    self.ahead = None;
                    let flow = self.session.reject_frame(error, &mut host.turn());
                    match (flow, error.skips()) {
                        (Flow::Continue, Some(length)) => used += length,
                        _ => return (used, Some(ReadOutcome::Close)),
                    }
                }
            }
            if host.effects.appended > FLUSH_BYTES {
                host.flush();
            }
            frames += 1;
            let was_request = std::mem::take(&mut host.effects.was_request);
            let looks = was_request || frames.is_multiple_of(FRAMES_PER_LOOK);
            if looks && started.elapsed() >= TIME_BUDGET {
                return (used, Some(ReadOutcome::More));
            }
        }
    }

    /// Whether it is not read, because too much waits in its session, or its user guesses. One that
    /// ends is read to the end at once.
    pub(crate) fn is_paused(&self, host: &IoHost) -> bool {
        let is_full = || self.session.must_pause(&host.context().limits);
        !self.is_ending && (self.peer.is_resting.load(Relaxed) || is_full())
    }

    /// Ends the session and writes what is left; the connection is removed when that is done.
    pub(crate) fn close(&mut self, now: Time, host: &mut IoHost) {
        if self.is_closing() {
            return;
        }
        // If there is more to end, the loop goes on with it. A server that takes over gets
        // everything.
        while self.session.closed(&mut host.turn()) && host.context().is_draining() {}
        self.offers = VecDeque::new();
        self.inbox = Vec::new();
        self.inbound.force(0);
        self.phase = Phase::Closing {
            until: now.after_ms(LINGER_MS),
            left: LINGER_BYTES,
            is_shut: false,
        };
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.is_gone || matches!(self.phase, Phase::Closing { .. })
    }

    /// Ends the sending side, once everything is written.
    pub(crate) fn shut_when_written(&mut self) {
        let Phase::Closing { is_shut, .. } = &mut self.phase else {
            return;
        };
        if !*is_shut && self.peer.link().outbox.queued() == 0 {
            *is_shut = true;
            if let Some(socket) = &self.peer.socket {
                socket.shutdown(Shutdown::Write);
            }
        }
    }

    fn discard(&mut self, scratch: &mut [u8]) -> ReadOutcome {
        loop {
            match self.socket().discard(scratch) {
                Ok(0) => return ReadOutcome::Ended,
                Ok(n) => {
                    let Phase::Closing { left, .. } = &mut self.phase else {
                        return ReadOutcome::Ended;
                    };
                    *left = left.saturating_sub(n);
                    if *left == 0 {
                        return ReadOutcome::Ended;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return ReadOutcome::Idle;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return ReadOutcome::Ended,
            }
        }
    }

    fn socket(&self) -> &Socket {
        self.peer
            .socket
            .as_ref()
            .expect("only the built-in app has no socket")
    }

    /// Checks the timeouts of a connection.
    pub(crate) fn check_liveness(
        &mut self,
        now: Time,
        timeout: &Timeouts,
        host: &IoHost,
    ) -> Liveness {
        if self.is_paused(host) {
            // Its answers to pings may be among the unread data.
            self.last_heard = now;
            self.pinged = None;
        }
        let stalled_since = self.peer.link().stalled_since();
        let stall = stalled_since.map(|since| since.after_ms(timeout.write_stall_ms));
        if stall.is_some_and(|at| at <= now) {
            return Liveness::Remove("the peer does not read");
        }
        let next = match (&self.phase, self.session.is_ready()) {
            (Phase::Closing { until, .. }, _) if *until <= now && stall.is_none() => {
                return Liveness::Remove("closed");
            }
            (Phase::Closing { until, .. }, _) => Some(*until),
            // Its handshake has arrived and is being stored.
            (Phase::Open, false) if self.session.has_shaken_hands() => None,
            (Phase::Open, false) => {
                let at = self.opened.after_ms(timeout.handshake_ms);
                if at <= now {
                    return Liveness::NoHandshake;
                }
                Some(at)
            }
            // The end of a Unix socket is reported at once; a timeout would only mistake a
            // suspended process for a dead one.
            (Phase::Open, true) if self.transport == Transport::Unix => None,
            (Phase::Open, true) => match self.pinged {
                Some(at) if at.after_ms(timeout.ping_timeout_ms) <= now => {
                    return Liveness::Remove("the peer does not answer pings");
                }
                Some(at) => Some(at.after_ms(timeout.ping_timeout_ms)),
                None if self.last_heard.after_ms(timeout.ping_interval_ms) <= now => {
                    return Liveness::Ping;
                }
                None => Some(self.last_heard.after_ms(timeout.ping_interval_ms)),
            },
        };
        let expires = self.session.next_deadline();
        Liveness::Wait(next.into_iter().chain(stall).chain(expires).min())
    }

    /// Pings the other end.
    pub(crate) fn ping(&mut self, now: Time, host: &mut IoHost) {
        self.pinged = Some(now);
        host.turn().send(&self.peer, Class::Control, 48, |out| {
            encode::message(out, "{\"action\":\"ping\",\"id\":\"ping\"}");
        });
    }

    /// Reports that the handshake took too long.
    pub(crate) fn refuse_silence(&mut self, host: &mut IoHost) {
        let message = "no handshake within handshake_timeout";
        let _ = self
            .session
            .reject(&Refusal::new(Code::NotReady, message), &mut host.turn());
    }
}
