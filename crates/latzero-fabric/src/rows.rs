//! Durable state: the rows that the core writes, and reads back at startup.
//!
//! The core emits changes ([`StoreChange`]) and says which reply waits for one. A store writes the
//! changes in the order in which they were emitted, and reports when they are on disk. Texts in
//! rows are JSON that the core writes and reads; a store does not parse them. Times are
//! milliseconds since the Unix epoch.

use latzero_protocol::{AppId, PoolName};

/// A change to the stored rows. Changes apply in the order in which they were made.
#[derive(Debug, Clone, PartialEq)]
pub enum StoreChange {
    /// An app's registration.
    App(Box<AppRow>),
    /// What an app watches and subscribes to, if nothing else of its row changed.
    Watches(AppId, String),
    /// When an app was last connected; 0 while it is connected.
    Seen(AppId, u64),
    /// An app was forgotten.
    ForgetApp(AppId),
    /// The owner of an AppID.
    Binding(Box<BindingRow>),
    /// An AppID no longer has an owner.
    ForgetBinding(AppId),
    /// A pool that stays.
    Pool(Box<PoolRow>),
    /// The descriptor of one epoch of an encrypted pool.
    Descriptor(PoolName, u32, Vec<u8>),
    /// A pool was removed.
    ForgetPool(PoolName),
    /// A call that waits for its handler.
    Call(Box<CallRow>),
    /// A waiting call was delivered: the number of the attempt.
    Attempt(u64, u32),
    /// A waiting call ended, and its caller was notified.
    EndCall(u64),
    /// Waiting calls and answers were removed together.
    EndParked(Vec<u64>),
    /// The answer of a waiting call, stored for its caller; the call itself ended.
    Answer(Box<AnswerRow>),
    /// An answer was delivered to its caller.
    EndAnswer(u64),
}

/// What an app registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppRow {
    /// The AppID.
    pub app_id: AppId,
    /// Its pools, as a list of names.
    pub pools: String,
    /// Its triggers, as a list of objects.
    pub triggers: String,
    /// What it watches and subscribes to.
    pub watches: String,
    /// Its metadata.
    pub meta: Option<String>,
    /// When it was first seen.
    pub registered: u64,
    /// When it was last seen; 0 if it was connected when this was written.
    pub last_seen: u64,
}

/// Whose an AppID is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindingRow {
    /// The AppID.
    pub app_id: AppId,
    /// The user of this machine that owns it while the app is remembered.
    pub uid: Option<u32>,
    /// The key that it must prove.
    pub key: Option<[u8; 32]>,
    /// Since when it is owned.
    pub since: u64,
}

/// A pool that outlives the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolRow {
    /// Its name.
    pub name: PoolName,
    /// The app that created it.
    pub owner: Option<AppId>,
    /// Its policy.
    pub policy: String,
    /// Its properties.
    pub properties: Option<String>,
    /// When it was created.
    pub created: u64,
    /// Whether it outlives the server; if not, only its name is reserved for some time.
    pub is_durable: bool,
    /// The descriptor of its current epoch, if it is encrypted.
    pub descriptor: Option<Vec<u8>>,
}

/// A call that waits for its handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallRow {
    /// Its number; calls are delivered in the order of their numbers.
    pub number: u64,
    /// The pool.
    pub pool: PoolName,
    /// The trigger.
    pub process: String,
    /// The app that is called, if it is called by name.
    pub destination: Option<String>,
    /// Who calls.
    pub caller: AppId,
    /// The caller's id of the call; empty if it wants no answer.
    pub id: String,
    /// The other fields of the call, as one object.
    pub envelope: String,
    /// Its payload, if that is raw bytes.
    pub attachment: Option<Vec<u8>>,
    /// The key by which repeats of it are recognised.
    pub idempotency_key: Option<String>,
    /// When its time to live ends.
    pub expires: u64,
    /// How many times it was delivered.
    pub attempt: u32,
    /// When it was parked.
    pub parked: u64,
    /// Set if every attempt failed.
    pub death: Option<Death>,
}

impl CallRow {
    /// Since when it expires.
    pub(crate) fn death_or_parked(&self) -> u64 {
        self.death.as_ref().map_or(self.parked, |death| death.at)
    }
}

/// The end of a call's last attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// When.
    pub at: u64,
    /// Why.
    pub cause: String,
}

/// An answer that waits for its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerRow {
    /// The number of its call.
    pub number: u64,
    /// The pool.
    pub pool: PoolName,
    /// The trigger; empty in a row of a version before schema 5.
    pub process: String,
    /// Who called.
    pub caller: AppId,
    /// The caller's id of the call.
    pub id: String,
    /// The key by which repeats of the call are recognised.
    pub idempotency_key: Option<String>,
    /// The answer: the length of its JSON text in four bytes (little-endian), the text, and its raw
    /// bytes.
    pub frame: Vec<u8>,
    /// When it expires.
    pub expires: u64,
}
