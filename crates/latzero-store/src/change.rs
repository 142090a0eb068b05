//! A change of one record (or of two related ones), and the key by which a newer change replaces an
//! older one.

use crate::rows::{AnswerRow, AppRow, BindingRow, BlockRow, CallRow, DescriptorRow, PoolRow};

/// One change. Each may be written twice with the same result as once, so that it can be tried
/// again after a failure whose outcome is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowChange {
    /// Adds an app or replaces what is known of it.
    PutApp(AppRow),
    /// What an app watches and subscribes to; an unknown app is ignored.
    AppWatches {
        /// Which app.
        app_id: String,
        /// What, as the row has it.
        watches: String,
    },
    /// An app was last connected at `last_seen` (unix ms). The latest value counts; an unknown app
    /// is ignored.
    SeenApp {
        /// Which app.
        app_id: String,
        /// When, in unix ms.
        last_seen: i64,
    },
    /// Removes an app.
    ForgetApp {
        /// Which app.
        app_id: String,
    },
    /// Sets the owner of an AppID.
    PutBinding(BindingRow),
    /// Removes the owner of an AppID.
    RemoveBinding {
        /// Which.
        app_id: String,
    },
    /// Adds or replaces a pool.
    PutPool(PoolRow),
    /// Adds or replaces the descriptor of one epoch of a pool.
    PutDescriptor(DescriptorRow),
    /// Removes a pool with its descriptors, calls and answers; the caller removes its blocks.
    RemovePool {
        /// Which pool.
        name: String,
    },
    /// Adds or replaces a block's record.
    PutBlock(BlockRow),
    /// Removes a block's record.
    RemoveBlock {
        /// The block's pool.
        pool: String,
        /// The block's name in its pool.
        block_id: String,
    },
    /// Parks a call.
    PutCall(CallRow),
    /// A parked call was delivered for the `attempt`-th time. An unknown call is ignored.
    NoteAttempt {
        /// The call's number.
        number: u64,
        /// How often it was delivered.
        attempt: u32,
    },
    /// Removes a parked call.
    RemoveCall {
        /// The call's number.
        number: u64,
    },
    /// Removes parked calls and answers.
    RemoveParked {
        /// Their numbers.
        numbers: Vec<u64>,
    },
    /// Stores an answer and removes the call that it ends, both or neither.
    PutAnswer {
        /// The answer.
        answer: AnswerRow,
        /// The parked call that ends with it.
        ends_call: Option<u64>,
    },
    /// Removes an answer.
    RemoveAnswer {
        /// The answer's number.
        number: u64,
    },
    /// Sets a server setting.
    PutSetting {
        /// Its name.
        key: String,
        /// Its value.
        value: String,
    },
}

/// The key of a change. A later eventual change replaces an earlier one with the same key.
///
/// Parts of a row that change separately have separate keys: they follow the change of the row and
/// never replace it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    App(String),
    AppWatches(String),
    AppSeen(String),
    Binding(String),
    Pool(String),
    Descriptor(String, u32),
    Block(String, String),
    Call(u64),
    Attempt(u64),
    Answer(u64),
    /// The first of several.
    Parked(Option<u64>),
    Setting(String),
}

/// Which eventual changes are dropped first when too many wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Worth {
    /// A time that is stored again the next time that the app is seen.
    Seen,
    /// A count that is only a hint to handlers.
    Attempt,
    /// Never dropped: the new change is refused instead.
    Kept,
}

impl RowChange {
    pub(crate) fn key(&self) -> Key {
        match self {
            Self::PutApp(row) => Key::App(row.app_id.clone()),
            Self::ForgetApp { app_id } => Key::App(app_id.clone()),
            Self::AppWatches { app_id, .. } => Key::AppWatches(app_id.clone()),
            Self::SeenApp { app_id, .. } => Key::AppSeen(app_id.clone()),
            Self::PutBinding(row) => Key::Binding(row.app_id.clone()),
            Self::RemoveBinding { app_id } => Key::Binding(app_id.clone()),
            Self::PutPool(row) => Key::Pool(row.name.clone()),
            Self::PutDescriptor(row) => Key::Descriptor(row.pool.clone(), row.epoch),
            Self::RemovePool { name } => Key::Pool(name.clone()),
            Self::PutBlock(row) => Key::Block(row.pool.clone(), row.block_id.clone()),
            Self::RemoveBlock { pool, block_id } => Key::Block(pool.clone(), block_id.clone()),
            Self::PutCall(row) => Key::Call(row.number),
            Self::RemoveCall { number } => Key::Call(*number),
            Self::NoteAttempt { number, .. } => Key::Attempt(*number),
            Self::PutAnswer { answer, .. } => Key::Answer(answer.number),
            Self::RemoveAnswer { number } => Key::Answer(*number),
            Self::RemoveParked { numbers } => Key::Parked(numbers.first().copied()),
            Self::PutSetting { key, .. } => Key::Setting(key.clone()),
        }
    }

    pub(crate) fn worth(&self) -> Worth {
        match self {
            Self::SeenApp { .. } => Worth::Seen,
            Self::NoteAttempt { .. } => Worth::Attempt,
            _ => Worth::Kept,
        }
    }

    /// Whether this must be written although a later change of its key waits: it changes another
    /// row as well.
    pub(crate) fn reaches_further(&self) -> bool {
        matches!(
            self,
            Self::PutAnswer {
                ends_call: Some(_),
                ..
            } | Self::RemovePool { .. }
                | Self::RemoveParked { .. }
        )
    }

    /// For messages: which record, without its contents.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::PutApp(row) => format!("app {}", row.app_id),
            Self::AppWatches { app_id, .. }
            | Self::SeenApp { app_id, .. }
            | Self::ForgetApp { app_id } => format!("app {app_id}"),
            Self::PutBinding(row) => format!("binding of app {}", row.app_id),
            Self::RemoveBinding { app_id } => format!("binding of app {app_id}"),
            Self::PutPool(row) => format!("pool {}", row.name),
            Self::PutDescriptor(row) => format!("epoch {} of pool {}", row.epoch, row.pool),
            Self::RemovePool { name } => format!("pool {name}"),
            Self::PutBlock(row) => format!("block {} of pool {}", row.block_id, row.pool),
            Self::RemoveBlock { pool, block_id } => format!("block {block_id} of pool {pool}"),
            Self::PutCall(row) => format!("call {}", row.number),
            Self::NoteAttempt { number, .. } | Self::RemoveCall { number } => {
                format!("call {number}")
            }
            Self::PutAnswer { answer, .. } => format!("answer {}", answer.number),
            Self::RemoveAnswer { number } => format!("answer {number}"),
            Self::RemoveParked { numbers } => format!("{} parked calls", numbers.len()),
            Self::PutSetting { key, .. } => format!("setting {key}"),
        }
    }
}
