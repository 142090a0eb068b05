//! What must be refused: the negative vectors N1 to N20, each a small change of something good.
//!
//! N20 (a fork after the keys were loaded) has no state here that a child could share: a nonce is
//! an argument.

#[path = "../common/mod.rs"]
mod common;

mod blocks;
mod descriptors;
mod events;
mod keys;
mod proofs;
mod signatures;
