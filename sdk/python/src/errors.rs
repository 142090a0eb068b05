//! Converts errors of the client to Python exceptions, and back.

use std::cell::Cell;

use latzero::{Code, Error, Family, HandlerError};
use pyo3::prelude::*;
use pyo3::types::PyString;
use serde_json::{Value, json};

use crate::codec;
use crate::gil::{attach, detach};

/// The name of the exception's class of a code's family. `BlockError` has another name because
/// `Block` is taken.
pub(crate) fn family(code: Code) -> &'static str {
    match code.family() {
        Family::Block => "BlockError",
        family => family.as_str(),
    }
}

/// The exception for `error`.
pub(crate) fn exception(py: Python<'_>, error: &Error) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let data = match error.data() {
            Some(data) => codec::read_json(py, &data.to_string())?,
            None => py.None().into_bound(py),
        };
        let ran = error.ran().map(latzero::Ran::as_str);
        let kind = error.kind();
        let is_own = error.code() != kind.as_str();
        let hint = (!is_own).then(|| kind.remedy());
        let of_family = py.import("latzero._errors")?.getattr(family(kind))?;
        let object = of_family.call1((error.code(), error.message(), ran, data, hint))?;
        Ok(PyErr::from_value(object))
    };
    make().unwrap_or_else(|e| e)
}

/// A `BadRequest` that was found before anything was sent.
pub(crate) fn bad_request(py: Python<'_>, message: &str) -> PyErr {
    raised(py, Code::BadMessage, message, Some("no"))
}

/// An exception that the binding itself raises.
pub(crate) fn raised(py: Python<'_>, code: Code, message: &str, ran: Option<&str>) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let class = py.import("latzero._errors")?.getattr(family(code))?;
        let arguments = (code.as_str(), message, ran, py.None(), code.remedy());
        Ok(PyErr::from_value(class.call1(arguments)?))
    };
    make().unwrap_or_else(|e| e)
}

/// An error that a handler answers with its own code, instead of `handler_error`.
pub(crate) fn refusal(py: Python<'_>, error: PyErr) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let raised = error.value(py);
        let arguments = (raised.getattr("code")?, raised.getattr("message")?);
        let class = py.import("latzero._errors")?.getattr("Failure")?;
        Ok(PyErr::from_value(class.call1(arguments)?))
    };
    make().unwrap_or(error)
}

/// How much of a traceback is sent, as in `latzero._errors`.
const TRACEBACK_BYTES_MAX: usize = 16 * 1024;

/// What `str` makes of an object, as text that can be sent: surrogates are replaced.
fn sendable(object: &Bound<'_, PyAny>) -> PyResult<String> {
    let text = object.str()?;
    match text.to_str() {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => {
            let bytes = text.call_method1("encode", ("utf-8", "replace"))?;
            bytes.call_method0("decode")?.extract()
        }
    }
}

fn json_value(data: &Bound<'_, PyAny>) -> PyResult<Value> {
    let json = codec::write_json(data)?;
    serde_json::from_str(&json).map_err(|e| bad_request(data.py(), &e.to_string()))
}

/// The answer of a handler that raised `error`.
pub(crate) fn handler_error(py: Python<'_>, error: &PyErr, tracebacks: bool) -> HandlerError {
    let describe = || -> PyResult<HandlerError> {
        let describe = py.import("latzero._errors")?.getattr("describe")?;
        let described = describe.call1((error.value(py), tracebacks))?;
        type Described<'py> = (String, Bound<'py, PyAny>, Bound<'py, PyAny>);
        let (code, message, data): Described<'_> = described.extract()?;
        let message = sendable(&message)?;
        if data.is_none() {
            return Ok(HandlerError::new(code, message));
        }
        Ok(match json_value(&data) {
            Ok(data) => HandlerError::new(code, message).with_data(data),
            Err(error) => {
                let error = error.value(py);
                let why = error.getattr("message").unwrap_or(error.clone().into_any());
                let why = sendable(&why).unwrap_or_default();
                HandlerError::new(code, format!("{message} (its data can't be sent: {why})"))
            }
        })
    };
    describe().unwrap_or_else(|_| outline(py, error, tracebacks))
}

/// The answer of a handler that raised an `error` of which `str` makes no text.
fn outline(py: Python<'_>, error: &PyErr, tracebacks: bool) -> HandlerError {
    let name = error.get_type(py).qualname();
    let name = name.and_then(|name| sendable(name.as_any()));
    let name = name.unwrap_or_else(|_| "Exception".to_owned());
    let text = sendable(error.value(py).as_any());
    // As Python's own tracebacks call it.
    let text = text.unwrap_or_else(|_| "<exception str() failed>".to_owned());
    let message = format!("{name}: {text}");
    let mut data = json!({"type": name, "message": text});
    if tracebacks {
        let traceback = || -> PyResult<String> {
            let format = py.import("traceback")?.getattr("format_exception")?;
            let lines = format.call1((error.value(py),))?;
            sendable(&PyString::new(py, "").call_method1("join", (lines,))?)
        };
        if let Ok(text) = traceback() {
            let start = text.len().saturating_sub(TRACEBACK_BYTES_MAX);
            data["traceback"] = text[text.ceil_char_boundary(start)..].into();
        }
    }
    HandlerError::new("handler_error", message).with_data(data)
}

/// Runs `work` without the GIL. Signals end its waits: what their Python handler raised is raised.
pub(crate) fn wait<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<T> {
    wait_any(py, work)?.map_err(|e| exception(py, &e))
}

thread_local! {
    /// What the Python handler of a signal raised during a wait of this thread.
    static RAISED: Cell<Option<PyErr>> = const { Cell::new(None) };
}

/// Whether a signal is to end the wait of this thread.
fn wants_end() -> bool {
    match attach(|py| py.check_signals()) {
        Some(Err(error)) => {
            RAISED.set(Some(error));
            true
        }
        Some(Ok(())) => false,
        // The interpreter ends.
        None => true,
    }
}

/// Like [`wait`], for any result.
pub(crate) fn wait_any<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    let (result, raised) = detach(py, || {
        let result = latzero::blocking::interruptible(wants_end, work);
        (result, RAISED.take())
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(result),
    }
}
