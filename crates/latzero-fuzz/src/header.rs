//! A block's header written by a client that may write all of it.

use std::cell::RefCell;
use std::sync::atomic::Ordering;

use latzero_shm::slots::{self, Wait};
use latzero_shm::{Description, Fault, Geometry, Memory};

/// A block in the memory of this process.
struct Bytes(RefCell<Vec<u8>>);

impl Bytes {
    fn range(&self, at: u64, length: usize) -> Result<std::ops::Range<usize>, Fault> {
        let at = usize::try_from(at).map_err(|_| Fault::Short)?;
        match at.checked_add(length) {
            Some(end) if end <= self.0.borrow().len() => Ok(at..end),
            _ => Err(Fault::Short),
        }
    }
}

impl Memory for Bytes {
    fn load(&self, at: u64, _order: Ordering) -> Result<u64, Fault> {
        let mut word = [0; 8];
        self.read(at, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn store(&self, at: u64, word: u64, _order: Ordering) -> Result<(), Fault> {
        self.write(at, &word.to_le_bytes())
    }

    fn fence(&self, _order: Ordering) {}

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        let range = self.range(at, to.len())?;
        to.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let range = self.range(at, from.len())?;
        self.0.borrow_mut()[range].copy_from_slice(from);
        Ok(())
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        let range = self.range(at, 4)?;
        let mut bytes = self.0.borrow_mut();
        bytes[range.start] = bytes[range.start].wrapping_add(1);
        Ok(())
    }
}

/// Bytes as a header: whatever can be parsed is written back unchanged, and with any values in the
/// words of writers, a read and a write end and stay within the block. The first byte chooses the
/// block's size and slots.
///
/// # Panics
/// If that is not true.
pub fn header(data: &[u8]) {
    if let Ok(description) = Description::decode(data) {
        assert_eq!(description.encode()[..104], data[..104]);
        assert_eq!(Description::decode(&description.encode()), Ok(description));
    }
    let Some((choice, words)) = data.split_first() else {
        return;
    };
    let size = 1 + u64::from(choice >> 2);
    let geometry = Geometry::new(size, 1 + u32::from(choice & 3)).expect("a small block");
    let total = usize::try_from(geometry.total()).expect("a small block");
    let mut bytes = vec![0; total];
    let length = words.len().min(total - 128);
    bytes[128..128 + length].copy_from_slice(&words[..length]);
    let memory = Bytes(RefCell::new(bytes));
    let mut content = vec![0; usize::try_from(size).expect("a small block")];
    let before = slots::read(&memory, &geometry, 0, &mut content, Wait::Hurry);
    let Ok(mut draft) = slots::begin(&memory, &geometry) else {
        return;
    };
    draft
        .write(&memory, size - 1, &[7])
        .expect("its last byte is within it");
    let Ok(version) = draft.publish(&memory, slots::Stamp::default()) else {
        return;
    };
    // A writer repairs what it needs: its published version can be read.
    let mut after = content.clone();
    assert_eq!(
        slots::read(&memory, &geometry, 0, &mut after, Wait::Hurry).ok(),
        Some(version)
    );
    assert_eq!(after.last(), Some(&7));
    if before.is_ok() {
        let kept = content.len() - 1;
        assert_eq!(after[..kept], content[..kept], "unwritten data stays");
    }
}
