//! Descriptions of the store for `health`, `status` and `doctor`, and of the contents of a backup.

use std::time::Duration;

use latzero_server::maintenance::Summary;
use serde_json::{Value, json};

use crate::output::{ago, bytes, count, time};

/// The contents of a backup, as the server reports them.
pub(crate) fn to_json(summary: &Summary) -> Value {
    json!({
        "made": summary.made, "schema": summary.schema, "apps": summary.apps,
        "pools": summary.pools,
        "calls": summary.calls, "answers": summary.answers, "blocks": summary.blocks,
        "block_files": summary.block_files, "block_bytes": summary.block_bytes,
    })
}

/// The contents of a backup, as text.
pub(crate) fn contents(holds: &Value) -> String {
    let number = |field: &str| holds[field].as_u64().unwrap_or(0);
    let mut parts = vec![
        count(number("apps"), "app"),
        count(number("pools"), "durable pool"),
        count(number("calls"), "parked call"),
    ];
    if number("answers") > 0 {
        parts.push(count(number("answers"), "kept answer"));
    }
    let blocks = count(number("block_files"), "persistent block");
    parts.push(match number("block_files") {
        0 => blocks,
        _ => format!("{blocks} ({})", bytes(number("block_bytes"))),
    });
    parts.join(", ")
}

/// When a backup was made.
pub(crate) fn creation_time(summary: &Summary) -> String {
    ago(u64::try_from(summary.made).unwrap_or(0))
}

/// How long something took, as the server measured it.
pub(crate) fn duration(done: &Value) -> String {
    match done["took_ms"].as_u64().unwrap_or(0) {
        0 => "less than 1 ms".to_owned(),
        ms => time(Duration::from_millis(ms)),
    }
}

/// What `health` reports about the store, one sentence each, the worst first.
pub(crate) fn sentences(seen: &Value) -> Vec<String> {
    let mut sentences = Vec::new();
    let waiting = seen["retained"].as_u64().unwrap_or(0);
    if let Some(reason) = seen["failing"].as_str() {
        let since = seen["failing_since"].as_u64().map(ago);
        let since = since.unwrap_or_else(|| "just now".to_owned());
        sentences.push(format!("failing, first {since}: {reason}"));
        // Shown only while writes fail: otherwise a few changes are always on their way.
        sentences.push(format!("{} not on disk yet", count(waiting, "change")));
    }
    sentences.push(match seen["last_backup"].as_u64() {
        Some(unix_ms) => format!("last backup {}", ago(unix_ms)),
        None => "no backup yet".to_owned(),
    });
    sentences
}

/// The losses that `health` reports for one component or for all, one sentence each.
pub(crate) fn losses(health: &Value, of: Option<&str>) -> Vec<String> {
    let shown = health["losses"].as_array().into_iter().flatten();
    let shown = shown.filter(|loss| of.is_none_or(|part| loss["component"] == part));
    let text = |loss: &Value, field: &str| loss[field].as_str().unwrap_or("").to_owned();
    shown
        .map(|loss| {
            format!(
                "{}: {}; {}",
                text(loss, "affected"),
                text(loss, "happened"),
                text(loss, "remedy")
            )
        })
        .collect()
}

/// How many losses `health` counts without describing them.
pub(crate) fn further_losses(health: &Value) -> Option<String> {
    let named = health["losses"].as_array().map_or(0, Vec::len) as u64;
    let further = health["losses_total"]
        .as_u64()
        .unwrap_or(0)
        .saturating_sub(named);
    (further > 0).then(|| format!("and {further} more; see `latzero logs`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_come_first() {
        let check = |seen: Value, expected: &[&str]| assert_eq!(sentences(&seen), expected);
        check(
            json!({"retained": 3, "last_backup": null}),
            &["no backup yet"],
        );
        check(
            json!({
                "retained": 2, "last_backup": 0, "failing": "disk full", "failing_since": u64::MAX,
            }),
            &[
                "failing, first just now: disk full",
                "2 changes not on disk yet",
                &format!("last backup {}", ago(0)),
            ],
        );
    }

    #[test]
    fn losses_say_what_happened_and_what_to_do() {
        let health = json!({"losses_total": 3, "losses": [
            {"component": "memory", "affected": "block 'b'", "happened": "it is gone",
                "remedy": "restore a backup"},
            {"component": "store", "affected": "data.db", "happened": "it was damaged",
                "remedy": "look"},
        ]});
        assert_eq!(
            losses(&health, Some("memory")),
            ["block 'b': it is gone; restore a backup"]
        );
        assert_eq!(losses(&health, None).len(), 2);
        assert_eq!(
            further_losses(&health).unwrap(),
            "and 1 more; see `latzero logs`"
        );
        assert_eq!(further_losses(&json!({})), None);
    }
}
