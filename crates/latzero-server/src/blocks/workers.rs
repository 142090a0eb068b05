//! The threads for slow jobs of blocks.

use super::*;

/// Jobs for storage with at least this many bytes have a separate thread.
const LARGE_BYTES_MIN: u64 = 32 * 1024 * 1024;

/// A job for the blocks' thread.
pub(super) enum Work {
    Job(Arc<ServerState>, Arc<PoolCell>, Job<Arc<Peer>>),
    /// Storage to drop, which frees its memory; and the database in which its removal is recorded,
    /// if it is removed.
    Free(Arc<StoredBlock>, Option<Store>),
    /// Reports that everything before it is done.
    Report(Sender<()>),
}

/// The threads for slow jobs: those of small blocks do not wait for those of large ones.
pub(super) struct Workers {
    pub(super) small: Sender<Work>,
    pub(super) large: Sender<Work>,
    /// Writes do not wait for the disk, so they do not wait behind flushes.
    pub(super) writes: Sender<Work>,
}

impl Workers {
    pub(super) fn send(&self, bytes: u64, work: Work) {
        let worker = match bytes {
            0..LARGE_BYTES_MIN => &self.small,
            _ => &self.large,
        };
        pass_on(worker, work);
    }

    pub(super) fn write(&self, work: Work) {
        pass_on(&self.writes, work);
    }
}

fn pass_on(worker: &Sender<Work>, work: Work) {
    worker
        .send(work)
        .expect("the threads for blocks run as long as the server");
}

/// The loop of a thread for blocks: one job after the other, until the server ends.
pub(super) fn run(queue: &Receiver<Work>, files: &Files) {
    let mut waiting = VecDeque::new();
    while let Some(work) = waiting.pop_front().or_else(|| queue.recv().ok()) {
        match work {
            Work::Job(
                shared,
                pool,
                Job::Flush {
                    key,
                    storage,
                    ticket,
                },
            ) => {
                // Requests that arrived before the flush starts are covered by it.
                waiting.extend(queue.try_iter());
                let same = take_where(&mut waiting, |work| match work {
                    Work::Job(_, _, Job::Flush { storage: also, .. }) => *also == storage,
                    _ => false,
                });
                let version = shared.storage.blocks.flush(storage);
                let others = same.into_iter().filter_map(|work| match work {
                    Work::Job(_, pool, Job::Flush { key, ticket, .. }) => Some((pool, key, ticket)),
                    _ => None,
                });
                for (pool, key, ticket) in std::iter::once((pool, key, ticket)).chain(others) {
                    let what = Finished::Flushed(key, ticket, version.clone());
                    shared.loops.mailboxes[0].send(Command::BlockDone(JobResult { pool, what }));
                }
            }
            Work::Job(shared, pool, job) => {
                let keeps_name = matches!(&job, Job::Make { making, .. } if has_rights(making));
                if let Some(what) = shared.storage.blocks.run(job) {
                    if keeps_name {
                        // After a kill right behind the reply, the server must still know the owner
                        // of the name.
                        shared.storage.blocks.rows.settle_on_disk();
                    }
                    shared.loops.mailboxes[0].send(Command::BlockDone(JobResult { pool, what }));
                }
            }
            Work::Report(to) => {
                // Who asked may no longer wait.
                let _ = to.send(());
            }
            Work::Free(stored, store) => {
                let Some(names) = &stored.names else { continue };
                if let Err(error) = files.sync() {
                    tracing::warn!(file = %names, %error, "cannot flush the removal of a block's \
                        file");
                }
                // Nothing more: what was handed in before is written then, its row's end too. Where
                // the disk refuses, the next start removes the mark.
                if store.is_some_and(|store| store.commit(Vec::new()).is_ok()) {
                    files.forget(names.id());
                }
            }
        }
    }
}

/// Removes the elements that match; both lists keep their order.
pub(super) fn take_where<T>(all: &mut VecDeque<T>, is_so: impl Fn(&T) -> bool) -> Vec<T> {
    let (taken, left) = std::mem::take(all)
        .into_iter()
        .partition::<Vec<_>, _>(is_so);
    *all = left.into();
    taken
}
