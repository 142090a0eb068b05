//! Python objects to JSON and back, without Python's own `json`.

use std::cell::RefCell;
use std::fmt::Write as _;

use latzero::{Bytes, Code, Data};
use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::{
    PyException, PyKeyError, PyOverflowError, PyTypeError, PyUnicodeEncodeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyMemoryView, PyString, PyTuple,
};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::block::{PyBlock, PyWritable};
use crate::errors::{bad_request, raised};
use crate::handlers::Face;
use crate::share::Share;

/// How many levels the data may nest.
const DEPTH_MAX: usize = 128;

/// How often one object is converted, such as an enum to a `UUID`, and that to text.
const CONVERSIONS_MAX: usize = 8;

/// The path of an object in the payload, for messages.
enum Place<'a> {
    Top,
    Key(&'a Place<'a>, &'a str),
    Index(&'a Place<'a>, usize),
    /// The same place, with what an object there was converted to.
    Converted(&'a Place<'a>),
}

impl Place<'_> {
    fn append(&self, out: &mut String) {
        match self {
            Place::Top => out.push_str("data"),
            Place::Key(outer, key) => {
                outer.append(out);
                let _ = write!(out, ".{key}");
            }
            Place::Index(outer, index) => {
                outer.append(out);
                let _ = write!(out, "[{index}]");
            }
            Place::Converted(outer) => outer.append(out),
        }
    }

    fn depth(&self) -> usize {
        match self {
            Place::Top => 0,
            Place::Key(outer, _) | Place::Index(outer, _) => outer.depth() + 1,
            Place::Converted(outer) => outer.depth(),
        }
    }

    /// How often the object at this place was converted.
    fn conversions(&self) -> usize {
        match self {
            Place::Converted(outer) => outer.conversions() + 1,
            Place::Top | Place::Key(..) | Place::Index(..) => 0,
        }
    }

    fn refuse(&self, py: Python<'_>, why: &str) -> PyErr {
        let mut text = String::new();
        self.append(&mut text);
        bad_request(py, &format!("{text}: {why}"))
    }

    fn refuse_type(&self, object: &Bound<'_, PyAny>) -> PyErr {
        match object.get_type().fully_qualified_name() {
            Ok(name) => self.refuse(object.py(), &format!("'{name}' can't be written as JSON")),
            Err(error) => error,
        }
    }
}

fn append_str(out: &mut String, text: &str) {
    out.push('"');
    let mut from = 0;
    for (i, c) in text.bytes().enumerate() {
        if c >= 0x20 && c != b'"' && c != b'\\' {
            continue;
        }
        out.push_str(&text[from..i]);
        from = i + 1;
        match c {
            b'"' => out.push_str("\\\""),
            b'\\' => out.push_str("\\\\"),
            b'\n' => out.push_str("\\n"),
            b'\r' => out.push_str("\\r"),
            b'\t' => out.push_str("\\t"),
            c => {
                let _ = write!(out, "\\u{c:04x}");
            }
        }
    }
    out.push_str(&text[from..]);
    out.push('"');
}

const LONE_SURROGATES: &str = "the text has lone surrogates, which UTF-8 can't encode";

fn text<'a>(object: &'a Bound<'_, PyString>, place: &Place<'_>) -> PyResult<&'a str> {
    let py = object.py();
    object
        .to_str()
        .map_err(|_| place.refuse(py, LONE_SURROGATES))
}

/// The JSON that is being written, and the blocks that it refers to.
#[derive(Default)]
struct Out {
    json: String,
    blocks: Vec<LentBlock>,
}

/// A block that is passed with a call.
pub(crate) struct LentBlock {
    pub(crate) block: latzero::Block,
    pub(crate) is_writable: bool,
    pub(crate) share: Option<Share>,
}

fn append_block(object: &PyBlock, is_writable: bool, out: &mut Out) {
    let block = &object.block;
    let reference = block.reference().to_string();
    out.json.push_str(&reference);
    let is_same =
        |lent: &&mut LentBlock| (lent.block.id(), lent.block.pool()) == (block.id(), block.pool());
    match out.blocks.iter_mut().find(is_same) {
        Some(lent) => lent.is_writable |= is_writable,
        None => out.blocks.push(LentBlock {
            block: block.clone(),
            is_writable,
            share: object.share.clone(),
        }),
    }
}

