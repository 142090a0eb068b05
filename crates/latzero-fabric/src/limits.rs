//! The list of all limits.
//!
//! Each has a name, a default, a unit with bounds, a description, and the response when it is
//! reached. The server reads its settings from this list and passes them to the core. The default
//! configuration file and the table in `docs/operations.md` are generated from it.

use latzero_protocol::limits::{ListBounds, SCHEMA_BYTES_MAX};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const HOUR: u64 = 3_600_000;

/// The memory of the machine that [`Limits::default`] is for.
const MEMORY_ASSUMED: u64 = 16 * GIB;

/// Most bytes that wait to be written to all connections together, by default.
const OUTBOX_TOTAL_BYTES_MAX: u64 = 256 * MIB;

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Objects.
    Count,
    /// Bytes.
    Bytes,
    /// Milliseconds.
    Millis,
}

impl Unit {
    /// A number of this unit as people read and write it: `16 MiB`, `10s`, `4096`.
    #[must_use]
    pub fn show(self, number: u64) -> String {
        let units: &[(u64, &str)] = match self {
            Unit::Count => &[],
            Unit::Bytes => &[(GIB, " GiB"), (MIB, " MiB"), (KIB, " KiB")],
            Unit::Millis => &[(HOUR, "h"), (60_000, "m"), (1000, "s"), (1, "ms")],
        };
        let fits = |(size, _): &&(u64, &str)| number >= *size && number.is_multiple_of(*size);
        match units.iter().find(fits) {
            Some((size, unit)) => format!("{}{unit}", number / size),
            None => number.to_string(),
        }
    }
}

/// When a new value of a setting takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// At once, with `reload`.
    Live,
    /// At the next start.
    Restart,
}

/// One line of the list.
#[derive(Debug)]
pub struct Limit {
    /// The setting: `limits.max_frame`.
    pub setting: &'static str,
    /// The default; 0 if it is derived from something else, as the documentation says.
    pub default: u64,
    /// The unit of its value.
    pub unit: Unit,
    /// The lowest value that it may be set to.
    pub min: u64,
    /// The highest value that it may be set to.
    pub max: u64,
    /// When a new value takes effect.
    pub takes: Takes,
    /// What it bounds.
    pub doc: &'static str,
    /// What happens when it is reached.
    pub answer: &'static str,
}

