//! New work that waits in its session, while its connection has as many calls in flight, or as many
//! requests that wait for the disk, as it may have.
//!
//! Only new work waits. Answers, acknowledgements and cancels behind it are read and handled,
//! because they make room; so are queries and pings. Waiting messages keep their order and are
//! counted before they are copied. The driver stops reading if [`Session::must_pause`] says so.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;
use latzero_protocol::frame::Frame;
use latzero_protocol::message::Request;
use latzero_protocol::{Ahead, Ran, Refusal};

use super::{Flow, Session};
use crate::driver::{Driver, Peer};
use crate::ledger::{Reservation, Resource};
use crate::limits::Limits;
use crate::now::Time;
use crate::refusals;
use crate::turn::Turn;

/// Approximate size of a waiting message in addition to its bytes.
const OVERHEAD: usize = 256;

/// What a message waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// Until fewer of the connection's calls are in flight.
    Calls,
    /// Until fewer of its requests wait for the disk.
    Disk,
    /// Until the messages before it are handled.
    Turn,
}

/// A message that has waited.
pub struct DeferredFrame {
    why: For,
    id: Option<Box<str>>,
    json: Box<[u8]>,
    attachment: Option<Box<[u8]>>,
    /// Its scan, if it is large.
    ahead: Option<Box<Ahead>>,
    came: Time,
    /// When a call expires.
    deadline: Option<Time>,
    _held: Reservation,
}

/// The messages of one connection that wait.
#[derive(Default)]
pub(super) struct DeferredFrames {
    /// In the order in which they arrived.
    messages: BTreeMap<u64, DeferredFrame>,
    by_id: HashMap<Box<str>, u64>,
    deadlines: BTreeSet<(Time, u64)>,
    next: u64,
    bytes: usize,
}

impl DeferredFrames {
    fn remove(&mut self, number: u64) -> Option<DeferredFrame> {
        let waiting = self.messages.remove(&number)?;
        self.bytes -= waiting.bytes();
        if let Some(id) = &waiting.id {
            self.by_id.remove(id);
        }
        if let Some(at) = waiting.deadline {
            self.deadlines.remove(&(at, number));
        }
        Some(waiting)
    }
}

impl DeferredFrame {
    /// When it arrived.
    #[must_use]
    pub fn came(&self) -> Time {
        self.came
    }

    /// The message.
    #[must_use]
    pub fn frame(&self) -> Frame<'_> {
        Frame {
            json: &self.json,
            attachment: self.attachment.as_deref(),
        }
    }

    fn bytes(&self) -> usize {
        self.json.len() + self.attachment.as_ref().map_or(0, |raw| raw.len()) + OVERHEAD
    }
}

impl<D: Driver> Session<D> {
    /// Whether so much new work waits that the driver should read no more: until
    /// [`Session::resume`].
    #[must_use]
    pub fn must_pause(&self, limits: &Limits) -> bool {
        self.held.bytes >= limits.held_bytes_max
    }

    /// The other end sends nothing more. Returns whether requests still wait for the disk, for the
    /// check of a proof or for a write of a block, which the driver lets finish; calls that wait
    /// for other calls end with the connection.
    pub fn finish(&mut self, turn: &mut Turn<'_, D>) -> bool {
        let calls = self.held.messages.iter();
        let calls = calls.filter(|(_, waiting)| waiting.why == For::Calls);
        let calls: Vec<u64> = calls.map(|(number, _)| *number).collect();
        for number in calls {
            self.held.remove(number);
        }
        let waits = self.resume(turn) == Flow::Continue && !self.held.messages.is_empty();
        waits || self.is_busy()
    }

