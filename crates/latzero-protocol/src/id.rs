//! Ids that the server assigns.

use std::fmt;

/// One live connection of an app, as the wire shows it: sixteen hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub u64);

impl InstanceId {
    /// Reads what [`fmt::Display`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        hex.then(|| u64::from_str_radix(text, 16).ok().map(InstanceId))
            .flatten()
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl serde::Serialize for InstanceId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A call as its handler names it: the pool that holds the call, and its place and generation
/// there, so that an answer finds its call without a search and an answer to an ended call finds
/// nothing. The epoch keeps ids apart that different runs of a server give out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId {
    /// A random number of at most 48 bits, drawn when the pool was made in this run of the server.
    pub epoch: u64,
    /// The pool's number.
    pub pool: u32,
    /// The call's place in the pool's table.
    pub slot: u32,
    /// How often that place was used before.
    pub generation: u32,
}

impl CallId {
    /// Reads what [`CallId::append`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.as_bytes().split(|&b| b == b'.');
        let mut part = |digits| hex(parts.next()?, digits);
        let epoch = part(EPOCH_DIGITS)?;
        let mut short = || u32::try_from(part(8)?).ok();
        let id = CallId {
            epoch,
            pool: short()?,
            slot: short()?,
            generation: short()?,
        };
        parts.next().is_none().then_some(id)
    }

    /// Appends the wire form: four hex numbers with dots between, 39 bytes at most.
    pub fn append(&self, out: &mut Vec<u8>) {
        append_hex(out, self.epoch);
        for number in [self.pool, self.slot, self.generation] {
            out.push(b'.');
            append_hex(out, number.into());
        }
    }
}

/// Most hex digits of an epoch.
const EPOCH_DIGITS: usize = 12;

fn hex(digits: &[u8], most: usize) -> Option<u64> {
    // Only the shortest spelling counts, so an id has one text.
    if digits.is_empty() || digits.len() > most || (digits.len() > 1 && digits[0] == b'0') {
        return None;
    }
    digits.iter().try_fold(0_u64, |n, &b| {
        let digit = match b {
            b'0'..=b'9' => b - b'0',
            b'a'..=b'f' => b - b'a' + 10,
            _ => return None,
        };
        Some((n << 4) | u64::from(digit))
    })
}

fn append_hex(out: &mut Vec<u8>, n: u64) {
    let digits = (64 - n.leading_zeros()).div_ceil(4).max(1);
    for i in (0..digits).rev() {
        out.push(b"0123456789abcdef"[(n >> (4 * i) & 0xf) as usize]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back() {
        for (epoch, pool, slot, generation) in [
            (0, 0, 0, 0),
            (0xabc, 1, 16, 255),
            ((1 << 48) - 1, u32::MAX, 0x1000, 0xabcdef),
        ] {
            let id = CallId {
                epoch,
                pool,
                slot,
                generation,
            };
            let mut text = Vec::new();
            id.append(&mut text);
            assert_eq!(
                String::from_utf8(text.clone()).unwrap(),
                format!("{epoch:x}.{pool:x}.{slot:x}.{generation:x}")
            );
            assert_eq!(CallId::parse(std::str::from_utf8(&text).unwrap()), Some(id));
        }
        for bad in [
            "",
            "1.2.3",
            "1.2.3.4.5",
            "01.2.3.4",
            "1.2.3.g",
            "1.2.3.",
            "1.123456789.1.1",
            "1234567890abc.1.1.1",
            "A.1.1.1",
        ] {
            assert_eq!(CallId::parse(bad), None, "{bad}");
        }
        let instance = InstanceId(0xabc);
        assert_eq!(InstanceId::parse(&instance.to_string()), Some(instance));
        assert_eq!(InstanceId::parse("ABC"), None);
    }
}
