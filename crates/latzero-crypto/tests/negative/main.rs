//! What must be refused: the negative vectors N1 to N20, each a small change to a valid input.
//!
//! N20 (a fork after the keys were loaded) is tested where there is something to fork: a nonce is
//! an argument here, so a child shares no state with its parent.

#[path = "../common/mod.rs"]
mod common;

mod blocks;
mod descriptors;
mod events;
mod keys;
mod proofs;
mod signatures;

/// The other tests once more, on each library alone: by themselves they run on the mixture that
/// [`latzero_crypto::backend::preferred`] chooses.
#[test]
fn each_library_refuses_them() {
    if std::env::var_os(common::LIBRARY).is_some() {
        return;
    }
    for backend in latzero_crypto::backend::all() {
        let tests = std::env::current_exe().expect("a test has a program");
        let run = std::process::Command::new(tests)
            .env(common::LIBRARY, backend.name())
            .output()
            .expect("it can be started");
        let output = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "{}:\n{output}", backend.name());
    }
}
