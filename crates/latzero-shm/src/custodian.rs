//! The server's side of a block: it creates and keeps the memory or file, and reads and writes it
//! for clients that cannot map it.
//!
//! Nothing that somebody does to a file may end the server. So files are only accessed with pread
//! and pwrite. Only memory that is sealed against shrinking is mapped: its header permanently, and
//! its payload during one large copy.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{OFlags, fdatasync, fstat};

use crate::block_memory::BlockMemory;
use crate::create::reopened;
use crate::format::{Access, Description, HeaderError, State, at};
use crate::memory::{Fault, Memory};
use crate::slots::{self, Head, ReadError, Stamp, Wait, WriteError, spares};

/// How many times a copy of a version is retried because it was overwritten without the lock.
const TRIES: u32 = 16;

/// How many times the checksum of the newest version of a block without spare slots is computed for
/// a flush, if a newer version appears in the meantime. After that the block is written to disk
/// without a checksum, as between two flushes.
const SUM_TRIES: u32 = 3;

/// How many times a flush tries to reserve the newest version of a block that a writer has begun to
/// overwrite. Each time there are two newer versions.
const RESERVE_TRIES: u32 = 1_000;

/// The result of a compare-and-swap.
#[derive(Debug, PartialEq, Eq)]
pub enum Cas {
    /// The bytes were as expected, and were replaced.
    Swapped {
        /// The new version.
        version: u64,
    },
    /// The bytes differ; nothing was written.
    Differs {
        /// The present bytes.
        current: Vec<u8>,
        /// Their version.
        version: u64,
    },
}

/// A version that does not change as long as this exists.
#[derive(Debug)]
pub struct ReadGuard<'a> {
    custodian: &'a Custodian,
    head: Head,
    _flushes: MutexGuard<'a, Flushes>,
}

impl ReadGuard<'_> {
    /// Which version it is.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.head.version
    }

    /// Copies bytes of it out.
    ///
    /// # Errors
    /// If they lie outside the block, or can't be read.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), ReadError> {
        let geometry = &self.custodian.description.geometry;
        if !geometry.contains(offset, to.len()) {
            return Err(ReadError::OutOfRange);
        }
        if self.head == Head::NONE {
            to.fill(0);
            return Ok(());
        }
        let at = geometry.slot(self.head.slot) + offset;
        Ok(self.custodian.memory.read(at, to)?)
    }
}

/// One generation of a block on the server.
#[derive(Debug)]
pub struct Custodian {
    pub(crate) description: Description,
    /// Descriptors that are being sent to clients: for reading, and for writing.
    pub(crate) lent: Mutex<[Weak<OwnedFd>; 2]>,
    pub(crate) memory: BlockMemory,
    /// Ensures one writer at a time in the server; for clients, the block's lock does.
    pub(crate) writing: Mutex<()>,
    /// One flush at a time.
    pub(crate) flushing: Mutex<Flushes>,
}

/// The result of the previous flush.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// The disk did not accept everything. The kernel does not report that again, so everything is
    /// written once more.
    has_failed: bool,
}

