//! The one table of all settings.
//!
//! Each line is a setting: its documentation, name, Rust type, default, kind with bounds, and
//! whether `reload` may change it (`live`) or only a restart (`restart`). Everything else in this
//! module is derived from it.

use std::path::PathBuf;
use std::time::Duration;

use super::value::{Kind, LogFormat, LogLevel, SocketChoice, StoreDurability, Typed, Value};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HOUR: u64 = 3_600_000;

/// When a new value of a setting takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// At once, with `reload`.
    Live,
    /// At the next start.
    Restart,
}

/// One line of the table.
#[derive(Debug)]
pub struct Setting {
    /// The key, with its table: `port`, `limits.max_frame`.
    pub name: &'static str,
    /// The default, as one would write it in a variable.
    pub default: &'static str,
    /// Type, bounds and unit.
    pub kind: Kind,
    /// Whether `reload` may change it.
    pub takes: Takes,
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

    /// The default as a value.
    #[must_use]
    pub fn default_value(&self) -> Value {
        self.kind
            .parse_text(self.default)
            .expect("a test parses every default of the table")
    }
}

macro_rules! settings {
    (
        $(#[$top_meta:meta])*
        struct $top:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident: $ty:ty = $default:literal, $kind:expr, $takes:ident;
            )+
        }
        $(#[$limits_meta:meta])*
        struct $limits:ident {
            $(
                $(#[doc = $ldoc:literal])+
                $lfield:ident: $lty:ty = $ldefault:literal, $lkind:expr, $ltakes:ident;
            )+
        }
    ) => {
        $(#[$top_meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $top {
            $( $(#[doc = $doc])+ pub $field: $ty, )+
            /// Bounds: table `[limits]`.
            pub limits: $limits,
        }

        $(#[$limits_meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $limits {
            $( $(#[doc = $ldoc])+ pub $lfield: $lty, )+
        }

        /// Every setting there is, in the order in which people read them.
        pub static SETTINGS: &[Setting] = &[
            $( Setting {
                name: stringify!($field),
                default: $default,
                kind: $kind,
                takes: Takes::$takes,
                doc: concat!($($doc, "\n"),+),
            }, )+
            $( Setting {
                name: concat!("limits.", stringify!($lfield)),
                default: $ldefault,
                kind: $lkind,
                takes: Takes::$ltakes,
                doc: concat!($($ldoc, "\n"),+),
            }, )+
        ];

        impl $top {
            /// Builds the typed form from one value per line of the table, in its order.
            pub(super) fn from_values<'v>(values: impl IntoIterator<Item = &'v Value>) -> Self {
                let mut values = values.into_iter();
                let mut next = || values.next().expect("the caller gives one value per setting");
                $top {
                    $( $field: <$ty as Typed>::typed(next()), )+
                    limits: $limits { $( $lfield: <$lty as Typed>::typed(next()), )+ },
                }
            }
        }
    };
}

settings! {
    /// Every setting of the server, typed.
    struct Settings {
        /// TCP port to listen on; 0 lets the system choose one.
        port: u16 = "45227", Kind::Integer { min: 0, max: 65_535 }, Restart;
        /// Address to listen on. Anything beyond loopback is reachable from other machines.
        host: String = "127.0.0.1", Kind::Text, Restart;
        /// Where the server keeps its files. A file inside this directory cannot set it.
        data_dir: PathBuf = "~/.latzero", Kind::Path, Restart;
        /// Unix socket: a path, "auto" (in the data directory, where clients look for it) or "off".
        socket: SocketChoice = "auto", Kind::Socket, Restart;
        /// How much to log: error, warn, info, debug or trace.
        log_level: LogLevel = "info",
            Kind::Choice(&["error", "warn", "info", "debug", "trace"]), Live;
        /// Form of log lines: human, json, or auto (human on stderr, json in the file).
        log_format: LogFormat = "auto", Kind::Choice(&["auto", "human", "json"]), Restart;
        /// Speak TLS on the TCP port instead of plain TCP.
        enable_tls: bool = "false", Kind::Bool, Restart;
        /// Join other servers in a cluster.
        cluster_mode: bool = "false", Kind::Bool, Restart;
        /// Threads that read and write connections.
        io_threads: usize = "1", Kind::Integer { min: 1, max: 64 }, Restart;
        /// What is promised to outlive the server waits for the disk (full), or for the kernel alone (normal): then the
        /// last moments before a power loss may be missing, never a part of a change.
        durability: StoreDurability = "full", Kind::Choice(&["full", "normal"]), Restart;
        /// How often the database and the persistent blocks are copied to backups/; 0 is never.
        backup_interval: Duration = "24h", Kind::Millis { min: 0, max: 365 * 24 * HOUR }, Live;
        /// How long the answer of a parked call waits for its caller to come back.
        answer_ttl: Duration = "24h", Kind::Millis { min: 1000, max: 365 * 24 * HOUR }, Restart;
        /// How long the answer of a call with an idempotency key is kept for its repeats.
        idempotency_ttl: Duration = "10m", Kind::Millis { min: 1000, max: 24 * HOUR }, Restart;
        /// How long a stopping server waits for running calls.
        drain_timeout: Duration = "10s", Kind::Millis { min: 0, max: HOUR }, Live;
        /// A TCP connection silent for this long is sent a ping.
        ping_interval: Duration = "30s", Kind::Millis { min: 10, max: 24 * HOUR }, Live;
        /// A TCP connection that answers nothing for this long after a ping is closed.
        ping_timeout: Duration = "30s", Kind::Millis { min: 10, max: 24 * HOUR }, Live;
        /// A new connection has this long to send its handshake.
        handshake_timeout: Duration = "2s", Kind::Millis { min: 10, max: HOUR }, Live;
        /// A connection whose outbox stays full for this long is closed.
        write_stall_timeout: Duration = "10s", Kind::Millis { min: 10, max: HOUR }, Live;
        /// Size at which logs/server.log is put aside and a new one begun.
        log_file_bytes_max: u64 = "10 MiB", Kind::Bytes { min: 4 * KIB, max: 64 * GIB }, Live;
        /// Log files kept, the current one included.
        log_files_max: usize = "5", Kind::Integer { min: 1, max: 1_000 }, Live;
    }

    /// The bounds of the server. Each has an answer for when it is reached: an error, or
    /// back-pressure.
    struct Limits {
        /// Largest payload of a frame. The handshake tells it to clients.
        max_frame: usize = "16 MiB", Kind::Bytes { min: 4 * KIB, max: GIB }, Restart;
        /// Largest payload of a frame before the handshake is done.
        max_frame_before_handshake: usize = "64 KiB", Kind::Bytes { min: KIB, max: GIB }, Live;
        /// Connections at a time.
        connections_max: usize = "4096", Kind::Integer { min: 1, max: 1_000_000 }, Live;
        /// Connections at a time that have not done their handshake.
        connections_unauthenticated_max: usize = "256",
            Kind::Integer { min: 1, max: 1_000_000 }, Live;
        /// The same, for one user of the machine.
        connections_unauthenticated_per_user_max: usize = "64",
            Kind::Integer { min: 1, max: 1_000_000 }, Live;
        /// Calls in flight on one connection. At the limit the server stops reading from it, unless it
        /// owes answers itself: then further calls are refused.
        in_flight_max: usize = "1024", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Calls in flight in one pool.
        pending_max: usize = "65536", Kind::Integer { min: 1, max: 16_777_216 }, Restart;
        /// Bytes waiting to be written to one connection.
        outbox_bytes_max: usize = "8 MiB", Kind::Bytes { min: 16 * KIB, max: 4 * GIB }, Restart;
        /// Room in an outbox that only life-cycle messages (draining, displaced, ping) may use.
        outbox_headroom_bytes: usize = "1 MiB", Kind::Bytes { min: 4 * KIB, max: GIB }, Restart;
        /// Bytes waiting to be written to all connections together; 0 is 5 % of the memory of the
        /// machine, at most 256 MiB.
        outbox_total_bytes_max: usize = "0", Kind::Bytes { min: 0, max: 1024 * GIB }, Restart;
        /// Apps that the server knows, live or not.
        apps_max: usize = "100000", Kind::Integer { min: 1, max: 16_777_216 }, Restart;
        /// Pools.
        pools_max: usize = "10000", Kind::Integer { min: 1, max: 16_777_216 }, Restart;
        /// Pools that one app may be in.
        pools_per_app_max: usize = "256", Kind::Integer { min: 1, max: 65_536 }, Restart;
        /// Triggers that one app may serve.
        triggers_per_app_max: usize = "1024", Kind::Integer { min: 1, max: 65_536 }, Restart;
        /// Instances of one app at a time.
        instances_per_app_max: usize = "1024", Kind::Integer { min: 1, max: 65_536 }, Restart;
        /// What one app registers: names, pools and docs together.
        registration_bytes_max: usize = "256 KiB", Kind::Bytes { min: KIB, max: GIB }, Restart;
        /// Size of the `meta` object of an app.
        meta_bytes_max: usize = "8 KiB", Kind::Bytes { min: 2, max: MIB }, Restart;
        /// Largest memory block.
        block_bytes_max: u64 = "1 GiB", Kind::Bytes { min: 4 * KIB, max: 1024 * GIB }, Restart;
        /// Memory blocks of the server.
        blocks_max: usize = "4096", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Bytes of all memory blocks together, their slots and headers included; 0 is a quarter of the
        /// memory of the machine.
        memory_bytes_max: u64 = "0", Kind::Bytes { min: 0, max: 1024 * GIB }, Restart;
        /// The same for one pool; 0 is as much as for all.
        memory_bytes_per_pool_max: u64 = "0", Kind::Bytes { min: 0, max: 1024 * GIB }, Restart;
        /// The same for the blocks that one app made; 0 is as much as for all.
        memory_bytes_per_app_max: u64 = "0", Kind::Bytes { min: 0, max: 1024 * GIB }, Restart;
        /// Memory blocks that one app may be attached to, over all its instances.
        attachments_per_app_max: usize = "256", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Memory blocks whose changes one app may subscribe to, over all its instances.
        subscriptions_per_app_max: usize = "1024", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Requests that may wait for one memory block: for its lock, its making or its flush.
        block_waiters_max: usize = "1024", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Parked calls, and answers that wait for their callers.
        parked_max: usize = "100000", Kind::Integer { min: 0, max: 16_777_216 }, Restart;
        /// Bytes of their payloads in memory.
        parked_bytes_max: usize = "256 MiB", Kind::Bytes { min: 0, max: 64 * GIB }, Restart;
        /// Parked calls and waiting answers of one app.
        parked_per_app_max: usize = "50000", Kind::Integer { min: 0, max: 16_777_216 }, Restart;
        /// Bytes of their payloads in memory.
        parked_bytes_per_app_max: usize = "128 MiB", Kind::Bytes { min: 0, max: 64 * GIB }, Restart;
        /// Calls of one pool whose idempotency keys are known.
        repeats_max: usize = "10000", Kind::Integer { min: 1, max: 1_000_000 }, Restart;
        /// Bytes of the answers that one pool keeps for them.
        repeats_bytes_max: usize = "16 MiB", Kind::Bytes { min: KIB, max: GIB }, Restart;
        /// Bytes read from one connection before the others get their turn.
        read_budget_bytes: usize = "256 KiB", Kind::Bytes { min: 4 * KIB, max: GIB }, Restart;
    }
}

impl Limits {
    /// The bound on all memory blocks together, in bytes: the setting, or where that is 0 a quarter of
    /// `memory_bytes`.
    #[must_use]
    pub fn block_bytes_total(&self, memory_bytes: u64) -> u64 {
        match self.memory_bytes_max {
            0 => memory_bytes / 4,
            set => set,
        }
    }

    /// The bound on all outboxes together, in bytes: the setting, or where that is 0 the lesser of
    /// 256 MiB and 5 % of `memory_bytes`.
    #[must_use]
    pub fn outbox_total_bytes(&self, memory_bytes: u64) -> usize {
        if self.outbox_total_bytes_max > 0 {
            return self.outbox_total_bytes_max;
        }
        usize::try_from((memory_bytes / 20).min(256 * MIB)).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_kind() {
        for setting in SETTINGS {
            assert!(
                setting.kind.parse_text(setting.default).is_some(),
                "{}",
                setting.name
            );
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
                    Kind::Text | Kind::Path | Kind::Socket => setting.default_value(),
                })
                .collect()
        };
        Settings::from_values(&extreme(false));
        Settings::from_values(&extreme(true));
        for setting in SETTINGS {
            if let Kind::Choice(words) = setting.kind {
                for word in words {
                    let mut values: Vec<Value> =
                        SETTINGS.iter().map(Setting::default_value).collect();
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

    #[test]
    fn the_total_of_the_outboxes_follows_the_memory() {
        let mut limits = Settings::from_values(
            &SETTINGS
                .iter()
                .map(Setting::default_value)
                .collect::<Vec<_>>(),
        )
        .limits;
        assert_eq!(
            limits.outbox_total_bytes(GIB),
            usize::try_from(GIB / 20).unwrap()
        );
        assert_eq!(limits.outbox_total_bytes(64 * GIB), 256 << 20);
        limits.outbox_total_bytes_max = 12_345;
        assert_eq!(limits.outbox_total_bytes(GIB), 12_345);
    }
}
