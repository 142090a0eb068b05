//! The `.npy` file format of numpy (`numpy.lib.format`, versions 1.0 to 3.0): a header that
//! describes the bytes, and the bytes.

use std::fmt::Write as _;
use std::io::{self, Read};

use latzero::blocking::BlockName;

const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// The header ends at a multiple of this many bytes.
const ALIGNMENT: usize = 64;

/// Longest header that is read, in bytes.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// bfloat16 as blocks call it, and as files do: numpy has no name for it, and writes it like this
/// with the package `ml_dtypes`. Two bytes without a meaning are `|V2`.
const BF16: (&str, &str) = ("bf16", "<V2");

/// What an array is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Array {
    /// The type of its numbers.
    pub(crate) dtype: String,
    /// The length of each dimension.
    pub(crate) shape: Vec<u64>,
    /// Names for the places of the last dimension. In a file they are the fields of a record.
    pub(crate) fields: Vec<String>,
}

/// A type in numpy's notation with its order, which may be left out: `f4` is `<f4`.
pub(crate) fn with_order(dtype: &str) -> String {
    let kind = dtype.chars().next().filter(char::is_ascii_alphabetic);
    let bytes = kind.and_then(|_| dtype[1..].parse::<u64>().ok());
    match (kind, bytes) {
        (_, None) => dtype.to_owned(),
        (Some('S' | 'V'), _) | (_, Some(1)) => format!("|{dtype}"),
        _ => format!("<{dtype}"),
    }
}

impl Array {
    /// A file's first bytes.
    pub(crate) fn header(&self) -> Vec<u8> {
        let dtype = match self.dtype.as_str() {
            dtype if dtype == BF16.0 => BF16.1,
            dtype => dtype,
        };
        let dtype = literal(dtype);
        let (descr, shape) = match (&self.fields[..], &self.shape[..]) {
            ([], shape) => (dtype, shape),
            (fields, shape) => {
                let field = |name: &String| format!("({}, {dtype})", literal(name));
                let fields: Vec<String> = fields.iter().map(field).collect();
                let outer = shape.split_last().map_or(shape, |(_, outer)| outer);
                (format!("[{}]", fields.join(", ")), outer)
            }
        };
        let shape: Vec<String> = shape.iter().map(u64::to_string).collect();
        // A tuple of one has a comma behind it.
        let shape = match &shape[..] {
            [one] => format!("({one},)"),
            many => format!("({})", many.join(", ")),
        };
        let mut text = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}");
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

    /// The name of a block that has this layout.
    pub(crate) fn layout_of(&self, name: BlockName) -> BlockName {
        name.layout(&self.dtype, &self.shape).fields(&self.fields)
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
        match start[6] {
            3 => Array::parse(&String::from_utf8_lossy(&text)),
            // Latin-1, whose bytes are the numbers of its characters.
            _ => Array::parse(&text.into_iter().map(char::from).collect::<String>()),
        }
    }

    /// Reads the header's dictionary, which numpy writes as a literal of Python.
    fn parse(text: &str) -> Result<Array, String> {
        let value = |name: &str| {
            let (_, rest) = text.split_once(&format!("'{name}':"))?;
            Some(rest.trim_start())
        };
        let missing = |name: &str| format!("its header has no '{name}'");
        let descr = value("descr").ok_or_else(|| missing("descr"))?;
        let (mut dtype, fields) = match unquote(descr) {
            Some((dtype, _)) => (dtype, Vec::new()),
            None => record(descr).ok_or(
                "its elements are records; a block takes those whose fields all have the same \
                 simple type",
            )?,
        };
        if dtype == BF16.1 {
            BF16.0.clone_into(&mut dtype);
        }
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
        let mut shape = lengths.map_err(|_| missing("shape"))?;
        if !fields.is_empty() {
            shape.push(fields.len() as u64);
        }
        Ok(Array {
            dtype,
            shape,
            fields,
        })
    }
}

/// What follows a character and the white space before it.
fn after(text: &str, c: char) -> Option<&str> {
    text.trim_start().strip_prefix(c)
}

/// The type and the names of the fields of a record: `[('x', '<f4'), ('y', '<f4')]`. `None` if they
/// differ in their types, or if one is more than a name and a type.
fn record(descr: &str) -> Option<(String, Vec<String>)> {
    let mut rest = after(descr, '[')?;
    let (mut types, mut names) = (Vec::new(), Vec::new());
    while let Some(field) = after(rest, '(') {
        let (name, behind) = unquote(field)?;
        let (dtype, behind) = unquote(after(behind, ',')?)?;
        let behind = after(behind, ')')?;
        rest = after(behind, ',').unwrap_or(behind);
        types.push(dtype);
        names.push(name);
    }
    after(rest, ']')?;
    types.dedup();
    let [dtype] = &types[..] else { return None };
    Some((dtype.clone(), names))
}

