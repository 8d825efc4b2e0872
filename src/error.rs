//! The one error type of the crate: what went wrong, in words for the user, and the exit code.

use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure, grouped by the exit code of the command line contract.
///
/// Messages are lower-case fragments that name the file, key or value and say what to do.
#[derive(Debug, Clone, thiserror::Error, Serialize, Deserialize)]
pub enum Error {
    /// The command line or the configuration is wrong (exit code 2).
    #[error("{0}")]
    Config(String),
    /// A model, data set, adapter or checkpoint could not be read or written (exit code 3).
    #[error("{0}")]
    Data(String),
    /// Training cannot go on: NaN, or a reward that never moves (exit code 4).
    #[error("{0}")]
    Diverged(String),
    /// Stopped by a signal after saving (exit code 130).
    #[error("{0}")]
    Interrupted(String),
    /// Another process of the run, or every server, is gone or has come elsewhere (exit code 1).
    #[error("{0}")]
    Lost(String),
    /// A bug or an unexpected failure of the machine (exit code 1).
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn config(message: impl Display) -> Self {
        Self::Config(message.to_string())
    }

    pub fn data(message: impl Display) -> Self {
        Self::Data(message.to_string())
    }

    /// An I/O or parse failure that names its file.
    pub fn file(action: &str, path: &Path, cause: impl Display) -> Self {
        Self::Data(format!("cannot {action} {}: {cause}", path.display()))
    }

    /// The process exit code of the command line contract.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Internal(_) | Self::Lost(_) => 1,
            Self::Config(_) => 2,
            Self::Data(_) => 3,
            Self::Diverged(_) => 4,
            Self::Interrupted(_) => 130,
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Internal(format!("tensor operation failed: {error}"))
    }
}
