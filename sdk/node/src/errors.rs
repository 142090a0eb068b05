//! Errors of the client as `lib/` reads them, and the errors that handlers answer.

use latzero::{Code, Error, HandlerError, Ran};
use serde_json::{Value, json};

/// The description that `lib/errors.cjs` makes an error of.
pub(crate) fn describe(error: &Error) -> Value {
    let kind = error.kind();
    let is_own = error.code() != kind.as_str();
    json!({
        "family": kind.family().as_str(),
        "code": error.code(),
        "message": error.message(),
        "ran": error.ran().map(Ran::as_str),
        "data": error.data(),
        "hint": (!is_own).then(|| kind.remedy()),
    })
}

/// An error of this binding, described as those of the client are.
pub(crate) fn own(code: Code, message: &str, ran: Option<Ran>) -> Value {
    json!({
        "family": code.family().as_str(),
        "code": code.as_str(),
        "message": message,
        "ran": ran.map(Ran::as_str),
        "data": null,
        "hint": code.remedy(),
    })
}

/// As an exception; `lib/errors.cjs` makes the error of it.
pub(crate) fn refused(code: Code, message: &str, ran: Option<Ran>) -> napi::Error {
    napi::Error::from_reason(own(code, message, ran).to_string())
}

/// An exception for an error in the calling program.
pub(crate) fn misuse(message: impl Into<String>) -> napi::Error {
    napi::Error::new(napi::Status::InvalidArg, message.into())
}

/// A failure of an operation that is done at once: an exception whose message is the description
/// of the error.
pub(crate) fn thrown(error: &Error) -> napi::Error {
    napi::Error::new(napi::Status::GenericFailure, describe(error).to_string())
}

/// What a handler answers that threw; `data` is JSON.
pub(crate) fn of_handler(code: String, message: String, data: Option<&str>) -> HandlerError {
    let error = HandlerError::new(code, message);
    match data.map(serde_json::from_str::<Value>) {
        Some(Ok(data)) => error.with_data(data),
        Some(Err(_)) | None => error,
    }
}
