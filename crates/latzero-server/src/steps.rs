//! Detects jumps of the wall clock, so that stored deadlines do not move with it.
//!
//! Deadlines of parked calls are stored on a steady clock: the wall clock without its jumps. While
//! the server runs, the monotonic clock shows a jump. Over a restart it is the time since boot, as
//! `/proc/uptime` has it (proc_uptime(5)), with a record of all clocks in the database. After a
//! reboot only the wall clock is left.

use serde_json::{Value, json};

use latzero_fabric::Now;

use crate::shared::ServerState;

/// A smaller difference is a clock that is being adjusted, or rounding, in milliseconds.
const JUMP_MS: i64 = 1000;

/// The difference between the wall clock and the monotonic clock, as it was seen last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Watch {
    offset_ms: i64,
}

impl Watch {
    pub(crate) fn new(now: Now) -> Watch {
        Watch {
            offset_ms: offset(now),
        }
    }

    /// Detects a jump since the last check; returns whether there was one.
    pub(crate) fn check(&mut self, now: Now, shared: &ServerState) -> bool {
        let jump = offset(now) - self.offset_ms;
        if jump.abs() < JUMP_MS {
            return false;
        }
        self.offset_ms += jump;
        note(jump, "while the server ran", shared);
        shared.storage.persistence.note_clock(&record(shared));
        true
    }
}

fn offset(now: Now) -> i64 {
    let ms = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    ms(now.unix_ms) - ms(now.monotonic.0 / 1000)
}

fn note(jump_ms: i64, when: &str, shared: &ServerState) {
    let ahead_ms = shared.clock.ahead_ms().saturating_add(jump_ms);
    shared.clock.set_ahead_ms(ahead_ms);
    tracing::warn!(
        jump_ms,
        "the clock of the machine was changed {when}; the deadlines of parked calls do not move"
    );
}

/// All clocks at this moment, for the next start.
pub(crate) fn record(shared: &ServerState) -> String {
    let now = shared.clock.read();
    json!({
        "boot": shared.storage.persistence.boot_id(), "since_boot_ms": since_boot_ms(),
        "unix_ms": now.unix_ms, "ahead_ms": shared.clock.ahead_ms(),
    })
    .to_string()
}

/// Continues the steady clock of the run that left this record.
pub(crate) fn restore(left: &str, shared: &ServerState) {
    let left: Value = serde_json::from_str(left).unwrap_or_default();
    let number = |name: &str| left[name].as_i64();
    shared.clock.set_ahead_ms(number("ahead_ms").unwrap_or(0));
    let boot = shared.storage.persistence.boot_id();
    if boot.is_empty() || left["boot"] != boot {
        return;
    }
    let (Some(then), Some(unix_then), Some(now)) =
        (number("since_boot_ms"), number("unix_ms"), since_boot_ms())
    else {
        return;
    };
    let unix_now = i64::try_from(shared.clock.read().unix_ms).unwrap_or(i64::MAX);
    let jump = (unix_now - unix_then).saturating_sub(now - then);
    if jump.abs() >= JUMP_MS {
        note(jump, "while the server did not run", shared);
    }
}

/// Milliseconds since the machine booted, including its sleep; none if the system does not report
/// it.
fn since_boot_ms() -> Option<i64> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    let (seconds, hundredths) = text.split_whitespace().next()?.split_once('.')?;
    let (seconds, hundredths): (i64, i64) = (seconds.parse().ok()?, hundredths.parse().ok()?);
    Some(seconds * 1000 + hundredths * 10)
}
