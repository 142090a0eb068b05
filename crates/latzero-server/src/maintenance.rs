//! Backups and checks of the database, on request or on a schedule. Both take as long as the disk
//! does, so they run on a separate thread, one at a time. [`Offline`] does the same without a
//! server.

mod backups;
mod offline;

pub use backups::{BackupEntry, Depth, files, inspect, list_one};
pub use latzero_store::{BackupError, OpenError, Summary};
pub use offline::{MaintenanceError, Offline, Restored, dump_backup};

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use latzero_protocol::message::AdminAction;
use latzero_protocol::{Code, Refusal};
use latzero_store::{Answer, Policy, QueryLimits, Value as Cell};
use serde_json::{Value, json};

use crate::mailbox::Command;
use crate::peer::Peer;
use crate::shared::ServerState;
use crate::socket::User;

/// How often to store the heartbeat and to check whether a backup is due, in milliseconds.
pub(crate) const CHECK_EVERY_MS: u64 = 30_000;

/// Stores the heartbeat, and starts a backup if one is due.
pub(crate) fn run_schedule(shared: &Arc<ServerState>, now: latzero_fabric::Time) {
    let unix_ms = shared.clock.unix_ms(now);
    shared.storage.persistence.note_alive(unix_ms);
    shared
        .storage
        .persistence
        .note_clock(&crate::steps::record(shared));
    crate::blocks::end_grace(shared, now);
    shared.storage.persistence.store_losses();
    let interval = shared.settings().backup_interval.as_millis() as u64;
    if !shared.storage.persistence.is_backup_due(now, interval) {
        return;
    }
    let begun = run(shared, |shared| {
        if let Err(error) = backup(shared, None, false) {
            tracing::error!(%error, "the backup failed; the last one is kept");
        }
        None
    });
    if let Err(error) = begun {
        tracing::warn!(%error, "the scheduled backup was skipped");
    }
}

/// Starts what an administrator requested; the thread sends the reply.
///
/// # Errors
/// `overloaded` if a backup or check is already in progress.
pub(crate) fn begin(
    shared: &Arc<ServerState>,
    action: AdminAction,
    asker: &Arc<Peer>,
    id: Option<&str>,
) -> Result<(), Refusal> {
    if let AdminAction::Backup { to: Some(_), .. } = &action {
        check_may_write(asker)?;
    }
    let (asker, id) = (Arc::clone(asker), id.map(Box::from));
    run(shared, move |shared| {
        let result = match action {
            AdminAction::Backup { to, without_blocks } => {
                backup(shared, to.map(PathBuf::from).as_deref(), without_blocks)
            }
            AdminAction::QueryDatabase(sql) => query(shared, &sql),
            AdminAction::CheckDatabase(is_thorough) => check(shared, is_thorough),
            _ => unreachable!("no other action is slow"),
        };
        id.map(|id| (asker, id, result))
    })
}

/// Whether the client may choose a file for the server to write: only the server's user, or root,
/// who can write files anyway. The admin token is not enough.
fn check_may_write(asker: &Peer) -> Result<(), Refusal> {
    let user = asker.socket.as_ref().map(crate::socket::Socket::user);
    let own = rustix::process::geteuid().as_raw();
    match user {
        Some(User::Uid(uid)) if uid == own || uid == 0 => Ok(()),
        _ => {
            let message = "only the server's user, over the Unix socket, can choose the backup \
                file; without `to` the backup goes to the data directory";
            Err(Refusal::new(Code::Forbidden, message))
        }
    }
}

/// A reply and its receiver.
type Answered = (Arc<Peer>, Box<str>, Result<String, Refusal>);

