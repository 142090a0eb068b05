//! The list of losses, things that were lost or do not work as configured, for `health`, `status`
//! and the log.
//!
//! A component that finds a loss calls [`Losses::note`] once and continues. The loss is logged and
//! shown by `health`. It survives a crash of the server, until it is [settled](Losses::settle) or
//! the server is stopped in an orderly way.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Losses that are listed individually. Others are counted, and are in the log.
const LOSSES_MAX: usize = 200;

/// Bytes of one text of a loss. What comes from a file's name or an error may be long.
const TEXT_BYTES_MAX: usize = 1000;

/// The part of the server that a loss belongs to, as `health` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Part {
    /// The database, its backups and the data directory.
    Store,
    /// Memory blocks.
    Memory,
    /// The server's log and the audit log.
    Logs,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Store => "store",
            Part::Memory => "memory",
            Part::Logs => "logs",
        }
    }
}

/// Something that is lost, damaged, or not kept as promised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Loss {
    pub(crate) part: Part,
    /// What it is about, such as `block 'samples' of pool 'lab'`. A later loss of the same part and
    /// name replaces this one.
    pub(crate) affected: String,
    /// What happened, in one clause.
    pub(crate) happened: String,
    /// What a person can do about it, in one clause.
    pub(crate) remedy: String,
    /// Not stored, because the next run checks it again.
    #[serde(skip)]
    is_passing: bool,
}

