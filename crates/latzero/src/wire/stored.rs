//! What a client of encrypted pools keeps on disk: the newest accepted descriptor of each pool, the
//! calls that an app has finished, and the parked calls whose answers it awaits. With it a server
//! can neither go back to an older state nor make a call run twice, and an answer can be opened by
//! a later process.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use latzero_crypto::descriptor::Descriptor;
use latzero_crypto::events::{DEFERRED_MAX, DEFERRED_MS_MAX, Id, PendingCall, WAITING_MAX};
use latzero_crypto::text;
use latzero_protocol::limits::PARKED_TTL_MAX_MS;
use latzero_protocol::{Code, Ran};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::keys::now_ms;
use crate::wire::sealed::SealedPool;

/// The file with the ids of the calls that an app finished, until they expire: a call runs once,
/// even if the server delivers it again after the app's restart. An entry has [`FINISHED_BYTES`]:
/// the id, and the time of expiry in Unix milliseconds, big-endian.
pub(super) struct Finished(PathBuf);

const FINISHED_BYTES: usize = 24;

/// A larger file is rewritten without the expired entries.
const FINISHED_FILE_BYTES_MAX: u64 = 2 * (DEFERRED_MAX * FINISHED_BYTES) as u64;

impl Finished {
    pub(super) fn of(pool: &SealedPool, app_id: &str) -> Option<Finished> {
        DescriptorFile::beside(pool, &format!("@{app_id}")).map(Finished)
    }

    /// The newest entries that have not expired. A crash may leave half an entry at the end.
    pub(super) fn read(&self) -> Vec<(Id, u64)> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&self.0);
        let read = file.and_then(|file| {
            let most = FINISHED_FILE_BYTES_MAX + FINISHED_BYTES as u64;
            file.take(most).read_to_end(&mut bytes)
        });
        if read.is_err() {
            return Vec::new();
        }
        let now = now_ms();
        let (entries, _) = bytes.as_chunks::<FINISHED_BYTES>();
        let mut known = Vec::new();
        for entry in entries.iter().rev() {
            let (id, expires_ms) = entry.split_at(16);
            let id: Id = id.try_into().expect("sixteen bytes");
            let expires_ms = u64::from_be_bytes(expires_ms.try_into().expect("eight bytes"));
            if expires_ms >= now && known.len() < DEFERRED_MAX {
                known.push((id, expires_ms));
            }
        }
        known
    }

    /// Adds a call. If it cannot be stored, the call may run once more after a restart.
    pub(super) fn add(&self, call: (Id, u64)) {
        let appended = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.0)
            .and_then(|mut file| {
                file.write_all(&Self::entry(&call))?;
                file.metadata()
            });
        if appended.is_ok_and(|file| file.len() > FINISHED_FILE_BYTES_MAX) {
            let known = self.read();
            let entries = known.iter().rev().flat_map(Self::entry);
            replace(&self.0, &entries.collect::<Vec<u8>>());
        }
    }

    fn entry((id, expires_ms): &(Id, u64)) -> [u8; FINISHED_BYTES] {
        let mut entry = [0; FINISHED_BYTES];
        entry[..16].copy_from_slice(id);
        entry[16..].copy_from_slice(&expires_ms.to_be_bytes());
        entry
    }
}

/// The directory with the parked calls whose answers an app awaits. Its processes share it, so each
/// id of a call has a file of its own. The server refuses a second call with an id that is in use,
/// and nobody knows that before, so a file may have several calls.
#[derive(Debug)]
pub(super) struct AwaitedCalls {
    directory: PathBuf,
    /// How many files there are, as far as this process knows.
    count: AtomicUsize,
    /// How many there may be.
    max: usize,
}

/// A parked call, as it is stored.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct AwaitedCall {
    /// The id by which the server knows the call.
    id: String,
    /// The id of the message, in base64url.
    msg_id: String,
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idempotency_key: Option<String>,
    signed: bool,
}

