//! The connections of the simulated world, and a log of everything that happens on them.
//!
//! The outbox of a connection is the core's own. Behind it is a socket buffer of fixed size, from
//! which a client reads.

use std::cell::RefCell;
use std::ops::DerefMut;
use std::rc::Rc;
use std::sync::Arc;

use latzero_fabric::effects::Counters;
use latzero_fabric::ledger::Account;
use latzero_fabric::{Class, Count, InFlight, Link, Sent, Time};
use latzero_protocol::Code;

use crate::store::Rows;
use crate::world::World;

/// A connection of the simulated world, numbered in the order of creation. Numbers are not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub u32);

/// A connection's handle, with the state that the core stores in it.
#[derive(Clone)]
pub struct Line {
    /// The connection's number.
    pub id: Peer,
    link: Rc<RefCell<Link<World>>>,
    in_flight: Rc<InFlight>,
}

impl Line {
    pub(crate) fn new(id: Peer, account: Arc<Account>) -> Self {
        Line {
            id,
            link: Rc::new(RefCell::new(Link::new(account))),
            in_flight: Rc::default(),
        }
    }

    pub(crate) fn link(&self) -> impl DerefMut<Target = Link<World>> {
        self.link.borrow_mut()
    }
}

impl latzero_fabric::Peer<World> for Line {
    fn link(&self) -> impl DerefMut<Target = Link<World>> {
        self.link.borrow_mut()
    }

    fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }
}

impl PartialEq for Line {
    fn eq(&self, other: &Line) -> bool {
        self.id == other.id
    }
}

impl Eq for Line {}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.id.fmt(f)
    }
}

/// Buffer sizes of one connection, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The size up to which messages of every class are accepted.
    pub outbox_bytes: usize,
    /// Additional room for control messages.
    pub headroom_bytes: usize,
    /// What the socket accepts before the outbox fills.
    pub socket_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            outbox_bytes: 8 << 20,
            headroom_bytes: 1 << 20,
            socket_bytes: 1 << 20,
        }
    }
}

/// By how many bytes a frame may be longer than its sender announced: "about" leaves room for the
/// prefix and for the escapes in an id and a key.
pub const LENGTH_SLACK: usize = 8 * 1024;

/// Something that happened in the world, in the order in which it happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// Time advanced.
    Now(Time),
    /// The server took a frame from a connection and starts to handle it.
    Handling {
        /// Who sent it.
        peer: Peer,
        /// The frame's JSON, as received.
        json: Vec<u8>,
        /// The frame's raw bytes.
        attachment: Option<Vec<u8>>,
        /// When it arrived, if it waited in its session.
        came: Option<Time>,
    },
    /// The frame waits in its session, and is handled later.
    Held(Peer),
    /// The server received bytes that are not a frame.
    Rejecting(Peer),
    /// The frame has been handled.
    Handled(Peer),
    /// One frame was appended to an outbox.
    Sent {
        /// The receiver.
        peer: Peer,
        /// The class of the message.
        class: Class,
        /// The whole frame with its prefix.
        frame: Vec<u8>,
    },
    /// An emit or an event did not fit into an outbox.
    Lost(Peer),
    /// The server closes a connection, or its client did.
    Closed(Peer),
    /// The session of a closed connection has ended, and the fabric has forgotten it.
    Departed(Peer),
    /// A request was refused.
    Refused(Code),
    /// The core incremented a counter.
    Counted(Count),
    /// The disk refuses all writes from now on, or accepts them again.
    DiskFull(bool),
    /// The server restarted with what was stored.
    Restarted(Box<Rows>),
}

/// Totals of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Frames appended to outboxes.
    pub frames: u64,
    /// Calls that began.
    pub calls_started: u64,
    /// Calls that ended.
    pub calls_ended: u64,
    /// Calls that the server ended with `timeout`.
    pub timeouts: u64,
    /// Requests that were refused.
    pub refusals: u64,
    /// Messages dropped because their receiver did not read.
    pub lost: u64,
    /// Connections closed because even their headroom was full.
    pub overflowed: u64,
    /// What the core counted, by [`Count`].
    pub counts: [u64; Count::KINDS],
}

/// What the observer of the core saw.
#[derive(Debug)]
pub(crate) struct Observer {
    log: Vec<Event>,
    hash: u64,
    pub(crate) totals: Totals,
    /// The entries of the audit log.
    pub(crate) audited: Vec<String>,
}

impl Default for Observer {
    fn default() -> Self {
        Observer {
            log: Vec::new(),
            hash: 0xcbf2_9ce4_8422_2325,
            totals: Totals::default(),
            audited: Vec::new(),
        }
    }
}

impl Observer {
    pub(crate) fn note(&mut self, event: Event) {
        self.log.push(event);
    }

    pub(crate) fn take_log(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.log)
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn message(&mut self, peer: Peer, class: Class, sent: Sent, frame: &[u8]) {
        match sent {
            Sent::Queued => {
                let head = peer.0.to_le_bytes();
                // FNV-1a: the same result in every run and on every machine.
                self.hash = head.iter().chain(frame).fold(self.hash, |h, &b| {
                    (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
                });
                let mut rest = frame;
                while let Some((_, used)) = crate::world::decode(rest).filter(|_| !rest.is_empty())
                {
                    self.totals.frames += 1;
                    self.note(Event::Sent {
                        peer,
                        class,
                        frame: rest[..used].to_vec(),
                    });
                    rest = &rest[used..];
                }
            }
            Sent::Full if class == Class::Control => self.totals.overflowed += 1,
            Sent::Full if matches!(class, Class::Emit | Class::Event) => {
                self.totals.lost += 1;
                self.note(Event::Lost(peer));
            }
            Sent::Full | Sent::Gone => {}
        }
    }

    pub(crate) fn count(&mut self, tally: Counters) {
        let totals = &mut self.totals;
        totals.calls_started += tally.started;
        totals.calls_ended += tally.ended.len() as u64;
        totals.refusals += tally.refused.len() as u64;
        for end in tally.ended {
            totals.timeouts += u64::from(end.code == Some(Code::Timeout));
            assert!(end.started <= end.ended, "a call ended before it began");
        }
        for (total, count) in totals.counts.iter_mut().zip(tally.counts) {
            *total += count;
        }
    }

    /// Ends every connection at once, without notifying anybody.
    pub(crate) fn crash(&mut self, rows: &Rows) {
        self.totals.calls_ended = self.totals.calls_started;
        self.note(Event::Restarted(Box::new(rows.clone())));
    }
}
