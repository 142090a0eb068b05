//! What can go wrong, for callers ([`Error`]) and for handlers ([`HandlerError`]).

use std::any::type_name;
use std::borrow::Cow;
use std::fmt;

use latzero_crypto::text::redact;
use latzero_protocol::{Code, Ran};
use serde::Deserialize;
use serde_json::{Value, json};

/// Why an operation failed. One pointer in size.
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Code,
    /// The code as the wire spelled it, if it is a handler's own.
    own_code: Option<Box<str>>,
    message: Cow<'static, str>,
    ran: Option<Ran>,
    data: Option<Value>,
    /// The error is from the server, in a pool where it cannot speak for a handler.
    is_servers_word: bool,
    source: Option<std::sync::Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: Code, message: impl Into<Cow<'static, str>>) -> Self {
        let message = match message.into() {
            Cow::Owned(text) => match redact(&text) {
                Cow::Owned(hidden) => Cow::Owned(hidden),
                Cow::Borrowed(_) => Cow::Owned(text),
            },
            written_here => written_here,
        };
        Error(Box::new(Inner {
            kind,
            own_code: None,
            message,
            ran: Some(kind.ran()),
            data: None,
            is_servers_word: false,
            source: None,
        }))
    }

    /// The error came in an encrypted pool and is not sealed.
    pub(crate) fn of_server_alone(mut self) -> Self {
        self.0.is_servers_word = true;
        self
    }

    /// False if only the server says so: in an encrypted pool it can falsely claim that nobody
    /// serves a call or that it timed out, but it cannot forge a handler's answer.
    #[must_use]
    pub fn is_authenticated(&self) -> bool {
        !self.0.is_servers_word
    }

    pub(crate) fn with_ran(mut self, ran: Ran) -> Self {
        self.0.ran = Some(ran);
        self
    }

    pub(crate) fn with_source(
        mut self,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        self.0.source = Some(std::sync::Arc::new(source));
        self
    }

    /// Reads the `error` object of a reply.
    pub(crate) fn from_wire(json: &str) -> Self {
        #[derive(Deserialize)]
        struct Wire {
            code: String,
            #[serde(default)]
            message: String,
            ran: Option<String>,
            data: Option<Value>,
        }
        let wire: Wire = match crate::payload::read_json(json) {
            Ok(wire) => wire,
            Err(e) => {
                return Error::new(Code::HandlerError, "the error reply could not be read")
                    .with_source(e);
            }
        };
        let known = Code::parse(&wire.code);
        let kind = known.unwrap_or(Code::HandlerError);
        Error(Box::new(Inner {
            kind,
            own_code: known.is_none().then(|| wire.code.into_boxed_str()),
            message: wire.message.into(),
            ran: match wire.ran.as_deref() {
                Some("no") => Some(Ran::No),
                Some(_) => Some(Ran::Unknown),
                None => None,
            },
            data: wire.data,
            is_servers_word: false,
            source: None,
        }))
    }

    /// What kind of failure it is. A handler's own code counts as [`Code::HandlerError`].
    #[must_use]
    pub fn kind(&self) -> Code {
        self.0.kind
    }

    /// The code as the wire spells it: one of the protocol's, or a handler's own.
    #[must_use]
    pub fn code(&self) -> &str {
        self.0.own_code.as_deref().unwrap_or(self.0.kind.as_str())
    }

    /// What happened, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Whether the handler of the failed call may have run; `None` if a handler itself reports
    /// the failure.
    #[must_use]
    pub fn ran(&self) -> Option<Ran> {
        self.0.ran
    }

    /// What a handler attached to its error.
    #[must_use]
    pub fn data(&self) -> Option<&Value> {
        self.0.data.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code(), self.0.message)?;
        match (self.0.own_code.is_none(), self.0.ran) {
            (true, Some(Ran::No)) if self.0.kind.ran() == Ran::Unknown => {
                f.write_str(" (it did not run)")
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("code", &self.code())
            .field("message", &self.0.message)
            .field("ran", &self.0.ran)
            .field("data", &self.0.data)
            .finish()
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|s| s as _)
    }
}

/// An error that a handler answers with. Any error converts into one with `?`: with the code
/// `handler_error`, and its type and message as data. So does a [`latzero::Error`](Error) of a call
/// that the handler made: its code would tell the caller that its own call had failed that way.
#[derive(Debug, Clone)]
pub struct HandlerError {
    pub(crate) code: Cow<'static, str>,
    pub(crate) message: String,
    pub(crate) data: Option<Value>,
}

impl HandlerError {
    /// An error with the handler's own code, which the caller reads from [`Error::code`].
    pub fn new(code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        HandlerError {
            code: code.into(),
            message: message.into(),
            data: None,
        }
    }

    /// Adds data, which the caller reads from [`Error::data`].
    #[must_use]
    pub fn with_data(mut self, data: impl Into<Value>) -> Self {
        self.data = Some(data.into());
        self
    }

    /// The code.
    #[must_use]
    pub fn code(&self) -> &str {
        &self.code
    }

    /// What happened, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

// `HandlerError` is not a `std::error::Error`, so that this can be implemented for all others.
impl<E: std::error::Error + 'static> From<E> for HandlerError {
    fn from(error: E) -> Self {
        let message = error.to_string();
        let data = json!({"type": type_name::<E>(), "message": message});
        HandlerError::new("handler_error", message).with_data(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_wire_are_read() {
        let e = Error::from_wire(r#"{"code":"no_handler","message":"m","ran":"no"}"#);
        assert_eq!((e.kind(), e.ran()), (Code::NoHandler, Some(Ran::No)));
        assert_eq!(e.to_string(), "no_handler: m");
        let e = Error::from_wire(r#"{"code":"mine","message":"m","data":{"x":1}}"#);
        assert_eq!(
            (e.kind(), e.code(), e.ran()),
            (Code::HandlerError, "mine", None)
        );
        assert_eq!(e.data(), Some(&json!({"x":1})));
        assert_eq!(Error::from_wire("{}").code(), "handler_error");
        assert_eq!(std::mem::size_of::<Error>(), std::mem::size_of::<usize>());
    }

    #[test]
    fn errors_turn_into_handler_errors() {
        let e = HandlerError::from(Error::new(Code::NoHandler, "nobody"));
        assert_eq!(e.to_string(), "handler_error: no_handler: nobody");
        let e = HandlerError::from(std::fmt::Error);
        assert_eq!(e.code(), "handler_error");
        let data = json!({"type": "core::fmt::Error", "message": e.message()});
        assert_eq!(e.data, Some(data));
    }
}