/// Nothing is awaited longer: a call and its answer can each live for 30 days.
const AWAITED_TIME_MAX: Duration = Duration::from_millis(PARKED_TTL_MAX_MS + DEFERRED_MS_MAX);

/// How many calls with the same id are stored; the oldest make room.
const AWAITED_SAME_ID_MAX: usize = 8;

const PIN_CHARS: usize = 22;

/// A larger file was not written by this client.
const AWAITED_BYTES_MAX: u64 = 256 * 1024;

impl AwaitedCall {
    fn new(id: &str, msg_id: &Id, call: &PendingCall) -> Self {
        AwaitedCall {
            id: id.to_owned(),
            msg_id: text::encode(msg_id),
            name: call.name.clone(),
            destination: call.destination.clone(),
            idempotency_key: call.idempotency_key.clone(),
            signed: call.signed,
        }
    }

    fn pending(self) -> Option<(Id, PendingCall)> {
        let call = PendingCall {
            name: self.name,
            destination: self.destination,
            idempotency_key: self.idempotency_key,
            deferred: true,
            signed: self.signed,
            items: 0,
        };
        Some((text::decode(&self.msg_id)?, call))
    }
}

impl AwaitedCalls {
    /// Deletes what nobody can await any more.
    pub(super) fn of(pool: &SealedPool, app_id: &str) -> Option<AwaitedCalls> {
        let directory = DescriptorFile::beside(pool, &Self::suffix(app_id))?;
        let awaited = AwaitedCalls::new(directory, WAITING_MAX);
        awaited.sweep();
        Some(awaited)
    }

    fn new(directory: PathBuf, max: usize) -> AwaitedCalls {
        let count = AtomicUsize::new(0);
        AwaitedCalls {
            directory,
            count,
            max,
        }
    }

    /// Counts the files, and deletes those that have expired.
    fn sweep(&self) {
        let files = std::fs::read_dir(&self.directory);
        let unexpired = files.into_iter().flatten().flatten().filter(|file| {
            let age = file.metadata().and_then(|file| file.modified());
            let age = age.ok().and_then(|changed| changed.elapsed().ok());
            let has_expired = age.is_some_and(|age| age > AWAITED_TIME_MAX);
            !(has_expired && std::fs::remove_file(file.path()).is_ok())
        });
        self.count.store(unexpired.count(), Ordering::Relaxed);
    }

    fn is_full(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= self.max
    }

    /// No AppID has this character, so the name is no other app's file of finished calls.
    fn suffix(app_id: &str) -> String {
        format!("@{app_id}=awaited")
    }

    /// Callers choose ids, and not every id is a file name.
    fn file(&self, id: &str) -> PathBuf {
        let hash = latzero_crypto::sha256(id.as_bytes());
        self.directory.join(text::encode(&hash[..16]))
    }

    /// Locks the directory (flock(2)), because other processes of the app change the same files.
    /// The result keeps it locked; without one, the files cannot be written either.
    fn lock(&self) -> Option<std::fs::File> {
        loop {
            make_directory_of(&self.file("")).ok()?;
            let directory = std::fs::File::open(&self.directory).ok()?;
            directory.lock().ok()?;
            // Who held it before may have removed it, and another process made a new one.
            let locked = directory.metadata().ok()?;
            match std::fs::metadata(&self.directory) {
                Ok(now) if (now.dev(), now.ino()) == (locked.dev(), locked.ino()) => {
                    return Some(directory);
                }
                _ => {}
            }
        }
    }

    fn read(&self, id: &str) -> Vec<AwaitedCall> {
        let mut bytes = Vec::new();
        let read = std::fs::File::open(self.file(id))
            .and_then(|file| file.take(AWAITED_BYTES_MAX).read_to_end(&mut bytes));
        let calls = read.ok().and_then(|_| serde_json::from_slice(&bytes).ok());
        let mut calls: Vec<AwaitedCall> = calls.unwrap_or_default();
        calls.retain(|call| call.id == id);
        calls
    }

