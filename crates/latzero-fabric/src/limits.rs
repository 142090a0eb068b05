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
        }
    }
}
