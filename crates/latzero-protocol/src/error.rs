//! Error codes: the closed list of the protocol, with what each means and what to do about it.
//!
//! `docs/errors.md` is generated from this table (`cargo xtask codegen`), and the tables of other
//! languages will be too. A code never changes its meaning and is never reused.

use std::borrow::Cow;
use std::fmt;

/// Whether the handler of a failed call may have run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ran {
    /// Certainly not: the call may be repeated without harm.
    No,
    /// Perhaps: only a call that may run twice should be repeated.
    Unknown,
}

impl Ran {
    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Ran::No => "no",
            Ran::Unknown => "unknown",
        }
    }
}

/// Who raises a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RaisedBy {
    /// The server, on the wire.
    Server,
    /// A client library, never on the wire.
    Client,
}

/// What kind of failure a code is. Python and Node have a class of exceptions for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Nobody can take the call now.
    Unavailable,
    /// The time ended before the answer came.
    Timeout,
    /// The call was cancelled.
    Cancelled,
    /// The connection ended, or that of the handler.
    Disconnected,
    /// The handler failed, or answered with a code of its own.
    HandlerFailed,
    /// The server does not allow it.
    Forbidden,
    /// The request is wrong as it is.
    BadRequest,
    /// Something about a memory block.
    Block,
    /// The server cannot do it.
    ServerFailed,
    /// Keys or sealed data are wrong.
    CryptoFailed,
}

impl Family {
    /// Its name, of which the names of the classes are made.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Family::Unavailable => "Unavailable",
            Family::Timeout => "Timeout",
            Family::Cancelled => "Cancelled",
            Family::Disconnected => "Disconnected",
            Family::HandlerFailed => "HandlerFailed",
            Family::Forbidden => "Forbidden",
            Family::BadRequest => "BadRequest",
            Family::Block => "Block",
            Family::ServerFailed => "ServerFailed",
            Family::CryptoFailed => "CryptoFailed",
        }
    }
}

impl Code {
    /// Its family. A new code without one does not compile.
    #[must_use]
    pub fn family(self) -> Family {
        use Code as C;
        match self {
            C::NoHandler | C::NoApp | C::Offline | C::Draining | C::Overloaded => {
                Family::Unavailable
            }
            C::Timeout => Family::Timeout,
            C::Cancelled => Family::Cancelled,
            C::Disconnected | C::HandlerGone | C::AttemptsExhausted => Family::Disconnected,
            C::HandlerError => Family::HandlerFailed,
            C::Forbidden | C::Unauthenticated | C::NotMember | C::AppInUse => Family::Forbidden,
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
            | C::TooLarge => Family::BadRequest,
            C::NoBlock
            | C::BlockExists
            | C::OutOfRange
            | C::VersionConflict
            | C::LayoutMismatch
            | C::Contended
            | C::Locked
            | C::LockLost => Family::Block,
            C::Quota | C::Storage | C::Internal => Family::ServerFailed,
            C::KeyFormat | C::Integrity | C::Rollback | C::Fork | C::Downgrade | C::StaleEpoch => {
                Family::CryptoFailed
            }
        }
    }
}

macro_rules! codes {
    ($($name:ident $wire:literal $ran:ident $by:ident $meaning:literal $remedy:literal;)*) => {
        /// An error code of the protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Code {
            $(#[doc = $meaning] $name,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &[Code] = &[$(Code::$name),*];

            /// The code on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $wire,)* }
            }

            /// Reads a code from the wire.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($wire => Some(Code::$name),)* _ => None }
            }

            /// Whether the handler may have run when a call ends with this code.
            #[must_use]
            pub fn ran(self) -> Ran {
                match self { $(Code::$name => Ran::$ran,)* }
            }

            /// Who raises this code.
            #[must_use]
            pub fn raised_by(self) -> RaisedBy {
                match self { $(Code::$name => RaisedBy::$by,)* }
            }

            /// What the code means, as a sentence.
            #[must_use]
            pub fn meaning(self) -> &'static str {
                match self { $(Code::$name => $meaning,)* }
            }

            /// What to do about it, as a sentence.
            #[must_use]
            pub fn remedy(self) -> &'static str {
                match self { $(Code::$name => $remedy,)* }
            }
        }
    };
}

