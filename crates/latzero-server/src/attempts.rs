//! Counts the refused proofs of each user, to slow down guessing.

use std::collections::HashMap;

use latzero_fabric::Time;

use crate::socket::User;

/// After this many refused proofs in a minute, no more proofs of a user are checked.
const REFUSED_MAX: u32 = 20;

/// How long a refusal counts, in milliseconds.
const WINDOW_MS: u64 = 60_000;

/// How long a connection is not read after a proof that was refused unchecked, in milliseconds, so
/// that a client that keeps guessing costs others little.
pub(crate) const REST_MS: u64 = 250;

/// How many users are remembered; beyond that the oldest are forgotten.
const USERS_MAX: usize = 4096;

/// Refused proofs by user.
#[derive(Debug, Default)]
pub(crate) struct Attempts(HashMap<User, (Time, u32)>);

impl Attempts {
    /// Whether a user may send a proof now. The server's own user always may.
    pub(crate) fn may(&self, user: User, now: Time) -> bool {
        let refused = self
            .0
            .get(&user)
            .filter(|(since, _)| now < since.after_ms(WINDOW_MS));
        user.is_trusted() || refused.is_none_or(|(_, count)| *count < REFUSED_MAX)
    }

    /// A proof of a user was refused.
    pub(crate) fn note(&mut self, user: User, now: Time) {
        if self.0.len() >= USERS_MAX {
            self.0
                .retain(|_, (since, _)| now < since.after_ms(WINDOW_MS));
        }
        if self.0.len() >= USERS_MAX
            && let Some(oldest) = self.0.iter().min_by_key(|(_, (since, _))| *since)
        {
            let oldest = *oldest.0;
            self.0.remove(&oldest);
        }
        let entry = self.0.entry(user).or_insert((now, 0));
        if now >= entry.0.after_ms(WINDOW_MS) {
            *entry = (now, 0);
        }
        entry.1 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_guesses_waits_for_a_minute() {
        let (mut attempts, user) = (Attempts::default(), User::Uid(u32::MAX));
        for _ in 0..REFUSED_MAX {
            assert!(attempts.may(user, Time(0)));
            attempts.note(user, Time(0));
        }
        assert!(!attempts.may(user, Time(59_999_999)));
        assert!(
            attempts.may(User::Uid(u32::MAX - 1), Time(0)),
            "the account belongs to a user"
        );
        assert!(attempts.may(user, Time(60_000_000)));
        attempts.note(user, Time(60_000_000));
        assert!(attempts.may(user, Time(60_000_000)));
    }
}
