//! Fair queueing: users take turns, and so do the apps of each user. The calls of one app are
//! dispatched oldest first.
//!
//! Names cost nothing, so turns by name alone would favour a user who invents many names.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};

use hashbrown::HashMap;
use latzero_protocol::AppId;

/// Keys in a ring: each is followed by the next greater one, the last by the first.
struct Ring<K, V> {
    map: BTreeMap<K, V>,
    last: Option<K>,
}

impl<K: Ord + Clone, V> Ring<K, V> {
    /// All keys, starting after the one that was served last.
    fn in_turn(&self) -> impl Iterator<Item = (&K, &V)> {
        let (after, before) = match &self.last {
            Some(last) => (
                self.map.range((Excluded(last), Unbounded)),
                Some(self.map.range(..=last)),
            ),
            None => (self.map.range(..), None),
        };
        after.chain(before.into_iter().flatten())
    }
}

impl<K, V> Default for Ring<K, V> {
    fn default() -> Self {
        Ring {
            map: BTreeMap::new(),
            last: None,
        }
    }
}

/// A call's position among those of its caller: the number that it follows, then its own.
pub(super) type QueuePosition = (u64, u64);

/// A waiting call and its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueuedCalls {
    /// The user.
    pub(super) user: u64,
    /// The app.
    pub(super) app: AppId,
    /// Its position.
    pub(super) place: QueuePosition,
}

#[derive(Default)]
struct Own {
    places: BTreeSet<QueuePosition>,
    /// Up to which position calls were skipped, and in which round.
    passed: (u64, QueuePosition),
}

/// Calls that the same handlers can take.
#[derive(Default)]
struct Line {
    users: Ring<u64, Ring<AppId, Own>>,
    len: usize,
}

impl Line {
    fn insert(&mut self, waiting: &QueuedCalls) {
        let apps = self.users.map.entry(waiting.user).or_default();
        let own = apps.map.entry(waiting.app.clone()).or_default();
        self.len += usize::from(own.places.insert(waiting.place));
    }

    fn remove(&mut self, waiting: &QueuedCalls) {
        let Some(apps) = self.users.map.get_mut(&waiting.user) else {
            return;
        };
        if let Some(own) = apps.map.get_mut(&waiting.app) {
            self.len -= usize::from(own.places.remove(&waiting.place));
            if own.places.is_empty() {
                apps.map.remove(&waiting.app);
            }
        }
        if apps.map.is_empty() {
            self.users.map.remove(&waiting.user);
        }
    }

    /// The call whose turn it is, of those that were not skipped in this round.
    fn next(&self, now: u64) -> Option<QueuedCalls> {
        self.users.in_turn().find_map(|(&user, apps)| {
            apps.in_turn().find_map(|(app, own)| {
                let mut places = match own.passed {
                    (round, place) if round == now => {
                        own.places.range((Excluded(place), Unbounded))
                    }
                    _ => own.places.range(..),
                };
                places.next().map(|&place| QueuedCalls {
                    user,
                    app: app.clone(),
                    place,
                })
            })
        })
    }

    /// A call was dispatched: it is the turn of others.
    fn note_turn(&mut self, waiting: &QueuedCalls) {
        self.users.last = Some(waiting.user);
        if let Some(apps) = self.users.map.get_mut(&waiting.user) {
            apps.last = Some(waiting.app.clone());
        }
    }

    /// A call cannot be dispatched now, but those behind it may be.
    fn pass(&mut self, waiting: &QueuedCalls, round: u64) {
        let apps = self.users.map.get_mut(&waiting.user);
        if let Some(own) = apps.and_then(|apps| apps.map.get_mut(&waiting.app)) {
            own.passed = (round, waiting.place);
        }
    }
}

/// The waiting calls of one trigger: those for any app, and those for a named app.
#[derive(Default)]
pub(super) struct Lines {
    any: Line,
    named: HashMap<AppId, Line>,
    /// Counts from 1, so that nothing was skipped before the first round.
    round: u64,
}

impl Lines {
    fn line(&mut self, destination: Option<&AppId>) -> Option<&mut Line> {
        match destination {
            None => Some(&mut self.any),
            Some(app) => self.named.get_mut(app),
        }
    }