codes! {
    BadFrame "bad_frame" No Server
        "The first bytes of a connection are not a valid frame: empty, not UTF-8, not JSON, or \
         not an object. The connection is closed."
        "Send a four-byte big-endian length and then one JSON object of that length. HTTP clients \
         cannot use this port, and TLS clients need a server with `--tls`.";
    FrameTooLarge "frame_too_large" No Server
        "A frame is longer than the limit. The connection is closed before anything is buffered."
        "Keep payloads below the `limits.max_frame` in the handshake acknowledgement, or raise \
         the server's `limits.max_frame`.";
    BadMessage "bad_message" No Server
        "A message is not a JSON object, or has a missing, mistyped or out-of-range field."
        "Fix what the message names.";
    TooDeep "too_deep" No Server
        "A message nests more than 129 levels deep, or a stored field more than 60."
        "Send flatter data, or send it as raw bytes.";
    UnknownAction "unknown_action" No Server
        "The server does not know this `action`."
        "Check the spelling, and the server's version in the handshake acknowledgement.";
    InvalidName "invalid_name" No Server
        "A name contains invalid characters or is too long."
        "AppIDs and pools: A-Z a-z 0-9 . _ -; triggers and blocks also : and /.";
    NotReady "not_ready" No Server
        "The first message was not a handshake."
        "Send a handshake and wait for its acknowledgement.";
    AlreadyReady "already_ready" No Server
        "The connection has already completed its handshake."
        "Open another connection for another app.";
    UnsupportedProtocol "unsupported_protocol" No Server
        "The server does not support the protocol version in the handshake."
        "Upgrade the older side.";
    AppInUse "app_in_use" No Server
        "Another instance of the app is connected, and one of the two is exclusive."
        "Stop the other instance, or take over with `\"takeover\":true`.";
    Unauthenticated "unauthenticated" No Server
        "The server could not identify the client."
        "Check what the message names: the keys of the pool or of the app, or the certificate.";
    StaleEpoch "stale_epoch" No Server
        "The encrypted pool has another epoch than the sender or the content."
        "Prove the pool again, and use its newest descriptor.";
    Forbidden "forbidden" No Server
        "The client is not allowed to do this."
        "Use an app, a key or a token that may. Over the Unix socket, the server's own user may \
         do everything that needs no key of a pool.";
    NotMember "not_member" No Server
        "The caller or the destination is not in the pool."
        "Join the pool first, or name it when connecting.";
    NoPool "no_pool" No Server
        "The pool does not exist."
        "Check the name; `latzero pools` lists all pools.";
    PoolExists "pool_exists" No Server
        "A pool with that name already exists, with different properties."
        "Join the existing pool, or choose another name.";
    NoApp "no_app" No Server
        "The server does not know an app with that AppID."
        "Check the AppID; `latzero apps` lists all known apps.";
    NoHandler "no_handler" No Server
        "No connected app serves the trigger in that pool."
        "Start the app that serves it; `latzero apps` lists the triggers of each app.";
    Offline "offline" No Server
        "The destination app is known, but not connected."
        "Start the app, or call without a destination.";
    HandlerGone "handler_gone" Unknown Server
        "The handler disconnected before it answered."
        "Repeat the call if it is safe to run twice.";
    HandlerError "handler_error" Unknown Server
        "The handler failed without a specific error."
        "Check the handler's log.";
    AttemptsExhausted "attempts_exhausted" Unknown Server
        "The handler disconnected during every attempt at a parked or redelivered call."
        "Find out why the handler ends. `latzero parked ls --dead` lists such calls, and `latzero \
         parked retry` runs one again.";
    Timeout "timeout" Unknown Server
        "The call's ttl expired before it was answered."
        "Allow more time, or find out what is slow.";
    Cancelled "cancelled" Unknown Server
        "The caller cancelled the call."
        "Nothing: this was requested.";
    Overloaded "overloaded" No Server
        "A limit was reached: too many calls in flight, or a receiver that does not read."
        "Try again later; if this persists, add handlers or raise the limit that the message \
         names.";
    Draining "draining" No Server
        "The server is shutting down and accepts no new calls."
        "Reconnect and try again.";
    NoCall "no_call" No Server
        "There is no such parked call, or the client may not see it."
        "Check its number; `latzero parked ls` lists all parked calls.";
    NoBlock "no_block" No Server
        "The memory block does not exist."
        "Create it, or check the name.";
    BlockExists "block_exists" No Server
        "A block with that name already exists."
        "Attach to the existing block, or choose another name.";
    OutOfRange "out_of_range" No Server
        "An offset or length is outside the block; nothing was written."
        "Keep offset + length within the block's size.";
    VersionConflict "version_conflict" No Server
        "The block's version is not the one that the writer expected."
        "Read the block again and repeat the change.";
    LayoutMismatch "layout_mismatch" No Server
        "The block's layout is not the one that was requested."
        "Use the layout that the block was created with.";
    Contended "contended" No Server
        "A consistent copy could not be read because the block was written too often."
        "Try again, or create the block with more slots.";
    Locked "locked" No Server
        "Another instance holds the lock."
        "Wait longer, or try again later.";
    LockLost "lock_lost" Unknown Server
        "The lock is no longer held: its lease expired or its holder disconnected."
        "Take the lock again and check what was written.";
    TooLarge "too_large" No Server
        "A size exceeds its limit."
        "Use a smaller size, or raise the limit that the message names.";
    Quota "quota" No Server
        "A quota is exhausted."
        "Remove what is no longer needed, or raise the quota that the message names.";
    Storage "storage" Unknown Server
        "The server could not write to its storage, or a block's memory cannot be used in place."
        "Do what the message says. If the disk failed: check the server's log and its free space.";
    Internal "internal" Unknown Server
        "The server has a bug."
        "Report it, with the server's log.";
    Disconnected "disconnected" Unknown Client
        "The connection ended while a call was in flight."
        "Check that the server runs. The error says whether the call may have run.";
    KeyFormat "key_format" No Client
        "A key or token is malformed."
        "Check the path, and that the key was copied completely.";
    Integrity "integrity" Unknown Client
        "Sealed data failed verification."
        "Do not use it; find out who wrote it.";
    Rollback "rollback" Unknown Client
        "Sealed data is older than a version seen before."
        "Do not use it; find out who restored it.";
    Fork "fork" Unknown Client
        "Sealed data has two conflicting histories."
        "Do not use it; find out who wrote it.";
    Downgrade "downgrade" No Client
        "A peer offers weaker protection than was agreed."
        "Stop, and find out why.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl serde::Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}

/// The refusal of a request: expected, answered and counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// What happened.
    pub code: Code,
    /// What happened and what to do, for people.
    pub message: Cow<'static, str>,
    /// Whether the handler may have run, if more is known than the code says.
    ran: Option<Ran>,
}

