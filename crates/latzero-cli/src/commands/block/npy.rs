//! The `.npy` file format of numpy (`numpy.lib.format`, versions 1.0 and 2.0): a header that
//! describes the bytes, and the bytes.

use std::io::{self, Read};

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// The header ends at a multiple of this many bytes.
const ALIGNMENT: usize = 64;

/// Longest header that is read, in bytes.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// What an array is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Array {
    /// The type of its numbers.
    pub(crate) dtype: String,
    /// The length of each dimension.
    pub(crate) shape: Vec<u64>,
}

impl Array {
    /// A file's first bytes.
    pub(crate) fn header(&self) -> Vec<u8> {
        let shape: Vec<String> = self.shape.iter().map(u64::to_string).collect();
        // A tuple of one has a comma behind it.
        let shape = match &shape[..] {
            [one] => format!("({one},)"),
            many => format!("({})", many.join(", ")),
        };
        let mut text = format!(
            "{{'descr': '{}', 'fortran_order': False, 'shape': {shape}, }}",
            self.dtype
        );
        let unpadded = MAGIC.len() + 4 + text.len() + 1;
        text.extend(std::iter::repeat_n(
            ' ',
            unpadded.next_multiple_of(ALIGNMENT) - unpadded,
        ));
        text.push('\n');
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&[1, 0]);
        let length = u16::try_from(text.len()).expect("a block's layout is short");
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(text.as_bytes());
        out
    }

    /// Reads a file's first bytes.
    pub(crate) fn read(file: &mut impl Read) -> Result<Array, String> {
        let broken = |error: io::Error| format!("its header is truncated: {error}");
        let mut start = [0; 8];
        file.read_exact(&mut start).map_err(broken)?;
        if &start[..6] != MAGIC {
            return Err("it is not a .npy file".into());
        }
        let length = match start[6] {
            1 => {
                let mut bytes = [0; 2];
                file.read_exact(&mut bytes).map_err(broken)?;
                usize::from(u16::from_le_bytes(bytes))
            }
            2 | 3 => {
                let mut bytes = [0; 4];
                file.read_exact(&mut bytes).map_err(broken)?;
                u32::from_le_bytes(bytes) as usize
            }
            other => return Err(format!("version {other} of the format is not supported")),
        };
        if length > HEADER_BYTES_MAX {
            return Err("its header is too long".into());
        }
        let mut text = vec![0; length];
        file.read_exact(&mut text).map_err(broken)?;
        Array::parse(&String::from_utf8_lossy(&text))
    }

    /// Reads the header's dictionary, which numpy writes as a literal of Python.
    fn parse(text: &str) -> Result<Array, String> {
        let value = |name: &str| {
            let (_, rest) = text.split_once(&format!("'{name}':"))?;
            Some(rest.trim_start())
        };
        let missing = |name: &str| format!("its header has no '{name}'");
        let descr = value("descr").ok_or_else(|| missing("descr"))?;
        let dtype = descr
            .strip_prefix('\'')
            .and_then(|rest| rest.split_once('\''))
            .map(|(dtype, _)| dtype.to_owned())
            .ok_or("it contains records, which blocks do not support")?;
        let order = value("fortran_order").ok_or_else(|| missing("fortran_order"))?;
        if order.starts_with("True") {
            return Err("it is in column-major order; save numpy.ascontiguousarray(array)".into());
        }
        let shape = value("shape").ok_or_else(|| missing("shape"))?;
        let shape = shape
            .strip_prefix('(')
            .and_then(|rest| rest.split_once(')'))
            .ok_or_else(|| missing("shape"))?
            .0;
        let lengths = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
        let lengths: Result<Vec<u64>, _> = lengths.map(str::parse).collect();
        Ok(Array {
            dtype,
            shape: lengths.map_err(|_| missing("shape"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        for shape in [vec![], vec![7], vec![1080, 1920], vec![0, 3]] {
            let array = Array {
                dtype: "<f4".into(),
                shape,
            };
            let header = array.header();
            assert_eq!(header.len() % ALIGNMENT, 0);
            assert_eq!(Array::read(&mut &header[..]), Ok(array));
        }
    }

    #[test]
    fn invalid_arrays_are_refused() {
        let check = |bytes: &[u8], expected: &str| {
            let error = Array::read(&mut &*bytes).unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        check(b"", "header is truncated");
        check(b"PK\x03\x04aaaa", "not a .npy file");
        check(b"\x93NUMPY\x09\x00", "version 9");
        check(b"\x93NUMPY\x01\x00\xff\x00{", "is truncated");
        let header = |text: &str| {
            let mut out = b"\x93NUMPY\x01\x00".to_vec();
            out.extend_from_slice(&(text.len() as u16).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
            out
        };
        check(
            &header("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (3,), }"),
            "records",
        );
        check(
            &header("{'descr': '<f4', 'fortran_order': True, 'shape': (3,), }"),
            "ascontiguousarray",
        );
        check(
            &header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }"),
            "shape",
        );
    }
}
