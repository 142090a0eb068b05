//! Why a measurement failed.

use std::io;

/// The reader of a benchmark is a person: every failure is a sentence, and ends the run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A failure described in words.
    #[error("{0}")]
    Said(String),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What the program was doing.
        what: String,
        /// The system's error.
        source: io::Error,
    },
}

impl Failure {
    pub(crate) fn said(text: impl Into<String>) -> Self {
        Self::Said(text.into())
    }
}

/// Adds what the program was doing to the error of a system call.
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
