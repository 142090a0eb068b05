//! Calls that wait for their reply: a slab whose keys are the ids on the wire, so a reply finds its
//! call without a search, and a reply to an ended call finds nothing.
//!
//! A call that may be parked outlives its connection, and the process too. Its id says which
//! process generated it, or its caller chose it, so that answers to calls of an earlier process do
//! not reach a call of this one.

use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use hashbrown::HashMap;
use latzero_protocol::Code;
use latzero_protocol::encode::append_str;

use crate::error::Error;
use crate::payload::{Payload, Reply};
use crate::sync::set_waker;

/// Most calls of one app that wait for a reply, unless the server names fewer. Further ones wait
/// their turn.
pub(crate) const IN_FLIGHT_MAX: usize = 65_536;

/// A call's index, and how many times that index was used before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl Key {
    /// Appends the wire form: two hex numbers with a dot between.
    pub(crate) fn append(self, out: &mut Vec<u8>) {
        append_hex(out, self.slot);
        out.push(b'.');
        append_hex(out, self.generation);
    }

    /// Reads the wire form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let dot = text.bytes().position(|b| b == b'.')?;
        Some(Key {
            slot: hex(&text.as_bytes()[..dot])?,
            generation: hex(&text.as_bytes()[dot + 1..])?,
        })
    }
}

fn hex(digits: &[u8]) -> Option<u32> {
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    digits.iter().try_fold(0, |n, &b| {
        let digit = match b {
            b'0'..=b'9' => b - b'0',
            b'a'..=b'f' => b - b'a' + 10,
            _ => return None,
        };
        Some((n << 4) | u32::from(digit))
    })
}

fn append_hex(out: &mut Vec<u8>, n: u32) {
    let digits = (32 - n.leading_zeros()).div_ceil(4).max(1);
    for i in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(n >> (4 * i) & 0xf) as usize]);
    }
}

/// Hex digits of a process's number on the wire.
const LIFE_DIGITS: usize = 16;

/// The id of a call that did not choose one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Id {
    pub(crate) key: Key,
    /// The process that generated it, if the call may outlive that.
    pub(crate) life: Option<u64>,
}

impl Id {
    /// Appends the wire form: that of the key and, if there is one, a dot and sixteen hex digits.
    pub(crate) fn append(self, out: &mut Vec<u8>) {
        self.key.append(out);
        if let Some(life) = self.life {
            out.push(b'.');
            for i in (0..LIFE_DIGITS).rev() {
                out.push(b"0123456789abcdef"[(life >> (4 * i) & 0xf) as usize]);
            }
        }
    }

    /// Reads the wire form.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if let Some(key) = Key::parse(text) {
            return Some(Id { key, life: None });
        }
        let (key, life) = text.rsplit_once('.')?;
        let key = Key::parse(key)?;
        if life.len() != LIFE_DIGITS {
            return None;
        }
        let (high, low) = life.as_bytes().split_at(LIFE_DIGITS / 2);
        let life = u64::from(hex(high)?) << 32 | u64::from(hex(low)?);
        Some(Id {
            key,
            life: Some(life),
        })
    }

    /// The wire form.
    pub(crate) fn text(self) -> Box<str> {
        let mut out = Vec::with_capacity(2 * LIFE_DIGITS + 2);
        self.append(&mut out);
        String::from_utf8(out)
            .expect("it has only digits and dots")
            .into()
    }
}

/// How a call is named on the wire.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Name<'a> {
    /// By its index: it ends with its connection at the latest.
    Slot,
    /// By its index and this process: it may be parked.
    Durable,
    /// By an id that its caller chose, which is already in its message.
    Chosen(&'a str),
}

