//! Recovers blocks: a file after a power loss, and memory that a client still holds after the
//! server died.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;

use rustix::fs::{FileType, OFlags, SealFlags, fcntl_get_seals, fstat};

use crate::create::{OpenError, reopened};
use crate::custodian::Custodian;
use crate::format::{Access, Description, FIXED_BYTES, HEADER_BYTES, HeaderError, at};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots::{self, Head, spares};

/// Completes "its … is invalid".
const NOTHING_HOLDS: &str =
    "content, of which no version's checksum holds after the end of the machine,";

impl Custodian {
    /// Recovers a block of memory from a descriptor that a client still holds, for reading or
    /// writing. The caller must check that it is the expected one ([`Custodian::identity`]).
    ///
    /// # Errors
    /// If it is no sealed memory, no block, or can't be opened for writing.
    pub fn from_fd(offered: &OwnedFd) -> Result<Custodian, OpenError> {
        let stat = fstat(offered).map_err(io::Error::from)?;
        // Only a memfd can be sealed, so everything else is refused here.
        let needed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let seals = fcntl_get_seals(offered).map_err(io::Error::from)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || !seals.contains(needed) {
            return Err(HeaderError::Unexpected("seals").into());
        }
        let file = reopened(offered, OFlags::RDWR)
            .ok_or_else(|| io::Error::other("cannot open it for writing"))?;
        let mut bytes = [0; FIXED_BYTES];
        let got = rustix::io::pread(&file, &mut bytes, 0).map_err(io::Error::from)?;
        let description = Description::decode(&bytes[..got])?;
        if description.is_persistent {
            return Err(HeaderError::Unexpected("kind").into());
        }
        let length = stat.st_size as u64;
        let expected = description.geometry.total();
        if length != expected {
            return Err(OpenError::Length { length, expected });
        }
        let header = Mapped::new(file.as_fd(), HEADER_BYTES, Access::Write)?;
        Ok(Custodian::of(file, Some(header), description))
    }

    /// After a reboot or power loss: makes the newest version with a correct checksum the current
    /// one, which is the last flushed version or a later one. Later writes may have reached the
    /// disk only in part. Returns the version. If this is interrupted, it can be repeated.
    ///
    /// # Errors
    /// If no version is valid although one was flushed; or the file cannot be read.
    pub fn recover(&self) -> Result<u64, Fault> {
        let geometry = &self.description.geometry;
        if geometry.spares == 0 {
            return self.recover_without_spares();
        }
        if geometry.is_raw() {
            return self.recover_copy();
        }
        let mut newest = Head::NONE;
        for slot in 0..geometry.all_slots() {
            let version = self.memory.load(at::slot(slot) + at::VERSION, Relaxed)?;
            if version > newest.version && self.checks_out(slot, version)? {
                newest = Head { version, slot };
            }
        }
        if newest.version == 0 && spares::named(&self.memory, at::FLUSHED)?.version > 0 {
            return Err(Fault::Corrupt(NOTHING_HOLDS));
        }
        // A block that was never flushed is in its initial state, which was on disk before anybody
        // could use it.
        spares::restart_from(&self.memory, geometry, newest)?;
        Ok(newest.version)
    }

    /// For a block that is written in place: the copy that was flushed last replaces the content,
    /// unless they are equal.
    fn recover_copy(&self) -> Result<u64, Fault> {
        let (memory, geometry) = (&self.memory, &self.description.geometry);
        let mut newest: Option<(u64, Head)> = None;
        for slot in geometry.slots..geometry.all_slots() {
            let words = at::slot(slot);
            let version = memory.load(words + at::VERSION, Relaxed)?;
            let turn = memory.load(words + at::SEQUENCE, Relaxed)?;
            if newest.is_none_or(|(before, _)| turn > before) && self.checks_out(slot, version)? {
                newest = Some((turn, Head { version, slot }));
            }
        }
        let Some((_, copy)) = newest else {
            return Err(Fault::Corrupt(NOTHING_HOLDS));
        };
        let (from, to) = (geometry.slot(copy.slot), geometry.slot(0));
        memory.copy_changed(from, to, geometry.size, false, copy.version)?;
        spares::name(memory, at::FLUSHED, copy)?;
        let version = copy.version;
        spares::name(memory, at::HEAD, Head { version, slot: 0 })?;
        Ok(version)
    }