/// JSON text that another library wrote.
#[pyclass(name = "Json", frozen, module = "latzero._latzero")]
pub(crate) struct PyJson(Py<PyString>);

#[pymethods]
impl PyJson {
    #[new]
    fn new(text: Py<PyString>) -> Self {
        PyJson(text)
    }
}

fn append_json(object: &Bound<'_, PyString>, out: &mut Out, place: &Place<'_>) -> PyResult<()> {
    let (py, json, depth) = (object.py(), text(object, place)?, place.depth());
    // Only a long text can be too deep together with what is around it.
    let checked = if depth > 0 && json.len() >= 2 * DEPTH_MAX.saturating_sub(depth) {
        let nested = format!("{}{json}{}", "[".repeat(depth), "]".repeat(depth));
        latzero::check_json(&nested)
    } else {
        latzero::check_json(json)
    };
    checked.map_err(|e| place.refuse(py, e.message()))?;
    if has_large_integer(json.as_bytes()) {
        return Err(place.refuse(py, INTEGER_RANGE));
    }
    out.json.push_str(json);
    Ok(())
}

/// The fewest digits of an integer that 64 bits may not hold.
const LONG: usize = 19;

/// Whether an integer of valid JSON is beyond 64 bits.
fn has_large_integer(mut json: &[u8]) -> bool {
    // A look at one byte in so many finds whatever digits there may be of it.
    let is_in_long = |at: usize| {
        let (before, after) = json.split_at(at);
        let after = after.iter().take_while(|c| c.is_ascii_digit()).count();
        let before = before.iter().rev().take_while(|c| c.is_ascii_digit());
        after > 0 && after + before.count() >= LONG
    };
    if !(LONG - 1..json.len()).step_by(LONG).any(is_in_long) {
        return false;
    }
    while let Some((&first, rest)) = json.split_first() {
        json = rest;
        if first == b'"' {
            while let Some((&c, rest)) = json.split_first() {
                json = rest;
                match c {
                    b'"' => break,
                    b'\\' => json = &json[1..],
                    _ => {}
                }
            }
        } else if first == b'-' || first.is_ascii_digit() {
            let is_part = |c: &u8| matches!(c, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
            let end = json.iter().take_while(|c| is_part(c)).count();
            if end + 1 >= LONG {
                let number = [&[first], &json[..end]].concat();
                let number = String::from_utf8_lossy(&number);
                if !number.contains(['.', 'e', 'E'])
                    && number.parse::<i64>().is_err()
                    && number.parse::<u64>().is_err()
                {
                    return true;
                }
            }
            json = &json[end..];
        }
    }
    false
}

const INTEGER_RANGE: &str = "integers reach from -2**63 to 2**64-1";

fn append(object: &Bound<'_, PyAny>, out: &mut Out, place: &Place<'_>) -> PyResult<()> {
    let py = object.py();
    if let Ok(string) = object.cast::<PyString>() {
        append_str(&mut out.json, text(string, place)?);
    } else if object.is_none() {
        out.json.push_str("null");
    } else if let Ok(value) = object.cast::<PyBool>() {
        out.json
            .push_str(if value.is_true() { "true" } else { "false" });
    } else if let Ok(number) = object.cast::<PyInt>() {
        let mut buffer = itoa::Buffer::new();
        let digits = match number.extract::<i64>() {
            Ok(value) => buffer.format(value),
            Err(_) => match number.extract::<u64>() {
                Ok(value) => buffer.format(value),
                Err(_) => {
                    return Err(place.refuse(py, INTEGER_RANGE));
                }
            },
        };
        out.json.push_str(digits);
    } else if let Ok(number) = object.cast::<PyFloat>() {
        let Some(number) = serde_json::Number::from_f64(number.value()) else {
            return Err(place.refuse(py, "NaN and infinities are not JSON"));
        };
        let _ = write!(out.json, "{number}");
    } else if let Ok(dict) = object.cast::<PyDict>() {
        check_depth(py, place)?;
        out.json.push('{');
        // Another thread, or what converts a value, may change it: then the next step would panic.
        let (length, mut items) = (dict.len(), dict.iter());
        for i in 0..=length {
            let item = (dict.len() == length).then(|| items.next());
            let (key, value) = match item {
                Some(Some(item)) if i < length => item,
                Some(None) if i == length => break,
                _ => return Err(place.refuse(py, "the dict changed while it was written")),
            };
            if i > 0 {
                out.json.push(',');
            }
            let Ok(key) = key.cast::<PyString>() else {
                let name = key.get_type().name()?;
                return Err(place.refuse(py, &format!("keys are str, not {name}")));
            };
            let key = text(key, place)?;
            append_str(&mut out.json, key);
            out.json.push(':');
            append(&value, out, &Place::Key(place, key))?;
        }
        out.json.push('}');
    } else if let Ok(list) = object.cast::<PyList>() {
        append_all(py, list.iter(), out, place)?;
    } else if let Ok(tuple) = object.cast::<PyTuple>() {
        append_all(py, tuple.iter(), out, place)?;
    } else if object.is_instance_of::<PyBytes>()
        || object.is_instance_of::<PyByteArray>()
        || object.is_instance_of::<PyMemoryView>()
    {
        return Err(place.refuse(py, "bytes inside JSON: send them whole, or as a block"));
    } else if let Ok(block) = object.cast::<PyBlock>() {
        append_block(block.get(), false, out);
    } else if let Ok(block) = object.cast::<PyWritable>() {
        append_block(block.get().0.get(), true, out);
    } else if let Ok(json) = object.cast::<PyJson>() {
        append_json(json.get().0.bind(py), out, place)?;
    } else {
        // What the standard library and users define is turned into what JSON has by the face.
        static PLAIN: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let plain = PLAIN.import(py, "latzero._encode", "plain")?;
        match plain.call1((object,)) {
            // Such as an enum whose value is itself has no end.
            Ok(plain) if place.conversions() < CONVERSIONS_MAX => {
                append(&plain, out, &Place::Converted(place))?;
            }
            Ok(_) => return Err(place.refuse_type(object)),
            Err(e) if e.is_instance_of::<PyTypeError>(py) => {
                return Err(place.refuse_type(object));
            }
            // Such as that of a model which pydantic can't write.
            Err(e) if e.is_instance_of::<PyException>(py) => {
                let refused = place.refuse(py, &e.value(py).to_string());
                refused.set_cause(py, Some(e));
                return Err(refused);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn check_depth(py: Python<'_>, place: &Place<'_>) -> PyResult<()> {
    if place.depth() < DEPTH_MAX {
        return Ok(());
    }
    Err(bad_request(
        py,
        &format!("data is deeper than {DEPTH_MAX} levels, or contains itself"),
    ))
}

fn append_all<'py>(
    py: Python<'py>,
    items: impl Iterator<Item = Bound<'py, PyAny>>,
    out: &mut Out,
    place: &Place<'_>,
) -> PyResult<()> {
    check_depth(py, place)?;
    out.json.push('[');
    for (i, item) in items.enumerate() {
        if i > 0 {
            out.json.push(',');
        }
        append(&item, out, &Place::Index(place, i))?;
    }
    out.json.push(']');
    Ok(())
}

/// Whole bytes, if `object` is bytes.
fn whole_bytes(object: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u8>>> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(Some(bytes.as_bytes().to_vec()));
    }
    if let Ok(bytes) = object.cast::<PyByteArray>() {
        return Ok(Some(bytes.to_vec()));
    }
    if object.is_instance_of::<PyMemoryView>() {
        let bytes = object.call_method0("tobytes")?;
        return Ok(Some(bytes.cast::<PyBytes>()?.as_bytes().to_vec()));
    }
    Ok(None)
}

/// A payload of a Python object.
pub(crate) fn write(object: &Bound<'_, PyAny>) -> PyResult<Data> {
    let (data, blocks) = write_call(object)?;
    match blocks.is_empty() {
        true => Ok(data),
        false => Err(no_blocks(object.py())),
    }
}

/// What a handler answers. The caller's request is not to blame if that can't be written.
pub(crate) fn write_answer(object: &Bound<'_, PyAny>) -> PyResult<Data> {
    write(object).map_err(|error| {
        let raised = error.value(object.py());
        match raised.getattr("message") {
            Ok(why) => PyValueError::new_err(format!("the answer can't be sent: {why}")),
            Err(_) => error,
        }
    })
}

/// The payload of a call, and the blocks that are passed with it.
pub(crate) fn write_call(object: &Bound<'_, PyAny>) -> PyResult<(Data, Vec<LentBlock>)> {
    if let Some(bytes) = whole_bytes(object)? {
        return Ok((Data::Bytes(Bytes(bytes)), Vec::new()));
    }
    let (json, blocks) = write_text(object)?;
    Ok((Data::Json(json), blocks))
}

/// JSON of a Python object.
pub(crate) fn write_json(object: &Bound<'_, PyAny>) -> PyResult<String> {
    match write_text(object)? {
        (json, blocks) if blocks.is_empty() => Ok(json),
        _ => Err(no_blocks(object.py())),
    }
}

/// A Python object as JSON text.
#[pyfunction]
pub(crate) fn json<'py>(value: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(value.py(), write_json(value)?.as_bytes()))
}

fn no_blocks(py: Python<'_>) -> PyErr {
    bad_request(
        py,
        "blocks travel only with calls: send the block's id instead",
    )
}

fn write_text(object: &Bound<'_, PyAny>) -> PyResult<(String, Vec<LentBlock>)> {
    let mut out = Out {
        json: String::with_capacity(64),
        blocks: Vec::new(),
    };
    append(object, &mut out, &Place::Top)?;
    Ok((out.json, out.blocks))
}

/// A key that was made before.
type KnownKey = Option<(Box<str>, Py<PyString>)>;

// Keys repeat from message to message, so each is made once.
thread_local! {
    static KEYS: RefCell<Vec<KnownKey>> =
        RefCell::new((0..1024).map(|_| None).collect());
}

fn key<'py>(py: Python<'py>, text: &str) -> Bound<'py, PyString> {
    if text.len() > 64 {
        return PyString::new(py, text);
    }
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for &byte in text.as_bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    let at = (hash ^ (hash >> 32)) as usize & 1023;
    let known = KEYS.with_borrow(|keys| match &keys[at] {
        Some((known, object)) if **known == *text => Some(object.clone_ref(py)),
        _ => None,
    });
    if let Some(object) = known {
        return object.into_bound(py);
    }
    let object = PyString::intern(py, text);
    let new = Some((text.into(), object.clone().unbind()));
    // The old one is dropped after the borrow.
    let _old = KEYS.with_borrow_mut(|keys| std::mem::replace(&mut keys[at], new));
    object
}

