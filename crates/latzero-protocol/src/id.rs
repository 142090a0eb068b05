//! Ids that the server assigns.

use std::fmt;

/// One live connection of an app; on the wire it is sixteen hex digits.
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

    /// Appends what [`fmt::Display`] writes.
    pub(crate) fn append(self, out: &mut Vec<u8>) {
        let mut text = Text::default();
        let [high, low] = halves(self.0);
        text.push(high, 8);
        text.push(low, 8);
        out.extend_from_slice(&text.bytes[..text.length]);
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

/// The id by which a handler names a call: the pool that holds the call, and its index and
/// generation there. So an answer finds its call without a search, and an answer to an ended call
/// finds nothing. The epoch makes the ids of different runs of a server differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId {
    /// A random number of at most 48 bits, chosen when this run of the server created the pool.
    pub epoch: u64,
    /// The pool's number.
    pub pool: u32,
    /// The call's index in the pool's table.
    pub slot: u32,
    /// How many times that index was used before.
    pub generation: u32,
}

impl CallId {
    /// Reads what [`CallId::append`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = text.as_bytes();
        let id = CallId {
            epoch: take_hex(&mut rest, EPOCH_DIGITS, Some(b'.'))?,
            pool: take_short(&mut rest, Some(b'.'))?,
            slot: take_short(&mut rest, Some(b'.'))?,
            generation: take_short(&mut rest, None)?,
        };
        Some(id)
    }

    /// Appends the wire form: four hex numbers with dots between, 39 bytes at most.
    pub fn append(&self, out: &mut Vec<u8>) {
        let mut text = Text::default();
        let [high, low] = halves(self.epoch);
        if high > 0 {
            text.push(high, 1);
        }
        text.push(low, if high > 0 { 8 } else { 1 });
        for number in [self.pool, self.slot, self.generation] {
            text.push_dot();
            text.push(number, 1);
        }
        out.extend_from_slice(&text.bytes[..text.length]);
    }
}

/// Most hex digits of an epoch.
const EPOCH_DIGITS: usize = 12;

fn halves(number: u64) -> [u32; 2] {
    [number >> 32, number & u64::from(u32::MAX)].map(|half| u32::try_from(half).expect("32 bits"))
}

/// The text of an id while it is written. Eight bytes are written at a time, of which fewer may be
/// part of the text.
struct Text {
    bytes: [u8; 56],
    length: usize,
}

impl Default for Text {
    fn default() -> Self {
        Text {
            bytes: [0; 56],
            length: 0,
        }
    }
}

impl Text {
    /// Appends a number as hex digits without leading zeros, but at least `least` digits.
    fn push(&mut self, number: u32, least: u32) {
        let digits = (32 - number.leading_zeros()).div_ceil(4).max(least);
        // One digit in each byte, the first one in the highest.
        let mut spread = u64::from(number);
        spread = (spread | spread << 16) & 0x0000_ffff_0000_ffff;
        spread = (spread | spread << 8) & 0x00ff_00ff_00ff_00ff;
        spread = (spread | spread << 4) & 0x0f0f_0f0f_0f0f_0f0f;
        let is_letter = ((spread + 0x0606_0606_0606_0606) >> 4) & 0x0101_0101_0101_0101;
        let text = spread + 0x3030_3030_3030_3030 + is_letter * u64::from(b'a' - b'0' - 10);
        let text = text << (8 * (8 - digits));
        self.bytes[self.length..self.length + 8].copy_from_slice(&text.to_be_bytes());
        self.length += digits as usize;
    }

    fn push_dot(&mut self) {
        self.bytes[self.length] = b'.';
        self.length += 1;
    }
}

fn take_short(rest: &mut &[u8], end: Option<u8>) -> Option<u32> {
    take_hex(rest, 8, end).and_then(|number| u32::try_from(number).ok())
}

/// The value of each byte as a hex digit; 16 for other bytes.
const DIGITS: [u8; 256] = {
    let mut digits = [16; 256];
    let mut value = 0;
    while value < 16 {
        digits[b"0123456789abcdef"[value as usize] as usize] = value;
        value += 1;
    }
    digits
};

/// Takes a number of at most `most` hex digits, and the byte `end` after it.
fn take_hex(rest: &mut &[u8], most: usize, end: Option<u8>) -> Option<u64> {
    let (mut number, mut length) = (0, 0);
    for &byte in rest.iter() {
        let digit = DIGITS[usize::from(byte)];
        if digit == 16 {
            break;
        }
        number = (number << 4) | u64::from(digit);
        length += 1;
    }
    // Only the shortest spelling is accepted, so an id has exactly one text.
    let is_short = (1..=most).contains(&length) && (length == 1 || rest[0] != b'0');
    if !is_short || rest.get(length).copied() != end {
        return None;
    }
    *rest = rest.get(length + 1..).unwrap_or_default();
    Some(number)
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
        for number in [0, 0xabc, 0xfedc_ba98_7654_3210, u64::MAX] {
            let instance = InstanceId(number);
            assert_eq!(InstanceId::parse(&instance.to_string()), Some(instance));
            let mut text = Vec::new();
            instance.append(&mut text);
            assert_eq!(String::from_utf8(text).unwrap(), instance.to_string());
        }
        assert_eq!(InstanceId::parse("ABC"), None);
    }
}