impl Custodian {
    /// The server's own descriptor, the only one that stays open.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        self.memory.file.descriptor()
    }

    /// A descriptor to pass to a client. One for reading cannot be used to write; there is none if
    /// the system has no `/proc`, or no descriptor is left.
    ///
    /// Clients share the open file description of the descriptor, including its flags (fcntl(2)).
    /// If one of them set O_APPEND, every pwrite(2) of the server would write at the file's end. So
    /// clients get a separate one.
    #[must_use]
    pub fn lend(&self, access: Access) -> Option<Arc<OwnedFd>> {
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        let (place, flags) = match access {
            Access::Read => (&mut lent[0], OFlags::RDONLY),
            Access::Write => (&mut lent[1], OFlags::RDWR),
        };
        if let Some(lent) = place.upgrade() {
            return Some(lent);
        }
        let opened = Arc::new(reopened(self.file(), flags)?);
        *place = Arc::downgrade(&opened);
        Some(opened)
    }

    /// Device and inode of the file, by which it can be recognised.
    ///
    /// # Errors
    /// If the system does not report them.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = fstat(self.file())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// Its constant fields.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The newest version; 0 if it was never written.
    ///
    /// # Errors
    /// If the head is invalid or can't be read.
    pub fn version(&self) -> Result<u64, Fault> {
        Ok(slots::head(&self.memory, &self.description.geometry)?.version)
    }

    /// Copies bytes of one version out; returns the version.
    ///
    /// # Errors
    /// As [`ReadError`] says. With `if_version`, another version is an error.
    pub fn read(
        &self,
        offset: u64,
        to: &mut [u8],
        if_version: Option<u64>,
    ) -> Result<u64, ReadError> {
        self.check_fixed()?;
        let geometry = &self.description.geometry;
        let version = slots::read(&self.memory, geometry, offset, to, Wait::Hurry)?;
        match if_version {
            Some(wanted) if wanted != version => Err(ReadError::Version(version)),
            _ => Ok(version),
        }
    }

    /// Writes bytes as a new version; returns it.
    ///
    /// # Errors
    /// As [`WriteError`] says. With `if_version`, another version is an error.
    pub fn write(
        &self,
        offset: u64,
        bytes: &[u8],
        if_version: Option<u64>,
    ) -> Result<u64, WriteError> {
        let version = self.write_within(u64::MAX, offset, bytes, if_version)?;
        Ok(version.expect("nothing copies more"))
    }

    /// Like [`Custodian::write`], but gives up (`None`) if bringing the slot up to date would copy
    /// more than `copied_max` bytes.
    ///
    /// # Errors
    /// As [`Custodian::write`].
    pub fn write_within(
        &self,
        copied_max: u64,
        offset: u64,
        bytes: &[u8],
        if_version: Option<u64>,
    ) -> Result<Option<u64>, WriteError> {
        if !self.description.geometry.contains(offset, bytes.len()) {
            return Err(WriteError::OutOfRange);
        }
        self.check_fixed()?;
        let _alone = self.alone();
        let current = self.version()?;
        if if_version.is_some_and(|wanted| wanted != current) {
            return Err(WriteError::Conflict { current });
        }
        self.publish(copied_max, offset, bytes)
    }

    /// Writes bytes as a new version if the current bytes are `expected`.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn cas(&self, offset: u64, expected: &[u8], bytes: &[u8]) -> Result<Cas, WriteError> {
        let swapped = self.cas_within(u64::MAX, offset, expected, bytes)?;
        Ok(swapped.expect("nothing copies more"))
    }

    /// Like [`Custodian::cas`], but gives up (`None`) if bringing the slot up to date would copy
    /// more than `copied_max` bytes.
    ///
    /// # Errors
    /// As [`Custodian::cas`].
    pub fn cas_within(
        &self,
        copied_max: u64,
        offset: u64,
        expected: &[u8],
        bytes: &[u8],
    ) -> Result<Option<Cas>, WriteError> {
        if expected.len() != bytes.len() || !self.description.geometry.contains(offset, bytes.len())
        {
            return Err(WriteError::OutOfRange);
        }
        self.check_fixed()?;
        let _alone = self.alone();
        let mut current = vec![0; bytes.len()];
        let version = slots::read(
            &self.memory,
            &self.description.geometry,
            offset,
            &mut current,
            Wait::Hurry,
        )?;
        if current != expected {
            return Ok(Some(Cas::Differs { current, version }));
        }
        let published = self.publish(copied_max, offset, bytes)?;
        Ok(published.map(|version| Cas::Swapped { version }))
    }

    fn publish(
        &self,
        copied_max: u64,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Option<u64>, WriteError> {
        let mut draft = slots::begin(&self.memory, &self.description.geometry)?;
        if draft.behind(offset, bytes.len() as u64) > copied_max {
            // Nothing was changed but the slot's sequence, as a writer leaves it that ends.
            return Ok(None);
        }
        draft.write(&self.memory, offset, bytes)?;
        Ok(Some(draft.publish(&self.memory, self.stamp()?)?))
    }

    fn stamp(&self) -> Result<Stamp, Fault> {
        Ok(Stamp {
            fence: self.memory.load(at::FENCE, Ordering::Relaxed)?,
            unix_ns: unix_ns(),
        })
    }

    /// Writes the fence of the exclusive lock to the header, for writers; and whether the lock is
    /// held, so that a later server knows whether somebody may be writing a version.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_lease(&self, fence: u64, is_held: bool) -> Result<(), Fault> {
        // If the server ends in between, the lock must look held rather than free.
        if is_held {
            self.memory.store(at::HELD, 1, Ordering::Release)?;
        }
        self.memory.store(at::FENCE, fence, Ordering::Release)?;
        if !is_held {
            self.memory.store(at::HELD, 0, Ordering::Release)?;
        }
        Ok(())
    }

    /// Whether the exclusive lock is held, according to the header.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn is_lease_held(&self) -> Result<bool, Fault> {
        Ok(self.memory.load(at::HELD, Ordering::Acquire)? != 0)
    }

    /// The fence in the header.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn lease(&self) -> Result<u64, Fault> {
        self.memory.load(at::FENCE, Ordering::Acquire)
    }

    /// Writes the state of the block to the header, and wakes everyone who waits for it.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_state(&self, state: State) -> Result<(), Fault> {
        self.memory.store_half(at::STATE, state as u32)?;
        self.memory.notify(at::NOTIFY)
    }

    /// Copies the newest version into a new block, under the same version number. Bytes that do not
    /// fit are left out, and additional ones are zeros. Returns the version.
    ///
    /// Before this, the header must show writers that they lost the lock, or that the block is
    /// superseded: a writer that continues is not waited for.
    ///
    /// # Errors
    /// If either can't be read or written, or the newest version is written over again and
    /// again.
    pub fn copy_to(&self, other: &Custodian) -> Result<u64, Fault> {
        let _alone = self.alone();
        let (from, to) = (&self.description.geometry, &other.description.geometry);
        let size = from.size.min(to.size);
        for _ in 0..TRIES {
            let head = slots::head(&self.memory, from)?;
            if head.version == 0 && !from.is_raw() {
                return Ok(0);
            }
            let sequence = slots::settled(&self.memory, &head)?;
            if sequence.is_none() && !from.is_raw() {
                continue;
            }
            let mut draft = slots::begin(&other.memory, to)?;
            let mut piece = vec![0; usize::try_from(size.min(1024 * 1024)).expect("bounded")];
            let mut done = 0;
            while done < size {
                let n = usize::try_from((size - done).min(piece.len() as u64)).expect("bounded");
                self.memory
                    .read(from.slot(head.slot) + done, &mut piece[..n])?;
                draft
                    .write(&other.memory, done, &piece[..n])
                    .map_err(|error| match error {
                        WriteError::Fault(fault) => fault,
                        _ => Fault::Corrupt("size"),
                    })?;
                done += n as u64;
            }
            if let (Some(sequence), false) = (sequence, from.is_raw())
                && !slots::is_untouched(&self.memory, head.slot, sequence)?
            {
                continue;
            }
            if head.version == 0 {
                return Ok(0);
            }
            return draft.publish_as(&other.memory, head.version, self.stamp()?);
        }
        Err(Fault::Corrupt(
            "newest version, written over without its lock,",
        ))
    }

    /// Fills a new block with what `bytes` yields, under its old version number, to restore it from
    /// a backup.
    ///
    /// # Errors
    /// If `bytes` fails or yields fewer bytes than the block has, or the block can't be written.
    pub fn fill(&self, bytes: &mut dyn std::io::Read, version: u64) -> std::io::Result<()> {
        let _alone = self.alone();
        let geometry = &self.description.geometry;
        let failed = |error: Fault| std::io::Error::other(error.to_string());
        // A block with slots has no content before its first version; a raw one is written in
        // place.
        if version == 0 && !geometry.is_raw() {
            return Ok(());
        }
        let mut draft = slots::begin(&self.memory, geometry).map_err(failed)?;
        let mut piece = vec![0; usize::try_from(geometry.size.min(1024 * 1024)).expect("bounded")];
        let mut done = 0;
        while done < geometry.size {
            let n =
                usize::try_from((geometry.size - done).min(piece.len() as u64)).expect("bounded");
            bytes.read_exact(&mut piece[..n])?;
            draft
                .write(&self.memory, done, &piece[..n])
                .map_err(|error| std::io::Error::other(error.to_string()))?;
            done += n as u64;
        }
        if version == 0 {
            return self.sync().map(|_| ()).map_err(failed);
        }
        let stamp = self.stamp().map_err(failed)?;
        draft
            .publish_as(&self.memory, version, stamp)
            .map_err(failed)?;
        self.sync().map(|_| ()).map_err(failed)
    }

    /// Checks the header: constant fields are unchanged, and the head names a slot.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), HeaderError> {
        let unreadable = |fault: Fault| HeaderError::Unreadable(fault.to_string());
        let found = self.memory.fixed().map_err(unreadable)?;
        if Description::decode(&found)? != self.description {
            return Err(HeaderError::Unexpected("description"));
        }
        let geometry = &self.description.geometry;
        slots::head(&self.memory, geometry).map_err(|_| HeaderError::Field("head"))?;
        let length =
            fstat(self.file()).map_err(|error| HeaderError::Unreadable(error.to_string()))?;
        if (length.st_size as u64) < geometry.total() {
            return Err(HeaderError::Unreadable("the file was shortened".into()));
        }
        Ok(())
    }

    /// An overwritten header makes the whole block suspect.
    fn check_fixed(&self) -> Result<(), Fault> {
        if self.memory.fixed()? == self.description.encode() {
            Ok(())
        } else {
            Err(Fault::Corrupt("header"))
        }
    }

    /// Writes the newest version to disk, with its checksum, and keeps it there until a newer one
    /// is on disk; returns the version. Writers do not wait for it.
    ///
    /// # Errors
    /// If the system refuses, or the newest version is written over again and again.
    pub fn sync(&self) -> Result<u64, Fault> {
        self.sync_in_turn(&mut self.flushes())
    }

    fn flushes(&self) -> MutexGuard<'_, Flushes> {
        let flushes = self.flushing.lock();
        flushes.unwrap_or_else(PoisonError::into_inner)
    }

    /// Flushes the block and holds that version, so that it can be read in parts, however long that
    /// takes, while others write. Other flushes wait until it is released. `None` for a block
    /// without spare slots.
    ///
    /// # Errors
    /// As [`Custodian::sync`].
    pub fn hold(&self) -> Result<Option<ReadGuard<'_>>, Fault> {
        let geometry = &self.description.geometry;
        if geometry.spares == 0 {
            return Ok(None);
        }
        let mut flushes = self.flushes();
        let version = self.sync_in_turn(&mut flushes)?;
        let head = match version {
            0 if !geometry.is_raw() => Head::NONE,
            _ => spares::named(&self.memory, at::FLUSHED)?,
        };
        if head.version != version || head.slot >= geometry.all_slots() {
            return Err(Fault::Corrupt("note of what is on the disk"));
        }
        Ok(Some(ReadGuard {
            custodian: self,
            head,
            _flushes: flushes,
        }))
    }

    fn sync_in_turn(&self, flushes: &mut Flushes) -> Result<u64, Fault> {
        let geometry = &self.description.geometry;
        let synced = if geometry.spares == 0 {
            self.sync_all_slots()
        } else if geometry.is_raw() {
            self.sync_copy(flushes.has_failed)
        } else {
            self.sync_newest(flushes.has_failed)
        };
        flushes.has_failed = synced.is_err();
        synced
    }

    /// The flush of a block without spare slots: the version on disk may be overwritten.
    fn sync_all_slots(&self) -> Result<u64, Fault> {
        let mut version = slots::head(&self.memory, &self.description.geometry)?.version;
        for _ in 0..SUM_TRIES {
            let (newest, is_whole) = self.sum_up()?;
            version = newest;
            if is_whole {
                break;
            }
        }
        fdatasync(self.file()).map_err(io::Error::from)?;
        Ok(version)
    }

    /// Reserves the newest version, computes its checksum, and records that it is on disk once it
    /// is.
    fn sync_newest(&self, is_written_anew: bool) -> Result<u64, Fault> {
        let (memory, geometry) = (&self.memory, &self.description.geometry);
        for _ in 0..RESERVE_TRIES {
            let head = slots::head(memory, geometry)?;
            if head.version == 0 {
                self.to_disk()?;
                return Ok(0);
            }
            let words = at::slot(head.slot);
            let flushed = spares::named(memory, at::FLUSHED)?;
            let sum = memory.load(words + at::CHECKSUM, Ordering::Relaxed)?;
            if flushed == head && sum & slots::SUMMED != 0 && !is_written_anew {
                self.to_disk()?;
                return Ok(head.version);
            }
            if !spares::reserve(memory, head)? {
                std::hint::spin_loop();
                continue;
            }
            let flushed = self.sum_and_sync(head, is_written_anew);
            let is_flushed = matches!(flushed, Ok(true));
            spares::release(memory, is_flushed.then_some(head))?;
            if flushed? {
                return Ok(head.version);
            }
        }
        spares::release(memory, None)?;
        Err(Fault::Corrupt(
            "newest version, written over without regard for the flush,",
        ))
    }

    /// Writes a reserved version to disk; false if it was overwritten anyway.
    fn sum_and_sync(&self, head: Head, is_written_anew: bool) -> Result<bool, Fault> {
        let (memory, geometry) = (&self.memory, &self.description.geometry);
        let words = at::slot(head.slot);
        if is_written_anew {
            memory.write_over(geometry.slot(head.slot), geometry.size)?;
        }
        let sum = slots::content_checksum(memory, geometry, head.slot, head.version)?;
        if memory.load(words + at::VERSION, Ordering::Acquire)? != head.version {
            return Ok(false);
        }
        let sum = slots::SUMMED | u64::from(sum);
        memory.store(words + at::CHECKSUM, sum, Ordering::Release)?;
        self.to_disk()?;
        Ok(memory.load(words + at::VERSION, Ordering::Acquire)? == head.version)
    }

    /// Copies the content of a block that is written in place into the spare slot that is not
    /// needed, and records that this is on disk once it is. To get one complete version, flush
    /// under the lock.
    fn sync_copy(&self, is_written_anew: bool) -> Result<u64, Fault> {
        let (memory, geometry) = (&self.memory, &self.description.geometry);
        let version = slots::head(memory, geometry)?.version;
        let flushed = spares::copied(memory, geometry)?;
        let slot = match flushed {
            Some((slot, _)) if slot == geometry.slots => slot + 1,
            _ => geometry.slots,
        };
        let words = at::slot(slot);
        memory.store(words + at::CHECKSUM, 0, Ordering::Release)?;
        let (from, to) = (geometry.slot(0), geometry.slot(slot));
        let sum = memory.copy_changed(from, to, geometry.size, is_written_anew, version)?;
        memory.store(words + at::VERSION, version, Ordering::Relaxed)?;
        let turn = flushed.map_or(0, |(_, turn)| turn) + 1;
        memory.store(words + at::SEQUENCE, turn, Ordering::Relaxed)?;
        let sum = slots::SUMMED | u64::from(sum);
        memory.store(words + at::CHECKSUM, sum, Ordering::Release)?;
        self.to_disk()?;
        let copied = Head { version, slot };
        spares::name(memory, at::FLUSHED, copied)?;
        Ok(version)
    }

    fn to_disk(&self) -> Result<(), Fault> {
        Ok(fdatasync(self.file()).map_err(io::Error::from)?)
    }

    /// Records the machine's boot in which the block is used, as a number that is not 0: after
    /// another boot, only a part of what was written may be on disk.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_boot(&self, boot: u64) -> Result<(), Fault> {
        self.memory.store(at::BOOT, boot, Ordering::Release)
    }

    /// The boot that [`Custodian::set_boot`] recorded; 0 is none.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn boot(&self) -> Result<u64, Fault> {
        self.memory.load(at::BOOT, Ordering::Acquire)
    }

    /// Stores the checksum of the newest version. Returns that version, and whether it still was
    /// the newest one then.
    fn sum_up(&self) -> Result<(u64, bool), Fault> {
        let geometry = &self.description.geometry;
        let head = slots::head(&self.memory, geometry)?;
        if head.version == 0 {
            return Ok((0, true));
        }
        let Some(sequence) = slots::settled(&self.memory, &head)? else {
            return Ok((head.version, false));
        };
        // This reads all of the content while nothing waits for it.
        let sum = slots::content_checksum(&self.memory, geometry, head.slot, head.version)?;
        // A writer that is active now makes a newer version.
        let Some(_alone) = self.try_alone() else {
            return Ok((head.version, false));
        };
        if slots::head(&self.memory, geometry)? != head
            || !slots::is_untouched(&self.memory, head.slot, sequence)?
        {
            return Ok((head.version, false));
        }
        let place = at::slot(head.slot) + at::CHECKSUM;
        self.memory
            .store(place, u64::from(sum), Ordering::Release)?;
        if slots::is_untouched(&self.memory, head.slot, sequence)? {
            return Ok((head.version, true));
        }
        // A client began another version in this slot, to which the checksum does not belong.
        self.memory.store(place, 0, Ordering::Release)?;
        Ok((head.version, false))
    }

    /// The state that its header shows.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn state(&self) -> Result<State, Fault> {
        Ok(State::of(self.memory.load_half(at::STATE)?))
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        // A panic cannot leave anything incomplete under this lock, because slots are started
        // again.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_alone(&self) -> Option<MutexGuard<'_, ()>> {
        match self.writing.try_lock() {
            Ok(alone) => Some(alone),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

pub(crate) fn unix_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::geometry::Geometry;

    fn persistent(directory: &tempfile::TempDir, size: u64) -> Custodian {
        let open = std::fs::File::open(directory.path()).unwrap();
        let description = Description {
            block_id: [1; 16],
            pool_id: [2; 16],
            generation: 1,
            geometry: Geometry::new(size, 2).unwrap(),
            is_persistent: true,
            created_unix_ns: 1,
        };
        Custodian::create_persistent(open.as_fd(), "block", &description).unwrap()
    }

    fn checksum(block: &Custodian) -> (u64, u64) {
        let geometry = &block.description.geometry;
        let head = slots::head(&block.memory, geometry).unwrap();
        let kept = block
            .memory
            .load(at::slot(head.slot) + at::CHECKSUM, Ordering::Acquire)
            .unwrap();
        let sum = slots::content_checksum(&block.memory, geometry, head.slot, head.version);
        (kept, u64::from(sum.unwrap()))
    }

    #[test]
    fn a_flush_and_a_write_do_not_wait_for_each_other() {
        let directory = tempfile::tempdir().unwrap();
        let block = Arc::new(persistent(&directory, 100_000));
        block.write(0, b"first", None).unwrap();
        // A write that is in progress during the flush.
        let writing = block.alone();
        let (tell, done) = std::sync::mpsc::channel();
        let flushed = Arc::clone(&block);
        std::thread::spawn(move || tell.send(flushed.sync().unwrap()));
        let version = done.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(version.expect("a flush takes no lock"), 1);
        drop(writing);
        assert_eq!(checksum(&block).0, 0);
        assert_eq!(block.sync().unwrap(), 1);
        let (kept, sum) = checksum(&block);
        assert_eq!(kept, sum);
    }

    #[test]
    fn a_checksum_belongs_to_its_version_or_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        let block = persistent(&directory, 1 << 20);
        let is_done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..20 {
                    block.sync().unwrap();
                }
                is_done.store(true, Ordering::SeqCst);
            });
            while !is_done.load(Ordering::SeqCst) {
                block.write(5, b"again", None).unwrap();
            }
        });
        let (kept, sum) = checksum(&block);
        assert!(kept == 0 || kept == sum, "{kept} for {sum}");
        assert_eq!(block.sync().unwrap(), block.version().unwrap());
        let (kept, sum) = checksum(&block);
        assert_eq!(kept, sum);
    }
}
