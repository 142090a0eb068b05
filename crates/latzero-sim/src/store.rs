//! The store of the simulated world: rows in maps, written at once, later, or not at all.

use std::collections::{BTreeMap, VecDeque};

use latzero_fabric::rows::{AnswerRow, AppRow, CallRow, PoolRow, StoreChange};
use latzero_protocol::{AppId, PoolName};

use crate::line::Peer;

/// The content of the simulated disk.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    /// Apps.
    pub apps: BTreeMap<AppId, AppRow>,
    /// Pools that outlive the server.
    pub pools: BTreeMap<PoolName, PoolRow>,
    /// Calls that wait for their handlers.
    pub calls: BTreeMap<u64, CallRow>,
    /// Answers that wait for their callers.
    pub answers: BTreeMap<u64, AnswerRow>,
}

impl Rows {
    /// Applies one change, as a real store does.
    pub fn write(&mut self, change: &StoreChange) {
        match change.clone() {
            StoreChange::App(row) => {
                self.apps.insert(row.app_id.clone(), *row);
            }
            StoreChange::Watches(app, watches) => {
                if let Some(row) = self.apps.get_mut(&app) {
                    row.watches = watches;
                }
            }
            StoreChange::Seen(app, unix_ms) => {
                if let Some(row) = self.apps.get_mut(&app) {
                    row.last_seen = unix_ms;
                }
            }
            StoreChange::ForgetApp(app) => {
                self.apps.remove(&app);
            }
            // All users are untrusted here.
            StoreChange::Binding(_)
            | StoreChange::ForgetBinding(_)
            | StoreChange::Descriptor(..) => {}
            // No client connects early enough to need a reserved name.
            StoreChange::Pool(row) if !row.is_durable => {}
            StoreChange::Pool(row) => {
                self.pools.insert(row.name.clone(), *row);
            }
            StoreChange::ForgetPool(name) => {
                self.pools.remove(&name);
            }
            StoreChange::Call(row) => {
                self.calls.insert(row.number, *row);
            }
            StoreChange::Attempt(number, attempt) => {
                if let Some(row) = self.calls.get_mut(&number) {
                    row.attempt = attempt;
                }
            }
            StoreChange::EndCall(number) => {
                self.calls.remove(&number);
            }
            StoreChange::EndParked(numbers) => {
                for number in numbers {
                    self.calls.remove(&number);
                    self.answers.remove(&number);
                }
            }
            StoreChange::Answer(row) => {
                self.calls.remove(&row.number);
                self.answers.insert(row.number, *row);
            }
            StoreChange::EndAnswer(number) => {
                self.answers.remove(&number);
            }
        }
    }
}

/// Who is notified of the result of storing a row.
#[derive(Debug, Clone)]
pub(crate) enum Waiter {
    Session(Peer),
    /// The pool and the number of an answer.
    Answer(PoolName, u64),
}

/// The disk, and the writes in progress.
#[derive(Debug, Default)]
pub(crate) struct Store {
    pub(crate) rows: Rows,
    waiting: VecDeque<(StoreChange, Option<Waiter>)>,
    pub(crate) is_holding: bool,
    pub(crate) is_failing: bool,
}

impl Store {
    pub(crate) fn push(&mut self, change: StoreChange, promise: Option<Waiter>) {
        self.waiting.push_back((change, promise));
    }

    /// Performs the next write, or fails; returns whom to notify, and whether it succeeded. A
    /// failed write that no client waits for is retried.
    pub(crate) fn write_next(&mut self) -> Option<(Option<Waiter>, bool)> {
        if self.is_holding {
            return None;
        }
        let at = match self.is_failing {
            true => self
                .waiting
                .iter()
                .position(|(_, promise)| promise.is_some())?,
            false => 0,
        };
        let (change, promise) = self.waiting.remove(at)?;
        if !self.is_failing {
            self.rows.write(&change);
        }
        Some((promise, !self.is_failing))
    }

    /// Writes in progress are lost; completed ones stay.
    pub(crate) fn crash(&mut self) {
        self.waiting.clear();
        self.is_holding = false;
    }
}
