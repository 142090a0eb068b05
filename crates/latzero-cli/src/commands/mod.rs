//! What each command does, one file each.

pub(crate) mod answers;
pub(crate) mod apps;
pub(crate) mod backup;
pub(crate) mod bench;
pub(crate) mod block;
pub(crate) mod call;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod db;
pub(crate) mod doctor;
pub(crate) mod emit;
pub(crate) mod health;
pub(crate) mod kick;
pub(crate) mod on;
pub(crate) mod ping;
pub(crate) mod pools;
pub(crate) mod reload;
pub(crate) mod restore;
pub(crate) mod serve;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod stop;
mod store;
mod trigger;
pub(crate) mod watch;