    /// Whether a slot's checksum is correct for its content as `version`. It is not checked whether
    /// its writer was done: a writer that took the slot for another version, but has not written to
    /// it yet, has only changed its sequence.
    fn checks_out(&self, slot: u32, version: u64) -> Result<bool, Fault> {
        let sum = self.memory.load(at::slot(slot) + at::CHECKSUM, Relaxed)?;
        if version >= slots::VERSION_MAX || sum & slots::SUMMED == 0 {
            return Ok(false);
        }
        let geometry = &self.description.geometry;
        let found = slots::content_checksum(&self.memory, geometry, slot, version)?;
        Ok(sum == slots::SUMMED | u64::from(found))
    }

    fn recover_without_spares(&self) -> Result<u64, Fault> {
        let geometry = &self.description.geometry;
        let mut newest: Option<(u64, u32)> = None;
        let mut is_untouched = true;
        for slot in 0..geometry.slots {
            let words = at::slot(slot);
            let word = |place| self.memory.load(words + place, Relaxed);
            let (version, sum) = (word(at::VERSION)?, word(at::CHECKSUM)?);
            is_untouched &= version == 0 && word(at::SEQUENCE)? == 0;
            let is_complete =
                version > 0 && version < slots::VERSION_MAX && word(at::SEQUENCE)? % 2 == 0;
            if is_complete
                && sum != 0
                && newest.is_none_or(|(known, _)| version > known)
                && u64::from(slots::content_checksum(
                    &self.memory,
                    geometry,
                    slot,
                    version,
                )?) == sum & u64::from(u32::MAX)
            {
                newest = Some((version, slot));
            }
        }
        let newest = match newest {
            Some((version, slot)) => Head { version, slot },
            None if is_untouched => Head::NONE,
            None => return Err(Fault::Corrupt(NOTHING_HOLDS)),
        };
        spares::name(&self.memory, at::HEAD, newest)?;
        Ok(newest.version)
    }

    /// After a restart of the server without a reboot: cancels a flush that was in progress.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn forget_flush(&self) -> Result<(), Fault> {
        if self.description.geometry.spares == 0 {
            return Ok(());
        }
        spares::name(&self.memory, at::FLUSHING, Head::NONE)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::Mode;

    use super::*;
    use crate::geometry::Geometry;

    fn description(is_persistent: bool) -> Description {
        Description {
            block_id: [1; 16],
            pool_id: [2; 16],
            generation: 3,
            geometry: Geometry::new(5000, 2).unwrap(),
            is_persistent,
            created_unix_ns: 0,
        }
    }