    /// Bytes of requests that wait.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.held.bytes + self.proof_bytes()
    }

    /// What a request must wait for, if anything.
    fn reason(&self, request: &Request<'_>, turn: &Turn<'_, D>) -> Option<For> {
        let is_first = self.held.messages.is_empty();
        match request {
            Request::Trigger(trigger) if trigger.park.is_allowed() => {
                (!is_first || self.is_disk_busy(turn)).then_some(For::Disk)
            }
            Request::Trigger(_) => (!is_first || self.is_full(turn)).then_some(For::Calls),
            Request::Emit(_) => (!is_first).then_some(For::Turn),
            Request::Handshake(_)
            | Request::Memory(_)
            | Request::Response(_)
            | Request::Cancel(_)
            | Request::Ack(..) => None,
            request if request.is_question() => None,
            _ => self.is_disk_busy(turn).then_some(For::Disk),
        }
    }

    fn is_full(&self, turn: &Turn<'_, D>) -> bool {
        self.peer.in_flight().must_wait(turn.limits().in_flight_max)
    }

    fn is_disk_busy(&self, turn: &Turn<'_, D>) -> bool {
        self.awaited.len() >= turn.limits().in_flight_max as usize
    }

    /// Defers a request if it must wait; false if it may be handled now.
    pub(super) fn hold(
        &mut self,
        (frame, ahead, id): (Frame<'_>, Option<&Ahead>, Option<&str>),
        request: &Request<'_>,
        turn: &mut Turn<'_, D>,
    ) -> Result<bool, Refusal> {
        let Some(why) = self.reason(request, turn) else {
            return Ok(false);
        };
        // Only calls are found by their ids again, and expire.
        let call = match request {
            Request::Trigger(trigger) => Some(trigger),
            _ => None,
        };
        let named = call.and_then(|call| id.zip(self.membership(call.pool.as_deref()).ok()));
        let deadline = call.map(|call| turn.time().after_ms(call.ttl_ms));
        if let Some((id, m)) = named {
            let is_waiting = self.held.by_id.contains_key(id);
            if is_waiting || turn.with_pool(&m.pool, |pool, _| pool.has_call(m.member, id)) {
                return Err(refusals::id_in_use(id));
            }
        }
        let id = named.map(|(id, _)| id);
        let bytes = frame.json.len() + frame.attachment.map_or(0, <[u8]>::len) + OVERHEAD;
        let account = self.peer.link().account().clone();
        let held = account.reserve(Resource::Inbound, bytes as u64)?;
        let number = self.held.next;
        self.held.next += 1;
        self.held.bytes += bytes;
        if let Some(id) = id {
            self.held.by_id.insert(id.into(), number);
        }
        let waiting = DeferredFrame {
            why,
            id: id.map(Into::into),
            json: frame.json.into(),
            attachment: frame.attachment.map(Into::into),
            ahead: ahead.cloned().map(Box::new),
            came: turn.time(),
            deadline,
            _held: held,
        };
        if let Some(at) = deadline {
            self.held.deadlines.insert((at, number));
        }
        self.held.messages.insert(number, waiting);
        Ok(true)
    }

    /// When the driver should call [`Session::handle_timeout`], if nothing happens before.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        self.held.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends the calls that expired while they waited here; true if there were any, so that others
    /// may continue ([`Session::resume`]).
    pub fn handle_timeout(&mut self, turn: &mut Turn<'_, D>) -> bool {
        let before = self.held.messages.len();
        while let Some(&(at, number)) = self.held.deadlines.first() {
            if at > turn.time() {
                break;
            }
            let expired = self.held.remove(number);
            let id = expired.and_then(|expired| expired.id);
            self.refuse(id.as_deref(), &super::expired_here(), turn);
        }
        self.held.messages.len() < before
    }

    /// Handles deferred messages while there is room. The driver calls it if the core reports room
    /// ([`crate::Effects::resumed`]), and after [`Session::handle_stored`] and
    /// [`Session::handle_verified`].
    pub fn resume(&mut self, turn: &mut Turn<'_, D>) -> Flow {
        while let Some(waiting) = self.next_waiting(turn) {
            if self.handle_waiting(&waiting, turn) == Flow::Close {
                return Flow::Close;
            }
        }
        Flow::Continue
    }

    /// Removes and returns the first message that no longer has to wait. While a proof is being
    /// checked all of them do: the result must not be taken for that of another proof. They also
    /// follow a write that is a job.
    pub fn next_waiting(&mut self, turn: &Turn<'_, D>) -> Option<DeferredFrame> {
        if self.is_busy() {
            return None;
        }
        let (&number, first) = self.held.messages.first_key_value()?;
        let must_wait = match first.why {
            For::Calls => self.is_full(turn),
            For::Disk => self.is_disk_busy(turn),
            For::Turn => false,
        };
        if must_wait {
            return None;
        }
        self.held.remove(number)
    }

    /// Handles a message that has waited.
    pub fn handle_waiting(&mut self, waiting: &DeferredFrame, turn: &mut Turn<'_, D>) -> Flow {
        let ahead = waiting.ahead.as_deref();
        self.run(waiting.frame(), ahead, Some(waiting.came), turn)
    }

    /// Ends a waiting call; false if none has this id.
    pub(super) fn cancel_held(&mut self, id: &str, turn: &mut Turn<'_, D>) -> bool {
        let Some(&number) = self.held.by_id.get(id) else {
            return false;
        };
        self.held.remove(number);
        let refusal = refusals::call_cancelled().with_ran(Ran::No);
        self.refuse(Some(id), &refusal, turn);
        true
    }

    /// Drops all waiting messages.
    pub(super) fn drop_held(&mut self) {
        self.held = DeferredFrames::default();
    }
}
