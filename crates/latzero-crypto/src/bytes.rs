//! The encoding that all structures share: big-endian numbers, length prefixes, labels.

use zeroize::Zeroize as _;

/// A buffer for writing. It is wiped when dropped, because some contents are secret.
pub(crate) struct Bytes(Vec<u8>);

impl Bytes {
    /// Starts empty, with enough capacity for most uses, so that growing leaves no copy of a secret
    /// behind.
    pub(crate) fn new() -> Self {
        Bytes(Vec::with_capacity(512))
    }

    /// Starts with a label for the purpose of the bytes. Each use has its own label.
    pub(crate) fn label(purpose: &str) -> Self {
        Bytes::new()
            .raw(b"latzero/v1/")
            .raw(purpose.as_bytes())
            .u8(0)
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, number: u8) -> Self {
        self.raw(&[number])
    }

    pub(crate) fn u16(self, number: u16) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub(crate) fn u32(self, number: u32) -> Self {
        self.raw(&number.to_be_bytes())
    }

    pub(crate) fn u64(self, number: u64) -> Self {
        self.raw(&number.to_be_bytes())
    }

    /// The length as four bytes, then the bytes.
    pub(crate) fn prefixed(self, bytes: &[u8]) -> Self {
        let length = u32::try_from(bytes.len()).expect("no part of a message has 4 GiB");
        self.u32(length).raw(bytes)
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // What is behind them was never written.
        self.0.as_mut_slice().zeroize();
    }
}

/// A reader of bytes. It allocates nothing: lengths are checked against the available bytes.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Cursor(bytes)
    }

    pub(crate) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// Bytes with a length prefix of four bytes, at most `max` of them.
    pub(crate) fn prefixed(&mut self, max: usize) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        if length > max {
            return None;
        }
        self.take(length)
    }

    /// The number of remaining bytes.
    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }
}