    fn write(&self, id: &str, calls: &[AwaitedCall]) -> std::io::Result<()> {
        let json = serde_json::to_vec(calls).expect("it has only strings and flags");
        try_replace(&self.file(id), &json)
    }

    /// Stores a call before it is sent. The kernel has it then: it survives the end of the process,
    /// and what survives a power failure is up to the file system.
    ///
    /// # Errors
    /// `overloaded` if answers to [`WAITING_MAX`] calls are awaited; `storage` if it cannot be
    /// written.
    pub(super) fn add(&self, id: &str, msg_id: &Id, call: &PendingCall) -> Result<(), Error> {
        let _alone = self.lock();
        let mut calls = self.read(id);
        if calls.is_empty() && self.is_full() {
            // Other processes of the app may have read answers.
            self.sweep();
        }
        if calls.is_empty() && self.is_full() {
            let text = format!(
                "{} parked calls await their answers: {}; read some of them first",
                self.max,
                self.directory.display()
            );
            return Err(Error::new(Code::Overloaded, text).with_ran(Ran::No));
        }
        let is_new = calls.is_empty();
        let too_many = (calls.len() + 1).saturating_sub(AWAITED_SAME_ID_MAX);
        calls.drain(..too_many);
        calls.push(AwaitedCall::new(id, msg_id, call));
        self.write(id, &calls).map_err(|error| {
            let text = format!(
                "the call can't be parked, because what is needed to open its answer can't be \
                stored in {}: {error}; choose another directory with XDG_STATE_HOME or state_dir",
                self.directory.display()
            );
            Error::new(Code::Storage, text).with_ran(Ran::No)
        })?;
        self.count.fetch_add(usize::from(is_new), Ordering::Relaxed);
        Ok(())
    }

    /// The calls with this id whose answers are awaited, the newest first.
    pub(super) fn find(&self, id: &str) -> impl Iterator<Item = (Id, PendingCall)> {
        let calls = self.read(id).into_iter().rev();
        calls.filter_map(AwaitedCall::pending)
    }

    /// A call was answered, or is not awaited any more.
    pub(super) fn remove(&self, id: &str, msg_id: &Id) {
        let _alone = self.lock();
        let mut calls = self.read(id);
        let msg_id = text::encode(msg_id);
        calls.retain(|call| call.msg_id != msg_id);
        if !calls.is_empty() {
            let _ = self.write(id, &calls);
        } else if std::fs::remove_file(self.file(id)).is_ok() {
            let one_less = |count: usize| count.checked_sub(1);
            let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
            let _ = self.count.fetch_update(set, fetch, one_less);
            // Not while there are others. Commands have AppIDs that never come again.
            let _ = std::fs::remove_dir(&self.directory);
        }
    }
}

/// The pools for which the default state directory has calls whose answers an app awaits.
pub(crate) fn awaited_in(app_id: &str) -> Vec<String> {
    let suffix = AwaitedCalls::suffix(app_id);
    let directory = DescriptorFile::directory().and_then(|all| std::fs::read_dir(all).ok());
    let entries = directory.into_iter().flatten().flatten();
    let mut pools: Vec<String> = entries
        .filter(|entry| {
            std::fs::read_dir(entry.path()).is_ok_and(|mut calls| calls.next().is_some())
        })
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(name.strip_suffix(&suffix)?.get(PIN_CHARS + 1..)?.to_owned())
        })
        .collect();
    pools.sort_unstable();
    pools.dedup();
    pools
}

/// Creates the directory of a file. Names of files in it are those of encrypted pools, which not
/// every user may know.
fn make_directory_of(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), |directory| {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
    })
}

/// Writes a whole file, which is private, or leaves it unchanged.
fn replace(path: &Path, bytes: &[u8]) {
    let _ = try_replace(path, bytes);
}