/// A call that is not answered yet.
#[derive(Debug)]
pub(crate) struct OpenCall {
    /// The connection that it is sent over.
    pub(crate) epoch: u32,
    /// Where its frame ends in that connection's outgoing bytes.
    end: u64,
    /// When to give up, if the server does not.
    deadline: Instant,
    waker: Option<Waker>,
    /// What arrived of its stream, if it has one.
    items: Option<Box<Items>>,
    /// The id that its caller chose.
    chosen: Option<Box<str>>,
    /// Whether it may outlive its connection: more than its index names it.
    lasts: bool,
    /// The server has stored it, whatever happens to the connection.
    is_parked: bool,
    /// Its owner no longer wants the answer. Its slot is kept until the server has ended it, so
    /// that its answer is recognised and its id is not reused.
    is_unwanted: bool,
}

impl OpenCall {
    /// A call that is about to be sent. `window` is how many items of a stream are kept at most.
    pub(crate) fn new(epoch: u32, deadline: Instant, window: Option<u64>, name: Name<'_>) -> Self {
        OpenCall {
            epoch,
            // Known once the frame is finished with its id.
            end: u64::MAX,
            deadline,
            waker: None,
            items: window.map(|window| {
                Box::new(Items {
                    window,
                    ..Items::default()
                })
            }),
            chosen: match name {
                Name::Chosen(id) => Some(id.into()),
                Name::Slot | Name::Durable => None,
            },
            lasts: !matches!(name, Name::Slot),
            is_parked: false,
            is_unwanted: false,
        }
    }

    /// Its id as JSON.
    fn id_json(&self, key: Key, life: u64) -> Vec<u8> {
        let mut id = Vec::with_capacity(64);
        if let Some(chosen) = &self.chosen {
            append_str(&mut id, chosen);
        } else {
            let life = self.lasts.then_some(life);
            id.push(b'"');
            Id { key, life }.append(&mut id);
            id.push(b'"');
        }
        id
    }
}

/// A call in flight, as the server identifies it.
#[derive(Debug)]
pub(crate) struct InFlight {
    /// The connection that it was sent over; the answer to a parked call may arrive over any.
    pub(crate) epoch: Option<u32>,
    /// Its id, as JSON.
    pub(crate) id: Vec<u8>,
}

/// What a streamed call received and its owner has not read.
#[derive(Debug, Default)]
struct Items {
    /// How many are kept at most.
    window: u64,
    queue: VecDeque<Payload>,
    progress: Option<Payload>,
    end: Option<Result<Reply, Error>>,
}

#[derive(Debug)]
enum State {
    Free {
        next: u32,
    },
    Waiting(OpenCall),
    Done {
        result: Result<Reply, Error>,
        /// Whether the server had stored it before.
        was_parked: bool,
    },
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    state: State,
}

/// What a streamed call gives next.
#[derive(Debug)]
pub(crate) enum Next {
    Item(Payload),
    Progress(Payload),
    End(Result<Reply, Error>),
}

/// The calls of one app that wait for their reply.
#[derive(Debug)]
pub(crate) struct Pending {
    slots: Vec<Slot>,
    free: u32,
    waiting: usize,
    pub(crate) in_flight_max: usize,
    /// Calls that wait for another to end.
    queue: VecDeque<Waker>,
    /// Distinguishes every run of every process of the app.
    pub(crate) life: u64,
    /// Calls in flight whose ids were chosen.
    chosen: HashMap<Box<str>, Key>,
}

const NONE: u32 = u32::MAX;

/// Whether a handler answered with this error: those of the server say whether the handler ran. It
/// overtakes the word that the call is parked if the handler fails before that is on disk.
fn is_answer(error: &Error) -> bool {
    error.ran().is_none()
}

impl Pending {
    pub(crate) fn new() -> Self {
        Pending {
            slots: Vec::new(),
            free: NONE,
            waiting: 0,
            in_flight_max: IN_FLIGHT_MAX,
            queue: VecDeque::new(),
            // The keys of its hasher are the only source of randomness in the standard library.
            life: RandomState::new().build_hasher().finish(),
            chosen: HashMap::new(),
        }
    }

    /// The id of a call that did not choose one.
    pub(crate) fn id(&self, key: Key, name: Name<'_>) -> Option<Id> {
        let life = match name {
            Name::Slot => None,
            Name::Durable => Some(self.life),
            Name::Chosen(_) => return None,
        };
        Some(Id { key, life })
    }

