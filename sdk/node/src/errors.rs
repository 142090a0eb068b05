//! Errors of the client as `lib/` reads them, and the errors that handlers answer.

use latzero::{Code, Error, HandlerError, Ran};
use serde_json::{Value, json};

/// The family of each code: the name of the error's class without its ending. A new code without a
/// family does not compile.
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
        | C::LockLost => "Block",
        C::Quota | C::Storage | C::Internal => "ServerFailed",
        C::KeyFormat | C::Integrity | C::Rollback | C::Fork | C::Downgrade | C::StaleEpoch => {
            "CryptoFailed"
        }
    }
}

/// The description that `lib/errors.cjs` makes an error of.
pub(crate) fn describe(error: &Error) -> Value {
    let kind = error.kind();
    let is_own = error.code() != kind.as_str();
    json!({
        "family": family(kind),
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
        "family": family(code),
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