/// Text as a literal of Python, in ASCII: a file with other characters has another encoding in
/// each version of the format.
fn literal(text: &str) -> String {
    let mut out = "'".to_owned();
    for c in text.chars() {
        // Writing to a string does not fail.
        let _ = match c {
            '\'' | '\\' => write!(out, "\\{c}"),
            ' '..='~' => write!(out, "{c}"),
            _ => write!(out, "\\U{:08x}", u32::from(c)),
        };
    }
    out + "'"
}

/// The text of a literal of Python that `text` starts with, and what follows it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    let quote = text.chars().next().filter(|c| "'\"".contains(*c))?;
    let mut chars = text[1..].chars();
    let mut out = String::new();
    loop {
        let c = chars.next()?;
        if c == quote {
            return Some((out, chars.as_str()));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        let digits = match chars.next()? {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            escaped => {
                out.push(match escaped {
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    other => other,
                });
                continue;
            }
        };
        let code: String = chars.by_ref().take(digits).collect();
        out.push(char::from_u32(u32::from_str_radix(&code, 16).ok()?)?);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_read_back() {
        for shape in [vec![], vec![7], vec![1080, 1920], vec![0, 3]] {
            for (dtype, fields) in [
                ("<f4", &[][..]),
                ("bf16", &[]),
                ("|V2", &[]),
                ("bf16", &["x", "it's", "\"\\\n", "é", "λ"]),
            ] {
                let mut shape = shape.clone();
                shape.extend((!fields.is_empty()).then_some(fields.len() as u64));
                let array = Array {
                    dtype: dtype.into(),
                    shape,
                    fields: fields.iter().copied().map(String::from).collect(),
                };
                let header = array.header();
                assert_eq!(header.len() % ALIGNMENT, 0);
                assert!(header[MAGIC.len() + 4..].is_ascii());
                assert_eq!(Array::read(&mut &header[..]), Ok(array));
            }
        }
    }

    #[test]
    fn types_without_an_order_get_one() {
        for (typed, expected) in [
            ("f4", "<f4"),
            ("i8", "<i8"),
            ("u1", "|u1"),
            ("b1", "|b1"),
            ("S3", "|S3"),
            (">f4", ">f4"),
            ("|u1", "|u1"),
            ("bf16", "bf16"),
            ("float", "float"),
            ("", ""),
            ("ü1", "ü1"),
        ] {
            assert_eq!(with_order(typed), expected);
        }
    }

    #[test]
    fn headers_of_numpy_are_read() {
        let check = |version: u8, descr: &[u8], expected: Option<(&str, &[&str])>| {
            let text = [
                b"{'descr': ",
                descr,
                b", 'fortran_order': False, 'shape': (3,), }",
            ];
            let text = text.concat();
            let mut file = [MAGIC, &[version, 0][..]].concat();
            let length = (text.len() as u32).to_le_bytes();
            file.extend(&length[..if version == 1 { 2 } else { 4 }]);
            file.extend(text);
            let read = Array::read(&mut &file[..]);
            match (&read, expected) {
                (Ok(array), Some((dtype, fields))) => {
                    assert_eq!(array.dtype, dtype);
                    assert_eq!(array.fields, fields);
                }
                (Err(error), None) => assert!(error.contains("same simple type"), "{error}"),
                _ => panic!("{read:?}"),
            }
        };
        check(1, b"'<V2'", Some(("bf16", &[])));
        check(
            1,
            b"[('a', '<f4'), (\"it's\", '<f4')]",
            Some(("<f4", &["a", "it's"])),
        );
        check(1, b"[('\xe9', '<f4'),]", Some(("<f4", &["é"])));
        check(
            3,
            "[('λ\\x00\\n', '|u1')]".as_bytes(),
            Some(("|u1", &["λ\0\n"])),
        );
        check(1, b"[('a', '<f4'), ('b', '<f8')]", None);
        check(1, b"[('a', '<f4', (2,))]", None);
        check(1, b"[('a', [('b', '<f4')])]", None);
        check(1, b"[(('title', 'a'), '<f4')]", None);
        check(1, b"[('a', '<f4'", None);
        check(1, b"[('a\\ud800', '<f4')]", None);
        check(1, b"[]", None);
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
            &header("{'descr': '<f4', 'fortran_order': True, 'shape': (3,), }"),
            "ascontiguousarray",
        );
        check(
            &header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }"),
            "shape",
        );
    }
}