/// The request whose payload is read: references to its blocks become these blocks.
#[derive(Clone, Copy)]
struct Lender<'a> {
    request: &'a latzero::Request,
    face: Face,
}

#[derive(Clone, Copy)]
struct Seed<'py, 'a>(Python<'py>, Option<&'a Lender<'a>>);

impl<'de, 'py> DeserializeSeed<'de> for Seed<'py, '_> {
    type Value = Bound<'py, PyAny>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_any(self)
    }
}

struct KeySeed<'py>(Python<'py>);

impl<'de, 'py> DeserializeSeed<'de> for KeySeed<'py> {
    type Value = Bound<'py, PyString>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        d.deserialize_str(self)
    }
}

impl<'py> Visitor<'_> for KeySeed<'py> {
    type Value = Bound<'py, PyString>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(key(self.0, text))
    }
}

fn custom<E: serde::de::Error>(error: PyErr) -> E {
    E::custom(error)
}

impl<'de, 'py> Visitor<'de> for Seed<'py, '_> {
    type Value = Bound<'py, PyAny>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(PyBool::new(self.0, value).to_owned().into_any())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
        let Ok(number) = value.into_pyobject(self.0);
        Ok(number.into_any())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Self::Value, E> {
        let Ok(number) = value.into_pyobject(self.0);
        Ok(number.into_any())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(PyFloat::new(self.0, value).into_any())
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(PyString::new(self.0, text).into_any())
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(self.0.None().into_bound(self.0))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let list = PyList::empty(self.0);
        while let Some(item) = items.next_element_seed(self)? {
            list.append(item).map_err(custom)?;
        }
        Ok(list.into_any())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
        let dict = PyDict::new(self.0);
        while let Some(key) = fields.next_key_seed(KeySeed(self.0))? {
            let value = fields.next_value_seed(self)?;
            dict.set_item(key, value).map_err(custom)?;
        }
        if let Some(lender) = self.1
            && let Some(block) = lent_block(lender, &dict).map_err(custom)?
        {
            return Ok(block);
        }
        Ok(dict.into_any())
    }
}

