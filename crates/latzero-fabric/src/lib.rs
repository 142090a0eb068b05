//! Pools, sessions and the registry as deterministic state machines.
