//! Apps without a live instance, by user: which one to forget if there is no room for another.

use std::collections::{BTreeMap, BTreeSet};

use latzero_protocol::AppId;

/// Apps without an instance: for each user, the one that was offline longest first.
#[derive(Default)]
pub(super) struct Offline {
    of: BTreeMap<u64, BTreeSet<(u64, AppId)>>,
    length: usize,
}

impl Offline {
    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn insert(&mut self, user: u64, last_seen: u64, app: AppId) {
        let is_new = self.of.entry(user).or_default().insert((last_seen, app));
        self.length += usize::from(is_new);
    }

    pub(super) fn remove(&mut self, user: u64, last_seen: u64, app: &AppId) {
        let Some(own) = self.of.get_mut(&user) else {
            return;
        };
        self.length -= usize::from(own.remove(&(last_seen, app.clone())));
        if own.is_empty() {
            self.of.remove(&user);
        }
    }

    /// Removes and returns a user's app that was offline longest.
    pub(super) fn pop_of(&mut self, user: u64) -> Option<AppId> {
        let own = self.of.get_mut(&user)?;
        let (_, app) = own.pop_first()?;
        self.length -= 1;
        if own.is_empty() {
            self.of.remove(&user);
        }
        Some(app)
    }

    /// Removes and returns an app of the user that has the most.
    pub(super) fn pop(&mut self) -> Option<AppId> {
        let most = self.of.iter().max_by_key(|(_, own)| own.len());
        let (&user, _) = most?;
        self.pop_of(user)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &(u64, AppId))> {
        let all = self.of.iter();
        all.flat_map(|(&user, own)| own.iter().map(move |entry| (user, entry)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_with_most_apps_loses_the_one_offline_longest() {
        let app = |name: &str| AppId::new(name).unwrap();
        let mut offline = Offline::default();
        offline.insert(1, 5, app("own"));
        for (last_seen, name) in [(9, "c"), (7, "a"), (8, "b")] {
            offline.insert(2, last_seen, app(name));
        }
        offline.remove(2, 9, &app("c"));
        assert_eq!(offline.len(), 3);
        assert_eq!(offline.pop(), Some(app("a")));
        assert_eq!(offline.pop_of(1), Some(app("own")));
        assert_eq!(offline.pop_of(1), None);
        assert_eq!((offline.pop(), offline.pop()), (Some(app("b")), None));
        assert_eq!(offline.len(), 0);
    }
}
