//! Who reads the connection: at most one at a time, and never nobody while a blocked caller waits.
//!
//! A blocked caller reads until it has its own reply, and the leading thread reads while no caller
//! does. A task on a runtime, or the program's own loop, never shares the role. The role is the
//! possession of what is read, so nobody can read without it.
//!
//! All of its state is under one lock, so that each step is atomic:
//!
//! - A caller that finds the role taken queues in the same step, so the release that follows sees
//!   it.
//! - A release wakes the caller that waited longest. That one takes the role, or wakes the next if
//!   it no longer needs it. Until then the leader keeps away. Another caller may be faster; its
//!   release wakes the same one again.
//! - A reader that is about to sleep where it can be interrupted says so, unless a caller waits
//!   already. Whoever wants something of it afterwards sees that it must be interrupted.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;

use super::cells::{Mutex, MutexGuard, Thread, current};

/// The role of reading `T`.
#[derive(Debug)]
pub(crate) struct Handover<T>(Mutex<State<T>>);

#[derive(Debug)]
struct State<T> {
    /// What is read; `None` while someone has the role.
    free: Option<T>,
    /// Whether that one sleeps, or is about to, where it can be interrupted.
    is_interruptible: bool,
    /// Blocked callers, in the order in which they came.
    waiting: VecDeque<Waiting>,
    /// How many callers have queued so far.
    queued: u64,
    /// How many times a blocked caller took the role.
    turns: u64,
}

#[derive(Debug)]
struct Waiting {
    place: u64,
    thread: Thread,
}

impl<T> State<T> {
    /// The caller to wake because the role is free. It stays in the queue until it has run, so that
    /// the leader, which already runs, does not take the role from it again and again.
    fn next(&self) -> Option<Thread> {
        let next = self.free.as_ref().and_then(|_| self.waiting.front());
        next.map(|next| next.thread.clone())
    }

    fn enqueue(&mut self) -> u64 {
        self.queued += 1;
        self.waiting.push_back(Waiting {
            place: self.queued,
            thread: current(),
        });
        self.queued
    }

    fn dequeue(&mut self, place: u64) {
        self.waiting.retain(|waiting| waiting.place != place);
    }
}

impl<T> Handover<T> {
    pub(super) fn new(input: T) -> Self {
        Handover(Mutex::new(State {
            free: Some(input),
            is_interruptible: false,
            waiting: VecDeque::new(),
            queued: 0,
            turns: 0,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reading(&self, input: T) -> Reading<'_, T> {
        Reading {
            handover: self,
            input: Some(input),
        }
    }

    /// A blocked caller. `is_turn` is whether drivers should leave the role to callers for now if
    /// it takes it.
    pub(super) fn caller(&self, is_turn: bool) -> Caller<'_, T> {
        Caller {
            handover: self,
            is_turn,
            place: None,
        }
    }

    /// Takes the role for a driver, unless callers read for themselves: one waits, or took it since
    /// the driver looked last, which `seen` notes.
    pub(super) fn try_lead(&self, seen: &mut u64) -> Option<Reading<'_, T>> {
        let mut state = self.state();
        let has_news = std::mem::replace(seen, state.turns) != state.turns;
        if has_news || !state.waiting.is_empty() {
            return None;
        }
        let input = state.free.take()?;
        drop(state);
        Some(self.reading(input))
    }

    /// How many times a blocked caller has taken the role so far.
    pub(super) fn turns(&self) -> u64 {
        self.state().turns
    }

    /// Takes the role if it is free, for a driver that does not share it.
    pub(super) fn try_take(&self) -> Option<Reading<'_, T>> {
        let input = self.state().free.take()?;
        Some(self.reading(input))
    }

    /// Whether the reader must be interrupted to notice anything but the socket. What it is to
    /// notice has been stored before this is called.
    pub(super) fn must_interrupt(&self) -> bool {
        self.state().is_interruptible
    }
}

/// A blocked caller, until it stops to wait.
pub(super) struct Caller<'a, T> {
    handover: &'a Handover<T>,
    is_turn: bool,
    /// Its place in the queue, if it has one.
    place: Option<u64>,
}

/// The role is taken, and the caller is queued.
#[derive(Debug)]
pub(super) struct Queued {
    /// Whether the reader sleeps until it is interrupted, so that the caller must do that.
    pub(super) must_interrupt: bool,
}

impl<'a, T> Caller<'a, T> {
    /// Takes the role. If it is taken, the caller is queued, and unparked once the role may be
    /// free; it then calls this again, or is dropped.
    pub(super) fn take(&mut self) -> Result<Reading<'a, T>, Queued> {
        let mut state = self.handover.state();
        let Some(input) = state.free.take() else {
            self.place.get_or_insert_with(|| state.enqueue());
            return Err(Queued {
                must_interrupt: state.is_interruptible,
            });
        };
        if let Some(place) = self.place.take() {
            state.dequeue(place);
        }
        state.turns += u64::from(self.is_turn);
        drop(state);
        Ok(self.handover.reading(input))
    }
}

impl<T> Drop for Caller<'_, T> {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        let mut state = self.handover.state();
        state.dequeue(place);
        // It may have been woken for the role.
        let next = state.next();
        drop(state);
        wake(next);
    }
}

fn wake(thread: Option<Thread>) {
    if let Some(thread) = thread {
        thread.unpark();
    }
}

/// The role of reading, until this is dropped.
pub(super) struct Reading<'a, T> {
    handover: &'a Handover<T>,
    /// Always there until the drop.
    input: Option<T>,
}

impl<T> Reading<'_, T> {
    /// Announces a sleep that can be interrupted; false if a caller waits, and it must not sleep.
    /// What else could keep it from sleeping is checked after this.
    pub(super) fn begin_sleep(&self) -> bool {
        let mut state = self.handover.state();
        state.is_interruptible = state.waiting.is_empty();
        state.is_interruptible
    }

    /// It is awake again.
    pub(super) fn end_sleep(&self) {
        self.handover.state().is_interruptible = false;
    }
}

impl<T> Deref for Reading<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.input.as_ref().expect("it is there until the drop")
    }
}

impl<T> DerefMut for Reading<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.input.as_mut().expect("it is there until the drop")
    }
}

impl<T> Drop for Reading<'_, T> {
    fn drop(&mut self) {
        let mut state = self.handover.state();
        state.free = self.input.take();
        state.is_interruptible = false;
        let next = state.next();
        drop(state);
        wake(next);
    }
}
