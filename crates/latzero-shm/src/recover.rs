//! Blocks that are found again: a file after a power loss, and memory that a client still holds after the server died.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, OFlags, SealFlags, fcntl_get_seals, fstat};

use crate::create::{OpenError, reopened};
use crate::custodian::Custodian;
use crate::format::{Access, Description, FIXED_BYTES, HEADER_BYTES, HeaderError, at};
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};
use crate::slots;

impl Custodian {
    /// Takes a block of memory back from whoever still holds a descriptor of it, for reading or writing. The caller has yet to
    /// check that it is the one it made ([`Custodian::identity`]).
    ///
    /// # Errors
    /// Where it is no sealed memory, no block, or can't be opened for writing.
    pub fn take_back(offered: &OwnedFd) -> Result<Custodian, OpenError> {
        let stat = fstat(offered).map_err(io::Error::from)?;
        // Only memory can be sealed: what is no memfd is refused here, whatever it is.
        let needed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        let seals = fcntl_get_seals(offered).map_err(io::Error::from)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || !seals.contains(needed) {
            return Err(HeaderError::Unexpected("seals").into());
        }
        let file = reopened(offered, OFlags::RDWR)
            .ok_or_else(|| io::Error::other("it can't be opened for writing"))?;
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

    /// After a power loss: has the newest version whose checksum holds be the newest one. What was written after the last flush
    /// may have reached the disk in part. Returns the version.
    ///
    /// # Errors
    /// Where no version checks out, though something was written; or the file can't be read.
    pub fn recover(&self) -> Result<u64, Fault> {
        let geometry = &self.description.geometry;
        let mut newest: Option<(u64, u32)> = None;
        let mut is_untouched = true;
        for slot in 0..geometry.slots {
            let words = at::slot(slot);
            let word = |place| self.memory.load(words + place, Ordering::Relaxed);
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
                )?) == sum
            {
                newest = Some((version, slot));
            }
        }
        let Some((version, slot)) = newest else {
            return if is_untouched {
                self.memory.store(at::HEAD, 0, Ordering::Release)?;
                Ok(0)
            } else {
                Err(Fault::Corrupt(
                    "content: no version's checksum holds after a power loss;",
                ))
            };
        };
        let head = version << 8 | u64::from(slot);
        self.memory.store(at::HEAD, head, Ordering::Release)?;
        Ok(version)
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
    fn memory_that_somebody_holds_is_taken_back_with_all_that_is_in_it() {
        let first = Custodian::create_shared("t", &description(false)).unwrap();
        first.write(10, b"kept", None).unwrap();
        first.set_lease(7, true).unwrap();
        let identity = first.identity().unwrap();
        // A reader's descriptor is enough.
        let held = first.read_only().unwrap().try_clone().unwrap();
        drop(first);
        let back = Custodian::take_back(&held).unwrap();
        assert_eq!(back.identity().unwrap(), identity);
        assert_eq!((back.version().unwrap(), back.lease().unwrap()), (1, 7));
        let mut bytes = [0; 4];
        back.read(10, &mut bytes, None).unwrap();
        assert_eq!(&bytes, b"kept");
        assert_eq!(back.write(0, b"more", None).unwrap(), 2);
    }

    #[test]
    fn what_is_no_sealed_memory_is_not_taken() {
        let (_home, directory) = directory();
        let file =
            Custodian::create_persistent(directory.as_fd(), "f", &description(true)).unwrap();
        let offered = file.writable().try_clone().unwrap();
        assert!(Custodian::take_back(&offered).is_err());
        let bare = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        assert!(Custodian::take_back(&bare).is_err());
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Custodian::take_back(&a.into()).is_err());
        // Sealed, but no block.
        let odd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&odd, 8192).unwrap();
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&odd, seals).unwrap();
        assert!(Custodian::take_back(&odd).is_err());
    }

    #[test]
    fn after_a_power_loss_the_newest_version_that_checks_out_is_taken() {
        let (_home, directory) = directory();
        let block =
            Custodian::create_persistent(directory.as_fd(), "f", &description(true)).unwrap();
        assert_eq!(block.recover().unwrap(), 0);
        block.write(0, b"first", None).unwrap();
        assert_eq!(block.sync().unwrap(), 1);
        block.write(0, b"other", None).unwrap();
        // Never flushed: it may be there in part.
        assert_eq!(block.recover().unwrap(), 1);
        let mut bytes = [0; 5];
        block.read(0, &mut bytes, None).unwrap();
        assert_eq!(&bytes, b"first");
        assert_eq!(block.write(0, b"third", None).unwrap(), 2);
        block.sync().unwrap();
        assert_eq!(block.recover().unwrap(), 2);
        // Torn by the loss: its checksum does not hold, the one before it does no longer exist.
        rustix::io::pwrite(
            block.writable(),
            b"x",
            block.description().geometry.slot(1) + 100,
        )
        .unwrap();
        rustix::io::pwrite(
            block.writable(),
            b"x",
            block.description().geometry.slot(0) + 100,
        )
        .unwrap();
        assert!(matches!(block.recover(), Err(Fault::Corrupt(_))));
    }
}
