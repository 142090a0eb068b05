//! How an app follows its own connection: every loss, every reconnect and the end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::task::Waker;

use latzero_protocol::Code;

use crate::error::Error;
use crate::sync::lock;

/// How many changes wait to be read. Beyond that the oldest are dropped, so that the newest state
/// is always among them.
pub const STATES_MAX: usize = 64;

/// What happened to an app's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// The app connected again.
    Connected,
    /// The connection was lost. The app reconnects by itself, unless that is switched off or the
    /// server refuses it: then [`State::Closed`] follows.
    Disconnected,
    /// Another instance took the app over, which ended this one.
    Displaced,
    /// The app has ended for another reason: it was closed, or does not reconnect.
    Closed,
}

impl State {
    /// Its name, in lower case.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            State::Connected => "connected",
            State::Disconnected => "disconnected",
            State::Displaced => "displaced",
            State::Closed => "closed",
        }
    }

    /// Whether the app has ended, so that no other state follows.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, State::Displaced | State::Closed)
    }

    /// The state of an app that ended for this reason.
    fn of_end(error: &Error) -> State {
        match error.kind() {
            Code::AppInUse => State::Displaced,
            _ => State::Closed,
        }
    }
}

/// The changes that one reader has not read yet.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    pub(crate) states: VecDeque<State>,
    pub(crate) waker: Option<Waker>,
}

/// Those who follow an app's connection.
#[derive(Debug, Default)]
pub(crate) struct Followers {
    readers: Vec<Weak<Mutex<Unread>>>,
    end: Option<State>,
}

impl Followers {
    /// Tells every reader. Their wakers are to be called without the lock of `self`.
    pub(crate) fn tell(&mut self, state: State, wake: &mut Vec<Waker>) {
        if self.end.is_some() {
            return;
        }
        self.end = state.is_final().then_some(state);
        self.readers.retain(|reader| {
            let Some(reader) = reader.upgrade() else {
                return false;
            };
            let mut unread = lock(&reader);
            if unread.states.len() == STATES_MAX {
                unread.states.pop_front();
            }
            unread.states.push_back(state);
            wake.extend(unread.waker.take());
            true
        });
    }

    pub(crate) fn tell_end(&mut self, error: &Error, wake: &mut Vec<Waker>) {
        self.tell(State::of_end(error), wake);
    }

    /// A reader of all changes from now on. If the app has ended, that is the only one.
    pub(crate) fn follow(&mut self) -> Arc<Mutex<Unread>> {
        let reader = Arc::new(Mutex::new(Unread {
            states: self.end.into_iter().collect(),
            waker: None,
        }));
        self.readers.push(Arc::downgrade(&reader));
        reader
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_states_are_kept_and_the_end_is_told_to_latecomers() {
        let mut followers = Followers::default();
        let reader = followers.follow();
        let mut wake = Vec::new();
        for _ in 0..STATES_MAX {
            followers.tell(State::Disconnected, &mut wake);
            followers.tell(State::Connected, &mut wake);
        }
        let displaced = Error::new(Code::AppInUse, "another instance");
        followers.tell_end(&displaced, &mut wake);
        followers.tell(State::Connected, &mut wake);
        let states: Vec<_> = lock(&reader).states.drain(..).collect();
        assert_eq!(states.len(), STATES_MAX);
        assert_eq!(states.last(), Some(&State::Displaced));
        assert_eq!(lock(&followers.follow()).states, [State::Displaced]);
    }
}
