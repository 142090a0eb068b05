//! The table of all settings.
//!
//! Each line is a setting: its documentation, name, Rust type, default, kind with bounds, and
//! whether `reload` applies it (`live`) or only a restart (`restart`). The limits come from the
//! core's list and are not repeated here. Everything else in this module is derived from the two.

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use latzero_fabric::limits::{LIMITS, Limit, Limits, Takes, Unit};

use super::value::{Kind, LogFormat, LogLevel, SocketChoice, StoreDurability, Typed, Value};

const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;
const HOUR: u64 = 3_600_000;

/// One line of the table.
#[derive(Debug)]
pub struct Setting {
    /// The key, with its table: `port`, `limits.max_frame`.
    pub name: &'static str,
    /// The default.
    pub default: Value,
    /// Type, bounds and unit.
    pub kind: Kind,
    /// Whether `reload` may change it.
    pub takes: Takes,
    /// What happens when a limit is reached.
    pub answer: Option<&'static str>,
    /// Its documentation; may be several sentences.
    doc: &'static str,
}

impl Setting {
    /// What the setting does, in a sentence or two.
    #[must_use]
    pub fn doc(&self) -> String {
        self.doc.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The environment variable that sets it: `LATZERO_PORT`, `LATZERO_LIMITS_MAX_FRAME`.
    #[must_use]
    pub fn variable(&self) -> String {
        format!(
            "LATZERO_{}",
            self.name.replace('.', "_").to_ascii_uppercase()
        )
    }

    fn of_limit(limit: &Limit) -> Setting {
        let (min, max) = (limit.min, limit.max);
        Setting {
            name: limit.setting,
            default: Value::Integer(limit.default),
            kind: match limit.unit {
                Unit::Count => Kind::Integer { min, max },
                Unit::Bytes => Kind::Bytes { min, max },
                Unit::Millis => Kind::Millis { min, max },
            },
            takes: limit.takes,
            answer: Some(limit.answer),
            doc: limit.doc,
        }
    }
}

/// All settings, in the order in which people read them: those of the table, then the limits.
pub static SETTINGS: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    let mut settings = table();
    settings.extend(LIMITS.iter().map(Setting::of_limit));
    settings
});