    fn directory() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::RDONLY, Mode::empty()).unwrap();
        (directory, fd)
    }

    #[test]
    fn memory_that_a_client_holds_is_recovered_with_its_content() {
        let first = Custodian::create_shared("t", &description(false)).unwrap();
        first.write(10, b"kept", None).unwrap();
        first.set_lease(7, true).unwrap();
        let identity = first.identity().unwrap();
        // A reader's descriptor is enough.
        let held = first.lend(Access::Read).unwrap().try_clone().unwrap();
        drop(first);
        let back = Custodian::from_fd(&held).unwrap();
        assert_eq!(back.identity().unwrap(), identity);
        assert_eq!((back.version().unwrap(), back.lease().unwrap()), (1, 7));
        let mut bytes = [0; 4];
        back.read(10, &mut bytes, None).unwrap();
        assert_eq!(&bytes, b"kept");
        assert_eq!(back.write(0, b"more", None).unwrap(), 2);
    }

    #[test]
    fn only_sealed_memory_of_a_block_is_recovered() {
        let (_home, directory) = directory();
        let file =
            Custodian::create_persistent(directory.as_fd(), "f", &description(true)).unwrap();
        let offered = file.file().try_clone().unwrap();
        assert!(Custodian::from_fd(&offered).is_err());
        let bare = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(Custodian::from_fd(&bare).is_err());
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Custodian::from_fd(&a.into()).is_err());
        // Sealed, but no block.
        let odd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&odd, 8192).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&odd, seals).unwrap();
        assert!(Custodian::from_fd(&odd).is_err());
    }

    fn persistent(geometry: Geometry) -> (tempfile::TempDir, Custodian) {
        let (home, directory) = directory();
        let description = Description {
            geometry,
            ..description(true)
        };
        let block = Custodian::create_persistent(directory.as_fd(), "f", &description).unwrap();
        block.sync().unwrap();
        (home, block)
    }

    fn content(block: &Custodian) -> (Vec<u8>, u64) {
        let size = usize::try_from(block.description().geometry.size).unwrap();
        let mut bytes = vec![0; size];
        let version = block.read(0, &mut bytes, None).unwrap();
        (bytes, version)
    }

    /// Spoils what a slot holds, as a loss of power in the middle of a write does.
    fn tear(block: &Custodian, slot: u32) {
        let place = block.description().geometry.slot(slot) + 100;
        rustix::io::pwrite(block.file(), b"torn", place).unwrap();
    }

    #[test]
    fn the_flushed_version_is_there_whatever_was_written_since() {
        for slots in 2..=4 {
            for flushes in 1..4u8 {
                for since in 0..12u8 {
                    let (_home, block) = persistent(Geometry::with_spares(5000, slots).unwrap());
                    let mut flushed = 0;
                    for n in 0..flushes {
                        for _ in 0..=n {
                            block.write(0, &[n; 5000], None).unwrap();
                        }
                        flushed = block.sync().unwrap();
                    }
                    for n in 0..since {
                        block.write(u64::from(n), &[100 + n], None).unwrap();
                    }
                    let kept = spares::named(&block.memory, at::FLUSHED).unwrap();
                    assert_eq!(kept.version, flushed);
                    // None of the others is whole.
                    for slot in (0..slots + 2).filter(|slot| *slot != kept.slot) {
                        tear(&block, slot);
                    }
                    assert_eq!(block.recover().unwrap(), flushed);
                    assert_eq!(block.recover().unwrap(), flushed, "again");
                    assert_eq!(content(&block), (vec![flushes - 1; 5000], flushed));
                    // It is written on as any other, over nothing that was torn.
                    for n in 0..9u8 {
                        block.write(u64::from(n), &[7], None).unwrap();
                        let (bytes, version) = content(&block);
                        assert_eq!(version, flushed + 1 + u64::from(n));
                        assert!(
                            bytes[usize::from(n) + 1..]
                                .iter()
                                .all(|b| *b == flushes - 1)
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_block_that_was_never_flushed_returns_empty() {
        let (_home, block) = persistent(Geometry::with_spares(5000, 2).unwrap());
        block.write(0, b"first", None).unwrap();
        block.write(0, b"other", None).unwrap();
        assert_eq!(block.recover().unwrap(), 0);
        assert_eq!(content(&block), (vec![0; 5000], 0));
        assert_eq!(block.write(1, b"x", None).unwrap(), 1);
        let (bytes, _) = content(&block);
        assert_eq!(bytes[..3], [0, b'x', 0]);
    }

    #[test]
    fn a_flushed_version_that_is_damaged_is_not_taken_for_an_empty_block() {
        let (_home, block) = persistent(Geometry::with_spares(5000, 2).unwrap());
        block.write(0, b"first", None).unwrap();
        block.sync().unwrap();
        (0..4).for_each(|slot| tear(&block, slot));
        assert!(matches!(block.recover(), Err(Fault::Corrupt(_))));
    }

    #[test]
    fn a_version_written_in_place_matches_the_flushed_one() {
        let (_home, block) = persistent(Geometry::with_spares(5000, 1).unwrap());
        for n in 1..5u8 {
            block.write(0, &[n; 5000], None).unwrap();
            assert_eq!(block.sync().unwrap(), u64::from(n));
            block.write(100, b"torn", None).unwrap();
            assert_eq!(block.recover().unwrap(), u64::from(n));
            assert_eq!(content(&block), (vec![n; 5000], u64::from(n)));
        }
        // A flush that did not end leaves the one before.
        let copy = spares::copied(&block.memory, &block.description.geometry).unwrap();
        let other = 3 - copy.unwrap().0;
        block.write(0, &[9; 5000], None).unwrap();
        tear(&block, other);
        assert_eq!(block.recover().unwrap(), 4);
        assert_eq!(content(&block), (vec![4; 5000], 4));
    }

    /// A file of the layout before: what was flushed may be written over.
    #[test]
    fn without_spare_slots_the_newest_version_that_checks_out_is_taken() {
        let (_home, block) = persistent(Geometry::new(5000, 2).unwrap());
        assert_eq!(block.recover().unwrap(), 0);
        block.write(0, b"first", None).unwrap();
        assert_eq!(block.sync().unwrap(), 1);
        block.write(0, b"other", None).unwrap();
        // Never flushed: it may be there in part.
        assert_eq!(block.recover().unwrap(), 1);
        assert_eq!(content(&block).0[..5], *b"first");
        assert_eq!(block.write(0, b"third", None).unwrap(), 2);
        block.sync().unwrap();
        assert_eq!(block.recover().unwrap(), 2);
        (0..2).for_each(|slot| tear(&block, slot));
        assert!(matches!(block.recover(), Err(Fault::Corrupt(_))));
    }
}
