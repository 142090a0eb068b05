//! The audit log: registrations, takeovers, refusals, and actions of administrators.
//!
//! Each line of `logs/audit.log` is a JSON object. The file is rotated by size, like the server
//! log. A separate thread writes it. Lines that do not fit in its queue are counted with the other
//! lost log lines. To keep one user from flooding the log, each user has a burst and a rate for
//! each kind of event; the next line of that user and event says how many were left out.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use latzero_fabric::Audit;
use serde_json::{Value, json};

use crate::logging::{LineFile, LogError};
use crate::peer::Peer;
use crate::settings::Settings;
use crate::socket::{Socket, User};
use crate::utc::rfc3339;

/// The file's name in the directory of logs.
const NAME: &str = "audit.log";

/// How many lines of one event a user may write in a burst: more than the apps that reconnect after
/// a start.
const BURST: u32 = 10_000;

/// How many lines per second are added to each user's quota.
const LINES_PER_SECOND: u32 = 100;

/// For how many users and events lines are counted separately; all other users share one count per
/// event.
const SHARES_MAX: usize = 4096;

/// The file of security events, so that other events cannot displace them.
const SECURITY_NAME: &str = "security.log";

/// The events in that file: refused proofs, keys, takeovers, and actions of administrators.
const SECURITY: [&str; 4] = ["proof_refused", "app_proved", "took_over", "administered"];

/// The audit log.
pub(crate) struct AuditLog {
    rest: Log,
    security: Log,
}

/// One of its files, with its own quota.
struct Log {
    file: LineFile,
    shares: Mutex<Shares>,
}

/// The remaining quota of a user.
struct Share {
    lines: u32,
    since: Instant,
    left_out: u64,
}

/// The remaining quota of each user for each event.
#[derive(Default)]
struct Shares(HashMap<(&'static str, String), Share>);

impl Shares {
    /// Takes a line from a user's quota; returns how many lines were left out before it, or nothing
    /// if this one is left out.
    fn take(&mut self, event: &'static str, from: &str, now: Instant) -> Option<u64> {
        let whole = |share: &Share| share.refilled(now).0 == BURST && share.left_out == 0;
        let mut whose = (event, from.to_owned());
        if self.0.len() >= SHARES_MAX && !self.0.contains_key(&whose) {
            // Users with a full quota need no entry.
            self.0.retain(|_, share| !whole(share));
            if self.0.len() >= SHARES_MAX {
                whose.1.clear();
            }
        }
        let share = self.0.entry(whose).or_insert(Share {
            lines: BURST,
            since: now,
            left_out: 0,
        });
        (share.lines, share.since) = share.refilled(now);
        if share.lines == 0 {
            share.left_out += 1;
            return None;
        }
        share.lines -= 1;
        Some(std::mem::take(&mut share.left_out))
    }
}

impl Share {
    fn refilled(&self, now: Instant) -> (u32, Instant) {
        let per_line = std::time::Duration::from_secs(1) / LINES_PER_SECOND;
        let passed = now.saturating_duration_since(self.since).as_nanos() / per_line.as_nanos();
        let lines = u32::try_from(passed)
            .unwrap_or(BURST)
            .min(BURST - self.lines);
        if self.lines + lines == BURST {
            return (BURST, now);
        }
        (self.lines + lines, self.since + per_line * lines)
    }
}

impl AuditLog {
    /// Opens the log for appending.
    ///
    /// # Errors
    /// If the file cannot be opened, or the thread cannot be started.
    pub(crate) fn open(directory: &Path, settings: &Settings) -> Result<AuditLog, LogError> {
        let (bytes_max, files_max) = (settings.log_file_bytes_max, settings.log_files_max);
        let open = |name| -> Result<Log, LogError> {
            let file = LineFile::open(&directory.join(name), bytes_max, files_max)?;
            let shares = Mutex::default();
            Ok(Log { file, shares })
        };
        Ok(AuditLog {
            rest: open(NAME)?,
            security: open(SECURITY_NAME)?,
        })
    }

    /// Records what a connection did. Never blocks.
    pub(crate) fn note(&self, by: &Arc<Peer>, audit: &Audit<'_>) {
        let is_about_security = SECURITY.contains(&audit.event);
        let log = if is_about_security {
            &self.security
        } else {
            &self.rest
        };
        let from = by
            .socket
            .as_ref()
            .map_or_else(|| "the server".to_owned(), origin);
        let user = from.rsplit_once(':').map_or(&*from, |(address, _)| address);
        let shares = log.shares.lock();
        let mut shares = shares.expect("no thread panics while holding this lock");
        let Some(left_out) = shares.take(audit.event, user, Instant::now()) else {
            return;
        };
        drop(shares);
        let mut line = json!({
            "time": rfc3339(SystemTime::now()), "event": audit.event, "app_id": audit.app,
            "from": from,
        });
        if let Some(instance) = audit.instance {
            line["instance"] = json!(instance);
        }
        if let (Some(line), Value::Object(detail)) = (line.as_object_mut(), &audit.detail) {
            line.extend(detail.clone());
        }
        if left_out > 0 {
            line["left_out_before"] = left_out.into();
        }
        log.file.write(&line.to_string());
    }

    /// Lines lost so far.
    pub(crate) fn lost(&self) -> u64 {
        self.rest.file.lost() + self.security.file.lost()
    }
}

/// The origin of a connection, as far as the kernel reports it.
fn origin(socket: &Socket) -> String {
    if let User::Uid(uid) = socket.user() {
        return format!("unix uid {uid}");
    }
    match (socket, socket.peer_addr()) {
        (Socket::Unix(_), _) => "unix".to_owned(),
        (Socket::Tcp(_), Some(address)) => format!("tcp {address}"),
        (Socket::Tcp(_), None) => "tcp".to_owned(),
        (Socket::Tls(_), Some(address)) => format!("tls {address}"),
        (Socket::Tls(_), None) => "tls".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_user_has_a_share_and_learns_what_was_left_out() {
        let mut shares = Shares::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(shares.take("joined", "unix uid 1", start), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(shares.take("joined", "unix uid 1", start), None);
        }
        assert_eq!(shares.take("joined", "unix uid 2", start), Some(0));
        // Coming and going leaves room for what is refused.
        assert_eq!(shares.take("refused", "unix uid 1", start), Some(0));
        let later = start + Duration::from_millis(25);
        assert_eq!(shares.take("joined", "unix uid 1", later), Some(3));
        assert_eq!(shares.take("joined", "unix uid 1", later), Some(0));
        assert_eq!(shares.take("joined", "unix uid 1", later), None);
        // The rest of the time between two lines is not lost.
        let later = start + Duration::from_millis(31);
        assert_eq!(shares.take("joined", "unix uid 1", later), Some(1));
        assert_eq!(shares.take("joined", "unix uid 1", later), None);
    }

    #[test]
    fn users_are_counted_up_to_a_bound() {
        let mut shares = Shares::default();
        let start = Instant::now();
        for n in 0..3 * SHARES_MAX {
            assert_eq!(
                shares.take("joined", &format!("tcp 127.0.0.{n}"), start),
                Some(0)
            );
        }
        assert!(shares.0.len() <= SHARES_MAX + 1);
        // Those that have been quiet make room.
        let later = start + Duration::from_secs(1);
        assert_eq!(shares.take("joined", "another", later), Some(0));
        assert!(shares.0.len() <= 2);
    }
}