macro_rules! settings {
    (
        $(
            $(#[doc = $doc:literal])+
            $field:ident: $ty:ty = $default:literal, $kind:expr, $takes:ident;
        )+
    ) => {
        /// Every setting of the server, typed.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Settings {
            $( $(#[doc = $doc])+ pub $field: $ty, )+
            /// The limits as they were set.
            pub limits: Limits,
        }

        /// The settings that are not limits.
        fn table() -> Vec<Setting> {
            vec![
                $( Setting {
                    name: stringify!($field),
                    default: $kind
                        .parse_text($default)
                        .expect("every default of the table is tested"),
                    kind: $kind,
                    takes: Takes::$takes,
                    answer: None,
                    doc: concat!($($doc, "\n"),+),
                }, )+
            ]
        }

        impl Settings {
            /// Builds the typed form from one value per setting, in the order of [`SETTINGS`].
            pub(super) fn from_values<'v>(values: impl IntoIterator<Item = &'v Value>) -> Self {
                let mut values = values.into_iter();
                let mut next = || values.next().expect("the caller gives one value per setting");
                Settings {
                    $( $field: <$ty as Typed>::typed(next()), )+
                    limits: Limits::from_values(values.map(u64::typed)),
                }
            }
        }
    };
}

settings! {
    /// TCP port to listen on; 0 picks a free port.
    port: u16 = "45227", Kind::Integer { min: 0, max: 65_535 }, Restart;
    /// Address to listen on. Other machines can reach any address but a loopback address.
    host: String = "127.0.0.1", Kind::Text, Restart;
    /// Allow listening on other addresses than loopback without TLS: traffic is not encrypted.
    insecure: bool = "false", Kind::Bool, Restart;
    /// Data directory: where the server keeps its files. A file inside it cannot set it.
    data_dir: PathBuf = "~/.latzero", Kind::Path, Restart;
    /// Unix socket: a path, "auto" (in the data directory, where clients look for it) or "off".
    socket: SocketChoice = "auto", Kind::Socket, Restart;
    /// How much to log: error, warn, info, debug or trace.
    log_level: LogLevel = "info",
        Kind::Choice(&["error", "warn", "info", "debug", "trace"]), Live;
    /// Format of log lines: human, json, or auto (human on stderr, json in the file).
    log_format: LogFormat = "auto", Kind::Choice(&["auto", "human", "json"]), Restart;
    /// Accept only TLS on the TCP port. The Unix socket is not affected.
    enable_tls: bool = "false", Kind::Bool, Restart;
    /// Certificate and chain of the TLS port, in PEM format. "auto" is a self-signed certificate
    /// that the server creates at its first start, in config/tls.
    tls_cert: PathBuf = "auto", Kind::Path, Live;
    /// Private key of the certificate, in PEM format. Set it if and only if tls_cert is set.
    tls_key: PathBuf = "auto", Kind::Path, Live;
    /// CAs that must have signed the certificates of clients, in PEM format. A client certificate
    /// names the AppIDs of its holder. "off" requires no certificates.
    tls_client_ca: PathBuf = "off", Kind::Path, Live;
    /// Accept administrators over plain TCP, where a proof cannot be bound to the connection.
    admin_over_plain_tcp: bool = "false", Kind::Bool, Restart;
    /// Keep the admin token across restarts; otherwise each start writes a new one.
    admin_token_pinned: bool = "false", Kind::Bool, Restart;
    /// Refuse proofs that are not bound to their connection: those over plain TCP.
    require_channel_binding: bool = "false", Kind::Bool, Restart;
    /// Accept proofs over the Unix socket from other PID namespaces, where the server's process id
    /// reads as 0. A relay of the same user in such a namespace is not detected.
    allow_pidns: bool = "false", Kind::Bool, Restart;
    /// Join other servers in a cluster. Not implemented yet.
    cluster_mode: bool = "false", Kind::Bool, Restart;
    /// Threads that read and write connections.
    io_threads: usize = "1", Kind::Integer { min: 1, max: 64 }, Restart;
    /// When a stored change is acknowledged: once it is on disk (full), or once the kernel has it
    /// (normal). With normal, the last changes before a power loss may be missing, but never a part
    /// of a change.
    durability: StoreDurability = "full", Kind::Choice(&["full", "normal"]), Restart;
    /// How often the server backs up the database and the persistent blocks to backups/; 0 is
    /// never.
    backup_interval: Duration = "24h", Kind::Millis { min: 0, max: 365 * 24 * HOUR }, Live;
    /// How long a stopping server waits for running calls.
    drain_timeout: Duration = "10s", Kind::Millis { min: 0, max: HOUR }, Live;
    /// The server pings a TCP connection that has been silent for this long.
    ping_interval: Duration = "30s", Kind::Millis { min: 10, max: 24 * HOUR }, Live;
    /// A TCP connection that does not answer a ping within this time is closed.
    ping_timeout: Duration = "30s", Kind::Millis { min: 10, max: 24 * HOUR }, Live;
    /// A new connection that sends no handshake within this time is closed.
    handshake_timeout: Duration = "2s", Kind::Millis { min: 10, max: HOUR }, Live;
    /// A connection whose socket accepts no data for this long is closed.
    write_stall_timeout: Duration = "10s", Kind::Millis { min: 10, max: HOUR }, Live;
    /// Size at which logs/server.log is rotated.
    log_file_bytes_max: u64 = "10 MiB", Kind::Bytes { min: 4 * KIB, max: 64 * GIB }, Live;
    /// Log files to keep, including the current one.
    log_files_max: usize = "5", Kind::Integer { min: 1, max: 1_000 }, Live;
}

/// Whether the value of this setting is a path.
#[must_use]
pub fn is_path(name: &str) -> bool {
    let setting = SETTINGS.iter().find(|setting| setting.name == name);
    setting.is_some_and(|setting| matches!(setting.kind, Kind::Path | Kind::Socket))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_kind() {
        for setting in SETTINGS.iter() {
            let text = setting.kind.render(&setting.default);
            let read = setting.kind.parse_text(&text);
            assert_eq!(read.as_ref(), Some(&setting.default), "{}", setting.name);
            assert!(!setting.doc().is_empty(), "{}", setting.name);
        }
    }

    #[test]
    fn every_value_within_bounds_fits_its_type() {
        let extreme = |pick_max: bool| -> Vec<Value> {
            SETTINGS
                .iter()
                .map(|setting| match setting.kind {
                    Kind::Integer { min, max }
                    | Kind::Bytes { min, max }
                    | Kind::Millis { min, max } => Value::Integer(if pick_max { max } else { min }),
                    Kind::Bool => Value::Bool(pick_max),
                    Kind::Choice(words) => {
                        let word = if pick_max {
                            words[words.len() - 1]
                        } else {
                            words[0]
                        };
                        Value::Text(word.to_owned())
                    }
                    Kind::Text | Kind::Path | Kind::Socket => setting.default.clone(),
                })
                .collect()
        };
        Settings::from_values(&extreme(false));
        Settings::from_values(&extreme(true));
        for setting in SETTINGS.iter() {
            if let Kind::Choice(words) = setting.kind {
                for word in words {
                    let mut values: Vec<Value> =
                        SETTINGS.iter().map(|s| s.default.clone()).collect();
                    let index = SETTINGS
                        .iter()
                        .position(|s| s.name == setting.name)
                        .unwrap();
                    values[index] = Value::Text((*word).to_owned());
                    Settings::from_values(&values);
                }
            }
        }
    }

    #[test]
    fn names_and_variables_are_unique() {
        let mut variables: Vec<String> = SETTINGS.iter().map(Setting::variable).collect();
        variables.sort();
        variables.dedup();
        assert_eq!(variables.len(), SETTINGS.len());
    }
}