fn try_replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // Several apps of one process may write the same file.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (process, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let beside = PathBuf::from(format!("{}.{process}.{number}.new", path.display()));
    let written = make_directory_of(path)
        .and_then(|()| {
            std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)
        })
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&beside, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

/// The store of the newest accepted descriptor of each pool, by its pin and name. With it a client
/// detects that a pool was replaced by another one, or by an older state.
pub(crate) struct DescriptorFile(PathBuf);

impl DescriptorFile {
    pub(crate) fn of(pool: &SealedPool) -> Option<DescriptorFile> {
        let pin = pool.keys().0.pin()?;
        let directory = pool.state_dir()?;
        Some(DescriptorFile(
            directory.join(Self::file(&pin, pool.name())),
        ))
    }

    /// The place of something else that is stored for the pool.
    fn beside(pool: &SealedPool, suffix: &str) -> Option<PathBuf> {
        let DescriptorFile(path) = DescriptorFile::of(pool)?;
        let mut name = path.file_name()?.to_owned();
        name.push(suffix);
        Some(path.with_file_name(name))
    }

    /// The pin of a pool's owner has 16 bytes, which are [`PIN_CHARS`] characters.
    fn file(pin: &[u8; 16], pool: &str) -> String {
        format!("{}-{pool}", text::encode(pin))
    }

    pub(super) fn directory() -> Option<PathBuf> {
        let absolute = |name| {
            let path = std::env::var_os(name).map(PathBuf::from);
            path.filter(|path| path.is_absolute())
        };
        let state = absolute("XDG_STATE_HOME");
        let state = state.or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
        Some(state.join("latzero/pools"))
    }

