//! Bounds that the core keeps. Each is a setting of the server, by the same name.

/// The core's bounds.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest payload of a frame in bytes; announced in the handshake acknowledgement.
    pub max_frame: usize,
    /// Calls that one connection may have in flight; beyond it they are refused with `overloaded`.
    pub in_flight_max: u32,
    /// Calls that one pool holds; beyond it they are refused with `overloaded`.
    pub pending_max: usize,
    /// Apps that are remembered; the one offline longest makes room for a new one, else `quota`.
    pub apps_max: usize,
    /// Pools; beyond it `quota`.
    pub pools_max: usize,
    /// Pools that one app may be in; beyond it `quota`.
    pub pools_per_app_max: usize,
    /// Triggers that one app may serve; beyond it `quota`.
    pub triggers_per_app_max: usize,
    /// Live instances of one app; beyond it `quota`.
    pub instances_per_app_max: usize,
    /// Size of what one app registers, its names, pools and docs together, in bytes; beyond it `quota`.
    pub registration_bytes_max: usize,
    /// Size of an app's `meta` or a pool's `properties` in bytes; beyond it `too_large`.
    pub meta_bytes_max: usize,
    /// Largest block in bytes; beyond it `too_large`.
    pub block_bytes_max: u64,
    /// Blocks of the server; beyond it `quota`.
    pub blocks_max: usize,
    /// Bytes of all blocks, slots and headers included; beyond it `quota`.
    pub memory_bytes_max: u64,
    /// Bytes of one pool's blocks; beyond it `quota`.
    pub memory_bytes_per_pool_max: u64,
    /// Bytes of the blocks that one app made; beyond it `quota`.
    pub memory_bytes_per_app_max: u64,
    /// Blocks that one app is attached to, over all its instances; beyond it `quota`.
    pub attachments_per_app_max: usize,
    /// Blocks whose changes one app is told, over all its instances; beyond it `quota`.
    pub subscriptions_per_app_max: usize,
    /// Requests that wait for one block: for its lock, its making or its flush; beyond it `overloaded`.
    pub block_waiters_max: usize,
    /// Parked calls and kept answers of the server; beyond it `overloaded`.
    pub parked_max: usize,
    /// Their bytes; beyond it `overloaded`.
    pub parked_bytes_max: usize,
    /// Parked calls and kept answers of one app; beyond it `overloaded`.
    pub parked_per_app_max: usize,
    /// Their bytes; beyond it `overloaded`.
    pub parked_bytes_per_app_max: usize,
    /// Calls of one pool whose idempotency key is known; beyond it the oldest answer goes, else `overloaded`.
    pub repeats_max: usize,
    /// Bytes of the answers that one pool keeps for repeats; beyond it the oldest go.
    pub repeats_bytes_max: usize,
    /// How long an answer is kept for repeats, in milliseconds.
    pub repeats_ttl_ms: u64,
    /// How long an answer waits for its caller, in milliseconds; then it is dropped.
    pub answer_ttl_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_frame: latzero_protocol::limits::MAX_FRAME_DEFAULT,
            in_flight_max: 1024,
            pending_max: 65_536,
            apps_max: 100_000,
            pools_max: 10_000,
            pools_per_app_max: 256,
            triggers_per_app_max: 1024,
            instances_per_app_max: 1024,
            registration_bytes_max: 256 * 1024,
            meta_bytes_max: 8192,
            block_bytes_max: 1 << 30,
            blocks_max: 4096,
            memory_bytes_max: 4 << 30,
            memory_bytes_per_pool_max: u64::MAX,
            memory_bytes_per_app_max: u64::MAX,
            attachments_per_app_max: 256,
            subscriptions_per_app_max: 1024,
            block_waiters_max: 1024,
            parked_max: 100_000,
            parked_bytes_max: 256 << 20,
            parked_per_app_max: 50_000,
            parked_bytes_per_app_max: 128 << 20,
            repeats_max: 10_000,
            repeats_bytes_max: 16 << 20,
            repeats_ttl_ms: 10 * 60 * 1000,
            answer_ttl_ms: 24 * 60 * 60 * 1000,
        }
    }
}