impl Refusal {
    /// A refusal with a message for people.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Refusal {
            code,
            message: message.into(),
            ran: None,
        }
    }

    /// The same refusal, with what is known about whether the handler ran.
    #[must_use]
    pub fn with_ran(self, ran: Ran) -> Self {
        Refusal {
            ran: Some(ran),
            ..self
        }
    }

    /// Whether the handler may have run.
    #[must_use]
    pub fn ran(&self) -> Ran {
        self.ran.unwrap_or_else(|| self.code.ran())
    }
}

impl Refusal {
    /// The message for every proof that is not accepted: it never says what was wrong.
    #[must_use]
    pub fn unproved() -> Self {
        Refusal::new(Code::Unauthenticated, "the proof was not accepted")
    }

    /// What a user hears too many of whose proofs were refused.
    #[must_use]
    pub fn too_many_refused() -> Self {
        let message = "too many proofs of yours were refused; wait a minute";
        Refusal::new(Code::Overloaded, message)
    }
}

impl From<crate::name::NameError> for Refusal {
    fn from(error: crate::name::NameError) -> Self {
        Refusal::new(Code::InvalidName, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_back() {
        let mut seen = std::collections::BTreeSet::new();
        for &code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code} twice");
            assert_eq!(Code::parse(code.as_str()), Some(code));
            assert!(
                code.as_str()
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b == b'_')
            );
            assert!(code.meaning().ends_with('.') && code.remedy().ends_with('.'));
        }
        assert_eq!(seen.len(), 45);
    }
}
