//! What the server side works on: the words of a sealed memfd's header through a mapping, everything else through the file.

use std::sync::atomic::Ordering;

use crate::file::FileMemory;
use crate::format::FIXED_BYTES;
use crate::mapped::Mapped;
use crate::memory::{Fault, Memory};

/// Words through the mapped header where there is one, everything else through the file.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) file: FileMemory,
    pub(crate) header: Option<Mapped>,
}

impl Kept {
    /// The header's first bytes, which never change.
    pub(crate) fn fixed(&self) -> Result<[u8; FIXED_BYTES], Fault> {
        let mut bytes = [0; FIXED_BYTES];
        match &self.header {
            Some(header) => header.read(0, &mut bytes)?,
            None => self.file.read(0, &mut bytes)?,
        }
        Ok(bytes)
    }

    pub(crate) fn load_half(&self, at: u64) -> Result<u32, Fault> {
        match &self.header {
            Some(header) => header.load_half(at),
            None => self.file.load_half(at),
        }
    }

    pub(crate) fn store_half(&self, at: u64, value: u32) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.store_half(at, value),
            None => self.file.store_half(at, value),
        }
    }
}

impl Memory for Kept {
    fn load(&self, at: u64, order: Ordering) -> Result<u64, Fault> {
        match &self.header {
            Some(header) => header.load(at, order),
            None => self.file.load(at, order),
        }
    }

    fn store(&self, at: u64, word: u64, order: Ordering) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.store(at, word, order),
            None => self.file.store(at, word, order),
        }
    }

    fn fence(&self, order: Ordering) {
        self.file.fence(order);
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Fault> {
        self.file.read(at, to)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        self.file.write(at, from)
    }

    fn notify(&self, at: u64) -> Result<(), Fault> {
        match &self.header {
            Some(header) => header.notify(at),
            None => self.file.notify(at),
        }
    }
}