    /// Whether another call in flight has this id.
    pub(crate) fn has_chosen(&self, id: &str) -> bool {
        self.chosen.contains_key(id)
    }

    /// The call in flight with this id, if more than its index names it.
    pub(crate) fn find_lasting(&mut self, id: &str) -> Option<Key> {
        let key = match Id::parse(id) {
            Some(Id { key, life }) if life == Some(self.life) => key,
            _ => *self.chosen.get(id)?,
        };
        matches!(&self.find(key)?.state, State::Waiting(call) if call.lasts).then_some(key)
    }

    /// Calls that wait for their reply.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether another call may be sent; if not, `waker` is called when one has ended.
    pub(crate) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.waiting < self.in_flight_max {
            return Poll::Ready(());
        }
        self.queue.push_back(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn insert(&mut self, call: OpenCall) -> Key {
        self.waiting += 1;
        let chosen = call.chosen.clone();
        let state = State::Waiting(call);
        let slot = if self.free == NONE {
            let slot = u32::try_from(self.slots.len()).expect("in_flight_max is far below 2^32");
            self.slots.push(Slot {
                generation: 0,
                state,
            });
            slot
        } else {
            let slot = self.free;
            let place = &mut self.slots[slot as usize];
            let State::Free { next } = std::mem::replace(&mut place.state, state) else {
                unreachable!("the free list holds only free slots");
            };
            self.free = next;
            slot
        };
        let key = Key {
            slot,
            generation: self.slots[slot as usize].generation,
        };
        if let Some(id) = chosen {
            self.chosen.insert(id, key);
        }
        key
    }

    /// The call with this key, while it waits for its reply.
    fn open(&mut self, key: Key) -> Option<&mut OpenCall> {
        match &mut self.find(key)?.state {
            State::Waiting(call) => Some(call),
            _ => None,
        }
    }

    /// How the server identifies a call, while it waits for its reply.
    pub(crate) fn in_flight(&mut self, key: Key) -> Option<InFlight> {
        let life = self.life;
        let call = self.open(key)?;
        Some(InFlight {
            epoch: (!call.is_parked).then_some(call.epoch),
            id: call.id_json(key, life),
        })
    }

    /// Abandoned calls that a server may still have stored.
    pub(crate) fn unwanted(&mut self) -> Vec<InFlight> {
        let keys: Vec<Key> = (0_u32..)
            .zip(&self.slots)
            .filter(|(_, place)| matches!(&place.state, State::Waiting(call) if call.is_unwanted))
            .map(|(slot, place)| Key {
                slot,
                generation: place.generation,
            })
            .collect();
        keys.into_iter()
            .filter_map(|key| self.in_flight(key))
            .collect()
    }

    /// Notes that the server has stored a call until it is answered.
    pub(crate) fn parked(&mut self, key: Key, wake: &mut Vec<Waker>) {
        if let Some(call) = self.open(key).filter(|call| call.lasts) {
            call.is_parked = true;
            wake.extend(call.waker.take());
        }
    }

    /// Whether a call is parked or already answered; an error if it failed.
    pub(crate) fn poll_parked(
        &mut self,
        key: Key,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Error>> {
        match self.find(key).map(|slot| &mut slot.state) {
            Some(State::Waiting(call)) if call.is_parked => Poll::Ready(Ok(())),
            Some(State::Done { result, was_parked })
                if *was_parked || result.as_ref().map_or_else(is_answer, |_| true) =>
            {
                Poll::Ready(Ok(()))
            }
            _ => self.poll(key, cx).map(|result| result.map(drop)),
        }
    }

    /// Detaches a call from its owner. Returns its answer if that has arrived; a later one finds no
    /// call.
    pub(crate) fn leave(
        &mut self,
        key: Key,
        wake: &mut Vec<Waker>,
    ) -> Option<Result<Reply, Error>> {
        self.find(key)?;
        match self.release(key) {
            State::Waiting(_) => {
                self.waiting -= 1;
                wake.extend(self.queue.pop_front());
                None
            }
            State::Done { result, .. } => Some(result),
            State::Free { .. } => None,
        }
    }

    /// Notes where a call's frame ends, once it is appended.
    pub(crate) fn set_end(&mut self, key: Key, end: u64) {
        if let Some(call) = self.open(key) {
            call.end = end;
        }
    }

    fn find(&mut self, key: Key) -> Option<&mut Slot> {
        self.slots
            .get_mut(key.slot as usize)
            .filter(|slot| slot.generation == key.generation)
            .filter(|slot| !matches!(slot.state, State::Free { .. }))
    }

    fn release(&mut self, key: Key) -> State {
        let place = &mut self.slots[key.slot as usize];
        place.generation = place.generation.wrapping_add(1);
        let state = std::mem::replace(&mut place.state, State::Free { next: self.free });
        self.free = key.slot;
        if let State::Waiting(OpenCall {
            chosen: Some(chosen),
            ..
        }) = &state
        {
            self.chosen.remove(chosen);
        }
        state
    }

    /// The reply to a call, once it has arrived.
    pub(crate) fn poll(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<Result<Reply, Error>> {
        match self.find(key).map(|slot| &mut slot.state) {
            Some(State::Waiting(waiting)) => {
                set_waker(&mut waiting.waker, cx.waker());
                Poll::Pending
            }
            Some(State::Done { .. }) => match self.release(key) {
                State::Done { result, .. } => Poll::Ready(result),
                _ => unreachable!("it was just seen"),
            },
            _ => unreachable!("a call is polled only by its owner, and not after its end"),
        }
    }

    /// The next item or report of a streamed call.
    pub(crate) fn poll_next(&mut self, key: Key, cx: &mut Context<'_>) -> Poll<Next> {
        match self.find(key).map(|slot| &mut slot.state) {
            Some(State::Waiting(waiting)) => {
                let items = waiting.items.as_deref_mut().expect("a stream has items");
                // Progress may overtake the items.
                if let Some(progress) = items.progress.take() {
                    return Poll::Ready(Next::Progress(progress));
                }
                if let Some(item) = items.queue.pop_front() {
                    return Poll::Ready(Next::Item(item));
                }
                let Some(end) = items.end.take() else {
                    set_waker(&mut waiting.waker, cx.waker());
                    return Poll::Pending;
                };
                self.waiting -= 1;
                self.release(key);
                if let Some(waker) = self.queue.pop_front() {
                    waker.wake();
                }
                Poll::Ready(Next::End(end))
            }
            Some(State::Done { .. }) => match self.release(key) {
                State::Done { result, .. } => Poll::Ready(Next::End(result)),
                _ => unreachable!("it was just seen"),
            },
            _ => unreachable!("a stream is polled only by its owner, and not after its end"),
        }
    }

    /// Removes a call; returns how the server identifies it, if it is still in flight.
    pub(crate) fn forget(&mut self, key: Key, wake: &mut Vec<Waker>) -> Option<InFlight> {
        let in_flight = self.in_flight(key);
        self.find(key)?;
        let Some(call) = self.open(key) else {
            self.release(key);
            return None;
        };
        let items = call.items.take();
        let has_ended = items.is_some_and(|items| items.end.is_some());
        if call.lasts && !has_ended {
            call.is_unwanted = true;
        } else {
            self.release(key);
            self.waiting -= 1;
            wake.extend(self.queue.pop_front());
        }
        in_flight.filter(|_| !has_ended)
    }

    /// Ends a call. A call that already ended is left as it is.
    pub(crate) fn complete(
        &mut self,
        key: Key,
        result: Result<Reply, Error>,
        wake: &mut Vec<Waker>,
    ) {
        let Some(slot) = self.find(key) else { return };
        let State::Waiting(waiting) = &mut slot.state else {
            return;
        };
        wake.extend(waiting.waker.take());
        if waiting.is_unwanted {
            self.release(key);
            self.waiting -= 1;
            wake.extend(self.queue.pop_front());
            return;
        }
        // The id is free for another call once the answer has arrived.
        let chosen = waiting.chosen.take();
        let was_parked = waiting.is_parked;
        let is_unread = |i: &&mut Items| !i.queue.is_empty() || i.progress.is_some();
        if let Some(items) = waiting.items.as_deref_mut().filter(is_unread) {
            // The end follows what waits to be read.
            if items.end.is_none() {
                items.end = Some(result);
            }
        } else {
            slot.state = State::Done { result, was_parked };
            self.waiting -= 1;
            wake.extend(self.queue.pop_front());
        }
        if let Some(chosen) = chosen {
            self.chosen.remove(&chosen);
        }
    }

    /// Keeps an item of a streamed call. Items of other calls, and items beyond the window, are
    /// dropped.
    pub(crate) fn item(&mut self, key: Key, item: Payload, wake: &mut Vec<Waker>) {
        let Some(call) = self.open(key) else { return };
        let Some(items) = call.items.as_deref_mut() else {
            return;
        };
        if items.end.is_none() && (items.queue.len() as u64) < items.window {
            items.queue.push_back(item);
            wake.extend(call.waker.take());
        }
    }

    /// Keeps the newest progress report of a streamed call.
    pub(crate) fn progress(&mut self, key: Key, report: Payload, wake: &mut Vec<Waker>) {
        let Some(call) = self.open(key) else { return };
        let Some(items) = call.items.as_deref_mut() else {
            return;
        };
        items.progress = Some(report);
        wake.extend(call.waker.take());
    }

    fn end_where(
        &mut self,
        wake: &mut Vec<Waker>,
        mut end: impl FnMut(&OpenCall) -> Option<Error>,
    ) {
        for slot in 0..self.slots.len() {
            let State::Waiting(waiting) = &self.slots[slot].state else {
                continue;
            };
            if let Some(error) = end(waiting) {
                let generation = self.slots[slot].generation;
                let key = Key {
                    slot: slot as u32,
                    generation,
                };
                self.complete(key, Err(error), wake);
            }
        }
        wake.extend(self.queue.drain(..));
    }

    /// Ends every call of a connection, except those that the server has stored. `attempted` is how
    /// many of its bytes the kernel may have accepted: a frame that ends beyond that was not sent
    /// completely, so its handler certainly did not run.
    pub(crate) fn end_connection(
        &mut self,
        epoch: u32,
        attempted: u64,
        error: &Error,
        wake: &mut Vec<Waker>,
    ) {
        use latzero_protocol::Ran;
        self.end_where(wake, |call| {
            let ran = if call.end > attempted {
                Ran::No
            } else {
                Ran::Unknown
            };
            (call.epoch == epoch && !call.is_parked).then(|| error.clone().with_ran(ran))
        });
    }

    /// Ends, for this process, every call that the server has stored.
    pub(crate) fn end_parked(&mut self, error: &Error, wake: &mut Vec<Waker>) {
        use latzero_protocol::Ran;
        self.end_where(wake, |call| {
            call.is_parked.then(|| error.clone().with_ran(Ran::Unknown))
        });
    }

    /// Ends every call whose deadline passed without an answer.
    pub(crate) fn expire(&mut self, now: Instant, wake: &mut Vec<Waker>) {
        self.end_where(wake, |call| (call.deadline <= now).then(silence));
    }
}

/// The error of a call whose deadline passed without an answer.
pub(crate) fn silence() -> Error {
    Error::new(
        Code::Timeout,
        "no answer arrived, not even the server's own timeout; the server may be suspended",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use latzero_protocol::Ran;
    use std::time::Duration;

    fn call(end: u64, window: Option<u64>, name: Name<'_>) -> OpenCall {
        let deadline = Instant::now() + Duration::from_secs(60);
        OpenCall {
            end,
            ..OpenCall::new(1, deadline, window, name)
        }
    }

    fn reply(n: u8) -> Result<Reply, Error> {
        Ok(Reply {
            payload: Payload::Json(n.to_string()),
            headers: None,
            beside: None,
            epoch: 0,
        })
    }

    fn poll(p: &mut Pending, key: Key) -> Option<Result<Reply, Error>> {
        match p.poll(key, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result),
            Poll::Pending => None,
        }
    }

    fn next(p: &mut Pending, key: Key) -> Option<Next> {
        match p.poll_next(key, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(next) => Some(next),
            Poll::Pending => None,
        }
    }

    #[test]
    fn keys_read_back() {
        for (slot, generation, text) in [
            (0, 0, "0.0"),
            (31, 3, "1f.3"),
            (u32::MAX, 16, "ffffffff.10"),
        ] {
            let key = Key { slot, generation };
            let mut out = Vec::new();
            key.append(&mut out);
            assert_eq!(out, text.as_bytes());
            assert_eq!(Key::parse(text), Some(key));
        }
        assert_eq!(Key::parse("h1"), None);
    }

    #[test]
    fn replies_come_in_any_order_and_late_ones_find_nothing() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let (a, b) = (
            p.insert(call(1, None, Name::Slot)),
            p.insert(call(2, None, Name::Slot)),
        );
        assert!(poll(&mut p, a).is_none() && poll(&mut p, b).is_none());
        p.complete(b, reply(2), &mut wake);
        assert_eq!(wake.len(), 1);
        assert_eq!(
            poll(&mut p, b).unwrap().unwrap().payload,
            Payload::Json("2".into())
        );
        let c = p.insert(call(3, None, Name::Slot));
        assert_eq!((c.slot, c.generation), (b.slot, 1));
        p.complete(b, reply(9), &mut wake);
        assert!(poll(&mut p, c).is_none());
        assert_eq!(p.forget(a, &mut wake).unwrap().epoch, Some(1));
        p.complete(a, reply(9), &mut wake);
        assert_eq!(p.waiting(), 1);
    }

    #[test]
    fn an_error_after_a_lost_connection_says_what_may_have_run() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let (a, b) = (
            p.insert(call(100, None, Name::Slot)),
            p.insert(call(200, None, Name::Slot)),
        );
        p.end_connection(1, 150, &Error::new(Code::Disconnected, "gone"), &mut wake);
        assert_eq!(
            poll(&mut p, a).unwrap().unwrap_err().ran(),
            Some(Ran::Unknown)
        );
        assert_eq!(poll(&mut p, b).unwrap().unwrap_err().ran(), Some(Ran::No));
        assert_eq!(p.waiting(), 0);
    }

    #[test]
    fn items_come_before_the_end_and_never_beyond_the_window() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let a = p.insert(call(1, Some(2), Name::Slot));
        for n in 0..5 {
            p.item(a, Payload::Json(n.to_string()), &mut wake);
        }
        p.progress(a, Payload::None, &mut wake);
        p.complete(a, reply(9), &mut wake);
        assert!(matches!(next(&mut p, a), Some(Next::Progress(_))));
        assert!(matches!(next(&mut p, a), Some(Next::Item(Payload::Json(n))) if n == "0"));
        assert!(matches!(next(&mut p, a), Some(Next::Item(Payload::Json(n))) if n == "1"));
        assert!(matches!(next(&mut p, a), Some(Next::End(Ok(_)))));
        assert_eq!(p.waiting(), 0);
    }

