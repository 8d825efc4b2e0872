//! One process a run directory.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::Path;

use super::fs;
use crate::{Error, Result};

/// Held while this value lives; the system releases it when the process dies, however it dies.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Locks a run directory.
    ///
    /// # Errors
    /// [`Error::Config`] when another process holds it.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let mut file = fs::open_to_write(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::config(format!(
                    "{} is in use by another process; wait for it or choose another folder",
                    folder.display()
                )));
            }
            Err(TryLockError::Error(e)) => return Err(fs::error("lock", &path, &e)),
        }
        // The process id is a courtesy to whoever looks; the lock itself is the system's.
        let _ = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Self { _file: file })
    }
}
