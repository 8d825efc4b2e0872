//! An append-only file that can be taken back to an earlier length.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::fs;
use crate::{Error, Result};

/// One of the run's logs. Every record is written with one call, so a kill tears at most the last.
#[derive(Debug)]
pub struct AppendFile {
    file: File,
    path: PathBuf,
    length: u64,
}

impl AppendFile {
    /// Opens a log and drops what lies behind its first `length` bytes: the records of steps that
    /// are going to be done again.
    ///
    /// # Errors
    /// When the file is shorter than `length` or cannot be written.
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        let fail = |e: std::io::Error| fs::error("read", path, &e);
        let mut file = fs::open_to_write(path)?;
        let found = file.metadata().map_err(fail)?.len();
        if found < length {
            return Err(Error::data(format!(
                "{} has {found} bytes where the checkpoint counts {length}: it was changed or cut",
                path.display()
            )));
        }
        fs::set_len(&file, path, length)?;
        file.seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            length,
        })
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends one record.
    pub fn append(&mut self, record: &[u8]) -> Result<()> {
        fs::write_all(&self.file, &self.path, record)?;
        self.length += record.len() as u64;
        Ok(())
    }

    /// Makes the records durable and gives the length in bytes, for a checkpoint to remember.
    pub fn sync(&mut self) -> Result<u64> {
        fs::change("sync", &self.path, || self.file.sync_data())?;
        Ok(self.length)
    }
}
