//! Error codes: the closed list of the protocol, with what each means and what to do about it.
//!
//! `docs/errors.md` is generated from this table (`cargo xtask codegen`), and the tables of other languages will be
//! too. A code never changes its meaning and is never reused.

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
    BadFrame "bad_frame" No Server "The first bytes of a connection are not a frame: an empty one, not UTF-8, not JSON, or not an object. The connection is closed."
        "Send a four-byte big-endian length and then one JSON object of that length. Something that speaks HTTP or TLS does not belong on this port.";
    FrameTooLarge "frame_too_large" No Server "A frame announced more bytes than the limit. The connection is closed before anything is buffered."
        "Keep payloads under `limits.max_frame` of the handshake acknowledgement, or raise the server's `limits.max_frame`.";
    BadMessage "bad_message" No Server "A message is not a JSON object, or has a missing, mistyped or out-of-range field."
        "Correct what the message names.";
    TooDeep "too_deep" No Server "A message nests more than 64 levels deep."
        "Send flatter data, or send it as raw bytes.";
    UnknownAction "unknown_action" No Server "The server does not know this `action`."
        "Check the spelling, and the server's version in the handshake acknowledgement.";
    InvalidName "invalid_name" No Server "A name has characters or a length that the protocol does not allow."
        "AppIDs and pools: A-Z a-z 0-9 . _ -; triggers and blocks also : and /.";
    NotReady "not_ready" No Server "Something other than a handshake came first."
        "Send a handshake and wait for its acknowledgement.";
    AlreadyReady "already_ready" No Server "A second handshake came on one connection."
        "Open another connection for another app.";
    UnsupportedProtocol "unsupported_protocol" No Server "The handshake asks for a protocol version that the server does not speak."
        "Upgrade the older side.";
    AppInUse "app_in_use" No Server "Another instance of the app lives, and one of the two wants to be alone."
        "Stop the other instance, or take over with `\"takeover\":true`.";
    Unauthenticated "unauthenticated" No Server "The server could not tell who asks."
        "Connect over the Unix socket, or prove the app's key.";
    StaleEpoch "stale_epoch" No Server "The encrypted pool has another epoch than the sender or the content."
        "Prove the pool again, and take its newest descriptor.";
    Forbidden "forbidden" No Server "Who asks may not do this."
        "Use the Unix socket as the server's own user, or the admin token of its data directory.";
    NotMember "not_member" No Server "The caller or the destination is not in the pool."
        "Join the pool first: name it in the handshake or send `pool_join`.";
    NoPool "no_pool" No Server "There is no such pool."
        "Check its name; `latzero pools` lists what there is.";
    PoolExists "pool_exists" No Server "A pool of that name exists with other properties."
        "Join it, or choose another name.";
    NoApp "no_app" No Server "No app of that AppID was ever seen."
        "Check the AppID; `latzero apps` lists what there is.";
    NoHandler "no_handler" No Server "No live app serves the trigger in that pool."
        "Start the app that serves it; `latzero apps` shows who serves what.";
    Offline "offline" No Server "The destination is known, but no instance of it lives."
        "Start it, or call without a destination.";
    HandlerGone "handler_gone" Unknown Server "The handler's connection ended before it answered."
        "Repeat the call if it may run twice.";
    HandlerError "handler_error" Unknown Server "The handler failed without saying more."
        "Look at the handler's own log.";
    AttemptsExhausted "attempts_exhausted" Unknown Server "Every attempt at a parked or redelivered call ended with its handler's connection."
        "Find out why the handler dies. `latzero parked ls --dead` lists such calls, and `latzero parked retry` runs one again.";
    Timeout "timeout" Unknown Server "The call's time to live ended before an answer came."
        "Give the call a longer ttl, or find out why its handler is slow.";
    Cancelled "cancelled" Unknown Server "The caller cancelled the call."
        "Nothing: this is what was asked for.";
    Overloaded "overloaded" No Server "A limit was reached: too many calls in flight, or a receiver that does not read."
        "Wait and repeat; if it lasts, add handlers or raise the limit that the message names.";
    Draining "draining" No Server "The server is about to stop and takes no new calls."
        "Reconnect and repeat.";
    NoCall "no_call" No Server "There is no such parked call, or the asker may not see it."
        "Check its number; `latzero parked ls` lists what there is.";
    NoBlock "no_block" No Server "There is no such memory block."
        "Create it, or check its name.";
    BlockExists "block_exists" No Server "A block of that name exists."
        "Attach it, or choose another name.";
    OutOfRange "out_of_range" No Server "An offset or length lies outside the block; nothing was written."
        "Keep offset + length within the block's size.";
    VersionConflict "version_conflict" No Server "The block has another version than the writer expected."
        "Read it again and repeat the change.";
    LayoutMismatch "layout_mismatch" No Server "The block has another layout than the one asked for."
        "Use the layout that the block was created with.";
    Contended "contended" No Server "A consistent copy could not be had because writers were too busy."
        "Repeat, or give the block more slots.";
    Locked "locked" No Server "Somebody else holds the lock."
        "Wait longer, or try again later.";
    LockLost "lock_lost" Unknown Server "The lock is no longer held: its lease ended or its holder's connection did."
        "Take the lock again and check what was written.";
    TooLarge "too_large" No Server "A size is over its limit."
        "Ask for less, or raise the limit that the message names.";
    Quota "quota" No Server "A quota is used up."
        "Remove what is no longer needed, or raise the quota that the message names.";
    Storage "storage" Unknown Server "The server could not write to its storage."
        "Look at the server's log, and at the free space of its data directory.";
    Internal "internal" Unknown Server "The server failed in a way that it should not."
        "Report it, with the server's log.";
    Disconnected "disconnected" Unknown Client "The connection ended while a call was in flight."
        "The client reconnects by itself; the error says whether the call may have run.";
    KeyFormat "key_format" No Client "A key or token is not well formed."
        "Check that it was copied whole.";
    Integrity "integrity" Unknown Client "Sealed data does not verify."
        "Do not use it; find out who wrote it.";
    Rollback "rollback" Unknown Client "Sealed data is older than what was seen before."
        "Do not use it; find out who restored it.";
    Fork "fork" Unknown Client "Sealed data has two histories."
        "Do not use it; find out who wrote it.";
    Downgrade "downgrade" No Client "A peer offers less protection than was agreed."
        "Do not go on; find out why.";
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

/// A request that can't be granted: expected, answered, counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    /// What happened.
    pub code: Code,
    /// What happened and what to do, for people.
    pub message: Cow<'static, str>,
    /// Whether the handler may have run, where more is known than the code says.
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

    /// The same refusal, of a call of which more is known than its code says.
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
    /// What everybody hears whose proof was not accepted, whatever was wrong with it.
    #[must_use]
    pub fn unproved() -> Self {
        Refusal::new(Code::Unauthenticated, "the proof was not accepted")
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
