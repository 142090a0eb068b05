//! A countdown for tests: the N-th step of the store fails, once or from then on.
//!
//! Each begin, statement, commit, checkpoint, backup step, rename and fsync asks it first. Without
//! a countdown that is one comparison with a null pointer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Whether steps after the failing one fail as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// Only the one step fails.
    Once,
    /// All steps from it on fail.
    ForEver,
}

/// Which step fails, if any. Clones share one count.
#[derive(Debug, Clone, Default)]
pub struct Faults(Option<Arc<Countdown>>);

#[derive(Debug)]
struct Countdown {
    at: u64,
    lasts: Lasts,
    passed: AtomicU64,
    healed: AtomicBool,
    failed: AtomicU64,
}

/// The error of a failing step.
#[derive(Debug)]
pub(crate) struct Injected(&'static str);

impl Faults {
    /// Nothing fails.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }

    /// The `at`-th step fails, counted from 1.
    #[must_use]
    pub fn at(at: u64, lasts: Lasts) -> Self {
        Self(Some(Arc::new(Countdown {
            at,
            lasts,
            passed: AtomicU64::new(0),
            healed: AtomicBool::new(false),
            failed: AtomicU64::new(0),
        })))
    }

    /// No step fails any more.
    pub fn heal(&self) {
        if let Some(countdown) = &self.0 {
            countdown.healed.store(true, Ordering::SeqCst);
        }
    }

    /// How many steps failed so far.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.0
            .as_ref()
            .map_or(0, |countdown| countdown.failed.load(Ordering::SeqCst))
    }

    pub(crate) fn step(&self, name: &'static str) -> Result<(), Injected> {
        let Some(countdown) = &self.0 else {
            return Ok(());
        };
        let now = countdown.passed.fetch_add(1, Ordering::SeqCst) + 1;
        let fails = match countdown.lasts {
            Lasts::Once => now == countdown.at,
            Lasts::ForEver => now >= countdown.at,
        };
        if fails && !countdown.healed.load(Ordering::SeqCst) {
            countdown.failed.fetch_add(1, Ordering::SeqCst);
            return Err(Injected(name));
        }
        Ok(())
    }
}

impl From<Injected> for rusqlite::Error {
    fn from(injected: Injected) -> Self {
        rusqlite::Error::SqliteFailure(
            rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR),
            Some(format!("disk I/O error (injected at {})", injected.0)),
        )
    }
}

impl From<Injected> for std::io::Error {
    fn from(injected: Injected) -> Self {
        std::io::Error::other(format!("injected at {}", injected.0))
    }
}
