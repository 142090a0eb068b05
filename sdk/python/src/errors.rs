//! Converts errors of the client to Python exceptions, and back.

use std::cell::Cell;

use latzero::{Code, Error, HandlerError};
use pyo3::prelude::*;

use crate::codec;
use crate::gil::{attach, detach};

/// The family of each code: the name of the exception's class. A new code without a family does not
/// compile.
pub(crate) fn family(code: Code) -> &'static str {
    use Code as C;
    match code {
        C::NoHandler | C::NoApp | C::Offline | C::Draining | C::Overloaded => "Unavailable",
        C::Timeout => "Timeout",
        C::Cancelled => "Cancelled",
        C::Disconnected | C::HandlerGone | C::AttemptsExhausted => "Disconnected",
        C::HandlerError => "HandlerFailed",
        C::Forbidden | C::Unauthenticated | C::NotMember | C::AppInUse => "Forbidden",
        C::BadFrame
        | C::FrameTooLarge
        | C::BadMessage
        | C::TooDeep
        | C::UnknownAction
        | C::InvalidName
        | C::NotReady
        | C::AlreadyReady
        | C::UnsupportedProtocol
        | C::NoPool
        | C::PoolExists
        | C::NoCall
        | C::TooLarge => "BadRequest",
        C::NoBlock
        | C::BlockExists
        | C::OutOfRange
        | C::VersionConflict
        | C::LayoutMismatch
        | C::Contended
        | C::Locked
        | C::LockLost => "BlockError",
        C::Quota | C::Storage | C::Internal => "ServerFailed",
        C::KeyFormat | C::Integrity | C::Rollback | C::Fork | C::Downgrade | C::StaleEpoch => {
            "CryptoFailed"
        }
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

/// The answer of a handler that raised `error`.
pub(crate) fn handler_error(py: Python<'_>, error: &PyErr, tracebacks: bool) -> HandlerError {
    let describe = || -> PyResult<HandlerError> {
        let describe = py.import("latzero._errors")?.getattr("describe")?;
        let described = describe.call1((error.value(py), tracebacks))?;
        let (code, message, data): (String, String, Bound<'_, PyAny>) = described.extract()?;
        let answer = HandlerError::new(code, message);
        if data.is_none() {
            return Ok(answer);
        }
        let data = codec::write_json(&data)?;
        let data: serde_json::Value =
            serde_json::from_str(&data).map_err(|e| bad_request(py, &e.to_string()))?;
        Ok(answer.with_data(data))
    };
    describe().unwrap_or_else(|_| HandlerError::new("handler_error", error.to_string()))
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
