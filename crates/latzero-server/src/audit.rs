//! The audit log: who registered what, who took over, what was refused, what administrators did.
//!
//! One JSON object a line in `logs/audit.log`, put aside by size as the server's log is. Lines are written by a thread of
//! their own; what does not fit into its queue is counted with the other log lines that were lost.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use latzero_fabric::Audit;
use serde_json::{Value, json};

use crate::logging::{LineFile, LogError};
use crate::peer::Peer;
use crate::settings::Settings;
use crate::socket::{Socket, User};
use crate::utc::rfc3339;

/// The file's name in the directory of logs.
const NAME: &str = "audit.log";

/// The audit log.
pub(crate) struct AuditLog(LineFile);

impl AuditLog {
    /// Opens the log, to append to what is there.
    ///
    /// # Errors
    /// Where the file can't be opened, or no thread be had.
    pub(crate) fn open(directory: &Path, settings: &Settings) -> Result<AuditLog, LogError> {
        let (bytes_max, files_max) = (settings.log_file_bytes_max, settings.log_files_max);
        LineFile::open(&directory.join(NAME), bytes_max, files_max).map(AuditLog)
    }

    /// Notes what a connection did. Never waits.
    pub(crate) fn note(&self, by: &Arc<Peer>, audit: &Audit<'_>) {
        let from = by
            .socket
            .as_ref()
            .map_or_else(|| "the server".to_owned(), origin);
        let mut line = json!({
            "time": rfc3339(SystemTime::now()), "event": audit.event, "app_id": audit.app, "from": from,
        });
        if let Some(instance) = audit.instance {
            line["instance"] = json!(instance);
        }
        if let (Some(line), Value::Object(detail)) = (line.as_object_mut(), &audit.detail) {
            line.extend(detail.clone());
        }
        self.0.write(&line.to_string());
    }

    /// Lines lost so far.
    pub(crate) fn lost(&self) -> u64 {
        self.0.lost()
    }
}

/// Where a connection comes from, as far as the kernel tells.
fn origin(socket: &Socket) -> String {
    match (socket, socket.user()) {
        (_, User::Uid(uid)) => format!("unix uid {uid}"),
        (Socket::Tcp(stream), _) => match stream.peer_addr() {
            Ok(address) => format!("tcp {address}"),
            Err(_) => "tcp".to_owned(),
        },
        _ => "unix".to_owned(),
    }
}