/// The block of the request that `dict` refers to, if it does.
fn lent_block<'py>(
    lender: &Lender<'_>,
    dict: &Bound<'py, PyDict>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    let py = dict.py();
    let Some(id) = dict.get_item(pyo3::intern!(py, "$block"))? else {
        return Ok(None);
    };
    let Ok(id) = id.extract::<String>() else {
        return Ok(None);
    };
    if !lender.request.block_ids().contains(&&*id) {
        return Ok(None);
    }
    let block = lender.request.block(&id);
    let block = block.map_err(|e| crate::errors::exception(py, &e))?;
    PyBlock::new(block).wrapped(py, lender.face).map(Some)
}

/// A Python object of JSON text.
pub(crate) fn read_json<'py>(py: Python<'py>, json: &str) -> PyResult<Bound<'py, PyAny>> {
    read_text(py, json, None)
}

fn read_text<'py>(
    py: Python<'py>,
    json: &str,
    lender: Option<&Lender<'_>>,
) -> PyResult<Bound<'py, PyAny>> {
    let read = |is_deep| {
        let mut text = serde_json::Deserializer::from_str(json);
        if is_deep {
            text.disable_recursion_limit();
        }
        Seed(py, lender).deserialize(&mut text)
    };
    // `serde_json` refuses the 128th level.
    let is_deep = || json.len() >= 2 * DEPTH_MAX && latzero::check_json(json).is_ok();
    read(false)
        .or_else(|e| if is_deep() { read(true) } else { Err(e) })
        .map_err(|e| {
            // Whoever sent it has run.
            let message = format!("the JSON received could not be read: {e}");
            raised(py, Code::BadMessage, &message, Some("unknown"))
        })
}