macro_rules! limits {
    (@setting $field:ident) => { concat!("limits.", stringify!($field)) };
    (@setting $field:ident $setting:literal) => { $setting };
    ($(
        $(#[doc = $doc:literal])+
        $field:ident $(as $setting:literal)?: $type:ty = $default:expr,
            $unit:ident($min:expr, $max:expr), $takes:ident, $answer:literal;
    )+) => {
        /// The limits in force: one field for each line of [`LIMITS`].
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Limits {
            $( $(#[doc = $doc])+ pub $field: $type, )+
        }

        /// Every limit there is, in the order in which people read them.
        pub const LIMITS: &[Limit] = &[
            $( Limit {
                setting: limits!(@setting $field $($setting)?),
                default: $default,
                unit: Unit::$unit,
                min: $min,
                max: $max,
                takes: Takes::$takes,
                doc: concat!($($doc),+),
                answer: $answer,
            }, )+
        ];

        impl Limits {
            /// Limits as they were set: one value for each line of [`LIMITS`], in its order.
            /// [`Limits::within`] replaces a 0 that stands for a derived value.
            ///
            /// # Panics
            /// If there are fewer values than limits.
            #[must_use]
            pub fn from_values(values: impl IntoIterator<Item = u64>) -> Limits {
                let mut values = values.into_iter();
                let mut next = || values.next().expect("the caller gives one value per limit");
                // On a 32-bit machine a bound beyond the address space is the address space.
                Limits { $( $field: <$type>::try_from(next()).unwrap_or(<$type>::MAX), )+ }
            }

            /// One value for each line of [`LIMITS`], in its order.
            pub fn values(&self) -> impl Iterator<Item = u64> {
                [$( u64::try_from(self.$field).unwrap_or(u64::MAX), )+].into_iter()
            }
        }
    };
}

limits! {
    /// How long the server keeps the answer of a parked call for a caller that is not connected.
    answer_ttl_ms as "answer_ttl": u64 = 24 * HOUR, Millis(1000, 365 * 24 * HOUR), Restart,
        "the answer is deleted";
    /// How long the server keeps the answer of a call with an idempotency key.
    repeats_ttl_ms as "idempotency_ttl": u64 = HOUR / 6, Millis(1000, 24 * HOUR), Restart,
        "the answer is deleted; a repeat is a new call";
    /// How long a parked call is kept after its last attempt has failed.
    dead_ttl_ms as "dead_ttl": u64 = 7 * 24 * HOUR, Millis(1000, 365 * 24 * HOUR), Restart,
        "the call is deleted";
    /// Memory that all clients together can make the server use, including memory blocks; 0 is half
    /// of the memory that the server may use.
    memory_max: u64 = 0, Bytes(0, 1024 * GIB), Restart,
        "`overloaded` or `quota`; then the connections that hold the most are closed";
    /// Largest payload of a frame. Clients learn it in the handshake.
    max_frame: usize = 16 * MIB, Bytes(4 * KIB, GIB), Restart,
        "`frame_too_large`; the connection is closed before anything is buffered";
    /// Largest payload of a frame before the handshake is done.
    max_frame_before_handshake: usize = 64 * KIB, Bytes(KIB, GIB), Live,
        "`frame_too_large`; the connection is closed before anything is buffered";
    /// Open connections.
    connections_max: usize = 4096, Count(1, 1_000_000), Live,
        "`overloaded`; the connection is closed";
    /// Connections that have not completed their handshake.
    connections_unauthenticated_max: usize = 256, Count(1, 1_000_000), Live,
        "`overloaded`; the connection is closed";
    /// Connections of one user that have not completed their handshake.
    connections_unauthenticated_per_user_max: usize = 64, Count(1, 1_000_000), Live,
        "`overloaded`; the connection is closed";
    /// Calls in flight on one connection.
    in_flight_max: u32 = 2048, Count(1, 1_000_000), Restart,
        "further calls wait (`limits.held_bytes_max`); other messages are handled";
    /// Bytes of waiting calls and emits of one connection: those over its limit of calls in flight,
    /// and those behind a request that waits for the disk.
    held_bytes_max: usize = 4 * MIB, Bytes(4 * KIB, GIB), Restart,
        "the server stops reading from the connection until there is room";
    /// Calls in flight from one connection to one handler, so that a handler that does not answer
    /// leaves room for calls to others.
    in_flight_per_handler_max: u32 = 1024, Count(1, 1_000_000), Restart,
        "the call goes to another handler; without one, `overloaded`";
    /// Calls in flight in one pool.
    pending_max: usize = 65_536, Count(1, 16_777_216), Restart, "`overloaded`";
    /// Bytes waiting to be written to one connection.
    outbox_bytes_max: usize = 8 * MIB, Bytes(16 * KIB, 4 * GIB), Restart,
        "emits and pushes are dropped and counted, calls are refused with `overloaded`, answers \
         are replaced by `overloaded`";
    /// Room in an outbox that only errors, cancels and life-cycle messages (draining, displaced,
    /// ping) may use.
    outbox_headroom_bytes: usize = MIB, Bytes(4 * KIB, GIB), Restart,
        "the connection is closed";
    /// Descriptors of memory blocks waiting to be written to one connection.
    descriptors_unread_max: usize = 256, Count(1, 65_536), Restart, "`overloaded`";
    /// Bytes waiting to be written to all connections together; 0 is a tenth of
    /// `limits.memory_max`, at most 256 MiB.
    outbox_total_bytes_max: usize = 0, Bytes(0, 1024 * GIB), Restart,
        "new work is refused; then the connection that has held the most for the longest is closed";
    /// Known apps, connected or not.
    apps_max: usize = 100_000, Count(1, 16_777_216), Restart,
        "the app that has been offline longest is forgotten; if all are connected, `quota`";
    /// AppIDs with a key of their own.
    app_keys_max: usize = 10_000, Count(1, 1_048_576), Restart, "`quota`";
    /// Pools.
    pools_max: usize = 10_000, Count(1, 16_777_216), Restart, "`quota`";
    /// Pools that one app may join, or that one of its triggers may name.
    pools_per_app_max: usize = 256, Count(1, 65_536), Restart, "`quota`";
    /// Triggers that one app may serve.
    triggers_per_app_max: usize = 1024, Count(1, 65_536), Restart, "`quota`";
    /// Handlers of one app in all pools: its triggers times the pools that they are served in.
    served_per_app_max: usize = 4096, Count(1, 1_000_000), Restart, "`quota`";
    /// Connected instances of one app.
    instances_per_app_max: usize = 1024, Count(1, 65_536), Restart, "`quota`";
    /// Size of one app's registration: names, pools, docs and schemas.
    registration_bytes_max: usize = 256 * KIB, Bytes(KIB, GIB), Restart, "`quota`";
    /// Size of the schema of one trigger.
    trigger_schema_bytes_max: usize = SCHEMA_BYTES_MAX as u64,
        Bytes(SCHEMA_BYTES_MAX as u64, 32 * KIB), Restart, "`too_large`";
    /// Size of an app's `meta` or a pool's `properties`.
    meta_bytes_max: usize = 8 * KIB, Bytes(2, MIB), Restart, "`too_large`";
    /// Largest memory block.
    block_bytes_max: u64 = GIB, Bytes(4 * KIB, 1024 * GIB), Restart, "`too_large`";
    /// Number of memory blocks.
    blocks_max: usize = 4096, Count(1, 1_000_000), Restart, "`quota`";
    /// Bytes of all memory blocks, including slots and headers; 0 is half of `limits.memory_max`, a
    /// quarter of the memory that the server may use.
    memory_bytes_max: u64 = 0, Bytes(0, 1024 * GIB), Restart,
        "`quota`, with the bytes needed and free; nothing is allocated";
    /// Bytes of the memory blocks of one pool; 0 is no separate limit.
    memory_bytes_per_pool_max: u64 = 0, Bytes(0, 1024 * GIB), Restart,
        "`quota`, with the bytes needed and free; nothing is allocated";
    /// Bytes of the memory blocks created by one app; 0 is no separate limit.
    memory_bytes_per_app_max: u64 = 0, Bytes(0, 1024 * GIB), Restart,
        "`quota`, with the bytes needed and free; nothing is allocated";
    /// Memory blocks that one app may be attached to, counting all its instances.
    attachments_per_app_max: usize = 256, Count(1, 1_000_000), Restart, "`quota`";
    /// Memory blocks that one app may subscribe to, counting all its instances.
    subscriptions_per_app_max: usize = 1024, Count(1, 1_000_000), Restart, "`quota`";
    /// Requests waiting for one memory block (its lock, creation or flush), and holders of its
    /// lock.
    block_waiters_max: usize = 1024, Count(1, 1_000_000), Restart, "`overloaded`";
    /// Requests waiting for memory blocks, in total.
    waits_max: usize = 1_048_576, Count(1, 16_777_216), Restart, "`overloaded`";
    /// Requests of one connection waiting for memory blocks.
    waits_per_connection_max: usize = 262_144, Count(1, 16_777_216), Restart, "`overloaded`";
    /// Parked calls and waiting answers.
    parked_max: usize = 100_000, Count(0, 16_777_216), Restart, "`overloaded`";
    /// Memory used by all parked calls and waiting answers.
    parked_bytes_max: usize = 256 * MIB, Bytes(0, 64 * GIB), Restart, "`overloaded`";
    /// Parked calls and waiting answers of one app.
    parked_per_app_max: usize = 50_000, Count(0, 16_777_216), Restart, "`overloaded`";
    /// Memory used by the parked calls and waiting answers of one app.
    parked_bytes_per_app_max: usize = 128 * MIB, Bytes(0, 64 * GIB), Restart, "`overloaded`";
    /// Parked calls of one pool whose attempts have all failed.
    dead_max: usize = 1000, Count(0, 1_000_000), Restart, "the oldest one is deleted";
    /// Idempotency keys that one pool remembers.
    repeats_max: usize = 10_000, Count(1, 1_000_000), Restart,
        "the oldest answer is deleted; if all calls are in progress, `overloaded`";
    /// Bytes of the answers that one pool keeps for idempotency keys.
    repeats_bytes_max: usize = 16 * MIB, Bytes(KIB, GIB), Restart,
        "the oldest answers are deleted";
    /// Bytes read from one connection before the next one is read.
    read_budget_bytes: usize = 256 * KIB, Bytes(4 * KIB, GIB), Restart, "the other connections \
        are read first";
}

impl Limits {
    /// The bounds on the lists of a message.
    #[must_use]
    pub fn lists(&self) -> ListBounds {
        ListBounds {
            pools_max: self.pools_per_app_max,
            triggers_max: self.triggers_per_app_max,
            bytes_max: self.registration_bytes_max,
            schema_bytes_max: self.trigger_schema_bytes_max,
        }
    }

    /// Fills in the limits that are derived from `memory`, the bytes that the server may use.
    #[must_use]
    pub fn within(mut self, memory: u64) -> Limits {
        let or = |set: u64, otherwise: u64| if set == 0 { otherwise } else { set };
        // In whole MiB, so that people can read it.
        let whole = |bytes: u64| {
            if bytes > MIB {
                bytes / MIB * MIB
            } else {
                bytes
            }
        };
        self.memory_max = or(self.memory_max, whole(memory / 2));
        self.memory_bytes_max = or(self.memory_bytes_max, whole(self.memory_max / 2));
        self.memory_bytes_per_pool_max = or(self.memory_bytes_per_pool_max, self.memory_bytes_max);
        self.memory_bytes_per_app_max = or(self.memory_bytes_per_app_max, self.memory_bytes_max);
        if self.outbox_total_bytes_max == 0 {
            let total = whole(self.memory_max / 10).min(OUTBOX_TOTAL_BYTES_MAX);
            self.outbox_total_bytes_max = usize::try_from(total).unwrap_or(usize::MAX);
        }
        self
    }
}

impl Default for Limits {
    /// The default limits on a machine with 16 GiB.
    fn default() -> Self {
        Limits::from_values(LIMITS.iter().map(|limit| limit.default)).within(MEMORY_ASSUMED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_within_its_bounds() {
        for limit in LIMITS {
            assert!(
                (limit.min..=limit.max).contains(&limit.default),
                "{}",
                limit.setting
            );
        }
        let defaults: Vec<u64> = LIMITS.iter().map(|limit| limit.default).collect();
        let limits = Limits::from_values(defaults.iter().copied());
        assert_eq!(limits.values().collect::<Vec<_>>(), defaults);
        assert_eq!(
            (limits.max_frame, limits.in_flight_max),
            (latzero_protocol::limits::MAX_FRAME_DEFAULT, 2048)
        );
    }

    #[test]
    fn numbers_are_shown_in_the_largest_unit_that_fits() {
        let check = |unit: Unit, number, expected: &str| assert_eq!(unit.show(number), expected);
        check(Unit::Count, 4096, "4096");
        check(Unit::Bytes, 4096, "4 KiB");
        check(Unit::Bytes, 3 * GIB + 1, "3221225473");
        check(Unit::Bytes, 0, "0");
        check(Unit::Millis, 90_000, "90s");
        check(Unit::Millis, 24 * HOUR, "24h");
        check(Unit::Millis, 250, "250ms");
        check(Unit::Millis, 0, "0");
    }

    #[test]
    fn unset_limits_follow_from_the_memory() {
        let check = |change: &dyn Fn(&mut Limits), memory: u64, expected: [u64; 4]| {
            let mut limits = Limits::from_values(LIMITS.iter().map(|limit| limit.default));
            change(&mut limits);
            let limits = limits.within(memory);
            let got = [
                limits.memory_max,
                limits.memory_bytes_max,
                limits.memory_bytes_per_pool_max,
                limits.outbox_total_bytes_max as u64,
            ];
            assert_eq!(got, expected);
        };
        check(&|_| (), GIB, [GIB / 2, GIB / 4, GIB / 4, 51 * MIB]);
        check(&|_| (), 64 * GIB, [32 * GIB, 16 * GIB, 16 * GIB, 256 * MIB]);
        let set = |l: &mut Limits| l.memory_max = 64 * MIB;
        check(&set, GIB, [64 * MIB, 32 * MIB, 32 * MIB, 6 * MIB]);
        let set = |l: &mut Limits| (l.memory_bytes_max, l.outbox_total_bytes_max) = (MIB, 12_345);
        check(&set, GIB, [GIB / 2, MIB, MIB, 12_345]);
    }
}
