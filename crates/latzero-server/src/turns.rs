//! A queue in which users take turns: a crowd of one user delays another user by one item.

use std::collections::{HashMap, VecDeque};

use crate::socket::User;

/// Items by user, and the users in the order of their turns.
pub(crate) struct Turns<T> {
    items: HashMap<User, VecDeque<T>>,
    order: VecDeque<User>,
    len: usize,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Turns {
            items: HashMap::new(),
            order: VecDeque::new(),
            len: 0,
        }
    }
}

impl<T> Turns<T> {
    pub(crate) fn push(&mut self, user: User, item: T) {
        let items = self.items.entry(user).or_default();
        if items.is_empty() {
            self.order.push_back(user);
        }
        items.push_back(item);
        self.len += 1;
    }

    /// The next item of the user whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<(User, T)> {
        let user = self.order.pop_front()?;
        let items = self.items.get_mut(&user)?;
        let item = items.pop_front()?;
        self.len -= 1;
        if items.is_empty() {
            self.items.remove(&user);
        } else {
            self.order.push_back(user);
        }
        Some((user, item))
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many items a user has.
    pub(crate) fn len_of(&self, user: User) -> usize {
        self.items.get(&user).map_or(0, VecDeque::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_delays_another_user_by_one_item() {
        let mut turns = Turns::default();
        for n in 0..500 {
            turns.push(User::Uid(1), ("crowd", n));
        }
        turns.push(User::Uid(2), ("single", 0));
        assert_eq!((turns.len(), turns.len_of(User::Uid(2))), (501, 1));
        let mut next = || turns.pop().map(|(_, item)| item);
        let order: Vec<_> = (0..3).map_while(|_| next()).collect();
        assert_eq!(order, [("crowd", 0), ("single", 0), ("crowd", 1)]);
        // Nobody is forgotten, and each user's items keep their order.
        let rest: Vec<_> = std::iter::from_fn(next).collect();
        let expected: Vec<_> = (2..500).map(|n| ("crowd", n)).collect();
        assert_eq!(rest, expected);
        assert!(turns.is_empty() && turns.items.is_empty());
    }
}