fn run(
    shared: &Arc<ServerState>,
    work: impl FnOnce(&ServerState) -> Option<Answered> + Send + 'static,
) -> Result<(), Refusal> {
    if shared.storage.is_in_upkeep.swap(true, Acquire) {
        let message = "a backup or database check is already running; try again when it has \
            finished";
        return Err(Refusal::new(Code::Overloaded, message));
    }
    let own = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name("upkeep".into())
        .spawn(move || {
            let answered = work(&own);
            // Before the reply, after which the client may request the next one.
            own.storage.is_in_upkeep.store(false, Release);
            if let Some((asker, id, result)) = answered {
                let home = asker.home;
                own.loops.mailboxes[home].send(Command::Reply(asker, id, result));
            }
        });
    spawned.map(|_| ()).map_err(|error| {
        shared.storage.is_in_upkeep.store(false, Release);
        Refusal::new(Code::Storage, format!("cannot start a thread: {error}"))
    })
}

fn backup(
    shared: &ServerState,
    to: Option<&Path>,
    without_blocks: bool,
) -> Result<String, Refusal> {
    let started = Instant::now();
    if to.is_some_and(|to| !to.is_absolute()) {
        let message = "field 'to' must be an absolute path on the server's machine";
        return Err(Refusal::new(Code::BadMessage, message));
    }
    let failed = |error: &dyn std::fmt::Display| Refusal::new(Code::Storage, error.to_string());
    let store = shared.storage.persistence.store();
    let backup = store
        .backup_with(to, |writer| match without_blocks {
            true => Ok(()),
            false => shared.storage.blocks.back_up(writer),
        })
        .map_err(|error| failed(&error))?;
    let summary = backup.summary().map_err(|error| failed(&error))?;
    let bytes = std::fs::metadata(backup.path()).map_or(0, |file| file.len());
    let took = started.elapsed().as_millis() as u64;
    tracing::info!(file = %backup.path().display(), bytes, took_ms = took, "backup made");
    if to.is_none() {
        prune(shared);
    }
    Ok(json!({
        "file": backup.path(), "bytes": bytes, "took_ms": took,
        "apps": summary.apps, "pools": summary.pools, "calls": summary.calls,
        "answers": summary.answers,
        "blocks": summary.blocks, "block_files": summary.block_files,
        "block_bytes": summary.block_bytes,
    })
    .to_string())
}

/// Removes backups that the policy does not keep.
fn prune(shared: &ServerState) {
    match latzero_store::prune(shared.storage.persistence.store().dir(), &Policy::default()) {
        Ok(pruned) => tracing::debug!(?pruned, "old backups removed"),
        Err(error) => tracing::warn!(%error, "cannot remove old backups"),
    }
}

fn query(shared: &ServerState, sql: &str) -> Result<String, Refusal> {
    let store = shared.storage.persistence.store();
    let answer = store.query(sql, &QueryLimits::default());
    let answer = answer.map_err(|error| Refusal::new(Code::BadMessage, error.to_string()))?;
    Ok(answer_json(&answer).to_string())
}

/// An answer as JSON; bytes are written as SQL does.
pub fn answer_json(answer: &Answer) -> Value {
    let rows = answer.rows.iter().map(|row| {
        let values = row.iter().map(|value| match value {
            Cell::Null => Value::Null,
            Cell::Integer(number) => json!(number),
            Cell::Real(number) => json!(number),
            Cell::Text(text) => json!(text),
            Cell::Blob(bytes) => {
                let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                json!(format!("x'{digits}'"))
            }
        });
        Value::Array(values.collect())
    });
    let rows: Vec<Value> = rows.collect();
    json!({"columns": answer.columns, "rows": rows, "cut": answer.is_cut})
}

fn check(shared: &ServerState, is_thorough: bool) -> Result<String, Refusal> {
    let started = Instant::now();
    let findings = shared
        .storage
        .persistence
        .store()
        .check(is_thorough)
        .map_err(|error| Refusal::new(Code::Storage, error.to_string()))?;
    let took: Duration = started.elapsed();
    Ok(json!({
        "ok": findings.is_empty(), "findings": findings, "full": is_thorough,
        "took_ms": took.as_millis() as u64,
    })
    .to_string())
}