    /// Deletes it; returns whether there was anything.
    pub(crate) fn forget(&self) -> std::io::Result<bool> {
        match std::fs::remove_file(&self.0) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// `storage` if there is one that cannot be read: it may be newer than the server's.
    pub(super) fn read(&self) -> Result<Option<Descriptor>, Error> {
        let why = match std::fs::read(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => error.to_string(),
            Ok(bytes) => match Descriptor::parse(&bytes) {
                Ok(descriptor) => return Ok(Some(descriptor)),
                Err(error) => error.to_string(),
            },
        };
        let text = format!(
            "what was accepted of the pool before can't be read from {}: {why}; if that is \
            explained, `latzero keys accept-restore` removes it",
            self.0.display()
        );
        Err(Error::new(Code::Storage, text).with_ran(Ran::No))
    }

    /// If it cannot be stored, a later process trusts the first descriptor that it gets.
    pub(super) fn write(&self, descriptor: &Descriptor) {
        if std::fs::read(&self.0).is_ok_and(|bytes| bytes == descriptor.as_bytes()) {
            return;
        }
        replace(&self.0, descriptor.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_calls_are_kept_until_they_expire_and_the_file_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Finished(directory.path().join("pin-pool@app"));
        assert_eq!(kept.read(), []);
        let later = now_ms() + 1_000_000;
        kept.add(([1; 16], later));
        kept.add(([2; 16], 1));
        kept.add(([3; 16], later));
        assert_eq!(kept.read(), [([3; 16], later), ([1; 16], later)]);
        // A crash in the middle of an entry loses no other.
        let mut bytes = std::fs::read(&kept.0).unwrap();
        bytes.extend_from_slice(&[9; 5]);
        std::fs::write(&kept.0, &bytes).unwrap();
        assert_eq!(kept.read().len(), 2);
        // What has expired goes when the file is large.
        let old = Finished::entry(&([4; 16], 1));
        let entries = FINISHED_FILE_BYTES_MAX as usize / FINISHED_BYTES;
        std::fs::write(&kept.0, old.repeat(entries)).unwrap();
        kept.add(([5; 16], later));
        assert_eq!(kept.read(), [([5; 16], later)]);
        assert_eq!(std::fs::read(&kept.0).unwrap().len(), FINISHED_BYTES);
    }

    fn call(name: &str) -> PendingCall {
        PendingCall {
            name: name.into(),
            destination: Some("worker".into()),
            idempotency_key: Some("k\"1".into()),
            deferred: true,
            signed: true,
            items: 0,
        }
    }

    #[test]
    fn awaited_calls_are_found_by_their_ids_until_they_are_answered() {
        let directory = tempfile::tempdir().unwrap();
        let of_process = || AwaitedCalls::new(directory.path().join("pin-pool@app=awaited"), 2);
        let awaited = of_process();
        let found = |id: &str| awaited.find(id).collect::<Vec<_>>();
        assert_eq!(found("a/../b"), []);
        awaited.add("a/../b", &[1; 16], &call("one")).unwrap();
        awaited.add("b", &[2; 16], &call("two")).unwrap();
        assert_eq!(found("a/../b"), [([1; 16], call("one"))]);
        // Not beyond the bound; a call with an id that has a file needs no more.
        let refused = awaited.add("c", &[3; 16], &call("three")).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.ran()),
            (Code::Overloaded, Some(Ran::No))
        );
        assert_eq!(found("c"), []);
        awaited.add("b", &[3; 16], &call("three")).unwrap();
        let both = [([3; 16], call("three")), ([2; 16], call("two"))];
        assert_eq!(found("b"), both);
        // The second one was refused.
        awaited.remove("b", &[3; 16]);
        assert_eq!(found("b"), [([2; 16], call("two"))]);
        awaited.remove("b", &[2; 16]);
        assert_eq!(found("b"), []);
        // Another process of the app takes an answer.
        awaited.add("c", &[4; 16], &call("four")).unwrap();
        assert_eq!(
            awaited
                .add("d", &[5; 16], &call("five"))
                .unwrap_err()
                .kind(),
            Code::Overloaded
        );
        of_process().remove("c", &[4; 16]);
        awaited.add("d", &[5; 16], &call("five")).unwrap();
        awaited.remove("d", &[5; 16]);
        awaited.add("c", &[4; 16], &call("four")).unwrap();
        for n in 0..AWAITED_SAME_ID_MAX as u8 + 3 {
            awaited.add("c", &[n + 10; 16], &call("more")).unwrap();
        }
        assert_eq!(found("c").len(), AWAITED_SAME_ID_MAX);
        // Files that something else wrote, or that a crash left, are no calls.
        std::fs::write(awaited.file("a/../b"), "[{").unwrap();
        assert_eq!(found("a/../b"), []);
        let names = |directory: &Path| std::fs::read_dir(directory).unwrap().count();
        assert_eq!(names(&awaited.directory), 2);
    }

    #[test]
    fn processes_that_use_an_id_at_once_lose_no_call() {
        let directory = tempfile::tempdir().unwrap();
        let of_process = || AwaitedCalls::new(directory.path().join("pin-pool@app=awaited"), 9);
        let accepted = of_process();
        std::thread::scope(|scope| {
            for process in 1..4 {
                let awaited = of_process();
                scope.spawn(move || {
                    for _ in 0..100 {
                        // The server refuses these.
                        awaited.add("a", &[process; 16], &call("two")).unwrap();
                        awaited.remove("a", &[process; 16]);
                    }
                });
            }
            accepted.add("a", &[9; 16], &call("one")).unwrap();
        });
        let found = accepted.find("a").collect::<Vec<_>>();
        assert_eq!(found, [([9; 16], call("one"))]);
    }

    #[test]
    fn a_call_that_cannot_be_stored_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        let place = directory.path().join("file/pin-pool@app=awaited");
        let awaited = AwaitedCalls::new(place, 9);
        let refused = awaited.add("a", &[1; 16], &call("one")).unwrap_err();
        assert_eq!(
            (refused.kind(), refused.ran()),
            (Code::Storage, Some(Ran::No))
        );
        assert!(refused.message().contains("state_dir"), "{refused}");
    }
}