impl Loss {
    pub(crate) fn new(
        part: Part,
        affected: impl Into<String>,
        happened: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Loss {
        Loss {
            part,
            affected: bounded(affected.into()),
            happened: bounded(happened.into()),
            remedy: bounded(remedy.into()),
            is_passing: false,
        }
    }

    /// The same loss, of something that is checked regularly: it is not kept after a crash.
    pub(crate) fn passing(self) -> Loss {
        Loss {
            is_passing: true,
            ..self
        }
    }
}

/// All known losses.
#[derive(Debug, Default)]
pub(crate) struct LossList(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// By part and name.
    losses: BTreeMap<(Part, String), Since>,
    /// The number of losses that had no room, by component.
    further: BTreeMap<Part, u64>,
    is_changed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Since {
    #[serde(flatten)]
    loss: Loss,
    /// Unix ms.
    since: u64,
}

impl LossList {
    /// Logs a loss and keeps it. Repeating it changes and logs nothing.
    pub(crate) fn note(&self, loss: Loss) {
        if self.known().insert(loss.clone(), unix_ms()) {
            let Loss {
                affected,
                happened,
                remedy,
                ..
            } = loss;
            tracing::error!(part = loss.part.name(), "{affected}: {happened}; {remedy}");
        }
    }

    /// A loss was repaired.
    pub(crate) fn settle(&self, part: Part, affected: &str) {
        let mut known = self.known();
        let settled = known.losses.remove(&(part, affected.to_owned()));
        known.is_changed |= settled.as_ref().is_some_and(|known| !known.loss.is_passing);
        drop(known);
        if settled.is_some() {
            tracing::info!(part = part.name(), "{affected}: recovered");
        }
    }

    /// Whether a component has no losses.
    pub(crate) fn is_none_of(&self, part: Part) -> bool {
        let known = self.known();
        !known.further.contains_key(&part) && !known.losses.keys().any(|(of, _)| *of == part)
    }

    /// The losses as `health` shows them, and how many there are.
    pub(crate) fn to_json(&self) -> (Value, u64) {
        let known = self.known();
        let shown = known.losses.values();
        let shown: Vec<Value> = shown
            .map(|Since { loss, since }| {
                json!({
                    "component": loss.part.name(), "affected": loss.affected,
                    "happened": loss.happened, "remedy": loss.remedy, "since": since,
                })
            })
            .collect();
        let total = shown.len() as u64 + known.further.values().sum::<u64>();
        (shown.into(), total)
    }

    /// The losses as text for the next run, if they changed since the last call.
    pub(crate) fn changed(&self) -> Option<String> {
        let mut known = self.known();
        if !std::mem::take(&mut known.is_changed) {
            return None;
        }
        let lasting = known.losses.values().filter(|known| !known.loss.is_passing);
        let losses: Vec<&Since> = lasting.collect();
        serde_json::to_string(&losses).ok()
    }

    /// Loads the losses of a run that did not stop in an orderly way. Invalid text is ignored.
    pub(crate) fn load(&self, text: &str) {
        let earlier: Vec<Since> = serde_json::from_str(text).unwrap_or_default();
        let mut known = self.known();
        for Since { loss, since } in earlier {
            let Loss {
                part,
                affected,
                happened,
                remedy,
                is_passing: _,
            } = loss;
            known.insert(Loss::new(part, affected, happened, remedy), since);
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0
            .lock()
            .expect("no thread panics while holding this lock")
    }
}

impl Known {
    /// Says whether it was news.
    fn insert(&mut self, loss: Loss, since: u64) -> bool {
        let has_room = self.losses.len() < LOSSES_MAX;
        let is_persistent = !loss.is_passing;
        let name = (loss.part, loss.affected.clone());
        match self.losses.get_mut(&name) {
            Some(known) if known.loss == loss => return false,
            Some(known) => known.loss = loss,
            None if has_room => {
                self.losses.insert(name, Since { loss, since });
            }
            None => *self.further.entry(loss.part).or_default() += 1,
        }
        self.is_changed |= is_persistent;
        true
    }
}

fn bounded(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX)
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(affected: &str, happened: &str) -> Loss {
        Loss::new(Part::Memory, affected, happened, "restore a backup")
    }

    #[test]
    fn a_loss_is_shown_until_it_is_resolved() {
        let losses = LossList::default();
        losses.note(loss("block 'b'", "its file is missing"));
        losses.note(loss("block 'b'", "its file is damaged"));
        let (shown, total) = losses.to_json();
        assert_eq!(total, 1);
        assert_eq!(shown[0]["happened"], "its file is damaged");
        assert_eq!(shown[0]["component"], "memory");
        assert!(losses.is_none_of(Part::Store) && !losses.is_none_of(Part::Memory));
        losses.settle(Part::Store, "block 'b'");
        assert!(!losses.is_none_of(Part::Memory));
        losses.settle(Part::Memory, "block 'b'");
        assert!(losses.is_none_of(Part::Memory));
    }

    #[test]
    fn the_next_run_knows_the_losses() {
        let losses = LossList::default();
        assert_eq!(losses.changed(), None);
        losses.note(loss("block 'b'", "its file is missing"));
        let text = losses.changed().unwrap();
        assert_eq!(losses.changed(), None);
        losses.note(loss("block 'b'", "its file is missing"));
        assert_eq!(losses.changed(), None, "nothing is new");
        losses.note(loss("directory", "it is away").passing());
        assert_eq!(losses.changed(), None, "the next run checks again");
        losses.settle(Part::Memory, "directory");
        assert_eq!(losses.changed(), None);
        let next = LossList::default();
        next.load(&text);
        assert_eq!(next.to_json(), losses.to_json());
        next.load("no JSON");
        assert_eq!(next.to_json().1, 1);
    }

    #[test]
    fn losses_are_bounded() {
        let losses = LossList::default();
        for n in 0..LOSSES_MAX + 5 {
            losses.note(loss(&format!("block {n}"), &"é".repeat(TEXT_BYTES_MAX)));
        }
        let (shown, total) = losses.to_json();
        assert_eq!(shown.as_array().unwrap().len(), LOSSES_MAX);
        assert_eq!(total, LOSSES_MAX as u64 + 5);
        let text = shown[0]["happened"].as_str().unwrap();
        assert!(
            text.len() <= TEXT_BYTES_MAX + '…'.len_utf8(),
            "{}",
            text.len()
        );
    }
}
