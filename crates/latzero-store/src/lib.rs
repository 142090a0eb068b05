//! Durable state: records in SQLite, on one thread.
//!
//! A [`Store`] owns the only connection to `data.db`. Changes are submitted without waiting
//! ([`Store::submit`]) and written in groups: while one transaction commits, the next one gathers.
//! A change is either a *promise*, whose ticket is notified after COMMIT or with the reason of its
//! failure, or *eventual*: the newest state of a row is kept in memory until it is written.
//! Everything is read once, at [`open`]; after that the caller's memory is authoritative.
//!
//! This crate knows nothing of connections and routing: registrations, layouts and envelopes are
//! only text and bytes here.
//!
//! No other program may open `data.db` while it is in use: the connection locks it exclusively.
//! Unsigned numbers are stored in SQLite's signed 64 bits: where order matters, a number above
//! `i64::MAX` is refused; device and inode keep their bits.

mod backup;
mod block_backup;
mod calendar;
mod change;
mod checksum;
mod error;
pub mod failpoint;
mod faults;
mod files;
mod location;
mod open;
mod options;
mod query;
mod queue;
mod restore;
mod retention;
mod rows;
mod schema;
mod statements;
mod store;
mod writer;

pub use backup::{Backup, BackupWriter, Summary, open_backup};
pub use block_backup::{BlockHead, BlockReader};
pub use change::RowChange;
pub use error::{BackupError, OpenError, StoreError, SubmitError};
#[doc(hidden)]
pub use faults::{Faults, Lasts};
pub use open::{Contents, Opened, Report, open};
pub use options::{Durability, OnDone, Options, Ticket};
pub use query::{Answer, QueryLimits, Value, dump, query};
#[doc(hidden)]
pub use restore::restore_with;
pub use restore::{Restored, restore};
pub use retention::{Policy, Pruned, backups, prune};
pub use rows::{AnswerRow, AppRow, BindingRow, BlockRow, CallRow, DescriptorRow, PoolRow};
pub use schema::{APPLICATION_ID, SCHEMA_VERSION, library_version};
pub use store::{Status, Store};

/// The database's name in the data directory.
pub const DATABASE: &str = "data.db";
/// The directory of backups in the data directory.
pub const BACKUPS: &str = "backups";