/// A Python object of a payload.
pub(crate) fn read<'py>(py: Python<'py>, data: &Data) -> PyResult<Bound<'py, PyAny>> {
    match data {
        Data::Json(json) => read_json(py, json),
        Data::Bytes(bytes) => Ok(PyBytes::new(py, &bytes.0).into_any()),
    }
}

/// A Python object of a request's payload.
pub(crate) fn read_request<'py>(
    py: Python<'py>,
    request: &latzero::Request,
    face: Face,
) -> PyResult<Bound<'py, PyAny>> {
    if let Some(bytes) = request.bytes() {
        return Ok(PyBytes::new(py, bytes).into_any());
    }
    let lender = Lender { request, face };
    // Most requests have no blocks.
    let lender = (!request.block_ids().is_empty()).then_some(&lender);
    read_text(py, request.json().unwrap_or("null"), lender)
}

/// An argument by position. What is out of range, or no text that can be sent, is a `BadRequest`.
pub(crate) struct Given<T>(pub(crate) T);

impl<'a, 'py, T: FromPyObject<'a, 'py>> FromPyObject<'a, 'py> for Given<T> {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let given = value.extract().map(Given);
        given.map_err(|e: T::Error| refused(&value, "", e.into()).unwrap_or_else(|e| e))
    }
}

/// The error for a value that Rust's type can't take. The error itself if its kind was wrong.
fn refused(value: &Bound<'_, PyAny>, name: &str, error: PyErr) -> Result<PyErr, PyErr> {
    let py = value.py();
    if error.is_instance_of::<PyOverflowError>(py) {
        Ok(bad_request(py, &format!("{name}{value} is out of range")))
    } else if error.is_instance_of::<PyUnicodeEncodeError>(py) {
        Ok(bad_request(py, &format!("{name}{LONE_SURROGATES}")))
    } else {
        Err(error)
    }
}

/// The value of an option; an error names the option.
pub(crate) fn named<'py, T: FromPyObjectOwned<'py>>(
    name: &str,
    value: &Bound<'py, PyAny>,
) -> PyResult<T> {
    value.extract().map_err(|e: T::Error| {
        let prefix = format!("{name}: ");
        refused(value, &prefix, e.into())
            .unwrap_or_else(|e| PyTypeError::new_err(format!("{prefix}{}", e.value(value.py()))))
    })
}

/// A required option.
pub(crate) fn option<'py, T: FromPyObjectOwned<'py>>(
    options: &Bound<'py, PyDict>,
    name: &str,
) -> PyResult<T> {
    named(name, &take(options, name)?)
}

/// A required item of a dict of options.
pub(crate) fn take<'py>(options: &Bound<'py, PyDict>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    options
        .get_item(name)?
        .ok_or_else(|| PyKeyError::new_err(name.to_owned()))
}