    /// The call whose turn it is among those for a destination.
    pub(super) fn next(&self, destination: Option<&AppId>) -> Option<QueuedCalls> {
        let line = match destination {
            None => Some(&self.any),
            Some(app) => self.named.get(app),
        };
        line?.next(self.round)
    }

    /// A call was dispatched: it is the turn of others.
    pub(super) fn note_turn(&mut self, destination: Option<&AppId>, waiting: &QueuedCalls) {
        if let Some(line) = self.line(destination) {
            line.note_turn(waiting);
        }
    }

    /// A call cannot be dispatched in this round, but those behind it may be.
    pub(super) fn pass(&mut self, destination: Option<&AppId>, waiting: &QueuedCalls) {
        let round = self.round;
        if let Some(line) = self.line(destination) {
            line.pass(waiting, round);
        }
    }

    /// Skipped calls are tried again.
    pub(super) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// The user under which calls of an app already wait, so that an app's calls stay in one order,
    /// even after a restart.
    pub(super) fn user_of(&self, destination: Option<&AppId>, app: &AppId) -> Option<u64> {
        let line = match destination {
            None => Some(&self.any),
            Some(named) => self.named.get(named),
        };
        let mut users = line?.users.map.iter();
        users
            .find(|(_, apps)| apps.map.contains_key(app))
            .map(|(&user, _)| user)
    }

    pub(super) fn has_named(&self) -> bool {
        !self.named.is_empty()
    }

    pub(super) fn has(&self, destination: Option<&str>) -> bool {
        let line = match destination {
            None => Some(&self.any),
            Some(app) => self.named.get(app),
        };
        line.is_some_and(|line| line.len > 0)
    }

    pub(super) fn insert(&mut self, destination: Option<&AppId>, waiting: &QueuedCalls) {
        match destination {
            None => self.any.insert(waiting),
            Some(app) => self.named.entry(app.clone()).or_default().insert(waiting),
        }
    }

    pub(super) fn remove(&mut self, destination: Option<&AppId>, waiting: &QueuedCalls) {
        let Some(app) = destination else {
            return self.any.remove(waiting);
        };
        if let Some(line) = self.named.get_mut(app) {
            line.remove(waiting);
            if line.len == 0 {
                self.named.remove(app);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.any.len + self.named.values().map(|line| line.len).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(user: u64, app: &str, number: u64) -> QueuedCalls {
        QueuedCalls {
            user,
            app: AppId::new(app).unwrap(),
            place: (number, number),
        }
    }

    /// The order in which everything is dispatched.
    fn order(line: &mut Line) -> Vec<u64> {
        let mut order = Vec::new();
        while let Some(next) = line.next(1) {
            line.note_turn(&next);
            line.remove(&next);
            order.push(next.place.1);
        }
        assert_eq!(line.len, 0);
        order
    }

    #[test]
    fn apps_take_turns_and_each_goes_oldest_first() {
        let mut line = Line::default();
        for number in 1..=4 {
            line.insert(&waiting(1, "greedy", number));
        }
        line.insert(&waiting(1, "polite", 5));
        assert_eq!(order(&mut line), [1, 5, 2, 3, 4]);
    }

    #[test]
    fn many_names_of_one_user_have_one_turn() {
        let mut line = Line::default();
        for number in 1..=6 {
            line.insert(&waiting(1, &format!("name-{number}"), number));
        }
        for number in 7..=8 {
            line.insert(&waiting(2, "polite", number));
        }
        assert_eq!(order(&mut line), [1, 7, 2, 8, 3, 4, 5, 6]);
    }

    #[test]
    fn skipped_parked_calls_return_in_the_next_round() {
        let mut lines = Lines::default();
        lines.begin_round();
        for number in 1..=3 {
            lines.insert(None, &waiting(1, "app", number));
        }
        let first = lines.next(None).unwrap();
        lines.pass(None, &first);
        assert_eq!(lines.next(None).unwrap().place.1, 2);
        lines.begin_round();
        assert_eq!(lines.next(None).unwrap().place.1, 1);
    }

    #[test]
    fn a_call_that_failed_stands_behind_those_that_came_before_its_end() {
        let mut line = Line::default();
        line.insert(&waiting(1, "app", 2));
        line.insert(&QueuedCalls {
            place: (3, 1),
            ..waiting(1, "app", 0)
        });
        line.insert(&waiting(1, "app", 4));
        assert_eq!(order(&mut line), [2, 1, 4]);
    }
}
