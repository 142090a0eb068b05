//! Limits of the protocol itself. Limits of a server are settings and belong to the server.

/// The protocol version that this crate speaks.
pub const PROTOCOL_VERSION: u64 = 1;

/// The port that a server listens on by default.
pub const DEFAULT_PORT: u16 = 45_227;

/// Largest payload of a frame in bytes, unless the handshake acknowledgement names another.
pub const MAX_FRAME_DEFAULT: usize = 16 * 1024 * 1024;

/// How many bytes a server may add to a payload that it forwards (origin, ids). A client accepts
/// frames up to the announced `max_frame` plus this.
pub const FORWARD_SLACK: usize = 16 * 1024;

/// Deepest nesting of JSON arrays and objects in the data of a message.
pub const DATA_DEPTH_MAX: u32 = 128;

/// The same in one message, the envelope included.
pub const JSON_DEPTH_MAX: u32 = DATA_DEPTH_MAX + 1;

/// The same in a field that the server stores and shows inside replies.
pub const FIELD_DEPTH_MAX: u32 = 60;

/// Most fields in one message's envelope.
pub const ENVELOPE_FIELDS_MAX: usize = 64;

/// Longest field name in bytes, as encoded in the message.
pub const FIELD_NAME_BYTES_MAX: usize = 256;

/// Longest string in a field that the server reads, in bytes as encoded in the message. Payloads
/// are not read.
pub const STRING_BYTES_MAX: usize = 8 * 1024;

/// Longest correlation id in bytes.
pub const ID_BYTES_MAX: usize = 128;

/// Largest `headers` object in bytes, as JSON text.
pub const HEADERS_BYTES_MAX: usize = 8 * 1024;

/// Longest `doc` of a trigger in bytes.
pub const DOC_BYTES_MAX: usize = 1024;

/// Longest `schema` of a trigger that every server takes, in bytes as JSON text. A server may be
/// set to take longer ones.
pub const SCHEMA_BYTES_MAX: usize = 4 * 1024;

/// Longest `key` of a sticky call in bytes.
pub const KEY_BYTES_MAX: usize = 1024;

/// A call's time to live in milliseconds, if the caller names none.
pub const TTL_DEFAULT_MS: u64 = 30_000;

/// The longest time to live of a call in milliseconds: 24 hours.
pub const TTL_MAX_MS: u64 = 24 * 60 * 60 * 1000;

/// The longest time to live of a call that may be parked, in milliseconds: 30 days.
pub const PARKED_TTL_MAX_MS: u64 = 30 * 24 * 60 * 60 * 1000;

/// How many times a parked or redelivered call is delivered at most, if its caller names no number.
pub const ATTEMPTS_DEFAULT: u32 = 5;

/// The most attempts that a caller may ask for.
pub const ATTEMPTS_MAX: u32 = 1000;

/// The largest window of a streamed call, in items.
pub const WINDOW_MAX: u64 = 1_000_000;

/// Blocks that one call may name as its arguments.
pub const CALL_BLOCKS_MAX: usize = 16;

/// Largest `expected` and `data` of a compare-and-swap in bytes.
pub const CAS_BYTES_MAX: usize = 64 * 1024;

/// Largest `layout` of a block in bytes, as JSON text.
pub const LAYOUT_BYTES_MAX: usize = 2048;

/// Most AppIDs in one list of a block's permissions.
pub const PERMISSION_APPS_MAX: usize = 64;

/// Bytes of a frame that a reply with a block's bytes reserves for its other fields.
pub const READ_SLACK: usize = 4096;

/// Raw bytes that one reply returns as base64 at most. More would delay other connections: encoding
/// takes several times as long as the copy of an attachment.
pub const READ_AS_BASE64_MAX: usize = 4 * 1024 * 1024;

/// Number of slots of a block with snapshots: least and most.
pub const SLOTS: std::ops::RangeInclusive<u64> = 2..=4;

/// The pool that an app joins when it names none.
pub const DEFAULT_POOL: &str = "default";

/// The pool of the server's built-in app.
pub const SYSTEM_POOL: &str = "system";

/// The AppID of the server's built-in app.
pub const SYSTEM_APP: &str = "latzero";

/// Bounds on the lists of a message, kept while they are read. They are settings of a server.
#[derive(Debug, Clone, Copy)]
pub struct ListBounds {
    /// Pools in one list: of a handshake, or of a trigger.
    pub pools_max: usize,
    /// Triggers in one list.
    pub triggers_max: usize,
    /// Bytes of one list of triggers: names, pools, docs and schemas.
    pub bytes_max: usize,
    /// Bytes of the schema of one trigger.
    pub schema_bytes_max: usize,
}

impl ListBounds {
    /// For lists that were checked when they arrived.
    pub const NONE: ListBounds = ListBounds {
        pools_max: usize::MAX,
        triggers_max: usize::MAX,
        bytes_max: usize::MAX,
        schema_bytes_max: usize::MAX,
    };
}
