//! Requests about parked calls: list, show and change them.

use crate::envelope::{Envelope, mistyped};
use crate::error::{Code, Refusal};
use crate::limits::PARKED_TTL_MAX_MS;
use crate::message::{Fields, Page};
use crate::name::{AppId, PoolName, TriggerName};

/// The state of a parked call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParkedState {
    /// It waits for a handler.
    Waiting,
    /// An attempt failed; it waits for the next attempt.
    Paused,
    /// A handler has it.
    Running,
    /// Every attempt failed.
    Dead,
    /// It is over, and its answer waits for the caller.
    Answered,
}

impl ParkedState {
    /// Every state.
    pub const ALL: [ParkedState; 5] = [
        ParkedState::Waiting,
        ParkedState::Paused,
        ParkedState::Running,
        ParkedState::Dead,
        ParkedState::Answered,
    ];

    /// The word on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ParkedState::Waiting => "waiting",
            ParkedState::Paused => "paused",
            ParkedState::Running => "running",
            ParkedState::Dead => "dead",
            ParkedState::Answered => "answered",
        }
    }

    /// Reads the word on the wire.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}

/// Selects parked calls: those that match every field that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParkedFilter {
    /// The pool.
    pub pool: Option<PoolName>,
    /// The app that called.
    pub app: Option<AppId>,
    /// The trigger.
    pub process: Option<TriggerName>,
    /// The call's state.
    pub state: Option<ParkedState>,
    /// Its number.
    pub number: Option<u64>,
}

/// A change to parked calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParkedChange {
    /// Cancel calls that wait, pause or run.
    Cancel,
    /// Run dead calls again, each with this time to live in milliseconds.
    Retry(u64),
    /// Delete dead calls, and answers that nobody fetched.
    Purge,
}

impl ParkedChange {
    /// Whether it applies to a call in this state.
    #[must_use]
    pub fn applies_to(self, state: ParkedState) -> bool {
        match state {
            ParkedState::Waiting | ParkedState::Paused | ParkedState::Running => {
                self == ParkedChange::Cancel
            }
            ParkedState::Dead => self != ParkedChange::Cancel,
            ParkedState::Answered => self == ParkedChange::Purge,
        }
    }
}

/// What to do with the selected calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParkedAction {
    /// List them in the order of their numbers.
    List {
        /// Only numbers after this one.
        after: u64,
        /// Most entries in the reply.
        limit: usize,
    },
    /// Show one, with its payload.
    Show,
    /// Change them.
    Change(ParkedChange),
}

/// A request about parked calls.
#[derive(Debug)]
pub struct Parked {
    /// What to do.
    pub action: ParkedAction,
    /// The calls that it applies to.
    pub filter: ParkedFilter,
}

/// The default time to live of a call that is run again, in milliseconds: a day.
pub const RETRY_TTL_DEFAULT_MS: u64 = 24 * 3_600_000;

pub(crate) fn decode(e: &Envelope<'_>, action: &str) -> Result<Parked, Refusal> {
    let fields = Fields::of_message(e)?;
    let number = |name: &str, range| Envelope::number(fields.field(name), name, range);
    let state = fields.string("state")?;
    let state = match state.as_deref() {
        None => None,
        Some(text) => Some(ParkedState::parse(text).ok_or_else(|| {
            let expected = "one of \"waiting\", \"paused\", \"running\", \"dead\", \"answered\"";
            mistyped(
                "state",
                expected,
                fields.field("state").expect("it was read"),
            )
        })?),
    };
    let filter = ParkedFilter {
        pool: fields
            .string("pool")?
            .map(|n| PoolName::new(&n))
            .transpose()?,
        app: fields
            .string("app_id")?
            .map(|n| AppId::new(&n))
            .transpose()?,
        process: fields
            .string("process")?
            .map(|n| TriggerName::new(&n))
            .transpose()?,
        state,
        number: number("number", 0..=u64::MAX)?,
    };
    let action = match action {
        "parked_list" => {
            let most = Page::LIMIT_MAX as u64;
            let limit = number("limit", 1..=most)?.unwrap_or(most);
            ParkedAction::List {
                after: number("after", 0..=u64::MAX)?.unwrap_or(0),
                limit: usize::try_from(limit).unwrap_or(Page::LIMIT_MAX),
            }
        }
        "parked_info" => ParkedAction::Show,
        "parked_cancel" => ParkedAction::Change(ParkedChange::Cancel),
        "parked_retry" => {
            let ttl = number("ttl", 1..=PARKED_TTL_MAX_MS)?.unwrap_or(RETRY_TTL_DEFAULT_MS);
            ParkedAction::Change(ParkedChange::Retry(ttl))
        }
        "parked_purge" => ParkedAction::Change(ParkedChange::Purge),
        other => return Err(crate::message::unknown(other)),
    };
    let is_of_one = filter.number.is_some();
    if action == ParkedAction::Show && !is_of_one {
        return Err(crate::envelope::missing("number", "a whole number"));
    }
    if matches!(action, ParkedAction::Change(_)) && filter == ParkedFilter::default() {
        let message = "select the calls by 'number', or by 'pool', 'app_id', 'process' or 'state'";
        return Err(Refusal::new(Code::BadMessage, message));
    }
    Ok(Parked { action, filter })
}
