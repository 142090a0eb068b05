//! The queue of the writer: all promises in order, and the newest eventual change of each row.
//!
//! All changes share one sequence, so a change is never written before one that was submitted
//! earlier, unless a newer change of the same row replaced that one. An eventual change that is
//! replaced loses its position: the newer one goes to the end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::mpsc::SyncSender;

use crate::change::{Key, RowChange, Worth};
use crate::error::{StoreError, SubmitError};
use crate::options::Ticket;

/// One or several changes that are written together or not at all.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) changes: Changes,
    pub(crate) teller: Teller,
    sequence: u64,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "almost every job is one change, and a box for each would cost more"
)]
pub(crate) enum Changes {
    One(RowChange),
    Together(Vec<RowChange>),
}

/// Who is notified of the result of a job.
#[derive(Debug)]
pub(crate) enum Teller {
    /// Nobody: it is retried until it is written.
    Nobody,
    /// The caller's `on_done`.
    Ticket(Ticket),
    /// A thread that waits.
    Waiter(SyncSender<Result<(), StoreError>>),
}

impl Changes {
    pub(crate) fn as_slice(&self) -> &[RowChange] {
        match self {
            Self::One(change) => std::slice::from_ref(change),
            Self::Together(changes) => changes,
        }
    }
}

impl Job {
    pub(crate) fn is_promise(&self) -> bool {
        !matches!(self.teller, Teller::Nobody)
    }

    fn len(&self) -> usize {
        self.changes.as_slice().len().max(1)
    }
}

/// The bounded queue. Taking a batch leaves its eventual changes counted until [`Queue::written`]
/// or [`Queue::put_back`].
#[derive(Debug)]
pub(crate) struct Queue {
    jobs: BTreeMap<u64, Job>,
    /// Where the newest eventual change of each row waits.
    newest: HashMap<Key, u64>,
    /// Eventual changes that may be dropped, the least important and oldest first.
    droppable: BTreeSet<(Worth, u64)>,
    sequence: u64,
    promised: usize,
    eventual: usize,
    eventual_taken: usize,
    dropped: u64,
    promised_max: usize,
    eventual_max: usize,
}

impl Queue {
    pub(crate) fn new(promised_max: usize, eventual_max: usize) -> Self {
        Self {
            jobs: BTreeMap::new(),
            newest: HashMap::new(),
            droppable: BTreeSet::new(),
            sequence: 0,
            promised: 0,
            eventual: 0,
            eventual_taken: 0,
            dropped: 0,
            promised_max,
            eventual_max,
        }
    }

    pub(crate) fn promise(&mut self, changes: Changes, teller: Teller) -> Result<(), SubmitError> {
        let job = Job {
            changes,
            teller,
            sequence: self.next(),
        };
        if self.promised + job.len() > self.promised_max {
            return Err(SubmitError::Full {
                what: "promised",
                max: self.promised_max,
            });
        }
        self.promised += job.len();
        self.jobs.insert(job.sequence, job);
        Ok(())
    }

    pub(crate) fn eventual(&mut self, change: RowChange) -> Result<(), SubmitError> {
        let key = change.key();
        if let Some(before) = self.newest.get(&key).copied() {
            self.supersede(before);
        }
        if self.eventual + self.eventual_taken >= self.eventual_max && !self.make_room(&change) {
            return Err(SubmitError::Full {
                what: "eventual",
                max: self.eventual_max,
            });
        }
        let sequence = self.next();
        self.newest.insert(key, sequence);
        self.insert(change, sequence);
        Ok(())
    }

    /// Takes the oldest jobs, about `max` changes; a job is not split.
    pub(crate) fn take(&mut self, max: usize, into: &mut Vec<Job>) {
        let mut changes = 0;
        while let Some(next) = self.jobs.first_entry() {
            if changes > 0 && changes + next.get().len() > max {
                break;
            }
            let job = next.remove();
            changes += job.len();
            self.forget(&job);
            if !job.is_promise() {
                self.eventual_taken += 1;
            }
            into.push(job);
        }
    }

    /// The eventual changes that were taken are on disk, or were refused permanently.
    pub(crate) fn written(&mut self) {
        self.eventual_taken = 0;
    }

