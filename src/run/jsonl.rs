//! An append-only JSON Lines file that can be taken back to an earlier length.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::fs;
use crate::{Error, Result};

/// One of the run's logs. Every line is written with one call, so a kill tears at most the last.
#[derive(Debug)]
pub struct JsonLines {
    file: File,
    path: PathBuf,
    length: u64,
}

impl JsonLines {
    /// Opens a log and drops what lies behind its first `length` bytes: the lines of steps that
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

    /// Appends one line.
    pub fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row)
            .map_err(|e| Error::Internal(format!("cannot write a line of a log: {e}")))?;
        line.push(b'\n');
        fs::write_all(&self.file, &self.path, &line)?;
        self.length += line.len() as u64;
        Ok(())
    }

    /// Makes the lines durable and gives the length in bytes, for a checkpoint to remember.
    pub fn sync(&mut self) -> Result<u64> {
        fs::change("sync", &self.path, || self.file.sync_data())?;
        Ok(self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_after_the_kept_length_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = JsonLines::open(&path, 0).unwrap();
        log.append(&serde_json::json!({"step": 1})).unwrap();
        let kept = log.sync().unwrap();
        log.append(&serde_json::json!({"step": 2})).unwrap();
        drop(log);
        let mut log = JsonLines::open(&path, kept).unwrap();
        log.append(&serde_json::json!({"step": 3})).unwrap();
        drop(log);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":3}\n");
        let error = JsonLines::open(&path, 1000).unwrap_err().to_string();
        assert!(error.contains("metrics.jsonl has 22 bytes"), "{error}");
    }
}