    #[test]
    fn a_report_comes_before_an_end_that_follows_at_once() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let a = p.insert(call(1, Some(2), Name::Slot));
        p.progress(a, Payload::None, &mut wake);
        p.complete(a, reply(9), &mut wake);
        assert!(matches!(next(&mut p, a), Some(Next::Progress(_))));
        assert!(matches!(next(&mut p, a), Some(Next::End(Ok(_)))));
        assert_eq!(p.waiting(), 0);
    }

    #[test]
    fn a_stored_call_is_parked_also_if_it_has_failed_by_then() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let cx = &mut Context::from_waker(Waker::noop());
        let failed = || Err(Error::new(Code::Timeout, "it took too long"));
        let stored = p.insert(call(1, None, Name::Durable));
        p.parked(stored, &mut wake);
        p.complete(stored, failed(), &mut wake);
        assert!(matches!(p.poll_parked(stored, cx), Poll::Ready(Ok(()))));
        assert!(poll(&mut p, stored).unwrap().is_err());
        let refused = p.insert(call(2, None, Name::Durable));
        p.complete(refused, failed(), &mut wake);
        assert!(matches!(p.poll_parked(refused, cx), Poll::Ready(Err(_))));
        let answered = p.insert(call(3, None, Name::Durable));
        let error = Error::from_wire(r#"{"code":"timeout","message":"of the handler's own"}"#);
        p.complete(answered, Err(error), &mut wake);
        assert!(matches!(p.poll_parked(answered, cx), Poll::Ready(Ok(()))));
        assert!(poll(&mut p, answered).unwrap().is_err());
    }

    #[test]
    fn the_limit_lets_calls_wait_their_turn() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        p.in_flight_max = 1;
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(p.poll_room(cx).is_ready());
        let a = p.insert(call(1, None, Name::Slot));
        assert!(p.poll_room(cx).is_pending());
        p.complete(a, reply(1), &mut wake);
        assert_eq!(wake.len(), 1);
        assert!(p.poll_room(cx).is_ready());
    }

    #[test]
    fn ids_read_back() {
        let key = Key {
            slot: 0x1f,
            generation: 3,
        };
        for (life, text) in [
            (None, "1f.3"),
            (Some(0xabc), "1f.3.0000000000000abc"),
            (Some(u64::MAX), "1f.3.ffffffffffffffff"),
        ] {
            let id = Id { key, life };
            assert_eq!(&*id.text(), text);
            assert_eq!(Id::parse(text), Some(id));
        }
        for text in ["1f.3.abc", "order-17", "1f..0000000000000abc", ""] {
            assert_eq!(Id::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_parked_call_outlives_its_connection() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let error = Error::new(Code::Disconnected, "gone");
        let (a, b) = (
            p.insert(call(1, None, Name::Durable)),
            p.insert(call(2, None, Name::Chosen("order-17"))),
        );
        assert!(p.has_chosen("order-17"));
        let cx = &mut Context::from_waker(Waker::noop());
        assert!(p.poll_parked(a, cx).is_pending());
        p.parked(a, &mut wake);
        assert_eq!(wake.len(), 1);
        assert!(matches!(p.poll_parked(a, cx), Poll::Ready(Ok(()))));
        p.end_connection(1, 9, &error, &mut wake);
        assert!(poll(&mut p, b).unwrap().is_err());
        assert!(!p.has_chosen("order-17"));
        let id = p.id(a, Name::Durable).unwrap().text();
        assert_eq!(p.find_lasting(&id), Some(a));
        p.complete(a, reply(1), &mut wake);
        assert_eq!(p.find_lasting(&id), None);
        assert!(poll(&mut p, a).unwrap().is_ok());
    }

    #[test]
    fn a_parked_call_without_a_waiter_keeps_its_id_until_its_end() {
        let (mut p, mut wake) = (Pending::new(), Vec::new());
        let a = p.insert(call(1, None, Name::Chosen("a\"b")));
        p.parked(a, &mut wake);
        let in_flight = p.forget(a, &mut wake).unwrap();
        assert_eq!(
            (in_flight.epoch, &in_flight.id[..]),
            (None, &br#""a\"b""#[..])
        );
        assert_eq!(p.unwanted().len(), 1);
        assert!(p.has_chosen("a\"b") && p.waiting() == 1);
        p.complete(a, reply(1), &mut wake);
        assert!(!p.has_chosen("a\"b") && p.waiting() == 0 && p.unwanted().is_empty());
        // Detaching takes an answer that has arrived, and frees the slot.
        let b = p.insert(call(1, None, Name::Durable));
        assert!(p.leave(b, &mut wake).is_none());
        let c = p.insert(call(1, None, Name::Durable));
        p.complete(c, reply(1), &mut wake);
        assert!(p.leave(c, &mut wake).is_some());
        assert_eq!((c.slot, p.waiting()), (b.slot, 0));
    }
}
