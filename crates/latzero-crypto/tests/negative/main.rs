//! What must be refused: the negative vectors N1 to N20, each a small change to a valid input.
//!
//! N20 (a fork after the keys were loaded) needs no test: there is no state that a child could
//! share, because a nonce is an argument.

#[path = "../common/mod.rs"]
mod common;

mod blocks;
mod descriptors;
mod events;
mod keys;
mod proofs;
mod signatures;
