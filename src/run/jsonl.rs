//! A log of JSON Lines.

use std::path::Path;

use serde::Serialize;

use super::append::AppendFile;
use crate::{Error, Result};

/// An [`AppendFile`] of one JSON object a line.
#[derive(Debug)]
pub struct JsonLines(AppendFile);

impl JsonLines {
    /// See [`AppendFile::open`].
    pub fn open(path: &Path, length: u64) -> Result<Self> {
        AppendFile::open(path, length).map(Self)
    }

    /// Appends one line.
    pub fn append(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row)
            .map_err(|e| Error::Internal(format!("cannot write a line of a log: {e}")))?;
        line.push(b'\n');
        self.0.append(&line)
    }

    /// See [`AppendFile::sync`].
    pub fn sync(&mut self) -> Result<u64> {
        self.0.sync()
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