    /// The disk failed: eventual changes of the batch wait again, in their old positions. Promises
    /// stay in `jobs`, together with those that waited, which would only fail later.
    pub(crate) fn put_back(&mut self, jobs: &mut Vec<Job>) {
        let mut promises = Vec::new();
        for job in jobs.drain(..) {
            match job {
                Job {
                    changes: Changes::One(change),
                    teller: Teller::Nobody,
                    sequence,
                } => self.wait_again(change, sequence),
                promise => promises.push(promise),
            }
        }
        self.eventual_taken = 0;
        if self.promised > 0 {
            let waiting: Vec<_> = self
                .jobs
                .iter()
                .filter(|(_, job)| job.is_promise())
                .map(|(sequence, _)| *sequence)
                .collect();
            promises.extend(waiting.iter().filter_map(|at| self.jobs.remove(at)));
            self.promised = 0;
        }
        *jobs = promises;
    }

    pub(crate) fn has_promises(&self) -> bool {
        self.promised > 0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Promised changes that wait.
    pub(crate) fn promised(&self) -> usize {
        self.promised
    }

    /// Eventual changes that wait or are being written.
    pub(crate) fn retained(&self) -> usize {
        self.eventual + self.eventual_taken
    }

    /// Eventual changes that were dropped because there was no room.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn insert(&mut self, change: RowChange, sequence: u64) {
        if change.worth() < Worth::Kept {
            self.droppable.insert((change.worth(), sequence));
        }
        self.eventual += 1;
        let job = Job {
            changes: Changes::One(change),
            teller: Teller::Nobody,
            sequence,
        };
        self.jobs.insert(sequence, job);
    }

    fn wait_again(&mut self, change: RowChange, sequence: u64) {
        let key = change.key();
        // An older one may be back already, if it reaches further than this row.
        let has_newer = self.newest.get(&key).is_some_and(|at| *at > sequence);
        if has_newer && !change.reaches_further() {
            return;
        }
        if !has_newer {
            self.newest.insert(key, sequence);
        }
        self.insert(change, sequence);
    }

    /// A newer change of its row has arrived; its other changes must still be written.
    fn supersede(&mut self, sequence: u64) {
        let reaches_further = self.jobs.get(&sequence).is_some_and(|job| {
            job.changes
                .as_slice()
                .iter()
                .any(RowChange::reaches_further)
        });
        if !reaches_further && let Some(job) = self.jobs.remove(&sequence) {
            self.forget(&job);
        }
    }

    fn make_room(&mut self, newcomer: &RowChange) -> bool {
        let Some((worth, sequence)) = self.droppable.first().copied() else {
            return false;
        };
        if worth > newcomer.worth() {
            return false;
        }
        if let Some(job) = self.jobs.remove(&sequence) {
            self.forget(&job);
        }
        self.dropped += 1;
        true
    }

