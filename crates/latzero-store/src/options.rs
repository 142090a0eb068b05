//! Settings of a store, with their bounds.

use std::fmt;
use std::time::Duration;

use crate::error::StoreError;
use crate::faults::Faults;

/// Identifies a promise; a number chosen by the caller.
pub type Ticket = u64;

/// Called with finished tickets after each transaction, on the store's thread. It may take the
/// vector's contents.
pub type OnDone = Box<dyn FnMut(&mut Vec<(Ticket, Result<(), StoreError>)>) + Send>;

/// What a commit waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// For the disk (`PRAGMA synchronous=FULL`): promised changes survive a power loss.
    #[default]
    Full,
    /// For the kernel (`NORMAL`): survives the death of the process; power loss may undo the latest
    /// commits, whole ones only.
    Normal,
}

/// Settings of a store.
pub struct Options {
    /// What a commit waits for.
    pub durability: Durability,
    /// Maximum changes in one transaction. A larger [`Store::commit`](crate::Store::commit) gets
    /// its own transaction.
    pub group_max: usize,
    /// How many changes with a ticket may wait; further ones are refused at once.
    pub queue_max: usize,
    /// How many eventual changes may wait. Beyond that the oldest times and attempt counts are
    /// dropped, then new changes are refused.
    pub retained_max: usize,
    /// After a failed transaction the next one is tried after this time, then after twice as long,
    /// …
    pub retry_first: Duration,
    /// … up to this time. A new promise is tried at once, and its success ends the pause for all.
    pub retry_max: Duration,
    /// How long files of the database must be missing before they are recreated, because removing a
    /// whole directory takes a moment.
    pub rebuild_after: Duration,
    /// Pages (4 KiB) that a backup copies between two transactions.
    pub backup_step_pages: i32,
    /// This boot of the machine: the contents of `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// Called with the results of promises. It must not wait for the store.
    pub on_done: OnDone,
    /// For tests: which step fails.
    #[doc(hidden)]
    pub faults: Faults,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            durability: Durability::Full,
            group_max: 256,
            queue_max: 65_536,
            retained_max: 65_536,
            retry_first: Duration::from_millis(100),
            retry_max: Duration::from_secs(5),
            rebuild_after: Duration::from_secs(3),
            backup_step_pages: 100,
            boot_id: String::new(),
            on_done: Box::new(|_| {}),
            faults: Faults::none(),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("durability", &self.durability)
            .field("group_max", &self.group_max)
            .field("queue_max", &self.queue_max)
            .field("retained_max", &self.retained_max)
            .field("boot_id", &self.boot_id)
            .finish_non_exhaustive()
    }
}
