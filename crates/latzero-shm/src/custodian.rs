//! A block as the server has it: it makes and keeps the memory or file, and reads and writes it for
//! those who can't map it.
//!
//! The server is not to die of what somebody does to a file. So files are only touched by pread and
//! pwrite; what is mapped is memory that is sealed against shrinking: its header permanently, and
//! its payload for the time of one large copy.

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

/// How often a copy of a version is retried because it was overwritten without the lock.
const TRIES: u32 = 16;

/// How often the newest version of a block without spare slots is summed up for a flush, if it does
/// not stay the newest for that long. Then the block goes to the disk without a checksum, as it
/// does between two flushes.
const SUM_TRIES: u32 = 3;

/// How often a flush reserves the newest version of a block, where a writer has begun to write over
/// it. Two newer versions are there then, each time.
const RESERVE_TRIES: u32 = 1_000;

/// What became of a compare-and-swap.
#[derive(Debug, PartialEq, Eq)]
pub enum Cas {
    /// The bytes were as expected, and are new now.
    Swapped {
        /// The new version.
        version: u64,
    },
    /// The bytes are others; nothing was written.
    Differs {
        /// What stands there.
        current: Vec<u8>,
        /// In this version.
        version: u64,
    },
}

/// A version that stays as it is for as long as this is there.
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

/// One generation of a block, as the server keeps it.
#[derive(Debug)]
pub struct Custodian {
    pub(crate) description: Description,
    /// Descriptors that are on their way to clients: for reading, and for writing.
    pub(crate) lent: Mutex<[Weak<OwnedFd>; 2]>,
    pub(crate) memory: BlockMemory,
    /// One writer at a time on this side; for clients, the block's lock ensures it.
    pub(crate) writing: Mutex<()>,
    /// One flush at a time.
    pub(crate) flushing: Mutex<Flushes>,
}

/// What became of the flush before.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    /// The disk took less than it was given. The kernel does not tell of that again, so everything
    /// is written once more.
    has_failed: bool,
}

impl Custodian {
    /// The server's own descriptor, the only one that stays open.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        self.memory.file.descriptor()
    }

    /// A descriptor to pass to a client. One for reading can't be used to write; there is none
    /// where the system has no `/proc`, or no descriptor left.
    ///
    /// Clients that are passed a descriptor share its open file, flags and all (fcntl(2)): with
    /// O_APPEND, set by one of them, every pwrite(2) of the server would go to the file's end. So
    /// they get one of their own.
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

    /// Device and inode of the file, by which it is known again.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let stat = fstat(self.file())?;
        Ok((stat.st_dev, stat.st_ino))
    }

    /// What never changes of it.
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
        if !self.description.geometry.contains(offset, bytes.len()) {
            return Err(WriteError::OutOfRange);
        }
        self.check_fixed()?;
        let _alone = self.alone();
        let current = self.version()?;
        if if_version.is_some_and(|wanted| wanted != current) {
            return Err(WriteError::Conflict { current });
        }
        self.publish(offset, bytes)
    }

    /// Writes bytes as a new version if the current bytes are `expected`.
    ///
    /// # Errors
    /// As [`WriteError`] says.
    pub fn cas(&self, offset: u64, expected: &[u8], bytes: &[u8]) -> Result<Cas, WriteError> {
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
            return Ok(Cas::Differs { current, version });
        }
        Ok(Cas::Swapped {
            version: self.publish(offset, bytes)?,
        })
    }

    fn publish(&self, offset: u64, bytes: &[u8]) -> Result<u64, WriteError> {
        let mut draft = slots::begin(&self.memory, &self.description.geometry)?;
        draft.write(&self.memory, offset, bytes)?;
        Ok(draft.publish(&self.memory, self.stamp()?)?)
    }

    fn stamp(&self) -> Result<Stamp, Fault> {
        Ok(Stamp {
            fence: self.memory.load(at::FENCE, Ordering::Relaxed)?,
            unix_ns: unix_ns(),
        })
    }

    /// Shows writers the fence of the exclusive lock; and who takes the block in after the server's
    /// end, whether somebody held it and may be in the middle of a version.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_lease(&self, fence: u64, is_held: bool) -> Result<(), Fault> {
        // Held for a moment too long rather than too short, wherever the server ends.
        if is_held {
            self.memory.store(at::HELD, 1, Ordering::Release)?;
        }
        self.memory.store(at::FENCE, fence, Ordering::Release)?;
        if !is_held {
            self.memory.store(at::HELD, 0, Ordering::Release)?;
        }
        Ok(())
    }

    /// Whether the exclusive lock is held, as far as the block itself says.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn is_lease_held(&self) -> Result<bool, Fault> {
        Ok(self.memory.load(at::HELD, Ordering::Acquire)? != 0)
    }

    /// The fence that writers are shown.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn lease(&self) -> Result<u64, Fault> {
        self.memory.load(at::FENCE, Ordering::Acquire)
    }

    /// Shows everybody what became of the block, and wakes who waits for it.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_state(&self, state: State) -> Result<(), Fault> {
        self.memory.store_half(at::STATE, state as u32)?;
        self.memory.notify(at::NOTIFY)
    }

    /// Copies the newest version into a fresh block, under the same number; bytes that the other
    /// does not have room for are left out, and what it has more is zeros. Returns the version.
    ///
    /// Show writers that they lost the lock, or that the block is superseded, before this: one who
    /// writes on is not waited for.
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

    /// Fills a fresh block with what `bytes` yields, as the version that it was: for a block that
    /// comes out of a backup.
    ///
    /// # Errors
    /// If `bytes` fails or yields fewer bytes than the block has, or the block can't be written.
    pub fn fill(&self, bytes: &mut dyn std::io::Read, version: u64) -> std::io::Result<()> {
        let _alone = self.alone();
        let geometry = &self.description.geometry;
        let failed = |error: Fault| std::io::Error::other(error.to_string());
        // A block of slots has nothing before its first version; a raw one is written in place.
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

    /// Writes the newest version to the disk, with its checksum, and keeps it there until a newer
    /// one is; returns the version. Writers do not wait for it.
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

    /// Flushes the block, and holds on to that version: it can be read in parts, however long that
    /// takes, beside writers. Other flushes wait until it is let go. `None` of a block without
    /// spare slots.
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

    /// Of a block whose slots are all written over in turn: nothing keeps what is on the disk.
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

    /// Reserves the newest version, sums it up, and notes that it is on the disk once it is.
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
    /// needed, and notes that this is on the disk once it is. Who wants all of one version flushes
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

    /// Notes which run of the machine the block is used in, as a number that is not 0: what it says
    /// under another one may be part of what was written.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn set_boot(&self, boot: u64) -> Result<(), Fault> {
        self.memory.store(at::BOOT, boot, Ordering::Release)
    }

    /// The run of the machine that [`Custodian::set_boot`] noted; 0 is none.
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
        // A pass over all of the content that nothing waits for.
        let sum = slots::content_checksum(&self.memory, geometry, head.slot, head.version)?;
        // Who writes just now makes a newer version.
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
        // Who has it mapped began another version there, which this is not the checksum of.
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
        // Nothing is kept under this lock that a panic could have left half done: slots are begun
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
    fn a_checksum_is_that_of_its_version_or_none() {
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