    /// Removes a job that has left `jobs` from the counts.
    fn forget(&mut self, job: &Job) {
        if job.is_promise() {
            self.promised -= job.len();
            return;
        }
        self.eventual -= 1;
        for change in job.changes.as_slice() {
            self.droppable.remove(&(change.worth(), job.sequence));
            let key = change.key();
            if self.newest.get(&key) == Some(&job.sequence) {
                self.newest.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::AnswerRow;

    fn set(key: &str, value: &str) -> RowChange {
        RowChange::PutSetting {
            key: key.into(),
            value: value.into(),
        }
    }

    fn seen(app_id: &str, last_seen: i64) -> RowChange {
        RowChange::SeenApp {
            app_id: app_id.into(),
            last_seen,
        }
    }

    fn answer(number: u64, ends_call: Option<u64>) -> RowChange {
        RowChange::PutAnswer {
            answer: AnswerRow {
                number,
                caller: "a".into(),
                call_id: "c".into(),
                pool: "p".into(),
                idempotency_key: None,
                frame: Vec::new(),
                expires: 0,
                process: "work".into(),
            },
            ends_call,
        }
    }

    fn taken(queue: &mut Queue, max: usize) -> Vec<Job> {
        let mut jobs = Vec::new();
        queue.take(max, &mut jobs);
        jobs
    }

    fn changes(jobs: &[Job]) -> Vec<RowChange> {
        jobs.iter()
            .flat_map(|job| job.changes.as_slice().to_vec())
            .collect()
    }

    #[test]
    fn the_newest_change_of_a_row_waits_last() {
        let mut queue = Queue::new(9, 9);
        for change in [set("a", "1"), set("b", "1"), set("a", "2")] {
            queue.eventual(change).unwrap();
        }
        assert_eq!(queue.retained(), 2);
        assert_eq!(
            changes(&taken(&mut queue, 9)),
            [set("b", "1"), set("a", "2")]
        );
    }

    #[test]
    fn acknowledged_and_eventual_changes_share_one_order() {
        let mut queue = Queue::new(9, 9);
        queue.eventual(set("a", "1")).unwrap();
        let promised = Changes::One(set("a", "2"));
        queue.promise(promised, Teller::Ticket(1)).unwrap();
        queue.eventual(seen("x", 1)).unwrap();
        let expected = [set("a", "1"), set("a", "2"), seen("x", 1)];
        assert_eq!(changes(&taken(&mut queue, 9)), expected);
    }

    #[test]
    fn requeued_changes_keep_their_places_unless_newer_ones_exist() {
        let mut queue = Queue::new(9, 9);
        for change in [set("a", "1"), set("b", "1"), set("c", "1")] {
            queue.eventual(change).unwrap();
        }
        let mut jobs = taken(&mut queue, 2);
        queue.eventual(set("a", "2")).unwrap();
        queue.put_back(&mut jobs);
        assert!(jobs.is_empty());
        let expected = [set("b", "1"), set("c", "1"), set("a", "2")];
        assert_eq!(changes(&taken(&mut queue, 9)), expected);
    }

    #[test]
    fn a_failure_ends_all_waiting_changes() {
        let mut queue = Queue::new(9, 9);
        for ticket in 0..4 {
            let promised = Changes::One(set("a", "1"));
            queue.promise(promised, Teller::Ticket(ticket)).unwrap();
        }
        let mut jobs = taken(&mut queue, 2);
        queue.put_back(&mut jobs);
        assert_eq!(jobs.len(), 4);
        assert!(queue.is_empty() && !queue.has_promises());
    }

    #[test]
    fn an_answer_that_ends_a_call_is_not_forgotten_with_the_answer() {
        let mut queue = Queue::new(9, 9);
        queue.eventual(answer(1, Some(7))).unwrap();
        queue
            .eventual(RowChange::RemoveAnswer { number: 1 })
            .unwrap();
        let expected = [answer(1, Some(7)), RowChange::RemoveAnswer { number: 1 }];
        for together in [1, 2] {
            let mut jobs = taken(&mut queue, together);
            queue.put_back(&mut jobs);
            assert_eq!(queue.retained(), 2);
        }
        assert_eq!(changes(&taken(&mut queue, 9)), expected);
    }

    #[test]
    fn a_full_queue_drops_times_first_and_then_refuses_changes() {
        let mut queue = Queue::new(2, 3);
        queue
            .eventual(RowChange::NoteAttempt {
                number: 1,
                attempt: 1,
            })
            .unwrap();
        queue.eventual(seen("x", 1)).unwrap();
        queue.eventual(set("a", "1")).unwrap();
        queue.eventual(set("b", "1")).unwrap();
        assert_eq!((queue.retained(), queue.dropped()), (3, 1));
        queue.eventual(set("c", "1")).unwrap();
        assert_eq!((queue.retained(), queue.dropped()), (3, 2));
        assert!(queue.eventual(set("d", "1")).is_err());
        assert!(queue.eventual(seen("x", 2)).is_err());
        queue.eventual(set("c", "2")).unwrap();
        assert_eq!(queue.retained(), 3);

        let both = Changes::Together(vec![set("a", "1"), set("b", "1")]);
        queue.promise(both, Teller::Ticket(1)).unwrap();
        assert!(
            queue
                .promise(Changes::One(set("a", "1")), Teller::Ticket(2))
                .is_err()
        );
    }
}
