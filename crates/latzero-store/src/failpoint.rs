//! Places where a crash test can kill the process.
//!
//! In builds with debug assertions, `LATZERO_FAILPOINT=NAME:N` in the environment makes the process
//! kill itself (SIGKILL) when it passes NAME for the N-th time. In other builds failpoints cost
//! nothing.

/// Every name, for tests that try all of them.
#[must_use]
pub const fn names() -> &'static [&'static str] {
    &[
        "store.begin",
        "store.before_commit",
        "store.after_commit",
        "store.before_tell",
        "store.before_checkpoint",
        "store.after_checkpoint",
        "migrate.before_commit",
        "migrate.after_commit",
        "backup.step",
        "backup.copied",
        "backup.before_rename",
        "backup.after_rename",
        "restore.built",
        "restore.decided",
        "restore.set_aside",
        "restore.renamed",
    ]
}

/// The process passes the place `name`.
#[cfg(debug_assertions)]
pub fn reached(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    let wanted = WANTED.get_or_init(|| {
        let value = std::env::var("LATZERO_FAILPOINT").ok()?;
        let (name, pass) = value.rsplit_once(':')?;
        Some((name.to_owned(), pass.parse().ok()?))
    });
    let Some((wanted, pass)) = wanted else { return };
    if wanted == name && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *pass {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// The process passes the place `name`.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn reached(_name: &'static str) {}
