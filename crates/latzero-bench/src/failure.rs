//! Why a measurement failed.

use std::io;

/// A benchmark has one reader, a person: every failure is a sentence, and ends the run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// What went wrong, in words.
    #[error("{0}")]
    Said(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl Failure {
    pub(crate) fn said(text: impl Into<String>) -> Self {
        Self::Said(text.into())
    }
}

/// Names what was being done when a system call failed.
pub(crate) trait During<T> {
    fn during(self, what: impl Into<String>) -> Result<T, Failure>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|source| Failure::Io {
            what: what.into(),
            source,
        })
    }
}
